//! Blocks of 128 channels, written once over [`Kernel`], which each instruction set implements.
//!
//! # How a product is rounded
//! The neighbours of an e4m3 value with exponent `e` are 2^(e-3) away, and those of an `f32` 2^23 times closer than its
//! own exponent says. So a sum with 2^(e+20) rounds a magnitude as e4m3 asks, ties to even, and its lowest bits count in
//! steps of 2^(e-3): the hidden bit and the mantissa of the result. With `e` kept from falling below -6 that is right
//! for what is subnormal in e4m3 as well. The sum's exponent field, three bits to the left, is the other part of the
//! code; and with [`UP`] it begins at a multiple of 32, so that the lowest byte needs no correction.
//!
//! No product exceeds 448 so far that it would round up, so nothing needs to saturate.

use core::array::{from_mut, from_ref};

use crossdock_memory::prefetch_read;

use super::{Block, Codes, Rule, scalar};
use crate::number::Bf16;

pub(super) trait Kernel {
    /// The largest of the channels' bits without their signs.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn largest_bits(block: &Block) -> u16;

    /// Each channel times `factor`, which is a factor times [`UP`], rounded. All channels must be finite and at most
    /// 448 after the factor itself.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn round(block: &Block, factor: f32, codes: &mut Codes);
}

/// All factors are this much larger here.
const UP: f32 = (1_u32 << 19) as f32;

/// 2^-6, the smallest normal e4m3 value, after that.
pub(super) const SMALLEST_NORMAL: f32 = UP / 64.0;

/// What the exponent of a product is taken times.
pub(super) const TO_SUM: f32 = (1_u32 << 20) as f32;

/// The bits of an exponent.
pub(super) const EXPONENT: i32 = 0x7f80_0000;

/// # Safety
/// The processor must have the instructions of `K`, and the caller must be compiled for them: this is inlined there.
#[inline(always)]
pub(super) unsafe fn quantise<K: Kernel, R: Rule>(
    row: &[Block],
    values: &mut [Codes],
    scales: &mut [R::Scale],
) {
    let (runs, rest) = row.as_chunks::<RUN>();
    let (values_of_runs, values_of_rest) = values.as_chunks_mut::<RUN>();
    let (scales_of_runs, scales_of_rest) = scales.as_chunks_mut::<RUN>();
    for ((row, values), scales) in runs.iter().zip(values_of_runs).zip(scales_of_runs) {
        // SAFETY: passed on.
        unsafe { run::<K, R, RUN>(row, values, scales) };
    }
    let rest = rest.iter().zip(values_of_rest).zip(scales_of_rest);
    for ((block, codes), scale) in rest {
        // SAFETY: passed on.
        unsafe { run::<K, R, 1>(from_ref(block), from_mut(codes), from_mut(scale)) };
    }
}

/// First all factors, then all values: what waits for a factor would fill the processor's queue, and the search for the
/// next one could not begin.
///
/// # Safety
/// As [`quantise`].
#[inline(always)]
unsafe fn run<K: Kernel, R: Rule, const N: usize>(
    row: &[Block; N],
    values: &mut [Codes; N],
    scales: &mut [R::Scale; N],
) {
    let mut largest = [0; N];
    for (block, largest) in row.iter().zip(&mut largest) {
        for line in block.as_chunks::<32>().0 {
            // Beyond the row's end this asks for what follows it, mostly the next row.
            prefetch_read(line.as_ptr().wrapping_add(AHEAD).cast());
        }
        // SAFETY: passed on.
        *largest = unsafe { K::largest_bits(block) };
    }
    let mut factors = [0.0; N];
    for ((factor, scale), &largest) in factors.iter_mut().zip(&mut *scales).zip(&largest) {
        // Blocks in which not all is finite are done again below, where they are found.
        (*factor, *scale) = R::apply(Bf16::from_bits(largest.min(INFINITE - 1)).to_f32());
    }
    for nth in 0..N {
        if largest[nth] >= INFINITE {
            scales[nth] = scalar::block::<R>(&row[nth], &mut values[nth]);
            continue;
        }
        // SAFETY: passed on.
        unsafe { K::round(&row[nth], factors[nth] * UP, &mut values[nth]) };
    }
}

/// Blocks of a run. With eight the wait for memory shows between one run's values and the next one's factors.
const RUN: usize = 4;

/// How many channels before it is needed a line is asked for.
const AHEAD: usize = 2048;

/// Infinities have these bits, and NaNs larger ones.
const INFINITE: u16 = 0x7f80;
