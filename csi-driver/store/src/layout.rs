//! Where things lie in a layer file (`docs/on-disk-format.md`, "Layer").
//!
//! ```text
//!  0         2 MiB                                      2 MiB + group
//!  ├ header ─┼ map 64 KiB │ – │ sums 1 MiB │ data 1 GiB ┼ map │ – │ sums │ data ┼ …
//! ```
//!
//! A group holds the tables of 1 GiB right before its data: a growing volume appends groups and moves nothing, and
//! one `fdatasync` covers data and tables.

use holdfast_storage_core::ids::{BLOCK_BYTES, BLOCKS_PER_REGION, REGION_BYTES};

/// Bytes of a page: the unit in which tables are read and written.
pub const PAGE_BYTES: usize = 4096;
/// Bytes before the first group.
const HEADER_BYTES: u64 = 2 << 20;
/// Bytes of data in a full group.
const GROUP_DATA_BYTES: u64 = 1 << 30;
/// Bytes of a group's tables: the allocation map at 0, the checksums at [`SUMS_AT`].
const GROUP_TABLE_BYTES: u64 = 2 << 20;
const SUMS_AT: u64 = 1 << 20;
const GROUP_BYTES: u64 = GROUP_TABLE_BYTES + GROUP_DATA_BYTES;
/// Blocks in a full group.
pub const BLOCKS_PER_GROUP: u64 = GROUP_DATA_BYTES / BLOCK_BYTES;
/// Blocks whose checksums (4 bytes each) fill a page.
pub const SUMS_PER_PAGE: u64 = PAGE_BYTES as u64 / 4;
/// Blocks whose allocation states (2 bits each) fill a page.
pub const STATES_PER_PAGE: u64 = PAGE_BYTES as u64 * 4;
/// Largest volume: regions are counted in 32 bits.
pub const SIZE_BYTES_MAX: u64 = 1 << 52;

/// Whether a volume may have this size.
pub fn is_volume_size(size_bytes: u64) -> bool {
    size_bytes > 0 && size_bytes <= SIZE_BYTES_MAX && size_bytes.is_multiple_of(REGION_BYTES)
}

/// Length of the layer file of a volume.
pub fn layer_file_bytes(size_bytes: u64) -> u64 {
    let groups = size_bytes.div_ceil(GROUP_DATA_BYTES);
    HEADER_BYTES + groups * GROUP_TABLE_BYTES + size_bytes
}

/// Where a block's data lies in the layer file.
pub fn data_offset(block: u64) -> u64 {
    let group = block / BLOCKS_PER_GROUP;
    HEADER_BYTES + group * GROUP_BYTES + GROUP_TABLE_BYTES + block % BLOCKS_PER_GROUP * BLOCK_BYTES
}

/// Cuts a run of blocks where groups meet: `(first block, count)` of each piece, whose data is contiguous in the file.
pub fn group_pieces(start: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start + count;
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let border = (at / BLOCKS_PER_GROUP + 1) * BLOCKS_PER_GROUP;
        let piece = (at, border.min(end) - at);
        at += piece.1;
        Some(piece)
    })
}

/// A page of one of the two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TablePage {
    /// Page of the checksums: blocks `n × 1024` and on.
    Sums(u64),
    /// Page of the allocation map: blocks `n × 16384` and on.
    States(u64),
}

impl TablePage {
    /// The page with a block's checksum.
    pub fn of_sum(block: u64) -> Self {
        TablePage::Sums(block / SUMS_PER_PAGE)
    }

    /// The page with a block's state.
    pub fn of_state(block: u64) -> Self {
        TablePage::States(block / STATES_PER_PAGE)
    }

    /// The pages that speak of a run of blocks; none for an empty one.
    pub fn covering(start: u64, count: u64) -> impl Iterator<Item = TablePage> {
        let pages = move |per_page: u64| match count {
            0 => 0..0,
            _ => start / per_page..(start + count - 1) / per_page + 1,
        };
        pages(SUMS_PER_PAGE).map(TablePage::Sums).chain(pages(STATES_PER_PAGE).map(TablePage::States))
    }

    /// Where the page lies in the layer file.
    pub fn file_offset(self) -> u64 {
        let (first_block, table_at, page_in_group) = match self {
            TablePage::Sums(page) => {
                (page * SUMS_PER_PAGE, SUMS_AT, page % (BLOCKS_PER_GROUP / SUMS_PER_PAGE))
            }
            TablePage::States(page) => {
                (page * STATES_PER_PAGE, 0, page % (BLOCKS_PER_GROUP / STATES_PER_PAGE))
            }
        };
        let group = first_block / BLOCKS_PER_GROUP;
        HEADER_BYTES + group * GROUP_BYTES + table_at + page_in_group * PAGE_BYTES as u64
    }
}

/// The group of a block.
pub fn group_of(block: u64) -> u64 {
    block / BLOCKS_PER_GROUP
}

/// The parts of the file that hold a group's tables, as `(offset, length)`: reserved before the first write into the
/// group, so that a full pool can still write them (R16).
pub fn table_areas(size_bytes: u64, group: u64) -> [(u64, u64); 2] {
    let first = group * BLOCKS_PER_GROUP;
    let here = (size_bytes / BLOCK_BYTES - first).min(BLOCKS_PER_GROUP);
    let states_bytes = here.div_ceil(STATES_PER_PAGE) * PAGE_BYTES as u64;
    let sums_bytes = here.div_ceil(SUMS_PER_PAGE) * PAGE_BYTES as u64;
    [
        (TablePage::of_state(first).file_offset(), states_bytes),
        (TablePage::of_sum(first).file_offset(), sums_bytes),
    ]
}

/// Number of regions in a volume.
pub fn region_count(size_bytes: u64) -> u64 {
    size_bytes / BLOCK_BYTES / BLOCKS_PER_REGION
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_table_areas(size_bytes: u64) -> Vec<(u64, u64)> {
        let groups = size_bytes.div_ceil(GROUP_DATA_BYTES);
        (0..groups).flat_map(|group| table_areas(size_bytes, group)).collect()
    }

    #[test]
    fn nothing_in_a_layer_overlaps_or_leaves_the_file() {
        for size_bytes in
            [REGION_BYTES, 5 * REGION_BYTES, GROUP_DATA_BYTES, 2 * GROUP_DATA_BYTES + REGION_BYTES]
        {
            let mut areas = all_table_areas(size_bytes);
            let pieces = group_pieces(0, size_bytes / BLOCK_BYTES);
            areas.extend(pieces.map(|(block, count)| (data_offset(block), count * BLOCK_BYTES)));
            areas.push((0, HEADER_BYTES));
            areas.sort_unstable();
            for pair in areas.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{size_bytes}: {pair:?}");
            }
            let end = areas.iter().map(|(at, len)| at + len).max();
            assert_eq!(end, Some(layer_file_bytes(size_bytes)));
        }
    }

    #[test]
    fn table_pages_lie_inside_the_table_areas() {
        let size_bytes = 2 * GROUP_DATA_BYTES + 3 * REGION_BYTES;
        let areas = all_table_areas(size_bytes);
        let blocks = size_bytes / BLOCK_BYTES;
        for block in [0, 1023, 1024, 16383, 16384, BLOCKS_PER_GROUP - 1, BLOCKS_PER_GROUP, blocks - 1] {
            for page in [TablePage::of_sum(block), TablePage::of_state(block)] {
                let at = page.file_offset();
                let inside =
                    areas.iter().any(|(from, len)| at >= *from && at + PAGE_BYTES as u64 <= from + len);
                assert!(inside, "{block} {page:?} {at}");
            }
        }
    }

    #[test]
    fn pieces_are_cut_at_group_borders() {
        let pieces: Vec<_> = group_pieces(BLOCKS_PER_GROUP - 2, 5).collect();
        assert_eq!(pieces, [(BLOCKS_PER_GROUP - 2, 2), (BLOCKS_PER_GROUP, 3)]);
        assert_eq!(
            data_offset(BLOCKS_PER_GROUP) - data_offset(BLOCKS_PER_GROUP - 1),
            BLOCK_BYTES + GROUP_TABLE_BYTES
        );
    }
}
