//! The picture of a run: how long hand-overs took, how much moved when, and what a page size costs.

use std::fmt::Display;

use plotters::coord::Shift;
use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;

use crate::Handover;

/// What is drawn, panel by panel. Empty lists have no panel.
#[derive(Clone, Debug, Default)]
pub struct Sheet {
    /// Above all panels: what was run.
    pub title: String,
    /// What the replays of one run became.
    pub trails: Vec<Trail>,
    /// Rates by page size.
    pub roofs: Vec<Roof>,
}

/// The hand-overs of one replay.
#[derive(Clone, Debug, Default)]
pub struct Trail {
    /// In the legend.
    pub name: String,
    /// In any order.
    pub handovers: Vec<Handover>,
    /// Of a token, in all layers.
    pub token_bytes: u64,
}

/// The rates of one way to move pages, in GB/s.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Roof {
    /// In the legend.
    pub name: String,
    /// Bytes of a page, and the rate.
    pub points: Vec<(u64, f64)>,
}

/// There is no picture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot draw: {reason}")]
pub struct ChartError {
    /// What the drawing library says.
    pub reason: String,
}

impl Sheet {
    /// The picture, as SVG.
    pub fn svg(&self) -> Result<String, ChartError> {
        let mut text = String::new();
        self.draw(&mut text).map_err(|error| ChartError { reason: error.to_string() })?;
        Ok(text)
    }

    fn draw(&self, text: &mut String) -> Drawn {
        let has_trails = self.trails.iter().any(|trail| !trail.handovers.is_empty());
        let has_roofs = self.roofs.iter().any(|roof| !roof.points.is_empty());
        let panels = 2 * usize::from(has_trails) + usize::from(has_roofs);
        let size = (PANEL_WIDTH * panels.max(1) as u32, TITLE_HEIGHT + PANEL_HEIGHT);
        let root = SVGBackend::with_string(text, size).into_drawing_area();
        root.fill(&WHITE)?;
        let body = root.titled(&self.title, (FONT, 17).into_font())?;
        let areas = body.split_evenly((1, panels.max(1)));
        let mut areas = areas.iter();
        if has_trails {
            areas.next().map_or(Ok(()), |area| self.durations(area))?;
            areas.next().map_or(Ok(()), |area| self.rates(area))?;
        }
        if has_roofs {
            areas.next().map_or(Ok(()), |area| self.roofline(area))?;
        }
        root.present()?;
        Ok(())
    }

    /// The share of requests over the time that they took at most.
    fn durations(&self, area: &Area<'_>) -> Drawn {
        let curves: Vec<(String, Vec<(f64, f64)>)> = self
            .trails
            .iter()
            .flat_map(|trail| {
                [
                    (format!("{}: hand-over", trail.name), cumulated(&trail.handovers, Handover::moving_ns)),
                    (
                        format!("{}: arrival to held", trail.name),
                        cumulated(&trail.handovers, Handover::whole_ns),
                    ),
                ]
            })
            .collect();
        let range = decades(curves.iter().flat_map(|(_, points)| points.iter().map(|point| point.0)));
        let mut chart = ChartBuilder::on(area)
            .caption("How long a request took", (FONT, 15))
            .margin(MARGIN)
            .x_label_area_size(42)
            .y_label_area_size(54)
            .build_cartesian_2d(range.log_scale(), 0.0..100.0)?;
        chart
            .configure_mesh()
            .x_desc("milliseconds (log)")
            .y_desc("% of the delivered requests")
            .y_max_light_lines(1)
            .x_label_formatter(&|value| plain(*value))
            .label_style((FONT, 12))
            .light_line_style(FAINT)
            .draw()?;
        for (at, (name, points)) in curves.into_iter().enumerate() {
            // Two curves of one replay have one colour; the second is thin.
            let style = colour(at / 2).stroke_width(if at % 2 == 0 { 3 } else { 1 });
            chart
                .draw_series(LineSeries::new(points, style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    }

    /// The bytes that moved in each slice of time.
    fn rates(&self, area: &Area<'_>) -> Drawn {
        let curves: Vec<(String, Vec<(f64, f64)>)> =
            self.trails.iter().map(|trail| (trail.name.clone(), trail.rates())).collect();
        let points = || curves.iter().flat_map(|(_, points)| points);
        let seconds = points().map(|point| point.0).fold(1e-3, f64::max);
        let most = points().map(|point| point.1).fold(1e-3, f64::max);
        let mut chart = ChartBuilder::on(area)
            .caption("How much moved", (FONT, 15))
            .margin(MARGIN)
            .x_label_area_size(42)
            .y_label_area_size(54)
            .build_cartesian_2d(0.0..seconds, 0.0..most * 1.15)?;
        chart
            .configure_mesh()
            .x_desc("seconds from the first arrival")
            .y_desc("GB/s moved")
            .max_light_lines(1)
            .label_style((FONT, 12))
            .light_line_style(FAINT)
            .draw()?;
        for (at, (name, points)) in curves.into_iter().enumerate() {
            let style = colour(at).stroke_width(2);
            chart
                .draw_series(LineSeries::new(points, style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    }

    /// The rates by page size.
    fn roofline(&self, area: &Area<'_>) -> Drawn {
        let points = || self.roofs.iter().flat_map(|roof| &roof.points);
        let sizes = decades(points().map(|point| point.0 as f64));
        let rates = decades(points().map(|point| point.1));
        let mut chart = ChartBuilder::on(area)
            .caption("What a page size gives", (FONT, 15))
            .margin(MARGIN)
            .x_label_area_size(42)
            .y_label_area_size(54)
            .build_cartesian_2d(sizes.log_scale(), rates.log_scale())?;
        chart
            .configure_mesh()
            .x_desc("bytes of a page in one layer (log)")
            .y_desc("GB/s (log)")
            .x_label_formatter(&|value| plain(*value))
            .y_label_formatter(&|value| plain(*value))
            .label_style((FONT, 12))
            .light_line_style(FAINT)
            .draw()?;
        for (at, roof) in self.roofs.iter().enumerate() {
            let points: Vec<(f64, f64)> =
                roof.points.iter().map(|&(bytes, rate)| (bytes as f64, rate)).collect();
            let style = colour(at).stroke_width(2);
            // Ours stands out among the means that it is compared with.
            let filled = ShapeStyle { filled: at == 0, ..style };
            chart
                .draw_series(LineSeries::new(points.clone(), style))?
                .label(&roof.name)
                .legend(move |(x, y)| Circle::new((x + 9, y), 4, filled));
            chart.draw_series(points.into_iter().map(|point| Circle::new(point, 4, filled)))?;
        }
        legend(&mut chart, SeriesLabelPosition::LowerRight)
    }
}

impl Trail {
    /// GB/s over seconds from the first arrival on, each request's bytes spread over its hand-over.
    fn rates(&self) -> Vec<(f64, f64)> {
        let first_ns = self.handovers.iter().map(|one| one.arrived_ns).min().unwrap_or(0);
        let last_ns = self.handovers.iter().map(|one| one.end_ns).max().unwrap_or(0);
        let slice_ns = ((last_ns - first_ns) / SLICES).max(1);
        let mut bytes = vec![0.0; SLICES as usize + 1];
        for one in &self.handovers {
            let begin = one.begin_ns().saturating_sub(first_ns);
            let end = (one.end_ns - first_ns).max(begin + 1);
            let rate = f64::from(one.moved_tokens()) * self.token_bytes as f64 / (end - begin) as f64;
            for at in begin / slice_ns..=(end - 1) / slice_ns {
                let inside = end.min((at + 1) * slice_ns) - begin.max(at * slice_ns);
                if let Some(bytes) = bytes.get_mut(at as usize) {
                    *bytes += rate * inside as f64;
                }
            }
        }
        let slice_s = slice_ns as f64 / 1e9;
        let middle = |at: usize| (at as f64 + 0.5) * slice_s;
        let whole = bytes.iter().take(SLICES as usize).enumerate();
        whole.map(|(at, bytes)| (middle(at), bytes / 1e9 / slice_s)).collect()
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Milliseconds, and the percentage of requests that took no longer.
fn cumulated(handovers: &[Handover], each: fn(&Handover) -> u64) -> Vec<(f64, f64)> {
    let mut sorted: Vec<u64> = handovers.iter().map(each).collect();
    sorted.sort_unstable();
    let count = sorted.len() as f64;
    // More points than the panel has pixels would only make the file longer.
    let step = (sorted.len() / MOST_POINTS).max(1);
    let last = sorted.len().saturating_sub(1);
    let places = (0..sorted.len()).filter(|at| at % step == 0 || *at == last);
    places.map(|at| (ms(sorted[at]), (at + 1) as f64 / count * 100.0)).collect()
}

/// A logarithm needs something above 0: what took less than a microsecond counts as one.
fn ms(ns: u64) -> f64 {
    (ns as f64 / 1e6).max(1e-3)
}

/// From the power of ten at or below the least to the one at or above the most.
fn decades(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (least, most) = values
        .filter(|value| *value > 0.0)
        .fold((f64::INFINITY, 0.0_f64), |(least, most), value| (least.min(value), most.max(value)));
    if most == 0.0 {
        return 1.0..10.0;
    }
    let (low, high) = (least.log10().floor(), most.log10().ceil());
    10f64.powf(low)..10f64.powf(if high > low { high } else { low + 1.0 })
}

/// As people write numbers: "0.01", "100", "10k".
fn plain(value: f64) -> String {
    match value {
        1e6.. => format!("{}M", rounded(value / 1e6)),
        1e3.. => format!("{}k", rounded(value / 1e3)),
        _ => rounded(value).to_string(),
    }
}

fn rounded(value: f64) -> impl Display {
    (value * 1e4).round() / 1e4
}

fn legend<'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    position: SeriesLabelPosition,
) -> Drawn
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    let style = (FONT, 12).into_font();
    let background = WHITE.mix(0.85);
    chart
        .configure_series_labels()
        .position(position)
        .background_style(background)
        .border_style(FAINT)
        .label_font(style)
        .draw()?;
    Ok(())
}

/// Okabe and Ito's colours, which most colour-blind people can tell apart; dark ones first.
fn colour(at: usize) -> RGBColor {
    const COLOURS: [RGBColor; 5] = [
        RGBColor(0, 114, 178),
        RGBColor(213, 94, 0),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
        RGBColor(0, 0, 0),
    ];
    COLOURS[at % COLOURS.len()]
}

const FAINT: RGBColor = RGBColor(225, 225, 225);
const FONT: &str = "sans-serif";
const PANEL_WIDTH: u32 = 460;
const PANEL_HEIGHT: u32 = 360;
const TITLE_HEIGHT: u32 = 30;
const MARGIN: u32 = 10;
/// Slices of the time of a replay.
const SLICES: u64 = 120;
const MOST_POINTS: usize = 600;

#[cfg(test)]
mod tests {
    use super::*;

    fn handover(arrived_ms: u64, end_ms: u64, tokens: u32) -> Handover {
        let [arrived_ns, end_ns] = [arrived_ms, end_ms].map(|ms| ms * 1_000_000);
        let (admitted_ns, ready_ns, granted_ns) = (arrived_ns, arrived_ns, arrived_ns);
        Handover { arrived_ns, admitted_ns, ready_ns, granted_ns, end_ns, tokens, ..Handover::default() }
    }

    fn sheet() -> Sheet {
        let handovers = (0..50).map(|at| handover(at * 20, at * 20 + 1 + at, 100 + at as u32)).collect();
        let roof = |name: &str, factor: f64| Roof {
            name: name.into(),
            points: vec![(1152, 2.0 * factor), (4608, 4.0 * factor), (73_728, 5.0 * factor)],
        };
        Sheet {
            title: "a <test>".into(),
            trails: vec![Trail { name: "shm".into(), handovers, token_bytes: 70_272 }],
            roofs: vec![roof("crossdock", 1.0), roof("floor", 1.1)],
        }
    }

    #[test]
    fn what_is_drawn_says_what_it_is() {
        let svg = sheet().svg().unwrap();
        for words in [
            "<svg",
            "a &lt;test&gt;",
            "milliseconds (log)",
            "% of the delivered requests",
            "GB/s moved",
            "seconds from the first arrival",
            "bytes of a page in one layer (log)",
            "shm: hand-over",
            "floor",
            "</svg>",
        ] {
            assert!(svg.contains(words), "{words}: {svg}");
        }
    }

    #[test]
    fn what_is_not_there_has_no_panel() {
        let all = sheet();
        let only_roofs = Sheet { trails: Vec::new(), ..all.clone() }.svg().unwrap();
        assert!(only_roofs.contains("bytes of a page") && !only_roofs.contains("milliseconds"));
        let only_trails = Sheet { roofs: Vec::new(), ..all.clone() }.svg().unwrap();
        assert!(!only_trails.contains("bytes of a page") && only_trails.contains("milliseconds"));
        assert!(Sheet { roofs: Vec::new(), trails: Vec::new(), ..all }.svg().unwrap().contains("</svg>"));
    }

    #[test]
    fn rates_come_to_all_that_moved() {
        let trail = &sheet().trails[0];
        let rates = trail.rates();
        let slice_s = rates[1].0 - rates[0].0;
        let moved: f64 = rates.iter().map(|(_, rate)| rate * slice_s).sum();
        let tokens: u32 = trail.handovers.iter().map(|one| one.tokens).sum();
        let all = f64::from(tokens) * 70_272.0 / 1e9;
        // What the division into slices leaves over at the end.
        assert!((moved / all - 1.0).abs() < 0.01, "{moved} of {all} GB");
    }

    #[test]
    fn axes_reach_around_what_they_show() {
        assert_eq!(decades([3.0, 0.0, 250.0].into_iter()), 1.0..1000.0);
        assert_eq!(decades([100.0].into_iter()), 100.0..1000.0);
        assert_eq!(decades([].into_iter()), 1.0..10.0);
        assert_eq!([0.001, 1.0, 1500.0, 2e6].map(plain), ["0.001", "1", "1.5k", "2M"]);
    }
}
