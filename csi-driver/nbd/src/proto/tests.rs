use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::provider::Extent;

#[test]
fn every_option_survives_its_wire_form() {
    let options = [
        ClientOption::ExportName("vol".into()),
        ClientOption::Abort,
        ClientOption::List,
        ClientOption::StartTls,
        ClientOption::Open { go: true, name: "é".into(), wants: vec![info::BLOCK_SIZE] },
        ClientOption::Open { go: false, name: String::new(), wants: vec![] },
        ClientOption::StructuredReply,
        ClientOption::MetaContext { set: true, name: "x".into(), queries: vec!["base:allocation".into()] },
        ClientOption::MetaContext { set: false, name: "x".into(), queries: vec![] },
        ClientOption::Unknown(99),
    ];
    for option in options {
        let mut wire = Vec::new();
        option.encode(&mut wire);
        let (head, data) = wire.split_first_chunk().unwrap();
        let header = OptionHeader::decode(head).unwrap();
        assert_eq!(header.len as usize, data.len());
        assert_eq!(ClientOption::decode(header.option, data), Ok(option));
    }
}

#[test]
fn a_request_has_the_bytes_that_the_specification_draws() {
    let request = RequestHeader {
        flags: command_flag::FUA,
        command: Command::Write,
        cookie: 0x0102_0304_0506_0708,
        offset: 4096,
        len: 512,
    };
    let wire = request.encode();
    let drawn =
        [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0];
    assert_eq!(wire, drawn);
    assert_eq!(RequestHeader::decode(&wire), Ok(request));
}

#[test]
fn the_greeting_has_the_bytes_that_the_specification_draws() {
    assert_eq!(&encode_greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn replies_survive_their_wire_form() {
    let simple = ReplyHeader::decode(&encode_simple_reply(7, 5)).unwrap();
    assert_eq!(simple, ReplyHeader::Simple { error: 5, cookie: 7 });

    let wire = encode_structured_header(7, chunk::OFFSET_DATA, 4104);
    let (head, length) = wire.split_first_chunk().unwrap();
    let header = ReplyHeader::decode(head).unwrap().with_length(length.try_into().unwrap());
    let expected =
        ReplyHeader::Chunk { flags: chunk_flag::DONE, kind: chunk::OFFSET_DATA, cookie: 7, len: 4104 };
    assert_eq!(header, expected);

    assert_eq!(decode_error_chunk(&encode_error_chunk(28, "full")), Ok((28, "full".into())));
    let extents =
        vec![Extent { len: 4096, hole: true, zero: true }, Extent { len: 8192, hole: false, zero: false }];
    assert_eq!(decode_status_chunk(&encode_status_chunk(3, &extents)), Ok((3, extents)));
}

#[test]
fn an_error_text_that_is_too_long_is_cut_between_characters() {
    let text = "é".repeat(ERROR_TEXT_BYTES_MAX);
    let (_, cut) = decode_error_chunk(&encode_error_chunk(5, &text)).unwrap();
    assert_eq!(cut.len(), ERROR_TEXT_BYTES_MAX);
}

#[test]
fn an_option_with_a_length_that_lies_is_refused() {
    let go = |data: &[u8]| ClientOption::decode(option::GO, data);
    assert!(go(&[0, 0, 0, 9, b'a', 0, 0]).is_err(), "name longer than the data");
    assert!(go(&[0, 0, 0, 1, b'a', 0, 2, 0, 3]).is_err(), "fewer requests than counted");
    assert!(go(&[0, 0, 0, 1, b'a', 0, 0, 0]).is_err(), "a byte too many");
    assert!(go(&[0, 0, 0, 1, 0xff, 0, 0]).is_err(), "not UTF-8");
    assert!(go(&[0xff, 0xff, 0xff, 0xff]).is_err(), "a name of 4 GiB");
    let meta = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert!(ClientOption::decode(option::SET_META_CONTEXT, &meta).is_err(), "4 G queries");
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
    for option in 0..12 {
        let _ = ClientOption::decode(option, bytes);
    }
    let _ = decode_info_reply(bytes);
    let _ = decode_meta_context_reply(bytes);
    let _ = decode_error_chunk(bytes);
    let _ = decode_status_chunk(bytes);
    if let Some((head, _)) = bytes.split_first_chunk() {
        let _ = OptionHeader::decode(head);
    }
    if let Some((head, _)) = bytes.split_first_chunk() {
        let _ = OptionReplyHeader::decode(head);
    }
    if let Some((head, _)) = bytes.split_first_chunk() {
        let _ = RequestHeader::decode(head);
    }
    if let Some((head, _)) = bytes.split_first_chunk() {
        let _ = ReplyHeader::decode(head);
    }
}

#[test]
fn garbage_never_panics() {
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_260_801);
    println!("replay with HOLDFAST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
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
