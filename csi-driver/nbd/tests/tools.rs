//! Real NBD clients against our server, over Unix sockets and over TLS on loopback. A tool that is not installed skips
//! visibly.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use common::tools::{Certificates, outcome, possible, run};
use common::{BLOCK, DIRTY, Listening, OneVolume, call};
use holdfast_io::BlockOp;
use holdfast_nbd::{Client, ClientOptions, PeerIdentity, ServeError, Server, ServerTls, TlsIdentity};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const SIZE: usize = 16 << 20;

fn fio_speaks_nbd() -> bool {
    let engines = Command::new("fio").arg("--enghelp").output().unwrap();
    let speaks = String::from_utf8_lossy(&engines.stdout).contains("nbd");
    if !speaks {
        println!("SKIP: this fio has no nbd engine");
    }
    speaks
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
        DIRTY,
        "can_cache: true",
        "can_fast_zero: true",
        "description: a volume in memory",
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
async fn nbdinfo_maps_what_an_absent_replica_lacks() {
    if !possible("nbdinfo") {
        return;
    }
    let server = Listening::start(4 << 20);
    let map = run("nbdinfo", &[&format!("--map={DIRTY}"), &server.uri("vol")]).await;
    let fields: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    let mib = |index: u64| (index << 20).to_string();
    let expected: Vec<[String; 3]> =
        (0..4).map(|index| [mib(index), mib(1), (1 - index % 2).to_string()]).collect();
    assert_eq!(fields, expected, "{map}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_maps_what_is_allocated() {
    if !possible("nbdinfo") {
        return;
    }
    let server = Listening::start(SIZE);
    let stream = UnixStream::connect(&server.socket).await.unwrap();
    let client = Client::connect(stream, ClientOptions::new("vol")).await.unwrap();
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
    if !fio_speaks_nbd() {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdkit_passes_our_export_on() {
    if !possible("nbdkit") || !possible("nbdinfo") {
        return;
    }
    let server = Listening::start(SIZE);
    let uri = format!("uri={}", server.uri("vol"));
    let through =
        ["--exit-with-parent", "-U", "-", "nbd", &uri, "--run", "nbdinfo --size $uri && nbdinfo --map $uri"];
    let told = run("nbdkit", &through).await;
    assert!(told.starts_with("16777216\n"), "{told}");
    assert!(told.contains("hole,zero"), "{told}");
}

/// Our server on loopback TCP with TLS required, as "node-b".
struct TlsListening {
    volume: Arc<OneVolume>,
    port: u16,
    ended: UnboundedReceiver<Result<(), ServeError>>,
}

impl TlsListening {
    async fn start(identity: &Path) -> Self {
        let volume = OneVolume::new(SIZE);
        let config = TlsIdentity::load(identity).unwrap().server_config().unwrap();
        let server = Server::new(volume.clone()).with_tls(ServerTls { config, required: true });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, ended) = unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (server, sender) = (server.clone(), sender.clone());
                tokio::spawn(async move { sender.send(server.serve_connection(stream).await) });
            }
        });
        Self { volume, port, ended }
    }

    /// `nbds://` with the certificates of `client`.
    fn uri(&self, client: &Path) -> String {
        format!("nbds://localhost:{}/vol?tls-certificates={}", self.port, client.display())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_s_tools_prove_themselves_by_tls() {
    if !possible("nbdcopy") || !possible("nbdinfo") {
        return;
    }
    let (ours, others) = (Certificates::new(), Certificates::new());
    let mut server = TlsListening::start(&ours.issue("node-b")).await;
    let (client, stranger) = (ours.issue("node-a"), others.issue("node-a"));
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::write(&source, pattern(SIZE)).unwrap();
    run("nbdcopy", &["--connections=2", "--flush", source.to_str().unwrap(), &server.uri(&client)]).await;
    assert!(server.volume.device.bytes() == pattern(SIZE));
    let node_a = |peer: &PeerIdentity| peer.is_named("node-a");
    assert!(server.volume.peers.lock().unwrap().iter().all(node_a), "the client's certificate names it");

    let asked = server.volume.peers.lock().unwrap().len();
    let plain = format!("nbd://localhost:{}/vol", server.port);
    for uri in [server.uri(&stranger), plain] {
        let (succeeded, text) = outcome("nbdinfo", &["--size", &uri]).await;
        assert!(!succeeded && !text.is_empty(), "{uri}: {text}");
    }
    assert_eq!(server.volume.peers.lock().unwrap().len(), asked, "neither came as far as an export");
    let mut tls_errors = 0;
    while let Ok(ended) = server.ended.try_recv() {
        tls_errors += usize::from(matches!(ended, Err(ServeError::Tls(_))));
    }
    assert!(tls_errors >= 1, "the stranger is told apart from a lost connection");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_proves_itself_by_tls() {
    if !possible("qemu-img") {
        return;
    }
    let ours = Certificates::new();
    let server = TlsListening::start(&ours.issue("node-b")).await;
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::write(&source, pattern(SIZE)).unwrap();
    let creds = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", ours.issue("node-a").display());
    let image = format!(
        "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={},export=vol,tls-creds=tls0,tls-hostname=node-b",
        server.port
    );
    let options = ["--object", &creds, "-n", "-f", "raw", "--target-image-opts"];
    let args: Vec<&str> =
        ["convert"].iter().chain(&options).copied().chain([source.to_str().unwrap(), &image]).collect();
    run("qemu-img", &args).await;
    assert!(server.volume.device.bytes() == pattern(SIZE));
}
