//! Bringing an offline replica back: copy what it misses while it receives all new writes, then join (R23, R24).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::block_range::BlockRange;
use crate::dirty_map::{BlockSet, Dirty, DirtyMap};
use crate::ids::{Epoch, REGION_BYTES, Region, ReplicaId};
use crate::record::ReplicaState;
use crate::timers;

use super::copies::CopyFor;
use super::flushes::FlushFor;
use super::peers::{Call, CallKind, Peer};
use super::{CallId, Control, Target, TargetState};

/// Clean blocks between two dirty ones that are copied along rather than copying twice.
const RUN_GAP_BLOCKS: u64 = 8;

#[derive(Debug)]
pub(super) struct CatchUp {
    /// Tells this try from earlier ones.
    number: u64,
    replica: ReplicaId,
    stage: Stage,
    to_copy: BlockSet,
    /// Some member's map was valid (R21): else everything is copied.
    valid_map: bool,
    runs: VecDeque<BlockRange>,
    /// Copies queued or under way, by region: the log keeps those regions.
    copying: BTreeMap<Region, u32>,
    /// Copies under way.
    copies: usize,
    /// Writes that began before the ack set included the replica (R24 step 2).
    drain: BTreeSet<u64>,
    /// Maps of those that stay absent.
    others: BTreeMap<ReplicaId, DirtyMap>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Opening,
    /// It receives new writes; the members' maps are being read.
    Maps,
    Copying,
    /// The ack set includes it from here on (R24 step 1).
    Draining,
    OtherMaps,
    Merging,
    Flushing,
    /// May be swapped in.
    Ready,
}

impl Target {
    /// The replica whose turn it is.
    pub(super) fn catching_up(&self) -> Option<ReplicaId> {
        self.catch_up.as_ref().map(|c| c.replica)
    }

    fn at_least(&self, stage: Stage) -> Option<ReplicaId> {
        self.catch_up.as_ref().filter(|c| c.stage >= stage).map(|c| c.replica)
    }

    /// Receives new writes.
    pub(super) fn receiving(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        self.at_least(Stage::Maps).into_iter()
    }

    /// Is in the ack set ahead of its swap.
    pub(super) fn joining(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        self.at_least(Stage::Draining).into_iter()
    }

    pub(super) fn is_joining(&self) -> bool {
        // While maps move, logs stay: a joining replica completes its maps from its log.
        self.at_least(Stage::Draining).is_some()
    }

    /// Takes part in clearing the log: what it has to copy is known, and kept.
    pub(super) fn clears_too(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        self.at_least(Stage::Copying).into_iter()
    }

    /// The try that takes part in clearing the log.
    pub(super) fn clearing_number(&self) -> Option<u64> {
        self.catch_up.as_ref().filter(|c| c.stage >= Stage::Copying).map(|c| c.number)
    }

    pub(super) fn ready_to_join(&self) -> Option<ReplicaId> {
        self.at_least(Stage::Ready)
    }

    /// Whether the returning replica's log must keep the region: it is not copied yet.
    pub(super) fn is_to_copy(&self, region: Region) -> bool {
        self.catch_up.as_ref().is_some_and(|c| c.to_copy.touches(region) || c.copying.contains_key(&region))
    }

    pub(super) fn pump_catch_up(&mut self) {
        let settled = self.state == TargetState::Serving && self.gates.begin && self.pending.is_none();
        if !settled || self.reconcile.left() > 0 || self.stopping.is_some() {
            return;
        }
        let Some(stage) = self.catch_up.as_ref().map(|c| c.stage) else {
            return self.start_catch_up();
        };
        match stage {
            Stage::Opening | Stage::Merging | Stage::Flushing | Stage::Ready => {}
            Stage::Maps => self.maps_read(),
            Stage::Copying => self.pump_copies(),
            Stage::Draining => self.drained(),
            Stage::OtherMaps => self.other_maps_read(),
        }
    }

    fn start_catch_up(&mut self) {
        let Some(replica) = self.next_to_catch_up() else { return };
        let number = self.new_id();
        self.catch_up = Some(CatchUp {
            number,
            replica,
            stage: Stage::Opening,
            to_copy: BlockSet::new(),
            valid_map: false,
            runs: VecDeque::new(),
            copying: BTreeMap::new(),
            copies: 0,
            drain: BTreeSet::new(),
            others: BTreeMap::new(),
        });
        self.dirty = true;
    }

    /// From here on it receives new writes; those begun before are copied.
    pub(super) fn catch_up_opened(&mut self, replica: ReplicaId) {
        self.forget_answers(replica);
        let begun: Vec<BlockRange> = self.begun_tasks().map(|(_, range)| range).collect();
        let logged =
            self.peers.get(&replica).and_then(Peer::session).map(|s| s.logged.clone()).unwrap_or_default();
        let own = self.guards.ownlog;
        let Some(catch_up) = &mut self.catch_up else { return };
        catch_up.stage = Stage::Maps;
        for range in begun {
            catch_up.to_copy.insert(range);
        }
        // R23: what it has and nobody else is in its own log, whether its cache survived or not.
        for region in logged.into_iter().filter(|_| own) {
            catch_up.to_copy.insert_region(region);
        }
        for member in self.members() {
            self.send_control(member, CallKind::ReadMap, Control::ReadMap(replica));
        }
        self.dirty = true;
    }

    fn left_epoch(&self, replica: ReplicaId) -> Option<Epoch> {
        match self.volume()?.replicas.get(&replica)?.state {
            ReplicaState::Offline { left_epoch } => Some(left_epoch),
            ReplicaState::InSync | ReplicaState::Faulted => None,
        }
    }

    pub(super) fn on_map_read(&mut self, call: CallId, map: DirtyMap) {
        let Some(Call { kind, .. }) = self.take_call(call) else { return };
        let Some(replica) = self.catching_up() else { return };
        let about = match kind {
            CallKind::ReadMap => replica,
            CallKind::ReadOtherMap(other) => other,
            CallKind::Tell(_) | CallKind::ClearLog | CallKind::Merge | CallKind::Release => return,
        };
        // R21: a map with another base, or a void one, says nothing.
        let valid = self.left_epoch(about) == Some(map.base);
        let Dirty::Blocks(blocks) = map.dirty else { return };
        let Some(catch_up) = self.catch_up.as_mut().filter(|_| valid) else { return };
        if about == replica {
            catch_up.valid_map = true;
            catch_up.to_copy.merge(&blocks);
        } else {
            let other = DirtyMap { base: map.base, dirty: Dirty::Blocks(BlockSet::new()) };
            if let Dirty::Blocks(all) = &mut catch_up.others.entry(about).or_insert(other).dirty {
                all.merge(&blocks);
            }
        }
    }

    fn has_calls(&self, of: impl Fn(CallKind) -> bool) -> bool {
        self.calls.values().any(|call| of(call.kind))
    }

    fn maps_read(&mut self) {
        if self.has_calls(|kind| kind == CallKind::ReadMap) {
            return;
        }
        let size_bytes = self.size_bytes().unwrap_or(0);
        let Some(catch_up) = &mut self.catch_up else { return };
        if !catch_up.valid_map {
            let regions = u32::try_from(size_bytes / REGION_BYTES).expect("volumes end below 2^32 regions");
            for region in 0..regions {
                catch_up.to_copy.insert_region(Region(region));
            }
        }
        catch_up.stage = Stage::Copying;
        let total = catch_up.to_copy.count_blocks() * crate::ids::BLOCK_BYTES;
        let replica = catch_up.replica;
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.resync_bytes_done = 0;
            peer.resync_bytes_total = total;
        }
        self.dirty = true;
    }

    fn pump_copies(&mut self) {
        loop {
            let Some(catch_up) = &mut self.catch_up else { return };
            if catch_up.copies >= timers::COPIES_MAX {
                return;
            }
            if let Some(range) = catch_up.runs.pop_front() {
                catch_up.copies += 1;
                let replica = catch_up.replica;
                self.start_copy(CopyFor::CatchUp(replica), range);
                continue;
            }
            let Some(region) = catch_up.to_copy.first_region() else { break };
            if let Some(bits) = catch_up.to_copy.take_region(region) {
                catch_up.runs.extend(BlockSet::runs_of(region, &bits, RUN_GAP_BLOCKS));
                catch_up.copying.insert(region, u32::try_from(catch_up.runs.len()).unwrap_or(u32::MAX));
            }
        }
        let begun: BTreeSet<u64> = self.begun_tasks().map(|(id, _)| id).collect();
        let clearing = self.clear_round.is_some();
        let Some(catch_up) = &mut self.catch_up else { return };
        if catch_up.copies == 0 && !clearing {
            catch_up.stage = Stage::Draining;
            catch_up.drain = begun;
            self.dirty = true;
        }
    }

    pub(super) fn range_caught_up(&mut self, replica: ReplicaId, range: BlockRange) {
        let Some(catch_up) = self.catch_up.as_mut().filter(|c| c.replica == replica) else { return };
        catch_up.copies -= 1;
        let region = range.start.region();
        if let Some(left) = catch_up.copying.get_mut(&region) {
            *left -= 1;
            if *left == 0 {
                catch_up.copying.remove(&region);
            }
        }
        if let Some(peer) = self.peers.get_mut(&replica) {
            // Bridged gaps are copied too; the total counts dirty blocks only.
            peer.resync_bytes_done =
                (peer.resync_bytes_done + range.len_bytes()).min(peer.resync_bytes_total);
        }
        self.dirty = true;
    }

    /// R24 step 2, then step 3: whose maps are to be taken over.
    fn drained(&mut self) {
        let tasks = &self.tasks;
        let Some(catch_up) = &mut self.catch_up else { return };
        catch_up.drain.retain(|id| tasks.contains_key(id));
        if !catch_up.drain.is_empty() {
            return;
        }
        catch_up.stage = Stage::OtherMaps;
        let replica = catch_up.replica;
        let absent: Vec<ReplicaId> = self.absent_but(replica).into_iter().map(|(absent, _)| absent).collect();
        for member in self.members() {
            for other in &absent {
                self.send_control(member, CallKind::ReadOtherMap(*other), Control::ReadMap(*other));
            }
        }
        self.dirty = true;
    }

    fn absent_but(&self, replica: ReplicaId) -> Vec<(ReplicaId, Epoch)> {
        let Some(record) = self.volume() else { return Vec::new() };
        record
            .replicas
            .keys()
            .filter(|other| **other != replica)
            .filter_map(|other| self.left_epoch(*other).map(|left| (*other, left)))
            .collect()
    }

    fn other_maps_read(&mut self) {
        if self.has_calls(|kind| matches!(kind, CallKind::ReadOtherMap(_))) {
            return;
        }
        let Some(replica) = self.catching_up() else { return };
        let absent = self.absent_but(replica);
        let epoch = self.volume().map(|r| r.epoch).unwrap_or_default();
        let Some(catch_up) = &mut self.catch_up else { return };
        catch_up.stage = Stage::Merging;
        let mut maps = std::mem::take(&mut catch_up.others);
        for (other, base) in absent {
            let empty = Dirty::Blocks(BlockSet::new());
            let unknown = if self.guards.mapcopy { Dirty::Void } else { empty };
            maps.entry(other).or_insert(DirtyMap { base, dirty: unknown });
        }
        if !self.guards.mapcopy {
            for map in maps.values_mut() {
                map.dirty = Dirty::Blocks(BlockSet::new());
            }
        }
        self.send_control(replica, CallKind::Merge, Control::MergeMaps { epoch, maps });
    }

    /// R24 step 4.
    pub(super) fn maps_merged(&mut self, replica: ReplicaId) {
        let flush = self.guards.joinflush;
        let Some(catch_up) = self.catch_up.as_mut().filter(|c| c.replica == replica) else { return };
        catch_up.stage = if flush { Stage::Flushing } else { Stage::Ready };
        let number = catch_up.number;
        self.dirty = true;
        if flush {
            self.start_flush(FlushFor::Join(number));
        }
    }

    pub(super) fn join_flushed(&mut self, number: u64) {
        let same = |c: &&mut CatchUp| c.number == number && c.stage == Stage::Flushing;
        if let Some(catch_up) = self.catch_up.as_mut().filter(same) {
            catch_up.stage = Stage::Ready;
            self.dirty = true;
        }
    }

    /// Swapped in: from here on its log is cleared with the members'.
    pub(super) fn joined(&mut self, replica: ReplicaId) {
        self.catch_up = None;
        let Some(peer) = self.peers.get_mut(&replica) else { return };
        peer.cache_lost = false;
        peer.resync_bytes_done = peer.resync_bytes_total;
        let logged = peer.session().map(|s| s.logged.clone()).unwrap_or_default();
        for region in logged {
            self.logged.entry(region).or_default();
        }
    }

    pub(super) fn abort_catch_up(&mut self) {
        let Some(catch_up) = self.catch_up.take() else { return };
        if self.is_open(catch_up.replica) {
            // `lose` comes back here and finds nothing left to do.
            self.lose(catch_up.replica);
        }
        self.cancel_catch_up_copies();
        let calls: Vec<CallId> = self
            .calls
            .iter()
            .filter(|(_, c)| matches!(c.kind, CallKind::ReadMap | CallKind::ReadOtherMap(_)))
            .map(|(id, _)| *id)
            .collect();
        for call in calls {
            self.take_call(call);
        }
        self.dirty = true;
    }
}
