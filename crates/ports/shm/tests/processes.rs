//! Ports in several processes: peers that die, fork, execute something else, and sleep.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use common::{Side, content, private, private_memory_can_be_reached, shared, tags, write};
use crossdock_memory::{Memory, PageLayout};
use crossdock_shm::process_memory::{PeerProcess, ProcessMemoryError};
use crossdock_shm::{ShmOptions, regions_left_exposed};
use crossdock_transport::conformance::this_binary;
use crossdock_transport::{
    Access, Attached, DownCause, Error, Event, Fence, Grant, GrantId, GrantedBuffer, LaneAddress, LaneId,
    LocalId, Op, PeerId, Port, RemoteKey,
};
use rustix::process::{DumpableBehavior, Pid, Signal, kill_process};
use rustix::thread::CapabilitySet;

/// Memory of both kinds, moved both ways between two processes.
#[test]
fn bytes_cross_between_processes_both_ways() {
    for kind in kinds() {
        let mut pair = Pair::new(kind);
        let sent: Vec<u8> = (0..BYTES).map(|at| (at * 7 + at / 256) as u8).collect();
        pair.memory.write(0, &sent).expect("a whole memory can be written");
        let remote = pair.attached.id;
        let there = write(pair.local, remote, BYTES as u64);
        pair.post(&[Op { imm: Some(1), ..there }]);
        assert_eq!(pair.worker.ask("checksum"), sum(&sent).to_string(), "written to {kind} memory");
        pair.worker.ask("invert");
        pair.post(&[Op { direction: crossdock_transport::Direction::Read, ..there }]);
        let expected: Vec<u8> = sent.iter().map(|byte| !byte).collect();
        assert!(content(&pair.memory) == expected, "read from {kind} memory");
        // And the worker's own ops, into this process.
        pair.worker.ask(&format!("push {} 99", hex(pair.key.bytes())));
        let lane = pair.lane;
        pair.side.wait("the worker's write", |side| side.events.contains(&Event::Arrived { lane, imm: 99 }));
        assert!(content(&pair.memory) == expected, "pushed from {kind} memory");
    }
}

/// A peer whose memory the kernel keeps from its like: `attach` says so, and what to do, and the lane lives.
#[test]
fn private_memory_that_the_kernel_guards_is_refused_with_advice() {
    let mut undumpable = Worker::spawn("private");
    assert_eq!(undumpable.ask("become undumpable"), "undumpable");
    let mut side = Side::open(options());
    let (lane, key) = undumpable.meet(&mut side);
    let refusal = without_ptrace(|| {
        let there = PeerProcess::new(Pid::from_child(&undumpable.process));
        match there.probe() {
            // The kernel's own answer, so that the rest is not blamed on the port.
            Err(ProcessMemoryError::Refused { .. }) => Ok(side.port.attach(lane, &key)),
            other => Err(format!("the kernel answers {other:?} for a process that is not dumpable")),
        }
    });
    match refusal {
        Ok(Err(Error::Unsupported { what, advice })) => {
            assert_eq!(what, "access to the peer's private memory");
            for word in ["register memory that crossdock allocated", "allow_ptrace", "CAP_SYS_PTRACE"] {
                assert!(advice.contains(word), "no '{word}' in: {advice}");
            }
        }
        Ok(other) => panic!("attached, or refused otherwise: {other:?}"),
        Err(why) => {
            eprintln!("skipped: {why}");
            return;
        }
    }
    // The lane lives: an immediate crosses, for which this order waits.
    assert_eq!(side.port.post(lane, &[Op::notify(7)]).map(|posted| posted.ops), Ok(1));
    undumpable.ask("checksum");
    assert_eq!(side.down(lane), None);
}

/// Killed while it writes without pause: one `Down`, for the right reason, and memory at rest behind it.
#[test]
fn a_killed_peer_is_told_from_a_broken_one() {
    for kind in kinds() {
        let mut pair = Pair::new(kind);
        pair.worker.ask(&format!("flood {}", hex(pair.key.bytes())));
        let lane = pair.lane;
        pair.side.wait("a flood of writes", |side| side.arrived(lane) > 100);
        pair.worker.kill();
        pair.side.wait("the end", |side| side.down(lane).is_some());
        assert_eq!(pair.side.down(lane), Some(DownCause::PeerDied));
        let at_rest = content(&pair.memory);
        for _ in 0..100 {
            pair.side.poll();
        }
        assert!(content(&pair.memory) == at_rest);
        assert_eq!(pair.side.down(lane), Some(DownCause::PeerDied));
    }
}

/// This side closes, and the peer is stopped: the lane ends when it continues, not before.
#[test]
fn a_stopped_peer_delays_the_end() {
    let mut pair = Pair::new("shared");
    pair.worker.ask(&format!("flood {}", hex(pair.key.bytes())));
    let lane = pair.lane;
    pair.side.wait("a flood of writes", |side| side.arrived(lane) > 100);
    pair.worker.stop();
    pair.side.port.close(lane);
    pair.stays_not_down();
    pair.worker.signal(Signal::CONT);
    pair.side.wait("the end", |side| side.down(lane).is_some());
    assert_eq!(pair.side.down(lane), Some(DownCause::ClosedHere));
}

/// A grant of private memory is revoked, and the peer, which was stopped in the middle, goes on writing later: the
/// memory stays this port's until the lane is down.
#[test]
fn private_memory_is_not_given_back_before_its_writer_has_stopped() {
    if !private_memory_can_be_reached() {
        return;
    }
    let mut pair = Pair::new("private");
    let in_use =
        |pair: &mut Pair| matches!(pair.side.port.deregister(pair.local), Err(Error::RegionInUse { .. }));
    pair.grant(0);
    pair.worker.ask(&format!("flood {}", hex(pair.key.bytes())));
    let lane = pair.lane;
    pair.side.wait("a flood of writes", |side| side.arrived(lane) > 100);
    pair.worker.stop();
    assert_eq!(pair.side.port.revoke(GrantId::new(0, 0)), Fence::WhenDown);
    assert!(in_use(&mut pair), "the writer only sleeps");
    pair.side.port.close(lane);
    pair.stays_not_down();
    assert!(in_use(&mut pair) && !pair.memory.is_last_handle());
    pair.worker.signal(Signal::CONT);
    pair.side.wait("the end", |side| side.down(lane).is_some());
    assert_eq!(pair.side.port.deregister(pair.local), Ok(()));
    assert!(pair.memory.is_last_handle(), "now it may be freed");
}

/// The port is dropped, and the peer goes on writing: the handles are never dropped.
#[test]
fn a_dropped_port_keeps_the_private_memory_of_writers_that_go_on() {
    if !private_memory_can_be_reached() {
        return;
    }
    let left_before = regions_left_exposed();
    let mut pair = Pair::new("private");
    pair.grant(0);
    pair.worker.ask(&format!("flood {}", hex(pair.key.bytes())));
    let lane = pair.lane;
    pair.side.wait("a flood of writes", |side| side.arrived(lane) > 100);
    pair.worker.stop();
    let Pair { side, worker, mut memory, .. } = pair;
    drop(side);
    assert!(!memory.is_last_handle(), "its owner must not free it");
    // Other tests of this process add to it, too.
    assert!(regions_left_exposed() > left_before);
    worker.signal(Signal::CONT);
    // Where the writer has ended first, everything is given back.
    let mut pair = Pair::new("private");
    pair.grant(0);
    pair.worker.kill();
    let Pair { side, mut memory, .. } = pair;
    drop(side);
    assert!(memory.is_last_handle());
}

/// A child that the peer has forked inherits its sockets, and no mapping: it neither keeps the lane up nor can it write.
#[test]
fn a_forked_child_does_not_keep_the_lane() {
    if advice_is_ignored() {
        eprintln!("skipped: madvise does nothing here, so a child keeps every mapping");
        return;
    }
    let mut pair = Pair::new("shared");
    pair.worker.ask(&format!("push {} 1", hex(pair.key.bytes())));
    let grandchild: i32 = pair.worker.ask("fork").parse().expect("a process number");
    let grandchild = Pid::from_raw(grandchild).expect("a process number");
    let maps = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process lives");
    let mapped = |maps: &str| maps.lines().filter(|line| line.contains("memfd:crossdock")).count();
    let peers = mapped(&maps(pair.worker.process.id() as i32));
    assert!(
        peers >= 3,
        "the peer has mapped its own region, this side's and the rings, and not {peers} things"
    );
    assert_eq!(mapped(&maps(grandchild.as_raw_nonzero().get())), 0, "its child has not");
    pair.worker.kill();
    let lane = pair.lane;
    pair.side.wait("the end", |side| side.down(lane).is_some());
    assert_eq!(pair.side.down(lane), Some(DownCause::PeerDied));
    kill_process(grandchild, Signal::KILL).expect("the grandchild has lived until now");
}

/// Whether this runs under an emulator that answers `madvise` and does nothing: a kernel refuses advice that does not exist.
fn advice_is_ignored() -> bool {
    let memory = shared(4096);
    // SAFETY: a kernel that knows no such advice does nothing.
    unsafe { libc::madvise(memory.base().cast(), memory.bytes(), 0x7fff) == 0 }
}

/// A child that drops its copy of the port must not say that its parent has stopped.
#[test]
fn a_forked_child_does_not_speak_for_its_parent() {
    let mut pair = Pair::new("shared");
    assert_eq!(pair.worker.ask("fork and drop"), "dropped");
    let lane = pair.lane;
    for _ in 0..100 {
        pair.side.poll();
    }
    assert_eq!(pair.side.down(lane), None);
    pair.worker.ask(&format!("push {} 5", hex(pair.key.bytes())));
    pair.side.wait("a write after the fork", |side| side.events.contains(&Event::Arrived { lane, imm: 5 }));
    pair.side.port.close(lane);
    pair.side.wait("the end", |side| side.down(lane) == Some(DownCause::ClosedHere));
}

/// The peer executes another program: its sockets close, its process lives, and that is no proof.
#[test]
fn a_peer_that_executes_something_else_is_not_dead() {
    let mut pair = Pair::new("shared");
    pair.worker.tell("exec");
    let lane = pair.lane;
    let begun = Instant::now();
    while pair.side.port.post(lane, &[Op::notify(1)]) != Err(Error::LaneDown { lane }) {
        pair.side.poll();
        assert!(begun.elapsed() < common::PATIENCE, "waited for the socket's end");
    }
    pair.stays_not_down();
    pair.worker.kill();
    pair.side.wait("the end", |side| side.down(lane).is_some());
    assert_eq!(pair.side.down(lane), Some(DownCause::PeerDied));
}

/// Eight processes on whatever processors there are, each asleep whenever it has nothing to do.
#[test]
fn eight_processes_sleep_and_wake() {
    const ROUNDS: u32 = 100;
    let mut side = Side::open(options());
    let mut peers: Vec<(Worker, LaneId)> = (0..8)
        .map(|_| {
            let mut worker = Worker::spawn("shared");
            let (lane, _) = worker.meet(&mut side);
            worker.ask(&format!("echo {ROUNDS}"));
            (worker, lane)
        })
        .collect();
    let begun = Instant::now();
    for round in 0..ROUNDS {
        for (_, lane) in &peers {
            assert_eq!(side.port.post(*lane, &[Op::notify(round)]).map(|posted| posted.ops), Ok(1));
        }
        let expected = round as usize + 1;
        side.wait("all echoes", |side| peers.iter().all(|(_, lane)| side.arrived(*lane) == expected));
        assert!(begun.elapsed() < 2 * common::PATIENCE, "{round} rounds are too slow");
    }
    let counters = side.port.counters();
    assert!(counters.wakes_sent > 0 && counters.wakes_received > 0, "somebody has slept: {counters:?}");
    for (worker, _) in &mut peers {
        worker.hear_until("echoed");
    }
}

/// What a worker runs; it does nothing as a test of its own.
#[test]
fn worker() {
    if let Ok(kind) = std::env::var(ENVIRONMENT) {
        Work::new(&kind).run();
    }
}

/// A worker and this process, connected.
struct Pair {
    side: Side,
    worker: Worker,
    lane: LaneId,
    attached: Attached,
    memory: Memory,
    local: LocalId,
    key: RemoteKey,
}

impl Pair {
    fn new(kind: &str) -> Self {
        let mut side = Side::open(options());
        let memory = memory(kind);
        let (local, key) = side.port.register(&memory).expect("memory can be registered");
        let mut worker = Worker::spawn(kind);
        let (lane, peer_key) = worker.meet(&mut side);
        let mut attached = side.port.attach(lane, &peer_key).expect("the worker's key");
        // A mapping that is held would keep the lane from ending.
        attached.mapping = None;
        Self { side, worker, lane, attached, memory, local, key }
    }

    fn post(&mut self, ops: &[Op<'_>]) {
        assert_eq!(self.side.port.post(self.lane, ops).map(|posted| posted.ops), Ok(ops.len()));
    }

    /// Grants the worker the whole memory, as one page.
    fn grant(&mut self, index: u32) {
        let page_bytes = BYTES as u64;
        let layout = PageLayout { offset: 0, stride_bytes: page_bytes, page_bytes, pages: 1 };
        let grant = Grant {
            id: GrantId::new(index, 0),
            peer: PeerId(0),
            access: Access::Write,
            buffers: &[GrantedBuffer { region: self.local, layout }],
            pages: &[0],
        };
        self.side.port.grant(&grant).expect("the page lies in the region");
    }

    fn stays_not_down(&mut self) {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(100) {
            self.side.sleep(Duration::from_millis(10));
            self.side.poll();
            assert_eq!(self.side.down(self.lane), None);
        }
    }
}

/// Another process of this test binary, as its parent sees it.
struct Worker {
    process: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl Worker {
    fn spawn(kind: &str) -> Self {
        let mut process = this_binary()
            .args(["worker", "--exact", "--nocapture", "--test-threads=1"])
            .env(ENVIRONMENT, kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this binary can be run again");
        let input = process.stdin.take().expect("a pipe");
        let output = BufReader::new(process.stdout.take().expect("a pipe"));
        let (sender, answers) = channel();
        // The test harness prints between the answers, hence the mark. The thread ends with the worker's output.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, answer)) = line.split_once(MARK)
                    && sender.send(answer.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self { process, input, answers }
    }

    /// Connects it with a port of this process; the lane, and the key of the worker's memory.
    fn meet(&mut self, side: &mut Side) -> (LaneId, RemoteKey) {
        let (lane, address) = side.open_lane();
        let answer = self.ask(&format!("meet {}", hex(address.bytes())));
        let (peer, key) = answer.split_once(' ').expect("an address and a key");
        let peer = LaneAddress::new(&bytes(peer)).expect("the worker's address");
        side.port.connect(lane, &peer, &tags(0)).expect("a fresh lane connects");
        side.wait("a worker to be connected", |side| side.is_up(lane));
        (lane, RemoteKey::new(&bytes(key)).expect("the worker's key"))
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.input, "{what}").expect("the worker reads");
    }

    fn ask(&mut self, what: &str) -> String {
        self.tell(what);
        self.answer()
    }

    fn answer(&mut self) -> String {
        self.answers.recv_timeout(common::PATIENCE).expect("the worker answers in time")
    }

    fn hear_until(&mut self, what: &str) {
        while self.answer() != what {}
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("the worker has not been waited for");
    }

    /// Stops it; returns when its last thread stands still, which is some time after the signal was sent.
    fn stop(&self) {
        self.signal(Signal::STOP);
        let pid = Pid::from_child(&self.process);
        let status = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED);
        let (_, status) = status.expect("the worker is a child").expect("a change is waited for");
        assert!(status.stopped(), "the worker has stopped: {status:?}");
    }

    fn kill(&mut self) {
        self.process.kill().expect("a child can be killed");
        self.process.wait().expect("a killed child can be waited for");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Another process of this test binary, as it sees itself.
struct Work {
    side: Side,
    memory: Memory,
    local: LocalId,
    key: RemoteKey,
    lane: LaneId,
}

impl Work {
    fn new(kind: &str) -> Self {
        let mut side = Side::open(options());
        let memory = memory(kind);
        let (local, key) = side.port.register(&memory).expect("memory can be registered");
        Self { side, memory, local, key, lane: LaneId(0) }
    }

    /// Does as it is told until the pipe ends.
    fn run(mut self) {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        loop {
            match lines.recv_timeout(Duration::from_millis(1)) {
                Ok(line) => self.obey(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.side.poll();
        }
    }

    fn obey(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["meet", address] => {
                let (lane, ours) = self.side.open_lane();
                let address = LaneAddress::new(&bytes(address)).expect("the parent's address");
                self.side.port.connect(lane, &address, &tags(1)).expect("a fresh lane connects");
                self.lane = lane;
                answer(&format!("{} {}", hex(ours.bytes()), hex(self.key.bytes())));
                self.side.wait("the parent", |side| side.is_up(lane));
                // The region of the parent is mapped from now on, whatever comes.
                self.side.poll();
            }
            ["checksum"] => {
                let lane = self.lane;
                self.side.wait("the parent's write", |side| side.arrived(lane) > 0);
                answer(&sum(&content(&self.memory)).to_string());
            }
            ["invert"] => {
                let inverted: Vec<u8> = content(&self.memory).iter().map(|byte| !byte).collect();
                self.memory.write(0, &inverted).expect("a whole memory can be written");
                answer("inverted");
            }
            ["push", key, imm] => {
                let op = self.write_to(key, imm.parse().expect("a number"));
                self.side.port.post(self.lane, &[op]).expect("the lane is up");
                answer("pushed");
            }
            ["flood", key] => {
                answer("flooding");
                for at in 0u32.. {
                    self.memory.fill(0, BYTES, at as u8).expect("a whole memory can be filled");
                    if self.side.down(self.lane).is_some() {
                        break;
                    }
                    let op = self.write_to(key, at);
                    let _ = self.side.port.post(self.lane, &[op]);
                    self.side.poll();
                }
            }
            ["fork"] => {
                // SAFETY: the child only sleeps, with a call that a forked child of several threads may make.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    loop {
                        // SAFETY: as above.
                        unsafe { libc::pause() };
                    }
                }
                answer(&child.to_string());
            }
            ["fork", "and", "drop"] => {
                // SAFETY: the child drops a port, which closes and frees; no other thread of this process allocates
                // at this moment, since the one that reads the pipe waits for its next line.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    drop(std::mem::replace(&mut self.side, Side::open(ShmOptions::default())));
                    // SAFETY: ends the child without running what its parent has registered for the end.
                    unsafe { libc::_exit(0) };
                }
                let child = Pid::from_raw(child).expect("a process number");
                let status = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
                let status = status.expect("the child is waited for").expect("the child has ended").1;
                answer(if status.exit_status() == Some(0) { "dropped" } else { "failed" });
            }
            ["become", "undumpable"] => {
                rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
                    .expect("every process may give up being dumped");
                answer("undumpable");
            }
            ["exec"] => {
                let error = Command::new("sleep").arg("100").exec();
                panic!("sleep cannot be executed: {error}");
            }
            ["echo", rounds] => {
                answer("ready");
                let rounds: usize = rounds.parse().expect("a number");
                let lane = self.lane;
                for round in 0..rounds {
                    self.side.wait("the next round", |side| side.arrived(lane) > round);
                    self.side.port.post(lane, &[Op::notify(round as u32)]).expect("the lane is up");
                }
                answer("echoed");
            }
            _ => panic!("told to {line:?}"),
        }
    }

    fn write_to(&mut self, key: &str, imm: u32) -> Op<'static> {
        let key = RemoteKey::new(&bytes(key)).expect("the parent's key");
        let remote = match self.side.port.attach(self.lane, &key) {
            Ok(attached) => attached.id,
            Err(Error::LaneDown { .. }) => crossdock_transport::RemoteId(0),
            Err(error) => panic!("the parent's key: {error}"),
        };
        Op { imm: Some(imm), ..write(self.local, remote, BYTES as u64) }
    }
}

/// Runs something on a thread that may not reach into every process, as root's threads may; capabilities are a
/// thread's own.
fn without_ptrace<T: Send>(run: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let refused = |errno| format!("CAP_SYS_PTRACE cannot be given up: {errno}");
            let mut sets = rustix::thread::capabilities(None).map_err(refused)?;
            sets.effective.remove(CapabilitySet::SYS_PTRACE);
            rustix::thread::set_capabilities(None, sets).map_err(refused)?;
            run()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn options() -> ShmOptions {
    // With a helper, the fork of a process with copy threads is part of the tests.
    ShmOptions { allow_ptrace: true, copy_threads: 2, ..ShmOptions::default() }
}

fn memory(kind: &str) -> Memory {
    match kind {
        "shared" => shared(BYTES),
        "private" => private(BYTES),
        _ => panic!("no kind of memory is named {kind}"),
    }
}

/// The kinds of memory that this system can move.
fn kinds() -> &'static [&'static str] {
    if private_memory_can_be_reached() { &["shared", "private"] } else { &["shared"] }
}

fn answer(what: &str) {
    println!("\n{MARK}{what}");
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex digits");
    hex.as_bytes().chunks(2).map(byte).collect()
}

const BYTES: usize = 300_000;
const ENVIRONMENT: &str = "CROSSDOCK_SHM_WORKER";
const MARK: &str = "shm-worker ";
