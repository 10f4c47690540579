//! What a replica keeps on disk about itself.
//!
//! Three durable things, each changed by disk operations of its own ([`super::DiskOp`]): the meta below (small, written
//! whole), the intent log (a set of regions) and the dirty maps (one per absent replica).

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Generation, Lineage, ReplicaId, TargetId, VolumeId};

/// Version of the meta's shape; a reader refuses a later one.
pub const META_FORMAT: u32 = 1;

/// The durable meta of a replica; replaced whole and atomically by [`super::DiskOp::PersistMeta`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaMeta {
    /// [`META_FORMAT`] at the time of writing.
    pub format: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// This copy of it.
    pub replica_id: ReplicaId,
    /// The volume's history (R26, R35).
    pub lineage: Lineage,
    /// Bytes.
    pub size_bytes: u64,
    /// Highest generation this replica was opened with; lower ones are refused for ever (R2).
    pub generation: Generation,
    /// The target that owns `generation`.
    pub target_id: Option<TargetId>,
    /// The last epoch this replica learned (R10, R35).
    pub epoch: Epoch,
    /// Set when the write cache was lost with regions in the log; ends when they are reconciled, or by a join (R19).
    pub cache_lost: bool,
    /// Compared at start with the copy in tmpfs; another value there, or none, means the cache may be lost (R19).
    pub cookie: u64,
    /// Lease term this replica granted last; a later start waits so long (R3).
    pub lease_ms: u64,
}

impl ReplicaMeta {
    /// The meta of a new, empty replica, as CreateReplica writes it.
    #[must_use]
    pub fn new(
        volume_id: VolumeId,
        replica_id: ReplicaId,
        lineage: Lineage,
        size_bytes: u64,
        epoch: Epoch,
    ) -> Self {
        Self {
            format: META_FORMAT,
            volume_id,
            replica_id,
            lineage,
            size_bytes,
            generation: Generation(0),
            target_id: None,
            epoch,
            cache_lost: false,
            cookie: 0,
            lease_ms: crate::timers::LEASE_MS,
        }
    }
}
