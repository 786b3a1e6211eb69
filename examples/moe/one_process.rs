//! The same model in a single process: every expert of every layer, no group, no dispatch. What the ranks told is compared
//! with it.

use std::time::Duration;

use crossdock::experts::{BLOCK_CHANNELS, Bf16, Experts, Quantiser, ScaleRule};

use crate::model::{
    self, EXPERTS, HIDDEN, Layer, TOP_K, add, add_weighted, from_e4m3, narrow, normed, rounded, widen,
};
use crate::{Job, Mode, Told};

/// What became of one layer in one step, over all ranks.
pub struct Line {
    pub step: u32,
    pub layer: u32,
    pub tokens: usize,
    /// By expert, of those that live: tokens that came.
    pub counts: Vec<u32>,
    pub wire_bytes: u64,
    /// Dispatch, experts, combine: the mean over the ranks.
    pub times: [Duration; 3],
    /// The largest difference to the single process.
    pub difference: f32,
    /// How far FP8 is from the same layer with unquantised rows.
    pub fp8: f64,
    /// Choices of all tokens, and those that no rank answered to.
    pub choices: usize,
    pub unanswered: usize,
    /// The weight that was lost, a token.
    pub lost: f64,
    /// What differs, in words.
    pub wrong: Option<String>,
}

/// Computes everything once more, and compares. `told` is by rank, then step and layer.
pub fn compare(job: &Job, told: &[Vec<Told>]) -> Vec<Line> {
    let layers: Vec<Layer> = (0..job.layers).map(|layer| Layer::new(layer, 0..EXPERTS)).collect();
    let mut hidden: Vec<Vec<Bf16>> = (0..job.ranks).map(|rank| model::tokens(rank, job.tokens)).collect();
    let mut lines = Vec::new();
    for step in 0..job.steps {
        for layer in 0..job.layers {
            let one = OneProcess { job, layer: &layers[layer as usize], dead: &job.dead(step) };
            let nth = (step * job.layers + layer) as usize;
            let here: Vec<Option<&Told>> = told.iter().map(|of_rank| of_rank.get(nth)).collect();
            lines.push(Line { step, layer, ..one.compare(&mut hidden, &here) });
        }
    }
    lines
}

/// One layer, in a step in which some ranks may be dead.
struct OneProcess<'a> {
    job: &'a Job,
    layer: &'a Layer,
    dead: &'a [u32],
}

/// What the experts of one token made of it: who it was, with which weight, and what.
type Answer = (u32, f32, Vec<f32>);

impl OneProcess<'_> {
    fn compare(&self, hidden: &mut [Vec<Bf16>], told: &[Option<&Told>]) -> Line {
        let spread = Experts::new(EXPERTS, self.job.ranks);
        let mut counts = vec![0; EXPERTS as usize];
        let (mut expected_lost, mut difference, mut wrong) = (Vec::new(), 0.0_f32, None);
        let (mut with_fp8, mut without) = (Vec::new(), Vec::new());
        let alive = || (0..self.job.ranks).filter(|rank| !self.dead.contains(rank));
        for rank in alive() {
            let hidden = &mut hidden[rank as usize];
            let input = normed(hidden);
            let (choices, weights) = self.layer.route(&input);
            let shared = self.layer.shared(&input);
            let mut lost = Vec::new();
            for (token, input) in input.chunks_exact(HIDDEN).enumerate() {
                let of_token = token * TOP_K..(token + 1) * TOP_K;
                let chosen: Vec<(u32, f32)> = of_token.map(|at| (choices[at] as u32, weights[at])).collect();
                let is_dead = |expert: u32| self.dead.contains(&spread.place(expert).0);
                let unanswered = chosen.iter().filter(|(expert, _)| is_dead(*expert));
                lost.push(unanswered.map(|(_, weight)| weight).sum::<f32>());
                let chosen: Vec<(u32, f32)> =
                    chosen.into_iter().filter(|(expert, _)| !is_dead(*expert)).collect();
                chosen.iter().for_each(|(expert, _)| counts[*expert as usize] += 1);
                let answers = self.answers(&chosen, &through_fp8(input));
                let channels = token * HIDDEN..(token + 1) * HIDDEN;
                let before = add(&widen(&hidden[channels.clone()]), &shared[channels.clone()]);
                hidden[channels].copy_from_slice(&narrow(&self.sum(spread, before, &answers)));
                with_fp8.extend(self.sum(spread, vec![0.0; HIDDEN], &answers));
                let exact = self.answers(&chosen, &widen(input));
                without.extend(self.sum(spread, vec![0.0; HIDDEN], &exact));
            }
            let Some(told) = told[rank as usize] else {
                wrong = Some(format!("rank {rank} has not told everything"));
                continue;
            };
            let theirs = told.hidden.iter().map(|&bits| Bf16::from_bits(bits));
            let differences =
                theirs.zip(&*hidden).map(|(theirs, ours)| (theirs.to_f32() - ours.to_f32()).abs());
            difference = differences.fold(difference, f32::max);
            let is_equal = told.hidden.iter().copied().eq(hidden.iter().map(|value| value.to_bits()));
            if !is_equal {
                wrong = Some(format!("the tokens of rank {rank} differ from those of a single process"));
            }
            if told.masked != self.dead {
                wrong =
                    Some(format!("rank {rank} has masked {:?}, and {:?} are dead", told.masked, self.dead));
            }
            let none_lost = told.lost.is_empty() && lost.iter().all(|&lost| lost == 0.0);
            if told.lost != lost && !none_lost {
                wrong = Some(format!("rank {rank} has lost other weight than it says"));
            }
            expected_lost.extend(lost);
        }
        let alive_told: Vec<&Told> = alive().filter_map(|rank| told[rank as usize]).collect();
        let counts: Vec<u32> =
            alive().flat_map(|rank| spread.of_rank(rank)).map(|expert| counts[expert as usize]).collect();
        if !alive_told.iter().flat_map(|told| &told.counts).eq(&counts) {
            wrong = Some("other tokens have come to the experts than chose them".to_owned());
        }
        let mean = |which: usize| {
            let sum: Duration = alive_told.iter().map(|told| told.times[which]).sum();
            sum / alive_told.len().max(1) as u32
        };
        Line {
            step: 0,
            layer: 0,
            tokens: expected_lost.len(),
            wire_bytes: alive_told.iter().map(|told| told.wire_bytes).sum(),
            times: [mean(0), mean(1), mean(2)],
            difference,
            fp8: calc_diff(&with_fp8, &without),
            choices: expected_lost.len() * TOP_K,
            unanswered: expected_lost.len() * TOP_K - counts.iter().sum::<u32>() as usize,
            lost: expected_lost.iter().fold(0.0, |sum, &lost| sum + f64::from(lost))
                / expected_lost.len().max(1) as f64,
            counts,
            wrong,
        }
    }

    fn answers(&self, chosen: &[(u32, f32)], input: &[f32]) -> Vec<Answer> {
        let answer = |&(expert, weight): &(u32, f32)| {
            (expert, weight, self.layer.experts()[expert as usize].of(input))
        };
        chosen.iter().map(answer).collect()
    }

    /// Adds what came back to what was there before, in the order that each mode promises.
    fn sum(&self, spread: Experts, before: Vec<f32>, answers: &[Answer]) -> Vec<f32> {
        match self.job.mode {
            // Results travel as bf16; the token's rank adds them in the order of its choices, and rounds once.
            Mode::Latency => {
                let mut sum = vec![0.0; HIDDEN];
                for (_, weight, result) in answers {
                    add_weighted(&mut sum, &rounded(result), *weight);
                }
                add(&before, &rounded(&sum))
            }
            // Each rank adds what its experts made; its sum travels as bf16; the token's rank adds those in their order.
            Mode::Throughput => (0..self.job.ranks).fold(before, |all, rank| {
                let mut sum = vec![0.0; HIDDEN];
                for (_, weight, result) in
                    answers.iter().filter(|(expert, ..)| spread.place(*expert).0 == rank)
                {
                    add_weighted(&mut sum, result, *weight);
                }
                add(&all, &rounded(&sum))
            }),
        }
    }
}

/// What is left of a token that travels as FP8.
fn through_fp8(token: &[Bf16]) -> Vec<f32> {
    let (mut values, mut scales) = (vec![0; HIDDEN], vec![0.0; HIDDEN / BLOCK_CHANNELS as usize]);
    Quantiser::detect().quantise(token, ScaleRule::Plain, &mut values, &mut scales);
    let blocks = values.chunks(BLOCK_CHANNELS as usize).zip(scales);
    blocks.flat_map(|(values, scale)| from_e4m3(values, scale)).collect()
}

/// How unlike two lists are: 0 if they are the same. The measure that DeepEP's tests use.
fn calc_diff(one: &[f32], two: &[f32]) -> f64 {
    let both = || one.iter().zip(two).map(|(&one, &two)| (f64::from(one) + 1.0, f64::from(two) + 1.0));
    let products: f64 = both().map(|(one, two)| one * two).sum();
    let squares: f64 = both().map(|(one, two)| one * one + two * two).sum();
    if squares > 0.0 { 1.0 - 2.0 * products / squares } else { 0.0 }
}
