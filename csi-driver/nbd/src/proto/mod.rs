//! The NBD wire format, encoded and decoded without I/O. Numbers and names follow the NBD protocol specification
//! (`doc/proto.md` of the NetworkBlockDevice project); everything is big-endian.
//!
//! Nothing here panics or allocates by a length that came from the wire: callers read a fixed-size header, check the
//! length it names against a limit of this module, and only then read what follows.

mod negotiation;
mod replies;
mod request;
mod status;

pub use negotiation::{
    BlockSizes, ClientOption, EXPORT_NAME_ZEROES, ExportSummary, InfoReply, MAGIC_GREETING, MAGIC_OPTION,
    OPTION_BYTES_MAX, OptionHeader, OptionReplyHeader, decode_export_name_answer, decode_info_reply,
    decode_meta_context_reply, decode_server_reply, encode_export_name_answer, encode_greeting,
    encode_info_block_size, encode_info_export, encode_info_text, encode_meta_context_reply,
    encode_option_reply, encode_server_reply, info, option, reply,
};
pub use replies::{
    ChunkHeader, ERROR_TEXT_BYTES_MAX, ReplyHeader, chunk, chunk_flag, decode_error_chunk,
    encode_error_chunk, encode_simple_reply,
};
pub use request::{Command, RequestHeader, command_flag};
pub use status::{
    STATUS_EXTENTS_MAX, STATUS_FILTER_BYTES_MAX, decode_status_chunk, decode_status_filter,
    encode_status_chunk, encode_status_filter, status_chunk_bytes_max,
};

/// Longest name (of an export, a context) that the specification allows.
pub const NAME_BYTES_MAX: usize = 4096;
/// Metadata contexts that one connection may choose; a client that asks for more is refused with NBD_REP_ERR_TOO_BIG.
pub const CONTEXTS_MAX: usize = 16;

/// How requests and replies look, as agreed on during negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, replies in chunks (NBD_OPT_STRUCTURED_REPLY).
    Structured,
    /// Requests and replies with 64 bits of length (NBD_OPT_EXTENDED_HEADERS).
    Extended,
}

impl Framing {
    /// Whether headers are extended.
    #[must_use]
    pub fn is_extended(self) -> bool {
        self == Self::Extended
    }

    /// Whether replies come in chunks.
    #[must_use]
    pub fn has_chunks(self) -> bool {
        self != Self::Simple
    }
}

/// Bytes of one header.
#[derive(Debug, Clone, Copy)]
pub struct HeaderBytes {
    bytes: [u8; Self::MAX],
    len: u8,
}

impl Default for HeaderBytes {
    fn default() -> Self {
        Self { bytes: [0; Self::MAX], len: 0 }
    }
}

impl HeaderBytes {
    /// Longest header: an extended chunk's with the offset of its data.
    pub const MAX: usize = 40;

    /// Appends a field.
    ///
    /// # Panics
    /// More than [`HeaderBytes::MAX`] bytes.
    pub fn put(&mut self, field: &[u8]) {
        let at = usize::from(self.len);
        self.bytes[at..at + field.len()].copy_from_slice(field);
        self.len = u8::try_from(at + field.len()).expect("a header is at most 40 bytes");
    }
}

impl std::ops::Deref for HeaderBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Bytes on the wire that are not NBD.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A magic number is wrong.
    #[error("expected {expected}, but its magic number is {found:#x}")]
    Magic {
        /// What should have come.
        expected: &'static str,
        /// What came.
        found: u64,
    },
    /// A length field contradicts another, or a limit.
    #[error("the length of {0} makes no sense")]
    Length(&'static str),
    /// A text is not UTF-8, or has a NUL in it.
    #[error("{0} is not UTF-8 without NUL")]
    Text(&'static str),
    /// A field has a value that it must not have.
    #[error("{0} has a value that makes no sense")]
    Value(&'static str),
}

/// Handshake flags, sent by the server.
pub mod handshake_flag {
    /// The server speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The 124 zero bytes after NBD_OPT_EXPORT_NAME may be left out.
    pub const NO_ZEROES: u16 = 2;
}

/// Transmission flags: what an export can do.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// NBD_CMD_FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// NBD_CMD_FLAG_FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// NBD_CMD_TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// NBD_CMD_WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// NBD_CMD_FLAG_DF is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush covers all connections of the export.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// NBD_CMD_CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// NBD_CMD_FLAG_FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// A block status request may name the contexts it wants; with extended headers only.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Error numbers on the wire; they are Linux's own.
pub mod errno {
    /// Not permitted: a write to a read-only export.
    pub const EPERM: i32 = 1;
    /// Input or output failed.
    pub const EIO: i32 = 5;
    /// Out of memory.
    pub const ENOMEM: i32 = 12;
    /// The request makes no sense.
    pub const EINVAL: i32 = 22;
    /// No space left.
    pub const ENOSPC: i32 = 28;
    /// The request is too large.
    pub const EOVERFLOW: i32 = 75;
    /// Not supported.
    pub const ENOTSUP: i32 = 95;
    /// The connection is lost; never on the wire, given by our client.
    pub const ENOTCONN: i32 = 107;
    /// The server is shutting down.
    pub const ESHUTDOWN: i32 = 108;

    /// The number to send for an errno: the specification's few as they are, kin to their likeness, the rest as EIO.
    #[must_use]
    pub fn to_wire(errno: i32) -> u32 {
        const EROFS: i32 = 30;
        const EFBIG: i32 = 27;
        const EDQUOT: i32 = 122;
        let known = match errno {
            EROFS => EPERM,
            EFBIG | EDQUOT => ENOSPC,
            EPERM | EIO | ENOMEM | EINVAL | ENOSPC | EOVERFLOW | ENOTSUP | ESHUTDOWN => errno,
            _ => EIO,
        };
        known.unsigned_abs()
    }

    /// The errno for a number received; unknown ones are EIO.
    #[must_use]
    pub fn from_wire(wire: u32) -> i32 {
        match i32::try_from(wire) {
            Ok(known @ (EPERM | EIO | ENOMEM | EINVAL | ENOSPC | EOVERFLOW | ENOTSUP | ESHUTDOWN)) => known,
            _ => EIO,
        }
    }
}

/// Takes big-endian fields off the front of a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(DecodeError::Length(what))?;
        self.0 = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Length(what))?;
        self.0 = tail;
        Ok(*head)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, DecodeError> {
        self.array(what).map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        self.array(what).map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// A text with its 32-bit length in front.
    pub(crate) fn name(&mut self, what: &'static str) -> Result<String, DecodeError> {
        let len = self.u32(what)? as usize;
        if len > NAME_BYTES_MAX {
            return Err(DecodeError::Length(what));
        }
        text(self.take(len, what)?, what)
    }

    /// Fails if anything is left over.
    pub(crate) fn end(self, what: &'static str) -> Result<(), DecodeError> {
        if self.is_empty() { Ok(()) } else { Err(DecodeError::Length(what)) }
    }
}

pub(crate) fn text(bytes: &[u8], what: &'static str) -> Result<String, DecodeError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(DecodeError::Text(what)),
    }
}

#[cfg(test)]
mod tests;
