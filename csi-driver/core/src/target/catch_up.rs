//! Bringing an offline replica back: copy what it misses while it receives all new writes, then join (R23, R24).
//!
//! ```text
//! opening ─> (layers) ─> maps ─┬─────────────> extents ─> copying ─> draining ─> other maps ─> merging ─> flushing ─> ready
//!                              └─> filling ──────^ (no valid map)   (from here on in the ack set)
//! ```
//!
//! *Promised:* a kill of the target, of a member or of the returning replica in the middle loses at most what was copied
//! since the last checkpoint that ended, and that is at most `AT_STAKE_REGIONS_MAX` regions, however slow the flush is,
//! beside those that the client writes to meanwhile. Only at a checkpoint are the bits in the members' maps taken back,
//! after the replica flushed (R23), and only for regions that nobody wrote since (`intent_log`).
//!
//! *Turns:* one replica at a time. One that catches up for `CATCH_UP_TURN_MS` while another waits is interrupted as soon
//! as that one is open, and goes on where it was when its turn comes again; one that hangs loses its session at the I/O
//! deadline. So neither a large nor a sick replica keeps the others out.
//!
//! *It ends:* new writes go to the replica too, so what is to be copied only shrinks, however much is written meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use crate::block_range::BlockRange;
use crate::dirty_map::{BlockSet, Dirty, DirtyMap};
use crate::ids::{BLOCK_BYTES, Epoch, Region, ReplicaId};
use crate::record::ReplicaState;
use crate::timers;

use super::calls::{Call, CallKind};
use super::copies::CopyFor;
use super::copy_plan::CopyPlan;
use super::extents::Extents;
use super::flushes::FlushFor;
use super::layered::Layered;
use super::peers::Peer;
use super::{CallId, Control, Target, TargetState};

#[derive(Debug)]
pub(super) struct CatchUp {
    /// Tells this try from earlier ones.
    pub(super) number: u64,
    pub(super) replica: ReplicaId,
    pub(super) stage: Stage,
    since_ms: u64,
    pub(super) plan: CopyPlan,
    /// Some member's map was valid (R21): else everything is copied.
    pub(super) valid_map: bool,
    /// What the members' maps say.
    pub(super) mapped: BlockSet,
    /// What is copied whatever the maps say: the replica's own log, writes under way when it came.
    pub(super) fixed: BlockSet,
    pub(super) layers: Layered,
    pub(super) extents: Extents,
    /// A copy waits for the throttle until then.
    wait_until_ms: Option<u64>,
    next_checkpoint_ms: u64,
    /// Writes that began before the replica received any, then before the ack set included it (R24 step 2).
    drain: BTreeSet<u64>,
    /// Maps of those that stay absent.
    others: BTreeMap<ReplicaId, DirtyMap>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Opening,
    /// Missed snapshots are rebuilt, one after the other, without new writes (R28).
    Layers,
    /// It receives new writes; the members' maps are being read.
    Maps,
    /// The members turn their void maps into full ones, so that a restart goes on where this try stopped.
    Filling,
    /// What is absent on both sides is left out.
    Extents,
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

    /// The end of a client's I/O may be what the next step waits for.
    pub(super) fn catch_up_drains(&self) -> bool {
        self.is_joining()
    }

    /// Whether the returning replica's log must keep the region: it is not copied yet.
    pub(super) fn is_to_copy(&self, region: Region) -> bool {
        self.catch_up.as_ref().is_some_and(|c| c.plan.lacks(region))
    }

    /// Who has waited for a turn's length and may interrupt the one that catches up.
    pub(super) fn next_turn(&self) -> Option<ReplicaId> {
        let catch_up = self.catch_up.as_ref().filter(|c| c.stage <= Stage::Copying)?;
        let over = self.now_ms >= catch_up.since_ms + timers::CATCH_UP_TURN_MS;
        over.then(|| self.next_to_catch_up(Some(catch_up.replica))).flatten()
    }

    /// When the catch-up wants a tick; none while a tick would do nothing, which would only be wanted again at once.
    pub(super) fn catch_up_timeout(&self) -> Option<u64> {
        let copies = |stage: Stage| matches!(stage, Stage::Layers | Stage::Copying);
        let catch_up = self.catch_up.as_ref().filter(|c| copies(c.stage))?;
        catch_up.wait_until_ms.filter(|_| self.may_catch_up())
    }

    fn may_catch_up(&self) -> bool {
        self.state == TargetState::Serving
            && self.gates.begin
            && self.pending.is_none()
            && self.reconcile.left() == 0
            && self.stopping.is_none()
            && !self.cut_wants_quiet()
    }

    /// The replica that rebuilds snapshots, if that is under way.
    pub(super) fn rebuilds_layers(&self) -> bool {
        self.catch_up.as_ref().is_some_and(|c| c.stage == Stage::Layers)
    }

    pub(super) fn catch_up_progress(&self, replica: ReplicaId) -> Option<(u64, u64)> {
        let catch_up = self.catch_up.as_ref().filter(|c| c.replica == replica)?;
        Some((catch_up.plan.done_bytes(), catch_up.plan.total_bytes()))
    }

    pub(super) fn pump_catch_up(&mut self) {
        if !self.may_catch_up() {
            return;
        }
        let Some(stage) = self.catch_up.as_ref().map(|c| c.stage) else {
            if let Some(replica) = self.next_to_catch_up(None) {
                self.start_catch_up(replica);
            }
            return;
        };
        match stage {
            Stage::Opening => self.opened_and_grown(),
            Stage::Layers => self.pump_layers(),
            Stage::Merging | Stage::Flushing | Stage::Ready => {}
            Stage::Maps => self.maps_read(),
            Stage::Filling => self.maps_filled(),
            Stage::Extents => self.pump_extents(),
            Stage::Copying => self.pump_copies(),
            Stage::Draining => self.drained(),
            Stage::OtherMaps => self.other_maps_read(),
        }
    }

    fn start_catch_up(&mut self, replica: ReplicaId) {
        let number = self.new_id();
        self.catch_up = Some(CatchUp {
            number,
            replica,
            stage: Stage::Opening,
            since_ms: self.now_ms,
            plan: CopyPlan::default(),
            valid_map: false,
            mapped: BlockSet::new(),
            fixed: BlockSet::new(),
            layers: Layered::default(),
            extents: Extents::default(),
            wait_until_ms: None,
            next_checkpoint_ms: 0,
            drain: BTreeSet::new(),
            others: BTreeMap::new(),
        });
        self.dirty = true;
        self.opened_and_grown();
    }

    /// A replica that waited for its turn is open: whoever catches up makes room. What that one has at its last
    /// checkpoint stays.
    pub(super) fn take_turn(&mut self, replica: ReplicaId) {
        self.abort_catch_up();
        self.start_catch_up(replica);
    }

    /// It had to grow first, perhaps more than once.
    fn opened_and_grown(&mut self) {
        let Some(replica) = self.catching_up().filter(|replica| self.is_open(*replica)) else { return };
        if !self.grow_first(replica) {
            self.catch_up_opened(replica);
        }
    }

    /// It is as large as the volume: first the snapshots that it missed, then what is newer.
    pub(super) fn catch_up_opened(&mut self, replica: ReplicaId) {
        self.forget_answers(replica);
        let logged =
            self.peers.get(&replica).and_then(Peer::session).map(|s| s.logged.clone()).unwrap_or_default();
        let own = self.guards.ownlog;
        let Some(catch_up) = &mut self.catch_up else { return };
        // R23: what it has and nobody else is in its own log, whether its cache survived or not.
        for region in logged.into_iter().filter(|_| own) {
            catch_up.fixed.insert_region(region);
        }
        catch_up.stage = Stage::Layers;
        self.next_layer();
        if self.rebuilds_layers() {
            self.ask_maps(replica);
        }
    }

    fn ask_maps(&mut self, replica: ReplicaId) {
        for member in self.members() {
            self.send_control(member, CallKind::ReadMap, Control::ReadMap(replica));
        }
        self.dirty = true;
    }

    /// Every snapshot is there. From here on it receives new writes; those begun before are copied.
    pub(super) fn receive(&mut self) {
        let begun: BTreeMap<u64, BlockRange> = self.begun_tasks().collect();
        let Some(catch_up) = &mut self.catch_up else { return };
        let replica = catch_up.replica;
        catch_up.stage = Stage::Maps;
        catch_up.plan = CopyPlan::default();
        for range in begun.values() {
            catch_up.fixed.insert(*range);
        }
        catch_up.drain = begun.into_keys().collect();
        // Those read before do not know what was written meanwhile.
        catch_up.mapped = BlockSet::new();
        catch_up.valid_map = false;
        self.drop_calls(CallKind::ReadMap);
        self.ask_maps(replica);
        self.ask_changes();
    }

    /// Forgets calls whose answers are of no use any more.
    fn drop_calls(&mut self, kind: CallKind) {
        let calls: Vec<CallId> =
            self.calls.iter().filter(|(_, call)| call.kind == kind).map(|(id, _)| *id).collect();
        for call in calls {
            self.take_call(call);
        }
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
            CallKind::Tell(..)
            | CallKind::Keep(_)
            | CallKind::Clear
            | CallKind::FillMap
            | CallKind::Extents
            | CallKind::Task(_)
            | CallKind::Changes
            | CallKind::ClearLayerLog
            | CallKind::Merge
            | CallKind::Freeze
            | CallKind::Drop(_)
            | CallKind::Grow(_)
            | CallKind::Release => return,
        };
        // R21: a map with another base, or a void one, says nothing.
        let valid = self.left_epoch(about) == Some(map.base);
        let Dirty::Blocks(blocks) = map.dirty else { return };
        let Some(catch_up) = self.catch_up.as_mut().filter(|_| valid) else { return };
        if about == replica {
            catch_up.valid_map = true;
            catch_up.mapped.merge(&blocks);
        } else {
            let other = DirtyMap { base: map.base, dirty: Dirty::Blocks(BlockSet::new()) };
            if let Dirty::Blocks(all) = &mut catch_up.others.entry(about).or_insert(other).dirty {
                all.merge(&blocks);
            }
        }
    }

    pub(super) fn has_calls(&self, of: impl Fn(CallKind) -> bool) -> bool {
        self.calls.values().any(|call| of(call.kind))
    }

    fn set_stage(&mut self, stage: Stage) {
        if let Some(catch_up) = &mut self.catch_up {
            catch_up.stage = stage;
        }
        self.dirty = true;
    }

    fn maps_read(&mut self) {
        if self.has_calls(|kind| kind == CallKind::ReadMap) || !self.changes_known() {
            return;
        }
        let size_bytes = self.size_bytes().unwrap_or(0);
        let Some(catch_up) = &mut self.catch_up else { return };
        let valid = catch_up.valid_map;
        let maps = std::mem::take(&mut catch_up.mapped);
        let mut to_copy = catch_up.layers.missed(valid.then_some(maps), size_bytes);
        to_copy.merge(&catch_up.fixed);
        *catch_up.plan.to_copy_mut() = to_copy;
        if valid {
            return self.set_stage(Stage::Extents);
        }
        let replica = catch_up.replica;
        for member in self.members() {
            self.send_control(member, CallKind::FillMap, Control::FillMap(replica));
        }
        self.set_stage(Stage::Filling);
    }

    fn maps_filled(&mut self) {
        if !self.has_calls(|kind| kind == CallKind::FillMap) {
            self.set_stage(Stage::Extents);
        }
    }

    pub(super) fn start_copying(&mut self) {
        let now = self.now_ms;
        if let Some(catch_up) = &mut self.catch_up {
            catch_up.plan.begin();
            catch_up.next_checkpoint_ms = now + timers::CHECKPOINT_MS;
        }
        self.set_stage(Stage::Copying);
    }

    fn pump_copies(&mut self) {
        let Some(replica) = self.catching_up() else { return };
        self.start_copies(CopyFor::CatchUp(replica));
        self.pump_checkpoint();
        let begun: BTreeSet<u64> = self.begun_tasks().map(|(id, _)| id).collect();
        let clearing = self.clear_round.is_some();
        let Some(catch_up) = &mut self.catch_up else { return };
        if catch_up.plan.is_done() && !clearing {
            catch_up.drain = begun;
            self.set_stage(Stage::Draining);
        }
    }

    /// Starts what fits of the plan.
    pub(super) fn start_copies(&mut self, why: CopyFor) {
        let now = self.now_ms;
        let rate = self.volume().map_or(0, |record| record.params.background.resync_bytes_per_s);
        self.throttle.follow(now, rate);
        // Clients that wait for nothing but more members are not disturbed.
        let busy = self.throttle.is_busy(now) && self.gates.enough;
        let blocks_max = if busy { timers::COPY_BLOCKS_BUSY } else { timers::COPY_BLOCKS_MAX };
        let in_checkpoint = self.regions_in_checkpoint();
        while let Some(catch_up) = &self.catch_up {
            let region = self.region_to_copy(&catch_up.plan);
            let Some(catch_up) = &mut self.catch_up else { return };
            catch_up.wait_until_ms = None;
            // What a kill would have copied again: each copy under way is of one region. Of a snapshot that is all of it, and
            // no checkpoint would make room.
            let counts = !matches!(why, CopyFor::Layer { .. });
            let at_stake = catch_up.plan.fresh() + catch_up.plan.in_flight() + in_checkpoint;
            let at_stake = if counts { at_stake } else { 0 };
            if catch_up.plan.in_flight() >= timers::COPIES_MAX || at_stake >= timers::AT_STAKE_REGIONS_MAX {
                break;
            }
            let Some(region) = region else { break };
            let Some(blocks) = catch_up.plan.next_blocks(region, blocks_max) else { break };
            let cost = (blocks * BLOCK_BYTES).max(timers::COPY_COST_MIN_BYTES);
            if self.gates.enough {
                catch_up.wait_until_ms = self.throttle.take(now, cost).err();
            }
            if catch_up.wait_until_ms.is_some() {
                break;
            }
            let Some(range) = catch_up.plan.next(region, blocks_max) else { break };
            self.start_copy(why, range);
        }
    }

    /// R23: takes back what need not be copied again, however this ends.
    fn pump_checkpoint(&mut self) {
        let now = self.now_ms;
        let Some(catch_up) = &mut self.catch_up else { return };
        let late = now >= catch_up.next_checkpoint_ms && catch_up.plan.has_copied();
        let due = late || catch_up.plan.fresh() >= timers::CHECKPOINT_REGIONS;
        if !due || self.clear_round.is_some() {
            return;
        }
        catch_up.next_checkpoint_ms = now + timers::CHECKPOINT_MS;
        let regions = catch_up.plan.begin_checkpoint();
        let (replica, number) = (catch_up.replica, catch_up.number);
        self.start_checkpoint(replica, number, regions);
        if self.clear_round.is_none() {
            // The client writes to all of them: none is at stake any more, and copies that waited go on.
            self.dirty = true;
        }
    }

    /// Regions whose bits are taken back.
    pub(super) fn checkpointed(&mut self, number: u64, regions: &[Region]) {
        if let Some(catch_up) = self.catch_up.as_mut().filter(|c| c.number == number) {
            catch_up.plan.checkpointed(regions);
        }
    }

    /// A run that no member can read whole is copied block by block.
    pub(super) fn run_was_split(&mut self, replica: ReplicaId, range: BlockRange) {
        if let Some(catch_up) = self.catch_up.as_mut().filter(|c| c.replica == replica) {
            catch_up.plan.was_split(range);
        }
    }

    pub(super) fn range_caught_up(&mut self, replica: ReplicaId, range: BlockRange) {
        let Some(catch_up) = self.catch_up.as_mut().filter(|c| c.replica == replica) else { return };
        catch_up.plan.ended(range);
        self.layer_copied(range.start.region());
        let Some(catch_up) = &self.catch_up else { return };
        let (done, total) = (catch_up.plan.done_bytes(), catch_up.plan.total_bytes());
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.resync_bytes_done = done;
            peer.resync_bytes_total = total;
            peer.resync_bytes_copied += range.len_bytes();
        }
        self.dirty = true;
    }

    pub(super) fn is_drained(&mut self) -> bool {
        let tasks = &self.tasks;
        self.catch_up.as_mut().is_some_and(|catch_up| {
            catch_up.drain.retain(|id| tasks.contains_key(id));
            catch_up.drain.is_empty()
        })
    }

    /// R24 step 2, then step 3: whose maps are to be taken over.
    fn drained(&mut self) {
        if !self.is_drained() {
            return;
        }
        let Some(catch_up) = &mut self.catch_up else { return };
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
            maps.entry(other).or_insert(DirtyMap { base, dirty: Dirty::Void });
        }
        if !self.guards.mapcopy {
            maps.clear();
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
        peer.loss_accepted = false;
        let logged = peer.session().map(|s| s.logged.clone()).unwrap_or_default();
        for region in logged {
            self.is_logged_by_member(region);
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
            .filter(|(_, c)| match c.kind {
                CallKind::ReadMap
                | CallKind::ReadOtherMap(_)
                | CallKind::FillMap
                | CallKind::Extents
                | CallKind::Changes => true,
                CallKind::Tell(..)
                | CallKind::Keep(_)
                | CallKind::Clear
                | CallKind::ClearLayerLog
                | CallKind::Task(_)
                | CallKind::Merge
                | CallKind::Freeze
                | CallKind::Drop(_)
                | CallKind::Grow(_)
                | CallKind::Release => false,
            })
            .map(|(id, _)| *id)
            .collect();
        for call in calls {
            self.take_call(call);
        }
        self.dirty = true;
    }
}
