//! Carries the core's disk operations out on a replica in the store.

use bytes::Bytes;
use holdfast_storage_core::replica::{DataOp, DiskError, DiskOp};
use holdfast_store::{Replica, StoreError};

use super::verify;

/// Starts a data operation. A read answers with its data.
pub fn submit(
    disk: &Replica,
    op: DataOp,
    data: Bytes,
    done: impl FnOnce(Result<Bytes, DiskError>) + Send + 'static,
) {
    match op {
        DataOp::Read(range) => {
            let len = u32::try_from(range.len_bytes()).expect("a read is at most the NBD server's limit");
            disk.read(range.offset_bytes(), len, Box::new(|result| done(result.map_err(disk_error))));
        }
        DataOp::Write { range, fua } => {
            disk.write(range.offset_bytes(), data, fua, Box::new(|result| done(empty(result))));
        }
        DataOp::Zero { range, fua, trim } => {
            let then: holdfast_store::Done = Box::new(|result| done(empty(result)));
            disk.zero(range.offset_bytes(), range.len_bytes(), trim, fua, then);
        }
        DataOp::Flush => disk.flush(Box::new(|result| done(empty(result)))),
        DataOp::ReadSnapshot { snapshot, range } => {
            let len = u32::try_from(range.len_bytes()).expect("a read is at most the NBD server's limit");
            let then = Box::new(|result: Result<Bytes, StoreError>| done(result.map_err(disk_error)));
            disk.read_snapshot(snapshot, range.offset_bytes(), len, then);
        }
        DataOp::Verify(range) => verify::verify(disk, range, done),
        DataOp::MarkBad(range) => disk.mark_bad(range, Box::new(|result| done(empty(result)))),
        DataOp::Adopt(range) => verify::adopt(disk, range, done),
    }
}

/// Starts an operation on meta, cookie, log, maps or layers; durable when answered. They take effect in the order of the calls.
pub fn submit_meta(disk: &Replica, op: DiskOp, done: impl FnOnce(Result<(), DiskError>) + Send + 'static) {
    let then: holdfast_store::Done = Box::new(|result| done(result.map_err(disk_error)));
    match op {
        DiskOp::PersistMeta(meta) => disk.persist_meta(&meta, then),
        DiskOp::KeepRecord(copy) => disk.keep_record(copy, then),
        DiskOp::SetBootCookie(cookie) => disk.set_boot_cookie(cookie, then),
        DiskOp::RemoveBootCookie => disk.remove_boot_cookie(then),
        DiskOp::LogAdd(regions) => disk.log_add(&regions, then),
        DiskOp::LogRemove(regions) => disk.log_remove(&regions, then),
        DiskOp::MapPut { absent, map } => disk.put_map(absent, map, then),
        DiskOp::MapUpdate { absent, regions } => disk.update_map(absent, regions, then),
        DiskOp::MapDrop { absent } => disk.drop_map(absent, then),
        DiskOp::Freeze { snapshot } => disk.freeze(snapshot, then),
        DiskOp::DropSnapshot { snapshot } => disk.drop_snapshot(snapshot, then),
        DiskOp::Grow { size_bytes } => disk.grow(size_bytes, then),
        DiskOp::Data { .. } => unreachable!("data operations have their own way"),
    }
}

fn empty(result: Result<(), StoreError>) -> Result<Bytes, DiskError> {
    result.map(|()| Bytes::new()).map_err(disk_error)
}

pub(super) fn disk_error(error: StoreError) -> DiskError {
    match error {
        StoreError::NoSpace(_) => DiskError::NoSpace,
        // Nothing of the range was changed and other ranges are fine, which is what the core takes from NoSpace.
        StoreError::Busy(_) => DiskError::NoSpace,
        StoreError::SnapshotExists { .. } => DiskError::SnapshotExists,
        StoreError::TooManyLayers { .. } => DiskError::LayersFull,
        StoreError::NoSnapshot { .. } => DiskError::NoSnapshot,
        StoreError::Checksum { .. } => {
            tracing::warn!(%error, "a read met a block that does not verify");
            DiskError::Corrupt
        }
        StoreError::NotLogged { .. }
        | StoreError::InvalidRange { .. }
        | StoreError::MetaTooLarge { .. }
        | StoreError::NoMap { .. }
        | StoreError::InvalidGrowth { .. }
        | StoreError::File { .. }
        | StoreError::Io { .. }
        | StoreError::Poisoned(_)
        | StoreError::Closed(_) => {
            tracing::error!(%error, "a replica's disk operation failed");
            DiskError::Device
        }
    }
}
