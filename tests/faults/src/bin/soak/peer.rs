//! A peer of the hub's: in a process of its own, or in the hub's.

use std::error::Error;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use crossdock_faults::{GpuChoice, Worker, WorkerOptions};

use crate::lanes::{LANES, Lanes};

#[derive(Args, Clone)]
pub struct PeerOptions {
    #[arg(long)]
    pub hub: String,
    #[arg(long)]
    pub node: u64,
    #[arg(long)]
    pub seed: u64,
    #[arg(long)]
    pub shm: bool,
    #[arg(long)]
    pub tcp: bool,
    #[arg(long)]
    pub gpu: Option<GpuChoice>,
}

/// Runs until its input ends. An error is a rule that was broken, or a node that could not be opened.
pub fn run(options: &PeerOptions) -> Result<(), Box<dyn Error>> {
    use rustix::process::{Signal, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))?;
    live(options, || {
        // Nothing is ever written to it.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
    })
}

/// A whole life of a peer, which ends soon after `stay` has come back.
pub fn live(options: &PeerOptions, stay: impl FnOnce()) -> Result<(), Box<dyn Error>> {
    let PeerOptions { hub, node, seed, shm, tcp, gpu } = options;
    let worker = Worker::open(&WorkerOptions {
        name: format!("peer-{node}"),
        node: *node,
        pages: crate::PAGES / 4,
        shm: *shm,
        tcp: *tcp,
        behind: None,
        second: None,
        verify: seed % 2 == 0,
        gpu: *gpu,
    })?;
    let (peer, _up) = worker.node.handle().connect(hub)?;
    let is_over = AtomicBool::new(false);
    let lanes = Lanes { bench: &worker.bench, peer, is_hub: false, seed: *seed, is_over: &is_over };
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..LANES).map(|lane| scope.spawn(move || lanes.run(lane))).collect();
        stay();
        is_over.store(true, Ordering::Relaxed);
        let lanes = threads
            .into_iter()
            .map(|thread| thread.join().map_or(vec!["a panic".into()], |tally| tally.wrong));
        lanes.flatten().collect()
    });
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ").into()) }
}
