//! A record store and a node directory in memory, with the faults a real one has.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use holdfast_storage_core::ids::{NodeName, RecordVersion, VolumeId};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{RecordStore, StoreError, StoreFuture, Versioned};

#[derive(Default)]
pub struct MemStore {
    records: Mutex<HashMap<VolumeId, Versioned>>,
    nodes: Mutex<HashMap<NodeName, NodeInfo>>,
    /// The next swap is applied, but its answer is lost (R8).
    pub lose_next_swap_answer: AtomicBool,
    /// Nothing answers.
    pub down: AtomicBool,
}

impl MemStore {
    pub fn get(&self, volume: VolumeId) -> Versioned {
        self.records.lock().unwrap()[&volume].clone()
    }

    /// Changes a record as the controller does.
    pub fn update(&self, volume: VolumeId, change: impl FnOnce(&mut VolumeRecord)) {
        let mut records = self.records.lock().unwrap();
        let entry = records.get_mut(&volume).unwrap();
        change(&mut entry.record);
        entry.version = RecordVersion(entry.version.0 + 1);
    }

    fn check_up(&self) -> Result<(), StoreError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(StoreError::Unknown("the store is down".into()));
        }
        Ok(())
    }
}

impl RecordStore for MemStore {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        Box::pin(async move {
            self.check_up()?;
            self.records.lock().unwrap().get(&volume).cloned().ok_or(StoreError::NotFound(volume))
        })
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        Box::pin(async move {
            self.check_up()?;
            Ok(self.records.lock().unwrap().values().cloned().map(Arc::new).collect())
        })
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        Box::pin(async move {
            self.check_up()?;
            let mut records = self.records.lock().unwrap();
            if records.contains_key(&record.volume_id) {
                return Err(StoreError::Exists(record.volume_id));
            }
            let version = RecordVersion(1);
            records.insert(record.volume_id, Versioned { version, record });
            Ok(version)
        })
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        Box::pin(async move {
            self.check_up()?;
            let mut records = self.records.lock().unwrap();
            let volume = record.volume_id;
            let entry = records.get_mut(&volume).ok_or(StoreError::NotFound(volume))?;
            if entry.version != expected {
                return Err(StoreError::Conflict(volume));
            }
            entry.version = RecordVersion(entry.version.0 + 1);
            entry.record = record;
            if self.lose_next_swap_answer.swap(false, Ordering::SeqCst) {
                return Err(StoreError::Unknown("the answer was lost".into()));
            }
            Ok(entry.version)
        })
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.check_up()?;
            let mut records = self.records.lock().unwrap();
            match records.get(&volume) {
                None => Err(StoreError::NotFound(volume)),
                Some(entry) if entry.version != expected => Err(StoreError::Conflict(volume)),
                Some(entry) if !entry.record.deleting => Err(StoreError::Refused("no tombstone".into())),
                Some(_) => {
                    records.remove(&volume);
                    Ok(())
                }
            }
        })
    }
}

impl NodeDirectory for MemStore {
    fn announce(&self, node: NodeInfo) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.check_up()?;
            self.nodes.lock().unwrap().insert(node.name.clone(), node);
            Ok(())
        })
    }

    fn list_nodes(&self) -> StoreFuture<'_, Vec<NodeInfo>> {
        Box::pin(async move {
            self.check_up()?;
            Ok(self.nodes.lock().unwrap().values().cloned().collect())
        })
    }
}
