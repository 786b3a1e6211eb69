//! What the layer above offers to be moved: which lane takes it, in which stripes, and what is still out.

use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{MAX_LANES, RoomId};
use crossdock_transport::{Direction, Error, Op, Posted, Shape, Token};

use super::Engine;
use super::lanes::{LaneRegions, LaneState};
use crate::imm::{Imm, Kind};
use crate::transfer::TransferId;

impl Engine {
    /// The transfer of a room that was told to start.
    pub fn transfer(&self, room: RoomId) -> Option<TransferId> {
        self.transfers.find(room)
    }

    /// The next lane to offer ops of this transfer to: the one that is furthest behind its share of the load, of
    /// those that still take something in this turn.
    pub fn lane(&self, transfer: TransferId) -> Option<u8> {
        let transfer = self.transfers.get(transfer)?;
        if transfer.stopping {
            return None;
        }
        let session = self.sessions.get(&transfer.session)?;
        let (slot, _) = session
            .slots
            .iter()
            .enumerate()
            .filter(|(_, lane)| lane.state == LaneState::Up && !lane.full)
            .min_by(|(_, a), (_, b)| a.load.total_cmp(&b.load))?;
        Some(slot as u8)
    }

    /// What the regions of both sides are called on a lane of a transfer's session; the same as long as the transfer
    /// lasts.
    pub fn lane_regions(&self, transfer: TransferId, slot: u8) -> Option<LaneRegions> {
        let session = self.sessions.get(&self.transfers.get(transfer)?.session)?;
        let lane = session.slots.get(usize::from(slot))?;
        Some(LaneRegions { slot, local: self.rails[lane.rail].regions.clone(), remote: lane.remote.clone() })
    }

    /// Offers ops to a lane. The engine fills in the grant, the immediate and the token. Says how far it came;
    /// what was not taken is offered again, to the lane that [`lane`](Engine::lane) names then.
    pub fn post(
        &mut self,
        now_ns: u64,
        id: TransferId,
        slot: u8,
        ops: &mut [Op<'_>],
    ) -> Result<Posted, TransferFailed> {
        let Some(transfer) = self.transfers.get_mut(id) else { return Ok(Posted::default()) };
        let Some(session) = self.sessions.get_mut(&transfer.session) else { return Ok(Posted::default()) };
        let several = session.slots.len() > 1;
        let Some(lane) = session.slots.get_mut(usize::from(slot)) else { return Ok(Posted::default()) };
        let (Some(lane_id), LaneState::Up, false) = (lane.id, lane.state, transfer.stopping) else {
            return Ok(Posted::default());
        };
        let offered = if several { stripe(ops, self.options.stripe_bytes) } else { Stripe::all(ops) };
        let cut;
        let ops: &mut [Op<'_>] = match offered {
            Stripe { whole, part: None } => &mut ops[..whole],
            // The first op alone is more than a lane's share: its head goes as an op of its own.
            Stripe { part: Some(pieces), .. } => {
                cut = pieces;
                ops[0] = head(&ops[0], cut);
                &mut ops[..1]
            }
        };
        let Some(last) = ops.last_mut() else { return Ok(Posted::default()) };
        if transfer.direction == Direction::Write {
            last.imm = Some(Imm::kv(transfer.grant).bits());
        }
        last.token = Some(id.token());
        for op in ops.iter_mut() {
            op.grant = transfer.grant;
        }
        let rail = &mut self.rails[lane.rail];
        let posted = match rail.port.post(lane_id, ops) {
            Ok(posted) => posted,
            // The lane's `Down` is on its way; what it had taken is dealt with then.
            Err(Error::LaneDown { .. } | Error::LaneNotUp { .. }) => {
                lane.full = true;
                self.full.push((transfer.session, slot));
                return Ok(Posted::default());
            }
            Err(error) => {
                let room = transfer.room;
                self.proto.room_failed(now_ns, room, error.clone());
                return Err(TransferFailed { room, error });
            }
        };
        let complete = posted.ops == ops.len();
        let used = &mut transfer.lanes[usize::from(slot)];
        let part = ops.get(posted.ops).map_or(0, |op| op.part_bytes(posted.within));
        let bytes = part + ops[..posted.ops].iter().filter_map(Op::bytes).sum::<u64>();
        match transfer.direction {
            Direction::Write => rail.stats.written_bytes += bytes,
            Direction::Read => rail.stats.read_bytes += bytes,
        }
        lane.load += (bytes as f64 + 64.0) / rail.bytes_per_second as f64;
        if complete {
            used.posted_whole(transfer.direction);
        } else {
            lane.full = true;
            self.full.push((transfer.session, slot));
            used.uncovered |= posted.ops > 0 || posted.within > 0;
        }
        if let Stripe { part: Some(pieces), .. } = offered {
            // To the caller the op is not done: only its head was offered.
            let within = if complete { pieces } else { posted.within };
            return Ok(Posted { ops: 0, within });
        }
        Ok(posted)
    }

    /// Everything of a transfer has been posted. A write's room is finished towards the peer with `aux`; a read's
    /// bytes are here when [`Notice::Landed`](crossdock_proto::Notice::Landed) says so.
    pub fn posted_all(&mut self, now_ns: u64, id: TransferId, aux: Vec<u8>) {
        if let Some(transfer) = self.transfers.get_mut(id) {
            transfer.finishing = Some(aux);
            self.advance(now_ns, id);
        }
    }

    /// Moves a transfer on that is finishing or stopping: what was posted without a token or an immediate is
    /// covered by a notification, and when nothing is out any more, the protocol hears of it.
    pub(super) fn advance(&mut self, now_ns: u64, id: TransferId) {
        let Some(transfer) = self.transfers.get_mut(id) else { return };
        if transfer.finishing.is_none() && !transfer.stopping {
            return;
        }
        if is_planted(Planted::ShortPostForgotten) {
            transfer.lanes.iter_mut().for_each(|used| used.uncovered = false);
        }
        let counted = transfer.direction == Direction::Write && !transfer.stopping;
        if let Some(session) = self.sessions.get_mut(&transfer.session) {
            for (used, lane) in transfer.lanes.iter_mut().zip(&mut session.slots) {
                let (true, Some(lane_id), LaneState::Up) = (used.uncovered, lane.id, lane.state) else {
                    continue;
                };
                let imm = match counted {
                    true => Imm::kv(transfer.grant),
                    false => Imm::new(Kind::Notice, 0),
                };
                let mut cover = Op::notify(imm.bits());
                cover.token = Some(id.token());
                if let Ok(Posted { ops: 1, .. }) = self.rails[lane.rail].port.post(lane_id, &[cover]) {
                    used.uncovered = false;
                    used.tokens += 1;
                    used.arrivals += u32::from(counted);
                }
            }
        }
        if transfer.lanes.iter().any(|used| used.uncovered) {
            return self.transfers.retry(id);
        }
        let idle = transfer.lanes.iter().all(|used| used.tokens == 0);
        let room = transfer.room;
        if transfer.stopping {
            if idle {
                let down_lanes = transfer.down_lanes;
                self.transfers.end(id);
                self.proto.drained(now_ns, room, down_lanes);
            }
            return;
        }
        match transfer.direction {
            Direction::Write => {
                if let Some(aux) = transfer.finishing.take() {
                    let arrivals: [u32; MAX_LANES] = transfer.lanes.map(|used| used.arrivals);
                    let lanes = self.sessions.get(&transfer.session).map_or(MAX_LANES, |s| s.slots.len());
                    self.proto.finish(now_ns, room, &arrivals[..lanes], aux);
                }
            }
            Direction::Read if idle => {
                self.transfers.end(id);
                self.proto.fetched(now_ns, room);
            }
            Direction::Read => {}
        }
    }
}

/// A port refused an op of a room for good; the room has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a port refused an op: {error}")]
pub struct TransferFailed {
    /// Which room.
    pub room: RoomId,
    /// What the port said.
    pub error: Error,
}

/// How much of a batch one lane is offered at once.
#[derive(Clone, Copy)]
struct Stripe {
    /// So many whole ops.
    whole: usize,
    /// Or only this much of the first one.
    part: Option<u64>,
}

impl Stripe {
    fn all(ops: &[Op<'_>]) -> Self {
        Self { whole: ops.len(), part: None }
    }
}

fn stripe(ops: &[Op<'_>], most_bytes: u64) -> Stripe {
    let mut bytes = 0u64;
    let whole = ops
        .iter()
        .take_while(|op| {
            bytes = bytes.saturating_add(op.bytes().unwrap_or(u64::MAX));
            bytes <= most_bytes
        })
        .count();
    let Some(first) = ops.first().filter(|_| whole == 0) else { return Stripe { whole, part: None } };
    let (part, parts) = match first.shape {
        Shape::Span { bytes, .. } => (most_bytes.max(1), bytes),
        Shape::Pages { piece_bytes, local_pages, .. } => {
            ((most_bytes / piece_bytes.max(1)).max(1), local_pages.len() as u64)
        }
    };
    // A single piece is not cut, however long it is.
    match part < parts {
        true => Stripe { whole, part: Some(part) },
        false => Stripe { whole: 1, part: None },
    }
}

/// The first bytes of a span, or the first pieces of a paged op.
fn head<'a>(op: &Op<'a>, within: u64) -> Op<'a> {
    let mut head = *op;
    match &mut head.shape {
        Shape::Span { bytes, .. } => *bytes = within.min(*bytes),
        Shape::Pages { local_pages, remote_pages, .. } => {
            let pieces = (within as usize).min(local_pages.len());
            *local_pages = &local_pages[..pieces];
            *remote_pages = &remote_pages[..pieces];
        }
    }
    head
}

impl TransferId {
    fn token(self) -> Token {
        Token(self.bits())
    }

    pub(super) fn from_token(token: Token) -> Self {
        Self::from_bits(token.0)
    }
}
