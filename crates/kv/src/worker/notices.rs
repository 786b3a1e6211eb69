//! What the protocol tells, of sessions and rooms.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossdock_engine::Promise;
use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{End, Misfit, Notice, RoomId, SessionId, Start};
use crossdock_transport::Direction;

use super::Worker;
use super::flight::Noted;
use super::posting::{Run, local_table, misfit, plan_input};
use super::proof::{Proof, moved_sums};
use super::room::{Kind, Room};
use super::whole::{Tell, Whole};
use crate::params::{Answer, Ask};
use crate::request::{Ended, PeerUp};
use crate::{CacheLayout, PageTable, PageTableError, Plan, PlanError, PlanInput};

impl Worker {
    pub(super) fn take_notices(&mut self, now: u64) -> bool {
        let mut active = false;
        loop {
            let Some(notice) = self.engine.next_notice() else {
                // What a notice led to may have decided more.
                if active && self.engine.carry_out(now) {
                    continue;
                }
                return active;
            };
            active = true;
            self.notice(now, notice);
        }
    }

    fn notice(&mut self, now: u64, notice: Notice) {
        match notice {
            Notice::SessionUp { session, target, peer, name, port, app } => {
                tracing::info!(peer = &*name, node = peer.node, port, "session up");
                // Its fingerprint was as ours; a layout that is not what it says is none.
                let cache = CacheLayout::decode(&app).ok();
                let cache = cache.filter(|cache| self.layout.differs_in(cache).is_none());
                self.caches.insert(session, cache.map(Arc::new));
                self.blocked.session_up(session);
                if let Some(up) = target.and_then(|target| self.dialing.remove(&target)) {
                    self.tell(up, Ok(PeerUp { identity: peer, name }));
                }
            }
            Notice::SessionDown { session, target, peer, port, cause } => {
                let address = target.and_then(|target| self.addresses.get(&target));
                let (peer, address) = (peer.as_deref(), address.map(String::as_str));
                tracing::info!(peer, port, address, advice = cause.advice(), "session down: {cause}");
                if let Some(session) = session {
                    self.caches.remove(&session);
                    self.ready.extend(self.blocked.session_down(session));
                }
                // A peer that may still come is waited for; one that refuses never will.
                if !cause.is_retryable()
                    && let Some(up) = target.and_then(|target| self.dialing.remove(&target))
                {
                    self.tell(up, Err(cause));
                }
            }
            Notice::Start(start) => self.start(now, start),
            Notice::Stop { room } => {
                self.note_stopped(now, room);
                match self.rooms.get_mut(&room).map(|room| &mut room.kind) {
                    Some(Kind::Sending(sending)) => sending.run = None,
                    Some(Kind::Decode(decode)) => (decode.reads, decode.proof) = (None, None),
                    Some(Kind::Serving(_)) | None => {}
                };
            }
            Notice::Wanted { room, session, params } => self.wanted(now, room, session, &params),
            Notice::Landed { room, session, aux } => self.landed(now, room, session, &aux),
            Notice::Ended { room, end, peer, port } => {
                if let Some(key) = self.ended(room, Ended { end, peer, port }) {
                    // Nothing makes up for the share that is missing.
                    self.cancel(now, key);
                }
            }
            Notice::Unread { pages } => drop(pages),
            Notice::Home { room, pages } => {
                let Some(Room { kind: Kind::Decode(decode), key, pool, .. }) = self.rooms.get_mut(&room)
                else {
                    return;
                };
                decode.is_home = true;
                let (key, pool) = (*key, *pool);
                if let Some((promise, home)) =
                    self.wholes.get_mut(&key).and_then(|whole| whole.home(pool, pages))
                {
                    self.tell(promise, home);
                }
                self.forget(room);
            }
        }
    }

    fn start(&mut self, now: u64, start: Start) {
        let id = start.room;
        // Stopped again before it was told here.
        let Some(transfer) = self.engine.transfer(id) else { return };
        let cache = self.caches.get(&start.session).cloned().flatten();
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (ask, pages): (_, &[u32]) = match &room.kind {
            Kind::Sending(sending) => (asked(&start.params, room.pool, sending.tokens), &sending.pages),
            Kind::Decode(decode) => {
                let answer = answered(&start.params, decode.ask.tokens);
                (answer.map(|_| decode.ask), &decode.pages)
            }
            Kind::Serving(_) => return,
        };
        room.records_peer(&mut self.engine, start.session);
        let (ask, cache) = match ask.and_then(|ask| Ok((ask, cache.ok_or(Misfit::Unreadable)?))) {
            Ok(both) => both,
            Err(misfit) => return self.engine.proto().mismatch(now, id, misfit),
        };
        let local = local_table(&self.layout, pages, start.direction, &ask);
        let tokens = self.layout.moved(&ask);
        let input = plan_input(local, &cache, &start.remote_pages, start.direction, &ask, tokens);
        let built =
            if matches!(room.kind, Kind::Sending(_)) { planned_ahead(&input) } else { planned(&input) };
        let (plan, noted) = match built {
            Ok(built) => built,
            Err(error) => {
                room.span.in_scope(|| tracing::warn!("the two sides' pages do not fit together: {error}"));
                return self.engine.proto().mismatch(now, id, misfit(&error, start.direction));
            }
        };
        room.span
            .in_scope(|| tracing::debug!(attempt = start.attempt, pages = start.remote_pages.len(), "start"));
        let run = Run {
            transfer,
            session: start.session,
            direction: start.direction,
            grant: start.grant,
            ask,
            cache,
            remote_pages: start.remote_pages,
            noted,
            plan,
            at: usize::from(start.attempt > 0 && is_planted(Planted::NotSentAgain)),
            cursor: None,
            lane: None,
            posted_bytes: 0,
            sums: None,
            posted_all: false,
        };
        match &mut room.kind {
            Kind::Sending(sending) => sending.run = Some(run),
            Kind::Decode(decode) => (decode.reads, decode.proof) = (Some(run), None),
            Kind::Serving(_) => {}
        }
        self.wake(id);
    }

    /// A reader asks for a room that is served here.
    fn wanted(&mut self, now: u64, id: RoomId, session: SessionId, params: &[u8]) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        room.records_peer(&mut self.engine, session);
        let Kind::Serving(serving) = &mut room.kind else { return };
        // What an earlier reader has asked for is of no use to this one.
        serving.sums = None;
        let cache = self.caches.get(&session).and_then(Option::as_ref);
        let asked = asked(params, room.pool, Some(serving.tokens))
            .and_then(|ask| Ok((ask, cache.ok_or(Misfit::Unreadable)?)));
        let (ask, cache) = match asked {
            Ok(both) => both,
            Err(misfit) => return self.engine.proto().mismatch(now, id, misfit),
        };
        serving.ask = ask;
        if !ask.checksums {
            let answer = Answer { tokens: ask.tokens, aux: serving.aux.clone(), checksums: Vec::new() };
            return self.engine.proto().offer(now, id, answer.encode());
        }
        let table = self.layout.prefill_table(&ask, &serving.pages);
        match moved_sums(&self.memory, &table, cache, &ask) {
            Ok(sums) => {
                serving.sums = Some(sums);
                self.wake(id);
            }
            Err(error) => {
                room.span.in_scope(|| tracing::warn!("what is asked for cannot be summed: {error}"));
                self.engine.proto().mismatch(now, id, Misfit::Layouts);
            }
        }
    }

    /// All bytes of a decode room are here.
    fn landed(&mut self, now: u64, id: RoomId, session: SessionId, aux: &[u8]) {
        // The last batch may have come in this very turn, at the end of which the room may be gone.
        self.show_arrivals();
        let Some(room) = self.rooms.get_mut(&id) else { return };
        room.records_peer(&mut self.engine, session);
        let Kind::Decode(decode) = &mut room.kind else { return };
        let answer = match answered(aux, decode.ask.tokens) {
            Ok(answer) => answer,
            Err(misfit) => return self.engine.proto().mismatch(now, id, misfit),
        };
        decode.aux = answer.aux;
        let Some(cache) = self.caches.get(&session).and_then(Option::as_ref) else {
            return self.engine.proto().mismatch(now, id, Misfit::Unreadable);
        };
        if room.pool == 0
            && let Some(whole) = self.wholes.get_mut(&room.key)
            && whole.is_brought(&self.layout, cache, decode.ask.parts) == Some(false)
        {
            return self.engine.proto().mismatch(now, id, Misfit::Gap);
        }
        if !decode.ask.checksums {
            return self.engine.proto().accept(now, id);
        }
        let table = local_table(&self.layout, &decode.pages, Direction::Read, &decode.ask);
        let begin = || Proof::begin(&self.memory, &table, cache, &decode.ask, &answer.checksums);
        decode.proof = Some(room.span.in_scope(begin));
        self.wake(id);
    }

    /// Tells the end of a share. The room, if its other shares are to be given up.
    pub(super) fn ended(&mut self, id: RoomId, ended: Ended) -> Option<u64> {
        let room = self.rooms.get_mut(&id).filter(|room| !room.has_ended)?;
        if let (Some(peer), Some(port)) = (&ended.peer, ended.port) {
            room.span.record("peer", &**peer).record("port", port);
        }
        room.span.in_scope(|| match &ended.end {
            End::Delivered => tracing::debug!("{ended}"),
            end => tracing::warn!(retryable = end.is_retryable(), advice = end.advice(), "{ended}"),
        });
        room.has_ended = true;
        let key = room.key;
        let aux = match &mut room.kind {
            Kind::Decode(decode) => {
                decode.proof = None;
                std::mem::take(&mut decode.aux)
            }
            Kind::Sending(_) | Kind::Serving(_) => Vec::new(),
        };
        self.forget(id);
        let whole = self.wholes.get_mut(&key)?;
        let told = whole.share_ended(ended, aux);
        if whole.is_over() {
            self.wholes.remove(&key);
        }
        let told = told?;
        let is_given_up = matches!(&told, Tell::Received(_, received) if !received.ended.is_delivered());
        self.tell_end(told);
        is_given_up.then_some(key)
    }

    pub(super) fn tell_end(&self, told: Tell) {
        match told {
            Tell::Received(promise, received) => self.tell(promise, received),
            Tell::Ended(promise, ended) => self.tell(promise, ended),
        }
    }

    /// Drops a share of which everything has been told.
    fn forget(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let is_home = match &room.kind {
            Kind::Decode(decode) => decode.is_home,
            Kind::Sending(_) | Kind::Serving(_) => true,
        };
        if !is_home || !room.has_ended {
            return;
        }
        let key = room.key;
        self.rooms.remove(&id);
        if self.wholes.get(&key).is_some_and(Whole::is_over) {
            self.wholes.remove(&key);
        }
    }

    pub(super) fn tell<T>(&self, promise: Promise<T>, what: T) {
        // Where the ticket was dropped nobody looks; pages that come back so return to their pool by being
        // dropped.
        drop(promise.tell(what));
        self.shared.told.raise();
    }

    pub(super) fn show_arrivals(&mut self) {
        while let Some((id, arrivals)) = self.engine.proto().next_arrivals() {
            if let Some(Room { kind: Kind::Decode(decode), .. }) = self.rooms.get_mut(&id) {
                let grown = arrivals.saturating_sub(std::mem::replace(&mut decode.arrived, arrivals));
                decode.arrivals.fetch_add(grown, Ordering::Release);
            }
        }
    }
}

fn planned(input: &PlanInput<'_>) -> Result<(Plan, Noted), PlanError> {
    let plan = Plan::build(input)?;
    let noted = Noted::new(&plan);
    Ok((plan, noted))
}

/// As [`planned`], where source pages may still be to come: then any others tell whether the two sides fit together, and
/// how much it will be, and the plan is for no tokens until some are sent.
fn planned_ahead(input: &PlanInput<'_>) -> Result<(Plan, Noted), PlanError> {
    let PlanInput { source, tokens, .. } = input;
    let Err(PageTableError::NotCovered { needed, given }) = source.covering(tokens) else {
        return planned(input);
    };
    let count = needed.end.saturating_sub(given.start);
    // A peer's number of entries is not yet compared with ours.
    if count > source.of().pages() {
        return planned(input);
    }
    let mut any = source.pages.to_vec();
    any.resize(count as usize, 0);
    let stand_in = PageTable { pages: &any, ..*source };
    let (mut plan, noted) = planned(&PlanInput { source: stand_in, ..input.clone() })?;
    plan.narrow(&PlanInput { tokens: tokens.start..tokens.start, ..input.clone() })?;
    Ok((plan, noted))
}

/// What a decode side asks for of a request that has so many tokens here, if that is known yet.
fn asked(params: &[u8], pool: usize, here: Option<u32>) -> Result<Ask, Misfit> {
    let ask = Ask::decode(params).filter(|ask| usize::from(ask.pool) == pool).ok_or(Misfit::Unreadable)?;
    same_tokens(here.unwrap_or(ask.tokens), ask.tokens).map(|()| ask)
}

/// What a prefill side says of a request that has so many tokens here.
fn answered(params: &[u8], here: u32) -> Result<Answer, Misfit> {
    let answer = Answer::decode(params).ok_or(Misfit::Unreadable)?;
    same_tokens(here, answer.tokens).map(|()| answer)
}

pub(super) fn same_tokens(here: u32, peer: u32) -> Result<(), Misfit> {
    if here == peer { Ok(()) } else { Err(Misfit::Tokens { here, peer }) }
}
