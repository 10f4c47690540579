//! Block I/O plumbing: the block device seam, io_uring rings, aligned buffers and direct-I/O files.
//!
//! This crate and the front ends are the only storage crates with `unsafe`. It knows nothing of volumes, replicas or
//! formats, and refuses nothing but what the kernel refuses.
//!
//! Main types: [`BlockDevice`], the seam between who asks for block I/O and who answers; [`Ring`], which runs reads,
//! writes, syncs and hole punches of direct-I/O files; [`AlignedBuf`], memory that direct I/O accepts.
#![allow(unsafe_code)]

mod aligned;
mod block_device;
mod core;
mod file;
mod process_memory;
mod ring;
mod ring_thread;
pub mod thread_ring;

pub use aligned::{AlignedBuf, DIRECT_ALIGN, into_aligned, is_aligned};
pub use block_device::{BlockDevice, BlockError, BlockOp, Completion};
pub use file::{
    LockOutcome, OpenMode, free_bytes, is_tmpfs, lock_exclusive, next_data, open_direct, punch_hole,
    reserve_space, unlock, write_durable,
};
pub use process_memory::{map_large_buffers, set_io_flusher};
pub use ring::{Durability, Errno, QUEUE_MAX, Ring, RingDone, RingOptions};
