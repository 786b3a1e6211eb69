//! The instructions of 64-bit Arm.

use core::arch::aarch64::*;

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
            Vectors::Neon => sum_neon(terms, out),
            Vectors::Avx2 | Vectors::Avx512 => {
                unreachable!("no summer of this architecture has {vectors:?}")
            }
        }
    }
}

/// # Safety
/// As [`stripes::sum`].
#[target_feature(enable = "neon")]
unsafe fn sum_neon<T: Terms>(terms: T, out: &mut [Bf16]) {
    // SAFETY: passed on; this function is compiled for NEON.
    unsafe { stripes::sum::<8, Neon, Neon, T>(terms, out) }
}

#[derive(Clone, Copy)]
struct Neon {
    low: float32x4_t,
    high: float32x4_t,
}

impl Lanes for Neon {
    const CHANNELS: usize = 8;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn zero() -> Self {
        Neon { low: vdupq_n_f32(0.0), high: vdupq_n_f32(0.0) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(at: *const Bf16) -> Self {
        // SAFETY: the caller vouches for the channels, and they are aligned.
        let channels = unsafe { vld1q_u16(at.cast()) };
        Neon {
            low: vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(channels))),
            high: vreinterpretq_f32_u32(vshll_high_n_u16::<16>(channels)),
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(self, row: Self) -> Self {
        Neon { low: vaddq_f32(self.low, row.low), high: vaddq_f32(self.high, row.high) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_product(self, row: Self, weight: f32) -> Self {
        Neon { low: vfmaq_n_f32(self.low, row.low, weight), high: vfmaq_n_f32(self.high, row.high, weight) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store(self, at: *mut Bf16) {
        let (low, high) = (round(self.low), round(self.high));
        // The upper halves of both.
        let channels = vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
        // SAFETY: the caller vouches for the channels, and they are aligned.
        unsafe { vst1q_u16(at.cast(), channels) };
    }
}

/// Rounds to the upper halves; what the lower halves hold is of no account.
#[inline]
#[target_feature(enable = "neon")]
fn round(sums: float32x4_t) -> uint32x4_t {
    let bits = vreinterpretq_u32_f32(sums);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    let number = vceqq_f32(sums, sums);
    vbslq_u32(number, rounded, vdupq_n_u32(u32::from(NAN.to_bits()) << 16))
}
