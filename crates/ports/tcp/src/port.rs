//! The port itself: what its owner calls.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crossdock_memory::Memory;
use crossdock_transport::{
    Arm, Attached, DownCause, Error, Events, Fence, Grant, GrantId, GrantTable, LaneAddress, LaneId,
    LaneTags, LocalId, Op, PeerId, Port, PortInfo, Posted, RemoteId, RemoteKey, Result, Slab,
    require_host_memory,
};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::address::{End, Key};
use crate::connection::{AttachedRegion, Connection};
use crate::domain::{Counters, Domain};
use crate::frame::Hello;
use crate::greeting::{Appointment, Caller, Dial};
use crate::hot::Hot;
use crate::lane::{After, Lane, State};
use crate::options::TcpOptions;
use crate::send::{PostShare, Taken};
use crate::socket::{Sockets, Source, Timer, edges, os};

/// A port over TCP. See the [crate's page](crate) for what it promises.
pub struct TcpPort {
    info: PortInfo,
    sockets: Sockets,
    connect_timeout: Duration,
    close_timeout: Duration,
    /// Where peers dial.
    address: SocketAddr,
    /// Told in each key and in each greeting: a key of another port, or of an earlier one at the same address, is
    /// recognised.
    nonce: u64,
    domain: Domain,
    lanes: Slab<Lane>,
    /// Lanes that want a turn, each once.
    ready: VecDeque<u32>,
    hot: Hot,
    callers: Vec<Caller>,
    callers_numbered: u32,
    listener: OwnedFd,
    /// When to listen again, after the system could not give us another descriptor.
    listen_again: Option<Instant>,
    timer: Timer,
    epoll: OwnedFd,
}

impl TcpPort {
    /// Opens a port: it listens from now on.
    pub fn open(options: TcpOptions) -> Result<Self> {
        options.check()?;
        let options = options.clamped();
        let ip = options.reachable_ip()?;
        let sockets = Sockets::new(&options);
        let (listener, bound) = sockets.listen(options.bind)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("epoll_create1"))?;
        epoll::add(&epoll, &listener, Source::Listener.data(), EventFlags::IN).map_err(os("epoll_ctl"))?;
        let timer = Timer::new(&epoll)?;
        Ok(Self {
            info: PortInfo {
                kind: "tcp",
                name: options.name,
                reach: options.reach,
                numa_node: None,
                bytes_per_second: options.bytes_per_second,
                ordered: true,
                // Bounded by the kernel's buffers alone, and those are counted in bytes.
                immediates_in_flight: u32::MAX,
            },
            sockets,
            connect_timeout: options.connect_timeout,
            close_timeout: options.close_timeout,
            address: SocketAddr::new(ip, bound.port()),
            nonce: u64::from_ne_bytes(random()?),
            domain: Domain {
                regions: Slab::new(options.max_regions),
                grants: GrantTable::new(),
                counters: Counters::default(),
                send_queue_bytes: options.send_queue_bytes.max(1),
                room_made: false,
            },
            lanes: Slab::new(options.max_lanes),
            ready: VecDeque::with_capacity(options.max_lanes as usize),
            hot: Hot::new(),
            callers: Vec::with_capacity(CALLERS_MAX),
            callers_numbered: 0,
            listener,
            listen_again: None,
            timer,
            epoll,
        })
    }

    /// Where peers dial.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What this port has done so far.
    pub fn counters(&self) -> Counters {
        self.domain.counters
    }

    /// Puts a lane into the queue of those that want a turn.
    fn enqueue(ready: &mut VecDeque<u32>, lane: &mut Lane) {
        if !std::mem::replace(&mut lane.queued, true) {
            ready.push_back(lane.id.0);
        }
    }

    /// Gives a turn to the lane that is the likeliest to have something to read, if there is one.
    fn try_hot_lane(&mut self) -> bool {
        let Some(lane) = self.hot.guess().and_then(|id| self.lanes.get_mut(id)) else { return false };
        let State::Up(connection) = &mut lane.state else { return false };
        connection.readable = true;
        Self::enqueue(&mut self.ready, lane);
        true
    }

    /// Asks the kernel what has happened.
    fn hear(&mut self) {
        let mut space = [const { MaybeUninit::uninit() }; HEARD_MAX];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // It fails only when a signal comes in between; the next poll asks again.
        let Ok((heard, _)) = epoll::wait(&self.epoll, &mut space[..], Some(&now)) else { return };
        for event in heard {
            let flags = event.flags;
            match Source::of(event.data) {
                Source::Listener => self.accept(),
                Source::Timer => self.expire(),
                Source::Caller(number) => self.listen_to(number),
                Source::Lane(id) => self.wake(id, flags),
            }
        }
    }

    fn wake(&mut self, id: u32, flags: EventFlags) {
        // A lane may have been removed after the kernel had noted this event.
        let Some(lane) = self.lanes.get_mut(id) else { return };
        let ended = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        if let State::Up(connection) | State::Closing { connection, .. } = &mut lane.state {
            connection.readable |= flags.intersects(EventFlags::IN | ended);
            connection.end_may_wait |= flags.intersects(ended);
            connection.writable |= flags.contains(EventFlags::OUT);
        }
        Self::enqueue(&mut self.ready, lane);
    }

    /// Takes connections that came in; which lane they are for, they have to say.
    fn accept(&mut self) {
        for _ in 0..ACCEPTED_MAX {
            match self.sockets.accept(&self.listener) {
                Ok(socket) => self.welcome(socket),
                Err(Errno::AGAIN) => return,
                // The caller has gone away again.
                Err(Errno::CONNABORTED | Errno::INTR | Errno::INVAL) => {}
                Err(_) => {
                    // No descriptor or no memory: the connection waits in the backlog, and would wake us for ever.
                    let again = Instant::now() + LISTEN_PAUSE;
                    self.listen_again = Some(again);
                    self.listen(EventFlags::empty());
                    self.timer.arm(again);
                    return;
                }
            }
        }
    }

    fn listen(&self, flags: EventFlags) {
        epoll::modify(&self.epoll, &self.listener, Source::Listener.data(), flags)
            .expect("the listener is registered as long as the port lives");
    }

    fn welcome(&mut self, socket: OwnedFd) {
        if self.callers.len() == CALLERS_MAX {
            // An honest caller speaks at once, so the oldest is the least likely to be one.
            self.callers.remove(0);
            self.domain.counters.connections_refused += 1;
        }
        self.callers_numbered = self.callers_numbered.wrapping_add(1);
        let number = self.callers_numbered;
        let deadline = Instant::now() + self.connect_timeout;
        if epoll::add(&self.epoll, &socket, Source::Caller(number).data(), edges()).is_err() {
            self.domain.counters.connections_refused += 1;
            return;
        }
        self.timer.arm(deadline);
        self.callers.push(Caller::new(socket, number, deadline));
    }

    fn listen_to(&mut self, number: u32) {
        let Some(at) = self.callers.iter().position(|caller| caller.number == number) else { return };
        match self.callers[at].advance() {
            Ok(None) => {}
            Ok(Some(hello)) => {
                let socket = self.callers.remove(at).socket;
                self.admit(socket, hello);
            }
            Err(_) => {
                self.callers.remove(at);
                self.domain.counters.connections_refused += 1;
            }
        }
    }

    /// Gives a connection that came in to the lane that it asks for.
    fn admit(&mut self, socket: OwnedFd, hello: Hello) {
        let lane = self.lanes.iter_mut().map(|(_, lane)| lane).find(|lane| lane.cookie == hello.to);
        match lane {
            Some(lane) if hello.welcome => match &mut lane.state {
                State::Open { early: early @ None } => *early = Some((socket, hello)),
                State::Waiting(appointment) if appointment.theirs == hello.from => {
                    lane.state = meet(&self.epoll, lane.id, lane.peer, appointment, socket, &hello);
                    Self::enqueue(&mut self.ready, lane);
                }
                _ => self.domain.counters.connections_refused += 1,
            },
            _ => self.domain.counters.connections_refused += 1,
        }
    }

    /// Lets go of everything whose time is over.
    fn expire(&mut self) {
        self.timer.went_off();
        let now = Instant::now();
        if self.listen_again.take_if(|again| *again <= now).is_some() {
            self.listen(EventFlags::IN);
        }
        let callers = self.callers.len();
        self.callers.retain(|caller| caller.deadline > now);
        self.domain.counters.connections_refused += (callers - self.callers.len()) as u64;
        let mut next = self.listen_again;
        let mut sooner = |deadline: Instant| next = Some(next.map_or(deadline, |next| next.min(deadline)));
        self.callers.iter().for_each(|caller| sooner(caller.deadline));
        let mut over = Vec::new();
        for (id, lane) in self.lanes.iter_mut() {
            match lane.deadline() {
                Some(deadline) if deadline > now => sooner(deadline),
                Some(_) => match lane.expire() {
                    After::Remove => over.push(id),
                    After::Again => Self::enqueue(&mut self.ready, lane),
                    After::Sleep => {}
                },
                None => {}
            }
        }
        for id in over {
            self.lanes.remove(id);
        }
        if let Some(next) = next {
            self.timer.arm(next);
        }
    }

    /// Makes a place for a lane, if only lanes that nobody speaks of any more are in the way.
    fn make_place(&mut self) -> Option<u32> {
        let lingering = self
            .lanes
            .iter()
            .find(|(_, lane)| matches!(lane.state, State::Lingering { .. }))
            .map(|(id, _)| id)?;
        self.lanes.remove(lingering);
        Some(lingering)
    }
}

impl Port for TcpPort {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        require_host_memory(memory)?;
        let id = self.domain.regions.insert(memory.clone());
        let region = LocalId(id.ok_or(self.domain.regions.full("regions"))?);
        let key = Key { region, bytes: memory.bytes() as u64, nonce: self.nonce };
        Ok((region, key.encode()))
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        if self.domain.grants.uses(region) {
            return Err(Error::RegionInUse { by: "a grant" });
        }
        if self.lanes.iter().filter_map(|(_, lane)| lane.connection()).any(|lane| lane.uses(region)) {
            return Err(Error::RegionInUse { by: "an op" });
        }
        let removed = self.domain.regions.remove(region.0);
        removed.map(drop).ok_or(Error::UnknownRegion { side: "local", region: region.0 })
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        let cookie = random()?;
        let lane = || Lane { id: LaneId(0), peer, cookie, state: State::Open { early: None }, queued: false };
        let mut id = self.lanes.insert(lane());
        if id.is_none() && self.make_place().is_some() {
            id = self.lanes.insert(lane());
        }
        let id = LaneId(id.ok_or(self.lanes.full("lanes"))?);
        self.lanes.get_mut(id.0).expect("it was just added").id = id;
        Ok((id, End { socket: self.address, cookie }.encode()))
    }

    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        let remote = End::decode(remote)?;
        let found = find(&mut self.lanes, lane)?;
        let early = match &mut found.state {
            State::Open { early } => early.take(),
            State::Waiting(_) | State::Dialing(_) | State::Up(_) => {
                return Err(Error::Unsupported {
                    what: "connecting a lane twice",
                    advice: "open another lane",
                });
            }
            State::Closing { .. } | State::Ended(_) | State::Lingering { .. } => {
                return Err(Error::LaneDown { lane });
            }
        };
        if remote.cookie == found.cookie {
            return Err(Error::BadAddress { reason: "a lane cannot be connected to itself" });
        }
        let deadline = Instant::now() + self.connect_timeout;
        self.timer.arm(deadline);
        let appointment = Appointment {
            ours: found.cookie,
            theirs: remote.cookie,
            tags: *tags,
            nonce: self.nonce,
            deadline,
        };
        // Both ends know both cookies, so both know without a word which of them dials.
        found.state = if found.cookie < remote.cookie {
            let dialled = self.sockets.dial(remote.socket).and_then(|socket| {
                epoll::add(&self.epoll, &socket, Source::Lane(lane.0).data(), edges())?;
                Ok(socket)
            });
            match dialled {
                Ok(socket) => State::Dialing(Box::new(Dial::new(socket, appointment))),
                Err(code) => State::Ended(DownCause::Broken { call: "connect", errno: code.raw_os_error() }),
            }
        } else {
            match early {
                Some((socket, hello)) if hello.from == remote.cookie => {
                    meet(&self.epoll, lane, found.peer, &appointment, socket, &hello)
                }
                _ => State::Waiting(Box::new(appointment)),
            }
        };
        Self::enqueue(&mut self.ready, found);
        Ok(())
    }

    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached> {
        let key = Key::decode(key)?;
        let connection = find(&mut self.lanes, lane)?.connected()?;
        if key.nonce != connection.peer_nonce {
            return Err(Error::BadKey { reason: "it is of another port than the lane's peer" });
        }
        let region = AttachedRegion { region: key.region.0, bytes: key.bytes };
        let known = connection.attached.iter().position(|attached| *attached == region);
        let at = match known {
            Some(at) => at,
            None if connection.attached.len() == ATTACHED_MAX => {
                return Err(Error::Limit { what: "attached regions of a lane", limit: ATTACHED_MAX as u64 });
            }
            None => {
                connection.attached.push(region);
                connection.attached.len() - 1
            }
        };
        Ok(Attached { id: RemoteId(at as u32), bytes: key.bytes, mapping: None })
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        let regions = &self.domain.regions;
        self.domain.grants.insert(grant, |region| regions.get(region.0).map(|memory| memory.bytes() as u64))
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        if self.domain.grants.remove(grant) {
            for (_, lane) in self.lanes.iter_mut() {
                let ended = match &mut lane.state {
                    State::Up(connection) => connection.revoke(grant, &mut self.domain.counters).err(),
                    State::Closing { connection, .. } => connection
                        .revoke(grant, &mut self.domain.counters)
                        .err()
                        .map(|_| DownCause::ClosedHere),
                    _ => None,
                };
                if let Some(cause) = ended {
                    lane.state = State::Ended(cause);
                    Self::enqueue(&mut self.ready, lane);
                }
            }
        }
        Fence::Now
    }

    fn close(&mut self, lane: LaneId) {
        let Some(found) = self.lanes.get_mut(lane.0) else { return };
        found.state = match std::mem::replace(&mut found.state, State::Ended(DownCause::ClosedHere)) {
            State::Open { .. } | State::Waiting(_) | State::Dialing(_) => State::Ended(DownCause::ClosedHere),
            State::Up(mut connection) => {
                let deadline = Instant::now() + self.close_timeout;
                self.timer.arm(deadline);
                connection.begin_close();
                State::Closing { connection, deadline }
            }
            unchanged => unchanged,
        };
        Self::enqueue(&mut self.ready, found);
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        let found = find(&mut self.lanes, lane)?;
        let connection = found.connected()?;
        let domain = &mut self.domain;
        let mut posted = Posted::default();
        let mut share = PostShare::new();
        for op in ops {
            match connection.take(op, &mut share, domain) {
                Ok(Taken::Whole) => posted.ops += 1,
                Ok(Taken::Within(within)) => {
                    posted.within = within;
                    break;
                }
                Err(error) if posted.ops == 0 => return Err(error),
                Err(_) => break,
            }
        }
        connection.flush(domain);
        connection.came_short = posted.ops < ops.len();
        if connection.wants_turn() {
            Self::enqueue(&mut self.ready, found);
        }
        Ok(posted)
    }

    fn poll(&mut self, events: &mut Events) {
        if !self.try_hot_lane() {
            self.hear();
        }
        for _ in 0..self.ready.len() {
            if events.is_full() {
                return;
            }
            let id = self.ready.pop_front().expect("one for each turn of the loop");
            let Some(lane) = self.lanes.get_mut(id) else { continue };
            lane.queued = false;
            let received_before = self.domain.counters.bytes_received;
            let after = lane.turn(&mut self.domain, events);
            self.hot.note(id, self.domain.counters.bytes_received > received_before);
            match after {
                After::Sleep => {}
                After::Again => Self::enqueue(&mut self.ready, lane),
                After::Remove => drop(self.lanes.remove(id)),
            }
        }
    }

    fn arm(&mut self) -> Arm<'_> {
        // Room is told once: whether its owner has still something to post is not known here.
        let room_made = std::mem::take(&mut self.domain.room_made);
        if !self.ready.is_empty() || room_made {
            return Arm::Ready;
        }
        self.hot.ask_next();
        Arm::Sleep(self.epoll.as_fd())
    }
}

fn find(lanes: &mut Slab<Lane>, lane: LaneId) -> Result<&mut Lane> {
    let spent = lanes.is_spent(lane.0);
    match lanes.get_mut(lane.0) {
        Some(found) => Ok(found),
        None if spent => Err(Error::LaneDown { lane }),
        None => Err(Error::UnknownLane { lane }),
    }
}

/// What becomes of a waiting lane when the other end has dialled.
fn meet(
    epoll: &OwnedFd,
    lane: LaneId,
    peer: PeerId,
    appointment: &Appointment,
    socket: OwnedFd,
    hello: &Hello,
) -> State {
    if let Err(cause) = appointment.answer(&socket, hello) {
        return State::Ended(cause);
    }
    match epoll::modify(epoll, &socket, Source::Lane(lane.0).data(), edges()) {
        Ok(()) => State::Up(Connection::new(lane, peer, socket, hello)),
        Err(code) => State::Ended(DownCause::Broken { call: "epoll_ctl", errno: code.raw_os_error() }),
    }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    // The kernel gives up to 256 bytes in one piece.
    getrandom(&mut bytes[..], GetRandomFlags::empty()).map_err(os("getrandom"))?;
    Ok(bytes)
}

/// How many connections may not have said yet which lane they are for.
const CALLERS_MAX: usize = 64;
/// How many connections are taken in one poll.
const ACCEPTED_MAX: usize = 16;
/// How many events of the kernel are taken in one poll.
const HEARD_MAX: usize = 64;
/// How many regions of its peer a lane knows.
const ATTACHED_MAX: usize = 1 << 16;
const LISTEN_PAUSE: Duration = Duration::from_millis(100);
