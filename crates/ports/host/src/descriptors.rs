//! The file descriptors that peers pass with their regions: a port keeps so many and no more, or one peer could use up
//! those of the whole process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many a port may keep, and keeps. A clone counts with it.
#[derive(Clone, Debug)]
pub(crate) struct Descriptors {
    kept: Arc<AtomicUsize>,
    limit: usize,
}

/// A descriptor that a peer has passed with its region. It counts towards
/// [`max_peer_descriptors`](crate::HostOptions::max_peer_descriptors) as long as it or a [share](PeerDescriptor::share) of
/// it lives.
#[derive(Debug)]
pub struct PeerDescriptor {
    fd: OwnedFd,
    share: Share,
}

/// Counts as long as any clone lives: what was made of a descriptor, as a mapping is, keeps it when the descriptor itself
/// is closed.
#[derive(Clone, Debug)]
pub struct Share {
    _one: Arc<One>,
}

#[derive(Debug)]
struct One(Arc<AtomicUsize>);

impl Descriptors {
    /// At most `asked`, and at most half of what the process may have at this moment.
    pub(crate) fn new(asked: usize) -> Self {
        let of_process = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let half = of_process.map_or(usize::MAX, |all| usize::try_from(all / 2).unwrap_or(usize::MAX));
        Self { kept: Arc::default(), limit: asked.min(half) }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Keeps one; `None`, and it is closed, if that is one too many.
    pub(crate) fn keep(&self, fd: OwnedFd) -> Option<PeerDescriptor> {
        // Only the port's thread adds, so that nothing can come in between; any thread may drop a mapping.
        if self.kept.load(Ordering::Relaxed) >= self.limit {
            return None;
        }
        self.kept.fetch_add(1, Ordering::Relaxed);
        Some(PeerDescriptor { fd, share: Share { _one: Arc::new(One(self.kept.clone())) } })
    }
}

impl PeerDescriptor {
    /// What goes on counting when the descriptor is closed.
    pub fn share(&self) -> Share {
        self.share.clone()
    }
}

impl AsFd for PeerDescriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for One {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
