//! The process that measures.

use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use crossdock::{Peer, now_ns};

use crate::error::Error;
use crate::lanes::Lanes;
use crate::moving::Moving;
use crate::options::{OpName, Options, PortName};
use crate::passes::{LONGEST_ROOM, Passes, Traced};
use crate::process::Process;
use crate::replay::{Orders, Replay, Role};
use crate::report::{Means, Report};
use crate::setup::{Lists, Setup, Side, WAIT, Who, allocate};
use crate::talk::{Answer, Ask, Pass, Place, Talk};
use crate::target::SETTLE;
use crate::ways::{Beside, Timed, Way};

/// Measures what is asked for and, where a picture of it is, other page sizes.
pub fn run(options: &Options) -> Result<Report, Error> {
    let mut report = measure(options)?;
    if let Some(path) = &options.svg {
        for other in page_sizes(options) {
            report.add_to_roofs(&measure(&other)?);
        }
        std::fs::write(path, report.svg()?).map_err(Error::io("writing the picture"))?;
    }
    Ok(report)
}

/// The same with pages of other sizes, those of which a few fit the pool, in a few short repeats.
fn page_sizes(options: &Options) -> Vec<Options> {
    let plain = Options {
        trace: None,
        scale: None,
        time_scale: None,
        pages: None,
        in_flight: 1,
        hog: 0,
        seconds: 0.0,
        repeats: options.repeats.min(3),
        verify: false,
        ..options.clone()
    };
    let model = options.model.clone().or(options.trace.as_ref().map(|_| "deepseek-r1".to_owned()));
    let sizes = (0..5).map(|at| match &model {
        Some(_) => Options { model: model.clone(), page_tokens: 4u32.pow(at), ..plain.clone() },
        None => Options { page_bytes: 1024 * 4u64.pow(at), ..plain.clone() },
    });
    sizes.filter(|other| Setup::new(other).is_ok_and(|setup| setup.pool_pages >= LEAST_POOL_PAGES)).collect()
}

/// Pages of a pool, for its rate to say something.
const LEAST_POOL_PAGES: u32 = 8;

fn measure(options: &Options) -> Result<Report, Error> {
    if !(0.0..=3600.0).contains(&options.seconds) {
        return Err(Error::Seconds);
    }
    if options.hog > 0 && options.asks_for_latency() {
        return Err(Error::HoggedLatency);
    }
    let setup = Setup::new(options)?;
    let passes = Passes::new(options, &setup)?;
    setup.check_devices()?;
    // Before this process has threads and memory that a child would only have to forget.
    let hogs = Process::hogs(options.hog)?;
    let (peer, address) = match options.connect {
        Some(address) => (None, address),
        None => Process::peer().map(|(peer, address)| (Some(peer), address))?,
    };
    let name = match &peer {
        Some(peer) => format!("the peer process {}", peer.id()),
        None => format!("the peer at {address}"),
    };
    let measure = || {
        let mut initiator = Initiator::open(&setup, address)?;
        let mut report = Report::new(options, &setup, &passes, initiator.open_ms);
        report.of_gpu(initiator.side.gpu.as_ref());
        if options.asks_for_latency() {
            initiator.measure_latency(options, &mut report)?;
        } else {
            initiator.measure(options, &passes, &hogs, &mut report)?;
        }
        Ok(report)
    };
    measure().map_err(|error: Error| error.of_peer(&name))
}

/// The measuring process, once it has met its peer.
pub struct Initiator {
    pub side: Side,
    pub talk: Talk<Answer>,
    pub peer: Peer,
    pub beside: Beside,
    pub rooms: u64,
    seeds: u64,
    open_ms: f64,
}

impl Initiator {
    fn open(setup: &Setup, address: SocketAddr) -> Result<Self, Error> {
        let stream =
            TcpStream::connect_timeout(&address, WAIT).map_err(Error::io("connecting to the peer"))?;
        let mut talk = Talk::new(stream).map_err(Error::io("talking"))?;
        talk.say(&Ask::Setup(Box::new(setup.clone())))?;
        let allocated = allocate(setup)?;
        let ready = match wait_for(&talk)? {
            Answer::Ready(ready) => *ready,
            other => return Err(unexpected(other)),
        };
        let ip = talk.local_ip().map_err(Error::io("talking"))?;
        let peer_ip = talk.peer_ip().map_err(Error::io("talking"))?;
        let begin = Instant::now();
        let mut side = Side::open(Who::Initiator, setup.clone(), allocated, ip)?;
        talk.say(&Ask::Meet { node: side.driver.node().identity().node, place: Place::of(&side.memory) })?;
        let (peer, mut up) = side.driver.handle().connect(&ready.address)?;
        let met = side.driver.until("meeting the peer", WAIT, || Ok(up.poll()?))?;
        met.map_err(Error::Session)?;
        let open_ms = begin.elapsed().as_secs_f64() * 1e3;
        let beside = Beside::open(&side, &ready, peer_ip)?;
        let (rooms, seeds) = (1, 1);
        let mut initiator = Self { side, talk, peer, beside, rooms, seeds, open_ms };
        if setup.port == PortName::Verbs {
            initiator.open_lanes()?;
        }
        Ok(initiator)
    }

    /// Bare lanes over the devices, beside the node's.
    fn open_lanes(&mut self) -> Result<(), Error> {
        let (mut lanes, ours) = Lanes::open(&self.side.setup, Who::Initiator, &self.side.memory)?;
        let theirs = match self.ask(&Ask::Lanes(ours))? {
            Answer::Lanes(theirs) => theirs,
            other => return Err(unexpected(other)),
        };
        lanes.connect(Who::Initiator, &theirs)?;
        lanes.meet(&theirs)?;
        self.done()?;
        self.beside.lanes = Some(lanes);
        Ok(())
    }

    fn measure(
        &mut self,
        options: &Options,
        passes: &Passes,
        hogs: &[Process],
        report: &mut Report,
    ) -> Result<(), Error> {
        let ways = self.beside.ways(&self.side.setup);
        self.warm_up(&ways)?;
        let mut means: Vec<Means> = ways.iter().map(|way| Means::new(way.name())).collect();
        for repeat in 0..options.repeats {
            self.repeat(options, passes, repeat, (&ways, &mut means), &[], report)?;
        }
        let floor = report.take(means);
        if !hogs.is_empty() {
            let ways = [Way::Ours, ways[floor]];
            let mut means = ways.map(|way| Means::new(way.name()));
            for repeat in 0..options.repeats {
                self.repeat(options, passes, repeat, (&ways, &mut means), hogs, report)?;
            }
            report.hogged = Some(means);
        }
        if let Some(traced) = &passes.traced {
            self.replay(options, traced, report)?;
        }
        Ok(())
    }

    /// Every way in turn, beside processes that use a core where there are some.
    fn repeat(
        &mut self,
        options: &Options,
        passes: &Passes,
        repeat: u32,
        (ways, means): (&[Way], &mut [Means]),
        hogs: &[Process],
        report: &mut Report,
    ) -> Result<(), Error> {
        let mut sums: Vec<(u64, Timed)> = ways.iter().map(|_| Default::default()).collect();
        let mut range = passes.of_repeat(repeat, options.repeats);
        // The repeat's share of a trace, and as much more as the asked time needs.
        while !range.is_empty() || sums[0].1.seconds < options.seconds {
            let rooms = &passes.rooms[range.start % passes.rooms.len()];
            range.start += 1;
            for turn in 0..ways.len() {
                // Nobody always follows the same other.
                let which = (turn + repeat as usize) % ways.len();
                let pass = self.next_pass(rooms.clone());
                let timed = self.one(options, ways[which], &pass, hogs, report)?;
                let (bytes, sum) = &mut sums[which];
                *bytes += u64::from(pass.pages()) * self.side.setup.slot_bytes();
                sum.seconds += timed.seconds;
                sum.cpu_here_s += timed.cpu_here_s;
                sum.cpu_there_s += timed.cpu_there_s;
                if hogs.is_empty() {
                    report.room_us.extend(timed.room_us);
                }
            }
        }
        for (means, (bytes, sum)) in means.iter_mut().zip(&sums) {
            means.add(*bytes, sum.seconds, sum.cpu_here_s, sum.cpu_there_s);
        }
        Ok(())
    }

    /// Replays a trace through the library, with the other side.
    fn replay(&mut self, options: &Options, traced: &Traced, report: &mut Report) -> Result<(), Error> {
        let orders = Orders {
            arrivals: traced.arrivals.clone(),
            first_room: self.rooms,
            verify: options.verify,
            salt: self.seeds,
        };
        self.rooms += orders.arrivals.len() as u64;
        self.ask(&Ask::Replay(Box::new(orders.clone())))?;
        let role = match self.side.setup.op {
            OpName::Write => Role::Prefill,
            OpName::Read => Role::Decode,
        };
        let is_here = self.talk.peer_ip().is_ok_and(|ip| ip.is_loopback());
        let replay = Replay::new(&mut self.side, self.peer, role, orders)?;
        let start_ns = now_ns();
        self.talk.say(&Ask::Begin { start_ns: is_here.then_some(start_ns) })?;
        let here = replay.run(start_ns)?;
        // The other side ends its last room by that room's deadline.
        let there = match self.side.driver.hear(2 * WAIT, &self.talk)? {
            Answer::Replayed(told) => *told,
            other => return Err(unexpected(other)),
        };
        let (prefill, decode) = if role == Role::Prefill { (here, there) } else { (there, here) };
        report.replayed(traced, prefill, decode);
        Ok(())
    }

    /// Fills, moves and, if asked, checks one pass.
    fn one(
        &mut self,
        options: &Options,
        way: Way,
        pass: &Pass,
        hogs: &[Process],
        report: &mut Report,
    ) -> Result<Timed, Error> {
        let lists = self.side.setup.lists(pass);
        self.fill(pass, &lists)?;
        hogs.iter().for_each(|hog| hog.let_run(true));
        let timed = self.run(way, pass, &lists, options.in_flight as usize);
        hogs.iter().for_each(|hog| hog.let_run(false));
        let timed = timed?;
        if way.arrives_at_the_peer() {
            self.check(options, pass, &lists, report)?;
        }
        Ok(timed)
    }

    pub fn fill(&mut self, pass: &Pass, lists: &Lists) -> Result<(), Error> {
        match self.side.setup.op {
            OpName::Write => self.side.setup.content(pass.salt).write(&self.side.memory, &lists.from),
            OpName::Read => self.ask(&Ask::Fill(pass.clone())).map(drop)?,
        }
        Ok(())
    }

    pub fn check(
        &mut self,
        options: &Options,
        pass: &Pass,
        lists: &Lists,
        report: &mut Report,
    ) -> Result<(), Error> {
        if options.verify {
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
        Ok(())
    }

    /// Opens the rooms of a pass at both ends, and tells the other end to wait for them.
    pub fn open_rooms(&mut self, pass: &Pass, lists: &Lists) -> Result<Vec<Moving>, Error> {
        let rooms = Moving::open(&mut self.side, self.peer, pass, lists)?;
        self.ask(&Ask::Open(pass.clone()))?;
        self.side.driver.settle(SETTLE)?;
        self.talk.say(&Ask::Go)?;
        Ok(rooms)
    }

    pub fn run(&mut self, way: Way, pass: &Pass, lists: &Lists, in_flight: usize) -> Result<Timed, Error> {
        match way {
            Way::Ours => {
                let rooms = self.open_rooms(pass, lists)?;
                let timed = Moving::all(rooms, &mut self.side, in_flight)?;
                Ok(Timed { cpu_there_s: self.done()?, ..timed })
            }
            Way::Stream => {
                let setup = &self.side.setup;
                self.beside.connections(setup, setup.lanes.into())?;
                self.talk.say(&Ask::Stream(pass.clone()))?;
                // The other end makes its lists first.
                std::thread::sleep(SETTLE);
                let timed = self.beside.stream(&self.side, lists)?;
                Ok(Timed { cpu_there_s: self.done()?, ..timed })
            }
            Way::Lanes => {
                std::thread::sleep(SETTLE);
                self.beside.carry(&self.side, lists)
            }
            Way::Memcpy
            | Way::Copied(_)
            | Way::CopyThreads
            | Way::Batched
            | Way::Single
            | Way::Stretch
            | Way::Mover => {
                // As long a rest after the source was written as the other ways need to set up.
                std::thread::sleep(SETTLE);
                self.beside.copy(way, &self.side, lists)
            }
        }
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

    pub fn next_pass(&mut self, rooms: Vec<u32>) -> Pass {
        let pass = Pass { seed: self.seeds, salt: self.seeds, first_room: self.rooms, rooms };
        self.seeds += 1;
        self.rooms += pass.rooms.len() as u64;
        pass
    }

    /// Says something and waits for the answer.
    fn ask(&mut self, what: &Ask) -> Result<Answer, Error> {
        self.talk.say(what)?;
        self.answer()
    }

    pub fn answer(&mut self) -> Result<Answer, Error> {
        match self.side.driver.hear(WAIT, &self.talk)? {
            Answer::Failed { why } => Err(Error::Peer { said: why }),
            answer => Ok(answer),
        }
    }

    /// The processor time of what the peer has done.
    pub fn done(&mut self) -> Result<f64, Error> {
        match self.answer()? {
            Answer::Done { cpu_s } => Ok(cpu_s),
            other => Err(unexpected(other)),
        }
    }
}

fn wait_for(talk: &Talk<Answer>) -> Result<Answer, Error> {
    match talk.hear_within(WAIT)? {
        Some(Answer::Failed { why }) => Err(Error::Peer { said: why }),
        Some(answer) => Ok(answer),
        None => Err(Error::no_answer(WAIT)),
    }
}

pub fn unexpected(answer: Answer) -> Error {
    match answer {
        Answer::Failed { why } => Error::Peer { said: why },
        other => Error::Unexpected { said: format!("{other:?}") },
    }
}
