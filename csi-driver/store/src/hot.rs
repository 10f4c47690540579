//! What benchmarks measure of the parts that run for every block. No interface for anyone else.

use holdfast_io::AlignedBuf;
use holdfast_storage_core::ids::VolumeId;

use crate::layout::{PAGE_BYTES, TablePage};
use crate::sums::Summer;
use crate::tables::{self, Entry};

/// The checksums of the blocks from `start` on.
#[must_use]
pub fn sums(volume: VolumeId, start: u64, data: &[u8]) -> Vec<u32> {
    Summer::new(volume).sums(start, data)
}

/// From now on this process takes every block's checksum for 1, so that the cost of checksums can be measured. Only for a
/// process that opened no replica yet and whose pool is thrown away: to any other one its blocks are corrupt.
pub fn stop_checksums() {
    crate::sums::stop();
}

/// Number of blocks in a page of an allocation map that are not absent.
#[must_use]
pub fn count_allocated(page: &[u8]) -> u64 {
    tables::count_allocated(page)
}

/// A layer's allocation map and checksums, all in memory.
#[derive(Debug)]
pub struct Tables(tables::Tables);

impl Tables {
    /// Of so many absent blocks.
    #[must_use]
    pub fn of_blocks(blocks: u64) -> Self {
        let mut tables = tables::Tables::default();
        for page in TablePage::covering(0, blocks) {
            tables.insert(page, AlignedBuf::zeroed(PAGE_BYTES));
        }
        Self(tables)
    }

    /// Gives a block data with this checksum.
    pub fn set_data(&mut self, block: u64, sum: u32) {
        self.0.set(block, Entry::data(sum));
    }

    /// The block's checksum.
    #[must_use]
    pub fn sum_of(&self, block: u64) -> u32 {
        self.0.entry(block).sum
    }
}
