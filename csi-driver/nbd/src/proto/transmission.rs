//! Requests and replies.

use super::{DecodeError, Fields};
use crate::provider::Extent;

const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_SIMPLE_REPLY: u32 = 0x6744_6698;
const MAGIC_STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply without data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured reply chunk's header.
pub const STRUCTURED_REPLY_BYTES: usize = 20;
/// Longest error text that we send or read.
pub const ERROR_TEXT_BYTES_MAX: usize = 4096;
/// Extents in one status reply; what lies beyond is left to the next request.
pub const STATUS_EXTENTS_MAX: usize = 4096;

const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// Flags of a request.
pub mod command_flag {
    /// On stable storage before the answer.
    pub const FUA: u16 = 1;
    /// Zeroes keep their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// A read is answered in one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Kinds of structured reply chunks.
pub mod chunk {
    /// Nothing.
    pub const NONE: u16 = 0;
    /// An offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and a count of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context and its extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Flags of structured reply chunks.
pub mod chunk_flag {
    /// The last chunk of a reply.
    pub const DONE: u16 = 1;
}

/// What a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// NBD_CMD_READ.
    Read,
    /// NBD_CMD_WRITE.
    Write,
    /// NBD_CMD_DISC.
    Disconnect,
    /// NBD_CMD_FLUSH.
    Flush,
    /// NBD_CMD_TRIM.
    Trim,
    /// NBD_CMD_CACHE.
    Cache,
    /// NBD_CMD_WRITE_ZEROES.
    WriteZeroes,
    /// NBD_CMD_BLOCK_STATUS.
    BlockStatus,
    /// One that we do not know.
    Unknown(u16),
}

impl Command {
    fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            unknown => Self::Unknown(unknown),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(number) => number,
        }
    }
}

/// A request without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// See [`command_flag`].
    pub flags: u16,
    /// What is wanted.
    pub command: Command,
    /// The client's own name for the request.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; the data of a write follows.
    pub len: u32,
}

impl RequestHeader {
    /// Reads a header.
    ///
    /// # Errors
    /// A wrong magic number: the stream is out of step and cannot be used any further.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, DecodeError> {
        const WHAT: &str = "a request";
        let mut fields = Fields::new(bytes);
        let found = fields.u32(WHAT)?;
        if found != MAGIC_REQUEST {
            return Err(DecodeError::Magic { expected: WHAT, found: u64::from(found) });
        }
        Ok(Self {
            flags: fields.u16(WHAT)?,
            command: Command::from_wire(fields.u16(WHAT)?),
            cookie: fields.u64(WHAT)?,
            offset: fields.u64(WHAT)?,
            len: fields.u32(WHAT)?,
        })
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// A reply without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; the data of a successful read follows.
    Simple {
        /// 0 or an error number as on the wire.
        error: u32,
        /// The request's name.
        cookie: u64,
    },
    /// One chunk of a structured reply.
    Chunk {
        /// See [`chunk_flag`].
        flags: u16,
        /// See [`chunk`].
        kind: u16,
        /// The request's name.
        cookie: u64,
        /// Bytes that follow.
        len: u32,
    },
}

impl ReplyHeader {
    /// Reads the 16 bytes that both kinds of reply have; for a chunk, [`ReplyHeader::with_length`] adds the last four.
    ///
    /// # Errors
    /// A wrong magic number.
    pub fn decode(bytes: &[u8; SIMPLE_REPLY_BYTES]) -> Result<Self, DecodeError> {
        const WHAT: &str = "a reply";
        let mut fields = Fields::new(bytes);
        match fields.u32(WHAT)? {
            MAGIC_SIMPLE_REPLY => Ok(Self::Simple { error: fields.u32(WHAT)?, cookie: fields.u64(WHAT)? }),
            MAGIC_STRUCTURED_REPLY => Ok(Self::Chunk {
                flags: fields.u16(WHAT)?,
                kind: fields.u16(WHAT)?,
                cookie: fields.u64(WHAT)?,
                len: 0,
            }),
            found => Err(DecodeError::Magic { expected: WHAT, found: u64::from(found) }),
        }
    }

    /// Adds a chunk's length field, which follows the common 16 bytes.
    #[must_use]
    pub fn with_length(self, field: [u8; 4]) -> Self {
        match self {
            Self::Chunk { flags, kind, cookie, .. } => {
                Self::Chunk { flags, kind, cookie, len: u32::from_be_bytes(field) }
            }
            simple @ Self::Simple { .. } => simple,
        }
    }
}

/// A simple reply's bytes.
#[must_use]
pub fn encode_simple_reply(cookie: u64, error: u32) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&MAGIC_SIMPLE_REPLY.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The header of a chunk that is the last of its reply.
#[must_use]
pub fn encode_structured_header(cookie: u64, kind: u16, len: u32) -> [u8; STRUCTURED_REPLY_BYTES] {
    let mut bytes = [0; STRUCTURED_REPLY_BYTES];
    bytes[..4].copy_from_slice(&MAGIC_STRUCTURED_REPLY.to_be_bytes());
    bytes[4..6].copy_from_slice(&chunk_flag::DONE.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// The data of an error chunk.
#[must_use]
pub fn encode_error_chunk(error: u32, message: &str) -> Vec<u8> {
    let message = &message.as_bytes()[..message.floor_char_boundary(ERROR_TEXT_BYTES_MAX)];
    let mut data = error.to_be_bytes().to_vec();
    data.extend_from_slice(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    data.extend_from_slice(message);
    data
}

/// Reads an error chunk's data: error number as on the wire, and text.
///
/// # Errors
/// Lengths that contradict each other.
pub fn decode_error_chunk(data: &[u8]) -> Result<(u32, String), DecodeError> {
    const WHAT: &str = "an error reply";
    let mut fields = Fields::new(data);
    let error = fields.u32(WHAT)?;
    let len = usize::from(fields.u16(WHAT)?);
    let message = fields.take(len, WHAT)?;
    Ok((error, String::from_utf8_lossy(message).into_owned()))
}

/// The data of a status chunk.
#[must_use]
pub fn encode_status_chunk(context_id: u32, extents: &[Extent]) -> Vec<u8> {
    let mut data = Vec::with_capacity(4 + 8 * extents.len());
    data.extend_from_slice(&context_id.to_be_bytes());
    for extent in extents {
        let hole = if extent.hole { STATE_HOLE } else { 0 };
        let zero = if extent.zero { STATE_ZERO } else { 0 };
        data.extend_from_slice(&extent.len.to_be_bytes());
        data.extend_from_slice(&(hole | zero).to_be_bytes());
    }
    data
}

/// Reads a status chunk's data: context and extents.
///
/// # Errors
/// No extent, an empty one, or half a one.
pub fn decode_status_chunk(data: &[u8]) -> Result<(u32, Vec<Extent>), DecodeError> {
    const WHAT: &str = "a block status reply";
    let mut fields = Fields::new(data);
    let context_id = fields.u32(WHAT)?;
    let mut extents = Vec::with_capacity(fields.rest().len() / 8);
    while !fields.is_empty() {
        let (len, state) = (fields.u32(WHAT)?, fields.u32(WHAT)?);
        if len == 0 {
            return Err(DecodeError::Length(WHAT));
        }
        extents.push(Extent { len, hole: state & STATE_HOLE != 0, zero: state & STATE_ZERO != 0 });
    }
    if extents.is_empty() {
        return Err(DecodeError::Length(WHAT));
    }
    Ok((context_id, extents))
}
