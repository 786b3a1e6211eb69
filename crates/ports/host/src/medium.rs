//! What a port on these lanes is made of: how its bytes move.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use crossdock_memory::Memory;
use crossdock_transport::{DownCause, Error, Mapping, Op, Result};

use crate::descriptors::PeerDescriptor;
use crate::doorbell::Doorbell;
use crate::message::Payload;
use crate::peer::Peer;
use crate::remote::{Leash, Tether};

/// What moves the bytes of a [`HostPort`](crate::HostPort).
///
/// A medium is one port's own and is called by the port's thread only. No method may wait, but for
/// [`stop`](Medium::stop). What it moves at once is [`Ticket::ENDED`] when [`start`](Medium::start) returns, and
/// [`ended`](Medium::ended), [`poll`](Medium::poll), [`wakes`](Medium::wakes) and `stop` are not its concern. What goes
/// on behind its back carries a ticket, and until `ended` says that the ticket is over, the port
/// - tells nobody of the move: neither its immediate nor its `Done`;
/// - keeps the [`Registered`] memory, the [`Remote`](Medium::Remote) and the [`Lane`](Medium::Lane) that the move uses;
/// - and keeps the lane from its end: the peer is not told that this side has stopped.
pub trait Medium: Sized + Send {
    /// What ports of this medium call themselves, and how they describe regions to each other.
    const KIND: &'static Kind;
    /// What it keeps for a registered memory, beside the memory itself. Dropped when it is deregistered.
    type Region: Send;
    /// A peer's region on one lane, of which has been heard.
    type Offered: Send;
    /// A peer's region on one lane that ops can use. Dropped when the peer has retired it or the lane closes, before the
    /// peer is told that this side has stopped; and in a forked child, where that must do no harm.
    type Remote: Send;
    /// What it keeps for one lane: where its moves stand, for one.
    type Lane: Default + Send;

    /// Takes memory in, or says why this medium cannot move it.
    fn register(&mut self, memory: &Memory) -> Result<Self::Region>;

    /// What peers are told of a region: one of the forms of its [kind](Kind::offers).
    fn offer<'a>(&self, region: &'a Registered<Self::Region>) -> Offer<'a>;

    /// Takes in what a peer has told of a region of this many bytes, which is of one of the forms of the
    /// [kind](Kind::offers); the lane ends if that cannot be. Peers say this whenever they like, so it does nothing that
    /// costs.
    fn hear(&mut self, offer: HeardOffer, bytes: u64) -> std::result::Result<Self::Offered, DownCause>;

    /// Makes a peer's region usable: maps it, and proves that it can be reached. After an error it may be asked again.
    fn attach(&mut self, offered: &Self::Offered, attaching: &Attaching<'_>) -> Result<Self::Remote>;

    /// The region in this process's address space, if it is mapped there.
    fn mapping(_remote: &Self::Remote) -> Option<Mapping> {
        None
    }

    /// Whether a peer that goes on writing into this memory, after a grant was revoked, reaches memory that its owner
    /// means to use again. If so, a region whose grant was revoked stays in use until every lane of that peer is down;
    /// and a port that is dropped before leaves the memory behind for good.
    fn is_exposed(region: &Registered<Self::Region>) -> bool;

    /// How much of an op can be moved now, as a [short post](crossdock_transport::Posted) counts it: bytes of a span,
    /// pieces of a paged op; more than the op has is all of it. The op moves some bytes. `moved_bytes` have been moved by
    /// this call of `post` already: where that is nothing, and the medium is not full, one piece at least is to be taken.
    fn room(&self, lane: &Self::Lane, op: &Op<'_>, moved_bytes: u64) -> u64;

    /// Moves an op that there is [room](Medium::room) for, or begins to: all of it, or nothing and `None` if it has to be
    /// tried again later. Its extents have been checked against both regions. When the ticket is over, whoever acquires
    /// what this thread then stores with release order, the immediate above all, sees the bytes.
    fn start(
        &mut self,
        lane: &mut Self::Lane,
        op: &Move<'_, Self>,
    ) -> std::result::Result<Option<Ticket>, Refusal>;

    /// Hands over what `start` has gathered: after the last op of a call of `post` on this lane. What goes wrong here is
    /// said by [`ended`](Medium::ended).
    fn flush(&mut self, _lane: &mut Self::Lane) {}

    /// Looks how far everything is: once in each poll of the port, before any lane is asked.
    fn poll(&mut self) {}

    /// How far the moves of a lane have come. Asked of lanes that have moves on their way, in each poll: so a medium that
    /// gives tickets has to answer.
    fn ended(&mut self, _lane: &mut Self::Lane) -> Ended {
        unreachable!("a medium that gives tickets says when they are over")
    }

    /// Whether the port's owner may sleep while moves are on their way. True: when the next of them is over, also if it
    /// is by now, the [bell](crate::Bell) is rung after [`ended`](Medium::ended) would say so. Else the owner is told to
    /// poll.
    fn wakes(&mut self) -> bool {
        false
    }

    /// The port is dropped while moves are on their way: cancels them, or waits for them, until the deadline. What is
    /// not over by then must not be disturbed: the port leaves what those moves use as it is, for good, and so has the
    /// medium to do with its own part of them when it is dropped. Not called in a forked child.
    fn stop(&mut self, _deadline: Instant) {}
}

/// What a medium's ports call themselves, and how they describe regions to each other.
#[derive(Debug)]
pub struct Kind {
    /// [`PortInfo::kind`](crossdock_transport::PortInfo::kind), and part of the names of sockets.
    pub name: &'static str,
    /// How addresses of lanes begin. The last byte is the version of all that two ports tell each other.
    pub address_magic: [u8; 4],
    /// How keys begin.
    pub key_magic: [u8; 4],
    /// The forms that an offer can have.
    pub offers: &'static [OfferForm],
}

/// One form of telling of a region. A packet that has none of the forms of its kind cannot be read, and ends the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferForm {
    /// Its number, by which it is told from others of its kind.
    pub number: u8,
    /// How long its payload is; at most [`Payload::MAX_BYTES`].
    pub payload_bytes: usize,
    /// Whether a file descriptor comes with it.
    pub with_descriptor: bool,
}

/// What is told of a region.
#[derive(Debug)]
pub struct Offer<'a> {
    /// Of which [form](OfferForm::number).
    pub form: u8,
    /// As long as the form says.
    pub payload: Payload,
    /// If the form says so.
    pub descriptor: Option<BorrowedFd<'a>>,
}

/// What a peer has told of a region, as its form says.
#[derive(Debug)]
pub struct HeardOffer {
    /// Of which [form](OfferForm::number).
    pub form: u8,
    /// As long as the form says.
    pub payload: Payload,
    /// There if the form says so.
    pub descriptor: Option<PeerDescriptor>,
}

/// A registered memory.
#[derive(Debug)]
pub struct Registered<R> {
    /// What the medium keeps of it. It goes before the memory.
    pub region: R,
    /// The memory.
    pub memory: Memory,
}

/// Where an offer comes from, when it is attached.
#[derive(Debug)]
pub struct Attaching<'a> {
    /// How long the region is.
    pub bytes: u64,
    /// The process at the other end.
    pub peer: &'a Peer,
    /// What is found in that process, if it is reached by its number or in another way.
    pub landmark: Landmark,
    pub(crate) leash: &'a Arc<Leash>,
    pub(crate) bell: &'a Arc<Doorbell>,
}

impl Attaching<'_> {
    /// To be kept by whatever touches the peer's memory and may outlive the lane's use of it, as a
    /// [`Mapping`] does: dropped last, it lets the lane end.
    pub fn tether(&self) -> Tether {
        Tether::new(self.leash, self.bell)
    }
}

/// Random bytes at a known place of a process, which nobody else has: who reads them there has found the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landmark {
    /// Where they are, in that process.
    pub address: u64,
    /// What they are.
    pub bytes: [u8; 16],
}

/// An op with the two regions that it names, which hold all that it touches. The port alone makes one.
#[non_exhaustive]
pub struct Move<'a, M: Medium> {
    /// No more than there is room for.
    pub op: &'a Op<'a>,
    /// How many bytes that is; not 0.
    pub bytes: u64,
    /// The local side.
    pub local: &'a Registered<M::Region>,
    /// The peer's.
    pub remote: &'a M::Remote,
    /// The process at the other end.
    pub peer: &'a Peer,
}

/// The number of a move that may go on when [`Medium::start`] returns. On each lane tickets grow with every move that
/// gets one, and moves with larger tickets are over no earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

impl Ticket {
    /// The ticket of moves that are over already, and of no other.
    pub const ENDED: Ticket = Ticket(0);
}

/// How far the moves of a lane have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Moves with tickets up to this one are over: they touch no memory any more, neither here nor at the peer.
    pub until: Ticket,
    /// The first move that failed, and why. It and what comes after it on this lane is reported to nobody, and the lane
    /// ends with this cause, once those moves are over too. It is said again as long as it is asked.
    pub failed: Option<(Ticket, DownCause)>,
}

/// Why nothing of an op was moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Because of this op; the lane stays as it is.
    Op(Error),
    /// The lane ends. Some of the bytes may have been moved.
    Lane(DownCause),
}
