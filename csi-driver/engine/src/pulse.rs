//! The timer thread: it never waits for a disk or a socket, so that heartbeats go out whatever those do.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::clock::now_ms;

/// Something with a timeout.
pub trait Timed: Send + Sync {
    /// The time came. Must not block.
    fn fire(self: Arc<Self>);
}

/// Handle of the timer thread; the thread ends with the last clone.
#[derive(Clone)]
pub struct Pulse {
    owner: Arc<Owner>,
}

struct Owner {
    shared: Arc<Shared>,
}

struct Shared {
    // Bounded by machines times timers each armed to be earlier than the last: a handful per machine.
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    due: BinaryHeap<Reverse<(u64, u64)>>,
    waiting: BTreeMap<u64, Weak<dyn Timed>>,
    next_key: u64,
    stopped: bool,
}

impl Pulse {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel gives no thread.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), wake: Condvar::new() });
        let runner = Arc::clone(&shared);
        std::thread::Builder::new().name("hf-pulse".to_owned()).spawn(move || runner.run())?;
        Ok(Self { owner: Arc::new(Owner { shared }) })
    }

    /// Calls [`Timed::fire`] once at `at_ms` (of [`now_ms`]) or soon after, if it still lives.
    pub fn schedule(&self, at_ms: u64, timed: Weak<dyn Timed>) {
        let shared = &self.owner.shared;
        let mut state = shared.lock();
        let key = state.next_key;
        state.next_key += 1;
        let first = state.due.peek().is_none_or(|Reverse((due, _))| at_ms < *due);
        state.due.push(Reverse((at_ms, key)));
        state.waiting.insert(key, timed);
        drop(state);
        if first {
            shared.wake.notify_one();
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.stopped {
            let Some(Reverse((at_ms, key))) = state.due.peek().copied() else {
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let now = now_ms();
            if at_ms > now {
                let rest = Duration::from_millis(at_ms - now);
                state = self.wake.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            state.due.pop();
            let timed = state.waiting.remove(&key).and_then(|timed| timed.upgrade());
            drop(state);
            if let Some(timed) = timed {
                timed.fire();
            }
            state = self.lock();
        }
    }
}
