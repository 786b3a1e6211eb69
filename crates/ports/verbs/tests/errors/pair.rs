//! Two ports, the lane between them, and what they said.

use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::{
    Direction, DownCause, Event, Events, GrantId, LaneId, LaneTags, LocalId, Op, PeerId, Port, RemoteId,
    RemoteKey, Shape, Token,
};
use crossdock_verbs::{VerbsOptions, VerbsPort};

use crate::network::Network;

pub struct Pair {
    pub ports: [VerbsPort; 2],
    pub lanes: [LaneId; 2],
    pub memory: [Memory; 2],
    pub regions: [LocalId; 2],
    keys: [RemoteKey; 2],
    /// By side: the other side's region.
    pub remotes: [RemoteId; 2],
    /// By side: what it has said of any lane.
    pub said: [Vec<Event>; 2],
    pub patience: Duration,
}

pub const BYTES: usize = 1 << 20;

/// Options with which faults are found soon.
pub fn impatient() -> VerbsOptions {
    let mut options = VerbsOptions::default();
    options.connect_timeout = Duration::from_secs(3);
    options.keepalive = Duration::from_millis(100);
    options.ack_timeout_exponent = Some(14);
    options.retries = 3;
    options
}

impl Pair {
    pub fn new(network: &mut dyn Network, options: VerbsOptions) -> Self {
        let mut ports = [0, 1].map(|device| network.open(device, options.clone()));
        let memory =
            [0, 1].map(|_| Memory::allocate(BYTES, &AllocateOptions::default()).expect("memory for a test"));
        let registered =
            [0, 1].map(|side| ports[side].register(&memory[side]).expect("memory can be registered"));
        let [(here, key), (there, other_key)] = registered;
        let mut pair = Self {
            ports,
            lanes: [LaneId(0); 2],
            memory,
            regions: [here, there],
            keys: [key, other_key],
            remotes: [RemoteId(0); 2],
            said: [Vec::new(), Vec::new()],
            patience: network.patience(),
        };
        pair.connect();
        pair
    }

    /// A new lane, up on both sides, with both regions attached.
    pub fn connect(&mut self) {
        let opened = [0, 1].map(|side| self.ports[side].open_lane(PeerId(1)).expect("a lane can be opened"));
        let tags = [LaneTags { ours: [1; 32], theirs: [2; 32] }, LaneTags { ours: [2; 32], theirs: [1; 32] }];
        self.lanes = [opened[0].0, opened[1].0];
        for side in [0, 1] {
            let to = &opened[1 - side].1;
            self.ports[side].connect(self.lanes[side], to, &tags[side]).expect("a fresh lane connects");
        }
        self.wait("both ends to be up", |pair| (0..2).all(|side| pair.is_up(side)));
        for side in [0, 1] {
            let key = self.keys[1 - side].clone();
            let attached = self.ports[side].attach(self.lanes[side], &key);
            self.remotes[side] = attached.expect("a good key").id;
        }
    }

    fn is_up(&self, side: usize) -> bool {
        self.said[side].contains(&Event::Up { lane: self.lanes[side] })
    }

    /// Why a side's present lane is down.
    pub fn down(&self, side: usize) -> Option<DownCause> {
        self.said[side].iter().find_map(|event| match event {
            Event::Down { lane, cause } if *lane == self.lanes[side] => Some(*cause),
            _ => None,
        })
    }

    pub fn arrived(&self, side: usize) -> usize {
        self.said[side].iter().filter(|event| matches!(event, Event::Arrived { .. })).count()
    }

    pub fn done(&self, side: usize, token: u64) -> bool {
        let done = Event::Done { lane: self.lanes[side], token: Token(token) };
        self.said[side].contains(&done)
    }

    /// An op of side `by` on the same place of both regions.
    pub fn op(&self, by: usize, direction: Direction, offset: u64, bytes: u64) -> Op<'static> {
        let shape = Shape::Span {
            local: self.regions[by],
            local_offset: offset,
            remote: self.remotes[by],
            remote_offset: offset,
            bytes,
        };
        Op { direction, grant: GrantId::NONE, shape, imm: None, token: None }
    }

    /// Posts one op, whole.
    #[track_caller]
    pub fn post(&mut self, by: usize, op: Op<'_>) {
        let lane = self.lanes[by];
        let begun = Instant::now();
        let mut rest = op;
        loop {
            match self.ports[by].post(lane, &[rest]) {
                Ok(posted) if posted.ops == 1 => return,
                Ok(posted) => rest = rest.advance(posted.within),
                Err(error) => panic!("a good op: {error}"),
            }
            self.poll();
            assert!(begun.elapsed() < self.patience, "waited for an op to be taken");
        }
    }

    pub fn poll(&mut self) {
        let mut events = Events::with_capacity(64);
        for (port, said) in self.ports.iter_mut().zip(&mut self.said) {
            port.poll(&mut events);
            said.extend(events.drain());
        }
        std::thread::yield_now();
    }

    /// Polls both for so long.
    pub fn settle(&mut self, time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time {
            self.poll();
        }
    }

    #[track_caller]
    pub fn wait(&mut self, what: &str, mut until: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !until(self) {
            assert!(begun.elapsed() < self.patience, "waited for {what}; heard {:?}", self.said);
            self.poll();
        }
    }

    /// Waits for both ends of the lane to be down; what each says.
    #[track_caller]
    pub fn endings(&mut self) -> [String; 2] {
        self.wait("both ends to be down", |pair| (0..2).all(|side| pair.down(side).is_some()));
        [0, 1].map(|side| ending(&self.down(side).expect("waited for")))
    }
}

/// How a cause is called.
pub fn ending(cause: &DownCause) -> String {
    match cause {
        DownCause::Device(error) => error.meaning.name.to_owned(),
        other => format!("{other:?}"),
    }
}
