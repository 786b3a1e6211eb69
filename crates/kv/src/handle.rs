//! How threads of the user's talk to the progress loop: a bounded queue and a doorbell.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossdock_engine::{AddressCheck, Doorbell, EventFd, Ticket, now_ns, ticket};
use crossdock_flight::Dump;
use crossdock_memory::PageRef;
use crossdock_proto::SessionEnd;
use smallvec::SmallVec;

use crate::queue::{Queue, Rejected};
use crate::request::{
    Command, GatherRequest, Peer, PeerKey, PeerUp, Receiving, RoomControl, ScatterRequest,
    ScatterServeRequest, Sending, Serving, Stats, decode_tickets,
};
use crate::{CacheLayout, CachePool};

/// A user's end of a node: cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// Why a call was not taken. Nothing of it was done; pages that were given with it are back in their pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotTaken {
    /// The queue to the progress loop is full: the loop does not keep up, or is not driven.
    #[error("the queue to the progress loop is full")]
    Busy,
    /// The node was dropped, or its progress loop has ended.
    #[error("the node has stopped")]
    Stopped,
    /// There can be no peer at this address.
    #[error("bad address {address:?}: {reason}")]
    BadAddress {
        /// The address.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// This node does not dial the peer: the peer has dialed it, and would do so again.
    #[error("this peer is not dialed from here")]
    NotDialed,
}

impl NotTaken {
    /// Whether the same call may be taken later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy)
    }

    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Busy => "let the progress loop run, then try again; or raise max_commands",
            Self::Stopped => "open a new node",
            Self::NotDialed => "disconnect on the side that has connected",
            Self::BadAddress { .. } => "give the peer's IP address and port; resolve names before",
        }
    }
}

pub(crate) struct Shared {
    commands: Queue<Command>,
    /// Calls note when they were made.
    counts_from_calls: AtomicBool,
    pub doorbell: Doorbell,
    /// Readable when something was told to a ticket since it was last armed.
    pub told: EventFd,
    keys: AtomicU64,
    layers: Range<u32>,
    /// How many pages each pool of the layout has.
    pages: SmallVec<[u32; 2]>,
    address_check: AddressCheck,
}

impl Shared {
    pub fn new(
        commands: usize,
        doorbell: Doorbell,
        told: EventFd,
        layout: &CacheLayout,
        address_check: AddressCheck,
    ) -> Self {
        Self {
            commands: Queue::new(commands),
            counts_from_calls: AtomicBool::new(false),
            doorbell,
            told,
            keys: AtomicU64::new(0),
            layers: layout.layers(),
            pages: layout.pools().iter().map(CachePool::pages).collect(),
            address_check,
        }
    }

    pub fn count_from_calls(&self) {
        self.counts_from_calls.store(true, Ordering::Relaxed);
    }

    /// When a call is made; `None` if only the loop knows what time it is.
    fn asked_ns(&self) -> Option<u64> {
        self.counts_from_calls.load(Ordering::Relaxed).then(now_ns)
    }

    /// The oldest command, for the progress loop.
    pub fn next(&self) -> Option<Command> {
        self.commands.pop()
    }

    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    /// Takes no more commands, and ends those that wait.
    pub fn close(&self) {
        self.commands.close();
        self.end_if_closed();
    }

    fn push(&self, command: Command) -> Result<(), NotTaken> {
        self.commands.push(command).map_err(|rejected| match rejected {
            Rejected::Full => NotTaken::Busy,
            Rejected::Closed => NotTaken::Stopped,
        })?;
        self.doorbell.ring();
        // The queue may have been closed, and emptied for the last time, since the first look.
        self.end_if_closed();
        Ok(())
    }

    fn end_if_closed(&self) {
        if self.commands.end_if_closed(Command::end) {
            self.told.raise();
        }
    }
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Dials a peer (`"ip:port"`; names are to be resolved before), now and whenever the session with it is lost. The
    /// ticket tells the first session, or why there will never be one (one is that too many addresses are dialed
    /// already); rooms may be opened before.
    pub fn connect(
        &self,
        address: impl Into<String>,
    ) -> Result<(Peer, Ticket<Result<PeerUp, SessionEnd>>), NotTaken> {
        let address = address.into();
        if let Err(reason) = (self.shared.address_check)(&address) {
            return Err(NotTaken::BadAddress { address, reason });
        }
        let (up, ticket) = ticket();
        let key = self.key();
        self.push(Command::Connect { key, address, up })?;
        Ok((Peer(PeerKey::Dialed(key)), ticket))
    }

    /// Ends the session with a dialed peer and dials it no more.
    pub fn disconnect(&self, peer: Peer) -> Result<(), NotTaken> {
        match peer.0 {
            PeerKey::Dialed(key) => self.push(Command::Disconnect { key }),
            PeerKey::Node(_) => Err(NotTaken::NotDialed),
        }
    }

    /// Opens the decode end of a push, for a [`ReceiveRequest`](crate::ReceiveRequest) or a [`GatherRequest`]. With an error the pages are back in their pool.
    pub fn receive(&self, request: impl Into<GatherRequest>) -> Result<Receiving, NotTaken> {
        self.decode(request.into(), false)
    }

    /// Opens the decode end of a pull, for a [`FetchRequest`](crate::FetchRequest) or a [`GatherRequest`]. With an error the pages are back in their pool.
    pub fn fetch(&self, request: impl Into<GatherRequest>) -> Result<Receiving, NotTaken> {
        self.decode(request.into(), true)
    }

    /// Opens the prefill end of a push, for a [`SendRequest`](crate::SendRequest) or a [`ScatterRequest`].
    pub fn open(&self, request: impl Into<ScatterRequest>) -> Result<Sending, NotTaken> {
        self.open_sending(request.into(), false)
    }

    /// As [`open`](Handle::open), before all pages are known: the request names the first ones, or none, and
    /// [`Sending::add_pages`] the others, before their tokens are sent.
    pub fn open_ahead(&self, request: impl Into<ScatterRequest>) -> Result<Sending, NotTaken> {
        self.open_sending(request.into(), true)
    }

    fn open_sending(&self, request: ScatterRequest, is_ahead: bool) -> Result<Sending, NotTaken> {
        let (end, end_ticket) = ticket();
        let control = self.control();
        let tokens = request.tokens;
        // A request that has more lists than the layout has pools is refused when it is taken.
        let pages =
            request.pages.iter().zip(&self.shared.pages).map(|(named, &all)| (named.len(), all)).collect();
        let asked_ns = self.shared.asked_ns();
        self.push(Command::Open { key: control.key, request, is_ahead, asked_ns, end })?;
        Ok(Sending::new(end_ticket, control, tokens, self.shared.layers.clone(), pages))
    }

    /// Opens the prefill end of a pull, for a [`ServeRequest`](crate::ServeRequest) or a [`ScatterServeRequest`].
    pub fn serve(&self, request: impl Into<ScatterServeRequest>) -> Result<Serving, NotTaken> {
        let (end, end_ticket) = ticket();
        let control = self.control();
        let (request, asked_ns) = (request.into(), self.shared.asked_ns());
        self.push(Command::Serve { key: control.key, request, asked_ns, end })?;
        Ok(Serving { end: end_ticket, control })
    }

    /// Asks what the node has done and what it holds.
    pub fn stats(&self) -> Result<Ticket<Stats>, NotTaken> {
        let (told, ticket) = ticket();
        self.push(Command::Stats { told })?;
        Ok(ticket)
    }

    /// Asks for what the flight recorder holds: the last events of each peer. It is copied a share a turn, so that rooms go
    /// on meanwhile. [`Abandoned`](crossdock_engine::Abandoned), if too many ask at once.
    pub fn flight(&self) -> Result<Ticket<Dump>, NotTaken> {
        let (told, ticket) = ticket();
        self.push(Command::Flight { told })?;
        Ok(ticket)
    }

    /// The node's one event descriptor: see [`EventFd`].
    pub fn event_fd(&self) -> &EventFd {
        &self.shared.told
    }

    pub(crate) fn add_pages(&self, key: u64, pool: usize, pages: PageRef) -> Result<(), NotTaken> {
        self.push(Command::AddPages { key, pool, pages })
    }

    pub(crate) fn send(&self, key: u64, layers: Range<u32>, tokens: Range<u32>) -> Result<(), NotTaken> {
        self.push(Command::Send { key, layers, tokens })
    }

    pub(crate) fn finish(&self, key: u64, aux: Vec<u8>) -> Result<(), NotTaken> {
        self.push(Command::Finish { key, aux })
    }

    pub(crate) fn cancel(&self, key: u64) -> Result<(), NotTaken> {
        self.push(Command::Cancel { key })
    }

    /// Asks the progress loop to end; see [`Worker::turn`](crate::Worker::turn).
    pub fn stop(&self) -> Result<(), NotTaken> {
        self.push(Command::Stop)
    }

    fn decode(&self, request: GatherRequest, pull: bool) -> Result<Receiving, NotTaken> {
        let key = self.key();
        let (told, receiving) = decode_tickets(self, key, request.pages.len());
        let asked_ns = self.shared.asked_ns();
        self.push(Command::Receive { key, request, asked_ns, pull, told })?;
        Ok(receiving)
    }

    fn control(&self) -> RoomControl {
        RoomControl { handle: self.clone(), key: self.key(), arrivals: Arc::default() }
    }

    fn key(&self) -> u64 {
        self.shared.keys.fetch_add(1, Ordering::Relaxed)
    }

    fn push(&self, command: Command) -> Result<(), NotTaken> {
        self.shared.push(command)
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handle({} commands queued)", self.shared.commands.len())
    }
}
