//! `crossdock demo`: a bootstrap server, a prefill process and a decode process hand requests over.
//!
//! The parent plays the router: it gives each request's room to both workers over their standard input and hears from
//! them over their standard output, one JSON object a line. Everything else goes as in a deployment: the workers find
//! each other through the registry, and the pages go from process to process.

mod content;
mod limit;
mod process;
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
use crossdock::trace::{Request, Scale, Synthetic, SyntheticOptions, TraceLimits, TraceReader};

use registry::Registry;
use report::Scene;
use router::Router;

pub use process::end_with_parent;
pub use worker::{WorkerOptions, work};

#[derive(Args, Clone)]
pub struct Options {
    /// Requests to hand over on each port
    #[arg(long, default_value_t = 120)]
    requests: usize,
    /// A trace in the Mooncake format (one JSON object a line) in the place of generated requests
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Decides the generated requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The factor by which lengths shrink; from 0.0001 to 1; by default such that the longest request
    /// fills half of a pool
    #[arg(long)]
    scale: Option<f64>,
    /// The ports, one scene each
    #[arg(long, value_delimiter = ',', default_value = "shm,tcp")]
    ports: Vec<PortName>,
    /// Memory of each worker's pool, in MiB
    #[arg(long, default_value_t = 768, value_parser = value_parser!(u64).range(1..=1 << 20))]
    pool_mib: u64,
    /// Requests under way at once
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

/// The ports that the demo shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PortName {
    Shm,
    Tcp,
}

impl PortName {
    fn name(self) -> &'static str {
        match self {
            PortName::Shm => "shm",
            PortName::Tcp => "tcp",
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
    if options.requests == 0 {
        return Err("--requests 0: there is nothing to hand over; ask for one request or more".into());
    }
    let page_bytes = CacheLayout::deepseek_r1(PAGE_TOKENS, 1)?.bytes_needed(0);
    let pages = u32::try_from((options.pool_mib << 20) / page_bytes)?;
    if pages < 2 {
        let least_mib = (2 * page_bytes).div_ceil(1 << 20);
        return Err(format!("--pool-mib {}: two pages take {least_mib} MiB", options.pool_mib).into());
    }
    let (requests, scale) = requests(options, pages)?;
    println!(
        "DeepSeek-R1's MLA cache: 61 layers, 1,152 bytes a token and layer, {PAGE_TOKENS} tokens a page; lengths × {:.4}",
        scale.factor()
    );
    let begin = Instant::now();
    let mut registry = match &options.registry {
        Some(address) => Registry::at(address),
        None => Registry::start()?,
    };
    let mut scenes = Vec::new();
    for (at, &port) in options.ports.iter().enumerate() {
        // What is left of the time is shared by the scenes that are left.
        let left = Duration::from_secs(options.within_s).saturating_sub(begin.elapsed());
        let share = left / (options.ports.len() - at) as u32;
        scenes.push(match registry.ended(Duration::ZERO) {
            // Nobody can meet any more.
            Some(how) => Scene::without(port.name(), requests.len(), how),
            None => Router::start(options, port, pages, registry.address(), Instant::now() + share)?
                .play(&requests, &mut registry),
        });
    }
    println!();
    print!("{}", report::table(&scenes));
    let leaks: u64 = scenes.iter().map(|scene| scene.leaks).sum();
    println!("\nleaks: {leaks}   (pages, rooms and grants of a surviving worker that nobody accounts for)");
    if let Some(how) = registry.ended(Duration::ZERO)
        && scenes.iter().all(|scene| !scene.troubles().iter().any(|trouble| trouble.contains(&how)))
    {
        println!("{how}; those who had met went on without it");
    }
    registry.finish();
    let whole = scenes.iter().all(|scene| scene.is_whole());
    for trouble in scenes.iter().flat_map(Scene::troubles) {
        println!("! {trouble}");
    }
    Ok(if whole && leaks == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The requests, shrunk so that the longest one fits.
fn requests(options: &Options, pages: u32) -> Result<(Vec<Request>, Scale), Box<dyn Error>> {
    let mut requests: Vec<Request> = match &options.trace {
        Some(path) => {
            let file =
                File::open(path).map_err(|error| format!("cannot open {}: {error}", path.display()))?;
            TraceReader::new(BufReader::new(file), TraceLimits::default())
                .take(options.requests)
                .collect::<Result<_, _>>()
                .map_err(|error| format!("{}: {error}", path.display()))?
        }
        None => Synthetic::new(SyntheticOptions { seed: options.seed, ..SyntheticOptions::default() })?
            .take(options.requests)
            .collect(),
    };
    let longest = requests.iter().map(|request| request.input_tokens).max().unwrap_or(0);
    let fits = pages * PAGE_TOKENS;
    let scale = match options.scale {
        // A smaller one makes every request a single page.
        Some(factor) if !(LEAST_SCALE..=1.0).contains(&factor) => {
            return Err(format!("--scale {factor:?}: a factor of {LEAST_SCALE} to 1 is possible").into());
        }
        Some(factor) => Scale::new(factor)?,
        None => Scale::new((f64::from(fits / 2) / f64::from(longest.max(1))).min(1.0))?,
    };
    requests.iter_mut().for_each(|request| request.scale_lengths(scale));
    requests.retain(|request| request.input_tokens > 0);
    match requests.iter().map(|request| request.input_tokens).max() {
        None => Err("the trace has no request".into()),
        Some(longest) if longest > fits => Err(format!(
            "a request of {longest} tokens does not fit a pool of {fits}; take a smaller --scale or a larger --pool-mib"
        )
        .into()),
        Some(_) => Ok((requests, scale)),
    }
}
