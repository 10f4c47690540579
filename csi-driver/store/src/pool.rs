//! A pool: the directory a node gives to Holdfast, and the replicas in it.
//!
//! A replica is made and removed by rename, so that a crash leaves it whole or absent:
//!
//! 1. make: write everything below `replicas/.new-<id>`, sync each file and the folder; a crash leaves a folder that
//!    the next opening removes;
//! 2. rename to `replicas/<id>`, sync `replicas`; a crash leaves one or the other name.
//!
//! Removal renames to `replicas/.del-<id>`, syncs `replicas`, and removes that.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use holdfast_io::{LockOutcome, OpenMode, Ring, RingOptions};
use holdfast_storage_core::ids::{BLOCK_BYTES, ReplicaId, SnapshotId, VolumeId};
use holdfast_storage_core::record_copy::RecordCopy;
use holdfast_storage_core::replica::{ReplicaMeta, ReplicaStart};

use crate::clone;
use crate::control::{ControlFiles, ControlQueue};
use crate::cookie::BootCookie;
use crate::data::{DataParts, DataPath, Layer};
use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::intent_log::IntentLog;
use crate::layer;
use crate::layer::layer_path;
use crate::layout::{is_volume_size, region_count};
use crate::manifest::{Manifest, read_page_file, write_page_file};
use crate::map_file::MapFiles;
use crate::merge_cursor::MergeCursor;
use crate::meta_file::MetaFile;
use crate::record_file::{self, RecordFile};
use crate::replica::Replica;
use crate::shadow::{self, Shadow};
use crate::space::{Charge, PoolSpace};
use crate::stack_files::StackFiles;
use crate::tables::Entry;

const MAGIC: &[u8; 8] = b"HFPOOL\0\0";
const VERSION: u32 = 1;
pub(crate) const SUPERBLOCK: &str = "pool";
pub(crate) const LOCK: &str = "lock";
pub(crate) const REPLICAS: &str = "replicas";
const NEW_PREFIX: &str = ".new-";
const DELETED_PREFIX: &str = ".del-";
/// Bytes of a new replica: headers, manifest, meta, log. The space of its tables is reserved as it is written.
const FIXED_BYTES: u64 = 96 << 10;

/// Settings of a pool.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Bytes that replicas may fill, metadata included. The file system's own free space limits as well.
    pub capacity_bytes: u64,
    /// Bytes of the file system that are left alone, so that a full pool can still write its metadata.
    pub reserve_bytes: u64,
    /// Folder for the continuity cookies (R19), checked to be tmpfs. Without one every start counts as a lost cache.
    pub cookie_dir: Option<PathBuf>,
    /// How long opening waits for the I/O of a killed predecessor before it says [`PoolError::Locked`] (R3).
    pub lock_wait: Duration,
}

/// Room in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// [`PoolOptions::capacity_bytes`].
    pub capacity_bytes: u64,
    /// Bytes that replicas fill, metadata included.
    pub used_bytes: u64,
    /// Bytes of the capacity that data may not fill: kept for layer tables, dirty maps, snapshots and merges.
    pub metadata_bytes: u64,
    /// Bytes that data may still fill: what capacity and file system both have left.
    pub available_bytes: u64,
}

/// What a replica knows of its volume.
#[derive(Debug)]
pub struct KeptRecord {
    /// The replica.
    pub replica_id: ReplicaId,
    /// Its volume.
    pub volume_id: Result<VolumeId, PoolError>,
    /// Its meta.
    pub meta: Result<ReplicaMeta, PoolError>,
    /// Its copy of the record; none: it never got one.
    pub copy: Result<Option<RecordCopy>, PoolError>,
}

/// An open pool. Cheap to clone; the lock is held until the last clone and the last replica are gone.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

/// Replicas that somebody works on.
#[derive(Default)]
struct Busy {
    /// Open ones, with what must be locked for their stack of layers to stay as it is.
    open: HashMap<ReplicaId, Weak<Mutex<StackFiles>>>,
    /// Those that are being made: their files are written and synced without the lock, so that many can be made at once.
    making: HashSet<ReplicaId>,
}

struct Inner {
    dir: PathBuf,
    options: PoolOptions,
    disk: Disk,
    space: Arc<PoolSpace>,
    /// The lock that orders create, open and delete.
    busy: Mutex<Busy>,
    /// Something was made.
    made: Condvar,
    _lock: DiskFile,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({})", self.inner.dir.display())
    }
}

impl Pool {
    /// Opens the pool in `dir`, making it if the folder is empty or absent, and removes what an interrupted create or
    /// delete left.
    pub fn open(dir: &Path, options: PoolOptions) -> Result<Self, PoolError> {
        let ring =
            Ring::start(RingOptions::default()).map_err(PoolError::io("starting io_uring for", dir))?;
        if let Some(cookie_dir) = &options.cookie_dir {
            std::fs::create_dir_all(cookie_dir).map_err(PoolError::io("creating", cookie_dir))?;
            if !holdfast_io::is_tmpfs(cookie_dir).map_err(PoolError::io("examining", cookie_dir))? {
                return Err(PoolError::NotTmpfs(cookie_dir.clone()));
            }
        }
        Self::open_on(Disk::Real(ring), dir, options)
    }

    pub(crate) fn open_on(disk: Disk, dir: &Path, options: PoolOptions) -> Result<Self, PoolError> {
        disk.create_dir_all(dir).map_err(PoolError::io("creating", dir))?;
        let lock = take_lock(&disk, dir, options.lock_wait)?;
        let superblock = dir.join(SUPERBLOCK);
        let replicas = dir.join(REPLICAS);
        if disk.exists(&superblock).map_err(PoolError::io("examining", &superblock))? {
            read_page_file(&disk, &superblock, MAGIC, VERSION)?;
        } else {
            format_pool(&disk, dir)?;
        }
        remove_leftovers(&disk, &replicas)?;
        let space =
            PoolSpace::new(disk.clone(), replicas.clone(), options.capacity_bytes, options.reserve_bytes);
        space.recount().map_err(PoolError::io("measuring", &replicas))?;
        let inner = Inner {
            dir: dir.to_owned(),
            options,
            disk,
            space: Arc::new(space),
            busy: Mutex::default(),
            made: Condvar::new(),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes an empty replica with this meta, durably. Idempotent: one of the same volume and size is a success and
    /// keeps its own meta.
    pub fn create_replica(&self, meta: &ReplicaMeta) -> Result<(), PoolError> {
        if !is_volume_size(meta.size_bytes) {
            return Err(PoolError::InvalidSize(meta.size_bytes));
        }
        let _making = self.begin_making(meta.replica_id);
        let disk = &self.inner.disk;
        let dir = self.replica_dir(meta.replica_id);
        if disk.exists(&dir).map_err(PoolError::io("examining", &dir))? {
            let same = clone::is_same(&Manifest::read(disk, &dir)?, meta);
            return if same { Ok(()) } else { Err(PoolError::Conflict(meta.replica_id)) };
        }
        let manifest = Manifest::new(meta.volume_id, meta.replica_id, meta.size_bytes);
        self.charge(FIXED_BYTES)?;
        self.write_new_replica(meta, &manifest, |new| layer::write_new(disk, new, manifest.top()))
            .inspect_err(|_| self.inner.space.give_back(FIXED_BYTES))
    }

    /// Makes a replica that begins as `snapshot` of the replica `source` of this pool, durably and at once: the two share
    /// the layers below, and each keeps them should the other go. It may be larger than the snapshot. Idempotent like
    /// [`Pool::create_replica`].
    pub fn create_clone(
        &self,
        meta: &ReplicaMeta,
        source: ReplicaId,
        snapshot: SnapshotId,
    ) -> Result<(), PoolError> {
        if !is_volume_size(meta.size_bytes) {
            return Err(PoolError::InvalidSize(meta.size_bytes));
        }
        let _making = self.begin_making(meta.replica_id);
        // Held to the end, so that the source is neither opened nor deleted.
        let busy = self.lock_busy();
        let (disk, dir, source_dir) =
            (&self.inner.disk, self.replica_dir(meta.replica_id), self.replica_dir(source));
        if disk.exists(&dir).map_err(PoolError::io("examining", &dir))? {
            let same = clone::is_same(&Manifest::read(disk, &dir)?, meta);
            return if same { Ok(()) } else { Err(PoolError::Conflict(meta.replica_id)) };
        }
        if !disk.exists(&source_dir).map_err(PoolError::io("examining", &source_dir))? {
            return Err(PoolError::NotFound(source));
        }
        // Neither a freeze nor a step of a merge changes the source's layers while they are linked.
        let stack = busy.open.get(&source).and_then(Weak::upgrade);
        let _unchanged = stack.as_ref().map(|stack| stack.lock().unwrap_or_else(PoisonError::into_inner));
        let manifest = clone::manifest_of(meta, &Manifest::read(disk, &source_dir)?, snapshot)?;
        self.charge(FIXED_BYTES)?;
        self.write_new_replica(meta, &manifest, |new| clone::write_layers(disk, new, &manifest, &source_dir))
            .inspect_err(|_| self.inner.space.give_back(FIXED_BYTES))
    }

    /// Opens a replica, checks its format, and reads what [`Replica::start`] gives.
    pub fn open_replica(&self, replica_id: ReplicaId) -> Result<Replica, PoolError> {
        let mut busy = self.wait_until_made(replica_id);
        if busy.open.contains_key(&replica_id) {
            return Err(PoolError::InUse(replica_id));
        }
        let disk = &self.inner.disk;
        let dir = self.replica_dir(replica_id);
        if !disk.exists(&dir).map_err(PoolError::io("examining", &dir))? {
            return Err(PoolError::NotFound(replica_id));
        }
        let manifest = Manifest::read(disk, &dir)?;
        if manifest.replica_id != replica_id {
            let what = "it belongs to another replica".to_owned();
            return Err(PoolError::Corrupt { path: dir.join("manifest"), what });
        }
        let layers = self.open_layers(&dir, &manifest)?;
        let (meta_file, mut meta) = MetaFile::open(disk, &dir)?;
        // A growth that was interrupted after its last step, before the protocol put it into its own books.
        meta.size_bytes = manifest.size_bytes;
        let log = IntentLog::open(disk, &dir, replica_id, region_count(manifest.size_bytes))?;
        let block_count = manifest.size_bytes / BLOCK_BYTES;
        let (map_files, maps) = MapFiles::open(disk, &dir, replica_id, block_count)
            .map_err(PoolError::io("reading maps in", &dir))?;
        manifest.remove_leftovers(disk, &dir)?;
        let cookie = BootCookie::new(self.inner.options.cookie_dir.as_deref(), replica_id);
        let (shadow, unflushed) = self.open_shadow(&dir, &cookie, &manifest)?;
        let start = ReplicaStart {
            meta,
            log: log.regions().clone(),
            maps,
            boot_cookie: cookie.read(),
            snapshots: manifest.snapshots(),
        };
        let data = DataPath::new(DataParts {
            replica: replica_id,
            size_bytes: manifest.size_bytes,
            layers,
            cookie,
            pool: Arc::clone(&self.inner.space),
            logged: log.regions().clone(),
            shadow,
        });
        data.replay(&unflushed).map_err(PoolError::io("reading tables in", &dir))?;
        let keep = Box::new(OpenMark { pool: Arc::clone(&self.inner), replica: replica_id });
        let stack = StackFiles { disk: disk.clone(), dir: dir.clone(), manifest, data: Arc::clone(&data) };
        let stack = Arc::new(Mutex::new(stack));
        busy.open.insert(replica_id, Arc::downgrade(&stack));
        let record = RecordFile::open(disk, &dir, replica_id);
        let data_of = Arc::clone(&data);
        let files =
            ControlFiles { meta: meta_file, record, log, maps: map_files, data: data_of, stack, keep };
        // The mark takes this lock when it goes, as it does if no thread can be started.
        drop(busy);
        let control = ControlQueue::start(files).map_err(PoolError::io("starting a thread for", &dir))?;
        Ok(Replica::new(start, data, control))
    }

    /// Opens every layer, bottom first, and takes the lock of the one that takes writes.
    fn open_layers(&self, dir: &Path, manifest: &Manifest) -> Result<Vec<Layer>, PoolError> {
        let open = |entry| {
            let file = layer::open(&self.inner.disk, dir, entry)?;
            if !entry.frozen {
                layer::lock(&file, layer_path(dir, entry.number), self.inner.options.lock_wait)?;
            }
            Ok(Layer::new(entry, file))
        };
        let mut layers = manifest.layers.iter().map(open).collect::<Result<Vec<Layer>, PoolError>>()?;
        self.read_cursors(dir, &mut layers)?;
        Ok(layers)
    }

    /// Blocks that a merge moved count as absent where they were.
    fn read_cursors(&self, dir: &Path, layers: &mut [Layer]) -> Result<(), PoolError> {
        for index in 1..layers.len() {
            let (number, blocks) = (layers[index].number, layers[index].blocks);
            if let Some(cursor) = MergeCursor::read(&self.inner.disk, dir, number)? {
                layers[index].moved_below = cursor.moved_below;
                layers[index].copied_below = cursor.moved_below;
                layers[index - 1].blocks = layers[index - 1].blocks.max(blocks);
            }
        }
        Ok(())
    }

    /// A shadow in another release's format cannot be replayed: it goes, and the cookie's copy before it (R19).
    fn open_shadow(
        &self,
        dir: &Path,
        cookie: &BootCookie,
        manifest: &Manifest,
    ) -> Result<(Shadow, Vec<(u64, Entry)>), PoolError> {
        let (cookie_dir, replica) = (self.inner.options.cookie_dir.as_deref(), manifest.replica_id);
        let open = || Shadow::open(cookie_dir, replica, manifest.top().number);
        let opened = match open() {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                tracing::warn!(%replica, %error, "the write cache of the process before counts as lost");
                cookie.remove().map_err(PoolError::io("removing the cookie's copy for", dir))?;
                shadow::remove_files(cookie_dir, replica);
                open()
            }
            other => other,
        };
        opened.map_err(PoolError::io("reading unflushed checksums of", dir))
    }

    /// Removes a replica, durably. Idempotent: an absent one is a success. One that is open must be closed first.
    pub fn delete_replica(&self, replica_id: ReplicaId) -> Result<(), PoolError> {
        let busy = self.wait_until_made(replica_id);
        if busy.open.contains_key(&replica_id) {
            return Err(PoolError::InUse(replica_id));
        }
        let (disk, dir) = (&self.inner.disk, self.replica_dir(replica_id));
        if !disk.exists(&dir).map_err(PoolError::io("examining", &dir))? {
            return Ok(());
        }
        let replicas = self.inner.dir.join(REPLICAS);
        let deleted = replicas.join(format!("{DELETED_PREFIX}{replica_id}"));
        disk.rename(&dir, &deleted).map_err(PoolError::io("renaming", &dir))?;
        disk.sync_dir(&replicas).map_err(PoolError::io("syncing", &replicas))?;
        drop(busy);
        let used = disk.used(&deleted).map_err(PoolError::io("measuring", &deleted))?;
        // What a clone shares stays.
        let freed = used.iter().filter(|file| file.links == 1).map(|file| file.bytes).sum();
        disk.remove_dir_all(&deleted).map_err(PoolError::io("removing", &deleted))?;
        self.inner.space.give_back(freed);
        let cookie_dir = self.inner.options.cookie_dir.as_deref();
        shadow::remove_files(cookie_dir, replica_id);
        let cookie = BootCookie::new(cookie_dir, replica_id);
        if let Err(error) = cookie.remove() {
            tracing::warn!(%replica_id, %error, "the cookie's copy of a deleted replica stays");
        }
        Ok(())
    }

    /// The replicas in the pool, in order.
    pub fn list(&self) -> Result<Vec<ReplicaId>, PoolError> {
        let replicas = self.inner.dir.join(REPLICAS);
        let names = self.inner.disk.list(&replicas).map_err(PoolError::io("listing", &replicas))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// What the replicas with ids above `after` know of their volumes, in order and `count_max` of them at most: meta, and copy
    /// of the record. Tells whether there are more. Read from the disk, open or not.
    pub fn records(
        &self,
        after: Option<ReplicaId>,
        count_max: usize,
    ) -> Result<(Vec<KeptRecord>, bool), PoolError> {
        let of = |replica_id| kept_record(&self.inner.disk, replica_id, &self.replica_dir(replica_id));
        let mut replicas = self.list()?;
        replicas.retain(|replica| after.is_none_or(|after| *replica > after));
        replicas.sort_unstable();
        let more = replicas.len() > count_max;
        replicas.truncate(count_max);
        Ok((replicas.into_iter().map(of).collect(), more))
    }

    /// Room in the pool, as the file system sees it now. Looks at every file of every replica.
    pub fn space(&self) -> Result<Space, PoolError> {
        let counted = self.inner.space.recount();
        counted.map_err(PoolError::io("measuring", &self.inner.dir))?;
        self.room()
    }

    /// Room in the pool, by a count of the files that may be some seconds old: a tenth of a second old for each millisecond
    /// that it takes, and at least two seconds.
    pub fn space_lately(&self) -> Result<Space, PoolError> {
        let counted = self.inner.space.recount_if_old();
        counted.map_err(PoolError::io("measuring", &self.inner.dir))?;
        self.room()
    }

    fn room(&self) -> Result<Space, PoolError> {
        let (replicas, space) = (self.inner.dir.join(REPLICAS), &self.inner.space);
        Ok(Space {
            capacity_bytes: space.capacity_bytes(),
            used_bytes: space.used_bytes(),
            metadata_bytes: space.metadata_bytes(),
            available_bytes: space.available_bytes().map_err(PoolError::io("measuring", &replicas))?,
        })
    }

    fn write_new_replica(
        &self,
        meta: &ReplicaMeta,
        manifest: &Manifest,
        write_top: impl FnOnce(&Path) -> Result<DiskFile, PoolError>,
    ) -> Result<(), PoolError> {
        let (disk, replicas) = (&self.inner.disk, self.inner.dir.join(REPLICAS));
        let new = replicas.join(format!("{NEW_PREFIX}{}", meta.replica_id));
        remove_if_there(disk, &new)?;
        disk.create_dir_all(&new).map_err(PoolError::io("creating", &new))?;
        let write = || {
            let top = write_top(&new)?;
            let log = IntentLog::write_new(disk, &new, meta.replica_id, region_count(meta.size_bytes))?;
            let files = [top, log, MetaFile::write_new(disk, &new, meta)?, manifest.write_new(disk, &new)?];
            // Only now: a journaling file system commits all four with the first.
            files.iter().try_for_each(|file| file.sync_now().map_err(PoolError::io("syncing", &new)))
        };
        if let Err(error) = write() {
            remove_if_there(disk, &new)?;
            return Err(self.no_space_or(error));
        }
        disk.sync_dir(&new).map_err(PoolError::io("syncing", &new))?;
        let dir = self.replica_dir(meta.replica_id);
        disk.rename(&new, &dir).map_err(PoolError::io("renaming", &new))?;
        disk.sync_dir(&replicas).map_err(PoolError::io("syncing", &replicas))
    }

    fn charge(&self, wanted_bytes: u64) -> Result<(), PoolError> {
        if self.inner.space.charge(wanted_bytes, Charge::Data) {
            Ok(())
        } else {
            Err(self.no_space(wanted_bytes))
        }
    }

    fn no_space(&self, wanted_bytes: u64) -> PoolError {
        let available_bytes = self.inner.space.available_bytes().unwrap_or(0);
        PoolError::NoSpace { pool: self.inner.dir.clone(), wanted_bytes, available_bytes }
    }

    /// The file system may be full before the pool is.
    fn no_space_or(&self, error: PoolError) -> PoolError {
        match &error {
            PoolError::Io { source, .. } if source.raw_os_error() == Some(nix::libc::ENOSPC) => {
                self.no_space(FIXED_BYTES)
            }
            _ => error,
        }
    }

    /// The id is digits only, so it cannot leave the pool.
    fn replica_dir(&self, replica: ReplicaId) -> PathBuf {
        self.inner.dir.join(REPLICAS).join(replica.to_string())
    }

    /// The only one who makes this replica, until the answer is dropped.
    fn begin_making(&self, replica: ReplicaId) -> Making {
        self.wait_until_made(replica).making.insert(replica);
        Making { pool: Arc::clone(&self.inner), replica }
    }

    fn wait_until_made(&self, replica: ReplicaId) -> MutexGuard<'_, Busy> {
        let made = self.inner.made.wait_while(self.lock_busy(), |busy| busy.making.contains(&replica));
        made.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_busy(&self) -> MutexGuard<'_, Busy> {
        self.inner.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the making of a replica, whatever came of it.
struct Making {
    pool: Arc<Inner>,
    replica: ReplicaId,
}

impl Drop for Making {
    fn drop(&mut self) {
        let mut busy = self.pool.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.making.remove(&self.replica);
        drop(busy);
        self.pool.made.notify_all();
    }
}

/// A replica's place in the list of open ones, and its hold on the pool.
struct OpenMark {
    pool: Arc<Inner>,
    replica: ReplicaId,
}

impl Drop for OpenMark {
    fn drop(&mut self) {
        self.pool.busy.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&self.replica);
    }
}

pub(crate) fn take_lock(disk: &Disk, dir: &Path, wait: Duration) -> Result<DiskFile, PoolError> {
    let path = dir.join(LOCK);
    let opened = match disk.open(&path, OpenMode::Existing) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => disk.open(&path, OpenMode::New),
        other => other,
    };
    // Two processes may have met here: the one that came second opens what the first made.
    let opened = opened.or_else(|_| disk.open(&path, OpenMode::Existing));
    let file = opened.map_err(PoolError::io("opening", &path))?;
    match file.lock(wait).map_err(PoolError::io("locking", &path))? {
        LockOutcome::Locked => Ok(file),
        LockOutcome::HeldByAnother => Err(PoolError::Locked(path)),
    }
}

/// What the replica in `dir` knows of its volume.
pub(crate) fn kept_record(disk: &Disk, replica_id: ReplicaId, dir: &Path) -> KeptRecord {
    KeptRecord {
        replica_id,
        volume_id: Manifest::read(disk, dir).map(|manifest| manifest.volume_id),
        meta: MetaFile::open(disk, dir).map(|(_, meta)| meta),
        copy: record_file::read(disk, dir, replica_id),
    }
}

/// The superblock comes last: without it the next opening starts over.
fn format_pool(disk: &Disk, dir: &Path) -> Result<(), PoolError> {
    let replicas = dir.join(REPLICAS);
    if disk.exists(&replicas).map_err(PoolError::io("examining", &replicas))?
        && !disk.list(&replicas).map_err(PoolError::io("listing", &replicas))?.is_empty()
    {
        let what = "it is missing, but replicas are there".to_owned();
        return Err(PoolError::Corrupt { path: dir.join(SUPERBLOCK), what });
    }
    disk.create_dir_all(&replicas).map_err(PoolError::io("creating", &replicas))?;
    let new = dir.join("pool.new");
    disk.remove_file(&new).map_err(PoolError::io("removing", &new))?;
    write_page_file(disk, &new, MAGIC, VERSION, &[])?;
    disk.rename(&new, &dir.join(SUPERBLOCK)).map_err(PoolError::io("renaming", &new))?;
    disk.sync_dir(dir).map_err(PoolError::io("syncing", dir))
}

fn remove_leftovers(disk: &Disk, replicas: &Path) -> Result<(), PoolError> {
    for name in disk.list(replicas).map_err(PoolError::io("listing", replicas))? {
        if name.starts_with(NEW_PREFIX) || name.starts_with(DELETED_PREFIX) {
            tracing::info!(folder = %name, "removing what an interrupted create or delete left");
            remove_if_there(disk, &replicas.join(name))?;
        }
    }
    Ok(())
}

fn remove_if_there(disk: &Disk, dir: &Path) -> Result<(), PoolError> {
    if disk.exists(dir).map_err(PoolError::io("examining", dir))? {
        disk.remove_dir_all(dir).map_err(PoolError::io("removing", dir))?;
    }
    Ok(())
}
