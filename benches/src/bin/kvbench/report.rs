//! What came out, for programs and for people.

use crossdock_benches::{GpuChoice, OpenGpu, Sample};
use crossdock_replay::{Arrival, Came, ChartError, Handover, Roof, Sheet, Summary, Trail};
use serde::Serialize;

use crate::error::Error;
use crate::options::{MemoryName, OpName, Options, PortName, ProgressName, name};
use crate::passes::{Passes, Traced};
use crate::replay::{How, RoomTimes, Told};
use crate::setup::Setup;

/// What one way of moving the pages came to, a value a repeat.
pub struct Means {
    name: &'static str,
    gb_per_s: Sample,
    cpu_here_s_per_gb: Sample,
    cpu_there_s_per_gb: Sample,
}

impl Means {
    pub fn new(name: &'static str) -> Self {
        let (gb_per_s, cpu_here_s_per_gb, cpu_there_s_per_gb) = Default::default();
        Self { name, gb_per_s, cpu_here_s_per_gb, cpu_there_s_per_gb }
    }

    pub fn add(&mut self, bytes: u64, seconds: f64, cpu_here_s: f64, cpu_there_s: f64) {
        let gb = bytes as f64 / 1e9;
        self.gb_per_s.push(gb / seconds);
        self.cpu_here_s_per_gb.push(cpu_here_s / gb);
        self.cpu_there_s_per_gb.push(cpu_there_s / gb);
    }

    fn cpu_s_per_gb(&self) -> f64 {
        self.cpu_here_s_per_gb.median() + self.cpu_there_s_per_gb.median()
    }
}

/// What pages took that came so seldom that both ends slept.
#[derive(Clone, Copy)]
pub struct Wakeups {
    /// How often the progress thread of this end woke.
    pub here: u64,
    /// That of the other end, which wakes for the room's end as well.
    pub there: u64,
    /// In so many batches the pages came: in fewer than there are pages, where a sender's thread woke late.
    pub batches: u64,
    /// How many pages.
    pub pages: u32,
}

impl Wakeups {
    fn a_page(&self, wakeups: u64) -> f64 {
        wakeups as f64 / f64::from(self.pages)
    }
}

/// The whole of a run.
pub struct Report {
    line: Line,
    ways: Vec<Means>,
    /// Ours and the floor beside the processes of `--hog`.
    pub hogged: Option<[Means; 2]>,
    verify: bool,
    pub room_us: Sample,
    pub bare_us: Sample,
    pub wakeups: Option<Wakeups>,
    pub wrong_pages: u64,
    /// Of a trace.
    handovers: Vec<Handover>,
    lost: Lost,
    target_ms: f64,
    token_bytes: u64,
    page_tokens: u32,
}

/// Requests of a trace that were not delivered. None is refused here: the queue has room for all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    pub requests: u64,
    /// Those that had no pages in time, at either side.
    pub expired: u64,
    /// How the first room ended that did not expire at the decode side.
    pub failure: Option<String>,
}

/// Rates with pages of one size.
#[derive(Clone, Serialize)]
struct RoofPoint {
    page_bytes: u64,
    gb_per_s: f64,
    floor_gb_per_s: f64,
    memcpy_gb_per_s: f64,
    floor: &'static str,
}

/// The line for programs. The first keys, up to `verified`, keep their names and meaning.
#[derive(Clone, Serialize)]
struct Line {
    bench: &'static str,
    port: PortName,
    memory: MemoryName,
    op: OpName,
    page_bytes: u64,
    /// Of a room; of a trace, of its first one.
    pages: u32,
    gb_per_s: f64,
    gb_per_s_min: f64,
    gb_per_s_max: f64,
    p50_us: f64,
    p99_us: f64,
    copy_threads: u32,
    cpu_s_per_gb: f64,
    floor_gb_per_s: f64,
    memcpy_gb_per_s: f64,
    efficiency: f64,
    /// Checked, nothing wrong, and nothing lost of a trace.
    verified: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_scale: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<Summary>,
    /// Where a picture is asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    roofline: Vec<RoofPoint>,
    /// The median of the repeats' own ratios to the floor, which a busy machine disturbs less than `efficiency`.
    efficiency_paired: f64,
    floor: &'static str,
    floor_cpu_s_per_gb: f64,
    cpu_s_per_gb_initiator: f64,
    cpu_s_per_gb_target: f64,
    /// Paired ratios to every way that took turns.
    ratios: std::collections::BTreeMap<&'static str, f64>,
    /// The time of a page by the floor's means, where single pages are timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    floor_p50_us: Option<f64>,
    /// How often a progress thread woke for a page that found both ends asleep.
    #[serde(skip_serializing_if = "Option::is_none")]
    wakeups_per_page_initiator: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    wakeups_per_page_target: Option<f64>,
    /// Those pages, and in how many batches they came.
    #[serde(skip_serializing_if = "Option::is_none")]
    seldom_pages: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seldom_batches: Option<u64>,
    #[serde(flatten)]
    hogged: Option<HoggedLine>,
    /// Of one pass, or of a single page; of a trace, of all its requests that were taken.
    rooms: usize,
    in_flight: u32,
    lanes: u8,
    progress: ProgressName,
    repeats: u32,
    /// From opening a node to the end of its first handshake.
    open_ms: f64,
    /// As `--gpu` names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<GpuChoice>,
    /// What its driver calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_name: Option<String>,
    /// What has to be known to read the figures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<&'static str>,
}

/// Beside the processes of `--hog`.
#[derive(Clone, Serialize)]
struct HoggedLine {
    hogged_gb_per_s: f64,
    hogged_floor_gb_per_s: f64,
    /// The median of the repeats' own ratios of the two.
    hogged_efficiency_paired: f64,
    /// What is left of each of the two, of its rate without hogs.
    hogged_share: f64,
    hogged_floor_share: f64,
}

impl Report {
    pub fn new(options: &Options, setup: &Setup, passes: &Passes, open_ms: f64) -> Self {
        let line = Line {
            bench: "kv",
            port: setup.port,
            memory: setup.memory,
            op: setup.op,
            page_bytes: setup.page_bytes(),
            pages: passes.rooms[0][0],
            gb_per_s: 0.0,
            gb_per_s_min: 0.0,
            gb_per_s_max: 0.0,
            p50_us: 0.0,
            p99_us: 0.0,
            copy_threads: setup.copy_threads,
            cpu_s_per_gb: 0.0,
            floor_gb_per_s: 0.0,
            memcpy_gb_per_s: 0.0,
            efficiency: 0.0,
            verified: false,
            scale: passes.traced.as_ref().map(|traced| traced.scale),
            time_scale: passes.traced.as_ref().map(|traced| traced.time_scale),
            replay: None,
            roofline: Vec::new(),
            efficiency_paired: 0.0,
            floor: "",
            floor_cpu_s_per_gb: 0.0,
            cpu_s_per_gb_initiator: 0.0,
            cpu_s_per_gb_target: 0.0,
            ratios: Default::default(),
            floor_p50_us: None,
            wakeups_per_page_initiator: None,
            wakeups_per_page_target: None,
            seldom_pages: None,
            seldom_batches: None,
            hogged: None,
            rooms: passes.count(),
            in_flight: options.in_flight,
            lanes: setup.lanes,
            progress: setup.progress,
            repeats: options.repeats,
            open_ms,
            gpu: None,
            gpu_name: None,
            notes: Vec::new(),
        };
        Self {
            line,
            ways: Vec::new(),
            hogged: None,
            verify: options.verify,
            room_us: Sample::default(),
            bare_us: Sample::default(),
            wakeups: None,
            wrong_pages: 0,
            handovers: Vec::new(),
            lost: Lost::default(),
            target_ms: options.target_ms as f64,
            token_bytes: setup.token_bytes * u64::from(setup.layers),
            page_tokens: setup.page_tokens,
        }
    }

    /// Says which GPU it is of, and what is to be known of figures of one.
    pub fn of_gpu(&mut self, on: Option<&OpenGpu>) {
        let Some(on) = on else { return };
        self.line.gpu = Some(on.choice);
        self.line.gpu_name = Some(on.gpu.facts().name.clone());
        let first = match on.choice {
            GpuChoice::Software => {
                "the GPU is software of each process: no figure here says anything about the speed of one"
            }
            GpuChoice::Device(_) => {
                "both processes use one GPU, which gives its time to one of them after the other: where both have work for it, each waits for the other's turn"
            }
        };
        self.line.notes = vec![
            first,
            "memcpy is one copy of as many bytes in one stretch, and bare mover moves the same scattered pages by the port's kernels: both within one process, between its pool and another memory",
        ];
    }

    /// Takes what both sides have seen of a replay.
    pub fn replayed(&mut self, traced: &Traced, prefill: Told, decode: Told) {
        let both = || traced.arrivals.iter().zip(prefill.rooms.iter().zip(&decode.rooms));
        let is_delivered = |there: &RoomTimes| there.how == How::Delivered;
        let mut came = Came::default();
        for (arrival, (here, there)) in both() {
            came.comes(arrival.at_ns);
            if is_delivered(there) {
                came.over(there.end_ns);
                continue;
            }
            came.over(here.end_ns.max(there.end_ns));
            self.lost.requests += 1;
            self.lost.expired += u64::from([here.how, there.how].contains(&How::Expired));
        }
        self.lost.failure = decode.failure;
        self.handovers = both()
            .filter(|(_, (_, there))| is_delivered(there))
            .map(|(arrival, (here, there))| Handover {
                arrived_ns: arrival.at_ns,
                admitted_ns: here.admitted_ns,
                ready_ns: here.ready_ns,
                granted_ns: there.admitted_ns,
                end_ns: there.end_ns,
                tokens: arrival.tokens,
                decode_held_tokens: there.held_tokens,
                prefill_held_tokens: here.held_tokens,
            })
            .collect();
        self.room_us = self.handovers.iter().map(|one| one.moving_ns() as f64 / 1e3).collect();
        self.wrong_pages += prefill.wrong_pages + decode.wrong_pages;
        let summary = Summary::of(came, &self.handovers, self.token_bytes, self.target_ms);
        let is_delivered = |at: usize| is_delivered(&decode.rooms[at]);
        self.line.replay = Some(Summary {
            possible_hit_share: Arrival::possible_hit_share(&traced.arrivals, is_delivered, self.page_tokens),
            prefill: prefill.dock,
            decode: decode.dock,
            ..summary
        });
    }

    /// Takes a run with pages of another size.
    pub fn add_to_roofs(&mut self, other: &Report) {
        let Line { page_bytes, gb_per_s, floor_gb_per_s, memcpy_gb_per_s, floor, .. } = other.line();
        self.line.roofline.push(RoofPoint { page_bytes, gb_per_s, floor_gb_per_s, memcpy_gb_per_s, floor });
    }

    /// The picture of a replay, and of rates by page size.
    pub fn svg(&self) -> Result<String, ChartError> {
        let line = self.line();
        let port = name(line.port);
        let roof = |name: &str, rate: fn(&RoofPoint) -> f64| Roof {
            name: name.to_owned(),
            points: line.roofline.iter().map(|point| (point.page_bytes, rate(point))).collect(),
        };
        let trail =
            Trail { name: port.clone(), handovers: self.handovers.clone(), token_bytes: self.token_bytes };
        let mut title = format!("kvbench {port}, {}, {} memory", name(line.op), name(line.memory));
        if line.gpu == Some(GpuChoice::Software) {
            title += ", a GPU in software";
        }
        if let (Some(scale), Some(times)) = (line.scale, line.time_scale) {
            let requests = self.requests();
            title += &format!(": {requests} requests, lengths × {scale:.4}, times × {times:.4}");
        }
        let sheet = Sheet {
            title,
            trails: vec![trail],
            roofs: vec![
                roof("crossdock", |point| point.gb_per_s),
                roof("floor: the best bare means", |point| point.floor_gb_per_s),
                roof(if line.gpu.is_some() { "memcpy, one stretch" } else { "memcpy, scattered" }, |point| {
                    point.memcpy_gb_per_s
                }),
            ],
        };
        sheet.svg()
    }

    /// Ours first, memcpy second, then whatever may be the floor. Gives the position of the one that is.
    pub fn take(&mut self, ways: Vec<Means>) -> usize {
        self.ways = ways;
        self.floor()
    }

    /// Whatever is best beside ours, the plain memcpy too where bytes only have to be copied.
    fn floor(&self) -> usize {
        let is_copied = self.line.port == PortName::Shm && self.line.memory == MemoryName::Shared;
        let first = if is_copied && self.bare_us.values().is_empty() { 1 } else { 2 };
        let rate = |at: &usize| self.ways[*at].gb_per_s.median();
        let others = (first..self.ways.len()).max_by(|a, b| rate(a).total_cmp(&rate(b)));
        others.expect("memcpy and another one")
    }

    /// Whether all went as it should: every page that was checked is right, and every request was delivered.
    pub fn verdict(&self) -> Result<(), Error> {
        match (self.wrong_pages, self.lost.requests) {
            (0, 0) => Ok(()),
            (0, _) => Err(Error::Lost { lost: self.lost.clone(), requests: self.requests() }),
            (pages, _) => Err(Error::WrongBytes { pages }),
        }
    }

    /// Those of a trace.
    fn requests(&self) -> u64 {
        self.line.replay.as_ref().map_or(0, |summary| summary.requests)
    }

    fn line(&self) -> Line {
        let mut line = self.line.clone();
        let Some((ours, others)) = self.ways.split_first() else { return line };
        let floor = &self.ways[self.floor()];
        line.gb_per_s = ours.gb_per_s.median();
        line.gb_per_s_min = ours.gb_per_s.min();
        line.gb_per_s_max = ours.gb_per_s.max();
        line.p50_us = self.room_us.median();
        line.p99_us = self.room_us.quantile(0.99);
        line.cpu_s_per_gb = ours.cpu_s_per_gb();
        line.floor_gb_per_s = floor.gb_per_s.median();
        line.memcpy_gb_per_s = others[0].gb_per_s.median();
        line.efficiency = line.gb_per_s / line.floor_gb_per_s;
        line.verified = self.verify && self.verdict().is_ok();
        line.efficiency_paired = ours.gb_per_s.median_ratio(&floor.gb_per_s);
        line.floor = floor.name;
        line.floor_cpu_s_per_gb = floor.cpu_s_per_gb();
        line.cpu_s_per_gb_initiator = ours.cpu_here_s_per_gb.median();
        line.cpu_s_per_gb_target = ours.cpu_there_s_per_gb.median();
        line.ratios =
            others.iter().map(|other| (other.name, ours.gb_per_s.median_ratio(&other.gb_per_s))).collect();
        line.wakeups_per_page_initiator = self.wakeups.map(|woke| woke.a_page(woke.here));
        line.wakeups_per_page_target = self.wakeups.map(|woke| woke.a_page(woke.there));
        line.seldom_pages = self.wakeups.map(|woke| woke.pages);
        line.seldom_batches = self.wakeups.map(|woke| woke.batches);
        line.floor_p50_us = (!self.bare_us.values().is_empty()).then(|| self.bare_us.median());
        line.hogged = self.hogged.as_ref().map(|[hogged, hogged_floor]| HoggedLine {
            hogged_gb_per_s: hogged.gb_per_s.median(),
            hogged_floor_gb_per_s: hogged_floor.gb_per_s.median(),
            hogged_efficiency_paired: hogged.gb_per_s.median_ratio(&hogged_floor.gb_per_s),
            hogged_share: hogged.gb_per_s.median() / line.gb_per_s,
            hogged_floor_share: hogged_floor.gb_per_s.median() / line.floor_gb_per_s,
        });
        line
    }

    pub fn json(&self) -> String {
        serde_json::to_string(&self.line()).expect("numbers and names")
    }

    pub fn table(&self) -> String {
        let line = self.line();
        let mut out = match (line.gpu, &line.gpu_name) {
            (Some(gpu), Some(name)) => format!("GPU {gpu}: {name}\n"),
            _ => String::new(),
        };
        for note in &line.notes {
            out += &format!("note: {note}\n");
        }
        out += &format!(
            "{}, {} memory, {}, pages of {} bytes, {} rooms, {} in flight, {} copy thread(s), {} lane(s), opened in {:.1} ms\n",
            name(line.port),
            name(line.memory),
            name(line.op),
            line.page_bytes,
            line.rooms,
            line.in_flight,
            line.copy_threads,
            line.lanes,
            line.open_ms
        );
        out += &format!(
            "{:<26} {:>8} {:>8} {:>8} {:>10} {:>10} {:>8}\n",
            "", "GB/s", "least", "most", "CPU s/GB", "of which there", "ours is"
        );
        for way in &self.ways {
            out += &format!(
                "{:<26} {:>8.2} {:>8.2} {:>8.2} {:>10.3} {:>14.3} {:>7.2} x\n",
                way.name,
                way.gb_per_s.median(),
                way.gb_per_s.min(),
                way.gb_per_s.max(),
                way.cpu_s_per_gb(),
                way.cpu_there_s_per_gb.median(),
                self.ways[0].gb_per_s.median_ratio(&way.gb_per_s),
            );
        }
        if let (Some(scale), Some(times), Some(replay)) = (line.scale, line.time_scale, &line.replay) {
            out += &format!(
                "trace: lengths multiplied by {scale:.3e}, times by {times:.3e}; the rest is of its replay\n"
            );
            for (what, figure) in replay.lines() {
                out += &format!("{what:<62} {figure}\n");
            }
        }
        for point in &line.roofline {
            out += &format!(
                "pages of {} bytes: {:.2} GB/s, {} {:.2}, memcpy {:.2}\n",
                point.page_bytes, point.gb_per_s, point.floor, point.floor_gb_per_s, point.memcpy_gb_per_s
            );
        }
        out += &format!("a room: p50 {:.2} us, p99 {:.2} us", line.p50_us, line.p99_us);
        if let Some(floor) = line.floor_p50_us {
            out += &format!("; by {} {floor:.2} us", line.floor);
        }
        if let Some(woke) = self.wakeups {
            out += &format!(
                "; wake-ups for a page that finds both ends asleep: {:.2} here, {:.2} there, {} pages in {} batches",
                woke.a_page(woke.here),
                woke.a_page(woke.there),
                woke.pages,
                woke.batches,
            );
        }
        if let Some(hogged) = &line.hogged {
            out += &format!(
                "; beside hogs {:.2} GB/s ({:.2} of the rate without), {} {:.2} GB/s ({:.2}), ours is {:.2} x",
                hogged.hogged_gb_per_s,
                hogged.hogged_share,
                line.floor,
                hogged.hogged_floor_gb_per_s,
                hogged.hogged_floor_share,
                hogged.hogged_efficiency_paired,
            );
        }
        out += match (self.verify, self.wrong_pages, self.lost.requests) {
            (false, ..) => "; not verified\n",
            (true, 0, 0) => "; every word verified\n",
            (true, 0, _) => "; NOT ALL DELIVERED, every word verified that was\n",
            (true, ..) => "; WRONG BYTES\n",
        };
        out
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use crossdock_replay::DockStats;

    use super::*;

    /// Of three requests, of which these sides tell.
    fn report(prefill: [How; 3], decode: [How; 3], failure: Option<&str>) -> Report {
        let options = Options::parse_from(["kvbench", "--pool-mib", "16", "--verify"]);
        let setup = Setup::new(&options).unwrap();
        let arrival = Arrival { at_ns: 0, tokens: 1, blocks: Vec::new(), decode_ns: 0 };
        let traced = Traced { scale: 1.0, time_scale: 1.0, arrivals: vec![arrival; 3] };
        let passes = Passes { rooms: vec![vec![1]], traced: None };
        let mut report = Report::new(&options, &setup, &passes, 1.0);
        let told = |hows: [How; 3], failure: Option<&str>| {
            let room = |how| RoomTimes {
                end_ns: if how == How::Expired { 60_000_000_000 } else { 1_000_000 },
                how,
                ..RoomTimes::default()
            };
            let (rooms, failure) = (hows.map(room).to_vec(), failure.map(str::to_owned));
            Told { rooms, wrong_pages: 0, dock: DockStats::default(), failure }
        };
        report.replayed(&traced, told(prefill, None), told(decode, failure));
        let mut means = ["ours", "memcpy", "floor"].map(Means::new);
        means.iter_mut().for_each(|means| means.add(1, 1.0, 1.0, 1.0));
        report.take(means.into());
        report
    }

    #[test]
    fn what_was_lost_is_not_verified() {
        use How::{Delivered, Expired, Failed};
        let whole = report([Delivered; 3], [Delivered; 3], None);
        assert!(whole.line().verified && whole.verdict().is_ok());
        assert!(whole.table().ends_with("; every word verified\n"));

        let lost = report([Delivered; 3], [Expired; 3], None);
        let summary = lost.line().replay.unwrap();
        assert_eq!((summary.delivered, summary.seconds), (0, 60.0));
        assert!(!lost.line().verified && !lost.table().contains("every word verified\n"));
        let said = lost.verdict().unwrap_err().to_string();
        assert_eq!(said, "3 of 3 requests were not delivered: 3 had no pages in time, 0 failed");

        let lost = report([Expired, Delivered, Delivered], [Failed, Failed, Delivered], Some("room 8: cut"));
        assert!(!lost.line().verified);
        let said = lost.verdict().unwrap_err().to_string();
        let expected =
            "2 of 3 requests were not delivered: 1 had no pages in time, 1 failed; the first: room 8: cut";
        assert_eq!(said, expected);
        // Of those that were delivered one may still be wrong, which is worse.
        let wrong = Report { wrong_pages: 1, ..lost };
        assert!(matches!(wrong.verdict(), Err(Error::WrongBytes { pages: 1 })));
    }
}
