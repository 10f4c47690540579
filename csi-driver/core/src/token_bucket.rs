//! So much per second, with a short burst: the arithmetic alone, for given times.

/// A bucket that fills at a rate and holds a tenth of a second of it, or one amount that is asked for if that is more: so
/// every amount is let through in the end. Whole milliseconds and any rate from one per second on: what a millisecond
/// brings is kept to the thousandth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBucket {
    per_s: u64,
    /// Thousandths of what may be taken now.
    thousandths: u64,
    filled_ms: u64,
}

impl TokenBucket {
    /// An empty one. `per_s` is at least 1.
    #[must_use]
    pub fn new(now_ms: u64, per_s: u64) -> Self {
        Self { per_s: per_s.max(1), thousandths: 0, filled_ms: now_ms }
    }

    /// The rate from now on; what is in the bucket stays.
    pub fn set_rate(&mut self, per_s: u64) {
        self.per_s = per_s.max(1);
    }

    /// The time up to now brought nothing.
    pub fn skip_to(&mut self, now_ms: u64) {
        self.filled_ms = now_ms;
    }

    /// Fills the bucket for the time that passed. When the amount is there: now, or the time to ask again.
    #[must_use]
    pub fn ready_at(&mut self, now_ms: u64, amount: u64) -> u64 {
        let passed_ms = now_ms.saturating_sub(self.filled_ms);
        self.filled_ms = self.filled_ms.max(now_ms);
        let wanted = amount.saturating_mul(1_000);
        let most = (self.per_s.saturating_mul(1_000) / 10).max(wanted);
        let filled = self.thousandths.saturating_add(self.per_s.saturating_mul(passed_ms));
        self.thousandths = filled.min(most);
        let lacks = wanted.saturating_sub(self.thousandths);
        if lacks == 0 { now_ms } else { now_ms + lacks.div_ceil(self.per_s) }
    }

    /// Takes an amount that [`TokenBucket::ready_at`] said is there.
    pub fn take(&mut self, amount: u64) {
        self.thousandths = self.thousandths.saturating_sub(amount.saturating_mul(1_000));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much goes through in so many milliseconds, asked for in pieces by somebody who always wants more.
    fn through(per_s: u64, piece: u64, ms: u64) -> u64 {
        let mut bucket = TokenBucket::new(0, per_s);
        let (mut taken, mut now) = (0, 0);
        loop {
            let at = bucket.ready_at(now, piece);
            if at > now {
                now = at;
                if now > ms {
                    return taken;
                }
            } else {
                bucket.take(piece);
                taken += piece;
            }
        }
    }

    #[test]
    fn no_more_than_the_rate_goes_through_and_no_less() {
        for (per_s, piece) in
            [(1, 1), (7, 1), (10, 1), (999, 1), (100_000, 1), (1 << 20, 4096), (1 << 40, 1 << 20)]
        {
            let got = through(per_s, piece, 10_000);
            assert!(got <= per_s * 10, "{got} of {per_s}/s in 10 s");
            assert!(got + piece >= per_s * 10 * 99 / 100, "{got} of {per_s}/s in 10 s");
        }
    }

    #[test]
    fn an_amount_above_the_burst_goes_through_too_and_takes_its_time() {
        let mut bucket = TokenBucket::new(0, 1_000);
        let mut now = 0;
        while bucket.ready_at(now, 5_000) > now {
            now = bucket.ready_at(now, 5_000);
        }
        assert_eq!(now, 5_000);
        bucket.take(5_000);
        assert_eq!(bucket.ready_at(now, 1), now + 1);
    }

    #[test]
    fn a_pause_brings_a_tenth_of_a_second_and_no_more() {
        let mut bucket = TokenBucket::new(0, 1_000);
        let mut burst = 0;
        while bucket.ready_at(60_000, 1) == 60_000 {
            bucket.take(1);
            burst += 1;
        }
        assert_eq!(burst, 100);
    }
}
