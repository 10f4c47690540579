//! Raw block volumes that are shown read-only: each such target shows a read-only twin of the volume's device, made for it.

use std::path::{Path, PathBuf};

use holdfast_frontend::ReadOnlyTwin;
use holdfast_storage_core::ids::VolumeId;
use tonic::Status;

use super::mount_table::Device;
use super::stage::unreadable;
use super::{Inner, mount_table};

impl Inner {
    /// The volume's device, where it is attached and its data process says so.
    pub(super) async fn device_if_known(&self, volume: VolumeId) -> Option<PathBuf> {
        match self.data.device(volume).await {
            Ok(device) => device,
            Err(status) => {
                // Taking the volume from a pod never waits for it.
                tracing::warn!(
                    %volume, %status, "read-only twins are left to the data process, which clears them when it detaches or starts"
                );
                None
            }
        }
    }
}

/// The twin for `target`, made where there is none; answers its device.
pub(super) fn ensure(volume: VolumeId, target: &Path, device: &Path) -> Result<PathBuf, Status> {
    let twin = ReadOnlyTwin::ensure(&volume.to_string(), target, device);
    twin.map(|twin| twin.path)
        .map_err(|e| Status::internal(format!("{} cannot be shown read-only: {e}", device.display())))
}

/// Clears the twin for `target`. One that somebody still has open goes with its last close.
pub(super) fn remove(volume: VolumeId, target: &Path, device: &Path) -> Result<(), Status> {
    let busy = ReadOnlyTwin::remove(&volume.to_string(), target, device).map_err(|e| {
        Status::internal(format!("the read-only twin of {} cannot be cleared: {e}", device.display()))
    })?;
    if let Some(twin) = busy {
        tracing::warn!(%volume, twin = %twin.path.display(), "still open; it goes with its last close");
    }
    Ok(())
}

/// Whether a device is a read-only twin of `device`.
pub(super) fn is_one(found: Option<Device>, device: &Path) -> Result<bool, Status> {
    let twins = ReadOnlyTwin::all_of(device).map_err(|e| unlisted(device, &e))?;
    Ok(found.is_some() && twins.iter().any(|twin| Device::of_node(&twin.path).ok() == found))
}

/// The device and its twins.
pub(super) fn with_device(device: &Path) -> Result<Vec<PathBuf>, Status> {
    let twins = ReadOnlyTwin::all_of(device).map_err(|e| unlisted(device, &e))?;
    Ok(twins.into_iter().map(|twin| twin.path).chain([device.to_owned()]).collect())
}

/// The twins are as large as the device, whoever told the data process of a growth.
pub(super) fn follow_size(device: &Path) -> Result<(), Status> {
    ReadOnlyTwin::follow_all(device).map_err(|e| {
        Status::internal(format!("the read-only twins of {} do not grow: {e}", device.display()))
    })
}

/// A device that pods still see is not taken away under them.
pub(super) fn refuse_if_shown(device: &Path, below: &Path) -> Result<(), Status> {
    let nodes = with_device(device)?;
    let all = mount_table::read().map_err(|e| unreadable(&e))?;
    let shown = |mount: &mount_table::Mount| {
        mount.target.starts_with(below) && nodes.iter().any(|node| mount.shows_node(node))
    };
    match all.into_iter().find(shown) {
        None => Ok(()),
        Some(mount) => Err(Status::failed_precondition(format!(
            "the volume is still published at {}; unpublish it first",
            mount.target.display()
        ))),
    }
}

fn unlisted(device: &Path, error: &std::io::Error) -> Status {
    Status::internal(format!("the read-only twins of {} cannot be listed: {error}", device.display()))
}
