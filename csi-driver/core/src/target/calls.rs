//! Control calls to the replicas: what is under way, and what an answer is for.

use crate::ids::{RecordVersion, ReplicaId, SnapshotId};
use crate::replica::DiskError;

use super::peers::Peer;
use super::{CallId, Control, Target, TargetAction};

/// A control call in flight.
#[derive(Debug)]
pub(super) struct Call {
    pub replica: ReplicaId,
    pub kind: CallKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallKind {
    /// SetEpoch of this epoch number, by this version of the record.
    Tell(u64, RecordVersion),
    /// KeepRecord of this version.
    Keep(RecordVersion),
    /// ClearLog or ClearMap of the round under way.
    Clear,
    /// ReadMap of the returning replica.
    ReadMap,
    FillMap,
    Extents,
    /// Of a task that waits for it.
    Task(u64),
    /// ReadChanges, for a returning replica.
    Changes,
    /// ClearLog of a replica that rebuilds a layer.
    ClearLayerLog,
    /// ReadMap of one that stays absent, for a join.
    ReadOtherMap(ReplicaId),
    Merge,
    Freeze,
    Drop(SnapshotId),
    /// To this size.
    Grow(u64),
    Release,
}

impl CallKind {
    /// Whether a job waits for its answer.
    pub(super) fn is_job(self) -> bool {
        match self {
            Self::Freeze | Self::Drop(_) | Self::Grow(_) => true,
            Self::Tell(..)
            | Self::Keep(_)
            | Self::Clear
            | Self::ClearLayerLog
            | Self::ReadMap
            | Self::FillMap
            | Self::Extents
            | Self::Task(_)
            | Self::Changes
            | Self::ReadOtherMap(_)
            | Self::Merge
            | Self::Release => false,
        }
    }
}

impl Target {
    pub(super) fn send_control(&mut self, replica: ReplicaId, kind: CallKind, op: Control) {
        let id = self.new_id();
        let now = self.now_ms;
        let Some(session) = self.peers.get_mut(&replica).and_then(Peer::session_mut) else { return };
        session.pending.insert(id, now);
        let session = session.id;
        let call = CallId(id);
        self.calls.insert(call, Call { replica, kind });
        self.emit(TargetAction::Control { call, session, replica, op });
    }

    /// Takes an answered call off the books.
    pub(super) fn take_call(&mut self, call: CallId) -> Option<Call> {
        let entry = self.calls.remove(&call)?;
        if let Some(session) = self.peers.get_mut(&entry.replica).and_then(Peer::session_mut) {
            session.pending.remove(&call.0);
        }
        self.dirty = true;
        Some(entry)
    }

    /// A replica refused a request and goes on as before.
    pub(super) fn on_control_refused(&mut self, call: CallId, error: DiskError) {
        let Some(Call { replica, kind }) = self.take_call(call) else { return };
        if self.is_member(replica) || self.catching_up() != Some(replica) {
            return self.job_call_refused(replica, error);
        }
        // It cannot become what the members are, for now; it is tried again later.
        match kind {
            CallKind::Freeze | CallKind::Drop(_) | CallKind::Grow(_) | CallKind::Task(_) => {
                self.expel(replica)
            }
            CallKind::Tell(..)
            | CallKind::Keep(_)
            | CallKind::Clear
            | CallKind::ClearLayerLog
            | CallKind::ReadMap
            | CallKind::FillMap
            | CallKind::Extents
            | CallKind::Changes
            | CallKind::ReadOtherMap(_)
            | CallKind::Merge
            | CallKind::Release => {}
        }
    }

    /// A replica that left the set clears nothing any more.
    pub(super) fn drop_clear_calls(&mut self, replica: ReplicaId) {
        let of_it = |call: &Call| call.replica == replica && call.kind == CallKind::Clear;
        let calls: Vec<CallId> = self.calls.iter().filter(|(_, c)| of_it(c)).map(|(id, _)| *id).collect();
        for call in calls {
            self.take_call(call);
            self.clear_answered(call);
        }
    }

    pub(super) fn on_control_done(&mut self, call: CallId) {
        let Some(Call { replica, kind }) = self.take_call(call) else { return };
        match kind {
            CallKind::Keep(version) => self.record_kept(replica, version),
            CallKind::Tell(number, version) => {
                self.record_kept(replica, version);
                if self.volume().is_some_and(|record| record.epoch.number == number) {
                    self.told.insert(replica);
                }
            }
            CallKind::Clear => self.clear_answered(call),
            CallKind::Merge => self.maps_merged(replica),
            CallKind::Task(task) => self.task_call_done(task, replica),
            CallKind::Freeze if self.is_member(replica) => self.frozen(replica),
            CallKind::Freeze => self.layer_frozen(replica),
            CallKind::Drop(snapshot) => self.snapshot_dropped(replica, snapshot),
            CallKind::Grow(size_bytes) => self.replica_grown(replica, size_bytes),
            CallKind::ClearLayerLog => self.layer_log_cleared(replica),
            CallKind::Release
            | CallKind::ReadMap
            | CallKind::FillMap
            | CallKind::Extents
            | CallKind::Changes
            | CallKind::ReadOtherMap(_) => {}
        }
    }
}
