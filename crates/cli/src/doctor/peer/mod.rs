//! What goes between two machines: `crossdock doctor --listen` on one, `crossdock doctor --peer` on the other. Each rail of
//! one is tried with each of the other that it can reach: bytes that are compared, bandwidth, latency.
//!
//! The two talk in lines of JSON over TCP, without authentication, and only as long as it takes.

mod answer;
mod ask;
mod rail;
mod talk;

use serde::Serialize;

pub use answer::answer;
pub use ask::ask;

/// What was found between this machine and a peer.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    /// Where it was asked.
    pub address: String,
    /// Why nothing could be tried.
    pub error: Option<String>,
    pub pairs: Vec<Pair>,
    /// Rails of this machine that reach none of the peer's, and why.
    pub alone: Vec<Alone>,
}

/// One rail of each.
#[derive(Clone, Debug, Serialize)]
pub struct Pair {
    pub kind: String,
    pub ours: String,
    pub theirs: String,
    /// What went wrong, and what to do.
    pub error: Option<Trouble>,
    pub measured: Option<Measured>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Trouble {
    pub says: String,
    pub advice: String,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// Bytes that arrived as they were sent.
    pub verified_bytes: u64,
    pub gb_per_s: f64,
    /// Half a round trip of 8 bytes.
    pub latency_us_p50: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct Alone {
    pub rail: String,
    pub why: String,
}

/// How much is written and compared.
const VERIFIED_BYTES: u64 = 4 << 20;
/// How long bandwidth and latency are each measured.
const MEASURED_MS: u64 = 300;
