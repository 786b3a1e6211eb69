//! What the ranks send, and what has to come: every rank can make everybody's tokens. A few sets of them take turns, so that
//! what an earlier step has left behind is not taken for what came now.

use crossdock::experts::{BLOCK_CHANNELS, Bf16, E4m3, GroupConfig, Quantiser, ScaleRule};

use super::Mode;

/// Sets of tokens.
pub const SETS: usize = 3;

/// One set of all ranks' tokens.
pub struct Content {
    mode: Mode,
    config: GroupConfig,
    /// By rank.
    tokens: Vec<TokensOf>,
}

/// The tokens of one rank.
struct TokensOf {
    /// `[tokens, hidden]`.
    rows: Vec<Bf16>,
    /// `[tokens, top_k]`.
    choices: Vec<i64>,
    /// `[tokens, top_k]`; those of a token add up to one.
    weights: Vec<f32>,
    /// `[tokens, hidden]`, as they travel.
    values: Vec<u8>,
    /// `[tokens, scale bytes]`.
    scales: Vec<u8>,
}

impl Content {
    pub fn new(mode: Mode, config: &GroupConfig, set: usize) -> Content {
        let tokens = (0..config.ranks()).map(|rank| TokensOf::new(config, set, rank)).collect();
        Content { mode, config: config.clone(), tokens }
    }

    pub fn rows(&self, rank: u32) -> &[Bf16] {
        &self.tokens[rank as usize].rows
    }

    pub fn choices(&self, rank: u32) -> &[i64] {
        &self.tokens[rank as usize].choices
    }

    pub fn weights(&self, rank: u32) -> &[f32] {
        &self.tokens[rank as usize].weights
    }

    /// A token's row and its scales, as they travel.
    pub fn row(&self, rank: u32, token: usize) -> (&[u8], &[u8]) {
        let (hidden, scale_bytes) = (self.hidden(), self.scale_bytes());
        let TokensOf { values, scales, .. } = &self.tokens[rank as usize];
        (&values[token * hidden..][..hidden], &scales[token * scale_bytes..][..scale_bytes])
    }

    /// The tokens of a rank that chose an expert, in their order.
    pub fn who_chose(&self, expert: u32, source: u32) -> impl Iterator<Item = usize> + '_ {
        let of_tokens = self.choices(source).chunks_exact(self.top_k()).enumerate();
        of_tokens.filter(move |(_, choices)| choices.contains(&i64::from(expert))).map(|(token, _)| token)
    }

    /// A token's choices and their weights as a rank sees them: those of other ranks are -1 and 0.
    pub fn as_seen_by(&self, rank: u32, source: u32, token: usize) -> (Vec<i64>, Vec<f32>) {
        let held = self.config.spread().of_rank(rank);
        let of_token = token * self.top_k()..(token + 1) * self.top_k();
        let seen = of_token.map(|at| {
            let expert = self.choices(source)[at] as u32;
            match held.contains(&expert) {
                true => (i64::from(expert - held.start), self.weights(source)[at]),
                false => (-1, 0.0),
            }
        });
        seen.unzip()
    }

    /// The part of a token's weight that is lost when some ranks are dead.
    pub fn lost_share(&self, source: u32, token: usize, lost: f32) -> f32 {
        lost / self.weights(source)[token * self.top_k()..][..self.top_k()].iter().sum::<f32>()
    }

    /// What a combine loses of each token when some ranks are dead, as its report says it.
    pub fn lost(&self, source: u32, dead: &[u32]) -> Vec<f32> {
        let spread = self.config.spread();
        let choices = self.choices(source).chunks_exact(self.top_k());
        let of_tokens = choices.zip(self.weights(source).chunks_exact(self.top_k()));
        let of_token = |(choices, weights): (&[i64], &[f32])| {
            let lost = choices.iter().zip(weights).filter(|(expert, _)| {
                let (rank, _) = spread.place(**expert as u32);
                dead.contains(&rank)
            });
            lost.map(|(_, weight)| weight).sum()
        };
        of_tokens.map(of_token).collect()
    }

    /// What comes back to a rank's tokens when some ranks are dead: `[tokens, hidden]`.
    pub fn combined(&self, source: u32, dead: &[u32]) -> Vec<Bf16> {
        let (spread, hidden, top_k) = (self.config.spread(), self.hidden(), self.top_k());
        let mut out = Vec::with_capacity(self.rows(source).len());
        for (token, choices) in self.choices(source).chunks_exact(top_k).enumerate() {
            let weights = &self.weights(source)[token * top_k..][..top_k];
            let row: Vec<f32> = decoded(self.row(source, token)).collect();
            let mut sum = vec![0.0_f32; hidden];
            let is_dead = |expert: i64| dead.contains(&spread.place(expert as u32).0);
            match self.mode {
                Mode::Latency => {
                    for (&expert, &weight) in choices.iter().zip(weights).filter(|(e, _)| !is_dead(**e)) {
                        let factor = factor(expert as u32);
                        let results = row.iter().map(|value| Bf16::from_f32(value * factor).to_f32());
                        sum.iter_mut()
                            .zip(results)
                            .for_each(|(sum, result)| *sum = result.mul_add(weight, *sum));
                    }
                }
                Mode::Throughput => {
                    for rank in (0..self.config.ranks()).filter(|rank| !dead.contains(rank)) {
                        let (experts, weights) = self.as_seen_by(rank, source, token);
                        let Some(factor) = factor_of_all(self.first_of(rank), &experts, &weights) else {
                            continue;
                        };
                        let results = row.iter().map(|value| Bf16::from_f32(value * factor).to_f32());
                        sum.iter_mut().zip(results).for_each(|(sum, result)| *sum += result);
                    }
                }
            }
            out.extend(sum.into_iter().map(Bf16::from_f32));
        }
        out
    }

    pub fn ranks(&self) -> u32 {
        self.config.ranks()
    }

    /// Tokens of a rank.
    pub fn tokens(&self, rank: u32) -> usize {
        self.config.max_tokens[rank as usize] as usize
    }

    /// The first expert of a rank.
    pub fn first_of(&self, rank: u32) -> u32 {
        self.config.spread().of_rank(rank).start
    }

    pub fn hidden(&self) -> usize {
        self.config.hidden as usize
    }

    pub fn top_k(&self) -> usize {
        self.config.top_k as usize
    }

    pub fn scale_bytes(&self) -> usize {
        self.config.payload.scale_bytes(self.config.hidden) as usize
    }
}

impl TokensOf {
    fn new(config: &GroupConfig, set: usize, rank: u32) -> TokensOf {
        let (hidden, top_k) = (config.hidden as usize, config.top_k as usize);
        let count = config.max_tokens[rank as usize] as usize;
        let mut of = TokensOf {
            rows: Vec::with_capacity(count * hidden),
            choices: Vec::with_capacity(count * top_k),
            weights: Vec::with_capacity(count * top_k),
            values: vec![0; count * hidden],
            scales: Vec::new(),
        };
        let mut scales = vec![0.0; hidden.div_ceil(BLOCK_CHANNELS as usize)];
        let quantiser = Quantiser::detect();
        for token in 0..count {
            let mut random = Random((set as u64) << 56 | u64::from(rank) << 32 | token as u64);
            let first = of.choices.len();
            while of.choices.len() < first + top_k {
                let expert = (random.next() % u64::from(config.experts)) as i64;
                if !of.choices[first..].contains(&expert) {
                    of.choices.push(expert);
                }
            }
            let drawn: Vec<f32> = (0..top_k).map(|_| 0.1 + random.unit()).collect();
            let sum: f32 = drawn.iter().sum();
            of.weights.extend(drawn.iter().map(|weight| weight / sum));
            of.rows.extend((0..hidden).map(|_| Bf16::from_f32(random.unit() - 0.5)));
            let into = token * hidden..(token + 1) * hidden;
            quantiser.quantise(&of.rows[into.clone()], ScaleRule::Plain, &mut of.values[into], &mut scales);
            of.scales.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
        }
        of
    }
}

/// What an expert is taken to do: it multiplies its rows.
pub fn factor(expert: u32) -> f32 {
    (1 + expert % 13) as f32 / 8.0
}

/// What the experts of one rank do together to a token, weighed; `None` if none of them is there.
pub fn factor_of_all(first: u32, experts: &[i64], weights: &[f32]) -> Option<f32> {
    let here = experts.iter().zip(weights).filter(|(expert, _)| **expert >= 0);
    here.map(|(&expert, weight)| factor(first + expert as u32) * weight).reduce(|sum, next| sum + next)
}

/// A row's values.
pub fn decoded<'a>((values, scales): (&'a [u8], &'a [u8])) -> impl Iterator<Item = f32> + 'a {
    let scale = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let blocks = values.chunks(BLOCK_CHANNELS as usize).zip(scales.chunks_exact(4).map(scale));
    blocks.flat_map(|(values, scale)| values.iter().map(move |&bits| E4M3[bits as usize] * scale))
}

/// Each value of FP8.
const E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        values[bits] = E4m3::from_bits(bits as u8).to_f32();
        bits += 1;
    }
    values
};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// From 0 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}
