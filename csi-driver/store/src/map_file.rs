//! A dirty map on disk: one bit per block written since a replica left, in sectors that check themselves (R21, R22).
//!
//! Page 0 is sealed (payload: replica_id 16, absent 16, base number 8, base nonce 8, void 4, reserved 4, blocks 8), the
//! bits follow: 480 bytes of each sector hold the 256 bits of 15 regions. A file is made whole beside its name and
//! renamed over it. A sector never written has no bits set; a damaged one has all; a damaged header voids the map.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use holdfast_io::{AlignedBuf, OpenMode};
use holdfast_storage_core::dirty_map::{BlockSet, Dirty, DirtyMap, RegionBits};
use holdfast_storage_core::ids::{BLOCKS_PER_REGION, Epoch, Region, ReplicaId};

use crate::bit_sectors::{BITS_PER_PAGE, BITS_PER_SECTOR, Sector, decode_page, encode_page, page_count};
use crate::disk::{Disk, DiskFile};
use crate::layout::PAGE_BYTES;
use crate::sealed::{seal, u64_at, unseal};

const MAGIC: &[u8; 8] = b"HFDIRTYM";
const VERSION: u32 = 1;
const PREFIX: &str = "map-";
const NEW_SUFFIX: &str = ".new";
const REGION_BYTES_OF_BITS: usize = (BLOCKS_PER_REGION / 8) as usize;
const REGIONS_PER_PAGE: u64 = BITS_PER_PAGE / BLOCKS_PER_REGION;

/// The maps of one replica.
#[derive(Debug)]
pub struct MapFiles {
    disk: Disk,
    dir: PathBuf,
    replica: ReplicaId,
    block_count: u64,
    open: BTreeMap<ReplicaId, OpenMap>,
}

#[derive(Debug)]
enum OpenMap {
    Void,
    Bits(DiskFile),
}

impl MapFiles {
    /// Finds the maps in a replica's folder and reads them. One that cannot be read is left out: no map means
    /// everything (R21).
    pub fn open(
        disk: &Disk,
        dir: &Path,
        replica: ReplicaId,
        block_count: u64,
    ) -> io::Result<(Self, BTreeMap<ReplicaId, DirtyMap>)> {
        let mut files =
            Self { disk: disk.clone(), dir: dir.to_owned(), replica, block_count, open: BTreeMap::new() };
        let mut maps = BTreeMap::new();
        for name in disk.list(dir)? {
            let Some(rest) = name.strip_prefix(PREFIX) else { continue };
            if rest.ends_with(NEW_SUFFIX) {
                disk.remove_file(&dir.join(&name))?;
            } else if let Ok(absent) = rest.parse::<ReplicaId>() {
                match files.read(absent) {
                    Ok((map, open)) => {
                        files.open.insert(absent, open);
                        maps.insert(absent, map);
                    }
                    Err(error) => {
                        tracing::error!(%replica, %absent, %error, "a dirty map cannot be read: everything is dirty");
                    }
                }
            }
        }
        Ok((files, maps))
    }

    /// Makes a map durable in place of any other for the same replica.
    ///
    /// 1. Write the whole map to a new file and sync it: a crash leaves the old map and a file that opening removes.
    /// 2. Rename it over the old one and sync the folder: a crash leaves the old or the new map.
    ///
    /// Where there is no room for its bits the map becomes void, which is always true.
    pub fn put(&mut self, absent: ReplicaId, map: &DirtyMap) -> io::Result<()> {
        let path = self.path(absent);
        let new = self.dir.join(format!("{PREFIX}{absent}{NEW_SUFFIX}"));
        self.disk.remove_file(&new)?;
        let written = match &map.dirty {
            Dirty::Void => self.write_new(&new, absent, map.base, None),
            Dirty::Blocks(set) => match self.write_new(&new, absent, map.base, Some(set)) {
                Err(error) if is_full(&error) => {
                    tracing::error!(replica = %self.replica, %absent, "no room for a dirty map: everything is dirty");
                    self.disk.remove_file(&new)?;
                    self.write_new(&new, absent, map.base, None)
                }
                other => other,
            },
        };
        let open = written?;
        self.disk.rename(&new, &path)?;
        self.disk.sync_dir(&self.dir)?;
        self.open.insert(absent, open);
        Ok(())
    }

    /// Makes every map long enough for a volume that grows, durably; no block of the new part is dirty (R31). One for which
    /// there is no room becomes void. A crash leaves maps that are longer than needed.
    pub fn grow(&mut self, block_count: u64) -> io::Result<()> {
        let len = page_offset(page_count(block_count));
        let absents: Vec<ReplicaId> = self.open.keys().copied().collect();
        for absent in absents {
            let Some(OpenMap::Bits(file)) = self.open.get(&absent) else { continue };
            let grown =
                file.set_len(len).and_then(|()| file.reserve_now(0, len)).and_then(|()| file.sync_now());
            match grown {
                Err(error) if is_full(&error) => {
                    tracing::error!(replica = %self.replica, %absent, "no room for a dirty map: everything is dirty");
                    let base = self.read(absent)?.0.base;
                    self.put(absent, &DirtyMap { base, dirty: Dirty::Void })?;
                }
                other => other?,
            }
        }
        self.block_count = block_count;
        Ok(())
    }

    /// Sets regions' bits to exactly these; durable when this returns. In a void map nothing is to be done. False if
    /// there is no such map.
    ///
    /// A crash in between leaves some sectors old: the regions are still logged then, and the log counts as dirty
    /// (R22, R23).
    pub fn update(&self, absent: ReplicaId, regions: &[(Region, RegionBits)]) -> io::Result<bool> {
        let file = match self.open.get(&absent) {
            None => return Ok(false),
            Some(OpenMap::Void) => return Ok(true),
            Some(OpenMap::Bits(file)) => file,
        };
        let mut by_page: BTreeMap<u64, BTreeMap<Region, RegionBits>> = BTreeMap::new();
        for (region, bits) in regions {
            by_page.entry(u64::from(region.0) / REGIONS_PER_PAGE).or_default().insert(*region, *bits);
        }
        for (index, changed) in &by_page {
            let mut set = BlockSet::new();
            let old = file.read_now(page_offset(*index), PAGE_BYTES)?;
            collect_blocks(owner(self.replica, absent), *index, &old, self.block_count, &mut set);
            for (region, bits) in changed {
                set.set_region_bits(*region, *bits);
            }
            file.write_now(page_offset(*index), &self.encode(absent, *index, &set))?;
        }
        if !by_page.is_empty() {
            file.sync_now()?;
        }
        Ok(true)
    }

    /// Forgets a map, durably.
    pub fn drop_map(&mut self, absent: ReplicaId) -> io::Result<()> {
        self.open.remove(&absent);
        let path = self.path(absent);
        if self.disk.exists(&path)? {
            self.disk.remove_file(&path)?;
            self.disk.sync_dir(&self.dir)?;
        }
        Ok(())
    }

    fn path(&self, absent: ReplicaId) -> PathBuf {
        self.dir.join(format!("{PREFIX}{absent}"))
    }

    fn write_new(
        &self,
        path: &Path,
        absent: ReplicaId,
        base: Epoch,
        set: Option<&BlockSet>,
    ) -> io::Result<OpenMap> {
        let file = self.disk.open(path, OpenMode::New)?;
        let mut head = AlignedBuf::zeroed(PAGE_BYTES);
        let payload = self.header_payload(absent, base, set.is_none(), self.block_count);
        seal(MAGIC, VERSION, &payload, &mut head);
        if let Some(set) = set {
            let len = page_offset(page_count(self.block_count));
            file.set_len(len)?;
            file.reserve_now(0, len)?;
            let pages: BTreeSet<u64> =
                set.regions().map(|(region, _)| u64::from(region.0) / REGIONS_PER_PAGE).collect();
            for index in pages {
                file.write_now(page_offset(index), &self.encode(absent, index, set))?;
            }
        }
        file.write_now(0, &head)?;
        file.sync_now()?;
        Ok(if set.is_some() { OpenMap::Bits(file) } else { OpenMap::Void })
    }

    fn read(&self, absent: ReplicaId) -> io::Result<(DirtyMap, OpenMap)> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let file = self.disk.open(&self.path(absent), OpenMode::Existing)?;
        let head = file.read_now(0, PAGE_BYTES)?;
        let payload = unseal(MAGIC, VERSION, &head).map_err(|bad| invalid(&format!("{bad:?}")))?;
        if payload.len() != 64 {
            return Err(invalid("its header has another length"));
        }
        let base = Epoch { number: u64_at(payload, 32), nonce: u64_at(payload, 40) };
        let is_void = payload[48] != 0;
        // The volume may have grown since the map was made.
        let made_for = u64_at(payload, 56);
        if made_for > self.block_count || payload != self.header_payload(absent, base, is_void, made_for) {
            return Err(invalid("it belongs to another replica"));
        }
        if is_void {
            return Ok((DirtyMap { base, dirty: Dirty::Void }, OpenMap::Void));
        }
        let mut set = BlockSet::new();
        for index in 0..page_count(self.block_count) {
            let page = file.read_now(page_offset(index), PAGE_BYTES)?;
            collect_blocks(owner(self.replica, absent), index, &page, self.block_count, &mut set);
        }
        Ok((DirtyMap { base, dirty: Dirty::Blocks(set) }, OpenMap::Bits(file)))
    }

    fn encode(&self, absent: ReplicaId, page_index: u64, set: &BlockSet) -> AlignedBuf {
        let mut page = AlignedBuf::new(PAGE_BYTES);
        encode_page(owner(self.replica, absent), page_index, &mut page, |first, bytes| {
            let first_region = first / BLOCKS_PER_REGION;
            for (at, place) in (first_region..).zip(bytes.chunks_mut(REGION_BYTES_OF_BITS)) {
                let bits =
                    u32::try_from(at).map(|number| set.region_bits(Region(number))).unwrap_or_default();
                for (word, bytes_of_word) in bits.iter().zip(place.chunks_mut(8)) {
                    bytes_of_word.copy_from_slice(&word.to_le_bytes());
                }
            }
        });
        page
    }

    fn header_payload(&self, absent: ReplicaId, base: Epoch, void: bool, block_count: u64) -> Vec<u8> {
        let mut payload = Vec::with_capacity(64);
        payload.extend(self.replica.0.to_le_bytes());
        payload.extend(absent.0.to_le_bytes());
        payload.extend(base.number.to_le_bytes());
        payload.extend(base.nonce.to_le_bytes());
        payload.extend(u32::from(void).to_le_bytes());
        payload.extend([0; 4]);
        payload.extend(block_count.to_le_bytes());
        payload
    }
}

fn collect_blocks(owner: u128, index: u64, page: &[u8], block_count: u64, set: &mut BlockSet) {
    let region_count = block_count / BLOCKS_PER_REGION;
    for sector in decode_page(owner, index, page) {
        match sector {
            Sector::Blank { .. } => {}
            Sector::Bits { first, bits } => {
                for (number, bytes) in (first / BLOCKS_PER_REGION..).zip(bits.chunks(REGION_BYTES_OF_BITS)) {
                    let mut words = RegionBits::default();
                    for (word, bytes_of_word) in words.iter_mut().zip(bytes.chunks(8)) {
                        *word = u64_at(bytes_of_word, 0);
                    }
                    if let Ok(number) = u32::try_from(number)
                        && u64::from(number) < region_count
                    {
                        set.set_region_bits(Region(number), words);
                    }
                }
            }
            Sector::Damaged { first } => {
                tracing::error!(first_block = first, "a damaged sector of a dirty map counts as dirty");
                let regions = first / BLOCKS_PER_REGION..(first + BITS_PER_SECTOR) / BLOCKS_PER_REGION;
                for number in regions.filter(|number| *number < region_count) {
                    if let Ok(number) = u32::try_from(number) {
                        set.insert_region(Region(number));
                    }
                }
            }
        }
    }
}

/// Ties a sector to the replica that keeps the map and to the one it is kept for.
fn owner(replica: ReplicaId, absent: ReplicaId) -> u128 {
    replica.0 ^ absent.0.rotate_left(64)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ENOSPC | nix::libc::EDQUOT))
}

fn page_offset(index: u64) -> u64 {
    (index + 1) * PAGE_BYTES as u64
}
