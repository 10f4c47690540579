//! What the allocation maps say: states of a range, and the blocks that changed between two points in time. No data is
//! read.

use std::sync::Arc;

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, SnapshotId};

use super::stack::{DownTo, Found, Look, Need};
use super::{DataPath, InFlight};
use crate::error::StoreError;
use crate::layout::BLOCKS_PER_GROUP;
use crate::replica::{AllocState, Done, Extent};
use crate::tables::State;

/// A walk over a range, a group at a time: so that the answer's size, not the range's, decides the memory it takes.
struct Walk<T> {
    request: InFlight,
    look: Look,
    rest: BlockRange,
    found: Vec<T>,
    take: fn(&mut Vec<T>, BlockRange, &[Found]),
    done: Done<Vec<T>>,
}

impl DataPath {
    /// See [`crate::Replica::allocation`] and [`crate::Replica::allocation_at`].
    pub fn allocation(self: &Arc<Self>, at: Option<SnapshotId>, range: BlockRange, done: Done<Vec<Extent>>) {
        self.walk(Look::at(at), range, add_extents, done);
    }

    /// See [`crate::Replica::changed_blocks`].
    pub fn changed_blocks(
        self: &Arc<Self>,
        from: Option<SnapshotId>,
        to: Option<SnapshotId>,
        range: BlockRange,
        done: Done<Vec<BlockRange>>,
    ) {
        let down_to = from.map_or(DownTo::Bottom, DownTo::After);
        self.walk(Look { at: to, down_to }, range, add_changed, done);
    }

    fn walk<T: Send + 'static>(
        self: &Arc<Self>,
        look: Look,
        range: BlockRange,
        take: fn(&mut Vec<T>, BlockRange, &[Found]),
        done: Done<Vec<T>>,
    ) {
        let let_in = self
            .check_range_at(look.at, range.offset_bytes(), range.len_bytes())
            .and_then(|range| self.begin().map(|request| (range, request)));
        match let_in {
            Ok((rest, request)) => {
                self.walk_on(Walk { request, look, rest, found: Vec::new(), take, done });
            }
            Err(error) => done(Err(error)),
        }
    }

    /// Goes on as far as the pages are in memory: a loop, because a large volume has many groups.
    fn walk_on<T: Send + 'static>(self: &Arc<Self>, mut walk: Walk<T>) {
        loop {
            let border = (walk.rest.start.0 / BLOCKS_PER_GROUP + 1) * BLOCKS_PER_GROUP;
            let here = BlockRange::new(walk.rest.start.0, border.min(walk.rest.end()) - walk.rest.start.0);
            match self.look_up(walk.look, here, Need::States) {
                Err(error) => return walk.request.answer(Err(error), walk.done),
                Ok(Ok(view)) => (walk.take)(&mut walk.found, here, &view.found),
                Ok(Err(missing)) => {
                    let path = Arc::clone(self);
                    return self.load_pages(missing, move |loaded| match loaded {
                        Err(error) => walk.request.answer(Err(error), walk.done),
                        Ok(()) => path.walk_on(walk),
                    });
                }
            }
            if here.end() == walk.rest.end() {
                return walk.request.answer(Ok(walk.found), walk.done);
            }
            walk.rest = BlockRange::new(here.end(), walk.rest.end() - here.end());
        }
    }

    /// The blocks of a request, if it is whole blocks inside the volume or a snapshot of it.
    pub(super) fn check_range_at(
        &self,
        at: Option<SnapshotId>,
        offset: u64,
        len: u64,
    ) -> Result<BlockRange, StoreError> {
        let range = self.check_range(offset, len)?;
        let Some(snapshot) = at else { return Ok(range) };
        let blocks = self.lock().stack.blocks_at(at);
        match blocks {
            None => Err(StoreError::NoSnapshot { replica: self.replica, snapshot }),
            Some(blocks) if range.end() > blocks => {
                Err(StoreError::InvalidRange { replica: self.replica, offset, len })
            }
            Some(_) => Ok(range),
        }
    }

    /// Bytes of a snapshot: what the volume had when it was frozen.
    pub fn size_bytes_at(&self, snapshot: SnapshotId) -> Option<u64> {
        Some(self.lock().stack.blocks_at(Some(snapshot))? * BLOCK_BYTES)
    }
}

fn add_extents(extents: &mut Vec<Extent>, range: BlockRange, found: &[Found]) {
    for (block, found) in (range.start.0..).zip(found) {
        let state = match found.entry.state {
            State::Absent => AllocState::Absent,
            State::Zero | State::ZeroKept => AllocState::Zero,
            State::Data => AllocState::Data,
        };
        match extents.last_mut() {
            Some(last) if last.state == state => last.range.count += 1,
            _ => extents.push(Extent { range: BlockRange::new(block, 1), state }),
        }
    }
}

fn add_changed(runs: &mut Vec<BlockRange>, range: BlockRange, found: &[Found]) {
    for (block, _) in (range.start.0..).zip(found).filter(|(_, found)| !found.entry.is_absent()) {
        match runs.last_mut() {
            Some(last) if last.end() == block => last.count += 1,
            _ => runs.push(BlockRange::new(block, 1)),
        }
    }
}
