//! DeleteVolume.
//!
//! 1. The tombstone is swapped in: nobody attaches the volume any more, its name is free. A crash before: nothing
//!    happened.
//! 2. Every listed replica is deleted on its node, faulted ones too; deleting an absent one is a success. A crash
//!    before or between: the caller repeats, the tombstone is found, and this step is done again.
//! 3. The record is removed (R34: not before every replica confirmed).
//!
//! A volume with snapshots is retired instead: it is gone for its users, its name is free, its snapshots stay, and the steps
//! above follow the deletion of the last of them.

use futures::future::join_all;
use holdfast_proto::csi::{DeleteVolumeRequest, DeleteVolumeResponse};
use holdfast_proto::storage::DeleteReplicaRequest;
use holdfast_storage_core::ids::VolumeId;
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{StoreError, Versioned};
use holdfast_storage_core::transitions::{self, TransitionError};
use tonic::Status;

use super::{Inner, SWAP_ATTEMPTS_MAX};
use crate::status::{from_store, from_transition};
use crate::volume_request::parse_volume_id;

impl Inner {
    pub(super) async fn delete_volume(
        &self,
        request: DeleteVolumeRequest,
    ) -> Result<DeleteVolumeResponse, Status> {
        // What cannot be one of our ids is a volume that does not exist: deleted already.
        let Some(volume) = parse_volume_id(&request.volume_id)? else {
            return Ok(DeleteVolumeResponse {});
        };
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        match self.store.read(volume).await {
            Ok(_) => {}
            Err(StoreError::NotFound(_)) => return Ok(DeleteVolumeResponse {}),
            Err(error) => return Err(from_store(error)),
        }
        // Decided by the record that is replaced: a snapshot that is committed meanwhile is kept, too.
        let record = self.change(volume, retire_or_bury).await?;
        if !record.deleting {
            tracing::info!(%volume, "volume deleted; its snapshots are kept");
            return Ok(DeleteVolumeResponse {});
        }
        self.erase(volume).await?;
        Ok(DeleteVolumeResponse {})
    }

    /// Deletes a retired volume that has no snapshot any more; leaves any other one alone.
    pub(super) async fn remove_if_bare(&self, volume: VolumeId) -> Result<(), Status> {
        let record = match self.store.read(volume).await {
            Ok(found) => found.record,
            Err(StoreError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(from_store(error)),
        };
        if !record.retired || record.committed().next().is_some() {
            return Ok(());
        }
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        self.erase(volume).await
    }

    /// Deletes a volume that has no snapshots with everything of it. Repeatable; no such volume is a success.
    pub(super) async fn erase(&self, volume: VolumeId) -> Result<(), Status> {
        let Some(found) = self.bury(volume).await? else { return Ok(()) };
        self.delete_replicas(&found.record).await?;
        // Not later than this: the record says whose clone it is.
        if let Some(source) = &found.record.source {
            self.release_source(source, volume).await?;
            self.sweep_soon.notify_one();
        }
        match self.store.remove(found.version, volume).await {
            Ok(()) | Err(StoreError::NotFound(_)) => {
                tracing::info!(%volume, name = found.record.name, "volume deleted");
                Ok(())
            }
            Err(error) => Err(from_store(error)),
        }
    }

    /// Sets the tombstone; `None` where there is no record.
    async fn bury(&self, volume: VolumeId) -> Result<Option<Versioned>, Status> {
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = match self.store.read(volume).await {
                Ok(found) => found,
                Err(StoreError::NotFound(_)) => return Ok(None),
                Err(error) => return Err(from_store(error)),
            };
            if found.record.deleting {
                return Ok(Some(found));
            }
            let record = transitions::begin_delete(&found.record).map_err(from_transition)?;
            match self.store.swap(found.version, record.clone()).await {
                Ok(version) => return Ok(Some(Versioned { version, record })),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    async fn delete_replicas(&self, record: &VolumeRecord) -> Result<(), Status> {
        let delete = record.replicas.iter().map(|(id, replica)| async move {
            let request =
                DeleteReplicaRequest { volume_id: record.volume_id.to_string(), replica_id: id.to_string() };
            self.pools.delete_replica(&replica.node, request).await
        });
        let failures: Vec<String> = join_all(delete)
            .await
            .into_iter()
            .filter_map(|r| r.err().map(|s| s.message().to_owned()))
            .collect();
        if failures.is_empty() {
            return Ok(());
        }
        Err(Status::unavailable(format!(
            "volume {}: not every replica confirmed its deletion ({}); its record stays until they do, repeat the call",
            record.volume_id,
            failures.join("; ")
        )))
    }
}

/// A volume with snapshots is gone for its users alone.
fn retire_or_bury(record: &VolumeRecord) -> Result<VolumeRecord, TransitionError> {
    match transitions::begin_delete(record) {
        Err(TransitionError::HasSnapshots { .. }) => transitions::retire(record),
        decided => decided,
    }
}
