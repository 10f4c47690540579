//! A pool: the directory a node gives to Holdfast, and the replicas in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_storage_core::ids::ReplicaId;
use holdfast_storage_core::replica::ReplicaMeta;

use crate::error::PoolError;
use crate::replica::Replica;

/// Settings of a pool.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Bytes that replicas may fill, metadata included. The file system's own free space limits as well.
    pub capacity_bytes: u64,
    /// Bytes of the file system that are left alone, so that a full pool can still write its metadata.
    pub reserve_bytes: u64,
    /// Folder for the continuity cookies (R19), checked to be tmpfs. Without one every start counts as a lost cache.
    pub cookie_dir: Option<PathBuf>,
    /// How long opening waits for the I/O of a killed predecessor before it says [`PoolError::Locked`] (R3).
    pub lock_wait: Duration,
}

/// Room in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// [`PoolOptions::capacity_bytes`].
    pub capacity_bytes: u64,
    /// Bytes that replicas fill, metadata included.
    pub used_bytes: u64,
    /// Bytes that may still be filled: what capacity and file system both have left.
    pub available_bytes: u64,
}

/// An open pool. Cheap to clone; the lock is held until the last clone and the last replica are gone.
#[derive(Debug, Clone)]
pub struct Pool {}

impl Pool {
    /// Opens the pool in `dir`, making it if the folder is empty or absent, and removes what an interrupted create or
    /// delete left.
    pub fn open(dir: &Path, options: PoolOptions) -> Result<Self, PoolError> {
        let _ = options;
        Err(PoolError::Locked(dir.to_owned()))
    }

    /// Makes an empty replica with this meta, durably. Idempotent: one of the same volume and size is a success and
    /// keeps its own meta.
    pub fn create_replica(&self, meta: &ReplicaMeta) -> Result<(), PoolError> {
        Err(PoolError::NotFound(meta.replica_id))
    }

    /// Opens a replica, checks its format, and reads what [`Replica::start`] gives.
    pub fn open_replica(&self, replica_id: ReplicaId) -> Result<Replica, PoolError> {
        Err(PoolError::NotFound(replica_id))
    }

    /// Removes a replica, durably. Idempotent: an absent one is a success. One that is open must be closed first.
    pub fn delete_replica(&self, replica_id: ReplicaId) -> Result<(), PoolError> {
        Err(PoolError::NotFound(replica_id))
    }

    /// The replicas in the pool, in order.
    pub fn list(&self) -> Result<Vec<ReplicaId>, PoolError> {
        Ok(Vec::new())
    }

    /// Room in the pool.
    pub fn space(&self) -> Result<Space, PoolError> {
        Ok(Space { capacity_bytes: 0, used_bytes: 0, available_bytes: 0 })
    }
}
