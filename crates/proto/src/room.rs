//! Rooms: one request's hand-over, seen from one of its two ends.

use std::sync::Arc;

use crossdock_memory::{GrantedPages, PageLayout, PageRef};
use crossdock_transport::{Access, GrantId};

use crate::end::{End, Stage};
use crate::flight::RingId;
use crate::message::{MAX_LANES, RoleKind, RoomName, RoomOnWire};
use crate::notice::Homecoming;
use crate::proto::{PeerName, SessionId};

/// One buffer of the pages in a room, by the number of its announced region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomBuffer {
    /// The region's number on this node.
    pub region: u32,
    /// Where the pages lie in it.
    pub layout: PageLayout,
}

/// The buffers of a cache; every page of a room has its place in each of them. Shared by all rooms of a cache.
pub type Buffers = Arc<[RoomBuffer]>;

/// Asks for a room in which the peer writes into our pages (push, decode side).
#[derive(Debug)]
pub struct Receive {
    /// From whom.
    pub peer: PeerName,
    /// The rank that this peer must have; `None`: any.
    pub rank: Option<u32>,
    /// Which room.
    pub room: RoomName,
    /// The pages, which nobody else uses until they come home. Where several peers bring parts of them, each room has
    /// one of the values of [`GrantedPages::another_writer`].
    pub pages: GrantedPages,
    /// Where they lie.
    pub buffers: Buffers,
    /// Told to the sender as they are: which tokens.
    pub params: Vec<u8>,
    /// On this node's clock.
    pub deadline_ns: u64,
}

/// Asks for a room in which we write into a peer's pages (push, prefill side).
#[derive(Debug)]
pub struct Send {
    /// Which room.
    pub room: RoomName,
    /// The rank whose asking it waits for; `None`: any.
    pub rank: Option<u32>,
    /// The pages; held until they are no longer read. More may be [added](crate::Proto::add_pages).
    pub pages: PageRef,
    /// On this node's clock.
    pub deadline_ns: u64,
}

/// Asks for a room in which we read a peer's pages (pull, decode side).
#[derive(Debug)]
pub struct Fetch {
    /// From whom.
    pub peer: PeerName,
    /// The rank that this peer must have; `None`: any.
    pub rank: Option<u32>,
    /// Which room.
    pub room: RoomName,
    /// The pages, which nobody else uses until they come home. Where several peers bring parts of them, each room has
    /// one of the values of [`GrantedPages::another_writer`].
    pub pages: GrantedPages,
    /// Told to the source as they are.
    pub params: Vec<u8>,
    /// On this node's clock.
    pub deadline_ns: u64,
}

/// Asks for a room in which a peer reads our pages (pull, prefill side).
#[derive(Debug)]
pub struct Serve {
    /// Which room.
    pub room: RoomName,
    /// The rank whose asking it waits for; `None`: any.
    pub rank: Option<u32>,
    /// The pages; held until the peer has released them.
    pub pages: PageRef,
    /// Where they lie.
    pub buffers: Buffers,
    /// On this node's clock.
    pub deadline_ns: u64,
}

/// A decode end that was not opened.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Unopened {
    /// Why.
    pub error: RoomError,
    /// The pages, which the peer was not told of.
    pub pages: Homecoming,
}

/// Why a room was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RoomError {
    /// The room is open here already, in the same role.
    #[error("room {} (use {}, share {}) is open here already", .room.room, .room.use_count, .room.share)]
    Duplicate {
        /// Which room.
        room: RoomName,
    },
    /// Too many rooms.
    #[error("limit of {limit} rooms reached")]
    Limit {
        /// The limit.
        limit: u32,
    },
    /// No such target.
    #[error("unknown peer")]
    UnknownPeer,
    /// The pages' list and the parameters are more than a control message takes.
    #[error("{bytes} bytes to be told to the peer, where {limit} fit")]
    TooLong {
        /// How many there are.
        bytes: usize,
        /// How many fit.
        limit: usize,
    },
}

/// One end of a room.
pub(crate) struct Room {
    pub name: RoomName,
    /// The decode side's number for it; known to the prefill side with the session.
    pub serial: u32,
    /// Where what happens to it is recorded: its peer's, once that is known.
    pub ring: RingId,
    pub opened_ns: u64,
    /// When its session became known.
    pub met_ns: Option<u64>,
    /// The peer asked for, on the decode side.
    pub peer: Option<PeerName>,
    /// The rank that the peer must have, if that matters.
    pub rank: Option<u32>,
    /// The session, once there is one.
    pub session: Option<SessionId>,
    pub deadline_ns: u64,
    /// Set once, when the user has been told.
    pub end: Option<End>,
    pub stage: Stage,
    pub role: Role,
    /// The engine still has ops of this room at its ports, or is asked to stop feeding them.
    pub moving: Moving,
}

/// Whether ops of a room may be at the ports of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moving {
    /// None are.
    No,
    /// None are yet: the notice to start this attempt has not been taken, and can be withdrawn.
    Told {
        /// Which attempt.
        attempt: u32,
    },
    /// The engine posts them.
    Yes,
    /// The engine was told to stop, and will say when the last one has ended.
    Stopping,
}

pub(crate) enum Role {
    Receiving(Receiving),
    Sending(Sending),
    Fetching(Fetching),
    Serving(Serving),
}

pub(crate) struct Receiving {
    /// Gone once they are home.
    pub pages: Option<GrantedPages>,
    pub buffers: Buffers,
    pub params: Vec<u8>,
    pub attempt: u32,
    /// The grant of this attempt.
    pub grant: Option<GrantId>,
    /// Every grant of this room whose index is not free, that one included.
    pub grants: Vec<GrantId>,
    /// Immediates of this attempt, by lane.
    pub arrivals: [u32; MAX_LANES],
    /// When the last of them came; 0: none has.
    pub last_arrival_ns: u64,
    /// Stands in the list of rooms whose arrivals have grown.
    pub has_grown: bool,
    /// What the sender says to expect of this attempt, once it has finished it.
    pub finish: Option<Finish>,
}

pub(crate) struct Finish {
    pub arrivals: [u32; MAX_LANES],
    pub aux: Vec<u8>,
}

pub(crate) struct Sending {
    /// Held until no op reads them.
    pub pages: Option<PageRef>,
    pub attempt: u32,
    /// The peer's grant that we write under.
    pub grant: Option<GrantId>,
    /// Grants to give back, once the ops under them have ended.
    pub owed: Vec<GrantId>,
    /// The receiver has been told that this attempt is complete.
    pub finished: bool,
    /// A lane that this attempt may have used went down: wait for the receiver to grant again.
    pub needs_regrant: bool,
    /// The receiver's new grant, to be used once the ops under the old one have ended.
    pub regrant: Option<(u32, GrantId)>,
    pub remote_pages: Arc<[u32]>,
    pub params: Arc<[u8]>,
    /// Lanes on which an op ended by the lane's `Down`.
    pub down_lanes: u16,
}

pub(crate) struct Fetching {
    pub pages: Option<GrantedPages>,
    pub params: Vec<u8>,
    pub grant: Option<GrantId>,
    pub remote_pages: Arc<[u32]>,
    pub offer: Arc<[u8]>,
    pub attempt: u32,
    /// A lane went down in the middle: what it carried is read again.
    pub again: bool,
    /// Lanes on which a read ended by the lane's `Down`.
    pub down_lanes: u16,
}

pub(crate) struct Serving {
    pub pages: Option<PageRef>,
    pub buffers: Buffers,
    pub grant: Option<GrantId>,
}

impl Role {
    pub fn kind(&self) -> RoleKind {
        match self {
            Role::Receiving(_) => RoleKind::Receiving,
            Role::Sending(_) => RoleKind::Sending,
            Role::Fetching(_) => RoleKind::Fetching,
            Role::Serving(_) => RoleKind::Serving,
        }
    }

    /// How many pages it holds.
    pub fn pages(&self) -> u32 {
        let pages = match self {
            Role::Receiving(Receiving { pages, .. }) | Role::Fetching(Fetching { pages, .. }) => {
                pages.as_ref().map(|pages| pages.ids().len())
            }
            Role::Sending(Sending { pages, .. }) | Role::Serving(Serving { pages, .. }) => {
                pages.as_ref().map(|pages| pages.ids().len())
            }
        };
        pages.unwrap_or(0) as u32
    }
}

impl Room {
    /// As messages name it.
    pub fn on_wire(&self) -> RoomOnWire {
        RoomOnWire { name: self.name, serial: self.serial }
    }

    /// The pages and buffers that a port is asked to grant.
    pub fn granted(&self) -> Option<(Access, &[u32], &Buffers)> {
        match &self.role {
            Role::Receiving(r) => Some((Access::Write, r.pages.as_ref()?.ids(), &r.buffers)),
            Role::Serving(s) => Some((Access::Read, s.pages.as_ref()?.ids(), &s.buffers)),
            Role::Sending(_) | Role::Fetching(_) => None,
        }
    }
}
