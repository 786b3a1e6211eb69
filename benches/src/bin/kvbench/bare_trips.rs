//! The same single pages without the library: what the medium and two spinning ends need.

use std::net::TcpStream;
use std::time::Instant;

use crossdock::Memory;
use crossdock_benches::Sample;
use crossdock_benches::bare::{self, End, Flags, GpuPair, Pages, ThereMemory, Way};
use crossdock_shm::copy::Copier;
use crossdock_transport::Direction;

use crate::error::Error;
use crate::lanes::Lanes;
use crate::setup::{Clock, Lists, Side};
use crate::talk::Pass;
use crate::trips::Trips;

/// The best means known to move one page.
pub enum Bare<'a> {
    /// A connection that is read and written without blocking.
    Tcp(&'a TcpStream),
    /// The port's copy routine, and a word that tells of it.
    Mapped(&'a Memory, &'a Flags),
    /// A call a page, and a word that tells of it.
    Process(ThereMemory, &'a Flags),
    /// A write a page, and an immediate that tells of it.
    Lanes(&'a mut Lanes),
    /// A launch a page, within one process, which waits for its end.
    Mover(&'a mut GpuPair),
}

impl Bare<'_> {
    pub fn name(&self) -> &'static str {
        match self {
            Bare::Tcp(_) => "bare tcp",
            Bare::Mapped(..) => "bare copy and a flag",
            Bare::Process(..) => "bare process_vm and a flag",
            Bare::Lanes(_) => "bare lanes",
            Bare::Mover(_) => "bare mover",
        }
    }

    /// Whether the other process has its part in it.
    pub fn needs_the_peer(&self) -> bool {
        !matches!(self, Bare::Mover(_))
    }

    /// The pages of a pass there and back. Half of each trip counts.
    pub fn trips(&mut self, side: &Side, pass: &Pass) -> Result<Trips, Error> {
        let (lists, half) = (side.setup.lists(pass), pass.rooms[0] as usize);
        let base = self.base(End::Receives);
        self.run(half, |bare, at| {
            bare.put(side, lists.from[at], lists.to[at], End::Sends, base + at as u64 + 1)?;
            bare.take(side, lists.from[half + at], End::Receives, base + at as u64 + 1)
        })
        .map(|(page_us, cpu_s)| Trips {
            page_us: page_us.values().iter().map(|us| us / 2.0).collect(),
            cpu_s,
        })
    }

    /// The other end of [`trips`](Bare::trips). Says what it has used.
    pub fn bounce(&mut self, side: &Side, pass: &Pass) -> Result<f64, Error> {
        let (lists, half) = (side.setup.lists(pass), pass.rooms[0] as usize);
        let base = self.base(End::Receives);
        self.run(half, |bare, at| {
            bare.take(side, lists.to[at], End::Sends, base + at as u64 + 1)?;
            bare.put(side, lists.to[half + at], lists.from[half + at], End::Receives, base + at as u64 + 1)
        })
        .map(|(_, cpu_s)| cpu_s)
    }

    /// Fetches the pages of a pass one by one.
    pub fn pulls(&mut self, side: &Side, pass: &Pass) -> Result<Trips, Error> {
        let Lists { from, to } = side.setup.lists(pass);
        self.run(to.len(), |bare, at| {
            let pages = one(side, &from[at], &to[at]);
            match bare {
                Bare::Tcp(socket) => {
                    bare::word_spinning(socket, End::Sends)?;
                    bare.take(side, to[at], End::Receives, 0)
                }
                Bare::Mapped(theirs, _) => {
                    bare::copy(Copier::detect(), theirs, &side.memory, pages, 1);
                    Ok(())
                }
                Bare::Process(theirs, _) => bare::process_memory(&side.memory, *theirs, Way::Read, pages, 1),
                Bare::Lanes(lanes) => {
                    let list = |page| vec![page];
                    lanes.carry(Direction::Read, &Lists { from: list(from[at]), to: list(to[at]) })
                }
                Bare::Mover(pair) => pair.carry(Way::Read, pages),
            }
        })
        .map(|(page_us, cpu_s)| Trips { page_us, cpu_s })
    }

    /// The other end of [`pulls`](Bare::pulls), which has a part only in a connection. Says what it has used.
    pub fn answer_pulls(&mut self, side: &Side, pass: &Pass) -> Result<f64, Error> {
        let Bare::Tcp(socket) = *self else { return Ok(0.0) };
        let lists = side.setup.lists(pass);
        self.run(lists.from.len(), |bare, at| {
            bare::word_spinning(socket, End::Receives)?;
            bare.put(side, lists.from[at], lists.to[at], End::Sends, 0)
        })
        .map(|(_, cpu_s)| cpu_s)
    }

    /// What was shown in earlier passes: both ends of a pass begin after it.
    fn base(&self, which: End) -> u64 {
        match self {
            Bare::Tcp(_) | Bare::Lanes(_) | Bare::Mover(_) => 0,
            Bare::Mapped(_, flags) | Bare::Process(_, flags) => flags.shown(which),
        }
    }

    /// Times each of so many steps.
    fn run(
        &mut self,
        count: usize,
        mut step: impl FnMut(&mut Self, usize) -> std::io::Result<()>,
    ) -> Result<(Sample, f64), Error> {
        let mut each_us = Sample::default();
        let mut run = || {
            self.block(false)?;
            let clock = Clock::start();
            for at in 0..count {
                let begin = Instant::now();
                step(self, at)?;
                each_us.push(begin.elapsed().as_secs_f64() * 1e6);
            }
            let cpu_s = clock.cpu_s();
            self.block(true)?;
            Ok(cpu_s)
        };
        let cpu_s = run().map_err(Error::exchange("single pages by bare means"))?;
        Ok((each_us, cpu_s))
    }

    fn block(&self, block: bool) -> std::io::Result<()> {
        match self {
            Bare::Tcp(socket) => socket.set_nonblocking(!block),
            Bare::Mapped(..) | Bare::Process(..) | Bare::Lanes(_) | Bare::Mover(_) => Ok(()),
        }
    }

    /// Moves a page from here to there, and tells so.
    fn put(&mut self, side: &Side, from: u32, to: u32, end: End, number: u64) -> std::io::Result<()> {
        let pages = one(side, &from, &to);
        match self {
            Bare::Tcp(socket) => {
                let page_bytes = side.setup.slot_bytes() as usize;
                bare::page_spinning(socket, &side.memory, from, page_bytes, End::Sends)
            }
            Bare::Mapped(theirs, flags) => {
                bare::copy(Copier::detect(), &side.memory, theirs, pages, 1);
                flags.show(end, number);
                Ok(())
            }
            Bare::Process(theirs, flags) => {
                bare::process_memory(&side.memory, *theirs, Way::Write, pages, 1)?;
                flags.show(end, number);
                Ok(())
            }
            Bare::Lanes(lanes) => lanes.put(from, to),
            Bare::Mover(pair) => pair.carry(Way::Write, pages),
        }
    }

    /// Waits until a page has come.
    fn take(&mut self, side: &Side, page: u32, end: End, number: u64) -> std::io::Result<()> {
        match self {
            Bare::Tcp(socket) => {
                let page_bytes = side.setup.slot_bytes() as usize;
                bare::page_spinning(socket, &side.memory, page, page_bytes, End::Receives)
            }
            Bare::Mapped(_, flags) | Bare::Process(_, flags) => flags.wait(end, number),
            Bare::Lanes(lanes) => lanes.take(),
            // Nobody sends it: it is fetched.
            Bare::Mover(pair) => pair.carry(Way::Read, one(side, &page, &page)),
        }
    }
}

fn one<'a>(side: &Side, from: &'a u32, to: &'a u32) -> Pages<'a> {
    let setup = &side.setup;
    Pages {
        from: std::slice::from_ref(from),
        to: std::slice::from_ref(to),
        page_bytes: setup.page_bytes() as usize,
        layer_pages: setup.pool_pages,
        layers: setup.layers,
    }
}
