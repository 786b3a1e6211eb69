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
mod random;
mod request;
pub mod trace;
mod worker;

pub use checksum::{ChecksumDecodeError, ChecksumError, Checksums, Verify, VerifyError};
pub use handle::{Handle, NotTaken};
pub use layout::{
    CacheKind, CacheLayout, CacheLayoutError, Dtype, LayerBuffer, LayoutDecodeError, LayoutOptions, Placement,
};
pub use page_table::{PageTable, PageTableError};
pub use pages_ticket::PagesTicket;
pub use plan::{Cursor, Ops, OpsError, Plan, PlanError, PlanInput, Route};
pub use request::{
    Ended, FetchRequest, Peer, PeerUp, ReceiveRequest, Received, Receiving, SendError, SendRequest, Sending,
    ServeRequest, Serving, Stats,
};
pub use worker::{Turn, Worker, WorkerError, WorkerOptions};
