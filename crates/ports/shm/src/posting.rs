//! Ops become copies: here and now, by this thread and its copy threads.

use crossdock_transport::{
    Direction, DownCause, Error, LaneId, LocalId, MappedBytes, Op, RemoteId, Result, Shape,
};

use crate::copy::{CopyThreads, Pieces};
use crate::counters::ShmCounters;
use crate::joined::{Joined, Phase, Short};
use crate::numbered::Numbered;
use crate::port::Region;
use crate::process_memory::{PeerProcess, ProcessMemoryError, ProcessPieces};
use crate::remote::RemoteState;

/// What all ops of one call of `post` share.
pub(crate) struct Posting<'a> {
    pub(crate) lane: LaneId,
    pub(crate) regions: &'a Numbered<Region>,
    pub(crate) copier: &'a mut CopyThreads,
    pub(crate) counters: &'a mut ShmCounters,
    /// Bytes that this call may still move.
    pub(crate) budget_bytes: u64,
    /// Nothing was moved by this call yet: a piece may be larger than the budget.
    pub(crate) is_fresh: bool,
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

impl Joined {
    /// Does as much of an op as there is room for. Nothing of an op that is refused is done.
    pub(crate) fn take(&mut self, op: &Op<'_>, with: &mut Posting<'_>) -> Result<Taken> {
        if op.imm.is_some() && !self.writer.has_room().map_err(|_| self.spoiled(with.lane))? {
            self.short = Some(Short::Ring);
            with.counters.short_by_immediates += 1;
            return Ok(Taken::Part(0));
        }
        // Its capacity is its limit: the data path does not allocate.
        if op.token.is_some() && self.dones.len() == self.dones.capacity() {
            with.counters.short_by_dones += 1;
            return Ok(Taken::Part(0));
        }
        let continues = self.rest.take().is_some_and(|rest| rest == Rest::of(op));
        let bytes = op.bytes().ok_or(Error::BadOp { reason: "offsets overflow" })?;
        if bytes == 0 {
            op.extents()?;
        } else {
            let part = Part::of(op, with);
            // The whole op is checked before its first byte moves; what is left of it, as far as it moves now.
            let ends = if continues { part.op.extents()? } else { op.extents()? };
            let moved = self.move_bytes(&part, ends, with)?;
            if moved < part.count || part.bytes < bytes {
                self.rest = Some(Rest::of(&op.advance(moved)));
                self.short = Some(Short::Budget);
                with.counters.short_by_bytes += 1;
                return Ok(Taken::Part(moved));
            }
        }
        if let Some(imm) = op.imm {
            self.writer.push(imm);
            with.counters.immediates_sent += 1;
        }
        if let Some(token) = op.token {
            self.dones.push_back(token);
        }
        Ok(Taken::Whole)
    }

    fn spoiled(&mut self, lane: LaneId) -> Error {
        self.writer_broke();
        Error::LaneDown { lane }
    }

    /// Moves a part of an op, or nothing where the kernel lacks memory for the moment; returns how much, as a short post
    /// counts it. `ends` are the furthest bytes on the two sides, of the part or of more than that.
    fn move_bytes(&mut self, part: &Part<'_>, ends: (u64, u64), with: &mut Posting<'_>) -> Result<u64> {
        let op = &part.op;
        let (local, remote) = match op.shape {
            Shape::Span { local, remote, .. } | Shape::Pages { local, remote, .. } => (local, remote),
        };
        let local =
            with.regions.get(local.0).ok_or(Error::UnknownRegion { side: "local", region: local.0 })?;
        let remote = self.remote.get(remote)?;
        check_end("local", ends.0, local.memory.bytes() as u64)?;
        check_end("remote", ends.1, remote.bytes)?;
        if part.bytes == 0 {
            return Ok(0);
        }
        let here = local.memory.base();
        match &remote.state {
            RemoteState::Mapped(mapping) => {
                let there = mapping.base();
                let pieces = match op.direction {
                    Direction::Write => pieces(op, Side::Remote, there, here),
                    Direction::Read => pieces(op, Side::Local, here, there),
                };
                // SAFETY: every piece lies in the two memories, as the ends say: both are mapped, the one as long as
                // its registration, the other as long as the mapping in the table; and the two mappings are not the
                // same, since every attached region is mapped anew. Other threads and processes may write there at
                // the same time, and destinations may repeat, if the caller or the peer breaks its part of the
                // protocol: then bytes come out mixed, and no reference to any of them exists.
                unsafe { with.copier.copy_pieces(pieces) };
            }
            RemoteState::There(address) => {
                let (process, address) = (self.remote.process(), *address);
                if !self.reach(op.direction, process, process_pieces(op, here, address), with.lane)? {
                    return Ok(0);
                }
            }
            RemoteState::Offered(_) | RemoteState::OfferedThere(_) => {
                unreachable!("the table gives attached regions only")
            }
        }
        match op.direction {
            Direction::Write => with.counters.bytes_written += part.bytes,
            Direction::Read => with.counters.bytes_read += part.bytes,
        }
        with.is_fresh = false;
        with.budget_bytes = with.budget_bytes.saturating_sub(part.bytes);
        Ok(part.count)
    }

    /// Moves bytes to or from a peer's memory that is not mapped here. False: not now, for want of kernel memory.
    fn reach(
        &mut self,
        direction: Direction,
        process: PeerProcess,
        pieces: ProcessPieces<'_>,
        lane: LaneId,
    ) -> Result<bool> {
        // The number of a dead process may be given to another one, whose memory is none of our business.
        if self.peer.is_dead() {
            self.close(DownCause::PeerDied);
            return Err(Error::LaneDown { lane });
        }
        let (call, moved) = match direction {
            // SAFETY: the local pieces lie in registered memory, which is mapped as long as its registration; that
            // nobody writes there meanwhile is the caller's part, and if it breaks it, bytes come out mixed. The
            // remote pieces lie in a region that the peer has announced for this.
            Direction::Write => ("process_vm_writev", unsafe { process.write_pieces(pieces) }),
            // SAFETY: as above.
            Direction::Read => ("process_vm_readv", unsafe { process.read_pieces(pieces) }),
        };
        let errno = match moved {
            Ok(()) => return Ok(true),
            // What has moved by then moves again with the next try.
            Err(ProcessMemoryError::KernelOutOfMemory { .. }) => return Ok(false),
            Err(ProcessMemoryError::PeerDied { .. }) => libc::ESRCH,
            Err(ProcessMemoryError::Refused { .. }) => libc::EPERM,
            Err(ProcessMemoryError::BadRange { .. }) => libc::EFAULT,
            Err(ProcessMemoryError::Unsupported) => libc::ENOSYS,
            Err(ProcessMemoryError::Failed { code, .. }) => code,
        };
        // Some of the bytes may have moved; so this is the end of the lane, and not an error of one op.
        self.close(DownCause::Broken { call, errno });
        Err(Error::LaneDown { lane })
    }

    /// Wakes the peer if it sleeps: after the last op of a call.
    pub(crate) fn wake_peer(&mut self, counters: &mut ShmCounters) {
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
    fn of(op: &Op<'a>, with: &Posting<'_>) -> Self {
        let mut part = *op;
        let (bytes, count) = match &mut part.shape {
            Shape::Span { bytes, .. } => {
                *bytes = with.budget_bytes.min(*bytes);
                (*bytes, *bytes)
            }
            Shape::Pages { local_pages, remote_pages, piece_bytes, .. } => {
                // A piece may be larger than the whole budget. Lists of different lengths are refused later.
                let most = (with.budget_bytes / *piece_bytes).max(u64::from(with.is_fresh));
                let pieces = most.min(local_pages.len().min(remote_pages.len()) as u64);
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

enum Side {
    Local,
    Remote,
}

/// An op's pieces between two mapped regions. Its numbers fit a `usize` where they are used, because what they lead to
/// lies in memory.
fn pieces<'a>(op: &Op<'a>, to: Side, to_base: *mut u8, from_base: *const u8) -> Pieces<'a> {
    match (op.shape, to) {
        (Shape::Span { local_offset, remote_offset, bytes, .. }, to) => {
            let (to_offset, from_offset) = match to {
                Side::Local => (local_offset, remote_offset),
                Side::Remote => (remote_offset, local_offset),
            };
            Pieces::run(
                to_base.wrapping_add(to_offset as usize),
                from_base.wrapping_add(from_offset as usize),
                bytes as usize,
            )
        }
        (
            Shape::Pages {
                local_offset,
                local_stride_bytes,
                local_pages,
                remote_offset,
                remote_stride_bytes,
                remote_pages,
                piece_bytes,
                ..
            },
            to,
        ) => {
            let local = (local_offset, local_stride_bytes, local_pages);
            let remote = (remote_offset, remote_stride_bytes, remote_pages);
            let ((to_offset, dst_stride, dst_index), (from_offset, src_stride, src_index)) = match to {
                Side::Local => (local, remote),
                Side::Remote => (remote, local),
            };
            Pieces {
                dst_base: to_base.wrapping_add(to_offset as usize),
                dst_stride: dst_stride as usize,
                src_base: from_base.wrapping_add(from_offset as usize),
                src_stride: src_stride as usize,
                piece_bytes: piece_bytes as usize,
                dst_index,
                src_index,
            }
        }
    }
}

/// An op's pieces between a mapped region and one at `address` of the peer.
fn process_pieces<'a>(op: &Op<'a>, base: *mut u8, address: u64) -> ProcessPieces<'a> {
    match op.shape {
        Shape::Span { local_offset, remote_offset, bytes, .. } => ProcessPieces {
            local_base: base.wrapping_add(local_offset as usize),
            local_stride: 0,
            remote_base: address + remote_offset,
            remote_stride: 0,
            piece_bytes: bytes as usize,
            local_index: &[0],
            remote_index: &[0],
        },
        Shape::Pages {
            local_offset,
            local_stride_bytes,
            local_pages,
            remote_offset,
            remote_stride_bytes,
            remote_pages,
            piece_bytes,
            ..
        } => ProcessPieces {
            local_base: base.wrapping_add(local_offset as usize),
            local_stride: local_stride_bytes as usize,
            remote_base: address + remote_offset,
            remote_stride: remote_stride_bytes,
            piece_bytes: piece_bytes as usize,
            local_index: local_pages,
            remote_index: remote_pages,
        },
    }
}

fn check_end(side: &'static str, end: u64, region_bytes: u64) -> Result<()> {
    if end > region_bytes { Err(Error::OutOfRange { side, end, region_bytes }) } else { Ok(()) }
}
