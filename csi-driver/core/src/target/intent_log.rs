//! Which regions the replicas have logged, and taking cold ones out again (R18).
//!
//! No stamps are needed: between the flush and the last replica's answer to ClearLog no write to the regions is in
//! flight or begun, and a late ClearLog of a session that is gone is refused by its token.

use std::collections::BTreeSet;

use crate::block_range::BlockRange;
use crate::ids::{Region, ReplicaId};
use crate::timers;

use super::flushes::FlushFor;
use super::peers::CallKind;
use super::{Control, Target};

/// A region that some replica has logged.
#[derive(Debug, Default)]
pub(super) struct LogEntry {
    /// Writes and copies that began and are not over.
    in_flight: u32,
    last_ms: u64,
    /// Chosen for the clearing under way and not written since.
    chosen: bool,
    /// ClearLog is under way: writes wait.
    clearing: bool,
}

/// One flush with the ClearLog after it.
#[derive(Debug)]
pub(super) struct ClearRound {
    /// Who is flushed and cleared.
    replicas: Vec<ReplicaId>,
    /// The catch-up whose replica is among them: a later try of the same replica must keep its log.
    catch_up: Option<u64>,
    regions: Vec<Region>,
    /// ClearLog unanswered; empty before it is sent.
    waiting: BTreeSet<ReplicaId>,
    clearing: bool,
}

impl Target {
    /// Counts a write's regions in, if the log has room for those that are new; else the write waits for a clearing.
    pub(super) fn count_in_log(&mut self, range: BlockRange) -> bool {
        let mut new = 0;
        for region in range.regions() {
            match self.logged.get(&region) {
                Some(entry) if entry.clearing => return false,
                Some(_) => {}
                None => new += 1,
            }
        }
        if new > 0 && self.logged.len() + new > timers::INTENT_LOG_REGIONS_MAX {
            if self.clear_round.is_none() && self.stopping.is_none() && !self.is_joining() {
                self.start_clear_round(false);
            }
            return false;
        }
        for region in range.regions() {
            let entry = self.logged.entry(region).or_default();
            entry.in_flight += 1;
            entry.last_ms = self.now_ms;
            entry.chosen = false;
        }
        if self.logged.len() > timers::INTENT_LOG_PRESSURE && self.clear_round.is_none() {
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

    pub(super) fn pump_log(&mut self) {
        let pressed = self.logged.len() > timers::INTENT_LOG_PRESSURE;
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
        let pressed = self.logged.len() > timers::INTENT_LOG_PRESSURE;
        let mut regions: Vec<(u64, Region)> = self
            .logged
            .iter()
            .filter(|(_, e)| {
                e.in_flight == 0 && (all || pressed || e.last_ms + self.guards.log_cold_ms <= self.now_ms)
            })
            .filter(|(region, _)| !self.reconcile.contains(**region) && !self.is_to_copy(**region))
            .map(|(region, entry)| (entry.last_ms, *region))
            .collect();
        if regions.is_empty() {
            return;
        }
        if !all {
            regions.sort_unstable();
            regions.truncate(timers::LOG_CLEAR_BATCH);
        }
        let regions: Vec<Region> = regions.into_iter().map(|(_, region)| region).collect();
        for region in &regions {
            if let Some(entry) = self.logged.get_mut(region) {
                entry.chosen = true;
            }
        }
        let mut replicas: Vec<ReplicaId> = self.ack_set.iter().copied().collect();
        replicas.extend(self.clears_too().filter(|r| !self.ack_set.contains(r)));
        let catch_up = self.clearing_number();
        self.clear_round =
            Some(ClearRound { replicas, catch_up, regions, waiting: BTreeSet::new(), clearing: false });
        if self.guards.clearrule {
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
        let (regions, replicas, catch_up) = (round.regions.clone(), round.replicas.clone(), round.catch_up);
        let same = catch_up.is_some() && catch_up == self.clearing_number();
        let open: Vec<ReplicaId> = replicas
            .into_iter()
            .filter(|r| self.is_member(*r) || (same && self.catching_up() == Some(*r)))
            .filter(|r| self.is_open(*r))
            .collect();
        if let Some(round) = &mut self.clear_round {
            round.waiting = open.iter().copied().collect();
        }
        for replica in open {
            self.send_control(replica, CallKind::ClearLog, Control::ClearLog(regions.clone()));
        }
        self.end_clear_round();
    }

    /// A replica answered ClearLog, or is gone.
    pub(super) fn clear_answered(&mut self, replica: ReplicaId) {
        if let Some(round) = &mut self.clear_round {
            round.waiting.remove(&replica);
            self.end_clear_round();
        }
    }

    fn end_clear_round(&mut self) {
        let over = self.clear_round.as_ref().is_some_and(|round| round.clearing && round.waiting.is_empty());
        if !over {
            return;
        }
        if let Some(round) = self.clear_round.take() {
            for region in round.regions {
                if self.logged.get(&region).is_some_and(|entry| entry.in_flight == 0) {
                    self.logged.remove(&region);
                }
            }
        }
        self.dirty = true;
    }
}
