//! The rendezvous of the copy threads: who takes which chunk, and when all are done.
//!
//! Two counters carry the whole protocol, and each doubles as the word that its waiters sleep on.
//!
//! - `unclaimed` counts the chunks that nobody has taken. The owner publishes a job by setting it; a worker
//!   takes a chunk by decrementing it. Zero means that there is nothing to do, so helpers sleep on zero.
//! - `unfinished` counts the chunks that are not yet copied. The owner waits for zero, and therefore knows
//!   that no helper reads the job any more when it writes the next one.
//!
//! A late helper cannot take a chunk of a job that it does not see: its decrement reads the count that the
//! owner stored, and so it synchronises with that store and sees the job behind it, whichever job that is.

use crate::copy::futex::{AtomicU32, Futex, Ordering::*};

/// The shared state of one owner and its helpers.
pub(super) struct Claims {
    unclaimed: Futex,
    /// The upper bit says that the owner sleeps on this word.
    unfinished: Futex,
    /// How many helpers sleep, or are about to.
    sleepers: AtomicU32,
}

/// What a helper does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Copy this chunk, then call [`Claims::finish`].
    Chunk(u32),
    /// There is nothing to do.
    Idle,
    /// The pool is being dropped.
    Stop,
}

/// More chunks than this in one job cannot be counted.
pub(super) const MAX_CHUNKS: u32 = u32::MAX >> 1;

const OWNER_SLEEPS: u32 = 1 << 31;
const STOP: u32 = u32::MAX;

impl Claims {
    pub(super) fn new() -> Claims {
        Claims { unclaimed: Futex::new(0), unfinished: Futex::new(0), sleepers: AtomicU32::new(0) }
    }

    /// Opens a job of `chunks` to the helpers that are awake, and says whether others sleep, whom [`Claims::wake`] wakes.
    ///
    /// Only the owner calls it, after it wrote the job, and only after [`Claims::all_finished`] ended the
    /// job before.
    pub(super) fn publish(&self, chunks: u32) -> bool {
        assert!(chunks <= MAX_CHUNKS, "{chunks} chunks exceed the counter");
        debug_assert_eq!(self.unfinished.word.load(Relaxed), 0, "the job before is over");
        // Relaxed: whoever decrements it has first claimed a chunk, and the store below orders that.
        self.unfinished.word.store(chunks, Relaxed);
        // As a release it publishes the job. SeqCst, against `sleepers` in `sleep_until_published`: either this
        // thread sees the sleeper, or the sleeper sees the chunks. (A sleeper that nobody wakes would cost speed
        // and nothing else, since the owner takes every chunk that is left.)
        self.unclaimed.word.store(chunks, SeqCst);
        self.sleepers.load(SeqCst) > 0
    }

    /// Wakes at most this many of the helpers that sleep.
    pub(super) fn wake(&self, helpers: u32) {
        self.unclaimed.wake(helpers);
    }

    /// Takes a chunk of the present job, if one is left.
    pub(super) fn claim(&self) -> Claim {
        let mut unclaimed = self.unclaimed.word.load(Relaxed);
        loop {
            match unclaimed {
                0 => return Claim::Idle,
                STOP => return Claim::Stop,
                // Acquire: a successful decrement must see the job that the count belongs to. A decrement by
                // another helper in between keeps the release sequence of the owner's store.
                left => match self.unclaimed.word.compare_exchange_weak(left, left - 1, Acquire, Relaxed) {
                    Ok(_) => return Claim::Chunk(left - 1),
                    Err(now) => unclaimed = now,
                },
            }
        }
    }

    /// Says that a claimed chunk is copied.
    pub(super) fn finish(&self) {
        // Release: the owner that reads the new count must see the copied bytes, and may overwrite the job,
        // which this worker has read for the last time.
        if self.unfinished.word.fetch_sub(1, AcqRel) == OWNER_SLEEPS | 1 {
            self.unfinished.wake(1);
        }
    }

    /// Whether every chunk is copied.
    pub(super) fn all_finished(&self) -> bool {
        self.unfinished.word.load(Acquire) & !OWNER_SLEEPS == 0
    }

    /// Sleeps until every chunk is copied; only the owner calls it.
    pub(super) fn sleep_until_finished(&self) {
        // The flag and the count share a word, so the helper that takes the count to zero cannot miss it.
        let mut unfinished = self.unfinished.word.fetch_or(OWNER_SLEEPS, AcqRel) | OWNER_SLEEPS;
        while unfinished != OWNER_SLEEPS {
            self.unfinished.sleep_while(unfinished);
            unfinished = self.unfinished.word.load(Acquire);
        }
        // Relaxed: nobody else touches the word until the next job is published.
        self.unfinished.word.store(0, Relaxed);
    }

    /// Sleeps until there may be something to claim; wakes spuriously.
    pub(super) fn sleep_until_published(&self) {
        // SeqCst, against the two accesses in `publish`: see there.
        self.sleepers.fetch_add(1, SeqCst);
        self.unclaimed.sleep_while(0);
        self.sleepers.fetch_sub(1, Relaxed);
    }

    /// Ends all helpers; only the owner calls it, between jobs.
    pub(super) fn stop(&self) {
        self.unclaimed.word.store(STOP, SeqCst);
        self.unclaimed.wake(MAX_CHUNKS);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// The real protocol with jobs that are one number; every chunk reads the job and writes its own cell,
    /// and the cells of loom report any access that is not ordered.
    struct Bench {
        claims: Claims,
        job: UnsafeCell<u32>,
        copied: [UnsafeCell<u32>; 2],
    }

    // SAFETY: the protocol under test orders the accesses, and loom checks that it does.
    unsafe impl Sync for Bench {}

    fn work(bench: &Bench) -> Claim {
        let claim = bench.claims.claim();
        if let Claim::Chunk(chunk) = claim {
            // SAFETY: loom checks both accesses.
            let job = bench.job.with(|job| unsafe { *job });
            bench.copied[chunk as usize].with_mut(|copied| unsafe { *copied += job });
            bench.claims.finish();
        }
        claim
    }

    #[test]
    fn every_chunk_is_copied_once_and_seen_by_the_owner() {
        let mut model = loom::model::Builder::new();
        // All schedules with so few preemptions; without a bound the search takes hours.
        model.preemption_bound = Some(3);
        model.check(|| {
            let bench = Arc::new(Bench {
                claims: Claims::new(),
                job: UnsafeCell::new(0),
                copied: [UnsafeCell::new(0), UnsafeCell::new(0)],
            });
            let helper = thread::spawn({
                let bench = bench.clone();
                move || {
                    loop {
                        match work(&bench) {
                            Claim::Chunk(_) => {}
                            Claim::Idle => bench.claims.sleep_until_published(),
                            Claim::Stop => return,
                        }
                    }
                }
            });
            let mut sum = 0;
            for job in 1..=2 {
                // SAFETY: loom checks that no helper reads the job at this time.
                bench.job.with_mut(|slot| unsafe { *slot = job });
                // The helper may sleep through the second job; it must still see the stop.
                if bench.claims.publish(2) && job == 1 {
                    bench.claims.wake(1);
                }
                while matches!(work(&bench), Claim::Chunk(_)) {}
                if !bench.claims.all_finished() {
                    bench.claims.sleep_until_finished();
                }
                sum += job;
                for copied in &bench.copied {
                    // SAFETY: loom checks that the helper's write is ordered before.
                    assert_eq!(copied.with(|copied| unsafe { *copied }), sum);
                }
            }
            bench.claims.stop();
            helper.join().unwrap();
        });
    }
}
