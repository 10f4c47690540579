//! One io_uring, its thread, and the handle through which any thread submits.
//!
//! ```text
//! any thread ── submit ──> queue (bounded) ──> ring thread ── SQEs in batches ──> kernel
//!                             │ eventfd, only                     │
//!                             │ when the thread sleeps            └─ completions ──> callbacks on the ring thread
//! ```
//!
//! A handle is cheap to clone. When the last one is dropped the thread finishes what was submitted and ends. What a
//! thread with a ring of its own submits stays on that thread, see [`crate::thread_ring`].

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::aligned::AlignedBuf;
use crate::{ring_thread, thread_ring};

/// Requests that may wait for a place in the kernel's queue; one more is answered `EAGAIN` at once.
pub const QUEUE_MAX: usize = 16 * 1024;

/// An error number of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// How far a write goes before it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The disk may hold it in its volatile cache; [`Ring::sync_data`] makes it durable.
    Cached,
    /// On stable storage (`RWF_DSYNC`).
    Durable,
}

/// Called once, on the ring thread or on the thread that submitted (see [`crate::thread_ring`]); it must not block. It may
/// submit again.
pub type RingDone<T> = Box<dyn FnOnce(Result<T, Errno>) + Send>;

/// Settings of a ring.
#[derive(Debug, Clone, Copy)]
pub struct RingOptions {
    /// Requests in the kernel at a time; further ones wait in the queue.
    pub entries: u32,
}

impl Default for RingOptions {
    fn default() -> Self {
        Self { entries: 256 }
    }
}

/// Handle of a running ring.
#[derive(Clone)]
pub struct Ring {
    owner: Arc<Owner>,
}

impl Ring {
    /// Starts a ring and its thread. Fails where the kernel or a sandbox forbids io_uring.
    pub fn start(options: RingOptions) -> io::Result<Self> {
        let wake =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(io::Error::from)?;
        let shared = Arc::new(Shared {
            queue: Mutex::new(VecDeque::with_capacity(1024)),
            wake,
            sleeping: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let thread = ring_thread::spawn(Arc::clone(&shared), options)?;
        Ok(Self { owner: Arc::new(Owner { shared, thread: Mutex::new(Some(thread)) }) })
    }

    /// Fills `buf` from `offset`. Offset, length and memory must suit the file's direct I/O.
    ///
    /// Ends beyond the end of the file are an error (`EIO`): a file cut short must not read as zeroes.
    pub fn read(&self, file: &Arc<File>, offset: u64, buf: AlignedBuf, done: RingDone<AlignedBuf>) {
        self.submit(Request { file: Arc::clone(file), offset, op: Op::Read { buf, done } });
    }

    /// Writes all of `data` at `offset`. The memory must suit the file's direct I/O (see [`crate::into_aligned`]).
    pub fn write(
        &self,
        file: &Arc<File>,
        offset: u64,
        data: Bytes,
        durability: Durability,
        done: RingDone<()>,
    ) {
        self.submit(Request { file: Arc::clone(file), offset, op: Op::Write { data, durability, done } });
    }

    /// `fdatasync`: every write answered before this call is durable when it is answered.
    pub fn sync_data(&self, file: &Arc<File>, done: RingDone<()>) {
        self.submit(Request { file: Arc::clone(file), offset: 0, op: Op::SyncData { done } });
    }

    /// Gives the range's space back; it reads as zeroes. The file keeps its length.
    pub fn punch(&self, file: &Arc<File>, offset: u64, len: u64, done: RingDone<()>) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.submit(Request { file: Arc::clone(file), offset, op: Op::Fallocate { len, mode, done } });
    }

    /// Reserves space for the range; what was never written reads as zeroes. The file keeps its length.
    pub fn allocate(&self, file: &Arc<File>, offset: u64, len: u64, done: RingDone<()>) {
        let mode = libc::FALLOC_FL_KEEP_SIZE;
        self.submit(Request { file: Arc::clone(file), offset, op: Op::Fallocate { len, mode, done } });
    }

    /// [`Ring::read`] for async callers. Dropping the future does not stop the I/O.
    pub async fn read_at(&self, file: &Arc<File>, offset: u64, buf: AlignedBuf) -> Result<AlignedBuf, Errno> {
        answer(|done| self.read(file, offset, buf, done)).await
    }

    /// [`Ring::write`] for async callers. Dropping the future does not stop the I/O.
    pub async fn write_at(
        &self,
        file: &Arc<File>,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), Errno> {
        answer(|done| self.write(file, offset, data, durability, done)).await
    }

    /// [`Ring::sync_data`] for async callers.
    pub async fn fdatasync(&self, file: &Arc<File>) -> Result<(), Errno> {
        answer(|done| self.sync_data(file, done)).await
    }

    fn submit(&self, request: Request) {
        let Some(request) = thread_ring::take(request) else { return };
        let shared = &self.owner.shared;
        let refused = {
            let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.len() < QUEUE_MAX {
                queue.push_back(request);
                None
            } else {
                Some(request)
            }
        };
        match refused {
            Some(request) => request.op.fail(Errno(libc::EAGAIN)),
            None => shared.wake_if_sleeping(),
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ring")
    }
}

/// Turns a call that takes a callback into a future. A callback that is dropped unanswered gives `ECANCELED`.
async fn answer<T: Send + 'static>(call: impl FnOnce(RingDone<T>)) -> Result<T, Errno> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    call(Box::new(move |result| {
        let _ = sender.send(result);
    }));
    receiver.await.unwrap_or(Err(Errno(libc::ECANCELED)))
}

/// Ends the thread with the last handle.
struct Owner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _ = self.shared.wake.write(1);
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The last handle may be held by a callback, which runs on the ring thread: that one cannot wait for
            // itself, and ends right after.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("the I/O ring's thread panicked");
            }
        }
    }
}

/// What handles and thread share.
pub(crate) struct Shared {
    pub(crate) queue: Mutex<VecDeque<Request>>,
    pub(crate) wake: EventFd,
    /// Set by the thread before it looks at the queue a last time and waits in the kernel.
    pub(crate) sleeping: AtomicBool,
    pub(crate) stop: AtomicBool,
}

impl Shared {
    fn wake_if_sleeping(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // EAGAIN means the counter is full: the thread is awake then.
            let _ = self.wake.write(1);
        }
    }
}

/// One I/O, with all memory the kernel needs while it runs.
pub(crate) struct Request {
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
    pub(crate) op: Op,
}

pub(crate) enum Op {
    Read { buf: AlignedBuf, done: RingDone<AlignedBuf> },
    Write { data: Bytes, durability: Durability, done: RingDone<()> },
    SyncData { done: RingDone<()> },
    Fallocate { len: u64, mode: i32, done: RingDone<()> },
}

impl Request {
    pub(crate) fn fd(&self) -> io_uring::types::Fd {
        io_uring::types::Fd(self.file.as_raw_fd())
    }
}

impl Request {
    /// Whether it reads or writes at most so many bytes.
    pub(crate) fn is_small(&self, bytes_max: usize) -> bool {
        match &self.op {
            Op::Read { buf, .. } => buf.len() <= bytes_max,
            Op::Write { data, .. } => data.len() <= bytes_max,
            Op::SyncData { .. } | Op::Fallocate { .. } => false,
        }
    }
}

impl Op {
    pub(crate) fn fail(self, errno: Errno) {
        match self {
            Op::Read { done, .. } => done(Err(errno)),
            Op::Write { done, .. } | Op::SyncData { done } | Op::Fallocate { done, .. } => done(Err(errno)),
        }
    }

    pub(crate) fn succeed(self) {
        match self {
            Op::Read { buf, done } => done(Ok(buf)),
            Op::Write { done, .. } | Op::SyncData { done } | Op::Fallocate { done, .. } => done(Ok(())),
        }
    }
}
