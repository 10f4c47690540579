//! A volume as a raw block device of a node, attached through the data process and its real front end.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_proto::csi as csi_proto;
use holdfast_proto::storage::{AttachRequest, DetachRequest, GetStatusReply};
use tonic::Code;

use crate::cluster::Cluster;
use crate::csi::{block_capability, create_request, named};
use crate::process::wait_until;

/// An attachment that is refused for the moment is asked for again as long as this.
const RETRY_TIMEOUT: Duration = Duration::from_secs(20);
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// A volume and the node that it is published to.
pub struct RawVolume {
    /// Its id.
    pub id: String,
    /// The node that it is published to.
    pub home: Option<String>,
}

impl RawVolume {
    /// Creates a volume with one replica on each of three nodes.
    ///
    /// # Errors
    /// The controller's status.
    pub fn create(cluster: &Cluster, name: &str, bytes: u64) -> Result<Self> {
        let mut request = create_request(name, i64::try_from(bytes)?, 3, "ext4");
        request.volume_capabilities = vec![block_capability()];
        let created = cluster
            .controller
            .csi
            .controller(|mut client| async move { client.create_volume(request).await });
        let id = named("CreateVolume", created)?.volume.context("CreateVolume answered no volume")?.volume_id;
        cluster.work().change_state(|state| state.volume_ids.push(id.clone()))?;
        Ok(Self { id, home: None })
    }

    /// Publishes the volume to a node and attaches it there; answers the block device. Where the volume was before, nobody
    /// is asked: that node may be dead.
    ///
    /// # Errors
    /// The status of a call.
    pub fn attach(&mut self, cluster: &Cluster, node: &str) -> Result<PathBuf> {
        if let Some(home) = self.home.take() {
            self.unpublish(cluster, &home)?;
        }
        let attachment = self.publish(cluster, node)?;
        self.home = Some(node.to_owned());
        let request = AttachRequest { volume_id: self.id.clone(), attachment, key: Vec::new() };
        let socket = &cluster.node(node).data_socket;
        let until = Instant::now() + RETRY_TIMEOUT;
        loop {
            let request = request.clone();
            let attached = socket.data(|mut client| async move { client.attach(request).await });
            // As a kubelet would: right after a partition the node's connection to the record store may be a dead one.
            if attached.as_ref().is_err_and(|status| status.code() == Code::Unavailable)
                && Instant::now() < until
            {
                std::thread::sleep(RETRY_PAUSE);
                continue;
            }
            return Ok(PathBuf::from(named(&format!("Attach on {node}"), attached)?.device));
        }
    }

    /// Detaches the volume in order: flushed, its device gone, published nowhere.
    ///
    /// # Errors
    /// The status of a call.
    pub fn detach(&mut self, cluster: &Cluster) -> Result<()> {
        let Some(home) = self.home.take() else { return Ok(()) };
        let request = DetachRequest { volume_id: self.id.clone() };
        let detached =
            cluster.node(&home).data_socket.data(|mut client| async move { client.detach(request).await });
        named(&format!("Detach on {home}"), detached)?;
        self.unpublish(cluster, &home)
    }

    /// What its target says.
    ///
    /// # Errors
    /// It is attached nowhere, or the data process does not answer.
    pub fn status(&self, cluster: &Cluster) -> Result<GetStatusReply> {
        let home = self.home.as_deref().context("the volume is attached nowhere")?;
        named("GetStatus", cluster.node(home).data_socket.volume_status(&self.id))
    }

    /// How many replicas its target counts as in sync.
    ///
    /// # Errors
    /// As for [`RawVolume::status`].
    pub fn in_sync(&self, cluster: &Cluster) -> Result<usize> {
        Ok(self.status(cluster)?.replicas.iter().filter(|replica| replica.state == "in_sync").count())
    }

    /// Waits until so many replicas are in sync.
    ///
    /// # Errors
    /// They are not, in time.
    pub fn wait_in_sync(&self, cluster: &Cluster, count: usize, timeout: Duration) -> Result<()> {
        wait_until(timeout, || Ok(self.in_sync(cluster)? == count)).with_context(|| {
            format!(
                "not {count} replicas are in sync: {:?}",
                self.status(cluster).map(|status| status.replicas)
            )
        })
    }

    /// Changes parameters of the volume.
    ///
    /// # Errors
    /// The status of the call.
    pub fn modify(&self, cluster: &Cluster, parameters: &[(&str, &str)]) -> Result<()> {
        let pairs = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let request = csi_proto::ControllerModifyVolumeRequest {
            volume_id: self.id.clone(),
            mutable_parameters: pairs.collect(),
            ..Default::default()
        };
        let modified = cluster
            .controller
            .csi
            .controller(|mut client| async move { client.controller_modify_volume(request).await });
        named("ControllerModifyVolume", modified).map(drop)
    }

    /// Detaches and deletes the volume.
    ///
    /// # Errors
    /// The status of a call.
    pub fn delete(mut self, cluster: &Cluster) -> Result<()> {
        self.detach(cluster)?;
        let request = csi_proto::DeleteVolumeRequest { volume_id: self.id, ..Default::default() };
        let deleted = cluster
            .controller
            .csi
            .controller(|mut client| async move { client.delete_volume(request).await });
        named("DeleteVolume", deleted).map(drop)
    }

    fn publish(&self, cluster: &Cluster, node: &str) -> Result<u64> {
        let request = csi_proto::ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: node.to_owned(),
            volume_capability: Some(block_capability()),
            ..Default::default()
        };
        let published = cluster
            .controller
            .csi
            .controller(|mut client| async move { client.controller_publish_volume(request).await });
        let context = named("ControllerPublishVolume", published)?.publish_context;
        let attachment = context.get("attachment").context("the publish context names no attachment")?;
        attachment.parse().context("the attachment is no number")
    }

    fn unpublish(&self, cluster: &Cluster, node: &str) -> Result<()> {
        let request = csi_proto::ControllerUnpublishVolumeRequest {
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
}
