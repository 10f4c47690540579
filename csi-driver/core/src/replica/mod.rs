//! One full copy of a volume: who may use it, what it remembers, and in which order things reach its disk.
//!
//! - `session`: letting targets in and out, leases (R2 to R5, R35);
//! - `data`: reads, writes, the intent log before the first change of a region (R18), map bits (R22);
//! - `control`: epochs, clearing the log, dirty maps (R10, R18, R21, R24);
//! - `snapshots`: freezing and dropping layers, growth (R27, R28, R31).
//!
//! A write into a logged region costs nothing but itself: no meta, log or map operation goes before it.

mod api;
mod control;
mod data;
pub mod meta;
mod session;
mod snapshots;
#[cfg(test)]
mod tests;

pub use api::*;
pub use meta::ReplicaMeta;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::dirty_map::{Dirty, DirtyMap};
use crate::guards::Guards;
use crate::ids::{BLOCK_BYTES, Region, ReplicaId, SessionToken, SnapshotId, TargetId};

use control::ControlWait;
use data::WaitingWrite;
use session::{Lease, Opening, Session};

/// The replica side of the protocol; one per replica, owned by one thread.
#[derive(Debug)]
pub struct Replica {
    guards: Guards,
    now_ms: u64,
    actions: VecDeque<ReplicaAction>,
    /// As last given to the disk.
    meta: ReplicaMeta,
    /// Regions durably logged and not being cleared.
    log: BTreeSet<Region>,
    /// Regions of the LogAdd under way.
    adding: BTreeSet<Region>,
    /// Regions of the next LogAdd; grows while one is under way.
    to_add: BTreeSet<Region>,
    /// Writes that wait for a LogAdd.
    waiting: VecDeque<WaitingWrite>,
    /// Writes on the disk, by region; ClearLog leaves such regions alone.
    writing: BTreeMap<Region, u32>,
    maps: BTreeMap<ReplicaId, DirtyMap>,
    /// Regions of each map whose bits are not durable; the log covers them (R22).
    map_unsaved: BTreeMap<ReplicaId, BTreeSet<Region>>,
    /// Regions that were logged when the cache was lost and are not cleared since (R19).
    crash_log: BTreeSet<Region>,
    failed: bool,
    session: Option<Session>,
    opening: Option<Opening>,
    lease: Option<Lease>,
    /// Before this no new generation is let in (R3).
    not_before_ms: u64,
    /// The target that opens or opened last, and the number of its Open. Not durable: a request that was sent to an
    /// earlier start of this process died with its connection.
    last_open: Option<(TargetId, u64)>,
    /// Lease calls that are not answered while another target is being let in (R2).
    held_leases: VecDeque<ReplicaCall>,
    next_disk: u64,
    disk: HashMap<DiskId, DiskWait>,
    controls: BTreeMap<u64, ControlWait>,
    next_control: u64,
    /// Frozen layers, oldest first.
    snapshots: Vec<SnapshotId>,
    /// The Freeze that waits for writes on the disk.
    freezing: Option<u64>,
}

/// What a disk operation's end is waited for.
#[derive(Debug, Clone)]
enum DiskWait {
    /// A data request.
    Data { call: ReplicaCall, token: SessionToken, op: DataOp },
    /// The LogAdd under way.
    LogAdd,
    /// One of a control request's operations.
    Control(u64),
    /// One of the operations that end an Open.
    Open,
    /// The cookie is gone: the failure may be reported.
    Poisoned { failed: Option<(ReplicaCall, DiskError)> },
}

impl Replica {
    /// Starts from what the store found on disk.
    #[must_use]
    pub fn new(now_ms: u64, start: ReplicaStart) -> Self {
        Self::with_guards(now_ms, start, Guards::default())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn with_guards(now_ms: u64, start: ReplicaStart, guards: Guards) -> Self {
        let ReplicaStart { mut meta, log, maps, boot_cookie, snapshots } = start;
        // R19: whatever is in the log may not be on the disk if the cache went with the cookie.
        if !log.is_empty() && boot_cookie != Some(meta.cookie) && guards.instance {
            meta.cache_lost = true;
        }
        let crash_log = if meta.cache_lost { log.clone() } else { BTreeSet::new() };
        let waits = meta.generation.0 > 0 && guards.leasewait;
        let mut replica = Self {
            guards,
            now_ms,
            actions: VecDeque::new(),
            not_before_ms: if waits { now_ms + meta.lease_ms } else { 0 },
            last_open: None,
            meta,
            log,
            adding: BTreeSet::new(),
            to_add: BTreeSet::new(),
            waiting: VecDeque::new(),
            writing: BTreeMap::new(),
            maps,
            map_unsaved: BTreeMap::new(),
            crash_log,
            failed: false,
            session: None,
            opening: None,
            lease: None,
            held_leases: VecDeque::new(),
            next_disk: 0,
            disk: HashMap::new(),
            controls: BTreeMap::new(),
            next_control: 0,
            snapshots,
            freezing: None,
        };
        // R22: bits set since a map was last saved are covered by the log.
        if guards.mapdurable {
            replica.merge_log_into_maps();
        }
        replica
    }

    /// Takes an input. `now_ms` never goes back.
    pub fn handle_event(&mut self, now_ms: u64, event: ReplicaEvent) {
        self.now_ms = self.now_ms.max(now_ms);
        if self.failed && !matches!(event, ReplicaEvent::DiskDone { .. }) {
            self.refuse_failed(&event);
            return;
        }
        match event {
            ReplicaEvent::Open { call, request, token } => self.on_open(call, request, token),
            ReplicaEvent::OpenCancelled { call } => self.on_open_cancelled(call),
            ReplicaEvent::Control { call, key, op } => self.on_control(call, key, op),
            ReplicaEvent::Data { call, token, op } => self.on_data(call, token, op),
            ReplicaEvent::ConnectionLost { token } => self.on_connection_lost(token),
            ReplicaEvent::ConnectionsClosed { token } => self.on_connections_closed(token),
            ReplicaEvent::DiskDone { id, result } => self.on_disk_done(id, result),
            ReplicaEvent::Tick => {}
        }
        self.advance_open();
    }

    /// The next output, until there is none.
    pub fn poll_action(&mut self) -> Option<ReplicaAction> {
        self.actions.pop_front()
    }

    /// When [`ReplicaEvent::Tick`] is wanted, at the latest.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        self.open_wait_until()
    }

    /// Whether a connection with this token may be let in.
    #[must_use]
    pub fn accepts(&self, token: SessionToken) -> bool {
        !self.failed && self.session.as_ref().is_some_and(|s| s.token == token && !s.closing)
    }

    /// The meta as last given to the disk.
    #[must_use]
    pub fn meta(&self) -> &ReplicaMeta {
        &self.meta
    }

    /// What is known of each absent replica's missing blocks.
    #[must_use]
    pub fn maps(&self) -> &BTreeMap<ReplicaId, DirtyMap> {
        &self.maps
    }

    /// Regions in the intent log.
    #[must_use]
    pub fn logged_regions(&self) -> usize {
        self.log.len()
    }

    fn emit_disk(&mut self, op: DiskOp, wait: DiskWait) {
        self.next_disk += 1;
        let id = DiskId(self.next_disk);
        self.disk.insert(id, wait);
        self.actions.push_back(ReplicaAction::Disk { id, op });
    }

    fn reply(&mut self, call: ReplicaCall, reply: ReplicaReply) {
        self.actions.push_back(ReplicaAction::Reply { call, reply });
    }

    fn refuse(&mut self, call: ReplicaCall, refusal: RequestRefusal) {
        self.reply(call, ReplicaReply::Done(Err(refusal)));
    }

    fn refuse_failed(&mut self, event: &ReplicaEvent) {
        match event {
            ReplicaEvent::Open { call, .. } => {
                self.reply(*call, ReplicaReply::Open(Err(OpenRefusal::DiskFailed)));
            }
            ReplicaEvent::Control { call, .. } | ReplicaEvent::Data { call, .. } => {
                self.refuse(*call, RequestRefusal::Disk(DiskError::Device));
            }
            ReplicaEvent::OpenCancelled { .. }
            | ReplicaEvent::ConnectionLost { .. }
            | ReplicaEvent::ConnectionsClosed { .. }
            | ReplicaEvent::DiskDone { .. }
            | ReplicaEvent::Tick => {}
        }
    }

    fn on_disk_done(&mut self, id: DiskId, result: Result<(), DiskError>) {
        let Some(wait) = self.disk.remove(&id) else { return };
        if self.failed && !matches!(wait, DiskWait::Poisoned { .. }) {
            return;
        }
        match (wait, result) {
            (DiskWait::Data { call, token, op }, result) => self.on_data_done(call, token, op, result),
            (DiskWait::Poisoned { failed }, _) => {
                if let Some((call, error)) = failed {
                    self.refuse(call, RequestRefusal::Disk(error));
                }
                self.actions.push_back(ReplicaAction::Failed);
            }
            (DiskWait::Control(number), Err(error)) if error.is_refusal() && self.changes_layers(number) => {
                self.on_layers_refused(number, error);
            }
            // Log, maps and meta have their space reserved: no error of theirs is harmless.
            (_, Err(error)) => self.poison(None, error),
            (DiskWait::LogAdd, Ok(())) => self.on_log_added(),
            (DiskWait::Control(number), Ok(())) => self.on_control_disk_done(number),
            (DiskWait::Open, Ok(())) => self.on_open_persisted(),
        }
    }

    /// R19: the cookie goes before the failure is told, so that no later start trusts the cache.
    fn poison(&mut self, call: Option<ReplicaCall>, error: DiskError) {
        self.failed = true;
        let failed = call.map(|call| (call, error));
        self.emit_disk(DiskOp::RemoveBootCookie, DiskWait::Poisoned { failed });
    }

    fn blocks(&self) -> u64 {
        self.meta.size_bytes / BLOCK_BYTES
    }

    /// Every region in which something may differ from the other replicas: logged, or about to be.
    fn whole_log(&self) -> BTreeSet<Region> {
        self.log.iter().chain(&self.adding).chain(&self.to_add).copied().collect()
    }

    fn merge_log_into_maps(&mut self) {
        let log = self.whole_log();
        for (absent, map) in &mut self.maps {
            if let Dirty::Blocks(blocks) = &mut map.dirty {
                let unsaved = self.map_unsaved.entry(*absent).or_default();
                unsaved.extend(log.iter().filter(|region| blocks.insert_region(**region)));
            }
        }
    }
}
