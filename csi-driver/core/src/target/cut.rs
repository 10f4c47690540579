//! Cutting a snapshot (R27), alone or in a group (R29).
//!
//! ```text
//!  begin ──> waiting ──> holding ──> (held) ──> freezing ──> committing ──> done
//!  record    settled,    writes      group:     Freeze on    record:
//!  cutting   flushed     held, none  until Cut  every        committed,
//!                        in flight              member       holders
//!               └───────────┴──────────┴───────────┴──> dropping ──> abandoning ──> error
//! ```
//!
//! Promised: the snapshot holds every write that was acknowledged before the hold began and none that was acknowledged
//! after it ended, and the same bytes on every holder, whatever loses its power afterwards. Who may break it: a write
//! that is on one member and on its way to another (`cutdrain`), a member's cache (`cutflush`), a layer of an earlier
//! try (`void`, at the replica), a member that did not freeze (`cutall`), and regions that are not reconciled, which
//! differ between members: so a cut waits until none is left.

use std::collections::BTreeSet;

use crate::ids::{ReplicaId, SnapshotId, TargetId};
use crate::record::{SnapshotState, VolumeRecord};
use crate::replica::DiskError;
use crate::timers;
use crate::transitions::{self, TransitionError};

use super::calls::CallKind;
use super::config::SwapKind;
use super::flushes::FlushFor;
use super::jobs::Current;
use super::{Control, JobError, JobId, Target};

#[derive(Debug)]
pub(super) struct Cut {
    /// Tells its flush from an earlier cut's.
    number: u64,
    /// Who waits for it; nobody while a group's hold was answered.
    pub job: Option<JobId>,
    pub snapshot: SnapshotId,
    /// For how long a group wants writes held.
    group: Option<u64>,
    /// The group's second half was asked for.
    go: bool,
    stage: Stage,
    /// Writes are held until then.
    held_until_ms: Option<u64>,
    /// Members whose layer is frozen in a session that is still whole.
    frozen: BTreeSet<ReplicaId>,
    /// Replicas that were sent Freeze in the session they have.
    asked: BTreeSet<ReplicaId>,
    error: Option<JobError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begin,
    /// The flush ahead, so that the hold is short: `true` once it was started.
    Waiting(bool),
    Holding,
    /// A group's: nothing is in flight.
    Held,
    Freezing,
    Committing,
    Dropping,
    Abandoning,
}

impl Cut {
    pub(super) fn alone(job: JobId, snapshot: SnapshotId) -> Self {
        Self {
            number: job.0,
            job: Some(job),
            snapshot,
            group: None,
            go: true,
            stage: Stage::Begin,
            held_until_ms: None,
            frozen: BTreeSet::new(),
            asked: BTreeSet::new(),
            error: None,
        }
    }

    pub(super) fn of_group(job: JobId, snapshot: SnapshotId, hold_ms: u64) -> Self {
        let hold_ms = hold_ms.min(timers::GROUP_HOLD_MAX_MS);
        Self { group: Some(hold_ms), go: false, ..Self::alone(job, snapshot) }
    }

    /// New writes and copies wait.
    fn holds_writes(&self) -> bool {
        self.held_until_ms.is_some()
    }

    pub(super) fn swap(
        &self,
        record: &VolumeRecord,
        owner: TargetId,
    ) -> Option<Result<VolumeRecord, TransitionError>> {
        match self.stage {
            Stage::Begin => Some(transitions::begin_cut(record, owner, self.snapshot)),
            Stage::Committing => Some(transitions::commit_cut(record, owner, self.snapshot, &self.frozen)),
            Stage::Abandoning => Some(transitions::abandon_cut(record, owner, self.snapshot)),
            Stage::Waiting(_) | Stage::Holding | Stage::Held | Stage::Freezing | Stage::Dropping => None,
        }
    }

    pub(super) fn session_lost(&mut self, replica: ReplicaId) {
        self.asked.remove(&replica);
        // Once all froze, a layer counts whatever becomes of the session: it is durable, and Open keeps it.
        if self.stage != Stage::Committing {
            self.frozen.remove(&replica);
        }
    }

    fn give_up(&mut self, error: JobError) {
        self.held_until_ms = None;
        self.error = Some(error);
        self.stage = Stage::Dropping;
    }
}

impl Target {
    fn cut(&self) -> Option<&Cut> {
        match &self.jobs.current {
            Some(Current::Cut(cut)) => Some(cut),
            _ => None,
        }
    }

    fn cut_mut(&mut self) -> Option<&mut Cut> {
        match &mut self.jobs.current {
            Some(Current::Cut(cut)) => Some(cut),
            _ => None,
        }
    }

    pub(super) fn cut_holds_writes(&self) -> bool {
        self.cut().is_some_and(Cut::holds_writes)
    }

    /// No replica begins to catch up, and none joins, from the hold to the commit.
    pub(super) fn cut_wants_quiet(&self) -> bool {
        let quiet = |stage: Stage| !matches!(stage, Stage::Begin | Stage::Waiting(_));
        self.cut().is_some_and(|cut| quiet(cut.stage))
    }

    /// The layers that an Open of this replica has to keep (R27).
    pub(super) fn layers_of(&self, replica: ReplicaId) -> BTreeSet<SnapshotId> {
        let mut layers = self.volume().map(|record| record.held_by(replica)).unwrap_or_default();
        if let Some(pending) = &self.pending {
            layers.extend(pending.proposed.held_by(replica));
        }
        if let Some(cut) = self.cut()
            && cut.stage == Stage::Committing
            && cut.frozen.contains(&replica)
        {
            layers.insert(cut.snapshot);
        }
        layers
    }

    pub(super) fn pump_cut(&mut self) {
        let Some(cut) = self.cut() else { return };
        let entry = self.volume().and_then(|record| record.snapshot(cut.snapshot)).map(|s| s.state);
        if entry == Some(SnapshotState::Committed) {
            if self.copies_kept() {
                self.finish_job(Ok(()));
            }
            return;
        }
        let number = cut.number;
        let ours = self.generation.map(|generation| SnapshotState::Cutting { generation });
        match cut.stage {
            Stage::Begin if entry.is_some() && entry == ours => self.set_cut_stage(Stage::Waiting(false)),
            Stage::Waiting(false) if self.may_cut() => {
                self.set_cut_stage(Stage::Waiting(true));
                self.start_flush(FlushFor::Cut(number));
            }
            Stage::Holding if self.may_cut() && self.nothing_in_flight() => self.drained_for_cut(),
            Stage::Held if cut.go => self.set_cut_stage(Stage::Freezing),
            Stage::Freezing => self.pump_freezing(),
            Stage::Dropping => self.pump_dropping(),
            Stage::Abandoning if entry.is_none() => {
                let error = self.cut_mut().and_then(|cut| cut.error.take()).unwrap_or(JobError::TooSlow);
                self.finish_job(Err(error));
            }
            Stage::Begin
            | Stage::Waiting(_)
            | Stage::Holding
            | Stage::Held
            | Stage::Committing
            | Stage::Abandoning => {}
        }
    }

    /// The members are equal but for what is in flight: all are there, none leaves or joins, all regions are reconciled.
    fn may_cut(&self) -> bool {
        self.gates.acknowledge
            && self.pending.is_none()
            && self.reconcile.left() == 0
            && !self.is_joining()
            && self.members().into_iter().all(|r| self.is_good(r) && self.told.contains(&r))
    }

    /// No write and no copy began that is not over.
    fn nothing_in_flight(&self) -> bool {
        !self.guards.cutdrain || self.tasks.values().all(|task| !task.has_begun())
    }

    /// The flush ahead of the hold is answered.
    pub(super) fn cut_flushed(&mut self, number: u64) {
        let (now, drain) = (self.now_ms, self.guards.cutdrain);
        let waits = |cut: &&mut Cut| cut.number == number && cut.stage == Stage::Waiting(true);
        let Some(cut) = self.cut_mut().filter(waits) else { return };
        cut.stage = Stage::Holding;
        let holds = drain || cut.group.is_some();
        cut.held_until_ms = holds.then(|| now + cut.group.unwrap_or(timers::CUT_HOLD_MS));
        self.dirty = true;
        let joins = self.pending.as_ref().is_some_and(|p| matches!(p.kind, SwapKind::In(_)));
        if !joins {
            // What it has is of no instant; it starts anew, with one snapshot more to rebuild (R28).
            self.abort_catch_up();
        }
    }

    fn drained_for_cut(&mut self) {
        let Some(cut) = self.cut_mut() else { return };
        if cut.go {
            return self.set_cut_stage(Stage::Freezing);
        }
        let job = cut.job.take();
        self.set_cut_stage(Stage::Held);
        if let Some(job) = job {
            self.end_job(job, Ok(()));
        }
    }

    /// Sends Freeze to every member that has not been asked in the session it has; goes on when all are frozen.
    fn pump_freezing(&mut self) {
        let members = self.members();
        let settled = self.may_cut();
        let Some(cut) = self.cut() else { return };
        let snapshot = cut.snapshot;
        let open = |r: &&ReplicaId| self.is_open(**r) && !cut.asked.contains(r);
        let due: Vec<ReplicaId> = members.iter().filter(open).copied().collect();
        let all = members.iter().all(|r| cut.frozen.contains(r));
        let enough = if self.guards.cutall { all && settled } else { !cut.frozen.is_empty() };
        let all_cut = !self.guards.cutall && enough;
        let Some(cut) = self.cut_mut() else { return };
        cut.asked.extend(due.iter().copied());
        if enough {
            if all_cut {
                cut.frozen.extend(members);
            }
            cut.held_until_ms = None;
            return self.set_cut_stage(Stage::Committing);
        }
        for replica in due {
            self.send_control(replica, CallKind::Freeze, Control::Freeze { snapshot });
        }
    }

    pub(super) fn frozen(&mut self, replica: ReplicaId) {
        if let Some(cut) = self.cut_mut().filter(|cut| cut.stage == Stage::Freezing) {
            cut.frozen.insert(replica);
        }
    }

    pub(super) fn freeze_refused(&mut self, replica: ReplicaId, error: DiskError) {
        if let Some(cut) = self.cut_mut().filter(|cut| cut.stage == Stage::Freezing) {
            cut.give_up(JobError::Replica { replica, error });
        }
    }

    /// Merges back what was frozen for nothing. A replica whose session is gone does it at its next Open.
    fn pump_dropping(&mut self) {
        let Some(cut) = self.cut() else { return };
        let snapshot = cut.snapshot;
        if self.has_calls(|kind| matches!(kind, CallKind::Freeze | CallKind::Drop(_))) {
            return;
        }
        let due: Vec<ReplicaId> = cut.asked.iter().copied().filter(|r| self.is_open(*r)).collect();
        if let Some(cut) = self.cut_mut() {
            cut.asked.clear();
            cut.frozen.clear();
        }
        if due.is_empty() {
            return self.set_cut_stage(Stage::Abandoning);
        }
        for replica in due {
            self.send_control(replica, CallKind::Drop(snapshot), Control::DropSnapshot { snapshot });
        }
    }

    /// The record does not allow the cut, or not any more.
    pub(super) fn cut_refused(&mut self, error: TransitionError) {
        let Some(cut) = self.cut_mut() else { return };
        match cut.stage {
            Stage::Begin | Stage::Abandoning => self.finish_job(Err(error.into())),
            _ => {
                cut.give_up(error.into());
                self.dirty = true;
            }
        }
    }

    /// R29: the second half of a group's cut. It counts only inside its hold (`unbroken`).
    pub(super) fn cut_held(&mut self, job: JobId, snapshot: SnapshotId) {
        let strict = self.guards.unbroken;
        let waits = |cut: &&mut Cut| cut.snapshot == snapshot && cut.group.is_some() && cut.job.is_none();
        match self.cut_mut().filter(waits).filter(|cut| cut.stage == Stage::Held) {
            Some(cut) if cut.holds_writes() || !strict => {
                cut.job = Some(job);
                cut.go = true;
                if !cut.holds_writes() {
                    cut.stage = Stage::Holding;
                }
                self.dirty = true;
            }
            // Repeated: done already, or never held here.
            _ => {
                let done = self.volume().and_then(|r| r.snapshot(snapshot)).map(|s| s.state)
                    == Some(SnapshotState::Committed);
                self.end_job(job, if done { Ok(()) } else { Err(JobError::HoldOver) });
            }
        }
    }

    pub(super) fn release_hold(&mut self, job: JobId, snapshot: SnapshotId) {
        let ours = |cut: &&mut Cut| cut.snapshot == snapshot && cut.group.is_some();
        let before = |cut: &&mut Cut| !matches!(cut.stage, Stage::Committing | Stage::Abandoning);
        if let Some(cut) = self.cut_mut().filter(ours).filter(before) {
            cut.give_up(JobError::HoldOver);
            self.dirty = true;
        }
        self.end_job(job, Ok(()));
    }

    pub(super) fn cut_timeout(&self) -> Option<u64> {
        self.cut()?.held_until_ms
    }

    /// The hold is bounded: at its end writes go on, and the cut does not count.
    pub(super) fn tick_cut(&mut self) {
        let now = self.now_ms;
        let strict = self.guards.unbroken;
        let Some(cut) = self.cut_mut().filter(|cut| cut.held_until_ms.is_some_and(|until| until <= now))
        else {
            return;
        };
        if cut.group.is_some() && !strict {
            cut.held_until_ms = None;
        } else {
            cut.give_up(if cut.group.is_some() { JobError::HoldOver } else { JobError::TooSlow });
        }
        self.dirty = true;
    }

    fn set_cut_stage(&mut self, stage: Stage) {
        if let Some(cut) = self.cut_mut() {
            cut.stage = stage;
            self.dirty = true;
        }
    }
}
