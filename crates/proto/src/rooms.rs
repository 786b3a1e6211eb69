//! What all four ends of rooms have in common: how they begin, end, and give back what they held.

use std::sync::Arc;

use crossdock_transport::{Access, Fence, GrantId};

use crate::action::Action;
use crate::end::{End, Failure, Misfit, SessionEnd, Stage, Who};
use crate::flight::{What, millis};
use crate::grants::{Given, Revocation};
use crate::message::{CancelWhy, Message, Released, RoleKind, RoomOnWire};
use crate::notice::Notice;
use crate::planted::{Planted, is_planted};
use crate::proto::{Proto, RoomId, SessionId, Timer};
use crate::receiving::total;
use crate::room::{Moving, Role, Room, RoomError};

impl Proto {
    /// Adds a room and arms its deadline.
    pub(crate) fn add_room(&mut self, mut room: Room) -> RoomId {
        self.next_room += 1;
        let id = RoomId(self.next_room);
        room.serial = id.0 as u32;
        room.opened_ns = self.now_ns;
        self.arm(room.deadline_ns, Timer::Room(id));
        let left_ms = millis(self.duration_ns(&room));
        let what = What::Opened { role: room.role.kind(), pages: room.role.pages(), left_ms };
        self.rooms.insert(id, room);
        self.note_room(id, what);
        id
    }

    pub(crate) fn has_room_for_more(&self) -> Result<(), RoomError> {
        match self.rooms.len() < self.config.max_rooms as usize {
            true => Ok(()),
            false => Err(RoomError::Limit { limit: self.config.max_rooms }),
        }
    }

    /// Refuses what no frame can carry: so many bytes beside the fixed fields of a message.
    pub(crate) fn fits_a_frame(&self, bytes: usize) -> Result<(), RoomError> {
        let limit = self.config.max_frame_bytes.saturating_sub(LONGEST_FIXED_BYTES);
        match bytes <= limit {
            true => Ok(()),
            false => Err(RoomError::TooLong { bytes, limit }),
        }
    }

    /// Ends a room whose user gives more to go with the pages than a frame can carry.
    pub(crate) fn end_if_too_long(&mut self, id: RoomId, bytes: usize) -> bool {
        let Err(RoomError::TooLong { bytes, limit }) = self.fits_a_frame(bytes) else { return false };
        let stage = self.rooms.get(&id).map_or(Stage::Grant, |r| r.stage);
        let end = End::Failed { by: Who::Here, stage, cause: Failure::TooLong { bytes, limit } };
        self.end_room(id, end, Some(CancelWhy::Failed));
        true
    }

    /// The room that a peer speaks of: it is open here, and not a later one of its name.
    pub(crate) fn spoken_of(&self, kind: RoleKind, session: SessionId, room: RoomOnWire) -> Option<RoomId> {
        let id = *self.bound.get(&(kind, room.name, session))?;
        let any = is_planted(Planted::SerialIgnored);
        self.rooms.get(&id).filter(|r| any || r.serial == room.serial).map(|_| id)
    }

    /// Whether the peer of a session has the rank that a room is for.
    pub(crate) fn is_meant(&self, id: RoomId, session: SessionId) -> Result<(), Misfit> {
        let Some(named) = self.rooms.get(&id).and_then(|room| room.rank) else { return Ok(()) };
        let setup = self.sessions.get(&session).and_then(|session| session.peer_setup.as_ref());
        match setup.and_then(|setup| setup.rank) {
            Some(peer) if peer == named => Ok(()),
            Some(peer) => Err(Misfit::Rank { named, peer }),
            None => Err(Misfit::Unreadable),
        }
    }

    /// Makes a room one of a session's.
    pub(crate) fn bind(&mut self, id: RoomId, session: SessionId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        room.session = Some(session);
        room.met_ns = Some(self.now_ns);
        self.bound.insert((room.role.kind(), room.name, session), id);
        if let Some(s) = self.sessions.get_mut(&session) {
            s.rooms.insert(id);
            room.ring = s.ring;
        }
        let waited_ms = millis(self.now_ns.saturating_sub(room.opened_ns));
        let left_ms = millis(room.deadline_ns.saturating_sub(self.now_ns));
        let what = What::Bound { role: room.role.kind(), pages: room.role.pages(), waited_ms, left_ms };
        self.note_room(id, what);
    }

    /// Ends a room no later than the peer that has granted it something will, whose clock started earlier: by the
    /// largest round trip that was measured, so that nothing is begun which the peer will not wait for.
    pub(crate) fn limit_deadline(&mut self, id: RoomId, session: SessionId, duration_ns: u64) {
        let rtt_ns = self.sessions.get(&session).map_or(0, |s| s.rtt_max_ns).min(duration_ns / 4);
        let latest_ns = self.now_ns.saturating_add(duration_ns - rtt_ns);
        if let Some(room) = self.rooms.get(&id)
            && room.deadline_ns > latest_ns
        {
            self.move_deadline(id, latest_ns);
        }
    }

    fn move_deadline(&mut self, room: RoomId, deadline_ns: u64) {
        if let Some(r) = self.rooms.get_mut(&room) {
            let before = std::mem::replace(&mut r.deadline_ns, deadline_ns);
            self.disarm(before, Timer::Room(room));
            self.arm(deadline_ns, Timer::Room(room));
        }
    }

    /// What is left of a room's time, for the peer.
    pub(crate) fn duration_ns(&self, room: &Room) -> u64 {
        room.deadline_ns.saturating_sub(self.now_ns)
    }

    pub(crate) fn room_overdue(&mut self, room: RoomId) {
        let Some(r) = self.rooms.get(&room).filter(|_| !is_planted(Planted::DeadlineDropped)) else { return };
        if r.end.is_some() {
            return self.drain_overdue(room);
        }
        let end = End::Expired { by: Who::Here, stage: r.stage };
        self.end_room(room, end, Some(CancelWhy::Expired));
    }

    /// Waits only so long for the ops of a room that has ended: a lane may carry nothing any more though its connection
    /// stands and its peer's heart beats.
    fn limit_drain(&mut self, id: RoomId) {
        let latest_ns = self.now_ns.saturating_add(self.config.drain_timeout_ns);
        if let Some(room) = self.rooms.get_mut(&id) {
            room.deadline_ns = latest_ns;
            self.arm(latest_ns, Timer::Room(id));
        }
    }

    fn drain_overdue(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get(&id).filter(|room| room.moving == Moving::Stopping) else { return };
        let for_ns = self.config.drain_timeout_ns;
        if let Some(session) = room.session {
            self.end_session(session, SessionEnd::Stalled { for_ns });
        }
    }

    /// Ends a room on this side, once. `why` is told to the peer; `None` where the peer knows.
    pub(crate) fn end_room(&mut self, id: RoomId, end: End, why: Option<CancelWhy>) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        if room.end.is_some() {
            return;
        }
        room.end = Some(end.clone());
        let (on_wire, name, kind) = (room.on_wire(), room.name, room.role.kind());
        let (session, deadline) = (room.session, room.deadline_ns);
        self.disarm(deadline, Timer::Room(id));
        match &end {
            End::Delivered => self.counters.delivered += 1,
            _ => self.counters.undelivered += 1,
        }
        match session {
            Some(session) => {
                self.bound.remove(&(kind, name, session));
            }
            None if kind.is_decode() => self.stop_waiting(id),
            None => {
                self.open.remove(&(kind, name));
                self.remember_ended(kind, name, &end);
            }
        }
        self.note_end(id, &end);
        if self.stop_moving(id) {
            self.limit_drain(id);
        }
        if let (Some(session), Some(why), false) = (session, why, is_planted(Planted::CancelUntold)) {
            self.note_room(id, What::CancelSent { why });
            self.send(session, &Message::Cancel { room: on_wire, from: kind, why });
        }
        let with = session.and_then(|session| self.sessions.get(&session));
        let (peer, port) = (with.map(|s| s.name.clone()), with.map(|s| s.port));
        self.tell(Notice::Ended { room: id, end, peer, port });
        match kind {
            RoleKind::Receiving => self.receiving_ended(id),
            RoleKind::Sending => self.sending_ended(id),
            RoleKind::Fetching => self.fetching_ended(id),
            RoleKind::Serving => self.serving_ended(id),
        }
    }

    fn note_end(&mut self, id: RoomId, end: &End) {
        let Some(room) = self.rooms.get(&id) else { return };
        let (mut counted, mut expected, mut quiet_ns) = (0, None, 0);
        if let Role::Receiving(r) = &room.role {
            counted = total(&r.arrivals);
            expected = r.finish.as_ref().map(|finish| total(&finish.arrivals));
            let since_ns = if r.last_arrival_ns == 0 { room.opened_ns } else { r.last_arrival_ns };
            quiet_ns = self.now_ns.saturating_sub(since_ns);
        }
        let silent_ns = room.session.and_then(|s| self.sessions.get(&s)).map_or(0, |s| s.silent_ns);
        let what = What::Ended {
            end: (*end != End::Delivered).then(|| Box::new(end.clone())),
            stage: room.stage,
            counted,
            expected,
            age_ms: millis(self.now_ns.saturating_sub(room.opened_ns)),
            met_ms: room.met_ns.map(|met_ns| millis(self.now_ns.saturating_sub(met_ns))),
            quiet_ms: millis(quiet_ns),
            silent_ms: millis(silent_ns),
        };
        self.note_room(id, what);
    }

    /// Lets no more of a room be posted. True: the owner says when the last op has ended.
    pub(crate) fn stop_moving(&mut self, id: RoomId) -> bool {
        let Some(room) = self.rooms.get_mut(&id) else { return false };
        match room.moving {
            Moving::No => false,
            Moving::Told { .. } => {
                room.moving = Moving::No;
                false
            }
            Moving::Stopping => true,
            Moving::Yes => {
                room.moving = Moving::Stopping;
                self.act(Action::StopTransfer { room: id });
                self.tell(Notice::Stop { room: id });
                true
            }
        }
    }

    /// Asks the ports to take grants back, those that have not been asked yet.
    pub(crate) fn revoke_all(&mut self, grants: &[GrantId]) {
        for &grant in grants {
            if let Some(given) = self.grants.find_mut(grant)
                && given.revocation == Revocation::None
            {
                given.revocation = Revocation::Asked;
                let session = given.session;
                self.act(Action::Revoke { session, grant });
            }
        }
    }

    /// Whether no access can land any more under a grant.
    pub(crate) fn is_quiet(&self, given: &Given) -> bool {
        let Some(session) = self.sessions.get(&given.session) else {
            return true;
        };
        if given.is_released()
            || is_planted(Planted::QuarantineOff)
            || (session.is_over() && is_planted(Planted::SessionEndFrees))
            || (is_planted(Planted::OtherWritersForgotten) && self.is_of_other_writer(given))
        {
            return true;
        }
        match (given.access, given.revocation) {
            (_, Revocation::None | Revocation::Asked) => false,
            (Access::Write, Revocation::Done(Fence::Now)) => true,
            // Who may still write there may also still read, and deliver what it reads.
            (_, Revocation::Done(Fence::Never)) => session.is_proven_dead(),
            (Access::Write, Revocation::Done(Fence::WhenDown)) | (Access::Read, _) => session.all_down(),
        }
    }

    /// Whether pages were granted to another rank than the first of the prefill side, whose number shares begin with.
    fn is_of_other_writer(&self, given: &Given) -> bool {
        let room = self.rooms.get(&given.room).filter(|_| given.access == Access::Write);
        room.is_some_and(|room| room.name.share >> 20 > 0)
    }

    /// Whether no access and no immediate can come any more under a grant.
    fn is_index_free(&self, given: &Given) -> bool {
        let Some(session) = self.sessions.get(&given.session) else {
            return true;
        };
        let no_immediate = given.is_released() || session.all_down();
        matches!(given.revocation, Revocation::Done(_)) && no_immediate && self.is_quiet(given)
    }

    /// Frees the indices of a room's quiescent grants; true if none is left.
    pub(crate) fn free_quiescent(&mut self, grants: &mut Vec<GrantId>) -> bool {
        grants.retain(|&grant| {
            let Some(given) = self.grants.find(grant).copied() else {
                return false;
            };
            let free = self.is_index_free(&given);
            if free {
                self.grants.free(grant);
                if let Some(session) = self.sessions.get_mut(&given.session) {
                    session.grants -= 1;
                }
            }
            !free
        });
        grants.is_empty()
    }

    pub(crate) fn give(&mut self, room: RoomId, session: SessionId, access: Access) -> Option<GrantId> {
        if is_planted(Planted::RefuseAll) {
            return None;
        }
        let grant = self.grants.give(room, session, access)?;
        if let Some(session) = self.sessions.get_mut(&session) {
            session.grants += 1;
        }
        Some(grant)
    }

    /// Looks again at an ended (or landing) room after something about its grants, lanes or ops has changed.
    pub(crate) fn settle(&mut self, id: RoomId) {
        let Some(kind) = self.rooms.get(&id).map(|room| room.role.kind()) else { return };
        match kind {
            RoleKind::Receiving => self.settle_receiving(id),
            RoleKind::Sending => self.settle_sending(id),
            RoleKind::Fetching => self.settle_fetching(id),
            RoleKind::Serving => self.settle_serving(id),
        }
    }

    /// Drops a room that is over in every respect.
    pub(crate) fn drop_room(&mut self, id: RoomId) {
        if let Some(room) = self.rooms.remove(&id)
            && let Some(session) = room.session
        {
            if let Some(s) = self.sessions.get_mut(&session) {
                s.rooms.remove(&id);
            }
            self.reap(session);
        }
    }

    pub(crate) fn room_end_from(why: CancelWhy, stage: Stage) -> End {
        let by = Who::Peer;
        match why {
            CancelWhy::Cancelled => End::Cancelled { by },
            CancelWhy::Expired => End::Expired { by, stage },
            CancelWhy::Busy => End::Refused { by, why: crate::RoomRefusal::Busy },
            CancelWhy::Mismatch => End::Refused { by, why: crate::RoomRefusal::Mismatch(Misfit::AtPeer) },
            CancelWhy::Failed => End::Failed { by, stage, cause: Failure::AtPeer },
            CancelWhy::Corrupt => End::Failed { by, stage: Stage::Verify, cause: Failure::Checksum },
        }
    }

    pub(crate) fn release(
        &mut self,
        session: SessionId,
        grants: &[GrantId],
        down_lanes: u16,
        delivered: bool,
    ) {
        if !grants.is_empty() {
            let other = u32::from(is_planted(Planted::ReleaseOfAnother)) << 12;
            let named = |grant: &GrantId| GrantId::from_bits(grant.bits() ^ other);
            for &grant in grants.iter().take(RELEASES_NOTED) {
                self.note_session(session, None, What::ReleaseSent { grant });
            }
            let released = grants.iter().map(|grant| Released { grant: named(grant), down_lanes }).collect();
            self.send(session, &Message::Release { released, delivered });
        }
    }

    pub(crate) fn peer_name_of(&self, id: RoomId) -> Arc<str> {
        let session = self.rooms.get(&id).and_then(|room| room.session);
        match session.and_then(|session| self.sessions.get(&session)) {
            Some(session) => session.name.clone(),
            None => "no peer".into(),
        }
    }
}

/// Of the grants that one message gives back, so many are recorded: the rest are of the same moment.
const RELEASES_NOTED: usize = 8;

/// The fields of any message about a room, without its lists, are not longer than this.
const LONGEST_FIXED_BYTES: usize = 160;
