//! A replica's disk: a write cache that a power loss empties in part, and small durable things beside it.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{Dirty, DirtyMap};
use holdfast_storage_core::ids::{Region, ReplicaId};
use holdfast_storage_core::replica::{DataOp, DiskOp, ReplicaMeta, ReplicaStart};
use rand::Rng;
use rand::rngs::StdRng;

/// Two halves, so that unaligned writes can be seen.
pub type BlockData = [u64; 2];
pub type Blocks = BTreeMap<u64, BlockData>;

#[derive(Debug, Clone)]
pub struct Disk {
    pub meta: ReplicaMeta,
    pub log: BTreeSet<Region>,
    pub maps: BTreeMap<ReplicaId, DirtyMap>,
    /// Survives the process, not the power.
    pub tmpfs_cookie: Option<u64>,
    /// On stable storage.
    durable: Blocks,
    /// As reads see it.
    current: Blocks,
    /// Written and not flushed, oldest first.
    cache: Vec<(u64, u64, BlockData)>,
    next_write: u64,
    pub full: bool,
    /// The next flush fails, and loses what it should have kept.
    pub fail_flush: bool,
}

impl Disk {
    pub fn new(meta: ReplicaMeta) -> Self {
        Self {
            meta,
            log: BTreeSet::new(),
            maps: BTreeMap::new(),
            tmpfs_cookie: Some(0),
            durable: Blocks::new(),
            current: Blocks::new(),
            cache: Vec::new(),
            next_write: 0,
            full: false,
            fail_flush: false,
        }
    }

    pub fn start(&self) -> ReplicaStart {
        ReplicaStart {
            meta: self.meta.clone(),
            log: self.log.clone(),
            maps: self.maps.clone(),
            boot_cookie: self.tmpfs_cookie,
        }
    }

    pub fn read(&self, range: BlockRange) -> Blocks {
        self.current.range(range.start.0..range.end()).map(|(block, data)| (*block, *data)).collect()
    }

    /// What reads see, for comparing members.
    pub fn contents(&self) -> Blocks {
        self.current
            .iter()
            .filter(|(_, data)| **data != [0, 0])
            .map(|(block, data)| (*block, *data))
            .collect()
    }

    /// Where a flush that starts now will reach to.
    pub fn flush_mark(&self) -> u64 {
        self.next_write
    }

    pub fn write(&mut self, range: BlockRange, data: &Blocks, fua: bool) {
        for block in range.start.0..range.end() {
            self.write_block(block, data.get(&block).copied().unwrap_or_default(), fua);
        }
    }

    fn write_block(&mut self, block: u64, data: BlockData, fua: bool) {
        self.current.insert(block, data);
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
    }

    /// Each block keeps one of the values it was given since the last flush, or the one before.
    pub fn lose_cache(&mut self, rng: &mut StdRng) {
        let mut versions: BTreeMap<u64, Vec<BlockData>> = BTreeMap::new();
        for (_, block, data) in std::mem::take(&mut self.cache) {
            versions.entry(block).or_default().push(data);
        }
        for (block, values) in versions {
            let keep = rng.random_range(0..=values.len());
            if keep > 0 {
                self.durable.insert(block, values[keep - 1]);
            }
        }
        self.current = self.durable.clone();
    }

    /// A write that was under way when its process died: any of its blocks may have landed.
    pub fn tear(&mut self, range: BlockRange, data: &Blocks, rng: &mut StdRng) {
        for block in range.start.0..range.end() {
            if rng.random_bool(0.5) {
                self.write_block(block, data.get(&block).copied().unwrap_or_default(), false);
            }
        }
    }

    pub fn apply_meta(&mut self, op: &DiskOp) {
        match op {
            DiskOp::PersistMeta(meta) => self.meta = meta.clone(),
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
            DiskOp::Data { .. } => {}
        }
    }
}

/// The data part of an operation.
pub fn data_op(op: &DiskOp) -> Option<DataOp> {
    match op {
        DiskOp::Data { op, .. } => Some(*op),
        DiskOp::PersistMeta(_)
        | DiskOp::SetBootCookie(_)
        | DiskOp::RemoveBootCookie
        | DiskOp::LogAdd(_)
        | DiskOp::LogRemove(_)
        | DiskOp::MapPut { .. }
        | DiskOp::MapUpdate { .. }
        | DiskOp::MapDrop { .. } => None,
    }
}
