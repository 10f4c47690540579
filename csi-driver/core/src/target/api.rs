//! Inputs and outputs of [`super::Target`].

mod jobs;
mod status;

pub use jobs::*;
pub use status::*;

use std::collections::{BTreeMap, BTreeSet};

use crate::block_range::BlockRange;
use crate::dirty_map::{BlockSet, DirtyMap};
use crate::ids::{
    Attachment, Block, Epoch, Generation, Lineage, NodeName, RecordVersion, Region, ReplicaId, SnapshotId,
    TargetId, VolumeId,
};
use crate::record::VolumeRecord;
use crate::record_store::{StoreError, Versioned};
use crate::replica::{DataOp, DiskError, OpenRefusal};

/// What a target is started with.
#[derive(Debug, Clone)]
pub struct TargetConfig {
    /// The volume to serve.
    pub volume_id: VolumeId,
    /// The node it runs on; reads prefer its replica.
    pub node: NodeName,
    /// The attachment it is started for; the record must say the same.
    pub attachment: Attachment,
    /// A fresh random id (R1).
    pub target_id: TargetId,
    /// Random; source of epoch nonces.
    pub seed: u64,
    /// For jobs on a volume that is published to nobody (R7): there is no client, and the target stays only as long as
    /// nobody publishes the volume.
    pub detached: bool,
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);
    };
}

number!(
    /// A client's request, numbered by the engine; never reused.
    RequestId
);
number!(
    /// A copy's buffer, numbered by the core.
    CopyId
);
number!(
    /// An I/O on one replica, numbered by the core; the NBD cookie may carry it.
    IoId
);
number!(
    /// A control call or store call, numbered by the core.
    CallId
);
number!(
    /// One try to open a replica and, if it succeeds, the session; numbered by the core, never reused.
    SessionId
);
number!(
    /// A job, numbered by the engine; never reused.
    JobId
);

/// A client's request. Offsets and lengths are bytes of any alignment; the core takes whole blocks, locks, and has the
/// edges of an unaligned write read first (R13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientOp {
    /// Read.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes, at least one.
        len: u64,
    },
    /// Write.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes, at least one.
        len: u64,
        /// On stable storage at every in-sync replica before the answer.
        fua: bool,
    },
    /// Make the range read as zeroes. Edge blocks of an unaligned range are read, then written as data
    /// ([`Payload::Edge`]); the blocks between are zeroed.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes, at least one.
        len: u64,
        /// As for Write.
        fua: bool,
        /// The space may be given back.
        trim: bool,
    },
    /// Everything answered before is on stable storage after (R15).
    Flush,
}

/// Which edge of an unaligned write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The first block; the only one if the write lies within one block.
    Head,
    /// The last block.
    Tail,
}

/// The buffer that an I/O reads into or writes from; the core never sees its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// None (zeroing, flush).
    None,
    /// The request's own buffer, which covers the *whole blocks* of the request: byte 0 is the first byte of block
    /// `offset / 4096`. The I/O's range says which blocks of it are meant (always all of them for Read and Write).
    Request(RequestId),
    /// One edge block of an unaligned request. *Read*: of a Write, the engine puts those bytes that the client did not
    /// write into the request's buffer (every edge is read before the request is written); of a Zero, it keeps the
    /// block in a buffer of its own, with the client's range zeroed. *Written* (Zero only): from that buffer.
    Edge {
        /// The request.
        request: RequestId,
        /// Which edge.
        edge: Edge,
        /// The block.
        block: Block,
    },
    /// The buffer of a copy: read from one replica, then written to others. An all-zero buffer may be written as zeroes.
    Copy(CopyId),
}

/// How an I/O on one replica failed. A broken connection is [`TargetEvent::SessionLost`], not an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoError {
    /// No space (`ENOSPC`).
    NoSpace,
    /// Any other error (`EIO`).
    Failed,
}

/// What a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No member could do it (`EIO`).
    #[error("no in-sync replica could do the request")]
    Failed,
    /// No space on any member (`ENOSPC`).
    #[error("no space left on the in-sync replicas")]
    NoSpace,
    /// A later target owns the volume (`ESHUTDOWN`).
    #[error("the target is fenced")]
    Fenced,
    /// The target is stopping or stopped (`ESHUTDOWN`).
    #[error("the target is stopped")]
    Stopped,
    /// The range lies outside the volume or is empty (`EINVAL`).
    #[error("the range is outside the volume")]
    Invalid,
}

/// What Open answered, without the token, which the engine keeps by [`SessionId`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// The replica's write cache was lost (R12).
    pub cache_lost: bool,
    /// Its whole intent log.
    pub logged: Vec<Region>,
    /// Its size.
    pub size_bytes: u64,
    /// The epoch it learned.
    pub epoch: Epoch,
    /// Its frozen layers, oldest first.
    pub snapshots: Vec<SnapshotId>,
}

/// What a replica has of a block (R17).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Never written; reads as zeroes.
    Absent,
    /// Zeroed.
    Zero,
    /// Data.
    Data,
}

/// A control request to an open replica. A refusal that leaves the session whole is [`TargetEvent::ControlRefused`],
/// every other failure, or a timeout, [`TargetEvent::SessionLost`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Learn an epoch (R10).
    SetEpoch {
        /// The epoch.
        epoch: Epoch,
        /// Its in-sync set.
        in_sync: BTreeSet<ReplicaId>,
        /// Everyone else, with the epoch at which it left.
        absent: BTreeMap<ReplicaId, Epoch>,
        /// The record that says so, of which the replica keeps a copy.
        record: Box<Versioned>,
    },
    /// Keep a copy of the record (ADR 0011). A replica of an earlier release that does not know the request has done it.
    KeepRecord(Box<Versioned>),
    /// Take regions out of the intent log (R18). No write to them is begun until it is answered, so no stamp is needed.
    ClearLog(Vec<Region>),
    /// Read the dirty map kept for an absent replica (R23).
    ReadMap(ReplicaId),
    /// Turn the void map kept for an absent replica into one of all blocks, so that what is copied can be taken out.
    FillMap(ReplicaId),
    /// Take regions out of the map kept for an absent replica: it has flushed them (R23).
    ClearMap {
        /// The absent replica.
        absent: ReplicaId,
        /// The regions.
        regions: Vec<Region>,
    },
    /// Tell where the replica has data; answered by [`TargetEvent::ExtentsRead`]. Absent is what reads as zeroes because
    /// no layer has anything. Changes nothing, so that it may be answered beside the core.
    ReadExtents(BlockRange),
    /// Verify each block of the range; answered by [`TargetEvent::Verified`] (R33).
    Verify(BlockRange),
    /// Make the blocks unreadable until they are written again: no member can read them (R25).
    MarkBad(BlockRange),
    /// Give blocks that do not verify a checksum that fits what the disk holds (R32); not those marked bad.
    Adopt(BlockRange),
    /// Tell which blocks were written after one snapshot (or ever) and before another (or now); answered by
    /// [`TargetEvent::ChangesRead`]. Changes nothing, so that it may be answered beside the core.
    ReadChanges {
        /// After this snapshot; ever, if none.
        from: Option<SnapshotId>,
        /// Before this snapshot; until now, if none.
        to: Option<SnapshotId>,
        /// Where; at most [`crate::timers::EXTENTS_REGIONS`], so that a slow disk answers before the deadline.
        range: BlockRange,
    },
    /// Give a joining replica a member's maps (R24).
    MergeMaps {
        /// The epoch.
        epoch: Epoch,
        /// Maps by absent replica.
        maps: BTreeMap<ReplicaId, DirtyMap>,
    },
    /// Freeze the top layer under this id (R27).
    Freeze {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Merge a snapshot's layer back.
    DropSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Make the replica this large (R31).
    Grow {
        /// The new size.
        size_bytes: u64,
    },
    /// End the session before its lease does; the last thing sent on a session.
    Release,
}

/// Inputs. Events of sessions, calls and I/O that the core has given up are ignored, so late ones do no harm.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "taken by value and never stored; the engine boxes what it queues"
)]
pub enum TargetEvent {
    /// Answer to [`TargetAction::ReadRecord`].
    RecordRead {
        /// The call.
        call: CallId,
        /// The newest record, or why not.
        result: Result<Versioned, StoreError>,
    },
    /// Answer to [`TargetAction::Swap`]. A timeout of the engine's is [`StoreError::Unknown`].
    SwapAnswered {
        /// The call.
        call: CallId,
        /// The new version, or why not.
        result: Result<RecordVersion, StoreError>,
    },
    /// Open succeeded and all connections of the session are up.
    Opened {
        /// The session.
        session: SessionId,
        /// What the replica said.
        opened: Opened,
    },
    /// Open was refused.
    OpenRefused {
        /// The try.
        session: SessionId,
        /// Why.
        refusal: OpenRefusal,
    },
    /// Open failed: no route, connection refused, timeout, or a connection failed to come up.
    OpenFailed {
        /// The try.
        session: SessionId,
    },
    /// A connection of the session broke, or a control request failed. All its I/O and calls are void.
    SessionLost {
        /// The session.
        session: SessionId,
    },
    /// Answer to [`TargetAction::Heartbeat`].
    HeartbeatAnswered {
        /// The session.
        session: SessionId,
        /// The heartbeat's number.
        sequence: u64,
        /// The replica's write cache was lost.
        cache_lost: bool,
    },
    /// Answer to SetEpoch, KeepRecord, ClearLog, FillMap, ClearMap, MarkBad, Adopt, MergeMaps, Freeze, DropSnapshot, Grow or Release.
    ControlDone {
        /// The call.
        call: CallId,
    },
    /// A replica could not do Freeze, DropSnapshot or Grow and has changed nothing; its session goes on.
    ControlRefused {
        /// The call.
        call: CallId,
        /// Why.
        error: DiskError,
    },
    /// Answer to ReadMap.
    MapRead {
        /// The call.
        call: CallId,
        /// The map.
        map: DirtyMap,
    },
    /// Answer to ReadExtents.
    ExtentsRead {
        /// The call.
        call: CallId,
        /// The whole range asked for, in order.
        extents: Vec<(BlockRange, Allocation)>,
    },
    /// Answer to Verify.
    Verified {
        /// The call.
        call: CallId,
        /// By block of the range: a digest of its content, equal on every replica for equal content, or `None` if it does
        /// not verify.
        blocks: Vec<Option<u64>>,
    },
    /// Scrub the volume now.
    Scrub,
    /// Answer to ReadChanges.
    ChangesRead {
        /// The call.
        call: CallId,
        /// The blocks, at least.
        blocks: BlockSet,
    },
    /// An I/O ended.
    IoDone {
        /// Which.
        io: IoId,
        /// How.
        result: Result<(), IoError>,
    },
    /// A client's request. Taken in any state; it waits until the target serves.
    Request {
        /// Its number.
        request: RequestId,
        /// What.
        op: ClientOp,
    },
    /// The wall clock jumped against the clock that `now_ms` comes from, as when the machine was suspended with its
    /// clocks: every lease is void (R4). To be delivered before anything that arrives after the jump.
    ClockJumped,
    /// A job. It waits until the target serves.
    Job {
        /// Its number.
        job: JobId,
        /// What.
        what: Job,
    },
    /// Finish what is in flight, flush, empty the intent log, release the replicas.
    Stop,
    /// [`super::Target::next_timeout`] passed. Deliver all queued events first (R6).
    Tick,
}

/// Outputs. Take all of them after each event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetAction {
    /// Read the record, linearizably, never from a cache.
    ReadRecord {
        /// Names the call.
        call: CallId,
    },
    /// Compare-and-swap the record.
    Swap {
        /// Names the call.
        call: CallId,
        /// Version it must still have.
        expected: RecordVersion,
        /// The new record.
        record: Box<VolumeRecord>,
    },
    /// Open a session: the control call, then all NBD connections.
    Open(OpenSession),
    /// Drop a session or a try to open one: close its connections, answer nothing more about it.
    CloseSession {
        /// The session.
        session: SessionId,
        /// Its replica.
        replica: ReplicaId,
    },
    /// Send a heartbeat now, on a path that never waits for a disk.
    Heartbeat {
        /// The session.
        session: SessionId,
        /// Its replica.
        replica: ReplicaId,
        /// Number within the session.
        sequence: u64,
    },
    /// Send a control request.
    Control {
        /// Names the call.
        call: CallId,
        /// The session.
        session: SessionId,
        /// Its replica.
        replica: ReplicaId,
        /// What.
        op: Control,
    },
    /// Do an I/O on one replica.
    Io {
        /// Names the I/O.
        io: IoId,
        /// The session.
        session: SessionId,
        /// Its replica.
        replica: ReplicaId,
        /// What, in whole blocks.
        op: DataOp,
        /// Which buffer.
        payload: Payload,
    },
    /// Answer a client, exactly once per request. No I/O that names the request follows; those sent before may still
    /// be under way and need the buffer.
    Complete {
        /// The request.
        request: RequestId,
        /// The answer.
        result: Result<(), RequestError>,
    },
    /// A job is over; exactly once per job.
    JobDone {
        /// The job.
        job: JobId,
        /// How.
        result: Result<(), JobError>,
    },
    /// The volume has this size now (R31); the front end follows.
    Grown {
        /// Bytes.
        size_bytes: u64,
    },
    /// A copy is over: its buffer may go once its I/O ended.
    CopyDone {
        /// The copy.
        copy: CopyId,
    },
    /// The target's state changed.
    State(TargetState),
    /// Something about the data's integrity is to be reported.
    Found(Finding),
}

/// What Open needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenSession {
    /// Names the try and the session.
    pub session: SessionId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeName,
    /// The volume.
    pub volume_id: VolumeId,
    /// Our generation.
    pub generation: Generation,
    /// Ourselves.
    pub target_id: TargetId,
    /// The record's lineage.
    pub lineage: Lineage,
    /// Set if an operator made the replica the only member (R26): the lineage before.
    pub promoted_from: Option<Lineage>,
    /// The record's epoch.
    pub epoch: Epoch,
    /// The record's in-sync set.
    pub in_sync: BTreeSet<ReplicaId>,
    /// The record's size.
    pub size_bytes: u64,
    /// The committed snapshots that the replica holds by the record (R27).
    pub snapshots: BTreeSet<SnapshotId>,
    /// The record, of which the replica keeps a copy.
    pub record: Box<Versioned>,
}

/// Blocks of a client's range and the edges that must be read first.
#[must_use]
pub fn blocks_of(offset: u64, len: u64) -> BlockRange {
    BlockRange::covering(offset, len)
}
