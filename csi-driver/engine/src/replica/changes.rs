//! Which blocks of a replica were written between two of its snapshots (R28).

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::BlockSet;
use holdfast_storage_core::ids::{BLOCK_BYTES, SnapshotId};
use holdfast_store::{Replica, StoreError};

/// Blocks whose tables are read for one step, so that a large volume's do not keep a disk thread from its other work.
const STEP_BLOCKS: u64 = (1 << 30) / BLOCK_BYTES;

/// The blocks written after `from` (ever, if none) and before `to` (until now, if none). What is written meanwhile may be
/// among them or not.
///
/// # Errors
/// The replica lacks one of the snapshots, or its disk fails. Cancelling the call changes nothing.
pub async fn read(
    disk: &Replica,
    from: Option<SnapshotId>,
    to: Option<SnapshotId>,
) -> Result<BlockSet, StoreError> {
    let size_bytes = match to {
        None => disk.size_bytes(),
        Some(snapshot) => disk.snapshot_size_bytes(snapshot).unwrap_or_else(|| disk.size_bytes()),
    };
    let blocks = size_bytes / BLOCK_BYTES;
    let mut changed = BlockSet::new();
    let mut at = 0;
    while at < blocks {
        let step = BlockRange::new(at, STEP_BLOCKS.min(blocks - at));
        for run in holdfast_store::wait(disk, |done| disk.changed_blocks(from, to, step, done)).await? {
            changed.insert(run);
        }
        at = step.end();
    }
    Ok(changed)
}
