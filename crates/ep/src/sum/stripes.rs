//! Sums stripe by stripe, written once over [`Lanes`], which each instruction set implements.
//!
//! A stripe is so many channels that their sums fit into registers. All rows are read along it, then it is rounded and
//! stored, so that each byte of a row is read once and nothing else moves. The rows lie scattered, and there may be more
//! of them than a hardware prefetcher follows; so each read asks for what the same row needs a few stripes later.

use crossdock_memory::prefetch_read;

use crate::number::Bf16;

/// Neighbouring channels in `f32`.
pub(super) trait Lanes: Copy {
    const CHANNELS: usize;

    /// # Safety
    /// The processor must have the instructions.
    unsafe fn zero() -> Self;

    /// # Safety
    /// The channels from `at` on must be readable, by a plain load of this thread while another process writes them;
    /// the processor must have the instructions.
    unsafe fn load(at: *const Bf16) -> Self;

    /// # Safety
    /// The processor must have the instructions.
    unsafe fn add(self, row: Self) -> Self;

    /// By a fused multiply-add.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn add_product(self, row: Self, weight: f32) -> Self;

    /// Rounds to nearest, ties to even; what is no number becomes [`super::NAN`].
    ///
    /// # Safety
    /// The channels from `at` on must be writable; the processor must have the instructions.
    unsafe fn store(self, at: *mut Bf16);
}

/// What is summed.
pub(super) trait Terms: Copy {
    fn rows(&self) -> &[*const Bf16];

    /// What a sum begins with.
    ///
    /// # Safety
    /// The channels from `at` on must be within all biases; the processor must have the instructions.
    unsafe fn start<L: Lanes>(&self, at: usize) -> L;

    /// # Safety
    /// The processor must have the instructions.
    unsafe fn add<L: Lanes>(&self, sum: L, row: L, nth: usize) -> L;
}

#[derive(Clone, Copy)]
pub(super) struct Weighted<'a> {
    pub(super) rows: &'a [*const Bf16],
    pub(super) weights: &'a [f32],
}

#[derive(Clone, Copy)]
pub(super) struct Plain<'a> {
    pub(super) rows: &'a [*const Bf16],
    pub(super) biases: &'a [&'a [Bf16]],
}

impl Terms for Weighted<'_> {
    #[inline(always)]
    fn rows(&self) -> &[*const Bf16] {
        self.rows
    }

    #[inline(always)]
    unsafe fn start<L: Lanes>(&self, _at: usize) -> L {
        // SAFETY: passed on.
        unsafe { L::zero() }
    }

    #[inline(always)]
    unsafe fn add<L: Lanes>(&self, sum: L, row: L, nth: usize) -> L {
        // SAFETY: passed on.
        unsafe { sum.add_product(row, self.weights[nth]) }
    }
}

impl Terms for Plain<'_> {
    #[inline(always)]
    fn rows(&self) -> &[*const Bf16] {
        self.rows
    }

    #[inline(always)]
    unsafe fn start<L: Lanes>(&self, at: usize) -> L {
        // SAFETY: the channels are within each bias; the rest is passed on.
        unsafe {
            let bias = |nth: usize| match self.biases.get(nth) {
                Some(bias) => L::load(bias.as_ptr().add(at)),
                None => L::zero(),
            };
            bias(0).add(bias(1))
        }
    }

    #[inline(always)]
    unsafe fn add<L: Lanes>(&self, sum: L, row: L, _nth: usize) -> L {
        // SAFETY: passed on.
        unsafe { sum.add(row) }
    }
}

/// Whole stripes of `N` times `L`, then of one `L`, and the rest in eights.
///
/// # Safety
/// As [`super::Summer::weighted`], and the biases as long as `out`, which has a multiple of eight channels; the processor
/// must have the instructions, and the caller must be compiled for them: this is inlined there.
#[inline(always)]
pub(super) unsafe fn sum<const N: usize, L: Lanes, Eight: Lanes, T: Terms>(terms: T, out: &mut [Bf16]) {
    let ahead = ahead(terms.rows().len());
    for &row in terms.rows() {
        for line in (0..ahead.min(out.len())).step_by(LINE) {
            prefetch_read(row.wrapping_add(line).cast());
        }
    }
    let mut at = 0;
    // SAFETY: each stripe ends within `out`; the rest is passed on.
    unsafe {
        while at + N * L::CHANNELS <= out.len() {
            stripe::<N, L, T>(terms, ahead, at, out);
            at += N * L::CHANNELS;
        }
        while at + L::CHANNELS <= out.len() {
            stripe::<1, L, T>(terms, ahead, at, out);
            at += L::CHANNELS;
        }
        while at < out.len() {
            stripe::<1, Eight, T>(terms, ahead, at, out);
            at += Eight::CHANNELS;
        }
    }
}

/// # Safety
/// As [`sum`]; the stripe from `at` on must end within `out`.
#[inline(always)]
unsafe fn stripe<const N: usize, L: Lanes, T: Terms>(terms: T, ahead: usize, at: usize, out: &mut [Bf16]) {
    // SAFETY: the stripe lies within `out`, so within each bias and row too; the rest is passed on.
    unsafe {
        let mut sums: [L; N] = core::array::from_fn(|part| terms.start(at + part * L::CHANNELS));
        for (nth, &row) in terms.rows().iter().enumerate() {
            for line in (0..N * L::CHANNELS).step_by(LINE) {
                // Beyond the row's end this asks for what follows it, and does no harm.
                prefetch_read(row.wrapping_add(at + ahead + line).cast());
            }
            for (part, sum) in sums.iter_mut().enumerate() {
                *sum = terms.add(*sum, L::load(row.add(at + part * L::CHANNELS)), nth);
            }
        }
        for (part, sum) in sums.into_iter().enumerate() {
            sum.store(out.as_mut_ptr().add(at + part * L::CHANNELS));
        }
    }
}

/// How many channels before they are needed those of each row are asked for: with many rows fewer, or they would leave
/// the first-level cache again too early.
fn ahead(rows: usize) -> usize {
    (AHEAD_OF_ALL / rows.max(1)).clamp(128, 512)
}

const AHEAD_OF_ALL: usize = 16384;

/// The channels of a cache line.
const LINE: usize = 32;
