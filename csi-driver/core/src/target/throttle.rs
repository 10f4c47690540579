//! How fast background copies may go beside the client's I/O: at full speed while there is none, else at a rate that
//! falls as soon as the client's requests take longer than they would alone, and rises while they do not.
//!
//! What a request takes alone is measured, again and again: copies stop for a moment every few seconds. Without that,
//! requests that are slow *because of* the copies would soon pass for the normal case.
//!
//! ```text
//! idle ── request ──> quiet (measure) ──> busy (adapt every window) ── every few seconds ──> quiet
//!   ^──────────────── no request for a while ──────────────┘
//! ```
//!
//! Never starved: the rate does not fall below [`COPY_RATE_MIN_BYTES_PER_S`], and quiet takes a twentieth of the time. Where
//! the volume's parameters give a rate, copies go no faster than that, with or without a client.
//! Times are whole milliseconds; means over many requests are finer, as their ends fall anywhere within one.

use crate::timers::{
    COPY_RATE_MAX_BYTES_PER_S, COPY_RATE_MIN_BYTES_PER_S, COPY_RATE_START_BYTES_PER_S, FOREGROUND_IDLE_MS,
    THROTTLE_QUIET_EVERY_MS, THROTTLE_QUIET_MS, THROTTLE_WINDOW_MS,
};
use crate::token_bucket::TokenBucket;

/// A phase in which copies already under way may still disturb.
const QUIET_DRAIN_MS: u64 = 20;
/// Fewer requests say nothing about how long one takes.
const SAMPLES_MIN: u64 = 4;
/// What a mean may vary by without a reason.
const SLACK_US: u64 = 50;

/// One per target; copies ask it before they start.
#[derive(Debug)]
pub(super) struct Throttle {
    in_flight: u32,
    last_foreground_ms: Option<u64>,
    phase: Phase,
    samples: Samples,
    /// Mean time of a request without copies.
    alone_us: Option<u64>,
    rate: u64,
    /// Bytes that may be copied now.
    bucket: TokenBucket,
    /// The volume's own rate, if it has one, and what may be copied now by it.
    cap: Option<(u64, TokenBucket)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No client's I/O.
    Idle,
    /// No copies until then.
    Quiet { since_ms: u64 },
    /// Adapting; the window's start, and when it is quiet again.
    Busy { since_ms: u64, quiet_ms: u64 },
}

#[derive(Debug, Default)]
struct Samples {
    requests: u64,
    took_ms: u64,
}

impl Samples {
    fn mean_us(&self) -> Option<u64> {
        (self.requests >= SAMPLES_MIN).then(|| self.took_ms * 1_000 / self.requests)
    }
}

impl Throttle {
    pub(super) fn new(now_ms: u64) -> Self {
        Self {
            in_flight: 0,
            last_foreground_ms: None,
            phase: Phase::Idle,
            samples: Samples::default(),
            alone_us: None,
            rate: COPY_RATE_START_BYTES_PER_S,
            bucket: TokenBucket::new(now_ms, COPY_RATE_START_BYTES_PER_S),
            cap: None,
        }
    }

    /// The volume's parameters give this rate, bytes per second; 0: none.
    pub(super) fn follow(&mut self, now_ms: u64, bytes_per_s: u64) {
        if self.cap.as_ref().map_or(0, |(rate, _)| *rate) != bytes_per_s {
            self.cap = (bytes_per_s > 0).then(|| (bytes_per_s, TokenBucket::new(now_ms, bytes_per_s)));
        }
    }

    /// A client's request came.
    pub(super) fn began(&mut self, now_ms: u64) {
        self.in_flight += 1;
        self.last_foreground_ms = Some(now_ms);
        if self.phase == Phase::Idle {
            self.quiet(now_ms);
        }
    }

    /// A client's request that came at `since_ms` is answered.
    pub(super) fn ended(&mut self, now_ms: u64, since_ms: u64) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.last_foreground_ms = Some(now_ms);
        let counts = match self.phase {
            Phase::Quiet { since_ms: quiet_ms } => since_ms >= quiet_ms + QUIET_DRAIN_MS,
            Phase::Idle | Phase::Busy { .. } => true,
        };
        if counts {
            self.samples.requests += 1;
            self.samples.took_ms += now_ms.saturating_sub(since_ms);
        }
    }

    /// Whether the client has I/O: copies are better small then.
    pub(super) fn is_busy(&self, now_ms: u64) -> bool {
        self.in_flight > 0 || self.last_foreground_ms.is_some_and(|last| now_ms < last + FOREGROUND_IDLE_MS)
    }

    /// Lets a copy of so many bytes start now, or says when to ask again.
    pub(super) fn take(&mut self, now_ms: u64, bytes: u64) -> Result<(), u64> {
        self.advance(now_ms);
        let beside_client = match self.phase {
            Phase::Idle => now_ms,
            Phase::Quiet { since_ms } => since_ms + THROTTLE_QUIET_MS,
            Phase::Busy { .. } => self.bucket.ready_at(now_ms, bytes),
        };
        let by_cap = self.cap.as_mut().map_or(now_ms, |(_, bucket)| bucket.ready_at(now_ms, bytes));
        let at_ms = beside_client.max(by_cap);
        if at_ms > now_ms {
            return Err(at_ms);
        }
        if matches!(self.phase, Phase::Busy { .. }) {
            self.bucket.take(bytes);
        }
        if let Some((_, bucket)) = &mut self.cap {
            bucket.take(bytes);
        }
        Ok(())
    }

    fn advance(&mut self, now_ms: u64) {
        if !self.is_busy(now_ms) {
            self.phase = Phase::Idle;
            return;
        }
        match self.phase {
            Phase::Idle => self.quiet(now_ms),
            Phase::Quiet { since_ms } if now_ms >= since_ms + THROTTLE_QUIET_MS => {
                // A client with long gaps gives no measure here: the one before stays.
                self.alone_us = self.samples.mean_us().or(self.alone_us);
                self.busy(now_ms, now_ms + THROTTLE_QUIET_EVERY_MS);
                self.bucket.skip_to(now_ms);
            }
            Phase::Busy { since_ms, quiet_ms } if now_ms >= since_ms + THROTTLE_WINDOW_MS => {
                self.adapt();
                if now_ms >= quiet_ms { self.quiet(now_ms) } else { self.busy(now_ms, quiet_ms) }
            }
            Phase::Quiet { .. } | Phase::Busy { .. } => {}
        }
    }

    fn quiet(&mut self, now_ms: u64) {
        self.phase = Phase::Quiet { since_ms: now_ms };
        self.samples = Samples::default();
    }

    fn busy(&mut self, now_ms: u64, quiet_ms: u64) {
        self.phase = Phase::Busy { since_ms: now_ms, quiet_ms };
        self.samples = Samples::default();
    }

    fn adapt(&mut self) {
        let slower = match (self.samples.mean_us(), self.alone_us) {
            (Some(mean), Some(alone)) => mean > alone + alone / 4 + SLACK_US,
            // Too few answers while requests wait is slow enough; too few requests are none that copies could disturb.
            (None, _) => self.in_flight > 0 && self.samples.requests == 0,
            (Some(_), None) => false,
        };
        let rate = if slower { self.rate - self.rate / 4 } else { self.rate + self.rate / 8 };
        self.rate = rate.clamp(COPY_RATE_MIN_BYTES_PER_S, COPY_RATE_MAX_BYTES_PER_S);
        self.bucket.set_rate(self.rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPY_BYTES: u64 = 128 << 10;

    /// A client that sends a request each millisecond, and copies that make each request wait `us_per_mib` longer for
    /// every MiB copied in the 10 ms before it.
    fn copied_bytes(ms: u64, alone_ms: u64, ms_per_mib: u64, client: bool) -> (u64, u64) {
        copied_bytes_under(0, ms, alone_ms, ms_per_mib, client)
    }

    fn copied_bytes_under(cap: u64, ms: u64, alone_ms: u64, ms_per_mib: u64, client: bool) -> (u64, u64) {
        let mut throttle = Throttle::new(0);
        throttle.follow(0, cap);
        let (mut copied, mut waited, mut requests) = (0, 0, 0);
        let mut recent = std::collections::VecDeque::from([0_u64; 10]);
        let mut ends: Vec<(u64, u64)> = Vec::new();
        let mut ask_at = 0;
        for now in 1..=ms {
            let mut due = Vec::new();
            ends.retain(|end| {
                if end.0 <= now {
                    due.push(*end);
                    false
                } else {
                    true
                }
            });
            for (_, since) in due {
                throttle.ended(now, since);
            }
            if client {
                throttle.began(now);
                let disturbed = (recent.iter().sum::<u64>() * ms_per_mib) >> 20;
                (waited, requests) = (waited + alone_ms + disturbed, requests + 1);
                ends.push((now + alone_ms + disturbed, now));
            }
            let mut now_copied = 0;
            while ask_at <= now && now_copied < 4 << 20 {
                match throttle.take(now, COPY_BYTES) {
                    Ok(()) => now_copied += COPY_BYTES,
                    Err(at) => ask_at = at,
                }
            }
            copied += now_copied;
            recent.pop_front();
            recent.push_back(now_copied);
        }
        (copied, waited * 1_000 / requests.max(1))
    }

    #[test]
    fn without_a_client_copies_go_at_full_speed() {
        assert_eq!(copied_bytes(1_000, 0, 0, false).0, 1_000 * (4 << 20));
    }

    #[test]
    fn a_client_that_copies_do_not_disturb_does_not_slow_them() {
        let (copied, _) = copied_bytes(10_000, 2, 0, true);
        assert!(copied > (10 * 200) << 20, "{} MiB in 10 s", copied >> 20);
    }

    #[test]
    fn a_client_whose_requests_take_longer_slows_copies_until_they_do_not() {
        let (copied, mean_us) = copied_bytes(20_000, 4, 4, true);
        assert!(mean_us < 6_000, "a request that takes 4 ms alone takes {mean_us} us");
        assert!(copied > 20 * COPY_RATE_MIN_BYTES_PER_S, "{} MiB in 20 s", copied >> 20);
    }

    #[test]
    fn copies_are_never_starved() {
        let (copied, _) = copied_bytes(20_000, 1, 1_000, true);
        let least = 20 * COPY_RATE_MIN_BYTES_PER_S * 9 / 10;
        assert!(copied >= least, "{} MiB of at least {} in 20 s", copied >> 20, least >> 20);
    }

    #[test]
    fn a_volume_s_own_rate_holds_with_and_without_a_client() {
        for (cap, client) in [(2 << 20, false), (2 << 20, true), (40 << 20, false), (40 << 20, true)] {
            let (copied, _) = copied_bytes_under(cap, 10_000, 2, 0, client);
            // A tenth of a second at once; quiet takes a twentieth.
            assert!(copied <= 10 * cap + cap / 10, "{cap}, {client}: {copied} bytes in 10 s");
            assert!(copied >= 10 * cap * 8 / 10, "{cap}, {client}: {copied} bytes in 10 s");
        }
    }

    #[test]
    fn a_rate_is_changed_and_lifted_while_copies_go_on() {
        let mut throttle = Throttle::new(0);
        throttle.follow(0, 1 << 20);
        assert_eq!(throttle.take(0, 1 << 20), Err(1_000));
        throttle.follow(10, 1 << 20);
        assert_eq!(throttle.take(10, 1 << 20), Err(1_000), "the same rate does not begin anew");
        throttle.follow(10, 10 << 20);
        assert_eq!(throttle.take(10, 1 << 20), Err(110));
        throttle.follow(20, 0);
        assert_eq!(throttle.take(20, 1 << 40), Ok(()));
    }

    #[test]
    fn full_speed_is_back_soon_after_the_client_is_gone() {
        let mut throttle = Throttle::new(0);
        throttle.began(0);
        throttle.ended(1, 0);
        assert!(throttle.take(2, COPY_BYTES).is_err(), "first it is measured");
        for _ in 0..100 {
            assert_eq!(throttle.take(1 + FOREGROUND_IDLE_MS, 1 << 20), Ok(()));
        }
    }
}
