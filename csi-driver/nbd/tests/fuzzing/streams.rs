//! What clients send, valid and tampered with, and what servers answer.

use holdfast_nbd::proto::{
    self, ChunkHeader, ClientOption, Command, Framing, OptionReplyHeader, ReplyHeader, RequestHeader, chunk,
    command_flag, option, reply,
};
use rand::Rng;
use rand::rngs::StdRng;

/// A whole session of a client, from its first byte.
pub struct Session {
    messages: Vec<Vec<u8>>,
    /// Replies to options, then to requests, that a server owes for it.
    options: usize,
    requests: usize,
}

/// What a server's answers were made of.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answers {
    pub options: usize,
    pub replies: usize,
}

impl Session {
    pub fn bytes(&self) -> Vec<u8> {
        self.messages.concat()
    }

    pub fn expected(&self) -> Answers {
        Answers { options: self.options, replies: self.requests }
    }
}

pub fn text(random: &mut StdRng) -> String {
    ["vol", "ro", "slow", "", "nothing", "secret", "base:allocation", "base:", "x-holdfast:dirty:0123", "é"]
        [random.random_range(0..10)]
    .to_owned()
}

fn mk_option(random: &mut StdRng) -> ClientOption {
    let queries = |random: &mut StdRng| {
        let count = random.random_range(0..4);
        (0..count).map(|_| text(random)).collect::<Vec<_>>()
    };
    match random.random_range(0..8) {
        0 => ClientOption::List,
        1 => ClientOption::StartTls,
        2 => ClientOption::StructuredReply,
        3 => ClientOption::Unknown(random.random_range(12..99)),
        4 => ClientOption::Open { go: false, name: text(random), wants: vec![0, 1, 2, 3, 77] },
        _ => {
            let (name, queries) = (text(random), queries(random));
            ClientOption::MetaContext { set: random.random(), name, queries }
        }
    }
}

/// Options that change nothing, an agreement, an export, and requests of every kind.
pub fn mk_session(random: &mut StdRng, size_bytes: u64) -> Session {
    let framing = [Framing::Structured, Framing::Extended][random.random_range(0..2)];
    let mut options: Vec<ClientOption> = (0..random.random_range(0..6)).map(|_| mk_option(random)).collect();
    options.push(match framing {
        Framing::Extended => ClientOption::ExtendedHeaders,
        Framing::Structured | Framing::Simple => ClientOption::StructuredReply,
    });
    let queries = vec!["base:allocation".to_owned(), "x-holdfast:dirty:0123".to_owned()];
    options.push(ClientOption::MetaContext { set: true, name: "vol".to_owned(), queries });
    options.push(ClientOption::Open { go: true, name: "vol".to_owned(), wants: vec![3] });

    let mut messages = vec![vec![0, 0, 0, 3]];
    for option in &options {
        let mut wire = Vec::new();
        option.encode(&mut wire);
        messages.push(wire);
    }
    let requests = random.random_range(0..20);
    for cookie in 0..requests {
        messages.push(mk_request(random, framing, cookie, size_bytes));
    }
    let bye = RequestHeader { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, len: 0 };
    messages.push(bye.encode(framing).to_vec());
    Session { messages, options: options.len(), requests: requests as usize }
}

/// A request that is well formed, though not always sensible, with its payload.
fn mk_request(random: &mut StdRng, framing: Framing, cookie: u64, size_bytes: u64) -> Vec<u8> {
    use Command::{BlockStatus, Cache, Flush, Read, Trim, Unknown, Write, WriteZeroes};
    let command =
        [Read, Write, Flush, Trim, Cache, WriteZeroes, BlockStatus, Unknown(9)][random.random_range(0..8)];
    let block = 4096;
    let offset = random.random_range(0..=size_bytes / block) * block;
    let len = match random.random_range(0..6) {
        0 => 0,
        1 => size_bytes,
        2 => random.random_range(0..10_000),
        _ => random.random_range(1..16) * block,
    };
    let mut request = RequestHeader { flags: 0, command, cookie, offset, len };
    if random.random_bool(0.3) {
        request.flags = 1 << random.random_range(0..8) & !command_flag::PAYLOAD_LEN;
    }
    let mut payload = Vec::new();
    if command == Write && (framing.is_extended() || len > 0) {
        request.len = request.len.min(256 << 10);
        payload = vec![7; request.len as usize];
        if framing.is_extended() && request.len > 0 {
            request.flags |= command_flag::PAYLOAD_LEN;
        }
    } else if framing.is_extended() && random.random_bool(0.3) {
        let ids: Vec<u32> = (0..random.random_range(1..30)).map(|_| random.random_range(0..4)).collect();
        payload = proto::encode_status_filter(len, &ids);
        request.len = payload.len() as u64;
        request.flags |= command_flag::PAYLOAD_LEN;
    }
    let mut wire = request.encode(framing).to_vec();
    wire.extend_from_slice(&payload);
    wire
}

/// Changes a stream in a few places.
pub fn mangle(random: &mut StdRng, mut bytes: Vec<u8>) -> Vec<u8> {
    for _ in 0..random.random_range(1..5) {
        if bytes.is_empty() {
            break;
        }
        // The first kilobytes hold the headers; later ones mostly data.
        let reach = if random.random() { bytes.len() } else { bytes.len().min(600) };
        let at = random.random_range(0..reach);
        match random.random_range(0..6) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = random.random(),
            2 => bytes[at] = [0, 0xff][random.random_range(0..2)],
            3 => bytes.truncate(at),
            4 => {
                bytes.remove(at);
            }
            _ => {
                let end = (at + random.random_range(1..40)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
    bytes
}

/// Checks that answers are a greeting, replies to options, and replies in one framing, the last of them perhaps cut off.
/// Where simple replies begin the rest is not looked at: their length is known to their reader only.
pub fn check_answers(mut bytes: &[u8]) -> Answers {
    let mut answers = Answers::default();
    let greeting = proto::encode_greeting();
    assert!(bytes.starts_with(&greeting) || greeting.starts_with(bytes), "no greeting");
    bytes = bytes.get(greeting.len()..).unwrap_or_default();
    while let Some((head, rest)) = bytes.split_first_chunk()
        && let Ok(header) = OptionReplyHeader::decode(head)
    {
        let data = &rest[..header.len as usize];
        assert!(header.len <= 16 << 10, "{header:?}");
        match header.kind {
            reply::INFO => drop(proto::decode_info_reply(data).expect("information")),
            reply::META_CONTEXT => drop(proto::decode_meta_context_reply(data).expect("a context")),
            reply::SERVER => drop(proto::decode_server_reply(data).expect("an export")),
            _ => {
                assert!(header.is_error() || header.kind == reply::ACK, "{header:?}");
                answers.options += 1;
            }
        }
        bytes = &rest[header.len as usize..];
        if header.option == option::ABORT {
            assert!(bytes.is_empty());
        }
    }
    check_replies(bytes, &mut answers);
    answers
}

fn check_replies(mut bytes: &[u8], answers: &mut Answers) {
    let mut framing = None;
    while bytes.len() >= 16 {
        let (header, used, this) = match ReplyHeader::decode(bytes.first_chunk().unwrap()) {
            Ok(ReplyHeader::Chunk(header)) => {
                let length = bytes[16..20].try_into().unwrap();
                (header.with_length(length), 20, Framing::Structured)
            }
            Ok(ReplyHeader::Simple { .. }) => return,
            // After NBD_OPT_EXPORT_NAME a size comes first.
            Err(_) => match bytes.first_chunk().map(ChunkHeader::decode_extended) {
                Some(Ok(header)) => (header, 32, Framing::Extended),
                _ => return,
            },
        };
        assert_eq!(*framing.get_or_insert(this), this, "one framing for all");
        let data = &bytes[used..used + header.len as usize];
        match header.kind {
            chunk::NONE => assert!(header.len == 0 && header.is_last()),
            chunk::OFFSET_DATA => assert!(header.len > 8),
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                let (id, extents) = proto::decode_status_chunk(this, data).expect("extents");
                assert!((1..=2).contains(&id) && !extents.is_empty());
            }
            chunk::ERROR => drop(proto::decode_error_chunk(data).expect("an error")),
            kind => panic!("a chunk of kind {kind}"),
        }
        answers.replies += usize::from(header.is_last());
        bytes = &bytes[used + header.len as usize..];
    }
    assert!(bytes.len() < 16 || answers.replies > 0);
}
