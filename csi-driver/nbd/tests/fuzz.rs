//! Seeded fuzzing of the server's negotiation and transmission and of the client's decoding.
//!
//! Held: no panic, no hang, no memory beyond the stated limits, whatever the peer sends; what the server answers is well
//! formed; what a client takes for a successful read is what the server sent. Each round has a seed of its own and prints it
//! when it fails. `HOLDFAST_SEED=N` replays one round, `HOLDFAST_FUZZ_SECONDS=N` goes on for so long per test.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
mod fuzzing;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{BLOCK, DIRTY, OneVolume, call, extents, wait};
use fuzzing::chunks::{self, Verdict};
use fuzzing::streams::{check_answers, mangle, mk_session, text};
use holdfast_io::BlockOp;
use holdfast_nbd::proto::{self, Framing, RequestHeader, errno};
use holdfast_nbd::{BASE_ALLOCATION, Client, ClientOptions, Inquiry, Server, ZeroOptions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const SIZE: usize = 4 << 20;
/// No round takes longer: negotiation ends after 10 s, lingering replies after 5.
const ROUND: Duration = Duration::from_secs(20);
/// Virtual memory that this program may have had at its peak: the tests at work, each within a connection's limits.
const PEAK_KIB_MAX: u64 = 4 << 20;

/// Calls `round` with seed after seed.
async fn rounds<F: Future<Output = ()>>(count: u64, round: impl Fn(u64) -> F) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let one = number("HOLDFAST_SEED");
    let until = number("HOLDFAST_FUZZ_SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let first = one.unwrap_or(1_000_000 * u64::from(std::process::id()) * u64::from(until.is_some()));
    for seed in first.. {
        let over = match until {
            Some(until) => Instant::now() >= until,
            None => seed - first >= if one.is_some() { 1 } else { count },
        };
        if over {
            println!("{} rounds", seed - first);
            break;
        }
        let noted = PrintOnPanic(seed);
        tokio::time::timeout(ROUND, round(seed)).await.expect("a round ends");
        std::mem::forget(noted);
    }
    let peak = peak_kib();
    assert!(peak < PEAK_KIB_MAX, "{peak} KiB of memory were mapped");
}

struct PrintOnPanic(u64);

impl Drop for PrintOnPanic {
    fn drop(&mut self) {
        println!("replay with HOLDFAST_SEED={}", self.0);
    }
}

/// Also counts what was allocated and never touched.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn serve(volume: &Arc<OneVolume>) -> (DuplexStream, tokio::task::JoinHandle<()>) {
    let (near, far) = tokio::io::duplex(16 << 10);
    let server = Server::new(volume.clone());
    (near, tokio::spawn(async move { drop(server.serve_connection(far).await) }))
}

/// Sends a whole stream while reading what comes, and gives that.
async fn exchange(stream: DuplexStream, sent: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sending = async {
        let _ = writer.write_all(&sent).await;
        let _ = writer.shutdown().await;
    };
    let mut answers = Vec::new();
    let ((), _) = tokio::join!(sending, reader.read_to_end(&mut answers));
    answers
}

#[tokio::test]
async fn a_server_survives_sessions_that_were_tampered_with_and_answers_in_form() {
    rounds(1_500, |seed| async move {
        let mut random = StdRng::seed_from_u64(seed);
        let volume = OneVolume::new(SIZE);
        let session = mk_session(&mut random, SIZE as u64);
        // Every fourth is left as it is: it must be answered to the last request.
        let tampered = !seed.is_multiple_of(4);
        let sent = if tampered { mangle(&mut random, session.bytes()) } else { session.bytes() };
        let (stream, served) = serve(&volume);
        let answers = exchange(stream, sent).await;
        served.await.expect("no panic");
        assert_eq!(volume.connections.live(), 0);
        let seen = check_answers(&answers);
        if !tampered {
            assert_eq!(seen, session.expected());
        }
    })
    .await;
}

#[tokio::test]
async fn a_server_survives_garbage_at_every_stage() {
    rounds(400, |seed| async move {
        let mut random = StdRng::seed_from_u64(seed);
        let volume = OneVolume::new(SIZE);
        let mut sent = Vec::new();
        if !seed.is_multiple_of(4) {
            sent.extend_from_slice(&[0, 0, 0, 3]);
        }
        if seed % 4 > 1 {
            proto::ClientOption::Open { go: true, name: "vol".into(), wants: vec![] }.encode(&mut sent);
        }
        if seed % 4 > 2 {
            sent.extend_from_slice(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, random.random_range(0..9)]);
        }
        let mut garbage = vec![0; random.random_range(1..2000)];
        random.fill(&mut garbage[..]);
        sent.extend_from_slice(&garbage);
        let (stream, served) = serve(&volume);
        exchange(stream, sent).await;
        served.await.expect("no panic");
        assert_eq!(volume.connections.live(), 0);
    })
    .await;
}

/// A client that does all it can; every question gets an answer, whatever it is.
async fn use_everything(stream: DuplexStream, compact_headers: bool) {
    let contexts = vec![BASE_ALLOCATION.to_owned(), DIRTY.to_owned()];
    let options = ClientOptions { contexts, compact_headers, ..ClientOptions::new("vol") };
    let Ok(client) = Client::connect(stream, options).await else { return };
    let data = Bytes::from(vec![5; 2 * BLOCK]);
    let _ = tokio::join!(
        call(&client, BlockOp::Write { offset: 0, data, fua: true }),
        call(&client, BlockOp::Read { offset: 0, len: 65_536 }),
        call(&client, BlockOp::Flush),
        wait(|done| client.zero(0, SIZE as u64, ZeroOptions::default(), done)),
        wait(|done| client.discard(0, SIZE as u64, false, done)),
        wait(|done| client.cache(0, SIZE as u64, done)),
        extents(&client, BASE_ALLOCATION, 0, SIZE, false),
        extents(&client, DIRTY, 0, SIZE, true),
    );
    let _ = wait(|done| client.read_in_one_piece(0, BLOCK as u32, done)).await;
}

#[tokio::test]
async fn both_sides_survive_a_network_that_changes_bytes() {
    rounds(200, |seed| async move {
        let mut random = StdRng::seed_from_u64(seed);
        let volume = OneVolume::new(SIZE);
        let (near, between) = tokio::io::duplex(16 << 10);
        let (server_end, served) = serve(&volume);
        let spoils_answers = random.random_bool(0.7);
        let at = random.random_range(0..700);
        let relay = tokio::spawn(fuzzing::relay(between, server_end, spoils_answers, at, seed));
        use_everything(near, random.random()).await;
        relay.abort();
        let _ = relay.await;
        served.await.expect("no panic");
        assert_eq!(volume.connections.live(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_client_survives_a_server_that_says_anything_during_negotiation() {
    rounds(800, |seed| async move {
        let mut random = StdRng::seed_from_u64(seed);
        let mut sent = proto::encode_greeting().to_vec();
        for option in [11, 8, 10, 7, 3, 9, 6] {
            for _ in 0..random.random_range(0..3) {
                let mut data = vec![0; random.random_range(0..40)];
                random.fill(&mut data[..]);
                if random.random_bool(0.5) {
                    data = text(&mut random).into_bytes();
                }
                let kind = [1, 2, 3, 4, 1 << 31 | 1, random.random()][random.random_range(0..6)];
                proto::encode_option_reply(&mut sent, option, kind, &data);
            }
            if random.random_bool(0.8) {
                proto::encode_option_reply(&mut sent, option, proto::reply::ACK, &[]);
            }
        }
        let sent = if random.random() { mangle(&mut random, sent) } else { sent };
        let (near, mut far) = tokio::io::duplex(16 << 10);
        let server = tokio::spawn(async move {
            let _ = far.write_all(&sent).await;
            let _ = far.shutdown().await;
            let _ = far.read_to_end(&mut Vec::new()).await;
        });
        if random.random() {
            use_everything(near, random.random()).await;
        } else if let Ok(mut inquiry) = Inquiry::begin(near, None).await {
            let _ = inquiry.exports().await;
            let _ = inquiry.contexts("vol", &["base:"]).await;
            let _ = inquiry.info("vol").await;
        }
        server.await.unwrap();
    })
    .await;
}

/// What a client makes of a reply in chunks agrees with a naive reading of the specification.
#[tokio::test]
async fn a_read_gives_what_the_chunks_say_or_fails() {
    rounds(3_000, |seed| async move {
        let mut random = StdRng::seed_from_u64(seed);
        let framing = if random.random() { Framing::Extended } else { Framing::Structured };
        let (near, far) = tokio::io::duplex(64 << 10);
        let (offset, len) = (u64::from(random.random_range(0..4_u32)) * 4096, chunks::READ_BYTES);
        let server = tokio::spawn(async move {
            let mut far = fuzzing::accept(far, framing).await;
            let request = read_request(&mut far, framing).await;
            let reply = chunks::mk_reply(&mut random, request.offset, framing, request.cookie);
            let _ = far.write_all(&reply.bytes).await;
            // Whatever the client made of it, it may not have taken it for two replies.
            let _ = far.shutdown().await;
            let _ = far.read_to_end(&mut Vec::new()).await;
            reply.verdict
        });
        let compact_headers = framing == Framing::Structured;
        let options = ClientOptions { compact_headers, ..ClientOptions::new("vol") };
        let client = Client::connect(near, options).await.unwrap();
        let answer = call(&client, BlockOp::Read { offset, len }).await;
        drop(client);
        match server.await.unwrap() {
            Verdict::Data(data) => assert!(answer.expect("a good reply") == data),
            Verdict::Error(errno) => assert_eq!(answer.unwrap_err().0, errno),
            Verdict::Broken => assert_eq!(answer.unwrap_err().0, errno::ENOTCONN),
        }
    })
    .await;
}

async fn read_request(stream: &mut DuplexStream, framing: Framing) -> RequestHeader {
    if framing.is_extended() {
        let mut bytes = [0; RequestHeader::EXTENDED_BYTES];
        stream.read_exact(&mut bytes).await.unwrap();
        return RequestHeader::decode_extended(&bytes).unwrap();
    }
    let mut bytes = [0; RequestHeader::COMPACT_BYTES];
    stream.read_exact(&mut bytes).await.unwrap();
    RequestHeader::decode_compact(&bytes).unwrap()
}
