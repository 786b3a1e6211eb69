//! A medium for tests, whose moves are carried out after `start` has returned: when a test says so, a few in each poll, or
//! by a thread. It looks that the port keeps what its moves use, and fails where a test wants it to.

#![allow(dead_code)]

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossdock_host::{
    Attaching, Bell, Ended, HeardOffer, HostOptions, HostPort, Kind, Medium, Move, Offer, OfferForm, Payload,
    Refusal, Registered, Share, Ticket,
};
use crossdock_memory::{Memory, MemoryKind};
use crossdock_transport::{Direction, DownCause, Error, Op, Result, Shape};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// When moves are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// When the test [says](Hand::carry_out) so.
    ByHand,
    /// So many in each poll of the port.
    EachPoll(usize),
    /// As soon as a thread comes to it, which wakes the port.
    ByThread,
}

/// How moves are cut.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Moves that wait at a time.
    pub moves: usize,
    /// Bytes of a span, in one move.
    pub span_bytes: u64,
    /// Pieces of a paged op, in one move.
    pub pieces: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { moves: 64, span_bytes: 1 << 20, pieces: 4096 }
    }
}

/// What a move that is to fail ends its lane with.
pub const FAILURE: DownCause = DownCause::Broken { call: "a move that was to fail", errno: 5 };

/// The medium.
pub struct Later {
    pace: Pace,
    limits: Limits,
    hand: Hand,
    /// Started, and not handed over before the end of the call of `post`.
    gathered: Vec<Job>,
    last_ticket: u64,
    starts: u64,
    thread: Option<JoinHandle<()>>,
}

/// What a test holds on to a port's moves by, also when the port is gone.
#[derive(Clone, Default)]
pub struct Hand {
    desk: Arc<Desk>,
}

#[derive(Default)]
struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Taken out of the queue, and being carried out.
    under_way: usize,
    is_stubborn: bool,
    is_over: bool,
    refusal: Option<Refusal>,
}

/// One move.
struct Job {
    ticket: u64,
    lane: Arc<Progress>,
    runs: Vec<Run>,
    fails: bool,
    /// The two sides, which the port has to keep until the job is over.
    local: Weak<Side>,
    remote: Weak<Side>,
}

/// Bytes from here to there.
struct Run {
    from: *const u8,
    to: *mut u8,
    bytes: usize,
}

// SAFETY: a run is used by whoever carries its job out, one thread at a time; the memory that it leads to is mapped in the
// whole process as long as the port keeps the job's two sides.
unsafe impl Send for Run {}

/// How far a lane is.
#[derive(Default)]
pub struct Progress {
    until: AtomicU64,
    /// The first ticket that failed; 0 if none did.
    failed: AtomicU64,
}

/// Something that the port keeps.
pub struct Side;

/// A peer's region that ops can use, mapped for this medium alone.
pub struct Remote {
    memory: Memory,
    side: Arc<Side>,
    _share: Share,
}

/// Opens a port, and gives the hand to its moves.
pub fn open(options: HostOptions, pace: Pace, limits: Limits) -> (HostPort<Later>, Hand) {
    let hand = Hand::default();
    let port = HostPort::open(options, |bell| Ok(Later::new(pace, limits, hand.clone(), bell)));
    (port.expect("a port can be opened"), hand)
}

impl Hand {
    /// Carries out up to so many moves, in order; how many there were.
    pub fn carry_out(&self, most: usize) -> usize {
        (0..most).take_while(|_| self.carry_out_next()).count()
    }

    pub fn carry_out_all(&self) -> usize {
        self.carry_out(usize::MAX)
    }

    /// Moves that wait.
    pub fn waiting(&self) -> usize {
        self.state().jobs.len()
    }

    /// The move that is so many behind the next one will fail.
    pub fn let_fail(&self, at: usize) {
        self.state().jobs[at].fails = true;
    }

    /// The next start is refused.
    pub fn refuse(&self, refusal: Refusal) {
        self.state().refusal = Some(refusal);
    }

    /// Moves go on when the port is dropped.
    pub fn be_stubborn(&self) {
        self.state().is_stubborn = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.desk.state.lock()
    }

    fn carry_out_next(&self) -> bool {
        let mut state = self.state();
        let Some(job) = state.jobs.pop_front() else { return false };
        state.under_way += 1;
        drop(state);
        job.carry_out();
        self.state().under_way -= 1;
        self.desk.changed.notify_all();
        true
    }
}

impl Job {
    fn carry_out(self) {
        let kept = self.local.upgrade().zip(self.remote.upgrade());
        assert!(kept.is_some(), "the port keeps what a move uses");
        let done = if self.fails { self.runs.len() / 2 } else { self.runs.len() };
        for run in &self.runs[..done] {
            // SAFETY: both ends lie in regions that the port has checked and keeps, as was just seen; they are mapped
            // apart. That nobody else writes there meanwhile is the part of the test, or of the peer.
            unsafe { run.from.copy_to_nonoverlapping(run.to, run.bytes) };
        }
        if self.fails {
            let _ = self.lane.failed.compare_exchange(0, self.ticket, Ordering::Relaxed, Ordering::Relaxed);
        }
        // The bytes, and the failure, are seen by whoever sees this.
        self.lane.until.store(self.ticket, Ordering::Release);
    }
}

impl Later {
    fn new(pace: Pace, limits: Limits, hand: Hand, bell: Bell) -> Self {
        let thread = (pace == Pace::ByThread).then(|| {
            let hand = hand.clone();
            std::thread::spawn(move || hand.serve(&bell))
        });
        Self { pace, limits, hand, gathered: Vec::new(), last_ticket: 0, starts: 0, thread }
    }
}

impl Hand {
    /// What the thread does until the medium ends.
    fn serve(&self, bell: &Bell) {
        loop {
            let mut state = self.state();
            while state.jobs.is_empty() && !state.is_over {
                self.desk.changed.wait(&mut state);
            }
            if state.is_over {
                return;
            }
            drop(state);
            if self.carry_out_next() {
                bell.ring();
            }
        }
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        self.hand.state().is_over = true;
        self.hand.desk.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("moves go well");
        }
    }
}

impl Medium for Later {
    const KIND: &'static Kind = &Kind {
        name: "later",
        address_magic: *b"xla\x01",
        key_magic: *b"xlk\x01",
        offers: &[OfferForm { number: FORM, payload_bytes: MARK.len(), with_descriptor: true }],
    };
    type Region = Arc<Side>;
    type Offered = crossdock_host::PeerDescriptor;
    type Remote = Remote;
    type Lane = Arc<Progress>;

    fn register(&mut self, memory: &Memory) -> Result<Arc<Side>> {
        if memory.kind() != MemoryKind::Shared {
            return Err(Error::Unsupported { what: "memory of another kind", advice: "allocate it" });
        }
        Ok(Arc::new(Side))
    }

    fn offer<'a>(&self, region: &'a Registered<Arc<Side>>) -> Offer<'a> {
        Offer { form: FORM, payload: Payload::new(MARK), descriptor: region.memory.fd() }
    }

    fn hear(&mut self, offer: HeardOffer, _bytes: u64) -> std::result::Result<Self::Offered, DownCause> {
        match offer.descriptor {
            Some(descriptor) if *offer.payload == *MARK => Ok(descriptor),
            _ => Err(DownCause::PeerMisbehaved { what: "offered something else" }),
        }
    }

    fn attach(&mut self, offered: &Self::Offered, attaching: &Attaching<'_>) -> Result<Remote> {
        let fd = offered.as_fd().try_clone_to_owned().expect("a descriptor is left");
        let memory = Memory::from_fd(fd, attaching.bytes as usize)
            .map_err(|_| Error::BadKey { reason: "its memory cannot be mapped" })?;
        Ok(Remote { memory, side: Arc::new(Side), _share: offered.share() })
    }

    fn is_exposed(_region: &Registered<Arc<Side>>) -> bool {
        false
    }

    fn room(&self, _lane: &Arc<Progress>, op: &Op<'_>, _moved_bytes: u64) -> u64 {
        if self.gathered.len() + self.hand.waiting() >= self.limits.moves {
            return 0;
        }
        match op.shape {
            Shape::Span { .. } => self.limits.span_bytes,
            Shape::Pages { .. } => self.limits.pieces,
        }
    }

    fn start(
        &mut self,
        lane: &mut Arc<Progress>,
        op: &Move<'_, Self>,
    ) -> std::result::Result<Option<Ticket>, Refusal> {
        if let Some(refusal) = self.hand.state().refusal.take() {
            return Err(refusal);
        }
        // Now and then it is not the time.
        self.starts += 1;
        if self.pace != Pace::ByHand && self.starts.is_multiple_of(7) {
            return Ok(None);
        }
        self.last_ticket += 1;
        let (here, there) = (op.local.memory.base(), op.remote.memory.base());
        let runs = runs(op.op, here, there);
        assert_eq!(runs.iter().map(|run| run.bytes as u64).sum::<u64>(), op.bytes);
        self.gathered.push(Job {
            ticket: self.last_ticket,
            lane: lane.clone(),
            runs,
            fails: false,
            local: Arc::downgrade(&op.local.region),
            remote: Arc::downgrade(&op.remote.side),
        });
        Ok(Some(Ticket(self.last_ticket)))
    }

    fn flush(&mut self, _lane: &mut Arc<Progress>) {
        self.hand.state().jobs.extend(self.gathered.drain(..));
        self.hand.desk.changed.notify_all();
    }

    fn poll(&mut self) {
        if let Pace::EachPoll(most) = self.pace {
            self.hand.carry_out(most);
        }
    }

    fn ended(&mut self, lane: &mut Arc<Progress>) -> Ended {
        let until = Ticket(lane.until.load(Ordering::Acquire));
        let failed = lane.failed.load(Ordering::Relaxed);
        Ended { until, failed: (failed != 0).then_some((Ticket(failed), FAILURE)) }
    }

    fn wakes(&mut self) -> bool {
        self.pace == Pace::ByThread
    }

    fn stop(&mut self, deadline: Instant) {
        assert!(deadline > Instant::now() && deadline < Instant::now() + Duration::from_secs(60));
        if self.hand.state().is_stubborn {
            return;
        }
        match self.pace {
            Pace::ByHand | Pace::EachPoll(_) => while self.hand.carry_out(1) > 0 {},
            Pace::ByThread => {
                let goes_on = |state: &mut State| !state.jobs.is_empty() || state.under_way > 0;
                let mut state = self.hand.state();
                self.hand.desk.changed.wait_while_for(&mut state, goes_on, deadline - Instant::now());
            }
        }
    }
}

/// An op, run by run.
fn runs(op: &Op<'_>, here: *mut u8, there: *mut u8) -> Vec<Run> {
    let run = |local_offset: u64, remote_offset: u64, bytes: u64| {
        let (here, there) =
            (here.wrapping_add(local_offset as usize), there.wrapping_add(remote_offset as usize));
        let (from, to) = match op.direction {
            Direction::Write => (here, there),
            Direction::Read => (there, here),
        };
        Run { from, to, bytes: bytes as usize }
    };
    match op.shape {
        Shape::Span { local_offset, remote_offset, bytes, .. } => {
            vec![run(local_offset, remote_offset, bytes)]
        }
        Shape::Pages {
            local_offset,
            local_stride_bytes,
            local_pages,
            remote_offset,
            remote_stride_bytes,
            remote_pages,
            piece_bytes,
            ..
        } => {
            let pages = local_pages.iter().zip(remote_pages);
            let place = |offset, stride, page: &u32| offset + u64::from(*page) * stride;
            pages
                .map(|(local, remote)| {
                    let local = place(local_offset, local_stride_bytes, local);
                    run(local, place(remote_offset, remote_stride_bytes, remote), piece_bytes)
                })
                .collect()
        }
    }
}

const FORM: u8 = 3;
const MARK: &[u8] = b"told of a region, later";
