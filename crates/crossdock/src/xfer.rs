//! Writes and reads between registered memories, by address, without rooms: for engines that manage their peers' memory
//! themselves, as the users of NIXL and Mooncake do.
//!
//! ```no_run
//! use std::time::{Duration, Instant};
//! use crossdock::Authentication;
//! use crossdock::xfer::{Block, Direction, Endpoint, EndpointConfig, Transfer};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let key = Authentication::PreSharedKey(std::fs::read("/run/secrets/crossdock")?);
//! let endpoint = Endpoint::open(EndpointConfig::new("prefill-0", key))?;
//! let memory = crossdock::Memory::allocate(1 << 30, &Default::default())?;
//! let base = memory.base() as u64;
//! let soon = || Instant::now() + Duration::from_secs(10);
//! endpoint.handle().register(memory)?.wait_until(soon())??;
//! // What the peer has told of where its pages are.
//! let remote = 0x7f00_0000_0000;
//! let mut moving = endpoint.handle().transfer(Transfer {
//!     peer: "10.0.0.7:7000".into(),
//!     direction: Direction::Write,
//!     blocks: vec![Block { local: base, remote, bytes: 65_536 }],
//!     deadline: Duration::from_secs(10),
//! })?;
//! moving.end.wait_until(soon())??;
//! # Ok(())
//! # }
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread::JoinHandle;
use std::time::Duration;

use crossdock_engine::{Engine, EngineOptions, Network, OsError, SocketNetwork, SocketOptions, duration_ns};
use crossdock_proto::{Identity, Proto};
use crossdock_shm::ShmOptions;
use crossdock_transport::PortInfo;

pub use crossdock_xfer::*;

use crate::config::{Authentication, PortConfig};
use crate::error::Error;
use crate::node::{auth, identity, open_ports, rail, random};

/// What an endpoint is told when it is opened.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// For people, in logs and errors.
    pub name: String,
    /// Where peers dial; port 0 takes any free one.
    pub bind: SocketAddr,
    /// The address that peers are told, if it is another than that of `bind`.
    pub advertise: Option<IpAddr>,
    /// The ports to open, in the order of preference.
    pub ports: Vec<PortConfig>,
    /// Lanes for each rail and peer.
    pub lanes_per_rail: u8,
    /// Whether peers must prove a shared key.
    pub authentication: Authentication,
    /// For how long the progress thread spins after something has happened.
    pub spin: Duration,
    /// How often peers tell this endpoint that they live.
    pub heartbeat: Duration,
    /// How many heartbeats may be missing before a peer is lost.
    pub heartbeats_missed: u32,
    /// For a whole handshake.
    pub handshake_timeout: Duration,
    /// Sessions at once.
    pub max_sessions: u32,
    /// The limits of the progress loop.
    pub worker: WorkerOptions,
}

impl EndpointConfig {
    /// An endpoint that others on this host reach, with the usual limits. For peers on other hosts, set `bind` to an address
    /// that they reach.
    pub fn new(name: impl Into<String>, authentication: Authentication) -> EndpointConfig {
        EndpointConfig {
            name: name.into(),
            bind: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            advertise: None,
            ports: vec![PortConfig::Shm(ShmOptions::default()), PortConfig::Tcp(None)],
            lanes_per_rail: 1,
            authentication,
            spin: Duration::from_micros(50),
            heartbeat: Duration::from_millis(200),
            heartbeats_missed: 10,
            handshake_timeout: Duration::from_secs(5),
            max_sessions: 1024,
            worker: WorkerOptions::default(),
        }
    }
}

/// One process's end. Dropping it says goodbye to all peers; transfers that are under way find their tickets
/// [`Abandoned`](crate::Abandoned).
#[derive(Debug)]
pub struct Endpoint {
    handle: Handle,
    address: String,
    identity: Identity,
    ports: Vec<PortInfo>,
    thread: Option<JoinHandle<Result<(), OsError>>>,
}

impl Endpoint {
    /// Opens the ports, begins to listen, and starts the progress thread.
    pub fn open(config: EndpointConfig) -> Result<Endpoint, Error> {
        let auth = auth(&config.authentication)?;
        let ports = open_ports(&config.ports, config.bind, config.advertise)?;
        let infos: Vec<PortInfo> = ports.iter().map(|port| port.info().clone()).collect();
        let mut network = SocketOptions::new(config.bind);
        network.advertise = config.advertise;
        let sessions = config.max_sessions as usize;
        network.max_sessions = sessions.saturating_mul(2);
        network.max_links = sessions.saturating_mul(4);
        let network = SocketNetwork::open(network)?;
        let mut proto = crossdock_proto::Config::new(identity(None)?, config.name);
        proto.entropy = random()?;
        proto.auth = auth;
        proto.rails = infos.iter().map(rail).collect();
        proto.lanes_per_rail = config.lanes_per_rail;
        proto.app_numbers_sessions = true;
        proto.pulse_address = network.pulse_address().to_owned();
        proto.heartbeat_ns = duration_ns(config.heartbeat);
        proto.heartbeats_missed = config.heartbeats_missed;
        proto.handshake_timeout_ns = duration_ns(config.handshake_timeout);
        proto.max_sessions = config.max_sessions;
        let identity = proto.identity;
        let engine = Engine::new(Proto::new(proto), Box::new(network), ports, EngineOptions::default());
        let address = engine.address().to_owned();
        let (worker, handle) = Worker::new(engine, config.worker)?;
        let spin_ns = duration_ns(config.spin);
        let thread = std::thread::Builder::new()
            .name("crossdock-xfer".into())
            .spawn(move || worker.run(spin_ns))
            .map_err(Error::Thread)?;
        Ok(Endpoint { handle, address, identity, ports: infos, thread: Some(thread) })
    }

    /// What threads use; cheap to clone.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What peers dial: `"ip:port"`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// This endpoint, and this life of it.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The opened ports.
    pub fn ports(&self) -> &[PortInfo] {
        &self.ports
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            // An error of the thread has ended its transfers already; a panic has been printed.
            let _ = thread.join();
        }
    }
}
