//! Who is at the other end of a Unix socket, and the proof that it has died.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

/// The process at the other end of a lane.
#[derive(Debug)]
pub struct Peer {
    pid: Pid,
    pidfd: OwnedFd,
}

/// Why a process cannot be a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// It runs as another user.
    OtherUser,
    /// It lives in a PID namespace that cannot be seen from here, so its death could not be proven.
    OutOfSight,
    /// The system refused to tell.
    Os { call: &'static str, errno: i32 },
}

impl Peer {
    /// Identifies the process that made the other end of `socket`: it connected, or it listens.
    ///
    /// Kernels before 6.5 tell only its number, which names another process once this one is dead and waited for.
    /// Nothing unsafe follows: the other process can only end later than the peer did, so its end is still a proof
    /// of the peer's. And in the handshake each end answers a message that was sent after this call, so the peer
    /// was alive, and the number its own, when the pidfd was opened.
    pub(crate) fn of(socket: BorrowedFd<'_>) -> Result<Self, Unfit> {
        let credentials: libc::ucred = option(socket, libc::SO_PEERCRED)
            .map_err(|errno| Unfit::Os { call: "getsockopt(SO_PEERCRED)", errno: errno.raw_os_error() })?;
        if credentials.uid != rustix::process::geteuid().as_raw() {
            return Err(Unfit::OtherUser);
        }
        let pid = Pid::from_raw(credentials.pid).ok_or(Unfit::OutOfSight)?;
        let pidfd = match option::<libc::c_int>(socket, SO_PEERPIDFD) {
            // SAFETY: on success the kernel has made this descriptor for us, close-on-exec, and nobody else knows it.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(Errno::NOPROTOOPT) => rustix::process::pidfd_open(pid, PidfdFlags::empty())
                .map_err(|errno| Unfit::Os { call: "pidfd_open", errno: errno.raw_os_error() })?,
            Err(errno) => {
                return Err(Unfit::Os { call: "getsockopt(SO_PEERPIDFD)", errno: errno.raw_os_error() });
            }
        };
        Ok(Self { pid, pidfd })
    }

    /// Its number. It names another process once this one [is dead](Peer::is_dead).
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether every thread of the process has ended. Each of them has let go of its memory before, so none of its
    /// stores or `process_vm_writev` can follow.
    pub fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        // An interrupted look, which a zero timeout hardly allows, is repeated by the next one.
        matches!(rustix::event::poll(&mut fds, Some(&NOW)), Ok(1..))
    }
}

impl AsFd for Peer {
    /// Readable once the process [is dead](Peer::is_dead).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Reads a socket option that is a plain structure of integers.
fn option<T: Copy>(socket: BorrowedFd<'_>, name: libc::c_int) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes, which are there.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            value.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if result == 0 {
        // SAFETY: the two callers ask for integers, for which the zeros and whatever the kernel wrote are values.
        Ok(unsafe { value.assume_init() })
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    }
}

const NOW: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
/// Not in the C library's headers yet; the same number on every architecture that this port is built for.
const SO_PEERPIDFD: libc::c_int = 77;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_other_end_of_a_pair_is_this_process_and_lives() {
        let (one, _other) = UnixStream::pair().expect("a pair of sockets");
        let peer = Peer::of(one.as_fd()).expect("this process is fit");
        assert_eq!(peer.pid(), rustix::process::getpid());
        assert!(!peer.is_dead());
    }

    #[test]
    fn a_death_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep starts");
        let pid = Pid::from_raw(child.id() as i32).expect("a child has a number");
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).expect("pidfd_open");
        let peer = Peer { pid, pidfd };
        assert!(!peer.is_dead());
        child.kill().expect("the child is killed");
        child.wait().expect("the child has ended");
        assert!(peer.is_dead());
    }
}
