//! Hands the calls for one rank to the engine, as ops of its port.

use crossdock_engine::Engine;
use crossdock_proto::SessionId;
use crossdock_transport::{Direction, Error, GrantId, Op, Shape};

use crate::note::Note;
use crate::outgoing::OutgoingCall;

/// What waits to be posted.
pub(crate) enum Outbound {
    Note(Note),
    Call { call: OutgoingCall, ops_done: usize, within: u64 },
}

/// Hands ops to the engine for one session.
pub(crate) struct Poster<'a> {
    pub engine: &'a mut Engine,
    pub session: SessionId,
    pub lane: u8,
    pub own_rank: u32,
    /// 0, 1, 2, and so on, as far as was needed.
    pub in_order: &'a mut Vec<u32>,
}

/// How much of it was taken.
pub(crate) enum Progress {
    None,
    Part,
    Whole,
}

impl Poster<'_> {
    pub fn post(&mut self, outbound: &mut Outbound) -> Result<Progress, Error> {
        let lane = self.lane;
        let (call, ops_done, within) = match outbound {
            Outbound::Call { call, ops_done, within } => (call, ops_done, within),
            Outbound::Note(note) => {
                let mut op = [Op::notify(0)];
                let posted = self.engine.post_side(self.session, lane, &mut op, Some(note.bits()), None)?;
                return Ok(if posted.ops == 1 { Progress::Whole } else { Progress::None });
            }
        };
        let Some(regions) = self.engine.side_regions(self.session, lane) else { return Ok(Progress::None) };
        let (Some(&local), Some(&remote)) =
            (regions.local.get(REGION as usize), regions.remote.get(REGION as usize))
        else {
            return Ok(Progress::None);
        };
        let rows = call.rows.as_ref().filter(|rows| !rows.tokens.is_empty());
        if let Some(rows) = rows {
            let known = self.in_order.len() as u32;
            self.in_order.extend(known..(rows.tokens.len() as u32).max(known));
        }
        let in_order = &*self.in_order;
        let op = |shape| Op {
            direction: Direction::Write,
            grant: GrantId::standing(self.own_rank),
            shape,
            imm: None,
            token: None,
        };
        let of_rows = rows.map(|rows| {
            op(Shape::Pages {
                local,
                local_offset: rows.local as u64,
                local_stride_bytes: rows.stride as u64,
                local_pages: &rows.tokens,
                remote,
                remote_offset: rows.remote as u64,
                remote_stride_bytes: rows.stride as u64,
                remote_pages: &in_order[..rows.tokens.len()],
                piece_bytes: rows.bytes as u64,
            })
        });
        let of_spans = call.spans.iter().filter(|span| span.bytes > 0).map(|span| {
            op(Shape::Span {
                local,
                local_offset: span.local as u64,
                remote,
                remote_offset: span.remote as u64,
                bytes: span.bytes as u64,
            })
        });
        let mut ops: Vec<Op<'_>> = of_rows.into_iter().chain(of_spans).skip(*ops_done).collect();
        if let Some(first) = ops.first_mut() {
            *first = first.advance(*within);
        }
        let note = Note::Call { slot: call.slot, call: Note::lower_bits(call.call) };
        let posted =
            self.engine.post_side(self.session, lane, &mut ops, Some(note.bits()), Some(call.slot))?;
        if posted.ops == ops.len() {
            return Ok(Progress::Whole);
        }
        *within = if posted.ops == 0 { *within + posted.within } else { posted.within };
        *ops_done += posted.ops;
        Ok(if posted.ops > 0 || posted.within > 0 { Progress::Part } else { Progress::None })
    }
}

/// A rank registers one region.
pub(crate) const REGION: u32 = 0;
