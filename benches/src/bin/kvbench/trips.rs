//! Single pages through the library.
//!
//! Pushed, one goes there and one comes back, again and again, through a room in each direction: a trip begins before
//! the page is submitted and ends when the page that answers it is seen to have landed here. What one page takes is half
//! of that, so no two clocks are compared. Pulled, each page is a room, and nothing has to come back. Trickling, pages
//! are so far apart that both progress threads fall asleep between them.

use std::time::{Duration, Instant};

use crossdock::{Peer, ReceiveRequest, Received, Receiving, SendRequest, Sending};
use crossdock_benches::{Sample, sleeps};

use crate::error::Error;
use crate::moving::Moving;
use crate::setup::{Clock, Side, WAIT};
use crate::talk::Pass;
use crate::target::{SETTLE, delivered};

/// What single pages took.
#[derive(Default)]
pub struct Trips {
    /// Microseconds of each page, in order.
    pub page_us: Sample,
    /// What the measuring process has used, for all of them.
    pub cpu_s: f64,
}

/// How often progress threads went to sleep, and for how many batches of pages.
pub struct Slept {
    /// Sleeps of this end's progress thread.
    pub times: u64,
    /// Batches that came in: fewer than pages where the sender's thread slept for longer than the pages were apart, and
    /// sent what had gathered as one.
    pub batches: u64,
}

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

    /// Sees both rooms to their ends.
    fn finish(self, side: &mut Side) -> Result<(), Error> {
        self.finish_after(side, None)
    }

    /// The same, where what came in has been taken already.
    fn finish_after(mut self, side: &mut Side, mut received: Option<Received>) -> Result<(), Error> {
        self.out.1.finish(Vec::new())?;
        let (out, back) = (&mut self.out, &mut self.back);
        let (mut sent, mut home) = (None, None);
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

/// The pages of a pass there and back. Half of each trip counts.
pub fn trips(
    side: &mut Side,
    peer: Peer,
    pass: &Pass,
    list: &[u32],
    ready: impl FnOnce(&mut Side) -> Result<(), Error>,
) -> Result<Trips, Error> {
    let mut rooms = Rooms::open(side, peer, pass, list, Part::Asks)?;
    ready(side)?;
    side.driver.settle(SETTLE)?;
    let mut page_us = Sample::default();
    let clock = Clock::start();
    for page in 0..pass.pages() / 2 {
        let begin = Instant::now();
        rooms.send(side, page)?;
        rooms.landed(side, page + 1)?;
        page_us.push(begin.elapsed().as_secs_f64() * 1e6 / 2.0);
    }
    let cpu_s = clock.cpu_s();
    rooms.finish(side)?;
    Ok(Trips { page_us, cpu_s })
}

/// The other end of [`trips`]. Says what it has used.
pub fn bounce(
    side: &mut Side,
    peer: Peer,
    pass: &Pass,
    ready: impl FnOnce() -> Result<(), Error>,
) -> Result<f64, Error> {
    let list = side.setup.lists(pass).to;
    let mut rooms = Rooms::open(side, peer, pass, &list, Part::Answers)?;
    side.driver.settle(SETTLE)?;
    ready()?;
    let clock = Clock::start();
    for page in 0..pass.pages() / 2 {
        rooms.landed(side, page + 1)?;
        rooms.send(side, page)?;
    }
    let cpu_s = clock.cpu_s();
    rooms.finish(side)?;
    Ok(cpu_s)
}

/// Moves one room after the other, spinning until each has landed here.
pub fn pulls(side: &mut Side, rooms: Vec<Moving>) -> Result<Trips, Error> {
    let mut page_us = Sample::default();
    let mut kept = Vec::with_capacity(rooms.len());
    let clock = Clock::start();
    for mut room in rooms {
        let begin = Instant::now();
        room.begin(side)?;
        while !room.has_ended()? {
            side.driver.spin();
        }
        page_us.push(begin.elapsed().as_secs_f64() * 1e6);
        kept.push(room);
    }
    let cpu_s = clock.cpu_s();
    drop(kept);
    Ok(Trips { page_us, cpu_s })
}

/// Sends the pages of a pass one by one, with a rest before each. Says how often the progress thread went to sleep.
pub fn trickle(
    side: &mut Side,
    peer: Peer,
    pass: &Pass,
    list: &[u32],
    ready: impl FnOnce(&mut Side) -> Result<(), Error>,
) -> Result<u64, Error> {
    let mut rooms = Rooms::open(side, peer, pass, list, Part::Asks)?;
    ready(side)?;
    side.driver.settle(SETTLE)?;
    let before = progress_sleeps()?;
    for page in 0..pass.pages() / 2 {
        std::thread::sleep(REST);
        rooms.send(side, page)?;
    }
    std::thread::sleep(REST);
    let sleeps = progress_sleeps()? - before;
    rooms.finish(side)?;
    Ok(sleeps)
}

/// The other end of [`trickle`]. Says the same, and how many batches came.
pub fn trickled(
    side: &mut Side,
    peer: Peer,
    pass: &Pass,
    ready: impl FnOnce() -> Result<(), Error>,
) -> Result<Slept, Error> {
    let list = side.setup.lists(pass).to;
    let mut rooms = Rooms::open(side, peer, pass, &list, Part::Answers)?;
    side.driver.settle(SETTLE)?;
    ready()?;
    let before = progress_sleeps()?;
    // Nobody waits for these pages: a waiting thread would not let its core sleep. How many batches they come in is the
    // sender's affair, so the room's end says that they are all here.
    let begin = Instant::now();
    let received = loop {
        std::thread::sleep(REST);
        match rooms.back.1.end.poll()? {
            Some(received) => {
                delivered(rooms.back.0, &received.ended)?;
                break received;
            }
            None if begin.elapsed() > WAIT => {
                return Err(Error::TimedOut { what: "waiting for single pages", limit: WAIT });
            }
            None => {}
        }
    };
    // With those for the end, which comes after the last page.
    let slept = Slept { times: progress_sleeps()? - before, batches: rooms.back.1.arrivals() };
    for page in 0..pass.pages() / 2 {
        rooms.send(side, page)?;
    }
    rooms.finish_after(side, Some(received))?;
    Ok(slept)
}

fn progress_sleeps() -> Result<u64, Error> {
    sleeps("crossdock").map_err(Error::io("counting the sleeps of the progress thread"))
}

/// Longer than a progress thread spins before it sleeps.
const REST: Duration = Duration::from_millis(2);
