//! Records of group snapshots as objects of kind `SnapshotGroup`.
//!
//! The version is the object's `resourceVersion`, which API servers write as a number that no object ever has twice, also
//! not one that is made again. A label moves it too: the coordinator then reads again and goes on. Where the server says
//! that the object moved, the writer looks whether it was its own change, which it signed (`swapId`).

use holdfast_storage_core::group::{GROUP_FORMAT, GroupRecord, GroupState, VersionedGroup};
use holdfast_storage_core::ids::{GroupId, RecordVersion};
use holdfast_storage_core::record_store::{GroupStore, StoreError, StoreFuture};

use super::client::{CallError, Deadline};
use super::convert::{counter, id, number, small};
use super::objects::{GroupStateSpec, SnapshotGroup, SnapshotGroupSpec};
use super::store::{KubernetesStore, about_list};

impl KubernetesStore {
    async fn group(&self, deadline: Deadline, group: GroupId) -> Result<Option<SnapshotGroup>, StoreError> {
        match self.client.get(deadline, &group.to_string()).await {
            Ok(object) => Ok(Some(object)),
            Err(CallError::Missing) => Ok(None),
            Err(error) => Err(about_list(error)),
        }
    }

    async fn list_groups_now(&self) -> Result<Vec<VersionedGroup>, StoreError> {
        let objects: Vec<SnapshotGroup> = self.client.list(Deadline::new()).await.map_err(about_list)?;
        objects.iter().map(versioned).collect()
    }

    async fn swap_group_now(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<GroupRecord>,
    ) -> Result<RecordVersion, StoreError> {
        let (deadline, name) = (Deadline::new(), group.to_string());
        let Some(record) = record else {
            return self.remove_group(deadline, group, expected).await;
        };
        let mut object = SnapshotGroup::new(&name, to_spec(&record)?);
        object.metadata.resource_version = expected.map(|version| version.to_string());
        let stored = match expected {
            None => self.client.post(deadline, &name, &object).await,
            Some(_) => self.client.put(deadline, &name, &object).await,
        };
        match stored {
            Ok(stored) if stored.spec == object.spec => version_of(&stored),
            Ok(_) => Err(StoreError::Unknown(format!(
                "the API server stored something else than the record of group {group}: install the definitions of this \
                 release"
            ))),
            Err(CallError::Taken | CallError::Moved | CallError::Missing) => {
                let found = self.group(deadline, group).await?;
                let own = found.filter(|found| found.spec.swap_id == object.spec.swap_id);
                own.map_or(Err(StoreError::GroupConflict(group)), |found| version_of(&found))
            }
            Err(error) => Err(about_list(error)),
        }
    }

    async fn remove_group(
        &self,
        deadline: Deadline,
        group: GroupId,
        expected: Option<RecordVersion>,
    ) -> Result<RecordVersion, StoreError> {
        let found = self.group(deadline, group).await?;
        if found.as_ref().map(version_of).transpose()? != expected {
            return Err(StoreError::GroupConflict(group));
        }
        let (Some(object), Some(version)) = (found, expected) else {
            return Ok(RecordVersion(0));
        };
        match self.client.delete(deadline, &object).await {
            Ok(()) => Ok(version),
            Err(CallError::Moved | CallError::Missing | CallError::Taken) => {
                Err(StoreError::GroupConflict(group))
            }
            Err(error) => Err(about_list(error)),
        }
    }
}

impl GroupStore for KubernetesStore {
    fn read_group(&self, group: GroupId) -> StoreFuture<'_, Option<VersionedGroup>> {
        Box::pin(async move { self.group(Deadline::new(), group).await?.as_ref().map(versioned).transpose() })
    }

    fn list_groups(&self) -> StoreFuture<'_, Vec<VersionedGroup>> {
        Box::pin(self.list_groups_now())
    }

    fn swap_group(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<GroupRecord>,
    ) -> StoreFuture<'_, RecordVersion> {
        Box::pin(self.swap_group_now(group, expected, record))
    }
}

fn version_of(object: &SnapshotGroup) -> Result<RecordVersion, StoreError> {
    let text = object.metadata.resource_version.as_deref().unwrap_or_default();
    let number = text.parse().map_err(|_| {
        StoreError::Refused(format!(
            "the API server's resourceVersion \"{text}\" is no number, as groups need it"
        ))
    })?;
    Ok(RecordVersion(number))
}

fn versioned(object: &SnapshotGroup) -> Result<VersionedGroup, StoreError> {
    Ok(VersionedGroup { version: version_of(object)?, record: from_spec(object)? })
}

fn to_spec(record: &GroupRecord) -> Result<SnapshotGroupSpec, StoreError> {
    let GroupRecord { format, group_id, name, asked_unix_ms, snapshots, state } = record;
    Ok(SnapshotGroupSpec {
        swap_id: format!("{:032x}", rand::random::<u128>()),
        format: i64::from(*format),
        group_id: group_id.to_string(),
        name: name.clone(),
        asked_unix_ms: number("asked_unix_ms", *asked_unix_ms)?,
        snapshots: snapshots
            .iter()
            .map(|(volume, snapshot)| (volume.to_string(), snapshot.to_string()))
            .collect(),
        state: match state {
            GroupState::Holding => GroupStateSpec::Holding,
            GroupState::Cutting => GroupStateSpec::Cutting,
            GroupState::Committed => GroupStateSpec::Committed,
            GroupState::Abandoned => GroupStateSpec::Abandoned,
        },
    })
}

fn from_spec(object: &SnapshotGroup) -> Result<GroupRecord, StoreError> {
    let spec = &object.spec;
    if spec.format > i64::from(GROUP_FORMAT) {
        return Err(StoreError::Refused(format!(
            "the record of group {} has format {}, this program knows up to {GROUP_FORMAT}: use the newer program",
            spec.group_id, spec.format
        )));
    }
    Ok(GroupRecord {
        format: small("format", spec.format)?,
        group_id: id("groupId", &spec.group_id)?,
        name: spec.name.clone(),
        asked_unix_ms: counter("askedUnixMs", spec.asked_unix_ms)?,
        snapshots: spec
            .snapshots
            .iter()
            .map(|(volume, snapshot)| Ok((id("snapshots", volume)?, id("snapshots", snapshot)?)))
            .collect::<Result<_, _>>()?,
        state: match spec.state {
            GroupStateSpec::Holding => GroupState::Holding,
            GroupStateSpec::Cutting => GroupState::Cutting,
            GroupStateSpec::Committed => GroupState::Committed,
            GroupStateSpec::Abandoned => GroupState::Abandoned,
        },
    })
}
