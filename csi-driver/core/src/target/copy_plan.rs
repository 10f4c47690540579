//! What is still to be copied to a returning replica, cut into runs, and how far that is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use crate::block_range::BlockRange;
use crate::dirty_map::BlockSet;
use crate::ids::{BLOCK_BYTES, Region};

/// Regions go through it in order: to copy, taken (cut into runs), copied, and out after a checkpoint.
#[derive(Debug, Default)]
pub(super) struct CopyPlan {
    to_copy: BlockSet,
    /// Blocks that had no data at the source: runs end where they begin, so that zeroes do not travel as data.
    holes: BlockSet,
    /// Runs that are not started, of regions that were taken.
    runs: BTreeMap<Region, VecDeque<BlockRange>>,
    /// Copies queued or under way, by region.
    taken: BTreeMap<Region, u32>,
    /// Copied, and not known to be flushed at the replica.
    copied: BTreeSet<Region>,
    /// How many of them are new since the last checkpoint began.
    fresh: usize,
    in_flight: usize,
    total_blocks: u64,
    done_blocks: u64,
}

impl CopyPlan {
    /// What is to be copied; to be added to before the first [`Self::next`].
    pub(super) fn to_copy_mut(&mut self) -> &mut BlockSet {
        &mut self.to_copy
    }

    pub(super) fn to_copy(&self) -> &BlockSet {
        &self.to_copy
    }

    /// Of some regions only the `present` blocks are to be copied; of these, `holes` have no data at the source.
    pub(super) fn leave_out(&mut self, regions: Range<Region>, present: &BlockSet, mut holes: BlockSet) {
        self.to_copy.retain_in(present, regions.start, regions.end);
        holes.retain_in(&self.to_copy, regions.start, regions.end);
        self.holes.merge(&holes);
    }

    /// All of it is known: progress counts from here.
    pub(super) fn begin(&mut self) {
        self.total_blocks = self.to_copy.count_blocks();
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.total_blocks * BLOCK_BYTES
    }

    pub(super) fn done_bytes(&self) -> u64 {
        self.done_blocks * BLOCK_BYTES
    }

    /// Whether a block of the region is not copied yet.
    pub(super) fn lacks(&self, region: Region) -> bool {
        self.to_copy.touches(region) || self.taken.contains_key(&region)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Nothing is left to start or under way.
    pub(super) fn is_done(&self) -> bool {
        self.in_flight == 0 && self.runs.is_empty() && self.to_copy.is_empty()
    }

    /// The region to go on with: the first that was taken and has runs left, else the first that was not taken.
    pub(super) fn next_region(&self) -> Option<Region> {
        self.runs.keys().next().copied().or_else(|| self.to_copy.first_region())
    }

    /// Whether the region has runs to start.
    pub(super) fn has_runs(&self, region: Region) -> bool {
        self.runs.contains_key(&region) || self.to_copy.touches(region)
    }

    /// Blocks of the region's next run, if there is one.
    pub(super) fn next_blocks(&mut self, region: Region, blocks_max: u64) -> Option<u64> {
        self.take_region(region);
        let run = self.runs.get(&region)?.front()?;
        Some(run.count.min(blocks_max))
    }

    /// Cuts a region into runs.
    fn take_region(&mut self, region: Region) {
        if self.runs.contains_key(&region) {
            return;
        }
        let Some(bits) = self.to_copy.take_region(region) else { return };
        let holes = self.holes.take_region(region).unwrap_or_default();
        let part = |of: fn(u64, u64) -> u64| {
            let mut part = bits;
            part.iter_mut().zip(holes).for_each(|(word, hole)| *word = of(*word, hole));
            BlockSet::runs_of(region, &part)
        };
        let mut runs: VecDeque<BlockRange> = part(|word, hole| word & !hole).into();
        runs.extend(part(|word, hole| word & hole));
        self.taken.insert(region, u32::try_from(runs.len()).unwrap_or(u32::MAX));
        self.runs.insert(region, runs);
    }

    /// The region's next run of at most `blocks_max` blocks; it is under way until [`Self::ended`]. Runs are exact: a clean
    /// block between two dirty ones is not copied along, however many requests that takes.
    pub(super) fn next(&mut self, region: Region, blocks_max: u64) -> Option<BlockRange> {
        let blocks = self.next_blocks(region, blocks_max)?;
        let runs = self.runs.get_mut(&region)?;
        let run = runs.pop_front()?;
        self.in_flight += 1;
        if run.count > blocks {
            runs.push_front(BlockRange::new(run.start.0 + blocks, run.count - blocks));
            *self.taken.entry(region).or_default() += 1;
        } else if runs.is_empty() {
            self.runs.remove(&region);
        }
        Some(BlockRange::new(run.start.0, blocks))
    }

    /// A run that is under way goes on as one copy for each of its blocks.
    pub(super) fn was_split(&mut self, run: BlockRange) {
        let more = run.count - 1;
        self.in_flight += usize::try_from(more).unwrap_or(usize::MAX);
        *self.taken.entry(run.start.region()).or_default() += u32::try_from(more).unwrap_or(u32::MAX);
    }

    /// A run is copied.
    pub(super) fn ended(&mut self, run: BlockRange) {
        self.in_flight -= 1;
        self.done_blocks += run.count;
        let region = run.start.region();
        if let Some(left) = self.taken.get_mut(&region) {
            *left -= 1;
            if *left == 0 {
                self.taken.remove(&region);
                self.copied.insert(region);
                self.fresh += 1;
            }
        }
    }

    /// How many regions were copied since the last checkpoint began.
    pub(super) fn fresh(&self) -> usize {
        self.fresh
    }

    /// Copied regions that are in no checkpoint yet; a checkpoint of them begins.
    pub(super) fn begin_checkpoint(&mut self) -> Vec<Region> {
        self.fresh = 0;
        self.copied.iter().copied().collect()
    }

    pub(super) fn has_copied(&self) -> bool {
        !self.copied.is_empty()
    }

    /// They are flushed at the replica.
    pub(super) fn checkpointed(&mut self, regions: &[Region]) {
        for region in regions {
            self.copied.remove(region);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_plan(ranges: &[(u64, u64)]) -> CopyPlan {
        let mut plan = CopyPlan::default();
        for (start, count) in ranges {
            plan.to_copy_mut().insert(BlockRange::new(*start, *count));
        }
        plan.begin();
        plan
    }

    fn next(plan: &mut CopyPlan, blocks_max: u64) -> Option<BlockRange> {
        let region = plan.next_region()?;
        plan.next(region, blocks_max)
    }

    #[test]
    fn regions_may_be_begun_in_any_order() {
        let mut plan = mk_plan(&[(0, 10), (256, 4), (600, 1)]);
        assert_eq!(next(&mut plan, 4), Some(BlockRange::new(0, 4)));
        assert!(plan.has_runs(Region(2)) && plan.has_runs(Region(0)) && !plan.has_runs(Region(3)));
        assert_eq!(plan.next(Region(2), 4), Some(BlockRange::new(600, 1)));
        assert_eq!(plan.next(Region(2), 4), None);
        let rest: Vec<BlockRange> = std::iter::from_fn(|| next(&mut plan, 4)).collect();
        assert_eq!(rest, [(4, 4), (8, 2), (256, 4)].map(|(start, count)| BlockRange::new(start, count)));
        assert_eq!(plan.in_flight(), 5);
    }

    #[test]
    fn r23_exactly_the_dirty_blocks_are_copied_and_counted() {
        let mut plan = mk_plan(&[(0, 1), (2, 1), (250, 20)]);
        let mut copied = Vec::new();
        while let Some(run) = next(&mut plan, 256) {
            copied.push(run);
            plan.ended(run);
        }
        let expected =
            [(0, 1), (2, 1), (250, 6), (256, 14)].map(|(start, count)| BlockRange::new(start, count));
        assert_eq!(copied, expected);
        assert_eq!((plan.done_bytes(), plan.total_bytes()), (22 * 4096, 22 * 4096));
        assert!(plan.is_done());
    }

    #[test]
    fn r17_zeroes_are_runs_of_their_own_and_what_both_lack_is_left_out() {
        let mut plan = mk_plan(&[(0, 20)]);
        let (mut present, mut holes) = (BlockSet::new(), BlockSet::new());
        present.insert(BlockRange::new(0, 10));
        holes.insert(BlockRange::new(4, 2));
        holes.insert(BlockRange::new(10, 246));
        plan.leave_out(Region(0)..Region(1), &present, holes);
        let runs: Vec<BlockRange> = std::iter::from_fn(|| next(&mut plan, 256)).collect();
        assert_eq!(runs, [(0, 4), (6, 4), (4, 2)].map(|(start, count)| BlockRange::new(start, count)));
    }

    #[test]
    fn a_region_is_copied_when_the_last_of_its_pieces_is() {
        let mut plan = mk_plan(&[(0, 10)]);
        let pieces = [(); 3].map(|()| next(&mut plan, 4).unwrap());
        assert_eq!(pieces.map(|piece| piece.count), [4, 4, 2]);
        plan.ended(pieces[2]);
        plan.ended(pieces[0]);
        assert!(plan.lacks(Region(0)) && !plan.has_copied() && !plan.is_done());
        plan.ended(pieces[1]);
        assert!(!plan.lacks(Region(0)) && plan.fresh() == 1);
        assert_eq!(plan.begin_checkpoint(), [Region(0)]);
        plan.checkpointed(&[Region(0)]);
        assert!(!plan.has_copied() && plan.fresh() == 0);
    }
}
