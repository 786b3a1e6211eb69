//! What a combine gives where some ranks have not answered: written from the semantics, for one process that sees all.

use crossdock_ep::{Bf16, GroupConfig, LostWeight};

use crate::plan::{Mode, Step};
use crate::reference::{self, Input};

/// What an expert, or in the throughput mode a rank, makes of a row: in each step something else.
pub fn result(salt: u32, expert: u32, source: u32, token: u32, same: u32, channel: usize) -> Bf16 {
    reference::result(expert, source + (salt << 6), token, same, channel)
}

/// What comes back to a rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub out: Vec<Bf16>,
    /// Of the throughput mode.
    pub weights: Vec<f32>,
    pub lost: Vec<f32>,
    /// Tokens that have lost a choice.
    pub short: usize,
}

/// What a step is combined with.
pub struct Asked<'a> {
    pub config: &'a GroupConfig,
    pub step: &'a Step,
    pub lost: LostWeight,
    pub salt: u32,
    pub rank: u32,
    pub biases: &'a [&'a [Bf16]],
}

impl Asked<'_> {
    fn input(&self) -> &Input {
        &self.step.inputs[self.rank as usize]
    }

    pub fn answer(&self, answered: &[bool]) -> Answer {
        let top_k = self.config.top_k as usize;
        let input = self.input();
        let tokens = input.choices.len() / top_k;
        let rank_of = |choice: usize| {
            let expert = input.choices[choice];
            (expert >= 0).then(|| reference::place(self.config, expert).0)
        };
        let is_lost = |choice: usize| rank_of(choice).is_some_and(|rank| !answered[rank as usize]);
        let is_weighed = self.step.mode == Mode::Latency || self.step.weighted;
        let weight = |choice: usize| if is_weighed { input.weights[choice] } else { 1.0 };
        let (mut lost, mut raise, mut short) = (vec![0.0_f32; tokens], vec![1.0_f32; tokens], 0);
        for token in 0..tokens {
            let mut kept = 0.0_f32;
            let choices = token * top_k..(token + 1) * top_k;
            short += usize::from(choices.clone().any(is_lost));
            for choice in choices.filter(|&choice| rank_of(choice).is_some()) {
                *(if is_lost(choice) { &mut lost[token] } else { &mut kept }) += weight(choice);
            }
            let raises = self.lost == LostWeight::Renormalise && self.step.mode == Mode::Latency;
            if raises && lost[token] != 0.0 && kept != 0.0 {
                raise[token] = (kept + lost[token]) / kept;
            }
        }
        let out = match self.step.mode {
            Mode::Latency => self.weighted(answered, &raise),
            Mode::Throughput => self.plain(answered),
        };
        let gave = |choice: usize| {
            let weight = if self.step.weighted { input.weights[choice] } else { 0.0 };
            if rank_of(choice).is_some() && !is_lost(choice) { weight } else { 0.0 }
        };
        let weights = (0..input.choices.len()).map(gave).collect();
        Answer { out, weights, lost: if short > 0 { lost } else { Vec::new() }, short }
    }

    fn weighted(&self, answered: &[bool], raise: &[f32]) -> Vec<Bf16> {
        let (top_k, hidden) = (self.config.top_k as usize, self.config.hidden as usize);
        let input = self.input();
        let mut out = Vec::new();
        for (token, choices) in input.choices.chunks(top_k).enumerate() {
            for channel in 0..hidden {
                let mut sum = 0.0_f32;
                for (choice, &expert) in choices.iter().enumerate() {
                    if expert < 0 || !answered[reference::place(self.config, expert).0 as usize] {
                        continue;
                    }
                    let same = choices[..choice].iter().filter(|&&earlier| earlier == expert).count() as u32;
                    let value = result(self.salt, expert as u32, self.rank, token as u32, same, channel);
                    sum = value.to_f32().mul_add(input.weights[token * top_k + choice] * raise[token], sum);
                }
                out.push(Bf16::from_f32(sum));
            }
        }
        out
    }

    fn plain(&self, answered: &[bool]) -> Vec<Bf16> {
        let (top_k, hidden) = (self.config.top_k as usize, self.config.hidden as usize);
        let mut out = Vec::new();
        for (token, choices) in self.input().choices.chunks(top_k).enumerate() {
            let goes =
                |rank: u32| choices.iter().any(|&e| e >= 0 && reference::place(self.config, e).0 == rank);
            let ranks: Vec<u32> =
                (0..self.config.ranks()).filter(|&rank| goes(rank) && answered[rank as usize]).collect();
            for channel in 0..hidden {
                let at = token * hidden + channel;
                let sum = self.biases.iter().fold(0.0, |sum, bias| sum + bias[at].to_f32());
                let add = |sum: f32, &rank: &u32| {
                    sum + result(self.salt, rank, self.rank, token as u32, 0, channel).to_f32()
                };
                out.push(Bf16::from_f32(ranks.iter().fold(sum, add)));
            }
        }
        out
    }
}
