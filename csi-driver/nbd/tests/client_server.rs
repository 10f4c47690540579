//! Our client and our server, over a stream in memory.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{BLOCK, Behaviour, DIRTY, OneVolume, allocation, call, extents, wait};
use holdfast_io::{BlockDevice, BlockError, BlockOp};
use holdfast_nbd::proto::errno;
use holdfast_nbd::{
    BASE_ALLOCATION, Client, ClientOptions, ConnectError, Extent, Inquiry, ServeError, Server, ZeroOptions,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::DuplexStream;
use tokio::task::JoinHandle;

type Served = JoinHandle<Result<(), ServeError>>;

const SIZE: usize = 8 << 20;

fn serve(volume: &Arc<OneVolume>) -> (DuplexStream, Served) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let server = Server::new(volume.clone());
    (near, tokio::spawn(async move { server.serve_connection(far).await }))
}

async fn connect(volume: &Arc<OneVolume>, export: &str) -> (Client, Served) {
    connect_framed(volume, export, false).await
}

async fn connect_framed(volume: &Arc<OneVolume>, export: &str, compact_headers: bool) -> (Client, Served) {
    let (stream, served) = serve(volume);
    let contexts = vec![BASE_ALLOCATION.to_owned(), DIRTY.to_owned(), "x-unknown:y".to_owned()];
    let options = ClientOptions { contexts, compact_headers, ..ClientOptions::new(export) };
    let client = Client::connect(stream, options).await.expect("connected");
    assert_eq!(client.info().extended_headers, !compact_headers);
    (client, served)
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
    assert_eq!(call(&read_only, zero(0, BLOCK, true)).await, refused(errno::ENOTSUP), "it is not on offer");
}

#[tokio::test]
async fn one_request_zeroes_what_32_bits_cannot_say() {
    let volume = OneVolume::sparse(1 << 44);
    for (compact, requests) in [(false, 1), (true, (1 << 44) / (1 << 30))] {
        let (client, _served) = connect_framed(&volume, "vol", compact).await;
        let before = volume.device.zeroes.load(Ordering::Relaxed);
        call(&client, BlockOp::Zero { offset: 0, len: 1 << 44, fua: false, trim: false }).await.unwrap();
        let sent = volume.device.zeroes.load(Ordering::Relaxed) - before;
        assert_eq!(sent, requests, "compact headers: {compact}");
    }
}

#[tokio::test]
async fn a_split_request_ends_with_its_first_error() {
    let volume = OneVolume::sparse(1 << 44);
    let (client, _served) = connect_framed(&volume, "vol", true).await;
    volume.device.set(Behaviour::Fail(errno::ENOSPC));
    let all = BlockOp::Zero { offset: 0, len: 1 << 44, fua: false, trim: true };
    assert_eq!(call(&client, all).await, Err(BlockError(errno::ENOSPC)));
    let beyond = BlockOp::Zero { offset: u64::MAX - 4095, len: 1 << 44, fua: false, trim: true };
    assert_eq!(call(&client, beyond).await, Err(BlockError(errno::EINVAL)));
}

#[tokio::test]
async fn zeroing_only_if_fast_is_refused_where_it_is_not() {
    let volume = OneVolume::new(SIZE);
    let fast = ZeroOptions { only_if_fast: true, ..ZeroOptions::default() };
    let (client, _served) = connect(&volume, "vol").await;
    call(&client, write(0, vec![1; BLOCK], false)).await.unwrap();
    wait(|done| client.zero(0, BLOCK as u64, fast, done)).await.unwrap();
    assert_eq!(volume.device.bytes()[..BLOCK], [0; BLOCK]);

    let (client, _served) = connect(&volume, "slow").await;
    call(&client, write(0, vec![1; BLOCK], false)).await.unwrap();
    let refused = wait(|done| client.zero(0, BLOCK as u64, fast, done)).await;
    assert_eq!(refused, Err(BlockError(errno::ENOTSUP)));
    assert_eq!(volume.device.bytes()[..BLOCK], [1; BLOCK], "nothing was changed");
    wait(|done| client.zero(0, BLOCK as u64, ZeroOptions::default(), done)).await.unwrap();
}

#[tokio::test]
async fn hints_and_reads_in_one_piece_are_answered() {
    let volume = OneVolume::new(SIZE);
    for compact in [false, true] {
        let (client, _served) = connect_framed(&volume, "vol", compact).await;
        call(&client, write(0, vec![9; BLOCK], false)).await.unwrap();
        wait(|done| client.cache(0, SIZE as u64, done)).await.unwrap();
        let beyond = wait(|done| client.cache(SIZE as u64, BLOCK as u64, done)).await;
        assert_eq!(beyond, Err(BlockError(errno::EINVAL)));
        let piece = wait(|done| client.read_in_one_piece(0, 65_536, done)).await.unwrap();
        assert!(piece[..BLOCK] == [9; BLOCK] && piece.len() == 65_536);
        let trims = volume.device.trims.load(Ordering::Relaxed);
        wait(|done| client.discard(0, BLOCK as u64, true, done)).await.unwrap();
        assert_eq!(volume.device.trims.load(Ordering::Relaxed), trims + 1);
    }
}

#[tokio::test]
async fn a_server_that_shuts_down_is_left() {
    let volume = OneVolume::new(SIZE);
    for compact in [false, true] {
        volume.device.set(Behaviour::Fail(errno::ESHUTDOWN));
        let (client, served) = connect_framed(&volume, "vol", compact).await;
        assert_eq!(call(&client, BlockOp::Flush).await, Err(BlockError(errno::ESHUTDOWN)));
        client.closed().await;
        assert_eq!(call(&client, BlockOp::Flush).await, Err(BlockError(errno::ENOTCONN)));
        served.await.unwrap().expect("the client says goodbye");
    }
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
        let options = ClientOptions::new(name);
        let Err(ConnectError::Refused { export, reason }) = Client::connect(stream, options).await else {
            panic!("{name} was not refused");
        };
        assert_eq!(export, name);
        assert!(reason.contains(word), "{reason}");
    }
}

#[tokio::test]
async fn extents_are_told_per_context() {
    let volume = OneVolume::new(SIZE);
    for compact in [false, true] {
        let (client, _served) = connect_framed(&volume, "vol", compact).await;
        assert!(client.has_context(BASE_ALLOCATION) && client.has_context(DIRTY));
        assert!(!client.has_context("x-unknown:y"));
        call(&client, write(BLOCK, vec![1; BLOCK], false)).await.unwrap();
        let told = extents(&client, BASE_ALLOCATION, 0, 4 * BLOCK, false).await.unwrap();
        let expected = [allocation(BLOCK, true), allocation(BLOCK, false), allocation(2 * BLOCK, true)];
        assert_eq!(told, expected);
        let one = extents(&client, BASE_ALLOCATION, 0, 4 * BLOCK, true).await.unwrap();
        assert_eq!(one, expected[..1]);

        let dirty = extents(&client, DIRTY, 0, 5 << 19, false).await.unwrap();
        let mib = |len, state| Extent { len, state };
        assert_eq!(dirty, [mib(1 << 20, Extent::DIRTY), mib(1 << 20, 0), mib(1 << 19, Extent::DIRTY)]);
        let unknown = extents(&client, "x-unknown:y", 0, BLOCK, false).await;
        assert_eq!(unknown, Err(BlockError(errno::ENOTSUP)));
        let beyond = extents(&client, BASE_ALLOCATION, SIZE, BLOCK, false).await;
        assert_eq!(beyond, Err(BlockError(errno::EINVAL)));
        let empty = extents(&client, BASE_ALLOCATION, 0, 0, false).await;
        assert_eq!(empty, Err(BlockError(errno::EINVAL)));
    }
}

#[tokio::test]
async fn one_context_that_fails_fails_its_request_alone() {
    let volume = OneVolume::new(SIZE);
    // With compact headers every context is asked, with extended ones only the one that is wanted.
    let (compact, _served) = connect_framed(&volume, "vol", true).await;
    let (extended, _served) = connect_framed(&volume, "vol", false).await;
    for behaviour in [Behaviour::Fail(errno::EIO), Behaviour::Drop] {
        volume.device.set(behaviour);
        assert_eq!(extents(&compact, DIRTY, 0, BLOCK, false).await, Err(BlockError(errno::EIO)));
        assert!(extents(&extended, DIRTY, 0, BLOCK, false).await.is_ok());
        let failed = extents(&extended, BASE_ALLOCATION, 0, BLOCK, false).await;
        assert_eq!(failed, Err(BlockError(errno::EIO)));
    }
    volume.device.set(Behaviour::Answer);
    assert!(extents(&compact, DIRTY, 0, BLOCK, false).await.is_ok());
}

#[tokio::test]
async fn questions_are_answered_without_opening_an_export() {
    let volume = OneVolume::new(SIZE);
    let (stream, served) = serve(&volume);
    let mut inquiry = Inquiry::begin(stream, None).await.unwrap();
    assert_eq!(inquiry.exports().await.unwrap(), ["vol", "ro", "slow"]);
    assert_eq!(inquiry.contexts("vol", &[]).await.unwrap(), [BASE_ALLOCATION, DIRTY]);
    assert_eq!(inquiry.contexts("vol", &["base:"]).await.unwrap(), [BASE_ALLOCATION]);
    assert_eq!(inquiry.contexts("vol", &["x-holdfast:"]).await.unwrap(), [DIRTY]);
    assert_eq!(inquiry.contexts("vol", &["x-holdfast:dirty:"]).await.unwrap(), [DIRTY]);
    assert_eq!(inquiry.contexts("vol", &[DIRTY, "other:", "base:nothing"]).await.unwrap(), [DIRTY]);
    assert!(inquiry.contexts("vol", &["no-colon"]).await.is_err());
    assert!(inquiry.contexts("nothing", &[]).await.is_err());
    assert_eq!(inquiry.info("ro").await.unwrap().size_bytes, SIZE as u64);
    assert!(matches!(inquiry.info("secret").await, Err(ConnectError::Refused { .. })));
    assert_eq!(volume.connections.live(), 0, "nothing was opened");
    inquiry.leave().await.unwrap();
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_wildcard_chooses_nothing() {
    let volume = OneVolume::new(SIZE);
    let (stream, _served) = serve(&volume);
    let contexts = vec!["base:".to_owned(), "x-holdfast:dirty:".to_owned()];
    let options = ClientOptions { contexts, ..ClientOptions::new("vol") };
    let client = Client::connect(stream, options).await.unwrap();
    let told = extents(&client, BASE_ALLOCATION, 0, BLOCK, false).await;
    assert_eq!(told, Err(BlockError(errno::ENOTSUP)));
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
