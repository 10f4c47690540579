//! Checksums of blocks: CRC32C, seeded with volume and block number, so that a block in a wrong place or of another
//! volume does not verify.

use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_storage_core::ids::{BLOCK_BYTES, VolumeId};

/// Set for a process whose replicas exist to be measured only.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// See `hot::stop_checksums`.
pub fn stop() {
    STOPPED.store(true, Ordering::Relaxed);
}

/// The sum of a block that was never written.
pub const ABSENT_SUM: u32 = 0;
/// The sum of a zeroed block.
pub const ZERO_SUM: u32 = u32::MAX;
/// With the state of a zero block: marked bad, unreadable until it is written again. No write in flight at a crash leaves
/// it, but by chance (2^-32).
pub const BAD_SUM: u32 = 0xbad0_b10c;

/// A sum that data with this one does not have, and that no state without data has.
pub fn other_sum(sum: u32) -> u32 {
    let other = sum ^ 1;
    if other == ABSENT_SUM || other == ZERO_SUM { sum ^ 2 } else { other }
}

/// Computes sums for one volume.
#[derive(Debug, Clone, Copy)]
pub struct Summer {
    volume_crc: u32,
    stopped: bool,
}

impl Summer {
    /// For blocks written by `volume`.
    pub fn new(volume: VolumeId) -> Self {
        Self { volume_crc: crc32c::crc32c(&volume.0.to_le_bytes()), stopped: STOPPED.load(Ordering::Relaxed) }
    }

    /// The sum of a block's data. Never [`ABSENT_SUM`] or [`ZERO_SUM`]: state and sum check each other.
    pub fn sum(self, block: u64, data: &[u8]) -> u32 {
        if self.stopped {
            return 1;
        }
        let seed = crc32c::crc32c_append(self.volume_crc, &block.to_le_bytes());
        match crc32c::crc32c_append(seed, data) {
            ABSENT_SUM => 1,
            ZERO_SUM => ZERO_SUM - 1,
            sum => sum,
        }
    }

    /// The sums of the blocks from `start` on.
    pub fn sums(self, start: u64, data: &[u8]) -> Vec<u32> {
        let blocks = data.chunks(BLOCK_BYTES as usize);
        blocks.zip(start..).map(|(block_data, block)| self.sum(block, block_data)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_sum_is_never_the_same_nor_reserved() {
        for sum in [1, 2, 3, u32::MAX - 1, u32::MAX - 2, 77] {
            assert!(![sum, ABSENT_SUM, ZERO_SUM].contains(&other_sum(sum)), "{sum}");
        }
    }

    #[test]
    fn a_sum_names_volume_block_and_every_bit() {
        let summer = Summer::new(VolumeId(1));
        let data = vec![5; 4096];
        let sum = summer.sum(9, &data);
        assert_ne!(sum, summer.sum(10, &data));
        assert_ne!(sum, Summer::new(VolumeId(2)).sum(9, &data));
        let mut flipped = data.clone();
        for bit in [0, 77, 4096 * 8 - 1] {
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(sum, summer.sum(9, &flipped), "bit {bit}");
            flipped[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
