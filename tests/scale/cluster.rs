//! Many nodes over one fabric in which nothing fails, each turned when it has something to do.

use std::sync::Arc;

use crossdock_engine::{Engine, EngineOptions, Ticket};
use crossdock_kv::{
    CacheKind, CacheLayout, Dtype, Handle, LayoutOptions, Peer, PeerUp, Placement, Turn, Verify, Worker,
    WorkerOptions,
};
use crossdock_memory::{AllocateOptions, Memory, PagePool, PoolOptions};
use crossdock_proto::{Auth, Config, Counters, Fingerprint, Identity, Proto, Rail, SessionEnd};
use crossdock_sim::{Between, Fabric, FabricOptions, NodeId, OneIn, Semantics, SimPortOptions};
use crossdock_transport::Port;
use parking_lot::Mutex;

use crate::chance::mix;
use crate::counting::{Owner, on_behalf};
use crate::network::{SimNetwork, Wire};

pub const US: u64 = 1_000;
pub const MS: u64 = 1_000_000;

/// How large a cluster is, and what it is made of.
#[derive(Clone, Debug)]
pub struct Options {
    pub prefills: usize,
    pub decodes: usize,
    pub lanes: u8,
    pub layers: u32,
    pub page_tokens: u32,
    /// Bytes that a token has in a layer.
    pub token_bytes: u32,
    pub prefill_pages: u32,
    pub decode_pages: u32,
    pub heartbeat_ns: u64,
    /// Pieces of ops that may be in flight on a lane.
    pub window: u32,
}

impl Options {
    /// A mesh of so many prefill and decode ranks with almost no memory.
    pub fn mesh(prefills: usize, decodes: usize) -> Self {
        Self {
            prefills,
            decodes,
            lanes: 2,
            layers: 1,
            page_tokens: 1,
            token_bytes: 16,
            prefill_pages: 64,
            decode_pages: 64,
            heartbeat_ns: 200 * MS,
            window: 1024,
        }
    }

    fn layout(&self, pages: u32) -> CacheLayout {
        CacheLayout::new(LayoutOptions {
            model: "a model".into(),
            model_layers: self.layers,
            layers: 0..self.layers,
            kind: CacheKind::Mla { latent_bytes: self.token_bytes, rope_bytes: 0 },
            dtype: Dtype::Bf16,
            page_tokens: self.page_tokens,
            pages,
            placement: Placement::LayerMajor { region: 0 },
        })
        .expect("a layout that makes sense")
    }
}

/// All nodes: first the prefill ranks, then the decode ranks.
pub struct Cluster {
    pub options: Options,
    pub fabric: Fabric,
    pub now_ns: u64,
    pub nodes: Vec<Node>,
    pub turns: u64,
    /// The most control messages that one node took in one turn.
    pub most_messages_a_turn: u64,
    next_beat_ns: u64,
}

pub struct Node {
    pub owner: Owner,
    pub worker: Worker,
    pub handle: Handle,
    pub pool: PagePool,
    pub wire: Arc<Mutex<Wire>>,
    /// The prefill ranks that a decode rank has dialed.
    pub peers: Vec<Peer>,
    pub ups: Vec<Ticket<Result<PeerUp, SessionEnd>>>,
    wake_ns: u64,
}

/// How fast a lane and a node's link are: 400 Gbit/s.
pub const LINK_BYTES_PER_SECOND: u64 = 50_000_000_000;

/// How long a message is on its way.
pub const DELAY_NS: u64 = 5 * US;

/// Nothing is looked at more often, and a turn takes so long.
const TURN_NS: u64 = US;

impl Cluster {
    pub fn new(options: Options) -> Self {
        let fabric = Fabric::new(1, calm());
        let nodes = (0..options.prefills + options.decodes).map(|at| Node::open(&fabric, &options, at));
        let nodes = nodes.collect();
        Self { fabric, nodes, options, now_ns: 0, turns: 0, most_messages_a_turn: 0, next_beat_ns: 0 }
    }

    /// Lets every decode rank dial every prefill rank.
    pub fn dial(&mut self) {
        for prefill in 0..self.options.prefills {
            self.dial_one(prefill);
        }
    }

    /// Lets every decode rank dial one prefill rank.
    pub fn dial_one(&mut self, prefill: usize) {
        for node in &mut self.nodes[self.options.prefills..] {
            let asked = on_behalf(node.owner, || node.handle.connect(address(prefill)));
            let (peer, up) = asked.expect("the queue of commands has room");
            node.peers.push(peer);
            node.ups.push(up);
            node.wake_ns = 0;
        }
    }

    /// A cluster in which every session is up.
    pub fn joined(options: Options) -> Self {
        let mut cluster = Self::new(options);
        cluster.dial();
        cluster.run_until("a full mesh", Cluster::is_full_mesh);
        cluster
    }

    pub fn is_full_mesh(&mut self) -> bool {
        let (prefills, decodes) = (self.options.prefills, self.options.decodes);
        let prefill = |at: usize| if at < prefills { decodes } else { prefills } as u64;
        self.nodes.iter_mut().enumerate().all(|(at, node)| node.counters().sessions == prefill(at))
    }

    pub fn run_until(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        let limit_ns = self.now_ns + 60_000 * MS;
        while !reached(self) {
            self.step();
            assert!(self.now_ns < limit_ns, "{what} is not reached in a minute of virtual time");
        }
    }

    pub fn run_for(&mut self, ns: u64) {
        let until_ns = self.now_ns + ns;
        self.run_until("a time", |cluster| cluster.now_ns >= until_ns);
    }

    /// Moves on to whatever comes next, in steps of a turn.
    pub fn step(&mut self) {
        let wake_ns = self.nodes.iter().map(|node| node.wake_ns).min().unwrap_or(u64::MAX);
        let next_ns = self.fabric.next_event_ns().unwrap_or(u64::MAX).min(wake_ns).min(self.next_beat_ns);
        self.now_ns = next_ns.max(self.now_ns + 1).next_multiple_of(TURN_NS);
        self.fabric.advance_to(self.now_ns);
        if self.next_beat_ns <= self.now_ns {
            for node in &self.nodes {
                node.wire.lock().beat(self.now_ns);
            }
            self.next_beat_ns = self.now_ns + self.options.heartbeat_ns / 4;
        }
        for at in 0..self.nodes.len() {
            if self.nodes[at].wake_ns <= self.now_ns || self.fabric.has_news(NodeId(at as u32)) {
                self.turn(at);
            }
        }
    }

    fn turn(&mut self, at: usize) {
        let (now_ns, node) = (self.now_ns, &mut self.nodes[at]);
        let before = node.counters().messages_in;
        let turn = on_behalf(node.owner, || node.worker.turn(now_ns));
        self.turns += 1;
        self.most_messages_a_turn = self.most_messages_a_turn.max(node.counters().messages_in - before);
        node.wake_ns = match turn {
            Turn::Active => now_ns + TURN_NS,
            Turn::Idle | Turn::Stopped => node.worker.next_deadline_ns().unwrap_or(u64::MAX),
        };
    }

    /// Lets a user of a node ask something of it, which its next turn takes.
    pub fn ask<T>(&mut self, node: usize, ask: impl FnOnce(&mut Node) -> T) -> T {
        let node = &mut self.nodes[node];
        node.wake_ns = self.now_ns;
        on_behalf(node.owner, || ask(node))
    }

    /// What all nodes have counted.
    pub fn counters(&mut self) -> Counters {
        let mut sum = Counters::default();
        for node in &mut self.nodes {
            let one = node.counters();
            sum.messages_out += one.messages_out;
            sum.messages_in += one.messages_in;
            sum.control_bytes_out += one.control_bytes_out;
            sum.sessions += one.sessions;
            sum.delivered += one.delivered;
            sum.undelivered += one.undelivered;
        }
        sum
    }

    /// How often rooms, sessions, grants, targets and streams were visited, on all nodes.
    pub fn visits(&self) -> u64 {
        self.nodes.iter().map(|node| node.worker.visits()).sum()
    }

    /// How often engines have asked when their peers were heard.
    pub fn looks(&self) -> u64 {
        self.nodes.iter().map(|node| node.wire.lock().looks).sum()
    }
}

impl Node {
    fn open(fabric: &Fabric, options: &Options, at: usize) -> Self {
        let (owner, pages) = match at < options.prefills {
            true => (Owner::Prefill, options.prefill_pages),
            false => (Owner::Decode, options.decode_pages),
        };
        let layout = options.layout(pages);
        let memory = Memory::allocate(layout.bytes_needed(0) as usize, &AllocateOptions::default());
        let memory = memory.expect("the memory of a node");
        let port: Box<dyn Port> = Box::new(fabric.port(NodeId(at as u32), port_options(options)));
        let wire = Arc::new(Mutex::new(Wire::new(fabric.net(NodeId(at as u32), &address(at)), false)));
        let network = Box::new(SimNetwork::new(wire.clone(), address(at)));
        let proto = Proto::new(config(options, &layout, at, &*port));
        let (worker, handle) = on_behalf(owner, || {
            let engine = Engine::new(proto, network, vec![port], EngineOptions::default());
            let options = WorkerOptions {
                layout: layout.clone(),
                memory: vec![memory],
                verify: Verify::Off,
                max_commands: 65_536,
                max_targets: 1024,
                turn_bytes: WorkerOptions::TURN_BYTES,
            };
            Worker::new(engine, options).expect("a worker")
        });
        let pool = PagePool::new(layout.pages(), PoolOptions::default());
        Self { owner, worker, handle, pool, wire, peers: Vec::new(), ups: Vec::new(), wake_ns: 0 }
    }

    pub fn counters(&mut self) -> Counters {
        self.worker.engine().counters()
    }
}

fn address(at: usize) -> String {
    format!("node-{at}")
}

/// A fabric without any chance.
fn calm() -> FabricOptions {
    let never = OneIn(0);
    FabricOptions {
        delay: Between { least_ns: DELAY_NS, most_ns: DELAY_NS },
        partial_landing: never,
        short_post: never,
        short_poll: never,
        not_yet: never,
        datagram_loss: never,
        stream_frames: 1 << 20,
        datagrams_unread: 1 << 16,
        ..FabricOptions::default()
    }
}

fn port_options(options: &Options) -> SimPortOptions {
    SimPortOptions {
        pieces_in_flight: options.window,
        bytes_per_second: LINK_BYTES_PER_SECOND,
        link_bytes_per_second: Some(LINK_BYTES_PER_SECOND),
        ..SimPortOptions::new(Semantics::Verbs)
    }
}

fn config(options: &Options, layout: &CacheLayout, at: usize, port: &dyn Port) -> Config {
    let incarnation = mix(at as u64);
    let mut config = Config::new(Identity { node: 1 + at as u64, incarnation }, address(at));
    for (at, word) in config.entropy.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(incarnation ^ at as u64).to_le_bytes());
    }
    config.auth = Auth::PreSharedKey(b"a key that all nodes share".to_vec());
    config.fingerprint = Fingerprint::new(layout.fingerprint());
    let info = port.info();
    config.rails =
        vec![Rail { kind: info.kind, reach: info.reach.clone(), bytes_per_second: info.bytes_per_second }];
    config.lanes_per_rail = options.lanes;
    layout.encode(&mut config.app);
    config.pulse_address = address(at);
    config.heartbeat_ns = options.heartbeat_ns;
    config
}
