//! The progress loop: sessions that come and go, transfers that wait for them, chunks that are posted and answered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crossdock_engine::{Engine, OsError, Promise, duration_ns, now_ns};
use crossdock_memory::{Memory, PageLayout};
use crossdock_proto::{Notice, SessionEnd, SessionId, TargetId};
use crossdock_transport::{Access, Direction, Error, GrantId, Op};

use crate::handle::{Command, Handle, Promises, Shared};
use crate::note::Note;
use crate::plan::{Chunk, plan};
use crate::table::{Stretch, Table};
use crate::{RegisterError, Transfer, TransferError};

/// The limits of a worker.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Calls that may wait for the progress loop.
    pub max_commands: usize,
    /// Transfers at once.
    pub max_transfers: usize,
    /// How long an unregistration waits for sessions to end.
    pub drain_ns: u64,
}

impl Default for WorkerOptions {
    fn default() -> WorkerOptions {
        WorkerOptions { max_commands: 4096, max_transfers: 65_536, drain_ns: 30_000_000_000 }
    }
}

/// One endpoint's progress loop.
pub struct Worker {
    engine: Engine,
    shared: Arc<Shared>,
    options: WorkerOptions,
    /// What is registered here.
    table: Table,
    peers: BTreeMap<String, Peer>,
    targets: BTreeMap<TargetId, String>,
    sessions: BTreeMap<SessionId, Session>,
    transfers: BTreeMap<u64, Moving>,
    /// Ends of transfers, by deadline.
    deadlines: BTreeSet<(u64, u64)>,
    next_transfer: u64,
    /// Sessions that are over, until their lanes touch this side's memory no more; with whom that is to be told.
    closing: Vec<(SessionId, Vec<Quieting>)>,
    leaving: Vec<Leaving>,
    /// Sessions with lower numbers may have been told of memory that was taken back since.
    told_before: u32,
    /// Sessions that are not up here yet, and whose peer is ready.
    ready_early: BTreeSet<SessionId>,
}

/// A transfer that has ended, and is to be told when the last of its sessions is quiet.
struct Quieting {
    promise: Promise<()>,
    sessions: Vec<SessionId>,
}

/// Somebody whom transfers name.
#[derive(Default)]
struct Peer {
    target: Option<TargetId>,
    session: Option<SessionId>,
    /// Transfers that wait for a session.
    waiting: VecDeque<u64>,
    /// It is not dialed before this: sessions with it have ended without moving anything.
    not_before_ns: u64,
    pause_ns: u64,
}

struct Session {
    /// What the peer has registered, and its number of the session.
    theirs: Table,
    their_number: u32,
    /// It has said that its memory may be reached.
    is_ready: bool,
    /// No transfer begins on it any more; when those that are under way have ended, it is met anew.
    is_stale: bool,
    /// Those that dial it from here.
    peers: BTreeSet<String>,
    /// What is to be posted, oldest first.
    queue: VecDeque<Queued>,
    /// What is to be said, and on which lane, where that matters.
    notes: VecDeque<(Option<u8>, Note)>,
    /// Chunks that are posted and not answered, by number: whose they are, and which way they go.
    out: BTreeMap<u32, (u64, Direction)>,
    next_chunk: u32,
    next_lane: usize,
}

struct Queued {
    transfer: u64,
    chunk: Chunk,
    number: u32,
    /// The lane that took the first part.
    lane: Option<u8>,
    ops_done: usize,
    within: u64,
}

/// A transfer that has not ended.
struct Moving {
    transfer: Transfer,
    promises: Promises,
    deadline_ns: u64,
    session: Option<SessionId>,
    /// Sessions in which it was begun before: it is begun anew when they are quiet.
    before: Vec<SessionId>,
    chunks_left: usize,
    /// The peer was met anew once, because it had not told of an address.
    has_asked_anew: bool,
}

/// Memory that is to be taken back.
struct Leaving {
    address: u64,
    stretch: Stretch,
    until_ns: u64,
    /// Nobody, once it has been said that it takes too long; it goes on leaving.
    told: Vec<Promise<Result<(), RegisterError>>>,
}

impl Worker {
    /// Takes an engine that nobody else uses, whose protocol [numbers sessions](crossdock_proto::Config::app_numbers_sessions).
    pub fn new(mut engine: Engine, options: WorkerOptions) -> Result<(Worker, Handle), OsError> {
        let shared = Arc::new(Shared::new(options.max_commands, engine.address_check())?);
        let handle = Handle { shared: shared.clone() };
        let table = Table::default();
        engine.proto().set_app(table.encode());
        let worker = Worker {
            engine,
            shared,
            options,
            table,
            peers: BTreeMap::new(),
            targets: BTreeMap::new(),
            sessions: BTreeMap::new(),
            transfers: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            next_transfer: 0,
            closing: Vec::new(),
            leaving: Vec::new(),
            told_before: 0,
            ready_early: BTreeSet::new(),
        };
        Ok((worker, handle))
    }

    /// Makes progress until the handle says stop; spins for this long after something has happened.
    pub fn run(mut self, spin_ns: u64) -> Result<(), OsError> {
        let mut last_active = now_ns();
        let ended = loop {
            if self.shared.is_stopping() {
                break Ok(());
            }
            if self.turn() {
                last_active = now_ns();
            } else if now_ns().saturating_sub(last_active) < spin_ns {
                std::hint::spin_loop();
            } else if let Err(error) = self.park() {
                break Err(error);
            }
        };
        self.shared.close();
        if ended.is_ok() {
            self.part();
        }
        self.engine.shut_down(now_ns());
        ended
    }

    /// Says goodbye and waits, not for long, until no peer can reach what is registered here: then the memory is its owner's
    /// again when this has ended.
    fn part(&mut self) {
        let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
        for &session in &sessions {
            self.engine.close_session(now_ns(), session);
        }
        let until = now_ns().saturating_add(LONGEST_PARTING_NS);
        let leaving: Vec<u32> = self.leaving.iter().map(|leaving| leaving.stretch.region).collect();
        let mut regions: Vec<u32> =
            self.table.iter().map(|(_, stretch)| stretch.region).chain(leaving).collect();
        while now_ns() < until {
            let active = self.engine.turn(now_ns());
            // Whoever comes now is told of nothing that lasts.
            while let Some(notice) = self.engine.next_notice() {
                if let Notice::SessionUp { session, .. } = notice {
                    self.engine.close_session(now_ns(), session);
                }
            }
            if sessions.iter().all(|&session| self.engine.is_quiet(session) && self.engine.is_down(session)) {
                regions.retain(|&region| self.engine.withdraw(region).is_err());
                if regions.is_empty() {
                    return;
                }
            }
            let shared = self.shared.clone();
            if !active && self.engine.park(now_ns(), &shared.doorbell, SHORT_SLEEP_NS, || true).is_err() {
                return;
            }
        }
    }

    fn park(&mut self) -> Result<(), OsError> {
        let now = now_ns();
        let next = self.deadlines.first().map_or(LONGEST_SLEEP_NS, |(at, _)| at.saturating_sub(now));
        // What waits for lanes to go down, or to take more, is looked at again soon.
        let is_waiting = !self.closing.is_empty()
            || !self.leaving.is_empty()
            || self.peers.values().any(|peer| peer.not_before_ns > now && !peer.waiting.is_empty())
            || self.sessions.values().any(|session| !session.queue.is_empty() || !session.notes.is_empty());
        let longest = next.min(if is_waiting { SHORT_SLEEP_NS } else { LONGEST_SLEEP_NS });
        let shared = self.shared.clone();
        self.engine.park(now, &shared.doorbell, longest, || shared.is_idle())
    }

    /// True if anything happened.
    pub fn turn(&mut self) -> bool {
        let now = now_ns();
        let mut active = self.engine.turn(now);
        while let Some(notice) = self.engine.next_notice() {
            active = true;
            self.hear(now, notice);
        }
        while let Some(arrival) = self.engine.next_side_arrival() {
            active = true;
            self.arrived(now, arrival.session, arrival.slot, Note::from_bits(arrival.bits));
        }
        while let Some(done) = self.engine.next_side_done() {
            active = true;
            self.chunk_done(now, done.session, done.token);
        }
        while let Some(command) = self.shared.next() {
            active = true;
            self.take(now, command);
        }
        active |= self.expire(now);
        self.settle(now);
        self.dial_again(now);
        active | self.post(now)
    }

    fn take(&mut self, now: u64, command: Command) {
        match command {
            Command::Register(memory, told) => {
                let registered = self.register(&memory);
                drop(told.tell(registered));
            }
            Command::Unregister(address, told) => self.unregister(now, address, told),
            Command::Transfer(transfer, promises) => self.begin(now, transfer, promises),
        }
    }

    fn unregister(&mut self, now: u64, address: u64, told: Promise<Result<(), RegisterError>>) {
        if let Some(leaving) = self.leaving.iter_mut().find(|leaving| leaving.address == address) {
            leaving.until_ns = now.saturating_add(self.options.drain_ns);
            return leaving.told.push(told);
        }
        let Some(stretch) = self.table.remove(address) else {
            return drop(told.tell(Err(RegisterError::Unknown { address })));
        };
        self.engine.proto().set_app(self.table.encode());
        // Whoever is connected, or connects right now, may have been told of it.
        self.told_before = self.engine.proto().next_session();
        let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.close(now, session, SessionEnd::ClosedHere);
        }
        let until_ns = now.saturating_add(self.options.drain_ns);
        self.leaving.push(Leaving { address, stretch, until_ns, told: vec![told] });
    }

    fn register(&mut self, memory: &Memory) -> Result<(), RegisterError> {
        let (address, bytes) = (memory.base().addr() as u64, memory.bytes() as u64);
        self.table.check(address, bytes)?;
        // What leaves can still be reached.
        let end = address.saturating_add(bytes);
        let overlaps = |leaving: &&Leaving| {
            leaving.address < end && address < leaving.address.saturating_add(leaving.stretch.bytes)
        };
        if let Some(other) = self.leaving.iter().find(overlaps).map(|leaving| leaving.address) {
            return Err(RegisterError::Overlaps { address, bytes, other });
        }
        let region = self.engine.register(memory).map_err(RegisterError::Port)?;
        self.table.put(address, Stretch { bytes, region });
        self.engine.proto().set_app(self.table.encode());
        Ok(())
    }

    fn begin(&mut self, now: u64, transfer: Transfer, promises: Promises) {
        if self.transfers.len() >= self.options.max_transfers {
            let _ = promises.quiet.tell(());
            let _ = promises.end.tell(Err(TransferError::Busy));
            return;
        }
        let number = self.next_transfer;
        self.next_transfer += 1;
        let deadline_ns = now.saturating_add(duration_ns(transfer.deadline));
        self.deadlines.insert((deadline_ns, number));
        let peer = transfer.peer.clone();
        let moving = Moving {
            transfer,
            promises,
            deadline_ns,
            session: None,
            before: Vec::new(),
            chunks_left: 0,
            has_asked_anew: false,
        };
        self.transfers.insert(number, moving);
        self.peers.entry(peer.clone()).or_default().waiting.push_back(number);
        self.serve(now, &peer);
    }

    /// Gives a peer's transfers to its session, or dials it.
    fn serve(&mut self, now: u64, address: &str) {
        let Some(peer) = self.peers.get_mut(address) else { return };
        if peer.waiting.is_empty() {
            return;
        }
        let Some(session) = peer.session else {
            if peer.target.is_none() && peer.not_before_ns <= now {
                let target = self.engine.proto().connect(now, address);
                peer.target = Some(target);
                self.targets.insert(target, address.to_owned());
            }
            return;
        };
        let Some(state) = self.sessions.get(&session) else { return };
        if !state.is_ready || state.is_stale {
            return;
        }
        let waiting = std::mem::take(&mut peer.waiting);
        for number in waiting {
            self.start(address, session, number);
        }
        self.renew_if_drained(now, session);
    }

    /// Dials peers whose pause is over.
    fn dial_again(&mut self, now: u64) {
        let is_due = |peer: &Peer| {
            peer.target.is_none()
                && peer.session.is_none()
                && !peer.waiting.is_empty()
                && peer.not_before_ns <= now
        };
        let due: Vec<String> =
            self.peers.iter().filter(|(_, peer)| is_due(peer)).map(|(address, _)| address.clone()).collect();
        due.iter().for_each(|address| self.serve(now, address));
    }

    /// Plans a transfer on a session that is ready.
    fn start(&mut self, address: &str, session: SessionId, number: u64) {
        let (Some(moving), Some(state)) = (self.transfers.get_mut(&number), self.sessions.get_mut(&session))
        else {
            return;
        };
        let closing = &self.closing;
        let is_closing = |before: &SessionId| closing.iter().any(|(session, _)| session == before);
        // What it has posted before must not come after what it posts now.
        if state.is_stale || moving.before.iter().any(is_closing) {
            return self.wait_again(address, number);
        }
        let chunks = match plan(&moving.transfer.blocks, &self.table, &state.theirs, address) {
            Ok(chunks) => chunks,
            Err(TransferError::UnknownRemote { .. }) if !moving.has_asked_anew => {
                // It may have registered that since it has connected.
                moving.has_asked_anew = true;
                state.is_stale = true;
                return self.wait_again(address, number);
            }
            Err(error) => return self.end(number, Err(error)),
        };
        moving.session = Some(session);
        let chunks: Vec<Chunk> = chunks.into_iter().filter(|chunk| !chunk.is_empty()).collect();
        moving.chunks_left = chunks.len();
        if chunks.is_empty() {
            return self.end(number, Ok(()));
        }
        for chunk in chunks {
            let chunk_number = state.next_chunk;
            state.next_chunk = (chunk_number + 1) & ((1 << Note::CHUNK_BITS) - 1);
            state.queue.push_back(Queued {
                transfer: number,
                chunk,
                number: chunk_number,
                lane: None,
                ops_done: 0,
                within: 0,
            });
        }
    }

    fn wait_again(&mut self, address: &str, number: u64) {
        self.peers.entry(address.to_owned()).or_default().waiting.push_back(number);
    }

    fn hear(&mut self, now: u64, notice: Notice) {
        match notice {
            Notice::SessionUp { session, target, app, .. } => {
                let address = target.and_then(|target| self.targets.get(&target).cloned());
                if !self.sessions.contains_key(&session)
                    && let Err(cause) = self.welcome(now, session, &app)
                {
                    if let Some(address) = address {
                        self.turned_away(now, &address, cause);
                    }
                    return;
                }
                if let Some(address) = address {
                    self.peers.entry(address.clone()).or_default().session = Some(session);
                    if let Some(state) = self.sessions.get_mut(&session) {
                        state.peers.insert(address.clone());
                    }
                    self.serve(now, &address);
                }
            }
            Notice::SessionDown { session, target, cause, .. } => {
                let address = target.and_then(|target| self.targets.get(&target).cloned());
                let mut addresses: BTreeSet<String> = address.into_iter().collect();
                if let Some(session) = session {
                    self.ready_early.remove(&session);
                    addresses.extend(
                        self.sessions.get(&session).into_iter().flat_map(|state| state.peers.clone()),
                    );
                    self.leave(now, session, &cause, matches!(cause, SessionEnd::ClosedByPeer));
                }
                if !cause.is_retryable() {
                    addresses.iter().for_each(|address| self.give_up(address, &cause));
                }
            }
            // There are no rooms.
            _ => {}
        }
    }

    /// A peer that was dialed cannot be talked to: for good, or as things are.
    fn turned_away(&mut self, now: u64, address: &str, cause: Option<SessionEnd>) {
        self.forget_target(address);
        match cause {
            Some(cause) => self.give_up(address, &cause),
            None => self.pause(now, address),
        }
    }

    /// A peer is dialed no more, and nothing waits for it.
    fn give_up(&mut self, address: &str, cause: &SessionEnd) {
        self.forget_target(address);
        let waiting = self.peers.remove(address).map(|peer| peer.waiting).unwrap_or_default();
        for number in waiting {
            self.end(number, Err(TransferError::PeerLost { cause: cause.clone() }));
        }
    }

    /// The next dial waits, longer each time that a session moves nothing.
    fn pause(&mut self, now: u64, address: &str) {
        if let Some(peer) = self.peers.get_mut(address) {
            peer.not_before_ns = now.saturating_add(peer.pause_ns);
            peer.pause_ns = (2 * peer.pause_ns).clamp(SHORTEST_PAUSE_NS, LONGEST_PAUSE_NS);
        }
    }

    /// Lets a peer reach what is registered here; or why that cannot be, `None` if it may be later.
    fn welcome(&mut self, now: u64, session: SessionId, app: &[u8]) -> Result<(), Option<SessionEnd>> {
        let Some((theirs, their_number)) = Table::decode(app) else {
            self.engine.close_session(now, session);
            return Err(Some(SessionEnd::Misbehaved { what: "is no endpoint that moves bytes by address" }));
        };
        if session.0 < self.told_before {
            self.engine.close_session(now, session);
            return Err(None);
        }
        let parts: Vec<(u32, PageLayout)> = self
            .table
            .iter()
            .map(|(_, stretch)| (stretch.region, PageLayout::dense(0, stretch.bytes, 1)))
            .collect();
        for access in [Access::Write, Access::Read] {
            let number = grant_number(session.0, access);
            if !parts.is_empty() && self.engine.allow(session, number, access, &parts).is_err() {
                // A session that is not quiet yet has the number: the peer dials again, and gets another one.
                self.engine.close_session(now, session);
                return Err(None);
            }
        }
        let state = Session {
            theirs,
            their_number,
            is_ready: self.ready_early.remove(&session),
            is_stale: false,
            peers: BTreeSet::new(),
            queue: VecDeque::new(),
            notes: VecDeque::from([(None, Note::Ready)]),
            out: BTreeMap::new(),
            next_chunk: 0,
            next_lane: 0,
        };
        self.sessions.insert(session, state);
        Ok(())
    }

    fn arrived(&mut self, now: u64, session: SessionId, lane: u8, note: Option<Note>) {
        let Some(state) = self.sessions.get_mut(&session) else {
            // A lane may be quicker than the stream that tells of the session.
            if note == Some(Note::Ready) {
                self.ready_early.insert(session);
            }
            return;
        };
        match note {
            Some(Note::Ready) => {
                state.is_ready = true;
                let peers: Vec<String> = state.peers.iter().cloned().collect();
                peers.iter().for_each(|peer| self.serve(now, peer));
            }
            // It posts no more at once than this side would.
            Some(Note::Landed(_)) if state.notes.len() > 2 * MOST_CHUNKS_OUT => {
                self.close(now, session, SessionEnd::Misbehaved { what: "does not take answers" });
            }
            Some(Note::Landed(chunk)) => state.notes.push_back((Some(lane), Note::Seen(chunk))),
            Some(Note::Seen(chunk)) => match state.out.get(&chunk) {
                Some((_, Direction::Write)) => self.chunk_done(now, session, chunk),
                // It has failed here meanwhile.
                None => {}
                Some((_, Direction::Read)) => {
                    self.close(now, session, SessionEnd::Misbehaved { what: "has seen what was read" });
                }
            },
            None => self.close(now, session, SessionEnd::Misbehaved { what: "said what is not known here" }),
        }
    }

    /// A chunk of writes was seen at the peer, or one of reads is here.
    fn chunk_done(&mut self, now: u64, session: SessionId, chunk: u32) {
        let Some(state) = self.sessions.get_mut(&session) else { return };
        let Some((number, _)) = state.out.remove(&chunk) else { return };
        for address in &state.peers {
            if let Some(peer) = self.peers.get_mut(address) {
                (peer.pause_ns, peer.not_before_ns) = (0, 0);
            }
        }
        if let Some(moving) = self.transfers.get_mut(&number) {
            moving.chunks_left -= 1;
            if moving.chunks_left == 0 {
                self.end(number, Ok(()));
            }
        }
        self.renew_if_drained(now, session);
    }

    /// Ends a transfer that moves nothing any more.
    fn end(&mut self, number: u64, end: Result<(), TransferError>) {
        let Some(moving) = self.transfers.remove(&number) else { return };
        self.deadlines.remove(&(moving.deadline_ns, number));
        self.tell_when_quiet(Quieting { promise: moving.promises.quiet, sessions: moving.before });
        // Where a ticket was dropped nobody looks.
        let _ = moving.promises.end.tell(end);
    }

    /// Tells that a transfer is quiet when the last of its sessions is.
    fn tell_when_quiet(&mut self, quieting: Quieting) {
        let is_one = |(closing, _): &&mut (SessionId, Vec<Quieting>)| quieting.sessions.contains(closing);
        match self.closing.iter_mut().find(is_one) {
            Some((_, waiting)) => waiting.push(quieting),
            None => {
                let _ = quieting.promise.tell(());
            }
        }
    }

    /// Ends those whose time is over. What they have posted may still move: their sessions are ended with them.
    fn expire(&mut self, now: u64) -> bool {
        let mut any = false;
        while let Some(&(at, number)) = self.deadlines.first()
            && at <= now
        {
            any = true;
            self.deadlines.pop_first();
            let Some(moving) = self.transfers.get(&number) else { continue };
            let is_connected = moving.session.is_some();
            let session = moving.session;
            if let Some(session) = session
                && let Some(state) = self.sessions.get_mut(&session)
            {
                let is_posted = state.out.values().any(|&(of, _)| of == number)
                    || state.queue.iter().any(|queued| queued.transfer == number && queued.lane.is_some());
                state.queue.retain(|queued| queued.transfer != number || queued.lane.is_some());
                if is_posted {
                    self.fail(number, TransferError::Expired { is_connected });
                    self.close(now, session, SessionEnd::ClosedHere);
                    continue;
                }
                self.end(number, Err(TransferError::Expired { is_connected }));
                self.renew_if_drained(now, session);
                continue;
            } else if let Some(moving) = self.transfers.get(&number) {
                let address = moving.transfer.peer.clone();
                if let Some(peer) = self.peers.get_mut(&address) {
                    peer.waiting.retain(|&waiting| waiting != number);
                    if peer.waiting.is_empty() && peer.session.is_none() {
                        // Nobody asks for it any more.
                        self.forget_target(&address);
                        self.peers.remove(&address);
                    }
                }
            }
            self.end(number, Err(TransferError::Expired { is_connected }));
        }
        any
    }

    /// Tells how a transfer failed whose session is being closed, and later that it is quiet.
    fn fail(&mut self, number: u64, error: TransferError) {
        if let Some(moving) = self.transfers.get_mut(&number)
            && let Some(session) = moving.session
        {
            moving.before.push(session);
            self.begin_closing(session);
        }
        self.end(number, Err(error));
    }

    fn begin_closing(&mut self, session: SessionId) {
        if self.closing.iter().all(|(closing, _)| *closing != session) {
            self.closing.push((session, Vec::new()));
        }
    }

    /// Ends a session from this side. Its transfers begin anew in the next one.
    fn close(&mut self, now: u64, session: SessionId, cause: SessionEnd) {
        self.engine.close_session(now, session);
        self.leave(now, session, &cause, true);
    }

    /// A session is over. With `again`, its transfers begin anew in the next one, when this one is quiet: who says goodbye may
    /// have begun anew.
    fn leave(&mut self, now: u64, session: SessionId, cause: &SessionEnd, again: bool) {
        let Some(state) = self.sessions.remove(&session) else { return };
        self.begin_closing(session);
        let under_way: Vec<u64> = self
            .transfers
            .iter()
            .filter(|(_, moving)| moving.session == Some(session))
            .map(|(&number, _)| number)
            .collect();
        for number in under_way {
            let Some(moving) = self.transfers.get_mut(&number) else { continue };
            if again {
                moving.before.push(session);
                (moving.session, moving.chunks_left) = (None, 0);
                let peer = moving.transfer.peer.clone();
                self.wait_again(&peer, number);
            } else {
                self.fail(number, TransferError::PeerLost { cause: cause.clone() });
            }
        }
        for address in state.peers {
            let Some(peer) = self.peers.get_mut(&address) else { continue };
            if peer.session != Some(session) {
                // The next one has come already.
                continue;
            }
            peer.session = None;
            // A target whose session was closed from here is dialed no more; another one would be, though nobody asks.
            let waits = !peer.waiting.is_empty();
            self.forget_target(&address);
            if !waits {
                self.peers.remove(&address);
                continue;
            }
            self.pause(now, &address);
            self.serve(now, &address);
        }
    }

    fn forget_target(&mut self, address: &str) {
        if let Some(target) = self.peers.get_mut(address).and_then(|peer| peer.target.take()) {
            self.targets.remove(&target);
            self.engine.proto().disconnect(now_ns(), target);
        }
    }

    /// A stale session on which nothing moves any more is ended, so that the peer is met anew.
    fn renew_if_drained(&mut self, now: u64, session: SessionId) {
        let is_drained = |state: &Session| state.is_stale && state.out.is_empty() && state.queue.is_empty();
        if self.sessions.get(&session).is_some_and(is_drained) {
            self.close(now, session, SessionEnd::ClosedHere);
        }
    }

    /// Tells of sessions that are quiet, and lets memory go that was waiting for that.
    fn settle(&mut self, now: u64) {
        let engine = &self.engine;
        // Nothing comes in by it, and nothing of this side's memory goes out.
        let is_over = |session: SessionId| engine.is_quiet(session) && engine.is_down(session);
        let quiet: Vec<_> = self.closing.extract_if(.., |(session, _)| is_over(*session)).collect();
        if !quiet.is_empty() {
            quiet
                .into_iter()
                .flat_map(|(_, waiting)| waiting)
                .for_each(|quieting| self.tell_when_quiet(quieting));
            // Those that were to begin anew after it.
            let addresses: Vec<String> = self.peers.keys().cloned().collect();
            addresses.iter().for_each(|address| self.serve(now, address));
        }
        for mut leaving in std::mem::take(&mut self.leaving) {
            let end = match self.engine.withdraw(leaving.stretch.region) {
                Ok(()) => Ok(()),
                Err(Error::RegionInUse { .. }) if now < leaving.until_ns => {
                    self.leaving.push(leaving);
                    continue;
                }
                Err(Error::RegionInUse { .. }) => Err(RegisterError::InUse),
                Err(error) => Err(RegisterError::Port(error)),
            };
            for told in leaving.told.drain(..) {
                let _ = told.tell(end.clone());
            }
            if end == Err(RegisterError::InUse) {
                // It goes on leaving, unasked.
                leaving.until_ns = u64::MAX;
                self.leaving.push(leaving);
            }
        }
    }

    /// Posts what the ports take. True if anything was taken.
    fn post(&mut self, now: u64) -> bool {
        let (mut active, mut failed) = (false, Vec::new());
        for (&session, state) in &mut self.sessions {
            match state.post(&mut self.engine, session, &self.transfers) {
                Ok(taken) => active |= taken,
                Err(error) => failed.push((session, error)),
            }
        }
        for (session, (number, error)) in failed {
            if let Some(number) = number {
                self.fail(number, TransferError::Port(error));
            }
            // What was posted of it may still move.
            self.close(now, session, SessionEnd::ClosedHere);
        }
        active
    }
}

impl Session {
    fn post(
        &mut self,
        engine: &mut Engine,
        session: SessionId,
        transfers: &BTreeMap<u64, Moving>,
    ) -> Result<bool, (Option<u64>, Error)> {
        let mut active = false;
        while let Some(&(lane, note)) = self.notes.front() {
            let Some(lane) = lane.or_else(|| engine.side_lane(session, 0)) else { break };
            let posted = engine.post_side(session, lane, &mut [Op::notify(0)], Some(note.bits()), None);
            if posted.map_err(|error| (None, error))?.ops == 0 {
                // A lane that is lost ends the session.
                break;
            }
            active = true;
            self.notes.pop_front();
        }
        while let Some(queued) = self.queue.front_mut() {
            let Some(moving) = transfers.get(&queued.transfer) else {
                // It has failed: what is posted of it ends with the session, and nothing follows.
                self.queue.pop_front();
                continue;
            };
            let direction = moving.transfer.direction;
            if queued.lane.is_none() && self.out.len() >= MOST_CHUNKS_OUT {
                break;
            }
            let lane = match queued.lane {
                Some(lane) => lane,
                None => {
                    let Some(lane) = engine.side_lane(session, self.next_lane) else { break };
                    lane
                }
            };
            let Some(regions) = engine.side_regions(session, lane) else { break };
            let access = if direction == Direction::Write { Access::Write } else { Access::Read };
            let grant = GrantId::standing(grant_number(self.their_number, access));
            let Some(ops) = queued.chunk.ops(direction, grant, &regions.local, &regions.remote) else {
                let reason = "a region is not known on the lane";
                return Err((Some(queued.transfer), Error::BadOp { reason }));
            };
            let mut ops: Vec<Op<'_>> = ops.into_iter().skip(queued.ops_done).collect();
            if let Some(first) = ops.first_mut() {
                *first = first.advance(queued.within);
            }
            let (imm, token) = match direction {
                Direction::Write => (Some(Note::Landed(queued.number).bits()), None),
                Direction::Read => (None, Some(queued.number)),
            };
            let posted = engine
                .post_side(session, lane, &mut ops, imm, token)
                .map_err(|error| (Some(queued.transfer), error))?;
            if posted.ops == ops.len() {
                self.out.insert(queued.number, (queued.transfer, direction));
                self.queue.pop_front();
                self.next_lane = self.next_lane.wrapping_add(1);
                active = true;
                continue;
            }
            if posted.ops > 0 || posted.within > 0 {
                active = true;
                queued.lane = Some(lane);
            }
            queued.within = if posted.ops == 0 { queued.within + posted.within } else { posted.within };
            queued.ops_done += posted.ops;
            break;
        }
        Ok(active)
    }
}

/// However the loop ends: whoever asks is told.
impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Each session has two numbers of standing grants, on the side that numbers it so.
fn grant_number(session: u32, access: Access) -> u32 {
    let first = session % (GrantId::STANDING / 2) * 2;
    match access {
        Access::Write => first,
        Access::Read => first + 1,
    }
}

/// Chunks on their way, for each session: fewer than the peer keeps arrivals.
const MOST_CHUNKS_OUT: usize = 512;
/// The doorbell wakes the loop earlier.
const LONGEST_SLEEP_NS: u64 = 1_000_000_000;
const SHORT_SLEEP_NS: u64 = 1_000_000;
/// After a session that has moved nothing.
const SHORTEST_PAUSE_NS: u64 = 10_000_000;
const LONGEST_PAUSE_NS: u64 = 1_000_000_000;
/// A peer that is alive answers a goodbye within a moment.
const LONGEST_PARTING_NS: u64 = 2_000_000_000;
