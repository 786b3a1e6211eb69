//! What the lanes of a port share: the regions, who may touch them, and the counters.

use crossdock_memory::Memory;
use crossdock_transport::{GrantTable, Slab};

pub(crate) struct Domain {
    /// Registered memory; an id is a `LocalId`.
    pub regions: Slab<Memory>,
    pub grants: GrantTable,
    pub counters: Counters,
    pub send_queue_bytes: u64,
    /// A lane whose last post came short has room again, and its owner may not know: nothing else may have happened.
    pub room_made: bool,
}

/// What a port has done since it was opened. The numbers only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that the kernel has taken, heads included.
    pub bytes_sent: u64,
    /// Bytes that have come in on lanes, heads included.
    pub bytes_received: u64,
    /// Calls of `sendmsg`.
    pub send_calls: u64,
    /// Calls of `readv` and `recv` on lanes.
    pub receive_calls: u64,
    /// Writes whose grant had been revoked when they began to arrive, or was revoked while they did. Their bytes,
    /// or the rest of them, were discarded.
    pub stale_frames: u64,
    /// The bytes of such writes that did not land.
    pub stale_bytes: u64,
    /// Connections that were refused: too slow, too many, or not for a lane of this port.
    pub connections_refused: u64,
}

impl Counters {
    pub(crate) fn count_stale(&mut self, bytes: u64) {
        self.stale_frames += 1;
        // The number comes from a peer, who may make it as large as it likes.
        self.stale_bytes = self.stale_bytes.saturating_add(bytes);
    }
}
