//! The limits of a volume's I/O: requests wait here, before the target sees them, until both buckets have what they need.
//!
//! Front end and local NBD clients share the one queue of their volume. It holds nothing that they do not hold already: each
//! bounds what it has in flight, so the queue needs no limit of its own. Flushes pass by: they cover what was answered, and
//! what waits here was not.

use std::collections::VecDeque;

use holdfast_io::{BlockOp, Completion};
use holdfast_storage_core::io_limits::{IoLimiter, IoLimits};

/// Requests of one volume.
#[derive(Default)]
pub struct Limited {
    limiter: IoLimiter,
    // Bounded by what the front ends have in flight.
    waiting: VecDeque<(BlockOp, Completion)>,
    /// When the first of them may go on.
    next_ms: u64,
    /// The target ends: who waits is told now.
    lifted: bool,
}

impl Limited {
    /// The volume's limits are these now.
    pub fn follow(&mut self, now_ms: u64, limits: IoLimits) {
        let limits = if self.lifted { IoLimits::default() } else { limits };
        if self.limiter.follow(now_ms, limits) {
            self.next_ms = now_ms;
        }
    }

    /// Nobody waits any more.
    pub fn lift(&mut self) {
        self.lifted = true;
    }

    /// Takes a request in; gives it back where it need not wait.
    pub fn arrive(&mut self, now_ms: u64, op: BlockOp, done: Completion) -> Option<(BlockOp, Completion)> {
        let goes_on = match &op {
            BlockOp::Flush => true,
            op => self.waiting.is_empty() && self.admit(now_ms, bytes_of(op)),
        };
        if goes_on {
            return Some((op, done));
        }
        self.waiting.push_back((op, done));
        None
    }

    /// The next request whose time has come.
    pub fn due(&mut self, now_ms: u64) -> Option<(BlockOp, Completion)> {
        let bytes = bytes_of(&self.waiting.front()?.0);
        if now_ms < self.next_ms || !self.admit(now_ms, bytes) {
            return None;
        }
        self.waiting.pop_front()
    }

    fn admit(&mut self, now_ms: u64, bytes: u64) -> bool {
        match self.limiter.admit(now_ms, bytes) {
            Ok(()) => true,
            Err(at_ms) => {
                self.next_ms = at_ms;
                false
            }
        }
    }

    /// When [`Limited::due`] is to be asked.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        (!self.waiting.is_empty()).then_some(self.next_ms)
    }

    /// All that wait, for a target that is no more.
    pub fn take_all(&mut self) -> impl Iterator<Item = (BlockOp, Completion)> + '_ {
        self.waiting.drain(..)
    }
}

/// Zeroes and trims move no data.
fn bytes_of(op: &BlockOp) -> u64 {
    match op {
        BlockOp::Read { len, .. } => u64::from(*len),
        BlockOp::Write { data, .. } => data.len() as u64,
        BlockOp::Zero { .. } | BlockOp::Flush => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_limited(iops: u64, bytes_per_s: u64) -> Limited {
        let mut limited = Limited::default();
        limited.follow(0, IoLimits { iops, bytes_per_s });
        limited
    }

    fn read(limited: &mut Limited, now_ms: u64, offset: u64) -> bool {
        limited.arrive(now_ms, BlockOp::Read { offset, len: 4096 }, Box::new(|_| ())).is_some()
    }

    fn offset_of(request: Option<(BlockOp, Completion)>) -> Option<u64> {
        match request {
            Some((BlockOp::Read { offset, .. }, _)) => Some(offset),
            _ => None,
        }
    }

    #[test]
    fn requests_wait_in_the_order_of_their_arrival_and_flushes_pass_by() {
        let mut limited = mk_limited(10, 0);
        assert!(!read(&mut limited, 0, 1));
        assert!(!read(&mut limited, 50, 2));
        assert!(limited.arrive(50, BlockOp::Flush, Box::new(|_| ())).is_some());
        assert_eq!(limited.next_timeout(), Some(100));
        assert!(limited.due(99).is_none());
        assert!(!read(&mut limited, 100, 3), "the first comes before it");
        assert_eq!(offset_of(limited.due(100)), Some(1));
        assert!(limited.due(100).is_none());
        assert_eq!(limited.next_timeout(), Some(200));
        assert_eq!(offset_of(limited.due(200)), Some(2));
        assert_eq!(offset_of(limited.due(300)), Some(3));
        assert_eq!(limited.next_timeout(), None);
    }

    #[test]
    fn trims_count_as_operations_and_not_as_bytes() {
        let trim = || BlockOp::Zero { offset: 0, len: 1 << 40, fua: false, trim: true };
        assert!(mk_limited(0, 1).arrive(0, trim(), Box::new(|_| ())).is_some());
        assert!(mk_limited(1, 0).arrive(0, trim(), Box::new(|_| ())).is_none());
    }

    #[test]
    fn limits_that_are_lifted_let_all_go_and_so_does_the_target_s_end() {
        for ends in [false, true] {
            let mut limited = mk_limited(1, 0);
            for offset in 0..5 {
                assert!(!read(&mut limited, 0, offset));
            }
            if ends {
                limited.lift();
            }
            limited.follow(3, if ends { IoLimits { iops: 1, bytes_per_s: 0 } } else { IoLimits::default() });
            for offset in 0..5 {
                assert_eq!(offset_of(limited.due(3)), Some(offset));
            }
        }
    }
}
