//! Draws runs, one below the other on the same scale: each piece of the computation, and what had arrived by when.

use std::path::Path;
use std::time::Instant;

use plotters::prelude::*;

use crate::{Mode, Problem, Run};

pub fn draw(path: &Path, runs: &[(Mode, Run)]) -> Result<(), Problem> {
    let since = |run: &Run, at: Instant| at.saturating_duration_since(run.begin).as_secs_f64() * 1e3;
    let longest_ms = runs.iter().map(|(_, run)| since(run, run.delivered)).fold(0.0, f64::max);
    let sheet = SVGBackend::new(path, (1000, 140 * runs.len() as u32)).into_drawing_area();
    sheet.fill(&WHITE)?;
    for (band, (mode, run)) in sheet.split_evenly((runs.len(), 1)).iter().zip(runs) {
        let caption =
            format!("{}: computed (above), arrived (below), tail {}", mode.name(), crate::ms(run.tail()));
        let mut chart = ChartBuilder::on(band)
            .caption(caption, ("sans-serif", 15))
            .margin(6)
            .x_label_area_size(30)
            .build_cartesian_2d(0.0..longest_ms * 1.02, 0.0..2.1)?;
        chart.configure_mesh().disable_mesh().disable_y_axis().x_desc("ms").draw()?;
        let pieces = run.computed.iter().enumerate().map(|(nth, &(begin, end))| {
            let color = if nth % 2 == 0 { RGBColor(70, 120, 180) } else { RGBColor(140, 180, 220) };
            Rectangle::new([(since(run, begin), 1.2), (since(run, end), 2.0)], color.filled())
        });
        chart.draw_series(pieces)?;
        // A staircase: a step for each look that found more.
        let all = run.arrived.last().map_or(1, |&(_, arrivals)| arrivals.max(1)) as f64;
        let mut stairs = vec![(0.0, 0.0)];
        for &(at, arrivals) in &run.arrived {
            let (_, before) = stairs[stairs.len() - 1];
            stairs.extend([(since(run, at), before), (since(run, at), arrivals as f64 / all)]);
        }
        chart.draw_series([PathElement::new(stairs, RGBColor(190, 80, 40).stroke_width(2))])?;
        let delivered = since(run, run.delivered);
        chart.draw_series([PathElement::new(vec![(delivered, 0.0), (delivered, 2.0)], BLACK)])?;
    }
    sheet.present()?;
    Ok(())
}
