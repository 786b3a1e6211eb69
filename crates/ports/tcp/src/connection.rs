//! One lane that is up: its socket, what goes out and what comes in.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use crossdock_transport::{DownCause, Event, Events, GrantId, LaneId, LocalId, PeerId, Remainder, Token};
use rustix::io::Errno;

use crate::domain::{Counters, Domain};
use crate::frame::{Frame, Hello, misbehaved};
use crate::receive::{Inbox, TURN_BYTES_MAX};
use crate::requests::{REQUESTS_MAX, Requests};
use crate::vectored::{Gather, Payload, Sent, discard};

/// The connected state of a lane. Sending is in `send`, receiving in `receive`; this file is about turns and ends.
pub(crate) struct Connection {
    pub lane: LaneId,
    pub peer: PeerId,
    pub socket: OwnedFd,
    /// The nonce of the peer's port: the one that keys of its regions carry.
    pub peer_nonce: u64,
    /// The peer's regions; a `RemoteId` is a place in here.
    pub attached: Vec<AttachedRegion>,
    /// Whether `Up` was said.
    pub announced: bool,
    /// The socket may have something to read: told by epoll, taken back when a read came short.
    pub readable: bool,
    /// The socket may have room: told by epoll, taken back when a send came short.
    pub writable: bool,
    /// The end of the stream may be behind the bytes that wait, so that a read which came short does not mean that
    /// there is nothing left to read: epoll told of the end, and will not again. True at the beginning, when an end
    /// may have been told while the greeting was still awaited.
    pub end_may_wait: bool,
    /// The last turn ended with work left, for want of room for events or because it had had its share.
    pub unfinished: bool,

    pub(crate) gather: Gather,
    /// A post that came short, and would go on where it stopped.
    pub(crate) continuation: Option<Remainder>,
    /// Tokens that wait for their op's end, in order.
    pub(crate) dones: VecDeque<WaitingToken>,
    /// Sending failed. The lane ends when what had arrived before is read: the peer's last words may explain it.
    pub(crate) send_failed: Option<DownCause>,
    close_queued: bool,

    /// The last post came short, and there has been no room since.
    pub(crate) came_short: bool,

    /// What we have asked the peer for.
    pub(crate) asked: Requests,
    /// How many requests were sent and how many were answered in full.
    pub(crate) reads_asked: u64,
    pub(crate) reads_landed: u64,
    /// How many requests the peer keeps.
    pub(crate) asked_max: usize,
    /// What the peer has asked us for.
    pub(crate) owed: Requests,
    pub(crate) inbox: Inbox,
}

/// A region of the peer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttachedRegion {
    pub region: u32,
    pub bytes: u64,
}

/// A token, said when the stream has come as far and as many reads have landed.
pub(crate) struct WaitingToken {
    pub token: Token,
    pub sent: u64,
    pub reads: u64,
}

/// What became of a closing lane.
#[derive(PartialEq, Eq)]
pub(crate) enum Farewell {
    /// Something is still to be sent.
    NotYet,
    /// Everything is with the kernel; the peer has not answered yet.
    Said,
    /// The connection is gone.
    Gone,
}

impl Connection {
    pub fn new(lane: LaneId, peer: PeerId, socket: OwnedFd, hello: &Hello) -> Box<Self> {
        Box::new(Self {
            lane,
            peer,
            socket,
            peer_nonce: hello.nonce,
            attached: Vec::new(),
            announced: false,
            readable: true,
            writable: true,
            end_may_wait: true,
            unfinished: false,
            gather: Gather::new(),
            continuation: None,
            dones: VecDeque::with_capacity(TOKENS_MAX),
            send_failed: None,
            close_queued: false,
            came_short: false,
            asked: Requests::new(),
            reads_asked: 0,
            reads_landed: 0,
            asked_max: hello.requests_max.min(REQUESTS_MAX) as usize,
            owed: Requests::new(),
            inbox: Inbox::new(),
        })
    }

    /// Does what there is to do, within bounds: receives, answers, sends, and reports.
    pub fn turn(&mut self, domain: &mut Domain, events: &mut Events) -> Result<(), DownCause> {
        if !self.announced {
            if events.is_full() {
                return Ok(());
            }
            events.push(Event::Up { lane: self.lane });
            self.announced = true;
        }
        self.unfinished = false;
        let received = self.receive(domain, events);
        if received.is_ok() {
            self.transmit(domain);
        }
        self.report(events);
        received?;
        if self.came_short && self.has_room(domain) {
            self.came_short = false;
            domain.room_made = true;
        }
        match self.send_failed {
            Some(cause) if !self.unfinished => Err(cause),
            _ => Ok(()),
        }
    }

    /// Whether the next turn has something to do without a word from the kernel.
    pub fn wants_turn(&self) -> bool {
        self.unfinished
            || !self.announced
            || self.send_failed.is_some()
            || self.next_token_is_done()
            || (self.writable && !(self.gather.is_empty() && self.owed.is_empty()))
    }

    /// Answers the peer's requests and sends what is queued, until the socket is full or this turn had its share.
    pub(crate) fn transmit(&mut self, domain: &mut Domain) {
        let begun = self.gather.sent();
        while self.send_failed.is_none() && self.gather.sent() - begun < TURN_BYTES_MAX {
            self.queue_replies(domain.send_queue_bytes / 2);
            if self.gather.is_empty() || !self.writable {
                return;
            }
            self.flush(domain);
        }
    }

    /// Sends what is queued, until the socket is full.
    pub(crate) fn flush(&mut self, domain: &mut Domain) {
        while !self.gather.is_empty() && self.writable {
            let before = self.gather.sent();
            domain.counters.send_calls += 1;
            match self.gather.send(self.socket.as_fd()) {
                Ok(Sent::All) => {}
                Ok(Sent::Part) | Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(code) => {
                    self.writable = false;
                    self.readable = true;
                    self.send_failed =
                        Some(DownCause::Broken { call: "sendmsg", errno: code.raw_os_error() });
                }
            }
            domain.counters.bytes_sent += self.gather.sent() - before;
        }
    }

    /// Queues replies while less than `bytes_max` bytes wait: replies and posts share the queue.
    fn queue_replies(&mut self, bytes_max: u64) {
        while let Some(request) = self.owed.front() {
            if self.gather.room().is_none_or(|pages| pages < request.places().pages.len())
                || self.gather.queued() - self.gather.sent() >= bytes_max
            {
                return;
            }
            let places = request.places();
            let head = Frame::Reply { request: request.number, bytes: places.bytes() }.encode();
            let payload = Payload {
                memory: request.memory(),
                region: request.region,
                grant: Some(request.grant),
                places,
            };
            self.gather.queue(&head, &[], Some(payload));
            self.owed.pop();
        }
    }

    /// Says the tokens whose ops are done.
    fn report(&mut self, events: &mut Events) {
        while self.next_token_is_done() && !events.is_full() {
            let done = self.dones.pop_front().expect("there is a next token");
            events.push(Event::Done { lane: self.lane, token: done.token });
        }
    }

    fn next_token_is_done(&self) -> bool {
        self.dones
            .front()
            .is_some_and(|next| next.sent <= self.gather.sent() && next.reads <= self.reads_landed)
    }

    /// Whether an op of this lane, or a request of its peer, still uses the region.
    pub fn uses(&self, region: LocalId) -> bool {
        self.gather.uses(region)
            || self.asked.iter().any(|request| request.region == region)
            || self.owed.iter().any(|request| request.region == region)
    }

    /// Keeps every further byte of writes under this grant from landing. A peer whose read is under way has lost
    /// the right to the bytes that were not sent yet, and nobody can tell it what to do with half a reply.
    pub fn revoke(&mut self, grant: GrantId, counters: &mut Counters) -> Result<(), DownCause> {
        if let Some(bytes) = self.inbox.revoke(grant) {
            counters.count_stale(bytes);
        }
        if self.owed.iter().any(|request| request.grant == grant) || self.gather.reads_under(grant) {
            return Err(misbehaved("it was reading when the grant was revoked"));
        }
        Ok(())
    }

    /// From now on nothing that comes in lands, nothing is asked and nothing is answered.
    pub fn begin_close(&mut self) {
        self.inbox.stop();
        self.asked.clear();
        self.owed.clear();
    }

    /// Sends what is left and a last frame; reports the tokens that are done by then.
    pub fn turn_closing(&mut self, domain: &mut Domain, events: &mut Events) -> Farewell {
        self.unfinished = false;
        let gone = self.readable && self.drain();
        loop {
            if !self.close_queued && self.gather.room().is_some() {
                self.gather.queue(&Frame::Close.encode(), &[], None);
                self.close_queued = true;
            }
            self.flush(domain);
            if !self.writable || self.close_queued {
                break;
            }
        }
        self.report(events);
        if gone || self.send_failed.is_some() {
            Farewell::Gone
        } else if self.close_queued && self.gather.is_empty() {
            Farewell::Said
        } else {
            Farewell::NotYet
        }
    }

    /// Throws away what comes in, so that a peer in the middle of a send comes to read our last frame. True when
    /// the stream has ended.
    fn drain(&mut self) -> bool {
        let (drained, ended) = drain(&self.socket);
        self.readable = !drained;
        self.unfinished = !drained;
        ended
    }
}

/// Throws away what came in, within bounds. Says whether there was no more, and whether the stream has ended.
pub(crate) fn drain(socket: &OwnedFd) -> (bool, bool) {
    for _ in 0..DRAIN_CALLS_MAX {
        match discard(socket.as_fd(), u64::MAX) {
            Ok(0) => return (true, true),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return (true, false),
            Err(_) => return (true, true),
        }
    }
    (false, false)
}

/// How many tokens of one lane wait for their end or for being heard.
pub(crate) const TOKENS_MAX: usize = 1024;
const DRAIN_CALLS_MAX: usize = 16;
