//! Reads: every block is verified against checksum and allocation state before it is given out.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use holdfast_io::{AlignedBuf, Errno};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, Block};

use super::stack::{Found, Home, Look, Need, View};
use super::{DataPath, InFlight};
use crate::error::StoreError;
use crate::gather::Gather;
use crate::layout::{data_offset, group_pieces};
use crate::replica::{Done, UncheckedRead};
use crate::tables::State;

/// Attempts of a read whose blocks were rewritten or moved to another layer while it ran. Overlapping requests have no
/// order, but old data with a new checksum is no corruption; a reader that still loses after these gets the mismatch.
const ATTEMPTS_MAX: u32 = 4;

const BLOCK: usize = BLOCK_BYTES as usize;

/// A source of zeroes that costs no memory of its own; larger answers are made.
static ZEROES: [u8; 1 << 18] = [0; 1 << 18];

/// A read on its way.
struct Read {
    request: InFlight,
    look: Look,
    range: BlockRange,
    view: View,
    attempt: u32,
    done: Done<UncheckedRead>,
}

/// A run of blocks whose data lies together in one file.
struct Piece {
    home: usize,
    block: u64,
    count: u64,
}

impl DataPath {
    /// See [`crate::Replica::read`] and [`crate::Replica::read_snapshot`].
    pub fn read(self: &Arc<Self>, look: Look, offset: u64, len: u32, done: Done<Bytes>) {
        let replica = self.replica;
        self.read_unchecked(
            look,
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
    pub fn read_unchecked(self: &Arc<Self>, look: Look, offset: u64, len: u32, done: Done<UncheckedRead>) {
        let let_in = self
            .check_range_at(look.at, offset, u64::from(len))
            .and_then(|range| self.begin().map(|request| (range, request)));
        let (range, request) = match let_in {
            Ok(let_in) => let_in,
            Err(error) => return done(Err(error)),
        };
        let path = Arc::clone(self);
        self.resolve(look, range, Need::Entries, move |view| match view {
            Err(error) => request.answer(Err(error), done),
            Ok(view) => path.read_data(Read { request, look, range, view, attempt: 1, done }),
        });
    }

    fn read_data(self: &Arc<Self>, read: Read) {
        let range = read.range;
        let pieces = match &read.view.homes[..] {
            [] => return self.read_finished(read, Ok(None)),
            // One layer has all data: what lies between is read along.
            [_] => group_pieces(range.start.0, range.count)
                .map(|(block, count)| Piece { home: 0, block, count })
                .collect(),
            homes => pieces_of(range, &read.view.found, homes),
        };
        if let [Piece { home, block, count }] = pieces[..]
            && count == range.count
        {
            let file = read.view.homes[home].file.clone();
            let path = Arc::clone(self);
            let done =
                Box::new(move |result: Result<AlignedBuf, Errno>| path.read_finished(read, result.map(Some)));
            return file.read(data_offset(block), AlignedBuf::new(bytes_of(count)), done);
        }
        self.read_pieces(pieces, read);
    }

    /// The read across layers or a group border: its pieces are put together by copying.
    fn read_pieces(self: &Arc<Self>, pieces: Vec<Piece>, read: Read) {
        let start = read.range.start.0;
        let homes = read.view.homes.clone();
        let whole = Arc::new(Mutex::new(Some(AlignedBuf::new(bytes_of(read.range.count)))));
        let (path, finished) = (Arc::clone(self), Arc::clone(&whole));
        let gather = Gather::new(
            pieces.len(),
            Box::new(move |result| {
                let buf = finished.lock().unwrap_or_else(PoisonError::into_inner).take();
                path.read_finished(read, result.map(|()| buf));
            }),
        );
        for Piece { home, block, count } in pieces {
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
            homes[home].file.read(data_offset(block), AlignedBuf::new(bytes_of(count)), done);
        }
    }

    fn read_finished(self: &Arc<Self>, read: Read, result: Result<Option<AlignedBuf>, Errno>) {
        let outcome = match result {
            Err(errno) if errno.0 == nix::libc::EAGAIN => Err(StoreError::Busy(self.replica)),
            Err(errno) => Err(self.io_error("reading data", errno)),
            Ok(None) => Ok(answer_without_data(read.range, &read.view)),
            Ok(Some(buf)) => Ok(verify(read.range, &read.view, buf)),
        };
        let mismatch = outcome.as_ref().is_ok_and(|found| !found.bad_blocks.is_empty());
        if mismatch && read.attempt < ATTEMPTS_MAX {
            return self.read_again_if_changed(read, outcome);
        }
        self.answer_read(read, outcome);
    }

    /// The blocks may have been rewritten, or moved to another layer, since they were looked up.
    fn read_again_if_changed(self: &Arc<Self>, mut read: Read, outcome: Result<UncheckedRead, StoreError>) {
        let path = Arc::clone(self);
        self.resolve(read.look, read.range, Need::Entries, move |view| match view {
            Ok(view) if view.found != read.view.found => {
                read.view = view;
                read.attempt += 1;
                path.read_data(read);
            }
            Ok(_) | Err(_) => path.answer_read(read, outcome),
        });
    }

    fn answer_read(&self, read: Read, outcome: Result<UncheckedRead, StoreError>) {
        if outcome.as_ref().is_ok_and(|found| !found.bad_blocks.is_empty()) {
            tracing::warn!(replica = %self.replica, first_block = read.range.start.0, "blocks do not verify");
        }
        read.request.answer(outcome, read.done);
    }
}

/// Blocks that all read as zeroes.
fn answer_without_data(range: BlockRange, view: &View) -> UncheckedRead {
    let len = bytes_of(range.count);
    let data = match ZEROES.get(..len) {
        Some(zeroes) => Bytes::from_static(zeroes),
        None => AlignedBuf::zeroed(len).into_bytes(),
    };
    let bad = (range.start.0..).zip(&view.found).filter(|(_, found)| !found.entry.agrees_without_data());
    let (mut bad_blocks, mut in_doubt) = (Vec::new(), Vec::new());
    for (block, found) in bad {
        bad_blocks.push(Block(block));
        in_doubt.extend(found.is_in_doubt(view.top).then_some(Block(block)));
    }
    UncheckedRead { data, bad_blocks, in_doubt }
}

/// Checks the blocks with data and zeroes the others, whose place in the file may hold anything. Where state and sum disagree
/// about that, the place is given out unverified: data were durable before either of the two (see [`super::flush`]).
fn verify(range: BlockRange, view: &View, mut buf: AlignedBuf) -> UncheckedRead {
    let (mut bad_blocks, mut in_doubt) = (Vec::new(), Vec::new());
    for ((block, found), data) in (range.start.0..).zip(&view.found).zip(buf.chunks_mut(BLOCK)) {
        let good = match found.entry.state {
            State::Data => home_of(&view.homes, found.layer)
                .is_some_and(|home| view.homes[home].summer.sum(block, data) == found.entry.sum),
            State::Absent | State::Zero | State::ZeroKept => {
                if !found.entry.may_hold_data() {
                    data.fill(0);
                }
                found.entry.agrees_without_data()
            }
        };
        if !good {
            bad_blocks.push(Block(block));
            in_doubt.extend(found.is_in_doubt(view.top).then_some(Block(block)));
        }
    }
    UncheckedRead { data: buf.into_bytes(), bad_blocks, in_doubt }
}

/// Runs of data blocks in one layer, cut at group borders.
fn pieces_of(range: BlockRange, found: &[Found], homes: &[Home]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (block, found) in (range.start.0..).zip(found) {
        if !found.entry.may_hold_data() {
            continue;
        }
        let Some(home) = home_of(homes, found.layer) else { continue };
        match pieces.last_mut() {
            Some(last) if last.home == home && last.block + last.count == block => last.count += 1,
            _ => pieces.push(Piece { home, block, count: 1 }),
        }
    }
    let cut = |piece: Piece| {
        group_pieces(piece.block, piece.count).map(move |(block, count)| Piece {
            home: piece.home,
            block,
            count,
        })
    };
    pieces.into_iter().flat_map(cut).collect()
}

fn home_of(homes: &[Home], layer: u32) -> Option<usize> {
    homes.iter().position(|home| home.layer == layer)
}

fn bytes_of(blocks: u64) -> usize {
    usize::try_from(blocks * BLOCK_BYTES).expect("a request fits in memory")
}
