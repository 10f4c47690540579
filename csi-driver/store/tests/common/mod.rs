//! A pool with one replica on a real file system.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test ends at the first failure")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_io::AlignedBuf;
use holdfast_storage_core::ids::{Epoch, Lineage, Region, ReplicaId, VolumeId};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_store::{Done, Pool, PoolOptions, Replica, StoreError};

pub const MIB: u64 = 1 << 20;
pub const REPLICA: ReplicaId = ReplicaId(0xabc);

/// A pool with one replica, and a cookie folder in shared memory.
pub struct Fixture {
    pub pool: Pool,
    pub dir: tempfile::TempDir,
    pub cookies: tempfile::TempDir,
}

impl Fixture {
    pub fn new(size_bytes: u64) -> Self {
        Self::with_capacity(size_bytes, 1 << 30)
    }

    pub fn with_capacity(size_bytes: u64, capacity_bytes: u64) -> Self {
        Self::in_dir(&std::env::temp_dir(), size_bytes, capacity_bytes, 0)
    }

    pub fn in_dir(dir: &Path, size_bytes: u64, capacity_bytes: u64, reserve_bytes: u64) -> Self {
        let dir = tempfile::tempdir_in(dir).unwrap();
        let cookies = tempfile::tempdir_in("/dev/shm").unwrap();
        let cookie_dir = Some(cookies.path().to_owned());
        let options = PoolOptions { cookie_dir, reserve_bytes, ..options(capacity_bytes) };
        let pool = Pool::open(dir.path(), options).unwrap();
        pool.create_replica(&meta(REPLICA, size_bytes)).unwrap();
        Self { pool, dir, cookies }
    }

    pub fn open(&self) -> Replica {
        self.pool.open_replica(REPLICA).unwrap()
    }

    pub fn replica_dir(&self) -> PathBuf {
        self.dir.path().join("replicas").join(REPLICA.to_string())
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.replica_dir().join(name)
    }

    pub fn close_pool(self) -> tempfile::TempDir {
        self.dir
    }
}

pub fn options(capacity_bytes: u64) -> PoolOptions {
    PoolOptions { capacity_bytes, reserve_bytes: 0, cookie_dir: None, lock_wait: Duration::from_millis(20) }
}

pub fn meta(replica: ReplicaId, size_bytes: u64) -> ReplicaMeta {
    ReplicaMeta::new(VolumeId(0x123), replica, Lineage(1), size_bytes, Epoch { number: 1, nonce: 2 })
}

pub fn ask<T: Send + 'static>(call: impl FnOnce(Done<T>)) -> Result<T, StoreError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    call(Box::new(move |result| sender.send(result).unwrap()));
    receiver.recv_timeout(Duration::from_secs(30)).expect("an answer within 30 s")
}

pub fn log(replica: &Replica, regions: &[u32]) {
    let regions: Vec<Region> = regions.iter().copied().map(Region).collect();
    ask(|done| replica.log_add(&regions, done)).unwrap();
}

pub fn write(replica: &Replica, offset: u64, data: &[u8]) -> Result<(), StoreError> {
    ask(|done| replica.write(offset, AlignedBuf::copy_of(data).into_bytes(), false, done))
}

pub fn read(replica: &Replica, offset: u64, len: u32) -> Result<Vec<u8>, StoreError> {
    ask(|done| replica.read(offset, len, done)).map(|data| data.to_vec())
}

pub fn close(replica: Replica) {
    ask(|done| replica.close(done)).unwrap();
}

pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 7) as u8 ^ (at as u8).wrapping_mul(31) ^ seed).collect()
}

pub fn flip(path: &Path, byte: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut value = [0];
    file.read_exact_at(&mut value, byte).unwrap();
    file.write_all_at(&[value[0] ^ 4], byte).unwrap();
    file.sync_all().unwrap();
}
