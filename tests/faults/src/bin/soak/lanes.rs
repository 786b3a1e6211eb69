//! Rooms one after another between the hub and a peer, on each of a few lanes. Both sides draw the same rooms.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossdock::Peer;
use crossdock_faults::{Bench, Chance, Plan, Side, is_typed};

/// Rooms beside each other with each peer.
pub const LANES: u64 = 2;

/// What has happened, seen from the hub.
#[derive(Debug, Default)]
pub struct Tally {
    pub ends: BTreeMap<&'static str, u64>,
    pub latest: Duration,
    pub peers: u64,
    pub killed: u64,
    pub stopped: u64,
    pub resets: u64,
    /// Rules that were broken.
    pub wrong: Vec<String>,
}

/// One side's half of all lanes with a peer.
#[derive(Clone, Copy)]
pub struct Lanes<'a> {
    pub bench: &'a Bench,
    pub peer: Peer,
    /// Which of the two this is.
    pub is_hub: bool,
    /// Both sides have the same; no other peer has.
    pub seed: u64,
    pub is_over: &'a AtomicBool,
}

impl Lanes<'_> {
    /// Lives one lane's rooms until it is over.
    pub fn run(&self, lane: u64) -> Tally {
        let mut tally = Tally::default();
        let mut chance = Chance::new(self.seed, lane);
        for number in 0.. {
            if self.is_over.load(Ordering::Relaxed) {
                break;
            }
            let sends = chance.hits(1, 2) == self.is_hub;
            let plan = Plan::draw(&mut chance, self.seed << 24 | lane << 20 | number);
            let side = if sends { Side::Prefill } else { Side::Decode };
            match self.bench.live(&plan, side, self.peer) {
                Ok(heard) if is_typed(&heard.ended) => {
                    *tally.ends.entry(heard.word()).or_default() += 1;
                    tally.latest = tally.latest.max(heard.late);
                }
                Ok(heard) => tally.wrong.push(format!("{side:?} of {plan:?} ended: {:?}", heard.ended)),
                Err(wrong) => tally.wrong.push(wrong),
            }
            if !tally.wrong.is_empty() {
                break;
            }
        }
        tally
    }
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        other.ends.iter().for_each(|(end, count)| *self.ends.entry(end).or_default() += count);
        self.latest = self.latest.max(other.latest);
        self.peers += other.peers;
        self.killed += other.killed;
        self.stopped += other.stopped;
        self.resets += other.resets;
        self.wrong.extend_from_slice(&other.wrong);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ends, latest, peers, killed, stopped, resets, .. } = self;
        let all: u64 = ends.values().sum();
        write!(f, "{all} rooms of the hub's:")?;
        ends.iter().try_for_each(|(end, count)| write!(f, " {count} {end}"))?;
        write!(
            f,
            "; the latest {} ms after its deadline\n{peers} peers, {killed} killed, {stopped} stopped and continued; \
             {resets} times all connections were reset or frozen",
            latest.as_millis()
        )
    }
}
