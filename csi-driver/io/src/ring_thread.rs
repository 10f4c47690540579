//! The thread behind a [`crate::Ring`]: queue to kernel, kernel to callbacks.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use io_uring::{opcode, types};

use crate::core::{Finished, RingCore, is_passing};
use crate::ring::{Request, RingOptions, Shared};

/// Completion token of the poll on the eventfd; slots count up from 0.
const WAKE_TOKEN: u64 = u64::MAX;

/// Builds the ring on its own thread (the kernel ties it to the first submitter) and reports whether that worked.
pub(crate) fn spawn(shared: Arc<Shared>, options: RingOptions) -> io::Result<JoinHandle<()>> {
    let (report, outcome) = std::sync::mpsc::sync_channel(1);
    let thread =
        std::thread::Builder::new().name("hf-ring".to_owned()).spawn(move || {
            match RingCore::build(options.entries) {
                Ok(core) => {
                    let _ = report.send(Ok(()));
                    Runner { core, shared, batch: Vec::new(), finished: Vec::new(), wake_armed: false }.run();
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                }
            }
        })?;
    outcome.recv().map_err(|_| io::Error::other("the I/O ring's thread died at its start"))??;
    Ok(thread)
}

struct Runner {
    core: RingCore,
    shared: Arc<Shared>,
    /// Requests taken from the queue in one go.
    batch: Vec<Request>,
    finished: Vec<Finished>,
    wake_armed: bool,
}

impl Runner {
    fn run(mut self) {
        loop {
            self.take_requests();
            if self.core.in_flight() == 0 && self.may_stop() {
                return;
            }
            self.arm_wake();
            if let Err(error) = self.enter()
                && !is_passing(&error)
            {
                // Without the ring no request can be answered truthfully any more.
                panic!("io_uring_enter failed: {error}");
            }
            self.reap();
        }
    }

    fn may_stop(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst) && self.queue_is_empty()
    }

    fn queue_is_empty(&self) -> bool {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Moves waiting requests into free slots and writes their submission entries.
    fn take_requests(&mut self) {
        {
            let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let count = self.core.room().min(queue.len());
            self.batch.extend(queue.drain(..count));
        }
        for request in self.batch.drain(..) {
            self.core.push(request);
        }
    }

    /// A poll on the eventfd ends the wait in the kernel when a new request arrives.
    fn arm_wake(&mut self) {
        if !self.wake_armed {
            let fd = types::Fd(self.shared.wake.as_fd().as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(WAKE_TOKEN);
            self.core.push_entry(&entry);
            self.wake_armed = true;
        }
    }

    fn enter(&mut self) -> io::Result<()> {
        // Order matters: first say that a wake-up is wanted, then look at the queue a last time. A submitter pushes
        // first and looks at `sleeping` after, so one of the two sees the other.
        self.shared.sleeping.store(true, Ordering::SeqCst);
        let stopping = self.shared.stop.load(Ordering::SeqCst) && self.core.in_flight() == 0;
        let wait = if stopping || (self.core.room() > 0 && !self.queue_is_empty()) { 0 } else { 1 };
        let entered = self.core.enter_and_wait(wait);
        self.shared.sleeping.store(false, Ordering::SeqCst);
        entered
    }

    fn reap(&mut self) {
        let (shared, wake_armed) = (&self.shared, &mut self.wake_armed);
        self.core.reap(&mut self.finished, |_wake| {
            *wake_armed = false;
            let _ = shared.wake.read();
        });
        self.finished.drain(..).for_each(Finished::answer);
    }
}
