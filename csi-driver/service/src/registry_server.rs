//! The registry: the controller's record store and node list, served to nodes without Kubernetes.
//!
//! With TLS a caller acts only for the node that its certificate names: it announces that node, and swaps only
//! records of volumes that are attached to it or have a replica on it, leaving alone what is the controller's to
//! decide. Without TLS nobody is checked.

use std::sync::Arc;

use holdfast_proto::storage::registry_server::{Registry, RegistryServer as Service};
use holdfast_proto::storage::{
    AnnounceReply, AnnounceRequest, CreateRecordRequest, ListNodesReply, ListNodesRequest, ListRecordsReply,
    ListRecordsRequest, ReadRecordRequest, RecordReply, RecordVersionReply, RemoveRecordReply,
    RemoveRecordRequest, SwapRecordRequest,
};
use holdfast_storage_core::ids::{NodeName, RecordVersion};
use holdfast_storage_core::node_directory::NodeDirectory;
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{RecordStore, StoreError};
use tonic::{Request, Response, Status};

use crate::registry_wire::{
    decided, node_from_wire, node_to_wire, parse_volume, record_from_json, to_status, versioned_to_wire,
};
use crate::tls::{CONTROLLER_NAME, dns_names};
use crate::topology::is_topology_value;

/// Longest node name that Kubernetes allows.
const NODE_NAME_BYTES_MAX: usize = 253;

/// Serves any store and node list as the `Registry` service.
pub struct RegistryServer {
    store: Arc<dyn RecordStore>,
    directory: Arc<dyn NodeDirectory>,
    check_callers: bool,
}

impl RegistryServer {
    /// `check_callers` demands that the connection is TLS and binds each caller to its certificate's names.
    #[must_use]
    pub fn new(store: Arc<dyn RecordStore>, directory: Arc<dyn NodeDirectory>, check_callers: bool) -> Self {
        Self { store, directory, check_callers }
    }

    /// The service, to be added to a server.
    #[must_use]
    pub fn into_service(self) -> Service<Self> {
        Service::new(self)
    }

    fn caller<T>(&self, request: &Request<T>) -> Caller {
        if !self.check_callers {
            return Caller { names: None };
        }
        let certs = request.peer_certs();
        Caller { names: Some(certs.iter().flat_map(|c| c.first()).flat_map(dns_names).collect()) }
    }
}

/// Who calls: the names of its certificate, or anybody.
struct Caller {
    names: Option<Vec<String>>,
}

impl Caller {
    fn is(&self, name: &str) -> bool {
        self.names.as_ref().is_none_or(|names| names.iter().any(|n| n == name))
    }

    fn describe(&self) -> String {
        self.names.as_ref().map_or_else(|| "anybody".to_owned(), |names| names.join(", "))
    }

    fn must_be_controller(&self, verb: &str) -> Result<(), Status> {
        if self.is(CONTROLLER_NAME) {
            return Ok(());
        }
        let sentence =
            format!("only {CONTROLLER_NAME} may {verb} records; the caller is {}", self.describe());
        Err(decided(Status::permission_denied(sentence)))
    }

    fn may_swap(&self, old: &VolumeRecord, new: &VolumeRecord) -> Result<(), Status> {
        if self.is(CONTROLLER_NAME) {
            return Ok(());
        }
        let concerned = |node: &NodeName| self.is(&node.0);
        let involved =
            old.attached_to.iter().any(concerned) || old.replicas.values().any(|r| concerned(&r.node));
        let kept = old.attachment == new.attachment
            && old.attached_to == new.attached_to
            && old.read_only == new.read_only
            && old.deleting == new.deleting
            && old.lineage == new.lineage
            && old.promoted == new.promoted
            && old.requested == new.requested
            && old.retired == new.retired
            && old.source == new.source
            && old.params == new.params
            // The node that a volume is published to binds it to the key of its first stage.
            && (old.encryption == new.encryption || old.attached_to.iter().any(concerned))
            // Its target makes a volume larger, nobody smaller (R31).
            && old.size_bytes <= new.size_bytes;
        if involved && kept {
            return Ok(());
        }
        Err(decided(Status::permission_denied(format!(
            "{} may not make this change of volume {}: {}",
            self.describe(),
            old.volume_id,
            if involved {
                "it touches what only the controller decides"
            } else {
                "it holds no part of the volume"
            }
        ))))
    }
}

#[tonic::async_trait]
impl Registry for RegistryServer {
    async fn read(&self, request: Request<ReadRecordRequest>) -> Result<Response<RecordReply>, Status> {
        let volume = parse_volume(&request.get_ref().volume_id)?;
        let versioned = self.store.read(volume).await.map_err(|e| to_status(&e))?;
        let record = versioned_to_wire(&versioned).map_err(|e| to_status(&e))?;
        Ok(Response::new(RecordReply { record: Some(record) }))
    }

    async fn list(&self, _: Request<ListRecordsRequest>) -> Result<Response<ListRecordsReply>, Status> {
        let all = self.store.list().await.map_err(|e| to_status(&e))?;
        let records = all
            .iter()
            .map(|found| versioned_to_wire(found))
            .collect::<Result<_, _>>()
            .map_err(|e| to_status(&e))?;
        Ok(Response::new(ListRecordsReply { records }))
    }

    async fn create(
        &self,
        request: Request<CreateRecordRequest>,
    ) -> Result<Response<RecordVersionReply>, Status> {
        self.caller(&request).must_be_controller("create")?;
        let record = record_from_json(&request.get_ref().json).map_err(|e| to_status(&e))?;
        let version = self.store.create(record).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(RecordVersionReply { version: version.0 }))
    }

    async fn swap(
        &self,
        request: Request<SwapRecordRequest>,
    ) -> Result<Response<RecordVersionReply>, Status> {
        let caller = self.caller(&request);
        let request = request.into_inner();
        let expected = RecordVersion(request.expected_version);
        let record = record_from_json(&request.json).map_err(|e| to_status(&e))?;
        if caller.names.is_some() {
            let old = self.store.read(record.volume_id).await.map_err(|e| to_status(&e))?;
            // What was judged must be what is replaced.
            if old.version != expected {
                return Err(to_status(&StoreError::Conflict(record.volume_id)));
            }
            caller.may_swap(&old.record, &record)?;
        }
        let version = self.store.swap(expected, record).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(RecordVersionReply { version: version.0 }))
    }

    async fn remove(
        &self,
        request: Request<RemoveRecordRequest>,
    ) -> Result<Response<RemoveRecordReply>, Status> {
        self.caller(&request).must_be_controller("remove")?;
        let request = request.into_inner();
        let volume = parse_volume(&request.volume_id)?;
        let expected = RecordVersion(request.expected_version);
        self.store.remove(expected, volume).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(RemoveRecordReply {}))
    }

    async fn announce(&self, request: Request<AnnounceRequest>) -> Result<Response<AnnounceReply>, Status> {
        let caller = self.caller(&request);
        let node = request.into_inner().node;
        let node = node.ok_or_else(|| decided(Status::invalid_argument("node is missing")))?;
        if node.name.is_empty() || node.name.len() > NODE_NAME_BYTES_MAX {
            let sentence = format!("node.name must have 1 to {NODE_NAME_BYTES_MAX} bytes");
            return Err(decided(Status::invalid_argument(sentence)));
        }
        for (field, value) in [("zone", &node.zone), ("pool_class", &node.pool_class)] {
            if !value.is_empty() && !is_topology_value(value) {
                let sentence = format!(
                    "node.{field} must be empty or a label's value: letters, digits, \"-\", \"_\" and \".\", at most 63"
                );
                return Err(decided(Status::invalid_argument(sentence)));
            }
        }
        if !caller.is(&node.name) {
            let sentence = format!("{} may not announce node {}", caller.describe(), node.name);
            return Err(decided(Status::permission_denied(sentence)));
        }
        self.directory.announce(node_from_wire(node)).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(AnnounceReply {}))
    }

    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesReply>, Status> {
        let nodes = self.directory.list_nodes().await.map_err(|e| to_status(&e))?;
        Ok(Response::new(ListNodesReply { nodes: nodes.into_iter().map(node_to_wire).collect() }))
    }
}
