//! One worker: ports, network, protocol and progress put together.

use std::net::{IpAddr, SocketAddr};
use std::thread::JoinHandle;
use std::time::Duration;

use crossdock_cuda::CudaPort;
use crossdock_engine::{
    Engine, EngineOptions, Network, OsError, SocketNetwork, SocketOptions, duration_ns, now_ns,
};
use crossdock_flight::Folder;
use crossdock_kv::{Handle, NotTaken, Turn, Worker, WorkerOptions};
use crossdock_proto::{Auth, Fingerprint, Identity, Proto, Rail};
use crossdock_shm::ShmPort;
use crossdock_tcp::{TcpOptions, TcpPort};
use crossdock_transport::{Port, PortInfo};
use crossdock_verbs::VerbsPort;

use crate::config::{Authentication, Config, PortConfig, Progress};
use crate::error::Error;

/// One worker. Dropping it says goodbye to all peers and ends its rooms, each with
/// [`PeerLost`](crate::End::PeerLost) and [`ClosedHere`](crate::SessionEnd::ClosedHere); of what is asked of it later its
/// handles say that it has stopped. Pages that no write can land in any more come home; those that a peer could still
/// use stay out of their pool, and their ticket says [`Abandoned`](crate::Abandoned).
#[derive(Debug)]
pub struct Node {
    handle: Handle,
    address: String,
    identity: Identity,
    ports: Vec<PortInfo>,
    progress: Progression,
}

enum Progression {
    Thread(Option<JoinHandle<Result<(), OsError>>>),
    Caller(Box<Worker>),
}

impl Node {
    /// Opens the ports, registers the memory, begins to listen and, if so configured, starts the progress thread.
    pub fn open(config: Config) -> Result<Self, Error> {
        let auth = auth(&config.authentication)?;
        let ports = open_ports(&config.ports, config.bind, config.advertise)?;
        let infos: Vec<PortInfo> = ports.iter().map(|port| port.info().clone()).collect();
        let mut network = SocketOptions::new(config.bind);
        network.advertise = config.advertise;
        check_limits(&config)?;
        let sessions = config.max_sessions as usize;
        // Dials that cross, and sessions that end while the next one begins.
        network.max_sessions = sessions.saturating_mul(2);
        network.max_links = sessions.saturating_mul(4);
        network.max_stranger_links = config.max_stranger_links;
        network.max_frame_bytes = config.max_frame_bytes;
        network.send_buffer_bytes = network.send_buffer_bytes.max(config.max_frame_bytes.saturating_mul(4));
        let network = SocketNetwork::open(network)?;
        let mut proto = crossdock_proto::Config::new(identity(config.node)?, config.name);
        proto.entropy = random()?;
        proto.auth = auth;
        proto.fingerprint = Fingerprint::new(config.layout.fingerprint());
        proto.rails = infos.iter().map(rail).collect();
        proto.lanes_per_rail = config.lanes_per_rail;
        config.layout.encode(&mut proto.app);
        proto.pulse_address = network.pulse_address().to_owned();
        proto.heartbeat_ns = duration_ns(config.heartbeat);
        proto.heartbeats_missed = config.heartbeats_missed;
        proto.warm_up_grace_ns = duration_ns(config.warm_up_grace);
        proto.handshake_timeout_ns = duration_ns(config.handshake_timeout);
        proto.drain_timeout_ns = duration_ns(config.drain_timeout);
        proto.lane_retry_min_ns = duration_ns(config.lane_retry);
        proto.max_sessions = config.max_sessions;
        proto.max_rooms = config.max_rooms;
        proto.max_grants = config.max_grants;
        proto.max_parked = config.max_parked;
        proto.max_parked_bytes = config.max_parked_bytes;
        proto.max_parked_per_session = config.max_parked_per_session;
        proto.max_parked_bytes_per_session = config.max_parked_bytes_per_session;
        proto.max_parked_ns = duration_ns(config.max_parked_time);
        proto.max_frame_bytes = config.max_frame_bytes;
        proto.flight = config.flight;
        let identity = proto.identity;
        // Rooms are all that a worker knows.
        let mut options = EngineOptions { max_side_arrivals: 0, ..EngineOptions::default() };
        options.max_backlog_bytes = options.max_backlog_bytes.max(config.max_frame_bytes.saturating_mul(16));
        let engine = Engine::new(Proto::new(proto), Box::new(network), ports, options);
        let address = engine.address().to_owned();
        let folder = config.flight_folder.map(Folder::open).transpose().map_err(Error::Thread)?;
        let (mut worker, handle) = Worker::new(
            engine,
            WorkerOptions {
                layout: config.layout,
                memory: config.memory,
                verify: config.verify,
                max_commands: config.max_commands,
                max_targets: config.max_sessions as usize,
                turn_bytes: config.turn_bytes,
            },
        )?;
        worker.count_from_calls();
        folder.into_iter().for_each(|folder| worker.dump_into(folder));
        let progress = match config.progress {
            Progress::Caller => Progression::Caller(Box::new(worker)),
            Progress::Thread { spin } => {
                let spin_ns = duration_ns(spin);
                let thread = std::thread::Builder::new()
                    .name("crossdock".into())
                    .spawn(move || worker.run(spin_ns))
                    .map_err(Error::Thread)?;
                Progression::Thread(Some(thread))
            }
        };
        Ok(Self { handle, address, identity, ports: infos, progress })
    }

    /// What threads use to open rooms; cheap to clone.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What peers dial: `"ip:port"`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// This node, and this life of it.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The opened ports.
    pub fn ports(&self) -> &[PortInfo] {
        &self.ports
    }

    /// Makes progress, with [`Progress::Caller`]; never blocks. With a progress thread there is nothing to do here.
    pub fn progress(&mut self) -> Turn {
        match &mut self.progress {
            Progression::Caller(worker) => worker.turn_or_glance(now_ns()),
            Progression::Thread(_) => Turn::Idle,
        }
    }

    /// Sleeps until there is progress to make, with [`Progress::Caller`], for no longer than this.
    pub fn park(&mut self, longest: Duration) -> Result<(), Error> {
        match &mut self.progress {
            Progression::Caller(worker) => Ok(worker.park(duration_ns(longest))?),
            Progression::Thread(_) => Ok(()),
        }
    }

    /// The worker itself, with [`Progress::Caller`].
    pub fn worker(&mut self) -> Option<&mut Worker> {
        match &mut self.progress {
            Progression::Caller(worker) => Some(worker),
            Progression::Thread(_) => None,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Progression::Thread(thread) = &mut self.progress {
            // A full queue empties as long as the thread runs.
            while self.handle.stop() == Err(NotTaken::Busy) {
                std::thread::yield_now();
            }
            if let Some(thread) = thread.take() {
                // An error of the thread has ended its rooms already; a panic has been printed.
                let _ = thread.join();
            }
        }
    }
}

impl std::fmt::Debug for Progression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Progression::Thread(_) => "Thread",
            Progression::Caller(_) => "Caller",
        })
    }
}

pub(crate) fn open_ports(
    ports: &[PortConfig],
    bind: SocketAddr,
    advertise: Option<IpAddr>,
) -> Result<Vec<Box<dyn Port>>, Error> {
    if ports.is_empty() {
        return Err(Error::NoPort);
    }
    let open = |port: &PortConfig| -> Result<Box<dyn Port>, Error> {
        match port {
            PortConfig::Shm(options) => match ShmPort::open(options.clone()) {
                Ok(port) => Ok(Box::new(port)),
                Err(error) => Err(Error::Port { port: "shm", error }),
            },
            PortConfig::Tcp(options) => {
                let options = options.clone().unwrap_or_else(|| TcpOptions {
                    bind: SocketAddr::new(bind.ip(), 0),
                    advertise,
                    ..TcpOptions::default()
                });
                match TcpPort::open(options) {
                    Ok(port) => Ok(Box::new(port)),
                    Err(error) => Err(Error::Port { port: "tcp", error }),
                }
            }
            PortConfig::Verbs(options) => match VerbsPort::open(options.clone()) {
                Ok(port) => {
                    tracing::info!(rail = port.describe(), "opened");
                    Ok(Box::new(port))
                }
                Err(error) => Err(Error::Port { port: "verbs", error }),
            },
            PortConfig::Cuda { gpu, options } => Ok(Box::new(CudaPort::open(gpu, options.clone())?)),
        }
    };
    ports.iter().map(open).collect()
}

/// A port as the handshake offers it.
pub(crate) fn rail(info: &PortInfo) -> Rail {
    Rail { kind: info.kind, reach: info.reach.clone(), bytes_per_second: info.bytes_per_second }
}

pub(crate) fn auth(authentication: &Authentication) -> Result<Auth, Error> {
    match authentication {
        Authentication::PreSharedKey(key) if key.len() < Authentication::SHORTEST_KEY_BYTES => {
            Err(Error::ShortKey { bytes: key.len() })
        }
        Authentication::PreSharedKey(key) => Ok(Auth::PreSharedKey(key.clone())),
        Authentication::Off => Ok(Auth::Off),
    }
}

fn check_limits(config: &Config) -> Result<(), Error> {
    let bad = |option, reason| Err(Error::BadLimit { option, reason });
    if !(1..=MOST_SESSIONS).contains(&config.max_sessions) {
        return bad("max_sessions", "from 1 to a million");
    }
    if config.flight.peers > MOST_SESSIONS || config.flight.records > MOST_RECORDS {
        return bad("flight", "at most a million peers, and 65 536 records of each");
    }
    if config.max_rooms == 0 || config.max_grants == 0 || config.max_commands == 0 {
        return bad("max_rooms, max_grants or max_commands", "at least 1 each");
    }
    if !(SHORTEST_FRAME_BYTES..=LONGEST_FRAME_BYTES).contains(&config.max_frame_bytes) {
        return bad("max_frame_bytes", "from 64 KiB, which a handshake may take, to 1 GiB");
    }
    Ok(())
}

const MOST_SESSIONS: u32 = 1_000_000;
const MOST_RECORDS: u32 = 65_536;
const SHORTEST_FRAME_BYTES: usize = 64 << 10;
const LONGEST_FRAME_BYTES: usize = 1 << 30;

pub(crate) fn identity(node: Option<u64>) -> Result<Identity, Error> {
    let bytes = random::<16>()?;
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 of 16 bytes"));
    Ok(Identity { node: node.unwrap_or(number(0)), incarnation: number(8) })
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(more) => filled += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::Random { errno: errno.raw_os_error() }),
        }
    }
    Ok(bytes)
}
