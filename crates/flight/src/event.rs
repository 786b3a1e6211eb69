//! The lines of a dump. What is written is a record of the protocol's; what is read may be of another version.

use std::borrow::Cow;

use crossdock_proto::flight::{Record, What};
use crossdock_proto::{
    CancelWhy, End, Failure, LinkCause, Misfit, Refusal, RoleKind, RoomRefusal, SessionEnd, Stage, TargetId,
    Who,
};
use crossdock_transport::{DownCause, Fence, GrantId};
use serde::{Deserialize, Serialize};

/// The form of the lines. A reader of this version reads later ones as long as this number is the same.
pub const VERSION: u32 = 1;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Line {
    /// The first.
    Header(Header),
    /// Begins the events of a ring.
    Ring(Ring),
    /// One event.
    Event(Box<Event>),
    /// The last: so many events there were.
    End {
        /// Of all rings.
        events: u64,
    },
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// Whose dump it is, and how its times are to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`].
    pub version: u32,
    /// What wrote it.
    pub software: Cow<'static, str>,
    /// The node's name for people.
    pub name: String,
    /// The node, in hexadecimal digits.
    pub node: String,
    /// Which of its lives.
    pub incarnation: String,
    /// Why it was written: `asked`, `panicked`, `room-failed` or `session-lost`.
    pub reason: Cow<'static, str>,
    /// The room that failed first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<u64>,
    /// Which use of its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_count: Option<u32>,
    /// Which share of the request, if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<u32>,
    /// The clock of the events, when the dump was taken.
    pub monotonic_ns: u64,
    /// The wall clock at the same moment, since 1970.
    pub unix_ns: u64,
}

/// Whose events follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Its number in this dump; 0 is the node's own.
    pub ring: u32,
    /// The peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
    /// Older events that were overwritten.
    pub overwritten: u64,
}

/// A peer, as the node knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name for people.
    pub name: String,
    /// The node, in hexadecimal digits.
    pub node: String,
    /// Its life in the latest session.
    pub incarnation: String,
    /// The transport.
    pub port: Cow<'static, str>,
}

macro_rules! event {
    ($($(#[$doc:meta])* $field:ident: $type:ty,)*) => {
        /// One event. Which fields there are depends on its kind.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        pub struct Event {
            /// What happened.
            #[serde(rename = "event")]
            pub kind: Kind,
            /// Counts the events of the node's life.
            pub serial: u64,
            /// On the node's monotonic clock.
            pub at_ns: u64,
            $($(#[$doc])* #[serde(default, skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
        }
    };
}

event! {
    /// The node's number for the session.
    session: u32,
    /// The router's number for the request.
    room: u64,
    /// Which use of that number.
    use_count: u32,
    /// Which share of the request, if there are several.
    share: u32,
    /// Whether somebody will ask about it.
    failed: bool,
    /// What is dialed.
    address: String,
    /// The peer's life.
    incarnation: String,
    /// Which side: `here` or `peer`.
    by: Cow<'static, str>,
    /// The end of a room: `receive`, `send`, `fetch` or `serve`.
    role: Cow<'static, str>,
    /// Pages.
    pages: u32,
    /// What is left of the room's time.
    left_ms: u32,
    /// How long it took the room to know its peer.
    waited_ms: u32,
    /// A grant, `index/generation`.
    grant: String,
    /// How often the room was begun before.
    attempt: u32,
    /// A lane.
    lane: u8,
    /// Lanes that are up.
    lanes: u8,
    /// Bytes posted.
    bytes: u64,
    /// Of so many.
    of_bytes: u64,
    /// Layers that both sides hold.
    layers: u16,
    /// The attempt ended with this.
    last: bool,
    /// Immediates counted.
    counted: u32,
    /// Of so many.
    expected: u32,
    /// How far the room had come.
    stage: Cow<'static, str>,
    /// How long before the room was opened.
    age_ms: u32,
    /// How long before it had met its peer.
    met_ms: u32,
    /// Since the last bytes came.
    quiet_ms: u32,
    /// Since anything was heard of the peer.
    silent_ms: u32,
    /// Rooms that ended with a session.
    rooms: u32,
    /// What the ports promise: `now`, `when-down` or `never`.
    fence: Cow<'static, str>,
    /// Why a room was given up, as it travels.
    why: Cow<'static, str>,
    /// Why.
    cause: Cause,
}

/// Why something ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// For programs: words from the general to the particular, with slashes between.
    pub code: String,
    /// For people.
    pub text: String,
    /// What can be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<Cow<'static, str>>,
    /// Whether the same may succeed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retryable: Option<bool>,
}

/// The kinds of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // Each is specified in docs/flight-recorder.md.
pub enum Kind {
    Dialed,
    NotReached,
    SessionBegan,
    SessionUp,
    SessionDown,
    LaneUp,
    LaneDown,
    LaneLostThere,
    LaneOffered,
    LaneBack,
    Opened,
    Bound,
    Parked,
    TurnedAway,
    WantSent,
    WantCame,
    GrantSent,
    GrantCame,
    Posting,
    Posted,
    Arriving,
    FinishSent,
    FinishCame,
    Landed,
    DeliveredSent,
    DeliveredCame,
    CancelSent,
    CancelCame,
    Ended,
    Revoked,
    Quarantined,
    ReleaseSent,
    ReleaseCame,
    Home,
    /// Of a later version.
    #[default]
    #[serde(other)]
    Unknown,
}

impl Kind {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Dialed => "dialed",
            Self::NotReached => "not reached",
            Self::SessionBegan => "session began",
            Self::SessionUp => "session up",
            Self::SessionDown => "session down",
            Self::LaneUp => "lane up",
            Self::LaneDown => "lane down",
            Self::LaneLostThere => "lane lost there",
            Self::LaneOffered => "lane offered",
            Self::LaneBack => "lane back",
            Self::Opened => "opened",
            Self::Bound => "met peer",
            Self::Parked => "peer waits",
            Self::TurnedAway => "turned away",
            Self::WantSent => "want →",
            Self::WantCame => "→ want",
            Self::GrantSent => "grant →",
            Self::GrantCame => "→ grant",
            Self::Posting => "first post",
            Self::Posted => "posted",
            Self::Arriving => "first arrival",
            Self::FinishSent => "finish →",
            Self::FinishCame => "→ finish",
            Self::Landed => "landed",
            Self::DeliveredSent => "delivered →",
            Self::DeliveredCame => "→ delivered",
            Self::CancelSent => "cancel →",
            Self::CancelCame => "→ cancel",
            Self::Ended => "ended",
            Self::Revoked => "revoked",
            Self::Quarantined => "quarantined",
            Self::ReleaseSent => "release →",
            Self::ReleaseCame => "→ release",
            Self::Home => "pages home",
            Self::Unknown => "?",
        }
    }
}

/// A number as the header writes it.
pub(crate) fn hex(number: u64) -> String {
    format!("{number:016x}")
}

/// A text of which so much is written: a peer may have sent it, and each letter of it may take six bytes.
pub(crate) fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Letters of a name in a dump.
pub(crate) const LONGEST_NAME: usize = 256;

/// Letters of what went wrong, or of an address. A few of them fit into a line.
const LONGEST_TEXT: usize = 2_000;

impl Event {
    /// The event of a record.
    pub fn of(record: &Record, address: impl Fn(TargetId) -> Option<String>) -> Self {
        let mut event = Event {
            serial: record.serial,
            at_ns: record.at_ns,
            session: record.session.map(|session| session.0),
            room: record.room.map(|name| name.room),
            use_count: record.room.map(|name| name.use_count),
            share: record.room.map(|name| name.share).filter(|&share| share > 0),
            failed: record.what.is_failure().then_some(true),
            ..Self::default()
        };
        event.fill(&record.what, address);
        event
    }

    fn fill(&mut self, what: &What, address_of: impl Fn(TargetId) -> Option<String>) {
        match *what {
            What::Dialed { target } => {
                self.kind = Kind::Dialed;
                self.address = address_of(target).map(|address| cut(&address, LONGEST_TEXT));
            }
            What::NotReached { target, ref cause } => {
                self.kind = Kind::NotReached;
                self.address = address_of(target).map(|address| cut(&address, LONGEST_TEXT));
                self.cause = Some(Cause::of_session(cause));
            }
            What::SessionBegan { incarnation, is_dialer } => {
                self.kind = Kind::SessionBegan;
                self.incarnation = Some(hex(incarnation));
                self.by = Some(if is_dialer { "here" } else { "peer" }.into());
            }
            What::SessionUp { lanes } => {
                self.kind = Kind::SessionUp;
                self.lanes = Some(lanes);
            }
            What::SessionDown { ref cause, rooms, silent_ms } => {
                self.kind = Kind::SessionDown;
                self.cause = Some(Cause::of_session(cause));
                (self.rooms, self.silent_ms) = (Some(rooms), Some(silent_ms));
            }
            What::LaneUp { slot } => {
                (self.kind, self.lane) = (Kind::LaneUp, Some(slot));
            }
            What::LaneDown { slot, ref cause } => {
                (self.kind, self.lane) = (Kind::LaneDown, Some(slot));
                self.cause = Some(Cause::of_lane(cause));
            }
            What::LaneLostThere { slot } => {
                (self.kind, self.lane) = (Kind::LaneLostThere, Some(slot));
            }
            What::LaneOffered { slot } => {
                (self.kind, self.lane) = (Kind::LaneOffered, Some(slot));
            }
            What::LaneBack { slot } => {
                (self.kind, self.lane) = (Kind::LaneBack, Some(slot));
            }
            What::Opened { role, pages, left_ms } => {
                self.kind = Kind::Opened;
                self.role = Some(role_word(role).into());
                (self.pages, self.left_ms) = (Some(pages), Some(left_ms));
            }
            What::Bound { role, pages, waited_ms, left_ms } => {
                self.kind = Kind::Bound;
                self.role = Some(role_word(role).into());
                (self.pages, self.waited_ms, self.left_ms) = (Some(pages), Some(waited_ms), Some(left_ms));
            }
            What::Parked { role } => {
                self.kind = Kind::Parked;
                self.role = Some(role_word(role).into());
            }
            What::TurnedAway { why } => {
                (self.kind, self.why) = (Kind::TurnedAway, Some(why_word(why).into()));
            }
            What::WantSent => self.kind = Kind::WantSent,
            What::WantCame => self.kind = Kind::WantCame,
            What::GrantSent { grant, attempt, pages } => {
                self.kind = Kind::GrantSent;
                (self.grant, self.attempt, self.pages) = (Some(name(grant)), Some(attempt), Some(pages));
            }
            What::GrantCame { grant, attempt, pages } => {
                self.kind = Kind::GrantCame;
                (self.grant, self.attempt, self.pages) = (Some(name(grant)), Some(attempt), Some(pages));
            }
            What::Posting => self.kind = Kind::Posting,
            What::Posted { bytes, of_bytes, layers, is_last } => {
                self.kind = Kind::Posted;
                (self.bytes, self.of_bytes, self.layers) = (Some(bytes), Some(of_bytes), Some(layers));
                self.last = is_last.then_some(true);
            }
            What::Arriving { slot } => (self.kind, self.lane) = (Kind::Arriving, Some(slot)),
            What::FinishSent { attempt, arrivals } => {
                self.kind = Kind::FinishSent;
                (self.attempt, self.expected) = (Some(attempt), Some(arrivals));
            }
            What::FinishCame { attempt, expected, counted } => {
                self.kind = Kind::FinishCame;
                (self.attempt, self.expected, self.counted) = (Some(attempt), Some(expected), Some(counted));
            }
            What::Landed { counted } => (self.kind, self.counted) = (Kind::Landed, Some(counted)),
            What::DeliveredSent => self.kind = Kind::DeliveredSent,
            What::DeliveredCame => self.kind = Kind::DeliveredCame,
            What::CancelSent { why } => {
                (self.kind, self.why) = (Kind::CancelSent, Some(why_word(why).into()));
            }
            What::CancelCame { why } => {
                (self.kind, self.why) = (Kind::CancelCame, Some(why_word(why).into()));
            }
            What::Ended { ref end, stage, counted, expected, age_ms, met_ms, quiet_ms, silent_ms } => {
                (self.age_ms, self.met_ms) = (Some(age_ms), met_ms);
                self.kind = Kind::Ended;
                let end = end.as_deref().unwrap_or(&End::Delivered);
                self.cause = Some(Cause::of_end(end));
                self.by = who_ended(end).map(|who| who_word(who).into());
                self.stage = Some(stage_word(stage).into());
                (self.counted, self.expected) = (Some(counted), expected);
                (self.quiet_ms, self.silent_ms) = (Some(quiet_ms), Some(silent_ms));
            }
            What::Revoked { grant, fence } => {
                (self.kind, self.grant) = (Kind::Revoked, Some(name(grant)));
                self.fence = Some(fence_word(fence).into());
            }
            What::Quarantined => self.kind = Kind::Quarantined,
            What::ReleaseSent { grant } => (self.kind, self.grant) = (Kind::ReleaseSent, Some(name(grant))),
            What::ReleaseCame { grant } => (self.kind, self.grant) = (Kind::ReleaseCame, Some(name(grant))),
            What::Home => self.kind = Kind::Home,
        }
    }
}

impl Event {
    /// The memory that it takes.
    pub(crate) fn held_bytes(&self) -> usize {
        let words = [&self.by, &self.role, &self.stage, &self.fence, &self.why];
        let words = words.into_iter().flatten().map(|word| word.len());
        let texts = [&self.address, &self.incarnation, &self.grant];
        let texts = texts.into_iter().flatten().map(String::len);
        let cause = self.cause.as_ref().map_or(0, |cause| {
            cause.code.len() + cause.text.len() + cause.advice.as_ref().map_or(0, |advice| advice.len())
        });
        size_of::<Self>() + words.chain(texts).sum::<usize>() + cause
    }
}

impl Peer {
    /// The memory that it takes.
    pub(crate) fn held_bytes(&self) -> usize {
        self.name.len() + self.node.len() + self.incarnation.len() + self.port.len()
    }
}

impl Cause {
    fn of_end(end: &End) -> Self {
        Self {
            code: end_code(end),
            text: cut(&end.to_string(), LONGEST_TEXT),
            advice: Some(end.advice().into()),
            retryable: Some(end.is_retryable()),
        }
    }

    fn of_session(cause: &SessionEnd) -> Self {
        Self {
            code: session_code(cause),
            text: cut(&cause.to_string(), LONGEST_TEXT),
            advice: Some(cause.advice().into()),
            retryable: Some(cause.is_retryable()),
        }
    }

    fn of_lane(cause: &DownCause) -> Self {
        Self {
            code: lane_code(cause).into(),
            text: cut(&cause.to_string(), LONGEST_TEXT),
            advice: None,
            retryable: None,
        }
    }
}

fn name(grant: GrantId) -> String {
    format!("{}/{}", grant.index(), grant.generation())
}

fn role_word(role: RoleKind) -> &'static str {
    match role {
        RoleKind::Receiving => "receive",
        RoleKind::Sending => "send",
        RoleKind::Fetching => "fetch",
        RoleKind::Serving => "serve",
    }
}

fn why_word(why: CancelWhy) -> &'static str {
    match why {
        CancelWhy::Cancelled => "cancelled",
        CancelWhy::Expired => "expired",
        CancelWhy::Busy => "busy",
        CancelWhy::Failed => "failed",
        CancelWhy::Corrupt => "corrupt",
        CancelWhy::Mismatch => "mismatch",
    }
}

fn who_word(who: Who) -> &'static str {
    match who {
        Who::Here => "here",
        Who::Peer => "peer",
    }
}

fn stage_word(stage: Stage) -> &'static str {
    match stage {
        Stage::Session => "session",
        Stage::Grant => "grant",
        Stage::Transfer => "transfer",
        Stage::Confirm => "confirm",
        Stage::Verify => "verify",
    }
}

fn fence_word(fence: Fence) -> &'static str {
    match fence {
        Fence::Now => "now",
        Fence::WhenDown => "when-down",
        Fence::Never => "never",
    }
}

/// Which side's doing an end was; `None`: neither's.
fn who_ended(end: &End) -> Option<Who> {
    match *end {
        End::Cancelled { by }
        | End::Expired { by, .. }
        | End::Refused { by, .. }
        | End::Failed { by, .. } => Some(by),
        _ => None,
    }
}

fn end_code(end: &End) -> String {
    match end {
        End::Delivered => "delivered".into(),
        End::Cancelled { .. } => "cancelled".into(),
        End::Expired { stage, .. } => format!("expired/{}", stage_word(*stage)),
        End::PeerLost { cause } => format!("peer-lost/{}", session_code(cause)),
        End::Refused { why, .. } => match why {
            RoomRefusal::Busy => "refused/busy".into(),
            RoomRefusal::Mismatch(misfit) => format!("refused/mismatch/{}", misfit_code(misfit)),
            RoomRefusal::Duplicate => "refused/duplicate".into(),
            RoomRefusal::TooLong { .. } => "refused/too-long".into(),
            RoomRefusal::Handshake(refusal) => format!("refused/handshake/{}", refusal_code(refusal)),
            _ => "refused/other".into(),
        },
        End::Failed { cause, .. } => match cause {
            Failure::Lane(cause) => format!("failed/lane/{}", lane_code(cause)),
            Failure::Port(error) => format!("failed/port/{}", port_code(error)),
            Failure::Checksum => "failed/checksum".into(),
            Failure::TooLong { .. } => "failed/too-long".into(),
            Failure::AtPeer => "failed/at-peer".into(),
            _ => "failed/other".into(),
        },
        _ => "other".into(),
    }
}

fn session_code(cause: &SessionEnd) -> String {
    match cause {
        SessionEnd::ClosedHere => "closed-here".into(),
        SessionEnd::ClosedByPeer => "closed-by-peer".into(),
        SessionEnd::StreamEnded { cause } => format!("stream-ended/{}", link_code(cause)),
        SessionEnd::Silent { .. } => "silent".into(),
        SessionEnd::NoHeartbeats { cause } => format!("no-heartbeats/{}", link_code(cause)),
        SessionEnd::Restarted => "restarted".into(),
        SessionEnd::LanesLost { cause } => format!("lanes-lost/{}", lane_code(cause)),
        SessionEnd::HandshakeTimedOut => "handshake-timed-out".into(),
        SessionEnd::Unreachable { cause } => format!("unreachable/{}", link_code(cause)),
        SessionEnd::Refused { refusal, .. } => format!("refused/{}", refusal_code(refusal)),
        SessionEnd::Misbehaved { .. } => "misbehaved".into(),
        SessionEnd::Port(error) => format!("port/{}", port_code(error)),
        _ => "other".into(),
    }
}

fn link_code(cause: &LinkCause) -> &'static str {
    match cause {
        LinkCause::ClosedHere => "closed-here",
        LinkCause::ClosedByPeer => "closed-by-peer",
        LinkCause::Broken { .. } => "broken",
        LinkCause::ConnectTimedOut => "connect-timed-out",
        LinkCause::Silent => "silent",
        LinkCause::Unproven => "unproven",
        LinkCause::PeerMisbehaved { .. } => "misbehaved",
        LinkCause::NotRead { .. } => "not-read",
        LinkCause::BadAddress { .. } => "bad-address",
        LinkCause::Limit { .. } => "limit",
        _ => "other",
    }
}

fn lane_code(cause: &DownCause) -> &'static str {
    match cause {
        DownCause::ClosedHere => "closed-here",
        DownCause::ClosedByPeer => "closed-by-peer",
        DownCause::PeerDied => "peer-died",
        DownCause::Broken { .. } => "broken",
        DownCause::NotAuthentic => "not-authentic",
        DownCause::PeerMisbehaved { .. } => "misbehaved",
        DownCause::ConnectTimedOut => "connect-timed-out",
        DownCause::LimitReached { .. } => "limit",
        DownCause::Device(_) => "device",
        DownCause::Driver { .. } => "driver",
        _ => "other",
    }
}

fn refusal_code(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::Version { .. } => "version",
        Refusal::NotAuthentic => "not-authentic",
        Refusal::AuthMismatch => "auth-mismatch",
        Refusal::Fingerprint(_) => "fingerprint",
        Refusal::NoRail { .. } => "no-rail",
        Refusal::Busy => "busy",
        Refusal::Duplicate => "duplicate",
        Refusal::SameNode => "same-node",
        _ => "other",
    }
}

fn misfit_code(misfit: &Misfit) -> &'static str {
    match misfit {
        Misfit::Tokens { .. } => "tokens",
        Misfit::Skipped { .. } => "skipped",
        Misfit::Pages { .. } => "pages",
        Misfit::DuplicatePage { .. } => "duplicate-page",
        Misfit::Lists { .. } => "lists",
        Misfit::Ranks => "ranks",
        Misfit::Rank { .. } => "rank",
        Misfit::Gap => "gap",
        Misfit::Layers { .. } => "layers",
        Misfit::Layouts => "layouts",
        Misfit::TooManyPages { .. } => "too-many-pages",
        Misfit::TooManyPieces { .. } => "too-many-pieces",
        Misfit::Unreadable => "unreadable",
        Misfit::AtPeer => "at-peer",
        _ => "other",
    }
}

fn port_code(error: &crossdock_transport::Error) -> &'static str {
    use crossdock_transport::Error;
    match error {
        Error::LaneNotUp { .. } | Error::LaneDown { .. } | Error::UnknownLane { .. } => "lane",
        Error::UnknownRegion { .. } | Error::OutOfRange { .. } | Error::RegionInUse { .. } => "region",
        Error::BadOp { .. } => "bad-op",
        Error::BadGrant { .. } => "bad-grant",
        Error::BadAddress { .. } => "bad-address",
        Error::BadKey { .. } => "bad-key",
        Error::Limit { .. } => "limit",
        Error::Unsupported { .. } => "unsupported",
        Error::Os { .. } => "os",
        Error::Driver { .. } => "driver",
        _ => "other",
    }
}
