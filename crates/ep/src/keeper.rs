//! The thread that keeps in touch with the other ranks: it meets them, hears of their ends, and carries calls to and from
//! those whose memory is not mapped here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};

use crossdock_engine::{Engine, OsError, now_ns};
use crossdock_memory::Memory;
use crossdock_proto::{Notice, SessionEnd, SessionId, TargetId};
use crossdock_transport::{Access, Mapping};

use crate::arena::Arena;
use crate::error::GroupError;
use crate::group::{Farewell, Mourner, Reach, set_farewell};
use crate::meet::MeetError;
use crate::note::Note;
use crate::outgoing::{Outgoing, OutgoingCall};
use crate::pace::{Machine, Pace};
use crate::poster::{Outbound, Poster, Progress, REGION};
use crate::region::RegionLayout;
use crate::words::{self, RankMemory};
use crate::{GroupConfig, arrivals};

/// What the thread and its owner share besides the calls.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// Whoever waits for the meeting does not wait any longer.
    pub give_up: AtomicBool,
    /// The group is gone.
    pub stop: AtomicBool,
}

/// How each rank is reached, by rank; `None` for this one.
pub(crate) type Met = Vec<Option<Reach>>;

pub(crate) struct Keeper {
    engine: Engine,
    control: Arc<Control>,
    outgoing: Arc<Outgoing>,
    rank: u32,
    own: Memory,
    regions: Vec<RegionLayout>,
    slots: u32,
    dialed: BTreeMap<TargetId, u32>,
    sessions: BTreeMap<SessionId, u32>,
    mappings: BTreeMap<SessionId, Mapping>,
    peers: BTreeMap<u32, Peer>,
    /// Sessions whose rank has said that it may be written to, before this end of them was up.
    ready_early: BTreeSet<SessionId>,
    /// Sessions of ranks that ports reached, and that are over, until nothing can land any more.
    closing: Vec<(u32, SessionId)>,
    last: Option<SessionEnd>,
    /// Until all have met, or cannot.
    told: Option<SyncSender<Result<Met, MeetError>>>,
    /// All have met.
    is_complete: bool,
    /// How long a rank that leaves waits for the others to say that they have heard it.
    parting_ns: u64,
    mourner: Option<Mourner>,
    /// 0, 1, 2, and so on: where rows go that a port writes one behind the other.
    in_order: Vec<u32>,
    pace: Machine,
}

/// A rank with a session.
struct Peer {
    session: SessionId,
    /// It has said that it has met this rank, and may be written to. A rank of a complete group does not say so to one that
    /// starts again.
    is_ready: bool,
    /// The session's lane that the first of these took.
    lane: Option<u8>,
    queue: VecDeque<Outbound>,
    reach: PeerReach,
}

enum PeerReach {
    Mapped(RankMemory),
    Port(PortPeer),
}

/// A rank that a port reaches. All of its calls take one lane, which keeps their order.
struct PortPeer {
    /// It has said that it leaves.
    has_left: bool,
    /// It has answered that this rank leaves, or goes on without it.
    has_parted: bool,
    /// It goes on without this rank.
    has_masked: bool,
    /// This rank goes on without it, and tells it so until then.
    severed_until_ns: Option<u64>,
    /// By slot: calls that are posted and have not left.
    posted: Vec<u32>,
    /// By slot: the last call that came.
    calls: Vec<u32>,
}

impl Keeper {
    pub fn new(
        mut engine: Engine,
        config: &GroupConfig,
        rank: u32,
        own: Memory,
        addresses: &[String],
        (control, outgoing): (Arc<Control>, Arc<Outgoing>),
        (told, parting_ns): (SyncSender<Result<Met, MeetError>>, u64),
    ) -> Keeper {
        // The higher rank dials, so that two never do at once.
        let now = now_ns();
        let dialed =
            (0..rank).map(|peer| (engine.proto().connect(now, &addresses[peer as usize]), peer)).collect();
        Keeper {
            engine,
            control,
            outgoing,
            rank,
            own,
            regions: RegionLayout::of_group(config, 0..config.ranks()).expect("the configuration is valid"),
            slots: config.slots,
            dialed,
            sessions: BTreeMap::new(),
            mappings: BTreeMap::new(),
            peers: BTreeMap::new(),
            ready_early: BTreeSet::new(),
            closing: Vec::new(),
            last: None,
            told: Some(told),
            is_complete: false,
            parting_ns,
            mourner: None,
            in_order: Vec::new(),
            pace: Machine::new(),
        }
    }

    pub fn run(mut self, mourners: &Receiver<Mourner>) {
        // Ranks that died between the meeting and the group's beginning.
        let mut died = Vec::new();
        self.tell_if_complete();
        while !self.is_over() {
            let active = self.turn(&mut died);
            if self.mourner.is_none() {
                self.mourner = mourners.try_recv().ok();
            }
            if let Some(mourner) = &self.mourner {
                died.drain(..).for_each(|rank| mourner.mark_dead(rank));
            }
            let is_ending =
                |peer: &Peer| matches!(&peer.reach, PeerReach::Port(port) if port.severed_until_ns.is_some());
            let may_rest = self.closing.is_empty() && !self.peers.values().any(is_ending);
            let longest_ns = if may_rest { LONGEST_SLEEP_NS } else { SHORT_SLEEP_NS };
            if !active && let Err(error) = self.park(longest_ns) {
                // Nobody keeps in touch any more: the others will take this rank for dead, and it them.
                tracing::error!(rank = self.rank, "this rank cannot keep in touch with the others: {error}");
                self.tell(Err(error.into()));
                let others = (0..self.ranks()).filter(|&rank| rank != self.rank);
                self.mourner
                    .iter()
                    .for_each(|mourner| others.clone().for_each(|rank| mourner.mark_dead(rank)));
                break;
            }
        }
        let missing = (0..self.ranks()).filter(|rank| *rank != self.rank && !self.is_met(*rank)).collect();
        let last = self.last.take();
        self.tell(Err(MeetError::Late { missing, time_ms: 0, last }));
        if self.is_complete {
            self.part();
        }
        self.engine.shut_down(now_ns());
    }

    fn ranks(&self) -> u32 {
        self.regions.len() as u32
    }

    fn is_over(&self) -> bool {
        let gave_up = self.told.is_some() && self.control.give_up.load(Ordering::Acquire);
        gave_up || self.control.stop.load(Ordering::Acquire)
    }

    fn park(&mut self, longest_ns: u64) -> Result<(), OsError> {
        let (control, outgoing, told) = (&self.control, &self.outgoing, self.told.is_some());
        let idle = || {
            let gave_up = told && control.give_up.load(Ordering::Acquire);
            !gave_up && !control.stop.load(Ordering::Acquire) && outgoing.is_idle()
        };
        self.engine.park(now_ns(), self.outgoing.doorbell(), longest_ns, idle)
    }

    /// Takes what came, and sends what waits. True if anything happened.
    fn turn(&mut self, died: &mut Vec<u32>) -> bool {
        let now = now_ns();
        let mut active = self.engine.turn(now);
        while let Some(mapped) = self.engine.next_mapping() {
            // A rank has one region; the same one on a second lane is the same memory.
            self.mappings.entry(mapped.session).or_insert(mapped.mapping);
        }
        while let Some(notice) = self.engine.next_notice() {
            active = true;
            died.extend(self.hear(now, notice));
        }
        while let Some(arrival) = self.engine.next_side_arrival() {
            active = true;
            self.arrived(now, arrival.session, Note::from_bits(arrival.bits));
        }
        while let Some(done) = self.engine.next_side_done() {
            active = true;
            self.left(done.session, done.token);
        }
        while let Some(call) = self.outgoing.next_call() {
            active = true;
            self.queue_call(call);
        }
        self.close_severed(now);
        self.queue_pulses();
        active | self.post()
    }

    /// What the engine says. Gives the rank that is dead now, if any.
    fn hear(&mut self, now: u64, notice: Notice) -> Option<u32> {
        match notice {
            Notice::SessionUp { session, target, app, .. } => {
                let ranks = self.ranks();
                let rank =
                    <[u8; 4]>::try_from(&*app).map(u32::from_le_bytes).ok().filter(|&rank| rank < ranks);
                let expected = target.and_then(|target| self.dialed.get(&target).copied());
                match (rank, expected) {
                    (Some(found), Some(expected)) if found != expected => {
                        self.tell(Err(MeetError::WrongRank { expected, found }));
                    }
                    (Some(rank), _) if rank != self.rank => self.welcome(now, session, rank),
                    // Nobody of this group.
                    _ => self.engine.close_session(now, session),
                }
                None
            }
            Notice::SessionDown { session, target, cause, .. } => {
                let has_masked = session.is_some_and(|session| self.has_masked(session));
                let rank = session.and_then(|session| self.forget(session));
                if let Some(rank) = rank {
                    // Whether that is a fault is seen by whoever waits for it next: a rank that leaves closes, too.
                    tracing::info!(rank, here = self.rank, "its session is over: {cause}");
                    self.last = Some(cause);
                    if has_masked {
                        // What it said last counts: it goes on, and not this rank.
                        return None;
                    }
                    if self.told.is_some() {
                        // It may come back as long as the group is not complete.
                        return None;
                    }
                    target.into_iter().for_each(|target| self.engine.proto().disconnect(now, target));
                    return Some(rank);
                }
                if let Some(&rank) = target.and_then(|target| self.dialed.get(&target))
                    && !cause.is_retryable()
                {
                    self.tell(Err(MeetError::Refused { rank, cause }));
                    return None;
                }
                self.last = Some(cause);
                None
            }
            // There are no rooms.
            _ => None,
        }
    }

    /// A session is over. Gives the rank whose it was.
    fn forget(&mut self, session: SessionId) -> Option<u32> {
        self.mappings.remove(&session);
        self.ready_early.remove(&session);
        let rank = self.sessions.remove(&session)?;
        if self.peers.get(&rank).is_some_and(|peer| peer.session == session)
            && let Some(Peer { reach: PeerReach::Port(port), queue, .. }) = self.peers.remove(&rank)
        {
            self.closing.push((rank, session));
            let waiting = queue.iter().filter_map(|outbound| match outbound {
                Outbound::Call { call, .. } => Some(call.slot),
                Outbound::Note(_) => None,
            });
            waiting.chain(port.posted.iter().copied()).for_each(|slot| self.outgoing.left(rank, slot));
        }
        Some(rank)
    }

    fn welcome(&mut self, now: u64, session: SessionId, rank: u32) {
        if self.told.is_none() {
            // Another start of a rank that the group has met: it is not in the group.
            return self.engine.close_session(now, session);
        }
        if let Some(before) = self.peers.get(&rank).map(|peer| peer.session) {
            // It has started again while the group still meets: the earlier one is not met any more.
            self.forget(before);
            self.engine.close_session(now, before);
        }
        self.outgoing.set_quiet(rank, false);
        let reach = match self.mappings.remove(&session).map(RankMemory::mapped) {
            Some(Ok(memory)) => PeerReach::Mapped(memory),
            Some(Err(error)) => return self.tell(Err(GroupError::Memory { rank, error }.into())),
            None => {
                let parts = self.regions[self.rank as usize].written_by(rank);
                let parts: Vec<_> = parts.into_iter().map(|part| (REGION, part)).collect();
                if let Err(error) = self.engine.allow(session, rank, Access::Write, &parts) {
                    return self.tell(Err(error.into()));
                }
                let calls = vec![0; self.slots as usize];
                PeerReach::Port(PortPeer {
                    has_left: false,
                    has_parted: false,
                    has_masked: false,
                    severed_until_ns: None,
                    posted: Vec::new(),
                    calls,
                })
            }
        };
        self.sessions.insert(session, rank);
        let queue = VecDeque::from([Outbound::Note(Note::Ready)]);
        let is_ready = self.ready_early.remove(&session);
        self.peers.insert(rank, Peer { session, is_ready, lane: None, queue, reach });
        self.tell_if_complete();
    }

    /// What a rank says through a port.
    fn arrived(&mut self, now: u64, session: SessionId, note: Option<Note>) {
        let Some(&rank) = self.sessions.get(&session) else {
            if note == Some(Note::Ready) {
                self.ready_early.insert(session);
            }
            return;
        };
        if note == Some(Note::Ready) {
            self.peers.get_mut(&rank).into_iter().for_each(|peer| peer.is_ready = true);
            return self.tell_if_complete();
        }
        let (own, region) = (&self.own, &self.regions[self.rank as usize]);
        let Some((_, queue, port)) = port_of(&mut self.peers, rank) else { return };
        match note {
            Some(Note::Call { slot, call }) if port.calls.get(slot as usize).is_some() => {
                let last = &mut port.calls[slot as usize];
                let next = last.wrapping_add(1);
                if Note::lower_bits(next) != call {
                    return self.engine.close_session(now, session);
                }
                *last = next;
                let arena = Arena::new(own, region.arena(slot, rank));
                words::with(arena.word(), |word| {
                    if arrivals::publish(word, next) {
                        self.pace.wake(word);
                    }
                });
            }
            Some(Note::Pulse { slot }) => self.outgoing.heard_pulse(rank, slot),
            Some(note @ (Note::Left | Note::Masked)) if !port.has_left && !port.has_masked => {
                let farewell = match note {
                    Note::Left => {
                        port.has_left = true;
                        queue.push_back(Outbound::Note(Note::Parted));
                        Farewell::Left
                    }
                    _ => {
                        port.has_masked = true;
                        queue.push_back(Outbound::Note(Note::Parted));
                        Farewell::Masked
                    }
                };
                for slot in 0..self.slots {
                    let arena = Arena::new(own, region.arena(slot, rank));
                    set_farewell(&arena, farewell);
                    words::with(arena.word(), |word| self.pace.wake(word));
                }
            }
            Some(Note::Parted) => port.has_parted = true,
            // It speaks another language, or of slots that there are not.
            _ => self.engine.close_session(now, session),
        }
    }

    /// A call has left for a rank.
    fn left(&mut self, session: SessionId, slot: u32) {
        let Some(&rank) = self.sessions.get(&session) else { return };
        let Some((_, _, port)) = port_of(&mut self.peers, rank) else { return };
        if let Some(at) = port.posted.iter().position(|&posted| posted == slot) {
            port.posted.swap_remove(at);
            self.outgoing.left(rank, slot);
        }
    }

    fn queue_call(&mut self, call: OutgoingCall) {
        let (rank, slot) = (call.rank, call.slot);
        match port_of(&mut self.peers, rank) {
            Some((_, queue, _)) => queue.push_back(Outbound::Call { call, ops_done: 0, within: 0 }),
            // It has gone meanwhile.
            None => self.outgoing.left(rank, slot),
        }
    }

    /// Ends the sessions of ranks that are masked, and says of which nothing can come any more.
    fn close_severed(&mut self, now: u64) {
        for rank in 0..self.ranks() {
            let is_new = self.outgoing.take_severed(rank);
            let Some((session, queue, port)) = port_of(&mut self.peers, rank) else { continue };
            if is_new {
                // Nothing more is sent but the word that it is masked.
                for outbound in queue.drain(..) {
                    if let Outbound::Call { call, .. } = outbound {
                        self.outgoing.left(rank, call.slot);
                    }
                }
                queue.push_back(Outbound::Note(Note::Masked));
                // Half, so that a dispatch that waits for the end of the session sees it.
                let longest_ns = LONGEST_SEVERING_NS.min(self.parting_ns / 2);
                port.severed_until_ns = Some(now + longest_ns);
            }
            // It has heard that, or does not hear: what is only on its way is lost with the session.
            if port.severed_until_ns.is_some_and(|until| now >= until || port.has_parted) {
                self.forget(session);
                self.engine.close_session(now, session);
            }
        }
        let over: Vec<(u32, SessionId)> =
            self.closing.extract_if(.., |(_, session)| self.engine.is_quiet(*session)).collect();
        for (rank, _) in over {
            if !self.peers.contains_key(&rank) && self.closing.iter().all(|(other, _)| *other != rank) {
                self.outgoing.set_quiet(rank, true);
            }
        }
    }

    fn has_masked(&mut self, session: SessionId) -> bool {
        let Some(&rank) = self.sessions.get(&session) else { return false };
        port_of(&mut self.peers, rank).is_some_and(|(_, _, port)| port.has_masked)
    }

    fn queue_pulses(&mut self) {
        for rank in 0..self.ranks() {
            // Of those that no port reaches, too: the thread does not sleep while something is asked of it.
            let waiting = self.outgoing.take_waiting(rank);
            let Some((_, queue, _)) = port_of(&mut self.peers, rank) else { continue };
            for slot in waiting {
                // Behind much that waits, its sign of life is that it sends.
                if queue.len() < MOST_WAITING_PULSES {
                    queue.push_back(Outbound::Note(Note::Pulse { slot }));
                }
            }
        }
    }

    /// Posts what the ports take. True if anything was taken.
    fn post(&mut self) -> bool {
        let mut active = false;
        let mut failed = Vec::new();
        for (&rank, peer) in &mut self.peers {
            if peer.lane.is_none() && !peer.queue.is_empty() {
                // Those of many peers are spread over the lanes.
                peer.lane = self.engine.side_lane(peer.session, (self.rank + rank) as usize);
            }
            let Some(lane) = peer.lane else { continue };
            let mut poster = Poster {
                engine: &mut self.engine,
                session: peer.session,
                lane,
                own_rank: self.rank,
                in_order: &mut self.in_order,
            };
            while let Some(outbound) = peer.queue.front_mut() {
                match poster.post(outbound) {
                    Ok(Progress::Whole) => {
                        let posted = peer.queue.pop_front();
                        if let (Some(Outbound::Call { call, .. }), PeerReach::Port(port)) =
                            (posted, &mut peer.reach)
                        {
                            port.posted.push(call.slot);
                        }
                        active = true;
                    }
                    Ok(Progress::Part) => active = true,
                    Ok(Progress::None) => break,
                    Err(_) => {
                        failed.push(peer.session);
                        break;
                    }
                }
            }
        }
        // What cannot be posted will never be.
        failed.into_iter().for_each(|session| self.engine.close_session(now_ns(), session));
        active
    }

    /// Says goodbye to ranks that ports reach, and waits for their answers: then what was sent to them is there.
    fn part(&mut self) {
        while let Some(call) = self.outgoing.next_call() {
            self.queue_call(call);
        }
        for peer in self.peers.values_mut() {
            if matches!(peer.reach, PeerReach::Port(_)) {
                peer.queue.push_back(Outbound::Note(Note::Left));
            }
        }
        let until = now_ns().saturating_add(self.parting_ns);
        let has_parted = |peer: &Peer| match &peer.reach {
            PeerReach::Port(port) => port.has_parted && peer.queue.is_empty(),
            PeerReach::Mapped(_) => peer.queue.is_empty(),
        };
        while !self.peers.values().all(has_parted) && now_ns() < until {
            let active = self.turn(&mut Vec::new());
            let mut sleep = || self.engine.park(now_ns(), self.outgoing.doorbell(), SHORT_SLEEP_NS, || true);
            if !active && sleep().is_err() {
                return;
            }
        }
    }

    fn is_met(&self, rank: u32) -> bool {
        self.peers.get(&rank).is_some_and(|peer| peer.is_ready)
    }

    fn tell_if_complete(&mut self) {
        if !(0..self.ranks()).all(|rank| rank == self.rank || self.is_met(rank)) {
            return;
        }
        let reach = |peer: &Peer| match &peer.reach {
            PeerReach::Mapped(memory) => Reach::Mapped(memory.clone()),
            PeerReach::Port(_) => Reach::Port,
        };
        let met = (0..self.ranks()).map(|rank| self.peers.get(&rank).map(reach)).collect();
        self.is_complete |= self.told.is_some();
        self.tell(Ok(met));
    }

    fn tell(&mut self, end: Result<Met, MeetError>) {
        if let Some(told) = self.told.take() {
            // Whoever does not wait any more has said so.
            let _ = told.send(end);
        }
    }
}

/// A rank, if a port reaches it: its session, what waits to be posted, and the rest.
fn port_of(
    peers: &mut BTreeMap<u32, Peer>,
    rank: u32,
) -> Option<(SessionId, &mut VecDeque<Outbound>, &mut PortPeer)> {
    match peers.get_mut(&rank)? {
        Peer { session, queue, reach: PeerReach::Port(port), .. } => Some((*session, queue, port)),
        Peer { reach: PeerReach::Mapped(_), .. } => None,
    }
}

/// The doorbell wakes the thread earlier.
const LONGEST_SLEEP_NS: u64 = 1_000_000_000;
const SHORT_SLEEP_NS: u64 = 5_000_000;
/// How long a rank that is masked is told so before its session is ended.
const LONGEST_SEVERING_NS: u64 = 1_000_000_000;
const MOST_WAITING_PULSES: usize = 64;
