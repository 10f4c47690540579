//! Opening and locking files for direct I/O.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How [`open_direct`] treats an existing or absent file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// It must exist.
    Existing,
    /// It must not exist; it is made with mode 0600.
    New,
}

/// Opens a file for reading and writing past the page cache. File systems without direct I/O get buffered I/O,
/// which is just as durable after a sync, only slower and with a second copy in memory.
pub fn open_direct(path: &Path, mode: OpenMode) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(mode == OpenMode::New).mode(0o600);
    match options.clone().custom_flags(libc::O_DIRECT).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            tracing::warn!(path = %path.display(), "the file system has no direct I/O: using buffered I/O");
            // A refused O_DIRECT may leave the file it was to create.
            options.create_new(false).create(mode == OpenMode::New).open(path)
        }
        other => other,
    }
}

/// What [`lock_exclusive`] achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockOutcome {
    /// The lock is held until the file and all I/O on it are gone.
    Locked,
    /// Someone else held it for the whole wait.
    HeldByAnother,
}

/// Takes an exclusive `flock`, trying for `wait`.
///
/// The lock belongs to the open file: a killed process's I/O keeps the file, and with it the lock, until it landed (R3).
pub fn lock_exclusive(file: &impl AsFd, wait: Duration) -> io::Result<LockOutcome> {
    const RETRY_EVERY: Duration = Duration::from_millis(10);
    let deadline = Instant::now() + wait;
    loop {
        // SAFETY: flock takes a file descriptor, which the borrow keeps open, and no memory.
        let result = unsafe { libc::flock(file.as_fd().as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
        if result == 0 {
            return Ok(LockOutcome::Locked);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EWOULDBLOCK) if Instant::now() >= deadline => return Ok(LockOutcome::HeldByAnother),
            Some(libc::EWOULDBLOCK) => std::thread::sleep(RETRY_EVERY),
            _ => return Err(error),
        }
    }
}

/// Writes all of `data` at `offset` and returns when it is on stable storage (`RWF_DSYNC`). Blocks.
///
/// Memory, offset and length must suit the file's direct I/O.
pub fn write_durable(file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut rest = data;
    let mut at = offset;
    while !rest.is_empty() {
        let part = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        let position = i64::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        // SAFETY: the one iovec names memory that outlives the call and that the kernel only reads.
        let wrote =
            unsafe { libc::pwritev2(file.as_raw_fd(), &raw const part, 1, position, libc::RWF_DSYNC) };
        match usize::try_from(wrote) {
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            Ok(count) => {
                rest = &rest[count..];
                at += count as u64;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EINTR) {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Reserves space for a range, so that a later write there cannot fail for want of it; the file keeps its length. Blocks.
pub fn reserve_space(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let (offset, len) = (i64::try_from(offset).map_err(too_far)?, i64::try_from(len).map_err(too_far)?);
    // SAFETY: fallocate takes a file descriptor, which the borrow keeps open, and numbers.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset, len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives a range's space back; it reads as zeroes and the file keeps its length. Blocks.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let (offset, len) = (i64::try_from(offset).map_err(too_far)?, i64::try_from(len).map_err(too_far)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes a file descriptor, which the borrow keeps open, and numbers.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Where the first data from `offset` on lies, if any does; holes and space that was only reserved have none. `offset` where
/// the file system does not tell.
pub fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let from = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    match nix::unistd::lseek(file, from, nix::unistd::Whence::SeekData) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EOPNOTSUPP) => Ok(Some(offset)),
        Err(errno) => Err(errno.into()),
    }
}

/// Bytes that an unprivileged process may still fill in the file system of `path`.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stats = nix::sys::statvfs::statvfs(path).map_err(io::Error::from)?;
    Ok(stats.blocks_available().saturating_mul(stats.fragment_size()))
}

/// Whether `path` lies on a tmpfs.
pub fn is_tmpfs(path: &Path) -> io::Result<bool> {
    let stats = nix::sys::statfs::statfs(path).map_err(io::Error::from)?;
    Ok(stats.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
}

/// Gives a lock of [`lock_exclusive`] back before its file is closed.
pub fn unlock(file: &impl AsFd) -> io::Result<()> {
    // SAFETY: flock takes a file descriptor, which the borrow keeps open, and no memory.
    let result = unsafe { libc::flock(file.as_fd().as_raw_fd(), libc::LOCK_UN) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
