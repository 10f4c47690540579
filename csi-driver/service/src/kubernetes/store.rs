//! Volume records as objects of kind `VolumeRecord`.
//!
//! **Versions.** A record's version is a counter in the object (`spec.version`), +1 with each change of the spec. A
//! swap reads the object, compares the counter, and replaces the object under the resourceVersion it read: the API server
//! carries it out only if the object is still the one in which the counter was compared. resourceVersion itself cannot be the
//! record's version: it is text without promised meaning, and moves with labels and annotations, which are nobody's swap.
//! The API server refuses every change of a spec that does not count up, whoever makes it.
//!
//! **Outcomes.** Each change signs the spec with a random id; the last [`SWAP_IDS`] are kept. Where the server says that
//! the object moved, the swap reads it again: with its own id among them it was this very change (something between sent it
//! twice), with the expected counter something else than the spec was changed, and else another writer was first. No answer, or none of the server's own, is
//! [`StoreError::Unknown`].

use std::sync::Arc;

use holdfast_storage_core::ids::{RecordVersion, VolumeId};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{RecordStore, StoreError, StoreFuture, Versioned};
use kube::core::ObjectMeta;

use super::client::{CallError, Deadline, KubernetesClient};
use super::convert::{from_spec, to_spec};
use super::objects::VolumeRecord as Object;
use super::objects::{SWAP_IDS, VolumeRecordSpec};
use crate::sled_store::allowed;

/// How often a change that met another change of the same object looks again; then it is a conflict.
pub(super) const RACES_MAX: u32 = 8;

/// The store. Clones share one connection pool.
#[derive(Clone)]
pub struct KubernetesStore {
    pub(super) client: KubernetesClient,
}

impl KubernetesStore {
    /// A store at the API server of `client`, where the definitions of our kinds must be installed.
    #[must_use]
    pub fn new(client: KubernetesClient) -> Self {
        Self { client }
    }

    /// The object of a volume, also one whose name is still being reserved.
    pub(super) async fn object(&self, deadline: Deadline, volume: VolumeId) -> Result<Object, StoreError> {
        self.client.get(deadline, &volume.to_string()).await.map_err(|error| about(volume, error))
    }

    async fn read_now(&self, volume: VolumeId) -> Result<Versioned, StoreError> {
        versioned(volume, &self.object(Deadline::new(), volume).await?)
    }

    async fn list_now(&self) -> Result<Vec<Arc<Versioned>>, StoreError> {
        let objects: Vec<Object> = self.client.list(Deadline::new()).await.map_err(about_list)?;
        let there = objects.iter().filter(|object| !object.spec.pending);
        there.map(|object| from_spec(&object.spec).map(Arc::new)).collect()
    }

    async fn swap_now(
        &self,
        expected: RecordVersion,
        record: VolumeRecord,
    ) -> Result<RecordVersion, StoreError> {
        let (volume, deadline) = (record.volume_id, Deadline::new());
        let (version, mut sent) = (expected.next(), None::<VolumeRecordSpec>);
        for _ in 0..RACES_MAX {
            let object = self.object(deadline, volume).await?;
            if sent.as_ref().is_some_and(|change| object.spec.holds(change)) {
                return Ok(version);
            }
            let old = versioned(volume, &object)?;
            if old.version != expected {
                return Err(if sent.is_some() && old.version.0 > expected.0 + SWAP_IDS as u64 {
                    StoreError::Unknown(format!(
                        "too many others changed volume {volume} to know whether this swap did"
                    ))
                } else {
                    StoreError::Conflict(volume)
                });
            }
            allowed(&old.record, &record)?;
            // A repeat is the same change: it must be known again whichever of the two was carried out.
            let spec = match sent.take() {
                Some(spec) => spec,
                None => to_spec(version, &record, &object.spec.swap_ids)?,
            };
            match self.replace(deadline, volume, object.metadata, &spec).await {
                Err(StoreError::Conflict(_)) => sent = Some(spec),
                answer => return answer.map(|_| version),
            }
        }
        Err(StoreError::Conflict(volume))
    }

    async fn remove_now(&self, expected: RecordVersion, volume: VolumeId) -> Result<(), StoreError> {
        let deadline = Deadline::new();
        for _ in 0..RACES_MAX {
            let object = self.object(deadline, volume).await?;
            let old = versioned(volume, &object)?;
            if old.version != expected {
                return Err(StoreError::Conflict(volume));
            }
            if !old.record.deleting {
                let sentence = format!("volume {volume} has no tombstone, so its record may not be removed");
                return Err(StoreError::Refused(sentence));
            }
            match self.client.delete(deadline, &object).await {
                Err(CallError::Moved) => {}
                Err(error) => return Err(about(volume, error)),
                Ok(()) => {
                    self.release_name(deadline, &old.record.name, volume).await;
                    return Ok(());
                }
            }
        }
        Err(StoreError::Conflict(volume))
    }

    /// Replaces the object that `metadata` is of; [`StoreError::Conflict`] if it is not at that resourceVersion any more.
    pub(super) async fn replace(
        &self,
        deadline: Deadline,
        volume: VolumeId,
        metadata: ObjectMeta,
        spec: &VolumeRecordSpec,
    ) -> Result<Object, StoreError> {
        // Without a version the server would replace whatever is there.
        if metadata.resource_version.as_ref().is_none_or(String::is_empty) {
            return Err(StoreError::Refused(format!(
                "the object of volume {volume} came without a resourceVersion"
            )));
        }
        let object = Object { metadata, spec: spec.clone() };
        let stored = self.client.put(deadline, &volume.to_string(), &object).await;
        self.as_sent(volume, spec, stored.map_err(|error| about(volume, error))?)
    }

    /// A definition of another release could change what it stores; then nobody may build on it.
    pub(super) fn as_sent(
        &self,
        volume: VolumeId,
        spec: &VolumeRecordSpec,
        stored: Object,
    ) -> Result<Object, StoreError> {
        if stored.spec == *spec {
            return Ok(stored);
        }
        Err(StoreError::Unknown(format!(
            "the API server stored something else than the record of volume {volume}: install the definitions of this release"
        )))
    }
}

impl RecordStore for KubernetesStore {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        Box::pin(self.read_now(volume))
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        Box::pin(self.list_now())
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        Box::pin(self.create_now(record))
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        Box::pin(self.swap_now(expected, record))
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        Box::pin(self.remove_now(expected, volume))
    }
}

/// The record of an object; one whose name is still being reserved is no volume yet.
pub(super) fn versioned(volume: VolumeId, object: &Object) -> Result<Versioned, StoreError> {
    if object.spec.pending {
        return Err(StoreError::NotFound(volume));
    }
    let found = from_spec(&object.spec)?;
    if found.record.volume_id != volume {
        return Err(StoreError::Refused(format!(
            "the object of volume {volume} holds the record of volume {}: restore it from a backup",
            found.record.volume_id
        )));
    }
    Ok(found)
}

/// An answer about a volume's object.
pub(super) fn about(volume: VolumeId, error: CallError) -> StoreError {
    match error {
        CallError::Missing => StoreError::NotFound(volume),
        CallError::Taken => StoreError::Exists(volume),
        CallError::Moved => StoreError::Conflict(volume),
        CallError::Refused(reason) => StoreError::Refused(reason),
        CallError::Unknown(reason) => StoreError::Unknown(reason),
    }
}

/// An answer about no volume's own object.
pub(super) fn about_list(error: CallError) -> StoreError {
    match error {
        CallError::Refused(reason) => StoreError::Refused(reason),
        CallError::Unknown(reason) => StoreError::Unknown(reason),
        CallError::Missing | CallError::Taken | CallError::Moved => {
            StoreError::Unknown(format!("an unexpected answer: {error:?}"))
        }
    }
}
