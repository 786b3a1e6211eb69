//! What the demo shows: progress while it runs, a table at the end.

use std::collections::{BTreeMap, HashSet};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crossdock::now_ns;
use crossdock_replay::{Arrival, Came, DockStats, Handover, Summary, Trail};
use serde::Serialize;

use super::PAGE_TOKENS;
use super::talk::{Bye, Ended};
use crate::table::Table;

use crate::output::{complain, say};

/// One port's part of the demo.
pub struct Scene {
    port: &'static str,
    /// Requests that were to be handed over.
    asked: usize,
    /// Those whose rooms have begun.
    pub begun: usize,
    limit_gb_per_s: f64,
    came: Came,
    /// Rooms; they count from 1 on.
    delivered: HashSet<u64>,
    pages: u64,
    /// Delivered bytes.
    pub bytes: u64,
    /// Those of the delivered requests.
    handovers: Vec<Handover>,
    /// What the workers' pools have seen, that of the prefill side first.
    docks: [DockStats; 2],
    /// Ends other than delivery, by side and reason.
    others: BTreeMap<String, usize>,
    /// Those that no worker was told of.
    refused: usize,
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
            came: Came::default(),
            delivered: HashSet::new(),
            pages: 0,
            bytes: 0,
            handovers: Vec::new(),
            docks: Default::default(),
            others: BTreeMap::new(),
            refused: 0,
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

    /// The next request has come.
    pub fn begin(&mut self, at_ns: u64) {
        self.begun += 1;
        self.came.comes(at_ns);
    }

    /// A request is over that was not delivered, or nothing is heard of it any more.
    pub fn over(&mut self) {
        self.came.over(now_ns());
    }

    pub fn decode_ended(&mut self, ended: Ended) {
        if !ended.delivered {
            return self.other("decode", &ended.how);
        }
        self.delivered.insert(ended.room);
        self.came.over(ended.handover.end_ns);
        self.pages += ended.pages;
        self.bytes += ended.bytes;
        self.handovers.push(ended.handover);
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

    /// A request came when as many were open as may be.
    pub fn refused(&mut self, most_open: usize) {
        self.refused += 1;
        self.other("router", &format!("refused: {most_open} requests are under way or wait"));
    }

    fn other(&mut self, side: &str, how: &str) {
        self.over();
        *self.others.entry(format!("{side}: {how}")).or_default() += 1;
    }

    pub fn bye(&mut self, name: &str, bye: &Bye) {
        let Bye { pages, rooms, grants, quarantined, held_by, stale, dock } = bye;
        self.docks[usize::from(name == "decode")] = dock.clone();
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
        self.delivered.len()
            + self.others.iter().filter(|(how, _)| how.starts_with("decode")).map(|(_, n)| n).sum::<usize>()
    }

    pub fn is_whole(&self) -> bool {
        let all = self.begun == self.asked || self.cut_short;
        self.troubles.is_empty() && self.begun > 0 && all && self.delivered.len() == self.begun
    }

    /// Everything in figures.
    pub fn summary(&self, arrivals: &[Arrival], token_bytes: u64, target_ms: f64) -> Summary {
        let [prefill, decode] = self.docks.clone();
        let summary = Summary::of(self.came, &self.handovers, token_bytes, target_ms);
        let is_delivered = |at: usize| self.delivered.contains(&(at as u64 + 1));
        let possible_hit_share = Arrival::possible_hit_share(arrivals, is_delivered, PAGE_TOKENS);
        Summary { possible_hit_share, prefill, decode, ..summary }
    }

    /// For the picture.
    pub fn trail(&self, token_bytes: u64) -> Trail {
        Trail { name: self.port.to_owned(), handovers: self.handovers.clone(), token_bytes }
    }

    /// For programs.
    pub fn json(&self, scale: f64, time_scale: f64, summary: Summary) -> serde_json::Result<String> {
        serde_json::to_string(&Line {
            bench: "demo",
            port: self.port,
            scale,
            time_scale,
            asked: self.asked,
            begun: self.begun,
            cut_short: self.cut_short,
            limit_gb_per_s: self.limit_gb_per_s,
            others: &self.others,
            stale: self.stale,
            leaks: self.leaks,
            verified: self.is_whole(),
            troubles: &self.troubles,
            summary,
        })
    }
}

/// A scene's line for programs.
#[derive(Serialize)]
struct Line<'a> {
    bench: &'static str,
    port: &'static str,
    /// By what lengths shrank.
    scale: f64,
    /// By what times shrank.
    time_scale: f64,
    asked: usize,
    begun: usize,
    cut_short: bool,
    limit_gb_per_s: f64,
    others: &'a BTreeMap<String, usize>,
    stale: u64,
    leaks: u64,
    /// All that was begun was delivered, and every byte was right.
    verified: bool,
    troubles: &'a [String],
    #[serde(flatten)]
    summary: Summary,
}

/// Where the demo tells what it does: lines for programs have the standard output for themselves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Print {
    Output,
    Errors,
}

impl Print {
    pub fn line(self, text: &str) {
        match self {
            Print::Output => say!("{text}"),
            Print::Errors => complain(format_args!("{text}")),
        }
    }
}

/// What a replay came to, a column a scene.
pub fn replay_table(scenes: &[Scene], summaries: &[Summary]) -> String {
    let mut header = vec!["replay"];
    header.extend(scenes.iter().map(|scene| scene.port));
    let mut table = Table::new(&header);
    let columns: Vec<_> = summaries.iter().map(Summary::lines).collect();
    for (at, (what, _)) in Summary::default().lines().into_iter().enumerate() {
        let figures = columns.iter().map(|lines| lines[at].1.clone());
        table.row([what.to_owned()].into_iter().chain(figures).collect());
    }
    format!(
        "{table}\nHand-over: from when both sides have pages and the prefill side has filled them, until the decode side has it all.\n\
         Queueing: waiting for pages or for a thread, at either side, before that.\n"
    )
}

/// The table at the end.
pub fn table(scenes: &[Scene], summaries: &[Summary]) -> String {
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
    for (scene, summary) in scenes.iter().zip(summaries) {
        let gb = scene.bytes as f64 / 1e9;
        let delivered = |value: f64| Some(value).filter(|_| !scene.delivered.is_empty());
        let rate = delivered(summary.gb_per_s);
        let limit = Some(scene.limit_gb_per_s).filter(|&limit| limit > 0.0);
        let share = rate.zip(limit).map(|(rate, limit)| rate / limit);
        table.row(vec![
            scene.port.to_owned(),
            scene.asked.to_string(),
            scene.begun.to_string(),
            scene.delivered.len().to_string(),
            scene.pages.to_string(),
            format!("{gb:.2}"),
            figure(rate),
            figure(delivered(summary.handover_ms_p50)),
            figure(delivered(summary.handover_ms_p99)),
            figure(limit),
            share.map_or(NONE.into(), |share| format!("{:.0} %", share * 100.0)),
        ]);
    }
    let mut text = table.to_string();
    text.push_str(
        "\nA page: 64 tokens in 61 layers. GB/s: while hand-overs were under way, with filling and checking of other requests\n\
         beside them. p50, p99: hand-overs of the delivered requests. Limit: one thread's scattered copy (shm), one plain\n\
         stream (tcp), measured alone before the scene.\n",
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
            match scene.begun.saturating_sub(scene.refused + ended) {
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

#[cfg(test)]
mod tests {
    use crossdock_replay::Block;

    use super::*;

    #[test]
    fn requests_that_fail_are_a_part_of_the_figures() {
        let begin_ns = now_ns().saturating_sub(30_000_000_000);
        let arrival =
            |id| Arrival { at_ns: 0, tokens: 100, blocks: vec![Block { id, pages: 1 }], decode_ns: 0 };
        let arrivals = [arrival(1), arrival(2), arrival(2), arrival(2)];
        let mut scene = Scene::new("shm", arrivals.len(), 1.0);
        let ended = |room, delivered| Ended {
            room,
            delivered,
            how: String::new(),
            pages: 2,
            bytes: 0,
            handover: Handover {
                arrived_ns: begin_ns,
                end_ns: begin_ns + 1,
                tokens: 100,
                ..Handover::default()
            },
            after_ms: 0,
            right: true,
        };
        arrivals.iter().for_each(|_| scene.begin(begin_ns));
        scene.decode_ended(ended(1, true));
        scene.decode_ended(ended(3, true));
        assert!(scene.summary(&arrivals, 1, 1.0).seconds < 1.0);
        scene.decode_ended(ended(2, false));
        let summary = scene.summary(&arrivals, 1, 1.0);
        assert!(summary.seconds >= 30.0 && summary.goodput_requests_per_s < 0.1, "{summary:?}");
        assert_eq!((summary.requests, summary.delivered), (4, 2));
        // A page of the second delivered.
        assert_eq!(summary.possible_hit_share, 64.0 / 200.0);
    }
}
