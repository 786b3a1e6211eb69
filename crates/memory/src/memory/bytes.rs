//! Copies between memory that others write and memory that is ours.
//!
//! A plain copy from or to bytes that another thread changes is undefined in Rust, however plain the bytes. Each
//! function here has the meaning of its portable form: one relaxed atomic access a byte. On x86-64 one string
//! instruction does that in bulk, on 64-bit Arm a loop over pairs of vector registers; the compiler may not look inside,
//! so it cannot assume that nobody else writes.

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

#[cfg(all(target_arch = "aarch64", not(miri)))]
use pairs as imp;

#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
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

#[cfg(all(target_arch = "aarch64", not(miri)))]
mod pairs {
    use std::arch::asm;

    pub unsafe fn load(from: *mut u8, into: &mut [u8]) {
        // SAFETY: the caller vouches for `into.len()` bytes at `from`; as many are ours to write.
        unsafe { copy(into.as_mut_ptr(), from, into.len()) }
    }

    pub unsafe fn store(to: *mut u8, from: &[u8]) {
        // SAFETY: the caller vouches for `from.len()` bytes at `to`; as many can be read.
        unsafe { copy(to, from.as_ptr(), from.len()) }
    }

    /// # Safety
    /// `from` must be readable and `to` writable for `bytes`, without overlap.
    unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: the loops read `bytes` bytes at `from` and write as many at `to`, 64 a round and then single ones, and
        // change only the registers and flags that are named.
        unsafe {
            asm!(
                "subs {rest}, {rest}, #64",
                "b.lo 3f",
                "2:",
                "ldp {a:q}, {b:q}, [{from}]",
                "ldp {c:q}, {d:q}, [{from}, #32]",
                "add {from}, {from}, #64",
                "stp {a:q}, {b:q}, [{to}]",
                "stp {c:q}, {d:q}, [{to}, #32]",
                "add {to}, {to}, #64",
                "subs {rest}, {rest}, #64",
                "b.hs 2b",
                "3:",
                "adds {rest}, {rest}, #64",
                "b.eq 5f",
                "4:",
                "ldrb {byte:w}, [{from}], #1",
                "strb {byte:w}, [{to}], #1",
                "subs {rest}, {rest}, #1",
                "b.ne 4b",
                "5:",
                from = inout(reg) from => _,
                to = inout(reg) to => _,
                rest = inout(reg) bytes => _,
                byte = out(reg) _,
                a = out(vreg) _,
                b = out(vreg) _,
                c = out(vreg) _,
                d = out(vreg) _,
                options(nostack),
            );
        }
    }

    pub unsafe fn fill(to: *mut u8, bytes: usize, value: u8) {
        // SAFETY: the loops write `bytes` bytes at `to`, for which the caller vouches, 64 a round and then single ones,
        // and change only the registers and flags that are named.
        unsafe {
            asm!(
                "dup {v:v}.16b, {byte:w}",
                "subs {rest}, {rest}, #64",
                "b.lo 3f",
                "2:",
                "stp {v:q}, {v:q}, [{to}]",
                "stp {v:q}, {v:q}, [{to}, #32]",
                "add {to}, {to}, #64",
                "subs {rest}, {rest}, #64",
                "b.hs 2b",
                "3:",
                "adds {rest}, {rest}, #64",
                "b.eq 5f",
                "4:",
                "strb {byte:w}, [{to}], #1",
                "subs {rest}, {rest}, #1",
                "b.ne 4b",
                "5:",
                to = inout(reg) to => _,
                rest = inout(reg) bytes => _,
                byte = in(reg) u32::from(value),
                v = out(vreg) _,
                options(nostack),
            );
        }
    }
}

#[cfg(any(test, miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
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
            for bytes in [0, 1, 7, 8, 63, 64, 65, 127, 128, 200] {
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
