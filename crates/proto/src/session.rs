//! Sessions: from the first byte of a control stream to the last `Down` of its lanes.
//!
//! ```text
//! dialer                         acceptor
//!   Hello   ───────────────────────▶          who, nonce, fingerprint, rails
//!           ◀─────────────────────── Welcome  the same, and proof of the shared key
//!   Prove   ───────────────────────▶          proof of the shared key
//!   Setup   ◀──────────────────────▶ Setup    lane addresses, regions, grants still held
//!   Ready   ◀──────────────────────▶ Ready    lanes up, regions attached
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;

use crossdock_transport::{DownCause, Error, GrantId, LaneAddress};

use crate::auth::{SessionKey, Side, same};
use crate::config::Rail;
use crate::end::{End, RoomRefusal, SessionEnd, Stage, Who};
use crate::message::{
    About, CancelWhy, Identity, MAX_LANES, Message, RailOffer, Refusal, RegionOffer, Released, VERSION_MAX,
    VERSION_MIN,
};
use crate::proto::{Action, LinkId, Notice, PeerName, Proto, PulsePlan, RoomId, SessionId, TargetId, Timer};
use crate::room::{Moving, Role, RoleKind};

/// A control stream, by how far its handshake has come.
pub(crate) enum Link {
    /// The network connects.
    Dialing { target: TargetId },
    /// Our `Hello` is out.
    AwaitWelcome { target: TargetId, hello: Vec<u8> },
    /// A peer has dialed us.
    AwaitHello,
    /// Our `Welcome` is out.
    AwaitProve { peer: Identity, about: Box<About>, hello: Vec<u8>, welcome: Vec<u8> },
    /// The handshake is done.
    Bound(SessionId),
    /// Said goodbye or refused; waiting for the stream to end.
    Closing,
}

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

/// One session.
pub(crate) struct Session {
    /// Its control stream, while that lasts.
    pub link: Option<LinkId>,
    pub side: Side,
    pub peer: Identity,
    pub name: Arc<str>,
    /// The transport of its lanes.
    pub port: &'static str,
    pub target: Option<TargetId>,
    key: SessionKey,
    phase: Phase,
    slots: Vec<Slot>,
    setup_sent: bool,
    peer_setup: Option<PeerSetup>,
    began_ns: u64,
    /// For how long nothing was heard while this node listened.
    silent_ns: u64,
    next_tick_ns: u64,
    /// The largest round trip of a control message so far.
    pub rtt_max_ns: u64,
    /// Rooms bound to this session, ended ones whose pages or ops are not home included.
    pub rooms: BTreeSet<RoomId>,
    /// Grants given to the peer whose index is not free.
    pub grants: usize,
    /// Grants of earlier sessions that the peer still holds pages for; answered when our ops under them have
    /// ended.
    held: Vec<GrantId>,
}

#[derive(PartialEq)]
enum Phase {
    SettingUp { ready_sent: bool, ready_received: bool },
    Live,
    Over,
}

struct PeerSetup {
    regions: Vec<RegionOffer>,
    app: Arc<[u8]>,
}

struct Slot {
    /// The rail on the peer's.
    peer_rail: u8,
    state: SlotState,
    /// Our end's address, until the peer has been told.
    ours: Option<LaneAddress>,
    /// The other end's, until we connect.
    theirs: Option<LaneAddress>,
    /// The peer has said that it lost this lane.
    lost_there: bool,
}

enum SlotState {
    Opening,
    Open,
    Connecting,
    Up,
    Closing,
    Down(DownCause),
}

impl Session {
    pub fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// The lanes that are down here.
    pub fn down_mask(&self) -> u16 {
        self.mask(|slot| matches!(slot.state, SlotState::Down(_)))
    }

    /// All lanes.
    pub fn slot_mask(&self) -> u16 {
        self.mask(|_| true)
    }

    pub fn all_down(&self) -> bool {
        self.down_mask() == self.slot_mask()
    }

    /// Whether every lane ended with the proof that the peer's process has.
    pub fn is_proven_dead(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot.state, SlotState::Down(DownCause::PeerDied)))
    }

    fn has_up(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot.state, SlotState::Up))
    }

    fn mask(&self, which: impl Fn(&Slot) -> bool) -> u16 {
        self.slots.iter().enumerate().filter(|(_, slot)| which(slot)).fold(0, |mask, (at, _)| mask | 1 << at)
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

    /// Ends every session; nothing is dialed any more.
    pub fn shut_down(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        for target in self.targets.values_mut() {
            target.state = TargetState::Closed;
        }
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
    }

    /// The network has taken a dial; `None`: it could not.
    pub fn dialed(&mut self, now_ns: u64, target: TargetId, link: Option<LinkId>) {
        self.now_ns = now_ns;
        match link {
            Some(link) => self.add_link(link, Link::Dialing { target }),
            None => self.target_failed(target, SessionEnd::Unreachable),
        }
    }

    /// A dialed control stream is connected.
    pub fn link_opened(&mut self, now_ns: u64, link: LinkId) {
        self.now_ns = now_ns;
        let Some(Link::Dialing { target }) = self.links.get(&link) else { return };
        let target = *target;
        let about = self.about();
        let hello = self
            .send_link(link, &Message::Hello { version_min: VERSION_MIN, version_max: VERSION_MAX, about });
        self.links.insert(link, Link::AwaitWelcome { target, hello });
    }

    /// A peer has dialed us.
    pub fn link_accepted(&mut self, now_ns: u64, link: LinkId) {
        self.now_ns = now_ns;
        self.add_link(link, Link::AwaitHello);
    }

    /// A control stream has ended.
    pub fn link_closed(&mut self, now_ns: u64, link: LinkId) {
        self.now_ns = now_ns;
        match self.links.remove(&link) {
            Some(Link::Dialing { target }) => self.target_failed(target, SessionEnd::Unreachable),
            Some(Link::AwaitWelcome { target, .. }) => self.target_failed(target, SessionEnd::StreamEnded),
            Some(Link::Bound(session)) => {
                if let Some(s) = self.sessions.get_mut(&session) {
                    s.link = None;
                }
                self.end_session(session, SessionEnd::StreamEnded);
            }
            Some(Link::AwaitHello | Link::AwaitProve { .. } | Link::Closing) | None => {}
        }
    }

    /// When a session's peer was last heard by the heartbeats, and until when this node listened. Silence is the
    /// time between the two: a node that was stopped itself must not take its own pause for the peer's death.
    pub fn heard(&mut self, session: SessionId, heard_ns: u64, listened_ns: u64) {
        if let Some(s) = self.sessions.get_mut(&session) {
            s.silent_ns = listened_ns.saturating_sub(heard_ns);
        }
    }

    /// One frame came on a control stream.
    pub fn frame(&mut self, now_ns: u64, link: LinkId, bytes: &[u8]) {
        self.now_ns = now_ns;
        self.counters.messages_in += 1;
        let (from, message) = match Message::decode(bytes) {
            Ok(decoded) => decoded,
            Err(_) => return self.misbehaved(link, "sent a frame that cannot be read"),
        };
        match (self.links.get(&link), message) {
            (Some(Link::AwaitHello), Message::Hello { version_min, version_max, about }) => {
                self.on_hello(link, from, (version_min, version_max), about, bytes);
            }
            (Some(Link::AwaitWelcome { .. }), Message::Welcome { version, about, proof }) => {
                self.on_welcome(link, from, version, about, proof);
            }
            (Some(Link::AwaitWelcome { .. }), Message::Refuse { refusal }) => {
                self.on_refuse(link, refusal);
            }
            (Some(Link::AwaitProve { .. }), Message::Prove { proof }) => self.on_prove(link, from, proof),
            (Some(Link::AwaitProve { .. }), Message::Refuse { .. } | Message::Goodbye) => {
                self.close_link(link)
            }
            (Some(Link::Bound(session)), message) => {
                let session = *session;
                match self.sessions.get(&session) {
                    Some(s) if s.peer == from => self.on_session_message(session, message),
                    Some(_) => {
                        // An earlier (or later) life of the peer speaks: what it refers to is not known here.
                        self.send_link(link, &Message::Restart);
                        self.end_session(session, SessionEnd::Restarted);
                    }
                    None => {}
                }
            }
            (Some(Link::Closing), _) | (None, _) => {}
            (Some(_), _) => self.misbehaved(link, "sent a message out of order"),
        }
    }

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
        let (over, has_up, live) = (s.is_over(), s.has_up(), s.is_live());
        if !over {
            let waiting = s.slots.iter().any(|slot| !matches!(slot.state, SlotState::Down(_)));
            if !has_up && !waiting {
                self.end_session(session, SessionEnd::LanesLost { cause });
            } else if !live {
                self.attach_when_lanes_known(session);
            } else if has_up {
                self.lane_lost_here(session, slot);
            } else {
                self.end_session(session, SessionEnd::LanesLost { cause });
            }
        }
        for room in self.rooms_of(session) {
            self.settle(room);
        }
        self.answer_held();
        self.reap(session);
    }

    /// The peer's regions are attached on every lane that is up, or cannot be.
    pub fn attached(&mut self, now_ns: u64, session: SessionId, result: Result<(), Error>) {
        self.now_ns = now_ns;
        let Some(s) = self.sessions.get_mut(&session) else { return };
        match (result, &mut s.phase) {
            (Ok(()), Phase::SettingUp { ready_sent, .. }) => {
                *ready_sent = true;
                self.send(session, &Message::Ready);
                self.become_live(session);
            }
            (Err(error), Phase::SettingUp { .. }) => self.end_session(session, SessionEnd::Port(error)),
            _ => {}
        }
    }

    // --- handshake -------------------------------------------------------------------------------------------

    fn on_hello(&mut self, link: LinkId, peer: Identity, versions: (u16, u16), about: About, hello: &[u8]) {
        if versions.0 > VERSION_MAX || versions.1 < VERSION_MIN {
            let refusal = Refusal::Version {
                here_min: VERSION_MIN,
                here_max: VERSION_MAX,
                there_min: versions.0,
                there_max: versions.1,
            };
            return self.refuse(link, refusal);
        }
        if let Err(refusal) = self.fits(&about, Side::Acceptor) {
            return self.refuse(link, refusal);
        }
        if self.sessions.len() >= self.config.max_sessions as usize {
            return self.refuse(link, Refusal::Busy);
        }
        let version = versions.1.min(VERSION_MAX);
        let mine = self.about();
        let mut welcome = Vec::new();
        let unproven = Message::Welcome { version, about: mine.clone(), proof: [0; 32] };
        unproven.encode(self.config.identity, &mut welcome);
        let proof = self.config.auth.proof(Side::Acceptor, &[hello, &welcome]);
        self.send_link(link, &Message::Welcome { version, about: mine, proof });
        self.links
            .insert(link, Link::AwaitProve { peer, about: Box::new(about), hello: hello.to_vec(), welcome });
    }

    fn on_welcome(&mut self, link: LinkId, peer: Identity, version: u16, about: About, proof: [u8; 32]) {
        let Some(Link::AwaitWelcome { target, hello }) = self.links.remove(&link) else { return };
        let mut welcome = Vec::new();
        Message::Welcome { version, about: about.clone(), proof: [0; 32] }.encode(peer, &mut welcome);
        let refusal = if !(VERSION_MIN..=VERSION_MAX).contains(&version) {
            Some(Refusal::Version {
                here_min: VERSION_MIN,
                here_max: VERSION_MAX,
                there_min: version,
                there_max: version,
            })
        } else if let Err(refusal) = self.fits(&about, Side::Dialer) {
            Some(refusal)
        } else if !same(&proof, &self.config.auth.proof(Side::Acceptor, &[&hello, &welcome])) {
            Some(Refusal::NotAuthentic)
        } else if self.is_duplicate(peer) {
            Some(Refusal::Duplicate)
        } else {
            None
        };
        if let Some(refusal) = refusal {
            self.links.insert(link, Link::Closing);
            self.refuse(link, refusal.clone());
            if refusal == Refusal::Duplicate {
                return self.adopt(target, peer);
            }
            return self.target_failed(target, SessionEnd::Refused { by: Who::Here, refusal });
        }
        let proof = self.config.auth.proof(Side::Dialer, &[&hello, &welcome]);
        self.send_link(link, &Message::Prove { proof });
        self.begin_session(link, Side::Dialer, peer, about, Some(target), &[&hello, &welcome]);
    }

    fn on_refuse(&mut self, link: LinkId, refusal: Refusal) {
        let Some(Link::AwaitWelcome { target, .. }) = self.links.remove(&link) else { return };
        self.close_link(link);
        let refusal = refusal.seen_from_there();
        self.target_failed(target, SessionEnd::Refused { by: Who::Peer, refusal });
    }

    fn on_prove(&mut self, link: LinkId, from: Identity, proof: [u8; 32]) {
        let Some(Link::AwaitProve { peer, about, hello, welcome }) = self.links.remove(&link) else { return };
        if from != peer || !same(&proof, &self.config.auth.proof(Side::Dialer, &[&hello, &welcome])) {
            self.links.insert(link, Link::Closing);
            return self.refuse(link, Refusal::NotAuthentic);
        }
        // Only now, when it has proven who it is, may a newcomer end what was there before.
        if let Some(&old) = self.by_node.get(&peer.node) {
            let same_life = self.sessions.get(&old).is_some_and(|s| s.peer == peer);
            let cause = if same_life { SessionEnd::StreamEnded } else { SessionEnd::Restarted };
            self.end_session(old, cause);
        }
        self.begin_session(link, Side::Acceptor, peer, *about, None, &[&hello, &welcome]);
    }

    /// Whether what a peer says of itself fits this node.
    fn fits(&self, about: &About, us: Side) -> Result<(), Refusal> {
        if about.auth != self.config.auth.is_on() {
            return Err(Refusal::AuthMismatch);
        }
        let differences = self.config.fingerprint.differences(&about.fingerprint);
        if !differences.is_empty() {
            return Err(Refusal::Fingerprint(differences));
        }
        if self.pair_rails(about, us).is_empty() {
            let kinds = |rails: &[RailOffer]| {
                rails.iter().map(|rail| rail.kind.clone()).collect::<Vec<_>>().join(", ")
            };
            let here = self.config.rails.iter().map(|rail| rail.kind).collect::<Vec<_>>().join(", ");
            return Err(Refusal::NoRail { here, there: kinds(&about.rails) });
        }
        Ok(())
    }

    /// The lanes of a session as (rail here, rail there), the same list on both sides: all rails of the first
    /// kind, in the dialer's order of preference, of which any two reach each other.
    fn pair_rails(&self, about: &About, us: Side) -> Vec<(u8, u8)> {
        let ours: Vec<RailOffer> = self.config.rails.iter().map(offer).collect();
        let (dialer, acceptor) = match us {
            Side::Dialer => (&ours, &about.rails),
            Side::Acceptor => (&about.rails, &ours),
        };
        let mut pairs: Vec<(u8, u8)> = Vec::new();
        for (d, rail) in dialer.iter().enumerate().take(MAX_LANES) {
            if pairs.first().is_some_and(|&(first, _)| dialer[usize::from(first)].kind != rail.kind) {
                continue;
            }
            let fits = |(a, other): &(usize, &RailOffer)| {
                other.kind == rail.kind
                    && other.reach == rail.reach
                    && !pairs.iter().any(|&(_, used)| usize::from(used) == *a)
            };
            if let Some((a, _)) = acceptor.iter().enumerate().take(MAX_LANES).find(fits) {
                pairs.push((d as u8, a as u8));
            }
        }
        let lanes = self.config.lanes_per_rail.min(about.lanes_per_rail).max(1);
        let lanes = (0..lanes).flat_map(|_| pairs.clone()).take(MAX_LANES);
        match us {
            Side::Dialer => lanes.collect(),
            Side::Acceptor => lanes.map(|(d, a)| (a, d)).collect(),
        }
    }

    /// Whether the dial that found this peer is one too many: there is a session already, or the peer dials us
    /// too and its dial wins, because its number is lower.
    fn is_duplicate(&self, peer: Identity) -> bool {
        let exists = self
            .by_node
            .get(&peer.node)
            .and_then(|session| self.sessions.get(session))
            .is_some_and(|session| session.peer == peer);
        let dials_us = self
            .links
            .values()
            .any(|link| matches!(link, Link::AwaitProve { peer: other, .. } if *other == peer));
        exists || (dials_us && peer.node < self.config.identity.node)
    }

    /// A target turned out to be a peer with whom there is (or will soon be) a session that the peer began.
    fn adopt(&mut self, target: TargetId, peer: Identity) {
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

    fn begin_session(
        &mut self,
        link: LinkId,
        side: Side,
        peer: Identity,
        about: About,
        target: Option<TargetId>,
        transcript: &[&[u8]],
    ) {
        let id = self.new_session_id();
        let pairs = self.pair_rails(&about, side);
        let key = self.config.auth.session_key(transcript);
        let first = pairs.first().and_then(|&(rail, _)| self.config.rails.get(usize::from(rail)));
        let port = first.map_or("none", |rail| rail.kind);
        let (send_token, expect_token) = key.pulse_tokens(side);
        let slots: Vec<Slot> = pairs
            .iter()
            .map(|&(_, peer_rail)| Slot {
                peer_rail,
                state: SlotState::Opening,
                ours: None,
                theirs: None,
                lost_there: false,
            })
            .collect();
        let tick = self.now_ns + self.config.heartbeat_ns;
        self.sessions.insert(
            id,
            Session {
                link: Some(link),
                side,
                peer,
                name: about.name.into(),
                port,
                target,
                key,
                phase: Phase::SettingUp { ready_sent: false, ready_received: false },
                slots,
                setup_sent: false,
                peer_setup: None,
                began_ns: self.now_ns,
                silent_ns: 0,
                next_tick_ns: tick,
                rtt_max_ns: 0,
                rooms: BTreeSet::new(),
                grants: 0,
                held: Vec::new(),
            },
        );
        self.arm(tick, Timer::Session(id));
        self.links.insert(link, Link::Bound(id));
        self.by_node.insert(peer.node, id);
        if let Some(t) = target.and_then(|target| self.targets.get_mut(&target)) {
            if matches!(t.state, TargetState::Closed) {
                return self.end_session(id, SessionEnd::ClosedHere);
            }
            t.state = TargetState::Session(id);
        }
        let plan = PulsePlan {
            peer_address: about.pulse_address,
            interval_ns: about.heartbeat_ns.max(1_000_000),
            send_token,
            expect_token,
        };
        self.act(Action::Watch { session: id, plan });
        for (slot, (rail, _)) in pairs.into_iter().enumerate() {
            self.act(Action::OpenLane { session: id, slot: slot as u8, rail });
        }
    }

    fn send_setup(&mut self, session: SessionId) {
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
        // What earlier sessions with this same life of the peer still hold: its answer may bring pages home.
        let held = self
            .grants
            .iter()
            .filter(|(_, given)| {
                given.session != session && self.sessions.get(&given.session).is_some_and(|s| s.peer == peer)
            })
            .map(|(grant, _)| grant)
            .collect();
        let app = self.config.app.clone();
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
        if repeated || !fits {
            return self
                .end_session(session, SessionEnd::Misbehaved { what: "sent a setup that does not fit" });
        }
        s.peer_setup = Some(PeerSetup { regions, app: app.into() });
        s.held = held;
        for ((_, address), slot) in lanes.into_iter().zip(&mut s.slots) {
            slot.theirs = Some(address);
        }
        self.connect_lanes(session);
        self.answer_held();
    }

    /// Connects once both sides' addresses are known.
    fn connect_lanes(&mut self, session: SessionId) {
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

    fn become_live(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Phase::SettingUp { ready_sent: true, ready_received: true } = s.phase else { return };
        let Some(setup) = &s.peer_setup else { return };
        s.phase = Phase::Live;
        let notice = Notice::SessionUp {
            session,
            target: s.target,
            peer: s.peer,
            name: s.name.clone(),
            port: s.port,
            app: setup.app.clone(),
        };
        let target = s.target;
        self.counters.sessions += 1;
        if let Some(t) = target.and_then(|target| self.targets.get_mut(&target)) {
            t.backoff_ns = self.config.redial_min_ns;
        }
        self.tell(notice);
        self.bind_waiting(session);
    }

    /// Lets decode ends that waited for this session begin.
    fn bind_waiting(&mut self, session: SessionId) {
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

    // --- messages of a session -------------------------------------------------------------------------------

    fn on_session_message(&mut self, session: SessionId, message: Message) {
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
            Message::Refuse { refusal: Refusal::Duplicate } => {
                self.end_session(session, SessionEnd::Refused { by: Who::Peer, refusal: Refusal::Duplicate });
            }
            Message::Refuse { refusal } => {
                let refusal = refusal.seen_from_there();
                self.end_session(session, SessionEnd::Refused { by: Who::Peer, refusal });
            }
            Message::Release { released, delivered } => self.on_release(session, &released, delivered),
            _ if !live => self.end_session(
                session,
                SessionEnd::Misbehaved { what: "spoke of rooms before the session was ready" },
            ),
            Message::LaneLost { slot } => self.lane_lost_there(session, slot),
            Message::Want { room, duration_ns, params } => {
                self.on_want(session, room, duration_ns, params);
            }
            Message::Grant { .. } => self.on_grant(session, message),
            Message::Regrant { room, attempt, grant } => self.on_regrant(session, room, attempt, grant),
            Message::Finish { room, attempt, arrivals, aux } => {
                self.on_finish(session, room, attempt, &arrivals, aux);
            }
            Message::Delivered { room } => self.on_delivered(session, room),
            Message::Cancel { room, why } => self.on_cancel(session, room.name, room.from_decode, why),
            Message::Hello { .. } | Message::Welcome { .. } | Message::Prove { .. } => {
                self.end_session(session, SessionEnd::Misbehaved { what: "began a second handshake" });
            }
        }
    }

    fn on_cancel(&mut self, session: SessionId, name: crate::RoomName, from_decode: bool, why: CancelWhy) {
        let kinds = match from_decode {
            true => [RoleKind::Sending, RoleKind::Serving],
            false => [RoleKind::Receiving, RoleKind::Fetching],
        };
        for kind in kinds {
            self.parked.remove(&(kind, name, session));
            if let Some(&room) = self.bound.get(&(session, kind, name)) {
                let stage = self.rooms.get(&room).map_or(Stage::Grant, |r| r.stage);
                self.end_room(room, Proto::room_end_from(why, stage), None);
            }
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
                if let Some(given) = self.grants.find_mut(one.grant) {
                    given.released = Some(one.down_lanes);
                }
                self.on_released(given.room, one.grant, delivered);
            }
        }
    }

    // --- lanes of a live session -----------------------------------------------------------------------------

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

    fn lane_lost_there(&mut self, session: SessionId, slot: u8) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        let Some(entry) = s.slots.get_mut(usize::from(slot)) else { return };
        entry.lost_there = true;
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

    fn close_lane(&mut self, session: SessionId, slot: u8) {
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

    // --- ends ------------------------------------------------------------------------------------------------

    pub(crate) fn end_session(&mut self, session: SessionId, cause: SessionEnd) {
        let Some(s) = self.sessions.get_mut(&session) else { return };
        if s.is_over() {
            return;
        }
        s.phase = Phase::Over;
        let (link, target, peer, slots) = (s.link.take(), s.target, s.peer, s.slots.len() as u8);
        let tick = s.next_tick_ns;
        self.disarm(tick, Timer::Session(session));
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
        self.parked.retain(|(_, _, of), _| *of != session);
        self.tell(Notice::SessionDown { session: Some(session), target, cause: cause.clone() });
        if let Some(target) = target {
            self.target_lost(target, cause);
        }
        for room in self.rooms_of(session) {
            self.settle(room);
        }
        self.answer_held();
        self.reap(session);
    }

    /// Forgets a session that is over in every respect.
    pub(crate) fn reap(&mut self, session: SessionId) {
        let Some(s) = self.sessions.get(&session) else { return };
        let opening = s.slots.iter().any(|slot| matches!(slot.state, SlotState::Opening));
        if s.is_over() && s.all_down() && s.grants == 0 && s.rooms.is_empty() && !opening {
            self.sessions.remove(&session);
            self.act(Action::Forget { session });
        }
    }

    /// Gives back grants of earlier sessions that the peer asked about, once no op under them is on its way.
    pub(crate) fn answer_held(&mut self) {
        let asking: Vec<SessionId> = self
            .sessions
            .iter()
            .filter(|(_, s)| !s.held.is_empty() && !s.is_over())
            .map(|(id, _)| *id)
            .collect();
        for session in asking {
            let Some(s) = self.sessions.get_mut(&session) else {
                continue;
            };
            let (peer, held) = (s.peer, std::mem::take(&mut s.held));
            let busy = |grant: &GrantId| {
                self.rooms.values().any(|room| {
                    let earlier = room.session.is_some_and(|of| {
                        of != session && self.sessions.get(&of).is_some_and(|s| s.peer == peer)
                    });
                    let holds = match &room.role {
                        Role::Sending(s) => s.grant == Some(*grant) || s.owed.contains(grant),
                        Role::Fetching(f) => f.grant == Some(*grant),
                        Role::Receiving(_) | Role::Serving(_) => false,
                    };
                    earlier && holds && room.moving != Moving::No
                })
            };
            let (wait, free): (Vec<_>, Vec<_>) = held.into_iter().partition(busy);
            if !free.is_empty() {
                // Ops under these ended with their session's lanes: only the peer's own `Down` is proof.
                let released =
                    free.into_iter().map(|grant| Released { grant, down_lanes: u16::MAX }).collect();
                self.send(session, &Message::Release { released, delivered: false });
            }
            if let Some(s) = self.sessions.get_mut(&session) {
                s.held = wait;
            }
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
        let limit_ns = self.config.heartbeat_ns * u64::from(self.config.heartbeats_missed);
        if matches!(s.phase, Phase::SettingUp { .. }) && age_ns >= self.config.handshake_timeout_ns {
            return self.end_session(session, SessionEnd::HandshakeTimedOut);
        }
        if silent_ns > limit_ns && age_ns > self.config.warm_up_grace_ns {
            return self.end_session(session, SessionEnd::Silent { for_ns: silent_ns });
        }
        s.next_tick_ns = now + self.config.heartbeat_ns;
        let next = s.next_tick_ns;
        let live = s.is_live();
        self.arm(next, Timer::Session(session));
        if live {
            self.send(session, &Message::Ping { stamp: now });
        }
    }

    /// A handshake that takes too long.
    pub(crate) fn link_overdue(&mut self, link: LinkId) {
        match self.links.get(&link) {
            None | Some(Link::Bound(_) | Link::Closing) => {}
            Some(Link::Dialing { target } | Link::AwaitWelcome { target, .. }) => {
                let target = *target;
                self.close_link(link);
                self.target_failed(target, SessionEnd::HandshakeTimedOut);
            }
            Some(Link::AwaitHello | Link::AwaitProve { .. }) => self.close_link(link),
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
    fn target_failed(&mut self, target: TargetId, cause: SessionEnd) {
        self.tell(Notice::SessionDown { session: None, target: Some(target), cause: cause.clone() });
        self.target_lost(target, cause);
    }

    fn target_lost(&mut self, target: TargetId, cause: SessionEnd) {
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

    fn add_link(&mut self, link: LinkId, state: Link) {
        self.links.insert(link, state);
        self.arm(self.now_ns + self.config.handshake_timeout_ns, Timer::Link(link));
    }

    fn refuse(&mut self, link: LinkId, refusal: Refusal) {
        self.send_link(link, &Message::Refuse { refusal });
        self.close_link(link);
    }

    fn close_link(&mut self, link: LinkId) {
        self.links.insert(link, Link::Closing);
        self.act(Action::CloseLink { link });
    }

    fn misbehaved(&mut self, link: LinkId, what: &'static str) {
        match self.links.get(&link) {
            Some(Link::Bound(session)) => {
                let session = *session;
                self.end_session(session, SessionEnd::Misbehaved { what });
            }
            Some(Link::Dialing { target } | Link::AwaitWelcome { target, .. }) => {
                let target = *target;
                self.close_link(link);
                self.target_failed(target, SessionEnd::Misbehaved { what });
            }
            Some(Link::Closing) | None => {}
            Some(_) => self.close_link(link),
        }
    }

    pub(crate) fn rooms_of(&self, session: SessionId) -> Vec<RoomId> {
        self.sessions.get(&session).map(|s| s.rooms.iter().copied().collect()).unwrap_or_default()
    }

    fn about(&mut self) -> About {
        let nonce = self.nonce();
        About {
            name: self.config.name.clone(),
            nonce,
            auth: self.config.auth.is_on(),
            fingerprint: self.config.fingerprint.clone(),
            rails: self.config.rails.iter().map(offer).collect(),
            lanes_per_rail: self.config.lanes_per_rail,
            pulse_address: self.config.pulse_address.clone(),
            heartbeat_ns: self.config.heartbeat_ns,
        }
    }
}

fn offer(rail: &Rail) -> RailOffer {
    RailOffer { kind: rail.kind.into(), reach: rail.reach.clone(), bytes_per_second: rail.bytes_per_second }
}
