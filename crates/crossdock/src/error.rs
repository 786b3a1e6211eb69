//! Why a node did not open.

use crossdock_engine::{NetworkError, OsError};
use crossdock_kv::WorkerError;
use crossdock_memory::MemoryError;

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
    /// A port could not be opened.
    #[error("cannot open the {port} port: {error}")]
    Port {
        /// Which.
        port: &'static str,
        /// What it said.
        error: crossdock_transport::Error,
    },
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
