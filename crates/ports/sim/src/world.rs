//! Everything that a fabric knows: nodes, ports, the clock, and what happens when it moves.

use std::collections::VecDeque;

use crossdock_memory::Memory;
use crossdock_transport::{DownCause, Error, Event, GrantTable, LocalId, Result};

use crate::events::{Agenda, Due};
use crate::landing::Landing;
use crate::lane::{ETIMEDOUT, Lane, State};
use crate::net::Net;
use crate::options::{FabricOptions, SimPortOptions};
use crate::random::{Rng, mix};
use crate::wire::{End, Kind, Messages};

/// A process, with the devices that work for it. Ports of which memory is mapped take any two nodes for neighbours on
/// one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

/// A port of a fabric, for faults and landings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u32);

/// The state behind a [`Fabric`](crate::Fabric).
pub(crate) struct World {
    pub fabric: u64,
    pub now_ns: u64,
    pub rng: Rng,
    pub options: FabricOptions,
    pub agenda: Agenda,
    pub nodes: Vec<Node>,
    pub ports: Vec<PortState>,
    pub messages: Messages,
    /// Pairs of nodes that do not reach each other, with the number of the partition.
    pub partitions: Vec<(NodeId, NodeId, u64)>,
    pub partitions_begun: u64,
    /// Pairs of ports between which no lane comes up.
    pub cut_rails: Vec<(u32, u32)>,
    pub landings: Vec<Landing>,
    pub scratch: Vec<u8>,
    pub net: Net,
    /// A number that depends on everything that has happened.
    pub fingerprint: u64,
    /// How many events have happened.
    pub happened: u64,
}

/// One node.
pub(crate) struct Node {
    pub state: NodeState,
    /// Everything to and from it takes this many times as long.
    pub slowness: u64,
    /// What its process will come to when it continues.
    pub deferred: Vec<Due>,
}

/// What a node's process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeState {
    Running,
    Stopped,
    Dead,
}

/// One port.
pub(crate) struct PortState {
    pub node: NodeId,
    pub options: SimPortOptions,
    pub life: Life,
    pub regions: Vec<Option<Region>>,
    pub grants: GrantTable,
    pub lanes: Vec<Lane>,
    /// When its link has taken in all that is on its way, where that has a limit.
    pub link_free_ns: u64,
    pub events: VecDeque<Event>,
}

/// Whether a port still is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Alive,
    /// Its owner let go of it, in order.
    Dropped,
    /// Its process was killed.
    Killed,
}

/// Registered memory.
pub(crate) struct Region {
    pub memory: Memory,
    pub parts_in_flight: u32,
}

impl World {
    pub fn new(seed: u64, options: FabricOptions) -> Self {
        let mut world = Self {
            fabric: mix(seed ^ 0x6661_6272_6963),
            now_ns: 0,
            rng: Rng::new(seed),
            options,
            agenda: Agenda::default(),
            nodes: Vec::new(),
            ports: Vec::new(),
            messages: Messages::default(),
            partitions: Vec::new(),
            partitions_begun: 0,
            cut_rails: Vec::new(),
            landings: Vec::new(),
            scratch: Vec::new(),
            net: Net::default(),
            fingerprint: 0,
            happened: 0,
        };
        world.begin_chaos();
        world
    }

    /// Makes the node known.
    pub fn meet(&mut self, node: NodeId) {
        while self.nodes.len() <= node.0 as usize {
            self.nodes.push(Node { state: NodeState::Running, slowness: 1, deferred: Vec::new() });
        }
    }

    pub fn advance_to(&mut self, now_ns: u64) {
        while let Some((at_ns, due)) = self.agenda.take(now_ns) {
            self.now_ns = self.now_ns.max(at_ns);
            self.happen(due);
        }
        self.now_ns = self.now_ns.max(now_ns);
    }

    fn happen(&mut self, due: Due) {
        self.happened += 1;
        if let Some(node) = self.whose(&due) {
            match self.nodes[node.0 as usize].state {
                NodeState::Running => {}
                // The timers and system calls of a stopped process come when it continues.
                NodeState::Stopped => return self.nodes[node.0 as usize].deferred.push(due),
                NodeState::Dead => return,
            }
        }
        self.note_fingerprint(&due);
        match due {
            Due::Wake(end) => self.wake(end),
            Due::Leave { from, slot, serial } => self.leave(from, slot, serial),
            Due::Drained(end) => self.finish_close(end),
            Due::Fails { end, cause } => self.fail(end, cause),
            Due::ConnectTimeout(end) => {
                if self.lane(end).state == State::Connecting {
                    self.begin_close(end, DownCause::ConnectTimedOut, true);
                }
            }
            Due::Silence { end, partition } => {
                let remote = self.lane(end).remote;
                let apart = remote.is_some_and(|remote| {
                    self.partition(self.node_of(end), self.node_of(remote)) == Some(partition)
                });
                if apart && self.lane(end).state == State::Up {
                    self.fail(end, DownCause::Broken { call: "send", errno: ETIMEDOUT });
                }
            }
            Due::PeerDied(end) => {
                self.lane_mut(end).peer_has_stopped = true;
                self.begin_close(end, DownCause::PeerDied, false);
                self.peer_stopped(end);
            }
            Due::StreamWake { stream, sender } => self.stream_wake(stream, sender),
            Due::Dialled { stream } => self.dialled(stream),
            Due::Answered { stream } => self.answered(stream),
            Due::StreamFails { stream, end } => self.stream_fails(stream, end),
            Due::StreamSilence { stream, partition } => self.stream_silence(stream, partition),
            Due::Datagram { slot } => self.datagram_arrives(slot),
            Due::Chaos(fault) => self.chaos(fault),
            Due::Heals(one, other) => self.heal(one, other),
            Due::Continues(node) => self.cont(node),
            Due::Recovers(node) => self.set_slowness(node, 1),
        }
    }

    /// The node whose process does this, for what stops with the process.
    fn whose(&self, due: &Due) -> Option<NodeId> {
        match *due {
            Due::Leave { from: end, .. }
            | Due::Drained(end)
            | Due::Fails { end, .. }
            | Due::ConnectTimeout(end)
            | Due::Silence { end, .. }
            | Due::PeerDied(end) => Some(self.node_of(end)),
            _ => None,
        }
    }

    fn note_fingerprint(&mut self, due: &Due) {
        let (kind, detail) = match *due {
            Due::Wake(end) => (1, end_bits(end)),
            Due::Leave { from, serial, .. } => (2, end_bits(from) ^ mix(serial)),
            Due::Drained(end) => (3, end_bits(end)),
            Due::Fails { end, .. } => (4, end_bits(end)),
            Due::ConnectTimeout(end) => (5, end_bits(end)),
            Due::Silence { end, partition } => (6, end_bits(end) ^ mix(partition)),
            Due::PeerDied(end) => (7, end_bits(end)),
            Due::StreamWake { stream, sender } => (8, u64::from(stream) << 1 | u64::from(sender)),
            Due::Dialled { stream } => (9, stream.into()),
            Due::Answered { stream } => (10, stream.into()),
            Due::StreamFails { stream, end } => (11, u64::from(stream) << 1 | u64::from(end)),
            Due::StreamSilence { stream, partition } => (12, u64::from(stream) ^ mix(partition)),
            Due::Datagram { slot } => (13, slot.into()),
            Due::Chaos(fault) => (14, fault as u64),
            Due::Heals(one, other) => (15, u64::from(one.0) << 32 | u64::from(other.0)),
            Due::Continues(node) => (16, node.0.into()),
            Due::Recovers(node) => (17, node.0.into()),
        };
        self.fold(kind);
        self.fold(detail);
        self.fold(self.now_ns);
    }

    /// Makes the fingerprint depend on `word` too.
    pub fn fold(&mut self, word: u64) {
        self.fingerprint = mix(self.fingerprint.rotate_left(5) ^ word).wrapping_add(word);
    }

    /// How long a message takes from one node to another.
    pub fn delay_ns(&mut self, from: NodeId, to: NodeId) -> u64 {
        let slowness = |node: NodeId| self.nodes[node.0 as usize].slowness;
        let slowness = slowness(from).max(slowness(to));
        self.rng.within(self.options.delay).saturating_mul(slowness)
    }

    pub fn node_of(&self, end: End) -> NodeId {
        self.ports[end.port as usize].node
    }

    pub fn is_stopped(&self, node: NodeId) -> bool {
        self.nodes[node.0 as usize].state == NodeState::Stopped
    }

    pub fn are_apart(&self, one: NodeId, other: NodeId) -> bool {
        !self.partitions.is_empty() && self.partition(one, other).is_some()
    }

    /// The number of the partition between two nodes.
    pub fn partition(&self, one: NodeId, other: NodeId) -> Option<u64> {
        let pair = (one.min(other), one.max(other));
        self.partitions.iter().find(|&&(a, b, _)| (a, b) == pair).map(|&(_, _, number)| number)
    }

    pub fn port_at(&self, port: u32) -> &PortState {
        &self.ports[port as usize]
    }

    /// A lane that is known to exist.
    pub fn lane(&self, end: End) -> &Lane {
        &self.ports[end.port as usize].lanes[end.lane.0 as usize]
    }

    /// A lane that is known to exist.
    pub fn lane_mut(&mut self, end: End) -> &mut Lane {
        &mut self.ports[end.port as usize].lanes[end.lane.0 as usize]
    }

    /// A lane that a caller names.
    pub fn known_lane(&self, end: End) -> Result<&Lane> {
        let lanes = &self.ports[end.port as usize].lanes;
        lanes.get(end.lane.0 as usize).ok_or(Error::UnknownLane { lane: end.lane })
    }

    pub fn region(&self, port: u32, region: LocalId) -> Option<&Region> {
        self.ports[port as usize].regions.get(region.0 as usize)?.as_ref()
    }

    pub fn has_news(&self, node: NodeId) -> bool {
        let at_port = |port: &PortState| port.node == node && !port.events.is_empty();
        self.ports.iter().any(at_port) || self.has_stream_events(node)
    }

    pub fn push_event(&mut self, port: u32, event: Event) {
        let port = &mut self.ports[port as usize];
        if port.life == Life::Alive {
            port.events.push_back(event);
        }
    }

    /// The port's owner lets go of it: its lanes are closed, its memory is no more.
    pub fn drop_port(&mut self, port: u32) {
        if self.ports[port as usize].life != Life::Alive {
            return;
        }
        for end in self.ends_of(port) {
            if matches!(self.lane(end).state, State::Connecting | State::Up)
                && let Some(remote) = self.lane(end).remote
            {
                self.cut(end);
                self.tell(end, remote, Kind::Close { broken: false });
            }
        }
        self.bury(port, Life::Dropped);
    }

    /// Nothing of the port is left but the messages that have left it.
    pub fn bury(&mut self, port: u32, life: Life) {
        let port = &mut self.ports[port as usize];
        port.life = life;
        port.regions.clear();
        port.grants = GrantTable::new();
        port.events.clear();
        for lane in &mut port.lanes {
            lane.state = State::Down;
            lane.parts.clear();
            lane.attachments.clear();
        }
    }

    pub fn ends_of(&self, port: u32) -> Vec<End> {
        let lanes = self.ports[port as usize].lanes.len() as u32;
        (0..lanes).map(|lane| End { port, lane: crossdock_transport::LaneId(lane) }).collect()
    }
}

fn end_bits(end: End) -> u64 {
    u64::from(end.port) << 32 | u64::from(end.lane.0)
}
