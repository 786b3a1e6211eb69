//! Targets: addresses that are dialed, and dialed again when the session is lost.
//!
//! A target holds a session with whoever answers at its address; several targets may hold the same one, and so may
//! a target whose peer was faster to dial this node.

use crate::action::Action;
use crate::end::{End, RoomRefusal, SessionEnd};
use crate::flight::What;
use crate::handshake::{Link, With};
use crate::link_cause::LinkCause;
use crate::message::Identity;
use crate::notice::Notice;
use crate::proto::{LinkId, PeerName, Proto, SessionId, TargetId, Timer};

/// An address that is dialed.
pub(crate) struct Target {
    address: String,
    state: TargetState,
    backoff_ns: u64,
    /// Who answered last.
    peer: Option<Identity>,
}

enum TargetState {
    Dialing,
    /// Dialed again when its timer fires.
    Pausing {
        until_ns: u64,
    },
    Session(SessionId),
    /// For good; not dialed again.
    Never(SessionEnd),
}

impl Target {
    pub fn session(&self) -> Option<SessionId> {
        match self.state {
            TargetState::Session(session) => Some(session),
            _ => None,
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// How rooms with it end, if there will never be a session.
    pub fn why_never(&self) -> Option<End> {
        match &self.state {
            TargetState::Never(cause) => Some(end_of_rooms(cause)),
            _ => None,
        }
    }
}

impl Proto {
    /// Dials an address now, and again whenever the session with it is lost.
    pub fn connect(&mut self, now_ns: u64, address: impl Into<String>) -> TargetId {
        self.now_ns = now_ns;
        let target = self.new_target_id();
        if self.is_shut {
            return target;
        }
        let (address, backoff_ns) = (address.into(), self.shortest_pause_ns());
        let dial = address.clone();
        self.targets.insert(target, Target { address, state: TargetState::Dialing, backoff_ns, peer: None });
        self.note_node(What::Dialed { target });
        self.act(Action::Dial { target, address: dial });
        target
    }

    /// Dials a target no more. Its session ends, unless another target holds it too; rooms that wait for it end.
    pub fn disconnect(&mut self, now_ns: u64, target: TargetId) {
        self.now_ns = now_ns;
        let Some(t) = self.targets.get(&target) else { return };
        let session = t.session();
        self.forget_target(target);
        let cause = SessionEnd::ClosedHere;
        self.tell_no_session(target, cause.clone());
        if let Some(session) = session
            && self.targets_of(session).is_empty()
        {
            self.end_session(session, cause);
        }
    }

    /// Drops a target, and what waits for it.
    pub(crate) fn forget_target(&mut self, target: TargetId) {
        self.stop_pause(target);
        if let Some(t) = self.targets.remove(&target) {
            t.session().map(|session| self.holders.remove(&(session, target)));
            t.peer.map(|peer| self.answered.remove(&(peer, target)));
        }
        let links = self.handshakes_with(With::Target(target));
        links.into_iter().for_each(|link| self.close_link(link));
        self.end_waiting(target, &End::PeerLost { cause: SessionEnd::ClosedHere });
    }

    /// The network has taken a dial, or could not.
    pub fn dialed(&mut self, now_ns: u64, target: TargetId, link: Result<LinkId, LinkCause>) {
        self.now_ns = now_ns;
        match link {
            Ok(link) if self.targets.contains_key(&target) => {
                self.add_link(link, Link::Dialing { target });
            }
            // Nobody wants it any more.
            Ok(link) => self.close_link(link),
            Err(cause) => self.target_failed(target, SessionEnd::Unreachable { cause }),
        }
    }

    /// The targets that hold a session.
    pub(crate) fn targets_of(&self, session: SessionId) -> Vec<TargetId> {
        let of_session = (session, TargetId(0))..=(session, TargetId(u32::MAX));
        self.holders.range(of_session).map(|(_, target)| *target).collect()
    }

    /// Gives a target the session that its dial has begun.
    pub(crate) fn target_found(&mut self, target: TargetId, peer: Identity, session: SessionId) {
        self.stop_pause(target);
        self.note_peer(target, peer);
        self.change_target(target, TargetState::Session(session));
    }

    /// A target turned out to be a peer with whom there is a session already, or will be when the peer's own dial
    /// comes through.
    pub(crate) fn adopt(&mut self, target: TargetId, peer: Identity) {
        let session = self.by_node.get(&peer.node).copied();
        let same_life = |session: &SessionId| self.sessions.get(session).is_some_and(|s| s.peer == peer);
        match session.filter(same_life) {
            Some(session) => {
                self.target_found(target, peer, session);
                if self.is_live(session) {
                    self.tell_up(session, Some(target));
                    self.bind_waiting(session);
                }
            }
            None => {
                self.note_peer(target, peer);
                self.pause_target(target);
            }
        }
    }

    /// Lets targets whose peer has dialed this node hold the session, instead of dialing once more.
    pub(crate) fn adopt_pausing(&mut self, peer: Identity, session: SessionId) {
        let is_pausing = |target: &TargetId| {
            self.targets.get(target).is_some_and(|t| matches!(t.state, TargetState::Pausing { .. }))
        };
        let of_peer = (peer, TargetId(0))..=(peer, TargetId(u32::MAX));
        let answered = self.answered.range(of_peer).map(|(_, target)| *target);
        let found: Vec<TargetId> = answered.filter(is_pausing).collect();
        found.into_iter().for_each(|target| self.target_found(target, peer, session));
    }

    /// Dials a target whose pause is over.
    pub(crate) fn redial(&mut self, target: TargetId) {
        self.change_target(target, TargetState::Dialing);
        let Some(address) = self.targets.get(&target).map(|t| t.address.clone()) else { return };
        self.note_node(What::Dialed { target });
        self.act(Action::Dial { target, address });
    }

    /// A dial came to nothing.
    pub(crate) fn target_failed(&mut self, target: TargetId, cause: SessionEnd) {
        if self.targets.contains_key(&target) {
            self.note_node(What::NotReached { target, cause: Box::new(cause.clone()) });
            self.tell_no_session(target, cause.clone());
            self.target_lost(target, &cause);
        }
    }

    fn tell_no_session(&mut self, target: TargetId, cause: SessionEnd) {
        let (peer, port) = (None, None);
        self.tell(Notice::SessionDown { session: None, target: Some(target), peer, port, cause });
    }

    /// A target has no session any more.
    pub(crate) fn target_lost(&mut self, target: TargetId, cause: &SessionEnd) {
        match cause {
            SessionEnd::Refused { .. } | SessionEnd::Unreachable { .. } | SessionEnd::NoHeartbeats { .. }
                if !cause.is_retryable() =>
            {
                // Dialing again cannot help: whoever waits for this peer hears at once.
                self.change_target(target, TargetState::Never(cause.clone()));
                self.end_waiting(target, &end_of_rooms(cause));
            }
            _ => self.pause_target(target),
        }
    }

    /// A session with this target is up: the next pause begins small again.
    pub(crate) fn target_is_up(&mut self, target: TargetId) {
        let backoff_ns = self.shortest_pause_ns();
        if let Some(t) = self.targets.get_mut(&target) {
            t.backoff_ns = backoff_ns;
        }
    }

    fn shortest_pause_ns(&self) -> u64 {
        self.config.redial_min_ns.max(SHORTEST_PAUSE_NS)
    }

    fn pause_target(&mut self, target: TargetId) {
        let longest_ns = self.config.redial_max_ns.max(SHORTEST_PAUSE_NS);
        let Some(t) = self.targets.get_mut(&target) else { return };
        let until_ns = self.now_ns.saturating_add(t.backoff_ns);
        t.backoff_ns = t.backoff_ns.saturating_mul(2).min(longest_ns);
        self.change_target(target, TargetState::Pausing { until_ns });
        self.arm(until_ns, Timer::Target(target));
    }

    /// Every change of a target's state, so that a session's targets are known without looking at all of them.
    fn change_target(&mut self, target: TargetId, state: TargetState) {
        let Some(t) = self.targets.get_mut(&target) else { return };
        t.session().map(|session| self.holders.remove(&(session, target)));
        t.state = state;
        self.holders.extend(t.session().map(|session| (session, target)));
    }

    fn note_peer(&mut self, target: TargetId, peer: Identity) {
        let Some(t) = self.targets.get_mut(&target) else { return };
        t.peer.replace(peer).map(|before| self.answered.remove(&(before, target)));
        self.answered.insert((peer, target));
    }

    fn stop_pause(&mut self, target: TargetId) {
        if let Some(Target { state: TargetState::Pausing { until_ns }, .. }) = self.targets.get(&target) {
            let until_ns = *until_ns;
            self.disarm(until_ns, Timer::Target(target));
        }
    }

    fn end_waiting(&mut self, target: TargetId, end: &End) {
        for room in self.waiting_for(PeerName::Target(target)) {
            self.end_room(room, end.clone(), None);
        }
    }
}

/// How rooms end with a peer with which there will be no session for this reason.
fn end_of_rooms(cause: &SessionEnd) -> End {
    match cause.clone() {
        SessionEnd::Refused { by, refusal } => End::Refused { by, why: RoomRefusal::Handshake(refusal) },
        cause => End::PeerLost { cause },
    }
}

/// However a node is configured, it does not dial more often than this.
const SHORTEST_PAUSE_NS: u64 = 1_000_000;
