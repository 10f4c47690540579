//! Taking a member out for good, because the volume is to have fewer replicas.
//!
//! It is the swap that a failing member leaves by, of a member that is well: acknowledgements wait until the swap is
//! answered (R8) and until the others have the epoch (R10); what was in flight to the replica counts for nothing any more.
//!
//! *Promised:* no acknowledged write is lost. Every member has it, and the swap is proposed only while all of them are open
//! and kept their caches (R9): the replica that goes may be the only one that still has unflushed writes, which nobody knows
//! of the others before they are open again. As many members as wanted stay ([`transitions::remove_member`]). The replica is
//! given up by the same swap, so no target opens it again.
//!
//! *Who may break in:* this target dies, or is cut off, before, in or after the swap: its next one finds the replica a member
//! or given up, and nothing between. A member fails first: it leaves before (then too few would stay, and the job is
//! refused) or after. A twin's job finds it done. A later generation: the swap is refused.

use crate::ids::ReplicaId;
use crate::record::{ReplicaState, VolumeRecord};
use crate::transitions::{self, TransitionError};

use super::jobs::Current;
use super::{JobId, Target};

#[derive(Debug)]
pub(super) struct Remove {
    pub job: JobId,
    replica: ReplicaId,
}

impl Remove {
    pub(super) fn new(job: JobId, replica: ReplicaId) -> Self {
        Self { job, replica }
    }
}

impl Target {
    pub(super) fn pump_remove(&mut self) {
        let Some(Current::Remove(remove)) = &self.jobs.current else { return };
        let replica = remove.replica;
        let Some(record) = self.volume() else { return };
        match record.replicas.get(&replica).map(|entry| entry.state) {
            Some(ReplicaState::InSync) => {}
            Some(ReplicaState::Offline { .. }) => {
                let volume = record.volume_id;
                let error = TransitionError::ReplicaState { volume, replica, expected: "in sync" };
                self.finish_job(Err(error.into()));
            }
            // Its data may be deleted then: a copy of the record that still names it a member would wait for it for ever.
            Some(ReplicaState::Faulted) | None if !self.copies_kept() => {}
            Some(ReplicaState::Faulted) | None => self.finish_job(Ok(())),
        }
    }

    /// The member that may be taken out now.
    pub(super) fn removal_due(&self) -> Option<ReplicaId> {
        let Some(Current::Remove(remove)) = &self.jobs.current else { return None };
        let members = self.members();
        let all_good = members.iter().all(|replica| self.is_good(*replica));
        // R9, also for the next target: it would find nobody who kept his cache, and fail under the same attachment (R12).
        let is_sound = |r: &ReplicaId| self.peers.get(r).is_some_and(|peer| !peer.loss_accepted);
        let mut others = members.iter().filter(|replica| **replica != remove.replica).peekable();
        // Without others the record refuses.
        let one_stays = others.peek().is_none() || others.any(is_sound);
        let safe = all_good && one_stays;
        (members.contains(&remove.replica) && (safe || !self.guards.removegood)).then_some(remove.replica)
    }

    /// The record without the member, unless it does not allow that.
    pub(super) fn removed(&mut self, replica: ReplicaId) -> Option<Result<VolumeRecord, TransitionError>> {
        let nonce = self.next_random();
        let record = self.volume()?;
        Some(transitions::remove_member(record, self.config.target_id, replica, nonce))
    }
}
