//! Posting: checks, how much is taken, and how ops become messages.

use crossdock_transport::{Direction, Error, LocalId, Op, Posted, RemoteId, Result, Shape};

use crate::events::Due;
use crate::lane::Part;
use crate::options::Semantics;
use crate::wire::{End, Kind, Piece};
use crate::world::World;

/// How far an op was taken.
enum Taken {
    Whole,
    /// Bytes of a span, pieces of a paged op; perhaps none.
    Part(u64),
}

impl World {
    pub fn post(&mut self, end: End, ops: &[Op<'_>]) -> Result<Posted> {
        self.known_lane(end)?.require_up(end)?;
        let mut posted = Posted::default();
        for (at, op) in ops.iter().enumerate() {
            match self.check(end, op) {
                Ok(()) => {}
                Err(error) if at == 0 => return Err(error),
                Err(_) => break,
            }
            match self.take(end, op) {
                Taken::Whole => posted.ops += 1,
                Taken::Part(within) => {
                    posted.within = within;
                    break;
                }
            }
        }
        // Stores into mapped memory may be made before post returns.
        self.wake(end);
        Ok(posted)
    }

    fn check(&self, end: End, op: &Op<'_>) -> Result<()> {
        let (local_end, remote_end) = op.extents()?;
        let (local, remote) = regions(op);
        if is_bare(op) {
            return Ok(());
        }
        let region = self.region(end.port, local);
        let region = region.ok_or(Error::UnknownRegion { side: "local", region: local.0 })?;
        let attachment = self.lane(end).attachments.get(remote.0 as usize);
        let attachment = attachment.ok_or(Error::UnknownRegion { side: "remote", region: remote.0 })?;
        let sides =
            [("local", local_end, region.memory.bytes() as u64), ("remote", remote_end, attachment.bytes)];
        for (side, end, region_bytes) in sides {
            if end > region_bytes {
                return Err(Error::OutOfRange { side, end, region_bytes });
            }
        }
        Ok(())
    }

    fn take(&mut self, end: End, op: &Op<'_>) -> Taken {
        let limits = &self.port_at(end.port).options;
        let (pieces_limit, imms_limit) = (limits.pieces_in_flight, limits.immediates_in_flight);
        let lane = self.lane(end);
        let room = u64::from(pieces_limit.saturating_sub(lane.pieces_in_flight));
        let no_imm = op.imm.is_some() && lane.immediates_in_flight >= imms_limit;
        if room == 0 {
            return Taken::Part(0);
        }
        let (total, mut taken) = match op.shape {
            Shape::Span { bytes, .. } => (bytes, bytes),
            Shape::Pages { local_pages, .. } => {
                let pieces = local_pages.len() as u64;
                (pieces, pieces.min(room))
            }
        };
        if self.rng.happens(self.options.short_post) {
            taken = self.rng.below(taken + 1);
            if taken == total {
                return Taken::Part(0);
            }
        }
        // Without room for the immediate, the bytes may still go ahead of it, or wait with it.
        if taken == total && no_imm && (total == 0 || self.rng.coin()) {
            return Taken::Part(0);
        }
        let whole = taken == total && !no_imm;
        if taken == 0 && !whole {
            return Taken::Part(0);
        }
        self.send_op(end, op, taken, whole);
        if whole { Taken::Whole } else { Taken::Part(taken) }
    }

    /// Makes messages of the first `taken` of an op; `whole`: that is all there is, so its immediate and token go too.
    fn send_op(&mut self, end: End, op: &Op<'_>, taken: u64, whole: bool) {
        let (local, remote) = regions(op);
        let bare = is_bare(op);
        let lane = self.lane(end);
        let to = lane.remote.expect("a lane that is up has a remote end");
        let region =
            lane.attachments.get(remote.0 as usize).map_or(LocalId(0), |attachment| attachment.region);
        let kind = match op.direction {
            Direction::Write => Kind::Write,
            Direction::Read => Kind::ReadRequest,
        };
        let bytes = match op.shape {
            Shape::Span { .. } => taken,
            Shape::Pages { piece_bytes, .. } => taken.saturating_mul(piece_bytes),
        };
        let cuts = self.cuts(bytes);
        let mut slot = self.messages.make(kind, to);
        let mut slots = vec![slot];
        let mut cuts = cuts.into_iter().peekable();
        let mut at = 0;
        for_each_piece(op, taken, |mut piece| {
            while let Some(&cut) = cuts.peek().filter(|&&cut| cut < at + piece.bytes) {
                cuts.next();
                let first = cut - at;
                if first > 0 {
                    self.messages.at_mut(slot).pieces.push(Piece { bytes: first, ..piece });
                }
                piece.local_offset += first;
                piece.remote_offset += first;
                piece.bytes -= first;
                at = cut;
                slot = self.messages.make(kind, to);
                slots.push(slot);
            }
            at += piece.bytes;
            self.messages.at_mut(slot).pieces.push(piece);
        });
        let last = slots.len() - 1;
        let cost = match op.shape {
            Shape::Span { .. } => 1,
            // No more than there was room for, which is a number of that size.
            Shape::Pages { .. } => taken.max(1) as u32,
        };
        for (at, slot) in slots.into_iter().enumerate() {
            let ends_op = whole && at == last;
            let message = self.messages.at_mut(slot);
            message.grant = op.grant;
            message.local = local;
            message.attachment = remote.0;
            message.region = region;
            message.imm = op.imm.filter(|_| ends_op);
            let part = Part {
                done: false,
                token: op.token.filter(|_| ends_op),
                local: (!bare).then_some(local),
                pieces: if at == 0 { cost } else { 0 },
            };
            self.send_part(end, to, slot, part);
        }
        if whole {
            self.lane_mut(end).op_due_ns = 0;
        }
    }

    /// Numbers the message, says when it leaves and when it comes, and puts it on the wire.
    fn send_part(&mut self, end: End, to: End, slot: u32, part: Part) {
        let options = &self.port_at(end.port).options;
        let (semantics, unordered) = (options.semantics, options.unordered);
        let now_ns = self.now_ns;
        let bytes = self.messages.at(slot).piece_bytes();
        if let Some(local) = part.local
            && let Some(region) = self.ports[end.port as usize].regions[local.0 as usize].as_mut()
        {
            region.parts_in_flight += 1;
        }
        let imm = self.messages.at(slot).imm.is_some();
        let mut due = match semantics.is_mapped() && !unordered && self.rng.coin() {
            true => now_ns.max(self.lane(end).last_due_ns),
            false => self.due(end, to, bytes, false),
        };
        let lane = self.lane_mut(end);
        if imm {
            // Whatever overtakes whatever: an immediate comes after the bytes of its own op.
            due = due.max(lane.op_due_ns);
            lane.immediates_in_flight += 1;
        }
        lane.op_due_ns = lane.op_due_ns.max(due);
        lane.last_due_ns = lane.last_due_ns.max(due);
        lane.pieces_in_flight += part.pieces;
        let number = lane.first_part + lane.parts.len() as u64;
        lane.parts.push_back(part);
        self.messages.at_mut(slot).part = number;
        match semantics {
            Semantics::Checked if self.messages.at(slot).kind == Kind::Write => {
                let wait = if self.rng.coin() { 0 } else { self.rng.below(due - now_ns + 1) };
                let lane = self.lane_mut(end);
                let leaves = lane.last_leave_ns.max(now_ns + wait);
                lane.last_leave_ns = leaves;
                // On an unordered lane it may be late for its own arrival; then it comes as soon as it has left.
                self.messages.at_mut(slot).left = false;
                let serial = self.messages.at(slot).serial;
                self.put(end, slot, due);
                if leaves <= now_ns {
                    self.leave(end, slot, serial);
                } else {
                    self.agenda.schedule(leaves, Due::Leave { from: end, slot, serial });
                }
            }
            Semantics::Verbs if self.messages.at(slot).kind == Kind::Write => {
                // The device reads the source at any time before it acknowledges.
                if self.rng.coin() {
                    self.fill_message(end, slot);
                } else {
                    self.messages.at_mut(slot).left = false;
                }
                self.put(end, slot, due);
            }
            _ => self.put(end, slot, due),
        }
    }

    /// Where the bytes of an op are cut so that they land at different times.
    fn cuts(&mut self, bytes: u64) -> Vec<u64> {
        if bytes < 2 || !self.rng.happens(self.options.partial_landing) {
            return Vec::new();
        }
        let count = 1 + self.rng.below(3);
        let mut cuts: Vec<u64> = (0..count).map(|_| 1 + self.rng.below(bytes - 1)).collect();
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }
}

/// The stretches of the first `taken` of an op.
fn for_each_piece(op: &Op<'_>, taken: u64, mut each: impl FnMut(Piece)) {
    let mut piece = |local_offset, remote_offset, bytes, whole_bytes| {
        if bytes > 0 {
            each(Piece { local_offset, remote_offset, bytes, whole_offset: remote_offset, whole_bytes });
        }
    };
    match op.shape {
        Shape::Span { local_offset, remote_offset, bytes, .. } => {
            piece(local_offset, remote_offset, taken, bytes);
        }
        Shape::Pages {
            local_offset,
            local_stride_bytes,
            local_pages,
            remote_offset,
            remote_stride_bytes,
            remote_pages,
            piece_bytes,
            ..
        } => {
            for (&local, &remote) in local_pages.iter().zip(remote_pages).take(taken as usize) {
                piece(
                    local_offset + u64::from(local) * local_stride_bytes,
                    remote_offset + u64::from(remote) * remote_stride_bytes,
                    piece_bytes,
                    piece_bytes,
                );
            }
        }
    }
}

fn regions(op: &Op<'_>) -> (LocalId, RemoteId) {
    let (Shape::Span { local, remote, .. } | Shape::Pages { local, remote, .. }) = op.shape;
    (local, remote)
}

/// A notification, whose regions are not looked at.
fn is_bare(op: &Op<'_>) -> bool {
    op.imm.is_some() && matches!(op.shape, Shape::Span { bytes: 0, .. })
}
