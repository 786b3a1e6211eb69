//! The life of a lane, from its queue pair's creation to its destruction.
//!
//! ```text
//! Open ──connect──▶ Meeting ──both hellos──▶ Up ──close──▶ Closing ──bye heard, or time over──▶ Draining ──▶ Ended
//!   any state ──an error, the peer's bye────────────────────────────────────────────────────▶ Draining ──▶ Ended
//! ```
//!
//! `Draining` is the fence: the queue pair is in error, so the device takes no packet of the peer any more; what was
//! posted comes back flushed; then the queue pair is destroyed, and only then `Down` is said. Nothing of that needs
//! the peer.

use std::time::{Duration, Instant};

use crossdock_transport::{
    DeviceError, DeviceName, DownCause, Error, Event, Events, LaneId, LaneTags, Op, PeerId, Posted, Result,
    Token,
};
use subtle::ConstantTimeEq;

use crate::address::End;
use crate::domain::Domain;
use crate::ibverbs::chain::Work;
use crate::ibverbs::context::Failed;
use crate::ibverbs::objects::{Path, QueuePair, RECEIVE_BYTES};
use crate::ibverbs::status;
use crate::message::{Hello, Word};
use crate::sending::{Sending, Taken};

pub(crate) struct Lane {
    pub id: LaneId,
    /// Its place among the lanes of the port.
    slot: usize,
    pub peer: PeerId,
    pub state: State,
    /// Whether it is in the port's queue of lanes that want a turn.
    pub queued: bool,
    /// `None` once it was destroyed.
    queue_pair: Option<QueuePair>,
    pub number: u32,
    pub first_packet: u32,
    pub sending: Sending,
    /// Immediates that the peer may have on their way.
    immediates: u32,
    /// Immediates heard since credits were last given back.
    heard: u32,
    pub remote: Option<End>,
    /// Whether `Up` was said.
    was_up: bool,
    /// Whether requests were posted since the last look for signs of life.
    spoke: bool,
}

/// Where a lane is in its life.
pub(crate) enum State {
    /// It has an address.
    Open,
    /// Connected, as far as the device knows; the ends have not shown each other their tags.
    Meeting(Box<Meeting>),
    Up,
    /// About to end; the peer is being told.
    Closing {
        cause: DownCause,
        deadline: Instant,
    },
    /// The queue pair is in error and about to be destroyed.
    Draining(Drain),
    /// Destroyed, and `Down` is still to be said.
    Ended(DownCause),
}

/// What a lane waits for before its queue pair is destroyed.
pub(crate) struct Drain {
    cause: DownCause,
    /// The device has said that the queue pair takes no more of the shared receives, or has had time to.
    is_last_receive_taken: bool,
    /// Until when that is waited for: not every device says so.
    quiet: Instant,
    /// How often the completion queue had been emptied when everything else was done. It is once more before the end:
    /// what came for this lane is told, and its receives are posted again.
    emptied: Option<u64>,
    /// Until when all that is waited for.
    deadline: Instant,
}

/// What a lane knows until it is up.
pub(crate) struct Meeting {
    pub tags: LaneTags,
    /// One end says hello first, and as often as it takes; the other answers. So only one of them can be too early.
    pub first: bool,
    pub path: Path,
    pub deadline: Instant,
}

/// What a lane needs after a turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// A completion, or its deadline.
    Sleep,
    /// Another turn.
    Again,
    /// Nothing ever again.
    Remove,
}

/// How lanes of a port are set up.
#[derive(Clone, Copy)]
pub(crate) struct Habits {
    pub port: u8,
    pub partition_key_index: u16,
    pub ack_timeout_exponent: u8,
    pub retries: u8,
    /// Reads that this end may have out, by the device.
    pub reads: u8,
    pub reads_served: u8,
    pub immediates: u32,
    pub depth: u32,
    pub close_timeout: Duration,
    #[cfg(feature = "fake")]
    pub floods: bool,
}

impl Lane {
    pub fn new(
        id: LaneId,
        slot: usize,
        peer: PeerId,
        queue_pair: QueuePair,
        first_packet: u32,
        habits: &Habits,
    ) -> Self {
        Self {
            id,
            slot,
            peer,
            state: State::Open,
            queued: false,
            number: queue_pair.number,
            queue_pair: Some(queue_pair),
            first_packet,
            sending: Sending::new(id.0, habits.depth),
            immediates: habits.immediates,
            heard: 0,
            remote: None,
            was_up: false,
            spoke: false,
        }
    }

    fn queue_pair(&self) -> &QueuePair {
        self.queue_pair.as_ref().expect("it is destroyed only when the lane has ended")
    }

    #[cfg(feature = "fake")]
    pub fn push_into_error(&self) {
        // One that was destroyed is in error for good.
        let _ = self.queue_pair.as_ref().map(QueuePair::to_error);
    }

    /// Whether ops can be posted, and what to say if not.
    pub fn check_up(&self) -> Result<()> {
        match self.state {
            State::Up => Ok(()),
            State::Open | State::Meeting(_) => Err(Error::LaneNotUp { lane: self.id }),
            State::Closing { .. } | State::Draining(_) | State::Ended(_) => {
                Err(Error::LaneDown { lane: self.id })
            }
        }
    }

    /// Until when the present state may last.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Meeting(meeting) => Some(meeting.deadline),
            State::Closing { deadline, .. } => Some(*deadline),
            State::Draining(drain) if !drain.is_last_receive_taken => Some(drain.quiet.min(drain.deadline)),
            State::Draining(drain) => Some(drain.deadline),
            State::Open | State::Up | State::Ended(_) => None,
        }
    }

    /// Sets the queue pair up for its other end. The first to speak says hello.
    pub fn connect(&mut self, meeting: Meeting, remote: End, domain: &mut Domain) -> Result<()> {
        self.remote = Some(remote);
        if let Err(failed) = self.to_rts(&meeting.path, &domain.habits) {
            self.remote = None;
            return Err(failed.into());
        }
        let first = meeting.first;
        self.state = State::Meeting(Box::new(meeting));
        if first {
            self.say_hello(domain);
        }
        Ok(())
    }

    fn to_rts(&self, path: &Path, habits: &Habits) -> std::result::Result<(), Failed> {
        let remote = self.remote.expect("a lane that meets has an other end");
        let queue_pair = self.queue_pair();
        queue_pair.to_receive(path, remote.queue_pair, remote.first_packet, habits.reads_served)?;
        // A peer that serves none would leave reads waiting for ever: one is the least that every device serves.
        let reads = habits.reads.min(remote.reads_served).max(1);
        queue_pair.to_send(self.first_packet, reads, habits.ack_timeout_exponent, habits.retries)
    }

    fn say_hello(&mut self, domain: &mut Domain) {
        let State::Meeting(meeting) = &self.state else { return };
        let hello = Hello { immediates: self.immediates, tag: meeting.tags.ours }.encode();
        let offset = self.slot * RECEIVE_BYTES;
        domain.messages.memory().write(offset, &hello).expect("there is a place for each lane's hello");
        let message = Some((offset as u64, Hello::BYTES as u32));
        self.say(Work::Send(HELLO), message, domain);
    }

    fn say(&mut self, work: Work, message: Option<(u64, u32)>, domain: &mut Domain) -> bool {
        self.spoke = true;
        let queue_pair = self.queue_pair.as_ref().expect("a lane that speaks is not destroyed");
        let said = self.sending.say(work, message, queue_pair, domain);
        self.see_what_was_taken(domain);
        said
    }

    /// A device that does not take what there is room for has given the lane up.
    fn see_what_was_taken(&mut self, domain: &mut Domain) {
        if let Some(failed) = domain.post_failed.take() {
            domain.counters.device_errors += 1;
            self.fail(DownCause::Broken { call: failed.call, errno: failed.errno });
        }
    }

    /// Hands ops to the device; how many were taken whole, and how much of the next.
    pub fn post(&mut self, ops: &[Op<'_>], domain: &mut Domain) -> Result<Posted> {
        self.check_up()?;
        let queue_pair = self.queue_pair.as_ref().expect("a lane that is up is not destroyed");
        let mut posted = Posted::default();
        let mut refused = None;
        for op in ops {
            match self.sending.take(op, queue_pair, domain) {
                Ok(Taken::Whole) => posted.ops += 1,
                Ok(Taken::Within(within)) => {
                    posted.within = within;
                    break;
                }
                Err(error) => {
                    refused = Some(error).filter(|_| posted.ops == 0);
                    break;
                }
            }
        }
        self.sending.flush(queue_pair, domain);
        self.spoke |= posted != Posted::default();
        self.sending.came_short = posted.ops < ops.len();
        self.see_what_was_taken(domain);
        match refused {
            Some(error) => Err(error),
            None => Ok(posted),
        }
    }

    /// A request of this lane has ended well.
    pub fn completed(&mut self, request: u32, domain: &mut Domain) {
        self.sending.complete(request);
        domain.room_made |= self.sending.came_short && self.sending.has_room();
    }

    /// A request of this lane has failed, or was flushed.
    pub fn failed(&mut self, request: u32, status: u32, vendor: u32, domain: &mut Domain) {
        // Of before a reset, or after the end.
        if !self.sending.complete(request) || matches!(self.state, State::Draining(_) | State::Ended(_)) {
            return;
        }
        // Whoever says hello first may be too early, as long as there is time.
        if status == status::RETRY_EXCEEDED
            && let State::Meeting(meeting) = &self.state
            && meeting.first
            && Instant::now() < meeting.deadline
        {
            domain.counters.connect_retries += 1;
            if self.meet_again(domain).is_ok() {
                return;
            }
        }
        domain.counters.device_errors += 1;
        let cause = match self.state {
            State::Closing { cause, .. } => cause,
            State::Meeting(_) if status == status::RETRY_EXCEEDED => DownCause::ConnectTimedOut,
            _ => self.device_error(status, vendor, domain.name),
        };
        self.fail(cause);
    }

    /// A receive of this lane has failed: its queue pair is in error.
    pub fn receive_failed(&mut self, status: u32, vendor: u32, domain: &mut Domain) {
        if matches!(self.state, State::Meeting(_) | State::Up) {
            domain.counters.device_errors += 1;
            self.fail(self.device_error(status, vendor, domain.name));
        }
    }

    /// The device has put the queue pair into error by itself.
    pub fn gave_up(&mut self, event: u32, domain: &mut Domain) {
        match self.state {
            State::Draining(_) | State::Ended(_) => return,
            State::Closing { cause, .. } => return self.fail(cause),
            State::Open | State::Meeting(_) | State::Up => {}
        }
        domain.counters.device_errors += 1;
        let meaning = status::of_event(event);
        let peer = self.remote.map_or([0; 16], |remote| remote.gid.0);
        let (device, queue_pair) = (domain.name, self.number);
        let cause = DeviceError { device, status: event, meaning, vendor: 0, queue_pair, peer };
        self.fail(DownCause::Device(cause));
    }

    fn device_error(&self, status: u32, vendor: u32, device: DeviceName) -> DownCause {
        let meaning = status::of_completion(status);
        let peer = self.remote.map_or([0; 16], |remote| remote.gid.0);
        DownCause::Device(DeviceError { device, status, meaning, vendor, queue_pair: self.number, peer })
    }

    /// Begins the handshake anew on the same queue pair. The other end has not answered, so it has not sent anything.
    fn meet_again(&mut self, domain: &mut Domain) -> Result<()> {
        let State::Meeting(meeting) = std::mem::replace(&mut self.state, State::Open) else {
            unreachable!("only a lane that meets meets again")
        };
        let queue_pair = self.queue_pair();
        queue_pair.to_reset()?;
        queue_pair.to_init(domain.habits.port, domain.habits.partition_key_index)?;
        self.sending.reset();
        let begun = self.to_rts(&meeting.path, &domain.habits);
        self.state = State::Meeting(meeting);
        begun?;
        self.say_hello(domain);
        Ok(())
    }

    /// The peer has said hello; whether the lane is up by that. It is from this moment on: what comes next on it counts.
    pub fn hello(&mut self, bytes: &[u8], domain: &mut Domain) -> bool {
        let cause = match (&self.state, Hello::decode(bytes)) {
            (State::Meeting(_), Err(cause)) => cause,
            (State::Meeting(meeting), Ok(hello)) => {
                if !bool::from(hello.tag[..].ct_eq(&meeting.tags.theirs[..])) {
                    DownCause::NotAuthentic
                } else {
                    let immediates = hello.immediates;
                    #[cfg(feature = "fake")]
                    let immediates = if domain.habits.floods { u32::MAX } else { immediates };
                    self.sending.begin(immediates);
                    if !meeting.first {
                        self.say_hello(domain);
                    }
                    // The device may not have taken the answer.
                    let is_up = matches!(self.state, State::Meeting(_));
                    if is_up {
                        self.state = State::Up;
                    }
                    self.was_up = is_up;
                    return is_up;
                }
            }
            (State::Up, _) => DownCause::PeerMisbehaved { what: "it said hello twice" },
            _ => return false,
        };
        self.part(cause, domain);
        false
    }

    /// The peer has said a word.
    pub fn word(&mut self, imm: u32, domain: &mut Domain) {
        match Word::decode(imm) {
            Ok(Word::Bye) => self.fail(match self.state {
                State::Closing { cause, .. } => cause,
                _ => DownCause::ClosedByPeer,
            }),
            Ok(Word::Credits(count)) if self.sending.credit(count) => {
                domain.room_made |= self.sending.came_short && self.sending.has_room();
            }
            Ok(Word::Credits(_)) => {
                let cause = DownCause::PeerMisbehaved { what: "it gave more credits than it has room" };
                self.part(cause, domain);
            }
            Err(cause) => self.part(cause, domain),
        }
    }

    /// An immediate has come; whether it may be told.
    pub fn immediate(&mut self, domain: &mut Domain) -> bool {
        self.heard += 1;
        if self.heard > self.immediates {
            let cause = DownCause::PeerMisbehaved { what: "it sent more immediates than it may" };
            self.part(cause, domain);
            return false;
        }
        self.was_up
    }

    /// Whether enough immediates were heard to let the peer send more.
    fn owes_credits(&self) -> bool {
        self.heard > 0 && self.heard >= self.immediates / 2 && matches!(self.state, State::Up)
    }

    /// Whether the lane wants a turn beyond what completions bring.
    pub fn wants_turn(&self) -> bool {
        match &self.state {
            State::Open | State::Meeting(_) => false,
            State::Up => self.owes_credits(),
            State::Closing { .. } | State::Draining(_) => self.sending.out() == 0,
            State::Ended(_) => true,
        }
    }

    /// The peer has done what it must not do.
    pub fn misbehaved(&mut self, what: &'static str, domain: &mut Domain) {
        self.part(DownCause::PeerMisbehaved { what }, domain);
    }

    /// Tells the peer and ends. Only once: whatever the peer does meanwhile, its time is limited.
    fn part(&mut self, cause: DownCause, domain: &mut Domain) {
        if matches!(self.state, State::Meeting(_) | State::Up) {
            let said = self.say(Work::Send(Word::Bye.encode()), None, domain);
            match self.state {
                State::Meeting(_) | State::Up if said => {
                    self.state =
                        State::Closing { cause, deadline: Instant::now() + domain.habits.close_timeout };
                }
                _ => self.fail(cause),
            }
        }
    }

    /// The queue pair takes nothing from the peer any more, from now on.
    pub fn fail(&mut self, cause: DownCause) {
        if matches!(self.state, State::Draining(_) | State::Ended(_)) {
            return;
        }
        if let Some(queue_pair) = &self.queue_pair {
            // Destroying it does the same, should this fail.
            let _ = queue_pair.to_error();
        }
        let now = Instant::now();
        // One that was never connected has taken no receive.
        let quiet = if self.was_up { now + LAST_RECEIVE_TIMEOUT } else { now };
        let deadline = now + DRAIN_TIMEOUT;
        self.state =
            State::Draining(Drain { cause, is_last_receive_taken: false, quiet, emptied: None, deadline });
    }

    /// The device says that the queue pair takes no more of the shared receives.
    pub fn last_receive_taken(&mut self) {
        if let State::Draining(drain) = &mut self.state {
            (drain.is_last_receive_taken, drain.emptied) = (true, None);
        }
    }

    /// Begins the end, as its owner wants.
    pub fn close(&mut self, domain: &mut Domain) {
        match &self.state {
            // The other end can be up already, if it has heard this one's hello.
            State::Meeting(meeting) if meeting.first => self.part(DownCause::ClosedHere, domain),
            State::Up => self.part(DownCause::ClosedHere, domain),
            State::Open | State::Meeting(_) => self.fail(DownCause::ClosedHere),
            State::Closing { .. } | State::Draining(_) | State::Ended(_) => {}
        }
    }

    /// Its time is over.
    pub fn expire(&mut self) {
        match self.state {
            State::Meeting(_) => self.fail(DownCause::ConnectTimedOut),
            State::Closing { cause, .. } => self.fail(cause),
            State::Draining(_) | State::Open | State::Up | State::Ended(_) => {}
        }
    }

    /// Asks whether the peer's device answers, if nothing else has asked.
    pub fn keep_alive(&mut self, domain: &mut Domain) {
        let spoke = std::mem::take(&mut self.spoke);
        if matches!(self.state, State::Up) && !spoke && self.sending.out() == 0 {
            domain.counters.keepalives += u64::from(self.say(Work::Write, None, domain));
            self.spoke = false;
        }
    }

    /// The next token to be told.
    pub fn next_done(&mut self) -> Option<Token> {
        match self.state {
            State::Up | State::Closing { .. } => self.sending.next_done(),
            _ => None,
        }
    }

    /// Waits for what is to come of the queue pair, and destroys it; `None` once that is done.
    fn drain(&mut self, domain: &mut Domain) -> Option<After> {
        let State::Draining(drain) = &mut self.state else { return None };
        let now = Instant::now();
        drain.is_last_receive_taken |= now >= drain.quiet;
        if now < drain.deadline {
            if self.sending.out() > 0 || !drain.is_last_receive_taken {
                return Some(After::Sleep);
            }
            if *drain.emptied.get_or_insert(domain.emptied) == domain.emptied {
                return Some(After::Again);
            }
        }
        let cause = drain.cause;
        match self.queue_pair.take().map(QueuePair::destroy) {
            Some(Err((queue_pair, _))) => {
                // As long as the device knows it, nobody can say that it touches nothing.
                self.queue_pair = Some(queue_pair);
                drain.deadline = now + DRAIN_TIMEOUT;
                Some(After::Sleep)
            }
            Some(Ok(())) | None => {
                domain.counters.queue_pairs_destroyed += 1;
                self.state = State::Ended(cause);
                None
            }
        }
    }

    pub fn turn(&mut self, events: &mut Events, domain: &mut Domain) -> After {
        loop {
            match &self.state {
                State::Open | State::Meeting(_) => return After::Sleep,
                State::Up => {
                    if self.owes_credits() {
                        // A credit is a receive that is posted: else the peer's device would find none.
                        if !domain.restocked {
                            return After::Again;
                        }
                        let word = Word::Credits(self.heard).encode();
                        if self.say(Work::Send(word), None, domain) {
                            domain.counters.credit_messages += 1;
                            self.heard = 0;
                        }
                    }
                    // Without room for it, a completion calls again.
                    return After::Sleep;
                }
                State::Closing { cause, .. } => {
                    if self.sending.out() > 0 {
                        return After::Sleep;
                    }
                    let cause = *cause;
                    self.fail(cause);
                }
                State::Draining(_) => {
                    if let Some(after) = self.drain(domain) {
                        return after;
                    }
                }
                State::Ended(cause) => {
                    if events.is_full() {
                        return After::Again;
                    }
                    events.push(Event::Down { lane: self.id, cause: *cause });
                    return After::Remove;
                }
            }
        }
    }
}

/// The immediate of a hello, which no word has.
pub(crate) const HELLO: u32 = 0;
/// How long a device may take to say that a queue pair takes no more of the shared receives. Soft-RoCE never does.
const LAST_RECEIVE_TIMEOUT: Duration = Duration::from_millis(10);
/// How long what was posted may take to come back flushed. Destroying the queue pair is the fence; this is courtesy.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
