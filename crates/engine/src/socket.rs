//! The network over real sockets: TCP for control streams, UDP for heartbeats.

mod frames;
mod link;
mod links;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crossdock_transport::Arm;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};

use self::frames::{HEADER_BYTES, STRANGER_FRAME_BYTES};
use self::link::{Link, Stage};
use self::links::Links;
use crate::clock::timespec;
use crate::heart::advertised;
use crate::{
    AddressCheck, Heart, HeartOptions, LinkCause, LinkEvent, LinkId, Network, NetworkError, OsError, Pulse,
    SendError, now_ns,
};

/// Control streams over TCP, in frames of a four-byte length and so many bytes, and heartbeats over UDP.
///
/// Its memory is bounded: by the links, by the send buffer of each, and by what peers have really sent of a frame. A peer
/// that is not [trusted](Network::trust) sends no frame of more than 64 KiB, and its link is one of a few.
#[derive(Debug)]
pub struct SocketNetwork {
    options: SocketOptions,
    address: String,
    listener: TcpListener,
    /// Until when no peer is accepted, if the listener rests.
    resting_until_ns: Option<u64>,
    turned_away: u64,
    links: Links,
    /// Ends a sleep when a deadline of a link has come; and for when it is set.
    timer: OwnedFd,
    timer_ns: Option<u64>,
    heart: Heart,
    scratch: Box<[u8]>,
}

/// How a [`SocketNetwork`] is opened.
#[derive(Clone, Debug)]
pub struct SocketOptions {
    /// Where peers are accepted. Heartbeats are received on the same port; port 0 takes any free one for each.
    pub bind: SocketAddr,
    /// The address that peers are told, if it is not the one of `bind`.
    pub advertise: Option<IpAddr>,
    /// The most links at once, in whatever state. Peers that dial beyond it are turned away.
    pub max_links: usize,
    /// The most links that were accepted and have said nothing yet.
    pub max_silent_links: usize,
    /// The most links that were accepted and are not [trusted](Network::trust) yet, the silent ones included. Each may
    /// hold 64 KiB of a frame.
    pub max_stranger_links: usize,
    /// The most sessions whose heartbeats are watched at once.
    pub max_sessions: usize,
    /// The longest frame, either way.
    pub max_frame_bytes: usize,
    /// How much may be queued on a link: at least one of the longest frames with its header.
    pub send_buffer_bytes: usize,
    /// How long a dialled peer may take to answer.
    pub connect_timeout: Duration,
    /// How long an accepted peer may take to say something.
    pub first_frame_timeout: Duration,
    /// How long a closed link may take to send what is queued.
    pub close_timeout: Duration,
    /// How long sent bytes may stay without an acknowledgement by the peer's kernel before the link is broken.
    pub unacknowledged_timeout: Duration,
}

impl SocketOptions {
    /// Limits that suit a few thousand peers.
    pub fn new(bind: SocketAddr) -> Self {
        Self {
            bind,
            advertise: None,
            max_links: 4096,
            max_silent_links: 64,
            max_stranger_links: 256,
            max_sessions: 2048,
            max_frame_bytes: 1 << 20,
            send_buffer_bytes: 4 << 20,
            connect_timeout: Duration::from_secs(3),
            first_frame_timeout: Duration::from_secs(3),
            close_timeout: Duration::from_secs(2),
            unacknowledged_timeout: Duration::from_secs(20),
        }
    }

    fn check(&self) -> Result<(), NetworkError> {
        let bad = |option, reason| Err(NetworkError::BadOption { option, reason });
        if self.max_links == 0 || self.max_links > u32::MAX as usize / 2 {
            return bad("max_links", "at least 1 and fewer than the link numbers");
        }
        if self.max_silent_links == 0 {
            return bad("max_silent_links", "at least 1: every accepted peer is silent at first");
        }
        if self.max_stranger_links == 0 {
            return bad("max_stranger_links", "at least 1: every accepted peer is a stranger at first");
        }
        if self.max_frame_bytes > u32::MAX as usize {
            return bad("max_frame_bytes", "at most what four bytes of length can say");
        }
        if self.send_buffer_bytes < self.max_frame_bytes.saturating_add(HEADER_BYTES) {
            return bad("send_buffer_bytes", "at least max_frame_bytes and 4 more");
        }
        if self.unacknowledged_timeout.as_millis() == 0 || self.unacknowledged_timeout.as_millis() > 1 << 31 {
            return bad("unacknowledged_timeout", "from a millisecond to 24 days");
        }
        Ok(())
    }
}

/// What an epoll event is about, where it is not a link.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// The bounds of one poll.
const EVENTS_AT_ONCE: usize = 64;
const ACCEPTED_AT_ONCE: usize = 32;
const READ_AT_ONCE_BYTES: usize = 64 << 10;
const READ_PER_POLL_BYTES: usize = 1 << 20;

/// All nodes of a cluster may dial at the same moment; the kernel keeps so many that are not accepted yet.
const BACKLOG: i32 = 1024;

/// How long the listener rests when the process is out of descriptors, and how long a silent link is safe from
/// being closed in favour of a newer one.
const REST_NS: u64 = 100_000_000;

/// How long a stranger that has spoken is safe from being closed in favour of a newer one: many times a handshake.
const STRANGER_GRACE_NS: u64 = 500_000_000;

const _: () =
    assert!(READ_AT_ONCE_BYTES <= STRANGER_FRAME_BYTES, "one read holds no more than one long frame");

impl SocketNetwork {
    /// Binds the sockets and starts the heart.
    pub fn open(options: SocketOptions) -> Result<Self, NetworkError> {
        options.check()?;
        let io =
            |call| move |error: std::io::Error| OsError { call, errno: error.raw_os_error().unwrap_or(0) };
        let listener = TcpListener::bind(options.bind).map_err(io("bind"))?;
        listener.set_nonblocking(true).map_err(io("fcntl"))?;
        rustix::net::listen(&listener, BACKLOG).map_err(OsError::of("listen"))?;
        let bound = listener.local_addr().map_err(io("getsockname"))?;
        let address = advertised("bind", bound, options.advertise)?;
        let heart = Heart::open(&HeartOptions {
            bind: options.bind,
            advertise: options.advertise,
            max_sessions: options.max_sessions,
        })?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )
        .map_err(OsError::of("timerfd_create"))?;
        let links = Links::new(&options)?;
        for (descriptor, about) in [(listener.as_fd(), LISTENER), (timer.as_fd(), TIMER)] {
            let data = epoll::EventData::new_u64(about);
            epoll::add(links.epoll(), descriptor, data, epoll::EventFlags::IN)
                .map_err(OsError::of("epoll_ctl"))?;
        }
        Ok(Self {
            options,
            address,
            listener,
            resting_until_ns: None,
            turned_away: 0,
            links,
            timer,
            timer_ns: None,
            heart,
            scratch: vec![0; READ_AT_ONCE_BYTES].into(),
        })
    }

    /// How many links there are, in whatever state.
    pub fn links(&self) -> usize {
        self.links.len()
    }

    /// How many peers were accepted and closed at once because there were too many links.
    pub fn turned_away(&self) -> u64 {
        self.turned_away
    }

    /// The heartbeats, for what they tell beyond [`Network::heard_ns`].
    pub fn heart(&self) -> &Heart {
        &self.heart
    }

    /// Accepts who has dialled; a bounded number at once.
    fn accept(&mut self, now: u64, take: &mut dyn FnMut(LinkEvent<'_>)) {
        for _ in 0..ACCEPTED_AT_ONCE {
            let crowded = self.links.silent() >= self.options.max_silent_links;
            if crowded && let Err(until_ns) = self.links.drop_silent(now, REST_NS, &mut self.scratch, take) {
                self.rest_until(until_ns);
                return;
            }
            let strange = self.links.strangers() >= self.options.max_stranger_links;
            if strange
                && let Err(until_ns) =
                    self.links.drop_stranger(now, STRANGER_GRACE_NS, &mut self.scratch, take)
            {
                self.rest_until(until_ns);
                return;
            }
            let stream = match rustix::net::accept_with(
                &self.listener,
                SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            ) {
                Ok(stream) => stream,
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    // The waiting peer stays in the backlog, and the listener readable: without a rest this
                    // would spin until somebody closes a descriptor.
                    self.rest_until(now + REST_NS);
                    return;
                }
                // The peer has gone already, or the error is one of its connection.
                Err(_) => continue,
            };
            if self.links.len() >= self.options.max_links {
                self.turned_away += 1;
                continue;
            }
            if self.prepare(&stream).is_err() {
                continue;
            }
            let link = Link::new(stream, Stage::Open, &self.options);
            if let Ok(id) = self.links.insert(link) {
                self.links.expect_first_frame(id, now, self.options.first_frame_timeout);
                take(LinkEvent::Accepted { link: id });
            }
            if crowded || strange {
                // Another one makes room only if somebody else waits, which epoll says next time.
                return;
            }
        }
    }

    fn prepare(&self, stream: &OwnedFd) -> Result<(), OsError> {
        let unacknowledged_ms = self.options.unacknowledged_timeout.as_millis() as u32;
        rustix::net::sockopt::set_tcp_nodelay(stream, true)
            .and_then(|()| rustix::net::sockopt::set_tcp_user_timeout(stream, unacknowledged_ms))
            .map_err(OsError::of("setsockopt"))
    }

    fn rest_until(&mut self, until_ns: u64) {
        self.listen_for(epoll::EventFlags::empty());
        self.resting_until_ns = Some(until_ns);
    }

    fn end_rest(&mut self, now: u64) {
        if self.resting_until_ns.is_some_and(|until| until <= now) {
            self.listen_for(epoll::EventFlags::IN);
            self.resting_until_ns = None;
        }
    }

    fn listen_for(&self, flags: epoll::EventFlags) {
        epoll::modify(self.links.epoll(), &self.listener, epoll::EventData::new_u64(LISTENER), flags)
            .expect("the listener is registered from the beginning to the end");
    }

    /// Sets the timer to the next deadline, if it stands at another time.
    fn set_timer(&mut self) {
        let deadlines = [self.links.next_deadline_ns(), self.resting_until_ns];
        let next_ns = deadlines.into_iter().flatten().min();
        if next_ns != self.timer_ns {
            // All zeroes stop it.
            let it_value = timespec(next_ns.unwrap_or(0));
            let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
            rustix::time::timerfd_settime(
                &self.timer,
                TimerfdTimerFlags::ABSTIME,
                &Itimerspec { it_interval, it_value },
            )
            .expect("a timer takes every time that the clock can show");
            self.timer_ns = next_ns;
        }
    }
}

/// Names are not resolved: a resolver blocks.
fn dialed(address: &str) -> Result<SocketAddr, &'static str> {
    match address.parse::<SocketAddr>() {
        Ok(peer) if peer.port() == 0 => Err("nobody listens at port 0"),
        Ok(peer) => Ok(peer),
        Err(_) => Err("not an IP address and a port, as in 10.0.0.1:7000"),
    }
}

impl Network for SocketNetwork {
    fn address(&self) -> &str {
        &self.address
    }

    fn address_check(&self) -> AddressCheck {
        |address| dialed(address).map(drop)
    }

    fn dial(&mut self, address: &str) -> Result<LinkId, NetworkError> {
        let bad = |reason| NetworkError::BadAddress { address: address.into(), reason };
        let peer = dialed(address).map_err(bad)?;
        if self.links.len() >= self.options.max_links {
            return Err(NetworkError::Limit { what: "links", limit: self.options.max_links as u64 });
        }
        let family = if peer.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let stream = rustix::net::socket_with(
            family,
            SocketType::STREAM,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )
        .map_err(OsError::of("socket"))?;
        self.prepare(&stream)?;
        let stage = match rustix::net::connect(&stream, &peer) {
            // A connection that is made at once is reported like one that takes its time.
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Stage::Connecting,
            Err(errno) => {
                Stage::Ended { cause: LinkCause::Broken { call: "connect", errno: errno.raw_os_error() } }
            }
        };
        let id = self.links.insert(Link::new(stream, stage, &self.options))?;
        self.links.expect_answer(id, now_ns(), self.options.connect_timeout);
        Ok(id)
    }

    fn trust(&mut self, link: LinkId) {
        self.links.trust(link);
    }

    fn send(&mut self, link: LinkId, frame: &[u8]) -> Result<(), SendError> {
        let limit = self.options.max_frame_bytes;
        if frame.len() > limit {
            return Err(SendError::TooLong { bytes: frame.len(), limit });
        }
        self.links.send(link, frame)
    }

    fn flush(&mut self) {
        self.links.flush();
    }

    fn close(&mut self, link: LinkId) {
        self.links.close(link, self.options.close_timeout);
    }

    fn poll(&mut self, take: &mut dyn FnMut(LinkEvent<'_>)) {
        let now = now_ns();
        self.links.flush();
        self.end_rest(now);
        let no_event = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut ready = [no_event; EVENTS_AT_ONCE];
        let count = match epoll::wait(self.links.epoll(), &mut ready, Some(&timespec(0))) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            // Somebody has closed descriptors that are not his. Whatever is done with them now is done to a
            // stranger's file.
            Err(errno) => panic!("epoll_wait on a descriptor of this process: {errno}"),
        };
        let mut budget_bytes = READ_PER_POLL_BYTES;
        for event in &ready[..count] {
            let (flags, data) = (event.flags, event.data);
            match data.u64() {
                LISTENER => self.accept(now, take),
                TIMER => {
                    // Read for its side effect: a timer that was read is not readable until its next time.
                    let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                    self.timer_ns = None;
                }
                // What is left for the next poll is still readable then.
                _ if budget_bytes == 0 => break,
                link => self.links.turn(link as u32, flags, &mut self.scratch, &mut budget_bytes, take),
            }
        }
        self.links.expire(now, &mut self.scratch, take);
        self.links.say_ended(&mut self.scratch, &mut budget_bytes, take);
    }

    fn arm(&mut self) -> Arm<'_> {
        self.links.flush();
        if self.links.has_ended() {
            return Arm::Ready;
        }
        self.set_timer();
        Arm::Sleep(self.links.epoll())
    }

    fn pulse_address(&self) -> &str {
        self.heart.address()
    }

    fn watch(&mut self, session: u32, pulse: Pulse) -> Result<(), NetworkError> {
        self.heart.watch(session, &pulse)
    }

    fn unwatch(&mut self, session: u32) {
        self.heart.unwatch(session);
    }

    fn heard_ns(&self, session: u32) -> Option<u64> {
        self.heart.heard_ns(session)
    }

    fn listened_ns(&self) -> u64 {
        self.heart.listened_ns()
    }
}
