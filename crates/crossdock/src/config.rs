//! What a node is told when it is opened.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use crossdock_cuda as cuda;
use crossdock_flight::FolderOptions;
use crossdock_kv::{CacheLayout, Verify, WorkerOptions};
use crossdock_memory::Memory;
use crossdock_proto::flight::FlightLimits;
use crossdock_shm::ShmOptions;
use crossdock_tcp::TcpOptions;
use crossdock_verbs::topology::Topology;
use crossdock_verbs::{Near, VerbsOptions, rails};

/// The configuration of a [`Node`](crate::Node). [`Config::new`] gives one that works between processes of one host;
/// between hosts, set `bind` (and `advertise`) to an address that the peers reach.
#[derive(Debug)]
pub struct Config {
    /// The node's name for people: in logs, errors and the peers' lists.
    pub name: String,
    /// The node's number, the same over restarts; `None` chooses one at random.
    pub node: Option<u64>,
    /// What this node keeps, and where in its memory.
    pub layout: CacheLayout,
    /// The memory of the regions that the layout names.
    pub memory: Vec<Memory>,
    /// Where peers dial; port 0 takes any free one. Heartbeats and the tcp port use the same address.
    pub bind: SocketAddr,
    /// The address that peers are told, if it is another than that of `bind`.
    pub advertise: Option<IpAddr>,
    /// The ports to open, in the order of preference.
    pub ports: Vec<PortConfig>,
    /// Lanes for each rail and peer.
    pub lanes_per_rail: u8,
    /// Whether peers must prove a shared key.
    pub authentication: Authentication,
    /// Which rooms this node's decode side verifies by checksums.
    pub verify: Verify,
    /// Who makes progress.
    pub progress: Progress,
    /// How often peers tell this node that they live.
    pub heartbeat: Duration,
    /// How many heartbeats may be missing before a peer is lost.
    pub heartbeats_missed: u32,
    /// For how long after the beginning of a session silence is not counted.
    pub warm_up_grace: Duration,
    /// For a whole handshake.
    pub handshake_timeout: Duration,
    /// For what is still at a lane of a room that has ended. After it the session is given up, as
    /// [`Stalled`](crate::SessionEnd::Stalled), so that the room's pages come home: something between the two swallows what
    /// they send, or the peer's progress loop is not driven. 30 s by default.
    pub drain_timeout: Duration,
    /// How long after its loss a lane is offered anew that a live session has lost, while others carry on: doubles with each
    /// that does not come up, or does not hold, up to 30 s. Zero: never, and none that a peer offers is taken. 1 s by
    /// default.
    pub lane_retry: Duration,
    /// Sessions at once: peers that this node has dialed or that have dialed it; and addresses that it dials at once. 1024
    /// by default. How many lanes there may be is told to the ports, in `ports`: [`ShmOptions::max_lanes`],
    /// [`TcpOptions::max_lanes`] and [`VerbsOptions::max_lanes`]; and how many file descriptors of the peers' regions shm
    /// keeps, by [`ShmOptions::max_peer_descriptors`], 65 536 by default: a session that brings more ends, and is dialed
    /// again until there is room.
    pub max_sessions: u32,
    /// Connections at once that were accepted and whose peer has not finished the handshake; beyond it the oldest are
    /// closed. Each may hold 64 KiB. 256 by default, at least 1.
    pub max_stranger_links: usize,
    /// Rooms at once, those whose pages are still in quarantine included. 65 536 by default.
    pub max_rooms: u32,
    /// Grants at once, those that are not quiescent included. 65 536 by default, and never more than 262 144.
    pub max_grants: u32,
    /// Requests of all peers at once for rooms that are not open here yet; as many ended rooms are remembered. 65 536 by
    /// default. One that is too many, by this or any of the next four, is refused as busy.
    pub max_parked: u32,
    /// How many bytes they may hold. 256 MiB by default.
    pub max_parked_bytes: usize,
    /// How many of them may be of one session. 16 384 by default.
    pub max_parked_per_session: u32,
    /// How many bytes those of one session may hold. 64 MiB by default.
    pub max_parked_bytes_per_session: usize,
    /// How long one waits, however long its peer would. 10 minutes by default.
    pub max_parked_time: Duration,
    /// The longest control message, either way: a list of pages takes 4 bytes each. 1 MiB by default, at least 64 KiB,
    /// and the same on all nodes that talk to each other.
    pub max_frame_bytes: usize,
    /// Commands that may wait for the progress loop. 65 536 by default.
    pub max_commands: usize,
    /// Bytes that all rooms together post in one turn of the progress loop; see [`WorkerOptions::turn_bytes`]. 8 MiB by
    /// default, about a millisecond of copying: more lets few large rooms run longer at a time, less lets peers,
    /// commands and deadlines be looked at more often.
    pub turn_bytes: u64,
    /// How much the flight recorder keeps of what happens. By default the last 1,024 events of each of 128 peers, which takes
    /// 12 MiB once as many have come; [`FlightLimits::OFF`] keeps nothing.
    pub flight: FlightLimits,
    /// Where it is written down when a room fails or a session is lost, for `crossdock timeline`; and by
    /// [`Handle::flight`](crate::Handle::flight) it can be asked for at any time. Nowhere by default.
    pub flight_folder: Option<FolderOptions>,
}

/// Whether peers must prove a shared key. It has no default: a node that lets anybody in was told to.
#[derive(Clone, PartialEq, Eq)]
pub enum Authentication {
    /// Both sides prove that they know this key, by HMAC-SHA256 over the handshake. It should be 32 random bytes and is
    /// at least [`Authentication::SHORTEST_KEY_BYTES`] long: whoever dials hears a proof under it, and can try keys on
    /// that for as long as they like. Payloads and later control messages are neither encrypted nor authenticated.
    PreSharedKey(Vec<u8>),
    /// Anybody who can reach [`Config::bind`] may connect, and be granted what this node grants its peers.
    Off,
}

/// A port to open.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PortConfig {
    /// Shared memory, between processes of one user on one host.
    Shm(ShmOptions),
    /// TCP. `None`: at the node's own address, any free port.
    Tcp(Option<TcpOptions>),
    /// RDMA over InfiniBand or RoCE, between hosts and on one; a rail for each. It needs `libibverbs.so.1` and a device when
    /// the node is opened, and neither before.
    ///
    /// Give several with different [devices](VerbsOptions::device) for several rails: two nodes pair theirs in this order,
    /// as far as they [reach](VerbsOptions::reach) each other, and a room's bytes are split over all pairs.
    ///
    /// A lane keeps queues for all that may be under way; [`max_lanes`](VerbsOptions::max_lanes) times
    /// [`immediates_per_lane`](VerbsOptions::immediates_per_lane) is what the device's receive queue must hold.
    Verbs(VerbsOptions),
    /// A GPU of this process's, between processes of one user on one host: into and out of memory of GPUs, and of the host's
    /// that crossdock allocated. It compiles its kernels when the node is opened, or takes them from where they are kept.
    Cuda {
        /// The GPU.
        gpu: cuda::Gpu,
        /// How the port is opened.
        options: cuda::CudaOptions,
    },
}

impl PortConfig {
    /// A port on each RDMA device of this machine that is usable and nearest to a GPU or a NUMA node, as the kernel tells
    /// it: with `like`, but for device and port. One that `like` names is taken wherever it is. Empty where there is none.
    ///
    /// ```
    /// use crossdock::{Near, PortConfig, VerbsOptions};
    /// // The rails of the worker of one GPU, by the address that `nvidia-smi` shows.
    /// let gpu = "0000:8a:00.0".parse()?;
    /// let mut ports = PortConfig::rdma_near(Near::Gpu(gpu), &VerbsOptions::default());
    /// ports.push(PortConfig::Tcp(None));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rdma_near(near: Near, like: &VerbsOptions) -> Vec<PortConfig> {
        let machine = Topology::read(Path::new("/"));
        rails(&machine, near, like).into_iter().map(PortConfig::Verbs).collect()
    }
}

/// Who makes progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A thread of the node's own, which spins for this long after something has happened before it sleeps.
    Thread {
        /// How long.
        spin: Duration,
    },
    /// The caller, by [`Node::progress`](crate::Node::progress).
    Caller,
}

impl Config {
    /// A node on this host: shared memory where the peer is on the same host, else TCP; loopback addresses, a progress
    /// thread. Both sides of a session need the same `authentication`.
    pub fn new(
        name: impl Into<String>,
        layout: CacheLayout,
        memory: Vec<Memory>,
        authentication: Authentication,
    ) -> Self {
        Self {
            name: name.into(),
            node: None,
            layout,
            memory,
            bind: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            advertise: None,
            ports: vec![PortConfig::Shm(ShmOptions::default()), PortConfig::Tcp(None)],
            lanes_per_rail: 1,
            authentication,
            verify: Verify::Off,
            progress: Progress::Thread { spin: Duration::from_micros(50) },
            heartbeat: Duration::from_millis(200),
            heartbeats_missed: 10,
            warm_up_grace: Duration::ZERO,
            handshake_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(30),
            lane_retry: Duration::from_secs(1),
            max_sessions: 1024,
            max_stranger_links: 256,
            max_rooms: 65_536,
            max_grants: 65_536,
            max_parked: 65_536,
            max_parked_bytes: 256 << 20,
            max_parked_per_session: 16_384,
            max_parked_bytes_per_session: 64 << 20,
            max_parked_time: Duration::from_secs(600),
            max_frame_bytes: 1 << 20,
            max_commands: 65_536,
            turn_bytes: WorkerOptions::TURN_BYTES,
            flight: FlightLimits::USUAL,
            flight_folder: None,
        }
    }
}

impl Authentication {
    /// A [pre-shared key](Authentication::PreSharedKey) that is shorter is refused when the node is opened.
    pub const SHORTEST_KEY_BYTES: usize = 16;
}

/// Without the key: configurations are logged.
impl std::fmt::Debug for Authentication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Authentication::PreSharedKey(_) => "PreSharedKey(..)",
            Authentication::Off => "Off",
        })
    }
}
