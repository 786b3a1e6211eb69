//! What all lanes of a port share.

use crossdock_transport::{DeviceName, GrantTable, Slab};

use crate::counters::VerbsCounters;
use crate::ibverbs::chain::SendChain;
use crate::ibverbs::context::Failed;
use crate::ibverbs::objects::MemoryRegion;
use crate::lane::Habits;

pub(crate) struct Domain {
    /// Of the device and its port, for errors.
    pub name: DeviceName,
    /// Registered memory; an id is a `LocalId`.
    pub regions: Slab<MemoryRegion>,
    /// For what they cover: the device checks keys, not grants.
    pub grants: GrantTable,
    /// Where requests are made, of one lane at a time.
    pub chain: SendChain,
    /// Where hellos are sent from, [`RECEIVE_BYTES`](crate::ibverbs::objects::RECEIVE_BYTES) for each lane.
    pub messages: MemoryRegion,
    pub habits: Habits,
    /// How long one request may be.
    pub request_bytes: u32,
    /// What the device said to the last post, if it did not take it.
    pub post_failed: Option<Failed>,
    /// A lane on which a post came short has room again: its owner is not to sleep before it has tried.
    pub room_made: bool,
    /// The shared receive queue holds what all lanes have brought into it.
    pub restocked: bool,
    /// How often the completion queue was found empty.
    pub emptied: u64,
    pub counters: VerbsCounters,
}
