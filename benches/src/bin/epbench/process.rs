//! The other ranks, each a process. None outlives the first one: it kills them, and the kernel does where it was killed
//! itself.

use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::Error;
use crate::setup::{Setup, Shared};

/// The processes of all ranks but the first. They end with this value.
pub struct Ranks(Vec<Child>);

impl Ranks {
    pub fn start(setup: &Setup, shared: &Shared) -> Result<Self, Error> {
        let program = std::env::current_exe().map_err(Error::io("finding this program"))?;
        let parent = std::process::id().to_string();
        let descriptors: Vec<String> = shared.descriptors().iter().map(i32::to_string).collect();
        let descriptors = descriptors.join(",");
        let mut ranks = Self(Vec::new());
        for rank in 1..setup.config.ranks() {
            let mut command = Command::new(&program);
            command.args(["--parent", &parent, "--child", &rank.to_string(), "--descriptors", &descriptors]);
            command.args(std::env::args_os().skip(1)).stdin(Stdio::null()).stdout(Stdio::null());
            ranks.0.push(command.spawn().map_err(Error::io("starting a process"))?);
        }
        Ok(ranks)
    }

    /// Whether all of them still run.
    pub fn check(&mut self) -> Result<(), Error> {
        for (rank, child) in (1..).zip(&mut self.0) {
            if let Some(status) = child.try_wait().map_err(Error::io("looking for a process"))? {
                return Err(Error::RankGone { rank, status });
            }
        }
        Ok(())
    }

    /// Waits until all have ended, as they should.
    pub fn wait(mut self) -> Result<(), Error> {
        for (rank, child) in (1..).zip(&mut self.0) {
            let status = child.wait().map_err(Error::io("waiting for a process"))?;
            if !status.success() {
                return Err(Error::RankGone { rank, status });
            }
        }
        Ok(())
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Both fail only where the process has ended and has been waited for.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Lets the kernel kill this process when the one that has started it dies, which it may already have.
pub fn end_with(parent: i32) -> Result<(), Error> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|errno| Error::Io { what: "asking to end with the parent", error: errno.into() })?;
    match getppid().map(Pid::as_raw_pid) {
        Some(now) if now == parent => Ok(()),
        _ => Err(Error::ParentGone),
    }
}

/// How many processors this process may use.
pub fn processors() -> Result<u32, Error> {
    let usable =
        sched_getaffinity(None).map_err(|errno| Error::io("finding the processors")(errno.into()))?;
    Ok(usable.count().max(1))
}

/// Keeps this thread on one of the processors that it may use.
pub fn pin(rank: u32) -> Result<(), Error> {
    let failed = |errno: rustix::io::Errno| Error::io("choosing a processor")(errno.into());
    let usable = sched_getaffinity(None).map_err(failed)?;
    let nth = (rank % usable.count().max(1)) as usize;
    let Some(processor) = (0..CpuSet::MAX_CPU).filter(|&at| usable.is_set(at)).nth(nth) else {
        return Ok(());
    };
    let mut one = CpuSet::new();
    one.set(processor);
    sched_setaffinity(None, &one).map_err(failed)
}
