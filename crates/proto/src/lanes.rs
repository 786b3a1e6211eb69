//! The lanes of a session, from their opening to their `Down`.

use crossdock_transport::{DownCause, Error, LaneAddress};

use crate::action::Action;
use crate::end::SessionEnd;
use crate::flight::What;
use crate::message::Message;
use crate::proto::{Proto, SessionId};
use crate::session::Phase;

pub(crate) struct Slot {
    /// The rail on the peer's.
    pub peer_rail: u8,
    pub state: SlotState,
    /// Our end's address, until the peer has been told.
    pub ours: Option<LaneAddress>,
    /// The other end's, until we connect.
    pub theirs: Option<LaneAddress>,
    /// The peer has said that it lost this lane.
    pub lost_there: bool,
}

pub(crate) enum SlotState {
    Opening,
    Open,
    Connecting,
    Up,
    Closing,
    Down(DownCause),
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
                entry.ours = Some(address);
                entry.state = SlotState::Open;
                if s.is_over() {
                    self.close_lane(session, slot);
                } else {
                    self.send_setup(session);
                }
            }
            Err(error) => {
                entry.state = SlotState::Down(DownCause::ClosedHere);
                self.end_session(session, SessionEnd::Port(error));
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
        if matches!(entry.state, SlotState::Connecting) {
            entry.state = SlotState::Up;
            self.note_session(session, None, What::LaneUp { slot });
            self.attach_when_lanes_known(session);
        }
    }

    /// A lane is down here: it touches this node's memory no more.
    pub fn lane_down(&mut self, now_ns: u64, session: SessionId, slot: u8, cause: DownCause) {
        self.now_ns = now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        if matches!(entry.state, SlotState::Down(_)) {
            return;
        }
        entry.state = SlotState::Down(cause);
        self.note_session(session, None, What::LaneDown { slot, cause: Box::new(cause) });
        // First what this lane was waited for: bytes that are all here need not come again.
        for room in self.rooms_of(session) {
            self.settle(room);
        }
        let Some(s) = self.sessions.get(&session) else { return };
        if s.is_over() {
            self.reap(session);
        } else if s.all_down() || (s.is_live() && !s.has_up()) {
            self.end_session(session, SessionEnd::LanesLost { cause });
        } else if s.is_live() {
            self.lane_lost_here(session, slot);
        } else {
            self.attach_when_lanes_known(session);
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
                connect.push((at, address, s.key.lane_tags(at, s.side)));
            }
        }
        for (slot, address, tags) in connect {
            self.act(Action::ConnectLane { session, slot, address, tags });
        }
    }

    fn attach_when_lanes_known(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get(&session) else { return };
        let Phase::SettingUp { ready_sent: false, .. } = s.phase else { return };
        let known = s.slots.iter().all(|slot| matches!(slot.state, SlotState::Up | SlotState::Down(_)));
        if let (true, true, Some(setup)) = (known, s.has_up(), &s.peer_setup) {
            let regions = setup.regions.clone();
            let peer_rails = s.slots.iter().map(|slot| slot.peer_rail).collect();
            self.act(Action::Attach { session, regions, peer_rails });
        }
    }

    /// A lane of a live session went down here, and others are left.
    fn lane_lost_here(&mut self, session: SessionId, slot: u8) {
        // The prefill ends stop first; then the peer hears of it, and its decode ends grant again.
        for room in self.rooms_of(session) {
            self.prefill_lost_lane(room);
            self.fetching_lost_lane(room);
        }
        self.send(session, &Message::LaneLost { slot });
        self.regrant_if_agreed(session, slot);
    }

    pub(crate) fn lane_lost_there(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)).filter(|entry| !entry.lost_there) else {
            let what = "lost a lane that there is not, or that it had lost before";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        };
        entry.lost_there = true;
        self.note_session(session, None, What::LaneLostThere { slot });
        self.close_lane(session, slot);
        self.regrant_if_agreed(session, slot);
    }

    /// Begins new attempts when both ends of a lane are down: our own end, so that nothing of the old attempt
    /// lands by it, and the peer's, so that it has noted which rooms to send again.
    fn regrant_if_agreed(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get(&session) else { return };
        let Some(entry) = s.slots.get(usize::from(slot)) else { return };
        if matches!(entry.state, SlotState::Down(_)) && entry.lost_there && s.has_up() {
            for room in self.rooms_of(session) {
                self.regrant(room);
            }
        }
    }

    pub(crate) fn close_lane(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        match entry.state {
            SlotState::Opening | SlotState::Closing | SlotState::Down(_) => {}
            SlotState::Open | SlotState::Connecting | SlotState::Up => {
                entry.state = SlotState::Closing;
                self.act(Action::CloseLane { session, slot });
            }
        }
    }
}
