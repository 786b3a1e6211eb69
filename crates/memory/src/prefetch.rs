//! Asks the processor for lines of memory before they are needed. Whoever moves scattered pages knows the next ones,
//! which no hardware prefetcher can guess.
//!
//! A prefetch is a hint: it never faults, whatever the address, and changes nothing that a program can see.

#![allow(unsafe_code)]

/// Asks for the line of an address, to be read.
#[inline(always)]
pub fn prefetch_read(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch never faults and changes neither memory nor flags.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Asks for the line of an address, to be written.
#[inline(always)]
pub fn prefetch_write(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // The intrinsic would fall back to a prefetch for reading unless the whole build assumes the instruction; 64-bit
    // processors without it take it for a no-operation.
    // SAFETY: a prefetch never faults and changes neither memory nor flags.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch never faults and changes neither memory nor flags.
    unsafe {
        core::arch::asm!("prfm pstl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Asks for the first lines of a piece that the kernel is going to read soon: from there on the hardware's own
/// prefetcher follows.
#[inline]
pub fn prefetch_head_read(piece: *const u8, piece_bytes: usize) {
    for offset in (0..piece_bytes.min(HEAD_BYTES)).step_by(LINE_BYTES) {
        prefetch_read(piece.wrapping_add(offset));
    }
}

/// The same for a piece that is going to be written.
#[inline]
pub fn prefetch_head_write(piece: *const u8, piece_bytes: usize) {
    for offset in (0..piece_bytes.min(HEAD_BYTES)).step_by(LINE_BYTES) {
        prefetch_write(piece.wrapping_add(offset));
    }
}

/// Four to sixteen lines did equally well for pages of 4 KiB; all of them did worse.
const HEAD_BYTES: usize = 8 * LINE_BYTES;

const LINE_BYTES: usize = 64;
