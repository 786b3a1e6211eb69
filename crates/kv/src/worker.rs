//! The progress of one node's KV rooms: commands in, notices in, ops out, ends out.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossdock_engine::{
    Doorbell, Engine, EventFd, LaneRegions, OsError, Promise, TransferFailed, TransferId, duration_ns, now_ns,
};
use crossdock_memory::{Memory, PageSet};
use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{
    Buffers, End, Fetch, Notice, PeerName, Receive, RoomBuffer, RoomError, RoomId, RoomRefusal, Send, Serve,
    SessionEnd, SessionId, Start, TargetId, Who,
};
use crossdock_transport::{Direction, GrantId, Op, Port};

use crate::handle::{Handle, Shared};
use crate::params::{Answer, Ask};
use crate::request::{
    Command, Ended, Peer, PeerKey, PeerUp, ReceiveRequest, Received, SendRequest, ServeRequest, Stats, name,
};
use crate::{CacheLayout, Checksums, Cursor, PageTable, Plan, PlanInput, Route, Verify};

/// Moves the KV pages of one node. Owned by one thread, which calls [`turn`](Worker::turn) and, when there is nothing
/// to do, [`park`](Worker::park); or gives itself to [`run`](Worker::run).
pub struct Worker {
    engine: Engine,
    shared: Arc<Shared>,
    layout: CacheLayout,
    /// The regions that the layout names, in the order of their announcement.
    memory: Vec<Memory>,
    buffers: Buffers,
    verify: Verify,
    /// The caches of the peers with a live session; `None` for a peer that has none.
    caches: BTreeMap<SessionId, Option<Arc<CacheLayout>>>,
    targets: BTreeMap<u64, TargetId>,
    /// What is dialed, for logs.
    addresses: BTreeMap<TargetId, String>,
    dialing: BTreeMap<TargetId, Promise<Result<PeerUp, SessionEnd>>>,
    rooms: BTreeMap<RoomId, Room>,
    keys: BTreeMap<u64, RoomId>,
    /// Rooms that may have something to post, each once.
    ready: VecDeque<RoomId>,
    /// When everything was looked at last, the network too.
    turned_ns: u64,
    stopped: bool,
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

struct Room {
    key: u64,
    /// One a room: everything that is logged of it carries its number.
    span: tracing::Span,
    /// Stands in the queue of ready rooms.
    is_ready: bool,
    kind: Kind,
}

impl Room {
    /// Lets what is logged of the room name the peer and the transport, now that they are known.
    fn records_peer(&self, engine: &mut Engine, session: SessionId) {
        if self.span.is_disabled() {
            return;
        }
        let proto = engine.proto();
        if let (Some((_, peer)), Some(port)) = (proto.peer(session), proto.port(session)) {
            self.span.record("peer", &*peer).record("port", port);
        }
    }

    /// Whether the user has been told how it ended.
    fn is_told(&self) -> bool {
        match &self.kind {
            Kind::Decode(Decode { end, .. }) => end.is_none(),
            Kind::Sending(SendingRoom { end, .. }) | Kind::Serving { end, .. } => end.is_none(),
        }
    }
}

enum Kind {
    Decode(Decode),
    Sending(SendingRoom),
    Serving { tokens: u32, pages: Arc<[u32]>, aux: Vec<u8>, end: Option<Promise<Ended>> },
}

struct Decode {
    ask: Ask,
    pages: Arc<[u32]>,
    aux: Vec<u8>,
    end: Option<Promise<Received>>,
    home: Option<Promise<PageSet>>,
    arrivals: Arc<AtomicU64>,
    /// A pull's reads.
    reads: Option<Run>,
}

struct SendingRoom {
    tokens: u32,
    pages: Arc<[u32]>,
    /// Everything that was sent so far, in order: it is sent again when a lane is lost. What has been posted is joined
    /// where it can be, so that a room in many chunks stays short.
    items: Vec<Item>,
    finish: Option<Vec<u8>>,
    end: Option<Promise<Ended>>,
    run: Option<Run>,
}

struct Item {
    layers: Range<u32>,
    tokens: Range<u32>,
}

impl SendingRoom {
    /// Adds what is to be sent next; false if the room is in too many pieces.
    fn add(&mut self, item: Item) -> bool {
        while self.last_two_may_join()
            && let [.., before, last] = &mut self.items[..]
            && before.join(last)
        {
            self.items.pop();
            if let Some(run) = &mut self.run {
                run.at = run.at.min(self.items.len());
            }
        }
        let fits = self.items.len() < MAX_ITEMS;
        if fits {
            self.items.push(item);
        }
        fits
    }

    /// Both have been posted, or neither has been begun: of an item in between it is noted how far it is.
    fn last_two_may_join(&self) -> bool {
        let Some(run) = &self.run else { return true };
        let begun = run.at + usize::from(run.cursor.is_some());
        run.at == self.items.len() || begun + 2 <= self.items.len()
    }
}

impl Item {
    /// Takes the item that was sent right after this one in, if both together are one.
    fn join(&mut self, next: &Item) -> bool {
        if self.layers == next.layers && self.tokens.end == next.tokens.start {
            self.tokens.end = next.tokens.end;
        } else if self.tokens == next.tokens && self.layers.end == next.layers.start {
            self.layers.end = next.layers.end;
        } else {
            return false;
        }
        true
    }
}

/// One attempt at moving a room's bytes.
struct Run {
    transfer: TransferId,
    direction: Direction,
    grant: GrantId,
    ask: Ask,
    cache: Arc<CacheLayout>,
    remote_pages: Arc<[u32]>,
    /// Built for the whole room when the run begins, while nobody waits, and then used for whatever is posted.
    plan: Plan,
    /// Which item is next, and how far it has been posted.
    at: usize,
    cursor: Option<Cursor>,
    /// The lane that was offered ops last.
    lane: Option<LaneRegions>,
    posted_bytes: u64,
    posted_all: bool,
}

/// What came of one room's turn at the ports.
enum Pumped {
    /// The ports take no more in this turn.
    Full { progress: bool },
    /// There is more, and the room's share of this turn is used up.
    More,
    /// Nothing to post until something changes.
    Nothing,
    /// The two sides' layouts, pages or tokens do not fit together.
    Mismatch,
}

/// Ops offered to a port at once.
const BATCH: usize = 16;
/// Bytes that one room posts before the next has its turn.
const SHARE_BYTES: u64 = 8 << 20;
/// Commands taken in one turn.
const COMMANDS: usize = 256;
/// Layers and chunks that one room may have sent.
const MAX_ITEMS: usize = 65_536;
/// Room for the chunks that are sent while earlier ones are still being posted.
const USUAL_ITEMS: usize = 64;

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
        let buffers = layout
            .layers()
            .filter_map(|layer| {
                Some(RoomBuffer { region: layout.buffer(layer)?.region, layout: layout.page_layout(layer)? })
            })
            .collect();
        let shared = Arc::new(Shared::new(
            options.max_commands.max(1),
            Doorbell::new()?,
            EventFd::new()?,
            layout.layers(),
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
            caches: BTreeMap::new(),
            targets: BTreeMap::new(),
            addresses: BTreeMap::new(),
            dialing: BTreeMap::new(),
            rooms: BTreeMap::new(),
            keys: BTreeMap::new(),
            ready: VecDeque::with_capacity(64),
            turned_ns: 0,
            stopped: false,
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
        self.progress(now_ns, Engine::turn)
    }

    /// A [`turn`](Worker::turn), but one that follows another within microseconds leaves the network out: what a loop
    /// that spins on a page does most of the time should not be system calls. Before a sleep nothing is left out, since
    /// [`park`](Worker::park) watches everything.
    pub fn turn_or_glance(&mut self, now_ns: u64) -> Turn {
        match now_ns.saturating_sub(self.turned_ns) < GLANCES_NS {
            true => self.progress(now_ns, Engine::turn_ports),
            false => self.turn(now_ns),
        }
    }

    fn progress(&mut self, now_ns: u64, turn: fn(&mut Engine, u64) -> bool) -> Turn {
        // What was asked for leaves before anything else is looked at.
        let mut active = self.take_commands(now_ns);
        if active {
            self.pump(now_ns);
        }
        active |= turn(&mut self.engine, now_ns);
        active |= self.take_notices(now_ns);
        active |= self.pump(now_ns);
        if self.engine.carry_out(now_ns) {
            active = true;
            self.take_notices(now_ns);
        }
        self.show_arrivals();
        match (self.stopped, active) {
            (true, _) => Turn::Stopped,
            (false, true) => Turn::Active,
            (false, false) => Turn::Idle,
        }
    }

    /// Sleeps until there is something to do, for no longer than `longest_ns`.
    pub fn park(&mut self, longest_ns: u64) -> Result<(), OsError> {
        let shared = self.shared.clone();
        // A port that is full says when it takes more, but not every medium can tell.
        let longest_ns = if self.ready.is_empty() { longest_ns } else { longest_ns.min(FULL_SLEEP_NS) };
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

    /// The engine, for what this layer does not do.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    // --- commands --------------------------------------------------------------------------------------------

    fn take_commands(&mut self, now: u64) -> bool {
        for taken in 0..COMMANDS {
            let Some(command) = self.shared.next() else { return taken > 0 };
            self.command(now, command);
        }
        true
    }

    fn command(&mut self, now: u64, command: Command) {
        match command {
            Command::Connect { key, address, up } => {
                let target = self.engine.proto().connect(now, address.as_str());
                self.targets.insert(key, target);
                self.addresses.insert(target, address);
                self.dialing.insert(target, up);
            }
            Command::Disconnect { key } => {
                if let Some(target) = self.targets.remove(&key) {
                    self.dialing.remove(&target);
                    self.addresses.remove(&target);
                    self.engine.proto().disconnect(now, target);
                }
            }
            Command::Receive { key, request, asked_ns, pull, told } => {
                let (end, home) = (Some(told.end), Some(told.pages));
                let role = if pull { "fetch" } else { "receive" };
                let span = span(role, request.room, request.use_count, request.tokens);
                let ask = Ask {
                    tokens: request.tokens,
                    skip_tokens: request.skip_tokens,
                    checksums: self.verify.covers(request.room),
                };
                let pages: Arc<[u32]> = request.pages.ids().into();
                let mut decode =
                    Decode { ask, pages, aux: Vec::new(), end, home, arrivals: told.arrivals, reads: None };
                match self.open_decode(now, asked_ns.unwrap_or(now), request, ask, pull) {
                    Ok(room) => {
                        self.keys.insert(key, room);
                        self.rooms
                            .insert(room, Room { key, span, is_ready: false, kind: Kind::Decode(decode) });
                    }
                    Err((end, pages)) => {
                        if let Some(home) = decode.home.take() {
                            self.tell(home, pages);
                        }
                        if let Some(promise) = decode.end.take() {
                            self.tell(promise, Received { ended: Ended::alone(end), aux: Vec::new() });
                        }
                    }
                }
            }
            Command::Open { key, request, asked_ns, end } => {
                self.open_sending(now, asked_ns.unwrap_or(now), key, request, end);
            }
            Command::Send { key, layers, tokens } => {
                let Some((id, room)) = self.room_of(key) else { return };
                if let Kind::Sending(sending) = &mut room.kind {
                    if !sending.add(Item { layers, tokens }) {
                        return self.engine.proto().mismatch(now, id);
                    }
                    self.wake(id);
                }
            }
            Command::Finish { key, aux } => {
                let Some((id, room)) = self.room_of(key) else { return };
                if let Kind::Sending(sending) = &mut room.kind {
                    sending.finish = Some(aux);
                    self.wake(id);
                }
            }
            Command::Serve { key, request, asked_ns, end } => {
                self.open_serving(now, asked_ns.unwrap_or(now), key, request, end);
            }
            Command::Cancel { key } => {
                if let Some((id, _)) = self.room_of(key) {
                    self.engine.proto().cancel(now, id);
                }
            }
            Command::Stats { told } => {
                let stats = self.stats();
                self.tell(told, stats);
            }
            Command::Stop => self.stopped = true,
        }
    }

    fn open_decode(
        &mut self,
        now: u64,
        asked_ns: u64,
        request: ReceiveRequest,
        ask: Ask,
        pull: bool,
    ) -> Result<RoomId, (End, PageSet)> {
        let Some(peer) = self.peer_name(request.peer) else {
            return Err((End::PeerLost { cause: SessionEnd::ClosedHere }, request.pages));
        };
        let first = request.skip_tokens / self.layout.page_tokens();
        let table = PageTable { layout: &self.layout, first_page: first, pages: request.pages.ids() };
        if request.skip_tokens > request.tokens
            || table.covering(&(request.skip_tokens..request.tokens)).is_err()
        {
            return Err((End::Refused { by: Who::Here, why: RoomRefusal::Mismatch }, request.pages));
        }
        let room = name(request.room, request.use_count);
        let deadline_ns = asked_ns.saturating_add(duration_ns(request.deadline));
        let (pages, params) = (request.pages, ask.encode());
        let opened = match pull {
            false => {
                let buffers = self.buffers.clone();
                let receive = Receive { peer, room, pages, buffers, params, deadline_ns };
                self.engine.proto().receive(now, receive)
            }
            true => self.engine.proto().fetch(now, Fetch { peer, room, pages, params, deadline_ns }),
        };
        opened.map_err(|unopened| (refused(unopened.error), unopened.pages))
    }

    fn open_sending(&mut self, now: u64, asked_ns: u64, key: u64, request: SendRequest, end: Promise<Ended>) {
        let span = span("send", request.room, request.use_count, request.tokens);
        let pages: Arc<[u32]> = request.pages.ids().into();
        let fits = PageTable::new(&self.layout, &pages).covering(&(0..request.tokens)).is_ok();
        let opened = match fits {
            true => {
                let deadline_ns = asked_ns.saturating_add(duration_ns(request.deadline));
                let room = name(request.room, request.use_count);
                let send = Send { room, pages: request.pages, deadline_ns };
                self.engine.proto().send_room(now, send).map_err(refused)
            }
            false => Err(End::Refused { by: Who::Here, why: RoomRefusal::Mismatch }),
        };
        match opened {
            Ok(room) => {
                self.keys.insert(key, room);
                let sending = SendingRoom {
                    tokens: request.tokens,
                    pages,
                    items: Vec::with_capacity(USUAL_ITEMS),
                    finish: None,
                    end: Some(end),
                    run: None,
                };
                self.rooms.insert(room, Room { key, span, is_ready: false, kind: Kind::Sending(sending) });
            }
            Err(why) => self.tell(end, Ended::alone(why)),
        }
    }

    fn open_serving(
        &mut self,
        now: u64,
        asked_ns: u64,
        key: u64,
        request: ServeRequest,
        end: Promise<Ended>,
    ) {
        let span = span("serve", request.room, request.use_count, request.tokens);
        let pages: Arc<[u32]> = request.pages.ids().into();
        let fits = PageTable::new(&self.layout, &pages).covering(&(0..request.tokens)).is_ok();
        let opened = match fits {
            true => {
                let deadline_ns = asked_ns.saturating_add(duration_ns(request.deadline));
                let room = name(request.room, request.use_count);
                let serve = Serve { room, pages: request.pages, buffers: self.buffers.clone(), deadline_ns };
                self.engine.proto().serve(now, serve).map_err(refused)
            }
            false => Err(End::Refused { by: Who::Here, why: RoomRefusal::Mismatch }),
        };
        match opened {
            Ok(room) => {
                self.keys.insert(key, room);
                let kind = Kind::Serving { tokens: request.tokens, pages, aux: request.aux, end: Some(end) };
                self.rooms.insert(room, Room { key, span, is_ready: false, kind });
            }
            Err(why) => self.tell(end, Ended::alone(why)),
        }
    }

    fn peer_name(&self, peer: Peer) -> Option<PeerName> {
        match peer.0 {
            PeerKey::Dialed(key) => self.targets.get(&key).copied().map(PeerName::Target),
            PeerKey::Node(node) => Some(PeerName::Node(node)),
        }
    }

    fn room_of(&mut self, key: u64) -> Option<(RoomId, &mut Room)> {
        let id = *self.keys.get(&key)?;
        Some((id, self.rooms.get_mut(&id)?))
    }

    // --- notices ---------------------------------------------------------------------------------------------

    fn take_notices(&mut self, now: u64) -> bool {
        let mut active = false;
        loop {
            let Some(notice) = self.engine.next_notice() else {
                // What a notice led to may have decided more.
                if active && self.engine.carry_out(now) {
                    continue;
                }
                return active;
            };
            active = true;
            self.notice(now, notice);
        }
    }

    fn notice(&mut self, now: u64, notice: Notice) {
        match notice {
            Notice::SessionUp { session, target, peer, name, port, app } => {
                tracing::info!(peer = &*name, node = peer.node, port, "session up");
                self.caches.insert(session, CacheLayout::decode(&app).ok().map(Arc::new));
                if let Some(up) = target.and_then(|target| self.dialing.remove(&target)) {
                    self.tell(up, Ok(PeerUp { identity: peer, name }));
                }
            }
            Notice::SessionDown { session, target, peer, port, cause } => {
                let address = target.and_then(|target| self.addresses.get(&target));
                let (peer, address) = (peer.as_deref(), address.map(String::as_str));
                tracing::info!(peer, port, address, advice = cause.advice(), "session down: {cause}");
                if let Some(session) = session {
                    self.caches.remove(&session);
                }
                // A peer that may still come is waited for; one that refuses never will.
                if !cause.is_retryable()
                    && let Some(up) = target.and_then(|target| self.dialing.remove(&target))
                {
                    self.tell(up, Err(cause));
                }
            }
            Notice::Start(start) => self.start(now, start),
            Notice::Stop { room } => {
                match self.rooms.get_mut(&room).map(|room| &mut room.kind) {
                    Some(Kind::Sending(sending)) => sending.run = None,
                    Some(Kind::Decode(decode)) => decode.reads = None,
                    Some(Kind::Serving { .. }) | None => {}
                };
            }
            Notice::Wanted { room, session, params } => self.wanted(now, room, session, &params),
            Notice::Landed { room, session, aux } => self.landed(now, room, session, &aux),
            Notice::Ended { room, end, peer, port } => self.ended(room, Ended { end, peer, port }),
            Notice::Unread { pages } => drop(pages),
            Notice::Home { room, pages } => {
                let Some(Room { kind: Kind::Decode(decode), .. }) = self.rooms.get_mut(&room) else { return };
                if let Some(home) = decode.home.take() {
                    self.tell(home, pages.into_pages());
                }
                self.forget(room);
            }
        }
    }

    fn start(&mut self, now: u64, start: Start) {
        let id = start.room;
        // Stopped again before it was told here.
        let Some(transfer) = self.engine.transfer(id) else { return };
        let cache = self.caches.get(&start.session).cloned().flatten();
        let Some(room) = self.rooms.get_mut(&id) else { return };
        let (ask, pages): (_, &[u32]) = match &room.kind {
            Kind::Sending(sending) => {
                let ask = Ask::decode(&start.params).filter(|ask| ask.tokens == sending.tokens);
                (ask, &sending.pages)
            }
            Kind::Decode(decode) => {
                let answer = Answer::decode(&start.params);
                let ask = answer.filter(|answer| answer.tokens == decode.ask.tokens).map(|_| decode.ask);
                (ask, &decode.pages)
            }
            Kind::Serving { .. } => (None, &[]),
        };
        room.records_peer(&mut self.engine, start.session);
        let (Some(ask), Some(cache)) = (ask, cache) else { return self.engine.proto().mismatch(now, id) };
        let local = local_table(&self.layout, pages, start.direction, &ask);
        let tokens = ask.skip_tokens..ask.tokens;
        let input = plan_input(local, &cache, &start.remote_pages, start.direction, &ask, tokens);
        let Ok(plan) = Plan::build(&input) else { return self.engine.proto().mismatch(now, id) };
        room.span
            .in_scope(|| tracing::debug!(attempt = start.attempt, pages = start.remote_pages.len(), "start"));
        let run = Run {
            transfer,
            direction: start.direction,
            grant: start.grant,
            ask,
            cache,
            remote_pages: start.remote_pages,
            plan,
            at: usize::from(start.attempt > 0 && is_planted(Planted::NotSentAgain)),
            cursor: None,
            lane: None,
            posted_bytes: 0,
            posted_all: false,
        };
        match &mut room.kind {
            Kind::Sending(sending) => sending.run = Some(run),
            Kind::Decode(decode) => decode.reads = Some(run),
            Kind::Serving { .. } => {}
        }
        self.wake(id);
    }

    /// A reader asks for a room that is served here.
    fn wanted(&mut self, now: u64, id: RoomId, session: SessionId, params: &[u8]) {
        let Some(room) = self.rooms.get(&id) else { return };
        let Kind::Serving { tokens, pages, aux, .. } = &room.kind else { return };
        room.records_peer(&mut self.engine, session);
        let ask = Ask::decode(params).filter(|ask| ask.tokens == *tokens);
        let (Some(ask), Some(Some(cache))) = (ask, self.caches.get(&session)) else {
            return self.engine.proto().mismatch(now, id);
        };
        let table = PageTable::new(&self.layout, pages);
        // Of what the reader will read: the layers that both hold, and the tokens that it lacks.
        let layers = overlap(&self.layout.layers(), &cache.layers());
        let sums = match ask.checksums {
            true => Checksums::compute(&self.memory, &table, layers, ask.skip_tokens..ask.tokens),
            false => return self.offer(now, id, *tokens, aux.clone(), Vec::new()),
        };
        match sums {
            Ok(sums) => {
                let mut checksums = Vec::new();
                sums.encode(&mut checksums);
                self.offer(now, id, ask.tokens, aux.clone(), checksums);
            }
            Err(_) => self.engine.proto().mismatch(now, id),
        }
    }

    fn offer(&mut self, now: u64, id: RoomId, tokens: u32, aux: Vec<u8>, checksums: Vec<u8>) {
        let params = Answer { tokens, aux, checksums }.encode();
        self.engine.proto().offer(now, id, params);
    }

    /// All bytes of a decode room are here.
    fn landed(&mut self, now: u64, id: RoomId, session: SessionId, aux: &[u8]) {
        // The last batch may have come in this very turn, at the end of which the room may be gone.
        self.show_arrivals();
        let Some(room) = self.rooms.get_mut(&id) else { return };
        room.records_peer(&mut self.engine, session);
        let Kind::Decode(decode) = &mut room.kind else { return };
        let Some(answer) = Answer::decode(aux).filter(|answer| answer.tokens == decode.ask.tokens) else {
            return self.engine.proto().mismatch(now, id);
        };
        if decode.ask.checksums {
            let Some(Some(cache)) = self.caches.get(&session) else {
                return self.engine.proto().mismatch(now, id);
            };
            let table = local_table(&self.layout, &decode.pages, Direction::Read, &decode.ask);
            let right = is_proven(&self.memory, &table, cache, &decode.ask, &answer.checksums);
            if !right && !is_planted(Planted::ChecksumUnchecked) {
                return self.engine.proto().reject(now, id);
            }
        }
        decode.aux = answer.aux;
        self.engine.proto().accept(now, id);
    }

    fn ended(&mut self, id: RoomId, ended: Ended) {
        let Some(room) = self.rooms.get_mut(&id).filter(|room| !room.is_told()) else { return };
        if let (Some(peer), Some(port)) = (&ended.peer, ended.port) {
            room.span.record("peer", &**peer).record("port", port);
        }
        room.span.in_scope(|| match &ended.end {
            End::Delivered => tracing::debug!("{ended}"),
            end => tracing::warn!(retryable = end.is_retryable(), advice = end.advice(), "{ended}"),
        });
        self.keys.remove(&room.key);
        match &mut room.kind {
            Kind::Decode(decode) => {
                let aux = std::mem::take(&mut decode.aux);
                if let Some(promise) = decode.end.take() {
                    self.tell(promise, Received { ended, aux });
                }
            }
            Kind::Sending(SendingRoom { end: promise, .. }) | Kind::Serving { end: promise, .. } => {
                if let Some(promise) = promise.take() {
                    self.tell(promise, ended);
                }
                self.rooms.remove(&id);
            }
        }
    }

    fn forget(&mut self, id: RoomId) {
        if let Some(Room { kind: Kind::Decode(Decode { end: None, home: None, .. }), .. }) =
            self.rooms.get(&id)
        {
            self.rooms.remove(&id);
        }
    }

    fn tell<T>(&self, promise: Promise<T>, what: T) {
        // Where the ticket was dropped nobody looks; pages that come back so return to their pool by being
        // dropped.
        drop(promise.tell(what));
        self.shared.told.raise();
    }

    fn show_arrivals(&mut self) {
        while let Some((id, arrivals)) = self.engine.proto().next_arrivals() {
            if let Some(Room { kind: Kind::Decode(decode), .. }) = self.rooms.get(&id) {
                decode.arrivals.store(arrivals, Ordering::Release);
            }
        }
    }

    // --- posting ---------------------------------------------------------------------------------------------

    fn wake(&mut self, id: RoomId) {
        if let Some(room) = self.rooms.get_mut(&id)
            && !std::mem::replace(&mut room.is_ready, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Gives each room that has something to post its share of the ports.
    fn pump(&mut self, now: u64) -> bool {
        let mut active = false;
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            let pumped = self.pump_room(now, id);
            if let Some(room) = self.rooms.get_mut(&id) {
                room.is_ready = matches!(pumped, Pumped::Full { .. } | Pumped::More);
            }
            match pumped {
                // Nothing was taken: the port wakes the loop when it takes more.
                Pumped::Full { progress: false } => self.ready.push_back(id),
                Pumped::Full { progress: true } | Pumped::More => {
                    self.ready.push_back(id);
                    active = true;
                }
                Pumped::Nothing => active = true,
                Pumped::Mismatch => {
                    active = true;
                    self.engine.proto().mismatch(now, id);
                }
            }
        }
        active
    }

    fn pump_room(&mut self, now: u64, id: RoomId) -> Pumped {
        let Some(room) = self.rooms.get_mut(&id) else { return Pumped::Nothing };
        let whole;
        let (run, pages, items): (&mut Run, &[u32], &[Item]) = match &mut room.kind {
            Kind::Sending(SendingRoom { run: Some(run), pages, items, .. }) => (run, pages, items),
            Kind::Decode(Decode { reads: Some(run), pages, ask, .. }) => {
                let layers = overlap(&self.layout.layers(), &run.cache.layers());
                whole = [Item { layers, tokens: 0..ask.tokens }];
                (run, pages, &whole)
            }
            _ => return Pumped::Nothing,
        };
        let local = local_table(&self.layout, pages, run.direction, &run.ask);
        let mut left = SHARE_BYTES;
        while let Some(item) = items.get(run.at) {
            match post_item(&mut self.engine, now, run, &local, item, &mut left) {
                Pumped::Nothing => {
                    run.at += 1;
                    run.cursor = None;
                }
                other => return other,
            }
        }
        if run.posted_all {
            return Pumped::Nothing;
        }
        let (transfer, ask) = (run.transfer, run.ask);
        match &mut room.kind {
            Kind::Decode(Decode { reads: Some(run), .. }) => {
                run.posted_all = true;
                self.engine.posted_all(now, transfer, Vec::new());
            }
            Kind::Sending(SendingRoom { run: Some(run), finish: Some(aux), tokens, pages, .. }) => {
                run.posted_all = true;
                let mut checksums = Vec::new();
                if ask.checksums {
                    let table = PageTable::new(&self.layout, pages);
                    let layers = overlap(&self.layout.layers(), &run.cache.layers());
                    let tokens = ask.skip_tokens..ask.tokens;
                    match Checksums::compute(&self.memory, &table, layers, tokens) {
                        Ok(sums) => sums.encode(&mut checksums),
                        Err(_) => return Pumped::Mismatch,
                    }
                }
                // Kept, because another attempt may have to say it again.
                let answer = Answer { tokens: *tokens, aux: aux.clone(), checksums }.encode();
                self.engine.posted_all(now, transfer, answer);
            }
            _ => {}
        }
        Pumped::Nothing
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
    }
}

/// Looks at the ports when a node ends.
const LAST_TURNS: usize = 16;

/// Longest sleep of a progress thread with nothing to do: everything that matters wakes it.
const LONGEST_SLEEP_NS: u64 = 1_000_000_000;

/// How long after a look at the network a loop that spins looks at ports and commands alone.
const GLANCES_NS: u64 = 5_000;

/// Longest sleep while a port is full.
const FULL_SLEEP_NS: u64 = 200_000;

/// Posts what is left of one item. [`Pumped::Nothing`]: all of it has been.
fn post_item(
    engine: &mut Engine,
    now: u64,
    run: &mut Run,
    local: &PageTable<'_>,
    item: &Item,
    left: &mut u64,
) -> Pumped {
    let tokens = item.tokens.start.max(run.ask.skip_tokens)..item.tokens.end.max(run.ask.skip_tokens);
    if tokens.is_empty() {
        return Pumped::Nothing;
    }
    if run.plan.tokens() != tokens {
        let input = plan_input(*local, &run.cache, &run.remote_pages, run.direction, &run.ask, tokens);
        if run.plan.renew(&input).is_err() {
            return Pumped::Mismatch;
        }
    }
    let layers = overlap(&item.layers, &run.plan.layers());
    post_layers(engine, now, run, layers, left)
}

/// This side's pages of a run: a decode side lists them from the first one that it lacks, a prefill side all of them.
fn local_table<'a>(
    layout: &'a CacheLayout,
    pages: &'a [u32],
    direction: Direction,
    ask: &Ask,
) -> PageTable<'a> {
    let first_page = match direction {
        Direction::Write => 0,
        Direction::Read => ask.skip_tokens / layout.page_tokens(),
    };
    PageTable { layout, first_page, pages }
}

fn plan_input<'a>(
    local: PageTable<'a>,
    cache: &'a CacheLayout,
    remote_pages: &'a [u32],
    direction: Direction,
    ask: &Ask,
    tokens: Range<u32>,
) -> PlanInput<'a> {
    let first_page = match direction {
        Direction::Write => ask.skip_tokens / cache.page_tokens(),
        Direction::Read => 0,
    };
    let remote = PageTable { layout: cache, first_page, pages: remote_pages };
    match direction {
        Direction::Write => PlanInput { source: local, destination: remote, tokens },
        Direction::Read => PlanInput { source: remote, destination: local, tokens },
    }
}

fn post_layers(engine: &mut Engine, now: u64, run: &mut Run, layers: Range<u32>, left: &mut u64) -> Pumped {
    let posted_before = run.posted_bytes;
    loop {
        let full = Pumped::Full { progress: run.posted_bytes > posted_before };
        let Some(slot) = engine.lane(run.transfer) else { return full };
        if run.lane.as_ref().is_none_or(|lane| lane.slot != slot) {
            run.lane = engine.lane_regions(run.transfer, slot);
        }
        let Some(LaneRegions { local, remote, .. }) = &run.lane else { return full };
        let route = Route { direction: run.direction, grant: run.grant, local, remote };
        let Ok(ops) = run.plan.ops(route, layers.clone()) else { return Pumped::Mismatch };
        let cursor = run.cursor.unwrap_or_else(|| ops.start());
        if ops.is_done(cursor) {
            return Pumped::Nothing;
        }
        // Of the many short chunks each is one op, and need not make room for more.
        let (mut one, mut many);
        let batch: &mut [Op<'_>] = if ops.is_last(cursor) {
            one = [Op::notify(0)];
            &mut one
        } else {
            many = [Op::notify(0); BATCH];
            &mut many
        };
        let filled = ops.fill(cursor, batch);
        let posted = match engine.post(now, run.transfer, slot, &mut batch[..filled]) {
            Ok(posted) => posted,
            // The room has ended; the protocol says the rest.
            Err(TransferFailed { .. }) => return Pumped::Nothing,
        };
        let bytes: u64 = batch[..posted.ops].iter().filter_map(Op::bytes).sum();
        let part = batch.get(posted.ops).map_or(0, |op| op.part_bytes(posted.within));
        run.posted_bytes += bytes + part;
        *left = left.saturating_sub(bytes + part);
        let cursor = ops.advance(cursor, posted);
        run.cursor = Some(cursor);
        if ops.is_done(cursor) {
            return Pumped::Nothing;
        }
        if *left == 0 {
            return Pumped::More;
        }
    }
}

/// Whether the bytes here are those that the peer has summed, and it has summed all that it was to move: which layers
/// that is follows from the two sides' layouts, and not from what the peer says.
fn is_proven(memory: &[Memory], table: &PageTable<'_>, cache: &CacheLayout, ask: &Ask, sums: &[u8]) -> bool {
    let layers = overlap(&table.layout.layers(), &cache.layers());
    let tokens = ask.skip_tokens..ask.tokens;
    Checksums::decode(sums).is_ok_and(|sums| sums.verify(memory, table, layers, tokens).is_ok())
}

fn span(role: &'static str, room: u64, use_count: u32, tokens: u32) -> tracing::Span {
    use tracing::field::Empty;
    tracing::debug_span!("room", role, room, use_count, tokens, peer = Empty, port = Empty)
}

fn refused(error: RoomError) -> End {
    let why = match error {
        RoomError::Duplicate { .. } => RoomRefusal::Duplicate,
        RoomError::UnknownPeer => return End::PeerLost { cause: SessionEnd::ClosedHere },
        RoomError::TooLong { bytes, limit } => RoomRefusal::TooLong { bytes, limit },
        _ => RoomRefusal::Busy,
    };
    End::Refused { by: Who::Here, why }
}

fn overlap(a: &Range<u32>, b: &Range<u32>) -> Range<u32> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

#[cfg(test)]
mod tests {
    use crossdock_memory::AllocateOptions;

    use super::*;
    use crate::{CacheKind, Dtype, LayoutOptions, Placement};

    fn layout(layers: Range<u32>) -> CacheLayout {
        CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers: 4,
            layers,
            kind: CacheKind::Mla { latent_bytes: 24, rope_bytes: 0 },
            dtype: Dtype::Bf16,
            page_tokens: 16,
            pages: 8,
            placement: Placement::LayerMajor { region: 0 },
        })
        .unwrap()
    }

    #[test]
    fn sums_prove_only_what_both_sides_layouts_say_was_moved() {
        // Layers 1 and 2 are the ones that both hold.
        let (here, peer) = (layout(1..4), layout(0..3));
        let bytes = here.bytes_needed(0) as usize;
        let memory = [Memory::allocate(bytes, &AllocateOptions::default()).unwrap()];
        let pages = [5, 2];
        let ask = Ask { tokens: 40, skip_tokens: 20, checksums: true };
        let table = local_table(&here, &pages, Direction::Read, &ask);
        let proven = |layers: Range<u32>, tokens: Range<u32>| {
            let mut sums = Vec::new();
            Checksums::compute(&memory, &table, layers, tokens).unwrap().encode(&mut sums);
            is_proven(&memory, &table, &peer, &ask, &sums)
        };
        assert!(proven(1..3, 20..40));
        for layers in [1..1, 2..2, 0..0, 1..2, 2..3, 1..4, 3..4] {
            assert!(!proven(layers.clone(), 20..40), "{layers:?}");
        }
        for tokens in [20..20, 20..39, 21..40] {
            assert!(!proven(1..3, tokens.clone()), "{tokens:?}");
        }
        assert!(!is_proven(&memory, &table, &peer, &ask, &[]), "no sums at all");
    }
}
