//! The Replica service: control requests of targets on other nodes.

use std::sync::Arc;

use holdfast_proto::storage as pb;
use holdfast_proto::storage::replica_server::Replica;
use holdfast_service::record_copies;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{Region, ReplicaId, SessionToken};
use holdfast_storage_core::replica::{
    ControlOp, DataOp, DiskError, OpenRefusal, OpenReply, OpenRequest, ReplicaCall, ReplicaReply,
    RequestRefusal, SessionKey,
};
use tokio::sync::{oneshot, watch};
use tonic::{Request, Response, Status};

use crate::tls::Caller;
use crate::wire;

use super::host::ReplicaHost;
use super::machine::{ReplicaActor, ReplicaInput, SessionEnded, next_open_call};

/// Serves targets' control requests.
pub struct ReplicaService {
    /// The replicas.
    pub host: Arc<ReplicaHost>,
    /// Where their data is served; told in Open's answer.
    pub nbd_port: u16,
    /// Callers come with certificates, and a session is used by the node that opened it.
    pub tls: bool,
}

/// Opens a replica for a target; gives `None` if the replica fails first. Dropping the future takes the Open back.
pub async fn open(
    actor: &Arc<ReplicaActor>,
    request: OpenRequest,
    caller: Vec<String>,
    ended: Option<SessionEnded>,
) -> Option<Result<OpenReply, OpenRefusal>> {
    let call = next_open_call();
    let token = SessionToken(rand::random());
    let (sender, receiver) = oneshot::channel();
    let mut guard = CancelOnDrop { actor: Arc::clone(actor), call: Some(call) };
    let answer = Box::new(move |result| drop(sender.send(result)));
    actor.post(ReplicaInput::Open { call, request, token, caller, answer, ended });
    let result = receiver.await.ok();
    guard.call = None;
    result
}

struct CancelOnDrop {
    actor: Arc<ReplicaActor>,
    call: Option<ReplicaCall>,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(call) = self.call {
            self.actor.post(ReplicaInput::OpenCancelled(call));
        }
    }
}

/// A control request to a replica in this process; `None` if its session ended first.
pub async fn control(actor: &Arc<ReplicaActor>, key: SessionKey, op: ControlOp) -> Option<ReplicaReply> {
    let (sender, receiver) = oneshot::channel();
    let answer = Box::new(move |reply| drop(sender.send(reply)));
    actor.post(ReplicaInput::Control { key, op, answer });
    receiver.await.ok()
}

impl ReplicaService {
    fn find(&self, replica: ReplicaId) -> Result<Arc<ReplicaActor>, Status> {
        self.host
            .get(replica)
            .ok_or_else(|| Status::not_found(format!("replica {replica} is not open on this node")))
    }

    /// Runs a control request of a session, if its caller owns the session.
    async fn control(
        &self,
        session: Option<pb::Session>,
        names: &[String],
        op: ControlOp,
    ) -> Result<ReplicaReply, Status> {
        let (replica, key) = wire::session(session)?;
        let actor = self.find(replica)?;
        if !actor.peek(|machine| machine.is_owner(key.token, names)) {
            return Err(foreign_session(replica, names));
        }
        control(&actor, key, op).await.ok_or_else(session_over)
    }

    async fn done(
        &self,
        session: Option<pb::Session>,
        names: &[String],
        op: ControlOp,
    ) -> Result<(), Status> {
        match self.control(session, names, op).await? {
            ReplicaReply::Done(result) => result.map_err(refusal_status),
            ReplicaReply::Open(_)
            | ReplicaReply::Lease(_)
            | ReplicaReply::Verified(_)
            | ReplicaReply::Map(_) => Err(wrong_reply()),
        }
    }
}

/// A session's first connection must come up and no connection may go: one lost connection is the session lost (R5). Not
/// those to snapshots, which carry nothing that could be lost.
fn watch_connections(actor: &Arc<ReplicaActor>, token: SessionToken, mut live: watch::Receiver<usize>) {
    let actor = Arc::downgrade(actor);
    tokio::spawn(async move {
        let mut most = 0;
        loop {
            let now = *live.borrow_and_update();
            if now < most {
                if let Some(actor) = actor.upgrade() {
                    actor.post(ReplicaInput::ConnectionLost(token));
                }
                return;
            }
            most = now;
            if live.changed().await.is_err() {
                return;
            }
        }
    });
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    async fn open(&self, request: Request<pb::OpenRequest>) -> Result<Response<pb::OpenReply>, Status> {
        let caller = Caller::of(&request, self.tls)?.must_be_node(&request.get_ref().node)?;
        let request = wire::open_request(request.into_inner())?;
        let replica = request.replica_id;
        let actor = self.find(replica)?;
        let result = open(&actor, request, caller.clone(), None)
            .await
            .ok_or_else(|| Status::unavailable(format!("replica {replica} failed meanwhile")))?;
        if let Ok(opened) = &result
            && let Some(Ok(connections)) = actor.peek(|machine| machine.connections(opened.token, &caller))
        {
            watch_connections(&actor, opened.token, connections.data.watch_live());
        }
        Ok(Response::new(wire::open_reply_pb(result, self.nbd_port)))
    }

    async fn lease(&self, request: Request<pb::LeaseRequest>) -> Result<Response<pb::LeaseReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        match self.control(request.session, &names, ControlOp::Lease).await? {
            ReplicaReply::Lease(Ok(cache_lost)) => {
                Ok(Response::new(pb::LeaseReply { sequence: request.sequence, cache_lost }))
            }
            ReplicaReply::Lease(Err(refusal)) | ReplicaReply::Done(Err(refusal)) => {
                Err(refusal_status(refusal))
            }
            ReplicaReply::Open(_)
            | ReplicaReply::Done(Ok(()))
            | ReplicaReply::Verified(_)
            | ReplicaReply::Map(_) => Err(wrong_reply()),
        }
    }

    async fn release(
        &self,
        request: Request<pb::ReleaseRequest>,
    ) -> Result<Response<pb::ReleaseReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        self.done(request.into_inner().session, &names, ControlOp::Release).await?;
        Ok(Response::new(pb::ReleaseReply {}))
    }

    async fn set_epoch(
        &self,
        request: Request<pb::SetEpochRequest>,
    ) -> Result<Response<pb::SetEpochReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let absent = request.absent.iter().map(|absent| {
            let left = wire::epoch(wire::required(absent.left_epoch, "left_epoch")?);
            Ok((wire::id(&absent.replica_id)?, left))
        });
        let op = ControlOp::SetEpoch {
            epoch: wire::epoch(wire::required(request.epoch, "epoch")?),
            in_sync: wire::ids(&request.in_sync)?,
            absent: absent.collect::<Result<_, Status>>()?,
            copy: request.record.map(record_copies::from_wire).transpose()?,
        };
        self.done(request.session, &names, op).await?;
        Ok(Response::new(pb::SetEpochReply {}))
    }

    async fn keep_record(
        &self,
        request: Request<pb::KeepRecordRequest>,
    ) -> Result<Response<pb::KeepRecordReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        if let Some(copy) = request.record.map(record_copies::from_wire).transpose()? {
            self.done(request.session, &names, ControlOp::KeepRecord(copy)).await?;
        }
        Ok(Response::new(pb::KeepRecordReply {}))
    }

    async fn clear_log(
        &self,
        request: Request<pb::ClearLogRequest>,
    ) -> Result<Response<pb::ClearLogReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let regions = request.regions.iter().map(|region| Region(region.region)).collect();
        self.done(request.session, &names, ControlOp::ClearLog(regions)).await?;
        Ok(Response::new(pb::ClearLogReply {}))
    }

    async fn read_map(
        &self,
        request: Request<pb::ReadMapRequest>,
    ) -> Result<Response<pb::ReadMapReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let op = ControlOp::ReadMap(wire::id(&request.absent_replica_id)?);
        match self.control(request.session, &names, op).await? {
            ReplicaReply::Map(Ok(map)) => Ok(Response::new(wire::map_reply_pb(&map))),
            ReplicaReply::Map(Err(refusal)) | ReplicaReply::Done(Err(refusal)) => {
                Err(refusal_status(refusal))
            }
            ReplicaReply::Open(_)
            | ReplicaReply::Done(Ok(()))
            | ReplicaReply::Verified(_)
            | ReplicaReply::Lease(_) => Err(wrong_reply()),
        }
    }

    async fn verify(&self, request: Request<pb::VerifyRequest>) -> Result<Response<pb::VerifyReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let range = wire::region_range(request.start_block, request.blocks)?;
        match self.control(request.session, &names, ControlOp::Data(DataOp::Verify(range))).await? {
            ReplicaReply::Verified(blocks) => Ok(Response::new(wire::verified_pb(&blocks))),
            ReplicaReply::Done(Err(refusal)) => Err(refusal_status(refusal)),
            ReplicaReply::Open(_)
            | ReplicaReply::Done(Ok(()))
            | ReplicaReply::Map(_)
            | ReplicaReply::Lease(_) => Err(wrong_reply()),
        }
    }

    async fn mark_bad(
        &self,
        request: Request<pb::MarkBadRequest>,
    ) -> Result<Response<pb::MarkBadReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let range = wire::region_range(request.start_block, request.blocks)?;
        self.done(request.session, &names, ControlOp::Data(DataOp::MarkBad(range))).await?;
        Ok(Response::new(pb::MarkBadReply {}))
    }

    async fn adopt(&self, request: Request<pb::AdoptRequest>) -> Result<Response<pb::AdoptReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let range = wire::region_range(request.start_block, request.blocks)?;
        self.done(request.session, &names, ControlOp::Data(DataOp::Adopt(range))).await?;
        Ok(Response::new(pb::AdoptReply {}))
    }

    async fn fill_map(
        &self,
        request: Request<pb::FillMapRequest>,
    ) -> Result<Response<pb::FillMapReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let op = ControlOp::FillMap(wire::id(&request.absent_replica_id)?);
        self.done(request.session, &names, op).await?;
        Ok(Response::new(pb::FillMapReply {}))
    }

    async fn clear_map(
        &self,
        request: Request<pb::ClearMapRequest>,
    ) -> Result<Response<pb::ClearMapReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let op = ControlOp::ClearMap {
            absent: wire::id(&request.absent_replica_id)?,
            regions: request.regions.into_iter().map(Region).collect(),
        };
        self.done(request.session, &names, op).await?;
        Ok(Response::new(pb::ClearMapReply {}))
    }

    async fn merge_map(
        &self,
        request: Request<pb::MergeMapRequest>,
    ) -> Result<Response<pb::MergeMapReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let op = ControlOp::MergeMaps {
            epoch: wire::epoch(wire::required(request.epoch, "epoch")?),
            maps: wire::maps(&request.maps)?,
        };
        self.done(request.session, &names, op).await?;
        Ok(Response::new(pb::MergeMapReply {}))
    }

    async fn freeze(&self, request: Request<pb::FreezeRequest>) -> Result<Response<pb::FreezeReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let op = ControlOp::Freeze { snapshot: wire::id(&request.snapshot_id)? };
        self.done(request.session, &names, op).await?;
        Ok(Response::new(pb::FreezeReply {}))
    }

    async fn drop_snapshot(
        &self,
        request: Request<pb::DropSnapshotRequest>,
    ) -> Result<Response<pb::DropSnapshotReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let op = ControlOp::DropSnapshot { snapshot: wire::id(&request.snapshot_id)? };
        self.done(request.session, &names, op).await?;
        Ok(Response::new(pb::DropSnapshotReply {}))
    }

    async fn read_changes(
        &self,
        request: Request<pb::ReadChangesRequest>,
    ) -> Result<Response<pb::ReadChangesReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let (from, to) =
            (wire::maybe_id(&request.from_snapshot_id)?, wire::maybe_id(&request.to_snapshot_id)?);
        let range = wire::changes_range(request.start_block, request.blocks)?;
        let (replica, key) = wire::session(request.session)?;
        let actor = self.find(replica)?;
        // Nothing is changed, so it is no request of the session's: that the asker has one is enough.
        match actor.peek(|machine| machine.connections(key.token, &names)) {
            Some(Ok(_)) => {}
            Some(Err(_)) => return Err(foreign_session(replica, &names)),
            None => return Err(session_over()),
        }
        let disk = &actor.env.disk;
        let changed = holdfast_store::wait(disk, |done| disk.changed_blocks(from, to, range, done)).await;
        let changed = changed.map_err(|error| Status::data_loss(error.to_string()))?;
        let run = |run: BlockRange| pb::BlockRun { start_block: run.start.0, blocks: run.count };
        Ok(Response::new(pb::ReadChangesReply { runs: changed.into_iter().map(run).collect() }))
    }

    async fn grow(&self, request: Request<pb::GrowRequest>) -> Result<Response<pb::GrowReply>, Status> {
        let names = Caller::of(&request, self.tls)?.names();
        let request = request.into_inner();
        let op = ControlOp::Grow { size_bytes: request.size_bytes };
        self.done(request.session, &names, op).await?;
        Ok(Response::new(pb::GrowReply {}))
    }
}

fn foreign_session(replica: ReplicaId, names: &[String]) -> Status {
    tracing::warn!(%replica, ?names, "a control request for another node's session was refused");
    Status::permission_denied("the session belongs to another node")
}

fn session_over() -> Status {
    Status::failed_precondition(RequestRefusal::NoSession.to_string())
}

fn wrong_reply() -> Status {
    Status::internal("the replica answered another question")
}

fn refusal_status(refusal: RequestRefusal) -> Status {
    match refusal {
        RequestRefusal::NoSession | RequestRefusal::OldEpoch => {
            Status::failed_precondition(refusal.to_string())
        }
        RequestRefusal::Disk(error) => match error {
            DiskError::NoSpace => Status::resource_exhausted(refusal.to_string()),
            DiskError::SnapshotExists => Status::already_exists(refusal.to_string()),
            DiskError::LayersFull => Status::out_of_range(refusal.to_string()),
            DiskError::Corrupt | DiskError::Device | DiskError::NoSnapshot => {
                Status::data_loss(refusal.to_string())
            }
        },
        RequestRefusal::Invalid => Status::invalid_argument(refusal.to_string()),
    }
}
