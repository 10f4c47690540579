//! One attached volume: the core's state machine with its requests, buffers and sessions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use holdfast_io::{BlockError, BlockOp, Completion};
use holdfast_nbd::{Extent, ExtentsCompletion};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{
    Epoch, Generation, NodeName, RecordVersion, ReplicaId, SnapshotId, VolumeId,
};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::RecordStore;
use holdfast_storage_core::replica::DataOp;
use holdfast_storage_core::target::{
    CallId, Control, CopyId, Finding, IoError, IoId, Job, JobError, JobId, OpenSession, Opened, Payload,
    RequestError, RequestId, SessionId, Target, TargetAction, TargetEvent, TargetState, TargetStatus,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::actor::{Actor, Machine};
use crate::clock::JumpWatch;
use crate::errno;
use crate::peers::Peers;
use crate::replica::host::ReplicaHost;

use super::allocation::{AllocationQuery, PendingQuery};
use super::buffers::{ClientRequest, is_zero};
use super::calls;
use super::limited::Limited;
use super::link::{Link, is_session_error};

/// A target that takes requests.
pub type TargetActor = Actor<TargetMachine>;

/// What carrying out a target's actions needs.
pub struct TargetEnv {
    /// The volume.
    pub volume_id: VolumeId,
    /// This node.
    pub node: NodeName,
    /// Its record's store.
    pub store: Arc<dyn RecordStore>,
    /// The other nodes.
    pub peers: Arc<Peers>,
    /// This node's replicas.
    pub host: Arc<ReplicaHost>,
    /// Where control calls and heartbeats run; nothing there waits for a disk.
    pub control: Handle,
    /// Where the volume's NBD connections run.
    pub data: Handle,
    /// The state, for those who wait for it.
    pub state: watch::Sender<TargetState>,
    /// The size once the target serves; follows growth (R31).
    pub size_bytes: watch::Sender<u64>,
    /// Open tries under way, at most one per replica.
    pub opens: Mutex<HashMap<SessionId, AbortHandle>>,
}

/// Inputs.
pub enum TargetInput {
    /// An input of the core's; boxed, as the many inputs of the I/O path are small.
    Core(Box<TargetEvent>),
    /// A client's request.
    Request(BlockOp, Completion),
    /// A local client asks what is allocated.
    Allocation(AllocationQuery, ExtentsCompletion),
    /// A replica told what is allocated.
    AllocationTold(IoTag, Result<Vec<Extent>, BlockError>),
    /// An I/O on a replica ended; a read gives its data.
    IoDone(IoTag, Result<Bytes, BlockError>),
    /// A job, and who waits for its end.
    Job(Job, JobAnswer),
    /// A session is open and its connection is up.
    SessionUp(SessionId, Arc<Link>, Opened),
}

impl TargetInput {
    /// An input of the core's.
    pub fn core(event: TargetEvent) -> Self {
        Self::Core(Box::new(event))
    }
}

/// Which I/O ended.
#[derive(Debug, Clone, Copy)]
pub struct IoTag {
    io: IoId,
    session: SessionId,
    payload: Payload,
    is_read: bool,
}

/// Outputs, with everything they need.
pub enum TargetWork {
    /// Read the record.
    ReadRecord(CallId),
    /// Swap the record.
    Swap(CallId, RecordVersion, Box<VolumeRecord>),
    /// Open a session.
    Open(OpenSession),
    /// Give a session or a try up.
    Close(SessionId, Option<Arc<Link>>),
    /// Send a heartbeat.
    Heartbeat(SessionId, Arc<Link>, u64),
    /// Send a control request.
    Control(CallId, SessionId, ReplicaId, Arc<Link>, Control),
    /// Send an I/O.
    Io(IoTag, Arc<Link>, BlockOp),
    /// Read a snapshot of a replica.
    ReadSnapshot(IoTag, Arc<Link>, SnapshotId, BlockRange),
    /// Ask what is allocated, in so many extents at most.
    Allocation(IoTag, Arc<Link>, BlockRange, usize),
    /// Answer a client.
    Complete(Completion, Result<Bytes, BlockError>),
    /// Tell a client what is allocated.
    TellAllocation(ExtentsCompletion, Result<Vec<Extent>, BlockError>),
    /// Report what was found out about the data's integrity.
    Found(Finding),
    /// Tell a job's end.
    JobDone(JobAnswer, Result<(), JobError>),
    /// The volume has this size now.
    Grown(u64),
    /// Tell the state, under which generation and epoch.
    State(TargetState, Generation, Epoch),
}

/// The machine: the core's target and the engine's books.
pub struct TargetMachine {
    core: Target,
    clock: JumpWatch,
    /// Clients' requests that the volume's limits let wait.
    limited: Limited,
    next_request: u64,
    // Bounded by what the front ends have in flight (each limits its own).
    requests: HashMap<RequestId, ClientRequest>,
    // Bounded by what the NBD server lets each local client have in flight. Their numbers are of one series with those
    // of the requests.
    queries: HashMap<RequestId, PendingQuery>,
    // Bounded by the core's COPIES_MAX.
    copies: HashMap<CopyId, Bytes>,
    sessions: HashMap<SessionId, SessionSlot>,
    next_job: u64,
    // Bounded by the core's JOBS_MAX.
    jobs: HashMap<JobId, JobAnswer>,
}

/// Tells a job's end; dropped unanswered if the target is killed.
pub type JobAnswer = Box<dyn FnOnce(Result<(), JobError>) + Send>;

struct SessionSlot {
    replica: ReplicaId,
    /// None while it is being opened.
    link: Option<Arc<Link>>,
}

impl TargetMachine {
    /// Wraps the core's target.
    pub fn new(core: Target) -> Self {
        Self {
            core,
            clock: JumpWatch::new(),
            limited: Limited::default(),
            next_request: 0,
            requests: HashMap::new(),
            queries: HashMap::new(),
            copies: HashMap::new(),
            sessions: HashMap::new(),
            next_job: 0,
            jobs: HashMap::new(),
        }
    }

    fn on_job(&mut self, now_ms: u64, what: Job, answer: JobAnswer) {
        self.next_job += 1;
        let job = JobId(self.next_job);
        self.jobs.insert(job, answer);
        self.core.handle_event(now_ms, TargetEvent::Job { job, what });
    }

    /// For GetStatus.
    pub fn status(&self) -> TargetStatus {
        self.core.status()
    }

    /// The volume's size, once known.
    pub fn size_bytes(&self) -> Option<u64> {
        self.core.size_bytes()
    }

    /// The links to all members; `None` if one has no open session.
    pub fn member_links(&self) -> Option<Vec<Arc<Link>>> {
        let status = self.core.status();
        let members = status.replicas.iter().filter(|replica| replica.state == "in_sync");
        let link_of = |replica: ReplicaId| {
            let slot = self.sessions.values().find(|slot| slot.replica == replica && slot.link.is_some());
            slot.and_then(|slot| slot.link.clone())
        };
        members.map(|member| link_of(member.replica)).collect()
    }

    fn link(&self, session: SessionId) -> Option<Arc<Link>> {
        self.sessions.get(&session)?.link.clone()
    }

    fn on_request(&mut self, now_ms: u64, op: BlockOp, done: Completion) {
        self.next_request += 1;
        let request = RequestId(self.next_request);
        let (client, op) = ClientRequest::new(op, done);
        self.requests.insert(request, client);
        self.core.handle_event(now_ms, TargetEvent::Request { request, op });
    }

    /// Lets those go on whose time has come.
    fn pump_limited(&mut self, now_ms: u64) {
        if self.core.state().is_final() {
            // It refuses them, and at once.
            self.limited.lift();
        }
        self.limited.follow(now_ms, self.core.limits());
        while let Some((op, done)) = self.limited.due(now_ms) {
            self.on_request(now_ms, op, done);
        }
    }

    fn on_core(&mut self, now_ms: u64, event: TargetEvent) {
        match &event {
            TargetEvent::OpenRefused { session, .. } | TargetEvent::OpenFailed { session } => {
                self.sessions.remove(session);
            }
            TargetEvent::Stop => {
                self.limited.lift();
                self.pump_limited(now_ms);
            }
            // It may be the limiter's alone.
            TargetEvent::Tick if self.core.next_timeout().is_none_or(|at_ms| at_ms > now_ms) => return,
            _ => {}
        }
        self.core.handle_event(now_ms, event);
    }

    fn on_allocation(&mut self, now_ms: u64, query: AllocationQuery, done: ExtentsCompletion) {
        self.next_request += 1;
        let request = RequestId(self.next_request);
        let (pending, op) = PendingQuery::new(query, done);
        self.queries.insert(request, pending);
        self.core.handle_event(now_ms, TargetEvent::Request { request, op });
    }

    fn on_allocation_told(&mut self, now_ms: u64, tag: IoTag, result: Result<Vec<Extent>, BlockError>) {
        let told = result.map(|extents| {
            if let Payload::Request(request) = tag.payload
                && let Some(query) = self.queries.get_mut(&request)
            {
                query.put(extents);
            }
            Bytes::new()
        });
        self.on_io_done(now_ms, tag, told);
    }

    /// The query that an I/O of the core's stands for.
    fn query_of(&self, payload: Payload) -> Option<&PendingQuery> {
        match payload {
            Payload::Request(request) => self.queries.get(&request),
            Payload::Edge { .. } | Payload::Copy(_) | Payload::None => None,
        }
    }

    fn on_io_done(&mut self, now_ms: u64, tag: IoTag, result: Result<Bytes, BlockError>) {
        if is_session_error(&result) {
            // The I/O's fate is unknown, and so is that of everything else on the session (R5).
            self.core.handle_event(now_ms, TargetEvent::SessionLost { session: tag.session });
            return;
        }
        let result = match result {
            Ok(read) => {
                if tag.is_read {
                    self.keep_read(tag.payload, read);
                }
                Ok(())
            }
            Err(BlockError(errno::ENOSPC)) => Err(IoError::NoSpace),
            Err(_) => Err(IoError::Failed),
        };
        self.core.handle_event(now_ms, TargetEvent::IoDone { io: tag.io, result });
    }

    fn keep_read(&mut self, payload: Payload, read: Bytes) {
        match payload {
            Payload::Request(request) => {
                if let Some(client) = self.requests.get_mut(&request) {
                    client.put_read(read);
                }
            }
            Payload::Edge { request, block, .. } => {
                if let Some(client) = self.requests.get_mut(&request) {
                    client.put_edge(block, &read);
                }
            }
            Payload::Copy(copy) => {
                self.copies.insert(copy, read);
            }
            Payload::None => {}
        }
    }

    /// The bytes that an I/O writes.
    fn written(&mut self, payload: Payload) -> Bytes {
        match payload {
            Payload::Request(request) => {
                self.requests.get_mut(&request).map(ClientRequest::blocks).unwrap_or_default()
            }
            Payload::Edge { request, block, .. } => {
                self.requests.get(&request).map(|client| client.edge(block)).unwrap_or_default()
            }
            Payload::Copy(copy) => self.copies.get(&copy).cloned().unwrap_or_default(),
            Payload::None => Bytes::new(),
        }
    }

    fn block_op(&mut self, op: DataOp, payload: Payload) -> BlockOp {
        match op {
            DataOp::Read(range) => BlockOp::Read {
                offset: range.offset_bytes(),
                len: u32::try_from(range.len_bytes())
                    .expect("reads are as long as a request, whose length has 32 bits"),
            },
            DataOp::Write { range, fua } => {
                let data = self.written(payload);
                assert_eq!(
                    data.len() as u64,
                    range.len_bytes(),
                    "the buffer of {payload:?} does not fit {range:?}"
                );
                let (offset, len) = (range.offset_bytes(), range.len_bytes());
                if matches!(payload, Payload::Copy(_)) && is_zero(&data) {
                    BlockOp::Zero { offset, len, fua, trim: true }
                } else {
                    BlockOp::Write { offset, data, fua }
                }
            }
            DataOp::Zero { range, fua, trim } => {
                BlockOp::Zero { offset: range.offset_bytes(), len: range.len_bytes(), fua, trim }
            }
            DataOp::Flush => BlockOp::Flush,
            DataOp::Verify(_) | DataOp::MarkBad(_) | DataOp::Adopt(_) => {
                unreachable!("asked for by control requests")
            }
            DataOp::ReadSnapshot { .. } => unreachable!("sent as work of its own"),
        }
    }

    fn take_actions(&mut self, work: &mut Vec<TargetWork>) {
        while let Some(action) = self.core.poll_action() {
            let Some(next) = self.work_of(action) else { continue };
            work.push(next);
        }
    }

    /// An action with what it needs; `None` where nothing is left to do, as for a session that ended meanwhile.
    fn work_of(&mut self, action: TargetAction) -> Option<TargetWork> {
        Some(match action {
            TargetAction::ReadRecord { call } => TargetWork::ReadRecord(call),
            TargetAction::Swap { call, expected, record } => TargetWork::Swap(call, expected, record),
            TargetAction::Open(open) => {
                self.sessions.insert(open.session, SessionSlot { replica: open.replica, link: None });
                TargetWork::Open(open)
            }
            TargetAction::CloseSession { session, .. } => {
                let slot = self.sessions.remove(&session);
                TargetWork::Close(session, slot.and_then(|slot| slot.link))
            }
            TargetAction::Heartbeat { session, sequence, .. } => {
                TargetWork::Heartbeat(session, self.link(session)?, sequence)
            }
            TargetAction::Control { call, session, replica, op } => {
                TargetWork::Control(call, session, replica, self.link(session)?, op)
            }
            TargetAction::Io { io, session, op, payload, .. } => {
                let link = self.link(session)?;
                let tag = IoTag {
                    io,
                    session,
                    payload,
                    is_read: matches!(op, DataOp::Read(_) | DataOp::ReadSnapshot { .. }),
                };
                if let Some((range, extents_max)) = self.query_of(payload).map(PendingQuery::wanted) {
                    return Some(TargetWork::Allocation(tag, link, range, extents_max));
                }
                match op {
                    DataOp::ReadSnapshot { snapshot, range } => {
                        TargetWork::ReadSnapshot(tag, link, snapshot, range)
                    }
                    op => TargetWork::Io(tag, link, self.block_op(op, payload)),
                }
            }
            TargetAction::Complete { request, result } => {
                if let Some(query) = self.queries.remove(&request) {
                    let (done, extents) = query.finish();
                    let result = result.map(|()| extents).map_err(request_error);
                    return Some(TargetWork::TellAllocation(done, result));
                }
                let client = self.requests.remove(&request)?;
                match result {
                    Ok(()) => {
                        let (done, data) = client.finish();
                        TargetWork::Complete(done, Ok(data))
                    }
                    Err(error) => TargetWork::Complete(client.into_completion(), Err(request_error(error))),
                }
            }
            TargetAction::JobDone { job, result } => TargetWork::JobDone(self.jobs.remove(&job)?, result),
            TargetAction::Grown { size_bytes } => TargetWork::Grown(size_bytes),
            TargetAction::CopyDone { copy } => {
                self.copies.remove(&copy);
                return None;
            }
            TargetAction::Found(finding) => TargetWork::Found(finding),
            TargetAction::State(state) => {
                let status = self.core.status();
                TargetWork::State(state, status.generation, status.epoch)
            }
        })
    }
}

impl Machine for TargetMachine {
    type Event = TargetInput;
    type Action = TargetWork;
    type Env = TargetEnv;

    fn handle(&mut self, now_ms: u64, event: TargetInput, work: &mut Vec<TargetWork>) {
        if self.clock.jumped(now_ms) {
            // R4: before whatever came after the jump.
            self.core.handle_event(now_ms, TargetEvent::ClockJumped);
        }
        match event {
            TargetInput::Core(event) => self.on_core(now_ms, *event),
            TargetInput::Request(op, done) => {
                if let Some((op, done)) = self.limited.arrive(now_ms, op, done) {
                    self.on_request(now_ms, op, done);
                }
            }
            TargetInput::Allocation(query, done) => self.on_allocation(now_ms, query, done),
            TargetInput::AllocationTold(tag, result) => self.on_allocation_told(now_ms, tag, result),
            TargetInput::IoDone(tag, result) => self.on_io_done(now_ms, tag, result),
            TargetInput::Job(what, answer) => self.on_job(now_ms, what, answer),
            TargetInput::SessionUp(session, link, opened) => {
                // A try that was given up meanwhile: its link closes as it is dropped.
                if let Some(slot) = self.sessions.get_mut(&session) {
                    slot.link = Some(link);
                    self.core.handle_event(now_ms, TargetEvent::Opened { session, opened });
                }
            }
        }
        self.pump_limited(now_ms);
        self.take_actions(work);
    }

    fn next_timeout(&self) -> Option<u64> {
        self.core.next_timeout().into_iter().chain(self.limited.next_timeout()).min()
    }

    fn tick() -> TargetInput {
        TargetInput::core(TargetEvent::Tick)
    }

    fn take_down(&mut self, work: &mut Vec<TargetWork>) {
        for (session, slot) in self.sessions.drain() {
            work.push(TargetWork::Close(session, slot.link));
        }
        for (_, client) in self.requests.drain() {
            work.push(TargetWork::Complete(client.into_completion(), Err(BlockError(errno::EIO))));
        }
        for (_, done) in self.limited.take_all() {
            work.push(TargetWork::Complete(done, Err(BlockError(errno::EIO))));
        }
        for (_, query) in self.queries.drain() {
            work.push(TargetWork::TellAllocation(query.done, Err(BlockError(errno::EIO))));
        }
        self.copies.clear();
        // Dropped: who waits learns that the target ended.
        self.jobs.clear();
    }

    fn reject(event: TargetInput) {
        match event {
            TargetInput::Request(_, done) => done(Err(BlockError(errno::EIO))),
            TargetInput::Allocation(_, done) => done(Err(BlockError(errno::EIO))),
            // Dropping a fresh session's link closes it; dropping a job's answer tells that the target ended.
            TargetInput::Core(_)
            | TargetInput::Job(..)
            | TargetInput::IoDone(..)
            | TargetInput::AllocationTold(..)
            | TargetInput::SessionUp(..) => {}
        }
    }

    fn execute(actor: &Arc<TargetActor>, action: TargetWork) {
        let env = &actor.env;
        let me = || Arc::clone(actor);
        match action {
            TargetWork::Io(tag, link, op) => {
                let target = me();
                link.submit(op, Box::new(move |result| target.post(TargetInput::IoDone(tag, result))));
            }
            TargetWork::ReadSnapshot(tag, link, snapshot, range) => {
                let target = me();
                env.data.spawn(async move {
                    let result = link.read_snapshot(snapshot, range).await;
                    target.post(TargetInput::IoDone(tag, result));
                });
            }
            TargetWork::Allocation(tag, link, range, extents_max) => {
                let target = me();
                let told = move |result| target.post(TargetInput::AllocationTold(tag, result));
                link.block_status(range, extents_max, Box::new(told));
            }
            TargetWork::Complete(done, result) => done(result),
            TargetWork::TellAllocation(done, result) => done(result),
            TargetWork::JobDone(done, result) => done(result),
            TargetWork::Grown(size_bytes) => {
                env.size_bytes.send_replace(size_bytes);
                tracing::info!(volume = %env.volume_id, size_bytes, "the volume grew");
            }
            TargetWork::Heartbeat(session, link, sequence) => {
                env.control.spawn(calls::heartbeat(me(), link, session, sequence));
            }
            TargetWork::Control(call, session, replica, link, op) => {
                link.queue_control(call, op, |queued| {
                    let (target, weak) = (Arc::downgrade(actor), Arc::downgrade(&link));
                    env.control.spawn(calls::control(target, weak, session, replica, queued));
                });
            }
            TargetWork::ReadRecord(call) => {
                env.control.spawn(calls::read_record(me(), call));
            }
            TargetWork::Swap(call, expected, record) => {
                env.control.spawn(calls::swap(me(), call, expected, *record));
            }
            TargetWork::Open(open) => {
                let session = open.session;
                let task = env.control.spawn(calls::open(me(), open));
                let mut opens = env.opens.lock().unwrap_or_else(PoisonError::into_inner);
                opens.retain(|_, open| !open.is_finished());
                opens.insert(session, task.abort_handle());
            }
            TargetWork::Close(session, link) => {
                let open = env.opens.lock().unwrap_or_else(PoisonError::into_inner).remove(&session);
                if let Some(open) = open {
                    open.abort();
                }
                if let Some(link) = link {
                    link.close();
                }
            }
            TargetWork::Found(finding) => log_finding(env, finding),
            TargetWork::State(state, generation, epoch) => {
                log_state(env, &state, generation, epoch);
                env.state.send_replace(state);
            }
        }
    }
}

fn log_finding(env: &TargetEnv, finding: Finding) {
    let volume = env.volume_id;
    match finding {
        Finding::Repaired { .. } | Finding::Adopted { .. } => {
            tracing::warn!(%volume, ?finding, "blocks that did not verify were mended");
        }
        Finding::Corrupt { .. } => tracing::warn!(%volume, ?finding, "blocks do not verify"),
        Finding::Unrepairable { .. } | Finding::Differing { .. } | Finding::MarkedBad { .. } => {
            tracing::error!(%volume, ?finding, "blocks cannot be mended: restore them from a backup");
        }
    }
}

fn log_state(env: &TargetEnv, state: &TargetState, generation: Generation, epoch: Epoch) {
    let _in_volume =
        tracing::info_span!("volume", id = %env.volume_id, %generation, epoch = epoch.number).entered();
    match state {
        TargetState::Failed(reason) => tracing::error!(reason, "the target failed"),
        TargetState::Fenced(reason) => tracing::warn!(reason, "the target is fenced"),
        TargetState::Opening | TargetState::Settling | TargetState::Serving | TargetState::Stopped => {
            tracing::info!(state = state.word(), "the target changed its state");
        }
    }
}

/// Fenced and failed targets answer EIO to everything, reads included (P4).
fn request_error(error: RequestError) -> BlockError {
    BlockError(match error {
        RequestError::Failed | RequestError::Fenced => errno::EIO,
        RequestError::NoSpace => errno::ENOSPC,
        RequestError::Stopped => errno::ESHUTDOWN,
        RequestError::Invalid => errno::EINVAL,
    })
}
