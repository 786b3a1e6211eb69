//! The prefill end of a pull: see [`fetching`](crate::fetching).

use crossdock_transport::Access;

use crate::action::Action;
use crate::end::{End, RoomRefusal, Stage, Who};
use crate::flight::{RingId, What};
use crate::message::{CancelWhy, Message, RoleKind, RoomOnWire};
use crate::notice::Notice;
use crate::planted::{Planted, is_planted};
use crate::proto::{Proto, RoomId, SessionId};
use crate::room::{Moving, Role, Room, RoomError, Serve, Serving};

impl Proto {
    /// Opens the prefill end of a pull: waits for the decode side's want, which may be here already.
    pub fn serve(&mut self, now_ns: u64, serve: Serve) -> Result<RoomId, RoomError> {
        self.now_ns = now_ns;
        self.fits_a_frame(4 * serve.pages.len())?;
        self.open_prefill(Room {
            name: serve.room,
            serial: 0,
            ring: RingId::NODE,
            opened_ns: 0,
            met_ns: None,
            peer: None,
            rank: serve.rank,
            session: None,
            deadline_ns: serve.deadline_ns,
            end: None,
            stage: Stage::Grant,
            moving: Moving::No,
            role: Role::Serving(Serving { pages: Some(serve.pages), buffers: serve.buffers, grant: None }),
        })
    }

    pub(crate) fn on_want(
        &mut self,
        session: SessionId,
        room: RoomOnWire,
        duration_ns: u64,
        params: Vec<u8>,
    ) {
        let key = (RoleKind::Serving, room.name, session);
        let Some(id) = self.take_open(key) else {
            let message = Message::Want { room, duration_ns, params };
            return self.park(key, message);
        };
        if let Some(r) = self.rooms.get_mut(&id) {
            r.serial = room.serial;
        }
        self.bind(id, session);
        self.note_room(id, What::WantCame);
        self.tell(Notice::Wanted { room: id, session, params });
    }

    /// Answers [`Notice::Wanted`]: the peer may read the room's pages, and hears `params` with them.
    pub fn offer(&mut self, now_ns: u64, id: RoomId, params: Vec<u8>) {
        self.now_ns = now_ns;
        let Some(room) = self.rooms.get(&id) else { return };
        let (Role::Serving(Serving { grant: None, pages, .. }), None, Some(session)) =
            (&room.role, &room.end, room.session)
        else {
            return;
        };
        let page_bytes = pages.as_ref().map_or(0, |pages| 4 * pages.len());
        if self.end_if_too_long(id, params.len() + page_bytes) {
            return;
        }
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
            room: room.on_wire(),
            access: Access::Read,
            attempt: 0,
            grant,
            duration_ns: self.duration_ns(room),
            params,
            pages: s.pages.as_ref().map(|pages| pages.ids().to_vec()).unwrap_or_default(),
        };
        let pages = room.role.pages();
        self.note_room(id, What::GrantSent { grant, attempt: 0, pages });
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
        if let Some(Room { role: Role::Serving(s), .. }) = self.rooms.get_mut(&id)
            && is_planted(Planted::SourceFreedAtEnd)
        {
            s.pages = None;
        }
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
            let unused = self.grants.find(grant).is_none_or(|given| {
                let session = self.sessions.get(&given.session);
                session.is_none_or(|session| given.is_released() || session.all_down())
            });
            if !unused {
                return;
            }
            // Answered by `revoked`, which settles again.
            self.revoke_all(&[grant]);
            if !self.free_quiescent(&mut vec![grant]) {
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
        self.note_room(id, What::Home);
        self.drop_room(id);
    }
}
