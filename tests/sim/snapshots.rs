//! Snapshots, clones and growth under load and trouble: asked for at random times, repeated when their target died, and
//! checked at every change of the record.
//!
//! P6: a committed snapshot is on every holder, with the same bytes, for ever; and these bytes are what the volume held
//! at one instant between the begin and the commit of its cut.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::ids::{REGION_BYTES, ReplicaId, SnapshotId, VolumeId};
use holdfast_storage_core::record::{ReplicaState, SnapshotState, VolumeRecord};
use holdfast_storage_core::target::{Control, Job, JobError, JobId, TargetAction, TargetEvent};
use holdfast_storage_core::transitions;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::disk::Blocks;
use crate::families::Family;
use crate::groups;
use crate::history::{Moment, Window};
use crate::layers::non_zero;
use crate::world::{Event, REPLICAS, TargetNumber, VOLUME_BYTES, World, node_of};

/// Jobs that wait at a target at a time.
const JOBS_MAX: usize = 3;
const VOLUME_BYTES_MAX: u64 = VOLUME_BYTES + 3 * REGION_BYTES;

#[derive(Debug)]
pub struct Snapshots {
    /// Of their own, so that what else a seed does is the same with and without snapshots.
    rng: StdRng,
    /// Mean pause between two jobs; none: never.
    gap_us: Option<u64>,
    /// Chance of a death at a step of a job.
    strike: f64,
    next: u64,
    /// Asked for and not known to be done: to be asked for again under the same id.
    unfinished: Vec<SnapshotId>,
    deleted: BTreeSet<SnapshotId>,
    done: BTreeSet<SnapshotId>,
    jobs: BTreeMap<JobId, (TargetNumber, Job)>,
    seen: BTreeMap<SnapshotId, Seen>,
    reported: BTreeSet<SnapshotId>,
    /// The largest size that was answered.
    pub grown_bytes: u64,
    pub counts: Counts,
}

#[derive(Debug, Clone, Default)]
pub struct Counts {
    pub committed: u64,
    pub refused: u64,
    pub deleted: u64,
    pub grown: u64,
    pub rebuilt: u64,
    pub checked: u64,
    pub groups: u64,
    pub groups_given_up: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.committed += other.committed;
        self.refused += other.refused;
        self.deleted += other.deleted;
        self.grown += other.grown;
        self.rebuilt += other.rebuilt;
        self.checked += other.checked;
        self.groups += other.groups;
        self.groups_given_up += other.groups_given_up;
    }
}

/// What the record said of a snapshot.
#[derive(Debug, Clone)]
struct Seen {
    generation: u64,
    begun: Moment,
    committed: Option<(Moment, Blocks)>,
}

impl Snapshots {
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed_5a95);
        let family = Family::of(seed);
        let focused = family == Family::Cuts;
        let gap_us = match family {
            Family::Cuts => Some([60_000, 200_000, 600_000][rng.random_range(0..3)]),
            Family::Mixed => [None, None, Some(400_000), Some(2_000_000)][rng.random_range(0..4)],
            Family::Groups => [None, None, Some(1_000_000)][rng.random_range(0..3)],
            Family::Removals => [None, None, Some(1_000_000)][rng.random_range(0..3)],
            Family::Stragglers => Some([60_000, 200_000][rng.random_range(0..2)]),
            Family::Losses => [None, Some(200_000), Some(600_000)][rng.random_range(0..3)],
            // Each of the others makes one chain likely, which a job would interrupt.
            _ => None,
        };
        let strike = if focused || matches!(family, Family::Removals | Family::Losses) {
            [0.02, 0.1, 0.3][rng.random_range(0..3)]
        } else {
            0.01
        };
        Self {
            rng,
            gap_us,
            strike,
            next: 0,
            unfinished: Vec::new(),
            deleted: BTreeSet::new(),
            done: BTreeSet::new(),
            jobs: BTreeMap::new(),
            seen: BTreeMap::new(),
            reported: BTreeSet::new(),
            grown_bytes: 0,
            counts: Counts::default(),
        }
    }

    pub fn are_made(&self) -> bool {
        self.gap_us.is_some()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        if from.is_empty() { None } else { Some(from[self.rng.random_range(0..from.len())]) }
    }
}

impl World {
    /// Whoever makes snapshots: the target's jobs, and clones by swaps of its own (R30).
    pub fn snapshot_client(&mut self) {
        let Some(gap_us) = self.snapshots.gap_us.filter(|_| self.client_load) else { return };
        let delay = self.snapshots.rng.random_range(0..2 * gap_us);
        self.schedule(delay, Event::Snapshots);
        let alone = |id: &SnapshotId| !groups::is_of_group(*id);
        let committed: Vec<SnapshotId> = self.store.record.committed().map(|s| s.id).filter(alone).collect();
        let one = self.snapshots.pick(&committed);
        match (self.snapshots.rng.random_range(0..100), one) {
            (0..12, Some(snapshot)) => {
                let clone = VolumeId(u128::from(self.snapshots.rng.random_range(1_u64..4)));
                self.swap_by_another(|record| transitions::add_clone(record, snapshot, clone).ok());
            }
            (12..24, Some(snapshot)) => {
                let clone = self.store.record.snapshot(snapshot).and_then(|s| s.clones.first().copied());
                if let Some(clone) = clone {
                    self.swap_by_another(|record| transitions::remove_clone(record, snapshot, clone).ok());
                }
            }
            (24..42, Some(snapshot)) => self.start_job(Job::DeleteSnapshot { snapshot }),
            (42..48, _) if self.store.record.size_bytes < VOLUME_BYTES_MAX => {
                let size_bytes = self.store.record.size_bytes + REGION_BYTES;
                self.start_job(Job::Grow { size_bytes });
            }
            _ => self.create_snapshot(),
        }
    }

    fn create_snapshot(&mut self) {
        let again = self.snapshots.rng.random_bool(0.7);
        let unfinished = std::mem::take(&mut self.snapshots.unfinished);
        let snapshot = match self.snapshots.pick(&unfinished).filter(|_| again || unfinished.len() > 4) {
            Some(snapshot) => {
                self.snapshots.unfinished = unfinished;
                snapshot
            }
            None => {
                let snapshot = SnapshotId(u128::from(self.snapshots.number()));
                self.snapshots.unfinished = unfinished;
                self.snapshots.unfinished.push(snapshot);
                snapshot
            }
        };
        self.start_job(Job::CreateSnapshot { snapshot });
    }

    /// A change of the record by somebody who is no target.
    pub fn swap_by_another(&mut self, change: impl Fn(&VolumeRecord) -> Option<VolumeRecord>) {
        // Nobody reaches a store that is lost.
        let lost = self.store.down_until == u64::MAX;
        if let Some(next) = change(&self.store.record).filter(|_| !lost) {
            let _ = self.swap_record(self.store.version, next);
        }
    }

    pub fn start_job(&mut self, what: Job) {
        let Some(target) = self.current else { return };
        let here = self.snapshots.jobs.values().filter(|(number, _)| *number == target).count();
        let paused = self.targets.get(&target).is_none_or(|host| host.paused_until > self.now);
        if here >= JOBS_MAX || paused {
            return;
        }
        let job = JobId(self.snapshots.number());
        if let Job::DeleteSnapshot { snapshot } = what {
            self.snapshots.deleted.insert(snapshot);
        }
        self.snapshots.jobs.insert(job, (target, what));
        self.target_event(target, TargetEvent::Job { job, what });
    }

    pub fn job_done(&mut self, job: JobId, result: &Result<(), JobError>) {
        let Some((target, what)) = self.snapshots.jobs.remove(&job) else {
            // A group's.
            return self.outbox.answers.push((job, result.clone()));
        };
        self.log(|| format!("t{target}: {what:?}: {result:?}"));
        let counts = &mut self.snapshots.counts;
        match (what, result) {
            (Job::CreateSnapshot { snapshot }, Ok(())) => {
                self.snapshots.unfinished.retain(|other| *other != snapshot);
                self.snapshots.done.insert(snapshot);
            }
            (Job::DeleteSnapshot { .. }, Ok(())) => counts.deleted += 1,
            (Job::Grow { size_bytes }, Ok(())) => {
                counts.grown += 1;
                self.snapshots.grown_bytes = self.snapshots.grown_bytes.max(size_bytes);
            }
            (_, Err(_)) => counts.refused += 1,
            (
                Job::Hold { .. }
                | Job::Cut { .. }
                | Job::Release { .. }
                | Job::RemoveReplica { .. }
                | Job::Reload,
                Ok(()),
            ) => {}
        }
    }

    /// Jobs of targets that are gone are over; whether they were done, nobody was told.
    pub fn jobs_of_target_end(&mut self, target: TargetNumber) {
        self.snapshots.jobs.retain(|_, (number, _)| *number != target);
    }

    pub fn has_jobs(&self) -> bool {
        !self.snapshots.jobs.is_empty()
    }

    /// Death strikes most where a cut, a growth or a removal has just taken a step.
    pub fn job_step(&mut self, target: TargetNumber, action: &TargetAction) {
        self.judge_removal(target, action);
        let node = match action {
            TargetAction::Control {
                replica,
                op: Control::Freeze { .. } | Control::DropSnapshot { .. } | Control::Grow { .. },
                ..
            } => Some(node_of(*replica)),
            TargetAction::Swap { record, .. } => {
                let known = &self.store.record;
                let takes_out = |id: &ReplicaId| {
                    record.replicas.get(id).is_some_and(|entry| entry.state == ReplicaState::Faulted)
                };
                let same = known.snapshots == record.snapshots && known.size_bytes == record.size_bytes;
                if same && !known.in_sync.iter().any(takes_out) {
                    return;
                }
                None
            }
            _ => return,
        };
        let snapshots = &mut self.snapshots;
        if !self.client_load || !snapshots.rng.random_bool(snapshots.strike) {
            return;
        }
        let delay = snapshots.rng.random_range(0..2_500);
        let node = node.filter(|_| snapshots.rng.random_bool(0.4));
        self.schedule(delay, Event::StrikeJob { target, node });
    }

    pub fn strike_job(&mut self, target: TargetNumber, node: Option<usize>) {
        let lasts = self.snapshots.rng.random_range(1_000..1_500_000);
        let kind = self.snapshots.rng.random_range(0..10);
        self.log(|| format!("-- a step of a job: strikes t{target} or {node:?}"));
        match node {
            Some(node) if kind < 5 => {
                self.kill_process(node, true);
                self.schedule(lasts, Event::StartProcess { node });
            }
            Some(node) => self.power_off(node, lasts),
            None if kind < 3 => self.cut_off_target(target, lasts),
            None => self.kill_target(target, true),
        }
    }

    /// After each change of the record.
    pub fn check_record(&mut self, before: &VolumeRecord) {
        let record = self.store.record.clone();
        for old in before.committed() {
            let kept = record.snapshot(old.id).is_some_and(|new| new.state == SnapshotState::Committed);
            if !kept && !old.clones.is_empty() {
                self.history.violations.push(format!("P6: snapshot {} was deleted under a clone", old.id.0));
            }
            if !kept && !self.snapshots.deleted.contains(&old.id) {
                self.history.violations.push(format!("P6: snapshot {} vanished", old.id.0));
            }
            let holders = record.snapshot(old.id).map_or(0, |new| new.holders.len());
            self.snapshots.counts.rebuilt += holders.saturating_sub(old.holders.len()) as u64;
        }
        for entry in &record.snapshots {
            match entry.state {
                SnapshotState::Cutting { generation } => {
                    if before.snapshot(entry.id).map(|old| old.state) != Some(entry.state) {
                        let begun = self.history.begin();
                        let seen = Seen { generation: generation.0, begun, committed: None };
                        self.snapshots.seen.insert(entry.id, seen);
                    }
                }
                SnapshotState::Committed => {
                    let new = before.snapshot(entry.id).is_none_or(|old| old.state != entry.state);
                    if new {
                        self.snapshot_committed(entry.id);
                    }
                }
            }
        }
        self.check_holders("after a swap");
    }

    fn snapshot_committed(&mut self, snapshot: SnapshotId) {
        self.snapshots.counts.committed += 1;
        let content = self.layers_of(snapshot).into_iter().find_map(|(_, content)| content);
        let end = self.history.begin();
        if let Some(seen) = self.snapshots.seen.get_mut(&snapshot) {
            seen.committed = content.map(|content| (end, content));
        }
    }

    /// What each holder has of a snapshot.
    fn layers_of(&self, snapshot: SnapshotId) -> Vec<(usize, Option<Blocks>)> {
        let Some(entry) = self.store.record.snapshot(snapshot) else { return Vec::new() };
        let layer = |node: usize| self.nodes[node].disk.layers.get(snapshot).map(|l| non_zero(&l.current));
        entry.holders.iter().map(|holder| (node_of(*holder), layer(node_of(*holder)))).collect()
    }

    /// P6: equal on all holders, and as it was when it was committed.
    pub fn check_holders(&mut self, when: &str) {
        let committed: Vec<SnapshotId> = self.store.record.committed().map(|s| s.id).collect();
        for snapshot in committed {
            let first = self.snapshots.seen.get(&snapshot).and_then(|seen| seen.committed.as_ref());
            let Some((_, first)) = first.cloned() else { continue };
            for (node, content) in self.layers_of(snapshot) {
                let what = match content {
                    None => "is not there".to_owned(),
                    Some(content) if content != first => {
                        let differs = |b: &&u64| first.get(b) != content.get(b);
                        let block = first.keys().chain(content.keys()).find(differs).copied();
                        let block = block.unwrap_or_default();
                        let values = (first.get(&block), content.get(&block));
                        format!("differs in block {block}: {values:?}")
                    }
                    Some(_) => continue,
                };
                if self.snapshots.reported.insert(snapshot) {
                    let snapshot = snapshot.0;
                    self.history.violations.push(format!("P6: {when} snapshot {snapshot} {what} on n{node}"));
                }
            }
        }
    }

    /// P6: one instant. When the run is over, as only then it is known what was acknowledged when.
    pub fn check_instants(&mut self) {
        let committed: Vec<SnapshotId> = self.snapshots.seen.keys().copied().collect();
        for snapshot in committed {
            let Some(window) = self.window_of(snapshot) else { continue };
            self.snapshots.counts.checked += 1;
            if let Err(what) = window.and_then(|window| window.check()) {
                self.history.violations.push(format!("P6: snapshot {} is no instant: {what}", snapshot.0));
            }
        }
    }

    /// The instants at which the volume held what a snapshot holds; none: it was never committed.
    pub fn window_of(&self, snapshot: SnapshotId) -> Option<Result<Window, String>> {
        let seen = self.snapshots.seen.get(&snapshot)?;
        let (end, content) = seen.committed.as_ref()?;
        Some(self.history.window(content, seen.generation, seen.begun, *end))
    }

    /// Somebody asks for the deletion of a snapshot.
    pub fn expect_deletion(&mut self, snapshot: SnapshotId) {
        self.snapshots.deleted.insert(snapshot);
    }

    /// Everything healed and quiet: all members hold all snapshots.
    pub fn check_all_hold(&mut self) {
        let lacking = self.store.record.committed().find(|s| s.holders.len() < REPLICAS).map(|s| s.id.0);
        if let Some(snapshot) = lacking {
            self.history.violations.push(format!("P6: a member joined without snapshot {snapshot}"));
        }
        let kept = |id: &&SnapshotId| {
            !self.snapshots.deleted.contains(id) && self.store.record.snapshot(**id).is_none()
        };
        if let Some(lost) = self.snapshots.done.iter().find(kept) {
            self.history.violations.push(format!("P6: snapshot {} was answered and is gone", lost.0));
        }
        self.check_holders("at the end");
    }

    /// R27, R28: after everything was opened anew, no layer is left that the record does not name.
    pub fn check_no_leftovers(&mut self) {
        for node in 0..REPLICAS {
            let named = |id: &SnapshotId| self.store.record.snapshot(*id).is_some();
            let left: Vec<u128> = self.nodes[node]
                .disk
                .layers
                .ids()
                .into_iter()
                .filter(|id| !named(id))
                .map(|id| id.0)
                .collect();
            if !left.is_empty() {
                self.history.violations.push(format!("R27: n{node} keeps layers of no snapshot: {left:?}"));
            }
        }
    }
}
