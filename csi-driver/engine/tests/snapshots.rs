//! Snapshots and growth on real sockets and disks: one instant, equal on every holder, whatever dies (R27, R28, R31).
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Cluster, MIB, flush, pattern, read, write};
use holdfast_io::BlockDevice;
use holdfast_nbd::{Client, ClientOptions};
use holdfast_proto::storage as pb;
use holdfast_storage_core::ids::{SnapshotId, VolumeId};
use holdfast_storage_core::record::SnapshotState;
use holdfast_storage_core::transitions;
use rand::Rng;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

const SIZE: u64 = 64 * MIB;
/// The volume is on the first three.
const NODES: usize = 4;
/// A hang, also on a machine that does much else; no promise.
const WITHIN: Duration = Duration::from_secs(120);

struct Setup {
    cluster: Cluster,
    sockets: PathBuf,
    volume: VolumeId,
}

impl Setup {
    async fn start(tls: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sockets = dir.path().join("sockets");
        let cluster = Cluster::start_in(dir, NODES, tls, Some(sockets.clone())).await;
        let volume = cluster.create_volume_on(&[0, 1, 2], SIZE).await;
        Self { cluster, sockets, volume }
    }

    async fn cut(&self, at: usize, snapshot: SnapshotId) -> Result<(), Status> {
        let (volume_id, snapshot_id) = (self.volume.to_string(), snapshot.to_string());
        let request = pb::CreateSnapshotRequest { volume_id, snapshot_id };
        self.cluster.jobs_client(at).await.create_snapshot(request).await.map(drop)
    }

    async fn delete(&self, at: usize, snapshot: SnapshotId) -> Result<(), Status> {
        let (volume_id, snapshot_id) = (self.volume.to_string(), snapshot.to_string());
        let request = pb::DeleteSnapshotRequest { volume_id, snapshot_id };
        self.cluster.jobs_client(at).await.delete_snapshot(request).await.map(drop)
    }

    async fn grow(&self, at: usize, size_bytes: u64) -> Result<(), Status> {
        let request = pb::GrowVolumeRequest { volume_id: self.volume.to_string(), size_bytes };
        self.cluster.jobs_client(at).await.grow_volume(request).await.map(drop)
    }

    /// A replica, or a snapshot of it, as it is on a node's disk.
    async fn look(&self, node: usize, at: Option<SnapshotId>) -> Option<Arc<dyn BlockDevice>> {
        let replica = self.cluster.replica_on(self.volume, node);
        let at = at.map(|snapshot| format!("@{snapshot}")).unwrap_or_default();
        let socket = self.sockets.join(&self.cluster.nodes[node].name.0).join("replicas.sock");
        let stream = UnixStream::connect(&socket).await.unwrap();
        let export = format!("{}/{replica}{at}", self.volume);
        let client = Client::connect(stream, ClientOptions::new(&export)).await.ok()?;
        Some(Arc::new(client))
    }

    async fn bytes_on(&self, node: usize, snapshot: SnapshotId) -> Vec<u8> {
        let device = self.look(node, Some(snapshot)).await;
        let device = device.unwrap_or_else(|| panic!("node {node} lacks snapshot {snapshot}"));
        let mut bytes = Vec::new();
        for offset in (0..device.size_bytes()).step_by(MIB as usize) {
            bytes.extend_from_slice(&read(&device, offset, MIB as u32).await.unwrap());
        }
        bytes
    }

    /// The snapshot's bytes, after a check that these nodes hold the same.
    async fn equal_bytes(&self, snapshot: SnapshotId, nodes: &[usize]) -> Vec<u8> {
        let first = self.bytes_on(nodes[0], snapshot).await;
        for node in &nodes[1..] {
            let bytes = self.bytes_on(*node, snapshot).await;
            let differs = first.iter().zip(&bytes).position(|(a, b)| a != b);
            assert_eq!((differs, first.len()), (None, bytes.len()), "nodes {} and {node}", nodes[0]);
        }
        first
    }

    async fn start_again(&mut self, nodes: &[usize]) {
        for node in nodes {
            self.cluster.start_node(*node).await;
        }
    }

    /// All processes are killed at once.
    async fn kill_all(&mut self) {
        for node in 0..NODES {
            self.cluster.kill(node);
        }
        self.start_again(&[0, 1, 2, 3]).await;
    }

    fn unpublish(&self) {
        self.cluster
            .store
            .update(self.volume, |record| *record = transitions::unpublish(record, None).unwrap());
    }
}

fn snapshot_id() -> SnapshotId {
    SnapshotId(rand::rng().random())
}

/// Writes versions 1, 2, ... to the first block of each of its places, in turn: version n of a place is begun only when the
/// place before has it. A snapshot of one instant shows at most one step between two places.
struct Chain {
    task: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    /// The newest version that is acknowledged at every place.
    whole: Arc<AtomicU64>,
}

const PLACES: [u64; 4] = [0, 17 * MIB + 4096, 33 * MIB, SIZE - 4096];

impl Chain {
    fn start(device: &Arc<dyn BlockDevice>, from: u64) -> Self {
        let (stop, whole) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(from)));
        let (device, stopped, done) = (Arc::clone(device), Arc::clone(&stop), Arc::clone(&whole));
        let task = tokio::spawn(async move {
            for version in from + 1.. {
                for place in PLACES {
                    if stopped.load(Ordering::SeqCst) || write(&device, place, mark(version)).await.is_err() {
                        return;
                    }
                }
                done.store(version, Ordering::SeqCst);
            }
        });
        Self { task, stop, whole }
    }

    fn whole(&self) -> u64 {
        self.whole.load(Ordering::SeqCst)
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.unwrap();
        self.whole.load(Ordering::SeqCst)
    }

    async fn moved_on(&self) {
        let (start, from) = (Instant::now(), self.whole());
        while self.whole() < from + 3 {
            assert!(start.elapsed() < WITHIN, "writes hang");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn mark(version: u64) -> Vec<u8> {
    pattern(version, version, 4096)
}

/// The versions of the chain in a snapshot, after the check that they are of one instant.
fn chain_in(bytes: &[u8]) -> u64 {
    let version = |place: &u64| {
        let at = *place as usize;
        let version = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let whole = if version == 0 { vec![0; 4096] } else { mark(version) };
        assert_eq!(bytes[at..at + 4096], whole, "a torn block");
        version
    };
    let versions: Vec<u64> = PLACES.iter().map(version).collect();
    assert!(versions.is_sorted_by(|a, b| a >= b), "an effect without its cause: {versions:?}");
    assert!(versions[0] - versions[3] <= 1, "not one instant: {versions:?}");
    versions[3]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_under_writes_is_one_instant_on_all_holders_and_outlives_a_kill_of_all() {
    let mut setup = Setup::start(false).await;
    let device = setup.cluster.attach(setup.volume, 0).await;
    let chain = Chain::start(&device, 0);
    let mut kept: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
    for _ in 0..4 {
        chain.moved_on().await;
        let (snapshot, before) = (snapshot_id(), chain.whole());
        setup.cut(0, snapshot).await.unwrap();
        let after = chain.whole();
        setup.cut(0, snapshot).await.expect("a repeated call finds it done");
        chain.moved_on().await;
        let bytes = setup.equal_bytes(snapshot, &[0, 1, 2]).await;
        let found = chain_in(&bytes);
        assert!((before..=after).contains(&found), "{before} <= {found} <= {after}");
        kept.push((snapshot, bytes));
    }
    let record = setup.cluster.store.get(setup.volume).record;
    assert!(record.snapshots.iter().all(|s| s.state == SnapshotState::Committed && s.holders.len() == 3));
    chain.stop().await;
    setup.kill_all().await;
    let device = setup.cluster.attach(setup.volume, 1).await;
    write(&device, 0, mark(1 << 40)).await.unwrap();
    for (snapshot, bytes) in &kept {
        assert!(setup.equal_bytes(*snapshot, &[0, 1, 2]).await == *bytes, "a snapshot never changes");
    }
    // Deleted in an order of its own; the others keep what they hold.
    for index in [1, 0, 2] {
        let (snapshot, _) = kept.remove(index.min(kept.len() - 1));
        setup.delete(1, snapshot).await.unwrap();
        setup.delete(1, snapshot).await.expect("what is gone is gone");
        assert!(setup.look(2, Some(snapshot)).await.is_none(), "a deleted snapshot is not served");
        for (snapshot, bytes) in &kept {
            assert!(setup.equal_bytes(*snapshot, &[0, 1, 2]).await == *bytes);
        }
    }
    assert_eq!(read(&device, 0, 4096).await.unwrap(), mark(1 << 40));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_away_gets_the_snapshots_it_missed_and_little_else() {
    away_during_cuts(false, 0).await;
}

/// The target's node has no replica: the layers are read over a connection of their own, through TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_away_gets_the_snapshots_it_missed_from_another_node() {
    away_during_cuts(true, 3).await;
}

async fn away_during_cuts(tls: bool, target: usize) {
    let mut setup = Setup::start(tls).await;
    let device = setup.cluster.attach(setup.volume, target).await;
    for at in 0..32 {
        write(&device, at * MIB, pattern(at, 1, MIB as usize)).await.unwrap();
    }
    let held = snapshot_id();
    setup.cut(target, held).await.unwrap();
    // What is in its log is copied whatever the layers say.
    flush(&device).await.unwrap();
    let logged = || setup.cluster.process(target).status(setup.volume).unwrap().logged_regions;
    while logged() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    setup.cluster.kill(2);
    setup.cluster.wait_members(setup.volume, 2, WITHIN).await;
    let missed: Vec<SnapshotId> = (0..3).map(|_| snapshot_id()).collect();
    for (index, snapshot) in (0..).zip(&missed) {
        for at in index..index + 2 {
            write(&device, at * MIB, pattern(at, 10 + index, MIB as usize)).await.unwrap();
        }
        setup.cut(target, *snapshot).await.unwrap();
    }
    let chain = Chain::start(&device, 0);
    let address = setup.cluster.config(2).nbd_listen;
    let before = setup.cluster.nodes[target].view.sent_to(address);
    setup.cluster.start_node(2).await;
    setup.cluster.wait_members(setup.volume, 3, WITHIN).await;
    let sent = setup.cluster.nodes[target].view.sent_to(address) - before;
    // Two MiB for each snapshot and what the chain writes; 32 MiB are there.
    println!("{} KiB sent to the replica that was away", sent >> 10);
    assert!(sent < 12 * MIB, "{sent} bytes were sent for 6 MiB that changed");
    chain.moved_on().await;
    chain.stop().await;
    for snapshot in missed.iter().chain([&held]) {
        setup.equal_bytes(*snapshot, &[0, 1, 2]).await;
    }
    let record = setup.cluster.store.get(setup.volume).record;
    assert!(record.snapshots.iter().all(|s| s.holders.len() == 3), "{:?}", record.snapshots);
    setup.cluster.process(target).detach(setup.volume).await.unwrap();
    setup.cluster.assert_members_equal(setup.volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_that_a_death_interrupts_can_be_repeated_and_is_one_instant() {
    let mut setup = Setup::start(false).await;
    let mut version = 0;
    for round in 0..6_u64 {
        let (node, next) = ((round % 3) as usize, ((round + 1) % 3) as usize);
        let device = setup.cluster.attach(setup.volume, node).await;
        let chain = Chain::start(&device, version);
        chain.moved_on().await;
        let (snapshot, before) = (snapshot_id(), chain.whole());
        // The target dies somewhere in the cut, or a member does.
        let victim = if round < 4 { node } else { next };
        let delay = Duration::from_millis(rand::rng().random_range(0..30));
        let first = {
            let cut = setup.cut(node, snapshot);
            tokio::pin!(cut);
            tokio::select! {
                done = &mut cut => done,
                () = tokio::time::sleep(delay) => Err(Status::cancelled("killed")),
            }
        };
        setup.cluster.kill(victim);
        if victim == node {
            let reached = chain.stop().await;
            let device = setup.cluster.attach(setup.volume, next).await;
            setup.start_again(&[victim]).await;
            setup.cut(next, snapshot).await.unwrap();
            setup.cluster.wait_members(setup.volume, 3, WITHIN).await;
            version = reached + 1;
            drop(device);
            setup.cluster.process(next).detach(setup.volume).await.unwrap();
        } else {
            setup.cut(node, snapshot).await.unwrap();
            setup.start_again(&[victim]).await;
            setup.cluster.wait_members(setup.volume, 3, WITHIN).await;
            version = chain.stop().await + 1;
            setup.cluster.process(node).detach(setup.volume).await.unwrap();
        }
        let bytes = setup.equal_bytes(snapshot, &[0, 1, 2]).await;
        let found = chain_in(&bytes);
        println!(
            "round {round}: first try {:?}, {before} before, {found} found",
            first.map_err(|s| s.code())
        );
        assert!(found >= before);
    }
    let record = setup.cluster.store.get(setup.volume).record;
    assert!(record.snapshots.iter().all(|s| s.state == SnapshotState::Committed), "{:?}", record.snapshots);
    assert_eq!(record.snapshots.len(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_grows_under_writes_and_a_replica_that_was_away_grows_first() {
    let mut setup = Setup::start(false).await;
    let device = setup.cluster.attach(setup.volume, 0).await;
    let chain = Chain::start(&device, 0);
    let snapshot = snapshot_id();
    setup.cut(0, snapshot).await.unwrap();
    setup.grow(0, SIZE + 32 * MIB).await.unwrap();
    setup.grow(0, SIZE + 32 * MIB).await.expect("a repeated call finds it done");
    assert_eq!(device.size_bytes(), SIZE + 32 * MIB);
    let refused = setup.grow(0, SIZE).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let refused = setup.grow(0, SIZE + 32 * MIB + 4096).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let end = SIZE + 32 * MIB;
    write(&device, end - 4096, pattern(1, 1, 4096)).await.unwrap();
    assert!(write(&device, end, pattern(1, 1, 4096)).await.is_err());
    setup.cluster.kill(2);
    setup.cluster.wait_members(setup.volume, 2, WITHIN).await;
    setup.grow(0, SIZE + 64 * MIB).await.unwrap();
    write(&device, SIZE + 60 * MIB, pattern(2, 2, 4096)).await.unwrap();
    setup.cluster.start_node(2).await;
    setup.cluster.wait_members(setup.volume, 3, WITHIN).await;
    chain.moved_on().await;
    chain.stop().await;
    assert_eq!(read(&device, SIZE + 60 * MIB, 4096).await.unwrap(), pattern(2, 2, 4096));
    let frozen = setup.equal_bytes(snapshot, &[0, 1, 2]).await;
    assert_eq!(frozen.len() as u64, SIZE, "a snapshot keeps its size");
    setup.cluster.process(0).detach(setup.volume).await.unwrap();
    setup.cluster.assert_members_equal(setup.volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_on_a_detached_volume_takes_a_generation_and_gives_way_to_an_attach() {
    let mut setup = Setup::start(false).await;
    let device = setup.cluster.attach(setup.volume, 0).await;
    write(&device, 0, mark(7)).await.unwrap();
    let elsewhere = setup.cut(1, snapshot_id()).await.unwrap_err();
    assert_eq!(elsewhere.code(), Code::FailedPrecondition);
    assert!(elsewhere.message().contains("node-a"), "{elsewhere}");
    let unknown = pb::CreateSnapshotRequest {
        volume_id: VolumeId(rand::rng().random()).to_string(),
        snapshot_id: snapshot_id().to_string(),
    };
    let unknown = setup.cluster.jobs_client(0).await.create_snapshot(unknown).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    setup.cluster.process(0).detach(setup.volume).await.unwrap();
    setup.unpublish();
    let generation = setup.cluster.store.get(setup.volume).record.generation;
    let snapshot = snapshot_id();
    setup.cut(2, snapshot).await.unwrap();
    assert!(setup.cluster.store.get(setup.volume).record.generation > generation);
    assert!(setup.equal_bytes(snapshot, &[0, 1, 2]).await.starts_with(&mark(7)));
    setup.grow(1, SIZE + MIB).await.unwrap();

    // No member answers: the job waits, and the attach does not wait for it.
    for node in [0, 1] {
        setup.cluster.kill(node);
    }
    let waits = setup.cut(2, snapshot_id());
    tokio::pin!(waits);
    let early = tokio::time::timeout(Duration::from_millis(500), &mut waits).await;
    assert!(early.is_err(), "{early:?}");
    let attachment = setup.cluster.publish(setup.volume, 2);
    let attach = setup.cluster.process(2).attach(setup.volume, attachment);
    let (job, attached) = tokio::join!(&mut waits, tokio::time::timeout(Duration::from_secs(20), attach));
    let overtaken = job.unwrap_err();
    assert_eq!(overtaken.code(), Code::Unavailable, "{overtaken}");
    attached.expect("attached in time").unwrap();
    let device = setup.cluster.process(2).device(setup.volume).unwrap();
    assert_eq!(read(&device, 0, 4096).await.unwrap(), mark(7));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_snapshots_of_a_group_are_of_one_instant() {
    let setup = Setup::start(false).await;
    let device = setup.cluster.attach(setup.volume, 0).await;
    let hold = |snapshot: SnapshotId, hold_ms| {
        let (volume_id, snapshot_id) = (setup.volume.to_string(), snapshot.to_string());
        let request = pb::HoldWritesRequest { volume_id, snapshot_id, hold_ms };
        async { setup.cluster.jobs_client(0).await.hold_writes(request).await }
    };
    let cut = |snapshot: SnapshotId| {
        let (volume_id, snapshot_id) = (setup.volume.to_string(), snapshot.to_string());
        let request = pb::CutHeldRequest { volume_id, snapshot_id };
        async { setup.cluster.jobs_client(0).await.cut_held(request).await }
    };
    let chain = Chain::start(&device, 0);
    chain.moved_on().await;
    let snapshot = snapshot_id();
    hold(snapshot, 3_000).await.unwrap();
    let held = chain.whole();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(chain.whole(), held, "writes are held");
    cut(snapshot).await.unwrap();
    chain.moved_on().await;
    assert_eq!(chain_in(&setup.equal_bytes(snapshot, &[0, 1, 2]).await), held);
    // A hold that ended by itself: its cut does not count, and nothing is left.
    let late = snapshot_id();
    hold(late, 50).await.unwrap();
    chain.moved_on().await;
    assert_eq!(cut(late).await.unwrap_err().code(), Code::FailedPrecondition);
    chain.stop().await;
    let record = setup.cluster.store.get(setup.volume).record;
    assert_eq!(record.snapshots.iter().map(|s| s.id).collect::<Vec<_>>(), [snapshot]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_takes_no_longer_for_more_data() {
    let setup = Setup::start(false).await;
    let device = setup.cluster.attach(setup.volume, 0).await;
    let mut took = Vec::new();
    for until_mib in [1, 60] {
        for at in 0..until_mib {
            write(&device, at * MIB, pattern(at, until_mib, MIB as usize)).await.unwrap();
        }
        flush(&device).await.unwrap();
        let start = Instant::now();
        setup.cut(0, snapshot_id()).await.unwrap();
        took.push(start.elapsed());
    }
    println!("a cut took {took:?}");
    assert!(took[1] < took[0] * 5 + Duration::from_millis(500), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_begins_as_its_snapshot_and_outlives_its_source() {
    let setup = Setup::start(false).await;
    let device = setup.cluster.attach(setup.volume, 0).await;
    for at in 0..8 {
        write(&device, at * MIB, pattern(at, 1, MIB as usize)).await.unwrap();
    }
    let snapshot = snapshot_id();
    setup.cut(0, snapshot).await.unwrap();
    write(&device, MIB, pattern(1, 2, MIB as usize)).await.unwrap();
    let source = Some((setup.volume, snapshot));
    let clone = setup.cluster.create_volume_from(source, &[0, 1, 2], SIZE + 8 * MIB).await;
    let refused = setup.delete(0, snapshot).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let cloned = setup.cluster.attach(clone, 1).await;
    assert_eq!(cloned.size_bytes(), SIZE + 8 * MIB);
    for at in 0..8 {
        assert_eq!(read(&cloned, at * MIB, MIB as u32).await.unwrap(), pattern(at, 1, MIB as usize));
    }
    write(&cloned, 2 * MIB, pattern(2, 3, MIB as usize)).await.unwrap();
    assert_eq!(read(&device, 2 * MIB, MIB as u32).await.unwrap(), pattern(2, 1, MIB as usize));

    // The source goes, on every node; the clone keeps the layers it shares.
    setup.cluster.process(0).detach(setup.volume).await.unwrap();
    for index in 0..3 {
        let request = pb::DeleteReplicaRequest {
            volume_id: setup.volume.to_string(),
            replica_id: setup.cluster.replica_on(setup.volume, index).to_string(),
        };
        setup.cluster.pool_client(index).await.delete_replica(request).await.unwrap();
    }
    for at in 0..8 {
        let version = if at == 2 { 3 } else { 1 };
        assert_eq!(read(&cloned, at * MIB, MIB as u32).await.unwrap(), pattern(at, version, MIB as usize));
    }
    flush(&cloned).await.unwrap();
    setup.cluster.process(1).detach(clone).await.unwrap();
    setup.cluster.assert_members_equal(clone).await;
}
