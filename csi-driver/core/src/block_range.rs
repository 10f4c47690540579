//! A run of blocks.

use crate::ids::{BLOCK_BYTES, BLOCKS_PER_REGION, Block, Region};

/// `count` blocks from `start`; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    /// First block.
    pub start: Block,
    /// Number of blocks, at least one.
    pub count: u64,
}

impl BlockRange {
    /// `count` blocks from block `start`.
    #[must_use]
    pub fn new(start: u64, count: u64) -> Self {
        debug_assert!(count > 0, "a range has at least one block");
        Self { start: Block(start), count }
    }

    /// The blocks that hold `len` bytes from `offset`; `len` must not be 0.
    #[must_use]
    pub fn covering(offset: u64, len: u64) -> Self {
        let start = offset / BLOCK_BYTES;
        let end = (offset + len).div_ceil(BLOCK_BYTES);
        Self::new(start, end - start)
    }

    /// All blocks of a region.
    #[must_use]
    pub fn of_region(region: Region) -> Self {
        Self::new(u64::from(region.0) * BLOCKS_PER_REGION, BLOCKS_PER_REGION)
    }

    /// The block after the last.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start.0 + self.count
    }

    /// First byte.
    #[must_use]
    pub fn offset_bytes(self) -> u64 {
        self.start.0 * BLOCK_BYTES
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(self) -> u64 {
        self.count * BLOCK_BYTES
    }

    /// Whether the two share a block.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end() && other.start.0 < self.end()
    }

    /// The regions the range touches.
    pub fn regions(self) -> impl Iterator<Item = Region> + Clone {
        let first = self.start.region().0;
        let last = Block(self.end() - 1).region().0;
        (first..=last).map(Region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_takes_every_block_that_holds_one_of_the_bytes() {
        assert_eq!(BlockRange::covering(0, 1), BlockRange::new(0, 1));
        assert_eq!(BlockRange::covering(4095, 2), BlockRange::new(0, 2));
        assert_eq!(BlockRange::covering(4096, 4096), BlockRange::new(1, 1));
    }

    #[test]
    fn regions_include_the_one_of_the_last_block_only_if_touched() {
        let touched = |start, count| BlockRange::new(start, count).regions().map(|r| r.0).collect::<Vec<_>>();
        assert_eq!(touched(0, 256), [0]);
        assert_eq!(touched(255, 2), [0, 1]);
    }
}
