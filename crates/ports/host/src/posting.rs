//! Ops are checked and handed to the medium, as much of each as it has room for.

use crossdock_transport::{Direction, Error, LaneId, LocalId, Op, RemoteId, Result, Shape, Token};

use crate::counters::HostCounters;
use crate::joined::{Joined, Phase, Short};
use crate::medium::{Ended, Medium, Move, Refusal, Registered, Ticket};
use crate::numbered::Numbered;

/// What all ops of one call of `post` share.
pub(crate) struct Posting<'a, M: Medium> {
    pub(crate) lane: LaneId,
    pub(crate) regions: &'a Numbered<Registered<M::Region>>,
    pub(crate) medium: &'a mut M,
    pub(crate) counters: &'a mut HostCounters,
    /// What this call has moved so far.
    pub(crate) moved_bytes: u64,
}

/// How far an op came.
pub(crate) enum Taken {
    Whole,
    /// Bytes of a span, pieces of a paged op.
    Part(u64),
}

/// What a short post left of an op. When the caller offers exactly this next, its lists need no second look as a whole,
/// which for a long list in many parts would cost more than the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rest {
    direction: Direction,
    local: LocalId,
    remote: RemoteId,
    offsets: [u64; 2],
    strides: [u64; 2],
    /// Where the two lists lie. Whatever they hold by then, the part that is copied is checked again.
    lists: [usize; 2],
    lengths: [u64; 2],
    piece_bytes: u64,
}

impl<M: Medium> Joined<M> {
    /// Does as much of an op as there is room for. Nothing of an op that is refused is done.
    pub(crate) fn take(&mut self, op: &Op<'_>, with: &mut Posting<'_, M>) -> Result<Taken> {
        // Room is for those, too, that are told when the moves before them are over.
        let (mut promised, mut tokens) = (0, 0);
        if !self.underway.is_empty() {
            if self.underway.is_full() {
                self.short = Some(Short::Moves);
                with.counters.short_by_moves += 1;
                return Ok(Taken::Part(0));
            }
            (promised, tokens) = (self.underway.immediates(), self.underway.tokens());
        }
        if op.imm.is_some() && !self.writer.has_room(promised).map_err(|_| self.spoiled(with.lane))? {
            self.short = Some(Short::Ring);
            with.counters.short_by_immediates += 1;
            return Ok(Taken::Part(0));
        }
        // Its capacity is its limit: the data path does not allocate.
        if op.token.is_some() && self.dones.len() + tokens >= self.dones.capacity() {
            with.counters.short_by_dones += 1;
            return Ok(Taken::Part(0));
        }
        let continues = self.rest.as_ref().is_some_and(|rest| *rest == Rest::of(op));
        self.rest = None;
        let bytes = op.bytes().ok_or(Error::BadOp { reason: "offsets overflow" })?;
        let mut ticket = Ticket::ENDED;
        if bytes == 0 {
            op.extents()?;
        } else {
            let part = Part::of(op, with.medium.room(&self.lane, op, with.moved_bytes));
            // The whole op is checked before its first byte moves; what is left of it, as far as it moves now.
            let ends = if continues { part.op.extents()? } else { op.extents()? };
            let moved;
            (moved, ticket) = self.move_bytes(&part, ends, with)?;
            if moved < part.count || part.bytes < bytes {
                if ticket != Ticket::ENDED {
                    self.underway.push(ticket, regions_of(op), None, None);
                }
                self.rest = Some(Rest::of(&op.advance(moved)));
                self.short = Some(Short::Budget);
                with.counters.short_by_bytes += 1;
                return Ok(Taken::Part(moved));
            }
        }
        if ticket != Ticket::ENDED {
            self.underway.push(ticket, regions_of(op), op.imm, op.token);
        } else if self.underway.is_empty() {
            self.tell(op.imm, op.token, with.counters);
        } else {
            self.underway.follow(op.imm, op.token);
        }
        Ok(Taken::Whole)
    }

    /// Tells the peer and the owner of an op whose bytes, and those of all before it, have moved.
    #[inline]
    fn tell(&mut self, imm: Option<u32>, token: Option<Token>, counters: &mut HostCounters) {
        if let Some(imm) = imm {
            self.writer.push(imm);
            counters.immediates_sent += 1;
        }
        if let Some(token) = token {
            self.dones.push_back(token);
        }
    }

    /// Looks which moves are over, and tells of them. What fails ends the lane, and is told to nobody.
    pub(crate) fn settle(&mut self, medium: &mut M, counters: &mut HostCounters) {
        let Ended { until, failed } = medium.ended(&mut self.lane);
        let sent_before = counters.immediates_sent;
        while let Some(over) = self.underway.take_over(until) {
            if failed.is_none_or(|(first, _)| over.ticket < first) {
                self.tell(over.imm, over.token, counters);
            }
        }
        if counters.immediates_sent > sent_before {
            self.wake_peer(counters);
        }
        if let Some((_, cause)) = failed {
            self.close(cause);
        }
        if self.is_closing() && self.underway.is_empty() {
            self.remote.clear();
        } else {
            self.remote.release_retired(&self.underway);
        }
    }

    fn spoiled(&mut self, lane: LaneId) -> Error {
        self.writer_broke();
        Error::LaneDown { lane }
    }

    /// Moves a part of an op, or begins to, or does nothing where the medium cannot at the moment; returns how much, as a
    /// short post counts it. `ends` are the furthest bytes on the two sides, of the part or of more than that.
    fn move_bytes(
        &mut self,
        part: &Part<'_>,
        ends: (u64, u64),
        with: &mut Posting<'_, M>,
    ) -> Result<(u64, Ticket)> {
        let (local, remote) = regions_of(&part.op);
        let local =
            with.regions.get(local.0).ok_or(Error::UnknownRegion { side: "local", region: local.0 })?;
        let (remote_bytes, remote) = self.remote.get(remote)?;
        check_end("local", ends.0, local.memory.bytes() as u64)?;
        check_end("remote", ends.1, remote_bytes)?;
        if part.bytes == 0 {
            return Ok((0, Ticket::ENDED));
        }
        let op = Move { op: &part.op, bytes: part.bytes, local, remote, peer: &self.peer };
        match with.medium.start(&mut self.lane, &op) {
            Ok(Some(ticket)) => {
                with.moved_bytes += part.bytes;
                Ok((part.count, ticket))
            }
            Ok(None) => Ok((0, Ticket::ENDED)),
            Err(Refusal::Op(error)) => Err(error),
            Err(Refusal::Lane(cause)) => {
                self.close(cause);
                Err(Error::LaneDown { lane: with.lane })
            }
        }
    }

    /// Wakes the peer if it sleeps: after the last op of a call.
    pub(crate) fn wake_peer(&mut self, counters: &mut HostCounters) {
        if self.writer.should_wake() {
            self.bell.ring();
            counters.wakes_sent += 1;
        }
    }

    /// Whether ops are taken.
    pub(crate) fn accepts(&self, lane: LaneId) -> Result<()> {
        match self.phase {
            Phase::Announcing { .. } => Err(Error::LaneNotUp { lane }),
            Phase::Up => Ok(()),
            Phase::Closing { .. } => Err(Error::LaneDown { lane }),
        }
    }
}

/// As much of an op as one call moves.
struct Part<'a> {
    op: Op<'a>,
    /// How long it is,
    bytes: u64,
    /// and the same as a short post counts it.
    count: u64,
}

impl<'a> Part<'a> {
    #[inline]
    fn of(op: &Op<'a>, room: u64) -> Self {
        let mut part = *op;
        let (bytes, count) = match &mut part.shape {
            Shape::Span { bytes, .. } => {
                *bytes = room.min(*bytes);
                (*bytes, *bytes)
            }
            Shape::Pages { local_pages, remote_pages, piece_bytes, .. } => {
                // Lists of different lengths are refused later.
                let pieces = room.min(local_pages.len().min(remote_pages.len()) as u64);
                *local_pages = &local_pages[..pieces as usize];
                *remote_pages = &remote_pages[..pieces as usize];
                (pieces * *piece_bytes, pieces)
            }
        };
        Self { op: part, bytes, count }
    }
}

impl Rest {
    fn of(op: &Op<'_>) -> Self {
        match op.shape {
            Shape::Span { local, local_offset, remote, remote_offset, bytes } => Self {
                direction: op.direction,
                local,
                remote,
                offsets: [local_offset, remote_offset],
                strides: [0, 0],
                lists: [0, 0],
                lengths: [bytes; 2],
                piece_bytes: 0,
            },
            Shape::Pages {
                local,
                local_offset,
                local_stride_bytes,
                local_pages,
                remote,
                remote_offset,
                remote_stride_bytes,
                remote_pages,
                piece_bytes,
            } => Self {
                direction: op.direction,
                local,
                remote,
                offsets: [local_offset, remote_offset],
                strides: [local_stride_bytes, remote_stride_bytes],
                lists: [local_pages.as_ptr().addr(), remote_pages.as_ptr().addr()],
                lengths: [local_pages.len() as u64, remote_pages.len() as u64],
                piece_bytes,
            },
        }
    }
}

fn regions_of(op: &Op<'_>) -> (LocalId, RemoteId) {
    match op.shape {
        Shape::Span { local, remote, .. } | Shape::Pages { local, remote, .. } => (local, remote),
    }
}

fn check_end(side: &'static str, end: u64, region_bytes: u64) -> Result<()> {
    if end > region_bytes { Err(Error::OutOfRange { side, end, region_bytes }) } else { Ok(()) }
}
