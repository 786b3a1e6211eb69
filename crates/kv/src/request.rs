//! What a user asks for, and what comes of it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossdock_engine::{Promise, RailStats, Ticket, ticket};
use crossdock_flight::Dump;
use crossdock_memory::{PageRef, PageSet};
use crossdock_proto::{Counters, End, Homecoming, Identity, RoomName, SessionEnd};
use smallvec::SmallVec;

use crate::handle::{Handle, NotTaken};
use crate::pages_ticket::AllHome;
use crate::{PagesTicket, Parts};

/// A peer that is dialed, or that has dialed this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer(pub(crate) PeerKey);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum PeerKey {
    /// The handle's number for a dialed address.
    Dialed(u64),
    /// A node's own number.
    Node(u64),
}

impl Peer {
    /// The peer with this node number, whoever of the two dialed.
    pub fn node(node: u64) -> Self {
        Self(PeerKey::Node(node))
    }
}

/// Who answered at a dialed address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerUp {
    /// The node and its incarnation.
    pub identity: Identity,
    /// Its name for people.
    pub name: Arc<str>,
}

/// Asks for tokens to be pushed into pages of this node: in all layers that it keeps, by a peer of rank 0. Whoever wants
/// less, or from other ranks, makes a [`GatherRequest`].
#[derive(Debug)]
pub struct ReceiveRequest {
    /// From whom.
    pub peer: Peer,
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// Tokens of a prefix that is here already and is not to be sent.
    pub skip_tokens: u32,
    /// Pages for the tokens from `skip_tokens` on: the first one holds that token.
    pub pages: PageSet,
    /// From the call that this is given to.
    pub deadline: Duration,
}

/// Offers pages of this node to be pushed into the peer that asks for the room.
#[derive(Debug)]
pub struct SendRequest {
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// Pages for the tokens, from the first one on. They may be filled later than this, but before they are sent.
    pub pages: PageRef,
    /// From the call that this is given to.
    pub deadline: Duration,
}

/// Asks for tokens to be pulled from the peer's pages into pages of this node.
pub type FetchRequest = ReceiveRequest;

/// A [`ReceiveRequest`] whose tokens come from several ranks of the prefill side, each of which brings its share of the
/// layers, heads and tokens; or that has pages of several [pools](crate::CacheLayout::pools). Which ranks are needed,
/// [`Parallelism::sources`](crate::Parallelism::sources) says.
#[derive(Debug)]
pub struct GatherRequest {
    /// From whom. Together they bring each byte of the layers once, or the room is refused.
    pub sources: Vec<Source>,
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// Tokens of a prefix that is here already and is not to be sent.
    pub skip_tokens: u32,
    /// The layers that the sources bring, and no others; `None`: all that this node keeps. Named where not all come in one
    /// room, as those of one stage that hands over by itself, or all but a draft model's that is run here alone.
    pub layers: Option<Range<u32>>,
    /// For each pool of this node's layout, pages for what moves: the first page holds the first token, of those that
    /// are here, from `skip_tokens` on, or from the beginning of the window. Of a pool of entries: as many as there are.
    pub pages: Vec<PageSet>,
    /// From the call that this is given to.
    pub deadline: Duration,
}

/// A rank of the prefill side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The node.
    pub peer: Peer,
    /// Its [rank](crate::CacheLayout::rank).
    pub rank: u32,
    /// What it brings. What every rank of a stage keeps whole, one of them is to bring.
    pub parts: Parts,
}

impl From<ReceiveRequest> for GatherRequest {
    fn from(request: ReceiveRequest) -> Self {
        let ReceiveRequest { peer, room, use_count, tokens, skip_tokens, pages, deadline } = request;
        let sources = vec![Source { peer, rank: 0, parts: Parts::All }];
        Self { sources, room, use_count, tokens, skip_tokens, layers: None, pages: vec![pages], deadline }
    }
}

/// A [`SendRequest`] whose tokens go to several ranks of the decode side; or that has pages of several
/// [pools](crate::CacheLayout::pools). Which ranks need this one,
/// [`Parallelism::destinations`](crate::Parallelism::destinations) says.
#[derive(Debug)]
pub struct ScatterRequest {
    /// The [ranks](crate::CacheLayout::rank) that take their shares.
    pub ranks: Vec<u32>,
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// For each pool of this node's layout, the pages: of the tokens from the first one on, of a window from the page on
    /// that holds its first token. They may be filled later than this, but before they are sent; those of all pools but
    /// the first one are sent when the room is finished.
    pub pages: Vec<PageRef>,
    /// From the call that this is given to.
    pub deadline: Duration,
}

impl From<SendRequest> for ScatterRequest {
    fn from(request: SendRequest) -> Self {
        let SendRequest { room, use_count, tokens, pages, deadline } = request;
        Self { ranks: vec![0], room, use_count, tokens, pages: vec![pages], deadline }
    }
}

/// A [`ServeRequest`] for several ranks of the decode side, or with pages of several pools.
#[derive(Debug)]
pub struct ScatterServeRequest {
    /// What is offered, filled.
    pub request: ScatterRequest,
    /// Handed to each reader with the bytes: first token, log probabilities.
    pub aux: Vec<u8>,
}

impl From<ServeRequest> for ScatterServeRequest {
    fn from(request: ServeRequest) -> Self {
        let ServeRequest { room, use_count, tokens, pages, aux, deadline } = request;
        Self { request: SendRequest { room, use_count, tokens, pages, deadline }.into(), aux }
    }
}

/// Offers pages of this node to be pulled by the peer that asks for the room.
#[derive(Debug)]
pub struct ServeRequest {
    /// The router's number for the request.
    pub room: u64,
    /// Which use of that number.
    pub use_count: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// Pages for the tokens, from the first one on, filled.
    pub pages: PageRef,
    /// Handed to the reader with the bytes: first token, log probabilities.
    pub aux: Vec<u8>,
    /// From the call that this is given to.
    pub deadline: Duration,
}

/// How a room ended on this side, and with whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub end: End,
    /// The peer's name, if the room had come to a session. Of a room between several ranks, the peer of the first share that
    /// was not delivered, or else of the last one.
    pub peer: Option<Arc<str>>,
    /// The transport between the two.
    pub port: Option<&'static str>,
}

impl Ended {
    /// An end before there was a peer.
    pub(crate) fn alone(end: End) -> Self {
        Self { end, peer: None, port: None }
    }

    /// Whether all bytes are in the decode side's pages.
    pub fn is_delivered(&self) -> bool {
        self.end == End::Delivered
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.end)?;
        if let Some(peer) = &self.peer {
            write!(f, " (peer {peer}")?;
            if let Some(port) = self.port {
                write!(f, ", port {port}")?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

/// How a receiving or fetching room ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// How.
    pub ended: Ended,
    /// What the prefill side sent beside the pages; empty unless delivered. Of several ranks, what the first one sent
    /// that sent something.
    pub aux: Vec<u8>,
}

/// A room on the decode side.
///
/// Two things are told, each once: how the room ended, by its deadline; and the pages, when nobody else can write
/// them any more. After a delivery both come together; after a fault the pages may come later.
#[derive(Debug)]
#[must_use = "the end of the room and its pages are told here"]
pub struct Receiving {
    /// The end of the room.
    pub end: Ticket<Received>,
    /// The pages. Whoever drops this ticket leaves it to the pool to take them back when they come home. Abandoned, if
    /// the node is gone before anything has proven that nobody writes them: they stay out of their pool then.
    pub pages: PagesTicket,
    /// The pages of the other pools, in their order.
    pub state: Vec<PagesTicket>,
    pub(crate) control: RoomControl,
}

/// A room on the prefill side of a pull.
#[derive(Debug)]
#[must_use = "the end of the room is told here"]
pub struct Serving {
    /// The end of the room.
    pub end: Ticket<Ended>,
    pub(crate) control: RoomControl,
}

/// A room on the prefill side of a push. Layers and chunks are sent as they are computed; then it is finished.
#[derive(Debug)]
#[must_use = "a room that is not sent and finished ends by its deadline"]
pub struct Sending {
    /// The end of the room.
    pub end: Ticket<Ended>,
    pub(crate) control: RoomControl,
    tokens: u32,
    first_layer: u32,
    /// For each list of the request, how many pages it names, and how many the pool has.
    pages: SmallVec<[(usize, u32); 2]>,
    /// For each layer, how many of the tokens have been sent.
    sent: Vec<u32>,
    finished: bool,
}

/// Why something was not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The tokens of a layer are sent in order, each once.
    #[error("layer {layer}: tokens {expected}.. are next, not {given:?}")]
    OutOfOrder {
        /// Which layer.
        layer: u32,
        /// The token that is next.
        expected: u32,
        /// What was to be sent.
        given: Range<u32>,
    },
    /// This node does not hold the layer, or the request does not have the token.
    #[error("layers {layers:?} and tokens {tokens:?} are not all part of this room")]
    OutOfRange {
        /// The layers.
        layers: Range<u32>,
        /// The tokens.
        tokens: Range<u32>,
    },
    /// The layout has no such pool.
    #[error("pages for pool {pool} of {pools}")]
    NoSuchPool {
        /// Which pool.
        pool: usize,
        /// So many there are.
        pools: usize,
    },
    /// More pages than the pool has.
    #[error("{pages} pages for pool {pool}, which has {limit}")]
    TooManyPages {
        /// Which pool.
        pool: usize,
        /// So many the room would have.
        pages: usize,
        /// So many there are.
        limit: u32,
    },
    /// The room cannot be finished before everything has been sent.
    #[error("layer {layer}: {sent} of {tokens} tokens have been sent")]
    NotComplete {
        /// The first layer that lacks some.
        layer: u32,
        /// So many have been sent.
        sent: u32,
        /// So many there are.
        tokens: u32,
    },
    /// The room has been finished.
    #[error("the room has been finished")]
    Finished,
    /// The progress loop did not take it; it may be sent again.
    #[error(transparent)]
    NotTaken(#[from] NotTaken),
}

impl SendError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::NotTaken(why) if why.is_retryable())
    }

    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::OutOfOrder { .. } => {
                "send each layer's tokens from the first one on, without gaps, each once"
            }
            Self::OutOfRange { .. } => "send layers that this node's cache has, and tokens of the request",
            Self::NoSuchPool { .. } => "number the pools as the layout does, from 0",
            Self::TooManyPages { .. } => "name the pages of the request's tokens, each once",
            Self::NotComplete { .. } => "send all tokens of all layers before the room is finished",
            Self::Finished => "open another room for what comes next",
            Self::NotTaken(why) => why.advice(),
        }
    }
}

impl Receiving {
    /// Ends the room here; the pages come home when the peer has stopped.
    pub fn cancel(&self) -> Result<(), NotTaken> {
        self.control.cancel()
    }

    /// How many batches have landed in the current attempt: grows while the room moves.
    pub fn arrivals(&self) -> u64 {
        self.control.arrivals.load(Ordering::Acquire)
    }
}

impl Serving {
    /// Ends the room here.
    pub fn cancel(&self) -> Result<(), NotTaken> {
        self.control.cancel()
    }
}

impl Sending {
    pub(crate) fn new(
        end: Ticket<Ended>,
        control: RoomControl,
        tokens: u32,
        layers: Range<u32>,
        pages: SmallVec<[(usize, u32); 2]>,
    ) -> Self {
        let sent = vec![0; layers.len()];
        Self { end, control, tokens, first_layer: layers.start, pages, sent, finished: false }
    }

    /// Appends to the pages of a pool, in a room that was [opened ahead](crate::Handle::open_ahead) of them. They may be
    /// filled later than this, but before their tokens are sent; a room that sends tokens without pages is refused, and so are
    /// more pages than the pool has.
    pub fn add_pages(&mut self, pool: usize, pages: PageRef) -> Result<(), SendError> {
        if self.finished {
            return Err(SendError::Finished);
        }
        let pools = self.pages.len();
        let (named, limit) = self.pages.get_mut(pool).ok_or(SendError::NoSuchPool { pool, pools })?;
        let (all, limit) = (*named + pages.len(), *limit);
        if all > limit as usize {
            return Err(SendError::TooManyPages { pool, pages: all, limit });
        }
        self.control.handle.add_pages(self.control.key, pool, pages)?;
        *named = all;
        Ok(())
    }

    /// Sends all tokens of these layers, whose pages are filled.
    pub fn send_layers(&mut self, layers: Range<u32>) -> Result<(), SendError> {
        self.send(layers, 0..self.tokens)
    }

    /// Sends these tokens of these layers: a chunk of a prompt that is computed in pieces.
    pub fn send(&mut self, layers: Range<u32>, tokens: Range<u32>) -> Result<(), SendError> {
        if self.finished {
            return Err(SendError::Finished);
        }
        let held = self.first_layer..self.first_layer + self.sent.len() as u32;
        if layers.is_empty() || layers.start < held.start || layers.end > held.end || tokens.end > self.tokens
        {
            return Err(SendError::OutOfRange { layers, tokens });
        }
        let places = (layers.start - held.start) as usize..(layers.end - held.start) as usize;
        for (layer, sent) in layers.clone().zip(&self.sent[places.clone()]) {
            if *sent != tokens.start || tokens.start > tokens.end {
                return Err(SendError::OutOfOrder { layer, expected: *sent, given: tokens });
            }
        }
        if !tokens.is_empty() {
            self.control.handle.send(self.control.key, layers, tokens.clone())?;
            self.sent[places].fill(tokens.end);
        }
        Ok(())
    }

    /// Everything has been sent: the peer may rely on the pages once it has them all. `aux` travels with it.
    pub fn finish(&mut self, aux: Vec<u8>) -> Result<(), SendError> {
        if self.finished {
            return Err(SendError::Finished);
        }
        if let Some(at) = self.sent.iter().position(|&sent| sent != self.tokens) {
            let layer = self.first_layer + at as u32;
            return Err(SendError::NotComplete { layer, sent: self.sent[at], tokens: self.tokens });
        }
        self.control.handle.finish(self.control.key, aux)?;
        self.finished = true;
        Ok(())
    }

    /// Ends the room here.
    pub fn cancel(&self) -> Result<(), NotTaken> {
        self.control.cancel()
    }
}

/// What a node has done, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// What has been counted since the node was opened.
    pub counters: Counters,
    /// What each port has moved.
    pub rails: Vec<RailStats>,
    /// Rooms that are not over in every respect: open, or ended with pages or ops not home.
    pub rooms: usize,
    /// Grants given to peers that are not quiescent.
    pub grants: usize,
    /// Sessions that are not over in every respect.
    pub sessions: usize,
}

/// What every room's holder can do.
#[derive(Clone)]
pub(crate) struct RoomControl {
    pub handle: Handle,
    pub key: u64,
    pub arrivals: Arc<AtomicU64>,
}

impl RoomControl {
    fn cancel(&self) -> Result<(), NotTaken> {
        self.handle.cancel(self.key)
    }
}

impl std::fmt::Debug for RoomControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RoomControl({})", self.key)
    }
}

/// What the progress loop does next for a user.
pub(crate) enum Command {
    Connect { key: u64, address: String, up: Promise<Result<PeerUp, SessionEnd>> },
    Disconnect { key: u64 },
    Receive { key: u64, request: GatherRequest, asked_ns: Option<u64>, pull: bool, told: DecodePromises },
    Open { key: u64, request: ScatterRequest, is_ahead: bool, asked_ns: Option<u64>, end: Promise<Ended> },
    AddPages { key: u64, pool: usize, pages: PageRef },
    Send { key: u64, layers: Range<u32>, tokens: Range<u32> },
    Finish { key: u64, aux: Vec<u8> },
    Serve { key: u64, request: ScatterServeRequest, asked_ns: Option<u64>, end: Promise<Ended> },
    Cancel { key: u64 },
    Stats { told: Promise<Stats> },
    Flight { told: Promise<Dump> },
    Stop,
}

impl Command {
    /// Tells whoever waits for this command that the node has stopped before it was taken.
    pub fn end(self) {
        let cause = SessionEnd::ClosedHere;
        let ended = Ended::alone(End::PeerLost { cause: cause.clone() });
        // Where a ticket was dropped nobody looks.
        match self {
            Command::Connect { up, .. } => drop(up.tell(Err(cause))),
            Command::Receive { request, told, .. } => {
                told.refuse(request.pages, ended);
            }
            Command::Open { end, .. } | Command::Serve { end, .. } => drop(end.tell(ended)),
            // Who asked finds the promise dropped.
            Command::Stats { .. } | Command::Flight { .. } => {}
            Command::Disconnect { .. }
            | Command::AddPages { .. }
            | Command::Send { .. }
            | Command::Finish { .. }
            | Command::Cancel { .. }
            | Command::Stop => {}
        }
    }
}

/// What a decode end has promised.
pub(crate) struct DecodePromises {
    pub end: Promise<Received>,
    /// One for each pool.
    pub pages: Vec<Promise<AllHome>>,
    pub arrivals: Arc<AtomicU64>,
}

impl DecodePromises {
    /// The room was not begun: the pages are as they were.
    pub fn refuse(self, pages: Vec<PageSet>, ended: Ended) {
        for (promise, pages) in self.pages.into_iter().zip(pages) {
            // Where a ticket was dropped nobody looks.
            drop(promise.tell(AllHome(vec![Homecoming::new(pages.grant())])));
        }
        drop(self.end.tell(Received { ended, aux: Vec::new() }));
    }
}

pub(crate) fn decode_tickets(handle: &Handle, key: u64, pools: usize) -> (DecodePromises, Receiving) {
    let (end, end_ticket) = ticket();
    let (pages, mut tickets): (Vec<_>, Vec<_>) = (0..pools.max(1)).map(|_| ticket()).unzip();
    let arrivals = Arc::new(AtomicU64::new(0));
    let control = RoomControl { handle: handle.clone(), key, arrivals: arrivals.clone() };
    let first = tickets.remove(0).into();
    let state = tickets.into_iter().map(PagesTicket::from).collect();
    let receiving = Receiving { end: end_ticket, pages: first, state, control };
    (DecodePromises { end, pages, arrivals }, receiving)
}

/// The room of one pool's pages between one rank of the prefill side and one of the decode side.
pub(crate) fn name(room: u64, use_count: u32, (prefill, decode, pool): (u32, u32, usize)) -> RoomName {
    RoomName { room, use_count, share: prefill << 20 | decode << 8 | pool as u32 }
}
