//! Fewer replicas and more again, under load and trouble: the number wanted is lowered and raised at random times, replicas
//! move from node to node (one more than wanted until another one goes), targets take members out for good, and what went is
//! deleted at once.
//!
//! *Checked:* that no acknowledged write is lost or un-read and that members are equal, by the history as ever; a replica
//! that went has no data any more, so whoever read from it or counted on it would show that. And at each change of the
//! record: as many members as wanted stay (P6), and one that kept its cache is among them, unless they all lost theirs in
//! the moment that nobody can know of (P2).

use std::collections::BTreeSet;

use holdfast_storage_core::ids::{Epoch, NodeName, ReplicaId};
use holdfast_storage_core::record::{ReplicaState, VolumeParams, VolumeRecord};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_storage_core::target::{Job, TargetAction};
use holdfast_storage_core::{timers, transitions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::coverage::Scenario;
use crate::disk::Disk;
use crate::families::Family;
use crate::world::{Event, REPLICAS, TargetNumber, World, node_name, node_of};

/// While the volume gets whole at the end of a run.
const RESTORE_EVERY_US: u64 = 1_000_000;
/// A cache that was lost for longer is known to be: silence is noticed before, and an Open that is answered tells it.
const KNOWN_AFTER_US: u64 = 4 * timers::SILENT_MS * 1_000;
/// Of the trap: how long the target reaches no replica, and when in that time it is asked.
const ALONE_US: u64 = 9_000_000;
const ASKED_AFTER_US: u64 = 6_000_000;
const OFF_US: u64 = 300_000;

/// How a replica is listed.
type AddReplica =
    fn(&VolumeRecord, ReplicaId, &NodeName) -> Result<VolumeRecord, transitions::TransitionError>;

#[derive(Debug)]
pub struct Removals {
    /// Of their own, as those of snapshots.
    rng: StdRng,
    /// Mean pause between two steps; none: the number of replicas never changes.
    gap_us: Option<u64>,
    /// Where so many replicas are wanted.
    min_in_sync: u32,
    /// Chance of a trap before a removal.
    traps: f64,
    /// One more than wanted is listed, until it is in sync.
    moving: bool,
    /// Removals whose first proposal was judged, by their epoch's nonce.
    judged: BTreeSet<u64>,
}

impl Removals {
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed_4e40);
        let focused = Family::of(seed) == Family::Removals;
        let gap_us = focused.then(|| [300_000, 1_000_000, 2_500_000][rng.random_range(0..3)]);
        let traps = [0.0, 0.1, 0.4][rng.random_range(0..3)];
        let min_in_sync = [1, 1, 2][rng.random_range(0..3)];
        Self { rng, gap_us, min_in_sync, traps, moving: false, judged: BTreeSet::new() }
    }

    pub fn are_made(&self) -> bool {
        self.gap_us.is_some()
    }
}

impl World {
    /// Whoever modifies the volume: one step towards fewer replicas, or more.
    pub fn resize(&mut self) {
        let Some(gap_us) = self.removals.gap_us else { return };
        if !self.client_load {
            return self.restore_replicas();
        }
        let mut delay = self.removals.rng.random_range(0..2 * gap_us);
        let record = self.store.record.clone();
        let wanted = record.params.replicas;
        match transitions::surplus(&record, wanted).first() {
            Some(replica) if record.in_sync.contains(replica) => {
                let trapped = self.removals.rng.random_bool(self.removals.traps);
                if trapped && self.leave_alone(*replica) {
                    // Asked then.
                    delay = ASKED_AFTER_US;
                } else {
                    self.start_job(Job::RemoveReplica { replica: *replica });
                }
                if std::mem::take(&mut self.removals.moving) {
                    self.saw(Scenario::ReplicaMoved);
                }
            }
            // It is being rebuilt; sometimes nobody waits for it.
            Some(_) if self.removals.moving && self.removals.rng.random_bool(0.9) => {}
            Some(_) => {
                self.removals.moving = false;
                self.want(wanted);
            }
            None if wanted as usize == REPLICAS => {
                let fewer = self.removals.rng.random_range(1..3);
                self.want(fewer);
            }
            None => {
                // Some time with fewer.
                match self.removals.rng.random_range(0..4) {
                    0 => {
                        self.removals.moving = true;
                        self.list_anew(transitions::add_spare);
                    }
                    1 | 2 => self.raise(),
                    _ => {}
                }
            }
        }
        self.schedule(delay, Event::Resize);
        // It is told of most changes.
        if self.removals.rng.random_bool(0.8) {
            self.start_job(Job::Reload);
        }
    }

    /// Everything works again: the volume is to have all its replicas.
    fn restore_replicas(&mut self) {
        let record = &self.store.record;
        if record.in_sync.len() == REPLICAS && record.params.replicas as usize == REPLICAS {
            return;
        }
        self.schedule(RESTORE_EVERY_US, Event::Resize);
        self.raise();
        self.start_job(Job::Reload);
    }

    fn want(&mut self, replicas: u32) {
        let min_in_sync = self.removals.min_in_sync.min(replicas);
        let change = |record: &VolumeRecord| {
            let params = VolumeParams { replicas, min_in_sync, ..record.params.clone() };
            transitions::set_params(record, params).ok().filter(|next| next != record)
        };
        self.swap_by_another(change);
    }

    /// All replicas are wanted, and those that went are listed anew.
    fn raise(&mut self) {
        self.want(u32::try_from(REPLICAS).expect("small"));
        self.list_anew(transitions::add_replica);
    }

    /// Lists replicas that went anew on their nodes, as many as may be.
    fn list_anew(&mut self, list: AddReplica) {
        for node in 0..REPLICAS {
            let new = self.replica_at(node);
            let listed = |record: &VolumeRecord| {
                let old = record
                    .replicas
                    .iter()
                    .find(|(_, entry)| entry.node == node_name(node) && entry.state == ReplicaState::Faulted);
                let bare = transitions::forget_replica(record, *old?.0).ok()?;
                list(&bare, new, &node_name(node)).ok()
            };
            let before = self.store.version;
            self.swap_by_another(listed);
            if self.store.version != before && self.nodes[node].powered {
                self.schedule(1_000, Event::StartProcess { node });
            }
        }
    }

    /// The trap: the target reaches the store and no replica, and all members but the one that is to go lose their caches.
    fn leave_alone(&mut self, replica: ReplicaId) -> bool {
        let Some(host) = self.current.and_then(|target| self.targets.get(&target)) else { return false };
        let here = host.node;
        let others: Vec<usize> =
            self.store.record.in_sync.iter().filter(|r| **r != replica).map(|r| node_of(*r)).collect();
        if others.contains(&here) || node_of(replica) == here {
            return false;
        }
        self.log(|| format!("-- t on n{here} is left alone, caches of {others:?} are lost"));
        for node in 0..REPLICAS {
            self.cuts.insert((here, node), self.now + ALONE_US);
            self.cuts.insert((node, here), self.now + ALONE_US);
        }
        for node in others {
            self.power_off(node, OFF_US);
        }
        true
    }

    /// A target proposes a removal: by now it could know who lost its cache.
    pub fn judge_removal(&mut self, target: TargetNumber, action: &TargetAction) {
        let TargetAction::Swap { record, .. } = action else { return };
        let known = &self.store.record;
        let goes = |r: &&ReplicaId| record.replicas.get(*r).is_some_and(|e| e.state == ReplicaState::Faulted);
        let owned = record.target_id == known.target_id && record.epoch.number == known.epoch.number + 1;
        let Some(gone) = known.in_sync.iter().find(goes).copied().filter(|_| owned) else { return };
        if !self.removals.judged.insert(record.epoch.nonce) {
            return;
        }
        self.log(|| format!("t{target}: takes {gone} out for good"));
        let kept = |node: usize| {
            let disk = &self.nodes[node].disk;
            !disk.meta.cache_lost && disk.tmpfs_cookie == Some(disk.meta.cookie)
        };
        let lost_long_ago = |node: usize| !kept(node) && self.nodes[node].died_at + KNOWN_AFTER_US < self.now;
        if record.in_sync.iter().all(|member| lost_long_ago(node_of(*member))) && kept(node_of(gone)) {
            self.history.violations.push(format!(
                "P2: t{target} takes replica {gone} out for good, the last one that kept its cache"
            ));
        }
    }

    /// After each change of the record: what went is deleted on its node at once.
    pub fn check_removals(&mut self, before: &VolumeRecord) {
        if !self.removals.are_made() {
            return;
        }
        let state = |record: &VolumeRecord, replica| record.replicas.get(&replica).map(|entry| entry.state);
        for replica in before.replicas.keys().copied() {
            let now = state(&self.store.record, replica);
            if now != Some(ReplicaState::Faulted) || state(before, replica) == now {
                continue;
            }
            if before.in_sync.contains(&replica) {
                self.saw(Scenario::MemberTakenOut);
                let (stay, wanted) = (self.store.record.in_sync.len(), self.store.record.params.replicas);
                if stay < wanted as usize {
                    self.history.violations.push(format!(
                        "P6: {stay} members of {wanted} wanted stayed when replica {replica} was taken out"
                    ));
                }
            }
            self.delete_replica(node_of(replica));
        }
    }

    /// The node has an empty replica instead, under an id that the record does not know.
    fn delete_replica(&mut self, node: usize) {
        self.kill_process(node, true);
        let new = self.new_replica_id(node);
        let record = &self.store.record;
        let meta =
            ReplicaMeta::new(record.volume_id, new, record.lineage, record.size_bytes, Epoch::default());
        self.nodes[node].disk = Disk::new(meta);
    }
}
