//! Why a benchmark did not finish.

use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} is not built yet; this version measures shm (shared or private memory) and tcp")]
    NotBuilt { what: &'static str },
    #[error("no model is called {name:?}: deepseek-r1 is known")]
    UnknownModel { name: String },
    #[error(
        "--prefill-tp and --decode-tp are 1 here: all ranks of a model with MLA hold the same bytes, so nothing is cut, and what one rank gets is measured with 1 and 1"
    )]
    TensorParallel,
    #[error("a page of {page_bytes} bytes cannot be described; use a multiple of {unit} above that length")]
    PageBytes { page_bytes: u64, unit: u64 },
    #[error("a room of {pages} pages is too long to announce: at most {limit}")]
    RoomTooLong { pages: u32, limit: u32 },
    #[error("{pages} pages for one pass do not fit a pool of {pool_pages}; use a larger --pool-mib")]
    PoolTooSmall { pages: u64, pool_pages: u32 },
    #[error("--seconds must be a time of up to an hour")]
    Seconds,
    #[error("--hog is for rates: two ends that spin for single pages do not share their cores")]
    HoggedLatency,
    #[error("cannot read the trace: {0}")]
    Trace(String),
    #[error(transparent)]
    Scale(#[from] crossdock::trace::BadScale),
    #[error(transparent)]
    Layout(#[from] crossdock::CacheLayoutError),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: std::io::Error },
    #[error(transparent)]
    Memory(#[from] crossdock::MemoryError),
    #[error(transparent)]
    Pool(#[from] crossdock::PoolError),
    #[error(transparent)]
    Node(#[from] crossdock::Error),
    #[error(transparent)]
    NotTaken(#[from] crossdock::NotTaken),
    #[error(transparent)]
    Send(#[from] crossdock::SendError),
    #[error("the session with the peer ended: {0}")]
    Session(crossdock::SessionEnd),
    #[error("room {room} was not delivered: {ended}")]
    Room { room: u64, ended: crossdock::Ended },
    #[error("the node dropped a promise")]
    Abandoned(#[from] crossdock::Abandoned),
    #[error("{what} took longer than {limit:?}")]
    TimedOut { what: &'static str, limit: Duration },
    #[error("the peer process is gone")]
    PeerGone,
    #[error("the peer process: {said}")]
    Peer { said: String },
    #[error("the peer process sent something unexpected: {said}")]
    Unexpected { said: String },
    #[error("{pages} pages differ from what was sent")]
    WrongBytes { pages: u64 },
}

impl Error {
    pub fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Io { what, error }
    }
}
