//! What the semantics say, for one process that sees every rank's inputs: no arena, no thread, no vector instruction.

use crossdock_ep::{Bf16, E4m3, GroupConfig, Ue8m0};

/// One rank's tokens.
#[derive(Clone, Debug)]
pub struct Input {
    pub rows: Vec<Bf16>,
    pub choices: Vec<i64>,
    pub weights: Vec<f32>,
}

/// How rows travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Bf16,
    Fp8,
    Fp8PowerOfTwo,
    Fp8Ue8m0,
}

/// A row that arrives: whose it is, and its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub source: u32,
    pub token: u32,
    pub values: Vec<u8>,
    pub scales: Vec<u8>,
}

/// The rank of an expert and its place there: the first ranks hold one more where the experts do not divide.
pub fn place(config: &GroupConfig, expert: i64) -> (u32, usize) {
    let (ranks, mut left) = (config.ranks(), expert as u32);
    for rank in 0..ranks {
        let held = config.experts / ranks + u32::from(rank < config.experts % ranks);
        if left < held {
            return (rank, left as usize);
        }
        left -= held;
    }
    unreachable!("expert {expert} of {}", config.experts)
}

pub fn held(config: &GroupConfig, rank: u32) -> usize {
    (0..config.experts).filter(|&expert| place(config, expert.into()).0 == rank).count()
}

/// A row in the form in which it travels.
pub fn make(form: Form, row: &[Bf16]) -> (Vec<u8>, Vec<u8>) {
    if form == Form::Bf16 {
        return (row.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect(), Vec::new());
    }
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    for block in row.chunks(128) {
        let most = block.iter().map(|value| value.to_f32().abs()).fold(1e-4_f32, f32::max);
        let inverse = most * (1.0 / 448.0);
        let (scale, inverse) = match form {
            Form::Fp8 => (448.0 / most, inverse),
            _ => {
                let power = (-126..128).map(|e| 2.0_f64.powi(e)).find(|&power| power >= f64::from(inverse));
                let power = power.unwrap() as f32;
                (1.0 / power, power)
            }
        };
        values.extend(block.iter().map(|value| E4m3::from_f32(value.to_f32() * scale).to_bits()));
        match form {
            Form::Fp8Ue8m0 => scales.push(Ue8m0::at_least(inverse).to_bits()),
            _ => scales.extend(inverse.to_le_bytes()),
        }
    }
    if form == Form::Fp8Ue8m0 {
        scales.resize(scales.len().next_multiple_of(4), 0);
    }
    (values, scales)
}

fn row_of(config: &GroupConfig, inputs: &[Input], form: Form, source: u32, token: usize) -> Row {
    let hidden = config.hidden as usize;
    let (values, scales) = make(form, &inputs[source as usize].rows[token * hidden..][..hidden]);
    Row { source, token: token as u32, values, scales }
}

/// What each local expert of a rank gets in the latency mode: one row a choice.
pub fn by_expert(
    config: &GroupConfig,
    inputs: &[Input],
    form: Form,
    rank: u32,
    alive: &[bool],
) -> Vec<Vec<Row>> {
    let mut lists = vec![Vec::new(); held(config, rank)];
    for (source, input) in inputs.iter().enumerate().filter(|(source, _)| alive[*source]) {
        for (at, &expert) in input.choices.iter().enumerate().filter(|(_, expert)| **expert >= 0) {
            let (to, local) = place(config, expert);
            if to == rank {
                lists[local].push(row_of(config, inputs, form, source as u32, at / config.top_k as usize));
            }
        }
    }
    lists
}

/// What a rank gets in the throughput mode: one row a token, with its experts here and their weights.
pub fn by_token(
    config: &GroupConfig,
    inputs: &[Input],
    form: Form,
    rank: u32,
    alive: &[bool],
) -> Vec<(Row, Vec<i64>, Vec<f32>)> {
    let mut rows = Vec::new();
    for (source, input) in inputs.iter().enumerate().filter(|(source, _)| alive[*source]) {
        for (token, choices) in input.choices.chunks(config.top_k as usize).enumerate() {
            let here = |&expert: &i64| expert >= 0 && place(config, expert).0 == rank;
            if !choices.iter().any(here) {
                continue;
            }
            let local = |expert: &i64| if here(expert) { place(config, *expert).1 as i64 } else { -1 };
            let of_token = &input.weights[token * config.top_k as usize..];
            let weight = |(expert, weight): (&i64, &f32)| if here(expert) { *weight } else { 0.0 };
            rows.push((
                row_of(config, inputs, form, source as u32, token),
                choices.iter().map(local).collect(),
                choices.iter().zip(of_token).map(weight).collect(),
            ));
        }
    }
    rows
}

/// What the experts of the latency mode are taken to compute: any function of who asks whom about what.
pub fn result(expert: u32, source: u32, token: u32, choice_of_expert: u32, channel: usize) -> Bf16 {
    let mix = (u64::from(expert) << 40)
        ^ (u64::from(source) << 24)
        ^ (u64::from(token) << 8)
        ^ u64::from(choice_of_expert);
    let mut z = mix.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(channel as u64);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^= z >> 27;
    // Either sign, eight powers of two.
    Bf16::from_bits((z as u16 & 0x807f) | ((120 + (z >> 20 & 7) as u16) << 7))
}

/// The weighted sum of the latency mode, at the token's rank.
pub fn weighted(config: &GroupConfig, inputs: &[Input], source: u32, alive: &[bool]) -> Vec<Bf16> {
    let (top_k, hidden) = (config.top_k as usize, config.hidden as usize);
    let input = &inputs[source as usize];
    let mut out = Vec::new();
    for (token, choices) in input.choices.chunks(top_k).enumerate() {
        for channel in 0..hidden {
            let mut sum = 0.0_f32;
            for (choice, &expert) in choices.iter().enumerate() {
                if expert < 0 || !alive[place(config, expert).0 as usize] {
                    continue;
                }
                let same = choices[..choice].iter().filter(|&&earlier| earlier == expert).count() as u32;
                let value = result(expert as u32, source, token as u32, same, channel).to_f32();
                sum = value.mul_add(input.weights[token * top_k + choice], sum);
            }
            out.push(Bf16::from_f32(sum));
        }
    }
    out
}

/// The sum of the throughput mode, at the token's rank, where rank `r`'s result is `result(r, …)`.
pub fn plain(
    config: &GroupConfig,
    inputs: &[Input],
    source: u32,
    biases: &[&[Bf16]],
    alive: &[bool],
) -> Vec<Bf16> {
    let (top_k, hidden) = (config.top_k as usize, config.hidden as usize);
    let mut out = Vec::new();
    for (token, choices) in inputs[source as usize].choices.chunks(top_k).enumerate() {
        for channel in 0..hidden {
            let mut sum = biases.iter().fold(0.0, |sum, bias| sum + bias[token * hidden + channel].to_f32());
            for rank in 0..config.ranks() {
                let goes = choices.iter().any(|&expert| expert >= 0 && place(config, expert).0 == rank);
                if goes && alive[rank as usize] {
                    sum += result(rank, source, token as u32, 0, channel).to_f32();
                }
            }
            out.push(Bf16::from_f32(sum));
        }
    }
    out
}
