//! Limits of a volume's I/O, and who may go on under them: the arithmetic alone, for given times.
//!
//! Reads, writes, zeroes and trims count as operations; bytes of reads and writes count as bytes. A request takes what it
//! needs of both before it goes on, in the order of arrival. A flush is never asked about: it delays nothing, and who waits
//! for it may hold locks of a file system.

use serde::{Deserialize, Serialize};

use crate::token_bucket::TokenBucket;

/// What a volume's clients may do per second, all of them together; 0: as much as they can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimits {
    /// Operations per second.
    #[serde(default)]
    pub iops: u64,
    /// Bytes per second, read and written together.
    #[serde(default)]
    pub bytes_per_s: u64,
}

impl IoLimits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// One volume's two buckets.
#[derive(Debug, Default)]
pub struct IoLimiter {
    limits: IoLimits,
    operations: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
}

impl IoLimiter {
    /// Follows the volume's limits; tells whether they are others than before.
    pub fn follow(&mut self, now_ms: u64, limits: IoLimits) -> bool {
        if self.limits == limits {
            return false;
        }
        let bucket = |per_s: u64| (per_s > 0).then(|| TokenBucket::new(now_ms, per_s));
        *self = Self { limits, operations: bucket(limits.iops), bytes: bucket(limits.bytes_per_s) };
        true
    }

    /// Lets an operation with so many bytes go on now, or says when to ask again.
    ///
    /// # Errors
    /// The time, after `now_ms`, to ask again.
    pub fn admit(&mut self, now_ms: u64, bytes: u64) -> Result<(), u64> {
        let ready = |bucket: &mut Option<TokenBucket>, amount: u64| {
            bucket.as_mut().map_or(now_ms, |bucket| bucket.ready_at(now_ms, amount))
        };
        let at_ms = ready(&mut self.operations, 1).max(ready(&mut self.bytes, bytes));
        if at_ms > now_ms {
            return Err(at_ms);
        }
        for (bucket, amount) in [(&mut self.operations, 1), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.take(amount);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(limits: IoLimits, bytes: u64, ms: u64) -> u64 {
        let mut limiter = IoLimiter::default();
        limiter.follow(0, limits);
        let (mut operations, mut now) = (0, 0);
        while now <= ms {
            match limiter.admit(now, bytes) {
                Ok(()) => operations += 1,
                Err(at_ms) => now = at_ms,
            }
        }
        operations
    }

    #[test]
    fn the_tighter_of_two_limits_holds() {
        assert_eq!(through(IoLimits { iops: 100, bytes_per_s: 1 << 30 }, 4096, 10_000), 1_000);
        assert_eq!(through(IoLimits { iops: 100, bytes_per_s: 40_960 }, 4096, 10_000), 100);
        assert_eq!(through(IoLimits { iops: 0, bytes_per_s: 40_960 }, 4096, 10_000), 100);
        assert_eq!(through(IoLimits { iops: 50, bytes_per_s: 0 }, 1 << 30, 10_000), 500);
    }

    #[test]
    fn what_one_bucket_refuses_costs_nothing_of_the_other() {
        let mut limiter = IoLimiter::default();
        limiter.follow(0, IoLimits { iops: 10, bytes_per_s: 1_000 });
        assert_eq!(limiter.admit(1_000, 5_000), Err(5_000));
        for _ in 0..50 {
            let _ = limiter.admit(1_000, 5_000);
        }
        assert_eq!(limiter.admit(1_000, 0), Ok(()), "the operation is still to be had");
    }

    #[test]
    fn limits_are_lifted_and_lowered_while_it_runs() {
        let mut limiter = IoLimiter::default();
        assert_eq!(limiter.admit(0, 1 << 40), Ok(()));
        limiter.follow(0, IoLimits { iops: 1, bytes_per_s: 0 });
        assert_eq!(limiter.admit(0, 0), Err(1_000));
        assert!(!limiter.follow(10, IoLimits { iops: 1, bytes_per_s: 0 }));
        assert_eq!(limiter.admit(10, 0), Err(1_000), "the same limits do not begin anew");
        limiter.follow(20, IoLimits::default());
        assert_eq!(limiter.admit(20, 1 << 40), Ok(()));
    }
}
