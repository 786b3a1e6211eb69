//! The rooms of a pass, as the side that measures moves them through the library.

use std::time::Instant;

use crossdock::{Ended, PageRef, Peer, ReceiveRequest, Received, Receiving, SendRequest, Sending};

use crate::error::Error;
use crate::options::OpName;
use crate::setup::{Clock, Lists, Side, WAIT, rooms};
use crate::talk::Pass;
use crate::target::delivered;
use crate::ways::Timed;

/// A room that this side moves.
pub enum Moving {
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
    /// All rooms of a pass, opened here as far as that can be done before they move.
    pub fn open(side: &mut Side, peer: Peer, pass: &Pass, lists: &Lists) -> Result<Vec<Self>, Error> {
        let write = side.setup.op == OpName::Write;
        let deadline = WAIT;
        let mut all = Vec::with_capacity(pass.rooms.len());
        for (room, pages) in rooms(pass, if write { &lists.from } else { &lists.to }) {
            let tokens = side.setup.tokens(pages.len() as u32);
            let pages = side.adopt(pages)?;
            all.push(match write {
                true => {
                    let pages = pages.share();
                    let request = SendRequest { room, use_count: 0, tokens, pages: pages.clone(), deadline };
                    Moving::Sending { room, sending: side.driver.handle().open(request)?, _pages: pages }
                }
                false => Moving::Wanted(Some(ReceiveRequest {
                    peer,
                    room,
                    use_count: 0,
                    tokens,
                    skip_tokens: 0,
                    pages,
                    deadline,
                })),
            });
        }
        Ok(all)
    }

    /// Moves the rooms, so many at once. The clock runs from the first begun until the last has ended.
    pub fn all(rooms: Vec<Self>, side: &mut Side, in_flight: usize) -> Result<Timed, Error> {
        let count = rooms.len();
        let mut waiting = rooms.into_iter();
        let mut moving: Vec<(Instant, Moving)> = Vec::with_capacity(in_flight);
        let mut room_us = Vec::with_capacity(count);
        let mut kept = Vec::with_capacity(count);
        let clock = Clock::start();
        for mut room in waiting.by_ref().take(in_flight) {
            let begin = Instant::now();
            room.begin(side)?;
            moving.push((begin, room));
        }
        while !moving.is_empty() {
            let at = side.driver.until("waiting for a room", WAIT, || ended(&mut moving))?;
            let (begin, room) = moving.swap_remove(at);
            room_us.push(begin.elapsed().as_secs_f64() * 1e6);
            kept.push(room);
            if let Some(mut room) = waiting.next() {
                let begin = Instant::now();
                room.begin(side)?;
                moving.push((begin, room));
            }
        }
        let (seconds, cpu_here_s) = (clock.seconds(), clock.cpu_s());
        // Giving the pages back is not part of the move.
        drop(kept);
        Ok(Timed { seconds, cpu_here_s, cpu_there_s: 0.0, room_us })
    }

    /// Gives it to the library.
    pub fn begin(&mut self, side: &Side) -> Result<(), Error> {
        match self {
            Moving::Sending { sending, .. } => {
                sending.send_layers(0..side.setup.layers)?;
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

    /// Whether it was delivered; any other end is an error.
    pub fn has_ended(&mut self) -> Result<bool, Error> {
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

/// One of the rooms that has ended, if any.
fn ended(moving: &mut [(Instant, Moving)]) -> Result<Option<usize>, Error> {
    for (at, (_, room)) in moving.iter_mut().enumerate() {
        if room.has_ended()? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}
