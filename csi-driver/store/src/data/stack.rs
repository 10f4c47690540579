//! The layers of an open replica, and where in them each block of a request is found.
//!
//! The top-most layer that has a block decides. A layer has a block if its state or its checksum says so: where the two
//! disagree the block is bad, and what lies below must not be given out in its place.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use holdfast_io::AlignedBuf;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::SnapshotId;

use super::{DataPath, DataState};
use crate::disk::DiskFile;
use crate::error::StoreError;
use crate::gather::Gather;
use crate::layout::{PAGE_BYTES, STATES_PER_PAGE, SUMS_PER_PAGE, TablePage};
use crate::sums::Summer;
use crate::tables::{Entry, State, Tables};

/// Pages of tables that a replica in use keeps in memory, over all its layers: 64 MiB. Beyond it, clean ones that no
/// write needs are dropped before others are read. Tests keep next to none.
const PAGES_MAX: usize = if cfg!(test) { 32 } else { 16 << 10 };
/// Pages that an idle replica keeps, per TiB of volume: 8 MiB (the bound for an idle volume is 32 MiB per TiB).
const IDLE_PAGES_PER_TIB: u64 = 2 << 10;
/// Pages that any idle replica may keep.
const IDLE_PAGES_MIN: u64 = 16;

/// A layer in memory.
pub struct Layer {
    /// Names its file.
    pub number: u32,
    /// The snapshot that froze it.
    pub snapshot: Option<SnapshotId>,
    /// Blocks from here on are absent: the volume grew later.
    pub blocks: u64,
    /// Blocks below it were moved into the layer beneath and count as absent here (see [`crate::merge`]).
    pub moved_below: u64,
    /// Blocks below it were copied into the layer beneath, which is not durable yet.
    pub copied_below: u64,
    /// Its file.
    pub file: DiskFile,
    /// Computes its checksums (R30).
    pub summer: Summer,
    /// Its tables, as far as they are in memory.
    pub tables: Tables,
}

impl Layer {
    /// The blocks of a range that the layer may have.
    fn part(&self, range: Range<u64>) -> Range<u64> {
        range.start.max(self.moved_below)..range.end.min(self.blocks)
    }

    /// The pages that must be loaded before these blocks can be looked at.
    pub(super) fn missing(&self, range: Range<u64>, need: Need) -> impl Iterator<Item = TablePage> + '_ {
        let part = self.part(range);
        let count = part.end.saturating_sub(part.start);
        self.tables
            .missing(part.start, count)
            .filter(move |page| need == Need::Entries || matches!(page, TablePage::States(_)))
    }

    /// What the layer says of a block whose pages are in memory.
    pub fn entry(&self, block: u64) -> Entry {
        if self.part(block..block + 1).is_empty() { Entry::ABSENT } else { self.tables.entry(block) }
    }

    fn entry_for(&self, block: u64, need: Need) -> Entry {
        match need {
            Need::Entries => self.entry(block),
            Need::States if self.part(block..block + 1).is_empty() => Entry::ABSENT,
            Need::States => match self.tables.state(block) {
                State::Absent => Entry::ABSENT,
                State::Zero | State::ZeroKept => Entry::zero(false),
                // A sum that no block has: nobody looks at it.
                State::Data => Entry::data(0),
            },
        }
    }
}

/// What a look at the stack is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// States and checksums.
    Entries,
    /// States alone; a quarter of a hundredth of the pages.
    States,
}

/// Which layers a request looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// The snapshot it reads; none for the volume as it is.
    pub at: Option<SnapshotId>,
    /// How far down.
    pub down_to: DownTo,
}

/// Where a look ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownTo {
    /// At the bottom.
    Bottom,
    /// Above this snapshot's layer.
    After(SnapshotId),
    /// Above the snapshot before: what was written for this one alone.
    Own,
}

impl Look {
    /// What a client sees.
    pub const LIVE: Self = Self { at: None, down_to: DownTo::Bottom };

    /// A snapshot, or the volume as it is.
    pub fn at(snapshot: Option<SnapshotId>) -> Self {
        Self { at: snapshot, down_to: DownTo::Bottom }
    }
}

/// What was found for a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The entry that decides.
    pub entry: Entry,
    /// Number of its layer; for an absent block it says nothing.
    pub layer: u32,
}

impl Found {
    /// Whether a block that does not verify may come from a write that a crash interrupted.
    pub fn is_in_doubt(self, top: u32) -> bool {
        self.layer == top && !self.entry.is_marked_bad()
    }
}

/// A layer with data of a request.
#[derive(Clone)]
pub struct Home {
    /// Its number.
    pub layer: u32,
    /// Its file.
    pub file: DiskFile,
    /// Its checksums.
    pub summer: Summer,
}

/// Where the blocks of a request are.
pub struct View {
    /// One per block.
    pub found: Vec<Found>,
    /// The layers with data among them.
    pub homes: Vec<Home>,
    /// Number of the layer that took the writes.
    pub top: u32,
}

/// Pages that must be read first, with the number of their layer.
pub(super) type Missing = Vec<(u32, TablePage)>;

/// The layers, bottom first; never empty.
pub struct Stack {
    layers: Vec<Layer>,
}

impl Stack {
    /// Of an open replica.
    pub fn new(layers: Vec<Layer>) -> Self {
        assert!(!layers.is_empty(), "a replica has a layer that takes writes");
        Self { layers }
    }

    /// The layer that takes the writes.
    pub fn top(&self) -> &Layer {
        &self.layers[self.layers.len() - 1]
    }

    /// The layer that takes the writes.
    pub fn top_mut(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("never empty")
    }

    /// Whether frozen layers lie below the top.
    pub fn is_layered(&self) -> bool {
        self.layers.len() > 1
    }

    /// The layer of this number.
    pub fn by_number(&mut self, number: u32) -> Option<&mut Layer> {
        self.layers.iter_mut().find(|layer| layer.number == number)
    }

    /// All layers, bottom first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The top becomes frozen below a new one.
    pub fn push(&mut self, frozen_as: Option<SnapshotId>, top: Layer) {
        self.top_mut().snapshot = frozen_as;
        self.layers.push(top);
    }

    /// Takes a layer out.
    pub fn remove(&mut self, number: u32) -> Option<Layer> {
        let index = self.layers.iter().position(|layer| layer.number == number)?;
        Some(self.layers.remove(index))
    }

    /// Blocks of the volume at this point.
    pub fn blocks_at(&self, at: Option<SnapshotId>) -> Option<u64> {
        let index = self.index_at(at)?;
        Some(self.layers[index].blocks)
    }

    fn index_at(&self, at: Option<SnapshotId>) -> Option<usize> {
        match at {
            None => Some(self.layers.len() - 1),
            Some(snapshot) => self.layers.iter().position(|layer| layer.snapshot == Some(snapshot)),
        }
    }

    /// The layers of a look, bottom first; `Err` names a snapshot that is not there, or not in this order.
    fn span(&self, look: Look) -> Result<Range<usize>, SnapshotId> {
        let top = self.index_at(look.at).ok_or(look.at.unwrap_or(SnapshotId(0)))?;
        let bottom = match look.down_to {
            DownTo::Bottom => 0,
            DownTo::After(from) => self.index_at(Some(from)).filter(|index| *index <= top).ok_or(from)? + 1,
            DownTo::Own => {
                let named = |index: &usize| self.layers[*index].snapshot.is_some();
                (0..top).rev().find(named).map_or(0, |index| index + 1)
            }
        };
        Ok(bottom..top + 1)
    }

    /// Finds the blocks of a range, or names the pages that must be loaded first.
    fn look_up(&self, span: Range<usize>, range: BlockRange, need: Need) -> Result<Vec<Found>, Missing> {
        let (start, end) = (range.start.0, range.end());
        let count = usize::try_from(range.count).expect("a request fits in memory");
        let mut found = vec![Found { entry: Entry::ABSENT, layer: 0 }; count];
        // The hull of the blocks that no layer so far has.
        let mut open = start..end;
        for index in span.clone().rev() {
            let layer = &self.layers[index];
            if layer.missing(open.clone(), need).next().is_some() {
                // Those below will most likely be needed too, and are read at the same time.
                let all = (span.start..=index).rev();
                return Err(all
                    .flat_map(|index| {
                        let layer = &self.layers[index];
                        layer.missing(open.clone(), need).map(|page| (layer.number, page))
                    })
                    .collect());
            }
            let mut left: Option<Range<u64>> = None;
            for block in open {
                let place = &mut found[usize::try_from(block - start).expect("inside the request")];
                if !place.entry.is_absent() {
                    continue;
                }
                *place = Found { entry: layer.entry_for(block, need), layer: layer.number };
                if place.entry.is_absent() {
                    left = Some(left.map_or(block, |left| left.start)..block + 1);
                }
            }
            match left {
                Some(left) => open = left,
                None => break,
            }
        }
        Ok(found)
    }

    fn homes(&self, found: &[Found]) -> Vec<Home> {
        let mut homes: Vec<Home> = Vec::new();
        for found in found.iter().filter(|found| found.entry.may_hold_data()) {
            if homes.iter().all(|home| home.layer != found.layer)
                && let Some(layer) = self.layers.iter().find(|layer| layer.number == found.layer)
            {
                homes.push(Home { layer: layer.number, file: layer.file.clone(), summer: layer.summer });
            }
        }
        homes
    }

    fn page_count(&self) -> usize {
        self.layers.iter().map(|layer| layer.tables.page_count()).sum()
    }
}

impl DataState {
    /// Drops clean pages until so many are left. Pages of regions with writes in flight or unflushed stay: a write has
    /// its pages loaded before its data lands, and what the disk has of them may be old while a flush runs.
    pub(super) fn drop_pages(&mut self, keep: usize) {
        let mut surplus = self.stack.page_count().saturating_sub(keep);
        let busy: std::collections::HashSet<TablePage> = self
            .unflushed
            .keys()
            .flat_map(|region| {
                let blocks = BlockRange::of_region(*region);
                TablePage::covering(blocks.start.0, blocks.count)
            })
            .collect();
        let top = self.stack.layers.len() - 1;
        for (index, layer) in self.stack.layers.iter_mut().enumerate() {
            let is_busy = |page: &TablePage| index == top && busy.contains(page);
            surplus -= layer.tables.drop_clean(surplus, is_busy);
        }
    }
}

impl DataPath {
    /// Finds the blocks of a range, loading what is not in memory.
    pub(super) fn resolve(
        self: &Arc<Self>,
        look: Look,
        range: BlockRange,
        need: Need,
        then: impl FnOnce(Result<View, StoreError>) + Send + 'static,
    ) {
        match self.look_up(look, range, need) {
            Err(error) => then(Err(error)),
            Ok(Ok(view)) => then(Ok(view)),
            Ok(Err(missing)) => {
                let path = Arc::clone(self);
                self.load_pages(missing, move |loaded| match loaded {
                    Err(error) => then(Err(error)),
                    Ok(()) => path.resolve(look, range, need, then),
                });
            }
        }
    }

    /// Finds the blocks of a range, or the pages that must be loaded first.
    pub(super) fn look_up(
        &self,
        look: Look,
        range: BlockRange,
        need: Need,
    ) -> Result<Result<View, Missing>, StoreError> {
        let state = self.lock();
        let no_snapshot = |snapshot| StoreError::NoSnapshot { replica: self.replica, snapshot };
        let span = state.stack.span(look).map_err(no_snapshot)?;
        let found = state.stack.look_up(span, range, need);
        Ok(found.map(|found| View { homes: state.stack.homes(&found), found, top: state.stack.top().number }))
    }

    /// Goes on once the top's tables of a range are in memory. Those of a range that a request changes stay there until
    /// it is flushed.
    pub(super) fn with_tables(
        self: &Arc<Self>,
        range: BlockRange,
        then: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        let missing: Missing = {
            let state = self.lock();
            let top = state.stack.top();
            top.missing(range.start.0..range.end(), Need::Entries).map(|page| (top.number, page)).collect()
        };
        if missing.is_empty() { then(Ok(())) } else { self.load_pages(missing, then) }
    }

    /// Reads pages that are not in memory; a page that several wait for is read once.
    pub(super) fn load_pages(
        self: &Arc<Self>,
        missing: Missing,
        then: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        let path = Arc::clone(self);
        let gather = Gather::new(
            missing.len(),
            Box::new(move |result| {
                then(result.map_err(|errno| path.io_error("reading checksums or allocation map", errno)));
            }),
        );
        let mut to_read = Vec::new();
        let mut in_memory = 0;
        {
            let mut state = self.lock();
            // Before, not after: what is loaded now is looked at next.
            if state.stack.page_count() > PAGES_MAX {
                state.drop_pages(PAGES_MAX / 8 * 7);
            }
            for (number, page) in missing {
                // It may have come, or its layer may have gone, since the caller looked.
                let Some(file) = state
                    .stack
                    .by_number(number)
                    .filter(|layer| layer.tables.page(page).is_none())
                    .map(|layer| layer.file.clone())
                else {
                    in_memory += 1;
                    continue;
                };
                let waiting = state.loading.entry((number, page)).or_insert_with(|| {
                    to_read.push((number, page, file));
                    Vec::new()
                });
                waiting.push(Arc::clone(&gather));
            }
        }
        for _ in 0..in_memory {
            gather.part_done(Ok(()));
        }
        for (number, page, file) in to_read {
            self.load(number, page, &file);
        }
    }

    fn load(self: &Arc<Self>, number: u32, page: TablePage, file: &DiskFile) {
        let path = Arc::clone(self);
        file.read(
            page.file_offset(),
            AlignedBuf::new(PAGE_BYTES),
            Box::new(move |result| {
                let (outcome, waiting) = {
                    let mut state = path.lock();
                    let outcome = result.map(|bytes| {
                        if let Some(layer) = state.stack.by_number(number) {
                            layer.tables.insert(page, bytes);
                        }
                    });
                    (outcome, state.loading.remove(&(number, page)).unwrap_or_default())
                };
                for gather in waiting {
                    gather.part_done(outcome);
                }
            }),
        );
    }

    /// Lets go of tables that an idle volume need not keep.
    pub fn trim_tables(&self) {
        let tib = self.size_bytes() >> 30;
        let keep = ((tib * IDLE_PAGES_PER_TIB) >> 10).max(IDLE_PAGES_MIN);
        self.lock().drop_pages(usize::try_from(keep).expect("a few thousand"));
    }

    /// Changes whenever requests were served: tells an idle replica from a busy one.
    pub fn activity(&self) -> u64 {
        self.lock().change_seq
    }
}

/// Pages being read, with who waits for them.
pub type Loading = HashMap<(u32, TablePage), Vec<Arc<Gather>>>;

const _: () = assert!(SUMS_PER_PAGE < STATES_PER_PAGE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::disk::sim::SimDisk;
    use holdfast_io::OpenMode;
    use holdfast_storage_core::ids::VolumeId;

    const BLOCKS: u64 = 256;

    fn mk_layer(number: u32, snapshot: Option<SnapshotId>) -> Layer {
        let disk = Disk::Sim(SimDisk::default());
        let file = disk.open(std::path::Path::new("/layer"), OpenMode::New).unwrap();
        let mut tables = Tables::default();
        for page in TablePage::covering(0, BLOCKS) {
            tables.insert(page, AlignedBuf::zeroed(PAGE_BYTES));
        }
        let summer = Summer::new(VolumeId(1));
        Layer { number, snapshot, blocks: BLOCKS, moved_below: 0, copied_below: 0, file, summer, tables }
    }

    fn look_up(stack: &Stack, look: Look) -> Vec<Found> {
        let span = stack.span(look).unwrap();
        stack.look_up(span, BlockRange::new(0, BLOCKS), Need::Entries).unwrap()
    }

    #[test]
    fn the_top_most_layer_that_has_a_block_decides() {
        let (one, two) = (SnapshotId(1), SnapshotId(2));
        let mut layers = vec![mk_layer(3, Some(one)), mk_layer(4, Some(two)), mk_layer(7, None)];
        layers[0].tables.set(5, Entry::data(50));
        layers[0].tables.set(6, Entry::data(60));
        layers[1].tables.set(6, Entry::zero(false));
        // State and sum disagree: what lies below must not come through.
        layers[2].tables.set(5, Entry { state: State::Absent, sum: 9 });
        let mut stack = Stack::new(layers);
        let live = look_up(&stack, Look::LIVE);
        assert_eq!(live[5], Found { entry: Entry { state: State::Absent, sum: 9 }, layer: 7 });
        assert_eq!(live[6], Found { entry: Entry::zero(false), layer: 4 });
        assert!(live[7].entry.is_absent());
        let first = look_up(&stack, Look::at(Some(one)));
        assert_eq!((first[5].entry, first[6].entry), (Entry::data(50), Entry::data(60)));
        let since = look_up(&stack, Look { at: Some(two), down_to: DownTo::After(one) });
        assert!(since[5].entry.is_absent() && since[6].layer == 4);
        stack.layers[1].moved_below = 7;
        assert_eq!(look_up(&stack, Look::LIVE)[6].layer, 3, "moved down");
        stack.layers[0].blocks = 6;
        assert!(look_up(&stack, Look::LIVE)[6].entry.is_absent(), "beyond the layer's size");
    }

    #[test]
    fn a_look_in_the_wrong_order_or_at_nothing_is_refused() {
        let (one, two) = (SnapshotId(1), SnapshotId(2));
        let stack = Stack::new(vec![mk_layer(3, Some(one)), mk_layer(4, Some(two)), mk_layer(7, None)]);
        assert_eq!(stack.span(Look::at(Some(SnapshotId(3)))), Err(SnapshotId(3)));
        assert_eq!(stack.span(Look { at: Some(one), down_to: DownTo::After(two) }), Err(two));
        assert_eq!(stack.span(Look { at: Some(one), down_to: DownTo::After(one) }), Ok(1..1));
        assert_eq!(stack.span(Look { at: None, down_to: DownTo::Own }), Ok(2..3));
    }

    #[test]
    fn pages_of_every_layer_down_are_asked_for_at_once() {
        let mut layers = vec![mk_layer(3, None), mk_layer(7, None)];
        layers[0].tables = Tables::default();
        layers[1].tables.set(0, Entry::data(1));
        let stack = Stack::new(layers);
        let missing = stack.look_up(0..2, BlockRange::new(0, 2), Need::Entries).unwrap_err();
        assert_eq!(missing, [(3, TablePage::Sums(0)), (3, TablePage::States(0))]);
        assert!(stack.look_up(0..2, BlockRange::new(0, 1), Need::Entries).is_ok(), "the top has it");
    }
}
