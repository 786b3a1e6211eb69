//! The port: its tables, and the methods that its owner calls.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossdock_memory::Memory;
use crossdock_transport::{
    Arm, Attached, DownCause, Error, Event, Events, Fence, Grant, GrantId, GrantTable, LaneAddress, LaneId,
    LaneTags, LocalId, Op, PeerId, Port, PortInfo, Posted, RemoteKey, Result,
};
use rustix::io::Errno;

use crate::address::{Address, Key, Secret, secret};
use crate::counters::HostCounters;
use crate::descriptors::Descriptors;
use crate::doorbell::{Bell, Doorbell};
use crate::guests::Guests;
use crate::joined::{Joined, Outgoing, Phase};
use crate::lane::{Lane, Pact, Stage};
use crate::link::Listener;
use crate::medium::{Medium, Registered};
use crate::message::Payload;
use crate::numbered::Numbered;
use crate::posting::{Posting, Taken};
use crate::reach;
use crate::remote::MAX_REGIONS;
use crate::ring;
use crate::underway::Underway;
use crate::watch::{Ready, Watch};

/// A port whose bytes a [`Medium`] moves: see the [crate's page](crate).
pub struct HostPort<M: Medium> {
    pub(crate) info: PortInfo,
    pub(crate) options: HostOptions,
    /// Names this port in its keys. Peers may read it where it lies, to prove that they reach this process; so it stays
    /// in one place.
    pub(crate) name: Box<Secret>,
    /// Where peers dial.
    pub(crate) socket: Secret,
    /// Lanes let go of peers' memory first of all.
    pub(crate) lanes: Numbered<Lane<M>>,
    next_lane: u32,
    pub(crate) guests: Guests,
    pub(crate) descriptors: Descriptors,
    pub(crate) regions: Numbered<Registered<M::Region>>,
    next_region: u32,
    grants: GrantTable,
    /// [Exposed](Medium::is_exposed) regions under grants that were revoked while their peer had a lane: it may still write
    /// there by itself, until all its lanes are down.
    exposed: BTreeSet<(PeerId, u32)>,
    /// Behind all that it has made.
    pub(crate) medium: M,
    pub(crate) watch: Watch,
    pub(crate) listener: Listener,
    /// What wakes this port. Mappings keep it: their end is something to wake up for.
    pub(crate) bell: Arc<Doorbell>,
    pub(crate) counters: HostCounters,
    /// Whether the owner was told that it may sleep.
    armed: bool,
    /// Polls since the last look around.
    polls: u32,
    /// Which lane is served first in the next poll.
    first: usize,
    /// The process that opened the port.
    owner: u32,
}

/// How a port is opened.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The port's name in logs and errors.
    pub name: String,
    /// How many lanes may be open at a time. Each takes four file descriptors, and one more for each region that its
    /// peer has registered.
    pub max_lanes: usize,
    /// How many regions may be registered at a time; at most 4096.
    pub max_regions: usize,
    /// How many file descriptors of peers' shared regions may be kept at a time, over all lanes; no more than half of
    /// what the process may have when the port is opened (`RLIMIT_NOFILE`). A lane whose peer passes one more ends with
    /// [`DownCause::LimitReached`].
    pub max_peer_descriptors: usize,
    /// How many immediates may be on their way on a lane, and how many ends of ops may wait to be polled there; where moves
    /// go on behind the port's back, how many of them may on a lane. Rounded up to a power of two, up to 65,536.
    pub immediates_per_lane: u32,
    /// How long a lane may take to connect.
    pub connect_timeout: Duration,
    /// What [`PortInfo::bytes_per_second`] says; rails are loaded in this proportion.
    pub bytes_per_second: u64,
    /// The NUMA node of the device, where that means something.
    pub numa_node: Option<u32>,
    /// Processes with different domains do not connect, as if they were on different hosts; at most 255 bytes. For
    /// containers of one host that share its namespaces and are to be told apart all the same.
    pub domain: String,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            name: "host".into(),
            max_lanes: 1024,
            max_regions: 1024,
            max_peer_descriptors: 65_536,
            immediates_per_lane: 1024,
            connect_timeout: Duration::from_secs(10),
            bytes_per_second: 10_000_000_000,
            numa_node: None,
            domain: String::new(),
        }
    }
}

impl<M: Medium> HostPort<M> {
    /// Opens a port. The medium is made last; the bell is for one that [wakes](Medium::wakes) the port.
    ///
    /// # Panics
    /// If an offer of the medium's [kind](Medium::KIND) has a longer payload than a packet.
    pub fn open(options: HostOptions, medium: impl FnOnce(Bell) -> Result<M>) -> Result<Self> {
        assert!(
            M::KIND.offers.iter().all(|form| form.payload_bytes <= Payload::MAX_BYTES),
            "{:?} cannot be told in packets",
            M::KIND
        );
        let os = |call| move |errno: Errno| Error::Os { call, errno: errno.raw_os_error() };
        let options = HostOptions {
            max_regions: options.max_regions.min(MAX_REGIONS),
            immediates_per_lane: options.immediates_per_lane.clamp(1, ring::MAX_CAPACITY).next_power_of_two(),
            connect_timeout: options.connect_timeout.min(LONGEST_CONNECT),
            ..options
        };
        let socket = secret()?;
        let listener = Listener::bind(M::KIND, &socket).map_err(os("bind"))?;
        let bell = Arc::new(Doorbell::new().map_err(os("eventfd"))?);
        let watch = Watch::new().map_err(|(call, errno)| os(call)(errno))?;
        watch.add(&listener, Ready::Listener).map_err(os("epoll_ctl"))?;
        watch.add(&*bell, Ready::Doorbell).map_err(os("epoll_ctl"))?;
        let name = Box::new(secret()?);
        let info = PortInfo {
            kind: M::KIND.name,
            name: options.name.clone(),
            reach: reach::of_this_process(&options.domain)?,
            numa_node: options.numa_node,
            bytes_per_second: options.bytes_per_second,
            ordered: true,
            immediates_in_flight: options.immediates_per_lane,
        };
        Ok(Self {
            info,
            name,
            socket,
            lanes: Numbered::default(),
            next_lane: 0,
            guests: Guests::new(options.max_lanes),
            descriptors: Descriptors::new(options.max_peer_descriptors),
            regions: Numbered::default(),
            next_region: 0,
            grants: GrantTable::new(),
            exposed: BTreeSet::new(),
            medium: medium(Bell::new(&bell))?,
            watch,
            listener,
            bell,
            counters: HostCounters::default(),
            armed: false,
            polls: 0,
            first: 0,
            owner: std::process::id(),
            options,
        })
    }

    /// What the port has done so far.
    pub fn counters(&self) -> HostCounters {
        self.counters
    }

    /// What moves the bytes.
    pub fn medium(&self) -> &M {
        &self.medium
    }

    /// A lane that has been opened and has not ended.
    fn lane(&mut self, id: LaneId) -> Result<&mut Lane<M>> {
        let known = id.0 < self.next_lane;
        self.lanes.get_mut(id.0).ok_or(if known {
            Error::LaneDown { lane: id }
        } else {
            Error::UnknownLane { lane: id }
        })
    }

    /// Tells every joined lane's peer something.
    fn tell_all(&mut self, what: Outgoing) {
        for (_, lane) in self.lanes.iter_mut() {
            if let Stage::Joined(joined) = &mut lane.stage {
                joined.announce(what, &self.regions, &self.medium);
            }
        }
    }

    /// Looks at everything that is not a ring: sockets, deaths, deadlines, closings.
    fn look_around(&mut self) {
        self.polls = 0;
        if let Some(found) = self.watch.ready() {
            for ready in found {
                self.see(ready);
            }
        }
        self.keep_deadlines();
        for (_, lane) in self.lanes.iter_mut() {
            if let Stage::Joined(joined) = &mut lane.stage
                && joined.blocked
                && !joined.is_closing()
            {
                joined.flush(&self.regions, &self.medium);
            }
        }
    }

    /// Looks at one thing that is ready.
    fn see(&mut self, ready: Ready) {
        match ready {
            Ready::Doorbell => {
                self.bell.silence();
                self.counters.wakes_received += 1;
            }
            // What is due is found by the clock, after all that is ready; the next `arm` sets the timer anew.
            Ready::Timer => {}
            Ready::Listener => self.welcome_guests(),
            Ready::Guest(guest) => self.hear_guest(guest),
            Ready::Socket(lane) => self.hear_lane(lane),
            Ready::Process(lane) => {
                if let Some(Lane { stage: Stage::Joined(joined), .. }) = self.lanes.get_mut(lane) {
                    joined.look_for_death(&mut self.medium, &self.watch, &mut self.counters);
                } else {
                    self.hear_lane(lane);
                }
            }
        }
    }

    /// Gives up what has taken too long, and tries again what had no room.
    fn keep_deadlines(&mut self) {
        if !self.guests.has_deadlines() && self.lanes.iter().all(|(_, lane)| lane.is_settled()) {
            return;
        }
        let now = Instant::now();
        self.guests.expire(now, &self.watch, &self.listener, &mut self.counters);
        for place in 0..self.lanes.len() {
            let (id, lane) = self.lanes.at_mut(place);
            let deadline = match &lane.stage {
                Stage::Dialing(pact) | Stage::Greeting(pact, ..) | Stage::Expecting(pact) => pact.deadline,
                Stage::Joined(joined) => match joined.phase {
                    Phase::Announcing { deadline } => deadline,
                    _ => continue,
                },
                Stage::Open | Stage::Ended(_) => continue,
            };
            if deadline <= now {
                lane.close(DownCause::ConnectTimedOut, &self.watch);
            } else if let Stage::Dialing(_) = lane.stage {
                self.dial(id);
            }
        }
    }

    /// Serves one lane in a poll; true if it has said its last.
    fn serve(&mut self, place: usize, events: &mut Events) -> bool {
        let (id, lane) = self.lanes.at_mut(place);
        let id = LaneId(id);
        if let Stage::Joined(joined) = &mut lane.stage {
            if !joined.underway.is_empty() {
                joined.settle(&mut self.medium, &mut self.counters);
            }
            let all = joined.deliver(id, events, &mut self.counters);
            if let Some(cause) = joined.advance_close()
                && all
            {
                joined.leave(&self.watch);
                lane.stage = Stage::Ended(cause);
            }
        }
        match lane.stage {
            Stage::Ended(cause) if !events.is_full() => {
                events.push(Event::Down { lane: id, cause });
                true
            }
            _ => false,
        }
    }
}

impl<M: Medium> Port for HostPort<M> {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        if self.regions.len() >= self.options.max_regions {
            return Err(Error::Limit { what: "regions", limit: self.options.max_regions as u64 });
        }
        let region = self.medium.register(memory)?;
        let number = self.next_region;
        self.next_region += 1;
        self.regions.push(number, Registered { region, memory: memory.clone() });
        self.tell_all(Outgoing::Region(number));
        let key = Key { port: *self.name, region: number, bytes: memory.bytes() as u64 };
        Ok((LocalId(number), key.encode(M::KIND)))
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        if self.regions.get(region.0).is_none() {
            return Err(Error::UnknownRegion { side: "local", region: region.0 });
        }
        if self.grants.uses(region) {
            return Err(Error::RegionInUse { by: "a grant" });
        }
        if self.exposed.iter().any(|(_, exposed)| *exposed == region.0) {
            return Err(Error::RegionInUse { by: "a revoked grant whose peer has a lane that is not down" });
        }
        if self.any_move(|underway| underway.uses_local(region)) {
            return Err(Error::RegionInUse { by: "an op" });
        }
        self.tell_all(Outgoing::Retire(region.0));
        self.regions.remove(region.0);
        Ok(())
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        if self.lanes.len() >= self.options.max_lanes {
            return Err(Error::Limit { what: "lanes", limit: self.options.max_lanes as u64 });
        }
        let cookie = secret()?;
        let id = self.next_lane;
        self.next_lane += 1;
        self.lanes.push(id, Lane { peer, cookie, stage: Stage::Open });
        Ok((LaneId(id), Address { socket: self.socket, cookie }.encode(M::KIND)))
    }

    fn connect(&mut self, id: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        let deadline = Instant::now() + self.options.connect_timeout;
        let lane = self.lane(id)?;
        let Stage::Open = lane.stage else {
            return Err(match lane.stage {
                Stage::Ended(_) => Error::LaneDown { lane: id },
                _ => Error::BadAddress { reason: "the lane has been told another one already" },
            });
        };
        let remote = Address::decode(M::KIND, remote)?;
        let pact = Pact { remote, tags: *tags, deadline };
        // The ends agree on who dials without a word.
        match lane.cookie.cmp(&remote.cookie) {
            std::cmp::Ordering::Less => {
                lane.stage = Stage::Dialing(pact);
                self.dial(id.0);
            }
            std::cmp::Ordering::Greater => {
                lane.stage = Stage::Expecting(pact);
                self.meet_guest(id.0);
            }
            std::cmp::Ordering::Equal => {
                return Err(Error::BadAddress { reason: "the lane's own address" });
            }
        }
        Ok(())
    }

    fn attach(&mut self, id: LaneId, key: &RemoteKey) -> Result<Attached> {
        let Lane { stage: Stage::Joined(_), .. } = self.lane(id)? else {
            return Err(self.not_joined(id));
        };
        let key = Key::decode(M::KIND, key)?;
        let Some(Lane { stage: Stage::Joined(joined), .. }) = self.lanes.get_mut(id.0) else {
            return Err(Error::LaneDown { lane: id });
        };
        joined.accepts(id)?;
        if !joined.remote.has_heard_of(&key) {
            joined.listen(&mut self.medium, &self.watch, &mut self.counters);
            joined.accepts(id)?;
        }
        let Joined { remote, peer, leash, .. } = &mut **joined;
        remote.attach(&key, peer, leash, &self.bell, &mut self.medium)
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        let regions = &self.regions;
        self.grants.insert(grant, |region| regions.get(region.0).map(|region| region.memory.bytes() as u64))
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        if let Some((peer, buffers)) = self.grants.covered_by(grant)
            && self.lanes.iter().any(|(_, lane)| lane.peer == peer)
        {
            let regions = buffers.iter().map(|buffer| buffer.region.0);
            let exposed = regions.filter(|region| self.regions.get(*region).is_some_and(M::is_exposed));
            self.exposed.extend(exposed.map(|region| (peer, region)));
        }
        // The peer writes by itself, and nothing here can stop it.
        if self.grants.remove(grant) { Fence::WhenDown } else { Fence::Now }
    }

    fn close(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(id.0) {
            lane.close(DownCause::ClosedHere, &self.watch);
        }
    }

    fn post(&mut self, id: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        let Lane { stage: Stage::Joined(_), .. } = self.lane(id)? else {
            return Err(self.not_joined(id));
        };
        let Some(Lane { stage: Stage::Joined(joined), .. }) = self.lanes.get_mut(id.0) else {
            return Err(Error::LaneDown { lane: id });
        };
        joined.accepts(id)?;
        let sent_before = self.counters.immediates_sent;
        let mut posting = Posting {
            lane: id,
            regions: &self.regions,
            medium: &mut self.medium,
            counters: &mut self.counters,
            moved_bytes: 0,
        };
        joined.short = None;
        let mut posted = Posted::default();
        let mut refused = Ok(());
        for op in ops {
            match joined.take(op, &mut posting) {
                Ok(Taken::Whole) => posted.ops += 1,
                Ok(Taken::Part(within)) => {
                    posted.within = within;
                    break;
                }
                Err(error) => {
                    refused = Err(error);
                    break;
                }
            }
        }
        self.medium.flush(&mut joined.lane);
        if self.counters.immediates_sent > sent_before {
            joined.wake_peer(&mut self.counters);
        }
        if posted.ops == 0 {
            refused?;
        }
        Ok(posted)
    }

    fn poll(&mut self, events: &mut Events) {
        if std::mem::take(&mut self.armed) {
            for (_, lane) in self.lanes.iter_mut() {
                if let Stage::Joined(joined) = &mut lane.stage {
                    joined.wake_up();
                }
            }
            self.look_around();
        } else if self.polls >= POLLS_BETWEEN_LOOKS {
            self.look_around();
        }
        self.polls += 1;
        self.medium.poll();
        let before = events.len();
        // Every poll begins with another lane, so that none waits for ever behind a busy one.
        let lanes = self.lanes.len();
        let mut ended = false;
        for step in 0..lanes {
            ended |= self.serve((self.first + step) % lanes, events);
        }
        self.first = if lanes == 0 { 0 } else { (self.first + 1) % lanes };
        if events.len() == before {
            self.polls += IDLE_POLL_COUNTS_AS;
        }
        if ended {
            self.bury(events, before);
        }
    }

    fn arm(&mut self) -> Arm<'_> {
        // Before a lane announces its sleep to a peer, which would ring for nothing.
        if self.any_move(|underway| !underway.is_empty()) && !self.medium.wakes() {
            return Arm::Spin;
        }
        let mut deadline = self.guests.deadline();
        let now = Instant::now();
        for (_, lane) in self.lanes.iter_mut() {
            let ready = match &mut lane.stage {
                Stage::Ended(_) => true,
                Stage::Joined(joined) => joined.has_news() || joined.advance_close().is_some(),
                _ => false,
            };
            if ready {
                // Other lanes have announced a sleep by now, and lost nothing but a wake.
                self.armed = true;
                return Arm::Ready;
            }
            deadline = deadline.into_iter().chain(lane.deadline(now)).min();
        }
        if self.watch.set_deadline(deadline).is_err() {
            // Without a timer a deadline would be missed.
            return Arm::Ready;
        }
        self.armed = true;
        Arm::Sleep(rustix::fd::AsFd::as_fd(&self.watch))
    }
}

impl<M: Medium> HostPort<M> {
    /// Why a lane that is not joined takes nothing.
    fn not_joined(&self, id: LaneId) -> Error {
        match self.lanes.get(id.0) {
            Some(Lane { stage: Stage::Ended(_), .. }) | None => Error::LaneDown { lane: id },
            Some(_) => Error::LaneNotUp { lane: id },
        }
    }

    /// Whether that is so of the moves of any lane.
    fn any_move(&self, what: impl Fn(&Underway) -> bool) -> bool {
        self.lanes
            .iter()
            .any(|(_, lane)| matches!(&lane.stage, Stage::Joined(joined) if what(&joined.underway)))
    }

    /// Lets moves come to their end before the port goes, and tells of them.
    fn stop_moves(&mut self) {
        if !self.any_move(|underway| !underway.is_empty()) {
            return;
        }
        self.medium.stop(Instant::now() + LONGEST_STOP);
        for (_, lane) in self.lanes.iter_mut() {
            if let Stage::Joined(joined) = &mut lane.stage
                && !joined.underway.is_empty()
            {
                joined.settle(&mut self.medium, &mut self.counters);
            }
        }
    }

    /// Moves that have come to no end may go on when this port is gone: what they use stays as it is. The peer is not
    /// told that this end has stopped, and waits for the end of this process.
    fn keep_what_moves_use(&mut self) {
        while let Some(id) = self
            .lanes
            .find(|lane| matches!(&lane.stage, Stage::Joined(joined) if !joined.underway.is_empty()))
        {
            let Some(lane) = self.lanes.remove(id) else { return };
            if let Stage::Joined(joined) = &lane.stage {
                for region in joined.underway.locals().filter_map(|region| self.regions.remove(region.0)) {
                    std::mem::forget(region);
                    REGIONS_LEFT_EXPOSED.fetch_add(1, Ordering::Relaxed);
                }
            }
            std::mem::forget(lane);
        }
    }

    /// Whether a peer may go on writing: it has not said that it has stopped, and is not proven dead. A lane that is not
    /// joined has shown no memory.
    fn peers_go_on(&self) -> bool {
        self.lanes
            .iter()
            .any(|(_, lane)| matches!(&lane.stage, Stage::Joined(joined) if !joined.peer_has_stopped()))
    }

    /// Peers may go on writing into exposed memory after this port is gone, and nobody is left who would hear of their end.
    /// So the handles of that memory are never dropped: it stays as it is, as the contract of [`Memory::from_raw`] demands.
    fn keep_exposed_memory(&mut self) {
        for (_, region) in self.regions.iter() {
            if M::is_exposed(region) {
                std::mem::forget(region.memory.clone());
                REGIONS_LEFT_EXPOSED.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Forgets the lanes whose `Down` is among the events from `before` on.
    fn bury(&mut self, events: &Events, before: usize) {
        for event in events.iter().skip(before) {
            if let Event::Down { lane, .. } = event
                && let Some(lane) = self.lanes.remove(lane.0)
            {
                self.guests.dismiss(&lane.cookie, &self.watch);
                if !self.lanes.iter().any(|(_, other)| other.peer == lane.peer) {
                    self.exposed.retain(|(peer, _)| *peer != lane.peer);
                }
            }
        }
    }
}

impl<M: Medium> Drop for HostPort<M> {
    fn drop(&mut self) {
        // A forked child has no part in what its parent moves, and shows nothing to anybody.
        if self.owner == std::process::id() {
            self.stop_moves();
            let peers_go_on = self.peers_go_on();
            self.keep_what_moves_use();
            if peers_go_on {
                self.keep_exposed_memory();
            }
        }
    }
}

impl<M: Medium> std::fmt::Debug for HostPort<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostPort")
            .field("kind", &M::KIND.name)
            .field("name", &self.info.name)
            .field("lanes", &self.lanes.len())
            .field("regions", &self.regions.len())
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

/// How many registrations of memory ports of this process have left behind for good, because they were dropped while a peer
/// could still write there, or a move of their own that has come to no end. Their [`Memory`] is never the caller's alone
/// again. It stays zero if every lane is closed, and its `Down` waited for, before a port is dropped.
pub fn regions_left_exposed() -> u64 {
    REGIONS_LEFT_EXPOSED.load(Ordering::Relaxed)
}

static REGIONS_LEFT_EXPOSED: AtomicU64 = AtomicU64::new(0);

/// Keeps deadlines within what a clock can tell.
const LONGEST_CONNECT: Duration = Duration::from_secs(24 * 3600);
/// How long a port that is dropped waits for moves that are on their way.
const LONGEST_STOP: Duration = Duration::from_secs(2);
/// A busy poll looks only at the rings, which costs nanoseconds; a look around costs a system call.
const POLLS_BETWEEN_LOOKS: u32 = 64;
/// Idle polls look around more often: there is time, and something may be waited for.
const IDLE_POLL_COUNTS_AS: u32 = 7;
