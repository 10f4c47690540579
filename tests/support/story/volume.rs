//! The story's volume: published, staged, mounted and taken away through CSI.

use anyhow::{Result, bail, ensure};
use holdfast_proto::csi as csi_proto;
use holdfast_proto::storage::GetStatusReply;

use super::{PUBLISHED, STAGING, Story};
use crate::csi::{mount_capability, named};

impl Story {
    pub(super) fn attach(&self, node_name: &str) -> Result<()> {
        let volume = self.volume()?;
        let capability = Some(mount_capability("ext4"));
        let request = csi_proto::ControllerPublishVolumeRequest {
            volume_id: volume.id.clone(),
            node_id: node_name.to_owned(),
            volume_capability: capability.clone(),
            volume_context: volume.context.clone(),
            ..Default::default()
        };
        let controller = &self.cluster.controller.csi;
        let reply = controller
            .controller(|mut client| async move { client.controller_publish_volume(request).await });
        let publish_context = named("ControllerPublishVolume", reply)?.publish_context;
        self.report.note(&format!("ControllerPublish to {node_name}"));
        let node = self.cluster.node(node_name);
        let request = csi_proto::NodeStageVolumeRequest {
            volume_id: volume.id.clone(),
            publish_context: publish_context.clone(),
            staging_target_path: STAGING.to_owned(),
            volume_capability: capability.clone(),
            volume_context: volume.context.clone(),
            ..Default::default()
        };
        let reply = node.csi_socket.node(|mut client| async move { client.node_stage_volume(request).await });
        named("NodeStageVolume", reply)?;
        self.report.note(&format!("NodeStage on {node_name} (ext4)"));
        let request = csi_proto::NodePublishVolumeRequest {
            volume_id: volume.id.clone(),
            publish_context,
            staging_target_path: STAGING.to_owned(),
            target_path: PUBLISHED.to_owned(),
            volume_capability: capability,
            volume_context: volume.context.clone(),
            ..Default::default()
        };
        let reply =
            node.csi_socket.node(|mut client| async move { client.node_publish_volume(request).await });
        named("NodePublishVolume", reply)?;
        self.report.note(&format!("NodePublish on {node_name}"));
        Ok(())
    }

    pub(super) fn unpublish(&self, node: &str) -> Result<()> {
        let request = csi_proto::ControllerUnpublishVolumeRequest {
            volume_id: self.volume()?.id.clone(),
            node_id: node.to_owned(),
            ..Default::default()
        };
        let controller = &self.cluster.controller.csi;
        let reply = controller
            .controller(|mut client| async move { client.controller_unpublish_volume(request).await });
        named("ControllerUnpublishVolume", reply).map(drop)
    }

    pub(super) fn refuse_publish_without_unpublish(&self) -> Result<()> {
        let volume = self.volume()?;
        let request = csi_proto::ControllerPublishVolumeRequest {
            volume_id: volume.id.clone(),
            node_id: "node-b".to_owned(),
            volume_capability: Some(mount_capability("ext4")),
            volume_context: volume.context.clone(),
            ..Default::default()
        };
        let controller = &self.cluster.controller.csi;
        let reply = controller
            .controller(|mut client| async move { client.controller_publish_volume(request).await });
        let Err(status) = reply else {
            bail!("ControllerPublish(node-b) succeeded while node-a has the volume")
        };
        ensure!(
            status.code() == tonic::Code::FailedPrecondition && status.message().contains("node-a"),
            "ControllerPublish(node-b) while node-a has the volume: {:?} {}",
            status.code(),
            status.message()
        );
        self.report.note("ControllerPublish(node-b) before it is refused, naming node-a");
        Ok(())
    }

    pub(super) fn status(&self, node: &str) -> Result<holdfast_proto::storage::GetStatusReply> {
        named("GetStatus", self.cluster.node(node).data_socket.volume_status(&self.volume()?.id))
    }

    /// Unmounts the volume on a node and stops its target there.
    pub(super) fn detach(&self, node: &str) -> Result<()> {
        let volume_id = self.volume()?.id.clone();
        let socket = &self.cluster.node(node).csi_socket;
        let request = csi_proto::NodeUnpublishVolumeRequest {
            volume_id: volume_id.clone(),
            target_path: PUBLISHED.to_owned(),
        };
        let reply = socket.node(|mut client| async move { client.node_unpublish_volume(request).await });
        named("NodeUnpublishVolume", reply)?;
        let request =
            csi_proto::NodeUnstageVolumeRequest { volume_id, staging_target_path: STAGING.to_owned() };
        let reply = socket.node(|mut client| async move { client.node_unstage_volume(request).await });
        named("NodeUnstageVolume", reply).map(drop)
    }
}

/// How many replicas a target counts as in sync.
pub(super) fn in_sync(status: &GetStatusReply) -> usize {
    status.replicas.iter().filter(|replica| replica.state == "in_sync").count()
}
