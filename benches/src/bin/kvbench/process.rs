//! Other processes of the benchmark: the peer, and those that only use a core. None outlives it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::Error;

/// A process that ends with this value.
pub struct Process(Child);

impl Process {
    fn start(arguments: &[&str], output: Stdio) -> Result<Self, Error> {
        let program = std::env::current_exe().map_err(Error::io("finding this program"))?;
        let command = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(output).spawn();
        command.map(Self).map_err(Error::io("starting a process"))
    }

    /// A peer on this host, and where it listens.
    pub fn peer() -> Result<(Self, SocketAddr), Error> {
        let mut peer = Self::start(&["--listen", "127.0.0.1:0", "--child"], Stdio::piped())?;
        let mut line = String::new();
        let Some(output) = peer.0.stdout.take() else { return Err(Error::PeerGone) };
        BufReader::new(output).read_line(&mut line).map_err(Error::io("reading the peer's address"))?;
        let address = line.trim().parse().map_err(|_| Error::Unexpected { said: line })?;
        Ok((peer, address))
    }

    /// Runs or stops, as a process that is in the way.
    pub fn let_run(&self, run: bool) {
        let signal = if run { Signal::CONT } else { Signal::STOP };
        if let Some(pid) = Pid::from_raw(self.0.id() as i32) {
            // It can only fail when the process has ended, which then uses no core either way.
            let _ = kill_process(pid, signal);
        }
    }

    /// Processes that use a core each, stopped for now.
    pub fn hogs(count: u32) -> Result<Vec<Self>, Error> {
        (0..count)
            .map(|_| {
                let hog = Self::start(&["--burn"], Stdio::null())?;
                hog.let_run(false);
                Ok(hog)
            })
            .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where the process has ended and has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Uses a core until killed, or until whoever started this is long gone.
pub fn burn() -> ! {
    let parent = rustix::process::getppid();
    loop {
        let round = Instant::now();
        while round.elapsed() < Duration::from_millis(100) {
            std::hint::spin_loop();
        }
        if rustix::process::getppid() != parent {
            std::process::exit(0);
        }
    }
}
