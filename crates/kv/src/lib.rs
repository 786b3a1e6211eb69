//! Cache layouts, the planner, push and pull of KV pages.
//!
//! - [`CacheLayout`] says where one worker keeps the KV of each layer, page and token; it travels to the peer.
//! - [`Plan`] turns two layouts, two page lists and a range of tokens into the fewest [ops](crossdock_transport::Op),
//!   lazily, for whole rooms or layer by layer.
//! - [`Checksums`] tell the destination whether the bytes are those of the source, although the pages differ.
//! - [`trace`] reads recorded requests and makes up others, for benchmarks.
#![forbid(unsafe_code)]

mod checksum;
mod fields;
mod handle;
mod layout;
mod page_table;
mod pages_ticket;
mod params;
mod plan;
mod queue;
mod random;
mod request;
mod topology;
pub mod trace;
mod worker;

pub use checksum::{ChecksumDecodeError, ChecksumError, Checksums, Verify, VerifyError};
pub use handle::{Handle, NotTaken};
pub use layout::{
    CacheKind, CacheLayout, CacheLayoutError, CachePart, CachePartOptions, CachePool, CachePoolOptions,
    ContextShare, Dtype, Extent, HeadOrder, HeadShare, LayerBuffer, LayoutDecodeError, LayoutOptions,
    Placement,
};
pub use page_table::{PageTable, PageTableError, Parts};
pub use pages_ticket::PagesTicket;
pub use plan::{Cursor, Ops, OpsError, Plan, PlanError, PlanInput, Route};
pub use request::{
    Ended, FetchRequest, GatherRequest, Peer, PeerUp, ReceiveRequest, Received, Receiving, ScatterRequest,
    ScatterServeRequest, SendError, SendRequest, Sending, ServeRequest, Serving, Source, Stats,
};
pub use topology::{Parallelism, RankShare, SourceRank, TopologyError, dp_rank_of, even_stages};
pub use worker::{Turn, Worker, WorkerError, WorkerOptions};
