//! How a port is opened.

use std::time::Duration;

use crossdock_transport::{Error, Result};

use crate::verbs::Verbs;

/// Options of a [`VerbsPort`](crate::VerbsPort). The defaults take the first usable port of the first device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerbsOptions {
    /// The library; `None` loads `libibverbs.so.1`.
    pub verbs: Option<Verbs>,
    /// The device, by the name that `ibv_devices` shows; `None` takes the first that has a usable port.
    pub device: Option<String>,
    /// The port of the device, counted from 1; `None` takes the first that is active.
    pub port: Option<u8>,
    /// The index of the port's GID; `None` takes the best: RoCE v2 with an IPv4 address, then RoCE v2 with a global
    /// IPv6 one, then any of RoCE v2; on InfiniBand the first.
    pub gid_index: Option<u8>,
    /// The index of the partition key that lanes use.
    pub partition_key_index: u16,
    /// The largest packet in bytes, a power of two from 256 to 4096; `None` takes what the port says is active. A lane
    /// uses the smaller of its two ends.
    pub mtu_bytes: Option<u32>,
    /// The service level of lanes, 0 to 15 (on RoCE the priority, 0 to 7).
    pub service_level: u8,
    /// The traffic class of lanes; on RoCE its upper six bits are the DSCP.
    pub traffic_class: u8,
    /// Through how many routers packets may go.
    pub hop_limit: u8,
    /// Two ports connect only if this is the same on both; empty: ports with the same link and the same kind of GID.
    pub reach: String,
    /// What the link carries in one direction; rails are loaded in this proportion. `None` takes the port's rate.
    pub bytes_per_second: Option<u64>,
    /// How many lanes exist at once, those that are closing included.
    pub max_lanes: u32,
    /// How many regions are registered at once.
    pub max_regions: u32,
    /// How many work requests of a lane are out before posting comes back short; each is a piece of a paged op, or up to
    /// [`request_bytes`](VerbsOptions::request_bytes) of a span.
    pub requests_per_lane: u32,
    /// How long one work request may be; longer spans are cut. The device may have a smaller limit.
    pub request_bytes: u32,
    /// How many immediates may be on their way on a lane. A receive waits for each at the peer, for all lanes
    /// together: so a port takes fewer lanes where the device's shared receive queue is too short for this.
    pub immediates_per_lane: u32,
    /// Up to so many bytes are put into the work request itself, so that the device need not fetch them.
    pub inline_bytes: u32,
    /// Asks for PCIe relaxed ordering on registered memory. Arrivals are told by completions, which come after their bytes
    /// all the same.
    pub relaxed_ordering: bool,
    /// Whether [`register`](crossdock_transport::Port::register) moves a few bytes through the device, out of the region
    /// and into it, and compares them.
    pub probe_regions: bool,
    /// How long the device waits for an acknowledgement before it sends again: 4.096 us times two to this power, 1 to 31.
    /// `None` takes [14](Self::ACK_TIMEOUT_EXPONENT), which is 67 ms, so that other rails soon take over; a group of experts,
    /// in which a rank that is lost stays lost, takes [18](Self::PATIENT_ACK_TIMEOUT_EXPONENT), which is 1.1 s. A packet that
    /// is lost behind all others, or its acknowledgement, is sent again only then.
    pub ack_timeout_exponent: Option<u8>,
    /// How often the device sends again before the lane is lost, 1 to 7. Soft-RoCE takes 7 for ever.
    pub retries: u8,
    /// How long [`connect`](crossdock_transport::Port::connect) may take until the lane is up; at most a day.
    pub connect_timeout: Duration,
    /// How long a closing lane waits for the peer to hear of the end; at most a day.
    pub close_timeout: Duration,
    /// A lane on which nothing was sent for this long asks whether the peer's device still answers; at least a
    /// millisecond, and at most a day.
    pub keepalive: Duration,
    /// Says keys that the device does not know, as a peer does that is wrong or means harm.
    #[cfg(feature = "fake")]
    pub wrong_keys: bool,
    /// Sends immediates whether the peer has room for them or not.
    #[cfg(feature = "fake")]
    pub floods: bool,
}

impl Default for VerbsOptions {
    fn default() -> Self {
        Self {
            verbs: None,
            device: None,
            port: None,
            gid_index: None,
            partition_key_index: 0,
            mtu_bytes: None,
            service_level: 0,
            traffic_class: 0,
            hop_limit: 64,
            reach: String::new(),
            bytes_per_second: None,
            max_lanes: 256,
            max_regions: 4096,
            requests_per_lane: 1024,
            request_bytes: 1 << 30,
            immediates_per_lane: 120,
            inline_bytes: 64,
            relaxed_ordering: true,
            probe_regions: false,
            ack_timeout_exponent: None,
            retries: 6,
            connect_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_millis(250),
            keepalive: Duration::from_secs(1),
            #[cfg(feature = "fake")]
            wrong_keys: false,
            #[cfg(feature = "fake")]
            floods: false,
        }
    }
}

impl VerbsOptions {
    /// The [`ack_timeout_exponent`](field@Self::ack_timeout_exponent) of a port that says nothing else.
    pub const ACK_TIMEOUT_EXPONENT: u8 = 14;
    /// That of a port whose peers cannot be taken back once they are lost.
    pub const PATIENT_ACK_TIMEOUT_EXPONENT: u8 = 18;

    /// Options for a port of each device, in a text in which names are joined by `+`: `mlx5_0+mlx5_1`.
    pub fn of_devices(names: &str) -> Vec<Self> {
        names.split('+').map(|name| Self { device: Some(name.to_owned()), ..Self::default() }).collect()
    }

    pub(crate) fn ack_timeout_exponent(&self) -> u8 {
        self.ack_timeout_exponent.unwrap_or(Self::ACK_TIMEOUT_EXPONENT)
    }

    /// What is refused because nothing sensible can be made of it.
    pub(crate) fn check(&self) -> Result<()> {
        let bad = |what, advice| Err(Error::Unsupported { what, advice });
        if self.mtu_bytes.is_some_and(|mtu| !mtu.is_power_of_two() || !(256..=4096).contains(&mtu)) {
            return bad("an mtu_bytes that no device has", "give 256, 512, 1024, 2048 or 4096");
        }
        if self.service_level > 15 {
            return bad("a service_level beyond 15", "give 0 to 15");
        }
        if !(1..=31).contains(&self.ack_timeout_exponent()) {
            return bad("an ack_timeout_exponent that means for ever, or too much", "give 1 to 31");
        }
        if !(1..=7).contains(&self.retries) {
            return bad("a number of retries beyond the device's", "give 1 to 7");
        }
        if self.port == Some(0) {
            return bad("port 0 of a device", "count ports from 1");
        }
        if self.requests_per_lane == 0 || self.immediates_per_lane == 0 || self.request_bytes == 0 {
            return bad("a lane that can carry nothing", "give limits of at least 1");
        }
        if self.max_lanes == 0 || self.max_lanes > MOST_LANES || self.max_regions > MOST_REGIONS {
            return bad(
                "so many lanes or regions",
                "give max_lanes of 1 to 65 536, max_regions of at most a million",
            );
        }
        Ok(())
    }

    /// With limits that no device or clock goes beyond.
    pub(crate) fn clamped(mut self) -> Self {
        self.requests_per_lane = self.requests_per_lane.min(MOST_REQUESTS);
        self.immediates_per_lane = self.immediates_per_lane.min(MOST_IMMEDIATES);
        self.connect_timeout = self.connect_timeout.min(LONGEST);
        self.close_timeout = self.close_timeout.min(LONGEST);
        self.keepalive = self.keepalive.clamp(Duration::from_millis(1), LONGEST);
        self
    }
}

const MOST_LANES: u32 = 1 << 16;
const MOST_REGIONS: u32 = 1 << 20;
/// Completions name a request by 31 bits of its number.
const MOST_REQUESTS: u32 = 1 << 20;
const MOST_IMMEDIATES: u32 = 1 << 20;
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
