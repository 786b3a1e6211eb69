//! What a seed chooses: how many nodes, over which ports, with which limits, in which weather.

use crossdock_engine::EngineOptions;
use crossdock_kv::{CacheLayout, Verify, WorkerOptions};
use crossdock_proto::Auth;
use crossdock_sim::{Between, FabricOptions, OneIn, Semantics, SimPortOptions};

use crate::chance::{Chance, mix};
use crate::faults::Fault;
use crate::ranks::{self, Split};

pub const US: u64 = 1_000;
pub const MS: u64 = 1_000_000;

/// One run's plan.
pub struct Scenario {
    pub seed: u64,
    pub fabric: FabricOptions,
    pub rails: Vec<SimPortOptions>,
    pub lanes_per_rail: u8,
    /// How long after its loss a lane is offered anew.
    pub lane_retry_ns: u64,
    pub nodes: Vec<NodePlan>,
    /// Each request is shared by several ranks.
    pub split: Option<Split>,
    pub auth: Auth,
    pub engine: EngineOptions,
    pub max_grants: u32,
    pub max_rooms: u32,
    pub max_parked: u32,
    pub max_commands: usize,
    /// The prefills compute for long.
    pub slow_steps: bool,
    /// How many rooms are opened at the least, and how long after each other.
    pub rooms: u32,
    pub room_gap_ns: u64,
    /// One in so many is cancelled by one of its users.
    pub cancel_one_in: u64,
    /// Prefills write where they must not after every step, and users whose process is gone come again when there is
    /// another.
    pub is_scribbled: bool,
    /// What a node posts and sums in a turn: with little, faults come between two shares of a room.
    pub turn_bytes: u64,
    /// The faults that come, and how long after each other. None: fair weather.
    pub faults: Vec<Fault>,
    pub fault_gap_ns: u64,
}

/// What a node is, in all its lives.
pub struct NodePlan {
    pub address: String,
    pub layout: CacheLayout,
    pub verify: Verify,
    pub prefills: bool,
    pub decodes: bool,
    /// How many heartbeats its peers may miss.
    pub heartbeats_missed: u32,
    /// Whom it dials.
    pub dials: Vec<usize>,
}

impl Scenario {
    pub fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let chance = &mut chance;
        let between = |least_ns, most_ns| Between { least_ns, most_ns };
        let mut fabric = FabricOptions {
            delay: between(US, *chance.pick(&[3 * US, 20 * US, 60 * US])),
            drain: between(0, *chance.pick(&[10 * US, 100 * US, 600 * US])),
            death_notice: between(10 * US, MS),
            silence_ns: chance.within(2 * MS..8 * MS),
            connect_ns: 3 * MS,
            partial_landing: OneIn(*chance.pick(&[0, 2, 4])),
            short_post: OneIn(*chance.pick(&[0, 4, 16])),
            short_poll: OneIn(*chance.pick(&[0, 2, 8])),
            not_yet: OneIn(*chance.pick(&[0, 2, 4])),
            datagram_loss: OneIn(*chance.pick(&[0, 20, 50])),
            stream_frames: *chance.pick(&[4, 16, 256]),
            note_landings: true,
            ..FabricOptions::default()
        };
        let rails = rails(chance);
        let (nodes, split) = ranks::nodes(chance, seed);
        let (faults, fault_gap_ns) = weather(chance);
        if !faults.iter().any(|fault| matches!(fault, Fault::Partition | Fault::Death)) {
            // Several lost in a row look like a dead peer; here nobody may be taken for one without reason.
            fabric.datagram_loss = OneIn(0);
        }
        let auth = match chance.one_in(4) {
            true => Auth::PreSharedKey(b"a key that all nodes share".to_vec()),
            false => Auth::Off,
        };
        let mut scenario = Self {
            seed,
            fabric,
            rails,
            lanes_per_rail: chance.within(1..4) as u8,
            lane_retry_ns: [10 * US, 100 * US, 100 * US, MS][(mix(seed ^ 0x6c61_6e65) % 4) as usize],
            nodes,
            split,
            auth,
            engine: EngineOptions {
                events_per_poll: *chance.pick(&[2, 16, 256]),
                stripe_bytes: *chance.pick(&[48, 256, 1 << 20]),
                ..EngineOptions::default()
            },
            max_grants: *chance.pick(&[2, 4, 8, 65_536]),
            max_rooms: *chance.pick(&[8, 64]),
            max_parked: *chance.pick(&[4, 64]),
            max_commands: *chance.pick(&[4, 256]),
            slow_steps: chance.one_in(8),
            rooms: chance.within(24..64) as u32,
            room_gap_ns: *chance.pick(&[40 * US, 150 * US, 400 * US, 800 * US]),
            cancel_one_in: *chance.pick(&[3, 6, 12]),
            is_scribbled: false,
            turn_bytes: match mix(seed ^ 0x7475_726e) {
                word if word.is_multiple_of(3) => 64 + word / 3 % 1024,
                _ => WorkerOptions::TURN_BYTES,
            },
            faults,
            fault_gap_ns,
        };
        if scenario.split.is_some() {
            // Limits are of shares.
            scenario.max_grants *= 2;
            scenario.max_rooms *= 2;
            scenario.max_parked *= 2;
        }
        // What chance alone would meet too rarely.
        match seed % 12 {
            1 | 10 => scenario.become_lane_storm(chance),
            3 => scenario.become_crossing(chance),
            5 => scenario.become_pauses(),
            7 => scenario.become_echoes(chance),
            8 => scenario.become_scribbled(),
            9 => scenario.become_torn(chance),
            11 => scenario.become_late_words(chance),
            _ => {}
        }
        if scenario.split.is_some() {
            // Each has two shares or more.
            scenario.rooms /= 2;
        }
        if scenario.is_fair() {
            // A lane on which rooms queue for longer than they have is no fair weather.
            for rail in &mut scenario.rails {
                rail.bytes_per_second = rail.bytes_per_second.max(20_000_000);
            }
        }
        scenario
    }

    /// Several lanes, some slow, that break all the time while much is on its way.
    fn become_lane_storm(&mut self, chance: &mut Chance) {
        self.faults = vec![Fault::LaneLoss, Fault::LaneLoss, Fault::RailLoss];
        self.fault_gap_ns = 400 * US;
        self.lanes_per_rail = 3;
        self.room_gap_ns = 150 * US;
        self.cancel_one_in = 2;
        self.max_grants = 65_536;
        self.max_rooms = 64;
        self.fabric.drain.most_ns = 600 * US;
        let semantics = *chance.pick(&[Semantics::Verbs, Semantics::Mapped]);
        self.use_rails(semantics, &[200_000, 25_000_000_000]);
    }

    /// Few grants, used again at once, while cancels cross deliveries and what is late.
    fn become_crossing(&mut self, chance: &mut Chance) {
        self.faults = vec![Fault::Slowness];
        self.fault_gap_ns = 500 * US;
        self.room_gap_ns = 60 * US;
        self.rooms = 64;
        self.cancel_one_in = 2;
        self.max_grants = 3;
        self.max_rooms = 64;
        let semantics = *chance.pick(&Semantics::ALL);
        self.use_rails(semantics, &[2_000_000]);
    }

    /// Requests whose decode side dies and asks again in its next life, which hears what the earlier one has said.
    fn become_echoes(&mut self, chance: &mut Chance) {
        self.faults = vec![Fault::Death, Fault::Echo, Fault::Echo, Fault::Echo];
        self.fault_gap_ns = 600 * US;
        self.room_gap_ns = 400 * US;
        self.rooms = 64;
        self.max_grants = 65_536;
        self.max_rooms = 64;
        self.max_parked = 64;
        let semantics = *chance.pick(&Semantics::ALL);
        self.use_rails(semantics, &[2_000_000]);
    }

    /// Sessions that end while much is on its way that nobody can take back.
    fn become_torn(&mut self, chance: &mut Chance) {
        self.faults = vec![Fault::StreamLoss, Fault::Disconnect, Fault::Disconnect];
        self.fault_gap_ns = 800 * US;
        self.room_gap_ns = 150 * US;
        self.max_rooms = 64;
        self.fabric.drain.most_ns = 600 * US;
        let semantics = *chance.pick(&[Semantics::Verbs, Semantics::Mapped]);
        self.use_rails(semantics, &[200_000]);
    }

    /// Names that are used again at once, while what was said about the earlier room is on its way.
    fn become_late_words(&mut self, chance: &mut Chance) {
        self.faults = vec![Fault::Slowness];
        self.fault_gap_ns = 300 * US;
        self.fabric.delay.most_ns = 60 * US;
        self.room_gap_ns = 40 * US;
        self.rooms = 64;
        self.cancel_one_in = 2;
        self.max_grants = 65_536;
        self.max_rooms = 64;
        let semantics = *chance.pick(&Semantics::ALL);
        self.use_rails(semantics, &[20_000_000]);
    }

    /// Bytes that are found wrong although a fault let few rooms come so far.
    fn become_scribbled(&mut self) {
        let faults: [&[Fault]; 9] = [
            &[Fault::StreamLoss],
            &[Fault::Partition],
            &[Fault::HeldLoop],
            &[Fault::Death],
            &[Fault::Leaving],
            &[Fault::Leaving],
            &[Fault::Disconnect],
            &[Fault::Echo, Fault::Death],
            &[Fault::Delay],
        ];
        self.faults = faults[(self.seed / 12) as usize % faults.len()].to_vec();
        self.is_scribbled = true;
        // Most have time to come back from one before the next.
        self.fault_gap_ns = 5 * MS;
        self.room_gap_ns = 800 * US;
        self.cancel_one_in = 12;
        self.max_grants = 65_536;
        self.max_rooms = 64;
        self.max_parked = 64;
        self.nodes.iter_mut().for_each(|node| node.verify = Verify::All);
    }

    /// Long rooms, and processes that stop for less than their peers can bear but for more than they bear themselves.
    fn become_pauses(&mut self) {
        self.faults = vec![Fault::Stop];
        self.fault_gap_ns = 3 * MS;
        self.room_gap_ns = 400 * US;
        self.fabric.datagram_loss = OneIn(0);
        self.slow_steps = true;
    }

    fn use_rails(&mut self, semantics: Semantics, speeds: &[u64]) {
        let rail = |&bytes_per_second: &u64| SimPortOptions {
            bytes_per_second,
            pieces_in_flight: 1024,
            immediates_in_flight: 256,
            ..SimPortOptions::new(semantics)
        };
        self.rails = speeds.iter().map(rail).collect();
    }

    pub fn is_fair(&self) -> bool {
        self.faults.is_empty()
    }

    /// Whether some port is one where nobody can prove that a peer writes no more.
    pub fn has_unproven_ports(&self) -> bool {
        self.rails.iter().any(|rail| rail.semantics == Semantics::Fabric)
    }

    /// Two nodes have a session when either dials the other.
    pub fn are_joined(&self, one: usize, other: usize) -> bool {
        self.nodes[one].dials.contains(&other) || self.nodes[other].dials.contains(&one)
    }
}

fn rails(chance: &mut Chance) -> Vec<SimPortOptions> {
    let all = *chance.pick(&Semantics::ALL);
    let count = if chance.one_in(3) { 2 } else { 1 };
    let is_mixed = chance.one_in(3);
    (0..count)
        .map(|at| {
            let semantics = if is_mixed { *chance.pick(&Semantics::ALL) } else { all };
            SimPortOptions {
                name: format!("rail-{at}"),
                pieces_in_flight: *chance.pick(&[4, 32, 1024]),
                immediates_in_flight: *chance.pick(&[1, 4, 256]),
                // A room is a few hundred bytes: it takes nothing, or as long as a message, or much longer.
                bytes_per_second: *chance.pick(&[200_000, 2_000_000, 20_000_000, 25_000_000_000]),
                ..SimPortOptions::new(semantics)
            }
        })
        .collect()
}

fn weather(chance: &mut Chance) -> (Vec<Fault>, u64) {
    let gap_ns = *chance.pick(&[150 * US, 500 * US, 2 * MS, 5 * MS]);
    match chance.below(10) {
        0 => (Vec::new(), gap_ns),
        // One kind of fault, so that it is met in every state.
        1..4 => (vec![*chance.pick(Fault::coming())], gap_ns),
        4 => (vec![*chance.pick(Fault::coming()), *chance.pick(Fault::coming())], gap_ns),
        5 => (vec![Fault::Death, Fault::Echo, Fault::Echo], gap_ns),
        _ => (Fault::coming().to_vec(), gap_ns),
    }
}
