//! A replica's disk: a write cache that a power loss empties in part, and small durable things beside it.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{Dirty, DirtyMap};
use holdfast_storage_core::ids::{BLOCK_BYTES, Region, ReplicaId, SnapshotId};
use holdfast_storage_core::record_copy::RecordCopy;
use holdfast_storage_core::replica::{DataOp, DiskError, DiskOp, ReplicaMeta, ReplicaStart};
use holdfast_storage_core::target::Allocation;
use rand::Rng;
use rand::rngs::StdRng;

use crate::damage::{self, Damage};
use crate::layers::{Layers, non_zero};

/// Two halves, so that unaligned writes can be seen.
pub type BlockData = [u64; 2];
pub type Blocks = BTreeMap<u64, BlockData>;
/// Number, block and data of a write that is not flushed.
pub type CachedWrite = (u64, u64, BlockData);

#[derive(Debug, Clone)]
pub struct Disk {
    pub meta: ReplicaMeta,
    pub log: BTreeSet<Region>,
    pub maps: BTreeMap<ReplicaId, DirtyMap>,
    /// The copy of the record.
    pub record: Option<RecordCopy>,
    /// Survives the process, not the power.
    pub tmpfs_cookie: Option<u64>,
    /// On stable storage.
    durable: Blocks,
    /// As reads see it.
    current: Blocks,
    /// Written and not flushed, oldest first.
    cache: Vec<CachedWrite>,
    next_write: u64,
    pub layers: Layers,
    /// Size of the files.
    size_bytes: u64,
    pub full: bool,
    /// The next flush fails, and loses what it should have kept.
    pub fail_flush: bool,
    /// A block that was being written when its disk lost power, or its process died, may not verify.
    pub tears_blocks: bool,
    /// The first block of the next write lands on this one instead.
    pub misdirects_to: Option<u64>,
}

impl Disk {
    pub fn new(meta: ReplicaMeta) -> Self {
        Self {
            size_bytes: meta.size_bytes,
            meta,
            log: BTreeSet::new(),
            maps: BTreeMap::new(),
            record: None,
            tmpfs_cookie: Some(0),
            durable: Blocks::new(),
            current: Blocks::new(),
            cache: Vec::new(),
            next_write: 0,
            layers: Layers::default(),
            full: false,
            fail_flush: false,
            tears_blocks: false,
            misdirects_to: None,
        }
    }

    pub fn start(&self) -> ReplicaStart {
        ReplicaStart {
            meta: self.meta.clone(),
            log: self.log.clone(),
            maps: self.maps.clone(),
            boot_cookie: self.tmpfs_cookie,
            snapshots: self.layers.ids(),
        }
    }

    pub fn read(&self, range: BlockRange) -> Result<Blocks, DiskError> {
        let read = of_range(&self.current, range);
        damage::verify_all(&read).map(|()| read)
    }

    /// What reads see of a block, or would see.
    pub fn block(&self, block: u64) -> BlockData {
        self.current.get(&block).copied().unwrap_or_default()
    }

    pub fn blocks(&self) -> u64 {
        self.size_bytes / BLOCK_BYTES
    }

    /// Where there is something, as the allocation map says.
    pub fn extents(&self, range: BlockRange) -> Vec<(BlockRange, Allocation)> {
        let state = |block: u64| match self.current.get(&block) {
            None => Allocation::Absent,
            Some([0, 0]) => Allocation::Zero,
            Some(_) => Allocation::Data,
        };
        (range.start.0..range.end()).map(|block| (BlockRange::new(block, 1), state(block))).collect()
    }

    /// A digest of each block that verifies.
    pub fn verify(&self, range: BlockRange) -> Vec<Option<u64>> {
        let digest = |[low, high]: [u64; 2]| low.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ high;
        let verdict = |block: u64| Some(self.block(block)).filter(|data| damage::verifies(*data)).map(digest);
        (range.start.0..range.end()).map(verdict).collect()
    }

    /// The block holds this from now on, whatever was written to it and not flushed.
    pub fn damage(&mut self, block: u64, data: BlockData) {
        self.cache.retain(|(_, other, _)| *other != block);
        self.current.insert(block, data);
        self.durable.insert(block, data);
    }

    /// R25: unreadable until written again, as durable as any write.
    pub fn mark_bad(&mut self, range: BlockRange) {
        for block in range.start.0..range.end() {
            self.write_block(block, damage::marked(), false);
        }
    }

    /// R32: what the disk holds of the blocks that it can read is taken for their data. Tells which were changed, and what
    /// they held.
    pub fn adopt(&mut self, range: BlockRange) -> Vec<(u64, BlockData)> {
        let mut adopted = Vec::new();
        for block in range.start.0..range.end() {
            let held = self.block(block);
            if let Some(data) = damage::adopted(held) {
                self.write_block(block, data, false);
                adopted.push((block, held));
            }
        }
        adopted
    }

    /// What reads see, for comparing members.
    pub fn contents(&self) -> Blocks {
        non_zero(&damage::seen(&self.current))
    }

    pub fn bad_blocks(&self) -> BTreeSet<u64> {
        damage::bad_blocks(&self.current)
    }

    pub fn read_snapshot(&self, snapshot: SnapshotId, range: BlockRange) -> Result<Blocks, DiskError> {
        let layer = self.layers.get(snapshot).ok_or(DiskError::NoSnapshot)?;
        let read = of_range(&layer.current, range);
        damage::verify_all(&read).map(|()| read)
    }

    /// Where a flush that starts now will reach to.
    pub fn flush_mark(&self) -> u64 {
        self.next_write
    }

    /// Tells which block a part of it landed on instead, if it did.
    pub fn write(&mut self, range: BlockRange, data: &Blocks, fua: bool) -> Option<u64> {
        let first = range.start.0;
        let before = self.block(first);
        for block in first..range.end() {
            self.write_block(block, data.get(&block).copied().unwrap_or_default(), fua);
        }
        let to = self.misdirects_to.take_if(|to| !(first..range.end()).contains(to))?;
        let written = self.block(first);
        self.damage(first, damage::damaged(damage::held(before), Damage::Foreign));
        self.damage(to, damage::damaged(written, Damage::Foreign));
        Some(to)
    }

    fn write_block(&mut self, block: u64, data: BlockData, fua: bool) {
        assert!(block < self.size_bytes / BLOCK_BYTES, "the core wrote block {block} behind the files' end");
        self.current.insert(block, data);
        self.layers.wrote(block);
        if fua {
            self.cache.retain(|(_, other, _)| *other != block);
            self.durable.insert(block, data);
        } else if self.read_durable(block) != data || self.cache.iter().any(|(_, other, _)| *other == block) {
            self.next_write += 1;
            self.cache.push((self.next_write, block, data));
        }
    }

    fn read_durable(&self, block: u64) -> BlockData {
        self.durable.get(&block).copied().unwrap_or_default()
    }

    pub fn flush(&mut self, mark: u64) {
        for (number, block, data) in std::mem::take(&mut self.cache) {
            if number <= mark {
                self.durable.insert(block, data);
            } else {
                self.cache.push((number, block, data));
            }
        }
        self.layers.flush(mark);
    }

    /// Each block keeps one of the values it was given since the last flush, or the one before.
    pub fn lose_cache(&mut self, rng: &mut StdRng) {
        let cache = std::mem::take(&mut self.cache);
        let torn = if self.tears_blocks { damage::torn(&cache, &self.durable, rng) } else { Blocks::new() };
        keep_some(cache, &mut self.durable, rng);
        self.durable.extend(torn);
        self.current = self.durable.clone();
        self.layers.lose_cache(rng);
    }

    /// A write that was under way when its process died: any of its blocks may have landed, with their checksums or
    /// without. Tells whether some did and some did not.
    pub fn tear(&mut self, range: BlockRange, data: &Blocks, rng: &mut StdRng) -> bool {
        let mut landed = 0;
        for block in range.start.0..range.end() {
            if rng.random_bool(0.5) {
                landed += 1;
                let mut new = data.get(&block).copied().unwrap_or_default();
                if self.tears_blocks && rng.random_bool(0.4) {
                    new = damage::damaged(new, Damage::Torn);
                }
                self.write_block(block, new, false);
            }
        }
        (1..range.count).contains(&landed)
    }

    pub fn apply_meta(&mut self, op: &DiskOp) {
        match op {
            DiskOp::PersistMeta(meta) => self.meta = meta.clone(),
            DiskOp::KeepRecord(copy) => {
                if copy.stamp.replaces(self.record.as_ref().map(|kept| &kept.stamp)) {
                    self.record = Some(copy.clone());
                }
            }
            DiskOp::SetBootCookie(cookie) => self.tmpfs_cookie = Some(*cookie),
            DiskOp::RemoveBootCookie => self.tmpfs_cookie = None,
            DiskOp::LogAdd(regions) => self.log.extend(regions.iter().copied()),
            DiskOp::LogRemove(regions) => self.log.retain(|region| !regions.contains(region)),
            DiskOp::MapPut { absent, map } => {
                self.maps.insert(*absent, map.clone());
            }
            DiskOp::MapUpdate { absent, regions } => {
                if let Some(DirtyMap { dirty: Dirty::Blocks(blocks), .. }) = self.maps.get_mut(absent) {
                    for (region, bits) in regions {
                        blocks.set_region_bits(*region, *bits);
                    }
                }
            }
            DiskOp::MapDrop { absent } => {
                self.maps.remove(absent);
            }
            DiskOp::Freeze { snapshot } => {
                self.layers.freeze(*snapshot, &self.current, &self.durable, &self.cache);
            }
            DiskOp::DropSnapshot { snapshot } => self.layers.remove(*snapshot),
            DiskOp::Grow { size_bytes } => self.size_bytes = self.size_bytes.max(*size_bytes),
            DiskOp::Data { .. } => {}
        }
    }
}

fn of_range(blocks: &Blocks, range: BlockRange) -> Blocks {
    blocks.range(range.start.0..range.end()).map(|(block, data)| (*block, *data)).collect()
}

pub fn keep_some(cache: Vec<CachedWrite>, durable: &mut Blocks, rng: &mut StdRng) {
    let mut versions: BTreeMap<u64, Vec<BlockData>> = BTreeMap::new();
    for (_, block, data) in cache {
        versions.entry(block).or_default().push(data);
    }
    for (block, values) in versions {
        let keep = rng.random_range(0..=values.len());
        if keep > 0 {
            durable.insert(block, values[keep - 1]);
        }
    }
}

/// The data part of an operation.
pub fn data_op(op: &DiskOp) -> Option<DataOp> {
    match op {
        DiskOp::Data { op, .. } => Some(*op),
        DiskOp::PersistMeta(_)
        | DiskOp::KeepRecord(_)
        | DiskOp::SetBootCookie(_)
        | DiskOp::RemoveBootCookie
        | DiskOp::LogAdd(_)
        | DiskOp::LogRemove(_)
        | DiskOp::MapPut { .. }
        | DiskOp::MapUpdate { .. }
        | DiskOp::MapDrop { .. }
        | DiskOp::Freeze { .. }
        | DiskOp::DropSnapshot { .. }
        | DiskOp::Grow { .. } => None,
    }
}
