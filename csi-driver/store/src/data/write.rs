//! Writes: one direct write of the data, no second one; its checksums reach the disk with the next flush.

use std::sync::Arc;

use bytes::Bytes;
use holdfast_io::{Errno, into_aligned};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::BLOCK_BYTES;

use super::space::Purpose;
use super::{DataPath, InFlight, Refusal};
use crate::disk::DiskFile;
use crate::error::StoreError;
use crate::gather::Gather;
use crate::layout::{data_offset, group_pieces};
use crate::replica::Done;
use crate::sums::Summer;
use crate::tables::Entry;

/// A write on its way.
struct Write {
    request: InFlight,
    range: BlockRange,
    file: DiskFile,
    data: Bytes,
    sums: Vec<u32>,
    fua: bool,
    done: Done,
}

impl DataPath {
    /// See [`crate::Replica::write`]. The checksums are computed here, on the caller's thread.
    pub fn write(self: &Arc<Self>, offset: u64, data: Bytes, fua: bool, done: Done) {
        let range = match self.check_range(offset, data.len() as u64) {
            Ok(range) => range,
            Err(error) => return done(Err(error)),
        };
        let request = match self.begin_change(range) {
            Ok(request) => request,
            Err(Refusal::Error(error)) => return done(Err(error)),
            Err(Refusal::Gate) => {
                let path = Arc::clone(self);
                return self.when_open(Box::new(move || path.write(offset, data, fua, done)));
            }
        };
        let data = into_aligned(data);
        let (file, summer) = self.top();
        let sums = summer.sums(range.start.0, &data);
        let write = Write { request, range, file, data, sums, fua, done };
        let path = Arc::clone(self);
        self.with_tables(range, move |tables| match tables {
            Err(error) => write.request.answer(Err(error), write.done),
            Ok(()) => path.clone().with_space(range, Purpose::Data, move |space| match space {
                Err(error) => write.request.answer(Err(error), write.done),
                Ok(()) => path.write_data(write),
            }),
        });
    }

    fn write_data(self: &Arc<Self>, mut write: Write) {
        let data = std::mem::take(&mut write.data);
        let (start, count) = (write.range.start.0, write.range.count);
        let mut pieces = group_pieces(start, count);
        let (path, file) = (Arc::clone(self), write.file.clone());
        let finish = move |result| path.write_finished(write, result);
        match (pieces.next(), pieces.next()) {
            (Some((block, _)), None) => file.write(data_offset(block), data, Box::new(finish)),
            _ => {
                let pieces: Vec<(u64, u64)> = group_pieces(start, count).collect();
                let gather = Gather::new(pieces.len(), Box::new(finish));
                for (block, blocks) in pieces {
                    let gather = Arc::clone(&gather);
                    let from = bytes_of(block - start);
                    let part = data.slice(from..from + bytes_of(blocks));
                    file.write(data_offset(block), part, Box::new(move |result| gather.part_done(result)));
                }
            }
        }
    }

    fn write_finished(self: &Arc<Self>, write: Write, result: Result<(), Errno>) {
        let Write { request, range, sums, fua, done, .. } = write;
        if let Err(errno) = result {
            let error = self.write_failed("writing data", errno);
            return request.answer(Err(error), done);
        }
        self.change_entries((range.start.0..).zip(sums.iter().map(|sum| Entry::data(*sum))));
        drop(request);
        if fua { self.flush(done) } else { done(Ok(())) }
    }

    /// File and checksums of the layer that takes the writes; both stay while a change is in flight.
    pub(super) fn top(&self) -> (DiskFile, Summer) {
        let state = self.lock();
        let top = state.stack.top();
        (top.file.clone(), top.summer)
    }

    /// A full disk leaves the rest of the replica as it is; anything else makes it unknown. A full submission queue
    /// never reached the disk.
    pub(super) fn write_failed(&self, action: &'static str, errno: Errno) -> StoreError {
        match errno.0 {
            nix::libc::ENOSPC | nix::libc::EDQUOT => StoreError::NoSpace(self.replica),
            nix::libc::EAGAIN => StoreError::Busy(self.replica),
            _ => {
                self.poison();
                self.io_error(action, errno)
            }
        }
    }
}

fn bytes_of(blocks: u64) -> usize {
    usize::try_from(blocks * BLOCK_BYTES).expect("a request fits in memory")
}
