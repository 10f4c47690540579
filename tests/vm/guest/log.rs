//! The device mapper's `log-writes` target's log: every write of a device in the order in which it may be relied on.
//!
//! Source: the kernel's documentation, device-mapper/log-writes, and its on-disk structures: a superblock in sector 0,
//! then entries of one sector each, followed by their data.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARKED: u64 = 8;
/// Bytes of an entry before a mark's text.
const ENTRY_BYTES: usize = 32;

/// One entry.
#[derive(Debug, Clone)]
pub enum Entry {
    /// Data at a byte offset; with `durable`, all before it and itself are on stable storage.
    Write { offset: u64, data: Vec<u8>, durable: bool },
    /// A range given back.
    Discard { offset: u64, bytes: u64 },
    /// What the harness noted.
    Mark(String),
}

/// Reads the whole log of a device whose target has been removed.
pub fn read(device: &Path) -> Result<Vec<Entry>> {
    let file = File::open(device)?;
    let mut head = [0; ENTRY_BYTES];
    file.read_exact_at(&mut head, 0)?;
    ensure!(u64_at(&head, 0) == MAGIC, "{} holds no log", device.display());
    ensure!(u64_at(&head, 8) == VERSION, "the log has version {}", u64_at(&head, 8));
    let count = u64_at(&head, 16);
    let sector_bytes = u64::from(u32::from_le_bytes(head[24..28].try_into()?));
    ensure!(sector_bytes.is_power_of_two() && sector_bytes >= 512, "sectors of {sector_bytes} bytes");
    let (mut at, mut entries) = (sector_bytes, Vec::new());
    for number in 0..count {
        let mut sector = vec![0; usize::try_from(sector_bytes)?];
        file.read_exact_at(&mut sector, at).with_context(|| format!("entry {number}"))?;
        at += sector_bytes;
        let [offset, bytes] = [0, 8].map(|field| u64_at(&sector, field) * sector_bytes);
        let flags = u64_at(&sector, 16);
        if flags & MARKED != 0 {
            let end = ENTRY_BYTES + usize::try_from(u64_at(&sector, 24))?;
            let text = sector.get(ENTRY_BYTES..end).context("a mark longer than its sector")?;
            entries.push(Entry::Mark(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned()));
        } else if flags & DISCARD != 0 {
            entries.push(Entry::Discard { offset, bytes });
        } else {
            let mut data = vec![0; usize::try_from(bytes)?];
            file.read_exact_at(&mut data, at).with_context(|| format!("data of entry {number}"))?;
            at += bytes;
            entries.push(Entry::Write { offset, data, durable: flags & (FLUSH | FUA) != 0 });
        }
    }
    Ok(entries)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
