//! The copy through the cache: the C library's `memcpy` for each piece, with the next pieces asked for
//! early where they are short.

use super::Pieces;

/// # Safety
/// As [`super::Copier::copy_pieces`].
pub(super) unsafe fn copy(pieces: Pieces<'_>) {
    let ahead = if pieces.piece_bytes < PREFETCH_BELOW_PIECE_BYTES {
        AHEAD_BYTES.div_ceil(pieces.piece_bytes.max(LINE_BYTES))
    } else {
        0
    };
    if ahead > 0 {
        // The first piece is not asked for: its copy begins at once.
        for piece in 1..ahead.min(pieces.count()) {
            prefetch_piece(&pieces, piece);
        }
    }
    for piece in 0..pieces.count() {
        if ahead > 0 && piece + ahead < pieces.count() {
            prefetch_piece(&pieces, piece + ahead);
        }
        // SAFETY: the caller vouches for the piece at both ends and that they do not overlap.
        unsafe { core::ptr::copy_nonoverlapping(pieces.src(piece), pieces.dst(piece), pieces.piece_bytes) }
    }
}

/// From here on the hardware prefetcher does as well, and the extra instructions only cost.
const PREFETCH_BELOW_PIECE_BYTES: usize = 4096;

/// How far the prefetch runs ahead.
const AHEAD_BYTES: usize = 2048;

const LINE_BYTES: usize = 64;

fn prefetch_piece(pieces: &Pieces<'_>, piece: usize) {
    let (src, dst) = (pieces.src(piece), pieces.dst(piece));
    for offset in (0..pieces.piece_bytes).step_by(LINE_BYTES) {
        prefetch_read(src.wrapping_add(offset));
        prefetch_write(dst.wrapping_add(offset));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch_read(address: *const u8) {
    use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch_write(address: *mut u8) {
    // The intrinsic would fall back to a prefetch for reading unless the whole build assumes the instruction;
    // 64-bit processors without it take it for a no-operation.
    // SAFETY: a prefetch never faults and changes neither memory nor flags.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn prefetch_read(address: *const u8) {
    // SAFETY: a prefetch never faults and changes neither memory nor flags.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn prefetch_write(address: *mut u8) {
    // SAFETY: a prefetch never faults and changes neither memory nor flags.
    unsafe {
        core::arch::asm!("prfm pstl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn prefetch_read(_address: *const u8) {}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn prefetch_write(_address: *mut u8) {}
