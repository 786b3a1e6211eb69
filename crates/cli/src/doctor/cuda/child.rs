//! The process that asks, and its parent that listens: JSON, one object a line.

use std::io::{self, BufRead, BufReader};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use crossdock_verbs::topology::Topology;
use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use serde::{Deserialize, Serialize};

use super::{Answer, Cuda, Driver, Nvml, look};
use crate::output::say;

#[derive(Args)]
pub struct Options {
    /// The PCI addresses of the GPUs that NVML is asked about
    addresses: Vec<String>,
}

/// A line of the process that asks.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// What it is about to do.
    Doing(String),
    Nvml(Answer<Nvml>),
    Driver(Answer<Driver>),
}

/// Asks in a process of its own, which is killed when it says nothing for some time.
pub fn ask(topology: &Topology) -> Cuda {
    let mut heard = Heard::default();
    match std::env::current_exe() {
        Ok(program) => {
            let mut command = Command::new(program);
            command.arg(SUBCOMMAND).args(topology.gpus.iter().map(|gpu| gpu.pci.address.to_string()));
            hear(command, SILENCE)
        }
        Err(error) => heard.end(&format!("could not be started: {error}")),
    }
}

/// What that process does.
pub fn answer(options: &Options) -> ExitCode {
    // Where either fails, the process answers all the same: it may then outlive a parent that is killed, for as long as its
    // driver hangs, or leave a core file behind where the driver crashes.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    tell(&Line::Doing("NVML".into()));
    // Before the driver: NVML tells why that does not start where the GPUs wait for their switches.
    tell(&Line::Nvml(look::nvml(&options.addresses)));
    tell(&Line::Driver(look::driver(&mut |what| tell(&Line::Doing(what)))));
    ExitCode::SUCCESS
}

fn tell(line: &Line) {
    if let Ok(line) = serde_json::to_string(line) {
        say!("{line}");
    }
}

/// What was heard so far.
#[derive(Default)]
struct Heard {
    doing: Option<String>,
    nvml: Option<Answer<Nvml>>,
    driver: Option<Answer<Driver>>,
}

impl Heard {
    fn take(&mut self, line: Line) {
        match line {
            Line::Doing(what) => self.doing = Some(what),
            Line::Nvml(nvml) => self.nvml = Some(nvml),
            Line::Driver(driver) => self.driver = Some(driver),
        }
    }

    fn is_whole(&self) -> bool {
        self.nvml.is_some() && self.driver.is_some()
    }

    /// Whatever was not told is lost.
    fn end(&mut self, how: &str) -> Cuda {
        let how = match self.doing.take() {
            Some(doing) => format!("{how}, at {doing}"),
            None => how.to_owned(),
        };
        Cuda {
            driver: self.driver.take().unwrap_or_else(|| Answer::Lost(how.clone())),
            nvml: self.nvml.take().unwrap_or(Answer::Lost(how)),
        }
    }
}

/// Starts the process and listens to it.
fn hear(mut command: Command, silence: Duration) -> Cuda {
    let mut heard = Heard::default();
    let how = listen(&mut command, silence, &mut heard)
        .unwrap_or_else(|error| format!("could not be started: {error}"));
    heard.end(&how)
}

fn listen(command: &mut Command, silence: Duration, heard: &mut Heard) -> io::Result<String> {
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = process.stdout.take().map(BufReader::new);
    let (lines, told) = sync_channel(LINES_AHEAD);
    // It ends with the output. Where the kernel cannot end the process, which waits for a device, this thread waits with it,
    // and nobody for this thread.
    thread::Builder::new().name("hear-driver".into()).spawn(move || {
        let all = output.into_iter().flat_map(|output| output.split(b'\n'));
        for line in all.map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    })?;
    let mut deadline = Instant::now() + silence;
    let how = loop {
        if heard.is_whole() {
            end(&mut process, GRACE);
            break String::new();
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // A process that says nothing but what nobody understands is as good as a silent one.
        let line = if left.is_zero() { Err(RecvTimeoutError::Timeout) } else { told.recv_timeout(left) };
        match line {
            Ok(line) => {
                if let Ok(line) = serde_json::from_slice(&line) {
                    heard.take(line);
                    deadline = Instant::now() + silence;
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                end(&mut process, Duration::ZERO);
                break format!("said nothing for {silence:?} and was killed");
            }
            Err(RecvTimeoutError::Disconnected) => {
                break match end(&mut process, GRACE) {
                    Some(status) => format!("ended early ({status})"),
                    None => "ended its answers early".to_owned(),
                };
            }
        }
    };
    Ok(how)
}

/// Waits so long for the end of the process and kills it then. Waits for that, too, but not for ever: a process that waits for
/// a device cannot be killed. Nothing where it did not end by itself.
fn end(process: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let status = wait(process, patience);
    if status.is_none() {
        // Fails only where it has ended in between.
        let _ = process.kill();
        wait(process, GRACE);
    }
    status
}

fn wait(process: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        match process.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// The subcommand that only this program gives to itself.
const SUBCOMMAND: &str = "doctor-driver";
/// What a step may take. The first context of a GPU that nothing has kept awake takes seconds.
const SILENCE: Duration = Duration::from_secs(20);
/// What a process may take to end that has nothing left to say.
const GRACE: Duration = Duration::from_secs(2);
const LINES_AHEAD: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(300);

    fn heard_of(script: &str, silence: Duration) -> Cuda {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        hear(command, silence)
    }

    /// How it was lost.
    fn lost<T: std::fmt::Debug>(answer: &Answer<T>) -> &str {
        match answer {
            Answer::Lost(how) => how,
            other => panic!("{other:?}"),
        }
    }

    const DOING: &str = r#"echo '{"doing":"cuda:3 (0000:1b:00.0): its context"}'"#;
    const NVML: &str = r#"echo '{"nvml":{"told":{"fabrics":{}}}}'"#;
    const DRIVER: &str = r#"echo '{"driver":{"told":{"version":12080,"devices":[]}}}'"#;

    #[test]
    fn a_driver_that_hangs_is_left_and_what_was_told_is_kept() {
        let begun = Instant::now();
        let cuda = heard_of(&format!("{NVML}; {DOING}; exec sleep 60"), SHORT);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        let wanted = "said nothing for 300ms and was killed, at cuda:3 (0000:1b:00.0): its context";
        assert_eq!(lost(&cuda.driver), wanted);
        assert!(cuda.nvml.told().is_some(), "{cuda:?}");
    }

    #[test]
    fn a_driver_that_crashes_takes_only_its_process() {
        let cuda = heard_of(&format!("ulimit -c 0; {DOING}; kill -SEGV $$"), Duration::from_secs(60));
        let how = lost(&cuda.driver);
        assert!(how.starts_with("ended early (signal: 11 (SIGSEGV)"), "{how}");
        assert!(how.ends_with(", at cuda:3 (0000:1b:00.0): its context"), "{how}");
        assert_eq!(lost(&cuda.nvml), how);
        let cuda = heard_of("exit 3", Duration::from_secs(60));
        assert_eq!(lost(&cuda.driver), "ended early (exit status: 3)");
    }

    #[test]
    fn what_nobody_understands_is_no_sign_of_life() {
        let cuda = heard_of("while :; do echo driver says hello; done", SHORT);
        assert_eq!(lost(&cuda.driver), "said nothing for 300ms and was killed");
        let cuda = heard_of("exec >&-; exec sleep 60", Duration::from_secs(60));
        assert_eq!(lost(&cuda.driver), "ended its answers early");
    }

    #[test]
    fn all_is_heard_although_the_process_does_not_end() {
        let cuda = heard_of(
            &format!("echo noise; {NVML}; {DOING}; {DRIVER}; exec sleep 60"),
            Duration::from_secs(60),
        );
        assert_eq!(cuda.driver.told().map(|driver| driver.version), Some(12_080));
        assert!(cuda.nvml.told().is_some(), "{cuda:?}");
    }

    #[test]
    fn a_program_that_is_not_there_is_lost_too() {
        let cuda = hear(Command::new("/nowhere/at/all"), SHORT);
        assert!(lost(&cuda.driver).starts_with("could not be started: "), "{cuda:?}");
    }
}
