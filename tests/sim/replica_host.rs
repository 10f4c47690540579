//! The engine's replica server, simulated: connections, calls and the disk around a `Replica`.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::BlockSet;
use holdfast_storage_core::ids::{SessionToken, SnapshotId};
use holdfast_storage_core::replica::{
    ControlOp, DataOp, DiskError, DiskId, DiskOp, OpenRequest, Replica, ReplicaAction, ReplicaCall,
    ReplicaEvent, ReplicaReply, RequestRefusal, SessionKey,
};
use holdfast_storage_core::target::{CallId, IoError, IoId, Opened, SessionId, TargetEvent};
use rand::Rng;

use crate::chaos::MINUTE_US;
use crate::coverage::Scenario;
use crate::disk::{Blocks, Disk, data_op};
use crate::target_host::ToTarget;
use crate::world::{Event, TargetNumber, World};

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub target: TargetNumber,
    pub session: SessionId,
}

#[derive(Debug)]
pub enum ToReplica {
    Open {
        caller: Caller,
        request: OpenRequest,
        /// Whom the connection is with: what was sent on it reaches no later start.
        process: Option<u64>,
    },
    /// The caller hung up: closes its connections, or gives up its Open.
    Close {
        caller: Caller,
        token: Option<SessionToken>,
    },
    Heartbeat {
        caller: Caller,
        key: SessionKey,
        sequence: u64,
    },
    Control {
        caller: Caller,
        call: CallId,
        key: SessionKey,
        op: ControlOp,
    },
    Changes {
        caller: Caller,
        call: CallId,
        token: SessionToken,
        from: Option<SnapshotId>,
        to: Option<SnapshotId>,
        range: BlockRange,
    },
    Extents {
        caller: Caller,
        call: CallId,
        token: SessionToken,
        range: BlockRange,
    },
    Data {
        caller: Caller,
        io: IoId,
        token: SessionToken,
        op: DataOp,
        data: Blocks,
    },
}

#[derive(Debug)]
enum Context {
    Open,
    Heartbeat(u64),
    Control(CallId),
    Data { io: IoId, data: Blocks, wrote: bool },
    Verified { call: CallId, blocks: Vec<Option<u64>> },
}

#[derive(Debug)]
pub struct PendingDisk {
    id: DiskId,
    op: DiskOp,
    flush_mark: u64,
    data: Blocks,
    since: u64,
    /// It is over; the process slept and has not heard yet.
    result: Option<Result<(), DiskError>>,
}

/// One start of a replica server.
#[derive(Debug)]
pub struct Process {
    pub number: u64,
    pub replica: Replica,
    next_call: u64,
    calls: BTreeMap<ReplicaCall, (Caller, Context)>,
    sessions: BTreeMap<SessionToken, Caller>,
    pub disk: Vec<PendingDisk>,
    /// Operations on meta, log and maps take effect in order.
    meta_busy_until: u64,
    tick_at: u64,
}

impl World {
    pub fn start_process(&mut self, node: usize) {
        if !self.nodes[node].powered || self.nodes[node].process.is_some() {
            return;
        }
        if self.nodes[node].stands_since.is_some() {
            return self.schedule(100_000, Event::StartProcess { node });
        }
        let now_ms = self.clock_ms(node);
        let start = self.nodes[node].disk.start();
        let replica = Replica::with_guards(now_ms, start, self.guards);
        self.nodes[node].processes += 1;
        let epoch = self.store.record.epoch.number;
        let (off_since, off_in) = (self.nodes[node].off_since, self.nodes[node].off_in_epoch.take());
        if off_in == Some(epoch) && self.now - off_since < 800_000 {
            self.saw(Scenario::RebootWithinDeadline);
        }
        let number = self.nodes[node].processes;
        self.nodes[node].process = Some(Process {
            number,
            replica,
            next_call: 0,
            calls: BTreeMap::new(),
            sessions: BTreeMap::new(),
            disk: Vec::new(),
            meta_busy_until: 0,
            tick_at: u64::MAX,
        });
        self.log(|| format!("n{node}: replica process {number} starts"));
    }

    /// `kill -9`: what was on its way to the disk may have landed. `tell` if the kernel still closes its sockets.
    pub fn kill_process(&mut self, node: usize, tell: bool) {
        let Some(process) = self.nodes[node].process.take() else { return };
        self.log(|| format!("n{node}: replica process dies"));
        self.nodes[node].died_at = self.now;
        let mut in_order = true;
        let writes = process.disk.iter().filter(|p| data_op(&p.op).is_some_and(|op| op.is_write())).count();
        if writes > 0 && tell {
            self.saw(Scenario::KilledWithIoLanding);
        }
        for pending in &process.disk {
            match data_op(&pending.op) {
                Some(DataOp::Write { range, .. } | DataOp::Zero { range, .. })
                    if !self.nodes[node].disk.full =>
                {
                    let torn = self.nodes[node].disk.tear(range, &pending.data, &mut self.rng);
                    if torn && !tell {
                        self.coverage.saw(Scenario::PowerLossTornWrite);
                    }
                }
                Some(_) => {}
                // A process killed between a failed flush and the removal of the cookie: a store that keeps its cache
                // over a kill has to close this gap (ours takes a killed process for a lost cache).
                None if pending.op == DiskOp::RemoveBootCookie => {
                    self.nodes[node].disk.apply_meta(&pending.op)
                }
                None => {
                    in_order = in_order && self.rng.random_bool(0.6);
                    if in_order {
                        self.nodes[node].disk.apply_meta(&pending.op);
                    }
                }
            }
        }
        self.nodes[node].deferred.clear();
        if self.chaos.kill_loses_cache {
            let disk = &mut self.nodes[node].disk;
            disk.lose_cache(&mut self.rng);
            disk.tmpfs_cookie = None;
        }
        if tell {
            let opens = process
                .calls
                .into_values()
                .filter(|(_, c)| matches!(c, Context::Open))
                .map(|(caller, _)| caller);
            for caller in opens.chain(process.sessions.into_values()).collect::<Vec<_>>() {
                self.tell_lost(node, caller);
            }
        }
    }

    fn tell_lost(&mut self, node: usize, caller: Caller) {
        let event = TargetEvent::SessionLost { session: caller.session };
        self.send_to_target(node, caller.target, ToTarget::of_session(caller.session, event));
    }

    pub fn at_replica(&mut self, node: usize, message: ToReplica, number: u64) {
        if !self.nodes[node].powered {
            return;
        }
        if self.nodes[node].paused_until > self.now {
            return self.nodes[node].deferred.push_back(Event::AtReplica { node, message, number });
        }
        self.note_arrival(node, &message, number);
        let running = self.nodes[node].process.as_ref().map(|process| process.number);
        if let ToReplica::Open { caller, process, .. } = &message
            && *process != running
        {
            return self.tell_lost(node, *caller);
        }
        let Some(process) = &mut self.nodes[node].process else {
            let (ToReplica::Open { caller, .. }
            | ToReplica::Close { caller, .. }
            | ToReplica::Heartbeat { caller, .. }
            | ToReplica::Control { caller, .. }
            | ToReplica::Extents { caller, .. }
            | ToReplica::Changes { caller, .. }
            | ToReplica::Data { caller, .. }) = message;
            return self.tell_lost(node, caller);
        };
        process.next_call += 1;
        let call = ReplicaCall(process.next_call);
        let event = match message {
            ToReplica::Open { caller, request, .. } => {
                process.calls.insert(call, (caller, Context::Open));
                let token = SessionToken(self.rng.random());
                ReplicaEvent::Open { call, request, token }
            }
            ToReplica::Close { caller, token: None } => {
                let open = process
                    .calls
                    .iter()
                    .find(|(_, (c, context))| *c == caller && matches!(context, Context::Open));
                let Some(call) = open.map(|(call, _)| *call) else { return };
                process.calls.remove(&call);
                ReplicaEvent::OpenCancelled { call }
            }
            ToReplica::Close { token: Some(token), .. } => ReplicaEvent::ConnectionLost { token },
            ToReplica::Heartbeat { caller, key, sequence } => {
                process.calls.insert(call, (caller, Context::Heartbeat(sequence)));
                ReplicaEvent::Control { call, key, op: ControlOp::Lease }
            }
            ToReplica::Control { caller, call: id, key, op } => {
                if !process.replica.accepts(key.token) && !process.sessions.is_empty() {
                    self.coverage.saw(Scenario::ControlOutlivedSession);
                }
                process.calls.insert(call, (caller, Context::Control(id)));
                ReplicaEvent::Control { call, key, op }
            }
            ToReplica::Changes { caller, call, token, from, to, range } => {
                let accepted = process.replica.accepts(token);
                let changed = self.nodes[node].disk.layers.changed(from, to).filter(|_| accepted);
                return self.tell_changes(node, caller, call, changed, range);
            }
            ToReplica::Extents { caller, call, token, range } => {
                let accepted = process.replica.accepts(token);
                return self.tell_extents(node, caller, call, range, accepted);
            }
            ToReplica::Data { caller, io, token, op, data } => {
                if !process.replica.accepts(token) && !process.sessions.is_empty() {
                    self.coverage.saw(Scenario::LateBytesOfOldSession);
                }
                process.calls.insert(call, (caller, Context::Data { io, data, wrote: op.is_write() }));
                ReplicaEvent::Data { call, token, op }
            }
        };
        self.replica_event(node, event);
    }

    fn tell_changes(
        &mut self,
        node: usize,
        caller: Caller,
        call: CallId,
        changed: Option<BTreeSet<u64>>,
        range: BlockRange,
    ) {
        let Some(changed) = changed else { return self.tell_lost(node, caller) };
        let mut blocks = BlockSet::new();
        for block in changed.range(range.start.0..range.end()) {
            blocks.insert(BlockRange::new(*block, 1));
        }
        let event = TargetEvent::ChangesRead { call, blocks };
        self.send_to_target(node, caller.target, ToTarget::of_session(caller.session, event));
    }

    fn tell_extents(&mut self, node: usize, caller: Caller, call: CallId, range: BlockRange, accepted: bool) {
        if !accepted {
            return self.tell_lost(node, caller);
        }
        let extents = self.nodes[node].disk.extents(range);
        let event = TargetEvent::ExtentsRead { call, extents };
        self.send_to_target(node, caller.target, ToTarget::of_session(caller.session, event));
    }

    pub fn replica_event(&mut self, node: usize, event: ReplicaEvent) {
        let now_ms = self.clock_ms(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        process.replica.handle_event(now_ms, event);
        while let Some(action) = self.nodes[node].process.as_mut().and_then(|p| p.replica.poll_action()) {
            self.replica_action(node, action);
        }
        let Some(process) = &mut self.nodes[node].process else { return };
        let number = process.number;
        if let Some(at_ms) = process.replica.next_timeout()
            && at_ms != process.tick_at
        {
            process.tick_at = at_ms;
            let delay = self.until_ms(node, at_ms);
            self.schedule(delay, Event::ReplicaTick { node, process: number });
        }
    }

    fn is_process(&self, node: usize, number: u64) -> bool {
        self.nodes[node].process.as_ref().is_some_and(|process| process.number == number)
    }

    pub fn replica_tick(&mut self, node: usize, process: u64) {
        if !self.is_process(node, process) {
            return;
        }
        if self.nodes[node].paused_until > self.now {
            return self.nodes[node].deferred.push_back(Event::ReplicaTick { node, process });
        }
        if let Some(process) = &mut self.nodes[node].process {
            process.tick_at = u64::MAX;
        }
        self.replica_event(node, ReplicaEvent::Tick);
    }

    pub fn resume_replica(&mut self, node: usize) {
        if self.nodes[node].paused_until > self.now {
            return;
        }
        if self.nodes[node].process.is_some()
            && self.nodes[node].paused_until - self.nodes[node].paused_from >= MINUTE_US
        {
            self.nodes[node].paused_from = self.nodes[node].paused_until;
            self.saw(Scenario::ReplicaPausedForMinutes);
        }
        for event in std::mem::take(&mut self.nodes[node].deferred) {
            self.dispatch(event);
        }
    }

    pub fn connections_closed(&mut self, node: usize, process: u64, token: u128) {
        if self.is_process(node, process) {
            self.replica_event(node, ReplicaEvent::ConnectionsClosed { token: SessionToken(token) });
        }
    }

    fn replica_action(&mut self, node: usize, action: ReplicaAction) {
        match action {
            ReplicaAction::Disk { id, op } => self.start_disk(node, id, op),
            ReplicaAction::Reply { call, reply } => self.reply(node, call, reply),
            ReplicaAction::CloseConnections { token } => {
                let Some(process) = &mut self.nodes[node].process else { return };
                let number = process.number;
                let caller = process.sessions.remove(&token);
                let delay = self.rng.random_range(10..3_000);
                self.schedule(delay, Event::ConnectionsClosed { node, process: number, token: token.0 });
                if let Some(caller) = caller {
                    self.tell_lost(node, caller);
                }
            }
            ReplicaAction::Failed => {
                self.kill_process(node, true);
                let delay = self.rng.random_range(1_000..500_000);
                self.schedule(delay, Event::StartProcess { node });
            }
        }
    }

    fn start_disk(&mut self, node: usize, id: DiskId, op: DiskOp) {
        self.spring_at_disk(node, &op);
        if matches!(op, DiskOp::Freeze { .. } | DiskOp::DropSnapshot { .. } | DiskOp::Grow { .. }) {
            self.log(|| format!("n{node}: {op:?}"));
        }
        let slow = self.nodes[node].slow_until > self.now;
        let mut delay = match self.rng.random_range(0..100) {
            0..4 => self.rng.random_range(2_000..60_000),
            _ => self.rng.random_range(20..800),
        };
        if slow && self.rng.random_bool(0.3) {
            delay += self.rng.random_range(0..self.nodes[node].slow_until - self.now);
        }
        let flush_mark = self.nodes[node].disk.flush_mark();
        let now = self.now;
        let hung = self.nodes[node].hung_until.saturating_sub(now);
        let Some(process) = &mut self.nodes[node].process else { return };
        if data_op(&op).is_none() {
            process.meta_busy_until = process.meta_busy_until.max(now + hung) + delay.min(100_000);
            delay = process.meta_busy_until - now;
        } else {
            delay += hung;
        }
        let data = match &op {
            DiskOp::Data { call, .. } => match process.calls.get(call) {
                Some((_, Context::Data { data, .. })) => data.clone(),
                _ => Blocks::new(),
            },
            _ => Blocks::new(),
        };
        let number = process.number;
        process.disk.push(PendingDisk { id, op, flush_mark, data, since: now, result: None });
        self.schedule(delay, Event::DiskDone { node, process: number, id: id.0 });
    }

    pub fn disk_done(&mut self, node: usize, number: u64, id: u64) {
        if !self.is_process(node, number) {
            return;
        }
        let host = &mut self.nodes[node];
        let Some(process) = &mut host.process else { return };
        let Some(at) = process.disk.iter().position(|pending| pending.id.0 == id) else { return };
        let PendingDisk { id, op, flush_mark, data, since, result } = process.disk.remove(at);
        if let Some(result) = result {
            return self.replica_event(node, ReplicaEvent::DiskDone { id, result });
        }
        match self.now - since {
            5_000_000.. => self.coverage.saw(Scenario::HungDisk),
            1_000_000.. => self.coverage.saw(Scenario::SlowDisk),
            _ => {}
        }
        let result = match data_op(&op) {
            None if host.disk.full && matches!(op, DiskOp::Freeze { .. } | DiskOp::Grow { .. }) => {
                Err(DiskError::NoSpace)
            }
            None if host.layers_full_until > self.now && matches!(op, DiskOp::Freeze { .. }) => {
                Err(DiskError::LayersFull)
            }
            None => {
                host.disk.apply_meta(&op);
                Ok(())
            }
            Some(_) => self.do_data(node, &op, flush_mark, &data),
        };
        if self.trace
            && let Some(range) = data_op(&op).and_then(|op| op.range())
            && (range.start.0..range.end()).contains(&self.watch)
        {
            let values = data.get(&self.watch);
            eprintln!("{:>12.3} n{node}: {op:?} {values:?} -> {result:?}", self.now as f64 / 1000.0);
        }
        if self.nodes[node].paused_until > self.now {
            // The disk has it; the process hears of it when it wakes.
            return self.defer_disk_event(node, id, result);
        }
        self.replica_event(node, ReplicaEvent::DiskDone { id, result });
    }

    /// Carries a data request out.
    fn do_data(&mut self, node: usize, op: &DiskOp, flush_mark: u64, data: &Blocks) -> Result<(), DiskError> {
        let Some(what) = data_op(op) else { return Ok(()) };
        let host = &mut self.nodes[node];
        let (Some(process), disk) = (&mut host.process, &mut host.disk) else { return Ok(()) };
        match what {
            DataOp::Read(range) | DataOp::Verify(range) | DataOp::ReadSnapshot { range, .. } => {
                let fails = host.reads_fail_until > self.now && self.rng.random_bool(0.7);
                let read = keep_read(&mut process.calls, disk, op, fails);
                self.note_read_of_disk(node, range, read, fails);
                read
            }
            DataOp::MarkBad(range) => {
                disk.mark_bad(range);
                self.note_marked(range);
                Ok(())
            }
            DataOp::Adopt(range) => {
                let adopted = disk.adopt(range);
                self.note_adopted(node, &adopted);
                Ok(())
            }
            DataOp::Write { .. } if disk.full => {
                self.coverage.saw(Scenario::FullDisk);
                Err(DiskError::NoSpace)
            }
            DataOp::Write { range, fua } | DataOp::Zero { range, fua, .. } => {
                if let Some(to) = disk.write(range, data, fua) {
                    self.note_misdirected(to);
                }
                Ok(())
            }
            DataOp::Flush if disk.fail_flush => {
                self.coverage.saw(Scenario::FailedFsync);
                disk.fail_flush = false;
                disk.lose_cache(&mut self.rng);
                Err(DiskError::Device)
            }
            DataOp::Flush => {
                disk.flush(flush_mark);
                Ok(())
            }
        }
    }

    fn defer_disk_event(&mut self, node: usize, id: DiskId, result: Result<(), DiskError>) {
        let Some(process) = &mut self.nodes[node].process else { return };
        // Without effect if the process dies before it wakes.
        let (op, number) = (DiskOp::LogRemove(vec![]), process.number);
        let data = Blocks::new();
        process.disk.push(PendingDisk { id, op, flush_mark: 0, data, since: self.now, result: Some(result) });
        self.nodes[node].deferred.push_back(Event::DiskDone { node, process: number, id: id.0 });
    }

    fn reply(&mut self, node: usize, call: ReplicaCall, reply: ReplicaReply) {
        let Some(process) = &mut self.nodes[node].process else { return };
        let Some((caller, context)) = process.calls.remove(&call) else { return };
        let message = match (context, reply) {
            (Context::Open, ReplicaReply::Open(Ok(reply))) => {
                process.sessions.insert(reply.token, caller);
                let opened = Opened {
                    cache_lost: reply.cache_lost,
                    logged: reply.logged,
                    size_bytes: reply.size_bytes,
                    epoch: reply.epoch,
                    snapshots: reply.snapshots,
                };
                ToTarget::Opened { session: caller.session, token: reply.token, opened }
            }
            (Context::Open, ReplicaReply::Open(Err(refusal))) => {
                let event = TargetEvent::OpenRefused { session: caller.session, refusal };
                ToTarget::of_session(caller.session, event)
            }
            (Context::Heartbeat(sequence), ReplicaReply::Lease(Ok(cache_lost))) => {
                let event = TargetEvent::HeartbeatAnswered { session: caller.session, sequence, cache_lost };
                ToTarget::of_session(caller.session, event)
            }
            (Context::Control(call), ReplicaReply::Done(Ok(()))) => {
                ToTarget::of_session(caller.session, TargetEvent::ControlDone { call })
            }
            (Context::Control(call), ReplicaReply::Done(Err(RequestRefusal::Disk(error))))
                if error.is_refusal() =>
            {
                ToTarget::of_session(caller.session, TargetEvent::ControlRefused { call, error })
            }
            (Context::Verified { call, blocks }, ReplicaReply::Done(Ok(()))) => {
                ToTarget::of_session(caller.session, TargetEvent::Verified { call, blocks })
            }
            (Context::Control(call), ReplicaReply::Map(Ok(map))) => {
                ToTarget::of_session(caller.session, TargetEvent::MapRead { call, map })
            }
            (Context::Data { io, data, wrote }, ReplicaReply::Done(result)) => match result {
                Ok(()) => ToTarget::IoDone { session: caller.session, io, result: Ok(()), data, wrote },
                Err(RequestRefusal::Disk(error)) => {
                    let error = if error == DiskError::NoSpace { IoError::NoSpace } else { IoError::Failed };
                    let (session, data) = (caller.session, Blocks::new());
                    ToTarget::IoDone { session, io, result: Err(error), data, wrote: false }
                }
                Err(RequestRefusal::Invalid) => {
                    self.history.violations.push("a replica refused a request as invalid".to_owned());
                    return;
                }
                Err(RequestRefusal::NoSession | RequestRefusal::OldEpoch) => {
                    return self.tell_lost(node, caller);
                }
            },
            _ => return self.tell_lost(node, caller),
        };
        self.send_to_target(node, caller.target, message);
    }
}

/// Carries a reading operation out; what it gives waits with its call for the reply. If the device `fails`, a read is
/// an error, and nothing verifies.
fn keep_read(
    calls: &mut BTreeMap<ReplicaCall, (Caller, Context)>,
    disk: &Disk,
    op: &DiskOp,
    fails: bool,
) -> Result<(), DiskError> {
    let DiskOp::Data { call, op } = op else { return Ok(()) };
    let Some((_, context)) = calls.get_mut(call) else { return Ok(()) };
    match (op, context) {
        (DataOp::Read(_) | DataOp::ReadSnapshot { .. }, _) if fails => return Err(DiskError::Device),
        (DataOp::Read(range), Context::Data { data, .. }) => *data = disk.read(*range)?,
        (DataOp::ReadSnapshot { snapshot, range }, Context::Data { data, .. }) => {
            *data = disk.read_snapshot(*snapshot, *range)?;
        }
        (DataOp::Verify(range), context) => {
            if let Context::Control(call) = *context {
                let verdicts = disk.verify(*range).into_iter().map(|verdict| verdict.filter(|_| !fails));
                *context = Context::Verified { call, blocks: verdicts.collect() };
            }
        }
        _ => {}
    }
    Ok(())
}
