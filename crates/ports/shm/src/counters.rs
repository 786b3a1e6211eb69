//! What a port has done so far.

use crossdock_host::HostCounters;

use crate::medium::Moved;

/// Counts since the port was opened. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShmCounters {
    /// Moved into peers' memory.
    pub bytes_written: u64,
    /// Moved out of peers' memory.
    pub bytes_read: u64,
    /// Handed to peers.
    pub immediates_sent: u64,
    /// Reported to the caller.
    pub immediates_received: u64,
    /// Posts that came back short because the call had moved its share of bytes.
    pub short_by_bytes: u64,
    /// Posts that came back short because the peer had not taken enough immediates.
    pub short_by_immediates: u64,
    /// Posts that came back short because too many ends of ops were not polled yet.
    pub short_by_dones: u64,
    /// Peers woken.
    pub wakes_sent: u64,
    /// Times this port was woken by its doorbell: by a peer, or by the end of a mapping.
    pub wakes_received: u64,
    /// Regions that peers have announced, on each lane.
    pub regions_announced: u64,
    /// Connections refused: of other users, without a lane to belong to, or beyond the limit.
    pub connections_refused: u64,
}

impl ShmCounters {
    /// What the port and its medium have counted. No move goes on behind the port's back, and none of them is too many.
    pub(crate) fn new(port: HostCounters, moved: Moved) -> Self {
        Self {
            bytes_written: moved.bytes_written,
            bytes_read: moved.bytes_read,
            immediates_sent: port.immediates_sent,
            immediates_received: port.immediates_received,
            short_by_bytes: port.short_by_bytes,
            short_by_immediates: port.short_by_immediates,
            short_by_dones: port.short_by_dones,
            wakes_sent: port.wakes_sent,
            wakes_received: port.wakes_received,
            regions_announced: port.regions_announced,
            connections_refused: port.connections_refused,
        }
    }
}
