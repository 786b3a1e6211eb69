//! Dumps put together, life by life.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::Source;
use crate::event::{Event, Header, Kind, Peer};
use crate::read::{File, Problem, ReadError, Reader, open};

/// What was read of dumps, for a [`Timeline`](super::Timeline). Each is folded in while it is read: the dumps of a node
/// overlap, and each of its events is held once.
pub struct Dumps {
    lives: BTreeMap<(String, String), Life>,
    held_bytes: usize,
    most_bytes: usize,
}

impl Default for Dumps {
    fn default() -> Self {
        Self::within(MOST_BYTES)
    }
}

impl Dumps {
    /// None yet; their events may take so much memory, and not the usual gibibyte.
    pub fn within(most_bytes: usize) -> Self {
        Self { lives: BTreeMap::new(), held_bytes: 0, most_bytes }
    }

    /// Whether nothing was read.
    pub fn is_empty(&self) -> bool {
        self.lives.is_empty()
    }

    /// Reads one file, and says what is wrong with it.
    pub fn read(&mut self, path: &Path) -> Result<Vec<Problem>, ReadError> {
        let mut reader = Reader::begin(path, open(path)?)?;
        let mut folding = self.begin(&reader.header);
        while let Some((peer, event)) = reader.next() {
            folding.event(peer, event);
        }
        let (overwritten, mut problems) = reader.end();
        problems.extend(folding.end(overwritten));
        Ok(problems)
    }

    /// Takes in one that was read, and says if there was no room for all of it.
    pub fn add(&mut self, file: &File) -> Option<Problem> {
        let mut folding = self.begin(&file.header);
        for (peer, event) in &file.events {
            folding.event(peer.clone(), Box::new(event.clone()));
        }
        folding.end(file.overwritten)
    }

    fn begin(&mut self, header: &Header) -> Folding<'_> {
        let key = (header.node.clone(), header.incarnation.clone());
        let life = self.lives.entry(key).or_insert_with(|| Life::of(header));
        life.source.files += 1;
        if header.monotonic_ns >= life.monotonic_ns {
            (life.monotonic_ns, life.unix_ns) = (header.monotonic_ns, header.unix_ns);
        }
        let (held_bytes, most_bytes) = (&mut self.held_bytes, self.most_bytes);
        Folding { life, ring: RingSoFar::default(), held_bytes, most_bytes, left_out: 0 }
    }

    pub(super) fn into_lives(self) -> Vec<Life> {
        let mut lives: Vec<Life> = self.lives.into_values().collect();
        lives.iter_mut().for_each(Life::settle);
        lives.sort_by(|a, b| (&a.source.name, a.first_ns()).cmp(&(&b.source.name, b.first_ns())));
        lives
    }
}

/// A dump on its way into its life.
struct Folding<'a> {
    life: &'a mut Life,
    ring: RingSoFar,
    held_bytes: &'a mut usize,
    most_bytes: usize,
    left_out: u64,
}

impl Folding<'_> {
    fn event(&mut self, peer: Option<Arc<Peer>>, event: Box<Event>) {
        let is_same_ring = match (&self.ring.peer, &peer) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        if !is_same_ring {
            self.end_ring();
            self.ring.peer = peer.clone();
        }
        let serial = event.serial;
        let is_held = self.life.events.contains_key(&serial);
        let bytes = event.held_bytes() + peer.as_ref().map_or(0, |peer| peer.held_bytes());
        if !is_held && *self.held_bytes + bytes > self.most_bytes {
            self.left_out += 1;
            return;
        }
        if let Some(session) = event.session {
            match (event.kind, &event.incarnation) {
                (Kind::SessionBegan, Some(incarnation)) => {
                    self.ring.has_began = true;
                    self.life.sessions.insert(session, incarnation.as_str().into());
                }
                _ => drop(self.ring.sessions.insert(session)),
            }
        }
        match self.life.events.get_mut(&serial) {
            // Of a dump with a line that could not be read it may not be known whose it was.
            Some(kept) => kept.peer = kept.peer.take().or(peer),
            None => {
                *self.held_bytes += bytes;
                self.life.events.insert(serial, Kept { peer, event, next_ns: None });
            }
        }
    }

    /// A ring loses its oldest events first: one that does not say when its last session began has events of none before.
    fn end_ring(&mut self) {
        let ring = std::mem::take(&mut self.ring);
        if let (Some(peer), false) = (ring.peer, ring.has_began) {
            let incarnation: Arc<str> = peer.incarnation.as_str().into();
            for session in ring.sessions {
                self.life.sessions.entry(session).or_insert_with(|| incarnation.clone());
            }
        }
    }

    fn end(mut self, overwritten: u64) -> Option<Problem> {
        self.end_ring();
        self.life.overwritten = self.life.overwritten.max(overwritten);
        (self.left_out > 0).then_some(Problem::LeftOut { events: self.left_out })
    }
}

/// What was read of a ring.
#[derive(Default)]
struct RingSoFar {
    peer: Option<Arc<Peer>>,
    sessions: BTreeSet<u32>,
    has_began: bool,
}

/// One life of a node, while its dumps are put together.
pub(super) struct Life {
    pub source: Source,
    /// The latest pair of clocks.
    monotonic_ns: u64,
    unix_ns: u64,
    pub overwritten: u64,
    /// By serial.
    pub events: BTreeMap<u64, Kept>,
    /// The peer's life in each session, where that is known.
    sessions: BTreeMap<u32, Arc<str>>,
}

/// An event of a life.
pub(super) struct Kept {
    pub peer: Option<Arc<Peer>>,
    pub event: Box<Event>,
    /// When the next turn began that has recorded something.
    next_ns: Option<u64>,
}

impl Life {
    fn of(header: &Header) -> Self {
        let source = Source {
            name: header.name.clone(),
            node: header.node.clone(),
            incarnation: header.incarnation.clone(),
            files: 0,
            events: 0,
            correction_ns: 0,
        };
        let (events, sessions) = (BTreeMap::new(), BTreeMap::new());
        Self { source, monotonic_ns: 0, unix_ns: 0, overwritten: 0, events, sessions }
    }

    /// Once all dumps are there.
    fn settle(&mut self) {
        self.source.events = self.events.len();
        // Later times that no later event is before, the earliest last.
        let mut later: Vec<u64> = Vec::new();
        for kept in self.events.values_mut().rev() {
            while later.pop_if(|later| *later <= kept.event.at_ns).is_some() {}
            kept.next_ns = later.last().copied();
            later.push(kept.event.at_ns);
        }
    }

    /// Which life of the peer an event was with.
    pub fn peer_life(&self, event: &Event) -> Option<&Arc<str>> {
        self.sessions.get(&event.session?)
    }

    /// A time on this life's own wall clock. Times of a broken dump may be anything.
    pub fn wall_ns(&self, at_ns: u64) -> i64 {
        let wall = i128::from(self.unix_ns) + i128::from(at_ns) - i128::from(self.monotonic_ns);
        wall.clamp(0, i64::MAX.into()) as i64
    }

    /// When an event happened at the earliest: its time is that of the turn's beginning.
    pub fn earliest_ns(&self, serial: u64) -> i64 {
        self.events.get(&serial).map_or(0, |kept| self.wall_ns(kept.event.at_ns))
    }

    /// When it had happened at the latest. A turn may be long, and a process that is stopped in the middle of one finds
    /// what was sent seconds after it began.
    pub fn latest_ns(&self, serial: u64) -> i64 {
        let Some(kept) = self.events.get(&serial) else { return 0 };
        self.wall_ns(kept.next_ns.unwrap_or(self.monotonic_ns.max(kept.event.at_ns)))
    }

    fn first_ns(&self) -> i64 {
        self.events.values().next().map_or(0, |kept| self.wall_ns(kept.event.at_ns))
    }
}

/// Two million short events: as much as a thousand rings hold, twice.
const MOST_BYTES: usize = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_had_happened_when_the_next_turn_began() {
        let source = String::new();
        let header = Header {
            version: 1,
            software: "".into(),
            name: source.clone(),
            node: source.clone(),
            incarnation: source,
            reason: "".into(),
            room: None,
            use_count: None,
            share: None,
            monotonic_ns: 0,
            unix_ns: 0,
        };
        let mut life = Life::of(&header);
        // In order, but for a broken dump's.
        for (serial, at_ns) in (0..).zip([5, 5, 3, 9, 1, 2]) {
            let event = Box::new(Event { serial, at_ns, ..Event::default() });
            life.events.insert(serial, Kept { peer: None, event, next_ns: None });
        }
        life.settle();
        let next: Vec<Option<u64>> = life.events.values().map(|kept| kept.next_ns).collect();
        assert_eq!(next, [Some(9), Some(9), Some(9), None, Some(2), None]);
    }
}
