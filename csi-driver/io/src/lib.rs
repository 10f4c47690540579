//! Block I/O plumbing: the block device seam, io_uring rings and aligned buffers.

mod block_device;

pub use block_device::{BlockDevice, BlockError, BlockOp, Completion};
