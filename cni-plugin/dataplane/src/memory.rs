//! Memory that was freed, back to the kernel.

/// Gives pages that were freed back. The C library keeps them, on every thread that ever allocated; reading a large cluster
/// frees more than stays. Takes some ten milliseconds per hundred MiB: for times without work. Does nothing with other C
/// libraries.
pub fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it has no preconditions, and touches no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
