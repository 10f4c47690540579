//! Front ends: how the kernel sees a target.
//!
//! [`FuseLoop`] works on every kernel since 5.9: a FUSE session with one regular file, never mounted anywhere, under a loop
//! device in direct I/O mode.
//!
//! ```text
//!   file system -> /dev/loopN -> one file of a FUSE session -> BlockDevice::submit
//!   reader -> /dev/loopM, read-only -> /dev/loopN
//! ```
//!
//! [`ReadOnlyTwin`] is a second device for those who may only read.
#![allow(unsafe_code)]

mod fuse_fs;
mod fuse_loop;
mod fuse_mount;
mod loop_device;
mod mark;
mod read_only;

pub use fuse_loop::{AttachError, Cleaned, DetachError, FuseLoop, FuseLoopOptions, GrowError};
pub use read_only::ReadOnlyTwin;
