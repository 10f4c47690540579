//! The engine's target side, simulated: buffers, sessions and a client around a `Target`.

use std::collections::{BTreeMap, VecDeque};

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{SessionToken, TargetId};
use holdfast_storage_core::record::ReplicaState;
use holdfast_storage_core::replica::{ControlOp, DataOp, OpenRequest, SessionKey};
use holdfast_storage_core::target::{
    ClientOp, Control, CopyId, Edge, IoError, IoId, OpenSession, Opened, Payload, RequestError, RequestId,
    SessionId, Target, TargetAction, TargetConfig, TargetEvent, TargetState,
};
use holdfast_storage_core::timers;
use rand::Rng;

use crate::chaos::MINUTE_US;
use crate::client::{HALF, Request};
use crate::coverage::Scenario;
use crate::disk::{BlockData, Blocks};
use crate::replica_host::{Caller, ToReplica};
use crate::rescues::copy_of;
use crate::traps::JoinStep;
use crate::world::{Event, TargetNumber, World, node_name, node_of};

const HASTY_TICKS_MAX: u64 = 1_000;

#[derive(Debug)]
pub enum ToTarget {
    Event { session: Option<SessionId>, event: Box<TargetEvent> },
    Opened { session: SessionId, token: SessionToken, opened: Opened },
    IoDone { session: SessionId, io: IoId, result: Result<(), IoError>, data: Blocks, wrote: bool },
}

impl ToTarget {
    pub fn event(event: TargetEvent) -> Self {
        Self::Event { session: None, event: Box::new(event) }
    }

    pub fn of_session(session: SessionId, event: TargetEvent) -> Self {
        Self::Event { session: Some(session), event: Box::new(event) }
    }
}

#[derive(Debug)]
struct Session {
    node: usize,
    token: Option<SessionToken>,
}

/// One start of a target.
#[derive(Debug)]
pub struct TargetHost {
    pub node: usize,
    pub target: Target,
    pub generation: u64,
    sessions: BTreeMap<SessionId, Session>,
    ios: BTreeMap<IoId, (Payload, BlockRange)>,
    pub requests: BTreeMap<RequestId, Request>,
    pub next_request: u64,
    copies: BTreeMap<CopyId, Blocks>,
    tick_at: u64,
    /// Ticks in a row after which the next was due at once.
    hasty_ticks: u64,
    pub paused_until: u64,
    pub paused_from: u64,
    deferred: VecDeque<Event>,
    pub join_step: JoinStep,
    /// Writes in flight by I/O, and per request whether a member refused it and whether one did it.
    writes: BTreeMap<IoId, RequestId>,
    outcomes: BTreeMap<RequestId, (bool, bool)>,
}

impl TargetHost {
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }
}

impl World {
    pub fn start_target(&mut self, node: usize) {
        if self.nodes[node].stands_since.is_some() {
            return self.schedule(100_000, Event::StartTarget { node });
        }
        self.starting = false;
        if !self.nodes[node].powered || self.store.record.attached_to != Some(node_name(node)) {
            return;
        }
        // One process per attachment: the one before is dead or told so.
        self.next_target += 1;
        let number = self.next_target;
        let config = TargetConfig {
            volume_id: self.store.record.volume_id,
            node: node_name(node),
            attachment: self.attachment(),
            target_id: TargetId(u128::from(number) << 64 | u128::from(self.rng.random::<u64>())),
            seed: self.rng.random(),
            detached: false,
        };
        self.log(|| format!("t{number} starts on n{node} for attachment {}", config.attachment));
        let target = Target::with_guards(self.clock_ms(node), config, self.guards);
        let host = TargetHost {
            node,
            target,
            generation: 0,
            sessions: BTreeMap::new(),
            ios: BTreeMap::new(),
            requests: BTreeMap::new(),
            next_request: 0,
            copies: BTreeMap::new(),
            tick_at: u64::MAX,
            hasty_ticks: 0,
            paused_until: 0,
            paused_from: 0,
            deferred: VecDeque::new(),
            join_step: JoinStep::None,
            writes: BTreeMap::new(),
            outcomes: BTreeMap::new(),
        };
        self.targets.insert(number, host);
        self.current = Some(number);
        self.drain_target(number);
        self.schedule(1_000, Event::Client { target: number });
    }

    /// `kill -9`; `tell` if the kernel still closes its sockets.
    pub fn kill_target(&mut self, number: TargetNumber, tell: bool) {
        let Some(host) = self.targets.remove(&number) else { return };
        self.log(|| format!("t{number} dies"));
        self.jobs_of_target_end(number);
        if tell {
            for (session, entry) in host.sessions {
                let caller = Caller { target: number, session };
                self.send_to_replica(host.node, entry.node, ToReplica::Close { caller, token: entry.token });
            }
        }
        if self.current == Some(number) {
            self.current = None;
        }
    }

    pub fn at_target(&mut self, number: TargetNumber, message: ToTarget) {
        let now = self.now;
        let Some(host) = self.targets.get_mut(&number) else { return };
        if host.paused_until > now {
            return host.deferred.push_back(Event::AtTarget { target: number, message });
        }
        if matches!(&message, ToTarget::IoDone { wrote: false, .. }) && self.spring_at_read(number) {
            // It sleeps before it has looked at its leases.
            let Some(host) = self.targets.get_mut(&number) else { return };
            return host.deferred.push_back(Event::AtTarget { target: number, message });
        }
        let Some(host) = self.targets.get_mut(&number) else { return };
        let event = match message {
            ToTarget::Event { session, event } => {
                if session.is_some_and(|session| !host.sessions.contains_key(&session)) {
                    return;
                }
                *event
            }
            ToTarget::Opened { session, token, opened } => {
                let Some(entry) = host.sessions.get_mut(&session) else { return };
                entry.token = Some(token);
                self.note_opened(number, &opened, session);
                TargetEvent::Opened { session, opened }
            }
            ToTarget::IoDone { session, io, result, data, .. } => {
                if !host.sessions.contains_key(&session) {
                    return;
                }
                if let Some(request) = host.writes.remove(&io) {
                    self.note_half_failed(number, request, result.is_err());
                }
                let Some(host) = self.targets.get_mut(&number) else { return };
                if let (Ok(()), Some((payload, range))) = (result, host.ios.remove(&io)) {
                    host.keep(payload, range, &data);
                }
                TargetEvent::IoDone { io, result }
            }
        };
        self.target_event(number, event);
    }

    pub fn target_event(&mut self, number: TargetNumber, event: TargetEvent) {
        let Some(node) = self.targets.get(&number).map(|host| host.node) else { return };
        let now_ms = self.clock_ms(node);
        if let Some(host) = self.targets.get_mut(&number) {
            host.target.handle_event(now_ms, event);
        }
        self.drain_target(number);
    }

    fn drain_target(&mut self, number: TargetNumber) {
        while let Some(action) = self.targets.get_mut(&number).and_then(|host| host.target.poll_action()) {
            self.target_action(number, action);
        }
        let Some(host) = self.targets.get_mut(&number) else { return };
        let node = host.node;
        if let Some(at_ms) = host.target.next_timeout()
            && at_ms != host.tick_at
        {
            host.tick_at = at_ms;
            let serves = *host.target.state() == TargetState::Serving;
            if serves && at_ms > self.clock_ms(node) + timers::HEARTBEAT_MS {
                self.coverage.saw(Scenario::TargetIdled);
            }
            let delay = self.until_ms(node, at_ms);
            self.schedule(delay, Event::TargetTick { target: number, at_ms });
        }
    }

    pub fn target_tick(&mut self, number: TargetNumber, at_ms: u64) {
        let now = self.now;
        let Some(host) = self.targets.get_mut(&number) else { return };
        if host.paused_until > now {
            return host.deferred.push_back(Event::TargetTick { target: number, at_ms });
        }
        let (node, tick_at) = (host.node, host.tick_at);
        if self.clock_ms(node) >= tick_at {
            if let Some(host) = self.targets.get_mut(&number) {
                host.tick_at = u64::MAX;
            }
            self.target_event(number, TargetEvent::Tick);
            self.count_hasty_tick(number);
        } else if at_ms == tick_at {
            // Its clock stood still meanwhile.
            let delay = self.until_ms(node, at_ms);
            self.schedule(delay, Event::TargetTick { target: number, at_ms });
        }
        // Timers that were overtaken by an earlier one are skipped.
    }

    /// A timer that stays due whatever the tick does keeps a processor busy for nothing.
    fn count_hasty_tick(&mut self, number: TargetNumber) {
        let Some(now_ms) = self.targets.get(&number).map(|host| self.clock_ms(host.node)) else { return };
        let Some(host) = self.targets.get_mut(&number) else { return };
        let hasty = host.target.next_timeout().is_some_and(|at_ms| at_ms <= now_ms);
        host.hasty_ticks = if hasty { host.hasty_ticks + 1 } else { 0 };
        if host.hasty_ticks == HASTY_TICKS_MAX {
            self.history.violations.push(format!("a timer of t{number} is due for ever: {:#?}", host.target));
        }
    }

    pub fn resume_target(&mut self, number: TargetNumber) {
        let now = self.now;
        let Some(host) = self.targets.get_mut(&number) else { return };
        if host.paused_until > now {
            return;
        }
        if host.paused_until - host.paused_from >= MINUTE_US {
            host.paused_from = host.paused_until;
            self.coverage.saw(Scenario::TargetPausedForMinutes);
        }
        // R6: the queued input first, timers last.
        let (ticks, input): (Vec<Event>, Vec<Event>) = std::mem::take(&mut host.deferred)
            .into_iter()
            .partition(|e| matches!(e, Event::TargetTick { .. }));
        for event in input {
            self.dispatch(event);
        }
        if !ticks.is_empty() {
            if let Some(host) = self.targets.get_mut(&number) {
                host.tick_at = u64::MAX;
            }
            self.target_event(number, TargetEvent::Tick);
        }
    }

    /// R4: its node's clock stood still.
    pub fn clock_jumped(&mut self, number: TargetNumber) {
        if self.targets.get(&number).is_some_and(|host| *host.target.state() == TargetState::Serving) {
            self.saw(Scenario::ClockJumpVoidedLeases);
        }
        self.target_event(number, TargetEvent::ClockJumped);
    }

    /// A replica with a log of its own that comes back epochs later.
    fn note_opened(&mut self, number: TargetNumber, opened: &Opened, session: SessionId) {
        let Some(node) =
            self.targets.get(&number).and_then(|host| host.sessions.get(&session)).map(|s| s.node)
        else {
            return;
        };
        let record = &self.store.record;
        if let Some(ReplicaState::Offline { left_epoch }) =
            record.replicas.get(&self.replica_at(node)).map(|replica| replica.state)
            && record.epoch.number >= left_epoch.number + 3
            && !opened.logged.is_empty()
        {
            self.saw(Scenario::BackAfterThreeEpochs);
        }
    }

    /// Whether a write failed on one member and was done by another.
    fn note_half_failed(&mut self, number: TargetNumber, request: RequestId, failed: bool) {
        let Some(host) = self.targets.get_mut(&number) else { return };
        if !host.requests.contains_key(&request) {
            return;
        }
        let (refused, done) = host.outcomes.entry(request).or_default();
        let before = *refused && *done;
        *refused |= failed;
        *done |= !failed;
        if *refused && *done && !before {
            self.saw(Scenario::HalfFailedRequest);
        }
    }

    fn target_action(&mut self, number: TargetNumber, action: TargetAction) {
        if self.spring_at_target(number, &action) {
            return;
        }
        self.job_step(number, &action);
        self.straggle(number, &action);
        let Some(host) = self.targets.get_mut(&number) else { return };
        let node = host.node;
        match action {
            TargetAction::ReadRecord { call } => self.send_to_store(number, node, call, None),
            TargetAction::Swap { call, expected, record } => {
                self.send_to_store(number, node, call, Some((expected, record)));
            }
            TargetAction::Open(open) => self.open_session(number, open),
            TargetAction::CloseSession { session, .. } => {
                if let Some(entry) = host.sessions.remove(&session) {
                    let caller = Caller { target: number, session };
                    self.send_to_replica(node, entry.node, ToReplica::Close { caller, token: entry.token });
                }
            }
            TargetAction::Heartbeat { session, sequence, .. } => {
                if let Some((to, key)) = self.session_key(number, session) {
                    let caller = Caller { target: number, session };
                    self.send_to_replica(node, to, ToReplica::Heartbeat { caller, key, sequence });
                }
            }
            TargetAction::Control { call, session, op, .. } => {
                if let Some((to, key)) = self.session_key(number, session) {
                    let caller = Caller { target: number, session };
                    let message = match op {
                        Control::ReadExtents(range) => {
                            ToReplica::Extents { caller, call, token: key.token, range }
                        }
                        Control::ReadChanges { from, to, range } => {
                            ToReplica::Changes { caller, call, token: key.token, from, to, range }
                        }
                        op => ToReplica::Control { caller, call, key, op: control_op(op) },
                    };
                    self.send_to_replica(node, to, message);
                }
            }
            TargetAction::Io { io, session, op, payload, .. } => {
                self.send_io(number, io, session, op, payload)
            }
            TargetAction::Complete { request, result } => {
                host.outcomes.remove(&request);
                match (host.requests.remove(&request), result) {
                    (Some(request), Ok(())) => self.completed(request),
                    (Some(request), Err(RequestError::Failed)) => self.note_failed_read(&request),
                    (Some(_), Err(_)) | (None, _) => {}
                }
            }
            TargetAction::CopyDone { copy } => {
                host.copies.remove(&copy);
            }
            TargetAction::Found(finding) => {
                self.log(|| format!("t{number}: {finding:?}"));
                self.note_finding(number, finding);
            }
            TargetAction::JobDone { job, result } => self.job_done(job, &result),
            TargetAction::Grown { size_bytes } => self.log(|| format!("t{number}: {size_bytes} bytes")),
            TargetAction::State(state) => self.target_state(number, &state),
        }
    }

    fn target_state(&mut self, number: TargetNumber, state: &TargetState) {
        self.log(|| format!("t{number}: {} {}", state.word(), state.reason()));
        let Some(host) = self.targets.get_mut(&number) else { return };
        let status = host.target.status();
        host.generation = status.generation.0;
        let serving = self.targets.values().filter(|host| *host.target.state() == TargetState::Serving);
        if *state == TargetState::Serving && serving.count() > 1 {
            self.saw(Scenario::TwoTargetsServe);
        }
        match state {
            TargetState::Serving => self.note_first_service(number),
            TargetState::Failed(reason) if reason.contains("another history") => self.note_restored(),
            _ => {}
        }
        if *state == TargetState::Serving && status.possible_loss {
            self.log(|| format!("t{number}: goes on from lost caches"));
            self.history.loss(status.generation.0);
        }
    }

    fn open_session(&mut self, number: TargetNumber, open: OpenSession) {
        let Some(host) = self.targets.get_mut(&number) else { return };
        let (from, to) = (host.node, node_of(open.replica));
        host.sessions.insert(open.session, Session { node: to, token: None });
        let request = OpenRequest {
            volume_id: open.volume_id,
            replica_id: open.replica,
            generation: open.generation,
            target_id: open.target_id,
            lineage: open.lineage,
            promoted_from: open.promoted_from,
            epoch: open.epoch,
            in_sync: open.in_sync,
            size_bytes: open.size_bytes,
            snapshots: open.snapshots,
            sequence: open.session.0,
            copy: Some(copy_of(&open.record)),
        };
        let caller = Caller { target: number, session: open.session };
        if self.cut_until(from, to).is_some() || self.cut_until(to, from).is_some() {
            // Connecting times out.
            let event = TargetEvent::OpenFailed { session: open.session };
            let delay = self.rng.random_range(300_000..1_200_000);
            let message = ToTarget::of_session(open.session, event);
            self.schedule(delay, Event::AtTarget { target: number, message });
        }
        let process = self.nodes[to].process.as_ref().map(|process| process.number);
        self.send_to_replica(from, to, ToReplica::Open { caller, request, process });
    }

    fn session_key(&self, number: TargetNumber, session: SessionId) -> Option<(usize, SessionKey)> {
        let host = self.targets.get(&number)?;
        let entry = host.sessions.get(&session)?;
        let target_id = host.target.target_id();
        let generation = host.target.generation()?;
        Some((entry.node, SessionKey { generation, target_id, token: entry.token? }))
    }

    fn send_io(&mut self, number: TargetNumber, io: IoId, session: SessionId, op: DataOp, payload: Payload) {
        let Some(host) = self.targets.get_mut(&number) else { return };
        let from = host.node;
        let Some((to, token)) = host.sessions.get(&session).map(|entry| (entry.node, entry.token)) else {
            return;
        };
        let Some(token) = token else { return };
        let mut data = Some(Blocks::new());
        if let Some(range) = op.range() {
            match op {
                DataOp::Read(_) | DataOp::ReadSnapshot { .. } => {
                    host.ios.insert(io, (payload, range));
                }
                DataOp::Write { .. } => {
                    if let Payload::Request(request) = payload {
                        host.writes.insert(io, request);
                    }
                    data = host.payload(payload, range);
                }
                DataOp::Zero { .. } => data = host.zeroing(range),
                DataOp::Flush | DataOp::Verify(_) | DataOp::MarkBad(_) | DataOp::Adopt(_) => {}
            }
        }
        let Some(data) = data else {
            // Without R14 a write that was answered too early may be sent again: it is lost then.
            if self.guards.epochack {
                self.history.violations.push("an I/O names a buffer that was given back".to_owned());
            }
            return;
        };
        let caller = Caller { target: number, session };
        self.send_to_replica(from, to, ToReplica::Data { caller, io, token, op, data });
    }
}

impl TargetHost {
    /// What was read goes where the payload says.
    fn keep(&mut self, payload: Payload, range: BlockRange, data: &Blocks) {
        let block_of = |block: u64| data.get(&block).copied().unwrap_or_default();
        match payload {
            Payload::None => {}
            Payload::Request(id) => {
                if let Some(request) = self.requests.get_mut(&id) {
                    for block in range.start.0..range.end() {
                        request.data.insert(block, block_of(block));
                    }
                }
            }
            Payload::Edge { request: id, edge: Edge::Head | Edge::Tail, block } => {
                let Some(request) = self.requests.get_mut(&id) else { return };
                let (offset, len) = match request.op {
                    ClientOp::Write { offset, len, .. }
                    | ClientOp::Zero { offset, len, .. }
                    | ClientOp::Read { offset, len } => (offset, len),
                    ClientOp::Flush => return,
                };
                let inside = |register: u64| (offset / HALF..(offset + len) / HALF).contains(&register);
                let read = block_of(block.0);
                let own: &mut BlockData = request.data.entry(block.0).or_default();
                for part in 0..2 {
                    if !inside(block.0 * 2 + part as u64) {
                        own[part] = read[part];
                    }
                }
            }
            Payload::Copy(copy) => {
                let buffer = self.copies.entry(copy).or_default();
                for block in range.start.0..range.end() {
                    buffer.insert(block, block_of(block));
                }
            }
        }
    }

    /// The values of the one zeroing that covers the range.
    fn zeroing(&self, range: BlockRange) -> Option<Blocks> {
        let covers = |request: &&Request| match request.op {
            ClientOp::Zero { offset, len, .. } => BlockRange::covering(offset, len).overlaps(range),
            ClientOp::Read { .. } | ClientOp::Write { .. } | ClientOp::Flush => false,
        };
        let data = &self.requests.values().find(covers)?.data;
        Some(data.range(range.start.0..range.end()).map(|(block, data)| (*block, *data)).collect())
    }

    fn payload(&self, payload: Payload, range: BlockRange) -> Option<Blocks> {
        let from = match payload {
            Payload::None => None,
            Payload::Request(id) | Payload::Edge { request: id, .. } => {
                self.requests.get(&id).map(|r| &r.data)
            }
            Payload::Copy(copy) => self.copies.get(&copy),
        };
        Some(from?.range(range.start.0..range.end()).map(|(block, data)| (*block, *data)).collect())
    }
}

fn control_op(op: Control) -> ControlOp {
    match op {
        Control::SetEpoch { epoch, in_sync, absent, record } => {
            ControlOp::SetEpoch { epoch, in_sync, absent, copy: Some(copy_of(&record)) }
        }
        Control::KeepRecord(record) => ControlOp::KeepRecord(copy_of(&record)),
        Control::ClearLog(regions) => ControlOp::ClearLog(regions),
        Control::FillMap(absent) => ControlOp::FillMap(absent),
        Control::Verify(range) => ControlOp::Data(DataOp::Verify(range)),
        Control::MarkBad(range) => ControlOp::Data(DataOp::MarkBad(range)),
        Control::Adopt(range) => ControlOp::Data(DataOp::Adopt(range)),
        Control::ClearMap { absent, regions } => ControlOp::ClearMap { absent, regions },
        Control::ReadExtents(_) | Control::ReadChanges { .. } => {
            unreachable!("answered beside the replica's state machine")
        }
        Control::ReadMap(replica) => ControlOp::ReadMap(replica),
        Control::MergeMaps { epoch, maps } => ControlOp::MergeMaps { epoch, maps },
        Control::Freeze { snapshot } => ControlOp::Freeze { snapshot },
        Control::DropSnapshot { snapshot } => ControlOp::DropSnapshot { snapshot },
        Control::Grow { size_bytes } => ControlOp::Grow { size_bytes },
        Control::Release => ControlOp::Release,
    }
}
