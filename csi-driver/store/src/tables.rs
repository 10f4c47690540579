//! Checksums and allocation states in memory: the pages that were needed so far, and which of them changed.
//!
//! State and sum of a block check each other, so a page that rots or that a disk forgot to write is noticed:
//!
//! | state | sum |
//! |---|---|
//! | absent (0) | 0 |
//! | zero (1), zero with its space kept (3) | 0xffff_ffff |
//! | zero (1), zero with its space kept (3), marked bad | 0xbad0_b10c: does not verify |
//! | data (2) | CRC32C of the data; never absent's or zero's |

use std::collections::{BTreeSet, HashMap};

use holdfast_io::AlignedBuf;

use crate::layout::{PAGE_BYTES, STATES_PER_PAGE, SUMS_PER_PAGE, TablePage};
use crate::sealed::u32_at;
use crate::sums::{ABSENT_SUM, BAD_SUM, ZERO_SUM};

/// What the allocation map stores for a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Never written.
    Absent = 0,
    /// Zero, its space given back.
    Zero = 1,
    /// Data.
    Data = 2,
    /// Zero, its space kept.
    ZeroKept = 3,
}

impl State {
    pub(crate) fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => State::Absent,
            1 => State::Zero,
            2 => State::Data,
            _ => State::ZeroKept,
        }
    }

    /// Whether the file certainly has space for the block.
    pub fn has_space(self) -> bool {
        match self {
            State::Data | State::ZeroKept => true,
            State::Absent | State::Zero => false,
        }
    }
}

/// A block's state and sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// From the allocation map.
    pub state: State,
    /// From the checksums.
    pub sum: u32,
}

impl Entry {
    /// Of a block that was never written.
    pub const ABSENT: Self = Self { state: State::Absent, sum: ABSENT_SUM };

    /// Whether both say that the layer does not have the block. Where only one does, the block is bad.
    pub fn is_absent(self) -> bool {
        self == Self::ABSENT
    }

    /// Of a zeroed block.
    pub fn zero(space_kept: bool) -> Self {
        Self { state: if space_kept { State::ZeroKept } else { State::Zero }, sum: ZERO_SUM }
    }

    /// Of a block with data.
    pub fn data(sum: u32) -> Self {
        Self { state: State::Data, sum }
    }

    /// Of a block marked bad: state and sum disagree, on purpose (R25).
    pub fn bad(space_kept: bool) -> Self {
        Self { state: if space_kept { State::ZeroKept } else { State::Zero }, sum: BAD_SUM }
    }

    /// Whether either of the two says that there is data. Where they disagree, a crash may have left one of them old.
    pub fn may_hold_data(self) -> bool {
        self.state == State::Data || !matches!(self.sum, ABSENT_SUM | ZERO_SUM | BAD_SUM)
    }

    /// Whether the block's place in the file may hold something else than what the block reads as, for a block that has
    /// got this entry before; `layered`: a layer beneath may have data.
    pub fn place_differs(self, layered: bool) -> bool {
        match self.state {
            State::Data => false,
            // Given back or never used, the place is zeroes, which is how the block reads if nothing lies beneath.
            State::Absent => layered || !self.agrees_without_data(),
            State::Zero => !self.agrees_without_data(),
            State::ZeroKept => true,
        }
    }

    /// Whether the block was marked bad.
    pub fn is_marked_bad(self) -> bool {
        self == Self::bad(true) || self == Self::bad(false)
    }

    /// For a block without data: whether state and sum agree.
    pub fn agrees_without_data(self) -> bool {
        match self.state {
            State::Absent => self.sum == ABSENT_SUM,
            State::Zero | State::ZeroKept => self.sum == ZERO_SUM,
            State::Data => false,
        }
    }
}

/// A layer's pages in memory, loaded when first needed. Clean ones may be dropped again.
#[derive(Debug, Default)]
pub struct Tables {
    pages: HashMap<TablePage, AlignedBuf>,
    dirty: BTreeSet<TablePage>,
}

impl Tables {
    /// The pages that must be loaded before a run of blocks can be looked at.
    pub fn missing(&self, start: u64, count: u64) -> impl Iterator<Item = TablePage> + '_ {
        TablePage::covering(start, count).filter(|page| !self.pages.contains_key(page))
    }

    /// Pages in memory.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Drops up to `count` clean pages that are not `busy`; tells how many.
    pub fn drop_clean(&mut self, count: usize, busy: impl Fn(&TablePage) -> bool) -> usize {
        let mut dropped = 0;
        let dirty = &self.dirty;
        self.pages.retain(|page, _| {
            let drop = dropped < count && !dirty.contains(page) && !busy(page);
            dropped += usize::from(drop);
            !drop
        });
        dropped
    }

    /// Takes a page in as the disk has it. One that is there already may have changed since and stays.
    pub fn insert(&mut self, page: TablePage, bytes: AlignedBuf) {
        self.pages.entry(page).or_insert(bytes);
    }

    /// A page that is in memory.
    pub fn page(&self, page: TablePage) -> Option<&[u8]> {
        self.pages.get(&page).map(|bytes| &bytes[..])
    }

    /// State and sum of a block whose pages are in memory.
    pub fn entry(&self, block: u64) -> Entry {
        let sums = &self.pages[&TablePage::of_sum(block)];
        let states = &self.pages[&TablePage::of_state(block)];
        Entry { state: state_in(states, block), sum: u32_at(sums, sum_at(block)) }
    }

    /// State of a block whose page of the allocation map is in memory.
    pub fn state(&self, block: u64) -> State {
        state_in(&self.pages[&TablePage::of_state(block)], block)
    }

    /// Changes a block whose pages are in memory; tells what it was.
    pub fn set(&mut self, block: u64, entry: Entry) -> Entry {
        let (sum_page, state_page) = (TablePage::of_sum(block), TablePage::of_state(block));
        let sums = self.pages.get_mut(&sum_page).expect("a write loads its pages first");
        let at = sum_at(block);
        let sum_before = u32_at(sums, at);
        if sum_before != entry.sum {
            sums[at..at + 4].copy_from_slice(&entry.sum.to_le_bytes());
            self.dirty.insert(sum_page);
        }
        let states = self.pages.get_mut(&state_page).expect("a write loads its pages first");
        let state_before = state_in(states, block);
        if state_before != entry.state {
            let (byte, shift) = state_at(block);
            states[byte] = states[byte] & !(3 << shift) | (entry.state as u8) << shift;
            self.dirty.insert(state_page);
        }
        Entry { state: state_before, sum: sum_before }
    }

    /// Copies of the pages that changed and were not saved.
    pub fn dirty_pages(&self) -> Vec<(TablePage, AlignedBuf)> {
        self.dirty.iter().map(|page| (*page, AlignedBuf::copy_of(&self.pages[page]))).collect()
    }

    /// These pages are on the disk as they are here.
    pub fn saved(&mut self, pages: impl Iterator<Item = TablePage>) {
        for page in pages {
            self.dirty.remove(&page);
        }
    }

    /// Copies of the pages that changed since the last call, in file order, with their file offsets.
    pub fn take_dirty(&mut self) -> Vec<(u64, AlignedBuf)> {
        let dirty = std::mem::take(&mut self.dirty);
        let mut copies: Vec<(u64, AlignedBuf)> = dirty
            .into_iter()
            .map(|page| (page.file_offset(), AlignedBuf::copy_of(&self.pages[&page])))
            .collect();
        copies.sort_unstable_by_key(|(offset, _)| *offset);
        copies
    }
}

/// A block's state within its page of the allocation map.
pub fn state_in(page: &[u8], block: u64) -> State {
    let (byte, shift) = state_at(block);
    State::from_bits(page[byte] >> shift)
}

/// Adds the blocks that are not absent in `page` to those of `union`, as whatever state.
pub fn add_states(union: &mut [u8], page: &[u8]) {
    for (sum, more) in union.iter_mut().zip(page) {
        *sum |= more;
    }
}

/// Number of blocks in a page of the allocation map that are not absent.
pub fn count_allocated(page: &[u8]) -> u64 {
    // Either bit of a pair set means "not absent": fold the upper bits onto the lower ones and count those.
    page.iter().map(|byte| u64::from(((byte | byte >> 1) & 0x55).count_ones())).sum()
}

fn sum_at(block: u64) -> usize {
    usize::try_from(block % SUMS_PER_PAGE * 4).expect("inside a page")
}

fn state_at(block: u64) -> (usize, u32) {
    let bit = block % STATES_PER_PAGE * 2;
    let byte = usize::try_from(bit / 8).expect("inside a page");
    debug_assert!(byte < PAGE_BYTES);
    (byte, u32::try_from(bit % 8).expect("below 8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_tables(blocks: u64) -> Tables {
        let mut tables = Tables::default();
        for page in TablePage::covering(0, blocks) {
            tables.insert(page, AlignedBuf::zeroed(PAGE_BYTES));
        }
        tables
    }

    #[test]
    fn entries_are_kept_and_neighbours_are_left_alone() {
        let mut tables = mk_tables(2048);
        tables.set(1023, Entry::data(7));
        tables.set(1024, Entry::zero(false));
        tables.set(1025, Entry::zero(true));
        assert_eq!(tables.entry(1022), Entry { state: State::Absent, sum: ABSENT_SUM });
        assert_eq!(tables.entry(1023), Entry::data(7));
        assert_eq!(tables.entry(1024), Entry::zero(false));
        assert_eq!(tables.entry(1025), Entry::zero(true));
        assert_eq!(count_allocated(tables.page(TablePage::States(0)).unwrap()), 3);
    }

    #[test]
    fn only_changed_pages_are_dirty_and_only_once() {
        let mut tables = mk_tables(2048);
        tables.set(0, Entry::data(7));
        assert_eq!(tables.take_dirty().len(), 2, "a first write changes sum and state");
        tables.set(0, Entry::data(8));
        assert_eq!(tables.take_dirty().len(), 1, "an overwrite changes the sum alone");
        tables.set(0, Entry::data(8));
        assert!(tables.take_dirty().is_empty(), "same data, same sum");
    }

    #[test]
    fn only_clean_pages_that_nobody_needs_are_dropped() {
        let mut tables = mk_tables(3 * 1024);
        tables.set(0, Entry::data(7));
        let busy = TablePage::Sums(1);
        assert_eq!(tables.page_count(), 4);
        assert_eq!(tables.drop_clean(10, |page| *page == busy), 1);
        assert!(tables.page(TablePage::Sums(2)).is_none());
        assert_eq!(tables.entry(0), Entry::data(7));
        assert_eq!(tables.missing(1024, 2048).collect::<Vec<_>>(), [TablePage::Sums(2)]);
    }
}
