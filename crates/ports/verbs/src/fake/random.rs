//! Where all chance of a fabric comes from.

/// SplitMix64: a counter, well mixed; the same on every machine.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not zero.
    pub fn below(&mut self, limit: u32) -> u32 {
        ((u64::from(self.word() as u32) * u64::from(limit)) >> 32) as u32
    }

    pub fn coin(&mut self) -> bool {
        self.word() >> 63 == 1
    }

    /// Once in so many times; 0: never.
    pub fn happens(&mut self, one_in: u32) -> bool {
        one_in != 0 && self.below(one_in) == 0
    }
}
