//! What goes wrong: drawn per seed, so that some runs see much of one thing and others a little of everything.

use rand::Rng;

use crate::coverage::Scenario;
use crate::traps::{Deed, Step};
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
    HungDisk,
    FullDisk,
    PauseEverything,
    /// A node with its clocks, as a virtual machine that is suspended.
    StopClock,
    /// A target's node is cut off or sleeps, replicas elsewhere restart, and the volume moves.
    Depose,
    /// A target on the node with the slow clock is cut off and sleeps until just before its lease ends by that clock.
    SleepToTheEdge,
    /// A target is started beside one of the same attachment.
    SecondStart,
    /// Trouble at a step that is yet to come.
    Trap,
    /// The next Epoch is late.
    LateEpoch,
    /// The next three targets die, each within a step.
    ChainOfDeaths,
    /// A control request that is yet to come outlives its session.
    Straggle,
    /// A replica has no room for another layer until it has merged some.
    LayersFull,
    /// A block of a member no longer verifies, or cannot be read, while another member has it.
    Rot,
    /// A write lands on another block of a member.
    Misdirect,
    /// A block rots on every replica.
    RotEverywhere,
    /// Most reads of a member's disk fail.
    FailReads,
    /// The record store is restored from a backup, with every replica there.
    RestoreStore,
    /// An operator promotes a replica, the last member being lost.
    GiveUp,
    /// The record store is lost whole; an operator rescues it from the replicas' copies.
    LoseStore,
}

/// From here on a pause counts as one of minutes.
pub const MINUTE_US: u64 = 60_000_000;

impl World {
    pub fn chaos_strikes(&mut self) {
        if self.now >= self.chaos.until_us {
            return;
        }
        let gap = self.rng.random_range(0..2 * self.chaos.gap_us);
        self.schedule(gap, Event::Chaos);
        if self.operator.calm {
            return;
        }
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
            Trouble::PowerLossOfAll => self.power_off_all(lasts),
            Trouble::FailFlush => self.nodes[node].disk.fail_flush = true,
            Trouble::Cut | Trouble::OneWayCut | Trouble::Isolate => self.cut(trouble, node, lasts),
            Trouble::PauseTarget => {
                if let Some(target) = self.any_target() {
                    self.pause_target(target, lasts);
                }
            }
            Trouble::PauseReplica => self.pause_replica(node, lasts),
            Trouble::PauseEverything => self.pause_node(node, lasts),
            Trouble::StopClock => {
                self.nodes[node].stands_since.get_or_insert(self.now);
                self.schedule(lasts, Event::ResumeClock { node });
                self.pause_node(node, lasts);
            }
            Trouble::Depose => self.depose(),
            Trouble::SleepToTheEdge => self.sleep_to_the_edge(),
            Trouble::SecondStart => self.second_start(),
            Trouble::Trap => self.traps.arm(&mut self.rng),
            Trouble::LateEpoch => self.traps.push(Step::TellEpoch, Deed::DelayMessage),
            Trouble::ChainOfDeaths => self.traps.arm_chain(&mut self.rng),
            Trouble::KillTarget => {
                if let Some(target) = self.any_target() {
                    self.note_death(target, Step::Write);
                    self.kill_target(target, true);
                }
            }
            Trouble::Move => self.publish(node),
            Trouble::StopTarget => {
                if let Some(target) = self.current {
                    self.target_event(target, holdfast_storage_core::target::TargetEvent::Stop);
                }
            }
            Trouble::StoreDown => {
                self.store.down_since = self.now;
                self.store.down_until = self.now + self.chaos.store_down_us.unwrap_or(lasts);
                self.schedule(self.store.down_until - self.now, Event::StoreUp);
            }
            Trouble::UnrelatedWriter => {
                self.store.version = self.store.version.next();
                self.store.unrelated = self.store.version;
            }
            Trouble::SlowDisk => self.nodes[node].slow_until = self.now + lasts + 3_000_000,
            Trouble::HungDisk => self.nodes[node].hung_until = self.now + lasts + 4_000_000,
            Trouble::RestoreStore => self.prepare_restore(node % REPLICAS),
            Trouble::GiveUp => self.give_up(),
            Trouble::LoseStore => self.lose_store(),
            Trouble::Rot | Trouble::Misdirect | Trouble::RotEverywhere | Trouble::FailReads => {
                self.strike_disk(trouble, node, lasts);
            }
            Trouble::FullDisk => self.nodes[node].disk.full = !self.nodes[node].disk.full,
            Trouble::Straggle => self.arm_straggler(),
            Trouble::LayersFull => self.nodes[node].layers_full_until = self.now + lasts,
        }
    }

    fn pause_node(&mut self, node: usize, lasts: u64) {
        self.pause_replica(node, lasts);
        let here: Vec<TargetNumber> =
            self.targets.iter().filter(|(_, host)| host.node == node).map(|(number, _)| *number).collect();
        for target in here {
            self.pause_target(target, lasts);
        }
    }

    /// The old target does not know that it was replaced: it sleeps about as long as a lease, or is cut off, while those
    /// that could have told it restart, and the next one is started at once.
    fn depose(&mut self) {
        let Some((number, node)) =
            self.current.and_then(|number| self.targets.get(&number).map(|host| (number, host.node)))
        else {
            return;
        };
        let cut_off = self.rng.random_bool(0.8);
        if cut_off {
            let lasts = self.rng.random_range(1_500_000..5_000_000);
            self.cut(Trouble::Isolate, node, lasts);
        }
        if self.rng.random_bool(0.8) {
            // Around the end of the lease it sleeps with, the rest of the time anything.
            let lasts = match self.rng.random_range(0..3) {
                0 => self.rng.random_range(100_000..2_500_000),
                1 => self.rng.random_range(800_000..1_900_000),
                _ => self.rng.random_range(1_700_000..2_060_000),
            };
            self.pause_target(number, lasts);
        }
        let (mut died, all) = (0, self.rng.random_bool(0.4));
        for other in self.other_replicas(node) {
            if !all && self.rng.random_bool(0.6) {
                continue;
            }
            died += 1;
            let at_most = if self.rng.random_bool(0.5) { 20_000 } else { 2_000_000 };
            let lasts = self.rng.random_range(1_000..at_most);
            if self.rng.random_bool(0.3) {
                self.power_off(other, lasts);
            } else {
                self.kill_process(other, true);
                self.schedule(lasts, Event::StartProcess { node: other });
            }
        }
        if cut_off && died == self.other_replicas(node).count() {
            self.saw(Scenario::PowerLossOfAllButOne);
        }
        if self.rng.random_bool(0.8) {
            let to = (node + self.rng.random_range(1..NODES)) % NODES;
            self.publish(to);
        }
    }

    /// With the next heartbeat; only on the node with the slow clock.
    fn sleep_to_the_edge(&mut self) {
        let at = self.current.and_then(|number| self.targets.get(&number)).map(|host| host.node);
        let (Some(node), Some(slow)) = (at, self.chaos.slow_node) else { return };
        if node == slow {
            self.traps.push(Step::Heartbeat, Deed::SleepToTheEdge);
        } else {
            self.publish(slow);
        }
    }

    pub fn fall_asleep(&mut self, number: TargetNumber) {
        let Some(node) = self.targets.get(&number).map(|host| host.node) else { return };
        self.cut(Trouble::Isolate, node, 3_000_000);
        let lasts = self.rng.random_range(1_940_000..2_030_000);
        self.pause_target(number, lasts);
        if self.current == Some(number) {
            let to = (node + self.rng.random_range(1..NODES)) % NODES;
            self.publish(to);
        }
    }

    /// As an upgrade does that believes the old process gone.
    fn second_start(&mut self) {
        let attached = self.current.and_then(|number| self.targets.get(&number)).map(|host| host.node);
        if let Some(node) = attached.filter(|_| !self.starting) {
            self.saw(Scenario::SecondStart);
            self.start_target(node);
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

    /// It does not know whether what it asked for was done, and what it sent may arrive when the cut is over.
    pub fn cut_off_target(&mut self, target: TargetNumber, lasts: u64) {
        let Some(node) = self.targets.get(&target).map(|host| host.node) else { return };
        self.cut(Trouble::Isolate, node, lasts);
        if self.current == Some(target) {
            let to = (node + self.rng.random_range(1..NODES)) % NODES;
            self.publish(to);
        }
    }

    pub fn pause_target(&mut self, target: TargetNumber, lasts: u64) {
        let (now, until) = (self.now, self.now + lasts);
        if let Some(host) = self.targets.get_mut(&target) {
            if host.paused_until <= now {
                host.paused_from = now;
            }
            host.paused_until = host.paused_until.max(until);
            self.schedule(lasts, Event::ResumeTarget { target });
        }
    }

    fn pause_replica(&mut self, node: usize, lasts: u64) {
        let (now, host) = (self.now, &mut self.nodes[node]);
        if host.paused_until <= now {
            host.paused_from = now;
        }
        host.paused_until = host.paused_until.max(now + lasts);
        self.schedule(lasts, Event::ResumeReplica { node });
    }

    /// The clocks go on; whoever runs there notices before anything else reaches it (R4).
    pub fn resume_clock(&mut self, node: usize) {
        let Some(since) = self.nodes[node].stands_since else { return };
        if self.nodes[node].paused_until > self.now {
            let delay = self.nodes[node].paused_until - self.now;
            return self.schedule(delay, Event::ResumeClock { node });
        }
        self.nodes[node].stands_since = None;
        self.nodes[node].stood_still_us += self.now - since;
        if self.now - since >= MINUTE_US {
            self.saw(Scenario::VmPausedForMinutes);
        }
        let here: Vec<TargetNumber> =
            self.targets.iter().filter(|(_, host)| host.node == node).map(|(number, _)| *number).collect();
        for target in here {
            self.clock_jumped(target);
        }
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
        self.nodes[node].off_since = self.now;
        self.nodes[node].off_in_epoch = self.is_in_sync(node).then_some(self.store.record.epoch.number);
        self.trimmed_crashed.append(&mut self.trimmed.clone());
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
        self.coverage.close();
        self.traps.disarm();
        self.straggler = None;
        self.cuts.clear();
        self.store.down_until = 0;
        self.store.flaky = 0.0;
        self.store.stale = 0.0;
        for node in 0..NODES {
            self.nodes[node].slow_until = 0;
            self.nodes[node].hung_until = 0;
            self.nodes[node].layers_full_until = 0;
            self.nodes[node].reads_fail_until = 0;
            self.nodes[node].disk.misdirects_to = None;
            self.nodes[node].disk.full = false;
            self.nodes[node].disk.fail_flush = false;
            self.nodes[node].paused_until = self.now.min(self.nodes[node].paused_until);
            self.schedule(0, Event::ResumeClock { node });
            self.schedule(0, Event::ResumeReplica { node });
            if !self.nodes[node].powered {
                self.schedule(0, Event::PowerOn { node });
            }
            if node < REPLICAS {
                self.schedule(1_000_000, Event::StartProcess { node });
            }
        }
        let now = self.now;
        let targets: Vec<TargetNumber> = self.targets.keys().copied().collect();
        for target in targets {
            if let Some(host) = self.targets.get_mut(&target) {
                host.paused_until = host.paused_until.min(now);
            }
            self.schedule(0, Event::ResumeTarget { target });
        }
    }
}
