//! Groups: two volumes under one clock, each with nodes, a network and trouble of its own, and clients that write to one
//! of them once they were told that a write to the other is done. A coordinator (`coordinators.rs`) cuts them as a group.
//!
//! R29: a committed group is one instant of both volumes: it has no effect without its cause.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::group::GroupState;
use holdfast_storage_core::guards::Guards;
use holdfast_storage_core::ids::{GroupId, SnapshotId, VolumeId};
use holdfast_storage_core::record::SnapshotState;
use holdfast_storage_core::target::{JobError, JobId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::coordinators::{Ask, Coordinator, GroupStore};
use crate::families::FAMILY_SEEDS;
use crate::history::Moment;
use crate::run::Outcome;
use crate::world::{Event as WorldEvent, World};

pub const VOLUMES: usize = 2;
/// Snapshots of groups have the ids from here on.
const GROUP_SNAPSHOTS: u128 = 1 << 64;
/// The second volume's trouble is that of a seed so much later.
const SECOND_VOLUME: u64 = FAMILY_SEEDS / 2;
/// Longest time that coordinators may take once everything works.
const SETTLED_WITHIN_US: u64 = 240_000_000;

/// What happened in a volume's world that concerns others.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Answers to a coordinator's questions.
    pub answers: Vec<(JobId, Result<(), JobError>)>,
    /// Writes that were acknowledged.
    pub acknowledged: u64,
}

#[derive(Debug)]
pub struct Groups {
    /// Microseconds.
    pub now: u64,
    pub rng: StdRng,
    pub guards: Guards,
    pub worlds: Vec<World>,
    pub queue: BTreeMap<(u64, u64), crate::coordinators::Event>,
    pub next_event: u64,
    /// The newest moment of any volume's history.
    moment: Moment,
    pub store: GroupStore,
    pub coordinators: BTreeMap<u64, Coordinator>,
    pub next_number: u64,
    pub asks: BTreeMap<JobId, Ask>,
    /// Wanted, and not known to be done.
    pub pending: BTreeSet<GroupId>,
    /// Known to be done.
    pub kept: BTreeSet<GroupId>,
    pub wanted: bool,
    pub violations: Vec<String>,
}

pub fn is_of_group(snapshot: SnapshotId) -> bool {
    snapshot.0 >= GROUP_SNAPSHOTS
}

pub fn volume_id(at: usize) -> VolumeId {
    VolumeId(at as u128)
}

pub fn volume_of(id: VolumeId) -> usize {
    usize::try_from(id.0).expect("small")
}

pub fn run(seed: u64, guards: Guards, trace: bool) -> Outcome {
    let mut groups = Groups::new(seed, guards, trace);
    let until = groups.worlds.iter().map(|world| world.chaos.until_us).max().unwrap_or(0);
    groups.run_until(until);
    groups.wanted = false;
    groups.worlds.iter_mut().for_each(World::heal);
    groups.run_until(until + 1_000_000);
    for world in &mut groups.worlds {
        world.client_load = false;
    }
    groups.settle();
    let left = groups.left_behind();
    groups.worlds.iter_mut().for_each(World::end);
    groups.check_instants();
    groups.violations.extend(left);
    let mut outcome = Outcome { violations: std::mem::take(&mut groups.violations), ..Outcome::default() };
    for world in groups.worlds {
        outcome.add(world.outcome());
    }
    outcome
}

impl Groups {
    fn new(seed: u64, guards: Guards, trace: bool) -> Self {
        let mut worlds: Vec<World> =
            (0..VOLUMES as u64).map(|at| World::new(seed + at * SECOND_VOLUME, guards, trace)).collect();
        worlds[0].label = "a: ";
        worlds[1].label = "b: ";
        for world in &mut worlds {
            world.schedule(300_000, WorldEvent::Chaos);
        }
        let mut rng = StdRng::seed_from_u64(seed ^ 0x6709_0e55);
        let mut groups = Self {
            now: worlds[0].now,
            store: GroupStore::of_seed(&mut rng),
            rng,
            guards,
            worlds,
            queue: BTreeMap::new(),
            next_event: 0,
            moment: 0,
            coordinators: BTreeMap::new(),
            next_number: 0,
            asks: BTreeMap::new(),
            pending: BTreeSet::new(),
            kept: BTreeSet::new(),
            wanted: true,
            violations: Vec::new(),
        };
        groups.schedule(500_000, crate::coordinators::Event::Want);
        groups
    }

    fn run_until(&mut self, until: u64) {
        while self.step(until) {}
        self.now = until;
        for world in &mut self.worlds {
            world.now = until;
        }
    }

    /// Lets the next thing happen, wherever it does; tells whether there is one before `until`.
    fn step(&mut self, until: u64) -> bool {
        let own = self.queue.first_key_value().map(|((at, _), _)| *at).unwrap_or(u64::MAX);
        let of_world = |(at, world): (usize, &World)| (world.next_at().unwrap_or(u64::MAX), at);
        let (next, at) = self.worlds.iter().enumerate().map(of_world).min().unwrap_or((u64::MAX, 0));
        if own.min(next) > until {
            return false;
        }
        self.now = self.now.max(own.min(next));
        if own <= next {
            if let Some((_, event)) = self.queue.pop_first() {
                self.dispatch(event);
            }
            return true;
        }
        let world = &mut self.worlds[at];
        world.history.go_on_after(self.moment);
        world.step();
        self.moment = world.history.moment();
        let Outbox { answers, acknowledged } = std::mem::take(&mut world.outbox);
        for (job, result) in answers {
            self.answered(job, result);
        }
        for _ in 0..acknowledged {
            self.somebody_follows(at);
        }
        true
    }

    /// A client that was told that its write to this volume is done writes to the other one. That write has followers of its
    /// own, so chains go to and fro.
    fn somebody_follows(&mut self, at: usize) {
        if self.rng.random_bool(0.5) {
            let delay = self.rng.random_range(30..1_500);
            let world = self.world_now((at + 1) % VOLUMES);
            world.schedule(delay, WorldEvent::Follow);
        }
    }

    /// A volume's world, at this time.
    pub fn world_now(&mut self, at: usize) -> &mut World {
        let world = &mut self.worlds[at];
        world.now = world.now.max(self.now);
        world
    }

    /// Coordinators end, and what was left half done is picked up.
    fn settle(&mut self) {
        self.store.flaky = 0.0;
        let deadline = self.now + SETTLED_WITHIN_US;
        loop {
            let unfinished = self.store.unfinished();
            if unfinished.is_empty() && self.coordinators.is_empty() {
                return;
            }
            if self.now > deadline {
                self.violations.push(format!("stuck: groups {unfinished:?} of {:#?}", self.coordinators));
                return;
            }
            for group in unfinished {
                if self.coordinators.values().all(|coordinator| coordinator.group_id != group) {
                    self.start_deletion(group);
                }
            }
            let step = self.now + 100_000;
            self.run_until(step);
        }
    }

    /// All or nothing: no snapshot of a group is left but those of committed groups, and those are all there.
    fn left_behind(&self) -> Vec<String> {
        let (mut named, mut wrong) = (BTreeSet::new(), Vec::new());
        for group in self.store.records() {
            for (volume, snapshot) in &group.snapshots {
                named.insert((volume_of(*volume), *snapshot));
                let record = &self.worlds[volume_of(*volume)].store.record;
                let state = record.snapshot(*snapshot).map(|entry| entry.state);
                if group.state == GroupState::Committed && state != Some(SnapshotState::Committed) {
                    let group = group.group_id.0;
                    wrong.push(format!("P6: group {group} lacks its snapshot of volume {}", volume.0));
                }
            }
        }
        for (at, world) in self.worlds.iter().enumerate() {
            for snapshot in world.store.record.committed().map(|s| s.id).filter(|id| is_of_group(*id)) {
                if !named.contains(&(at, snapshot)) {
                    wrong.push(format!("P6: volume {at} keeps snapshot {} of no group", snapshot.0));
                }
            }
        }
        wrong
    }

    /// R29, for every group that was ever committed: there is a moment at which each volume held what its snapshot holds.
    fn check_instants(&mut self) {
        for (group, snapshots) in self.store.committed() {
            let mut windows = Vec::new();
            for (volume, snapshot) in snapshots {
                match self.worlds[volume_of(*volume)].window_of(*snapshot) {
                    Some(Ok(window)) => windows.push((volume.0, window)),
                    // The volume's own check tells.
                    Some(Err(_)) => {}
                    None => {
                        let what = format!("P6: group {} was committed without volume {}", group.0, volume.0);
                        self.violations.push(what);
                    }
                }
            }
            let first = windows.iter().max_by_key(|(_, window)| window.from.0);
            let last = windows.iter().min_by_key(|(_, window)| window.until.0);
            let (Some((effect, first)), Some((cause, last))) = (first, last) else { continue };
            if effect != cause && first.from.0 > last.until.0 {
                let ((began, write), (done, replaced)) = (&first.from, &last.until);
                self.violations.push(format!(
                    "P6: group {} has an effect without its cause: volume {effect} has {write} at {began}, volume \
                     {cause} lacks what {replaced} at {done}",
                    group.0
                ));
            }
        }
    }
}
