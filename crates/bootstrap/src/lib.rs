//! Where the peers are: a registry server and its client.
//!
//! Workers register at a [`Server`] under a node name, each for a time to live that it renews; peers find them by
//! role, group, ranks and labels. The registry is soft state: it is held in memory, it is refilled by the renewals when
//! the server starts again, and what it says is where to ask, never a promise that a worker is still there.
//!
//! ```
//! use std::time::Duration;
//! use crossdock_bootstrap::{
//!     Client, ClientConfig, Counted, GroupId, Incarnation, Labels, Member, NodeId, Query, Ranks, Registration, Role,
//!     Server, ServerConfig, Tag, Topology, Worker,
//! };
//!
//! let server = Server::start(ServerConfig::on("127.0.0.1:0".parse()?))?;
//! let client = Client::new(ClientConfig::to(&server.address().to_string()))?;
//! let group = GroupId::new("decode-0")?;
//! let topology = Topology::single(Tag::new("deepseek-r1")?, Tag::new("fp8_e4m3")?, 64);
//! let worker = Worker {
//!     node: NodeId::new("decode-0-tp0")?,
//!     incarnation: Incarnation::new(0x5eed),
//!     role: Role::Decode,
//!     address: "127.0.0.1:7000".parse()?,
//!     ttl_ms: 10_000,
//!     // Kernels may compile for ten minutes; until then nobody takes its silence for its end.
//!     warm_up_ms: 600_000,
//!     member: Some(Member::new(group.clone(), topology, Ranks::tp(0))?),
//!     labels: Labels::none(),
//! };
//! let registration = Registration::start(client.clone(), worker)?;
//! registration.ready();
//! let complete = client.wait_for_group(&group, Counted::Ready, Duration::from_secs(5))?;
//! assert_eq!(complete.topology.page_tokens, 64);
//! let found = client.find(&Query::all().group(group).tp_rank(0))?;
//! assert_eq!(found[0].worker.address.to_string(), "127.0.0.1:7000");
//! registration.deregister()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A [`Client`] speaks to a [`Server`] or, for a cluster that has one, to etcd: `etcd://HOST:PORT` is the only difference.
//! The server's HTTP interface and what lies in etcd are described in `docs/bootstrap.md`. [`Registry`] is what the server
//! decides with, for those who want the rules without the network.
#![forbid(unsafe_code)]

mod backend;
mod backoff;
mod client;
mod error;
mod etcd;
mod exchange;
mod group;
mod history;
mod http;
mod lists;
mod lookup;
mod metrics;
mod problem;
mod query;
mod registration;
mod registry;
mod renewal;
mod rooms;
mod server;
mod service;
mod stream;
mod token;
mod watch;
mod wire;
mod worker;

pub use client::{Client, ClientConfig};
pub use error::{Error, ForeignAnswer, InvalidServer, Stage, WaitError};
pub use group::{Counted, Group, GroupId, Member, Misfit, Ranks, RoomPolicy, Tag, Topology};
pub use problem::{ErrorCode, Problem};
pub use query::{InvalidQuery, Query};
pub use registration::{NotRegistered, Registration, Status};
pub use registry::{Limits, Refusal, Registered, Registry, Tally};
pub use rooms::{DpRank, ROOMS_PER_CALL_MAX, RoomRefusal};
pub use server::{ConfigFault, DEFAULT_PORT, Server, ServerConfig, StartError, serve};
pub use token::{InvalidToken, Token};
pub use watch::{Change, Watch};
pub use wire::Health;
pub use worker::{Address, Incarnation, Invalid, Labels, Listed, NodeId, Role, RoleName, State, Worker};
