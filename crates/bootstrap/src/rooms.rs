//! Which data-parallel rank serves a room, where a scheduler decides that for each room.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::group::{GroupId, RoomPolicy, Topology};

/// What is known of one room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DpRank {
    /// This data-parallel rank of the group serves it.
    Known(u32),
    /// Nobody has said yet, or what was said has expired: ask again.
    NotYet,
}

impl DpRank {
    /// The rank, if it is known.
    pub fn known(self) -> Option<u32> {
        match self {
            DpRank::Known(rank) => Some(rank),
            DpRank::NotYet => None,
        }
    }
}

/// Why the rooms of a group were not taken, or asked for in vain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoomRefusal {
    /// No worker of the group is registered.
    #[error("no worker of group {group} is registered")]
    UnknownGroup {
        /// The group.
        group: GroupId,
    },
    /// The group's rooms follow their number, so nobody needs to be told.
    #[error("the rooms of group {group} follow their number: each is served by dp rank room % {dp_size}")]
    Follows {
        /// The group.
        group: GroupId,
        /// How many data-parallel ranks it has.
        dp_size: u32,
    },
    /// The group has no such rank.
    #[error("room {room}: dp_rank {dp_rank} is not below dp_size {dp_size} of group {group}")]
    Rank {
        /// The group.
        group: GroupId,
        /// The room.
        room: u64,
        /// What was said.
        dp_rank: u32,
        /// How many data-parallel ranks the group has.
        dp_size: u32,
    },
    /// The registry holds as many rooms as it may.
    #[error("the registry holds {rooms} rooms and takes no more")]
    Full {
        /// How many it holds.
        rooms: usize,
    },
    /// The rooms shall be kept for too long, or for no time.
    #[error("keep_ms {given} is not within 1 to {most}")]
    Keep {
        /// What was asked for.
        given: u64,
        /// What is allowed.
        most: u64,
    },
}

/// Whether a group of this topology takes it that these rooms are told.
pub(crate) fn admit(group: &GroupId, topology: &Topology, rooms: &[(u64, u32)]) -> Result<(), RoomRefusal> {
    let dp_size = topology.dp_size;
    if topology.rooms == RoomPolicy::Follow {
        return Err(RoomRefusal::Follows { group: group.clone(), dp_size });
    }
    match rooms.iter().find(|(_, dp_rank)| *dp_rank >= dp_size) {
        Some(&(room, dp_rank)) => Err(RoomRefusal::Rank { group: group.clone(), room, dp_rank, dp_size }),
        None => Ok(()),
    }
}

/// The rank of a room that follows its number.
pub(crate) fn follow(room: u64, topology: &Topology) -> DpRank {
    DpRank::Known((room % u64::from(topology.dp_size)) as u32)
}

/// What was told of a room, if the group has such a rank: it may have been cut anew since.
pub(crate) fn within(rank: DpRank, topology: &Topology) -> DpRank {
    match rank {
        DpRank::Known(rank) if rank < topology.dp_size => DpRank::Known(rank),
        _ => DpRank::NotYet,
    }
}

/// The rooms that were told, each for a time, and no more than a limit.
pub(crate) struct Rooms {
    most: usize,
    rooms: HashMap<Key, Told>,
    /// Every room once, by the time at which it is forgotten.
    expiries: BTreeSet<(Duration, Key)>,
}

type Key = (GroupId, u64);

struct Told {
    dp_rank: u32,
    expires: Duration,
}

impl Rooms {
    pub(crate) fn new(most: usize) -> Rooms {
        Rooms { most, rooms: HashMap::new(), expiries: BTreeSet::new() }
    }

    /// Takes all of these rooms or none. What was said of a room before is forgotten.
    pub(crate) fn tell(
        &mut self,
        now: Duration,
        keep: Duration,
        group: &GroupId,
        rooms: &[(u64, u32)],
    ) -> Result<(), RoomRefusal> {
        let fresh: BTreeSet<u64> = rooms.iter().map(|(room, _)| *room).collect();
        let fresh =
            fresh.into_iter().filter(|room| !self.rooms.contains_key(&(group.clone(), *room))).count();
        if fresh > self.most - self.rooms.len() {
            return Err(RoomRefusal::Full { rooms: self.rooms.len() });
        }
        let expires = now + keep;
        for &(room, dp_rank) in rooms {
            let key = (group.clone(), room);
            if let Some(before) = self.rooms.insert(key.clone(), Told { dp_rank, expires }) {
                self.expiries.remove(&(before.expires, key.clone()));
            }
            self.expiries.insert((expires, key));
        }
        Ok(())
    }

    pub(crate) fn rank(&self, group: &GroupId, room: u64) -> DpRank {
        let told = self.rooms.get(&(group.clone(), room));
        told.map_or(DpRank::NotYet, |told| DpRank::Known(told.dp_rank))
    }

    /// Forgets what has expired; says how much that was.
    pub(crate) fn sweep(&mut self, now: Duration) -> u64 {
        let mut swept = 0;
        while self.expiries.first().is_some_and(|(expires, _)| *expires <= now) {
            if let Some((_, key)) = self.expiries.pop_first() {
                self.rooms.remove(&key);
                swept += 1;
            }
        }
        swept
    }

    pub(crate) fn len(&self) -> usize {
        debug_assert_eq!(self.rooms.len(), self.expiries.len());
        self.rooms.len()
    }
}

/// How many rooms one call may tell or ask for.
pub const ROOMS_PER_CALL_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::group::Tag;

    fn group(name: &str) -> GroupId {
        GroupId::new(name).unwrap()
    }

    fn topology(dp_size: u32, rooms: RoomPolicy) -> Topology {
        let single = Topology::single(Tag::new("m").unwrap(), Tag::new("bf16").unwrap(), 16);
        Topology { dp_size, rooms, ..single }
    }

    #[test]
    fn rooms_follow_their_number_over_all_of_its_range() {
        for (room, dp_size, dp_rank) in [(0, 1, 0), (7, 4, 3), (u64::MAX, 8, 7), (i64::MAX as u64, 3, 1)] {
            assert_eq!(follow(room, &topology(dp_size, RoomPolicy::Follow)), DpRank::Known(dp_rank));
        }
    }

    #[test]
    fn a_group_takes_what_it_has_use_for() {
        let g = group("g");
        let admit = |policy, rooms: &[_]| admit(&g, &topology(2, policy), rooms);
        admit(RoomPolicy::Told, &[(1, 0), (2, 1)]).unwrap();
        assert!(matches!(admit(RoomPolicy::Told, &[(1, 0), (2, 2)]), Err(RoomRefusal::Rank { room: 2, .. })));
        assert!(matches!(admit(RoomPolicy::Follow, &[(1, 0)]), Err(RoomRefusal::Follows { dp_size: 2, .. })));
    }

    proptest! {
        #[test]
        fn the_table_is_as_a_plain_list_would_be(
            steps in proptest::collection::vec(
                (0..2usize, proptest::collection::vec((0..12u64, 0..4u32), 0..5), 1..9u64, 0..4u64), 1..60),
        ) {
            const MOST: usize = 8;
            let mut table = Rooms::new(MOST);
            let mut model: BTreeMap<(GroupId, u64), (u32, u64)> = BTreeMap::new();
            let mut now = 0;
            let ms = Duration::from_millis;
            for (which, rooms, keep, pass) in steps {
                now += pass;
                let before = model.len();
                model.retain(|_, (_, expires)| *expires > now);
                prop_assert_eq!(table.sweep(ms(now)), (before - model.len()) as u64);
                let group = group(["g", "h"][which]);
                let told = table.tell(ms(now), ms(keep), &group, &rooms);
                let mut after = model.clone();
                after.extend(rooms.iter().map(|(room, rank)| ((group.clone(), *room), (*rank, now + keep))));
                if after.len() <= MOST {
                    prop_assert_eq!(told, Ok(()));
                    model = after;
                } else {
                    prop_assert_eq!(told, Err(RoomRefusal::Full { rooms: model.len() }));
                }
                prop_assert_eq!(table.len(), model.len());
                for room in 0..12 {
                    let known = model.get(&(group.clone(), room)).map_or(DpRank::NotYet, |(rank, _)| DpRank::Known(*rank));
                    prop_assert_eq!(table.rank(&group, room), known);
                }
            }
        }
    }
}
