//! A [`Port`](crossdock_transport::Port) over TCP, for host memory.
//!
//! It needs nothing but an address, so it is the port that always works. Each lane is one connection. Bytes leave
//! straight from registered memory, many pieces in one call, and are read straight into their final place: the
//! receiver checks grant, generation, bounds and peer of every piece before its first byte lands, so a revoked
//! grant keeps late bytes out at once ([`Fence::Now`](crossdock_transport::Fence::Now)) and its pages can be used
//! again.
//!
//! What travels is described in `docs/wire-tcp.md`.
//!
//! - `Done` for a write means that the kernel has its bytes: the source can be changed. That the bytes were read by
//!   the peer is told by the peer's own means, usually the immediate.
//! - Payloads are neither encrypted nor authenticated. The tags of a lane prove who is at its other end when it
//!   begins; who can alter packets in between can alter pages.
//! - The kernel copies what is sent. `MSG_ZEROCOPY` is not used: it would save that copy on a network card, not on
//!   the loopback device, and a write would be done only when the peer has acknowledged its bytes.
//! - A lane that is up takes about 250 kB for its queues, allocated when it comes up; posting and polling allocate
//!   nothing after that.
//! - A peer that is silent keeps its lane: whether it lives is for the owner of the port to find out, who then
//!   closes the lane.
#![deny(unsafe_code)]

mod address;
mod connection;
mod domain;
mod frame;
mod greeting;
mod hot;
mod lane;
mod options;
mod port;
mod receive;
mod requests;
mod send;
mod socket;
mod vectored;

pub use domain::Counters;
pub use options::TcpOptions;
pub use port::TcpPort;
