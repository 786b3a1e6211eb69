//! How a port is opened.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crossdock_transport::{Error, Result};

/// Options of a [`TcpPort`](crate::TcpPort). The defaults serve one host: they bind to the loopback address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpOptions {
    /// The name of the port, for logs and errors.
    pub name: String,
    /// Where to listen, and from where to dial. Port 0 lets the system choose.
    pub bind: SocketAddr,
    /// The address that peers dial, where it is another than `bind`: behind a translation, or when `bind` is
    /// unspecified.
    pub advertise: Option<IpAddr>,
    /// Two ports connect only if this is the same on both; empty: any two can try.
    pub reach: String,
    /// What the network carries in one direction; rails are loaded in this proportion.
    pub bytes_per_second: u64,
    /// How many lanes exist at once, those that are closing included.
    pub max_lanes: u32,
    /// How many regions are registered at once.
    pub max_regions: u32,
    /// How long [`connect`](crossdock_transport::Port::connect) may take until the lane is up; at most a day.
    pub connect_timeout: Duration,
    /// How long a closing lane goes on sending what was posted, and then waits for the peer to hear of the end; at
    /// most a day.
    pub close_timeout: Duration,
    /// The congestion control of the connections, by its name in the kernel; `None` leaves the host's default, except
    /// over the loopback address: see [`congestion_at`](TcpOptions::congestion_at).
    pub congestion: Option<String>,
    /// The kernel's send buffer of each connection; `None` lets the kernel adapt it.
    pub send_buffer_bytes: Option<usize>,
    /// The kernel's receive buffer of each connection; `None` lets the kernel adapt it.
    pub receive_buffer_bytes: Option<usize>,
    /// How many bytes of a lane wait outside the kernel before posting comes back short.
    pub send_queue_bytes: u64,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            name: "tcp0".into(),
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            reach: String::new(),
            bytes_per_second: 1_250_000_000,
            max_lanes: 256,
            max_regions: 4096,
            connect_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(1),
            congestion: None,
            send_buffer_bytes: None,
            receive_buffer_bytes: None,
            send_queue_bytes: 1 << 20,
        }
    }
}

impl TcpOptions {
    /// The congestion control of connections at this address, by its name in the kernel; `None` is the host's default.
    /// Where nobody has chosen, it is `reno` within one host: there is no network to be careful with, and one that paces
    /// what it sends, as `bbr` does, takes a fifth of the rate.
    pub fn congestion_at(&self, ip: IpAddr) -> Option<&str> {
        let within_host = ip.is_loopback().then_some("reno");
        self.congestion.as_deref().or(within_host)
    }

    /// The address that peers are told.
    pub(crate) fn reachable_ip(&self) -> Result<IpAddr> {
        let ip = self.advertise.unwrap_or(self.bind.ip());
        if ip.is_unspecified() {
            return Err(Error::BadAddress {
                reason: "a port that listens everywhere must be told what to advertise",
            });
        }
        Ok(ip)
    }

    /// The same, with times that can be added to a clock's.
    pub(crate) fn clamped(self) -> Self {
        Self {
            connect_timeout: self.connect_timeout.min(LONGEST_TIMEOUT),
            close_timeout: self.close_timeout.min(LONGEST_TIMEOUT),
            ..self
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let limits = [("lanes", self.max_lanes, LANES_MAX), ("regions", self.max_regions, REGIONS_MAX)];
        for (what, asked, limit) in limits {
            if asked == 0 || asked > limit {
                return Err(Error::Limit { what, limit: u64::from(limit) });
            }
        }
        Ok(())
    }
}

/// Longer ones are taken for this.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
const LANES_MAX: u32 = 1 << 16;
const REGIONS_MAX: u32 = 1 << 20;
