//! A volume that nobody uses asks its replicas for signs of life less often, so that many idle volumes cost a node little.
//!
//! *Promised:* leases stay in force (a read after a long pause waits for nothing), and a replica that is silent while the
//! volume is used is given up as fast as ever. A replica that dies while nobody uses the volume is noticed later: at the
//! next heartbeat, or at the first request.

use crate::timers;

use super::peers::{Link, Session};
use super::{Target, TargetState};

#[derive(Debug, Default)]
pub(super) struct Idle {
    /// The last time at which something was under way.
    busy_ms: u64,
    /// Nothing has been for [`timers::IDLE_AFTER_MS`].
    pub now: bool,
}

impl Target {
    /// To be called before anything is decided by the time of a heartbeat, and after each input.
    pub(super) fn update_idle(&mut self) {
        if !self.is_quiet() {
            self.idle.busy_ms = self.now_ms;
        }
        let was = self.idle.now;
        self.idle.now = self.now_ms >= self.idle.busy_ms + timers::IDLE_AFTER_MS;
        if was && !self.idle.now {
            // The pauses between heartbeats were ours: silence counts from here.
            let since = self.now_ms.saturating_sub(timers::HEARTBEAT_MS);
            for session in self.peers.values_mut().filter_map(super::peers::Peer::session_mut) {
                session.last_heard_ms = session.last_heard_ms.max(since);
            }
        }
    }

    /// Nothing is under way, nothing waits for a timer, all replicas are open and answer.
    fn is_quiet(&self) -> bool {
        let now = self.now_ms;
        let answers = |session: &Session| {
            session.pending.is_empty()
                && session.heartbeats.front().is_none_or(|(_, sent_ms)| now < sent_ms + timers::HEARTBEAT_MS)
        };
        self.requests.is_empty()
            && self.tasks.is_empty()
            && self.logged.is_empty()
            && self.flushes.is_empty()
            && self.calls.is_empty()
            && self.state == TargetState::Serving
            && self.stopping.is_none()
            && self.pending.is_none()
            && self.catch_up.is_none()
            && self.jobs.is_empty()
            && self.reconcile.left() == 0
            && self.peers.values().all(|peer| matches!(&peer.link, Link::Open(session) if answers(session)))
    }

    /// How far apart two inputs may be with nothing late.
    pub(super) fn tick_every_ms(&self) -> u64 {
        if self.idle.now { timers::HEARTBEAT_IDLE_MS } else { timers::HEARTBEAT_MS }
    }

    /// When a session's next heartbeat is due: on marks of the clock, so that all volumes of a node send theirs at once.
    pub(super) fn heartbeat_due_ms(&self, session: &Session) -> u64 {
        if self.idle.now {
            session.next_heartbeat_ms.next_multiple_of(timers::HEARTBEAT_IDLE_MS)
        } else {
            session.next_heartbeat_ms
        }
    }

    /// When an open session has to be looked at.
    pub(super) fn session_timeout(&self, session: &Session) -> u64 {
        let due = self.heartbeat_due_ms(session);
        if self.idle.now {
            // One that is not answered at once ends the idling.
            let late = session.heartbeats.front().map(|(_, sent_ms)| sent_ms + timers::HEARTBEAT_MS);
            return late.map_or(due, |late| late.min(due));
        }
        let silent = (session.last_heard_ms + timers::SILENT_MS).max(self.patient_until_ms);
        // Slow I/O is looked for at each heartbeat.
        due.min(silent)
    }
}
