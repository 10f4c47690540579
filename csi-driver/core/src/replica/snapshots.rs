//! Frozen layers and growth (R27, R28, R31).
//!
//! What is promised: a layer that was frozen holds exactly what was answered before, on stable storage, and never
//! changes; and a target sees of this replica's layers only those that the record says it holds. A target that dies
//! half way through a cut leaves a layer of an instant that nobody else has: the next Open merges it back, and an id
//! that is frozen already is never taken for the one asked for (`void`).

use crate::ids::SnapshotId;

use super::{DataOp, DiskError, DiskOp, Replica, ReplicaCall, ReplicaReply, RequestRefusal};

/// What a control request does once its disk operations are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Answer.
    Answer,
    /// What was answered is flushed: freeze.
    Freeze(SnapshotId),
    /// Frozen: answer.
    Frozen(SnapshotId),
    /// Dropped: answer.
    Dropped(SnapshotId),
    /// The files have this size: the meta next.
    Grown(u64),
}

impl Replica {
    pub(super) fn on_freeze(&mut self, call: ReplicaCall, snapshot: SnapshotId) {
        if self.snapshots.contains(&snapshot) {
            // R27: another try froze it, at another instant.
            let result =
                if self.guards.void { Err(RequestRefusal::Disk(DiskError::SnapshotExists)) } else { Ok(()) };
            return self.reply(call, ReplicaReply::Done(result));
        }
        if self.freezing.is_some() {
            return self.refuse(call, RequestRefusal::Invalid);
        }
        self.freezing = self.register_control(call, Step::Freeze(snapshot));
        self.freeze_when_quiet();
    }

    /// Begins the pending Freeze once no write is on its way to the disk, so that none lands on both sides of it.
    pub(super) fn freeze_when_quiet(&mut self) {
        if !self.writing.is_empty() || !self.waiting.is_empty() {
            return;
        }
        let Some(number) = self.freezing.take() else { return };
        let Some(call) = self.controls.get(&number).map(|control| control.call) else { return };
        if self.guards.cutflush {
            // R27: what was answered and not flushed would be lost with the power here, and kept elsewhere.
            self.control_ops(number, vec![DiskOp::Data { call, op: DataOp::Flush }]);
        } else {
            self.next_step(number);
        }
    }

    /// Its session is over before it began.
    pub(super) fn cancel_freeze(&mut self) {
        if let Some(number) = self.freezing.take() {
            self.end_control(number, Err(RequestRefusal::NoSession));
        }
    }

    pub(super) fn on_drop_snapshot(&mut self, call: ReplicaCall, snapshot: SnapshotId) {
        if !self.snapshots.contains(&snapshot) {
            return self.reply(call, ReplicaReply::Done(Ok(())));
        }
        if let Some(number) = self.register_control(call, Step::Dropped(snapshot)) {
            self.control_ops(number, vec![DiskOp::DropSnapshot { snapshot }]);
        }
    }

    pub(super) fn on_grow(&mut self, call: ReplicaCall, size_bytes: u64) {
        if size_bytes <= self.meta.size_bytes {
            return self.reply(call, ReplicaReply::Done(Ok(())));
        }
        if let Some(number) = self.register_control(call, Step::Grown(size_bytes)) {
            self.control_ops(number, vec![DiskOp::Grow { size_bytes }]);
        }
    }

    /// Goes on with a control request; tells whether there was something left to do.
    pub(super) fn next_step(&mut self, number: u64) -> bool {
        let Some(control) = self.controls.get_mut(&number) else { return false };
        let step = std::mem::replace(&mut control.step, Step::Answer);
        match step {
            Step::Answer => false,
            Step::Freeze(snapshot) => {
                control.step = Step::Frozen(snapshot);
                self.control_ops(number, vec![DiskOp::Freeze { snapshot }]);
                true
            }
            Step::Frozen(snapshot) => {
                self.snapshots.push(snapshot);
                false
            }
            Step::Dropped(snapshot) => {
                self.snapshots.retain(|other| *other != snapshot);
                false
            }
            // R31: the files first, so that no block of the size that is told lacks its place. Of two that are under way
            // the smaller may end last.
            Step::Grown(size_bytes) => {
                self.meta.size_bytes = self.meta.size_bytes.max(size_bytes);
                self.control_ops(number, vec![DiskOp::PersistMeta(self.durable_meta())]);
                true
            }
        }
    }

    /// Whether a failed operation of this request changed nothing and harms nobody.
    pub(super) fn changes_layers(&self, number: u64) -> bool {
        let step = self.controls.get(&number).map(|control| control.step);
        matches!(step, Some(Step::Frozen(_) | Step::Dropped(_) | Step::Grown(_)))
    }

    pub(super) fn on_layers_refused(&mut self, number: u64, error: DiskError) {
        self.end_control(number, Err(RequestRefusal::Disk(error)));
    }

    /// R27, R28: every layer that the record does not name is merged back before the target is told of any.
    pub(super) fn drop_uncommitted(&mut self) -> Vec<DiskOp> {
        let Some(committed) = self.opening.as_ref().map(|opening| &opening.request.snapshots) else {
            return Vec::new();
        };
        if !self.guards.void {
            return Vec::new();
        }
        let (kept, dropped): (Vec<_>, Vec<_>) =
            self.snapshots.iter().copied().partition(|snapshot| committed.contains(snapshot));
        self.snapshots = kept;
        dropped.into_iter().map(|snapshot| DiskOp::DropSnapshot { snapshot }).collect()
    }
}
