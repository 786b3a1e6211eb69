//! Whole nodes under every kind of fault, in virtual time: the real protocol, engine and KV code over simulated
//! ports and streams. One seed is one run, to the last event.
//!
//! More seeds: `CROSSDOCK_SEEDS=20000 cargo test -p crossdock-tests --release --test simulation -- --nocapture`.
//! One seed again, with everything that happened: `CROSSDOCK_SEED=7 cargo test -p crossdock-tests --test simulation`.

mod chance;
mod checks;
mod faults;
mod ledger;
mod network;
mod node;
mod port;
mod report;
mod room;
mod rules;
mod run;
mod scenario;
mod workload;
mod world;

use std::time::Duration;

use crate::faults::Fault;
use crate::room::EndKind;
use crate::run::{replay, run, run_many};

#[test]
fn the_rules_hold_whatever_happens() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    if let Some(seed) = number("CROSSDOCK_SEED") {
        return replay(seed);
    }
    let tally = match number("CROSSDOCK_SEEDS") {
        Some(seeds) => run_many(0..seeds, Duration::MAX),
        // At least so many, and as many more as the time allows.
        None => run_many(0..LEAST_SEEDS, Duration::MAX).and(LEAST_SEEDS, Duration::from_secs(20)),
    };
    println!("{tally}");
    for fault in Fault::ALL {
        for kind in [EndKind::Delivered, EndKind::CancelledHere, EndKind::ExpiredHere, EndKind::PeerLost] {
            assert!(tally.meetings.count(Some(fault), kind) > 0, "{fault:?} has never met {kind:?}");
        }
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..12 {
        let [first, again] = [run(seed), run(seed)].map(|outcome| outcome.expect("the rules hold"));
        assert_eq!(first, again, "seed {seed}");
    }
}

const LEAST_SEEDS: u64 = 500;
