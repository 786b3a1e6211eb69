//! Lanes between the processes of one user on one host, for the ports that move bytes there.
//!
//! A [`HostPort`] does what all such ports do alike: two ends find each other, tell each other of their regions, hand
//! immediates over, and end a lane with proof. How bytes move is its [`Medium`]'s part: shared memory and system calls in
//! `crossdock-shm`. A medium may move them at once, or begin and say later how far it is.
//!
//! **How ends find each other.** Each port listens on an abstract Unix socket with a random name. The end of a lane with
//! the smaller cookie dials; the user id is checked by the kernel, the [tags](crossdock_transport::LaneTags) by both ends.
//! Each end then tells the other of its regions as its medium [offers](Medium::offer) them, with file descriptors where
//! those have any. Immediates go through a [ring](HostOptions::immediates_per_lane) in memory that both ends map.
//!
//! **What is told when.** An immediate enters the ring, and `Done` is reported, when the bytes of the op and of all ops
//! before it on the lane have moved: with `post` itself, or in the poll that finds the [ticket](Ticket) over. Room for
//! both is set aside when the op is taken, so that what has moved can always be told.
//!
//! **When a lane is down.** The peer writes by itself, and nothing here can stop it: `revoke` answers
//! [`Fence::WhenDown`](crossdock_transport::Fence), and `Down` is said only when
//! - this end has stopped: it takes no ops, its moves that were on their way are over, and every
//!   [`Mapping`](crossdock_transport::Mapping) that the caller was given on this lane has been dropped, so that nothing of
//!   the peer is touched any more; and
//! - the peer has answered that the same is true there, or its process is proven dead by a pidfd.
//!
//! The end of the socket is no proof: a process that executes another program, or that has lost its descriptors,
//! may live on. A stopped process delays `Down` until it continues or dies. A lane that has not come so far that memory
//! was shown ends at once. A move that fails ends its lane; nobody is told of it or of what was posted behind it.
//!
//! **Exposed memory** is memory where a peer's late writes reach what the owner uses again
//! ([`Medium::is_exposed`]): it must not go back to its owner while a peer may still write there. So a region under a grant
//! that was revoked stays in use until every lane of that peer is down, and `deregister` is refused until then; and a port
//! that is dropped while a peer has not stopped never drops its handles of exposed memory ([`regions_left_exposed`]).
//!
//! **Distrust.** A peer runs as the same user, but it may be broken. What a peer writes into shared memory is read once
//! and checked; queues and descriptors have limits; and nothing that a peer does or leaves undone makes a call wait, but
//! for one thing: the eventfd that wakes a peer is the peer's, too, and a peer that makes it blocking *and* fills its
//! counter between two system calls of a `post` or a `poll` can hold up the thread that rings it.
//!
//! **Forks.** Descriptors close with the execution of another program, and the rings are not inherited by a forked child. A
//! port cannot be used in a forked child; dropping it there does no harm, as far as its medium sees to that.

mod address;
mod counters;
mod descriptors;
mod doorbell;
mod guests;
mod handshake;
#[cfg(all(test, not(loom)))]
mod hostile_tests;
mod joined;
mod lane;
mod link;
mod mapped;
mod medium;
mod message;
mod numbered;
mod peer;
mod port;
mod posting;
mod reach;
mod remote;
mod ring;
mod sync;
mod underway;
mod watch;

pub use counters::HostCounters;
pub use descriptors::{PeerDescriptor, Share};
pub use doorbell::Bell;
pub use mapped::MappedMemfd;
pub use medium::{
    Attaching, Ended, HeardOffer, Kind, Landmark, Medium, Move, Offer, OfferForm, Refusal, Registered, Ticket,
};
pub use message::Payload;
pub use peer::Peer;
pub use port::{HostOptions, HostPort, regions_left_exposed};
pub use remote::Tether;
