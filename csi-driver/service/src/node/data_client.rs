//! This node's data process, over its Unix socket.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_proto::storage::data_client::DataClient as Client;
use holdfast_proto::storage::{
    AttachRequest, CountAllocatedRequest, DetachRequest, GetStatusReply, GetStatusRequest,
};
use holdfast_storage_core::encryption::VolumeKey;
use holdfast_storage_core::ids::{Attachment, VolumeId};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// How long a target may take to serve: lease terms and cache grace of the replication protocol pass within it.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(120);
/// How long stopping a target may take: it flushes first.
const DETACH_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a question may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(15);

/// The client. It connects at each first call after a loss.
pub(super) struct DataClient {
    socket: PathBuf,
    client: Client<Channel>,
}

impl DataClient {
    pub(super) fn new(socket: &Path) -> io::Result<Self> {
        let unusable = |reason: String| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("data socket {}: {reason}", socket.display()))
        };
        let text = socket.to_str().ok_or_else(|| unusable("its path is not UTF-8".to_owned()))?;
        let endpoint =
            Endpoint::from_shared(format!("unix://{text}")).map_err(|e| unusable(e.to_string()))?;
        Ok(Self { socket: socket.to_owned(), client: Client::new(endpoint.connect_lazy()) })
    }

    /// Attaches the volume, an encrypted one with its key, and answers its block device.
    pub(super) async fn attach(
        &self,
        volume: VolumeId,
        attachment: Attachment,
        key: Option<&VolumeKey>,
    ) -> Result<PathBuf, Status> {
        let mut client = self.client.clone();
        let key = key.map(|key| key.as_bytes().to_vec()).unwrap_or_default();
        let request = AttachRequest { volume_id: volume.to_string(), attachment: attachment.0, key };
        let reply = self.within(ATTACH_TIMEOUT, "attach", volume, client.attach(request)).await?;
        if reply.device.is_empty() {
            return Err(Status::internal(format!(
                "the data process attached volume {volume} but named no device"
            )));
        }
        Ok(PathBuf::from(reply.device))
    }

    pub(super) async fn detach(&self, volume: VolumeId) -> Result<(), Status> {
        let mut client = self.client.clone();
        let request = DetachRequest { volume_id: volume.to_string() };
        match self.within(DETACH_TIMEOUT, "detach", volume, client.detach(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// The block device of an attached volume; `None` where it is not attached.
    pub(super) async fn device(&self, volume: VolumeId) -> Result<Option<PathBuf>, Status> {
        let status = self.status(volume).await?;
        Ok(status.filter(|reply| !reply.device.is_empty()).map(|reply| PathBuf::from(reply.device)))
    }

    /// What is known of an attached volume; `None` where it is not attached.
    pub(super) async fn status(&self, volume: VolumeId) -> Result<Option<GetStatusReply>, Status> {
        let mut client = self.client.clone();
        let request = GetStatusRequest { volume_id: volume.to_string() };
        match self.within(ASK_TIMEOUT, "be asked about", volume, client.get_status(request)).await {
            Ok(reply) => Ok(Some(reply)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        }
    }

    /// Blocks that any member has allocated (R36).
    pub(super) async fn count_allocated(&self, volume: VolumeId) -> Result<u64, Status> {
        let mut client = self.client.clone();
        let request = CountAllocatedRequest { volume_id: volume.to_string() };
        let reply =
            self.within(ASK_TIMEOUT, "count the blocks of", volume, client.count_allocated(request)).await?;
        Ok(reply.blocks)
    }

    async fn within<T>(
        &self,
        limit: Duration,
        verb: &str,
        volume: VolumeId,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let prefix = format!("the data process ({}) cannot {verb} volume {volume}", self.socket.display());
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(Status::new(status.code(), format!("{prefix}: {}", status.message()))),
            Err(_) => Err(Status::deadline_exceeded(format!("{prefix}: no answer within {limit:?}"))),
        }
    }
}
