//! FUSE and loop, put together.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, Session, SessionACL};
use holdfast_io::BlockDevice;

use crate::fuse_fs::{FILE_INODE, Gate, OneFile};
use crate::fuse_mount::{FuseMount, FuseRoot};
use crate::loop_device::{BIND_TRIES, BindError, Bound, Cleared as LoopCleared, LoopDevice};
use crate::mark::Mark;

/// Threads that read requests from the kernel. One copies a write's data while the other takes the next request.
const READER_THREADS: usize = 2;
/// How long detaching waits for the last user (udev looks at new devices on its own); then the device is named as busy.
const DETACH_WAIT: Duration = Duration::from_secs(5);
const DETACH_POLL: Duration = Duration::from_millis(5);

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

impl From<BindError> for AttachError {
    fn from(error: BindError) -> Self {
        match error {
            BindError::Contention => Self::LoopContention(BIND_TRIES),
            BindError::Kernel(step, source) => Self::Kernel { step, source },
        }
    }
}

/// Why a device did not grow.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// It has another size.
    #[error(
        "a block device of {has} bytes cannot become {wanted} bytes: it only grows, by whole blocks of 4096 bytes"
    )]
    Invalid {
        /// Its size.
        has: u64,
        /// The size asked for.
        wanted: u64,
    },
    /// The kernel refused a step.
    #[error("the block device did not grow: {step} failed: {source}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
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

/// It becomes part of names.
pub(crate) fn check_volume_id(volume_id: &str) -> Result<(), AttachError> {
    if volume_id.len() == 32 && volume_id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(());
    }
    Err(AttachError::Invalid(format!("\"{volume_id}\" is not a volume id of 32 hexadecimal digits")))
}

/// An attached block device. Dropping it detaches as soon as nobody else has the device open, without waiting.
#[derive(Debug)]
pub struct FuseLoop {
    // Declared first, dropped first: the loop device goes before what serves it.
    device: LoopDevice,
    // Keeps the file system too.
    root: FuseRoot,
    file_name: String,
    size_bytes: Arc<AtomicU64>,
    session: BackgroundSession,
    gate: Gate,
    _mark: Mark,
}

impl FuseLoop {
    /// Makes `device` a block device of the kernel. Blocks for some milliseconds (call it from `spawn_blocking`); the
    /// device must already answer reads, since the kernel and udev look for what is on it.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is left behind.
    pub fn attach(device: Arc<dyn BlockDevice>, options: FuseLoopOptions) -> Result<Self, AttachError> {
        let FuseLoopOptions { volume_id, mount_dir, read_only } = options;
        let size_bytes = device.size_bytes();
        check_volume_id(&volume_id)?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(4096) {
            return Err(AttachError::Invalid(format!(
                "a size of {size_bytes} bytes is not a multiple of 4096"
            )));
        }
        let kernel = |step| move |source| AttachError::Kernel { step, source };
        let mark = Mark::hold(&mount_dir).map_err(kernel("writing the mark into the mount folder"))?;
        let mount = FuseMount::create().map_err(kernel("creating the FUSE file system"))?;
        let (fuse_device, root) = mount.split();

        let gate = Gate::new(device);
        let file_name = format!("holdfast-{volume_id}");
        let size_bytes = Arc::new(AtomicU64::new(size_bytes));
        let file_system = OneFile::new(gate.clone(), file_name.clone(), Arc::clone(&size_bytes), read_only);
        let mut config = Config::default();
        config.n_threads = Some(READER_THREADS);
        let session = Session::from_fd(file_system, fuse_device, SessionACL::All, config)
            .and_then(Session::spawn)
            .map_err(kernel("starting the FUSE session"))?;

        let file = root.open(&file_name, read_only).map_err(kernel("opening the FUSE file"))?;
        let name = format!("{}{volume_id}", mark.prefix());
        let device = LoopDevice::bind(&file, &name, read_only)?;
        // From here on the loop device alone keeps the file, and it and the root the file system and the session.
        Ok(Self { device, root, file_name, size_bytes, session, gate, _mark: mark })
    }

    /// The block device, `/dev/loopN`.
    #[must_use]
    pub fn device_path(&self) -> &Path {
        &self.device.path
    }

    /// Makes the block device larger, and soon after it its read-only twins; blocks for some milliseconds. The device behind it
    /// must have the size already. Safe to repeat; a file system on it has to be grown by its own tools.
    ///
    /// # Errors
    /// [`GrowError`]; the block device has its old size or the new one.
    pub fn grow(&self, size_bytes: u64) -> Result<(), GrowError> {
        let has = self.size_bytes.load(Ordering::Relaxed);
        if size_bytes < has || !size_bytes.is_multiple_of(4096) {
            return Err(GrowError::Invalid { has, wanted: size_bytes });
        }
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        let kernel = |step| move |source| GrowError::Kernel { step, source };
        // The kernel keeps what it knows of the file for ever, unless told; a negative offset names the attributes alone.
        let told = self.session.notifier().inval_inode(FILE_INODE, -1, 0);
        told.map_err(kernel("telling the kernel that the FUSE file grew"))?;
        self.root.size_of(&self.file_name).map_err(kernel("reading the FUSE file's size"))?;
        let has = self.device.follow_size().map_err(kernel("LOOP_SET_CAPACITY"))?;
        if has == size_bytes { Ok(()) } else { Err(GrowError::Invalid { has, wanted: size_bytes }) }
    }

    /// Detaches, and clears the read-only twins; blocks until the loop device is gone, at most for some seconds.
    ///
    /// # Errors
    /// [`DetachError::Busy`] if it, or a twin, is still mounted or open: unmount first.
    pub fn detach(self) -> Result<(), DetachError> {
        let Self { device, root, session, gate, .. } = self;
        let path = device.path.clone();
        drop(device);
        drop(root);
        // The kernel ends the session when the loop device has let the file go. That it is gone is not read from /sys, as
        // its number may have been taken by another process at once.
        let deadline = Instant::now() + DETACH_WAIT;
        while !session.guard.is_finished() {
            if Instant::now() >= deadline {
                gate.cut();
                return Err(DetachError::Busy(path));
            }
            std::thread::sleep(DETACH_POLL);
        }
        // With several readers, the kernel may end one of them by an error: the session is over either way.
        if let Err(error) = session.join() {
            tracing::debug!(%error, device = %path.display(), "a FUSE reader ended with an error");
        }
        Ok(())
    }

    /// Fails all I/O from now on, without detaching: for a target that is fenced or stopping. Requests that the device
    /// already has are completed by it.
    pub fn cut(&self) {
        self.gate.cut();
    }

    /// Detaches what earlier processes with the same `mount_dir` left behind, and its read-only twins. Call it at start, before
    /// the first attach.
    ///
    /// A killed process leaves nothing but loop devices that something still has mounted or open, whose I/O fails; those
    /// are named as busy and vanish by themselves when that ends. A twin holds its device until it is cleared here.
    ///
    /// # Errors
    /// The list of loop devices or the mark in `mount_dir` cannot be read, or a living process with devices attached uses
    /// the same folder.
    pub fn clean_stale(mount_dir: &Path) -> Result<Cleaned, DetachError> {
        let kernel = |step| move |source| DetachError::Kernel { step, source };
        let mut cleaned = Cleaned::default();
        let Some(mark) = Mark::seize(mount_dir).map_err(kernel("reading the mark in the mount folder"))?
        else {
            return Ok(cleaned);
        };
        let prefix = mark.prefix();
        for bound in Bound::list().map_err(kernel("listing the loop devices"))? {
            if !bound.name.starts_with(&prefix) {
                continue;
            }
            // First what holds it.
            let twins = Bound::twins_of(&bound.path).map_err(kernel("listing the read-only twins"))?;
            for stale in twins.into_iter().chain([bound]) {
                match stale.clear().map_err(kernel("LOOP_CLR_FD"))? {
                    LoopCleared::Now => cleaned.cleared.push(stale.path),
                    LoopCleared::Later => cleaned.busy.push(stale.path),
                }
            }
        }
        Ok(cleaned)
    }
}
