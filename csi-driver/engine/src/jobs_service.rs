//! The VolumeJobs service: snapshots, growth and changed parameters, for the controller.

use std::sync::Arc;

use holdfast_proto::storage as pb;
use holdfast_proto::storage::volume_jobs_server::VolumeJobs;
use holdfast_storage_core::replica::DiskError;
use holdfast_storage_core::target::{Job, JobError};
use holdfast_storage_core::transitions::TransitionError;
use tonic::{Request, Response, Status};

use crate::data_service::{attach_status, joined};
use crate::target::table::{VolumeJobError, Volumes};
use crate::tls::Caller;
use crate::wire;

/// Serves the controller.
pub struct JobsService {
    /// The attached volumes.
    pub volumes: Arc<Volumes>,
    /// Callers come with certificates, and only the controller's is let in.
    pub tls: bool,
}

impl JobsService {
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        Caller::of(request, self.tls)?.must_be_controller()
    }

    /// Runs a job to its end, also if the caller gives up.
    async fn run(&self, volume_id: &str, what: Job) -> Result<(), Status> {
        let volume_id = wire::id(volume_id)?;
        let volumes = Arc::clone(&self.volumes);
        let job = tokio::spawn(async move { volumes.job(volume_id, what).await });
        joined(job.await)?.map_err(|error| job_status(&error))
    }
}

#[tonic::async_trait]
impl VolumeJobs for JobsService {
    async fn create_snapshot(
        &self,
        request: Request<pb::CreateSnapshotRequest>,
    ) -> Result<Response<pb::CreateSnapshotReply>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let snapshot = wire::id(&request.snapshot_id)?;
        self.run(&request.volume_id, Job::CreateSnapshot { snapshot }).await?;
        Ok(Response::new(pb::CreateSnapshotReply {}))
    }

    async fn delete_snapshot(
        &self,
        request: Request<pb::DeleteSnapshotRequest>,
    ) -> Result<Response<pb::DeleteSnapshotReply>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let snapshot = wire::id(&request.snapshot_id)?;
        self.run(&request.volume_id, Job::DeleteSnapshot { snapshot }).await?;
        Ok(Response::new(pb::DeleteSnapshotReply {}))
    }

    async fn grow_volume(
        &self,
        request: Request<pb::GrowVolumeRequest>,
    ) -> Result<Response<pb::GrowVolumeReply>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        self.run(&request.volume_id, Job::Grow { size_bytes: request.size_bytes }).await?;
        Ok(Response::new(pb::GrowVolumeReply {}))
    }

    async fn remove_replica(
        &self,
        request: Request<pb::RemoveReplicaRequest>,
    ) -> Result<Response<pb::RemoveReplicaReply>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let replica = wire::id(&request.replica_id)?;
        self.run(&request.volume_id, Job::RemoveReplica { replica }).await?;
        Ok(Response::new(pb::RemoveReplicaReply {}))
    }

    async fn bring_in_sync(
        &self,
        request: Request<pb::BringInSyncRequest>,
    ) -> Result<Response<pb::BringInSyncReply>, Status> {
        self.check(&request)?;
        let volume_id = wire::id(&request.into_inner().volume_id)?;
        let volumes = Arc::clone(&self.volumes);
        let work = tokio::spawn(async move { volumes.bring_in_sync(volume_id).await });
        joined(work.await)?.map_err(|error| job_status(&error))?;
        Ok(Response::new(pb::BringInSyncReply {}))
    }

    async fn apply_params(
        &self,
        request: Request<pb::ApplyParamsRequest>,
    ) -> Result<Response<pb::ApplyParamsReply>, Status> {
        self.check(&request)?;
        self.run(&request.into_inner().volume_id, Job::Reload).await?;
        Ok(Response::new(pb::ApplyParamsReply {}))
    }

    async fn hold_writes(
        &self,
        request: Request<pb::HoldWritesRequest>,
    ) -> Result<Response<pb::HoldWritesReply>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let snapshot = wire::id(&request.snapshot_id)?;
        self.run(&request.volume_id, Job::Hold { snapshot, hold_ms: request.hold_ms }).await?;
        Ok(Response::new(pb::HoldWritesReply {}))
    }

    async fn cut_held(
        &self,
        request: Request<pb::CutHeldRequest>,
    ) -> Result<Response<pb::CutHeldReply>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let snapshot = wire::id(&request.snapshot_id)?;
        self.run(&request.volume_id, Job::Cut { snapshot }).await?;
        Ok(Response::new(pb::CutHeldReply {}))
    }

    async fn release_held(
        &self,
        request: Request<pb::ReleaseHeldRequest>,
    ) -> Result<Response<pb::ReleaseHeldReply>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let snapshot = wire::id(&request.snapshot_id)?;
        self.run(&request.volume_id, Job::Release { snapshot }).await?;
        Ok(Response::new(pb::ReleaseHeldReply {}))
    }
}

fn job_status(error: &VolumeJobError) -> Status {
    let text = error.to_string();
    let error = match error {
        VolumeJobError::Target(error) => return attach_status(error),
        VolumeJobError::Elsewhere { .. } | VolumeJobError::NotAttached(_) => {
            return Status::failed_precondition(text);
        }
        VolumeJobError::TooLong(_) | VolumeJobError::NoNearer(_) => return Status::deadline_exceeded(text),
        VolumeJobError::Overtaken(_) => return Status::unavailable(text),
        VolumeJobError::Job(error) => error,
    };
    match error {
        JobError::Record(TransitionError::SnapshotsFull(_)) => Status::resource_exhausted(text),
        JobError::Record(TransitionError::Size { .. }) => Status::out_of_range(text),
        JobError::Record(_) | JobError::HoldOver => Status::failed_precondition(text),
        JobError::Replica { error: DiskError::NoSpace | DiskError::LayersFull, .. } => {
            Status::resource_exhausted(text)
        }
        JobError::Replica { .. } => Status::internal(text),
        // Writes went on, nothing is left.
        JobError::TooSlow | JobError::Busy => Status::aborted(text),
        JobError::Ended => Status::unavailable(text),
    }
}
