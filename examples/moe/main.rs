//! A small mixture-of-experts model whose experts are spread over processes, on crossdock's public API alone.
//!
//! ```sh
//! cargo run --release -p crossdock-examples --example moe
//! cargo run --release -p crossdock-examples --example moe -- --mode throughput
//! cargo run --release -p crossdock-examples --example moe -- --kill 2
//! ```
//!
//! Each of four ranks is a process with tokens of its own and a quarter of each layer's experts. A layer, as DeepSeek's are:
//! the router chooses four of sixteen experts for each token; *dispatch* sends the tokens to them as FP8 with a scale for 128
//! channels; the experts (SwiGLU, in `f32`) compute; *combine* brings back the sum. One more expert is shared by all
//! tokens, and the sum is added to what the token was. What comes out of a layer goes into the next, step after step, so that
//! a wrong bit anywhere would spread.
//!
//! In the end everything is compared with the same model in a single process, **bit for bit**: rows and sums have a fixed
//! order, whatever arrives first. With `--kill` a rank dies between two steps. The others go on without its experts, and know
//! for each token how much of its weight is lost.
//!
//! Begin with [`Rank`], which has a layer's calls in both modes. `ranks.rs` starts the processes and lets them meet,
//! `model.rs` knows nothing of ranks, `one_process.rs` is what all is compared with, and `table.rs` what is printed.

mod model;
mod one_process;
mod ranks;
mod table;

use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use crossdock::experts::{
    Bf16, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs, Payload, Report, Rows, ScaleOrder,
    ScaleRule, ThroughputOutputs, Tokens,
};
use serde::{Deserialize, Serialize};

use model::{EXPERTS, HIDDEN, Layer, TOP_K, add, narrow, normed, widen};

/// What all ranks have to agree on. When they meet it is compared, and a difference is an error that names it.
fn group_config(job: &Job) -> GroupConfig {
    GroupConfig {
        max_tokens: vec![job.tokens; job.ranks as usize],
        experts: EXPERTS,
        top_k: TOP_K as u32,
        hidden: HIDDEN as u32,
        payload: Payload::Fp8,
        slots: 1,
        placement_version: 1,
    }
}

/// How a rank waits. Its first step may have to wait for others that compile their kernels; later a rank that is silent for
/// longer than the deadline is masked, and one whose process has ended is masked at once.
fn group_options() -> GroupOptions {
    GroupOptions {
        deadline: Duration::from_secs(60),
        warm_up: Duration::from_secs(60),
        ..GroupOptions::default()
    }
}

/// One rank of the model.
struct Rank {
    /// Its end of the group, from `Meeting::meet` in `ranks.rs`.
    group: Group,
    /// The router and the shared expert of every layer, and this rank's part of the others.
    layers: Vec<Layer>,
    /// Where rows arrive, kept from step to step. Memory is touched only where some do.
    by_expert: LatencyOutputs,
    by_token: ThroughputOutputs,
}

impl Rank {
    fn new(job: &Job, group: Group) -> Rank {
        let held = group.config().spread().of_rank(group.rank());
        Rank {
            layers: (0..job.layers).map(|layer| Layer::new(layer, held.clone())).collect(),
            by_expert: LatencyOutputs::new(&group, Payload::Fp8, ScaleOrder::ByRow),
            by_token: ThroughputOutputs::new(&group, Payload::Fp8),
            group,
        }
    }

    /// The latency mode, for decode: each expert's rows lie together. The token's rank weighs and sums what the experts made.
    fn latency(&mut self, layer: u32, hidden: &mut [Bf16]) -> Result<Told, EpError> {
        let layer = &self.layers[layer as usize];
        let input = normed(hidden);
        let (choices, weights) = layer.route(&input);
        let mut clock = Clock::start();

        let tokens = Tokens { rows: Rows::Fp8(&input, ScaleRule::Plain), choices: &choices, weights: None };
        let sent = self.group.slot(0).dispatch(&tokens)?;
        let sending = clock.lap();
        // The tokens are on their way, and this needs nobody else.
        let shared = layer.shared(&input);
        clock.lap();
        let mut step = sent.latency(&mut self.by_expert)?;
        let dispatch = sending + clock.lap();
        let dispatched_bytes = step.report().wire_bytes;

        for (at, expert) in layer.experts().iter().enumerate() {
            for (row, result) in step.results_mut(at).chunks_exact_mut(HIDDEN).enumerate() {
                let input = dequantised(self.by_expert.row(at, row), &self.by_expert.scales_of(at, row));
                result.copy_from_slice(&narrow(&expert.of(&input)));
            }
        }
        let experts = clock.lap();

        let mut routed = vec![Bf16::default(); hidden.len()];
        let report = step.combine().receive(&weights, &mut routed)?;
        let combine = clock.lap();

        hidden.copy_from_slice(&narrow(&add(&add(&widen(hidden), &shared), &widen(&routed))));
        let counts = self.by_expert.counts().to_vec();
        Ok(Told::new(hidden, counts, [dispatch, experts, combine], dispatched_bytes, report))
    }

    /// The throughput mode, for prefill: a token comes once, however many of its experts are here. This rank weighs and
    /// sums what they made of it; the token's rank adds up the ranks. (Row by row, an expert's weights are fetched again and
    /// again; `ThroughputOutputs::expand` has the rows by expert, for matrix units.)
    fn throughput(&mut self, layer: u32, hidden: &mut [Bf16]) -> Result<Told, EpError> {
        let layer = &self.layers[layer as usize];
        let input = normed(hidden);
        let (choices, weights) = layer.route(&input);
        let mut clock = Clock::start();

        let rows = Rows::Fp8(&input, ScaleRule::Plain);
        let tokens = Tokens { rows, choices: &choices, weights: Some(&weights) };
        let sent = self.group.slot(0).dispatch(&tokens)?;
        let sending = clock.lap();
        let shared = narrow(&layer.shared(&input));
        clock.lap();
        let mut step = sent.throughput(&mut self.by_token)?;
        let dispatch = sending + clock.lap();
        let dispatched_bytes = step.report().wire_bytes;

        let rows = &self.by_token;
        let scale_bytes = Payload::Fp8.scale_bytes(HIDDEN as u32) as usize;
        let values = rows.values().chunks_exact(HIDDEN).zip(rows.scales().chunks_exact(scale_bytes));
        let chosen = rows.experts().chunks_exact(TOP_K).zip(rows.weights().chunks_exact(TOP_K));
        let results = step.results_mut().chunks_exact_mut(HIDDEN);
        for (result, ((values, scales), (experts, weights))) in results.zip(values.zip(chosen)) {
            let input = dequantised(values, scales);
            let mut sum = vec![0.0; HIDDEN];
            // -1 stands for a choice that is another rank's.
            for (&expert, &weight) in experts.iter().zip(weights).filter(|(expert, _)| **expert >= 0) {
                model::add_weighted(&mut sum, &layer.experts()[expert as usize].of(&input), weight);
            }
            result.copy_from_slice(&narrow(&sum));
        }
        let experts = clock.lap();

        // What is to be added to the sum anyway goes along as its biases, and all is rounded once.
        let before = hidden.to_vec();
        let report = step.combine(None)?.receive(&[&before, &shared], None, hidden)?;
        let combine = clock.lap();

        Ok(Told::new(hidden, self.by_token.counts(1), [dispatch, experts, combine], dispatched_bytes, report))
    }
}

/// A row as its source had it, but for what FP8 has lost.
fn dequantised(values: &[u8], scales: &[u8]) -> Vec<f32> {
    let scales =
        scales.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    let blocks = values.chunks(crossdock::experts::BLOCK_CHANNELS as usize).zip(scales);
    let of_block = |(values, scale): (&[u8], f32)| -> Vec<f32> { model::from_e4m3(values, scale) };
    blocks.flat_map(of_block).collect()
}

type Problem = Box<dyn std::error::Error + Send + Sync>;

/// What is computed: the same for all ranks, and for the single process.
#[derive(Parser, Clone, Debug, Serialize, Deserialize)]
#[command(name = "moe", about = "A mixture of experts over several ranks, compared with a single process")]
struct Job {
    #[arg(long, value_enum, default_value_t = Mode::Latency)]
    mode: Mode,
    /// Processes that share the experts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=16))]
    ranks: u32,
    /// Tokens of each rank
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    tokens: u32,
    /// Layers of the model
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    layers: u32,
    /// How often the tokens go through all layers
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: u32,
    /// The ranks are threads of this process
    #[arg(long)]
    threads: bool,
    /// This rank dies when half of the steps are over
    #[arg(long)]
    kill: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Mode {
    Latency,
    Throughput,
}

impl Job {
    /// How many steps a rank takes part in.
    fn steps_of(&self, rank: u32) -> u32 {
        if self.kill == Some(rank) { self.steps / 2 } else { self.steps }
    }

    /// The ranks that are dead in a step.
    fn dead(&self, step: u32) -> Vec<u32> {
        self.kill.into_iter().filter(|&rank| step >= self.steps_of(rank)).collect()
    }
}

/// What a rank tells of a layer.
#[derive(Serialize, Deserialize)]
struct Told {
    /// `[tokens, hidden]`: the bits of what came out.
    hidden: Vec<u16>,
    /// By expert of this rank: tokens that came.
    counts: Vec<u32>,
    /// Dispatch, experts, combine.
    times: [Duration; 3],
    wire_bytes: u64,
    masked: Vec<u32>,
    /// By token: the weight that dead ranks did not answer to. Empty if none.
    lost: Vec<f32>,
}

impl Told {
    fn new(
        hidden: &[Bf16],
        counts: Vec<u32>,
        times: [Duration; 3],
        dispatched: u64,
        combined: Report,
    ) -> Told {
        let Report { wire_bytes, masked, lost, .. } = combined;
        let hidden = hidden.iter().map(|value| value.to_bits()).collect();
        Told { hidden, counts, times, wire_bytes: dispatched + wire_bytes, masked, lost }
    }
}

/// A rank's work from its first step to its last.
fn run(job: &Job, group: Group, mut tell: impl FnMut(Told) -> Result<(), Problem>) -> Result<Group, Problem> {
    let rank = group.rank();
    let mut hidden = model::tokens(rank, job.tokens);
    let mut of_model = Rank::new(job, group);
    for _ in 0..job.steps_of(rank) {
        for layer in 0..job.layers {
            tell(match job.mode {
                Mode::Latency => of_model.latency(layer, &mut hidden)?,
                Mode::Throughput => of_model.throughput(layer, &mut hidden)?,
            })?;
        }
    }
    Ok(of_model.group)
}

fn main() -> Result<(), Problem> {
    if ranks::is_rank() { ranks::work() } else { show(&Job::parse()) }
}

fn show(job: &Job) -> Result<(), Problem> {
    if job.kill.is_some_and(|rank| rank >= job.ranks || job.ranks < 2 || job.steps < 2) {
        return Err("--kill takes one of several ranks, and two steps: it dies between them".into());
    }
    let told = if job.threads { ranks::threads(job)? } else { ranks::processes(job)? };
    let lines = one_process::compare(job, &told);
    println!("{}", table::of(job, &lines));
    match lines.iter().flat_map(|line| &line.wrong).next() {
        Some(what) => Err(what.clone().into()),
        None => Ok(()),
    }
}

/// Times what comes after each other.
struct Clock(Instant);

impl Clock {
    fn start() -> Clock {
        Clock(Instant::now())
    }

    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One rank, when the tests of processes start this program once more.
    #[test]
    fn as_rank() -> Result<(), Problem> {
        if ranks::is_rank() { ranks::work() } else { Ok(()) }
    }

    fn shown(arguments: &str) -> Result<(), Problem> {
        show(&Job::try_parse_from(["moe"].into_iter().chain(arguments.split_whitespace()))?)
    }

    #[test]
    fn processes_match_a_single_one() -> Result<(), Problem> {
        shown("--tokens 7")?;
        shown("--tokens 9 --mode throughput")
    }

    #[test]
    fn any_number_of_ranks_matches_too() -> Result<(), Problem> {
        for mode in ["latency", "throughput"] {
            for ranks in [1, 3, 5] {
                shown(&format!("--threads --tokens 5 --steps 3 --ranks {ranks} --mode {mode}"))?;
            }
        }
        Ok(())
    }

    #[test]
    fn the_others_go_on_when_a_rank_dies() -> Result<(), Problem> {
        shown("--tokens 6 --kill 2")?;
        shown("--tokens 6 --kill 0 --mode throughput")?;
        shown("--tokens 6 --kill 3 --threads")
    }

    /// A check that nothing can fail shows nothing.
    #[test]
    fn a_wrong_bit_is_found() -> Result<(), Problem> {
        let job = Job::try_parse_from(["moe", "--threads", "--tokens", "3", "--steps", "1"])?;
        let mut told = ranks::threads(&job)?;
        let is_whole =
            |told: &[Vec<Told>]| one_process::compare(&job, told).iter().all(|line| line.wrong.is_none());
        assert!(is_whole(&told));
        told[2][1].hidden[700] ^= 1;
        assert!(!is_whole(&told));
        told[2][1].hidden[700] ^= 1;
        told[1][0].counts[0] += 1;
        assert!(!is_whole(&told));
        Ok(())
    }

    #[test]
    fn a_rank_that_cannot_die_is_refused() {
        assert!(shown("--kill 4").is_err());
        assert!(shown("--kill 1 --steps 1").is_err());
    }
}
