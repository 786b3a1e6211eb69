//! The model: a router, a shared expert, and experts, all with made-up weights. It knows nothing of ranks.

use std::ops::Range;

use crossdock::experts::{Bf16, E4m3};

/// Channels of a token.
pub const HIDDEN: usize = 512;
/// Channels inside an expert.
const INNER: usize = 256;
/// Experts of a layer, beside the shared one.
pub const EXPERTS: u32 = 16;
/// Experts that a token chooses.
pub const TOP_K: usize = 4;

/// One layer, with some of its experts.
pub struct Layer {
    router: Matrix,
    shared: Expert,
    experts: Vec<Expert>,
}

impl Layer {
    pub fn new(layer: u32, held: Range<u32>) -> Layer {
        let seed = |what: u32| u64::from(layer) << 32 | u64::from(what);
        Layer {
            router: Matrix::random(&mut Random(seed(EXPERTS)), HIDDEN, EXPERTS as usize),
            shared: Expert::new(seed(EXPERTS + 1)),
            experts: held.map(|expert| Expert::new(seed(expert))).collect(),
        }
    }

    /// Those that are here, in order.
    pub fn experts(&self) -> &[Expert] {
        &self.experts
    }

    /// What the shared expert makes of some tokens.
    pub fn shared(&self, tokens: &[Bf16]) -> Vec<f32> {
        // As precise as the sum to which it is added.
        tokens.chunks_exact(HIDDEN).flat_map(|token| rounded(&self.shared.of(&widen(token)))).collect()
    }

    /// Which experts each token gets, the likeliest first, and the weight of each; a token's weights add up to one.
    pub fn route(&self, tokens: &[Bf16]) -> (Vec<i64>, Vec<f32>) {
        let (mut choices, mut weights) = (Vec::new(), Vec::new());
        for token in tokens.chunks_exact(HIDDEN) {
            let affinity = |score: f32| 1.0 / (1.0 + (-score).exp());
            let scores: Vec<f32> = self.router.times(&widen(token)).into_iter().map(affinity).collect();
            let mut order: Vec<usize> = (0..scores.len()).collect();
            // Stable: of two that are equal the first comes first, everywhere.
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let chosen = &order[..TOP_K];
            let sum: f32 = chosen.iter().map(|&expert| scores[expert]).sum();
            choices.extend(chosen.iter().map(|&expert| expert as i64));
            weights.extend(chosen.iter().map(|&expert| scores[expert] / sum));
        }
        (choices, weights)
    }
}

/// A SwiGLU perceptron.
pub struct Expert {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Expert {
    fn new(seed: u64) -> Expert {
        let mut random = Random(seed.wrapping_mul(0x5851_f42d_4c95_7f2d));
        Expert {
            gate: Matrix::random(&mut random, HIDDEN, INNER),
            up: Matrix::random(&mut random, HIDDEN, INNER),
            down: Matrix::random(&mut random, INNER, HIDDEN),
        }
    }

    /// What it makes of one token. One row at a time, so the bits do not depend on who else is in the batch.
    pub fn of(&self, token: &[f32]) -> Vec<f32> {
        let gate = self.gate.times(token).into_iter().map(|value| value / (1.0 + (-value).exp()));
        let inner: Vec<f32> = gate.zip(self.up.times(token)).map(|(gate, up)| gate * up).collect();
        self.down.times(&inner)
    }
}

/// The tokens that a rank begins with.
pub fn tokens(rank: u32, tokens: u32) -> Vec<Bf16> {
    let mut random = Random(0x70cc << 32 | u64::from(rank));
    (0..tokens as usize * HIDDEN).map(|_| Bf16::from_f32(random.number())).collect()
}

/// Tokens that are equally long: what goes into a layer.
pub fn normed(tokens: &[Bf16]) -> Vec<Bf16> {
    let of_token = |token: &[Bf16]| {
        let token = widen(token);
        let squares: f32 = token.iter().map(|value| value * value).sum();
        let scale = (squares / HIDDEN as f32 + 1e-6).sqrt().recip();
        narrow(&token.iter().map(|value| value * scale).collect::<Vec<f32>>())
    };
    tokens.chunks_exact(HIDDEN).flat_map(of_token).collect()
}

pub fn widen(values: &[Bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

pub fn narrow(values: &[f32]) -> Vec<Bf16> {
    values.iter().map(|&value| Bf16::from_f32(value)).collect()
}

/// As precise as bf16.
pub fn rounded(values: &[f32]) -> Vec<f32> {
    widen(&narrow(values))
}

/// 128 channels, with their scale.
pub fn from_e4m3(values: &[u8], scale: f32) -> Vec<f32> {
    values.iter().map(|&bits| E4m3::from_bits(bits).to_f32() * scale).collect()
}

pub fn add(one: &[f32], two: &[f32]) -> Vec<f32> {
    one.iter().zip(two).map(|(one, two)| one + two).collect()
}

/// Fused, as combine's sums are.
pub fn add_weighted(sum: &mut [f32], values: &[f32], weight: f32) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum = value.mul_add(weight, *sum));
}

/// Input by input, so that a compiler can use vectors without changing the order of a sum.
struct Matrix {
    numbers: Vec<f32>,
    outputs: usize,
}

impl Matrix {
    fn random(random: &mut Random, inputs: usize, outputs: usize) -> Matrix {
        let scale = 1.7 / (inputs as f32).sqrt();
        Matrix { numbers: (0..inputs * outputs).map(|_| random.number() * scale).collect(), outputs }
    }

    fn times(&self, vector: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; self.outputs];
        for (input, numbers) in vector.iter().zip(self.numbers.chunks_exact(self.outputs)) {
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += input * number);
        }
        sums
    }
}

/// Numbers from -1 to 1, the same in every run.
struct Random(u64);

impl Random {
    fn number(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
