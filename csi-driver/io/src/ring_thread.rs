//! The thread behind a [`crate::Ring`]: queue to kernel, kernel to callbacks.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use io_uring::types::FsyncFlags;
use io_uring::{IoUring, opcode, squeue, types};

use crate::ring::{Durability, Errno, Op, Request, RingOptions, Shared};

/// Completion token of the poll on the eventfd; slots count up from 0.
const WAKE_TOKEN: u64 = u64::MAX;
/// `RWF_DSYNC` of `pwritev2(2)`: this one write is durable when it is answered.
const RWF_DSYNC: i32 = 0x0000_0002;

/// Builds the ring on its own thread (the kernel ties it to the first submitter) and reports whether that worked.
pub(crate) fn spawn(shared: Arc<Shared>, options: RingOptions) -> io::Result<JoinHandle<()>> {
    let (report, outcome) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("hf-ring".to_owned()).spawn(move || {
        match build(options.entries) {
            Ok(ring) => {
                let _ = report.send(Ok(()));
                Runner::new(ring, shared, options.entries as usize).run();
            }
            Err(error) => {
                let _ = report.send(Err(error));
            }
        }
    })?;
    outcome.recv().map_err(|_| io::Error::other("the I/O ring's thread died at its start"))??;
    Ok(thread)
}

fn build(entries: u32) -> io::Result<IoUring> {
    // Completions are handled when this thread asks for them, not by interrupting it (kernel 6.1 and later); older
    // kernels get the plain mode.
    let quiet =
        IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_submit_all().build(entries);
    match quiet {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().build(entries),
        other => other,
    }
}

struct Runner {
    ring: IoUring,
    shared: Arc<Shared>,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Requests taken from the queue in one go.
    batch: Vec<Request>,
    /// Slots whose request finished in this round, with the kernel's result.
    finished: Vec<(usize, i32)>,
    wake_armed: bool,
}

struct InFlight {
    request: Request,
    /// Bytes of a read or write that are done: the kernel may do a part only.
    progress: usize,
}

impl Runner {
    fn new(ring: IoUring, shared: Arc<Shared>, entries: usize) -> Self {
        // One entry stays free for the poll on the eventfd.
        let places = entries.saturating_sub(1).max(1);
        Self {
            ring,
            shared,
            slots: (0..places).map(|_| None).collect(),
            free: (0..places).rev().collect(),
            batch: Vec::with_capacity(places),
            finished: Vec::with_capacity(places),
            wake_armed: false,
        }
    }

    fn run(mut self) {
        loop {
            self.take_requests();
            if self.in_flight() == 0 && self.may_stop() {
                return;
            }
            self.arm_wake();
            if let Err(error) = self.enter()
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
            {
                // Without the ring no request can be answered truthfully any more.
                panic!("io_uring_enter failed: {error}");
            }
            self.reap();
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn may_stop(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst) && self.queue_is_empty()
    }

    fn queue_is_empty(&self) -> bool {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Moves waiting requests into free slots and writes their submission entries.
    fn take_requests(&mut self) {
        let room = self.free.len();
        {
            let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let count = room.min(queue.len());
            self.batch.extend(queue.drain(..count));
        }
        let mut batch = std::mem::take(&mut self.batch);
        for request in batch.drain(..) {
            let slot = self.free.pop().expect("no more requests are taken than slots are free");
            self.slots[slot] = Some(InFlight { request, progress: 0 });
            self.push_slot(slot);
        }
        self.batch = batch;
    }

    /// A poll on the eventfd ends the wait in the kernel when a new request arrives.
    fn arm_wake(&mut self) {
        if !self.wake_armed {
            let fd = types::Fd(self.shared.wake.as_fd().as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(WAKE_TOKEN);
            self.push_entry(&entry);
            self.wake_armed = true;
        }
    }

    fn enter(&mut self) -> io::Result<usize> {
        // Order matters: first say that a wake-up is wanted, then look at the queue a last time. A submitter pushes
        // first and looks at `sleeping` after, so one of the two sees the other.
        self.shared.sleeping.store(true, Ordering::SeqCst);
        let stopping = self.shared.stop.load(Ordering::SeqCst) && self.in_flight() == 0;
        let wait = if stopping || (!self.free.is_empty() && !self.queue_is_empty()) { 0 } else { 1 };
        let entered = self.ring.submit_and_wait(wait);
        self.shared.sleeping.store(false, Ordering::SeqCst);
        entered
    }

    fn reap(&mut self) {
        let mut finished = std::mem::take(&mut self.finished);
        for completion in self.ring.completion() {
            if completion.user_data() == WAKE_TOKEN {
                self.wake_armed = false;
                let _ = self.shared.wake.read();
            } else {
                let slot = usize::try_from(completion.user_data()).expect("a slot number fits a usize");
                finished.push((slot, completion.result()));
            }
        }
        for (slot, result) in finished.drain(..) {
            self.finish(slot, result);
        }
        self.finished = finished;
    }

    /// Takes the kernel's result: goes on where it did a part only, else answers.
    fn finish(&mut self, slot: usize, result: i32) {
        let in_flight = self.slots[slot].as_mut().expect("a completion names a slot in use");
        let outcome = match u32::try_from(result) {
            Ok(count) => in_flight.advance(count as usize),
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => Progress::Again,
            Err(_) => Progress::Failed(Errno(-result)),
        };
        let again = match outcome {
            Progress::Again => true,
            Progress::Done | Progress::Failed(_) => false,
        };
        if again {
            self.push_slot(slot);
            return;
        }
        let request = self.slots[slot].take().expect("looked at above").request;
        self.free.push(slot);
        match outcome {
            Progress::Failed(errno) => request.op.fail(errno),
            Progress::Done | Progress::Again => request.op.succeed(),
        }
    }

    fn push_slot(&mut self, slot: usize) {
        let in_flight = self.slots[slot].as_mut().expect("only a slot in use is pushed");
        let entry = in_flight.entry().user_data(slot as u64);
        self.push_entry(&entry);
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the entry's file and memory live in `slots` (or in `shared`) until its completion was reaped;
            // a buffer's heap memory does not move with its owner.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            // Full: resubmissions of partial I/O came on top of a full batch. Hand over and try again.
            if let Err(error) = self.ring.submit()
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
            {
                panic!("io_uring_enter failed: {error}");
            }
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            // Only a panic on this thread gets here. The kernel still reads and writes the buffers in `slots`: to
            // free them would corrupt memory, to leak them would leave callers waiting for ever.
            tracing::error!("the I/O ring's thread panicked with I/O in flight: aborting");
            std::process::abort();
        }
    }
}

enum Progress {
    Done,
    Again,
    Failed(Errno),
}

impl InFlight {
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
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::Durable => RWF_DSYNC,
                };
                opcode::Write::new(fd, rest.as_ptr(), length(rest.len()))
                    .offset(offset)
                    .rw_flags(flags)
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
