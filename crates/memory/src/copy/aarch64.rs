//! The streamed copy's instructions on 64-bit Arm.

use core::arch::aarch64::{uint8x16_t, vld1q_u8};
use core::arch::asm;

use super::streamed::{self, Line};
use super::{Pieces, Vectors};

pub(super) fn supported(vectors: Vectors) -> bool {
    match vectors {
        Vectors::Plain => true,
        Vectors::Neon => std::arch::is_aarch64_feature_detected!("neon"),
        Vectors::Sse2 | Vectors::Avx2 | Vectors::Avx512 => false,
    }
}

/// # Safety
/// As [`super::Copier::copy_pieces`]; [`supported`] must have said yes to `vectors`.
pub(super) unsafe fn stream(vectors: Vectors, pieces: Pieces<'_>) {
    assert_eq!(vectors, Vectors::Neon, "no other copier of this architecture chooses to stream");
    // SAFETY: the processor has the instructions, and the caller vouches for the pieces.
    unsafe { stream_neon(pieces) }
}

/// # Safety
/// As [`super::Copier::copy_pieces`]; the processor must have NEON.
#[target_feature(enable = "neon")]
unsafe fn stream_neon(pieces: Pieces<'_>) {
    // SAFETY: passed on; this function is compiled for NEON.
    unsafe { streamed::copy::<NeonLine>(pieces) }
}

#[derive(Clone, Copy)]
struct NeonLine([uint8x16_t; 4]);

impl Line for NeonLine {
    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // Ordinary loads: the non-temporal pair may be observed before the load that its address depends on.
        // SAFETY: the four quarters make up the line that the caller vouches for; the load is unaligned.
        NeonLine(core::array::from_fn(|part| unsafe { vld1q_u8(src.add(part * 16)) }))
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        let NeonLine([first, second, third, fourth]) = self;
        // SAFETY: the two pairs are the aligned line that the caller vouches for; nothing else changes.
        unsafe {
            asm!(
                "stnp {first:q}, {second:q}, [{dst}]",
                "stnp {third:q}, {fourth:q}, [{dst}, #32]",
                first = in(vreg) first,
                second = in(vreg) second,
                third = in(vreg) third,
                fourth = in(vreg) fourth,
                dst = in(reg) dst,
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    fn prefetch(src: *const u8) {
        // Into the second level, as on x86-64.
        // SAFETY: a prefetch never faults, whatever the address, and changes neither memory nor flags.
        unsafe {
            asm!("prfm pldl2keep, [{}]", in(reg) src, options(nostack, preserves_flags, readonly));
        }
    }

    #[inline(always)]
    fn order() {
        // Nothing is left to do: that a store is non-temporal is a hint about caches, and barriers and store-releases
        // order it as they order every store. (Of the non-temporal pairs only the loads are excepted from a rule.)
    }
}
