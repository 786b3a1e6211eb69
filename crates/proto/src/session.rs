//! Sessions: what two nodes are to each other between the handshake and the last `Down` of their lanes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crossdock_transport::{GrantId, LaneAddress};

use crate::action::Action;
use crate::auth::{SessionKey, Side};
use crate::end::{End, SessionEnd, Stage, Who};
use crate::flight::{RingId, What, millis};
use crate::handshake::Link;
use crate::lanes::{Slot, SlotState};
use crate::link_cause::LinkCause;
use crate::message::{CancelWhy, Identity, Message, RegionOffer, Released, RoleKind, RoomOnWire};
use crate::notice::Notice;
use crate::parked::ParkedUse;
use crate::planted::{Planted, is_planted};
use crate::proto::{LinkId, PeerName, Proto, RoomId, SessionId, TargetId, Timer};
use crate::room::{Moving, Role};

/// One session.
pub(crate) struct Session {
    /// Its control stream, while that lasts.
    pub link: Option<LinkId>,
    pub side: Side,
    pub peer: Identity,
    pub name: Arc<str>,
    /// The transport of its lanes.
    pub port: &'static str,
    pub key: SessionKey,
    pub phase: Phase,
    pub slots: Vec<Slot>,
    pub setup_sent: bool,
    pub peer_setup: Option<PeerSetup>,
    pub began_ns: u64,
    /// For how long nothing was heard while this node listened.
    pub silent_ns: u64,
    pub next_tick_ns: u64,
    /// The largest round trip of a control message so far.
    pub rtt_max_ns: u64,
    /// Where what happens with this peer is recorded.
    pub ring: RingId,
    /// Rooms bound to this session, ended ones whose pages or ops are not home included.
    pub rooms: BTreeSet<RoomId>,
    /// What the peer's requests take that wait for their rooms.
    pub parked_use: ParkedUse,
    /// Grants given to the peer whose index is not free.
    pub grants: usize,
    /// Grants of earlier sessions that the peer still holds pages for, by the room whose ops under them have not
    /// ended.
    pub held: BTreeMap<RoomId, Vec<GrantId>>,
    /// The end of a lane has proven that the peer's process has ended.
    pub has_peer_died: bool,
    /// When the next lane is offered anew, if one is and none is on its way.
    pub lanes_due_ns: Option<u64>,
}

#[derive(PartialEq)]
pub(crate) enum Phase {
    SettingUp { ready_sent: bool, ready_received: bool },
    Live,
    Over,
}

pub(crate) struct PeerSetup {
    pub regions: Arc<[RegionOffer]>,
    pub app: Arc<[u8]>,
    /// Which rank the peer says there that it is.
    pub rank: Option<u32>,
}

impl Session {
    pub fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// Whether we have dialed the peer and do not know yet that it has taken the session up.
    pub fn is_proposed(&self) -> bool {
        self.side == Side::Dialer && self.peer_setup.is_none()
    }

    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// The lanes that are down here.
    pub fn down_mask(&self) -> u16 {
        self.mask(Slot::is_down)
    }

    /// How many lanes there are, those that are down included.
    pub fn lanes(&self) -> usize {
        self.slots.len()
    }

    /// All lanes.
    pub fn slot_mask(&self) -> u16 {
        self.mask(|_| true)
    }

    pub fn all_down(&self) -> bool {
        self.down_mask() == self.slot_mask()
    }

    /// Whether the end of a lane has proven that the peer's process has ended, and no other lane is left.
    pub fn is_proven_dead(&self) -> bool {
        self.all_down() && self.has_peer_died
    }

    /// Whether anything can be posted.
    pub fn has_usable(&self) -> bool {
        self.slots.iter().any(Slot::is_usable)
    }

    /// The lanes on which what the peer has posted may still be on its way: a mask of the peer's that names others speaks
    /// of earlier lanes of the number, which are down here.
    pub fn landing_mask(&self) -> u16 {
        self.mask(|slot| slot.here.ready && !slot.is_down())
    }

    /// The lanes whose two ends are known to be down.
    pub fn over_mask(&self) -> u16 {
        self.mask(Slot::is_over)
    }

    fn mask(&self, which: impl Fn(&Slot) -> bool) -> u16 {
        self.slots.iter().enumerate().filter(|(_, slot)| which(slot)).fold(0, |mask, (at, _)| mask | 1 << at)
    }
}

/// The numbers of regions are below this.
const MAX_REGIONS: u32 = 4096;

impl Proto {
    /// Ends every session and every room; nothing is dialed, accepted or opened any more.
    pub fn shut_down(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.is_shut = true;
        let targets: Vec<TargetId> = self.targets.keys().copied().collect();
        targets.into_iter().for_each(|target| self.forget_target(target));
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            match self.links.get(&link) {
                Some(Link::Bound(session)) => {
                    let session = *session;
                    self.end_session(session, SessionEnd::ClosedHere);
                }
                Some(Link::Closing) | None => {}
                Some(_) => self.close_link(link),
            }
        }
        let rooms: Vec<RoomId> = self.rooms.keys().copied().collect();
        for room in rooms {
            self.end_room(room, End::PeerLost { cause: SessionEnd::ClosedHere }, None);
        }
    }

    /// Ends a session from this side, whoever dialed it: the peer hears a goodbye. Targets that hold it are dialed no
    /// more. A peer that dialed this node may do so again. Does nothing if the session has ended.
    pub fn close_session(&mut self, now_ns: u64, session: SessionId) {
        self.now_ns = now_ns;
        let targets = self.targets_of(session);
        self.end_session(session, SessionEnd::ClosedHere);
        targets.into_iter().for_each(|target| self.forget_target(target));
    }

    /// Ends a session that its owner cannot keep up, for a cause that only the owner sees. Its targets are dialed again,
    /// as after any loss. Does nothing if the session has ended.
    pub fn lose_session(&mut self, now_ns: u64, session: SessionId, cause: SessionEnd) {
        self.now_ns = now_ns;
        self.end_session(session, cause);
    }

    /// When a session's peer was last heard by the heartbeats, and until when this node listened. Silence is the
    /// time between the two: a node that was stopped itself must not take its own pause for the peer's death.
    pub fn heard(&mut self, session: SessionId, heard_ns: u64, listened_ns: u64) {
        if let Some(s) = self.sessions.get_mut(&session) {
            let listened_ns = if is_planted(Planted::OwnPauseCounted) { self.now_ns } else { listened_ns };
            s.silent_ns = listened_ns.saturating_sub(heard_ns);
        }
    }

    /// The network cannot exchange heartbeats with a session's peer.
    pub fn watch_failed(&mut self, now_ns: u64, session: SessionId, cause: LinkCause) {
        self.now_ns = now_ns;
        self.end_session(session, SessionEnd::NoHeartbeats { cause });
    }

    pub(crate) fn send_setup(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        if s.setup_sent || s.slots.iter().any(|slot| matches!(slot.state, SlotState::Opening)) {
            return;
        }
        s.setup_sent = true;
        let lanes =
            (0u8..).zip(&mut s.slots).filter_map(|(at, slot)| Some((at, slot.ours.take()?))).collect();
        let peer = s.peer;
        let regions = self
            .regions
            .iter()
            .map(|r| RegionOffer { region: r.region, bytes: r.bytes, keys: r.keys.clone() })
            .collect();
        // What earlier sessions with this same life of the peer still hold: its answer may bring pages home. There are
        // none where each session is the current one of its node.
        let is_any_over = self.sessions.len() > self.by_node.len();
        let held = is_any_over
            .then(|| self.grants.iter())
            .into_iter()
            .flatten()
            .filter(|(_, given)| {
                given.session != session && self.sessions.get(&given.session).is_some_and(|s| s.peer == peer)
            })
            .map(|(grant, _)| grant)
            .take(HELD_AT_ONCE)
            .collect();
        let mut app = self.config.app.clone();
        if self.config.app_numbers_sessions {
            app.extend(session.0.to_le_bytes());
        }
        self.send(session, &Message::Setup { lanes, regions, app, held });
        self.connect_lanes(session);
    }

    fn on_setup(
        &mut self,
        session: SessionId,
        lanes: Vec<(u8, LaneAddress)>,
        regions: Vec<RegionOffer>,
        app: Vec<u8>,
        held: Vec<GrantId>,
    ) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let repeated = s.peer_setup.is_some() || !matches!(s.phase, Phase::SettingUp { .. });
        let fits = lanes.len() == s.slots.len() && lanes.iter().zip(0u8..).all(|((slot, _), at)| *slot == at);
        // Regions are looked up in lists by their numbers.
        let fits = fits && regions.iter().all(|offer| offer.region < MAX_REGIONS);
        if repeated || !fits {
            return self
                .end_session(session, SessionEnd::Misbehaved { what: "sent a setup that does not fit" });
        }
        let rank = (self.rank_of)(&app);
        s.peer_setup = Some(PeerSetup { regions: regions.into(), app: app.into(), rank });
        let peer = s.peer;
        for ((_, address), slot) in lanes.into_iter().zip(&mut s.slots) {
            slot.theirs = Some(address);
        }
        self.refuse_older_dials(peer);
        self.connect_lanes(session);
        self.answer_held(session, held);
    }

    pub(crate) fn become_live(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Phase::SettingUp { ready_sent: true, ready_received: true } = s.phase else { return };
        s.phase = Phase::Live;
        let lanes = self.use_first_lanes(session);
        self.note_session(session, None, What::SessionUp { lanes });
        self.counters.sessions += 1;
        let targets = self.targets_of(session);
        if targets.is_empty() {
            self.tell_up(session, None);
        }
        for target in targets {
            self.target_is_up(target);
            self.tell_up(session, Some(target));
        }
        self.bind_waiting(session);
    }

    pub(crate) fn tell_up(&mut self, session: SessionId, target: Option<TargetId>) {
        let Some(s) = self.sessions.get(&session) else { return };
        let Some(setup) = &s.peer_setup else { return };
        let (peer, name, port, app) = (s.peer, s.name.clone(), s.port, setup.app.clone());
        self.tell(Notice::SessionUp { session, target, peer, name, port, app });
    }

    /// Lets decode ends that waited for this session begin.
    pub(crate) fn bind_waiting(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get(&session).filter(|s| s.is_live()) else { return };
        let node = PeerName::Node(s.peer.node);
        let targets = self.targets_of(session);
        for peer in targets.into_iter().map(PeerName::Target).chain([node]) {
            for room in self.waiting_for(peer) {
                self.bind_decode(room, session);
            }
        }
    }

    // --- messages of a session -------------------------------------------------------------------------------

    pub(crate) fn on_session_message(&mut self, session: SessionId, message: Message) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let live = s.is_live();
        match message {
            Message::Setup { lanes, regions, app, held } => self.on_setup(session, lanes, regions, app, held),
            Message::Ready => {
                if let Phase::SettingUp { ready_received, .. } = &mut s.phase {
                    *ready_received = true;
                    self.become_live(session);
                }
            }
            Message::Ping { stamp } => self.send(session, &Message::Pong { stamp }),
            Message::Pong { stamp } => {
                s.rtt_max_ns = s.rtt_max_ns.max(self.now_ns.saturating_sub(stamp));
            }
            Message::Goodbye => self.end_session(session, SessionEnd::ClosedByPeer),
            Message::Restart => self.end_session(session, SessionEnd::Restarted),
            Message::Refuse { refusal } if s.is_proposed() => {
                let refusal = refusal.seen_from_there();
                self.end_session(session, SessionEnd::Refused { by: Who::Peer, refusal });
            }
            Message::Release { released, delivered } => self.on_release(session, &released, delivered),
            _ if !live => self.end_session(
                session,
                SessionEnd::Misbehaved { what: "spoke of rooms before the session was ready" },
            ),
            Message::LaneLost { slot } => self.lane_lost_there(session, slot),
            Message::LaneOffer { slot, address } => self.on_lane_offer(session, slot, address),
            Message::LaneAnswer { slot, address } => self.on_lane_answer(session, slot, address),
            Message::LaneReady { slot } => self.on_lane_ready(session, slot),
            Message::Want { room, duration_ns, params } => {
                self.on_want(session, room, duration_ns, params);
            }
            Message::Grant { .. } => self.on_grant(session, message),
            Message::Regrant { room, attempt, grant } => self.on_regrant(session, room, attempt, grant),
            Message::Finish { room, attempt, arrivals, aux } => {
                self.on_finish(session, room, attempt, &arrivals, aux);
            }
            Message::Delivered { room } => self.on_delivered(session, room),
            Message::Cancel { room, from, why } => self.on_cancel(session, room, from.other(), why),
            Message::Hello { .. }
            | Message::Welcome { .. }
            | Message::Prove { .. }
            | Message::Refuse { .. } => {
                let what = "went back to a handshake that is done";
                self.end_session(session, SessionEnd::Misbehaved { what });
            }
        }
    }

    fn on_cancel(&mut self, session: SessionId, room: RoomOnWire, kind: RoleKind, why: CancelWhy) {
        self.parked_cancelled(kind, session, room);
        if let Some(id) = self.spoken_of(kind, session, room) {
            self.note_room(id, What::CancelCame { why });
            let stage = self.rooms.get(&id).map_or(Stage::Grant, |r| r.stage);
            self.end_room(id, Proto::room_end_from(why, stage), None);
        }
    }

    fn on_release(&mut self, session: SessionId, released: &[Released], delivered: bool) {
        let peer = self.sessions.get(&session).map(|s| s.peer);
        for one in released {
            let Some(given) = self.grants.find(one.grant).copied() else {
                continue;
            };
            // Only the peer that holds a grant can give it back, in this session or in an earlier one.
            let holder = self.sessions.get(&given.session).map(|s| s.peer);
            if holder.is_some() && holder == peer {
                let landing = self.sessions.get(&given.session).map_or(0, Session::landing_mask);
                if let Some(given) = self.grants.find_mut(one.grant) {
                    let believed = !is_planted(Planted::DownLanesForgotten);
                    given.released = Some(if believed { one.down_lanes & landing } else { 0 });
                }
                self.note_session(
                    session,
                    self.rooms.get(&given.room).map(|room| room.name),
                    What::ReleaseCame { grant: one.grant },
                );
                self.on_released(given.room, one.grant, delivered);
            }
        }
    }

    // --- ends ------------------------------------------------------------------------------------------------

    pub(crate) fn end_session(&mut self, session: SessionId, cause: SessionEnd) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        if s.is_over() {
            return;
        }
        s.phase = Phase::Over;
        let (link, peer, slots) = (s.link.take(), s.peer, s.slots.len() as u8);
        let (name, port) = (Some(s.name.clone()), Some(s.port));
        let (tick, rooms, silent_ms) = (s.next_tick_ns, s.rooms.len() as u32, millis(s.silent_ns));
        let what = What::SessionDown { cause: Box::new(cause.clone()), rooms, silent_ms };
        self.note_session(session, None, what);
        self.disarm(tick, Timer::Session(session));
        self.disarm_lanes(session);
        if self.by_node.get(&peer.node) == Some(&session) {
            self.by_node.remove(&peer.node);
        }
        if let Some(link) = link {
            if cause != SessionEnd::ClosedByPeer {
                self.send_link(link, &Message::Goodbye);
            }
            self.close_link(link);
        }
        self.act(Action::Unwatch { session });
        for slot in 0..slots {
            self.close_lane(session, slot);
        }
        for room in self.rooms_of(session) {
            self.end_room(room, End::PeerLost { cause: cause.clone() }, None);
        }
        self.unpark_all_of(session);
        let targets = self.targets_of(session);
        if targets.is_empty() {
            let (peer, cause) = (name.clone(), cause.clone());
            self.tell(Notice::SessionDown { session: Some(session), target: None, peer, port, cause });
        }
        for target in targets {
            self.tell(Notice::SessionDown {
                session: Some(session),
                target: Some(target),
                peer: name.clone(),
                port,
                cause: cause.clone(),
            });
            self.target_lost(target, &cause);
        }
        for room in self.rooms_of(session) {
            self.settle(room);
        }
        self.asking.remove(&session);
        self.reap(session);
    }

    /// Forgets a session that is over in every respect.
    pub(crate) fn reap(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get(&session) else { return };
        let opening = s.slots.iter().any(|slot| matches!(slot.state, SlotState::Opening));
        if s.is_over() && s.all_down() && s.grants == 0 && s.rooms.is_empty() && !opening {
            self.recorder.end(s.ring);
            self.sessions.remove(&session);
            self.act(Action::Forget { session });
        }
    }

    /// The peer asks about grants of earlier sessions: those under which nothing is on its way go back at once, the
    /// others when the room that uses them is over.
    fn answer_held(&mut self, session: SessionId, held: Vec<GrantId>) {
        let Some(peer) = self.sessions.get(&session).map(|s| s.peer).filter(|_| !held.is_empty()) else {
            return;
        };
        let of_peer = |of: SessionId| of != session && self.sessions.get(&of).is_some_and(|s| s.peer == peer);
        let mut in_use = BTreeMap::new();
        for (&id, room) in self.rooms.iter() {
            if room.moving == Moving::No || !room.session.is_some_and(of_peer) {
                continue;
            }
            match &room.role {
                Role::Sending(s) => in_use.extend(s.owed.iter().copied().chain(s.grant).map(|g| (g, id))),
                Role::Fetching(f) => in_use.extend(f.grant.map(|grant| (grant, id))),
                Role::Receiving(_) | Role::Serving(_) => {}
            }
        }
        let mut free = Vec::new();
        for grant in held {
            match in_use.get(&grant) {
                None => free.push(grant),
                Some(&room) => {
                    if let Some(s) = self.sessions.get_mut(&session) {
                        s.held.entry(room).or_default().push(grant);
                    }
                    self.asking.insert(session);
                }
            }
        }
        self.release_held(session, &free);
    }

    /// Tells peers that wait for it that a room uses its grants no more.
    pub(crate) fn answer_held_by(&mut self, room: RoomId) {
        for session in self.asking.clone() {
            let Some(s) = self.sessions.get_mut(&session) else { continue };
            let free = s.held.remove(&room).unwrap_or_default();
            if s.held.is_empty() {
                self.asking.remove(&session);
            }
            self.release_held(session, &free);
        }
    }

    /// Ops under these have ended with the lanes of their session: only the peer's own `Down` is proof.
    fn release_held(&mut self, session: SessionId, grants: &[GrantId]) {
        for grants in grants.chunks(RELEASED_AT_ONCE) {
            self.release(session, grants, u16::MAX, false);
        }
    }

    /// Looks after liveness, round trips and the handshake's deadline.
    pub(crate) fn session_tick(&mut self, session: SessionId) {
        let now = self.now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        if s.is_over() {
            return;
        }
        let silent_ns = s.silent_ns;
        let age_ns = now.saturating_sub(s.began_ns);
        let limit_ns = self.config.heartbeat_ns.saturating_mul(self.config.heartbeats_missed.into());
        if matches!(s.phase, Phase::SettingUp { .. }) && age_ns >= self.config.handshake_timeout_ns {
            return self.end_session(session, SessionEnd::HandshakeTimedOut);
        }
        if silent_ns > limit_ns && age_ns > self.config.warm_up_grace_ns {
            return self.end_session(session, SessionEnd::Silent { for_ns: silent_ns });
        }
        let (began_ns, is_live) = (s.began_ns, s.is_live());
        let next = self.next_session_tick(began_ns, !is_live);
        if let Some(s) = self.sessions.get_mut(&session) {
            s.next_tick_ns = next;
        }
        self.arm(next, Timer::Session(session));
        if is_live {
            self.send(session, &Message::Ping { stamp: now });
        }
    }

    /// When a session is looked after next: at each heartbeat, and at the deadline of its handshake.
    pub(crate) fn next_session_tick(&self, began_ns: u64, is_setting_up: bool) -> u64 {
        let beat_ns = self.now_ns.saturating_add(self.config.heartbeat_ns.max(SHORTEST_TICK_NS));
        match is_setting_up {
            true => beat_ns.min(began_ns.saturating_add(self.config.handshake_timeout_ns)),
            false => beat_ns,
        }
    }

    pub(crate) fn rooms_of(&self, session: SessionId) -> Vec<RoomId> {
        self.sessions.get(&session).map(|s| s.rooms.iter().copied().collect()).unwrap_or_default()
    }
}

/// Grants that one message gives back: the list stays far below the longest frame.
const RELEASED_AT_ONCE: usize = 4096;

/// Grants that a setup asks about. What is left is asked about in the setup of the session after it.
const HELD_AT_ONCE: usize = 32_768;

/// Heartbeats are never looked after more often than this.
const SHORTEST_TICK_NS: u64 = 1_000_000;
