//! Seeded inputs, and how tokens choose their experts.

use crossdock_ep::{Bf16, GroupConfig};

use crate::reference::Input;

/// Numbers from one seed.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u32) -> u32 {
        (self.next() % u64::from(limit.max(1))) as u32
    }

    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// How tokens choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    Uniform,
    /// The first experts are asked most.
    Zipf,
    /// Nine of ten choices fall on an eighth of the experts.
    KHot,
    /// One expert for everybody, and nothing else.
    OneHot,
    /// A tenth of the choices is none.
    Masked,
    /// Nobody chooses anything.
    Nothing,
    /// A token may name an expert again and again.
    Duplicates,
}

impl Routing {
    pub const ALL: [Routing; 7] = [
        Routing::Uniform,
        Routing::Zipf,
        Routing::KHot,
        Routing::OneHot,
        Routing::Masked,
        Routing::Nothing,
        Routing::Duplicates,
    ];

    fn choose(self, experts: u32, top_k: usize, random: &mut Random) -> Vec<i64> {
        let mut chosen: Vec<i64> = Vec::new();
        let hot = (experts / 8).max(1);
        for choice in 0..top_k {
            let mut pick = || match self {
                Routing::Zipf => {
                    let power = f64::from(experts).powf(random.unit()) - 1.0;
                    (power as u32).min(experts - 1)
                }
                Routing::KHot if random.below(10) < 9 => random.below(hot),
                Routing::OneHot => experts / 2,
                Routing::Duplicates => random.below(experts.min(3)),
                _ => random.below(experts),
            };
            let mut expert = i64::from(pick());
            let distinct = !matches!(self, Routing::Duplicates | Routing::OneHot);
            for _ in 0..20 {
                if distinct && chosen.contains(&expert) {
                    expert = pick().into();
                }
            }
            let none = match self {
                Routing::OneHot => choice > 0,
                Routing::Masked => random.below(10) == 0,
                Routing::Nothing => true,
                _ => distinct && chosen.contains(&expert),
            };
            chosen.push(if none { -1 } else { expert });
        }
        chosen
    }
}

/// One step's inputs of all ranks. Ranks use up to their limit of tokens, all of it where `full` says so.
pub fn inputs(config: &GroupConfig, routing: Routing, full: bool, random: &mut Random) -> Vec<Input> {
    let (top_k, hidden) = (config.top_k as usize, config.hidden as usize);
    let of_rank = |&limit: &u32| {
        let tokens = if full { limit } else { random.below(limit + 1) } as usize;
        let mut input = Input { rows: Vec::new(), choices: Vec::new(), weights: Vec::new() };
        for _ in 0..tokens {
            let small = random.below(12) == 0;
            for _ in 0..hidden {
                let bits = random.next() as u16;
                // Of either sign over eight powers of two; now and then too small for the quantiser to tell.
                let exponent = if small { 90 } else { 121 + (bits >> 7 & 7) };
                input.rows.push(Bf16::from_bits(bits & 0x807f | exponent << 7));
            }
            input.choices.extend(routing.choose(config.experts, top_k, random));
            // An expert has room for as many rows of a rank as that may have tokens.
            for at in input.choices.len() - top_k..input.choices.len() {
                let expert = input.choices[at];
                if input.choices[..at].iter().filter(|&&earlier| earlier == expert).count() >= limit as usize
                {
                    input.choices[at] = -1;
                }
            }
            input.weights.extend((0..top_k).map(|_| random.unit() as f32));
        }
        input
    };
    config.max_tokens.iter().map(of_rank).collect()
}
