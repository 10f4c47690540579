//! The record and the in-sync set: taking the generation, opening, swapping out, joining, telling the epoch.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{NodeName, RecordVersion, ReplicaId};
use crate::record::{ReplicaState, VolumeRecord};
use crate::record_store::{StoreError, Versioned};
use crate::timers;
use crate::transitions::{self, TransitionError};

use super::calls::CallKind;
use super::peers::{Link, Peer};
use super::{CallId, Control, Gates, Target, TargetAction, TargetState};

/// The one call to the record store that may be under way.
#[derive(Debug, Default)]
pub(super) struct StoreCall {
    outstanding: Option<CallId>,
    /// Nothing is sent before.
    pub retry_at_ms: Option<u64>,
    failures: u32,
    /// The record must be read before anything else is decided.
    need_read: bool,
    /// Since when every read gave an older version than one that was known.
    older_since_ms: Option<u64>,
    /// While degraded: when the record is read again.
    next_poll_ms: u64,
    /// When the call that is under way was sent.
    sent_ms: u64,
}

/// A swap whose outcome is not known yet (R8). It is repeated word for word until it is: the same version is expected
/// and the same record proposed, so however many copies of it are under way, at most one takes effect.
#[derive(Debug)]
pub(super) struct PendingSwap {
    pub kind: SwapKind,
    expected: RecordVersion,
    pub proposed: VolumeRecord,
    /// The client is new (decided by the record that `Take` replaces).
    new_attachment: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SwapKind {
    /// generation+1.
    Take,
    /// Members leave, or one is taken out for good.
    Out,
    /// A replica joins.
    In(ReplicaId),
    /// Snapshots or size, for the current job or for a replica that catches up; the set stays.
    Layers,
    /// Whether the record is suspected to be of another history (R35).
    History,
}

impl Target {
    pub(super) fn pump_config(&mut self) {
        self.advance_settling();
        self.pump_record_copies();
        if self.store.outstanding.is_some() || self.store.retry_at_ms.is_some() {
            return;
        }
        self.poll_record();
        if self.record.is_none() || self.store.need_read {
            let call = CallId(self.new_id());
            self.store.outstanding = Some(call);
            self.store.sent_ms = self.now_ms;
            return self.emit(TargetAction::ReadRecord { call });
        }
        if self.pending.is_none() && !self.is_releasing() {
            self.propose();
        }
        self.send_swap();
    }

    /// Replicas are given up and listed by others than the target (R34); it looks while it lacks some.
    fn poll_record(&mut self) {
        let degraded = self.volume().is_some_and(|r| r.in_sync.len() < r.params.replicas as usize);
        let due = degraded && self.state == TargetState::Serving && self.pending.is_none();
        if due && self.stopping.is_none() && self.now_ms >= self.store.next_poll_ms {
            self.store.next_poll_ms = self.now_ms + timers::RECORD_POLL_MS;
            self.store.need_read = true;
        }
    }

    /// Replicas that were listed or given up since the record was read last.
    fn learn_replicas(&mut self) {
        let Some(record) = self.volume().filter(|_| self.generation.is_some()) else { return };
        let listed: BTreeMap<ReplicaId, NodeName> = record
            .replicas
            .iter()
            .filter(|(_, entry)| entry.state != ReplicaState::Faulted)
            .map(|(replica, entry)| (*replica, entry.node.clone()))
            .collect();
        let gone: Vec<ReplicaId> =
            self.peers.keys().filter(|replica| !listed.contains_key(replica)).copied().collect();
        let new = listed.keys().any(|replica| !self.peers.contains_key(replica));
        for replica in &gone {
            self.lose(*replica);
            self.peers.remove(replica);
        }
        for (replica, node) in listed {
            self.peers.entry(replica).or_insert_with(|| Peer::new(node));
        }
        if new || !gone.is_empty() {
            // R10: who is absent is told like an epoch.
            self.told.clear();
        }
    }

    fn send_swap(&mut self) {
        let Some(pending) = &self.pending else { return };
        let (expected, record) = (pending.expected, Box::new(pending.proposed.clone()));
        let call = CallId(self.new_id());
        self.store.outstanding = Some(call);
        self.store.sent_ms = self.now_ms;
        self.emit(TargetAction::Swap { call, expected, record });
    }

    /// Decides on the next change of the record, if one is due.
    fn propose(&mut self) {
        if self.generation.is_none() {
            return self.propose_take();
        }
        if let Some(wanted) = self.history_swap() {
            return self.propose_swap(SwapKind::History, wanted);
        }
        let leaving = match self.state {
            TargetState::Opening => match self.judge_opening() {
                Some(leaving) => {
                    self.set_state(TargetState::Settling);
                    self.dirty = true;
                    leaving
                }
                None => return,
            },
            TargetState::Settling | TargetState::Serving => self.judge_members(),
            TargetState::Fenced(_) | TargetState::Failed(_) | TargetState::Stopped => return,
        };
        if !leaving.is_empty() {
            self.propose_out(&leaving);
        } else if let Some(wanted) = self.removal_due().and_then(|replica| self.removed(replica)) {
            self.propose_swap(SwapKind::Out, wanted);
        } else if let Some(wanted) = self.job_swap() {
            self.propose_swap(SwapKind::Layers, wanted);
        } else if let Some(Ok(wanted)) = self.holder_swap() {
            self.propose_swap(SwapKind::Layers, Ok(wanted));
        } else if let Some(replica) = self.ready_to_join() {
            self.propose_in(replica);
        }
    }

    /// What the current job, or the record's history, wants to change.
    fn propose_swap(&mut self, kind: SwapKind, wanted: Result<VolumeRecord, TransitionError>) {
        let Some(Versioned { version, .. }) = &self.record else { return };
        let expected = *version;
        match wanted {
            Ok(proposed) => {
                self.pending = Some(PendingSwap { kind, expected, proposed, new_attachment: false });
                self.dirty = true;
            }
            Err(error) if matches!(kind, SwapKind::Layers | SwapKind::Out) => self.job_refused(error),
            // The record moved on: it is read again.
            Err(_) => self.store.need_read = true,
        }
    }

    fn propose_take(&mut self) {
        let Some(Versioned { version, record }) = &self.record else { return };
        let config = &self.config;
        // R12: on a detached volume nobody knows of unflushed writes any more.
        let new_attachment = config.detached || record.attachment > record.generation_attachment;
        let expected = *version;
        let shared = record.target_id.filter(|_| !self.guards.onegen && !new_attachment);
        if let Some(shared) = shared {
            self.config.target_id = shared;
            return self.taken(false);
        }
        let taken = if config.detached {
            transitions::take_detached_generation(record, config.target_id)
        } else {
            transitions::take_generation(record, &config.node, config.attachment, config.target_id)
        };
        match taken {
            Ok(proposed) => {
                self.pending = Some(PendingSwap { kind: SwapKind::Take, expected, proposed, new_attachment });
            }
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn propose_out(&mut self, leaving: &[ReplicaId]) {
        let nonce = self.next_random();
        let Some(Versioned { version, record }) = &self.record else { return };
        let expected = *version;
        if let Ok(proposed) = transitions::swap_out(record, self.config.target_id, leaving, nonce) {
            self.pending =
                Some(PendingSwap { kind: SwapKind::Out, expected, proposed, new_attachment: false });
            self.dirty = true;
        }
    }

    fn propose_in(&mut self, replica: ReplicaId) {
        let nonce = self.next_random();
        let Some(Versioned { version, record }) = &self.record else { return };
        let expected = *version;
        match transitions::join(record, self.config.target_id, replica, nonce) {
            Ok(proposed) => {
                let kind = SwapKind::In(replica);
                self.pending = Some(PendingSwap { kind, expected, proposed, new_attachment: false });
                self.dirty = true;
            }
            // Faulted meanwhile.
            Err(_) => self.abort_catch_up(),
        }
    }

    /// R11, R12: whom to swap out so that serving can begin; `None` while it is too early to say.
    fn judge_opening(&mut self) -> Option<Vec<ReplicaId>> {
        if self.awaits_all() || !self.history.is_sound() {
            return None;
        }
        let members = self.members();
        // R26: one that was promoted may have missed a growth.
        if members.iter().any(|r| self.is_open(*r) && self.grow_first(*r)) {
            return None;
        }
        let cache_lost = |target: &Self, r: &ReplicaId| target.peers.get(r).is_some_and(|p| p.cache_lost);
        let (opened, unopened): (Vec<_>, Vec<_>) = members.into_iter().partition(|r| self.is_open(*r));
        let (lost, good): (Vec<_>, Vec<_>) = opened.into_iter().partition(|r| cache_lost(self, r));
        if !good.is_empty() {
            if !self.guards.serveall {
                return Some(lost);
            }
            let waiting = unopened.iter().any(|r| !self.patience_ended(*r));
            return (!waiting).then(|| unopened.into_iter().chain(lost).collect());
        }
        if lost.is_empty() {
            return None;
        }
        if !self.new_attachment && self.guards.sameatt {
            if unopened.iter().all(|r| cache_lost(self, r)) {
                self.fail(
                    "every in-sync replica lost its write cache under a client that is still running: writes it was \
                     told are done may be gone. Publish the volume anew to go on with what is left"
                        .to_owned(),
                );
            }
            return None;
        }
        if !unopened.is_empty() && self.now_ms < self.taken_ms + timers::CACHE_GRACE_MS {
            return None;
        }
        // Going on with what survived is what a single disk does after a power cut.
        self.possible_loss = true;
        for replica in lost {
            if let Some(peer) = self.peers.get_mut(&replica) {
                peer.cache_lost = false;
                peer.loss_accepted = true;
            }
        }
        Some(unopened)
    }

    fn patience_ended(&self, replica: ReplicaId) -> bool {
        let Some(peer) = self.peers.get(&replica) else { return true };
        let waited = self.now_ms.saturating_sub(self.taken_ms);
        let unreachable = peer.failures > 0 && waited >= timers::OPEN_UNREACHABLE_MS;
        unreachable || waited >= timers::OPEN_PATIENCE_MS || matches!(peer.link, Link::Open(_))
    }

    /// R9: members that must leave, if one that kept its cache remains.
    fn judge_members(&mut self) -> Vec<ReplicaId> {
        let members = self.members();
        let (good, bad): (Vec<_>, Vec<_>) = members.into_iter().partition(|r| self.is_good(*r));
        if !good.is_empty() {
            let still_opens = |r: &ReplicaId| !self.guards.serveall && !self.patience_ended(*r);
            return bad.into_iter().filter(|r| !still_opens(r)).collect();
        }
        if bad.iter().all(|r| self.peers.get(r).is_some_and(|p| p.cache_lost)) && self.guards.sameatt {
            self.fail("every in-sync replica lost its write cache: publish the volume anew".to_owned());
        }
        Vec::new()
    }

    /// Members before and after the pending swap, if there is one: the intersection of R8.
    pub(super) fn deciding(&self) -> Vec<ReplicaId> {
        let stays = |r: &ReplicaId| self.pending.as_ref().is_none_or(|p| p.proposed.in_sync.contains(r));
        self.members().into_iter().filter(stays).collect()
    }

    pub(super) fn can_go_on_without(&self, replica: ReplicaId) -> bool {
        !self.is_member(replica) || self.members().into_iter().any(|r| r != replica && self.is_good(r))
    }

    pub(super) fn on_record_read(&mut self, call: CallId, result: Result<Versioned, StoreError>) {
        if self.store.outstanding != Some(call) {
            return;
        }
        self.store.outstanding = None;
        self.dirty = true;
        match result {
            Ok(read) if self.record.as_ref().is_some_and(|known| read.version < known.version) => {
                self.read_older();
            }
            Ok(read) => {
                self.store.failures = 0;
                self.store.need_read = false;
                self.store.older_since_ms = None;
                self.learn(read);
                self.job_record_read();
                self.confirmed(call);
            }
            Err(StoreError::NotFound(volume)) => self.fail(format!("volume {volume} has no record any more")),
            Err(StoreError::Refused(reason)) if self.generation.is_none() => self.fail(reason),
            Err(
                StoreError::Unknown(_)
                | StoreError::Refused(_)
                | StoreError::Exists(_)
                | StoreError::Conflict(_)
                | StoreError::GroupConflict(_),
            ) => self.retry_store(),
        }
    }

    /// R7: an older version than the one known says nothing, least of all that a pending swap was not applied. A store
    /// that gives nothing else for long was restored (R35).
    fn read_older(&mut self) {
        let since_ms = *self.store.older_since_ms.get_or_insert(self.now_ms);
        if self.now_ms.saturating_sub(since_ms) < timers::OLDER_READS_MS {
            return self.retry_store();
        }
        self.fail("the record store gives an older record than before: it was restored".to_owned());
    }

    fn learn(&mut self, read: Versioned) {
        let Some(pending) = self.pending.take() else {
            if self.check_still_ours(&read.record, None) {
                self.record = Some(read);
                self.learn_replicas();
            }
            return;
        };
        let applied = match pending.kind {
            // R1: own success is recognised by the target id.
            SwapKind::Take => read.record.target_id == Some(self.config.target_id),
            SwapKind::Out | SwapKind::In(_) => read.record.epoch == pending.proposed.epoch,
            SwapKind::Layers => same_layers(&read.record, &pending.proposed),
            SwapKind::History => read.record.restored == pending.proposed.restored,
        };
        if applied && self.check_still_ours(&read.record, Some(&pending)) {
            self.commit(pending, read);
        } else if read.version == pending.expected {
            // Not applied yet; a copy of it may still be under way.
            self.pending = Some(pending);
        } else if pending.kind == SwapKind::Take || self.check_still_ours(&read.record, None) {
            // The version moved on without it: it can never be applied any more. Decide anew.
            self.record = Some(read);
            self.learn_replicas();
        }
    }

    /// R7: a moved generation fences; a moved epoch that is not ours was restored from a backup (R35).
    fn check_still_ours(&mut self, record: &VolumeRecord, pending: Option<&PendingSwap>) -> bool {
        let Some(generation) = self.generation else { return true };
        let known = self.volume().map(|r| r.epoch);
        if record.target_id != Some(self.config.target_id) {
            self.fence(format!(
                "generation {} took the volume, this is generation {generation}",
                record.generation
            ));
            return false;
        }
        let expected = pending.map_or(known, |p| Some(p.proposed.epoch));
        if Some(record.epoch) != known && Some(record.epoch) != expected {
            self.fail(
                "the record's epoch is none of this target's: the record store was restored".to_owned(),
            );
            return false;
        }
        true
    }

    pub(super) fn on_swap_answered(&mut self, call: CallId, result: Result<RecordVersion, StoreError>) {
        if self.store.outstanding != Some(call) {
            return;
        }
        self.store.outstanding = None;
        self.dirty = true;
        match result {
            Ok(version) => {
                self.store.failures = 0;
                if let Some(pending) = self.pending.take() {
                    let record = pending.proposed.clone();
                    self.commit(pending, Versioned { version, record });
                }
                self.confirmed(call);
            }
            Err(StoreError::Conflict(_)) => self.store.need_read = true,
            Err(StoreError::NotFound(volume)) => self.fail(format!("volume {volume} has no record any more")),
            Err(
                StoreError::Unknown(_)
                | StoreError::Refused(_)
                | StoreError::Exists(_)
                | StoreError::GroupConflict(_),
            ) => self.retry_store(),
        }
    }

    /// Nothing is known: read, after a pause, without end; I/O that needs the answer waits.
    fn retry_store(&mut self) {
        let pause = timers::STORE_RETRY_MIN_MS << self.store.failures.min(10);
        self.store.failures += 1;
        self.store.need_read = true;
        self.store.retry_at_ms = Some(self.now_ms + pause.min(timers::STORE_RETRY_MAX_MS));
        if !self.guards.unknown {
            self.pending = self.pending.take().filter(|p| p.kind == SwapKind::Take);
        }
    }

    /// The store said that the volume is still ours, unless this target is over now.
    fn confirmed(&mut self, call: CallId) {
        let config = &self.config;
        let published = self.record.as_ref().is_some_and(|Versioned { record, .. }| {
            record.attached_to.as_ref() == Some(&config.node) && record.attachment == config.attachment
        });
        let sent_ms = published.then_some(self.store.sent_ms);
        self.store.need_read |= self.history.confirmed(call, sent_ms);
    }

    /// No call to the store is under way or waits for its time.
    pub(super) fn store_is_idle(&self) -> bool {
        self.store.outstanding.is_none() && self.store.retry_at_ms.is_none()
    }

    /// Nothing is decided before the record was read anew.
    pub(super) fn read_again_first(&mut self) {
        self.store.need_read = true;
    }

    pub(super) fn tick_store(&mut self) {
        if self.store.retry_at_ms.is_some_and(|at| at <= self.now_ms) {
            self.store.retry_at_ms = None;
        }
    }

    fn commit(&mut self, pending: PendingSwap, versioned: Versioned) {
        let PendingSwap { kind, new_attachment, .. } = pending;
        let before = self.members();
        if self.volume().is_none_or(|known| known.epoch != versioned.record.epoch) {
            self.told.clear();
        }
        self.record = Some(versioned);
        match kind {
            SwapKind::Take => self.taken(new_attachment),
            SwapKind::Out => {
                let gone: Vec<ReplicaId> = before.into_iter().filter(|r| !self.is_member(*r)).collect();
                for replica in gone {
                    self.left(replica);
                }
                // R34: one that was taken out for good is none of the target's any more.
                self.learn_replicas();
            }
            SwapKind::In(replica) => self.joined(replica),
            // The job looks at the record.
            SwapKind::Layers => {}
            SwapKind::History => self.history_told(),
        }
    }

    fn taken(&mut self, new_attachment: bool) {
        self.new_attachment = new_attachment;
        self.taken_ms = self.now_ms;
        let Some(record) = self.volume() else { return };
        let peers: BTreeMap<ReplicaId, Peer> = record
            .replicas
            .iter()
            .filter(|(_, entry)| entry.state != ReplicaState::Faulted)
            .map(|(replica, entry)| (*replica, Peer::new(entry.node.clone())))
            .collect();
        self.generation = Some(record.generation);
        self.peers = peers;
        self.emit(TargetAction::State(TargetState::Opening));
    }

    fn left(&mut self, replica: ReplicaId) {
        self.close_link(replica);
        self.job_session_lost(replica);
        self.calls.retain(|_, call| call.replica != replica || !call.kind.is_job());
        let retry_at_ms = self.now_ms + timers::REOPEN_MIN_MS;
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.retry_at_ms = retry_at_ms;
            // A full or failing disk that answers at once must not be tried in a tight loop.
            peer.failures = if peer.expelled { peer.failures.max(2) } else { 1 };
            peer.cache_lost = false;
            peer.loss_accepted = false;
        }
        self.drop_clear_calls(replica);
    }

    /// R10: tells every member the epoch in force; when all have it, a target that settles begins to serve.
    fn advance_settling(&mut self) {
        if !matches!(self.state, TargetState::Settling | TargetState::Serving) || !self.history.is_sound() {
            return;
        }
        self.tell();
        let members = self.members();
        let all_open = members.iter().all(|r| self.is_open(*r)) || !self.guards.serveall;
        let ready = all_open && members.iter().all(|r| self.told.contains(r) || !self.is_open(*r));
        if self.state == TargetState::Settling
            && self.pending.is_none()
            && ready
            && self.judge_members().is_empty()
        {
            self.start_serving();
        }
    }

    fn tell(&mut self) {
        let Some(read) = &self.record else { return };
        let (version, record) = (read.version, &read.record);
        let number = record.epoch.number;
        let is_asked = |replica: &ReplicaId| {
            let tells = |kind| matches!(kind, CallKind::Tell(told, _) if told == number);
            self.calls.values().any(|call| call.replica == *replica && tells(call.kind))
        };
        let due = |r: &&ReplicaId| self.is_open(**r) && !self.told.contains(r) && !is_asked(r);
        let due: Vec<ReplicaId> = record.in_sync.iter().filter(due).copied().collect();
        if due.is_empty() {
            return;
        }
        let absent = record.replicas.iter().filter_map(|(replica, entry)| match entry.state {
            ReplicaState::Offline { left_epoch } => Some((*replica, left_epoch)),
            ReplicaState::InSync | ReplicaState::Faulted => None,
        });
        let (absent, in_sync) = (absent.collect(), record.in_sync.clone());
        let op = Control::SetEpoch { epoch: record.epoch, in_sync, absent, record: Box::new(read.clone()) };
        for replica in due {
            self.send_control(replica, CallKind::Tell(number, version), op.clone());
            self.record_sent(replica, version);
        }
    }

    fn start_serving(&mut self) {
        let mut regions = BTreeSet::new();
        for replica in self.members() {
            if let Some(session) = self.peers.get(&replica).and_then(Peer::session) {
                regions.extend(session.logged.iter().copied());
            }
        }
        for region in &regions {
            self.is_logged_by_member(*region);
        }
        if self.guards.intent {
            self.reconcile.start(regions);
        }
        self.set_state(TargetState::Serving);
        self.dirty = true;
    }

    /// Works out what the configuration allows, after each change of it.
    pub(super) fn recompute(&mut self) {
        let members = self.members();
        let mut ack_set: BTreeSet<ReplicaId> = members.iter().copied().collect();
        let out = match &self.pending {
            Some(pending) if pending.kind != SwapKind::Take => {
                if self.guards.joint {
                    ack_set.extend(pending.proposed.in_sync.iter().copied());
                }
                pending.kind == SwapKind::Out
            }
            _ => false,
        };
        if self.guards.joint {
            ack_set.extend(self.joining());
        }
        let serving = self.state == TargetState::Serving && self.history.is_sound();
        let told = !self.guards.tell || members.iter().all(|r| self.told.contains(r));
        let enough = self.volume().is_some_and(|r| members.len() >= r.params.min_in_sync as usize);
        let all_open = ack_set.iter().all(|r| self.is_open(*r));
        // R12: a member that lost its cache leaves, or the target fails; until then it counts for nothing, and its log,
        // which tells the next target so, must not be cleared.
        let lost = |r: &ReplicaId| self.peers.get(r).is_some_and(|p| p.cache_lost);
        let lost = self.guards.keepgood && self.guards.sameatt && members.iter().any(lost);
        let acknowledge = serving && !out && told && !lost;
        let begin = acknowledge && all_open && !self.cut_holds_writes();
        // Not a matter of the others: a member can only come back where copies, flushes and the clearing of the log go on.
        self.gates = Gates { begin, acknowledge, enough, read: serving };
        self.ack_set = ack_set;
        self.recompute_leases();
    }
}

/// Whether two records agree in what only the generation's target changes besides the set; clones are others' (R30).
fn same_layers(a: &VolumeRecord, b: &VolumeRecord) -> bool {
    let of = |record: &VolumeRecord| -> Vec<_> {
        record.snapshots.iter().map(|s| (s.id, s.state, s.holders.clone())).collect()
    };
    a.size_bytes == b.size_bytes && of(a) == of(b)
}
