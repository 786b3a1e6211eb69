//! The lanes of a session, from their opening to their `Down`, and how one that was lost comes back.
//!
//! A lane has the number (the *slot*) of its pair of rails for the whole session. When both ends have said that it is
//! lost, nothing that either side will say speaks of it any more, and its number is free for the next lane of the pair:
//!
//! ```text
//! dialer     LaneLost  ◀────────────────▶ LaneLost     acceptor
//!            LaneOffer ─────────────────▶              a lane has been opened here
//!                      ◀───────────────── LaneAnswer   and there; or LaneLost: not now
//!            LaneReady ◀────────────────▶ LaneReady    up, and the other's regions attached
//! ```
//! An end posts on it when both have said LaneReady. One that is lost before that has cost no room anything.

use crossdock_transport::{DownCause, Error, LaneAddress};

use crate::action::Action;
use crate::auth::Side;
use crate::end::SessionEnd;
use crate::flight::What;
use crate::message::Message;
use crate::planted::{Planted, is_planted};
use crate::proto::{Proto, RoomId, SessionId, Timer};
use crate::room::Role;
use crate::session::Phase;

pub(crate) struct Slot {
    /// The rail here.
    rail: u8,
    /// The rail on the peer's.
    peer_rail: u8,
    pub state: SlotState,
    /// Our end's address, until the peer has been told.
    pub ours: Option<LaneAddress>,
    /// The other end's, until we connect.
    pub theirs: Option<LaneAddress>,
    /// What was said of the lane, on either side.
    pub here: Said,
    pub there: Said,
    /// The lane was offered, and the peer has not answered.
    is_asked: bool,
    /// How many lanes of this number there were before.
    nth: u32,
    again: Again,
}

pub(crate) enum SlotState {
    Opening,
    Open,
    Connecting,
    Up,
    /// Up, and the peer's regions are attached.
    Attached,
    Closing,
    Down,
}

/// What one side has said of a lane.
#[derive(Clone, Copy, Default)]
pub(crate) struct Said {
    /// The other side may post on it.
    pub ready: bool,
    /// It is down there.
    lost: bool,
}

/// When the dialer offers a lane again that was lost.
#[derive(Default)]
struct Again {
    due_ns: Option<u64>,
    /// What was waited for last; 0: this is the first time.
    pause_ns: u64,
    /// A lane is on its way, from its opening here until it can be used or is lost; and until when that is waited for: a
    /// peer that does not answer costs the session this lane and no other.
    until_ns: Option<u64>,
    /// Since when the lane that came back can be used.
    back_ns: Option<u64>,
}

impl Slot {
    pub fn new(rail: u8, peer_rail: u8) -> Self {
        Self {
            rail,
            peer_rail,
            state: SlotState::Opening,
            ours: None,
            theirs: None,
            here: Said::default(),
            there: Said::default(),
            is_asked: false,
            nth: 0,
            again: Again::default(),
        }
    }

    pub fn is_usable(&self) -> bool {
        matches!(self.state, SlotState::Attached) && self.is_used()
    }

    /// Whether either side may have posted on it.
    fn is_used(&self) -> bool {
        self.here.ready && self.there.ready
    }

    pub fn is_down(&self) -> bool {
        matches!(self.state, SlotState::Down)
    }

    /// Whether both ends are known to be down.
    pub fn is_over(&self) -> bool {
        self.is_down() && self.here.lost && self.there.lost
    }

    /// The next lane of the number begins.
    fn begin_next(&mut self) {
        (self.here, self.there) = (Said::default(), Said::default());
        self.nth += 1;
        self.again.back_ns = None;
    }
}

impl Proto {
    /// The engine has opened a lane, or could not.
    pub fn lane_opened(
        &mut self,
        now_ns: u64,
        session: SessionId,
        slot: u8,
        opened: Result<LaneAddress, Error>,
    ) {
        self.now_ns = now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        match opened {
            Ok(address) => {
                entry.state = SlotState::Open;
                match s.phase {
                    Phase::SettingUp { .. } => {
                        entry.ours = Some(address);
                        self.send_setup(session);
                    }
                    Phase::Live => self.opened_again(session, slot, address),
                    Phase::Over => self.close_lane(session, slot),
                }
            }
            Err(error) => {
                entry.state = SlotState::Down;
                match s.phase {
                    Phase::Live => self.not_opened_again(session, slot),
                    _ => self.end_session(session, SessionEnd::Port(error)),
                }
                // The session may have ended with another lane's error.
                self.reap(session);
            }
        }
    }

    /// A lane is up.
    pub fn lane_up(&mut self, now_ns: u64, session: SessionId, slot: u8) {
        self.now_ns = now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        let (SlotState::Connecting, Some(setup)) = (&entry.state, &s.peer_setup) else { return };
        entry.state = SlotState::Up;
        let (regions, peer_rail) = (setup.regions.clone(), entry.peer_rail);
        self.note_session(session, None, What::LaneUp { slot });
        self.act(Action::AttachLane { session, slot, regions, peer_rail });
    }

    /// The peer's regions are attached on a lane; or they cannot be, or the lane cannot be connected.
    pub fn lane_attached(&mut self, now_ns: u64, session: SessionId, slot: u8, result: Result<(), Error>) {
        self.now_ns = now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        let is_live = s.phase == Phase::Live;
        match result {
            Ok(()) if matches!(entry.state, SlotState::Up) => {
                entry.state = SlotState::Attached;
                match is_live {
                    true => self.ready_again(session, slot),
                    false => self.ready_when_lanes_known(session),
                }
            }
            Ok(()) => {}
            // The lane ends; its `Down` says the rest.
            Err(Error::LaneDown { .. } | Error::LaneNotUp { .. }) => {
                self.close_lane(session, slot);
                self.ready_when_lanes_known(session);
            }
            Err(_) if is_live => self.close_lane(session, slot),
            Err(error) => self.end_session(session, SessionEnd::Port(error)),
        }
    }

    /// A lane is down here: it touches this node's memory no more.
    pub fn lane_down(&mut self, now_ns: u64, session: SessionId, slot: u8, cause: DownCause) {
        self.now_ns = now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)).filter(|entry| !entry.is_down()) else { return };
        entry.state = SlotState::Down;
        s.has_peer_died |= cause == DownCause::PeerDied;
        self.note_session(session, None, What::LaneDown { slot, cause: Box::new(cause) });
        self.no_more_lands(session, slot);
        // First what this lane was waited for: bytes that are all here need not come again.
        for room in self.rooms_of(session) {
            self.settle(room);
        }
        let Some(s) = self.sessions.get(&session) else { return };
        if s.is_over() {
            self.reap(session);
        } else if s.all_down() || (s.is_live() && !s.has_usable()) {
            self.end_session(session, SessionEnd::by_lane(cause));
        } else if s.is_live() {
            self.lane_lost_here(session, slot);
        } else {
            self.ready_when_lanes_known(session);
        }
    }

    /// What the peer could not speak of in its releases, since it had lost this lane, has landed here or never will.
    fn no_more_lands(&mut self, session: SessionId, slot: u8) {
        for room in self.rooms_of(session) {
            let grants = match self.rooms.get(&room).map(|room| &room.role) {
                Some(Role::Receiving(r)) => r.grants.as_slice(),
                Some(Role::Serving(s)) => s.grant.as_slice(),
                _ => &[],
            };
            for &grant in grants {
                if let Some(given) = self.grants.find_mut(grant) {
                    given.released = given.released.map(|lanes| lanes & !(1 << slot));
                }
            }
        }
    }

    /// Connects once both sides' addresses are known.
    pub(crate) fn connect_lanes(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        if !s.setup_sent || s.peer_setup.is_none() {
            return;
        }
        let mut connect = Vec::new();
        for (at, slot) in (0u8..).zip(&mut s.slots) {
            if let (SlotState::Open, Some(address)) = (&slot.state, slot.theirs.take()) {
                slot.state = SlotState::Connecting;
                connect.push((at, address, s.key.lane_tags(at, slot.nth, s.side)));
            }
        }
        for (slot, address, tags) in connect {
            self.act(Action::ConnectLane { session, slot, address, tags });
        }
    }

    fn ready_when_lanes_known(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Phase::SettingUp { ready_sent, .. } = &mut s.phase else { return };
        let ended = |slot: &Slot| matches!(slot.state, SlotState::Closing | SlotState::Down);
        let attached = |slot: &Slot| matches!(slot.state, SlotState::Attached);
        let known = s.slots.iter().all(|slot| attached(slot) || ended(slot));
        if *ready_sent || !known || !s.slots.iter().any(attached) {
            return;
        }
        *ready_sent = true;
        // One that is down here already may be up there, and used.
        s.slots.iter_mut().for_each(|slot| slot.here.ready = true);
        self.send(session, &Message::Ready);
        self.become_live(session);
    }

    /// The session is ready on both sides: what was lost on the way is said, the rest is used. How many are.
    pub(crate) fn use_first_lanes(&mut self, session: SessionId) -> u8 {
        let Some(s) = self.sessions.get_mut(&session) else { return 0 };
        s.slots.iter_mut().for_each(|slot| slot.there.ready = true);
        let (mut used, mut lost) = (Vec::new(), Vec::new());
        for (at, slot) in (0u8..).zip(&s.slots) {
            used.extend(slot.is_usable().then_some(at));
            lost.extend(slot.is_down().then_some(at));
        }
        let lanes = used.len() as u8;
        used.into_iter().for_each(|slot| self.act(Action::UseLane { session, slot }));
        lost.into_iter().for_each(|slot| self.lane_lost_here(session, slot));
        lanes
    }

    /// A lane of a live session is down here, and others are left.
    fn lane_lost_here(&mut self, session: SessionId, slot: u8) {
        let Some(entry) = self.sessions.get_mut(&session).and_then(|s| s.slots.get_mut(usize::from(slot)))
        else {
            return;
        };
        entry.here.lost = true;
        if entry.is_used() {
            // The prefill ends stop first; then the peer hears of it, and its decode ends grant again.
            for room in self.rooms_of(session) {
                self.prefill_lost_lane(room);
                self.fetching_lost_lane(room);
            }
        }
        self.send(session, &Message::LaneLost { slot });
        self.if_over(session, slot);
    }

    pub(crate) fn lane_lost_there(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)).filter(|entry| !entry.there.lost) else {
            let what = "lost a lane that there is not, or that it had lost before";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        };
        (entry.there.lost, entry.is_asked) = (true, false);
        self.note_session(session, None, What::LaneLostThere { slot });
        self.close_lane(session, slot);
        self.if_over(session, slot);
    }

    /// Begins new attempts when both ends of a lane are down: our own end, so that nothing of the old attempt lands by
    /// it, and the peer's, so that it has noted which rooms to send again. From then on nothing speaks of the lane.
    fn if_over(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        if !entry.is_over() {
            if is_planted(Planted::LaneOfferedTooEarly) && entry.is_down() && s.is_live() {
                self.try_later(session, slot);
            }
            return;
        }
        if entry.is_used() {
            for room in self.rooms_of(session) {
                self.forget_lost_lane(room, slot);
                self.regrant(room);
            }
        }
        self.try_later(session, slot);
    }

    /// The peer's own `Down` has proven what a release of this room's would have had to leave out.
    fn forget_lost_lane(&mut self, room: RoomId, slot: u8) {
        if is_planted(Planted::LostLanesRemembered) {
            return;
        }
        match self.rooms.get_mut(&room).map(|room| &mut room.role) {
            Some(Role::Sending(s)) => s.down_lanes &= !(1 << slot),
            Some(Role::Fetching(f)) => f.down_lanes &= !(1 << slot),
            _ => {}
        }
    }

    pub(crate) fn close_lane(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        match entry.state {
            SlotState::Opening | SlotState::Closing | SlotState::Down => {}
            SlotState::Open | SlotState::Connecting | SlotState::Up | SlotState::Attached => {
                entry.state = SlotState::Closing;
                self.act(Action::CloseLane { session, slot });
            }
        }
    }

    // --- lanes that come back --------------------------------------------------------------------------------

    /// A lane of a live session is over, or did not come up: the dialer offers another after a while.
    fn try_later(&mut self, session: SessionId, slot: u8) {
        let (now_ns, least_ns) = (self.now_ns, self.config.lane_retry_min_ns);
        let most_ns = self.config.lane_retry_max_ns.max(least_ns);
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        let again = &mut entry.again;
        again.until_ns = None;
        if s.side == Side::Acceptor || least_ns == 0 || is_planted(Planted::LaneNeverBack) {
            return;
        }
        if again.back_ns.is_some_and(|back_ns| now_ns.saturating_sub(back_ns) >= most_ns) {
            again.pause_ns = 0;
        }
        again.pause_ns = again.pause_ns.saturating_mul(2).clamp(least_ns, most_ns);
        again.due_ns = Some(now_ns.saturating_add(again.pause_ns));
        self.arm_lanes(session);
    }

    /// Arms the time of the next offer; while a lane is on its way, the end of the wait for it.
    fn arm_lanes(&mut self, session: SessionId) {
        self.disarm_lanes(session);
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let trying_ns = s.slots.iter().filter_map(|slot| slot.again.until_ns).min();
        // What has waited for the one on its way is next; a clock that stands still must not see all of them fail.
        let soonest_ns = self.now_ns + 1;
        let due_ns = trying_ns.or_else(|| s.slots.iter().filter_map(|slot| slot.again.due_ns).min());
        s.lanes_due_ns = due_ns.map(|due_ns| due_ns.max(soonest_ns));
        if let Some(due_ns) = s.lanes_due_ns {
            self.arm(due_ns, Timer::Lanes(session));
        }
    }

    pub(crate) fn disarm_lanes(&mut self, session: SessionId) {
        if let Some(due_ns) = self.sessions.get_mut(&session).and_then(|s| s.lanes_due_ns.take()) {
            self.disarm(due_ns, Timer::Lanes(session));
        }
    }

    /// It is time to open a lane again: first for a pair of rails that has none. Or to wait no longer for one.
    pub(crate) fn lanes_due(&mut self, session: SessionId) {
        let (now_ns, timeout_ns) = (self.now_ns, self.config.handshake_timeout_ns);
        let Some(s) = self.sessions.get_mut(&session) else { return };
        s.lanes_due_ns = None;
        if !s.is_live() || s.has_peer_died {
            return;
        }
        if let Some(slot) = s.slots.iter().position(|slot| slot.again.until_ns.is_some()) {
            if s.slots[slot].again.until_ns <= Some(now_ns) {
                s.slots[slot].again.until_ns = None;
                self.close_lane(session, slot as u8);
            }
            return self.arm_lanes(session);
        }
        let has_lane = |rail: u8| s.slots.iter().any(|slot| slot.rail == rail && slot.is_usable());
        let due = (0u8..).zip(&s.slots).filter_map(|(at, slot)| {
            let due_ns = slot.again.due_ns.filter(|due_ns| *due_ns <= now_ns)?;
            Some((has_lane(slot.rail), due_ns, at))
        });
        let Some((_, _, slot)) = due.min() else { return self.arm_lanes(session) };
        let entry = &mut s.slots[usize::from(slot)];
        (entry.again.due_ns, entry.again.until_ns) = (None, Some(now_ns.saturating_add(timeout_ns)));
        entry.state = SlotState::Opening;
        // Nothing can have been posted on it yet; and until the peer hears of it, it is lost.
        (entry.here.ready, entry.there.ready) = (false, false);
        let rail = entry.rail;
        self.act(Action::OpenLane { session, slot, rail });
        self.arm_lanes(session);
    }

    /// Our end of a lane that is to come back is open.
    fn opened_again(&mut self, session: SessionId, slot: u8, address: LaneAddress) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        match s.side {
            Side::Dialer => {
                entry.begin_next();
                entry.is_asked = true;
                self.note_session(session, None, What::LaneOffered { slot });
                self.send(session, &Message::LaneOffer { slot, address });
            }
            // The dialer has given it up in the meantime.
            Side::Acceptor if entry.there.lost => self.close_lane(session, slot),
            Side::Acceptor => {
                self.send(session, &Message::LaneAnswer { slot, address });
                self.connect_lanes(session);
            }
        }
    }

    fn not_opened_again(&mut self, session: SessionId, slot: u8) {
        match self.sessions.get(&session).map(|s| s.side) {
            // The peer was not told of it.
            Some(Side::Dialer) => self.try_later(session, slot),
            Some(Side::Acceptor) => self.lane_lost_here(session, slot),
            None => {}
        }
    }

    pub(crate) fn on_lane_offer(&mut self, session: SessionId, slot: u8, address: LaneAddress) {
        let is_refused = self.config.lane_retry_min_ns == 0;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let is_dialed = s.side == Side::Acceptor;
        let Some(entry) = s.slots.get_mut(usize::from(slot)).filter(|entry| is_dialed && entry.is_over())
        else {
            let what = "offered a lane that there is not, or that is not lost";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        };
        entry.begin_next();
        if is_refused {
            return self.lane_lost_here(session, slot);
        }
        entry.theirs = Some(address);
        entry.state = SlotState::Opening;
        let rail = entry.rail;
        self.note_session(session, None, What::LaneOffered { slot });
        self.act(Action::OpenLane { session, slot, rail });
    }

    pub(crate) fn on_lane_answer(&mut self, session: SessionId, slot: u8, address: LaneAddress) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)).filter(|entry| entry.is_asked) else {
            let what = "answered an offer of a lane that it has not heard";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        };
        entry.is_asked = false;
        entry.theirs = Some(address);
        self.connect_lanes(session);
    }

    pub(crate) fn on_lane_ready(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let may_be = |entry: &&mut Slot| {
            let is_told = !entry.is_asked && !matches!(entry.state, SlotState::Opening);
            is_told && !entry.there.ready && !entry.there.lost
        };
        let Some(entry) = s.slots.get_mut(usize::from(slot)).filter(may_be) else {
            let what = "has got a lane ready that there is not, or that was ready or lost before";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        };
        entry.there.ready = true;
        self.use_if_ready(session, slot);
    }

    fn ready_again(&mut self, session: SessionId, slot: u8) {
        if let Some(s) = self.sessions.get_mut(&session) {
            s.slots[usize::from(slot)].here.ready = true;
            self.send(session, &Message::LaneReady { slot });
            if is_planted(Planted::LaneUsedTooEarly) {
                self.act(Action::UseLane { session, slot });
            }
            self.use_if_ready(session, slot);
        }
    }

    fn use_if_ready(&mut self, session: SessionId, slot: u8) {
        let now_ns = self.now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let entry = &mut s.slots[usize::from(slot)];
        if !entry.is_usable() {
            return;
        }
        (entry.again.until_ns, entry.again.back_ns) = (None, Some(now_ns));
        self.counters.lanes_back += 1;
        self.note_session(session, None, What::LaneBack { slot });
        self.act(Action::UseLane { session, slot });
        self.arm_lanes(session);
    }
}
