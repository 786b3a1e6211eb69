//! The streamed copy's instructions on x86-64.

use core::arch::x86_64::*;

use super::streamed::{self, Line};
use super::{Pieces, Vectors};

pub(super) fn supported(vectors: Vectors) -> bool {
    match vectors {
        // Both are part of the architecture's base.
        Vectors::Plain | Vectors::Sse2 => true,
        Vectors::Avx2 => is_x86_feature_detected!("avx2"),
        Vectors::Avx512 => is_x86_feature_detected!("avx512f"),
        Vectors::Neon => false,
    }
}

/// # Safety
/// As [`super::Copier::copy_pieces`]; [`supported`] must have said yes to `vectors`.
pub(super) unsafe fn stream(vectors: Vectors, pieces: Pieces<'_>) {
    // SAFETY: the processor has the instructions, and the caller vouches for the pieces.
    unsafe {
        match vectors {
            Vectors::Plain | Vectors::Neon => {
                unreachable!("no copier of this architecture streams with {vectors:?}")
            }
            Vectors::Sse2 => stream_sse2(pieces),
            Vectors::Avx2 => stream_avx2(pieces),
            Vectors::Avx512 => stream_avx512(pieces),
        }
    }
}

/// # Safety
/// As [`super::Copier::copy_pieces`].
unsafe fn stream_sse2(pieces: Pieces<'_>) {
    // SAFETY: passed on; SSE2 is there on every x86-64.
    unsafe { streamed::copy::<Sse2Line>(pieces) }
}

/// # Safety
/// As [`super::Copier::copy_pieces`]; the processor must have AVX2.
#[target_feature(enable = "avx2")]
unsafe fn stream_avx2(pieces: Pieces<'_>) {
    // SAFETY: passed on; this function is compiled for AVX2.
    unsafe { streamed::copy::<Avx2Line>(pieces) }
}

/// # Safety
/// As [`super::Copier::copy_pieces`]; the processor must have AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn stream_avx512(pieces: Pieces<'_>) {
    // SAFETY: passed on; this function is compiled for AVX-512F.
    unsafe { streamed::copy::<Avx512Line>(pieces) }
}

#[derive(Clone, Copy)]
struct Sse2Line([__m128i; 4]);

impl Line for Sse2Line {
    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // SAFETY: the four quarters make up the line that the caller vouches for; the load is unaligned.
        Sse2Line(core::array::from_fn(|part| unsafe { _mm_loadu_si128(src.add(part * 16).cast()) }))
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        for (part, value) in self.0.into_iter().enumerate() {
            // SAFETY: within the aligned line that the caller vouches for.
            unsafe { _mm_stream_si128(dst.add(part * 16).cast(), value) }
        }
    }

    #[inline(always)]
    fn prefetch(src: *const u8) {
        prefetch(src)
    }

    #[inline(always)]
    fn order() {
        fence()
    }
}

#[derive(Clone, Copy)]
struct Avx2Line([__m256i; 2]);

impl Line for Avx2Line {
    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // SAFETY: the two halves make up the line that the caller vouches for; the load is unaligned.
        Avx2Line(core::array::from_fn(|part| unsafe { _mm256_loadu_si256(src.add(part * 32).cast()) }))
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        for (part, value) in self.0.into_iter().enumerate() {
            // SAFETY: within the aligned line that the caller vouches for.
            unsafe { _mm256_stream_si256(dst.add(part * 32).cast(), value) }
        }
    }

    #[inline(always)]
    fn prefetch(src: *const u8) {
        prefetch(src)
    }

    #[inline(always)]
    fn order() {
        fence()
    }
}

#[derive(Clone, Copy)]
struct Avx512Line(__m512i);

impl Line for Avx512Line {
    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // SAFETY: the caller vouches for the line; the load is unaligned.
        Avx512Line(unsafe { _mm512_loadu_si512(src.cast()) })
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        // SAFETY: the caller vouches for the aligned line.
        unsafe { _mm512_stream_si512(dst.cast(), self.0) }
    }

    #[inline(always)]
    fn prefetch(src: *const u8) {
        prefetch(src)
    }

    #[inline(always)]
    fn order() {
        fence()
    }
}

#[inline(always)]
fn prefetch(src: *const u8) {
    // Into the second level: the first is too small for four streams that run ahead, and the hint for
    // streamed loads lets lines go again before they are used (it halves the speed).
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(src.cast()) }
}

/// Streaming stores are the one kind that x86-64 does not keep in order.
#[inline(always)]
fn fence() {
    // SAFETY: it has no operands; SSE is there on every x86-64.
    unsafe { _mm_sfence() }
}
