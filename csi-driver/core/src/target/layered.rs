//! Rebuilding the snapshots that a returning replica missed (R28), oldest first.
//!
//! ```text
//!  for each: asking ─> copying (<─> flushing ─> clearing) ─> freezing ─> holding ─> next, or the live volume
//! ```
//!
//! *Promised:* a replica becomes a holder of a snapshot only with exactly its bytes, on stable storage; and it joins
//! only as a holder of all.
//!
//! *What is copied:* the replica's volume is brought from the newest snapshot it holds to the next it lacks. They differ
//! only in blocks that the layers between them name (freezing starts a new allocation map, and that is the segment of
//! the dirty map that R28 asks for, without a second copy of it), and of these, for the first, only in those that the
//! members' maps name, if a map is valid; and anywhere in the replica's own log (R23). While it rebuilds it receives no
//! new writes: they would be in the wrong layer. The members' maps and their newest layer remember them.
//!
//! *It may be killed at any point:* a layer that is frozen here counts once the record names this replica as its
//! holder; before, the next Open merges it back and it is rebuilt from the snapshot before.

use std::collections::BTreeSet;

use crate::block_range::BlockRange;
use crate::dirty_map::BlockSet;
use crate::ids::{BLOCK_BYTES, BLOCKS_PER_REGION, REGION_BYTES, Region, ReplicaId, SnapshotId};
use crate::record::VolumeRecord;
use crate::timers;
use crate::transitions::{self, TransitionError};

use super::calls::{Call, CallKind};
use super::copies::CopyFor;
use super::flushes::FlushFor;

use super::{CallId, Control, Target};

/// The part of a catch-up that is about layers.
#[derive(Debug, Default)]
pub(super) struct Layered {
    goal: Option<Goal>,
    /// The layers say what differs; not asked of a volume without snapshots.
    asks: bool,
    /// What they said, once all of it is known.
    changed: Option<BlockSet>,
    /// What they said so far.
    parts: Parts,
    /// Some layer was rebuilt in this try: the replica is exactly what it holds.
    exact: bool,
    /// Regions that were copied to and are still in the replica's log.
    logged: BTreeSet<Region>,
}

/// Changes are asked for part by part: of a large volume all tables at once take a slow disk longer than an answer may.
#[derive(Debug, Default)]
struct Parts {
    known: BlockSet,
    /// The first block that nobody was asked for, or whose answer is awaited.
    next: u64,
    /// Blocks of what the replica is brought to.
    end: u64,
}

impl Parts {
    fn range(&self) -> BlockRange {
        let most = timers::EXTENTS_REGIONS * BLOCKS_PER_REGION;
        BlockRange::new(self.next, most.min(self.end - self.next))
    }
}

/// The snapshot that is being rebuilt.
#[derive(Debug)]
struct Goal {
    snapshot: SnapshotId,
    regions: Region,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Asking,
    Copying,
    /// The replica's log is emptied before it is full.
    Flushing,
    Clearing,
    Freezing,
    /// Frozen; the record has to say so.
    Holding,
}

impl Layered {
    /// What differs between the replica and what it is brought to, but for its own log. `maps`: of the members, if
    /// one was valid.
    pub(super) fn missed(&mut self, maps: Option<BlockSet>, size_bytes: u64) -> BlockSet {
        match (self.changed.take(), maps) {
            (Some(changed), _) if self.exact => changed,
            (Some(mut changed), Some(maps)) => {
                changed.retain_in(&maps, Region(0), Region(u32::MAX));
                changed
            }
            (Some(changed), None) => changed,
            (None, Some(maps)) => maps,
            (None, None) => BlockSet::whole(size_bytes),
        }
    }
}

impl Target {
    fn layered(&mut self) -> Option<&mut Layered> {
        self.catch_up.as_mut().map(|catch_up| &mut catch_up.layers)
    }

    fn set_layer_step(&mut self, step: Step) {
        if let Some(goal) = self.layered().and_then(|layered| layered.goal.as_mut()) {
            goal.step = step;
        }
        self.dirty = true;
    }

    /// The oldest snapshot that the replica lacks is next; then the live volume.
    pub(super) fn next_layer(&mut self) {
        let (Some(record), Some(replica)) = (self.volume(), self.catching_up()) else { return };
        let missing = record.committed().find(|s| !s.holders.contains(&replica));
        let goal = missing.map(|entry| Goal {
            snapshot: entry.id,
            regions: Region(u32::try_from(entry.size_bytes / REGION_BYTES).unwrap_or(u32::MAX)),
            step: Step::Asking,
        });
        let live = goal.is_none();
        if let Some(layered) = self.layered() {
            layered.goal = goal;
        }
        if live { self.receive() } else { self.ask_changes() }
    }

    /// Begins to ask which blocks the layers name between what the replica holds and what is next.
    pub(super) fn ask_changes(&mut self) {
        let Some(record) = self.volume() else { return };
        let asks = record.committed().next().is_some();
        let size_bytes = record.size_bytes;
        if let Some(layered) = self.layered() {
            layered.asks = asks;
            layered.changed = None;
            let blocks_of = |goal: &Goal| u64::from(goal.regions.0) * BLOCKS_PER_REGION;
            let end = layered.goal.as_ref().map_or(size_bytes / BLOCK_BYTES, blocks_of);
            layered.parts = Parts { end, ..Parts::default() };
        }
        self.ask_part();
    }

    /// Asks a member for the next part. Any will do for each: all hold the same snapshots.
    fn ask_part(&mut self) {
        self.dirty = true;
        let (Some(record), Some(replica)) = (self.volume(), self.catching_up()) else { return };
        let Some(layered) = self.catch_up.as_ref().map(|c| &c.layers).filter(|layered| layered.asks) else {
            return;
        };
        let to = layered.goal.as_ref().map(|goal| goal.snapshot);
        let older = record.committed().take_while(|s| Some(s.id) != to);
        let from = older.filter(|s| s.holders.contains(&replica)).last().map(|s| s.id);
        let range = layered.parts.range();
        if let Some(source) = self.choose_reader(&BTreeSet::new()) {
            self.send_control(source, CallKind::Changes, Control::ReadChanges { from, to, range });
        }
    }

    pub(super) fn on_changes_read(&mut self, call: CallId, blocks: &BlockSet) {
        let Some(Call { kind: CallKind::Changes, .. }) = self.take_call(call) else { return };
        let Some(layered) = self.layered() else { return };
        let parts = &mut layered.parts;
        parts.known.merge(blocks);
        parts.next = parts.range().end();
        if parts.next < parts.end {
            return self.ask_part();
        }
        layered.changed = Some(std::mem::take(&mut parts.known));
    }

    /// Whether the layers' answer is here; a source that is gone is replaced.
    pub(super) fn changes_known(&mut self) -> bool {
        let waits = |layered: &mut Layered| layered.asks && layered.changed.is_none();
        if !self.layered().is_some_and(waits) {
            return true;
        }
        if !self.has_calls(|kind| kind == CallKind::Changes) {
            self.ask_part();
        }
        false
    }

    pub(super) fn pump_layers(&mut self) {
        let Some(catch_up) = &self.catch_up else { return };
        let replica = catch_up.replica;
        let Some(goal) = &catch_up.layers.goal else { return };
        let (snapshot, step) = (goal.snapshot, goal.step);
        match step {
            Step::Asking => self.plan_layer(),
            Step::Copying => self.pump_layer_copies(replica, snapshot),
            Step::Holding => {
                let entry = self.volume().and_then(|record| record.snapshot(snapshot));
                if entry.is_none_or(|entry| entry.holders.contains(&replica)) {
                    self.next_layer();
                }
            }
            Step::Flushing | Step::Clearing | Step::Freezing => {}
        }
    }

    fn plan_layer(&mut self) {
        if self.has_calls(|kind| kind == CallKind::ReadMap) || !self.changes_known() {
            return;
        }
        let rebuild = self.guards.layered;
        let size_bytes = self.size_bytes().unwrap_or(0);
        let Some(catch_up) = &mut self.catch_up else { return };
        let Some(regions) = catch_up.layers.goal.as_ref().map(|goal| goal.regions) else { return };
        let maps = catch_up.valid_map.then(|| catch_up.mapped.clone());
        let mut to_copy = catch_up.layers.missed(maps, size_bytes);
        to_copy.merge(&catch_up.fixed);
        // The snapshot ends here; what the replica's log names behind it belongs to a later one.
        to_copy.retain_in(&BlockSet::new(), regions, Region(u32::MAX));
        if rebuild {
            catch_up.fixed.retain_in(&BlockSet::new(), Region(0), regions);
        } else {
            to_copy = BlockSet::new();
        }
        catch_up.plan = super::copy_plan::CopyPlan::default();
        *catch_up.plan.to_copy_mut() = to_copy;
        catch_up.plan.begin();
        self.set_layer_step(Step::Copying);
    }

    fn pump_layer_copies(&mut self, replica: ReplicaId, snapshot: SnapshotId) {
        let Some(catch_up) = &self.catch_up else { return };
        let full = catch_up.layers.logged.len() >= timers::LAYER_LOG_REGIONS;
        if !full {
            self.start_copies(CopyFor::Layer { replica, snapshot });
        }
        let Some(catch_up) = &self.catch_up else { return };
        let number = catch_up.number;
        if catch_up.plan.is_done() {
            self.set_layer_step(Step::Freezing);
            self.send_control(replica, CallKind::Freeze, Control::Freeze { snapshot });
        } else if full && catch_up.plan.in_flight() == 0 {
            self.set_layer_step(Step::Flushing);
            self.start_flush(FlushFor::Layer(number));
        }
    }

    /// A region of the replica has a block of the snapshot now.
    pub(super) fn layer_copied(&mut self, region: Region) {
        if self.rebuilds_layers()
            && let Some(layered) = self.layered()
        {
            layered.logged.insert(region);
        }
    }

    /// R18: what was copied is on the replica's disk; of regions that are copied whole, its log may forget that they
    /// differed.
    pub(super) fn layer_flushed(&mut self, number: u64) {
        let Some(catch_up) = self.catch_up.as_mut().filter(|c| c.number == number) else { return };
        let flushing = catch_up.layers.goal.as_ref().is_some_and(|goal| goal.step == Step::Flushing);
        if !flushing {
            return;
        }
        let replica = catch_up.replica;
        let (plan, fixed) = (&catch_up.plan, &catch_up.fixed);
        let whole = |region: &Region| !plan.lacks(*region) && !fixed.touches(*region);
        let regions: Vec<Region> = catch_up.layers.logged.iter().copied().filter(whole).collect();
        catch_up.layers.logged.clear();
        self.set_layer_step(Step::Clearing);
        self.send_control(replica, CallKind::ClearLayerLog, Control::ClearLog(regions));
    }

    pub(super) fn layer_log_cleared(&mut self, replica: ReplicaId) {
        if self.catching_up() == Some(replica) {
            self.set_layer_step(Step::Copying);
        }
    }

    /// The replica has flushed and frozen what is the snapshot.
    pub(super) fn layer_frozen(&mut self, replica: ReplicaId) {
        if self.catching_up() != Some(replica) || !self.rebuilds_layers() {
            return;
        }
        if let Some(layered) = self.layered() {
            layered.exact = true;
        }
        self.set_layer_step(Step::Holding);
    }

    /// The record learns that the replica has the layer.
    pub(super) fn holder_swap(&self) -> Option<Result<VolumeRecord, TransitionError>> {
        let catch_up = self.catch_up.as_ref().filter(|_| self.rebuilds_layers())?;
        let goal = catch_up.layers.goal.as_ref().filter(|goal| goal.step == Step::Holding)?;
        let record = self.volume()?;
        let known = record.snapshot(goal.snapshot).is_none_or(|s| s.holders.contains(&catch_up.replica));
        (!known)
            .then(|| transitions::add_holder(record, self.config.target_id, goal.snapshot, catch_up.replica))
    }
}
