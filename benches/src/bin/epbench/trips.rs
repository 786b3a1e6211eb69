//! One step there and back: beside the same with nobody to wait for, and beside a word there and back. Each of them takes
//! its turn in every iteration.

use std::ops::Range;
use std::time::{Duration, Instant};

use crossdock_benches::{RoundTrips, Sample, sleeps_here};

use crate::control::{Control, Go, Note, Op, now_ns};
use crate::error::Error;
use crate::measure::longest_us;
use crate::ours::{Arrived, Inputs, Ours};
use crate::reference;
use crate::setup::{Setup, Shared};

/// What came out, an entry an iteration; only the first rank has it.
#[derive(Default)]
pub struct Trips {
    /// The longest of any rank.
    pub step_us: Sample,
    pub alone_us: Sample,
    /// One trip, there and back.
    pub trip_us: Sample,
    /// From the start of the rank that is late.
    pub parked_step_us: Sample,
    pub parked_trip_us: Sample,
    /// Of each rank, how often a step slept.
    pub sleeps: Vec<Sample>,
}

/// Runs a rank's part, after its group has run and has results.
pub fn run<C: FnMut() -> Result<(), Error>>(
    setup: &Setup,
    shared: &Shared,
    ours: &mut Ours,
    inputs: &Inputs,
    control: &mut Control<'_, C>,
) -> Result<Trips, Error> {
    let rank = control.rank;
    let (mut parked, mut alone) = (Ours::parked(setup, &shared.parked, rank)?, Ours::alone(setup)?);
    let ranks = setup.config.ranks();
    control.meet()?;
    parked.whole(setup, rank, inputs, |mut arrived| {
        fill(setup, setup.problem.groups_of(rank), ranks, |source| source, &mut arrived);
    })?;
    alone.whole(setup, rank, inputs, |mut arrived| {
        fill(setup, 0..setup.problem.groups(), 1, |_| rank, &mut arrived);
    })?;
    let mut found = Trips { sleeps: vec![Sample::default(); ranks as usize], ..Trips::default() };
    let (begun, budget) = (Instant::now(), Duration::from_secs_f64(setup.options.seconds));
    for at in 0_u32.. {
        let goes_on =
            at < WARM_UPS + LEAST || at < WARM_UPS + setup.options.iterations && begun.elapsed() < budget;
        if control.decide(|| if goes_on { Go::Ours } else { Go::Stop })? == Go::Stop {
            break;
        }
        // What ran before has had the caches; the last time counts.
        for _ in 0..REPEATS {
            control.time(Op::Step, || done(ours.whole(setup, rank, inputs, |_| {})))?;
        }
        for _ in 0..REPEATS {
            control.time(Op::Alone, || done(alone.whole(setup, rank, inputs, |_| {})))?;
        }
        control.meet()?;
        let started = Instant::now();
        control.trips(TRIPS, false)?;
        let trip = started.elapsed() / TRIPS;
        let before = slept()?;
        control.time(Op::ParkedStep, || {
            // Each in turn is late, so that somebody sleeps.
            let begun = Instant::now();
            while at % ranks == rank && begun.elapsed() < LATE {
                std::hint::spin_loop();
            }
            let begin = now_ns();
            parked.whole(setup, rank, inputs, |_| {}).map(|()| (begin, 0))
        })?;
        control.tell_sleeps(slept()? - before);
        control.meet()?;
        let started = Instant::now();
        control.trips(PARKED_TRIPS, true)?;
        let parked_trip = (started.elapsed() / PARKED_TRIPS).saturating_sub(2 * RoundTrips::PAUSE);
        if rank == 0 && at >= WARM_UPS {
            found.take(control, trip, parked_trip);
        }
        control.meet()?;
    }
    if setup.options.verify {
        for combined in [&ours.combined, &parked.combined, &alone.combined] {
            control.add_wrong(reference::wrong_sums(setup, rank, 0, combined));
        }
        control.meet()?;
    }
    Ok(found)
}

impl Trips {
    fn take<C: FnMut() -> Result<(), Error>>(
        &mut self,
        control: &Control<'_, C>,
        trip: Duration,
        parked_trip: Duration,
    ) {
        let us = |time: Duration| time.as_nanos() as f64 / 1e3;
        self.step_us.push(longest_us(&control.notes(Op::Step)));
        self.alone_us.push(longest_us(&control.notes(Op::Alone)));
        self.trip_us.push(us(trip));
        self.parked_step_us.push(late_us(&control.notes(Op::ParkedStep)));
        self.parked_trip_us.push(us(parked_trip));
        for (of_rank, sleeps) in self.sleeps.iter_mut().zip(control.sleeps()) {
            of_rank.push(sleeps as f64);
        }
    }

    /// Sleeps of a step, on average, of the rank that slept most.
    pub fn mean_sleeps(&self) -> f64 {
        let mean = |of_rank: &Sample| of_rank.values().iter().sum::<f64>() / of_rank.values().len() as f64;
        self.sleeps.iter().map(mean).fold(0.0, f64::max)
    }

    /// The most sleeps of any step and rank.
    pub fn most_sleeps(&self) -> f64 {
        self.sleeps.iter().map(Sample::max).fold(0.0, f64::max)
    }
}

/// Writes what the experts of these groups are taken to compute, for tokens of `source_of` the ranks of the group.
fn fill(
    setup: &Setup,
    groups: Range<usize>,
    ranks: u32,
    source_of: impl Fn(u32) -> u32,
    arrived: &mut Arrived<'_, '_>,
) {
    for (local, group) in groups.enumerate() {
        let (results, tokens) = arrived.results_mut(ranks, local);
        for (row, (source, token)) in results.chunks_exact_mut(setup.problem.hidden).zip(tokens) {
            setup.problem.result(group, source_of(source), token, 0, row);
        }
    }
}

fn late_us(notes: &[Note]) -> f64 {
    let last = |of: fn(&Note) -> u64| notes.iter().map(of).max().unwrap_or(0);
    last(|note| note.end).saturating_sub(last(|note| note.sent)) as f64 / 1e3
}

fn done(result: Result<(), Error>) -> Result<(u64, u64), Error> {
    result.map(|()| (0, 0))
}

fn slept() -> Result<u64, Error> {
    sleeps_here().map_err(Error::io("counting sleeps"))
}

const WARM_UPS: u32 = 20;
const LEAST: u32 = 10;
const REPEATS: u32 = 4;
/// Longer than anybody takes to fall asleep.
const LATE: Duration = Duration::from_micros(100);
/// So many in one measurement: the clock takes as long as a fifth of a trip.
const TRIPS: u32 = 100;
const PARKED_TRIPS: u32 = 10;
