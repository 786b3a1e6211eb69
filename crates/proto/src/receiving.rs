//! Push: the prefill side writes into pages that the decode side has granted.
//!
//! ```text
//! decode (receiving)                     prefill (sending)
//!   Grant    ─────────────────────────────▶   pages, for how long
//!            ◀═════════════════════════════   writes with immediates, on any lane in any order
//!            ◀─────────────────────────────   Finish: how many immediates to expect on each lane
//!   Delivered ────────────────────────────▶   when the counts agree and the bytes are right
//!
//!   Cancel   ─────────────────────────────▶   either side, at any time
//!            ◀─────────────────────────────   Release: no op under the grant is on its way any more
//!
//!            ◀── a lane goes down at both ends; LaneLost ──▶
//!   Regrant  ─────────────────────────────▶   next attempt, new generation; counting begins again
//!            ◀─────────────────────────────   Release of the old one, then everything again
//! ```

use crossdock_memory::{QuarantineReason, Until};
use crossdock_transport::{Access, Fence, GrantId};

use crate::action::Action;
use crate::end::{End, Failure, RoomRefusal, SessionEnd, Stage, Who};
use crate::flight::{RingId, What};
use crate::grants::{Revocation, is_same};
use crate::message::{CancelWhy, MAX_LANES, Message, RoleKind, RoomName, RoomOnWire};
use crate::notice::{Homecoming, Notice};
use crate::planted::{Planted, is_planted};
use crate::proto::{PeerName, Proto, RoomId, SessionId};
use crate::room::{Finish, Moving, Receive, Receiving, Role, Room, RoomError, Unopened};
use crate::session::Session;

impl Proto {
    /// Opens the decode end of a push: the peer may write these pages until the room ends.
    pub fn receive(&mut self, now_ns: u64, receive: Receive) -> Result<RoomId, Unopened> {
        self.now_ns = now_ns;
        let bytes = receive.params.len() + 4 * receive.pages.len();
        if let Err(error) = self.check_decode(receive.peer, receive.room, RoleKind::Receiving, bytes) {
            return Err(Unopened { error, pages: Homecoming::new(receive.pages) });
        }
        let id = self.add_room(Room {
            name: receive.room,
            serial: 0,
            ring: RingId::NODE,
            opened_ns: 0,
            met_ns: None,
            peer: Some(receive.peer),
            rank: receive.rank,
            session: None,
            deadline_ns: receive.deadline_ns,
            end: None,
            stage: Stage::Session,
            moving: Moving::No,
            role: Role::Receiving(Receiving {
                pages: Some(receive.pages),
                buffers: receive.buffers,
                params: receive.params,
                attempt: 0,
                grant: None,
                grants: Vec::new(),
                arrivals: [0; MAX_LANES],
                last_arrival_ns: 0,
                has_grown: false,
                finish: None,
            }),
        });
        self.begin_decode(id, receive.peer);
        Ok(id)
    }

    /// An immediate of the KV kind arrived on a lane.
    pub fn arrived(&mut self, now_ns: u64, session: SessionId, slot: u8, grant: GrantId) {
        self.now_ns = now_ns;
        let counted = match self.grants.find(grant) {
            Some(given) if given.session == session => Some(given.room),
            _ => None,
        };
        let is_ready = |s: &Session| s.slots.get(usize::from(slot)).is_some_and(|slot| slot.here.ready);
        if counted.is_some() && !self.sessions.get(&session).is_some_and(is_ready) {
            let what = "wrote on a lane that was not ready";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        }
        let Some((id, room)) = counted.and_then(|id| Some((id, self.rooms.get_mut(&id)?))) else {
            self.counters.stale_arrivals += 1;
            return;
        };
        match (&mut room.role, &room.end) {
            (Role::Receiving(r), None) if r.grant.is_some_and(|current| is_same(current, grant)) => {
                self.counters.arrivals += 1;
                if r.count(slot).is_none() {
                    let what = "sent more immediates than a finish can name";
                    return self.end_session(session, SessionEnd::Misbehaved { what });
                }
                if room.stage == Stage::Grant {
                    room.stage = Stage::Transfer;
                }
                if !std::mem::replace(&mut r.has_grown, true) {
                    self.grown.push_back(id);
                }
                let is_first = std::mem::replace(&mut r.last_arrival_ns, now_ns) == 0;
                let is_finished = r.finish.is_some();
                if is_first {
                    self.note_room(id, What::Arriving { slot });
                }
                if is_finished {
                    self.check_landed(id);
                }
            }
            _ => self.counters.stale_arrivals += 1,
        }
    }

    /// Refuses what cannot become a decode end, of which so many bytes are told to the peer.
    pub(crate) fn check_decode(
        &self,
        peer: PeerName,
        name: RoomName,
        kind: RoleKind,
        bytes: usize,
    ) -> Result<(), RoomError> {
        self.has_room_for_more()?;
        if let PeerName::Target(target) = peer
            && !self.targets.contains_key(&target)
        {
            return Err(RoomError::UnknownPeer);
        }
        let open = self.session_of(peer).is_some_and(|s| self.bound.contains_key(&(kind, name, s)));
        match open || self.waiting.contains_key(&(peer, kind, name)) {
            true => Err(RoomError::Duplicate { room: name }),
            false => self.fits_a_frame(bytes),
        }
    }

    /// Binds a decode end to its session, or lets it wait for one.
    pub(crate) fn begin_decode(&mut self, id: RoomId, peer: PeerName) {
        match self.session_of(peer) {
            Some(session) => self.bind_decode(id, session),
            None => match self.why_never(peer) {
                Some(end) => self.end_room(id, end, None),
                None => {
                    if let Some(room) = self.rooms.get(&id) {
                        self.waiting.insert((peer, room.role.kind(), room.name), id);
                    }
                }
            },
        }
    }

    /// Why there will be no session with a peer, if that is known.
    fn why_never(&self, peer: PeerName) -> Option<End> {
        if self.is_shut {
            return Some(End::PeerLost { cause: SessionEnd::ClosedHere });
        }
        let PeerName::Target(target) = peer else {
            return None;
        };
        self.targets.get(&target)?.why_never()
    }

    /// The decode ends that wait for a session with a peer that is named so.
    pub(crate) fn waiting_for(&self, peer: PeerName) -> Vec<RoomId> {
        let first = RoomName { room: 0, use_count: 0, share: 0 };
        let last = RoomName { room: u64::MAX, use_count: u32::MAX, share: u32::MAX };
        let named = (peer, RoleKind::Receiving, first)..=(peer, RoleKind::Serving, last);
        self.waiting.range(named).map(|(_, room)| *room).collect()
    }

    pub(crate) fn stop_waiting(&mut self, id: RoomId) {
        if let Some(room) = self.rooms.get(&id)
            && let Some(peer) = room.peer
        {
            self.waiting.remove(&(peer, room.role.kind(), room.name));
        }
    }

    pub(crate) fn bind_decode(&mut self, id: RoomId, session: SessionId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let (name, kind) = (room.name, room.role.kind());
        if self.bound.contains_key(&(kind, name, session)) {
            let end = End::Refused { by: Who::Here, why: RoomRefusal::Duplicate };
            return self.end_room(id, end, None);
        }
        self.stop_waiting(id);
        self.bind(id, session);
        if let Some(room) = self.rooms.get_mut(&id) {
            room.stage = Stage::Grant;
        }
        // Nobody is granted the pages that another one is to fill, nor asked for what another one has.
        if let Err(misfit) = self.is_meant(id, session) {
            let end = End::Refused { by: Who::Here, why: RoomRefusal::Mismatch(misfit) };
            return self.end_room(id, end, None);
        }
        match kind {
            RoleKind::Receiving => self.grant_receiving(id, session, 0),
            _ => self.want(id, session),
        }
    }

    /// Grants the pages under a new name, and tells the sender.
    fn grant_receiving(&mut self, id: RoomId, session: SessionId, attempt: u32) {
        let Some(grant) = self.give(id, session, Access::Write) else {
            let end = End::Refused { by: Who::Here, why: RoomRefusal::Busy };
            return self.end_room(id, end, Some(CancelWhy::Busy));
        };
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let Role::Receiving(r) = &mut room.role else { return };
        r.attempt = attempt;
        r.grant = Some(grant);
        r.grants.push(grant);
        if !is_planted(Planted::ArrivalsCarriedOver) {
            r.arrivals = [0; MAX_LANES];
        }
        r.last_arrival_ns = 0;
        r.finish = None;
        self.act(Action::Grant { session, grant, room: id });
        let Some(room) = self.rooms.get(&id) else { return };
        let Role::Receiving(r) = &room.role else { return };
        let message = match attempt {
            0 => Message::Grant {
                room: room.on_wire(),
                access: Access::Write,
                attempt,
                grant,
                duration_ns: self.duration_ns(room),
                params: r.params.clone(),
                pages: r.pages.as_ref().map(|pages| pages.ids().to_vec()).unwrap_or_default(),
            },
            _ => Message::Regrant { room: room.on_wire(), attempt, grant },
        };
        let pages = room.role.pages();
        self.note_room(id, What::GrantSent { grant, attempt, pages });
        self.send(session, &message);
    }

    /// The next attempt of a room whose bytes may have been lost with a lane.
    pub(crate) fn regrant(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let (Role::Receiving(r), None, Some(session)) = (&room.role, &room.end, room.session) else { return };
        // Bytes that have all been counted need not come again.
        if room.stage == Stage::Verify {
            return;
        }
        let (old, attempt) = (r.grants.clone(), r.attempt + 1);
        self.revoke_all(&old);
        self.counters.further_attempts += 1;
        self.grant_receiving(id, session, attempt);
    }

    pub(crate) fn on_finish(
        &mut self,
        session: SessionId,
        room: RoomOnWire,
        attempt: u32,
        arrivals: &[u32],
        aux: Vec<u8>,
    ) {
        let Some(id) = self.spoken_of(RoleKind::Receiving, session, room) else { return };
        let lanes = self.sessions.get(&session).map_or(0, Session::lanes);
        let Some(Room { role: Role::Receiving(r), .. }) = self.rooms.get_mut(&id) else { return };
        // An earlier attempt's finish was on its way when the next one was agreed.
        if attempt < r.attempt && !is_planted(Planted::EarlierFinishBelieved) {
            return;
        }
        let wrong = if arrivals.len() > lanes {
            Some("finished with more lanes than there are")
        } else if attempt > r.attempt {
            Some("finished an attempt that was not begun")
        } else if r.finish.is_some() {
            Some("finished an attempt twice")
        } else {
            None
        };
        if let Some(what) = wrong {
            return self.end_session(session, SessionEnd::Misbehaved { what });
        }
        let mut expected = [0; MAX_LANES];
        expected[..arrivals.len()].copy_from_slice(arrivals);
        r.finish = Some(Finish { arrivals: expected, aux });
        let (expected, counted) = (total(&expected), total(&r.arrivals));
        self.note_room(id, What::FinishCame { attempt, expected, counted });
        self.check_landed(id);
    }

    /// Whether everything that the sender has finished is here.
    fn check_landed(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let (Role::Receiving(r), None, Some(session)) = (&room.role, &room.end, room.session) else { return };
        let (Some(finish), Some(current)) = (&r.finish, r.grant) else { return };
        if r.arrivals.iter().zip(&finish.arrivals).any(|(counted, expected)| counted > expected) {
            let what = "sent more immediates than it finished with";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        }
        if room.stage == Stage::Verify {
            return;
        }
        let earlier_quiet = r
            .grants
            .iter()
            .filter(|&&grant| grant != current)
            .all(|&grant| self.grants.find(grant).is_none_or(|given| self.is_quiet(given)))
            || is_planted(Planted::EarlierAttemptForgotten);
        let all_here = r.arrivals == finish.arrivals || is_planted(Planted::FinishBelieved);
        if !all_here || !earlier_quiet {
            return;
        }
        // The sender posts nothing after its finish, and every op before it has been counted: the grant is over
        // by the sender's own word and by the count.
        if let Some(given) = self.grants.find_mut(current) {
            given.released = Some(0);
        }
        let Some(Room { role: Role::Receiving(r), stage, .. }) = self.rooms.get_mut(&id) else { return };
        *stage = Stage::Verify;
        let aux = r.finish.as_mut().map(|finish| std::mem::take(&mut finish.aux)).unwrap_or_default();
        let counted = total(&r.arrivals);
        self.note_room(id, What::Landed { counted });
        self.tell(Notice::Landed { room: id, session, aux });
    }

    pub(crate) fn accept_landed(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let (None, Stage::Verify, Some(session)) = (&room.end, room.stage, room.session) else { return };
        let (on_wire, kind) = (room.on_wire(), room.role.kind());
        if kind == RoleKind::Receiving {
            self.note_room(id, What::DeliveredSent);
            self.send(session, &Message::Delivered { room: on_wire });
        }
        self.end_room(id, End::Delivered, None);
    }

    pub(crate) fn receiving_ended(&mut self, id: RoomId) {
        let now_ns = self.now_ns;
        let Some(Room { role: Role::Receiving(r), .. }) = self.rooms.get(&id) else { return };
        let grants = r.grants.clone();
        self.revoke_all(&grants);
        let quiet = grants.iter().all(|&g| self.grants.find(g).is_none_or(|given| self.is_quiet(given)));
        if !quiet {
            let peer = self.peer_name_of(id);
            if let Some(Room { role: Role::Receiving(r), .. }) = self.rooms.get_mut(&id)
                && let Some(pages) = &mut r.pages
            {
                pages.quarantine(QuarantineReason { peer, until: Until::ReleaseOrDeath }, now_ns);
            }
            self.note_room(id, What::Quarantined);
        }
        self.settle(id);
    }

    pub(crate) fn settle_receiving(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let Role::Receiving(r) = &room.role else { return };
        if room.end.is_none() {
            return self.check_landed(id);
        }
        let given = || r.grants.iter().filter_map(|&grant| self.grants.find(grant));
        let quiet = given().all(|given| self.is_quiet(given));
        let only_lanes = given()
            .filter(|given| !self.is_quiet(given))
            .all(|given| given.revocation == Revocation::Done(Fence::WhenDown) || given.released.is_some());
        let (now_ns, peer) = (self.now_ns, self.peer_name_of(id));
        let Some(Room { role: Role::Receiving(r), .. }) = self.rooms.get_mut(&id) else { return };
        if quiet {
            if let Some(pages) = r.pages.take() {
                self.note_room(id, What::Home);
                self.tell(Notice::Home { room: id, pages: Homecoming::new(pages) });
            }
        } else if let (true, Some(pages)) = (only_lanes, &mut r.pages) {
            pages.quarantine(QuarantineReason { peer, until: Until::LanesDown }, now_ns);
        }
        let Some(Room { role: Role::Receiving(r), .. }) = self.rooms.get_mut(&id) else { return };
        let mut grants = std::mem::take(&mut r.grants);
        let free = self.free_quiescent(&mut grants);
        let Some(Room { role: Role::Receiving(r), .. }) = self.rooms.get_mut(&id) else { return };
        r.grants = grants;
        if free && r.pages.is_none() {
            self.drop_room(id);
        }
    }

    /// The peer has given a grant back.
    pub(crate) fn on_released(&mut self, id: RoomId, grant: GrantId, delivered: bool) {
        let Some(room) = self.rooms.get(&id) else { return };
        match &room.role {
            // Released before it was finished: the sender has given up, and its reason comes, or has come, as a
            // Cancel. A grant of an earlier attempt is released in the ordinary course of things.
            Role::Receiving(r)
                if room.end.is_none() && r.grant == Some(grant) && room.stage != Stage::Verify =>
            {
                let end = End::Failed { by: Who::Peer, stage: room.stage, cause: Failure::AtPeer };
                self.end_room(id, end, None);
            }
            Role::Serving(_) => self.served(id, delivered),
            _ => {}
        }
        self.settle(id);
    }
}

/// Of all lanes.
pub(crate) fn total(arrivals: &[u32]) -> u32 {
    arrivals.iter().fold(0, |sum, lane| sum.saturating_add(*lane))
}

impl Receiving {
    /// Counts an immediate of this attempt; `None` if there were as many as can be counted.
    fn count(&mut self, slot: u8) -> Option<()> {
        let arrivals = &mut self.arrivals[usize::from(slot) % MAX_LANES];
        *arrivals = arrivals.checked_add(1)?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_counted_as_far_as_a_number_goes() {
        let mut arrivals = [0; MAX_LANES];
        arrivals[3] = u32::MAX - 1;
        let mut receiving = Receiving {
            pages: None,
            buffers: Vec::new().into(),
            params: Vec::new(),
            attempt: 0,
            grant: None,
            grants: Vec::new(),
            arrivals,
            last_arrival_ns: 0,
            has_grown: false,
            finish: None,
        };
        assert_eq!((receiving.count(3), receiving.arrivals[3]), (Some(()), u32::MAX));
        assert_eq!((receiving.count(3), receiving.arrivals[3]), (None, u32::MAX));
        assert_eq!(receiving.count(4), Some(()), "each lane has its own number");
    }
}
