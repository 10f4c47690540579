//! An open replica: the handle that the replica server drives.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{DirtyMap, RegionBits};
use holdfast_storage_core::ids::{Block, Region, ReplicaId, SnapshotId, VolumeId};
use holdfast_storage_core::record_copy::RecordCopy;
use holdfast_storage_core::replica::{ReplicaMeta, ReplicaStart};

use crate::control::{ControlOp, ControlQueue};
use crate::data::{DataPath, Look};
use crate::error::StoreError;

pub use crate::meta_file::META_BYTES_MAX;

/// Most bytes of a range that [`Replica::verify`] takes.
pub const VERIFY_BYTES_MAX: u64 = 32 << 20;

/// Called exactly once, on any thread (also on the caller's, before the call returns); it must not block.
pub type Done<T = ()> = Box<dyn FnOnce(Result<T, StoreError>) + Send>;

/// Calls an operation that takes a callback and waits for its answer.
///
/// ```text
/// wait(&replica, |done| replica.flush(done)).await?;
/// ```
///
/// Dropping the future does not stop the operation.
pub async fn wait<T: Send + 'static>(replica: &Replica, call: impl FnOnce(Done<T>)) -> Result<T, StoreError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    call(Box::new(move |result| {
        let _ = sender.send(result);
    }));
    receiver.await.unwrap_or(Err(StoreError::Closed(replica.replica_id())))
}

/// What the allocation map says of a block (R17).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AllocState {
    /// Never written: reads as the layer below, at the bottom as zeroes.
    Absent,
    /// Reads as zeroes, whatever the layer below holds.
    Zero,
    /// Has data.
    Data,
}

/// A run of blocks in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The blocks.
    pub range: BlockRange,
    /// Their state.
    pub state: AllocState,
}

/// Data of a read that skips verification (R32).
#[derive(Debug, Clone)]
pub struct UncheckedRead {
    /// What the disk holds; zeroes where the allocation map names no data.
    pub data: Bytes,
    /// The blocks that do not match their checksum or allocation state.
    pub bad_blocks: Vec<Block>,
    /// Those of them in the layer that takes the writes: in a logged region they may come from a write that a crash
    /// interrupted (R32). What is frozen was durable first, so a bad block there is damage; and what was marked bad
    /// ([`Replica::mark_bad`]) is never to pass for data.
    pub in_doubt: Vec<Block>,
}

/// An open replica. Cheap to clone; closed by [`Replica::close`] or with the last handle.
///
/// Offsets and lengths are multiples of the block size. Overlapping data requests in flight together have no order.
/// Requests on meta, cookie, log and maps take effect in the order of their calls. Every callback is called exactly
/// once, on any thread.
#[derive(Clone)]
pub struct Replica {
    inner: Arc<Inner>,
}

struct Inner {
    volume: VolumeId,
    start: ReplicaStart,
    data: Arc<DataPath>,
    control: ControlQueue,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.control.push(ControlOp::Close(None));
    }
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replica({})", self.replica_id())
    }
}

impl Replica {
    pub(crate) fn new(start: ReplicaStart, data: Arc<DataPath>, control: ControlQueue) -> Self {
        Self { inner: Arc::new(Inner { volume: start.meta.volume_id, start, data, control }) }
    }

    /// The replica.
    #[must_use]
    pub fn replica_id(&self) -> ReplicaId {
        self.inner.data.replica()
    }

    /// Its volume.
    #[must_use]
    pub fn volume_id(&self) -> VolumeId {
        self.inner.volume
    }

    /// Bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.inner.data.size_bytes()
    }

    /// What was found on disk when the replica was opened, for [`holdfast_storage_core::replica::Replica`].
    #[must_use]
    pub fn start(&self) -> ReplicaStart {
        self.inner.start.clone()
    }

    /// Gives exactly `len` bytes (more than 0), verified; [`StoreError::Checksum`] names the blocks that failed.
    pub fn read(&self, offset: u64, len: u32, done: Done<Bytes>) {
        self.inner.data.read(Look::LIVE, offset, len, done);
    }

    /// Like [`Replica::read`], of a snapshot. It has the size that the volume had when it was frozen.
    pub fn read_snapshot(&self, snapshot: SnapshotId, offset: u64, len: u32, done: Done<Bytes>) {
        self.inner.data.read(Look::at(Some(snapshot)), offset, len, done);
    }

    /// Like [`Replica::read`], but gives the data with the list of blocks that do not verify, for R32's last resort.
    pub fn read_unchecked(&self, offset: u64, len: u32, done: Done<UncheckedRead>) {
        self.inner.data.read_unchecked(Look::LIVE, offset, len, done);
    }

    /// Puts data into the disk's write cache, with `fua` on stable storage. Every region it touches must be in the log
    /// ([`Replica::log_add`]). Data in page-aligned memory ([`holdfast_io::AlignedBuf`]) is not copied.
    pub fn write(&self, offset: u64, data: Bytes, fua: bool, done: Done) {
        self.inner.data.write(offset, data, fua, done);
    }

    /// Makes whole blocks read as zeroes, with `trim` giving their space back (R17). Logged like a write. Blocks that
    /// were absent at the bottom of the stack stay absent.
    pub fn zero(&self, offset: u64, len: u64, trim: bool, fua: bool, done: Done) {
        self.inner.data.zero(offset, len, trim, fua, done);
    }

    /// Makes whole blocks unreadable until they are written or zeroed again (R25). Logged like a write; their old data goes
    /// with them.
    pub fn mark_bad(&self, range: BlockRange, done: Done) {
        self.inner.data.mark_bad(range, done);
    }

    /// Makes every write and zero answered before the call durable, with checksums and allocation map.
    pub fn flush(&self, done: Done) {
        self.inner.data.flush(done);
    }

    /// The allocation states of a range, as runs.
    pub fn allocation(&self, range: BlockRange, done: Done<Vec<Extent>>) {
        self.allocation_at(None, range, done);
    }

    /// The allocation states of a range of a snapshot, or of the volume as it is, as runs.
    pub fn allocation_at(&self, at: Option<SnapshotId>, range: BlockRange, done: Done<Vec<Extent>>) {
        self.inner.data.allocation(at, range, done);
    }

    /// The blocks of a range that were written or zeroed after `from` (since birth if there is none) and before `to` (until
    /// now if there is none): ascending, without gaps between two runs being bridged. They come from the allocation maps;
    /// a block that got the same content again is among them. [`StoreError::NoSnapshot`] if one of the two is not here, or
    /// `from` is younger than `to`.
    pub fn changed_blocks(
        &self,
        from: Option<SnapshotId>,
        to: Option<SnapshotId>,
        range: BlockRange,
        done: Done<Vec<BlockRange>>,
    ) {
        self.inner.data.changed_blocks(from, to, range, done);
    }

    /// Reads what the disk has of a range (at most [`VERIFY_BYTES_MAX`]) and gives the blocks that do not verify, without
    /// their data. Of a snapshot it looks at what was written since the snapshot before; with `None` at what was written
    /// since the last one. All of them together are all that the replica holds (R33).
    pub fn verify(&self, at: Option<SnapshotId>, range: BlockRange, done: Done<Vec<Block>>) {
        self.inner.data.verify(at, range, done);
    }

    /// The blocks of these regions that do not verify and may come from a write that a crash interrupted (R32). The caller
    /// takes them from a member where they verify, or has them recomputed. Requests on log, meta and maps wait meanwhile.
    pub fn unverified(&self, regions: Vec<Region>, done: Done<Vec<Block>>) {
        self.inner.control.push(ControlOp::Unverified(regions, done));
    }

    /// Takes what the disk holds of these blocks for their data, and gives them a checksum that fits: R32's last resort.
    /// Their regions must be in the log. Blocks that verify, and blocks of frozen layers, are left alone; tells how many
    /// were changed. Not durable before the next flush. Requests on log, meta and maps wait meanwhile.
    pub fn recompute(&self, blocks: Vec<Block>, done: Done<u64>) {
        self.inner.control.push(ControlOp::Recompute(blocks, done));
    }

    /// Freezes the volume as it is under this id, durably: everything answered before is in the snapshot, nothing that is
    /// begun after. Costs the same whatever the volume's size. Writes that arrive meanwhile wait; those begun before are
    /// waited for, and may be in it.
    ///
    /// [`StoreError::SnapshotExists`], [`StoreError::TooManyLayers`] and [`StoreError::NoSpace`] changed nothing.
    pub fn freeze(&self, snapshot: SnapshotId, done: Done) {
        self.inner.control.push(ControlOp::Freeze(snapshot, done));
    }

    /// Forgets a snapshot, durably; its layer is merged with the one above in the background, also after a restart. The
    /// volume and all other snapshots read as before. An unknown one is a success.
    pub fn drop_snapshot(&self, snapshot: SnapshotId, done: Done) {
        self.inner.control.push(ControlOp::DropSnapshot(snapshot, done));
    }

    /// The snapshots, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        self.inner.data.snapshots()
    }

    /// Bytes of a snapshot.
    #[must_use]
    pub fn snapshot_size_bytes(&self, snapshot: SnapshotId) -> Option<u64> {
        self.inner.data.size_bytes_at(snapshot)
    }

    /// How fast merges move data, 64 MiB/s unless it is set; 0 lets them rest.
    pub fn set_merge_rate(&self, bytes_per_s: u64) {
        self.inner.control.pace().set_rate(bytes_per_s);
    }

    /// Merges what there is to merge.
    #[cfg(test)]
    pub(crate) fn merge_now(&self, done: Done) {
        self.inner.control.push(ControlOp::Merge(done));
    }

    /// Grows the volume, durably (R31); the new part is absent. The present size is a success, a smaller one
    /// [`StoreError::InvalidGrowth`].
    pub fn grow(&self, size_bytes: u64, done: Done) {
        self.inner.control.push(ControlOp::Grow(size_bytes, done));
    }

    /// Number of blocks that are zero or data (R36).
    pub fn allocated_blocks(&self, done: Done<u64>) {
        self.inner.control.push(ControlOp::CountAllocated(done));
    }

    /// Puts regions into the intent log; durable when answered. Calls that arrive while a log write is under way share
    /// the next one.
    pub fn log_add(&self, regions: &[Region], done: Done) {
        self.inner.control.push(ControlOp::LogAdd(regions.to_vec(), done));
    }

    /// Takes regions out of the intent log, after everything written to them is durable (R18). A region with a write
    /// in flight stays in.
    pub fn log_remove(&self, regions: &[Region], done: Done) {
        self.inner.control.push(ControlOp::LogRemove(regions.to_vec(), done));
    }

    /// Makes a new meta durable; after a crash the old or the new one is found.
    pub fn persist_meta(&self, meta: &ReplicaMeta, done: Done) {
        self.inner.control.push(ControlOp::PersistMeta(Box::new(meta.clone()), done));
    }

    /// Makes a copy of the volume's record durable, unless the one that is kept is as new (ADR 0011).
    pub fn keep_record(&self, copy: RecordCopy, done: Done) {
        self.inner.control.push(ControlOp::KeepRecord(copy, done));
    }

    /// Writes the cookie's copy in tmpfs (R19).
    pub fn set_boot_cookie(&self, cookie: u64, done: Done) {
        self.inner.control.push(ControlOp::SetBootCookie(cookie, done));
    }

    /// Removes the cookie's copy in tmpfs. Idempotent; a failed write or flush does it by itself, before it is
    /// reported (R19).
    pub fn remove_boot_cookie(&self, done: Done) {
        self.inner.control.push(ControlOp::RemoveBootCookie(done));
    }

    /// Makes a dirty map durable, replacing any other for the same absent replica (R21, R24). Where there is no room
    /// for its bits it becomes void on disk, which is always true.
    pub fn put_map(&self, absent: ReplicaId, map: DirtyMap, done: Done) {
        self.inner.control.push(ControlOp::PutMap(absent, map, done));
    }

    /// Sets regions' bits in a map to exactly these; durable when answered (R22). A void map stays void.
    pub fn update_map(&self, absent: ReplicaId, regions: Vec<(Region, RegionBits)>, done: Done) {
        self.inner.control.push(ControlOp::UpdateMap(absent, regions, done));
    }

    /// Forgets a dirty map, durably. Idempotent.
    pub fn drop_map(&self, absent: ReplicaId, done: Done) {
        self.inner.control.push(ControlOp::DropMap(absent, done));
    }

    /// Whether a write or flush failed since the replica was opened.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.inner.data.is_poisoned()
    }

    /// Refuses new requests; answers when those in flight ended and the files are let go (R2, R3). It does not flush.
    pub fn close(&self, done: Done) {
        self.inner.control.push(ControlOp::Close(Some(done)));
    }
}
