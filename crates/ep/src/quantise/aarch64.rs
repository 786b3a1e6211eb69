//! The instructions of 64-bit Arm.

use core::arch::aarch64::*;

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
    match vectors {
        Vectors::Scalar => scalar::blocks::<R>(row, values, scales),
        // SAFETY: the caller says that the processor has NEON.
        Vectors::Neon => unsafe { quantise_neon::<R>(row, values, scales) },
        Vectors::Avx2 | Vectors::Avx512 => {
            unreachable!("no quantiser of this architecture has {vectors:?}")
        }
    }
}

#[target_feature(enable = "neon")]
fn quantise_neon<R: Rule>(row: &[Block], values: &mut [Codes], scales: &mut [R::Scale]) {
    // SAFETY: this function is compiled for NEON, so whoever may call it has it.
    unsafe { blocks::quantise::<Neon, R>(row, values, scales) }
}

struct Neon;

impl Kernel for Neon {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn largest_bits(block: &Block) -> u16 {
        let mut most = vdupq_n_u16(0);
        for channels in block.as_chunks::<8>().0 {
            // SAFETY: eight channels are that long.
            let channels = unsafe { vld1q_u16(channels.as_ptr().cast()) };
            most = vmaxq_u16(most, vandq_u16(channels, vdupq_n_u16(0x7fff)));
        }
        vmaxvq_u16(most)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn round(block: &Block, factor: f32, codes: &mut Codes) {
        for (channels, codes) in block.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0) {
            // SAFETY: the two halves are that long.
            let (first, second) = unsafe {
                let at = channels.as_ptr().cast::<u16>();
                (vld1q_u16(at), vld1q_u16(at.add(8)))
            };
            let magnitudes = vuzp1q_u8(self::codes(first, factor), self::codes(second, factor));
            // The upper byte of each channel begins with its sign.
            let upper = vuzp2q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
            let all = vbslq_u8(vdupq_n_u8(0x80), upper, magnitudes);
            // SAFETY: sixteen codes are that long.
            unsafe { vst1q_u8(codes.as_mut_ptr(), all) };
        }
    }
}

/// The codes of eight magnitudes, in the first byte of each 16 bits.
#[inline]
#[target_feature(enable = "neon")]
fn codes(channels: uint16x8_t, factor: f32) -> uint8x16_t {
    let magnitudes = vandq_u16(channels, vdupq_n_u16(0x7fff));
    let low = code(vshll_n_u16::<16>(vget_low_u16(magnitudes)), factor);
    let high = code(vshll_high_n_u16::<16>(magnitudes), factor);
    vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)))
}

#[inline]
#[target_feature(enable = "neon")]
fn code(magnitudes: uint32x4_t, factor: f32) -> uint32x4_t {
    let products = vmulq_n_f32(vreinterpretq_f32_u32(magnitudes), factor);
    let normal = vmaxq_f32(products, vdupq_n_f32(SMALLEST_NORMAL));
    let exponents = vandq_u32(vreinterpretq_u32_f32(normal), vdupq_n_u32(EXPONENT as u32));
    let sums = vfmaq_n_f32(products, vreinterpretq_f32_u32(exponents), TO_SUM);
    let sums = vreinterpretq_u32_f32(sums);
    vsraq_n_u32::<20>(sums, sums)
}
