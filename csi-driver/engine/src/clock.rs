//! The clock of the protocol: `CLOCK_BOOTTIME` in milliseconds, which goes on while the machine sleeps.

use nix::time::{ClockId, clock_gettime};

/// Milliseconds since boot.
#[must_use]
pub fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every supported kernel has CLOCK_BOOTTIME");
    let ms = now.tv_sec() * 1_000 + now.tv_nsec() / 1_000_000;
    u64::try_from(ms).expect("time since boot is not negative")
}
