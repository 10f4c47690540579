//! Work on a volume beside its I/O, done by a data process: which one is asked, and how its answer is read.

use std::time::Duration;

use holdfast_proto::storage::volume_jobs_client::VolumeJobsClient;
use holdfast_proto::storage::{
    ApplyParamsRequest, CreateSnapshotRequest, CutHeldRequest, DeleteSnapshotRequest, GrowVolumeRequest,
    HoldWritesRequest, ReleaseHeldRequest, RemoveReplicaRequest,
};
use holdfast_storage_core::ids::{NodeName, VolumeId};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::target::Job;
use tonic::{Code, Status};

use super::Inner;
use super::pools::{Pools, within};
use crate::status::from_store;

/// How long a job may take: longer than a data process works on a volume that is attached to nobody.
const JOB_TIMEOUT: Duration = Duration::from_secs(75);
/// How often a job follows a volume that is published or unpublished meanwhile.
const MOVES_MAX: u32 = 3;

impl Inner {
    /// Has a job done where the volume is attached, or else by a node that holds it.
    pub(super) async fn job(&self, volume: VolumeId, job: Job) -> Result<(), Status> {
        let mut moves = 0;
        loop {
            let record = self.store.read(volume).await.map_err(from_store)?.record;
            let node = self.workplace(&record)?;
            let Err(status) = self.pools.job(&node, volume, job).await else { return Ok(()) };
            // UNAVAILABLE, DEADLINE_EXCEEDED and "elsewhere" may only say that the volume moved.
            let moved = matches!(
                status.code(),
                Code::FailedPrecondition | Code::Unavailable | Code::DeadlineExceeded
            ) && self.store.read(volume).await.map_err(from_store)?.record.attached_to
                != record.attached_to;
            moves += 1;
            if !moved || moves >= MOVES_MAX {
                return Err(status);
            }
        }
    }

    /// Whose data process does the work.
    pub(super) fn workplace(&self, record: &VolumeRecord) -> Result<NodeName, Status> {
        if let Some(node) = &record.attached_to {
            return Ok(node.clone());
        }
        let alive = self.book.alive();
        let member = |node: &NodeName| {
            record.replicas.iter().any(|(id, r)| record.in_sync.contains(id) && r.node == *node)
        };
        let held = alive.iter().find(|info| member(&info.name));
        held.or(alive.first()).map(|info| info.name.clone()).ok_or_else(|| {
            Status::unavailable(format!(
                "volume {}: no node has announced itself lately that could do the work; repeat the call",
                record.volume_id
            ))
        })
    }
}

impl Pools {
    /// Has one node's data process do a job.
    pub(super) async fn job(&self, node: &NodeName, volume: VolumeId, job: Job) -> Result<(), Status> {
        let mut client = VolumeJobsClient::new(self.channel(&self.known(node)?)?);
        let volume_id = volume.to_string();
        let id = |snapshot: holdfast_storage_core::ids::SnapshotId| snapshot.to_string();
        match job {
            Job::CreateSnapshot { snapshot } => {
                let request = CreateSnapshotRequest { volume_id, snapshot_id: id(snapshot) };
                within(JOB_TIMEOUT, node, client.create_snapshot(request)).await.map(drop)
            }
            Job::DeleteSnapshot { snapshot } => {
                let request = DeleteSnapshotRequest { volume_id, snapshot_id: id(snapshot) };
                within(JOB_TIMEOUT, node, client.delete_snapshot(request)).await.map(drop)
            }
            Job::Grow { size_bytes } => {
                let request = GrowVolumeRequest { volume_id, size_bytes };
                within(JOB_TIMEOUT, node, client.grow_volume(request)).await.map(drop)
            }
            Job::RemoveReplica { replica } => {
                let request = RemoveReplicaRequest { volume_id, replica_id: replica.to_string() };
                within(JOB_TIMEOUT, node, client.remove_replica(request)).await.map(drop)
            }
            Job::Reload => {
                let request = ApplyParamsRequest { volume_id };
                within(JOB_TIMEOUT, node, client.apply_params(request)).await.map(drop)
            }
            Job::Hold { snapshot, hold_ms } => {
                let request = HoldWritesRequest { volume_id, snapshot_id: id(snapshot), hold_ms };
                within(JOB_TIMEOUT, node, client.hold_writes(request)).await.map(drop)
            }
            Job::Cut { snapshot } => {
                let request = CutHeldRequest { volume_id, snapshot_id: id(snapshot) };
                within(JOB_TIMEOUT, node, client.cut_held(request)).await.map(drop)
            }
            Job::Release { snapshot } => {
                let request = ReleaseHeldRequest { volume_id, snapshot_id: id(snapshot) };
                within(JOB_TIMEOUT, node, client.release_held(request)).await.map(drop)
            }
        }
    }
}
