//! Growing the volume (R31): every member first, then the record, then the front end. A block of the new size is never
//! written before every member, and who catches up, has a place for it in layers, log and maps.

use std::collections::BTreeSet;

use crate::ids::{ReplicaId, TargetId};
use crate::record::VolumeRecord;
use crate::transitions::{self, TransitionError};

use super::calls::{Call, CallKind};
use super::jobs::Current;

use super::{Control, JobId, Target, TargetAction};

#[derive(Debug)]
pub(super) struct Grow {
    pub job: JobId,
    size_bytes: u64,
    /// Replicas that were asked in the session they have.
    asked: BTreeSet<ReplicaId>,
    /// Replicas that answered; that is durable, so it outlives their session.
    grown: BTreeSet<ReplicaId>,
}

impl Grow {
    pub(super) fn new(job: JobId, size_bytes: u64) -> Self {
        Self { job, size_bytes, asked: BTreeSet::new(), grown: BTreeSet::new() }
    }

    pub(super) fn swap(
        &self,
        record: &VolumeRecord,
        owner: TargetId,
        members: &[ReplicaId],
    ) -> Option<Result<VolumeRecord, TransitionError>> {
        if let Err(error) = transitions::check_growth(record, self.size_bytes) {
            return Some(Err(error));
        }
        let all = members.iter().chain(&self.asked).all(|replica| self.grown.contains(replica));
        (record.size_bytes < self.size_bytes && all)
            .then(|| transitions::grow(record, owner, self.size_bytes))
    }

    pub(super) fn session_lost(&mut self, replica: ReplicaId) {
        self.asked.remove(&replica);
    }
}

impl Target {
    pub(super) fn pump_grow(&mut self) {
        let Some(Current::Grow(grow)) = &self.jobs.current else { return };
        let (size_bytes, asked) = (grow.size_bytes, &grow.asked);
        let Some(record) = self.volume() else { return };
        if record.size_bytes == size_bytes {
            if !self.copies_kept() {
                // Nothing is written beyond what a copy of the record says.
                return;
            }
            let small = self.catching_up().is_some_and(|r| self.is_open(r) && !grow.grown.contains(&r));
            if small {
                // It began to return while the record was being swapped; it comes back and is grown first.
                self.abort_catch_up();
            }
            self.emit(TargetAction::Grown { size_bytes });
            return self.finish_job(Ok(()));
        }
        if transitions::check_growth(record, size_bytes).is_err() {
            return;
        }
        let next = |r: &ReplicaId| self.is_open(*r) && !asked.contains(r) && !self.is_growing(*r);
        let due: Vec<ReplicaId> = self.peers.keys().copied().filter(next).collect();
        for replica in due {
            if let Some(Current::Grow(grow)) = &mut self.jobs.current {
                grow.asked.insert(replica);
            }
            self.send_control(replica, CallKind::Grow(size_bytes), Control::Grow { size_bytes });
        }
    }

    /// A returning replica that is smaller than the volume grows before it gets anything; tells whether it has to.
    pub(super) fn grow_first(&mut self, replica: ReplicaId) -> bool {
        let has_bytes = self.peers.get(&replica).map_or(0, |peer| peer.size_bytes);
        let Some(size_bytes) = self.size_bytes().filter(|size| has_bytes < *size) else { return false };
        if !self.is_growing(replica) {
            self.send_control(replica, CallKind::Grow(size_bytes), Control::Grow { size_bytes });
        }
        true
    }

    /// One step at a time: a second one could overtake the first, which would then ask for less than there is.
    fn is_growing(&self, replica: ReplicaId) -> bool {
        let grows = |call: &Call| call.replica == replica && matches!(call.kind, CallKind::Grow(_));
        self.calls.values().any(grows)
    }

    pub(super) fn replica_grown(&mut self, replica: ReplicaId, size_bytes: u64) {
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.size_bytes = peer.size_bytes.max(size_bytes);
        }
        if let Some(Current::Grow(grow)) = &mut self.jobs.current
            && grow.size_bytes == size_bytes
        {
            grow.grown.insert(replica);
        }
    }
}
