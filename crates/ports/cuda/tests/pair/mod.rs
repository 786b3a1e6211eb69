//! Two ports that write to each other.
#![allow(dead_code, reason = "not every test does all that two ports can")]

use std::time::{Duration, Instant};

use crossdock_cuda::{CudaPort, Gpu};
use crossdock_memory::{Memory, PageLayout};
use crossdock_transport::{
    Access, Direction, Event, Events, Grant, GrantId, GrantedBuffer, LaneId, LaneTags, LocalId, Op, PeerId,
    Port, Posted, RemoteId, Result, Shape, Token,
};

use crate::machine;

pub const PAGE_BYTES: usize = 16 << 10;
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Two ports of one process on one GPU, lanes between them, and a page of each.
pub struct Pair {
    pub ports: [CudaPort; 2],
    /// The two ends of each.
    pub lanes: Vec<[LaneId; 2]>,
    pub pages: [Memory; 2],
    source: LocalId,
    targets: Vec<RemoteId>,
}

const GRANT: GrantId = GrantId::standing(7);

impl Pair {
    pub fn new(gpu: &Gpu, lanes: usize) -> Pair {
        let mut ports = [0, 1].map(|_| CudaPort::open(gpu, machine::options()).unwrap());
        let pages = [0, 1].map(|_| gpu.allocate(PAGE_BYTES).unwrap());
        let (source, _) = ports[0].register(&pages[0]).unwrap();
        let (local, key) = ports[1].register(&pages[1]).unwrap();
        let layout = PageLayout::dense(0, PAGE_BYTES as u64, 1);
        let buffers = [GrantedBuffer { region: local, layout }];
        let grant =
            Grant { id: GRANT, peer: PeerId(1), access: Access::Write, buffers: &buffers, pages: &[0] };
        ports[1].grant(&grant).unwrap();
        let mut pair = Pair { ports, lanes: Vec::new(), pages, source, targets: Vec::new() };
        let tags = |ours, theirs| LaneTags { ours: [ours; 32], theirs: [theirs; 32] };
        for _ in 0..lanes {
            let opened = pair.ports.each_mut().map(|port| port.open_lane(PeerId(1)).unwrap());
            pair.ports[0].connect(opened[0].0, &opened[1].1, &tags(1, 2)).unwrap();
            pair.ports[1].connect(opened[1].0, &opened[0].1, &tags(2, 1)).unwrap();
            let mut up = [false; 2];
            pair.until("both ends are up", |at, event| {
                up[at] |= matches!(event, Event::Up { .. });
                up == [true; 2]
            });
            let ends = opened.map(|(lane, _)| lane);
            pair.targets.push(pair.ports[0].attach(ends[0], &key).unwrap().id);
            pair.lanes.push(ends);
        }
        pair
    }

    /// Polls both until an event of one of them is what is waited for.
    pub fn until(&mut self, what: &str, mut is_it: impl FnMut(usize, Event) -> bool) {
        let (until, mut events) = (Instant::now() + PATIENCE, Events::with_capacity(16));
        loop {
            for at in [1, 0] {
                events.clear();
                self.ports[at].poll(&mut events);
                for event in events.iter() {
                    if is_it(at, *event) {
                        return;
                    }
                }
            }
            assert!(Instant::now() < until, "{what}");
        }
    }

    /// Posts the page on a lane.
    pub fn post(&mut self, lane: usize, imm: u32) -> Result<Posted> {
        let shape = Shape::Span {
            local: self.source,
            local_offset: 0,
            remote: self.targets[lane],
            remote_offset: 0,
            bytes: PAGE_BYTES as u64,
        };
        let (imm, token) = (Some(imm), Some(Token(imm.into())));
        let op = Op { direction: Direction::Write, grant: GRANT, shape, imm, token };
        self.ports[0].post(self.lanes[lane][0], &[op])
    }

    /// Writes the page, and waits until the other end has heard of it.
    pub fn write(&mut self, imm: u32) {
        assert_eq!(self.post(0, imm).unwrap().ops, 1);
        let (mut here, mut there) = (false, false);
        self.until("a page arrives, and is done", |_, event| {
            match event {
                Event::Arrived { imm: found, .. } => {
                    assert_eq!(found, imm);
                    there = true;
                }
                Event::Done { .. } => here = true,
                Event::Down { .. } => panic!("{event:?}"),
                Event::Up { .. } => {}
            }
            here && there
        });
    }
}
