//! Flush: the changed pages of the tables, then one `fdatasync` over them and the data.
//!
//! Where a block's place in the file held something else than the block read as before its write (it was zeroed with its
//! space kept, is in a snapshot, or was bad), data go first, with an `fdatasync` of their own: an entry that is there before
//! its data would make a crash bring back what the place held (P2).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use holdfast_io::{AlignedBuf, Errno};

use super::{DataPath, DataState, InFlight};
use crate::disk::DiskFile;
use crate::error::StoreError;
use crate::replica::Done;

/// Table pages written at a time; the rest waits for its turn, so that a flush cannot fill the ring's queue.
const PAGES_IN_FLIGHT_MAX: usize = 64;

/// Flushes that run or wait. One runs at a time; all that arrive meanwhile share the next one, as writes answered
/// since the first began are not in it.
#[derive(Default)]
pub struct FlushState {
    running: bool,
    waiting: Vec<(InFlight, Done)>,
    /// The next flush must make data durable before it writes the tables.
    pub(super) data_first: bool,
}

/// A flush on its way.
struct Flush {
    path: Arc<DataPath>,
    /// The layer that took the writes when the flush began. Those below have nothing unflushed.
    file: DiskFile,
    /// Regions that changed last before this are clean afterwards.
    covers_until: u64,
    pages: Mutex<Pages>,
    served: Mutex<Vec<(InFlight, Done)>>,
}

struct Pages {
    to_write: VecDeque<(u64, AlignedBuf)>,
    in_flight: usize,
    failed: Option<Errno>,
    /// Set once by whoever sees the last page written.
    ended: bool,
}

impl DataPath {
    /// See [`crate::Replica::flush`].
    pub fn flush(self: &Arc<Self>, done: Done) {
        let request = match self.begin() {
            Ok(request) => request,
            Err(error) => return done(Err(error)),
        };
        {
            let mut state = self.lock();
            state.flush.waiting.push((request, done));
            if state.flush.running {
                return;
            }
            state.flush.running = true;
        }
        self.run_flush();
    }

    /// Serves those who wait. Only called by whoever set `running`.
    fn run_flush(self: &Arc<Self>) {
        let (flush, nothing_to_do, data_first) = {
            let mut state = self.lock();
            let served = std::mem::take(&mut state.flush.waiting);
            let data_first = std::mem::take(&mut state.flush.data_first);
            let pages = Pages {
                to_write: state.stack.top_mut().tables.take_dirty().into(),
                in_flight: 0,
                failed: None,
                ended: false,
            };
            let nothing_to_do = pages.to_write.is_empty() && state.unflushed.is_empty();
            if !nothing_to_do {
                state.shadow.switch();
            }
            let flush = Flush {
                path: Arc::clone(self),
                file: state.stack.top().file.clone(),
                covers_until: state.change_seq,
                pages: Mutex::new(pages),
                served: Mutex::new(served),
            };
            (Arc::new(flush), nothing_to_do, data_first)
        };
        match (nothing_to_do, data_first) {
            (true, _) => flush.finish(Ok(())),
            (false, false) => flush.write_pages(),
            (false, true) => flush.sync(Flush::write_pages),
        }
    }
}

impl Flush {
    /// Keeps page writes going; syncs when the last one ended.
    fn write_pages(self: Arc<Self>) {
        loop {
            let next = {
                let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
                let (failed, all_written) = (pages.failed, pages.to_write.is_empty());
                if pages.in_flight == 0 && (all_written || failed.is_some()) {
                    if std::mem::replace(&mut pages.ended, true) {
                        return;
                    }
                    drop(pages);
                    return match failed {
                        Some(errno) => self.finish(Err(("writing checksums and allocation map", errno))),
                        None => self.sync(|flush| flush.finish(Ok(()))),
                    };
                }
                if failed.is_some() || pages.in_flight >= PAGES_IN_FLIGHT_MAX {
                    return;
                }
                let Some(next) = pages.to_write.pop_front() else { return };
                pages.in_flight += 1;
                next
            };
            let flush = Arc::clone(&self);
            let (offset, page) = next;
            self.file.write(offset, page.into_bytes(), Box::new(move |result| flush.page_written(result)));
        }
    }

    fn page_written(self: Arc<Self>, result: Result<(), Errno>) {
        {
            let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
            pages.in_flight -= 1;
            if let Err(errno) = result {
                pages.failed.get_or_insert(errno);
            }
        }
        self.write_pages();
    }

    fn sync(self: Arc<Self>, then: fn(Arc<Self>)) {
        let flush = Arc::clone(&self);
        self.file.clone().sync(Box::new(move |result| match result {
            Ok(()) => then(flush),
            Err(errno) => flush.finish(Err(("syncing", errno))),
        }));
    }

    /// Answers all that were served, then lets the next flush run.
    fn finish(self: Arc<Self>, result: Result<(), (&'static str, Errno)>) {
        let outcome = match result {
            Ok(()) => Ok(()),
            Err((action, errno)) => {
                self.path.poison();
                Err(self.path.io_error(action, errno))
            }
        };
        let again = {
            let mut state = self.path.lock();
            if outcome.is_ok() {
                state.forget_flushed(self.covers_until);
                state.shadow.drop_old();
            }
            state.flush.running = !state.flush.waiting.is_empty();
            state.flush.running
        };
        let served = std::mem::take(&mut *self.served.lock().unwrap_or_else(PoisonError::into_inner));
        for (request, done) in served {
            request.answer(outcome.clone(), done);
        }
        if again {
            if self.path.is_poisoned() { self.path.refuse_waiting() } else { self.path.run_flush() }
        }
    }
}

impl DataPath {
    /// The handle was poisoned while these waited.
    fn refuse_waiting(self: &Arc<Self>) {
        let waiting = {
            let mut state = self.lock();
            state.flush.running = false;
            std::mem::take(&mut state.flush.waiting)
        };
        for (request, done) in waiting {
            request.answer(Err(StoreError::Poisoned(self.replica)), done);
        }
    }
}

impl DataState {
    /// Regions without a change after `covers_until` and without one in flight are clean.
    fn forget_flushed(&mut self, covers_until: u64) {
        self.unflushed.retain(|_, region| region.in_flight > 0 || region.last_change > covers_until);
    }
}
