//! Two simulated ports with a lane, for tests that look at one rule of the fabric at a time.

use crossdock_memory::{AllocateOptions, Memory, PageLayout};
use crossdock_sim::{Fabric, FabricOptions, NodeId, OneIn, SimPort, SimPortOptions};
use crossdock_transport::{
    Access, Direction, DownCause, Error, Event, Events, Grant, GrantId, GrantedBuffer, LaneId, LaneTags,
    LocalId, Op, PeerId, Port, RemoteId, Shape, Token,
};

/// Two ports, on nodes 0 and 1, each with a region that the other may write and read.
pub struct Pair {
    pub fabric: Fabric,
    pub ports: [Option<SimPort>; 2],
    pub lanes: [LaneId; 2],
    pub memories: [Memory; 2],
    locals: [LocalId; 2],
    remotes: [RemoteId; 2],
    /// What each port has said, with the time.
    pub heard: [Vec<(u64, Event)>; 2],
}

/// Under which grant either region may be written.
pub const WRITES: GrantId = GrantId::new(1, 0);
/// Under which grant either region may be read.
pub const READS: GrantId = GrantId::new(2, 0);
pub const BYTES: usize = 64 << 10;

/// Chance without the small unkindnesses that would only make these tests longer.
pub fn plain() -> FabricOptions {
    FabricOptions {
        short_post: OneIn(0),
        short_poll: OneIn(0),
        not_yet: OneIn(0),
        note_landings: true,
        ..FabricOptions::default()
    }
}

impl Pair {
    pub fn new(seed: u64, fabric: FabricOptions, port: SimPortOptions) -> Self {
        let fabric = Fabric::new(seed, fabric);
        let mut ports = [0, 1].map(|node| fabric.port(NodeId(node), port.clone()));
        let memories = [0, 1].map(|_| Memory::allocate(BYTES, &AllocateOptions::default()).expect("memory"));
        let registered = [0, 1].map(|side| ports[side].register(&memories[side]).expect("memory registers"));
        let opened = [0, 1].map(|side| ports[side].open_lane(peer(side)).expect("a lane opens"));
        let tags = LaneTags { ours: [7; 32], theirs: [7; 32] };
        for side in [0, 1] {
            ports[side].connect(opened[side].0, &opened[1 - side].1, &tags).expect("a lane connects");
            let layout = PageLayout::dense(0, BYTES as u64, 1);
            let buffers = [GrantedBuffer { region: registered[side].0, layout }];
            for (id, access) in [(WRITES, Access::Write), (READS, Access::Read)] {
                let grant = Grant { id, peer: peer(side), access, buffers: &buffers, pages: &[0] };
                ports[side].grant(&grant).expect("a grant");
            }
        }
        let mut pair = Self {
            fabric,
            ports: ports.map(Some),
            lanes: [0, 1].map(|side| opened[side].0),
            memories,
            locals: [0, 1].map(|side| registered[side].0),
            remotes: [RemoteId(0); 2],
            heard: Default::default(),
        };
        pair.run_for(1_000_000);
        for side in [0, 1] {
            let (lane, key) = (pair.lanes[side], &registered[1 - side].1);
            pair.remotes[side] = pair.port(side).attach(lane, key).expect("the lane is up").id;
            pair.heard[side].clear();
        }
        pair
    }

    /// Another lane, in the place of the first; what was heard before is forgotten.
    pub fn connect_again(&mut self) {
        let opened = [0, 1].map(|side| self.port(side).open_lane(peer(side)).expect("a lane opens"));
        let tags = LaneTags { ours: [8; 32], theirs: [8; 32] };
        self.lanes = [0, 1].map(|side| opened[side].0);
        self.heard = Default::default();
        for side in [0, 1] {
            let lane = self.lanes[side];
            self.port(side).connect(lane, &opened[1 - side].1, &tags).expect("a lane connects");
        }
    }

    pub fn port(&mut self, side: usize) -> &mut SimPort {
        self.ports[side].as_mut().expect("the port is there")
    }

    /// A write, or a read, of some bytes at the same offset on both sides.
    pub fn op(&self, side: usize, direction: Direction, offset: u64, bytes: u64) -> Op<'static> {
        Op {
            direction,
            grant: if direction == Direction::Write { WRITES } else { READS },
            shape: Shape::Span {
                local: self.locals[side],
                local_offset: offset,
                remote: self.remotes[side],
                remote_offset: offset,
                bytes,
            },
            imm: None,
            token: None,
        }
    }

    /// A write with an immediate and a token of the same number.
    pub fn write(&self, side: usize, number: u32, offset: u64, bytes: u64) -> Op<'static> {
        let (imm, token) = (Some(number), Some(Token(number.into())));
        Op { imm, token, ..self.op(side, Direction::Write, offset, bytes) }
    }

    pub fn post(&mut self, side: usize, ops: &[Op<'_>]) -> Result<usize, Error> {
        let lane = self.lanes[side];
        self.port(side).post(lane, ops).map(|posted| posted.ops)
    }

    /// Polls both ports whose processes run.
    pub fn poll(&mut self) {
        for side in [0, 1] {
            let Some(port) = self.ports[side].as_mut().filter(|port| self.fabric.is_running(port.node()))
            else {
                continue;
            };
            let mut events = Events::with_capacity(1024);
            port.poll(&mut events);
            let now_ns = self.fabric.now_ns();
            self.heard[side].extend(events.drain().map(|event| (now_ns, event)));
        }
    }

    /// Polls after everything that happens within a time.
    pub fn run_for(&mut self, ns: u64) {
        let until = self.fabric.now_ns() + ns;
        while let Some(next) = self.fabric.next_event_ns().filter(|&next| next <= until) {
            self.fabric.advance_to(next);
            self.poll();
        }
        self.fabric.advance_to(until);
        self.poll();
    }

    pub fn arrived(&self, side: usize) -> Vec<u32> {
        let imm = |&(_, event): &(u64, Event)| match event {
            Event::Arrived { imm, .. } => Some(imm),
            _ => None,
        };
        self.heard[side].iter().filter_map(imm).collect()
    }

    pub fn done(&self, side: usize) -> Vec<u64> {
        let token = |&(_, event): &(u64, Event)| match event {
            Event::Done { token, .. } => Some(token.0),
            _ => None,
        };
        self.heard[side].iter().filter_map(token).collect()
    }

    /// When and why the lane went down here; at most once.
    pub fn down(&self, side: usize) -> Option<(u64, DownCause)> {
        let cause = |&(at_ns, event): &(u64, Event)| match event {
            Event::Down { cause, .. } => Some((at_ns, cause)),
            _ => None,
        };
        let downs: Vec<_> = self.heard[side].iter().filter_map(cause).collect();
        assert!(downs.len() <= 1, "one Down a lane: {downs:?}");
        downs.first().copied()
    }
}

fn peer(side: usize) -> PeerId {
    PeerId(10 + side as u32)
}

/// The longest that anything takes which is not waiting for a fault to end.
pub const SOON_NS: u64 = 10_000_000;
