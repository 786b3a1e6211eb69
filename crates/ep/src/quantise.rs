//! Rows of bfloat16 become FP8 e4m3 with one scale for 128 channels.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod blocks;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as instructions;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use scalar as instructions;
#[cfg(target_arch = "x86_64")]
use x86_64 as instructions;

use crate::number::{Bf16, E4m3, Ue8m0};
use crate::vectors::Vectors;

/// Quantises rows with the best instructions that this processor has.
///
/// It is a small value without state; copy it wherever a thread needs one.
///
/// # What is computed
/// Of each 128 channels, `amax` is the largest magnitude, and at least 10⁻⁴. From it follow a factor and the scale that
/// is stored for the reader ([`ScaleRule`]). Each channel times the factor, in `f32`, is rounded to the nearest e4m3
/// value, ties to even. The reader multiplies a value by its scale.
///
/// # What is no finite number
/// An infinity counts as the largest finite bfloat16 of its sign, 3.39 · 10³⁸: it becomes ±448, its scale is huge, and
/// so its neighbours become zeros; the overflow stays visible. A NaN becomes the e4m3 NaN of its sign and has no part in
/// `amax`, so it spoils no neighbour.
///
/// All of it is equal bit for bit with any [`Vectors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantiser {
    vectors: Vectors,
}

/// How the scale of 128 channels follows from their `amax`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleRule {
    /// The scale is `amax * (1 / 448)`, the factor `448 / amax`, each an `f32` operation.
    Plain,
    /// The scale is the smallest power of two that is not below `amax * (1 / 448)`, the factor its reciprocal.
    PowerOfTwo,
}

impl Quantiser {
    /// The best that this processor can do, found at run time.
    pub fn detect() -> Quantiser {
        Quantiser { vectors: Vectors::detect() }
    }

    /// One with exactly these instructions, or `None` where the processor lacks them.
    pub fn with_vectors(vectors: Vectors) -> Option<Quantiser> {
        vectors.supported().then_some(Quantiser { vectors })
    }

    /// The instructions in use.
    pub fn vectors(&self) -> Vectors {
        self.vectors
    }

    /// Writes the e4m3 bits of `row` into `values`, and into `scales` one scale for each 128 channels.
    ///
    /// # Panics
    /// If the row is no whole number of 128 channels, or the outputs do not fit it exactly.
    pub fn quantise(&self, row: &[Bf16], rule: ScaleRule, values: &mut [u8], scales: &mut [f32]) {
        match rule {
            ScaleRule::Plain => self.run::<Plain>(row, values, scales),
            ScaleRule::PowerOfTwo => self.run::<PowerOfTwo>(row, values, scales),
        }
    }

    /// As [`Quantiser::quantise`] with [`ScaleRule::PowerOfTwo`], but of each scale only its [`Ue8m0`] byte.
    ///
    /// # Panics
    /// As [`Quantiser::quantise`].
    pub fn quantise_ue8m0(&self, row: &[Bf16], values: &mut [u8], scales: &mut [u8]) {
        self.run::<PowerOfTwoByte>(row, values, scales);
    }

    fn run<R: Rule>(&self, row: &[Bf16], values: &mut [u8], scales: &mut [R::Scale]) {
        let (row, rest) = row.as_chunks();
        let (values, values_rest) = values.as_chunks_mut();
        assert!(rest.is_empty() && values_rest.is_empty(), "whole blocks of {BLOCK_CHANNELS} channels");
        assert_eq!(row.len(), values.len(), "a value for each channel");
        assert_eq!(row.len(), scales.len(), "a scale for each block");
        // SAFETY: the vectors of a quantiser were found on this processor when it was made.
        unsafe { instructions::quantise::<R>(self.vectors, row, values, scales) }
    }
}

/// Channels that share a scale.
const BLOCK_CHANNELS: usize = 128;

/// Theirs.
type Block = [Bf16; BLOCK_CHANNELS];

/// And what they become.
type Codes = [u8; BLOCK_CHANNELS];

/// A [`ScaleRule`] and the form in which scales are stored.
trait Rule {
    type Scale;

    /// The factor and the scale for channels of which this is the largest magnitude.
    fn apply(largest: f32) -> (f32, Self::Scale);
}

struct Plain;
struct PowerOfTwo;
struct PowerOfTwoByte;

impl Rule for Plain {
    type Scale = f32;

    #[inline(always)]
    fn apply(largest: f32) -> (f32, f32) {
        let amax = at_least_smallest(largest);
        (E4m3::MAX / amax, amax * (1.0 / E4m3::MAX))
    }
}

impl Rule for PowerOfTwo {
    type Scale = f32;

    #[inline(always)]
    fn apply(largest: f32) -> (f32, f32) {
        let (factor, byte) = PowerOfTwoByte::apply(largest);
        (factor, Ue8m0::from_bits(byte).to_f32())
    }
}

impl Rule for PowerOfTwoByte {
    type Scale = u8;

    #[inline(always)]
    fn apply(largest: f32) -> (f32, u8) {
        let scale = Ue8m0::at_least(at_least_smallest(largest) * (1.0 / E4m3::MAX));
        // Negating the exponent is mirroring its byte at 127; the range of `amax` keeps both far from the ends.
        (Ue8m0::from_bits(254 - scale.to_bits()).to_f32(), scale.to_bits())
    }
}

#[inline(always)]
fn at_least_smallest(largest: f32) -> f32 {
    if largest > SMALLEST_AMAX { largest } else { SMALLEST_AMAX }
}

const SMALLEST_AMAX: f32 = 1e-4;

#[cfg(test)]
mod tests;
