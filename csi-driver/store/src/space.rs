//! How full a pool is.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::Disk;

/// Counts what replicas fill. What the file system itself says is authoritative and replaces the count now and then
/// ([`PoolSpace::recount`]); between two such times every reservation adds to it.
#[derive(Debug)]
pub struct PoolSpace {
    disk: Disk,
    replicas_dir: PathBuf,
    capacity_bytes: u64,
    reserve_bytes: u64,
    used_bytes: AtomicU64,
}

impl PoolSpace {
    /// Of a pool whose use is not counted yet.
    pub fn new(disk: Disk, replicas_dir: PathBuf, capacity_bytes: u64, reserve_bytes: u64) -> Self {
        Self { disk, replicas_dir, capacity_bytes, reserve_bytes, used_bytes: AtomicU64::new(0) }
    }

    /// Bytes that replicas may fill.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Bytes that they fill, as counted.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Asks the file system what every replica fills.
    pub fn recount(&self) -> std::io::Result<()> {
        let mut used = 0;
        for name in self.disk.list(&self.replicas_dir)? {
            match self.disk.used_bytes(&self.replicas_dir.join(name)) {
                Ok(bytes) => used += bytes,
                // Deleted between the two calls.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        self.used_bytes.store(used, Ordering::Relaxed);
        Ok(())
    }

    /// Bytes that may still be filled.
    pub fn available_bytes(&self) -> std::io::Result<u64> {
        let free = self.disk.free_bytes(&self.replicas_dir)?.saturating_sub(self.reserve_bytes);
        Ok(self.capacity_bytes.saturating_sub(self.used_bytes()).min(free))
    }

    /// Counts `bytes` in, unless there is no room for them.
    pub fn charge(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|total| *total <= self.capacity_bytes);
        let charged = self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        let free = self.disk.free_bytes(&self.replicas_dir).unwrap_or(0);
        if charged && free < self.reserve_bytes.saturating_add(bytes) {
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
