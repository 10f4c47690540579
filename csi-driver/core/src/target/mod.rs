//! One start of the process that serves an attached volume.
//!
//! - `config`: record, generation, swaps of the in-sync set, epochs (R1, R7 to R12);
//! - `history`: records that were restored, members that were given up (R26, R35);
//! - `peers`: sessions, heartbeats, leases, deadlines (R2, R4, R6, R9, R14);
//! - `calls`: control calls to the replicas and their answers;
//! - `requests`, `tasks`: client I/O under the range lock (R13, R17), `answers`: what the replicas say to a write (R14, R16),
//!   `flushes` (R15);
//! - `jobs`: snapshots (`cut`, `delete`: R27 to R29), growth (`grow`: R31) and fewer replicas (`remove`), one at a time;
//! - `intent_log`: which regions are logged, and clearing them (R18);
//! - `copies`: copying blocks between replicas; `reconcile` (R20) and `catch_up` with `extents` (R23, R24) say which, `copy_plan` in what
//!   order, `throttle` how fast; `layered` rebuilds missed snapshots before (R28);
//! - `checks`: verifying and mending (R33), `scrub`: all of it, slowly.
//!
//! Every input changes the state it is about; what follows from it for the volume as a whole is decided in one place,
//! `settle_all`, which runs only when something other than plain I/O happened.

mod answers;
mod api;
mod calls;
mod catch_up;
mod checks;
mod config;
mod copies;
mod copy_plan;
mod cut;
mod delete;
mod extents;
mod flushes;
mod grow;
mod history;
mod idle;
mod intent_log;
mod jobs;
mod layered;
mod peers;
mod range_lock;
mod reconcile;
mod record_copies;
mod remove;
mod requests;
mod scrub;
mod tasks;
#[cfg(test)]
mod tests;
mod throttle;

pub use api::*;
// For the benches.
#[doc(hidden)]
pub use range_lock::RangeLock;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::guards::Guards;
use crate::ids::{Epoch, Generation, Region, ReplicaId, TargetId};
use crate::io_limits::IoLimits;
use crate::record::{ReplicaState, VolumeRecord};
use crate::record_store::Versioned;
use crate::timers;

use calls::Call;
use catch_up::CatchUp;
use checks::Checks;
use config::{PendingSwap, StoreCall};
use flushes::Flush;
use history::History;
use idle::Idle;
use intent_log::{ClearRound, LogEntry};
use jobs::Jobs;
use peers::{IoEntry, Peer};
use reconcile::Reconcile;
use requests::Request;
use scrub::Scrub;
use tasks::Task;
use throttle::Throttle;

/// The target side of the protocol; one per attached volume, owned by one thread.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    guards: Guards,
    state: TargetState,
    actions: VecDeque<TargetAction>,
    now_ms: u64,
    /// No replica is given up before this: the process slept and its input is not drained (R6).
    patient_until_ms: u64,
    random: u64,
    next_id: u64,

    // Configuration.
    store: StoreCall,
    record: Option<Versioned>,
    generation: Option<Generation>,
    /// The client is new: unflushed writes of the one before may be gone (R12).
    new_attachment: bool,
    taken_ms: u64,
    possible_loss: bool,
    pending: Option<PendingSwap>,
    history: History,
    /// Members that persisted the epoch in force (R10).
    told: BTreeSet<ReplicaId>,
    /// See [`Target::recompute`].
    gates: Gates,
    ack_set: BTreeSet<ReplicaId>,
    leases_until_ms: u64,

    // Replicas.
    peers: BTreeMap<ReplicaId, Peer>,
    ios: HashMap<IoId, IoEntry>,
    calls: BTreeMap<CallId, Call>,

    // Work.
    locks: RangeLock,
    tasks: BTreeMap<u64, Task>,
    requests: BTreeMap<RequestId, Request>,
    flushes: BTreeMap<u64, Flush>,
    /// Tasks that wait for something other than the lock, in order.
    gated: VecDeque<u64>,
    /// Tasks that were just given the lock.
    ready: VecDeque<u64>,
    /// Ends of clients' writes that every member has and nobody is told of before there are enough members. Their ranges are
    /// free: a replica that comes back needs them. Bounded by what clients have in flight.
    untold: Vec<(RequestId, Result<(), RequestError>)>,
    /// Reads that arrived and wait for leases (R4).
    lease_wait: VecDeque<u64>,
    logged: BTreeMap<Region, LogEntry>,
    clear_round: Option<ClearRound>,
    next_clear_ms: u64,
    reconcile: Reconcile,
    catch_up: Option<CatchUp>,
    jobs: Jobs,
    throttle: Throttle,
    idle: Idle,
    checks: Checks,
    reconcile_bytes_copied: u64,
    scrub: Scrub,
    stopping: Option<Stopping>,
    next_reader: u64,
    writes_acknowledged: u64,
    longest_stall_ms: u64,
    /// Something other than plain I/O happened: [`Target::settle_all`] is due.
    dirty: bool,
}

/// What the configuration allows at the moment.
#[derive(Debug, Clone, Copy, Default)]
struct Gates {
    /// New writes and copies may begin.
    begin: bool,
    /// Writes and flushes may be answered.
    acknowledge: bool,
    /// As many members as `min_in_sync`: clients may be told.
    enough: bool,
    /// Reads may be sent.
    read: bool,
}

#[derive(Debug)]
struct Stopping {
    deadline_ms: u64,
    step: StopStep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopStep {
    /// Requests are in flight.
    Draining,
    /// The last flush, and the emptying of the intent log.
    Clearing,
    /// Releases are under way.
    Releasing,
}

impl Target {
    /// Starts: the first action reads the record.
    #[must_use]
    pub fn new(now_ms: u64, config: TargetConfig) -> Self {
        Self::with_guards(now_ms, config, Guards::default())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn with_guards(now_ms: u64, config: TargetConfig, guards: Guards) -> Self {
        let mut target = Self {
            random: config.seed,
            config,
            guards,
            state: TargetState::Opening,
            actions: VecDeque::new(),
            now_ms,
            patient_until_ms: 0,
            next_id: 0,
            store: StoreCall::default(),
            record: None,
            generation: None,
            new_attachment: false,
            taken_ms: now_ms,
            possible_loss: false,
            pending: None,
            history: History::default(),
            told: BTreeSet::new(),
            gates: Gates::default(),
            ack_set: BTreeSet::new(),
            leases_until_ms: 0,
            peers: BTreeMap::new(),
            ios: HashMap::new(),
            calls: BTreeMap::new(),
            locks: RangeLock::default(),
            tasks: BTreeMap::new(),
            requests: BTreeMap::new(),
            flushes: BTreeMap::new(),
            gated: VecDeque::new(),
            ready: VecDeque::new(),
            untold: Vec::new(),
            lease_wait: VecDeque::new(),
            logged: BTreeMap::new(),
            clear_round: None,
            next_clear_ms: 0,
            reconcile: Reconcile::default(),
            catch_up: None,
            jobs: Jobs::default(),
            throttle: Throttle::new(now_ms),
            idle: Idle::default(),
            checks: Checks::default(),
            reconcile_bytes_copied: 0,
            scrub: Scrub::default(),
            stopping: None,
            next_reader: 0,
            writes_acknowledged: 0,
            longest_stall_ms: 0,
            dirty: true,
        };
        target.settle_all();
        target
    }

    /// Takes an input. `now_ms` never goes back.
    pub fn handle_event(&mut self, now_ms: u64, event: TargetEvent) {
        let pause_ms = timers::TICK_GAP_MS + self.tick_every_ms() - timers::HEARTBEAT_MS;
        if now_ms > self.now_ms + pause_ms && self.guards.tickgap {
            // R6: whatever arrived while this process slept is handled before anybody is called silent.
            self.patient_until_ms = now_ms + timers::TICK_GAP_MS;
        }
        self.now_ms = self.now_ms.max(now_ms);
        if self.state.is_final() {
            self.refuse_final(&event);
            return;
        }
        match event {
            TargetEvent::RecordRead { call, result } => self.on_record_read(call, result),
            TargetEvent::SwapAnswered { call, result } => self.on_swap_answered(call, result),
            TargetEvent::Opened { session, opened } => self.on_opened(session, opened),
            TargetEvent::OpenRefused { session, refusal } => self.on_open_refused(session, refusal),
            TargetEvent::OpenFailed { session } => self.on_open_failed(session),
            TargetEvent::SessionLost { session } => self.on_session_lost(session),
            TargetEvent::HeartbeatAnswered { session, sequence, cache_lost } => {
                self.on_heartbeat_answered(session, sequence, cache_lost);
            }
            TargetEvent::ControlDone { call } => self.on_control_done(call),
            TargetEvent::ControlRefused { call, error } => self.on_control_refused(call, error),
            TargetEvent::MapRead { call, map } => self.on_map_read(call, map),
            TargetEvent::Verified { call, blocks } => self.on_verified(call, blocks),
            TargetEvent::Scrub => self.on_scrub(),
            TargetEvent::ExtentsRead { call, extents } => self.on_extents_read(call, &extents),
            TargetEvent::ChangesRead { call, blocks } => self.on_changes_read(call, &blocks),
            TargetEvent::IoDone { io, result } => self.on_io_done(io, result),
            TargetEvent::Request { request, op } => self.on_request(request, op),
            TargetEvent::Job { job, what } => self.on_job(job, what),
            TargetEvent::Stop => self.on_stop(),
            TargetEvent::ClockJumped => self.on_clock_jumped(),
            TargetEvent::Tick => self.on_tick(),
        }
        self.settle_all();
        self.update_idle();
    }

    /// The next output, until there is none.
    pub fn poll_action(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    /// When [`TargetEvent::Tick`] is wanted, at the latest; `None` in a final state.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        if self.state.is_final() {
            return None;
        }
        let mut next = self.now_ms + self.tick_every_ms().min(self.guards.log_clear_every_ms);
        let mut take = |at: u64| next = next.min(at);
        if let Some(at) = self.store.retry_at_ms {
            take(at);
        }
        if let Some(stopping) = &self.stopping {
            take(stopping.deadline_ms);
        }
        for at in self.catch_up_timeout().into_iter().chain(self.scrub_timeout()) {
            take(at);
        }
        if let Some(at) = self.cut_timeout() {
            take(at);
        }
        for peer in self.peers.values() {
            take(self.peer_timeout(peer));
        }
        Some(next.max(self.now_ms))
    }

    /// Where the target stands.
    #[must_use]
    pub fn state(&self) -> &TargetState {
        &self.state
    }

    /// The volume's size once the record was read.
    #[must_use]
    pub fn size_bytes(&self) -> Option<u64> {
        self.record.as_ref().map(|r| r.record.size_bytes)
    }

    /// What its clients may do per second, as the record says; nothing is limited before it was read.
    #[must_use]
    pub fn limits(&self) -> IoLimits {
        self.record.as_ref().map_or_else(IoLimits::default, |r| r.record.params.limits)
    }

    /// The generation, once taken.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }

    /// The id this start was given.
    #[must_use]
    pub fn target_id(&self) -> TargetId {
        self.config.target_id
    }

    /// For GetStatus.
    #[must_use]
    pub fn status(&self) -> TargetStatus {
        TargetStatus {
            state: self.state.clone(),
            generation: self.generation.unwrap_or_default(),
            epoch: self.record.as_ref().map_or_else(Epoch::default, |r| r.record.epoch),
            size_bytes: self.size_bytes().unwrap_or(0),
            writes_acknowledged: self.writes_acknowledged,
            longest_stall_ms: self.longest_stall_ms,
            logged_regions: self.logged.len(),
            unreconciled_regions: self.reconcile.left(),
            reconcile_bytes_copied: self.reconcile_bytes_copied,
            possible_loss: self.possible_loss,
            corruption: self.checks.counts,
            scrub: self.scrub.status(),
            replicas: self.peers.iter().map(|(replica, peer)| self.replica_status(*replica, peer)).collect(),
        }
    }

    fn replica_status(&self, replica: ReplicaId, peer: &Peer) -> ReplicaStatus {
        let recorded = self.record.as_ref().and_then(|r| r.record.replicas.get(&replica)).map(|r| r.state);
        let state = match recorded {
            Some(ReplicaState::InSync) => "in_sync",
            Some(ReplicaState::Faulted) | None => "faulted",
            Some(ReplicaState::Offline { .. }) if self.catching_up() == Some(replica) => "catching_up",
            Some(ReplicaState::Offline { .. }) => "offline",
        };
        let last = (peer.resync_bytes_done, peer.resync_bytes_total);
        let (done, total) = self.catch_up_progress(replica).unwrap_or(last);
        ReplicaStatus {
            replica,
            node: peer.node.clone(),
            state,
            resync_bytes_done: done,
            resync_bytes_total: total,
            resync_bytes_copied: peer.resync_bytes_copied,
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// SplitMix64, for epoch nonces: the seed is random, the sequence replays.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn emit(&mut self, action: TargetAction) {
        self.actions.push_back(action);
    }

    fn volume(&self) -> Option<&VolumeRecord> {
        self.record.as_ref().map(|r| &r.record)
    }

    fn is_member(&self, replica: ReplicaId) -> bool {
        self.volume().is_some_and(|record| record.in_sync.contains(&replica))
    }

    fn members(&self) -> Vec<ReplicaId> {
        self.volume().map(|record| record.in_sync.iter().copied().collect()).unwrap_or_default()
    }

    fn set_state(&mut self, state: TargetState) {
        if self.state != state {
            self.state = state.clone();
            self.emit(TargetAction::State(state));
        }
    }

    /// Draws every conclusion from what changed, until nothing changes any more.
    fn settle_all(&mut self) {
        loop {
            while let Some(id) = self.ready.pop_front() {
                self.locked(id);
            }
            if !self.dirty || self.state.is_final() {
                return;
            }
            self.dirty = false;
            self.recompute();
            self.pump_jobs();
            self.recompute();
            self.pump_config();
            self.pump_sessions();
            self.pump_reconcile();
            self.pump_catch_up();
            self.pump_scrub();
            self.pump_log();
            self.pump_stop();
            self.recompute();
            self.pump_gated();
            self.recheck_acknowledgements();
        }
    }

    fn on_tick(&mut self) {
        self.dirty = true;
        self.tick_store();
        self.update_idle();
        self.tick_peers();
        self.tick_cut();
        if self.stopping.as_ref().is_some_and(|s| self.now_ms >= s.deadline_ms) {
            self.finish(TargetState::Stopped, RequestError::Stopped);
        }
    }

    /// Enters a final state: every request is answered, every session closed.
    fn finish(&mut self, state: TargetState, error: RequestError) {
        for request in std::mem::take(&mut self.requests).into_keys() {
            self.emit(TargetAction::Complete { request, result: Err(error) });
        }
        self.end_jobs();
        let replicas: Vec<ReplicaId> = self.peers.keys().copied().collect();
        for replica in replicas {
            self.close_link(replica);
        }
        self.tasks.clear();
        self.flushes.clear();
        self.gated.clear();
        self.ready.clear();
        self.untold.clear();
        self.lease_wait.clear();
        self.locks.clear();
        self.ios.clear();
        self.calls.clear();
        self.catch_up = None;
        self.checks.clear();
        self.set_state(state);
    }

    fn fence(&mut self, reason: String) {
        self.finish(TargetState::Fenced(reason), RequestError::Fenced);
    }

    fn fail(&mut self, reason: String) {
        self.finish(TargetState::Failed(reason), RequestError::Failed);
    }

    fn refuse_final(&mut self, event: &TargetEvent) {
        if let TargetEvent::Job { job, .. } = event {
            self.emit(TargetAction::JobDone { job: *job, result: Err(JobError::Ended) });
        }
        let TargetEvent::Request { request, .. } = event else { return };
        let error = match self.state {
            TargetState::Fenced(_) => RequestError::Fenced,
            TargetState::Stopped => RequestError::Stopped,
            TargetState::Failed(_) | TargetState::Opening | TargetState::Settling | TargetState::Serving => {
                RequestError::Failed
            }
        };
        self.emit(TargetAction::Complete { request: *request, result: Err(error) });
    }

    fn on_stop(&mut self) {
        if self.stopping.is_none() {
            self.end_jobs();
            self.stopping = Some(Stopping {
                deadline_ms: self.now_ms + timers::STOP_DEADLINE_MS,
                step: StopStep::Draining,
            });
            self.dirty = true;
        }
    }

    /// A graceful stop: drain, flush, clear the log, release; the next start has nothing to reconcile or to wait for.
    fn pump_stop(&mut self) {
        let Some(step) = self.stopping.as_ref().map(|s| s.step) else { return };
        if self.state != TargetState::Serving && step != StopStep::Releasing {
            return self.finish(TargetState::Stopped, RequestError::Stopped);
        }
        self.abort_catch_up();
        match step {
            StopStep::Draining
                if self.tasks.is_empty() && self.flushes.is_empty() && self.clear_round.is_none() =>
            {
                self.set_stop_step(StopStep::Clearing);
                self.start_clear_round(true);
            }
            StopStep::Clearing if self.clear_round.is_none() => {
                self.set_stop_step(StopStep::Releasing);
                self.release_all();
            }
            StopStep::Releasing if self.calls.is_empty() => {
                self.finish(TargetState::Stopped, RequestError::Stopped)
            }
            StopStep::Draining | StopStep::Clearing | StopStep::Releasing => {}
        }
    }

    /// Sessions end now because they are released: no member is lost by that, none is swapped out.
    fn is_releasing(&self) -> bool {
        self.stopping.as_ref().is_some_and(|s| s.step == StopStep::Releasing)
    }

    fn set_stop_step(&mut self, step: StopStep) {
        if let Some(stopping) = &mut self.stopping {
            stopping.step = step;
        }
        self.dirty = true;
    }
}
