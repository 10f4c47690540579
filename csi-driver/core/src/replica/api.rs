//! Inputs and outputs of [`super::Replica`].

use std::collections::{BTreeMap, BTreeSet};

use crate::block_range::BlockRange;
use crate::dirty_map::{DirtyMap, RegionBits};
use crate::ids::{
    Epoch, Generation, Lineage, Region, ReplicaId, SessionToken, SnapshotId, TargetId, VolumeId,
};

use crate::record_copy::RecordCopy;

use super::meta::ReplicaMeta;

/// A request of a target, numbered by the engine; answered by exactly one [`ReplicaAction::Reply`], unless its session
/// ends first (then never: the engine drops what it knows about calls of a session when told to close it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaCall(pub u64);

/// A disk operation, numbered by the core; answered by exactly one [`ReplicaEvent::DiskDone`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(pub u64);

/// What the store found when a replica process started.
#[derive(Debug, Clone)]
pub struct ReplicaStart {
    /// The durable meta.
    pub meta: ReplicaMeta,
    /// The durable intent log.
    pub log: BTreeSet<Region>,
    /// The durable dirty maps by absent replica.
    pub maps: BTreeMap<ReplicaId, DirtyMap>,
    /// The cookie in tmpfs, if there is one (R19).
    pub boot_cookie: Option<u64>,
    /// The frozen layers, oldest first.
    pub snapshots: Vec<SnapshotId>,
}

/// `Open` as it came over the wire (R2, R35).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRequest {
    /// The volume.
    pub volume_id: VolumeId,
    /// The replica that is meant.
    pub replica_id: ReplicaId,
    /// Generation of the asking target.
    pub generation: Generation,
    /// The asking target.
    pub target_id: TargetId,
    /// Lineage in the record.
    pub lineage: Lineage,
    /// Epoch in the record.
    pub epoch: Epoch,
    /// In-sync set in the record.
    pub in_sync: BTreeSet<ReplicaId>,
    /// Size in the record.
    pub size_bytes: u64,
    /// The committed snapshots that this replica holds by the record. Every other frozen layer here is left over from
    /// a cut that never counted, or of a deleted snapshot: it is merged back before Open answers (R27, R28).
    pub snapshots: BTreeSet<SnapshotId>,
    /// Set if an operator made this replica the only member (R26): the lineage it had before.
    pub promoted_from: Option<Lineage>,
    /// Grows with every Open of this target: one that a later one overtook knows less than the replica and is refused.
    pub sequence: u64,
    /// The record that all this is from, to be kept beside the replica; none from a target of an earlier release.
    pub copy: Option<RecordCopy>,
}

/// The answer to a successful Open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenReply {
    /// Names the session from now on, in control requests and in the NBD export name.
    pub token: SessionToken,
    /// The write cache was lost and not reconciled since (R12, R19).
    pub cache_lost: bool,
    /// The whole intent log.
    pub logged: Vec<Region>,
    /// Bases of the dirty maps kept here; `None` for a void one.
    pub maps: BTreeMap<ReplicaId, Option<Epoch>>,
    /// The replica's size.
    pub size_bytes: u64,
    /// The epoch learned.
    pub epoch: Epoch,
    /// The frozen layers that are left, oldest first.
    pub snapshots: Vec<SnapshotId>,
}

/// Why an Open was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenRefusal {
    /// A later generation, or another target of the same one, was let in before: for ever (R2).
    #[error("generation {0} was opened here before: this target is fenced")]
    Fenced(Generation),
    /// The replica learned a later epoch, another nonce of the same, or another lineage: the store was restored (R35).
    #[error(
        "this replica knows epoch {0:?} of another history: the record store was restored, an operator must decide"
    )]
    Restored(Epoch),
    /// Another volume or replica id, or a smaller replica than the record says.
    #[error("this is not the replica that was meant")]
    WrongReplica,
    /// Another Open is being served; ask again.
    #[error("another target is being let in, ask again")]
    Busy,
    /// A disk write failed; the replica must be reopened from its disk first.
    #[error("the replica's disk failed")]
    DiskFailed,
}

/// What a session's control request carries besides its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionKey {
    /// The target's generation.
    pub generation: Generation,
    /// The target.
    pub target_id: TargetId,
    /// The token that Open answered.
    pub token: SessionToken,
}

/// A data request, in whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataOp {
    /// Read.
    Read(BlockRange),
    /// Write; on stable storage before the answer if `fua`.
    Write {
        /// Where.
        range: BlockRange,
        /// Force unit access.
        fua: bool,
    },
    /// Make the range read as zeroes, giving space back if `trim`.
    Zero {
        /// Where.
        range: BlockRange,
        /// Force unit access.
        fua: bool,
        /// The space may be given back.
        trim: bool,
    },
    /// Everything answered before is on stable storage after.
    Flush,
    /// Tell of each block whether it verifies, with a digest of its content (R33); the engine adds them to the reply.
    Verify(BlockRange),
    /// Make the blocks unreadable until they are written again (R25).
    MarkBad(BlockRange),
    /// Give blocks that do not verify, and are not marked bad, a checksum that fits (R32). Those that the device cannot read
    /// are left alone.
    Adopt(BlockRange),
    /// Read a snapshot, for a returning replica that missed it (R28).
    ReadSnapshot {
        /// Which.
        snapshot: SnapshotId,
        /// Where.
        range: BlockRange,
    },
}

impl DataOp {
    /// The blocks it changes or reads.
    #[must_use]
    pub fn range(&self) -> Option<BlockRange> {
        match self {
            Self::Read(range)
            | Self::Verify(range)
            | Self::MarkBad(range)
            | Self::Adopt(range)
            | Self::Write { range, .. }
            | Self::Zero { range, .. }
            | Self::ReadSnapshot { range, .. } => Some(*range),
            Self::Flush => None,
        }
    }

    /// Whether it changes blocks.
    #[must_use]
    pub fn is_write(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::MarkBad(_) | Self::Adopt(_))
    }
}

/// A control request inside a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlOp {
    /// Heartbeat: renews the lease (R4).
    Lease,
    /// Ends the session before its lease does (R2).
    Release,
    /// Learn an epoch (R10, R21).
    SetEpoch {
        /// The new epoch.
        epoch: Epoch,
        /// Its in-sync set.
        in_sync: BTreeSet<ReplicaId>,
        /// Everyone else, with the epoch at which it left.
        absent: BTreeMap<ReplicaId, Epoch>,
        /// The record that says so; none from a target of an earlier release.
        copy: Option<RecordCopy>,
    },
    /// Keep this copy of the record, if it is newer than the one that is kept (ADR 0011).
    KeepRecord(RecordCopy),
    /// Take regions out of the intent log (R18).
    ClearLog(Vec<Region>),
    /// The dirty map kept for an absent replica (R23).
    ReadMap(ReplicaId),
    /// A data request that NBD has no command for: Verify, MarkBad, Adopt.
    Data(DataOp),
    /// A void map kept for an absent replica becomes one of all blocks (R21).
    FillMap(ReplicaId),
    /// The absent replica has flushed these regions: their bits go (R23).
    ClearMap {
        /// The absent replica.
        absent: ReplicaId,
        /// The regions.
        regions: Vec<Region>,
    },
    /// Join step 3: take over a member's maps and learn its epoch (R24).
    MergeMaps {
        /// The member's epoch.
        epoch: Epoch,
        /// Its maps of those still absent.
        maps: BTreeMap<ReplicaId, DirtyMap>,
    },
    /// Flush, then freeze the top layer under this id, durably (R27). No write is in flight or begun meanwhile.
    Freeze {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Merge the snapshot's layer back; an unknown snapshot is a success.
    DropSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Make layers, log and maps this large (R31); the same size, or a smaller one, is a success.
    Grow {
        /// The new size.
        size_bytes: u64,
    },
}

/// Inputs.
#[derive(Debug, Clone)]
pub enum ReplicaEvent {
    /// A target asks for a session. `token` is drawn at random by the engine for the session to come.
    Open {
        /// Names the request.
        call: ReplicaCall,
        /// Its content.
        request: OpenRequest,
        /// A fresh random token.
        token: SessionToken,
    },
    /// The asker of an Open hung up before its answer.
    OpenCancelled {
        /// The Open.
        call: ReplicaCall,
    },
    /// A control request.
    Control {
        /// Names the request.
        call: ReplicaCall,
        /// Who asks.
        key: SessionKey,
        /// What.
        op: ControlOp,
    },
    /// A data request on one of the session's connections.
    Data {
        /// Names the request.
        call: ReplicaCall,
        /// The session, from the connection's export name.
        token: SessionToken,
        /// What.
        op: DataOp,
    },
    /// One of the session's connections broke: the whole session is lost (R5).
    ConnectionLost {
        /// The session.
        token: SessionToken,
    },
    /// Answer to [`ReplicaAction::CloseConnections`]: no further request of the session will be delivered.
    ConnectionsClosed {
        /// The session.
        token: SessionToken,
    },
    /// A disk operation ended.
    DiskDone {
        /// Which.
        id: DiskId,
        /// How.
        result: Result<(), DiskError>,
    },
    /// [`super::Replica::next_timeout`] passed.
    Tick,
}

/// How a disk operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// No space; nothing of the range was changed, other ranges are fine.
    #[error("no space left")]
    NoSpace,
    /// A block's checksum does not match; reads only.
    #[error("checksum mismatch")]
    Corrupt,
    /// The device failed. After a failed write or flush the replica is unusable until reopened (R19).
    #[error("device error")]
    Device,
    /// Freeze: a layer is frozen under this id already; nothing was changed.
    #[error("the snapshot exists already")]
    SnapshotExists,
    /// Freeze: the replica has as many layers as it can have; nothing was changed.
    #[error("no further layer fits: delete a snapshot first")]
    LayersFull,
    /// ReadSnapshot: no layer is frozen under this id.
    #[error("there is no such snapshot")]
    NoSnapshot,
}

impl DiskError {
    /// Whether Freeze, DropSnapshot or Grow that end so have changed nothing and leave the replica as usable as before.
    #[must_use]
    pub fn is_refusal(self) -> bool {
        match self {
            Self::NoSpace | Self::SnapshotExists | Self::LayersFull | Self::NoSnapshot => true,
            Self::Corrupt | Self::Device => false,
        }
    }
}

/// Operations on the replica's own disk. Those on meta, log and maps are durable when answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskOp {
    /// Replace the meta.
    PersistMeta(ReplicaMeta),
    /// Replace the copy of the record, unless the one that is kept is as new.
    KeepRecord(RecordCopy),
    /// Write the cookie's copy in tmpfs (R19).
    SetBootCookie(u64),
    /// Remove the cookie's copy in tmpfs, before a failure is reported (R19).
    RemoveBootCookie,
    /// Add regions to the intent log.
    LogAdd(Vec<Region>),
    /// Take regions out of the intent log.
    LogRemove(Vec<Region>),
    /// Replace the dirty map of an absent replica whole.
    MapPut {
        /// The absent replica.
        absent: ReplicaId,
        /// Its map.
        map: DirtyMap,
    },
    /// Replace the bits of some regions in a map that is not void.
    MapUpdate {
        /// The absent replica.
        absent: ReplicaId,
        /// Regions with their new bits.
        regions: Vec<(Region, RegionBits)>,
    },
    /// Remove a dirty map.
    MapDrop {
        /// The replica it was kept for.
        absent: ReplicaId,
    },
    /// Freeze the top layer under this id and start an empty one. Data that was answered was flushed before.
    Freeze {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The snapshot is gone when answered; its layer is merged into the one above in the background.
    DropSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Make layers, log and maps this large. The meta that names the size follows.
    Grow {
        /// The new size.
        size_bytes: u64,
    },
    /// A data request of `call`, whose buffer the engine holds. With `fua` the store flushes before it answers.
    Data {
        /// The request.
        call: ReplicaCall,
        /// What.
        op: DataOp,
    },
}

/// Why a request inside a session failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestRefusal {
    /// No such session (any more) (R2, R5).
    #[error("the session is over")]
    NoSession,
    /// The disk failed.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// The range lies outside the volume, or the request would exceed the intent log's limit.
    #[error("the request is not allowed")]
    Invalid,
    /// The epoch is older than the one learned.
    #[error("the epoch is older than the one learned")]
    OldEpoch,
}

/// What a request was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaReply {
    /// Open.
    Open(Result<OpenReply, OpenRefusal>),
    /// Lease: granted; carries `cache_lost`.
    Lease(Result<bool, RequestRefusal>),
    /// Release, SetEpoch, KeepRecord, ClearLog, FillMap, ClearMap, MergeMaps, Freeze, DropSnapshot, Grow and data requests.
    Done(Result<(), RequestRefusal>),
    /// Verify: what the engine makes of the success of its data request, see [`DataOp::Verify`].
    Verified(Vec<Option<u64>>),
    /// ReadMap; a missing map is void.
    Map(Result<DirtyMap, RequestRefusal>),
}

/// Outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaAction {
    /// Do a disk operation. Operations on meta, cookie, log and maps must take effect in the order given.
    Disk {
        /// Names it.
        id: DiskId,
        /// What.
        op: DiskOp,
    },
    /// Answer a request.
    Reply {
        /// The request.
        call: ReplicaCall,
        /// The answer.
        reply: ReplicaReply,
    },
    /// Close all connections of a session, then say [`ReplicaEvent::ConnectionsClosed`].
    CloseConnections {
        /// The session.
        token: SessionToken,
    },
    /// The disk failed: answer nothing more, close everything, reopen the replica from its disk with a new
    /// [`super::Replica`].
    Failed,
}
