//! Returning and new replicas, corrupt blocks: what is copied, on real sockets and disks.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Cluster, MIB, flush, pattern, read, write};
use holdfast_io::BlockDevice;
use holdfast_proto::storage as pb;
use holdfast_storage_core::ids::{ReplicaId, VolumeId};
use holdfast_storage_core::target::{ReplicaStatus, TargetStatus};
use holdfast_storage_core::timers;
use holdfast_storage_core::transitions;
use rand::Rng;

/// A hang, also on a machine that does much else; no promise.
const WITHIN: Duration = Duration::from_secs(120);

fn status(cluster: &Cluster, at: usize, volume: VolumeId) -> TargetStatus {
    cluster.process(at).status(volume).unwrap()
}

fn resync(cluster: &Cluster, at: usize, volume: VolumeId, of: usize) -> ReplicaStatus {
    let replica = cluster.replica_on(volume, of);
    status(cluster, at, volume).replicas.into_iter().find(|r| r.replica == replica).unwrap()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < WITHIN, "{what}: not within {WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Flushes, and waits until what was written is in no intent log: it would be copied again.
async fn log_is_empty(cluster: &Cluster, at: usize, volume: VolumeId, device: &Arc<dyn BlockDevice>) {
    flush(device).await.unwrap();
    until("the log is empty", || status(cluster, at, volume).logged_regions == 0).await;
}

async fn fill(device: &Arc<dyn BlockDevice>, from_mib: u64, to_mib: u64, version: u64) {
    for index in from_mib..to_mib {
        write(device, index * MIB, pattern(index * MIB, version, MIB as usize)).await.unwrap();
    }
}

/// 16 bytes of a block's data on a node's disk are overwritten behind the process's back.
fn rot(cluster: &Cluster, volume: VolumeId, node: usize, block: u64) {
    let replica = cluster.replica_on(volume, node).to_string();
    let replicas = cluster.dir.path().join(&cluster.nodes[node].name.0).join("pool/replicas");
    let path = replicas.join(replica).join("layer-000000");
    let file = std::fs::File::options().write(true).open(path).unwrap();
    // docs/on-disk-format.md: the data of the first group begins after 4 MiB.
    file.write_all_at(&[0xa5; 16], 4 * MIB + block * 4096 + 100).unwrap();
    file.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resync_after_a_targets_kill_copies_at_most_a_hundredth_of_100_gib() {
    resync_after_a_targets_kill(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resync_after_a_targets_kill_copies_at_most_a_hundredth_of_100_gib_also_when_the_writer_moves() {
    resync_after_a_targets_kill(1).await;
}

/// The writer on node 0 is killed with as many regions in its log as it holds without clearing any, and goes on at `next`.
/// What each other node is sent is counted on the wire: the source is the replica beside the target.
async fn resync_after_a_targets_kill(next: usize) {
    let mut cluster = Cluster::start(3).await;
    for index in 0..3 {
        cluster.kill(index);
        cluster.nodes[index].pool_capacity_bytes = 256 << 30;
        cluster.start_node(index).await;
    }
    let size = 100 << 30;
    let volume = cluster.create_volume(size).await;
    let device = cluster.attach(volume, 0).await;
    let full = timers::INTENT_LOG_REGIONS_MAX * timers::INTENT_LOG_PRESSURE_PERCENT / 100;
    // On a busy machine the first are cold before the last are answered: then all are written again.
    for version in 1..10 {
        write_to_regions(&device, full as u64, size, version).await;
        if status(&cluster, 0, volume).logged_regions >= full * 9 / 10 {
            break;
        }
    }
    let logged = status(&cluster, 0, volume).logged_regions;
    assert!(logged >= full * 9 / 10, "only {logged} regions are logged");
    cluster.kill(0);
    drop(device);
    cluster.start_node(0).await;
    let others: Vec<_> = (0..3).filter(|n| *n != next).map(|n| cluster.process(n).nbd_address()).collect();
    let sent = |cluster: &Cluster| -> Vec<u64> {
        others.iter().map(|address| cluster.nodes[next].view.sent_to(*address)).collect()
    };
    let before = sent(&cluster);
    let device = cluster.attach(volume, next).await;
    cluster.wait_members(volume, 3, WITHIN).await;
    until("reconciled", || status(&cluster, next, volume).unreconciled_regions == 0).await;
    for (sent, before) in sent(&cluster).into_iter().zip(before) {
        println!("{logged} regions logged; {} KiB sent to a replica", (sent - before) >> 10);
        assert!(sent > before && sent - before <= size / 100, "{} bytes", sent - before);
    }
    write(&device, 0, pattern(0, 2, 4096)).await.unwrap();
}

/// One block in each of so many regions, all over the volume, all at once.
async fn write_to_regions(device: &Arc<dyn BlockDevice>, regions: u64, size: u64, version: u64) {
    let writes: Vec<_> = (0..regions)
        .map(|index| {
            let device = Arc::clone(device);
            let offset = index * (size / regions / MIB) * MIB;
            tokio::spawn(async move { write(&device, offset, pattern(offset, version, 4096)).await })
        })
        .collect();
    for written in writes {
        written.await.unwrap().unwrap();
    }
}

/// Counted on the wire: what a target says that it copied ends with the target, and goes on between a look and a kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_resync_goes_on_and_copies_at_most_a_tenth_more_than_was_missed() {
    const MISSED: u64 = 384 * MIB;
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(448 * MIB).await;
    let device = cluster.attach(volume, 0).await;
    fill(&device, 0, 4, 1).await;
    log_is_empty(&cluster, 0, volume, &device).await;
    let address = cluster.process(2).nbd_address();
    cluster.kill(2);
    fill(&device, 4, 4 + MISSED / MIB, 2).await;
    cluster.wait_members(volume, 2, WITHIN).await;
    log_is_empty(&cluster, 0, volume, &device).await;
    let sent =
        |cluster: &Cluster| -> u64 { cluster.nodes.iter().map(|node| node.view.sent_to(address)).sum() };
    let before = sent(&cluster);

    // The returning replica is killed on the way.
    cluster.start_node(2).await;
    until("a third", || resync(&cluster, 0, volume, 2).resync_bytes_done > MISSED / 3).await;
    cluster.kill(2);
    cluster.start_node(2).await;
    until("the next try has less to do", || {
        (1..MISSED).contains(&resync(&cluster, 0, volume, 2).resync_bytes_total)
    })
    .await;
    // So is the target, with the member on its node.
    until("two thirds", || resync(&cluster, 0, volume, 2).resync_bytes_copied > MISSED * 2 / 3).await;
    cluster.kill(0);
    drop(device);
    let device = cluster.attach(volume, 1).await;
    let back = cluster.replica_on(volume, 2);
    until("back", || cluster.store.get(volume).record.in_sync.contains(&back)).await;
    let last = resync(&cluster, 1, volume, 2);
    let copied = sent(&cluster) - before;
    println!("{} MiB missed, {} KiB sent after two kills", MISSED >> 20, copied >> 10);
    assert!(last.resync_bytes_done < MISSED * 2 / 3, "the last try began anew: {last:?}");
    assert!(copied >= MISSED, "{copied} bytes");
    assert!(copied <= MISSED * 11 / 10, "{copied} bytes");

    cluster.start_node(0).await;
    cluster.wait_members(volume, 3, WITHIN).await;
    assert_eq!(
        read(&device, 100 * MIB, MIB as u32).await.unwrap(),
        pattern(100 * MIB, 2, MIB as usize),
        "what was missed is there"
    );
    cluster.assert_members_equal(volume).await;
}

/// longhorn#1940: every reboot was a full rebuild.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_away_and_missed_nothing_gets_next_to_nothing() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(128 * MIB).await;
    let device = cluster.attach(volume, 0).await;
    fill(&device, 0, 100, 1).await;
    log_is_empty(&cluster, 0, volume, &device).await;
    cluster.kill(2);
    cluster.wait_members(volume, 2, WITHIN).await;
    cluster.start_node(2).await;
    cluster.wait_members(volume, 3, WITHIN).await;
    let copied = resync(&cluster, 0, volume, 2).resync_bytes_copied;
    assert!(copied <= 2 * MIB, "{copied} bytes");
    cluster.assert_members_equal(volume).await;
}

/// longhorn#9051, #2054: a rebuild that never ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_replica_gets_the_data_and_not_the_holes_while_the_client_writes_on() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(1024 * MIB).await;
    let device = cluster.attach(volume, 0).await;
    fill(&device, 10, 40, 1).await;
    fill(&device, 900, 910, 1).await;
    flush(&device).await.unwrap();

    // Node 2 comes back with an empty disk: its replica is replaced under a new id.
    let old = cluster.replica_on(volume, 2);
    cluster.kill(2);
    cluster.wait_members(volume, 2, WITHIN).await;
    std::fs::remove_dir_all(cluster.dir.path().join(&cluster.nodes[2].name.0).join("pool")).unwrap();
    cluster.start_node(2).await;
    let new = ReplicaId(rand::rng().random());
    let node = cluster.nodes[2].name.clone();
    cluster.store.update(volume, |record| {
        let faulted = transitions::fault_replica(record, old).unwrap();
        let added = transitions::add_replica(&faulted, new, &node).unwrap();
        *record = transitions::forget_replica(&added, old).unwrap();
    });
    let record = cluster.store.get(volume).record;
    let request = pb::CreateReplicaRequest {
        volume_id: volume.to_string(),
        replica_id: new.to_string(),
        lineage: record.lineage.to_string(),
        size_bytes: record.size_bytes,
        epoch: Some(pb::Epoch::default()),
        ..pb::CreateReplicaRequest::default()
    };
    cluster.pool_client(2).await.create_replica(request).await.unwrap();

    let mut version = 2;
    while cluster.store.get(volume).record.in_sync.len() < 3 {
        for index in 0..16 {
            let offset = (10 + index * 2) * MIB + version % 64 * 4096;
            write(&device, offset, pattern(offset, version, 4096)).await.unwrap();
        }
        version += 1;
        assert!(version < 100_000, "the rebuild does not end");
    }
    let status = resync(&cluster, 0, volume, 2);
    assert!(status.resync_bytes_copied >= 40 * MIB, "{status:?}");
    assert!(status.resync_bytes_copied <= 44 * MIB, "holes were copied: {status:?}");
    cluster.assert_members_equal(volume).await;
}

/// mayastor#1714: one of three nodes down, and many volumes were faulted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_of_three_down_leaves_every_volume_writable() {
    let mut cluster = Cluster::start(3).await;
    let mut volumes = Vec::new();
    for _ in 0..4 {
        let volume = cluster.create_volume(16 * MIB).await;
        volumes.push((volume, cluster.attach(volume, 0).await));
    }
    cluster.kill(2);
    for (_, device) in &volumes {
        write(device, 0, pattern(0, 1, 4096)).await.unwrap();
        flush(device).await.unwrap();
    }
    cluster.start_node(2).await;
    for (volume, device) in &volumes {
        cluster.wait_members(*volume, 3, WITHIN).await;
        assert_eq!(read(device, 0, 4096).await.unwrap(), pattern(0, 1, 4096));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r33_a_corrupt_block_is_read_from_another_replica_repaired_and_counted() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(64 * MIB).await;
    let device = cluster.attach(volume, 0).await;
    fill(&device, 0, 3, 1).await;
    log_is_empty(&cluster, 0, volume, &device).await;
    rot(&cluster, volume, 0, 300);
    rot(&cluster, volume, 0, 301);
    assert_eq!(read(&device, MIB, MIB as u32).await.unwrap(), pattern(MIB, 1, MIB as usize));
    until("repaired", || status(&cluster, 0, volume).corruption.repaired == 2).await;
    let counts = status(&cluster, 0, volume).corruption;
    assert_eq!((counts.found, counts.unrepairable, counts.differing), (2, 0, 0));
    // From the mended replica now: no further failure is counted.
    assert_eq!(read(&device, MIB, MIB as u32).await.unwrap(), pattern(MIB, 1, MIB as usize));
    assert_eq!(status(&cluster, 0, volume).corruption.found, 2);
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r33_the_scrub_finds_and_repairs_what_nobody_reads_and_reports_what_is_good_nowhere() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(16 * MIB).await;
    let device = cluster.attach(volume, 0).await;
    fill(&device, 0, 3, 1).await;
    log_is_empty(&cluster, 0, volume, &device).await;
    rot(&cluster, volume, 1, 5);
    rot(&cluster, volume, 2, 600);
    for node in 0..3 {
        rot(&cluster, volume, node, 260);
    }
    cluster.process(0).scrub(volume);
    until("scrubbed", || status(&cluster, 0, volume).scrub.passes == 1).await;
    until("repaired", || status(&cluster, 0, volume).corruption.repaired == 2).await;
    let after = status(&cluster, 0, volume);
    assert_eq!(after.scrub.regions_done, 16);
    assert_eq!((after.corruption.found, after.corruption.unrepairable), (5, 1));
    assert!(read(&device, 260 * 4096, 4096).await.is_err(), "an error, never something older");
    // Written again it is good again.
    write(&device, 260 * 4096, pattern(0, 9, 4096)).await.unwrap();
    cluster.assert_members_equal(volume).await;
}
