//! Makers and judges of streams for the fuzz tests.

pub mod chunks;
pub mod streams;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use holdfast_nbd::proto::{self, Framing, option, reply};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// The relay hangs up when nothing has passed for so long: a changed length may have both sides wait for the other.
const QUIET: Duration = Duration::from_millis(25);

/// Carries bytes both ways and changes some of one way's from byte `at` on.
pub async fn relay(client: DuplexStream, server: DuplexStream, spoils_answers: bool, at: usize, seed: u64) {
    let (client_reader, client_writer) = tokio::io::split(client);
    let (server_reader, server_writer) = tokio::io::split(server);
    let (answers_at, requests_at) = if spoils_answers { (at, usize::MAX) } else { (usize::MAX, at) };
    let passed = AtomicUsize::new(0);
    let carrying = async {
        tokio::join!(
            carry(client_reader, server_writer, requests_at, seed, &passed),
            carry(server_reader, client_writer, answers_at, seed, &passed)
        );
    };
    let quiet = async {
        let mut before = usize::MAX;
        while before != passed.load(Ordering::Relaxed) {
            before = passed.load(Ordering::Relaxed);
            tokio::time::sleep(QUIET).await;
        }
    };
    tokio::select! {
        () = carrying => {}
        () = quiet => {}
    }
}

async fn carry<R, W>(mut from: R, mut to: W, spoil_at: usize, seed: u64, total: &AtomicUsize)
where
    R: tokio::io::AsyncRead + Unpin,
    W: tokio::io::AsyncWrite + Unpin,
{
    let mut random = StdRng::seed_from_u64(seed ^ 0x5eed);
    let mut passed = 0;
    let mut buffer = [0; 4096];
    while let Ok(got @ 1..) = from.read(&mut buffer).await {
        for (index, byte) in buffer[..got].iter_mut().enumerate() {
            if passed + index == spoil_at || (passed + index > spoil_at && random.random_bool(0.002)) {
                *byte = [*byte ^ 1 << random.random_range(0..8), 0, 0xff, random.random()]
                    [random.random_range(0..4)];
            }
        }
        passed += got;
        total.fetch_add(got, Ordering::Relaxed);
        if to.write_all(&buffer[..got]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// A server's side of a negotiation that gives any export, as small as can be.
pub async fn accept(mut stream: DuplexStream, framing: Framing) -> DuplexStream {
    stream.write_all(&proto::encode_greeting()).await.unwrap();
    stream.read_exact(&mut [0; 4]).await.unwrap();
    loop {
        let mut head = [0; proto::OptionHeader::BYTES];
        stream.read_exact(&mut head).await.unwrap();
        let header = proto::OptionHeader::decode(&head).unwrap();
        stream.read_exact(&mut vec![0; header.len as usize]).await.unwrap();
        let mut answer = Vec::new();
        let known = match header.option {
            option::EXTENDED_HEADERS => framing.is_extended(),
            option::STRUCTURED_REPLY => framing.has_chunks(),
            option::GO => {
                let summary = proto::ExportSummary { size_bytes: 1 << 20, flags: 1 };
                proto::encode_info_export(&mut answer, header.option, summary);
                true
            }
            _ => false,
        };
        let kind = if known { reply::ACK } else { reply::ERR_UNSUP };
        proto::encode_option_reply(&mut answer, header.option, kind, &[]);
        stream.write_all(&answer).await.unwrap();
        if header.option == option::GO {
            return stream;
        }
    }
}
