//! The same with the ranks in several processes, many in each: the test binary runs itself.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::thread;

use crossdock_ep::{Group, GroupConfig, ScaleOrder};
use crossdock_memory::Memory;

use crate::inputs::{Random, Routing};
use crate::reference::Form;
use crate::steps::{self, Case};

const RANKS: u32 = 72;
const PROCESSES: u32 = 3;
/// What tells a process which part of the ranks it is, and the descriptors of all regions.
const CHILD: &str = "CROSSDOCK_EP_CHILD";

fn config() -> GroupConfig {
    let mut max_tokens = vec![8; RANKS as usize];
    (max_tokens[3], max_tokens[40]) = (1, 0);
    crate::config(&max_tokens, 288, 8, 256)
}

fn case() -> Case {
    Case {
        form: Form::Fp8,
        order: ScaleOrder::ByRow,
        routing: Routing::Uniform,
        steps: 2,
        seed: 7,
        verify: false,
        full: true,
    }
}

#[test]
fn seventy_two_ranks_in_three_processes() {
    let regions: Vec<Memory> =
        (0..RANKS).map(|rank| Group::allocate_region(&config(), rank).expect("a region")).collect();
    let fds = regions.iter().map(|region| {
        let fd = region.fd().expect("a region is shared memory");
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).expect("a descriptor to be inherited");
        fd.as_raw_fd().to_string()
    });
    let fds = fds.collect::<Vec<_>>().join(",");
    let processes: Vec<Process> =
        (0..PROCESSES).map(|part| Process::start(&format!("{part}/{fds}"))).collect();
    for (part, mut process) in processes.into_iter().enumerate() {
        let mut said = String::new();
        process.0.stdout.take().expect("its output").read_to_string(&mut said).expect("text");
        assert!(process.0.wait().expect("its end").success(), "process {part}: {said}");
        assert!(said.contains("1 passed"), "process {part} ran nothing: {said}");
    }
}

/// What [`seventy_two_ranks_in_three_processes`] runs: a part of the ranks, each on a thread.
#[test]
fn child() {
    let Ok(args) = std::env::var(CHILD) else { return };
    let (part, fds) = args.split_once('/').expect("a part and descriptors");
    let part: u32 = part.parse().expect("a number");
    let (config, case) = (config(), case());
    let regions: Vec<Memory> = fds
        .split(',')
        .zip(0..)
        .map(|(fd, rank)| {
            let fd: RawFd = fd.parse().expect("a descriptor");
            // SAFETY: the parent has left it open for this process, where nobody else knows of it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let bytes = Group::region_bytes(&config, rank).expect("a rank");
            Memory::from_fd(fd, bytes).expect("its region")
        })
        .collect();
    let (regions, options) = (&regions, &crate::options());
    let inputs = steps::inputs_of(&config, &case, &mut Random::new(case.seed));
    let each = RANKS / PROCESSES;
    thread::scope(|scope| {
        for rank in part * each..(part + 1) * each {
            // SAFETY: the regions are those of this group's ranks, each of which is made once, in one of the processes.
            let group = unsafe { Group::over(&config, rank, regions.clone(), options).expect("a rank") };
            let (case, inputs) = (&case, &inputs);
            scope.spawn(move || steps::rank(group, case, inputs));
        }
    });
}

/// Ends with the test, whatever happens.
struct Process(Child);

impl Process {
    fn start(args: &str) -> Process {
        // Under emulation the emulator is started, with its options.
        let runner = std::env::var("CROSSDOCK_TEST_RUNNER").unwrap_or_default();
        let this = std::env::current_exe().expect("this test");
        let mut words = runner.split_whitespace();
        let mut command = Command::new(words.next().map_or(this.clone(), Into::into));
        if !runner.trim().is_empty() {
            command.args(words).arg(this);
        }
        command.args(["--exact", "processes::child", "--nocapture", "--test-threads=1"]).env(CHILD, args);
        Process(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("a process"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
