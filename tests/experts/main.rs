//! The ranks of groups under every kind of fault, in virtual time: the real code of `crossdock-ep`, of whose threads one runs
//! at a time. One seed is one run, to the last byte.
//!
//! More seeds: `CROSSDOCK_EP_SEEDS=20000 cargo test -p crossdock-tests --release --test experts -- --nocapture`.
//! One seed again: `CROSSDOCK_EP_SEED=7 cargo test -p crossdock-tests --test experts`.

mod answers;
#[allow(dead_code, reason = "shared with the crate's own tests, which use more of it")]
#[path = "../../crates/ep/tests/both/inputs.rs"]
mod inputs;
mod life;
mod plan;
mod rank;
#[allow(dead_code, reason = "shared with the crate's own tests, which use more of it")]
#[path = "../../crates/ep/tests/both/reference.rs"]
mod reference;
mod stage;
mod tally;

use std::io::Write;
use std::ops::Range;
use std::time::{Duration, Instant};

use crossdock_ep::planted::Planted;

use crate::life::play;
use crate::plan::{Fault, Phase, Plan};
use crate::tally::Tally;

#[test]
fn the_rules_hold_whatever_happens() {
    if let Some(seed) = number("CROSSDOCK_EP_SEED") {
        let outcome = told(seed);
        println!("{}\n{} turns\n{}", Plan::new(seed).tell(), outcome.turns, outcome.tally);
        return;
    }
    let all = match number("CROSSDOCK_EP_SEEDS") {
        Some(seeds) => play_all(0..seeds, Duration::MAX),
        // At least so many, and as many more as the time allows.
        None => play_all(0..LEAST_SEEDS, Duration::MAX).and(play_all(LEAST_SEEDS..u64::MAX, MORE_TIME)),
    };
    let mut told =
        format!("{} lives, {} turns, the longest call {:.1} limits\n", all.lives, all.turns, all.longest);
    told += &all.tally.to_string();
    // Past the harness, which shows what tests print only when they fail.
    std::io::stderr().write_all(told.as_bytes()).expect("standard error");
    for (fault, name) in Fault::KINDS.iter().enumerate() {
        let phases = if fault == Fault::LEAVES { &[Phase::Between][..] } else { &Phase::ALL };
        for &phase in phases {
            assert!(all.tally.times(fault, phase) > 0, "{name} has never met {phase:?}");
        }
    }
    for what in COUNTED {
        assert!(all.tally.of(what) > 0, "never: {what}");
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..40 {
        let [first, again] = [told(seed), told(seed)];
        assert_eq!((first.hash, first.turns), (again.hash, again.turns), "seed {seed}");
    }
}

/// Each of these bugs, planted into the real code, breaks a rule before long.
#[test]
fn planted_bugs_are_found() {
    let mut missed = Vec::new();
    for bug in Planted::ALL {
        let find = |seed: u64| Some((seed, play(&Plan::new(seed), Some(bug)).violation?));
        match (0..MOST_SEEDS).find_map(find) {
            Some((seed, violation)) => {
                let what: String = violation.chars().take(140).collect();
                println!("{:<24}{:>5} seeds  {what}", format!("{bug:?}"), seed + 1);
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "{MOST_SEEDS} seeds do not find {missed:?}");
}

/// All lives together.
#[derive(Default)]
struct Played {
    lives: u64,
    turns: u64,
    longest: f64,
    tally: Tally,
}

impl Played {
    fn and(mut self, other: Played) -> Played {
        self.tally.add(other.tally);
        let (lives, turns) = (self.lives + other.lives, self.turns + other.turns);
        Played { lives, turns, longest: self.longest.max(other.longest), tally: self.tally }
    }
}

fn play_all(seeds: Range<u64>, time: Duration) -> Played {
    let begun = Instant::now();
    let mut all = Played::default();
    for seed in seeds.take_while(|_| begun.elapsed() < time) {
        let outcome = told(seed);
        let of_one =
            Played { lives: 1, turns: outcome.turns, longest: outcome.longest, tally: outcome.tally };
        all = all.and(of_one);
    }
    all
}

/// Plays a seed, and says what was planned if a rule is broken.
fn told(seed: u64) -> stage::Outcome {
    let plan = Plan::new(seed);
    let outcome = play(&plan, None);
    if let Some(violation) = &outcome.violation {
        panic!("seed {seed}: {violation}\nCROSSDOCK_EP_SEED={seed}\n{}", plan.tell());
    }
    outcome
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

const COUNTED: [&str; 10] = [
    "combined, of all",
    "combined, some masked",
    "weight lost, reported",
    "weight lost, an error",
    "error: Masked",
    "error: TooFewRanks",
    "error: Mismatch",
    "error: Corrupted",
    "error: Unfit",
    "tried again when out",
];

/// How many seeds may pass before a planted bug is found.
const MOST_SEEDS: u64 = 5000;
/// What is asserted of all lives together holds for these already.
const LEAST_SEEDS: u64 = 1500;
const MORE_TIME: Duration = Duration::from_secs(10);
