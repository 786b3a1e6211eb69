//! The instructions of x86-64.

use core::arch::x86_64::*;

use super::NAN;
use super::scalar::sum_scalar;
use super::stripes::{self, Lanes, Terms};
use crate::number::Bf16;
use crate::vectors::Vectors;

/// # Safety
/// As [`stripes::sum`], for these vectors.
pub(super) unsafe fn sum<T: Terms>(vectors: Vectors, terms: T, out: &mut [Bf16]) {
    // SAFETY: passed on; the caller says that the processor has the vectors.
    unsafe {
        match vectors {
            Vectors::Scalar => sum_scalar(terms, out),
            Vectors::Avx2 => sum_avx2(terms, out),
            Vectors::Avx512 => sum_avx512(terms, out),
            Vectors::Neon => unreachable!("no summer of this architecture has {vectors:?}"),
        }
    }
}

/// # Safety
/// As [`stripes::sum`].
#[target_feature(enable = "avx2,fma")]
unsafe fn sum_avx2<T: Terms>(terms: T, out: &mut [Bf16]) {
    // SAFETY: passed on; this function is compiled for the instructions.
    unsafe { stripes::sum::<4, Avx2, Eight, T>(terms, out) }
}

/// # Safety
/// As [`stripes::sum`].
#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
unsafe fn sum_avx512<T: Terms>(terms: T, out: &mut [Bf16]) {
    // SAFETY: passed on; this function is compiled for the instructions.
    unsafe { stripes::sum::<8, Avx512, Eight, T>(terms, out) }
}

/// In each 32 bits of a vector of channels an even channel is the lower half, an odd one the upper half. Here the even
/// ones have a register to themselves, and so the odd ones.
#[derive(Clone, Copy)]
struct Avx512 {
    even: __m512,
    odd: __m512,
}

/// Where an odd channel is an `f32` as it stands.
const UPPER: i32 = 0xffff_0000_u32 as i32;

/// In both halves.
const NANS: i32 = (NAN.to_bits() as i32) << 16 | NAN.to_bits() as i32;

impl Lanes for Avx512 {
    const CHANNELS: usize = 32;

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    unsafe fn zero() -> Self {
        Avx512 { even: _mm512_setzero_ps(), odd: _mm512_setzero_ps() }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    unsafe fn load(at: *const Bf16) -> Self {
        // SAFETY: the caller vouches for the channels; the load is unaligned.
        let channels = unsafe { _mm512_loadu_si512(at.cast()) };
        Avx512 {
            even: _mm512_castsi512_ps(_mm512_slli_epi32::<16>(channels)),
            odd: _mm512_castsi512_ps(_mm512_and_si512(channels, _mm512_set1_epi32(UPPER))),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    unsafe fn add(self, row: Self) -> Self {
        Avx512 { even: _mm512_add_ps(self.even, row.even), odd: _mm512_add_ps(self.odd, row.odd) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    unsafe fn add_product(self, row: Self, weight: f32) -> Self {
        let weight = _mm512_set1_ps(weight);
        Avx512 {
            even: _mm512_fmadd_ps(row.even, weight, self.even),
            odd: _mm512_fmadd_ps(row.odd, weight, self.odd),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    unsafe fn store(self, at: *mut Bf16) {
        let (even, odd) = (_mm512_castps_si512(self.even), _mm512_castps_si512(self.odd));
        let upper = _mm512_set1_epi32(UPPER);
        // The upper halves of all, and the lower ones, which say whether it is a step more.
        let channels = _mm512_ternarylogic_epi32::<SELECT>(upper, odd, _mm512_srli_epi32::<16>(even));
        let rest = _mm512_ternarylogic_epi32::<SELECT>(upper, _mm512_slli_epi32::<16>(odd), even);
        // A half counts as more where the channel is odd.
        let rest = _mm512_ternarylogic_epi32::<OR_AND>(rest, channels, _mm512_set1_epi16(1));
        let more = _mm512_cmpgt_epu16_mask(rest, _mm512_set1_epi16(i16::MIN));
        let mut channels = _mm512_mask_add_epi16(channels, more, channels, _mm512_set1_epi16(1));
        if _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.even, self.odd) != 0 {
            let nan = |sums| _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(sums, sums);
            let nans = _mm512_set1_epi32(NANS);
            let of_even = _mm512_ternarylogic_epi32::<SELECT>(upper, channels, nans);
            channels = _mm512_mask_mov_epi32(channels, nan(self.even), of_even);
            let of_odd = _mm512_ternarylogic_epi32::<SELECT>(upper, nans, channels);
            channels = _mm512_mask_mov_epi32(channels, nan(self.odd), of_odd);
        }
        // SAFETY: the caller vouches for the channels; the store is unaligned.
        unsafe { _mm512_storeu_si512(at.cast(), channels) };
    }
}

/// The second where the first has ones, else the third.
const SELECT: i32 = 0xca;

/// The first, or both others.
const OR_AND: i32 = 0xf8;

/// As [`Avx512`].
#[derive(Clone, Copy)]
struct Avx2 {
    even: __m256,
    odd: __m256,
}

impl Lanes for Avx2 {
    const CHANNELS: usize = 16;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn zero() -> Self {
        Avx2 { even: _mm256_setzero_ps(), odd: _mm256_setzero_ps() }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load(at: *const Bf16) -> Self {
        // SAFETY: the caller vouches for the channels; the load is unaligned.
        let channels = unsafe { _mm256_loadu_si256(at.cast()) };
        Avx2 {
            even: _mm256_castsi256_ps(_mm256_slli_epi32::<16>(channels)),
            odd: _mm256_castsi256_ps(_mm256_and_si256(channels, _mm256_set1_epi32(UPPER))),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add(self, row: Self) -> Self {
        Avx2 { even: _mm256_add_ps(self.even, row.even), odd: _mm256_add_ps(self.odd, row.odd) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_product(self, row: Self, weight: f32) -> Self {
        let weight = _mm256_set1_ps(weight);
        Avx2 {
            even: _mm256_fmadd_ps(row.even, weight, self.even),
            odd: _mm256_fmadd_ps(row.odd, weight, self.odd),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn store(self, at: *mut Bf16) {
        let (even, odd) = (round_avx2(self.even), round_avx2(self.odd));
        let odd = _mm256_and_si256(odd, _mm256_set1_epi32(UPPER));
        let channels = _mm256_or_si256(_mm256_srli_epi32::<16>(even), odd);
        // SAFETY: the caller vouches for the channels; the store is unaligned.
        unsafe { _mm256_storeu_si256(at.cast(), channels) };
    }
}

/// Eight channels in their order, for the end of a row.
#[derive(Clone, Copy)]
struct Eight(__m256);

impl Lanes for Eight {
    const CHANNELS: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn zero() -> Self {
        Eight(_mm256_setzero_ps())
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load(at: *const Bf16) -> Self {
        // SAFETY: the caller vouches for the channels; the load is unaligned.
        let channels = unsafe { _mm_loadu_si128(at.cast()) };
        Eight(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(channels))))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add(self, row: Self) -> Self {
        Eight(_mm256_add_ps(self.0, row.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_product(self, row: Self, weight: f32) -> Self {
        Eight(_mm256_fmadd_ps(row.0, _mm256_set1_ps(weight), self.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn store(self, at: *mut Bf16) {
        let words = _mm256_srli_epi32::<16>(round_avx2(self.0));
        let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        // SAFETY: the caller vouches for the channels; the store is unaligned.
        unsafe { _mm_storeu_si128(at.cast(), _mm_packus_epi32(low, high)) };
    }
}

/// Rounds to the upper halves; what the lower halves hold is of no account.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn round_avx2(sums: __m256) -> __m256i {
    let bits = _mm256_castps_si256(sums);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(sums, sums));
    _mm256_blendv_epi8(rounded, _mm256_set1_epi32(NANS), nan)
}
