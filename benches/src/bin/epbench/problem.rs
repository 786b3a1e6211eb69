//! Seeded tokens: what they hold and which experts they choose. The MPI program of benches/compare/ep makes the same.

use crossdock_ep::{Bf16, Experts};

use crate::options::{Mode, Options, Routing};

/// Every rank's tokens. All ranks make the same.
pub struct Problem {
    pub mode: Mode,
    pub ranks: u32,
    /// Of each rank.
    pub tokens: usize,
    pub hidden: usize,
    pub top_k: usize,
    pub spread: Experts,
    seed: u64,
    /// By rank: `[tokens, top_k]`.
    choices: Vec<Vec<i64>>,
    weights: Vec<Vec<f32>>,
}

impl Problem {
    pub fn new(options: &Options, spread: Experts) -> Self {
        let mut problem = Self {
            mode: options.mode,
            ranks: options.ranks,
            tokens: options.tokens as usize,
            hidden: options.hidden as usize,
            top_k: options.topk as usize,
            spread,
            seed: options.seed,
            choices: Vec::new(),
            weights: Vec::new(),
        };
        problem.choose(options.routing);
        problem
    }

    /// `[tokens, top_k]`: the experts that a rank's tokens choose, or -1.
    pub fn choices(&self, rank: u32) -> &[i64] {
        &self.choices[rank as usize]
    }

    /// `[tokens, top_k]`: how each choice counts.
    pub fn weights(&self, rank: u32) -> &[f32] {
        &self.weights[rank as usize]
    }

    /// What rows are sorted by where they arrive: experts, in throughput mode ranks.
    pub fn groups(&self) -> usize {
        match self.mode {
            Mode::Latency => self.spread.count() as usize,
            Mode::Throughput => self.ranks as usize,
        }
    }

    /// The rank of a group.
    pub fn rank_of(&self, group: usize) -> u32 {
        match self.mode {
            Mode::Latency => self.spread.place(group as u32).0,
            Mode::Throughput => group as u32,
        }
    }

    /// The groups of a rank.
    pub fn groups_of(&self, rank: u32) -> std::ops::Range<usize> {
        match self.mode {
            Mode::Latency => {
                let experts = self.spread.of_rank(rank);
                experts.start as usize..experts.end as usize
            }
            Mode::Throughput => rank as usize..rank as usize + 1,
        }
    }

    /// The groups to which a token goes, in the order in which their results are summed, and how each counts.
    pub fn goes_to(&self, rank: u32, token: usize) -> impl Iterator<Item = (usize, f32)> + use<'_> {
        let choices = &self.choices(rank)[token * self.top_k..][..self.top_k];
        let weights = &self.weights(rank)[token * self.top_k..][..self.top_k];
        let chosen = choices.iter().zip(weights).filter(|(expert, _)| **expert >= 0);
        let by_expert = chosen.clone().map(|(&expert, &weight)| (expert as usize, weight));
        let here =
            move |rank: &u32| chosen.clone().any(|(&expert, _)| self.spread.place(expert as u32).0 == *rank);
        let (latency, ranks) = match self.mode {
            Mode::Latency => (Some(by_expert), None),
            Mode::Throughput => (None, Some((0..self.ranks).filter(here).map(|rank| (rank as usize, 1.0)))),
        };
        latency.into_iter().flatten().chain(ranks.into_iter().flatten())
    }

    /// Fills a token's row. Values have either sign and lie in eight powers of two; some blocks are zeros, and some are
    /// smaller than a quantiser tells apart. Another salt gives other values.
    pub fn input(&self, rank: u32, token: usize, salt: u64, row: &mut [Bf16]) {
        self.pattern(u64::from(rank) << 32 | token as u64, salt, row);
        let blocks = self.hidden / BLOCK_CHANNELS;
        for (block, values) in row.chunks_mut(BLOCK_CHANNELS).enumerate() {
            match (token * blocks + block) % 61 {
                7 => values.fill(Bf16::default()),
                9 => {
                    values.iter_mut().for_each(|value| *value = Bf16::from_bits(value.to_bits() - (40 << 7)))
                }
                _ => {}
            }
        }
    }

    /// Fills what a group is taken to compute for a token.
    pub fn result(&self, group: usize, rank: u32, token: usize, salt: u64, row: &mut [Bf16]) {
        self.pattern((group as u64 + 1) << 48 | u64::from(rank) << 32 | token as u64, salt, row);
    }

    fn pattern(&self, what: u64, salt: u64, row: &mut [Bf16]) {
        let of_seed = (self.seed ^ salt << 40).wrapping_mul(0x0051_ed27);
        let start = mix(what.wrapping_add(of_seed)) as u32;
        for (channel, value) in (0_u32..).zip(row) {
            let mut h = start.wrapping_add(channel.wrapping_mul(0x9e37_79b1));
            h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
            h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
            h ^= h >> 15;
            *value = Bf16::from_bits((h & 0x8000 | (121 + (h >> 29)) << 7 | h & 0x7f) as u16);
        }
    }

    fn choose(&mut self, routing: Routing) {
        let (experts, top_k) = (self.spread.count() as usize, self.top_k);
        let mut order: Vec<i64> = (0..experts as i64).collect();
        for at in (1..experts).rev() {
            let other = unit(self.seed.wrapping_mul(77).wrapping_add(at as u64)) * (at + 1) as f64;
            order.swap(at, other as usize);
        }
        let hot = if experts / 8 > top_k { experts / 8 } else { top_k };
        let mut sum = 0.0;
        let shares: Vec<f64> = (0..experts)
            .map(|at| {
                sum += match routing {
                    Routing::Zipf => 1.0 / (at + 1) as f64,
                    Routing::KHot if at < hot && hot < experts => 0.9 / hot as f64,
                    Routing::KHot if hot < experts => 0.1 / (experts - hot) as f64,
                    _ => 1.0,
                };
                sum
            })
            .collect();
        for rank in 0..u64::from(self.ranks) {
            let (mut choices, mut weights) = (Vec::new(), Vec::new());
            for token in 0..self.tokens as u64 {
                let mut state = mix(self.seed ^ ((rank << 40) + (token << 12)));
                let mut random = || {
                    state = state.wrapping_add(1);
                    unit(state.wrapping_sub(1))
                };
                let first = choices.len();
                while choices.len() < first + top_k {
                    let share = random() * sum;
                    let expert = order[shares.partition_point(|&upto| upto <= share).min(experts - 1)];
                    if !choices[first..].contains(&expert) {
                        choices.push(expert);
                    }
                }
                let drawn: Vec<f32> = (0..top_k).map(|_| (0.1 + random()) as f32).collect();
                let total: f64 = drawn.iter().map(|&weight| f64::from(weight)).sum();
                weights.extend(drawn.iter().map(|&weight| (f64::from(weight) / total) as f32));
                for (at, choice) in choices[first..].iter_mut().enumerate() {
                    match routing {
                        Routing::OneHot => *choice = if at > 0 { -1 } else { order[0] },
                        Routing::Masked if random() < 0.1 => *choice = -1,
                        _ => {}
                    }
                }
            }
            self.choices.push(choices);
            self.weights.push(weights);
        }
    }
}

fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn unit(z: u64) -> f64 {
    (mix(z) >> 11) as f64 / (1_u64 << 53) as f64
}

const BLOCK_CHANNELS: usize = 128;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn tokens_choose_as_they_are_told() {
        for (routing, expected) in
            [("uniform", 1.0), ("zipf", 1.0), ("k-hot", 1.0), ("one-hot", 0.125), ("masked", 0.9)]
        {
            let options = Options::parse_from(["epbench", "--routing", routing, "--tokens", "500"]);
            let problem = Problem::new(&options, Experts::new(256, 2));
            let choices: Vec<&[i64]> = (0..2).flat_map(|rank| problem.choices(rank).chunks(8)).collect();
            let chosen = choices.concat().iter().filter(|expert| **expert >= 0).count() as f64 / 8000.0;
            assert!((chosen - expected).abs() < 0.02, "{routing}: {chosen}");
            for token in choices {
                let mut distinct: Vec<i64> = token.iter().copied().filter(|expert| *expert >= 0).collect();
                distinct.sort_unstable();
                distinct.dedup();
                assert_eq!(distinct.len(), token.iter().filter(|expert| **expert >= 0).count(), "{routing}");
            }
            let sums = problem.weights(1).chunks(8).map(|weights| weights.iter().sum::<f32>());
            assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < 1e-5));
        }
    }

    #[test]
    fn a_token_goes_to_its_experts_or_to_their_ranks() {
        let options = Options::parse_from(["epbench", "--ranks", "4", "--tokens", "50"]);
        let latency = Problem::new(&options, Experts::new(256, 4));
        let throughput = Problem { mode: Mode::Throughput, ..Problem::new(&options, Experts::new(256, 4)) };
        for token in 0..50 {
            let experts: Vec<usize> = latency.goes_to(2, token).map(|(expert, _)| expert).collect();
            assert_eq!(experts.len(), 8);
            let mut ranks: Vec<usize> = experts.iter().map(|expert| expert / 64).collect();
            ranks.sort_unstable();
            ranks.dedup();
            assert!(throughput.goes_to(2, token).map(|(rank, _)| rank).eq(ranks));
        }
    }
}
