//! What a pool holds, for a person who is about to leave it behind, or has nothing else left. Changes nothing.

use std::path::Path;
use std::time::Duration;

use holdfast_io::{Ring, RingOptions};
use holdfast_storage_core::ids::ReplicaId;
use holdfast_storage_core::replica::ReplicaMeta;

use crate::disk::Disk;
use crate::error::PoolError;
use crate::meta_file::MetaFile;
use crate::pool::{KeptRecord, LOCK, REPLICAS, SUPERBLOCK, kept_record, take_lock};

/// A replica in a pool, with its meta or why that cannot be read.
pub type Surveyed = (ReplicaId, Result<ReplicaMeta, PoolError>);

/// The replicas in the pool in `dir`, in order; none where there is no pool. Blocks.
///
/// # Errors
/// [`PoolError::Locked`]: a data process uses it. Else it cannot be read.
pub fn survey(dir: &Path) -> Result<Vec<Surveyed>, PoolError> {
    look(dir, |disk, id, dir| (id, MetaFile::open(disk, dir).map(|(_, meta)| meta)))
}

/// The same with what each replica knows of its volume (ADR 0011).
///
/// # Errors
/// As for [`survey`].
pub fn survey_records(dir: &Path) -> Result<Vec<KeptRecord>, PoolError> {
    look(dir, kept_record)
}

fn look<T>(dir: &Path, of: impl Fn(&Disk, ReplicaId, &Path) -> T) -> Result<Vec<T>, PoolError> {
    let superblock = dir.join(SUPERBLOCK);
    if !superblock.try_exists().map_err(PoolError::io("examining", &superblock))? {
        return Ok(Vec::new());
    }
    let ring = Ring::start(RingOptions::default()).map_err(PoolError::io("starting io_uring for", dir))?;
    let disk = Disk::Real(ring);
    // A pool that was opened once has the file; it stays whether it is locked or not.
    let _lock = match dir.join(LOCK).exists() {
        true => Some(take_lock(&disk, dir, Duration::ZERO)?),
        false => None,
    };
    let replicas = dir.join(REPLICAS);
    let mut names = disk.list(&replicas).map_err(PoolError::io("listing", &replicas))?;
    names.sort_unstable();
    let ids = names.iter().filter_map(|name| name.parse().ok());
    Ok(ids.map(|id: ReplicaId| of(&disk, id, &replicas.join(id.to_string()))).collect())
}
