//! The progress loop: carries out what the protocol decides, over a network and ports.

mod actions;
mod events;
mod lanes;
mod posting;
mod side;
mod streams;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;

use crossdock_memory::Memory;
use crossdock_proto::{Counters, LinkId as ProtoLink, Notice, Proto, Region, SessionId, Table};
use crossdock_transport::{Arm, Error, Events, LaneId, LocalId, Mapping, Port};

pub use self::lanes::LaneRegions;
pub use self::posting::TransferFailed;
pub use self::side::{SideArrival, SideDone};

use self::lanes::SessionLanes;
use self::side::Side;
use self::streams::Backlog;
use crate::network::{AddressCheck, Network};
use crate::transfer::Transfers;
use crate::{Doorbell, OsError, Sleeper, now_ns};

/// One node's engine: its protocol, its network, its ports. Owned by one thread.
///
/// [`turn`](Engine::turn) makes progress and never blocks; [`next_notice`](Engine::next_notice) says what the layer
/// above must know; [`park`](Engine::park) sleeps until there is something to do.
pub struct Engine {
    proto: Proto,
    network: Box<dyn Network>,
    rails: Vec<Rail>,
    sessions: Table<SessionId, SessionLanes>,
    /// Lanes on which regions are still to be attached.
    attaching: BTreeSet<(SessionId, u8)>,
    /// Lanes that have taken less than offered in this turn.
    full: Vec<(SessionId, u8)>,
    transfers: Transfers,
    /// Always there between two calls.
    events: Option<Events>,
    /// Frames that a full control stream did not take, by link.
    backlog: BTreeMap<ProtoLink, Backlog>,
    notices: VecDeque<Notice>,
    side: Side,
    mappings: VecDeque<PeerMapping>,
    /// By region number.
    region_bytes: Vec<u64>,
    is_shut: bool,
    options: EngineOptions,
}

/// In the place of a region that was taken back; never valid in an op.
const NO_REGION: LocalId = LocalId(u32::MAX);

/// The limits of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Events taken from one port in one turn.
    pub events_per_poll: usize,
    /// Bytes of control messages that may wait for one peer's stream. A peer that falls behind further is given up.
    pub max_backlog_bytes: usize,
    /// Where a session has several lanes, an op is cut so that each lane gets no more than this at once.
    pub stripe_bytes: u64,
    /// Whether the layer above wants to store to peers' memory itself, where a port maps it:
    /// [`next_mapping`](Engine::next_mapping). A mapping keeps its lane from going down, so it is not taken otherwise.
    pub keep_mappings: bool,
    /// How many immediates outside rooms wait for [`next_side_arrival`](Engine::next_side_arrival), for each session: one
    /// whose peer sends more is ended. 0: all are dropped, for a layer above that never asks.
    pub max_side_arrivals: usize,
    /// How many tokens of [`post_side`](Engine::post_side) may be out or wait for
    /// [`next_side_done`](Engine::next_side_done), for each session.
    pub max_side_tokens: usize,
}

/// A peer's region that a port has mapped into this process.
#[derive(Clone, Debug)]
pub struct PeerMapping {
    /// Whose.
    pub session: SessionId,
    /// The region's number at the peer.
    pub region: u32,
    /// Where it is.
    pub mapping: Mapping,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            events_per_poll: 256,
            max_backlog_bytes: 64 << 20,
            stripe_bytes: 1 << 20,
            keep_mappings: false,
            max_side_arrivals: 4096,
            max_side_tokens: 1024,
        }
    }
}

/// What one port has moved, as this node posted it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RailStats {
    /// The transport.
    pub kind: &'static str,
    /// Bytes posted to be written to peers.
    pub written_bytes: u64,
    /// Bytes posted to be read from peers.
    pub read_bytes: u64,
    /// Immediates that came in.
    pub arrivals: u64,
}

struct Rail {
    stats: RailStats,
    port: Box<dyn Port>,
    /// By region number.
    regions: Arc<[LocalId]>,
    lanes: BTreeMap<LaneId, (SessionId, u8)>,
    bytes_per_second: u64,
}

impl Engine {
    /// Takes the protocol's state, the network and the ports, in the order of the configuration's rails.
    pub fn new(
        proto: Proto,
        network: Box<dyn Network>,
        ports: Vec<Box<dyn Port>>,
        options: EngineOptions,
    ) -> Self {
        let rails = ports
            .into_iter()
            .map(|port| Rail {
                stats: RailStats { kind: port.info().kind, ..RailStats::default() },
                bytes_per_second: port.info().bytes_per_second.max(1),
                port,
                regions: Arc::new([]),
                lanes: BTreeMap::new(),
            })
            .collect();
        Self {
            proto,
            network,
            rails,
            sessions: Table::default(),
            attaching: BTreeSet::new(),
            full: Vec::with_capacity(64),
            transfers: Transfers::new(),
            events: Some(Events::with_capacity(options.events_per_poll)),
            backlog: BTreeMap::new(),
            notices: VecDeque::with_capacity(1024),
            side: Side::default(),
            mappings: VecDeque::new(),
            region_bytes: Vec::new(),
            is_shut: false,
            options,
        }
    }

    /// Registers memory on every port and announces it to peers that connect from now on. Gives its number.
    pub fn register(&mut self, memory: &Memory) -> Result<u32, Error> {
        let mut keys = Vec::with_capacity(self.rails.len());
        let mut taken: Vec<(usize, LocalId)> = Vec::new();
        for (at, rail) in self.rails.iter_mut().enumerate() {
            match rail.port.register(memory) {
                Ok((local, key)) => {
                    keys.push((at as u8, key));
                    taken.push((at, local));
                }
                Err(error) => {
                    for (at, local) in taken {
                        // Nothing can use a region that was never announced.
                        let _ = self.rails[at].port.deregister(local);
                    }
                    return Err(error);
                }
            }
        }
        let bytes = memory.bytes() as u64;
        // A number that was withdrawn means nothing to anybody any more.
        let region = match self.region_bytes.iter().position(|&bytes| bytes == 0) {
            Some(free) => {
                self.region_bytes[free] = bytes;
                free
            }
            None => {
                self.region_bytes.push(bytes);
                self.region_bytes.len() - 1
            }
        };
        for (at, local) in taken {
            let rail = &mut self.rails[at];
            let mut regions = rail.regions.to_vec();
            regions.resize(self.region_bytes.len(), NO_REGION);
            regions[region] = local;
            rail.regions = regions.into();
        }
        let region = region as u32;
        self.proto.announce(Region { region, bytes, keys });
        Ok(region)
    }

    /// Takes a region back: it is not announced any more, and its number may be given to another one. Refused while something uses it: a
    /// session that began when it was announced, as long as that is not [quiet](Engine::is_quiet).
    pub fn withdraw(&mut self, region: u32) -> Result<(), Error> {
        for rail in &mut self.rails {
            let Some(&local) = rail.regions.get(region as usize) else {
                return Err(Error::UnknownRegion { side: "local", region });
            };
            // One that a port has let go of already, when another one refused.
            if local != NO_REGION {
                rail.port.deregister(local)?;
                let kept =
                    |(at, &known): (usize, &LocalId)| if at == region as usize { NO_REGION } else { known };
                rail.regions = rail.regions.iter().enumerate().map(kept).collect();
            }
        }
        self.region_bytes[region as usize] = 0;
        self.proto.withdraw(region);
        Ok(())
    }

    /// The protocol, to open and end rooms. What it decides is carried out by the next [`turn`](Engine::turn).
    pub fn proto(&mut self) -> &mut Proto {
        &mut self.proto
    }

    /// What peers dial.
    pub fn address(&self) -> &str {
        self.network.address()
    }

    /// Tells, from any thread, whether an address can be dialed at all.
    pub fn address_check(&self) -> AddressCheck {
        self.network.address_check()
    }

    /// What has been counted.
    pub fn counters(&self) -> Counters {
        self.proto.counters()
    }

    /// How often anything in the protocol's tables was visited, or a session in the engine's: [`Proto::visits`].
    pub fn visits(&self) -> u64 {
        self.proto.visits() + self.sessions.visits()
    }

    /// What each port has moved, in the order of the rails.
    pub fn rail_stats(&self) -> Vec<RailStats> {
        self.rails.iter().map(|rail| rail.stats).collect()
    }

    /// The ports, in the order of the rails.
    pub fn ports(&self) -> impl Iterator<Item = &dyn Port> {
        self.rails.iter().map(|rail| &*rail.port)
    }

    /// What the layer above must know, oldest first.
    pub fn next_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// A peer's region that was mapped, oldest first: always before the session's
    /// [`SessionUp`](crossdock_proto::Notice::SessionUp). Only with [`EngineOptions::keep_mappings`].
    pub fn next_mapping(&mut self) -> Option<PeerMapping> {
        self.mappings.pop_front()
    }

    /// Makes progress: takes what came, decides, acts. Never blocks, and its work is bounded. True if anything
    /// happened.
    pub fn turn(&mut self, now_ns: u64) -> bool {
        self.turn_links(now_ns) | self.turn_ports(now_ns)
    }

    /// As [`turn`](Engine::turn), but takes nothing from the network, which costs a system call: for a loop that looks
    /// very often.
    pub fn turn_ports(&mut self, now_ns: u64) -> bool {
        let mut active = self.take_events(now_ns);
        self.attach_again(now_ns);
        if self.proto.next_deadline_ns().is_some_and(|at| at <= now_ns) {
            self.listen(now_ns);
            self.proto.tick(now_ns);
            active = true;
        }
        active |= self.carry_out(now_ns);
        self.send_backlog(now_ns);
        self.network.flush();
        active
    }

    /// Carries out what the protocol has decided since, without looking for anything new: for the layer above,
    /// after it has called into the protocol.
    pub fn carry_out(&mut self, now_ns: u64) -> bool {
        let mut active = false;
        loop {
            let mut has_acted = false;
            while let Some(action) = self.proto.next_action() {
                self.act(now_ns, action);
                has_acted = true;
            }
            if has_acted {
                // The peer should not wait for what the notices lead to here.
                self.network.flush();
                active = true;
            }
            let Some(notice) = self.proto.next_notice() else { return active };
            if let Notice::Start(start) = &notice {
                self.transfers.begin(start);
            }
            self.notices.push_back(notice);
            active = true;
        }
    }

    /// Ends every session and every room for good: peers hear a goodbye, grants are revoked, lanes are closed. The
    /// notices say how the rooms ended, and bring home the pages that no write can land in any more; further turns
    /// may bring more, as lanes go down.
    pub fn shut_down(&mut self, now_ns: u64) {
        self.is_shut = true;
        self.proto.shut_down(now_ns);
        self.carry_out(now_ns);
        // A stream that is full will be found ended by its peer instead.
        self.send_backlog(now_ns);
        self.network.flush();
    }

    /// When the engine has something to do even if nothing comes.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.proto.next_deadline_ns()
    }

    /// Sleeps until something comes, the doorbell rings, a deadline is due, or `longest_ns` is over. `idle` is
    /// asked once more after the doorbell has been armed: false keeps the thread awake.
    pub fn park(
        &mut self,
        now: u64,
        doorbell: &Doorbell,
        longest_ns: u64,
        idle: impl FnOnce() -> bool,
    ) -> Result<(), OsError> {
        let mut timeout_ns = longest_ns;
        if let Some(at) = self.next_deadline_ns() {
            timeout_ns = timeout_ns.min(at.saturating_sub(now));
        }
        if !self.attaching.is_empty() || !self.backlog.is_empty() {
            timeout_ns = timeout_ns.min(RETRY_NS);
        }
        doorbell.prepare_sleep();
        let mut sleeper = Sleeper::new();
        let mut ready = timeout_ns == 0 || !idle();
        // More ports than a sleep can watch, or one that cannot wake: look again soon.
        let mut soon = false;
        let arms =
            std::iter::once(self.network.arm()).chain(self.rails.iter_mut().map(|rail| rail.port.arm()));
        for arm in arms {
            match arm {
                Arm::Ready => ready = true,
                Arm::Spin => soon = true,
                Arm::Sleep(descriptor) => soon |= sleeper.watch(descriptor).is_err(),
            }
        }
        soon |= sleeper.watch(doorbell.as_fd()).is_err();
        if soon {
            timeout_ns = timeout_ns.min(RETRY_NS);
        }
        let slept = if ready { Ok(()) } else { sleeper.sleep(timeout_ns).map(|_| ()) };
        doorbell.awake();
        slept
    }
}

impl Drop for Engine {
    /// Says goodbye to every peer, so that none has to wait for silence; the pages that peers can still write
    /// stay out of their pools.
    fn drop(&mut self) {
        // What a panic has left half-done is not to be trusted with anybody's pages.
        if !self.is_shut && !std::thread::panicking() {
            self.shut_down(now_ns());
        }
    }
}

/// How soon what cannot wake the loop is looked at again.
const RETRY_NS: u64 = 200_000;
