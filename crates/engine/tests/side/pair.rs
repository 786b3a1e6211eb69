//! Two whole engines, one of which writes to the other.

use std::time::{Duration, Instant};

use crossdock_engine::{
    Engine, EngineOptions, LaneRegions, Network, SideArrival, SideDone, SocketNetwork, SocketOptions, now_ns,
};
use crossdock_memory::{AllocateOptions, Memory, PageLayout};
use crossdock_proto::{Config, Identity, Notice, Proto, Rail, SessionEnd, SessionId};
use crossdock_shm::{ShmOptions, ShmPort};
use crossdock_sim::{Fabric, FabricOptions, NodeId, Semantics, SimPort, SimPortOptions};
use crossdock_tcp::{TcpOptions, TcpPort};
use crossdock_transport::{Access, Direction, GrantId, Op, Port, Posted, Shape};
use crossdock_verbs::{Verbs, VerbsOptions, VerbsPort, fake};

pub const WAIT: Duration = Duration::from_secs(60);
/// Of each side's region.
pub const BYTES: usize = 1 << 20;
/// The pages that peers may write: all of the region but its end.
pub const PAGES: PageLayout = PageLayout::dense(0, PAGE, 200);
pub const PAGE: u64 = 4096;
/// The number under which they may.
pub const NUMBER: u32 = 5;

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    Sim(Semantics),
    Tcp,
    Shm,
    /// Between two devices that are software of this process.
    Verbs,
    /// Between those that `CROSSDOCK_VERBS_DEVICES` names.
    Devices,
}

impl Carrier {
    /// Where devices are named, only these: the others need none.
    pub fn all() -> Vec<Carrier> {
        if std::env::var_os(DEVICES).is_some() {
            return vec![Carrier::Devices];
        }
        eprintln!("SKIPPED: RDMA devices: {DEVICES} names none (tests/rdma-vm has some)");
        vec![
            Carrier::Sim(Semantics::Checked),
            Carrier::Sim(Semantics::Verbs),
            Carrier::Sim(Semantics::Mapped),
            Carrier::Sim(Semantics::Fabric),
            Carrier::Tcp,
            Carrier::Shm,
            Carrier::Verbs,
        ]
    }
}

const DEVICES: &str = "CROSSDOCK_VERBS_DEVICES";

#[derive(Clone, Debug)]
pub struct Setting {
    pub lanes: u8,
    /// Whether all queues of the ports are as short as they can be.
    pub is_tight: bool,
    pub engine: EngineOptions,
}

impl Default for Setting {
    fn default() -> Self {
        Self { lanes: 1, is_tight: false, engine: EngineOptions::default() }
    }
}

/// The writer dials; the reader's pages are written.
pub struct Pair {
    pub writer: Side,
    pub reader: Side,
    pub fabric: Fabric,
    /// The devices of [`Carrier::Verbs`]; last, since it looks after those that use them.
    _devices: fake::Fabric,
    begin: Instant,
}

pub struct Side {
    pub engine: Engine,
    pub memory: Memory,
    pub session: Option<SessionId>,
    /// The transports of the sessions that came up.
    pub ports: Vec<&'static str>,
    pub ends: Vec<(SessionId, SessionEnd)>,
}

impl Pair {
    pub fn open(carrier: Carrier, setting: &Setting) -> Self {
        let fabric = Fabric::new(1, FabricOptions::default());
        let devices = fake::Fabric::new(fake::FabricOptions::default());
        let port = |node| match carrier {
            Carrier::Verbs => verbs_port(setting, &format!("fake{}", node - 1), Some(devices.verbs())),
            _ => open_port(carrier, setting, &fabric, node),
        };
        let (writer, reader) = (vec![port(1)], vec![port(2)]);
        Self { _devices: devices, ..Self::over(fabric, setting, writer, reader) }
    }

    pub fn over(
        fabric: Fabric,
        setting: &Setting,
        writer: Vec<Box<dyn Port>>,
        reader: Vec<Box<dyn Port>>,
    ) -> Self {
        let (writer, reader) = (Side::open(1, writer, setting), Side::open(2, reader, setting));
        let devices = fake::Fabric::new(fake::FabricOptions::default());
        let mut pair = Self { writer, reader, fabric, _devices: devices, begin: Instant::now() };
        let address = pair.reader.engine.address().to_owned();
        pair.writer.engine.proto().connect(now_ns(), address);
        pair.turn_until("a session", |pair| pair.writer.session.and(pair.reader.session).is_some());
        pair
    }

    /// A pair whose writer may write.
    pub fn allowed(carrier: Carrier, setting: &Setting) -> Self {
        let mut pair = Self::open(carrier, setting);
        let session = pair.reader.session();
        pair.reader.engine.allow(session, NUMBER, Access::Write, &[(0, PAGES)]).unwrap();
        pair
    }

    pub fn turn(&mut self) {
        self.advance();
        self.writer.turn();
        self.reader.turn();
    }

    /// The fabric's time goes as the clock does.
    pub fn advance(&self) {
        self.fabric.advance_to(self.begin.elapsed().as_nanos() as u64);
    }

    pub fn turn_until(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        let begin = Instant::now();
        while !reached(self) {
            self.turn();
            let ends = (&self.writer.ends, &self.reader.ends);
            assert!(begin.elapsed() < WAIT, "waited for {what}; sessions have ended: {ends:?}");
        }
    }

    pub fn turn_for(&mut self, time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            self.turn();
        }
    }
}

impl Side {
    fn open(node: u64, ports: Vec<Box<dyn Port>>, setting: &Setting) -> Self {
        let network = SocketNetwork::open(SocketOptions::new("127.0.0.1:0".parse().unwrap())).unwrap();
        let mut config = Config::new(Identity { node, incarnation: 1 }, format!("node {node}"));
        config.entropy = [node as u8; 32];
        config.lanes_per_rail = setting.lanes;
        config.rails = ports
            .iter()
            .map(|port| port.info())
            .map(|info| Rail {
                kind: info.kind,
                reach: info.reach.clone(),
                bytes_per_second: info.bytes_per_second,
            })
            .collect();
        config.pulse_address = network.pulse_address().to_owned();
        // A machine that is busy with other tests is not dead.
        config.heartbeats_missed = 300;
        config.handshake_timeout_ns = 60_000_000_000;
        let mut engine = Engine::new(Proto::new(config), Box::new(network), ports, setting.engine.clone());
        let memory = Memory::allocate(BYTES, &AllocateOptions::default()).unwrap();
        assert_eq!(engine.register(&memory), Ok(0));
        Self { engine, memory, session: None, ports: Vec::new(), ends: Vec::new() }
    }

    pub fn turn(&mut self) {
        self.engine.turn(now_ns());
        self.hear();
    }

    pub fn hear(&mut self) {
        while let Some(notice) = self.engine.next_notice() {
            match notice {
                Notice::SessionUp { session, port, .. } => {
                    self.session = Some(session);
                    self.ports.push(port);
                }
                Notice::SessionDown { session, cause, .. } => {
                    if session == self.session {
                        self.session = None;
                    }
                    self.ends.extend(session.map(|session| (session, cause)));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn session(&self) -> SessionId {
        self.session.expect("a session")
    }

    pub fn arrivals(&mut self) -> Vec<SideArrival> {
        std::iter::from_fn(|| self.engine.next_side_arrival()).collect()
    }

    pub fn dones(&mut self) -> Vec<SideDone> {
        std::iter::from_fn(|| self.engine.next_side_done()).collect()
    }

    pub fn regions(&self, lane: u8) -> LaneRegions {
        self.engine.side_regions(self.session(), lane).expect("a lane of the session")
    }

    /// Posts on the first lane that is up.
    pub fn post(&mut self, ops: &mut [Op<'_>], imm: Option<u32>, token: Option<u32>) -> Posted {
        let Some(session) = self.session else { return Posted::default() };
        let Some(lane) = self.engine.side_lane(session, 0) else { return Posted::default() };
        self.engine.post_side(session, lane, ops, imm, token).unwrap()
    }

    pub fn bytes_at(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut found = vec![0; bytes];
        self.memory.read(offset as usize, &mut found).unwrap();
        found
    }

    pub fn is_all(&self, value: u8) -> bool {
        self.bytes_at(0, BYTES).iter().all(|&byte| byte == value)
    }
}

pub fn span(with: &LaneRegions, offset: u64, bytes: u64) -> Op<'static> {
    Op {
        direction: Direction::Write,
        grant: GrantId::standing(NUMBER),
        shape: Shape::Span {
            local: with.local[0],
            local_offset: offset,
            remote: with.remote[0],
            remote_offset: offset,
            bytes,
        },
        imm: None,
        token: None,
    }
}

/// The pages with these numbers, from the same places here.
pub fn paged<'a>(with: &LaneRegions, pages: &'a [u32]) -> Op<'a> {
    Op {
        shape: Shape::Pages {
            local: with.local[0],
            local_offset: 0,
            local_stride_bytes: PAGE,
            local_pages: pages,
            remote: with.remote[0],
            remote_offset: 0,
            remote_stride_bytes: PAGE,
            remote_pages: pages,
            piece_bytes: PAGE,
        },
        ..span(with, 0, 0)
    }
}

/// Ops that are offered until all were taken.
pub struct Offer<'a> {
    pub ops: Vec<Op<'a>>,
    pub imm: Option<u32>,
    pub token: Option<u32>,
}

impl Offer<'_> {
    /// Offers what is left; true when nothing is.
    pub fn post(&mut self, side: &mut Side) -> bool {
        let posted = side.post(&mut self.ops, self.imm, self.token);
        self.ops.drain(..posted.ops);
        if let Some(first) = self.ops.first_mut() {
            *first = first.advance(posted.within);
        }
        self.ops.is_empty()
    }
}

pub fn open_port(carrier: Carrier, setting: &Setting, fabric: &Fabric, node: u32) -> Box<dyn Port> {
    match carrier {
        Carrier::Sim(semantics) => {
            let mut options = SimPortOptions::new(semantics);
            if setting.is_tight {
                (options.pieces_in_flight, options.immediates_in_flight) = (3, 2);
            }
            let port: SimPort = fabric.port(NodeId(node), options);
            Box::new(port)
        }
        Carrier::Tcp => {
            let mut options = TcpOptions::default();
            if setting.is_tight {
                options.send_queue_bytes = 5000;
                (options.send_buffer_bytes, options.receive_buffer_bytes) = (Some(4096), Some(4096));
            }
            Box::new(TcpPort::open(options).unwrap())
        }
        Carrier::Shm => {
            let mut options = ShmOptions::default();
            if setting.is_tight {
                (options.immediates_per_lane, options.bytes_per_turn) = (2, 5000);
            }
            Box::new(ShmPort::open(options).unwrap())
        }
        Carrier::Verbs => panic!("its two ports share their devices"),
        Carrier::Devices => {
            let devices = std::env::var(DEVICES).unwrap();
            let devices: Vec<&str> = devices.split(',').collect();
            verbs_port(setting, devices[node as usize % devices.len()], None)
        }
    }
}

fn verbs_port(setting: &Setting, device: &str, verbs: Option<Verbs>) -> Box<dyn Port> {
    let mut options = VerbsOptions::default();
    (options.device, options.verbs) = (Some(device.to_owned()), verbs);
    if setting.is_tight {
        (options.requests_per_lane, options.immediates_per_lane) = (3, 2);
    }
    Box::new(VerbsPort::open(options).unwrap())
}
