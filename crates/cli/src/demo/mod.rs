//! `crossdock demo`: a bootstrap server, a prefill process and a decode process hand requests over; then four ranks send
//! tokens to their experts and back.
//!
//! The parent plays the router: it gives each request's room to both workers over their standard input and hears from
//! them over their standard output, one JSON object a line. Everything else goes as in a deployment: the workers find
//! each other through the registry, and the pages go from process to process.

mod content;
mod experts;
mod limit;
mod process;
mod queue;
mod registry;
mod report;
mod router;
mod talk;
mod worker;

use std::error::Error;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum, value_parser};
use crossdock::CacheLayout;
use crossdock::trace::{Request, Scale, Synthetic, SyntheticOptions};
use crossdock_replay::{Arrival, Pace, Sheet, Summary};
use crossdock_verbs::VerbsPort;

use registry::Registry;
use report::{Print, Scene};
use router::Router;

use crate::output::say;

pub use experts::{RankOptions, work as work_as_rank};
pub use process::end_with_parent;
pub use worker::{WorkerOptions, work};

#[derive(Args, Clone)]
pub struct Options {
    /// What is shown: the hand-over of KV caches, tokens on their way to experts
    #[arg(long, value_delimiter = ',', default_value = "kv,experts")]
    scenes: Vec<SceneName>,
    /// Requests to hand over on each port
    #[arg(long, default_value_t = 120)]
    requests: usize,
    /// A trace in the Mooncake format (one JSON object a line) in the place of generated requests: each comes at its
    /// time, and shares the pages of its prefix with others
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Begins each request of a trace when another one is over, instead of at its time
    #[arg(long)]
    closed_loop: bool,
    /// Decides the generated requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The factor by which lengths and times shrink; from 0.0001 to 1; by default lengths such that the longest request
    /// fills half of a pool, and times such that the last one comes when half of the time is over
    #[arg(long)]
    scale: Option<f64>,
    /// The factor by which times shrink, where it is another
    #[arg(long)]
    time_scale: Option<f64>,
    /// How long a token of the output is decoded, in ms, before times shrink: so long the decode side keeps the pages
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u64).range(0..=10_000))]
    token_ms: u64,
    /// What a request may take from its arrival until the decode side has it all, to count as goodput, in ms
    #[arg(long, default_value_t = 1_000, value_parser = value_parser!(u64).range(1..=3_600_000))]
    target_ms: u64,
    /// Requests of a trace that may be under way or wait for pages; one that comes when there are as many is refused
    #[arg(long, default_value_t = 1_024, value_parser = value_parser!(u64).range(1..=4_096))]
    queue: u64,
    /// Prints one JSON object a scene instead of the tables; all else that is told goes to the standard error
    #[arg(long)]
    json: bool,
    /// Draws the hand-over times and the rates over time into this file
    #[arg(long)]
    svg: Option<PathBuf>,
    /// The ports of the hand-over, one scene each
    #[arg(long, value_delimiter = ',', default_value = "shm,tcp")]
    ports: Vec<PortName>,
    /// The RDMA devices of the scene over verbs: the prefill side's, a comma, the decode side's; rails joined by +, as in
    /// rxe0+rxe2,rxe1; by default the first device that is found, for both
    #[arg(long, value_delimiter = ',', num_args = 1..=2)]
    devices: Vec<String>,
    /// Memory of each worker's pool, in MiB
    #[arg(long, default_value_t = 768, value_parser = value_parser!(u64).range(1..=1 << 20))]
    pool_mib: u64,
    /// Requests that move at once; of a trace, others wait beside them
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u64).range(1..=64))]
    in_flight: u64,
    /// What a hand-over may take, in seconds
    #[arg(long, default_value_t = 20, value_parser = value_parser!(u64).range(1..=3600))]
    deadline_s: u64,
    /// Begins no hand-over after so many seconds; what is under way then still ends by its deadline
    #[arg(long, default_value_t = 55, value_parser = value_parser!(u64).range(1..=86_400))]
    within_s: u64,
    /// Where the workers meet: the HOST:PORT of a bootstrap server, or etcd://HOST:PORT; by default a server is started
    #[arg(long)]
    registry: Option<String>,
    /// Also prints a line when a room begins and when it ends on either side, and after how many milliseconds
    #[arg(long)]
    each_room: bool,
    /// Writes the workers' flight recorders here: what failed when it fails, and all of it at the end; to be read with
    /// `crossdock timeline`
    #[arg(long)]
    flight_dir: Option<String>,
    /// Who moves the bytes; for the tests
    #[arg(long, hide = true, default_value = "write")]
    op: OpName,
}

impl Options {
    /// The rails of a worker's devices: the prefill side is 0 and the decode side 1.
    fn rails(&self, side: usize) -> Option<&str> {
        let side = side.min(self.devices.len().saturating_sub(1));
        self.devices.get(side).map(String::as_str)
    }

    /// Whether the devices can be used, before any process is started.
    fn check_devices(&self) -> Result<(), Box<dyn Error>> {
        if !self.ports.contains(&PortName::Verbs) {
            return match self.devices.is_empty() {
                true => Ok(()),
                false => Err("--devices names RDMA devices: use it with --ports verbs".into()),
            };
        }
        for rail in (0..2).flat_map(|side| worker::rails(self.rails(side))) {
            VerbsPort::open(rail).map_err(|error| format!("--ports verbs: {error}"))?;
        }
        Ok(())
    }

    /// Whether requests come when others are over.
    fn is_closed_loop(&self) -> bool {
        self.closed_loop || self.trace.is_none()
    }

    fn print(&self) -> Print {
        if self.json { Print::Errors } else { Print::Output }
    }
}

/// What the demo shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SceneName {
    Kv,
    Experts,
}

/// The ports that the demo shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PortName {
    Shm,
    Tcp,
    Verbs,
}

impl PortName {
    fn name(self) -> &'static str {
        match self {
            PortName::Shm => "shm",
            PortName::Tcp => "tcp",
            PortName::Verbs => "verbs",
        }
    }
}

/// How the bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OpName {
    /// The prefill side pushes.
    Write,
    /// The decode side pulls.
    Read,
}

impl OpName {
    fn name(self) -> &'static str {
        match self {
            OpName::Write => "write",
            OpName::Read => "read",
        }
    }
}

/// Tokens of a page, everywhere in the demo.
const PAGE_TOKENS: u32 = 64;
const LEAST_SCALE: f64 = 0.0001;

pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let shows = |scene| options.scenes.contains(&scene);
    let plan = if shows(SceneName::Kv) { Some(Plan::of(options)?) } else { None };
    options.check_devices()?;
    let print = options.print();
    if let Some(plan) = &plan {
        print.line(&plan.described(options));
    }
    let begin = Instant::now();
    let mut registry = match &options.registry {
        Some(address) => Registry::at(address),
        None => Registry::start()?,
    };
    print.line(&registry.described());
    let scenes = match &plan {
        Some(plan) => plan.play(options, begin, &mut registry)?,
        None => Vec::new(),
    };
    let expert_scenes =
        if shows(SceneName::Experts) { experts::play(options, &mut registry)? } else { Vec::new() };
    if let Some(plan) = &plan {
        plan.show(options, &scenes)?;
    }
    for scene in expert_scenes.iter().filter(|_| options.json) {
        say!("{}", scene.json()?);
    }
    if !options.json && shows(SceneName::Experts) {
        say!("\n{}", experts::table(&expert_scenes).trim_end());
    }
    let leaks: u64 = scenes.iter().map(|scene| scene.leaks).sum::<u64>()
        + expert_scenes.iter().map(|scene| scene.leaks).sum::<u64>();
    print.line(&format!(
        "\nleaks: {leaks}   (pages, rooms and grants of a surviving worker that nobody accounts for; regions that a rank still maps)"
    ));
    let troubles: Vec<&String> = scenes
        .iter()
        .flat_map(Scene::troubles)
        .chain(expert_scenes.iter().flat_map(|scene| &scene.troubles))
        .collect();
    if let Some(how) = registry.ended(Duration::ZERO)
        && !troubles.iter().any(|trouble| trouble.contains(&how))
    {
        print.line(&format!("{how}; those who had met went on without it"));
    }
    registry.finish();
    for trouble in troubles {
        print.line(&format!("! {trouble}"));
    }
    let whole = scenes.iter().all(Scene::is_whole) && expert_scenes.iter().all(experts::Scene::is_whole);
    Ok(if whole && leaks == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is handed over.
struct Plan {
    arrivals: Vec<Arrival>,
    pace: Pace,
    /// Of each worker's pool.
    pages: u32,
    page_bytes: u64,
}

impl Plan {
    fn of(options: &Options) -> Result<Self, Box<dyn Error>> {
        if options.requests == 0 {
            return Err("--requests 0: there is nothing to hand over; ask for one request or more".into());
        }
        let page_bytes = CacheLayout::deepseek_r1(PAGE_TOKENS, 1)?.bytes_needed(0);
        let pages = u32::try_from((options.pool_mib << 20) / page_bytes)?;
        if pages < 2 {
            let least_mib = (2 * page_bytes).div_ceil(1 << 20);
            return Err(format!("--pool-mib {}: two pages take {least_mib} MiB", options.pool_mib).into());
        }
        let (arrivals, pace) = arrivals(options, pages)?;
        Ok(Self { arrivals, pace, pages, page_bytes })
    }

    fn described(&self, options: &Options) -> String {
        format!(
            "DeepSeek-R1's MLA cache: 61 layers, 1,152 bytes a token and layer, {PAGE_TOKENS} tokens a page; {}",
            self.factors(options)
        )
    }

    /// By what the requests shrank.
    fn factors(&self, options: &Options) -> String {
        let (lengths, times) = (self.pace.lengths.factor(), self.pace.times.factor());
        let and_times =
            if options.is_closed_loop() { String::new() } else { format!(", times × {times:.4}") };
        format!("lengths × {lengths:.4}{and_times}")
    }

    /// A scene for each port.
    fn play(
        &self,
        options: &Options,
        begin: Instant,
        registry: &mut Registry,
    ) -> Result<Vec<Scene>, Box<dyn Error>> {
        let mut scenes = Vec::new();
        for (at, &port) in options.ports.iter().enumerate() {
            // What is left of the time is shared by the scenes that are left.
            let left = Duration::from_secs(options.within_s).saturating_sub(begin.elapsed());
            let share = left / (options.ports.len() - at) as u32;
            scenes.push(match registry.ended(Duration::ZERO) {
                // Nobody can meet any more.
                Some(how) => Scene::without(port.name(), self.arrivals.len(), how),
                None => Router::start(options, port, self.pages, registry.address(), Instant::now() + share)?
                    .play(&self.arrivals, registry),
            });
        }
        Ok(scenes)
    }

    /// Tables, or lines for programs; and the picture.
    fn show(&self, options: &Options, scenes: &[Scene]) -> Result<(), Box<dyn Error>> {
        let (lengths, times) = (self.pace.lengths.factor(), self.pace.times.factor());
        let token_bytes = self.page_bytes / u64::from(PAGE_TOKENS);
        let target_ms = options.target_ms as f64;
        let summaries: Vec<Summary> =
            scenes.iter().map(|scene| scene.summary(&self.arrivals, token_bytes, target_ms)).collect();
        if options.json {
            for (scene, summary) in scenes.iter().zip(&summaries) {
                say!("{}", scene.json(lengths, times, summary.clone())?);
            }
        } else {
            say!("\n{}", report::table(scenes, &summaries).trim_end());
            if options.trace.is_some() {
                say!("\n{}", report::replay_table(scenes, &summaries).trim_end());
            }
        }
        if let Some(path) = &options.svg {
            let trails = scenes.iter().map(|scene| scene.trail(token_bytes)).collect();
            let count = self.arrivals.len();
            let title = format!("crossdock demo: {count} requests, {}", self.factors(options));
            let sheet = Sheet { title, trails, roofs: Vec::new() };
            std::fs::write(path, sheet.svg()?)
                .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        }
        Ok(())
    }
}

/// The requests, shrunk so that the longest one fits.
fn arrivals(options: &Options, pages: u32) -> Result<(Vec<Arrival>, Pace), Box<dyn Error>> {
    let requests = requests(options)?;
    let Some(longest) = requests.iter().map(|request| request.input_tokens).max() else {
        return Err("the trace has no request".into());
    };
    let fits = pages * PAGE_TOKENS;
    let lengths = match options.scale {
        Some(factor) => scale("--scale", factor)?,
        None => Scale::new((f64::from(fits / 2) / f64::from(longest)).min(1.0))?,
    };
    let times = match options.time_scale.map(|factor| scale("--time-scale", factor)).transpose()? {
        Some(times) => times,
        None if options.scale.is_some() => lengths,
        None => {
            let scene_ms = options.within_s * 1_000 / options.ports.len().max(1) as u64;
            let last_ms = requests.last().map_or(0, |request| request.at_ms);
            Scale::new((scene_ms as f64 / 2.0 / last_ms.max(1) as f64).min(1.0))?
        }
    };
    // Whose pages are kept while others could move is not asked where all move as fast as they can.
    let token_ns = if options.is_closed_loop() { 0 } else { options.token_ms * 1_000_000 };
    let pace = Pace { lengths, times, page_tokens: PAGE_TOKENS, token_ns };
    let arrivals: Vec<Arrival> = requests.iter().map(|request| Arrival::of(request, &pace)).collect();
    match arrivals.iter().map(|arrival| arrival.tokens).max() {
        Some(longest) if longest > fits => Err(format!(
            "a request of {longest} tokens does not fit a pool of {fits}; take a smaller --scale or a larger --pool-mib"
        )
        .into()),
        _ => Ok((arrivals, pace)),
    }
}

fn requests(options: &Options) -> Result<Vec<Request>, Box<dyn Error>> {
    let Some(path) = &options.trace else {
        let seeded = SyntheticOptions { seed: options.seed, ..SyntheticOptions::default() };
        return Ok(Synthetic::new(seeded)?.take(options.requests).collect());
    };
    let file = File::open(path).map_err(|error| format!("cannot open {}: {error}", path.display()))?;
    let requests = crossdock_replay::requests(BufReader::new(file), options.requests);
    requests.map_err(|error| format!("{}: {error}", path.display()).into())
}

fn scale(flag: &str, factor: f64) -> Result<Scale, Box<dyn Error>> {
    match (LEAST_SCALE..=1.0).contains(&factor) {
        true => Ok(Scale::new(factor)?),
        // A smaller one makes every request a single page.
        false => Err(format!("{flag} {factor:?}: a factor of {LEAST_SCALE} to 1 is possible").into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Call {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn a_slice_of_a_trace_is_scaled_as_if_it_began_at_once() {
        let file = std::env::temp_dir().join(format!("crossdock-{}-slice.jsonl", std::process::id()));
        let scaled = |first_ms: u64| {
            let line = |at_ms: u64| {
                format!("{{\"timestamp\": {at_ms}, \"input_length\": 640, \"output_length\": 1}}\n")
            };
            let text = [first_ms, first_ms + 60_000].map(line).concat();
            std::fs::write(&file, text).expect("a file can be written");
            let path = file.to_str().expect("a plain path");
            let call = Call::try_parse_from(["demo", "--trace", path, "--ports", "shm", "--within-s", "40"]);
            arrivals(&call.expect("these are flags").options, 100).expect("a trace")
        };
        let (slice, pace) = scaled(3_000_000);
        assert_eq!(pace.times, Scale::new(20.0 / 60.0).expect("it shrinks"));
        assert_eq!(slice.iter().map(|arrival| arrival.at_ns).collect::<Vec<_>>(), [0, 20_000_000_000]);
        assert_eq!((slice, pace), scaled(0));
        std::fs::remove_file(&file).expect("it is there");
    }
}
