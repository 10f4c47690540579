//! NodeGetVolumeHealth and NodeGetStorageHealth: what only this node's data process knows.

use holdfast_proto::csi::node_get_storage_health_response::StorageBackendHealth;
use holdfast_proto::csi::volume_health::VolumeHealthEntry;
use holdfast_proto::csi::{
    NodeGetStorageHealthResponse, NodeGetVolumeHealthRequest, NodeGetVolumeHealthResponse,
    StorageHealthErrorType, VolumeHealth, VolumeHealthErrorType,
};
use holdfast_proto::storage::GetStatusReply;
use holdfast_storage_core::ids::VolumeId;
use tonic::Status;

use super::Inner;
use crate::volume_request::existing_volume_id;

impl Inner {
    pub(super) async fn volume_health(
        &self,
        request: NodeGetVolumeHealthRequest,
    ) -> Result<NodeGetVolumeHealthResponse, Status> {
        let volume = existing_volume_id(&request.volume_id)?;
        let status = self.data.status(volume).await?;
        let status = status.ok_or_else(|| {
            Status::not_found(format!("volume_id: volume {volume} is not attached to this node"))
        })?;
        let volume_health = VolumeHealth { volume_id: volume.to_string(), health_statuses: judge(&status) };
        Ok(NodeGetVolumeHealthResponse { volume_health: Some(volume_health) })
    }

    pub(super) async fn storage_health(&self) -> NodeGetStorageHealthResponse {
        // No volume has this id: any answer says that the data process is there.
        let backend_health = match self.data.status(VolumeId(0)).await {
            Ok(_) => Vec::new(),
            Err(status) => vec![StorageBackendHealth {
                status: StorageHealthErrorType::StorageUnreachable.into(),
                reason: "DataProcessSilent".to_owned(),
                message: format!("no volume can be attached here: {}", status.message()),
                volume_capability: None,
            }],
        };
        NodeGetStorageHealthResponse { backend_health }
    }
}

/// What is wrong with an attached volume; each (status, reason) at most once.
fn judge(status: &GetStatusReply) -> Vec<VolumeHealthEntry> {
    let mut found = Vec::new();
    let mut say = |status: VolumeHealthErrorType, reason: &str, message: String| {
        found.push(VolumeHealthEntry { status: status.into(), reason: reason.to_owned(), message });
    };
    if status.corrupt_blocks_unrepairable > 0 {
        let message = format!("{} blocks are good on no replica", status.corrupt_blocks_unrepairable);
        say(VolumeHealthErrorType::DataLoss, "BlocksUnreadable", message);
    }
    if matches!(status.state.as_str(), "fenced" | "failed" | "stopped") {
        let message = format!("its target is {}: {}", status.state, status.reason);
        say(VolumeHealthErrorType::Inaccessible, "TargetNotServing", message);
    }
    if status.differing_blocks > 0 {
        let message = format!("{} blocks verify on several replicas and differ", status.differing_blocks);
        say(VolumeHealthErrorType::Degraded, "ReplicasDiffer", message);
    }
    let away: Vec<String> = status
        .replicas
        .iter()
        .filter(|replica| replica.state != "in_sync")
        .map(|replica| format!("{} is {}", replica.node, replica.state))
        .collect();
    if !away.is_empty() {
        let message = format!("replicas are out of sync: {}", away.join(", "));
        say(VolumeHealthErrorType::Degraded, "ReplicasOutOfSync", message);
    }
    found
}

#[cfg(test)]
mod tests {
    use holdfast_proto::storage::ReplicaStatus;

    use super::*;

    #[test]
    fn each_trouble_has_its_state_and_a_sound_volume_none() {
        let sound = GetStatusReply { state: "serving".to_owned(), ..GetStatusReply::default() };
        assert_eq!(judge(&sound), []);
        let replica =
            ReplicaStatus { node: "b".to_owned(), state: "offline".to_owned(), ..ReplicaStatus::default() };
        let ill = GetStatusReply {
            state: "fenced".to_owned(),
            reason: "generation 3".to_owned(),
            corrupt_blocks_unrepairable: 2,
            replicas: vec![replica],
            ..GetStatusReply::default()
        };
        let found = judge(&ill);
        let reasons: Vec<&str> = found.iter().map(|entry| entry.reason.as_str()).collect();
        assert_eq!(reasons, ["BlocksUnreadable", "TargetNotServing", "ReplicasOutOfSync"]);
        assert_eq!(found[0].status(), VolumeHealthErrorType::DataLoss);
        assert!(found[2].message.contains("b is offline"), "{}", found[2].message);
    }
}
