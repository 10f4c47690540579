//! NodeGetVolumeStats.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use holdfast_proto::csi::volume_usage::Unit;
use holdfast_proto::csi::{NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, VolumeUsage};
use nix::sys::statvfs::statvfs;
use tonic::Status;

use super::mount_table::Device;
use super::stage::table;
use super::{Inner, blocking, paths};
use crate::volume_request::existing_volume_id;

/// /sys counts in sectors of this size, whatever the device's own.
const SECTOR_BYTES: i64 = 512;

impl Inner {
    pub(super) async fn stats(
        &self,
        request: NodeGetVolumeStatsRequest,
    ) -> Result<NodeGetVolumeStatsResponse, Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("volume_id is missing"));
        }
        if request.volume_path.is_empty() {
            return Err(Status::invalid_argument("volume_path is missing"));
        }
        let volume = existing_volume_id(&request.volume_id)?;
        let absent = format!("volume_path: volume {volume} is not at \"{}\"", request.volume_path);
        // Anything that is not a path of ours cannot hold a volume of ours.
        let path = paths::resolve("volume_path", &request.volume_path, &self.kubelet_dir, false);
        let Ok(Some(path)) = path else {
            return Err(Status::not_found(absent));
        };
        // One at a time: a file system that hangs must not eat thread after thread.
        let _by_id = self.in_flight.begin(format!("the stats of volume {volume}"))?;
        blocking(move || measure(&path, &absent)).await
    }
}

fn measure(path: &Path, absent: &str) -> Result<NodeGetVolumeStatsResponse, Status> {
    if table(path)?.is_none() {
        return Err(Status::not_found(absent));
    }
    let failed = |e: String| Status::internal(format!("{} cannot be measured: {e}", path.display()));
    let found = std::fs::metadata(path).map_err(|e| failed(e.to_string()))?;
    let usage = if found.file_type().is_block_device() {
        vec![VolumeUsage {
            total: Device::of_node(path).map_err(|e| e.to_string()).and_then(device_bytes).map_err(failed)?,
            unit: Unit::Bytes.into(),
            ..VolumeUsage::default()
        }]
    } else {
        let stat = statvfs(path).map_err(|e| failed(e.to_string()))?;
        let bytes = |blocks: u64| count(blocks.saturating_mul(stat.fragment_size()));
        vec![
            VolumeUsage {
                total: bytes(stat.blocks()),
                available: bytes(stat.blocks_available()),
                used: bytes(stat.blocks().saturating_sub(stat.blocks_free())),
                unit: Unit::Bytes.into(),
            },
            VolumeUsage {
                total: count(stat.files()),
                available: count(stat.files_free()),
                used: count(stat.files().saturating_sub(stat.files_free())),
                unit: Unit::Inodes.into(),
            },
        ]
    };
    Ok(NodeGetVolumeStatsResponse { usage })
}

/// The size of a block device.
pub(super) fn device_bytes(device: Device) -> Result<i64, String> {
    let size = format!("/sys/dev/block/{}:{}/size", device.major, device.minor);
    let text = std::fs::read_to_string(&size).map_err(|e| format!("{size}: {e}"))?;
    let sectors: i64 = text.trim().parse().map_err(|_| format!("{size} holds no number"))?;
    Ok(sectors.saturating_mul(SECTOR_BYTES))
}

fn count(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
