//! How full a pool is, and the part of it that data may not fill.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::disk::Disk;

/// Part of a pool's capacity that is kept for metadata: tables of new layers, manifests, dirty maps, and the window of a
/// merge. One sixty-fourth holds the tables of 15 pools full of data.
const METADATA_PART: u64 = 64;
/// Even a large pool keeps no more for metadata.
const METADATA_BYTES_MAX: u64 = 4 << 30;

/// How old a count of the files may be where the exact number decides nothing.
const COUNT_AGE_MAX: Duration = Duration::from_secs(2);
/// Looking at every file of every replica takes at most one part in so many of the time.
const COUNT_PART: u32 = 100;

/// What space is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Charge {
    /// Data of a client: leaves the metadata's part alone.
    Data,
    /// Metadata and what a merge moves: may use all.
    Metadata,
}

/// Counts what replicas fill. What the file system itself says is authoritative and replaces the count now and then
/// ([`PoolSpace::recount`]); between two such times every reservation adds to it.
#[derive(Debug)]
pub struct PoolSpace {
    disk: Disk,
    replicas_dir: PathBuf,
    capacity_bytes: u64,
    reserve_bytes: u64,
    used_bytes: AtomicU64,
    /// When the files were counted last, and how long that took.
    counted: Mutex<Option<(Instant, Duration)>>,
}

impl PoolSpace {
    /// Of a pool whose use is not counted yet.
    pub fn new(disk: Disk, replicas_dir: PathBuf, capacity_bytes: u64, reserve_bytes: u64) -> Self {
        let (used_bytes, counted) = (AtomicU64::new(0), Mutex::new(None));
        Self { disk, replicas_dir, capacity_bytes, reserve_bytes, used_bytes, counted }
    }

    /// Bytes that replicas may fill.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Bytes that they fill, as counted.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of the capacity that only metadata may fill.
    pub fn metadata_bytes(&self) -> u64 {
        (self.capacity_bytes / METADATA_PART).min(METADATA_BYTES_MAX)
    }

    /// Asks the file system what every replica fills. A layer that clones share counts once.
    pub fn recount(&self) -> std::io::Result<()> {
        let begun = Instant::now();
        let mut used = 0;
        let mut seen = HashSet::new();
        for name in self.disk.list(&self.replicas_dir)? {
            match self.disk.used(&self.replicas_dir.join(name)) {
                Ok(files) => {
                    let new = files.iter().filter(|file| seen.insert(file.inode));
                    used += new.map(|file| file.bytes).sum::<u64>();
                }
                // Deleted between the two calls.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        self.used_bytes.store(used, Ordering::Relaxed);
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        *counted = Some((Instant::now(), begun.elapsed()));
        Ok(())
    }

    /// Recounts, unless that was done a moment ago; what was taken and given back since is counted anyway.
    pub fn recount_if_old(&self) -> std::io::Result<()> {
        let counted = *self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let is_fresh = |(at, took): (Instant, Duration)| at.elapsed() < COUNT_AGE_MAX.max(took * COUNT_PART);
        if counted.is_some_and(is_fresh) { Ok(()) } else { self.recount() }
    }

    /// Bytes that data may still fill.
    pub fn available_bytes(&self) -> std::io::Result<u64> {
        let free = self.disk.free_bytes(&self.replicas_dir)?.saturating_sub(self.reserve_bytes);
        Ok(self.limit_bytes(Charge::Data).saturating_sub(self.used_bytes()).min(free))
    }

    fn limit_bytes(&self, charge: Charge) -> u64 {
        match charge {
            Charge::Data => self.capacity_bytes - self.metadata_bytes(),
            Charge::Metadata => self.capacity_bytes,
        }
    }

    /// Counts `bytes` in, unless there is no room for them.
    pub fn charge(&self, bytes: u64, charge: Charge) -> bool {
        let limit = self.limit_bytes(charge);
        let fits = |used: u64| used.checked_add(bytes).filter(|total| *total <= limit);
        let charged = self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        let free = self.disk.free_bytes(&self.replicas_dir).unwrap_or(0);
        let left_alone = if charge == Charge::Data { self.reserve_bytes } else { 0 };
        if charged && free < left_alone.saturating_add(bytes) {
            self.give_back(bytes);
            return false;
        }
        charged
    }

    /// Counts `bytes` out.
    pub fn give_back(&self, bytes: u64) {
        let less = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}
