//! CSI Identity: who the plugin is and whether it is ready.

use holdfast_proto::csi::identity_server::Identity;
use holdfast_proto::csi::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use holdfast_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use std::sync::Arc;

use holdfast_storage_core::record_store::RecordStore;
use tonic::{Request, Response, Status};

use crate::DRIVER_NAME;
use crate::gate::Gate;

/// Answers for the controller and the node process.
pub struct IdentityService {
    /// The store whose loss makes the controller unready; none on nodes, where a restart cures nothing.
    store: Option<Arc<dyn RecordStore>>,
    /// Whether the controller takes calls yet; none on nodes.
    gate: Option<Gate>,
}

impl IdentityService {
    /// For the controller: ready while it takes calls and its store answers.
    #[must_use]
    pub fn controller(store: Arc<dyn RecordStore>, gate: Gate) -> Self {
        Self { store: Some(store), gate: Some(gate) }
    }

    /// For a node: ready while it answers at all.
    #[must_use]
    pub fn node() -> Self {
        Self { store: None, gate: None }
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER_NAME.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: std::collections::HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let services = [
            service::Type::ControllerService,
            service::Type::GroupControllerService,
            service::Type::VolumeAccessibilityConstraints,
            service::Type::SnapshotMetadataService,
            service::Type::SnapshotAccessibilityConstraints,
        ];
        let mut types: Vec<Type> =
            services.map(|kind| Type::Service(Service { r#type: kind.into() })).to_vec();
        types.push(Type::VolumeExpansion(VolumeExpansion { r#type: volume_expansion::Type::Online.into() }));
        let capabilities = types.into_iter().map(|kind| PluginCapability { r#type: Some(kind) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        if self.gate.as_ref().is_some_and(|gate| !gate.is_open()) {
            return Ok(Response::new(ProbeResponse { ready: Some(false) }));
        }
        if let Some(store) = &self.store {
            store.list().await.map_err(|e| Status::failed_precondition(e.to_string()))?;
        }
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
