//! What the command line says.

use clap::{Parser, ValueEnum};
use serde::Serialize;

/// Measures how fast tokens reach their experts and come back, between processes of this host: through memory that they
/// share, or as between hosts, through a port.
///
/// It starts a process for each other rank and pins each to a processor. Every operation begins when all ranks have met;
/// its time is the longest of any rank. The floor takes turns with it: the same work on the same memory with nobody to
/// wait for, in shared memory whatever the port is, from the first start to the last end. What the experts compute is written before the clock starts. In
/// throughput mode rows are fp8 already.
#[derive(Clone, Debug, Parser)]
#[command(name = "epbench", version)]
pub struct Options {
    /// The transport
    #[arg(long, value_enum, default_value_t = PortName::Shm)]
    pub port: PortName,
    /// The RDMA devices of the ranks (verbs), who take them by turns: a comma between those of two ranks, rails joined by +
    /// [default: the first device that is found]
    #[arg(long, value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Where tokens and experts are
    #[arg(long, value_enum, default_value_t = BackendName::Host)]
    pub backend: BackendName,
    /// Rows by source rank and token (for prefill), or rows by expert, quantised on the way (for decode)
    #[arg(long, value_enum, default_value_t = Mode::Latency)]
    pub mode: Mode,
    /// Processes that hold experts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub ranks: u32,
    /// Tokens of each rank
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub tokens: u32,
    /// Channels of a token
    #[arg(long, default_value_t = 7168)]
    pub hidden: u32,
    /// Experts of all ranks together
    #[arg(long, default_value_t = 256)]
    pub experts: u32,
    /// Experts that a token chooses
    #[arg(long, default_value_t = 8)]
    pub topk: u32,
    /// The form in which rows are dispatched; they are combined in bf16
    #[arg(long, value_enum, default_value_t = Dtype::Fp8)]
    pub dtype: Dtype,
    /// How tokens choose: all experts alike, by Zipf's law, nine of ten among an eighth of them, one expert for all, or
    /// alike with a tenth of the choices left out
    #[arg(long, value_enum, default_value_t = Routing::Uniform)]
    pub routing: Routing,
    /// Micro-batches, used in turn
    #[arg(long, default_value_t = 1)]
    pub slots: u32,
    /// How often everything is measured, after at least 20 times that do not count
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub iterations: u32,
    /// Stop after so many seconds, but not before ten times that count (or --iterations, if fewer)
    #[arg(long, default_value_t = 30.0)]
    pub seconds: f64,
    /// How the scales of packed rows lie in latency mode: each row's together, or those of neighbouring rows
    #[arg(long, value_enum, default_value_t = ScaleName::Col)]
    pub scales: ScaleName,
    /// Compare what arrives with a serial reference, bit for bit, before and after the timed part
    #[arg(long)]
    pub verify: bool,
    /// Measure only when told to on standard input, so that another program can be measured in between: "ours MS" or
    /// "floor MS", for so many milliseconds, is answered by a line of JSON with the times of each iteration
    #[arg(long, conflicts_with = "round_trips")]
    pub turns: bool,
    /// Also time whole steps of the latency mode, the same with each rank alone in a group, and round trips of a word
    /// between two ranks; and again where whoever waits sleeps at once, with the times that it slept
    #[arg(long)]
    pub round_trips: bool,
    /// Only print what memory a rank of 8, 32 and 72 takes, beside what DeepEP's low-latency mode does
    #[arg(long)]
    pub sizes: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    /// Where the tokens' values and choices come from
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The process that has started this one, to be one of its ranks and to end with it
    #[arg(long, hide = true, requires = "child")]
    pub parent: Option<i32>,
    /// Which rank
    #[arg(long, hide = true, requires = "parent")]
    pub child: Option<u32>,
    /// Descriptors of the parent's memory
    #[arg(long, hide = true, value_delimiter = ',')]
    pub descriptors: Vec<i32>,
}

/// What a value is called on the command line.
pub fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PortName {
    Shm,
    Tcp,
    Verbs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendName {
    Host,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Throughput,
    Latency,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    Bf16,
    Fp8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Routing {
    Uniform,
    Zipf,
    KHot,
    OneHot,
    Masked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleName {
    Row,
    Col,
}
