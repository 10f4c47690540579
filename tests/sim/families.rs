//! Families of seeds: each a distribution of trouble. Within a family the seed decides everything.
//!
//! Seed `f * FAMILY_SEEDS + i` is the i-th of family f. Family 0 mixes everything; the others make chains likely that
//! mixed trouble seldom completes.

use rand::Rng;
use rand::rngs::StdRng;

use crate::chaos::Trouble;
use crate::world::REPLICAS;

/// Seeds of one family.
pub const FAMILY_SEEDS: u64 = 1_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// A little of everything.
    Mixed,
    /// Nodes are cut off and the volume moves.
    Movers,
    /// Replicas are killed, with a log that is cleared at once.
    Kills,
    /// Targets that do not know that they were replaced.
    Deposed,
    /// Targets started beside one of the same attachment.
    SecondStarts,
    /// Trouble at chosen steps, mostly of joins.
    Steps,
    /// Pauses and cuts of minutes.
    Minutes,
    /// Targets are killed again and again.
    Restarts,
    /// A slow clock, and a sleep that ends about when a lease does.
    Edge,
    /// Snapshots are cut all the time, and death strikes at the steps of a cut.
    Cuts,
    /// Two volumes that are cut as a group, under clients that use both.
    Groups,
    /// Control requests that are under way for seconds while their session ends.
    Stragglers,
    /// Blocks rot, tear and land elsewhere, while another member has them.
    Rot = 12,
    /// The same, down to the last copy.
    LastCopies = 13,
    /// The record store is restored from a backup; an operator decides.
    Restores = 14,
    /// The last member is lost, and an operator promotes another replica.
    Promotions = 15,
    /// Clients ask every few seconds: the target asks its replicas seldom.
    Naps = 16,
    /// The number of replicas is lowered and raised again and again.
    Removals = 17,
    /// The record store is lost whole and rescued from the replicas' copies, under kills and snapshots.
    Losses = 18,
}

impl Family {
    pub const ALL: [Self; 19] = [
        Self::Mixed,
        Self::Movers,
        Self::Kills,
        Self::Deposed,
        Self::SecondStarts,
        Self::Steps,
        Self::Minutes,
        Self::Restarts,
        Self::Edge,
        Self::Cuts,
        Self::Groups,
        Self::Stragglers,
        Self::Rot,
        Self::LastCopies,
        Self::Restores,
        Self::Promotions,
        Self::Naps,
        Self::Removals,
        Self::Losses,
    ];

    pub fn of(seed: u64) -> Self {
        Self::ALL.into_iter().find(|family| *family as u64 == seed / FAMILY_SEEDS).unwrap_or(Self::Mixed)
    }

    /// Seeds of the family in a run of so many mixed ones.
    pub fn share_of(self, mixed: u64) -> u64 {
        match self {
            Self::Mixed => mixed,
            // Each is two volumes.
            Self::Groups => mixed / 16,
            Self::Movers
            | Self::Kills
            | Self::Deposed
            | Self::SecondStarts
            | Self::Steps
            | Self::Minutes
            | Self::Restarts
            | Self::Edge
            | Self::Cuts
            | Self::Stragglers
            | Self::Rot
            | Self::LastCopies
            | Self::Restores
            | Self::Promotions
            | Self::Naps
            | Self::Removals
            | Self::Losses => mixed / 8,
        }
    }

    /// The first seeds of the family.
    pub fn seeds(self, count: u64) -> std::ops::Range<u64> {
        let first = self as u64 * FAMILY_SEEDS;
        first..first + count.min(FAMILY_SEEDS)
    }
}

/// How far clocks go apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    Mild,
    /// Each as far from true as is assumed: 1 %.
    AtBound,
    /// Twice as far; the margin on top of the bound still covers it.
    PastBound,
}

#[derive(Debug)]
pub struct Chaos {
    pub weights: Vec<(Trouble, u32)>,
    pub gap_us: u64,
    /// Longest time a trouble lasts.
    pub lasts_us: u64,
    /// How long the store is down, if not as long as any other trouble.
    pub store_down_us: Option<u64>,
    pub store_flaky: f64,
    pub store_stale: f64,
    pub client_gap_us: u64,
    /// Clients use all blocks, not only a few hot ones: what a replica misses is seldom written again.
    pub wide: bool,
    /// The volume is published to the node that has no replica.
    pub prefers_diskless: bool,
    pub drift: Drift,
    /// The one node whose clock is slow.
    pub slow_node: Option<usize>,
    /// A killed process counts as a lost cache, as with our store.
    pub kill_loses_cache: bool,
    /// What a crash interrupts may not verify; members are scrubbed at the end.
    pub tears_blocks: bool,
    /// Old records are kept, to be restored.
    pub restores_store: bool,
    pub log_cold_ms: u64,
    pub log_clear_every_ms: u64,
    pub log_regions_max: usize,
    pub until_us: u64,
}

const MIXED: [Trouble; 23] = [
    Trouble::KillReplica,
    Trouble::PowerLoss,
    Trouble::PowerLossOfAll,
    Trouble::FailFlush,
    Trouble::Cut,
    Trouble::OneWayCut,
    Trouble::Isolate,
    Trouble::PauseTarget,
    Trouble::PauseReplica,
    Trouble::KillTarget,
    Trouble::Move,
    Trouble::StopTarget,
    Trouble::StoreDown,
    Trouble::UnrelatedWriter,
    Trouble::SlowDisk,
    Trouble::HungDisk,
    Trouble::FullDisk,
    Trouble::PauseEverything,
    Trouble::StopClock,
    Trouble::Depose,
    Trouble::SecondStart,
    Trouble::Trap,
    Trouble::ChainOfDeaths,
];

impl Chaos {
    /// What goes wrong under a seed.
    pub fn of_seed(seed: u64, rng: &mut StdRng) -> Self {
        let mut chaos = Self::mixed(rng);
        chaos.narrow(Family::of(seed), rng);
        chaos
    }

    fn mixed(rng: &mut StdRng) -> Self {
        let mut weights: Vec<(Trouble, u32)> =
            MIXED.iter().map(|trouble| (*trouble, [0, 0, 1, 1, 4][rng.random_range(0..5)])).collect();
        // A client is only told of lost caches when all lost them: too often, and nothing else is ever checked.
        for (trouble, weight) in &mut weights {
            if *trouble == Trouble::PowerLossOfAll {
                *weight = (*weight).min(1) * u32::from(rng.random_bool(0.4));
            }
        }
        weights.push((Trouble::KillReplica, 1));
        Self {
            weights,
            gap_us: [100_000, 400_000, 1_500_000, 3_000_000][rng.random_range(0..4)],
            lasts_us: [300_000, 1_500_000, 5_000_000][rng.random_range(0..3)],
            store_down_us: None,
            store_flaky: [0.0, 0.02, 0.2][rng.random_range(0..3)],
            store_stale: [0.0, 0.0, 0.1][rng.random_range(0..3)],
            client_gap_us: [600, 2_000, 10_000][rng.random_range(0..3)],
            wide: rng.random_bool(0.4),
            prefers_diskless: false,
            slow_node: None,
            drift: [Drift::Mild, Drift::Mild, Drift::AtBound, Drift::PastBound][rng.random_range(0..4)],
            kill_loses_cache: rng.random_bool(0.5),
            tears_blocks: false,
            restores_store: false,
            log_cold_ms: [0, 0, 20, 2_000][rng.random_range(0..4)],
            log_clear_every_ms: [5, 20, 100, 1_000][rng.random_range(0..4)],
            log_regions_max: [2, 3, 1_000, 1_000][rng.random_range(0..4)],
            until_us: 1_000_000 + rng.random_range(5_000_000..25_000_000),
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table, one entry per family")]
    fn narrow(&mut self, family: Family, rng: &mut StdRng) {
        match family {
            Family::Mixed | Family::Cuts => {}
            Family::Movers => {
                self.weights = vec![(Trouble::Isolate, 1), (Trouble::Move, 1)];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (700_000, 5_000_000, 2_000);
                // What only the one that is cut off has must not be in the others' logs by other writes to the region.
                if self.wide {
                    (self.log_cold_ms, self.log_clear_every_ms, self.client_gap_us) = (0, 5, 8_000);
                }
            }
            Family::Kills => {
                self.weights = vec![(Trouble::KillReplica, 6), (Trouble::Cut, 1), (Trouble::LateEpoch, 3)];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (150_000, 400_000, 6_000);
                (self.log_cold_ms, self.log_clear_every_ms) = (0, 5);
            }
            Family::Deposed => {
                self.weights = vec![(Trouble::Depose, 4), (Trouble::StopClock, 2), (Trouble::Move, 1)];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (1_500_000, 3_000_000, 1_500);
                self.drift = Drift::AtBound;
                self.store_flaky = 0.0;
            }
            Family::Edge => {
                self.weights = vec![(Trouble::SleepToTheEdge, 1)];
                (self.gap_us, self.client_gap_us) = (4_000_000, 1_500);
                self.drift = Drift::AtBound;
                self.slow_node = Some(rng.random_range(0..REPLICAS));
                self.store_flaky = 0.0;
                self.until_us = 40_000_000;
            }
            Family::SecondStarts => {
                self.weights = vec![
                    (Trouble::SecondStart, 4),
                    (Trouble::PauseTarget, 3),
                    (Trouble::Cut, 2),
                    (Trouble::KillTarget, 1),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (300_000, 1_500_000, 1_500);
            }
            Family::Steps => {
                self.weights = vec![
                    (Trouble::Trap, 8),
                    (Trouble::ChainOfDeaths, 1),
                    (Trouble::KillReplica, 2),
                    (Trouble::Isolate, 1),
                    (Trouble::Move, u32::from(rng.random_bool(0.5))),
                ];
                (self.gap_us, self.lasts_us) = (250_000, 1_500_000);
            }
            Family::Restarts => {
                self.weights = vec![
                    (Trouble::KillTarget, 6),
                    (Trouble::KillReplica, 1),
                    (Trouble::PowerLoss, 1),
                    (Trouble::Isolate, 1),
                    (Trouble::ChainOfDeaths, 1),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (300_000, 1_500_000, 800);
                self.store_flaky = 0.0;
                // Without a replica on its node a target reads from all of them.
                self.prefers_diskless = rng.random_bool(0.6);
            }
            Family::Groups => {
                // Rarely enough that most groups meet none.
                self.gap_us = [3_000_000, 6_000_000, 12_000_000][rng.random_range(0..3)];
                self.lasts_us = self.lasts_us.min(1_500_000);
                self.client_gap_us = self.client_gap_us.max(2_000);
                self.until_us = 20_000_000;
            }
            Family::Stragglers => {
                self.weights = vec![
                    (Trouble::Straggle, 6),
                    (Trouble::LayersFull, 6),
                    (Trouble::KillTarget, 1),
                    (Trouble::KillReplica, 1),
                    (Trouble::PowerLoss, 1),
                    (Trouble::Move, 1),
                ];
                (self.gap_us, self.lasts_us) = (300_000, 1_500_000);
                self.client_gap_us = self.client_gap_us.max(2_000);
                self.store_flaky = 0.0;
            }
            Family::Rot => {
                self.weights = vec![
                    (Trouble::Rot, 8),
                    (Trouble::Misdirect, 4),
                    (Trouble::FailReads, 1),
                    (Trouble::KillTarget, 2),
                    (Trouble::KillReplica, 2),
                    (Trouble::PowerLoss, 1),
                    (Trouble::Move, 1),
                    (Trouble::Isolate, 1),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (120_000, 1_000_000, 1_000);
                self.tears_blocks = true;
                // Without a replica on its node a target reads from all of them.
                self.prefers_diskless = rng.random_bool(0.6);
            }
            Family::LastCopies => {
                self.weights = vec![
                    (Trouble::Rot, 4),
                    (Trouble::Misdirect, 3),
                    (Trouble::RotEverywhere, 2),
                    (Trouble::FailReads, 5),
                    (Trouble::KillTarget, 4),
                    (Trouble::KillReplica, 3),
                    (Trouble::PowerLoss, 1),
                    (Trouble::Isolate, 2),
                    (Trouble::PowerLossOfAll, u32::from(rng.random_bool(0.3))),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (250_000, 2_000_000, 2_000);
                self.tears_blocks = true;
            }
            Family::Restores => {
                self.weights = vec![
                    (Trouble::KillReplica, 3),
                    (Trouble::Isolate, 3),
                    (Trouble::KillTarget, 2),
                    (Trouble::Move, 1),
                    (Trouble::RestoreStore, 2),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (600_000, 3_000_000, 25_000);
                (self.store_flaky, self.store_stale) = (0.0, 0.0);
                self.restores_store = true;
                self.until_us = rng.random_range(90_000_000..120_000_000);
            }
            Family::Promotions => {
                self.weights = vec![
                    (Trouble::KillReplica, 2),
                    (Trouble::Isolate, 4),
                    (Trouble::GiveUp, 2),
                    (Trouble::Move, 1),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (400_000, 4_000_000, 40_000);
                (self.store_flaky, self.store_stale) = (0.0, 0.0);
                self.until_us = rng.random_range(100_000_000..130_000_000);
            }
            Family::Naps => {
                self.weights = vec![
                    (Trouble::KillReplica, 3),
                    (Trouble::Isolate, 3),
                    (Trouble::OneWayCut, 2),
                    (Trouble::PauseTarget, 2),
                    (Trouble::PauseReplica, 2),
                    (Trouble::StopClock, 2),
                    (Trouble::Move, 2),
                    (Trouble::KillTarget, 1),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (12_000_000, 4_000_000, 3_000_000);
                (self.log_cold_ms, self.store_flaky) = (20, 0.0);
                self.until_us = 240_000_000;
            }
            Family::Removals => {
                self.weights = vec![
                    (Trouble::KillReplica, 3),
                    (Trouble::PowerLoss, 1),
                    (Trouble::KillTarget, 2),
                    (Trouble::Isolate, 2),
                    (Trouble::Cut, 1),
                    (Trouble::StoreDown, 1),
                    (Trouble::UnrelatedWriter, 2),
                    (Trouble::Move, 1),
                ];
                self.gap_us = self.gap_us.max(400_000);
                self.prefers_diskless = rng.random_bool(0.6);
                self.until_us = rng.random_range(20_000_000..40_000_000);
            }
            Family::Losses => {
                self.weights = vec![
                    (Trouble::KillReplica, 4),
                    (Trouble::PowerLoss, 1),
                    (Trouble::Isolate, 2),
                    (Trouble::KillTarget, 2),
                    (Trouble::Move, 1),
                    (Trouble::LoseStore, 3),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (500_000, 3_000_000, 8_000);
                (self.store_flaky, self.store_stale) = (self.store_flaky.min(0.02), 0.0);
                self.until_us = rng.random_range(40_000_000..60_000_000);
            }
            Family::Minutes => {
                self.weights = vec![
                    (Trouble::PauseTarget, 2),
                    (Trouble::PauseReplica, 1),
                    (Trouble::PauseEverything, 1),
                    (Trouble::StopClock, 2),
                    (Trouble::Isolate, 1),
                    (Trouble::StoreDown, 1),
                    (Trouble::Trap, 3),
                    (Trouble::Move, 2),
                    (Trouble::KillReplica, 2),
                ];
                (self.gap_us, self.lasts_us, self.client_gap_us) = (30_000_000, 240_000_000, 100_000);
                self.store_down_us = Some(630_000_000);
                self.log_clear_every_ms = self.log_clear_every_ms.max(100);
                self.until_us = rng.random_range(300_000_000..1_500_000_000);
            }
        }
    }

    /// Parts per million by which a node's clock is fast.
    pub fn draw_rate_ppm(&self, node: usize, rng: &mut StdRng) -> i64 {
        match self.drift {
            Drift::AtBound if self.slow_node == Some(node) => -10_000,
            Drift::AtBound if self.slow_node.is_some() => 10_000,
            Drift::Mild => rng.random_range(-5_000..5_000),
            Drift::AtBound => [-10_000, 10_000][rng.random_range(0..2)],
            Drift::PastBound => [-20_000, 20_000][rng.random_range(0..2)],
        }
    }
}
