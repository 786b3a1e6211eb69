//! Memory between two pages that nobody may touch, so that a step beyond either end is a crash, in vector instructions
//! too.

use core::ptr::{null_mut, slice_from_raw_parts_mut};

pub(crate) struct Fenced<T> {
    map: *mut u8,
    map_bytes: usize,
    values: *mut [T],
}

impl<T: Copy> Fenced<T> {
    /// A copy of `values` that begins `shift` values behind the first guard, or ends as many before the second.
    pub(crate) fn new(values: &[T], shift: usize, against_end: bool) -> Fenced<T> {
        let (bytes, shift_bytes) = (size_of_val(values), shift * size_of::<T>());
        let middle_bytes = (bytes + shift_bytes).next_multiple_of(GUARD_BYTES).max(GUARD_BYTES);
        let map_bytes = middle_bytes + 2 * GUARD_BYTES;
        // SAFETY: a fresh mapping at no particular address; the middle is made accessible, and the values lie there.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(null_mut(), map_bytes, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            let map = map.cast::<u8>();
            let middle = map.add(GUARD_BYTES);
            assert_eq!(libc::mprotect(middle.cast(), middle_bytes, libc::PROT_READ | libc::PROT_WRITE), 0);
            let start = if against_end { middle_bytes - bytes - shift_bytes } else { shift_bytes };
            let start = middle.add(start).cast::<T>();
            start.copy_from_nonoverlapping(values.as_ptr(), values.len());
            Fenced { map, map_bytes, values: slice_from_raw_parts_mut(start, values.len()) }
        }
    }

    pub(crate) fn get(&mut self) -> &mut [T] {
        // SAFETY: the values are mapped, initialised and borrowed through `self`.
        unsafe { &mut *self.values }
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.values.cast_const().cast()
    }
}

impl<T> Drop for Fenced<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody refers to it any more.
        unsafe { assert_eq!(libc::munmap(self.map.cast(), self.map_bytes), 0) }
    }
}

/// A multiple of every page size that kernels use.
const GUARD_BYTES: usize = 64 << 10;
