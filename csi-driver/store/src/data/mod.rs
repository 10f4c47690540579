//! The data path of an open replica: reads of its stack of layers, writes, zeroes and flushes of the top one.
//!
//! Everything here is driven by callbacks: a caller's thread starts a request, the ring's thread carries it on. The
//! one lock is held for table look-ups only, never over I/O and never while a callback runs.
//!
//! ```text
//!  write: check ─> sums of the blocks ─> tables in memory ─> space for new blocks ─> data ─> table entries ─> answer
//!  read:  check ─> which layer has each block ─> data of the blocks that have any ─> verify ─> answer
//!  flush: copies of changed table pages ─> write them ─> one fdatasync ─> answer
//! ```
//!
//! While the stack changes at its top (a freeze, or the last step of a merge), a gate holds new writes back and those
//! begun are waited for; reads go on.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use holdfast_io::{AlignedBuf, Errno};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, Block, Region, ReplicaId};

use crate::cookie::BootCookie;
use crate::disk::DiskFile;
use crate::error::StoreError;
use crate::layout::{PAGE_BYTES, TablePage};
use crate::replica::Done;
use crate::shadow::{Appended, Shadow};
use crate::space::PoolSpace;
use crate::tables::{Entry, State};

mod flush;
mod maps;
mod moves;
mod read;
mod space;
mod stack;
mod switch;
mod verify;
mod write;
mod zero;

pub use moves::LayerHandle;
pub use stack::{Layer, Look};
pub use switch::Gate;

use flush::FlushState;
use space::Backed;
use stack::{Loading, Stack};

/// A replica's layers, open.
pub struct DataPath {
    replica: ReplicaId,
    size_bytes: AtomicU64,
    cookie: BootCookie,
    pool: Arc<PoolSpace>,
    poisoned: AtomicBool,
    closed: AtomicBool,
    state: Mutex<DataState>,
    /// Signalled when the last request in flight, or the last one that changes blocks, ended.
    idle: Condvar,
}

struct DataState {
    stack: Stack,
    loading: Loading,
    /// The intent log, as far as it is durable.
    logged: BTreeSet<Region>,
    /// Regions with writes in flight or not yet flushed.
    unflushed: HashMap<Region, RegionUse>,
    /// Counts changes of regions, to tell which a flush covers.
    change_seq: u64,
    flush: FlushState,
    backed: Backed,
    shadow: Shadow,
    in_flight: usize,
    changes_in_flight: usize,
    gate_closed: bool,
    /// Changes that wait at the gate: at most what the caller has in flight.
    held: Vec<Box<dyn FnOnce() + Send>>,
}

#[derive(Debug, Default)]
struct RegionUse {
    in_flight: u32,
    last_change: u64,
}

/// What a [`DataPath`] is made of.
pub struct DataParts {
    /// The replica.
    pub replica: ReplicaId,
    /// Its size.
    pub size_bytes: u64,
    /// Its layers, bottom first.
    pub layers: Vec<Layer>,
    /// Its cookie's copy in tmpfs.
    pub cookie: BootCookie,
    /// The pool's room.
    pub pool: Arc<PoolSpace>,
    /// The intent log found on disk.
    pub logged: BTreeSet<Region>,
    /// Keeps unflushed entries beyond this process.
    pub shadow: Shadow,
}

/// Whether the next flush must make data durable before it writes the tables; see [`flush`].
fn wants_data_first(before: Entry, entry: Entry, layered: bool) -> bool {
    entry.state == State::Data && before.place_differs(layered)
}

impl DataPath {
    /// Starts with empty tables.
    pub fn new(parts: DataParts) -> Arc<Self> {
        let DataParts { replica, size_bytes, layers, cookie, pool, logged, shadow } = parts;
        let stack = Stack::new(layers);
        let state = DataState {
            backed: Backed::new(stack.is_layered()),
            stack,
            loading: Loading::new(),
            logged,
            unflushed: HashMap::new(),
            change_seq: 0,
            flush: FlushState::default(),
            shadow,
            in_flight: 0,
            changes_in_flight: 0,
            gate_closed: false,
            held: Vec::new(),
        };
        Arc::new(Self {
            replica,
            size_bytes: AtomicU64::new(size_bytes),
            cookie,
            pool,
            poisoned: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            state: Mutex::new(state),
            idle: Condvar::new(),
        })
    }

    /// The replica.
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// Bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// The file of the layer that takes the writes.
    pub fn top_file(&self) -> DiskFile {
        self.lock().stack.top().file.clone()
    }

    /// Files of all layers with their numbers, bottom first.
    pub fn files(&self) -> Vec<(u32, DiskFile)> {
        self.lock().stack.layers().iter().map(|layer| (layer.number, layer.file.clone())).collect()
    }

    /// The pool's room.
    pub fn pool(&self) -> &PoolSpace {
        &self.pool
    }

    /// The cookie's copy in tmpfs.
    pub fn cookie(&self) -> &BootCookie {
        &self.cookie
    }

    /// Whether a write or flush failed.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// After a failed write, fsync or punch nobody knows what the disk holds: refuse everything until the replica is
    /// opened again, and drop the cookie's copy before anyone hears of the failure (R19).
    pub fn poison(&self) {
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            tracing::error!(replica = %self.replica, "a write or flush failed: the replica's handle is poisoned");
        }
        self.lock().shadow.remove();
        if let Err(error) = self.cookie.remove() {
            tracing::error!(replica = %self.replica, %error, "the cookie's copy could not be removed");
        }
    }

    /// Refuses new requests and waits, blocking, until none is in flight.
    pub fn close_and_wait(&self) {
        self.closed.store(true, Ordering::Release);
        let mut state = self.lock();
        while state.in_flight > 0 {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether [`DataPath::close_and_wait`] was called.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Regions that became durable in the intent log.
    pub fn log_added(&self, regions: impl IntoIterator<Item = Region>) {
        self.lock().logged.extend(regions);
    }

    /// Takes those of `regions` out of the log's copy here that have nothing unflushed, and gives them back. The rest
    /// stays logged: more in the log than needed costs a little copying, less would cost data.
    pub fn log_take_clean(&self, regions: &[Region]) -> Vec<Region> {
        let mut state = self.lock();
        let clean: Vec<Region> =
            regions.iter().copied().filter(|region| !state.unflushed.contains_key(region)).collect();
        for region in &clean {
            state.logged.remove(region);
        }
        clean
    }

    /// Whether any of these regions has writes in flight or unflushed.
    pub fn any_unflushed(&self, regions: &[Region]) -> bool {
        let state = self.lock();
        regions.iter().any(|region| state.unflushed.contains_key(region))
    }

    /// A page of a layer's tables, from memory or else from the disk. Blocks; keeps nothing in memory.
    pub fn page_now(&self, layer: u32, file: &DiskFile, page: TablePage) -> std::io::Result<AlignedBuf> {
        let cached = self
            .lock()
            .stack
            .by_number(layer)
            .and_then(|layer| layer.tables.page(page).map(AlignedBuf::copy_of));
        match cached {
            Some(bytes) => Ok(bytes),
            None if page.file_offset() + PAGE_BYTES as u64 > file.len_bytes()? => {
                // The volume grew after the layer was frozen.
                Ok(AlignedBuf::zeroed(PAGE_BYTES))
            }
            None => file.read_now(page.file_offset(), PAGE_BYTES),
        }
    }

    /// Takes in what a killed predecessor had not flushed. Blocks; called before the first request.
    pub fn replay(&self, entries: &[(u64, Entry)]) -> std::io::Result<()> {
        let mut state = self.lock();
        let layered = state.stack.is_layered();
        for (block, entry) in entries {
            let region = Block(*block).region();
            if *block >= self.size_bytes() / BLOCK_BYTES || !state.logged.contains(&region) {
                tracing::warn!(replica = %self.replica, block, "an unflushed checksum names a block that is not logged");
                continue;
            }
            let top = state.stack.top_mut();
            let missing: Vec<TablePage> = top.tables.missing(*block, 1).collect();
            for page in missing {
                let bytes = top.file.read_now(page.file_offset(), PAGE_BYTES)?;
                top.tables.insert(page, bytes);
            }
            let before = top.tables.set(*block, *entry);
            state.flush.data_first |= wants_data_first(before, *entry, layered);
            state.unflushed.entry(region).or_default();
        }
        Ok(())
    }

    /// Changes entries whose pages are in memory, so that they outlive this process; the caller answers afterwards.
    fn change_entries(self: &Arc<Self>, entries: impl Iterator<Item = (u64, Entry)> + Clone) {
        let appended = {
            let mut state = self.lock();
            let layered = state.stack.is_layered();
            let mut data_first = false;
            let tables = &mut state.stack.top_mut().tables;
            for (block, entry) in entries.clone() {
                let before = tables.set(block, entry);
                data_first |= wants_data_first(before, entry, layered);
            }
            state.flush.data_first |= data_first;
            state.shadow.append(entries)
        };
        match appended {
            Appended::Fine => {}
            Appended::FlushSoon => self.flush(Box::new(|_| {})),
            Appended::Lost => {
                if let Err(error) = self.cookie.remove() {
                    // Without the shadow the cookie's copy would promise what cannot be kept.
                    tracing::error!(replica = %self.replica, %error, "the cookie's copy could not be removed");
                    self.poison();
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, DataState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io_error(&self, action: &'static str, errno: Errno) -> StoreError {
        StoreError::Io { replica: self.replica, action, errno }
    }

    /// The blocks of a request, if it is whole blocks inside the volume.
    fn check_range(&self, offset: u64, len: u64) -> Result<BlockRange, StoreError> {
        let aligned = offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size_bytes());
        if !aligned || !inside || len == 0 {
            return Err(StoreError::InvalidRange { replica: self.replica, offset, len });
        }
        Ok(BlockRange::new(offset / BLOCK_BYTES, len / BLOCK_BYTES))
    }

    /// Lets a request in that changes nothing, and counts it.
    fn begin(self: &Arc<Self>) -> Result<InFlight, StoreError> {
        self.check_usable()?;
        self.lock().in_flight += 1;
        Ok(InFlight { path: Arc::clone(self), changed: None })
    }

    /// Lets a request in that changes blocks: checks that their regions are logged (R18), and counts it.
    fn begin_change(self: &Arc<Self>, range: BlockRange) -> Result<InFlight, Refusal> {
        self.check_usable()?;
        let mut state = self.lock();
        if state.gate_closed {
            return Err(Refusal::Gate);
        }
        if let Some(region) = range.regions().find(|region| !state.logged.contains(region)) {
            return Err(StoreError::NotLogged { replica: self.replica, region }.into());
        }
        for region in range.regions() {
            state.unflushed.entry(region).or_default().in_flight += 1;
        }
        state.in_flight += 1;
        state.changes_in_flight += 1;
        Ok(InFlight { path: Arc::clone(self), changed: Some(range) })
    }

    fn check_usable(&self) -> Result<(), StoreError> {
        if self.is_closed() {
            return Err(StoreError::Closed(self.replica));
        }
        if self.is_poisoned() {
            return Err(StoreError::Poisoned(self.replica));
        }
        Ok(())
    }
}

/// Why a change was not let in.
enum Refusal {
    /// The gate is closed: [`DataPath::when_open`] tries again.
    Gate,
    /// For good.
    Error(StoreError),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Refusal::Error(error)
    }
}

impl fmt::Debug for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataPath({})", self.replica)
    }
}

/// A request that was let in. Dropping it counts the request out; that happens before it is answered.
struct InFlight {
    path: Arc<DataPath>,
    changed: Option<BlockRange>,
}

impl InFlight {
    /// Counts the request out and answers it.
    fn answer<T>(self, result: Result<T, StoreError>, done: Done<T>) {
        drop(self);
        done(result);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut state = self.path.lock();
        state.change_seq += 1;
        let seq = state.change_seq;
        for region in self.changed.iter().flat_map(|range| range.regions()) {
            if let Some(region_use) = state.unflushed.get_mut(&region) {
                region_use.in_flight -= 1;
                region_use.last_change = seq;
            }
        }
        state.in_flight -= 1;
        state.changes_in_flight -= usize::from(self.changed.is_some());
        // Only a closing and a change of the stack wait, and say so first: waking nobody would still be a system call for
        // each request.
        let closing_may_end = self.path.is_closed() && state.in_flight == 0;
        if closing_may_end || (state.gate_closed && state.changes_in_flight == 0) {
            self.path.idle.notify_all();
        }
    }
}
