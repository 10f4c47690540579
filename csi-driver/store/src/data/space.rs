//! Space for blocks that have none yet, reserved in chunks before their first write: a full pool then refuses a write
//! before anything changed (R16), and neighbouring blocks lie together in the file.

use std::ops::Range;
use std::sync::Arc;

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::BLOCK_BYTES;

use super::{DataPath, DataState};
use crate::error::StoreError;
use crate::gather::Gather;
use crate::layout::{data_offset, group_pieces};

/// Blocks whose space is reserved together: 256 KiB, a quarter of a region. Smaller ones reserve more often, larger
/// ones waste more when writes are sparse.
const BLOCKS_PER_CHUNK: u64 = 64;

/// Chunks whose space was reserved since the replica was opened: one bit each, 512 KiB for 1 TiB.
#[derive(Debug, Default)]
pub struct BackedChunks {
    words: Vec<u64>,
}

impl BackedChunks {
    fn contains(&self, chunk: u64) -> bool {
        let word = usize::try_from(chunk / 64).expect("volumes end below 2^64 chunks");
        self.words.get(word).is_some_and(|bits| bits >> (chunk % 64) & 1 == 1)
    }

    fn set(&mut self, chunks: Range<u64>, backed: bool) {
        for chunk in chunks {
            let word = usize::try_from(chunk / 64).expect("volumes end below 2^64 chunks");
            if word >= self.words.len() {
                if !backed {
                    continue;
                }
                self.words.resize(word + 1, 0);
            }
            let bit = 1 << (chunk % 64);
            if backed {
                self.words[word] |= bit;
            } else {
                self.words[word] &= !bit;
            }
        }
    }
}

impl DataState {
    /// The chunks that must be reserved before these blocks can be written, as one run.
    fn unbacked(&self, range: BlockRange) -> Range<u64> {
        let lacks = |block: &u64| {
            !self.tables.entry(*block).state.has_space() && !self.backed.contains(block / BLOCKS_PER_CHUNK)
        };
        let mut blocks = range.start.0..range.end();
        let Some(first) = blocks.find(lacks) else { return 0..0 };
        let last = blocks.rev().find(lacks).unwrap_or(first);
        first / BLOCKS_PER_CHUNK..last / BLOCKS_PER_CHUNK + 1
    }

    /// The blocks' space was given back.
    pub(super) fn punched(&mut self, start: u64, count: u64) {
        self.backed.set(start / BLOCKS_PER_CHUNK..(start + count).div_ceil(BLOCKS_PER_CHUNK), false);
    }
}

impl DataPath {
    /// Goes on once the file has space for the blocks, whose tables are in memory. [`StoreError::NoSpace`] changed
    /// nothing.
    pub(super) fn with_space(
        self: &Arc<Self>,
        range: BlockRange,
        then: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        let chunks = self.lock().unbacked(range);
        if chunks.is_empty() {
            then(Ok(()));
            return;
        }
        let blocks_end = (chunks.end * BLOCKS_PER_CHUNK).min(self.size_bytes / BLOCK_BYTES);
        let (start, count) = (chunks.start * BLOCKS_PER_CHUNK, blocks_end - chunks.start * BLOCKS_PER_CHUNK);
        if !self.pool.charge(count * BLOCK_BYTES) {
            then(Err(StoreError::NoSpace(self.replica)));
            return;
        }
        let pieces: Vec<(u64, u64)> = group_pieces(start, count).collect();
        let path = Arc::clone(self);
        let gather = Gather::new(
            pieces.len(),
            Box::new(move |result| match result {
                Ok(()) => {
                    path.lock().backed.set(chunks, true);
                    then(Ok(()));
                }
                // A file system without reservation allocates as it writes.
                Err(errno) if errno.0 == nix::libc::EOPNOTSUPP => then(Ok(())),
                Err(errno) => {
                    path.pool.give_back(count * BLOCK_BYTES);
                    let full = matches!(errno.0, nix::libc::ENOSPC | nix::libc::EDQUOT);
                    let error = if full {
                        StoreError::NoSpace(path.replica)
                    } else {
                        path.io_error("reserving space", errno)
                    };
                    then(Err(error));
                }
            }),
        );
        for (block, blocks) in pieces {
            let gather = Arc::clone(&gather);
            let done = Box::new(move |result| gather.part_done(result));
            self.file.allocate(data_offset(block), blocks * BLOCK_BYTES, done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_backed_until_punched() {
        let mut backed = BackedChunks::default();
        backed.set(3..130, true);
        backed.set(64..65, false);
        backed.set(1000..2000, false);
        let found: Vec<u64> = (0..200).filter(|chunk| backed.contains(*chunk)).collect();
        let expected: Vec<u64> = (3..130).filter(|chunk| *chunk != 64).collect();
        assert_eq!(found, expected);
    }
}
