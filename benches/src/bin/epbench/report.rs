//! What came out, for programs and for people.

use crossdock_benches::Sample;
use serde::Serialize;

use crate::error::Error;
use crate::measure::{Halves, Measured};
use crate::options::{BackendName, Dtype, Mode, PortName, Routing, ScaleName, name};
use crate::setup::Setup;
use crate::trips::Trips;

/// The whole of a run.
pub struct Report {
    line: Line,
    verify: bool,
    wrong_rows: u64,
}

/// The line for programs. The first keys, up to `verified`, keep their names and meaning.
#[derive(Serialize)]
struct Line {
    bench: &'static str,
    mode: Mode,
    ranks: u32,
    tokens: u32,
    dispatch_us_p50: f64,
    dispatch_us_p99: f64,
    combine_us_p50: f64,
    combine_us_p99: f64,
    /// Of a rank: each choice's row there, and each result back.
    logical_gb_per_s: f64,
    /// Of a rank: what other ranks' memory was written or read.
    wire_gb_per_s: f64,
    floor_us: f64,
    efficiency: f64,
    verified: bool,
    /// The median of the iterations' own ratios to the floor, which a busy machine disturbs less than `efficiency`.
    efficiency_paired: f64,
    /// The least of each: what a busy machine disturbs least.
    dispatch_us_min: f64,
    combine_us_min: f64,
    floor_dispatch_us_min: f64,
    floor_combine_us_min: f64,
    floor_dispatch_us_p50: f64,
    floor_combine_us_p50: f64,
    floor_stores: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantise_us_p50: Option<f64>,
    /// Where the time of ours goes, on average over the ranks.
    dispatch_send_us_p50: f64,
    dispatch_receive_us_p50: f64,
    dispatch_wait_us_p50: f64,
    combine_send_us_p50: f64,
    combine_receive_us_p50: f64,
    combine_wait_us_p50: f64,
    port: PortName,
    backend: BackendName,
    hidden: u32,
    experts: u32,
    topk: u32,
    dtype: Dtype,
    routing: Routing,
    slots: u32,
    scales: ScaleName,
    seed: u64,
    /// Iterations that count.
    iterations: usize,
    /// There are more ranks than processors.
    crowded: bool,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    trips: Option<TripsLine>,
}

/// A step in one go, beside the same with nobody to wait for and a word there and back.
#[derive(Clone, Copy, Serialize)]
struct TripsLine {
    step_us_p50: f64,
    step_us_p99: f64,
    alone_us_p50: f64,
    alone_us_p99: f64,
    trip_us_p50: f64,
    trip_us_p99: f64,
    /// The median of the iterations' own ratios of a step less two trips to the step alone.
    step_ratio: f64,
    parked_step_us_p50: f64,
    parked_step_us_p99: f64,
    parked_trip_us_p50: f64,
    parked_trip_us_p99: f64,
    /// Of a parked step, at the rank that slept most.
    parked_sleeps_mean: f64,
    parked_sleeps_most: f64,
}

impl TripsLine {
    fn new(trips: &Trips) -> Self {
        let without_trips: Sample = trips
            .step_us
            .values()
            .iter()
            .zip(trips.trip_us.values())
            .map(|(step, trip)| step - 2.0 * trip)
            .collect();
        let [p50, p99] = [0.5, 0.99].map(|share| move |sample: &Sample| short(sample.quantile(share)));
        Self {
            step_us_p50: p50(&trips.step_us),
            step_us_p99: p99(&trips.step_us),
            alone_us_p50: p50(&trips.alone_us),
            alone_us_p99: p99(&trips.alone_us),
            trip_us_p50: p50(&trips.trip_us),
            trip_us_p99: p99(&trips.trip_us),
            step_ratio: short(without_trips.median_ratio(&trips.alone_us)),
            parked_step_us_p50: p50(&trips.parked_step_us),
            parked_step_us_p99: p99(&trips.parked_step_us),
            parked_trip_us_p50: p50(&trips.parked_trip_us),
            parked_trip_us_p99: p99(&trips.parked_trip_us),
            parked_sleeps_mean: short(trips.mean_sleeps()),
            parked_sleeps_most: trips.most_sleeps(),
        }
    }
}

impl Report {
    pub fn new(setup: &Setup, measured: Measured) -> Self {
        let options = &setup.options;
        let Measured { dispatch, combine, floor_dispatch_us, floor_combine_us, quantise_us, .. } = &measured;
        let ours_us = dispatch.us.median() + combine.us.median();
        let floor_us = floor_dispatch_us.median() + floor_combine_us.median();
        let both = |one: &Sample, other: &Sample| -> Sample {
            one.values().iter().zip(other.values()).map(|(one, other)| one + other).collect()
        };
        let paired = both(floor_dispatch_us, floor_combine_us).median_ratio(&both(&dispatch.us, &combine.us));
        let line = Line {
            bench: "ep",
            mode: options.mode,
            ranks: options.ranks,
            tokens: options.tokens,
            dispatch_us_p50: short(dispatch.us.median()),
            dispatch_us_p99: short(dispatch.us.quantile(0.99)),
            combine_us_p50: short(combine.us.median()),
            combine_us_p99: short(combine.us.quantile(0.99)),
            logical_gb_per_s: short(measured.logical_bytes / ours_us / 1e3),
            wire_gb_per_s: short(measured.wire_bytes / ours_us / 1e3),
            floor_us: short(floor_us),
            efficiency: short(floor_us / ours_us),
            verified: options.verify && measured.wrong_rows == 0,
            efficiency_paired: short(paired),
            dispatch_us_min: short(dispatch.us.min()),
            combine_us_min: short(combine.us.min()),
            floor_dispatch_us_min: short(floor_dispatch_us.min()),
            floor_combine_us_min: short(floor_combine_us.min()),
            floor_dispatch_us_p50: short(floor_dispatch_us.median()),
            floor_combine_us_p50: short(floor_combine_us.median()),
            floor_stores: if measured.streamed { "streamed" } else { "cached" },
            quantise_us_p50: (!quantise_us.values().is_empty()).then(|| short(quantise_us.median())),
            dispatch_send_us_p50: short(dispatch.send_us.median()),
            dispatch_receive_us_p50: short(dispatch.receive_us.median()),
            dispatch_wait_us_p50: short(dispatch.wait_us.median()),
            combine_send_us_p50: short(combine.send_us.median()),
            combine_receive_us_p50: short(combine.receive_us.median()),
            combine_wait_us_p50: short(combine.wait_us.median()),
            port: options.port,
            backend: options.backend,
            hidden: options.hidden,
            experts: options.experts,
            topk: options.topk,
            dtype: options.dtype,
            routing: options.routing,
            slots: options.slots,
            scales: options.scales,
            seed: options.seed,
            iterations: Halves::count(dispatch),
            crowded: setup.crowded,
            trips: measured.trips.as_ref().map(TripsLine::new),
        };
        Self { line, verify: options.verify, wrong_rows: measured.wrong_rows }
    }

    /// Whether every row that was compared is right.
    pub fn verdict(&self) -> Result<(), Error> {
        match self.wrong_rows {
            0 => Ok(()),
            rows => Err(Error::WrongRows { rows }),
        }
    }

    pub fn json(&self) -> String {
        serde_json::to_string(&self.line).expect("numbers and names")
    }

    pub fn table(&self) -> String {
        let line = &self.line;
        let mut out = format!(
            "{} mode, {} ranks{}{}, {} tokens a rank, hidden {}, {} experts, top {}, {}, {} routing, {} slot(s), scales by {}\n",
            name(line.mode),
            line.ranks,
            if line.port == PortName::Shm { String::new() } else { format!(" over {}", name(line.port)) },
            if line.crowded { " on fewer processors" } else { "" },
            line.tokens,
            line.hidden,
            line.experts,
            line.topk,
            name(line.dtype),
            name(line.routing),
            line.slots,
            name(line.scales),
        );
        out += &format!(
            "{:<9}{:>9}{:>9}{:>9}{:>9}{:>10}{:>9}{:>9}{:>10}{:>9}\n",
            "us", "least", "p50", "p99", "floor", "its least", "ours is", "sending", "receiving", "waiting"
        );
        let rows = [
            (
                "dispatch",
                [line.dispatch_us_min, line.dispatch_us_p50, line.dispatch_us_p99],
                [line.floor_dispatch_us_p50, line.floor_dispatch_us_min],
                [line.dispatch_send_us_p50, line.dispatch_receive_us_p50, line.dispatch_wait_us_p50],
            ),
            (
                "combine",
                [line.combine_us_min, line.combine_us_p50, line.combine_us_p99],
                [line.floor_combine_us_p50, line.floor_combine_us_min],
                [line.combine_send_us_p50, line.combine_receive_us_p50, line.combine_wait_us_p50],
            ),
        ];
        for (what, [min, p50, p99], [floor, floor_min], [send, receive, wait]) in rows {
            out += &format!(
                "{what:<9}{min:>9.1}{p50:>9.1}{p99:>9.1}{floor:>9.1}{floor_min:>10.1}{:>7.2} x{send:>9.1}{receive:>10.1}{wait:>9.1}\n",
                p50 / floor
            );
        }
        if let Some(us) = line.quantise_us_p50 {
            out += &format!("the quantiser alone: {us:.1} us\n");
        }
        if let Some(trips) = line.trips {
            out += &format!(
                "a step in one go: {:.2} us, alone {:.2}, a word there and back {:.2}: without two of those {:.2} of alone; \
                 parked {:.1}, a word {:.1}, {:.2} sleeps a step\n",
                trips.step_us_p50,
                trips.alone_us_p50,
                trips.trip_us_p50,
                trips.step_ratio,
                trips.parked_step_us_p50,
                trips.parked_trip_us_p50,
                trips.parked_sleeps_mean,
            );
        }
        out += &format!(
            "of a rank: {:.2} GB/s by DeepEP's formula, {:.2} GB/s between ranks; efficiency {:.3} (in pairs {:.3}), {} iterations, the floor's stores {}",
            line.logical_gb_per_s,
            line.wire_gb_per_s,
            line.efficiency,
            line.efficiency_paired,
            line.iterations,
            line.floor_stores,
        );
        out += match (self.verify, self.wrong_rows) {
            (false, _) => "; not verified\n",
            (true, 0) => "; every row verified\n",
            (true, _) => "; WRONG ROWS\n",
        };
        out
    }
}

impl Halves {
    fn count(&self) -> usize {
        self.us.values().len()
    }
}

/// Five digits are more than any figure here is worth.
fn short(value: f64) -> f64 {
    format!("{value:.4e}").parse().unwrap_or(value)
}
