//! Which blocks of a snapshot hold data, and in which it differs from an older one: for backup tools.
//!
//! The layers' allocation maps name every block that was written or zeroed between the two. A block that got the same content
//! again is among them, so each of these is read from both snapshots and compared: the answer is the real difference.

use bytes::Bytes;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, SnapshotId};
use holdfast_store::{AllocState, Replica, StoreError, wait};

/// Longest range of one call: 64 MiB, of which at most all is read twice.
const BLOCKS_MAX: u64 = 16 * 1024;
/// Blocks read at once: 1 MiB.
const READ_BLOCKS: u64 = 256;

/// A range that one call may ask for.
#[must_use]
pub fn range(start_block: u64, blocks: u64) -> Option<BlockRange> {
    let fits = (1..=BLOCKS_MAX).contains(&blocks) && start_block.checked_add(blocks).is_some();
    fits.then(|| BlockRange::new(start_block, blocks))
}

/// The blocks of a range that hold data in a snapshot; all others read as zero. Cancellation safe.
///
/// # Errors
/// [`StoreError::NoSnapshot`]; or the tables cannot be read.
pub async fn with_data(
    disk: &Replica,
    snapshot: SnapshotId,
    range: BlockRange,
) -> Result<Vec<BlockRange>, StoreError> {
    let Some(range) = clip(range, blocks_of(disk, snapshot)?) else { return Ok(Vec::new()) };
    let extents = wait(disk, |done| disk.allocation_at(Some(snapshot), range, done)).await?;
    let mut runs = Vec::new();
    for extent in extents.iter().filter(|extent| extent.state == AllocState::Data) {
        push(&mut runs, extent.range);
    }
    Ok(runs)
}

/// The blocks of a range whose content differs between `base` and the younger `snapshot`; beyond the end of a smaller base it
/// counts as zero. Cancellation safe.
///
/// # Errors
/// [`StoreError::NoSnapshot`] also where `base` is the younger one; or a block cannot be read, or does not verify.
pub async fn differing(
    disk: &Replica,
    base: SnapshotId,
    snapshot: SnapshotId,
    range: BlockRange,
) -> Result<Vec<BlockRange>, StoreError> {
    let base_blocks = blocks_of(disk, base)?;
    let Some(range) = clip(range, blocks_of(disk, snapshot)?) else { return Ok(Vec::new()) };
    let written = wait(disk, |done| disk.changed_blocks(Some(base), Some(snapshot), range, done)).await?;
    let mut runs = Vec::new();
    for run in written {
        let mut start = run.start.0;
        while start < run.end() {
            let part = BlockRange::new(start, READ_BLOCKS.min(run.end() - start));
            let now = read(disk, snapshot, part).await?;
            let before = match clip(part, base_blocks) {
                Some(there) => read(disk, base, there).await?,
                None => Bytes::new(),
            };
            for (index, content) in (part.start.0..).zip(now.chunks(BLOCK_BYTES as usize)) {
                let at = ((index - part.start.0) * BLOCK_BYTES) as usize;
                let old = before.get(at..at + content.len());
                if old.map_or_else(|| content.iter().any(|byte| *byte != 0), |old| old != content) {
                    push(&mut runs, BlockRange::new(index, 1));
                }
            }
            start = part.end();
        }
    }
    Ok(runs)
}

async fn read(disk: &Replica, snapshot: SnapshotId, part: BlockRange) -> Result<Bytes, StoreError> {
    let len = u32::try_from(part.len_bytes()).unwrap_or(u32::MAX);
    wait(disk, |done| disk.read_snapshot(snapshot, part.offset_bytes(), len, done)).await
}

fn blocks_of(disk: &Replica, snapshot: SnapshotId) -> Result<u64, StoreError> {
    let bytes = disk
        .snapshot_size_bytes(snapshot)
        .ok_or_else(|| StoreError::NoSnapshot { replica: disk.replica_id(), snapshot })?;
    Ok(bytes / BLOCK_BYTES)
}

/// The part of a range before the end.
fn clip(range: BlockRange, end: u64) -> Option<BlockRange> {
    let count = range.end().min(end).checked_sub(range.start.0)?;
    (count > 0).then(|| BlockRange::new(range.start.0, count))
}

/// Adds a run; one that touches the last becomes part of it.
fn push(runs: &mut Vec<BlockRange>, run: BlockRange) {
    match runs.last_mut() {
        Some(last) if last.end() == run.start.0 => last.count += run.count,
        _ => runs.push(run),
    }
}
