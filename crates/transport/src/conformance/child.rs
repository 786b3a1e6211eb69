//! A peer that can be stopped and killed: its part of the cases, and the process around it.

use std::env;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{self, Command, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use crossdock_memory::{Memory, PageLayout};
use rustix::process::{Pid, Signal, kill_process};

use super::PATIENCE;
use crate::{
    Access, Direction, Error, Event, Events, Grant, GrantId, GrantedBuffer, LaneAddress, LaneId, LaneTags,
    LocalId, Op, PeerId, Port, RemoteId, RemoteKey, Shape,
};

/// A peer outside this process, or simulated as if it were.
pub trait Child {
    /// Has its [`Streamer`] answer.
    fn ask(&mut self, question: &str) -> String;
    /// Stops it in the middle of whatever it does.
    fn stop(&mut self);
    /// Lets it continue.
    fn cont(&mut self);
    /// Ends it, stopped or not, without giving it a chance to say anything.
    fn kill(&mut self);
}

/// What a child runs: a port that writes into its peer's region without pause, as soon as it has been told where.
///
/// Questions and answers are lines: `open` → address and key; `connect ADDRESS OURS THEIRS` and
/// `stream KEY GRANT` → `ok`.
pub struct Streamer {
    port: Box<dyn Port>,
    memory: Memory,
    events: Events,
    local: Option<LocalId>,
    lane: Option<LaneId>,
    up: bool,
    target: Option<(RemoteKey, GrantId)>,
    /// Only the name: a mapping that is held would keep the lane from ending.
    attached: Option<RemoteId>,
    writes: u32,
    /// What is left of a write that was not taken whole.
    rest: Option<Op<'static>>,
}

impl Streamer {
    /// A child's port, and memory to write from.
    pub fn new(port: Box<dyn Port>, memory: Memory) -> Self {
        let (local, lane, target, attached) = (None, None, None, None);
        let events = Events::with_capacity(64);
        Self { port, memory, events, local, lane, up: false, target, attached, writes: 0, rest: None }
    }

    /// Answers a question.
    pub fn answer(&mut self, question: &str) -> String {
        let words: Vec<&str> = question.split_whitespace().collect();
        match words[..] {
            ["open"] => {
                let (lane, address) = self.port.open_lane(PARENT).expect("a lane can be opened");
                let (local, key) = self.port.register(&self.memory).expect("memory can be registered");
                let bytes = self.memory.bytes() as u64;
                let buffers = [GrantedBuffer { region: local, layout: PageLayout::dense(0, bytes, 1) }];
                let grant = Grant {
                    id: CHILDS_GRANT,
                    peer: PARENT,
                    access: Access::Write,
                    buffers: &buffers,
                    pages: &[0],
                };
                self.port.grant(&grant).expect("a whole region can be granted");
                (self.lane, self.local) = (Some(lane), Some(local));
                format!("{} {}", to_hex(address.bytes()), to_hex(key.bytes()))
            }
            ["connect", address, ours, theirs] => {
                let address = LaneAddress::new(&from_hex(address)).expect("the parent's address");
                let tag = |hex| from_hex(hex).try_into().expect("a tag has 32 bytes");
                let tags = LaneTags { ours: tag(ours), theirs: tag(theirs) };
                let lane = self.lane.expect("open comes first");
                self.port.connect(lane, &address, &tags).expect("a fresh lane connects");
                "ok".into()
            }
            ["stream", key, grant] => {
                let key = RemoteKey::new(&from_hex(key)).expect("the parent's key");
                let grant = GrantId::from_bits(grant.parse().expect("a grant's bits"));
                self.target = Some((key, grant));
                "ok".into()
            }
            _ => panic!("the suite asked its child {question:?}"),
        }
    }

    /// Polls, and writes as much as the port takes, each time something else.
    pub fn turn(&mut self) {
        self.port.poll(&mut self.events);
        for event in self.events.drain() {
            match event {
                Event::Up { .. } => self.up = true,
                Event::Down { .. } => (self.up, self.target) = (false, None),
                Event::Done { .. } | Event::Arrived { .. } => {}
            }
        }
        let (Some((key, grant)), true, Some(lane), Some(local)) =
            (&self.target, self.up, self.lane, self.local)
        else {
            return;
        };
        let remote = match self.attached {
            Some(attached) => attached,
            None => match self.port.attach(lane, key) {
                Ok(attached) => *self.attached.insert(attached.id),
                Err(Error::NotYet | Error::LaneDown { .. }) => return,
                Err(error) => panic!("the parent's key: {error}"),
            },
        };
        for _ in 0..16 {
            let op = self.rest.take().unwrap_or_else(|| {
                self.writes += 1;
                let slots = self.memory.bytes() as u64 / SLOT;
                let at = u64::from(self.writes) % slots * SLOT;
                self.memory
                    .fill(at as usize, SLOT as usize, self.writes as u8)
                    .expect("a slot of the memory");
                let shape = Shape::Span { local, local_offset: at, remote, remote_offset: at, bytes: SLOT };
                Op { direction: Direction::Write, grant: *grant, shape, imm: Some(self.writes), token: None }
            });
            match self.port.post(lane, &[op]) {
                Ok(posted) if posted.ops == 1 => {}
                Ok(posted) => {
                    self.rest = Some(op.advance(posted.within));
                    break;
                }
                Err(Error::LaneDown { .. }) => break,
                Err(error) => panic!("a good write: {error}"),
            }
        }
    }
}

/// A command that runs this test binary again. Where that was built for another processor, the kernel does not know how:
/// `CROSSDOCK_TEST_RUNNER` then names the emulator, with its arguments.
pub fn this_binary() -> Command {
    let binary = env::current_exe().expect("a test knows its binary");
    let runner = env::var("CROSSDOCK_TEST_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace().map(OsStr::new).chain([binary.as_os_str()]);
    let mut command = Command::new(words.next().expect("the binary is one of them"));
    command.args(words);
    command
}

/// A [`Child`] in a process: this test binary again, running only the test that calls [`serve`].
pub struct ProcessChild {
    process: process::Child,
    answers: Receiver<String>,
}

impl ProcessChild {
    /// Runs the test `test` of this binary with `rig` in its environment, to be found by [`requested_child`].
    pub fn spawn(test: &str, rig: &str) -> Self {
        let mut process = this_binary()
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env(ENVIRONMENT, rig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this binary can be run again");
        let stdout = process.stdout.take().expect("stdout is a pipe");
        let (sender, answers) = channel();
        // The test harness prints between the answers, hence the mark. The thread ends with the child's output.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(io::Result::ok) {
                if let Some((_, answer)) = line.split_once(MARK)
                    && sender.send(answer.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self { process, answers }
    }

    fn signal(&mut self, signal: Signal) {
        let pid = Pid::from_child(&self.process);
        kill_process(pid, signal).expect("the child has not been waited for");
    }
}

impl Child for ProcessChild {
    fn ask(&mut self, question: &str) -> String {
        let stdin = self.process.stdin.as_mut().expect("stdin is a pipe");
        writeln!(stdin, "{question}").expect("the child reads");
        let answer = self.answers.recv_timeout(PATIENCE);
        answer.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for the child's answer to {question:?}"))
    }

    fn stop(&mut self) {
        self.signal(Signal::STOP);
    }

    fn cont(&mut self) {
        self.signal(Signal::CONT);
    }

    fn kill(&mut self) {
        self.process.kill().expect("a child can be killed");
        self.process.wait().expect("a killed child can be waited for");
    }
}

impl Drop for ProcessChild {
    fn drop(&mut self) {
        // The case may have killed it, or have failed before: either way nobody is left behind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The rig whose child this process is to be, if [`ProcessChild::spawn`] started it.
pub fn requested_child() -> Option<String> {
    env::var(ENVIRONMENT).ok()
}

/// Runs a child until its parent closes the pipe or ends.
pub fn serve(mut streamer: Streamer) {
    let (sender, questions) = channel();
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(io::Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        match questions.try_recv() {
            Ok(question) => {
                println!("\n{MARK}{}", streamer.answer(&question));
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return,
        }
        streamer.turn();
        thread::sleep(Duration::from_micros(50));
    }
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn from_hex(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex digits");
    digits.map(byte).collect()
}

/// Whom a child takes its parent for.
const PARENT: PeerId = PeerId(7);
const CHILDS_GRANT: GrantId = GrantId::new(0, 0);
const SLOT: u64 = 4096;
const ENVIRONMENT: &str = "CROSSDOCK_CONFORMANCE_CHILD";
const MARK: &str = "crossdock-child ";
