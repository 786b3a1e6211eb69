use proptest::prelude::{ProptestConfig, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::strategy::Strategy;

use super::*;
use crate::fenced::Fenced;

fn quantisers() -> Vec<Quantiser> {
    Vectors::ALL.into_iter().filter_map(Quantiser::with_vectors).collect()
}

/// A quantised row, with what both forms of a power of two give.
#[derive(Clone, Debug, PartialEq)]
struct Quantised {
    plain: (Vec<u8>, Vec<u32>),
    power_of_two: (Vec<u8>, Vec<u32>),
    ue8m0: (Vec<u8>, Vec<u8>),
}

impl Quantised {
    fn by(quantiser: Quantiser, row: &[Bf16]) -> Quantised {
        let rule = |rule| {
            let (mut values, mut scales) = (vec![0x55; row.len()], vec![0.0; row.len() / BLOCK_CHANNELS]);
            quantiser.quantise(row, rule, &mut values, &mut scales);
            (values, scales.into_iter().map(f32::to_bits).collect())
        };
        let mut ue8m0 = (vec![0x55; row.len()], vec![0; row.len() / BLOCK_CHANNELS]);
        quantiser.quantise_ue8m0(row, &mut ue8m0.0, &mut ue8m0.1);
        Quantised { plain: rule(ScaleRule::Plain), power_of_two: rule(ScaleRule::PowerOfTwo), ue8m0 }
    }

    /// As the semantics say it, each operation exact and then rounded.
    fn as_defined(row: &[Bf16]) -> Quantised {
        let mut all = Quantised {
            plain: Default::default(),
            power_of_two: Default::default(),
            ue8m0: Default::default(),
        };
        for block in row.chunks_exact(128) {
            let channels: Vec<Option<f64>> = block.iter().map(|&channel| number(channel)).collect();
            let amax =
                channels.iter().flatten().fold(f64::from(1e-4_f32), |most, value| most.max(value.abs()));
            let scale = (amax * f64::from(1.0_f32 / 448.0)) as f32;
            let factor = (448.0 / amax) as f32;
            let exponent = (-126..=127).find(|&e| 2.0_f64.powi(e) >= f64::from(scale)).unwrap();
            let codes = |factor: f64| {
                channels.iter().zip(block).map(move |(value, channel)| {
                    let magnitude =
                        value.map_or(0x7f, |value| nearest(f64::from((value * factor).abs() as f32)));
                    if channel.to_bits() >> 15 == 1 { magnitude | 0x80 } else { magnitude }
                })
            };
            all.plain.0.extend(codes(f64::from(factor)));
            all.plain.1.push(scale.to_bits());
            all.power_of_two.0.extend(codes(2.0_f64.powi(-exponent)));
            all.power_of_two.1.push((2.0_f64.powi(exponent) as f32).to_bits());
            all.ue8m0.0.extend(codes(2.0_f64.powi(-exponent)));
            all.ue8m0.1.push((exponent + 127) as u8);
        }
        all
    }
}

/// What counts as the channel's value, if it has one.
fn number(channel: Bf16) -> Option<f64> {
    let largest = (2.0 - 1.0 / 128.0) * 2.0_f64.powi(127);
    let value = f64::from(channel.to_f32());
    (!value.is_nan()).then(|| value.clamp(-largest, largest))
}

/// Of all e4m3 magnitudes the nearest, of two the even one.
fn nearest(magnitude: f64) -> u8 {
    let value = |code: u8| match code >> 3 {
        0 => f64::from(code) / 512.0,
        exponent => (1.0 + f64::from(code & 7) / 8.0) * 2.0_f64.powi(i32::from(exponent) - 7),
    };
    let (mut below, mut above) = (0, 0x7e);
    while above - below > 1 {
        let middle = (below + above) / 2;
        if value(middle) <= magnitude { below = middle } else { above = middle }
    }
    let (down, up) = (magnitude - value(below), value(above) - magnitude);
    if up < down || up == down && above % 2 == 0 { above } else { below }
}

fn check(row: &[Bf16]) {
    let expected = Quantised::as_defined(row);
    for quantiser in quantisers() {
        assert_eq!(Quantised::by(quantiser, row), expected, "{quantiser:?} of {row:?}");
    }
}

/// Rows in whose every block the largest magnitude is `amax`, and in which all of these are.
fn beside(amax: u16, magnitudes: impl Iterator<Item = u16>) -> Vec<Bf16> {
    let mut row = Vec::new();
    for (nth, magnitude) in magnitudes.enumerate() {
        if row.len() % BLOCK_CHANNELS == nth % 7 {
            row.push(Bf16::from_bits(amax | (nth as u16 & 1) << 15));
        }
        row.push(Bf16::from_bits(magnitude | (nth as u16 & 2) << 14));
    }
    let blocks = row.len().next_multiple_of(BLOCK_CHANNELS);
    row.resize(blocks, Bf16::from_bits(amax));
    row
}

#[test]
fn known_values() {
    let one = Bf16::from_f32(1.0);
    let mut row = vec![one; 128];
    row[1] = Bf16::from_f32(-0.5);
    row[2] = Bf16::from_f32(-0.0);
    row[3] = Bf16::from_f32(1.0 / 448.0 * 0.25);
    for quantiser in quantisers() {
        let all = Quantised::by(quantiser, &row);
        // 448, -224, -0 and a quarter.
        assert_eq!(all.plain.0[..4], [0x7e, 0xf6, 0x80, 0x28], "{quantiser:?}");
        assert_eq!(all.plain.1, [(1.0_f32 / 448.0).to_bits()]);
        // 1 / 448 lies between 2^-9 and 2^-8: 256, -128, -0 and a seventh, of which 9 / 64 is the nearest.
        assert_eq!(all.ue8m0.0[..4], [0x78, 0xf0, 0x80, 0x21], "{quantiser:?}");
        assert_eq!(all.ue8m0.1, [127 - 8]);
        assert_eq!(all.power_of_two, (all.ue8m0.0.clone(), vec![(1.0_f32 / 256.0).to_bits()]));
    }
}

#[test]
fn what_is_no_finite_number_spoils_nothing_but_what_it_must() {
    let (nan, infinity) = (Bf16::from_bits(0x7f81), Bf16::from_f32(f32::INFINITY));
    let mut row = vec![Bf16::from_f32(1.0); 384];
    row[5] = nan;
    row[6] = Bf16::from_bits(0xffc0);
    row[128] = infinity;
    row[129] = Bf16::from_f32(f32::NEG_INFINITY);
    row[256..].fill(nan);
    for quantiser in quantisers() {
        let (values, scales) = Quantised::by(quantiser, &row).plain;
        assert_eq!(values[4..8], [0x7e, 0x7f, 0xff, 0x7e], "{quantiser:?}: the neighbours of a NaN");
        assert_eq!(scales[0], (1.0_f32 / 448.0).to_bits());
        assert_eq!(values[128..131], [0x7e, 0xfe, 0], "{quantiser:?}: the neighbours of an infinity");
        assert_eq!(scales[1], (Bf16::from_bits(0x7f7f).to_f32() * (1.0 / 448.0)).to_bits());
        assert!(values[256..].iter().all(|&value| value == 0x7f));
        assert_eq!(scales[2], (1e-4_f32 * (1.0 / 448.0)).to_bits());
    }
    check(&row);
}

#[test]
fn every_channel_beside_every_largest_one_of_some_exponents() {
    for exponent in [113, 114, 120, 126, 127, 128, 134, 135, 200, 254] {
        for mantissa in 0..128 {
            let amax = exponent << 7 | mantissa;
            // Below twenty powers of two all become zeros.
            check(&beside(amax, amax.saturating_sub(20 << 7)..=amax));
        }
    }
}

#[test]
fn every_largest_channel_of_all() {
    let mut state = 1_u64;
    let mut random = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 48) as u16
    };
    for amax in 0..0x7f80 {
        check(&beside(amax, (0..127).map(|_| amax - random() % (18 << 7).min(amax + 1))));
    }
}

#[test]
fn every_channel_that_has_no_larger_one() {
    let row: Vec<Bf16> = (0..=u16::MAX).map(Bf16::from_bits).collect();
    check(&row);
    for bits in 0..=u16::MAX {
        if bits % 61 == 0 || bits & 0x7fff >= 0x7f70 {
            check(&[Bf16::from_bits(bits); 128]);
        }
    }
}

#[test]
fn outputs_that_do_not_fit_are_refused() {
    let quantiser = Quantiser::detect();
    let row = [Bf16::default(); 256];
    let refused = |row: &[Bf16], values: usize, scales: usize| {
        let (mut values, mut scales) = (vec![0; values], vec![0; scales]);
        let attempt = || quantiser.quantise_ue8m0(row, &mut values, &mut scales);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).is_err()
    };
    assert!(!refused(&row, 256, 2));
    assert!(!refused(&[], 0, 0));
    assert!(refused(&row, 255, 2));
    assert!(refused(&row, 384, 2));
    assert!(refused(&row, 256, 1));
    assert!(refused(&row, 256, 3));
    assert!(refused(&row[..200], 200, 1));
}

#[test]
fn the_best_vectors_are_chosen() {
    let detected = Quantiser::detect().vectors();
    assert_eq!(Some(detected), quantisers().last().map(Quantiser::vectors));
    if cfg!(target_arch = "aarch64") {
        assert_eq!(detected, Vectors::Neon);
    }
}

/// Bits of all kinds, or near one magnitude, or finite ones with a few that are not.
fn rows() -> impl Strategy<Value = Vec<Bf16>> {
    let channel = prop_oneof![
        2 => any::<u16>().boxed(),
        8 => (0x3c00_u16..0x4100, any::<bool>()).prop_map(|(bits, sign)| bits | u16::from(sign) << 15).boxed(),
    ];
    let finite = (0x3c00_u16..0x4100, any::<bool>()).prop_map(|(bits, sign)| bits | u16::from(sign) << 15);
    let strange =
        prop::sample::select(vec![0x7f80, 0xff80, 0x7f81, 0xffff, 0x7fc0, 0x7f7f, 0xff7f, 0, 0x8000, 1]);
    let seldom = prop_oneof![200 => finite.boxed(), 1 => strange.boxed()];
    (0..=5_usize).prop_flat_map(move |blocks| {
        let len = blocks * BLOCK_CHANNELS;
        prop_oneof![prop::collection::vec(channel.clone(), len), prop::collection::vec(seldom.clone(), len)]
            .prop_map(|bits| bits.into_iter().map(Bf16::from_bits).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(target_arch = "x86_64") { 256 } else { 64 }))]

    #[test]
    fn any_row_at_any_place(row in rows(), shifts in prop::array::uniform3(0..70_usize), against_end: bool) {
        let expected = Quantised::as_defined(&row);
        let mut row = Fenced::new(&row, shifts[0], against_end);
        let mut values = Fenced::new(&vec![0x55; row.get().len()], shifts[1], against_end);
        let mut scales = Fenced::new(&vec![0.0; row.get().len() / BLOCK_CHANNELS], shifts[2], against_end);
        for quantiser in quantisers() {
            prop_assert_eq!(&Quantised::by(quantiser, row.get()), &expected);
            quantiser.quantise(row.get(), ScaleRule::Plain, values.get(), scales.get());
            prop_assert_eq!(&*values.get(), &expected.plain.0[..]);
            prop_assert!(scales.get().iter().map(|scale| scale.to_bits()).eq(expected.plain.1.iter().copied()));
        }
    }
}
