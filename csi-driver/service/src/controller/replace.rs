//! ReplaceReplica: a new, empty replica in place of one that does not come back.
//!
//! 1. One swap gives the old replica up and lists the new one. A crash before: nothing happened.
//! 2. The new replica is made on its node; making it twice is one. A crash before: the caller repeats, a listed replica
//!    that was never in sync is found, and this step is done again. The volume's target finds it in the record and
//!    rebuilds it.
//! 3. The old replica is deleted on its node and taken off the list. Where the node does not answer it stays listed as
//!    faulted, and DeleteVolume asks that node (R34).

use holdfast_proto::storage::{
    CreateReplicaRequest, DeleteReplicaRequest, Epoch as WireEpoch, ReplaceReplicaReply,
    ReplaceReplicaRequest,
};
use holdfast_storage_core::ids::{Epoch, ReplicaId, VolumeId};
use holdfast_storage_core::placement::PlacementRequest;
use holdfast_storage_core::record::{ReplicaRecord, ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::transitions;
use tonic::Status;

use super::{Inner, SWAP_ATTEMPTS_MAX};
use crate::registry_wire::parse_volume;
use crate::status::{from_store, from_transition};

impl Inner {
    pub(super) async fn replace_replica(
        &self,
        request: ReplaceReplicaRequest,
    ) -> Result<ReplaceReplicaReply, Status> {
        let volume = parse_volume(&request.volume_id)?;
        let old = match request.replica_id.as_str() {
            "" => None,
            text => {
                let id = text.parse::<ReplicaId>();
                Some(id.map_err(|error| Status::invalid_argument(error.to_string()))?)
            }
        };
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        let (record, new) = self.list_new(volume, old).await?;
        let node = record.replicas[&new].node.clone();
        self.make_empty(&record, new).await?;
        if let Some(old) = old
            && let Err(status) = self.remove_old(volume, old).await
        {
            tracing::warn!(%volume, replica = %old, %status, "a replaced replica stays listed until its node deletes it");
        }
        tracing::info!(%volume, replica = %new, %node, "a new replica is to be rebuilt");
        Ok(ReplaceReplicaReply { replica_id: new.to_string(), node: node.0 })
    }

    /// Step 1; gives the record and the new replica in it.
    async fn list_new(
        &self,
        volume: VolumeId,
        old: Option<ReplicaId>,
    ) -> Result<(VolumeRecord, ReplicaId), Status> {
        let _placing = self.placing.lock().await;
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            if let Some(new) = begun_before(&found.record, old) {
                return Ok((found.record, new));
            }
            let freed = match old {
                Some(old) => transitions::fault_replica(&found.record, old).map_err(from_transition)?,
                None => found.record.clone(),
            };
            let nodes = self.choose_nodes(&PlacementRequest::further(&freed, 1)).await?;
            let node = nodes.first().ok_or_else(|| Status::unavailable("no node can take the replica"))?;
            let new = ReplicaId(rand::random());
            let record = transitions::add_replica(&freed, new, node).map_err(from_transition)?;
            match self.store.swap(found.version, record.clone()).await {
                Ok(_) => return Ok((record, new)),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    /// Makes a listed replica that was never in sync, empty, on its node; one that is there stays as it is.
    pub(super) async fn make_empty(&self, record: &VolumeRecord, new: ReplicaId) -> Result<(), Status> {
        let create = CreateReplicaRequest {
            volume_id: record.volume_id.to_string(),
            replica_id: new.to_string(),
            lineage: record.lineage.to_string(),
            size_bytes: record.size_bytes,
            epoch: Some(WireEpoch { number: Epoch::default().number, nonce: Epoch::default().nonce }),
            ..CreateReplicaRequest::default()
        };
        self.pools.create_replica(&record.replicas[&new].node, create).await
    }

    /// Step 3; safe to repeat.
    pub(super) async fn remove_old(&self, volume: VolumeId, old: ReplicaId) -> Result<(), Status> {
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            let Some(entry) = found.record.replicas.get(&old) else { return Ok(()) };
            if entry.state != ReplicaState::Faulted {
                return Err(Status::failed_precondition(format!("replica {old} was not given up")));
            }
            let (volume_id, replica_id) = (volume.to_string(), old.to_string());
            self.pools.delete_replica(&entry.node, DeleteReplicaRequest { volume_id, replica_id }).await?;
            let record = transitions::forget_replica(&found.record, old).map_err(from_transition)?;
            match self.store.swap(found.version, record).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted("the record keeps changing"))
    }
}

/// The new replica that an earlier call listed: the old one is given up or off the list, and one was never in sync.
fn begun_before(record: &VolumeRecord, old: Option<ReplicaId>) -> Option<ReplicaId> {
    let given_up = |old: ReplicaId| {
        record.replicas.get(&old).is_none_or(|replica| replica.state == ReplicaState::Faulted)
    };
    if !old.is_none_or(given_up) {
        return None;
    }
    record.replicas.iter().find(|(_, replica)| never_in_sync(replica)).map(|(id, _)| *id)
}

/// Listed to be rebuilt from nothing ([`transitions::add_replica`]).
pub(super) fn never_in_sync(replica: &ReplicaRecord) -> bool {
    replica.state == ReplicaState::Offline { left_epoch: Epoch::default() }
}
