//! Numbers that look random and follow from a seed.

/// The SplitMix64 generator: small, fast, and good enough to spread requests and lengths.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        let bits = mix(self.0);
        self.0 = self.0.wrapping_add(STEP);
        bits
    }

    /// Evenly from (0, 1]: never 0, so that it has a logarithm.
    pub fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// With mean 1: the time between events that do not know of each other.
    pub fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    /// With mean 0 and deviation 1, by the method of Box and Muller.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}

/// One step of SplitMix64: every bit of the input moves every bit of the output.
pub(crate) fn mix(bits: u64) -> u64 {
    let mut bits = bits.wrapping_add(STEP);
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The published first numbers for the seed 1234567.
        let mut random = Random(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn distributions_have_the_moments_that_they_claim() {
        let mut random = Random(1);
        let count = 20_000;
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let units: Vec<f64> = (0..count).map(|_| random.unit()).collect();
        assert!(units.iter().all(|&unit| unit > 0.0 && unit <= 1.0));
        assert!((mean(&units) - 0.5).abs() < 0.01);
        let waits: Vec<f64> = (0..count).map(|_| random.exponential()).collect();
        assert!((mean(&waits) - 1.0).abs() < 0.03);
        let normals: Vec<f64> = (0..count).map(|_| random.normal()).collect();
        let squares: Vec<f64> = normals.iter().map(|value| value * value).collect();
        assert!(mean(&normals).abs() < 0.03 && (mean(&squares) - 1.0).abs() < 0.05);
    }
}
