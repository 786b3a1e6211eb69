//! Tokens to their experts and back: the ranks of a group, each in its process, and what [`Group`] does with them.
//!
//! A rank opens a [`Meeting`], tells the others its address (or lets a registry do that) and
//! [meets](Meeting::meet) them; the [`Group`] that it gets is its end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crossdock_engine::{Engine, EngineOptions, Network, SocketNetwork, SocketOptions, duration_ns};
use crossdock_proto::Proto;
use crossdock_shm::ShmOptions;

pub use crossdock_ep::*;

use crate::VerbsOptions;
use crate::config::{Authentication, PortConfig};
use crate::error::Error;
use crate::node::{auth, identity, open_ports, rail, random};

/// What one rank of a group is told.
#[derive(Clone, Debug)]
pub struct MeetingConfig {
    /// For people, in logs and errors.
    pub name: String,
    /// What all ranks agree on. Ranks that do not are refused, with the difference in words.
    pub group: GroupConfig,
    /// Which rank this is.
    pub rank: u32,
    /// How it waits, and what it does about ranks that do not come.
    pub options: GroupOptions,
    /// Where the other ranks dial this one; port 0 lets the system choose.
    pub bind: SocketAddr,
    /// The address that the others are told, where it is not the bound one.
    pub advertise: Option<IpAddr>,
    /// The transports, in the order of preference. Two ranks use the first that reaches between them: shared memory on one
    /// host, where both map each other's memory. RDMA devices wait longer for each other than under a node, unless their
    /// [`ack_timeout_exponent`](crate::VerbsOptions::ack_timeout_exponent) is set.
    pub ports: Vec<PortConfig>,
    /// Whether the others must prove a shared key.
    pub authentication: Authentication,
    /// How often ranks tell each other that they live.
    pub heartbeat: Duration,
    /// How many heartbeats may be missing before a rank is dead to the others.
    pub heartbeats_missed: u32,
    /// For how long after ranks have met silence counts for nothing: a first step may compile for long.
    pub heartbeat_grace: Duration,
    /// For one handshake.
    pub handshake_timeout: Duration,
}

impl MeetingConfig {
    /// A rank that others on this host reach, with the usual limits. For ranks on other hosts, set
    /// [`bind`](Self::bind) to an address that they reach.
    pub fn new(group: GroupConfig, rank: u32, authentication: Authentication) -> MeetingConfig {
        MeetingConfig {
            name: format!("experts-{rank}"),
            group,
            rank,
            options: GroupOptions::default(),
            bind: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            advertise: None,
            ports: vec![PortConfig::Shm(ShmOptions::default()), PortConfig::Tcp(None)],
            authentication,
            heartbeat: Duration::from_millis(200),
            heartbeats_missed: 10,
            heartbeat_grace: GroupOptions::default().warm_up,
            handshake_timeout: Duration::from_secs(5),
        }
    }
}

/// A port that does not lose a rank to a moment in which the network stands still: the rank would be masked for good. Who is
/// dead is found by the heartbeats or by the group's deadline.
fn patient(port: PortConfig) -> PortConfig {
    match port {
        PortConfig::Verbs(mut options) => {
            options.ack_timeout_exponent.get_or_insert(VerbsOptions::PATIENT_ACK_TIMEOUT_EXPONENT);
            PortConfig::Verbs(options)
        }
        other => other,
    }
}

/// One rank that is ready to meet the others.
pub struct Meeting {
    engine: Engine,
    #[cfg(feature = "bootstrap")]
    identity: crossdock_proto::Identity,
    config: MeetingConfig,
}

impl Meeting {
    /// Opens the ports and begins to listen.
    pub fn open(config: MeetingConfig) -> Result<Meeting, Error> {
        let auth = auth(&config.authentication)?;
        let ports = config.ports.iter().cloned().map(patient).collect::<Vec<_>>();
        let ports = open_ports(&ports, config.bind, config.advertise)?;
        let ranks = config.group.max_tokens.len();
        let mut network = SocketOptions::new(config.bind);
        network.advertise = config.advertise;
        network.max_sessions = network.max_sessions.max(2 * ranks);
        network.max_links = network.max_links.max(4 * ranks);
        network.max_stranger_links = network.max_stranger_links.max(2 * ranks);
        let network = SocketNetwork::open(network)?;
        let identity = identity(None)?;
        let mut proto = crossdock_proto::Config::new(identity, config.name.clone());
        proto.entropy = random()?;
        proto.auth = auth;
        proto.fingerprint = config.group.fingerprint(&config.options);
        proto.rails = ports.iter().map(|port| rail(port.info())).collect();
        proto.app = introduction(config.rank);
        proto.pulse_address = network.pulse_address().to_owned();
        proto.heartbeat_ns = duration_ns(config.heartbeat);
        proto.heartbeats_missed = config.heartbeats_missed;
        proto.warm_up_grace_ns = duration_ns(config.heartbeat_grace);
        proto.handshake_timeout_ns = duration_ns(config.handshake_timeout);
        proto.max_sessions = proto.max_sessions.max(ranks as u32);
        let options = EngineOptions { keep_mappings: true, ..EngineOptions::default() };
        let engine = Engine::new(Proto::new(proto), Box::new(network), ports, options);
        Ok(Meeting {
            engine,
            #[cfg(feature = "bootstrap")]
            identity,
            config,
        })
    }

    /// What the other ranks dial: `"ip:port"`.
    pub fn address(&self) -> &str {
        self.engine.address()
    }

    /// Meets all other ranks within this time. `addresses` are those of all ranks, by rank.
    pub fn meet(self, addresses: &[String], time: Duration) -> Result<Group, MeetError> {
        let MeetingConfig { group, rank, options, .. } = self.config;
        Group::meet(self.engine, &group, rank, addresses, &options, time)
    }
}

impl std::fmt::Debug for Meeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meeting")
            .field("rank", &self.config.rank)
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "bootstrap")]
mod registry {
    use std::time::{Duration, Instant};

    use super::{Group, MeetError, Meeting};
    use crate::bootstrap::{
        Address, Client, Incarnation, Invalid, Labels, NodeId, NotRegistered, Query, Registration, Role,
        WaitError, Worker,
    };

    /// A rank that has met the others through a registry.
    #[derive(Debug)]
    pub struct Registered {
        /// Its end of the group.
        pub group: Group,
        /// Its entry in the registry. Ranks that have not listed the group yet still need it, so it should last as long
        /// as the group.
        pub registration: Registration,
    }

    /// Why ranks did not meet through a registry.
    #[derive(Debug, thiserror::Error)]
    #[non_exhaustive]
    pub enum RegistryError {
        /// The group's name, or this rank's address, cannot be registered.
        #[error(transparent)]
        Invalid(#[from] Invalid),
        /// The registration could not be kept.
        #[error("the registration could not be started: {0}")]
        Thread(std::io::Error),
        /// The registry did not take the registration.
        #[error(transparent)]
        NotRegistered(#[from] NotRegistered),
        /// The registry did not list all ranks in time.
        #[error(transparent)]
        Wait(#[from] WaitError),
        /// Two workers say that they are the same rank, or one says nothing of use.
        #[error("{count} workers of group {group} are registered as rank {rank}")]
        NotOneEach {
            /// The group.
            group: String,
            /// The rank.
            rank: u32,
            /// How many are registered as it.
            count: usize,
        },
        /// The ranks were listed and did not meet.
        #[error(transparent)]
        Meet(#[from] MeetError),
    }

    impl Meeting {
        /// Registers this rank under the group's name, waits until all are registered, and meets them; all within this
        /// time.
        pub fn meet_at(
            self,
            registry: &Client,
            group: &str,
            time: Duration,
        ) -> Result<Registered, RegistryError> {
            let begun = Instant::now();
            let left = || time.saturating_sub(begun.elapsed());
            let (rank, ranks) = (self.config.rank, self.config.group.ranks());
            let role = Role::named("experts")?;
            let address = self.address().parse().expect("an engine is dialed at ip:port");
            let worker = Worker {
                node: NodeId::new(&format!("{group}.experts.{rank}"))?,
                incarnation: Incarnation::new(self.identity.incarnation),
                role: role.clone(),
                address: Address::new(address)?,
                ttl_ms: TTL_MS,
                warm_up_ms: 0,
                member: None,
                labels: Labels::none().with(GROUP, group)?.with(RANK, &rank.to_string())?,
            };
            let registration =
                Registration::start(registry.clone(), worker).map_err(RegistryError::Thread)?;
            registration.ready();
            registration.wait(left())?;
            let query = Query::all().role(role).label(GROUP, group)?;
            let listed = registry.wait_for(&query, ranks as usize, left())?;
            let addresses = (0..ranks).map(|rank| {
                let is_it = |worker: &&crate::bootstrap::Listed| {
                    worker.worker.labels.value(RANK) == Some(&rank.to_string())
                };
                let found: Vec<_> = listed.iter().filter(is_it).collect();
                match found[..] {
                    [one] => Ok(one.worker.address.socket().to_string()),
                    _ => Err(RegistryError::NotOneEach { group: group.to_owned(), rank, count: found.len() }),
                }
            });
            let addresses = addresses.collect::<Result<Vec<String>, RegistryError>>()?;
            let group = self.meet(&addresses, left())?;
            Ok(Registered { group, registration })
        }
    }

    const GROUP: &str = "experts-group";
    const RANK: &str = "experts-rank";
    const TTL_MS: u64 = 10_000;
}

#[cfg(feature = "bootstrap")]
pub use registry::{Registered, RegistryError};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_s_ports_are_patient_unless_told_otherwise() {
        let of = |port| match patient(port) {
            PortConfig::Verbs(options) => options.ack_timeout_exponent,
            other => panic!("{other:?}"),
        };
        let mut options = VerbsOptions::default();
        assert_eq!(of(PortConfig::Verbs(options.clone())), Some(18));
        options.ack_timeout_exponent = Some(14);
        assert_eq!(of(PortConfig::Verbs(options)), Some(14));
        assert!(matches!(patient(PortConfig::Tcp(None)), PortConfig::Tcp(None)));
    }
}
