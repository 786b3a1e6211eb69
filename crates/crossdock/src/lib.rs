//! Moves an LLM's KV-cache pages straight from a prefill worker's memory to a decode worker's.
//!
//! A [`Node`] is one worker: memory with a cache layout, ports to reach others, and one progress loop. The order of
//! calls for a hand-over in which the prefill side pushes:
//!
//! ```no_run
//! use std::time::{Duration, Instant};
//! use crossdock::{Authentication, CacheLayout, Config, Node, PagePool, ReceiveRequest, SendRequest};
//!
//! # fn prefill(node: &Node, pages: crossdock::PageRef) -> Result<(), Box<dyn std::error::Error>> {
//! // On the prefill side: open the room, send layers as they are computed, finish.
//! let request = SendRequest { room: 7, use_count: 0, tokens: 1000, pages, deadline: Duration::from_secs(30) };
//! let mut room = node.handle().open(request)?;
//! for layer in 0..61 {
//!     // … compute the layer into the pages …
//!     room.send_layers(layer..layer + 1)?;
//! }
//! room.finish(b"first token".to_vec())?;
//! # Ok(())
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // On the decode side: a cache, a node over it, a peer, a room. All nodes have the same key, 32 random bytes.
//! let layout = CacheLayout::deepseek_r1(64, 256)?;
//! let (memory, pool) = crossdock::allocate(&layout)?;
//! let key = Authentication::PreSharedKey(std::fs::read("/run/secrets/crossdock")?);
//! let node = Node::open(Config::new("decode-0", layout.clone(), memory, key))?;
//! let (peer, _up) = node.handle().connect("127.0.0.1:7000")?;
//! let mut room = node.handle().receive(ReceiveRequest {
//!     peer,
//!     room: 7,
//!     use_count: 0,
//!     tokens: 1000,
//!     skip_tokens: 0,
//!     pages: pool.take(layout.pages_for(1000))?,
//!     deadline: Duration::from_secs(30),
//! })?;
//! let received = room.end.wait_until(Instant::now() + Duration::from_secs(31))?;
//! if received.ended.is_delivered() {
//!     let pages = room.pages.wait_until(Instant::now() + Duration::from_secs(1))?;
//!     println!("{} pages of KV, and {:?}", pages.len(), received.aux);
//! } else {
//!     // Who, where, and what to do about it; the pages come home when nobody can write them any more.
//!     eprintln!("{}: {}", received.ended, received.ended.end.advice());
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod cache;
mod config;
mod error;
pub mod experts;
mod node;
pub mod xfer;

/// Where the peers are: a registry server, its client, and the same over etcd. The node does not need it: whoever knows
/// its peers' addresses may leave the feature `bootstrap` out.
#[cfg(feature = "bootstrap")]
pub use crossdock_bootstrap as bootstrap;

pub use crossdock_cuda as cuda;

pub use cache::{allocate, allocate_on};
pub use config::{Authentication, Config, PortConfig, Progress};
pub use error::Error;
pub use node::Node;

pub use crossdock_engine::{
    Abandoned, EventFd, NetworkError, OsError, RailStats, Ticket, TicketError, now_ns,
};
pub use crossdock_flight::{Clocks, Dump, FolderOptions};
pub use crossdock_kv::{
    CacheKind, CacheLayout, CacheLayoutError, CachePart, CachePartOptions, CachePool, CachePoolOptions,
    ContextShare, Dtype, Ended, Extent, FetchRequest, GatherRequest, Handle, HeadOrder, HeadShare,
    LayerBuffer, LayoutOptions, NotTaken, PagesTicket, Parallelism, Parts, Peer, PeerUp, Placement,
    RankShare, ReceiveRequest, Received, Receiving, ScatterRequest, ScatterServeRequest, SendError,
    SendRequest, Sending, ServeRequest, Serving, Source, SourceRank, Stats, TopologyError, Turn, Verify,
    Worker, WorkerError, dp_rank_of, even_stages, trace,
};
pub use crossdock_memory::{
    AllocateOptions, HugePages, Memory, MemoryError, MemoryKind, PageLayout, PagePool, PageRef, PageSet,
    PoolError, PoolOptions, PoolStats, QuarantineEntry, QuarantineReason, Until,
};
pub use crossdock_proto::flight::FlightLimits;
pub use crossdock_proto::{
    Counters, Difference, End, Failure, Identity, LinkCause, Misfit, Refusal, RoomRefusal, SessionEnd, Stage,
    Who,
};
pub use crossdock_shm::ShmOptions;
pub use crossdock_tcp::TcpOptions;
pub use crossdock_transport::{DownCause, Error as PortError, PortInfo};
pub use crossdock_verbs::topology::PciAddress;
pub use crossdock_verbs::{Near, Verbs, VerbsOptions};
