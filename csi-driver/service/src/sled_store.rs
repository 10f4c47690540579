//! Volume records in an embedded sled database: one machine without Kubernetes, the demo and development.
//!
//! Layout: tree `records` maps a volume id (16 bytes, big endian) to the record's version (8 bytes, little endian)
//! followed by the record as JSON, tree `groups` likewise a group id to its record; tree `names` maps the name of each
//! volume that is not gone to its id.
//!
//! The folder's lock makes this process the only one with the database, so every change of a record, a node's through the
//! registry too, passes through one thread here, and what is in memory is what is on the disk:
//!
//! 1. The thread takes the changes that wait, decides each on its own copy of the records, and writes the accepted ones to
//!    sled as one transaction. A crash: all of them are there or none.
//! 2. It makes that durable. sled's own flush stops at `sync_file_range`, which neither writes file metadata nor empties a
//!    disk's cache, so its file is synced once more through a handle of ours.
//! 3. Readers see the changes, and the callers hear of them; a refusal, too, waits until what it rests on is durable.
//!
//! So a reader never waits for the disk and never sees what a crash takes back, and changes that come at the same time share
//! one flush. After a failed write or flush memory may be ahead of the disk: nothing is answered any more.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use holdfast_storage_core::group::{GroupRecord, VersionedGroup};
use holdfast_storage_core::ids::{GroupId, RecordVersion, VolumeId};
use holdfast_storage_core::record::{RECORD_FORMAT, VolumeRecord};
use holdfast_storage_core::record_store::{GroupStore, RecordStore, StoreError, StoreFuture, Versioned};
use holdfast_storage_core::transitions;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sled::transaction::{TransactionError, Transactional};
use tokio::sync::{mpsc, oneshot};

/// Memory that sled may use for its page cache. Nothing is read from it but at the start.
const CACHE_BYTES_MAX: u64 = 8 << 20;
/// Changes that may wait for the thread; a caller with a further one waits until there is room.
const CHANGES_WAITING_MAX: usize = 1024;
/// Changes that share one flush; what waits beyond goes into the next one.
const CHANGES_PER_FLUSH_MAX: usize = 256;
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
    /// A record in it cannot be read.
    #[error("the record store {path} cannot be used: {source}")]
    Record {
        /// The folder.
        path: PathBuf,
        /// Which record, and why.
        source: StoreError,
    },
    /// The thread that changes records cannot be started.
    #[error("no thread can be started for the record store: {0}")]
    Thread(io::Error),
}

/// The store. Clones share one database; it is closed with the last of them.
#[derive(Clone)]
pub struct SledStore {
    inner: Arc<Inner>,
}

struct Inner {
    seen: Arc<RwLock<Seen>>,
    /// None only while it is being dropped.
    changes: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

/// What is durable, for readers.
#[derive(Default)]
struct Seen {
    records: BTreeMap<VolumeId, Arc<Versioned>>,
    groups: BTreeMap<GroupId, VersionedGroup>,
    /// A write or flush failed: memory may hold what the disk does not.
    broken: bool,
    /// How often changes were made durable.
    flushes: u64,
}

struct Request {
    change: Change,
    answer: oneshot::Sender<Result<RecordVersion, StoreError>>,
}

enum Change {
    Create(VolumeRecord),
    Swap(RecordVersion, VolumeRecord),
    Remove(RecordVersion, VolumeId),
    Group(GroupId, Option<RecordVersion>, Option<GroupRecord>),
}

/// What an accepted change makes of a record: none, it is removed.
enum Effect {
    Record(VolumeId, Option<Arc<Versioned>>),
    Group(GroupId, Option<VersionedGroup>),
}

impl SledStore {
    /// Opens the store in `dir`, which is made if absent, and reads all records.
    ///
    /// # Errors
    /// Another process has it open, the folder or the database cannot be used, or a record is damaged or of a later release.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        Self::start(Writer::open(dir)?).map_err(OpenError::Thread)
    }

    fn start(writer: Writer) -> io::Result<Self> {
        let seen = Arc::new(RwLock::new(Seen {
            records: writer.records.clone(),
            groups: writer.groups.clone(),
            ..Seen::default()
        }));
        let (changes, waiting) = mpsc::channel(CHANGES_WAITING_MAX);
        let (name, published) = ("hf-records".to_owned(), Arc::clone(&seen));
        let thread = std::thread::Builder::new().name(name).spawn(move || writer.run(waiting, &published))?;
        Ok(Self { inner: Arc::new(Inner { seen, changes: Some(changes), thread: Some(thread) }) })
    }

    fn reading<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Seen) -> Result<T, StoreError>,
    ) -> StoreFuture<'_, T> {
        let seen = self.inner.seen.read().unwrap_or_else(PoisonError::into_inner);
        let answer = if seen.broken { Err(lost_flush()) } else { work(&seen) };
        Box::pin(std::future::ready(answer))
    }

    /// Once the thread has a change it happens, even if the caller goes away.
    fn changing(&self, change: Change) -> StoreFuture<'_, RecordVersion> {
        let gone = || StoreError::Unknown("the store's thread ended".to_owned());
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let changes = self.inner.changes.as_ref().ok_or_else(gone)?;
            changes.send(Request { change, answer }).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())?
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.changes = None;
        // The database is free for the next one when this returns. A thread that panicked has let it go, too.
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl RecordStore for SledStore {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        self.reading(|seen| {
            seen.records.get(&volume).map(|found| (**found).clone()).ok_or(StoreError::NotFound(volume))
        })
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        self.reading(|seen| Ok(seen.records.values().cloned().collect()))
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.changing(Change::Create(record))
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.changing(Change::Swap(expected, record))
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        let removed = self.changing(Change::Remove(expected, volume));
        Box::pin(async move { removed.await.map(drop) })
    }
}

impl GroupStore for SledStore {
    fn read_group(&self, group: GroupId) -> StoreFuture<'_, Option<VersionedGroup>> {
        self.reading(|seen| Ok(seen.groups.get(&group).cloned()))
    }

    fn list_groups(&self) -> StoreFuture<'_, Vec<VersionedGroup>> {
        self.reading(|seen| Ok(seen.groups.values().cloned().collect()))
    }

    fn swap_group(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<GroupRecord>,
    ) -> StoreFuture<'_, RecordVersion> {
        self.changing(Change::Group(group, expected, record))
    }
}

/// The one that changes records: the database, and the records with every accepted change, durable or not yet.
struct Writer {
    db: sled::Db,
    trees: [sled::Tree; 3],
    /// sled's log file, opened once more for syncing.
    log: File,
    records: BTreeMap<VolumeId, Arc<Versioned>>,
    groups: BTreeMap<GroupId, VersionedGroup>,
    /// Of volumes that are not gone.
    names: BTreeMap<String, VolumeId>,
    _lock: Flock<File>,
}

/// What is to be written at once: to `records`, `names` and `groups`.
#[derive(Default)]
struct Batches([sled::Batch; 3]);

const RECORDS: usize = 0;
const NAMES: usize = 1;
const GROUPS: usize = 2;

impl Writer {
    fn open(dir: &Path) -> Result<Self, OpenError> {
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
        let tree = |name: &str| db.open_tree(name).map_err(database);
        let trees = [tree("records")?, tree("names")?, tree("groups")?];
        let log = File::open(path.join("db")).map_err(folder)?;
        // The files' directory entries must last as long as what is in them.
        for each in [&path, dir] {
            File::open(each).and_then(|handle| handle.sync_all()).map_err(folder)?;
        }
        let (records, groups) = (BTreeMap::new(), BTreeMap::new());
        let mut writer = Self { db, trees, log, records, groups, names: BTreeMap::new(), _lock: lock };
        writer.load().map_err(|source| OpenError::Record { path: dir.to_owned(), source })?;
        Ok(writer)
    }

    fn load(&mut self) -> Result<(), StoreError> {
        for entry in &self.trees[RECORDS] {
            let found = decode(&entry.map_err(|e| unreadable(&e))?.1)?;
            if !found.record.is_gone() {
                self.names.insert(found.record.name.clone(), found.record.volume_id);
            }
            self.records.insert(found.record.volume_id, Arc::new(found));
        }
        for entry in &self.trees[GROUPS] {
            let found = decode_group(&entry.map_err(|e| unreadable(&e))?.1)?;
            self.groups.insert(found.record.group_id, found);
        }
        Ok(())
    }

    /// Ends with the last sender.
    fn run(mut self, mut waiting: mpsc::Receiver<Request>, seen: &RwLock<Seen>) {
        let mut broken = false;
        while let Some(first) = waiting.blocking_recv() {
            let mut requests = vec![first];
            while requests.len() < CHANGES_PER_FLUSH_MAX
                && let Ok(next) = waiting.try_recv()
            {
                requests.push(next);
            }
            let answers = if broken { None } else { self.make(&requests, seen) };
            broken |= answers.is_none();
            let answers = answers.unwrap_or_else(|| requests.iter().map(|_| Err(lost_flush())).collect());
            for (request, answer) in requests.into_iter().zip(answers) {
                // A caller that went away does not want to know.
                let _ = request.answer.send(answer);
            }
        }
    }

    /// Steps 1 to 3; none where it failed, after which nobody may rely on memory.
    fn make(
        &mut self,
        requests: &[Request],
        seen: &RwLock<Seen>,
    ) -> Option<Vec<Result<RecordVersion, StoreError>>> {
        let (mut batches, mut effects, mut answers) = (Batches::default(), Vec::new(), Vec::new());
        for request in requests {
            let decided = self.decide(&request.change, &mut batches);
            answers.push(decided.map(|(version, effect)| {
                self.take_in(&effect);
                effects.push(effect);
                version
            }));
        }
        if effects.is_empty() {
            return Some(answers);
        }
        let made = self.write(&batches);
        let mut seen = seen.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = made {
            seen.broken = true;
            tracing::error!(%error, "the record store could not be written; it answers nothing any more");
            return None;
        }
        seen.flushes += 1;
        for effect in effects {
            match effect {
                Effect::Record(volume, Some(record)) => drop(seen.records.insert(volume, record)),
                Effect::Record(volume, None) => drop(seen.records.remove(&volume)),
                Effect::Group(group, Some(record)) => drop(seen.groups.insert(group, record)),
                Effect::Group(group, None) => drop(seen.groups.remove(&group)),
            }
        }
        Some(answers)
    }

    /// What becomes of a change; a refused one adds nothing to the batches.
    fn decide(&self, change: &Change, batches: &mut Batches) -> Result<(RecordVersion, Effect), StoreError> {
        match change {
            Change::Create(record) => {
                let volume = record.volume_id;
                if self.records.contains_key(&volume) {
                    return Err(StoreError::Exists(volume));
                }
                if let Some(other) = self.names.get(&record.name).filter(|_| !record.is_gone()) {
                    return Err(StoreError::Exists(*other));
                }
                let put = put_record(batches, RecordVersion(1), record)?;
                if !record.is_gone() {
                    batches.0[NAMES].insert(record.name.as_bytes(), &key(volume));
                }
                Ok(put)
            }
            Change::Swap(expected, record) => {
                let old = self.expected(*expected, record.volume_id)?;
                allowed(old, record)?;
                put_record(batches, expected.next(), record).inspect(|_| {
                    if record.is_gone() && !old.is_gone() {
                        batches.0[NAMES].remove(record.name.as_bytes());
                    }
                })
            }
            Change::Remove(expected, volume) => {
                if !self.expected(*expected, *volume)?.deleting {
                    let sentence =
                        format!("volume {volume} has no tombstone, so its record may not be removed");
                    return Err(StoreError::Refused(sentence));
                }
                batches.0[RECORDS].remove(&key(*volume));
                Ok((*expected, Effect::Record(*volume, None)))
            }
            Change::Group(group, expected, record) => {
                self.decide_group(*group, *expected, record.as_ref(), batches)
            }
        }
    }

    fn decide_group(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<&GroupRecord>,
        batches: &mut Batches,
    ) -> Result<(RecordVersion, Effect), StoreError> {
        if self.groups.get(&group).map(|found| found.version) != expected {
            return Err(StoreError::GroupConflict(group));
        }
        // One counter for all groups, which goes on when a record is removed.
        let version = RecordVersion(self.db.generate_id().map_err(|e| unreadable(&e))?);
        let key = group.0.to_be_bytes();
        let Some(record) = record else {
            batches.0[GROUPS].remove(&key);
            return Ok((version, Effect::Group(group, None)));
        };
        batches.0[GROUPS].insert(&key, encode(version, record)?);
        Ok((version, Effect::Group(group, Some(VersionedGroup { version, record: record.clone() }))))
    }

    fn expected(&self, expected: RecordVersion, volume: VolumeId) -> Result<&VolumeRecord, StoreError> {
        let found = self.records.get(&volume).ok_or(StoreError::NotFound(volume))?;
        if found.version == expected { Ok(&found.record) } else { Err(StoreError::Conflict(volume)) }
    }

    /// The next change of the batch is decided on this one.
    fn take_in(&mut self, effect: &Effect) {
        match effect {
            Effect::Record(volume, Some(new)) => {
                let (name, gone) = (&new.record.name, new.record.is_gone());
                if !gone {
                    self.names.insert(name.clone(), *volume);
                } else if self.names.get(name) == Some(volume) {
                    self.names.remove(name);
                }
                self.records.insert(*volume, Arc::clone(new));
            }
            Effect::Record(volume, None) => drop(self.records.remove(volume)),
            Effect::Group(group, Some(record)) => drop(self.groups.insert(*group, record.clone())),
            Effect::Group(group, None) => drop(self.groups.remove(group)),
        }
    }

    fn write(&self, batches: &Batches) -> io::Result<()> {
        let [records, names, groups] = &self.trees;
        let written = (records, names, groups).transaction(|trees| {
            let trees = [&trees.0, &trees.1, &trees.2];
            trees.into_iter().zip(&batches.0).try_for_each(|(tree, batch)| tree.apply_batch(batch))?;
            Ok(())
        });
        written.map_err(|error: TransactionError<()>| io::Error::other(format!("{error:?}")))?;
        self.db.flush().map_err(io::Error::other)?;
        self.log.sync_all()
    }
}

fn put_record(
    batches: &mut Batches,
    version: RecordVersion,
    record: &VolumeRecord,
) -> Result<(RecordVersion, Effect), StoreError> {
    let (volume, value) = (record.volume_id, encode(version, record)?);
    batches.0[RECORDS].insert(&key(volume), value);
    let found = Arc::new(Versioned { version, record: record.clone() });
    Ok((version, Effect::Record(volume, Some(found))))
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
    if !transitions::keeps_key(old, new) {
        return refuse("salt and key check are never changed");
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

fn unreadable(error: &sled::Error) -> StoreError {
    StoreError::Unknown(format!("the database cannot be read: {error}"))
}

fn lost_flush() -> StoreError {
    StoreError::Unknown("an earlier change could not be flushed; the controller must be restarted".to_owned())
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;
    use holdfast_storage_core::ids::{Lineage, NodeName, ReplicaId};
    use holdfast_storage_core::record::VolumeParams;
    use holdfast_storage_core::transitions::{self, NewVolume};

    use super::*;

    const MANY: u128 = 100;

    #[tokio::test]
    async fn changes_that_come_together_share_flushes_and_conflicts_are_told_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path()).unwrap();
        let made = join_all((1..=MANY).map(|id| store.create(mk_record(id, &format!("v{id}"))))).await;
        assert!(made.iter().all(|made| *made == Ok(RecordVersion(1))));
        let twins = join_all((1..=MANY).map(|id| store.create(mk_record(1000 + id, "twin")))).await;
        assert_eq!(twins.iter().filter(|made| made.is_ok()).count(), 1);
        let record = mk_record(1, "v1");
        let swaps = join_all((0..MANY).map(|_| store.swap(RecordVersion(1), record.clone()))).await;
        assert_eq!(swaps.iter().filter(|swapped| **swapped == Ok(RecordVersion(2))).count(), 1);
        let refused = swaps.iter().filter(|s| **s == Err(StoreError::Conflict(VolumeId(1)))).count();
        assert_eq!(refused as u128, MANY - 1);
        let flushes = store.inner.seen.read().unwrap().flushes;
        assert!(flushes < MANY as u64, "{flushes} flushes for {MANY} creates and two changes");
        let before = store.list().await.unwrap();
        drop(store);
        let again = reopen(dir.path()).unwrap();
        assert_eq!(again.list().await.unwrap(), before, "what was seen is on the disk");
        assert_eq!(before.len() as u128, MANY + 1);
    }

    #[tokio::test]
    async fn a_change_that_could_not_be_flushed_is_seen_by_nobody_and_nothing_is_answered_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path()).unwrap();
        // A device that refuses fsync.
        writer.log = File::open("/dev/null").unwrap();
        let store = SledStore::start(writer).unwrap();
        let unknown = |answer: Result<(), StoreError>| matches!(answer, Err(StoreError::Unknown(_)));
        assert!(store.list().await.unwrap().is_empty());
        assert!(unknown(store.create(mk_record(1, "one")).await.map(drop)));
        assert!(unknown(store.read(VolumeId(1)).await.map(drop)), "nobody knows whether it is there");
        assert!(unknown(store.list().await.map(drop)));
        assert!(unknown(store.create(mk_record(2, "two")).await.map(drop)));
        assert!(unknown(store.list_groups().await.map(drop)));
    }

    #[test]
    fn a_damaged_record_keeps_the_store_from_opening() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::open(dir.path()).unwrap();
        writer.trees[RECORDS].insert(key(VolumeId(1)), b"12345678{".as_slice()).unwrap();
        writer.db.flush().unwrap();
        drop(writer);
        let refusal = reopen(dir.path()).err().unwrap();
        assert!(matches!(&refusal, OpenError::Record { .. }), "{refusal}");
        assert!(refusal.to_string().contains("cannot be read"), "{refusal}");
    }

    fn mk_record(id: u128, name: &str) -> VolumeRecord {
        transitions::create(NewVolume {
            volume_id: VolumeId(id),
            name: name.to_owned(),
            lineage: Lineage(id),
            size_bytes: 16 << 20,
            epoch_nonce: 1,
            replicas: [(ReplicaId(id), NodeName("a".to_owned()))].into(),
            params: VolumeParams::new(1, ""),
            encryption: None,
            source: None,
        })
    }

    #[test]
    fn a_store_in_use_is_refused_by_name_and_free_again_once_closed() {
        let dir = tempfile::tempdir().unwrap();
        let first = SledStore::open(dir.path()).unwrap();
        let refusal = SledStore::open(dir.path()).err().unwrap();
        assert!(matches!(&refusal, OpenError::Locked(path) if path == dir.path()), "{refusal}");
        assert!(refusal.to_string().contains("locked by another process"));
        drop(first);
        reopen(dir.path()).unwrap();
    }

    /// The database's own threads let its file go a moment after it was closed.
    fn reopen(dir: &Path) -> Result<SledStore, OpenError> {
        let start = std::time::Instant::now();
        loop {
            match SledStore::open(dir) {
                Err(OpenError::Database { .. }) if start.elapsed() < std::time::Duration::from_secs(10) => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                other => return other,
            }
        }
    }
}
