//! The control thread of an open replica: meta, cookie, intent log and dirty maps, one operation after the other.
//!
//! These are small, rare and must take effect in the order they were asked for, so one thread per replica does them
//! with blocking calls. Log additions that queue up while one is written share the next write.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_io::Errno;
use holdfast_storage_core::dirty_map::{DirtyMap, RegionBits};
use holdfast_storage_core::ids::{BLOCK_BYTES, Block, Region, ReplicaId, SnapshotId};
use holdfast_storage_core::record_copy::RecordCopy;
use holdfast_storage_core::replica::ReplicaMeta;

use crate::data::DataPath;
use crate::error::StoreError;
use crate::intent_log::IntentLog;
use crate::layout::{PAGE_BYTES, STATES_PER_PAGE, TablePage, region_count};
use crate::map_file::MapFiles;
#[cfg(test)]
use crate::merge::{Merger, Step};
use crate::merge_thread::{MergeThread, Pace};
use crate::meta_file::{MetaError, MetaFile};
use crate::record_file::RecordFile;
use crate::replica::Done;
use crate::stack_files::StackFiles;
use crate::tables::{add_states, count_allocated};

/// Operations that may wait; one more is answered [`StoreError::Busy`].
const WAITING_MAX: usize = 8192;

/// How often a replica without control requests is looked after.
const LOOK_AFTER_EVERY: Duration = Duration::from_secs(30);

/// One operation.
pub enum ControlOp {
    /// Replace the meta.
    PersistMeta(Box<ReplicaMeta>, Done),
    /// Write the cookie's copy.
    SetBootCookie(u64, Done),
    /// Remove the cookie's copy.
    RemoveBootCookie(Done),
    /// Keep a copy of the volume's record.
    KeepRecord(RecordCopy, Done),
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
    /// Freeze the top layer as a snapshot.
    Freeze(SnapshotId, Done),
    /// Forget a snapshot.
    DropSnapshot(SnapshotId, Done),
    /// Grow to so many bytes.
    Grow(u64, Done),
    /// Find blocks of these regions that a crash left in doubt.
    Unverified(Vec<Region>, Done<Vec<Block>>),
    /// Give these blocks checksums that fit.
    Recompute(Vec<Block>, Done<u64>),
    /// Merge what there is to merge, step by step, before anything else is done.
    #[cfg(test)]
    Merge(Done),
    /// Let go of the files; the last operation.
    Close(Option<Done>),
}

impl ControlOp {
    fn refuse(self, error: StoreError) {
        match self {
            ControlOp::PersistMeta(_, done)
            | ControlOp::SetBootCookie(_, done)
            | ControlOp::RemoveBootCookie(done)
            | ControlOp::KeepRecord(_, done)
            | ControlOp::LogAdd(_, done)
            | ControlOp::LogRemove(_, done)
            | ControlOp::PutMap(_, _, done)
            | ControlOp::UpdateMap(_, _, done)
            | ControlOp::DropMap(_, done)
            | ControlOp::Freeze(_, done)
            | ControlOp::DropSnapshot(_, done)
            | ControlOp::Grow(_, done) => done(Err(error)),
            #[cfg(test)]
            ControlOp::Merge(done) => done(Err(error)),
            ControlOp::CountAllocated(done) | ControlOp::Recompute(_, done) => done(Err(error)),
            ControlOp::Unverified(_, done) => done(Err(error)),
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
    pace: Arc<Pace>,
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
    /// The copy of the volume's record.
    pub record: RecordFile,
    /// The intent log.
    pub log: IntentLog,
    /// The dirty maps.
    pub maps: MapFiles,
    /// The data path, for cleanliness of regions and the cookie.
    pub data: Arc<DataPath>,
    /// The stack of layers. Locked for one change, or one step of a merge, at a time.
    pub stack: Arc<Mutex<StackFiles>>,
    /// Kept until the thread ends: the pool's lock and place in its list of open replicas.
    #[expect(dead_code, reason = "held for its drop")]
    pub keep: Box<dyn Send>,
}

impl ControlQueue {
    /// Starts the thread.
    pub fn start(files: ControlFiles) -> io::Result<Self> {
        let replica = files.data.replica();
        let pace = Arc::new(Pace::default());
        let merges = MergeThread::new(Arc::clone(&pace));
        let shared = Arc::new(Shared { queue: Mutex::new(Queue::default()), arrived: Condvar::new() });
        let thread_shared = Arc::clone(&shared);
        let name = format!("hf-ctl-{:.6}", replica.to_string());
        std::thread::Builder::new()
            .name(name)
            .spawn(move || Worker { files, merges, shared: thread_shared, seen_activity: 0 }.run())?;
        Ok(Self { replica, shared, pace })
    }

    /// How fast merges go.
    pub fn pace(&self) -> &Pace {
        &self.pace
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
    merges: MergeThread,
    shared: Arc<Shared>,
    /// What [`DataPath::activity`] said at the last look.
    seen_activity: u64,
}

impl Worker {
    fn run(mut self) {
        self.wake_merges();
        loop {
            let Some(op) = self.next() else {
                self.look_after();
                continue;
            };
            match op {
                ControlOp::Close(done) => {
                    self.merges.stop();
                    self.files.data.close_and_wait();
                    if let Err(error) = self.files.data.top_file().unlock() {
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

    /// The next operation; none when it is time to [`Worker::look_after`] the replica.
    fn next(&self) -> Option<ControlOp> {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(op) = queue.ops.pop_front() {
                return Some(op);
            }
            let (woken, waited) = self
                .shared
                .arrived
                .wait_timeout(queue, LOOK_AFTER_EVERY)
                .unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return None;
            }
            queue = woken;
        }
    }

    /// Lets go of memory that an idle replica need not keep, and goes on with merges that had to wait.
    fn look_after(&mut self) {
        let activity = self.files.data.activity();
        if std::mem::replace(&mut self.seen_activity, activity) == activity {
            self.files.data.trim_tables();
        }
        self.wake_merges();
    }

    fn wake_merges(&mut self) {
        if self.stack().disk.has_threads() && !self.files.data.is_poisoned() {
            self.merges.wake(&self.files.stack, &self.files.data);
        }
    }

    #[cfg(test)]
    fn merge_now(&self) -> Result<(), StoreError> {
        let mut merger = Merger::new(Arc::clone(&self.files.stack), Arc::clone(&self.files.data));
        while let Step::Moved(_) = merger.step()? {}
        Ok(())
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
            ControlOp::KeepRecord(copy, done) => {
                let kept = self.files.record.keep(&copy);
                done(self.or_poison("keeping the record's copy", kept));
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
            ControlOp::Freeze(snapshot, done) => {
                let frozen = self.stack().freeze(snapshot);
                done(frozen);
            }
            ControlOp::DropSnapshot(snapshot, done) => {
                let dropped = self.stack().drop_snapshot(snapshot);
                self.wake_merges();
                done(dropped);
            }
            ControlOp::Unverified(regions, done) => done(self.files.data.unverified(&regions)),
            ControlOp::Recompute(blocks, done) => done(self.files.data.recompute(&blocks)),
            #[cfg(test)]
            ControlOp::Merge(done) => done(self.merge_now()),
            ControlOp::Grow(size_bytes, done) => {
                let grown = self.grow(size_bytes);
                done(grown);
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
            self.files.data.flush_and_wait()?;
        }
        let clean = self.files.data.log_take_clean(regions);
        let removed = self.files.log.remove(&clean);
        self.or_poison("writing the intent log", removed)
    }

    /// R31: layers, log and maps first, each durable, then the manifest, which makes it count.
    fn grow(&mut self, size_bytes: u64) -> Result<(), StoreError> {
        if !self.stack().check_growth(size_bytes)? {
            return Ok(());
        }
        self.stack().grow_top_file(size_bytes)?;
        let log_grown = self.files.log.grow(region_count(size_bytes));
        self.full_or_poison("growing the intent log", log_grown)?;
        let maps_grown = self.files.maps.grow(size_bytes / BLOCK_BYTES);
        self.full_or_poison("growing a dirty map", maps_grown)?;
        self.stack().finish_growth(size_bytes)
    }

    fn stack(&self) -> MutexGuard<'_, StackFiles> {
        self.files.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block counts once, however many layers have it. Pages in memory are newer than those on disk.
    fn count_allocated(&self) -> io::Result<u64> {
        let pages = (self.files.data.size_bytes() / BLOCK_BYTES).div_ceil(STATES_PER_PAGE);
        let layers = self.files.data.files();
        let mut count = 0;
        for page in (0..pages).map(TablePage::States) {
            let mut union = vec![0; PAGE_BYTES];
            for (number, file) in &layers {
                add_states(&mut union, &self.files.data.page_now(*number, file, page)?);
            }
            count += count_allocated(&union);
        }
        Ok(count)
    }

    fn full_or_poison(&self, action: &'static str, result: io::Result<()>) -> Result<(), StoreError> {
        match result {
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOSPC | nix::libc::EDQUOT)) => {
                Err(StoreError::NoSpace(self.files.data.replica()))
            }
            other => self.or_poison(action, other),
        }
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
