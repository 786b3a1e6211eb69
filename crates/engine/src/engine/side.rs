//! Writes and reads outside rooms: what a session's peer may always reach, and what is posted to it without a room.
//!
//! Both sides know each standing grant by its number; no message tells of it. It lasts as long as the session, and so
//! does the promise that an immediate is told and a token comes back: where a lane that has carried such writes goes
//! down, nobody can say what has arrived, and the session ends.

use std::collections::{BTreeMap, VecDeque};

use crossdock_memory::{LayoutError, PageLayout};
use crossdock_proto::{SessionEnd, SessionId};
use crossdock_transport::{
    Access, Direction, DownCause, Error, Fence, Grant, GrantId, GrantedBuffer, Op, PeerId, Posted, Token,
};

use super::Engine;
use super::lanes::{Lane, LaneRegions, LaneState, SessionLanes};
use crate::imm::{Imm, Kind};

/// An immediate that is not counted for a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideArrival {
    /// From whose session.
    pub session: SessionId,
    /// On which lane.
    pub slot: u8,
    /// The lower 30 bits.
    pub bits: u32,
}

/// A token of [`Engine::post_side`] that came back: the memory of that post and of all before it on its lane may be
/// changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideDone {
    /// Of which session.
    pub session: SessionId,
    /// As it was posted.
    pub token: u32,
}

/// What the engine keeps of all sessions' writes outside rooms.
#[derive(Default)]
pub(super) struct Side {
    /// Standing grants whose number is not free, by number.
    standing: BTreeMap<u32, Standing>,
    arrivals: VecDeque<SideArrival>,
    dones: VecDeque<SideDone>,
    /// Tokens that are out, of all sessions.
    out: usize,
}

struct Standing {
    session: SessionId,
    /// The weakest promise of the ports that have revoked it.
    revoked: Option<Fence>,
}

/// What a session keeps of its own.
pub(super) struct SessionSide {
    /// Nothing is posted or granted any more.
    is_over: bool,
    /// What the ports have promised of all that was granted, once it is over. As long as nothing was, the lanes tell.
    fence: Option<Fence>,
    /// A lane's end has proven that the peer's process has ended.
    peer_died: bool,
    /// Tokens out, and those that came back and were not asked for.
    tokens: usize,
    /// Immediates that came and were not asked for.
    arrivals: usize,
}

/// What a lane keeps.
#[derive(Clone, Copy, Default)]
pub(super) struct LaneSide {
    /// It has carried writes outside rooms.
    is_used: bool,
    /// Tokens out.
    tokens: usize,
}

impl SessionSide {
    pub fn new() -> Self {
        Self { is_over: false, fence: None, peer_died: false, tokens: 0, arrivals: 0 }
    }

    /// Whether a promise holds by now.
    fn is_kept(&self, fence: Fence, slots: &[Lane]) -> bool {
        let all_down = slots.iter().all(|lane| lane.id.is_none());
        match fence {
            Fence::Now => true,
            Fence::WhenDown => all_down,
            Fence::Never => all_down && self.peer_died,
        }
    }
}

impl SessionLanes {
    fn is_quiet(&self) -> bool {
        let fence = self.side.fence.unwrap_or(Fence::WhenDown);
        self.side.is_over && self.side.is_kept(fence, &self.slots)
    }
}

impl Engine {
    /// Allows a session's peer to write, or to read, all pages of these layouts, each in the region beside it, under
    /// [`GrantId::standing(number)`](GrantId::standing), as long as the session lasts. All layouts have as many pages.
    ///
    /// A number is for one session at a time. It is free again when nothing can land under it any more. No message tells
    /// the peer: bytes that it writes before are refused, and their immediates are told all the same.
    pub fn allow(
        &mut self,
        session: SessionId,
        number: u32,
        access: Access,
        parts: &[(u32, PageLayout)],
    ) -> Result<(), Error> {
        let bad = |reason| Err(Error::BadGrant { reason });
        if number >= GrantId::STANDING {
            return bad("the number is not one of a standing grant");
        }
        if self.side.standing.contains_key(&number) {
            return bad("the number is in use");
        }
        if self.sessions.get(&session).is_none_or(|lanes| lanes.side.is_over) {
            return bad("the session is unknown or over");
        }
        let Some(count) = parts.first().map(|(_, part)| part.pages) else { return bad("there are no parts") };
        if parts.iter().any(|(_, part)| part.pages != count) {
            return bad("the parts have different numbers of pages");
        }
        for &(region, part) in parts {
            let Some(&region_bytes) = self.region_bytes.get(region as usize) else {
                return Err(Error::UnknownRegion { side: "local", region });
            };
            match part.validate(region_bytes) {
                Ok(()) => {}
                Err(LayoutError::OutsideRegion { end, region_bytes }) => {
                    return Err(Error::OutOfRange { side: "local", end, region_bytes });
                }
                Err(_) => return bad("a part has no pages, or they overlap"),
            }
        }
        self.side.standing.insert(number, Standing { session, revoked: None });
        let granted = self.grant_on_rails(session, number, access, parts);
        if granted.is_err() {
            // No write was allowed yet, and yet a rail may have taken it.
            self.revoke_standing(session, number);
            self.free_numbers(session);
        }
        granted
    }

    fn grant_on_rails(
        &mut self,
        session: SessionId,
        number: u32,
        access: Access,
        parts: &[(u32, PageLayout)],
    ) -> Result<(), Error> {
        let pages: Vec<u32> = (0..parts[0].1.pages).collect();
        for at in self.rails_of(session) {
            let rail = &mut self.rails[at];
            let buffer = |&(region, layout)| GrantedBuffer { region: rail.regions[region as usize], layout };
            let buffers: Vec<GrantedBuffer> = parts.iter().map(buffer).collect();
            rail.port.grant(&Grant {
                id: GrantId::standing(number),
                peer: PeerId(session.0),
                access,
                buffers: &buffers,
                pages: &pages,
            })?;
        }
        Ok(())
    }

    /// The `nth` of the session's lanes that are up, counted round and round; none of a session that is
    /// over.
    pub fn side_lane(&self, session: SessionId, nth: usize) -> Option<u8> {
        let slots = &self.sessions.get(&session).filter(|lanes| !lanes.side.is_over)?.slots;
        let up = || slots.iter().zip(0u8..).filter(|(lane, _)| lane.state == LaneState::Up);
        let count = up().count();
        up().nth(nth.checked_rem(count)?).map(|(_, slot)| slot)
    }

    /// What the regions of both sides are called on a lane of a session; the same as long as the session lasts.
    pub fn side_regions(&self, session: SessionId, lane: u8) -> Option<LaneRegions> {
        let slot = self.sessions.get(&session)?.slots.get(usize::from(lane))?;
        let local = self.rails[slot.rail].regions.clone();
        Some(LaneRegions { slot: lane, local, remote: slot.remote.clone() })
    }

    /// Posts writes, or reads, on a lane of a session. The caller has set their shapes, and the grants as the peer
    /// [allowed](Engine::allow) them; with reads there is no immediate. The engine puts the immediate and the token on the last one, and takes them from all
    /// others. A short post is back-pressure: the caller offers the rest again later, with the same immediate and token.
    /// So it is on a lane that is not up, and for a token while too many are
    /// [out](super::EngineOptions::max_side_tokens).
    ///
    /// Each token comes back by [`next_side_done`](Engine::next_side_done), or the session's end is told. Allocates
    /// nothing.
    pub fn post_side(
        &mut self,
        session: SessionId,
        lane: u8,
        ops: &mut [Op<'_>],
        imm: Option<u32>,
        token: Option<u32>,
    ) -> Result<Posted, Error> {
        if imm.is_some_and(|imm| imm != Imm::new(Kind::Experts, imm).value()) {
            return Err(Error::BadOp { reason: "an immediate has 30 bits" });
        }
        let reads = ops.iter().filter(|op| op.direction == Direction::Read).count();
        if reads > 0 && (reads < ops.len() || imm.is_some()) {
            return Err(Error::BadOp { reason: "reads come without writes, and without an immediate" });
        }
        let most_tokens = self.options.max_side_tokens;
        let has_room =
            self.side.out + self.side.dones.len() < most_tokens.saturating_mul(self.sessions.len());
        let Some(lanes) = self.sessions.get_mut(&session) else { return Ok(Posted::default()) };
        let Some(slot) = lanes.slots.get_mut(usize::from(lane)) else { return Ok(Posted::default()) };
        let (Some(id), LaneState::Up, false) = (slot.id, slot.state, lanes.side.is_over) else {
            return Ok(Posted::default());
        };
        if token.is_some() && !(has_room && lanes.side.tokens < most_tokens) {
            return Ok(Posted::default());
        }
        for op in ops.iter_mut() {
            (op.imm, op.token) = (None, None);
        }
        let Some(last) = ops.last_mut() else { return Ok(Posted::default()) };
        last.imm = imm.map(|imm| Imm::new(Kind::Experts, imm).bits());
        last.token = token.map(side_token);
        let rail = &mut self.rails[slot.rail];
        let posted = match rail.port.post(id, ops) {
            Ok(posted) => posted,
            // The lane's `Down` is on its way.
            Err(Error::LaneDown { .. } | Error::LaneNotUp { .. }) => return Ok(Posted::default()),
            Err(error) => return Err(error),
        };
        let part = ops.get(posted.ops).map_or(0, |op| op.part_bytes(posted.within));
        let bytes = part + ops[..posted.ops].iter().filter_map(Op::bytes).sum::<u64>();
        match reads {
            0 => rail.stats.written_bytes += bytes,
            _ => rail.stats.read_bytes += bytes,
        }
        slot.load += (bytes as f64 + 64.0) / rail.bytes_per_second as f64;
        slot.side.is_used |= posted != Posted::default();
        if token.is_some() && posted.ops == ops.len() {
            slot.side.tokens += 1;
            lanes.side.tokens += 1;
            self.side.out += 1;
        }
        Ok(posted)
    }

    /// A token of [`post_side`](Engine::post_side) that came back, oldest first.
    pub fn next_side_done(&mut self) -> Option<SideDone> {
        let done = self.side.dones.pop_front()?;
        if let Some(lanes) = self.sessions.get_mut(&done.session) {
            lanes.side.tokens -= 1;
        }
        Some(done)
    }

    /// An immediate that is not counted for a room, oldest first. None is lost: a peer of which more than
    /// [`max_side_arrivals`](super::EngineOptions::max_side_arrivals) wait has its session ended.
    pub fn next_side_arrival(&mut self) -> Option<SideArrival> {
        let arrival = self.side.arrivals.pop_front()?;
        if let Some(lanes) = self.sessions.get_mut(&arrival.session) {
            lanes.side.arrivals -= 1;
        }
        Some(arrival)
    }

    /// Ends a session from this side, whoever dialed it: the peer hears a goodbye, and what it was
    /// [allowed](Engine::allow) is revoked. It is not dialed again; a peer that dialed this node may do so again.
    pub fn close_session(&mut self, now_ns: u64, session: SessionId) {
        self.proto.close_session(now_ns, session);
        self.carry_out(now_ns);
    }

    /// Whether a session is over, and nothing that its peer was [allowed](Engine::allow) to write can land in this node's
    /// memory any more. Where nothing was allowed, whether all lanes are down.
    pub fn is_quiet(&self, session: SessionId) -> bool {
        match self.sessions.get(&session) {
            Some(lanes) => lanes.is_quiet(),
            // Its lanes were down before it was forgotten.
            None => self.side.standing.values().all(|standing| standing.session != session),
        }
    }

    /// Whether all lanes of a session are down: nothing of this node's memory is read for it any more.
    pub fn is_down(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_none_or(|lanes| lanes.slots.iter().all(|lane| lane.id.is_none()))
    }

    /// A session is over: takes back what its peer was allowed.
    pub(super) fn end_side(&mut self, session: SessionId) {
        let Some(lanes) = self.sessions.get_mut(&session) else { return };
        lanes.side.is_over = true;
        let numbers: Vec<u32> = self.side.numbers_of(session).collect();
        for number in numbers {
            self.revoke_standing(session, number);
        }
        self.free_numbers(session);
    }

    fn revoke_standing(&mut self, session: SessionId, number: u32) {
        let mut fence = Fence::Now;
        for at in self.rails_of(session) {
            fence = fence.max(self.rails[at].port.revoke(GrantId::standing(number)));
        }
        if let Some(standing) = self.side.standing.get_mut(&number) {
            // A port that is asked again no longer knows the grant.
            fence = *standing.revoked.get_or_insert(fence);
        }
        if let Some(lanes) = self.sessions.get_mut(&session) {
            lanes.side.fence = lanes.side.fence.max(Some(fence));
        }
    }

    /// Frees the numbers of a session under which nothing can land any more.
    fn free_numbers(&mut self, session: SessionId) {
        let Some(lanes) = self.sessions.get(&session) else { return };
        self.side.standing.retain(|_, standing| {
            standing.session != session
                || standing.revoked.is_none_or(|fence| !lanes.side.is_kept(fence, &lanes.slots))
        });
    }

    pub(super) fn side_arrived(&mut self, now_ns: u64, session: SessionId, slot: u8, bits: u32) {
        let most = self.options.max_side_arrivals;
        if most == 0 {
            return;
        }
        let most_of_all = most.saturating_mul(self.sessions.len());
        let Some(lanes) = self.sessions.get_mut(&session).filter(|lanes| !lanes.side.is_over) else {
            // What it tells of may have been refused, and the session's end is told.
            return;
        };
        if lanes.side.arrivals < most && self.side.arrivals.len() < most_of_all {
            lanes.side.arrivals += 1;
            self.side.arrivals.push_back(SideArrival { session, slot, bits });
        } else {
            // What comes after a lost one must not be told either.
            lanes.side.is_over = true;
            let what = "sent more immediates outside rooms than this node keeps";
            self.proto.lose_session(now_ns, session, SessionEnd::Misbehaved { what });
        }
    }

    /// A token came back that may be one of a post outside rooms; false if it is not.
    pub(super) fn side_done(&mut self, session: SessionId, slot: u8, token: Token) -> bool {
        if token.0 & SIDE_TOKEN == 0 {
            return false;
        }
        if let Some(lane) = self.slot(session, slot) {
            lane.side.tokens -= 1;
            self.side.out -= 1;
            self.side.dones.push_back(SideDone { session, token: token.0 as u32 });
        }
        true
    }

    /// A lane is down: its tokens do not come back. The session ends if it is not over yet.
    pub(super) fn side_lane_down(&mut self, now_ns: u64, session: SessionId, slot: u8, cause: DownCause) {
        let Some(lanes) = self.sessions.get_mut(&session) else { return };
        lanes.side.peer_died |= cause == DownCause::PeerDied;
        let Some(lane) = lanes.slots.get_mut(usize::from(slot)) else { return };
        let LaneSide { is_used, tokens } = std::mem::take(&mut lane.side);
        lanes.side.tokens -= tokens;
        self.side.out -= tokens;
        if is_used && !lanes.side.is_over {
            self.proto.lose_session(now_ns, session, SessionEnd::by_lane(cause));
        }
        self.free_numbers(session);
    }
}

impl Side {
    fn numbers_of(&self, session: SessionId) -> impl Iterator<Item = u32> {
        self.standing.iter().filter(move |(_, of)| of.session == session).map(|(&number, _)| number)
    }
}

/// Tokens of rooms do not have this bit.
const SIDE_TOKEN: u64 = 1 << 63;

fn side_token(token: u32) -> Token {
    Token(SIDE_TOKEN | u64::from(token))
}
