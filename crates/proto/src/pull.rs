//! Pull: the decode side reads pages that the prefill side offers.
//!
//! ```text
//! decode (fetching)                      prefill (serving)
//!   Want     ─────────────────────────────▶   which room, for how long
//!            ◀─────────────────────────────   Grant (read): pages
//!            ══════════ reads ═════════════   served by the prefill side's memory
//!   Release  ─────────────────────────────▶   delivered, or given up
//! ```
//! The reader's fence is local: its pages are its own again when its reads have ended. The source keeps its pages
//! until the reader has released them, or can be proven not to read any more; a deadline never frees them.

use std::sync::Arc;

use crossdock_transport::{Access, Direction, GrantId};

use crate::end::{End, RoomRefusal, Stage, Who};
use crate::message::{CancelWhy, Message, RoomName};
use crate::proto::{Action, Notice, Proto, RoomId, SessionId, Start};
use crate::room::{Fetch, Fetching, Moving, Role, RoleKind, Room, RoomError, Serve, Serving};

impl Proto {
    /// Opens the decode end of a pull.
    pub fn fetch(&mut self, now_ns: u64, fetch: Fetch) -> Result<RoomId, RoomError> {
        self.now_ns = now_ns;
        self.check_decode(fetch.peer, fetch.room, RoleKind::Fetching)?;
        let id = self.add_room(Room {
            name: fetch.room,
            peer: Some(fetch.peer),
            session: None,
            deadline_ns: fetch.deadline_ns,
            end: None,
            stage: Stage::Session,
            moving: Moving::No,
            role: Role::Fetching(Fetching {
                pages: Some(fetch.pages.grant()),
                params: fetch.params,
                grant: None,
                remote_pages: Arc::new([]),
                offer: Arc::new([]),
                again: false,
            }),
        })?;
        self.begin_decode(id, fetch.peer);
        Ok(id)
    }

    /// Opens the prefill end of a pull: waits for the decode side's want, which may be here already.
    pub fn serve(&mut self, now_ns: u64, serve: Serve) -> Result<RoomId, RoomError> {
        self.now_ns = now_ns;
        self.check_prefill(serve.room, RoleKind::Serving)?;
        let id = self.add_room(Room {
            name: serve.room,
            peer: None,
            session: None,
            deadline_ns: serve.deadline_ns,
            end: None,
            stage: Stage::Grant,
            moving: Moving::No,
            role: Role::Serving(Serving { pages: Some(serve.pages), buffers: serve.buffers, grant: None }),
        })?;
        self.open.insert((RoleKind::Serving, serve.room), id);
        self.take_parked(RoleKind::Serving, serve.room);
        Ok(id)
    }

    /// All reads of a fetching room are done: its bytes are here.
    pub fn fetched(&mut self, now_ns: u64, room: RoomId) {
        self.now_ns = now_ns;
        let Some(r) = self.rooms.get_mut(&room) else { return };
        let (Role::Fetching(f), None, Moving::Yes) = (&r.role, &r.end, r.moving) else { return };
        let aux = f.offer.to_vec();
        r.moving = Moving::No;
        r.stage = Stage::Verify;
        self.tell(Notice::Landed { room, aux });
    }

    // --- decode end ------------------------------------------------------------------------------------------

    pub(crate) fn want(&mut self, id: RoomId, session: SessionId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let Role::Fetching(f) = &room.role else { return };
        let message =
            Message::Want { room: room.name, duration_ns: self.duration_ns(room), params: f.params.clone() };
        self.send(session, &message);
    }

    pub(crate) fn on_offer(
        &mut self,
        session: SessionId,
        name: RoomName,
        grant: GrantId,
        params: Vec<u8>,
        pages: Vec<u32>,
    ) {
        let id = self.bound.get(&(session, RoleKind::Fetching, name)).copied();
        let Some(Room { role: Role::Fetching(f), .. }) = id.and_then(|id| self.rooms.get_mut(&id)) else {
            // The room has ended here since it was asked for.
            return self.release(session, &[grant], 0, false);
        };
        if f.grant.is_some() {
            return self.release(session, &[grant], 0, false);
        }
        f.grant = Some(grant);
        f.remote_pages = pages.into();
        f.offer = params.into();
        if let Some(id) = id {
            self.start_fetching(id);
        }
    }

    fn start_fetching(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (Role::Fetching(f), Some(session)) = (&mut room.role, room.session) else { return };
        let Some(grant) = f.grant else { return };
        f.again = false;
        room.stage = Stage::Transfer;
        room.moving = Moving::Yes;
        let start = Start {
            room: id,
            session,
            direction: Direction::Read,
            grant,
            attempt: 0,
            remote_pages: f.remote_pages.clone(),
            params: f.offer.clone(),
        };
        self.tell(Notice::Start(start));
    }

    /// Reads that were under way on a lane that went down are made again on the others.
    pub(crate) fn fetching_lost_lane(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (Role::Fetching(f), None, Moving::Yes) = (&mut room.role, &room.end, room.moving) else { return };
        f.again = true;
        room.moving = Moving::Stopping;
        self.act(Action::StopTransfer { room: id });
        self.tell(Notice::Stop { room: id });
    }

    pub(crate) fn fetching_drained(&mut self, id: RoomId, _down_lanes: u16) {
        let Some(room) = self.rooms.get(&id) else { return };
        match (&room.role, &room.end) {
            (Role::Fetching(f), None) if f.again => self.start_fetching(id),
            _ => self.settle_fetching(id),
        }
    }

    pub(crate) fn fetching_ended(&mut self, id: RoomId) {
        self.settle_fetching(id);
    }

    pub(crate) fn settle_fetching(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        if room.end.is_none() || room.moving != Moving::No {
            return;
        }
        let delivered = room.end == Some(End::Delivered);
        let Role::Fetching(f) = &mut room.role else { return };
        // The reads that wrote these pages were our own, and each has ended.
        let pages = f.pages.take().map(|pages| pages.come_home());
        let (grant, session) = (f.grant.take(), room.session);
        if let Some(pages) = pages {
            self.tell(Notice::Home { room: id, pages });
        }
        if let (Some(session), Some(grant)) = (session, grant) {
            self.release(session, &[grant], 0, delivered);
        }
        self.drop_room(id);
        self.answer_held();
    }

    // --- prefill end -----------------------------------------------------------------------------------------

    pub(crate) fn on_want(&mut self, session: SessionId, name: RoomName, duration_ns: u64, params: Vec<u8>) {
        let Some(id) = self.open.remove(&(RoleKind::Serving, name)) else {
            let message = Message::Want { room: name, duration_ns, params };
            return self.park(RoleKind::Serving, name, session, message);
        };
        let Some(room) = self.rooms.get_mut(&id) else { return };
        room.session = Some(session);
        self.bound.insert((session, RoleKind::Serving, name), id);
        if let Some(s) = self.sessions.get_mut(&session) {
            s.rooms.insert(id);
        }
        self.tell(Notice::Wanted { room: id, session, params });
    }

    /// Answers [`Notice::Wanted`]: the peer may read the room's pages, and hears `params` with them.
    pub fn offer(&mut self, now_ns: u64, id: RoomId, params: Vec<u8>) {
        self.now_ns = now_ns;
        let Some(room) = self.rooms.get(&id) else { return };
        let (Role::Serving(Serving { grant: None, .. }), None, Some(session)) =
            (&room.role, &room.end, room.session)
        else {
            return;
        };
        let Some(grant) = self.give(id, session, Access::Read) else {
            let end = End::Refused { by: Who::Here, why: RoomRefusal::Busy };
            return self.end_room(id, end, Some(CancelWhy::Busy));
        };
        if let Some(room) = self.rooms.get_mut(&id) {
            room.stage = Stage::Transfer;
            if let Role::Serving(s) = &mut room.role {
                s.grant = Some(grant);
            }
        }
        self.act(Action::Grant { session, grant, room: id });
        let Some(room) = self.rooms.get(&id) else { return };
        let Role::Serving(s) = &room.role else { return };
        let message = Message::Grant {
            room: room.name,
            access: Access::Read,
            attempt: 0,
            grant,
            duration_ns: self.duration_ns(room),
            params,
            pages: s.pages.as_ref().map(|pages| pages.ids().to_vec()).unwrap_or_default(),
        };
        self.send(session, &message);
    }

    /// The reader has given our pages back.
    pub(crate) fn served(&mut self, id: RoomId, delivered: bool) {
        let end = match delivered {
            true => End::Delivered,
            false => End::Cancelled { by: Who::Peer },
        };
        self.end_room(id, end, None);
    }

    pub(crate) fn serving_ended(&mut self, id: RoomId) {
        self.settle_serving(id);
    }

    /// Unlike a writer's grant, a reader's is revoked only when it cannot be in use: a read that finds its grant
    /// gone could not be told from a hostile one.
    pub(crate) fn settle_serving(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let Role::Serving(s) = &room.role else { return };
        if room.end.is_none() {
            return;
        }
        if let Some(grant) = s.grant {
            let Some(given) = self.grants.find(grant).copied() else {
                return self.drop_serving(id);
            };
            let unused = match self.sessions.get(&given.session) {
                None => true,
                Some(session) => {
                    let mask = given.released.map(|mask| mask & session.slot_mask());
                    session.all_down() || mask.is_some_and(|mask| session.down_mask() & mask == mask)
                }
            };
            if !unused {
                return;
            }
            if given.fence.is_none() {
                // Answered by `revoked`, which settles again.
                let session = given.session;
                return self.act(Action::Revoke { session, grant });
            }
            let mut grants = vec![grant];
            if !self.free_quiescent(&mut grants) {
                return;
            }
        }
        self.drop_serving(id);
    }

    fn drop_serving(&mut self, id: RoomId) {
        if let Some(Room { role: Role::Serving(s), .. }) = self.rooms.get_mut(&id) {
            s.pages = None;
            s.grant = None;
        }
        self.drop_room(id);
    }
}
