//! Replies.

use super::{DecodeError, Fields, Framing, HeaderBytes};

const MAGIC_SIMPLE: u32 = 0x6744_6698;
const MAGIC_STRUCTURED: u32 = 0x668e_33ef;
const MAGIC_EXTENDED: u32 = 0x6e8a_278c;

/// Longest error text that we send or read.
pub const ERROR_TEXT_BYTES_MAX: usize = 4096;

/// Kinds of chunks.
pub mod chunk {
    /// Nothing.
    pub const NONE: u16 = 0;
    /// An offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and a count of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context and its extents, in 32 bits each.
    pub const BLOCK_STATUS: u16 = 5;
    /// A context and its extents, in 64 bits each; with extended headers only.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Flags of chunks.
pub mod chunk_flag {
    /// The last chunk of a reply.
    pub const DONE: u16 = 1;
}

/// One chunk of a reply, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// See [`chunk_flag`].
    pub flags: u16,
    /// See [`chunk`].
    pub kind: u16,
    /// The request's name.
    pub cookie: u64,
    /// The request's offset; structured replies do not carry it and decode to `None`.
    pub offset: Option<u64>,
    /// Bytes that follow; at most 32 bits in structured replies.
    pub len: u64,
}

impl ChunkHeader {
    /// Bytes of an extended header.
    pub const EXTENDED_BYTES: usize = 32;
    /// Bytes of a structured header beyond the [`ReplyHeader::BYTES`] that it shares with simple replies.
    pub const STRUCTURED_REST_BYTES: usize = 4;

    /// Reads an extended header.
    ///
    /// # Errors
    /// A wrong magic number: the stream is out of step.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_BYTES]) -> Result<Self, DecodeError> {
        const WHAT: &str = "a reply";
        let mut fields = Fields::new(bytes);
        let found = fields.u32(WHAT)?;
        if found != MAGIC_EXTENDED {
            return Err(DecodeError::Magic { expected: WHAT, found: u64::from(found) });
        }
        Ok(Self {
            flags: fields.u16(WHAT)?,
            kind: fields.u16(WHAT)?,
            cookie: fields.u64(WHAT)?,
            offset: Some(fields.u64(WHAT)?),
            len: fields.u64(WHAT)?,
        })
    }

    /// Adds a structured header's last field.
    #[must_use]
    pub fn with_length(self, field: [u8; Self::STRUCTURED_REST_BYTES]) -> Self {
        Self { len: u64::from(u32::from_be_bytes(field)), ..self }
    }

    /// Whether the reply ends with this chunk.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.flags & chunk_flag::DONE != 0
    }

    /// The header's bytes.
    ///
    /// # Panics
    /// A length above 32 bits without extended headers; our payloads are below 64 MiB.
    #[must_use]
    pub fn encode(&self, framing: Framing) -> HeaderBytes {
        let mut out = HeaderBytes::default();
        out.put(&if framing.is_extended() { MAGIC_EXTENDED } else { MAGIC_STRUCTURED }.to_be_bytes());
        out.put(&self.flags.to_be_bytes());
        out.put(&self.kind.to_be_bytes());
        out.put(&self.cookie.to_be_bytes());
        if framing.is_extended() {
            out.put(&self.offset.unwrap_or(0).to_be_bytes());
            out.put(&self.len.to_be_bytes());
        } else {
            out.put(&u32::try_from(self.len).expect("chunks of ours are below 4 GiB").to_be_bytes());
        }
        out
    }
}

/// A reply where extended headers were not agreed on, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; the data of a successful read follows.
    Simple {
        /// 0 or an error number as on the wire.
        error: u32,
        /// The request's name.
        cookie: u64,
    },
    /// One chunk of a structured reply; its length comes with [`ChunkHeader::with_length`].
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// Bytes that both kinds have.
    pub const BYTES: usize = 16;

    /// Reads what both kinds have.
    ///
    /// # Errors
    /// A wrong magic number: the stream is out of step.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        const WHAT: &str = "a reply";
        let mut fields = Fields::new(bytes);
        match fields.u32(WHAT)? {
            MAGIC_SIMPLE => Ok(Self::Simple { error: fields.u32(WHAT)?, cookie: fields.u64(WHAT)? }),
            MAGIC_STRUCTURED => Ok(Self::Chunk(ChunkHeader {
                flags: fields.u16(WHAT)?,
                kind: fields.u16(WHAT)?,
                cookie: fields.u64(WHAT)?,
                offset: None,
                len: 0,
            })),
            found => Err(DecodeError::Magic { expected: WHAT, found: u64::from(found) }),
        }
    }
}

/// A simple reply's bytes.
#[must_use]
pub fn encode_simple_reply(cookie: u64, error: u32) -> HeaderBytes {
    let mut out = HeaderBytes::default();
    out.put(&MAGIC_SIMPLE.to_be_bytes());
    out.put(&error.to_be_bytes());
    out.put(&cookie.to_be_bytes());
    out
}

/// The payload of an error chunk.
#[must_use]
pub fn encode_error_chunk(error: u32, message: &str) -> Vec<u8> {
    let message = &message.as_bytes()[..message.floor_char_boundary(ERROR_TEXT_BYTES_MAX)];
    let mut data = error.to_be_bytes().to_vec();
    data.extend_from_slice(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    data.extend_from_slice(message);
    data
}

/// Reads an error chunk's payload: error number as on the wire, and text.
///
/// # Errors
/// Lengths that contradict each other, and the error 0.
pub fn decode_error_chunk(data: &[u8]) -> Result<(u32, String), DecodeError> {
    const WHAT: &str = "an error reply";
    let mut fields = Fields::new(data);
    let error = fields.u32(WHAT)?;
    let len = usize::from(fields.u16(WHAT)?);
    let message = fields.take(len, WHAT)?;
    if error == 0 {
        return Err(DecodeError::Value(WHAT));
    }
    Ok((error, String::from_utf8_lossy(message).into_owned()))
}
