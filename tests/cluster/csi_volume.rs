//! A volume as Kubernetes would use it: made, staged, snapshotted and deleted through CSI; and what pods would do on it.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use holdfast_proto::csi;
use holdfast_proto::csi::volume_content_source::{SnapshotSource, Type as Source};
use holdfast_tests::Cluster;
use holdfast_tests::cluster::KUBELET_DIR;
use holdfast_tests::csi::{create_request, named};

/// A volume and how it is used.
pub struct Volume {
    pub id: String,
    pub capability: csi::VolumeCapability,
    /// What comes with each stage.
    pub secrets: HashMap<String, String>,
}

impl Volume {
    pub fn create(cluster: &Cluster, request: csi::CreateVolumeRequest) -> Result<Self> {
        let capability = request.volume_capabilities.first().cloned().context("no capability")?;
        let reply = cluster.controller.csi.controller(|mut c| async move { c.create_volume(request).await });
        let id = named("CreateVolume", reply)?.volume.context("no volume")?.volume_id;
        cluster.work().change_state(|state| state.volume_ids.push(id.clone()))?;
        Ok(Self { id, capability, secrets: HashMap::new() })
    }

    pub fn staging(&self) -> String {
        format!("{KUBELET_DIR}/staging/{}", self.id)
    }

    /// Publishes and stages the volume on a node; answers where the harness sees its files.
    pub fn stage(&self, cluster: &Cluster, node: &str) -> Result<PathBuf> {
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: node.to_owned(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        };
        let published = cluster
            .controller
            .csi
            .controller(|mut client| async move { client.controller_publish_volume(request).await });
        let publish_context = named("ControllerPublishVolume", published)?.publish_context;
        let request = csi::NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            publish_context,
            staging_target_path: self.staging(),
            volume_capability: Some(self.capability.clone()),
            secrets: self.secrets.clone(),
            ..Default::default()
        };
        let node = cluster.node(node);
        named(
            "NodeStageVolume",
            node.csi_socket.node(|mut c| async move { c.node_stage_volume(request).await }),
        )?;
        Ok(node.spaces.host_path(self.staging()))
    }

    pub fn unstage(&self, cluster: &Cluster, node: &str) -> Result<()> {
        let request =
            csi::NodeUnstageVolumeRequest { volume_id: self.id.clone(), staging_target_path: self.staging() };
        let unstaged =
            cluster.node(node).csi_socket.node(|mut c| async move { c.node_unstage_volume(request).await });
        named("NodeUnstageVolume", unstaged)?;
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: node.to_owned(),
            ..Default::default()
        };
        let unpublished = cluster
            .controller
            .csi
            .controller(|mut client| async move { client.controller_unpublish_volume(request).await });
        named("ControllerUnpublishVolume", unpublished).map(drop)
    }

    pub fn snapshot(&self, cluster: &Cluster, name: &str) -> Result<String> {
        let request = csi::CreateSnapshotRequest {
            source_volume_id: self.id.clone(),
            name: name.to_owned(),
            ..Default::default()
        };
        let reply =
            cluster.controller.csi.controller(|mut c| async move { c.create_snapshot(request).await });
        Ok(named("CreateSnapshot", reply)?.snapshot.context("no snapshot")?.snapshot_id)
    }

    pub fn expand(&self, cluster: &Cluster, bytes: u64) -> Result<()> {
        let range = csi::CapacityRange { required_bytes: i64::try_from(bytes)?, limit_bytes: 0 };
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: self.id.clone(),
            capacity_range: Some(range),
            ..Default::default()
        };
        let reply = cluster
            .controller
            .csi
            .controller(|mut client| async move { client.controller_expand_volume(request).await });
        named("ControllerExpandVolume", reply).map(drop)
    }

    pub fn expand_on(&self, cluster: &Cluster, node: &str) -> Result<()> {
        let request = csi::NodeExpandVolumeRequest {
            volume_id: self.id.clone(),
            volume_path: self.staging(),
            ..Default::default()
        };
        let reply =
            cluster.node(node).csi_socket.node(|mut c| async move { c.node_expand_volume(request).await });
        named("NodeExpandVolume", reply).map(drop)
    }

    pub fn delete(&self, cluster: &Cluster) -> Result<()> {
        let request = csi::DeleteVolumeRequest { volume_id: self.id.clone(), ..Default::default() };
        let reply = cluster.controller.csi.controller(|mut c| async move { c.delete_volume(request).await });
        named("DeleteVolume", reply).map(drop)
    }
}

pub fn from_snapshot(name: &str, bytes: u64, fs_type: &str, snapshot_id: &str) -> csi::CreateVolumeRequest {
    let source = Source::Snapshot(SnapshotSource { snapshot_id: snapshot_id.to_owned() });
    with_source(create_request(name, bytes as i64, 3, fs_type), source)
}

pub fn with_source(mut request: csi::CreateVolumeRequest, source: Source) -> csi::CreateVolumeRequest {
    request.volume_content_source = Some(csi::VolumeContentSource { r#type: Some(source) });
    request
}

/// Writes a file and makes it safe.
pub fn put(root: &Path, name: &str, content: &[u8]) -> Result<()> {
    let mut file = File::create(root.join(name))?;
    file.write_all(content)?;
    file.sync_all()?;
    Ok(())
}

pub fn get(root: &Path, name: &str) -> Result<Vec<u8>> {
    std::fs::read(root.join(name)).with_context(|| format!("{name} in {}", root.display()))
}

pub fn fs_bytes(root: &Path) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(root)?;
    Ok(stat.blocks() * stat.fragment_size())
}

pub fn delete_snapshot(cluster: &Cluster, snapshot_id: &str) -> Result<()> {
    let request = csi::DeleteSnapshotRequest { snapshot_id: snapshot_id.to_owned(), ..Default::default() };
    let reply = cluster.controller.csi.controller(|mut c| async move { c.delete_snapshot(request).await });
    named("DeleteSnapshot", reply).map(drop)
}
