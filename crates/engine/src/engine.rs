//! The progress loop: carries out what the protocol decides, over a network and ports.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;

use crossdock_memory::Memory;
use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{
    Action, Counters, LinkCause, LinkId as ProtoLink, MAX_LANES, Notice, Proto, Region, RegionOffer, RoomId,
    SessionId,
};
use crossdock_transport::{
    Arm, Direction, Error, Event, Events, Fence, Grant, GrantId, GrantedBuffer, LaneId, LaneTags, LocalId,
    Op, PeerId, Port, Posted, RemoteId, Shape, Token,
};

use crate::imm::{Imm, Kind};
use crate::network::{AddressCheck, LinkEvent, LinkId, Network, Pulse, SendError};
use crate::transfer::{LaneUse, TransferId, Transfers};
use crate::{Doorbell, OsError, Sleeper, now_ns};

/// One node's engine: its protocol, its network, its ports. Owned by one thread.
///
/// [`turn`](Engine::turn) makes progress and never blocks; [`next_notice`](Engine::next_notice) says what the layer
/// above must know; [`park`](Engine::park) sleeps until there is something to do.
pub struct Engine {
    proto: Proto,
    network: Box<dyn Network>,
    rails: Vec<Rail>,
    sessions: BTreeMap<SessionId, SessionLanes>,
    transfers: Transfers,
    /// Always there between two calls.
    events: Option<Events>,
    /// Frames that a full control stream did not take, by link.
    backlog: BTreeMap<ProtoLink, Backlog>,
    notices: VecDeque<Notice>,
    /// Other uses of immediates than KV pages, for the layer above.
    side_arrivals: VecDeque<SideArrival>,
    regions: u32,
    is_shut: bool,
    options: EngineOptions,
}

/// The limits of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Events taken from one port in one turn.
    pub events_per_poll: usize,
    /// Bytes of control messages that may wait for one peer's stream. A peer that falls behind further is given up.
    pub max_backlog_bytes: usize,
    /// Where a session has several lanes, an op is cut so that each lane gets no more than this at once.
    pub stripe_bytes: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { events_per_poll: 256, max_backlog_bytes: 64 << 20, stripe_bytes: 1 << 20 }
    }
}

/// An immediate that is not counted for a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideArrival {
    /// From whose session.
    pub session: SessionId,
    /// On which lane.
    pub slot: u8,
    /// The lower 30 bits.
    pub bits: u32,
}

/// What a port can be asked for a transfer on one lane: which regions it knows by which numbers.
#[derive(Clone, Debug)]
pub struct LaneRegions {
    /// Which lane of the session.
    pub slot: u8,
    /// This node's regions on the lane's rail, by announced number.
    pub local: Arc<[LocalId]>,
    /// The peer's regions on the lane, by announced number. Unknown ones are never valid in an op.
    pub remote: Arc<[RemoteId]>,
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

struct SessionLanes {
    slots: Vec<Lane>,
    attach: Option<Attaching>,
    peer_node: u64,
}

struct Lane {
    rail: usize,
    id: Option<LaneId>,
    state: LaneState,
    /// By the peer's region numbers.
    remote: Arc<[RemoteId]>,
    /// Bytes given to this lane, divided by what it carries: the lane that is behind is next.
    load: f64,
    /// The port took less than offered in this turn.
    full: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LaneState {
    Opening,
    Up,
    Down,
}

struct Attaching {
    regions: Vec<RegionOffer>,
    peer_rails: Vec<u8>,
    found: Vec<BTreeMap<u32, RemoteId>>,
}

#[derive(Default)]
struct Backlog {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Close the link when the frames have left.
    then_close: bool,
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
            sessions: BTreeMap::new(),
            transfers: Transfers::new(),
            events: Some(Events::with_capacity(options.events_per_poll)),
            backlog: BTreeMap::new(),
            notices: VecDeque::with_capacity(1024),
            side_arrivals: VecDeque::with_capacity(1024),
            regions: 0,
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
        for (at, local) in taken {
            let rail = &mut self.rails[at];
            rail.regions = rail.regions.iter().copied().chain([local]).collect();
        }
        let region = self.regions;
        self.regions += 1;
        self.proto.announce(Region { region, bytes: memory.bytes() as u64, keys });
        Ok(region)
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

    /// An immediate that is not counted for a room, oldest first.
    pub fn next_side_arrival(&mut self) -> Option<SideArrival> {
        self.side_arrivals.pop_front()
    }

    /// Makes progress: takes what came, decides, acts. Never blocks, and its work is bounded. True if anything
    /// happened.
    pub fn turn(&mut self, now_ns: u64) -> bool {
        let links = self.take_links(now_ns);
        self.turn_ports(now_ns) | links
    }

    /// As [`turn`](Engine::turn), but takes nothing from the network, which costs a system call: for a loop that looks
    /// very often.
    pub fn turn_ports(&mut self, now_ns: u64) -> bool {
        let mut active = self.take_events(now_ns);
        self.attach_again(now_ns);
        if self.proto.next_deadline_ns().is_some_and(|at| at <= now_ns) {
            self.listen();
            self.proto.tick(now_ns);
            active = true;
        }
        active |= self.carry_out(now_ns);
        self.send_backlog();
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
        self.send_backlog();
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
        let attaching = self.sessions.values().any(|session| session.attach.is_some());
        if attaching || !self.backlog.is_empty() {
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

    // --- transfers -------------------------------------------------------------------------------------------

    /// The transfer of a room that was told to start.
    pub fn transfer(&self, room: RoomId) -> Option<TransferId> {
        self.transfers.find(room)
    }

    /// The next lane to offer ops of this transfer to: the one that is furthest behind its share of the load, of
    /// those that still take something in this turn.
    pub fn lane(&self, transfer: TransferId) -> Option<u8> {
        let transfer = self.transfers.get(transfer)?;
        if transfer.stopping {
            return None;
        }
        let session = self.sessions.get(&transfer.session)?;
        let (slot, _) = session
            .slots
            .iter()
            .enumerate()
            .filter(|(_, lane)| lane.state == LaneState::Up && !lane.full)
            .min_by(|(_, a), (_, b)| a.load.total_cmp(&b.load))?;
        Some(slot as u8)
    }

    /// What the regions of both sides are called on a lane of a transfer's session; the same as long as the transfer
    /// lasts.
    pub fn lane_regions(&self, transfer: TransferId, slot: u8) -> Option<LaneRegions> {
        let session = self.sessions.get(&self.transfers.get(transfer)?.session)?;
        let lane = session.slots.get(usize::from(slot))?;
        Some(LaneRegions { slot, local: self.rails[lane.rail].regions.clone(), remote: lane.remote.clone() })
    }

    /// Offers ops to a lane. The engine fills in the grant, the immediate and the token. Says how far it came;
    /// what was not taken is offered again, to the lane that [`lane`](Engine::lane) names then.
    pub fn post(
        &mut self,
        now_ns: u64,
        id: TransferId,
        slot: u8,
        ops: &mut [Op<'_>],
    ) -> Result<Posted, TransferFailed> {
        let Some(transfer) = self.transfers.get_mut(id) else { return Ok(Posted::default()) };
        let Some(session) = self.sessions.get_mut(&transfer.session) else { return Ok(Posted::default()) };
        let several = session.slots.len() > 1;
        let Some(lane) = session.slots.get_mut(usize::from(slot)) else { return Ok(Posted::default()) };
        let (Some(lane_id), LaneState::Up, false) = (lane.id, lane.state, transfer.stopping) else {
            return Ok(Posted::default());
        };
        let offered = if several { stripe(ops, self.options.stripe_bytes) } else { Stripe::all(ops) };
        let cut;
        let ops: &mut [Op<'_>] = match offered {
            Stripe { whole, part: None } => &mut ops[..whole],
            // The first op alone is more than a lane's share: its head goes as an op of its own.
            Stripe { part: Some(pieces), .. } => {
                cut = pieces;
                ops[0] = head(&ops[0], cut);
                &mut ops[..1]
            }
        };
        let Some(last) = ops.last_mut() else { return Ok(Posted::default()) };
        if transfer.direction == Direction::Write {
            last.imm = Some(Imm::kv(transfer.grant).bits());
        }
        last.token = Some(id.token());
        for op in ops.iter_mut() {
            op.grant = transfer.grant;
        }
        let rail = &mut self.rails[lane.rail];
        let posted = match rail.port.post(lane_id, ops) {
            Ok(posted) => posted,
            // The lane's `Down` is on its way; what it had taken is dealt with then.
            Err(Error::LaneDown { .. } | Error::LaneNotUp { .. }) => {
                lane.full = true;
                return Ok(Posted::default());
            }
            Err(error) => {
                let room = transfer.room;
                self.proto.room_failed(now_ns, room, error.clone());
                return Err(TransferFailed { room, error });
            }
        };
        let complete = posted.ops == ops.len();
        let used = &mut transfer.lanes[usize::from(slot)];
        let part = ops.get(posted.ops).map_or(0, |op| op.part_bytes(posted.within));
        let bytes = part + ops[..posted.ops].iter().filter_map(Op::bytes).sum::<u64>();
        match transfer.direction {
            Direction::Write => rail.stats.written_bytes += bytes,
            Direction::Read => rail.stats.read_bytes += bytes,
        }
        lane.load += (bytes as f64 + 64.0) / rail.bytes_per_second as f64;
        if complete {
            used.posted_whole(transfer.direction);
        } else {
            lane.full = true;
            used.uncovered |= posted.ops > 0 || posted.within > 0;
        }
        if let Stripe { part: Some(pieces), .. } = offered {
            // To the caller the op is not done: only its head was offered.
            let within = if complete { pieces } else { posted.within };
            return Ok(Posted { ops: 0, within });
        }
        Ok(posted)
    }

    /// Everything of a transfer has been posted. A write's room is finished towards the peer with `aux`; a read's
    /// bytes are here when [`Notice::Landed`] says so.
    pub fn posted_all(&mut self, now_ns: u64, id: TransferId, aux: Vec<u8>) {
        if let Some(transfer) = self.transfers.get_mut(id) {
            transfer.finishing = Some(aux);
            self.advance(now_ns, id);
        }
    }

    /// Moves a transfer on that is finishing or stopping: what was posted without a token or an immediate is
    /// covered by a notification, and when nothing is out any more, the protocol hears of it.
    fn advance(&mut self, now_ns: u64, id: TransferId) {
        let Some(transfer) = self.transfers.get_mut(id) else { return };
        if transfer.finishing.is_none() && !transfer.stopping {
            return;
        }
        if is_planted(Planted::ShortPostForgotten) {
            transfer.lanes.iter_mut().for_each(|used| used.uncovered = false);
        }
        let counted = transfer.direction == Direction::Write && !transfer.stopping;
        if let Some(session) = self.sessions.get_mut(&transfer.session) {
            for (used, lane) in transfer.lanes.iter_mut().zip(&mut session.slots) {
                let (true, Some(lane_id), LaneState::Up) = (used.uncovered, lane.id, lane.state) else {
                    continue;
                };
                let imm = match counted {
                    true => Imm::kv(transfer.grant),
                    false => Imm::new(Kind::Notice, 0),
                };
                let mut cover = Op::notify(imm.bits());
                cover.token = Some(id.token());
                if let Ok(Posted { ops: 1, .. }) = self.rails[lane.rail].port.post(lane_id, &[cover]) {
                    used.uncovered = false;
                    used.tokens += 1;
                    used.arrivals += u32::from(counted);
                }
            }
        }
        if transfer.lanes.iter().any(|used| used.uncovered) {
            return self.transfers.retry(id);
        }
        let idle = transfer.lanes.iter().all(|used| used.tokens == 0);
        let room = transfer.room;
        if transfer.stopping {
            if idle {
                let down_lanes = transfer.down_lanes;
                self.transfers.end(id);
                self.proto.drained(now_ns, room, down_lanes);
            }
            return;
        }
        match transfer.direction {
            Direction::Write => {
                if let Some(aux) = transfer.finishing.take() {
                    let arrivals: [u32; MAX_LANES] = transfer.lanes.map(|used| used.arrivals);
                    let lanes = self.sessions.get(&transfer.session).map_or(MAX_LANES, |s| s.slots.len());
                    self.proto.finish(now_ns, room, &arrivals[..lanes], aux);
                }
            }
            Direction::Read if idle => {
                self.transfers.end(id);
                self.proto.fetched(now_ns, room);
            }
            Direction::Read => {}
        }
    }

    // --- taking in -------------------------------------------------------------------------------------------

    fn take_links(&mut self, now_ns: u64) -> bool {
        let mut active = false;
        let (proto, backlog) = (&mut self.proto, &mut self.backlog);
        self.network.poll(&mut |event| {
            active = true;
            match event {
                LinkEvent::Accepted { link } => proto.link_accepted(now_ns, ProtoLink(link.0)),
                LinkEvent::Opened { link } => proto.link_opened(now_ns, ProtoLink(link.0)),
                LinkEvent::Frame { link, bytes } => proto.frame(now_ns, ProtoLink(link.0), bytes),
                LinkEvent::Closed { link, cause } => {
                    backlog.remove(&ProtoLink(link.0));
                    proto.link_closed(now_ns, ProtoLink(link.0), cause);
                }
            }
        });
        active
    }

    fn take_events(&mut self, now_ns: u64) -> bool {
        let mut active = false;
        for at in 0..self.rails.len() {
            let rail = &mut self.rails[at];
            let Some(events) = &mut self.events else { continue };
            rail.port.poll(events);
            if events.is_empty() {
                continue;
            }
            active = true;
            // Taken out for the time of the loop, since every event may change anything else.
            if let Some(mut events) = self.events.take() {
                for event in events.drain() {
                    self.take_event(now_ns, at, event);
                }
                self.events = Some(events);
            }
        }
        // A lane that was full may take more now; and a transfer that could not cover its ops tries again.
        for session in self.sessions.values_mut() {
            for lane in &mut session.slots {
                lane.full = false;
            }
        }
        while let Some(id) = self.transfers.next_retry() {
            self.advance(now_ns, id);
        }
        self.transfers.end_retries();
        active
    }

    fn take_event(&mut self, now_ns: u64, rail: usize, event: Event) {
        let (Event::Up { lane }
        | Event::Done { lane, .. }
        | Event::Arrived { lane, .. }
        | Event::Down { lane, .. }) = event;
        let Some(&(session, slot)) = self.rails[rail].lanes.get(&lane) else { return };
        match event {
            Event::Arrived { imm, .. } => {
                self.rails[rail].stats.arrivals += 1;
                let imm = Imm::from_bits(imm);
                match imm.kind() {
                    Kind::Kv => self.proto.arrived(now_ns, session, slot, imm.grant()),
                    Kind::Notice => {}
                    Kind::Experts => {
                        if self.side_arrivals.len() < self.side_arrivals.capacity() {
                            self.side_arrivals.push_back(SideArrival { session, slot, bits: imm.value() });
                        }
                    }
                }
            }
            Event::Done { token, .. } => {
                let id = TransferId::from_token(token);
                if let Some(transfer) = self.transfers.get_mut(id) {
                    let used = &mut transfer.lanes[usize::from(slot)];
                    used.tokens -= 1;
                    used.tokens -= used.tokens.min(is_planted(Planted::TokenCountedTwice).into());
                    self.advance(now_ns, id);
                }
            }
            Event::Up { .. } => {
                if let Some(lane) = self.slot(session, slot) {
                    lane.state = LaneState::Up;
                }
                self.proto.lane_up(now_ns, session, slot);
            }
            Event::Down { cause, .. } => {
                self.rails[rail].lanes.remove(&lane);
                if let Some(lane) = self.slot(session, slot) {
                    lane.state = LaneState::Down;
                    lane.id = None;
                }
                // What was out on that lane has ended with it.
                for id in self.transfers.of_session(session) {
                    if let Some(transfer) = self.transfers.get_mut(id) {
                        let used = &mut transfer.lanes[usize::from(slot)];
                        if used.tokens > 0 || used.uncovered {
                            transfer.down_lanes |= 1 << slot;
                        }
                        *used = LaneUse { arrivals: used.arrivals, ..LaneUse::default() };
                    }
                }
                self.proto.lane_down(now_ns, session, slot, cause);
                for id in self.transfers.of_session(session) {
                    self.advance(now_ns, id);
                }
            }
        }
    }

    fn slot(&mut self, session: SessionId, slot: u8) -> Option<&mut Lane> {
        self.sessions.get_mut(&session)?.slots.get_mut(usize::from(slot))
    }

    /// Tells the protocol how silent its peers have been.
    fn listen(&mut self) {
        let listened = self.network.listened_ns();
        for &session in self.sessions.keys() {
            if let Some(heard) = self.network.heard_ns(session.0) {
                self.proto.heard(session, heard, listened);
            }
        }
    }

    // --- acting ----------------------------------------------------------------------------------------------

    fn act(&mut self, now_ns: u64, action: Action) {
        match action {
            Action::Dial { target, address } => {
                let dialed = self.network.dial(&address);
                let link = dialed.map(|link| ProtoLink(link.0)).map_err(|error| error.cause());
                self.proto.dialed(now_ns, target, link);
            }
            Action::Send { link, frame } => self.send(now_ns, link, frame),
            Action::CloseLink { link } => match self.backlog.get_mut(&link) {
                Some(backlog) => backlog.then_close = true,
                None => self.network.close(LinkId(link.0)),
            },
            Action::Trust { link } => self.network.trust(LinkId(link.0)),
            Action::Watch { session, plan } => {
                let pulse = Pulse {
                    peer_address: plan.peer_address,
                    interval_ns: plan.interval_ns,
                    send_token: plan.send_token,
                    expect_token: plan.expect_token,
                };
                if let Err(error) = self.network.watch(session.0, pulse) {
                    self.proto.watch_failed(now_ns, session, error.cause());
                }
            }
            Action::Unwatch { session } => self.network.unwatch(session.0),
            Action::OpenLane { session, slot, rail } => {
                let opened = self.open_lane(session, slot, usize::from(rail));
                self.proto.lane_opened(now_ns, session, slot, opened);
            }
            Action::ConnectLane { session, slot, address, tags } => {
                self.connect_lane(now_ns, session, slot, &address, &tags);
            }
            Action::CloseLane { session, slot } => {
                if let Some((rail, Some(id))) = self.slot(session, slot).map(|lane| (lane.rail, lane.id)) {
                    self.rails[rail].port.close(id);
                }
            }
            Action::Attach { session, regions, peer_rails } => {
                if let Some(lanes) = self.sessions.get_mut(&session) {
                    let found = vec![BTreeMap::new(); lanes.slots.len()];
                    lanes.attach = Some(Attaching { regions, peer_rails, found });
                }
                self.attach_again(now_ns);
            }
            Action::Grant { session, grant, room } => self.grant(now_ns, session, grant, room),
            Action::Revoke { session, grant } => {
                let mut fence = Fence::Now;
                for at in self.rails_of(session) {
                    fence = fence.max(self.rails[at].port.revoke(grant));
                }
                if is_planted(Planted::FenceTakenForNow) {
                    fence = Fence::Now;
                }
                self.proto.revoked(now_ns, grant, fence);
            }
            Action::StopTransfer { room } => match self.transfers.find(room) {
                Some(id) => {
                    if let Some(transfer) = self.transfers.get_mut(id) {
                        transfer.stopping = true;
                        transfer.finishing = None;
                    }
                    self.advance(now_ns, id);
                }
                None => self.proto.drained(now_ns, room, 0),
            },
            Action::Forget { session } => {
                self.sessions.remove(&session);
            }
        }
    }

    fn send(&mut self, now_ns: u64, link: ProtoLink, frame: Vec<u8>) {
        if !self.backlog.contains_key(&link) {
            match self.network.send(LinkId(link.0), &frame) {
                Ok(()) | Err(SendError::Closed) => return,
                Err(SendError::Full) => {}
                Err(SendError::TooLong { limit, .. }) => {
                    self.network.close(LinkId(link.0));
                    let cause = LinkCause::Limit { what: "bytes a frame", limit: limit as u64 };
                    return self.proto.link_closed(now_ns, link, cause);
                }
            }
        }
        let backlog = self.backlog.entry(link).or_default();
        backlog.bytes += frame.len();
        backlog.frames.push_back(frame);
        if backlog.bytes > self.options.max_backlog_bytes {
            self.give_up(now_ns, link);
        }
    }

    /// Ends a link whose peer does not read what it must.
    fn give_up(&mut self, now_ns: u64, link: ProtoLink) {
        let bytes = self.backlog.remove(&link).map_or(0, |backlog| backlog.bytes);
        self.network.close(LinkId(link.0));
        self.proto.link_closed(now_ns, link, LinkCause::NotRead { bytes });
    }

    fn send_backlog(&mut self) {
        let network = &mut self.network;
        self.backlog.retain(|link, backlog| {
            while let Some(frame) = backlog.frames.front() {
                match network.send(LinkId(link.0), frame) {
                    Err(SendError::Full) => return true,
                    Ok(()) | Err(_) => {
                        backlog.bytes -= frame.len();
                        backlog.frames.pop_front();
                    }
                }
            }
            if backlog.then_close {
                network.close(LinkId(link.0));
            }
            false
        });
    }

    fn open_lane(
        &mut self,
        session: SessionId,
        slot: u8,
        rail: usize,
    ) -> Result<crossdock_transport::LaneAddress, Error> {
        let peer_node = self.proto.peer(session).map_or(0, |(identity, _)| identity.node);
        let lanes = self.sessions.entry(session).or_insert_with(|| SessionLanes {
            slots: Vec::new(),
            attach: None,
            peer_node,
        });
        while lanes.slots.len() <= usize::from(slot) {
            lanes.slots.push(Lane {
                rail,
                id: None,
                state: LaneState::Opening,
                remote: Arc::new([]),
                load: 0.0,
                full: false,
            });
        }
        let entry = &mut self.rails[rail];
        let (id, address) = entry.port.open_lane(PeerId(session.0))?;
        entry.lanes.insert(id, (session, slot));
        let lane = &mut lanes.slots[usize::from(slot)];
        lane.rail = rail;
        lane.id = Some(id);
        Ok(address)
    }

    fn connect_lane(
        &mut self,
        now_ns: u64,
        session: SessionId,
        slot: u8,
        address: &crossdock_transport::LaneAddress,
        tags: &LaneTags,
    ) {
        let Some((rail, Some(id))) = self.slot(session, slot).map(|lane| (lane.rail, lane.id)) else {
            return;
        };
        if let Err(error) = self.rails[rail].port.connect(id, address, tags) {
            // The lane still says `Down`, once it is closed.
            self.rails[rail].port.close(id);
            self.proto.attached(now_ns, session, Err(error));
        }
    }

    /// Attaches what the peer announced, as far as its ports' own announcements have come.
    fn attach_again(&mut self, now_ns: u64) {
        let waiting: Vec<SessionId> =
            self.sessions.iter().filter(|(_, s)| s.attach.is_some()).map(|(id, _)| *id).collect();
        for id in waiting {
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            let Some(mut attaching) = session.attach.take() else { continue };
            match attach(&mut self.rails, session, &mut attaching) {
                Ok(()) => self.proto.attached(now_ns, id, Ok(())),
                Err(Error::NotYet) => session.attach = Some(attaching),
                Err(error) => self.proto.attached(now_ns, id, Err(error)),
            }
        }
    }

    fn rails_of(&self, session: SessionId) -> Vec<usize> {
        let mut rails: Vec<usize> = self
            .sessions
            .get(&session)
            .map(|s| s.slots.iter().map(|lane| lane.rail).collect())
            .unwrap_or_default();
        rails.sort_unstable();
        rails.dedup();
        rails
    }

    fn grant(&mut self, now_ns: u64, session: SessionId, grant: GrantId, room: RoomId) {
        let mut refused = None;
        for at in self.rails_of(session) {
            let Some((access, pages, buffers)) = self.proto.granted(room) else { return };
            let rail = &mut self.rails[at];
            let buffers: Vec<GrantedBuffer> = buffers
                .iter()
                .map(|buffer| GrantedBuffer {
                    region: rail.regions.get(buffer.region as usize).copied().unwrap_or(LocalId(u32::MAX)),
                    layout: buffer.layout,
                })
                .collect();
            let asked = Grant { id: grant, peer: PeerId(session.0), access, buffers: &buffers, pages };
            refused = refused.or(rail.port.grant(&asked).err());
        }
        if let Some(error) = refused {
            self.proto.room_failed(now_ns, room, error);
        }
    }

    /// The node at the other end of a session.
    pub fn peer_node(&self, session: SessionId) -> Option<u64> {
        self.sessions.get(&session).map(|session| session.peer_node)
    }
}

/// A port refused an op of a room for good; the room has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a port refused an op: {error}")]
pub struct TransferFailed {
    /// Which room.
    pub room: RoomId,
    /// What the port said.
    pub error: Error,
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

fn attach(rails: &mut [Rail], session: &mut SessionLanes, attaching: &mut Attaching) -> Result<(), Error> {
    for (slot, lane) in session.slots.iter_mut().enumerate() {
        let (Some(id), LaneState::Up) = (lane.id, lane.state) else { continue };
        let peer_rail = attaching.peer_rails.get(slot).copied().unwrap_or(0);
        let port = &mut rails[lane.rail].port;
        for offer in &attaching.regions {
            let Some((_, key)) = offer.keys.iter().find(|(rail, _)| *rail == peer_rail) else { continue };
            if attaching.found[slot].contains_key(&offer.region) {
                continue;
            }
            match port.attach(id, key) {
                Ok(attached) => {
                    attaching.found[slot].insert(offer.region, attached.id);
                }
                // The lane ends; its `Down` says the rest. Until then nothing is posted on it, where the regions
                // are not known.
                Err(Error::LaneDown { .. } | Error::LaneNotUp { .. }) => {
                    lane.state = LaneState::Down;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    for (lane, found) in session.slots.iter_mut().zip(&attaching.found) {
        let regions = found.keys().next_back().map_or(0, |last| last + 1);
        lane.remote = (0..regions).map(|r| found.get(&r).copied().unwrap_or(RemoteId(u32::MAX))).collect();
    }
    Ok(())
}

/// How much of a batch one lane is offered at once.
#[derive(Clone, Copy)]
struct Stripe {
    /// So many whole ops.
    whole: usize,
    /// Or only this much of the first one.
    part: Option<u64>,
}

impl Stripe {
    fn all(ops: &[Op<'_>]) -> Self {
        Self { whole: ops.len(), part: None }
    }
}

fn stripe(ops: &[Op<'_>], most_bytes: u64) -> Stripe {
    let mut bytes = 0u64;
    let whole = ops
        .iter()
        .take_while(|op| {
            bytes = bytes.saturating_add(op.bytes().unwrap_or(u64::MAX));
            bytes <= most_bytes
        })
        .count();
    let Some(first) = ops.first().filter(|_| whole == 0) else { return Stripe { whole, part: None } };
    let (part, parts) = match first.shape {
        Shape::Span { bytes, .. } => (most_bytes.max(1), bytes),
        Shape::Pages { piece_bytes, local_pages, .. } => {
            ((most_bytes / piece_bytes.max(1)).max(1), local_pages.len() as u64)
        }
    };
    // A single piece is not cut, however long it is.
    match part < parts {
        true => Stripe { whole, part: Some(part) },
        false => Stripe { whole: 1, part: None },
    }
}

/// The first bytes of a span, or the first pieces of a paged op.
fn head<'a>(op: &Op<'a>, within: u64) -> Op<'a> {
    let mut head = *op;
    match &mut head.shape {
        Shape::Span { bytes, .. } => *bytes = within.min(*bytes),
        Shape::Pages { local_pages, remote_pages, .. } => {
            let pieces = (within as usize).min(local_pages.len());
            *local_pages = &local_pages[..pieces];
            *remote_pages = &remote_pages[..pieces];
        }
    }
    head
}

impl TransferId {
    fn token(self) -> Token {
        Token(self.bits())
    }

    fn from_token(token: Token) -> Self {
        Self::from_bits(token.0)
    }
}
