//! May it move: sessions with peers, rooms, grants and generations.
//!
//! [`Proto`] opens no socket and reads no clock. Its owner tells it what happened (a frame came, a lane went up,
//! an immediate arrived, time passed) and carries out the [`Action`]s that it asks for; what its user must know
//! comes out as [`Notice`]s. So the same code runs over real ports and under the simulator.
//!
//! The rule that everything here serves: **a page that was granted comes home only when no write can land in it
//! any more**, and every room ends exactly once on each running side.
#![forbid(unsafe_code)]

mod action;
mod auth;
mod config;
mod end;
mod fetching;
mod fingerprint;
pub mod flight;
mod grants;
mod handshake;
mod lanes;
mod link_cause;
mod message;
mod notice;
mod parked;
#[doc(hidden)]
pub mod planted;
mod proto;
mod receiving;
mod room;
mod rooms;
mod sending;
mod serving;
mod session;
mod table;
mod targets;
mod wire;

pub use action::{Action, PulsePlan};
pub use auth::Auth;
pub use config::{Config, Rail, Region};
pub use end::{End, Failure, Misfit, RoomRefusal, SessionEnd, Stage, Who};
pub use fingerprint::{Difference, Fingerprint};
pub use link_cause::LinkCause;
pub use message::{
    About, CancelWhy, Identity, MAX_LANES, Message, RailOffer, Refusal, RegionOffer, Released, RoleKind,
    RoomName, RoomOnWire, VERSION_MAX, VERSION_MIN,
};
pub use notice::{Homecoming, Notice, Start};
pub use proto::{Counters, LinkId, PeerName, Proto, RoomId, SessionId, TargetId};
pub use room::{Buffers, Fetch, Receive, RoomBuffer, RoomError, Send, Serve, Unopened};
pub use table::Table;
pub use wire::DecodeError;
