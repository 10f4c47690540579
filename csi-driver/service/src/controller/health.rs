//! ControllerGetVolume and the health of volumes, as far as the records and the list of nodes tell it.
//!
//! What only the volume's own target knows (blocks that no replica has) is told by the node that it runs on.

use std::collections::BTreeSet;

use holdfast_proto::csi::controller_get_volume_response::VolumeStatus;
use holdfast_proto::csi::volume_health::VolumeHealthEntry;
use holdfast_proto::csi::{
    ControllerGetVolumeHealthRequest, ControllerGetVolumeHealthResponse, ControllerGetVolumeRequest,
    ControllerGetVolumeResponse, ControllerListVolumeHealthRequest, ControllerListVolumeHealthResponse,
    VolumeHealth, VolumeHealthErrorType,
};
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::record::VolumeRecord;
use tonic::Status;

use super::Inner;
use super::create::to_csi;
use super::list::{page_of, page_size};
use crate::status::from_store;
use crate::volume_request::existing_volume_id;

impl Inner {
    pub(super) async fn get_volume(
        &self,
        request: ControllerGetVolumeRequest,
    ) -> Result<ControllerGetVolumeResponse, Status> {
        let record = self.live(existing_volume_id(&request.volume_id)?).await?;
        let published_node_ids = record.attached_to.iter().map(|node| node.0.clone()).collect();
        Ok(ControllerGetVolumeResponse {
            volume: Some(to_csi(&record)),
            status: Some(VolumeStatus { published_node_ids }),
        })
    }

    pub(super) async fn volume_health(
        &self,
        request: ControllerGetVolumeHealthRequest,
    ) -> Result<ControllerGetVolumeHealthResponse, Status> {
        let record = self.live(existing_volume_id(&request.volume_id)?).await?;
        let health_statuses = judge(&record, self.alive_nodes().as_ref());
        let volume_health = Some(VolumeHealth { volume_id: record.volume_id.to_string(), health_statuses });
        Ok(ControllerGetVolumeHealthResponse { volume_health })
    }

    /// Only volumes with which something is wrong.
    pub(super) async fn list_volume_health(
        &self,
        request: ControllerListVolumeHealthRequest,
    ) -> Result<ControllerListVolumeHealthResponse, Status> {
        let size = page_size(request.max_entries)?;
        let alive = self.alive_nodes();
        let all = self.store.list().await.map_err(from_store)?;
        let mut ill = Vec::new();
        for record in all.iter().map(|found| &found.record).filter(|record| !record.is_gone()) {
            let health_statuses = judge(record, alive.as_ref());
            if !health_statuses.is_empty() {
                let volume_id = record.volume_id.to_string();
                ill.push((record.volume_id, VolumeHealth { volume_id, health_statuses }));
            }
        }
        let (page, next_token) = page_of(ill, &request.starting_token, size)?;
        Ok(ControllerListVolumeHealthResponse {
            entries: page.into_iter().map(|(_, health)| health).collect(),
            next_token,
        })
    }

    /// The nodes that announced themselves lately; `None` right after the start, when silence says nothing yet.
    fn alive_nodes(&self) -> Option<BTreeSet<NodeName>> {
        if self.book.is_filling() {
            return None;
        }
        Some(self.book.alive().into_iter().map(|info| info.name).collect())
    }
}

/// What is wrong with a volume; each (status, reason) at most once.
fn judge(record: &VolumeRecord, alive: Option<&BTreeSet<NodeName>>) -> Vec<VolumeHealthEntry> {
    let mut found = Vec::new();
    let mut say = |status: VolumeHealthErrorType, reason: &str, message: String| {
        found.push(VolumeHealthEntry { status: status.into(), reason: reason.to_owned(), message });
    };
    let (members, wanted) = (record.in_sync.len(), record.params.replicas as usize);
    if members < wanted {
        let message = format!("{members} of {wanted} replicas are in sync");
        say(VolumeHealthErrorType::Degraded, "ReplicasOutOfSync", message);
    }
    if members < record.params.min_in_sync as usize {
        let message = format!(
            "{members} replicas are in sync, the volume was made to need {}: its I/O waits",
            record.params.min_in_sync
        );
        say(VolumeHealthErrorType::Inaccessible, "BelowMinInSync", message);
    }
    if record.restored {
        let message =
            "its replicas know another history than its record: the record store was restored, and a \
                       replica must agree or be promoted"
                .to_owned();
        say(VolumeHealthErrorType::Inaccessible, "RecordRestored", message);
    }
    let Some(alive) = alive else { return found };
    let silent: Vec<&str> = record
        .replicas
        .iter()
        .filter(|(id, replica)| record.in_sync.contains(id) && !alive.contains(&replica.node))
        .map(|(_, replica)| replica.node.0.as_str())
        .collect();
    if silent.len() == members {
        let message = format!("no node that holds a replica in sync answers: {}", silent.join(", "));
        say(VolumeHealthErrorType::Inaccessible, "NodesSilent", message);
    } else if !silent.is_empty() {
        let message = format!("nodes that hold a replica in sync do not answer: {}", silent.join(", "));
        say(VolumeHealthErrorType::Degraded, "NodesSilent", message);
    }
    found
}
