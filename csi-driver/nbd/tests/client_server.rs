//! Our client and our server, over a stream in memory.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{BLOCK, Behaviour, OneVolume, call};
use holdfast_io::{BlockDevice, BlockError, BlockOp};
use holdfast_nbd::proto::errno;
use holdfast_nbd::{Client, ClientOptions, ConnectError, Extent, ServeError, Server};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

type Served = JoinHandle<Result<(), ServeError>>;

const SIZE: usize = 8 << 20;

fn serve(volume: &Arc<OneVolume>) -> (DuplexStream, Served) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let server = Server::new(volume.clone());
    (near, tokio::spawn(async move { server.serve_connection(far).await }))
}

async fn connect(volume: &Arc<OneVolume>, export: &str) -> (Client, Served) {
    let (stream, served) = serve(volume);
    let options = ClientOptions { export: export.into(), block_status: true, ..ClientOptions::default() };
    (Client::connect(stream, options).await.expect("connected"), served)
}

fn write(offset: usize, data: Vec<u8>, fua: bool) -> BlockOp {
    BlockOp::Write { offset: offset as u64, data: Bytes::from(data), fua }
}

fn read(offset: usize, len: usize) -> BlockOp {
    BlockOp::Read { offset: offset as u64, len: len as u32 }
}

fn zero(offset: usize, len: usize, trim: bool) -> BlockOp {
    BlockOp::Zero { offset: offset as u64, len: len as u64, fua: true, trim }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never came true: {what}");
}

#[tokio::test]
async fn every_request_reaches_the_device_with_its_flags() {
    let volume = OneVolume::new(SIZE);
    let (client, served) = connect(&volume, "vol").await;
    assert_eq!(client.size_bytes(), SIZE as u64);
    assert_eq!(client.info().block_bytes_min, 4096);

    call(&client, write(BLOCK, vec![7; 3 * BLOCK], true)).await.unwrap();
    call(&client, BlockOp::Flush).await.unwrap();
    call(&client, zero(2 * BLOCK, BLOCK, true)).await.unwrap();
    call(&client, zero(5 * BLOCK, BLOCK, false)).await.unwrap();
    let data = call(&client, read(0, 4 * BLOCK)).await.unwrap();

    let expected = [vec![0; BLOCK], vec![7; BLOCK], vec![0; BLOCK], vec![7; BLOCK]].concat();
    assert_eq!(data, expected);
    assert!(holdfast_io::is_aligned(&data), "a read's data can go to direct I/O");
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let device = &volume.device;
    assert_eq!((count(&device.flushes), count(&device.fuas)), (1, 3));
    assert_eq!((count(&device.trims), count(&device.zeroes)), (1, 1));
    drop(client);
    served.await.unwrap().expect("a client that says goodbye is no error");
    assert_eq!(volume.connections.live(), 0);
}

#[tokio::test]
async fn requests_are_pipelined_and_replies_come_in_any_order() {
    let volume = OneVolume::new(SIZE);
    let (client, _served) = connect(&volume, "vol").await;
    volume.device.set(Behaviour::Hold);
    let mut answers = Vec::new();
    for block in 0..100 {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let op = write(block * BLOCK, vec![block as u8; BLOCK], false);
        client.submit(op, Box::new(move |result| drop(sender.send(result))));
        answers.push(receiver);
    }
    until("all 100 are with the device", || volume.device.held() == 100).await;
    volume.device.release();
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
    let bytes = volume.device.bytes();
    assert!((0..100).all(|block| bytes[block * BLOCK] == block as u8));
}

#[tokio::test]
async fn the_device_s_error_arrives_and_the_connection_lives_on() {
    let volume = OneVolume::new(SIZE);
    let (client, _served) = connect(&volume, "vol").await;
    volume.device.set(Behaviour::Fail(errno::ENOSPC));
    assert_eq!(call(&client, write(0, vec![1; BLOCK], false)).await, Err(BlockError(errno::ENOSPC)));
    assert_eq!(call(&client, read(0, BLOCK)).await, Err(BlockError(errno::ENOSPC)));
    volume.device.set(Behaviour::Fail(4));
    assert_eq!(
        call(&client, BlockOp::Flush).await,
        Err(BlockError(errno::EIO)),
        "errno 4 has no place on the wire"
    );
    volume.device.set(Behaviour::Drop);
    assert_eq!(call(&client, BlockOp::Flush).await, Err(BlockError(errno::EIO)), "dropped without an answer");
    volume.device.set(Behaviour::Answer);
    assert_eq!(call(&client, BlockOp::Flush).await, Ok(Bytes::new()));
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_one_by_one() {
    let volume = OneVolume::new(SIZE);
    let (client, _served) = connect(&volume, "vol").await;
    let refused = |errno| Err(BlockError(errno));
    assert_eq!(call(&client, read(SIZE, BLOCK)).await, refused(errno::EINVAL), "read beyond the end");
    assert_eq!(
        call(&client, write(SIZE, vec![0; BLOCK], false)).await,
        refused(errno::ENOSPC),
        "write beyond the end"
    );
    assert_eq!(call(&client, read(512, BLOCK)).await, refused(errno::EINVAL), "unaligned offset");
    assert_eq!(
        call(&client, write(0, vec![0; 512], false)).await,
        refused(errno::EINVAL),
        "unaligned length"
    );
    assert_eq!(call(&client, read(0, 33 << 20)).await, refused(errno::EINVAL), "too large");
    let huge = BlockOp::Read { offset: u64::MAX - 4095, len: 4096 };
    assert_eq!(call(&client, huge).await, refused(errno::EINVAL), "offset overflow");

    let (read_only, _served) = connect(&volume, "ro").await;
    assert_eq!(call(&read_only, write(0, vec![0; BLOCK], false)).await, refused(errno::EPERM));
    assert!(call(&read_only, read(0, BLOCK)).await.is_ok());
}

#[tokio::test]
async fn a_lost_connection_fails_every_request_exactly_once_and_later_ones_at_once() {
    let volume = OneVolume::new(SIZE);
    let (client, served) = connect(&volume, "vol").await;
    volume.device.set(Behaviour::Hold);
    let failed = Arc::new(AtomicUsize::new(0));
    let submit = || {
        let failed = failed.clone();
        let done = move |result| {
            assert_eq!(result, Err(BlockError(errno::ENOTCONN)));
            failed.fetch_add(1, Ordering::SeqCst);
        };
        client.submit(BlockOp::Flush, Box::new(done));
    };
    (0..50).for_each(|_| submit());
    until("all are with the device", || volume.device.held() == 50).await;
    served.abort();
    client.closed().await;
    assert_eq!(failed.load(Ordering::SeqCst), 50);
    submit();
    assert_eq!(failed.load(Ordering::SeqCst), 51);
    assert_eq!(volume.connections.live(), 1, "requests of the lost connection are still in the device");
    volume.device.release();
    volume.connections.wait_drained().await;
    assert_eq!(failed.load(Ordering::SeqCst), 51);
}

#[tokio::test]
async fn closing_the_set_closes_its_connections_and_drains_their_requests() {
    let volume = OneVolume::new(SIZE);
    let (first, first_served) = connect(&volume, "vol").await;
    let (second, _second_served) = connect(&volume, "vol").await;
    assert_eq!(volume.connections.live(), 2);
    volume.device.set(Behaviour::Hold);
    let pending = tokio::spawn(async move { call(&first, write(0, vec![1; BLOCK], false)).await });
    until("the write is with the device", || volume.device.held() == 1).await;

    volume.connections.close();
    second.closed().await;
    until("only the one with a request is left", || volume.connections.live() == 1).await;
    assert!(!first_served.is_finished(), "its I/O has not landed yet");
    volume.device.release();
    volume.connections.wait_drained().await;
    first_served.await.unwrap().unwrap();
    // Whether the answer still reached the client is open; that it got one is not.
    let _ = pending.await.unwrap();
    let (late, _served) = connect(&volume, "vol").await;
    late.closed().await;
}

#[tokio::test]
async fn dropping_the_client_fails_its_requests() {
    let volume = OneVolume::new(SIZE);
    let (client, served) = connect(&volume, "vol").await;
    volume.device.set(Behaviour::Hold);
    let (sender, receiver) = tokio::sync::oneshot::channel();
    client.submit(BlockOp::Flush, Box::new(move |result| drop(sender.send(result))));
    until("it is with the device", || volume.device.held() == 1).await;
    drop(client);
    assert_eq!(receiver.await.unwrap(), Err(BlockError(errno::ENOTCONN)));
    volume.device.release();
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refusal_carries_the_provider_s_words() {
    let volume = OneVolume::new(SIZE);
    for (name, word) in [("nothing", "no export"), ("secret", "another node's")] {
        let (stream, _served) = serve(&volume);
        let options = ClientOptions { export: name.into(), ..ClientOptions::default() };
        let Err(ConnectError::Refused { export, reason }) = Client::connect(stream, options).await else {
            panic!("{name} was not refused");
        };
        assert_eq!(export, name);
        assert!(reason.contains(word), "{reason}");
    }
}

#[tokio::test]
async fn allocation_is_told() {
    let volume = OneVolume::new(SIZE);
    let (client, _served) = connect(&volume, "vol").await;
    call(&client, write(BLOCK, vec![1; BLOCK], false)).await.unwrap();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    client.block_status(0, 4 * BLOCK as u32, Box::new(move |result| drop(sender.send(result))));
    let extent = |blocks: usize, hole| Extent { len: (blocks * BLOCK) as u32, hole, zero: hole };
    assert_eq!(receiver.await.unwrap().unwrap(), [extent(1, true), extent(1, false), extent(2, true)]);
}

#[tokio::test]
async fn data_survives_many_sizes_at_once() {
    let volume = OneVolume::new(SIZE);
    let (client, _served) = connect(&volume, "vol").await;
    let mut random = StdRng::seed_from_u64(7);
    let mut expected = vec![0; SIZE];
    for _ in 0..200 {
        let blocks = random.random_range(1..400);
        let at = random.random_range(0..SIZE / BLOCK - blocks) * BLOCK;
        let mut data = vec![random.random(); blocks * BLOCK];
        data.iter_mut().step_by(97).for_each(|byte| *byte = random.random());
        expected[at..at + data.len()].copy_from_slice(&data);
        call(&client, write(at, data, false)).await.unwrap();
    }
    assert!(volume.device.bytes() == expected);
    for at in (0..SIZE).step_by(1 << 20) {
        assert!(call(&client, read(at, 1 << 20)).await.unwrap() == expected[at..at + (1 << 20)]);
    }
}

fn seed() -> u64 {
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(4711);
    println!("replay with HOLDFAST_SEED={seed}");
    seed
}

#[tokio::test]
async fn a_server_survives_garbage_at_every_stage() {
    let volume = OneVolume::new(SIZE);
    let mut random = StdRng::seed_from_u64(seed());
    for round in 0..200 {
        let (mut stream, served) = serve(&volume);
        let mut garbage = vec![0; random.random_range(1..2000)];
        random.fill(&mut garbage[..]);
        let mut sent = Vec::new();
        if round % 4 > 0 {
            sent.extend_from_slice(&[0, 0, 0, 3]);
        }
        if round % 4 > 1 {
            let go = holdfast_nbd::proto::ClientOption::Open { go: true, name: "vol".into(), wants: vec![] };
            go.encode(&mut sent);
        }
        if round % 4 > 2 {
            sent.extend_from_slice(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, random.random_range(0..9)]);
        }
        sent.extend_from_slice(&garbage);
        let _ = stream.write_all(&sent).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer))
            .await
            .expect("it ends");
        drop(stream);
        let _ = served.await.expect("no panic");
        assert_eq!(volume.connections.live(), 0);
    }
}

#[tokio::test]
async fn a_client_survives_garbage_in_place_of_replies() {
    let volume = OneVolume::new(SIZE);
    let mut random = StdRng::seed_from_u64(seed());
    for round in 0..200 {
        let (near, mut between) = tokio::io::duplex(64 << 10);
        let (mut server_end, _served) = serve(&volume);
        let options = ClientOptions { export: "vol".into(), ..ClientOptions::default() };
        let mut garbage = vec![0; random.random_range(16..400)];
        random.fill(&mut garbage[..]);
        if round % 2 == 0 {
            garbage[..4].copy_from_slice(&[0x66, 0x8e, 0x33, 0xef]);
            garbage[8..16].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0]);
        }
        let mangler = tokio::spawn(async move {
            let mut up = [0; 4096];
            let mut down = [0; 4096];
            loop {
                tokio::select! {
                    got = between.read(&mut up) => {
                        let Ok(got @ 1..) = got else { return };
                        if up.starts_with(&[0x25, 0x60, 0x95, 0x13]) {
                            let _ = between.write_all(&garbage).await;
                            return;
                        }
                        server_end.write_all(&up[..got]).await.unwrap();
                    }
                    got = server_end.read(&mut down) => {
                        let Ok(got @ 1..) = got else { return };
                        between.write_all(&down[..got]).await.unwrap();
                    }
                }
            }
        });
        let client = Client::connect(near, options).await.unwrap();
        let answer = call(&client, BlockOp::Read { offset: 0, len: 4096 });
        let answer = tokio::time::timeout(Duration::from_secs(20), answer).await.expect("it completes");
        assert!(answer.is_err());
        mangler.await.unwrap();
    }
}
