//! Writes and reads between registered memories, by address, without rooms: for engines that manage their peers' memory
//! themselves, as the users of NIXL and Mooncake do.
//!
//! Each side registers memory; whoever connects is told its addresses, and may then write and read all of it for as long as
//! the session lasts. So nothing here knows what a page is, or who owns it: a peer that is handed an address too early writes
//! there. Where both sides are crossdock's, rooms are the better way.
//!
//! What holds: a transfer ends once, by its deadline. A write that has ended well has landed. What has failed may still move
//! bytes until its [`quiet`](Transferring::quiet) ticket tells that it cannot any more *on this side*; a peer's memory is safe
//! from this side's late writes when the peer has heard that the session is over.
//!
//! A peer that registers more memory later is met anew when an address of it is named that is not known yet.
#![forbid(unsafe_code)]

mod handle;
mod note;
mod plan;
mod table;
mod worker;

pub use handle::{Handle, NotTaken, Transferring};
pub use worker::{Worker, WorkerOptions};

use std::time::Duration;

use crossdock_proto::SessionEnd;
pub use crossdock_transport::Direction;
use crossdock_transport::Error;

/// A stretch of bytes on both sides, by the addresses of the processes whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Here.
    pub local: u64,
    /// At the peer.
    pub remote: u64,
    /// How long.
    pub bytes: u64,
}

/// What is to be moved.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The peer's address, `"ip:port"`. It is dialed if there is no session with it.
    pub peer: String,
    /// `Write`: from here to there.
    pub direction: Direction,
    /// What, in any order. Nothing at all is a probe: it ends well when the peer has answered.
    pub blocks: Vec<Block>,
    /// From the call on.
    pub deadline: Duration,
}

/// Why a transfer did not end well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Bytes of this side are not in one registered memory.
    #[error("{bytes} bytes at {address:#x} here are not in one registered memory")]
    UnknownLocal {
        /// Where they begin.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// Bytes of the peer are not in one memory that it has registered.
    #[error("{bytes} bytes at {address:#x} of {peer} are not in one memory that it has registered")]
    UnknownRemote {
        /// The peer.
        peer: String,
        /// Where they begin.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// The deadline passed.
    #[error("not over by its deadline{}", if *is_connected { "" } else { ": the peer could not be reached" })]
    Expired {
        /// There was a session with the peer.
        is_connected: bool,
    },
    /// The session with the peer ended.
    #[error("peer lost: {cause}")]
    PeerLost {
        /// Why.
        cause: SessionEnd,
    },
    /// The port refused an op.
    #[error("the port refused: {0}")]
    Port(Error),
    /// Too many transfers are under way.
    #[error("too many transfers are under way")]
    Busy,
}

impl TransferError {
    /// Whether the same transfer may go well later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Expired { .. } | Self::Busy => true,
            Self::PeerLost { cause } => cause.is_retryable(),
            Self::UnknownLocal { .. } | Self::UnknownRemote { .. } | Self::Port(_) => false,
        }
    }

    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::UnknownLocal { .. } => "register the memory first, in one piece",
            Self::UnknownRemote { .. } => "let the peer register the memory first, in one piece",
            Self::Expired { is_connected: true } => "allow more time, or move less at once",
            Self::Expired { is_connected: false } => {
                "check that the peer runs and that its address and key are right"
            }
            Self::PeerLost { cause } => cause.advice(),
            Self::Port(_) => "look at what the port says",
            Self::Busy => "let some transfers end first",
        }
    }
}

/// Why memory was not registered, or is not let go.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// Some of its bytes are registered already.
    #[error("{bytes} bytes at {address:#x} overlap memory that is registered at {other:#x}")]
    Overlaps {
        /// Where it begins.
        address: u64,
        /// How long it is.
        bytes: u64,
        /// The other one.
        other: u64,
    },
    /// As many memories are registered as there may be.
    #[error("{0} memories are registered, and no more can be")]
    TooMany(usize),
    /// No memory is registered that begins there.
    #[error("no memory is registered at {address:#x}")]
    Unknown {
        /// Where.
        address: u64,
    },
    /// A port does not take it.
    #[error("a port does not take the memory: {0}")]
    Port(Error),
    /// A peer that is still connected can reach it by itself; its sessions were not over in time.
    #[error("a peer can still reach the memory")]
    InUse,
}
