//! What takes turns with the library over the same pages: the best means known for the medium, and a plain memcpy.

use std::net::{IpAddr, SocketAddr, TcpStream};

use crossdock::Memory;
use crossdock_benches::bare::{self, End, Flags, GpuPair, ThereMemory, Way as Direction};
use crossdock_benches::{OpenGpu, anonymous};
use crossdock_shm::copy::{Copier, CopyThreads, Strategy};
use rustix::process::Pid;

use crate::bare_trips::Bare;
use crate::error::Error;
use crate::lanes::Lanes;
use crate::options::{MemoryName, OpName, PortName};
use crate::setup::{Clock, Lists, Setup, Side, WAIT, pool_memory};
use crate::talk::{Place, Ready};

/// The ways to move a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Ours,
    Memcpy,
    /// As many bytes by one copy of a GPU's, in one stretch.
    Stretch,
    Copied(Strategy),
    /// By the port's own copy threads, all at once.
    CopyThreads,
    /// `process_vm_writev`, many pages a call.
    Batched,
    /// `process_vm_writev`, a call a page.
    Single,
    /// Bare connections.
    Stream,
    /// Bare lanes of RDMA devices.
    Lanes,
    /// The kernels of a GPU's port, within this process.
    Mover,
}

/// What one way of moving a pass took.
#[derive(Default)]
pub struct Timed {
    pub seconds: f64,
    pub cpu_here_s: f64,
    pub cpu_there_s: f64,
    pub room_us: Vec<f64>,
}

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Way::Ours => "crossdock",
            Way::Memcpy | Way::Stretch => "memcpy",
            Way::Copied(Strategy::Streamed) => "streaming copy",
            Way::Copied(Strategy::Cached) => "cached copy",
            Way::CopyThreads => "copy threads",
            Way::Batched => "process_vm, batched",
            Way::Single => "process_vm, a page a call",
            Way::Stream => "bare tcp",
            Way::Lanes => "bare lanes",
            Way::Mover => "bare mover",
        }
    }

    /// Whether what it moves can be checked at the destination.
    pub fn arrives_at_the_peer(self) -> bool {
        !matches!(self, Way::Memcpy | Way::Stretch | Way::Mover)
    }
}

/// What the ways beside ours need.
pub struct Beside {
    /// The peer's pool, where it can be mapped, and an address in its process.
    mapped: Option<Memory>,
    there: Option<ThereMemory>,
    /// Stands in for a pool of the peer that cannot be mapped, where memory is only copied for comparison.
    scratch: Option<Memory>,
    /// Where each end tells that a page has come, beside a pool that can be reached.
    flags: Option<Flags>,
    streams: SocketAddr,
    connections: Vec<TcpStream>,
    /// Over RDMA.
    pub lanes: Option<Lanes>,
    /// With a GPU: this side's pool, and what stands in for the peer's.
    pair: Option<GpuPair>,
    copy_threads: CopyThreads,
}

impl Beside {
    pub fn open(side: &Side, ready: &Ready, peer_ip: IpAddr) -> Result<Self, Error> {
        let Side { setup, memory, gpu, .. } = side;
        let bytes = memory.bytes();
        let (mapped, there) = theirs(setup, &ready.place, bytes, peer_ip)?;
        let scratch = match (&mapped, gpu) {
            (None, None) => Some(anonymous(bytes).map_err(Error::io("allocating memory"))?),
            _ => None,
        };
        let pair = |on: &OpenGpu| {
            let other = pool_memory(setup, Some(on))?;
            GpuPair::new(on, memory, other).map_err(Error::gpu(on.choice))
        };
        let pair = gpu.as_ref().map(pair).transpose()?;
        let flags = match (there, ready.flags) {
            (Some(_), Some(descriptor)) => Some(Flags::theirs(ready.place.process, descriptor)),
            _ => None,
        };
        let flags = flags.transpose().map_err(Error::io("mapping the peer's flags"))?;
        let helpers = setup.copy_threads as usize - 1;
        let copy_threads =
            CopyThreads::start(Copier::detect(), helpers).map_err(Error::io("starting copy threads"))?;
        let streams = SocketAddr::new(peer_ip, ready.stream_port);
        let connections = Vec::new();
        Ok(Self { mapped, there, scratch, flags, streams, connections, lanes: None, pair, copy_threads })
    }

    /// Everything that the medium knows, ourselves first and memcpy second.
    pub fn ways(&self, setup: &Setup) -> Vec<Way> {
        if setup.port == PortName::Cuda {
            return vec![Way::Ours, Way::Stretch, Way::Mover];
        }
        let mut ways = vec![Way::Ours, Way::Memcpy];
        match (setup.port, setup.memory) {
            (PortName::Tcp, _) => ways.push(Way::Stream),
            (PortName::Verbs, _) => ways.push(Way::Lanes),
            (_, MemoryName::Private) if self.there.is_some() => ways.extend([Way::Batched, Way::Single]),
            _ => {
                ways.extend([Way::Copied(Strategy::Streamed), Way::Copied(Strategy::Cached)]);
                if setup.copy_threads > 1 {
                    ways.push(Way::CopyThreads);
                }
            }
        }
        ways
    }

    /// A pass by a way that the peer has no part in.
    pub fn copy(&mut self, way: Way, side: &Side, lists: &Lists) -> Result<Timed, Error> {
        let write = side.setup.op == OpName::Write;
        let threads = side.setup.copy_threads as usize;
        let pages = side.setup.pages(lists);
        let here = &side.memory;
        let direction = if write { Direction::Write } else { Direction::Read };
        let clock = Clock::start();
        match way {
            Way::Ours | Way::Stream | Way::Lanes => unreachable!("these need the peer, or its device"),
            Way::Memcpy | Way::Copied(_) | Way::CopyThreads => {
                let there = self.mapped.as_ref().or(self.scratch.as_ref()).expect("there is one of them");
                let (source, target) = if write { (here, there) } else { (there, here) };
                match way {
                    Way::Copied(strategy) => {
                        bare::copy(Copier::detect().force(strategy), source, target, pages, threads);
                    }
                    Way::CopyThreads => bare::copy_shared(&mut self.copy_threads, source, target, pages),
                    _ => bare::memcpy(source, target, pages, threads),
                }
            }
            Way::Batched | Way::Single => {
                let there = self.there.expect("these ways are only for memory of a process on this host");
                let pages_a_call = if way == Way::Single { 1 } else { usize::MAX };
                bare::process_memory(here, there, direction, pages, pages_a_call)
                    .map_err(Error::io("process_vm"))?;
            }
            Way::Stretch | Way::Mover => {
                let pair = self.pair.as_mut().expect("these ways are only for a GPU's port");
                let moved = match way {
                    Way::Stretch => pair.stretch(direction, pages.bytes()),
                    _ => pair.carry(direction, pages),
                };
                moved.map_err(Error::io("moving pages beside the library"))?;
            }
        }
        Ok(Timed { seconds: clock.seconds(), cpu_here_s: clock.cpu_s(), ..Timed::default() })
    }

    /// This end's part of a pass over bare connections, which exist.
    pub fn stream(&self, side: &Side, lists: &Lists) -> Result<Timed, Error> {
        let count = usize::from(side.setup.lanes);
        let clock = Clock::start();
        let end = if side.setup.op == OpName::Write { End::Sends } else { End::Receives };
        bare::stream(&self.connections[..count], &side.memory, side.setup.pages(lists), end)
            .map_err(Error::exchange("moving pages over bare connections"))?;
        Ok(Timed { seconds: clock.seconds(), cpu_here_s: clock.cpu_s(), ..Timed::default() })
    }

    /// A pass over bare lanes. The peer's device has its part in it, and the peer has not.
    pub fn carry(&mut self, side: &Side, lists: &Lists) -> Result<Timed, Error> {
        let Some(lanes) = &mut self.lanes else { return Err(Error::PeerGone) };
        let direction = match side.setup.op {
            OpName::Write => crossdock_transport::Direction::Write,
            OpName::Read => crossdock_transport::Direction::Read,
        };
        let clock = Clock::start();
        lanes.carry(direction, lists).map_err(Error::exchange("moving pages over bare lanes"))?;
        Ok(Timed { seconds: clock.seconds(), cpu_here_s: clock.cpu_s(), ..Timed::default() })
    }

    /// The best means for a single page.
    pub fn bare(&mut self, setup: &Setup) -> Result<Bare<'_>, Error> {
        if self.lanes.is_none() && self.flags.is_none() && self.pair.is_none() {
            self.connections(setup, 1)?;
        }
        if let Some(pair) = &mut self.pair {
            return Ok(Bare::Mover(pair));
        }
        if let Some(lanes) = &mut self.lanes {
            return Ok(Bare::Lanes(lanes));
        }
        Ok(match (&self.flags, &self.mapped, self.there) {
            (Some(flags), Some(mapped), _) => Bare::Mapped(mapped, flags),
            (Some(flags), None, Some(there)) => Bare::Process(there, flags),
            _ => Bare::Tcp(&self.connections[0]),
        })
    }

    /// The bare connections, at least so many.
    pub fn connections(&mut self, setup: &Setup, count: usize) -> Result<&[TcpStream], Error> {
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
            let connected = socket.map_err(std::io::Error::from).and_then(|socket| {
                if let Some(name) = setup.tcp().congestion_at(self.streams.ip()) {
                    rustix::net::sockopt::set_tcp_congestion(&socket, name)?;
                }
                rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
                let socket = TcpStream::from(socket);
                // Before it connects: that has a deadline too.
                bare::give_up_after(&socket, WAIT)?;
                rustix::net::connect(&socket, &self.streams)?;
                Ok(socket)
            });
            self.connections.push(connected.map_err(Error::io("a bare connection"))?);
        }
        Ok(&self.connections)
    }
}

/// A pool of another process, as this one can reach it beside the library: mapped, and by its address.
pub fn theirs(
    setup: &Setup,
    place: &Place,
    bytes: usize,
    peer_ip: IpAddr,
) -> Result<(Option<Memory>, Option<ThereMemory>), Error> {
    if setup.port != PortName::Shm || !peer_ip.is_loopback() {
        return Ok((None, None));
    }
    let mapped = place.descriptor.map(|descriptor| bare::open_theirs(place.process, descriptor, bytes));
    let mapped = mapped.transpose().map_err(Error::io("mapping the peer's pool"))?;
    let there = Pid::from_raw(place.process).map(|process| ThereMemory { process, base: place.base, bytes });
    Ok((mapped, there))
}
