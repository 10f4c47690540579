//! Control requests that outlive the session they were sent in (R5): one is under way for seconds, and meanwhile its session
//! breaks, or its target dies and the next one is let in.

use holdfast_storage_core::target::{Control, TargetAction, TargetEvent};
use rand::Rng;

use crate::target_host::ToTarget;
use crate::world::{Event, TargetNumber, World};

/// Which request is the next to be late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Straggler {
    Drop,
    Freeze,
    ClearLog,
    Any,
}

const STRAGGLERS: [Straggler; 5] =
    [Straggler::Drop, Straggler::Drop, Straggler::Freeze, Straggler::ClearLog, Straggler::Any];

impl Straggler {
    fn is_it(self, op: &Control) -> bool {
        match (self, op) {
            (Self::Any, Control::ReadMap(_) | Control::Verify(_)) => false,
            (Self::Drop, Control::DropSnapshot { .. })
            | (Self::Freeze, Control::Freeze { .. })
            | (Self::ClearLog, Control::ClearLog(_))
            | (Self::Any, _) => true,
            (Self::Drop | Self::Freeze | Self::ClearLog, _) => false,
        }
    }
}

impl World {
    pub fn arm_straggler(&mut self) {
        self.straggler = Some(STRAGGLERS[self.rng.random_range(0..STRAGGLERS.len())]);
    }

    /// Makes the awaited request late, and ends its session soon after it was sent.
    pub fn straggle(&mut self, number: TargetNumber, action: &TargetAction) {
        let Some(straggler) = self.straggler else { return };
        let TargetAction::Control { session, op, replica, .. } = action else { return };
        if !straggler.is_it(op) {
            return;
        }
        self.straggler = None;
        // A new target waits for the old lease; a new session of the same target waits for nothing.
        let killed = self.rng.random_bool(0.4);
        let at_least = if killed { 2_000_000 } else { 300_000 };
        self.late_by = self.rng.random_range(at_least..4_500_000);
        let (session, delay) = (*session, self.rng.random_range(0..3_000));
        self.log(|| {
            let late_ms = self.late_by / 1_000;
            format!("-- {op:?} of t{number} to {replica:?} is under way for {late_ms} ms, killed {killed}")
        });
        if killed {
            self.schedule(delay, Event::StrikeJob { target: number, node: None });
        } else {
            let message = ToTarget::of_session(session, TargetEvent::SessionLost { session });
            self.schedule(delay, Event::AtTarget { target: number, message });
        }
    }
}
