//! How one process wakes another: an eventfd whose ringing end is passed to every peer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// An eventfd that never blocks, rung here or by its other holder.
#[derive(Debug)]
pub(crate) struct Doorbell(OwnedFd);

impl Doorbell {
    pub(crate) fn new() -> Result<Self, Errno> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Self)
    }

    /// Takes a peer's. One that could block whoever rings it is refused.
    pub(crate) fn of_peer(fd: OwnedFd) -> Option<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd).ok()?;
        flags.contains(OFlags::NONBLOCK).then_some(Self(fd))
    }

    /// Wakes whoever sleeps on it.
    pub(crate) fn ring(&self) {
        // A full counter refuses the write, and is as readable as it can be. A peer that passed something else
        // than an eventfd harms only its own sleep.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes all rings so far.
    pub(crate) fn silence(&self) {
        // Nothing to read means that nobody rang.
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Rings when it is dropped: tells a sleeping port that something it waits for is gone.
#[derive(Debug)]
pub(crate) struct RingOnDrop(pub(crate) Arc<Doorbell>);

impl Drop for RingOnDrop {
    fn drop(&mut self) {
        self.0.ring();
    }
}
