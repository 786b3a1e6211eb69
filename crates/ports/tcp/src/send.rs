//! The outgoing half of a connection: from ops to frames in the queue, and from there to the socket.

use crossdock_memory::Memory;
use crossdock_transport::{Direction, Error, GrantId, LocalId, Op, Remainder, RemoteId, Result, Shape};

use crate::connection::{AttachedRegion, Connection, TOKENS_MAX, WaitingToken};
use crate::domain::Domain;
use crate::frame::{Extent, FRAME_PAGES_MAX, Frame};
use crate::vectored::{Payload, Places};

/// How far an op came.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    Whole,
    /// So many bytes of a span, or pieces of a paged op.
    Within(u64),
}

/// One side of a paged op, without its list.
#[derive(Clone, Copy)]
struct Side {
    name: &'static str,
    region_bytes: u64,
    offset: u64,
    stride_bytes: u64,
}

/// The frames of one op: what they have in common.
struct Parts<'a> {
    direction: Direction,
    grant: GrantId,
    memory: &'a Memory,
    local: LocalId,
    remote: u32,
}

/// What one post may still send; see [`POST_BYTES_MAX`].
pub(crate) struct PostShare {
    bytes: u64,
}

impl PostShare {
    pub fn new() -> Self {
        Self { bytes: POST_BYTES_MAX }
    }
}

impl Connection {
    /// Queues as much of an op as there is room for, sending in between while the socket takes it.
    pub(crate) fn take(&mut self, op: &Op<'_>, share: &mut PostShare, domain: &mut Domain) -> Result<Taken> {
        if op.direction == Direction::Read && op.imm.is_some() {
            return Err(Error::BadOp { reason: "a read cannot carry an immediate" });
        }
        if self.dones.len() == TOKENS_MAX {
            return Ok(Taken::Within(0));
        }
        let resumed = self.continuation.take();
        let taken = match op.shape {
            Shape::Span { bytes: 0, .. } => self.take_empty(op, share, domain),
            Shape::Span { local, local_offset, remote, remote_offset, bytes } => {
                let (local_end, remote_end) = op.extents()?;
                let memory = local_memory(domain, local)?;
                let remote = self.remote_region(remote)?;
                within("local", local_end, memory.bytes() as u64)?;
                within("remote", remote_end, remote.bytes)?;
                let parts = Parts {
                    direction: op.direction,
                    grant: op.grant,
                    memory: &memory,
                    local,
                    remote: remote.region,
                };
                self.take_span(&parts, (local_offset, remote_offset, bytes), op.imm, share, domain)
            }
            Shape::Pages { .. } => self.take_pages(op, resumed, share, domain)?,
        };
        if let (Taken::Whole, Some(token)) = (taken, op.token) {
            self.dones.push_back(WaitingToken { token, sent: self.gather.queued(), reads: self.reads_asked });
        }
        Ok(taken)
    }

    /// An op that moves no bytes: at most a notification.
    fn take_empty(&mut self, op: &Op<'_>, share: &mut PostShare, domain: &mut Domain) -> Taken {
        if let Some(imm) = op.imm {
            if self.room(op.direction, 0, share, domain).is_none() {
                return Taken::Within(0);
            }
            self.gather.queue(&Frame::Notify { imm }.encode(), &[], None);
        }
        Taken::Whole
    }

    fn take_span(
        &mut self,
        parts: &Parts<'_>,
        (local_offset, remote_offset, bytes): (u64, u64, u64),
        imm: Option<u32>,
        share: &mut PostShare,
        domain: &mut Domain,
    ) -> Taken {
        let mut at = 0;
        while at < bytes {
            if self.room(parts.direction, 1, share, domain).is_none() {
                return Taken::Within(at);
            }
            let piece_bytes = (bytes - at).min(FRAME_BYTES_MAX);
            let places = Places { offset: local_offset + at, stride_bytes: 0, piece_bytes, pages: &[0] };
            let remote = Places { offset: remote_offset + at, pages: &[], ..places };
            at += piece_bytes;
            self.queue_part(parts, places, remote, imm.filter(|_| at == bytes));
        }
        Taken::Whole
    }

    fn take_pages(
        &mut self,
        op: &Op<'_>,
        resumed: Option<Remainder>,
        share: &mut PostShare,
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
        let memory = local_memory(domain, local)?;
        let attached = self.remote_region(remote)?;
        let here = Side {
            name: "local",
            region_bytes: memory.bytes() as u64,
            offset: local_offset,
            stride_bytes: local_stride_bytes,
        };
        let there = Side {
            name: "remote",
            region_bytes: attached.bytes,
            offset: remote_offset,
            stride_bytes: remote_stride_bytes,
        };
        let scanned = resumed.is_none() || resumed != Remainder::of(op, 0);
        if scanned {
            let (local_end, remote_end) = op.extents()?;
            within("local", local_end, here.region_bytes)?;
            within("remote", remote_end, there.region_bytes)?;
        }
        if piece_bytes == 0 || local_pages.is_empty() {
            return Ok(self.take_empty(op, share, domain));
        }
        let parts = Parts {
            direction: op.direction,
            grant: op.grant,
            memory: &memory,
            local,
            remote: attached.region,
        };
        let frame_pages = (FRAME_BYTES_MAX / piece_bytes).clamp(1, FRAME_PAGES_MAX as u64) as usize;
        let mut at = 0;
        while at < local_pages.len() {
            let wanted = frame_pages.min(local_pages.len() - at);
            let Some(room) = self.room(op.direction, wanted, share, domain) else {
                self.continuation = Remainder::of(op, at);
                return Ok(Taken::Within(at as u64));
            };
            let end = at + room;
            let (from, to) = (&local_pages[at..end], &remote_pages[at..end]);
            if !scanned {
                match here.check(from, piece_bytes).and_then(|()| there.check(to, piece_bytes)) {
                    Err(error) if at == 0 => return Err(error),
                    Err(_) => return Ok(Taken::Within(at as u64)),
                    Ok(()) => {}
                }
            }
            let places = |side: Side, pages| Places {
                offset: side.offset,
                stride_bytes: side.stride_bytes,
                piece_bytes,
                pages,
            };
            at = end;
            let imm = op.imm.filter(|_| at == local_pages.len());
            self.queue_part(&parts, places(here, from), places(there, to), imm);
        }
        Ok(Taken::Whole)
    }

    /// How many of `wanted` pages the next frame can have. Makes room by sending, if the socket takes it.
    fn room(
        &mut self,
        direction: Direction,
        wanted: usize,
        share: &mut PostShare,
        domain: &mut Domain,
    ) -> Option<usize> {
        if direction == Direction::Read && self.asked.len() >= self.asked_max {
            return None;
        }
        loop {
            let waiting = self.gather.queued() - self.gather.sent();
            let pages = self.gather.room().filter(|_| waiting < domain.send_queue_bytes);
            // Better to come back later than to fill a nearly full queue with frames of few pages.
            if let Some(pages) = pages.filter(|&pages| pages >= wanted.min(FRAME_PAGES_WORTHWHILE)) {
                return Some(pages.min(wanted));
            }
            if !self.writable {
                return None;
            }
            if share.bytes == 0 {
                // The socket would take more, so no event of the kernel will call for the rest.
                self.unfinished = true;
                return None;
            }
            let before = self.gather.sent();
            self.flush(domain);
            share.bytes = share.bytes.saturating_sub(self.gather.sent() - before);
        }
    }

    /// Whether a post that came short can come further now.
    pub(crate) fn has_room(&self, domain: &Domain) -> bool {
        let waiting = self.gather.queued() - self.gather.sent();
        waiting < domain.send_queue_bytes
            && self.gather.room().is_some_and(|pages| pages >= FRAME_PAGES_WORTHWHILE)
            && self.asked.len() < self.asked_max
            && self.dones.len() < TOKENS_MAX
    }

    /// Queues one frame. Its list is `remote.pages`; a span has none.
    fn queue_part(&mut self, parts: &Parts<'_>, local: Places<'_>, remote: Places<'_>, imm: Option<u32>) {
        let extent = Extent {
            grant: parts.grant,
            region: parts.remote,
            offset: remote.offset,
            stride_bytes: remote.stride_bytes,
            piece_bytes: remote.piece_bytes,
            pages: remote.pages.len() as u16,
        };
        match parts.direction {
            Direction::Write => {
                let head = Frame::Write { extent, imm }.encode();
                let payload =
                    Payload { memory: parts.memory, region: parts.local, grant: None, places: local };
                self.gather.queue(&head, remote.pages, Some(payload));
            }
            Direction::Read => {
                // The lower bits do: there are never more than a few dozen under way.
                let request = self.reads_asked as u32;
                self.asked.push(parts.memory, parts.local, GrantId::NONE, request, local);
                self.gather.queue(&Frame::Read { extent, request }.encode(), remote.pages, None);
                self.reads_asked += 1;
            }
        }
    }

    fn remote_region(&self, remote: RemoteId) -> Result<AttachedRegion> {
        let found = self.attached.get(remote.0 as usize).copied();
        found.ok_or(Error::UnknownRegion { side: "remote", region: remote.0 })
    }
}

impl Side {
    /// Whether all pages of a list lie in the region.
    fn check(&self, pages: &[u32], piece_bytes: u64) -> Result<()> {
        let end = match pages.iter().max() {
            None => Some(self.offset),
            Some(&last) => self
                .stride_bytes
                .checked_mul(u64::from(last))
                .and_then(|from| from.checked_add(self.offset)?.checked_add(piece_bytes)),
        };
        within(self.name, end.ok_or(Error::BadOp { reason: "offsets overflow" })?, self.region_bytes)
    }
}

fn within(side: &'static str, end: u64, region_bytes: u64) -> Result<()> {
    if end > region_bytes {
        return Err(Error::OutOfRange { side, end, region_bytes });
    }
    Ok(())
}

fn local_memory(domain: &Domain, local: LocalId) -> Result<Memory> {
    let found = domain.regions.get(local.0).cloned();
    found.ok_or(Error::UnknownRegion { side: "local", region: local.0 })
}

/// The longest payload of a frame, unless a single piece is longer. Between two frames of a lane, replies find
/// their turn, and a short post can end.
const FRAME_BYTES_MAX: u64 = 512 << 10;
/// With room for fewer pages than this, and more of them to send, an op waits for the queue to empty.
const FRAME_PAGES_WORTHWHILE: usize = 32;
/// After so many bytes a post comes back short even though the socket takes more: the caller has other lanes.
const POST_BYTES_MAX: u64 = 8 << 20;
