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

use crossdock_transport::{Direction, GrantId};

use crate::end::{End, SessionEnd, Stage};
use crate::flight::{RingId, What};
use crate::message::{Message, RoleKind, RoomOnWire};
use crate::notice::{Homecoming, Notice, Start};
use crate::planted::{Planted, is_planted};
use crate::proto::{Proto, RoomId, SessionId};
use crate::room::{Fetch, Fetching, Moving, Role, Room, Unopened};

impl Proto {
    /// Opens the decode end of a pull.
    pub fn fetch(&mut self, now_ns: u64, fetch: Fetch) -> Result<RoomId, Unopened> {
        self.now_ns = now_ns;
        let bytes = fetch.params.len();
        if let Err(error) = self.check_decode(fetch.peer, fetch.room, RoleKind::Fetching, bytes) {
            return Err(Unopened { error, pages: Homecoming::new(fetch.pages) });
        }
        let id = self.add_room(Room {
            name: fetch.room,
            serial: 0,
            ring: RingId::NODE,
            opened_ns: 0,
            met_ns: None,
            peer: Some(fetch.peer),
            rank: fetch.rank,
            session: None,
            deadline_ns: fetch.deadline_ns,
            end: None,
            stage: Stage::Session,
            moving: Moving::No,
            role: Role::Fetching(Fetching {
                pages: Some(fetch.pages),
                params: fetch.params,
                grant: None,
                remote_pages: Arc::new([]),
                offer: Arc::new([]),
                attempt: 0,
                again: false,
                down_lanes: 0,
            }),
        });
        self.begin_decode(id, fetch.peer);
        Ok(id)
    }

    /// All reads of a fetching room are done: its bytes are here.
    pub fn fetched(&mut self, now_ns: u64, room: RoomId) {
        self.now_ns = now_ns;
        let Some(r) = self.rooms.get_mut(&room) else { return };
        let (Role::Fetching(f), None, Moving::Yes, Some(session)) = (&r.role, &r.end, r.moving, r.session)
        else {
            return;
        };
        let aux = f.offer.to_vec();
        r.moving = Moving::No;
        r.stage = Stage::Verify;
        self.note_room(room, What::Landed { counted: 0 });
        self.tell(Notice::Landed { room, session, aux });
    }

    pub(crate) fn want(&mut self, id: RoomId, session: SessionId) {
        let Some(room) = self.rooms.get(&id) else { return };
        let Role::Fetching(f) = &room.role else { return };
        let (room, duration_ns) = (room.on_wire(), self.duration_ns(room));
        let message = Message::Want { room, duration_ns, params: f.params.clone() };
        self.note_room(id, What::WantSent);
        self.send(session, &message);
    }

    pub(crate) fn on_offer(
        &mut self,
        session: SessionId,
        room: RoomOnWire,
        grant: GrantId,
        duration_ns: u64,
        params: Vec<u8>,
        pages: Vec<u32>,
    ) {
        let Some(id) = self.spoken_of(RoleKind::Fetching, session, room) else {
            // The room has ended here since it was asked for.
            return self.release(session, &[grant], 0, false);
        };
        let Some(Room { role: Role::Fetching(f), .. }) = self.rooms.get_mut(&id) else { return };
        if f.grant.is_some() {
            let what = "offered a room a second time";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        }
        let what = What::GrantCame { grant, attempt: f.attempt, pages: pages.len() as u32 };
        f.grant = Some(grant);
        f.remote_pages = pages.into();
        f.offer = params.into();
        self.note_room(id, what);
        self.limit_deadline(id, session, duration_ns);
        self.start_fetching(id);
    }

    fn start_fetching(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (Role::Fetching(f), Some(session)) = (&mut room.role, room.session) else { return };
        let Some(grant) = f.grant else { return };
        f.again = false;
        room.stage = Stage::Transfer;
        room.moving = Moving::Told { attempt: f.attempt };
        let start = Start {
            room: id,
            session,
            direction: Direction::Read,
            grant,
            attempt: f.attempt,
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
        self.stop_moving(id);
    }

    pub(crate) fn fetching_drained(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        match (&mut room.role, &room.end) {
            (Role::Fetching(f), None) if f.again => {
                f.attempt += 1;
                self.counters.further_attempts += 1;
                self.start_fetching(id);
            }
            _ => self.settle_fetching(id),
        }
    }

    pub(crate) fn fetching_ended(&mut self, id: RoomId) {
        self.settle_fetching(id);
    }

    pub(crate) fn settle_fetching(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let out = room.moving != Moving::No && !is_planted(Planted::ReadsForgotten);
        if room.end.is_none() || out {
            return;
        }
        let delivered = room.end == Some(End::Delivered);
        let Role::Fetching(f) = &mut room.role else { return };
        // The reads that wrote these pages were our own, and each has ended.
        let pages = f.pages.take().map(Homecoming::new);
        let (grant, session, down_lanes) = (f.grant.take(), room.session, f.down_lanes);
        if let Some(pages) = pages {
            self.note_room(id, What::Home);
            self.tell(Notice::Home { room: id, pages });
        }
        if let (Some(session), Some(grant)) = (session, grant) {
            // A read that ended with its lane here may still be under way at the source.
            self.release(session, &[grant], down_lanes, delivered);
        }
        self.drop_room(id);
        self.answer_held_by(id);
    }
}
