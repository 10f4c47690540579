//! A new, empty replica for a volume: in place of one that does not come back, where one is missing, or as one more while
//! another is about to leave its node. ReplaceReplica is the operator's call for the first two.
//!
//! 1. One swap gives the old replica up, if there is one, and lists the new one. A crash before: nothing happened.
//! 2. The new replica is made on its node; making it twice is one. A crash before: the caller repeats, a listed replica
//!    that was never in sync is found, and this step is done again. The volume's target finds it in the record and
//!    rebuilds it.
//! 3. The old replica is deleted on its node and taken off the list, once as many members as wanted are in sync: until then it
//!    may be the only other copy, old as it is. The sweep does it, too. Where the node does not answer it stays listed as
//!    faulted, and DeleteVolume asks that node (R34).

use holdfast_proto::storage::{
    CreateReplicaRequest, DeleteReplicaRequest, Epoch as WireEpoch, ReplaceReplicaReply,
    ReplaceReplicaRequest,
};
use holdfast_storage_core::ids::{Epoch, NodeName, ReplicaId, VolumeId};
use holdfast_storage_core::placement::{LocalReplica, PlacementRequest};
use holdfast_storage_core::record::{ReplicaRecord, ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::target::Job;
use holdfast_storage_core::transitions;
use tonic::Status;

use super::{Inner, SWAP_ATTEMPTS_MAX};
use crate::registry_wire::parse_volume;
use crate::status::{from_store, from_transition};

/// Why a new replica is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Because {
    /// There are fewer than wanted.
    Missing,
    /// This one does not come back.
    Lost(ReplicaId),
    /// One of them is to leave its node.
    Leaving,
    /// One of them is to go to a node that is emptier.
    Rebalancing {
        /// From where.
        from: NodeName,
        /// To where, if it can.
        to: NodeName,
    },
}

impl Inner {
    pub(super) async fn replace_replica(
        &self,
        request: ReplaceReplicaRequest,
    ) -> Result<ReplaceReplicaReply, Status> {
        let volume = parse_volume(&request.volume_id)?;
        let because = match request.replica_id.as_str() {
            "" => Because::Missing,
            text => {
                let id = text.parse::<ReplicaId>();
                Because::Lost(id.map_err(|error| Status::invalid_argument(error.to_string()))?)
            }
        };
        self.renew(volume, because).await
    }

    /// All steps.
    pub(super) async fn renew(
        &self,
        volume: VolumeId,
        because: Because,
    ) -> Result<ReplaceReplicaReply, Status> {
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        let reply = match self.list_new(volume, &because).await? {
            None => ReplaceReplicaReply::default(),
            Some((record, new)) => {
                let node = record.replicas[&new].node.clone();
                self.make_empty(&record, new).await?;
                tracing::info!(%volume, replica = %new, %node, "a new replica is to be rebuilt");
                ReplaceReplicaReply { replica_id: new.to_string(), node: node.0 }
            }
        };
        if let Because::Lost(old) = because
            && let Err(status) = self.remove_old(volume, old).await
        {
            tracing::warn!(%volume, replica = %old, %status, "a replaced replica stays listed until its node deletes it");
        }
        Ok(reply)
    }

    /// Step 1; gives the record and the new replica in it, or nothing where the old one was replaced before.
    async fn list_new(
        &self,
        volume: VolumeId,
        because: &Because,
    ) -> Result<Option<(VolumeRecord, ReplicaId)>, Status> {
        let _placing = self.placing.lock().await;
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            if let Some(new) = begun_before(&found.record, because) {
                return Ok(Some((found.record, new)));
            }
            let freed = match because {
                Because::Lost(old) if replaced_before(&found.record, *old) => return Ok(None),
                Because::Lost(old) => {
                    transitions::fault_replica(&found.record, *old).map_err(from_transition)?
                }
                Because::Missing | Because::Leaving | Because::Rebalancing { .. } => found.record.clone(),
            };
            let nodes = self.choose_nodes(&self.request(&freed, because)).await?;
            let node = nodes.first().ok_or_else(|| Status::unavailable("no node can take the replica"))?;
            let new = ReplicaId(rand::random());
            let listed = match because {
                Because::Leaving | Because::Rebalancing { .. } => transitions::add_spare(&freed, new, node),
                Because::Missing | Because::Lost(_) => transitions::add_replica(&freed, new, node),
            };
            let record = listed.map_err(from_transition)?;
            match self.store.swap(found.version, record.clone()).await {
                Ok(_) => return Ok(Some((record, new))),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    /// Where the new one may go. One that leaves counts for no zone, which the new one may stand in.
    fn request(&self, record: &VolumeRecord, because: &Because) -> PlacementRequest {
        let mut request = PlacementRequest::further(record, 1);
        let leaves = |node: &NodeName| match because {
            Because::Missing | Because::Lost(_) => false,
            Because::Leaving => self.is_leaving(node),
            Because::Rebalancing { from, .. } => node == from,
        };
        let (leaving, kept) = std::mem::take(&mut request.kept).into_iter().partition(leaves);
        request.kept = kept;
        let leaving: Vec<NodeName> = leaving;
        request.excluded.extend(leaving);
        if let Because::Rebalancing { to, .. } = because {
            request.prefer = Some(to.clone());
            request.rules.local_replica = LocalReplica::Preferred;
        }
        request
    }

    /// Makes a listed replica that was never in sync, empty, on its node; one that is there stays as it is. A target that has as
    /// many members as wanted does not look for further ones by itself, so it is told.
    pub(super) async fn make_empty(&self, record: &VolumeRecord, new: ReplicaId) -> Result<(), Status> {
        let create = CreateReplicaRequest {
            volume_id: record.volume_id.to_string(),
            replica_id: new.to_string(),
            lineage: record.lineage.to_string(),
            size_bytes: record.size_bytes,
            epoch: Some(WireEpoch { number: Epoch::default().number, nonce: Epoch::default().nonce }),
            ..CreateReplicaRequest::default()
        };
        self.pools.create_replica(&record.replicas[&new].node, create).await?;
        if record.attached_to.is_some()
            && is_whole(record)
            && let Err(status) = self.job(record.volume_id, Job::Reload).await
        {
            tracing::warn!(volume = %record.volume_id, %status, "a target does not know of its new replica yet");
        }
        Ok(())
    }

    /// Step 3; safe to repeat. A success, with nothing done, while too few members are in sync.
    pub(super) async fn remove_old(&self, volume: VolumeId, old: ReplicaId) -> Result<(), Status> {
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            let Some(entry) = found.record.replicas.get(&old) else { return Ok(()) };
            if entry.state != ReplicaState::Faulted {
                return Err(Status::failed_precondition(format!("replica {old} was not given up")));
            }
            if !is_whole(&found.record) {
                return Ok(());
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
fn begun_before(record: &VolumeRecord, because: &Because) -> Option<ReplicaId> {
    if let Because::Lost(old) = because
        && !given_up(record, *old)
    {
        return None;
    }
    record.replicas.iter().find(|(_, replica)| never_in_sync(replica)).map(|(id, _)| *id)
}

fn given_up(record: &VolumeRecord, old: ReplicaId) -> bool {
    record.replicas.get(&old).is_none_or(|replica| replica.state == ReplicaState::Faulted)
}

/// Another one has taken its place, and is in sync.
fn replaced_before(record: &VolumeRecord, old: ReplicaId) -> bool {
    given_up(record, old) && transitions::kept(record).count() >= record.params.replicas as usize
}

/// As many members as wanted are in sync.
pub(super) fn is_whole(record: &VolumeRecord) -> bool {
    record.in_sync.len() >= record.params.replicas as usize
}

/// Listed to be rebuilt from nothing ([`transitions::add_replica`]).
pub(super) fn never_in_sync(replica: &ReplicaRecord) -> bool {
    replica.state == ReplicaState::Offline { left_epoch: Epoch::default() }
}
