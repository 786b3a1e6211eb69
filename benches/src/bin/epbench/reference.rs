//! What has to arrive, made by one rank after the other, a value at a time.

use crossdock::Memory;
use crossdock_ep::{Bf16, E4m3, ScaleOrder};

use crate::options::Mode;
use crate::ours::Arrived;
use crate::setup::{Setup, Shared};

/// A row in the form in which it is dispatched, and its scales.
pub fn make(setup: &Setup, row: &[Bf16]) -> (Vec<u8>, Vec<u8>) {
    if setup.scale_bytes() == 0 {
        return (row.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect(), Vec::new());
    }
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    for block in row.chunks(128) {
        let most = block.iter().map(|value| value.to_f32().abs()).fold(1e-4_f32, f32::max);
        let factor = 448.0 / most;
        values.extend(block.iter().map(|value| E4m3::from_f32(value.to_f32() * factor).to_bits()));
        scales.extend((most * (1.0 / 448.0)).to_le_bytes());
    }
    (values, scales)
}

/// A rank's tokens are made once, where all ranks find them.
pub fn tell_made(setup: &Setup, shared: &Shared, rank: u32, token: usize, row: &[Bf16]) {
    let Some(memory) = &shared.made else { return };
    let (values, scales) = make(setup, row);
    let at = (rank as usize * setup.problem.tokens + token) * (values.len() + scales.len());
    memory.write(at, &[values, scales].concat()).expect("each token has its place");
}

/// How many rows of a rank are not as they should be after a dispatch, where anything is to be compared.
pub fn wrong_arrivals(setup: &Setup, shared: &Shared, rank: u32, arrived: &Arrived<'_, '_>) -> u64 {
    if shared.made.is_none() {
        return 0;
    }
    let problem = &setup.problem;
    let mut counts = vec![0_u32; problem.groups_of(rank).len()];
    let mut wrong = 0;
    each_arrival(setup, shared, rank, |group, row, source, token, values, scales| {
        let same = match arrived {
            Arrived::Latency(_, outputs) => {
                outputs.range(group, source).contains(&(row as u32))
                    && outputs.sources()[group * outputs.rows() + row] as usize == token
                    && outputs.row(group, row) == values
                    && outputs.scales_of(group, row) == scales
            }
            Arrived::Throughput(_, outputs) => {
                let choices = row * problem.top_k..(row + 1) * problem.top_k;
                let of_token = token * problem.top_k..(token + 1) * problem.top_k;
                let expected = problem.choices(source)[of_token.clone()].iter();
                let expected = expected.zip(&problem.weights(source)[of_token]).map(|(&expert, &weight)| {
                    match expert >= 0 && problem.spread.place(expert as u32).0 == rank {
                        true => (i64::from(problem.spread.place(expert as u32).1), weight),
                        false => (-1, 0.0),
                    }
                });
                let experts = outputs.experts()[choices.clone()].iter().copied();
                let found = experts.zip(outputs.weights()[choices].iter().copied());
                outputs.range(source).contains(&row)
                    && outputs.tokens()[row] as usize == token
                    && outputs.values()[row * values.len()..][..values.len()] == *values
                    && outputs.scales()[row * scales.len()..][..scales.len()] == *scales
                    && found.eq(expected)
            }
        };
        counts[group] += 1;
        wrong += u64::from(!same);
    });
    let more = match arrived {
        Arrived::Latency(_, outputs) => outputs.counts() != counts,
        Arrived::Throughput(_, outputs) => outputs.len() != counts[0] as usize,
    };
    wrong + u64::from(more)
}

/// How many rows are wrong in the floor's memory.
pub fn wrong_floor(setup: &Setup, shared: &Shared, rank: u32) -> u64 {
    let (rows, row_bytes, scale_bytes) = (setup.rows(), setup.row_bytes(), setup.scale_bytes());
    let first = setup.problem.groups_of(rank).start;
    let (mut found, mut word) = (vec![0; row_bytes.max(scale_bytes)], [0; 4]);
    let mut wrong = 0;
    let read = |at: usize, into: &mut [u8]| shared.floor.read(at, into).expect("each row has its place");
    each_arrival(setup, shared, rank, |group, row, _, _, values, scales| {
        let place = (first + group) * rows + row;
        read(place * row_bytes, &mut found[..row_bytes]);
        let mut same = found[..row_bytes] == *values;
        for (at, expected) in scales.chunks_exact(4).enumerate() {
            let words = scale_bytes / 4;
            let at = match setup.order() {
                ScaleOrder::ByRow => place * words + at,
                ScaleOrder::ByColumn => ((first + group) * words + at) * rows + row,
            };
            read(setup.floor_scales() + 4 * at, &mut word);
            same &= word == *expected;
        }
        wrong += u64::from(!same);
    });
    wrong
}

/// Every row that has to arrive at a rank, in order: group, row, source, token, values, scales.
fn each_arrival(
    setup: &Setup,
    shared: &Shared,
    rank: u32,
    mut visit: impl FnMut(usize, usize, u32, usize, &[u8], &[u8]),
) {
    let Some(memory): Option<&Memory> = shared.made.as_ref() else { return };
    let problem = &setup.problem;
    let groups = problem.groups_of(rank);
    let mut rows = vec![0; groups.len()];
    let mut made = vec![0; setup.row_bytes() + setup.scale_bytes()];
    for source in 0..problem.ranks {
        for token in 0..problem.tokens {
            let at = (source as usize * problem.tokens + token) * made.len();
            memory.read(at, &mut made).expect("each token has its place");
            let (values, scales) = made.split_at(setup.row_bytes());
            for (group, _) in problem.goes_to(source, token).filter(|(group, _)| groups.contains(group)) {
                let group = group - groups.start;
                visit(group, rows[group], source, token, values, scales);
                rows[group] += 1;
            }
        }
    }
}

/// How many of a rank's tokens came back as something else than they should.
pub fn wrong_sums(setup: &Setup, rank: u32, salt: u64, combined: &[Bf16]) -> u64 {
    let problem = &setup.problem;
    let mut result = vec![Bf16::default(); problem.hidden];
    let mut sums = vec![0.0_f32; problem.hidden];
    let wrong = combined.chunks(problem.hidden).enumerate().filter(|(token, found)| {
        sums.fill(0.0);
        for (group, weight) in problem.goes_to(rank, *token) {
            problem.result(group, rank, *token, salt, &mut result);
            for (sum, value) in sums.iter_mut().zip(&result) {
                *sum = match problem.mode {
                    Mode::Latency => value.to_f32().mul_add(weight, *sum),
                    Mode::Throughput => *sum + value.to_f32(),
                };
            }
        }
        !sums.iter().zip(*found).all(|(sum, found)| Bf16::from_f32(*sum) == *found)
    });
    wrong.count() as u64
}
