//! Inputs and outputs of [`super::Group`], and the record that it keeps.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{GroupId, RecordVersion, SnapshotId, VolumeId};
use crate::target::{Job, JobError};

/// Version of the group record's shape; a reader refuses a later one.
pub const GROUP_FORMAT: u32 = 1;

/// One group of snapshots, as the record store keeps it: an object of its own, changed by compare-and-swap only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// [`GROUP_FORMAT`] at the time of writing.
    pub format: u32,
    /// The group.
    pub group_id: GroupId,
    /// The name that its caller gave it; unique among groups.
    pub name: String,
    /// When this try was asked for, milliseconds since 1970.
    pub asked_unix_ms: u64,
    /// Every member with its snapshot. The ids are drawn anew for each try, so they also say whose try it is.
    pub snapshots: BTreeMap<VolumeId, SnapshotId>,
    /// What the snapshots are worth.
    pub state: GroupState,
}

/// What a group's snapshots are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupState {
    /// The members are asked to hold their writes: no snapshot of it is there yet.
    Holding,
    /// All members held; they are asked to cut. Some snapshots may be there; none counts.
    Cutting,
    /// All snapshots are there and of one instant.
    Committed,
    /// None counts, for ever: they are being deleted.
    Abandoned,
}

/// A group's record with the version that a swap must name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionedGroup {
    /// Store version. Never used twice for one group, not even after its record was removed.
    pub version: RecordVersion,
    /// The record.
    pub record: GroupRecord,
}

/// What a coordinator is started for.
#[derive(Debug, Clone)]
pub struct GroupConfig {
    /// The group. Whoever repeats a call names the same one.
    pub group_id: GroupId,
    /// Its name, for the record.
    pub name: String,
    /// When it was asked for, milliseconds since 1970, for the record.
    pub asked_unix_ms: u64,
    /// What to do.
    pub task: GroupTask,
    /// For how long a member may hold its writes, from its target's answer on; at most
    /// [`crate::timers::GROUP_HOLD_MAX_MS`]. A group whose members are not all held within it is given up.
    pub hold_ms: u64,
}

/// What is wanted of a group.
#[derive(Debug, Clone)]
pub enum GroupTask {
    /// A snapshot of every member, all of one instant. The ids are random, drawn for this start of a coordinator and never
    /// used before. A group that was committed before is a success, with the ids of that time.
    Create(BTreeMap<VolumeId, SnapshotId>),
    /// No snapshot and no record of it is left. A group that is not there is a success.
    Delete,
}

/// A call to the store or to a member, numbered by the core; answered by exactly one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupCall(pub u64);

/// Inputs.
#[derive(Debug, Clone)]
pub enum GroupEvent {
    /// Answer to [`GroupAction::ReadRecord`]; none: there is no such group.
    RecordRead {
        /// Which call.
        call: GroupCall,
        /// What the store has.
        result: Result<Option<VersionedGroup>, GroupStoreError>,
    },
    /// Answer to [`GroupAction::Swap`].
    SwapAnswered {
        /// Which call.
        call: GroupCall,
        /// The new version; of no meaning if the record was removed.
        result: Result<RecordVersion, GroupStoreError>,
    },
    /// Answer to [`GroupAction::Ask`].
    Answered {
        /// Which call.
        call: GroupCall,
        /// How it ended.
        result: Result<(), MemberError>,
    },
    /// [`super::Group::next_timeout`] passed.
    Tick,
}

/// Why a call to the store of group records failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupStoreError {
    /// The version moved; nothing was changed.
    #[error("the group's record was changed by another writer")]
    Conflict,
    /// Nothing is known: the change may or may not have happened, now or later (R8).
    #[error("the record store did not answer: {0}")]
    Unknown(String),
}

/// Why a member did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// Its target refused.
    #[error(transparent)]
    Refused(#[from] JobError),
    /// It has no target, or that did not answer in time: it may have done it, or do it later.
    #[error("its target did not answer")]
    Silent,
}

/// Outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupAction {
    /// Read the group's record, not from a cache.
    ReadRecord {
        /// Names it.
        call: GroupCall,
    },
    /// Replace, make or remove the record if its version is still `expected`.
    Swap {
        /// Names it.
        call: GroupCall,
        /// The version; none: there is no record.
        expected: Option<RecordVersion>,
        /// The new content; none: remove it.
        record: Option<GroupRecord>,
    },
    /// Give a volume's target a job, once, and tell how it ended; [`MemberError::Silent`] after
    /// [`crate::timers::GROUP_ANSWER_MS`] at the latest. A volume without a target gets one for it.
    ///
    /// [`Job::DeleteSnapshot`] counts as done only when the volume's record, read anew, does not name the snapshot: a
    /// target that was replaced and does not know it would say that it is gone. A volume without a record has no snapshots.
    Ask {
        /// Names it.
        call: GroupCall,
        /// The member.
        volume: VolumeId,
        /// What its target is to do.
        what: Job,
    },
    /// It is over; nothing more is wanted. With the group's snapshots, none after a deletion.
    Done {
        /// How it ended.
        result: Result<BTreeMap<VolumeId, SnapshotId>, GroupError>,
    },
}

/// Why a group was not cut, or not deleted. It may be asked for again; what is left of this try is deleted first then, if
/// it is not already.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// No member, or more than [`crate::timers::GROUP_MEMBERS_MAX`].
    #[error("a group of {0} volumes cannot be cut")]
    Size(usize),
    /// The record was written by a later program.
    #[error("the record of the group has format {0}, this program knows up to {GROUP_FORMAT}: upgrade it")]
    Format(u32),
    /// A group of this id was committed with other members.
    #[error("the group was cut of other volumes before")]
    OtherMembers,
    /// A member did not do its part.
    #[error("volume {volume}: {error}")]
    Member {
        /// Which.
        volume: VolumeId,
        /// Why.
        error: MemberError,
    },
    /// Another coordinator works on the group.
    #[error("the group was taken over by another coordinator, ask again")]
    TakenOver,
    /// The store failed too often; the group may be committed.
    #[error("{0}; ask again")]
    Store(#[from] GroupStoreError),
}
