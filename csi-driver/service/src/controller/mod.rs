//! CSI Controller: volumes as objects.
//!
//! It owns the record's life (create, publish, unpublish, delete) and nothing of the data. Every call is safe to
//! repeat after a crash at any point: the record is written before the first replica is made and removed after the
//! last one is gone, so that no replica is ever forgotten.

mod clone;
mod conditions;
mod create;
mod delete;
mod expand;
#[cfg(test)]
mod fixtures;
mod groups;
mod heal;
mod health;
mod jobs;
mod list;
mod metadata;
mod modify;
mod pools;
mod promises;
mod promote;
mod publish;
mod replace;
mod rescue;
mod snapshots;
mod steps;
mod storage_nodes;
mod sweep;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use holdfast_proto::csi::controller_server::Controller;
use holdfast_proto::csi::controller_service_capability::{Rpc, Type, rpc};
use holdfast_proto::csi::*;
use holdfast_proto::storage::operator_server::Operator;
use holdfast_proto::storage::{
    ListStorageNodesReply, ListStorageNodesRequest, PromoteReplicaReply, PromoteReplicaRequest,
    ReplaceReplicaReply, ReplaceReplicaRequest, RescueRecordsReply, RescueRecordsRequest, SetNodeStateReply,
    SetNodeStateRequest,
};
use holdfast_storage_core::ids::{NodeName, VolumeId};
use holdfast_storage_core::node_directory::NodeStates;
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{GroupStore, RecordStore, StoreError};
use holdfast_storage_core::transitions::TransitionError;
use tokio::sync::{Mutex, Notify};
use tonic::{Request, Response, Status};

use crate::in_flight::{InFlight, detached};
use crate::node_book::NodeBook;
use crate::status::{from_store, from_transition};
use crate::tls::TlsIdentity;
pub use conditions::{VolumeCondition, VolumeReport, VolumeState};
use heal::ToTend;
use pools::Pools;
use promises::Promises;
use sweep::Making;

/// Key of publish_context under which the attachment's number travels to the node (R1).
pub const ATTACHMENT_KEY: &str = "attachment";
/// Key of publish_context that says whether the volume is published read-only.
pub const READ_ONLY_KEY: &str = "readOnly";

/// How often a change is decided anew because another writer moved the record; then the caller is told to repeat.
const SWAP_ATTEMPTS_MAX: u32 = 16;

/// What an operator decides about the controller.
#[derive(Clone)]
pub struct ControllerSettings {
    /// For how long a node must be silent before its replicas that are out of sync are replaced; none: never.
    pub replace_after: Option<Duration>,
    /// How much of each pool's capacity may be promised to volumes, in percent.
    pub overprovision_percent: u32,
    /// By how many percent of what they may promise the fullest node must be fuller than the emptiest for a replica to move;
    /// none: none does.
    pub rebalance_above_percent: Option<u32>,
    /// TLS towards the nodes; none is plain text.
    pub tls: Option<TlsIdentity>,
}

impl Default for ControllerSettings {
    fn default() -> Self {
        Self {
            replace_after: Some(Duration::from_secs(30 * 60)),
            overprovision_percent: 100,
            rebalance_above_percent: None,
            tls: None,
        }
    }
}

/// The service.
#[derive(Clone)]
pub struct ControllerService {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn RecordStore>,
    group_store: Arc<dyn GroupStore>,
    node_states: Arc<dyn NodeStates>,
    book: Arc<NodeBook>,
    pools: Pools,
    in_flight: InFlight,
    /// Held from reading the free space until what is taken of it is among the promises or in a record, so that no space is
    /// promised twice.
    placing: Mutex<()>,
    promises: Promises,
    /// Volumes that are being attached to nodes with a limit; locked to compare and take.
    attaching: Mutex<BTreeMap<VolumeId, NodeName>>,
    overprovision_percent: u32,
    rebalance_above_percent: Option<u32>,
    making: Making,
    replace_after: Option<Duration>,
    /// Why replicas could not be brought back, as of the last sweep.
    unhealed: std::sync::Mutex<BTreeMap<VolumeId, String>>,
    /// Volumes that want a target to be run, as of the last sweep.
    to_tend: std::sync::Mutex<ToTend>,
    /// Replicas are on their way, as of the last sweep.
    moving: AtomicBool,
    /// Something was left for the sweep.
    sweep_soon: Notify,
}

impl ControllerService {
    /// A controller over the records of volumes and groups that knows the nodes of `book` and reaches their data processes.
    /// What was decided about the nodes is in `node_states`, and in the book already.
    #[must_use]
    pub fn new(
        store: Arc<dyn RecordStore>,
        group_store: Arc<dyn GroupStore>,
        node_states: Arc<dyn NodeStates>,
        book: Arc<NodeBook>,
        settings: ControllerSettings,
    ) -> Self {
        let pools = Pools::new(Arc::clone(&book), settings.tls);
        let inner = Inner {
            store,
            group_store,
            node_states,
            book,
            pools,
            in_flight: InFlight::default(),
            placing: Mutex::new(()),
            promises: Promises::default(),
            attaching: Mutex::default(),
            overprovision_percent: settings.overprovision_percent,
            rebalance_above_percent: settings.rebalance_above_percent,
            making: Making::default(),
            replace_after: settings.replace_after,
            unhealed: std::sync::Mutex::default(),
            to_tend: std::sync::Mutex::default(),
            moving: AtomicBool::new(false),
            sweep_soon: Notify::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Clears away what calls leave behind; runs for ever, cancellation safe. Exactly one of it is needed.
    pub async fn keep_sweeping(&self) {
        self.inner.keep_sweeping().await;
    }

    /// Clears away once what calls left behind, and runs targets to the end where volumes want them.
    ///
    /// # Errors
    /// Why something could not be cleared away; everything else was.
    pub async fn sweep_once(&self) -> Result<(), Status> {
        let swept = self.inner.sweep().await;
        self.inner.tend_all().await;
        swept
    }
}

impl Inner {
    /// The record of a volume that its users can see.
    async fn live(&self, volume: VolumeId) -> Result<VolumeRecord, Status> {
        let record = self.store.read(volume).await.map_err(from_store)?.record;
        if record.is_gone() {
            return Err(Status::not_found(format!("volume {volume} is deleted")));
        }
        Ok(record)
    }

    /// Swaps a change of a volume's record in, deciding anew while others change it; answers the new record.
    async fn change(
        &self,
        volume: VolumeId,
        change: impl Fn(&VolumeRecord) -> Result<VolumeRecord, TransitionError>,
    ) -> Result<VolumeRecord, Status> {
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            let record = change(&found.record).map_err(from_transition)?;
            if record == found.record {
                return Ok(record);
            }
            match self.store.swap(found.version, record.clone()).await {
                Ok(_) => return Ok(record),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }
}

#[tonic::async_trait]
impl Operator for ControllerService {
    async fn replace_replica(
        &self,
        request: Request<ReplaceReplicaRequest>,
    ) -> Result<Response<ReplaceReplicaReply>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.replace_replica(request.into_inner()).await }).await.map(Response::new)
    }

    async fn promote_replica(
        &self,
        request: Request<PromoteReplicaRequest>,
    ) -> Result<Response<PromoteReplicaReply>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.promote_replica(request.into_inner()).await }).await.map(Response::new)
    }

    async fn set_node_state(
        &self,
        request: Request<SetNodeStateRequest>,
    ) -> Result<Response<SetNodeStateReply>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.set_node_state(request.into_inner()).await }).await.map(Response::new)
    }

    async fn list_storage_nodes(
        &self,
        _: Request<ListStorageNodesRequest>,
    ) -> Result<Response<ListStorageNodesReply>, Status> {
        self.inner.list_storage_nodes().await.map(Response::new)
    }

    async fn rescue_records(
        &self,
        request: Request<RescueRecordsRequest>,
    ) -> Result<Response<RescueRecordsReply>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.rescue_records(request.into_inner()).await }).await.map(Response::new)
    }
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.create_volume(request.into_inner()).await }).await.map(Response::new)
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.delete_volume(request.into_inner()).await }).await.map(Response::new)
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Result<Response<ControllerPublishVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.publish(request.into_inner()).await }).await.map(Response::new)
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<ControllerUnpublishVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.unpublish(request.into_inner()).await }).await.map(Response::new)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        self.inner.validate(request.into_inner()).await.map(Response::new)
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        self.inner.list_volumes(request.into_inner()).await.map(Response::new)
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        self.inner.get_capacity(request.into_inner()).await.map(Response::new)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let types = [
            rpc::Type::CreateDeleteVolume,
            rpc::Type::PublishUnpublishVolume,
            rpc::Type::ListVolumes,
            rpc::Type::ListVolumesPublishedNodes,
            rpc::Type::GetCapacity,
            rpc::Type::CreateDeleteSnapshot,
            rpc::Type::ListSnapshots,
            rpc::Type::GetSnapshot,
            rpc::Type::CloneVolume,
            rpc::Type::ExpandVolume,
            rpc::Type::ModifyVolume,
            rpc::Type::GetVolume,
            rpc::Type::GetVolumeHealth,
            rpc::Type::ListVolumeHealth,
            rpc::Type::PublishReadonly,
            rpc::Type::SingleNodeMultiWriter,
        ];
        let one = |kind: rpc::Type| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        };
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities: types.map(one).to_vec() }))
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<ControllerListVolumeHealthRequest>,
    ) -> Result<Response<ControllerListVolumeHealthResponse>, Status> {
        self.inner.list_volume_health(request.into_inner()).await.map(Response::new)
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<ControllerGetVolumeHealthResponse>, Status> {
        self.inner.volume_health(request.into_inner()).await.map(Response::new)
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.create_snapshot(request.into_inner()).await }).await.map(Response::new)
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.delete_snapshot(request.into_inner()).await }).await.map(Response::new)
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        self.inner.list_snapshots(request.into_inner()).await.map(Response::new)
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Result<Response<GetSnapshotResponse>, Status> {
        self.inner.get_snapshot(request.into_inner()).await.map(Response::new)
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.expand_volume(request.into_inner()).await }).await.map(Response::new)
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        self.inner.get_volume(request.into_inner()).await.map(Response::new)
    }

    async fn controller_modify_volume(
        &self,
        request: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.modify_volume(request.into_inner()).await }).await.map(Response::new)
    }
}
