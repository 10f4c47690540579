//! The NBD wire format, encoded and decoded without I/O. Numbers and names follow the NBD protocol specification
//! (`doc/proto.md` of the NetworkBlockDevice project); everything is big-endian.
//!
//! Nothing here panics or allocates by a length that came from the wire: callers read a fixed-size header, check the
//! length it names against a limit of this module, and only then read what follows.

mod negotiation;
mod transmission;

pub use negotiation::{
    BlockSizes, ClientOption, ExportSummary, InfoReply, MAGIC_GREETING, MAGIC_OPTION, OPTION_BYTES_MAX,
    OptionHeader, OptionReplyHeader, decode_info_reply, decode_meta_context_reply, encode_export_name_answer,
    encode_greeting, encode_info_block_size, encode_info_export, encode_meta_context_reply,
    encode_option_reply, encode_server_reply, info, option, reply,
};
pub use transmission::{
    Command, ERROR_TEXT_BYTES_MAX, REQUEST_BYTES, ReplyHeader, RequestHeader, SIMPLE_REPLY_BYTES,
    STATUS_EXTENTS_MAX, STRUCTURED_REPLY_BYTES, chunk, chunk_flag, command_flag, decode_error_chunk,
    decode_status_chunk, encode_error_chunk, encode_simple_reply, encode_status_chunk,
    encode_structured_header,
};

/// Longest name (of an export, a context) that the specification allows.
pub const NAME_BYTES_MAX: usize = 4096;

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
    /// A text is not UTF-8.
    #[error("{0} is not UTF-8")]
    Text(&'static str),
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
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::Text(what))
}

#[cfg(test)]
mod tests;
