//! What is printed.

use std::time::Duration;

use crate::Job;
use crate::model::{EXPERTS, HIDDEN, TOP_K};
use crate::one_process::Line;

pub fn of(job: &Job, lines: &[Line]) -> String {
    let place = if job.threads { "threads" } else { "processes" };
    let mut out = format!(
        "{:?} mode, {} ranks ({place}), {EXPERTS} experts, top {TOP_K}, hidden {HIDDEN}, FP8 there, BF16 back\n",
        job.mode, job.ranks
    );
    out += "               rows an expert                      ms, mean of the ranks     difference        FP8        lost\n";
    out += "step  layer   tokens   min  mean   max  wire MB  dispatch  experts  combine  to one process      error      weight\n";
    for line in lines {
        let sum: u32 = line.counts.iter().sum();
        let (least, most) = (line.counts.iter().min(), line.counts.iter().max());
        let [dispatch, experts, combine] = line.times.map(ms);
        out += &format!(
            "{:>4}  {:>5}  {:>7}  {:>4}  {:>4.1}  {:>4}  {:>7.2}  {dispatch:>8.2}  {experts:>7.2}  {combine:>7.2}  {:>14}  {:>9.1e}  {:>10}\n",
            line.step,
            line.layer,
            line.tokens,
            least.unwrap_or(&0),
            f64::from(sum) / line.counts.len().max(1) as f64,
            most.unwrap_or(&0),
            line.wire_bytes as f64 / 1e6,
            line.difference,
            line.fp8,
            lost(job, line),
        );
    }
    match lines.iter().flat_map(|line| &line.wrong).next() {
        Some(what) => out + "WRONG: " + what,
        None => out + &finding(job),
    }
}

fn lost(job: &Job, line: &Line) -> String {
    match (job.kill, job.mode) {
        (None, _) => "-".to_owned(),
        (_, crate::Mode::Latency) => format!("{:.1} %", 100.0 * line.lost),
        (_, crate::Mode::Throughput) => format!("{} of {}", line.unanswered, line.choices),
    }
}

fn finding(job: &Job) -> String {
    match job.kill {
        None => "every token of every layer has the bits of a single process".to_owned(),
        Some(rank) => format!(
            "rank {rank} died after step {}; every token of the others has the bits of a single process without its experts, and each rank knows what its tokens lost",
            job.steps_of(rank) - 1
        ),
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
