//! Space for blocks that have none yet, reserved in chunks before their first write: a full pool then refuses a write
//! before anything changed (R16), and neighbouring blocks lie together in the file. With the first change in a group the
//! space of the group's tables is reserved as well.

use std::ops::Range;
use std::sync::Arc;

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::BLOCK_BYTES;

use super::{DataPath, DataState};
use crate::error::StoreError;
use crate::gather::Gather;
use crate::layout::{data_offset, group_of, group_pieces, table_areas};
use crate::space::Charge;

/// Blocks whose space is reserved together in the only layer: 256 KiB, a quarter of a region. Smaller chunks reserve more
/// often, larger ones waste more when writes are sparse.
const BLOCKS_PER_CHUNK: u64 = 64;
/// The same above a frozen layer, where most blocks will never be written: 16 KiB.
const BLOCKS_PER_LAYERED_CHUNK: u64 = 4;

/// What space is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Data, and entries for it.
    Data,
    /// Entries alone.
    Entries,
}

/// What the top layer has space for, as far as it was reserved since it became the top or was opened.
#[derive(Debug)]
pub struct Backed {
    blocks_per_chunk: u64,
    /// One bit per chunk, 512 KiB for 1 TiB (8 MiB above a frozen layer).
    chunks: Bits,
    /// Groups whose tables have space.
    groups: Bits,
}

impl Backed {
    /// Nothing is known yet.
    pub fn new(layered: bool) -> Self {
        let blocks_per_chunk = if layered { BLOCKS_PER_LAYERED_CHUNK } else { BLOCKS_PER_CHUNK };
        Self { blocks_per_chunk, chunks: Bits::default(), groups: Bits::default() }
    }
}

#[derive(Debug, Default)]
struct Bits {
    words: Vec<u64>,
}

impl Bits {
    fn contains(&self, item: u64) -> bool {
        let word = usize::try_from(item / 64).expect("volumes end below 2^64 chunks");
        self.words.get(word).is_some_and(|bits| bits >> (item % 64) & 1 == 1)
    }

    fn set(&mut self, items: Range<u64>, on: bool) {
        for item in items {
            let word = usize::try_from(item / 64).expect("volumes end below 2^64 chunks");
            if word >= self.words.len() {
                if !on {
                    continue;
                }
                self.words.resize(word + 1, 0);
            }
            let bit = 1 << (item % 64);
            if on {
                self.words[word] |= bit;
            } else {
                self.words[word] &= !bit;
            }
        }
    }
}

/// What must be reserved before blocks can be changed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Lacking {
    /// Blocks without space for their data, in whole chunks.
    blocks: Range<u64>,
    /// Groups without space for their tables.
    groups: Vec<u64>,
}

impl Lacking {
    fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.groups.is_empty()
    }
}

impl DataState {
    fn lacking(&self, range: BlockRange, purpose: Purpose) -> Lacking {
        let per_chunk = self.backed.blocks_per_chunk;
        let top = self.stack.top();
        let lacks = |block: &u64| {
            !top.tables.state(*block).has_space() && !self.backed.chunks.contains(block / per_chunk)
        };
        let mut blocks = range.start.0..range.end();
        let blocks = match purpose {
            Purpose::Entries => 0..0,
            Purpose::Data => match blocks.find(lacks) {
                // A block with space was written, and so its group's tables have space.
                None => return Lacking::default(),
                Some(first) => {
                    let last = blocks.rev().find(lacks).unwrap_or(first);
                    first / per_chunk * per_chunk..((last / per_chunk + 1) * per_chunk).min(top.blocks)
                }
            },
        };
        let groups = group_of(range.start.0)..group_of(range.end() - 1) + 1;
        Lacking { blocks, groups: groups.filter(|group| !self.backed.groups.contains(*group)).collect() }
    }

    fn now_backed(&mut self, had: &Lacking) {
        let per_chunk = self.backed.blocks_per_chunk;
        self.backed.chunks.set(had.blocks.start / per_chunk..had.blocks.end.div_ceil(per_chunk), true);
        for group in &had.groups {
            self.backed.groups.set(*group..*group + 1, true);
        }
    }

    /// The blocks' space was given back.
    pub(super) fn punched(&mut self, start: u64, count: u64) {
        let per_chunk = self.backed.blocks_per_chunk;
        self.backed.chunks.set(start / per_chunk..(start + count).div_ceil(per_chunk), false);
    }
}

impl DataPath {
    /// Goes on once the top has space for a change of these blocks, whose tables are in memory. [`StoreError::NoSpace`]
    /// changed nothing.
    pub(super) fn with_space(
        self: &Arc<Self>,
        range: BlockRange,
        purpose: Purpose,
        then: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        let lacking = self.lock().lacking(range, purpose);
        if lacking.is_empty() {
            then(Ok(()));
            return;
        }
        let data_bytes = (lacking.blocks.end - lacking.blocks.start) * BLOCK_BYTES;
        let mut areas: Vec<(u64, u64)> =
            lacking.groups.iter().flat_map(|group| table_areas(self.size_bytes(), *group)).collect();
        let table_bytes: u64 = areas.iter().map(|(_, len)| len).sum();
        if !lacking.blocks.is_empty() {
            let pieces = group_pieces(lacking.blocks.start, lacking.blocks.end - lacking.blocks.start);
            areas.extend(pieces.map(|(block, blocks)| (data_offset(block), blocks * BLOCK_BYTES)));
        }
        // Giving space back must work in a full pool: entries alone may use the reserve.
        let charge = if purpose == Purpose::Data { Charge::Data } else { Charge::Metadata };
        if !self.pool.charge(data_bytes + table_bytes, charge) {
            then(Err(StoreError::NoSpace(self.replica)));
            return;
        }
        let (file, _) = self.top();
        let path = Arc::clone(self);
        let gather = Gather::new(
            areas.len(),
            Box::new(move |result| match result {
                Ok(()) => {
                    path.lock().now_backed(&lacking);
                    then(Ok(()));
                }
                // A file system without reservation allocates as it writes.
                Err(errno) if errno.0 == nix::libc::EOPNOTSUPP => then(Ok(())),
                Err(errno) => {
                    path.pool.give_back(data_bytes + table_bytes);
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
        for (offset, len) in areas {
            let gather = Arc::clone(&gather);
            file.allocate(offset, len, Box::new(move |result| gather.part_done(result)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_kept_until_taken_back() {
        let mut bits = Bits::default();
        bits.set(3..130, true);
        bits.set(64..65, false);
        bits.set(1000..2000, false);
        let found: Vec<u64> = (0..200).filter(|item| bits.contains(*item)).collect();
        let expected: Vec<u64> = (3..130).filter(|item| *item != 64).collect();
        assert_eq!(found, expected);
    }
}
