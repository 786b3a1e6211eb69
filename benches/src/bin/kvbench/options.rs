//! What the command line says.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use crossdock_benches::GpuChoice;
use serde::{Deserialize, Serialize};

/// Measures how fast scattered KV pages move between two processes.
///
/// Without --listen and --connect it starts its own peer process. Both pools are permuted at random for every pass;
/// rooms are opened before the clock starts, which then runs from the first send until the last room is known here to
/// be delivered. The best bare means for the medium (the floor) and a plain scattered memcpy take turns with it on the
/// same page lists; with a GPU, the floor is the port's kernel alone, and memcpy one copy of as many bytes in one stretch. With --pages 1 --in-flight 1, the time of one
/// page is measured instead of a rate, from submitting it until it is seen to have landed: pushed, as half of the way
/// there and back; pulled, here.
#[derive(Clone, Debug, Parser)]
#[command(name = "kvbench", version)]
pub struct Options {
    /// The transport
    #[arg(long, value_enum, default_value_t = PortName::Shm)]
    pub port: PortName,
    /// What the pools are: shared can be mapped by the peer, private cannot; cuda is memory of the GPU that moves it
    #[arg(long, value_enum, default_value_t = MemoryName::Shared)]
    pub memory: MemoryName,
    /// Who moves: the side that has the pages (write, a push) or the side that wants them (read, a pull)
    #[arg(long, value_enum, default_value_t = OpName::Write)]
    pub op: OpName,
    /// The length of a page
    #[arg(long, default_value_t = 65_536, value_parser = clap::value_parser!(u64).range(1..))]
    pub page_bytes: u64,
    /// Pages of a room [default: as many as make up the payload, at most 131072]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub pages: Option<u32>,
    /// Rooms that move at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub in_flight: u32,
    /// How long the timed passes of a repeat take at least; a pass is one payload
    #[arg(long, default_value_t = 0.0)]
    pub seconds: f64,
    /// How often everything is measured; medians are reported
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// Check every word at the destination, outside the timed part. A trace is verified only if all of it was delivered;
    /// whatever was not ends the program with an error, after its report
    #[arg(long)]
    pub verify: bool,
    /// Threads that copy, the progress thread among them (shm)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub copy_threads: u32,
    /// The cache of a model instead of plain pages, as one rank keeps it: deepseek-r1, llama-3-70b, or a JSON file with
    /// layers and token_bytes, or with layers, kv_heads and head_bytes [default with --trace: deepseek-r1]
    #[arg(long)]
    pub model: Option<String>,
    /// Tokens of a page of a model
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub page_tokens: u32,
    /// Tensor parallelism of the prefill side: ranks that share the heads of a model that has such
    #[arg(long, default_value_t = 1)]
    pub prefill_tp: u32,
    /// Tensor parallelism of the decode side; as many as of the prefill side
    #[arg(long, default_value_t = 1)]
    pub decode_tp: u32,
    /// Requests to replay: each comes at its time, waits for pages, shares those of its prefix with others, and keeps
    /// them while it is decoded. Rates are measured before, on rooms as long as the first ones of them
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// By what the lengths and times of a trace are multiplied [default: so that its first requests come in half a
    /// minute and need 16 GB]
    #[arg(long, requires = "trace")]
    pub scale: Option<f64>,
    /// By what its times are multiplied, where that is something else
    #[arg(long, requires = "scale")]
    pub time_scale: Option<f64>,
    /// How long a token of the output is decoded, in ms, before times shrink
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    pub token_ms: u64,
    /// What a request of a trace may take from its arrival until it is held, to count as goodput, in ms
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub target_ms: u64,
    /// Draws a picture into this file: the replay of a trace, and the rates of other page sizes, measured for it
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// Who calls the progress loop
    #[arg(long, value_enum, default_value_t = ProgressName::Thread)]
    pub progress: ProgressName,
    /// Data connections between the two nodes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub lanes: u8,
    /// The congestion control of tcp connections [default: the host's, and reno within one host]
    #[arg(long)]
    pub congestion: Option<String>,
    /// The RDMA devices of both sides (verbs): those of the side that measures, a comma, those of its peer; rails joined by
    /// +, as in rxe0+rxe2,rxe1 [default: the first device that is found]
    #[arg(long, value_delimiter = ',', num_args = 1..=2)]
    pub devices: Vec<String>,
    /// The GPU of both processes (cuda), by its place among those of the process; or software, which is a driver without a GPU:
    /// everything runs as on one, and no figure says anything of one [default: 0]
    #[arg(long)]
    pub gpu: Option<GpuChoice>,
    /// The length of each pool
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
    pub pool_mib: u64,
    /// What a pass moves [default: 256, at most half of the pool]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub payload_mib: Option<u64>,
    /// Measure ours and the floor once more, in turn, beside so many processes that do nothing but use a core
    #[arg(long, default_value_t = 0)]
    pub hog: u32,
    /// Wait here for kvbench on another host, and be its peer
    #[arg(long, conflicts_with = "connect")]
    pub listen: Option<SocketAddr>,
    /// Use the kvbench that listens there as the peer
    #[arg(long)]
    pub connect: Option<SocketAddr>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    /// The process that has started this one, to serve one benchmark or to use a core, and to end with it
    #[arg(long, hide = true)]
    pub parent: Option<i32>,
    /// Do nothing but use a core
    #[arg(long, hide = true)]
    pub burn: bool,
}

impl Options {
    /// Whether the time of single pages is asked for, and not a rate.
    pub fn asks_for_latency(&self) -> bool {
        self.pages == Some(1) && self.in_flight == 1 && self.trace.is_none()
    }
}

/// What a value is called on the command line.
pub fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortName {
    Shm,
    Tcp,
    Verbs,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryName {
    Shared,
    Private,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OpName {
    Write,
    Read,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProgressName {
    Thread,
    Caller,
}
