//! The counts of the hub over time, and the judgement of each.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use crossdock_faults::{Bench, Census};
use plotters::prelude::*;

use crate::{SOON, heap};

/// What a kind has to be when it is quiet: no peer is there, and no room.
#[derive(Clone, Copy)]
enum Rule {
    /// Nothing is left.
    Zero,
    /// Exactly what it was after the first round.
    Same,
    /// The median of the last third of the counts is no more than this above that of the first third.
    Within(u64),
}

/// Every kind that is counted.
///
/// Some cannot be the same each time. The C library keeps stacks of ended threads and memory of its own for the next ones:
/// so mappings may differ by a few, and what is resident by what fragments: by less than the hub's cache of 14 MiB, so
/// that regions that are not unmapped show; its own pages are resident from the beginning. On the heap remain what the hub
/// remembers of rooms that ended lately, of which it is told to keep 256, the table of grants, whose 512 places are used in
/// turns, the flight recorder's rings, and tables whose capacity doubles whenever more is under way than ever before. So
/// the pieces of the heap are the sharp count: a piece that is lost with each room, or with each tenth one, is hundreds in
/// two minutes.
const KINDS: [(&str, Rule); 19] = [
    ("rooms", Rule::Zero),
    ("grants", Rule::Zero),
    ("sessions", Rule::Zero),
    ("pages free", Rule::Same),
    ("owned", Rule::Zero),
    ("shared", Rule::Zero),
    ("granted", Rule::Zero),
    ("quarantined", Rule::Zero),
    ("abandoned", Rule::Zero),
    ("sockets", Rule::Same),
    ("descriptors", Rule::Same),
    ("threads", Rule::Same),
    ("children", Rule::Zero),
    ("regions", Rule::Same),
    ("pages' takes failed", Rule::Within(u64::MAX)),
    ("mappings", Rule::Within(24)),
    ("heap pieces", Rule::Within(150)),
    ("heap bytes", Rule::Within(512 << 10)),
    ("resident bytes", Rule::Within(8 << 20)),
];

/// The counts of one moment.
#[derive(Clone)]
pub struct Counts {
    at: Duration,
    census: Census,
    values: [u64; KINDS.len()],
}

impl Counts {
    pub fn take(hub: &Bench, begin: Instant) -> Result<Self, String> {
        let stats = hub.stats(SOON).ok_or("the hub's progress loop does not answer")?;
        let (pool, census) = (hub.pool.stats(), Census::of_this_process());
        let pages = [pool.free, pool.owned, pool.shared, pool.granted, pool.quarantined, pool.abandoned];
        let [free, owned, shared, granted, quarantined, abandoned] = pages.map(u64::from);
        let values = [
            stats.rooms as u64,
            stats.grants as u64,
            stats.sessions as u64,
            free,
            owned,
            shared,
            granted,
            quarantined,
            abandoned,
            census.sockets,
            census.descriptors,
            census.threads,
            census.children,
            census.regions,
            pool.failed_takes,
            census.mappings,
            heap::blocks(),
            heap::bytes(),
            census.resident_bytes,
        ];
        Ok(Self { at: begin.elapsed(), census, values })
    }

    /// Whether the process holds of the system what it held here.
    pub fn is_back(&self, now: &Census) -> bool {
        (self.census.descriptors, self.census.threads, self.census.regions)
            == (now.descriptors, now.threads, now.regions)
    }
}

/// All counts of a soak that were taken in quiet.
pub struct Report {
    quiet: Vec<Counts>,
}

/// Quiet counts before any is judged by its trend: what grows at first has grown then.
const WARM_UP: usize = 2;
/// Fewer say nothing of a trend.
const ENOUGH: usize = WARM_UP + 6;

impl Report {
    pub fn new() -> Self {
        Self { quiet: Vec::new() }
    }

    /// What every later count is compared with.
    pub fn base(&self) -> Option<&Counts> {
        self.quiet.first()
    }

    pub fn is_enough(&self) -> bool {
        self.quiet.len() >= ENOUGH
    }

    pub fn quiet(&mut self, counts: Counts) {
        self.print("quiet", &counts);
        self.quiet.push(counts);
    }

    pub fn print_head(&self) {
        let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
        println!("at, in seconds | when | {}", names.join(" | "));
    }

    pub fn print(&self, when: &str, counts: &Counts) {
        let values: Vec<String> = counts.values.iter().map(u64::to_string).collect();
        println!("{:.0} | {when} | {}", counts.at.as_secs_f64(), values.join(" | "));
    }

    /// Prints the table; true if nothing has grown.
    pub fn judge(&self) -> bool {
        let count = self.quiet.len();
        println!(
            "quiet, {count} times\n{:<20} {:>14} {:>14} {:>16}  rule",
            "kind", "first", "last", "slope a minute"
        );
        let mut is_flat = true;
        for (at, (name, rule)) in KINDS.iter().enumerate() {
            let values: Vec<u64> = self.quiet.iter().map(|counts| counts.values[at]).collect();
            let (Some(&first), Some(&last)) = (values.first(), values.last()) else { return false };
            let (holds, told) = match rule {
                Rule::Zero => (values.iter().all(|&value| value == 0), "always 0".to_owned()),
                Rule::Same => (values.iter().all(|&value| value == first), "always the same".to_owned()),
                Rule::Within(u64::MAX) => (true, "told only".to_owned()),
                Rule::Within(most) => {
                    let grown = growth(values.get(WARM_UP..).unwrap_or_default());
                    (grown <= *most as i64, format!("grown by {grown}, at most {most}"))
                }
            };
            let verdict = if holds { "" } else { "  GROWS" };
            println!("{name:<20} {first:>14} {last:>14} {:>16.2}  {told}{verdict}", self.slope(at));
            is_flat &= holds;
        }
        is_flat
    }

    /// By least squares, over all quiet counts.
    fn slope(&self, kind: usize) -> f64 {
        let points =
            self.quiet.iter().map(|counts| (counts.at.as_secs_f64() / 60.0, counts.values[kind] as f64));
        let points: Vec<(f64, f64)> = points.collect();
        let count = points.len() as f64;
        let mean_x = points.iter().map(|(x, _)| x).sum::<f64>() / count;
        let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / count;
        let spread: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
        let shared: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
        if spread == 0.0 { 0.0 } else { shared / spread }
    }

    /// Draws every kind that is not always 0, each in the proportion to its highest count.
    pub fn draw(&self, path: &Path) -> Result<(), Box<dyn Error>> {
        let area = SVGBackend::new(path, (1200, 700)).into_drawing_area();
        area.fill(&WHITE)?;
        let minutes = self.quiet.last().map_or(1.0, |counts| counts.at.as_secs_f64() / 60.0);
        let mut chart = ChartBuilder::on(&area)
            .caption("what the hub holds in quiet, each kind in parts of its most", ("sans-serif", 20))
            .margin(20)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..minutes, 0.0..1.1)?;
        chart.configure_mesh().x_desc("minutes").draw()?;
        for (at, (name, _)) in KINDS.iter().enumerate() {
            let most = self.quiet.iter().map(|counts| counts.values[at]).max().unwrap_or(0);
            if most == 0 {
                continue;
            }
            let part =
                |counts: &Counts| (counts.at.as_secs_f64() / 60.0, counts.values[at] as f64 / most as f64);
            let color = Palette99::pick(at).to_rgba();
            chart
                .draw_series(LineSeries::new(self.quiet.iter().map(part), color.stroke_width(2)))?
                .label(format!("{name}, at most {most}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        area.present()?;
        Ok(())
    }
}

/// How much higher the last third is than the first one, by their medians.
fn growth(values: &[u64]) -> i64 {
    let third = values.len().div_ceil(3);
    let median = |part: &[u64]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part.get(part.len() / 2).copied().unwrap_or(0) as i64
    };
    median(&values[values.len() - third..]) - median(&values[..third])
}
