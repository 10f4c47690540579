//! One replica of this node: the core's state machine with its requests, connections and disk.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use holdfast_io::{BlockError, BlockOp, Completion};
use holdfast_nbd::ConnectionSet;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::DirtyMap;
use holdfast_storage_core::ids::{BLOCK_BYTES, ReplicaId, SessionToken, SnapshotId};
use holdfast_storage_core::replica::{
    ControlOp, DataOp, DiskError, DiskId, DiskOp, OpenRefusal, OpenReply, OpenRequest, Replica,
    ReplicaAction, ReplicaCall, ReplicaEvent, ReplicaReply, RequestRefusal, SessionKey,
};

use crate::actor::{Actor, Machine};
use crate::errno;

use super::{disk, verify};

/// A replica that takes requests.
pub type ReplicaActor = Actor<ReplicaMachine>;

/// What carrying out a replica's actions needs.
pub struct ReplicaEnv {
    /// The replica on disk.
    pub disk: holdfast_store::Replica,
    /// Told once when the disk failed: the replica must be opened anew.
    pub on_failed: Box<dyn Fn() + Send + Sync>,
}

/// Answers a control request; a session that ends first drops it unanswered.
pub type ControlAnswer = Box<dyn FnOnce(ReplicaReply) + Send>;
/// Answers an Open; dropped unanswered if the replica fails.
pub type OpenAnswer = Box<dyn FnOnce(Result<OpenReply, OpenRefusal>) + Send>;
/// Called when a session ended on the replica's side.
pub type SessionEnded = Box<dyn FnOnce() + Send>;

/// Inputs.
pub enum ReplicaInput {
    /// A target asks for a session.
    Open {
        /// Names the request, see [`ReplicaMachine::next_call`].
        call: ReplicaCall,
        /// Its content.
        request: OpenRequest,
        /// A fresh random token.
        token: SessionToken,
        /// Names in the asker's certificate; the session is theirs alone.
        caller: Vec<String>,
        /// Who waits for the answer.
        answer: OpenAnswer,
        /// Who wants to know of the session's end, other than through its connections.
        ended: Option<SessionEnded>,
    },
    /// The asker hung up.
    OpenCancelled(ReplicaCall),
    /// A control request.
    Control {
        /// Who asks.
        key: SessionKey,
        /// What.
        op: ControlOp,
        /// Who waits for the answer.
        answer: ControlAnswer,
    },
    /// A data request.
    Data {
        /// Its session.
        token: SessionToken,
        /// The snapshot it reads; none for the volume as it is.
        at: Option<SnapshotId>,
        /// What.
        op: BlockOp,
        /// Who waits for the answer.
        done: Completion,
    },
    /// A connection of a session broke.
    ConnectionLost(SessionToken),
    /// Every connection of a session was closed.
    ConnectionsClosed(SessionToken),
    /// A data operation ended; a read gives its data.
    DataDone(DiskId, ReplicaCall, Result<Bytes, DiskError>),
    /// A metadata operation ended.
    MetaDone(DiskId, Result<(), DiskError>),
    /// A timeout passed.
    Tick,
}

/// Outputs, with everything they need.
pub enum ReplicaWork {
    /// A data operation.
    Data { id: DiskId, call: ReplicaCall, op: DataOp, data: Bytes },
    /// A metadata operation.
    Meta { id: DiskId, op: DiskOp },
    /// Answer a data request.
    Complete(Completion, Result<Bytes, BlockError>),
    /// Answer a control request.
    Answer(ControlAnswer, ReplicaReply),
    /// Answer an Open.
    AnswerOpen(OpenAnswer, Result<OpenReply, OpenRefusal>),
    /// Close a session's connections and say so.
    Close(SessionToken, Connections, Option<SessionEnded>),
    /// The disk failed.
    Failed,
}

/// The machine: the core's replica and the engine's books.
pub struct ReplicaMachine {
    core: Replica,
    next_call: u64,
    // Bounded by what the sessions' connections have in flight (the NBD server limits each).
    calls: HashMap<ReplicaCall, Pending>,
    sessions: HashMap<SessionToken, SessionConnections>,
}

enum Pending {
    Data {
        token: SessionToken,
        data: Bytes,
        done: Completion,
    },
    /// `data`: what its data request read, for those that are one.
    Control {
        token: SessionToken,
        data: Bytes,
        answer: ControlAnswer,
    },
    Open {
        caller: Vec<String>,
        answer: OpenAnswer,
        ended: Option<SessionEnded>,
    },
}

struct SessionConnections {
    connections: Connections,
    caller: Vec<String>,
    ended: Option<SessionEnded>,
}

/// A session's NBD connections; all are closed with it.
#[derive(Debug, Clone, Default)]
pub struct Connections {
    /// To the replica.
    pub data: ConnectionSet,
    /// To snapshots of it: read-only, of what never changes.
    pub snapshots: ConnectionSet,
}

impl Connections {
    fn close(&self) {
        self.data.close();
        self.snapshots.close();
    }
}

/// Numbers of Opens are drawn by their callers, who must be able to cancel them; they start here so that they never meet
/// the numbers of other requests.
const OPEN_CALLS_START: u64 = 1 << 62;

static NEXT_OPEN: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(OPEN_CALLS_START);

/// A number for an Open.
pub fn next_open_call() -> ReplicaCall {
    ReplicaCall(NEXT_OPEN.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
}

impl ReplicaMachine {
    /// Wraps the core's replica.
    pub fn new(core: Replica) -> Self {
        Self { core, next_call: 0, calls: HashMap::new(), sessions: HashMap::new() }
    }

    /// The connections of a live session, if its owner carries one of these names (any name without TLS); else the owner.
    pub fn connections(&self, token: SessionToken, names: &[String]) -> Option<Result<Connections, String>> {
        let session = self.sessions.get(&token).filter(|_| self.core.accepts(token))?;
        let owned = owned_by(&session.caller, names);
        Some(if owned { Ok(session.connections.clone()) } else { Err(session.caller.join(", ")) })
    }

    /// Whether the caller of a control request owns the session it names.
    pub fn is_owner(&self, token: SessionToken, names: &[String]) -> bool {
        self.sessions.get(&token).is_none_or(|session| owned_by(&session.caller, names))
    }

    /// What each absent replica lacks.
    pub fn maps(&self) -> &BTreeMap<ReplicaId, DirtyMap> {
        self.core.maps()
    }

    fn call(&mut self) -> ReplicaCall {
        self.next_call += 1;
        ReplicaCall(self.next_call)
    }

    fn on_data(
        &mut self,
        now_ms: u64,
        token: SessionToken,
        op: Option<(DataOp, Bytes)>,
        done: Completion,
        work: &mut Vec<ReplicaWork>,
    ) {
        if !self.sessions.contains_key(&token) {
            work.push(ReplicaWork::Complete(done, Err(BlockError(errno::ESHUTDOWN))));
            return;
        }
        let Some((op, data)) = op else {
            work.push(ReplicaWork::Complete(done, Err(BlockError(errno::EINVAL))));
            return;
        };
        let call = self.call();
        self.calls.insert(call, Pending::Data { token, data, done });
        self.core.handle_event(now_ms, ReplicaEvent::Data { call, token, op });
    }

    fn on_data_done(&mut self, now_ms: u64, id: DiskId, call: ReplicaCall, result: Result<Bytes, DiskError>) {
        let result = result.map(|read| {
            let pending = self.calls.get_mut(&call);
            if let Some(Pending::Data { data, .. } | Pending::Control { data, .. }) = pending {
                *data = read;
            }
        });
        self.core.handle_event(now_ms, ReplicaEvent::DiskDone { id, result });
    }

    fn take_actions(&mut self, work: &mut Vec<ReplicaWork>) {
        while let Some(action) = self.core.poll_action() {
            match action {
                ReplicaAction::Disk { id, op: DiskOp::Data { call, op } } => {
                    let data = match self.calls.get(&call) {
                        Some(Pending::Data { data, .. }) => data.clone(),
                        _ => Bytes::new(),
                    };
                    work.push(ReplicaWork::Data { id, call, op, data });
                }
                ReplicaAction::Disk { id, op } => work.push(ReplicaWork::Meta { id, op }),
                ReplicaAction::Reply { call, reply } => self.on_reply(call, reply, work),
                ReplicaAction::CloseConnections { token } => self.on_close(token, work),
                ReplicaAction::Failed => {
                    self.take_down(work);
                    work.push(ReplicaWork::Failed);
                }
            }
        }
    }

    fn on_reply(&mut self, call: ReplicaCall, reply: ReplicaReply, work: &mut Vec<ReplicaWork>) {
        match self.calls.remove(&call) {
            Some(Pending::Data { data, done, .. }) => {
                work.push(ReplicaWork::Complete(done, data_result(data, &reply)));
            }
            Some(Pending::Control { answer, data, .. }) => {
                let verified = !data.is_empty() && reply == ReplicaReply::Done(Ok(()));
                let reply = if verified { ReplicaReply::Verified(verify::decode(&data)) } else { reply };
                work.push(ReplicaWork::Answer(answer, reply));
            }
            Some(Pending::Open { caller, answer, ended }) => {
                let ReplicaReply::Open(result) = reply else { return };
                if let Ok(opened) = &result {
                    let connections = Connections::default();
                    self.sessions.insert(opened.token, SessionConnections { connections, caller, ended });
                }
                work.push(ReplicaWork::AnswerOpen(answer, result));
            }
            None => {}
        }
    }

    /// Ends a session: what it still waits for is answered with its end, as the core will not answer it.
    fn on_close(&mut self, token: SessionToken, work: &mut Vec<ReplicaWork>) {
        let over: Vec<ReplicaCall> = self
            .calls
            .iter()
            .filter(|(_, pending)| match pending {
                Pending::Data { token: of, .. } | Pending::Control { token: of, .. } => *of == token,
                Pending::Open { .. } => false,
            })
            .map(|(call, _)| *call)
            .collect();
        for call in over {
            match self.calls.remove(&call) {
                Some(Pending::Data { done, .. }) => {
                    work.push(ReplicaWork::Complete(done, Err(BlockError(errno::ESHUTDOWN))));
                }
                // Dropped: its caller sees the end of the session.
                Some(Pending::Control { .. } | Pending::Open { .. }) | None => {}
            }
        }
        let (connections, ended) = match self.sessions.remove(&token) {
            Some(session) => (session.connections, session.ended),
            None => (Connections::default(), None),
        };
        work.push(ReplicaWork::Close(token, connections, ended));
    }
}

impl Machine for ReplicaMachine {
    type Event = ReplicaInput;
    type Action = ReplicaWork;
    type Env = ReplicaEnv;

    fn handle(&mut self, now_ms: u64, event: ReplicaInput, work: &mut Vec<ReplicaWork>) {
        match event {
            ReplicaInput::Data { token, at, op, done } => {
                self.on_data(now_ms, token, data_op(op, at), done, work);
            }
            ReplicaInput::DataDone(id, call, result) => self.on_data_done(now_ms, id, call, result),
            ReplicaInput::Open { call, request, token, caller, answer, ended } => {
                self.calls.insert(call, Pending::Open { caller, answer, ended });
                self.core.handle_event(now_ms, ReplicaEvent::Open { call, request, token });
            }
            ReplicaInput::OpenCancelled(call) => {
                // An answer that came first made a session that nobody knows of: it ends with its lease, which was
                // never granted, or with the next Open.
                self.calls.remove(&call);
                self.core.handle_event(now_ms, ReplicaEvent::OpenCancelled { call });
            }
            ReplicaInput::Control { key, op, answer } => {
                let call = self.call();
                self.calls.insert(call, Pending::Control { token: key.token, data: Bytes::new(), answer });
                self.core.handle_event(now_ms, ReplicaEvent::Control { call, key, op });
            }
            ReplicaInput::ConnectionLost(token) => {
                self.core.handle_event(now_ms, ReplicaEvent::ConnectionLost { token });
            }
            ReplicaInput::ConnectionsClosed(token) => {
                self.core.handle_event(now_ms, ReplicaEvent::ConnectionsClosed { token });
            }
            ReplicaInput::MetaDone(id, result) => {
                self.core.handle_event(now_ms, ReplicaEvent::DiskDone { id, result });
            }
            ReplicaInput::Tick => self.core.handle_event(now_ms, ReplicaEvent::Tick),
        }
        self.take_actions(work);
    }

    fn next_timeout(&self) -> Option<u64> {
        self.core.next_timeout()
    }

    fn tick() -> ReplicaInput {
        ReplicaInput::Tick
    }

    fn take_down(&mut self, work: &mut Vec<ReplicaWork>) {
        let tokens: Vec<SessionToken> = self.sessions.keys().copied().collect();
        for token in tokens {
            self.on_close(token, work);
        }
        // What is left are Opens; dropped, their callers see that the replica is gone.
        self.calls.clear();
    }

    fn reject(event: ReplicaInput) {
        match event {
            ReplicaInput::Data { done, .. } => done(Err(BlockError(errno::ESHUTDOWN))),
            // Dropped: whoever asked sees that the replica is gone.
            ReplicaInput::Open { .. } | ReplicaInput::Control { .. } => {}
            ReplicaInput::OpenCancelled(_)
            | ReplicaInput::ConnectionLost(_)
            | ReplicaInput::ConnectionsClosed(_)
            | ReplicaInput::DataDone(..)
            | ReplicaInput::MetaDone(..)
            | ReplicaInput::Tick => {}
        }
    }

    fn execute(actor: &Arc<Actor<Self>>, action: ReplicaWork) {
        match action {
            ReplicaWork::Data { id, call, op, data } => {
                let actor = Arc::clone(actor);
                let disk = actor.env.disk.clone();
                disk::submit(&disk, op, data, move |result| {
                    actor.post(ReplicaInput::DataDone(id, call, result));
                });
            }
            ReplicaWork::Meta { id, op } => {
                let actor = Arc::clone(actor);
                let disk = actor.env.disk.clone();
                disk::submit_meta(&disk, op, move |result| {
                    actor.post(ReplicaInput::MetaDone(id, result));
                });
            }
            ReplicaWork::Complete(done, result) => done(result),
            ReplicaWork::Answer(answer, reply) => answer(reply),
            ReplicaWork::AnswerOpen(answer, result) => answer(result),
            ReplicaWork::Close(token, connections, ended) => {
                connections.close();
                if let Some(ended) = ended {
                    ended();
                }
                // No need to wait for the sockets: requests of a session that is out of the books never reach the core.
                actor.post(ReplicaInput::ConnectionsClosed(token));
            }
            ReplicaWork::Failed => (actor.env.on_failed)(),
        }
    }
}

fn owned_by(caller: &[String], names: &[String]) -> bool {
    caller.is_empty() || caller.iter().any(|name| names.contains(name))
}

/// A block request in the core's terms, with its data; `None` if it is not made of whole blocks, or would change a
/// snapshot.
fn data_op(op: BlockOp, at: Option<SnapshotId>) -> Option<(DataOp, Bytes)> {
    let range = |offset: u64, len: u64| {
        let whole = len > 0 && offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
        whole.then(|| BlockRange::covering(offset, len))
    };
    Some(match op {
        BlockOp::Read { offset, len } => {
            let range = range(offset, u64::from(len))?;
            let read = at.map_or(DataOp::Read(range), |snapshot| DataOp::ReadSnapshot { snapshot, range });
            (read, Bytes::new())
        }
        // Nothing of a snapshot is in a write cache.
        BlockOp::Flush => (DataOp::Flush, Bytes::new()),
        BlockOp::Write { .. } | BlockOp::Zero { .. } if at.is_some() => return None,
        BlockOp::Write { offset, data, fua } => {
            (DataOp::Write { range: range(offset, data.len() as u64)?, fua }, data)
        }
        BlockOp::Zero { offset, len, fua, trim } => {
            (DataOp::Zero { range: range(offset, len)?, fua, trim }, Bytes::new())
        }
    })
}

fn data_result(data: Bytes, reply: &ReplicaReply) -> Result<Bytes, BlockError> {
    match reply {
        ReplicaReply::Done(Ok(())) => Ok(data),
        ReplicaReply::Done(Err(RequestRefusal::NoSession)) => Err(BlockError(errno::ESHUTDOWN)),
        ReplicaReply::Done(Err(RequestRefusal::Disk(DiskError::NoSpace))) => Err(BlockError(errno::ENOSPC)),
        ReplicaReply::Done(Err(RequestRefusal::Invalid)) => Err(BlockError(errno::EINVAL)),
        ReplicaReply::Done(Err(
            RequestRefusal::Disk(
                DiskError::Corrupt
                | DiskError::Device
                | DiskError::SnapshotExists
                | DiskError::LayersFull
                | DiskError::NoSnapshot,
            )
            | RequestRefusal::OldEpoch,
        ))
        | ReplicaReply::Open(_)
        | ReplicaReply::Lease(_)
        | ReplicaReply::Verified(_)
        | ReplicaReply::Map(_) => Err(BlockError(errno::EIO)),
    }
}
