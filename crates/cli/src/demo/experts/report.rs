//! What the experts' scenes came to, for people and for programs.

use serde::Serialize;

use super::talk::Done;
use super::{Mode, RANKS};
use crate::table::Table;

/// One mode's part of the demo.
pub struct Scene {
    mode: Mode,
    /// That were timed.
    pub steps: u32,
    dispatch_us: Vec<f64>,
    combine_us: Vec<f64>,
    logical_bytes: u64,
    wire_bytes: u64,
    /// Rows that were compared, and those that were not right.
    rows: u64,
    pub wrong: u64,
    pub death: Option<Death>,
    /// Regions that were still mapped at the end.
    pub leaks: u64,
    /// What went wrong, in words.
    pub troubles: Vec<String>,
}

/// What became of the others when a rank was killed.
#[derive(Serialize, Clone, Copy)]
pub struct Death {
    pub rank: u32,
    /// From the kill until the last of the others went on without the rank.
    pub masked_ms: f64,
    /// Steps that each of the others made without it.
    pub steps: u32,
    /// Of the weight of their tokens.
    pub lost_share: f64,
}

impl Scene {
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            steps: 0,
            dispatch_us: Vec::new(),
            combine_us: Vec::new(),
            logical_bytes: 0,
            wire_bytes: 0,
            rows: 0,
            wrong: 0,
            death: None,
            leaks: 0,
            troubles: Vec::new(),
        }
    }

    /// One that could not be begun.
    pub fn without(mode: Mode, why: String) -> Self {
        let mut scene = Self::new(mode);
        scene.trouble(&why);
        scene
    }

    /// Adds one rank's steps.
    pub fn add(&mut self, done: &Done) {
        let us = |list: &[u64]| list.iter().map(|&ns| ns as f64 / 1e3).collect::<Vec<f64>>();
        self.dispatch_us.extend(us(&done.dispatch_ns));
        self.combine_us.extend(us(&done.combine_ns));
        self.logical_bytes += done.logical_bytes;
        self.wire_bytes += done.wire_bytes;
        self.add_rows(done);
    }

    /// Adds what was compared in steps that are not timed.
    pub fn add_rows(&mut self, done: &Done) {
        self.rows += done.rows;
        self.wrong += done.wrong;
    }

    pub fn trouble(&mut self, what: &str) {
        self.troubles.push(self.told(what));
    }

    /// Something that is the reason of what went wrong after it.
    pub fn first_trouble(&mut self, what: String) {
        self.troubles.insert(0, self.told(&what));
    }

    fn told(&self, what: &str) -> String {
        format!("experts, {}: {what}", self.mode.name())
    }

    /// Every row was right, and the others went on when a rank was killed.
    pub fn is_whole(&self) -> bool {
        self.troubles.is_empty()
            && self.wrong == 0
            && self.rows > 0
            && self.death.is_some_and(|d| d.steps > 0)
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(&Line {
            bench: "demo-experts",
            mode: self.mode,
            ranks: RANKS,
            tokens: self.mode.tokens(),
            steps: self.steps,
            dispatch_us_p50: quantile(&self.dispatch_us, 0.5),
            dispatch_us_p99: quantile(&self.dispatch_us, 0.99),
            combine_us_p50: quantile(&self.combine_us, 0.5),
            combine_us_p99: quantile(&self.combine_us, 0.99),
            logical_gb_per_s: self.gb_per_s(),
            wire_share: self.wire_share(),
            rows: self.rows,
            wrong_rows: self.wrong,
            killed: self.death,
            leaks: self.leaks,
            verified: self.is_whole(),
            troubles: &self.troubles,
        })
    }

    /// Of a rank: each choice's row there and each result back, in the time of both.
    fn gb_per_s(&self) -> Option<f64> {
        let rank_steps = self.dispatch_us.len() as f64;
        let us = quantile(&self.dispatch_us, 0.5)? + quantile(&self.combine_us, 0.5)?;
        Some(self.logical_bytes as f64 / rank_steps / us / 1e3)
    }

    fn wire_share(&self) -> Option<f64> {
        (self.logical_bytes > 0).then(|| self.wire_bytes as f64 / self.logical_bytes as f64)
    }
}

/// A scene's line for programs.
#[derive(Serialize)]
struct Line<'a> {
    bench: &'static str,
    mode: Mode,
    ranks: u32,
    /// Of each rank and step.
    tokens: u32,
    steps: u32,
    dispatch_us_p50: Option<f64>,
    dispatch_us_p99: Option<f64>,
    combine_us_p50: Option<f64>,
    combine_us_p99: Option<f64>,
    logical_gb_per_s: Option<f64>,
    /// Bytes between ranks, of those that DeepEP's formula counts.
    wire_share: Option<f64>,
    rows: u64,
    wrong_rows: u64,
    killed: Option<Death>,
    leaks: u64,
    /// Every row was right, before and after a rank was killed.
    verified: bool,
    troubles: &'a [String],
}

/// The table at the end.
pub fn table(scenes: &[Scene]) -> String {
    let mut table = Table::new(&[
        "experts",
        "ranks",
        "tokens",
        "steps",
        "dispatch p50 µs",
        "p99",
        "combine p50 µs",
        "p99",
        "GB/s",
        "wire/logical",
        "rows",
        "right",
    ]);
    let mut deaths = String::new();
    for scene in scenes {
        let figure =
            |value: Option<f64>, places: usize| value.map_or(NONE.into(), |v| format!("{v:.places$}"));
        let us = |list: &[f64], share: f64| figure(quantile(list, share), 0);
        table.row(vec![
            scene.mode.name().to_owned(),
            RANKS.to_string(),
            scene.mode.tokens().to_string(),
            scene.steps.to_string(),
            us(&scene.dispatch_us, 0.5),
            us(&scene.dispatch_us, 0.99),
            us(&scene.combine_us, 0.5),
            us(&scene.combine_us, 0.99),
            figure(scene.gb_per_s(), 2),
            figure(scene.wire_share(), 2),
            scene.rows.to_string(),
            match (scene.rows, scene.wrong) {
                (0, 0) => NONE.into(),
                (_, 0) => "all".into(),
                (_, wrong) => format!("{wrong} WRONG"),
            },
        ]);
        if let Some(Death { rank, masked_ms, steps, lost_share }) = scene.death {
            deaths += &format!(
                "{}: rank {rank} was killed; the others went on after {masked_ms:.1} ms, lost {:.1} % of the weight (steps without it: {steps})\n",
                scene.mode.name(),
                100.0 * lost_share
            );
        }
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let crowded = match processors < RANKS as usize {
        true => {
            format!(" {RANKS} ranks share {processors} processors:\na rank's times hold the others' work.")
        }
        false => String::new(),
    };
    format!(
        "{table}\n{deaths}\nA layer of DeepSeek-R1: hidden 7,168, top 8 of 256 experts, FP8 there, BF16 back; every row is compared. GB/s: of a\n\
         rank, by DeepEP's formula, which counts each choice's row and each result.{crowded}\n"
    )
}

/// Stands where there is no figure.
const NONE: &str = "–";

/// The value that this share of the list does not exceed.
fn quantile(list: &[f64], share: f64) -> Option<f64> {
    let mut sorted = list.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(at.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value_of_the_list() {
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), Some(2.0));
        assert_eq!(quantile(&[3.0, 1.0, 2.0, 4.0], 0.99), Some(4.0));
        assert_eq!(quantile(&[3.0], 0.0), Some(3.0));
    }

    #[test]
    fn a_scene_without_a_death_or_with_a_wrong_row_is_not_whole() {
        let death = Death { rank: 3, masked_ms: 1.0, steps: 9, lost_share: 0.25 };
        let whole = || Scene { rows: 10, death: Some(death), ..Scene::new(Mode::Latency) };
        assert!(whole().is_whole());
        assert!(!Scene { wrong: 1, ..whole() }.is_whole());
        assert!(!Scene { rows: 0, ..whole() }.is_whole());
        assert!(!Scene { death: None, ..whole() }.is_whole());
        assert!(!Scene { death: Some(Death { steps: 0, ..death }), ..whole() }.is_whole());
        assert!(table(&[Scene { wrong: 2, ..whole() }]).contains("2 WRONG"));
    }
}
