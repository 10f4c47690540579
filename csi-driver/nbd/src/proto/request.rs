//! Requests.

use super::{DecodeError, Fields, Framing, HeaderBytes};

const MAGIC_COMPACT: u32 = 0x2560_9513;
const MAGIC_EXTENDED: u32 = 0x21e4_1c71;

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
    /// Zero the range only if that is faster than writing zeroes.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers only: the length field counts a payload that follows, not the part of the export meant.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
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

/// A request without its payload.
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
    /// Bytes of the export that are meant, or of the payload ([`RequestHeader::payload_bytes`]). 32 bits in compact
    /// headers.
    pub len: u64,
}

impl RequestHeader {
    /// Bytes of a compact header.
    pub const COMPACT_BYTES: usize = 28;
    /// Bytes of an extended header.
    pub const EXTENDED_BYTES: usize = 32;

    /// Reads a compact header.
    ///
    /// # Errors
    /// A wrong magic number: the stream is out of step and cannot be used any further.
    pub fn decode_compact(bytes: &[u8; Self::COMPACT_BYTES]) -> Result<Self, DecodeError> {
        Self::decode(Fields::new(bytes), MAGIC_COMPACT)
    }

    /// Reads an extended header.
    ///
    /// # Errors
    /// As [`RequestHeader::decode_compact`].
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_BYTES]) -> Result<Self, DecodeError> {
        Self::decode(Fields::new(bytes), MAGIC_EXTENDED)
    }

    fn decode(mut fields: Fields<'_>, magic: u32) -> Result<Self, DecodeError> {
        const WHAT: &str = "a request";
        let found = fields.u32(WHAT)?;
        if found != magic {
            return Err(DecodeError::Magic { expected: WHAT, found: u64::from(found) });
        }
        Ok(Self {
            flags: fields.u16(WHAT)?,
            command: Command::from_wire(fields.u16(WHAT)?),
            cookie: fields.u64(WHAT)?,
            offset: fields.u64(WHAT)?,
            len: if magic == MAGIC_EXTENDED { fields.u64(WHAT)? } else { u64::from(fields.u32(WHAT)?) },
        })
    }

    /// The header's bytes.
    ///
    /// # Panics
    /// A length above 32 bits without extended headers: whoever builds requests cuts them.
    #[must_use]
    pub fn encode(&self, framing: Framing) -> HeaderBytes {
        let mut out = HeaderBytes::default();
        out.put(&if framing.is_extended() { MAGIC_EXTENDED } else { MAGIC_COMPACT }.to_be_bytes());
        out.put(&self.flags.to_be_bytes());
        out.put(&self.command.to_wire().to_be_bytes());
        out.put(&self.cookie.to_be_bytes());
        out.put(&self.offset.to_be_bytes());
        if framing.is_extended() {
            out.put(&self.len.to_be_bytes());
        } else {
            out.put(&u32::try_from(self.len).expect("compact requests have 32 bits of length").to_be_bytes());
        }
        out
    }

    /// Bytes that follow the header.
    #[must_use]
    pub fn payload_bytes(&self, framing: Framing) -> u64 {
        let carries = match framing {
            Framing::Extended => self.flags & command_flag::PAYLOAD_LEN != 0,
            Framing::Simple | Framing::Structured => self.command == Command::Write,
        };
        if carries { self.len } else { 0 }
    }
}
