//! Why a benchmark did not finish.

use std::io;
use std::process::ExitStatus;

use crossdock_ep::{EpError, GroupError, Violations};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} is not built yet; this version measures --backend host")]
    NotBuilt { what: &'static str },
    #[error("the group is not possible: {0}")]
    Group(#[from] Violations),
    #[error("a token of {experts} experts cannot choose {top_k} different ones: use a smaller --topk")]
    TooManyChoices { experts: u32, top_k: u32 },
    #[error(
        "--round-trips is for --port shm, --mode latency and two ranks or more, with a processor for each"
    )]
    NoRoundTrips,
    #[error("--devices names RDMA devices: use it with --port verbs")]
    NoDevices,
    #[error("--port {port}: {error}")]
    NoMeeting { port: String, error: crossdock::Error },
    #[error("the ranks did not meet: {0}")]
    Meet(#[from] crossdock_ep::MeetError),
    #[error(
        "standard input says '{line}': it has to be 'ours' or 'floor' and up to a minute in milliseconds"
    )]
    Turn { line: String },
    #[error("--seconds must be a time of up to an hour")]
    Seconds,
    #[error(
        "about {needed_mb} MB are needed and {available_mb} MB are available: use smaller --tokens, --ranks or --slots"
    )]
    TooLarge { needed_mb: u64, available_mb: u64 },
    #[error(transparent)]
    NoGroup(#[from] GroupError),
    #[error("{what}: {error}")]
    Ep { what: &'static str, error: EpError },
    #[error("ranks {ranks:?} did not answer in time, and the step went on without them")]
    Masked { ranks: Vec<u32> },
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
    #[error("rank {rank} has ended before the benchmark did: {status}")]
    RankGone { rank: u32, status: ExitStatus },
    #[error("the process that has started this one is gone")]
    ParentGone,
    #[error("{rows} rows differ from the serial reference")]
    WrongRows { rows: u64 },
}

impl Error {
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { what, error }
    }

    pub fn ep(what: &'static str) -> impl FnOnce(EpError) -> Self {
        move |error| Self::Ep { what, error }
    }
}
