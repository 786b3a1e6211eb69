//! Why a benchmark did not finish.

use std::io::{self, ErrorKind};
use std::time::Duration;

use crossdock::cuda::OpenError;
use crossdock_benches::GpuChoice;
use crossdock_benches::bare::SPIN_LIMIT;

use crate::report::Lost;
use crate::setup::WAIT;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "--memory cuda is measured with --port cuda: shm and tcp do not move it, and whether RDMA devices reach it is not measured yet"
    )]
    MemoryOfGpu,
    #[error(
        "--port cuda does not move --memory private: no peer's GPU can map memory of the host that crossdock did not allocate; use --memory cuda, or shared"
    )]
    NotMapped,
    #[error("--gpu names a GPU: use it with --port cuda")]
    NoGpu,
    #[error("--gpu {gpu}: {error}; {}", error.advice())]
    Gpu { gpu: GpuChoice, error: OpenError },
    #[error("--devices names RDMA devices: use it with --port verbs")]
    NoDevices,
    #[error("--port verbs: {0}")]
    Device(crossdock::PortError),
    #[error("bare lanes over RDMA: {0}")]
    Lanes(#[from] crossdock::PortError),
    #[error("no model is called {name:?}, and no file: deepseek-r1 and llama-3-70b are known")]
    UnknownModel { name: String },
    #[error(
        "{file} describes no model: {why}; {{\"layers\": 61, \"token_bytes\": 1152}} would, or {{\"layers\": 80, \"kv_heads\": 8, \"head_bytes\": 256}}"
    )]
    ModelFile { file: String, why: String },
    #[error(
        "{kv_heads} heads cannot be shared among {ranks} ranks: one number must be a multiple of the other"
    )]
    Heads { kv_heads: u32, ranks: u32 },
    #[error(
        "--prefill-tp and --decode-tp are equal here: what one rank sends to its like is measured; what cutting heads costs to plan, `cargo bench -p crossdock-kv --bench plan -- gqa-tp-1-2` says"
    )]
    TensorParallel,
    #[error(
        "--page-bytes {page_bytes}: a page of that length cannot be described; use a multiple of {unit} above that length"
    )]
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
    #[error("{error}: use another {page_flag}, or another --pool-mib")]
    PoolPages { error: crossdock::CacheLayoutError, page_flag: &'static str },
    #[error(
        "a pool of {pool_bytes} bytes holds no page of {page_bytes}: use a larger --pool-mib, or a smaller {page_flag}"
    )]
    NoPage { page_bytes: u64, pool_bytes: u64, page_flag: &'static str },
    #[error("--scale {factor:?}: a factor above 0 and up to 1 is possible")]
    Scale { factor: f64 },
    #[error(transparent)]
    Layout(#[from] crossdock::CacheLayoutError),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
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
    #[error("{peer} does not answer (waited {} s)", waited.as_secs())]
    NoAnswer { peer: String, waited: Duration },
    #[error("the peer process is gone")]
    PeerGone,
    #[error("the peer process: {said}")]
    Peer { said: String },
    #[error("the peer process sent something unexpected: {said}")]
    Unexpected { said: String },
    #[error(transparent)]
    Arrive(#[from] crossdock_replay::ArriveError),
    #[error("the thread that fills and checks pages has ended")]
    HandsGone,
    #[error(transparent)]
    Chart(#[from] crossdock_replay::ChartError),
    #[error("{pages} pages differ from what was sent")]
    WrongBytes { pages: u64 },
    #[error(
        "{} of {requests} requests were not delivered: {} had no pages in time, {} failed{}",
        lost.requests, lost.expired, lost.requests - lost.expired,
        lost.failure.as_ref().map_or(String::new(), |how| format!("; the first: {how}"))
    )]
    Lost { lost: Lost, requests: u64 },
}

impl Error {
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { what, error }
    }

    /// Of what both processes have their part in: a wait that was too long is the other one's silence.
    pub fn exchange(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| match error.kind() {
            // So a blocking call on a connection ends whose time is limited.
            ErrorKind::WouldBlock => Self::no_answer(WAIT),
            // So a spinning one ends.
            ErrorKind::TimedOut if error.raw_os_error().is_none() => Self::no_answer(SPIN_LIMIT),
            _ => Self::Io { what, error },
        }
    }

    pub fn gpu(gpu: GpuChoice) -> impl FnOnce(OpenError) -> Self {
        move |error| Self::Gpu { gpu, error }
    }

    pub fn no_answer(waited: Duration) -> Self {
        Self::NoAnswer { peer: "the peer process".into(), waited }
    }

    /// Says which peer does not answer.
    pub fn of_peer(self, peer: &str) -> Self {
        match self {
            Self::NoAnswer { waited, .. } => Self::NoAnswer { peer: peer.into(), waited },
            other => other,
        }
    }
}

impl From<crossdock::trace::BadScale> for Error {
    fn from(bad: crossdock::trace::BadScale) -> Self {
        Self::Scale { factor: bad.factor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_peer_is_named() {
        let silences: [(io::Error, &str); 2] = [
            (io::Error::from_raw_os_error(rustix::io::Errno::AGAIN.raw_os_error()), "60 s"),
            (ErrorKind::TimedOut.into(), "30 s"),
        ];
        for (error, waited) in silences {
            let told = Error::exchange("moving pages")(error).of_peer("the peer process 7").to_string();
            assert_eq!(told, format!("the peer process 7 does not answer (waited {waited})"));
        }
        let other =
            Error::exchange("moving pages")(ErrorKind::BrokenPipe.into()).of_peer("the peer process 7");
        assert_eq!(other.to_string(), "moving pages: broken pipe");
    }
}
