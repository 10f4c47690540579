//! CSI and storage control calls over the Unix sockets of a cluster, for callers without async.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_proto::csi;
use holdfast_proto::csi::controller_client::ControllerClient;
use holdfast_proto::csi::group_controller_client::GroupControllerClient;
use holdfast_proto::csi::identity_client::IdentityClient;
use holdfast_proto::csi::node_client::NodeClient;
use holdfast_proto::csi::snapshot_metadata_client::SnapshotMetadataClient;
use holdfast_proto::storage::data_client::DataClient;
use holdfast_proto::storage::{GetStatusReply, GetStatusRequest};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status, Streaming};

/// Longest call: a stage may wait for leases and format a volume.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A gRPC server on a Unix socket.
#[derive(Clone)]
pub struct Socket {
    runtime: Handle,
    path: PathBuf,
}

impl Socket {
    /// The server listening at `path` (as the host sees it); nothing is connected yet.
    #[must_use]
    pub fn new(runtime: Handle, path: PathBuf) -> Self {
        Self { runtime, path }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Calls the Identity service.
    ///
    /// # Errors
    /// The server's status, or `UNAVAILABLE`.
    pub fn identity<T, F>(&self, call: impl FnOnce(IdentityClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call(|channel| call(IdentityClient::new(channel)))
    }

    /// Calls the Controller service.
    ///
    /// # Errors
    /// The server's status, or `UNAVAILABLE`.
    pub fn controller<T, F>(&self, call: impl FnOnce(ControllerClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call(|channel| call(ControllerClient::new(channel)))
    }

    /// Calls the GroupController service.
    ///
    /// # Errors
    /// The server's status, or `UNAVAILABLE`.
    pub fn groups<T, F>(&self, call: impl FnOnce(GroupControllerClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call(|channel| call(GroupControllerClient::new(channel)))
    }

    /// Reads a stream of the SnapshotMetadata service to its end.
    ///
    /// # Errors
    /// The server's status, or `UNAVAILABLE`.
    pub fn metadata<T, F>(
        &self,
        call: impl FnOnce(SnapshotMetadataClient<Channel>) -> F,
    ) -> Result<Vec<T>, Status>
    where
        F: Future<Output = Result<Response<Streaming<T>>, Status>>,
    {
        self.runtime.block_on(async {
            let client = SnapshotMetadataClient::new(connect(self.path.clone())?);
            let mut stream = call(client).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = stream.message().await? {
                all.push(message);
            }
            Ok(all)
        })
    }

    /// Calls the Node service.
    ///
    /// # Errors
    /// The server's status, or `UNAVAILABLE`.
    pub fn node<T, F>(&self, call: impl FnOnce(NodeClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call(|channel| call(NodeClient::new(channel)))
    }

    /// Calls the data process's own service.
    ///
    /// # Errors
    /// The server's status, or `UNAVAILABLE`.
    pub fn data<T, F>(&self, call: impl FnOnce(DataClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call(|channel| call(DataClient::new(channel)))
    }

    /// What the data process knows of a volume that is attached there.
    ///
    /// # Errors
    /// The server's status, or `UNAVAILABLE`.
    pub fn volume_status(&self, volume_id: &str) -> Result<GetStatusReply, Status> {
        let request = GetStatusRequest { volume_id: volume_id.to_owned() };
        self.call(|channel| async move { DataClient::new(channel).get_status(request).await })
    }

    /// A connection that is kept, for callers with a runtime; made at its first call.
    ///
    /// # Errors
    /// None that depends on the server.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn channel(&self) -> Result<Channel, Status> {
        connect(self.path.clone())
    }

    fn call<T, F>(&self, call: impl FnOnce(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        // Connecting needs the runtime's context already when the channel is made.
        self.runtime.block_on(async { call(connect(self.path.clone())?).await.map(Response::into_inner) })
    }
}

fn connect(path: PathBuf) -> Result<Channel, Status> {
    // The address is unused: the connector knows the path.
    let endpoint = Endpoint::try_from("http://unix.invalid")
        .map_err(|error| Status::internal(error.to_string()))?
        .timeout(CALL_TIMEOUT);
    Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    })))
}

/// A volume with a file system, for one node at a time.
#[must_use]
pub fn mount_capability(fs_type: &str) -> csi::VolumeCapability {
    capability(csi::volume_capability::AccessType::Mount(csi::volume_capability::MountVolume {
        fs_type: fs_type.to_owned(),
        ..Default::default()
    }))
}

/// A raw block volume, for one node at a time.
#[must_use]
pub fn block_capability() -> csi::VolumeCapability {
    capability(csi::volume_capability::AccessType::Block(csi::volume_capability::BlockVolume {}))
}

/// A CreateVolume request.
#[must_use]
pub fn create_request(name: &str, bytes: i64, replicas: u32, fs_type: &str) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
        volume_capabilities: vec![mount_capability(fs_type)],
        parameters: HashMap::from([("replicas".to_owned(), replicas.to_string())]),
        ..Default::default()
    }
}

/// Turns a status into an error that names the call.
///
/// # Errors
/// The status, if it is none of success.
pub fn named<T>(name: &str, outcome: Result<T, Status>) -> Result<T> {
    outcome
        .map_err(|status| anyhow::anyhow!("{:?}: {}", status.code(), status.message()))
        .context(name.to_owned())
}

fn capability(access_type: csi::volume_capability::AccessType) -> csi::VolumeCapability {
    let mode = csi::volume_capability::access_mode::Mode::SingleNodeWriter.into();
    csi::VolumeCapability {
        access_type: Some(access_type),
        access_mode: Some(csi::volume_capability::AccessMode { mode }),
    }
}
