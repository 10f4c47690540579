//! Sessions with the replicas: opening, heartbeats and leases, deadlines, losing and resuming them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::ids::{NodeName, RecordVersion, Region, ReplicaId, SnapshotId};
use crate::record::ReplicaState;
use crate::replica::{DataOp, OpenRefusal};
use crate::timers;

use super::calls::CallKind;
use super::{
    CallId, Control, IoError, IoId, OpenSession, Opened, Payload, SessionId, Target, TargetAction,
    TargetState,
};

/// Heartbeats in flight at most; further ones are not sent until one is answered or the replica is silent.
const HEARTBEATS_MAX: usize = 8;

/// What a target knows of a replica.
#[derive(Debug)]
pub(super) struct Peer {
    pub node: NodeName,
    pub link: Link,
    /// Tries to open it that failed in a row.
    pub failures: u32,
    pub retry_at_ms: u64,
    /// As it said last.
    pub size_bytes: u64,
    /// Its cache was lost when it was opened last (R12).
    pub cache_lost: bool,
    /// It was, and this target went on from what is there (R12). The replica says so until that is reconciled, and a later target
    /// believes it.
    pub loss_accepted: bool,
    /// When the last heartbeat that it answered was sent, or it was opened; none if the clocks stood still since (R4).
    pub heard_ms: Option<u64>,
    /// A fault other than a broken session: it must leave the set.
    pub expelled: bool,
    /// Of which version of the record its session was sent a copy last, and of which it has one.
    pub copy_sent: RecordVersion,
    pub copy_kept: RecordVersion,
    pub resync_bytes_done: u64,
    pub resync_bytes_total: u64,
    /// By all resyncs of this target.
    pub resync_bytes_copied: u64,
}

#[derive(Debug)]
pub(super) enum Link {
    Closed,
    Opening { session: SessionId, since_ms: u64 },
    Open(Box<Session>),
}

#[derive(Debug)]
pub(super) struct Session {
    pub id: SessionId,
    /// I/O and calls without an answer, by their number (which grows), with the time they were sent.
    pub pending: BTreeMap<u64, u64>,
    pub last_heard_ms: u64,
    pub next_heartbeat_ms: u64,
    sequence: u64,
    /// Heartbeats in flight: number and time of sending.
    pub heartbeats: VecDeque<(u64, u64)>,
    pub lease_end_ms: u64,
    /// What its Open said was logged.
    pub logged: Vec<Region>,
}

/// An I/O in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct IoEntry {
    pub replica: ReplicaId,
    pub owner: IoOwner,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum IoOwner {
    Task(u64),
    Flush(u64),
}

impl Peer {
    pub(super) fn new(node: NodeName) -> Self {
        Self {
            node,
            link: Link::Closed,
            failures: 0,
            retry_at_ms: 0,
            size_bytes: 0,
            cache_lost: false,
            loss_accepted: false,
            heard_ms: None,
            expelled: false,
            copy_sent: RecordVersion(0),
            copy_kept: RecordVersion(0),
            resync_bytes_done: 0,
            resync_bytes_total: 0,
            resync_bytes_copied: 0,
        }
    }

    pub(super) fn session(&self) -> Option<&Session> {
        match &self.link {
            Link::Open(session) => Some(session),
            Link::Closed | Link::Opening { .. } => None,
        }
    }

    pub(super) fn session_mut(&mut self) -> Option<&mut Session> {
        match &mut self.link {
            Link::Open(session) => Some(session),
            Link::Closed | Link::Opening { .. } => None,
        }
    }

    fn session_id(&self) -> Option<SessionId> {
        match &self.link {
            Link::Open(session) => Some(session.id),
            Link::Opening { session, .. } => Some(*session),
            Link::Closed => None,
        }
    }
}

impl Target {
    pub(super) fn is_open(&self, replica: ReplicaId) -> bool {
        self.peers.get(&replica).is_some_and(|peer| peer.session().is_some())
    }

    /// Open, and nothing is known against it: it may be read from and may carry the set on alone (R9).
    pub(super) fn is_good(&self, replica: ReplicaId) -> bool {
        let kept = |lost: bool| !lost || !self.guards.keepgood;
        self.peers.get(&replica).is_some_and(|p| p.session().is_some() && !p.expelled && kept(p.cache_lost))
    }

    fn replica_of(&self, session: SessionId) -> Option<ReplicaId> {
        self.peers.iter().find(|(_, peer)| peer.session_id() == Some(session)).map(|(replica, _)| *replica)
    }

    pub(super) fn peer_timeout(&self, peer: &Peer) -> u64 {
        match &peer.link {
            Link::Closed => u64::MAX,
            Link::Opening { since_ms, .. } => {
                (since_ms + timers::OPEN_PATIENCE_MS).max(self.patient_until_ms)
            }
            Link::Open(session) => self.session_timeout(session),
        }
    }

    /// Starts the tries to open that are due.
    pub(super) fn pump_sessions(&mut self) {
        if self.generation.is_none() || self.stopping.is_some() {
            return;
        }
        let wanted: Vec<ReplicaId> = self
            .peers
            .iter()
            .filter(|(replica, peer)| {
                matches!(peer.link, Link::Closed)
                    && peer.retry_at_ms <= self.now_ms
                    && self.wants_session(**replica)
            })
            .map(|(replica, _)| *replica)
            .collect();
        for replica in wanted {
            self.open(replica);
        }
    }

    /// Members always: one that can be swapped out instead soon is no member. Others when it is their turn to catch up.
    fn wants_session(&self, replica: ReplicaId) -> bool {
        if self.catching_up() == Some(replica) || self.next_turn() == Some(replica) || self.awaits_all() {
            return true;
        }
        let leaving = self.pending.as_ref().is_some_and(|p| !p.proposed.in_sync.contains(&replica));
        self.is_member(replica) && !leaving
    }

    fn open(&mut self, replica: ReplicaId) {
        let session = SessionId(self.new_id());
        let (Some(read), Some(generation)) = (self.record.clone(), self.generation) else { return };
        let (version, record) = (read.version, &read.record);
        let open = OpenSession {
            session,
            replica,
            node: record.replicas.get(&replica).map_or_else(|| NodeName(String::new()), |r| r.node.clone()),
            volume_id: record.volume_id,
            generation,
            target_id: self.config.target_id,
            lineage: record.lineage,
            promoted_from: record.promoted.filter(|p| p.replica == replica).map(|p| p.from),
            epoch: record.epoch,
            in_sync: record.in_sync.clone(),
            size_bytes: record.size_bytes,
            snapshots: self.layers_of(replica),
            record: Box::new(read.clone()),
        };
        let now = self.now_ms;
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.link = Link::Opening { session, since_ms: now };
            peer.copy_sent = version;
        }
        self.emit(TargetAction::Open(open));
    }

    pub(super) fn on_opened(&mut self, session: SessionId, opened: Opened) {
        let Some(replica) = self.replica_of(session) else { return };
        let now = self.now_ms;
        let Some(peer) = self.peers.get_mut(&replica) else { return };
        if !matches!(peer.link, Link::Opening { .. }) {
            return;
        }
        self.check_given_up(replica);
        let Some(peer) = self.peers.get_mut(&replica) else { return };
        peer.failures = 0;
        peer.heard_ms = Some(now);
        let layers = opened.snapshots;
        peer.size_bytes = opened.size_bytes;
        peer.copy_kept = peer.copy_sent;
        peer.cache_lost = opened.cache_lost && (self.guards.lostsrc || self.state == TargetState::Serving);
        peer.loss_accepted = false;
        peer.expelled = false;
        peer.link = Link::Open(Box::new(Session {
            id: session,
            pending: BTreeMap::new(),
            last_heard_ms: now,
            next_heartbeat_ms: now,
            sequence: 0,
            heartbeats: VecDeque::new(),
            lease_end_ms: 0,
            logged: opened.logged,
        }));
        self.dirty = true;
        self.told.remove(&replica);
        if !self.check_layers(replica, &layers) {
            return self.lose(replica);
        }
        self.heartbeat(replica);
        if self.state == TargetState::Serving && self.is_member(replica) {
            self.resume(replica);
        }
        if self.grow_first(replica) {
            return;
        }
        if self.catching_up() == Some(replica) {
            self.catch_up_opened(replica);
        } else if self.next_turn() == Some(replica) {
            self.take_turn(replica);
        }
    }

    /// A layer that was deleted while Open was under way is dropped now. A replica that lacks one which the record says
    /// it holds is not what the record says: it is not let in.
    fn check_layers(&mut self, replica: ReplicaId, layers: &[SnapshotId]) -> bool {
        let wanted = self.layers_of(replica);
        for snapshot in layers.iter().copied().filter(|snapshot| !wanted.contains(snapshot)) {
            self.send_control(replica, CallKind::Drop(snapshot), Control::DropSnapshot { snapshot });
        }
        wanted.iter().all(|snapshot| layers.contains(snapshot))
    }

    /// R14: the same target is back at a member that kept its cache: what it had not answered is sent again.
    fn resume(&mut self, replica: ReplicaId) {
        let cache_lost = self.peers.get(&replica).is_some_and(|peer| peer.cache_lost);
        if cache_lost && self.guards.keepgood {
            // Acknowledged writes may be gone there: it must leave, or nobody may serve (R12). `pump_config` decides.
            return;
        }
        let logged =
            self.peers.get(&replica).and_then(Peer::session).map(|s| s.logged.clone()).unwrap_or_default();
        for region in logged {
            self.is_logged_by_member(region);
        }
        self.resend(replica);
    }

    pub(super) fn on_open_refused(&mut self, session: SessionId, refusal: OpenRefusal) {
        let Some(replica) = self.replica_of(session) else { return };
        match refusal {
            OpenRefusal::Fenced(generation) => {
                self.fence(format!("replica {replica} was opened for generation {generation}"));
            }
            OpenRefusal::Restored(_) if self.guards.allanswer => self.on_other_history(replica, refusal),
            // R35: nobody may serve on a set with a member that knows another history.
            OpenRefusal::Restored(_) | OpenRefusal::WrongReplica if self.is_member(replica) => {
                self.fail(format!("replica {replica}: {refusal}"));
            }
            OpenRefusal::Restored(_)
            | OpenRefusal::WrongReplica
            | OpenRefusal::Busy
            | OpenRefusal::DiskFailed => {
                self.on_open_failed(session);
            }
        }
    }

    pub(super) fn on_open_failed(&mut self, session: SessionId) {
        if let Some(replica) = self.replica_of(session) {
            self.lose(replica);
        }
    }

    pub(super) fn on_session_lost(&mut self, session: SessionId) {
        let Some(replica) = self.replica_of(session) else { return };
        if self.is_releasing() {
            // A released session ends: that is no loss, and the other releases must still go out.
            self.close_link(replica);
            self.calls.retain(|_, call| call.replica != replica);
            self.dirty = true;
            return;
        }
        self.lose(replica);
    }

    /// A fault of a replica that still talks: its session ends, and it leaves the set if another can go on without it.
    pub(super) fn expel(&mut self, replica: ReplicaId) {
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.expelled = true;
        }
        self.lose(replica);
    }

    /// A session, or a try to open one, is over.
    pub(super) fn lose(&mut self, replica: ReplicaId) {
        self.close_link(replica);
        let now = self.now_ms;
        if let Some(peer) = self.peers.get_mut(&replica) {
            let pause = timers::REOPEN_MIN_MS << peer.failures.min(4);
            peer.retry_at_ms = now + if peer.failures == 0 { 0 } else { pause.min(timers::REOPEN_MAX_MS) };
            peer.failures += 1;
        }
        self.told.remove(&replica);
        self.job_session_lost(replica);
        self.dirty = true;
        let lost: Vec<(IoId, IoEntry)> = {
            let mut lost: Vec<_> = Vec::new();
            self.ios.retain(|io, entry| {
                if entry.replica == replica {
                    lost.push((*io, *entry));
                }
                entry.replica != replica
            });
            lost.sort_by_key(|(io, _)| *io);
            lost
        };
        for (_, entry) in lost {
            match entry.owner {
                IoOwner::Task(task) => self.task_io_lost(task, replica),
                IoOwner::Flush(flush) => self.flush_io_lost(flush, replica),
            }
        }
        let calls: Vec<CallId> =
            self.calls.iter().filter(|(_, call)| call.replica == replica).map(|(id, _)| *id).collect();
        for call in calls {
            match self.calls.remove(&call).map(|call| call.kind) {
                Some(CallKind::Clear) => self.clear_answered(call),
                Some(CallKind::Task(task)) => self.task_call_ended(task),
                _ => {}
            }
        }
        if self.catching_up() == Some(replica) {
            self.abort_catch_up();
        }
    }

    /// Closes without conclusions.
    pub(super) fn close_link(&mut self, replica: ReplicaId) {
        let Some(peer) = self.peers.get_mut(&replica) else { return };
        let session = peer.session_id();
        peer.link = Link::Closed;
        if let Some(session) = session {
            self.emit(TargetAction::CloseSession { session, replica });
        }
    }

    pub(super) fn tick_peers(&mut self) {
        let replicas: Vec<ReplicaId> = self.peers.keys().copied().collect();
        for replica in replicas {
            self.tick_peer(replica);
        }
    }

    fn tick_peer(&mut self, replica: ReplicaId) {
        let now = self.now_ms;
        let patient = now < self.patient_until_ms;
        let may_leave = self.can_go_on_without(replica);
        let Some(peer) = self.peers.get(&replica) else { return };
        match &peer.link {
            Link::Closed => {}
            Link::Opening { since_ms, .. } => {
                if now >= since_ms + timers::OPEN_PATIENCE_MS && !patient {
                    self.lose(replica);
                }
            }
            Link::Open(session) => {
                let silent = !self.idle.now && now >= session.last_heard_ms + timers::SILENT_MS;
                let slow =
                    session.pending.first_key_value().map_or(0, |(_, since)| now.saturating_sub(*since));
                let hung = slow >= timers::SOLE_IO_DEADLINE_MS;
                let slow = slow >= timers::IO_DEADLINE_MS;
                if silent && !patient {
                    self.lose(replica);
                } else if slow && !patient && may_leave {
                    self.expel(replica);
                } else if hung && !patient {
                    // Nobody else could go on; asking again over a new session cures an answer that got lost (R14).
                    self.lose(replica);
                } else if now >= self.heartbeat_due_ms(session) {
                    self.heartbeat(replica);
                }
            }
        }
    }

    fn heartbeat(&mut self, replica: ReplicaId) {
        let now = self.now_ms;
        let Some(session) = self.peers.get_mut(&replica).and_then(Peer::session_mut) else { return };
        // On the clock's own marks, so that all volumes of a node send theirs at once and wake its threads once.
        session.next_heartbeat_ms = now - now % timers::HEARTBEAT_MS + timers::HEARTBEAT_MS;
        if session.heartbeats.len() >= HEARTBEATS_MAX {
            return;
        }
        session.sequence += 1;
        let (id, sequence) = (session.id, session.sequence);
        session.heartbeats.push_back((sequence, now));
        self.emit(TargetAction::Heartbeat { session: id, replica, sequence });
    }

    pub(super) fn on_heartbeat_answered(&mut self, session: SessionId, sequence: u64, cache_lost: bool) {
        let Some(replica) = self.replica_of(session) else { return };
        let (now, drift) = (self.now_ms, self.guards.drift);
        let Some(open) = self.peers.get_mut(&replica).and_then(Peer::session_mut) else { return };
        let Some(at) = open.heartbeats.iter().position(|(number, _)| *number == sequence) else { return };
        let (_, sent_ms) = open.heartbeats[at];
        open.heartbeats.drain(..=at);
        open.last_heard_ms = now;
        let heard_ms = Some(sent_ms);
        // R4: counted from sending.
        let end_ms = if drift { timers::lease_end_at_target(sent_ms) } else { sent_ms + timers::LEASE_MS };
        open.lease_end_ms = open.lease_end_ms.max(end_ms);
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.heard_ms = heard_ms;
            // R19: it ends at the replica once what was lost is reconciled there.
            peer.cache_lost &= cache_lost;
            peer.loss_accepted &= cache_lost;
        }
        self.recompute_leases();
        self.release_reads();
    }

    pub(super) fn recompute_leases(&mut self) {
        let end = |replica: &ReplicaId| {
            self.peers.get(replica).and_then(Peer::session).map_or(0, |session| session.lease_end_ms)
        };
        self.leases_until_ms = self.ack_set.iter().map(end).min().unwrap_or(0);
    }

    /// R4: this machine's clocks stood still, for how long nobody knows: no lease counts any more, nor one whose
    /// heartbeat was sent before. Nobody is called silent for what this machine slept through (R6).
    pub(super) fn on_clock_jumped(&mut self) {
        if !self.guards.walljump {
            return;
        }
        let now = self.now_ms;
        self.patient_until_ms = now + timers::TICK_GAP_MS;
        self.history.forget();
        for peer in self.peers.values_mut() {
            peer.heard_ms = None;
        }
        for session in self.peers.values_mut().filter_map(Peer::session_mut) {
            session.lease_end_ms = 0;
            session.heartbeats.clear();
            session.next_heartbeat_ms = now;
        }
        self.tick_peers();
        self.recompute_leases();
    }

    /// R4: whether the leases of the whole ack set hold now.
    pub(super) fn leases_hold(&self) -> bool {
        self.now_ms < self.leases_until_ms || !self.guards.lease
    }

    /// Sends an I/O; `None` if the replica has no session.
    pub(super) fn send_io(
        &mut self,
        replica: ReplicaId,
        owner: IoOwner,
        op: DataOp,
        payload: Payload,
    ) -> Option<IoId> {
        let id = self.new_id();
        let now = self.now_ms;
        let session = self.peers.get_mut(&replica).and_then(Peer::session_mut)?;
        session.pending.insert(id, now);
        let session = session.id;
        let io = IoId(id);
        self.ios.insert(io, IoEntry { replica, owner });
        self.emit(TargetAction::Io { io, session, replica, op, payload });
        Some(io)
    }

    pub(super) fn on_io_done(&mut self, io: IoId, result: Result<(), IoError>) {
        let Some(IoEntry { replica, owner }) = self.ios.remove(&io) else { return };
        if let Some(session) = self.peers.get_mut(&replica).and_then(Peer::session_mut) {
            session.pending.remove(&io.0);
        }
        match owner {
            IoOwner::Task(task) => self.task_io_done(task, replica, result),
            IoOwner::Flush(flush) => self.flush_io_done(flush, replica, result),
        }
    }

    pub(super) fn release_all(&mut self) {
        let open: Vec<ReplicaId> =
            self.peers.iter().filter(|(_, p)| p.session().is_some()).map(|(replica, _)| *replica).collect();
        for replica in open {
            self.send_control(replica, CallKind::Release, Control::Release);
        }
        self.dirty = true;
    }

    /// The replica to read from: the local one if it is in the set, else one after the other. `tried` are left out.
    pub(super) fn choose_reader(&mut self, tried: &BTreeSet<ReplicaId>) -> Option<ReplicaId> {
        let candidates: Vec<ReplicaId> =
            self.deciding().into_iter().filter(|r| self.is_good(*r) && !tried.contains(r)).collect();
        let local = candidates.iter().find(|r| self.peers.get(r).is_some_and(|p| p.node == self.config.node));
        if let Some(local) = local {
            return Some(*local);
        }
        if candidates.is_empty() {
            return None;
        }
        self.next_reader += 1;
        let at = self.next_reader % candidates.len() as u64;
        candidates.get(usize::try_from(at).unwrap_or(0)).copied()
    }

    /// An offline replica other than `but`; the one whose next try is due first.
    pub(super) fn next_to_catch_up(&self, but: Option<ReplicaId>) -> Option<ReplicaId> {
        let record = self.volume()?;
        record
            .replicas
            .iter()
            .filter(|(replica, entry)| {
                matches!(entry.state, ReplicaState::Offline { .. }) && but != Some(**replica)
            })
            .filter_map(|(replica, _)| self.peers.get(replica).map(|peer| (peer.retry_at_ms, *replica)))
            .filter(|(retry_at_ms, _)| *retry_at_ms <= self.now_ms)
            .min()
            .map(|(_, replica)| replica)
    }
}
