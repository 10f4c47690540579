//! ControllerExpandVolume: one job of the volume's target (R31).

use holdfast_proto::csi::{ControllerExpandVolumeRequest, ControllerExpandVolumeResponse};
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::target::Job;
use tonic::Status;

use super::Inner;
use crate::volume_request::{check_access, check_capability, choose_size, existing_volume_id, parse_range};

impl Inner {
    pub(super) async fn expand_volume(
        &self,
        request: ControllerExpandVolumeRequest,
    ) -> Result<ControllerExpandVolumeResponse, Status> {
        let volume = existing_volume_id(&request.volume_id)?;
        let range = request.capacity_range.as_ref();
        let range = range.ok_or_else(|| Status::invalid_argument("capacity_range is missing"))?;
        let range = parse_range(Some(range))?;
        let access = request.volume_capability.as_ref().map(check_capability).transpose()?;
        let _growing = self.in_flight.begin(format!("the growth of volume {volume}"))?;
        let record = self.live(volume).await?;
        if let Some(access) = &access {
            check_access(&record, access)?;
        }
        let size_bytes = match range.required_bytes {
            // Only a limit: what it has must be within it.
            0 => record.size_bytes,
            _ => choose_size(range, true, &record.params.fs_type)?.max(record.size_bytes),
        };
        if range.limit_bytes.is_some_and(|limit| size_bytes > limit) {
            return Err(Status::out_of_range(format!(
                "capacity_range.limit_bytes {} is below the {} bytes that volume {volume} has; a volume never shrinks",
                range.limit_bytes.unwrap_or(0),
                record.size_bytes
            )));
        }
        if size_bytes > record.size_bytes {
            self.check_room(&record, size_bytes - record.size_bytes).await?;
            // Nobody else's volume waits for a node that does not answer: what is promised meanwhile the pools refuse.
            self.job(volume, Job::Grow { size_bytes }).await?;
            tracing::info!(%volume, bytes = size_bytes, "volume has grown");
        }
        Ok(ControllerExpandVolumeResponse {
            capacity_bytes: i64::try_from(size_bytes).unwrap_or(i64::MAX),
            // A raw block device has nothing above it that would have to grow; a file system grows on its node.
            node_expansion_required: !record.params.fs_type.is_empty(),
        })
    }

    /// Refuses a growth that would promise space twice. Pools that do not answer are judged by their own refusal.
    async fn check_room(&self, record: &VolumeRecord, more_bytes: u64) -> Result<(), Status> {
        let pools = self.free_space().await?;
        for replica in record.replicas.values().filter(|r| r.state != ReplicaState::Faulted) {
            let short = pools.iter().find(|p| p.node == replica.node && p.available_bytes < more_bytes);
            if let Some(pool) = short {
                return Err(Status::resource_exhausted(format!(
                    "volume {} cannot grow by {more_bytes} bytes: node {}, which holds a replica, has {} bytes free",
                    record.volume_id, pool.node, pool.available_bytes
                )));
            }
        }
        Ok(())
    }
}
