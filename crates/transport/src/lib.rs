//! How bytes move: the one trait that every transport implements, and the suite that every implementation passes.
//!
//! A [`Port`] is one opened device (one rail). It has *lanes*, one connection to one peer each, and *regions*,
//! registered memory. Whoever owns a port [posts](Port::post) [ops](Op) on a lane and [polls](Port::poll) for
//! [events](Event). The order of calls for two ports A and B that meet:
//!
//! 1. `register` memory on either side; the [`RemoteKey`] travels to the other side by any means.
//! 2. `open_lane` on both; the [`LaneAddress`]es are exchanged by any means.
//! 3. `connect` on both, with the other's address; each side hears [`Event::Up`].
//! 4. `attach` the other side's keys; `grant` pages to the peer that may write or read them.
//! 5. `post`, `poll`, …; `arm` before sleeping.
//! 6. `revoke` and `close`; each side hears [`Event::Down`] exactly once.
#![forbid(unsafe_code)]

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod event;
mod grant;
mod op;
mod port;
mod remainder;
mod slab;

pub use error::{DeviceError, DeviceName, DeviceStatus, DownCause, Error, Result};
pub use event::{Event, Events};
pub use grant::{Access, Grant, GrantId, GrantTable, GrantedBuffer, Refusal};
pub use op::{Direction, Op, Posted, Shape, Token};
pub use port::{
    Arm, Attached, Fence, LaneAddress, LaneId, LaneTags, LocalId, MappedBytes, Mapping, PeerId, Port,
    PortInfo, RemoteId, RemoteKey, require_host_memory,
};
pub use remainder::Remainder;
pub use slab::Slab;
