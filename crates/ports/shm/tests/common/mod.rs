//! What the tests share: a port with its events, and sleeping on it.

#![allow(dead_code)]

use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_shm::process_memory::PeerProcess;
use crossdock_shm::{ShmOptions, ShmPort};
use crossdock_transport::{
    Arm, Direction, DownCause, Event, Events, GrantId, LaneAddress, LaneId, LaneTags, LocalId, Op, PeerId,
    Port, RemoteId, Shape,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A port, and all that it has reported.
pub struct Side {
    pub port: ShmPort,
    pub events: Vec<Event>,
    buffer: Events,
}

impl Side {
    pub fn open(options: ShmOptions) -> Self {
        let port = ShmPort::open(options).expect("a port can be opened");
        Self { port, events: Vec::new(), buffer: Events::with_capacity(64) }
    }

    pub fn open_lane(&mut self) -> (LaneId, LaneAddress) {
        self.port.open_lane(PeerId(0)).expect("a lane can be opened")
    }

    pub fn poll(&mut self) {
        self.port.poll(&mut self.buffer);
        self.events.extend(self.buffer.drain());
    }

    /// Sleeps until there is something to poll; whether there is before the time is over.
    pub fn sleep(&mut self, time: Duration) -> bool {
        match self.port.arm() {
            Arm::Ready | Arm::Spin => true,
            Arm::Sleep(fd) => {
                let time = Timespec::try_from(time).expect("a short time");
                poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time)).is_ok_and(|ready| ready > 0)
            }
        }
    }

    pub fn is_up(&self, lane: LaneId) -> bool {
        self.events.contains(&Event::Up { lane })
    }

    pub fn down(&self, lane: LaneId) -> Option<DownCause> {
        let mut causes = self.events.iter().filter_map(|event| match event {
            Event::Down { lane: ended, cause } if *ended == lane => Some(*cause),
            _ => None,
        });
        let first = causes.next();
        assert_eq!(causes.next(), None, "lane {} went down twice", lane.0);
        first
    }

    pub fn arrived(&self, lane: LaneId) -> usize {
        self.events
            .iter()
            .filter(|event| matches!(event, Event::Arrived { lane: on, .. } if *on == lane))
            .count()
    }

    /// Polls, asleep in between, until something is so.
    #[track_caller]
    pub fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "waited for {what}; heard {:?}", self.events);
            self.sleep(Duration::from_millis(100));
            self.poll();
        }
    }
}

/// Polls both until something is so.
#[track_caller]
pub fn wait(sides: [&mut Side; 2], what: &str, done: impl Fn(&Side, &Side) -> bool) {
    let begun = Instant::now();
    let [one, other] = sides;
    while !done(one, other) {
        assert!(
            begun.elapsed() < PATIENCE,
            "waited for {what}; heard {:?} and {:?}",
            one.events,
            other.events
        );
        one.poll();
        other.poll();
        std::thread::yield_now();
    }
}

/// Polls both for a while.
pub fn settle(sides: [&mut Side; 2]) {
    let begun = Instant::now();
    let [one, other] = sides;
    // By the clock, and by turns where the processors are others' for most of that time.
    for _ in (0..).take_while(|turns| *turns < 30 || begun.elapsed() < Duration::from_millis(50)) {
        one.poll();
        other.poll();
        std::thread::yield_now();
    }
}

/// Connects two ports of this process.
pub fn connect(one: &mut Side, other: &mut Side) -> [LaneId; 2] {
    let ((here, here_address), (there, there_address)) = (one.open_lane(), other.open_lane());
    one.port.connect(here, &there_address, &tags(0)).expect("a fresh lane connects");
    other.port.connect(there, &here_address, &tags(1)).expect("a fresh lane connects");
    wait([one, other], "both ends to be up", |one, other| one.is_up(here) && other.is_up(there));
    [here, there]
}

pub fn tags(side: u8) -> LaneTags {
    LaneTags { ours: [side; 32], theirs: [1 - side; 32] }
}

pub fn shared(bytes: usize) -> Memory {
    Memory::allocate(bytes, &AllocateOptions::default()).expect("memory can be allocated")
}

/// Memory of another origin.
// A suppression of tests/lsan-suppressions.txt names it.
#[inline(never)]
pub fn private(bytes: usize) -> Memory {
    let leaked = Box::leak(vec![0u8; bytes].into_boxed_slice());
    // SAFETY: the bytes are leaked, so they stay mapped, and no reference to them is kept.
    unsafe { Memory::from_raw(leaked.as_mut_ptr(), bytes) }.expect("memory of some bytes")
}

/// Whether this system lets a process into another one's memory; says so if not.
pub fn private_memory_can_be_reached() -> bool {
    match PeerProcess::new(rustix::process::getpid()).probe() {
        Ok(()) => true,
        Err(why) => {
            eprintln!("skipped: {why}");
            false
        }
    }
}

pub fn write(local: LocalId, remote: RemoteId, bytes: u64) -> Op<'static> {
    Op {
        direction: Direction::Write,
        grant: GrantId::NONE,
        shape: Shape::Span { local, local_offset: 0, remote, remote_offset: 0, bytes },
        imm: None,
        token: None,
    }
}

pub fn content(memory: &Memory) -> Vec<u8> {
    let mut content = vec![0; memory.bytes()];
    memory.read(0, &mut content).expect("a whole memory can be read");
    content
}

pub const PATIENCE: Duration = Duration::from_secs(10);
