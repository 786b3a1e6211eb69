//! How the ranks go on together, and what they tell each other of an iteration.

use std::sync::atomic::Ordering;

use crossdock_benches::{LINE_WORDS, Meeting, RoundTrips, Words};
use rustix::time::{ClockId, clock_gettime};

use crate::error::Error;
use crate::setup::Setup;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Dispatch,
    Combine,
    FloorDispatch,
    FloorCombine,
    Quantise,
    /// Dispatch and combine in one go.
    Step,
    /// The same of a rank that is alone.
    Alone,
    /// A step of ranks that sleep as soon as they wait.
    ParkedStep,
}

/// When an operation began and ended at a rank, in ns of a clock that all of them share.
#[derive(Clone, Copy, Debug, Default)]
pub struct Note {
    pub begin: u64,
    /// The send half is over.
    pub sent: u64,
    pub end: u64,
    /// Of which it waited for others.
    pub waited: u64,
}

/// What the next iteration does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    Stop,
    /// The floor stores through the cache.
    Cached,
    /// The floor stores past it.
    Streamed,
    /// Only ours, without the floor.
    Ours,
}

/// One rank's end of the words that all ranks share.
pub struct Control<'a, C> {
    words: &'a Words,
    meeting: Meeting<'a>,
    resting: Meeting<'a>,
    ranks: u32,
    groups: usize,
    pub rank: u32,
    check: C,
}

/// Of these words, the meeting's are first.
impl Control<'_, ()> {
    /// How many words a run needs.
    pub fn words(setup: &Setup) -> usize {
        let tables = setup.config.slots as usize * setup.problem.groups();
        TOLD + setup.config.ranks() as usize * RANK_WORDS + tables
    }
}

impl<'a, C: FnMut() -> Result<(), Error>> Control<'a, C> {
    pub fn new(setup: &Setup, words: &'a Words, rank: u32, check: C) -> Self {
        let ranks = setup.config.ranks();
        let meeting = Meeting::new(words, 0, ranks, setup.crowded);
        let resting = Meeting::of_sleepers(words, RESTING, ranks);
        Self { words, meeting, resting, ranks, groups: setup.problem.groups(), rank, check }
    }

    /// Goes on when all ranks are here.
    pub fn meet(&mut self) -> Result<(), Error> {
        self.meeting.wait(&mut self.check)
    }

    /// The first rank decides what all do next; all have met after that.
    pub fn decide(&mut self, go: impl FnOnce() -> Go) -> Result<Go, Error> {
        if self.rank == 0 {
            self.words.get(GO).store(go() as u64, Ordering::Relaxed);
        }
        self.meet()?;
        self.decided()
    }

    /// The same where the first rank may take long to know; the others sleep meanwhile.
    pub fn rest(&mut self, go: impl FnOnce() -> Result<Go, Error>) -> Result<Go, Error> {
        if self.rank == 0 {
            self.words.get(GO).store(go()? as u64, Ordering::Relaxed);
        }
        self.resting.wait(&mut self.check)?;
        self.decided()
    }

    fn decided(&mut self) -> Result<Go, Error> {
        let go = match self.words.get(GO).load(Ordering::Relaxed) {
            0 => Go::Stop,
            1 => Go::Cached,
            2 => Go::Streamed,
            _ => Go::Ours,
        };
        // The first rank may decide something else at once.
        self.meet()?;
        Ok(go)
    }

    /// A word there and back between the first two ranks; the others have nothing to do.
    pub fn trips(&mut self, trips: u32, asleep: bool) -> Result<(), Error> {
        let first = if asleep { TRIPS + RoundTrips::WORDS } else { TRIPS };
        match self.rank {
            0 | 1 => RoundTrips::new(self.words, first, asleep).run(trips, self.rank == 0, &mut self.check),
            _ => Ok(()),
        }
    }

    /// Says how often this rank slept.
    pub fn tell_sleeps(&self, sleeps: u64) {
        self.words.get(TOLD + self.rank as usize * RANK_WORDS + SLEEPS).store(sleeps, Ordering::Relaxed);
    }

    /// How often each rank slept.
    pub fn sleeps(&self) -> Vec<u64> {
        let word = |rank: u32| self.words.get(TOLD + rank as usize * RANK_WORDS + SLEEPS);
        (0..self.ranks).map(|rank| word(rank).load(Ordering::Relaxed)).collect()
    }

    /// Runs an operation when all ranks are here, and notes its times. It gives the time at which its send half was
    /// over, and how long it waited.
    pub fn time(&mut self, op: Op, run: impl FnOnce() -> Result<(u64, u64), Error>) -> Result<(), Error> {
        self.meet()?;
        let begin = now_ns();
        let (sent, waited) = run()?;
        let end = now_ns();
        for (at, value) in [begin, sent, end, waited].into_iter().enumerate() {
            self.words.get(self.told(self.rank, op) + at).store(value, Ordering::Relaxed);
        }
        // Nobody begins with something else while others are still at it.
        self.meet()
    }

    /// What a rank has noted.
    pub fn note(&self, rank: u32, op: Op) -> Note {
        let [begin, sent, end, waited] =
            [0, 1, 2, 3].map(|at| self.words.get(self.told(rank, op) + at).load(Ordering::Relaxed));
        Note { begin, sent, end, waited }
    }

    /// What all ranks have noted.
    pub fn notes(&self, op: Op) -> Vec<Note> {
        (0..self.ranks).map(|rank| self.note(rank, op)).collect()
    }

    fn told(&self, rank: u32, op: Op) -> usize {
        TOLD + rank as usize * RANK_WORDS + op as usize * NOTE_WORDS
    }

    /// Tells the others at which port of this host this rank listens, and hears of theirs.
    pub fn exchange_ports(&mut self, port: u16) -> Result<Vec<u16>, Error> {
        let word = |rank: u32| self.words.get(TOLD + rank as usize * RANK_WORDS + PORT);
        word(self.rank).store(port.into(), Ordering::Relaxed);
        self.meet()?;
        let word = |rank: u32| self.words.get(TOLD + rank as usize * RANK_WORDS + PORT);
        Ok((0..self.ranks).map(|rank| word(rank).load(Ordering::Relaxed) as u16).collect())
    }

    /// Says how many bytes a step of this rank moves.
    pub fn tell_bytes(&self, wire: u64, logical: u64) {
        let at = TOLD + self.rank as usize * RANK_WORDS + BYTES;
        self.words.get(at).store(wire, Ordering::Relaxed);
        self.words.get(at + 1).store(logical, Ordering::Relaxed);
    }

    /// What the ranks have said, a rank: on the wire, and by the formula that counts each choice.
    pub fn bytes(&self) -> (f64, f64) {
        let sum = |which: usize| {
            let of_rank = |rank: u32| TOLD + rank as usize * RANK_WORDS + BYTES + which;
            let all = (0..self.ranks).map(|rank| self.words.get(of_rank(rank)).load(Ordering::Relaxed));
            all.sum::<u64>() as f64 / f64::from(self.ranks)
        };
        (sum(0), sum(1))
    }

    /// Adds rows that are wrong.
    pub fn add_wrong(&self, rows: u64) {
        self.words.get(WRONG).fetch_add(rows, Ordering::Relaxed);
    }

    /// All rows that were wrong so far, at all ranks.
    pub fn wrong(&self) -> u64 {
        self.words.get(WRONG).load(Ordering::Relaxed)
    }

    /// Says where a group's results begin in its rank's region.
    pub fn tell_results(&self, slot: u32, group: usize, at: usize) {
        self.words.get(self.table(slot, group)).store(at as u64, Ordering::Relaxed);
    }

    /// Where a group's results begin.
    pub fn results(&self, slot: u32, group: usize) -> usize {
        self.words.get(self.table(slot, group)).load(Ordering::Relaxed) as usize
    }

    fn table(&self, slot: u32, group: usize) -> usize {
        TOLD + self.ranks as usize * RANK_WORDS + slot as usize * self.groups + group
    }
}

/// A time that means the same in every process of this host.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

const RESTING: usize = Meeting::WORDS;
const TRIPS: usize = RESTING + Meeting::WORDS;
const GO: usize = TRIPS + 2 * RoundTrips::WORDS;
const WRONG: usize = GO + LINE_WORDS;
const TOLD: usize = WRONG + LINE_WORDS;
const NOTE_WORDS: usize = 4;
const BYTES: usize = (Op::ParkedStep as usize + 1) * NOTE_WORDS;
const SLEEPS: usize = BYTES + 2;
const PORT: usize = SLEEPS + 1;
const RANK_WORDS: usize = (PORT + 1).next_multiple_of(LINE_WORDS);
