//! Other processes of the benchmark: the peer, and those that only use a core. None outlives it: it kills them, and the
//! kernel does where it was killed itself.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};

use crate::error::Error;
use crate::setup::WAIT;

/// A process that ends with this value.
pub struct Process(Child);

impl Process {
    fn start(arguments: &[&str]) -> Result<Self, Error> {
        let program = std::env::current_exe().map_err(Error::io("finding this program"))?;
        let parent = std::process::id().to_string();
        let mut command = Command::new(program);
        command.args(["--parent", &parent]).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().map(Self).map_err(Error::io("starting a process"))
    }

    /// A peer on this host, and where it listens.
    pub fn peer() -> Result<(Self, SocketAddr), Error> {
        let mut peer = Self::start(&["--listen", "127.0.0.1:0"])?;
        let line = peer.first_line()?;
        let address = line.trim().parse().map_err(|_| Error::Unexpected { said: line })?;
        Ok((peer, address))
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// What a process says when it is ready. It is read on a thread, so that it has a deadline; the thread ends with
    /// the process.
    fn first_line(&mut self) -> Result<String, Error> {
        let Some(output) = self.0.stdout.take() else { return Err(Error::PeerGone) };
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(output).read_line(&mut line);
            // Where nobody listens any more, nobody needs it.
            let _ = tell.send(read.map(|_| line));
        });
        let what = "waiting for a process that was started";
        let line = told.recv_timeout(WAIT).map_err(|_| Error::TimedOut { what, limit: WAIT })?;
        let line = line.map_err(Error::io("reading what a process says"))?;
        if line.is_empty() { Err(Error::PeerGone) } else { Ok(line) }
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
                let mut hog = Self::start(&["--burn"])?;
                // Stopped before it has asked to end with this process, it would outlive it.
                hog.first_line()?;
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

/// Lets the kernel kill this process when the one that has started it dies, which it may already have.
pub fn end_with(parent: i32) -> Result<(), Error> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|errno| Error::Io { what: "asking to end with the parent", error: errno.into() })?;
    match getppid().map(Pid::as_raw_pid) {
        Some(now) if now == parent => Ok(()),
        _ => Err(Error::PeerGone),
    }
}

/// Uses a core until killed.
pub fn burn() -> ! {
    println!("ready");
    loop {
        std::hint::spin_loop();
    }
}
