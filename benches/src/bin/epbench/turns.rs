//! Measures when another program says so, which measures something else in between.

use std::io::{Write, stdin, stdout};
use std::time::{Duration, Instant};

use crossdock_benches::Sample;
use crossdock_shm::copy::Strategy;
use serde::Serialize;

use crate::control::{Control, Go, Op};
use crate::error::Error;
use crate::measure::{Bench, longest_us, span_us};

/// That all is prepared.
#[derive(Serialize)]
struct Ready {
    ready: bool,
    floor_stores: &'static str,
}

/// A turn's times, iteration by iteration.
#[derive(Default, Serialize)]
struct Turn {
    dispatch_us: Vec<f64>,
    combine_us: Vec<f64>,
}

impl Bench<'_> {
    /// Takes turns until there are no more.
    pub fn take_turns<C: FnMut() -> Result<(), Error>>(
        &mut self,
        control: &mut Control<'_, C>,
    ) -> Result<(), Error> {
        let stores = self.faster_stores(control)?;
        if control.rank == 0 {
            tell(&Ready {
                ready: true,
                floor_stores: if stores == Go::Streamed { "streamed" } else { "cached" },
            })?;
        }
        loop {
            let mut budget = Duration::ZERO;
            let part = control.rest(|| {
                let (part, ms) = next_turn()?;
                budget = Duration::from_millis(ms);
                Ok(if part == Go::Cached { stores } else { part })
            })?;
            if part == Go::Stop {
                return Ok(());
            }
            let turn = self.take_turn(part, budget, control)?;
            if control.rank == 0 {
                tell(&turn)?;
            }
        }
    }

    /// As often as there is time, after a few times that do not count: another program has had the caches.
    fn take_turn<C: FnMut() -> Result<(), Error>>(
        &mut self,
        part: Go,
        budget: Duration,
        control: &mut Control<'_, C>,
    ) -> Result<Turn, Error> {
        let mut turn = Turn::default();
        let begun = Instant::now();
        let (mut counted_from, mut warm) = (begun, WARM_UPS);
        for at in 0_u32.. {
            if at > 0 && at < warm && begun.elapsed() > budget / 4 {
                warm = at;
            }
            if at <= warm {
                counted_from = Instant::now();
            }
            let count = turn.dispatch_us.len();
            let goes_on = || count < 1 || count < MOST && counted_from.elapsed() < budget;
            if control.decide(|| if goes_on() { part } else { Go::Stop })? == Go::Stop {
                break;
            }
            let [dispatch_us, combine_us] = self.once(part, at % self.setup.config.slots, control)?;
            if control.rank == 0 && at >= warm {
                turn.dispatch_us.push(dispatch_us);
                turn.combine_us.push(combine_us);
                self.count(part, control);
            }
        }
        Ok(turn)
    }

    /// The times of a dispatch and of a combine; only the first rank knows those of all.
    fn once<C: FnMut() -> Result<(), Error>>(
        &mut self,
        part: Go,
        slot: u32,
        control: &mut Control<'_, C>,
    ) -> Result<[f64; 2], Error> {
        let strategy = match part {
            Go::Cached => Strategy::Cached,
            Go::Streamed => Strategy::Streamed,
            Go::Ours | Go::Stop => {
                self.ours.step(self.setup, control, &self.inputs, slot, |_, _| Ok(()))?;
                return Ok([Op::Dispatch, Op::Combine].map(|op| longest_us(&control.notes(op))));
            }
        };
        self.time_floor(strategy, slot, control)?;
        Ok([Op::FloorDispatch, Op::FloorCombine].map(|op| span_us(&control.notes(op))))
    }

    /// For the report at the end.
    fn count<C: FnMut() -> Result<(), Error>>(&mut self, part: Go, control: &Control<'_, C>) {
        let measured = &mut self.measured;
        if part == Go::Ours {
            measured.dispatch.take(&control.notes(Op::Dispatch));
            measured.combine.take(&control.notes(Op::Combine));
            return;
        }
        measured.floor_dispatch_us.push(span_us(&control.notes(Op::FloorDispatch)));
        measured.floor_combine_us.push(span_us(&control.notes(Op::FloorCombine)));
        measured.streamed = part == Go::Streamed;
    }

    /// Whether the floor is faster if it stores through the cache or past it, sums included.
    fn faster_stores<C: FnMut() -> Result<(), Error>>(
        &mut self,
        control: &mut Control<'_, C>,
    ) -> Result<Go, Error> {
        let mut medians_us = [0.0; 2];
        for (of_part, part) in medians_us.iter_mut().zip([Go::Cached, Go::Streamed]) {
            let turn = self.take_turn(part, Duration::from_millis(100), control)?;
            let both = turn.dispatch_us.iter().zip(&turn.combine_us).map(|(one, other)| one + other);
            *of_part = both.collect::<Sample>().median();
        }
        self.measured.floor_dispatch_us = Sample::default();
        self.measured.floor_combine_us = Sample::default();
        let [cached, streamed] = medians_us;
        control.decide(|| if streamed < cached { Go::Streamed } else { Go::Cached })
    }
}

/// Which part is next and for how many milliseconds; the end of the input stops. The floor is meant by [`Go::Cached`].
fn next_turn() -> Result<(Go, u64), Error> {
    let mut line = String::new();
    stdin().read_line(&mut line).map_err(Error::io("reading standard input"))?;
    let wrong = || Error::Turn { line: line.trim().to_owned() };
    if line.is_empty() {
        return Ok((Go::Stop, 0));
    }
    let (part, ms) = line.trim().split_once(' ').ok_or_else(wrong)?;
    let ms = ms.parse().ok().filter(|ms| *ms <= 60_000).ok_or_else(wrong)?;
    match part {
        "ours" => Ok((Go::Ours, ms)),
        "floor" => Ok((Go::Cached, ms)),
        _ => Err(wrong()),
    }
}

fn tell(line: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string(line).expect("numbers and names");
    writeln!(stdout(), "{text}").map_err(Error::io("writing to standard output"))
}

const WARM_UPS: u32 = 3;
/// Times in one turn.
const MOST: usize = 4096;
