//! What the process asks of its host: locked memory, the I/O flusher mark, sockets that only root may use.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::mman::{MlockAllFlags, mlockall};
use tokio::net::UnixListener;

/// Locks the process's memory and marks it as an I/O flusher, so that writeback under memory pressure cannot wait for
/// itself. Both need privileges; without them the process works, at that risk. Large buffers cost only what is used of them.
pub fn protect_from_memory_pressure() {
    holdfast_io::map_large_buffers();
    // ONFAULT: pages are locked when first touched, so that reserved but unused stacks and arenas cost nothing.
    let flags =
        MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | MlockAllFlags::from_bits_retain(MCL_ONFAULT);
    if let Err(error) = mlockall(flags) {
        tracing::debug!(%error, "the process's memory could not be locked; it may be paged out");
    }
    if let Err(error) = holdfast_io::set_io_flusher() {
        tracing::debug!(%error, "the process could not be marked as I/O flusher; it needs CAP_SYS_RESOURCE");
    }
}

/// `MCL_ONFAULT` of mlockall(2), which nix does not name.
const MCL_ONFAULT: i32 = 4;

/// Listens on a Unix socket of mode 0600, in place of one that a dead process left. A live process behind the old socket
/// is left without clients: the callers' locks keep two from running on one pool.
///
/// # Errors
/// The folder cannot be made or the socket cannot be bound.
pub fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Bound beside its name and renamed: no moment without a socket, none with a wider mode.
    let fresh = path.with_extension("new");
    remove_if_present(&fresh)?;
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    Ok(listener)
}

/// Removes a file; that it is absent already is a success.
///
/// # Errors
/// Any other reason than absence.
pub fn remove_if_present(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
