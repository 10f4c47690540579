//! Epochs, the clearing of the intent log, dirty maps.

use std::collections::{BTreeMap, BTreeSet};

use crate::dirty_map::{BlockSet, Dirty, DirtyMap, RegionBits};
use crate::ids::{Epoch, Region, ReplicaId, SessionToken};
use crate::record_copy::RecordCopy;

use super::snapshots::Step;
use super::{DiskOp, DiskWait, Replica, ReplicaCall, ReplicaReply, RequestRefusal};

/// A control request whose disk operations are under way.
#[derive(Debug)]
pub(super) struct ControlWait {
    pub call: ReplicaCall,
    token: SessionToken,
    left: u32,
    /// What follows when they are done.
    pub step: Step,
}

impl Replica {
    /// R10, R21: maps are started, kept or voided, then the epoch is durable, then it is answered. Before all of it the copy
    /// of the record: no replica knows an epoch that its own copy does not know (ADR 0011).
    pub(super) fn on_set_epoch(
        &mut self,
        call: ReplicaCall,
        epoch: Epoch,
        in_sync: &BTreeSet<ReplicaId>,
        absent: &BTreeMap<ReplicaId, Epoch>,
        copy: Option<RecordCopy>,
    ) {
        let own = self.meta.epoch;
        if epoch.number < own.number || (epoch.number == own.number && epoch.nonce != own.nonce) {
            return self.refuse(call, RequestRefusal::OldEpoch);
        }
        let mut ops: Vec<DiskOp> =
            copy.filter(|_| self.guards.copyfirst).map(DiskOp::KeepRecord).into_iter().collect();
        let this = self.meta.replica_id;
        for (replica, left) in absent.iter().filter(|(replica, _)| **replica != this) {
            if self.maps.get(replica).is_some_and(|map| map.base == *left) {
                continue;
            }
            let was_there = own.number <= left.number || !self.guards.mapvoid;
            let dirty = if was_there { self.map_of_log() } else { Dirty::Void };
            ops.push(self.put_map(*replica, DirtyMap { base: *left, dirty }));
        }
        // Only an epoch that names a replica a member ends its map (R24); one that nobody names any more is gone too.
        let ended: Vec<ReplicaId> =
            self.maps.keys().filter(|replica| !absent.contains_key(replica)).copied().collect();
        for replica in ended {
            ops.push(self.drop_map(replica));
        }
        self.meta.epoch = epoch;
        let joined =
            self.session.as_ref().is_some_and(|s| s.joining) && in_sync.contains(&self.meta.replica_id);
        if joined {
            self.meta.cache_lost = false;
            self.crash_log.clear();
        }
        ops.push(DiskOp::PersistMeta(self.durable_meta()));
        self.start_control(call, ops);
    }

    /// What the record says now, beside its set.
    pub(super) fn on_keep_record(&mut self, call: ReplicaCall, copy: RecordCopy) {
        self.start_control(call, vec![DiskOp::KeepRecord(copy)]);
    }

    /// R21: a write in flight when a replica left may be on any of the logged regions.
    fn map_of_log(&self) -> Dirty {
        let mut blocks = BlockSet::new();
        if self.guards.mapinflight {
            for region in self.whole_log() {
                blocks.insert_region(region);
            }
        }
        Dirty::Blocks(blocks)
    }

    fn put_map(&mut self, absent: ReplicaId, map: DirtyMap) -> DiskOp {
        self.map_unsaved.remove(&absent);
        self.maps.insert(absent, map.clone());
        DiskOp::MapPut { absent, map }
    }

    fn drop_map(&mut self, absent: ReplicaId) -> DiskOp {
        self.map_unsaved.remove(&absent);
        self.maps.remove(&absent);
        DiskOp::MapDrop { absent }
    }

    /// R18: map bits first, then the log bit. A region that is being written stays.
    pub(super) fn on_clear_log(&mut self, call: ReplicaCall, regions: &[Region]) {
        let cleared: Vec<Region> =
            self.unwritten(regions).into_iter().filter(|region| self.log.contains(region)).collect();
        let mut ops = self.save_maps(&cleared);
        for region in &cleared {
            self.log.remove(region);
            self.crash_log.remove(region);
        }
        ops.push(DiskOp::LogRemove(cleared));
        // R19: what the cache lost has been reconciled, flushed and cleared.
        if self.meta.cache_lost && self.crash_log.is_empty() {
            self.meta.cache_lost = false;
            ops.push(DiskOp::PersistMeta(self.durable_meta()));
        }
        self.start_control(call, ops);
    }

    /// Those that no write is under way to.
    fn unwritten(&self, regions: &[Region]) -> Vec<Region> {
        let waiting: BTreeSet<Region> = self
            .waiting
            .iter()
            .flat_map(|write| write.op.range())
            .flat_map(|range| range.regions())
            .collect();
        regions
            .iter()
            .filter(|region| !self.writing.contains_key(region) && !waiting.contains(region))
            .copied()
            .collect()
    }

    /// A void map says everything; so does a full one, whose bits can be taken out one by one.
    pub(super) fn on_fill_map(&mut self, call: ReplicaCall, absent: ReplicaId) {
        let void = self.maps.get(&absent).filter(|map| map.dirty == Dirty::Void);
        let Some(base) = void.map(|map| map.base) else {
            return self.reply(call, ReplicaReply::Done(Ok(())));
        };
        let dirty = Dirty::Blocks(BlockSet::whole(self.meta.size_bytes));
        let op = self.put_map(absent, DirtyMap { base, dirty });
        self.start_control(call, vec![op]);
    }

    /// R23: the target says that the absent replica has flushed these regions as they are. Should this replica lose what
    /// it has not flushed of them, its log puts the bits back (R22).
    pub(super) fn on_clear_map(&mut self, call: ReplicaCall, absent: ReplicaId, regions: &[Region]) {
        let regions = self.unwritten(regions);
        let map = self.maps.get_mut(&absent).map(|map| &mut map.dirty);
        let Some(Dirty::Blocks(blocks)) = map else {
            return self.reply(call, ReplicaReply::Done(Ok(())));
        };
        let mut cleared = Vec::new();
        for region in regions {
            let unsaved = self.map_unsaved.get_mut(&absent).is_some_and(|unsaved| unsaved.remove(&region));
            if blocks.take_region(region).is_some() || unsaved {
                cleared.push((region, RegionBits::default()));
            }
        }
        if cleared.is_empty() {
            return self.reply(call, ReplicaReply::Done(Ok(())));
        }
        self.start_control(call, vec![DiskOp::MapUpdate { absent, regions: cleared }]);
    }

    fn save_maps(&mut self, regions: &[Region]) -> Vec<DiskOp> {
        let mut ops = Vec::new();
        for (absent, unsaved) in &mut self.map_unsaved {
            let Some(DirtyMap { dirty: Dirty::Blocks(blocks), .. }) = self.maps.get(absent) else { continue };
            let due: Vec<_> = regions.iter().filter(|region| unsaved.remove(region)).collect();
            if !due.is_empty() {
                let regions = due.into_iter().map(|region| (*region, blocks.region_bits(*region))).collect();
                ops.push(DiskOp::MapUpdate { absent: *absent, regions });
            }
        }
        ops
    }

    pub(super) fn on_read_map(&mut self, call: ReplicaCall, absent: ReplicaId) {
        let missing = DirtyMap { base: Epoch::default(), dirty: Dirty::Void };
        let map = self.maps.get(&absent).cloned().unwrap_or(missing);
        if !self.guards.mapend {
            let ended = DirtyMap { base: map.base, dirty: Dirty::Blocks(BlockSet::new()) };
            self.maps.insert(absent, ended);
        }
        self.reply(call, ReplicaReply::Map(Ok(map)));
    }

    /// R24 step 3: the member's maps with the own log on top, and its epoch, so that a map is never started anew for
    /// someone who left while this replica was away.
    pub(super) fn on_merge_maps(
        &mut self,
        call: ReplicaCall,
        epoch: Epoch,
        maps: BTreeMap<ReplicaId, DirtyMap>,
    ) {
        if epoch.number < self.meta.epoch.number {
            return self.refuse(call, RequestRefusal::OldEpoch);
        }
        let log = self.whole_log();
        let mut ops = Vec::new();
        let ended: Vec<ReplicaId> =
            self.maps.keys().filter(|replica| !maps.contains_key(replica)).copied().collect();
        for replica in ended {
            ops.push(self.drop_map(replica));
        }
        let this = self.meta.replica_id;
        for (absent, mut map) in maps.into_iter().filter(|(absent, _)| *absent != this) {
            if let Dirty::Blocks(blocks) = &mut map.dirty {
                for region in &log {
                    blocks.insert_region(*region);
                }
            }
            ops.push(self.put_map(absent, map));
        }
        self.meta.epoch = epoch;
        if let Some(session) = &mut self.session {
            session.joining = true;
        }
        ops.push(DiskOp::PersistMeta(self.durable_meta()));
        self.start_control(call, ops);
    }

    fn start_control(&mut self, call: ReplicaCall, ops: Vec<DiskOp>) {
        if let Some(number) = self.register_control(call, Step::Answer) {
            self.control_ops(number, ops);
        }
    }

    /// Counts a control request in, for the drain of R2.
    pub(super) fn register_control(&mut self, call: ReplicaCall, step: Step) -> Option<u64> {
        let session = self.session.as_mut()?;
        session.control += 1;
        self.next_control += 1;
        let number = self.next_control;
        self.controls.insert(number, ControlWait { call, token: session.token, left: 0, step });
        Some(number)
    }

    /// Starts disk operations of a control request.
    pub(super) fn control_ops(&mut self, number: u64, ops: Vec<DiskOp>) {
        let Some(control) = self.controls.get_mut(&number) else { return };
        control.left = u32::try_from(ops.len()).expect("few operations per request");
        for op in ops {
            self.emit_disk(op, DiskWait::Control(number));
        }
    }

    pub(super) fn on_control_disk_done(&mut self, number: u64) {
        let Some(control) = self.controls.get_mut(&number) else { return };
        control.left -= 1;
        if control.left == 0 && !self.next_step(number) {
            self.end_control(number, Ok(()));
        }
    }

    /// Answers a control request, unless its session is over.
    pub(super) fn end_control(&mut self, number: u64, result: Result<(), RequestRefusal>) {
        let Some(control) = self.controls.remove(&number) else { return };
        let Some(session) = self.session.as_mut().filter(|s| s.token == control.token) else { return };
        session.control -= 1;
        if !session.closing {
            self.reply(control.call, ReplicaReply::Done(result));
        }
    }
}
