//! Marks the process as one that memory reclaim must not wait for.

use std::io;

/// From `linux/prctl.h`; libc does not name it for every target.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// `PR_SET_IO_FLUSHER`: allocations of this process never start writeback, which could wait for the process itself.
/// Needs `CAP_SYS_RESOURCE`. Threads started afterwards inherit it.
pub fn set_io_flusher() -> io::Result<()> {
    // SAFETY: prctl with PR_SET_IO_FLUSHER takes plain numbers and touches no memory of ours.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
