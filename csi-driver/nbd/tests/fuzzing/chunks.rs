//! Replies to one read, in chunks that fit or do not, and what the specification makes of them.

use holdfast_nbd::proto::{self, ChunkHeader, Framing, chunk, chunk_flag, errno};
use rand::Rng;
use rand::rngs::StdRng;

/// Length of the read that is answered.
pub const READ_BYTES: u32 = 16 << 10;

/// What a client must make of a reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The read succeeds with this.
    Data(Vec<u8>),
    /// It fails with the server's error.
    Error(i32),
    /// The server broke the protocol: the connection ends.
    Broken,
}

/// A reply and its verdict.
pub struct Reply {
    pub bytes: Vec<u8>,
    pub verdict: Verdict,
}

/// Puts chunks together as the specification says, byte by byte.
struct Judge {
    data: Vec<Option<u8>>,
    error: Option<i32>,
    broken: bool,
}

impl Judge {
    fn content(&mut self, at: i64, content: &[u8]) {
        if content.is_empty() {
            self.broken = true;
        }
        for (index, byte) in (at..).zip(content) {
            let place = usize::try_from(index).ok().and_then(|index| self.data.get_mut(index));
            match place {
                Some(place @ None) => *place = Some(*byte),
                Some(Some(_)) | None => self.broken = true,
            }
        }
    }

    fn verdict(self, ended: bool) -> Verdict {
        if self.broken || !ended {
            return Verdict::Broken;
        }
        if let Some(errno) = self.error {
            return Verdict::Error(errno);
        }
        let whole: Option<Vec<u8>> = self.data.into_iter().collect();
        whole.map_or(Verdict::Broken, Verdict::Data)
    }
}

/// Cuts the read into pieces, sends them in any order, and lets some go wrong.
pub fn mk_reply(random: &mut StdRng, offset: u64, framing: Framing, cookie: u64) -> Reply {
    let mut pieces = mk_pieces(random);
    let spoiled = random.random_bool(0.5);
    if spoiled {
        spoil(random, &mut pieces);
    }
    let mut judge = Judge { data: vec![None; READ_BYTES as usize], error: None, broken: false };
    let mut bytes = Vec::new();
    let last = pieces.len().saturating_sub(1);
    let closing_chunk = pieces.is_empty() || random.random();
    for (index, piece) in pieces.into_iter().enumerate() {
        let flags = if index == last && !closing_chunk { chunk_flag::DONE } else { 0 };
        let (kind, payload) = piece.encode(offset);
        let other_offset = framing.is_extended() && spoiled && random.random_bool(0.03);
        let told = if other_offset { offset + 4096 } else { offset };
        let header = ChunkHeader { flags, kind, cookie, offset: Some(told), len: payload.len() as u64 };
        bytes.extend_from_slice(&header.encode(framing));
        bytes.extend_from_slice(&payload);
        // Nothing that comes after a breach changes the verdict.
        if !judge.broken {
            judge.broken |= other_offset;
            piece.judge(&mut judge);
        }
    }
    let mut ended = true;
    if closing_chunk {
        let flags = if spoiled && random.random_bool(0.1) { 0 } else { chunk_flag::DONE };
        ended = flags != 0;
        let header = ChunkHeader { flags, kind: chunk::NONE, cookie, offset: Some(offset), len: 0 };
        bytes.extend_from_slice(&header.encode(framing));
    }
    Reply { bytes, verdict: judge.verdict(ended) }
}

/// One chunk.
#[derive(Clone)]
enum Piece {
    /// Position within the read, which may be wrong, and bytes.
    Data(i64, Vec<u8>),
    Hole(i64, u32),
    Error(u32),
    /// A kind that no read is answered with.
    Senseless(u16),
}

impl Piece {
    fn encode(&self, offset: u64) -> (u16, Vec<u8>) {
        let place = |at: i64| offset.wrapping_add_signed(at).to_be_bytes().to_vec();
        match self {
            Self::Data(at, data) => (chunk::OFFSET_DATA, [place(*at), data.clone()].concat()),
            Self::Hole(at, len) => (chunk::OFFSET_HOLE, [place(*at), len.to_be_bytes().to_vec()].concat()),
            Self::Error(error) => (chunk::ERROR, proto::encode_error_chunk(*error, "so it is")),
            Self::Senseless(kind) => (*kind, Vec::new()),
        }
    }

    fn judge(&self, judge: &mut Judge) {
        match self {
            Self::Data(at, data) => judge.content(*at, data),
            Self::Hole(at, len) => judge.content(*at, &vec![0; *len as usize]),
            Self::Error(error) => {
                judge.error.get_or_insert(errno::from_wire(*error));
            }
            Self::Senseless(_) => judge.broken = true,
        }
    }
}

fn mk_pieces(random: &mut StdRng) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < READ_BYTES {
        let len = random.random_range(1..=READ_BYTES - at);
        let place = i64::from(at);
        pieces.push(if random.random_bool(0.3) {
            Piece::Hole(place, len)
        } else {
            Piece::Data(place, (0..len).map(|_| random.random()).collect())
        });
        at += len;
    }
    for from in (1..pieces.len()).rev() {
        pieces.swap(from, random.random_range(0..=from));
    }
    pieces
}

fn spoil(random: &mut StdRng, pieces: &mut Vec<Piece>) {
    let at = random.random_range(0..pieces.len());
    match random.random_range(0..7) {
        0 => drop(pieces.remove(at)),
        1 => pieces.insert(at, pieces[at].clone()),
        2 => pieces.insert(at, Piece::Error(random.random_range(1..200))),
        3 => pieces.push(Piece::Error(errno::ENOSPC.unsigned_abs())),
        4 => pieces.insert(at, Piece::Senseless([5, 6, 7, 0x4000][random.random_range(0..4)])),
        5 => pieces.insert(at, Piece::Hole(i64::from(random.random_range(0..READ_BYTES)), 0)),
        _ => match &mut pieces[at] {
            Piece::Data(place, _) | Piece::Hole(place, _) => *place += random.random_range(-3..4),
            Piece::Error(_) | Piece::Senseless(_) => {}
        },
    }
}
