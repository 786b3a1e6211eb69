//! The three number formats that rows have: one value at a time, as their definitions say.

use std::fmt;

/// bfloat16: the upper half of an `f32`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Bf16 {
    /// Takes the bits.
    pub const fn from_bits(bits: u16) -> Bf16 {
        Bf16(bits)
    }

    /// The bits.
    pub const fn to_bits(self) -> u16 {
        self.0
    }

    /// Rounds to nearest, ties to even. A NaN stays one, made quiet.
    pub const fn from_f32(value: f32) -> Bf16 {
        let bits = value.to_bits();
        if value.is_nan() {
            return Bf16((bits >> 16) as u16 | 0x0040);
        }
        Bf16(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }

    /// The same value.
    pub const fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
}

/// FP8 e4m3 ("fn": no infinities, one NaN, largest value 448).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct E4m3(u8);

impl E4m3 {
    /// The largest value.
    pub const MAX: f32 = 448.0;

    /// Takes the bits.
    pub const fn from_bits(bits: u8) -> E4m3 {
        E4m3(bits)
    }

    /// The bits.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// Rounds to nearest, ties to even; what is too large, infinities too, becomes the largest value of its sign. A
    /// NaN stays one.
    pub const fn from_f32(value: f32) -> E4m3 {
        let bits = value.to_bits();
        let sign = (bits >> 24) as u8 & 0x80;
        let magnitude = bits & 0x7fff_ffff;
        if magnitude > 0x7f80_0000 {
            return E4m3(sign | 0x7f);
        }
        // Halfway from 448 to the 480 that would be next; the tie goes to 448, which is even.
        if magnitude >= 0x43e8_0000 {
            return E4m3(sign | 0x7e);
        }
        // Below 2^-6 values lie 2^-9 apart: a sum of that size with 2^14 rounds there.
        let code = if magnitude < 0x3c80_0000 {
            (f32::from_bits(magnitude) + 16384.0).to_bits() - 16384.0_f32.to_bits()
        } else {
            ((magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3)
        };
        E4m3(sign | code as u8)
    }

    /// The same value.
    pub const fn to_f32(self) -> f32 {
        let (exponent, mantissa) = (self.0 >> 3 & 15, self.0 & 7);
        let magnitude = if self.0 & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 * (1.0 / 512.0)
        } else {
            f32::from_bits((exponent as u32 + 120) << 23 | (mantissa as u32) << 20)
        };
        if self.0 & 0x80 != 0 { -magnitude } else { magnitude }
    }
}

/// A scale that is a power of two: the exponent byte of an `f32`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Ue8m0(u8);

impl Ue8m0 {
    /// Takes the bits.
    pub const fn from_bits(bits: u8) -> Ue8m0 {
        Ue8m0(bits)
    }

    /// The bits.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// The smallest power of two that is at least `value`, for a value that is positive, normal and at most 2^127.
    pub const fn at_least(value: f32) -> Ue8m0 {
        let bits = value.to_bits();
        Ue8m0((bits >> 23) as u8 + (bits & 0x7f_ffff != 0) as u8)
    }

    /// The scale itself.
    pub const fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 23)
    }
}

impl fmt::Debug for Bf16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bf16({})", self.to_f32())
    }
}

impl fmt::Debug for E4m3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E4m3({})", self.to_f32())
    }
}

impl fmt::Debug for Ue8m0 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ue8m0({})", self.to_f32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the format is, written down once more and slowly: of all values the nearest, of two the even one.
    fn nearest(value: f32) -> u8 {
        // Where a magnitude is so large that subtracting changes nothing, all codes would be equally near.
        let magnitude = f64::from(value).abs().min(1000.0);
        let best = (0..=0x7e_u8).min_by(|&a, &b| {
            let distance = |code: u8| (f64::from(E4m3(code).to_f32()) - magnitude).abs();
            distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))
        });
        best.unwrap() | if value.is_sign_negative() { 0x80 } else { 0 }
    }

    #[test]
    fn e4m3_takes_the_nearest_value_and_of_two_the_even_one() {
        assert_eq!(E4m3(0x7e).to_f32(), E4m3::MAX);
        assert_eq!(E4m3(0x01).to_f32(), 1.0 / 512.0);
        assert_eq!(E4m3(0x08).to_f32(), 1.0 / 64.0);
        assert_eq!(E4m3(0xb8).to_f32(), -1.0);
        let mut values = vec![0.0, -0.0, 1e-30, 464.0, 463.9, 464.1, 1e30, f32::INFINITY, f32::NEG_INFINITY];
        for code in 0..0x7e_u8 {
            let (low, high) = (E4m3(code).to_f32(), E4m3(code + 1).to_f32());
            let middle = (low + high) / 2.0;
            values.extend([low, high, middle, middle.next_down(), middle.next_up(), -middle]);
        }
        // Each bf16 of which there is a code near.
        values.extend((0..=u16::MAX).map(|bits| Bf16(bits).to_f32()).filter(|v| v.abs() < 600.0));
        for value in values {
            assert_eq!(E4m3::from_f32(value).0, nearest(value), "{value:e}");
        }
        assert!(E4m3::from_f32(f32::NAN).to_f32().is_nan());
        for code in 0..=u8::MAX {
            let back = E4m3::from_f32(E4m3(code).to_f32());
            assert!(back.0 == code || E4m3(code).to_f32().is_nan());
        }
    }

    #[test]
    fn bf16_rounds_to_the_nearest_and_of_two_to_the_even_one() {
        for bits in 0..=u16::MAX {
            let value = Bf16(bits);
            if value.to_f32().is_nan() {
                assert!(Bf16::from_f32(value.to_f32()).to_f32().is_nan());
                continue;
            }
            assert_eq!(Bf16::from_f32(value.to_f32()), value);
            let up = f32::from_bits((u32::from(bits) << 16) + 0x8000);
            if up.is_finite() && value.to_f32().is_finite() {
                assert_eq!(Bf16::from_f32(up).0, bits + (bits & 1), "a tie above {value:?}");
                assert_eq!(Bf16::from_f32(f32::from_bits(up.to_bits() - 1)).0, bits);
                assert_eq!(Bf16::from_f32(f32::from_bits(up.to_bits() + 1)).0, bits + 1);
            }
        }
        // A NaN all of whose set bits lie in the half that goes.
        assert!(Bf16::from_f32(f32::from_bits(0x7f80_0001)).to_f32().is_nan());
        assert_eq!(Bf16::from_f32(f32::MAX).to_f32(), f32::INFINITY);
    }

    #[test]
    fn a_power_of_two_is_the_smallest_that_is_not_less() {
        for (value, scale) in [(1.0, 1.0), (1.0_f32.next_up(), 2.0), (0.75, 1.0), (2.0, 2.0), (3.0, 4.0)] {
            assert_eq!(Ue8m0::at_least(value).to_f32(), scale, "{value}");
        }
        assert_eq!(Ue8m0::at_least(1.0).to_bits(), 127);
        assert_eq!(Ue8m0::at_least(f32::MIN_POSITIVE).to_f32(), f32::MIN_POSITIVE);
    }
}
