//! One page there and one back, again and again: through a room in each direction, or over a bare connection.
//!
//! A trip begins before the page is submitted and ends when the page that answers it is seen to have landed here. What
//! one page takes is half of that, so no two clocks are compared.

use std::net::TcpStream;
use std::time::Instant;

use crossdock::{Memory, Peer, ReceiveRequest, Received, Receiving, SendRequest, Sending};
use crossdock_benches::Sample;
use crossdock_benches::bare::{self, End};

use crate::error::Error;
use crate::setup::{Setup, Side, WAIT};
use crate::talk::Pass;
use crate::target::{SETTLE, delivered};

/// Our end of the two rooms: pages go out of the first half of a list and come in to the second.
struct Rooms {
    out: (u64, Sending),
    back: (u64, Receiving),
}

/// Which of the two rooms of a pass is whose.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Asks,
    Answers,
}

impl Rooms {
    fn open(side: &mut Side, peer: Peer, pass: &Pass, list: &[u32], part: Part) -> Result<Self, Error> {
        let (first, second) = list.split_at(list.len() / 2);
        let (source, destination, room_out, room_back) = match part {
            Part::Asks => (first, second, pass.first_room, pass.first_room + 1),
            Part::Answers => (second, first, pass.first_room + 1, pass.first_room),
        };
        let tokens = side.setup.tokens(source.len() as u32);
        let (source, destination) = (side.adopt(source)?, side.adopt(destination)?);
        let handle = side.driver.handle();
        let back = handle.receive(ReceiveRequest {
            peer,
            room: room_back,
            use_count: 0,
            tokens,
            skip_tokens: 0,
            pages: destination,
            deadline: WAIT,
        })?;
        let pages = source.share();
        let out = handle.open(SendRequest { room: room_out, use_count: 0, tokens, pages, deadline: WAIT })?;
        Ok(Self { out: (room_out, out), back: (room_back, back) })
    }

    fn send(&mut self, side: &Side, page: u32) -> Result<(), Error> {
        let tokens = side.setup.tokens(page)..side.setup.tokens(page + 1);
        Ok(self.out.1.send(0..side.setup.layers, tokens)?)
    }

    /// Spins until so many pages have landed here.
    fn landed(&mut self, side: &mut Side, pages: u32) -> Result<(), Error> {
        let begin = Instant::now();
        let mut spins = 0u32;
        // A page of several layers may come in several batches; the last one completes it.
        while self.back.1.arrivals() < u64::from(pages) {
            side.driver.spin();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 16) && begin.elapsed() > WAIT {
                return Err(Error::TimedOut { what: "waiting for a page", limit: WAIT });
            }
        }
        Ok(())
    }

    fn finish(mut self, side: &mut Side) -> Result<(), Error> {
        self.out.1.finish(Vec::new())?;
        let (out, back) = (&mut self.out, &mut self.back);
        let (mut sent, mut received, mut home) = (None, None::<Received>, None);
        side.driver.until("waiting for the rooms of single pages", WAIT, || {
            sent = match sent.take() {
                Some(ended) => Some(ended),
                None => out.1.end.poll()?,
            };
            received = match received.take() {
                Some(ended) => Some(ended),
                None => back.1.end.poll()?,
            };
            home = match home.take() {
                Some(pages) => Some(pages),
                None => back.1.pages.poll()?,
            };
            let (Some(sent), Some(received), Some(_)) = (&sent, &received, &home) else { return Ok(None) };
            delivered(out.0, sent)?;
            delivered(back.0, &received.ended)?;
            Ok(Some(()))
        })
    }
}

/// The pages of a pass there and back. Microseconds of half of each trip, in order.
pub fn trips(
    side: &mut Side,
    peer: Peer,
    pass: &Pass,
    list: &[u32],
    ready: impl FnOnce(&mut Side) -> Result<(), Error>,
) -> Result<Sample, Error> {
    let mut rooms = Rooms::open(side, peer, pass, list, Part::Asks)?;
    ready(side)?;
    side.driver.settle(SETTLE)?;
    let mut halves = Sample::default();
    for page in 0..pass.pages() / 2 {
        let begin = Instant::now();
        rooms.send(side, page)?;
        rooms.landed(side, page + 1)?;
        halves.push(begin.elapsed().as_secs_f64() * 1e6 / 2.0);
    }
    rooms.finish(side)?;
    Ok(halves)
}

/// The other end of [`trips`].
pub fn bounce(
    side: &mut Side,
    peer: Peer,
    pass: &Pass,
    ready: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    let list = side.setup.lists(pass).to;
    let mut rooms = Rooms::open(side, peer, pass, &list, Part::Answers)?;
    side.driver.settle(SETTLE)?;
    ready()?;
    for page in 0..pass.pages() / 2 {
        rooms.landed(side, page + 1)?;
        rooms.send(side, page)?;
    }
    rooms.finish(side)
}

/// The same pages over a bare connection, both ends spinning.
pub fn bare_trips(
    socket: &TcpStream,
    setup: &Setup,
    pool: &Memory,
    pass: &Pass,
    list: &[u32],
) -> Result<Sample, Error> {
    let (out, back) = list.split_at(list.len() / 2);
    let page_bytes = setup.slot_bytes() as usize;
    let mut halves = Sample::default();
    let mut run = || {
        socket.set_nonblocking(true)?;
        for page in 0..pass.pages() as usize / 2 {
            let begin = Instant::now();
            bare::page_spinning(socket, pool, out[page], page_bytes, End::Sends)?;
            bare::page_spinning(socket, pool, back[page], page_bytes, End::Receives)?;
            halves.push(begin.elapsed().as_secs_f64() * 1e6 / 2.0);
        }
        socket.set_nonblocking(false)
    };
    run().map_err(Error::io("a bare connection"))?;
    Ok(halves)
}

/// The other end of [`bare_trips`].
pub fn bare_bounce(socket: &TcpStream, setup: &Setup, pool: &Memory, pass: &Pass) -> Result<(), Error> {
    let list = setup.lists(pass).to;
    let (incoming, answers) = list.split_at(list.len() / 2);
    let page_bytes = setup.slot_bytes() as usize;
    let run = || {
        socket.set_nonblocking(true)?;
        for page in 0..pass.pages() as usize / 2 {
            bare::page_spinning(socket, pool, incoming[page], page_bytes, End::Receives)?;
            bare::page_spinning(socket, pool, answers[page], page_bytes, End::Sends)?;
        }
        socket.set_nonblocking(false)
    };
    run().map_err(Error::io("a bare connection"))
}
