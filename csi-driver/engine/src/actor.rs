//! Runs a sans-I/O state machine without a thread of its own.
//!
//! Events come from any thread (a socket's reader, a disk ring, a timer). Whoever posts to an idle machine drives it until
//! its queue is empty; whoever finds it busy leaves the event in the queue. So events are handled one at a time, actions
//! are executed in the order the machine gave them, and an event costs no thread switch.
//!
//! ```text
//!  thread 1: post ─> queue ─> handle ─> actions ─> execute ─┐
//!  thread 2: post ─> queue (busy: return)                   └─> handle ... until the queue is empty
//! ```
//!
//! Executing an action must not block. It may post, to the same machine too.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::now_ms;
use crate::pulse::{Pulse, Timed};

/// A state machine and how its actions are carried out.
pub trait Machine: Sized + Send + 'static {
    /// Inputs.
    type Event: Send;
    /// Outputs.
    type Action: Send;
    /// What executing actions needs.
    type Env: Send + Sync;

    /// Takes an input and appends what is to be done, in order.
    fn handle(&mut self, now_ms: u64, event: Self::Event, actions: &mut Vec<Self::Action>);

    /// When a tick is wanted.
    fn next_timeout(&self) -> Option<u64>;

    /// The event that says that the timeout passed.
    fn tick() -> Self::Event;

    /// Carries an action out; never blocks. Called without any lock held.
    fn execute(actor: &Arc<Actor<Self>>, action: Self::Action);

    /// The actor was killed: what still waits for an answer is given one, sessions are dropped.
    fn take_down(&mut self, actions: &mut Vec<Self::Action>);

    /// Answers an event that came after the kill.
    fn reject(event: Self::Event);
}

/// A machine with its queue and timer.
pub struct Actor<M: Machine> {
    inbox: Mutex<Inbox<M::Event>>,
    machine: Mutex<M>,
    pulse: Pulse,
    armed_ms: AtomicU64,
    /// For [`Machine::execute`].
    pub env: M::Env,
}

struct Inbox<E> {
    // Bounded by what its sources have in flight: client requests, disk operations and calls.
    queue: VecDeque<E>,
    busy: bool,
    dead: bool,
}

/// No timer is armed.
const UNARMED: u64 = u64::MAX;

impl<M: Machine> Actor<M> {
    /// Wraps a machine. Nothing happens before the first [`Actor::post`] or [`Actor::kick`].
    pub fn new(machine: M, env: M::Env, pulse: Pulse) -> Arc<Self> {
        Arc::new(Self {
            inbox: Mutex::new(Inbox { queue: VecDeque::with_capacity(64), busy: false, dead: false }),
            machine: Mutex::new(machine),
            pulse,
            armed_ms: AtomicU64::new(UNARMED),
            env,
        })
    }

    /// Hands an event in; drives the machine unless another thread does.
    pub fn post(self: &Arc<Self>, event: M::Event) {
        {
            let mut inbox = lock(&self.inbox);
            if inbox.dead {
                drop(inbox);
                return M::reject(event);
            }
            inbox.queue.push_back(event);
            if inbox.busy {
                return;
            }
            inbox.busy = true;
        }
        self.drive();
    }

    /// Collects the first actions of a fresh machine.
    pub fn kick(self: &Arc<Self>) {
        self.post(M::tick());
    }

    /// Stops for good, as a crash does: nothing is sent any more, whoever waits is answered with a failure.
    pub fn kill(self: &Arc<Self>) {
        let rest = {
            let mut inbox = lock(&self.inbox);
            if inbox.dead {
                return;
            }
            inbox.dead = true;
            std::mem::take(&mut inbox.queue)
        };
        rest.into_iter().for_each(M::reject);
        let mut actions = Vec::new();
        lock(&self.machine).take_down(&mut actions);
        for action in actions {
            M::execute(self, action);
        }
    }

    /// Looks at the machine between two events.
    pub fn peek<T>(&self, look: impl FnOnce(&M) -> T) -> T {
        look(&lock(&self.machine))
    }

    fn drive(self: &Arc<Self>) {
        let crash = AbortOnPanic;
        let mut actions = Vec::new();
        while let Some(event) = self.next_event() {
            lock(&self.machine).handle(now_ms(), event, &mut actions);
            for action in actions.drain(..) {
                M::execute(self, action);
            }
        }
        std::mem::forget(crash);
        let timeout = lock(&self.machine).next_timeout();
        if let Some(at_ms) = timeout {
            self.arm(at_ms);
        }
    }

    fn next_event(&self) -> Option<M::Event> {
        let mut inbox = lock(&self.inbox);
        let event = inbox.queue.pop_front();
        inbox.busy = event.is_some();
        event
    }

    fn arm(self: &Arc<Self>, at_ms: u64) {
        if self.armed_ms.fetch_min(at_ms, Ordering::SeqCst) > at_ms {
            let timed: Arc<dyn Timed> = Arc::clone(self) as Arc<dyn Timed>;
            self.pulse.schedule(at_ms, Arc::downgrade(&timed));
        }
    }
}

impl<M: Machine> Timed for Actor<M> {
    fn fire(self: Arc<Self>) {
        self.armed_ms.store(UNARMED, Ordering::SeqCst);
        let timeout = lock(&self.machine).next_timeout();
        match timeout {
            Some(at_ms) if at_ms <= now_ms() => self.post(M::tick()),
            Some(at_ms) => self.arm(at_ms),
            None => {}
        }
    }
}

/// A machine that panicked has lost an invariant and would hang every request: the process ends instead, and the
/// protocol treats it as the crash it is.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        tracing::error!("a state machine of the data process broke an invariant: aborting");
        std::process::abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
