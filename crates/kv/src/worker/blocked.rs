//! Rooms of which the lanes of their session take nothing more for now. In a turn one of each session asks for all of
//! them, so that a turn costs no more with ten thousand rooms behind a full lane than with one.

use std::collections::{BTreeMap, VecDeque};

use crossdock_proto::{RoomId, SessionId};

#[derive(Default)]
pub(super) struct Blocked {
    queues: BTreeMap<SessionId, Queue>,
    /// Those that may have blocked rooms, each once.
    sessions: VecDeque<SessionId>,
}

#[derive(Default)]
struct Queue {
    rooms: VecDeque<RoomId>,
    is_listed: bool,
}

impl Blocked {
    /// Makes room, so that nothing is allocated when it is needed.
    pub fn session_up(&mut self, session: SessionId) {
        let rooms = VecDeque::with_capacity(USUAL_ROOMS);
        self.queues.entry(session).or_insert(Queue { rooms, is_listed: false });
        self.sessions.reserve(self.queues.len().saturating_sub(self.sessions.len()));
    }

    /// What is left of a session that is over.
    pub fn session_down(&mut self, session: SessionId) -> VecDeque<RoomId> {
        let Some(queue) = self.queues.remove(&session) else { return VecDeque::new() };
        if queue.is_listed {
            self.sessions.retain(|listed| *listed != session);
        }
        queue.rooms
    }

    /// Lets a room wait behind the others of its session.
    pub fn add(&mut self, session: SessionId, room: RoomId) {
        let queue = self.queues.entry(session).or_default();
        queue.rooms.push_back(room);
        if !std::mem::replace(&mut queue.is_listed, true) {
            self.sessions.push_back(session);
        }
    }

    /// The next room of a session that takes more.
    pub fn next_of(&mut self, session: SessionId) -> Option<RoomId> {
        self.queues.get_mut(&session)?.rooms.pop_front()
    }

    /// Gives the first room of each session to `take`.
    pub fn take_firsts(&mut self, mut take: impl FnMut(RoomId)) {
        for _ in 0..self.sessions.len() {
            let Some(session) = self.sessions.pop_front() else { return };
            let Some(queue) = self.queues.get_mut(&session) else { continue };
            queue.rooms.pop_front().map(&mut take);
            queue.is_listed = !queue.rooms.is_empty();
            if queue.is_listed {
                self.sessions.push_back(session);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}

const USUAL_ROOMS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn firsts(blocked: &mut Blocked) -> Vec<u64> {
        let mut firsts = Vec::new();
        blocked.take_firsts(|room| firsts.push(room.0));
        firsts
    }

    #[test]
    fn one_room_of_each_session_is_tried_however_many_wait() {
        let mut blocked = Blocked::default();
        let (one, two) = (SessionId(1), SessionId(2));
        blocked.session_up(one);
        (0..10_000).for_each(|room| blocked.add(one, RoomId(room)));
        blocked.add(two, RoomId(77));
        assert_eq!(firsts(&mut blocked), [0, 77]);
        blocked.add(one, RoomId(0));
        assert_eq!((firsts(&mut blocked), blocked.next_of(one)), (vec![1], Some(RoomId(2))));
        assert_eq!(blocked.next_of(two), None);
        assert_eq!(blocked.session_down(one).len(), 10_000 - 2);
        assert!(firsts(&mut blocked).is_empty() && blocked.is_empty());
    }

    #[test]
    fn sessions_that_go_down_together_leave_nothing() {
        let mut blocked = Blocked::default();
        for session in [1, 2].map(SessionId) {
            blocked.session_up(session);
            blocked.add(session, RoomId(7));
        }
        for session in [1, 2].map(SessionId) {
            assert_eq!(blocked.session_down(session), [RoomId(7)]);
        }
        blocked.session_up(SessionId(3));
        assert!(blocked.is_empty() && firsts(&mut blocked).is_empty());
    }

    #[test]
    fn a_session_that_was_emptied_is_listed_once_again() {
        let mut blocked = Blocked::default();
        let session = SessionId(1);
        blocked.add(session, RoomId(1));
        assert_eq!(blocked.next_of(session), Some(RoomId(1)));
        blocked.add(session, RoomId(2));
        assert_eq!(firsts(&mut blocked), [2]);
        assert!(blocked.is_empty());
    }
}
