//! ControllerPublishVolume and ControllerUnpublishVolume: swaps of the record, nothing else.
//!
//! Unpublishing asks nothing of the node: a node that is cut off cannot delay the failover, and its target is fenced
//! by the generation of the next one.

use std::collections::{BTreeSet, HashMap};

use holdfast_proto::csi::{
    ControllerPublishVolumeRequest, ControllerPublishVolumeResponse, ControllerUnpublishVolumeRequest,
    ControllerUnpublishVolumeResponse,
};
use holdfast_storage_core::ids::{NodeName, VolumeId};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::transitions;
use tonic::Status;

use super::{ATTACHMENT_KEY, Inner, READ_ONLY_KEY, SWAP_ATTEMPTS_MAX};
use crate::status::{from_store, from_transition};
use crate::volume_request::{check_access, check_capability, existing_volume_id, parse_volume_id};

impl Inner {
    pub(super) async fn publish(
        &self,
        request: ControllerPublishVolumeRequest,
    ) -> Result<ControllerPublishVolumeResponse, Status> {
        if request.node_id.is_empty() {
            return Err(Status::invalid_argument("node_id is missing"));
        }
        let capability = request.volume_capability.as_ref();
        let capability =
            capability.ok_or_else(|| Status::invalid_argument("volume_capability is missing"))?;
        let access = check_capability(capability)?;
        let volume = existing_volume_id(&request.volume_id)?;
        let node = NodeName(request.node_id);
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            self.check_node(&node)?;
            check_access(&found.record, &access)?;
            let record =
                transitions::publish(&found.record, &node, request.readonly).map_err(from_transition)?;
            if record == found.record {
                return Ok(answer(&record));
            }
            self.take_place(volume, &node).await?;
            let swapped = self.store.swap(found.version, record.clone()).await;
            self.attaching.lock().await.remove(&volume);
            match swapped {
                Ok(_) => {
                    tracing::info!(%volume, %node, attachment = %record.attachment, "volume published");
                    return Ok(answer(&record));
                }
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    pub(super) async fn unpublish(
        &self,
        request: ControllerUnpublishVolumeRequest,
    ) -> Result<ControllerUnpublishVolumeResponse, Status> {
        let done = ControllerUnpublishVolumeResponse {};
        let Some(volume) = parse_volume_id(&request.volume_id)? else {
            return Ok(done);
        };
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = match self.store.read(volume).await {
                Ok(found) => found,
                Err(StoreError::NotFound(_)) => return Ok(done),
                Err(error) => return Err(from_store(error)),
            };
            let Some(node) = found.record.attached_to.clone() else {
                return Ok(done);
            };
            // No node_id means: from every node.
            let named = (!request.node_id.is_empty()).then(|| NodeName(request.node_id.clone()));
            let record = transitions::unpublish(&found.record, named.as_ref()).map_err(from_transition)?;
            if record == found.record {
                return Ok(done);
            }
            match self.store.swap(found.version, record).await {
                Ok(_) => {
                    tracing::info!(%volume, %node, "volume unpublished");
                    return Ok(done);
                }
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    /// Takes one of the places of a node that has a limit, until the volume's record shows that it is attached. A volume that
    /// is on its way counts from here on: its entry is read before the records, which show it before the entry goes.
    async fn take_place(&self, volume: VolumeId, node: &NodeName) -> Result<(), Status> {
        let Some(most) = self.book.get(node).and_then(|info| info.volumes_max) else { return Ok(()) };
        let mut attaching = self.attaching.lock().await;
        let mut there: BTreeSet<VolumeId> =
            attaching.iter().filter(|(_, at)| *at == node).map(|(volume, _)| *volume).collect();
        for found in self.store.list().await.map_err(from_store)? {
            if found.record.attached_to.as_ref() == Some(node) {
                there.insert(found.record.volume_id);
            }
        }
        there.remove(&volume);
        if there.len() >= most as usize {
            return Err(Status::resource_exhausted(format!(
                "node_id: node {node} has {} volumes attached and takes {most} at most",
                there.len()
            )));
        }
        attaching.insert(volume, node.clone());
        Ok(())
    }

    fn check_node(&self, node: &NodeName) -> Result<(), Status> {
        if self.book.get(node).is_some() {
            return Ok(());
        }
        let shown: String = node.0.chars().take(64).collect();
        if self.book.is_filling() {
            let sentence =
                format!("node_id: node \"{shown}\" has not announced itself since this controller started");
            return Err(Status::unavailable(sentence));
        }
        Err(Status::not_found(format!("node_id: there is no node \"{shown}\"")))
    }
}

fn answer(record: &VolumeRecord) -> ControllerPublishVolumeResponse {
    let publish_context = HashMap::from([
        (ATTACHMENT_KEY.to_owned(), record.attachment.to_string()),
        (READ_ONLY_KEY.to_owned(), record.read_only.to_string()),
    ]);
    ControllerPublishVolumeResponse { publish_context }
}
