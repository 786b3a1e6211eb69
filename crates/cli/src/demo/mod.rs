//! `crossdock demo`: a bootstrap server, a prefill process and a decode process hand requests over.
//!
//! The parent plays the router: it gives each request's room to both workers over their standard input and hears from
//! them over their standard output, one JSON object a line. Everything else goes as in a deployment: the workers find
//! each other through the registry, and the pages go from process to process.

mod content;
mod limit;
mod process;
mod report;
mod talk;
mod worker;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use crossdock::CacheLayout;
use crossdock::trace::{Request, Scale, Synthetic, SyntheticOptions, TraceLimits, TraceReader};

use process::{Child, Heard};
use report::{Progress, Scene};
use talk::{Said, Tell};

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
    /// The factor by which lengths shrink; by default such that the longest request fills half of a pool
    #[arg(long)]
    scale: Option<f64>,
    /// The ports, one scene each
    #[arg(long, value_delimiter = ',', default_value = "shm,tcp")]
    ports: Vec<PortName>,
    /// Memory of each worker's pool, in MiB
    #[arg(long, default_value_t = 768)]
    pool_mib: u64,
    /// Requests under way at once
    #[arg(long, default_value_t = 3)]
    in_flight: usize,
    /// What a hand-over may take, in seconds
    #[arg(long, default_value_t = 20)]
    deadline_s: u64,
    /// Ends the demo after so many seconds, whatever has been handed over by then
    #[arg(long, default_value_t = 55)]
    within_s: u64,
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

/// Tokens of a page, everywhere in the demo.
const PAGE_TOKENS: u32 = 64;

pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    if options.requests == 0 || options.in_flight == 0 || options.ports.is_empty() {
        return Err("there must be a request, one under way at a time, and a port".into());
    }
    let page_bytes = CacheLayout::deepseek_r1(PAGE_TOKENS, 1)?.bytes_needed(0);
    let pages = u32::try_from((options.pool_mib << 20) / page_bytes)?;
    let (requests, scale) = requests(options, pages)?;
    println!(
        "DeepSeek-R1's MLA cache: 61 layers, 1,152 bytes a token and layer, {PAGE_TOKENS} tokens a page; lengths × {:.4}",
        scale.factor()
    );
    let begin = Instant::now();
    let registry =
        Child::start("bootstrap", &["bootstrap", "--listen", "127.0.0.1:0", "--until-stdin-ends"])?;
    let address = registry.first_line(Duration::from_secs(10))?;
    println!("registry at http://{address}, process {}", registry.id());
    let mut scenes = Vec::new();
    for (at, &port) in options.ports.iter().enumerate() {
        // What is left of the time is shared by the scenes that are left.
        let left = Duration::from_secs(options.within_s).saturating_sub(begin.elapsed());
        let share = left / (options.ports.len() - at) as u32;
        scenes.push(play(options, port, pages, &requests, &address, Instant::now() + share)?);
    }
    println!();
    print!("{}", report::table(&scenes));
    let leaks: u64 = scenes.iter().map(|scene| scene.leaks).sum();
    println!("\nleaks: {leaks}   (pages, rooms and grants that did not come home)");
    registry.finish(Duration::from_secs(5));
    let whole = scenes.iter().all(|scene| scene.is_whole());
    for trouble in scenes.iter().flat_map(|scene| &scene.troubles) {
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
                .collect::<Result<_, _>>()?
        }
        None => Synthetic::new(SyntheticOptions { seed: options.seed, ..SyntheticOptions::default() })?
            .take(options.requests)
            .collect(),
    };
    let longest = requests.iter().map(|request| request.input_tokens).max().unwrap_or(0);
    let fits = pages * PAGE_TOKENS;
    let scale = match options.scale {
        Some(factor) => Scale::new(factor)?,
        None => Scale::new((f64::from(fits / 2) / f64::from(longest.max(1))).min(1.0))?,
    };
    requests.iter_mut().for_each(|request| request.scale_lengths(scale));
    requests.retain(|request| request.input_tokens > 0);
    match requests.iter().map(|request| request.input_tokens).max() {
        None => Err("the trace has no requests".into()),
        Some(longest) if longest > fits => Err(format!(
            "a request of {longest} tokens does not fit a pool of {fits}; take a smaller --scale or a larger --pool-mib"
        )
        .into()),
        Some(_) => Ok((requests, scale)),
    }
}

/// One scene: all requests over one port.
fn play(
    options: &Options,
    port: PortName,
    pages: u32,
    requests: &[Request],
    registry: &str,
    until: Instant,
) -> Result<Scene, Box<dyn Error>> {
    let limit_gb_per_s = limit::measure(port);
    let start = |role: &str| {
        let pages = pages.to_string();
        let deadline = options.deadline_s.to_string();
        let in_flight = options.in_flight.to_string();
        Child::start(
            role,
            &[
                "demo-worker",
                "--role",
                role,
                "--port",
                port.name(),
                "--registry",
                registry,
                "--pages",
                &pages,
                "--deadline-s",
                &deadline,
                "--in-flight",
                &in_flight,
            ],
        )
    };
    let (prefill, decode) = (start("prefill")?, start("decode")?);
    let (events, heard) = mpsc::channel();
    let mut workers = [prefill, decode];
    for (at, worker) in workers.iter_mut().enumerate() {
        worker.listen(at, events.clone())?;
    }
    println!(
        "\nscene {}: prefill is process {}, decode is process {}",
        port.name(),
        workers[0].id(),
        workers[1].id()
    );
    let mut scene = Scene::new(port.name(), requests.len(), limit_gb_per_s);
    let mut progress = Progress::new(port.name(), requests.len());
    let mut open: BTreeMap<u64, Instant> = BTreeMap::new();
    let mut next = 0;
    let mut ready = 0;
    let begin = Instant::now();
    // Each worker ends every room by its deadline; the router waits a little longer than that.
    let patience = Duration::from_secs(options.deadline_s + 10);
    loop {
        while ready == 2
            && scene.troubles.is_empty()
            && next < requests.len()
            && open.len() < options.in_flight
        {
            if Instant::now() >= until {
                scene.cut_short(next);
                break;
            }
            let (room, tokens) = (next as u64 + 1, requests[next].input_tokens);
            let go = Tell::Go { room, tokens };
            // A worker that cannot be told has ended; its end is heard below.
            workers.iter_mut().for_each(|worker| worker.tell(&go));
            open.insert(room, Instant::now());
            next += 1;
        }
        let all_done = open.is_empty() && ready == 2 && next >= scene.requests;
        if all_done || (open.is_empty() && !scene.troubles.is_empty()) {
            break;
        }
        if ready < 2 && begin.elapsed() > Duration::from_secs(30) {
            scene.troubles.push(format!("{}: the workers did not find each other in 30 s", port.name()));
            break;
        }
        if let Some((room, _)) = open.iter().find(|(_, since)| since.elapsed() > patience) {
            scene.troubles.push(format!("{}: room {room} did not end by its deadline", port.name()));
            break;
        }
        match heard.recv_timeout(Duration::from_millis(100)) {
            Ok((_, Heard::Said(Said::Ready { .. }))) => ready += 1,
            Ok((1, Heard::Said(Said::Ended(ended)))) => {
                open.remove(&ended.room);
                scene.decode_ended(ended);
            }
            Ok((_, Heard::Said(Said::Ended(ended)))) => scene.prefill_ended(ended),
            Ok((_, Heard::Said(Said::Bye { .. }))) => {}
            Ok((at, Heard::Gone { how })) => {
                let role = workers[at].name();
                scene.troubles.push(format!("{}: the {role} process ended early: {how}", port.name()));
                if at == 1 {
                    open.clear();
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        progress.show(scene.ended(), scene.bytes);
    }
    progress.end();
    // The survivors end their rooms, say what they still hold, and leave.
    workers.iter_mut().for_each(|worker| worker.tell(&Tell::End));
    let deadline = Instant::now() + patience;
    let mut gone = scene.troubles.iter().filter(|trouble| trouble.contains("ended early")).count();
    while gone < 2 {
        match heard.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((at, Heard::Said(Said::Bye { pages, rooms, grants, stale }))) => {
                let name = workers[at].name();
                scene.bye(name, pages, rooms, grants, stale);
            }
            Ok((0, Heard::Said(Said::Ended(ended)))) => scene.prefill_ended(ended),
            Ok((_, Heard::Said(Said::Ended(ended)))) => scene.decode_ended(ended),
            Ok((_, Heard::Said(Said::Ready { .. }))) => {}
            Ok((at, Heard::Gone { how })) => {
                gone += 1;
                if how != "exit status: 0" {
                    scene.troubles.push(format!(
                        "{}: the {} process: {how}",
                        port.name(),
                        workers[at].name()
                    ));
                }
            }
            Err(_) => {
                scene.troubles.push(format!("{}: a worker did not end and was killed", port.name()));
                break;
            }
        }
    }
    Ok(scene)
}
