//! A ring that belongs to a thread which also does other work, such as the sockets of a volume: what such a thread
//! submits is handed to the kernel by itself and answered on itself, so that an I/O wakes no other thread.
//!
//! ```text
//!  the thread: sockets ─> submit ─> pending ─ pump, before it sleeps ─> kernel
//!                 ^                                                       │ eventfd wakes the thread
//!                 └──────────── callbacks <─────────── pump <─────────────┘
//! ```
//!
//! Every [`crate::Ring`] hands requests over that are submitted on such a thread. The thread calls [`pump`] before it
//! sleeps and whenever the descriptor is readable, and ends by [`drain`].

use std::cell::RefCell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{UsageWho, getrusage};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::core::{Finished, RingCore, is_passing};
use crate::ring::{QUEUE_MAX, Request};

/// I/Os in the kernel at a time per thread; further ones wait in the thread.
const ENTRIES: u32 = 128;
/// A lone read or write of more bytes is queued too.
const LONE_BYTES_MAX: usize = 128 << 10;
/// After a request had to wait for a lone one, so many are queued before a lone one blocks again.
const QUEUED_AFTER_A_WAIT: u32 = 64;
/// So many requests are handed over at once, without waiting until the thread has nothing else to do.
const BATCH: usize = 16;

thread_local! {
    static RING: RefCell<Option<ThreadRing>> = const { RefCell::new(None) };
}

/// What a thread does with a read or write that is the only one and after which it would sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoneIo {
    /// It is queued as any other; the thread never waits for a disk.
    Queued,
    /// The thread waits for it in the system call: one wake-up instead of three (the kernel's completion worker, the
    /// thread, the thread's event loop). Events of the thread wait as long. Where that makes another request wait, as with
    /// more than one in flight, requests are queued for a while.
    Blocks,
}

struct ThreadRing {
    lone_io: LoneIo,
    /// Requests that are queued whatever is alone.
    queued_left: u32,
    /// How often the thread had slept when the last lone I/O ended.
    sleeps: Option<i64>,
    core: RingCore,
    /// At most [`QUEUE_MAX`]; one more is refused by [`take`] and goes to the shared ring, which answers EAGAIN if it
    /// is full as well.
    pending: VecDeque<Request>,
}

/// Tells a thread that its I/O has ended: its descriptor becomes readable, edge by edge. Reading from it is not needed.
#[derive(Debug)]
pub struct Ended(EventFd);

impl AsFd for Ended {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Ended {
    /// Calls [`pump`] whenever I/O has ended. For a tokio runtime of one thread, that of [`install`].
    ///
    /// # Errors
    /// The runtime cannot watch the descriptor.
    pub async fn pump_forever(self) -> io::Result<Infallible> {
        // SAFETY: the descriptor is owned by what is registered and stays the same.
        let ended = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) }?;
        loop {
            ended.readable().await?.clear_ready();
            pump();
        }
    }
}

/// Gives the calling thread a ring of its own.
///
/// # Errors
/// The kernel or a sandbox forbids io_uring, or the thread has a ring.
pub fn install(lone_io: LoneIo) -> io::Result<Ended> {
    RING.with_borrow_mut(|ring| {
        if ring.is_some() {
            return Err(io::Error::other("the thread has an I/O ring already"));
        }
        let ended = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let core = RingCore::build(ENTRIES)?;
        core.ring.submitter().register_eventfd(ended.as_fd().as_raw_fd())?;
        let pending = VecDeque::new();
        *ring = Some(ThreadRing { lone_io, queued_left: 0, sleeps: None, core, pending });
        Ok(Ended(ended))
    })
}

/// Hands waiting requests to the kernel and answers those that ended. Does nothing on a thread without a ring.
///
/// Callbacks run on this thread, before it returns; what they submit is handed over as well.
pub fn pump() {
    let mut finished = Vec::new();
    loop {
        let idle = RING.with_borrow_mut(|ring| ring.as_mut().is_none_or(|ring| ring.turn(&mut finished)));
        if idle && finished.is_empty() {
            return;
        }
        finished.drain(..).for_each(Finished::answer);
    }
}

/// Waits until every I/O of this thread has ended, answers it, and takes the ring away. Blocks.
pub fn drain() {
    loop {
        pump();
        let ring = RING.with_borrow_mut(|ring| match ring {
            Some(busy) if busy.core.in_flight() > 0 => {
                checked(busy.core.enter_and_wait(1));
                None
            }
            _ => Some(ring.take()),
        });
        if ring.is_some() {
            return;
        }
    }
}

/// Takes a request in; gives it back if the thread has no ring of its own or no room.
pub(crate) fn take(request: Request) -> Option<Request> {
    RING.with(|ring| {
        // Borrowed only while the thread is in the kernel for its ring, never while a callback runs.
        let Ok(mut ring) = ring.try_borrow_mut() else { return Some(request) };
        match &mut *ring {
            Some(ring) if ring.pending.len() < QUEUE_MAX => {
                ring.pending.push_back(request);
                if ring.pending.len().is_multiple_of(BATCH) {
                    ring.submit();
                }
                None
            }
            _ => Some(request),
        }
    })
}

impl ThreadRing {
    fn submit(&mut self) {
        let count = self.core.room().min(self.pending.len());
        for request in self.pending.drain(..count) {
            self.core.push(request);
        }
        checked(self.core.enter());
    }

    /// The request to wait for, if that is the thing to do.
    fn take_lone(&mut self) -> Option<Request> {
        let is_lone = self.lone_io == LoneIo::Blocks && self.pending.len() == 1 && self.core.in_flight() == 0;
        if !is_lone || !self.pending.front()?.is_small(LONE_BYTES_MAX) {
            return None;
        }
        if self.queued_left > 0 {
            self.queued_left -= 1;
            return None;
        }
        // Not slept since the last one: this request was there before that one ended.
        if self.sleeps.is_some() && self.sleeps == sleeps() {
            self.queued_left = QUEUED_AFTER_A_WAIT;
            return None;
        }
        self.pending.pop_front()
    }

    /// True if nothing is left to be handed over.
    fn turn(&mut self, finished: &mut Vec<Finished>) -> bool {
        match self.take_lone() {
            Some(lone) => {
                finished.extend(self.core.run_blocking(lone));
                self.sleeps = sleeps();
            }
            None => self.submit(),
        }
        self.core.reap(finished, |_| ());
        let may_push = !self.pending.is_empty() && self.core.room() > 0;
        !may_push && self.core.ring.submission().is_empty()
    }
}

/// How often the thread slept so far.
fn sleeps() -> Option<i64> {
    getrusage(UsageWho::RUSAGE_THREAD).ok().map(|usage| usage.voluntary_context_switches())
}

fn checked(entered: io::Result<()>) {
    if let Err(error) = entered
        && !is_passing(&error)
    {
        // Without the ring no request can be answered truthfully any more.
        panic!("io_uring_enter failed: {error}");
    }
}
