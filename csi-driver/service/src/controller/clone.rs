//! Volumes made from a snapshot or from another volume (R30).
//!
//! 1. From a volume: a snapshot of it is cut, asked for in its record with the new volume's id. A crash here leaves a
//!    snapshot that nobody can name; [`super::sweep`] deletes it.
//! 2. The new record is created. Its in-sync replicas are on nodes that hold the snapshot, as they share its layers; where
//!    there are fewer of them than replicas wanted, the rest is listed out of sync, for the volume's target to rebuild.
//! 3. The source's record names the new volume: from here on the snapshot cannot be deleted.
//! 4. Each replica is made from the holder on its node.
//! 5. The new record says so: its replicas have links of their own, and no step of this is ever done again.
//! 6. The source's record forgets the new volume.
//!
//! A crash between any two steps: the caller repeats by name. If the source went away meanwhile, what was begun is deleted.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::encryption::EncryptionKind;
use holdfast_storage_core::ids::{Lineage, NodeName, ReplicaId, SnapshotId, VolumeId};
use holdfast_storage_core::placement::PlacementRequest;
use holdfast_storage_core::record::{CloneSource, Formatted, SnapshotRecord, VolumeRecord};
use holdfast_storage_core::record_store::{StoreError, Versioned};
use holdfast_storage_core::transitions::{self, NewVolume};
use tonic::{Code, Status};

use super::Inner;
use super::create::first_replicas;
use crate::status::{from_store, from_transition};
use crate::volume_request::{SnapshotHandle, VolumeRequest, VolumeSource};

impl Inner {
    /// Steps 1 and 2.
    pub(super) async fn create_clone_record(
        &self,
        wanted: &VolumeRequest,
        from: VolumeSource,
    ) -> Result<Versioned, Status> {
        let volume_id = VolumeId(rand::random());
        // The sweep takes a snapshot for a clone without a record for one that was left behind.
        let _making = self.making.begin(volume_id);
        let (source, snapshot) = match from {
            VolumeSource::Snapshot(handle) => (self.find_snapshot(handle).await?.0, handle.snapshot),
            VolumeSource::Volume(volume) => {
                let record = self.live(volume).await?;
                check_size(wanted, record.size_bytes, "volume")?;
                let id = SnapshotId(rand::random());
                (self.cut(volume, id, String::new(), Some(volume_id)).await?, id)
            }
        };
        let entry = source.snapshot(snapshot).cloned().ok_or_else(|| {
            Status::aborted(format!("snapshot {snapshot} was deleted meanwhile; repeat the call"))
        })?;
        let size_bytes = check_size(wanted, entry.size_bytes, "snapshot")?;
        let formatted = formatted(wanted, &source, &entry)?;
        check_encryption(wanted, &source)?;
        let of_volume = matches!(from, VolumeSource::Volume(_));
        let from = CloneSource { volume: source.volume_id, snapshot, of_volume, linked: false };
        let _placing = self.placing.lock().await;
        let holders = holder_nodes(&source, &entry);
        let request = PlacementRequest { holders: holders.clone(), ..first_replicas(wanted, size_bytes) };
        let nodes = self.choose_nodes(&request).await?;
        let (holders, others): (Vec<NodeName>, Vec<NodeName>) =
            nodes.into_iter().partition(|node| holders.contains(node));
        if holders.is_empty() {
            return Err(Status::unavailable(format!(
                "no node that holds snapshot {snapshot} of volume {} answers and has {size_bytes} bytes free; repeat the call",
                source.volume_id
            )));
        }
        let mut record = transitions::create(NewVolume {
            volume_id,
            name: wanted.name.clone(),
            lineage: Lineage(rand::random()),
            size_bytes,
            epoch_nonce: rand::random(),
            replicas: holders.into_iter().map(|node| (ReplicaId(rand::random()), node)).collect(),
            params: wanted.params.clone(),
            // Of the record in which the snapshot counts: whoever wrote anything before the cut had set the key check.
            encryption: source.encryption,
            source: Some((from, formatted)),
        });
        for node in others {
            record = transitions::add_replica(&record, ReplicaId(rand::random()), &node)
                .map_err(from_transition)?;
        }
        let version = self.store.create(record.clone()).await.map_err(from_store)?;
        Ok(Versioned { version, record })
    }

    /// Step 3, and what its failure means.
    pub(super) async fn claim_source(&self, clone: &VolumeRecord) -> Result<(), Status> {
        let Some(source) = clone.source.clone().filter(|source| !source.linked) else { return Ok(()) };
        let claim = |record: &VolumeRecord| transitions::add_clone(record, source.snapshot, clone.volume_id);
        let Err(status) = self.change(source.volume, claim).await else { return Ok(()) };
        if matches!(status.code(), Code::NotFound | Code::FailedPrecondition) {
            self.erase(clone.volume_id).await?;
            return Err(Status::not_found(format!(
                "volume_content_source: what \"{}\" was to be made from was deleted meanwhile ({})",
                clone.name,
                status.message()
            )));
        }
        Err(status)
    }

    /// Steps 5 and 6.
    pub(super) async fn link_source(&self, clone: VolumeRecord) -> Result<VolumeRecord, Status> {
        let Some(source) = clone.source.clone().filter(|source| !source.linked) else { return Ok(clone) };
        let linked = self.change(clone.volume_id, transitions::link_source).await?;
        // It is done; what is left of the source's part is swept up later, too.
        if let Err(status) = self.release_source(&source, clone.volume_id).await {
            tracing::warn!(volume = %clone.volume_id, %status, "the source still names a finished clone");
        }
        self.sweep_soon.notify_one();
        Ok(linked)
    }

    /// The source's record forgets a clone that is finished or gone.
    pub(super) async fn release_source(&self, source: &CloneSource, clone: VolumeId) -> Result<(), Status> {
        match self.store.read(source.volume).await {
            Err(StoreError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(from_store(error)),
            Ok(_) => {}
        }
        let released = self
            .change(source.volume, |record| transitions::remove_clone(record, source.snapshot, clone))
            .await;
        released.map(drop)
    }

    /// From which replica each node's is made, for a clone whose layers are not linked yet.
    pub(super) async fn source_replicas(&self, clone: &VolumeRecord) -> Result<Option<CloneLayers>, Status> {
        let Some(from) = clone.source.clone().filter(|source| !source.linked) else { return Ok(None) };
        let source = self.store.read(from.volume).await.map_err(from_store)?.record;
        let entry = source.snapshot(from.snapshot).cloned().ok_or_else(|| {
            Status::aborted(format!("snapshot {} was deleted meanwhile; repeat the call", from.snapshot))
        })?;
        let holders = source.replicas.iter().filter(|(id, _)| entry.holders.contains(id));
        let by_node = holders.map(|(id, replica)| (replica.node.clone(), *id)).collect();
        Ok(Some(CloneLayers { entry, by_node }))
    }
}

/// Nodes with a replica that has a snapshot.
fn holder_nodes(source: &VolumeRecord, snapshot: &SnapshotRecord) -> BTreeSet<NodeName> {
    let holders = source.replicas.iter().filter(|(id, _)| snapshot.holders.contains(id));
    holders.map(|(_, replica)| replica.node.clone()).collect()
}

/// Where the layers of a clone come from.
pub(super) struct CloneLayers {
    pub(super) entry: SnapshotRecord,
    /// The holder on each node.
    pub(super) by_node: BTreeMap<NodeName, ReplicaId>,
}

impl CloneLayers {
    pub(super) fn holders(&self) -> BTreeSet<NodeName> {
        self.by_node.keys().cloned().collect()
    }
}

/// The size of the new volume: never below what it begins with.
fn check_size(wanted: &VolumeRequest, source_bytes: u64, what: &str) -> Result<u64, Status> {
    let refuse = |field: &str, bytes: u64| {
        Err(Status::out_of_range(format!(
            "capacity_range.{field} {bytes} is below the {source_bytes} bytes of the source {what}"
        )))
    };
    match (wanted.range.required_bytes, wanted.range.limit_bytes) {
        (_, Some(limit)) if limit < source_bytes => refuse("limit_bytes", limit),
        (required, _) if required > 0 && required < source_bytes => refuse("required_bytes", required),
        (0, _) => Ok(source_bytes),
        _ => Ok(wanted.size_bytes.max(source_bytes)),
    }
}

/// The data is the source's, byte by byte.
fn check_encryption(wanted: &VolumeRequest, source: &VolumeRecord) -> Result<(), Status> {
    let word = |kind: EncryptionKind| match kind {
        EncryptionKind::None => "none",
        EncryptionKind::AesXts => "aes-xts",
    };
    let (theirs, ours) = (source.params.encryption, wanted.params.encryption);
    if theirs == ours {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "encryption \"{}\" contradicts the source, which has \"{}\"",
        word(ours),
        word(theirs)
    )))
}

/// How far formatting went in what the volume begins as (R36).
fn formatted(
    wanted: &VolumeRequest,
    source: &VolumeRecord,
    snapshot: &SnapshotRecord,
) -> Result<Formatted, Status> {
    match (source.params.fs_type.as_str(), wanted.params.fs_type.as_str()) {
        // What is on a raw block volume is its user's: it is never formatted.
        ("", _) | (_, "") => Ok(Formatted::Yes),
        (theirs, ours) if theirs == ours => Ok(snapshot.formatted),
        (theirs, ours) => Err(Status::invalid_argument(format!(
            "fsType \"{ours}\" contradicts the source, which has the file system {theirs}"
        ))),
    }
}

/// What CSI says of a volume's source.
pub(super) fn content_source(record: &VolumeRecord) -> Option<holdfast_proto::csi::VolumeContentSource> {
    use holdfast_proto::csi::VolumeContentSource;
    use holdfast_proto::csi::volume_content_source::{SnapshotSource, Type, VolumeSource as FromVolume};
    let source = record.source.as_ref()?;
    let from = if source.of_volume {
        Type::Volume(FromVolume { volume_id: source.volume.to_string() })
    } else {
        let handle = SnapshotHandle { volume: source.volume, snapshot: source.snapshot };
        Type::Snapshot(SnapshotSource { snapshot_id: handle.to_string() })
    };
    Some(VolumeContentSource { r#type: Some(from) })
}

/// Whether a volume that exists was made from what a repeated call names.
pub(super) fn same_source(record: &VolumeRecord, wanted: Option<VolumeSource>) -> bool {
    match (&record.source, wanted) {
        (None, None) => true,
        (Some(source), Some(VolumeSource::Volume(volume))) => source.of_volume && source.volume == volume,
        (Some(source), Some(VolumeSource::Snapshot(handle))) => {
            !source.of_volume && SnapshotHandle { volume: source.volume, snapshot: source.snapshot } == handle
        }
        (None, Some(_)) | (Some(_), None) => false,
    }
}
