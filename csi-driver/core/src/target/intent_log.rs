//! Which regions the replicas have logged, and taking cold ones out again (R18).
//!
//! No stamps are needed: between the flush and the last replica's answer to ClearLog no write to the regions is in
//! flight or begun, and a late ClearLog of a session that is gone is refused by its token.

use std::collections::BTreeSet;

use crate::block_range::BlockRange;
use crate::ids::{Region, ReplicaId};
use crate::timers;

use super::calls::CallKind;
use super::copy_plan::CopyPlan;
use super::flushes::FlushFor;
use super::{CallId, Control, Target};

/// A region that some replica has logged.
#[derive(Debug, Default)]
pub(super) struct LogEntry {
    /// Writes and copies that began and are not over.
    in_flight: u32,
    last_ms: u64,
    /// A member has it logged; else only the returning replica, by a copy.
    by_members: bool,
    /// Chosen for the clearing under way and not written since.
    chosen: bool,
    /// The clearing is under way: writes wait.
    clearing: bool,
}

/// One flush with the clearing after it.
#[derive(Debug)]
pub(super) struct ClearRound {
    kind: RoundKind,
    /// Who is flushed, and who clears its log.
    replicas: Vec<ReplicaId>,
    regions: Vec<Region>,
    /// Unanswered; empty before it is sent.
    waiting: BTreeSet<CallId>,
    clearing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RoundKind {
    /// Takes cold regions out of all logs. The catch-up whose replica is among them: a later try of the same replica
    /// must keep its log.
    Cold { catch_up: Option<u64> },
    /// What the returning replica has flushed: out of its own log and out of the maps kept for it (R23).
    Checkpoint { catch_up: u64 },
}

impl ClearRound {
    /// Who is flushed.
    pub(super) fn replicas(&self) -> &[ReplicaId] {
        &self.replicas
    }

    fn catch_up(&self) -> Option<u64> {
        match self.kind {
            RoundKind::Cold { catch_up } => catch_up,
            RoundKind::Checkpoint { catch_up } => Some(catch_up),
        }
    }
}

impl Target {
    /// A region that a member says it has logged.
    pub(super) fn is_logged_by_member(&mut self, region: Region) {
        self.logged.entry(region).or_default().by_members = true;
    }

    /// Counts a write's regions in, if the log has room for those that are new; else the write waits for a clearing.
    /// `by_members`: it goes to members, not only to the returning replica.
    pub(super) fn count_in_log(&mut self, range: BlockRange, by_members: bool) -> bool {
        let mut new = 0;
        for region in range.regions() {
            match self.logged.get(&region) {
                Some(entry) if entry.clearing => return false,
                Some(_) => {}
                None => new += 1,
            }
        }
        if new > 0 && self.logged.len() + new > self.guards.log_regions_max {
            if self.clear_round.is_none() && self.stopping.is_none() && !self.is_joining() {
                self.start_clear_round(false);
            }
            return false;
        }
        for region in range.regions() {
            let entry = self.logged.entry(region).or_default();
            entry.in_flight += 1;
            entry.last_ms = self.now_ms;
            entry.by_members |= by_members;
            entry.chosen = false;
        }
        if self.log_is_pressed() && self.clear_round.is_none() {
            self.dirty = true;
        }
        true
    }

    pub(super) fn uncount_in_log(&mut self, range: BlockRange) {
        for region in range.regions() {
            if let Some(entry) = self.logged.get_mut(&region) {
                entry.in_flight = entry.in_flight.saturating_sub(1);
                entry.last_ms = self.now_ms;
            }
        }
    }

    /// The region to copy next. The log keeps what is to be copied, and a copy needs the log: when that has no room for
    /// another region, only a copy in one that it has ends the wait, and no copy begins that would wait for room.
    pub(super) fn region_to_copy(&self, plan: &CopyPlan) -> Option<Region> {
        let next = plan.next_region()?;
        if self.log_has_room(next) && (self.logged.contains_key(&next) || !self.log_is_pressed()) {
            return Some(next);
        }
        let logged = self.logged.iter().filter(|(_, entry)| !entry.clearing).map(|(region, _)| *region);
        logged
            .into_iter()
            .find(|region| plan.has_runs(*region))
            .or(Some(next).filter(|r| self.log_has_room(*r)))
    }

    fn log_has_room(&self, region: Region) -> bool {
        match self.logged.get(&region) {
            Some(entry) => !entry.clearing,
            None => self.logged.len() < self.guards.log_regions_max,
        }
    }

    fn log_is_pressed(&self) -> bool {
        self.logged.len() * 100 > self.guards.log_regions_max * timers::INTENT_LOG_PRESSURE_PERCENT
    }

    pub(super) fn pump_log(&mut self) {
        let pressed = self.log_is_pressed();
        let due = self.now_ms >= self.next_clear_ms || pressed;
        if due
            && self.clear_round.is_none()
            && self.gates.begin
            && self.stopping.is_none()
            && !self.is_joining()
        {
            self.start_clear_round(false);
        }
    }

    /// `all`: of a target that stops; nothing is in flight.
    pub(super) fn start_clear_round(&mut self, all: bool) {
        self.next_clear_ms = self.now_ms + self.guards.log_clear_every_ms;
        let pressed = self.log_is_pressed();
        let mut regions: Vec<(u64, Region)> = self
            .logged
            .iter()
            .filter(|(_, e)| {
                e.in_flight == 0 && (all || pressed || e.last_ms + self.guards.log_cold_ms <= self.now_ms)
            })
            .filter(|(region, _)| !self.reconcile.contains(**region) && !self.is_to_copy(**region))
            .map(|(region, entry)| (entry.last_ms, *region))
            .collect();
        if !all {
            regions.sort_unstable();
            regions.truncate(timers::LOG_CLEAR_BATCH);
        }
        let regions: Vec<Region> = regions.into_iter().map(|(_, region)| region).collect();
        let mut replicas: Vec<ReplicaId> = self.ack_set.iter().copied().collect();
        if self.guards.mapflush {
            replicas.extend(self.clears_too().filter(|r| !self.ack_set.contains(r)));
        }
        let kind = RoundKind::Cold { catch_up: self.clearing_number() };
        self.start_round(kind, replicas, regions, self.guards.clearrule);
    }

    /// R23: flushes the returning replica alone. Of a region that members have logged too, their own flush may be
    /// missing: should they lose it, their logs put it back into their maps (R22).
    pub(super) fn start_checkpoint(&mut self, replica: ReplicaId, catch_up: u64, regions: Vec<Region>) {
        let quiet = |region: &Region| self.logged.get(region).is_none_or(|entry| entry.in_flight == 0);
        let regions = regions.into_iter().filter(quiet).collect();
        self.start_round(RoundKind::Checkpoint { catch_up }, vec![replica], regions, self.guards.mapflush);
    }

    /// Copied regions that the checkpoint under way is about.
    pub(super) fn regions_in_checkpoint(&self) -> usize {
        match &self.clear_round {
            Some(ClearRound { kind: RoundKind::Checkpoint { .. }, regions, .. }) => regions.len(),
            Some(ClearRound { kind: RoundKind::Cold { .. }, .. }) | None => 0,
        }
    }

    fn start_round(&mut self, kind: RoundKind, replicas: Vec<ReplicaId>, regions: Vec<Region>, flush: bool) {
        if regions.is_empty() {
            return;
        }
        for region in &regions {
            self.logged.entry(*region).or_default().chosen = true;
        }
        let waiting = BTreeSet::new();
        self.clear_round = Some(ClearRound { kind, replicas, regions, waiting, clearing: false });
        if flush {
            self.start_flush(FlushFor::Clear);
        } else {
            self.clear_flushed();
        }
    }

    /// The flush is answered: those regions that were not written since it began are cleared.
    pub(super) fn clear_flushed(&mut self) {
        let Some(round) = &mut self.clear_round else { return };
        let logged = &mut self.logged;
        let strict = self.guards.clearseq;
        round.regions.retain(|region| {
            let Some(entry) = logged.get_mut(region) else { return false };
            let quiet = entry.chosen && entry.in_flight == 0;
            entry.clearing = quiet && strict;
            quiet || !strict
        });
        round.clearing = true;
        let (of, regions, replicas) = (round.catch_up(), round.regions.clone(), round.replicas.clone());
        // A replica that left meanwhile, or is in another try, has flushed nothing of this.
        let returning = self.catching_up().filter(|_| of.is_some() && of == self.clearing_number());
        let open: Vec<ReplicaId> = replicas
            .into_iter()
            .filter(|r| self.is_member(*r) || returning == Some(*r))
            .filter(|r| self.is_open(*r))
            .collect();
        for replica in open {
            self.send_control(replica, CallKind::Clear, Control::ClearLog(regions.clone()));
        }
        if let Some(absent) = returning {
            for member in self.members() {
                let op = Control::ClearMap { absent, regions: regions.clone() };
                self.send_control(member, CallKind::Clear, op);
            }
        }
        let waiting =
            self.calls.iter().filter(|(_, call)| call.kind == CallKind::Clear).map(|(id, _)| *id).collect();
        if let Some(round) = &mut self.clear_round {
            round.waiting = waiting;
        }
        self.end_clear_round();
    }

    /// A replica answered one of the round's calls, or is gone.
    pub(super) fn clear_answered(&mut self, call: CallId) {
        if let Some(round) = &mut self.clear_round {
            round.waiting.remove(&call);
            self.end_clear_round();
        }
    }

    fn end_clear_round(&mut self) {
        let Some(round) = self.clear_round.take_if(|round| round.clearing && round.waiting.is_empty()) else {
            return;
        };
        for region in &round.regions {
            let Some(entry) = self.logged.get_mut(region) else { continue };
            entry.clearing = false;
            let kept = matches!(round.kind, RoundKind::Checkpoint { .. }) && entry.by_members;
            if entry.in_flight == 0 && !kept {
                self.logged.remove(region);
            }
        }
        if let Some(number) = round.catch_up() {
            self.checkpointed(number, &round.regions);
        }
        self.dirty = true;
    }
}
