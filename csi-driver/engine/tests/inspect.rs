//! What NBD tools see: a target's allocation, and each replica as it is, without disturbing anybody.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Cluster, MIB, flush, pattern, submit, write};
use holdfast_io::{BlockDevice, BlockError, BlockOp};
use holdfast_nbd::{BASE_ALLOCATION, Client, ClientOptions, DIRTY_PREFIX, Extent, Inquiry};
use holdfast_storage_core::ids::VolumeId;
use tokio::net::UnixStream;

const SIZE: u64 = 192 * MIB;

async fn start(nodes: usize) -> (Cluster, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let sockets = dir.path().join("sockets");
    (Cluster::start_in(dir, nodes, false, Some(sockets.clone())).await, sockets)
}

fn replicas_socket(sockets: &Path, node: &str) -> PathBuf {
    sockets.join(node).join("replicas.sock")
}

async fn connect(socket: &Path, export: &str, context: &str) -> Client {
    let stream = UnixStream::connect(socket).await.unwrap();
    let options = ClientOptions { contexts: vec![context.to_owned()], ..ClientOptions::new(export) };
    let client = Client::connect(stream, options).await.unwrap();
    assert!(client.has_context(context));
    client
}

/// Asks on until the end, as every client does, and joins neighbours.
async fn map(client: &Client, context: &str, offset: u64, end: u64) -> Vec<(u64, u32)> {
    let mut runs: Vec<(u64, u32)> = Vec::new();
    let mut at = offset;
    while at < end {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let done = Box::new(move |result: Result<Vec<Extent>, BlockError>| drop(sender.send(result)));
        client.block_status(context, at, end - at, false, done);
        for extent in receiver.await.unwrap().unwrap() {
            at += extent.len;
            match runs.last_mut() {
                Some((len, state)) if *state == extent.state => *len += extent.len,
                _ => runs.push((extent.len, extent.state)),
            }
        }
    }
    assert_eq!(at, end);
    runs
}

const HOLE: u32 = Extent::HOLE | Extent::ZERO;

async fn map_of_target(cluster: &Cluster, sockets: &Path, volume: VolumeId) {
    let device = cluster.attach(volume, 0).await;
    write(&device, MIB, pattern(0, 1, 8192)).await.unwrap();
    let zero = BlockOp::Zero { offset: MIB + 4096, len: 4096, fua: false, trim: true };
    submit(&device, zero).await.unwrap();
    let socket = sockets.join("node-a").join(format!("{volume}.sock"));
    let client = connect(&socket, "", BASE_ALLOCATION).await;
    let whole = map(&client, BASE_ALLOCATION, 0, SIZE).await;
    let rest = (SIZE - MIB - 8192, HOLE);
    assert_eq!(whole, [(MIB, HOLE), (4096, 0), (4096, Extent::ZERO), rest]);
    let odd = map(&client, BASE_ALLOCATION, MIB - 512, MIB + 4096 + 512).await;
    assert_eq!(odd, [(512, HOLE), (4096, 0), (512, Extent::ZERO)], "bytes that are no whole blocks");

    let uri = format!("nbd+unix:///?socket={}", socket.display());
    if let Some(told) = nbdinfo_map("--map", &uri).await {
        let expected = [["1048576", "4096", "0"], ["1052672", "4096", "2"]];
        assert!(expected.iter().all(|line| told.iter().any(|fields| fields == line)), "{told:?}");
    }
}

/// Offset, length and state of each line that nbdinfo prints.
async fn nbdinfo_map(map: &str, uri: &str) -> Option<Vec<Vec<String>>> {
    if !Path::new("/usr/bin/nbdinfo").exists() {
        println!("SKIP: nbdinfo is not installed");
        return None;
    }
    let running = tokio::process::Command::new("nbdinfo").args([map, uri]).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(60), running).await.unwrap().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    let fields = |line: &str| line.split_whitespace().take(3).map(str::to_owned).collect();
    Some(told.lines().map(fields).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_tells_what_its_volume_has_allocated() {
    let (cluster, sockets) = start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    map_of_target(&cluster, &sockets, volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_without_a_local_replica_asks_another_node() {
    let (cluster, sockets) = start(3).await;
    let volume = cluster.create_volume_on(&[1, 2], SIZE).await;
    map_of_target(&cluster, &sockets, volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_absent_replica_lacks_can_be_seen_and_looking_disturbs_nobody() {
    let (mut cluster, sockets) = start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    let device: Arc<dyn BlockDevice> = cluster.attach(volume, 0).await;
    let (absent, seen) = (cluster.replica_on(volume, 2), cluster.replica_on(volume, 1));
    cluster.kill(2);
    cluster.wait_members(volume, 2, Duration::from_secs(20)).await;
    write(&device, 5 * MIB, pattern(5, 1, 8192)).await.unwrap();
    flush(&device).await.unwrap();

    let socket = replicas_socket(&sockets, "node-b");
    let export = format!("{volume}/{seen}");
    let context = format!("{DIRTY_PREFIX}{absent}");
    let mut inquiry = Inquiry::begin(UnixStream::connect(&socket).await.unwrap(), None).await.unwrap();
    assert_eq!(inquiry.exports().await.unwrap(), std::slice::from_ref(&export));
    assert_eq!(inquiry.contexts(&export, &[]).await.unwrap(), [BASE_ALLOCATION, context.as_str()]);
    assert_eq!(inquiry.contexts(&export, &[DIRTY_PREFIX]).await.unwrap(), [context.as_str()]);
    assert!(inquiry.info("x/y").await.is_err());
    inquiry.leave().await.unwrap();

    let client = connect(&socket, &export, &context).await;
    let dirty = map(&client, &context, 0, SIZE).await;
    // What was in flight or logged when the replica left counts as dirty too; nothing had been written.
    assert_eq!(dirty, [(5 * MIB, 0), (8192, Extent::DIRTY), (SIZE - 5 * MIB - 8192, 0)]);
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    if let Some(told) = nbdinfo_map(&format!("--map={context}"), &uri).await {
        assert_eq!(told[1], ["5242880", "8192", "1"], "{told:?}");
    }
    let client: Arc<dyn BlockDevice> = Arc::new(client);
    assert_eq!(common::read(&client, 5 * MIB, 8192).await.unwrap(), pattern(5, 1, 8192));
    assert!(write(&client, 0, vec![1; 4096]).await.is_err(), "a look changes nothing");
    drop(client);
    write(&device, 5 * MIB, pattern(5, 2, 4096)).await.unwrap();
    assert_eq!(cluster.store.get(volume).record.in_sync.len(), 2, "looking ended no session");

    cluster.start_node(2).await;
    cluster.wait_members(volume, 3, Duration::from_secs(30)).await;
    // The record names it a member before the members are told, which ends its map (R24).
    let told = async {
        let socket = UnixStream::connect(&socket).await.unwrap();
        let mut inquiry = Inquiry::begin(socket, None).await.unwrap();
        while inquiry.contexts(&export, &[]).await.unwrap() != [BASE_ALLOCATION] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), told).await.expect("its map ends");
}
