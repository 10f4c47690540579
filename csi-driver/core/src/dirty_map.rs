//! Which blocks were written since a replica left (R21 to R24), and block sets in general.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::block_range::BlockRange;
use crate::ids::{BLOCKS_PER_REGION, Block, Epoch, REGION_BYTES, Region};

const WORDS: usize = (BLOCKS_PER_REGION / 64) as usize;

/// One bit per block of a region, lowest bit first.
pub type RegionBits = [u64; WORDS];

/// A set of blocks, kept by region so that an idle volume costs nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockSet {
    regions: BTreeMap<Region, RegionBits>,
}

impl BlockSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether no block is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Number of blocks in the set.
    #[must_use]
    pub fn count_blocks(&self) -> u64 {
        self.regions.values().flatten().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds a range; tells whether any block was new.
    pub fn insert(&mut self, range: BlockRange) -> bool {
        let mut new = false;
        for region in range.regions() {
            let base = u64::from(region.0) * BLOCKS_PER_REGION;
            let from = range.start.0.max(base) - base;
            let to = range.end().min(base + BLOCKS_PER_REGION) - base;
            let bits = self.regions.entry(region).or_default();
            for (index, word) in bits.iter_mut().enumerate() {
                let mask = word_mask(from, to, index as u64 * 64);
                new |= mask & !*word != 0;
                *word |= mask;
            }
        }
        new
    }

    /// Adds all blocks of a region; tells whether any block was new.
    pub fn insert_region(&mut self, region: Region) -> bool {
        self.insert(BlockRange::of_region(region))
    }

    /// Adds the blocks of another set.
    pub fn merge(&mut self, other: &Self) {
        for (region, bits) in &other.regions {
            let own = self.regions.entry(*region).or_default();
            for (word, more) in own.iter_mut().zip(bits) {
                *word |= more;
            }
        }
    }

    /// Every block of a volume of so many bytes.
    #[must_use]
    pub fn whole(size_bytes: u64) -> Self {
        let regions = u32::try_from(size_bytes / REGION_BYTES).expect("volumes end below 2^32 regions");
        Self { regions: (0..regions).map(|region| (Region(region), [u64::MAX; WORDS])).collect() }
    }

    /// Takes the blocks of the regions `from..to` out that are not in `keep`.
    pub fn retain_in(&mut self, keep: &Self, from: Region, to: Region) {
        let within: Vec<Region> = self.regions.range(from..to).map(|(region, _)| *region).collect();
        for region in within {
            let (mut bits, kept) = (self.region_bits(region), keep.region_bits(region));
            for (word, mask) in bits.iter_mut().zip(kept) {
                *word &= mask;
            }
            self.set_region_bits(region, bits);
        }
    }

    /// The first region at or after `from` with a block in the set.
    #[must_use]
    pub fn first_region_from(&self, from: Region) -> Option<Region> {
        self.regions.range(from..).next().map(|(region, _)| *region)
    }

    /// Whether the block is in the set.
    #[must_use]
    pub fn contains(&self, block: Block) -> bool {
        let bit = block.0 % BLOCKS_PER_REGION;
        self.regions.get(&block.region()).is_some_and(|bits| bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    }

    /// Whether any block of the region is in the set.
    #[must_use]
    pub fn touches(&self, region: Region) -> bool {
        self.regions.contains_key(&region)
    }

    /// Takes a region's blocks out.
    pub fn take_region(&mut self, region: Region) -> Option<RegionBits> {
        self.regions.remove(&region)
    }

    /// The bits of one region; zeroes if it has none.
    #[must_use]
    pub fn region_bits(&self, region: Region) -> RegionBits {
        self.regions.get(&region).copied().unwrap_or_default()
    }

    /// Sets a region's bits to exactly `bits`.
    pub fn set_region_bits(&mut self, region: Region, bits: RegionBits) {
        if bits == RegionBits::default() {
            self.regions.remove(&region);
        } else {
            self.regions.insert(region, bits);
        }
    }

    /// The first region with a block in the set.
    #[must_use]
    pub fn first_region(&self) -> Option<Region> {
        self.regions.keys().next().copied()
    }

    /// The range from its start on as runs of blocks in the set (true) and not in it, at most `runs_max` of them, for which
    /// at most `regions_max` regions with blocks are looked at: they may end before the range does.
    #[must_use]
    pub fn runs_in(&self, range: BlockRange, runs_max: usize, regions_max: usize) -> Vec<(BlockRange, bool)> {
        let mut runs: Vec<(BlockRange, bool)> = Vec::new();
        let mut push = |from: u64, to: u64, inside: bool| {
            let len = runs.len();
            match runs.last_mut() {
                _ if from >= to => true,
                Some((last, state)) if *state == inside => {
                    last.count += to - from;
                    true
                }
                _ if len == runs_max => false,
                _ => {
                    runs.push((BlockRange::new(from, to - from), inside));
                    true
                }
            }
        };
        let (mut at, end) = (range.start.0, range.end());
        let touched = self
            .regions
            .range(range.start.region()..)
            .take_while(|(region, _)| BlockRange::of_region(**region).start.0 < end);
        for (looked_at, (region, bits)) in touched.enumerate() {
            let base = BlockRange::of_region(*region).start.0;
            if looked_at == regions_max {
                // What lies before this region is known, the rest is not.
                push(at, base, false);
                return runs;
            }
            if !push(at, base, false) {
                return runs;
            }
            for run in Self::runs_of(*region, bits) {
                let (from, to) = (run.start.0.max(range.start.0), run.end().min(end));
                if from >= to {
                    continue;
                }
                if !(push(at.max(base), from, false) && push(from, to, true)) {
                    return runs;
                }
                at = to;
            }
            at = at.max(base);
        }
        push(at, end, false);
        runs
    }

    /// Regions with a block in the set, in order, with their bits.
    pub fn regions(&self) -> impl Iterator<Item = (Region, &RegionBits)> {
        self.regions.iter().map(|(region, bits)| (*region, bits))
    }

    /// A region's set blocks as runs.
    #[must_use]
    pub fn runs_of(region: Region, bits: &RegionBits) -> Vec<BlockRange> {
        let base = u64::from(region.0) * BLOCKS_PER_REGION;
        let mut runs: Vec<BlockRange> = Vec::new();
        for bit in (0..BLOCKS_PER_REGION).filter(|bit| bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1) {
            let block = base + bit;
            match runs.last_mut() {
                Some(run) if block == run.end() => run.count += 1,
                _ => runs.push(BlockRange::new(block, 1)),
            }
        }
        runs
    }

    /// The wire and disk form: bit per block from block 0, little-endian bit order, without trailing zero bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let Some(last) = self.regions.keys().next_back() else { return Vec::new() };
        let region_bytes = WORDS * 8;
        let mut bytes = vec![0; (last.0 as usize + 1) * region_bytes];
        for (region, bits) in &self.regions {
            let at = region.0 as usize * region_bytes;
            for (index, word) in bits.iter().enumerate() {
                bytes[at + index * 8..at + index * 8 + 8].copy_from_slice(&word.to_le_bytes());
            }
        }
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        bytes
    }

    /// Reads [`Self::to_bytes`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut set = Self::new();
        for (index, chunk) in bytes.chunks(WORDS * 8).enumerate() {
            let mut bits = RegionBits::default();
            for (word, part) in bits.iter_mut().zip(chunk.chunks(8)) {
                let mut le = [0; 8];
                le[..part.len()].copy_from_slice(part);
                *word = u64::from_le_bytes(le);
            }
            let region = Region(u32::try_from(index).expect("a map has below 2^32 regions"));
            set.set_region_bits(region, bits);
        }
        set
    }
}

/// The bits of the word that starts at bit `at` which lie in `from..to`.
fn word_mask(from: u64, to: u64, at: u64) -> u64 {
    let low = from.clamp(at, at + 64) - at;
    let high = to.clamp(at, at + 64) - at;
    let below = |bits: u64| if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    below(high) & !below(low)
}

/// The blocks written since a replica left, as one member knows them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyMap {
    /// The epoch at which the absent replica left; a map with another base says nothing about it.
    pub base: Epoch,
    /// What was written.
    pub dirty: Dirty,
}

/// Contents of a dirty map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dirty {
    /// Not known: everything, never nothing (R21).
    Void,
    /// At least these blocks.
    Blocks(BlockSet),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_set_agrees_with_a_naive_set() {
        let mut seed = 7_u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let mut set = BlockSet::new();
        let mut naive = std::collections::BTreeSet::new();
        for _ in 0..40 {
            let range = BlockRange::new(next(1500), 1 + next(300));
            let new = (range.start.0..range.end()).fold(false, |new, block| naive.insert(block) | new);
            assert_eq!(set.insert(range), new);
        }
        assert_eq!(set.count_blocks(), naive.len() as u64);
        assert!((0..2000).all(|block| set.contains(Block(block)) == naive.contains(&block)));
        assert_eq!(BlockSet::from_bytes(&set.to_bytes()), set);
    }

    #[test]
    fn runs_of_a_range_agree_with_a_naive_walk() {
        let mut seed = 11_u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..300 {
            let mut set = BlockSet::new();
            for _ in 0..next(12) {
                set.insert(BlockRange::new(next(5000), 1 + next(400)));
            }
            let range = BlockRange::new(next(5200), 1 + next(2000));
            let (runs_max, regions_max) = (1 + next(9), 1 + next(6));
            let runs = set.runs_in(range, runs_max as usize, regions_max as usize);
            let mut at = range.start.0;
            for (run, inside) in &runs {
                assert_eq!(run.start.0, at);
                assert!((at..run.end()).all(|block| set.contains(Block(block)) == *inside));
                at = run.end();
            }
            assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1), "neighbours differ");
            assert!(at > range.start.0 && at <= range.end(), "a prefix that is not empty");
            let regions = range.regions().filter(|region| set.touches(*region)).count() as u64;
            if regions <= regions_max && (runs.len() as u64) < runs_max {
                assert_eq!(at, range.end(), "nothing was left out without need");
            }
        }
    }

    #[test]
    fn runs_are_exactly_the_blocks_of_the_region() {
        let mut set = BlockSet::new();
        for block in [0, 1, 5, 60, 255, 256] {
            set.insert(BlockRange::new(block, 1));
        }
        let runs = BlockSet::runs_of(Region(0), &set.region_bits(Region(0)));
        let expected = [(0, 2), (5, 1), (60, 1), (255, 1)];
        assert_eq!(runs, expected.map(|(start, count)| BlockRange::new(start, count)));
    }

    #[test]
    fn what_is_outside_another_set_can_be_taken_out() {
        let (mut set, mut keep) = (BlockSet::new(), BlockSet::new());
        set.insert(BlockRange::new(0, 300));
        keep.insert(BlockRange::new(10, 5));
        keep.insert(BlockRange::new(299, 5));
        set.retain_in(&keep, Region(0), Region(1));
        assert_eq!(set.count_blocks(), 5 + 44, "region 1 was left alone");
    }
}
