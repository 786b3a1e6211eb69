//! The progress of one node's KV rooms: commands in, notices in, ops out, ends out.

mod blocked;
mod commands;
mod flight;
mod notices;
mod opening;
mod posting;
mod proof;
mod room;
mod whole;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crossdock_engine::{Doorbell, Engine, EventFd, OsError, Promise, now_ns};
use crossdock_memory::Memory;
use crossdock_proto::{Buffers, End, RoomBuffer, RoomId, SessionEnd, SessionId, Table, TargetId};
use crossdock_transport::Port;

use self::blocked::Blocked;
use self::flight::FlightDesk;
use self::room::Room;
use self::whole::Whole;
use crate::handle::{Handle, Shared};
use crate::layout::rank_of;
use crate::request::{Ended, PeerUp, Stats};
use crate::{CacheLayout, CachePart, CachePool, Verify};

/// Moves the KV pages of one node. Owned by one thread, which calls [`turn`](Worker::turn) and, when there is nothing
/// to do, [`park`](Worker::park); or gives itself to [`run`](Worker::run).
pub struct Worker {
    engine: Engine,
    shared: Arc<Shared>,
    layout: CacheLayout,
    /// The regions that the layout names, in the order of their announcement.
    memory: Vec<Memory>,
    /// One for each pool.
    buffers: Vec<Buffers>,
    verify: Verify,
    turn_bytes: u64,
    max_targets: usize,
    /// The caches of the peers with a live session; `None` for a peer that has none.
    caches: Table<SessionId, Option<Arc<CacheLayout>>>,
    targets: BTreeMap<u64, TargetId>,
    /// What is dialed, for logs.
    addresses: BTreeMap<TargetId, String>,
    dialing: BTreeMap<TargetId, Promise<Result<PeerUp, SessionEnd>>>,
    rooms: Table<RoomId, Room>,
    /// What users have opened, by their handles' numbers.
    wholes: Table<u64, Whole>,
    /// Rooms that may have something to post, each once.
    ready: VecDeque<RoomId>,
    /// Those that wait for lanes to take more.
    blocked: Blocked,
    /// When everything was looked at last, the network too.
    turned_ns: u64,
    /// For how long the network may be left out after that.
    glances_ns: u64,
    stopped: bool,
    flight: FlightDesk,
}

/// How a node's KV side is set up.
pub struct WorkerOptions {
    /// What this node keeps, and where.
    pub layout: CacheLayout,
    /// The memory of the regions that the layout names.
    pub memory: Vec<Memory>,
    /// Which rooms this node's decode side verifies by checksums.
    pub verify: Verify,
    /// Commands that may wait for the loop.
    pub max_commands: usize,
    /// Addresses that are dialed at once.
    pub max_targets: usize,
    /// Bytes that all rooms together post in one turn, where the ports take them; a sum costs four times as much as a
    /// byte that is posted. So a turn stays short however many rooms there are.
    pub turn_bytes: u64,
}

impl WorkerOptions {
    /// The usual `turn_bytes`: about a millisecond of copying.
    pub const TURN_BYTES: u64 = 8 << 20;
}

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The layout names a region that was not given.
    #[error("the layout names region {region}, of which no memory was given")]
    NoMemory {
        /// Its number.
        region: u32,
    },
    /// A region is too small for the layout.
    #[error("region {region} has {bytes} bytes, and the layout needs {needed}")]
    TooSmall {
        /// Its number.
        region: u32,
        /// Its length.
        bytes: u64,
        /// What the layout needs.
        needed: u64,
    },
    /// A port may show an immediate before the bytes of earlier ops, and rooms are counted by one immediate a batch.
    #[error("the {port} port does not keep the order of a lane, which rooms are counted by")]
    Unordered {
        /// The transport.
        port: &'static str,
    },
    /// A port did not take the memory.
    #[error("a port did not take the memory: {0}")]
    Register(#[from] crossdock_transport::Error),
    /// The operating system refused a descriptor.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// What a turn found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Something happened, and more may be waiting.
    Active,
    /// Nothing happened.
    Idle,
    /// The node was asked to stop.
    Stopped,
}

impl Worker {
    /// Registers the memory and gives the user's handle.
    pub fn new(mut engine: Engine, options: WorkerOptions) -> Result<(Self, Handle), WorkerError> {
        let layout = options.layout;
        for buffer in layout.buffers() {
            let memory = options
                .memory
                .get(buffer.region as usize)
                .ok_or(WorkerError::NoMemory { region: buffer.region })?;
            let (bytes, needed) = (memory.bytes() as u64, layout.bytes_needed(buffer.region));
            if bytes < needed {
                return Err(WorkerError::TooSmall { region: buffer.region, bytes, needed });
            }
        }
        if let Some(port) = engine.ports().find(|port| !port.info().ordered) {
            return Err(WorkerError::Unordered { port: port.info().kind });
        }
        for memory in &options.memory {
            engine.register(memory)?;
        }
        engine.proto().know_ranks(rank_of);
        let buffers = layout.pools().iter().map(buffers_of).collect();
        let shared = Arc::new(Shared::new(
            options.max_commands.max(1),
            Doorbell::new()?,
            EventFd::new()?,
            &layout,
            engine.address_check(),
        ));
        let handle = Handle::new(shared.clone());
        let worker = Self {
            engine,
            shared,
            layout,
            memory: options.memory,
            buffers,
            verify: options.verify,
            turn_bytes: options.turn_bytes.max(1),
            max_targets: options.max_targets,
            caches: Table::default(),
            targets: BTreeMap::new(),
            addresses: BTreeMap::new(),
            dialing: BTreeMap::new(),
            rooms: Table::default(),
            wholes: Table::default(),
            ready: VecDeque::with_capacity(64),
            blocked: Blocked::default(),
            turned_ns: 0,
            glances_ns: GLANCES_NS.start,
            stopped: false,
            flight: FlightDesk::default(),
        };
        Ok((worker, handle))
    }

    /// Lets deadlines count from the call of a user's, and not from the turn that takes it: for whoever gives turns the
    /// time of [`now_ns`], and no other.
    pub fn count_from_calls(&self) {
        self.shared.count_from_calls();
    }

    /// Runs until the node is asked to stop: spins for `spin_ns` after something has happened, then sleeps. Whatever
    /// is open then ends, as when a worker is dropped.
    pub fn run(mut self, spin_ns: u64) -> Result<(), OsError> {
        let ran = self.run_until_stopped(spin_ns);
        if let Err(error) = &ran {
            tracing::error!("the progress loop ends: {error}");
        }
        ran
    }

    fn run_until_stopped(&mut self, spin_ns: u64) -> Result<(), OsError> {
        self.count_from_calls();
        let mut active_ns = now_ns();
        loop {
            let now = now_ns();
            match self.turn_or_glance(now) {
                Turn::Stopped => return Ok(()),
                Turn::Active => active_ns = now,
                Turn::Idle if now.saturating_sub(active_ns) < spin_ns => std::hint::spin_loop(),
                Turn::Idle => {
                    self.park(LONGEST_SLEEP_NS)?;
                    active_ns = now_ns();
                }
            }
        }
    }

    /// Makes progress; never blocks.
    pub fn turn(&mut self, now_ns: u64) -> Turn {
        self.turned_ns = now_ns;
        self.progress(now_ns, true)
    }

    /// A [`turn`](Worker::turn), but one that follows another within microseconds leaves the network out: what a loop
    /// that spins on a page does most of the time should not be system calls. The longer nothing has come from there,
    /// the longer it is left out. Before a sleep nothing is, since [`park`](Worker::park) watches everything.
    pub fn turn_or_glance(&mut self, now_ns: u64) -> Turn {
        match now_ns.saturating_sub(self.turned_ns) < self.glances_ns {
            true => self.progress(now_ns, false),
            false => self.turn(now_ns),
        }
    }

    fn progress(&mut self, now_ns: u64, with_network: bool) -> Turn {
        // What was asked for leaves before anything else is looked at.
        let mut active = self.take_commands(now_ns);
        let mut left = self.turn_bytes;
        if active {
            self.pump(now_ns, &mut left);
        }
        if with_network {
            let came = self.engine.turn_links(now_ns);
            self.glances_ns = if came { GLANCES_NS.start } else { (self.glances_ns * 2).min(GLANCES_NS.end) };
            active |= came;
        }
        active |= self.engine.turn_ports(now_ns);
        active |= self.take_notices(now_ns);
        active |= self.pump(now_ns, &mut left);
        if self.engine.carry_out(now_ns) {
            active = true;
            self.take_notices(now_ns);
        }
        self.show_arrivals();
        active |= self.write_down(now_ns);
        match (self.stopped, active) {
            (true, _) => Turn::Stopped,
            (false, true) => Turn::Active,
            (false, false) => Turn::Idle,
        }
    }

    /// Sleeps until there is something to do, for no longer than `longest_ns`.
    pub fn park(&mut self, longest_ns: u64) -> Result<(), OsError> {
        let shared = self.shared.clone();
        let longest_ns = self.until_dump(longest_ns);
        // A port that is full says when it takes more, but not every medium can tell.
        let is_full = !self.ready.is_empty() || !self.blocked.is_empty();
        let longest_ns = if is_full { longest_ns.min(FULL_SLEEP_NS) } else { longest_ns };
        self.engine.park(now_ns(), &shared.doorbell, longest_ns, || shared.is_empty())
    }

    /// When the node has something to do even if nothing comes.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.engine.next_deadline_ns()
    }

    /// What peers dial.
    pub fn address(&self) -> &str {
        self.engine.address()
    }

    /// What the node has done, and what it holds.
    pub fn stats(&mut self) -> Stats {
        let rails = self.engine.rail_stats();
        let proto = self.engine.proto();
        Stats {
            counters: proto.counters(),
            rails,
            rooms: proto.rooms_live(),
            grants: proto.grants_live(),
            sessions: proto.sessions_live(),
        }
    }

    /// The ports.
    pub fn ports(&self) -> impl Iterator<Item = &dyn Port> {
        self.engine.ports()
    }

    /// How often rooms, sessions and other entries of tables were visited, here and in the layers below: what a turn costs
    /// that has nothing to do must not grow with them.
    pub fn visits(&self) -> u64 {
        self.rooms.visits() + self.wholes.visits() + self.caches.visits() + self.engine.visits()
    }

    /// The engine, for what this layer does not do.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }
}

impl Drop for Worker {
    /// Ends everything: whoever holds a ticket of this node is told.
    fn drop(&mut self) {
        self.shared.close();
        // What a panic has left half-done is not to be trusted with anybody's pages; but whoever waits is told.
        if !std::thread::panicking() {
            let now = if self.turned_ns == 0 { now_ns() } else { self.turned_ns };
            self.engine.shut_down(now);
            self.take_notices(now);
            // Lanes that go down at once prove more; a peer's answer is not waited for.
            for _ in 0..LAST_TURNS {
                if !self.engine.turn_ports(now) {
                    break;
                }
                self.take_notices(now);
            }
        }
        for (_, up) in std::mem::take(&mut self.dialing) {
            self.tell(up, Err(SessionEnd::ClosedHere));
        }
        let rooms: Vec<RoomId> = self.rooms.keys().copied().collect();
        for room in rooms {
            // Told already, unless by a panic. Pages that are not home stay out of their pool.
            self.ended(room, Ended::alone(End::PeerLost { cause: SessionEnd::ClosedHere }));
        }
        self.dump_last();
    }
}

/// Where the pages of a pool lie.
fn buffers_of(pool: &CachePool) -> Buffers {
    let of_part = |part: &CachePart| -> Vec<RoomBuffer> {
        let placed = part.layers().iter().zip(part.buffers());
        placed
            .filter_map(|(&layer, buffer)| {
                Some(RoomBuffer { region: buffer.region, layout: part.page_layout(layer)? })
            })
            .collect()
    };
    pool.parts().iter().flat_map(of_part).collect()
}

/// Looks at the ports when a node ends.
const LAST_TURNS: usize = 16;

/// Longest sleep of a progress thread with nothing to do: everything that matters wakes it.
const LONGEST_SLEEP_NS: u64 = 1_000_000_000;

/// How long after a look at the network a loop that spins looks at ports and commands alone: while control messages
/// come, and when none has come for some looks.
const GLANCES_NS: std::ops::Range<u64> = 5_000..20_000;

/// Longest sleep while a port is full.
const FULL_SLEEP_NS: u64 = 200_000;
