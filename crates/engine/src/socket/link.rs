//! One TCP stream and the frames on it.

use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::SocketOptions;
use super::frames::{FrameTooLong, Full, Inbox, Outbox};
use crate::LinkCause;

/// One control stream.
#[derive(Debug)]
pub(super) struct Link {
    pub stage: Stage,
    pub deadline_ns: Option<u64>,
    /// Whether it is on the list of links that have something new to send.
    pub unflushed: bool,
    /// What epoll reports of it.
    pub interest: EventFlags,
    pub stream: OwnedFd,
    inbox: Inbox,
    outbox: Outbox,
}

/// How far a link has come in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Dialled, not answered yet.
    Connecting,
    /// Frames go both ways.
    Open,
    /// Closed here: what is queued leaves, what comes is thrown away, until the peer closes too.
    Closing,
    /// Nothing can be sent any more; what the peer said before, perhaps why it closed, is still to be read.
    SendFailed {
        /// Why.
        cause: LinkCause,
    },
    /// Only its end is still to be said.
    Ended {
        /// Why.
        cause: LinkCause,
    },
}

/// How far a flush came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    All,
    Blocked,
    Failed { cause: LinkCause },
}

/// What one read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    Bytes { bytes: usize, frames: usize },
    Nothing,
    End { cause: LinkCause },
}

/// Whether a dialled peer has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    NotYet,
    Connected,
    Failed { cause: LinkCause },
}

impl Link {
    pub fn new(stream: OwnedFd, stage: Stage, options: &SocketOptions) -> Self {
        let interest = match stage {
            Stage::Connecting => EventFlags::OUT,
            Stage::Open | Stage::Closing => EventFlags::IN,
            // Errors and the end of the stream are reported for an empty interest, too.
            Stage::SendFailed { .. } | Stage::Ended { .. } => EventFlags::empty(),
        };
        Self {
            stage,
            deadline_ns: None,
            unflushed: false,
            interest,
            stream,
            inbox: Inbox::new(options.max_frame_bytes),
            outbox: Outbox::new(options.send_buffer_bytes),
        }
    }

    /// Takes frames of full length from now on.
    pub fn trust(&mut self) {
        self.inbox.trust();
    }

    pub fn queue(&mut self, frame: &[u8]) -> Result<(), Full> {
        self.outbox.push(frame)
    }

    /// Whether the dialled peer has answered.
    pub fn answer(&self) -> Answer {
        let failed = |errno| Answer::Failed { cause: broken("connect", errno) };
        match rustix::net::sockopt::socket_error(&self.stream) {
            Ok(Err(errno)) | Err(errno) => return failed(errno),
            Ok(Ok(())) => {}
        }
        let (here, there) = (rustix::net::getsockname(&self.stream), rustix::net::getpeername(&self.stream));
        match (here, there) {
            // Dialling a port of this host that nobody listens on can hit the very port that the kernel chose
            // for this end, and TCP then connects the socket to itself.
            (Ok(here), Ok(Some(there))) if here == there => failed(Errno::CONNREFUSED),
            (Ok(_), Ok(Some(_))) => Answer::Connected,
            (_, Err(Errno::NOTCONN)) | (Ok(_), Ok(None)) => Answer::NotYet,
            (Err(errno), _) | (_, Err(errno)) => failed(errno),
        }
    }

    /// Sends what is queued, as far as the kernel takes it.
    pub fn flush(&mut self) -> Flushed {
        while !self.outbox.is_empty() {
            // Without this flag a host program that has not ignored the signal dies of a peer that closes. It is
            // why the two halves of the buffer are not sent by one vectored write, which has no flags.
            match rustix::net::send(&self.stream, self.outbox.front(), SendFlags::NOSIGNAL) {
                Ok(bytes) => self.outbox.sent(bytes),
                Err(Errno::AGAIN) => return Flushed::Blocked,
                Err(Errno::INTR) => {}
                Err(errno) => return Flushed::Failed { cause: broken("send", errno) },
            }
        }
        Flushed::All
    }

    /// Reads once, and gives the frames that are complete by it.
    pub fn read(&mut self, scratch: &mut [u8], mut give: impl FnMut(&[u8])) -> Read {
        let (bytes, _) = match rustix::net::recv(&self.stream, &mut *scratch, RecvFlags::empty()) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Read::Nothing,
            Err(errno) => return Read::End { cause: broken("recv", errno) },
        };
        if bytes == 0 {
            let cause = if self.inbox.is_empty() {
                LinkCause::ClosedByPeer
            } else {
                LinkCause::Broken { call: "recv", errno: 0 }
            };
            return Read::End { cause };
        }
        if self.stage == Stage::Closing {
            return Read::Bytes { bytes, frames: 0 };
        }
        let mut frames = 0;
        let taken = self.inbox.take(&scratch[..bytes], |frame| {
            frames += 1;
            give(frame);
        });
        match taken {
            Ok(()) => Read::Bytes { bytes, frames },
            Err(FrameTooLong) => Read::End {
                cause: LinkCause::PeerMisbehaved { what: "announced a frame longer than allowed" },
            },
        }
    }

    /// Says to the peer that nothing more will come.
    pub fn end_sending(&self) {
        // It fails only if the connection has ended meanwhile, which the next read finds.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Write);
    }
}

fn broken(call: &'static str, errno: Errno) -> LinkCause {
    match errno {
        // The peer had ended its sending before it closed: it closed in order, while frames were on their way.
        Errno::PIPE => LinkCause::ClosedByPeer,
        _ => LinkCause::Broken { call, errno: errno.raw_os_error() },
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use rustix::net::{AddressFamily, SocketType};

    use super::*;

    #[test]
    fn a_socket_connected_to_itself_has_found_nobody() {
        let stream = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&stream, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let here = rustix::net::getsockname(&stream).unwrap();
        rustix::net::connect(&stream, &here).unwrap();
        let options = SocketOptions::new(std::net::SocketAddr::from(([127, 0, 0, 1], 0)));
        let link = Link::new(stream, Stage::Connecting, &options);
        let errno = Errno::CONNREFUSED.raw_os_error();
        assert_eq!(link.answer(), Answer::Failed { cause: LinkCause::Broken { call: "connect", errno } });
    }
}
