//! Real NBD clients and a real NBD server against ours, over Unix sockets. A tool that is not installed skips visibly.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use common::{BLOCK, Listening, call};
use holdfast_io::BlockOp;
use holdfast_nbd::{Client, ClientOptions};
use tokio::net::UnixStream;

const SIZE: usize = 16 << 20;

fn possible(tool: &str) -> bool {
    let found =
        ["/usr/bin", "/usr/sbin", "/usr/local/bin"].iter().any(|dir| Path::new(dir).join(tool).exists());
    if !found {
        println!("SKIP: {tool} is not installed");
    }
    found
}

/// Runs a tool, gives what it printed, and fails unless it succeeds.
async fn run(program: &str, args: &[&str]) -> String {
    let mut command = tokio::process::Command::new(program);
    let running = command.args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    let output =
        tokio::time::timeout(Duration::from_secs(60), running).await.expect("the tool ends").unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index / BLOCK * 31 + index) as u8 | 1).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_reads_the_export_as_we_mean_it() {
    if !possible("nbdinfo") {
        return;
    }
    let server = Listening::start(SIZE);
    let told = run("nbdinfo", &[&server.uri("vol")]).await;
    for wanted in [
        "newstyle-fixed",
        "export-size: 16777216",
        "base:allocation",
        "is_read_only: false",
        "can_multi_conn: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_df: true",
        "block_size_minimum: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(told.contains(wanted), "{wanted} is missing in {told}");
    }
    assert!(run("nbdinfo", &[&server.uri("ro")]).await.contains("is_read_only: true"));
    let list = run("nbdinfo", &["--list", &server.uri("")]).await;
    assert!(list.contains("export=\"vol\"") && list.contains("export=\"ro\""), "{list}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_maps_what_is_allocated() {
    if !possible("nbdinfo") {
        return;
    }
    let server = Listening::start(SIZE);
    let stream = UnixStream::connect(&server.socket).await.unwrap();
    let client =
        Client::connect(stream, ClientOptions { export: "vol".into(), ..Default::default() }).await.unwrap();
    let data = Bytes::from(vec![1; BLOCK]);
    call(&client, BlockOp::Write { offset: 1 << 20, data, fua: false }).await.unwrap();
    let map = run("nbdinfo", &["--map", &server.uri("vol")]).await;
    let fields: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(
        fields,
        [["0", "1048576", "3"], ["1048576", "4096", "0"], ["1052672", "15724544", "3"]],
        "{map}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_round_trips_over_several_connections() {
    if !possible("nbdcopy") {
        return;
    }
    let server = Listening::start(SIZE);
    let (source, back) = (server.dir().join("source"), server.dir().join("back"));
    std::fs::write(&source, pattern(SIZE)).unwrap();
    run("nbdcopy", &["--connections=4", "--flush", source.to_str().unwrap(), &server.uri("vol")]).await;
    assert!(server.volume.device.bytes() == pattern(SIZE));
    assert!(server.volume.device.flushes.load(Ordering::Relaxed) > 0);
    run("nbdcopy", &["--connections=4", &server.uri("vol"), back.to_str().unwrap()]).await;
    assert!(std::fs::read(&back).unwrap() == pattern(SIZE));
    server.volume.connections.wait_drained().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_converts_and_compares() {
    if !possible("qemu-img") {
        return;
    }
    let server = Listening::start(SIZE);
    let source = server.dir().join("source");
    let mut content = pattern(SIZE);
    content[4 << 20..6 << 20].fill(0);
    std::fs::write(&source, &content).unwrap();
    let (source, uri) = (source.to_str().unwrap(), server.uri("vol"));
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]).await;
    assert!(server.volume.device.bytes() == content);
    let compared = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]).await;
    assert!(compared.contains("Images are identical"), "{compared}");
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]).await;
    assert!(map.contains("\"zero\": true") && map.contains("\"zero\": false"), "{map}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_writes_zeroes_discards_and_forces() {
    if !possible("qemu-io") {
        return;
    }
    let server = Listening::start(SIZE);
    let commands = [
        "write -P 0x5a 0 64k",
        "write -f -P 0x5b 64k 64k",
        "write -z 0 4k",
        "write -z -u 4k 4k",
        "discard 8k 4k",
        "flush",
        "read -P 0 0 12k",
        "read -P 0x5a 12k 52k",
        "read -P 0x5b 64k 64k",
    ];
    let uri = server.uri("vol");
    let mut args = vec!["-f", "raw", "-t", "none"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(&uri);
    let told = run("qemu-io", &args).await;
    assert!(!told.contains("failed") && !told.contains("error"), "{told}");
    let device = &server.volume.device;
    assert!(device.fuas.load(Ordering::Relaxed) >= 1, "-f is FUA");
    assert!(device.flushes.load(Ordering::Relaxed) >= 1);
    assert_eq!(device.zeroes.load(Ordering::Relaxed), 1, "-z alone keeps the space (NO_HOLE)");
    assert!(device.trims.load(Ordering::Relaxed) >= 2, "-z -u and discard may give it back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fio_verifies_what_it_wrote_at_depth_32() {
    if !possible("fio") {
        return;
    }
    let engines = Command::new("fio").arg("--enghelp").output().unwrap();
    if !String::from_utf8_lossy(&engines.stdout).contains("nbd") {
        println!("SKIP: this fio has no nbd engine");
        return;
    }
    let server = Listening::start(SIZE);
    let uri = format!("--uri={}", server.uri("vol"));
    let args = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--size=16m",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--output-format=terse",
    ];
    let args: Vec<&str> = args.to_vec();
    let dir = server.dir().to_owned();
    let mut command = tokio::process::Command::new("fio");
    let running = command.args(&args).current_dir(dir).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(60), running).await.expect("fio ends").unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(server.volume.device.bytes().chunks(BLOCK).all(|block| block.iter().any(|byte| *byte != 0)));
}

/// Our client against another server: qemu's, which sends holes and several chunks in one reply.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_speaks_to_qemu_nbd() {
    if !possible("qemu-nbd") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("sock"));
    std::fs::File::create(&image).unwrap().set_len(SIZE as u64).unwrap();
    let mut command = tokio::process::Command::new("qemu-nbd");
    command
        .args(["-f", "raw", "-x", "vol", "--discard=unmap", "--persistent", "-k"])
        .arg(&socket)
        .arg(&image);
    let mut process = command.kill_on_drop(true).spawn().unwrap();
    for _ in 0..500 {
        if socket.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let stream = UnixStream::connect(&socket).await.unwrap();
    let options = ClientOptions { export: "vol".into(), block_status: true, ..Default::default() };
    let client = Client::connect(stream, options).await.unwrap();
    assert!(client.info().block_status);
    let data = Bytes::from(vec![7; 64 * BLOCK]);
    call(&client, BlockOp::Write { offset: 1 << 20, data, fua: true }).await.unwrap();
    call(
        &client,
        BlockOp::Zero {
            offset: (1 << 20) + 16 * BLOCK as u64,
            len: 16 * BLOCK as u64,
            fua: false,
            trim: true,
        },
    )
    .await
    .unwrap();
    call(&client, BlockOp::Flush).await.unwrap();
    let back = call(&client, BlockOp::Read { offset: 0, len: 4 << 20 }).await.unwrap();
    let mut expected = vec![0; 4 << 20];
    expected[1 << 20..(1 << 20) + 64 * BLOCK].fill(7);
    expected[(1 << 20) + 16 * BLOCK..(1 << 20) + 32 * BLOCK].fill(0);
    assert!(back == expected);
    let (sender, receiver) = tokio::sync::oneshot::channel();
    client.block_status(0, 4 << 20, Box::new(move |result| drop(sender.send(result))));
    let extents = receiver.await.unwrap().unwrap();
    assert!(extents[0].hole && extents[0].zero && extents.len() >= 3, "{extents:?}");
    drop(client);
    process.kill().await.unwrap();
}
