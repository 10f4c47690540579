//! The Pool service: the controller makes and removes replicas here.

use std::sync::Arc;

use holdfast_proto::storage as pb;
use holdfast_proto::storage::pool_server::Pool;
use holdfast_service::record_copies;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{NodeName, REGION_BYTES};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_store::{PoolError, StoreError};
use tonic::{Request, Response, Status};

use crate::replica::host::{HostError, ReplicaHost};
use crate::replica::kept_records;
use crate::replica::snapshot_blocks;
use crate::tls::Caller;
use crate::wire;

/// Serves the controller.
pub struct PoolService {
    /// This node.
    pub node: NodeName,
    /// Its replicas.
    pub host: Arc<ReplicaHost>,
    /// Callers come with certificates, and only the controller's is let in.
    pub tls: bool,
}

impl PoolService {
    /// Runs what waits for the disk on a thread that may.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ReplicaHost) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, Status> {
        let host = Arc::clone(&self.host);
        let result = tokio::task::spawn_blocking(move || work(&host)).await;
        result.unwrap_or(Err(HostError::Stopping)).map_err(|error| host_status(&error))
    }
}

#[tonic::async_trait]
impl Pool for PoolService {
    async fn get_pool(
        &self,
        request: Request<pb::GetPoolRequest>,
    ) -> Result<Response<pb::GetPoolReply>, Status> {
        Caller::of(&request, self.tls)?.must_be_controller()?;
        let space = self.blocking(ReplicaHost::space).await?;
        Ok(Response::new(pb::GetPoolReply {
            node: self.node.0.clone(),
            capacity_bytes: space.capacity_bytes,
            available_bytes: space.available_bytes,
        }))
    }

    async fn create_replica(
        &self,
        request: Request<pb::CreateReplicaRequest>,
    ) -> Result<Response<pb::CreateReplicaReply>, Status> {
        Caller::of(&request, self.tls)?.must_be_controller()?;
        let request = request.into_inner();
        let size_bytes = request.size_bytes;
        if size_bytes == 0 || !size_bytes.is_multiple_of(REGION_BYTES) {
            let text = format!(
                "{size_bytes} bytes is no replica size: it must be a multiple of {REGION_BYTES}, not 0"
            );
            return Err(Status::invalid_argument(text));
        }
        let meta = ReplicaMeta::new(
            wire::id(&request.volume_id)?,
            wire::id(&request.replica_id)?,
            wire::id(&request.lineage)?,
            size_bytes,
            wire::epoch(wire::required(request.epoch, "epoch")?),
        );
        let source =
            match (wire::maybe_id(&request.source_replica_id)?, wire::maybe_id(&request.source_snapshot_id)?)
            {
                (Some(replica), Some(snapshot)) => Some((replica, snapshot)),
                (None, None) => None,
                _ => return Err(Status::invalid_argument("a source is a replica and a snapshot of it")),
            };
        let copy = request.record.map(record_copies::from_wire).transpose()?;
        self.blocking(move |host| host.create(&meta, source, copy)).await?;
        Ok(Response::new(pb::CreateReplicaReply {}))
    }

    async fn delete_replica(
        &self,
        request: Request<pb::DeleteReplicaRequest>,
    ) -> Result<Response<pb::DeleteReplicaReply>, Status> {
        Caller::of(&request, self.tls)?.must_be_controller()?;
        let request = request.into_inner();
        let volume = wire::id(&request.volume_id)?;
        let replica = wire::id(&request.replica_id)?;
        self.blocking(move |host| host.delete(volume, replica)).await?;
        Ok(Response::new(pb::DeleteReplicaReply {}))
    }

    async fn read_records(
        &self,
        request: Request<pb::ReadRecordsRequest>,
    ) -> Result<Response<pb::ReadRecordsReply>, Status> {
        Caller::of(&request, self.tls)?.must_be_controller()?;
        let after = wire::maybe_id(&request.get_ref().after_replica_id)?;
        let count_max = kept_records::REPLICAS_MAX;
        let (kept, more) = self.blocking(move |host| host.records(after, count_max)).await?;
        Ok(Response::new(kept_records::reply(&self.host, kept, more).await))
    }

    async fn read_snapshot_blocks(
        &self,
        request: Request<pb::ReadSnapshotBlocksRequest>,
    ) -> Result<Response<pb::ReadSnapshotBlocksReply>, Status> {
        Caller::of(&request, self.tls)?.must_be_controller()?;
        let request = request.into_inner();
        let (volume, replica) = (wire::id(&request.volume_id)?, wire::id(&request.replica_id)?);
        let (base, snapshot) = (wire::maybe_id(&request.base_snapshot_id)?, wire::id(&request.snapshot_id)?);
        let range = snapshot_blocks::range(request.start_block, request.blocks)
            .ok_or_else(|| Status::invalid_argument("blocks must be 1 to 16384"))?;
        let absent = || Status::not_found(format!("replica {replica} of volume {volume} is not open here"));
        let actor = self.host.get(replica).ok_or_else(absent)?;
        if actor.env.disk.volume_id() != volume {
            return Err(absent());
        }
        let disk = &actor.env.disk;
        let runs = match base {
            None => snapshot_blocks::with_data(disk, snapshot, range).await,
            Some(base) => snapshot_blocks::differing(disk, base, snapshot, range).await,
        };
        let run = |run: BlockRange| pb::BlockRun { start_block: run.start.0, blocks: run.count };
        let runs = runs.map_err(|error| blocks_status(&error))?.into_iter().map(run).collect();
        Ok(Response::new(pb::ReadSnapshotBlocksReply { runs }))
    }
}

fn blocks_status(error: &StoreError) -> Status {
    let text = error.to_string();
    match error {
        StoreError::NoSnapshot { .. } => Status::not_found(text),
        _ => Status::data_loss(text),
    }
}

fn host_status(error: &HostError) -> Status {
    let text = error.to_string();
    match error {
        HostError::Pool(PoolError::NoSpace { .. } | PoolError::TooManyLayers(_)) => {
            Status::resource_exhausted(text)
        }
        HostError::Pool(PoolError::CloneTooSmall { .. }) => Status::out_of_range(text),
        HostError::Pool(PoolError::Conflict(_)) => Status::already_exists(text),
        HostError::Pool(PoolError::NotFound(_) | PoolError::NoSnapshot { .. }) => Status::not_found(text),
        HostError::Pool(PoolError::InvalidSize(_)) => Status::invalid_argument(text),
        HostError::Pool(PoolError::InUse(_) | PoolError::Locked(_)) | HostError::Stopping => {
            Status::unavailable(text)
        }
        HostError::OtherVolume { .. } => Status::failed_precondition(text),
        HostError::Pool(_) | HostError::Disk(_) => Status::internal(text),
    }
}
