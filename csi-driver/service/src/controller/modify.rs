//! ControllerModifyVolume: wanted replicas, minInSync and limits of a volume, while it is in use.
//!
//! 1. Everything is checked, and nodes for further replicas are found.
//! 2. One swap of the record decides: the parameters, new replicas as out of sync, and those given up that are too many and
//!    not in sync. A crash before: nothing happened. From here on the volume is what was asked for; the rest follows.
//! 3. New replicas are made on their nodes; making one twice is one. The target rebuilds them.
//! 4. A target that is attached reads the record; one that starts later does so anyway.
//! 5. Members that are too many are taken out by the target, one after the other (R7).
//! 6. What was given up is deleted on its node and forgotten; where the node does not answer it stays listed as faulted, and
//!    DeleteVolume asks that node (R34).
//!
//! A crash, or a node that does not answer, in 3 to 5: the caller repeats, 2 finds nothing to do, and they are done again.

use futures::future::join_all;
use holdfast_proto::csi::{ControllerModifyVolumeRequest, ControllerModifyVolumeResponse};
use holdfast_storage_core::ids::{ReplicaId, VolumeId};
use holdfast_storage_core::placement::PlacementRequest;
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::target::Job;
use holdfast_storage_core::transitions;
use tonic::{Code, Status};

use super::replace::never_in_sync;
use super::{Inner, SWAP_ATTEMPTS_MAX};
use crate::mutable_params::Changes;
use crate::status::{from_store, from_transition};
use crate::volume_request::existing_volume_id;

/// How often the members are looked at anew, because the set changed meanwhile; then the caller is told to repeat.
const REMOVALS_MAX: usize = 2 * crate::volume_request::REPLICAS_MAX as usize;

impl Inner {
    pub(super) async fn modify_volume(
        &self,
        request: ControllerModifyVolumeRequest,
    ) -> Result<ControllerModifyVolumeResponse, Status> {
        let volume = existing_volume_id(&request.volume_id)?;
        let changes = Changes::parse(&request.mutable_parameters)?;
        // Its own: a volume is published and unpublished while members are taken out.
        let _modifying = self.in_flight.begin(format!("the parameters of volume {volume}"))?;
        let record = {
            // No deletion between listing a replica and making it.
            let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
            let record = self.decide(volume, &changes).await?;
            self.make_new(&record).await?;
            record
        };
        let params = &record.params;
        tracing::info!(%volume, ?params, "volume is modified");
        if record.attached_to.is_some() {
            self.job(volume, Job::Reload).await.map_err(|status| follows_later(volume, &status))?;
        }
        if changes.replicas.is_some() {
            self.take_out_surplus(volume).await?;
            self.forget_given_up(volume).await;
        }
        Ok(ControllerModifyVolumeResponse {})
    }

    /// Steps 1 and 2.
    async fn decide(&self, volume: VolumeId, changes: &Changes) -> Result<VolumeRecord, Status> {
        let _placing = self.placing.lock().await;
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            if found.record.is_gone() {
                return Err(Status::not_found(format!("volume {volume} is deleted")));
            }
            let params = changes.apply("mutable_parameters", &found.record.params)?;
            check_min_in_sync(&found.record, params.min_in_sync)?;
            let mut record = transitions::set_params(&found.record, params).map_err(from_transition)?;
            let more = changes
                .replicas
                .map_or(0, |wanted| (wanted as usize).saturating_sub(transitions::kept(&record).count()));
            if more > 0 {
                let count = u32::try_from(more).unwrap_or(u32::MAX);
                for node in self.choose_nodes(&PlacementRequest::further(&record, count)).await? {
                    record = transitions::add_replica(&record, ReplicaId(rand::random()), &node)
                        .map_err(from_transition)?;
                }
            }
            if record == found.record {
                return Ok(record);
            }
            match self.store.swap(found.version, record.clone()).await {
                Ok(_) => return Ok(record),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    /// Step 3: those of this call, and those that an earlier one listed and did not make.
    async fn make_new(&self, record: &VolumeRecord) -> Result<(), Status> {
        let new = record.replicas.iter().filter(|(_, replica)| never_in_sync(replica));
        let made = join_all(new.map(|(id, _)| self.make_empty(record, *id))).await;
        let failed: Vec<String> = made
            .into_iter()
            .filter_map(|made| made.err().map(|status| status.message().to_owned()))
            .collect();
        if failed.is_empty() {
            return Ok(());
        }
        Err(Status::unavailable(format!(
            "volume {}: not every new replica could be made ({}); repeat the call",
            record.volume_id,
            failed.join("; ")
        )))
    }

    /// Step 5. Who goes is decided anew before each: a member may have failed, and another one have joined.
    async fn take_out_surplus(&self, volume: VolumeId) -> Result<(), Status> {
        let mut refused = None;
        for _ in 0..REMOVALS_MAX {
            let record = self.live(volume).await?;
            let Some(replica) = transitions::surplus(&record, record.params.replicas).first().copied() else {
                return Ok(());
            };
            if !record.in_sync.contains(&replica) {
                self.change(volume, |record| transitions::set_params(record, record.params.clone())).await?;
                continue;
            }
            match self.job(volume, Job::RemoveReplica { replica }).await {
                Ok(()) => tracing::info!(%volume, %replica, "a replica is taken out for good"),
                Err(status) if status.code() == Code::FailedPrecondition => refused = Some(status),
                Err(status) => return Err(follows_later(volume, &status)),
            }
        }
        let refused = refused.unwrap_or_else(|| Status::aborted("its replicas keep changing"));
        Err(follows_later(volume, &refused))
    }

    /// Step 6.
    async fn forget_given_up(&self, volume: VolumeId) {
        let Ok(found) = self.store.read(volume).await else { return };
        let given_up =
            found.record.replicas.iter().filter(|(_, replica)| replica.state == ReplicaState::Faulted);
        for (replica, _) in given_up {
            if let Err(status) = self.remove_old(volume, *replica).await {
                tracing::warn!(%volume, %replica, %status, "a replica stays listed until its node deletes it");
            }
        }
    }
}

/// More than there are would stop the volume's I/O at once.
fn check_min_in_sync(record: &VolumeRecord, min_in_sync: u32) -> Result<(), Status> {
    let in_sync = record.in_sync.len();
    if min_in_sync <= record.params.min_in_sync || min_in_sync as usize <= in_sync {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "mutable_parameters[minInSync] is {min_in_sync}, but volume {} has {in_sync} replicas in sync: its I/O would stop at \
         once; repeat the call when more are",
        record.volume_id
    )))
}

/// The record is changed; who is to follow did not yet.
fn follows_later(volume: VolumeId, status: &Status) -> Status {
    Status::unavailable(format!(
        "volume {volume} is to be as asked for, but its target has not followed yet ({}); repeat the call",
        status.message()
    ))
}
