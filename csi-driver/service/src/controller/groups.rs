//! CSI GroupController: snapshots of several volumes, all of one instant (R29).
//!
//! The coordinator is `holdfast_storage_core::group`; here it is driven: its record lives in the `GroupStore`, its members
//! are asked over their data processes. A member that is attached holds its writes at its target. One that is attached to
//! nobody has no writer: its hold is the attachment number that its record has, and its cut counts only if the record still
//! has that number and no node afterwards, since every client needs a publish, which counts it up.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use holdfast_proto::csi::group_controller_server::GroupController;
use holdfast_proto::csi::group_controller_service_capability::{Rpc, Type, rpc};
use holdfast_proto::csi::*;
use holdfast_storage_core::group::{
    Group, GroupAction, GroupConfig, GroupError, GroupEvent, GroupRecord, GroupState, GroupStoreError,
    GroupTask, MemberError,
};
use holdfast_storage_core::ids::{Attachment, GroupId, SnapshotId, VolumeId};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::target::{Job, JobError};
use holdfast_storage_core::timers;
use tonic::{Code, Request, Response, Status};

use super::snapshots::{check_parameters, now_unix_ms, timestamp, to_csi};
use super::{ControllerService, Inner};
use crate::in_flight::detached;
use crate::status::from_store;
use crate::volume_request::{check_name, existing_volume_id_in};

/// For how long the members' writes wait at most; no write fails by it.
const GROUP_HOLD_MS: u64 = 5_000;
/// A field of Kubernetes' VolumeGroupSnapshotClass, which is its snapshot controller's to heed. Kubernetes' own suite for drivers writes it
/// among the driver's parameters as well, where it says nothing new.
const DELETION_POLICY: &str = "deletionPolicy";

#[tonic::async_trait]
impl GroupController for ControllerService {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<GroupControllerGetCapabilitiesResponse>, Status> {
        let r#type = rpc::Type::CreateDeleteGetVolumeGroupSnapshot.into();
        let capabilities = vec![GroupControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type })) }];
        Ok(Response::new(GroupControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<CreateVolumeGroupSnapshotResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.create_group(request.into_inner()).await }).await.map(Response::new)
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<DeleteVolumeGroupSnapshotResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        detached(async move { inner.delete_group(request.into_inner()).await }).await.map(Response::new)
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<GetVolumeGroupSnapshotResponse>, Status> {
        self.inner.get_group(request.into_inner()).await.map(Response::new)
    }
}

impl Inner {
    async fn create_group(
        &self,
        request: CreateVolumeGroupSnapshotRequest,
    ) -> Result<CreateVolumeGroupSnapshotResponse, Status> {
        check_name(&request.name)?;
        check_parameters(request.parameters.keys().filter(|key| *key != DELETION_POLICY))?;
        if request.source_volume_ids.is_empty() {
            return Err(Status::invalid_argument("source_volume_ids is missing"));
        }
        if request.source_volume_ids.len() > timers::GROUP_MEMBERS_MAX {
            let sentence = format!("source_volume_ids: more than {} volumes", timers::GROUP_MEMBERS_MAX);
            return Err(Status::invalid_argument(sentence));
        }
        let mut members = BTreeMap::new();
        for text in &request.source_volume_ids {
            let volume = existing_volume_id_in("source_volume_ids", text)?;
            if members.insert(volume, SnapshotId(rand::random())).is_some() {
                let sentence = format!("source_volume_ids: volume {volume} is named twice");
                return Err(Status::invalid_argument(sentence));
            }
        }
        let _by_name = self.in_flight.begin(format!("the group snapshot named \"{}\"", request.name))?;
        let all = self.group_store.list_groups().await.map_err(from_store)?;
        let found = all.into_iter().map(|found| found.record).find(|record| record.name == request.name);
        if let Some(found) = &found
            && found.state == GroupState::Committed
        {
            if !found.snapshots.keys().eq(members.keys()) {
                return Err(Status::already_exists(format!(
                    "a group snapshot named \"{}\" exists already, of other volumes",
                    request.name
                )));
            }
            return self
                .answer(found)
                .await
                .map(|group| CreateVolumeGroupSnapshotResponse { group_snapshot: Some(group) });
        }
        for volume in members.keys() {
            self.live(*volume).await?;
        }
        let group_id = found.map_or_else(|| GroupId(rand::random()), |found| found.group_id);
        let task = GroupTask::Create(members);
        self.coordinate(group_id, request.name, task).await?;
        let record = self.read_group(group_id).await?;
        let record = record.filter(|record| record.state == GroupState::Committed).ok_or_else(|| {
            Status::aborted(format!("group snapshot {group_id} was deleted meanwhile; repeat the call"))
        })?;
        tracing::info!(group = %group_id, volumes = record.snapshots.len(), "group snapshot taken");
        Ok(CreateVolumeGroupSnapshotResponse { group_snapshot: Some(self.answer(&record).await?) })
    }

    async fn delete_group(
        &self,
        request: DeleteVolumeGroupSnapshotRequest,
    ) -> Result<DeleteVolumeGroupSnapshotResponse, Status> {
        let done = DeleteVolumeGroupSnapshotResponse {};
        let Some(group_id) = parse_group(&request.group_snapshot_id)? else { return Ok(done) };
        let _by_id = self.in_flight.begin(format!("group snapshot {group_id}"))?;
        let Some(record) = self.read_group(group_id).await? else { return Ok(done) };
        check_members(&record, &request.snapshot_ids)?;
        self.forget_group(&record).await?;
        tracing::info!(group = %group_id, "group snapshot deleted");
        Ok(done)
    }

    async fn get_group(
        &self,
        request: GetVolumeGroupSnapshotRequest,
    ) -> Result<GetVolumeGroupSnapshotResponse, Status> {
        let absent = || {
            let shown: String = request.group_snapshot_id.chars().take(64).collect();
            Status::not_found(format!("group_snapshot_id: there is no group snapshot \"{shown}\""))
        };
        let group_id = parse_group(&request.group_snapshot_id)?.ok_or_else(absent)?;
        let record = self.read_group(group_id).await?;
        let record = record.filter(|record| record.state == GroupState::Committed).ok_or_else(absent)?;
        check_members(&record, &request.snapshot_ids)?;
        Ok(GetVolumeGroupSnapshotResponse { group_snapshot: Some(self.answer(&record).await?) })
    }

    /// Deletes the snapshots of a group, then its record, then retired volumes that only it had kept.
    pub(super) async fn forget_group(&self, record: &GroupRecord) -> Result<(), Status> {
        let Ok(_by_name) = self.in_flight.begin(format!("the group snapshot named \"{}\"", record.name))
        else {
            return Err(Status::aborted(format!(
                "another call for the group snapshot \"{}\" is still under way; repeat later",
                record.name
            )));
        };
        self.coordinate(record.group_id, record.name.clone(), GroupTask::Delete).await?;
        for volume in record.snapshots.keys() {
            self.remove_if_bare(*volume).await?;
        }
        Ok(())
    }

    async fn read_group(&self, group: GroupId) -> Result<Option<GroupRecord>, Status> {
        let found = self.group_store.read_group(group).await.map_err(from_store)?;
        Ok(found.map(|found| found.record))
    }

    async fn answer(&self, record: &GroupRecord) -> Result<VolumeGroupSnapshot, Status> {
        let mut snapshots = Vec::new();
        for (volume, snapshot) in &record.snapshots {
            let found = self.store.read(*volume).await.map_err(from_store)?.record;
            snapshots.push(to_csi(&found, *snapshot, Some(record)).ok_or_else(|| {
                Status::internal(format!(
                    "group snapshot {} lacks its snapshot of volume {volume}: it was deleted behind the driver's back",
                    record.group_id
                ))
            })?);
        }
        Ok(VolumeGroupSnapshot {
            group_snapshot_id: record.group_id.to_string(),
            snapshots,
            creation_time: Some(timestamp(record.asked_unix_ms)),
            ready_to_use: true,
        })
    }

    /// Drives one start of a coordinator to its end.
    async fn coordinate(&self, group_id: GroupId, name: String, task: GroupTask) -> Result<(), Status> {
        let start = Instant::now();
        let now_ms = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let config =
            GroupConfig { group_id, name, asked_unix_ms: now_unix_ms(), task, hold_ms: GROUP_HOLD_MS };
        let mut group = Group::new(now_ms(), config);
        let holds = DetachedHolds::default();
        let mut calls = FuturesUnordered::new();
        loop {
            while let Some(action) = group.poll_action() {
                if let GroupAction::Done { result } = action {
                    return result.map(drop).map_err(|error| group_status(&error));
                }
                calls.push(self.carry_out(group_id, action, &holds));
            }
            let wait_ms = group.next_timeout().map(|at_ms| at_ms.saturating_sub(now_ms()));
            let tick = async {
                match wait_ms {
                    Some(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                Some(event) = calls.next(), if !calls.is_empty() => event,
                () = tick => GroupEvent::Tick,
            };
            group.handle_event(now_ms(), event);
        }
    }

    async fn carry_out(&self, group_id: GroupId, action: GroupAction, holds: &DetachedHolds) -> GroupEvent {
        match action {
            GroupAction::ReadRecord { call } => {
                let result = self.group_store.read_group(group_id).await.map_err(store_error);
                GroupEvent::RecordRead { call, result }
            }
            GroupAction::Swap { call, expected, record } => {
                let result = self.group_store.swap_group(group_id, expected, record).await;
                GroupEvent::SwapAnswered { call, result: result.map_err(store_error) }
            }
            GroupAction::Ask { call, volume, what } => {
                let limit = Duration::from_millis(timers::GROUP_ANSWER_MS);
                let answer = tokio::time::timeout(limit, self.ask_member(volume, what, holds)).await;
                let result = answer.unwrap_or(Err(MemberError::Silent));
                GroupEvent::Answered { call, result }
            }
            // The caller takes it.
            GroupAction::Done { .. } => GroupEvent::Tick,
        }
    }

    async fn ask_member(
        &self,
        volume: VolumeId,
        what: Job,
        holds: &DetachedHolds,
    ) -> Result<(), MemberError> {
        let record = match self.store.read(volume).await {
            Ok(found) => found.record,
            // A volume without a record has no snapshots and no writer to hold.
            Err(StoreError::NotFound(_))
                if matches!(what, Job::DeleteSnapshot { .. } | Job::Release { .. }) =>
            {
                return Ok(());
            }
            Err(_) => return Err(MemberError::Silent),
        };
        match what {
            Job::Hold { .. } if record.attached_to.is_none() => {
                holds.set(volume, record.attachment);
                Ok(())
            }
            Job::Cut { snapshot } if holds.get(volume).is_some() => {
                let held = holds.get(volume);
                self.member_job(volume, Job::CreateSnapshot { snapshot }).await?;
                let after = self.store.read(volume).await.map_err(|_| MemberError::Silent)?.record;
                // A client came in between: what it wrote may be in the cut.
                if Some(after.attachment) != held || after.attached_to.is_some() {
                    return Err(MemberError::Refused(JobError::HoldOver));
                }
                Ok(())
            }
            Job::Release { .. } if holds.get(volume).is_some() => Ok(()),
            Job::DeleteSnapshot { snapshot } => {
                self.member_job(volume, what).await?;
                match self.store.read(volume).await {
                    Ok(found) if found.record.snapshot(snapshot).is_some() => Err(MemberError::Silent),
                    Ok(_) | Err(StoreError::NotFound(_)) => Ok(()),
                    Err(_) => Err(MemberError::Silent),
                }
            }
            _ => self.member_job(volume, what).await,
        }
    }

    async fn member_job(&self, volume: VolumeId, what: Job) -> Result<(), MemberError> {
        self.job(volume, what).await.map_err(|status| {
            tracing::info!(%volume, %status, "a member of a group snapshot did not do its part");
            match status.code() {
                Code::FailedPrecondition => MemberError::Refused(JobError::HoldOver),
                Code::Aborted => MemberError::Refused(JobError::Busy),
                _ => MemberError::Silent,
            }
        })
    }
}

/// The members that nobody is attached to, with the attachment number at their hold.
#[derive(Default)]
struct DetachedHolds(Mutex<HashMap<VolumeId, Attachment>>);

impl DetachedHolds {
    fn set(&self, volume: VolumeId, attachment: Attachment) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(volume, attachment);
    }

    fn get(&self, volume: VolumeId) -> Option<Attachment> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&volume).copied()
    }
}

/// `None` for everything that cannot be the id of a group of ours.
fn parse_group(text: &str) -> Result<Option<GroupId>, Status> {
    if text.is_empty() {
        return Err(Status::invalid_argument("group_snapshot_id is missing"));
    }
    Ok(text.parse().ok())
}

/// A caller that names members must name those of the group.
fn check_members(record: &GroupRecord, named: &[String]) -> Result<(), Status> {
    let member = |text: &String| {
        record.snapshots.iter().any(|(volume, snapshot)| *text == format!("{volume}@{snapshot}"))
    };
    match named.iter().find(|text| !member(text)) {
        None => Ok(()),
        Some(text) => {
            let shown: String = text.chars().take(80).collect();
            Err(Status::invalid_argument(format!(
                "snapshot_ids: \"{shown}\" does not belong to the group snapshot {}",
                record.group_id
            )))
        }
    }
}

fn store_error(error: StoreError) -> GroupStoreError {
    match error {
        StoreError::GroupConflict(_) => GroupStoreError::Conflict,
        other => GroupStoreError::Unknown(other.to_string()),
    }
}

fn group_status(error: &GroupError) -> Status {
    let sentence = error.to_string();
    match error {
        GroupError::Size(_) => Status::invalid_argument(sentence),
        GroupError::Format(_) => Status::internal(sentence),
        GroupError::OtherMembers => Status::already_exists(sentence),
        GroupError::TakenOver => Status::aborted(sentence),
        GroupError::Member { error: MemberError::Refused(_), .. } => {
            Status::aborted(format!("{sentence}; repeat the call"))
        }
        GroupError::Member { error: MemberError::Silent, .. } | GroupError::Store(_) => {
            Status::unavailable(format!("{sentence}; repeat the call"))
        }
    }
}
