//! What goes wrong: drawn per seed, so that some runs see much of one thing and others a little of everything.

use rand::Rng;
use rand::rngs::StdRng;

use crate::world::{Event, NODES, REPLICAS, STORE, TargetNumber, World};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    KillReplica,
    PowerLoss,
    PowerLossOfAll,
    FailFlush,
    Cut,
    OneWayCut,
    Isolate,
    PauseTarget,
    PauseReplica,
    KillTarget,
    Move,
    StopTarget,
    StoreDown,
    UnrelatedWriter,
    SlowDisk,
    FullDisk,
    PauseEverything,
}

const ALL: [Trouble; 17] = [
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
    Trouble::FullDisk,
    Trouble::PauseEverything,
];

#[derive(Debug)]
pub struct Chaos {
    weights: Vec<(Trouble, u32)>,
    gap_us: u64,
    /// Longest time a trouble lasts.
    lasts_us: u64,
    pub store_flaky: f64,
    pub client_gap_us: u64,
    /// A killed process counts as a lost cache, as with our store.
    pub kill_loses_cache: bool,
    pub log_cold_ms: u64,
    pub log_clear_every_ms: u64,
    pub until_us: u64,
}

impl Chaos {
    pub fn draw(rng: &mut StdRng) -> Self {
        let mut weights: Vec<(Trouble, u32)> =
            ALL.iter().map(|trouble| (*trouble, [0, 0, 1, 1, 4][rng.random_range(0..5)])).collect();
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
            store_flaky: [0.0, 0.02, 0.2][rng.random_range(0..3)],
            client_gap_us: [600, 2_000, 10_000][rng.random_range(0..3)],
            kill_loses_cache: rng.random_bool(0.5),
            log_cold_ms: [0, 0, 20, 2_000][rng.random_range(0..4)],
            log_clear_every_ms: [5, 20, 100, 1_000][rng.random_range(0..4)],
            until_us: 1_000_000 + rng.random_range(5_000_000..25_000_000),
        }
    }
}

/// Seeds from here on see one kind of trouble only, for chains that mixed trouble seldom completes.
pub const FOCUSED: u64 = 1_000_000;

impl Chaos {
    /// Narrows what was drawn.
    pub fn focus(&mut self, seed: u64) {
        if seed < FOCUSED {
            return;
        }
        self.lasts_us = 5_000_000;
        self.client_gap_us = 2_000;
        (self.weights, self.gap_us) = if seed.is_multiple_of(2) {
            (vec![(Trouble::Isolate, 1), (Trouble::Move, 1)], 700_000)
        } else {
            (self.log_cold_ms, self.log_clear_every_ms, self.lasts_us) = (0, 5, 400_000);
            self.client_gap_us = 6_000;
            (vec![(Trouble::KillReplica, 6), (Trouble::Cut, 1)], 150_000)
        };
    }
}

impl World {
    pub fn chaos_strikes(&mut self) {
        if self.now >= self.chaos.until_us {
            return;
        }
        let gap = self.rng.random_range(0..2 * self.chaos.gap_us);
        self.schedule(gap, Event::Chaos);
        let total: u32 = self.chaos.weights.iter().map(|(_, weight)| weight).sum();
        let mut at = self.rng.random_range(0..total);
        let hit = self.chaos.weights.iter().find(|(_, weight)| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        });
        let Some((trouble, _)) = hit.copied() else { return };
        let node = self.rng.random_range(0..NODES);
        let lasts = self.rng.random_range(1_000..self.chaos.lasts_us);
        self.log(|| format!("-- {trouble:?} n{node} for {} ms", lasts / 1000));
        self.strike(trouble, node, lasts);
    }

    fn strike(&mut self, trouble: Trouble, node: usize, lasts: u64) {
        match trouble {
            Trouble::KillReplica => {
                let node = node % REPLICAS;
                self.kill_process(node, true);
                self.schedule(lasts, Event::StartProcess { node });
            }
            Trouble::PowerLoss => self.power_off(node, lasts),
            Trouble::PowerLossOfAll => {
                for node in 0..NODES {
                    let lasts = lasts / (node as u64 + 1);
                    self.power_off(node, lasts);
                }
            }
            Trouble::FailFlush => self.nodes[node].disk.fail_flush = true,
            Trouble::Cut | Trouble::OneWayCut | Trouble::Isolate => self.cut(trouble, node, lasts),
            Trouble::PauseTarget => {
                if let Some(target) = self.any_target() {
                    self.pause_target(target, lasts);
                }
            }
            Trouble::PauseReplica => self.pause_replica(node, lasts),
            Trouble::PauseEverything => {
                self.pause_replica(node, lasts);
                let here: Vec<TargetNumber> = self
                    .targets
                    .iter()
                    .filter(|(_, host)| host.node == node)
                    .map(|(number, _)| *number)
                    .collect();
                for target in here {
                    self.pause_target(target, lasts);
                }
            }
            Trouble::KillTarget => {
                if let Some(target) = self.any_target() {
                    self.kill_target(target, true);
                }
            }
            Trouble::Move => self.publish(node),
            Trouble::StopTarget => {
                if let Some(target) = self.current {
                    self.target_event(target, holdfast_storage_core::target::TargetEvent::Stop);
                }
            }
            Trouble::StoreDown => self.store.down_until = self.now + lasts,
            Trouble::UnrelatedWriter => self.store.version = self.store.version.next(),
            Trouble::SlowDisk => self.nodes[node].slow_until = self.now + lasts + 3_000_000,
            Trouble::FullDisk => self.nodes[node].disk.full = !self.nodes[node].disk.full,
        }
    }

    fn any_target(&mut self) -> Option<TargetNumber> {
        let numbers: Vec<TargetNumber> = self.targets.keys().copied().collect();
        if numbers.is_empty() { None } else { Some(numbers[self.rng.random_range(0..numbers.len())]) }
    }

    fn cut(&mut self, trouble: Trouble, node: usize, lasts: u64) {
        let until = self.now + lasts;
        let other = (node + self.rng.random_range(1..=NODES)) % (NODES + 1);
        let pairs: Vec<(usize, usize)> = match trouble {
            Trouble::OneWayCut if self.rng.random_bool(0.5) => vec![(node, other)],
            Trouble::OneWayCut => vec![(other, node)],
            Trouble::Isolate => {
                (0..=STORE).filter(|n| *n != node).flat_map(|n| [(n, node), (node, n)]).collect()
            }
            _ => vec![(node, other), (other, node)],
        };
        for pair in pairs {
            self.cuts.insert(pair, until);
        }
    }

    fn pause_target(&mut self, target: TargetNumber, lasts: u64) {
        let until = self.now + lasts;
        if let Some(host) = self.targets.get_mut(&target) {
            host.paused_until = until;
            self.schedule(lasts, Event::ResumeTarget { target });
        }
    }

    fn pause_replica(&mut self, node: usize, lasts: u64) {
        self.nodes[node].paused_until = self.now + lasts;
        self.schedule(lasts, Event::ResumeReplica { node });
    }

    pub fn power_off(&mut self, node: usize, lasts: u64) {
        if !self.nodes[node].powered {
            return;
        }
        self.kill_process(node, false);
        let here: Vec<TargetNumber> =
            self.targets.iter().filter(|(_, host)| host.node == node).map(|(number, _)| *number).collect();
        for target in here {
            self.kill_target(target, false);
        }
        self.nodes[node].powered = false;
        let disk = &mut self.nodes[node].disk;
        disk.lose_cache(&mut self.rng);
        disk.tmpfs_cookie = None;
        self.schedule(lasts, Event::PowerOn { node });
    }

    pub fn power_on(&mut self, node: usize) {
        self.nodes[node].powered = true;
        if node < REPLICAS {
            let delay = self.rng.random_range(1_000..300_000);
            self.schedule(delay, Event::StartProcess { node });
        }
    }

    /// Ends all troubles; what is broken gets repaired.
    pub fn heal(&mut self) {
        self.log(|| "-- everything heals".to_owned());
        self.cuts.clear();
        self.store.down_until = 0;
        self.store.flaky = 0.0;
        for node in 0..NODES {
            self.nodes[node].slow_until = 0;
            self.nodes[node].disk.full = false;
            self.nodes[node].disk.fail_flush = false;
            self.nodes[node].paused_until = 0;
            self.schedule(0, Event::ResumeReplica { node });
            if !self.nodes[node].powered {
                self.schedule(0, Event::PowerOn { node });
            }
            if node < REPLICAS {
                self.schedule(1_000_000, Event::StartProcess { node });
            }
        }
        let targets: Vec<TargetNumber> = self.targets.keys().copied().collect();
        for target in targets {
            if let Some(host) = self.targets.get_mut(&target) {
                host.paused_until = 0;
            }
            self.schedule(0, Event::ResumeTarget { target });
        }
    }
}
