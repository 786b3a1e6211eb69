//! What is said of hand-overs in C: structures and constants.

use bytemuck::Zeroable;
use crossdock::{End, Received, Stage, Who};

use crate::peer::crossdock_peer;
use crate::pool::crossdock_page_list;
use crate::sized;

/// One hand-over, seen from one side. 0 is none.
pub type crossdock_room = u64;

/// All bytes are in the decode side's pages, and both sides may rely on it.
pub const CROSSDOCK_DELIVERED: u32 = 1;
/// A user cancelled it.
pub const CROSSDOCK_CANCELLED: u32 = 2;
/// A deadline passed.
pub const CROSSDOCK_EXPIRED: u32 = 3;
/// The session with the peer ended.
pub const CROSSDOCK_PEER_LOST: u32 = 4;
/// The room was never begun.
pub const CROSSDOCK_ROOM_REFUSED: u32 = 5;
/// A rail, a port or the bytes failed.
pub const CROSSDOCK_FAILED: u32 = 6;

/// Who decided how a room ended: this side.
pub const CROSSDOCK_BY_HERE: u32 = 1;
/// The other side did.
pub const CROSSDOCK_BY_PEER: u32 = 2;

/// How far a room had come: it waited for a session with the peer.
pub const CROSSDOCK_STAGE_SESSION: u32 = 1;
/// It waited for the other side of the room.
pub const CROSSDOCK_STAGE_GRANT: u32 = 2;
/// Bytes were moving.
pub const CROSSDOCK_STAGE_TRANSFER: u32 = 3;
/// All bytes were sent.
pub const CROSSDOCK_STAGE_CONFIRM: u32 = 4;
/// All bytes have landed.
pub const CROSSDOCK_STAGE_VERIFY: u32 = 5;

/// A rank of the prefill side. It never grows.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_source {
    /// The node.
    pub peer: crossdock_peer,
    /// Its rank.
    pub rank: u32,
    /// `CROSSDOCK_ALL_PARTS` or `CROSSDOCK_SHARED_PARTS`.
    pub parts: u32,
}

/// What the decode side asks for.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_receive_options {
    /// `sizeof(crossdock_receive_options)`.
    pub size: usize,
    /// From whom. Together they bring each byte of the layers once.
    pub sources: *const crossdock_source,
    /// How many they are.
    pub source_count: usize,
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// Tokens of a prefix that is here already and is not to be sent.
    pub skip_tokens: u32,
    /// The first layer that the sources bring, where that is not all that this node keeps.
    pub first_layer: u32,
    /// How many they bring; 0 for all that this node keeps.
    pub layers: u32,
    /// 0.
    pub reserved: u32,
    /// For each pool of the node's layout, pages for what moves; the first page holds the first token that does.
    pub pages: *const crossdock_page_list,
    /// How many lists; one for each pool of the layout.
    pub page_lists: usize,
    /// From this call; 0 for 30 seconds.
    pub deadline_ms: u64,
    /// Told with the room's events.
    pub user_data: u64,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_receive_options {
    const FIRST_BYTES: usize = 88;
}

/// What the prefill side offers.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_send_options {
    /// `sizeof(crossdock_send_options)`.
    pub size: usize,
    /// The ranks of the decode side that take their shares; NULL for rank 0 alone.
    pub ranks: *const u32,
    /// How many they are.
    pub rank_count: usize,
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// For each pool of the node's layout, the pages, from the first token on.
    pub pages: *const crossdock_page_list,
    /// How many lists; one for each pool of the layout.
    pub page_lists: usize,
    /// Of a room that is served: handed to the reader with the bytes. NULL for nothing.
    pub aux: *const u8,
    /// How long it is.
    pub aux_bytes: usize,
    /// From this call; 0 for 30 seconds.
    pub deadline_ms: u64,
    /// Told with the room's events.
    pub user_data: u64,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_send_options {
    const FIRST_BYTES: usize = 88;
}

/// How a room ended on this side.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_end {
    /// `sizeof(crossdock_end)`, set by the caller.
    pub size: usize,
    /// One of `CROSSDOCK_DELIVERED` to `CROSSDOCK_FAILED`.
    pub outcome: u32,
    /// `CROSSDOCK_BY_HERE` or `CROSSDOCK_BY_PEER`; 0 where nobody decided.
    pub by: u32,
    /// One of `CROSSDOCK_STAGE_…`, where the outcome has one, else 0.
    pub stage: u32,
    /// 1 if the same request may succeed in another room, else 0.
    pub is_retryable: u32,
    /// How long `crossdock_room_aux` is.
    pub aux_bytes: u64,
    /// What the caller gave the room.
    pub user_data: u64,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_end {
    const FIRST_BYTES: usize = 40;
}

impl crossdock_end {
    pub(super) fn of(told: &Received, user_data: u64) -> Self {
        let end = &told.ended.end;
        let (outcome, by, stage) = match end {
            End::Delivered => (CROSSDOCK_DELIVERED, 0, 0),
            End::Cancelled { by } => (CROSSDOCK_CANCELLED, who(*by), 0),
            End::Expired { by, stage } => (CROSSDOCK_EXPIRED, who(*by), stage_number(*stage)),
            End::PeerLost { .. } => (CROSSDOCK_PEER_LOST, 0, 0),
            End::Refused { by, .. } => (CROSSDOCK_ROOM_REFUSED, who(*by), 0),
            End::Failed { by, stage, .. } => (CROSSDOCK_FAILED, who(*by), stage_number(*stage)),
            _ => (CROSSDOCK_FAILED, 0, 0),
        };
        Self {
            size: 0,
            outcome,
            by,
            stage,
            is_retryable: end.is_retryable().into(),
            aux_bytes: told.aux.len() as u64,
            user_data,
        }
    }
}

fn who(who: Who) -> u32 {
    match who {
        Who::Here => CROSSDOCK_BY_HERE,
        Who::Peer => CROSSDOCK_BY_PEER,
    }
}

fn stage_number(stage: Stage) -> u32 {
    match stage {
        Stage::Session => CROSSDOCK_STAGE_SESSION,
        Stage::Grant => CROSSDOCK_STAGE_GRANT,
        Stage::Transfer => CROSSDOCK_STAGE_TRANSFER,
        Stage::Confirm => CROSSDOCK_STAGE_CONFIRM,
        Stage::Verify => CROSSDOCK_STAGE_VERIFY,
    }
}
