//! The demo's processes, which never outlive it: they end when their standard input does, and those that are stopped
//! and cannot see that are killed by the kernel.

use std::io::{BufRead, BufReader, Write};
use std::process::{self, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::talk::Said;

/// One process of the demo. Dropping it ends it.
pub struct Child {
    name: String,
    process: process::Child,
    input: Option<ChildStdin>,
    output: Option<BufReader<ChildStdout>>,
}

/// What the parent hears from a worker.
pub enum Heard<S = Said> {
    Said(S),
    /// The worker's output has ended.
    Gone {
        how: String,
    },
}

impl Child {
    /// Starts this program again with other arguments.
    pub fn start(name: &str, arguments: &[&str]) -> std::io::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (input, output) = (process.stdin.take(), process.stdout.take().map(BufReader::new));
        Ok(Self { name: name.to_owned(), process, input, output })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The first line that the process prints; it is read on a thread, so that it has a deadline.
    pub fn first_line(&self, within: Duration) -> Result<String, String> {
        // Only the bootstrap server is read so, and nothing else reads its output.
        let fd =
            self.output.as_ref().map(|output| rustix::io::dup(output.get_ref())).ok_or("output is read")?;
        let file = std::fs::File::from(fd.map_err(|error| error.to_string())?);
        let (line, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            let read = BufReader::new(file).read_line(&mut text);
            // The receiver may have given up; then nobody needs the line.
            let _ = line.send(read.map(|_| text));
        });
        match told.recv_timeout(within) {
            Ok(Ok(text)) if !text.is_empty() => Ok(text.trim().to_owned()),
            Ok(_) => Err(format!("the {} process ended before it was ready", self.name)),
            Err(_) => Err(format!("the {} process was not ready in {within:?}", self.name)),
        }
    }

    /// Sends everything that the process says, and its end, to `events`.
    pub fn listen<S>(&mut self, at: usize, events: Sender<(usize, Heard<S>)>) -> std::io::Result<()>
    where
        S: DeserializeOwned + Send + 'static,
    {
        let Some(output) = self.output.take() else { return Ok(()) };
        let id = self.process.id();
        std::thread::Builder::new().name(format!("hear-{}", self.name)).spawn(move || {
            for line in output.lines() {
                let Ok(line) = line else { break };
                if let Ok(said) = serde_json::from_str(&line)
                    && events.send((at, Heard::Said(said))).is_err()
                {
                    return;
                }
            }
            let how = match rustix::process::Pid::from_raw(id as i32).map(wait) {
                Some(Some(how)) => how,
                _ => "unknown".to_owned(),
            };
            let _ = events.send((at, Heard::Gone { how }));
        })?;
        Ok(())
    }

    /// Tells the process something; one that has ended does not hear it.
    pub fn tell(&mut self, what: &impl Serialize) {
        if let (Some(input), Ok(line)) = (&mut self.input, serde_json::to_string(what)) {
            let _ = writeln!(input, "{line}");
        }
    }

    /// Ends the process at once.
    pub fn kill(&mut self) -> std::io::Result<()> {
        self.process.kill()
    }

    /// Ends the process by ending its input, and waits.
    pub fn finish(mut self, within: Duration) {
        self.input = None;
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            match self.process.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only where the process has ended and has been waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Lets the kernel kill this process when its parent dies: one that is stopped would otherwise stay behind.
pub fn end_with_parent() -> std::io::Result<()> {
    use rustix::process::{Signal, set_parent_process_death_signal};
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// How a process that has closed its output ended. Does not reap it: that is left to its owner.
fn wait(pid: rustix::process::Pid) -> Option<String> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    let status = waitid(WaitId::Pid(pid), options).ok()??;
    Some(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit status: {code}"),
        (_, Some(signal)) => format!("killed by signal {signal}"),
        _ => "unknown".to_owned(),
    })
}
