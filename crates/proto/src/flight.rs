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
    /// The usual: of each peer about the last 120 rooms. It takes 12 MiB if 128 peers have come.
    pub const USUAL: Self = Self { peers: 128, records: 1024 };
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

/// What a room's records say of it beside what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlightTag {
    ring: RingId,
    session: Option<SessionId>,
    room: RoomName,
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
    /// Incidents that were to be told (again) when their ring was needed.
    lost: u64,
}

impl Recorder {
    /// Empty rings.
    pub fn new(limits: FlightLimits) -> Self {
        let rings = (limits.records > 0).then(|| Ring::new(limits.records));
        let rings = rings.into_iter().collect();
        Self { limits, serial: 0, rings, open: Vec::new(), incidents: 0, lost: 0 }
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
    /// longest ago, if possible one of which nothing is to be told, or else the node's.
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
            let is_open = |place| self.open.iter().any(|open| open.incident.ring == RingId(place as u32));
            gone.min_by_key(|&(place, ring)| (is_open(place), ring.last_serial)).map(|(place, _)| place)
        });
        let Some(place) = place else { return RingId::NODE };
        let id = RingId(place as u32);
        if !self.rings[place].is_of(peer.identity.node) {
            let open = self.open.len();
            self.open.retain(|open| open.incident.ring != id);
            self.lost += (open - self.open.len()) as u64;
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

    /// An incident of which nothing more will come, due or not.
    pub fn last_incident(&mut self) -> Option<Incident> {
        Some(self.open.pop()?.incident)
    }

    /// How many incidents were lost, since this was last asked, before all of them was told: there were too many peers.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
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
    /// How the layer above records what it does for a room, also when the room is over here.
    pub fn flight_tag(&self, room: RoomId) -> Option<FlightTag> {
        let room = self.rooms.get(&room)?;
        Some(FlightTag { ring: room.ring, session: room.session, room: room.name })
    }

    /// Records what the layer above does for a room.
    pub fn note(&mut self, now_ns: u64, tag: FlightTag, what: What) {
        self.recorder.record(tag.ring, now_ns, tag.session, Some(tag.room), what);
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
            && !(room.end == Some(End::Delivered) && what.goes_without_saying())
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn peer(node: u64) -> RingPeer {
        RingPeer {
            identity: Identity { node, incarnation: 1 },
            name: format!("peer-{node}").into(),
            port: "sim",
        }
    }

    fn lost() -> What {
        What::SessionDown { cause: Box::new(SessionEnd::Silent { for_ns: 1 }), rooms: 0, silent_ms: 2 }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Begins(u64),
        Ends(u64),
        Records(u64, u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..6u64).prop_map(Step::Begins),
            (0..6u64).prop_map(Step::Ends),
            (0..6u64, any::<u8>()).prop_map(|(node, slot)| Step::Records(node, slot)),
        ];
        prop::collection::vec(step, 0..200)
    }

    /// What is known of a peer, by the simplest means.
    #[derive(Default)]
    struct Known {
        rings: Vec<RingId>,
        slots: Vec<u8>,
    }

    proptest! {
        /// As long as a peer has a session, its ring holds the last of what was recorded of it, in order, and nothing of
        /// others; what found no ring is the node's.
        #[test]
        fn rings_hold_the_last_of_each_peer(steps in steps(), peers in 1..4u32, records in 1..9u32) {
            let mut recorder = Recorder::new(FlightLimits { peers, records });
            let mut known: BTreeMap<u64, Known> = BTreeMap::new();
            let mut of_node: Vec<u8> = Vec::new();
            for step in steps {
                match step {
                    Step::Begins(node) => {
                        let ring = recorder.begin(peer(node));
                        let entry = known.entry(node).or_default();
                        if ring != RingId::NODE {
                            // It may be another's place now, or this one's after another's.
                            if recorder.copy(ring).unwrap().records.is_empty() {
                                entry.slots.clear();
                            }
                        }
                        entry.rings.push(ring);
                    }
                    Step::Ends(node) => {
                        if let Some(ring) = known.get_mut(&node).and_then(|entry| entry.rings.pop()) {
                            recorder.end(ring);
                        }
                    }
                    Step::Records(node, slot) => {
                        let ring = known.get(&node).and_then(|entry| entry.rings.last().copied());
                        let Some(ring) = ring else { continue };
                        recorder.record(ring, 0, None, None, What::LaneUp { slot });
                        match ring {
                            RingId::NODE => of_node.push(slot),
                            _ => known.get_mut(&node).unwrap().slots.push(slot),
                        }
                    }
                }
                prop_assert!(recorder.rings() <= 1 + peers as usize);
                let slots = |ring| -> Vec<u8> {
                    let copy: RingCopy = recorder.copy(ring).unwrap();
                    copy.records.iter().map(|record| match record.what {
                        What::LaneUp { slot } => slot,
                        ref other => panic!("{other:?}"),
                    }).collect()
                };
                let last = |all: &[u8]| all[all.len().saturating_sub(records as usize)..].to_vec();
                prop_assert_eq!(slots(RingId::NODE), last(&of_node));
                for (node, entry) in &known {
                    let Some(&ring) = entry.rings.iter().find(|ring| **ring != RingId::NODE) else { continue };
                    let copy = recorder.copy(ring).unwrap();
                    prop_assert_eq!(copy.peer.unwrap().identity.node, *node);
                    prop_assert_eq!(slots(ring), last(&entry.slots));
                    prop_assert_eq!(copy.overwritten as usize + copy.records.len(), entry.slots.len());
                }
            }
        }
    }

    #[test]
    fn ten_thousand_peers_take_no_more_than_the_limit() {
        let mut recorder = Recorder::new(FlightLimits { peers: 100, records: 4 });
        for node in 0..10_000 {
            let ring = recorder.begin(peer(node));
            assert_ne!(ring, RingId::NODE, "peers that have gone make room");
            for at_ns in 0..6 {
                recorder.record(ring, at_ns, None, None, lost());
            }
            recorder.end(ring);
        }
        assert_eq!((recorder.rings(), recorder.recorded()), (101, 60_000));
        // What nobody takes away is bounded by the rings, too, and the rest is counted.
        assert!(recorder.open.len() <= 101, "{}", recorder.open.len());
        assert_eq!((recorder.open.len() as u64 + recorder.take_lost(), recorder.take_lost()), (10_000, 0));
        // The last hundred are there, those before are not.
        let peers: Vec<u64> =
            (1..101).filter_map(|ring| Some(recorder.copy(RingId(ring))?.peer?.identity.node)).collect();
        assert!(peers.len() == 100 && peers.iter().all(|&node| node >= 9_900), "{peers:?}");
        // While they stay, more share the node's ring.
        let rings: Vec<RingId> = (20_000..20_101).map(|node| recorder.begin(peer(node))).collect();
        assert!(rings[..100].iter().all(|&ring| ring != RingId::NODE));
        assert_eq!(rings[100], RingId::NODE);
    }

    #[test]
    fn a_ring_of_which_nothing_is_to_be_told_goes_first() {
        let mut recorder = Recorder::new(FlightLimits { peers: 2, records: 4 });
        for (node, what) in [(1, lost()), (2, What::LaneUp { slot: 0 })] {
            let ring = recorder.begin(peer(node));
            recorder.record(ring, 0, None, None, what);
            recorder.end(ring);
        }
        assert_eq!(recorder.begin(peer(3)), RingId(2), "the older one has an incident");
        assert_eq!((recorder.open.len(), recorder.take_lost()), (1, 0));
        assert_eq!(recorder.begin(peer(4)), RingId(1), "where there is no other");
        assert_eq!((recorder.open.len(), recorder.take_lost()), (0, 1));
    }

    #[test]
    fn an_incident_is_told_at_once_and_again_when_it_has_settled() {
        let mut recorder = Recorder::new(FlightLimits { peers: 2, records: 4 });
        let ring = recorder.begin(peer(7));
        let name = RoomName { room: 4711, use_count: 2, share: 0 };
        recorder.record(ring, 1_000, None, None, What::LaneUp { slot: 0 });
        assert_eq!(recorder.next_incident(u64::MAX), None);
        recorder.record(ring, 2_000, None, None, lost());
        recorder.record(
            ring,
            2_000,
            None,
            Some(name),
            What::Ended {
                end: Some(Box::new(End::PeerLost { cause: SessionEnd::Silent { for_ns: 1 } })),
                stage: crate::Stage::Transfer,
                counted: 1,
                expected: None,
                age_ms: 3,
                met_ms: None,
                quiet_ms: 4,
                silent_ms: 5,
            },
        );
        let incident = Incident { number: 1, ring, room: Some(name) };
        assert_eq!(
            (recorder.next_incident_ns(), recorder.next_incident(2_000)),
            (Some(2_000), Some(incident))
        );
        assert_eq!(recorder.next_incident(2_000), None, "more of it within a second is the same incident");
        recorder.record(ring, 3_000, None, None, lost());
        assert_eq!(recorder.next_incident(2_000 + SETTLING_NS - 1), None);
        assert_eq!(recorder.next_incident(2_000 + SETTLING_NS), Some(incident));
        assert_eq!((recorder.next_incident_ns(), recorder.next_incident(u64::MAX)), (None, None));
        recorder.record(ring, 9_000, None, None, lost());
        assert_eq!(recorder.last_incident().map(|incident| incident.number), Some(2));
        assert_eq!(recorder.last_incident(), None);
    }

    #[test]
    fn what_was_asked_for_is_no_failure() {
        let ended = |end: End| What::Ended {
            end: Some(Box::new(end)),
            stage: crate::Stage::Grant,
            counted: 0,
            expected: None,
            age_ms: 0,
            met_ms: None,
            quiet_ms: 0,
            silent_ms: 0,
        };
        use crate::end::Who;
        assert!(!ended(End::Cancelled { by: Who::Here }).is_failure());
        assert!(!ended(End::Cancelled { by: Who::Peer }).is_failure());
        assert!(!ended(End::PeerLost { cause: SessionEnd::ClosedHere }).is_failure());
        assert!(ended(End::PeerLost { cause: SessionEnd::ClosedByPeer }).is_failure());
        assert!(ended(End::Expired { by: Who::Here, stage: crate::Stage::Grant }).is_failure());
        assert!(lost().is_failure() && !What::Home.is_failure());
    }

    #[test]
    fn nothing_is_kept_where_nothing_is_asked_for() {
        let mut recorder = Recorder::new(FlightLimits::OFF);
        let ring = recorder.begin(peer(1));
        recorder.record(ring, 1, None, None, lost());
        recorder.end(ring);
        assert_eq!(
            (recorder.is_on(), recorder.recorded(), recorder.next_incident(u64::MAX)),
            (false, 0, None)
        );
        assert!(recorder.copy(RingId::NODE).is_none());
    }
}
