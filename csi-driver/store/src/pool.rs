//! A pool: the directory a node gives to Holdfast, and the replicas in it.
//!
//! A replica is made and removed by rename, so that a crash leaves it whole or absent:
//!
//! 1. make: write everything below `replicas/.new-<id>`, sync each file and the folder; a crash leaves a folder that
//!    the next opening removes;
//! 2. rename to `replicas/<id>`, sync `replicas`; a crash leaves one or the other name.
//!
//! Removal renames to `replicas/.del-<id>`, syncs `replicas`, and removes that.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_io::{LockOutcome, OpenMode, Ring, RingOptions};
use holdfast_storage_core::ids::{BLOCK_BYTES, ReplicaId};
use holdfast_storage_core::replica::{ReplicaMeta, ReplicaStart};

use crate::control::{ControlFiles, ControlQueue};
use crate::cookie::BootCookie;
use crate::data::{DataParts, DataPath};
use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::intent_log::IntentLog;
use crate::layer;
use crate::layout::{is_volume_size, region_count, table_areas};
use crate::manifest::{LayerEntry, Manifest, read_page_file, write_page_file};
use crate::map_file::MapFiles;
use crate::meta_file::MetaFile;
use crate::replica::Replica;
use crate::shadow::{self, Shadow};
use crate::space::PoolSpace;
use crate::sums::Summer;

const MAGIC: &[u8; 8] = b"HFPOOL\0\0";
const VERSION: u32 = 1;
const SUPERBLOCK: &str = "pool";
const LOCK: &str = "lock";
const REPLICAS: &str = "replicas";
const NEW_PREFIX: &str = ".new-";
const DELETED_PREFIX: &str = ".del-";
/// Bytes of a new replica besides its tables: headers, meta, log.
const FIXED_BYTES: u64 = 64 << 10;

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
    /// Bytes that may still be filled: what capacity and file system both have left.
    pub available_bytes: u64,
}

/// An open pool. Cheap to clone; the lock is held until the last clone and the last replica are gone.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    options: PoolOptions,
    disk: Disk,
    space: Arc<PoolSpace>,
    /// Replicas that are open; also the lock that orders create, open and delete.
    open: Mutex<HashSet<ReplicaId>>,
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
            open: Mutex::new(HashSet::new()),
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
        let _order = self.lock_open();
        let disk = &self.inner.disk;
        let dir = self.replica_dir(meta.replica_id);
        if disk.exists(&dir).map_err(PoolError::io("examining", &dir))? {
            let found = Manifest::read(disk, &dir)?;
            let same = found.volume_id == meta.volume_id && found.size_bytes == meta.size_bytes;
            return if same { Ok(()) } else { Err(PoolError::Conflict(meta.replica_id)) };
        }
        let tables: u64 = table_areas(meta.size_bytes).map(|(_, len)| len).sum();
        self.charge(tables + FIXED_BYTES)?;
        self.write_new_replica(meta).inspect_err(|_| self.inner.space.give_back(tables + FIXED_BYTES))
    }

    /// Opens a replica, checks its format, and reads what [`Replica::start`] gives.
    pub fn open_replica(&self, replica_id: ReplicaId) -> Result<Replica, PoolError> {
        let mut open = self.lock_open();
        if open.contains(&replica_id) {
            return Err(PoolError::InUse(replica_id));
        }
        let disk = &self.inner.disk;
        let dir = self.replica_dir(replica_id);
        if !disk.exists(&dir).map_err(PoolError::io("examining", &dir))? {
            return Err(PoolError::NotFound(replica_id));
        }
        let manifest = Manifest::read(disk, &dir)?;
        check_manifest(&dir, &manifest, replica_id)?;
        let top = &manifest.layers[manifest.layers.len() - 1];
        let file = layer::open(disk, &dir, &manifest, top.number, self.inner.options.lock_wait)?;
        let (meta_file, meta) = MetaFile::open(disk, &dir)?;
        let log = IntentLog::open(disk, &dir, replica_id, region_count(manifest.size_bytes))?;
        let block_count = manifest.size_bytes / BLOCK_BYTES;
        let (map_files, maps) = MapFiles::open(disk, &dir, replica_id, block_count)
            .map_err(PoolError::io("reading maps in", &dir))?;
        let cookie_dir = self.inner.options.cookie_dir.as_deref();
        let cookie = BootCookie::new(cookie_dir, replica_id);
        let (shadow, unflushed) = Shadow::open(cookie_dir, replica_id)
            .map_err(PoolError::io("reading unflushed checksums of", &dir))?;
        let start = ReplicaStart {
            meta,
            log: log.regions().clone(),
            maps,
            boot_cookie: cookie.read(),
            snapshots: Vec::new(),
        };
        let data = DataPath::new(DataParts {
            replica: replica_id,
            size_bytes: manifest.size_bytes,
            summer: Summer::new(top.seed),
            file,
            cookie,
            pool: Arc::clone(&self.inner.space),
            logged: log.regions().clone(),
            shadow,
        });
        data.replay(&unflushed).map_err(PoolError::io("reading tables in", &dir))?;
        open.insert(replica_id);
        let keep = Box::new(OpenMark { pool: Arc::clone(&self.inner), replica: replica_id });
        let files = ControlFiles { meta: meta_file, log, maps: map_files, data: Arc::clone(&data), keep };
        // The mark takes this lock when it goes, as it does if no thread can be started.
        drop(open);
        let control = ControlQueue::start(files).map_err(PoolError::io("starting a thread for", &dir))?;
        Ok(Replica::new(start, data, control))
    }

    /// Removes a replica, durably. Idempotent: an absent one is a success. One that is open must be closed first.
    pub fn delete_replica(&self, replica_id: ReplicaId) -> Result<(), PoolError> {
        let open = self.lock_open();
        if open.contains(&replica_id) {
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
        disk.remove_dir_all(&deleted).map_err(PoolError::io("removing", &deleted))?;
        let cookie_dir = self.inner.options.cookie_dir.as_deref();
        shadow::remove_files(cookie_dir, replica_id);
        let cookie = BootCookie::new(cookie_dir, replica_id);
        if let Err(error) = cookie.remove() {
            tracing::warn!(%replica_id, %error, "the cookie's copy of a deleted replica stays");
        }
        self.inner.space.recount().map_err(PoolError::io("measuring", &replicas))
    }

    /// The replicas in the pool, in order.
    pub fn list(&self) -> Result<Vec<ReplicaId>, PoolError> {
        let replicas = self.inner.dir.join(REPLICAS);
        let names = self.inner.disk.list(&replicas).map_err(PoolError::io("listing", &replicas))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Room in the pool, as the file system sees it now.
    pub fn space(&self) -> Result<Space, PoolError> {
        let replicas = self.inner.dir.join(REPLICAS);
        let space = &self.inner.space;
        space.recount().map_err(PoolError::io("measuring", &replicas))?;
        Ok(Space {
            capacity_bytes: space.capacity_bytes(),
            used_bytes: space.used_bytes(),
            available_bytes: space.available_bytes().map_err(PoolError::io("measuring", &replicas))?,
        })
    }

    fn write_new_replica(&self, meta: &ReplicaMeta) -> Result<(), PoolError> {
        let (disk, replicas) = (&self.inner.disk, self.inner.dir.join(REPLICAS));
        let new = replicas.join(format!("{NEW_PREFIX}{}", meta.replica_id));
        let manifest = Manifest {
            volume_id: meta.volume_id,
            replica_id: meta.replica_id,
            size_bytes: meta.size_bytes,
            layers: vec![LayerEntry { number: 0, frozen: false, seed: meta.volume_id, snapshot: 0 }],
        };
        remove_if_there(disk, &new)?;
        disk.create_dir_all(&new).map_err(PoolError::io("creating", &new))?;
        let written = layer::create(disk, &new, &manifest, 0)
            .and_then(|()| IntentLog::create(disk, &new, meta.replica_id, region_count(meta.size_bytes)))
            .and_then(|()| MetaFile::create(disk, &new, meta))
            .and_then(|()| manifest.write_new(disk, &new));
        if let Err(error) = written {
            remove_if_there(disk, &new)?;
            return Err(self.no_space_or(error));
        }
        disk.sync_dir(&new).map_err(PoolError::io("syncing", &new))?;
        let dir = self.replica_dir(meta.replica_id);
        disk.rename(&new, &dir).map_err(PoolError::io("renaming", &new))?;
        disk.sync_dir(&replicas).map_err(PoolError::io("syncing", &replicas))
    }

    fn charge(&self, wanted_bytes: u64) -> Result<(), PoolError> {
        if self.inner.space.charge(wanted_bytes) { Ok(()) } else { Err(self.no_space(wanted_bytes)) }
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

    fn lock_open(&self) -> MutexGuard<'_, HashSet<ReplicaId>> {
        self.inner.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A replica's place in the list of open ones, and its hold on the pool.
struct OpenMark {
    pool: Arc<Inner>,
    replica: ReplicaId,
}

impl Drop for OpenMark {
    fn drop(&mut self) {
        self.pool.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.replica);
    }
}

fn take_lock(disk: &Disk, dir: &Path, wait: Duration) -> Result<DiskFile, PoolError> {
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

/// This release writes one layer; a stack of several comes with snapshots, under a later manifest version.
fn check_manifest(dir: &Path, manifest: &Manifest, replica_id: ReplicaId) -> Result<(), PoolError> {
    let what = if manifest.replica_id != replica_id {
        "it belongs to another replica"
    } else if manifest.layers.len() != 1 {
        "it lists several layers, which this release does not know"
    } else {
        return Ok(());
    };
    Err(PoolError::Corrupt { path: dir.join("manifest"), what: what.to_owned() })
}
