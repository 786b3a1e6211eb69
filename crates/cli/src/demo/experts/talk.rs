//! What the demo's parent and its ranks say to each other, one JSON object a line.

use serde::{Deserialize, Serialize};

/// From the parent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tell {
    /// What the ranks prove to each other. It is the first line.
    Key { key: [u8; 32] },
    /// Make so many steps. All ranks are told the same.
    Steps { count: u32 },
    /// Leave.
    End,
}

/// From a rank.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// The rank runs, and will not outlive its parent.
    Started,
    /// It has met the others.
    Ready,
    /// Its steps are over.
    Done(Done),
    /// It has left its group.
    Bye {
        /// Regions of the group that it still maps; should be 0.
        regions: u64,
    },
}

/// What became of some steps at one rank.
#[derive(Serialize, Deserialize, Debug, Default, Clone)]
pub struct Done {
    /// Of each step.
    pub dispatch_ns: Vec<u64>,
    pub combine_ns: Vec<u64>,
    pub logical_bytes: u64,
    pub wire_bytes: u64,
    /// Rows that were compared: those that came, and the sums of what came back.
    pub rows: u64,
    /// Those that were not what they should be.
    pub wrong: u64,
    /// The ranks that are masked.
    pub masked: Vec<u32>,
    /// When one was masked in these steps, on the host's monotonic clock.
    pub masked_ns: Option<u64>,
    /// Steps that ended without the masked, and of the weight of their tokens the part that was lost.
    pub steps_without: u32,
    pub lost_share: f64,
}
