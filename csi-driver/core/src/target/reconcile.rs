//! After a start: every region that any member has logged is copied from one source to the others and flushed on all,
//! before it is read (R20).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::block_range::BlockRange;
use crate::ids::{Region, ReplicaId};
use crate::timers;

use super::copies::CopyFor;
use super::flushes::FlushFor;
use super::{Target, TargetState};

#[derive(Debug, Default)]
pub(super) struct Reconcile {
    todo: BTreeSet<Region>,
    /// Regions that somebody waits for; they go first.
    asked: VecDeque<Region>,
    /// Regions under way, and how many copies of each are not over; all are flushed together.
    batch: BTreeMap<Region, u64>,
    flushing: bool,
    source: Option<ReplicaId>,
    /// +1 whenever the source changes: what an earlier source gave does not count.
    round: u64,
    waiting: BTreeMap<Region, Vec<u64>>,
}

impl Reconcile {
    pub(super) fn start(&mut self, regions: BTreeSet<Region>) {
        self.todo = regions;
    }

    pub(super) fn left(&self) -> usize {
        self.todo.len() + self.batch.len()
    }

    pub(super) fn contains(&self, region: Region) -> bool {
        self.todo.contains(&region) || self.batch.contains_key(&region)
    }

    pub(super) fn source(&self) -> Option<ReplicaId> {
        self.source
    }

    fn next(&mut self) -> Option<Region> {
        while let Some(region) = self.asked.pop_front() {
            if self.todo.remove(&region) {
                return Some(region);
            }
        }
        self.todo.pop_first()
    }
}

impl Target {
    /// Parks a task until its regions may be read; tells whether it has to wait.
    pub(super) fn wait_for_regions(&mut self, task: u64, range: BlockRange) -> bool {
        if self.reconcile.left() == 0 && self.state == TargetState::Serving {
            return false;
        }
        if self.state != TargetState::Serving {
            // What must be reconciled is not known before.
            self.reconcile.waiting.entry(Region(u32::MAX)).or_default().push(task);
            return true;
        }
        let Some(region) = range.regions().find(|region| self.reconcile.contains(*region)) else {
            return false;
        };
        self.reconcile.asked.push_back(region);
        self.reconcile.waiting.entry(region).or_default().push(task);
        self.dirty = true;
        true
    }

    pub(super) fn pump_reconcile(&mut self) {
        if self.state != TargetState::Serving {
            return;
        }
        for task in self.reconcile.waiting.remove(&Region(u32::MAX)).unwrap_or_default() {
            self.ask_lock(task);
        }
        if self.reconcile.left() == 0 || !self.gates.begin {
            return;
        }
        self.choose_source();
        if self.reconcile.batch.is_empty() && self.reconcile.source.is_some() {
            self.start_batch();
        }
        let copied = self.reconcile.batch.values().all(|left| *left == 0);
        if copied && !self.reconcile.flushing && !self.reconcile.batch.is_empty() {
            self.reconcile.flushing = true;
            if self.guards.recflush {
                self.start_flush(FlushFor::Reconcile(self.reconcile.round));
            } else {
                self.reconcile_flushed(self.reconcile.round);
            }
        }
    }

    /// R20: if the source fails, unfinished regions start again from the next. While no member is good there is none, and
    /// nothing starts.
    fn choose_source(&mut self) {
        if self.reconcile.source.is_some_and(|s| self.is_member(s) && self.is_good(s)) {
            return;
        }
        let good: Vec<ReplicaId> = self.members().into_iter().filter(|r| self.is_good(*r)).collect();
        let local = |r: &&ReplicaId| self.peers.get(r).is_some_and(|p| p.node == self.config.node);
        let reconcile = &mut self.reconcile;
        let source = good.iter().find(local).or_else(|| good.first()).copied();
        if source == reconcile.source {
            return;
        }
        reconcile.source = source;
        reconcile.round += 1;
        reconcile.flushing = false;
        let unfinished = std::mem::take(&mut reconcile.batch);
        reconcile.todo.extend(unfinished.into_keys());
        self.cancel_reconcile_copies();
    }

    fn start_batch(&mut self) {
        let round = self.reconcile.round;
        while self.reconcile.batch.len() < timers::RECONCILE_BATCH {
            let Some(region) = self.reconcile.next() else { break };
            // A single member has nobody to differ from, but what a crash left on it must verify (R32), and its cache
            // must reach its disk.
            self.reconcile.batch.insert(region, 1);
            self.start_copy(CopyFor::Reconcile { region, round }, BlockRange::of_region(region));
        }
    }

    pub(super) fn region_copied(&mut self, region: Region, round: u64) {
        if round == self.reconcile.round
            && let Some(left) = self.reconcile.batch.get_mut(&region)
        {
            *left -= 1;
            self.dirty = true;
        }
    }

    /// A copy of the region goes on as so many.
    pub(super) fn region_was_split(&mut self, region: Region, round: u64, copies: u64) {
        if round == self.reconcile.round
            && let Some(left) = self.reconcile.batch.get_mut(&region)
        {
            *left += copies - 1;
        }
    }

    pub(super) fn reconcile_flushed(&mut self, round: u64) {
        if round != self.reconcile.round {
            return;
        }
        self.reconcile.flushing = false;
        self.dirty = true;
        for region in std::mem::take(&mut self.reconcile.batch).into_keys() {
            for task in self.reconcile.waiting.remove(&region).unwrap_or_default() {
                self.ask_lock(task);
            }
        }
    }
}
