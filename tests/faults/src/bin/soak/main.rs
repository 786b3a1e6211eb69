//! The soak: nodes come and go for as long as one likes, and nothing may grow.
//!
//! One process, the hub, keeps one node. Peers come and go around it, over shared memory and TCP: processes that leave in
//! order, are stopped, continued and killed, and nodes in the hub's own process; in every other round through proxies that
//! break connections. Rooms of all kinds run between the hub and each of them, pushed and pulled both ways, cancelled,
//! forgotten, with deadlines too short. After every round all peers are gone, and what the hub holds is counted: it must be
//! what it was. Every count is printed, while it is busy and when it is quiet; at the end a table judges each kind.
#![deny(unsafe_op_in_unsafe_fn)]

mod heap;
mod lanes;
mod peer;
mod report;
mod slot;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use crossdock_faults::{Bench, Census, Chance, GpuChoice, Proxy, Worker, WorkerOptions};

use lanes::Tally;
use report::{Counts, Report};
use slot::{Slot, Where};

#[derive(Parser)]
#[command(about = "Runs nodes that come and go, and fails if anything of the hub's grows")]
struct Options {
    #[command(subcommand)]
    part: Option<Part>,
    /// How long
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// How long peers come and go before everything is counted
    #[arg(long, default_value_t = 8)]
    round_s: u64,
    /// Decides what happens, though not in which order the processes run
    #[arg(long)]
    seed: Option<u64>,
    /// Keeps all caches on a GPU and moves pages there: `software` is one without a GPU, a number one of the machine's
    #[arg(long)]
    gpu: Option<GpuChoice>,
    /// Draws the counts over the time into a file
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Part {
    /// A peer of the hub's; started by it
    #[command(hide = true)]
    Peer(peer::PeerOptions),
}

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

fn main() -> ExitCode {
    heap::settle();
    let options = Options::parse();
    let done = match &options.part {
        Some(Part::Peer(peer)) => peer::run(peer).map(|()| true),
        None => soak(&options),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}

/// For what has to happen in the end, on a machine that has too much to do.
const SOON: Duration = Duration::from_secs(60);
/// How often the counts are printed while peers come and go.
const EVERY: Duration = Duration::from_secs(5);
/// Pages of a node's cache.
const PAGES: u32 = 512;

/// True if nothing has grown.
fn soak(options: &Options) -> Result<bool, Box<dyn Error>> {
    let seed = options.seed.unwrap_or_else(Chance::any_seed);
    let gpu = options.gpu.map_or(String::new(), |gpu| format!(" --gpu {gpu}"));
    println!("soak --minutes {} --round-s {} --seed {seed}{gpu}", options.minutes, options.round_s);
    let mut chance = Chance::new(seed, 0);
    let (hub, proxies) = hub(options.gpu, &mut chance)?;
    hub.bench.touch();
    let begin = Instant::now();
    let until = begin + Duration::from_secs_f64(options.minutes * 60.0);
    let mut report = Report::new();
    let mut tally = Tally::default();
    report.print_head();
    for round in 0.. {
        // Fair weather and foul, in turns.
        proxies.iter().for_each(|proxy| proxy.set_storm(round % 2 == 1));
        tally.add(&play(&hub, &proxies, &mut chance, options, begin, &report)?);
        proxies.iter().for_each(Proxy::calm);
        if let Err(left) = hub.bench.is_empty(0, SOON) {
            tally.wrong.push(format!("after round {round} the hub keeps {left}"));
        }
        report.quiet(settled(&hub.bench, begin, report.base())?);
        if !tally.wrong.is_empty() || Instant::now() >= until && report.is_enough() {
            break;
        }
    }
    println!("\n{tally}");
    let is_flat = report.judge();
    if let Some(path) = &options.svg {
        report.draw(path)?;
    }
    for wrong in &tally.wrong {
        println!("! {wrong}");
    }
    Ok(is_flat && tally.wrong.is_empty())
}

/// The hub, and the proxies that stand before it for whoever dials them.
fn hub(gpu: Option<GpuChoice>, chance: &mut Chance) -> Result<(Worker, [Proxy; 2]), Box<dyn Error>> {
    loop {
        let proxies = [Proxy::start(chance.word())?, Proxy::start(chance.word())?];
        let opened = Worker::open(&WorkerOptions {
            name: "hub".into(),
            node: HUB,
            pages: PAGES,
            shm: true,
            tcp: true,
            behind: Some([proxies[0].port(), proxies[1].port()]),
            second: None,
            verify: false,
            gpu,
        });
        match opened {
            Ok(worker) => return Ok((worker, proxies)),
            // Another program has the port at the other address.
            Err(error) if error.is_retryable() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The hub's number; peers have others.
const HUB: u64 = 1;

/// One round: peers come and go in all slots.
fn play(
    hub: &Worker,
    proxies: &[Proxy; 2],
    chance: &mut Chance,
    options: &Options,
    begin: Instant,
    report: &Report,
) -> Result<Tally, Box<dyn Error>> {
    let direct = format!("{}:{}", Proxy::BACK, proxies[0].port());
    let (round_s, gpu) = (options.round_s, options.gpu);
    let until = Instant::now() + Duration::from_secs(round_s);
    let slots = [
        (Where::Process { shm: true }, direct.as_str()),
        (Where::Process { shm: false }, hub.node.address()),
        (Where::Process { shm: chance.hits(1, 2) }, hub.node.address()),
        (Where::Here, direct.as_str()),
    ];
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0u64..)
            .zip(slots)
            .map(|(at, (place, address))| {
                let chance = Chance::new(chance.word(), at);
                // Each peer's start has a number of its own in its slot's hundred million.
                let slot = Slot { hub: &hub.bench, address, place, number: 100 + at, gpu, until };
                scope.spawn(move || slot.run(chance))
            })
            .collect();
        let storm =
            scope.spawn(|| break_all(proxies, &is_over, Chance::new(round_s, begin.elapsed().as_secs())));
        let mut next = Instant::now() + EVERY;
        while !threads.iter().all(|thread| thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
            if Instant::now() >= next {
                next += EVERY;
                report.print("busy", &Counts::take(&hub.bench, begin)?);
            }
        }
        is_over.store(true, Ordering::Relaxed);
        let mut tally = Tally::default();
        for thread in threads {
            match thread.join() {
                Ok(one) => tally.add(&one),
                Err(_) => tally.wrong.push("a slot's thread panicked".into()),
            }
        }
        tally.resets += storm.join().map_err(|_| "the storm's thread panicked")?;
        Ok(tally)
    })
}

/// Resets and freezes everything that goes through the proxies, now and then.
fn break_all(proxies: &[Proxy; 2], is_over: &AtomicBool, mut chance: Chance) -> u64 {
    let mut resets = 0;
    while !is_over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(chance.draw(100..600)));
        if !proxies[0].is_storm() {
            continue;
        }
        match chance.draw(0..6) {
            0 => proxies.iter().for_each(Proxy::reset_all),
            1 => proxies.iter().for_each(|proxy| proxy.freeze(Duration::from_millis(600))),
            _ => continue,
        }
        resets += 1;
    }
    resets
}

/// Counts once threads and connections that are ending have ended, or a while has passed.
fn settled(hub: &Bench, begin: Instant, base: Option<&Counts>) -> Result<Counts, String> {
    let until = Instant::now() + Duration::from_secs(5);
    let mut last = Census::of_this_process();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = Census::of_this_process();
        let is_still = (now.descriptors, now.threads) == (last.descriptors, last.threads);
        let is_base = base.is_none_or(|base| base.is_back(&now));
        last = now;
        // The first one has nothing to compare with: it waits as long as a late one may.
        let waits = if base.is_none() { Instant::now() < until } else { !(is_still && is_base) };
        if !waits || Instant::now() >= until {
            heap::trim();
            return Counts::take(hub, begin);
        }
    }
}
