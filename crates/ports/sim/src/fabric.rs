//! The handle of a fabric: its clock, its ports, its faults.

use std::fmt;
use std::sync::Arc;

use crossdock_transport::{GrantTable, LaneId};
use parking_lot::Mutex;

use crate::landing::Landing;
use crate::lane::State;
use crate::net::SimNet;
use crate::options::{FabricOptions, SimPortOptions};
use crate::port::SimPort;
use crate::wire::End;
use crate::world::{Life, NodeId, NodeState, PortId, PortState, World};

/// A virtual network. A clone is another handle to the same one.
///
/// Nothing happens between calls: whoever owns the fabric polls its ports and moves its clock. The same seed, options
/// and calls give the same run, to the last byte; [`fingerprint`](Fabric::fingerprint) tells runs apart.
#[derive(Clone)]
pub struct Fabric {
    world: Arc<Mutex<World>>,
}

/// A lane that is up, for whoever wants to break one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneView {
    /// One end's port.
    pub port: PortId,
    /// Its node.
    pub node: NodeId,
    /// The end.
    pub lane: LaneId,
    /// The node of the other end.
    pub peer: NodeId,
    /// And its port.
    pub peer_port: PortId,
}

impl Fabric {
    /// A fabric in which nothing is yet, at time 0.
    pub fn new(seed: u64, options: FabricOptions) -> Self {
        Self { world: Arc::new(Mutex::new(World::new(seed, options))) }
    }

    /// Makes a port on a node.
    pub fn port(&self, node: NodeId, options: SimPortOptions) -> SimPort {
        let mut world = self.world.lock();
        world.meet(node);
        let id = u32::try_from(world.ports.len()).expect("fewer ports than memory holds");
        world.ports.push(PortState {
            node,
            options,
            life: Life::Alive,
            regions: Vec::new(),
            grants: GrantTable::new(),
            lanes: Vec::new(),
            link_free_ns: 0,
            events: Default::default(),
        });
        drop(world);
        SimPort::new(self.world.clone(), id)
    }

    /// Makes a node's side of the control network, which others dial under `addr`. An address that is used again
    /// belongs to who took it last.
    pub fn net(&self, node: NodeId, addr: &str) -> SimNet {
        SimNet::new(self.world.clone(), node, addr)
    }

    /// The time.
    pub fn now_ns(&self) -> u64 {
        self.world.lock().now_ns
    }

    /// Moves the clock, and lets happen what is due by then, in the order of time. The clock never goes back.
    pub fn advance_to(&self, now_ns: u64) {
        self.world.lock().advance_to(now_ns);
    }

    /// When something happens next without anybody's doing; `None` if nothing will.
    pub fn next_event_ns(&self) -> Option<u64> {
        self.world.lock().agenda.next_ns()
    }

    /// What has landed since the last call, in the order of time; only if
    /// [`note_landings`](FabricOptions::note_landings) is set.
    pub fn landings(&self) -> Vec<Landing> {
        std::mem::take(&mut self.world.lock().landings)
    }

    /// A number that depends on everything that has happened so far.
    pub fn fingerprint(&self) -> u64 {
        self.world.lock().fingerprint
    }

    /// How many events of the network have happened so far.
    pub fn happened(&self) -> u64 {
        self.world.lock().happened
    }

    /// Kills the process of a node: its ports and streams are no more. Drop what the process owned, and do not poll
    /// for it any more. Proof of the death comes only where there is one.
    pub fn kill(&self, node: NodeId) {
        self.world.lock().kill(node);
    }

    /// Gives a killed node a new process; its ports have to be made again.
    pub fn restart(&self, node: NodeId) {
        self.world.lock().restart(node);
    }

    /// Stops the process of a node. Do not poll for it until it [runs](Self::is_running) again.
    pub fn stop(&self, node: NodeId) {
        self.world.lock().stop(node);
    }

    /// Lets a stopped process continue.
    pub fn cont(&self, node: NodeId) {
        self.world.lock().cont(node);
    }

    /// Whether the process of a node is neither stopped nor dead.
    pub fn is_running(&self, node: NodeId) -> bool {
        let mut world = self.world.lock();
        world.meet(node);
        world.nodes[node.0 as usize].state == NodeState::Running
    }

    /// Whether something waits to be taken at a port or a stream of a node's process, which would wake its loop.
    pub fn has_news(&self, node: NodeId) -> bool {
        self.world.lock().has_news(node)
    }

    /// Lets nothing pass between two nodes any more, but for memory that is mapped on one host.
    pub fn partition(&self, one: NodeId, other: NodeId) {
        self.world.lock().begin_partition(one, other);
    }

    /// Ends a partition. What was on its way comes.
    pub fn heal(&self, one: NodeId, other: NodeId) {
        self.world.lock().heal(one, other);
    }

    /// Makes everything from and to a node take so many times as long; 1 is as usual.
    pub fn slow(&self, node: NodeId, times: u64) {
        self.world.lock().set_slowness(node, times);
    }

    /// Breaks a lane. Both ends hear of it, each in its own time.
    pub fn break_lane(&self, port: PortId, lane: LaneId) {
        let mut world = self.world.lock();
        let end = End { port: port.0, lane };
        if world.known_lane(end).is_ok() {
            world.break_lane(end);
        }
    }

    /// Breaks all lanes between two ports, and lets none come up there until the rail is
    /// [mended](Fabric::mend_rail): connecting ends by its time-out.
    pub fn cut_rail(&self, one: PortId, other: PortId) {
        self.world.lock().cut_rail(one.0, other.0);
    }

    /// Lets lanes between two ports come up again.
    pub fn mend_rail(&self, one: PortId, other: PortId) {
        self.world.lock().mend_rail(one.0, other.0);
    }

    /// Breaks all streams between two nodes.
    pub fn break_streams(&self, one: NodeId, other: NodeId) {
        self.world.lock().break_streams(one, other);
    }

    /// The ends of lanes that are up.
    pub fn lanes(&self) -> Vec<LaneView> {
        let world = self.world.lock();
        let ends = (0..world.ports.len() as u32).flat_map(|port| world.ends_of(port));
        let view = |end: End| {
            let lane = world.lane(end);
            let remote = lane.remote.filter(|_| lane.state == State::Up)?;
            let (node, peer) = (world.node_of(end), world.node_of(remote));
            let (port, peer_port) = (PortId(end.port), PortId(remote.port));
            Some(LaneView { port, node, lane: end.lane, peer, peer_port })
        };
        ends.filter_map(view).collect()
    }

    /// Ends all faults but deaths, and lets none come by itself any more.
    pub fn calm(&self) {
        self.world.lock().calm();
    }
}

impl fmt::Debug for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let world = self.world.lock();
        f.debug_struct("Fabric")
            .field("now_ns", &world.now_ns)
            .field("ports", &world.ports.len())
            .finish_non_exhaustive()
    }
}
