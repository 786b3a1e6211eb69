//! The control messages. `docs/wire.md` is their specification.

mod form;

use crossdock_transport::{Access, GrantId, LaneAddress, RemoteKey};

use crate::fingerprint::{Difference, Fingerprint};

/// The first version of the protocol that this code speaks.
pub const VERSION_MIN: u16 = 1;
/// The last version of the protocol that this code speaks.
pub const VERSION_MAX: u16 = 1;

/// Lanes of one session are numbered below this.
pub const MAX_LANES: usize = 16;

/// Who sent a control message: a node, and which of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The node, the same over restarts.
    pub node: u64,
    /// Random, new at each start.
    pub incarnation: u64,
}

/// One rail that a side offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RailOffer {
    /// The transport.
    pub kind: String,
    /// Only rails of equal reach connect; empty reaches anything.
    pub reach: String,
    /// What it carries.
    pub bytes_per_second: u64,
}

/// What both sides of a handshake say of themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// For people.
    pub name: String,
    /// Fresh for each handshake.
    pub nonce: [u8; 32],
    /// Whether this side asks for proof of the shared key, and gives it.
    pub auth: bool,
    /// What must be equal.
    pub fingerprint: Fingerprint,
    /// Rails in the order of preference.
    pub rails: Vec<RailOffer>,
    /// How many lanes a rail, at most.
    pub lanes_per_rail: u8,
    /// Where heartbeats go.
    pub pulse_address: String,
    /// How often this side wants to hear of the other.
    pub heartbeat_ns: u64,
}

/// A region that peers may be granted pages of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionOffer {
    /// Its number on the side that announces it.
    pub region: u32,
    /// Its length.
    pub bytes: u64,
    /// Its key on each rail that took it.
    pub keys: Vec<(u8, RemoteKey)>,
}

/// The name of a room between two given nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomName {
    /// The router's number. Numbers repeat.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Which share of the request this is: where several ranks of one side hold parts of what one rank of the other
    /// needs, each pair of ranks has a room of its own. Both sides name it alike; nothing else is asked of it here.
    pub share: u32,
}

/// A room as messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RoomOnWire {
    /// Its name, which may come back.
    pub name: RoomName,
    /// The decode side's number for it, which does not: what is still on its way for an earlier room of the name is
    /// not taken for one that was opened since.
    pub serial: u32,
}

/// Which of the four ends of a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RoleKind {
    /// The decode side of a push.
    Receiving,
    /// The prefill side of a push.
    Sending,
    /// The decode side of a pull.
    Fetching,
    /// The prefill side of a pull.
    Serving,
}

impl RoleKind {
    /// Whether this end is the decode side, whose incarnation is part of the room's name.
    pub fn is_decode(self) -> bool {
        matches!(self, RoleKind::Receiving | RoleKind::Fetching)
    }

    /// The end on the other side.
    pub fn other(self) -> Self {
        match self {
            RoleKind::Receiving => RoleKind::Sending,
            RoleKind::Sending => RoleKind::Receiving,
            RoleKind::Fetching => RoleKind::Serving,
            RoleKind::Serving => RoleKind::Fetching,
        }
    }
}

/// Why a side ends a room early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelWhy {
    /// Its user cancelled it.
    Cancelled,
    /// Its deadline passed.
    Expired,
    /// It has no room for more.
    Busy,
    /// Its rails failed.
    Failed,
    /// The bytes did not match their checksum.
    Corrupt,
    /// The request does not fit the memory of this side.
    Mismatch,
}

/// A grant that its user gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// Which grant.
    pub grant: GrantId,
    /// Bit `s`: an op on lane `s` ended by the lane's `Down`, so only the granter's own `Down` of it is proof.
    pub down_lanes: u16,
}

/// Why a handshake is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No version in common.
    #[error("no protocol version in common: {here_min}..={here_max} here, {there_min}..={there_max} there")]
    Version {
        /// First version here.
        here_min: u16,
        /// Last version here.
        here_max: u16,
        /// First version there.
        there_min: u16,
        /// Last version there.
        there_max: u16,
    },
    /// The other side does not know the shared key.
    #[error("the peer could not prove the shared key")]
    NotAuthentic,
    /// One side asks for proof and the other does not give it.
    #[error("authentication is on at one side only")]
    AuthMismatch,
    /// The caches do not fit together.
    #[error("the two caches do not fit together: {}", .0.iter().map(|d| d.to_string()).collect::<Vec<_>>().join("; "))]
    Fingerprint(Vec<Difference>),
    /// No transport reaches from one to the other.
    #[error("no rail in common: {here} here, {there} there")]
    NoRail {
        /// Kinds here.
        here: String,
        /// Kinds there.
        there: String,
    },
    /// Too many sessions.
    #[error("the peer has no room for another session")]
    Busy,
    /// The two are connected already.
    #[error("a session between the two exists already")]
    Duplicate,
    /// Both say that they are the same node: a node has dialed itself, or two were given one number.
    #[error("the peer has this node's own number")]
    SameNode,
}

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Every message and field is specified in docs/wire.md.
pub enum Message {
    Hello {
        version_min: u16,
        version_max: u16,
        about: About,
    },
    Welcome {
        version: u16,
        about: About,
        proof: [u8; 32],
    },
    Prove {
        proof: [u8; 32],
    },
    Refuse {
        refusal: Refusal,
    },
    Setup {
        lanes: Vec<(u8, LaneAddress)>,
        regions: Vec<RegionOffer>,
        app: Vec<u8>,
        held: Vec<GrantId>,
    },
    Ready,
    Goodbye,
    Restart,
    Ping {
        stamp: u64,
    },
    Pong {
        stamp: u64,
    },
    LaneLost {
        slot: u8,
    },
    LaneOffer {
        slot: u8,
        address: LaneAddress,
    },
    LaneAnswer {
        slot: u8,
        address: LaneAddress,
    },
    LaneReady {
        slot: u8,
    },
    Want {
        room: RoomOnWire,
        duration_ns: u64,
        params: Vec<u8>,
    },
    Grant {
        room: RoomOnWire,
        access: Access,
        attempt: u32,
        grant: GrantId,
        duration_ns: u64,
        params: Vec<u8>,
        pages: Vec<u32>,
    },
    Regrant {
        room: RoomOnWire,
        attempt: u32,
        grant: GrantId,
    },
    Finish {
        room: RoomOnWire,
        attempt: u32,
        arrivals: Vec<u32>,
        aux: Vec<u8>,
    },
    Delivered {
        room: RoomOnWire,
    },
    Cancel {
        room: RoomOnWire,
        from: RoleKind,
        why: CancelWhy,
    },
    Release {
        released: Vec<Released>,
        delivered: bool,
    },
}

impl Refusal {
    /// The same refusal as the other side sees it: here and there change places.
    pub fn seen_from_there(&self) -> Refusal {
        match self.clone() {
            Refusal::Version { here_min, here_max, there_min, there_max } => Refusal::Version {
                here_min: there_min,
                here_max: there_max,
                there_min: here_min,
                there_max: here_max,
            },
            Refusal::Fingerprint(differences) => Refusal::Fingerprint(
                differences
                    .into_iter()
                    .map(|d| Difference { key: d.key, ours: d.theirs, theirs: d.ours })
                    .collect(),
            ),
            Refusal::NoRail { here, there } => Refusal::NoRail { here: there, there: here },
            same => same,
        }
    }
}
