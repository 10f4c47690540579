//! NodePublishVolume and NodeUnpublishVolume: one more place where the staged volume is seen.

use std::io;
use std::path::Path;

use holdfast_proto::csi::volume_capability::access_mode::Mode;
use holdfast_proto::csi::{
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse,
};
use holdfast_storage_core::ids::VolumeId;
use tonic::Status;

use super::mount_table::Device;
use super::stage::{device_number, table, unreadable};
use super::{Inner, blocking, mount_table, mounter, paths, twins};
use crate::volume_request::{check_capability, existing_volume_id, parse_volume_id};

/// Everything that the mounting itself needs.
struct Plan {
    volume: VolumeId,
    source: std::path::PathBuf,
    target: std::path::PathBuf,
    device: Device,
    block: bool,
    read_only: bool,
    /// Refuse a second target.
    alone: bool,
    below: std::path::PathBuf,
}

impl Inner {
    pub(super) async fn publish(
        &self,
        request: NodePublishVolumeRequest,
    ) -> Result<NodePublishVolumeResponse, Status> {
        let capability = request.volume_capability.as_ref();
        let capability =
            capability.ok_or_else(|| Status::invalid_argument("volume_capability is missing"))?;
        let access = check_capability(capability)?;
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("volume_id is missing"));
        }
        if request.target_path.is_empty() {
            return Err(Status::invalid_argument("target_path is missing"));
        }
        if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition(
                "staging_target_path is missing: stage the volume first",
            ));
        }
        let volume = existing_volume_id(&request.volume_id)?;
        let staging =
            paths::resolve("staging_target_path", &request.staging_target_path, &self.kubelet_dir, false)?;
        let target = paths::resolve("target_path", &request.target_path, &self.kubelet_dir, true)?
            .ok_or_else(|| Status::internal("target_path: its parent vanished"))?;
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        let not_staged = || {
            Status::failed_precondition(format!("volume {volume} is not staged on this node; stage it first"))
        };
        let node = self.data.device(volume).await?.ok_or_else(not_staged)?;
        let device = device_number(&node)?;
        let source = if access.block {
            node
        } else {
            let staging = staging.ok_or_else(not_staged)?;
            let mounted = table(&staging)?.ok_or_else(not_staged)?;
            if mounted.device != device {
                return Err(Status::failed_precondition(format!(
                    "volume {volume}: {} is a mount of {}, while the volume is now {}; stage it anew",
                    staging.display(),
                    mounted.source,
                    node.display()
                )));
            }
            staging
        };
        let alone =
            capability.access_mode.as_ref().is_some_and(|mode| mode.mode() == Mode::SingleNodeSingleWriter);
        let plan = Plan {
            volume,
            source,
            target,
            device,
            block: access.block,
            read_only: request.readonly,
            alone,
            below: self.kubelet_dir.clone(),
        };
        blocking(move || plan.carry_out()).await?;
        Ok(NodePublishVolumeResponse {})
    }

    pub(super) async fn unpublish(
        &self,
        request: NodeUnpublishVolumeRequest,
    ) -> Result<NodeUnpublishVolumeResponse, Status> {
        let done = NodeUnpublishVolumeResponse {};
        let id = parse_volume_id(&request.volume_id)?;
        let target = paths::resolve("target_path", &request.target_path, &self.kubelet_dir, false)?;
        let (Some(volume), Some(target)) = (id, target) else {
            return Ok(done);
        };
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        // The target is a file for as long as the volume may have a read-only twin for it: it is made first and removed last.
        let is_block = std::fs::symlink_metadata(&target).is_ok_and(|found| !found.is_dir());
        let device = if is_block { self.device_if_known(volume).await } else { None };
        blocking(move || {
            mounter::unmount_all(&target)?;
            if let Some(device) = device {
                twins::remove(volume, &target, &device)?;
            }
            remove(&target)
        })
        .await?;
        Ok(done)
    }
}

impl Plan {
    fn carry_out(&self) -> Result<(), Status> {
        if self.alone {
            self.refuse_second()?;
        }
        match self.shown_at_target()? {
            Some(true) if !self.read_only => return Err(self.published_already("read-only")),
            // Of a file system this is also what a call left that was killed between its two steps.
            Some(false) if self.read_only && self.block => return Err(self.published_already("for writing")),
            Some(_) => {}
            None => {
                self.make_target()?;
                if self.block && self.read_only {
                    mounter::bind(&twins::ensure(self.volume, &self.target, &self.source)?, &self.target)?;
                } else {
                    mounter::bind(&self.source, &self.target)?;
                }
            }
        }
        // Also after a call that was killed between the two steps. A device is read-only by itself or not at all.
        if self.read_only && !self.block {
            mounter::make_read_only(&self.target)?;
        }
        Ok(())
    }

    fn published_already(&self, how: &str) -> Status {
        Status::already_exists(format!("the volume is published at {} already, {how}", self.target.display()))
    }

    /// Whether the volume is at the target already, and read-only there.
    fn shown_at_target(&self) -> Result<Option<bool>, Status> {
        let Some(mounted) = table(&self.target)? else {
            return Ok(None);
        };
        if self.block {
            let shown = Device::of_node(&self.target).ok();
            if shown == Some(self.device) {
                return Ok(Some(false));
            }
            if twins::is_one(shown, &self.source)? {
                return Ok(Some(true));
            }
        } else if mounted.device == self.device {
            return Ok(Some(mounted.is_read_only()));
        }
        Err(Status::failed_precondition(format!(
            "target_path {} has something else mounted on it: {} ({})",
            self.target.display(),
            mounted.source,
            mounted.fs_type
        )))
    }

    fn make_target(&self) -> Result<(), Status> {
        let made = if self.block {
            std::fs::File::create_new(&self.target).map(drop)
        } else {
            std::fs::create_dir(&self.target)
        };
        match made {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                Err(Status::internal(format!("target_path {} cannot be made: {e}", self.target.display())))
            }
            _ => Ok(()),
        }
    }

    /// SINGLE_NODE_SINGLE_WRITER: one target, not only one node.
    fn refuse_second(&self) -> Result<(), Status> {
        let nodes = if self.block { twins::with_device(&self.source)? } else { Vec::new() };
        let shows_ours = |mount: &mount_table::Mount| {
            if self.block {
                nodes.iter().any(|node| mount.shows_node(node))
            } else {
                mount.device == self.device
            }
        };
        let all = mount_table::read().map_err(|e| unreadable(&e))?;
        let mut others = all.into_iter().filter(|mount| {
            mount.target.starts_with(&self.below)
                && mount.target != self.source
                && mount.target != self.target
        });
        match others.find(shows_ours) {
            None => Ok(()),
            Some(other) => Err(Status::failed_precondition(format!(
                "the volume is published at {} and may have one writer only (SINGLE_NODE_SINGLE_WRITER)",
                other.target.display()
            ))),
        }
    }
}

/// Removes the empty folder or file that publishing made; never anything inside it.
fn remove(target: &Path) -> Result<(), Status> {
    let removed = match std::fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => std::fs::remove_dir(target),
        Ok(_) => std::fs::remove_file(target),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Status::internal(format!("target_path {} cannot be removed: {e}", target.display())))
        }
        _ => Ok(()),
    }
}
