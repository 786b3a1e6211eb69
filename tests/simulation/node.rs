//! One node: a process at a time, put together as the facade does it, but over the fabric.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossdock_engine::{Engine, Ticket};
use crossdock_kv::{Handle, Peer, PeerUp, Worker, WorkerError, WorkerOptions};
use crossdock_memory::PagePool;
use crossdock_proto::{Config, Fingerprint, Identity, Proto, Rail, SessionEnd};
use crossdock_sim::{Fabric, NodeId, PortId};
use crossdock_transport::Port;
use parking_lot::Mutex;

use crate::cache::Cache;
use crate::chance::mix;
use crate::faults::Fault;
use crate::ledger::Ledger;
use crate::network::{SimNetwork, Wire};
use crate::port::{Watch, WatchedPort};
use crate::room::Part;
use crate::scenario::{MS, Scenario, US};

/// A node over all its lives.
pub struct Node {
    /// Counts its processes.
    pub life: u64,
    pub process: Option<Process>,
    /// Its loop makes no turn before.
    pub held_until_ns: u64,
    /// The sides of rooms that its process has opened and that are not settled.
    pub sides: Vec<(usize, Part)>,
    pub full: Full,
}

/// When a node was last full, as far as can be seen from outside: it was not at any later time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Full {
    pub of_rooms_ns: Option<u64>,
    pub of_grants_ns: Option<u64>,
    pub of_requests_ns: Option<u64>,
}

/// What a process holds of what it has limits for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Held {
    pub rooms: usize,
    pub grants: usize,
    /// What peers ask for whose room is not open yet.
    pub requests: usize,
}

/// One life of a node.
pub struct Process {
    pub worker: Worker,
    pub handle: Handle,
    pub cache: Cache,
    pub pool: PagePool,
    pub wire: Arc<Mutex<Wire>>,
    pub watch: Arc<Mutex<Watch>>,
    pub ports: Vec<PortId>,
    /// Those that it dials.
    pub peers: BTreeMap<usize, Peer>,
    pub ups: Vec<Ticket<Result<PeerUp, SessionEnd>>>,
    /// When its loop has something to do.
    pub wake_ns: u64,
    /// How often the arrivals of a room have fallen.
    pub falls: u64,
    pub turns: u64,
}

impl Process {
    pub fn begin(fabric: &Fabric, scenario: &Scenario, node: usize, life: u64) -> Result<Self, WorkerError> {
        let plan = &scenario.nodes[node];
        let layout = plan.layout.clone();
        let keeps_past = scenario.faults.contains(&Fault::Echo);
        let net = fabric.net(NodeId(node as u32), &plan.address);
        let wire = Arc::new(Mutex::new(Wire::new(net, keeps_past)));
        let watch = Arc::new(Mutex::new(Watch::new(Ledger::new(layout.clone()))));
        let mut ids = Vec::new();
        let ports: Vec<Box<dyn Port>> = scenario
            .rails
            .iter()
            .map(|options| {
                let port = fabric.port(NodeId(node as u32), options.clone());
                ids.push(port.id());
                Box::new(WatchedPort::new(port, watch.clone())) as Box<dyn Port>
            })
            .collect();
        let config = config(scenario, node, life, &ports);
        let network = Box::new(SimNetwork::new(wire.clone(), plan.address.clone()));
        let engine = Engine::new(Proto::new(config), network, ports, scenario.engine.clone());
        let cache = Cache::new(layout.clone());
        let options = WorkerOptions {
            layout: layout.clone(),
            memory: cache.memory.clone(),
            verify: plan.verify,
            max_commands: scenario.max_commands,
            max_targets: 64,
            turn_bytes: scenario.turn_bytes,
        };
        let (worker, handle) = Worker::new(engine, options)?;
        let mut process = Self {
            worker,
            handle,
            pool: PagePool::external(layout.pages()),
            cache,
            wire,
            watch,
            ports: ids,
            peers: BTreeMap::new(),
            ups: Vec::new(),
            wake_ns: fabric.now_ns(),
            falls: 0,
            turns: 0,
        };
        for &peer in &plan.dials {
            process.dial(peer, &scenario.nodes[peer].address);
        }
        Ok(process)
    }

    /// Dials a peer, unless it is dialed already. False: the queue of commands is full.
    pub fn dial(&mut self, peer: usize, address: &str) -> bool {
        if self.peers.contains_key(&peer) {
            return true;
        }
        let Ok((name, up)) = self.handle.connect(address) else { return false };
        self.peers.insert(peer, name);
        self.ups.push(up);
        true
    }

    pub fn held(&mut self) -> Held {
        let proto = self.worker.engine().proto();
        Held { rooms: proto.rooms_live(), grants: proto.grants_live(), requests: proto.requests_parked() }
    }
}

/// The number of a node, the same in all its lives.
pub fn number(node: usize) -> u64 {
    100 + node as u64
}

fn config(scenario: &Scenario, node: usize, life: u64, ports: &[Box<dyn Port>]) -> Config {
    let plan = &scenario.nodes[node];
    let chance = mix(scenario.seed ^ mix(number(node) << 32 | life));
    let identity = Identity { node: number(node), incarnation: chance };
    let mut config = Config::new(identity, plan.address.clone());
    for (at, word) in config.entropy.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(chance ^ at as u64).to_le_bytes());
    }
    config.auth = scenario.auth.clone();
    config.fingerprint = Fingerprint::new(plan.layout.fingerprint());
    let rail = |port: &dyn Port| {
        let info = port.info();
        Rail { kind: info.kind, reach: info.reach.clone(), bytes_per_second: info.bytes_per_second }
    };
    config.rails = ports.iter().map(|port| rail(&**port)).collect();
    config.lanes_per_rail = scenario.lanes_per_rail;
    plan.layout.encode(&mut config.app);
    config.pulse_address = plan.address.clone();
    config.heartbeat_ns = MS;
    config.heartbeats_missed = plan.heartbeats_missed;
    config.handshake_timeout_ns = 8 * MS;
    config.redial_min_ns = 100 * US;
    config.redial_max_ns = 3 * MS;
    config.lane_retry_min_ns = scenario.lane_retry_ns;
    config.lane_retry_max_ns = 2 * MS;
    config.max_rooms = scenario.max_rooms;
    config.max_grants = scenario.max_grants;
    config.max_parked = scenario.max_parked;
    config
}
