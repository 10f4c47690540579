//! Volume records in an embedded sled database: one machine without Kubernetes, the demo and development.
//!
//! Layout: tree `records` maps a volume id (16 bytes, big endian) to the record's version (8 bytes, little endian)
//! followed by the record as JSON, tree `groups` likewise a group id to its record; tree `names` maps the name of each
//! volume that is not gone to its id; tree `nodes` maps a node's name to what an operator decided about it, as JSON.
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
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use holdfast_storage_core::group::{GroupRecord, VersionedGroup};
use holdfast_storage_core::ids::{GroupId, NodeName, RecordVersion, VolumeId};
use holdfast_storage_core::node_directory::{NodeState, NodeStates};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{GroupStore, RecordStore, StoreError, StoreFuture, Versioned};
use holdfast_storage_core::transitions;
use tokio::sync::{mpsc, oneshot};

mod writer;

use writer::Writer;

/// Changes that may wait for the thread; a caller with a further one waits until there is room.
const CHANGES_WAITING_MAX: usize = 1024;

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
    nodes: BTreeMap<NodeName, NodeState>,
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
    Node(NodeName, NodeState),
}

/// What an accepted change makes of a record: none, it is removed.
enum Effect {
    Record(VolumeId, Option<Arc<Versioned>>),
    Group(GroupId, Option<VersionedGroup>),
    Node(NodeName, NodeState),
}

impl Seen {
    fn take_in(&mut self, effect: Effect) {
        match effect {
            Effect::Record(volume, Some(record)) => drop(self.records.insert(volume, record)),
            Effect::Record(volume, None) => drop(self.records.remove(&volume)),
            Effect::Group(group, Some(record)) => drop(self.groups.insert(group, record)),
            Effect::Group(group, None) => drop(self.groups.remove(&group)),
            Effect::Node(node, NodeState::Active) => drop(self.nodes.remove(&node)),
            Effect::Node(node, state) => drop(self.nodes.insert(node, state)),
        }
    }
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
            nodes: writer.nodes.clone(),
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

impl NodeStates for SledStore {
    fn node_states(&self) -> StoreFuture<'_, BTreeMap<NodeName, NodeState>> {
        self.reading(|seen| Ok(seen.nodes.clone()))
    }

    fn set_node_state(&self, node: NodeName, state: NodeState) -> StoreFuture<'_, ()> {
        let set = self.changing(Change::Node(node, state));
        Box::pin(async move { set.await.map(drop) })
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

fn lost_flush() -> StoreError {
    StoreError::Unknown("an earlier change could not be flushed; the controller must be restarted".to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use futures::future::join_all;
    use holdfast_storage_core::ids::{Lineage, ReplicaId};
    use holdfast_storage_core::record::VolumeParams;
    use holdfast_storage_core::transitions::NewVolume;

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

    #[tokio::test]
    async fn what_was_decided_about_nodes_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path()).unwrap();
        let node = |name: &str| NodeName(name.to_owned());
        store.set_node_state(node("a"), NodeState::Draining).await.unwrap();
        store.set_node_state(node("a"), NodeState::Removed).await.unwrap();
        store.set_node_state(node("b"), NodeState::Draining).await.unwrap();
        store.set_node_state(node("b"), NodeState::Active).await.unwrap();
        drop(store);
        let states = reopen(dir.path()).unwrap().node_states().await.unwrap();
        assert_eq!(states, [(node("a"), NodeState::Removed)].into());
    }

    #[test]
    fn a_damaged_record_keeps_the_store_from_opening() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::open(dir.path()).unwrap();
        writer.damage(VolumeId(1));
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
