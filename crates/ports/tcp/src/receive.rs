//! The incoming half of a connection: from the stream of frames to bytes in their places and events.

use std::os::fd::AsFd;

use crossdock_transport::{Access, DownCause, Event, Events, GrantId, LocalId, PeerId, Refusal};
use rustix::io::Errno;

use crate::connection::Connection;
use crate::domain::Domain;
use crate::frame::{Extent, Frame, HEAD_BYTES, PROLOGUE_BYTES_MAX, misbehaved};
use crate::requests::Requests;
use crate::vectored::{Places, Scatter, discard};

/// Bytes that came in and were not used yet, and the payload that is coming in.
pub(crate) struct Inbox {
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
    body: Option<Body>,
    scatter: Scatter,
    /// How much to read beyond a payload. Frames come in rows of equal shape, so the last one foretells the next:
    /// its head and list exactly, if it was long, so that no byte of the payload behind them needs to be copied; as
    /// much as the buffer takes, if it was short, so that many frames come in one call.
    ahead_bytes: usize,
    /// The list of the frame that is being read.
    pages: Box<[u32]>,
}

/// A payload that is coming in.
enum Body {
    /// A write, into the places of `scatter`.
    Write { grant: GrantId, imm: Option<u32> },
    /// A write whose grant is gone; so many bytes are still to come.
    Discard { left: u64, imm: Option<u32> },
    /// The answer to our oldest request, into the places of `scatter`.
    Reply,
}

/// Why the buffer could not be used up.
enum Stop {
    /// The next frame is not complete; so many bytes must be in the buffer to go on.
    Wants { bytes: usize },
    /// There is no room for another event.
    EventsFull,
}

impl Inbox {
    pub fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER_BYTES].into(),
            from: 0,
            to: 0,
            body: None,
            scatter: Scatter::new(),
            ahead_bytes: BUFFER_BYTES,
            pages: vec![0; crate::frame::FRAME_PAGES_MAX].into(),
        }
    }

    /// Turns a write under this grant away from its places, in the middle of its payload. Says how many bytes will
    /// not land; `None` if no such write is under way.
    pub fn revoke(&mut self, revoked: GrantId) -> Option<u64> {
        match self.body {
            Some(Body::Write { grant, imm }) if grant == revoked && self.scatter.left() > 0 => {
                let left = self.scatter.left();
                self.body = Some(Body::Discard { left, imm });
                self.scatter.clear();
                Some(left)
            }
            _ => None,
        }
    }

    /// Forgets everything: nothing lands any more.
    pub fn stop(&mut self) {
        self.body = None;
        self.scatter.clear();
        (self.from, self.to) = (0, 0);
    }

    fn buffered(&self) -> &[u8] {
        &self.buffer[self.from..self.to]
    }
}

impl Connection {
    /// Reads until the socket is empty, the events are full or this turn had its share.
    pub(crate) fn receive(&mut self, domain: &mut Domain, events: &mut Events) -> Result<(), DownCause> {
        let mut bytes_left = TURN_BYTES_MAX;
        for _ in 0..TURN_CALLS_MAX {
            let wanted = match self.digest(domain, events)? {
                Stop::Wants { bytes } => bytes,
                Stop::EventsFull => {
                    self.unfinished = true;
                    return Ok(());
                }
            };
            if !self.readable {
                return Ok(());
            }
            domain.counters.receive_calls += 1;
            let (asked, answer) = self.read(wanted);
            let bytes = match answer {
                Ok(0) => return Err(DownCause::Broken { call: "readv", errno: 0 }),
                Ok(bytes) => bytes,
                Err(Errno::AGAIN) => {
                    (self.readable, self.end_may_wait) = (false, false);
                    return Ok(());
                }
                Err(Errno::INTR) => continue,
                Err(code) => return Err(DownCause::Broken { call: "readv", errno: code.raw_os_error() }),
            };
            domain.counters.bytes_received += bytes as u64;
            // A read that comes short has emptied the socket, and what comes next is a new edge for epoll.
            if (bytes as u64) < asked && !self.end_may_wait {
                self.readable = false;
            }
            bytes_left = bytes_left.saturating_sub(bytes as u64);
            if bytes_left == 0 {
                break;
            }
        }
        self.unfinished = !matches!(self.digest(domain, events)?, Stop::Wants { .. }) || self.readable;
        Ok(())
    }

    /// One read from the socket: the payload that is under way into its places, then so much of what follows that
    /// the buffer holds `wanted` bytes, or more where that pays. Says how much was asked for.
    fn read(&mut self, wanted: usize) -> (u64, Result<usize, Errno>) {
        let inbox = &mut self.inbox;
        if let Some(Body::Discard { left, .. }) = &mut inbox.body {
            let asked = *left;
            let answer = discard(self.socket.as_fd(), asked);
            if let Ok(bytes) = answer {
                *left -= bytes as u64;
            }
            // `discard` has a limit of its own, so coming short means nothing here: an empty read will tell.
            return (0, answer);
        }
        if inbox.from == inbox.to {
            (inbox.from, inbox.to) = (0, 0);
        } else if inbox.from > 0 {
            // What is left over is the beginning of a head or list, a few kilobytes at most.
            inbox.buffer.copy_within(inbox.from..inbox.to, 0);
            (inbox.from, inbox.to) = (0, inbox.to - inbox.from);
        }
        let end = wanted.max(inbox.ahead_bytes).max(inbox.to + 1).min(BUFFER_BYTES);
        let landing = inbox.scatter.left();
        let beyond = &mut inbox.buffer[inbox.to..end];
        let asked = landing + beyond.len() as u64;
        let answer = inbox.scatter.receive(self.socket.as_fd(), beyond);
        if let Ok(bytes) = answer {
            inbox.to += (bytes as u64).saturating_sub(landing) as usize;
        }
        (asked, answer)
    }

    /// Uses what is in the buffer: ends payloads, tells of them, begins new ones.
    fn digest(&mut self, domain: &mut Domain, events: &mut Events) -> Result<Stop, DownCause> {
        loop {
            if let Some(stop) = self.finish_body(events) {
                return Ok(stop);
            }
            let inbox = &mut self.inbox;
            let Some(head) = inbox.buffered().first_chunk::<HEAD_BYTES>() else {
                return Ok(Stop::Wants { bytes: HEAD_BYTES });
            };
            let frame = Frame::decode(head)?;
            let prologue = HEAD_BYTES + frame.list_bytes();
            if inbox.buffered().len() < prologue {
                return Ok(Stop::Wants { bytes: prologue });
            }
            if matches!(frame, Frame::Notify { .. }) && events.is_full() {
                return Ok(Stop::EventsFull);
            }
            let list = &inbox.buffer[inbox.from + HEAD_BYTES..inbox.from + prologue];
            for (page, bytes) in inbox.pages.iter_mut().zip(list.chunks_exact(4)) {
                *page = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
            }
            inbox.from += prologue;
            let payload_bytes = match frame {
                Frame::Write { extent, imm } => {
                    self.inbox.body = Some(self.inbox.begin_write(self.peer, &extent, imm, domain)?);
                    extent.bytes()
                }
                Frame::Read { extent, request } => {
                    self.inbox.take_request(self.peer, &extent, request, domain, &mut self.owed)?;
                    0
                }
                Frame::Reply { request, bytes } => {
                    let asked = self.asked.front().filter(|asked| asked.number == request);
                    let asked = asked.filter(|asked| asked.places().bytes() == bytes);
                    let asked = asked.ok_or(misbehaved("a reply to no request"))?;
                    self.inbox.scatter.begin(asked.memory());
                    self.inbox.scatter.push_all(asked.places()).expect("the op was checked");
                    self.inbox.body = Some(Body::Reply);
                    bytes
                }
                Frame::Notify { imm } => {
                    events.push(Event::Arrived { lane: self.lane, imm });
                    0
                }
                Frame::Close => return Err(DownCause::ClosedByPeer),
            };
            self.inbox.ahead_bytes =
                if payload_bytes <= SHORT_PAYLOAD_BYTES { BUFFER_BYTES } else { prologue };
        }
    }

    /// Gives the payload that is under way what the buffer has of it, and tells of it when it is complete.
    fn finish_body(&mut self, events: &mut Events) -> Option<Stop> {
        let inbox = &mut self.inbox;
        let buffered = &inbox.buffer[inbox.from..inbox.to];
        let more = Some(Stop::Wants { bytes: 0 });
        let imm = match inbox.body.as_mut()? {
            Body::Write { imm, .. } => {
                inbox.from += inbox.scatter.copy_in(buffered);
                if inbox.scatter.left() > 0 {
                    return more;
                }
                *imm
            }
            Body::Reply => {
                inbox.from += inbox.scatter.copy_in(buffered);
                if inbox.scatter.left() > 0 {
                    return more;
                }
                self.asked.pop();
                self.reads_landed += 1;
                None
            }
            Body::Discard { left, imm } => {
                let dropped = buffered.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                inbox.from += dropped;
                *left -= dropped as u64;
                if *left > 0 {
                    return more;
                }
                *imm
            }
        };
        if let Some(imm) = imm {
            if events.is_full() {
                return Some(Stop::EventsFull);
            }
            events.push(Event::Arrived { lane: self.lane, imm });
        }
        inbox.body = None;
        None
    }
}

impl Inbox {
    /// Checks a write, every piece of it, before its first byte lands.
    fn begin_write(
        &mut self,
        peer: PeerId,
        extent: &Extent,
        imm: Option<u32>,
        domain: &mut Domain,
    ) -> Result<Body, DownCause> {
        let mut places = extent.places(&self.pages);
        let region = LocalId(extent.region);
        // An unknown region is refused by the check, unless the grant itself is unknown: then nothing lands.
        let memory = domain.regions.get(region.0);
        if let Some(memory) = memory {
            self.scatter.begin(memory);
        }
        let landed = places.try_for_each(|offset| {
            let offset = offset.ok_or(Refusal::Forbidden { what: BEYOND })?;
            domain.grants.check(extent.grant, peer, Access::Write, region, offset, extent.piece_bytes)?;
            self.scatter.push(offset, extent.piece_bytes).map_err(|_| Refusal::Forbidden { what: BEYOND })
        });
        match landed {
            Ok(()) => Ok(Body::Write { grant: extent.grant, imm }),
            Err(Refusal::Stale) => {
                self.scatter.clear();
                domain.counters.count_stale(extent.bytes());
                Ok(Body::Discard { left: extent.bytes(), imm })
            }
            Err(Refusal::Forbidden { what }) => Err(misbehaved(what)),
        }
    }

    /// Checks a read request, every piece of it, and puts it in the queue.
    fn take_request(
        &mut self,
        peer: PeerId,
        extent: &Extent,
        number: u32,
        domain: &mut Domain,
        owed: &mut Requests,
    ) -> Result<(), DownCause> {
        if owed.is_full() {
            return Err(misbehaved("more read requests than it was told to send"));
        }
        let region = LocalId(extent.region);
        for offset in extent.places(&self.pages) {
            let offset = offset.ok_or(misbehaved(BEYOND))?;
            match domain.grants.check(extent.grant, peer, Access::Read, region, offset, extent.piece_bytes) {
                Ok(()) => {}
                // A source takes the grant back only after the reader has given it back.
                Err(Refusal::Stale) => return Err(misbehaved("a read under a grant that is gone")),
                Err(Refusal::Forbidden { what }) => return Err(misbehaved(what)),
            }
        }
        let memory = domain.regions.get(region.0).ok_or(misbehaved("a read from an unknown region"))?;
        let pages = if extent.pages == 0 { &[0][..] } else { &self.pages[..usize::from(extent.pages)] };
        let places = Places {
            offset: extent.offset,
            stride_bytes: extent.stride_bytes,
            piece_bytes: extent.piece_bytes,
            pages,
        };
        owed.push(memory, region, extent.grant, number, places);
        Ok(())
    }
}

impl Extent {
    /// Where each piece begins; `None` for one that begins beyond the last byte of any region.
    fn places<'a>(&'a self, list: &'a [u32]) -> impl Iterator<Item = Option<u64>> + 'a {
        let pages = if self.pages == 0 { &[0][..] } else { &list[..usize::from(self.pages)] };
        pages.iter().map(|&page| self.stride_bytes.checked_mul(u64::from(page))?.checked_add(self.offset))
    }
}

const BEYOND: &str = "an access beyond the end of the address space";
const BUFFER_BYTES: usize = 32 << 10;
const _: () = assert!(PROLOGUE_BYTES_MAX < BUFFER_BYTES);
/// Up to this length of payload, copying it once more costs less than a call of its own.
const SHORT_PAYLOAD_BYTES: u64 = 8 << 10;
/// After so many bytes or calls it is another lane's turn.
pub(crate) const TURN_BYTES_MAX: u64 = 4 << 20;
const TURN_CALLS_MAX: usize = 64;
