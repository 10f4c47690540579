//! How store answers travel as gRPC statuses, in one place for both sides.

use holdfast_proto::storage::{Node, Record};
use holdfast_storage_core::ids::{NodeName, RecordVersion, VolumeId};
use holdfast_storage_core::node_directory::NodeInfo;
use holdfast_storage_core::record::{RECORD_FORMAT, VolumeRecord};
use holdfast_storage_core::record_store::{StoreError, Versioned};
use tonic::{Code, Status};

/// Metadata that carries the volume's id with a refusal, so that the client rebuilds the same error.
const VOLUME_KEY: &str = "holdfast-volume";
/// Metadata that marks a status as the store's own decision: a proxy's or transport's error never has it, so it can
/// never be taken for "nothing was changed" (R8).
const DECIDED_KEY: &str = "holdfast-decided";

pub(crate) fn to_status(error: &StoreError) -> Status {
    let (code, volume) = match error {
        StoreError::NotFound(volume) => (Code::NotFound, Some(*volume)),
        StoreError::Exists(volume) => (Code::AlreadyExists, Some(*volume)),
        StoreError::Conflict(volume) => (Code::Aborted, Some(*volume)),
        StoreError::GroupConflict(_) => (Code::Aborted, None),
        StoreError::Unknown(reason) => return Status::unavailable(reason.clone()),
        StoreError::Refused(reason) => return decided(Status::failed_precondition(reason.clone())),
    };
    let mut status = decided(Status::new(code, error.to_string()));
    if let Some(value) = volume.and_then(|id| id.to_string().parse().ok()) {
        status.metadata_mut().insert(VOLUME_KEY, value);
    }
    status
}

/// Marks a refusal as one after which nothing was changed.
pub(crate) fn decided(mut status: Status) -> Status {
    status.metadata_mut().insert(DECIDED_KEY, tonic::metadata::MetadataValue::from_static("1"));
    status
}

pub(crate) fn from_status(status: &Status) -> StoreError {
    if status.metadata().get(DECIDED_KEY).is_none() {
        return StoreError::Unknown(format!("{}: {}", status.code(), status.message()));
    }
    let volume = status.metadata().get(VOLUME_KEY).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    match (status.code(), volume) {
        (Code::NotFound, Some(volume)) => StoreError::NotFound(volume),
        (Code::AlreadyExists, Some(volume)) => StoreError::Exists(volume),
        (Code::Aborted, Some(volume)) => StoreError::Conflict(volume),
        _ => StoreError::Refused(status.message().to_owned()),
    }
}

pub(crate) fn parse_volume(text: &str) -> Result<VolumeId, Status> {
    text.parse().map_err(|e| decided(Status::invalid_argument(format!("volume_id: {e}"))))
}

pub(crate) fn record_to_json(record: &VolumeRecord) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|e| StoreError::Refused(format!("the record has no JSON form: {e}")))
}

pub(crate) fn record_from_json(json: &[u8]) -> Result<VolumeRecord, StoreError> {
    let record: VolumeRecord = serde_json::from_slice(json)
        .map_err(|e| StoreError::Refused(format!("the record is no valid JSON: {e}")))?;
    if record.format > RECORD_FORMAT {
        return Err(StoreError::Refused(format!(
            "the record has format {}, this program knows up to {RECORD_FORMAT}",
            record.format
        )));
    }
    Ok(record)
}

pub(crate) fn versioned_to_wire(versioned: &Versioned) -> Result<Record, StoreError> {
    Ok(Record { version: versioned.version.0, json: record_to_json(&versioned.record)? })
}

pub(crate) fn versioned_from_wire(record: &Record) -> Result<Versioned, StoreError> {
    Ok(Versioned { version: RecordVersion(record.version), record: record_from_json(&record.json)? })
}

pub(crate) fn node_to_wire(node: NodeInfo) -> Node {
    Node {
        name: node.name.0,
        control_address: node.control_address,
        nbd_address: node.nbd_address,
        capacity_bytes: node.capacity_bytes,
        available_bytes: node.available_bytes,
        zone: node.zone.unwrap_or_default(),
        volumes_max: node.volumes_max.unwrap_or(0),
        pool_class: node.pool_class.unwrap_or_default(),
    }
}

pub(crate) fn node_from_wire(node: Node) -> NodeInfo {
    NodeInfo {
        name: NodeName(node.name),
        control_address: node.control_address,
        nbd_address: node.nbd_address,
        capacity_bytes: node.capacity_bytes,
        available_bytes: node.available_bytes,
        zone: Some(node.zone).filter(|zone| !zone.is_empty()),
        pool_class: Some(node.pool_class).filter(|class| !class.is_empty()),
        volumes_max: Some(node.volumes_max).filter(|most| *most > 0),
    }
}
