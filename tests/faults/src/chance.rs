//! Random numbers from one seed.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

/// A generator that gives the same numbers for the same seed.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// The generator of a seed, and of a place in what the seed plans.
    pub fn new(seed: u64, place: u64) -> Self {
        Self(mix(seed) ^ mix(place.wrapping_mul(GOLDEN) ^ 0x5bf0_3635))
    }

    /// A seed that nobody has chosen.
    pub fn any_seed() -> u64 {
        RandomState::new().hash_one(0) % 1_000_000
    }

    /// The next number.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// One of a range's numbers.
    pub fn draw(&mut self, range: Range<u64>) -> u64 {
        range.start + self.word() % (range.end - range.start)
    }

    /// True in `part` of `whole` cases.
    pub fn hits(&mut self, part: u64, whole: u64) -> bool {
        self.draw(0..whole) < part
    }
}

/// Spreads a word over all bits.
pub(crate) fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
