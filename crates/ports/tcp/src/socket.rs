//! Sockets, the epoll instance and the timer, as this port uses them.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crossdock_transport::{Error, Result};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::TcpOptions;

/// How connections are made: the part of the options that is about sockets.
pub(crate) struct Sockets {
    options: TcpOptions,
}

/// What an event of epoll is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Listener,
    Timer,
    /// A connection that has not said which lane it is for, by its number.
    Caller(u32),
    Lane(u32),
}

impl Sockets {
    pub fn new(options: &TcpOptions) -> Self {
        Self { options: options.clone() }
    }

    /// Listens at `address`, and says at which it is.
    pub fn listen(&self, address: SocketAddr) -> Result<(OwnedFd, SocketAddr)> {
        let socket = self.open(address.ip()).map_err(os("socket"))?;
        rustix::net::bind(&socket, &address).map_err(os("bind"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(os("listen"))?;
        let bound = rustix::net::getsockname(&socket).map_err(os("getsockname"))?;
        let bound = SocketAddr::try_from(bound).map_err(os("getsockname"))?;
        Ok((socket, bound))
    }

    /// Begins to connect. The socket becomes writable when that has succeeded or failed.
    pub fn dial(&self, to: SocketAddr) -> std::result::Result<OwnedFd, Errno> {
        let socket = self.open(to.ip())?;
        let local_ip = self.options.bind.ip();
        if !local_ip.is_unspecified() && local_ip.is_ipv4() == to.is_ipv4() {
            // The bytes are to leave by the device that this port was opened for.
            rustix::net::bind(&socket, &SocketAddr::new(local_ip, 0))?;
        }
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
            Err(code) => Err(code),
        }
    }

    /// Takes a connection that came in. It has the listener's options.
    pub fn accept(&self, listener: &OwnedFd) -> std::result::Result<OwnedFd, Errno> {
        let socket = rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        // A listener everywhere does not know which connections stay within the host.
        if let (None, Ok(local)) = (&self.options.congestion, rustix::net::getsockname(&socket))
            && let Ok(local) = SocketAddr::try_from(local)
            && let Some(name) = self.options.congestion_at(local.ip())
        {
            let _ = sockopt::set_tcp_congestion(&socket, name);
        }
        Ok(socket)
    }

    fn open(&self, ip: IpAddr) -> std::result::Result<OwnedFd, Errno> {
        let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        // The buffers' sizes decide on the window scale, so they are set before there is a connection.
        if let Some(bytes) = self.options.send_buffer_bytes {
            sockopt::set_socket_send_buffer_size(&socket, bytes)?;
        }
        if let Some(bytes) = self.options.receive_buffer_bytes {
            sockopt::set_socket_recv_buffer_size(&socket, bytes)?;
        }
        if let Some(name) = self.options.congestion_at(ip) {
            let set = sockopt::set_tcp_congestion(&socket, name);
            // What nobody has asked for is not needed: the host may forbid it.
            if self.options.congestion.is_some() {
                set?;
            }
        }
        Ok(socket)
    }
}

impl Source {
    pub fn data(self) -> EventData {
        EventData::new_u64(match self {
            Source::Listener => 0,
            Source::Timer => 1 << 32,
            Source::Caller(number) => 2 << 32 | u64::from(number),
            Source::Lane(id) => 3 << 32 | u64::from(id),
        })
    }

    pub fn of(data: EventData) -> Self {
        let data = data.u64();
        match data >> 32 {
            0 => Source::Listener,
            1 => Source::Timer,
            2 => Source::Caller(data as u32),
            _ => Source::Lane(data as u32),
        }
    }
}

/// What is asked of epoll for a connection. Edges only: a connection with more to give than one turn takes is
/// remembered by the port, not told of again and again.
pub(crate) fn edges() -> EventFlags {
    EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
}

/// The earliest deadline, as something that epoll can wait for.
pub(crate) struct Timer {
    fd: OwnedFd,
    armed: Option<Instant>,
}

impl Timer {
    pub fn new(epoll: &OwnedFd) -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).map_err(os("timerfd_create"))?;
        epoll::add(epoll, fd.as_fd(), Source::Timer.data(), EventFlags::IN).map_err(os("epoll_ctl"))?;
        Ok(Self { fd, armed: None })
    }

    /// Makes sure that the timer goes off at `deadline`, or earlier.
    pub fn arm(&mut self, deadline: Instant) {
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        // Zero would switch it off.
        let wait = deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let spec = Itimerspec { it_interval: never, it_value };
        rustix::time::timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec)
            .expect("a timer of our own takes any time");
        self.armed = Some(deadline);
    }

    /// Takes note that the timer went off.
    pub fn went_off(&mut self) {
        let mut expirations = [0; 8];
        // It can only say that the timer was armed again meanwhile, and then there is nothing to read.
        let _ = rustix::io::read(&self.fd, &mut expirations);
        self.armed = None;
    }
}

pub(crate) fn os(call: &'static str) -> impl Fn(Errno) -> Error {
    move |code| Error::Os { call, errno: code.raw_os_error() }
}

const BACKLOG: i32 = 1024;
