//! A [`Port`](crossdock_transport::Port) over RDMA verbs: reliable connections of InfiniBand and RoCE devices.
//!
//! Nothing is linked: `libibverbs.so.1` is looked for when a port is opened, so that a program with this port
//! starts on machines without it.
//!
//! Each lane is one queue pair. Writes and reads go straight between registered memory; an immediate comes after the bytes
//! of every earlier write of its lane. What travels beside them is described in `docs/wire-verbs.md`.
//!
//! - The device checks keys, not grants: whoever has a lane can write wherever it has been told a key of. So the pages of a
//!   revoked grant are free when every lane of the peer is down *here*
//!   ([`Fence::WhenDown`](crossdock_transport::Fence::WhenDown)); that needs nothing of the peer.
//! - `Done` of a write means that the peer's device has acknowledged it: its bytes are in the peer's memory, or about to be
//!   written there before anything that the device does later.
//! - Posting and polling allocate nothing. Connecting a lane can take the kernel a second when the peer's address does
//!   not resolve.
#![deny(unsafe_code)]

mod address;
mod alarm;
mod choice;
mod counters;
mod domain;
#[cfg(feature = "fake")]
pub mod fake;
mod ibverbs;
mod lane;
mod message;
mod options;
mod port;
mod probe;
mod rails;
mod receiving;
mod sending;
pub mod topology;
mod verbs;

pub use counters::VerbsCounters;
pub use ibverbs::device_memory::{Means, OutOfReach, RegisterError, Why};
pub use options::VerbsOptions;
pub use port::VerbsPort;
pub use rails::{Near, rails};
pub use verbs::Verbs;
