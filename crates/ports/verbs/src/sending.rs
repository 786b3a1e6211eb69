//! What a lane has asked its device to do: how ops become work requests, and how their ends are counted.
//!
//! The device is asked for few completions: of requests whose op has a token, of every so manieth, and of the last of
//! each post. A completion stands for all requests before it. The port counts itself how many are out, and never
//! offers the device more than it has room for.

use std::collections::VecDeque;

use crossdock_transport::{Direction, Error, LocalId, Op, Remainder, RemoteId, Result, Shape, Token};

use crate::address::Key;
use crate::domain::Domain;
use crate::ibverbs::chain::{Pieces, SendChain, Work};
use crate::ibverbs::objects::{MemoryRegion, QueuePair, send_id};

/// The sending side of a lane.
pub(crate) struct Sending {
    lane: u32,
    /// How many requests of ops may be out. A few more fit in the queue, for what the lane itself has to say.
    depth: u32,
    /// Requests posted and completed since the lane began; the lower 31 bits count.
    posted: u32,
    completed: u32,
    /// How many requests were posted since one that tells when it is done.
    silent: u32,
    /// By the number of the request that carries them.
    tokens: VecDeque<(u32, Token)>,
    /// Which region the requests up to that number use. Neighbours with one region are one entry.
    uses: VecDeque<(u32, LocalId)>,
    /// How many more immediates the peer has room for, and for how many when none is on its way.
    credits: u32,
    most_credits: u32,
    /// The peer's regions.
    attached: Vec<Key>,
    /// Where a paged op stopped for want of room: its lists need not be searched for pages outside again.
    stopped: Option<Remainder>,
    /// The last post came short.
    pub came_short: bool,
    /// It came short because the peer has no room for another immediate.
    wants_credits: bool,
}

/// What was taken of an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Whole,
    /// Bytes of a span, pieces of a paged op.
    Within(u64),
}

impl Sending {
    /// Of a lane that may have `depth` requests of ops out.
    pub fn new(lane: u32, depth: u32) -> Self {
        Self {
            lane,
            depth,
            posted: 0,
            completed: 0,
            silent: 0,
            tokens: VecDeque::with_capacity(depth as usize),
            uses: VecDeque::with_capacity(depth as usize),
            credits: 0,
            most_credits: 0,
            attached: Vec::new(),
            stopped: None,
            came_short: false,
            wants_credits: false,
        }
    }

    /// The peer has room for so many immediates.
    pub fn begin(&mut self, credits: u32) {
        (self.credits, self.most_credits) = (credits, credits);
    }

    /// The peer lets so many more immediates come; false if it cannot have heard as many.
    pub fn credit(&mut self, count: u32) -> bool {
        let sum = self.credits.saturating_add(count);
        let is_owed = sum <= self.most_credits;
        self.credits = if is_owed { sum } else { self.credits };
        is_owed
    }

    /// How many requests are out.
    pub fn out(&self) -> u32 {
        self.posted.wrapping_sub(self.completed) & NUMBERS
    }

    /// Whether a request that is out uses the region.
    pub fn uses(&self, region: LocalId) -> bool {
        self.uses.iter().any(|&(_, used)| used == region)
    }

    /// Whether a post that came short can come further now.
    pub fn has_room(&self) -> bool {
        self.out() <= self.depth / 2 && (!self.wants_credits || self.credits > 0)
    }

    /// The request with this number and all before it are done, or have come to nothing; false if it was not out.
    pub fn complete(&mut self, request: u32) -> bool {
        if !self.is_out(request) {
            return false;
        }
        self.completed = request.wrapping_add(1) & NUMBERS;
        while let Some(&(last, _)) = self.uses.front()
            && !self.is_out(last)
        {
            self.uses.pop_front();
        }
        true
    }

    /// The oldest token whose request is done.
    pub fn next_done(&mut self) -> Option<Token> {
        let &(request, token) = self.tokens.front()?;
        if self.is_out(request) {
            return None;
        }
        self.tokens.pop_front();
        Some(token)
    }

    fn is_out(&self, request: u32) -> bool {
        (request.wrapping_sub(self.completed) & NUMBERS) < self.out()
    }

    /// Forgets what was posted: the queue pair was reset.
    pub fn reset(&mut self) {
        self.completed = self.posted;
        self.silent = 0;
    }

    /// A name for a region of the peer.
    pub fn attach(&mut self, key: Key) -> Result<RemoteId> {
        let known = self.attached.iter().position(|attached| *attached == key);
        let at = match known {
            Some(at) => at,
            None if self.attached.len() == ATTACHED_MAX => {
                return Err(Error::Limit { what: "attached regions of a lane", limit: ATTACHED_MAX as u64 });
            }
            None => {
                self.attached.push(key);
                self.attached.len() - 1
            }
        };
        Ok(RemoteId(at as u32))
    }

    /// Makes requests of as much of an op as there is room for.
    pub fn take(&mut self, op: &Op<'_>, queue_pair: &QueuePair, domain: &mut Domain) -> Result<Taken> {
        if op.direction == Direction::Read && op.imm.is_some() {
            return Err(Error::BadOp { reason: "a read cannot carry an immediate" });
        }
        let resumed = self.stopped.take();
        self.wants_credits = false;
        let empty = match op.shape {
            Shape::Span { bytes, .. } => bytes == 0,
            Shape::Pages { piece_bytes, local_pages, .. } => {
                self.check_regions(op, resumed, domain)?;
                piece_bytes == 0 || local_pages.is_empty()
            }
        };
        if empty {
            return self.take_empty(op, queue_pair, domain);
        }
        if let Shape::Span { .. } = op.shape {
            self.check_regions(op, None, domain)?;
        }
        if op.imm.is_some() && self.credits == 0 {
            self.wants_credits = true;
            self.stopped = Remainder::of(op, 0);
            return Ok(Taken::Within(0));
        }
        let taken = match op.shape {
            Shape::Span { .. } => self.take_span(op, queue_pair, domain),
            Shape::Pages { .. } => self.take_pages(op, resumed.is_some(), queue_pair, domain),
        }?;
        match taken {
            Taken::Whole => self.end_op(op, &mut domain.chain),
            Taken::Within(within) => self.stopped = Remainder::of(op, within as usize),
        }
        Ok(taken)
    }

    /// Posts what [`take`](Sending::take) has left in the chain.
    pub fn flush(&mut self, queue_pair: &QueuePair, domain: &mut Domain) {
        if domain.chain.len() > 0 {
            domain.chain.signal_last();
            self.silent = 0;
            self.post(queue_pair, domain);
        }
    }

    /// Posts a request of the lane's own; false if there is no room for one.
    pub fn say(
        &mut self,
        work: Work,
        message: Option<(u64, u32)>,
        queue_pair: &QueuePair,
        domain: &mut Domain,
    ) -> bool {
        if self.out() >= self.depth + OWN_REQUESTS {
            return false;
        }
        let id = self.next_id();
        let message = message.map(|(offset, bytes)| (&domain.messages, offset, bytes));
        domain.chain.push_bare(id, work, message);
        self.flush(queue_pair, domain);
        true
    }

    fn post(&mut self, queue_pair: &QueuePair, domain: &mut Domain) {
        let offered = domain.chain.len();
        // After a request that the device did not take none may follow: the peer would miss what it does not know of.
        let taken = if domain.post_failed.is_some() {
            domain.chain.clear();
            0
        } else if let Err((taken, failed)) = queue_pair.post(&mut domain.chain) {
            // Should this fail, nothing is posted any more all the same, and destroying the queue pair does the rest.
            let _ = queue_pair.to_error();
            domain.post_failed = Some(failed);
            taken
        } else {
            offered
        };
        domain.counters.requests += taken as u64;
        // What was not taken never ends: it must not be waited for.
        self.posted = self.posted.wrapping_sub((offered - taken) as u32) & NUMBERS;
    }

    #[inline]
    fn next_id(&mut self) -> u64 {
        let id = send_id(self.lane, self.posted);
        self.posted = self.posted.wrapping_add(1) & NUMBERS;
        self.silent += 1;
        id
    }

    /// How many more requests of ops may go out.
    fn room(&self) -> u64 {
        u64::from(self.depth.saturating_sub(self.out()))
    }

    /// The last request of an op carries what the op carries.
    fn end_op(&mut self, op: &Op<'_>, chain: &mut SendChain) {
        if let Some(imm) = op.imm {
            chain.set_last(Work::WriteWithImm(imm));
            self.credits -= 1;
        }
        if let Some(token) = op.token {
            self.tokens.push_back((self.posted.wrapping_sub(1) & NUMBERS, token));
            chain.signal_last();
            self.silent = 0;
        }
    }

    /// An op without bytes: a notification, a token, or nothing at all.
    fn take_empty(&mut self, op: &Op<'_>, queue_pair: &QueuePair, domain: &mut Domain) -> Result<Taken> {
        if op.imm.is_none() && op.token.is_none() {
            return Ok(Taken::Whole);
        }
        if self.room() == 0 || op.imm.is_some() && self.credits == 0 {
            self.wants_credits = self.credits == 0;
            return Ok(Taken::Within(0));
        }
        self.make_place(queue_pair, domain);
        let id = self.next_id();
        domain.chain.push_bare(id, Work::Write, None);
        self.end_op(op, &mut domain.chain);
        Ok(Taken::Whole)
    }

    fn take_span(&mut self, op: &Op<'_>, queue_pair: &QueuePair, domain: &mut Domain) -> Result<Taken> {
        let Shape::Span { local, local_offset, remote, remote_offset, bytes } = op.shape else {
            unreachable!("pages were taken for a span")
        };
        let mut at = 0;
        while at < bytes {
            if self.room() == 0 {
                return Ok(Taken::Within(at));
            }
            let piece_bytes = (bytes - at).min(u64::from(domain.request_bytes));
            self.make_place(queue_pair, domain);
            let id = self.next_id();
            let Domain { regions, chain, .. } = domain;
            let region = regions.get(local.0).expect("the region was looked up");
            let of = self.pieces(op.direction, region, remote, piece_bytes as u32, queue_pair);
            chain.push_piece(id, &of, local_offset + at, remote_offset + at);
            at += piece_bytes;
            self.signal_now_and_then(chain);
            self.note_use(local);
        }
        Ok(Taken::Whole)
    }

    fn take_pages(
        &mut self,
        op: &Op<'_>,
        resumed: bool,
        queue_pair: &QueuePair,
        domain: &mut Domain,
    ) -> Result<Taken> {
        let Shape::Pages {
            local,
            local_offset,
            local_stride_bytes,
            local_pages,
            remote,
            remote_offset,
            remote_stride_bytes,
            remote_pages,
            piece_bytes,
        } = op.shape
        else {
            unreachable!("a span was taken for pages")
        };
        let limit = u64::from(domain.request_bytes);
        let parts = piece_bytes.div_ceil(limit);
        if parts > u64::from(self.depth) {
            return Err(Error::BadOp { reason: "a piece is longer than a lane's queue carries" });
        }
        let pieces = (self.room() / parts).min(local_pages.len() as u64) as usize;
        let (from, to) = (&local_pages[..pieces], &remote_pages[..pieces]);
        if resumed {
            // The lists were searched as a whole before; the caller may have changed them since.
            let head = Op { shape: shape_of(op, from, to), ..*op };
            self.check_extents(&head, domain)?;
        }
        if parts > 1 {
            for (&here, &there) in from.iter().zip(to) {
                let mut at = 0;
                while at < piece_bytes {
                    let part = (piece_bytes - at).min(limit);
                    self.make_place(queue_pair, domain);
                    let id = self.next_id();
                    let Domain { regions, chain, .. } = domain;
                    let region = regions.get(local.0).expect("the region was looked up");
                    let of = self.pieces(op.direction, region, remote, part as u32, queue_pair);
                    let (here, there) = (u64::from(here), u64::from(there));
                    chain.push_piece(
                        id,
                        &of,
                        local_offset + here * local_stride_bytes + at,
                        remote_offset + there * remote_stride_bytes + at,
                    );
                    at += part;
                    self.signal_now_and_then(chain);
                }
            }
        } else {
            let mut done = 0;
            while done < pieces {
                self.make_place(queue_pair, domain);
                let Domain { regions, chain, .. } = domain;
                let region = regions.get(local.0).expect("the region was looked up");
                let of = self.pieces(op.direction, region, remote, piece_bytes as u32, queue_pair);
                let end = pieces.min(done + chain.room());
                for (&here, &there) in from[done..end].iter().zip(&to[done..end]) {
                    let id = self.next_id();
                    let here = local_offset + u64::from(here) * local_stride_bytes;
                    let there = remote_offset + u64::from(there) * remote_stride_bytes;
                    chain.push_piece(id, &of, here, there);
                    self.signal_now_and_then(chain);
                }
                done = end;
            }
        }
        if pieces > 0 {
            self.note_use(local);
        }
        match pieces == local_pages.len() {
            true => Ok(Taken::Whole),
            false => Ok(Taken::Within(pieces as u64)),
        }
    }

    /// What the requests of an op have in common. Region and attachment were looked up before.
    fn pieces<'a>(
        &self,
        direction: Direction,
        region: &'a MemoryRegion,
        remote: RemoteId,
        piece_bytes: u32,
        queue_pair: &QueuePair,
    ) -> Pieces<'a> {
        let attached = &self.attached[remote.0 as usize];
        let read = direction == Direction::Read;
        Pieces::new(region, attached.base, attached.key, piece_bytes, read, queue_pair.inline_bytes)
    }

    /// Posts a chain that is full. The last request stays in the chain as long as it may be the last of all.
    #[inline]
    fn make_place(&mut self, queue_pair: &QueuePair, domain: &mut Domain) {
        if domain.chain.room() == 0 {
            self.post(queue_pair, domain);
        }
    }

    #[inline]
    fn signal_now_and_then(&mut self, chain: &mut SendChain) {
        if self.silent >= SILENT_MAX.min(self.depth.div_ceil(4)) {
            chain.signal_last();
            self.silent = 0;
        }
    }

    fn note_use(&mut self, region: LocalId) {
        let last = self.posted.wrapping_sub(1) & NUMBERS;
        match self.uses.back_mut() {
            Some((until, used)) if *used == region => *until = last,
            _ => self.uses.push_back((last, region)),
        }
    }

    /// Whether an op keeps to its regions. One that was stopped was looked at before.
    fn check_regions(&self, op: &Op<'_>, resumed: Option<Remainder>, domain: &Domain) -> Result<()> {
        if resumed.is_some() && resumed == Remainder::of(op, 0) {
            return Ok(());
        }
        self.check_extents(op, domain)
    }

    fn check_extents(&self, op: &Op<'_>, domain: &Domain) -> Result<()> {
        let (local_end, remote_end) = op.extents()?;
        let (local, remote) = match op.shape {
            Shape::Span { local, remote, .. } | Shape::Pages { local, remote, .. } => (local, remote),
        };
        let region = domain.regions.get(local.0);
        let region = region.ok_or(Error::UnknownRegion { side: "local", region: local.0 })?;
        let attached = self.attached.get(remote.0 as usize);
        let attached = attached.ok_or(Error::UnknownRegion { side: "remote", region: remote.0 })?;
        for (side, end, region_bytes) in
            [("local", local_end, region.bytes()), ("remote", remote_end, attached.bytes)]
        {
            if end > region_bytes {
                return Err(Error::OutOfRange { side, end, region_bytes });
            }
        }
        Ok(())
    }
}

/// The same pages op with other lists.
fn shape_of<'a>(op: &Op<'a>, local: &'a [u32], remote: &'a [u32]) -> Shape<'a> {
    let mut shape = op.shape;
    if let Shape::Pages { local_pages, remote_pages, .. } = &mut shape {
        (*local_pages, *remote_pages) = (local, remote);
    }
    shape
}

/// Requests are numbered by 31 bits.
const NUMBERS: u32 = (1 << 31) - 1;
/// How many requests of its own a lane may have out beside those of ops: a hello, a bye, credits, a sign of life.
pub(crate) const OWN_REQUESTS: u32 = 8;
/// At least every so manieth request tells when it is done.
const SILENT_MAX: u32 = 256;
/// How many regions of its peer a lane knows.
const ATTACHED_MAX: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever gives back what it has not taken floods the queue of receives with its words.
    #[test]
    fn no_more_credits_are_taken_than_were_used() {
        let mut sending = Sending::new(0, 16);
        sending.begin(8);
        assert!(!sending.credit(1));
        sending.credits -= 3;
        assert!(!sending.credit(4) && !sending.credit(u32::MAX) && sending.credit(2) && sending.credit(1));
        assert!(!sending.credit(1));
        assert_eq!(sending.credits, 8);
    }
}
