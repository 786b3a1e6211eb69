//! What every case stands on: ports with their lanes, the check of every lane's events, waiting with a limit.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crossdock_memory::{Memory, PageLayout};

use super::{Rig, Rng};
use crate::{
    Access, Direction, DownCause, Error, Event, Events, Grant, GrantId, GrantedBuffer, LaneAddress, LaneId,
    LaneTags, LocalId, Op, PeerId, Port, Posted, RemoteId, RemoteKey, Shape, Token,
};

/// Some ports, and all that was heard from them.
pub(super) struct Stage<'r> {
    pub rig: &'r mut dyn Rig,
    pub rng: Rng,
    pub patience: Duration,
    pub sides: Vec<Side>,
}

/// One port of the stage.
pub(super) struct Side {
    /// `None` after the case dropped it.
    pub port: Option<Box<dyn Port>>,
    /// Whether [`Stage::turn`] leaves it alone.
    pub paused: bool,
    events: Events,
    lanes: HashMap<LaneId, LaneLog>,
}

/// What was heard of one lane.
#[derive(Debug, Default)]
pub(super) struct LaneLog {
    pub up: bool,
    pub down: Option<DownCause>,
    pub done: Vec<Token>,
    pub arrived: Vec<u32>,
    /// Tokens that were accepted and not yet heard of.
    pub open_tokens: VecDeque<Token>,
}

/// Two sides with a lane, and on each side a region that the other may write and read.
pub(super) struct Link {
    pub sides: [usize; 2],
    pub lanes: [LaneId; 2],
    pub regions: [Region; 2],
    /// By side: the other side's region, attached.
    pub remotes: [RemoteId; 2],
    /// The first of the two grant indices on either side.
    pub base: u32,
}

/// Ops on their way into a port, which takes them as it likes.
pub(super) struct Feed<'a> {
    ops: Vec<Op<'a>>,
    taken: usize,
}

/// Registered memory.
pub(super) struct Region {
    pub memory: Memory,
    pub local: LocalId,
    pub key: RemoteKey,
}

/// The index, from a [`Link`]'s base, of the grant under which its regions may be written.
pub(super) const WRITES: u32 = 0;
/// The same for reading.
pub(super) const READS: u32 = 1;

impl<'r> Stage<'r> {
    pub fn new(rig: &'r mut dyn Rig, ports: usize) -> Self {
        Self::with_events(rig, ports, 64)
    }

    /// A stage whose event buffers hold `capacity` events.
    pub fn with_events(rig: &'r mut dyn Rig, ports: usize, capacity: usize) -> Self {
        let rng = Rng::new(rig.seed());
        let sides = rig.ports(ports).into_iter().map(|port| Side {
            port: Some(port),
            paused: false,
            events: Events::with_capacity(capacity),
            lanes: HashMap::new(),
        });
        let sides: Vec<Side> = sides.collect();
        assert_eq!(sides.len(), ports, "the rig made another number of ports than asked for");
        let patience = rig.patience();
        Self { rig, rng, patience, sides }
    }

    pub fn port(&mut self, side: usize) -> &mut dyn Port {
        &mut **self.sides[side].port.as_mut().expect("the port was dropped by the case")
    }

    /// Whether an immediate stands for all earlier ops of its lane.
    pub fn ordered(&mut self, side: usize) -> bool {
        self.port(side).info().ordered
    }

    pub fn log(&self, side: usize, lane: LaneId) -> &LaneLog {
        &self.sides[side].lanes[&lane]
    }

    pub fn open(&mut self, side: usize, peer: usize) -> (LaneId, LaneAddress) {
        let (lane, address) = self.port(side).open_lane(peer_id(peer)).expect("a lane can be opened");
        assert!(address.bytes().len() <= LaneAddress::MAX_BYTES);
        let earlier = self.sides[side].lanes.insert(lane, LaneLog::default());
        assert!(earlier.is_none(), "{lane:?} was used before");
        (lane, address)
    }

    /// A lane between two sides, up on both.
    pub fn connect(&mut self, sides: [usize; 2]) -> [LaneId; 2] {
        let [a, b] = sides;
        let (at_a, address_a) = self.open(a, b);
        let (at_b, address_b) = self.open(b, a);
        let (tags_a, tags_b) = self.tags();
        self.port(a).connect(at_a, &address_b, &tags_a).expect("a fresh lane connects");
        self.port(b).connect(at_b, &address_a, &tags_b).expect("a fresh lane connects");
        self.wait("both ends of a lane to be up", |s| s.log(a, at_a).up && s.log(b, at_b).up);
        [at_a, at_b]
    }

    /// Tags for the two ends of a lane.
    pub fn tags(&mut self) -> (LaneTags, LaneTags) {
        let (mut one, mut other) = ([0; 32], [0; 32]);
        self.rng.fill(&mut one);
        self.rng.fill(&mut other);
        (LaneTags { ours: one, theirs: other }, LaneTags { ours: other, theirs: one })
    }

    /// Registers memory that is full of random bytes.
    pub fn region(&mut self, side: usize, bytes: usize) -> Region {
        let memory = self.rig.memory(bytes);
        let mut content = vec![0; bytes];
        self.rng.fill(&mut content);
        memory.write(0, &content).expect("the rig's memory is as long as asked for");
        let (local, key) = self.port(side).register(&memory).expect("the rig's memory can be registered");
        assert!(key.bytes().len() <= RemoteKey::MAX_BYTES);
        Region { memory, local, key }
    }

    pub fn attach(&mut self, side: usize, lane: LaneId, key: &RemoteKey) -> RemoteId {
        let begun = Instant::now();
        loop {
            match self.port(side).attach(lane, key) {
                Ok(attached) => return attached.id,
                Err(Error::NotYet) if begun.elapsed() < self.patience => self.turn(),
                Err(error) => panic!("attach after {:?}: {error}", begun.elapsed()),
            }
        }
    }

    /// Grants a whole region, as one page.
    pub fn grant_all(&mut self, side: usize, region: &Region, id: GrantId, to: usize, access: Access) {
        let bytes = region.memory.bytes() as u64;
        let layout = PageLayout { offset: 0, stride_bytes: bytes, page_bytes: bytes, pages: 1 };
        let buffers = [GrantedBuffer { region: region.local, layout }];
        let grant = Grant { id, peer: peer_id(to), access, buffers: &buffers, pages: &[0] };
        self.port(side).grant(&grant).expect("a whole region can be granted");
    }

    /// A lane between the first two sides, each with a region of `bytes` bytes.
    pub fn link(&mut self, bytes: usize) -> Link {
        self.link_between([0, 1], bytes, 0)
    }

    /// As [`link`](Self::link); `base` keeps the grants of several links apart.
    pub fn link_between(&mut self, sides: [usize; 2], bytes: usize, base: u32) -> Link {
        let lanes = self.connect(sides);
        let regions = [self.region(sides[0], bytes), self.region(sides[1], bytes)];
        for (own, other) in [(0, 1), (1, 0)] {
            let (write, read) = (GrantId::new(base + WRITES, 0), GrantId::new(base + READS, 0));
            self.grant_all(sides[own], &regions[own], write, sides[other], Access::Write);
            self.grant_all(sides[own], &regions[own], read, sides[other], Access::Read);
        }
        let remotes = [
            self.attach(sides[0], lanes[0], &regions[1].key),
            self.attach(sides[1], lanes[1], &regions[0].key),
        ];
        Link { sides, lanes, regions, remotes, base }
    }

    /// Offers ops once, and notes the tokens of those that were taken.
    pub fn post(&mut self, side: usize, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted, Error> {
        let posted = self.port(side).post(lane, ops)?;
        assert!(posted.ops <= ops.len(), "{posted:?} of {} ops", ops.len());
        match ops.get(posted.ops).map(|next| next.shape) {
            None => assert_eq!(posted.within, 0, "a part of an op that was not offered"),
            Some(Shape::Span { bytes, .. }) => assert!(posted.within <= bytes),
            Some(Shape::Pages { local_pages, .. }) => assert!(posted.within <= local_pages.len() as u64),
        }
        self.expect_tokens(side, lane, ops[..posted.ops].iter().filter_map(|op| op.token));
        Ok(posted)
    }

    /// From now on these tokens are due.
    pub fn expect_tokens(&mut self, side: usize, lane: LaneId, tokens: impl Iterator<Item = Token>) {
        let log = self.sides[side].lanes.get_mut(&lane).expect("a lane of this stage");
        log.open_tokens.extend(tokens);
    }

    /// Offers ops until all are taken.
    #[track_caller]
    pub fn post_all(&mut self, side: usize, lane: LaneId, ops: &[Op<'_>]) {
        let begun = Instant::now();
        let mut feed = Feed::new(ops);
        while !feed.offer(self, side, lane, usize::MAX) {
            self.turn();
            assert!(
                begun.elapsed() < self.patience,
                "waited for {} ops, {} were taken",
                ops.len(),
                feed.taken()
            );
        }
    }

    /// Posts writes from side `from` of the link and waits until their bytes have landed. Gives each op its
    /// immediate where the port is unordered, else only the last.
    #[track_caller]
    pub fn write(&mut self, link: &Link, from: usize, ops: &[Op<'_>]) {
        let [side, peer] = [link.sides[from], link.sides[1 - from]];
        let ordered = self.ordered(side);
        let mut ops = ops.to_vec();
        let last = ops.len() - 1;
        for (at, op) in ops.iter_mut().enumerate() {
            op.imm = (at == last || !ordered).then_some(at as u32);
        }
        let expected = ops.iter().filter(|op| op.imm.is_some()).count();
        let before = self.log(peer, link.lanes[1 - from]).arrived.len();
        self.post_all(side, link.lanes[from], &ops);
        self.wait("the immediates of writes", |s| {
            s.log(peer, link.lanes[1 - from]).arrived.len() == before + expected
        });
    }

    /// Posts reads into side `into` of the link and waits until their bytes have arrived.
    #[track_caller]
    pub fn read(&mut self, link: &Link, into: usize, ops: &[Op<'_>]) {
        let side = link.sides[into];
        let mut ops = ops.to_vec();
        let token = Token(self.rng.word());
        ops.last_mut().expect("some reads").token = Some(token);
        self.post_all(side, link.lanes[into], &ops);
        self.wait("reads to be done", |s| s.log(side, link.lanes[into]).done.last() == Some(&token));
    }

    /// Polls one port, and notes what it says.
    pub fn poll(&mut self, side: usize) -> Vec<Event> {
        let Side { port, events, .. } = &mut self.sides[side];
        let Some(port) = port else { return Vec::new() };
        port.poll(events);
        let fresh: Vec<Event> = events.drain().collect();
        self.note(side, &fresh);
        fresh
    }

    /// Notes what a port has said.
    pub fn note(&mut self, side: usize, events: &[Event]) {
        for event in events {
            note(side, &mut self.sides[side].lanes, event);
        }
    }

    /// Polls every port that is not paused, and lets time pass.
    pub fn turn(&mut self) {
        for side in 0..self.sides.len() {
            if !self.sides[side].paused {
                self.poll(side);
            }
        }
        self.rig.pass();
    }

    #[track_caller]
    pub fn wait(&mut self, what: &str, mut until: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !until(self) {
            if begun.elapsed() > self.patience {
                let lanes: Vec<String> = self.sides.iter().map(|side| format!("{:?}", side.lanes)).collect();
                panic!("waited {:?} for {what}; heard of: {}", self.patience, lanes.join(" | "));
            }
            self.turn();
        }
    }

    /// Lets so much time pass that what was on its way has come.
    pub fn settle(&mut self) {
        let begun = Instant::now();
        let mut turns = 0;
        while turns < SETTLE_TURNS || begun.elapsed() < SETTLE {
            self.turn();
            turns += 1;
        }
    }

    /// Closes a lane at one side and waits until both ends are down.
    #[track_caller]
    pub fn close(&mut self, link: &Link, at: usize) {
        self.port(link.sides[at]).close(link.lanes[at]);
        self.wait("both ends of a closed lane to be down", |s| {
            (0..2).all(|end| s.log(link.sides[end], link.lanes[end]).down.is_some())
        });
    }

    /// Closes whatever is open, and sees that every lane ends once.
    #[track_caller]
    pub fn end(mut self) {
        for side in 0..self.sides.len() {
            self.sides[side].paused = false;
            if self.sides[side].port.is_none() {
                continue;
            }
            let open = self.sides[side].lanes.iter().filter(|(_, log)| log.down.is_none());
            let mut open: Vec<LaneId> = open.map(|(&lane, _)| lane).collect();
            open.sort();
            for lane in open {
                self.port(side).close(lane);
            }
        }
        self.wait("every lane to be down", |s| {
            let living = s.sides.iter().filter(|side| side.port.is_some());
            living.flat_map(|side| side.lanes.values()).all(|log| log.down.is_some())
        });
        self.settle();
    }
}

impl Link {
    /// Under which grant ops of this link go.
    pub fn grant(&self, direction: Direction) -> GrantId {
        GrantId::new(self.base + if direction == Direction::Write { WRITES } else { READS }, 0)
    }

    /// A span between the two regions, posted by side `by`.
    pub fn span(&self, by: usize, direction: Direction, local: u64, remote: u64, bytes: u64) -> Op<'static> {
        Op {
            direction,
            grant: self.grant(direction),
            shape: Shape::Span {
                local: self.regions[by].local,
                local_offset: local,
                remote: self.remotes[by],
                remote_offset: remote,
                bytes,
            },
            imm: None,
            token: None,
        }
    }

    /// A write of side `by`.
    pub fn write(&self, by: usize, local: u64, remote: u64, bytes: u64) -> Op<'static> {
        self.span(by, Direction::Write, local, remote, bytes)
    }

    /// A read of side `by`.
    pub fn read(&self, by: usize, local: u64, remote: u64, bytes: u64) -> Op<'static> {
        self.span(by, Direction::Read, local, remote, bytes)
    }
}

impl<'a> Feed<'a> {
    pub fn new(ops: &[Op<'a>]) -> Self {
        Self { ops: ops.to_vec(), taken: 0 }
    }

    /// Offers up to `batch` ops once; whether none is left. What was taken of an op in parts is not offered again.
    #[track_caller]
    pub fn offer(&mut self, stage: &mut Stage<'_>, side: usize, lane: LaneId, batch: usize) -> bool {
        self.try_offer(stage, side, lane, batch).expect("good ops are taken on a lane that is up")
    }

    /// As [`offer`](Self::offer), on a lane that may be down.
    pub fn try_offer(
        &mut self,
        stage: &mut Stage<'_>,
        side: usize,
        lane: LaneId,
        batch: usize,
    ) -> Result<bool, Error> {
        let until = self.ops.len().min(self.taken.saturating_add(batch));
        if self.taken < until {
            let posted = stage.post(side, lane, &self.ops[self.taken..until])?;
            self.taken += posted.ops;
            if posted.within > 0 {
                self.ops[self.taken] = self.ops[self.taken].advance(posted.within);
            }
        }
        Ok(self.taken == self.ops.len())
    }

    /// How many ops have been taken whole.
    pub fn taken(&self) -> usize {
        self.taken
    }
}

/// The number under which all others know a side.
pub(super) fn peer_id(side: usize) -> PeerId {
    // Not the number itself, so that a port which takes one for the other is found.
    PeerId(100 + side as u32)
}

/// The content of a memory.
pub(super) fn content(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.bytes()];
    memory.read(0, &mut bytes).expect("the whole of a memory can be read");
    bytes
}

/// Compares the whole of a memory with what it should hold.
#[track_caller]
pub(super) fn assert_content(memory: &Memory, expected: &[u8], when: &str) {
    let found = content(memory);
    if found == expected {
        return;
    }
    if let Some(at) = (0..expected.len()).find(|&at| found[at] != expected[at]) {
        let wrong = (at..expected.len()).filter(|&at| found[at] != expected[at]).count();
        panic!(
            "{when}: byte {at} is {:#04x} instead of {:#04x}; {wrong} of {} bytes are wrong",
            found[at],
            expected[at],
            expected.len()
        );
    }
}

/// Does to two models of memory what an op does to the memories, by the words of its definition.
pub(super) fn apply(op: &Op<'_>, local: &mut [u8], remote: &mut [u8]) {
    let mut copy = |local_from: u64, remote_from: u64, bytes: u64| {
        let (local_from, remote_from, bytes) = (local_from as usize, remote_from as usize, bytes as usize);
        let local = &mut local[local_from..local_from + bytes];
        let remote = &mut remote[remote_from..remote_from + bytes];
        match op.direction {
            Direction::Write => remote.copy_from_slice(local),
            Direction::Read => local.copy_from_slice(remote),
        }
    };
    match op.shape {
        Shape::Span { local_offset, remote_offset, bytes, .. } => copy(local_offset, remote_offset, bytes),
        Shape::Pages {
            local_offset,
            local_stride_bytes,
            local_pages,
            remote_offset,
            remote_stride_bytes,
            remote_pages,
            piece_bytes,
            ..
        } => {
            for (&local_page, &remote_page) in local_pages.iter().zip(remote_pages) {
                copy(
                    local_offset + u64::from(local_page) * local_stride_bytes,
                    remote_offset + u64::from(remote_page) * remote_stride_bytes,
                    piece_bytes,
                );
            }
        }
    }
}

/// Checks an event against what was heard of its lane before.
fn note(side: usize, lanes: &mut HashMap<LaneId, LaneLog>, event: &Event) {
    let (Event::Up { lane }
    | Event::Done { lane, .. }
    | Event::Arrived { lane, .. }
    | Event::Down { lane, .. }) = *event;
    let log = lanes.get_mut(&lane).unwrap_or_else(|| panic!("side {side}: {event:?} of a lane never opened"));
    assert!(log.down.is_none(), "side {side}: {event:?} after {:?}", log.down);
    match *event {
        Event::Up { .. } => {
            assert!(!log.up, "side {side}: {lane:?} came up twice");
            log.up = true;
        }
        Event::Done { token, .. } => {
            assert_eq!(log.open_tokens.pop_front(), Some(token), "side {side}: {event:?} out of order");
            log.done.push(token);
        }
        Event::Arrived { imm, .. } => {
            assert!(log.up, "side {side}: {event:?} before the lane was up");
            log.arrived.push(imm);
        }
        Event::Down { cause, .. } => log.down = Some(cause),
    }
}

/// How long, and how many turns at least, what is on its way may take to come.
const SETTLE: Duration = Duration::from_millis(20);
const SETTLE_TURNS: u32 = 200;
