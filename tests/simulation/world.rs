//! One run: the clock, the nodes' turns, and what happens when.

use std::collections::BTreeMap;

use crossdock_flight::Dump;
use crossdock_kv::Turn;
use crossdock_sim::{Fabric, NodeId, PortId};
use crossdock_transport::LaneId;

use crate::chance::{Chance, mix};
use crate::faults::Trouble;
use crate::node::{Node, Process};
use crate::room::{Part, Room};
use crate::rules::{Held, Rule, broken};
use crate::scenario::{MS, Scenario, US};

/// Everything of one run.
pub struct World {
    pub scenario: Scenario,
    pub fabric: Fabric,
    pub chance: Chance,
    pub now_ns: u64,
    pub nodes: Vec<Node>,
    pub rooms: Vec<Room>,
    /// How often each room number was used.
    pub uses: BTreeMap<u64, u32>,
    pub troubles: Vec<Trouble>,
    pub is_calm: bool,
    /// Peers are disconnected on purpose.
    pub is_closing: bool,
    pub turns: u64,
    /// How much of the agenda has happened.
    happened: u64,
    agenda: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
    fingerprint: u64,
    pub is_logged: bool,
    /// What the flight recorders of processes that are gone held, if it is to be told.
    pub past: Option<Vec<Dump>>,
}

/// What is going to happen outside the fabric.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    PlanRoom,
    Open(usize, Part),
    /// A prefill rank of a room goes on.
    Step(usize, usize),
    Cancel(usize, Part),
    Scribble(usize, usize),
    DropTicket(usize, usize),
    Fault,
    Breaks(PortId, LaneId),
    Mends(PortId, PortId),
    Heals(usize, usize),
    Continues(usize),
    Recovers(usize),
    Restarts(usize),
    /// A node dials a peer again, if it lives the same life.
    Dials(usize, u64, usize),
    Beat(usize, u64),
    Nothing,
}

/// What a run was like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Depends on everything that has happened.
    pub fingerprint: u64,
    /// Events of the network, turns of the nodes, and what users and faults have done.
    pub events: u64,
    pub virtual_ns: u64,
    pub nodes: usize,
    pub meetings: crate::report::Meetings,
    pub fair: crate::report::Fair,
}

impl World {
    pub fn new(seed: u64, is_logged: bool) -> Self {
        let scenario = Scenario::new(seed);
        let fabric = Fabric::new(seed, scenario.fabric.clone());
        let nodes = scenario.nodes.iter();
        let node =
            || Node { life: 0, process: None, held_until_ns: 0, sides: Vec::new(), full: Default::default() };
        let nodes = nodes.map(|_| node());
        let mut world = Self {
            fabric,
            chance: Chance::new(seed ^ 0x0072_756e),
            now_ns: 0,
            nodes: nodes.collect(),
            rooms: Vec::new(),
            uses: BTreeMap::new(),
            troubles: Vec::new(),
            is_calm: false,
            is_closing: false,
            turns: 0,
            happened: 0,
            agenda: BTreeMap::new(),
            scheduled: 0,
            fingerprint: 0,
            is_logged,
            past: None,
            scenario,
        };
        for node in 0..world.nodes.len() {
            world.begin_process(node);
        }
        world
    }

    /// Runs from the first dial to the last goodbye.
    pub fn run(&mut self) -> Result<Outcome, crate::rules::Violation> {
        let start_ns = match self.scenario.is_fair() {
            true => 6 * MS,
            false => self.chance.within(0..2 * MS),
        };
        self.schedule(start_ns, Event::PlanRoom);
        if !self.scenario.is_fair() {
            let gap_ns = self.scenario.fault_gap_ns;
            let first_ns = self.chance.within(0..2 * gap_ns);
            self.schedule(first_ns, Event::Fault);
        }
        while !self.has_planned_all() {
            self.step()?;
        }
        let more_ns = self.chance.within(0..3 * MS);
        self.run_until(self.now_ns + more_ns)?;
        self.calm();
        let fair = self.come_to_rest()?;
        Ok(Outcome {
            fingerprint: self.fingerprint ^ self.fabric.fingerprint(),
            events: self.events(),
            virtual_ns: self.now_ns,
            nodes: self.nodes.len(),
            meetings: crate::report::Meetings::of(&self.troubles, &self.rooms),
            fair,
        })
    }

    /// Events of the network, turns of the nodes, and what users and faults have done, so far.
    fn events(&self) -> u64 {
        self.fabric.happened() + self.turns + self.happened
    }

    /// Whether as many rooms were planned as the seed asks for, or more, until enough has happened.
    pub fn has_planned_all(&self) -> bool {
        self.rooms.len() >= self.scenario.rooms as usize && self.events() >= LEAST_EVENTS
    }

    pub fn run_until(&mut self, at_ns: u64) -> Held {
        self.schedule(at_ns, Event::Nothing);
        while self.now_ns < at_ns {
            self.step()?;
        }
        Ok(())
    }

    /// Moves on to whatever comes next.
    pub fn step(&mut self) -> Held {
        let agenda_ns = self.agenda.first_key_value().map(|((at_ns, _), _)| *at_ns);
        let runnable = |node: &usize| self.can_turn(*node);
        let wakes = (0..self.nodes.len()).filter(runnable).filter_map(|node| self.wake_ns(node));
        let next_ns = [agenda_ns, self.fabric.next_event_ns(), wakes.min()].into_iter().flatten().min();
        let Some(next_ns) = next_ns else {
            return broken(Rule::Leftovers, "nothing will ever happen again");
        };
        self.now_ns = self.now_ns.max(next_ns);
        self.fabric.advance_to(self.now_ns);
        self.check_landings()?;
        while let Some((&(at_ns, serial), _)) = self.agenda.first_key_value() {
            if at_ns > self.now_ns {
                break;
            }
            let event = self.agenda.remove(&(at_ns, serial)).expect("found before");
            self.happen(event)?;
        }
        let mut order: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.can_turn(node)).collect();
        self.chance.shuffle(&mut order);
        for node in order {
            // The one before may have ended this one's process.
            if self.can_turn(node) {
                self.hear_news(node);
                if self.wake_ns(node).is_some_and(|wake_ns| wake_ns <= self.now_ns) {
                    self.turn(node)?;
                }
            }
        }
        Ok(())
    }

    fn can_turn(&self, node: usize) -> bool {
        let held = self.nodes[node].held_until_ns > self.now_ns;
        self.nodes[node].process.is_some() && !held && self.fabric.is_running(NodeId(node as u32))
    }

    fn wake_ns(&self, node: usize) -> Option<u64> {
        self.nodes[node].process.as_ref().map(|process| process.wake_ns)
    }

    /// What has come for a node wakes its loop, at once or a little later.
    fn hear_news(&mut self, node: usize) {
        let Some(process) = &mut self.nodes[node].process else { return };
        if process.wake_ns <= self.now_ns {
            return;
        }
        let has_news = self.fabric.has_news(NodeId(node as u32)) || process.wire.lock().has_news();
        if has_news {
            let late_ns = match process.wire.lock().is_deaf() {
                // What it does not hear yet would wake it again and again.
                true => 20 * US,
                false if self.chance.one_in(2) => 0,
                false => self.chance.below(3 * US),
            };
            process.wake_ns = process.wake_ns.min(self.now_ns + late_ns);
        }
    }

    fn turn(&mut self, node: usize) -> Held {
        let now_ns = self.now_ns;
        self.turns += 1;
        let begun = self.start_deadlines(node);
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        process.turns += 1;
        let before = process.held();
        if self.is_logged {
            println!("{:>9}.{:03} us  node {node}", now_ns / US, now_ns % US);
        }
        let turn = process.worker.turn(now_ns);
        self.note_full(node, begun, before);
        self.check_landings()?;
        self.fold(mix(now_ns << 8 | (node as u64) << 2 | turn as u64));
        self.check_turn(node)?;
        if turn == Turn::Stopped {
            self.end_process(node);
            return Ok(());
        }
        let busy_ns = self.chance.within(200..4 * US);
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        process.wake_ns = match turn {
            Turn::Active => now_ns + busy_ns,
            // As a thread sleeps that is not sure that everybody can wake it.
            _ => {
                let deadline_ns = process.worker.next_deadline_ns().unwrap_or(u64::MAX);
                deadline_ns.max(now_ns + 1).min(now_ns + LONGEST_SLEEP_NS)
            }
        };
        Ok(())
    }

    /// Lets a node's loop look soon: somebody has called into it.
    pub fn ring(&mut self, node: usize) {
        let now_ns = self.now_ns;
        if let Some(process) = &mut self.nodes[node].process {
            process.wake_ns = process.wake_ns.min(now_ns);
        }
    }

    pub fn schedule(&mut self, at_ns: u64, event: Event) {
        self.scheduled += 1;
        self.agenda.insert((at_ns, self.scheduled), event);
    }

    fn happen(&mut self, event: Event) -> Held {
        self.happened += 1;
        let id = |node: usize| NodeId(node as u32);
        match event {
            Event::PlanRoom => self.plan_room(),
            Event::Open(room, Part::Decode(nth)) => self.open_decode(room, nth)?,
            Event::Open(room, Part::Prefill(nth)) => self.open_prefill(room, nth)?,
            Event::Step(room, nth) => self.step_room(room, nth)?,
            Event::Cancel(room, part) => self.cancel(room, part),
            Event::Scribble(room, nth) => self.scribble(room, nth),
            Event::DropTicket(room, nth) => {
                // Without pages nobody could see when they come home.
                if let Some(decode) =
                    self.rooms[room].decodes[nth].as_mut().filter(|d| !d.side.pages.is_empty())
                {
                    decode.drop_pages_ticket();
                }
            }
            Event::Fault => {
                if !self.is_calm {
                    self.fault();
                    let gap_ns = self.scenario.fault_gap_ns;
                    let next_ns = self.now_ns + self.chance.within(gap_ns / 4..gap_ns * 2);
                    self.schedule(next_ns, Event::Fault);
                }
            }
            Event::Breaks(port, lane) => self.fabric.break_lane(port, lane),
            Event::Mends(one, other) => self.fabric.mend_rail(one, other),
            Event::Heals(one, other) => self.fabric.heal(id(one), id(other)),
            Event::Continues(node) => self.fabric.cont(id(node)),
            Event::Recovers(node) => self.fabric.slow(id(node), 1),
            Event::Restarts(node) => {
                if !self.is_calm {
                    self.restart(node);
                }
            }
            Event::Dials(node, life, peer) => {
                if self.nodes[node].life == life {
                    self.dial(node, peer);
                }
            }
            Event::Beat(node, life) => {
                let (now_ns, runs) = (self.now_ns, self.fabric.is_running(id(node)));
                if let Some(process) =
                    self.nodes[node].process.as_ref().filter(|_| life == self.nodes[node].life)
                {
                    if runs {
                        process.wire.lock().beat(now_ns);
                    }
                    self.schedule(now_ns + BEAT_NS, Event::Beat(node, life));
                }
            }
            Event::Nothing => {}
        }
        Ok(())
    }

    // --- processes -------------------------------------------------------------------------------------------

    fn begin_process(&mut self, node: usize) {
        self.nodes[node].life += 1;
        let life = self.nodes[node].life;
        self.log(|| format!("node {node} begins its life {life}"));
        let mut process = Process::begin(&self.fabric, &self.scenario, node, life).expect("a worker");
        process.wake_ns = self.now_ns;
        self.nodes[node].process = Some(process);
        self.schedule(self.now_ns, Event::Beat(node, life));
    }

    /// The process of a node is killed. False: it has none.
    pub fn kill(&mut self, node: usize) -> bool {
        if self.nodes[node].process.is_none() {
            return false;
        }
        self.fabric.kill(NodeId(node as u32));
        self.end_process(node);
        true
    }

    /// The process of a node is asked to end in order.
    pub fn begin_leaving(&mut self, node: usize) -> bool {
        let runs = self.fabric.is_running(NodeId(node as u32));
        let asked = match &self.nodes[node].process {
            Some(process) if runs => process.handle.stop().is_ok(),
            _ => false,
        };
        if asked {
            self.ring(node);
        }
        asked
    }

    /// A process gives up one of the peers that it dials. None: it dials nobody.
    pub fn disconnect(&mut self, node: usize) -> Option<usize> {
        let process = self.nodes[node].process.as_mut()?;
        let dialed: Vec<usize> = process.peers.keys().copied().collect();
        if dialed.is_empty() || !self.fabric.is_running(NodeId(node as u32)) {
            return None;
        }
        let peer = *self.chance.pick(&dialed);
        process.handle.disconnect(process.peers[&peer]).ok()?;
        process.peers.remove(&peer);
        self.ring(node);
        Some(peer)
    }

    /// A process dials a peer, now or as soon as it can.
    pub fn dial(&mut self, node: usize, peer: usize) {
        let runs = self.fabric.is_running(NodeId(node as u32));
        let life = self.nodes[node].life;
        let address = self.scenario.nodes[peer].address.clone();
        let Some(process) = &mut self.nodes[node].process else { return };
        if !runs || !process.dial(peer, &address) {
            let later_ns = self.now_ns + 50 * US;
            return self.schedule(later_ns, Event::Dials(node, life, peer));
        }
        self.ring(node);
    }

    /// Nothing of a node's process is left.
    fn end_process(&mut self, node: usize) {
        self.log(|| format!("node {node} is gone"));
        for (room, part) in std::mem::take(&mut self.nodes[node].sides) {
            if let Some(side) = self.rooms[room].side_mut(part) {
                side.is_settled = true;
            }
        }
        self.keep_records(node);
        self.nodes[node].process = None;
        self.nodes[node].held_until_ns = 0;
    }

    pub fn restart(&mut self, node: usize) {
        if self.nodes[node].process.is_none() {
            self.fabric.restart(NodeId(node as u32));
            self.begin_process(node);
        }
    }

    /// Whether the process that opened a side still runs.
    pub fn is_life(&self, node: usize, life: u64) -> bool {
        self.nodes[node].life == life && self.nodes[node].process.is_some()
    }

    // --- what is noted ---------------------------------------------------------------------------------------

    pub fn fold(&mut self, word: u64) {
        self.fingerprint = mix(self.fingerprint.rotate_left(7) ^ word);
    }

    pub fn log(&self, what: impl FnOnce() -> String) {
        if self.is_logged {
            println!("{:>9}.{:03} us  {}", self.now_ns / US, self.now_ns % US, what());
        }
    }
}

/// No run is shorter.
pub const LEAST_EVENTS: u64 = 2_000;

/// As long as a loop sleeps while a port may be full without being able to say when it is not.
const LONGEST_SLEEP_NS: u64 = 200 * US;

/// How often the heart's thread looks.
const BEAT_NS: u64 = 400 * US;
