//! What the protocol asks of its owner.

use std::sync::Arc;

use crossdock_transport::{GrantId, LaneAddress, LaneTags};

use crate::message::RegionOffer;
use crate::proto::{LinkId, RoomId, SessionId, TargetId};

/// What the owner of the protocol is asked to do, in this order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Dial; answer with [`Proto::dialed`](crate::Proto::dialed).
    Dial {
        /// For which target.
        target: TargetId,
        /// Where.
        address: String,
    },
    /// Send one frame.
    Send {
        /// On which control stream.
        link: LinkId,
        /// Its content.
        frame: Vec<u8>,
    },
    /// Close a control stream after what was sent on it.
    CloseLink {
        /// Which.
        link: LinkId,
    },
    /// The peer of a control stream has proven who it is: frames of full length may come from it.
    Trust {
        /// Which.
        link: LinkId,
    },
    /// Begin to exchange heartbeats.
    Watch {
        /// With whose session.
        session: SessionId,
        /// How.
        plan: PulsePlan,
    },
    /// Stop to exchange heartbeats.
    Unwatch {
        /// With whose session.
        session: SessionId,
    },
    /// Open a lane; answer with [`Proto::lane_opened`](crate::Proto::lane_opened). The lane that had this number before is
    /// down at both ends: from now on [`Proto::drained`](crate::Proto::drained) tells nothing of it.
    OpenLane {
        /// For which session.
        session: SessionId,
        /// The lane's number in the session.
        slot: u8,
        /// On which rail of this node.
        rail: u8,
    },
    /// Connect an open lane; answered by [`Proto::lane_up`](crate::Proto::lane_up) or [`Proto::lane_down`](crate::Proto::lane_down).
    ConnectLane {
        /// Of which session.
        session: SessionId,
        /// Which lane.
        slot: u8,
        /// The other end.
        address: LaneAddress,
        /// What the ends show each other.
        tags: LaneTags,
    },
    /// Close a lane; answered by [`Proto::lane_down`](crate::Proto::lane_down).
    CloseLane {
        /// Of which session.
        session: SessionId,
        /// Which lane.
        slot: u8,
    },
    /// Attach the peer's regions on a lane that is up; answer with [`Proto::lane_attached`](crate::Proto::lane_attached),
    /// unless its `Down` comes first.
    AttachLane {
        /// Of which session.
        session: SessionId,
        /// Which lane.
        slot: u8,
        /// The regions; keys are by the peer's rails.
        regions: Arc<[RegionOffer]>,
        /// The peer's rail at its other end.
        peer_rail: u8,
    },
    /// Both ends of a lane are ready: post on it from now on, and not before.
    UseLane {
        /// Of which session.
        session: SessionId,
        /// Which lane.
        slot: u8,
    },
    /// Grant a room's pages ([`Proto::granted`](crate::Proto::granted)) on every rail of the session; a refusal is told with
    /// [`Proto::room_failed`](crate::Proto::room_failed).
    Grant {
        /// To which session's peer.
        session: SessionId,
        /// Under which name.
        grant: GrantId,
        /// Which room's pages.
        room: RoomId,
    },
    /// Revoke a grant on every rail; answer with [`Proto::revoked`](crate::Proto::revoked).
    Revoke {
        /// Of which session.
        session: SessionId,
        /// Which grant.
        grant: GrantId,
    },
    /// Post no more for a room; answer with [`Proto::drained`](crate::Proto::drained) when its last op has ended.
    StopTransfer {
        /// Which room.
        room: RoomId,
    },
    /// A session is over in every respect.
    Forget {
        /// Which.
        session: SessionId,
    },
}

/// How heartbeats of a session go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulsePlan {
    /// Where to.
    pub peer_address: String,
    /// How often.
    pub interval_ns: u64,
    /// What ours carry.
    pub send_token: u64,
    /// What the peer's carry.
    pub expect_token: u64,
}
