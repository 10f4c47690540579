//! How the process's memory is treated: by reclaim, and by the allocator.

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

/// Allocations from this size on get a mapping of their own: above what the buffer pool recycles (2 MiB), below the FUSE
/// crate's request buffers (16 MiB).
#[cfg(target_env = "gnu")]
const MAPPED_FROM_BYTES: libc::c_int = 4 << 20;

/// Keeps large, sparsely used buffers from costing memory. By default glibc raises its threshold to the largest buffer that
/// was ever freed, serves the next ones from its heaps, and clears those by writing every page of them.
pub fn map_large_buffers() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers; it is safe at any time.
    let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES) };
}
