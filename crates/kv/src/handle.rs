//! How threads of the user's talk to the progress loop: a bounded queue and a doorbell.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_queue::ArrayQueue;
use crossdock_engine::{Doorbell, EventFd, Ticket, ticket};
use crossdock_proto::SessionEnd;

use crate::request::{
    Command, FetchRequest, Peer, PeerKey, PeerUp, ReceiveRequest, Receiving, RoomControl, SendRequest,
    Sending, ServeRequest, Serving, Stats, decode_tickets,
};

/// A user's end of a node: cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// The queue to the progress loop is full: the loop does not keep up, or does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue to the progress loop is full; let it run, then try again")]
pub struct Busy;

pub(crate) struct Shared {
    pub commands: ArrayQueue<Command>,
    pub doorbell: Doorbell,
    /// Readable when something was told to a ticket since it was last armed.
    pub told: EventFd,
    keys: AtomicU64,
    layers: Range<u32>,
}

impl Shared {
    pub fn new(commands: usize, doorbell: Doorbell, told: EventFd, layers: Range<u32>) -> Self {
        Self { commands: ArrayQueue::new(commands), doorbell, told, keys: AtomicU64::new(0), layers }
    }
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Dials a peer (`"ip:port"`), now and whenever the session with it is lost. The ticket tells the first
    /// session, or why there will never be one; rooms may be opened before.
    pub fn connect(
        &self,
        address: impl Into<String>,
    ) -> Result<(Peer, Ticket<Result<PeerUp, SessionEnd>>), Busy> {
        let (up, ticket) = ticket();
        let key = self.key();
        self.push(Command::Connect { key, address: address.into(), up })?;
        Ok((Peer(PeerKey::Dialed(key)), ticket))
    }

    /// Ends the session with a dialed peer and dials it no more.
    pub fn disconnect(&self, peer: Peer) -> Result<(), Busy> {
        match peer.0 {
            PeerKey::Dialed(key) => self.push(Command::Disconnect { key }),
            PeerKey::Node(_) => Ok(()),
        }
    }

    /// Opens the decode end of a push.
    pub fn receive(&self, request: ReceiveRequest) -> Result<Receiving, Busy> {
        self.decode(request, false)
    }

    /// Opens the decode end of a pull.
    pub fn fetch(&self, request: FetchRequest) -> Result<Receiving, Busy> {
        self.decode(request, true)
    }

    /// Opens the prefill end of a push.
    pub fn open(&self, request: SendRequest) -> Result<Sending, Busy> {
        let (end, end_ticket) = ticket();
        let control = self.control();
        let tokens = request.tokens;
        self.push(Command::Open { key: control.key, request, end })?;
        Ok(Sending::new(end_ticket, control, tokens, self.shared.layers.clone()))
    }

    /// Opens the prefill end of a pull.
    pub fn serve(&self, request: ServeRequest) -> Result<Serving, Busy> {
        let (end, end_ticket) = ticket();
        let control = self.control();
        self.push(Command::Serve { key: control.key, request, end })?;
        Ok(Serving { end: end_ticket, control })
    }

    /// Asks what the node has done and what it holds.
    pub fn stats(&self) -> Result<Ticket<Stats>, Busy> {
        let (told, ticket) = ticket();
        self.push(Command::Stats { told })?;
        Ok(ticket)
    }

    /// The node's one event descriptor: see [`EventFd`].
    pub fn event_fd(&self) -> &EventFd {
        &self.shared.told
    }

    pub(crate) fn send(&self, key: u64, layers: Range<u32>, tokens: Range<u32>) -> Result<(), Busy> {
        self.push(Command::Send { key, layers, tokens })
    }

    pub(crate) fn finish(&self, key: u64, aux: Vec<u8>) -> Result<(), Busy> {
        self.push(Command::Finish { key, aux })
    }

    pub(crate) fn cancel(&self, key: u64) -> Result<(), Busy> {
        self.push(Command::Cancel { key })
    }

    /// Asks the progress loop to end; see [`Worker::turn`](crate::Worker::turn).
    pub fn stop(&self) -> Result<(), Busy> {
        self.push(Command::Stop)
    }

    fn decode(&self, request: ReceiveRequest, pull: bool) -> Result<Receiving, Busy> {
        let key = self.key();
        let (told, receiving) = decode_tickets(self, key);
        self.push(Command::Receive { key, request, pull, told })?;
        Ok(receiving)
    }

    fn control(&self) -> RoomControl {
        RoomControl { handle: self.clone(), key: self.key(), arrivals: Arc::default() }
    }

    fn key(&self) -> u64 {
        self.shared.keys.fetch_add(1, Ordering::Relaxed)
    }

    fn push(&self, command: Command) -> Result<(), Busy> {
        self.shared.commands.push(command).map_err(|_| Busy)?;
        self.shared.doorbell.ring();
        Ok(())
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handle({} commands queued)", self.shared.commands.len())
    }
}
