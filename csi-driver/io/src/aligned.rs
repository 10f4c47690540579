//! Buffers that direct I/O accepts: page-aligned, recycled, and convertible to [`Bytes`] without a copy.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Mutex;

use bytes::Bytes;

/// Alignment of memory, offset and length that every disk's direct I/O accepts.
pub const DIRECT_ALIGN: usize = 4096;

/// Number of size classes: 4 KiB, 8 KiB, … 2 MiB. Larger buffers are not recycled.
const CLASSES: usize = 10;
/// Bytes kept per size class for reuse; buffers beyond it go back to the allocator.
const CLASS_KEEP_BYTES_MAX: usize = 8 << 20;

static FREE: [Mutex<Vec<Raw>>; CLASSES] = [const { Mutex::new(Vec::new()) }; CLASSES];

/// An owned buffer aligned to [`DIRECT_ALIGN`]. Its contents after [`AlignedBuf::new`] are initialized but arbitrary.
///
/// Dropping it, or the last [`Bytes`] made of it, returns the memory to a process-wide pool.
pub struct AlignedBuf {
    raw: Raw,
    len: usize,
}

/// Memory of `capacity` bytes, always initialized.
struct Raw {
    ptr: NonNull<u8>,
    capacity: usize,
}

// SAFETY: Raw owns its allocation exclusively; nothing in it is tied to a thread.
unsafe impl Send for Raw {}
// SAFETY: shared access to a Raw only reads its two fields; the bytes are reached through AlignedBuf's borrows.
unsafe impl Sync for Raw {}

impl AlignedBuf {
    /// A buffer of `len` bytes (more than 0) whose contents are arbitrary: for reads, or to be filled.
    ///
    /// Panics when `len` is 0.
    #[must_use]
    pub fn new(len: usize) -> Self {
        assert!(len > 0, "an aligned buffer holds at least one byte");
        let capacity = capacity_for(len);
        let recycled = class_of(capacity).and_then(|class| lock(class).pop());
        Self { raw: recycled.unwrap_or_else(|| Raw::allocate(capacity)), len }
    }

    /// A buffer of `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::new(len);
        buf.fill(0);
        buf
    }

    /// A copy of `data`, which must not be empty.
    #[must_use]
    pub fn copy_of(data: &[u8]) -> Self {
        let mut buf = Self::new(data.len());
        buf.copy_from_slice(data);
        buf
    }

    /// Shortens the buffer; a longer `len` than the present one has no effect.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The buffer as [`Bytes`], without a copy.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation has at least `len` initialized bytes and is owned by self.
        unsafe { std::slice::from_raw_parts(self.raw.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has at least `len` initialized bytes and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.raw.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<AlignedBuf> for Bytes {
    fn from(buf: AlignedBuf) -> Bytes {
        buf.into_bytes()
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let Some(class) = class_of(self.raw.capacity) else { return };
        let mut free = lock(class);
        if (free.len() + 1) * self.raw.capacity <= CLASS_KEEP_BYTES_MAX {
            // The husk left behind has no capacity, so that its own drop frees nothing.
            let husk = Raw { ptr: NonNull::dangling(), capacity: 0 };
            free.push(std::mem::replace(&mut self.raw, husk));
        }
    }
}

impl Raw {
    fn allocate(capacity: usize) -> Self {
        let layout = layout(capacity);
        // SAFETY: the layout has a non-zero size, as capacity_for gives at least DIRECT_ALIGN.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Self { ptr, capacity }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: ptr came from alloc_zeroed with the same layout and is freed once, here.
            unsafe { dealloc(self.ptr.as_ptr(), layout(self.capacity)) }
        }
    }
}

/// Data as direct I/O can take it: as it is where it is aligned already, else a copy.
#[must_use]
pub fn into_aligned(data: Bytes) -> Bytes {
    if data.is_empty() || is_aligned(&data) { data } else { AlignedBuf::copy_of(&data).into_bytes() }
}

/// Whether direct I/O accepts this memory.
#[must_use]
pub fn is_aligned(data: &[u8]) -> bool {
    data.as_ptr().addr().is_multiple_of(DIRECT_ALIGN)
}

fn capacity_for(len: usize) -> usize {
    let pages = len.div_ceil(DIRECT_ALIGN) * DIRECT_ALIGN;
    let class_capacity = pages.next_power_of_two();
    if class_of(class_capacity).is_some() { class_capacity } else { pages }
}

/// The class of a capacity, if that capacity is recycled.
fn class_of(capacity: usize) -> Option<usize> {
    let class = (capacity.checked_div(DIRECT_ALIGN)?).checked_ilog2()? as usize;
    (class < CLASSES && capacity == DIRECT_ALIGN << class).then_some(class)
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, DIRECT_ALIGN).expect("a buffer is far smaller than the address space")
}

fn lock(class: usize) -> std::sync::MutexGuard<'static, Vec<Raw>> {
    FREE[class].lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_hold_what_was_written_at_any_size() {
        for len in [1, 511, 4096, 4097, 12288, 1 << 20, (2 << 20) + 4096] {
            let mut buf = AlignedBuf::new(len);
            buf.fill(7);
            assert!(is_aligned(&buf), "{len}");
            assert_eq!(buf.len(), len);
            assert!(buf.iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn bytes_of_a_buffer_share_its_memory() {
        let buf = AlignedBuf::copy_of(&[3; 8192]);
        let before = buf.as_ptr();
        let bytes = buf.into_bytes();
        assert_eq!(bytes.as_ptr(), before);
        assert!(is_aligned(&bytes.slice(4096..)));
    }

    #[test]
    fn unaligned_data_is_copied_and_aligned_data_is_not() {
        let whole = AlignedBuf::copy_of(&[9; 8192]).into_bytes();
        let (aligned, shifted) = (whole.slice(4096..), whole.slice(1..4097));
        assert_eq!(into_aligned(aligned.clone()).as_ptr(), aligned.as_ptr());
        let copied = into_aligned(shifted.clone());
        assert!(is_aligned(&copied));
        assert_eq!(copied, shifted);
    }

    #[test]
    fn zeroed_is_zero_even_when_recycled() {
        drop(AlignedBuf::copy_of(&[1; 4096]));
        assert!(AlignedBuf::zeroed(4096).iter().all(|byte| *byte == 0));
    }
}
