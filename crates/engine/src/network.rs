//! Control streams and liveness as the engine sees them.

use std::io;

use crossdock_proto::LinkCause;
use crossdock_transport::Arm;

/// Ordered message streams to peers, and the knowledge whether a peer's process still runs.
///
/// Owned by one thread. No method blocks. Implemented over sockets by
/// [`SocketNetwork`](crate::SocketNetwork), and by the simulator.
pub trait Network: Send {
    /// What peers [`dial`](Network::dial) to reach this node.
    fn address(&self) -> &str;

    /// Tells, from any thread, whether an address can be [dialed](Network::dial) at all.
    fn address_check(&self) -> AddressCheck {
        |_| Ok(())
    }

    /// Begins a link to the node at `address`, which is numeric: names are resolved before, because a resolver
    /// blocks. Answered by [`LinkEvent::Opened`] or [`LinkEvent::Closed`], by a deadline of the network's own.
    fn dial(&mut self, address: &str) -> Result<LinkId, NetworkError>;

    /// The peer of a link has proven who it is. Until then a network may take only short frames of it (no frame of a
    /// handshake is longer than 64 KiB), and may close its link to make room for others. Called in the turn in which the
    /// proof was polled. A network that keeps nothing of strangers has nothing to do.
    fn trust(&mut self, link: LinkId) {
        let _ = link;
    }

    /// Queues a frame: all of it or, with an error, nothing. It leaves with the next
    /// [`flush`](Network::flush), [`poll`](Network::poll) or [`arm`](Network::arm).
    fn send(&mut self, link: LinkId, frame: &[u8]) -> Result<(), SendError>;

    /// Hands what is queued to the operating system, as far as it takes it. Called once at the end of a turn, so
    /// that all frames of a turn to one peer leave together.
    fn flush(&mut self);

    /// Ends a link. What is queued still leaves, in the background and within a bounded time; then
    /// [`LinkEvent::Closed`] follows with [`LinkCause::ClosedHere`]. No frame of the link is given after this call.
    /// Closing a link twice, or one that has ended, does nothing.
    fn close(&mut self, link: LinkId);

    /// Gives what has happened to `take`, one event at a time, and returns after a bounded amount of work.
    fn poll(&mut self, take: &mut dyn FnMut(LinkEvent<'_>));

    /// Prepares for sleep, with the promise of [`Port::arm`](crossdock_transport::Port::arm).
    fn arm(&mut self) -> Arm<'_>;

    /// Where peers send their heartbeats.
    fn pulse_address(&self) -> &str;

    /// Begins to send heartbeats to the peer of a session and to listen for its own. Watching a session again
    /// replaces what was said before.
    fn watch(&mut self, session: u32, pulse: Pulse) -> Result<(), NetworkError>;

    /// Ends what [`watch`](Network::watch) began. Unknown sessions are ignored.
    fn unwatch(&mut self, session: u32);

    /// When the peer of a watched session was last heard, on the clock of [`now_ns`](crate::now_ns); the time of
    /// [`watch`](Network::watch) before it was ever heard. Never waits for another thread.
    fn heard_ns(&self, session: u32) -> Option<u64>;

    /// Until when this node has listened. How long a peer is silent is the time from
    /// [`heard_ns`](Network::heard_ns) to this, not to the present: a process that was stopped or starved has
    /// not listened, and would otherwise take its own pause for the death of all its peers. To be read before
    /// `heard_ns`.
    fn listened_ns(&self) -> u64;
}

/// Refuses what is no address, and says what is wrong with it.
pub type AddressCheck = fn(&str) -> Result<(), &'static str>;

/// One control stream. Within the life of a network a number comes back only after four thousand million others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u32);

/// What happens to links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent<'a> {
    /// A peer has dialled this node.
    Accepted {
        /// The new link.
        link: LinkId,
    },
    /// A link that was dialled here is connected.
    Opened {
        /// Which link.
        link: LinkId,
    },
    /// A whole frame has come.
    Frame {
        /// On which link.
        link: LinkId,
        /// The frame, without its length.
        bytes: &'a [u8],
    },
    /// The link has ended. Said exactly once for each link; nothing is said of it afterwards.
    Closed {
        /// Which link.
        link: LinkId,
        /// Why.
        cause: LinkCause,
    },
}

/// How two nodes of a session show each other that they live.
#[derive(Clone, PartialEq, Eq)]
pub struct Pulse {
    /// The peer's [`pulse_address`](Network::pulse_address).
    pub peer_address: String,
    /// How often a heartbeat is sent.
    pub interval_ns: u64,
    /// What the peer knows our heartbeats by.
    pub send_token: u64,
    /// What the peer's heartbeats must carry to count. No two sessions of a node expect the same token.
    pub expect_token: u64,
}

impl std::fmt::Debug for Pulse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The tokens are secrets of the session: who knows them can make a dead peer look alive.
        f.debug_struct("Pulse")
            .field("peer_address", &self.peer_address)
            .field("interval_ns", &self.interval_ns)
            .finish_non_exhaustive()
    }
}

/// Why a network refused a call. Nothing of the call was done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The address cannot be used from here.
    #[error("bad address {address:?}: {reason}")]
    BadAddress {
        /// The address.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An option makes no sense.
    #[error("bad option {option}: {reason}")]
    BadOption {
        /// Which.
        option: &'static str,
        /// What it should be.
        reason: &'static str,
    },
    /// A limit of the configuration is reached. Something must end first.
    #[error("limit reached: {what} ({limit})")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// The operating system refused a call.
    #[error(transparent)]
    Os(#[from] OsError),
}

impl NetworkError {
    /// As the reason why there is no link.
    pub(crate) fn cause(&self) -> LinkCause {
        match *self {
            Self::BadAddress { reason, .. } | Self::BadOption { reason, .. } => {
                LinkCause::BadAddress { reason }
            }
            Self::Limit { what, limit } => LinkCause::Limit { what, limit },
            Self::Os(OsError { call, errno }) => LinkCause::Broken { call, errno },
        }
    }
}

/// Why a frame was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The link's buffer has no room for the frame now; there is room when the peer has read more.
    #[error("the link's send buffer is full")]
    Full,
    /// The link has ended, or its end has begun, or it is not known.
    #[error("the link is closed")]
    Closed,
    /// No link takes a frame of this length.
    #[error("frame of {bytes} bytes, where at most {limit} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The longest allowed.
        limit: usize,
    },
}

/// A call that the operating system refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed: {}", io::Error::from_raw_os_error(*errno))]
pub struct OsError {
    /// The call.
    pub call: &'static str,
    /// Its error number.
    pub errno: i32,
}

impl OsError {
    /// For `map_err` on the calls of the system's bindings.
    pub(crate) fn of(call: &'static str) -> impl Fn(rustix::io::Errno) -> Self {
        move |errno| Self { call, errno: errno.raw_os_error() }
    }
}
