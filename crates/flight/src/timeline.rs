//! The dumps of several nodes as one story: clocks brought together, rooms told one by one.

mod clocks;
mod print;
mod verdict;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use serde::Serialize;

pub use self::clocks::ClockPair;
use self::clocks::{Links, agree};
pub use self::verdict::{Outcome, Verdict};
use crate::event::{Event, Kind, Peer};
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
    /// Since 1970, corrected.
    pub unix_ns: i64,
    /// What happened.
    pub event: Event,
}

/// The name of a room.
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
    /// In an order in which nothing comes before its cause: places in [`Timeline::entries`].
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
}

impl Timeline {
    /// Merges dumps. One event in several of them is one event.
    pub fn merge(files: &[File], filter: &Filter) -> Self {
        let mut lives: BTreeMap<(&str, &str), Life> = BTreeMap::new();
        for file in files {
            let key = (file.header.node.as_str(), file.header.incarnation.as_str());
            lives.entry(key).or_insert_with(|| Life::of(file)).add(file);
        }
        let mut lives: Vec<Life> = lives.into_values().collect();
        lives.sort_by(|a, b| (&a.source.name, a.first_ns()).cmp(&(&b.source.name, b.first_ns())));
        let links = Links::find(&lives);
        let (clocks, corrections) = agree(&lives, &links);
        for (life, correction_ns) in lives.iter_mut().zip(corrections) {
            life.source.correction_ns = correction_ns;
            life.source.events = life.events.len();
        }
        let overwritten = lives.iter().fold(0, |sum: u64, life| sum.saturating_add(life.overwritten));
        let entries = ordered(&lives, &links);
        let sources = lives.into_iter().map(|life| life.source).collect();
        let mut timeline = Self { sources, clocks, entries, rooms: Vec::new(), overwritten };
        timeline.keep(filter);
        timeline.rooms = timeline.find_rooms(filter);
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

    fn find_rooms(&self, filter: &Filter) -> Vec<Room> {
        let mut found: BTreeMap<RoomKey, Vec<usize>> = BTreeMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            if let Some(key) = entry.room()
                && filter.room.is_none_or(|wanted| wanted == key.room)
            {
                found.entry(key).or_default().push(at);
            }
        }
        let around = Around::of(&self.entries);
        let mut rooms: Vec<Room> = found
            .into_iter()
            .map(|(key, mut entries)| {
                around.add(&self.entries, &mut entries);
                let verdict = Verdict::of(self, &entries);
                Room { key, entries, verdict }
            })
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
}

/// What happened between two nodes, and not to one room: it belongs to the story of each of their rooms of that time.
struct Around {
    /// By whose event it is and of which peer: places, in order.
    between: BTreeMap<(usize, String), Vec<usize>>,
}

impl Around {
    fn of(entries: &[Entry]) -> Self {
        let mut between: BTreeMap<(usize, String), Vec<usize>> = BTreeMap::new();
        for (at, entry) in entries.iter().enumerate() {
            if let (None, Some(peer)) = (entry.room(), entry.peer_node()) {
                between.entry((entry.source, peer.to_owned())).or_default().push(at);
            }
        }
        Self { between }
    }

    /// Adds to a room's events those of its sessions that lie between them, and the release of its own grants.
    fn add(&self, all: &[Entry], entries: &mut Vec<usize>) {
        let (Some(&first), Some(&last)) = (entries.first(), entries.last()) else { return };
        let with: BTreeSet<(usize, &str)> =
            entries.iter().filter_map(|&at| Some((all[at].source, all[at].peer_node()?))).collect();
        let grants: BTreeSet<&str> =
            entries.iter().filter_map(|&at| all[at].event.grant.as_deref()).collect();
        let mut more: Vec<usize> = Vec::new();
        for (source, peer) in with {
            let Some(found) = self.between.get(&(source, peer.to_owned())) else { continue };
            let from = found.partition_point(|&at| at < first);
            let to = found.partition_point(|&at| at <= last);
            more.extend(found[from..to].iter().filter(|&&at| {
                let event = &all[at].event;
                match event.kind {
                    Kind::ReleaseSent => event.grant.as_deref().is_some_and(|grant| grants.contains(grant)),
                    _ => true,
                }
            }));
        }
        entries.extend(more);
        entries.sort_unstable();
    }
}

/// One life of a node, while its dumps are put together.
struct Life {
    source: Source,
    /// The latest pair of clocks.
    monotonic_ns: u64,
    unix_ns: u64,
    overwritten: u64,
    /// By serial.
    events: BTreeMap<u64, (Option<Arc<Peer>>, Event)>,
}

impl Life {
    fn of(file: &File) -> Self {
        let header = &file.header;
        let source = Source {
            name: header.name.clone(),
            node: header.node.clone(),
            incarnation: header.incarnation.clone(),
            files: 0,
            events: 0,
            correction_ns: 0,
        };
        Self { source, monotonic_ns: 0, unix_ns: 0, overwritten: 0, events: BTreeMap::new() }
    }

    fn add(&mut self, file: &File) {
        self.source.files += 1;
        self.overwritten = self.overwritten.max(file.overwritten);
        if file.header.monotonic_ns >= self.monotonic_ns {
            (self.monotonic_ns, self.unix_ns) = (file.header.monotonic_ns, file.header.unix_ns);
        }
        for (peer, event) in &file.events {
            self.events.entry(event.serial).or_insert_with(|| (peer.clone(), event.clone()));
        }
    }

    /// A time on this life's own wall clock. Times of a broken dump may be anything.
    fn wall_ns(&self, at_ns: u64) -> i64 {
        let wall = i128::from(self.unix_ns) + i128::from(at_ns) - i128::from(self.monotonic_ns);
        wall.clamp(0, i64::MAX.into()) as i64
    }

    /// When an event happened at the earliest: its time is that of the turn's beginning.
    fn earliest_ns(&self, serial: u64) -> i64 {
        self.events.get(&serial).map_or(0, |(_, event)| self.wall_ns(event.at_ns))
    }

    /// When it had happened at the latest. A turn may be long, and a process that is stopped in the middle of one finds
    /// what was sent seconds after it began.
    fn latest_ns(&self, serial: u64) -> i64 {
        let Some((_, event)) = self.events.get(&serial) else { return 0 };
        let later = self.events.range(serial..).map(|(_, (_, later))| later.at_ns);
        let next = later.into_iter().find(|&later| later > event.at_ns);
        self.wall_ns(next.unwrap_or(self.monotonic_ns.max(event.at_ns)))
    }

    fn first_ns(&self) -> i64 {
        self.events.values().next().map_or(0, |(_, event)| self.wall_ns(event.at_ns))
    }
}

/// Merges by corrected time, and lets nothing come before what it is the effect of.
fn ordered(lives: &[Life], links: &Links) -> Vec<Entry> {
    let mut queues: Vec<VecDeque<Entry>> = (0..)
        .zip(lives)
        .map(|(source, life)| {
            let entry = |(peer, event): &(Option<Arc<Peer>>, Event)| Entry {
                source,
                peer: peer.clone(),
                unix_ns: life.wall_ns(event.at_ns).saturating_add(life.source.correction_ns),
                event: event.clone(),
            };
            life.events.values().map(entry).collect()
        })
        .collect();
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
