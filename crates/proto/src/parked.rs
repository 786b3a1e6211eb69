//! Prefill ends before and after their time: what decode sides ask for before the room is open here, and what is
//! remembered of rooms that have ended.

use crate::end::{End, Failure, RoomRefusal, SessionEnd};
use crate::flight::What;
use crate::message::{CancelWhy, Message, RoleKind, RoomName, RoomOnWire};
use crate::proto::{Proto, RoomId, SessionId, Timer};
use crate::room::{Room, RoomError};

/// A grant or a want for a room that is not open here yet.
pub(crate) struct Parked {
    pub message: Message,
    /// When the request's own time is over.
    pub expires_ns: u64,
    /// When it is given up: then, or earlier, when it has been kept for the longest time allowed.
    kept_until_ns: u64,
}

/// What the parked requests of one session, or of all, take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ParkedUse {
    pub requests: u32,
    pub bytes: usize,
}

impl ParkedUse {
    fn and(self, bytes: usize) -> Self {
        Self { requests: self.requests + 1, bytes: self.bytes + bytes }
    }

    fn without(self, bytes: usize) -> Self {
        Self { requests: self.requests - 1, bytes: self.bytes - bytes }
    }

    fn is_within(self, requests: u32, bytes: usize) -> bool {
        self.requests <= requests && self.bytes <= bytes
    }
}

/// Whose asking is parked: the end that is missing here, the room, and the session that asks.
pub(crate) type ParkedKey = (RoleKind, RoomName, SessionId);

/// What is remembered of a prefill end that ended before a decode side asked for it: the one that does hears so at
/// once.
pub(crate) struct Ended {
    why: CancelWhy,
    serial: u64,
}

impl Proto {
    /// Opens a prefill end: it waits for the decode side's asking, which may be here already.
    pub(crate) fn open_prefill(&mut self, room: Room) -> Result<RoomId, RoomError> {
        let (kind, name) = (room.role.kind(), room.name);
        self.has_room_for_more()?;
        if self.open.contains_key(&(kind, name)) || self.bound.range(of_any_session(kind, name)).count() > 0 {
            return Err(RoomError::Duplicate { room: name });
        }
        let id = self.add_room(room);
        if self.is_shut {
            self.end_room(id, End::PeerLost { cause: SessionEnd::ClosedHere }, None);
            return Ok(id);
        }
        // Opened again on purpose: what is remembered of its earlier end no longer holds.
        self.ended_names.remove(&(kind, name));
        self.open.insert((kind, name), id);
        self.take_parked(kind, name);
        Ok(id)
    }

    /// The prefill end that a decode side asks for, if it waits for this one.
    pub(crate) fn take_open(&mut self, (kind, name, session): ParkedKey) -> Option<RoomId> {
        let id = *self.open.get(&(kind, name))?;
        self.is_meant(id, session).ok()?;
        self.open.remove(&(kind, name))
    }

    /// Whether the end of a room is, or waits for, another rank than this one, which then will never have it.
    fn is_of_another(&self, (kind, name, session): ParkedKey) -> bool {
        let mut bound = self.bound.range(of_any_session(kind, name)).map(|(_, id)| id);
        let id = self.open.get(&(kind, name)).or_else(|| bound.next());
        id.is_some_and(|id| self.is_meant(*id, session).is_err())
    }

    /// Lets a prefill end that was just opened meet a request that came before it; those of other ranks than it waits
    /// for are turned away.
    fn take_parked(&mut self, kind: RoleKind, name: RoomName) {
        let asking = |proto: &Self, is_of_another| {
            let mut keys = proto.parked.range(of_any_session(kind, name)).map(|(key, _)| *key);
            keys.find(|key| proto.is_of_another(*key) == is_of_another)
        };
        while let Some(key) = asking(self, true) {
            let Some(parked) = self.unpark(key) else { return };
            self.turn_away(key, &parked.message, CancelWhy::Mismatch);
        }
        let Some(key) = asking(self, false) else { return };
        let Some(parked) = self.unpark(key) else { return };
        let duration_ns = parked.expires_ns.saturating_sub(self.now_ns);
        match parked.message {
            Message::Grant { room, access, attempt, grant, params, pages, .. } => {
                let message = Message::Grant { room, access, attempt, grant, duration_ns, params, pages };
                self.on_grant(key.2, message);
            }
            Message::Want { room, params, .. } => self.on_want(key.2, room, duration_ns, params),
            _ => {}
        }
    }

    /// Keeps a request for a room that is not open here yet, or says why not.
    pub(crate) fn park(&mut self, key: ParkedKey, message: Message) {
        let (Message::Grant { duration_ns, .. } | Message::Want { duration_ns, .. }) = message else {
            return;
        };
        let (kind, name, session) = key;
        if self.bound.contains_key(&key) || self.parked.contains_key(&key) {
            let what = "asked for a room a second time";
            return self.end_session(session, SessionEnd::Misbehaved { what });
        }
        if let Some(why) = self.ended_names.get(&(kind, name)).map(|ended| ended.why) {
            return self.turn_away(key, &message, why);
        }
        if self.is_of_another(key) {
            return self.turn_away(key, &message, CancelWhy::Mismatch);
        }
        let bytes = held_bytes(&message);
        let of_all = self.parked_use.and(bytes);
        let of_session = self.sessions.get(&session).map(|s| s.parked_use).unwrap_or_default().and(bytes);
        let config = &self.config;
        if !of_all.is_within(config.max_parked, config.max_parked_bytes)
            || !of_session.is_within(config.max_parked_per_session, config.max_parked_bytes_per_session)
        {
            return self.turn_away(key, &message, CancelWhy::Busy);
        }
        self.note_session(session, Some(name), What::Parked { role: kind });
        let expires_ns = self.now_ns.saturating_add(duration_ns);
        let kept_until_ns = expires_ns.min(self.now_ns.saturating_add(self.config.max_parked_ns));
        self.arm(kept_until_ns, Timer::Parked(kind, name, session));
        self.count_parked(session, |used| used.and(bytes));
        self.parked.insert(key, Parked { message, expires_ns, kept_until_ns });
    }

    fn count_parked(&mut self, session: SessionId, change: impl Fn(ParkedUse) -> ParkedUse) {
        self.parked_use = change(self.parked_use);
        if let Some(s) = self.sessions.get_mut(&session) {
            s.parked_use = change(s.parked_use);
        }
    }

    /// Forgets a request. Whoever does gives back what was granted with it.
    pub(crate) fn unpark(&mut self, key: ParkedKey) -> Option<Parked> {
        let parked = self.parked.remove(&key)?;
        self.disarm(parked.kept_until_ns, Timer::Parked(key.0, key.1, key.2));
        let bytes = held_bytes(&parked.message);
        self.count_parked(key.2, |used| used.without(bytes));
        Some(parked)
    }

    /// The decode side has given a request up.
    pub(crate) fn parked_cancelled(&mut self, kind: RoleKind, session: SessionId, room: RoomOnWire) {
        let key = (kind, room.name, session);
        let asks = |message: &Message| match message {
            Message::Grant { room: asked, .. } | Message::Want { room: asked, .. } => *asked == room,
            _ => false,
        };
        if self.parked.get(&key).is_some_and(|parked| asks(&parked.message))
            && let Some(parked) = self.unpark(key)
        {
            self.give_back(session, &parked.message);
        }
    }

    /// The time of a request is over, or it was kept for long enough, and its room was never opened here.
    pub(crate) fn parked_overdue(&mut self, key: ParkedKey) {
        if let Some(parked) = self.unpark(key) {
            let why = if parked.expires_ns <= self.now_ns { CancelWhy::Expired } else { CancelWhy::Busy };
            self.turn_away(key, &parked.message, why);
        }
    }

    /// Forgets what a session's peer has asked for; with the session its grants are over, too.
    pub(crate) fn unpark_all_of(&mut self, session: SessionId) {
        if self.sessions.get(&session).is_some_and(|s| s.parked_use == ParkedUse::default()) {
            return;
        }
        let keys: Vec<ParkedKey> = self.parked.keys().filter(|(_, _, of)| *of == session).copied().collect();
        keys.into_iter().for_each(|key| drop(self.unpark(key)));
    }

    fn turn_away(&mut self, (from, _, session): ParkedKey, message: &Message, why: CancelWhy) {
        if let Message::Grant { room, .. } | Message::Want { room, .. } = *message {
            self.note_session(session, Some(room.name), What::TurnedAway { why });
            self.send(session, &Message::Cancel { room, from, why });
        }
        self.give_back(session, message);
    }

    /// Nothing was ever written under a grant that was only parked.
    fn give_back(&mut self, session: SessionId, message: &Message) {
        if let Message::Grant { grant, .. } = message {
            self.release(session, &[*grant], 0, false);
        }
    }

    /// Remembers a prefill end that met no decode side. One that met its own says nothing to whoever asks later: that
    /// is another rank, or another life, or another try of the request, and its room may still be opened here.
    pub(crate) fn remember_ended(&mut self, kind: RoleKind, name: RoomName, end: &End) {
        self.ended_serial += 1;
        let serial = self.ended_serial;
        self.ended_names.insert((kind, name), Ended { why: why(end), serial });
        self.ended.push_back((serial, kind, name));
        while self.ended.len() > self.config.max_parked as usize {
            let Some((serial, kind, name)) = self.ended.pop_front() else { break };
            if self.ended_names.get(&(kind, name)).is_some_and(|ended| ended.serial == serial) {
                self.ended_names.remove(&(kind, name));
            }
        }
    }
}

/// How much memory a request holds while it waits: what its peer chose the length of, and the rest by the way.
fn held_bytes(message: &Message) -> usize {
    let lists = match message {
        Message::Grant { params, pages, .. } => params.len() + size_of_val(&pages[..]),
        Message::Want { params, .. } => params.len(),
        _ => 0,
    };
    size_of::<(ParkedKey, Parked)>() + lists
}

/// All sessions in which an end of this name may be.
fn of_any_session(kind: RoleKind, name: RoomName) -> std::ops::RangeInclusive<ParkedKey> {
    (kind, name, SessionId(0))..=(kind, name, SessionId(u32::MAX))
}

/// How a peer that asks for a room later is told of its end.
fn why(end: &End) -> CancelWhy {
    match end {
        End::Delivered | End::Cancelled { .. } => CancelWhy::Cancelled,
        End::Expired { .. } => CancelWhy::Expired,
        End::Refused { why: RoomRefusal::Busy, .. } => CancelWhy::Busy,
        End::Refused { .. } => CancelWhy::Mismatch,
        End::Failed { cause: Failure::Checksum, .. } => CancelWhy::Corrupt,
        End::Failed { .. } | End::PeerLost { .. } => CancelWhy::Failed,
    }
}
