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
//!
//! ```
//! use crossdock_sim::{Fabric, FabricOptions, NodeId, OneIn, Semantics, SimPortOptions};
//! use crossdock_transport::{Event, Events, LaneTags, Op, PeerId, Port};
//!
//! // Without these two, posting and polling come back short now and then, as they may.
//! let options = FabricOptions { short_post: OneIn(0), short_poll: OneIn(0), ..Default::default() };
//! let fabric = Fabric::new(42, options);
//! let mut here = fabric.port(NodeId(0), SimPortOptions::new(Semantics::Verbs));
//! let mut there = fabric.port(NodeId(1), SimPortOptions::new(Semantics::Verbs));
//! let (near, near_address) = here.open_lane(PeerId(1))?;
//! let (far, far_address) = there.open_lane(PeerId(0))?;
//! let tags = LaneTags { ours: [1; 32], theirs: [1; 32] };
//! here.connect(near, &far_address, &tags)?;
//! there.connect(far, &near_address, &tags)?;
//!
//! let mut heard = Vec::new();
//! while let Some(next_ns) = fabric.next_event_ns() {
//!     fabric.advance_to(next_ns);
//!     let mut events = Events::with_capacity(16);
//!     here.poll(&mut events);
//!     if events.drain().any(|event| event == Event::Up { lane: near }) {
//!         here.post(near, &[Op::notify(7)])?;
//!     }
//!     there.poll(&mut events);
//!     heard.extend(events.drain());
//! }
//! assert_eq!(heard, [Event::Up { lane: far }, Event::Arrived { lane: far, imm: 7 }]);
//! # Ok::<(), crossdock_transport::Error>(())
//! ```
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
