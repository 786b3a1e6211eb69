//! Whole runs with every kind of fault: the promises of each semantics hold in all of them, and the same seed gives
//! the same run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crossdock_memory::{AllocateOptions, Memory, PageLayout};
use crossdock_sim::{
    Between, Chaos, Fabric, FabricOptions, NodeId, OneIn, PortId, Semantics, SimPort, SimPortOptions,
};
use crossdock_transport::{
    Access, Direction, Error, Event, Events, Fence, Grant, GrantId, GrantedBuffer, LaneAddress, LaneId,
    LaneTags, LocalId, Op, PeerId, Port, RemoteKey, Shape, Token,
};

#[test]
fn the_promises_hold_whatever_happens() {
    for seed in 0..120 {
        Run::new(seed).finish();
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let runs: Vec<(Vec<String>, u64)> = [5, 5, 6].into_iter().map(|seed| Run::new(seed).finish()).collect();
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0].1, runs[2].1);
    assert!(runs[0].0.len() > 1000, "{} events are no run", runs[0].0.len());
}

/// Some nodes that write to and read from each other while everything goes wrong.
struct Run {
    seed: u64,
    fabric: Fabric,
    semantics: Semantics,
    nodes: Vec<Option<Process>>,
    /// Lanes by their ends.
    lanes: BTreeMap<(u32, LaneId), Seen>,
    /// Pages of a port that came home, because of what its port promised; nothing may land there.
    home: BTreeSet<(PortId, u32)>,
    log: Vec<String>,
    chance: u64,
}

/// One process.
struct Process {
    port: SimPort,
    region: LocalId,
    key: RemoteKey,
    /// By peer.
    pages: BTreeMap<u32, Page>,
}

/// The page of a process that a peer may write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Page {
    Granted,
    /// Until every lane of the peer is down.
    Fenced,
    Home,
    /// Nothing that the port can see brings it back.
    Never,
}

/// One end of a lane.
#[derive(Default)]
struct Seen {
    node: u32,
    peer: u32,
    up: bool,
    down: bool,
    tokens: VecDeque<Token>,
    attached: bool,
}

const NODES: u32 = 4;
const PAGE: u64 = 4096;

impl Run {
    fn new(seed: u64) -> Self {
        let semantics = Semantics::ALL[seed as usize % 4];
        let between = |least_ns, most_ns| Between { least_ns, most_ns };
        let chaos = Chaos {
            lane_loss_ns: 800_000,
            stream_loss_ns: 0,
            partition_ns: 900_000,
            stop_ns: 700_000,
            slow_ns: 500_000,
            duration: between(10_000, 2_000_000),
        };
        let options = FabricOptions {
            silence_ns: 1_000_000,
            connect_ns: 500_000,
            death_notice: between(1_000, 100_000),
            partial_landing: OneIn(3),
            note_landings: true,
            chaos,
            ..Default::default()
        };
        let fabric = Fabric::new(seed, options);
        let nodes = (0..NODES).map(|_| None).collect();
        let (lanes, home, log) = Default::default();
        let mut run = Self { seed, fabric, semantics, nodes, lanes, home, log, chance: seed ^ 0x5eed };
        for node in 0..NODES {
            run.begin_process(node);
        }
        run
    }

    /// Runs through the faults, ends them, and sees that everything ends that should.
    fn finish(mut self) -> (Vec<String>, u64) {
        for step in 0..3000 {
            let now_ns = self.fabric.now_ns();
            let next = self.fabric.next_event_ns().map_or(now_ns + 1000, |next| next.min(now_ns + 1000));
            self.fabric.advance_to(next);
            self.turn();
            let node = self.pick(NODES);
            if step % 400 == 399 {
                self.fabric.kill(NodeId(node));
                self.nodes[node as usize] = None;
                // The dead have no pages, and nobody asks their lanes any more.
                self.lanes.retain(|_, seen| seen.node != node);
                self.fabric.restart(NodeId(node));
                self.begin_process(node);
            } else {
                self.act(node);
            }
        }
        self.fabric.calm();
        self.close_everything();
        while let Some(next) = self.fabric.next_event_ns() {
            self.fabric.advance_to(next);
            self.turn();
        }
        // A short poll may have left something.
        for _ in 0..200 {
            self.turn();
        }
        for (end, seen) in &self.lanes {
            assert!(seen.down, "seed {}: {end:?} of node {} never ended", self.seed, seen.node);
        }
        let fingerprint = self.fabric.fingerprint();
        (self.log, fingerprint)
    }

    /// A process begins: a region with a page for each peer, granted to it.
    fn begin_process(&mut self, node: u32) {
        let unordered = self.seed % 8 >= 4;
        let options =
            SimPortOptions { unordered, pieces_in_flight: 16, ..SimPortOptions::new(self.semantics) };
        let mut port = self.fabric.port(NodeId(node), options);
        let memory = Memory::allocate((u64::from(NODES) * PAGE) as usize, &AllocateOptions::default());
        let (region, key) = port.register(&memory.expect("memory")).expect("memory registers");
        let mut pages = BTreeMap::new();
        for peer in (0..NODES).filter(|&peer| peer != node) {
            grant(&mut port, region, peer, 0);
            pages.insert(peer, Page::Granted);
        }
        self.nodes[node as usize] = Some(Process { port, region, key, pages });
    }

    fn turn(&mut self) {
        for node in 0..NODES {
            if !self.fabric.is_running(NodeId(node)) {
                continue;
            }
            let Some(process) = self.nodes[node as usize].as_mut() else { continue };
            let mut events = Events::with_capacity(8);
            process.port.poll(&mut events);
            let port = process.port.id();
            // Landings until now are of the time before these events were heard.
            self.check_landings();
            for event in events.drain() {
                self.hear(node, port, event);
            }
        }
        self.check_landings();
    }

    fn check_landings(&mut self) {
        for landing in self.fabric.landings() {
            self.log.push(format!("{landing:?}"));
            if landing.access == Access::Write {
                let page = (landing.offset / PAGE) as u32;
                assert!(
                    !self.home.contains(&(landing.port, page)),
                    "seed {}: {landing:?} in a page at home",
                    self.seed
                );
                assert_eq!(page, landing.from.0, "seed {}: {landing:?} in another peer's page", self.seed);
            }
        }
    }

    fn hear(&mut self, node: u32, port: PortId, event: Event) {
        self.log.push(format!("{} {node}: {event:?}", self.fabric.now_ns()));
        let (Event::Up { lane }
        | Event::Done { lane, .. }
        | Event::Arrived { lane, .. }
        | Event::Down { lane, .. }) = event;
        let seen = self.lanes.get_mut(&(port.0, lane)).expect("a lane of this run");
        assert!(!seen.down, "seed {}: {event:?} after Down", self.seed);
        match event {
            Event::Up { .. } => assert!(!std::mem::replace(&mut seen.up, true), "up twice"),
            Event::Done { token, .. } => {
                assert_eq!(seen.tokens.pop_front(), Some(token), "seed {}", self.seed)
            }
            Event::Arrived { .. } => assert!(seen.up),
            Event::Down { .. } => {
                seen.down = true;
                let peer = seen.peer;
                self.bring_home(node, peer);
            }
        }
    }

    /// A fenced page comes home when every lane of its peer is down.
    fn bring_home(&mut self, node: u32, peer: u32) {
        let all_down = self.lanes.values().all(|seen| (seen.node, seen.peer) != (node, peer) || seen.down);
        let Some(process) = self.nodes[node as usize].as_mut() else { return };
        let page = process.pages.get_mut(&peer).expect("a page for each peer");
        if *page == Page::Fenced && all_down {
            *page = Page::Home;
            self.home.insert((process.port.id(), peer));
        }
    }

    /// A process does one thing.
    fn act(&mut self, node: u32) {
        if !self.fabric.is_running(NodeId(node)) {
            return;
        }
        let peer = (node + 1 + self.pick(NODES - 1)) % NODES;
        match self.pick(24) {
            0..3 => self.connect(node, peer),
            3 => self.close_one(node),
            4..6 => self.turn_page(node, peer),
            _ => self.post_one(node),
        }
    }

    /// Opens a lane, with the other end doing the same, unless it is stopped or there are enough.
    fn connect(&mut self, node: u32, peer: u32) {
        let open =
            self.lanes.values().filter(|seen| (seen.node, seen.peer) == (node, peer) && !seen.down).count();
        let page_is_home = |run: &Self, node: u32, peer: u32| {
            run.nodes[node as usize].as_ref().is_some_and(|process| process.pages[&peer] != Page::Granted)
        };
        // A new lane would be another way into a page that is fenced or at home.
        let closed_pages = page_is_home(self, node, peer) || page_is_home(self, peer, node);
        if open >= 2 || closed_pages || !self.fabric.is_running(NodeId(peer)) {
            return;
        }
        let (near, near_address) = self.open(node, peer);
        let (far, far_address) = self.open(peer, node);
        let tags = LaneTags { ours: [1; 32], theirs: [1; 32] };
        for (at, lane, address) in [(node, near, &far_address), (peer, far, &near_address)] {
            let process = self.nodes[at as usize].as_mut().expect("a process runs");
            process.port.connect(lane, address, &tags).expect("a fresh lane connects");
        }
    }

    fn open(&mut self, node: u32, peer: u32) -> (LaneId, LaneAddress) {
        let process = self.nodes[node as usize].as_mut().expect("a process runs");
        let (lane, address) = process.port.open_lane(PeerId(peer)).expect("a lane opens");
        self.lanes.insert((process.port.id().0, lane), Seen { node, peer, ..Seen::default() });
        (lane, address)
    }

    fn close_one(&mut self, node: u32) {
        if let Some(lane) = self.some_lane(node, |seen| !seen.down) {
            self.nodes[node as usize].as_mut().expect("a process runs").port.close(lane);
        }
    }

    /// A page is revoked, or granted again once it is home.
    fn turn_page(&mut self, node: u32, peer: u32) {
        let process = self.nodes[node as usize].as_mut().expect("a process runs");
        let (port, region) = (process.port.id(), process.region);
        match process.pages[&peer] {
            Page::Granted => {
                let fence = process.port.revoke(GrantId::new(peer, 0));
                let page = match fence {
                    Fence::Now => Page::Home,
                    Fence::WhenDown => Page::Fenced,
                    Fence::Never => Page::Never,
                };
                process.pages.insert(peer, page);
                // What has landed by now was allowed to.
                self.check_landings();
                if page == Page::Home {
                    self.home.insert((port, peer));
                }
                self.bring_home(node, peer);
            }
            Page::Home => {
                grant(&mut process.port, region, peer, 0);
                process.pages.insert(peer, Page::Granted);
                self.home.remove(&(port, peer));
            }
            Page::Fenced | Page::Never => {}
        }
    }

    fn post_one(&mut self, node: u32) {
        let Some(lane) = self.some_lane(node, |seen| seen.up && !seen.down) else { return };
        let (direction, number) = (self.pick(4), self.pick(1000));
        let bytes = 1 + u64::from(self.pick(PAGE as u32));
        let port = self.nodes[node as usize].as_ref().expect("a process runs").port.id().0;
        let seen = self.lanes.get_mut(&(port, lane)).expect("a lane of this run");
        let key = self.nodes[seen.peer as usize].as_ref().map(|process| process.key.clone());
        let process = self.nodes[node as usize].as_mut().expect("a process runs");
        let shape = Shape::Span {
            local: process.region,
            local_offset: u64::from(seen.peer) * PAGE,
            remote: crossdock_transport::RemoteId(0),
            remote_offset: u64::from(node) * PAGE,
            bytes,
        };
        let (direction, imm) =
            if direction == 0 { (Direction::Read, None) } else { (Direction::Write, Some(number)) };
        // Nobody grants reads here: where that is checked, reading would only end lanes.
        let direction = if self.semantics == Semantics::Checked { Direction::Write } else { direction };
        let op =
            Op { direction, grant: GrantId::new(node, 0), shape, imm, token: Some(Token(number.into())) };
        if !seen.attached {
            match key.map(|key| process.port.attach(lane, &key)) {
                Some(Ok(_)) => seen.attached = true,
                _ => return,
            }
        }
        match process.port.post(lane, &[op]) {
            Ok(posted) if posted.ops == 1 => seen.tokens.extend(op.token),
            Ok(_) | Err(Error::LaneDown { .. }) => {}
            Err(error) => panic!("seed {}: {error}", self.seed),
        }
    }

    fn close_everything(&mut self) {
        for (&(_, lane), seen) in &self.lanes {
            let process = self.nodes[seen.node as usize].as_mut();
            process.expect("a process runs").port.close(lane);
        }
    }

    fn some_lane(&mut self, node: u32, which: impl Fn(&Seen) -> bool) -> Option<LaneId> {
        let fitting = self.lanes.iter().filter(|(_, seen)| seen.node == node && which(seen));
        let fitting: Vec<LaneId> = fitting.map(|(&(_, lane), _)| lane).collect();
        (!fitting.is_empty()).then(|| fitting[self.pick(fitting.len() as u32) as usize])
    }

    /// The run's own choices, apart from the fabric's.
    fn pick(&mut self, limit: u32) -> u32 {
        self.chance =
            self.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.chance >> 33) % u64::from(limit)) as u32
    }
}

fn grant(port: &mut SimPort, region: LocalId, peer: u32, generation: u32) {
    let buffers = [GrantedBuffer { region, layout: PageLayout::dense(0, PAGE, NODES) }];
    let id = GrantId::new(peer, generation);
    let grant = Grant { id, peer: PeerId(peer), access: Access::Write, buffers: &buffers, pages: &[peer] };
    port.grant(&grant).expect("a good grant");
}
