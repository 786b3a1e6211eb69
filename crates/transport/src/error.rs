//! What can go wrong at a port: with a call, and with a lane.

use crate::LaneId;

/// The result of a port's methods.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a port refused a call. Nothing of the call was done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The lane is not connected yet; wait for `Up`.
    #[error("lane {} is not up yet", lane.0)]
    LaneNotUp {
        /// Which lane.
        lane: LaneId,
    },
    /// The lane has ended, or its end has begun.
    #[error("lane {} is down", lane.0)]
    LaneDown {
        /// Which lane.
        lane: LaneId,
    },
    /// The port knows no such lane.
    #[error("lane {} is unknown", lane.0)]
    UnknownLane {
        /// Which lane.
        lane: LaneId,
    },
    /// The port knows no such region, local or attached.
    #[error("{side} region {region} is unknown")]
    UnknownRegion {
        /// `"local"` or `"remote"`.
        side: &'static str,
        /// Its number.
        region: u32,
    },
    /// The op reaches beyond a region.
    #[error("op reaches byte {end} of a {side} region of {region_bytes} bytes")]
    OutOfRange {
        /// `"local"` or `"remote"`.
        side: &'static str,
        /// The furthest byte that it would touch.
        end: u64,
        /// The length of the region.
        region_bytes: u64,
    },
    /// The op makes no sense whatever the regions are.
    #[error("bad op: {reason}")]
    BadOp {
        /// Why.
        reason: &'static str,
    },
    /// The region is still used by an op or a grant.
    #[error("region is in use by {by}")]
    RegionInUse {
        /// `"an op"`, `"a grant"`, or a revoked grant whose peer may still write by itself.
        by: &'static str,
    },
    /// The grant cannot be given as asked.
    #[error("bad grant: {reason}")]
    BadGrant {
        /// Why.
        reason: &'static str,
    },
    /// The peer's address is not one of this kind of port.
    #[error("bad lane address: {reason}")]
    BadAddress {
        /// Why.
        reason: &'static str,
    },
    /// The peer's key is not one of this kind of port.
    #[error("bad remote key: {reason}")]
    BadKey {
        /// Why.
        reason: &'static str,
    },
    /// What the call needs from the peer has not come yet. Poll, then try again.
    #[error("not known yet: the peer's announcement is still on its way")]
    NotYet,
    /// A limit of the port's configuration is reached.
    #[error("limit reached: {what} ({limit})")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// The port cannot take this memory, or cannot do this here.
    #[error("{what} is not possible here: {advice}")]
    Unsupported {
        /// What was asked.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The operating system refused a call.
    #[error("{call} failed: {}", std::io::Error::from_raw_os_error(*errno))]
    Os {
        /// The call.
        call: &'static str,
        /// Its error number.
        errno: i32,
    },
    /// A device's driver refused a call.
    #[error("{call} answers {code}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its answer, in its own numbers.
        code: i32,
    },
}

/// Why a lane ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DownCause {
    /// Closed here.
    ClosedHere,
    /// Closed by the peer, in order.
    ClosedByPeer,
    /// The peer's process has ended.
    PeerDied,
    /// The connection broke, or was never made.
    Broken {
        /// The call that found it.
        call: &'static str,
        /// Its error number; 0 for an unexpected end of the stream.
        errno: i32,
    },
    /// The peer showed a wrong tag.
    NotAuthentic,
    /// The peer broke the rules: wrote outside its grants, or sent what cannot be read.
    PeerMisbehaved {
        /// What it did.
        what: &'static str,
    },
    /// The other end did not connect in time.
    ConnectTimedOut,
    /// The peer wanted this port to keep more than its limit allows, for all its lanes together.
    LimitReached {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// The device reported an error for an op of the lane, or for its queue pair.
    Device(DeviceError),
    /// A device that moves bytes by itself has failed, or its driver.
    Driver {
        /// The driver's function that found it.
        call: &'static str,
        /// Its answer, in its own numbers.
        code: i32,
    },
}

/// What a device said of a lane that it gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceError {
    /// Which device, and which of its ports.
    pub device: DeviceName,
    /// The device's code.
    pub status: u32,
    /// What that code means.
    pub meaning: &'static DeviceStatus,
    /// The code that only the vendor can explain.
    pub vendor: u32,
    /// This end's queue pair.
    pub queue_pair: u32,
    /// The peer's address in the device's network (of verbs, its GID).
    pub peer: [u8; 16],
}

/// A device's code in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// What it is called.
    pub name: &'static str,
    /// What to look at.
    pub advice: &'static str,
}

/// A device's name, of which the first 15 bytes are kept: errors are copied about, and stay small.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DeviceName {
    bytes: [u8; 15],
    len: u8,
}

impl DeviceName {
    /// Keeps a name, cut where it is too long.
    pub fn new(name: &str) -> Self {
        let mut bytes = [0; 15];
        let mut len = name.len().min(bytes.len());
        while !name.is_char_boundary(len) {
            len -= 1;
        }
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self { bytes, len: len as u8 }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).expect("it was cut between letters")
    }
}

impl std::fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl DownCause {
    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::ClosedHere | Self::ClosedByPeer => "nothing to do: closed in order",
            Self::PeerDied => "look at why the peer's process ended",
            Self::Broken { .. } => "look at the network between the two, and at the peer's log",
            Self::NotAuthentic => "look for somebody between the two, or for addresses that are used twice",
            Self::PeerMisbehaved { .. } => {
                "run the same version of crossdock on both sides, and report it if it repeats"
            }
            Self::ConnectTimedOut => {
                "check that the peer runs, and that its port's address can be reached from this one"
            }
            Self::LimitReached { .. } => {
                "raise the limit in the port's options, or register fewer regions at the peer"
            }
            Self::Device(error) => error.meaning.advice,
            Self::Driver { .. } => {
                "look at the kernel log, and at what `crossdock doctor` says of the device; start the process again"
            }
        }
    }
}

impl std::fmt::Display for DownCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ClosedHere => f.write_str("closed here"),
            Self::ClosedByPeer => f.write_str("closed by the peer"),
            Self::PeerDied => f.write_str("the peer's process has ended"),
            Self::Broken { call, errno: 0 } => write!(f, "connection ended unexpectedly in {call}"),
            Self::Broken { call, errno } => {
                write!(f, "{call} failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
            Self::NotAuthentic => f.write_str("the peer did not prove that it belongs to the session"),
            Self::PeerMisbehaved { what } => write!(f, "the peer broke the protocol: {what}"),
            Self::ConnectTimedOut => f.write_str("the other end did not connect in time"),
            Self::LimitReached { what, limit } => write!(f, "limit reached: {what} ({limit})"),
            Self::Device(error) => error.fmt(f),
            Self::Driver { call, code } => write!(f, "{call} answers {code}"),
        }
    }
}

impl std::fmt::Display for DeviceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { device, status, meaning, vendor, queue_pair, .. } = self;
        let (device, name) = (device.as_str(), meaning.name);
        let peer = std::net::Ipv6Addr::from(self.peer);
        write!(f, "{device} reported {name} ({status}, vendor {vendor:#x}) for queue pair {queue_pair}")?;
        match peer.to_ipv4_mapped() {
            Some(peer) => write!(f, " to {peer}"),
            None => write!(f, " to {peer}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_between_letters() {
        for name in ["", "mlx5_0:1", &"ä".repeat(40), &format!("a{}", "ä".repeat(40)), &"x".repeat(15)] {
            let kept = DeviceName::new(name);
            assert!(name.starts_with(kept.as_str()) && kept.as_str().len() <= 15);
            assert!(kept.as_str().len() >= name.len().min(14));
        }
    }
}
