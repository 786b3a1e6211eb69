//! The state of one node, and how its owner drives it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crossdock_transport::{Access, Error, Fence, GrantId};

use crate::action::Action;
use crate::auth::{Auth, mac};
use crate::config::{Config, Region};
use crate::end::{End, Failure, Misfit, Stage, Who};
use crate::flight::{Recorder, What};
use crate::grants::{Grants, Revocation};
use crate::handshake::{Link, With};
use crate::message::{CancelWhy, Identity, Message, RoleKind, RoomName};
use crate::notice::Notice;
use crate::parked::{Ended, Parked, ParkedKey, ParkedUse};
use crate::planted::{Planted, is_planted};
use crate::room::{Buffers, Moving, Role, Room};
use crate::session::Session;
use crate::table::Table;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PeerName {
    /// Whoever answers at a dialed address.
    Target(TargetId),
    /// A node, whoever dialed.
    Node(u64),
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
    /// Lanes that a live session had lost and that can be used again.
    pub lanes_back: u64,
    /// Sessions that came up.
    pub sessions: u64,
}

/// The protocol of one node.
///
/// Every method that takes `now_ns` may queue actions and notices; drain both after it.
pub struct Proto {
    pub(crate) config: Config,
    /// Which rank a peer is, by its `app`.
    pub(crate) rank_of: fn(&[u8]) -> Option<u32>,
    pub(crate) regions: Vec<Region>,
    pub(crate) now_ns: u64,
    pub(crate) links: Table<LinkId, Link>,
    /// The links of handshakes that are not done, by whom they are with.
    pub(crate) handshakes: BTreeSet<(With, LinkId)>,
    pub(crate) sessions: Table<SessionId, Session>,
    /// The current session with each node.
    pub(crate) by_node: BTreeMap<u64, SessionId>,
    pub(crate) targets: Table<TargetId, Target>,
    /// Which targets hold which session.
    pub(crate) holders: BTreeSet<(SessionId, TargetId)>,
    /// Which targets a peer has answered at last.
    pub(crate) answered: BTreeSet<(Identity, TargetId)>,
    pub(crate) rooms: Table<RoomId, Room>,
    /// Prefill ends that no decode side has asked for yet.
    pub(crate) open: BTreeMap<(RoleKind, RoomName), RoomId>,
    /// Ends that know their session, until they have ended.
    pub(crate) bound: BTreeMap<(RoleKind, RoomName, SessionId), RoomId>,
    /// Decode ends that wait for their session.
    pub(crate) waiting: BTreeMap<(PeerName, RoleKind, RoomName), RoomId>,
    /// What decode sides asked for before the room was opened here.
    pub(crate) parked: BTreeMap<ParkedKey, Parked>,
    /// What all of that takes.
    pub(crate) parked_use: ParkedUse,
    /// Prefill ends that ended lately without a decode side: one that asks for such an end hears so at once.
    pub(crate) ended_names: BTreeMap<(RoleKind, RoomName), Ended>,
    /// The same in the order of their ends, by serial.
    pub(crate) ended: VecDeque<(u64, RoleKind, RoomName)>,
    pub(crate) ended_serial: u64,
    pub(crate) grants: Grants,
    pub(crate) counters: Counters,
    pub(crate) recorder: Recorder,
    /// Sessions whose peer waits to hear of grants of earlier ones.
    pub(crate) asking: BTreeSet<SessionId>,
    /// Shut down.
    pub(crate) is_shut: bool,
    /// Receiving rooms that have counted something since their user last looked.
    pub(crate) grown: VecDeque<RoomId>,
    timers: BTreeSet<(u64, Timer)>,
    actions: VecDeque<Action>,
    notices: VecDeque<Notice>,
    nonces: u64,
    next_session: u32,
    next_target: u32,
    pub(crate) next_room: u64,
}

impl Drop for Proto {
    /// Pages that a peer may still read stay out of their pool, as do those that it may still write.
    fn drop(&mut self) {
        for room in self.rooms.values_mut() {
            if let Role::Serving(serving) = &mut room.role
                && serving.grant.is_some()
            {
                std::mem::forget(serving.pages.take());
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    Link(LinkId),
    Target(TargetId),
    Session(SessionId),
    Lanes(SessionId),
    Room(RoomId),
    Parked(RoleKind, RoomName, SessionId),
}

impl Proto {
    /// A node that knows nobody yet.
    ///
    /// # Panics
    /// If the pre-shared key is empty: everybody knows that one.
    pub fn new(config: Config) -> Self {
        assert!(config.auth != Auth::PreSharedKey(Vec::new()), "an empty pre-shared key");
        Self {
            grants: Grants::new(config.max_grants),
            recorder: Recorder::new(config.flight),
            config,
            rank_of: |_| None,
            regions: Vec::new(),
            now_ns: 0,
            links: Table::default(),
            handshakes: BTreeSet::new(),
            sessions: Table::default(),
            by_node: BTreeMap::new(),
            targets: Table::default(),
            holders: BTreeSet::new(),
            answered: BTreeSet::new(),
            rooms: Table::default(),
            open: BTreeMap::new(),
            bound: BTreeMap::new(),
            waiting: BTreeMap::new(),
            parked: BTreeMap::new(),
            parked_use: ParkedUse::default(),
            ended: VecDeque::new(),
            ended_names: BTreeMap::new(),
            ended_serial: 0,
            counters: Counters::default(),
            asking: BTreeSet::new(),
            is_shut: false,
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

    /// Announces a region no more.
    pub fn withdraw(&mut self, region: u32) {
        self.regions.retain(|known| known.region != region);
    }

    /// What peers that connect from now on are told as [`app`](Config::app).
    pub fn set_app(&mut self, app: Vec<u8>) {
        self.config.app = app;
    }

    /// The number of the next session: those that have begun have lower ones.
    pub fn next_session(&self) -> u32 {
        self.next_session.saturating_add(1)
    }

    /// How the rank of each peer that connects from now on is found in its [`app`](Config::app): rooms may be for one rank
    /// only.
    pub fn know_ranks(&mut self, rank_of: fn(&[u8]) -> Option<u32>) {
        self.rank_of = rank_of;
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

    /// What decode sides have asked for whose room is not open here yet.
    pub fn requests_parked(&self) -> usize {
        self.parked.len()
    }

    /// Sessions that are not over in every respect.
    pub fn sessions_live(&self) -> usize {
        self.sessions.len()
    }

    /// How often a room, a session, a grant, a target or a control stream was visited, by its name or on the way through
    /// all: what a turn works through, and what must not grow with those that are there and idle.
    pub fn visits(&self) -> u64 {
        let tables =
            [self.rooms.visits(), self.sessions.visits(), self.targets.visits(), self.links.visits()];
        tables.iter().sum::<u64>() + self.grants.visits()
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

    /// How many lanes of a session can be used, of how many.
    pub fn lanes(&self, session: SessionId) -> Option<(usize, usize)> {
        let slots = &self.sessions.get(&session)?.slots;
        Some((slots.iter().filter(|slot| slot.is_usable()).count(), slots.len()))
    }

    /// Lanes of live sessions that were lost and are not back.
    pub fn lanes_missing(&self) -> usize {
        let live = self.sessions.iter().map(|(_, s)| s).filter(|s| s.is_live());
        live.flat_map(|s| &s.slots).filter(|slot| !slot.is_usable()).count()
    }

    /// The transport of a session's lanes.
    pub fn port(&self, session: SessionId) -> Option<&'static str> {
        self.sessions.get(&session).map(|s| s.port)
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

    /// The next thing to tell the user. To be asked when all actions have been carried out: what follows a
    /// [`Notice::Start`] that was given here goes through [`Action::StopTransfer`].
    pub fn next_notice(&mut self) -> Option<Notice> {
        loop {
            let notice = self.notices.pop_front()?;
            let Notice::Start(start) = &notice else { return Some(notice) };
            if let Some(room) = self.rooms.get_mut(&start.room)
                && room.moving == (Moving::Told { attempt: start.attempt })
            {
                room.moving = Moving::Yes;
                return Some(notice);
            }
            // Withdrawn before anybody heard of it.
        }
    }

    /// When [`tick`](Proto::tick) has something to do, at the latest.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// The sessions that the next [`tick`](Proto::tick) looks after. It goes by what was [heard](Proto::heard) of them.
    pub fn sessions_due(&self, now_ns: u64) -> impl Iterator<Item = SessionId> {
        let due = self.timers.iter().take_while(move |(at, _)| *at <= now_ns);
        due.filter_map(|(_, timer)| match timer {
            Timer::Session(session) => Some(*session),
            _ => None,
        })
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
                Timer::Lanes(session) => self.lanes_due(session),
                Timer::Room(room) => self.room_overdue(room),
                Timer::Parked(kind, name, session) => self.parked_overdue((kind, name, session)),
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
        if self.rooms.get(&room).is_none_or(|r| r.stage != Stage::Verify) {
            return;
        }
        let end = End::Failed { by: Who::Here, stage: Stage::Verify, cause: Failure::Checksum };
        self.end_room(room, end, Some(CancelWhy::Corrupt));
    }

    /// The two sides of a room do not ask for the same: nothing can be planned.
    pub fn mismatch(&mut self, now_ns: u64, room: RoomId, misfit: Misfit) {
        self.now_ns = now_ns;
        let end = End::Refused { by: Who::Here, why: crate::RoomRefusal::Mismatch(misfit) };
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
        if let Some(given) = self.grants.find_mut(grant)
            && given.revocation == Revocation::Asked
        {
            given.revocation = Revocation::Done(fence);
            let room = given.room;
            self.note_room(room, What::Revoked { grant, fence });
            self.settle(room);
        }
    }

    /// The last op of a stopped room has ended: by its own completion, or, on the lanes of this mask, by their
    /// `Down`.
    pub fn drained(&mut self, now_ns: u64, room: RoomId, down_lanes: u16) {
        self.now_ns = now_ns;
        let Some(r) = self.rooms.get_mut(&room) else { return };
        r.moving = Moving::No;
        if r.end.is_some() {
            let deadline_ns = r.deadline_ns;
            self.disarm(deadline_ns, Timer::Room(room));
        }
        let Some(r) = self.rooms.get_mut(&room) else { return };
        // What was on its way on a lane that is down at the peer, too, has ended there.
        let over = r.session.and_then(|s| self.sessions.get(&s)).map_or(0, Session::over_mask);
        let down_lanes =
            if is_planted(Planted::LostLanesRemembered) { down_lanes } else { down_lanes & !over };
        match &mut r.role {
            Role::Sending(s) => {
                s.down_lanes |= down_lanes;
                self.sending_drained(room);
            }
            Role::Fetching(f) => {
                f.down_lanes |= down_lanes;
                self.fetching_drained(room);
            }
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

    pub(crate) fn send_link(&mut self, link: LinkId, message: &Message) {
        let mut frame = Vec::new();
        message.encode(self.config.identity, &mut frame);
        self.send_frame(link, frame);
    }

    pub(crate) fn send_frame(&mut self, link: LinkId, frame: Vec<u8>) {
        self.counters.messages_out += 1;
        self.counters.control_bytes_out += frame.len() as u64;
        self.actions.push_back(Action::Send { link, frame });
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
}
