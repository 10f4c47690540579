//! Bitmaps that survive torn writes: every 512-byte sector checks itself, and a sector is written whole or not at all.
//!
//! ```text
//!  0        4         8                32                                512
//!  ├ crc32c ┼ index ──┼ owner, 16 B … ─┼ bits of 15 × 256 = 3840 items ───┤
//! ```
//!
//! A bit is set by rewriting its sector in place: after a crash the sector is the old or the new one, and the bits that
//! were set before are set in both. A sector that does not verify counts as all set: that costs copying, never data.

/// Bytes of a sector: what every disk writes whole.
pub const SECTOR_BYTES: usize = 512;
const HEAD_BYTES: usize = 32;
/// Bits in a sector; a multiple of the blocks in a region.
pub const BITS_PER_SECTOR: u64 = ((SECTOR_BYTES - HEAD_BYTES) * 8) as u64;
const SECTORS_PER_PAGE: u64 = (crate::layout::PAGE_BYTES / SECTOR_BYTES) as u64;
/// Bits in a page.
pub const BITS_PER_PAGE: u64 = BITS_PER_SECTOR * SECTORS_PER_PAGE;

/// Pages that hold so many bits.
pub fn page_count(bits: u64) -> u64 {
    bits.div_ceil(BITS_PER_PAGE)
}

/// The sectors of a page.
fn sectors(page_index: u64) -> impl Iterator<Item = (usize, u64)> {
    (0..SECTORS_PER_PAGE).map(move |sector| {
        (usize::try_from(sector).expect("8 at most") * SECTOR_BYTES, page_index * SECTORS_PER_PAGE + sector)
    })
}

/// Writes a page of bits: `fill` gets the number of each sector's first bit and the zeroed bytes to set bits in.
pub fn encode_page(owner: u128, page_index: u64, page: &mut [u8], mut fill: impl FnMut(u64, &mut [u8])) {
    for (at, sector) in sectors(page_index) {
        let bytes = &mut page[at..at + SECTOR_BYTES];
        bytes.fill(0);
        bytes[4..8]
            .copy_from_slice(&u32::try_from(sector).expect("volumes end below 2^32 sectors").to_le_bytes());
        bytes[8..24].copy_from_slice(&owner.to_le_bytes());
        fill(sector * BITS_PER_SECTOR, &mut bytes[HEAD_BYTES..]);
        let crc = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// What a sector says.
#[derive(Debug, PartialEq, Eq)]
pub enum Sector<'page> {
    /// Its bits, from bit `first` on.
    Bits {
        /// Number of its first bit.
        first: u64,
        /// The bits, lowest first.
        bits: &'page [u8],
    },
    /// Never written.
    Blank {
        /// Number of its first bit.
        first: u64,
    },
    /// It does not verify: all its bits count as set.
    Damaged {
        /// Number of its first bit.
        first: u64,
    },
}

/// Reads a page written by [`encode_page`].
pub fn decode_page(owner: u128, page_index: u64, page: &[u8]) -> impl Iterator<Item = Sector<'_>> {
    sectors(page_index).map(move |(at, sector)| {
        let bytes = &page[at..at + SECTOR_BYTES];
        let first = sector * BITS_PER_SECTOR;
        if bytes.iter().all(|byte| *byte == 0) {
            return Sector::Blank { first };
        }
        let verifies = crate::sealed::u32_at(bytes, 0) == crc32c::crc32c(&bytes[4..])
            && u64::from(crate::sealed::u32_at(bytes, 4)) == sector
            && crate::sealed::u128_at(bytes, 8) == owner;
        if verifies { Sector::Bits { first, bits: &bytes[HEAD_BYTES..] } } else { Sector::Damaged { first } }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_survive_and_a_damaged_sector_is_told() {
        let mut page = vec![0; 4096];
        encode_page(7, 2, &mut page, |first, bits| bits[0] = u8::try_from(first % 251).unwrap());
        let read: Vec<_> = decode_page(7, 2, &page).collect();
        for (sector, found) in read.iter().enumerate() {
            let first = 2 * BITS_PER_PAGE + sector as u64 * BITS_PER_SECTOR;
            let Sector::Bits { first: found_first, bits } = found else { panic!("{found:?}") };
            assert_eq!((*found_first, u64::from(bits[0])), (first, first % 251));
        }
        page[600] ^= 1;
        let damaged = decode_page(7, 2, &page).nth(1).unwrap();
        assert_eq!(damaged, Sector::Damaged { first: 2 * BITS_PER_PAGE + BITS_PER_SECTOR });
        assert!(matches!(decode_page(8, 2, &page).next(), Some(Sector::Damaged { .. })), "another owner's");
        assert!(matches!(decode_page(7, 3, &page).next(), Some(Sector::Damaged { .. })), "another place's");
        assert_eq!(decode_page(7, 0, &[0; 4096]).next(), Some(Sector::Blank { first: 0 }));
    }
}
