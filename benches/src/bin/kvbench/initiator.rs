//! The process that measures.

use std::io::BufReader;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

use crossdock::trace::{Scale, TraceLimits, TraceReader};
use crossdock::{Ended, Memory, PageRef, Peer, ReceiveRequest, Received, Receiving, SendRequest, Sending};
use crossdock_benches::bare::{self, End, ThereMemory, Way as Direction};
use crossdock_benches::{Sample, anonymous};
use crossdock_shm::copy::{Copier, CopyThreads, Strategy};
use rustix::process::Pid;

use crate::error::Error;
use crate::latency;
use crate::options::{MemoryName, OpName, Options, PortName};
use crate::process::Process;
use crate::report::{Means, Report};
use crate::setup::{Clock, Lists, Setup, Side, WAIT, allocate, rooms};
use crate::talk::{Answer, Ask, Pass, Ready, Talk};
use crate::target::{SETTLE, delivered};

pub fn run(options: &Options) -> Result<Report, Error> {
    if !(0.0..=3600.0).contains(&options.seconds) {
        return Err(Error::Seconds);
    }
    let setup = Setup::new(options)?;
    let (passes, scale) = passes(options, &setup)?;
    // Before this process has threads and memory that a child would only have to forget.
    let hogs = Process::hogs(options.hog)?;
    let (_peer, address) = match options.connect {
        Some(address) => (None, address),
        None => Process::peer().map(|(peer, address)| (Some(peer), address))?,
    };
    let mut initiator = Initiator::open(&setup, address)?;
    let room_pages = passes[0].first().copied().unwrap_or(0);
    let mut report = Report::new(options, &setup, room_pages, initiator.open_ms, scale);
    if options.pages == Some(1) && options.in_flight == 1 && options.trace.is_none() {
        initiator.measure_latency(options, &mut report)?;
    } else {
        initiator.measure(options, &passes, &hogs, &mut report)?;
    }
    Ok(report)
}

/// The rooms of each pass of a repeat, and the scale of a trace.
fn passes(options: &Options, setup: &Setup) -> Result<(Vec<Vec<u32>>, Option<f64>), Error> {
    let payload_pages = ((options.payload_mib << 20) / setup.slot_bytes()).max(1);
    let too_small = |pages| Err(Error::PoolTooSmall { pages, pool_pages: setup.pool_pages });
    let (passes, scale) = match &options.trace {
        None => {
            let pages = options.pages.map_or(payload_pages.min(LONGEST_ROOM.into()), u64::from);
            let count = (payload_pages / pages).max(options.in_flight.into());
            if pages * count > setup.pool_pages.into() {
                return too_small(pages * count);
            }
            (vec![vec![pages as u32; count as usize]], None)
        }
        Some(_) if options.model.is_none() => return Err(Error::TraceWithoutModel),
        Some(path) => {
            let unreadable =
                |error: &dyn std::fmt::Display| Error::Trace(format!("{}: {error}", path.display()));
            let file = std::fs::File::open(path).map_err(|error| unreadable(&error))?;
            let requests: Result<Vec<_>, _> =
                TraceReader::new(BufReader::new(file), TraceLimits::default()).collect();
            let mut requests = requests.map_err(|error| unreadable(&error))?;
            let token_bytes = setup.token_bytes as f64 * f64::from(setup.layers);
            let bytes = requests.iter().map(|r| f64::from(r.input_tokens) * token_bytes).sum::<f64>();
            let scale = match options.scale {
                Some(factor) => Scale::new(factor)?,
                None => Scale::new((TRACE_BYTES / bytes).min(1.0))?,
            };
            requests.iter_mut().for_each(|request| request.scale_lengths(scale));
            let mut passes = vec![Vec::new()];
            let mut in_pass = 0;
            for request in &requests {
                let pages = request.pages(setup.page_tokens);
                if in_pass + u64::from(pages) > payload_pages && in_pass > 0 {
                    passes.push(Vec::new());
                    in_pass = 0;
                }
                in_pass += u64::from(pages);
                if in_pass > setup.pool_pages.into() {
                    return too_small(in_pass);
                }
                passes.last_mut().expect("there is one").push(pages);
            }
            (passes, Some(scale.factor()))
        }
    };
    match passes.iter().flatten().find(|&&pages| pages > LONGEST_ROOM) {
        Some(&pages) => Err(Error::RoomTooLong { pages, limit: LONGEST_ROOM }),
        None => Ok((passes, scale)),
    }
}

struct Initiator {
    side: Side,
    talk: Talk<Answer>,
    peer: Peer,
    /// The peer's pool, where it can be mapped, and an address in its process.
    mapped: Option<Memory>,
    there: Option<ThereMemory>,
    /// Stands in for a pool of the peer that cannot be mapped, where memory is only copied for comparison.
    scratch: Option<Memory>,
    streams: SocketAddr,
    connections: Vec<TcpStream>,
    copy_threads: CopyThreads,
    rooms: u64,
    seeds: u64,
    open_ms: f64,
}

/// What one way of moving a pass took.
#[derive(Default)]
struct Timed {
    seconds: f64,
    cpu_here_s: f64,
    cpu_there_s: f64,
    room_us: Vec<f64>,
}

/// The ways to move a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ours,
    Memcpy,
    Copied(Strategy),
    /// By the port's own copy threads, all at once.
    CopyThreads,
    /// `process_vm_writev`, many pages a call.
    Batched,
    /// `process_vm_writev`, a call a page.
    Single,
    /// Bare connections.
    Stream,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Ours => "crossdock",
            Way::Memcpy => "memcpy",
            Way::Copied(Strategy::Streamed) => "streaming copy",
            Way::Copied(Strategy::Cached) => "cached copy",
            Way::CopyThreads => "copy threads",
            Way::Batched => "process_vm, batched",
            Way::Single => "process_vm, a page a call",
            Way::Stream => "bare tcp",
        }
    }
}

impl Initiator {
    fn open(setup: &Setup, address: SocketAddr) -> Result<Self, Error> {
        let stream = TcpStream::connect(address).map_err(Error::io("connecting to the peer"))?;
        let mut talk = Talk::new(stream).map_err(Error::io("talking"))?;
        talk.say(&Ask::Setup(Box::new(setup.clone())))?;
        let memory = allocate(setup)?;
        let ready = match wait_for(&talk)? {
            Answer::Ready(ready) => *ready,
            other => return Err(unexpected(other)),
        };
        let ip = talk.local_ip().map_err(Error::io("talking"))?;
        let peer_ip = talk.peer_ip().map_err(Error::io("talking"))?;
        let begin = Instant::now();
        let mut side = Side::open("kvbench", setup.clone(), memory, ip)?;
        talk.say(&Ask::Meet { node: side.driver.node().identity().node })?;
        let (peer, mut up) = side.driver.handle().connect(&ready.address)?;
        let met = side.driver.until("meeting the peer", WAIT, || Ok(up.poll()?))?;
        met.map_err(Error::Session)?;
        let open_ms = begin.elapsed().as_secs_f64() * 1e3;
        let (mapped, there) = theirs(setup, &ready, side.memory.bytes(), peer_ip)?;
        let scratch = match mapped {
            Some(_) => None,
            None => Some(anonymous(side.memory.bytes()).map_err(Error::io("allocating memory"))?),
        };
        let helpers = setup.copy_threads as usize - 1;
        let copy_threads =
            CopyThreads::start(Copier::detect(), helpers).map_err(Error::io("starting copy threads"))?;
        let streams = SocketAddr::new(peer_ip, ready.stream_port);
        let connections = Vec::new();
        let (rooms, seeds) = (1, 1);
        Ok(Self {
            side,
            talk,
            peer,
            mapped,
            there,
            scratch,
            streams,
            connections,
            copy_threads,
            rooms,
            seeds,
            open_ms,
        })
    }

    fn measure(
        &mut self,
        options: &Options,
        passes: &[Vec<u32>],
        hogs: &[Process],
        report: &mut Report,
    ) -> Result<(), Error> {
        let ways = self.ways();
        let mut means: Vec<Means> = ways.iter().map(|way| Means::new(way.name())).collect();
        let mut hogged = Sample::default();
        self.warm_up(&ways)?;
        for repeat in 0..options.repeats as usize {
            let mut sums: Vec<(u64, Timed)> = ways.iter().map(|_| Default::default()).collect();
            let mut at = 0;
            // All groups of a trace, and as often as the asked time needs.
            while at < passes.len() || sums[0].1.seconds < options.seconds {
                let rooms = &passes[at % passes.len()];
                for turn in 0..ways.len() {
                    // Nobody always follows the same other.
                    let which = (turn + repeat) % ways.len();
                    let pass = self.next_pass(rooms.clone());
                    let timed = self.one(options, ways[which], &pass, report)?;
                    let (bytes, sum) = &mut sums[which];
                    *bytes += u64::from(pass.pages()) * self.side.setup.slot_bytes();
                    sum.seconds += timed.seconds;
                    sum.cpu_here_s += timed.cpu_here_s;
                    sum.cpu_there_s += timed.cpu_there_s;
                    report.room_us.extend(timed.room_us);
                }
                at += 1;
            }
            for (means, (bytes, sum)) in means.iter_mut().zip(&sums) {
                means.add(*bytes, sum.seconds, sum.cpu_here_s, sum.cpu_there_s);
            }
            if !hogs.is_empty() {
                let pass = self.next_pass(passes[0].clone());
                hogs.iter().for_each(|hog| hog.let_run(true));
                let timed = self.one(options, Way::Ours, &pass, report);
                hogs.iter().for_each(|hog| hog.let_run(false));
                let bytes = u64::from(pass.pages()) * self.side.setup.slot_bytes();
                hogged.push(bytes as f64 / timed?.seconds / 1e9);
            }
        }
        report.rooms_a_pass = passes[0].len();
        report.take(means, hogged);
        Ok(())
    }

    /// Fills, moves and, if asked, checks one pass.
    fn one(&mut self, options: &Options, way: Way, pass: &Pass, report: &mut Report) -> Result<Timed, Error> {
        let lists = self.side.setup.lists(pass);
        match self.side.setup.op {
            OpName::Write => self.side.setup.content(pass.salt).write(&self.side.memory, &lists.from),
            OpName::Read => self.ask(&Ask::Fill(pass.clone())).map(drop)?,
        }
        let timed = self.run(way, pass, &lists, options.in_flight as usize)?;
        if options.verify && way.arrives_at_the_peer() {
            let wrong = match self.side.setup.op {
                OpName::Write => match self.ask(&Ask::Check(pass.clone()))? {
                    Answer::Checked { wrong_pages } => wrong_pages,
                    other => return Err(unexpected(other)),
                },
                OpName::Read => {
                    let content = self.side.setup.content(pass.salt);
                    content.check(&self.side.memory, &lists.from, &lists.to).pages
                }
            };
            report.wrong_pages += wrong;
        }
        Ok(timed)
    }

    fn run(&mut self, way: Way, pass: &Pass, lists: &Lists, in_flight: usize) -> Result<Timed, Error> {
        let write = self.side.setup.op == OpName::Write;
        let threads = self.side.setup.copy_threads as usize;
        let pages = self.side.setup.pages(lists);
        if !matches!(way, Way::Ours | Way::Stream) {
            // As long a rest after the source was written as the other ways need to set up.
            std::thread::sleep(SETTLE);
        }
        let here = &self.side.memory;
        match way {
            Way::Ours => self.move_rooms(pass, lists, in_flight),
            Way::Stream => self.stream(pass, lists),
            Way::Memcpy | Way::Copied(_) | Way::CopyThreads => {
                let there = self.mapped.as_ref().or(self.scratch.as_ref()).expect("there is one of them");
                let (source, target) = if write { (here, there) } else { (there, here) };
                let clock = Clock::start();
                match way {
                    Way::Copied(strategy) => {
                        bare::copy(Copier::detect().force(strategy), source, target, pages, threads);
                    }
                    Way::CopyThreads => bare::copy_shared(&mut self.copy_threads, source, target, pages),
                    _ => bare::memcpy(source, target, pages, threads),
                }
                Ok(Timed { seconds: clock.seconds(), cpu_here_s: clock.cpu_s(), ..Timed::default() })
            }
            Way::Batched | Way::Single => {
                let there = self.there.expect("these ways are only for memory of a process on this host");
                let direction = if write { Direction::Write } else { Direction::Read };
                let pages_a_call = if way == Way::Single { 1 } else { usize::MAX };
                let clock = Clock::start();
                bare::process_memory(here, there, direction, pages, pages_a_call)
                    .map_err(Error::io("process_vm"))?;
                Ok(Timed { seconds: clock.seconds(), cpu_here_s: clock.cpu_s(), ..Timed::default() })
            }
        }
    }

    /// A pass through the library.
    fn move_rooms(&mut self, pass: &Pass, lists: &Lists, in_flight: usize) -> Result<Timed, Error> {
        let write = self.side.setup.op == OpName::Write;
        let mut waiting = Vec::with_capacity(pass.rooms.len());
        for (room, pages) in rooms(pass, if write { &lists.from } else { &lists.to }) {
            let tokens = self.side.setup.tokens(pages.len() as u32);
            let pages = self.side.adopt(pages)?;
            let handle = self.side.driver.handle();
            waiting.push(match write {
                true => {
                    let pages = pages.share();
                    let request =
                        SendRequest { room, use_count: 0, tokens, pages: pages.clone(), deadline: WAIT };
                    Moving::Sending { room, sending: handle.open(request)?, _pages: pages }
                }
                false => Moving::Wanted(Some(ReceiveRequest {
                    peer: self.peer,
                    room,
                    use_count: 0,
                    tokens,
                    skip_tokens: 0,
                    pages,
                    deadline: WAIT,
                })),
            });
        }
        self.ask(&Ask::Open(pass.clone()))?;
        self.side.driver.settle(SETTLE)?;
        self.talk.say(&Ask::Go)?;

        let mut waiting = waiting.into_iter();
        let mut moving: Vec<(Instant, Moving)> = Vec::with_capacity(in_flight);
        let mut room_us = Vec::with_capacity(pass.rooms.len());
        let mut kept = Vec::new();
        let layers = self.side.setup.layers;
        let clock = Clock::start();
        for mut room in waiting.by_ref().take(in_flight) {
            let begin = Instant::now();
            room.begin(&self.side, layers)?;
            moving.push((begin, room));
        }
        while !moving.is_empty() {
            let at = self.side.driver.until("waiting for a room", WAIT, || {
                for (at, (_, room)) in moving.iter_mut().enumerate() {
                    if room.has_ended()? {
                        return Ok(Some(at));
                    }
                }
                Ok(None)
            })?;
            let (begin, room) = moving.swap_remove(at);
            room_us.push(begin.elapsed().as_secs_f64() * 1e6);
            kept.push(room);
            if let Some(mut room) = waiting.next() {
                let begin = Instant::now();
                room.begin(&self.side, layers)?;
                moving.push((begin, room));
            }
        }
        let (seconds, cpu_here_s) = (clock.seconds(), clock.cpu_s());
        // Giving the pages back is not part of the move.
        drop(kept);
        let cpu_there_s = self.done()?;
        Ok(Timed { seconds, cpu_here_s, cpu_there_s, room_us })
    }

    /// A pass over bare connections.
    fn stream(&mut self, pass: &Pass, lists: &Lists) -> Result<Timed, Error> {
        let count = usize::from(self.side.setup.lanes);
        self.connect(count)?;
        self.talk.say(&Ask::Stream(pass.clone()))?;
        // The other end makes its lists first.
        std::thread::sleep(SETTLE);
        let clock = Clock::start();
        let (setup, memory) = (&self.side.setup, &self.side.memory);
        let end = if setup.op == OpName::Write { End::Sends } else { End::Receives };
        bare::stream(&self.connections[..count], memory, setup.pages(lists), end)
            .map_err(Error::io("moving pages over bare connections"))?;
        let (seconds, cpu_here_s) = (clock.seconds(), clock.cpu_s());
        let cpu_there_s = self.done()?;
        Ok(Timed { seconds, cpu_here_s, cpu_there_s, room_us: Vec::new() })
    }

    fn measure_latency(&mut self, options: &Options, report: &mut Report) -> Result<(), Error> {
        let pages = TRIPS.min(self.side.setup.pool_pages / 2);
        let (mut ours, mut bare) = (Means::new(Way::Ours.name()), Means::new(Way::Stream.name()));
        let mut memcpy = Means::new(Way::Memcpy.name());
        let slot_bytes = self.side.setup.slot_bytes();
        self.connect(1)?;
        for repeat in 0..=options.repeats {
            // Always the same pages: the first repeat touches them in both processes, so that no page fault is measured.
            let out = Pass { seed: 0, ..self.next_pass(vec![pages]) };
            let both = Pass { rooms: vec![pages, pages], ..out.clone() };
            self.rooms += 1;
            let lists = self.side.setup.lists(&both);
            self.side.setup.content(out.salt).write(&self.side.memory, &lists.from[..pages as usize]);
            self.talk.say(&Ask::Bounce(both.clone()))?;
            let (talk, peer) = (&self.talk, self.peer);
            let trips = latency::trips(&mut self.side, peer, &both, &lists.from, |side| {
                side.driver.keep_trying("waiting for the peer", WAIT, || talk.hear()).map(drop)
            })?;
            self.done()?;
            if options.verify {
                match self.ask(&Ask::Check(out.clone()))? {
                    Answer::Checked { wrong_pages } => report.wrong_pages += wrong_pages,
                    other => return Err(unexpected(other)),
                }
            }
            self.talk.say(&Ask::BareBounce(both.clone()))?;
            let (setup, pool) = (&self.side.setup, &self.side.memory);
            let bare_trips = latency::bare_trips(&self.connections[0], setup, pool, &both, &lists.from)?;
            self.done()?;
            let lists = self.side.setup.lists(&out);
            let copied = self.run(Way::Memcpy, &out, &lists, 1)?;
            // The first repeat warms up.
            if repeat > 0 {
                ours.add(slot_bytes, trips.median() / 1e6, 0.0, 0.0);
                bare.add(slot_bytes, bare_trips.median() / 1e6, 0.0, 0.0);
                memcpy.add(slot_bytes * u64::from(pages), copied.seconds, 0.0, 0.0);
                report.room_us.extend(trips.values().iter().copied());
                report.bare_us.extend(bare_trips.values().iter().copied());
            }
        }
        report.rooms_a_pass = 2;
        report.take(vec![ours, memcpy, bare], Sample::default());
        Ok(())
    }

    /// Everything that the medium knows, ourselves first and memcpy second.
    fn ways(&self) -> Vec<Way> {
        let mut ways = vec![Way::Ours, Way::Memcpy];
        match (self.side.setup.port, self.side.setup.memory) {
            (PortName::Tcp, _) => ways.push(Way::Stream),
            (_, MemoryName::Private) if self.there.is_some() => ways.extend([Way::Batched, Way::Single]),
            _ => {
                ways.extend([Way::Copied(Strategy::Streamed), Way::Copied(Strategy::Cached)]);
                if self.side.setup.copy_threads > 1 {
                    ways.push(Way::CopyThreads);
                }
            }
        }
        ways
    }

    /// Touches every page of both pools in every way, so that no page fault is measured.
    fn warm_up(&mut self, ways: &[Way]) -> Result<(), Error> {
        let pool_pages = self.side.setup.pool_pages;
        let mut rooms = vec![LONGEST_ROOM; (pool_pages / LONGEST_ROOM) as usize];
        rooms.extend(Some(pool_pages % LONGEST_ROOM).filter(|&pages| pages > 0));
        for &way in ways {
            let pass = self.next_pass(rooms.clone());
            let lists = self.side.setup.lists(&pass);
            self.run(way, &pass, &lists, 1)?;
        }
        Ok(())
    }

    fn next_pass(&mut self, rooms: Vec<u32>) -> Pass {
        let pass = Pass { seed: self.seeds, salt: self.seeds, first_room: self.rooms, rooms };
        self.seeds += 1;
        self.rooms += pass.rooms.len() as u64;
        pass
    }

    fn connect(&mut self, count: usize) -> Result<(), Error> {
        while self.connections.len() < count {
            let socket = rustix::net::socket_with(
                match self.streams {
                    SocketAddr::V4(_) => rustix::net::AddressFamily::INET,
                    SocketAddr::V6(_) => rustix::net::AddressFamily::INET6,
                },
                rustix::net::SocketType::STREAM,
                rustix::net::SocketFlags::CLOEXEC,
                None,
            );
            let connected = socket.and_then(|socket| {
                if let Some(name) = &self.side.setup.congestion {
                    rustix::net::sockopt::set_tcp_congestion(&socket, name)?;
                }
                rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
                rustix::net::connect(&socket, &self.streams)?;
                Ok(TcpStream::from(socket))
            });
            self.connections.push(
                connected.map_err(|errno| Error::Io { what: "a bare connection", error: errno.into() })?,
            );
        }
        Ok(())
    }

    /// Says something and waits for the answer.
    fn ask(&mut self, what: &Ask) -> Result<Answer, Error> {
        self.talk.say(what)?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer, Error> {
        let talk = &self.talk;
        match self.side.driver.keep_trying("waiting for the peer's answer", WAIT, || talk.hear())? {
            Answer::Failed { why } => Err(Error::Peer { said: why }),
            answer => Ok(answer),
        }
    }

    /// The processor time of what the peer has done.
    fn done(&mut self) -> Result<f64, Error> {
        match self.answer()? {
            Answer::Done { cpu_s } => Ok(cpu_s),
            other => Err(unexpected(other)),
        }
    }
}

/// A room that this side moves.
enum Moving {
    /// Kept until the end, so that the pages go back when the clock stands.
    Sending {
        room: u64,
        sending: Sending,
        _pages: PageRef,
    },
    Wanted(Option<ReceiveRequest>),
    Fetching(u64, Receiving, Option<Received>),
}

impl Moving {
    fn begin(&mut self, side: &Side, layers: u32) -> Result<(), Error> {
        match self {
            Moving::Sending { sending, .. } => {
                sending.send_layers(0..layers)?;
                sending.finish(Vec::new())?;
            }
            Moving::Wanted(request) => {
                if let Some(request) = request.take() {
                    let room = request.room;
                    *self = Moving::Fetching(room, side.driver.handle().fetch(request)?, None);
                }
            }
            Moving::Fetching(..) => {}
        }
        Ok(())
    }

    fn has_ended(&mut self) -> Result<bool, Error> {
        let end = |room: u64, ended: Option<&Ended>| match ended {
            Some(ended) => delivered(room, ended).map(|()| true),
            None => Ok(false),
        };
        match self {
            Moving::Sending { room, sending, .. } => end(*room, sending.end.poll()?.as_ref()),
            Moving::Wanted(_) => Ok(false),
            Moving::Fetching(room, fetching, received) => {
                if received.is_none() {
                    *received = fetching.end.poll()?;
                }
                end(*room, received.as_ref().map(|received| &received.ended))
            }
        }
    }
}

impl Way {
    /// Whether what it moves can be checked at the destination.
    fn arrives_at_the_peer(self) -> bool {
        !matches!(self, Way::Memcpy)
    }
}

/// The peer's pool, as this process can reach it beside the library.
fn theirs(
    setup: &Setup,
    ready: &Ready,
    bytes: usize,
    peer_ip: IpAddr,
) -> Result<(Option<Memory>, Option<ThereMemory>), Error> {
    if setup.port != PortName::Shm || !peer_ip.is_loopback() {
        return Ok((None, None));
    }
    let mapped = ready.descriptor.map(|descriptor| bare::open_theirs(ready.process, descriptor, bytes));
    let mapped = mapped.transpose().map_err(Error::io("mapping the peer's pool"))?;
    let there = Pid::from_raw(ready.process).map(|process| ThereMemory { process, base: ready.base, bytes });
    Ok((mapped, there))
}

fn wait_for(talk: &Talk<Answer>) -> Result<Answer, Error> {
    let begin = Instant::now();
    loop {
        match talk.hear()? {
            Some(Answer::Failed { why }) => return Err(Error::Peer { said: why }),
            Some(answer) => return Ok(answer),
            None if begin.elapsed() > WAIT => {
                return Err(Error::TimedOut { what: "waiting for the peer", limit: WAIT });
            }
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
}

fn unexpected(answer: Answer) -> Error {
    match answer {
        Answer::Failed { why } => Error::Peer { said: why },
        other => Error::Unexpected { said: format!("{other:?}") },
    }
}

/// The list of a room's pages must fit into one control message.
const LONGEST_ROOM: u32 = 131_072;
/// What a trace is shortened to.
const TRACE_BYTES: f64 = 4e9;
/// Round trips of a repeat.
const TRIPS: u32 = 4096;
