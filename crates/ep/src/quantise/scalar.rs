//! One value at a time: for processors without vectors, and for blocks in which not all is finite.

use super::{Block, Codes, Rule};
use crate::number::{Bf16, E4m3};
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use crate::vectors::Vectors;

/// # Safety
/// None is needed: there are no vectors here.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) unsafe fn quantise<R: Rule>(
    _vectors: Vectors,
    row: &[Block],
    values: &mut [Codes],
    scales: &mut [R::Scale],
) {
    blocks::<R>(row, values, scales);
}

pub(super) fn blocks<R: Rule>(row: &[Block], values: &mut [Codes], scales: &mut [R::Scale]) {
    for ((block, codes), scale) in row.iter().zip(values).zip(scales) {
        *scale = self::block::<R>(block, codes);
    }
}

#[inline(never)]
pub(super) fn block<R: Rule>(block: &Block, codes: &mut Codes) -> R::Scale {
    let numbers = block.iter().filter(|channel| !channel.to_f32().is_nan());
    let largest = numbers.map(|&channel| finite(channel).abs()).fold(0.0, f32::max);
    let (factor, scale) = R::apply(largest);
    for (&channel, code) in block.iter().zip(codes) {
        let value = finite(channel) * factor;
        *code = if value.is_nan() {
            // Not through the product: whether that keeps the sign of a NaN is up to the processor.
            (channel.to_bits() >> 8) as u8 & 0x80 | 0x7f
        } else {
            E4m3::from_f32(value).to_bits()
        };
    }
    scale
}

/// The value, but the largest of its sign for an infinity.
fn finite(channel: Bf16) -> f32 {
    let largest = Bf16::from_bits(0x7f7f).to_f32();
    let value = channel.to_f32();
    if value.is_infinite() { largest.copysign(value) } else { value }
}
