//! The Data service: what the CSI node service asks of this node's data process.

use std::sync::Arc;

use holdfast_proto::storage as pb;
use holdfast_proto::storage::data_server::Data;
use holdfast_storage_core::encryption::{KEY_BYTES, VolumeKey};
use holdfast_storage_core::ids::{Attachment, VolumeId};
use holdfast_storage_core::record_store::StoreError;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use crate::target::table::Volumes;
use crate::target::volume::{AttachError, Volume};
use crate::wire;

/// Serves the CSI node service over the Unix socket.
pub struct DataService {
    /// The attached volumes.
    pub volumes: Arc<Volumes>,
}

impl DataService {
    fn attached(&self, volume_id: VolumeId) -> Result<Arc<Volume>, Status> {
        self.volumes
            .get(volume_id)
            .ok_or_else(|| Status::not_found(format!("volume {volume_id} is not attached to this node")))
    }
}

#[tonic::async_trait]
impl Data for DataService {
    async fn attach(&self, request: Request<pb::AttachRequest>) -> Result<Response<pb::AttachReply>, Status> {
        let mut request = request.into_inner();
        let key = Zeroizing::new(std::mem::take(&mut request.key));
        let volume_id = wire::id(&request.volume_id)?;
        let key = match key.len() {
            0 => None,
            _ => Some(VolumeKey::from_bytes(&key).ok_or_else(|| {
                Status::invalid_argument(format!("key has {} bytes, not {KEY_BYTES}", key.len()))
            })?),
        };
        let volumes = Arc::clone(&self.volumes);
        // A task of its own: a caller that gives up must not stop an attach half way.
        let attach =
            tokio::spawn(async move { volumes.attach(volume_id, Attachment(request.attachment), key).await });
        let volume = joined(attach.await)?.map_err(|error| attach_status(&error))?;
        let device = volume.path().map(|path| path.display().to_string()).unwrap_or_default();
        Ok(Response::new(pb::AttachReply { device, generation: volume.status().generation.0 }))
    }

    async fn detach(&self, request: Request<pb::DetachRequest>) -> Result<Response<pb::DetachReply>, Status> {
        let volume_id = wire::id(&request.into_inner().volume_id)?;
        let volumes = Arc::clone(&self.volumes);
        let detach = tokio::spawn(async move { volumes.detach(volume_id).await });
        joined(detach.await)?.map_err(|error| attach_status(&error))?;
        Ok(Response::new(pb::DetachReply {}))
    }

    async fn get_status(
        &self,
        request: Request<pb::GetStatusRequest>,
    ) -> Result<Response<pb::GetStatusReply>, Status> {
        let volume = self.attached(wire::id(&request.into_inner().volume_id)?)?;
        let status = volume.status();
        let replica = |replica: &holdfast_storage_core::target::ReplicaStatus| pb::ReplicaStatus {
            replica_id: replica.replica.to_string(),
            node: replica.node.0.clone(),
            state: replica.state.to_owned(),
            resync_bytes_done: replica.resync_bytes_done,
            resync_bytes_total: replica.resync_bytes_total,
            resync_bytes_copied: replica.resync_bytes_copied,
        };
        Ok(Response::new(pb::GetStatusReply {
            generation: status.generation.0,
            epoch: Some(wire::epoch_pb(status.epoch)),
            state: status.state.word().to_owned(),
            reason: status.state.reason().to_owned(),
            replicas: status.replicas.iter().map(replica).collect(),
            writes_acknowledged: status.writes_acknowledged,
            longest_stall_ms: status.longest_stall_ms,
            device: volume.path().map(|path| path.display().to_string()).unwrap_or_default(),
            corrupt_blocks_found: status.corruption.found,
            corrupt_blocks_repaired: status.corruption.repaired,
            corrupt_blocks_unrepairable: status.corruption.unrepairable,
            differing_blocks: status.corruption.differing,
            adopted_blocks: status.corruption.adopted,
            scrub: Some(pb::ScrubStatus {
                regions_done: status.scrub.regions_done,
                regions_total: status.scrub.regions_total,
                passes: status.scrub.passes,
            }),
        }))
    }

    async fn scrub(&self, request: Request<pb::ScrubRequest>) -> Result<Response<pb::ScrubReply>, Status> {
        self.attached(wire::id(&request.into_inner().volume_id)?)?.scrub();
        Ok(Response::new(pb::ScrubReply {}))
    }

    async fn count_allocated(
        &self,
        request: Request<pb::CountAllocatedRequest>,
    ) -> Result<Response<pb::CountAllocatedReply>, Status> {
        let volume = self.attached(wire::id(&request.into_inner().volume_id)?)?;
        let blocks = self.volumes.count_allocated(&volume).await.map_err(|error| {
            Status::unavailable(format!("a member's allocation cannot be counted: {error}"))
        })?;
        Ok(Response::new(pb::CountAllocatedReply { blocks }))
    }
}

pub(crate) fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, Status> {
    result.map_err(|_| Status::unavailable("the data process is stopping"))
}

pub(crate) fn attach_status(error: &AttachError) -> Status {
    let text = error.to_string();
    match error {
        AttachError::NotPublished { .. }
        | AttachError::OtherAttachment { .. }
        | AttachError::NoSuchFrontEnd { .. }
        | AttachError::Key { .. }
        | AttachError::Ended { .. } => Status::failed_precondition(text),
        AttachError::Timeout { .. } => Status::deadline_exceeded(text),
        AttachError::Store(StoreError::NotFound(_)) => Status::not_found(text),
        AttachError::Store(_) => Status::unavailable(text),
        AttachError::FrontEnd { .. } => Status::internal(text),
    }
}
