//! Bytes as the specification draws them, round trips of random messages, and garbage.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::provider::Extent;

const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];
const ROUNDS: usize = 2_000;

fn mk_random() -> StdRng {
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_260_801);
    println!("replay with HOLDFAST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Small numbers and extreme ones more often than those between.
fn mk_number(random: &mut StdRng) -> u64 {
    match random.random_range(0..4) {
        0 => random.random_range(0..8),
        1 => u64::MAX - random.random_range(0..3),
        2 => 1 << random.random_range(0..64),
        _ => random.random(),
    }
}

fn mk_text(random: &mut StdRng) -> String {
    let len = if random.random_bool(0.05) { 1_300 } else { random.random_range(0..20) };
    (0..len).map(|_| ['a', ':', '/', 'é', '漢', ' '][random.random_range(0..6)]).collect()
}

fn mk_option(random: &mut StdRng) -> ClientOption {
    let texts = |random: &mut StdRng| {
        let count = random.random_range(0..4);
        (0..count).map(|_| mk_text(random)).collect::<Vec<_>>()
    };
    match random.random_range(0..9) {
        0 => ClientOption::ExportName(mk_text(random)),
        1 => ClientOption::Abort,
        2 => ClientOption::List,
        3 => ClientOption::StartTls,
        4 => ClientOption::StructuredReply,
        5 => ClientOption::ExtendedHeaders,
        6 => {
            let count = random.random_range(0..5);
            let wants = (0..count).map(|_| random.random()).collect();
            ClientOption::Open { go: random.random(), name: mk_text(random), wants }
        }
        7 => {
            let (name, queries) = (mk_text(random), texts(random));
            ClientOption::MetaContext { set: random.random(), name, queries }
        }
        _ => ClientOption::Unknown(random.random_range(12..u32::MAX)),
    }
}

#[test]
fn every_option_survives_its_wire_form() {
    let mut random = mk_random();
    for _ in 0..ROUNDS {
        let option = mk_option(&mut random);
        let mut wire = Vec::new();
        option.encode(&mut wire);
        let (head, data) = wire.split_first_chunk().unwrap();
        let header = OptionHeader::decode(head).unwrap();
        assert_eq!(header.len as usize, data.len());
        assert_eq!(header.option, option.number());
        assert_eq!(ClientOption::decode(header.option, data), Ok(option));
    }
}

fn mk_request(random: &mut StdRng, framing: Framing) -> RequestHeader {
    use Command::{BlockStatus, Cache, Disconnect, Flush, Read, Trim, Unknown, Write, WriteZeroes};
    let commands = [
        Read,
        Write,
        Disconnect,
        Flush,
        Trim,
        Cache,
        WriteZeroes,
        BlockStatus,
        Unknown(8),
        Unknown(u16::MAX),
    ];
    let len = mk_number(random);
    RequestHeader {
        flags: random.random(),
        command: commands[random.random_range(0..commands.len())],
        cookie: mk_number(random),
        offset: mk_number(random),
        len: if framing.is_extended() { len } else { len & u64::from(u32::MAX) },
    }
}

#[test]
fn every_request_survives_its_wire_form() {
    let mut random = mk_random();
    for framing in FRAMINGS {
        for _ in 0..ROUNDS {
            let request = mk_request(&mut random, framing);
            let wire = request.encode(framing);
            let decoded = if framing.is_extended() {
                RequestHeader::decode_extended((&*wire).try_into().unwrap())
            } else {
                RequestHeader::decode_compact((&*wire).try_into().unwrap())
            };
            assert_eq!(decoded, Ok(request));
        }
    }
}

#[test]
fn every_reply_survives_its_wire_form() {
    let mut random = mk_random();
    for _ in 0..ROUNDS {
        let (cookie, error) = (mk_number(&mut random), random.random());
        let simple = encode_simple_reply(cookie, error);
        assert_eq!(
            ReplyHeader::decode((&*simple).try_into().unwrap()),
            Ok(ReplyHeader::Simple { error, cookie })
        );

        let (flags, kind, len) = (random.random(), random.random(), mk_number(&mut random));
        let chunk = ChunkHeader { flags, kind, cookie, offset: Some(mk_number(&mut random)), len };
        let wire = chunk.encode(Framing::Extended);
        assert_eq!(ChunkHeader::decode_extended((&*wire).try_into().unwrap()), Ok(chunk));

        let chunk = ChunkHeader { offset: None, len: len & u64::from(u32::MAX), ..chunk };
        let wire = chunk.encode(Framing::Structured);
        let (head, length) = wire.split_first_chunk().unwrap();
        let Ok(ReplyHeader::Chunk(decoded)) = ReplyHeader::decode(head) else { panic!("{chunk:?}") };
        assert_eq!(decoded.with_length(length.try_into().unwrap()), chunk);
    }
}

#[test]
fn every_payload_of_a_chunk_survives_its_wire_form() {
    let mut random = mk_random();
    for framing in [Framing::Structured, Framing::Extended] {
        for _ in 0..ROUNDS {
            let bits = if framing.is_extended() { 63 } else { 31 };
            let extent = |random: &mut StdRng| Extent {
                len: 1 + (mk_number(random) & ((1 << bits) - 1)),
                state: random.random(),
            };
            let count = random.random_range(1..40);
            let extents: Vec<Extent> = (0..count).map(|_| extent(&mut random)).collect();
            let id = random.random();
            let wire = encode_status_chunk(framing, id, &extents);
            assert!(wire.len() as u64 <= status_chunk_bytes_max(framing));
            assert_eq!(decode_status_chunk(framing, &wire), Ok((id, extents)));
        }
    }
    for _ in 0..ROUNDS {
        let (error, text) = (random.random_range(1..=u32::MAX), mk_text(&mut random));
        let expected = text[..text.floor_char_boundary(ERROR_TEXT_BYTES_MAX)].to_owned();
        assert_eq!(decode_error_chunk(&encode_error_chunk(error, &text)), Ok((error, expected)));

        let mut ids: Vec<u32> = (0..random.random_range(1..=CONTEXTS_MAX)).map(|_| random.random()).collect();
        ids.sort_unstable();
        ids.dedup();
        let len = mk_number(&mut random);
        let wire = encode_status_filter(len, &ids);
        assert!(wire.len() <= STATUS_FILTER_BYTES_MAX);
        assert_eq!(decode_status_filter(&wire), Ok((len, ids)));
    }
}

type Encode<'a> = &'a dyn Fn(&mut Vec<u8>);

#[test]
fn every_reply_to_an_option_survives_its_wire_form() {
    let mut random = mk_random();
    let parts = |wire: &[u8]| {
        let (head, data) = wire.split_first_chunk().unwrap();
        let header = OptionReplyHeader::decode(head).unwrap();
        assert_eq!(header.len as usize, data.len());
        (header, data.to_vec())
    };
    for _ in 0..ROUNDS {
        let summary = ExportSummary { size_bytes: mk_number(&mut random), flags: random.random() };
        let min = 1 << random.random_range(0..=16);
        let sizes = BlockSizes { min, preferred: min.max(512), max: random.random_range(1 << 17..=u32::MAX) };
        let (text, id) = (mk_text(&mut random), random.random());
        let encoders: [(Encode<'_>, InfoReply); 4] = [
            (&|out| encode_info_export(out, option::GO, summary), InfoReply::Export(summary)),
            (&|out| encode_info_block_size(out, option::GO, sizes), InfoReply::BlockSizes(sizes)),
            (&|out| encode_info_text(out, option::GO, info::NAME, &text), InfoReply::Name(text.clone())),
            (
                &|out| encode_info_text(out, option::GO, info::DESCRIPTION, &text),
                InfoReply::Description(text.clone()),
            ),
        ];
        for (encode, expected) in encoders {
            let mut wire = Vec::new();
            encode(&mut wire);
            let (header, data) = parts(&wire);
            assert_eq!((header.option, header.kind), (option::GO, reply::INFO));
            assert_eq!(decode_info_reply(&data), Ok(expected));
        }

        let mut wire = Vec::new();
        encode_meta_context_reply(&mut wire, option::SET_META_CONTEXT, id, &text);
        assert_eq!(decode_meta_context_reply(&parts(&wire).1), Ok((id, text.clone())));
        wire.clear();
        encode_server_reply(&mut wire, &text);
        assert_eq!(decode_server_reply(&parts(&wire).1), Ok(text));
        wire.clear();
        encode_export_name_answer(&mut wire, summary, random.random());
        assert_eq!(decode_export_name_answer(*wire.first_chunk().unwrap()), summary);
    }
}

#[test]
fn a_compact_request_has_the_bytes_that_the_specification_draws() {
    let request = RequestHeader {
        flags: command_flag::FUA,
        command: Command::Write,
        cookie: 0x0102_0304_0506_0708,
        offset: 4096,
        len: 512,
    };
    let drawn =
        [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0];
    assert_eq!(*request.encode(Framing::Structured), drawn);
    assert_eq!(request.payload_bytes(Framing::Structured), 512);
}

#[test]
fn an_extended_request_has_the_bytes_that_the_specification_draws() {
    let request = RequestHeader {
        flags: command_flag::FAST_ZERO | command_flag::NO_HOLE,
        command: Command::WriteZeroes,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1000,
        len: 1 << 40,
    };
    let drawn = [
        0x21, 0xe4, 0x1c, 0x71, 0, 0x12, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 1, 0,
        0, 0, 0, 0,
    ];
    assert_eq!(*request.encode(Framing::Extended), drawn);
    assert_eq!(request.payload_bytes(Framing::Extended), 0);
    let write = RequestHeader { flags: command_flag::PAYLOAD_LEN, command: Command::Write, ..request };
    assert_eq!(write.encode(Framing::Extended)[4..8], [0, 0x20, 0, 1]);
    assert_eq!(write.payload_bytes(Framing::Extended), 1 << 40);
}

#[test]
fn an_extended_chunk_has_the_bytes_that_the_specification_draws() {
    let chunk = ChunkHeader {
        flags: chunk_flag::DONE,
        kind: chunk::BLOCK_STATUS_EXT,
        cookie: 0x0102_0304_0506_0708,
        offset: Some(0x2000),
        len: 24,
    };
    let drawn = [
        0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0,
        0, 0, 24,
    ];
    assert_eq!(*chunk.encode(Framing::Extended), drawn);
    let extents = [Extent { len: 1 << 33, state: Extent::HOLE | Extent::ZERO }];
    let drawn = [0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3];
    assert_eq!(encode_status_chunk(Framing::Extended, 7, &extents), drawn);
    assert_eq!(encode_status_filter(1 << 33, &[7]), [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7]);
}

#[test]
fn the_greeting_and_an_option_have_the_bytes_that_the_specification_draws() {
    assert_eq!(&encode_greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
    let mut wire = Vec::new();
    ClientOption::ExtendedHeaders.encode(&mut wire);
    assert_eq!(wire, b"IHAVEOPT\x00\x00\x00\x0b\x00\x00\x00\x00");
    wire.clear();
    encode_option_reply(&mut wire, option::EXTENDED_HEADERS, reply::ERR_EXT_HEADER_REQD, b"x");
    assert_eq!(wire, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x0b\x80\x00\x00\x0a\x00\x00\x00\x01x");
}

#[test]
fn an_extent_that_32_bits_cannot_hold_is_cut_and_ends_the_list() {
    let extents = [Extent { len: 1 << 40, state: 0 }, Extent { len: 4096, state: 3 }];
    let wire = encode_status_chunk(Framing::Structured, 1, &extents);
    let (_, told) = decode_status_chunk(Framing::Structured, &wire).unwrap();
    assert_eq!(told, [Extent { len: 0xfff0_0000, state: 0 }]);
}

#[test]
fn an_option_with_a_length_that_lies_is_refused() {
    let go = |data: &[u8]| ClientOption::decode(option::GO, data);
    assert!(go(&[0, 0, 0, 9, b'a', 0, 0]).is_err(), "name longer than the data");
    assert!(go(&[0, 0, 0, 1, b'a', 0, 2, 0, 3]).is_err(), "fewer requests than counted");
    assert!(go(&[0, 0, 0, 1, b'a', 0, 0, 0]).is_err(), "a byte too many");
    assert!(go(&[0, 0, 0, 1, 0xff, 0, 0]).is_err(), "not UTF-8");
    assert!(go(&[0, 0, 0, 1, 0, 0, 0]).is_err(), "a NUL");
    assert!(go(&[0xff, 0xff, 0xff, 0xff]).is_err(), "a name of 4 GiB");
    let meta = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert!(ClientOption::decode(option::SET_META_CONTEXT, &meta).is_err(), "4 G queries");
    assert!(ClientOption::decode(option::EXTENDED_HEADERS, &[0]).is_err(), "data where none belongs");
    assert_eq!(ClientOption::decode(option::ABORT, &[0]), Ok(ClientOption::Abort), "which this one ignores");
}

#[test]
fn payloads_that_contradict_themselves_are_refused() {
    let status = |framing, data: &[u8]| decode_status_chunk(framing, data);
    assert!(status(Framing::Structured, &[0; 4]).is_err(), "no extent");
    assert!(status(Framing::Structured, &[0; 12]).is_err(), "an empty extent");
    assert!(status(Framing::Structured, &[1; 11]).is_err(), "half an extent");
    let extended = |count: u8, state_high: u8| {
        let mut data = vec![0; 24];
        (data[7], data[15], data[19]) = (count, 1, state_high);
        status(Framing::Extended, &data)
    };
    assert!(extended(1, 0).is_ok());
    assert!(extended(2, 0).is_err(), "one extent less than counted");
    assert!(extended(1, 1).is_err(), "a state of more than 32 bits");
    assert!(decode_status_filter(&[0; 8]).is_err(), "no context");
    assert!(decode_status_filter(&[0; 16]).is_err(), "a context twice");
    assert!(decode_status_filter(&[0; 11]).is_err(), "half a number");
    let many: Vec<u32> = (0..=CONTEXTS_MAX as u32).collect();
    assert!(decode_status_filter(&encode_status_filter(1, &many)).is_err(), "too many contexts");
    assert!(decode_error_chunk(&encode_error_chunk(0, "none")).is_err(), "an error that is none");
    let sizes = |min, preferred, max| BlockSizes { min, preferred, max }.make_sense();
    assert!(sizes(1, 4096, 1 << 25) && sizes(4096, 4096, u32::MAX));
    assert!(!sizes(0, 4096, 1 << 25) && !sizes(3, 4096, 1 << 25) && !sizes(1 << 17, 1 << 17, 1 << 25));
    assert!(!sizes(4096, 512, 1 << 25) && !sizes(1, 4096, 512) && !sizes(1, 100, 512));
}

#[test]
fn unknown_errors_become_eio_in_both_directions() {
    assert_eq!(errno::to_wire(errno::ENOTCONN), 5);
    assert_eq!(errno::to_wire(30), 1);
    assert_eq!(errno::to_wire(errno::ENOSPC), 28);
    assert_eq!(errno::from_wire(u32::MAX), errno::EIO);
    assert_eq!(errno::from_wire(108), errno::ESHUTDOWN);
}

/// Decodes whatever comes: the answers do not matter, panics and wild allocations do.
fn decode_everything(bytes: &[u8]) {
    for option in 0..14 {
        let _ = ClientOption::decode(option, bytes);
    }
    let _ = decode_info_reply(bytes);
    let _ = decode_meta_context_reply(bytes);
    let _ = decode_server_reply(bytes);
    let _ = decode_error_chunk(bytes);
    let _ = decode_status_filter(bytes);
    for framing in FRAMINGS {
        let _ = decode_status_chunk(framing, bytes);
    }
    bytes.first_chunk().map(OptionHeader::decode);
    bytes.first_chunk().map(OptionReplyHeader::decode);
    bytes.first_chunk().map(RequestHeader::decode_compact);
    bytes.first_chunk().map(RequestHeader::decode_extended);
    bytes.first_chunk().map(ReplyHeader::decode);
    bytes.first_chunk().map(ChunkHeader::decode_extended);
}

#[test]
fn garbage_never_panics() {
    let mut random = mk_random();
    for _ in 0..20_000 {
        let mut bytes = vec![0; random.random_range(0..96)];
        random.fill(&mut bytes[..]);
        // Small numbers in length fields reach deeper than random ones.
        for byte in &mut bytes {
            if random.random_bool(0.5) {
                *byte = random.random_range(0..4);
            }
        }
        decode_everything(&bytes);
    }
}
