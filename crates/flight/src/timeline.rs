//! The dumps of several nodes as one story: clocks brought together, rooms told one by one.

mod around;
mod clocks;
mod lives;
mod print;
mod stories;
mod verdict;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::Serialize;

use self::around::Around;
pub use self::clocks::ClockPair;
use self::clocks::{Links, agree};
pub use self::lives::Dumps;
use self::lives::{Kept, Life};
use self::stories::{Acquaintances, Party, split};
pub use self::verdict::{Outcome, Verdict};
use crate::event::{Event, Peer};
use crate::read::File;

/// One life of a node, of which there is a dump at least.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Source {
    /// The node's name for people.
    pub name: String,
    /// The node.
    pub node: String,
    /// Which of its lives.
    pub incarnation: String,
    /// Dumps that were read.
    pub files: usize,
    /// Events in them, each counted once.
    pub events: usize,
    /// What was added to its wall clock.
    pub correction_ns: i64,
}

/// One event, on the clock that all nodes share after correction.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Whose, as a place in [`Timeline::sources`].
    pub source: usize,
    /// With whom, if the event was in a peer's ring.
    pub peer: Option<Arc<Peer>>,
    /// Which of the peer's lives, if that is known.
    pub peer_life: Option<Arc<str>>,
    /// Since 1970, corrected.
    pub unix_ns: i64,
    /// What happened.
    pub event: Box<Event>,
}

/// The name of a room. Where routers do not know of each other, several requests may have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct RoomKey {
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
}

/// What happened to a room, on all sides.
#[derive(Clone, Debug, PartialEq)]
pub struct Room {
    /// Which.
    pub key: RoomKey,
    /// What names it, in an order in which nothing comes before its cause: places in [`Timeline::entries`].
    pub entries: Vec<usize>,
    /// What to think of it.
    pub verdict: Verdict,
}

/// Which part of a timeline is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only rooms with this number.
    pub room: Option<u64>,
    /// Only what this node did, or what was done with it: its name, or its number in hexadecimal digits.
    pub peer: Option<String>,
    /// Only what happened so shortly before the last event of all.
    pub last_ns: Option<u64>,
}

/// The merged dumps.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// Whose dumps there are.
    pub sources: Vec<Source>,
    /// How the clocks of each pair of them were compared.
    pub clocks: Vec<ClockPair>,
    /// All events, in an order in which nothing comes before its cause.
    pub entries: Vec<Entry>,
    /// Every room that an event names, those that failed first, in the order of their first events.
    pub rooms: Vec<Room>,
    /// Events that had been overwritten in the rings.
    pub overwritten: u64,
    around: Around,
}

impl Timeline {
    /// Merges dumps that were read. One event in several of them is one event.
    pub fn merge(files: &[File], filter: &Filter) -> Self {
        // They are in memory already.
        let mut dumps = Dumps::within(usize::MAX);
        for file in files {
            dumps.add(file);
        }
        Self::of(dumps, filter)
    }

    /// Merges dumps.
    pub fn of(dumps: Dumps, filter: &Filter) -> Self {
        let mut lives = dumps.into_lives();
        let links = Links::find(&lives);
        let (clocks, corrections) = agree(&lives, &links);
        for (life, correction_ns) in lives.iter_mut().zip(corrections) {
            life.source.correction_ns = correction_ns;
        }
        let overwritten = lives.iter().fold(0, |sum: u64, life| sum.saturating_add(life.overwritten));
        let sources: Vec<Source> = lives.iter().map(|life| life.source.clone()).collect();
        let entries = ordered(lives, &links);
        let known = Acquaintances::of(&sources, &entries);
        let (rooms, around) = (Vec::new(), Around::default());
        let mut timeline = Self { sources, clocks, entries, rooms, overwritten, around };
        timeline.keep(filter);
        timeline.around = Around::of(timeline.sources.len(), &timeline.entries);
        timeline.rooms = timeline.find_rooms(filter, &known);
        timeline
    }

    fn keep(&mut self, filter: &Filter) {
        if let Some(peer) = &filter.peer {
            let is_it = |name: &str, node: &str| name == peer || node == peer;
            let sources = &self.sources;
            self.entries.retain(|entry| {
                let source = &sources[entry.source];
                let of_peer = entry.peer.as_ref().is_some_and(|peer| is_it(&peer.name, &peer.node));
                of_peer || is_it(&source.name, &source.node)
            });
        }
        if let (Some(last_ns), Some(end_ns)) =
            (filter.last_ns, self.entries.iter().map(|entry| entry.unix_ns).max())
        {
            let from_ns = end_ns.saturating_sub_unsigned(last_ns);
            self.entries.retain(|entry| entry.unix_ns >= from_ns);
        }
    }

    fn find_rooms(&self, filter: &Filter, known: &Acquaintances) -> Vec<Room> {
        let mut found: BTreeMap<RoomKey, Vec<usize>> = BTreeMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            if let Some(key) = entry.room()
                && filter.room.is_none_or(|wanted| wanted == key.room)
            {
                found.entry(key).or_default().push(at);
            }
        }
        let mut rooms: Vec<Room> = found
            .into_iter()
            .flat_map(|(key, entries)| {
                let stories = split(entries, &self.entries, &self.sources, known);
                stories.into_iter().map(move |entries| (key, entries))
            })
            .map(|(key, entries)| Room { key, verdict: Verdict::of(self, &entries), entries })
            .collect();
        rooms.sort_by_key(|room| (room.verdict.outcome != Outcome::Failed, room.entries.first().copied()));
        rooms
    }
}

impl Entry {
    /// The room that it names.
    pub fn room(&self) -> Option<RoomKey> {
        Some(RoomKey { room: self.event.room?, use_count: self.event.use_count.unwrap_or(0) })
    }

    fn peer_node(&self) -> Option<&str> {
        self.peer.as_ref().map(|peer| peer.node.as_str())
    }

    /// The peer and its life, if that is known.
    fn party(&self) -> Option<Party<'_>> {
        Some((self.peer_node()?, self.peer_life.as_deref()))
    }
}

/// Merges by corrected time, and lets nothing come before what it is the effect of.
fn ordered(lives: Vec<Life>, links: &Links) -> Vec<Entry> {
    let mut queues: Vec<VecDeque<Entry>> =
        (0..).zip(lives).map(|(source, life)| queue(source, life)).collect();
    let mut told: Vec<u64> = vec![0; queues.len()];
    let mut entries = Vec::new();
    loop {
        let heads = queues.iter().enumerate().filter_map(|(at, queue)| Some((at, queue.front()?)));
        let waits = |entry: &Entry| {
            let cause = links.cause_of(entry.source, entry.event.serial);
            cause.is_some_and(|(source, serial)| told[source] < serial)
        };
        // Where clocks cannot be brought together, each may wait for another: the earliest goes then.
        let next = heads.min_by_key(|(_, entry)| (waits(entry), entry.unix_ns)).map(|(at, _)| at);
        let Some(next) = next else { return entries };
        if let Some(entry) = queues[next].pop_front() {
            told[next] = told[next].max(entry.event.serial);
            entries.push(entry);
        }
    }
}

fn queue(source: usize, mut life: Life) -> VecDeque<Entry> {
    let events = std::mem::take(&mut life.events);
    let entry = |Kept { peer, event, .. }: Kept| Entry {
        source,
        peer,
        peer_life: life.peer_life(&event).cloned(),
        unix_ns: life.wall_ns(event.at_ns).saturating_add(life.source.correction_ns),
        event,
    };
    events.into_values().map(entry).collect()
}
