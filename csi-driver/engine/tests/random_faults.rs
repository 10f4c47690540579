//! A seeded mix of writes, flushes, kills, restarts, cuts and moves on real sockets and disks. Per block the test keeps
//! every value that may be there: the last acknowledged one and those whose write ended in an error or was in flight.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Cluster, MIB, flush, pattern, read, write};
use holdfast_io::BlockDevice;
use holdfast_storage_core::ids::VolumeId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: u64 = 32 * MIB;
const BLOCKS: u64 = 512;
const ROUNDS: usize = 10;

/// Values a block may hold, the latest last; reading one of them rules the others out.
#[derive(Default)]
struct Ledger {
    allowed: BTreeMap<u64, Vec<u64>>,
    version: u64,
}

impl Ledger {
    async fn write(&mut self, device: &Arc<dyn BlockDevice>, block: u64) -> bool {
        self.version += 1;
        let version = self.version;
        let done = write(device, block * 4096, pattern(block, version, 4096)).await;
        let allowed = self.allowed.entry(block).or_insert_with(|| vec![0]);
        if done.is_ok() {
            allowed.clear();
        }
        allowed.push(version);
        done.is_ok()
    }

    async fn check(&mut self, device: &Arc<dyn BlockDevice>, when: &str) {
        for (block, allowed) in &mut self.allowed {
            let found = read(device, block * 4096, 4096).await.unwrap();
            let version = u64::from_le_bytes(found[8..16].try_into().unwrap());
            let expected = if version == 0 { vec![0; 4096] } else { pattern(*block, version, 4096) };
            assert_eq!(found, expected, "{when}: block {block} holds no whole version");
            assert!(
                allowed.contains(&version),
                "{when}: block {block} holds {version}, allowed are {allowed:?}"
            );
            // P3: what was read stays.
            *allowed = vec![version];
        }
    }
}

struct Run {
    cluster: Cluster,
    volume: VolumeId,
    ledger: Ledger,
    random: StdRng,
    at: usize,
}

impl Run {
    /// Writes until a fault is over; I/O may wait, but must end.
    async fn work(&mut self, device: &Arc<dyn BlockDevice>, writes: usize) {
        for _ in 0..writes {
            let block = self.random.random_range(0..BLOCKS);
            self.ledger.write(device, block).await;
        }
        if self.random.random_bool(0.5) {
            let _ = flush(device).await;
        }
    }

    async fn round(&mut self, number: usize, device: &mut Arc<dyn BlockDevice>) {
        let other = (self.at + self.random.random_range(1..3)) % 3;
        let fault = self.random.random_range(0..4);
        eprintln!("round {number}: fault {fault}, target on {}, other {other}", self.at);
        match fault {
            0 => {
                self.cluster.kill(other);
                self.work(device, 60).await;
                self.cluster.start_node(other).await;
            }
            1 => {
                self.cluster.nodes[self.at].view.deny(self.cluster.process(other));
                self.work(device, 60).await;
                self.cluster.nodes[self.at].view.allow();
            }
            2 => {
                // The writer dies and the volume moves.
                self.cluster.kill(self.at);
                *device = self.cluster.attach(self.volume, other).await;
                self.cluster.start_node(self.at).await;
                self.at = other;
            }
            _ => {
                // The writer lives on and the volume moves.
                let old = device.clone();
                *device = self.cluster.attach(self.volume, other).await;
                assert!(write(&old, 0, vec![9; 4096]).await.is_err(), "the old target wrote");
                let _ = self.cluster.process(self.at).detach(self.volume).await;
                self.at = other;
            }
        }
        self.ledger.check(device, &format!("round {number}")).await;
        self.work(device, 60).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_outlive_random_faults() {
    let seed =
        std::env::var("HOLDFAST_SEED").map_or_else(|_| rand::rng().random(), |text| text.parse().unwrap());
    eprintln!("HOLDFAST_SEED={seed} cargo test -p holdfast-engine --test random_faults");
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let mut device = cluster.attach(volume, 0).await;
    let random = StdRng::seed_from_u64(seed);
    let mut run = Run { cluster, volume, ledger: Ledger::default(), random, at: 0 };
    let start = Instant::now();
    for number in 0..ROUNDS {
        run.round(number, &mut device).await;
        run.cluster.wait_members(volume, 3, Duration::from_secs(30)).await;
    }
    run.ledger.check(&device, "the end").await;
    eprintln!("{ROUNDS} rounds in {:?}", start.elapsed());
    run.cluster.assert_members_equal(volume).await;
}
