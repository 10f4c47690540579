//! The kinds of group `storage.holdfast.dev`, as the API server keeps them. Their definitions in `manifests/crds/storage` are
//! generated from here.
//!
//! Kubernetes' JSON has no integers beyond 63 bits: the API server would round a nonce that is a number, so nonces and ids
//! are hexadecimal text. Every list and map has a bound, without which the API server cannot bound the cost of the rules.

// Each column of a kind's table has a type and a path of its own.
#![allow(clippy::duplicated_attributes)]

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many of the last changes sign a record; a writer that meets more others than that cannot know its own change again.
pub(crate) const SWAP_IDS: usize = 8;

/// The definitions of all kinds, to be installed before a process uses them.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![Volume::crd(), VolumeRecord::crd(), VolumeName::crd(), SnapshotGroup::crd(), StorageNode::crd()]
}

/// What a [`VolumeRecord`] holds: the volume's record, and what a swap of it needs.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[kube(
    group = "storage.holdfast.dev",
    version = "v1alpha1",
    kind = "VolumeRecord",
    plural = "volumerecords",
    derive = "PartialEq",
    doc = "The record of a volume: who may write, who holds every acknowledged write. Only Holdfast changes it.",
    printcolumn(name = "Volume", type_ = "string", json_path = ".spec.name"),
    printcolumn(name = "Attached", type_ = "string", json_path = ".spec.attachedTo"),
    printcolumn(name = "Epoch", type_ = "integer", json_path = ".spec.epoch.number"),
    printcolumn(name = "Generation", type_ = "integer", json_path = ".spec.generation"),
    printcolumn(name = "Version", type_ = "integer", json_path = ".spec.version"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.version == oldSelf.version + 1 || self == oldSelf")
        .message("each change counts version up by one: records are changed by Holdfast only"),
    validation = Rule::new("self.name == oldSelf.name && self.volumeId == oldSelf.volumeId")
        .message("a volume is not renamed"),
    validation = Rule::new("self.generation >= oldSelf.generation && self.attachment >= oldSelf.attachment")
        .message("generation and attachment never go back"),
    validation = Rule::new("(self.deleting || !oldSelf.deleting) && (self.retired || !oldSelf.retired)")
        .message("a deletion is never taken back"),
    validation = Rule::new("has(self.encryption) == has(oldSelf.encryption)")
        .message("a volume is encrypted from its first day, or never"),
    validation = Rule::new(
        "!has(oldSelf.encryption) || !has(self.encryption) || (self.encryption.salt == oldSelf.encryption.salt && \
         (!has(oldSelf.encryption.keyCheck) || self.encryption == oldSelf.encryption))"
    )
    .message("salt and key check are never changed"),
    validation = Rule::new("oldSelf.pending || !self.pending").message("what exists is not unmade"),
    validation = Rule::new("self.inSync.all(r, r in self.replicas)").message("inSync names replicas only"),
    validation = Rule::new("self.replicas.all(r, r.matches('^[0-9a-f]{32}$'))").message("replicas are keyed by their ids")
)]
pub(crate) struct VolumeRecordSpec {
    /// +1 at each change of this spec; 0 while pending.
    #[schemars(range(min = 0))]
    pub version: i64,
    /// Drawn at random by each of the last changes, newest last: by it a writer knows its own change again.
    #[schemars(length(min = 1, max = 8), inner(length(max = 32)))]
    pub swap_ids: Vec<String>,
    /// Not yet a volume: its name is still being reserved.
    pub pending: bool,
    /// Version of the record's own shape.
    #[schemars(range(min = 0))]
    pub format: i64,
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub volume_id: String,
    /// The name CreateVolume was called with.
    #[schemars(length(min = 1, max = 128))]
    pub name: String,
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub lineage: String,
    #[schemars(range(min = 1))]
    pub size_bytes: i64,
    #[schemars(range(min = 0))]
    pub attachment: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub attached_to: Option<String>,
    pub read_only: bool,
    #[schemars(range(min = 0))]
    pub generation: i64,
    #[schemars(range(min = 0))]
    pub generation_attachment: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub target_id: Option<String>,
    pub epoch: EpochSpec,
    /// Replicas that hold every acknowledged write.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "set"), inner(length(max = 32)))]
    pub in_sync: Vec<String>,
    #[schemars(extend("maxProperties" = 64))]
    pub replicas: BTreeMap<String, ReplicaSpec>,
    /// Oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub snapshots: Vec<SnapshotSpec>,
    /// Snapshots that somebody asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 200))]
    pub requested: Vec<RequestedSpec>,
    /// Deleted while it had snapshots.
    #[serde(default)]
    pub retired: bool,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceSpec>,
    #[serde(default)]
    pub restored: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promoted: Option<PromotionSpec>,
    pub formatted: FormattedSpec,
    /// Of an encrypted volume: what makes its key from a secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<EncryptionSpec>,
    pub deleting: bool,
    pub params: ParamsSpec,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub(crate) struct EpochSpec {
    #[schemars(range(min = 0))]
    pub number: i64,
    #[schemars(regex(pattern = r"^[0-9a-f]{16}$"))]
    pub nonce: String,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ReplicaSpec {
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    pub state: ReplicaStateSpec,
    /// Of a replica that is offline: the last epoch under which it was a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_epoch: Option<EpochSpec>,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplicaStateSpec {
    InSync,
    Offline,
    Faulted,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SnapshotSpec {
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub id: String,
    /// Of a snapshot that is being cut: whose target cuts it. None once it counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub cutting_generation: Option<i64>,
    #[schemars(range(min = 1))]
    pub size_bytes: i64,
    #[schemars(length(max = 64), inner(length(max = 32)))]
    pub holders: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4096), inner(length(max = 32)))]
    pub clones: Vec<String>,
    /// How far formatting had gone at the cut.
    pub formatted: FormattedSpec,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RequestedSpec {
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub id: String,
    #[schemars(length(max = 128))]
    pub name: String,
    #[schemars(range(min = 0))]
    pub asked_unix_ms: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub for_clone: Option<String>,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SourceSpec {
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub volume: String,
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub snapshot: String,
    pub of_volume: bool,
    pub linked: bool,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub(crate) struct PromotionSpec {
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub replica: String,
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub from: String,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FormattedSpec {
    Never,
    Formatting,
    Yes,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ParamsSpec {
    #[schemars(range(min = 0))]
    pub replicas: i64,
    #[schemars(length(max = 32))]
    pub fs_type: String,
    #[schemars(range(min = 0))]
    pub min_in_sync: i64,
    /// What its clients may do per second; 0 is no limit.
    #[serde(default)]
    pub limits: LimitsSpec,
    /// How fast its background work goes.
    #[serde(default)]
    pub background: BackgroundSpec,
    /// Where its replicas may be.
    #[serde(default)]
    pub placement: PlacementSpec,
    #[serde(default)]
    pub front_end: FrontEndSpec,
    #[serde(default)]
    pub encryption: EncryptionKindSpec,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum EncryptionKindSpec {
    #[default]
    None,
    AesXts,
}

/// Of an encrypted volume; nothing in it is secret.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EncryptionSpec {
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub salt: String,
    /// By it the volume's key is known; set by the first stage, for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub key_check: Option<String>,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum FrontEndSpec {
    #[default]
    Auto,
    FuseLoop,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PlacementSpec {
    #[serde(default)]
    pub zones: ZoneRuleSpec,
    #[serde(default)]
    pub local_replica: LocalReplicaSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub pool_class: Option<String>,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ZoneRuleSpec {
    #[default]
    Preferred,
    Required,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LocalReplicaSpec {
    #[default]
    Preferred,
    Required,
    None,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BackgroundSpec {
    /// Seconds between the beginnings of two passes of the scrub; 0 is never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub scrub_interval_s: Option<i64>,
    /// Most bytes per second that are copied to a returning replica; 0 is no limit.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub resync_bytes_per_s: i64,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LimitsSpec {
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub iops: i64,
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub bytes_per_s: i64,
}

impl VolumeRecordSpec {
    /// Whether its name is free for another volume, for ever.
    pub(crate) fn is_gone(&self) -> bool {
        self.deleting || self.retired
    }

    /// Whether `change` is one of the last changes that made this spec what it is.
    pub(crate) fn holds(&self, change: &Self) -> bool {
        change.swap_ids.last().is_some_and(|own| self.swap_ids.contains(own))
    }
}

/// Whose a volume's name is. The object's own name is made from it, so there is one for each name.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[kube(
    group = "storage.holdfast.dev",
    version = "v1alpha1",
    kind = "VolumeName",
    plural = "volumenames",
    derive = "PartialEq",
    doc = "Reserves the name of a volume for one volume. Only Holdfast changes it.",
    printcolumn(name = "Volume", type_ = "string", json_path = ".spec.name"),
    printcolumn(name = "Id", type_ = "string", json_path = ".spec.volumeId")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.name == oldSelf.name").message("a name is not renamed"))]
pub(crate) struct VolumeNameSpec {
    #[schemars(length(min = 1, max = 128))]
    pub name: String,
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub volume_id: String,
    /// Drawn at random by each reservation, so that none leaves the object as it was.
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub claim: String,
}

/// A group of snapshots of one instant, or on its way there.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[kube(
    group = "storage.holdfast.dev",
    version = "v1alpha1",
    kind = "SnapshotGroup",
    plural = "snapshotgroups",
    derive = "PartialEq",
    doc = "A group of snapshots of several volumes, all of one instant. Only Holdfast changes it.",
    printcolumn(name = "Group", type_ = "string", json_path = ".spec.name"),
    printcolumn(name = "State", type_ = "string", json_path = ".spec.state"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.groupId == oldSelf.groupId").message("a group keeps its id"))]
pub(crate) struct SnapshotGroupSpec {
    /// Drawn at random by each change: by it a writer knows its own change again.
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub swap_id: String,
    /// Version of the record's own shape.
    #[schemars(range(min = 0))]
    pub format: i64,
    #[schemars(regex(pattern = r"^[0-9a-f]{32}$"))]
    pub group_id: String,
    /// The name CreateVolumeGroupSnapshot was called with.
    #[schemars(length(max = 128))]
    pub name: String,
    #[schemars(range(min = 0))]
    pub asked_unix_ms: i64,
    /// The snapshot of each volume.
    #[schemars(extend("maxProperties" = 1024))]
    pub snapshots: BTreeMap<String, String>,
    pub state: GroupStateSpec,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GroupStateSpec {
    Holding,
    Cutting,
    Committed,
    Abandoned,
}

/// Where a node's data process is reached.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "storage.holdfast.dev",
    version = "v1alpha1",
    kind = "StorageNode",
    plural = "storagenodes",
    derive = "PartialEq",
    doc = "A node that runs a data process, as that process announces it.",
    printcolumn(name = "State", type_ = "string", json_path = ".spec.state"),
    printcolumn(name = "Control", type_ = "string", json_path = ".spec.controlAddress"),
    printcolumn(name = "Capacity", type_ = "integer", json_path = ".spec.capacityBytes"),
    printcolumn(name = "Available", type_ = "integer", json_path = ".spec.availableBytes"),
    printcolumn(name = "Announced", type_ = "date", json_path = ".spec.announcedAt")
)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StorageNodeSpec {
    #[schemars(length(min = 1, max = 300))]
    pub control_address: String,
    #[schemars(length(min = 1, max = 300))]
    pub nbd_address: String,
    #[schemars(range(min = 0))]
    pub capacity_bytes: i64,
    #[schemars(range(min = 0))]
    pub available_bytes: i64,
    /// The zone it stands in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub zone: Option<String>,
    /// The class of its pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub pool_class: Option<String>,
    /// Most volumes that may be attached to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub volumes_max: Option<u32>,
    /// What an operator decided about it: Draining or Removed; none: Active. The node never writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<NodeStateSpec>,
    /// The node's own clock; others look at its changes, never at its value.
    pub announced_at: Time,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeStateSpec {
    Active,
    Draining,
    Removed,
}

/// A volume for people: written from its record by the controller, read by nobody of us but to be compared.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[kube(
    group = "storage.holdfast.dev",
    version = "v1alpha1",
    kind = "Volume",
    plural = "volumes",
    status = "VolumeStatus",
    derive = "PartialEq",
    doc = "A volume as it was asked for and as it stands. Holdfast writes it; changes here change nothing.",
    printcolumn(name = "Volume", type_ = "string", json_path = ".spec.name"),
    printcolumn(name = "Size", type_ = "string", json_path = ".spec.size"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "In Sync", type_ = "string", json_path = ".status.inSync"),
    printcolumn(name = "Attached", type_ = "string", json_path = ".status.attachedTo"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Waits For",
        type_ = "string",
        json_path = r#".status.conditions[?(@.status=="False")].message"#,
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VolumeSpec {
    /// The name CreateVolume was called with.
    #[schemars(length(max = 128))]
    pub name: String,
    /// As a Kubernetes quantity.
    #[schemars(length(max = 32))]
    pub size: String,
    #[schemars(range(min = 0))]
    pub replicas: i64,
    /// Empty for raw block.
    #[schemars(length(max = 32))]
    pub fs_type: String,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VolumeStatus {
    /// Healthy, Degraded, Inaccessible, Retired or Deleting.
    pub state: String,
    /// Members of the in-sync set of wanted replicas, as in 2/3.
    pub in_sync: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached_to: Option<String>,
    /// Snapshots that count.
    pub snapshots: i64,
    #[schemars(length(max = 64))]
    pub replicas: Vec<ReplicaStatus>,
    /// Accessible, Redundant, Converged.
    #[schemars(length(max = 8))]
    pub conditions: Vec<Condition>,
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReplicaStatus {
    pub id: String,
    pub node: String,
    pub state: ReplicaStateSpec,
}
