//! One rank's run: everything once and compared, then again and again with the clock, then once more and compared.

use std::time::{Duration, Instant};

use crossdock::Memory;
use crossdock_benches::rows::Rows;
use crossdock_benches::{Aligned, Sample};
use crossdock_ep::{Bf16, Payload, Quantiser, ScaleRule};
use crossdock_shm::copy::{Copier, Strategy};

use crate::control::{Control, Go, Note, Op};
use crate::error::Error;
use crate::floor::Floor;
use crate::options::Mode;
use crate::ours::{Inputs, Ours};
use crate::problem::Problem;
use crate::process;
use crate::reference;
use crate::setup::{Setup, Shared};
use crate::trips::{self, Trips};

/// What a run came to; only the first rank has it.
#[derive(Default)]
pub struct Measured {
    pub dispatch: Halves,
    pub combine: Halves,
    /// The floor's times, from the first start to the last end.
    pub floor_dispatch_us: Sample,
    pub floor_combine_us: Sample,
    /// Nothing where nothing is quantised.
    pub quantise_us: Sample,
    /// The floor stores past the cache.
    pub streamed: bool,
    /// Bytes of a step of a rank.
    pub wire_bytes: f64,
    pub logical_bytes: f64,
    pub wrong_rows: u64,
    pub trips: Option<Trips>,
}

/// Times of an operation: a value an iteration.
#[derive(Default)]
pub struct Halves {
    /// The longest of any rank.
    pub us: Sample,
    /// Where the time goes, on average over the ranks.
    pub send_us: Sample,
    pub receive_us: Sample,
    pub wait_us: Sample,
}

/// Runs a rank to its end. `check` says now and then whether the others are still there.
pub fn run(
    setup: &Setup,
    shared: &Shared,
    rank: u32,
    check: impl FnMut() -> Result<(), Error>,
) -> Result<Measured, Error> {
    let mut control = Control::new(setup, &shared.words, rank, check);
    // A thread that the library has of its own is not to share this one's processor.
    let apart = if setup.is_apart() { Some(Ours::meet(setup, &mut control)?) } else { None };
    process::pin(rank)?;
    let ours = match apart {
        Some(ours) => ours,
        None => Ours::new(setup, &shared.regions, rank)?,
    };
    let mut bench = Bench {
        setup,
        shared,
        ours,
        floor: Floor::new(setup, shared, rank),
        inputs: Inputs::default(),
        measured: Measured::default(),
        told: Instant::now(),
    };
    bench.tell_if_long("preparing", &control);
    bench.prepare(0, &mut control)?;
    match setup.options.turns {
        true => bench.take_turns(&mut control)?,
        false => bench.time(&mut control)?,
    }
    if setup.options.round_trips {
        bench.measured.trips = Some(trips::run(setup, shared, &mut bench.ours, &bench.inputs, &mut control)?);
    }
    if setup.options.verify {
        bench.tell_if_long("comparing", &control);
        // With other values: what an earlier step has left would be wrong.
        bench.prepare(1, &mut control)?;
    }
    bench.measured.wrong_rows = control.wrong();
    (bench.measured.wire_bytes, bench.measured.logical_bytes) = control.bytes();
    Ok(bench.measured)
}

pub struct Bench<'a> {
    pub setup: &'a Setup,
    shared: &'a Shared,
    pub ours: Ours,
    floor: Floor<'a>,
    pub inputs: Inputs,
    pub measured: Measured,
    /// When it last said something.
    told: Instant,
}

impl Bench<'_> {
    /// Makes tokens, and runs each slot once: results are written, and all is compared that is asked for.
    fn prepare<C: FnMut() -> Result<(), Error>>(
        &mut self,
        salt: u64,
        control: &mut Control<'_, C>,
    ) -> Result<(), Error> {
        let (setup, shared, rank) = (self.setup, self.shared, control.rank);
        self.inputs = inputs(setup, shared, rank, salt);
        for slot in 0..setup.config.slots {
            self.ours.combined.fill(POISON);
            self.ours.step(setup, control, &self.inputs, slot, |mut arrived, control| {
                control.add_wrong(reference::wrong_arrivals(setup, shared, rank, &arrived));
                write_results(setup, shared, salt, slot, &mut arrived, control);
                Ok(())
            })?;
            if salt == 0 {
                self.floor.take_results(slot, control);
            }
            for strategy in [Strategy::Cached, Strategy::Streamed] {
                // Twice: it takes the others' scales as they are, and at first they may be older ones.
                for _ in 0..2 {
                    control.meet()?;
                    self.floor.dispatch(&self.inputs, strategy);
                }
                control.meet()?;
                control.add_wrong(reference::wrong_floor(setup, shared, rank));
            }
            self.floor.combined.fill(POISON);
            self.floor.combine(slot);
            if setup.options.verify {
                control.add_wrong(reference::wrong_sums(setup, rank, salt, &self.ours.combined));
                control.add_wrong(reference::wrong_sums(setup, rank, salt, &self.floor.combined));
            }
            control.meet()?;
        }
        Ok(())
    }

    fn time<C: FnMut() -> Result<(), Error>>(&mut self, control: &mut Control<'_, C>) -> Result<(), Error> {
        let options = &self.setup.options;
        let (started, budget) = (Instant::now(), Duration::from_secs_f64(options.seconds));
        let mut floors = [Sample::default(), Sample::default()];
        let (mut warm_ups, mut count) = (0, 0);
        for at in 0.. {
            // A quarter of the time is for warming up where there is not enough for all of it.
            let is_warm = warm_ups >= WARM_UPS || warm_ups >= 4 && started.elapsed() > budget / 4;
            let [cached, streamed] = &floors;
            let go = control.decide(|| {
                if count >= options.iterations || count >= LEAST_ITERATIONS && started.elapsed() > budget {
                    Go::Stop
                } else if if is_warm { streamed.median() < cached.median() } else { warm_ups % 2 == 1 } {
                    Go::Streamed
                } else {
                    Go::Cached
                }
            })?;
            let strategy = match go {
                Go::Stop | Go::Ours => break,
                Go::Cached => Strategy::Cached,
                Go::Streamed => Strategy::Streamed,
            };
            self.iterate(strategy, at % self.setup.config.slots, control)?;
            if control.rank > 0 {
                continue;
            }
            let floor_us = span_us(&control.notes(Op::FloorDispatch));
            if !is_warm {
                floors[usize::from(go == Go::Streamed)].push(floor_us);
                warm_ups += 1;
                continue;
            }
            count += 1;
            self.take(floor_us, control);
            self.measured.streamed = go == Go::Streamed;
            if self.told.elapsed() > TELL {
                self.tell(&format!("{count} of {} iterations", options.iterations), control);
            }
        }
        Ok(())
    }

    /// Everything once, ours and the floor in turn.
    fn iterate<C: FnMut() -> Result<(), Error>>(
        &mut self,
        strategy: Strategy,
        slot: u32,
        control: &mut Control<'_, C>,
    ) -> Result<(), Error> {
        self.ours.step(self.setup, control, &self.inputs, slot, |_, _| Ok(()))?;
        self.time_floor(strategy, slot, control)?;
        if quantises(self.setup) {
            control.time(Op::Quantise, || {
                self.floor.quantise(&self.inputs);
                Ok((0, 0))
            })?;
        }
        Ok(())
    }

    /// The floor's dispatch and combine, once.
    pub fn time_floor<C: FnMut() -> Result<(), Error>>(
        &mut self,
        strategy: Strategy,
        slot: u32,
        control: &mut Control<'_, C>,
    ) -> Result<(), Error> {
        control.time(Op::FloorDispatch, || {
            self.floor.dispatch(&self.inputs, strategy);
            Ok((0, 0))
        })?;
        control.time(Op::FloorCombine, || {
            self.floor.combine(slot);
            Ok((0, 0))
        })
    }

    /// Takes what all ranks have noted of an iteration.
    fn take<C: FnMut() -> Result<(), Error>>(&mut self, floor_us: f64, control: &Control<'_, C>) {
        self.measured.dispatch.take(&control.notes(Op::Dispatch));
        self.measured.combine.take(&control.notes(Op::Combine));
        self.measured.floor_dispatch_us.push(floor_us);
        self.measured.floor_combine_us.push(span_us(&control.notes(Op::FloorCombine)));
        if quantises(self.setup) {
            self.measured.quantise_us.push(span_us(&control.notes(Op::Quantise)));
        }
    }

    fn tell_if_long<C>(&mut self, what: &str, control: &Control<'_, C>) {
        if self.setup.needed_bytes() > LONG_BYTES {
            self.tell(what, control);
        }
    }

    fn tell<C>(&mut self, what: &str, control: &Control<'_, C>) {
        self.told = Instant::now();
        if control.rank == 0 {
            eprintln!("epbench: {what}");
        }
    }
}

impl Halves {
    pub fn take(&mut self, notes: &[Note]) {
        let us = |of: fn(&Note) -> u64| notes.iter().map(move |note| of(note) as f64 / 1e3);
        let mean = |of: fn(&Note) -> u64| us(of).sum::<f64>() / notes.len() as f64;
        self.us.push(longest_us(notes));
        self.send_us.push(mean(|note| note.sent - note.begin));
        self.receive_us.push(mean(|note| (note.end - note.sent).saturating_sub(note.waited)));
        self.wait_us.push(mean(|note| note.waited));
    }
}

/// The longest of any rank.
pub fn longest_us(notes: &[Note]) -> f64 {
    notes.iter().map(|note| (note.end - note.begin) as f64 / 1e3).fold(0.0, f64::max)
}

/// From the first start to the last end.
pub fn span_us(notes: &[Note]) -> f64 {
    let begin = notes.iter().map(|note| note.begin).min().unwrap_or(0);
    let end = notes.iter().map(|note| note.end).max().unwrap_or(0);
    (end - begin) as f64 / 1e3
}

fn quantises(setup: &Setup) -> bool {
    setup.options.mode == Mode::Latency && setup.payload == Payload::Fp8
}

/// A rank's tokens, and what the reference makes of them.
fn inputs(setup: &Setup, shared: &Shared, rank: u32, salt: u64) -> Inputs {
    let Problem { tokens, hidden, .. } = setup.problem;
    let mut rows: Aligned<Bf16> = Aligned::new(tokens * hidden);
    let is_ready = !quantises(setup);
    let mut values: Aligned<u8> = Aligned::new(if is_ready { tokens * setup.row_bytes() } else { 0 });
    let mut scales: Aligned<u8> = Aligned::new(if is_ready { tokens * setup.scale_bytes() } else { 0 });
    let mut of_row = vec![0.0; setup.scale_bytes() / 4];
    for (token, row) in rows.chunks_exact_mut(hidden).enumerate() {
        setup.problem.input(rank, token, salt, row);
        reference::tell_made(setup, shared, rank, token, row);
        if !is_ready {
            continue;
        }
        let values = &mut values[token * setup.row_bytes()..][..setup.row_bytes()];
        if setup.payload == Payload::Bf16 {
            for (bytes, value) in values.chunks_exact_mut(2).zip(row) {
                bytes.copy_from_slice(&value.to_bits().to_le_bytes());
            }
            continue;
        }
        Quantiser::detect().quantise(row, ScaleRule::Plain, values, &mut of_row);
        let scales = &mut scales[token * setup.scale_bytes()..][..setup.scale_bytes()];
        for (bytes, scale) in scales.chunks_exact_mut(4).zip(&of_row) {
            bytes.copy_from_slice(&f32::to_le_bytes(*scale));
        }
    }
    Inputs { rows, values, scales }
}

/// Writes what the experts are taken to compute, and says where it is.
fn write_results<C: FnMut() -> Result<(), Error>>(
    setup: &Setup,
    shared: &Shared,
    salt: u64,
    slot: u32,
    arrived: &mut crate::ours::Arrived<'_, '_>,
    control: &Control<'_, C>,
) {
    let region = &shared.regions[control.rank as usize];
    let groups = setup.problem.groups_of(control.rank);
    let count = groups.len();
    for (local, group) in groups.enumerate() {
        let (results, tokens) = arrived.results_mut(setup.config.ranks(), local);
        for (row, (source, token)) in results.chunks_exact_mut(setup.problem.hidden).zip(tokens) {
            setup.problem.result(group, source, token, salt, row);
        }
        if results.is_empty() {
            continue;
        }
        let at = match setup.is_apart() {
            false => results.as_ptr().addr() - region.base().addr(),
            true => copied(results, region, setup.results_at(slot, local, count)),
        };
        control.tell_results(slot, group, at);
    }
}

/// Copies results to where the floor can read them, and says where that is.
fn copied(results: &[Bf16], memory: &Memory, at: usize) -> usize {
    let bytes: Vec<u8> = results.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    Rows { memory, at, row_bytes: bytes.len() }.scatter(Copier::detect(), &bytes, &[0]);
    at
}

/// No sum of results.
const POISON: Bf16 = Bf16::from_bits(0x7fff);
const WARM_UPS: u32 = 20;
const LEAST_ITERATIONS: u32 = 10;
/// What takes seconds to be filled and compared.
const LONG_BYTES: u64 = 1 << 30;
const TELL: Duration = Duration::from_secs(5);
