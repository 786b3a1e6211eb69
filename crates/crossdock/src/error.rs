//! Why a node did not open.

use crossdock_engine::{NetworkError, OsError};
use crossdock_kv::WorkerError;
use crossdock_memory::MemoryError;
use crossdock_transport as transport;

use crate::config::Authentication;

/// Why a node did not open, or its progress ended. What befalls rooms later is told by their
/// [`Ended`](crate::Ended), with peer, port, stage, cause and advice.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Memory could not be allocated.
    #[error("cannot allocate memory: {0}")]
    Memory(#[from] MemoryError),
    /// No port was asked for.
    #[error("no port is configured; add at least one to `ports`")]
    NoPort,
    /// The pre-shared key is so short that it could be guessed.
    #[error(
        "a pre-shared key of {bytes} bytes; at least {}, better 32 random ones",
        Authentication::SHORTEST_KEY_BYTES
    )]
    ShortKey {
        /// How long it is.
        bytes: usize,
    },
    /// A limit of the configuration makes no sense.
    #[error("bad limit {option}: {reason}")]
    BadLimit {
        /// Which.
        option: &'static str,
        /// What it should be.
        reason: &'static str,
    },
    /// A port could not be opened.
    #[error("cannot open the {port} port: {error}")]
    Port {
        /// Which.
        port: &'static str,
        /// What it said.
        error: crossdock_transport::Error,
    },
    /// A GPU's port could not be opened.
    #[error("cannot open the cuda port: {0}")]
    Cuda(#[from] crossdock_cuda::OpenError),
    /// A GPU gave no memory.
    #[error("cannot allocate on the GPU: {0}")]
    Gpu(#[from] crossdock_cuda::GpuError),
    /// The control address cannot be used.
    #[error("cannot open the control address: {0}")]
    Network(#[from] NetworkError),
    /// The layout, the memory and the ports do not fit together.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The operating system refused something.
    #[error(transparent)]
    Os(#[from] OsError),
    /// The system has no randomness to give.
    #[error("no random numbers: {}", std::io::Error::from_raw_os_error(*errno))]
    Random {
        /// The error number.
        errno: i32,
    },
    /// The progress thread could not be started.
    #[error("cannot start the progress thread: {0}")]
    Thread(std::io::Error),
}

impl Error {
    /// Whether the same call may succeed later, without another configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Memory(error) => {
                use MemoryError::{NoHugePages, OutOfMemory, TooManyFiles};
                matches!(error, OutOfMemory { .. } | NoHugePages { .. } | TooManyFiles)
            }
            Error::Port { error, .. } | Error::Worker(WorkerError::Register(error)) => match error {
                transport::Error::Os { errno, .. } => passes(*errno),
                _ => false,
            },
            Error::Network(NetworkError::Os(error)) | Error::Worker(WorkerError::Os(error)) => {
                passes(error.errno)
            }
            Error::Os(error) => passes(error.errno),
            Error::Random { errno } => passes(*errno),
            Error::Thread(error) => error.raw_os_error().is_some_and(passes),
            Error::Gpu(error) => error.is_retryable(),
            Error::NoPort
            | Error::Cuda(_)
            | Error::ShortKey { .. }
            | Error::BadLimit { .. }
            | Error::Network(_)
            | Error::Worker(_) => false,
        }
    }

    /// What a person can do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Error::Memory(MemoryError::NoHugePages { .. }) => {
                "reserve huge pages on the host, or do without them"
            }
            Error::Memory(MemoryError::TooManyFiles) | Error::Thread(_) => {
                "raise the process's limits (ulimit), or close what is not needed"
            }
            Error::Memory(_) => "ask for an amount of memory that the host has free",
            Error::NoPort => "add at least one port to the configuration",
            Error::ShortKey { .. } => {
                "make a key of 32 random bytes and give it to all nodes; to let anybody in, say Authentication::Off"
            }
            Error::BadLimit { .. } => "set the limit that the error names within its bounds",
            Error::Port { error: transport::Error::Unsupported { advice, .. }, .. }
            | Error::Worker(WorkerError::Register(transport::Error::Unsupported { advice, .. })) => advice,
            Error::Port { .. } => "look at the port's own error; or leave this port out",
            Error::Cuda(error) => error.advice(),
            Error::Gpu(error) => error.advice(),
            Error::Network(NetworkError::Os(OsError { call: "bind", .. })) => {
                "bind an address of this host and a port that is free; port 0 takes any"
            }
            Error::Network(NetworkError::BadAddress { .. }) => {
                "bind an address of this host, and advertise one that the peers reach"
            }
            Error::Network(_) => "look at the option, or at the call, that the error names",
            Error::Worker(WorkerError::NoMemory { .. } | WorkerError::TooSmall { .. }) => {
                "give the memory that the layout names: `allocate` makes it"
            }
            Error::Worker(_) => "look at what the port says of the memory",
            Error::Os(_) | Error::Random { .. } => "look at what the system says of the call",
        }
    }
}

/// Whether what the system lacks now it may have later: files, memory, an address that is in use.
fn passes(errno: i32) -> bool {
    use rustix::io::Errno;
    let lacking = [
        Errno::ADDRINUSE,
        Errno::AGAIN,
        Errno::INTR,
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOBUFS,
        Errno::NOMEM,
    ];
    lacking.iter().any(|lack| lack.raw_os_error() == errno)
}
