//! An io_uring with the I/O that is in it: requests in, kernel results out. Whoever owns it drives it from one thread.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::types::FsyncFlags;
use io_uring::{IoUring, opcode, squeue};

use crate::ring::{Durability, Errno, Op, Request};

/// `IORING_ENTER_GETEVENTS`: lets the kernel put what has ended into the completion queue.
const ENTER_GETEVENTS: u32 = 1;

/// The ring and a slot for each I/O in the kernel.
pub(crate) struct RingCore {
    pub(crate) ring: IoUring,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Completions of one round, with the kernel's results.
    completed: Vec<(u64, i32)>,
}

/// An I/O that ended; to be answered when nothing of the ring is borrowed, as the answer may submit again.
pub(crate) struct Finished {
    op: Op,
    result: Result<(), Errno>,
}

impl Finished {
    /// Calls the request's callback.
    pub(crate) fn answer(self) {
        match self.result {
            Ok(()) => self.op.succeed(),
            Err(errno) => self.op.fail(errno),
        }
    }
}

struct InFlight {
    request: Request,
    /// Bytes of a read or write that are done: the kernel may do a part only.
    progress: usize,
}

enum Progress {
    Done,
    Again,
    Failed(Errno),
}

impl RingCore {
    /// A ring for `entries` I/Os at a time. The kernel ties it to the calling thread.
    pub(crate) fn build(entries: u32) -> io::Result<Self> {
        // Completions are handled when this thread asks for them, not by interrupting it (kernel 6.1 and later); older
        // kernels get the plain mode.
        let quiet = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(entries);
        let ring = match quiet {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().build(entries),
            other => other,
        }?;
        // One entry stays free for a poll of the owner's.
        let places = (entries as usize).saturating_sub(1).max(1);
        Ok(Self {
            ring,
            slots: (0..places).map(|_| None).collect(),
            free: (0..places).rev().collect(),
            completed: Vec::with_capacity(places),
        })
    }

    /// I/Os that the kernel has.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// I/Os that may be pushed on top.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// Writes a request's submission entry; at most [`RingCore::room`] at a time. The next enter hands it over.
    pub(crate) fn push(&mut self, request: Request) {
        self.push_rest(InFlight { request, progress: 0 });
    }

    /// Does a read or write at once, blocking; what the kernel left of it goes into the ring.
    pub(crate) fn run_blocking(&mut self, request: Request) -> Option<Finished> {
        let mut in_flight = InFlight { request, progress: 0 };
        let result = in_flight.call();
        let result = match in_flight.took(result) {
            Progress::Done => Ok(()),
            Progress::Failed(errno) => Err(errno),
            Progress::Again => {
                self.push_rest(in_flight);
                return None;
            }
        };
        Some(Finished { op: in_flight.request.op, result })
    }

    fn push_rest(&mut self, in_flight: InFlight) {
        let slot = self.free.pop().expect("no more requests are pushed than slots are free");
        self.slots[slot] = Some(in_flight);
        self.push_slot(slot);
    }

    /// Hands over what was pushed and takes in what has ended, without waiting.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        let (pushed, wanted) = {
            let queue = self.ring.submission();
            (queue.len(), queue.taskrun() || queue.cq_overflow())
        };
        if pushed == 0 && !wanted {
            return Ok(());
        }
        let pushed = u32::try_from(pushed).expect("a ring has at most 32,768 entries");
        // SAFETY: no argument is passed; the entries' memory lives in `slots`.
        let entered =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(pushed, 0, ENTER_GETEVENTS, None) };
        entered.map(drop)
    }

    /// Hands over what was pushed and waits until `count` completions are there.
    pub(crate) fn enter_and_wait(&mut self, count: usize) -> io::Result<()> {
        self.ring.submit_and_wait(count).map(drop)
    }

    /// Takes completions: those of I/Os go to `finished`, the others' tokens to `other`.
    pub(crate) fn reap(&mut self, finished: &mut Vec<Finished>, mut other: impl FnMut(u64)) {
        let mut completed = std::mem::take(&mut self.completed);
        completed.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        for (token, result) in completed.drain(..) {
            match usize::try_from(token).ok().filter(|slot| *slot < self.slots.len()) {
                Some(slot) => finished.extend(self.finish(slot, result)),
                None => other(token),
            }
        }
        self.completed = completed;
    }

    /// Takes the kernel's result: goes on where it did a part only.
    fn finish(&mut self, slot: usize, result: i32) -> Option<Finished> {
        let in_flight = self.slots[slot].as_mut().expect("a completion names a slot in use");
        let outcome = in_flight.took(result);
        if let Progress::Again = outcome {
            self.push_slot(slot);
            return None;
        }
        let InFlight { request, .. } = self.slots[slot].take().expect("looked at above");
        self.free.push(slot);
        let result = match outcome {
            Progress::Failed(errno) => Err(errno),
            Progress::Done | Progress::Again => Ok(()),
        };
        Some(Finished { op: request.op, result })
    }

    fn push_slot(&mut self, slot: usize) {
        let in_flight = self.slots[slot].as_mut().expect("only a slot in use is pushed");
        let entry = in_flight.entry().user_data(slot as u64);
        self.push_entry(&entry);
    }

    /// For entries of the owner's own; their tokens lie above every slot.
    pub(crate) fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the entry's file and memory live in `slots` (or with the owner) until its completion was reaped;
            // a buffer's heap memory does not move with its owner.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            // Full: resubmissions of partial I/O came on top of a full batch. Hand over and try again.
            if let Err(error) = self.ring.submit()
                && !is_passing(&error)
            {
                panic!("io_uring_enter failed: {error}");
            }
        }
    }
}

impl Drop for RingCore {
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            // Only a panic gets here, or a thread that ended without draining its ring. The kernel still reads
            // and writes the buffers in `slots`: to free them would corrupt memory, to leak them would leave callers
            // waiting for ever.
            tracing::error!("the owner of an I/O ring ended with I/O in flight: aborting");
            std::process::abort();
        }
    }
}

/// Errors of io_uring_enter after which trying again is right.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

impl Durability {
    /// For `pwritev2(2)`.
    fn flags(self) -> i32 {
        match self {
            Durability::Cached => 0,
            Durability::Durable => libc::RWF_DSYNC,
        }
    }
}

impl InFlight {
    fn took(&mut self, result: i32) -> Progress {
        match u32::try_from(result) {
            Ok(count) => self.advance(count as usize),
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => Progress::Again,
            Err(_) => Progress::Failed(Errno(-result)),
        }
    }

    /// Counts what the kernel did. A read that gets nothing met the end of the file; a write that puts nothing is
    /// taken for a full disk.
    fn advance(&mut self, count: usize) -> Progress {
        let (wanted, nothing) = match &self.request.op {
            Op::Read { buf, .. } => (buf.len(), Errno(libc::EIO)),
            Op::Write { data, .. } => (data.len(), Errno(libc::ENOSPC)),
            Op::SyncData { .. } | Op::Fallocate { .. } => return Progress::Done,
        };
        self.progress += count;
        if self.progress >= wanted {
            Progress::Done
        } else if count == 0 {
            Progress::Failed(nothing)
        } else {
            Progress::Again
        }
    }

    /// The system call of a read or write; its result as io_uring would give it.
    fn call(&mut self) -> i32 {
        let fd = self.request.file.as_raw_fd();
        let Ok(offset) = i64::try_from(self.request.offset) else { return -libc::EFBIG };
        let done = match &mut self.request.op {
            // SAFETY: the buffer is borrowed for the whole call and as long as said.
            Op::Read { buf, .. } => unsafe { libc::pread(fd, buf.as_mut_ptr().cast(), buf.len(), offset) },
            Op::Write { data, durability, .. } => {
                let part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
                // SAFETY: the one iovec names memory that outlives the call and that the kernel only reads.
                unsafe { libc::pwritev2(fd, &raw const part, 1, offset, durability.flags()) }
            }
            Op::SyncData { .. } | Op::Fallocate { .. } => return -libc::EINVAL,
        };
        if done < 0 {
            -Errno::from(io::Error::last_os_error()).0
        } else {
            i32::try_from(done).unwrap_or(i32::MAX)
        }
    }

    fn entry(&mut self) -> squeue::Entry {
        let fd = self.request.fd();
        let offset = self.request.offset + self.progress as u64;
        match &mut self.request.op {
            Op::Read { buf, .. } => {
                let rest = &mut buf[self.progress..];
                opcode::Read::new(fd, rest.as_mut_ptr(), length(rest.len())).offset(offset).build()
            }
            Op::Write { data, durability, .. } => {
                let rest = &data[self.progress..];
                opcode::Write::new(fd, rest.as_ptr(), length(rest.len()))
                    .offset(offset)
                    .rw_flags(durability.flags())
                    .build()
            }
            Op::SyncData { .. } => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Op::Fallocate { len, mode, .. } => {
                opcode::Fallocate::new(fd, *len).offset(offset).mode(*mode).build()
            }
        }
    }
}

/// A length for the kernel, which does at most 2 GiB at a time anyway; the rest follows as partial I/O.
fn length(bytes: usize) -> u32 {
    const LENGTH_MAX: usize = 1 << 30;
    u32::try_from(bytes.min(LENGTH_MAX)).expect("1 GiB fits 32 bits")
}
