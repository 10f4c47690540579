//! Verification in place: scrub (R33), and the blocks that a crash left in doubt (R32).

use std::sync::Arc;

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{Block, Region, SnapshotId};

use super::DataPath;
use super::stack::{DownTo, Look};
use crate::error::StoreError;
use crate::replica::{Done, UncheckedRead, VERIFY_BYTES_MAX};

impl DataPath {
    /// See [`crate::Replica::verify`].
    pub fn verify(self: &Arc<Self>, at: Option<SnapshotId>, range: BlockRange, done: Done<Vec<Block>>) {
        let (offset, len) = (range.offset_bytes(), range.len_bytes());
        let Some(len) = u32::try_from(len).ok().filter(|len| u64::from(*len) <= VERIFY_BYTES_MAX) else {
            return done(Err(StoreError::InvalidRange { replica: self.replica, offset, len }));
        };
        let look = Look { at, down_to: DownTo::Own };
        let answer = Box::new(move |read: Result<UncheckedRead, StoreError>| {
            done(read.map(|read| read.bad_blocks));
        });
        self.read_unchecked(look, offset, len, answer);
    }

    /// See [`crate::Replica::unverified`]. Blocks.
    pub fn unverified(self: &Arc<Self>, regions: &[Region]) -> Result<Vec<Block>, StoreError> {
        let mut in_doubt = Vec::new();
        for region in regions {
            in_doubt.extend(self.read_now(BlockRange::of_region(*region))?.in_doubt);
        }
        Ok(in_doubt)
    }

    /// See [`crate::Replica::recompute`]. Blocks.
    pub fn recompute(self: &Arc<Self>, blocks: &[Block]) -> Result<u64, StoreError> {
        let mut changed = 0;
        for Block(block) in blocks {
            let range = BlockRange::new(*block, 1);
            let read = self.read_now(range)?;
            if !read.in_doubt.is_empty() {
                wait_for(self, |done| self.write(range.offset_bytes(), read.data, false, done))?;
                changed += 1;
            }
        }
        Ok(changed)
    }

    fn read_now(self: &Arc<Self>, range: BlockRange) -> Result<UncheckedRead, StoreError> {
        let len = u32::try_from(range.len_bytes()).expect("a region at most");
        wait_for(self, |done| self.read_unchecked(Look::LIVE, range.offset_bytes(), len, done))
    }
}

/// Waits, blocking, for the answer to a request. Not for the ring's thread.
fn wait_for<T: Send + 'static>(path: &DataPath, call: impl FnOnce(Done<T>)) -> Result<T, StoreError> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    call(Box::new(move |result| {
        let _ = sender.send(result);
    }));
    receiver.recv().unwrap_or(Err(StoreError::Closed(path.replica)))
}
