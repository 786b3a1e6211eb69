//! The faults, one at a time, and for how long each troubles whom.

use crossdock_sim::{LaneView, NodeId};

use crate::scenario::{MS, US};
use crate::world::{Event, World};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A lane breaks, or several between two nodes, soon after each other.
    LaneLoss,
    /// A rail between two nodes fails: its lanes break, and for a while none comes up there.
    RailLoss,
    /// All control streams between two nodes break.
    StreamLoss,
    /// Two nodes do not reach each other.
    Partition,
    /// A process is stopped, and continues.
    Stop,
    /// A process's loop is held up, while its heart beats on.
    HeldLoop,
    /// Everything from and to a node takes longer.
    Slowness,
    /// A process dies, and starts again.
    Death,
    /// A process ends in order, and starts again.
    Leaving,
    /// A process gives up a peer that it has dialed, and dials it again.
    Disconnect,
    /// Something that an earlier life of a peer said comes again in its present one.
    Echo,
    /// What peers say to a process is delayed, while its lanes go on.
    Delay,
    /// A peer that has mapped a process's memory stores under a grant that was taken back. It does not come by itself:
    /// the others bring it about.
    GhostWrite,
}

impl Fault {
    pub const ALL: [Fault; 13] = [
        Fault::LaneLoss,
        Fault::RailLoss,
        Fault::StreamLoss,
        Fault::Partition,
        Fault::Stop,
        Fault::HeldLoop,
        Fault::Slowness,
        Fault::Death,
        Fault::Leaving,
        Fault::Disconnect,
        Fault::Echo,
        Fault::Delay,
        Fault::GhostWrite,
    ];

    /// Those that come by themselves.
    pub fn coming() -> &'static [Fault] {
        &Self::ALL[..12]
    }
}

/// A fault that has come, whom it troubles, and from when until when.
#[derive(Clone, Debug)]
pub struct Trouble {
    pub fault: Fault,
    pub nodes: Vec<usize>,
    pub from_ns: u64,
    pub until_ns: u64,
}

impl World {
    /// One of the seed's faults comes.
    pub fn fault(&mut self) {
        let faults = self.scenario.faults.clone();
        let fault = *self.chance.pick(&faults);
        let nodes = self.nodes.len() as u64;
        let one = self.chance.below(nodes) as usize;
        let other = (one + 1 + self.chance.below(nodes - 1) as usize) % nodes as usize;
        let lasts_ns = match self.chance.below(3) {
            0 => self.chance.within(50 * US..500 * US),
            1 => self.chance.within(500 * US..4 * MS),
            _ => self.chance.within(4 * MS..16 * MS),
        };
        let until_ns = self.now_ns + lasts_ns;
        let (at, id) = (self.now_ns, |node: usize| NodeId(node as u32));
        let troubled = match fault {
            Fault::LaneLoss => {
                let lanes = self.fabric.lanes();
                if lanes.is_empty() {
                    return;
                }
                let lane = *self.chance.pick(&lanes);
                self.fabric.break_lane(lane.port, lane.lane);
                let is_between = |also: &&LaneView| (also.node, also.peer) == (lane.node, lane.peer);
                for also in lanes.iter().filter(is_between) {
                    if self.chance.one_in(2) {
                        let later_ns = self.now_ns + self.chance.below(150 * US);
                        self.schedule(later_ns, Event::Breaks(also.port, also.lane));
                    }
                }
                vec![lane.node.0 as usize, lane.peer.0 as usize]
            }
            Fault::RailLoss => {
                let lanes = self.fabric.lanes();
                if lanes.is_empty() {
                    return;
                }
                let LaneView { port, peer_port, node, peer, .. } = *self.chance.pick(&lanes);
                self.fabric.cut_rail(port, peer_port);
                self.schedule(until_ns, Event::Mends(port, peer_port));
                vec![node.0 as usize, peer.0 as usize]
            }
            Fault::StreamLoss => {
                self.fabric.break_streams(id(one), id(other));
                vec![one, other]
            }
            Fault::Partition => {
                self.fabric.partition(id(one), id(other));
                self.schedule(until_ns, Event::Heals(one, other));
                vec![one, other]
            }
            Fault::Stop => {
                if !self.fabric.is_running(id(one)) {
                    return;
                }
                self.fabric.stop(id(one));
                self.schedule(until_ns, Event::Continues(one));
                vec![one]
            }
            Fault::HeldLoop => {
                // Once held, it gets a turn before it is held again: faults that come close together would never let go.
                if self.nodes[one].held_until_ns > at {
                    return;
                }
                self.nodes[one].held_until_ns = until_ns;
                vec![one]
            }
            Fault::Slowness => {
                self.fabric.slow(id(one), 16);
                self.schedule(until_ns, Event::Recovers(one));
                vec![one]
            }
            Fault::Death => {
                if !self.kill(one) {
                    return;
                }
                self.schedule(until_ns, Event::Restarts(one));
                vec![one]
            }
            Fault::Leaving => {
                if !self.begin_leaving(one) {
                    return;
                }
                self.schedule(until_ns, Event::Restarts(one));
                vec![one]
            }
            Fault::Disconnect => {
                let Some(peer) = self.disconnect(one) else { return };
                let life = self.nodes[one].life;
                self.schedule(until_ns, Event::Dials(one, life, peer));
                vec![one, peer]
            }
            Fault::Echo => {
                let mut order: Vec<usize> = (0..self.nodes.len()).collect();
                self.chance.shuffle(&mut order);
                let echoed = order.into_iter().find(|&node| {
                    let process = self.nodes[node].process.as_ref();
                    process.is_some_and(|process| process.wire.lock().echo(&mut self.chance))
                });
                let Some(node) = echoed else { return };
                vec![node]
            }
            Fault::Delay => {
                let Some(process) = &self.nodes[one].process else { return };
                process.wire.lock().deaf_until_ns = until_ns;
                self.schedule(until_ns, Event::Nothing);
                vec![one]
            }
            Fault::GhostWrite => return,
        };
        self.log(|| format!("fault {fault:?} troubles {troubled:?} for {} us", lasts_ns / US));
        self.troubles.push(Trouble { fault, nodes: troubled, from_ns: at, until_ns });
    }

    /// Ends all faults: what is stopped continues, what is held goes on, what is apart meets again.
    pub fn calm(&mut self) {
        self.log(|| "calm".into());
        self.is_calm = true;
        self.fabric.calm();
        for node in &mut self.nodes {
            node.held_until_ns = 0;
            if let Some(process) = &node.process {
                process.wire.lock().deaf_until_ns = 0;
            }
        }
        let now_ns = self.now_ns;
        for trouble in &mut self.troubles {
            trouble.until_ns = trouble.until_ns.min(now_ns);
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].process.is_none() && self.chance.one_in(2) {
                self.restart(node);
            }
            for peer in self.scenario.nodes[node].dials.clone() {
                self.dial(node, peer);
            }
        }
    }
}
