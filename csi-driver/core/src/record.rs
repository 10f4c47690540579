//! The volume's record: the one object that decides who may write and who holds every acknowledged write.
//!
//! It is changed by compare-and-swap only (see [`crate::record_store`]); the functions here are pure: record in,
//! record out.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::background::Background;
use crate::encryption::{Encryption, EncryptionKind};
use crate::ids::{
    Attachment, Epoch, Generation, Lineage, NodeName, ReplicaId, SnapshotId, TargetId, VolumeId,
};
use crate::io_limits::IoLimits;
use crate::placement::PlacementRules;

/// Version of the record's own shape; a reader refuses a later one, as it would drop what it does not know at its next
/// swap. Version 2 adds the snapshots, version 3 `restored` and `promoted`, version 4 `requested`, `retired` and `source`, version
/// 5 the limits of I/O, version 6 the pace of background work, the rules of
/// placement, the front end and encryption; records of earlier versions have none and are read as they
/// are.
pub const RECORD_FORMAT: u32 = 6;
/// Most snapshots of a volume, cut or being cut; a further one is refused. Below the layers that a replica can have.
pub const SNAPSHOTS_MAX: usize = 100;
/// Most snapshots that are asked for, cut or not.
pub const REQUESTED_MAX: usize = 2 * SNAPSHOTS_MAX;

/// One volume, as the record store keeps it (replication reference, section (a) "Record").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// [`RECORD_FORMAT`] at the time of writing.
    pub format: u32,
    /// Random id; also the CSI volume id.
    pub volume_id: VolumeId,
    /// The name CreateVolume was called with; unique among volumes that are not gone ([`VolumeRecord::is_gone`]).
    pub name: String,
    /// The volume's history.
    pub lineage: Lineage,
    /// Bytes; a multiple of the region size.
    pub size_bytes: u64,
    /// Number of the client; 0 while never published.
    pub attachment: Attachment,
    /// Node the volume is published to.
    pub attached_to: Option<NodeName>,
    /// Published read-only.
    pub read_only: bool,
    /// Number of the target's start; 0 while never started.
    pub generation: Generation,
    /// The attachment for which the owner of `generation` was started: a start under a later attachment is a new
    /// client's (R12).
    pub generation_attachment: Attachment,
    /// The target that owns `generation`.
    pub target_id: Option<TargetId>,
    /// Version of the in-sync set.
    pub epoch: Epoch,
    /// Replicas that hold every acknowledged write; never empty (P6).
    pub in_sync: BTreeSet<ReplicaId>,
    /// Every replica, members included.
    pub replicas: BTreeMap<ReplicaId, ReplicaRecord>,
    /// Snapshots, oldest first; the order of the layers on every holder.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotRecord>,
    /// Snapshots that somebody asked for, each from before it is cut until after it is gone: what a repeated call finds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requested: Vec<RequestedSnapshot>,
    /// Deleted while it had snapshots: nobody may publish it, its name is free, and it goes with the last of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retired: bool,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<CloneSource>,
    /// A replica knew another history than this record, as after the store was restored from a backup: no target serves
    /// before every replica agrees with it, or an operator promoted one (R35).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restored: bool,
    /// Whom an operator made the only member when the present lineage began (R26).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promoted: Option<Promotion>,
    /// How far formatting went (R36).
    pub formatted: Formatted,
    /// Of an encrypted volume: what makes its key, and tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// Tombstone: set once deletion began, until every replica confirmed (R34).
    pub deleting: bool,
    /// Parameters that later calls must agree with.
    pub params: VolumeParams,
}

/// One replica of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// Node that holds it.
    pub node: NodeName,
    /// Its standing.
    pub state: ReplicaState,
}

/// A replica's standing in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// Member of the in-sync set.
    InSync,
    /// Left the set when it held `left_epoch`; may come back by resync.
    Offline {
        /// The last epoch under which it was a member.
        left_epoch: Epoch,
    },
    /// Will be replaced under a new replica id.
    Faulted,
}

/// A forced promotion (R26).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promotion {
    /// The replica that was made the only member.
    pub replica: ReplicaId,
    /// The lineage it has until it is opened under the new one.
    pub from: Lineage,
}

/// One snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// Whether it counts.
    pub state: SnapshotState,
    /// The volume's size when it was cut, bytes.
    pub size_bytes: u64,
    /// Replicas that have its layer, with the same bytes; empty while it is being cut. They keep it while they are
    /// offline.
    pub holders: BTreeSet<ReplicaId>,
    /// Volumes that are being made from it, named before they are made (R30). Once all replicas of one are there, they have
    /// links of their own to the layers, and its name goes.
    #[serde(default)]
    pub clones: BTreeSet<VolumeId>,
    /// How far formatting had gone at the cut; what is not known for sure counts as `yes`, which forbids mkfs (R36).
    #[serde(default = "formatted_unless_known")]
    pub formatted: Formatted,
}

fn formatted_unless_known() -> Formatted {
    Formatted::Yes
}

/// A snapshot that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestedSnapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The name CreateSnapshot was called with; empty where a clone needs it.
    pub name: String,
    /// When the cut was asked for last, milliseconds since 1970.
    pub asked_unix_ms: u64,
    /// The volume that is made from it; it goes when that is there or given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_clone: Option<VolumeId>,
}

/// What a volume was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneSource {
    /// The volume whose snapshot it is.
    pub volume: VolumeId,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The caller named the volume, and the snapshot is only a means.
    pub of_volume: bool,
    /// All replicas were made, so that the source is not needed any more.
    pub linked: bool,
}

/// Whether a snapshot counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// The target of this generation is cutting it. Of an older generation: nobody is, and its layers are nothing.
    Cutting {
        /// The generation.
        generation: Generation,
    },
    /// It is one instant of the volume, on all its holders.
    Committed,
}

impl VolumeRecord {
    /// A snapshot, cut or being cut.
    #[must_use]
    pub fn snapshot(&self, id: SnapshotId) -> Option<&SnapshotRecord> {
        self.snapshots.iter().find(|snapshot| snapshot.id == id)
    }

    /// The committed snapshots, oldest first.
    pub fn committed(&self) -> impl Iterator<Item = &SnapshotRecord> {
        self.snapshots.iter().filter(|snapshot| snapshot.state == SnapshotState::Committed)
    }

    /// What was asked for under this snapshot id.
    #[must_use]
    pub fn request(&self, id: SnapshotId) -> Option<&RequestedSnapshot> {
        self.requested.iter().find(|request| request.id == id)
    }

    /// Whether CreateVolume may give its name to another volume, and callers are told that there is no such volume.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.deleting || self.retired
    }

    /// The committed snapshots that a replica holds.
    #[must_use]
    pub fn held_by(&self, replica: ReplicaId) -> BTreeSet<SnapshotId> {
        self.committed().filter(|s| s.holders.contains(&replica)).map(|s| s.id).collect()
    }
}

/// How far a volume's first format went (R36).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Formatted {
    /// No mkfs was ever begun.
    Never,
    /// mkfs may have begun; it may be repeated.
    Formatting,
    /// A file system was made: mkfs is forbidden for ever.
    Yes,
}

/// What CreateVolume was asked for, and ControllerModifyVolume since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeParams {
    /// Wanted number of replicas.
    pub replicas: u32,
    /// `ext4` or `xfs`; empty for raw block.
    pub fs_type: String,
    /// Below this many members I/O waits.
    pub min_in_sync: u32,
    /// What its clients may do per second.
    #[serde(default, skip_serializing_if = "IoLimits::is_none")]
    pub limits: IoLimits,
    /// How fast its background work goes.
    #[serde(default, skip_serializing_if = "Background::is_default")]
    pub background: Background,
    /// Where its replicas may be.
    #[serde(default, skip_serializing_if = "PlacementRules::is_default")]
    pub placement: PlacementRules,
    /// How its target becomes a block device.
    #[serde(default, skip_serializing_if = "FrontEndChoice::is_auto")]
    pub front_end: FrontEndChoice,
    /// Whether its data is encrypted.
    #[serde(default, skip_serializing_if = "EncryptionKind::is_none")]
    pub encryption: EncryptionKind,
}

/// The front end that a StorageClass asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrontEndChoice {
    /// The one that the node's data process has.
    #[default]
    Auto,
    /// A FUSE file with a loop device over it; a node without it refuses to attach.
    FuseLoop,
}

impl FrontEndChoice {
    /// Whether any will do.
    #[must_use]
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

impl VolumeParams {
    /// So many replicas with that file system (empty for raw block), and of everything else what holds where nothing is said.
    #[must_use]
    pub fn new(replicas: u32, fs_type: &str) -> Self {
        Self {
            replicas,
            fs_type: fs_type.to_owned(),
            min_in_sync: 1,
            limits: IoLimits::default(),
            background: Background::default(),
            placement: PlacementRules::default(),
            front_end: FrontEndChoice::Auto,
            encryption: EncryptionKind::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_earlier_formats_are_read_and_what_was_not_said_is_not_written() {
        let earlier = r#"{"replicas":3,"fs_type":"ext4","min_in_sync":1}"#;
        let params: VolumeParams = serde_json::from_str(earlier).unwrap();
        assert_eq!(params, VolumeParams::new(3, "ext4"));
        assert_eq!(serde_json::to_string(&params).unwrap(), earlier);
    }
}
