//! Why there is no control stream, as the network found it.

use std::{fmt, io};

/// Why a link ended, or was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkCause {
    /// Closed here.
    ClosedHere,
    /// Closed by the peer, between two frames.
    ClosedByPeer,
    /// The connection broke, or could not be made.
    Broken {
        /// The call that found it.
        call: &'static str,
        /// Its error number; 0 where the stream ended within a frame.
        errno: i32,
    },
    /// The other end did not answer the dialling in time.
    ConnectTimedOut,
    /// The peer dialled and then said nothing.
    Silent,
    /// The peer had not proven who it is, and others needed the place.
    Unproven,
    /// The peer sent what cannot be read.
    PeerMisbehaved {
        /// What it did.
        what: &'static str,
    },
    /// The peer reads so slowly that what waits for it is more than is kept.
    NotRead {
        /// So many bytes waited.
        bytes: usize,
    },
    /// The address cannot be used, now or later.
    BadAddress {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A limit of this node's configuration is reached.
    Limit {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
}

impl LinkCause {
    /// Whether another try will find the same.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::BadAddress { .. })
    }
}

impl fmt::Display for LinkCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClosedHere => f.write_str("closed here"),
            Self::ClosedByPeer => f.write_str("closed by the peer"),
            Self::Broken { call, errno: 0 } => write!(f, "the stream ended within a frame, in {call}"),
            Self::Broken { call, errno } => write!(f, "{call}: {}", io::Error::from_raw_os_error(*errno)),
            Self::ConnectTimedOut => f.write_str("the other end did not answer in time"),
            Self::Silent => f.write_str("the peer dialled and then said nothing"),
            Self::Unproven => f.write_str("the peer had not proven who it is, and others needed its place"),
            Self::PeerMisbehaved { what } => write!(f, "the peer broke the protocol: {what}"),
            Self::NotRead { bytes } => write!(f, "the peer did not read {bytes} bytes that waited for it"),
            Self::BadAddress { reason } => f.write_str(reason),
            Self::Limit { what, limit } => write!(f, "limit of {limit} {what} reached here"),
        }
    }
}
