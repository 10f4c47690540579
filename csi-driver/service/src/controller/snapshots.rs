//! CreateSnapshot, DeleteSnapshot, ListSnapshots, GetSnapshot.
//!
//! 1. The name is swapped into the source's record with a fresh id. A crash before: nothing happened.
//! 2. The volume's target cuts that id; cutting it twice is one cut. A crash before or between: the caller repeats by name,
//!    the id is found, and this step is done again.
//!
//! Deletion goes the other way: the target takes the snapshot out of the record and its layers, then the name goes. No call
//! here keeps the volume from being published elsewhere while a node does not answer.
//!
//! What counts as a snapshot of ours: one that is committed and was asked for by name, or that belongs to a committed group.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use holdfast_proto::csi::list_snapshots_response::Entry;
use holdfast_proto::csi::{
    CreateSnapshotRequest, CreateSnapshotResponse, DeleteSnapshotRequest, DeleteSnapshotResponse,
    GetSnapshotRequest, GetSnapshotResponse, ListSnapshotsRequest, ListSnapshotsResponse, Snapshot,
};
use holdfast_storage_core::group::{GroupRecord, GroupState};
use holdfast_storage_core::ids::{GroupId, SnapshotId, VolumeId};
use holdfast_storage_core::record::{RequestedSnapshot, SnapshotState, VolumeRecord};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::target::Job;
use holdfast_storage_core::transitions;
use prost_types::Timestamp;
use tonic::Status;

use super::Inner;
use super::list::{page_of, page_size};
use crate::status::from_store;
use crate::topology;
use crate::volume_request::{
    SnapshotHandle, check_name, existing_snapshot, existing_volume_id, parse_snapshot, parse_volume_id,
};

/// Keys that external-snapshotter adds by itself and that change nothing about the snapshot.
const METADATA_PREFIXES: [&str; 3] = [
    "csi.storage.k8s.io/volumesnapshot/",
    "csi.storage.k8s.io/volumesnapshotcontent/",
    "csi.storage.k8s.io/volumegroupsnapshot",
];

/// The committed groups by the snapshots that belong to them.
pub(super) struct Groups(BTreeMap<SnapshotHandle, GroupRecord>);

impl Groups {
    fn of(&self, handle: SnapshotHandle) -> Option<&GroupRecord> {
        self.0.get(&handle)
    }
}

impl Inner {
    pub(super) async fn create_snapshot(
        &self,
        request: CreateSnapshotRequest,
    ) -> Result<CreateSnapshotResponse, Status> {
        check_name(&request.name)?;
        if request.source_volume_id.is_empty() {
            return Err(Status::invalid_argument("source_volume_id is missing"));
        }
        check_parameters(request.parameters.keys())?;
        topology::check_requirement(request.accessibility_requirements.as_ref(), &self.book)?;
        let volume = existing_volume_id(&request.source_volume_id)?;
        let _by_name = self.in_flight.begin(format!("the snapshot named \"{}\"", request.name))?;
        let id = match self.find_request(&request.name).await? {
            Some((of, _)) if of != volume => {
                return Err(Status::already_exists(format!(
                    "a snapshot named \"{}\" exists already, of volume {of}",
                    request.name
                )));
            }
            Some((_, id)) => id,
            None => SnapshotId(rand::random()),
        };
        let record = self.store.read(volume).await.map_err(from_store)?.record;
        let record = match committed(&record, id) {
            true => record,
            false => self.cut(volume, id, request.name, None).await?,
        };
        let snapshot = to_csi(&record, id, None).ok_or_else(|| {
            Status::aborted(format!("snapshot {id} was deleted meanwhile; repeat the call"))
        })?;
        tracing::info!(%volume, snapshot = %id, "snapshot taken");
        Ok(CreateSnapshotResponse { snapshot: Some(snapshot) })
    }

    /// Asks for a snapshot and has it cut; answers the record that has it.
    pub(super) async fn cut(
        &self,
        volume: VolumeId,
        id: SnapshotId,
        name: String,
        for_clone: Option<VolumeId>,
    ) -> Result<VolumeRecord, Status> {
        let request = RequestedSnapshot { id, name, asked_unix_ms: now_unix_ms(), for_clone };
        self.change(volume, |record| transitions::request_snapshot(record, request.clone())).await?;
        self.job(volume, Job::CreateSnapshot { snapshot: id }).await?;
        self.store.read(volume).await.map_err(from_store).map(|found| found.record)
    }

    async fn find_request(&self, name: &str) -> Result<Option<(VolumeId, SnapshotId)>, Status> {
        let all = self.store.list().await.map_err(from_store)?;
        Ok(all.iter().filter(|found| !found.record.deleting).find_map(|found| {
            let asked = found.record.requested.iter().find(|r| r.for_clone.is_none() && r.name == name);
            asked.map(|request| (found.record.volume_id, request.id))
        }))
    }

    pub(super) async fn delete_snapshot(
        &self,
        request: DeleteSnapshotRequest,
    ) -> Result<DeleteSnapshotResponse, Status> {
        // What cannot be one of our ids is a snapshot that does not exist: deleted already.
        let Some(handle) = parse_snapshot(&request.snapshot_id)? else {
            return Ok(DeleteSnapshotResponse {});
        };
        let _by_id = self.in_flight.begin(format!("snapshot {handle}"))?;
        if let Some(group) = self.groups().await?.of(handle) {
            return Err(Status::invalid_argument(format!(
                "snapshot_id: {handle} belongs to the group snapshot {}; it is deleted with DeleteVolumeGroupSnapshot",
                group.group_id
            )));
        }
        self.remove_snapshot(handle).await?;
        tracing::info!(snapshot = %handle, "snapshot deleted");
        Ok(DeleteSnapshotResponse {})
    }

    /// Deletes a snapshot, its name, and a retired volume with the last of its snapshots. Repeatable.
    pub(super) async fn remove_snapshot(&self, handle: SnapshotHandle) -> Result<(), Status> {
        let SnapshotHandle { volume, snapshot } = handle;
        let there =
            |record: &VolumeRecord| record.snapshot(snapshot).is_some() || record.request(snapshot).is_some();
        match self.store.read(volume).await {
            Ok(found) if !there(&found.record) => return self.remove_if_bare(volume).await,
            Ok(found) if found.record.deleting => return Ok(()),
            Ok(_) => {}
            Err(StoreError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(from_store(error)),
        }
        self.job(volume, Job::DeleteSnapshot { snapshot }).await?;
        // A target that was replaced and does not know it would say that the snapshot is gone.
        let record = self.change(volume, |record| transitions::forget_request(record, snapshot)).await?;
        if record.snapshot(snapshot).is_some() {
            return Err(Status::aborted(format!("snapshot {handle} is still there; repeat the call")));
        }
        self.remove_if_bare(volume).await
    }

    pub(super) async fn list_snapshots(
        &self,
        request: ListSnapshotsRequest,
    ) -> Result<ListSnapshotsResponse, Status> {
        let size = page_size(request.max_entries)?;
        let groups = self.groups().await?;
        // A filter that cannot be one of our ids fits nothing.
        let of_volume = match request.source_volume_id.as_str() {
            "" => None,
            text => Some(parse_volume_id(text)?),
        };
        let one = match request.snapshot_id.as_str() {
            "" => None,
            text => Some(parse_snapshot(text)?),
        };
        let all = self.store.list().await.map_err(from_store)?;
        let mut found: Vec<(SnapshotHandle, Snapshot)> = Vec::new();
        for record in all.iter().map(|found| &found.record).filter(|record| !record.deleting) {
            let volume = record.volume_id;
            if of_volume.is_some_and(|wanted| wanted != Some(volume)) {
                continue;
            }
            for snapshot in record.committed() {
                let handle = SnapshotHandle { volume, snapshot: snapshot.id };
                if one.is_some_and(|wanted| wanted != Some(handle)) {
                    continue;
                }
                found.extend(to_csi(record, snapshot.id, groups.of(handle)).map(|csi| (handle, csi)));
            }
        }
        let (page, next_token) = page_of(found, &request.starting_token, size)?;
        let entries = page.into_iter().map(|(_, snapshot)| Entry { snapshot: Some(snapshot) }).collect();
        Ok(ListSnapshotsResponse { entries, next_token })
    }

    pub(super) async fn get_snapshot(
        &self,
        request: GetSnapshotRequest,
    ) -> Result<GetSnapshotResponse, Status> {
        let handle = existing_snapshot(&request.snapshot_id)?;
        let snapshot = self.find_snapshot(handle).await?.1;
        Ok(GetSnapshotResponse { snapshot: Some(snapshot) })
    }

    /// A snapshot that counts, with the record of its volume.
    pub(super) async fn find_snapshot(
        &self,
        handle: SnapshotHandle,
    ) -> Result<(VolumeRecord, Snapshot), Status> {
        let absent = || Status::not_found(format!("snapshot_id: there is no snapshot {handle}"));
        let record = match self.store.read(handle.volume).await {
            Ok(found) if found.record.deleting => return Err(absent()),
            Ok(found) => found.record,
            Err(StoreError::NotFound(_)) => return Err(absent()),
            Err(error) => return Err(from_store(error)),
        };
        let groups = self.groups().await?;
        let snapshot = to_csi(&record, handle.snapshot, groups.of(handle)).ok_or_else(absent)?;
        Ok((record, snapshot))
    }

    /// The groups that count.
    pub(super) async fn groups(&self) -> Result<Groups, Status> {
        let all = self.group_store.list_groups().await.map_err(from_store)?;
        let mut by_member = BTreeMap::new();
        for record in all.into_iter().map(|found| found.record) {
            if record.state == GroupState::Committed {
                for (volume, snapshot) in &record.snapshots {
                    let handle = SnapshotHandle { volume: *volume, snapshot: *snapshot };
                    by_member.insert(handle, record.clone());
                }
            }
        }
        Ok(Groups(by_member))
    }
}

fn committed(record: &VolumeRecord, id: SnapshotId) -> bool {
    record.snapshot(id).is_some_and(|snapshot| snapshot.state == SnapshotState::Committed)
}

/// A snapshot as CSI answers it; `None` where it does not count.
pub(super) fn to_csi(record: &VolumeRecord, id: SnapshotId, group: Option<&GroupRecord>) -> Option<Snapshot> {
    // Nothing of a volume with a tombstone may be relied on.
    let snapshot = record.snapshot(id).filter(|_| !record.deleting && committed(record, id))?;
    let by_name = record.request(id).filter(|request| request.for_clone.is_none());
    let asked_unix_ms = group.map(|group| group.asked_unix_ms).or(by_name.map(|r| r.asked_unix_ms))?;
    let group_id: Option<GroupId> = group.map(|group| group.group_id);
    Some(Snapshot {
        size_bytes: i64::try_from(snapshot.size_bytes).unwrap_or(i64::MAX),
        snapshot_id: SnapshotHandle { volume: record.volume_id, snapshot: id }.to_string(),
        source_volume_id: record.volume_id.to_string(),
        creation_time: Some(timestamp(asked_unix_ms)),
        ready_to_use: true,
        group_snapshot_id: group_id.map(|id| id.to_string()).unwrap_or_default(),
        accessible_topology: Vec::new(),
    })
}

pub(super) fn check_parameters<'a>(keys: impl Iterator<Item = &'a String>) -> Result<(), Status> {
    for key in keys {
        if !METADATA_PREFIXES.iter().any(|prefix| key.starts_with(prefix)) {
            return Err(Status::invalid_argument(format!(
                "parameters: key \"{key}\" is unknown; a snapshot has no parameters"
            )));
        }
    }
    Ok(())
}

pub(super) fn timestamp(unix_ms: u64) -> Timestamp {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX);
    let nanos = i32::try_from(unix_ms % 1000).unwrap_or(0) * 1_000_000;
    Timestamp { seconds, nanos }
}

/// Only for people: nothing is decided on it.
pub(super) fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
