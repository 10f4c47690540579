//! Zeroes and trims (R17): entries in the tables; a trim also gives the space back.
//!
//! A block that only a frozen layer has is shadowed by an entry in the top layer. One that no layer has stays absent.

use std::sync::Arc;

use holdfast_io::Errno;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::BLOCK_BYTES;

use super::space::Purpose;
use super::stack::{Look, Need, View};
use super::{DataPath, InFlight, Refusal};
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
    /// The blocks are marked bad instead (R25).
    bad: bool,
    done: Done,
}

impl DataPath {
    /// See [`crate::Replica::zero`].
    pub fn zero(self: &Arc<Self>, offset: u64, len: u64, trim: bool, fua: bool, done: Done) {
        self.start_zero(offset, len, (trim, fua, false), done);
    }

    /// See [`crate::Replica::mark_bad`].
    pub fn mark_bad(self: &Arc<Self>, range: BlockRange, done: Done) {
        self.start_zero(range.offset_bytes(), range.len_bytes(), (false, false, true), done);
    }

    fn start_zero(self: &Arc<Self>, offset: u64, len: u64, (trim, fua, bad): (bool, bool, bool), done: Done) {
        let range = match self.check_range(offset, len) {
            Ok(range) => range,
            Err(error) => return done(Err(error)),
        };
        let request = match self.begin_change(range) {
            Ok(request) => request,
            Err(Refusal::Error(error)) => return done(Err(error)),
            Err(Refusal::Gate) => {
                let path = Arc::clone(self);
                return self
                    .when_open(Box::new(move || path.start_zero(offset, len, (trim, fua, bad), done)));
            }
        };
        let zero = Zero { request, range, trim, fua, bad, done };
        let path = Arc::clone(self);
        self.resolve(Look::LIVE, range, Need::Entries, move |view| match view {
            Err(error) => zero.request.answer(Err(error), zero.done),
            Ok(view) => path.with_shadowing_entries(zero, view),
        });
    }

    /// The top's tables are in memory; new entries in a part of it that had none need space for its tables.
    fn with_shadowing_entries(self: &Arc<Self>, zero: Zero, view: View) {
        let shadows = {
            let state = self.lock();
            let top = state.stack.top().number;
            view.found.iter().any(|found| zero.bad || (found.layer != top && !reads_as_zero(found.entry)))
        };
        if !shadows {
            return self.punch_then_mark(zero, view);
        }
        let path = Arc::clone(self);
        self.with_space(zero.range, Purpose::Entries, move |space| match space {
            Err(error) => zero.request.answer(Err(error), zero.done),
            Ok(()) => path.punch_then_mark(zero, view),
        });
    }

    fn punch_then_mark(self: &Arc<Self>, zero: Zero, view: View) {
        let spaced = if zero.trim { self.blocks_with_space(zero.range) } else { None };
        let Some((start, count)) = spaced else {
            return self.mark_zero(zero, &view);
        };
        let pieces: Vec<(u64, u64)> = group_pieces(start, count).collect();
        let (file, _) = self.top();
        let path = Arc::clone(self);
        let gather = Gather::new(
            pieces.len(),
            Box::new(move |result| path.punch_finished(zero, &view, count, result)),
        );
        for (block, blocks) in pieces {
            let gather = Arc::clone(&gather);
            let done = Box::new(move |result| gather.part_done(result));
            file.punch(data_offset(block), blocks * BLOCK_BYTES, done);
        }
    }

    /// The run of blocks from the first to the last one that has space in the top.
    fn blocks_with_space(&self, range: BlockRange) -> Option<(u64, u64)> {
        let state = self.lock();
        let top = state.stack.top();
        let spaced = |block: &u64| top.entry(*block).state.has_space();
        let first = (range.start.0..range.end()).find(spaced)?;
        let last = (first..range.end()).rev().find(spaced)?;
        Some((first, last + 1 - first))
    }

    fn punch_finished(self: &Arc<Self>, mut zero: Zero, view: &View, count: u64, result: Result<(), Errno>) {
        match result {
            Ok(()) => {
                let range = zero.range;
                self.lock().punched(range.start.0, range.count);
                self.pool.give_back(count * BLOCK_BYTES);
                self.mark_zero(zero, view);
            }
            // A file system that punches no holes keeps the space.
            Err(errno) if errno.0 == nix::libc::EOPNOTSUPP => {
                zero.trim = false;
                self.mark_zero(zero, view);
            }
            Err(errno) => {
                let error = self.write_failed("giving space back", errno);
                zero.request.answer(Err(error), zero.done);
            }
        }
    }

    fn mark_zero(self: &Arc<Self>, zero: Zero, view: &View) {
        let blocks = zero.range.start.0..zero.range.end();
        let entries: Vec<(u64, Entry)> = {
            let state = self.lock();
            let top = state.stack.top();
            blocks
                .zip(&view.found)
                .filter_map(|(block, found)| {
                    let own = top.entry(block);
                    if zero.bad {
                        return Some((block, Entry::bad(own.state.has_space())));
                    }
                    match own.state {
                        // No data lies below either: the block reads as zeroes already.
                        State::Absent if own.is_absent() && reads_as_zero(found.entry) => None,
                        State::Absent | State::Zero => Some((block, Entry::zero(false))),
                        State::Data | State::ZeroKept => Some((block, Entry::zero(!zero.trim))),
                    }
                })
                .collect()
        };
        self.change_entries(entries.into_iter());
        drop(zero.request);
        if zero.fua { self.flush(zero.done) } else { (zero.done)(Ok(())) }
    }
}

fn reads_as_zero(entry: Entry) -> bool {
    entry.state != State::Data && entry.agrees_without_data()
}
