//! One channel at a time.

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use crate::vectors::Vectors;

use super::NAN;
use super::stripes::{self, Lanes, Terms};
use crate::number::Bf16;

/// # Safety
/// As [`stripes::sum`].
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) unsafe fn sum<T: Terms>(_vectors: Vectors, terms: T, out: &mut [Bf16]) {
    // SAFETY: passed on.
    unsafe { sum_scalar(terms, out) }
}

/// # Safety
/// As [`stripes::sum`]; any processor will do.
pub(super) unsafe fn sum_scalar<T: Terms>(terms: T, out: &mut [Bf16]) {
    // SAFETY: passed on.
    unsafe { stripes::sum::<4, Scalar, Scalar, T>(terms, out) }
}

#[derive(Clone, Copy)]
struct Scalar([f32; 8]);

impl Lanes for Scalar {
    const CHANNELS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Scalar([0.0; 8])
    }

    #[inline(always)]
    unsafe fn load(at: *const Bf16) -> Self {
        // Volatile, since another process may write there: each channel is then read once.
        // SAFETY: the caller vouches for the channels; rows and biases are aligned to them.
        Scalar(core::array::from_fn(|channel| unsafe { at.add(channel).read_volatile() }.to_f32()))
    }

    #[inline(always)]
    unsafe fn add(self, row: Self) -> Self {
        Scalar(core::array::from_fn(|channel| self.0[channel] + row.0[channel]))
    }

    #[inline(always)]
    unsafe fn add_product(self, row: Self, weight: f32) -> Self {
        Scalar(core::array::from_fn(|channel| row.0[channel].mul_add(weight, self.0[channel])))
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut Bf16) {
        for (channel, sum) in self.0.into_iter().enumerate() {
            // SAFETY: the caller vouches for the channels.
            unsafe { at.add(channel).write(if sum.is_nan() { NAN } else { Bf16::from_f32(sum) }) }
        }
    }
}
