//! What the demo's parent and its workers say to each other, one JSON object a line.

use crossdock_replay::{Arrival, DockStats, Handover};
use serde::{Deserialize, Serialize};

/// From the parent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tell {
    /// What the workers of a scene prove to each other. It is the first line, and is told here because everybody can
    /// see a process's arguments.
    Key { key: [u8; 32] },
    /// Hand this request over. It has arrived on the host's monotonic clock.
    Go { room: u64, arrival: Arrival },
    /// End what is open, then leave.
    End,
}

/// From a worker.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// The worker runs, and will not outlive its parent even if it is stopped from here on.
    Started,
    /// The worker is registered, and has found its peer if it looks for one.
    Ready,
    /// A room has ended on this side.
    Ended(Ended),
    /// What the worker still holds at its end.
    Bye(Bye),
}

/// How a room ended on one side.
#[derive(Serialize, Deserialize, Debug)]
pub struct Ended {
    pub room: u64,
    pub delivered: bool,
    /// In words, with peer and reason.
    pub how: String,
    /// What moved.
    pub pages: u64,
    pub bytes: u64,
    /// When it waited, was computed and moved, on the host's monotonic clock; told by the decode side of a delivery.
    pub handover: Handover,
    /// When the end was told, counted from when the worker took the request up: from where its deadline counts.
    pub after_ms: u64,
    /// Whether every byte was what it should be.
    pub right: bool,
}

/// What the prefill side sends beside the pages.
#[derive(Serialize, Deserialize, Default)]
pub struct Computed {
    pub admitted_ns: u64,
    pub ready_ns: u64,
    pub held_tokens: u32,
}

/// What a worker holds when all of its rooms have ended.
#[derive(Serialize, Deserialize, Debug, Default)]
pub struct Bye {
    /// Pages that nobody accounts for; should be 0.
    pub pages: u64,
    /// Rooms and grants that are neither over nor held up by a quarantine; should be 0.
    pub rooms: u64,
    pub grants: u64,
    /// Pages that a peer which is stopped or cut off can still write, or read, and who that is. They come home when
    /// it continues or dies.
    pub quarantined: u64,
    pub held_by: String,
    /// Immediates that came too late to be counted.
    pub stale: u64,
    /// What its pool has seen.
    pub dock: DockStats,
}
