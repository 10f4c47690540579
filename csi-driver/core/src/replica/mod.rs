//! One full copy of a volume: who may use it, what it remembers, and in which order things reach its disk.

mod api;
pub mod meta;

pub use api::*;
pub use meta::ReplicaMeta;

use std::collections::VecDeque;

use crate::guards::Guards;
use crate::ids::SessionToken;

/// The replica side of the protocol; one per replica, owned by one thread.
#[derive(Debug)]
pub struct Replica {
    actions: VecDeque<ReplicaAction>,
}

impl Replica {
    /// Starts from what the store found on disk.
    #[must_use]
    pub fn new(now_ms: u64, start: ReplicaStart) -> Self {
        Self::with_guards(now_ms, start, Guards::default())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn with_guards(_now_ms: u64, _start: ReplicaStart, _guards: Guards) -> Self {
        Self { actions: VecDeque::new() }
    }

    /// Takes an input. `now_ms` never goes back.
    pub fn handle_event(&mut self, _now_ms: u64, _event: ReplicaEvent) {}

    /// The next output, until there is none.
    pub fn poll_action(&mut self) -> Option<ReplicaAction> {
        self.actions.pop_front()
    }

    /// When [`ReplicaEvent::Tick`] is wanted, at the latest.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        None
    }

    /// Whether a connection with this token may be let in.
    #[must_use]
    pub fn accepts(&self, _token: SessionToken) -> bool {
        false
    }
}
