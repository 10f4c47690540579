//! Clients' requests: cut into tasks, answered when the last is done.

use std::collections::VecDeque;

use crate::block_range::BlockRange;
use crate::ids::{BLOCK_BYTES, Block};
use crate::timers;

use super::flushes::FlushFor;
use super::tasks::Work;
use super::{ClientOp, Edge, RequestError, RequestId, Target, TargetAction};

/// A client's request that is not answered yet.
#[derive(Debug)]
pub(super) struct Request {
    since_ms: u64,
    is_write: bool,
    /// What is still to be started, one after the other (zeroings only, R17).
    parts: VecDeque<(Work, BlockRange)>,
}

impl Target {
    pub(super) fn on_request(&mut self, request: RequestId, op: ClientOp) {
        if self.stopping.is_some() {
            return self.emit(TargetAction::Complete { request, result: Err(RequestError::Stopped) });
        }
        let size = self.size_bytes().unwrap_or(0);
        let inside =
            |offset: u64, len: u64| len > 0 && offset.checked_add(len).is_some_and(|end| end <= size);
        let (parts, valid) = match op {
            ClientOp::Flush => {
                self.add_request(request, false, VecDeque::new());
                self.start_flush(FlushFor::Client(request));
                return;
            }
            ClientOp::Read { offset, len } => match inside(offset, len) {
                true => (VecDeque::from([(Work::Read { request }, BlockRange::covering(offset, len))]), true),
                false => (VecDeque::new(), false),
            },
            ClientOp::Write { offset, len, fua } => match inside(offset, len) {
                true => {
                    let range = BlockRange::covering(offset, len);
                    let edges = edges_of(offset, len);
                    (VecDeque::from([(Work::Write { request, fua, edges }, range)]), true)
                }
                false => (VecDeque::new(), false),
            },
            ClientOp::Zero { offset, len, fua, trim } => match inside(offset, len) {
                true => (zero_parts(request, offset, len, fua, trim), true),
                false => (VecDeque::new(), false),
            },
        };
        if !valid {
            return self.emit(TargetAction::Complete { request, result: Err(RequestError::Invalid) });
        }
        self.add_request(request, !matches!(op, ClientOp::Read { .. }), parts);
        self.next_part(request, Ok(()));
    }

    fn add_request(&mut self, request: RequestId, is_write: bool, parts: VecDeque<(Work, BlockRange)>) {
        self.throttle.began(self.now_ms);
        self.requests.insert(request, Request { since_ms: self.now_ms, is_write, parts });
    }

    /// One part ended: starts the next, or answers.
    pub(super) fn next_part(&mut self, request: RequestId, result: Result<(), RequestError>) {
        let Some(entry) = self.requests.get_mut(&request) else { return };
        if result.is_ok()
            && let Some((work, range)) = entry.parts.pop_front()
        {
            self.start_task(work, range);
            return;
        }
        self.complete(request, result);
    }

    pub(super) fn complete(&mut self, request: RequestId, result: Result<(), RequestError>) {
        let Some(entry) = self.requests.remove(&request) else { return };
        self.throttle.ended(self.now_ms, entry.since_ms);
        if entry.is_write && result.is_ok() {
            self.writes_acknowledged += 1;
            self.longest_stall_ms = self.longest_stall_ms.max(self.now_ms.saturating_sub(entry.since_ms));
        }
        self.emit(TargetAction::Complete { request, result });
    }
}

/// The blocks of an unaligned range that are only partly written.
fn edges_of(offset: u64, len: u64) -> Vec<(Edge, Block)> {
    let end = offset + len;
    let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
    let head = !offset.is_multiple_of(BLOCK_BYTES) || (first == last && !end.is_multiple_of(BLOCK_BYTES));
    let tail = !end.is_multiple_of(BLOCK_BYTES) && first != last;
    let mut edges = Vec::new();
    if head {
        edges.push((Edge::Head, Block(first)));
    }
    if tail {
        edges.push((Edge::Tail, Block(last)));
    }
    edges
}

/// R17: whole blocks are zeroed, in parts that fit the intent log; partly covered edge blocks are rewritten.
fn zero_parts(
    request: RequestId,
    offset: u64,
    len: u64,
    fua: bool,
    trim: bool,
) -> VecDeque<(Work, BlockRange)> {
    let mut parts = VecDeque::new();
    let whole = BlockRange::covering(offset, len);
    let (mut start, mut end) = (whole.start.0, whole.end());
    for (edge, block) in edges_of(offset, len) {
        let work = Work::Zero { request, fua, trim: false, edge: Some((edge, block)) };
        parts.push_back((work, BlockRange::new(block.0, 1)));
        match edge {
            Edge::Head => start += 1,
            Edge::Tail => end -= 1,
        }
    }
    while start < end {
        let count = (end - start).min(timers::ZERO_PART_BLOCKS_MAX);
        parts.push_back((Work::Zero { request, fua, trim, edge: None }, BlockRange::new(start, count)));
        start += count;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r13_edges_are_the_partly_written_blocks() {
        assert!(edges_of(0, 4096).is_empty());
        assert_eq!(edges_of(1, 4095), [(Edge::Head, Block(0))]);
        assert_eq!(edges_of(0, 100), [(Edge::Head, Block(0))]);
        assert_eq!(edges_of(4096, 4097), [(Edge::Tail, Block(2))]);
        assert_eq!(edges_of(100, 8192), [(Edge::Head, Block(0)), (Edge::Tail, Block(2))]);
    }

    #[test]
    fn r17_zeroing_takes_whole_blocks_and_is_cut() {
        let ranges = |offset, len| {
            zero_parts(RequestId(1), offset, len, false, true)
                .into_iter()
                .map(|(_, range)| range)
                .collect::<Vec<_>>()
        };
        assert_eq!(ranges(100, 8192), [BlockRange::new(0, 1), BlockRange::new(2, 1), BlockRange::new(1, 1)]);
        assert_eq!(ranges(0, 100), [BlockRange::new(0, 1)]);
        let part = timers::ZERO_PART_BLOCKS_MAX;
        assert_eq!(ranges(0, (part + 1) * 4096), [BlockRange::new(0, part), BlockRange::new(part, 1)]);
    }
}
