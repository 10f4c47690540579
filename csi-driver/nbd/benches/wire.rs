//! Cost of the wire format: what each request and reply pays beside its data.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use holdfast_nbd::Extent;
use holdfast_nbd::proto::{
    self, ChunkHeader, ClientOption, Command, Framing, ReplyHeader, RequestHeader, chunk, chunk_flag,
    command_flag,
};

fn requests(bench: &mut Criterion) {
    let request = RequestHeader { flags: 0, command: Command::Read, cookie: 7, offset: 1 << 30, len: 4096 };
    for framing in [Framing::Structured, Framing::Extended] {
        let wire = request.encode(framing);
        bench.bench_function(&format!("encode request/{framing:?}"), |b| {
            b.iter(|| black_box(request).encode(framing));
        });
        bench.bench_function(&format!("decode request/{framing:?}"), |b| {
            if framing.is_extended() {
                let bytes = (&*wire).try_into().unwrap();
                b.iter(|| RequestHeader::decode_extended(black_box(bytes)));
            } else {
                let bytes = (&*wire).try_into().unwrap();
                b.iter(|| RequestHeader::decode_compact(black_box(bytes)));
            }
        });
    }
    let write = RequestHeader { flags: command_flag::PAYLOAD_LEN, command: Command::Write, ..request };
    bench.bench_function("payload of a request", |b| {
        b.iter(|| black_box(write).payload_bytes(Framing::Extended));
    });
}

fn replies(bench: &mut Criterion) {
    let header = ChunkHeader {
        flags: chunk_flag::DONE,
        kind: chunk::OFFSET_DATA,
        cookie: 7,
        offset: Some(1 << 30),
        len: 4104,
    };
    for framing in [Framing::Structured, Framing::Extended] {
        let wire = header.encode(framing);
        bench.bench_function(&format!("encode chunk/{framing:?}"), |b| {
            b.iter(|| black_box(header).encode(framing));
        });
        bench.bench_function(&format!("decode chunk/{framing:?}"), |b| {
            if framing.is_extended() {
                let bytes = (&*wire).try_into().unwrap();
                b.iter(|| ChunkHeader::decode_extended(black_box(bytes)));
            } else {
                let bytes = wire.first_chunk().unwrap();
                b.iter(|| ReplyHeader::decode(black_box(bytes)));
            }
        });
    }
}

fn extents(bench: &mut Criterion) {
    for count in [16, proto::STATUS_EXTENTS_MAX] {
        let extents: Vec<Extent> =
            (0..count).map(|index| Extent { len: 4096, state: u32::try_from(index % 4).unwrap() }).collect();
        for framing in [Framing::Structured, Framing::Extended] {
            let wire = proto::encode_status_chunk(framing, 1, &extents);
            bench.bench_function(&format!("encode {count} extents/{framing:?}"), |b| {
                b.iter(|| proto::encode_status_chunk(framing, 1, black_box(&extents)));
            });
            bench.bench_function(&format!("decode {count} extents/{framing:?}"), |b| {
                b.iter(|| proto::decode_status_chunk(framing, black_box(&wire)));
            });
        }
    }
}

fn options(bench: &mut Criterion) {
    let queries = vec!["base:allocation".to_owned(), "x-holdfast:dirty:0123456789abcdef".to_owned()];
    let option = ClientOption::MetaContext { set: true, name: "volume/replica/token".to_owned(), queries };
    let mut wire = Vec::new();
    option.encode(&mut wire);
    bench.bench_function("encode option", |b| {
        b.iter(|| {
            let mut out = Vec::with_capacity(wire.len());
            black_box(&option).encode(&mut out);
            out
        });
    });
    let data = &wire[proto::OptionHeader::BYTES..];
    bench.bench_function("decode option", |b| {
        b.iter(|| ClientOption::decode(option.number(), black_box(data)));
    });
}

criterion_group!(wire, requests, replies, extents, options);
criterion_main!(wire);
