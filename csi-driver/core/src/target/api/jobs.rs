//! Jobs: what is asked of a target beside I/O.

use crate::ids::{ReplicaId, SnapshotId};
use crate::replica::DiskError;
use crate::transitions::TransitionError;

/// Work on the volume other than I/O: one after the other, while clients go on. Every job may be repeated: what is done
/// already is a success. A job that ended in [`JobError::Ended`] may have been done or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// A snapshot of one instant between the call and its answer (R27). Writes wait meanwhile, at most
    /// [`crate::timers::CUT_HOLD_MS`]; none fails.
    CreateSnapshot {
        /// A random id, never used for another instant.
        snapshot: SnapshotId,
    },
    /// Forgets a snapshot; refused while it has clones (R30).
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Makes the volume larger (R31).
    Grow {
        /// The new size, a multiple of the region size.
        size_bytes: u64,
    },
    /// Takes a member out for good: the volume is to have fewer replicas, and every acknowledged write stays on as many
    /// members as wanted. A replica that was given up already is a success, one that is out of sync is refused: that one the
    /// record can give up.
    RemoveReplica {
        /// Which.
        replica: ReplicaId,
    },
    /// Reads the record anew: what was changed in it before the call, its limits and its wanted replicas, is in force after
    /// the answer.
    Reload,
    /// First half of a group's cut (R29): answered once new writes are held and none is in flight. The hold ends with
    /// [`Job::Cut`], [`Job::Release`] or by itself after `hold_ms`.
    Hold {
        /// The snapshot to be cut.
        snapshot: SnapshotId,
        /// At most [`crate::timers::GROUP_HOLD_MAX_MS`].
        hold_ms: u64,
    },
    /// Second half: the snapshot of a hold that is still in force; else [`JobError::HoldOver`], and nothing is left.
    Cut {
        /// The snapshot that was named in the hold.
        snapshot: SnapshotId,
    },
    /// Gives a hold up. No such hold: success.
    Release {
        /// The snapshot that was named in the hold.
        snapshot: SnapshotId,
    },
}

/// Why a job was not done. Nothing of it is left, unless said otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The record does not allow it.
    #[error(transparent)]
    Record(#[from] TransitionError),
    /// A member refused.
    #[error("replica {replica}: {error}")]
    Replica {
        /// Which.
        replica: ReplicaId,
        /// Why.
        error: DiskError,
    },
    /// Not every member froze in the time for which writes may be held.
    #[error("the members did not freeze in time; writes go on, try again")]
    TooSlow,
    /// The group's hold ended before the cut (R29).
    #[error("the hold of the group is over")]
    HoldOver,
    /// Too many jobs wait.
    #[error("too many jobs wait for this volume, try again")]
    Busy,
    /// The target is stopping, stopped, fenced or failed: it may have been done or not. Ask the volume's next target.
    #[error("the target ended before the job did")]
    Ended,
}
