//! The thread that changes records, and the database under it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use holdfast_storage_core::group::{GroupRecord, VersionedGroup};
use holdfast_storage_core::ids::{GroupId, NodeName, RecordVersion, VolumeId};
use holdfast_storage_core::node_directory::NodeState;
use holdfast_storage_core::record::{RECORD_FORMAT, VolumeRecord};
use holdfast_storage_core::record_store::{StoreError, Versioned};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sled::transaction::{TransactionError, Transactional};
use tokio::sync::mpsc;

use super::{Change, Effect, OpenError, Request, Seen, allowed, lost_flush};

/// Memory that sled may use for its page cache. Nothing is read from it but at the start.
const CACHE_BYTES_MAX: u64 = 8 << 20;
/// Changes that share one flush; what waits beyond goes into the next one.
const CHANGES_PER_FLUSH_MAX: usize = 256;
/// Bytes of the version in front of a record's JSON.
const VERSION_BYTES: usize = 8;

/// The one that changes records: the database, and the records with every accepted change, durable or not yet.
pub(super) struct Writer {
    db: sled::Db,
    trees: [sled::Tree; 4],
    /// sled's log file, opened once more for syncing.
    pub(super) log: File,
    pub(super) records: BTreeMap<VolumeId, Arc<Versioned>>,
    pub(super) groups: BTreeMap<GroupId, VersionedGroup>,
    pub(super) nodes: BTreeMap<NodeName, NodeState>,
    /// Of volumes that are not gone.
    names: BTreeMap<String, VolumeId>,
    _lock: Flock<File>,
}

/// What is to be written at once: to `records`, `names`, `groups` and `nodes`.
#[derive(Default)]
struct Batches([sled::Batch; 4]);

const RECORDS: usize = 0;
const NAMES: usize = 1;
const GROUPS: usize = 2;
const NODES: usize = 3;

impl Writer {
    pub(super) fn open(dir: &Path) -> Result<Self, OpenError> {
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
        let trees = [tree("records")?, tree("names")?, tree("groups")?, tree("nodes")?];
        let log = File::open(path.join("db")).map_err(folder)?;
        // The files' directory entries must last as long as what is in them.
        for each in [&path, dir] {
            File::open(each).and_then(|handle| handle.sync_all()).map_err(folder)?;
        }
        let (records, groups) = (BTreeMap::new(), BTreeMap::new());
        let (nodes, names) = (BTreeMap::new(), BTreeMap::new());
        let mut writer = Self { db, trees, log, records, groups, nodes, names, _lock: lock };
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
        for entry in &self.trees[NODES] {
            let (name, state) = entry.map_err(|e| unreadable(&e))?;
            let damaged = || StoreError::Refused("what was decided about a node cannot be read".to_owned());
            let name = String::from_utf8(name.to_vec()).map_err(|_| damaged())?;
            self.nodes.insert(NodeName(name), serde_json::from_slice(&state).map_err(|_| damaged())?);
        }
        Ok(())
    }

    /// Ends with the last sender.
    pub(super) fn run(mut self, mut waiting: mpsc::Receiver<Request>, seen: &RwLock<Seen>) {
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
            seen.take_in(effect);
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
            Change::Node(node, state) => {
                let (batch, name) = (&mut batches.0[NODES], node.0.as_bytes());
                match state {
                    NodeState::Active => batch.remove(name),
                    NodeState::Draining | NodeState::Removed => batch.insert(name, json(state)?),
                }
                // There is one who decides, and the last decision counts: no version.
                Ok((RecordVersion(0), Effect::Node(node.clone(), *state)))
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
            // Nothing is decided on it here.
            Effect::Node(..) => {}
        }
    }

    #[cfg(test)]
    pub(super) fn damage(&self, volume: VolumeId) {
        self.trees[RECORDS].insert(key(volume), b"12345678{".as_slice()).unwrap();
        self.db.flush().unwrap();
    }

    fn write(&self, batches: &Batches) -> io::Result<()> {
        let [records, names, groups, nodes] = &self.trees;
        let written = (records, names, groups, nodes).transaction(|trees| {
            let trees = [&trees.0, &trees.1, &trees.2, &trees.3];
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

fn key(volume: VolumeId) -> [u8; 16] {
    volume.0.to_be_bytes()
}

fn encode(version: RecordVersion, record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    let mut value = version.0.to_le_bytes().to_vec();
    value.extend(json(record)?);
    Ok(value)
}

fn json(record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|e| StoreError::Refused(format!("the record has no JSON form: {e}")))
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
