//! One progress loop: control streams, lanes, tickets, heartbeats.
//!
//! The edge of the loop is here: [`Network`] is what it asks of control streams and liveness, with
//! [`SocketNetwork`] over real sockets; [`Doorbell`] and [`Sleeper`] put it to sleep and wake it; [`Ticket`] and
//! [`Promise`] carry each end to the one who waits for it.

#![forbid(unsafe_code)]

mod clock;
mod doorbell;
mod engine;
mod heart;
mod imm;
mod network;
mod sleeper;
mod socket;
mod ticket;
mod transfer;

pub use clock::{duration_ns, now_ns};
pub use crossdock_proto::LinkCause;
pub use doorbell::{Doorbell, EventFd};
pub use engine::{
    Engine, EngineOptions, LaneRegions, PeerMapping, RailStats, SideArrival, SideDone, TransferFailed,
};
pub use heart::{Heart, HeartOptions};
pub use imm::{Imm, Kind};
pub use network::{AddressCheck, LinkEvent, LinkId, Network, NetworkError, OsError, Pulse, SendError};
pub use sleeper::{Sleeper, TooManyDescriptors, Woken};
pub use socket::{SocketNetwork, SocketOptions};
pub use ticket::{Abandoned, Promise, Ticket, TicketError, ticket};
pub use transfer::TransferId;
