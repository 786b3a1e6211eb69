//! Rows of bfloat16 become one: the sum of all, weighted or not.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod scalar;
mod stripes;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as instructions;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use scalar as instructions;
#[cfg(target_arch = "x86_64")]
use x86_64 as instructions;

use stripes::{Plain, Terms, Weighted};

use crate::number::Bf16;
use crate::vectors::Vectors;

/// Sums rows with the best instructions that this processor has.
///
/// It is a small value without state; copy it wherever a thread needs one.
///
/// # What is computed
/// Each channel is summed by itself, in `f32`, in the order of the rows, and rounded once. So equal inputs give equal
/// bits, with any [`Vectors`]. What overflows becomes an infinity. A sum that is no number is the NaN 0x7fc0, whatever
/// NaN or infinities it came from: which of several NaNs would survive is up to the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summer {
    vectors: Vectors,
}

impl Summer {
    /// The best that this processor can do, found at run time.
    pub fn detect() -> Summer {
        Summer { vectors: Vectors::detect() }
    }

    /// One with exactly these instructions, or `None` where the processor lacks them.
    pub fn with_vectors(vectors: Vectors) -> Option<Summer> {
        vectors.supported().then_some(Summer { vectors })
    }

    /// The instructions in use.
    pub fn vectors(&self) -> Vectors {
        self.vectors
    }

    /// Sums `rows[k] * weights[k]` from 0.0 on, each by a fused multiply-add. Without rows all are zeros.
    ///
    /// # Safety
    /// Each row must be readable for as many channels as `out` has, aligned to [`Bf16`], and no part of `out`. This
    /// program must not write it during the call. Another process may: then each channel that it changes is summed
    /// with what was there before or after, and the others are right.
    ///
    /// # Panics
    /// If the weights are not as many as the rows, or the channels no multiple of 8.
    pub unsafe fn weighted(&self, rows: &[*const Bf16], weights: &[f32], out: &mut [Bf16]) {
        assert_eq!(rows.len(), weights.len(), "a weight for each row");
        // SAFETY: the rows are as the caller says.
        unsafe { self.run(Weighted { rows, weights }, out) }
    }

    /// Sums the rows, from the sum of two biases on, of which a missing one is 0.0.
    ///
    /// # Safety
    /// As [`Summer::weighted`].
    ///
    /// # Panics
    /// If there are more than two biases, they are not as long as `out`, or the channels are no multiple of 8.
    pub unsafe fn plain(&self, rows: &[*const Bf16], biases: &[&[Bf16]], out: &mut [Bf16]) {
        assert!(biases.len() <= 2, "two biases at most");
        assert!(biases.iter().all(|bias| bias.len() == out.len()), "a bias has all channels");
        // SAFETY: the rows are as the caller says.
        unsafe { self.run(Plain { rows, biases }, out) }
    }

    /// # Safety
    /// As [`Summer::weighted`], and each bias of the terms as long as `out`.
    unsafe fn run<T: Terms>(&self, terms: T, out: &mut [Bf16]) {
        assert!(out.len().is_multiple_of(8), "channels in eights");
        // SAFETY: the vectors of a summer were found on this processor when it was made; the rest is the caller's.
        unsafe { instructions::sum(self.vectors, terms, out) }
    }
}

/// The one NaN that comes out.
const NAN: Bf16 = Bf16::from_bits(0x7fc0);

#[cfg(test)]
mod tests;
