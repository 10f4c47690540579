//! After a crash: blocks of logged regions that a write in flight left without a checksum that fits (R32).
//!
//! Data lands before its checksum is kept, so a block that was being overwritten fits neither its old nor its new
//! checksum. Left so, it would be unreadable for ever. What the disk holds is taken for its data, as any disk would; the
//! write was never acknowledged, or the cache was lost with it.
//!
//! Not done: to prefer, for each such block, a member on which it verifies. Damage of another kind in a region that was
//! logged at the crash is taken for such a block too.

use std::collections::BTreeSet;
use std::sync::mpsc;

use holdfast_storage_core::ids::{BLOCK_BYTES, REGION_BYTES, Region};
use holdfast_store::{Replica, StoreError};

/// Gives every block of these regions a checksum that fits; tells how many were changed. Blocks until it is durable.
///
/// # Errors
/// The disk failed.
pub fn recompute(disk: &Replica, log: &BTreeSet<Region>) -> Result<u64, StoreError> {
    let mut recomputed = 0;
    for region in log {
        let offset = u64::from(region.0) * REGION_BYTES;
        let len = u32::try_from(REGION_BYTES.min(disk.size_bytes() - offset)).expect("a region fits 32 bits");
        let read = block_on(disk, |done| disk.read_unchecked(offset, len, done))?;
        for block in read.in_doubt {
            let at = block.0 * BLOCK_BYTES;
            let from = usize::try_from(at - offset).expect("within a region");
            let to = from + usize::try_from(BLOCK_BYTES).expect("a block fits");
            let data = read.data.slice(from..to);
            block_on(disk, |done| disk.write(at, data, false, done))?;
            recomputed += 1;
        }
    }
    if recomputed > 0 {
        block_on(disk, |done| disk.flush(done))?;
    }
    Ok(recomputed)
}

fn block_on<T: Send + 'static>(
    disk: &Replica,
    call: impl FnOnce(holdfast_store::Done<T>),
) -> Result<T, StoreError> {
    let (sender, receiver) = mpsc::channel();
    call(Box::new(move |result| drop(sender.send(result))));
    receiver.recv().unwrap_or(Err(StoreError::Closed(disk.replica_id())))
}
