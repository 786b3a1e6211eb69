//! How rooms and sessions end. Each room ends once on each running side, with one of these.

use std::fmt;

use crossdock_transport::DownCause;

use crate::link_cause::LinkCause;
use crate::message::Refusal;

/// Which side did it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// This node.
    Here,
    /// The peer.
    Peer,
}

/// The end of a room on this side.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// All bytes are in the decode side's pages, and both sides may rely on it.
    Delivered,
    /// A user cancelled it.
    Cancelled {
        /// On which side.
        by: Who,
    },
    /// A deadline passed.
    Expired {
        /// Whose. Where both sides were given the same time, either may be first.
        by: Who,
        /// How far the room had come.
        stage: Stage,
    },
    /// The session with the peer ended.
    PeerLost {
        /// Why.
        cause: SessionEnd,
    },
    /// The room was never begun.
    Refused {
        /// Who refused.
        by: Who,
        /// Why.
        why: RoomRefusal,
    },
    /// A rail, a port or the bytes failed.
    Failed {
        /// On which side.
        by: Who,
        /// How far the room had come.
        stage: Stage,
        /// What failed.
        cause: Failure,
    },
}

/// How far a room had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Waiting for a session with the peer.
    Session,
    /// Waiting for the other side of the room.
    Grant,
    /// Bytes were moving.
    Transfer,
    /// All bytes were sent; waiting for the other side to say that they arrived.
    Confirm,
    /// All bytes have landed; they are not accepted yet (where checksums are on, they are compared).
    Verify,
}

/// Why a room was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RoomRefusal {
    /// Too many rooms or grants.
    Busy,
    /// The two sides' requests do not fit together.
    Mismatch(Misfit),
    /// The room is open on this node already, in the same role.
    Duplicate,
    /// The list of pages and what goes with it are more than a control message takes.
    TooLong {
        /// So many bytes there were.
        bytes: usize,
        /// So many fit.
        limit: usize,
    },
    /// The handshake with the peer was refused.
    Handshake(Refusal),
}

/// In what the two sides of a room do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Misfit {
    /// The two sides speak of requests of different lengths.
    Tokens {
        /// So many tokens are asked for here.
        here: u32,
        /// So many by the peer.
        peer: u32,
    },
    /// More tokens are to be left out than there are.
    Skipped {
        /// So many tokens there are.
        tokens: u32,
        /// So many were to be left out.
        skip_tokens: u32,
    },
    /// The pages that a side lists do not hold the tokens that are to move.
    Pages {
        /// Whose list it is.
        whose: Who,
    },
    /// A page is listed twice where it would be written twice.
    DuplicatePage {
        /// Whose list it is.
        whose: Who,
        /// The page.
        page: u32,
    },
    /// There is not one list of pages for each pool of the layout.
    Lists {
        /// So many there are.
        lists: usize,
        /// So many pools the layout has.
        pools: usize,
    },
    /// The ranks of the other side are none, are named twice, or have numbers that no rank has.
    Ranks,
    /// The peer at which a rank was named has another one.
    Rank {
        /// The rank that was named.
        named: u32,
        /// That of the peer.
        peer: u32,
    },
    /// The ranks that were named do not bring each byte once.
    Gap,
    /// The layers that are to be brought are none, or are not kept here.
    Layers {
        /// The first one.
        first: u32,
        /// The one after the last.
        end: u32,
    },
    /// The two caches cannot be bridged: no layer is held by both, or a layout names what its worker does not have.
    Layouts,
    /// More pages are to be sent than the pool has.
    TooManyPages {
        /// So many are named.
        pages: usize,
        /// So many there are.
        limit: u32,
    },
    /// The room was sent in more pieces than are remembered.
    TooManyPieces {
        /// So many are.
        limit: usize,
    },
    /// What the peer sent along is not what this version can read.
    Unreadable,
    /// The peer found that they do not fit; its end says in what.
    AtPeer,
}

/// What failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// A lane went down and no other was left.
    Lane(DownCause),
    /// A port refused a call.
    Port(crossdock_transport::Error),
    /// The bytes that arrived are not those that were sent.
    Checksum,
    /// What goes with the pages is more than a control message takes.
    TooLong {
        /// So many bytes there were.
        bytes: usize,
        /// So many fit.
        limit: usize,
    },
    /// The peer said only that it failed.
    AtPeer,
}

/// Why a session with a peer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionEnd {
    /// Closed here.
    ClosedHere,
    /// Closed by the peer, in order.
    ClosedByPeer,
    /// The control stream ended without a goodbye: the peer died, or the network failed.
    StreamEnded {
        /// What the network found.
        cause: LinkCause,
    },
    /// Nothing was heard of the peer for too long: it is stopped, or the network is cut.
    Silent {
        /// For how long.
        for_ns: u64,
    },
    /// Ops of a room that had ended stayed at a lane for too long: it carries nothing any more, though the peer is heard.
    Stalled {
        /// For how long.
        for_ns: u64,
    },
    /// No heartbeats can be exchanged with the peer.
    NoHeartbeats {
        /// What the network said.
        cause: LinkCause,
    },
    /// The peer started again; what it was before is gone.
    Restarted,
    /// The last lane went down.
    LanesLost {
        /// Why the last one did.
        cause: DownCause,
    },
    /// The handshake did not finish in time.
    HandshakeTimedOut,
    /// The peer could not be reached.
    Unreachable {
        /// What the network found.
        cause: LinkCause,
    },
    /// The handshake was refused.
    Refused {
        /// By whom.
        by: Who,
        /// Why.
        refusal: Refusal,
    },
    /// The peer broke the protocol.
    Misbehaved {
        /// What it did.
        what: &'static str,
    },
    /// A port failed while the session was set up.
    Port(crossdock_transport::Error),
}

impl End {
    /// Whether the same request may succeed if it is made again.
    pub fn is_retryable(&self) -> bool {
        match self {
            End::Delivered | End::Cancelled { .. } => false,
            End::Expired { .. } => true,
            End::PeerLost { cause } => cause.is_retryable(),
            End::Refused { why, .. } => matches!(why, RoomRefusal::Busy),
            End::Failed { cause, .. } => !matches!(cause, Failure::Port(_) | Failure::TooLong { .. }),
        }
    }

    /// What a person, or an engine, can do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            End::Delivered => "nothing to do",
            End::Cancelled { by: Who::Here } => "nothing to do: cancelled on request",
            End::Cancelled { by: Who::Peer } => "the other side gave the request up; drop it here too",
            End::Expired { stage: Stage::Session, .. } => {
                "check that the peer runs and that its address is right"
            }
            End::Expired { stage: Stage::Grant, .. } => {
                "the other side never opened this room, or sent nothing: check the router, or allow more time"
            }
            End::Expired { .. } => "allow more time, or send less at once",
            End::PeerLost { cause } => cause.advice(),
            End::Refused { why: RoomRefusal::Busy, .. } => {
                "try again later, or raise max_rooms, max_grants or the max_parked limits of the side that refused"
            }
            End::Refused { why: RoomRefusal::Mismatch(misfit), .. } => misfit.advice(),
            End::Refused { why: RoomRefusal::Duplicate, .. } => {
                "give each use of a room number its own use count, and end the first before the next"
            }
            End::Refused { why: RoomRefusal::Handshake(_), .. } => {
                "start both sides with fitting configurations"
            }
            End::Failed { cause: Failure::Checksum, .. } => {
                "the bytes changed on their way: suspect memory, the NIC, or a writer outside this library"
            }
            End::Refused { why: RoomRefusal::TooLong { .. }, .. }
            | End::Failed { cause: Failure::TooLong { .. }, .. } => {
                "use larger pages or shorter requests, or raise max_frame_bytes on all nodes"
            }
            End::Failed { .. } => "send the request again; look at the peer's log if it repeats",
        }
    }
}

impl SessionEnd {
    /// Why a session ends that a lane took with it. Who closes a session closes its lanes, too, and a port may be told of that
    /// before the goodbye is read.
    pub fn by_lane(cause: DownCause) -> SessionEnd {
        match cause {
            DownCause::ClosedByPeer => SessionEnd::ClosedByPeer,
            cause => SessionEnd::LanesLost { cause },
        }
    }

    /// Whether a new session may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            SessionEnd::Refused { refusal, .. } => matches!(refusal, Refusal::Busy | Refusal::Duplicate),
            SessionEnd::Unreachable { cause } | SessionEnd::NoHeartbeats { cause } => !cause.is_permanent(),
            SessionEnd::Misbehaved { .. } | SessionEnd::Port(_) => false,
            _ => true,
        }
    }

    /// What a person can do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            SessionEnd::ClosedHere | SessionEnd::ClosedByPeer => "nothing to do: closed in order",
            SessionEnd::StreamEnded { .. } => {
                "the peer's process has ended or its host is gone; it is dialed again"
            }
            SessionEnd::Silent { .. } => "the peer is stopped, overloaded or cut off; it is dialed again",
            SessionEnd::Stalled { .. } => {
                "something between the two swallows a lane's bytes, or the peer's progress loop is not driven"
            }
            SessionEnd::NoHeartbeats { .. } => {
                "let both sides bind, or advertise, addresses of one family that reach each other"
            }
            SessionEnd::Restarted => "the peer was started again; send the request again",
            SessionEnd::LanesLost { cause } => cause.advice(),
            SessionEnd::Unreachable { cause: LinkCause::BadAddress { .. } } => {
                "give the peer's IP address and port; resolve names before"
            }
            SessionEnd::Unreachable { cause: LinkCause::Limit { .. } } => {
                "raise max_sessions, or connect to fewer peers"
            }
            SessionEnd::HandshakeTimedOut | SessionEnd::Unreachable { .. } => {
                "check that the peer runs, its address, and that nothing between filters the connection"
            }
            SessionEnd::Refused { refusal, .. } => match refusal {
                Refusal::Version { .. } => "run versions of the library that overlap",
                Refusal::NotAuthentic => "give both sides the same pre-shared key",
                Refusal::AuthMismatch => "turn authentication on (or off) on both sides",
                Refusal::Fingerprint(_) => "serve the same model with the same cache dtype on both sides",
                Refusal::NoRail { .. } => "open a port of one kind on both sides that can reach the other",
                Refusal::Busy => "raise max_sessions of the side that refused, or try again later",
                Refusal::Duplicate => "nothing to do: the existing session is used",
                Refusal::SameNode => "give each node a number of its own, and do not dial this node itself",
            },
            SessionEnd::Misbehaved { .. } => "the peer runs other or broken software",
            SessionEnd::Port(_) => "look at the port's error",
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Who::Here => "this side",
            Who::Peer => "the peer",
        })
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Session => "while waiting for a session",
            Stage::Grant => "while waiting for the other side of the room",
            Stage::Transfer => "while bytes moved",
            Stage::Confirm => "while waiting for confirmation",
            Stage::Verify => "while what had landed was checked",
        })
    }
}

impl Misfit {
    fn advice(&self) -> &'static str {
        match self {
            Misfit::Tokens { .. } | Misfit::Skipped { .. } => {
                "both sides must ask for the same tokens of the same request"
            }
            Misfit::Pages { .. } | Misfit::DuplicatePage { .. } | Misfit::TooManyPages { .. } => {
                "list each page of the request once, in the order of its tokens, and as many as they need"
            }
            Misfit::Lists { .. } => "give a list of pages for each pool of the layout, in their order",
            Misfit::Ranks | Misfit::Gap => {
                "name the ranks that bring the layers, heads and tokens of this one, each once, or the layers that they bring"
            }
            Misfit::Rank { .. } => "name each rank at the peer whose layout has it",
            Misfit::Layers { .. } => "name layers of this node's cache, or none for all of them",
            Misfit::Layouts => "look at the cache layouts that both sides were started with",
            Misfit::TooManyPieces { .. } => "send larger chunks, or those that continue each other in order",
            Misfit::Unreadable => "run the same version of crossdock on both sides",
            Misfit::AtPeer => "look at how the room ended on the other side",
        }
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Misfit::Tokens { here, peer } => {
                write!(f, "the request has {here} tokens here and {peer} at the peer")
            }
            Misfit::Skipped { tokens, skip_tokens } => {
                write!(f, "{skip_tokens} of {tokens} tokens were to be left out")
            }
            Misfit::Pages { whose } => write!(f, "the pages of {whose} do not hold the request's tokens"),
            Misfit::DuplicatePage { whose, page } => write!(f, "page {page} of {whose} is listed twice"),
            Misfit::Lists { lists, pools } => write!(f, "{lists} lists of pages for {pools} pools"),
            Misfit::Ranks => f.write_str("the named ranks are none, or not each another one"),
            Misfit::Rank { named, peer } => {
                write!(f, "the peer at which rank {named} was named has rank {peer}")
            }
            Misfit::Gap => f.write_str("the named ranks do not bring each byte once"),
            Misfit::Layers { first, end } => write!(f, "layers {first}..{end} are none, or not kept here"),
            Misfit::Layouts => f.write_str("the two cache layouts cannot be bridged"),
            Misfit::TooManyPages { pages, limit } => {
                write!(f, "{pages} pages are named of a pool that has {limit}")
            }
            Misfit::TooManyPieces { limit } => write!(f, "sent in more than {limit} pieces"),
            Misfit::Unreadable => f.write_str("what the peer sent along cannot be read"),
            Misfit::AtPeer => f.write_str("the two sides' requests do not fit"),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Delivered => f.write_str("delivered"),
            End::Cancelled { by } => write!(f, "cancelled by {by}"),
            End::Expired { by, stage } => write!(f, "deadline of {by} passed {stage}"),
            End::PeerLost { cause } => write!(f, "peer lost: {cause}"),
            End::Refused { by, why } => match why {
                RoomRefusal::Busy => write!(f, "refused by {by}: no room for more"),
                RoomRefusal::Mismatch(misfit) => write!(f, "refused by {by}: {misfit}"),
                RoomRefusal::Duplicate => write!(f, "refused by {by}: the room is open already"),
                RoomRefusal::TooLong { bytes, limit } => {
                    write!(f, "refused by {by}: {bytes} bytes to be told to the peer, where {limit} fit")
                }
                RoomRefusal::Handshake(refusal) => write!(f, "refused by {by} in the handshake: {refusal}"),
            },
            End::Failed { by, stage, cause } => match cause {
                Failure::Lane(cause) => write!(f, "failed on {by} {stage}: {cause}"),
                Failure::Port(error) => write!(f, "failed on {by} {stage}: {error}"),
                Failure::Checksum => write!(f, "failed on {by} {stage}: checksum mismatch"),
                Failure::TooLong { bytes, limit } => {
                    write!(
                        f,
                        "failed on {by} {stage}: {bytes} bytes to be told to the peer, where {limit} fit"
                    )
                }
                Failure::AtPeer => write!(f, "failed on {by} {stage}"),
            },
        }
    }
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::ClosedHere => f.write_str("closed here"),
            SessionEnd::ClosedByPeer => f.write_str("closed by the peer"),
            SessionEnd::StreamEnded { cause } => {
                write!(f, "control stream ended without a goodbye: {cause}")
            }
            SessionEnd::Silent { for_ns } => write!(f, "nothing heard for {} ms", for_ns / 1_000_000),
            SessionEnd::Stalled { for_ns } => {
                write!(f, "a lane has carried nothing of an ended room for {} ms", for_ns / 1_000_000)
            }
            SessionEnd::NoHeartbeats { cause } => write!(f, "no heartbeats can be exchanged: {cause}"),
            SessionEnd::Restarted => f.write_str("the peer was restarted"),
            SessionEnd::LanesLost { cause } => write!(f, "no lane left: {cause}"),
            SessionEnd::HandshakeTimedOut => f.write_str("handshake timed out"),
            SessionEnd::Unreachable { cause } => write!(f, "unreachable: {cause}"),
            SessionEnd::Refused { by, refusal } => write!(f, "refused by {by}: {refusal}"),
            SessionEnd::Misbehaved { what } => write!(f, "the peer broke the protocol: {what}"),
            SessionEnd::Port(error) => write!(f, "port failed: {error}"),
        }
    }
}

impl std::error::Error for SessionEnd {}

impl std::error::Error for End {}
