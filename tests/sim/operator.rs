//! What only an operator does: a record store restored from a backup (R35), and a replica promoted because the last member
//! is lost (R26). One of them at most per run.
//!
//! *Checked:* by the history. A target that serves under a restored record, or from a member that was given up, shows
//! somebody an older value than was acknowledged, or answers beside the one that took over (P4).

use holdfast_storage_core::ids::{Epoch, Lineage, ReplicaId};
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::Versioned;
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_storage_core::timers;
use holdfast_storage_core::transitions;
use rand::Rng;

use crate::coverage::Scenario;
use crate::disk::Disk;
use crate::world::{
    Event, NODES, Node, REPLICAS, STORE, TargetNumber, World, node_name, node_of, replica_id,
};

/// An operator waits so long before giving members up, by the true clock: longer than by the fastest of the nodes'.
const PATIENCE_US: u64 = timers::GIVEN_UP_AFTER_MS * 1_050;
/// A restored store is noticed within this, if nothing else goes wrong.
const NOTICED_WITHIN_US: u64 = 20_000_000;
/// After so long a replica that is down has been swapped out.
const AWAY_US: u64 = 5_000_000;
/// Replica ids of one node are apart by this.
const IDS_APART: u128 = 16;

/// What an operator is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Everything runs again: the store is restored.
    Restore,
    /// A restored volume was noticed, and somebody looks at it.
    Decide,
    /// The volume was left alone for long enough: promote the replica on this node.
    Promote { node: usize, lost: bool },
    /// A replica that was given up is replaced by an empty one.
    Replace { node: usize },
    /// A lost store is looked for in the replicas' copies.
    Rescue { tries: u32 },
}

#[derive(Debug, Default)]
pub struct Operator {
    /// Older records, in the families that need them.
    past: Vec<Versioned>,
    /// It happened; there is no second time.
    pub began: bool,
    /// No further trouble: what would hide a restored store from everybody is not promised to be noticed.
    pub calm: bool,
    noticed: bool,
    /// Nobody publishes the volume meanwhile.
    pub holds: bool,
    /// The record when the store was restored.
    truth: Option<VolumeRecord>,
    /// The next target to serve begins a history of its own.
    forks: bool,
    ids: u128,
}

impl Operator {
    /// The record that somebody will have to decide by.
    pub fn set_truth(&mut self, record: VolumeRecord) {
        self.truth = Some(record);
    }
}

impl World {
    pub fn keep_record(&mut self, before: &Versioned) {
        if self.chaos.restores_store && self.operator.truth.is_none() {
            self.operator.past.push(before.clone());
        }
    }

    pub fn operate(&mut self, task: Task) {
        match task {
            Task::Restore => self.restore_store(),
            Task::Decide => self.decide(),
            Task::Promote { node, lost } => self.promote(node, lost),
            Task::Replace { node } => self.replace(node),
            Task::Rescue { tries } => self.rescue(tries),
        }
    }

    /// One replica is away for long enough to be left behind; the others run and can be reached, so that they will know
    /// better than the restored record.
    pub fn prepare_restore(&mut self, away: usize) {
        if self.operator.began || self.now + NOTICED_WITHIN_US > self.chaos.until_us {
            return;
        }
        self.operator.began = true;
        self.operator.calm = true;
        self.cuts.clear();
        for node in 0..NODES {
            if !self.nodes[node].powered {
                self.power_on(node);
            }
            if node < REPLICAS && node != away {
                self.schedule(0, Event::StartProcess { node });
            }
        }
        self.kill_process(away, true);
        self.schedule(NOTICED_WITHIN_US, Event::StartProcess { node: away });
        self.schedule(AWAY_US, Event::Operate(Task::Restore));
    }

    fn restore_store(&mut self) {
        let epoch = self.store.record.epoch.number;
        // A target asks the members: without one that is there and learned a later epoch nobody can tell.
        let knows = |past: &&Versioned| {
            let runs = |node: &Node| {
                node.process.is_some() && node.disk.meta.epoch.number > past.record.epoch.number
            };
            past.record.in_sync.iter().any(|replica| runs(&self.nodes[node_of(*replica)]))
        };
        let older: Vec<Versioned> = self.operator.past.iter().filter(knows).cloned().collect();
        if older.is_empty() {
            self.operator.calm = false;
            return;
        }
        let back = self.rng.random_range(0..older.len());
        let Versioned { version, record } = older[back].clone();
        self.log(|| format!("-- the store is restored: epoch {epoch} -> {}", record.epoch.number));
        self.saw(Scenario::StoreRestored);
        self.operator.truth = Some(self.store.record.clone());
        self.store.before = None;
        // Some stores go back in their versions too, others never do.
        self.store.version = if self.rng.random_bool(0.5) { version } else { self.store.version.next() };
        self.store.record = record;
        if let Some(current) = self.current
            && self.rng.random_bool(0.5)
        {
            self.kill_target(current, true);
        }
        let node = self.rng.random_range(0..NODES);
        self.publish(node);
    }

    /// A target ends because a replica knows better than the record.
    pub fn note_restored(&mut self) {
        if std::mem::replace(&mut self.operator.noticed, self.operator.truth.is_some()) {
            return;
        }
        self.saw(Scenario::RestoreNoticed);
        self.operator.calm = false;
        for node in 0..REPLICAS {
            self.schedule(0, Event::StartProcess { node });
        }
        let delay = self.rng.random_range(1_000_000..15_000_000);
        self.schedule(delay, Event::Operate(Task::Decide));
    }

    /// Decides about a restored volume: any replica that held everything will do.
    fn decide(&mut self) {
        let Some(truth) = self.operator.truth.clone().filter(|_| self.store.record.restored) else { return };
        if self.operator.holds {
            return;
        }
        let kept = |node: &usize| {
            let disk = &self.nodes[*node].disk;
            !disk.meta.cache_lost && disk.tmpfs_cookie == Some(disk.meta.cookie)
        };
        let members: Vec<usize> = truth.in_sync.iter().map(|replica| node_of(*replica)).collect();
        let best = members.iter().find(|node| kept(node)).or(members.first()).copied();
        if let Some(node) = best {
            self.wait_then_promote(node, false);
        }
    }

    /// The last member is lost for ever, as far as anybody can tell, and another replica is there.
    pub fn give_up(&mut self) {
        let members: Vec<usize> = self.store.record.in_sync.iter().map(|replica| node_of(*replica)).collect();
        let offline: Vec<usize> = (0..REPLICAS)
            .filter(|node| {
                let state = self.store.record.replicas.get(&self.replica_at(*node)).map(|entry| entry.state);
                matches!(state, Some(ReplicaState::Offline { .. }))
            })
            .collect();
        let ([last], Some(chosen)) = (members.as_slice(), offline.first().copied()) else { return };
        if self.operator.began || self.now + PATIENCE_US + NOTICED_WITHIN_US > self.chaos.until_us {
            return;
        }
        let last = *last;
        self.operator.began = true;
        self.operator.calm = true;
        let late = self.rng.random_range(100_000..8_000_000);
        self.power_off(last, PATIENCE_US + late);
        // A target that hears of nothing, whose member comes back.
        if let Some(node) = self.current.and_then(|target| self.targets.get(&target)).map(|host| host.node) {
            let until = self.now + PATIENCE_US + 30_000_000;
            self.cuts.insert((node, STORE), until);
            self.cuts.insert((STORE, node), until);
        }
        self.wait_then_promote(chosen, true);
    }

    fn wait_then_promote(&mut self, node: usize, lost: bool) {
        self.operator.holds = true;
        let bare = transitions::unpublish(&self.store.record, None).expect("unpublish never fails");
        let _ = self.swap_record(self.store.version, bare);
        self.current = None;
        self.schedule(PATIENCE_US, Event::Operate(Task::Promote { node, lost }));
    }

    fn promote(&mut self, node: usize, lost: bool) {
        let lineage = Lineage(self.rng.random());
        let nonce = self.rng.random();
        let replica = self.replica_at(node);
        self.operator.holds = false;
        self.operator.calm = false;
        match transitions::promote(&self.store.record, replica, lineage, nonce) {
            Ok(promoted) => {
                self.saw(if lost { Scenario::PromotedOffline } else { Scenario::PromotedAfterRestore });
                let _ = self.swap_record(self.store.version, promoted);
            }
            Err(error) => return self.history.violations.push(format!("R26: no promotion: {error}")),
        }
        self.operator.forks = lost;
        for other in self.other_replicas(node) {
            let delay = self.rng.random_range(10_000_000..25_000_000);
            self.schedule(delay, Event::Operate(Task::Replace { node: other }));
        }
    }

    /// The old replica is deleted and forgotten, a new one is listed.
    fn replace(&mut self, node: usize) {
        let (old, record) = (self.replica_at(node), self.store.record.clone());
        self.kill_process(node, true);
        let new = self.new_replica_id(node);
        let listed = transitions::forget_replica(&record, old)
            .and_then(|record| transitions::add_replica(&record, new, &node_name(node)));
        let Ok(listed) = listed else {
            return self
                .history
                .violations
                .push("R26: a replica that was given up is not replaced".to_owned());
        };
        let meta =
            ReplicaMeta::new(record.volume_id, new, record.lineage, record.size_bytes, Epoch::default());
        self.nodes[node].disk = Disk::new(meta);
        let _ = self.swap_record(self.store.version, listed);
        self.schedule(1_000, Event::StartProcess { node });
    }

    /// An id that no replica had (R34).
    pub fn new_replica_id(&mut self, node: usize) -> ReplicaId {
        self.operator.ids += IDS_APART;
        ReplicaId(replica_id(node).0 + self.operator.ids)
    }

    /// R26: what the members that are lost held, nobody promises any more.
    pub fn note_first_service(&mut self, target: TargetNumber) {
        let Some(status) = self.targets.get(&target).map(|host| host.target.status()) else { return };
        if self.operator.forks && status.epoch.number >= self.store.record.epoch.number {
            self.operator.forks = false;
            self.history.fork(status.generation.0);
        }
    }
}
