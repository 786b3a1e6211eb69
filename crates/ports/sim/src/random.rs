//! The one generator from which all chance of a fabric comes.

use crate::options::{Between, OneIn};

/// SplitMix64: a counter, well mixed; the same on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, which is not zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The upper half of a product is unbiased enough for limits far below 2^64.
        ((u128::from(self.word()) * u128::from(limit)) >> 64) as u64
    }

    pub fn coin(&mut self) -> bool {
        self.word() >> 63 == 1
    }

    pub fn happens(&mut self, chance: OneIn) -> bool {
        chance.0 != 0 && self.below(u64::from(chance.0)) == 0
    }

    pub fn within(&mut self, span: Between) -> u64 {
        span.least_ns + self.below(span.most_ns.saturating_sub(span.least_ns) + 1)
    }
}

/// Spreads a number over all its bits.
pub(crate) fn mix(word: u64) -> u64 {
    let mut mixed = word;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
