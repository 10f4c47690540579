//! Reads: every block is verified against checksum and allocation state before it is given out.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use holdfast_io::{AlignedBuf, Errno};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, Block};

use super::{DataPath, InFlight};
use crate::error::StoreError;
use crate::gather::Gather;
use crate::layout::{data_offset, group_pieces};
use crate::replica::{AllocState, Done, Extent, UncheckedRead};
use crate::sums::Summer;
use crate::tables::{Entry, State};

/// Attempts of a read whose blocks were rewritten while it ran. Overlapping requests have no order, but old data with
/// a new checksum is no corruption; a reader that still loses after these gets the mismatch.
const ATTEMPTS_MAX: u32 = 4;

const BLOCK: usize = BLOCK_BYTES as usize;

/// A source of zeroes that costs no memory of its own; larger answers are made.
static ZEROES: [u8; 1 << 18] = [0; 1 << 18];

/// A read on its way.
struct Read {
    request: InFlight,
    range: BlockRange,
    entries: Vec<Entry>,
    attempt: u32,
    done: Done<UncheckedRead>,
}

impl DataPath {
    /// See [`crate::Replica::read`].
    pub fn read(self: &Arc<Self>, offset: u64, len: u32, done: Done<Bytes>) {
        let replica = self.replica;
        self.read_unchecked(
            offset,
            len,
            Box::new(move |result| {
                done(result.and_then(|read| match read.bad_blocks {
                    blocks if blocks.is_empty() => Ok(read.data),
                    blocks => Err(StoreError::Checksum { replica, blocks }),
                }));
            }),
        );
    }

    /// See [`crate::Replica::read_unchecked`].
    pub fn read_unchecked(self: &Arc<Self>, offset: u64, len: u32, done: Done<UncheckedRead>) {
        let let_in = self
            .check_range(offset, u64::from(len))
            .and_then(|range| self.begin(Some(range), false).map(|request| (range, request)));
        let (range, request) = match let_in {
            Ok(let_in) => let_in,
            Err(error) => return done(Err(error)),
        };
        let path = Arc::clone(self);
        self.with_tables(range, move |tables| match tables {
            Err(error) => request.answer(Err(error), done),
            Ok(()) => path.read_data(Read { request, range, entries: Vec::new(), attempt: 1, done }),
        });
    }

    /// See [`crate::Replica::allocation`].
    pub fn allocation(self: &Arc<Self>, range: BlockRange, done: Done<Vec<Extent>>) {
        let let_in = self
            .check_range(range.offset_bytes(), range.len_bytes())
            .and_then(|range| self.begin(Some(range), false));
        let request = match let_in {
            Ok(request) => request,
            Err(error) => return done(Err(error)),
        };
        let path = Arc::clone(self);
        self.with_tables(range, move |tables| {
            let extents = tables.map(|()| extents_of(range, &path.entries(range)));
            request.answer(extents, done);
        });
    }

    fn entries(&self, range: BlockRange) -> Vec<Entry> {
        let state = self.lock();
        (range.start.0..range.end()).map(|block| state.tables.entry(block)).collect()
    }

    fn read_data(self: &Arc<Self>, mut read: Read) {
        read.entries = self.entries(read.range);
        if read.entries.iter().all(|entry| entry.state != State::Data) {
            return self.read_finished(read, Ok(None));
        }
        let (start, count) = (read.range.start.0, read.range.count);
        let pieces: Vec<(u64, u64)> = group_pieces(start, count).collect();
        let path = Arc::clone(self);
        if let [(block, blocks)] = pieces[..] {
            let buf = AlignedBuf::new(bytes_of(blocks));
            let done =
                Box::new(move |result: Result<AlignedBuf, Errno>| path.read_finished(read, result.map(Some)));
            return self.file.read(data_offset(block), buf, done);
        }
        self.read_pieces(start, pieces, read);
    }

    /// The rare read across a group border: its pieces are put together by copying.
    fn read_pieces(self: &Arc<Self>, start: u64, pieces: Vec<(u64, u64)>, read: Read) {
        let whole = Arc::new(Mutex::new(Some(AlignedBuf::new(bytes_of(read.range.count)))));
        let (path, finished) = (Arc::clone(self), Arc::clone(&whole));
        let gather = Gather::new(
            pieces.len(),
            Box::new(move |result| {
                let buf = finished.lock().unwrap_or_else(PoisonError::into_inner).take();
                path.read_finished(read, result.map(|()| buf));
            }),
        );
        for (block, blocks) in pieces {
            let (gather, whole) = (Arc::clone(&gather), Arc::clone(&whole));
            let from = bytes_of(block - start);
            let done = Box::new(move |result: Result<AlignedBuf, Errno>| {
                let copied = result.map(|part| {
                    if let Some(buf) = &mut *whole.lock().unwrap_or_else(PoisonError::into_inner) {
                        buf[from..from + part.len()].copy_from_slice(&part);
                    }
                });
                gather.part_done(copied);
            });
            self.file.read(data_offset(block), AlignedBuf::new(bytes_of(blocks)), done);
        }
    }

    fn read_finished(self: &Arc<Self>, mut read: Read, result: Result<Option<AlignedBuf>, Errno>) {
        let outcome = match result {
            Err(errno) if errno.0 == nix::libc::EAGAIN => Err(StoreError::Busy(self.replica)),
            Err(errno) => Err(self.io_error("reading data", errno)),
            Ok(None) => Ok(answer_without_data(read.range, &read.entries)),
            Ok(Some(buf)) => Ok(verify(self.summer, read.range, &read.entries, buf)),
        };
        let mismatch = outcome.as_ref().is_ok_and(|found| !found.bad_blocks.is_empty());
        if mismatch && read.attempt < ATTEMPTS_MAX && self.entries(read.range) != read.entries {
            read.attempt += 1;
            return self.read_data(read);
        }
        if mismatch {
            tracing::warn!(replica = %self.replica, first_block = read.range.start.0, "blocks do not verify");
        }
        read.request.answer(outcome, read.done);
    }
}

/// Blocks that all read as zeroes.
fn answer_without_data(range: BlockRange, entries: &[Entry]) -> UncheckedRead {
    let len = bytes_of(range.count);
    let data = match ZEROES.get(..len) {
        Some(zeroes) => Bytes::from_static(zeroes),
        None => AlignedBuf::zeroed(len).into_bytes(),
    };
    let bad = (range.start.0..).zip(entries).filter(|(_, entry)| !entry.agrees_without_data());
    UncheckedRead { data, bad_blocks: bad.map(|(block, _)| Block(block)).collect() }
}

/// Checks the blocks with data and zeroes the others, whose place in the file may hold anything.
fn verify(summer: Summer, range: BlockRange, entries: &[Entry], mut buf: AlignedBuf) -> UncheckedRead {
    let mut bad_blocks = Vec::new();
    for ((block, entry), data) in (range.start.0..).zip(entries).zip(buf.chunks_mut(BLOCK)) {
        let good = match entry.state {
            State::Data => summer.sum(block, data) == entry.sum,
            State::Absent | State::Zero | State::ZeroKept => {
                data.fill(0);
                entry.agrees_without_data()
            }
        };
        if !good {
            bad_blocks.push(Block(block));
        }
    }
    UncheckedRead { data: buf.into_bytes(), bad_blocks }
}

fn extents_of(range: BlockRange, entries: &[Entry]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (block, entry) in (range.start.0..).zip(entries) {
        let state = match entry.state {
            State::Absent => AllocState::Absent,
            State::Zero | State::ZeroKept => AllocState::Zero,
            State::Data => AllocState::Data,
        };
        match extents.last_mut() {
            Some(last) if last.state == state => last.range.count += 1,
            _ => extents.push(Extent { range: BlockRange::new(block, 1), state }),
        }
    }
    extents
}

fn bytes_of(blocks: u64) -> usize {
    usize::try_from(blocks * BLOCK_BYTES).expect("a request fits in memory")
}
