//! Letting targets in and out (R2 to R5, R19, R35).
//!
//! An Open waits, in this order, for: the lease term after a start (R3), the end of another target's lease or its
//! Release, the old session's connections closed, its I/O and control requests done, the generation durable.

use crate::ids::{Generation, SessionToken, TargetId};
use crate::timers::LEASE_MS;

use super::{
    ControlOp, DiskOp, DiskWait, OpenRefusal, OpenReply, OpenRequest, Replica, ReplicaAction, ReplicaCall,
    ReplicaMeta, ReplicaReply, RequestRefusal, SessionKey,
};

/// Lease calls held back at most; the oldest is refused beyond.
const HELD_LEASES_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Session {
    pub generation: Generation,
    pub target_id: TargetId,
    pub token: SessionToken,
    /// Data requests on the disk.
    pub io: u32,
    /// Control requests under way.
    pub control: u32,
    /// Told to close; nothing of it is answered any more.
    pub closing: bool,
    /// The engine closed its connections.
    pub closed: bool,
    /// MergeMaps was served: the next Epoch that names this replica a member completes its join.
    pub joining: bool,
}

#[derive(Debug)]
pub(super) struct Opening {
    call: ReplicaCall,
    pub request: OpenRequest,
    token: SessionToken,
    /// Disk operations left, once the old session is gone.
    persisting: Option<u32>,
}

/// A lease outlives its session: the target may not know yet that it lost it.
#[derive(Debug)]
pub(super) struct Lease {
    target_id: TargetId,
    end_ms: u64,
}

impl Replica {
    pub(super) fn on_open(&mut self, call: ReplicaCall, request: OpenRequest, token: SessionToken) {
        if let Err(refusal) = self.check_open(&request) {
            return self.reply(call, ReplicaReply::Open(Err(refusal)));
        }
        // R27: it names the snapshots that were committed when it was sent, and would drop those since then.
        let target_id = request.target_id;
        let late = |(target, sequence): (TargetId, u64)| target == target_id && request.sequence < sequence;
        if self.last_open.is_some_and(late) {
            return self.reply(call, ReplicaReply::Open(Err(OpenRefusal::Busy)));
        }
        if let Some(current) = &self.opening {
            if current.persisting.is_some() || current.request.generation > request.generation {
                return self.reply(call, ReplicaReply::Open(Err(OpenRefusal::Busy)));
            }
            let superseded = current.call;
            self.reply(superseded, ReplicaReply::Open(Err(OpenRefusal::Busy)));
        }
        self.last_open = Some((target_id, request.sequence));
        self.opening = Some(Opening { call, request, token, persisting: None });
    }

    /// R26: an operator made this replica the only member, under another lineage. What it knew of the old one, generations
    /// and epochs, is over; it is as large as it is. Once it is let in under the new lineage this holds no more.
    fn is_promoted(&self, request: &OpenRequest) -> bool {
        request.lineage != self.meta.lineage
            && request.promoted_from == Some(self.meta.lineage)
            && request.in_sync.iter().eq([&self.meta.replica_id])
    }

    fn check_open(&self, request: &OpenRequest) -> Result<(), OpenRefusal> {
        let meta = &self.meta;
        if request.volume_id != meta.volume_id || request.replica_id != meta.replica_id {
            return Err(OpenRefusal::WrongReplica);
        }
        if self.is_promoted(request) {
            return Ok(());
        }
        let other_target = meta.target_id.is_some_and(|target| target != request.target_id);
        if request.generation < meta.generation || (request.generation == meta.generation && other_target) {
            return Err(OpenRefusal::Fenced(meta.generation));
        }
        // R35: a record that knows less than this replica, or something else, was restored from a backup.
        let later = meta.epoch.number > request.epoch.number;
        let other = meta.epoch.number == request.epoch.number && meta.epoch.nonce != request.epoch.nonce;
        if (later || other || request.lineage != meta.lineage) && self.guards.otherhistory {
            return Err(OpenRefusal::Restored(meta.epoch));
        }
        // R31: a member has the record's size; one that returns may be smaller and is grown first.
        if meta.size_bytes < request.size_bytes && request.in_sync.contains(&meta.replica_id) {
            return Err(OpenRefusal::WrongReplica);
        }
        Ok(())
    }

    /// R2: the old target's lease is renewed again if the asker vanishes before it was let in.
    pub(super) fn on_open_cancelled(&mut self, call: ReplicaCall) {
        let waiting = self.opening.as_ref().is_some_and(|o| o.call == call && o.persisting.is_none());
        if !waiting {
            return;
        }
        self.opening = None;
        for held in std::mem::take(&mut self.held_leases) {
            if let Some(session) = self.session.as_ref().filter(|s| !s.closing) {
                let key = SessionKey {
                    generation: session.generation,
                    target_id: session.target_id,
                    token: session.token,
                };
                self.grant_lease(held, key);
            }
        }
    }

    /// When the pending Open can go on by the clock alone.
    pub(super) fn open_wait_until(&self) -> Option<u64> {
        let opening = self.opening.as_ref().filter(|o| o.persisting.is_none())?;
        let until = self.start_wait(opening).max(self.lease_wait(opening));
        (until > self.now_ms).then_some(until)
    }

    fn start_wait(&self, opening: &Opening) -> u64 {
        let same = self.meta.target_id == Some(opening.request.target_id);
        if same { 0 } else { self.not_before_ms }
    }

    fn lease_wait(&self, opening: &Opening) -> u64 {
        match &self.lease {
            Some(lease) if lease.target_id != opening.request.target_id && self.guards.lease => lease.end_ms,
            _ => 0,
        }
    }

    pub(super) fn advance_open(&mut self) {
        let Some(opening) = self.opening.as_ref().filter(|o| o.persisting.is_none()) else { return };
        if self.open_wait_until().is_some() || self.failed {
            return;
        }
        let target = opening.request.target_id;
        let (generation, lineage, epoch) =
            (opening.request.generation, opening.request.lineage, opening.request.epoch);
        let promoted = self.is_promoted(&opening.request);
        let copy = opening.request.copy.clone();
        let cookie = u64::try_from(opening.token.0 & u128::from(u64::MAX)).expect("masked to 64 bits");
        if let Some(session) = &self.session {
            let token = session.token;
            let drained = session.closed && (!self.guards.drain || (session.io == 0 && session.control == 0));
            self.close_session(token);
            if !drained {
                return;
            }
            self.session = None;
        }
        self.lease = None;
        self.held_leases.clear();
        if promoted {
            self.meta.lineage = lineage;
            self.meta.epoch = epoch;
        }
        self.meta.generation = generation;
        self.meta.target_id = Some(target);
        self.meta.cookie = cookie;
        self.meta.lease_ms = LEASE_MS;
        // The copy first: no replica knows a generation, or lacks a layer, that its own copy does not know of (ADR 0011).
        let mut ops: Vec<DiskOp> =
            copy.filter(|_| self.guards.copyfirst).map(DiskOp::KeepRecord).into_iter().collect();
        ops.extend(self.drop_uncommitted());
        ops.push(DiskOp::PersistMeta(self.durable_meta()));
        ops.push(DiskOp::SetBootCookie(cookie));
        if let Some(opening) = &mut self.opening {
            opening.persisting = Some(u32::try_from(ops.len()).expect("few layers per replica"));
        }
        for op in ops {
            self.emit_disk(op, DiskWait::Open);
        }
    }

    /// The meta as it goes to disk.
    pub(super) fn durable_meta(&self) -> ReplicaMeta {
        let mut meta = self.meta.clone();
        if !self.guards.genpersist {
            meta.generation = Generation(0);
            meta.target_id = None;
        }
        if !self.guards.loststicky {
            meta.cache_lost = false;
        }
        meta
    }

    pub(super) fn on_open_persisted(&mut self) {
        let Some(opening) = &mut self.opening else { return };
        let left = opening.persisting.map_or(0, |left| left - 1);
        opening.persisting = Some(left);
        if left > 0 {
            return;
        }
        let Some(Opening { call, request, token, .. }) = self.opening.take() else { return };
        self.session = Some(Session {
            generation: request.generation,
            target_id: request.target_id,
            token,
            io: 0,
            control: 0,
            closing: false,
            closed: false,
            joining: false,
        });
        let maps = self.maps.iter().map(|(absent, map)| {
            let known = matches!(map.dirty, crate::dirty_map::Dirty::Blocks(_));
            (*absent, known.then_some(map.base))
        });
        let reply = OpenReply {
            token,
            cache_lost: self.meta.cache_lost,
            logged: self.whole_log().into_iter().collect(),
            maps: maps.collect(),
            size_bytes: self.meta.size_bytes,
            epoch: self.meta.epoch,
            snapshots: self.snapshots.clone(),
        };
        if !self.guards.loststicky {
            self.meta.cache_lost = false;
        }
        self.reply(call, ReplicaReply::Open(Ok(reply)));
    }

    /// Ends a session; its lease goes on.
    pub(super) fn close_session(&mut self, token: SessionToken) {
        let Some(session) = self.session.as_mut().filter(|s| s.token == token && !s.closing) else { return };
        session.closing = true;
        self.held_leases.clear();
        self.drop_waiting(token);
        self.cancel_freeze();
        self.actions.push_back(ReplicaAction::CloseConnections { token });
    }

    /// R5: a session is all its connections.
    pub(super) fn on_connection_lost(&mut self, token: SessionToken) {
        self.close_session(token);
    }

    pub(super) fn on_connections_closed(&mut self, token: SessionToken) {
        if let Some(session) = self.session.as_mut().filter(|s| s.token == token) {
            session.closed = true;
        }
    }

    /// Fences control like data (R5), then serves leases here and the rest in `control`.
    pub(super) fn on_control(&mut self, call: ReplicaCall, key: SessionKey, op: ControlOp) {
        let live = self.session.as_ref().is_some_and(|s| {
            let same = (s.generation, s.target_id, s.token) == (key.generation, key.target_id, key.token);
            !s.closing && (same || (!self.guards.ctlfence && !matches!(op, ControlOp::Lease)))
        });
        if !live {
            let refusal = Err(RequestRefusal::NoSession);
            return match op {
                ControlOp::Lease => self.reply(call, ReplicaReply::Lease(refusal.map(|()| false))),
                _ => self.refuse(call, RequestRefusal::NoSession),
            };
        }
        match op {
            ControlOp::Lease => self.on_lease(call, key),
            ControlOp::Release => {
                self.lease = None;
                self.reply(call, ReplicaReply::Done(Ok(())));
                self.close_session(key.token);
            }
            ControlOp::SetEpoch { epoch, in_sync, absent, copy } => {
                self.on_set_epoch(call, epoch, &in_sync, &absent, copy)
            }
            ControlOp::KeepRecord(copy) => self.on_keep_record(call, copy),
            ControlOp::ClearLog(regions) => self.on_clear_log(call, &regions),
            ControlOp::ReadMap(absent) => self.on_read_map(call, absent),
            ControlOp::Data(op) => self.on_data(call, key.token, op),
            ControlOp::FillMap(absent) => self.on_fill_map(call, absent),
            ControlOp::ClearMap { absent, regions } => self.on_clear_map(call, absent, &regions),
            ControlOp::MergeMaps { epoch, maps } => self.on_merge_maps(call, epoch, maps),
            ControlOp::Freeze { snapshot } => self.on_freeze(call, snapshot),
            ControlOp::DropSnapshot { snapshot } => self.on_drop_snapshot(call, snapshot),
            ControlOp::Grow { size_bytes } => self.on_grow(call, size_bytes),
        }
    }

    fn on_lease(&mut self, call: ReplicaCall, key: SessionKey) {
        let other = self.opening.as_ref().is_some_and(|o| o.request.target_id != key.target_id);
        if !other {
            return self.grant_lease(call, key);
        }
        // R2: renewals would starve the target that waits; no answer is no renewal.
        self.held_leases.push_back(call);
        if self.held_leases.len() > HELD_LEASES_MAX
            && let Some(oldest) = self.held_leases.pop_front()
        {
            self.reply(oldest, ReplicaReply::Lease(Err(RequestRefusal::NoSession)));
        }
    }

    fn grant_lease(&mut self, call: ReplicaCall, key: SessionKey) {
        self.lease = Some(Lease { target_id: key.target_id, end_ms: self.now_ms + LEASE_MS });
        self.reply(call, ReplicaReply::Lease(Ok(self.meta.cache_lost)));
    }
}
