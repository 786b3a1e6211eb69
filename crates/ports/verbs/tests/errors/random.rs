//! Random lives of three ports on a fabric that loses packets and links, fails calls, breaks queue pairs and kills
//! processes; the rules hold in each.
//!
//! A write of byte `b` to a slot of its own comes with the immediate that says so: when that arrives, the slot is full of `b`.
//! After a lane's `Down` its slots do not change any more. A token is told once, and only while its lane lives; a lane
//! ends once. In the end nothing leaks, and libibverbs was used by its rules.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::conformance::Rng;
use crossdock_transport::{
    Direction, Error, Event, Events, GrantId, LaneId, LaneTags, LocalId, Op, PeerId, Port, RemoteId,
    RemoteKey, Shape, Token,
};
use crossdock_verbs::fake::{Fabric, FabricOptions, Failure, Faults, Function, Pace};
use crossdock_verbs::{VerbsOptions, VerbsPort};

/// So many lives; `CROSSDOCK_VERBS_LIVES` says another number, `CROSSDOCK_VERBS_SEED` the first.
const LIVES: u64 = 60;

#[test]
fn rules_hold_whatever_the_devices_do() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let (first, lives) =
        (number("CROSSDOCK_VERBS_SEED").unwrap_or(0), number("CROSSDOCK_VERBS_LIVES").unwrap_or(LIVES));
    let mut sum = Told::default();
    for seed in first..first + lives {
        let told = Life::new(seed).live();
        sum.up += told.up;
        sum.down += told.down;
        sum.arrived += told.arrived;
        sum.done += told.done;
    }
    eprintln!("{lives} lives: {sum:?}");
    // Faults that leave nothing alive would prove nothing.
    if lives >= LIVES {
        assert!(sum.up > lives * 4 && sum.arrived > lives * 50 && sum.done > lives * 20, "{sum:?}");
    }
}

#[derive(Debug, Default)]
struct Told {
    up: u64,
    down: u64,
    arrived: u64,
    done: u64,
}

struct Life {
    fabric: Fabric,
    rng: Rng,
    seed: u64,
    sides: Vec<Side>,
    /// By side and lane.
    lanes: BTreeMap<(usize, LaneId), Lane>,
    next_slot: u64,
    told: Told,
}

struct Side {
    port: VerbsPort,
    events: Events,
    memory: Memory,
    local: LocalId,
    key: RemoteKey,
    /// What it has opened of the fabric.
    context: u32,
    /// Its process was killed: it says nothing any more, and nobody asks.
    is_dead: bool,
}

#[derive(Default)]
struct Lane {
    peer: usize,
    peer_lane: Option<LaneId>,
    remote: Option<RemoteId>,
    up: bool,
    down: bool,
    /// Tokens that were taken and not told.
    tokens: BTreeSet<u64>,
    /// Slots that the peer may write by this lane, and what they held when it went down.
    slots: BTreeSet<u64>,
    at_rest: BTreeMap<u64, Vec<u8>>,
}

const SLOT: u64 = 3000;
const SLOTS: u64 = 400;
const PORTS: usize = 3;

impl Life {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let lost_one_in = [0, 0, 200, 40][rng.below(4) as usize];
        let faults = Faults { lost_one_in };
        let pace = Pace::Stepped { most: 1 + rng.below(60) as u32 };
        let fabric = Fabric::new(FabricOptions { seed, pace, faults, ..FabricOptions::default() });
        let mut options = VerbsOptions::default();
        options.verbs = Some(fabric.verbs());
        options.connect_timeout = Duration::from_millis(30);
        options.close_timeout = Duration::from_millis(5);
        options.keepalive = Duration::from_millis(2);
        options.requests_per_lane = [3, 16, 200][rng.below(3) as usize];
        options.immediates_per_lane = [1, 5, 60][rng.below(3) as usize];
        // With 20, an op takes several calls of the library, and one that fails leaves a hole.
        options.request_bytes = [20, 700, 1 << 20][rng.below(3) as usize];
        options.retries = 2;
        let side = |at: usize| {
            let mut options = options.clone();
            options.device = Some(format!("fake{}", at % 2));
            let mut port = VerbsPort::open(options).expect("a port can be opened");
            let bytes = (SLOTS * SLOT) as usize;
            let memory = Memory::allocate(bytes, &AllocateOptions::default()).expect("memory for a test");
            let (local, key) = port.register(&memory).expect("memory can be registered");
            let context = fabric.contexts().last().expect("the port has one").id;
            Side { port, events: Events::with_capacity(16), memory, local, key, context, is_dead: false }
        };
        let sides = (0..PORTS).map(side).collect();
        Self { fabric, rng, seed, sides, lanes: BTreeMap::new(), next_slot: 0, told: Told::default() }
    }

    fn live(mut self) -> Told {
        for _ in 0..500 {
            match self.rng.below(40) {
                0..=2 => self.connect(),
                3..=20 => self.write(),
                21 => self.close(),
                22 => self.break_something(),
                _ => {}
            }
            self.poll();
        }
        self.end()
    }

    fn connect(&mut self) {
        let a = self.rng.below(PORTS as u64) as usize;
        let b = (a + 1 + self.rng.below(PORTS as u64 - 1) as usize) % PORTS;
        if self.sides[a].is_dead || self.sides[b].is_dead {
            return;
        }
        let mut open = |side: usize, peer: usize| {
            let opened = self.sides[side].port.open_lane(PeerId(peer as u32));
            let opened =
                opened.map_err(|error| assert!(matches!(error, Error::Os { .. }), "{error}")).ok()?;
            self.lanes.insert((side, opened.0), Lane { peer, ..Lane::default() });
            Some(opened)
        };
        let (Some((at_a, address_a)), Some((at_b, address_b))) = (open(a, b), open(b, a)) else { return };
        let tags = |ours, theirs| LaneTags { ours: [ours; 32], theirs: [theirs; 32] };
        self.lane(a, at_a).peer_lane = Some(at_b);
        self.lane(b, at_b).peer_lane = Some(at_a);
        let late = self.rng.below(4) == 0;
        for (side, lane, address, tags) in
            [(a, at_a, &address_b, tags(1, 2)), (b, at_b, &address_a, tags(2, 1))]
        {
            // A call that failed, and a lane that has ended meanwhile.
            if self.sides[side].port.connect(lane, address, &tags).is_err() {
                self.sides[side].port.close(lane);
            }
            for _ in 0..self.rng.below(30) * u64::from(late) {
                self.poll();
            }
        }
    }

    fn lane(&mut self, side: usize, lane: LaneId) -> &mut Lane {
        self.lanes.get_mut(&(side, lane)).expect("a lane of this life")
    }

    /// One write to a slot that nobody else writes.
    fn write(&mut self) {
        let up: Vec<(usize, LaneId)> =
            self.lanes.iter().filter(|(_, lane)| lane.up && !lane.down).map(|(&at, _)| at).collect();
        if up.is_empty() || self.next_slot == SLOTS {
            return;
        }
        let (side, id) = up[self.rng.below(up.len() as u64) as usize];
        if self.sides[side].is_dead {
            return;
        }
        let (peer, peer_lane) = (self.lane(side, id).peer, self.lane(side, id).peer_lane);
        let remote = match self.lane(side, id).remote {
            Some(remote) => remote,
            None => {
                let key = self.sides[peer].key.clone();
                match self.sides[side].port.attach(id, &key) {
                    Ok(attached) => *self.lane(side, id).remote.insert(attached.id),
                    Err(error) => return assert_eq!(error, Error::LaneDown { lane: id }),
                }
            }
        };
        let slot = self.next_slot;
        let bytes = 1 + self.rng.below(SLOT);
        let source = &self.sides[side].memory;
        source.fill((slot * SLOT) as usize, SLOT as usize, byte_of(slot)).expect("a slot");
        let shape = Shape::Span {
            local: self.sides[side].local,
            local_offset: slot * SLOT,
            remote,
            remote_offset: slot * SLOT,
            bytes,
        };
        let imm = Some((slot as u32) << 12 | bytes as u32);
        let token = (self.rng.below(2) == 0).then_some(Token(slot));
        let op = Op { direction: Direction::Write, grant: GrantId::NONE, shape, imm, token };
        match self.sides[side].port.post(id, &[op]) {
            Ok(posted) => {
                if posted.ops == 1 || posted.within > 0 {
                    self.next_slot += 1;
                    let peer_lane = peer_lane.expect("both were opened");
                    self.lane(peer, peer_lane).slots.insert(slot);
                }
                if posted.ops == 1
                    && let Some(token) = token
                {
                    self.lane(side, id).tokens.insert(token.0);
                }
            }
            Err(error) => assert_eq!(error, Error::LaneDown { lane: id }),
        }
    }

    fn close(&mut self) {
        let all: Vec<(usize, LaneId)> = self.lanes.keys().copied().collect();
        if all.is_empty() {
            return;
        }
        let (side, lane) = all[self.rng.below(all.len() as u64) as usize];
        if !self.sides[side].is_dead {
            self.sides[side].port.close(lane);
        }
    }

    fn break_something(&mut self) {
        let device = self.rng.below(2) as usize;
        match self.rng.below(9) {
            0 => self.fabric.set_link(device, false),
            1 | 2 => self.fabric.set_link(device, true),
            3 => self.fabric.freeze(device, self.rng.below(3000)),
            4 => {
                let pairs = self.fabric.queue_pairs();
                if !pairs.is_empty() {
                    let pair = pairs[self.rng.below(pairs.len() as u64) as usize];
                    let event = (self.rng.below(2) == 0).then_some(QP_FATAL);
                    self.fabric.break_queue_pair(pair.device, pair.number, event);
                }
            }
            5 if self.rng.below(4) == 0 => {
                let at = self.rng.below(PORTS as u64) as usize;
                self.fabric.kill(self.sides[at].context);
                self.sides[at].is_dead = true;
            }
            _ => {
                const CALLS: [(Function, i32); 6] = [
                    (Function::CreateQp, libc::ENOMEM),
                    (Function::ModifyQp, libc::EINVAL),
                    (Function::ResizeCq, libc::ENOMEM),
                    (Function::PostSend, libc::ENOMEM),
                    (Function::PostSrqRecv, libc::ENOMEM),
                    (Function::DestroyQp, libc::EBUSY),
                ];
                let (function, errno) = CALLS[self.rng.below(6) as usize];
                let (accepted, after) = (self.rng.below(4) as usize, self.rng.below(5) as u32);
                self.fabric.fail(Failure { accepted, after, ..Failure::next(function, errno) });
            }
        }
    }

    fn poll(&mut self) {
        for at in 0..PORTS {
            if self.sides[at].is_dead || self.rng.below(3) == 0 {
                continue;
            }
            let side = &mut self.sides[at];
            side.port.poll(&mut side.events);
            let events: Vec<Event> = side.events.drain().collect();
            for event in events {
                self.hear(at, event);
            }
        }
    }

    fn hear(&mut self, side: usize, event: Event) {
        let seed = self.seed;
        let memory = self.sides[side].memory.clone();
        let read = |slot: u64, bytes: usize| {
            let mut found = vec![0; bytes];
            memory.read((slot * SLOT) as usize, &mut found).expect("a slot");
            found
        };
        let (Event::Up { lane: id }
        | Event::Done { lane: id, .. }
        | Event::Arrived { lane: id, .. }
        | Event::Down { lane: id, .. }) = event;
        let lane = self.lanes.get_mut(&(side, id)).expect("a lane of this life");
        assert!(!lane.down, "seed {seed}: {event:?} after Down");
        match event {
            Event::Up { .. } => {
                assert!(!std::mem::replace(&mut lane.up, true), "seed {seed}: up twice");
                self.told.up += 1;
            }
            Event::Done { token, .. } => {
                assert!(lane.tokens.remove(&token.0), "seed {seed}: {token:?} was not due");
                self.told.done += 1;
            }
            Event::Arrived { imm, .. } => {
                assert!(lane.up, "seed {seed}: arrived before Up");
                let (slot, bytes) = (u64::from(imm >> 12), (imm & 0xfff) as usize);
                assert!(lane.slots.contains(&slot), "seed {seed}: slot {slot} is not this lane's");
                let found = read(slot, bytes);
                assert!(
                    found.iter().all(|&byte| byte == byte_of(slot)),
                    "seed {seed}: slot {slot} arrived before its bytes"
                );
                self.told.arrived += 1;
            }
            Event::Down { .. } => {
                lane.down = true;
                lane.at_rest = lane.slots.iter().map(|&slot| (slot, read(slot, SLOT as usize))).collect();
                self.told.down += 1;
            }
        }
    }

    /// Faults stop; every lane of a living port ends, and its memory is as it was at its end.
    fn end(mut self) -> Told {
        let seed = self.seed;
        for device in 0..2 {
            self.fabric.set_link(device, true);
            self.fabric.freeze(device, 0);
        }
        self.fabric.stop_failing();
        for &(side, lane) in self.lanes.keys() {
            if !self.sides[side].is_dead {
                self.sides[side].port.close(lane);
            }
        }
        let begun = Instant::now();
        let living =
            |life: &Self| life.lanes.iter().any(|(&(side, _), lane)| !lane.down && !life.sides[side].is_dead);
        while living(&self) {
            assert!(begun.elapsed() < Duration::from_secs(20), "seed {seed}: a lane does not end");
            self.poll();
        }
        for (&(side, _), lane) in &self.lanes {
            for (&slot, before) in &lane.at_rest {
                let mut found = vec![0; SLOT as usize];
                self.sides[side].memory.read((slot * SLOT) as usize, &mut found).expect("a slot");
                assert!(found == *before, "seed {seed}: slot {slot} changed after Down");
            }
        }
        self.sides.clear();
        let counters = self.fabric.counters();
        assert_eq!(counters.completions_lost, 0, "seed {seed}: the completion queue was too short");
        assert_eq!(self.fabric.take_violations(), Vec::<String>::new(), "seed {seed}");
        assert_eq!(self.fabric.leaks(), Vec::<String>::new(), "seed {seed}");
        self.told
    }
}

/// What a slot is filled with; never what memory begins with.
fn byte_of(slot: u64) -> u8 {
    (slot % 255) as u8 + 1
}

/// `IBV_EVENT_QP_FATAL`.
const QP_FATAL: u32 = 1;
