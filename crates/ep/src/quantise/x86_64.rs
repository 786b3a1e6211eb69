//! The instructions of x86-64.

use core::arch::x86_64::*;

use super::blocks::{self, EXPONENT, Kernel, SMALLEST_NORMAL, TO_SUM};
use super::{Block, Codes, Rule, scalar};
use crate::vectors::Vectors;

/// # Safety
/// The processor must have the vectors.
pub(super) unsafe fn quantise<R: Rule>(
    vectors: Vectors,
    row: &[Block],
    values: &mut [Codes],
    scales: &mut [R::Scale],
) {
    // SAFETY: the caller says that the processor has the vectors.
    unsafe {
        match vectors {
            Vectors::Scalar => scalar::blocks::<R>(row, values, scales),
            Vectors::Avx2 => quantise_avx2::<R>(row, values, scales),
            Vectors::Avx512 => quantise_avx512::<R>(row, values, scales),
            Vectors::Neon => unreachable!("no quantiser of this architecture has {vectors:?}"),
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn quantise_avx2<R: Rule>(row: &[Block], values: &mut [Codes], scales: &mut [R::Scale]) {
    // SAFETY: this function is compiled for the instructions, so whoever may call it has them.
    unsafe { blocks::quantise::<Avx2, R>(row, values, scales) }
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
fn quantise_avx512<R: Rule>(row: &[Block], values: &mut [Codes], scales: &mut [R::Scale]) {
    // SAFETY: this function is compiled for the instructions, so whoever may call it has them.
    unsafe { blocks::quantise::<Avx512, R>(row, values, scales) }
}

/// In each 32 bits of a vector of channels an even channel is the lower half, an odd one the upper half, where it is an
/// `f32` as it stands. So products come in two vectors, the even ones' and the odd ones'.
const UPPER: i32 = 0xffff_0000_u32 as i32;

const MAGNITUDES: i16 = 0x7fff;

/// As factors of the two halves of a sum's 32 bits, these add the exponent field, three bits to the left, to the lowest
/// bits, and leave the code in the second byte. What lies above it is of no account.
const TO_SECOND_BYTE: i32 = 16 << 16 | 256;

const SECOND_BYTE: i32 = 0xff00;

/// The largest of eight.
#[inline]
#[target_feature(enable = "avx2")]
fn largest(of: __m128i) -> u16 {
    // There is an instruction for the smallest only.
    let all = _mm_set1_epi8(-1);
    !_mm_extract_epi16::<0>(_mm_minpos_epu16(_mm_xor_si128(of, all))) as u16
}

struct Avx2;

impl Kernel for Avx2 {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn largest_bits(block: &Block) -> u16 {
        let mut most = _mm256_setzero_si256();
        for channels in block.as_chunks::<16>().0 {
            // SAFETY: sixteen channels are that long; the load is unaligned.
            let channels = unsafe { _mm256_loadu_si256(channels.as_ptr().cast()) };
            most = _mm256_max_epu16(most, _mm256_and_si256(channels, _mm256_set1_epi16(MAGNITUDES)));
        }
        largest(_mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn round(block: &Block, factor: f32, codes: &mut Codes) {
        for (channels, codes) in block.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<32>().0) {
            // SAFETY: the two halves are that long; the loads are unaligned.
            let (first, second) = unsafe {
                let at = channels.as_ptr().cast::<__m256i>();
                (_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1)))
            };
            let magnitudes = _mm256_packus_epi32(codes_avx2(first, factor), codes_avx2(second, factor));
            // Taking words for signed and narrowing them keeps their signs.
            let signs = _mm256_and_si256(_mm256_packs_epi16(first, second), _mm256_set1_epi8(-128));
            // Both were narrowed within each 16 bytes: the first eight there are of the first half.
            let all = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_or_si256(magnitudes, signs));
            // SAFETY: 32 codes are that long; the store is unaligned.
            unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), all) };
        }
    }
}

/// The codes of sixteen magnitudes, two in the lower half of each 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn codes_avx2(channels: __m256i, factor: f32) -> __m256i {
    let magnitudes = _mm256_and_si256(channels, _mm256_set1_epi16(MAGNITUDES));
    let even = code_avx2(_mm256_slli_epi32::<16>(magnitudes), factor);
    let odd = code_avx2(_mm256_and_si256(magnitudes, _mm256_set1_epi32(UPPER)), factor);
    let odd = _mm256_and_si256(odd, _mm256_set1_epi32(SECOND_BYTE));
    _mm256_or_si256(_mm256_srli_epi16::<8>(even), odd)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn code_avx2(magnitudes: __m256i, factor: f32) -> __m256i {
    let products = _mm256_mul_ps(_mm256_castsi256_ps(magnitudes), _mm256_set1_ps(factor));
    let normal = _mm256_max_ps(products, _mm256_set1_ps(SMALLEST_NORMAL));
    let exponents = _mm256_and_ps(normal, _mm256_castsi256_ps(_mm256_set1_epi32(EXPONENT)));
    let sums = _mm256_fmadd_ps(exponents, _mm256_set1_ps(TO_SUM), products);
    _mm256_madd_epi16(_mm256_castps_si256(sums), _mm256_set1_epi32(TO_SECOND_BYTE))
}

struct Avx512;

impl Kernel for Avx512 {
    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    unsafe fn largest_bits(block: &Block) -> u16 {
        let mut most = _mm512_setzero_si512();
        for channels in block.as_chunks::<32>().0 {
            // SAFETY: 32 channels are that long; the load is unaligned.
            let channels = unsafe { _mm512_loadu_si512(channels.as_ptr().cast()) };
            most = _mm512_max_epu16(most, _mm512_and_si512(channels, _mm512_set1_epi16(MAGNITUDES)));
        }
        let most = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
        largest(_mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    unsafe fn round(block: &Block, factor: f32, codes: &mut Codes) {
        for (channels, codes) in block.as_chunks::<64>().0.iter().zip(codes.as_chunks_mut::<64>().0) {
            // SAFETY: the two halves are that long; the loads are unaligned.
            let (first, second) = unsafe {
                let at = channels.as_ptr().cast::<__m512i>();
                (_mm512_loadu_si512(at), _mm512_loadu_si512(at.add(1)))
            };
            let magnitudes = _mm512_packus_epi32(codes_avx512(first, factor), codes_avx512(second, factor));
            // Taking words for signed and narrowing them keeps their signs.
            let signs = _mm512_packs_epi16(first, second);
            let all = _mm512_ternarylogic_epi32::<OR_AND>(magnitudes, signs, _mm512_set1_epi8(-128));
            // Both were narrowed within each 16 bytes: the first eight there are of the first half.
            let all = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), all);
            // SAFETY: 64 codes are that long; the store is unaligned.
            unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), all) };
        }
    }
}

/// The first, or both others.
const OR_AND: i32 = 0xf8;

/// The codes of 32 magnitudes, two in the lower half of each 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
fn codes_avx512(channels: __m512i, factor: f32) -> __m512i {
    let magnitudes = _mm512_and_si512(channels, _mm512_set1_epi16(MAGNITUDES));
    let even = code_avx512(_mm512_slli_epi32::<16>(magnitudes), factor);
    let odd = code_avx512(_mm512_and_si512(magnitudes, _mm512_set1_epi32(UPPER)), factor);
    let second_byte = _mm512_set1_epi32(SECOND_BYTE);
    _mm512_ternarylogic_epi32::<OR_AND>(_mm512_srli_epi16::<8>(even), odd, second_byte)
}

#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
fn code_avx512(magnitudes: __m512i, factor: f32) -> __m512i {
    let products = _mm512_mul_ps(_mm512_castsi512_ps(magnitudes), _mm512_set1_ps(factor));
    let normal = _mm512_max_ps(products, _mm512_set1_ps(SMALLEST_NORMAL));
    let exponents = _mm512_and_si512(_mm512_castps_si512(normal), _mm512_set1_epi32(EXPONENT));
    let sums = _mm512_fmadd_ps(_mm512_castsi512_ps(exponents), _mm512_set1_ps(TO_SUM), products);
    _mm512_madd_epi16(_mm512_castps_si512(sums), _mm512_set1_epi32(TO_SECOND_BYTE))
}
