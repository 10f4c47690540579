//! How fast a volume's background work goes: what the StorageClass says of the scrub and of copies to returning replicas.

use serde::{Deserialize, Serialize};

use crate::timers;

/// The pace of what a volume's target does beside its clients' I/O. The default is that of [`timers`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Background {
    /// Seconds between the beginnings of two passes of the scrub; 0: none begins by itself; none:
    /// [`timers::SCRUB_EVERY_MS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub_interval_s: Option<u64>,
    /// Most bytes per second that are copied to a returning or new replica; 0: no limit but what disturbs clients.
    #[serde(default)]
    pub resync_bytes_per_s: u64,
}

impl Background {
    /// Whether nothing was said.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Milliseconds between the beginnings of two passes of the scrub; none: no pass begins by itself.
    #[must_use]
    pub fn scrub_every_ms(&self) -> Option<u64> {
        match self.scrub_interval_s {
            None => Some(timers::SCRUB_EVERY_MS),
            Some(0) => None,
            Some(seconds) => Some(seconds.saturating_mul(1_000)),
        }
    }
}
