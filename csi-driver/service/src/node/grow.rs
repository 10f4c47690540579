//! NodeExpandVolume, and the growth of a file system to its device's size at every stage: a volume that was made larger
//! while nobody used it, or that begins as a smaller snapshot, is as large as was asked for when a pod sees it.
//!
//! Only a file system that says itself that it is smaller than its device is touched, and only by its own tools.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use holdfast_proto::csi::{NodeExpandVolumeRequest, NodeExpandVolumeResponse};
use tokio::process::Command;
use tonic::Status;

use super::format::quoted;
use super::mount_table::Device;
use super::stage::{device_number, table};
use super::{Inner, blocking, mounter, paths, twins};
use crate::volume_request::{check_capability, existing_volume_id, parse_range};

/// Bytes at the start of a device that hold the sizes of ext4 and xfs.
const SUPERBLOCK_BYTES: usize = 2048;
/// Where ext4's superblock begins.
const EXT4_AT: usize = 1024;
const EXT4_MAGIC: u16 = 0xef53;
const XFS_MAGIC: &[u8; 4] = b"XFSB";

impl Inner {
    pub(super) async fn expand(
        &self,
        request: NodeExpandVolumeRequest,
    ) -> Result<NodeExpandVolumeResponse, Status> {
        if request.volume_path.is_empty() {
            return Err(Status::invalid_argument("volume_path is missing"));
        }
        let volume = existing_volume_id(&request.volume_id)?;
        if let Some(capability) = &request.volume_capability {
            check_capability(capability)?;
        }
        let range = parse_range(request.capacity_range.as_ref())?;
        let absent = || {
            Status::not_found(format!("volume_path: volume {volume} is not at \"{}\"", request.volume_path))
        };
        let path = paths::resolve("volume_path", &request.volume_path, &self.kubelet_dir, false);
        let Ok(Some(path)) = path else { return Err(absent()) };
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        let node = self.data.device(volume).await?.ok_or_else(absent)?;
        let device = device_number(&node)?;
        let at = path.clone();
        let mounted = blocking(move || table(&at)).await?.ok_or_else(absent)?;
        let at = path.clone();
        let is_block =
            blocking(move || Ok(std::fs::metadata(at).is_ok_and(|f| f.file_type().is_block_device())));
        if is_block.await? {
            let at = Device::of_node(&path).ok();
            let node = node.clone();
            let is_shown = blocking(move || {
                twins::follow_size(&node)?;
                Ok(at == Some(device) || twins::is_one(at, &node)?)
            });
            if !is_shown.await? {
                return Err(absent());
            }
        } else {
            if mounted.device != device {
                return Err(absent());
            }
            grow_mounted(&mounted.fs_type, &node, &path).await?;
        }
        let bytes = device_bytes(device)?;
        if bytes < range.required_bytes {
            return Err(Status::out_of_range(format!(
                "capacity_range.required_bytes {} is above the {bytes} bytes that volume {volume} has; expand it at the \
                 controller first",
                range.required_bytes
            )));
        }
        tracing::info!(%volume, bytes, at = %path.display(), "volume expanded on this node");
        Ok(NodeExpandVolumeResponse { capacity_bytes: i64::try_from(bytes).unwrap_or(i64::MAX) })
    }

    /// Makes a staged file system as large as its device. ext4 grows while it is mounted where the kernel lets this process
    /// (CAP_SYS_RESOURCE), else before it is mounted again.
    pub(super) async fn grow_staged(
        &self,
        device: &Path,
        staging: &Path,
        fs_type: &str,
        flags: &[String],
    ) -> Result<(), Status> {
        let Err(online) = grow_mounted(fs_type, device, staging).await else { return Ok(()) };
        if fs_type != "ext4" {
            return Err(online);
        }
        tracing::info!(device = %device.display(), status = %online, "growing it while it is not mounted");
        let at = staging.to_owned();
        blocking(move || mounter::unmount_all(&at)).await?;
        // Only what journal replay and safe repairs mend; anything else is for a person to decide.
        run("e2fsck", &[Path::new("-f"), Path::new("-p"), device], &[0, 1]).await?;
        run("resize2fs", &[device], &[0]).await?;
        let (node, at, fs_type, flags) =
            (device.to_owned(), staging.to_owned(), fs_type.to_owned(), flags.to_vec());
        blocking(move || mounter::mount_device(&node, &at, &fs_type, &flags, false)).await
    }
}

/// Grows a mounted file system that is smaller than its device.
async fn grow_mounted(fs_type: &str, device: &Path, mounted_at: &Path) -> Result<(), Status> {
    let node = device.to_owned();
    let (have, room) = blocking(move || {
        let bytes = device_bytes(device_number(&node)?)?;
        let mut start = [0; SUPERBLOCK_BYTES];
        let read = File::open(&node).and_then(|file| file.read_exact_at(&mut start, 0));
        read.map_err(|e| Status::internal(format!("{} cannot be read: {e}", node.display())))?;
        Ok((fs_bytes(&start), bytes))
    })
    .await?;
    if have.is_none_or(|have| have >= room) {
        return Ok(());
    }
    tracing::info!(device = %device.display(), fs_type, from = have, to = room, "growing the file system");
    match fs_type {
        "ext4" => run("resize2fs", &[device], &[0]).await,
        "xfs" => run("xfs_growfs", &[Path::new("-d"), mounted_at], &[0]).await,
        other => Err(Status::internal(format!("the file system {other} cannot be grown by this driver"))),
    }
}

/// The size that an ext4 or xfs file system says it has, by the start of its device. `None` for anything else.
fn fs_bytes(start: &[u8; SUPERBLOCK_BYTES]) -> Option<u64> {
    let u32_le = |at: usize| Some(u32::from_le_bytes(start.get(at..at + 4)?.try_into().ok()?));
    if start.starts_with(XFS_MAGIC) {
        // sb_blocksize and sb_dblocks, big-endian.
        let block = u32::from_be_bytes(start.get(4..8)?.try_into().ok()?);
        let blocks = u64::from_be_bytes(start.get(8..16)?.try_into().ok()?);
        return blocks.checked_mul(u64::from(block));
    }
    let magic = u16::from_le_bytes(start.get(EXT4_AT + 0x38..EXT4_AT + 0x3a)?.try_into().ok()?);
    if magic != EXT4_MAGIC {
        return None;
    }
    // s_blocks_count_lo, _hi (only with the feature 64bit) and s_log_block_size.
    let is_64bit = u32_le(EXT4_AT + 0x60)? & 0x80 != 0;
    let high = if is_64bit { u32_le(EXT4_AT + 0x150)? } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(u32_le(EXT4_AT + 0x4)?);
    blocks.checked_mul(1024_u64.checked_shl(u32_le(EXT4_AT + 0x18)?)?)
}

/// The kernel's word for the size of a block device.
fn device_bytes(device: Device) -> Result<u64, Status> {
    let bytes = super::stats::device_bytes(device).map_err(Status::internal)?;
    u64::try_from(bytes).map_err(|_| Status::internal("a block device has a negative size"))
}

async fn run(program: &str, arguments: &[&Path], good: &[i32]) -> Result<(), Status> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .output()
        .await
        .map_err(|e| {
            Status::internal(format!("{program} cannot be run: {e}; is it installed on this node?"))
        })?;
    if output.status.code().is_some_and(|code| good.contains(&code)) {
        return Ok(());
    }
    Err(Status::internal(format!(
        "{program} failed ({}): {}; the file system is left as it is",
        output.status,
        quoted(&output.stderr)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_from_superblocks_as_the_tools_write_them() {
        let dir = tempfile::tempdir().unwrap();
        for (program, arguments) in [
            ("mkfs.ext4", vec!["-q", "-F", "-b", "4096"]),
            ("mkfs.ext4", vec!["-q", "-F", "-b", "1024", "-O", "^64bit"]),
            ("mkfs.xfs", vec!["-q"]),
        ] {
            let path = dir.path().join("device");
            let file = File::create(&path).unwrap();
            file.set_len(320 << 20).unwrap();
            let done = std::process::Command::new(program).args(&arguments).arg(&path).status();
            assert!(done.unwrap().success(), "{program}");
            let mut start = [0; SUPERBLOCK_BYTES];
            File::open(&path).unwrap().read_exact_at(&mut start, 0).unwrap();
            assert_eq!(fs_bytes(&start), Some(320 << 20), "{program} {arguments:?}");
            std::fs::remove_file(&path).unwrap();
        }
        assert_eq!(fs_bytes(&[0; SUPERBLOCK_BYTES]), None);
        assert_eq!(fs_bytes(&[0xff; SUPERBLOCK_BYTES]), None);
    }
}
