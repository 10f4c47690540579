//! The clock of the protocol: `CLOCK_BOOTTIME` in milliseconds, which goes on while the machine sleeps.
//!
//! A virtual machine that is suspended may come back with all its clocks where they stood; the wall clock is set right
//! then (by the hypervisor or NTP), the clock of the protocol is not. [`JumpWatch`] notices that (R4).

use holdfast_storage_core::timers::LEASE_MARGIN_MS;
use nix::time::{ClockId, clock_gettime};

/// Smaller jumps are no matter: the margin on a lease covers them. The coarse wall clock itself lags by up to 10 ms.
const JUMP_MS: u64 = LEASE_MARGIN_MS - 10;
/// Tries to read both clocks without being interrupted in between; in vain, the next event tries again.
const TRIES_MAX: u32 = 4;

/// Milliseconds since boot.
#[must_use]
pub fn now_ms() -> u64 {
    read_ms(ClockId::CLOCK_BOOTTIME)
}

fn wall_ms() -> u64 {
    read_ms(ClockId::CLOCK_REALTIME_COARSE)
}

fn read_ms(clock: ClockId) -> u64 {
    let now = clock_gettime(clock).expect("every supported kernel has this clock");
    let ms = now.tv_sec() * 1_000 + now.tv_nsec() / 1_000_000;
    u64::try_from(ms).expect("this clock does not count from before its origin")
}

/// Notices that the wall clock jumped against [`now_ms`].
///
/// A wall clock that an operator or NTP steps is noticed alike; that costs the wait for the next heartbeat's answer.
/// What is *not* noticed: a suspended machine whose wall clock is not set right either.
#[derive(Debug)]
pub struct JumpWatch {
    /// Wall clock minus clock of the protocol.
    offset_ms: u64,
}

impl JumpWatch {
    /// Watches from now on.
    #[must_use]
    pub fn new() -> Self {
        Self { offset_ms: wall_ms().wrapping_sub(now_ms()) }
    }

    /// Whether the wall clock jumped since the last call; `now_ms` was just read. One call of the vDSO.
    pub fn jumped(&mut self, now_ms: u64) -> bool {
        if !self.differs(now_ms, wall_ms()) {
            return false;
        }
        // This thread may have been put aside between the two readings.
        for _ in 0..TRIES_MAX {
            let (before, wall, after) = (self::now_ms(), wall_ms(), self::now_ms());
            if after - before <= 1 {
                return self.observe(before, wall);
            }
        }
        false
    }

    fn observe(&mut self, boot_ms: u64, wall_ms: u64) -> bool {
        let jumped = self.differs(boot_ms, wall_ms);
        if jumped {
            self.offset_ms = wall_ms.wrapping_sub(boot_ms);
        }
        jumped
    }

    fn differs(&self, boot_ms: u64, wall_ms: u64) -> bool {
        let moved = wall_ms.wrapping_sub(boot_ms).wrapping_sub(self.offset_ms).cast_signed();
        moved.unsigned_abs() > JUMP_MS
    }
}

impl Default for JumpWatch {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r4_a_wall_clock_that_jumps_either_way_is_noticed_once() {
        let mut watch = JumpWatch { offset_ms: 1_000_000 };
        assert!(!watch.observe(5_000, 1_005_000));
        assert!(!watch.observe(9_000, 1_009_000 - 10));
        assert!(watch.observe(9_001, 1_069_001));
        assert!(!watch.observe(9_002, 1_069_002));
        assert!(watch.observe(9_003, 1_009_003));
    }

    #[test]
    fn r4_a_machine_younger_than_its_wall_clock_says_is_no_jump() {
        // Without a battery the wall clock may start near 0, and be behind the time since boot after a step.
        let mut watch = JumpWatch { offset_ms: 0_u64.wrapping_sub(500) };
        assert!(!watch.observe(1_000, 500));
        assert!(watch.observe(1_001, 9_000_000));
    }

    #[test]
    fn r4_clocks_that_run_on_do_not_jump() {
        let mut watch = JumpWatch::new();
        for _ in 0..2_000 {
            assert!(!watch.jumped(now_ms()));
        }
    }
}
