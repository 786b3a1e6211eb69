//! Targets: addresses that are dialed, and dialed again when the session is lost.

use crate::action::Action;
use crate::end::{End, RoomRefusal, SessionEnd, Who};
use crate::handshake::Link;
use crate::message::{Identity, Refusal};
use crate::notice::Notice;
use crate::proto::{LinkId, PeerName, Proto, SessionId, TargetId, Timer};

/// An address that is dialed.
pub(crate) struct Target {
    pub address: String,
    pub state: TargetState,
    pub backoff_ns: u64,
}

pub(crate) enum TargetState {
    /// Dialed again when its timer fires.
    Pausing,
    Dialing,
    Session(SessionId),
    /// Refused for good; not dialed again.
    Refused(Who, Refusal),
    Closed,
}

impl Target {
    pub fn session(&self) -> Option<SessionId> {
        match self.state {
            TargetState::Session(session) => Some(session),
            _ => None,
        }
    }
}

impl Proto {
    /// Dials an address now, and again whenever the session with it is lost.
    pub fn connect(&mut self, now_ns: u64, address: impl Into<String>) -> TargetId {
        self.now_ns = now_ns;
        let target = self.new_target_id();
        let address = address.into();
        self.targets.insert(
            target,
            Target {
                address: address.clone(),
                state: TargetState::Dialing,
                backoff_ns: self.config.redial_min_ns,
            },
        );
        self.act(Action::Dial { target, address });
        target
    }

    /// Ends the session with a target, if there is one, and dials it no more.
    pub fn disconnect(&mut self, now_ns: u64, target: TargetId) {
        self.now_ns = now_ns;
        let Some(t) = self.targets.get_mut(&target) else { return };
        let session = t.session();
        t.state = TargetState::Closed;
        if let Some(session) = session {
            self.end_session(session, SessionEnd::ClosedHere);
        }
    }

    /// The network has taken a dial; `None`: it could not.
    pub fn dialed(&mut self, now_ns: u64, target: TargetId, link: Option<LinkId>) {
        self.now_ns = now_ns;
        match link {
            Some(link) => self.add_link(link, Link::Dialing { target }),
            None => self.target_failed(target, SessionEnd::Unreachable),
        }
    }

    /// A target turned out to be a peer with whom there is (or will soon be) a session that the peer began.
    pub(crate) fn adopt(&mut self, target: TargetId, peer: Identity) {
        let session = self.by_node.get(&peer.node).copied();
        let Some(t) = self.targets.get_mut(&target) else { return };
        match session.filter(|_| !matches!(t.state, TargetState::Closed)) {
            Some(session) => {
                t.state = TargetState::Session(session);
                if let Some(s) = self.sessions.get_mut(&session) {
                    s.target.get_or_insert(target);
                }
                self.bind_waiting(session);
            }
            // The peer's dial is still on its way: look again soon.
            None => self.pause_target(target),
        }
    }

    /// Dials a target whose pause is over.
    pub(crate) fn redial(&mut self, target: TargetId) {
        let Some(t) = self.targets.get_mut(&target) else { return };
        if matches!(t.state, TargetState::Pausing) {
            t.state = TargetState::Dialing;
            let address = t.address.clone();
            self.act(Action::Dial { target, address });
        }
    }

    /// A dial came to nothing.
    pub(crate) fn target_failed(&mut self, target: TargetId, cause: SessionEnd) {
        self.tell(Notice::SessionDown { session: None, target: Some(target), cause: cause.clone() });
        self.target_lost(target, cause);
    }

    pub(crate) fn target_lost(&mut self, target: TargetId, cause: SessionEnd) {
        let Some(t) = self.targets.get_mut(&target) else { return };
        if matches!(t.state, TargetState::Closed) {
            return;
        }
        if let SessionEnd::Refused { by, refusal } = &cause
            && !cause.is_retryable()
        {
            // Dialing again cannot help: whoever waits for this peer hears at once.
            t.state = TargetState::Refused(*by, refusal.clone());
            for room in self.waiting.clone() {
                if self.rooms.get(&room).and_then(|r| r.peer) == Some(PeerName::Target(target)) {
                    let why = RoomRefusal::Handshake(refusal.clone());
                    self.end_room(room, End::Refused { by: *by, why }, None);
                }
            }
            return;
        }
        self.pause_target(target);
    }

    fn pause_target(&mut self, target: TargetId) {
        let Some(t) = self.targets.get_mut(&target) else { return };
        t.state = TargetState::Pausing;
        let at = self.now_ns + t.backoff_ns;
        t.backoff_ns = (t.backoff_ns * 2).min(self.config.redial_max_ns);
        self.arm(at, Timer::Target(target));
    }

    /// Lets decode ends that waited for this session begin.
    pub(crate) fn bind_waiting(&mut self, session: SessionId) {
        if !self.is_live(session) {
            return;
        }
        for room in self.waiting.clone() {
            let peer = self.rooms.get(&room).and_then(|r| r.peer);
            if peer.and_then(|peer| self.session_of(peer)) == Some(session) {
                self.waiting.remove(&room);
                self.bind_decode(room, session);
            }
        }
    }
}
