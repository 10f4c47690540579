//! Our client against the servers of others: nbdkit with its filters, qemu-nbd, qemu-storage-daemon, plain and TLS. A server
//! that is not installed skips visibly.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use common::tools::{Certificates, Foreign, possible};
use common::{BLOCK, call, extents, wait};
use holdfast_io::{BlockDevice, BlockError, BlockOp};
use holdfast_nbd::proto::{errno, transmission_flag};
use holdfast_nbd::{
    BASE_ALLOCATION, Client, ClientOptions, ClientTls, ConnectError, Inquiry, TlsIdentity, ZeroOptions,
};

const SIZE: usize = 16 << 20;

async fn nbdkit(args: &[&str]) -> Foreign {
    let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    Foreign::start("nbdkit", |socket, _| {
        [vec!["--foreground".into(), "--exit-with-parent".into(), "-U".into(), socket.into()], args].concat()
    })
    .await
}

fn allocation(export: &str) -> ClientOptions {
    ClientOptions { contexts: vec![BASE_ALLOCATION.to_owned()], ..ClientOptions::new(export) }
}

async fn connect(server: &Foreign, options: ClientOptions) -> Client {
    Client::connect(server.connect().await, options).await.unwrap()
}

fn write(offset: usize, byte: u8, len: usize) -> BlockOp {
    BlockOp::Write { offset: offset as u64, data: Bytes::from(vec![byte; len]), fua: true }
}

/// Writes, zeroes, trims and reads back; then allocation, where it was agreed on.
async fn exercise(client: &Client) {
    assert_eq!(client.size_bytes(), SIZE as u64);
    call(client, write(1 << 20, 7, 64 * BLOCK)).await.unwrap();
    let at = (1 << 20) + 16 * BLOCK as u64;
    let zero = BlockOp::Zero { offset: at, len: 16 * BLOCK as u64, fua: false, trim: true };
    call(client, zero).await.unwrap();
    call(client, BlockOp::Flush).await.unwrap();
    let mut expected = vec![0; 4 << 20];
    expected[1 << 20..(1 << 20) + 64 * BLOCK].fill(7);
    expected[(1 << 20) + 16 * BLOCK..(1 << 20) + 32 * BLOCK].fill(0);
    assert!(call(client, BlockOp::Read { offset: 0, len: 4 << 20 }).await.unwrap() == expected);
    let piece = wait(|done| client.read_in_one_piece(1 << 20, 1 << 20, done)).await.unwrap();
    assert!(piece == expected[1 << 20..2 << 20]);
    if client.has_context(BASE_ALLOCATION) {
        let told = extents(client, BASE_ALLOCATION, 0, 4 << 20, false).await.unwrap();
        assert!(told[0].is_hole() && told[0].is_zero() && told.len() >= 3, "{told:?}");
        assert_eq!(told.iter().map(|extent| extent.len).sum::<u64>(), 4 << 20);
        let one = extents(client, BASE_ALLOCATION, 0, 4 << 20, true).await.unwrap();
        assert_eq!(one, told[..1]);
    }
    wait(|done| client.discard(1 << 20, 1 << 20, false, done)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdkit_s_memory_is_a_disk() {
    if !possible("nbdkit") {
        return;
    }
    let server = nbdkit(&["memory", "16M"]).await;
    let client = connect(&server, allocation("")).await;
    assert!(client.has_context(BASE_ALLOCATION));
    assert!(client.info().flags & transmission_flag::CAN_MULTI_CONN != 0);
    exercise(&client).await;
    wait(|done| client.cache(0, 1 << 20, done)).await.unwrap();
    let second = connect(&server, allocation("")).await;
    let seen = call(&second, BlockOp::Read { offset: 3 << 20, len: BLOCK as u32 }).await.unwrap();
    assert_eq!(seen, vec![0; BLOCK]);
    call(&client, write(3 << 20, 9, BLOCK)).await.unwrap();
    let seen = call(&second, BlockOp::Read { offset: 3 << 20, len: BLOCK as u32 }).await.unwrap();
    assert_eq!(seen, vec![9; BLOCK], "both connections see one disk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_structured_replies_will_do() {
    if !possible("nbdkit") {
        return;
    }
    let server = nbdkit(&["--no-sr", "memory", "16M"]).await;
    let client = connect(&server, allocation("")).await;
    assert!(!client.has_context(BASE_ALLOCATION) && !client.info().extended_headers);
    exercise(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oldstyle_server_is_refused_in_words() {
    if !possible("nbdkit") {
        return;
    }
    let server = nbdkit(&["--oldstyle", "memory", "16M"]).await;
    let refused = Client::connect(server.connect().await, ClientOptions::new("")).await.unwrap_err();
    assert!(refused.to_string().contains("fixed newstyle"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_of_nbdkit_s_error_filter_fail_their_requests_alone() {
    if !possible("nbdkit") {
        return;
    }
    let switch = tempfile::tempdir().unwrap();
    let file = switch.path().join("fail");
    let file_arg = format!("error-file={}", file.display());
    let server =
        nbdkit(&["--filter=error", "memory", "16M", "error=ENOSPC", "error-rate=100%", &file_arg]).await;
    let client = connect(&server, ClientOptions::new("")).await;
    call(&client, write(0, 1, BLOCK)).await.unwrap();
    std::fs::write(&file, []).unwrap();
    let no_space = Err(BlockError(errno::ENOSPC));
    assert_eq!(call(&client, write(0, 2, BLOCK)).await, no_space);
    assert_eq!(call(&client, BlockOp::Read { offset: 0, len: BLOCK as u32 }).await, no_space);
    std::fs::remove_file(&file).unwrap();
    let back = call(&client, BlockOp::Read { offset: 0, len: BLOCK as u32 }).await.unwrap();
    assert_eq!(back, vec![1; BLOCK]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delayed_read_does_not_hold_up_the_writes_behind_it() {
    if !possible("nbdkit") {
        return;
    }
    let server = nbdkit(&["--filter=delay", "memory", "16M", "rdelay=1500ms"]).await;
    let client = connect(&server, ClientOptions::new("")).await;
    let written = Arc::new(AtomicUsize::new(0));
    let seen = written.clone();
    let (sender, read) = tokio::sync::oneshot::channel();
    let done = move |result: Result<Bytes, _>| {
        let _ = sender.send((result.map(|_| ()), seen.load(Ordering::SeqCst)));
    };
    client.submit(BlockOp::Read { offset: 0, len: BLOCK as u32 }, Box::new(done));
    for block in 0..8 {
        call(&client, write(block * BLOCK, 1, BLOCK)).await.unwrap();
        written.fetch_add(1, Ordering::SeqCst);
    }
    assert_eq!(read.await.unwrap(), (Ok(()), 8), "all writes were answered first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_s_exports_and_contexts_are_listed() {
    if !possible("nbdkit") {
        return;
    }
    let server = nbdkit(&[
        "--filter=exportname",
        "memory",
        "16M",
        "exportname-list=explicit",
        "exportname=first",
        "exportname=second",
    ])
    .await;
    let mut inquiry = Inquiry::begin(server.connect().await, None).await.unwrap();
    let mut exports = inquiry.exports().await.unwrap();
    exports.sort();
    assert_eq!(exports, ["first", "second"]);
    assert_eq!(inquiry.contexts("first", &[]).await.unwrap(), [BASE_ALLOCATION]);
    assert_eq!(inquiry.info("first").await.unwrap().size_bytes, SIZE as u64);
    inquiry.leave().await.unwrap();
}

/// qemu's servers send holes and several chunks in one reply.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_nbd_serves_an_image() {
    if !possible("qemu-nbd") {
        return;
    }
    let server = Foreign::start("qemu-nbd", |socket, dir| {
        let image = format!("{dir}/image");
        std::fs::File::create(&image).unwrap().set_len(SIZE as u64).unwrap();
        let args =
            ["-f", "raw", "-x", "vol", "--discard=unmap", "--persistent", "-e", "4", "-k", socket, &image];
        args.map(str::to_owned).to_vec()
    })
    .await;
    let client = connect(&server, allocation("vol")).await;
    assert!(client.has_context(BASE_ALLOCATION));
    exercise(&client).await;
    let fast = ZeroOptions { only_if_fast: true, trim: true, fua: false };
    // Whether it is fast is the file system's affair; that the answer is one of the two is the protocol's.
    let zeroed = wait(|done| client.zero(0, 1 << 20, fast, done)).await;
    assert!(matches!(zeroed, Ok(_) | Err(BlockError(errno::ENOTSUP))), "{zeroed:?}");
    let wrong = Client::connect(server.connect().await, ClientOptions::new("other")).await.unwrap_err();
    assert!(matches!(wrong, ConnectError::Refused { .. }), "{wrong}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_contexts_of_qemu_storage_daemon_are_told_apart() {
    const DEPTH: &str = "qemu:allocation-depth";
    if !possible("qemu-storage-daemon") {
        return;
    }
    let server = Foreign::start("qemu-storage-daemon", |socket, dir| {
        let image = format!("{dir}/image");
        std::fs::File::create(&image).unwrap().set_len(SIZE as u64).unwrap();
        let blockdev = format!("driver=file,node-name=disk,filename={image},discard=unmap");
        let listen = format!("addr.type=unix,addr.path={socket},max-connections=4");
        let export = "type=nbd,id=export,node-name=disk,name=vol,writable=on,allocation-depth=on";
        ["--blockdev", &blockdev, "--nbd-server", &listen, "--export", export].map(str::to_owned).to_vec()
    })
    .await;
    let contexts = vec![DEPTH.to_owned(), BASE_ALLOCATION.to_owned()];
    let client = connect(&server, ClientOptions { contexts, ..ClientOptions::new("vol") }).await;
    assert!(client.has_context(DEPTH) && client.has_context(BASE_ALLOCATION));
    exercise(&client).await;
    call(&client, write(0, 1, BLOCK)).await.unwrap();
    let depth = extents(&client, DEPTH, 0, SIZE, false).await.unwrap();
    let told = extents(&client, BASE_ALLOCATION, 0, SIZE, false).await.unwrap();
    assert_eq!(depth[0].state, 1, "depth 1 is the image itself: {depth:?}");
    assert_eq!(told[0].state, 0, "data: {told:?}");
}

async fn exercise_tls(server: &Foreign, export: &str, good: ClientTls, strangers: [ClientTls; 2]) {
    let plain = Client::connect(server.connect().await, ClientOptions::new(export)).await.unwrap_err();
    assert!(matches!(plain, ConnectError::TlsRequired(_)), "{plain}");
    for tls in strangers {
        let options = ClientOptions { tls: Some(tls), ..ClientOptions::new(export) };
        let refused = Client::connect(server.connect().await, options).await.unwrap_err();
        assert!(matches!(refused, ConnectError::Tls(_) | ConnectError::Io(_)), "{refused}");
    }
    let options = ClientOptions { tls: Some(good), ..allocation(export) };
    exercise(&connect(server, options).await).await;
}

fn tls(certificates: &Certificates, name: &str, peer: &str) -> ClientTls {
    TlsIdentity::load(&certificates.issue(name)).unwrap().client(peer).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdkit_and_our_client_prove_themselves_by_tls() {
    if !possible("nbdkit") {
        return;
    }
    let (ours, others) = (Certificates::new(), Certificates::new());
    let dir = format!("--tls-certificates={}", ours.issue("node-b").display());
    let server = nbdkit(&["--tls=require", "--tls-verify-peer", &dir, "memory", "16M"]).await;
    let strangers = [tls(&ours, "node-x", "node-c"), tls(&others, "node-a", "node-b")];
    exercise_tls(&server, "", tls(&ours, "node-a", "node-b"), strangers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_nbd_and_our_client_prove_themselves_by_tls() {
    if !possible("qemu-nbd") {
        return;
    }
    let (ours, others) = (Certificates::new(), Certificates::new());
    let identity = ours.issue("node-b");
    let server = Foreign::start("qemu-nbd", |socket, dir| {
        let image = format!("{dir}/image");
        std::fs::File::create(&image).unwrap().set_len(SIZE as u64).unwrap();
        let creds =
            format!("tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}", identity.display());
        let head = ["--object", &creds, "--tls-creds", "tls0", "-f", "raw", "-x", "vol", "--discard=unmap"];
        let tail = ["--persistent", "-e", "4", "-k", socket, &image];
        head.iter().chain(&tail).map(|&arg| arg.to_owned()).collect()
    })
    .await;
    let strangers = [tls(&ours, "node-x", "node-c"), tls(&others, "node-a", "node-b")];
    exercise_tls(&server, "vol", tls(&ours, "node-a", "node-b"), strangers).await;
}
