//! Objects of kind `Volume`: what people see of the records.
//!
//! Nobody decides anything by them. They are written from the records only, and made anew where somebody changes or deletes
//! them; an object without a record goes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use holdfast_storage_core::ids::VolumeId;
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::StoreError;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::core::ObjectMeta;

use super::client::{CallError, Deadline, KubernetesClient};
use super::objects::{ReplicaStateSpec, ReplicaStatus, Volume, VolumeSpec, VolumeStatus};
use super::store::about_list;
use crate::controller::{ControllerService, VolumeReport};

/// From one look at the records to the next.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(10);
/// Each so many looks the objects are read as well, for what others did to them.
const LOOKS_PER_LISTING: u32 = 30;
/// Objects that are written at a time.
const WRITES_AT_A_TIME: usize = 8;

/// Writes the objects.
pub struct VolumeBoard {
    client: KubernetesClient,
    /// As they were read or written last.
    known: BTreeMap<String, Volume>,
    looks: u32,
}

impl VolumeBoard {
    /// A board at the API server of `client`.
    #[must_use]
    pub fn new(client: KubernetesClient) -> Self {
        Self { client, known: BTreeMap::new(), looks: 0 }
    }

    /// Writes what the controller has to say of its volumes, over and over; it does not end. Cancellation safe. While the API
    /// server is away nothing is written, and it is tried again.
    pub async fn keep_publishing(mut self, controller: ControllerService) {
        loop {
            match controller.reports().await {
                Ok(Some(reports)) => {
                    if let Err(error) = self.publish(&reports).await {
                        tracing::warn!(%error, "not all objects of kind Volume could be written");
                    }
                }
                Ok(None) => {}
                Err(status) => tracing::warn!(%status, "there is no telling how the volumes stand"),
            }
            tokio::time::sleep(PUBLISH_INTERVAL).await;
        }
    }

    /// Makes the objects what the reports say.
    ///
    /// # Errors
    /// The last that could not be written or removed; all others were.
    pub async fn publish(&mut self, reports: &[VolumeReport]) -> Result<(), StoreError> {
        if self.looks.is_multiple_of(LOOKS_PER_LISTING) {
            let objects: Vec<Volume> = self.client.list(Deadline::new()).await.map_err(about_list)?;
            self.known =
                objects.into_iter().map(|o| (o.metadata.name.clone().unwrap_or_default(), o)).collect();
        }
        self.looks = self.looks.wrapping_add(1);
        let mut left = std::mem::take(&mut self.known);
        let changes: Vec<(String, Option<Volume>, Option<Volume>)> = reports
            .iter()
            .map(|report| {
                let name = report.record.volume_id.to_string();
                let old = left.remove(&name);
                let new = to_object(report, old.as_ref());
                (name, old, Some(new))
            })
            .collect();
        let gone = left.into_iter().map(|(name, old)| (name, Some(old), None));
        let client = Arc::new(self.client.clone());
        let written: Vec<_> = futures::stream::iter(changes.into_iter().chain(gone))
            .map(|(name, old, new)| {
                let client = Arc::clone(&client);
                async move {
                    let outcome = write(&client, &name, old.as_ref(), new).await;
                    (name, old, outcome)
                }
            })
            .buffer_unordered(WRITES_AT_A_TIME)
            .collect()
            .await;
        let mut outcome = Ok(());
        for (name, old, answer) in written {
            let object = answer.unwrap_or_else(|error| {
                outcome = Err(about_list(error));
                // What is there is found out at the next look.
                self.looks = 0;
                old
            });
            self.known.extend(object.map(|object| (name, object)));
        }
        outcome
    }
}

/// Brings one object from `old` to `new`; gives what is there then.
async fn write(
    client: &KubernetesClient,
    name: &str,
    old: Option<&Volume>,
    new: Option<Volume>,
) -> Result<Option<Volume>, CallError> {
    let deadline = Deadline::new();
    let Some(new) = new else {
        return match old.map(|old| client.delete(deadline, old)) {
            None => Ok(None),
            Some(removal) => match removal.await {
                Ok(()) | Err(CallError::Missing) => Ok(None),
                Err(error) => Err(error),
            },
        };
    };
    let mut written = old.cloned();
    if old.is_none_or(|old| old.spec != new.spec) {
        let wanted = Volume { status: None, ..new.clone() };
        written = Some(client.apply(deadline, name, &wanted).await?);
    }
    if old.is_none_or(|old| old.status != new.status) {
        written = Some(client.apply_status(deadline, name, &new).await?);
    }
    Ok(written)
}

fn to_object(report: &VolumeReport, old: Option<&Volume>) -> Volume {
    let record = &report.record;
    let since = |kind: &str, status: &str| {
        let conditions = old.and_then(|old| old.status.as_ref()).map(|status| &status.conditions);
        let same = conditions.into_iter().flatten().find(|c| c.type_ == kind && c.status == status);
        same.map_or_else(|| whole_second(Timestamp::now()), |c| c.last_transition_time.clone())
    };
    let conditions = report.conditions.iter().map(|condition| {
        let status = if condition.holds { "True" } else { "False" };
        Condition {
            type_: condition.kind.to_owned(),
            status: status.to_owned(),
            reason: condition.reason.to_owned(),
            message: condition.message.clone(),
            last_transition_time: since(condition.kind, status),
            observed_generation: None,
        }
    });
    let status = VolumeStatus {
        state: report.state.to_string(),
        in_sync: format!("{}/{}", record.in_sync.len(), record.params.replicas),
        attached_to: record.attached_to.as_ref().map(|node| node.0.clone()),
        snapshots: i64::try_from(record.committed().count()).unwrap_or(i64::MAX),
        replicas: replicas(record),
        conditions: conditions.collect(),
    };
    let spec = VolumeSpec {
        name: record.name.clone(),
        size: quantity(record.size_bytes),
        replicas: i64::from(record.params.replicas),
        fs_type: record.params.fs_type.clone(),
    };
    let metadata = ObjectMeta { name: Some(name_of(record.volume_id)), ..ObjectMeta::default() };
    Volume { metadata, spec, status: Some(status) }
}

fn name_of(volume: VolumeId) -> String {
    volume.to_string()
}

fn replicas(record: &VolumeRecord) -> Vec<ReplicaStatus> {
    let state = |state: &ReplicaState| match state {
        ReplicaState::InSync => ReplicaStateSpec::InSync,
        ReplicaState::Offline { .. } => ReplicaStateSpec::Offline,
        ReplicaState::Faulted => ReplicaStateSpec::Faulted,
    };
    let each = record.replicas.iter().map(|(id, replica)| ReplicaStatus {
        id: id.to_string(),
        node: replica.node.0.clone(),
        state: state(&replica.state),
    });
    each.collect()
}

/// As the API server gives it back.
fn whole_second(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

/// In the largest binary unit that divides it.
fn quantity(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["", "Ki", "Mi", "Gi", "Ti"];
    let steps = (bytes.trailing_zeros() / 10).min(4);
    let unit = UNITS.get(steps as usize).copied().unwrap_or_default();
    format!("{}{unit}", bytes >> (10 * steps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_as_kubernetes_writes_them() {
        for (bytes, text) in
            [(1, "1"), (16 << 20, "16Mi"), (1536 << 20, "1536Mi"), (10 << 30, "10Gi"), (1 << 50, "1024Ti")]
        {
            assert_eq!(quantity(bytes), text);
        }
    }
}
