//! What can be recorded.

use crossdock_transport::{DownCause, Fence, GrantId};

use super::is_failure;
use crate::end::{End, SessionEnd, Stage};
use crate::message::{CancelWhy, RoleKind, RoomName};
use crate::proto::{SessionId, TargetId};

/// One thing that happened on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Counts the records of this node's life, over all rings.
    pub serial: u64,
    /// The time of the turn in which it happened.
    pub at_ns: u64,
    /// In which session.
    pub session: Option<SessionId>,
    /// To which room.
    pub room: Option<RoomName>,
    /// What.
    pub what: What,
}

/// What happened; `docs/flight-recorder.md` tells more of each. What travels is recorded at both ends, as sent and as come. Causes are in boxes: something has gone
/// wrong when one is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// An address is dialed.
    Dialed {
        /// Which.
        target: TargetId,
    },
    /// There will be no session by this dial.
    NotReached {
        /// Which.
        target: TargetId,
        /// Why.
        cause: Box<SessionEnd>,
    },
    /// The peer has proven who it is.
    SessionBegan {
        /// Which of its lives.
        incarnation: u64,
        /// This node has dialed it.
        is_dialer: bool,
    },
    /// Rooms can move.
    SessionUp {
        /// Lanes that are up.
        lanes: u8,
    },
    /// The session has ended.
    SessionDown {
        /// Why.
        cause: Box<SessionEnd>,
        /// Rooms that end with it.
        rooms: u32,
        /// For how long nothing had been heard of the peer.
        silent_ms: u32,
    },
    /// A lane is up.
    LaneUp {
        /// Which.
        slot: u8,
    },
    /// A lane is down here.
    LaneDown {
        /// Which.
        slot: u8,
        /// Why.
        cause: Box<DownCause>,
    },
    /// The peer says that it has lost a lane.
    LaneLostThere {
        /// Which.
        slot: u8,
    },
    /// A lane is offered anew that was lost.
    LaneOffered {
        /// Which.
        slot: u8,
    },
    /// A lane that was lost can be used again.
    LaneBack {
        /// Which.
        slot: u8,
    },
    /// The user has opened a room.
    Opened {
        /// Which end of it.
        role: RoleKind,
        /// So many pages.
        pages: u32,
        /// For so long.
        left_ms: u32,
    },
    /// The room knows its peer.
    Bound {
        /// Which end of it this is.
        role: RoleKind,
        /// So many pages.
        pages: u32,
        /// After so long.
        waited_ms: u32,
        /// What is left of its time.
        left_ms: u32,
    },
    /// The peer asks for a room that is not open here yet.
    Parked {
        /// The end that is missing.
        role: RoleKind,
    },
    /// What was parked, or could not be, is refused.
    TurnedAway {
        /// Why.
        why: CancelWhy,
    },
    /// A pull is asked for.
    WantSent,
    /// The peer asks for a pull.
    WantCame,
    /// Pages are granted to the peer.
    GrantSent {
        /// Under which name.
        grant: GrantId,
        /// How often the room was begun before.
        attempt: u32,
        /// So many.
        pages: u32,
    },
    /// The peer grants its pages.
    GrantCame {
        /// Under which name.
        grant: GrantId,
        /// How often the room was begun before.
        attempt: u32,
        /// So many.
        pages: u32,
    },
    /// The first op of an attempt has been posted.
    Posting,
    /// So far a room's bytes have been posted.
    Posted {
        /// Bytes that were posted.
        bytes: u64,
        /// Of so many.
        of_bytes: u64,
        /// Layers that both sides hold.
        layers: u16,
        /// Whether the attempt ended with this.
        is_last: bool,
    },
    /// The first immediate of an attempt has arrived.
    Arriving {
        /// On which lane.
        slot: u8,
    },
    /// All ops of an attempt are posted.
    FinishSent {
        /// Which.
        attempt: u32,
        /// Immediates to expect.
        arrivals: u32,
    },
    /// The peer has posted all ops of an attempt.
    FinishCame {
        /// Which.
        attempt: u32,
        /// Immediates to expect.
        expected: u32,
        /// How many had been counted.
        counted: u32,
    },
    /// All bytes are here.
    Landed {
        /// Immediates that were counted.
        counted: u32,
    },
    /// The peer is told that the room is delivered.
    DeliveredSent,
    /// The peer says that the room is delivered.
    DeliveredCame,
    /// The peer is told that the room is given up.
    CancelSent {
        /// Why.
        why: CancelWhy,
    },
    /// The peer says that the room is given up.
    CancelCame {
        /// Why.
        why: CancelWhy,
    },
    /// The room has ended on this side.
    Ended {
        /// How, unless delivered.
        end: Option<Box<End>>,
        /// How far it had come.
        stage: Stage,
        /// Immediates of its last attempt that were counted.
        counted: u32,
        /// Of so many, if the sender had finished.
        expected: Option<u32>,
        /// How long before it was opened.
        age_ms: u32,
        /// How long before it had met its peer.
        met_ms: Option<u32>,
        /// Since the last of the immediates.
        quiet_ms: u32,
        /// Since anything was heard of the peer.
        silent_ms: u32,
    },
    /// The ports have taken a grant back.
    Revoked {
        /// Which.
        grant: GrantId,
        /// What they promise.
        fence: Fence,
    },
    /// Pages wait until no write can land in them any more.
    Quarantined,
    /// A grant of the peer's is given back to it.
    ReleaseSent {
        /// Which.
        grant: GrantId,
    },
    /// The peer gives a grant back.
    ReleaseCame {
        /// Which.
        grant: GrantId,
    },
    /// The pages are the user's again.
    Home,
}

impl What {
    /// Whether it follows every delivery, and tells nothing more.
    pub(crate) fn goes_without_saying(&self) -> bool {
        matches!(self, Self::Home | Self::Revoked { .. })
    }

    /// Whether somebody will ask about it.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Ended { end: Some(end), .. } => is_failure(end),
            Self::SessionDown { cause, .. } => {
                !matches!(**cause, SessionEnd::ClosedHere | SessionEnd::ClosedByPeer)
            }
            _ => false,
        }
    }
}

/// As milliseconds, for a record.
pub(crate) fn millis(ns: u64) -> u32 {
    u32::try_from(ns / 1_000_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_stays_small() {
        assert!(size_of::<Record>() <= 96, "{} bytes", size_of::<Record>());
    }
}
