//! A place beside the hub where one peer after another lives.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossdock::Peer;
use crossdock_faults::{Bench, Chance, GpuChoice};
use rustix::process::{Pid, Signal, kill_process};

use crate::lanes::{LANES, Lanes, Tally};
use crate::peer::{self, PeerOptions};

/// Where the peers of a slot live.
#[derive(Clone, Copy)]
pub enum Where {
    /// In processes, over one port.
    Process { shm: bool },
    /// In the hub's process, over both ports.
    Here,
}

/// One slot, for one round.
pub struct Slot<'a> {
    pub hub: &'a Bench,
    /// Where its peers dial the hub.
    pub address: &'a str,
    pub place: Where,
    /// The node number of its peers: they are starts of one node.
    pub number: u64,
    /// Where everybody's caches are, if not in the host's memory.
    pub gpu: Option<GpuChoice>,
    pub until: Instant,
}

impl Slot<'_> {
    pub fn run(&self, mut chance: Chance) -> Tally {
        let mut tally = Tally::default();
        while Instant::now() < self.until && tally.wrong.is_empty() {
            tally.add(&self.one(&mut chance));
        }
        tally
    }

    /// The life of one peer, and the hub's rooms with it.
    fn one(&self, chance: &mut Chance) -> Tally {
        let (shm, tcp) = match self.place {
            Where::Process { shm } => (shm, !shm),
            Where::Here => (true, true),
        };
        // Room numbers begin with it.
        let seed = chance.word() >> 28;
        let (hub, gpu) = (self.address.to_owned(), self.gpu);
        let options = PeerOptions { hub, node: self.number, seed, shm, tcp, gpu };
        let is_over = AtomicBool::new(false);
        let peer = Peer::node(self.number);
        let lanes = Lanes { bench: self.hub, peer, is_hub: true, seed, is_over: &is_over };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..LANES).map(|lane| scope.spawn(move || lanes.run(lane))).collect();
            let mut tally = match self.place {
                Where::Process { .. } => live_in_process(&options, chance),
                Where::Here => live_here(&options, chance),
            };
            is_over.store(true, Ordering::Relaxed);
            for thread in threads {
                match thread.join() {
                    Ok(one) => tally.add(&one),
                    Err(_) => tally.wrong.push("a lane's thread panicked".into()),
                }
            }
            tally
        })
    }
}

fn live_here(options: &PeerOptions, chance: &mut Chance) -> Tally {
    let stays = Duration::from_millis(chance.draw(300..2_500));
    let lived = peer::live(options, || std::thread::sleep(stays));
    let wrong = lived.err().map(|error| format!("a node here: {error}"));
    Tally { peers: 1, wrong: wrong.into_iter().collect(), ..Tally::default() }
}

fn live_in_process(options: &PeerOptions, chance: &mut Chance) -> Tally {
    let mut tally = Tally { peers: 1, ..Tally::default() };
    let mut child = match start(options) {
        Ok(child) => child,
        Err(error) => {
            tally.wrong.push(format!("a peer does not start: {error}"));
            return tally;
        }
    };
    let mut wait = |range| std::thread::sleep(Duration::from_millis(chance.draw(range)));
    // From before it has met the hub to the middle of its rooms.
    wait(20..2_000);
    let id = Pid::from_child(&child);
    match options.seed % 8 {
        0..3 => tally.killed += 1,
        3..5 => {
            send(id, Signal::STOP);
            wait(50..2_500);
            tally.killed += 1;
        }
        5 => {
            for _ in 0..3 {
                send(id, Signal::STOP);
                wait(10..1_500);
                send(id, Signal::CONT);
                tally.stopped += 1;
                wait(10..500);
            }
            leave(&mut child, &mut tally);
        }
        _ => leave(&mut child, &mut tally),
    }
    // Both fail only where it has ended and was waited for.
    let _ = child.kill();
    let _ = child.wait();
    tally
}

fn start(options: &PeerOptions) -> std::io::Result<Child> {
    let PeerOptions { hub, node, seed, shm, tcp, gpu } = options;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["peer", "--hub", hub, "--node", &node.to_string(), "--seed", &seed.to_string()]);
    command.args(shm.then_some("--shm")).args(tcp.then_some("--tcp"));
    command.args(gpu.iter().flat_map(|gpu| ["--gpu".to_owned(), gpu.to_string()]));
    command.stdin(Stdio::piped()).spawn()
}

/// Lets a peer leave in order, as it does by the deadlines of its rooms.
fn leave(child: &mut Child, tally: &mut Tally) {
    drop(child.stdin.take());
    let until = Instant::now() + crate::SOON;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return,
            Ok(Some(status)) => return tally.wrong.push(format!("a peer ended with {status}")),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) => return tally.wrong.push("a peer does not leave".into()),
            Err(error) => return tally.wrong.push(format!("a peer cannot be waited for: {error}")),
        }
    }
}

/// Sends a signal to a child that was not waited for.
fn send(id: Pid, signal: Signal) {
    // It may have ended, by an error that its status will tell.
    let _ = kill_process(id, signal);
}
