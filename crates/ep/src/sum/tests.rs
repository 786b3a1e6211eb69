use proptest::prelude::{ProptestConfig, any, prop, prop_assert, prop_oneof, proptest};
use proptest::strategy::Strategy;

use super::*;
use crate::fenced::Fenced;

fn summers() -> Vec<Summer> {
    Vectors::ALL.into_iter().filter_map(Summer::with_vectors).collect()
}

/// Rounds an exact product plus a sum once to `f32`, by way of an `f64` that is odd where it is not exact.
fn product_and_sum(left: f32, right: f32, sum: f32) -> f32 {
    let (product, sum) = (f64::from(left) * f64::from(right), f64::from(sum));
    let rounded = product + sum;
    if !rounded.is_finite() || rounded == 0.0 {
        return rounded as f32;
    }
    let (of_sum, of_product) = (rounded - product, rounded - (rounded - product));
    let error = (product - of_product) + (sum - of_sum);
    if error == 0.0 || rounded.to_bits() & 1 == 1 {
        return rounded as f32;
    }
    (if error > 0.0 { rounded.next_up() } else { rounded.next_down() }) as f32
}

fn sum_of_two(left: f32, right: f32) -> f32 {
    // Twice as many bits and two more: rounding twice is rounding once.
    (f64::from(left) + f64::from(right)) as f32
}

fn rounded(sum: f32) -> u16 {
    if sum.is_nan() { 0x7fc0 } else { Bf16::from_f32(sum).to_bits() }
}

fn weighted_as_defined(rows: &[Vec<Bf16>], weights: &[f32], channels: usize) -> Vec<u16> {
    let sum = |channel: usize| {
        let terms = rows.iter().zip(weights);
        terms.fold(0.0, |sum, (row, &weight)| product_and_sum(row[channel].to_f32(), weight, sum))
    };
    (0..channels).map(|channel| rounded(sum(channel))).collect()
}

fn plain_as_defined(rows: &[Vec<Bf16>], biases: &[Vec<Bf16>], channels: usize) -> Vec<u16> {
    let sum = |channel: usize| {
        let bias = |nth: usize| biases.get(nth).map_or(0.0, |bias| bias[channel].to_f32());
        let start = sum_of_two(bias(0), bias(1));
        rows.iter().fold(start, |sum, row| sum_of_two(sum, row[channel].to_f32()))
    };
    (0..channels).map(|channel| rounded(sum(channel))).collect()
}

/// Where the rows and the sum lie.
#[derive(Clone, Copy, Debug)]
struct Place {
    shift: usize,
    against_end: bool,
}

fn check(rows: &[Vec<Bf16>], weights: &[f32], biases: &[Vec<Bf16>], channels: usize, place: Place) {
    let fence = |row: &Vec<Bf16>| Fenced::new(row, place.shift, place.against_end);
    let fenced: Vec<_> = rows.iter().map(fence).collect();
    let pointers: Vec<_> = fenced.iter().map(Fenced::as_ptr).collect();
    let mut fenced_biases: Vec<_> = biases.iter().map(fence).collect();
    let bias_slices: Vec<&[Bf16]> = fenced_biases.iter_mut().map(|bias| &*bias.get()).collect();
    let mut out = fence(&vec![Bf16::from_bits(0x5555); channels]);
    let weighted = weighted_as_defined(rows, weights, channels);
    let plain = plain_as_defined(rows, biases, channels);
    let bits = |out: &[Bf16]| out.iter().map(|channel| channel.to_bits()).collect::<Vec<u16>>();
    for summer in summers() {
        out.get().fill(Bf16::from_bits(0x5555));
        // SAFETY: each row is mapped, as long as the sum and written by nobody.
        unsafe { summer.weighted(&pointers, weights, out.get()) };
        assert_eq!(bits(out.get()), weighted, "{summer:?}, weighted by {weights:?}, {place:?}");
        out.get().fill(Bf16::from_bits(0x5555));
        // SAFETY: as above.
        unsafe { summer.plain(&pointers, &bias_slices, out.get()) };
        assert_eq!(bits(out.get()), plain, "{summer:?}, {} biases, {place:?}", biases.len());
    }
}

const ANYWHERE: Place = Place { shift: 0, against_end: true };

#[test]
fn without_rows_a_sum_is_zeros_or_the_biases() {
    for channels in [0, 8, 24, 136, 7168] {
        let bias = |value: f32| vec![Bf16::from_f32(value); channels];
        check(&[], &[], &[], channels, ANYWHERE);
        check(&[], &[], &[bias(-0.0)], channels, ANYWHERE);
        check(&[], &[], &[bias(1.5), bias(0.25)], channels, ANYWHERE);
    }
    for summer in summers() {
        let mut out = [Bf16::from_f32(7.0); 8];
        // SAFETY: there are no rows.
        unsafe { summer.weighted(&[], &[], &mut out) };
        assert_eq!(out, [Bf16::default(); 8]);
    }
}

#[test]
fn known_values() {
    let row = |value: f32| vec![Bf16::from_f32(value); 40];
    let rows = [row(1.0), row(2.0), row(-4.0)];
    let pointers: Vec<_> = rows.iter().map(|row| row.as_ptr()).collect();
    let bias = row(0.125);
    for summer in summers() {
        let mut out = row(9.0);
        // SAFETY: each row is as long as the sum and written by nobody.
        unsafe { summer.weighted(&pointers, &[0.5, 0.25, 3.0], &mut out) };
        assert_eq!(out, row(-11.0));
        // SAFETY: as above.
        unsafe { summer.plain(&pointers, &[&bias], &mut out) };
        assert_eq!(out, row(-0.875));
    }
    // 2^24 takes no more ones, so only the order in which they are given is right.
    let (up, one, down) = (row(16_777_216.0), row(1.0), row(-16_777_216.0));
    let [up, one, down] = [&up, &one, &down].map(|row| row.as_ptr());
    for summer in summers() {
        let mut out = row(9.0);
        // SAFETY: as above.
        unsafe { summer.plain(&[up, one, one, down], &[], &mut out) };
        assert_eq!(out, row(0.0));
        // SAFETY: as above.
        unsafe { summer.plain(&[one, one, up, down], &[], &mut out) };
        assert_eq!(out, row(2.0));
    }
}

#[test]
fn every_channel_with_many_weights_and_neighbours() {
    let all: Vec<Bf16> = (0..=u16::MAX).map(Bf16::from_bits).collect();
    let others = [0x0000_u16, 0x8000, 0x0001, 0x3f80, 0xbf81, 0x3b80, 0x7f7f, 0xff80, 0x7f81, 0xffc1, 0x0080];
    let weights = [1.0, -0.0, 0.3, -1.0 / 3.0, 1.5e-39, 2.0e-38, 3.0e38, f32::INFINITY, f32::NAN];
    for (nth, &other) in others.iter().enumerate() {
        let rows = [all.clone(), vec![Bf16::from_bits(other); all.len()]];
        let bias: Vec<Bf16> = all.iter().map(|channel| Bf16::from_bits(channel.to_bits() ^ 0x8003)).collect();
        let chosen = [weights[nth % weights.len()], weights[(nth * 2 + 1) % weights.len()]];
        check(&rows, &chosen, &[], all.len(), ANYWHERE);
        check(&rows, &[0.7, chosen[0]], &[bias], all.len(), ANYWHERE);
    }
    // Where a fused multiply-add differs from a multiplication and an addition, and the sum is next to a tie.
    for weight in [1.0 + f32::EPSILON, 1.0 - f32::EPSILON / 2.0, 1.003_906_3, 0.996_093_7] {
        let rows = [all.clone(), all.clone(), all.clone()];
        check(&rows, &[weight, -1.0, weight / 512.0], &[], all.len(), ANYWHERE);
    }
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let row = [Bf16::default(); 16];
    let refused = |weights: &[f32], channels: usize| {
        let mut out = vec![Bf16::default(); channels];
        // SAFETY: the row is readable for at least as many channels, and nobody writes it.
        let attempt = || unsafe { Summer::detect().weighted(&[row.as_ptr()], weights, &mut out) };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).is_err()
    };
    assert!(!refused(&[1.0], 16));
    assert!(refused(&[], 16));
    assert!(refused(&[1.0, 1.0], 16));
    assert!(refused(&[1.0], 12));
    let refused = |biases: &[&[Bf16]]| {
        let mut out = vec![Bf16::default(); 16];
        // SAFETY: the row is as long, and nobody writes it.
        let attempt = || unsafe { Summer::detect().plain(&[row.as_ptr()], biases, &mut out) };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).is_err()
    };
    assert!(!refused(&[&row, &row]));
    assert!(refused(&[&row, &row, &row]));
    assert!(refused(&[&row[..8]]));
}

#[test]
fn the_best_vectors_are_chosen() {
    assert_eq!(Some(Summer::detect().vectors()), summers().last().map(Summer::vectors));
}

#[derive(Clone, Debug)]
struct Case {
    channels: usize,
    rows: Vec<Vec<Bf16>>,
    weights: Vec<f32>,
    biases: Vec<Vec<Bf16>>,
    place: Place,
}

fn cases() -> impl Strategy<Value = Case> {
    let usual = (0x3c00_u16..0x4100, any::<bool>()).prop_map(|(bits, sign)| bits | u16::from(sign) << 15);
    let channel = prop_oneof![30 => usual.boxed(), 1 => any::<u16>().boxed()].prop_map(Bf16::from_bits);
    let weight =
        prop_oneof![9 => (-2.0_f32..2.0).boxed(), 1 => any::<u32>().prop_map(f32::from_bits).boxed()];
    let place = (0..40_usize, any::<bool>()).prop_map(|(shift, against_end)| Place { shift, against_end });
    let size = (prop_oneof![0..24_usize, 0..80_usize], prop_oneof![0..9_usize, 0..65_usize], 0..3_usize);
    (size, place).prop_flat_map(move |((eights, rows, biases), place)| {
        let row = prop::collection::vec(channel.clone(), eights * 8);
        (
            prop::collection::vec(row.clone(), rows),
            prop::collection::vec(weight.clone(), rows),
            prop::collection::vec(row, biases),
        )
            .prop_map(move |(rows, weights, biases)| Case {
                channels: eights * 8,
                rows,
                weights,
                biases,
                place,
            })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(target_arch = "x86_64") { 256 } else { 48 }))]

    #[test]
    fn any_sum_of_rows_at_any_place(case in cases()) {
        check(&case.rows, &case.weights, &case.biases, case.channels, case.place);
    }

    #[test]
    fn the_reference_is_a_fused_multiply_add(left: u32, right: u32, sum: u32) {
        let [left, right, sum] = [left, right, sum].map(f32::from_bits);
        let (expected, found) = (left.mul_add(right, sum), product_and_sum(left, right, sum));
        prop_assert!(expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan());
    }
}
