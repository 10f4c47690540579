//! How far the blocks of a layer were moved into the one beneath: a page that is written twice in one file, in place.
//!
//! Payload: number of the layer 4, reserved 4, first block that was not moved 8. The higher one of the whole pages counts.
//! The file belongs to the upper layer: should the one beneath be moved down itself, the blocks go with it.

use std::io;
use std::path::{Path, PathBuf};

use holdfast_io::{AlignedBuf, OpenMode};

use crate::disk::Disk;
use crate::error::PoolError;
use crate::layout::PAGE_BYTES;
use crate::manifest::bad_page;
use crate::sealed::{BadPage, seal, u32_at, u64_at, unseal};

const MAGIC: &[u8; 8] = b"HFMERGEC";
const VERSION: u32 = 1;
const COPIES: usize = 2;

/// The cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeCursor {
    /// The layer whose blocks are moved.
    pub layer: u32,
    /// Blocks below it are in the layer beneath, durably.
    pub moved_below: u64,
}

/// The file of a layer's cursor.
pub fn cursor_path(dir: &Path, layer: u32) -> PathBuf {
    dir.join(format!("merge-{layer:06}"))
}

impl MergeCursor {
    /// Makes it durable. A crash leaves the old one, if there was one, or this one.
    pub fn write(&self, disk: &Disk, dir: &Path) -> io::Result<()> {
        let path = cursor_path(dir, self.layer);
        let payload = self.payload();
        let mut pages = AlignedBuf::zeroed(COPIES * PAGE_BYTES);
        for page in pages.chunks_mut(PAGE_BYTES) {
            seal(MAGIC, VERSION, &payload, page);
        }
        if disk.exists(&path)? {
            return disk.open(&path, OpenMode::Existing)?.write_durable_now(0, &pages);
        }
        let file = disk.open(&path, OpenMode::New)?;
        file.write_now(0, &pages)?;
        file.sync_now()?;
        disk.sync_dir(dir)
    }

    /// Reads it; none if there is none or it was never durable.
    pub fn read(disk: &Disk, dir: &Path, layer: u32) -> Result<Option<Self>, PoolError> {
        let path = cursor_path(dir, layer);
        let io = || PoolError::io("reading", &path);
        if !disk.exists(&path).map_err(io())? {
            return Ok(None);
        }
        let file = disk.open(&path, OpenMode::Existing).map_err(io())?;
        let mut newest: Option<Self> = None;
        for copy in 0..COPIES as u64 {
            let offset = copy * PAGE_BYTES as u64;
            if offset + PAGE_BYTES as u64 > file.len_bytes().map_err(io())? {
                break;
            }
            let page = file.read_now(offset, PAGE_BYTES).map_err(io())?;
            match unseal(MAGIC, VERSION, &page) {
                Ok(payload) if payload.len() == 16 => {
                    let found = Self { layer: u32_at(payload, 0), moved_below: u64_at(payload, 8) };
                    // The other copy may be of the checkpoint before.
                    if found.layer == layer
                        && newest.is_none_or(|newest| newest.moved_below < found.moved_below)
                    {
                        newest = Some(found);
                    }
                }
                Ok(_) | Err(BadPage::Damaged(_)) => {}
                Err(future @ BadPage::Future { .. }) => return Err(bad_page(&path, VERSION, &future)),
            }
        }
        Ok(newest)
    }

    fn payload(self) -> Vec<u8> {
        let mut payload = self.layer.to_le_bytes().to_vec();
        payload.extend([0; 4]);
        payload.extend(self.moved_below.to_le_bytes());
        payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::sim::SimDisk;

    #[test]
    fn a_cursor_survives_a_damaged_copy_and_belongs_to_its_layer() {
        let sim = SimDisk::default();
        let (disk, dir) = (Disk::Sim(sim.clone()), Path::new("/replica"));
        disk.create_dir_all(dir).unwrap();
        for (layer, moved_below) in [(4, 1024), (4, 2048), (5, 77)] {
            MergeCursor { layer, moved_below }.write(&disk, dir).unwrap();
        }
        sim.flip_bit(&cursor_path(dir, 4), 30);
        let found = MergeCursor::read(&disk, dir, 4).unwrap();
        assert_eq!(found, Some(MergeCursor { layer: 4, moved_below: 2048 }));
        sim.flip_bit(&cursor_path(dir, 4), 4096 + 30);
        assert_eq!(MergeCursor::read(&disk, dir, 4).unwrap(), None);
        disk.rename(&cursor_path(dir, 5), &cursor_path(dir, 6)).unwrap();
        assert_eq!(MergeCursor::read(&disk, dir, 6).unwrap(), None);
    }
}
