//! One seed, or many on all cores, and what is said of a failure.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossdock_proto::planted::{Planted, plant};
use parking_lot::Mutex;

use crate::panics;
use crate::report::{Fair, Meetings};
use crate::rules::{Rule, Violation};
use crate::world::{Outcome, World};

/// One seed, from beginning to end.
pub fn run(seed: u64) -> Result<Outcome, Violation> {
    let mut world = World::new(seed, false);
    finish(&mut world)
}

/// One seed again, with everything that happened.
pub fn replay(seed: u64) {
    let printer = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::TRACE);
    let printer = printer.without_time().with_ansi(false).with_target(false).with_test_writer().finish();
    let _printed = tracing::subscriber::set_default(printer);
    match finish(&mut World::new(seed, true)) {
        Ok(outcome) => println!("seed {seed}: {} events, {:#018x}", outcome.events, outcome.fingerprint),
        Err(violation) => panic!("seed {seed}: {violation}\n{}", story_with(None, seed)),
    }
}

/// One seed with a bug planted.
pub fn run_with(bug: Planted, seed: u64) -> Result<Outcome, Violation> {
    plant(Some(bug));
    let outcome = run(seed);
    plant(None);
    outcome
}

/// What the flight recorders say of a seed that breaks a rule: it is run again.
pub fn story_with(bug: Option<Planted>, seed: u64) -> String {
    plant(bug);
    let mut world = World::new(seed, false);
    world.past = Some(Vec::new());
    let outcome = finish(&mut world);
    plant(None);
    match outcome {
        Ok(_) => "run again, it breaks no rule".to_owned(),
        Err(violation) => world.story(&violation.what),
    }
}

fn finish(world: &mut World) -> Result<Outcome, Violation> {
    panics::caught(|| world.run()).unwrap_or_else(|what| Err(Violation { rule: Rule::Panics, what }))
}

/// What many seeds have given.
#[derive(Default)]
pub struct Tally {
    pub seeds: u64,
    pub events: u64,
    /// The fewest events and nodes of a seed.
    pub least: Option<(u64, usize)>,
    pub virtual_ns: u64,
    pub took: Duration,
    pub meetings: Meetings,
    pub fair: Fair,
}

/// Runs seeds on every core until they or the time are over. Panics if some break a rule, and names a few of them.
pub fn run_many(seeds: Range<u64>, time: Duration) -> Tally {
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let failures = Mutex::new(Vec::new());
    let work = || {
        let mut tally = Tally::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || began.elapsed() > time || failures.lock().len() >= FAILURES_NAMED {
                return tally;
            }
            match run(seed) {
                Ok(outcome) => tally.count(&outcome),
                Err(violation) => failures.lock().push((seed, violation)),
            }
        }
    };
    let mut tally = Tally::default();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            tally.add(&worker.join().expect("a run's panic is caught"));
        }
    });
    let failures = failures.into_inner();
    if let Some((first, _)) = failures.first() {
        let lines: Vec<String> = failures.iter().map(|(seed, what)| format!("seed {seed}: {what}")).collect();
        panic!(
            "after {} seeds:\n{}\n\nseed {first}:\n{}\nreplay: CROSSDOCK_SEED={first} cargo test -p crossdock-tests \
             --test simulation the_rules -- --nocapture",
            tally.seeds,
            lines.join("\n"),
            story_with(None, *first)
        );
    }
    tally.took = began.elapsed();
    tally
}

const FAILURES_NAMED: usize = 8;

impl Tally {
    fn count(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.events += outcome.events;
        self.count_least((outcome.events, outcome.nodes));
        self.virtual_ns += outcome.virtual_ns;
        self.meetings.add(&outcome.meetings);
        self.fair.add(&outcome.fair);
    }

    fn count_least(&mut self, (events, nodes): (u64, usize)) {
        let (least_events, least_nodes) = self.least.unwrap_or((events, nodes));
        self.least = Some((events.min(least_events), nodes.min(least_nodes)));
    }

    fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        other.least.into_iter().for_each(|least| self.count_least(least));
        self.virtual_ns += other.virtual_ns;
        self.meetings.add(&other.meetings);
        self.fair.add(&other.fair);
    }

    /// More seeds, from `first` on, as far as the time goes.
    pub fn and(mut self, first: u64, time: Duration) -> Self {
        let more = run_many(first..u64::MAX, time);
        self.add(&more);
        self.took += more.took;
        self
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} seeds, {} events (a seed: {} at the least), {} ms of virtual time, in {} ms",
            self.seeds,
            self.events,
            self.least.map_or(0, |(events, _)| events),
            self.virtual_ns / 1_000_000,
            self.took.as_millis()
        )?;
        writeln!(f, "{}", self.fair)?;
        write!(f, "{}", self.meetings)
    }
}
