//! The flight recorder: what happened last on this node, and with whom.
//!
//! Each peer has a ring of [`Record`]s of its own, so that one busy peer does not overwrite what is known of another;
//! what concerns no peer, or a peer for which no ring was left, goes to the node's own. Rings are made when a peer
//! comes and kept when it goes, until another peer needs the place. To record is to fill in a few words: no clock is
//! read (the time is that of the turn), and nothing is allocated but for what goes wrong.

mod record;
mod ring;

use std::ops::Range;
use std::sync::Arc;

pub(crate) use self::record::millis;
pub use self::record::{Record, What};
use self::ring::Ring;
use crate::end::{End, SessionEnd};
use crate::message::{Identity, RoomName};
use crate::proto::{Proto, RoomId, SessionId, TargetId};

/// How much is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlightLimits {
    /// Peers with a ring of their own. A peer that has gone makes room for the next; where none has, more share the
    /// node's ring.
    pub peers: u32,
    /// Records that each ring keeps; 0 switches the recorder off.
    pub records: u32,
}

impl FlightLimits {
    /// The usual: 6 MiB if 128 peers have come.
    pub const USUAL: Self = Self { peers: 128, records: 512 };
    /// Nothing is recorded.
    pub const OFF: Self = Self { peers: 0, records: 0 };
}

/// Which ring: [`RingId::NODE`] or a peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RingId(pub u32);

impl RingId {
    /// The ring of what concerns no single peer.
    pub const NODE: Self = Self(0);
}

/// The peer that a ring is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingPeer {
    /// The node, and its life in the latest session.
    pub identity: Identity,
    /// Its name for people.
    pub name: Arc<str>,
    /// The transport of the latest session's lanes.
    pub port: &'static str,
}

/// What a ring held at one moment.
#[derive(Clone, Debug)]
pub struct RingCopy {
    /// Which ring.
    pub ring: RingId,
    /// Whose; `None`: the node's own.
    pub peer: Option<RingPeer>,
    /// Oldest first.
    pub records: Vec<Record>,
    /// How many older ones of this peer have been overwritten.
    pub overwritten: u64,
}

/// What some or all rings of a node held at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The node and this life of it.
    pub identity: Identity,
    /// Its name for people.
    pub name: Arc<str>,
    /// Why it was taken.
    pub reason: Reason,
    /// On the clock of the records.
    pub at_ns: u64,
    /// The copies.
    pub rings: Vec<RingCopy>,
    /// Addresses that are dialed, by target.
    pub targets: Vec<(TargetId, String)>,
}

/// Why a snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Somebody asked for it.
    Asked,
    /// The progress loop ended by a panic.
    Panicked,
    /// Something failed.
    Failed(Incident),
}

/// A failure, and with it what else failed with the same peer within a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incident {
    /// Counts the incidents of this node's life.
    pub number: u64,
    /// The ring with what led to it.
    pub ring: RingId,
    /// The first room that failed; `None`: a session was lost, and no room with it.
    pub room: Option<RoomName>,
}

struct Open {
    incident: Incident,
    /// When it is to be told (again).
    due_ns: u64,
    is_told: bool,
}

/// The rings of one node.
pub struct Recorder {
    limits: FlightLimits,
    serial: u64,
    /// The node's own first.
    rings: Vec<Ring>,
    /// At most one a ring.
    open: Vec<Open>,
    incidents: u64,
}

impl Recorder {
    /// Empty rings.
    pub fn new(limits: FlightLimits) -> Self {
        let rings = (limits.records > 0).then(|| Ring::new(limits.records));
        Self { limits, serial: 0, rings: rings.into_iter().collect(), open: Vec::new(), incidents: 0 }
    }

    /// Whether anything is recorded.
    pub fn is_on(&self) -> bool {
        !self.rings.is_empty()
    }

    /// How many rings there are, the node's own included.
    pub fn rings(&self) -> usize {
        self.rings.len()
    }

    /// How many records were made.
    pub fn recorded(&self) -> u64 {
        self.serial
    }

    /// The ring for a session with a peer: the one that it had before, or a new one, or that of a peer that has gone
    /// longest ago, or else the node's.
    pub fn begin(&mut self, peer: RingPeer) -> RingId {
        if !self.is_on() {
            return RingId::NODE;
        }
        let place = self.rings.iter().position(|ring| ring.is_of(peer.identity.node)).or_else(|| {
            if self.rings.len() <= self.limits.peers as usize {
                self.rings.push(Ring::new(self.limits.records));
                return Some(self.rings.len() - 1);
            }
            let gone = self.rings.iter().enumerate().skip(1).filter(|(_, ring)| ring.sessions == 0);
            gone.min_by_key(|(_, ring)| ring.last_serial).map(|(place, _)| place)
        });
        let Some(place) = place else { return RingId::NODE };
        let id = RingId(place as u32);
        if !self.rings[place].is_of(peer.identity.node) {
            self.open.retain(|open| open.incident.ring != id);
        }
        self.rings[place].begin(peer);
        id
    }

    /// The session that began with this ring is over.
    pub fn end(&mut self, ring: RingId) {
        if let Some(ring) = self.rings.get_mut(ring.0 as usize).filter(|_| ring != RingId::NODE) {
            ring.sessions -= 1;
        }
    }

    /// Records what happened, over the oldest record of the ring if it is full.
    pub fn record(
        &mut self,
        ring: RingId,
        at_ns: u64,
        session: Option<SessionId>,
        room: Option<RoomName>,
        what: What,
    ) {
        let Some(kept) = self.rings.get_mut(ring.0 as usize) else { return };
        self.serial += 1;
        let is_failure = what.is_failure();
        kept.push(Record { serial: self.serial, at_ns, session, room, what });
        if is_failure {
            self.fail(ring, at_ns, room);
        }
    }

    #[cold]
    fn fail(&mut self, ring: RingId, at_ns: u64, room: Option<RoomName>) {
        match self.open.iter_mut().find(|open| open.incident.ring == ring) {
            Some(open) => open.incident.room = open.incident.room.or(room),
            None => {
                self.incidents += 1;
                let incident = Incident { number: self.incidents, ring, room };
                self.open.push(Open { incident, due_ns: at_ns, is_told: false });
            }
        }
    }

    /// An incident that is to be written down: at once, and again a second later, with what has come of it.
    pub fn next_incident(&mut self, now_ns: u64) -> Option<Incident> {
        let place = self.open.iter().position(|open| open.due_ns <= now_ns)?;
        let open = &mut self.open[place];
        match std::mem::replace(&mut open.is_told, true) {
            true => Some(self.open.swap_remove(place).incident),
            false => {
                open.due_ns = now_ns.saturating_add(SETTLING_NS);
                Some(open.incident)
            }
        }
    }

    /// When the next one is due.
    pub fn next_incident_ns(&self) -> Option<u64> {
        self.open.iter().map(|open| open.due_ns).min()
    }

    /// What a ring holds.
    pub fn copy(&self, ring: RingId) -> Option<RingCopy> {
        Some(self.rings.get(ring.0 as usize)?.copy(ring))
    }
}

/// How long after a failure its pages may take to come home, for the record of it.
const SETTLING_NS: u64 = 1_000_000_000;

impl Proto {
    /// Lets the layer above record what it does for a room.
    pub fn note(&mut self, now_ns: u64, room: RoomId, what: What) {
        self.now_ns = now_ns;
        self.note_room(room, what);
    }

    /// The flight recorder.
    pub fn recorder(&mut self) -> &mut Recorder {
        &mut self.recorder
    }

    /// What these rings hold, of [`rings`](Recorder::rings).
    pub fn snapshot(&self, reason: Reason, rings: Range<u32>) -> Snapshot {
        self.snapshot_of(reason, rings.map(RingId))
    }

    /// What the rings hold that concern an incident: its peer's and the node's own.
    pub fn snapshot_incident(&self, incident: Incident) -> Snapshot {
        let peer = Some(incident.ring).filter(|ring| *ring != RingId::NODE);
        self.snapshot_of(Reason::Failed(incident), [RingId::NODE].into_iter().chain(peer))
    }

    fn snapshot_of(&self, reason: Reason, rings: impl Iterator<Item = RingId>) -> Snapshot {
        Snapshot {
            identity: self.config.identity,
            name: self.config.name.as_str().into(),
            reason,
            at_ns: self.now_ns,
            rings: rings.filter_map(|ring| self.recorder.copy(ring)).collect(),
            targets: self.targets.iter().map(|(id, target)| (*id, target.address().to_owned())).collect(),
        }
    }

    pub(crate) fn note_room(&mut self, id: RoomId, what: What) {
        if self.recorder.is_on()
            && let Some(room) = self.rooms.get(&id)
        {
            self.recorder.record(room.ring, self.now_ns, room.session, Some(room.name), what);
        }
    }

    pub(crate) fn note_session(&mut self, session: SessionId, room: Option<RoomName>, what: What) {
        if self.recorder.is_on()
            && let Some(s) = self.sessions.get(&session)
        {
            self.recorder.record(s.ring, self.now_ns, Some(session), room, what);
        }
    }

    pub(crate) fn note_node(&mut self, what: What) {
        self.recorder.record(RingId::NODE, self.now_ns, None, None, what);
    }
}

/// Whether a room's end is one that somebody will ask about.
pub(crate) fn is_failure(end: &End) -> bool {
    !matches!(end, End::Delivered | End::Cancelled { .. } | End::PeerLost { cause: SessionEnd::ClosedHere })
}
