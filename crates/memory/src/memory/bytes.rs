//! Copies between memory that others write and memory that is ours.
//!
//! A plain copy from or to bytes that another thread changes is undefined in Rust, however plain the bytes. Each
//! function here has the meaning of its portable form: one relaxed atomic access a byte. On x86-64 one string
//! instruction does that in bulk; the compiler may not look inside, so it cannot assume that nobody else writes.

/// Copies `into.len()` bytes from `from` on.
///
/// # Safety
/// The bytes must be mapped and readable, and not be part of `into`.
#[inline]
pub(super) unsafe fn load(from: *mut u8, into: &mut [u8]) {
    // SAFETY: the caller vouches for `from`; `into` is ours to write.
    unsafe { imp::load(from, into) }
}

/// Copies `from` to `to` on.
///
/// # Safety
/// The bytes at `to` must be mapped and writable, and not be part of `from`.
#[inline]
pub(super) unsafe fn store(to: *mut u8, from: &[u8]) {
    // SAFETY: the caller vouches for `to`.
    unsafe { imp::store(to, from) }
}

/// Sets `bytes` bytes to `value`, from `to` on.
///
/// # Safety
/// The bytes must be mapped and writable.
#[inline]
pub(super) unsafe fn fill(to: *mut u8, bytes: usize, value: u8) {
    // SAFETY: the caller vouches for `to`.
    unsafe { imp::fill(to, bytes, value) }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
use string as imp;

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
use portable as imp;

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod string {
    use std::arch::asm;

    pub unsafe fn load(from: *mut u8, into: &mut [u8]) {
        // SAFETY: the instruction reads `into.len()` bytes at `from`, for which the caller vouches, writes as many
        // to `into`, and changes only the three registers; the direction flag is clear, as always between blocks.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") into.len() => _,
                inout("rsi") from => _,
                inout("rdi") into.as_mut_ptr() => _,
                options(nostack, preserves_flags),
            );
        }
    }

    pub unsafe fn store(to: *mut u8, from: &[u8]) {
        // SAFETY: the instruction reads `from`, writes `from.len()` bytes at `to`, for which the caller vouches, and
        // changes only the three registers; the direction flag is clear, as always between blocks.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") from.len() => _,
                inout("rsi") from.as_ptr() => _,
                inout("rdi") to => _,
                options(nostack, preserves_flags),
            );
        }
    }

    pub unsafe fn fill(to: *mut u8, bytes: usize, value: u8) {
        // SAFETY: the instruction writes `bytes` bytes at `to`, for which the caller vouches, and changes only the
        // two registers; the direction flag is clear, as always between blocks.
        unsafe {
            asm!(
                "rep stosb",
                inout("rcx") bytes => _,
                inout("rdi") to => _,
                in("al") value,
                options(nostack, preserves_flags),
            );
        }
    }
}

#[cfg(any(test, not(all(target_arch = "x86_64", not(miri)))))]
mod portable {
    use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

    /// # Safety
    /// As [`super::load`].
    pub unsafe fn load(from: *mut u8, into: &mut [u8]) {
        for (at, byte) in into.iter_mut().enumerate() {
            // SAFETY: one of the bytes for which the caller vouches; a byte is always aligned.
            *byte = unsafe { AtomicU8::from_ptr(from.add(at)) }.load(Relaxed);
        }
    }

    pub unsafe fn store(to: *mut u8, from: &[u8]) {
        for (at, &byte) in from.iter().enumerate() {
            // SAFETY: one of the bytes for which the caller vouches; a byte is always aligned.
            unsafe { AtomicU8::from_ptr(to.add(at)) }.store(byte, Relaxed);
        }
    }

    pub unsafe fn fill(to: *mut u8, bytes: usize, value: u8) {
        for at in 0..bytes {
            // SAFETY: one of the bytes for which the caller vouches; a byte is always aligned.
            unsafe { AtomicU8::from_ptr(to.add(at)) }.store(value, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_touch_exactly_the_bytes_they_are_told() {
        type Forms =
            (unsafe fn(*mut u8, &mut [u8]), unsafe fn(*mut u8, &[u8]), unsafe fn(*mut u8, usize, u8));
        let forms: [Forms; 2] = [(load, store, fill), (portable::load, portable::store, portable::fill)];
        for (load, store, fill) in forms {
            for bytes in [0, 1, 7, 8, 63, 200] {
                let mut memory = [0xAAu8; 256];
                let base = memory.as_mut_ptr();
                let source: Vec<u8> = (0..bytes as u8).collect();
                let mut back = vec![0; bytes];
                // SAFETY: 3 + 200 bytes lie inside the array, to which no reference is used meanwhile.
                unsafe {
                    store(base.add(3), &source);
                    load(base.add(3), &mut back);
                }
                assert_eq!(back, source);
                // SAFETY: as above.
                unsafe { fill(base.add(3), bytes / 2, 0x55) };
                let mut expected = [0xAAu8; 256];
                expected[3..3 + bytes].copy_from_slice(&source);
                expected[3..3 + bytes / 2].fill(0x55);
                assert_eq!(memory, expected);
            }
        }
    }
}
