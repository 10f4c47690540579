//! Calls of the CSI services over their Unix sockets, each timed. One connection per socket, as a sidecar keeps.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use holdfast_proto::csi;
use holdfast_proto::csi::controller_client::ControllerClient;
use holdfast_proto::csi::node_client::NodeClient;
use holdfast_tests::cluster::KUBELET_DIR;
use holdfast_tests::csi::{create_request, mount_capability, named};
use holdfast_tests::{Cluster, Node};
use tonic::transport::Channel;
use tonic::{Response, Status};

/// File system of the volumes that are mounted.
const FS_TYPE: &str = "ext4";

/// A volume that was made.
#[derive(Debug, Clone)]
pub struct Volume {
    pub id: String,
    /// Number of the node that it is attached to when its turn comes.
    pub node: usize,
}

/// A node with its CSI service.
#[derive(Clone)]
struct Member {
    name: String,
    client: NodeClient<Channel>,
}

/// The services, and how long each call took in milliseconds, by its name.
#[derive(Clone)]
pub struct Calls {
    controller: ControllerClient<Channel>,
    nodes: Vec<Member>,
    times: Arc<Mutex<BTreeMap<String, Vec<f64>>>>,
    /// In front of each name.
    prefix: &'static str,
}

impl Calls {
    pub fn new(cluster: &Cluster) -> Result<Self> {
        let member = |node: &Node| -> Result<Member> {
            let channel = named("connect", node.csi_socket.channel())?;
            Ok(Member { name: node.name.clone(), client: NodeClient::new(channel) })
        };
        Ok(Self {
            controller: ControllerClient::new(named("connect", cluster.controller.csi.channel())?),
            nodes: cluster.nodes.iter().map(member).collect::<Result<_>>()?,
            times: Arc::default(),
            prefix: "",
        })
    }

    /// The same services, their times under other names.
    pub fn with_prefix(&self, prefix: &'static str) -> Self {
        Self { prefix, ..self.clone() }
    }

    /// Milliseconds of every call so far, in order.
    pub fn times(&self) -> BTreeMap<String, Vec<f64>> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub async fn create_volume(&self, number: usize, name: &str, bytes: i64) -> Result<Volume> {
        let request = create_request(name, bytes, 3, FS_TYPE);
        let call = self.controller.clone().create_volume(request).await_timed(self, "create_volume").await?;
        let volume = call.volume.context("CreateVolume answered no volume")?;
        Ok(Volume { id: volume.volume_id, node: number % self.nodes.len() })
    }

    pub async fn delete_volume(&self, volume: &Volume) -> Result<()> {
        let request = csi::DeleteVolumeRequest { volume_id: volume.id.clone(), ..Default::default() };
        self.controller.clone().delete_volume(request).await_timed(self, "delete_volume").await.map(drop)
    }

    /// Gives the publish context.
    pub async fn publish(&self, volume: &Volume) -> Result<HashMap<String, String>> {
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: volume.id.clone(),
            node_id: self.nodes[volume.node].name.clone(),
            volume_capability: Some(mount_capability(FS_TYPE)),
            ..Default::default()
        };
        let mut client = self.controller.clone();
        let call = client.controller_publish_volume(request);
        Ok(call.await_timed(self, "controller_publish").await?.publish_context)
    }

    pub async fn unpublish(&self, volume: &Volume) -> Result<()> {
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: volume.id.clone(),
            node_id: self.nodes[volume.node].name.clone(),
            ..Default::default()
        };
        let mut client = self.controller.clone();
        let call = client.controller_unpublish_volume(request);
        call.await_timed(self, "controller_unpublish").await.map(drop)
    }

    /// Mounts a volume for a pod, with everything that belongs to it on the node, and takes it away again.
    pub async fn mount_and_unmount(&self, volume: &Volume, context: HashMap<String, String>) -> Result<()> {
        let mut node = self.nodes[volume.node].client.clone();
        let (volume_id, capability) = (volume.id.clone(), Some(mount_capability(FS_TYPE)));
        let staging_target_path = format!("{KUBELET_DIR}/staging/{volume_id}");
        let target_path = format!("{KUBELET_DIR}/pods/{volume_id}/volume");
        let stage = csi::NodeStageVolumeRequest {
            volume_id: volume_id.clone(),
            publish_context: context.clone(),
            staging_target_path: staging_target_path.clone(),
            volume_capability: capability.clone(),
            ..Default::default()
        };
        node.node_stage_volume(stage).await_timed(self, "node_stage").await?;
        let publish = csi::NodePublishVolumeRequest {
            volume_id: volume_id.clone(),
            publish_context: context,
            staging_target_path: staging_target_path.clone(),
            target_path: target_path.clone(),
            volume_capability: capability,
            ..Default::default()
        };
        node.node_publish_volume(publish).await_timed(self, "node_publish").await?;
        let unpublish = csi::NodeUnpublishVolumeRequest { volume_id: volume_id.clone(), target_path };
        node.node_unpublish_volume(unpublish).await_timed(self, "node_unpublish").await?;
        let unstage = csi::NodeUnstageVolumeRequest { volume_id, staging_target_path };
        node.node_unstage_volume(unstage).await_timed(self, "node_unstage").await.map(drop)
    }

    /// Gives the snapshot's id.
    pub async fn create_snapshot(&self, volume: &Volume, name: &str) -> Result<String> {
        let request = csi::CreateSnapshotRequest {
            source_volume_id: volume.id.clone(),
            name: name.to_owned(),
            ..Default::default()
        };
        let mut client = self.controller.clone();
        let call = client.create_snapshot(request);
        let answer = call.await_timed(self, "create_snapshot").await?;
        Ok(answer.snapshot.context("CreateSnapshot answered no snapshot")?.snapshot_id)
    }

    pub async fn delete_snapshot(&self, snapshot_id: &str) -> Result<()> {
        let request =
            csi::DeleteSnapshotRequest { snapshot_id: snapshot_id.to_owned(), ..Default::default() };
        self.controller.clone().delete_snapshot(request).await_timed(self, "delete_snapshot").await.map(drop)
    }

    /// Lists all volumes, in pages of at most so many (0: as the plugin likes); gives their number.
    pub async fn list_volumes(&self, max_entries: i32) -> Result<usize> {
        let name = if max_entries == 0 { "list_volumes_all" } else { "list_volumes_page" };
        let (mut count, mut starting_token) = (0, String::new());
        loop {
            let request =
                csi::ListVolumesRequest { max_entries, starting_token: std::mem::take(&mut starting_token) };
            let page = self.controller.clone().list_volumes(request).await_timed(self, name).await?;
            count += page.entries.len();
            starting_token = page.next_token;
            if starting_token.is_empty() {
                return Ok(count);
            }
        }
    }

    pub async fn get_volume(&self, volume: &Volume) -> Result<()> {
        let request = csi::ControllerGetVolumeRequest { volume_id: volume.id.clone() };
        let mut client = self.controller.clone();
        let call = client.controller_get_volume(request);
        call.await_timed(self, "controller_get_volume").await.map(drop)
    }

    fn note(&self, name: &str, start: Instant) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = start.elapsed().as_secs_f64() * 1000.0;
        times.entry(format!("{}{name}", self.prefix)).or_default().push(ms);
    }
}

/// Waits for a call and notes how long it took; one that fails ends the bench.
trait Timed<T> {
    async fn await_timed(self, calls: &Calls, name: &str) -> Result<T>;
}

impl<T, F: Future<Output = Result<Response<T>, Status>>> Timed<T> for F {
    async fn await_timed(self, calls: &Calls, name: &str) -> Result<T> {
        let start = Instant::now();
        let answer = self.await;
        calls.note(name, start);
        named(name, answer.map(Response::into_inner))
    }
}
