//! What has been planned goes out: the rooms that have something to post share the bytes of a turn.

use std::ops::Range;
use std::sync::Arc;

use crossdock_engine::{Engine, LaneRegions, TransferFailed, TransferId};
use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{Misfit, RoomId, SessionId, Who};
use crossdock_transport::{Direction, GrantId, Op};

use super::Worker;
use super::flight::Noted;
use super::proof::{moved_sums, sum, sum_on};
use super::room::{Decode, Item, Kind, Room, SendingRoom};
use crate::checksum::Summing;
use crate::params::{Answer, Ask};
use crate::{CacheLayout, Cursor, PageTable, Plan, PlanError, PlanInput, Route, VerifyError};

/// One attempt at moving a room's bytes.
pub(super) struct Run {
    pub transfer: TransferId,
    pub session: SessionId,
    pub direction: Direction,
    pub grant: GrantId,
    pub ask: Ask,
    pub cache: Arc<CacheLayout>,
    pub remote_pages: Arc<[u32]>,
    /// Built for the whole room when the run begins, while nobody waits, and then used for whatever is posted.
    pub plan: Plan,
    /// Which item is next, and how far it has been posted.
    pub at: usize,
    pub cursor: Option<Cursor>,
    /// The lane that was offered ops last.
    pub lane: Option<LaneRegions>,
    pub posted_bytes: u64,
    /// Everything has been posted, and the peer wants sums of it.
    pub sums: Option<Summing>,
    pub posted_all: bool,
    pub noted: Noted,
}

/// What came of one room's turn at the ports.
pub(super) enum Pumped {
    /// The ports take no more in this turn.
    Full { progress: bool },
    /// There is more, and what may be posted in this turn is used up.
    More,
    /// Nothing to post until something changes.
    Nothing,
    /// The two sides' layouts, pages or tokens do not fit together.
    Mismatch(Misfit),
}

/// Ops offered to a port at once.
const BATCH: usize = 16;

impl Worker {
    pub(super) fn wake(&mut self, id: RoomId) {
        if let Some(room) = self.rooms.get_mut(&id)
            && !std::mem::replace(&mut room.is_ready, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Gives the rooms that have something to post their turns at the ports, until `left` bytes have been posted.
    pub(super) fn pump(&mut self, now: u64, left: &mut u64) -> bool {
        let mut active = false;
        self.blocked.take_firsts(|room| self.ready.push_back(room));
        let mut tries = self.ready.len();
        while tries > 0 {
            tries -= 1;
            if *left == 0 {
                return true;
            }
            let Some(id) = self.ready.pop_front() else { break };
            let session = self.rooms.get(&id).and_then(Room::moves_in);
            let pumped = self.pump_room(now, id, left);
            if let Some(room) = self.rooms.get_mut(&id) {
                room.is_ready = matches!(pumped, Pumped::Full { .. } | Pumped::More);
            }
            // What has not filled the lanes leaves something to the next one.
            let next = match pumped {
                Pumped::Full { .. } => None,
                _ => session.and_then(|session| self.blocked.next_of(session)),
            };
            match pumped {
                // Where nothing was taken, the port wakes the loop when it takes more.
                Pumped::Full { progress } => {
                    active |= progress;
                    match session {
                        Some(session) => self.blocked.add(session, id),
                        None => self.ready.push_back(id),
                    }
                }
                Pumped::More => {
                    self.ready.push_back(id);
                    active = true;
                }
                Pumped::Nothing => active = true,
                Pumped::Mismatch(misfit) => {
                    active = true;
                    self.engine.proto().mismatch(now, id, misfit);
                }
            }
            if let Some(next) = next {
                self.ready.push_back(next);
                tries += 1;
            }
        }
        active
    }

    fn pump_room(&mut self, now: u64, id: RoomId, left: &mut u64) -> Pumped {
        let Some(room) = self.rooms.get_mut(&id) else { return Pumped::Nothing };
        match &mut room.kind {
            Kind::Sending(sending) => {
                let SendingRoom { run: Some(run), pages, items, finish, .. } = sending else {
                    return Pumped::Nothing;
                };
                let local = local_table(&self.layout, pages, Direction::Write, &run.ask);
                let posted = post_items(&mut self.engine, now, run, &local, items, left);
                run.note(&mut self.engine, now, id, false);
                if let Some(pumped) = posted {
                    return pumped;
                }
                let (false, Some(aux)) = (run.posted_all, finish) else { return Pumped::Nothing };
                if run.ask.checksums && run.sums.is_none() {
                    match moved_sums(&self.memory, &local, &run.cache, &run.ask) {
                        Ok(sums) => run.sums = Some(sums),
                        Err(error) => return cannot_sum(&room.span, &error.into()),
                    }
                }
                let checksums = match sum_on(&mut run.sums, &self.memory, &local, left) {
                    Ok(Some(checksums)) => checksums,
                    Ok(None) => return Pumped::More,
                    Err(error) => return cannot_sum(&room.span, &error),
                };
                run.posted_all = true;
                // Kept, because another attempt may have to say it again.
                let answer = Answer { tokens: run.ask.tokens, aux: aux.clone(), checksums }.encode();
                self.engine.posted_all(now, run.transfer, answer);
            }
            Kind::Decode(decode) if decode.proof.is_some() => {
                let Decode { proof: Some(proof), pages, ask, .. } = decode else { return Pumped::Nothing };
                let local = local_table(&self.layout, pages, Direction::Read, ask);
                match sum(left, |left| room.span.in_scope(|| proof.advance(&self.memory, &local, left))) {
                    None => return Pumped::More,
                    Some(proven) => {
                        decode.proof = None;
                        match proven || is_planted(Planted::ChecksumUnchecked) {
                            true => self.engine.proto().accept(now, id),
                            false => self.engine.proto().reject(now, id),
                        }
                    }
                }
            }
            Kind::Decode(Decode { reads: Some(run), pages, ask, .. }) => {
                let local = local_table(&self.layout, pages, Direction::Read, ask);
                let layers = overlap(&self.layout.layers(), &run.cache.layers());
                let whole = [Item { layers, tokens: 0..ask.tokens }];
                let posted = post_items(&mut self.engine, now, run, &local, &whole, left);
                run.note(&mut self.engine, now, id, false);
                if let Some(pumped) = posted {
                    return pumped;
                }
                if !std::mem::replace(&mut run.posted_all, true) {
                    self.engine.posted_all(now, run.transfer, Vec::new());
                }
            }
            Kind::Serving(serving) => {
                if serving.sums.is_none() {
                    return Pumped::Nothing;
                }
                let table = self.layout.prefill_table(&serving.ask, &serving.pages);
                let checksums = match sum_on(&mut serving.sums, &self.memory, &table, left) {
                    Ok(Some(checksums)) => checksums,
                    Ok(None) => return Pumped::More,
                    Err(error) => return cannot_sum(&room.span, &error),
                };
                let answer = Answer { tokens: serving.tokens, aux: serving.aux.clone(), checksums };
                self.engine.proto().offer(now, id, answer.encode());
            }
            Kind::Decode(_) => {}
        }
        Pumped::Nothing
    }
}

/// What of a plan's error the end of the room says. The rest is in the room's log.
pub(super) fn misfit(error: &PlanError, direction: Direction) -> Misfit {
    let (source, destination) = match direction {
        Direction::Write => (Who::Here, Who::Peer),
        Direction::Read => (Who::Peer, Who::Here),
    };
    match *error {
        PlanError::Source(_) => Misfit::Pages { whose: source },
        PlanError::Destination(_) => Misfit::Pages { whose: destination },
        PlanError::DuplicatePage { page } => Misfit::DuplicatePage { whose: destination, page },
        PlanError::Unbridgeable { .. }
        | PlanError::NoCommonLayers { .. }
        | PlanError::BadTokens { .. }
        | PlanError::NothingInCommon
        | PlanError::TooManyKinds { .. }
        | PlanError::TooManyShapes { .. } => Misfit::Layouts,
    }
}

fn cannot_sum(span: &tracing::Span, error: &VerifyError) -> Pumped {
    span.in_scope(|| tracing::warn!("what moves cannot be summed: {error}"));
    Pumped::Mismatch(Misfit::Layouts)
}

/// Posts a room's share of its items. `None`: all of them have been posted.
fn post_items(
    engine: &mut Engine,
    now: u64,
    run: &mut Run,
    local: &PageTable<'_>,
    items: &[Item],
    left: &mut u64,
) -> Option<Pumped> {
    while let Some(item) = items.get(run.at) {
        match post_item(engine, now, run, local, item, left) {
            Pumped::Nothing => {
                run.at += 1;
                run.cursor = None;
            }
            other => return Some(other),
        }
    }
    None
}

/// Posts what is left of one item. [`Pumped::Nothing`]: all of it has been.
fn post_item(
    engine: &mut Engine,
    now: u64,
    run: &mut Run,
    local: &PageTable<'_>,
    item: &Item,
    left: &mut u64,
) -> Pumped {
    let moved = local.layout.moved(&run.ask).start;
    let tokens = item.tokens.start.max(moved)..item.tokens.end.max(moved);
    if tokens.is_empty() {
        return Pumped::Nothing;
    }
    if run.plan.tokens() != tokens {
        let input = plan_input(*local, &run.cache, &run.remote_pages, run.direction, &run.ask, tokens);
        if let Err(error) = run.plan.narrow(&input) {
            return Pumped::Mismatch(misfit(&error, run.direction));
        }
    }
    let layers = overlap(&item.layers, &run.plan.layers());
    if layers.is_empty() {
        // The peer keeps none of them.
        return Pumped::Nothing;
    }
    post_layers(engine, now, run, layers, left)
}

/// This side's pages of a run.
pub(super) fn local_table<'a>(
    layout: &'a CacheLayout,
    pages: &'a [u32],
    direction: Direction,
    ask: &Ask,
) -> PageTable<'a> {
    match direction {
        Direction::Write => layout.prefill_table(ask, pages),
        Direction::Read => layout.decode_table(ask, pages),
    }
}

pub(super) fn plan_input<'a>(
    local: PageTable<'a>,
    cache: &'a CacheLayout,
    remote_pages: &'a [u32],
    direction: Direction,
    ask: &Ask,
    tokens: Range<u32>,
) -> PlanInput<'a> {
    match direction {
        Direction::Write => {
            PlanInput { source: local, destination: cache.decode_table(ask, remote_pages), tokens }
        }
        Direction::Read => {
            PlanInput { source: cache.prefill_table(ask, remote_pages), destination: local, tokens }
        }
    }
}

fn post_layers(engine: &mut Engine, now: u64, run: &mut Run, layers: Range<u32>, left: &mut u64) -> Pumped {
    let posted_before = run.posted_bytes;
    loop {
        let full = Pumped::Full { progress: run.posted_bytes > posted_before };
        let Some(slot) = engine.lane(run.transfer) else { return full };
        if run.lane.as_ref().is_none_or(|lane| lane.slot != slot) {
            run.lane = engine.lane_regions(run.transfer, slot);
        }
        let Some(LaneRegions { local, remote, .. }) = &run.lane else { return full };
        let route = Route { direction: run.direction, grant: run.grant, local, remote };
        let Ok(ops) = run.plan.ops(route, layers.clone()) else { return Pumped::Mismatch(Misfit::Layouts) };
        let cursor = run.cursor.unwrap_or_else(|| ops.start());
        if ops.is_done(cursor) {
            return Pumped::Nothing;
        }
        // Of the many short chunks each is one op, and need not make room for more.
        let (mut one, mut many);
        let batch: &mut [Op<'_>] = if ops.is_last(cursor) {
            one = [Op::notify(0)];
            &mut one
        } else {
            many = [Op::notify(0); BATCH];
            &mut many
        };
        let filled = ops.fill(cursor, batch);
        let posted = match engine.post(now, run.transfer, slot, &mut batch[..filled]) {
            Ok(posted) => posted,
            // The room has ended; the protocol says the rest.
            Err(TransferFailed { .. }) => return Pumped::Nothing,
        };
        let bytes: u64 = batch[..posted.ops].iter().filter_map(Op::bytes).sum();
        let part = batch.get(posted.ops).map_or(0, |op| op.part_bytes(posted.within));
        run.posted_bytes += bytes + part;
        *left = left.saturating_sub(bytes + part);
        let cursor = ops.advance(cursor, posted);
        run.cursor = Some(cursor);
        if ops.is_done(cursor) {
            return Pumped::Nothing;
        }
        if *left == 0 {
            return Pumped::More;
        }
    }
}

pub(super) fn overlap(a: &Range<u32>, b: &Range<u32>) -> Range<u32> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
