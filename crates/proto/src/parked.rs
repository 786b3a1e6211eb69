//! What decode sides ask for before the room is open here, and what is remembered of rooms that have ended.

use crate::message::{CancelWhy, Message, RoomName, RoomOnWire};
use crate::proto::{Parked, Proto, SessionId, Timer};
use crate::room::{RoleKind, RoomError};

impl Proto {
    pub(crate) fn check_prefill(&mut self, name: RoomName, kind: RoleKind) -> Result<(), RoomError> {
        self.has_room_for_more()?;
        let bound = self.bound.keys().any(|&(_, k, n)| k == kind && n == name);
        if bound || self.open.contains_key(&(kind, name)) {
            return Err(RoomError::Duplicate { room: name });
        }
        // Opened again on purpose: what is remembered of its earlier end no longer holds.
        if self.ended_names.remove(&(kind, name)).is_some() {
            self.ended.retain(|ended| *ended != (kind, name));
        }
        Ok(())
    }

    /// Lets a prefill end that was just opened meet a request that came before it.
    pub(crate) fn take_parked(&mut self, kind: RoleKind, name: RoomName) {
        let key = self.parked.keys().find(|(k, n, _)| *k == kind && *n == name).copied();
        let Some(key) = key else { return };
        let Some(parked) = self.parked.remove(&key) else { return };
        self.disarm(parked.expires_ns, Timer::Parked(key.0, key.1, key.2));
        let left_ns = parked.expires_ns.saturating_sub(self.now_ns);
        match parked.message {
            Message::Grant { room, access, attempt, grant, params, pages, .. } => {
                let message =
                    Message::Grant { room, access, attempt, grant, duration_ns: left_ns, params, pages };
                self.on_grant(key.2, message);
            }
            Message::Want { room, params, .. } => self.on_want(key.2, room, left_ns, params),
            _ => {}
        }
    }

    /// Forgets a request that has expired here (`why` is told to the decode side) or that the decode side has given
    /// up. A grant that came with it goes back: nothing was ever written under it, and only this side can say so.
    pub(crate) fn unpark(
        &mut self,
        kind: RoleKind,
        name: RoomName,
        session: SessionId,
        why: Option<CancelWhy>,
    ) {
        let Some(parked) = self.parked.remove(&(kind, name, session)) else { return };
        self.disarm(parked.expires_ns, Timer::Parked(kind, name, session));
        if let Some(why) = why {
            self.send(session, &Message::Cancel { room: RoomOnWire { name, from_decode: false }, why });
        }
        if let Message::Grant { grant, .. } = parked.message {
            self.release(session, &[grant], 0, false);
        }
    }

    /// Keeps a request for a room that is not open here yet, or says why not.
    pub(crate) fn park(&mut self, kind: RoleKind, name: RoomName, session: SessionId, message: Message) {
        let (Message::Grant { duration_ns, .. } | Message::Want { duration_ns, .. }) = message else {
            return;
        };
        let refusal = match self.ended_names.get(&(kind, name)) {
            Some(&why) => Some(why),
            None if self.parked.len() >= self.config.max_parked as usize => Some(CancelWhy::Busy),
            None => None,
        };
        if let Some(why) = refusal {
            let room = RoomOnWire { name, from_decode: false };
            self.send(session, &Message::Cancel { room, why });
            if let Message::Grant { grant, .. } = message {
                self.release(session, &[grant], 0, false);
            }
            return;
        }
        let expires_ns = self.now_ns.saturating_add(duration_ns);
        self.arm(expires_ns, Timer::Parked(kind, name, session));
        self.parked.insert((kind, name, session), Parked { message, expires_ns });
    }

    pub(crate) fn remember_ended(&mut self, kind: RoleKind, name: RoomName, why: CancelWhy) {
        if self.ended_names.insert((kind, name), why).is_none() {
            self.ended.push_back((kind, name));
        }
        while self.ended.len() > self.config.max_parked as usize {
            if let Some(oldest) = self.ended.pop_front() {
                self.ended_names.remove(&oldest);
            }
        }
    }
}
