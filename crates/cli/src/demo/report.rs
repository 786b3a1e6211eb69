//! What the demo shows: progress while it runs, a table at the end.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::talk::{Bye, Ended};
use crate::table::Table;

/// One port's part of the demo.
pub struct Scene {
    port: &'static str,
    /// Requests that were to be handed over.
    asked: usize,
    /// Those whose rooms have begun.
    pub begun: usize,
    limit_gb_per_s: f64,
    delivered: usize,
    pages: u64,
    /// Delivered bytes.
    pub bytes: u64,
    /// When each delivered hand-over began and ended.
    spans_ns: Vec<(u64, u64)>,
    /// Ends other than delivery, by side and reason.
    others: BTreeMap<String, usize>,
    stale: u64,
    /// What did not come home.
    pub leaks: u64,
    /// What went wrong, in words.
    troubles: Vec<String>,
    /// No more rooms are begun, for want of time.
    pub cut_short: bool,
    /// Ends of begun rooms that the prefill side has told.
    prefill_ended: usize,
}

impl Scene {
    pub fn new(port: &'static str, asked: usize, limit_gb_per_s: f64) -> Self {
        Self {
            port,
            asked,
            begun: 0,
            limit_gb_per_s,
            delivered: 0,
            pages: 0,
            bytes: 0,
            spans_ns: Vec::new(),
            others: BTreeMap::new(),
            stale: 0,
            leaks: 0,
            troubles: Vec::new(),
            cut_short: false,
            prefill_ended: 0,
        }
    }

    /// One that could not be begun.
    pub fn without(port: &'static str, asked: usize, why: String) -> Self {
        let mut scene = Self::new(port, asked, 0.0);
        scene.trouble(why);
        scene
    }

    /// Whether another room may begin.
    pub fn may_begin(&self) -> bool {
        self.begun < self.asked && self.troubles.is_empty() && !self.cut_short
    }

    pub fn decode_ended(&mut self, ended: Ended) {
        if !ended.delivered {
            return self.other("decode", &ended.how);
        }
        self.delivered += 1;
        self.pages += ended.pages;
        self.bytes += ended.bytes;
        self.spans_ns.push((ended.begin_ns, ended.end_ns));
        if !ended.right {
            self.trouble(format!("room {} arrived with wrong bytes", ended.room));
        }
    }

    pub fn prefill_ended(&mut self, ended: Ended) {
        self.prefill_ended += 1;
        if !ended.delivered {
            self.other("prefill", &ended.how);
        }
    }

    fn other(&mut self, side: &str, how: &str) {
        *self.others.entry(format!("{side}: {how}")).or_default() += 1;
    }

    pub fn bye(&mut self, name: &str, bye: &Bye) {
        let Bye { pages, rooms, grants, quarantined, held_by, stale } = bye;
        self.leaks += pages + rooms + grants;
        self.stale += stale;
        if pages + rooms + grants > 0 {
            let what = format!("{pages} pages, {rooms} rooms and {grants} grants did not come home");
            self.trouble(format!("the {name} process: {what}"));
        }
        if *quarantined > 0 {
            let what = format!("{quarantined} pages in quarantine: {held_by}, neither gone nor heard of");
            self.trouble(format!("the {name} process: {what}, could still reach them"));
        }
    }

    /// Something went wrong: no more rooms are begun.
    pub fn trouble(&mut self, what: String) {
        self.troubles.push(format!("{}: {what}", self.port));
    }

    /// Something that is the reason of what went wrong after it.
    pub fn first_trouble(&mut self, what: String) {
        self.troubles.insert(0, format!("{}: {what}", self.port));
    }

    pub fn troubles(&self) -> &[String] {
        &self.troubles
    }

    /// Rooms that have ended on the decode side.
    pub fn ended(&self) -> usize {
        self.delivered
            + self.others.iter().filter(|(how, _)| how.starts_with("decode")).map(|(_, n)| n).sum::<usize>()
    }

    pub fn is_whole(&self) -> bool {
        let all = self.begun == self.asked || self.cut_short;
        self.troubles.is_empty() && self.begun > 0 && all && self.delivered == self.begun
    }

    /// Time in which at least one hand-over was under way.
    fn busy_s(&self) -> f64 {
        let mut spans = self.spans_ns.clone();
        spans.sort_unstable();
        let mut busy_ns = 0;
        let mut covered_ns = 0;
        for (begin, end) in spans {
            let begin = begin.max(covered_ns);
            if end > begin {
                busy_ns += end - begin;
                covered_ns = end;
            }
        }
        busy_ns as f64 / 1e9
    }

    /// Of the delivered ones, if there are any.
    fn percentile_ms(&self, share: f64) -> Option<f64> {
        let mut took: Vec<u64> =
            self.spans_ns.iter().map(|(begin, end)| end.saturating_sub(*begin)).collect();
        took.sort_unstable();
        let at = (share * took.len().saturating_sub(1) as f64).round() as usize;
        took.get(at).map(|&ns| ns as f64 / 1e6)
    }
}

/// The table at the end.
pub fn table(scenes: &[Scene]) -> String {
    let mut table = Table::new(&[
        "port",
        "asked",
        "begun",
        "delivered",
        "pages",
        "GB",
        "GB/s",
        "p50 ms",
        "p99 ms",
        "limit GB/s",
        "share",
    ]);
    for scene in scenes {
        let gb = scene.bytes as f64 / 1e9;
        let rate = Some(gb / scene.busy_s()).filter(|rate| rate.is_finite());
        let limit = Some(scene.limit_gb_per_s).filter(|&limit| limit > 0.0);
        let share = rate.zip(limit).map(|(rate, limit)| rate / limit);
        table.row(vec![
            scene.port.to_owned(),
            scene.asked.to_string(),
            scene.begun.to_string(),
            scene.delivered.to_string(),
            scene.pages.to_string(),
            format!("{gb:.2}"),
            figure(rate),
            figure(scene.percentile_ms(0.5)),
            figure(scene.percentile_ms(0.99)),
            figure(limit),
            share.map_or(NONE.into(), |share| format!("{:.0} %", share * 100.0)),
        ]);
    }
    let mut text = table.to_string();
    text.push_str(
        "\nA page: 64 tokens in 61 layers. GB/s: while hand-overs were under way, with filling and checking of other requests\n\
         beside them. Limit: one thread's scattered copy (shm), one plain stream (tcp), measured alone before the scene.\n",
    );
    for scene in scenes {
        if scene.cut_short {
            text.push_str(&format!(
                "{}: cut short at {} of {} requests: the time of --within-s was over\n",
                scene.port, scene.begun, scene.asked
            ));
        }
        for (how, times) in &scene.others {
            text.push_str(&format!("{}: {times} × {how}\n", scene.port));
        }
        for (side, ended) in [("decode", scene.ended()), ("prefill", scene.prefill_ended)] {
            match scene.begun.saturating_sub(ended) {
                0 => {}
                silent => {
                    text.push_str(&format!("{}: {silent} × {side}: the end was not told\n", scene.port));
                }
            }
        }
        if scene.stale > 0 {
            text.push_str(&format!("{}: {} late immediates were not counted\n", scene.port, scene.stale));
        }
    }
    text
}

/// Stands where there is no figure.
const NONE: &str = "–";

fn figure(value: Option<f64>) -> String {
    value.map_or(NONE.into(), |value| format!("{value:.2}"))
}

/// One line that changes while a scene runs; a line now and then where nobody watches a terminal.
pub struct Progress {
    port: &'static str,
    requests: usize,
    begin: Instant,
    shown: Instant,
    every: Duration,
}

impl Progress {
    pub fn new(port: &'static str, requests: usize) -> Self {
        let every = match std::io::stderr().is_terminal() {
            true => Duration::from_millis(100),
            false => Duration::from_secs(10),
        };
        let now = Instant::now();
        Self { port, requests, begin: now, shown: now, every }
    }

    pub fn show(&mut self, ended: usize, bytes: u64) {
        if self.shown.elapsed() < self.every {
            return;
        }
        self.shown = Instant::now();
        let line = format!(
            "{}: {ended} of {} requests, {:.2} GB, {:.0} s",
            self.port,
            self.requests,
            bytes as f64 / 1e9,
            self.begin.elapsed().as_secs_f64()
        );
        let mut out = std::io::stderr();
        let _ = match out.is_terminal() {
            true => write!(out, "\r{line}   "),
            false => writeln!(out, "{line}"),
        };
    }

    pub fn end(&self) {
        let mut out = std::io::stderr();
        if out.is_terminal() {
            let _ = write!(out, "\r{:60}\r", "");
        }
    }
}
