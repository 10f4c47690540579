//! The control thread of an open replica: meta, cookie, intent log and dirty maps, one operation after the other.
//!
//! These are small, rare and must take effect in the order they were asked for, so one thread per replica does them
//! with blocking calls. Log additions that queue up while one is written share the next write.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use holdfast_io::Errno;
use holdfast_storage_core::dirty_map::{DirtyMap, RegionBits};
use holdfast_storage_core::ids::{BLOCK_BYTES, Region, ReplicaId};
use holdfast_storage_core::replica::ReplicaMeta;

use crate::data::DataPath;
use crate::error::StoreError;
use crate::intent_log::IntentLog;
use crate::layout::{PAGE_BYTES, STATES_PER_PAGE, TablePage};
use crate::map_file::MapFiles;
use crate::meta_file::{MetaError, MetaFile};
use crate::replica::Done;
use crate::tables::count_allocated;

/// Operations that may wait; one more is answered [`StoreError::Busy`].
const WAITING_MAX: usize = 8192;

/// One operation.
pub enum ControlOp {
    /// Replace the meta.
    PersistMeta(Box<ReplicaMeta>, Done),
    /// Write the cookie's copy.
    SetBootCookie(u64, Done),
    /// Remove the cookie's copy.
    RemoveBootCookie(Done),
    /// Put regions into the log.
    LogAdd(Vec<Region>, Done),
    /// Take regions out of the log.
    LogRemove(Vec<Region>, Done),
    /// Replace a dirty map.
    PutMap(ReplicaId, DirtyMap, Done),
    /// Change a dirty map.
    UpdateMap(ReplicaId, Vec<(Region, RegionBits)>, Done),
    /// Forget a dirty map.
    DropMap(ReplicaId, Done),
    /// Count blocks that are not absent.
    CountAllocated(Done<u64>),
    /// Let go of the files; the last operation.
    Close(Option<Done>),
}

impl ControlOp {
    fn refuse(self, error: StoreError) {
        match self {
            ControlOp::PersistMeta(_, done)
            | ControlOp::SetBootCookie(_, done)
            | ControlOp::RemoveBootCookie(done)
            | ControlOp::LogAdd(_, done)
            | ControlOp::LogRemove(_, done)
            | ControlOp::PutMap(_, _, done)
            | ControlOp::UpdateMap(_, _, done)
            | ControlOp::DropMap(_, done) => done(Err(error)),
            ControlOp::CountAllocated(done) => done(Err(error)),
            ControlOp::Close(Some(done)) => done(Ok(())),
            ControlOp::Close(None) => {}
        }
    }
}

/// The way into a replica's control thread.
#[derive(Clone)]
pub struct ControlQueue {
    replica: ReplicaId,
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<ControlOp>,
    closed: bool,
}

/// What the thread works on.
pub struct ControlFiles {
    /// The meta's slots.
    pub meta: MetaFile,
    /// The intent log.
    pub log: IntentLog,
    /// The dirty maps.
    pub maps: MapFiles,
    /// The data path, for cleanliness of regions and the cookie.
    pub data: Arc<DataPath>,
    /// Kept until the thread ends: the pool's lock and place in its list of open replicas.
    #[expect(dead_code, reason = "held for its drop")]
    pub keep: Box<dyn Send>,
}

impl ControlQueue {
    /// Starts the thread.
    pub fn start(files: ControlFiles) -> io::Result<Self> {
        let replica = files.data.replica();
        let shared = Arc::new(Shared { queue: Mutex::new(Queue::default()), arrived: Condvar::new() });
        let thread_shared = Arc::clone(&shared);
        let name = format!("hf-ctl-{:.6}", replica.to_string());
        std::thread::Builder::new()
            .name(name)
            .spawn(move || Worker { files, shared: thread_shared }.run())?;
        Ok(Self { replica, shared })
    }

    /// Queues an operation.
    pub fn push(&self, op: ControlOp) {
        let refused = {
            let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let is_close = matches!(op, ControlOp::Close(_));
            if queue.closed {
                Some((op, StoreError::Closed(self.replica)))
            } else if queue.ops.len() >= WAITING_MAX && !is_close {
                Some((op, StoreError::Busy(self.replica)))
            } else {
                queue.closed = is_close;
                queue.ops.push_back(op);
                None
            }
        };
        match refused {
            Some((op, error)) => op.refuse(error),
            None => self.shared.arrived.notify_one(),
        }
    }
}

struct Worker {
    files: ControlFiles,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(mut self) {
        loop {
            match self.next() {
                ControlOp::Close(done) => {
                    self.files.data.close_and_wait();
                    if let Err(error) = self.files.data.file().unlock() {
                        tracing::warn!(replica = %self.files.data.replica(), %error, "unlocking a layer failed");
                    }
                    // The files go before the answer, so that a caller may open the replica again.
                    drop(self);
                    if let Some(done) = done {
                        done(Ok(()));
                    }
                    return;
                }
                op if self.files.data.is_poisoned() && !matches!(op, ControlOp::RemoveBootCookie(_)) => {
                    op.refuse(StoreError::Poisoned(self.files.data.replica()));
                }
                ControlOp::LogAdd(regions, done) => self.log_add(regions, done),
                op => self.apply(op),
            }
        }
    }

    fn next(&self) -> ControlOp {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(op) = queue.ops.pop_front() {
                return op;
            }
            queue = self.shared.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn apply(&mut self, op: ControlOp) {
        match op {
            ControlOp::PersistMeta(meta, done) => {
                let result = self.persist_meta(&meta);
                done(result);
            }
            ControlOp::SetBootCookie(cookie, done) => {
                let set = self.files.data.cookie().set(cookie);
                done(set.map_err(|error| self.error("writing the cookie's copy", error)));
            }
            ControlOp::RemoveBootCookie(done) => {
                let removed = self.files.data.cookie().remove();
                done(removed.map_err(|error| self.error("removing the cookie's copy", error)));
            }
            ControlOp::LogRemove(regions, done) => {
                let result = self.log_remove(&regions);
                done(result);
            }
            ControlOp::PutMap(absent, map, done) => {
                let put = self.files.maps.put(absent, &map);
                done(self.or_poison("writing a dirty map", put));
            }
            ControlOp::UpdateMap(absent, regions, done) => {
                let result = self.update_map(absent, &regions);
                done(result);
            }
            ControlOp::DropMap(absent, done) => {
                let dropped = self.files.maps.drop_map(absent);
                done(self.or_poison("removing a dirty map", dropped));
            }
            ControlOp::CountAllocated(done) => {
                let counted = self.count_allocated();
                done(counted.map_err(|error| self.error("reading the allocation map", error)));
            }
            ControlOp::LogAdd(..) | ControlOp::Close(_) => unreachable!("the loop handles these itself"),
        }
    }

    fn persist_meta(&mut self, meta: &ReplicaMeta) -> Result<(), StoreError> {
        match self.files.meta.persist(meta) {
            Ok(()) => Ok(()),
            Err(MetaError::TooLarge(bytes)) => {
                Err(StoreError::MetaTooLarge { replica: self.files.data.replica(), bytes })
            }
            Err(MetaError::Io(error)) => self.or_poison("writing the meta", Err(error)),
        }
    }

    fn update_map(&mut self, absent: ReplicaId, regions: &[(Region, RegionBits)]) -> Result<(), StoreError> {
        let updated = self.files.maps.update(absent, regions);
        match self.or_poison("writing a dirty map", updated)? {
            true => Ok(()),
            false => Err(StoreError::NoMap { replica: self.files.data.replica(), absent }),
        }
    }

    /// Writes these regions and those of all additions that wait right behind, at once.
    fn log_add(&mut self, mut regions: Vec<Region>, done: Done) {
        let mut answers = vec![done];
        {
            let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(ControlOp::LogAdd(..)) = queue.ops.front() {
                if let Some(ControlOp::LogAdd(more, done)) = queue.ops.pop_front() {
                    regions.extend(more);
                    answers.push(done);
                }
            }
        }
        let added = self.files.log.add(&regions);
        let result = self.or_poison("writing the intent log", added);
        if result.is_ok() {
            self.files.data.log_added(regions);
        }
        for done in answers {
            done(result.clone());
        }
    }

    /// First everything that was written to the regions is made durable, then the bits go (R18).
    fn log_remove(&mut self, regions: &[Region]) -> Result<(), StoreError> {
        if self.files.data.any_unflushed(regions) {
            let (sender, receiver) = std::sync::mpsc::sync_channel(1);
            self.files.data.flush(Box::new(move |result| {
                let _ = sender.send(result);
            }));
            let closed = Err(StoreError::Closed(self.files.data.replica()));
            receiver.recv().unwrap_or(closed)?;
        }
        let clean = self.files.data.log_take_clean(regions);
        let removed = self.files.log.remove(&clean);
        self.or_poison("writing the intent log", removed)
    }

    /// Pages in memory are newer than those on disk.
    fn count_allocated(&self) -> io::Result<u64> {
        let pages = (self.files.data.size_bytes() / BLOCK_BYTES).div_ceil(STATES_PER_PAGE);
        let mut count = 0;
        for page in (0..pages).map(TablePage::States) {
            count += match self.files.data.cached_page(page) {
                Some(bytes) => count_allocated(&bytes),
                None => count_allocated(&self.files.data.file().read_now(page.file_offset(), PAGE_BYTES)?),
            };
        }
        Ok(count)
    }

    fn error(&self, action: &'static str, error: io::Error) -> StoreError {
        StoreError::Io { replica: self.files.data.replica(), action, errno: Errno::from(error) }
    }

    fn or_poison<T>(&self, action: &'static str, result: io::Result<T>) -> Result<T, StoreError> {
        result.map_err(|error| {
            self.files.data.poison();
            self.error(action, error)
        })
    }
}
