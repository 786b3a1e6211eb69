//! What a port has done so far.

/// Counts since the port was opened. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounters {
    /// Handed to peers.
    pub immediates_sent: u64,
    /// Reported to the caller.
    pub immediates_received: u64,
    /// Posts that came back short because the medium took no more in this call.
    pub short_by_bytes: u64,
    /// Posts that came back short because the peer had not taken enough immediates.
    pub short_by_immediates: u64,
    /// Posts that came back short because too many ends of ops were not polled yet.
    pub short_by_dones: u64,
    /// Posts that came back short because too many moves of the lane were on their way.
    pub short_by_moves: u64,
    /// Peers woken.
    pub wakes_sent: u64,
    /// Times this port was woken by its doorbell: by a peer, by the end of a mapping, or by the medium.
    pub wakes_received: u64,
    /// Regions that peers have announced, on each lane.
    pub regions_announced: u64,
    /// Connections refused: of other users, without a lane to belong to, or beyond the limit.
    pub connections_refused: u64,
}
