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
