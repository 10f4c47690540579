//! Volume records in an embedded sled database: one machine without Kubernetes, the demo and development.
//!
//! Layout: tree `records` maps a volume id (16 bytes, big endian) to the record's version (8 bytes, little endian)
//! followed by the record as JSON, tree `groups` likewise a group id to its record; tree `names` maps the name of each volume that is not gone to its id, which
//! makes names unique inside the same transaction.
//!
//! A change is answered only when it is durable, and nobody reads it before: one lock is held over a change and its
//! flush. sled's own flush stops at `sync_file_range`, which neither writes file metadata nor empties a disk's
//! cache, so its file is synced once more through a handle of ours.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use holdfast_storage_core::group::{GroupRecord, VersionedGroup};
use holdfast_storage_core::ids::{GroupId, RecordVersion, VolumeId};
use holdfast_storage_core::record::{RECORD_FORMAT, VolumeRecord};
use holdfast_storage_core::record_store::{GroupStore, RecordStore, StoreError, StoreFuture, Versioned};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sled::transaction::{ConflictableTransactionError, TransactionError, Transactional};

/// Memory that sled may use for its page cache; records are about 1 KiB each. Beyond it sled reads from the disk.
const CACHE_BYTES_MAX: u64 = 32 << 20;
/// Bytes of the version in front of a record's JSON.
const VERSION_BYTES: usize = 8;

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "the record store {0} is locked by another process: only one controller may use it; stop the other one, or \
         give this one a --store-dir of its own"
    )]
    Locked(PathBuf),
    /// The folder cannot be made or its lock file opened.
    #[error("the record store's folder {path} cannot be used: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// sled refused.
    #[error("the record store {path} cannot be opened: {source}")]
    Database {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: sled::Error,
    },
}

/// The store. Clones share one database; it is closed with the last of them.
#[derive(Clone)]
pub struct SledStore {
    inner: Arc<Inner>,
}

struct Inner {
    db: sled::Db,
    records: sled::Tree,
    names: sled::Tree,
    groups: sled::Tree,
    /// sled's log file, opened once more for syncing.
    log: File,
    /// Writers hold it over change and flush. `true` once a flush failed: memory then holds what the disk may not.
    broken: RwLock<bool>,
    _lock: Flock<File>,
}

impl SledStore {
    /// Opens the store in `dir`, which is made if absent.
    ///
    /// # Errors
    /// Another process has it open, or the folder or the database cannot be used.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let folder = |source: io::Error| OpenError::Folder { path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(folder)?;
        let file = File::create(dir.join("lock")).map_err(folder)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => OpenError::Locked(dir.to_owned()),
            other => folder(other.into()),
        })?;
        let database = |source: sled::Error| OpenError::Database { path: dir.to_owned(), source };
        let path = dir.join("sled");
        let db = sled::Config::new()
            .path(&path)
            .cache_capacity(CACHE_BYTES_MAX)
            .flush_every_ms(None)
            .open()
            .map_err(database)?;
        let records = db.open_tree("records").map_err(database)?;
        let names = db.open_tree("names").map_err(database)?;
        let groups = db.open_tree("groups").map_err(database)?;
        let log = File::open(path.join("db")).map_err(folder)?;
        // The files' directory entries must last as long as what is in them.
        for each in [&path, dir] {
            File::open(each).and_then(|handle| handle.sync_all()).map_err(folder)?;
        }
        let inner = Inner { db, records, names, groups, log, broken: RwLock::new(false), _lock: lock };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs `work` on a thread that may wait for the disk. The change happens even if the caller goes away.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> StoreFuture<'_, T> {
        let inner = Arc::clone(&self.inner);
        let task = tokio::task::spawn_blocking(move || work(&inner));
        Box::pin(async move {
            task.await.unwrap_or_else(|e| Err(StoreError::Unknown(format!("the store's thread failed: {e}"))))
        })
    }
}

impl RecordStore for SledStore {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        self.run(move |inner| inner.read(volume))
    }

    fn list(&self) -> StoreFuture<'_, Vec<Versioned>> {
        self.run(Inner::list)
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.run(move |inner| inner.create(&record))
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.run(move |inner| inner.swap(expected, &record))
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        self.run(move |inner| inner.remove(expected, volume))
    }
}

impl GroupStore for SledStore {
    fn read_group(&self, group: GroupId) -> StoreFuture<'_, Option<VersionedGroup>> {
        self.run(move |inner| inner.read_group(group))
    }

    fn list_groups(&self) -> StoreFuture<'_, Vec<VersionedGroup>> {
        self.run(Inner::list_groups)
    }

    fn swap_group(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<GroupRecord>,
    ) -> StoreFuture<'_, RecordVersion> {
        self.run(move |inner| inner.swap_group(group, expected, record.as_ref()))
    }
}

impl Inner {
    fn read(&self, volume: VolumeId) -> Result<Versioned, StoreError> {
        self.reading(|| {
            let value = self.records.get(key(volume)).map_err(|e| unreadable(&e))?;
            decode(&value.ok_or(StoreError::NotFound(volume))?)
        })
    }

    fn list(&self) -> Result<Vec<Versioned>, StoreError> {
        self.reading(|| {
            self.records.iter().map(|entry| decode(&entry.map_err(|e| unreadable(&e))?.1)).collect()
        })
    }

    fn create(&self, record: &VolumeRecord) -> Result<RecordVersion, StoreError> {
        let volume = record.volume_id;
        let version = RecordVersion(1);
        let value = encode(version, record)?;
        self.changing(|| {
            let change = (&self.records, &self.names).transaction(|(records, names)| {
                if records.get(key(volume))?.is_some() {
                    return Err(ConflictableTransactionError::Abort(StoreError::Exists(volume)));
                }
                if !record.is_gone() {
                    if let Some(other) = names.get(record.name.as_bytes())? {
                        return Err(ConflictableTransactionError::Abort(StoreError::Exists(unkey(&other))));
                    }
                    names.insert(record.name.as_bytes(), &key(volume))?;
                }
                records.insert(&key(volume), value.as_slice())?;
                Ok(())
            });
            change.map_err(refused)
        })?;
        Ok(version)
    }

    fn swap(&self, expected: RecordVersion, record: &VolumeRecord) -> Result<RecordVersion, StoreError> {
        let volume = record.volume_id;
        let version = expected.next();
        let value = encode(version, record)?;
        self.changing(|| {
            let change = (&self.records, &self.names).transaction(|(records, names)| {
                let abort = ConflictableTransactionError::Abort;
                let stored = records.get(key(volume))?.ok_or(abort(StoreError::NotFound(volume)))?;
                let old = decode(&stored).map_err(abort)?;
                if old.version != expected {
                    return Err(abort(StoreError::Conflict(volume)));
                }
                allowed(&old.record, record).map_err(abort)?;
                if record.is_gone() && !old.record.is_gone() {
                    names.remove(record.name.as_bytes())?;
                }
                records.insert(&key(volume), value.as_slice())?;
                Ok(())
            });
            change.map_err(refused)
        })?;
        Ok(version)
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> Result<(), StoreError> {
        self.changing(|| {
            let change = self.records.transaction(|records| {
                let abort = ConflictableTransactionError::Abort;
                let stored = records.get(key(volume))?.ok_or(abort(StoreError::NotFound(volume)))?;
                let old = decode(&stored).map_err(abort)?;
                if old.version != expected {
                    return Err(abort(StoreError::Conflict(volume)));
                }
                if !old.record.deleting {
                    let sentence =
                        format!("volume {volume} has no tombstone, so its record may not be removed");
                    return Err(abort(StoreError::Refused(sentence)));
                }
                records.remove(&key(volume))?;
                Ok(())
            });
            change.map_err(refused)
        })
    }

    fn read_group(&self, group: GroupId) -> Result<Option<VersionedGroup>, StoreError> {
        self.reading(|| {
            let value = self.groups.get(group.0.to_be_bytes()).map_err(|e| unreadable(&e))?;
            value.map(|value| decode_group(&value)).transpose()
        })
    }

    fn list_groups(&self) -> Result<Vec<VersionedGroup>, StoreError> {
        self.reading(|| {
            self.groups.iter().map(|entry| decode_group(&entry.map_err(|e| unreadable(&e))?.1)).collect()
        })
    }

    fn swap_group(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<&GroupRecord>,
    ) -> Result<RecordVersion, StoreError> {
        let mut version = RecordVersion(0);
        self.changing(|| {
            // One counter for all groups, which goes on when a record is removed.
            let drawn = self.db.generate_id().map_err(|e| unreadable(&e))?;
            version = RecordVersion(drawn);
            let value = record.map(|record| encode(version, record)).transpose()?;
            let change = self.groups.transaction(|groups| {
                let abort = ConflictableTransactionError::Abort;
                let found = groups.get(group.0.to_be_bytes())?;
                let found = found.map(|value| decode_group(&value)).transpose().map_err(abort)?;
                if found.map(|found| found.version) != expected {
                    return Err(abort(StoreError::GroupConflict(group)));
                }
                match &value {
                    Some(value) => drop(groups.insert(&group.0.to_be_bytes(), value.as_slice())?),
                    None => drop(groups.remove(&group.0.to_be_bytes())?),
                }
                Ok(())
            });
            change.map_err(refused)
        })?;
        Ok(version)
    }

    fn reading<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let broken = self.broken.read().unwrap_or_else(PoisonError::into_inner);
        if *broken {
            return Err(lost_flush());
        }
        work()
    }

    /// Makes a change durable before anybody sees it or hears of it.
    fn changing(&self, work: impl FnOnce() -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut broken = self.broken.write().unwrap_or_else(PoisonError::into_inner);
        if *broken {
            return Err(lost_flush());
        }
        match work() {
            // sled may have applied a part of it in memory.
            Err(StoreError::Unknown(reason)) => {
                *broken = true;
                Err(StoreError::Unknown(reason))
            }
            Err(refusal) => Err(refusal),
            Ok(()) => {
                let flushed = self.db.flush().map_err(io::Error::other).and_then(|_| self.log.sync_all());
                flushed.map_err(|e| {
                    *broken = true;
                    tracing::error!(error = %e, "the record store could not be flushed; it answers nothing any more");
                    StoreError::Unknown(format!("the change could not be flushed: {e}"))
                })
            }
        }
    }
}

/// What a swap may never change, whoever asks.
pub(crate) fn allowed(old: &VolumeRecord, new: &VolumeRecord) -> Result<(), StoreError> {
    let refuse = |what: &str| Err(StoreError::Refused(format!("volume {}: {what}", old.volume_id)));
    if old.name != new.name {
        return refuse("a swap may not rename it");
    }
    if (old.deleting && !new.deleting) || (old.retired && !new.retired) {
        return refuse("a deletion is never taken back");
    }
    if new.in_sync.is_empty() {
        return refuse("the in-sync set may not become empty");
    }
    if new.generation < old.generation || new.attachment < old.attachment {
        return refuse("generation and attachment never go back");
    }
    Ok(())
}

fn key(volume: VolumeId) -> [u8; 16] {
    volume.0.to_be_bytes()
}

fn unkey(bytes: &[u8]) -> VolumeId {
    let mut id = [0; 16];
    for (to, from) in id.iter_mut().zip(bytes) {
        *to = *from;
    }
    VolumeId(u128::from_be_bytes(id))
}

fn encode(version: RecordVersion, record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    let mut value = version.0.to_le_bytes().to_vec();
    serde_json::to_writer(&mut value, record)
        .map_err(|e| StoreError::Refused(format!("the record has no JSON form: {e}")))?;
    Ok(value)
}

fn split<T: DeserializeOwned>(value: &[u8]) -> Result<(RecordVersion, T), StoreError> {
    let (version, json) = value
        .split_first_chunk::<VERSION_BYTES>()
        .ok_or_else(|| StoreError::Refused("a stored record is cut short; restore the store".to_owned()))?;
    let record = serde_json::from_slice(json).map_err(|e| {
        StoreError::Refused(format!("a stored record cannot be read: {e}; restore the store"))
    })?;
    Ok((RecordVersion(u64::from_le_bytes(*version)), record))
}

/// The coordinator judges the record's format.
fn decode_group(value: &[u8]) -> Result<VersionedGroup, StoreError> {
    let (version, record) = split(value)?;
    Ok(VersionedGroup { version, record })
}

fn decode(value: &[u8]) -> Result<Versioned, StoreError> {
    let (version, record): (_, VolumeRecord) = split(value)?;
    if record.format > RECORD_FORMAT {
        return Err(StoreError::Refused(format!(
            "the record of volume {} has format {}, this program knows up to {RECORD_FORMAT}: use the newer program",
            record.volume_id, record.format
        )));
    }
    Ok(Versioned { version, record })
}

fn refused(error: TransactionError<StoreError>) -> StoreError {
    match error {
        TransactionError::Abort(refusal) => refusal,
        TransactionError::Storage(e) => StoreError::Unknown(format!("the database failed: {e}")),
    }
}

fn unreadable(error: &sled::Error) -> StoreError {
    StoreError::Unknown(format!("the database cannot be read: {error}"))
}

fn lost_flush() -> StoreError {
    StoreError::Unknown("an earlier change could not be flushed; the controller must be restarted".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_in_use_is_refused_by_name_and_free_again_once_closed() {
        let dir = tempfile::tempdir().unwrap();
        let first = SledStore::open(dir.path()).unwrap();
        let refusal = SledStore::open(dir.path()).err().unwrap();
        assert!(matches!(&refusal, OpenError::Locked(path) if path == dir.path()), "{refusal}");
        assert!(refusal.to_string().contains("locked by another process"));
        drop(first);
        // The database's own threads let its file go a moment later.
        let start = std::time::Instant::now();
        while let Err(error) = SledStore::open(dir.path()) {
            assert!(matches!(error, OpenError::Database { .. }), "{error}");
            assert!(start.elapsed() < std::time::Duration::from_secs(10), "{error}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
