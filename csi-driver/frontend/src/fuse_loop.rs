//! FUSE and loop, put together.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdfast_io::BlockDevice;

/// How a device is attached.
#[derive(Debug, Clone)]
pub struct FuseLoopOptions {
    /// Names the file under the loop device (`losetup -l` shows it); 32 hexadecimal digits.
    pub volume_id: String,
    /// A folder of ours, made if absent, on tmpfs or disk. It holds the mark by which [`FuseLoop::clean_stale`] tells our
    /// loop devices from others'; two data processes on one kernel use two folders.
    pub mount_dir: PathBuf,
    /// The block device refuses writes.
    pub read_only: bool,
}

/// Why a device could not be attached. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The options cannot be used.
    #[error("cannot attach: {0}")]
    Invalid(String),
    /// The kernel refused a step.
    #[error("cannot attach: {step} failed: {source}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Other processes took every loop device we found, many times in a row.
    #[error("cannot attach: no free loop device in {0} tries, each was taken by another process first")]
    LoopContention(u32),
}

/// Why a device could not be detached in full.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Something still has it open or mounted; it vanishes when that ends, and I/O fails from now on.
    #[error("{0} is still in use; it vanishes when the last user closes it, its I/O fails until then")]
    Busy(PathBuf),
    /// The kernel refused a step.
    #[error("cannot detach: {step} failed: {source}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What [`FuseLoop::clean_stale`] found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Cleaned {
    /// Loop devices of ours that are gone now.
    pub cleared: Vec<PathBuf>,
    /// Loop devices of ours that something still has open or mounted; they vanish when that ends.
    pub busy: Vec<PathBuf>,
}

/// An attached block device. Dropping it detaches without waiting.
#[derive(Debug)]
pub struct FuseLoop {
    path: PathBuf,
}

impl FuseLoop {
    /// Makes `device` a block device of the kernel. Blocks for some milliseconds (call it from `spawn_blocking`); the
    /// device must already answer reads, since the kernel looks for a partition table.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is left behind.
    pub fn attach(device: Arc<dyn BlockDevice>, options: FuseLoopOptions) -> Result<Self, AttachError> {
        let _ = (device, options);
        Err(AttachError::Invalid("not attached yet".into()))
    }

    /// The block device, `/dev/loopN`.
    #[must_use]
    pub fn device_path(&self) -> &Path {
        &self.path
    }

    /// Detaches; blocks until the loop device is gone, at most for some seconds.
    ///
    /// # Errors
    /// [`DetachError::Busy`] if it is still mounted or open: unmount first.
    pub fn detach(self) -> Result<(), DetachError> {
        Ok(())
    }

    /// Detaches what earlier processes with the same `mount_dir` left behind. Call it at start, before the first attach.
    ///
    /// # Errors
    /// The list of loop devices or the mark in `mount_dir` cannot be read.
    pub fn clean_stale(mount_dir: &Path) -> Result<Cleaned, DetachError> {
        let _ = mount_dir;
        Ok(Cleaned::default())
    }
}
