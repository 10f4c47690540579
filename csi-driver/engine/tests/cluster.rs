//! The protocol's promises on real sockets, disks and processes' worth of threads: three data processes on loopback.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{Cluster, MIB, flush, pattern, read, submit, write};
use holdfast_io::BlockOp;

const SIZE: u64 = 64 * MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_is_read_flushed_or_not_aligned_or_not() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    assert_eq!(device.size_bytes(), SIZE);

    for index in 0..20_u64 {
        let offset = index * 3 * MIB;
        write(&device, offset, pattern(offset, 1, 65536)).await.unwrap();
    }
    flush(&device).await.unwrap();
    for index in 0..20_u64 {
        let offset = index * 3 * MIB;
        assert_eq!(read(&device, offset, 65536).await.unwrap(), pattern(offset, 1, 65536), "{index}");
    }
    // An odd range across two blocks, over data and over nothing.
    write(&device, 4090, vec![7; 10]).await.unwrap();
    let mut expected = pattern(0, 1, 65536);
    expected[4090..4100].fill(7);
    assert_eq!(read(&device, 0, 65536).await.unwrap(), expected);
    write(&device, MIB + 100, vec![9; 1]).await.unwrap();
    let around = read(&device, MIB + 99, 3).await.unwrap();
    assert_eq!(&around[..], [0, 9, 0]);
    // Zeroing, of whole and of partial blocks.
    submit(&device, BlockOp::Zero { offset: 5000, len: 10_000, fua: true, trim: false }).await.unwrap();
    expected[5000..15_000].fill(0);
    assert_eq!(read(&device, 0, 65536).await.unwrap(), expected);
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_go_on_without_a_killed_replica_and_it_gets_only_what_it_missed() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    for index in 0..64_u64 {
        write(&device, index * MIB, pattern(index * MIB, 1, 8192)).await.unwrap();
    }
    flush(&device).await.unwrap();
    // Let the intent log run empty, so that only what is missed is left to copy.
    tokio::time::sleep(Duration::from_secs(5)).await;

    cluster.kill(2);
    let mut longest = Duration::ZERO;
    for index in 0..40_u64 {
        let start = Instant::now();
        write(&device, 4 * MIB + index * 4096, pattern(index, 2, 4096)).await.unwrap();
        longest = longest.max(start.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(longest < Duration::from_millis(2_000), "a write waited {longest:?}");
    assert_eq!(cluster.store.get(volume).record.in_sync.len(), 2);

    cluster.start_node(2).await;
    cluster.wait_members(volume, 3, Duration::from_secs(20)).await;
    let status = cluster.process(0).status(volume).unwrap();
    let returned = cluster.replica_on(volume, 2);
    let resync = status.replicas.iter().find(|r| r.replica == returned).unwrap();
    assert!(resync.resync_bytes_done > 0 && resync.resync_bytes_done <= 8 * MIB, "{resync:?}");
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_writer_fences_the_old_one_which_still_runs() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let old = cluster.attach(volume, 0).await;
    for index in 0..32_u64 {
        write(&old, index * 8192, pattern(index, 1, 8192)).await.unwrap();
    }
    flush(&old).await.unwrap();

    let new = cluster.attach(volume, 1).await;
    for index in 0..32_u64 {
        assert_eq!(read(&new, index * 8192, 8192).await.unwrap(), pattern(index, 1, 8192), "{index}");
    }
    write(&new, 0, pattern(0, 2, 8192)).await.unwrap();
    assert!(write(&old, 0, pattern(0, 3, 8192)).await.is_err(), "the old target wrote");
    assert!(read(&old, 0, 8192).await.is_err(), "the old target served a read");
    assert_eq!(read(&new, 0, 8192).await.unwrap(), pattern(0, 2, 8192));
    let status = cluster.process(0).status(volume).unwrap();
    assert_eq!(status.state.word(), "fenced", "{status:?}");
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_target_leaves_nothing_that_the_next_does_not_reconcile() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    for index in 0..32_u64 {
        write(&device, index * MIB, pattern(index, 1, 16384)).await.unwrap();
    }
    flush(&device).await.unwrap();
    // In flight when the process dies: each block may hold the old or the new, but the same on all members.
    for index in 0..32_u64 {
        let op = BlockOp::Write { offset: index * MIB, data: pattern(index, 2, 16384).into(), fua: false };
        device.submit(op, Box::new(|_| ()));
    }
    cluster.kill(0);
    let device = cluster.attach(volume, 1).await;
    for index in 0..32_u64 {
        let found = read(&device, index * MIB, 16384).await.unwrap();
        let (old, new) = (pattern(index, 1, 16384), pattern(index, 2, 16384));
        for block in 0..4 {
            let at = block * 4096..(block + 1) * 4096;
            assert!(found[at.clone()] == old[at.clone()] || found[at.clone()] == new[at], "{index} {block}");
        }
    }
    cluster.start_node(0).await;
    cluster.wait_members(volume, 3, Duration::from_secs(20)).await;
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_swap_answer_stalls_nothing_for_long() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    write(&device, 0, pattern(0, 1, 4096)).await.unwrap();
    cluster.store.lose_next_swap_answer.store(true, std::sync::atomic::Ordering::SeqCst);
    cluster.kill(1);
    write(&device, 0, pattern(0, 2, 4096)).await.unwrap();
    assert_eq!(read(&device, 0, 4096).await.unwrap(), pattern(0, 2, 4096));
    assert_eq!(cluster.store.get(volume).record.in_sync.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn io_waits_while_the_store_is_away_and_goes_on_after() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    write(&device, 0, pattern(0, 1, 4096)).await.unwrap();
    cluster.store.down.store(true, std::sync::atomic::Ordering::SeqCst);
    write(&device, 0, pattern(0, 2, 4096)).await.unwrap();
    cluster.kill(2);
    let waiting = tokio::spawn({
        let device = device.clone();
        async move { write(&device, 0, pattern(0, 3, 4096)).await }
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!waiting.is_finished(), "a write was acknowledged although a member may lack it");
    cluster.store.down.store(false, std::sync::atomic::Ordering::SeqCst);
    waiting.await.unwrap().unwrap();
    assert_eq!(read(&device, 0, 4096).await.unwrap(), pattern(0, 3, 4096));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attach_is_idempotent_and_detach_lets_the_next_in_at_once() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let attachment = cluster.publish(volume, 0);
    let process = cluster.process(0);
    let (first, second) =
        tokio::join!(process.attach(volume, attachment), process.attach(volume, attachment));
    first.unwrap();
    second.unwrap();
    assert_eq!(process.status(volume).unwrap().generation.0, 1, "a duplicate attach started a second target");
    let device = process.device(volume).unwrap();
    write(&device, 0, pattern(0, 1, 4096)).await.unwrap();
    process.detach(volume).await.unwrap();
    process.detach(volume).await.unwrap();
    assert!(write(&device, 0, pattern(0, 2, 4096)).await.is_err(), "a detached device took a write");
    let start = Instant::now();
    let device = cluster.attach(volume, 1).await;
    assert!(start.elapsed() < Duration::from_millis(1_500), "a released volume took {:?}", start.elapsed());
    assert_eq!(read(&device, 0, 4096).await.unwrap(), pattern(0, 1, 4096));
    let wrong = cluster.process(2).attach(volume, attachment).await;
    assert!(wrong.is_err(), "a node that the record does not name attached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_over_mutual_tls_and_a_stranger_is_refused() {
    let cluster = Cluster::start_with(3, true).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    write(&device, 0, pattern(0, 1, MIB as usize)).await.unwrap();
    flush(&device).await.unwrap();
    assert_eq!(read(&device, 0, MIB as u32).await.unwrap(), pattern(0, 1, MIB as usize));
    assert_eq!(cluster.store.get(volume).record.in_sync.len(), 3);

    // A certificate of another authority: neither control nor NBD lets it in.
    let stranger = cluster.dir.path().join("stranger");
    common::Authority::new().issue("node-a", &stranger);
    std::fs::copy(cluster.nodes[1].tls_dir.as_ref().unwrap().join("ca.pem"), stranger.join("ca.pem"))
        .unwrap();
    let tls = holdfast_engine::TlsMaterial::load(&stranger).unwrap();
    let control =
        tonic::transport::Endpoint::from_shared(format!("https://{}", cluster.process(1).control_address()))
            .unwrap()
            .tls_config(tls.tonic_client("node-b"))
            .unwrap();
    let pool = match control.connect().await {
        Ok(channel) => {
            let mut client = holdfast_proto::storage::pool_client::PoolClient::new(channel);
            client.get_pool(holdfast_proto::storage::GetPoolRequest {}).await.map(|_| ()).map_err(|_| ())
        }
        Err(_) => Err(()),
    };
    assert!(pool.is_err(), "a stranger's certificate was accepted for control");
    let stream = tokio::net::TcpStream::connect(cluster.process(1).nbd_address()).await.unwrap();
    let options = holdfast_nbd::ClientOptions {
        export: "x".into(),
        tls: Some(tls.nbd_client("node-b").unwrap()),
        ..holdfast_nbd::ClientOptions::default()
    };
    assert!(holdfast_nbd::Client::connect(stream, options).await.is_err(), "a stranger got NBD");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_the_kill_of_every_process_flushed_or_not() {
    for nodes in [1, 3] {
        let mut cluster = Cluster::start(nodes).await;
        let volume = cluster.create_volume(SIZE).await;
        let device = cluster.attach(volume, 0).await;
        for index in 0..32_u64 {
            write(&device, index * 3 * 4096, pattern(index, 1, 8192)).await.unwrap();
        }
        flush(&device).await.unwrap();
        for index in 0..32_u64 {
            write(&device, index * 3 * 4096, pattern(index, 2, 4096)).await.unwrap();
            write(&device, 32 * MIB + index * 4096, pattern(index, 3, 4096)).await.unwrap();
        }
        for index in 0..nodes {
            cluster.kill(index);
        }
        for index in 0..nodes {
            cluster.start_node(index).await;
        }
        let device = cluster.attach(volume, nodes - 1).await;
        for index in 0..32_u64 {
            let found = read(&device, index * 3 * 4096, 8192).await.unwrap();
            assert_eq!(found[4096..], pattern(index, 1, 8192)[4096..], "{index} of {nodes}");
            assert_eq!(found[..4096], pattern(index, 2, 4096), "{index} of {nodes}");
            let found = read(&device, 32 * MIB + index * 4096, 4096).await.unwrap();
            assert_eq!(found, pattern(index, 3, 4096), "{index} of {nodes}");
        }
        cluster.assert_members_equal(volume).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unflushed_acknowledged_writes_survive_the_kill_of_all_but_one_process() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    for index in 0..64_u64 {
        write(&device, index * 3 * 4096, pattern(index, 1, 8192)).await.unwrap();
    }
    cluster.kill(0);
    cluster.kill(1);
    cluster.start_node(0).await;
    cluster.start_node(1).await;
    let device = cluster.attach(volume, 0).await;
    for index in 0..64_u64 {
        let found = read(&device, index * 3 * 4096, 8192).await.unwrap();
        assert_eq!(found, pattern(index, 1, 8192), "{index}");
    }
    cluster.wait_members(volume, 3, Duration::from_secs(20)).await;
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_off_target_serves_nothing_and_is_fenced_when_it_comes_back() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let old = cluster.attach(volume, 0).await;
    write(&old, 0, pattern(0, 1, 8192)).await.unwrap();
    assert_eq!(read(&old, 0, 8192).await.unwrap(), pattern(0, 1, 8192));

    // Nothing that node a connects reaches anybody; the new target does not reach node a's replica either.
    cluster.nodes[0].view.set_cut(true);
    cluster.nodes[1].view.deny(cluster.process(0));
    let start = Instant::now();
    let new = cluster.attach(volume, 1).await;
    eprintln!("the volume moved in {:?}", start.elapsed());
    write(&new, 0, pattern(0, 2, 8192)).await.unwrap();

    // R4, P4: the old target has a replica of its own at hand and must not read from it.
    let late_read = tokio::spawn({
        let old = old.clone();
        async move { read(&old, 0, 8192).await }
    });
    let late_write = tokio::spawn({
        let old = old.clone();
        async move { write(&old, 0, pattern(0, 3, 8192)).await }
    });
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(
        !late_read.is_finished() || late_read.await.unwrap().is_err(),
        "a read was served past the lease"
    );
    assert!(!late_write.is_finished(), "a write ended without anybody to decide on it");

    cluster.nodes[0].view.set_cut(false);
    let start = Instant::now();
    assert!(late_write.await.unwrap().is_err(), "the old target wrote");
    assert!(read(&old, 0, 8192).await.is_err(), "the fenced target served a read");
    assert!(start.elapsed() < Duration::from_secs(15), "fenced only after {:?}", start.elapsed());
    assert_eq!(cluster.process(0).status(volume).unwrap().state.word(), "fenced");
    assert_eq!(read(&new, 0, 8192).await.unwrap(), pattern(0, 2, 8192));

    cluster.nodes[1].view.allow();
    cluster.wait_members(volume, 3, Duration::from_secs(20)).await;
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_replica_is_swapped_out_and_comes_back_when_its_link_does() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device = cluster.attach(volume, 0).await;
    write(&device, 0, pattern(0, 1, 4096)).await.unwrap();
    cluster.nodes[0].view.deny(cluster.process(2));
    let start = Instant::now();
    write(&device, 0, pattern(0, 2, 4096)).await.unwrap();
    let stall = start.elapsed();
    assert!(stall < Duration::from_millis(2_500), "the write waited {stall:?}");
    assert_eq!(cluster.store.get(volume).record.in_sync.len(), 2);
    write(&device, 8 * MIB, pattern(0, 2, 4096)).await.unwrap();
    cluster.nodes[0].view.allow();
    cluster.wait_members(volume, 3, Duration::from_secs(20)).await;
    assert_eq!(read(&device, 8 * MIB, 4096).await.unwrap(), pattern(0, 2, 4096));
    cluster.assert_members_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_replica_leaves_the_set_and_no_write_fails() {
    let mut cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    cluster.kill(2);
    cluster.nodes[2].pool_capacity_bytes = 24 * MIB;
    cluster.start_node(2).await;
    let device = cluster.attach(volume, 0).await;
    for index in 0..48_u64 {
        write(&device, index * MIB, pattern(index, 1, MIB as usize)).await.unwrap();
    }
    flush(&device).await.unwrap();
    assert_eq!(cluster.store.get(volume).record.in_sync.len(), 2);
    for index in 0..48_u64 {
        assert_eq!(read(&device, index * MIB, MIB as u32).await.unwrap(), pattern(index, 1, MIB as usize));
    }
}
