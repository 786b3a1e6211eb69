//! A rail of this machine while it is tried: a port, memory, and one lane.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_tcp::{TcpOptions, TcpPort};
use crossdock_transport::{
    Access, Direction, DownCause, Error, Event, Events, Grant, GrantId, GrantedBuffer, LaneAddress, LaneId,
    LaneTags, LocalId, Op, PeerId, Port, RemoteId, RemoteKey, Shape, Token,
};
use crossdock_verbs::topology::Topology;
use crossdock_verbs::{Near, VerbsOptions, VerbsPort, rails};

use super::VERIFIED_BYTES;
use super::talk::{Offer, PATIENCE};

/// A port with a region that the peer may write.
pub struct Rail {
    pub port: Box<dyn Port>,
    memory: Memory,
    local: LocalId,
    pub key: RemoteKey,
    lane: Option<LaneId>,
    remote: Option<RemoteId>,
    events: Events,
    up: bool,
    pub down: Option<DownCause>,
    pub arrived: u64,
    pub done: u64,
}

/// Every usable RDMA port of this machine, and TCP at `ip`. Those that cannot be opened come with their reasons.
pub fn all(ip: IpAddr) -> (Vec<Rail>, Vec<(String, Error)>) {
    let mut opened = Vec::new();
    let mut refused = Vec::new();
    let mut keep = |name: String, port: Result<Box<dyn Port>, Error>| match port.and_then(Rail::new) {
        Ok(rail) => opened.push(rail),
        Err(error) => refused.push((name, error)),
    };
    for options in rails(&Topology::read(Path::new("/")), Near::Anything, &VerbsOptions::default()) {
        let name = format!(
            "verbs {}:{}",
            options.device.as_deref().unwrap_or("any"),
            options.port.map_or_else(|| "any".into(), |port| port.to_string())
        );
        keep(name, VerbsPort::open(options).map(|port| Box::new(port) as _));
    }
    let options = TcpOptions { bind: SocketAddr::new(ip, 0), ..TcpOptions::default() };
    keep(format!("tcp {ip}"), TcpPort::open(options).map(|port| Box::new(port) as _));
    (opened, refused)
}

impl Rail {
    fn new(mut port: Box<dyn Port>) -> Result<Self, Error> {
        let memory =
            Memory::allocate(VERIFIED_BYTES as usize, &AllocateOptions::default()).map_err(|_| {
                Error::Os { call: "memfd_create", errno: rustix::io::Errno::NOMEM.raw_os_error() }
            })?;
        let (local, key) = port.register(&memory)?;
        let layout = crossdock_memory::PageLayout::dense(0, VERIFIED_BYTES, 1);
        let buffers = [GrantedBuffer { region: local, layout }];
        let grant = Grant { id: GRANT, peer: PEER, access: Access::Write, buffers: &buffers, pages: &[0] };
        port.grant(&grant)?;
        let events = Events::with_capacity(256);
        let (lane, remote) = (None, None);
        Ok(Self {
            port,
            memory,
            local,
            key,
            lane,
            remote,
            events,
            up: false,
            down: None,
            arrived: 0,
            done: 0,
        })
    }

    pub fn offer(&self) -> Offer {
        let info = self.port.info();
        Offer { kind: info.kind.into(), name: info.name.clone(), reach: info.reach.clone() }
    }

    /// Opens a lane, whose address the peer is told.
    pub fn open(&mut self) -> Result<LaneAddress, Error> {
        self.close();
        self.memory.fill(0, VERIFIED_BYTES as usize, 0).expect("the whole region");
        let (lane, address) = self.port.open_lane(PEER)?;
        (self.lane, self.remote) = (Some(lane), None);
        (self.up, self.down, self.arrived, self.done) = (false, None, 0, 0);
        Ok(address)
    }

    /// Connects it, and does not wait.
    pub fn connect(&mut self, address: &LaneAddress, asks: bool) -> Result<(), Error> {
        // Nothing is secret here: the tags only tell the two ends apart.
        let (ours, theirs) = if asks { ([1; 32], [2; 32]) } else { ([2; 32], [1; 32]) };
        self.port.connect(self.lane.expect("it was opened"), address, &LaneTags { ours, theirs })
    }

    /// Waits until something is so, the lane is down, or patience is over.
    pub fn wait(&mut self, until: impl Fn(&Self) -> bool) -> Result<(), Stuck> {
        let begun = Instant::now();
        loop {
            if until(self) {
                return Ok(());
            }
            if let Some(cause) = self.down {
                return Err(Stuck::Down(cause));
            }
            if begun.elapsed() > PATIENCE {
                return Err(Stuck::Silent);
            }
            self.poll();
        }
    }

    pub fn wait_up(&mut self) -> Result<(), Stuck> {
        self.wait(|rail| rail.up)
    }

    pub fn poll(&mut self) {
        self.port.poll(&mut self.events);
        for event in self.events.drain() {
            match event {
                Event::Up { lane } if Some(lane) == self.lane => self.up = true,
                Event::Done { lane, token } if Some(lane) == self.lane => self.done = token.0 + 1,
                Event::Arrived { lane, .. } if Some(lane) == self.lane => self.arrived += 1,
                Event::Down { lane, cause } if Some(lane) == self.lane => self.down = Some(cause),
                // Of a lane that has been closed.
                _ => {}
            }
        }
    }

    pub fn attach(&mut self, key: &RemoteKey) -> Result<(), Error> {
        self.remote = Some(self.port.attach(self.lane.expect("it was opened"), key)?.id);
        Ok(())
    }

    /// Posts a write of `bytes` from the region's beginning to the same place of the peer's, with an immediate.
    pub fn write(&mut self, offset: u64, bytes: u64, number: u64) -> Result<(), Stuck> {
        let shape = Shape::Span {
            local: self.local,
            local_offset: offset,
            remote: self.remote.expect("it was attached"),
            remote_offset: offset,
            bytes,
        };
        let (imm, token) = (Some(0), Some(Token(number)));
        self.post(Op { direction: Direction::Write, grant: GRANT, shape, imm, token })
    }

    pub fn notify(&mut self) -> Result<(), Stuck> {
        self.post(Op::notify(0))
    }

    fn post(&mut self, op: Op<'_>) -> Result<(), Stuck> {
        let lane = self.lane.expect("it was opened");
        let begun = Instant::now();
        let mut rest = op;
        loop {
            match self.port.post(lane, &[rest]) {
                Ok(posted) if posted.ops == 1 => return Ok(()),
                Ok(posted) => rest = rest.advance(posted.within),
                Err(Error::LaneDown { .. }) => {
                    self.wait(|_| false)?;
                }
                Err(error) => return Err(Stuck::Port(error)),
            }
            self.poll();
            if begun.elapsed() > PATIENCE {
                return Err(Stuck::Silent);
            }
        }
    }

    /// Fills the region with what a seed makes.
    pub fn fill(&self, seed: u64) {
        self.memory.write(0, &pattern(seed)).expect("the whole region");
    }

    /// Whether it holds that.
    pub fn holds(&self, seed: u64) -> bool {
        let mut found = vec![0; VERIFIED_BYTES as usize];
        self.memory.read(0, &mut found).expect("the whole region");
        found == pattern(seed)
    }

    /// Ends the lane.
    pub fn close(&mut self) {
        let Some(lane) = self.lane else { return };
        self.port.close(lane);
        let begun = Instant::now();
        while self.down.is_none() && begun.elapsed() < Duration::from_secs(3) {
            self.poll();
        }
        self.lane = None;
    }
}

/// Why a rail does not go on.
#[derive(Debug, thiserror::Error)]
pub enum Stuck {
    #[error("the lane went down: {0}")]
    Down(DownCause),
    #[error("nothing came for {PATIENCE:?}")]
    Silent,
    #[error("the port refused: {0}")]
    Port(#[from] Error),
}

impl Stuck {
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Down(cause) => cause.advice(),
            Self::Silent => "look for packets that are dropped on the way: MTU, VLAN, PFC, a firewall",
            Self::Port(_) => "look at the checks of this machine's ports, on both sides",
        }
    }
}

/// Bytes that differ from place to place and from seed to seed.
fn pattern(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let words = (0..VERIFIED_BYTES / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

const PEER: PeerId = PeerId(1);
const GRANT: GrantId = GrantId::new(0, 0);
