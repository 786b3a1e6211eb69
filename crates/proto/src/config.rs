//! What a node is told once, and its limits.

use crossdock_transport::RemoteKey;

use crate::auth::Auth;
use crate::fingerprint::Fingerprint;
use crate::flight::FlightLimits;
use crate::message::Identity;

/// The configuration of one node's protocol.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node and this life of it.
    pub identity: Identity,
    /// For people: in logs, errors and the peers' lists. With the fingerprint, the rails and the heartbeats' address it
    /// makes the first frame that peers see, which is at most 64 KiB long.
    pub name: String,
    /// Random bytes, new at each start: the nonces of handshakes come from them.
    pub entropy: [u8; 32],
    /// Whether peers must prove a shared key.
    pub auth: Auth,
    /// What peers must have in common with this node.
    pub fingerprint: Fingerprint,
    /// The opened ports, in the order of preference.
    pub rails: Vec<Rail>,
    /// Lanes a rail and peer.
    pub lanes_per_rail: u8,
    /// Told to each peer as it is: the cache layout.
    pub app: Vec<u8>,
    /// Whether the session's number on this side follows it, in 4 bytes: by that both sides can name what is the session's
    /// own.
    pub app_numbers_sessions: bool,
    /// Where peers send heartbeats.
    pub pulse_address: String,
    /// How often to send them.
    pub heartbeat_ns: u64,
    /// How many may be missing before the peer counts as lost.
    pub heartbeats_missed: u32,
    /// After a session has begun, silence is not counted for this long (first step, kernel compilation).
    pub warm_up_grace_ns: u64,
    /// For the whole handshake, lanes included; and for a lane that is to come back, from its offer on.
    pub handshake_timeout_ns: u64,
    /// How long ops of a room that has ended may stay at its session's lanes before the session is given up, so that the
    /// pages come home.
    pub drain_timeout_ns: u64,
    /// Before a lost target is dialed again, at first; doubles up to the maximum.
    pub redial_min_ns: u64,
    /// The longest pause between two dials.
    pub redial_max_ns: u64,
    /// Before a lane is offered anew that a live session has lost, at first; doubles up to the maximum. 0: never, and none
    /// that the peer offers is taken.
    pub lane_retry_min_ns: u64,
    /// The longest pause between two such offers. A lane that is lost again sooner than this counts as one that did
    /// not come up.
    pub lane_retry_max_ns: u64,
    /// Sessions at once.
    pub max_sessions: u32,
    /// Rooms at once, those whose pages are still in quarantine included.
    pub max_rooms: u32,
    /// Grants at once, of rooms; at most those whose names are not for standing grants.
    pub max_grants: u32,
    /// Grants and wants of peers for rooms that are not open here yet; as many ended rooms are remembered.
    pub max_parked: u32,
    /// How many bytes those of all peers hold.
    pub max_parked_bytes: usize,
    /// How many of them one session may have.
    pub max_parked_per_session: u32,
    /// How many bytes those of one session may hold.
    pub max_parked_bytes_per_session: usize,
    /// How long one waits at most, however long its peer would.
    pub max_parked_ns: u64,
    /// The longest frame that the network takes, either way. Every node of a cluster takes the same.
    pub max_frame_bytes: usize,
    /// How much the flight recorder keeps.
    pub flight: FlightLimits,
}

/// One opened port, as the handshake offers it.
#[derive(Clone, Debug)]
pub struct Rail {
    /// The transport.
    pub kind: &'static str,
    /// Rails connect only where this is equal.
    pub reach: String,
    /// What it carries.
    pub bytes_per_second: u64,
}

/// A registered region, as peers hear of it.
#[derive(Clone, Debug)]
pub struct Region {
    /// Its number on this node.
    pub region: u32,
    /// Its length.
    pub bytes: u64,
    /// Its key on each rail that took it.
    pub keys: Vec<(u8, RemoteKey)>,
}

impl Config {
    /// The defaults, for a node with this identity: authentication off, no rails.
    pub fn new(identity: Identity, name: impl Into<String>) -> Self {
        const MS: u64 = 1_000_000;
        Self {
            identity,
            name: name.into(),
            entropy: [0; 32],
            auth: Auth::Off,
            fingerprint: Fingerprint::default(),
            rails: Vec::new(),
            lanes_per_rail: 1,
            app: Vec::new(),
            app_numbers_sessions: false,
            pulse_address: String::new(),
            heartbeat_ns: 200 * MS,
            heartbeats_missed: 10,
            warm_up_grace_ns: 0,
            handshake_timeout_ns: 5_000 * MS,
            drain_timeout_ns: 30_000 * MS,
            redial_min_ns: 50 * MS,
            redial_max_ns: 2_000 * MS,
            lane_retry_min_ns: 1_000 * MS,
            lane_retry_max_ns: 30_000 * MS,
            max_sessions: 1024,
            max_rooms: 65_536,
            max_grants: 65_536,
            max_parked: 65_536,
            max_parked_bytes: 256 << 20,
            max_parked_per_session: 16_384,
            max_parked_bytes_per_session: 64 << 20,
            max_parked_ns: 600_000 * MS,
            max_frame_bytes: 1 << 20,
            flight: FlightLimits::USUAL,
        }
    }
}
