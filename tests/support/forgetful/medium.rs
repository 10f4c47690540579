//! One disk with a volatile write cache, as two files: what it answers now, and what would be left after a power cut.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::Rng;
use rand::rngs::StdRng;

use super::Tear;

/// What a disk writes whole or not at all, in bytes.
const SECTOR_BYTES: u64 = 512;
/// Sectors are remembered by the page.
const PAGE_BYTES: u64 = 4096;
/// Of so many overwrites of unflushed sectors, one finds the older version written out already: disks write early.
const EARLY_ONE_IN: u32 = 4;

/// One disk. Its files are sparse; nothing is synced, since the host keeps its power.
pub(super) struct Medium {
    current: File,
    stable: File,
    size_bytes: u64,
    /// Unflushed sectors: page number to one bit per sector. It cannot outgrow the disk.
    dirty: BTreeMap<u64, u8>,
    /// A disk that answers a flush and does nothing.
    lying: bool,
    random: StdRng,
    flushes: u64,
}

/// What a cut did to one disk.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct CutCount {
    pub(super) kept_sectors: u64,
    pub(super) dropped_sectors: u64,
    /// Pages of which a part was kept and a part dropped.
    pub(super) torn_pages: u64,
}

impl Medium {
    /// Opens the disk's two files `NAME.current` and `NAME.stable`, or makes them.
    pub(super) fn open(dir: &Path, name: &str, size_bytes: u64, random: StdRng) -> io::Result<Self> {
        let open = |kind: &str| -> io::Result<File> {
            let path = dir.join(format!("{name}.{kind}"));
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            file.set_len(size_bytes)?;
            Ok(file)
        };
        let (current, stable) = (open("current")?, open("stable")?);
        Ok(Self { current, stable, size_bytes, dirty: BTreeMap::new(), lying: false, random, flushes: 0 })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Flushes that were answered.
    pub(super) fn flushes(&self) -> u64 {
        self.flushes
    }

    pub(super) fn set_lying(&mut self, lying: bool) {
        self.lying = lying;
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.current.read_exact_at(data, offset)
    }

    /// Takes whole sectors into the cache.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        if !(offset | end).is_multiple_of(SECTOR_BYTES) || end > self.size_bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (page, mask) in pages(offset, end) {
            let again = self.dirty.get(&page).copied().unwrap_or(0) & mask;
            if again != 0 && !self.lying && self.random.random_ratio(1, EARLY_ONE_IN) {
                copy_sectors(&self.current, &self.stable, page, again)?;
            }
            *self.dirty.entry(page).or_default() |= mask;
        }
        self.current.write_all_at(data, offset)
    }

    /// Everything written before stays from now on; unless the disk lies.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.flushes += 1;
        if self.lying {
            return Ok(());
        }
        for (page, mask) in std::mem::take(&mut self.dirty) {
            copy_sectors(&self.current, &self.stable, page, mask)?;
        }
        Ok(())
    }

    /// The power goes: of the unflushed sectors some or none are kept.
    pub(super) fn cut(&mut self, tear: Tear) -> io::Result<CutCount> {
        let mut count = CutCount::default();
        let keep_percent = match tear {
            Tear::DropAll => 0,
            Tear::Random => self.random.random_range(0..=100),
        };
        for (page, mask) in std::mem::take(&mut self.dirty) {
            let kept = mask & self.survivors(keep_percent);
            copy_sectors(&self.current, &self.stable, page, kept)?;
            copy_sectors(&self.stable, &self.current, page, mask & !kept)?;
            count.kept_sectors += u64::from(kept.count_ones());
            count.dropped_sectors += u64::from((mask & !kept).count_ones());
            count.torn_pages += u64::from(kept != 0 && kept != mask);
        }
        Ok(count)
    }

    /// Which sectors of a page are kept: as often as not the page is one piece.
    fn survivors(&mut self, keep_percent: u32) -> u8 {
        if self.random.random_bool(0.5) {
            return if self.random.random_ratio(keep_percent, 100) { u8::MAX } else { 0 };
        }
        (0..8).filter(|_| self.random.random_ratio(keep_percent, 100)).fold(0, |mask, bit| mask | 1 << bit)
    }
}

/// The pages of a range of sectors, each with one bit per sector in the range.
fn pages(offset: u64, end: u64) -> impl Iterator<Item = (u64, u8)> {
    let last = end.div_ceil(PAGE_BYTES);
    (offset / PAGE_BYTES..last).map(move |page| {
        let in_range = |bit: &u64| {
            let sector = page * PAGE_BYTES + bit * SECTOR_BYTES;
            sector >= offset && sector < end
        };
        (page, (0..8).filter(in_range).fold(0, |mask, bit| mask | 1 << bit))
    })
}

fn copy_sectors(from: &File, to: &File, page: u64, mask: u8) -> io::Result<()> {
    let mut data = [0; PAGE_BYTES as usize];
    if mask == 0 {
        return Ok(());
    }
    from.read_exact_at(&mut data, page * PAGE_BYTES)?;
    if mask == u8::MAX {
        return to.write_all_at(&data, page * PAGE_BYTES);
    }
    for (bit, sector) in data.chunks_exact(SECTOR_BYTES as usize).enumerate() {
        if mask & (1 << bit) != 0 {
            to.write_all_at(sector, page * PAGE_BYTES + bit as u64 * SECTOR_BYTES)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn mk_medium(dir: &Path, seed: u64) -> Medium {
        Medium::open(dir, "a", 64 * PAGE_BYTES, StdRng::seed_from_u64(seed)).unwrap()
    }

    fn read_sector(medium: &Medium, sector: u64) -> u8 {
        let mut data = [0; SECTOR_BYTES as usize];
        medium.read(sector * SECTOR_BYTES, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == data[0]), "a sector is torn");
        data[0]
    }

    #[test]
    fn what_was_flushed_stays_and_what_was_not_is_old_or_new_by_the_sector() {
        let (mut kept, mut dropped, mut torn) = (0, 0, 0);
        for seed in 0..50 {
            let dir = tempfile::tempdir().unwrap();
            let mut medium = mk_medium(dir.path(), seed);
            medium.write(0, &[1; 64 * PAGE_BYTES as usize]).unwrap();
            medium.flush().unwrap();
            medium.write(8 * PAGE_BYTES, &[2; 8 * PAGE_BYTES as usize]).unwrap();

            let count = medium.cut(Tear::Random).unwrap();

            for sector in 0..512 {
                let found = read_sector(&medium, sector);
                let unflushed = (64..128).contains(&sector);
                assert!(found == 1 || (found == 2 && unflushed), "seed {seed}: sector {sector} is {found}");
            }
            assert_eq!(count.kept_sectors + count.dropped_sectors, 64);
            kept += count.kept_sectors;
            dropped += count.dropped_sectors;
            torn += count.torn_pages;
        }
        assert!(kept > 100 && dropped > 100 && torn > 10, "{kept} kept, {dropped} dropped, {torn} torn");
    }

    #[test]
    fn a_disk_that_lies_about_flushes_forgets_what_it_said_was_safe() {
        let dir = tempfile::tempdir().unwrap();
        let mut medium = mk_medium(dir.path(), 1);
        medium.set_lying(true);
        medium.write(PAGE_BYTES, &[1; PAGE_BYTES as usize]).unwrap();
        medium.flush().unwrap();

        medium.cut(Tear::DropAll).unwrap();

        assert_eq!(read_sector(&medium, 8), 0);
    }

    #[test]
    fn a_part_of_a_page_is_remembered_by_its_sectors() {
        assert_eq!(pages(512, 1024).collect::<Vec<_>>(), [(0, 0b10)]);
        assert_eq!(pages(4096 - 512, 4096 + 1024).collect::<Vec<_>>(), [(0, 0x80), (1, 0b11)]);
        assert_eq!(pages(8192, 8192 + 4096).collect::<Vec<_>>(), [(2, 0xff)]);
    }
}
