//! The grants that this node has given: indices, generations, and what is known of each one's end.

use std::cell::Cell;
use std::collections::VecDeque;

use crossdock_transport::{Access, Fence, GrantId};

use crate::planted::{Planted, is_planted};
use crate::proto::{RoomId, SessionId};

/// Grants by index. Indices are used again first-in first-out, each time with the next generation.
pub(crate) struct Grants {
    entries: Vec<Entry>,
    free: VecDeque<u32>,
    limit: u32,
    live: usize,
    /// How often one was visited, as in a [`Table`](crate::Table).
    visits: Cell<u64>,
}

struct Entry {
    generation: u32,
    given: Option<Given>,
}

/// One grant that was given and whose index is not free yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given {
    pub room: RoomId,
    pub session: SessionId,
    pub access: Access,
    pub revocation: Revocation,
    /// The peer gave it back; the lanes whose own `Down` here is still waited for, since only that is proof.
    pub released: Option<u16>,
}

impl Given {
    /// Whether the peer has given it back, and the lanes of which it could not speak are down.
    pub fn is_released(&self) -> bool {
        self.released == Some(0)
    }
}

/// How far the ports are with taking a grant back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Revocation {
    /// They have not been asked to.
    None,
    /// They have been asked, once: a port that is asked again no longer knows the grant, and says that nothing can
    /// land under it.
    Asked,
    /// They have, and this is the weakest of their promises.
    Done(Fence),
}

impl Grants {
    pub fn new(limit: u32) -> Self {
        Self {
            entries: Vec::new(),
            free: VecDeque::new(),
            limit: limit.min(GrantId::INDICES - GrantId::STANDING),
            live: 0,
            visits: Cell::new(0),
        }
    }

    /// Gives a grant; `None` when the limit is reached.
    pub fn give(&mut self, room: RoomId, session: SessionId, access: Access) -> Option<GrantId> {
        // New indices first, then the one that was free for the longest time: a late immediate of an earlier
        // use must find another generation, and the longer an index rests the fewer are on their way.
        let index = if (self.entries.len() as u32) < self.limit {
            self.entries.push(Entry { generation: 0, given: None });
            self.entries.len() as u32 - 1
        } else {
            self.free.pop_front()?
        };
        let entry = &mut self.entries[index as usize];
        entry.given = Some(Given { room, session, access, revocation: Revocation::None, released: None });
        self.live += 1;
        Some(GrantId::new(index, entry.generation))
    }

    /// The grant of this exact index and generation.
    pub fn find(&self, id: GrantId) -> Option<&Given> {
        self.visit();
        let entry = self.entries.get(id.index() as usize)?;
        entry.given.as_ref().filter(|_| is_same(id, GrantId::new(id.index(), entry.generation)))
    }

    pub fn find_mut(&mut self, id: GrantId) -> Option<&mut Given> {
        self.visit();
        let entry = self.entries.get_mut(id.index() as usize)?;
        let current = GrantId::new(id.index(), entry.generation);
        entry.given.as_mut().filter(|_| is_same(id, current))
    }

    /// Frees the index of a quiescent grant.
    pub fn free(&mut self, id: GrantId) {
        let entry = &mut self.entries[id.index() as usize];
        assert!(entry.generation == id.generation() && entry.given.is_some(), "a grant is freed once");
        entry.given = None;
        if !is_planted(Planted::GenerationKept) {
            entry.generation = (entry.generation + 1) % GrantId::GENERATIONS;
        }
        self.free.push_back(id.index());
        self.live -= 1;
    }

    pub fn len(&self) -> usize {
        self.live
    }

    pub fn visits(&self) -> u64 {
        self.visits.get()
    }

    fn visit(&self) {
        self.visits.set(self.visits.get() + 1);
    }

    /// Every grant whose index is not free, in the order of indices.
    pub fn iter(&self) -> impl Iterator<Item = (GrantId, &Given)> {
        self.entries.iter().enumerate().filter_map(|(index, entry)| {
            self.visit();
            let given = entry.given.as_ref()?;
            Some((GrantId::new(index as u32, entry.generation), given))
        })
    }
}

/// Whether two names are of the same grant: the generation tells it from the others that had its index.
pub(crate) fn is_same(one: GrantId, other: GrantId) -> bool {
    one == other || (is_planted(Planted::GenerationIgnored) && one.index() == other.index())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_of_rooms_never_have_the_name_of_a_standing_one() {
        let mut grants = Grants::new(u32::MAX);
        let give = || grants.give(RoomId(1), SessionId(1), Access::Write);
        let given: Vec<GrantId> = std::iter::from_fn(give).collect();
        assert_eq!(given.len() as u32, GrantId::INDICES - GrantId::STANDING);
        assert!(given.iter().all(|grant| grant.standing_number().is_none()));
    }
}
