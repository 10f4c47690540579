//! The seam between who asks for block I/O (FUSE, ublk, an NBD server) and who answers (a target, a replica).

use bytes::Bytes;

/// One request. Offsets and lengths are in bytes; the device says which alignment it wants.
#[derive(Debug, Clone)]
pub enum BlockOp {
    /// Answered with exactly `len` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes wanted.
        len: u32,
    },
    /// Answered when the data is in the write cache, or on stable storage where `fua` is set.
    Write {
        /// First byte.
        offset: u64,
        /// The data.
        data: Bytes,
        /// Force unit access.
        fua: bool,
    },
    /// Makes a range read as zeroes; whole blocks give their space back where `trim` is set (R17).
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Force unit access.
        fua: bool,
        /// The space may be given back.
        trim: bool,
    },
    /// Puts every write answered before this request on stable storage.
    Flush,
}

/// A failed request, as an errno (positive): `EIO`, `ENOSPC`, `EINVAL`, `ESHUTDOWN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("block I/O failed: errno {0}")]
pub struct BlockError(pub i32);

/// Called exactly once, on any thread; it must not block. A read gives its data, everything else empty bytes.
pub type Completion = Box<dyn FnOnce(Result<Bytes, BlockError>) + Send>;

/// Something that answers block I/O.
pub trait BlockDevice: Send + Sync + 'static {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;

    /// Takes a request; never blocks. Requests complete in any order; overlapping ones that are in flight together
    /// have no order of their own.
    fn submit(&self, op: BlockOp, done: Completion);
}
