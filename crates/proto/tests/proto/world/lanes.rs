//! Lanes and transfers: the test says what is posted where, what lands, and which lane ends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crossdock_proto::{RoomId, SessionId, Start};
use crossdock_transport::{Access, Direction, DownCause, Error, Fence, GrantId, LaneAddress, LaneTags};

use super::{Channel, World};

#[derive(Default)]
pub struct Lanes {
    ends: BTreeMap<LaneKey, LaneEnd>,
    /// The tags that lanes of each node have shown.
    shown: BTreeSet<(usize, [u8; 32])>,
}

/// One end of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LaneKey {
    pub node: usize,
    pub session: SessionId,
    pub slot: u8,
}

struct LaneEnd {
    tags: Option<LaneTags>,
    other: Option<LaneKey>,
    is_up: bool,
    /// The protocol has let it be used.
    is_used: bool,
    /// It ends, and has said so or will.
    is_ending: bool,
    /// What its `Down` will say, while the test holds it.
    held_down: Option<DownCause>,
    is_down: bool,
    is_held: bool,
    towards: VecDeque<(u64, u64, Event)>,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Up,
    /// A write of the other end's.
    Write {
        room: RoomId,
        attempt: u32,
        grant: GrantId,
        /// The writer's port has not said that it is done.
        is_open: bool,
    },
    /// A read of the other end's.
    Read {
        room: RoomId,
        attempt: u32,
        grant: GrantId,
    },
    /// The bytes of a read.
    Bytes {
        room: RoomId,
        attempt: u32,
    },
    Down(DownCause),
}

/// What is out at the ports for one room.
pub struct Transfer {
    pub start: Start,
    /// Immediates posted, by lane.
    pub posted: [u32; 16],
    /// Ops that are not done.
    outstanding: [u32; 16],
    down_lanes: u16,
    stopping: bool,
    posted_all: bool,
}

impl Transfer {
    pub fn new(start: Start) -> Self {
        Self {
            start,
            posted: [0; 16],
            outstanding: [0; 16],
            down_lanes: 0,
            stopping: false,
            posted_all: false,
        }
    }

    pub fn is_idle(&self) -> bool {
        self.outstanding == [0; 16]
    }
}

impl Lanes {
    pub fn fronts(&self, stopped: &BTreeSet<usize>) -> Vec<(u64, u64, Channel)> {
        let open = |(key, end): (&LaneKey, &LaneEnd)| {
            let (due_ns, cause, _) = end.towards.front()?;
            (!end.is_held && !stopped.contains(&key.node)).then_some((*due_ns, *cause, Channel::Lane(*key)))
        };
        self.ends.iter().filter_map(open).collect()
    }

    /// Writes on their way to a node under one of these grants.
    pub fn writes_towards(&self, node: usize, grants: &[GrantId]) -> usize {
        let events = self.ends.iter().filter(|(key, _)| key.node == node).flat_map(|(_, end)| &end.towards);
        events
            .filter(|(_, _, event)| matches!(event, Event::Write { grant, .. } if grants.contains(grant)))
            .count()
    }

    /// The lanes of a node that are up, and not about to end as far as the node can know.
    pub fn up(&self, node: usize, session: SessionId) -> Vec<u8> {
        let of = LaneKey { node, session, slot: 0 }..=LaneKey { node, session, slot: u8::MAX };
        self.ends.range(of).filter(|(_, end)| end.is_used && !end.is_down).map(|(key, _)| key.slot).collect()
    }

    /// All ends, of all sessions, that are up.
    pub fn all_up(&self) -> Vec<LaneKey> {
        let whole = |end: &LaneEnd| end.is_up && !end.is_ending && end.other.is_some();
        self.ends.iter().filter(|(_, end)| whole(end)).map(|(key, _)| *key).collect()
    }

    /// The ends whose `Down` the test holds.
    pub fn held_downs(&self) -> Vec<LaneKey> {
        self.ends.iter().filter(|(_, end)| end.held_down.is_some()).map(|(key, _)| *key).collect()
    }
}

impl World {
    // --- lanes -----------------------------------------------------------------------------------------------

    pub fn open_lane(&mut self, node: usize, session: SessionId, slot: u8, rail: u8) {
        let n = &mut self.nodes[node];
        assert!(usize::from(rail) < 16);
        n.opened.push((self.now_ns, slot));
        if n.broken_slot == Some(slot) {
            let error = Error::Limit { what: "lanes", limit: 0 };
            return n.proto.lane_opened(self.now_ns, session, slot, Err(error));
        }
        if n.silent_slot == Some(slot) {
            return n.unspoken.push((session, slot, rail));
        }
        let key = LaneKey { node, session, slot };
        let end = LaneEnd {
            tags: None,
            other: None,
            is_up: false,
            is_used: false,
            is_ending: false,
            held_down: None,
            is_down: false,
            is_held: false,
            towards: VecDeque::new(),
        };
        let before = self.lanes.ends.insert(key, end);
        assert!(before.is_none_or(|before| before.is_down), "a number has one lane at a time");
        let transfers = self.nodes[node].transfers.values_mut();
        for transfer in transfers.filter(|transfer| transfer.start.session == session) {
            transfer.down_lanes &= !(1 << slot);
        }
        let address = [node as u32, session.0, slot.into()].map(u32::to_le_bytes).concat();
        let address = LaneAddress::new(&address).expect("a short address");
        self.nodes[node].proto.lane_opened(self.now_ns, session, slot, Ok(address));
    }

    /// It says now what it has not said so far.
    pub fn speak(&mut self, node: usize) {
        self.nodes[node].silent_slot = None;
        for (session, slot, rail) in std::mem::take(&mut self.nodes[node].unspoken) {
            self.open_lane(node, session, slot, rail);
        }
    }

    pub fn connect_lane(
        &mut self,
        node: usize,
        session: SessionId,
        slot: u8,
        to: &LaneAddress,
        tags: LaneTags,
    ) {
        let key = LaneKey { node, session, slot };
        let word = |at: usize| to.bytes().get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
        let (Some(n), Some(s), Some(l)) = (word(0), word(4), word(8)) else {
            let error = Error::BadAddress { reason: "not one of the world's" };
            return self.nodes[node].proto.lane_attached(self.now_ns, session, slot, Err(error));
        };
        let other = LaneKey { node: n as usize, session: SessionId(s), slot: l as u8 };
        let Some(end) = self.lanes.ends.get_mut(&key) else { return };
        (end.tags, end.other) = (Some(tags), Some(other));
        assert!(self.lanes.shown.insert((node, tags.ours)), "each lane has tags of its own");
        if self.nodes[node].is_unplugged {
            return self.end_lane(key, DownCause::Broken { call: "connect", errno: 110 });
        }
        let Some(there) = self.lanes.ends.get(&other).filter(|there| !there.is_ending) else {
            return self.end_lane(key, DownCause::Broken { call: "connect", errno: 111 });
        };
        let Some(theirs) = there.tags else { return };
        assert_eq!(there.other, Some(key), "both ends mean the same lane");
        if (tags.ours, tags.theirs) != (theirs.theirs, theirs.ours) {
            self.end_lane(key, DownCause::NotAuthentic);
            return self.end_lane(other, DownCause::NotAuthentic);
        }
        self.put_lane(key, Event::Up);
        self.put_lane(other, Event::Up);
    }

    /// Both ends of a lane are ready, as the protocol says.
    pub fn use_lane(&mut self, node: usize, session: SessionId, slot: u8) {
        let end = self.lanes.ends.get_mut(&LaneKey { node, session, slot }).expect("a lane");
        assert!(end.is_up && !std::mem::replace(&mut end.is_used, true), "a lane that is up is used, once");
    }

    pub fn close_lane(&mut self, node: usize, session: SessionId, slot: u8) {
        let key = LaneKey { node, session, slot };
        let Some(end) = self.lanes.ends.get(&key) else { return };
        let other = end.other;
        self.end_lane(key, DownCause::ClosedHere);
        if let Some(other) = other {
            self.end_lane(other, DownCause::ClosedByPeer);
        }
    }

    /// Breaks a lane: so many of the ops that are on their way to this end, and to the other, still land.
    pub fn break_lane(&mut self, lane: LaneKey, landing_here: usize, landing_there: usize) {
        let other = self.lanes.ends[&lane].other.expect("a connected lane");
        for (key, landing) in [(lane, landing_here), (other, landing_there)] {
            let Some(end) = self.lanes.ends.get_mut(&key) else { continue };
            if !end.is_ending {
                end.towards.truncate(landing);
            }
            self.end_lane(key, DownCause::Broken { call: "recv", errno: 104 });
        }
    }

    /// Lets a lane that the test has held say that it is down.
    pub fn let_down(&mut self, lane: LaneKey) {
        let end = self.lanes.ends.get_mut(&lane).expect("a lane");
        if let Some(cause) = end.held_down.take() {
            self.put_lane(lane, Event::Down(cause));
        }
    }

    pub fn let_all_down(&mut self) {
        for lane in self.lanes.held_downs() {
            self.let_down(lane);
        }
    }

    /// Stops what is on its way towards one end of a lane; or lets it.
    pub fn hold_lane(&mut self, lane: LaneKey, is_held: bool) {
        self.lanes.ends.get_mut(&lane).expect("a lane").is_held = is_held;
    }

    /// Lets everything that was held on lanes.
    pub fn release_lanes(&mut self) {
        self.lanes.ends.values_mut().for_each(|end| end.is_held = false);
    }

    pub fn end_lanes_of(&mut self, node: usize, cause: DownCause) {
        let of = self.lanes.ends.iter().filter(|(key, _)| key.node == node);
        let ended: Vec<(LaneKey, Option<LaneKey>)> = of.map(|(key, end)| (*key, end.other)).collect();
        for (key, other) in ended {
            self.lanes.ends.remove(&key);
            if let Some(other) = other {
                self.end_lane(other, cause);
                // A node that starts again numbers its sessions anew.
                if let Some(end) = self.lanes.ends.get_mut(&other) {
                    end.other = None;
                }
            }
        }
    }

    pub fn forget_lanes(&mut self, node: usize, session: SessionId) {
        let of = |key: &LaneKey| (key.node, key.session) == (node, session);
        self.lanes.ends.retain(|key, end| {
            assert!(!of(key) || end.is_down, "a session is forgotten after the `Down` of all its lanes");
            !of(key)
        });
    }

    fn end_lane(&mut self, lane: LaneKey, cause: DownCause) {
        let Some(end) = self.lanes.ends.get_mut(&lane) else { return };
        if std::mem::replace(&mut end.is_ending, true) {
            return;
        }
        match self.nodes[lane.node].holds_downs {
            true => end.held_down = Some(cause),
            false => self.put_lane(lane, Event::Down(cause)),
        }
    }

    fn put_lane(&mut self, lane: LaneKey, event: Event) {
        let (due_ns, cause) = self.cause();
        if let Some(end) = self.lanes.ends.get_mut(&lane) {
            end.towards.push_back((due_ns, cause, event));
        }
    }

    pub fn deliver_lane(&mut self, lane: LaneKey) {
        let LaneKey { node, session, slot } = lane;
        let Some(end) = self.lanes.ends.get_mut(&lane) else { return };
        let Some((_, _, event)) = end.towards.pop_front() else { return };
        let (other, at) = (end.other, usize::from(slot));
        match event {
            Event::Up => {
                if !end.is_ending {
                    end.is_up = true;
                    self.call(node, |proto, now| proto.lane_up(now, session, slot));
                }
            }
            Event::Write { room, attempt, grant, is_open } => {
                self.land(node, grant);
                if let (true, Some(other)) = (is_open, other) {
                    self.op_is_done(other, room, attempt);
                }
                self.call(node, |proto, now| proto.arrived(now, session, slot, grant));
            }
            Event::Read { room, attempt, grant } => {
                let granted = self.nodes[node].granted.get(&grant);
                let is_allowed = granted.is_some_and(|g| g.is_alive && g.access == Access::Read);
                assert!(is_allowed, "a read under {grant:?}, which is over: {granted:?}");
                if let Some(other) = other {
                    self.put_lane(other, Event::Bytes { room, attempt });
                }
            }
            Event::Bytes { room, attempt } => self.op_is_done(lane, room, attempt),
            Event::Down(cause) => {
                end.is_down = true;
                end.towards.clear();
                let transfers = self.nodes[node].transfers.values_mut();
                for transfer in transfers.filter(|transfer| transfer.start.session == session) {
                    if std::mem::take(&mut transfer.outstanding[at]) > 0 {
                        transfer.down_lanes |= 1 << slot;
                    }
                }
                self.call(node, |proto, now| proto.lane_down(now, session, slot, cause));
                let rooms: Vec<RoomId> = self.nodes[node].transfers.keys().copied().collect();
                rooms.into_iter().for_each(|room| self.advance(node, room));
            }
        }
    }

    /// A byte reaches a node's memory, unless its ports look first.
    fn land(&mut self, node: usize, grant: GrantId) {
        let n = &self.nodes[node];
        let granted = n.granted.get(&grant).expect("a grant that was given");
        let is_kept_out = n.fence == Fence::Now && !granted.is_alive;
        assert!(is_kept_out || !granted.is_home, "a byte lands in a page of {:?} that is home", granted.room);
        assert_eq!(granted.access, Access::Write);
    }

    // --- transfers -------------------------------------------------------------------------------------------

    /// Posts ops of a room that was told to start: writes with an immediate each, or reads.
    pub fn post(&mut self, node: usize, room: RoomId, slot: u8, ops: u32) {
        let transfer = self.nodes[node].transfers.get_mut(&room).expect("a transfer");
        assert!(!transfer.stopping && !transfer.posted_all, "nothing is posted for a room that stops");
        let Start { session, grant, attempt, direction, .. } = transfer.start;
        let here = LaneKey { node, session, slot };
        let end = &self.lanes.ends[&here];
        assert!(end.is_used && !end.is_down, "a lane that is used");
        // What is posted on a lane that has ended without its port's knowing yet ends with its `Down`.
        let there = end.other.filter(|_| !end.is_ending);
        let checks = there.is_some_and(|there| self.nodes[there.node].fence == Fence::Now);
        let transfer = self.nodes[node].transfers.get_mut(&room).expect("a transfer");
        let is_open = direction == Direction::Read || !checks || there.is_none();
        transfer.posted[usize::from(slot)] += ops;
        if is_open {
            transfer.outstanding[usize::from(slot)] += ops;
        }
        for _ in 0..ops {
            let event = match direction {
                Direction::Write => Event::Write { room, attempt, grant, is_open },
                Direction::Read => Event::Read { room, attempt, grant },
            };
            if let Some(there) = there.filter(|there| self.takes(*there)) {
                self.put_lane(there, event);
            }
        }
    }

    /// Whether what is sent to an end of a lane still gets there.
    fn takes(&self, lane: LaneKey) -> bool {
        self.lanes.ends.get(&lane).is_some_and(|end| !end.is_ending)
    }

    /// The rooms for which ops can be posted: where, which, and on which lanes.
    pub fn postable(&self) -> Vec<(usize, RoomId, Vec<u8>)> {
        let mut postable = Vec::new();
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.runs()) {
            for (room, transfer) in &node.transfers {
                if !transfer.stopping && !transfer.posted_all {
                    postable.push((at, *room, self.lanes.up(at, transfer.start.session)));
                }
            }
        }
        postable
    }

    /// All has been posted: a push is finished towards the receiver, a pull when its reads are done.
    pub fn finish_room(&mut self, node: usize, room: RoomId) {
        let transfer = self.nodes[node].transfers.get_mut(&room).expect("a transfer");
        transfer.posted_all = true;
        let (direction, posted) = (transfer.start.direction, transfer.posted);
        let lanes = self.lanes_of(node, transfer_session(&self.nodes[node].transfers[&room]));
        if direction == Direction::Write {
            self.call(node, |proto, now| proto.finish(now, room, &posted[..lanes], b"aux".to_vec()));
        }
        self.advance(node, room);
    }

    fn lanes_of(&self, node: usize, session: SessionId) -> usize {
        self.lanes.ends.keys().filter(|key| (key.node, key.session) == (node, session)).count()
    }

    pub fn stop_transfer(&mut self, node: usize, room: RoomId) {
        match self.nodes[node].transfers.get_mut(&room) {
            Some(transfer) => {
                transfer.stopping = true;
                self.advance(node, room);
            }
            None => self.nodes[node].proto.drained(self.now_ns, room, 0),
        }
    }

    fn op_is_done(&mut self, lane: LaneKey, room: RoomId, attempt: u32) {
        let Some(transfer) = self.nodes[lane.node].transfers.get_mut(&room) else { return };
        let open = &mut transfer.outstanding[usize::from(lane.slot)];
        if transfer.start.attempt == attempt && *open > 0 {
            *open -= 1;
            self.advance(lane.node, room);
        }
    }

    /// Ends a transfer of which nothing is out any more.
    fn advance(&mut self, node: usize, room: RoomId) {
        let Some(transfer) = self.nodes[node].transfers.get(&room) else { return };
        let (down_lanes, reads) = (transfer.down_lanes, transfer.start.direction == Direction::Read);
        if !transfer.is_idle() {
            return;
        }
        if transfer.stopping {
            self.nodes[node].transfers.remove(&room);
            self.call(node, |proto, now| proto.drained(now, room, down_lanes));
        } else if reads && transfer.posted_all {
            self.nodes[node].transfers.remove(&room);
            self.call(node, |proto, now| proto.fetched(now, room));
        }
    }

    /// Posts this many ops on each lane that is up, and finishes.
    pub fn move_all(&mut self, node: usize, room: RoomId, ops: u32) {
        let session = transfer_session(&self.nodes[node].transfers[&room]);
        for slot in self.lanes.up(node, session) {
            self.post(node, room, slot, ops);
        }
        self.finish_room(node, room);
    }
}

fn transfer_session(transfer: &Transfer) -> SessionId {
    transfer.start.session
}
