//! The process at the other end: does what the initiator asks.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crossdock::{
    Ended, Memory, PageSet, Peer, ReceiveRequest, Received, Receiving, ServeRequest, Serving, now_ns,
};
use crossdock_benches::bare::{self, End, Flags, ThereMemory};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::bare_trips::Bare;
use crate::error::Error;
use crate::lanes::{LaneEnd, Lanes};
use crate::options::{OpName, PortName};
use crate::replay::{Replay, Role};
use crate::setup::{Clock, Setup, Side, WAIT, Who, allocate, rooms};
use crate::talk::{Answer, Ask, Pass, Place, Ready, Talk};
use crate::trips;
use crate::ways::theirs;

/// Takes initiators, one after the other; a child takes one, who comes at once or never.
pub fn listen(address: SocketAddr, is_child: bool) -> Result<(), Error> {
    let listener = TcpListener::bind(address).map_err(Error::io("listening"))?;
    println!("{}", listener.local_addr().map_err(Error::io("listening"))?);
    loop {
        let (stream, from) = match is_child {
            true => accept_within(&listener, "waiting for the initiator", WAIT)?,
            false => listener.accept().map_err(Error::io("accepting"))?,
        };
        let mut talk = Talk::new(stream).map_err(Error::io("talking"))?;
        match serve(&mut talk) {
            // How every benchmark ends.
            Err(Error::PeerGone) => {}
            Err(error) => {
                eprintln!("kvbench, peer of {from}: {error}");
                // If the initiator is gone it has its own reason.
                let _ = talk.say(&Answer::Failed { why: error.to_string() });
            }
            Ok(()) => {}
        }
        if is_child {
            return Ok(());
        }
    }
}

fn accept_within(
    listener: &TcpListener,
    what: &'static str,
    limit: Duration,
) -> Result<(TcpStream, SocketAddr), Error> {
    let time = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    match rustix::event::poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&time)) {
        Ok(0) => Err(Error::TimedOut { what, limit }),
        // Another connection in its place cannot be: nobody else takes from this listener.
        Ok(_) => listener.accept().map_err(Error::io("accepting")),
        Err(errno) => Err(Error::Io { what, error: errno.into() }),
    }
}

fn serve(talk: &mut Talk<Ask>) -> Result<(), Error> {
    let setup = match talk.hear_within(WAIT)? {
        Some(Ask::Setup(setup)) => *setup,
        Some(other) => return Err(Error::Unexpected { said: format!("{other:?}") }),
        None => return Err(Error::TimedOut { what: "waiting for the setup", limit: WAIT }),
    };
    let mut target = Target::open(setup, talk)?;
    loop {
        let answer = match target.side.driver.hear(IDLE, talk)? {
            Ask::Setup(_) => return Err(Error::Unexpected { said: "a second setup".into() }),
            Ask::Meet { node, place } => {
                target.peer = Peer::node(node);
                target.place = Some(place);
                continue;
            }
            Ask::Fill(pass) => {
                let setup = &target.side.setup;
                setup.content(pass.salt).write(&target.side.memory, &setup.lists(&pass).from);
                Answer::Done { cpu_s: 0.0 }
            }
            Ask::Open(pass) => {
                target.open_rooms(&pass)?;
                Answer::Done { cpu_s: 0.0 }
            }
            Ask::Go => Answer::Done { cpu_s: target.wait_for_rooms()? },
            Ask::Check(pass) => {
                let setup = &target.side.setup;
                let lists = setup.lists(&pass);
                let wrong = setup.content(pass.salt).check(&target.side.memory, &lists.from, &lists.to);
                Answer::Checked { wrong_pages: wrong.pages }
            }
            Ask::Lanes(theirs) => {
                target.lanes(talk, &theirs)?;
                Answer::Done { cpu_s: 0.0 }
            }
            Ask::Stream(pass) => Answer::Done { cpu_s: target.stream(&pass)? },
            Ask::Bounce(pass) => {
                let cpu_s = trips::bounce(&mut target.side, target.peer, &pass, || {
                    talk.say(&Answer::Done { cpu_s: 0.0 })
                })?;
                Answer::Done { cpu_s }
            }
            Ask::Trickle(pass) => {
                let slept = trips::trickled(&mut target.side, target.peer, &pass, || {
                    talk.say(&Answer::Done { cpu_s: 0.0 })
                })?;
                Answer::Slept { times: slept.times, batches: slept.batches }
            }
            Ask::Replay(orders) => {
                let role = match target.side.setup.op {
                    OpName::Write => Role::Decode,
                    OpName::Read => Role::Prefill,
                };
                let replay = Replay::new(&mut target.side, target.peer, role, *orders)?;
                talk.say(&Answer::Done { cpu_s: 0.0 })?;
                let start_ns = match talk.hear_within(WAIT)? {
                    Some(Ask::Begin { start_ns }) => start_ns.unwrap_or_else(now_ns),
                    Some(other) => return Err(Error::Unexpected { said: format!("{other:?}") }),
                    None => return Err(Error::no_answer(WAIT)),
                };
                Answer::Replayed(Box::new(replay.run(start_ns)?))
            }
            Ask::Begin { .. } => {
                return Err(Error::Unexpected { said: "a beginning of no replay".into() });
            }
            Ask::BareBounce(pass) => {
                target.reach(talk)?;
                let (side, mut bare) = target.bare()?;
                Answer::Done { cpu_s: bare.bounce(side, &pass)? }
            }
            Ask::BareServe(pass) => {
                target.reach(talk)?;
                let (side, mut bare) = target.bare()?;
                Answer::Done { cpu_s: bare.answer_pulls(side, &pass)? }
            }
        };
        talk.say(&answer)?;
    }
}

struct Target {
    side: Side,
    peer: Peer,
    /// The initiator's pool, and what of it can be reached.
    place: Option<Place>,
    mapped: Option<Memory>,
    there: Option<ThereMemory>,
    flags: Option<Flags>,
    /// Over RDMA, the other ends of the initiator's bare lanes.
    lanes: Option<Lanes>,
    listener: TcpListener,
    connections: Vec<TcpStream>,
    open: Vec<Open>,
}

enum Open {
    Receiving(u64, Receiving, Option<Received>),
    Serving(u64, Serving),
}

impl Target {
    fn open(setup: Setup, talk: &mut Talk<Ask>) -> Result<Self, Error> {
        let allocated = allocate(&setup)?;
        let ip = talk.local_ip().map_err(Error::io("talking"))?;
        let listener = TcpListener::bind((ip, 0)).map_err(Error::io("listening"))?;
        if let Some(name) = setup.tcp().congestion_at(ip) {
            rustix::net::sockopt::set_tcp_congestion(&listener, name)
                .map_err(|errno| Error::Io { what: "TCP_CONGESTION", error: errno.into() })?;
        }
        let setup_port = setup.port;
        let side = Side::open(Who::Target, setup, allocated, ip)?;
        let flags = match setup_port {
            PortName::Shm => Some(Flags::new().map_err(Error::io("allocating flags"))?),
            _ => None,
        };
        let ready = Ready {
            address: side.driver.node().address().to_owned(),
            node: side.driver.node().identity().node,
            stream_port: listener.local_addr().map_err(Error::io("listening"))?.port(),
            place: Place::of(&side.memory),
            flags: flags.as_ref().and_then(Flags::descriptor),
        };
        talk.say(&Answer::Ready(Box::new(ready)))?;
        Ok(Self {
            side,
            peer: Peer::node(0),
            place: None,
            mapped: None,
            there: None,
            flags,
            lanes: None,
            listener,
            connections: Vec::new(),
            open: Vec::new(),
        })
    }

    /// Makes the initiator's pool reachable beside the library, or has a connection to it.
    fn reach(&mut self, talk: &Talk<Ask>) -> Result<(), Error> {
        if let Some(place) = self.place.take() {
            let peer_ip = talk.peer_ip().map_err(Error::io("talking"))?;
            (self.mapped, self.there) = theirs(&self.side.setup, &place, self.side.memory.bytes(), peer_ip)?;
        }
        match (&self.lanes, self.there) {
            (None, None) => self.connect(1),
            _ => Ok(()),
        }
    }

    /// Opens the other ends of the initiator's bare lanes, and waits until they are up.
    fn lanes(&mut self, talk: &mut Talk<Ask>, theirs: &[LaneEnd]) -> Result<(), Error> {
        let (mut lanes, ours) = Lanes::open(&self.side.setup, Who::Target, &self.side.memory)?;
        lanes.connect(Who::Target, theirs)?;
        talk.say(&Answer::Lanes(ours))?;
        lanes.meet(theirs)?;
        self.lanes = Some(lanes);
        Ok(())
    }

    /// What the initiator's is the other end of.
    fn bare(&mut self) -> Result<(&Side, Bare<'_>), Error> {
        if let Some(lanes) = &mut self.lanes {
            return Ok((&self.side, Bare::Lanes(lanes)));
        }
        let bare = match (&self.flags, &self.mapped, self.there, self.connections.first()) {
            (Some(flags), Some(mapped), ..) => Bare::Mapped(mapped, flags),
            (Some(flags), None, Some(there), _) => Bare::Process(there, flags),
            (.., Some(socket)) => Bare::Tcp(socket),
            _ => return Err(Error::PeerGone),
        };
        Ok((&self.side, bare))
    }

    fn open_rooms(&mut self, pass: &Pass) -> Result<(), Error> {
        let lists = self.side.setup.lists(pass);
        let op = self.side.setup.op;
        let list = match op {
            OpName::Write => &lists.to,
            OpName::Read => &lists.from,
        };
        for (room, pages) in rooms(pass, list) {
            let tokens = self.side.setup.tokens(pages.len() as u32);
            let pages = self.side.adopt(pages)?;
            let handle = self.side.driver.handle();
            self.open.push(match op {
                OpName::Write => {
                    let receiving = handle.receive(ReceiveRequest {
                        peer: self.peer,
                        room,
                        use_count: 0,
                        tokens,
                        skip_tokens: 0,
                        pages,
                        deadline: WAIT,
                    })?;
                    Open::Receiving(room, receiving, None)
                }
                OpName::Read => {
                    let pages = pages.share();
                    let aux = Vec::new();
                    let request = ServeRequest { room, use_count: 0, tokens, pages, aux, deadline: WAIT };
                    Open::Serving(room, handle.serve(request)?)
                }
            });
        }
        self.side.driver.settle(SETTLE)
    }

    /// Waits for all rooms, and says what it has cost.
    fn wait_for_rooms(&mut self) -> Result<f64, Error> {
        let clock = Clock::start();
        let open = &mut self.open;
        self.side.driver.until("waiting for the rooms of a pass", WAIT, || {
            while let Some(last) = open.last_mut() {
                if !has_ended(last)? {
                    return Ok(None);
                }
                open.pop();
            }
            Ok(Some(()))
        })?;
        Ok(clock.cpu_s())
    }

    /// Takes the bare connections, as many as the initiator has dialed.
    fn connect(&mut self, count: usize) -> Result<(), Error> {
        while self.connections.len() < count {
            let (stream, _) = accept_within(&self.listener, "waiting for a bare connection", WAIT)?;
            stream.set_nodelay(true).map_err(Error::io("TCP_NODELAY"))?;
            bare::give_up_after(&stream, WAIT).map_err(Error::io("a bare connection"))?;
            self.connections.push(stream);
        }
        Ok(())
    }

    fn stream(&mut self, pass: &Pass) -> Result<f64, Error> {
        let lists = self.side.setup.lists(pass);
        let count = usize::from(self.side.setup.lanes);
        self.connect(count)?;
        let clock = Clock::start();
        let (setup, memory) = (&self.side.setup, &self.side.memory);
        let end = if setup.op == OpName::Read { End::Sends } else { End::Receives };
        bare::stream(&self.connections[..count], memory, setup.pages(&lists), end)
            .map_err(Error::exchange("moving pages over bare connections"))?;
        Ok(clock.cpu_s())
    }
}

fn has_ended(open: &mut Open) -> Result<bool, Error> {
    match open {
        Open::Receiving(room, receiving, received) => {
            if received.is_none() {
                *received = receiving.end.poll()?;
            }
            let Some(received) = received else { return Ok(false) };
            delivered(*room, &received.ended)?;
            let home: Option<PageSet> = receiving.pages.poll()?;
            Ok(home.is_some())
        }
        Open::Serving(room, serving) => match serving.end.poll()? {
            Some(ended) => delivered(*room, &ended).map(|()| true),
            None => Ok(false),
        },
    }
}

/// Anything but a delivery ends the benchmark.
pub fn delivered(room: u64, ended: &Ended) -> Result<(), Error> {
    match ended.is_delivered() {
        true => Ok(()),
        false => Err(Error::Room { room, ended: ended.clone() }),
    }
}

/// How long an initiator may think.
const IDLE: Duration = Duration::from_secs(3600);

/// Enough for the grants of all rooms to be with the other side.
pub const SETTLE: Duration = Duration::from_millis(10);
