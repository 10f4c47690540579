//! One start of the process that serves an attached volume.

mod api;

pub use api::*;

use std::collections::VecDeque;

use crate::guards::Guards;

/// The target side of the protocol; one per attached volume, owned by one thread.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    state: TargetState,
    actions: VecDeque<TargetAction>,
}

impl Target {
    /// Starts: the first action reads the record.
    #[must_use]
    pub fn new(now_ms: u64, config: TargetConfig) -> Self {
        Self::with_guards(now_ms, config, Guards::default())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn with_guards(_now_ms: u64, config: TargetConfig, _guards: Guards) -> Self {
        Self { config, state: TargetState::Opening, actions: VecDeque::new() }
    }

    /// Takes an input. `now_ms` never goes back.
    pub fn handle_event(&mut self, _now_ms: u64, _event: TargetEvent) {}

    /// The next output, until there is none.
    pub fn poll_action(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    /// When [`TargetEvent::Tick`] is wanted, at the latest; `None` in a final state.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        None
    }

    /// Where the target stands.
    #[must_use]
    pub fn state(&self) -> &TargetState {
        &self.state
    }

    /// The volume's size once the record was read.
    #[must_use]
    pub fn size_bytes(&self) -> Option<u64> {
        None
    }

    /// For GetStatus.
    #[must_use]
    pub fn status(&self) -> TargetStatus {
        TargetStatus {
            state: self.state.clone(),
            generation: crate::ids::Generation(self.config.attachment.0),
            epoch: crate::ids::Epoch::default(),
            size_bytes: 0,
            writes_acknowledged: 0,
            longest_stall_ms: 0,
            logged_regions: 0,
            unreconciled_regions: 0,
            possible_loss: false,
            replicas: vec![],
        }
    }
}
