//! The prefill end of a push: see [`receiving`](crate::receiving).

use std::sync::Arc;

use crossdock_memory::PageRef;
use crossdock_transport::{Access, Direction, GrantId};

use crate::end::{End, SessionEnd, Stage};
use crate::flight::{RingId, What};
use crate::message::{Message, RoleKind, RoomOnWire};
use crate::notice::{Notice, Start};
use crate::parked::Parked;
use crate::planted::{Planted, is_planted};
use crate::proto::{Proto, RoomId, SessionId};
use crate::receiving::total;
use crate::room::{Moving, Role, Room, RoomError, Send, Sending};

impl Proto {
    /// Opens the prefill end of a push: waits for the decode side's grant, which may be here already.
    pub fn send_room(&mut self, now_ns: u64, send: Send) -> Result<RoomId, RoomError> {
        self.now_ns = now_ns;
        self.open_prefill(Room {
            name: send.room,
            serial: 0,
            ring: RingId::NODE,
            opened_ns: 0,
            met_ns: None,
            peer: None,
            rank: send.rank,
            session: None,
            deadline_ns: send.deadline_ns,
            end: None,
            stage: Stage::Grant,
            moving: Moving::No,
            role: Role::Sending(Sending {
                pages: Some(send.pages),
                attempt: 0,
                grant: None,
                owed: Vec::new(),
                finished: false,
                needs_regrant: false,
                regrant: None,
                remote_pages: Arc::new([]),
                params: Arc::new([]),
                down_lanes: 0,
            }),
        })
    }

    /// Adds pages to a sending room that was opened before all of them were known: held as the first ones are. Of a room that
    /// is over they are let go, and so are those of a pool that is not the first ones'.
    pub fn add_pages(&mut self, id: RoomId, more: PageRef) {
        if let Some(Room { role: Role::Sending(Sending { pages: Some(pages), .. }), .. }) =
            self.rooms.get_mut(&id)
            && let Err(stranger) = pages.join(more)
        {
            drop(stranger);
        }
    }

    /// All ops of a sending room's attempt have been posted, with this many immediates on each lane.
    pub fn finish(&mut self, now_ns: u64, id: RoomId, arrivals: &[u32], aux: Vec<u8>) {
        self.now_ns = now_ns;
        if self.end_if_too_long(id, aux.len()) {
            return;
        }
        let Some(r) = self.rooms.get_mut(&id) else { return };
        let on_wire = r.on_wire();
        let (Role::Sending(s), Moving::Yes, Some(session)) = (&mut r.role, r.moving, r.session) else {
            return;
        };
        // What was posted on a lane that went down is sent again under the next attempt; that one is finished.
        if s.needs_regrant || s.regrant.is_some() || r.stage != Stage::Transfer {
            return;
        }
        r.stage = Stage::Confirm;
        s.finished = true;
        let attempt = s.attempt;
        self.note_room(id, What::FinishSent { attempt, arrivals: total(arrivals) });
        let message = Message::Finish { room: on_wire, attempt, arrivals: arrivals.to_vec(), aux };
        self.send(session, &message);
    }

    /// A decode side grants us its pages (push), or a prefill side offers us its own (pull).
    pub(crate) fn on_grant(&mut self, session: SessionId, message: Message) {
        let Message::Grant { room, access, attempt, grant, duration_ns, params, pages } = message else {
            return;
        };
        if access == Access::Read {
            return self.on_offer(session, room, grant, duration_ns, params, pages);
        }
        let key = (RoleKind::Sending, room.name, session);
        let Some(id) = self.take_open(key) else {
            let message = Message::Grant { room, access, attempt, grant, duration_ns, params, pages };
            return self.park(key, message);
        };
        let Some(Room { role: Role::Sending(s), serial, .. }) = self.rooms.get_mut(&id) else { return };
        *serial = room.serial;
        s.attempt = attempt;
        let what = What::GrantCame { grant, attempt, pages: pages.len() as u32 };
        s.remote_pages = pages.into();
        s.params = params.into();
        self.bind(id, session);
        self.note_room(id, what);
        self.limit_deadline(id, session, duration_ns);
        self.start_sending(id, grant);
    }

    fn start_sending(&mut self, id: RoomId, grant: GrantId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (Role::Sending(s), Some(session)) = (&mut room.role, room.session) else { return };
        s.grant = Some(grant);
        s.needs_regrant = false;
        s.finished = false;
        room.stage = Stage::Transfer;
        room.moving = Moving::Told { attempt: s.attempt };
        let start = Start {
            room: id,
            session,
            direction: Direction::Write,
            grant,
            attempt: s.attempt,
            remote_pages: s.remote_pages.clone(),
            params: s.params.clone(),
        };
        self.tell(Notice::Start(start));
    }

    pub(crate) fn on_delivered(&mut self, session: SessionId, room: RoomOnWire) {
        let Some(id) = self.spoken_of(RoleKind::Sending, session, room) else { return };
        let Some(Room { role: Role::Sending(s), .. }) = self.rooms.get_mut(&id) else { return };
        if !s.finished {
            let what = "confirmed what was not finished";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        }
        // What arrived and was counted has left: whatever the ports here still have to say of it changes nothing
        // for the receiver.
        s.grant = None;
        self.note_room(id, What::DeliveredCame);
        self.end_room(id, End::Delivered, None);
    }

    pub(crate) fn on_regrant(&mut self, session: SessionId, room: RoomOnWire, attempt: u32, grant: GrantId) {
        let Some(id) = self.spoken_of(RoleKind::Sending, session, room) else {
            let parked = self.parked.get_mut(&(RoleKind::Sending, room.name, session));
            if let Some(Parked { message: Message::Grant { room: r, attempt: a, grant: g, .. }, .. }) = parked
                && *r == room
            {
                let old = std::mem::replace(g, grant);
                *a = attempt;
                return self.release(session, &[old], 0, false);
            }
            return self.release(session, &[grant], 0, false);
        };
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let Role::Sending(s) = &mut room.role else { return };
        if attempt <= s.attempt {
            return self
                .end_session(session, SessionEnd::Misbehaved { what: "granted an earlier attempt again" });
        }
        let skipped = s.regrant.replace((attempt, grant));
        let pages = s.remote_pages.len() as u32;
        room.stage = Stage::Transfer;
        self.note_room(id, What::GrantCame { grant, attempt, pages });
        // Nothing was ever posted under it, so it need not wait for the ops under the one before; and the list of what
        // is owed does not grow with what the peer says.
        if let Some((_, skipped)) = skipped {
            self.release(session, &[skipped], 0, false);
        }
        self.stop_sending(id);
    }

    /// Notes that what this room has posted may be lost with a lane.
    pub(crate) fn prefill_lost_lane(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (Role::Sending(s), None) = (&mut room.role, &room.end) else { return };
        if s.grant.is_some() {
            s.needs_regrant = true;
            room.stage = Stage::Transfer;
            self.stop_sending(id);
        }
    }

    /// Stops an attempt, to begin the next when its last op has ended.
    fn stop_sending(&mut self, id: RoomId) {
        if !self.stop_moving(id) {
            self.sending_drained(id);
        }
    }

    /// No op of the room is at a port.
    pub(crate) fn sending_drained(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (Role::Sending(s), Some(session)) = (&mut room.role, room.session) else { return };
        if room.end.is_some() {
            return self.settle_sending(id);
        }
        let Some((attempt, grant)) = s.regrant.take() else { return };
        s.owed.extend(s.grant.take());
        s.attempt = attempt;
        let (owed, down_lanes) = (std::mem::take(&mut s.owed), std::mem::take(&mut s.down_lanes));
        if is_planted(Planted::ReleaseTwice) {
            s.owed.clone_from(&owed);
        }
        self.release(session, &owed, down_lanes, false);
        self.start_sending(id, grant);
    }

    pub(crate) fn sending_ended(&mut self, id: RoomId) {
        let Some(Room { role: Role::Sending(s), .. }) = self.rooms.get_mut(&id) else { return };
        s.owed.extend(s.grant);
        s.owed.extend(s.regrant.take().map(|(_, grant)| grant));
        self.settle_sending(id);
    }

    /// Gives back what an ended room still holds, once nothing of it is on its way.
    pub(crate) fn settle_sending(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let out = room.moving != Moving::No && !is_planted(Planted::ReleaseTooEarly);
        if room.end.is_none() || out {
            return;
        }
        let Role::Sending(s) = &mut room.role else { return };
        // Only now is the source memory no longer read.
        let pages = s.pages.take();
        let (owed, down_lanes) = (std::mem::take(&mut s.owed), s.down_lanes);
        if let Some(session) = room.session {
            self.release(session, &owed, down_lanes, false);
        }
        if let Some(pages) = pages {
            self.note_room(id, What::Home);
            self.tell(Notice::Unread { pages });
        }
        self.drop_room(id);
        self.answer_held_by(id);
    }
}
