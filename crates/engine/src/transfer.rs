//! What is out at the ports for each room: tokens to come back, immediates to be counted there.

use std::collections::{BTreeMap, VecDeque};

use crossdock_proto::{MAX_LANES, RoomId, SessionId, Start};
use crossdock_transport::{Direction, GrantId};

/// One attempt to move a room's bytes. A number is not used again soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TransferId {
    slot: u32,
    /// Distinguishes transfers that had the same slot: a late token must not be taken for one of the next.
    generation: u32,
}

pub(crate) struct Transfer {
    pub room: RoomId,
    pub session: SessionId,
    pub direction: Direction,
    pub grant: GrantId,
    pub lanes: [LaneUse; MAX_LANES],
    /// Lanes on which something ended by their `Down`.
    pub down_lanes: u16,
    /// No more is posted; the room waits for what is out.
    pub stopping: bool,
    /// All has been posted; what the finish carries.
    pub finishing: Option<Vec<u8>>,
    /// Stands among those that try again.
    is_retrying: bool,
}

/// What one lane has of a transfer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LaneUse {
    /// Tokens that have not come back.
    pub tokens: u32,
    /// Immediates posted.
    pub arrivals: u32,
    /// Ops were taken whose batch's last one was not: no token and no immediate follows them yet.
    pub uncovered: bool,
}

impl LaneUse {
    pub fn posted_whole(&mut self, direction: Direction) {
        self.tokens += 1;
        self.uncovered = false;
        if direction == Direction::Write {
            self.arrivals += 1;
        }
    }
}

/// All transfers. A room has one at a time, so the protocol's limit of rooms is theirs, too.
pub(crate) struct Transfers {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_room: BTreeMap<RoomId, TransferId>,
    by_session: BTreeMap<(SessionId, RoomId), TransferId>,
    /// To be moved on in the next turn.
    retries: VecDeque<TransferId>,
    /// Of those, how many were there when this turn began.
    due: Option<usize>,
}

struct Slot {
    generation: u32,
    transfer: Option<Transfer>,
}

impl TransferId {
    pub(crate) fn bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self { slot: bits as u32, generation: (bits >> 32) as u32 }
    }
}

impl Transfers {
    pub fn new() -> Self {
        Self {
            slots: Vec::with_capacity(USUAL),
            free: Vec::with_capacity(USUAL),
            by_room: BTreeMap::new(),
            by_session: BTreeMap::new(),
            retries: VecDeque::with_capacity(64),
            due: None,
        }
    }

    /// Begins the transfer of a room; one that is left from an earlier attempt has been stopped and has ended.
    pub fn begin(&mut self, start: &Start) {
        let transfer = Transfer {
            room: start.room,
            session: start.session,
            direction: start.direction,
            grant: start.grant,
            lanes: [LaneUse::default(); MAX_LANES],
            down_lanes: 0,
            stopping: false,
            finishing: None,
            is_retrying: false,
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, transfer: None });
            self.slots.len() as u32 - 1
        });
        let entry = &mut self.slots[slot as usize];
        assert!(entry.transfer.is_none(), "a free slot holds no transfer");
        entry.transfer = Some(transfer);
        let id = TransferId { slot, generation: entry.generation };
        let before = self.by_room.insert(start.room, id);
        assert!(before.is_none(), "a room has one transfer at a time");
        self.by_session.insert((start.session, start.room), id);
    }

    pub fn find(&self, room: RoomId) -> Option<TransferId> {
        self.by_room.get(&room).copied()
    }

    pub fn get(&self, id: TransferId) -> Option<&Transfer> {
        let slot = self.slots.get(id.slot as usize)?;
        slot.transfer.as_ref().filter(|_| slot.generation == id.generation)
    }

    pub fn get_mut(&mut self, id: TransferId) -> Option<&mut Transfer> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        let generation = slot.generation;
        slot.transfer.as_mut().filter(|_| generation == id.generation)
    }

    pub fn end(&mut self, id: TransferId) {
        let slot = &mut self.slots[id.slot as usize];
        if slot.generation != id.generation {
            return;
        }
        if let Some(transfer) = slot.transfer.take() {
            slot.generation = (slot.generation + 1) % GENERATIONS;
            self.free.push(id.slot);
            self.by_room.remove(&transfer.room);
            self.by_session.remove(&(transfer.session, transfer.room));
        }
    }

    pub fn of_session(&self, session: SessionId) -> Vec<TransferId> {
        self.by_session.range((session, RoomId(0))..=(session, RoomId(u64::MAX))).map(|(_, id)| *id).collect()
    }

    /// What ended with a lane that is down at both ends says nothing of the next one of its number.
    pub fn forget_lane(&mut self, session: SessionId, slot: u8) {
        for id in self.of_session(session) {
            if let Some(transfer) = self.get_mut(id) {
                transfer.down_lanes &= !(1 << slot);
            }
        }
    }

    /// Asks for another try in the next turn.
    pub fn retry(&mut self, id: TransferId) {
        if self.get_mut(id).is_some_and(|transfer| !std::mem::replace(&mut transfer.is_retrying, true)) {
            self.retries.push_back(id);
        }
    }

    /// The next of those that asked before this turn.
    pub fn next_retry(&mut self) -> Option<TransferId> {
        let due = self.due.get_or_insert(self.retries.len());
        *due = due.checked_sub(1)?;
        let id = self.retries.pop_front()?;
        if let Some(transfer) = self.get_mut(id) {
            transfer.is_retrying = false;
        }
        Some(id)
    }

    pub fn end_retries(&mut self) {
        self.due = None;
    }
}

/// The highest bit of a token is for those outside rooms.
const GENERATIONS: u32 = 1 << 31;

/// Room for so many from the beginning; the table grows to what is ever in use at once.
const USUAL: usize = 1024;
