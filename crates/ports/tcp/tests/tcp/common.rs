//! Two ports in one process, connected.

use std::time::{Duration, Instant};

use crossdock_memory::{Memory, PageLayout};
use crossdock_tcp::{TcpOptions, TcpPort};
use crossdock_transport::{
    Access, Arm, Attached, Direction, DownCause, Event, Events, Grant, GrantId, GrantedBuffer, LaneAddress,
    LaneId, LaneTags, LocalId, Op, PeerId, Port, RemoteKey, Shape, Token,
};
use rustix::event::{PollFd, PollFlags, Timespec};

pub const PEER: PeerId = PeerId(7);
pub const TAG_A: [u8; 32] = [0xA1; 32];
pub const TAG_B: [u8; 32] = [0xB2; 32];

/// One port with one lane and one region, and what it has said.
pub struct End {
    pub port: TcpPort,
    pub lane: LaneId,
    pub address: LaneAddress,
    pub memory: Memory,
    pub region: LocalId,
    pub key: RemoteKey,
    pub events: Vec<Event>,
    /// How many events one poll may bring.
    pub poll_room: usize,
}

impl End {
    pub fn open(options: TcpOptions, bytes: usize) -> Self {
        let mut port = TcpPort::open(options).unwrap();
        let memory = Memory::allocate(bytes, &Default::default()).unwrap();
        let (region, key) = port.register(&memory).unwrap();
        let (lane, address) = port.open_lane(PEER).unwrap();
        Self { port, lane, address, memory, region, key, events: Vec::new(), poll_room: 64 }
    }

    pub fn poll(&mut self) {
        let mut events = Events::with_capacity(self.poll_room);
        self.port.poll(&mut events);
        self.events.extend(events.drain());
    }

    /// Fills the memory with bytes that differ from place to place.
    pub fn fill(&self, seed: u64) -> Vec<u8> {
        let bytes = pattern(seed, self.memory.bytes());
        self.memory.write(0, &bytes).unwrap();
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.bytes()];
        self.memory.read(0, &mut bytes).unwrap();
        bytes
    }

    /// Grants every page of the region.
    pub fn grant_all(&mut self, id: GrantId, access: Access, page_bytes: u64) {
        let pages = (self.memory.bytes() as u64 / page_bytes) as u32;
        self.grant_pages(id, access, page_bytes, &(0..pages).collect::<Vec<_>>());
    }

    pub fn grant_pages(&mut self, id: GrantId, access: Access, page_bytes: u64, pages: &[u32]) {
        let layout = PageLayout::dense(0, page_bytes, (self.memory.bytes() as u64 / page_bytes) as u32);
        let buffers = [GrantedBuffer { region: self.region, layout }];
        self.port.grant(&Grant { id, peer: PEER, access, buffers: &buffers, pages }).unwrap();
    }

    pub fn down(&self) -> Option<DownCause> {
        self.events.iter().find_map(|event| match event {
            Event::Down { lane, cause } if *lane == self.lane => Some(*cause),
            _ => None,
        })
    }

    pub fn arrived(&self) -> Vec<u32> {
        let imm = |event: &Event| match event {
            Event::Arrived { imm, .. } => Some(*imm),
            _ => None,
        };
        self.events.iter().filter_map(imm).collect()
    }

    pub fn done(&self) -> Vec<u64> {
        let token = |event: &Event| match event {
            Event::Done { token, .. } => Some(token.0),
            _ => None,
        };
        self.events.iter().filter_map(token).collect()
    }
}

/// Two ends; `a` has attached the region of `b` and the other way round.
pub struct Pair {
    pub a: End,
    pub b: End,
    pub b_at_a: Attached,
    pub a_at_b: Attached,
}

impl Pair {
    pub fn new(bytes: usize) -> Self {
        Self::with(|_| {}, bytes)
    }

    pub fn with(adjust: impl Fn(&mut TcpOptions), bytes: usize) -> Self {
        let mut options = TcpOptions::default();
        adjust(&mut options);
        let (mut a, mut b) = (End::open(options.clone(), bytes), End::open(options, bytes));
        a.port.connect(a.lane, &b.address, &LaneTags { ours: TAG_A, theirs: TAG_B }).unwrap();
        b.port.connect(b.lane, &a.address, &LaneTags { ours: TAG_B, theirs: TAG_A }).unwrap();
        until("both ends are up", || {
            a.poll();
            b.poll();
            !a.events.is_empty() && !b.events.is_empty()
        });
        assert_eq!(a.events, [Event::Up { lane: a.lane }]);
        assert_eq!(b.events, [Event::Up { lane: b.lane }]);
        a.events.clear();
        b.events.clear();
        let b_at_a = a.port.attach(a.lane, &b.key).unwrap();
        let a_at_b = b.port.attach(b.lane, &a.key).unwrap();
        Self { a, b, b_at_a, a_at_b }
    }

    pub fn poll(&mut self) {
        self.a.poll();
        self.b.poll();
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        until(what, || {
            self.poll();
            done(self)
        });
    }

    /// Posts from `a` until everything is taken, polling both ends in between.
    pub fn post(&mut self, ops: &[Op<'_>]) {
        let mut rest: Vec<Op<'_>> = ops.to_vec();
        until("all ops are taken", || {
            let posted = self.a.port.post(self.a.lane, &rest).unwrap();
            rest.drain(..posted.ops);
            if posted.within > 0 {
                rest[0] = rest[0].advance(posted.within);
            }
            self.poll();
            rest.is_empty()
        });
    }

    /// A span between the same offsets of both regions, posted at `a`.
    pub fn span(&self, direction: Direction, grant: GrantId, offsets: (u64, u64), bytes: u64) -> Op<'static> {
        Op {
            direction,
            grant,
            shape: Shape::Span {
                local: self.a.region,
                local_offset: offsets.0,
                remote: self.b_at_a.id,
                remote_offset: offsets.1,
                bytes,
            },
            imm: None,
            token: None,
        }
    }

    pub fn pages<'l>(
        &self,
        direction: Direction,
        grant: GrantId,
        page_bytes: u64,
        local_pages: &'l [u32],
        remote_pages: &'l [u32],
    ) -> Op<'l> {
        Op {
            direction,
            grant,
            shape: Shape::Pages {
                local: self.a.region,
                local_offset: 0,
                local_stride_bytes: page_bytes,
                local_pages,
                remote: self.b_at_a.id,
                remote_offset: 0,
                remote_stride_bytes: page_bytes,
                remote_pages,
                piece_bytes: page_bytes,
            },
            imm: None,
            token: None,
        }
    }
}

/// Adds an immediate and a token.
pub fn told<'a>(op: Op<'a>, imm: Option<u32>, token: Option<u64>) -> Op<'a> {
    Op { imm, token: token.map(Token), ..op }
}

/// Calls `step` until it is true; fails after a while.
pub fn until(what: &str, mut step: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !step() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// Sleeps as an owner of the port would. False when nothing woke it in time.
pub fn sleep(port: &mut TcpPort, limit: Duration) -> bool {
    match port.arm() {
        Arm::Ready => true,
        Arm::Spin => panic!("this port can wake its owner"),
        Arm::Sleep(fd) => {
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            let limit = Timespec::try_from(limit).unwrap();
            rustix::event::poll(&mut fds, Some(&limit)).unwrap() > 0
        }
    }
}

pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..bytes.div_ceil(8)).flat_map(|_| step().to_le_bytes()).take(bytes).collect()
}

/// Numbers below `n` in an order without order.
pub fn shuffled(seed: u64, n: u32) -> Vec<u32> {
    let keys = pattern(seed, n as usize * 8);
    let key = |&i: &u32| u64::from_le_bytes(keys[i as usize * 8..][..8].try_into().unwrap());
    let mut numbers: Vec<u32> = (0..n).collect();
    numbers.sort_by_key(key);
    numbers
}
