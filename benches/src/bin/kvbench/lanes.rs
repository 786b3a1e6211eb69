//! The same pages over lanes of the RDMA devices that no node is around: one-sided, with completions asked for at the end.

use std::io;
use std::time::Instant;

use crossdock::{Memory, PortError};
use crossdock_benches::bare::Patience;
use crossdock_benches::rails;
use crossdock_transport::{
    Direction, Event, Events, GrantId, LaneAddress, LaneId, LaneTags, LocalId, Op, PeerId, Port, RemoteId,
    RemoteKey, Shape, Token,
};
use crossdock_verbs::VerbsPort;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::setup::{Lists, Setup, WAIT, Who};

/// One end of all lanes: as many on each rail as the node has.
pub struct Lanes {
    lanes: Vec<Lane>,
    events: Events,
    setup: Setup,
}

/// A lane, on a port of its own.
struct Lane {
    port: VerbsPort,
    lane: LaneId,
    local: LocalId,
    /// The peer's pool, once the lane is up.
    remote: Option<RemoteId>,
    /// Ops that were asked to tell of their end, and those that have.
    asked: u64,
    done: u64,
    /// Pages that the peer has told of, and those that were waited for.
    arrived: u64,
    taken: u64,
}

/// What the other end needs to know of a lane.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaneEnd {
    address: Vec<u8>,
    key: Vec<u8>,
}

impl Lanes {
    /// Opens this process's ends, and says what the other process has to know of them.
    pub fn open(setup: &Setup, who: Who, memory: &Memory) -> Result<(Self, Vec<LaneEnd>), Error> {
        let (mut lanes, mut ends) = (Vec::new(), Vec::new());
        let rails = rails(&setup.devices, who as usize);
        for options in rails.iter().flat_map(|options| (0..setup.lanes).map(move |_| options)) {
            let mut port = VerbsPort::open(options.clone())?;
            let (local, key) = port.register(memory)?;
            let (lane, address) = port.open_lane(PeerId(0))?;
            ends.push(LaneEnd { address: address.bytes().to_vec(), key: key.bytes().to_vec() });
            lanes.push(Lane { port, lane, local, remote: None, asked: 0, done: 0, arrived: 0, taken: 0 });
        }
        Ok((Self { lanes, events: Events::with_capacity(EVENTS), setup: setup.clone() }, ends))
    }

    /// Connects them with the other process's: the first with the first, as far as both go.
    pub fn connect(&mut self, who: Who, theirs: &[LaneEnd]) -> Result<(), Error> {
        self.lanes.truncate(theirs.len());
        let (ours, other) = match who {
            Who::Initiator => (1, 2),
            Who::Target => (2, 1),
        };
        // Neither secret nor known to anybody else by chance: nothing but a mistake is to be found out here.
        let tags = LaneTags { ours: [ours; 32], theirs: [other; 32] };
        for (lane, end) in self.lanes.iter_mut().zip(theirs) {
            lane.port.connect(lane.lane, &LaneAddress::new(&end.address)?, &tags)?;
        }
        Ok(())
    }

    /// Waits until all are up, and can write to and read from the other process's pool then.
    pub fn meet(&mut self, theirs: &[LaneEnd]) -> Result<(), Error> {
        let begin = Instant::now();
        for (lane, end) in self.lanes.iter_mut().zip(theirs) {
            let key = RemoteKey::new(&end.key)?;
            while lane.remote.is_none() {
                lane.poll(&mut self.events).map_err(Error::io("connecting bare lanes"))?;
                match lane.port.attach(lane.lane, &key) {
                    Ok(attached) => lane.remote = Some(attached.id),
                    Err(PortError::LaneNotUp { .. } | PortError::NotYet) if begin.elapsed() < WAIT => {
                        std::thread::yield_now();
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Moves all pages of the lists, which lie here where they come from or, for a read, where they go.
    pub fn carry(&mut self, direction: Direction, lists: &Lists) -> io::Result<()> {
        let Self { lanes, events, setup } = self;
        let (here, there) = match direction {
            Direction::Write => (&lists.from, &lists.to),
            Direction::Read => (&lists.to, &lists.from),
        };
        let share = here.len().div_ceil(lanes.len()).max(1);
        let mut left: Vec<_> = (lanes.iter())
            .zip(here.chunks(share).zip(there.chunks(share)))
            .map(|(lane, (here, there))| lane.ops(setup, direction, here, there, None))
            .map(|ops| (ops, (0, 0)))
            .collect();
        for (lane, _) in lanes.iter_mut().zip(&left) {
            lane.asked += 1;
        }
        let mut patience = Patience::default();
        while lanes.iter().zip(&left).any(|(lane, (ops, at))| at.0 < ops.len() || lane.done < lane.asked) {
            for (lane, (ops, at)) in lanes.iter_mut().zip(&mut left) {
                if lane.post(ops, at)? | lane.poll(events)? {
                    patience = Patience::default();
                }
            }
            patience.spin_or_yield()?;
        }
        Ok(())
    }

    /// Moves one page from here to there, and tells so.
    pub fn put(&mut self, here: u32, there: u32) -> io::Result<()> {
        let Self { lanes, events, setup } = self;
        let lane = &mut lanes[0];
        let (here, there) = ([here], [there]);
        let ops = lane.ops(setup, Direction::Write, &here, &there, Some(1));
        let (mut at, mut patience) = ((0, 0), Patience::default());
        while at.0 < ops.len() {
            // What comes short waits for room, which completions and credits make.
            lane.post(&ops, &mut at)?;
            lane.poll(events)?;
            patience.spin_or_yield()?;
        }
        Ok(())
    }

    /// Waits until a page has come.
    pub fn take(&mut self) -> io::Result<()> {
        let Self { lanes, events, .. } = self;
        let lane = &mut lanes[0];
        lane.taken += 1;
        let mut patience = Patience::default();
        while lane.arrived < lane.taken {
            lane.poll(events)?;
            patience.spin_or_yield()?;
        }
        Ok(())
    }
}

impl Lane {
    /// An op for each layer; the last one tells of its end, or tells the peer.
    fn ops<'a>(
        &self,
        setup: &Setup,
        direction: Direction,
        local_pages: &'a [u32],
        remote_pages: &'a [u32],
        imm: Option<u32>,
    ) -> Vec<Op<'a>> {
        let page_bytes = setup.page_bytes();
        (0..u64::from(setup.layers))
            .map(|layer| {
                let offset = layer * u64::from(setup.pool_pages) * page_bytes;
                let is_last = layer + 1 == u64::from(setup.layers);
                Op {
                    direction,
                    // The devices check keys, and know of no grants.
                    grant: GrantId::NONE,
                    shape: Shape::Pages {
                        local: self.local,
                        local_offset: offset,
                        local_stride_bytes: page_bytes,
                        local_pages,
                        remote: self.remote.expect("the lane is up"),
                        remote_offset: offset,
                        remote_stride_bytes: page_bytes,
                        remote_pages,
                        piece_bytes: page_bytes,
                    },
                    imm: imm.filter(|_| is_last),
                    token: (is_last && imm.is_none()).then_some(Token(0)),
                }
            })
            .collect()
    }

    /// Posts from where the last call came to; whether it came further.
    fn post(&mut self, ops: &[Op<'_>], at: &mut (usize, u64)) -> io::Result<bool> {
        let from = *at;
        while at.0 < ops.len() {
            let first = [ops[at.0].advance(at.1)];
            let posted = self.port.post(self.lane, &first).map_err(io::Error::other)?;
            match (posted.ops, posted.within) {
                (0, 0) => break,
                (0, within) => at.1 += within,
                _ => *at = (at.0 + 1, 0),
            }
        }
        Ok(*at != from)
    }

    /// Whether something has happened.
    fn poll(&mut self, events: &mut Events) -> io::Result<bool> {
        self.port.poll(events);
        let mut happened = false;
        for event in events.drain() {
            happened = true;
            match event {
                Event::Up { .. } => {}
                Event::Done { .. } => self.done += 1,
                Event::Arrived { .. } => self.arrived += 1,
                Event::Down { cause, .. } => return Err(io::Error::other(cause.to_string())),
            }
        }
        Ok(happened)
    }
}

const EVENTS: usize = 64;
