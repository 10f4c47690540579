//! The intent log on disk: one bit per region, in sectors that check themselves (R18).
//!
//! Page 0 is sealed (payload: replica_id 16, regions 8), the bits follow. All pages are written when the log is made,
//! so that setting a bit is one small write in place: no allocation, no journal, no room to run out of. Growth appends
//! pages; the header keeps the number of regions that the log was made for.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use holdfast_io::{AlignedBuf, OpenMode};
use holdfast_storage_core::ids::{Region, ReplicaId};

use crate::bit_sectors::{BITS_PER_PAGE, BITS_PER_SECTOR, Sector, decode_page, encode_page, page_count};
use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::layout::PAGE_BYTES;
use crate::manifest::bad_page;
use crate::sealed::{seal, u64_at, unseal};

const MAGIC: &[u8; 8] = b"HFINTLOG";
const VERSION: u32 = 1;
const FILE: &str = "log";

/// The open log, with its bits in memory.
#[derive(Debug)]
pub struct IntentLog {
    file: DiskFile,
    replica: ReplicaId,
    region_count: u64,
    regions: BTreeSet<Region>,
}

impl IntentLog {
    /// Makes an empty log, to be synced by the caller.
    pub fn write_new(
        disk: &Disk,
        dir: &Path,
        replica: ReplicaId,
        region_count: u64,
    ) -> Result<DiskFile, PoolError> {
        let path = dir.join(FILE);
        let file = disk.open(&path, OpenMode::New).map_err(PoolError::io("creating", &path))?;
        let mut page = AlignedBuf::zeroed(PAGE_BYTES);
        seal(MAGIC, VERSION, &header_payload(replica, region_count), &mut page);
        file.write_now(0, &page).map_err(PoolError::io("writing", &path))?;
        for index in 0..page_count(region_count) {
            encode_page(replica.0, index, &mut page, |_, _| {});
            file.write_now(page_offset(index), &page).map_err(PoolError::io("writing", &path))?;
        }
        Ok(file)
    }

    /// Opens the log and reads its bits. Damaged sectors count as all set.
    pub fn open(disk: &Disk, dir: &Path, replica: ReplicaId, region_count: u64) -> Result<Self, PoolError> {
        let path = dir.join(FILE);
        let file = disk.open(&path, OpenMode::Existing).map_err(PoolError::io("opening", &path))?;
        let found_bytes = file.len_bytes().map_err(PoolError::io("reading", &path))?;
        let pages = page_count(region_count);
        let expected_bytes = page_offset(pages);
        if found_bytes < expected_bytes {
            return Err(PoolError::Truncated { path, found_bytes, expected_bytes });
        }
        let head = file.read_now(0, PAGE_BYTES).map_err(PoolError::io("reading", &path))?;
        let payload = unseal(MAGIC, VERSION, &head).map_err(|bad| bad_page(&path, VERSION, &bad))?;
        let made_for = if payload.len() == 24 { u64_at(payload, 16) } else { u64::MAX };
        if made_for > region_count || payload != header_payload(replica, made_for) {
            return Err(PoolError::Corrupt { path, what: "it belongs to another replica".to_owned() });
        }
        let mut regions = BTreeSet::new();
        for index in 0..pages {
            let page =
                file.read_now(page_offset(index), PAGE_BYTES).map_err(PoolError::io("reading", &path))?;
            collect_regions(replica, index, &page, region_count, &mut regions);
        }
        Ok(Self { file, replica, region_count, regions })
    }

    /// Makes room for more regions, durably; none of them is in the log. A crash leaves a log that is longer than needed.
    pub fn grow(&mut self, region_count: u64) -> io::Result<()> {
        let old_pages = page_count(self.region_count);
        for index in old_pages..page_count(region_count) {
            self.file.write_now(page_offset(index), &self.encode(index))?;
        }
        self.file.sync_now()?;
        self.region_count = region_count.max(self.region_count);
        Ok(())
    }

    /// The regions in the log.
    pub fn regions(&self) -> &BTreeSet<Region> {
        &self.regions
    }

    /// Puts regions in; durable when this returns.
    pub fn add(&mut self, regions: &[Region]) -> io::Result<()> {
        let new: Vec<Region> =
            regions.iter().copied().filter(|region| self.regions.insert(*region)).collect();
        let pages = pages_of(&new);
        if let [page] = pages.iter().copied().collect::<Vec<u64>>()[..] {
            return self.file.write_durable_now(page_offset(page), &self.encode(page));
        }
        for page in &pages {
            self.file.write_now(page_offset(*page), &self.encode(*page))?;
        }
        if pages.is_empty() { Ok(()) } else { self.file.sync_now() }
    }

    /// Takes regions out. Not durable by itself: after a crash they may be back, which costs copying and no data.
    pub fn remove(&mut self, regions: &[Region]) -> io::Result<()> {
        let gone: Vec<Region> =
            regions.iter().copied().filter(|region| self.regions.remove(region)).collect();
        for page in pages_of(&gone) {
            self.file.write_now(page_offset(page), &self.encode(page))?;
        }
        Ok(())
    }

    fn encode(&self, page_index: u64) -> AlignedBuf {
        let mut page = AlignedBuf::new(PAGE_BYTES);
        encode_page(self.replica.0, page_index, &mut page, |first, bits| {
            let from = Region(u32::try_from(first).unwrap_or(u32::MAX));
            let until = Region(u32::try_from(first + BITS_PER_SECTOR).unwrap_or(u32::MAX));
            for region in self.regions.range(from..until) {
                let bit = u64::from(region.0) - first;
                bits[usize::try_from(bit / 8).expect("inside a sector")] |= 1 << (bit % 8);
            }
        });
        page
    }
}

fn collect_regions(replica: ReplicaId, index: u64, page: &[u8], count: u64, regions: &mut BTreeSet<Region>) {
    let mut insert = |number: u64| {
        if number < count
            && let Ok(number) = u32::try_from(number)
        {
            regions.insert(Region(number));
        }
    };
    for sector in decode_page(replica.0, index, page) {
        match sector {
            Sector::Bits { first, bits } => {
                for (byte, value) in bits.iter().enumerate().filter(|(_, value)| **value != 0) {
                    (0..8)
                        .filter(|bit| value >> bit & 1 == 1)
                        .for_each(|bit| insert(first + byte as u64 * 8 + bit));
                }
            }
            // Blank sectors cannot be: all were written when the log was made.
            Sector::Damaged { first } | Sector::Blank { first } => {
                tracing::error!(%replica, first_region = first, "a damaged sector of the intent log counts as set");
                (first..first + BITS_PER_SECTOR).for_each(&mut insert);
            }
        }
    }
}

fn pages_of(regions: &[Region]) -> BTreeSet<u64> {
    regions.iter().map(|region| u64::from(region.0) / BITS_PER_PAGE).collect()
}

/// Where a page of bits lies: behind the header.
fn page_offset(index: u64) -> u64 {
    (index + 1) * PAGE_BYTES as u64
}

fn header_payload(replica: ReplicaId, region_count: u64) -> Vec<u8> {
    let mut payload = replica.0.to_le_bytes().to_vec();
    payload.extend(region_count.to_le_bytes());
    payload
}
