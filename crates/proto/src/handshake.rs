//! Control streams, from the first byte to the session that they then belong to.
//!
//! ```text
//! dialer                         acceptor
//!   Hello   ───────────────────────▶          who, nonce, fingerprint, rails
//!           ◀─────────────────────── Welcome  the same, and proof of the shared key
//!   Prove   ───────────────────────▶          proof of the shared key
//!   Setup   ◀──────────────────────▶ Setup    lane addresses, regions, grants still held
//!   Ready   ◀──────────────────────▶ Ready    lanes up, regions attached
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::action::{Action, PulsePlan};
use crate::auth::{Side, same};
use crate::config::Rail;
use crate::end::{SessionEnd, Who};
use crate::flight::{RingPeer, What};
use crate::lanes::Slot;
use crate::link_cause::LinkCause;
use crate::message::{About, Identity, MAX_LANES, Message, RailOffer, Refusal, VERSION_MAX, VERSION_MIN};
use crate::planted::{Planted, is_planted};
use crate::proto::{LinkId, Proto, SessionId, TargetId, Timer};
use crate::session::{Phase, Session};

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

/// With whom a handshake is that is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum With {
    /// A target is dialed.
    Target(TargetId),
    /// A peer has dialed us, and is to prove who it is.
    Peer(Identity),
}

impl Link {
    fn with(&self) -> Option<With> {
        match self {
            Self::Dialing { target } | Self::AwaitWelcome { target, .. } => Some(With::Target(*target)),
            Self::AwaitProve { peer, .. } => Some(With::Peer(*peer)),
            Self::AwaitHello | Self::Bound(_) | Self::Closing => None,
        }
    }
}

impl Proto {
    /// A dialed control stream is connected.
    pub fn link_opened(&mut self, now_ns: u64, link: LinkId) {
        self.now_ns = now_ns;
        let Some(Link::Dialing { target }) = self.links.get(&link) else { return };
        let target = *target;
        let about = self.about();
        let message = Message::Hello { version_min: VERSION_MIN, version_max: VERSION_MAX, about };
        let mut hello = Vec::new();
        message.encode(self.config.identity, &mut hello);
        self.send_frame(link, hello.clone());
        self.put_link(link, Link::AwaitWelcome { target, hello });
    }

    /// A peer has dialed us.
    pub fn link_accepted(&mut self, now_ns: u64, link: LinkId) {
        self.now_ns = now_ns;
        match self.is_shut {
            false => self.add_link(link, Link::AwaitHello),
            true => self.close_link(link),
        }
    }

    /// A control stream has ended.
    pub fn link_closed(&mut self, now_ns: u64, link: LinkId, cause: LinkCause) {
        self.now_ns = now_ns;
        match self.take_link(link) {
            Some(Link::Dialing { target }) => self.target_failed(target, SessionEnd::Unreachable { cause }),
            Some(Link::AwaitWelcome { target, .. }) => {
                self.target_failed(target, SessionEnd::StreamEnded { cause });
            }
            Some(Link::Bound(session)) => {
                if let Some(s) = self.sessions.get_mut(&session) {
                    s.link = None;
                }
                self.end_session(session, SessionEnd::StreamEnded { cause });
            }
            Some(Link::AwaitHello | Link::AwaitProve { .. } | Link::Closing) | None => {}
        }
    }

    /// One frame came on a control stream.
    pub fn frame(&mut self, now_ns: u64, link: LinkId, bytes: &[u8]) {
        self.now_ns = now_ns;
        self.counters.messages_in += 1;
        // Nothing long is kept or looked at before the peer has proven who it is. The network keeps it from coming, but
        // for one frame behind the last of the handshake.
        let is_bound = matches!(self.links.get(&link), Some(Link::Bound(_)));
        if !is_bound && bytes.len() > MAX_HANDSHAKE_BYTES {
            return self.misbehaved(link, "sent a frame too long for a handshake");
        }
        let (from, message) = match Message::decode(bytes) {
            Ok(decoded) => decoded,
            Err(_) => return self.misbehaved(link, "sent a frame that cannot be read"),
        };
        match (self.links.get(&link), message) {
            (Some(Link::AwaitHello), Message::Hello { version_min, version_max, about }) => {
                self.on_hello(link, from, (version_min, version_max), about, bytes);
            }
            (Some(Link::AwaitWelcome { .. }), Message::Welcome { version, about, proof }) => {
                self.on_welcome(link, from, (version, about, proof), bytes);
            }
            (Some(Link::AwaitWelcome { .. }), Message::Refuse { refusal }) => {
                self.on_refuse(link, from, refusal);
            }
            (Some(Link::AwaitProve { .. }), Message::Prove { proof }) => self.on_prove(link, from, proof),
            (Some(Link::AwaitProve { .. }), Message::Refuse { .. } | Message::Goodbye) => {
                self.close_link(link)
            }
            (Some(Link::Bound(session)), message) => {
                let session = *session;
                match self.sessions.get(&session) {
                    Some(s) if s.peer == from || is_planted(Planted::EarlierLifeBelieved) => {
                        self.on_session_message(session, message)
                    }
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
        if let Err(refusal) = self.fits(peer, &about, Side::Acceptor) {
            return self.refuse(link, refusal);
        }
        if !self.has_room_for_session(peer) {
            return self.refuse(link, Refusal::Busy);
        }
        let version = versions.1.min(VERSION_MAX);
        let mine = self.about();
        let mut welcome = Vec::new();
        let unproven = Message::Welcome { version, about: mine.clone(), proof: [0; 32] };
        unproven.encode(self.config.identity, &mut welcome);
        let proof = self.config.auth.proof(Side::Acceptor, &[hello, &welcome]);
        self.send_link(link, &Message::Welcome { version, about: mine, proof });
        let (about, hello) = (Box::new(about), hello.to_vec());
        self.put_link(link, Link::AwaitProve { peer, about, hello, welcome });
    }

    fn on_welcome(
        &mut self,
        link: LinkId,
        peer: Identity,
        (version, about, proof): (u16, About, [u8; 32]),
        bytes: &[u8],
    ) {
        let Some(Link::AwaitWelcome { target, hello }) = self.take_link(link) else { return };
        // The proof is over the frame as it came, but for the proof itself, which is its end.
        let mut welcome = bytes.to_vec();
        let proof_at = welcome.len() - proof.len();
        welcome[proof_at..].fill(0);
        let refusal = if !(VERSION_MIN..=VERSION_MAX).contains(&version) {
            Some(Refusal::Version {
                here_min: VERSION_MIN,
                here_max: VERSION_MAX,
                there_min: version,
                there_max: version,
            })
        } else if let Err(refusal) = self.fits(peer, &about, Side::Dialer) {
            Some(refusal)
        } else if !same(&proof, &self.config.auth.proof(Side::Acceptor, &[&hello, &welcome])) {
            Some(Refusal::NotAuthentic)
        } else if self.session_with(peer).is_some() {
            Some(Refusal::Duplicate)
        } else if !self.has_room_for_session(peer) {
            Some(Refusal::Busy)
        } else {
            None
        };
        if let Some(refusal) = refusal {
            self.refuse(link, refusal.clone());
            if refusal == Refusal::Duplicate {
                return self.adopt(target, peer);
            }
            return self.target_failed(target, SessionEnd::Refused { by: Who::Here, refusal });
        }
        if let Some(&earlier) = self.by_node.get(&peer.node) {
            self.end_session(earlier, SessionEnd::Restarted);
        }
        let proof = self.config.auth.proof(Side::Dialer, &[&hello, &welcome]);
        self.send_link(link, &Message::Prove { proof });
        let session = self.begin_session(link, Side::Dialer, peer, about, &[&hello, &welcome]);
        self.target_found(target, peer, session);
    }

    fn on_refuse(&mut self, link: LinkId, peer: Identity, refusal: Refusal) {
        let Some(Link::AwaitWelcome { target, .. }) = self.take_link(link) else { return };
        self.close_link(link);
        if refusal == Refusal::Duplicate {
            return self.adopt(target, peer);
        }
        let refusal = refusal.seen_from_there();
        self.target_failed(target, SessionEnd::Refused { by: Who::Peer, refusal });
    }

    fn on_prove(&mut self, link: LinkId, from: Identity, proof: [u8; 32]) {
        let Some(Link::AwaitProve { peer, about, hello, welcome }) = self.take_link(link) else { return };
        if from != peer || !same(&proof, &self.config.auth.proof(Side::Dialer, &[&hello, &welcome])) {
            return self.refuse(link, Refusal::NotAuthentic);
        }
        // Only now, when it has proven who it is, may a newcomer end what was there before.
        if let Some(session) = self.session_with(peer) {
            let dialed_both_ways = self.sessions.get(&session).is_some_and(Session::is_proposed);
            // Both sides decide so: of two dials that cross, the one of the lower number is kept.
            if dialed_both_ways && self.config.identity.node < peer.node {
                return self.refuse(link, Refusal::Duplicate);
            }
            let cause = match dialed_both_ways {
                true => SessionEnd::Refused { by: Who::Here, refusal: Refusal::Duplicate },
                // It has lost the session, and has found out before this side.
                false => SessionEnd::StreamEnded { cause: LinkCause::ClosedByPeer },
            };
            self.end_session(session, cause);
        } else if let Some(&earlier) = self.by_node.get(&peer.node) {
            self.end_session(earlier, SessionEnd::Restarted);
        } else if !self.has_room_for_session(peer) {
            return self.refuse(link, Refusal::Busy);
        }
        let session = self.begin_session(link, Side::Acceptor, peer, *about, &[&hello, &welcome]);
        self.adopt_pausing(peer, session);
        self.refuse_older_dials(peer);
    }

    /// Once there is a session with a peer, dials of that peer's that were answered before are left from the time
    /// when both sides dialed. A dial that comes later says that the peer has lost the session.
    pub(crate) fn refuse_older_dials(&mut self, peer: Identity) {
        let older = self.handshakes_with(With::Peer(peer));
        older.into_iter().for_each(|link| self.refuse(link, Refusal::Duplicate));
    }

    /// The session with this same life of a peer.
    fn session_with(&self, peer: Identity) -> Option<SessionId> {
        let session = *self.by_node.get(&peer.node)?;
        self.sessions.get(&session).filter(|s| s.peer == peer).map(|_| session)
    }

    /// Whether one more session is within the limit. One with a peer that is back takes the place of its last.
    fn has_room_for_session(&self, peer: Identity) -> bool {
        let replaced = usize::from(self.by_node.contains_key(&peer.node));
        self.sessions.len() - replaced < self.config.max_sessions as usize
    }

    /// Whether what a peer says of itself fits this node.
    fn fits(&self, peer: Identity, about: &About, us: Side) -> Result<(), Refusal> {
        if peer.node == self.config.identity.node {
            return Err(Refusal::SameNode);
        }
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

    fn begin_session(
        &mut self,
        link: LinkId,
        side: Side,
        peer: Identity,
        about: About,
        transcript: &[&[u8]],
    ) -> SessionId {
        let id = self.new_session_id();
        let pairs = self.pair_rails(&about, side);
        let key = self.config.auth.session_key(transcript);
        let first = pairs.first().and_then(|&(rail, _)| self.config.rails.get(usize::from(rail)));
        let port = first.map_or("none", |rail| rail.kind);
        let (send_token, expect_token) = key.pulse_tokens(side);
        let slots = pairs.iter().map(|&(rail, peer_rail)| Slot::new(rail, peer_rail)).collect();
        let tick = self.next_session_tick(self.now_ns, true);
        let name: Arc<str> = about.name.into();
        let ring = self.recorder.begin(RingPeer { identity: peer, name: name.clone(), port });
        self.sessions.insert(
            id,
            Session {
                link: Some(link),
                side,
                peer,
                name,
                port,
                key,
                phase: Phase::SettingUp { ready_sent: false, ready_received: false },
                slots,
                setup_sent: false,
                peer_setup: None,
                began_ns: self.now_ns,
                silent_ns: 0,
                next_tick_ns: tick,
                rtt_max_ns: 0,
                ring,
                rooms: BTreeSet::new(),
                parked_use: Default::default(),
                grants: 0,
                held: BTreeMap::new(),
                has_peer_died: false,
                lanes_due_ns: None,
            },
        );
        let (incarnation, is_dialer) = (peer.incarnation, side == Side::Dialer);
        self.note_session(id, None, What::SessionBegan { incarnation, is_dialer });
        self.arm(tick, Timer::Session(id));
        self.put_link(link, Link::Bound(id));
        self.act(Action::Trust { link });
        self.by_node.insert(peer.node, id);
        let plan = PulsePlan {
            peer_address: about.pulse_address,
            interval_ns: about.heartbeat_ns.clamp(SHORTEST_INTERVAL_NS, LONGEST_INTERVAL_NS),
            send_token,
            expect_token,
        };
        self.act(Action::Watch { session: id, plan });
        for (slot, (rail, _)) in pairs.into_iter().enumerate() {
            self.act(Action::OpenLane { session: id, slot: slot as u8, rail });
        }
        id
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

    pub(crate) fn add_link(&mut self, link: LinkId, state: Link) {
        self.put_link(link, state);
        let at_ns = self.now_ns.saturating_add(self.config.handshake_timeout_ns);
        self.arm(at_ns, Timer::Link(link));
    }

    fn put_link(&mut self, id: LinkId, link: Link) {
        self.take_link(id);
        self.handshakes.extend(link.with().map(|with| (with, id)));
        self.links.insert(id, link);
    }

    fn take_link(&mut self, id: LinkId) -> Option<Link> {
        let link = self.links.remove(&id)?;
        if let Some(with) = link.with() {
            self.handshakes.remove(&(with, id));
        }
        Some(link)
    }

    /// The links of all handshakes with a target or a peer that are not done.
    pub(crate) fn handshakes_with(&self, with: With) -> Vec<LinkId> {
        let links = (with, LinkId(0))..=(with, LinkId(u32::MAX));
        self.handshakes.range(links).map(|(_, link)| *link).collect()
    }

    fn refuse(&mut self, link: LinkId, refusal: Refusal) {
        self.send_link(link, &Message::Refuse { refusal });
        self.close_link(link);
    }

    pub(crate) fn close_link(&mut self, link: LinkId) {
        self.put_link(link, Link::Closing);
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

/// The longest frame of a handshake.
const MAX_HANDSHAKE_BYTES: usize = 64 << 10;

/// A peer gets its heartbeats as often as it asks, within these: what it asks for must neither flood the network nor
/// overflow a clock.
const SHORTEST_INTERVAL_NS: u64 = 1_000_000;
const LONGEST_INTERVAL_NS: u64 = 60_000_000_000;

fn offer(rail: &Rail) -> RailOffer {
    RailOffer { kind: rail.kind.into(), reach: rail.reach.clone(), bytes_per_second: rail.bytes_per_second }
}
