//! Memory: less of it kept, and what was freed back to the kernel.

/// Has all threads share one heap. The C library gives each a heap of its own else, and where one thread reads objects that
/// others keep or free, the holes in each stay: 15 MiB at 100,000 pods. To be called before there is a second thread. Does
/// nothing with other C libraries.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number of the C library, and no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

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
