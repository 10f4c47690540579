//! The controller's client and the requests that its tests send.

use std::collections::HashMap;

use holdfast_proto::csi::controller_client::ControllerClient;
use holdfast_proto::csi::group_controller_client::GroupControllerClient;
use holdfast_proto::csi::snapshot_metadata_client::SnapshotMetadataClient;
use holdfast_proto::csi::volume_capability::access_mode::Mode;
use holdfast_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use holdfast_proto::csi::volume_content_source::{SnapshotSource, Type as SourceType, VolumeSource};
use holdfast_proto::csi::*;
use holdfast_service::ControllerService;
use tonic::Status;
use tonic::transport::Channel;

#[derive(Clone)]
pub struct Controller(pub ControllerClient<Channel>, pub Channel, pub ControllerService);

impl Controller {
    pub async fn create(&self, request: &CreateVolumeRequest) -> Result<Volume, Status> {
        Ok(self.0.clone().create_volume(request.clone()).await?.into_inner().volume.unwrap())
    }

    pub async fn delete(&self, volume_id: &str) -> Result<(), Status> {
        let request =
            DeleteVolumeRequest { volume_id: volume_id.to_owned(), ..DeleteVolumeRequest::default() };
        self.0.clone().delete_volume(request).await.map(drop)
    }

    pub async fn publish(&self, volume_id: &str, node: &str) -> Result<HashMap<String, String>, Status> {
        self.publish_as(mk_publish(volume_id, node)).await
    }

    pub async fn publish_as(
        &self,
        request: ControllerPublishVolumeRequest,
    ) -> Result<HashMap<String, String>, Status> {
        Ok(self.0.clone().controller_publish_volume(request).await?.into_inner().publish_context)
    }

    pub async fn unpublish(&self, volume_id: &str, node: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            node_id: node.to_owned(),
            ..ControllerUnpublishVolumeRequest::default()
        };
        self.0.clone().controller_unpublish_volume(request).await.map(drop)
    }

    pub async fn snapshot(&self, volume_id: &str, name: &str) -> Result<Snapshot, Status> {
        let request = CreateSnapshotRequest {
            source_volume_id: volume_id.to_owned(),
            name: name.to_owned(),
            ..CreateSnapshotRequest::default()
        };
        Ok(self.0.clone().create_snapshot(request).await?.into_inner().snapshot.unwrap())
    }

    pub async fn delete_snapshot(&self, snapshot_id: &str) -> Result<(), Status> {
        let snapshot_id = snapshot_id.to_owned();
        let request = DeleteSnapshotRequest { snapshot_id, ..DeleteSnapshotRequest::default() };
        self.0.clone().delete_snapshot(request).await.map(drop)
    }

    /// The ids of all snapshots that fit.
    pub async fn snapshots(&self, request: ListSnapshotsRequest) -> Result<Vec<String>, Status> {
        let answer = self.0.clone().list_snapshots(request).await?.into_inner();
        Ok(answer.entries.into_iter().map(|entry| entry.snapshot.unwrap().snapshot_id).collect())
    }

    pub async fn expand(&self, volume_id: &str, required: i64, limit: i64) -> Result<i64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: volume_id.to_owned(),
            capacity_range: Some(CapacityRange { required_bytes: required, limit_bytes: limit }),
            ..ControllerExpandVolumeRequest::default()
        };
        let answer = self.0.clone().controller_expand_volume(request).await?.into_inner();
        Ok(answer.capacity_bytes)
    }

    pub async fn modify(&self, volume_id: &str, parameters: &[(&str, &str)]) -> Result<(), Status> {
        let pairs = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let request = ControllerModifyVolumeRequest {
            volume_id: volume_id.to_owned(),
            mutable_parameters: pairs.collect(),
            ..ControllerModifyVolumeRequest::default()
        };
        self.0.clone().controller_modify_volume(request).await.map(drop)
    }

    pub fn metadata(&self) -> SnapshotMetadataClient<Channel> {
        SnapshotMetadataClient::new(self.1.clone())
    }

    pub fn groups(&self) -> GroupControllerClient<Channel> {
        GroupControllerClient::new(self.1.clone())
    }

    pub async fn list(&self, max_entries: i32, token: &str) -> Result<ListVolumesResponse, Status> {
        let request = ListVolumesRequest { max_entries, starting_token: token.to_owned() };
        self.0.clone().list_volumes(request).await.map(tonic::Response::into_inner)
    }
}

pub fn mk_from_snapshot(name: &str, snapshot_id: &str) -> CreateVolumeRequest {
    let from = SnapshotSource { snapshot_id: snapshot_id.to_owned() };
    let source = VolumeContentSource { r#type: Some(SourceType::Snapshot(from)) };
    CreateVolumeRequest { volume_content_source: Some(source), ..mk_create(name) }
}

pub fn mk_from_volume(name: &str, volume_id: &str) -> CreateVolumeRequest {
    let from = VolumeSource { volume_id: volume_id.to_owned() };
    let source = VolumeContentSource { r#type: Some(SourceType::Volume(from)) };
    CreateVolumeRequest { volume_content_source: Some(source), ..mk_create(name) }
}

pub fn mk_create(name: &str) -> CreateVolumeRequest {
    mk_sized(name, 1 << 30, 0)
}

pub fn mk_sized(name: &str, required_bytes: i64, limit_bytes: i64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange { required_bytes, limit_bytes }),
        volume_capabilities: vec![mk_mount("")],
        ..CreateVolumeRequest::default()
    }
}

pub fn mk_with(mut request: CreateVolumeRequest, key: &str, value: &str) -> CreateVolumeRequest {
    request.parameters.insert(key.to_owned(), value.to_owned());
    request
}

pub fn mk_publish(volume_id: &str, node: &str) -> ControllerPublishVolumeRequest {
    ControllerPublishVolumeRequest {
        volume_id: volume_id.to_owned(),
        node_id: node.to_owned(),
        volume_capability: Some(mk_mount("")),
        ..ControllerPublishVolumeRequest::default()
    }
}

pub fn mk_mount(fs_type: &str) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.to_owned(),
            ..MountVolume::default()
        })),
    }
}

pub fn mk_block() -> VolumeCapability {
    VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mk_mount("") }
}

pub fn mk_mode(mode: Mode) -> VolumeCapability {
    VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), ..mk_mount("") }
}
