//! How fast the simulator is: events and ops a second of processor time, for each of the semantics. The simulator has
//! one thread, and processor time does not depend on what else the machine does.
//!
//! `cargo bench -p crossdock-sim`. Eight nodes write pages of 4 KiB to each other in a ring; one op in eight carries an
//! immediate and a token, as a transfer of KV pages would.

use crossdock_memory::{AllocateOptions, Memory, PageLayout};
use crossdock_sim::{Fabric, FabricOptions, NodeId, Semantics, SimPort, SimPortOptions};
use crossdock_transport::{
    Access, Direction, Event, Events, Grant, GrantId, GrantedBuffer, LaneId, LaneTags, LocalId, Op, PeerId,
    Port, RemoteId, Shape, Token,
};
use rustix::time::{ClockId, clock_gettime};

fn main() {
    for semantics in Semantics::ALL {
        for page_bytes in [64, 4096] {
            let mut rates: Vec<(f64, f64)> = (0..5).map(|seed| run(seed, semantics, page_bytes)).collect();
            rates.sort_by(|one, other| one.0.total_cmp(&other.0));
            let [(least, _), .., (most, _)] = rates[..] else { return };
            let (events, ops) = rates[rates.len() / 2];
            println!(
                "{:8} {page_bytes:5} B: {events:5.2} M events/s ({least:.2} to {most:.2}), {ops:5.2} M ops/s",
                semantics.name()
            );
        }
    }
}

const NODES: usize = 8;
const PAGES: u32 = 256;
const OPS: u64 = 20_000;

struct Node {
    port: SimPort,
    region: LocalId,
    to_next: LaneId,
    remote: RemoteId,
    posted: u64,
    heard: u64,
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Millions of events and of ops a second.
fn run(seed: u64, semantics: Semantics, page_bytes: u64) -> (f64, f64) {
    let fabric = Fabric::new(seed, FabricOptions::default());
    let mut nodes = ring(&fabric, semantics, page_bytes);
    let mut events = Events::with_capacity(256);
    let before = fabric.happened();
    let begun = cpu_seconds();
    while nodes.iter().any(|node| node.heard < OPS / 8) {
        for node in &mut nodes {
            let end = (node.posted + 16).min(OPS);
            let ops: Vec<Op<'_>> = (node.posted..end).map(|at| op(node, at, page_bytes)).collect();
            // A part of a page that was taken is simply written again.
            node.posted += node.port.post(node.to_next, &ops).expect("the lane is up").ops as u64;
            node.port.poll(&mut events);
            node.heard +=
                events.drain().filter(|event| matches!(event, Event::Arrived { .. })).count() as u64;
        }
        fabric.advance_to(fabric.now_ns() + 2_000);
    }
    let seconds = cpu_seconds() - begun;
    let millions = |count: u64| count as f64 / seconds / 1e6;
    (millions(fabric.happened() - before), millions(OPS * NODES as u64))
}

fn op(node: &Node, at: u64, page_bytes: u64) -> Op<'static> {
    let offset = at % u64::from(PAGES) * page_bytes;
    let marked = at % 8 == 7;
    Op {
        direction: Direction::Write,
        grant: GrantId::new(0, 0),
        shape: Shape::Span {
            local: node.region,
            local_offset: offset,
            remote: node.remote,
            remote_offset: offset,
            bytes: page_bytes,
        },
        imm: marked.then_some(at as u32),
        token: marked.then_some(Token(at)),
    }
}

fn ring(fabric: &Fabric, semantics: Semantics, page_bytes: u64) -> Vec<Node> {
    let mut nodes = Vec::new();
    let mut keys = Vec::new();
    for at in 0..NODES {
        let mut port = fabric.port(NodeId(at as u32), SimPortOptions::new(semantics));
        let bytes = page_bytes * u64::from(PAGES);
        let memory = Memory::allocate(bytes as usize, &AllocateOptions::default()).expect("memory");
        let (region, key) = port.register(&memory).expect("memory registers");
        let buffers = [GrantedBuffer { region, layout: PageLayout::dense(0, page_bytes, PAGES) }];
        let pages: Vec<u32> = (0..PAGES).collect();
        let (id, peer) = (GrantId::new(0, 0), PeerId(1));
        port.grant(&Grant { id, peer, access: Access::Write, buffers: &buffers, pages: &pages })
            .expect("a grant");
        keys.push(key);
        nodes.push(Node { port, region, to_next: LaneId(0), remote: RemoteId(0), posted: 0, heard: 0 });
    }
    let tags = LaneTags { ours: [0; 32], theirs: [0; 32] };
    for at in 0..NODES {
        let next = (at + 1) % NODES;
        let (near, near_address) = nodes[at].port.open_lane(PeerId(0)).expect("a lane opens");
        let (far, far_address) = nodes[next].port.open_lane(PeerId(1)).expect("a lane opens");
        nodes[at].port.connect(near, &far_address, &tags).expect("a lane connects");
        nodes[next].port.connect(far, &near_address, &tags).expect("a lane connects");
        nodes[at].to_next = near;
    }
    fabric.advance_to(1_000_000);
    for at in 0..NODES {
        let (lane, key) = (nodes[at].to_next, keys[(at + 1) % NODES].clone());
        nodes[at].remote = loop {
            if let Ok(attached) = nodes[at].port.attach(lane, &key) {
                break attached.id;
            }
        };
    }
    let mut events = Events::with_capacity(256);
    nodes.iter_mut().for_each(|node| node.port.poll(&mut events));
    nodes
}
