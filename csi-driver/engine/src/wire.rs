//! Between the control protocol's messages and the core's types. Whatever comes from the wire is checked here.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_proto::storage as pb;
use holdfast_service::record_copies;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{BlockSet, Dirty, DirtyMap};
use holdfast_storage_core::ids::{BLOCKS_PER_REGION, Epoch, Generation, NodeName, Region, ReplicaId};
use holdfast_storage_core::record_store::Versioned;
use holdfast_storage_core::replica::{OpenRefusal, OpenReply, OpenRequest, SessionKey};
use holdfast_storage_core::timers::EXTENTS_REGIONS;
use tonic::Status;

/// Bytes of the largest control message: a dirty map of a 1 TiB volume has 32 MiB. A larger volume's maps do not pass
/// and its returning replicas are not caught up, until maps are sent in parts.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Parses an id.
pub fn id<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, Status> {
    text.parse().map_err(|error: T::Err| Status::invalid_argument(error.to_string()))
}

/// An id that may be left out, as an empty text.
pub fn maybe_id<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<Option<T>, Status> {
    (!text.is_empty()).then(|| id(text)).transpose()
}

/// A field that must be there.
pub fn required<T>(field: Option<T>, name: &str) -> Result<T, Status> {
    field.ok_or_else(|| Status::invalid_argument(format!("the request lacks {name}")))
}

pub fn epoch(epoch: pb::Epoch) -> Epoch {
    Epoch { number: epoch.number, nonce: epoch.nonce }
}

pub fn epoch_pb(epoch: Epoch) -> pb::Epoch {
    pb::Epoch { number: epoch.number, nonce: epoch.nonce }
}

pub fn ids<T: std::str::FromStr<Err: std::fmt::Display> + Ord>(
    texts: &[String],
) -> Result<BTreeSet<T>, Status> {
    texts.iter().map(|text| id(text)).collect()
}

/// The key of a session and the replica it is of.
pub fn session(session: Option<pb::Session>) -> Result<(ReplicaId, SessionKey), Status> {
    let session = required(session, "session")?;
    let key = SessionKey {
        generation: Generation(session.generation),
        target_id: id(&session.target_id)?,
        token: id(&session.token)?,
    };
    Ok((id(&session.replica_id)?, key))
}

pub fn open_request(request: pb::OpenRequest) -> Result<OpenRequest, Status> {
    let session = required(request.session, "session")?;
    Ok(OpenRequest {
        volume_id: id(&session.volume_id)?,
        replica_id: id(&session.replica_id)?,
        generation: Generation(session.generation),
        target_id: id(&session.target_id)?,
        lineage: id(&request.lineage)?,
        promoted_from: match request.promoted_from.as_str() {
            "" => None,
            lineage => Some(id(lineage)?),
        },
        epoch: epoch(required(request.epoch, "epoch")?),
        in_sync: ids(&request.in_sync)?,
        size_bytes: request.size_bytes,
        snapshots: ids(&request.snapshots)?,
        sequence: request.sequence,
        copy: request.record.map(record_copies::from_wire).transpose()?,
    })
}

pub fn open_request_pb(request: &OpenRequest, node: &NodeName) -> pb::OpenRequest {
    pb::OpenRequest {
        node: node.0.clone(),
        session: Some(pb::Session {
            volume_id: request.volume_id.to_string(),
            replica_id: request.replica_id.to_string(),
            generation: request.generation.0,
            target_id: request.target_id.to_string(),
            token: String::new(),
        }),
        lineage: request.lineage.to_string(),
        promoted_from: request.promoted_from.map_or_else(String::new, |lineage| lineage.to_string()),
        epoch: Some(epoch_pb(request.epoch)),
        in_sync: request.in_sync.iter().map(ToString::to_string).collect(),
        size_bytes: request.size_bytes,
        snapshots: request.snapshots.iter().map(ToString::to_string).collect(),
        sequence: request.sequence,
        record: request.copy.as_ref().map(record_copies::to_wire),
    }
}

pub fn open_reply_pb(reply: Result<OpenReply, OpenRefusal>, nbd_port: u16) -> pb::OpenReply {
    let reply = match reply {
        Ok(reply) => reply,
        Err(refusal) => {
            return pb::OpenReply { refusal: Some(refusal_pb(refusal)), ..pb::OpenReply::default() };
        }
    };
    let base = |(absent, base): (&ReplicaId, &Option<Epoch>)| pb::MapBase {
        absent_replica_id: absent.to_string(),
        base: base.map(epoch_pb),
        void: base.is_none(),
    };
    pb::OpenReply {
        token: reply.token.to_string(),
        cache_lost: reply.cache_lost,
        logged_regions: reply.logged.iter().map(|region| region.0).collect(),
        maps: reply.maps.iter().map(base).collect(),
        size_bytes: reply.size_bytes,
        epoch: Some(epoch_pb(reply.epoch)),
        nbd_port: u32::from(nbd_port),
        refusal: None,
        snapshots: reply.snapshots.iter().map(ToString::to_string).collect(),
    }
}

/// The outer error: the peer broke the protocol.
pub fn open_reply(reply: pb::OpenReply) -> Result<Result<OpenReply, OpenRefusal>, Status> {
    if let Some(refusal) = reply.refusal {
        return refused(refusal).map(Err);
    }
    let mut maps = BTreeMap::new();
    for map in &reply.maps {
        let base = if map.void { None } else { map.base.map(epoch) };
        maps.insert(id(&map.absent_replica_id)?, base);
    }
    Ok(Ok(OpenReply {
        token: id(&reply.token)?,
        cache_lost: reply.cache_lost,
        logged: reply.logged_regions.into_iter().map(Region).collect(),
        maps,
        size_bytes: reply.size_bytes,
        epoch: epoch(required(reply.epoch, "epoch")?),
        snapshots: reply.snapshots.iter().map(|snapshot| id(snapshot)).collect::<Result<_, _>>()?,
    }))
}

fn refusal_pb(refusal: OpenRefusal) -> pb::OpenRefusal {
    use pb::open_refusal::Reason;
    let reason = match refusal {
        OpenRefusal::Fenced(generation) => Reason::FencedByGeneration(generation.0),
        OpenRefusal::Restored(epoch) => Reason::Restored(epoch_pb(epoch)),
        OpenRefusal::WrongReplica => Reason::WrongReplica(true),
        OpenRefusal::Busy => Reason::Busy(true),
        OpenRefusal::DiskFailed => Reason::DiskFailed(true),
    };
    pb::OpenRefusal { reason: Some(reason) }
}

fn refused(refusal: pb::OpenRefusal) -> Result<OpenRefusal, Status> {
    use pb::open_refusal::Reason;
    Ok(match required(refusal.reason, "a reason of the refusal")? {
        Reason::FencedByGeneration(generation) => OpenRefusal::Fenced(Generation(generation)),
        Reason::Restored(known) => OpenRefusal::Restored(epoch(known)),
        Reason::WrongReplica(_) => OpenRefusal::WrongReplica,
        Reason::Busy(_) => OpenRefusal::Busy,
        Reason::DiskFailed(_) => OpenRefusal::DiskFailed,
    })
}

/// Blocks of one region at most: more is no request of a target's.
pub fn region_range(start_block: u64, blocks: u64) -> Result<BlockRange, Status> {
    range(start_block, blocks, BLOCKS_PER_REGION)
}

/// The range of a question for changes.
pub fn changes_range(start_block: u64, blocks: u64) -> Result<BlockRange, Status> {
    range(start_block, blocks, EXTENTS_REGIONS * BLOCKS_PER_REGION)
}

/// What changed in the range that was asked for.
pub fn changes(reply: &pb::ReadChangesReply, asked: BlockRange) -> Result<BlockSet, Status> {
    let mut changed = BlockSet::new();
    for run in &reply.runs {
        let run = range(run.start_block, run.blocks, asked.count)?;
        if run.start < asked.start || run.end() > asked.end() {
            return Err(Status::invalid_argument("the answer tells of blocks that were not asked for"));
        }
        changed.insert(run);
    }
    Ok(changed)
}

fn range(start_block: u64, blocks: u64, blocks_max: u64) -> Result<BlockRange, Status> {
    let allowed = (1..=blocks_max).contains(&blocks) && start_block.checked_add(blocks).is_some();
    let refused = || Status::invalid_argument(format!("{blocks} blocks from block {start_block} on"));
    if allowed { Ok(BlockRange::new(start_block, blocks)) } else { Err(refused()) }
}

pub fn verified_pb(blocks: &[Option<u64>]) -> pb::VerifyReply {
    pb::VerifyReply {
        verifies: blocks.iter().map(Option::is_some).collect(),
        digests: blocks.iter().map(|digest| digest.unwrap_or_default()).collect(),
    }
}

pub fn verified(reply: &pb::VerifyReply) -> Vec<Option<u64>> {
    let blocks = reply.verifies.iter().zip(&reply.digests);
    blocks.map(|(verifies, digest)| verifies.then_some(*digest)).collect()
}

pub fn map_reply_pb(map: &DirtyMap) -> pb::ReadMapReply {
    let (void, bits) = dirty_pb(&map.dirty);
    pb::ReadMapReply { void, base: Some(epoch_pb(map.base)), bits }
}

pub fn map_reply(reply: &pb::ReadMapReply) -> Result<DirtyMap, Status> {
    let base = epoch(required(reply.base, "the map's base")?);
    Ok(DirtyMap { base, dirty: dirty(reply.void, &reply.bits) })
}

/// SetEpoch, with everyone who is absent and the epoch at which each left.
pub fn set_epoch_pb(
    session: Option<pb::Session>,
    epoch: Epoch,
    in_sync: &BTreeSet<ReplicaId>,
    absent: &BTreeMap<ReplicaId, Epoch>,
    record: &Versioned,
) -> pb::SetEpochRequest {
    let absent = absent
        .iter()
        .map(|(replica, left)| pb::AbsentReplica {
            replica_id: replica.to_string(),
            left_epoch: Some(epoch_pb(*left)),
        })
        .collect();
    let in_sync = in_sync.iter().map(ToString::to_string).collect();
    let record = record_copies::copy_of(record).as_ref().map(record_copies::to_wire);
    pb::SetEpochRequest { session, epoch: Some(epoch_pb(epoch)), in_sync, absent, record }
}

pub fn maps_pb(maps: &BTreeMap<ReplicaId, DirtyMap>) -> Vec<pb::DirtyMap> {
    let map_pb = |(absent, map): (&ReplicaId, &DirtyMap)| {
        let (void, bits) = dirty_pb(&map.dirty);
        pb::DirtyMap { absent_replica_id: absent.to_string(), base: Some(epoch_pb(map.base)), void, bits }
    };
    maps.iter().map(map_pb).collect()
}

pub fn maps(maps: &[pb::DirtyMap]) -> Result<BTreeMap<ReplicaId, DirtyMap>, Status> {
    let map = |map: &pb::DirtyMap| {
        let base = epoch(required(map.base, "a map's base")?);
        Ok((id(&map.absent_replica_id)?, DirtyMap { base, dirty: dirty(map.void, &map.bits) }))
    };
    maps.iter().map(map).collect()
}

fn dirty_pb(dirty: &Dirty) -> (bool, Vec<u8>) {
    match dirty {
        Dirty::Void => (true, Vec::new()),
        Dirty::Blocks(blocks) => (false, blocks.to_bytes()),
    }
}

fn dirty(void: bool, bits: &[u8]) -> Dirty {
    if void { Dirty::Void } else { Dirty::Blocks(BlockSet::from_bytes(bits)) }
}

/// The NBD export name of a session.
#[must_use]
pub fn export_name(
    volume: impl std::fmt::Display,
    replica: impl std::fmt::Display,
    token: impl std::fmt::Display,
) -> String {
    format!("{volume}/{replica}/{token}")
}
