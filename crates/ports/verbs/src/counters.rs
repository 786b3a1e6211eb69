//! What a port has done so far.

/// Counters of a [`VerbsPort`](crate::VerbsPort); they only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerbsCounters {
    /// Work requests handed to the device.
    pub requests: u64,
    /// Completions taken from the device.
    pub completions: u64,
    /// Immediates that arrived.
    pub immediates: u64,
    /// Messages that gave credits back to peers.
    pub credit_messages: u64,
    /// Questions whether a peer's device still answers.
    pub keepalives: u64,
    /// Queue pairs made.
    pub queue_pairs_created: u64,
    /// Queue pairs destroyed.
    pub queue_pairs_destroyed: u64,
    /// Lanes that began to connect anew because the peer was not there yet.
    pub connect_retries: u64,
    /// Lanes that the device gave up.
    pub device_errors: u64,
}
