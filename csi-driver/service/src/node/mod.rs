//! CSI Node: device, file system and mounts on this machine.
//!
//! It keeps no state of its own: the record says whether a file system was made, the mount table says what is
//! mounted, the data process says what is attached. Every call is safe to repeat after a kill at any point.

mod data_client;
mod format;
mod grow;
mod health;
mod key;
mod mount_table;
mod mounter;
mod paths;
mod publish;
mod stage;
mod stats;
mod twins;

use std::path::PathBuf;
use std::sync::Arc;

use holdfast_proto::csi::node_server::Node;
use holdfast_proto::csi::node_service_capability::{Rpc, Type, rpc};
use holdfast_proto::csi::*;
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::record_store::RecordStore;
use tonic::{Request, Response, Status};

use crate::in_flight::{InFlight, detached};
use crate::topology;
use data_client::DataClient;

/// Where a block device is mounted in this process's mount namespace, for a person to look at.
///
/// # Errors
/// It is no device, or the mount table cannot be read.
pub fn mounted_at(device: &std::path::Path) -> std::io::Result<Vec<PathBuf>> {
    mount_table::places_of(device)
}

/// Settings of the node service.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// This node's name, as records spell it.
    pub node: NodeName,
    /// The zone that it stands in.
    pub zone: Option<String>,
    /// Most volumes that may be attached to it.
    pub volumes_max: Option<u32>,
    /// Unix socket of this node's data process.
    pub data_socket: PathBuf,
    /// Staging and target paths must lie below it.
    pub kubelet_dir: PathBuf,
}

/// The service.
#[derive(Clone)]
pub struct NodeService {
    inner: Arc<Inner>,
}

struct Inner {
    node: NodeName,
    zone: Option<String>,
    volumes_max: Option<u32>,
    store: Arc<dyn RecordStore>,
    data: DataClient,
    kubelet_dir: PathBuf,
    in_flight: InFlight,
    /// Held while a key is derived.
    deriving: tokio::sync::Mutex<()>,
}

impl NodeService {
    /// A node service over `store`; the data process need not run yet.
    ///
    /// # Errors
    /// The data socket's path cannot be used, or the kubelet folder does not exist.
    pub fn new(config: NodeConfig, store: Arc<dyn RecordStore>) -> Result<Self, std::io::Error> {
        let kubelet_dir = config.kubelet_dir.canonicalize().map_err(|e| {
            std::io::Error::new(e.kind(), format!("kubelet folder {}: {e}", config.kubelet_dir.display()))
        })?;
        let data = DataClient::new(&config.data_socket)?;
        let NodeConfig { node, zone, volumes_max, .. } = config;
        let (in_flight, deriving) = (InFlight::default(), tokio::sync::Mutex::default());
        let inner = Inner { node, zone, volumes_max, store, data, kubelet_dir, in_flight, deriving };
        Ok(Self { inner: Arc::new(inner) })
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.stage(request.into_inner()).await }).await.map(Response::new)
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.unstage(request.into_inner()).await }).await.map(Response::new)
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.publish(request.into_inner()).await }).await.map(Response::new)
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.unpublish(request.into_inner()).await }).await.map(Response::new)
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.stats(request.into_inner()).await }).await.map(Response::new)
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let types = [
            rpc::Type::StageUnstageVolume,
            rpc::Type::GetVolumeStats,
            rpc::Type::ExpandVolume,
            rpc::Type::GetVolumeHealth,
            rpc::Type::GetStorageHealth,
            rpc::Type::SingleNodeMultiWriter,
        ];
        let one =
            |kind: rpc::Type| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })) };
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: types.map(one).to_vec() }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let Inner { node, zone, volumes_max, .. } = self.inner.as_ref();
        Ok(Response::new(NodeGetInfoResponse {
            node_id: node.0.clone(),
            // 0: the caller decides.
            max_volumes_per_node: volumes_max.map_or(0, i64::from),
            // Every node reaches every volume; this only says where the first pod of one is going to run.
            accessible_topology: Some(topology::of_node(node, zone.as_deref())),
        }))
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        self.inner.volume_health(request.into_inner()).await.map(Response::new)
    }

    async fn node_get_storage_health(
        &self,
        _: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        Ok(Response::new(self.inner.storage_health().await))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.expand(request.into_inner()).await }).await.map(Response::new)
    }
}

/// Runs a call that may wait for a disk away from the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(answer) => answer,
        Err(failure) => Err(Status::internal(format!("the call failed inside this process: {failure}"))),
    }
}
