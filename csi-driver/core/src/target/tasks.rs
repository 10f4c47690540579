//! One piece of work under the range lock: a read, a write, a part of a zeroing, a copy.
//!
//! ```text
//! region ─────────> lock ─> read ─> lease ───────────────> done        reads
//! region ─> log ──> lock ─> edges ─> gate ─> write ──────> done        writes (region and edges only if unaligned)
//!           log ──> lock ─> gate ─> copy read ─> write ──> done        copies
//! region ─────────> lock ─> calls ───────────────────────> done        checks
//! ```
//!
//! Room in the intent log is taken before the range lock: a task that waited for room with the lock in hand could keep
//! out the very copy whose end would make room.

use std::collections::BTreeSet;

use crate::block_range::BlockRange;
use crate::ids::{Block, ReplicaId};
use crate::replica::DataOp;

use super::answers::set_answer;
use super::checks::CheckFor;
use super::copies::CopyFor;
use super::peers::IoOwner;
use super::{CopyId, Edge, IoError, Payload, RequestError, RequestId, Target};

#[derive(Debug, Clone)]
pub(super) enum Work {
    Read {
        request: RequestId,
    },
    Write {
        request: RequestId,
        fua: bool,
        edges: Vec<(Edge, Block)>,
    },
    Zero {
        request: RequestId,
        fua: bool,
        trim: bool,
        edge: Option<(Edge, Block)>,
    },
    Copy {
        copy: CopyId,
        why: CopyFor,
        resort: LastResort,
    },
    /// A piece of this check (R33).
    Check {
        check: u64,
    },
}

/// What was tried for a block of a logged region that no member can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LastResort {
    None,
    /// It was adopted where a crash explains it, and is read once more (R32).
    Adopted,
    /// All but the source were told that it is bad.
    MarkedBad,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Waits until its regions are reconciled, without the lock, which the reconciling copy needs (R20).
    Region,
    /// Waits until the configuration allows it and the intent log has room for its regions (R18).
    Log,
    /// Waits for the range lock.
    Lock,
    /// A read, or the read of a copy.
    Read,
    /// The data is here, the leases are not (R4).
    Lease,
    /// Edge blocks are being read; so many are out.
    Edges(u32),
    /// So many control calls are out.
    Calls(usize),
    /// Waits until the configuration lets it begin.
    Gate,
    /// Sent.
    Write,
}

/// What one replica did with a task's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Pending,
    Done,
    /// Its session broke before it answered: sent again if it resumes (R14), forgotten if it leaves the set.
    Missing,
    Failed(IoError),
}

#[derive(Debug)]
pub(super) struct Task {
    pub work: Work,
    pub range: BlockRange,
    pub stage: Stage,
    pub answers: Vec<(ReplicaId, Answer)>,
    /// Replicas that could not read the range.
    pub tried: BTreeSet<ReplicaId>,
    /// What the client is told although the write is over (R16).
    pub error: Option<RequestError>,
    /// The client has its answer.
    pub answered: bool,
    /// Its regions are counted in the intent log.
    counted: bool,
    edges_failed: bool,
    /// What no member could read whole was checked and mended, where it can be, and is read once more.
    checked: bool,
}

impl Task {
    pub(super) fn request(&self) -> Option<RequestId> {
        match &self.work {
            Work::Read { request } | Work::Write { request, .. } | Work::Zero { request, .. } => {
                Some(*request)
            }
            Work::Copy { .. } | Work::Check { .. } => None,
        }
    }

    /// A write or copy that passed the gate: some replica may have it, and another not yet.
    pub(super) fn has_begun(&self) -> bool {
        match self.stage {
            Stage::Write => true,
            // A copy reads, adopts and marks after the gate.
            Stage::Read | Stage::Calls(_) => matches!(self.work, Work::Copy { .. }),
            Stage::Region | Stage::Log | Stage::Lock | Stage::Lease | Stage::Edges(_) | Stage::Gate => false,
        }
    }

    fn edges(&self) -> Vec<(Edge, Block)> {
        match &self.work {
            Work::Write { edges, .. } => edges.clone(),
            Work::Zero { edge, .. } => edge.iter().copied().collect(),
            Work::Read { .. } | Work::Copy { .. } | Work::Check { .. } => Vec::new(),
        }
    }

    fn has_edges(&self) -> bool {
        match &self.work {
            Work::Write { edges, .. } => !edges.is_empty(),
            Work::Zero { edge, .. } => edge.is_some(),
            Work::Read { .. } | Work::Copy { .. } | Work::Check { .. } => false,
        }
    }

    /// What is sent to every replica.
    pub(super) fn write_op(&self) -> (DataOp, Payload) {
        let range = self.range;
        match &self.work {
            Work::Write { request, fua, .. } => {
                (DataOp::Write { range, fua: *fua }, Payload::Request(*request))
            }
            Work::Zero { request, fua, edge: Some((edge, block)), .. } => {
                let payload = Payload::Edge { request: *request, edge: *edge, block: *block };
                (DataOp::Write { range, fua: *fua }, payload)
            }
            Work::Zero { fua, trim, edge: None, .. } => {
                (DataOp::Zero { range, fua: *fua, trim: *trim }, Payload::None)
            }
            Work::Copy { copy, .. } => (DataOp::Write { range, fua: false }, Payload::Copy(*copy)),
            Work::Read { request } => (DataOp::Read(range), Payload::Request(*request)),
            Work::Check { .. } => (DataOp::Read(range), Payload::None),
        }
    }
}

impl Target {
    pub(super) fn start_task(&mut self, work: Work, range: BlockRange) {
        let id = self.prepare_task(work, range);
        self.ask_lock(id);
    }

    /// A task that has asked for nothing yet.
    pub(super) fn prepare_task(&mut self, work: Work, range: BlockRange) -> u64 {
        let id = self.new_id();
        let task = Task {
            work,
            range,
            stage: Stage::Region,
            answers: Vec::new(),
            tried: BTreeSet::new(),
            error: None,
            answered: false,
            counted: false,
            edges_failed: false,
            checked: false,
        };
        self.tasks.insert(id, task);
        id
    }

    /// From [`Stage::Region`] on.
    pub(super) fn ask_lock(&mut self, id: u64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let shared = matches!(task.work, Work::Read { .. } | Work::Check { .. });
        let reads = shared || task.has_edges();
        let range = task.range;
        if reads && self.guards.readrec && self.wait_for_regions(id, range) {
            return;
        }
        let Some(task) = self.tasks.get(&id) else { return };
        if !matches!(task.work, Work::Read { .. } | Work::Check { .. })
            && !task.counted
            && !self.take_log_room(id, range)
        {
            return self.gated.push_back(id);
        }
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.stage = Stage::Lock;
        let skip = match task.work {
            Work::Read { .. } => !self.guards.readlock,
            Work::Check { .. } => false,
            Work::Copy { why: CopyFor::Repair, .. } => !self.guards.repairlock,
            Work::Write { .. } | Work::Zero { .. } => !self.guards.range,
            Work::Copy { .. } => !self.guards.reglock,
        };
        if skip || self.locks.acquire(id, range, !shared) {
            self.ready.push_back(id);
        }
    }

    /// R18: its regions are in the log's budget.
    fn take_log_room(&mut self, id: u64, range: BlockRange) -> bool {
        let Some(task) = self.tasks.get(&id) else { return false };
        let by_members =
            !matches!(task.work, Work::Copy { why: CopyFor::CatchUp(_) | CopyFor::Layer { .. }, .. });
        let room = self.gates.begin && self.count_in_log(range, by_members);
        if let Some(task) = self.tasks.get_mut(&id) {
            task.stage = Stage::Log;
            task.counted = room;
        }
        room
    }

    /// The lock is held.
    pub(super) fn locked(&mut self, id: u64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.stage = match &task.work {
            Work::Read { .. } | Work::Check { .. } => Stage::Read,
            Work::Write { .. } | Work::Zero { .. } if task.has_edges() => Stage::Edges(0),
            Work::Write { .. } | Work::Zero { .. } | Work::Copy { .. } => Stage::Gate,
        };
        self.try_advance(id);
    }

    /// Goes on with a task that holds the lock and waits for nothing that has been sent.
    pub(super) fn try_advance(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        match task.stage {
            Stage::Log => self.ask_lock(id),
            Stage::Read => self.send_read(id),
            Stage::Edges(0) => self.send_edges(id),
            Stage::Gate => self.try_begin(id),
            Stage::Region | Stage::Lock | Stage::Lease | Stage::Edges(_) | Stage::Calls(_) | Stage::Write => {
            }
        }
    }

    pub(super) fn pump_gated(&mut self) {
        for id in std::mem::take(&mut self.gated) {
            self.try_advance(id);
        }
    }

    fn send_read(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        match task.work {
            Work::Copy { .. } => return self.send_copy_read(id),
            Work::Check { .. } => return self.send_verify(id),
            Work::Read { .. } | Work::Write { .. } | Work::Zero { .. } => {}
        }
        let (op, payload) = task.write_op();
        let tried = task.tried.clone();
        if !self.gates.read {
            return self.gated.push_back(id);
        }
        match self.choose_reader(&tried) {
            Some(replica) => {
                self.send_io(replica, IoOwner::Task(id), op, payload);
            }
            None if self.members().iter().all(|r| tried.contains(r)) => self.unreadable(id),
            None => self.gated.push_back(id),
        }
    }

    fn send_edges(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        let (edges, request, tried) = (task.edges(), task.request(), task.tried.clone());
        let Some(request) = request else { return };
        if !self.gates.read {
            return self.gated.push_back(id);
        }
        match self.choose_reader(&tried) {
            Some(replica) => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.stage = Stage::Edges(u32::try_from(edges.len()).unwrap_or(0));
                    task.edges_failed = false;
                }
                for (edge, block) in edges {
                    let op = DataOp::Read(BlockRange { start: block, count: 1 });
                    self.send_io(replica, IoOwner::Task(id), op, Payload::Edge { request, edge, block });
                }
            }
            None if self.members().iter().all(|r| tried.contains(r)) => self.unreadable(id),
            None => self.gated.push_back(id),
        }
    }

    /// No member could read all of it. Each of its blocks may verify somewhere: it is checked and mended without its lock,
    /// then tried once more (R33).
    fn unreadable(&mut self, id: u64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.checked {
            return self.finish_task(id, Err(RequestError::Failed));
        }
        task.checked = true;
        task.stage = Stage::Region;
        let range = task.range;
        let granted = self.locks.release(id);
        self.ready.extend(granted);
        self.start_check(CheckFor::Reader(id), range);
    }

    pub(super) fn read_again(&mut self, id: u64) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.tried.clear();
            self.ask_lock(id);
        }
    }

    /// R8, R10: a write begins only in a settled configuration.
    fn try_begin(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        if !self.gates.begin {
            return self.gated.push_back(id);
        }
        if let Work::Copy { .. } = task.work {
            let Some(task) = self.tasks.get_mut(&id) else { return };
            task.stage = Stage::Read;
            return self.send_copy_read(id);
        }
        let mut replicas: Vec<ReplicaId> = self.ack_set.iter().copied().collect();
        replicas.extend(self.receiving().filter(|r| !self.ack_set.contains(r)));
        self.send_writes(id, &replicas);
    }

    pub(super) fn send_writes(&mut self, id: u64, replicas: &[ReplicaId]) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.stage = Stage::Write;
        let (op, payload) = task.write_op();
        let mut answers = Vec::with_capacity(replicas.len());
        for replica in replicas {
            let sent = self.send_io(*replica, IoOwner::Task(id), op, payload);
            answers.push((*replica, if sent.is_some() { Answer::Pending } else { Answer::Missing }));
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            task.answers = answers;
        }
        if replicas.is_empty() {
            self.check_write(id);
        }
    }

    pub(super) fn task_io_done(&mut self, id: u64, replica: ReplicaId, result: Result<(), IoError>) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        match task.stage {
            Stage::Read => match (result, &task.work) {
                (Ok(()), Work::Copy { .. }) => self.copy_was_read(id),
                (Ok(()), _) => {
                    task.stage = Stage::Lease;
                    let (range, failed) = (task.range, !task.tried.is_empty());
                    if failed {
                        self.check_later(range);
                    }
                    self.lease_wait.push_back(id);
                    self.release_reads();
                }
                (Err(_), _) => {
                    task.tried.insert(replica);
                    self.try_advance(id);
                }
            },
            Stage::Edges(left) => {
                if result.is_err() {
                    task.tried.insert(replica);
                    task.edges_failed = true;
                }
                self.edge_ended(id, left);
            }
            Stage::Write => {
                let answer = result.map_or_else(Answer::Failed, |()| Answer::Done);
                set_answer(&mut task.answers, replica, answer);
                self.check_write(id);
            }
            Stage::Region | Stage::Log | Stage::Lock | Stage::Lease | Stage::Calls(_) | Stage::Gate => {}
        }
    }

    fn edge_ended(&mut self, id: u64, left: u32) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let (range, mended) = (task.range, left == 1 && !task.edges_failed && !task.tried.is_empty());
        if mended {
            self.check_later(range);
        }
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.stage = match (left.saturating_sub(1), task.edges_failed) {
            (0, false) => Stage::Gate,
            (left, _) => Stage::Edges(left),
        };
        self.try_advance(id);
    }

    pub(super) fn task_io_lost(&mut self, id: u64, replica: ReplicaId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        match task.stage {
            Stage::Read => self.gated.push_back(id),
            Stage::Edges(left) => {
                task.edges_failed = true;
                task.stage = Stage::Edges(left.saturating_sub(1));
                if left <= 1 {
                    self.gated.push_back(id);
                }
            }
            Stage::Write => set_answer(&mut task.answers, replica, Answer::Missing),
            Stage::Region | Stage::Log | Stage::Lock | Stage::Lease | Stage::Calls(_) | Stage::Gate => {}
        }
    }

    /// R4: hands out what was read while the leases of the whole ack set hold.
    pub(super) fn release_reads(&mut self) {
        if self.lease_wait.is_empty() || !self.leases_hold() || !self.gates.read {
            return;
        }
        for id in std::mem::take(&mut self.lease_wait) {
            self.finish_task(id, Ok(()));
        }
    }

    /// Ends a task that answers its client only now.
    pub(super) fn finish_task(&mut self, id: u64, result: Result<(), RequestError>) {
        let request = self.tasks.get(&id).and_then(Task::request);
        self.drop_task(id);
        if let Some(request) = request {
            self.next_part(request, result);
        }
    }

    /// Gives the lock and the log's count back.
    pub(super) fn drop_task(&mut self, id: u64) {
        let Some(task) = self.tasks.remove(&id) else { return };
        if task.counted {
            self.uncount_in_log(task.range);
        }
        let granted = self.locks.release(id);
        self.ready.extend(granted);
        let waited_for = self.catch_up_drains() || self.cut_holds_writes();
        if self.stopping.is_some() || waited_for || !self.gated.is_empty() {
            self.dirty = true;
        }
    }
}
