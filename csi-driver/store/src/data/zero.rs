//! Zeroes and trims (R17): entries in the tables; a trim also gives the space back.

use std::sync::Arc;

use holdfast_io::Errno;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::BLOCK_BYTES;

use super::{DataPath, InFlight};
use crate::gather::Gather;
use crate::layout::{data_offset, group_pieces};
use crate::replica::Done;
use crate::tables::{Entry, State};

/// A zero request on its way.
struct Zero {
    request: InFlight,
    range: BlockRange,
    trim: bool,
    fua: bool,
    done: Done,
}

impl DataPath {
    /// See [`crate::Replica::zero`].
    pub fn zero(self: &Arc<Self>, offset: u64, len: u64, trim: bool, fua: bool, done: Done) {
        let let_in = self
            .check_range(offset, len)
            .and_then(|range| self.begin(Some(range), true).map(|request| (range, request)));
        let (range, request) = match let_in {
            Ok(let_in) => let_in,
            Err(error) => return done(Err(error)),
        };
        let zero = Zero { request, range, trim, fua, done };
        let path = Arc::clone(self);
        self.with_tables(range, move |tables| match tables {
            Err(error) => zero.request.answer(Err(error), zero.done),
            Ok(()) => path.punch_then_mark(zero),
        });
    }

    fn punch_then_mark(self: &Arc<Self>, zero: Zero) {
        let spaced = if zero.trim { self.blocks_with_space(zero.range) } else { None };
        let Some((start, count)) = spaced else {
            return self.mark_zero(zero);
        };
        let pieces: Vec<(u64, u64)> = group_pieces(start, count).collect();
        let path = Arc::clone(self);
        let gather =
            Gather::new(pieces.len(), Box::new(move |result| path.punch_finished(zero, count, result)));
        for (block, blocks) in pieces {
            let gather = Arc::clone(&gather);
            let done = Box::new(move |result| gather.part_done(result));
            self.file.punch(data_offset(block), blocks * BLOCK_BYTES, done);
        }
    }

    /// The run of blocks from the first to the last one that has space.
    fn blocks_with_space(&self, range: BlockRange) -> Option<(u64, u64)> {
        let state = self.lock();
        let spaced = |block: &u64| state.tables.entry(*block).state.has_space();
        let first = (range.start.0..range.end()).find(spaced)?;
        let last = (first..range.end()).rev().find(spaced)?;
        Some((first, last + 1 - first))
    }

    fn punch_finished(self: &Arc<Self>, mut zero: Zero, count: u64, result: Result<(), Errno>) {
        match result {
            Ok(()) => {
                let range = zero.range;
                self.lock().punched(range.start.0, range.count);
                self.pool.give_back(count * BLOCK_BYTES);
                self.mark_zero(zero);
            }
            // A file system that punches no holes keeps the space.
            Err(errno) if errno.0 == nix::libc::EOPNOTSUPP => {
                zero.trim = false;
                self.mark_zero(zero);
            }
            Err(errno) => {
                let error = self.write_failed("giving space back", errno);
                zero.request.answer(Err(error), zero.done);
            }
        }
    }

    fn mark_zero(self: &Arc<Self>, zero: Zero) {
        let blocks = zero.range.start.0..zero.range.end();
        let entries: Vec<(u64, Entry)> = {
            let state = self.lock();
            blocks
                .filter_map(|block| match state.tables.entry(block).state {
                    // Nothing lies below: absent reads as zeroes already.
                    State::Absent => None,
                    State::Zero => Some((block, Entry::zero(false))),
                    State::Data | State::ZeroKept => Some((block, Entry::zero(!zero.trim))),
                })
                .collect()
        };
        self.change_entries(entries.into_iter());
        drop(zero.request);
        if zero.fua { self.flush(zero.done) } else { (zero.done)(Ok(())) }
    }
}
