//! The shared-memory port: between processes of one user on one host.
//!
//! **How bytes move.** Memory that crossdock allocated ([`MemoryKind::Shared`]) is a sealed memfd; its descriptor goes to
//! every connected peer over a Unix socket, the peer maps it, and an op is a copy by the poster's own thread, or by a
//! few [copy threads](ShmOptions::copy_threads). Memory of any other origin is reached with `process_vm_writev` and
//! `process_vm_readv`. Immediates go through a [ring](ShmOptions::immediates_per_lane) in memory that both ends map. All
//! bytes of an op have moved when `post` returns; its `Done` comes out at the next poll.
//!
//! **How ends find each other.** Each port listens on an abstract Unix socket with a random name. The end of a lane with
//! the smaller cookie dials; the user id is checked by the kernel, the [tags](crossdock_transport::LaneTags) by both ends.
//!
//! **When a lane is down.** The peer writes by itself, and nothing here can stop it: `revoke` answers
//! [`Fence::WhenDown`](crossdock_transport::Fence), and `Down` is said only when
//! - this end has stopped: it takes no ops, and every [`Mapping`](crossdock_transport::Mapping) that the caller was given
//!   on this lane has been dropped, so that nothing of the peer is mapped any more; and
//! - the peer has answered that the same is true there, or its process is proven dead by a pidfd.
//!
//! The end of the socket is no proof: a process that executes another program, or that has lost its descriptors,
//! may live on. A stopped process delays `Down` until it continues or dies. A lane that has not come so far that memory
//! was shown ends at once.
//!
//! **Private memory** that a peer may still write must not go back to its owner. So a region under a grant that was
//! revoked stays in use until every lane of that peer is down, and `deregister` is refused until then; and a port that is
//! dropped while a peer has not stopped never drops its handles of private memory ([`regions_left_exposed`]). The rule for
//! the owner is that of [`Memory::from_raw`](crossdock_memory::Memory::from_raw).
//!
//! **Distrust.** A peer runs as the same user, but it may be broken. Descriptors are mapped only if sealed against a
//! change of their length; what a peer writes into shared memory is read once and checked; queues and
//! descriptors have limits; and nothing that a peer does or leaves undone makes a call wait, but for one thing: the eventfd
//! that wakes a peer is the peer's, too, and a peer that makes it blocking *and* fills its counter between two system calls
//! of a `post` or a `poll` can hold up the thread that rings it.
//!
//! **Forks.** Mappings are not inherited by a forked child, and descriptors close with the execution of another program,
//! so that no child keeps a peer's memory. A port cannot be used in a forked child; dropping it there does no harm.
//!
//! [`MemoryKind::Shared`]: crossdock_memory::MemoryKind::Shared

mod address;
pub mod copy;
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
mod message;
mod numbered;
mod peer;
mod port;
mod posting;
pub mod process_memory;
mod reach;
mod remote;
mod ring;
mod sync;
mod watch;

pub use counters::ShmCounters;
pub use port::{ShmOptions, ShmPort, regions_left_exposed};
