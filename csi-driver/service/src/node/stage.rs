//! NodeStageVolume and NodeUnstageVolume.

use std::io;
use std::path::Path;

use holdfast_proto::csi::volume_capability::AccessType;
use holdfast_proto::csi::{
    NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse,
};
use holdfast_storage_core::ids::{Attachment, VolumeId};
use tonic::Status;

use super::key::Secrets;
use super::mount_table::{Device, Mount};
use super::{Inner, blocking, mount_table, mounter, paths, twins};
use crate::controller::ATTACHMENT_KEY;
use crate::volume_request::{check_access, check_capability, existing_volume_id, parse_volume_id};

impl Inner {
    pub(super) async fn stage(
        &self,
        mut request: NodeStageVolumeRequest,
    ) -> Result<NodeStageVolumeResponse, Status> {
        let secrets = Secrets::new(std::mem::take(&mut request.secrets));
        let capability = request.volume_capability.as_ref();
        let capability =
            capability.ok_or_else(|| Status::invalid_argument("volume_capability is missing"))?;
        let access = check_capability(capability)?;
        let staging =
            paths::resolve("staging_target_path", &request.staging_target_path, &self.kubelet_dir, true)?
                .ok_or_else(|| Status::internal("staging_target_path: its parent vanished"))?;
        let volume = existing_volume_id(&request.volume_id)?;
        let attachment = parse_attachment(request.publish_context.get(ATTACHMENT_KEY))?;
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        let record = self.read_mine(volume, attachment).await?.record;
        check_access(&record, &access)?;

        let key = self.volume_key(&record, attachment, &secrets).await?;
        let device = self.data.attach(volume, attachment, key.as_ref()).await?;
        let mut flags = match &capability.access_type {
            Some(AccessType::Mount(mount)) => mount.mount_flags.clone(),
            // The device itself is published; there is nothing to mount here.
            Some(AccessType::Block(_)) | None => return Ok(NodeStageVolumeResponse {}),
        };
        let (at, node) = (staging.clone(), device.clone());
        if blocking(move || clear_staging(&at, &node, volume)).await? {
            return Ok(NodeStageVolumeResponse {});
        }
        self.ensure_formatted(volume, attachment, &device).await?;
        let (fs_type, read_only) = (record.params.fs_type, record.read_only);
        // A clone has its source's UUID, and the kernel mounts no two xfs of one UUID unless it is told to.
        if fs_type == "xfs" && record.source.is_some() {
            flags.push("nouuid".to_owned());
        }
        let (at, node) = (staging.clone(), device.clone());
        let (kind, options) = (fs_type.clone(), flags.clone());
        blocking(move || mounter::mount_device(&node, &at, &kind, &options, read_only)).await?;
        if !read_only {
            self.grow_staged(&device, &staging, &fs_type, &flags).await?;
        }
        tracing::info!(%volume, %attachment, device = %device.display(), at = %staging.display(), "volume staged");
        Ok(NodeStageVolumeResponse {})
    }

    pub(super) async fn unstage(
        &self,
        request: NodeUnstageVolumeRequest,
    ) -> Result<NodeUnstageVolumeResponse, Status> {
        let done = NodeUnstageVolumeResponse {};
        let id = parse_volume_id(&request.volume_id)?;
        let staging =
            paths::resolve("staging_target_path", &request.staging_target_path, &self.kubelet_dir, false)?;
        let Some(volume) = id else {
            return Ok(done);
        };
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        if let Some(staging) = staging {
            let below = self.kubelet_dir.clone();
            blocking(move || {
                refuse_if_published(&staging, &below)?;
                mounter::unmount_all(&staging)
            })
            .await?;
        }
        if let Some(device) = self.data.device(volume).await? {
            let below = self.kubelet_dir.clone();
            blocking(move || twins::refuse_if_shown(&device, &below)).await?;
        }
        self.data.detach(volume).await?;
        tracing::info!(%volume, "volume unstaged");
        Ok(done)
    }
}

/// The attachment that ControllerPublish answered; the data process refuses an older one (R1).
pub(super) fn parse_attachment(text: Option<&String>) -> Result<Attachment, Status> {
    let text = text.ok_or_else(|| {
        Status::invalid_argument(format!(
            "publish_context lacks \"{ATTACHMENT_KEY}\": publish the volume first"
        ))
    })?;
    text.parse().map(Attachment).map_err(|_| {
        Status::invalid_argument(format!(
            "publish_context[{ATTACHMENT_KEY}] is \"{text}\", which is no number"
        ))
    })
}

/// Makes the staging folder ready. `true`: the volume is mounted there already.
fn clear_staging(staging: &Path, device: &Path, volume: VolumeId) -> Result<bool, Status> {
    match std::fs::create_dir(staging) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Status::internal(format!("{} cannot be made: {e}", staging.display())));
        }
        _ => {}
    }
    let wanted = Device::of_node(device)
        .map_err(|e| Status::internal(format!("{} is no usable device: {e}", device.display())))?;
    while let Some(mounted) = table(staging)? {
        if mounted.device == wanted {
            return Ok(true);
        }
        if !is_left_over(&mounted, volume) {
            return Err(Status::failed_precondition(format!(
                "staging_target_path {} has something else mounted on it: {} ({})",
                staging.display(),
                mounted.source,
                mounted.fs_type
            )));
        }
        // The data process that served it is gone; nothing can be read or written there any more.
        tracing::warn!(%volume, at = %staging.display(), source = mounted.source, "taking away a dead mount");
        mounter::detach_lazily(staging)?;
    }
    Ok(false)
}

/// Whether a mount is of an earlier device of this volume: a loop device over a file of this volume, or over none.
fn is_left_over(mounted: &Mount, volume: VolumeId) -> bool {
    if !mounted.device.is_loop() {
        return false;
    }
    let id = volume.to_string();
    mounted.device.loop_backing().is_none_or(|file| file.to_string_lossy().contains(&id))
}

/// A volume that pods still use is not taken away under them.
fn refuse_if_published(staging: &Path, below: &Path) -> Result<(), Status> {
    let Some(staged) = table(staging)? else {
        return Ok(());
    };
    let all = mount_table::read().map_err(|e| unreadable(&e))?;
    let mut others = all.into_iter().filter(|mount| mount.device == staged.device && mount.target != staging);
    match others.find(|mount| mount.target.starts_with(below)) {
        None => Ok(()),
        Some(mount) => Err(Status::failed_precondition(format!(
            "the volume staged at {} is still published at {}; unpublish it first",
            staging.display(),
            mount.target.display()
        ))),
    }
}

/// What is mounted at `path`.
pub(super) fn table(path: &Path) -> Result<Option<Mount>, Status> {
    mount_table::find(path).map_err(|e| unreadable(&e))
}

pub(super) fn unreadable(error: &io::Error) -> Status {
    Status::internal(format!("the mount table cannot be read: {error}"))
}

/// A device's node, for callers that only need it to be one.
pub(super) fn device_number(device: &Path) -> Result<Device, Status> {
    Device::of_node(device)
        .map_err(|e| Status::internal(format!("{} is no usable device: {e}", device.display())))
}
