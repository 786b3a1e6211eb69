//! What goes wrong: on request of the fabric's owner, or by itself.

use crossdock_transport::DownCause;

use crate::events::Due;
use crate::lane::{ECONNRESET, ETIMEDOUT, State};
use crate::options::{Between, Chaos, Semantics};
use crate::wire::{End, Kind};
use crate::world::{Life, NodeId, NodeState, World};

/// A kind of fault that comes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    LaneLoss,
    StreamLoss,
    Partition,
    Stop,
    Slow,
}

impl World {
    /// The process of a node is killed. What its devices have sent still travels.
    pub fn kill(&mut self, node: NodeId) {
        self.meet(node);
        if self.nodes[node.0 as usize].state == NodeState::Dead {
            return;
        }
        self.nodes[node.0 as usize].state = NodeState::Dead;
        self.nodes[node.0 as usize].deferred.clear();
        for port in self.ports_of(node) {
            let mut peers = Vec::new();
            for end in self.ends_of(port) {
                self.refuse_early(end);
                if matches!(self.lane(end).state, State::Connecting | State::Up | State::Closing { .. }) {
                    self.cut(end);
                    peers.extend(self.lane(end).remote.map(|remote| (end, remote)));
                }
            }
            self.bury(port, Life::Killed);
            for (end, remote) in peers {
                if self.is_end(remote) && self.lane(remote).remote == Some(end) {
                    self.mourn(end, remote);
                }
            }
        }
        self.kill_net(node);
        // What was held up while the process was stopped has nobody to wait for any more.
        self.wake_all();
    }

    /// The peer of an end whose process died finds out, or not.
    fn mourn(&mut self, end: End, remote: End) {
        match self.port_at(end.port).options.semantics {
            // The kernel of the dead process resets its connections, behind what it has sent.
            Semantics::Checked => self.tell(end, remote, Kind::Close { broken: true }),
            // Nobody answers any more.
            Semantics::Verbs | Semantics::Fabric => {
                let cause = DownCause::Broken { call: "send", errno: ETIMEDOUT };
                let at_ns = self.now_ns + self.options.silence_ns;
                self.agenda.schedule(at_ns, Due::Fails { end: remote, cause });
            }
            Semantics::Mapped => self.notice_death(remote),
        }
    }

    /// A dead node gets a new process, without ports.
    pub fn restart(&mut self, node: NodeId) {
        self.meet(node);
        let node = &mut self.nodes[node.0 as usize];
        if node.state == NodeState::Dead {
            node.state = NodeState::Running;
        }
    }

    /// The process of a node stops wherever it is.
    pub fn stop(&mut self, node: NodeId) {
        self.meet(node);
        let node = &mut self.nodes[node.0 as usize];
        if node.state == NodeState::Running {
            node.state = NodeState::Stopped;
        }
    }

    /// A stopped process continues, and does what it was about to do.
    pub fn cont(&mut self, node: NodeId) {
        self.meet(node);
        let state = &mut self.nodes[node.0 as usize];
        if state.state != NodeState::Stopped {
            return;
        }
        state.state = NodeState::Running;
        let deferred = std::mem::take(&mut state.deferred);
        let soon = self.now_ns + self.rng.within(self.options.delay);
        for due in deferred {
            self.agenda.schedule(soon, due);
        }
        self.wake_all();
    }

    /// Nothing passes between two nodes from now on. What is on its way waits.
    pub fn begin_partition(&mut self, one: NodeId, other: NodeId) {
        self.meet(one);
        self.meet(other);
        if one == other || self.partition(one, other).is_some() {
            return;
        }
        self.partitions_begun += 1;
        self.partitions.push((one.min(other), one.max(other), self.partitions_begun));
        for (end, remote) in self.ends_between(one, other) {
            self.watch_partition(end, remote);
        }
        self.streams_between(one, other).into_iter().for_each(|stream| self.watch_stream(stream));
    }

    /// Two nodes reach each other again.
    pub fn heal(&mut self, one: NodeId, other: NodeId) {
        let pair = (one.min(other), one.max(other));
        self.partitions.retain(|&(a, b, _)| (a, b) != pair);
        self.wake_all();
        for stream in self.streams_between(one, other) {
            for sender in [0, 1] {
                let soon = self.now_ns + self.rng.within(self.options.delay);
                self.agenda.schedule(soon, Due::StreamWake { stream, sender });
            }
        }
    }

    /// If the lane crosses a partition, its end gives up after a while.
    pub fn watch_partition(&mut self, end: End, remote: End) {
        let crosses = self.port_at(end.port).options.semantics != Semantics::Mapped;
        let (here, there) = (self.node_of(end), self.node_of(remote));
        if let Some(partition) = self.partition(here, there).filter(|_| crosses) {
            let patience = self.patience_ns();
            self.agenda.schedule(self.now_ns + patience, Due::Silence { end, partition });
        }
    }

    /// How long an end bears silence; the two ends of a lane differ.
    pub fn patience_ns(&mut self) -> u64 {
        let silence_ns = self.options.silence_ns;
        self.rng.within(Between { least_ns: silence_ns / 2, most_ns: silence_ns })
    }

    pub fn set_slowness(&mut self, node: NodeId, times: u64) {
        self.meet(node);
        self.nodes[node.0 as usize].slowness = times.max(1);
    }

    /// A lane breaks: each end finds out by itself. Mapped memory cannot break, so there one end gives up.
    pub fn break_lane(&mut self, end: End) {
        let Some(remote) = self.lane(end).remote.filter(|_| self.lane(end).state == State::Up) else {
            return;
        };
        let cause = DownCause::Broken { call: "recv", errno: ECONNRESET };
        if self.port_at(end.port).options.semantics.is_mapped() {
            return self.agenda.schedule(self.now_ns, Due::Fails { end, cause });
        }
        for end in [end, remote] {
            let notice = self.rng.within(self.options.delay);
            self.agenda.schedule(self.now_ns + notice, Due::Fails { end, cause });
        }
    }

    /// The way between two ports fails: their lanes break, and none comes up any more.
    pub fn cut_rail(&mut self, one: u32, other: u32) {
        let pair = (one.min(other), one.max(other));
        if !self.cut_rails.contains(&pair) {
            self.cut_rails.push(pair);
        }
        for end in self.ends_of(one) {
            if self.lane(end).remote.is_some_and(|remote| remote.port == other) {
                self.break_lane(end);
            }
        }
    }

    /// Lanes between two ports come up again.
    pub fn mend_rail(&mut self, one: u32, other: u32) {
        let pair = (one.min(other), one.max(other));
        self.cut_rails.retain(|cut| *cut != pair);
    }

    pub fn is_rail_cut(&self, one: End, other: End) -> bool {
        self.cut_rails.contains(&(one.port.min(other.port), one.port.max(other.port)))
    }

    /// Ends every fault, and begins no more.
    pub fn calm(&mut self) {
        self.options.chaos = Chaos::default();
        self.cut_rails.clear();
        for (one, other, _) in self.partitions.clone() {
            self.heal(one, other);
        }
        for node in (0..self.nodes.len() as u32).map(NodeId) {
            self.set_slowness(node, 1);
            self.cont(node);
        }
    }

    pub fn begin_chaos(&mut self) {
        for fault in [Fault::LaneLoss, Fault::StreamLoss, Fault::Partition, Fault::Stop, Fault::Slow] {
            self.schedule_chaos(fault);
        }
    }

    /// A fault that comes by itself.
    pub fn chaos(&mut self, fault: Fault) {
        if self.mean_ns(fault) == 0 {
            return;
        }
        self.schedule_chaos(fault);
        let until = self.now_ns + self.rng.within(self.options.chaos.duration);
        match (fault, self.some_node()) {
            (Fault::LaneLoss, _) => {
                if let Some(end) = self.some_lane() {
                    self.break_lane(end);
                }
            }
            (Fault::StreamLoss, Some(one)) => {
                if let Some(other) = self.some_node() {
                    self.break_streams(one, other);
                }
            }
            (Fault::Partition, Some(one)) => {
                if let Some(other) = self.some_node() {
                    self.begin_partition(one, other);
                    self.agenda.schedule(until, Due::Heals(one, other));
                }
            }
            (Fault::Stop, Some(node)) => {
                self.stop(node);
                self.agenda.schedule(until, Due::Continues(node));
            }
            (Fault::Slow, Some(node)) => {
                self.set_slowness(node, 16);
                self.agenda.schedule(until, Due::Recovers(node));
            }
            (_, None) => {}
        }
    }

    fn schedule_chaos(&mut self, fault: Fault) {
        let mean_ns = self.mean_ns(fault);
        if mean_ns > 0 {
            let wait = self.rng.within(Between { least_ns: mean_ns / 2, most_ns: mean_ns + mean_ns / 2 });
            self.agenda.schedule(self.now_ns + wait.max(1), Due::Chaos(fault));
        }
    }

    fn mean_ns(&self, fault: Fault) -> u64 {
        let chaos = &self.options.chaos;
        match fault {
            Fault::LaneLoss => chaos.lane_loss_ns,
            Fault::StreamLoss => chaos.stream_loss_ns,
            Fault::Partition => chaos.partition_ns,
            Fault::Stop => chaos.stop_ns,
            Fault::Slow => chaos.slow_ns,
        }
    }

    fn some_node(&mut self) -> Option<NodeId> {
        let nodes = self.nodes.len() as u64;
        (nodes > 0).then(|| NodeId(self.rng.below(nodes) as u32))
    }

    fn some_lane(&mut self) -> Option<End> {
        let up: Vec<End> = (0..self.ports.len() as u32)
            .flat_map(|port| self.ends_of(port))
            .filter(|&end| self.lane(end).state == State::Up)
            .collect();
        (!up.is_empty()).then(|| up[self.rng.below(up.len() as u64) as usize])
    }

    /// What was held up goes on, each lane after a time of its own.
    fn wake_all(&mut self) {
        for end in (0..self.ports.len() as u32).flat_map(|port| self.ends_of(port)).collect::<Vec<_>>() {
            if !self.lane(end).wire.is_empty() {
                let soon = self.now_ns + self.rng.within(self.options.delay);
                self.agenda.schedule(soon, Due::Wake(end));
            }
        }
    }

    fn is_end(&self, end: End) -> bool {
        self.ports.get(end.port as usize).is_some_and(|port| (end.lane.0 as usize) < port.lanes.len())
    }

    fn ports_of(&self, node: NodeId) -> Vec<u32> {
        let ports = 0..self.ports.len() as u32;
        ports.filter(|&port| self.port_at(port).node == node).collect()
    }

    /// The ends at either of two nodes whose other end is at the other, with their other ends.
    fn ends_between(&self, one: NodeId, other: NodeId) -> Vec<(End, End)> {
        let mut ends = Vec::new();
        for (here, there) in [(one, other), (other, one)] {
            for end in self.ports_of(here).into_iter().flat_map(|port| self.ends_of(port)) {
                let remote = self.lane(end).remote.filter(|&remote| self.node_of(remote) == there);
                ends.extend(remote.map(|remote| (end, remote)));
            }
        }
        ends
    }
}
