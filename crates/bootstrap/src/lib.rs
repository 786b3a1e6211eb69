//! Where the peers are: a registry server and its client.
//!
//! Workers register at a [`Server`] under a node name, each for a time to live that it renews; peers find them by
//! role, rank and labels. The registry is soft state: it is held in memory, it is refilled by the renewals when
//! the server starts again, and what it says is where to ask, never a promise that a worker is still there.
//!
//! ```
//! use std::time::Duration;
//! use crossdock_bootstrap::{
//!     Client, ClientConfig, Incarnation, Labels, NodeId, Query, Rank, Registration, Role, Server, ServerConfig,
//!     Worker,
//! };
//!
//! let server = Server::start(ServerConfig::on("127.0.0.1:0".parse()?))?;
//! let client = Client::new(ClientConfig::to(&server.address().to_string()))?;
//! let worker = Worker {
//!     node: NodeId::new("decode-0")?,
//!     incarnation: Incarnation::new(0x5eed),
//!     role: Role::Decode,
//!     rank: Rank::new(0, 1)?,
//!     address: "127.0.0.1:7000".parse()?,
//!     ttl_ms: 10_000,
//!     labels: Labels::none(),
//! };
//! let registration = Registration::start(client.clone(), worker)?;
//! let found = client.wait_for(&Query::all().role(Role::Decode), 1, Duration::from_secs(5))?;
//! assert_eq!(found[0].worker.address.to_string(), "127.0.0.1:7000");
//! registration.deregister()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The server's HTTP interface is described in `docs/bootstrap.md`. [`Registry`] is what the server decides with,
//! for those who want the rules without the network.
#![forbid(unsafe_code)]

mod backoff;
mod client;
mod error;
mod exchange;
mod history;
mod lookup;
mod problem;
mod query;
mod registration;
mod registry;
mod renewal;
mod server;
mod service;
mod stream;
mod token;
mod worker;

pub use client::{Client, ClientConfig};
pub use error::{Error, ForeignAnswer, InvalidServer, Stage, WaitError};
pub use problem::{ErrorCode, Problem};
pub use query::Query;
pub use registration::{NotRegistered, Registration, Status};
pub use registry::{Limits, Refusal, Registered, Registry};
pub use server::{ConfigFault, DEFAULT_PORT, Server, ServerConfig, StartError, serve};
pub use service::Health;
pub use token::{InvalidToken, Token};
pub use worker::{Address, Incarnation, Invalid, Labels, Listed, NodeId, Rank, Role, RoleName, Worker};
