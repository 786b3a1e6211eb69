//! How one process wakes another: an eventfd whose ringing end is passed to every peer.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// An eventfd that does not block, rung here or by its other holder.
#[derive(Debug)]
pub(crate) struct Doorbell {
    eventfd: OwnedFd,
    /// A peer has made it, and can change it.
    is_peers: bool,
}

impl Doorbell {
    pub(crate) fn new() -> Result<Self, Errno> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, is_peers: false })
    }

    /// Takes a peer's. One that could block whoever rings it is refused, and so is whatever is no eventfd: a pipe, a
    /// socket or a file can block, or do something else when it is written to.
    pub(crate) fn of_peer(fd: OwnedFd) -> Option<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd).ok()?;
        let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        let is_good = flags.contains(OFlags::NONBLOCK) && what.as_os_str() == "anon_inode:[eventfd]";
        is_good.then_some(Self { eventfd: fd, is_peers: true })
    }

    /// Wakes whoever sleeps on it.
    ///
    /// The flag that keeps a write from blocking belongs to both holders, and a peer can clear it at any time. A write
    /// to an eventfd blocks only if its counter is full, so a peer's is looked at first. A peer that fills it between
    /// the look and the write, and has cleared the flag, can still hold this thread up; no call that the kernel offers
    /// for an eventfd excludes that.
    pub(crate) fn ring(&self) {
        if self.is_peers && self.is_full() {
            return;
        }
        // A full counter refuses the write, and is as readable as it can be.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    /// Whether a ring more would have to wait; whoever sleeps on it is awake then.
    fn is_full(&self) -> bool {
        let mut fds = [PollFd::new(&self.eventfd, PollFlags::OUT)];
        loop {
            match rustix::event::poll(&mut fds, Some(&NOW)) {
                Ok(ready) => return ready == 0,
                Err(Errno::INTR) => {}
                // Not to ring would be the worse mistake: the peer might sleep for ever.
                Err(_) => return false,
            }
        }
    }

    /// Takes all rings so far.
    pub(crate) fn silence(&self) {
        // Nothing to read means that nobody rang.
        let _ = rustix::io::read(&self.eventfd, &mut [0u8; 8]);
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
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

/// What wakes the owner of a port, for the port's [medium](crate::Medium): from any thread.
#[derive(Clone, Debug)]
pub struct Bell(Arc<Doorbell>);

impl Bell {
    pub(crate) fn new(doorbell: &Arc<Doorbell>) -> Self {
        Self(doorbell.clone())
    }

    /// Wakes the owner, now or as soon as it sleeps.
    pub fn ring(&self) {
        self.0.ring();
    }
}

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;

    fn clone_of(fd: &impl AsFd) -> OwnedFd {
        fd.as_fd().try_clone_to_owned().expect("a descriptor is left")
    }

    #[test]
    fn only_eventfds_that_do_not_block_are_doorbells() {
        let bell = Doorbell::new().expect("an eventfd");
        assert!(Doorbell::of_peer(clone_of(&bell)).is_some());
        let blocking = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        assert!(Doorbell::of_peer(blocking).is_none());
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (reading, writing) = rustix::pipe::pipe_with(flags).expect("a pipe");
        assert!(Doorbell::of_peer(reading).is_none() && Doorbell::of_peer(writing).is_none());
        let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
        socket.set_nonblocking(true).expect("a flag");
        assert!(Doorbell::of_peer(socket.into()).is_none());
        let epoll =
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).expect("an epoll");
        rustix::fs::fcntl_setfl(&epoll, OFlags::NONBLOCK).expect("a flag");
        assert!(Doorbell::of_peer(epoll).is_none());
    }

    /// The peer has let its counter run full, and then made it blocking, after this side had looked at it.
    #[test]
    fn a_full_doorbell_that_blocks_does_not_block_who_rings() {
        let theirs = Doorbell::new().expect("an eventfd");
        let ours = Doorbell::of_peer(clone_of(&theirs)).expect("a good doorbell");
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).expect("the largest count");
        rustix::fs::fcntl_setfl(&theirs, OFlags::empty()).expect("a flag");
        let (done, rung) = std::sync::mpsc::channel();
        let ringer = std::thread::spawn(move || {
            ours.ring();
            let _ = done.send(());
        });
        let result = rung.recv_timeout(Duration::from_secs(10));
        // Lets the other thread end, whatever it does.
        theirs.silence();
        ringer.join().expect("it has rung");
        assert_eq!(result, Ok(()));
    }

    #[test]
    fn a_ring_wakes_and_is_silenced() {
        let theirs = Doorbell::new().expect("an eventfd");
        let ours = Doorbell::of_peer(clone_of(&theirs)).expect("a good doorbell");
        let is_rung = || {
            let mut fds = [PollFd::new(&theirs, PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&NOW)).expect("a look") > 0
        };
        assert!(!is_rung());
        ours.ring();
        ours.ring();
        assert!(is_rung());
        theirs.silence();
        assert!(!is_rung());
    }
}
