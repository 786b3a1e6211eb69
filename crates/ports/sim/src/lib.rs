//! The simulated port, and the virtual fabric that all simulated ports share.
//!
//! A [`Fabric`] is a whole network in one place: nodes, ports, control streams, datagrams, and a clock that only its
//! owner moves. Everything that chance decides comes from one seed, so that a run can be repeated exactly. Ports made
//! by [`Fabric::port`] move real bytes between real [`Memory`](crossdock_memory::Memory), under the rules of one of
//! the [`Semantics`] that real ports have, and as unkindly as those rules allow: bytes land late, in pieces and after
//! the grant was revoked, sources are read as late as possible, posts come back short, peers stop and continue.
//!
//! The owner of the fabric drives it: poll the ports, then [`Fabric::advance_to`] the time of the
//! [next event](Fabric::next_event_ns). [`Fabric::landings`] tells of every byte that landed, so that a test can
//! state that none did where none may.
#![forbid(unsafe_code)]

mod address;
mod events;
mod fabric;
mod faults;
mod landing;
mod lane;
mod net;
mod options;
mod port;
mod post;
mod random;
mod wire;
mod world;

pub use fabric::{Fabric, LaneView};
pub use landing::Landing;
pub use net::{Addr, CloseCause, Datagram, SendError, SimNet, StreamEvent, StreamId};
pub use options::{Between, Chaos, FabricOptions, OneIn, Semantics, SimPortOptions};
pub use port::SimPort;
pub use world::{NodeId, PortId};
