//! The state of one node: what it is told, what it asks for, what it says.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crossdock_memory::PageSet;
use crossdock_transport::{Access, Direction, Error, Fence, GrantId, LaneAddress, LaneTags};

use crate::auth::mac;
use crate::config::{Config, Region};
use crate::end::{End, Failure, SessionEnd, Stage, Who};
use crate::grants::{Given, Grants};
use crate::handshake::Link;
use crate::message::{CancelWhy, Identity, Message, RegionOffer, RoomName, RoomOnWire};
use crate::room::{Buffers, Moving, Role, RoleKind, Room, RoomError};
use crate::session::Session;
use crate::targets::Target;

/// A control stream, as its owner numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u32);

/// A session with one life of one peer. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u32);

/// An address that is dialed, and dialed again when the session is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetId(pub u32);

/// One end of a room on this node. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomId(pub u64);

/// How a user names a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerName {
    /// Whoever answers at a dialed address.
    Target(TargetId),
    /// A node, whoever dialed.
    Node(u64),
}

/// What the owner of the protocol is asked to do, in this order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Dial; answer with [`Proto::dialed`].
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
    /// Open a lane; answer with [`Proto::lane_opened`].
    OpenLane {
        /// For which session.
        session: SessionId,
        /// The lane's number in the session.
        slot: u8,
        /// On which rail of this node.
        rail: u8,
    },
    /// Connect an open lane; answered by [`Proto::lane_up`] or [`Proto::lane_down`].
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
    /// Close a lane; answered by [`Proto::lane_down`].
    CloseLane {
        /// Of which session.
        session: SessionId,
        /// Which lane.
        slot: u8,
    },
    /// Attach the peer's regions on every lane that is up; answer with [`Proto::attached`].
    Attach {
        /// Of which session.
        session: SessionId,
        /// The regions; keys are by the peer's rails.
        regions: Vec<RegionOffer>,
        /// For each lane: the peer's rail at its other end.
        peer_rails: Vec<u8>,
    },
    /// Grant a room's pages ([`Proto::granted`]) on every rail of the session; a refusal is told with
    /// [`Proto::room_failed`].
    Grant {
        /// To which session's peer.
        session: SessionId,
        /// Under which name.
        grant: GrantId,
        /// Which room's pages.
        room: RoomId,
    },
    /// Revoke a grant on every rail; answer with [`Proto::revoked`].
    Revoke {
        /// Of which session.
        session: SessionId,
        /// Which grant.
        grant: GrantId,
    },
    /// Post no more for a room; answer with [`Proto::drained`] when its last op has ended.
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

/// What the user of the protocol hears.
#[derive(Debug)]
pub enum Notice {
    /// Rooms with this peer can move now.
    SessionUp {
        /// Which session.
        session: SessionId,
        /// The target that was dialed, if this side dialed.
        target: Option<TargetId>,
        /// Who.
        peer: Identity,
        /// The peer's name for people.
        name: Arc<str>,
        /// The transport of its lanes.
        port: &'static str,
        /// What the peer says about its cache.
        app: Arc<[u8]>,
    },
    /// A session ended, or never came about.
    SessionDown {
        /// Which session; `None` if it ended before it had a number.
        session: Option<SessionId>,
        /// The target that was dialed, if this side dialed.
        target: Option<TargetId>,
        /// Why.
        cause: SessionEnd,
    },
    /// Begin to move a room's bytes, from the first one, also if some have been moved before.
    Start(Start),
    /// A peer wants to read a room's pages. Answer with [`Proto::offer`], or end the room.
    Wanted {
        /// Which room.
        room: RoomId,
        /// From which session's peer.
        session: SessionId,
        /// What the reader told.
        params: Vec<u8>,
    },
    /// Forget how far a room has come; it has ended, or starts again later.
    Stop {
        /// Which room.
        room: RoomId,
    },
    /// All bytes of a room are here. Answer with [`Proto::accept`] or [`Proto::reject`].
    Landed {
        /// Which room.
        room: RoomId,
        /// What the other side sent with the end (push) or the beginning (pull).
        aux: Vec<u8>,
    },
    /// The room has ended on this side. Said once.
    Ended {
        /// Which room.
        room: RoomId,
        /// How.
        end: End,
        /// The peer's name, if there was one.
        peer: Option<Arc<str>>,
        /// The transport between the two.
        port: Option<&'static str>,
    },
    /// The decode side's pages are free of every writer. Said once, with or after [`Notice::Ended`].
    Home {
        /// Which room.
        room: RoomId,
        /// The pages.
        pages: PageSet,
    },
}

/// What it takes to move a room's bytes.
#[derive(Clone, Debug)]
pub struct Start {
    /// Which room.
    pub room: RoomId,
    /// With which session.
    pub session: SessionId,
    /// Write to the peer or read from it.
    pub direction: Direction,
    /// Under which grant.
    pub grant: GrantId,
    /// How often the room was started before.
    pub attempt: u32,
    /// The peer's pages.
    pub remote_pages: Arc<[u32]>,
    /// What the peer told with them.
    pub params: Arc<[u8]>,
}

/// What is counted over the life of a node. Each only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Immediates that were counted for a room.
    pub arrivals: u64,
    /// Immediates of grants that were over.
    pub stale_arrivals: u64,
    /// Control messages received.
    pub messages_in: u64,
    /// Control messages sent.
    pub messages_out: u64,
    /// Bytes of control messages sent.
    pub control_bytes_out: u64,
    /// Rooms that ended delivered.
    pub delivered: u64,
    /// Rooms that ended in any other way.
    pub undelivered: u64,
    /// Attempts begun after the first, because a lane went down.
    pub further_attempts: u64,
    /// Sessions that came up.
    pub sessions: u64,
}

/// The protocol of one node.
///
/// Every method that takes `now_ns` may queue actions and notices; drain both after it.
pub struct Proto {
    pub(crate) config: Config,
    pub(crate) regions: Vec<Region>,
    pub(crate) now_ns: u64,
    pub(crate) links: BTreeMap<LinkId, Link>,
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    /// The current session with each node.
    pub(crate) by_node: BTreeMap<u64, SessionId>,
    pub(crate) targets: BTreeMap<TargetId, Target>,
    pub(crate) rooms: BTreeMap<RoomId, Room>,
    /// Prefill ends that no decode side has asked for yet.
    pub(crate) open: BTreeMap<(RoleKind, RoomName), RoomId>,
    /// Ends that know their session, until they have ended.
    pub(crate) bound: BTreeMap<(SessionId, RoleKind, RoomName), RoomId>,
    /// Decode ends that wait for their session.
    pub(crate) waiting: BTreeSet<RoomId>,
    /// What decode sides asked for before the room was opened here.
    pub(crate) parked: BTreeMap<(RoleKind, RoomName, SessionId), Parked>,
    /// Prefill ends that ended lately: a decode side that asks for one hears so at once.
    pub(crate) ended: VecDeque<(RoleKind, RoomName)>,
    pub(crate) ended_names: BTreeMap<(RoleKind, RoomName), CancelWhy>,
    pub(crate) grants: Grants,
    pub(crate) counters: Counters,
    /// Receiving rooms that have counted something since their user last looked.
    pub(crate) grown: VecDeque<RoomId>,
    timers: BTreeSet<(u64, Timer)>,
    actions: VecDeque<Action>,
    notices: VecDeque<Notice>,
    nonces: u64,
    next_session: u32,
    next_target: u32,
    next_room: u64,
}

pub(crate) struct Parked {
    pub message: Message,
    pub expires_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    Link(LinkId),
    Target(TargetId),
    Session(SessionId),
    Room(RoomId),
    Parked(RoleKind, RoomName, SessionId),
}

impl Proto {
    /// A node that knows nobody yet.
    pub fn new(config: Config) -> Self {
        Self {
            grants: Grants::new(config.max_grants),
            config,
            regions: Vec::new(),
            now_ns: 0,
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            by_node: BTreeMap::new(),
            targets: BTreeMap::new(),
            rooms: BTreeMap::new(),
            open: BTreeMap::new(),
            bound: BTreeMap::new(),
            waiting: BTreeSet::new(),
            parked: BTreeMap::new(),
            ended: VecDeque::new(),
            ended_names: BTreeMap::new(),
            counters: Counters::default(),
            grown: VecDeque::with_capacity(1024),
            timers: BTreeSet::new(),
            actions: VecDeque::new(),
            notices: VecDeque::new(),
            nonces: 0,
            next_session: 0,
            next_target: 0,
            next_room: 0,
        }
    }

    /// Announces a region to every peer that connects from now on.
    pub fn announce(&mut self, region: Region) {
        self.regions.push(region);
    }

    /// This node.
    pub fn identity(&self) -> Identity {
        self.config.identity
    }

    /// What has been counted.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Grants whose index is not free.
    pub fn grants_live(&self) -> usize {
        self.grants.len()
    }

    /// Rooms that are not over in every respect: open ones, and ended ones whose pages or ops are not home.
    pub fn rooms_live(&self) -> usize {
        self.rooms.len()
    }

    /// Sessions that are not over in every respect.
    pub fn sessions_live(&self) -> usize {
        self.sessions.len()
    }

    /// Whether a session's rooms can move.
    pub fn is_live(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_some_and(Session::is_live)
    }

    /// The current session with a peer, if it is up.
    pub fn session_of(&self, peer: PeerName) -> Option<SessionId> {
        let session = match peer {
            PeerName::Target(target) => self.targets.get(&target)?.session()?,
            PeerName::Node(node) => *self.by_node.get(&node)?,
        };
        self.is_live(session).then_some(session)
    }

    /// The peer of a session, and its name for people.
    pub fn peer(&self, session: SessionId) -> Option<(Identity, Arc<str>)> {
        self.sessions.get(&session).map(|s| (s.peer, s.name.clone()))
    }

    /// How many immediates of its current attempt a receiving room has counted: a word that only grows while
    /// the attempt lasts.
    pub fn arrivals(&self, room: RoomId) -> Option<u64> {
        match &self.rooms.get(&room)?.role {
            Role::Receiving(r) => Some(r.arrivals.iter().map(|&n| u64::from(n)).sum()),
            _ => None,
        }
    }

    /// A receiving room whose [arrivals](Proto::arrivals) have grown since this was last told of it.
    pub fn next_arrivals(&mut self) -> Option<(RoomId, u64)> {
        loop {
            let id = self.grown.pop_front()?;
            if let Some(Room { role: Role::Receiving(r), .. }) = self.rooms.get_mut(&id) {
                r.has_grown = false;
                return Some((id, r.arrivals.iter().map(|&n| u64::from(n)).sum()));
            }
        }
    }

    /// The pages and buffers of a room whose grant is asked for.
    pub fn granted(&self, room: RoomId) -> Option<(Access, &[u32], &Buffers)> {
        self.rooms.get(&room)?.granted()
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The next thing to tell the user.
    pub fn next_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// When [`tick`](Proto::tick) has something to do, at the latest.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Lets what is due happen.
    pub fn tick(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        while let Some(&(at, timer)) = self.timers.first() {
            if at > now_ns {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Link(link) => self.link_overdue(link),
                Timer::Target(target) => self.redial(target),
                Timer::Session(session) => self.session_tick(session),
                Timer::Room(room) => self.room_overdue(room),
                Timer::Parked(kind, name, session) => {
                    if let Some(parked) = self.parked.get(&(kind, name, session))
                        && parked.expires_ns <= now_ns
                    {
                        self.parked.remove(&(kind, name, session));
                    }
                }
            }
        }
    }

    /// Ends a room here, as its user wishes. Does nothing if it has ended.
    pub fn cancel(&mut self, now_ns: u64, room: RoomId) {
        self.now_ns = now_ns;
        self.end_room(room, End::Cancelled { by: Who::Here }, Some(CancelWhy::Cancelled));
    }

    /// The bytes of a landed room are right: the peer hears that they were delivered.
    pub fn accept(&mut self, now_ns: u64, room: RoomId) {
        self.now_ns = now_ns;
        self.accept_landed(room);
    }

    /// The bytes of a landed room are not those that were sent.
    pub fn reject(&mut self, now_ns: u64, room: RoomId) {
        self.now_ns = now_ns;
        let end = End::Failed { by: Who::Here, stage: Stage::Verify, cause: Failure::Checksum };
        self.end_room(room, end, Some(CancelWhy::Corrupt));
    }

    /// The two sides of a room do not ask for the same: nothing can be planned.
    pub fn mismatch(&mut self, now_ns: u64, room: RoomId) {
        self.now_ns = now_ns;
        let end = End::Refused { by: Who::Here, why: crate::RoomRefusal::Mismatch };
        self.end_room(room, end, Some(CancelWhy::Mismatch));
    }

    /// A port refused what a room needs.
    pub fn room_failed(&mut self, now_ns: u64, room: RoomId, error: Error) {
        self.now_ns = now_ns;
        let stage = self.rooms.get(&room).map_or(Stage::Grant, |r| r.stage);
        let end = End::Failed { by: Who::Here, stage, cause: Failure::Port(error) };
        self.end_room(room, end, Some(CancelWhy::Failed));
    }

    /// The ports have revoked a grant, and this is the weakest of their promises.
    pub fn revoked(&mut self, now_ns: u64, grant: GrantId, fence: Fence) {
        self.now_ns = now_ns;
        if let Some(given) = self.grants.find_mut(grant) {
            given.fence = Some(fence);
            let room = given.room;
            self.settle(room);
        }
    }

    /// The last op of a stopped room has ended: by its own completion, or, on the lanes of this mask, by their
    /// `Down`.
    pub fn drained(&mut self, now_ns: u64, room: RoomId, down_lanes: u16) {
        self.now_ns = now_ns;
        let Some(r) = self.rooms.get_mut(&room) else { return };
        r.moving = Moving::No;
        match &mut r.role {
            Role::Sending(s) => {
                s.down_lanes |= down_lanes;
                self.sending_drained(room);
            }
            Role::Fetching(_) => self.fetching_drained(room, down_lanes),
            Role::Receiving(_) | Role::Serving(_) => {}
        }
    }

    // --- shared by the parts of this crate -----------------------------------------------------------------

    pub(crate) fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    pub(crate) fn tell(&mut self, notice: Notice) {
        self.notices.push_back(notice);
    }

    pub(crate) fn arm(&mut self, at_ns: u64, timer: Timer) {
        self.timers.insert((at_ns, timer));
    }

    pub(crate) fn disarm(&mut self, at_ns: u64, timer: Timer) {
        self.timers.remove(&(at_ns, timer));
    }

    pub(crate) fn send_link(&mut self, link: LinkId, message: &Message) -> Vec<u8> {
        let mut frame = Vec::new();
        message.encode(self.config.identity, &mut frame);
        self.counters.messages_out += 1;
        self.counters.control_bytes_out += frame.len() as u64;
        self.actions.push_back(Action::Send { link, frame: frame.clone() });
        frame
    }

    /// Sends to the peer of a session; nothing if its control stream has ended.
    pub(crate) fn send(&mut self, session: SessionId, message: &Message) {
        if let Some(link) = self.sessions.get(&session).and_then(|s| s.link) {
            self.send_link(link, message);
        }
    }

    pub(crate) fn nonce(&mut self) -> [u8; 32] {
        self.nonces += 1;
        mac(&self.config.entropy, [&b"nonce"[..], &self.nonces.to_le_bytes()])
    }

    pub(crate) fn new_session_id(&mut self) -> SessionId {
        self.next_session += 1;
        SessionId(self.next_session)
    }

    pub(crate) fn new_target_id(&mut self) -> TargetId {
        self.next_target += 1;
        TargetId(self.next_target)
    }

    /// Adds a room and arms its deadline.
    pub(crate) fn add_room(&mut self, room: Room) -> Result<RoomId, RoomError> {
        self.next_room += 1;
        let id = RoomId(self.next_room);
        self.arm(room.deadline_ns, Timer::Room(id));
        self.rooms.insert(id, room);
        Ok(id)
    }

    pub(crate) fn has_room_for_more(&self) -> Result<(), RoomError> {
        match self.rooms.len() < self.config.max_rooms as usize {
            true => Ok(()),
            false => Err(RoomError::Limit { limit: self.config.max_rooms }),
        }
    }

    pub(crate) fn move_deadline(&mut self, room: RoomId, deadline_ns: u64) {
        if let Some(r) = self.rooms.get_mut(&room) {
            let before = std::mem::replace(&mut r.deadline_ns, deadline_ns);
            self.disarm(before, Timer::Room(room));
            self.arm(deadline_ns, Timer::Room(room));
        }
    }

    /// What is left of a room's time, for the peer.
    pub(crate) fn duration_ns(&self, room: &Room) -> u64 {
        room.deadline_ns.saturating_sub(self.now_ns)
    }

    fn room_overdue(&mut self, room: RoomId) {
        let Some(r) = self.rooms.get(&room) else { return };
        let end = End::Expired { by: Who::Here, stage: r.stage };
        self.end_room(room, end, Some(CancelWhy::Expired));
    }

    /// Ends a room on this side, once. `why` is told to the peer; `None` where the peer knows.
    pub(crate) fn end_room(&mut self, id: RoomId, end: End, why: Option<CancelWhy>) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        if room.end.is_some() {
            return;
        }
        room.end = Some(end.clone());
        let (name, kind, session, deadline) = (room.name, room.role.kind(), room.session, room.deadline_ns);
        let must_stop = room.moving == Moving::Yes;
        if must_stop {
            room.moving = Moving::Stopping;
        }
        self.disarm(deadline, Timer::Room(id));
        match end {
            End::Delivered => self.counters.delivered += 1,
            _ => self.counters.undelivered += 1,
        }
        self.waiting.remove(&id);
        match session {
            Some(session) => {
                self.bound.remove(&(session, kind, name));
            }
            None => {
                self.open.remove(&(kind, name));
            }
        }
        if !kind.is_decode() {
            self.remember_ended(kind, name, why.unwrap_or(CancelWhy::Cancelled));
        }
        if must_stop {
            self.act(Action::StopTransfer { room: id });
        }
        self.tell(Notice::Stop { room: id });
        if let (Some(session), Some(why)) = (session, why) {
            let room = RoomOnWire { name, from_decode: kind.is_decode() };
            self.send(session, &Message::Cancel { room, why });
        }
        let with = session.and_then(|session| self.sessions.get(&session));
        let (peer, port) = (with.map(|s| s.name.clone()), with.map(|s| s.port));
        self.tell(Notice::Ended { room: id, end, peer, port });
        match kind {
            RoleKind::Receiving => self.receiving_ended(id),
            RoleKind::Sending => self.sending_ended(id),
            RoleKind::Fetching => self.fetching_ended(id),
            RoleKind::Serving => self.serving_ended(id),
        }
    }

    fn remember_ended(&mut self, kind: RoleKind, name: RoomName, why: CancelWhy) {
        if self.ended_names.insert((kind, name), why).is_none() {
            self.ended.push_back((kind, name));
        }
        while self.ended.len() > self.config.max_parked as usize {
            if let Some(oldest) = self.ended.pop_front() {
                self.ended_names.remove(&oldest);
            }
        }
    }

    /// Revokes the grants of an ended room that are still alive at the ports.
    pub(crate) fn revoke_all(&mut self, grants: &[GrantId]) {
        for &grant in grants {
            if let Some(given) = self.grants.find(grant)
                && given.fence.is_none()
            {
                let session = given.session;
                self.act(Action::Revoke { session, grant });
            }
        }
    }

    /// Whether no access can land any more under a grant.
    pub(crate) fn is_quiet(&self, given: &Given) -> bool {
        let Some(session) = self.sessions.get(&given.session) else {
            return true;
        };
        if given.released.is_some_and(|mask| session.down_mask() & mask == mask & session.slot_mask()) {
            return true;
        }
        match (given.access, given.fence) {
            (_, None) => false,
            (Access::Write, Some(Fence::Now)) => true,
            (_, Some(Fence::Never)) => session.is_proven_dead(),
            (_, Some(Fence::WhenDown)) | (Access::Read, Some(Fence::Now)) => session.all_down(),
        }
    }

    /// Whether no immediate can come any more under a grant.
    pub(crate) fn is_index_free(&self, given: &Given) -> bool {
        let Some(session) = self.sessions.get(&given.session) else {
            return true;
        };
        let released =
            given.released.is_some_and(|mask| session.down_mask() & mask == mask & session.slot_mask());
        given.fence.is_some() && (released || session.all_down())
    }

    /// Frees the indices of a room's quiescent grants; true if none is left.
    pub(crate) fn free_quiescent(&mut self, grants: &mut Vec<GrantId>) -> bool {
        grants.retain(|&grant| {
            let Some(given) = self.grants.find(grant).copied() else {
                return false;
            };
            let free = self.is_index_free(&given);
            if free {
                self.grants.free(grant);
                if let Some(session) = self.sessions.get_mut(&given.session) {
                    session.grants -= 1;
                }
            }
            !free
        });
        grants.is_empty()
    }

    pub(crate) fn give(&mut self, room: RoomId, session: SessionId, access: Access) -> Option<GrantId> {
        let grant = self.grants.give(room, session, access)?;
        if let Some(session) = self.sessions.get_mut(&session) {
            session.grants += 1;
        }
        Some(grant)
    }

    /// Looks again at an ended (or landing) room after something about its grants, lanes or ops has changed.
    pub(crate) fn settle(&mut self, id: RoomId) {
        let Some(kind) = self.rooms.get(&id).map(|room| room.role.kind()) else { return };
        match kind {
            RoleKind::Receiving => self.settle_receiving(id),
            RoleKind::Sending => self.settle_sending(id),
            RoleKind::Fetching => self.settle_fetching(id),
            RoleKind::Serving => self.settle_serving(id),
        }
    }

    /// Drops a room that is over in every respect.
    pub(crate) fn drop_room(&mut self, id: RoomId) {
        if let Some(room) = self.rooms.remove(&id)
            && let Some(session) = room.session
        {
            if let Some(s) = self.sessions.get_mut(&session) {
                s.rooms.remove(&id);
            }
            self.reap(session);
        }
    }

    pub(crate) fn room_end_from(why: CancelWhy, stage: Stage) -> End {
        let by = Who::Peer;
        match why {
            CancelWhy::Cancelled => End::Cancelled { by },
            CancelWhy::Expired => End::Expired { by, stage },
            CancelWhy::Busy => End::Refused { by, why: crate::RoomRefusal::Busy },
            CancelWhy::Mismatch => End::Refused { by, why: crate::RoomRefusal::Mismatch },
            CancelWhy::Failed => End::Failed { by, stage, cause: Failure::AtPeer },
            CancelWhy::Corrupt => End::Failed { by, stage: Stage::Verify, cause: Failure::Checksum },
        }
    }
}
