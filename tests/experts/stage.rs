//! The scheduler: every rank's threads, of which one runs at a time, a clock that moves when nobody can run, and what
//! happens to the ranks meanwhile. One seed is one run.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crossdock_ep::{Mourner, Pace};
use crossdock_memory::Memory;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::inputs::Random;
use crate::plan::{Armed, Fault, Pattern, Phase, Plan};
use crate::tally::Tally;

thread_local! {
    /// Which of the threads this is.
    static ME: Cell<Option<usize>> = const { Cell::new(None) };
    /// It does what faults do, and goes on at once.
    static ACTING: Cell<bool> = const { Cell::new(false) };
}

/// Where the threads of all ranks meet.
pub struct Stage {
    state: Mutex<State>,
    signals: Vec<Condvar>,
    hands: Mutex<Hands>,
}

/// What faults reach into the groups with.
#[derive(Default)]
pub struct Hands {
    pub mourners: Vec<Mourner>,
    /// By rank: its memory, and what checksums cover there, by kind.
    pub sealed: Vec<(Memory, Vec<Vec<Range<usize>>>)>,
    /// By rank: what some of it was.
    pub kept: BTreeMap<usize, Vec<(usize, Vec<u8>)>>,
}

struct State {
    random: Random,
    pattern: Pattern,
    now: Duration,
    /// How much of that was jumps over which the whole job was stopped.
    jumped: Duration,
    deadline: Duration,
    /// The longest that a call may last.
    bound: Duration,
    /// By when the last call has to be over.
    end: Duration,
    running: Option<usize>,
    over: bool,
    violation: Option<String>,
    threads: Vec<Thread>,
    ranks: Vec<Process>,
    notices: Vec<(Duration, Notice)>,
    actions: Vec<Action>,
    /// How often something has happened that masks may follow from.
    disturbances: u32,
    flips: u32,
    /// Whose memory has been kept, to become what it was.
    kept: Option<usize>,
    may_misalign: bool,
    turns: u64,
    hash: u64,
    longest: Duration,
    tally: Tally,
}

struct Thread {
    rank: usize,
    slot: u32,
    doing: Doing,
    phase: Phase,
    step: u32,
    passes: u32,
    priority: u64,
    call: Option<Call>,
}

/// A call under way: since when, and what of the time does not count.
#[derive(Clone, Copy)]
struct Call {
    begun: Duration,
    excused: Duration,
}

#[derive(Clone, Copy, PartialEq)]
enum Doing {
    Ready,
    Asleep {
        word: usize,
        until: Duration,
    },
    /// Waits for the other threads of its rank.
    Joins,
    Ended,
}

#[derive(Default)]
struct Process {
    dead: bool,
    stopped_until: Duration,
    stopped: Duration,
    /// Others may mask it.
    guilty: bool,
    /// The ranks that this one knows to be gone, and since when.
    gone: BTreeMap<u32, Duration>,
    finished: bool,
    faults: Vec<Armed>,
}

enum Notice {
    Dead {
        at: u32,
        rank: u32,
    },
    /// A stalled rank goes on.
    Awake,
}

enum Action {
    MarkDead { at: u32, rank: u32 },
    Stale { rank: usize, kind: u64 },
    Flip { rank: usize, place: u64, bit: u8 },
}

enum Next {
    Runs(usize),
    Acts(Vec<Action>),
    Over,
}

/// What a life came to.
pub struct Outcome {
    pub violation: Option<String>,
    pub hash: u64,
    pub turns: u64,
    /// The longest call, in deadlines.
    pub longest: f64,
    pub tally: Tally,
}

impl Stage {
    pub fn new(plan: &Plan) -> Stage {
        let mut random = Random::new(plan.seed ^ 0x5ced);
        let (ranks, slots) = (plan.config.ranks() as usize, plan.config.slots);
        let thread = |at: usize| Thread {
            rank: at / slots as usize,
            slot: at as u32 % slots,
            doing: Doing::Ready,
            phase: Phase::Between,
            step: 0,
            passes: 0,
            priority: random.next(),
            call: None,
        };
        let threads: Vec<Thread> = (0..ranks * slots as usize).map(thread).collect();
        let faults =
            |rank: usize| plan.faults.iter().filter(|armed| armed.rank as usize == rank).cloned().collect();
        let signals = threads.iter().map(|_| Condvar::new()).collect();
        let bound = plan.options.warm_up * CALL_LIMITS;
        let state = State {
            pattern: plan.pattern,
            now: Duration::from_secs(1),
            jumped: Duration::ZERO,
            deadline: plan.options.deadline,
            bound,
            end: bound * 2 * (plan.steps() + 4),
            running: None,
            over: false,
            violation: None,
            threads,
            ranks: (0..ranks).map(|rank| Process { faults: faults(rank), ..Process::default() }).collect(),
            notices: Vec::new(),
            actions: Vec::new(),
            disturbances: 0,
            flips: 0,
            kept: None,
            may_misalign: plan.may_misalign(),
            turns: 0,
            hash: 0xcbf2_9ce4_8422_2325,
            longest: Duration::ZERO,
            tally: Tally::default(),
            random,
        };
        Stage { state: Mutex::new(state), signals, hands: Mutex::default() }
    }

    /// Gives the faults what they reach into the groups with.
    pub fn give(&self, hands: Hands) {
        *self.hands.lock() = hands;
    }

    /// Lets the first thread run. Their threads are there, or will be.
    pub fn begin(&self) {
        let mut state = self.state.lock();
        let first = state.random.below(self.signals.len() as u32) as usize;
        state.running = Some(first);
        self.signals[first].notify_one();
    }

    /// This thread is that one; it waits for its turn.
    pub fn enter(&self, me: usize) {
        ME.set(Some(me));
        self.await_turn(self.state.lock(), me);
    }

    /// This thread has nothing more to do.
    pub fn leave(&self) {
        let Some(me) = ME.take() else { return };
        let mut state = self.state.lock();
        if !state.over {
            state.threads[me].doing = Doing::Ended;
            drop(self.hand_on(state, me));
        }
    }

    /// Waits until the other threads of this rank have ended.
    pub fn join(&self) {
        self.turn(Doing::Joins);
    }

    /// A rule is broken.
    pub fn violate(&self, what: String) {
        let mut state = self.state.lock();
        if !state.over {
            state.violation.get_or_insert(what);
            state.over = true;
            self.signals.iter().for_each(|signal| _ = signal.notify_all());
        }
    }

    /// A step begins, or a part of one.
    pub fn phase(&self, step: u32, phase: Phase) {
        let Some(me) = ME.get() else { return };
        let mut state = self.state.lock();
        let thread = &mut state.threads[me];
        (thread.step, thread.phase, thread.passes) = (step, phase, 0);
        drop(state);
        self.pass_here();
    }

    /// A place at which others may run.
    pub fn pass_here(&self) {
        self.turn(Doing::Ready);
    }

    /// A call begins: it must not last too long.
    pub fn call(&self) {
        let Some(me) = ME.get() else { return };
        let mut state = self.state.lock();
        let excused = state.excused(me);
        state.threads[me].call = Some(Call { begun: state.now, excused });
    }

    /// It has ended. Gives the ranks that this one knows to be gone, and how long after the call began it learnt it.
    pub fn call_ends(&self) -> Vec<(u32, Duration)> {
        let Some(me) = ME.get() else { return Vec::new() };
        let mut state = self.state.lock();
        state.judge_call(me);
        let call = state.threads[me].call.take();
        let excused = state.excused(me);
        // Of what has been stopped meanwhile nothing is said.
        let Some(call) = call.filter(|call| call.excused == excused) else { return Vec::new() };
        let gone = &state.ranks[state.threads[me].rank].gone;
        gone.iter().map(|(&rank, since)| (rank, since.saturating_sub(call.begun))).collect()
    }

    /// A rank has made a call that says whom it has masked. What a rank says to which nothing happened counts for all.
    pub fn says(&self, rank: u32, masked: &[u32]) {
        let mut state = self.state.lock();
        if !state.ranks[rank as usize].guilty && !state.may_misalign {
            masked.iter().for_each(|&rank| state.know_gone(rank));
        }
    }

    /// A rank has dropped its group: all know it.
    pub fn left(&self, rank: u32) {
        self.state.lock().know_gone(rank);
    }

    /// Whether others may mask a rank: something was done to it, or it has stopped calling.
    pub fn is_guilty(&self, rank: u32) -> bool {
        let state = self.state.lock();
        let process = &state.ranks[rank as usize];
        process.guilty || (process.finished && state.may_misalign)
    }

    /// A rank makes no further calls, though others may.
    pub fn quits(&self, rank: u32) {
        let mut state = self.state.lock();
        state.ranks[rank as usize].guilty = true;
        state.disturbances += 1;
    }

    /// Something has happened that masks may follow from.
    pub fn disturb(&self) {
        self.state.lock().disturbances += 1;
    }

    /// A rank has made all its calls.
    pub fn finishes(&self, rank: u32) {
        let mut state = self.state.lock();
        state.ranks[rank as usize].finished = true;
        // Others may wait for it in vain then.
        state.disturbances += u32::from(state.may_misalign);
    }

    pub fn disturbances(&self) -> u32 {
        self.state.lock().disturbances
    }

    pub fn flips(&self) -> u32 {
        self.state.lock().flips
    }

    /// A fault that is no part of the plan has met a phase.
    pub fn met(&self, fault: usize, phase: Phase) {
        self.state.lock().tally.met(fault, phase);
    }

    /// Counts what has happened.
    pub fn count(&self, what: &'static str) {
        self.state.lock().tally.count(what);
    }

    /// What a thread has got becomes part of the run's hash.
    pub fn note(&self, value: u64) {
        self.state.lock().mix(value);
    }

    pub fn outcome(&self) -> Outcome {
        let mut state = self.state.lock();
        Outcome {
            violation: state.violation.take(),
            hash: state.hash,
            turns: state.turns,
            longest: state.longest.as_secs_f64() / state.bound.as_secs_f64() * f64::from(CALL_LIMITS),
            tally: std::mem::take(&mut state.tally),
        }
    }

    fn turn(&self, doing: Doing) {
        let Some(me) = ME.get() else { return };
        if ACTING.get() || std::thread::panicking() {
            return;
        }
        let mut state = self.state.lock();
        if !state.over {
            state.threads[me].doing = doing;
            state.pass(me);
            state = self.hand_on(state, me);
        }
        self.await_turn(state, me);
    }

    /// Chooses who goes on.
    fn hand_on<'a>(&'a self, mut state: MutexGuard<'a, State>, me: usize) -> MutexGuard<'a, State> {
        loop {
            match state.choose(me) {
                Next::Runs(next) => {
                    state.running = Some(next);
                    if next != me {
                        self.signals[next].notify_one();
                    }
                    return state;
                }
                Next::Acts(actions) => MutexGuard::unlocked(&mut state, || self.act(actions)),
                Next::Over => {
                    state.over = true;
                    self.signals.iter().for_each(|signal| _ = signal.notify_all());
                    return state;
                }
            }
        }
    }

    fn await_turn(&self, mut state: MutexGuard<'_, State>, me: usize) {
        while state.running != Some(me) && !state.over {
            self.signals[me].wait(&mut state);
        }
        if state.over {
            drop(state);
            // Nobody goes on: not the dead, and nobody after a rule was broken.
            ME.take();
            std::panic::resume_unwind(Box::new(Over));
        }
        state.threads[me].doing = Doing::Ready;
    }

    fn act(&self, actions: Vec<Action>) {
        ACTING.set(true);
        let mut hands = self.hands.lock();
        let hands = &mut *hands;
        for action in actions {
            match action {
                Action::MarkDead { at, rank } => hands.mourners[at as usize].mark_dead(rank),
                Action::Stale { rank, kind } => {
                    let (memory, kinds) = &hands.sealed[rank];
                    match hands.kept.remove(&rank) {
                        Some(kept) => {
                            kept.iter().for_each(|(at, bytes)| memory.write(*at, bytes).expect(INSIDE));
                        }
                        None => {
                            let keep = |part: &Range<usize>| {
                                let mut bytes = vec![0; part.len()];
                                memory.read(part.start, &mut bytes).expect(INSIDE);
                                (part.start, bytes)
                            };
                            // Results with their checksums are the last.
                            let which = if kind & 1 == 0 {
                                kinds.len() - 1
                            } else {
                                (kind >> 1) as usize % kinds.len()
                            };
                            let parts = &kinds[which];
                            hands.kept.insert(rank, parts.iter().map(keep).collect());
                        }
                    }
                }
                Action::Flip { rank, place, bit } => {
                    let (memory, kinds) = &hands.sealed[rank];
                    let parts = &kinds[(place % kinds.len() as u64) as usize];
                    let part = &parts[(place >> 16) as usize % parts.len()];
                    // Most rows are few, and at the front; headers and masks begin lines.
                    let most = if place >> 32 & 1 == 0 { part.len().min(256) } else { part.len() };
                    let step = if place >> 33 & 1 == 0 { 1 } else { LINE_BYTES };
                    let at = part.start + (place >> 34) as usize % most / step * step;
                    let mut byte = [0];
                    memory.read(at, &mut byte).expect(INSIDE);
                    memory.write(at, &[byte[0] ^ 1 << bit]).expect(INSIDE);
                }
            }
        }
        ACTING.set(false);
    }
}

/// What unwinds the threads of a life that is over.
pub struct Over;

impl Pace for Stage {
    fn now(&self) -> Duration {
        self.state.lock().now
    }

    fn sleep(&self, word: &AtomicU32, value: u32, most: Duration) {
        let place = std::ptr::from_ref(word) as usize;
        let until = self.now() + most;
        let doing = match word.load(Ordering::SeqCst) == value {
            true => Doing::Asleep { word: place, until },
            false => Doing::Ready,
        };
        self.turn(doing);
    }

    fn wake(&self, word: &AtomicU32) {
        if ME.get().is_none() {
            return;
        }
        let place = std::ptr::from_ref(word) as usize;
        for thread in &mut self.state.lock().threads {
            if matches!(thread.doing, Doing::Asleep { word, .. } if word == place) {
                thread.doing = Doing::Ready;
            }
        }
        self.turn(Doing::Ready);
    }

    fn pass(&self) {
        self.turn(Doing::Ready);
    }
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stage").finish_non_exhaustive()
    }
}

impl State {
    fn mix(&mut self, value: u64) {
        self.hash = (self.hash ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    }

    fn know_gone(&mut self, rank: u32) {
        let now = self.now;
        self.ranks.iter_mut().for_each(|process| _ = process.gone.entry(rank).or_insert(now));
    }

    /// Time that does not count against a thread's calls.
    fn excused(&self, me: usize) -> Duration {
        self.jumped + self.ranks[self.threads[me].rank].stopped
    }

    fn judge_call(&mut self, me: usize) {
        let thread = &self.threads[me];
        let Some(call) = thread.call else { return };
        let lasted = (self.now - call.begun).saturating_sub(self.excused(me) - call.excused);
        self.longest = self.longest.max(lasted);
        if lasted > self.bound {
            let what = format!(
                "a call of rank {} in slot {}, step {}, {:?}, has lasted {lasted:?}",
                thread.rank, thread.slot, thread.step, thread.phase
            );
            self.violation.get_or_insert(what);
        }
    }

    /// A thread has come to a place where something may happen.
    fn pass(&mut self, me: usize) {
        self.judge_call(me);
        let thread = &mut self.threads[me];
        thread.passes += 1;
        let (rank, slot, step, phase, passes) =
            (thread.rank, thread.slot, thread.step, thread.phase, thread.passes);
        let is_due = |armed: &Armed| {
            armed.slot == slot && armed.step <= step && armed.phase == phase && armed.after <= passes
        };
        let Some(at) = self.ranks[rank].faults.iter().position(is_due) else { return };
        let fault = self.ranks[rank].faults[at].fault.clone();
        if matches!(fault, Fault::Flip | Fault::Stale)
            && (self.is_anyone_copying() || self.sealed_ranks().is_empty())
        {
            return;
        }
        if matches!(fault, Fault::Stale) && self.kept.is_some_and(|kept| !self.sealed_ranks().contains(&kept))
        {
            return;
        }
        self.ranks[rank].faults.remove(at);
        self.tally.met(fault.kind(), phase);
        self.happen(rank, fault);
    }

    /// Rows are compared with their checksums before they are copied: what is spoilt between is not found.
    fn is_anyone_copying(&self) -> bool {
        self.threads.iter().any(|thread| thread.phase == Phase::Rows && thread.doing == Doing::Ready)
    }

    /// The ranks whose results are sealed, or nobody's: what is spoilt before, nobody can find.
    fn sealed_ranks(&self) -> Vec<usize> {
        let is_open = |thread: &Thread| matches!(thread.phase, Phase::Compute | Phase::Combine);
        let is_sealed = |rank: &usize| !self.threads.iter().any(|t| t.rank == *rank && is_open(t));
        (0..self.ranks.len()).filter(is_sealed).collect()
    }

    fn happen(&mut self, rank: usize, fault: Fault) {
        let now = self.now;
        let process = &mut self.ranks[rank];
        match fault {
            Fault::Death { told } => {
                (process.dead, process.guilty) = (true, true);
                self.disturbances += 1;
                for (at, after) in told {
                    self.notices.push((now + after, Notice::Dead { at, rank: rank as u32 }));
                }
            }
            Fault::Stall(time) => {
                process.stopped_until = process.stopped_until.max(now + time);
                process.stopped += time;
                process.guilty |= time > self.deadline / 4;
                self.disturbances += 1;
                self.notices.push((now + time, Notice::Awake));
            }
            Fault::JobStopped(time) => {
                self.now += time;
                self.jumped += time;
                self.end += time;
            }
            Fault::FalselyDead { told } => {
                process.guilty = true;
                self.disturbances += 1;
                for (at, after) in told {
                    self.notices.push((now + after, Notice::Dead { at, rank: rank as u32 }));
                }
            }
            Fault::Stale => {
                self.flips += 1;
                let ranks = self.sealed_ranks();
                let any = ranks[self.random.below(ranks.len() as u32) as usize];
                let rank = self.kept.take().unwrap_or_else(|| *self.kept.insert(any));
                self.actions.push(Action::Stale { rank, kind: self.random.next() });
            }
            Fault::Flip => {
                self.flips += 1;
                let ranks = self.sealed_ranks();
                let rank = ranks[self.random.below(ranks.len() as u32) as usize];
                let (place, bit) = (self.random.next(), self.random.below(8) as u8);
                self.actions.push(Action::Flip { rank, place, bit });
            }
        }
    }

    fn choose(&mut self, me: usize) -> Next {
        self.now += Duration::from_micros(self.random.below(MOST_TICK_US).into());
        self.turns += 1;
        loop {
            if self.violation.is_none() && (self.now > self.end || self.turns > MOST_TURNS) {
                self.violation =
                    Some(format!("nobody comes to an end: {:?}, {} turns", self.now, self.turns));
            }
            if self.violation.is_some() || self.is_done() {
                return Next::Over;
            }
            self.hear_notices();
            if !self.actions.is_empty() {
                return Next::Acts(std::mem::take(&mut self.actions));
            }
            if let Some(next) = self.pick(me) {
                self.mix(next as u64 ^ (self.now.as_nanos() as u64) << 8);
                return Next::Runs(next);
            }
            let Some(next) = self.next_event() else { return Next::Over };
            self.now = self.now.max(next);
        }
    }

    fn is_done(&self) -> bool {
        self.threads.iter().all(|thread| thread.doing == Doing::Ended || self.ranks[thread.rank].dead)
    }

    fn hear_notices(&mut self) {
        let now = self.now;
        while let Some(at) = self.notices.iter().position(|(when, _)| *when <= now) {
            self.disturbances += 1;
            if let Notice::Dead { at, rank } = self.notices.remove(at).1 {
                if self.ranks[rank as usize].dead {
                    self.ranks[at as usize].gone.entry(rank).or_insert(now);
                }
                self.actions.push(Action::MarkDead { at, rank });
            }
        }
    }

    fn can_run(&self, thread: &Thread) -> bool {
        let process = &self.ranks[thread.rank];
        !process.dead
            && process.stopped_until <= self.now
            && match thread.doing {
                Doing::Ready => true,
                Doing::Asleep { until, .. } => until <= self.now,
                Doing::Joins => self.have_others_ended(thread),
                Doing::Ended => false,
            }
    }

    fn have_others_ended(&self, thread: &Thread) -> bool {
        let others = |other: &&Thread| other.rank == thread.rank && other.slot != thread.slot;
        self.threads.iter().filter(others).all(|other| other.doing == Doing::Ended)
    }

    fn pick(&mut self, me: usize) -> Option<usize> {
        let runs = |at: &usize| self.can_run(&self.threads[*at]);
        let can: Vec<usize> = (0..self.threads.len()).filter(runs).collect();
        if can.is_empty() {
            return None;
        }
        match self.pattern {
            Pattern::Even { stay } => {
                if can.contains(&me) && self.random.below(stay) > 0 {
                    return Some(me);
                }
                Some(can[self.random.below(can.len() as u32) as usize])
            }
            Pattern::Ranked { change } => {
                if self.random.below(change) == 0 {
                    let at = self.random.below(self.threads.len() as u32) as usize;
                    self.threads[at].priority = self.random.next();
                }
                can.into_iter().max_by_key(|&at| self.threads[at].priority)
            }
        }
    }

    /// When somebody can run next, or something happens.
    fn next_event(&self) -> Option<Duration> {
        let of_thread = |thread: &Thread| {
            let process = &self.ranks[thread.rank];
            let when = match thread.doing {
                Doing::Ready => process.stopped_until,
                Doing::Asleep { until, .. } => until.max(process.stopped_until),
                Doing::Joins if self.have_others_ended(thread) => process.stopped_until,
                Doing::Joins | Doing::Ended => return None,
            };
            (!process.dead).then_some(when)
        };
        let of_threads = self.threads.iter().filter_map(of_thread);
        of_threads.chain(self.notices.iter().map(|(when, _)| *when)).min()
    }
}

/// The longest that a call may take, in the limits of one wait: a dispatch waits twice at most, and one count serves all ranks.
pub const CALL_LIMITS: u32 = 4;
/// What a turn takes, at most.
const MOST_TICK_US: u32 = 30;
const LINE_BYTES: usize = 64;
const MOST_TURNS: u64 = 1_000_000;
const INSIDE: &str = "a place of the region";
