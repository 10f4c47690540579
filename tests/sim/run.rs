//! One run: trouble, healing, quiet, comparison, a power loss of everything, and the data once more.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_storage_core::guards::Guards;
use holdfast_storage_core::ids::{BLOCK_BYTES, REGION_BYTES};
use holdfast_storage_core::target::{ClientOp, TargetEvent, TargetState};

use crate::coverage::Coverage;
use crate::families::Family;
use crate::groups;
use crate::snapshots::Counts;
use crate::world::{Event, NODES, REPLICAS, World};

/// Longest time the volume may take to be whole again once everything works.
const QUIET_WITHIN_US: u64 = 240_000_000;

#[derive(Debug, Default)]
pub struct Outcome {
    pub violations: Vec<String>,
    pub writes: u64,
    pub reads: u64,
    pub flushes: u64,
    pub targets: u64,
    pub epochs: u64,
    pub losses: u64,
    pub coverage: Coverage,
    pub snapshots: Counts,
}

#[derive(Debug, Default)]
pub struct Total {
    pub failed: Vec<u64>,
    pub all: Outcome,
}

impl Outcome {
    /// Client operations that were answered.
    pub fn operations(&self) -> u64 {
        self.writes + self.reads + self.flushes
    }

    pub fn add(&mut self, other: Self) {
        self.violations.extend(other.violations);
        self.writes += other.writes;
        self.reads += other.reads;
        self.flushes += other.flushes;
        self.targets += other.targets;
        self.epochs += other.epochs;
        self.losses += other.losses;
        self.coverage.add(&other.coverage);
        self.snapshots.add(&other.snapshots);
    }
}

/// Runs a seed; a panic of the code under test is a violation too.
pub fn run(seed: u64, guards: Guards, trace: bool) -> Outcome {
    std::panic::catch_unwind(|| run_unguarded(seed, guards, trace)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Outcome { violations: vec![format!("panic: {}", text.unwrap_or_default())], ..Outcome::default() }
    })
}

fn run_unguarded(seed: u64, guards: Guards, trace: bool) -> Outcome {
    if Family::of(seed) == Family::Groups {
        return groups::run(seed, guards, trace);
    }
    let mut world = World::new(seed, guards, trace);
    world.schedule(300_000, Event::Chaos);
    let until = world.chaos.until_us;
    world.run_until(until);
    world.heal();
    let more = world.now + 1_000_000;
    world.run_until(more);
    world.client_load = false;
    world.end();
    world.outcome()
}

/// Runs seeds on all processors; `each` sees every outcome.
pub fn in_parallel(seeds: &[u64], guards: Guards, each: impl Fn(u64, &Outcome) + Sync) -> Total {
    let next = AtomicUsize::new(0);
    let total = Mutex::new(Total::default());
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = run(*seed, guards, false);
                    each(*seed, &outcome);
                    let mut total = total.lock().expect("no panic while held");
                    if !outcome.violations.is_empty() {
                        total.failed.push(*seed);
                    }
                    total.all.add(outcome);
                }
            });
        }
    });
    total.into_inner().expect("no panic while held")
}

impl World {
    /// Trouble and load are over: the volume gets whole, its members are compared, everything loses its power, and the data
    /// is read once more.
    pub fn end(&mut self) {
        if self.wait_until_quiet() {
            self.scrub_everything();
            self.read_everything();
            self.compare_members("after the resync");
            self.check_all_hold();
            self.restart_everything();
        }
    }

    /// What the run was, checked.
    pub fn outcome(mut self) -> Outcome {
        self.history.trace = self.trace;
        self.history.check();
        self.check_instants();
        Outcome {
            violations: std::mem::take(&mut self.history.violations),
            writes: self.history.writes_acknowledged,
            reads: self.history.reads_answered,
            flushes: self.history.flushes_acknowledged(),
            targets: self.next_target,
            epochs: self.store.record.epoch.number,
            losses: self.history.losses(),
            coverage: self.coverage,
            snapshots: self.snapshots.counts,
        }
    }

    fn is_quiet(&self) -> bool {
        let Some(host) = self.current.and_then(|number| self.targets.get(&number)) else { return false };
        let status = host.target.status();
        *host.target.state() == TargetState::Serving
            && host.is_idle()
            && !self.has_jobs()
            && self.store.record.in_sync.len() == REPLICAS
            && status.epoch == self.store.record.epoch
            && status.logged_regions == 0
            && status.unreconciled_regions == 0
    }

    fn wait_until_quiet(&mut self) -> bool {
        let deadline = self.now + QUIET_WITHIN_US;
        while !self.is_quiet() {
            if self.now > deadline {
                let host = self.current.and_then(|number| self.targets.get(&number));
                let status = host.map(|host| host.target.status());
                self.log(|| format!("{:#?}", host.map(|host| &host.target)));
                self.history.violations.push(format!(
                    "stuck: idle {:?}, record in sync {:?}, target {status:#?}",
                    host.map(crate::target_host::TargetHost::is_idle),
                    self.store.record.in_sync,
                ));
                return false;
            }
            let step = self.now + 100_000;
            self.run_until(step);
        }
        true
    }

    fn read_everything(&mut self) {
        let Some(target) = self.current else { return };
        for region in 0..self.store.record.size_bytes / REGION_BYTES {
            for block in [0, 128] {
                let offset = (region * 256 + block) * BLOCK_BYTES;
                self.request(target, ClientOp::Read { offset, len: 128 * BLOCK_BYTES });
            }
        }
        let until = self.now + 3_000_000;
        self.run_until(until);
    }

    /// P5.
    fn compare_members(&mut self, when: &str) {
        let first = self.nodes[0].disk.contents();
        for node in 1..REPLICAS {
            let other = self.nodes[node].disk.contents();
            let differing: Vec<_> = first
                .keys()
                .chain(other.keys())
                .filter(|block| first.get(block) != other.get(block))
                .collect();
            if let Some(block) = differing.first() {
                let values = (first.get(block), other.get(block));
                self.history
                    .violations
                    .push(format!("P5: {when} n0 and n{node} differ in block {block}: {values:?}"));
            }
        }
    }

    /// A graceful stop leaves nothing in a cache: all nodes may lose power, and a new client finds everything.
    fn restart_everything(&mut self) {
        let Some(target) = self.current else { return };
        self.target_event(target, TargetEvent::Stop);
        let until = self.now + 200_000;
        self.starting = true;
        self.run_until(until);
        for node in 0..NODES {
            self.power_off(node, 100_000);
        }
        self.compare_members("after a stop and a power loss");
        self.check_holders("after a stop and a power loss");
        self.current = None;
        let until = self.now + 1_000_000;
        self.run_until(until);
        self.publish(1);
        if self.wait_until_quiet() {
            self.read_everything();
            self.check_no_leftovers();
        }
    }
}
