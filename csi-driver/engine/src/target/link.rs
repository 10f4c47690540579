//! A target's way to one replica: in this process, or over gRPC and NBD to another node. Both are fenced alike, by the
//! replica's own state machine.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use holdfast_nbd::{BASE_ALLOCATION, Client, ExtentsCompletion};
use holdfast_proto::storage as pb;
use holdfast_proto::storage::replica_client::ReplicaClient;
use holdfast_service::record_copies;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{BlockSet, DirtyMap};
use holdfast_storage_core::ids::{BLOCK_BYTES, SnapshotId};
use holdfast_storage_core::record_store::Versioned;
use holdfast_storage_core::replica::{
    ControlOp, DataOp, DiskError, ReplicaReply, RequestRefusal, SessionKey,
};
use holdfast_storage_core::target::{Allocation, CallId, Control};
use holdfast_store::AllocState;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tonic::Code;
use tonic::transport::Channel;

use crate::replica::machine::{ReplicaActor, ReplicaInput};
use crate::replica::{grpc, provider};
use crate::{errno, wire};

use super::snapshot_reads::SnapshotReads;

/// One open session. Closed when it is dropped.
pub struct Link {
    path: Path,
    /// Control requests go one after the other: two epochs must not overtake each other on their way. Bounded by the
    /// few calls that the core has under way.
    controls: OnceLock<UnboundedSender<(CallId, Control)>>,
}

/// How the replica is reached.
pub enum Path {
    /// The replica is served by this process.
    Local {
        /// The replica.
        actor: Arc<ReplicaActor>,
        /// The session.
        key: SessionKey,
    },
    /// The replica is on another node.
    Remote(Box<RemoteLink>),
}

/// A session to another node.
pub struct RemoteLink {
    /// The NBD connection.
    pub client: Arc<Client>,
    /// The control connection.
    pub rpc: ReplicaClient<Channel>,
    /// Names the session in each control request.
    pub session: pb::Session,
    /// Reads the replica's snapshots.
    pub snapshots: SnapshotReads,
}

/// What a control request was answered.
pub enum ControlAnswer {
    /// Done.
    Done,
    /// The dirty map asked for.
    Map(DirtyMap),
    /// What verifies, with a digest.
    Verified(Vec<Option<u64>>),
    /// Where there is data.
    Extents(Vec<(BlockRange, Allocation)>),
    /// What was written between two snapshots.
    Changes(BlockSet),
}

/// Why a control request failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The replica says that the session is over.
    #[error("the session is over: {0}")]
    Over(String),
    /// The replica could not do it and has changed nothing; the session goes on.
    #[error("the replica refused: {0}")]
    Refused(DiskError),
    /// No answer, or one that says nothing about the session.
    #[error("the replica did not answer: {0}")]
    Silent(String),
}

impl Link {
    /// A session over this path.
    #[must_use]
    pub fn new(path: Path) -> Self {
        Self { path, controls: OnceLock::new() }
    }

    /// Queues a control request; `start` starts what takes the queue's requests, once.
    pub fn queue_control(
        &self,
        call: CallId,
        op: Control,
        start: impl FnOnce(UnboundedReceiver<(CallId, Control)>),
    ) {
        let queue = self.controls.get_or_init(|| {
            let (queue, queued) = unbounded_channel();
            start(queued);
            queue
        });
        // Refused only when the taker ended with its runtime: nobody waits for the answer then.
        let _ = queue.send((call, op));
    }

    /// Sends a data request.
    pub fn submit(&self, op: BlockOp, done: Completion) {
        match &self.path {
            Path::Local { actor, key } => {
                actor.post(ReplicaInput::Data { token: key.token, at: None, op, done });
            }
            Path::Remote(remote) => remote.client.submit(op, done),
        }
    }

    /// Reads blocks of a snapshot of the replica.
    pub async fn read_snapshot(&self, snapshot: SnapshotId, range: BlockRange) -> Result<Bytes, BlockError> {
        let offset = range.offset_bytes();
        let len = u32::try_from(range.len_bytes()).map_err(|_| BlockError(errno::EINVAL))?;
        match &self.path {
            Path::Local { actor, key } => {
                let (sender, receiver) = oneshot::channel();
                let done = Box::new(move |result| drop(sender.send(result)));
                let (token, op) = (key.token, BlockOp::Read { offset, len });
                actor.post(ReplicaInput::Data { token, at: Some(snapshot), op, done });
                receiver.await.unwrap_or(Err(BlockError(errno::ESHUTDOWN)))
            }
            Path::Remote(remote) => remote.snapshots.read(snapshot, offset, len).await,
        }
    }

    /// Asks for allocation states, as [`holdfast_nbd::BlockStatus`] does; no request of the session's, as nothing waits for
    /// it and nothing is changed: the target returns the answer under its leases (R4).
    pub fn block_status(&self, range: BlockRange, extents_max: usize, done: ExtentsCompletion) {
        let (offset, len) = (range.offset_bytes(), range.len_bytes());
        match &self.path {
            Path::Local { actor, .. } => {
                provider::allocation(&actor.env.disk, None, offset, len, extents_max, done);
            }
            Path::Remote(remote) => remote.client.block_status(BASE_ALLOCATION, offset, len, false, done),
        }
    }

    /// Ends the session from this side, without an answer.
    pub fn close(&self) {
        match &self.path {
            Path::Local { actor, key } => actor.post(ReplicaInput::ConnectionLost(key.token)),
            Path::Remote(remote) => remote.client.close(),
        }
    }

    /// Renews the lease; tells whether the replica's cache was lost.
    pub async fn lease(&self, sequence: u64) -> Result<bool, LinkError> {
        match &self.path {
            Path::Local { actor, key } => match grpc::control(actor, *key, ControlOp::Lease).await {
                Some(ReplicaReply::Lease(Ok(cache_lost))) => Ok(cache_lost),
                reply => Err(LinkError::Over(format!("{reply:?}"))),
            },
            Path::Remote(remote) => {
                let request = pb::LeaseRequest { session: Some(remote.session.clone()), sequence };
                let reply = remote.rpc.clone().lease(request).await.map_err(link_error)?;
                Ok(reply.into_inner().cache_lost)
            }
        }
    }

    /// Sends a control request.
    pub async fn control(&self, op: Control) -> Result<ControlAnswer, LinkError> {
        match (&self.path, op) {
            (Path::Local { actor, .. }, Control::ReadExtents(range)) => local_extents(actor, range).await,
            (Path::Local { actor, .. }, Control::ReadChanges { from, to, range }) => {
                local_changes(actor, from, to, range).await
            }
            (Path::Local { actor, key }, Control::KeepRecord(record)) => {
                local_keep(actor, *key, &record).await
            }
            (Path::Local { actor, key }, op) => match grpc::control(actor, *key, local_op(op)).await {
                Some(ReplicaReply::Done(Ok(()))) => Ok(ControlAnswer::Done),
                Some(ReplicaReply::Map(Ok(map))) => Ok(ControlAnswer::Map(map)),
                Some(ReplicaReply::Verified(blocks)) => Ok(ControlAnswer::Verified(blocks)),
                Some(ReplicaReply::Done(Err(RequestRefusal::Disk(error)))) if error.is_refusal() => {
                    Err(LinkError::Refused(error))
                }
                reply => Err(LinkError::Over(format!("{reply:?}"))),
            },
            (Path::Remote(remote), op) => remote.control(op).await,
        }
    }

    /// Counts blocks that are zero or data, of `size_bytes` (R36).
    pub async fn allocated_blocks(&self, size_bytes: u64) -> Result<u64, BlockError> {
        match &self.path {
            Path::Local { actor, .. } => holdfast_store::wait(&actor.env.disk, |done| {
                actor.env.disk.allocated_blocks(done);
            })
            .await
            .map_err(|error| BlockError(error.errno())),
            Path::Remote(remote) => remote.allocated_blocks(size_bytes).await,
        }
    }
}

impl RemoteLink {
    async fn control(&self, op: Control) -> Result<ControlAnswer, LinkError> {
        let mut rpc = self.rpc.clone();
        let session = Some(self.session.clone());
        match op {
            Control::SetEpoch { epoch, in_sync, absent, record } => {
                let request = wire::set_epoch_pb(session, epoch, &in_sync, &absent, &record);
                rpc.set_epoch(request).await.map_err(link_error)?;
            }
            Control::KeepRecord(record) => self.keep_record(&record).await?,
            Control::ClearLog(regions) => {
                let stamp = |region: &holdfast_storage_core::ids::Region| pb::RegionStamp {
                    region: region.0,
                    stamp: 0,
                };
                let request = pb::ClearLogRequest { session, regions: regions.iter().map(stamp).collect() };
                rpc.clear_log(request).await.map_err(link_error)?;
            }
            Control::ReadMap(absent) => {
                let request = pb::ReadMapRequest { session, absent_replica_id: absent.to_string() };
                let reply = rpc.read_map(request).await.map_err(link_error)?;
                return wire::map_reply(reply.get_ref()).map(ControlAnswer::Map).map_err(link_error);
            }
            Control::Verify(range) => return self.verify(range).await,
            Control::MarkBad(range) => self.mark_bad(range).await?,
            Control::Adopt(range) => self.adopt(range).await?,
            Control::ReadExtents(range) => {
                let extents = self.extents(range).await;
                return extents
                    .map(ControlAnswer::Extents)
                    .map_err(|error| LinkError::Silent(error.to_string()));
            }
            Control::FillMap(absent) => {
                let request = pb::FillMapRequest { session, absent_replica_id: absent.to_string() };
                rpc.fill_map(request).await.map_err(link_error)?;
            }
            Control::ClearMap { absent, regions } => {
                let regions = regions.iter().map(|region| region.0).collect();
                let absent_replica_id = absent.to_string();
                let request = pb::ClearMapRequest { session, absent_replica_id, regions };
                rpc.clear_map(request).await.map_err(link_error)?;
            }
            Control::ReadChanges { from, to, range } => return self.changes(from, to, range).await,
            Control::MergeMaps { epoch, maps } => {
                let request = pb::MergeMapRequest {
                    session,
                    epoch: Some(wire::epoch_pb(epoch)),
                    maps: wire::maps_pb(&maps),
                };
                rpc.merge_map(request).await.map_err(link_error)?;
            }
            Control::Freeze { snapshot } => {
                let request = pb::FreezeRequest { session, snapshot_id: snapshot.to_string() };
                rpc.freeze(request).await.map_err(layer_error)?;
            }
            Control::DropSnapshot { snapshot } => {
                let request = pb::DropSnapshotRequest { session, snapshot_id: snapshot.to_string() };
                rpc.drop_snapshot(request).await.map_err(layer_error)?;
            }
            Control::Grow { size_bytes } => {
                rpc.grow(pb::GrowRequest { session, size_bytes }).await.map_err(layer_error)?;
            }
            Control::Release => {
                rpc.release(pb::ReleaseRequest { session }).await.map_err(link_error)?;
            }
        }
        Ok(ControlAnswer::Done)
    }

    /// A release that does not know the call keeps no record.
    async fn keep_record(&self, record: &Versioned) -> Result<(), LinkError> {
        let session = Some(self.session.clone());
        let record = record_copies::copy_of(record).as_ref().map(record_copies::to_wire);
        match self.rpc.clone().keep_record(pb::KeepRecordRequest { session, record }).await {
            Err(status) if status.code() != Code::Unimplemented => Err(link_error(status)),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    async fn changes(
        &self,
        from: Option<SnapshotId>,
        to: Option<SnapshotId>,
        range: BlockRange,
    ) -> Result<ControlAnswer, LinkError> {
        let text = |snapshot: Option<SnapshotId>| snapshot.map(|s| s.to_string()).unwrap_or_default();
        let (from_snapshot_id, to_snapshot_id) = (text(from), text(to));
        let request = pb::ReadChangesRequest {
            session: Some(self.session.clone()),
            from_snapshot_id,
            to_snapshot_id,
            start_block: range.start.0,
            blocks: range.count,
        };
        let reply = self.rpc.clone().read_changes(request).await.map_err(link_error)?;
        wire::changes(reply.get_ref(), range).map(ControlAnswer::Changes).map_err(link_error)
    }

    async fn verify(&self, range: BlockRange) -> Result<ControlAnswer, LinkError> {
        let session = Some(self.session.clone());
        let request = pb::VerifyRequest { session, start_block: range.start.0, blocks: range.count };
        let reply = self.rpc.clone().verify(request).await.map_err(link_error)?;
        Ok(ControlAnswer::Verified(wire::verified(reply.get_ref())))
    }

    async fn mark_bad(&self, range: BlockRange) -> Result<(), LinkError> {
        let session = Some(self.session.clone());
        let request = pb::MarkBadRequest { session, start_block: range.start.0, blocks: range.count };
        self.rpc.clone().mark_bad(request).await.map(drop).map_err(link_error)
    }

    async fn adopt(&self, range: BlockRange) -> Result<(), LinkError> {
        let session = Some(self.session.clone());
        let request = pb::AdoptRequest { session, start_block: range.start.0, blocks: range.count };
        self.rpc.clone().adopt(request).await.map(drop).map_err(link_error)
    }

    async fn extents(&self, range: BlockRange) -> Result<Vec<(BlockRange, Allocation)>, BlockError> {
        let mut extents = Vec::new();
        let mut at = range.start.0;
        while at < range.end() {
            let (sender, receiver) = oneshot::channel();
            let then = Box::new(move |result| drop(sender.send(result)));
            let len = (range.end() - at) * BLOCK_BYTES;
            // The answer is as long as the replica cares to make it, and no longer than the question.
            self.client.block_status(BASE_ALLOCATION, at * BLOCK_BYTES, len, false, then);
            let before = at;
            for extent in receiver.await.unwrap_or(Err(BlockError(errno::ENOTCONN)))? {
                let count = extent.len / BLOCK_BYTES;
                if count == 0 {
                    break;
                }
                let allocation = match (extent.is_hole(), extent.is_zero()) {
                    (true, _) => Allocation::Absent,
                    (false, true) => Allocation::Zero,
                    (false, false) => Allocation::Data,
                };
                extents.push((BlockRange::new(at, count), allocation));
                at += count;
            }
            if at == before {
                return Err(BlockError(errno::EIO));
            }
        }
        Ok(extents)
    }

    async fn allocated_blocks(&self, size_bytes: u64) -> Result<u64, BlockError> {
        let extents = self.extents(BlockRange::new(0, size_bytes / BLOCK_BYTES)).await?;
        let allocated = extents.iter().filter(|(_, allocation)| *allocation != Allocation::Absent);
        Ok(allocated.map(|(range, _)| range.count).sum())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether a failed request says that its session is gone.
pub fn is_session_error(result: &Result<Bytes, BlockError>) -> bool {
    matches!(result, Err(BlockError(errno::ENOTCONN | errno::ESHUTDOWN)))
}

async fn local_changes(
    actor: &ReplicaActor,
    from: Option<SnapshotId>,
    to: Option<SnapshotId>,
    range: BlockRange,
) -> Result<ControlAnswer, LinkError> {
    let disk = &actor.env.disk;
    let read = holdfast_store::wait(disk, |done| disk.changed_blocks(from, to, range, done)).await;
    let mut changed = BlockSet::new();
    for run in read.map_err(|error| LinkError::Silent(error.to_string()))? {
        changed.insert(run);
    }
    Ok(ControlAnswer::Changes(changed))
}

async fn local_extents(actor: &ReplicaActor, range: BlockRange) -> Result<ControlAnswer, LinkError> {
    let disk = &actor.env.disk;
    let read = holdfast_store::wait(disk, |done| disk.allocation(range, done)).await;
    let extents = read.map_err(|error| LinkError::Silent(error.to_string()))?;
    let allocation = |state: AllocState| match state {
        AllocState::Absent => Allocation::Absent,
        AllocState::Zero => Allocation::Zero,
        AllocState::Data => Allocation::Data,
    };
    Ok(ControlAnswer::Extents(extents.into_iter().map(|e| (e.range, allocation(e.state))).collect()))
}

async fn local_keep(
    actor: &Arc<ReplicaActor>,
    key: SessionKey,
    record: &Versioned,
) -> Result<ControlAnswer, LinkError> {
    let Some(copy) = record_copies::copy_of(record) else { return Ok(ControlAnswer::Done) };
    match grpc::control(actor, key, ControlOp::KeepRecord(copy)).await {
        Some(ReplicaReply::Done(Ok(()))) => Ok(ControlAnswer::Done),
        reply => Err(LinkError::Over(format!("{reply:?}"))),
    }
}

fn local_op(op: Control) -> ControlOp {
    match op {
        Control::ReadExtents(_) | Control::ReadChanges { .. } => {
            unreachable!("answered beside the replica's state machine")
        }
        Control::Verify(range) => ControlOp::Data(DataOp::Verify(range)),
        Control::MarkBad(range) => ControlOp::Data(DataOp::MarkBad(range)),
        Control::Adopt(range) => ControlOp::Data(DataOp::Adopt(range)),
        Control::FillMap(absent) => ControlOp::FillMap(absent),
        Control::ClearMap { absent, regions } => ControlOp::ClearMap { absent, regions },
        Control::SetEpoch { epoch, in_sync, absent, record } => {
            ControlOp::SetEpoch { epoch, in_sync, absent, copy: record_copies::copy_of(&record) }
        }
        Control::KeepRecord(_) => unreachable!("a record that has no form is not sent"),
        Control::ClearLog(regions) => ControlOp::ClearLog(regions),
        Control::ReadMap(absent) => ControlOp::ReadMap(absent),
        Control::MergeMaps { epoch, maps } => ControlOp::MergeMaps { epoch, maps },
        Control::Freeze { snapshot } => ControlOp::Freeze { snapshot },
        Control::DropSnapshot { snapshot } => ControlOp::DropSnapshot { snapshot },
        Control::Grow { size_bytes } => ControlOp::Grow { size_bytes },
        Control::Release => ControlOp::Release,
    }
}

/// The error of a request that changes layers: some are refusals that leave the session whole.
fn layer_error(status: tonic::Status) -> LinkError {
    match status.code() {
        Code::ResourceExhausted => LinkError::Refused(DiskError::NoSpace),
        Code::AlreadyExists => LinkError::Refused(DiskError::SnapshotExists),
        Code::OutOfRange => LinkError::Refused(DiskError::LayersFull),
        _ => link_error(status),
    }
}

fn link_error(status: tonic::Status) -> LinkError {
    let text = status.message().to_owned();
    match status.code() {
        // The server's own words about the session; everything else may be the way there.
        Code::FailedPrecondition | Code::NotFound | Code::PermissionDenied | Code::DataLoss => {
            LinkError::Over(text)
        }
        _ => LinkError::Silent(text),
    }
}
