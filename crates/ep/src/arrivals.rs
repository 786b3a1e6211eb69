//! The growing word that a waiter watches: how one rank tells another that a call's rows are there, and how the other
//! sleeps until then.
//!
//! The word lies in the waiter's memory and has one writer, the other rank. Its upper 31 bits say how many calls have
//! come; the lowest says that the waiter sleeps. So a sender pays for a wake-up only where somebody sleeps, and needs
//! one atomic instruction to know.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::pace::Pace;

/// How long a wait spins before it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Looks at the word, with a pause of the processor between two.
    pub spins: u32,
    /// Then looks with the processor given to others between two.
    pub yields: u32,
}

impl Patience {
    /// For ranks that have a processor each: about 50 µs of spinning.
    pub const OWN_PROCESSOR: Patience = Patience { spins: 4000, yields: 16 };
    /// For more ranks than processors: whoever waits makes room at once.
    pub const SHARED_PROCESSOR: Patience = Patience { spins: 50, yields: 2 };
}

/// Why a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    Arrived,
    /// `stop` said so.
    Stopped,
    Late,
}

/// The word, as the processor has it and as the model checker does.
pub(crate) trait Word {
    fn load(&self) -> u32;
    fn swap(&self, value: u32) -> u32;
    fn replace(&self, seen: u32, value: u32) -> bool;
}

impl Word for AtomicU32 {
    fn load(&self) -> u32 {
        self.load(Ordering::Acquire)
    }

    fn swap(&self, value: u32) -> u32 {
        self.swap(value, Ordering::AcqRel)
    }

    fn replace(&self, seen: u32, value: u32) -> bool {
        self.compare_exchange(seen, value, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

/// Says that call number `call` has come, after everything that was written before. True if a sleeper has to be woken.
pub(crate) fn publish<W: Word>(word: &W, call: u32) -> bool {
    Word::swap(word, call << 1) & ASLEEP != 0
}

/// Whether call number `call` has come. What its sender wrote before is then visible.
pub(crate) fn has_come<W: Word>(word: &W, call: u32) -> bool {
    says(Word::load(word), call)
}

fn says(word: u32, call: u32) -> bool {
    // The sender is at most one call ahead, and numbers wrap around.
    (word & !ASLEEP).wrapping_sub(call << 1).cast_signed() >= 0
}

/// Marks the waiter as asleep, unless the call has come. Gives the word's value to sleep on.
pub(crate) fn fall_asleep<W: Word>(word: &W, call: u32) -> Option<u32> {
    loop {
        // The very value that says that the call has not come is the one that is replaced.
        let seen = Word::load(word);
        if says(seen, call) {
            return None;
        }
        if seen & ASLEEP != 0 {
            return Some(seen);
        }
        let asleep = seen | ASLEEP;
        if word.replace(seen, asleep) {
            return Some(asleep);
        }
    }
}

/// Waits until call number `call` has come, or `look`, asked now and then, says that it is over.
pub(crate) fn wait(
    word: &AtomicU32,
    call: u32,
    patience: Patience,
    pace: &dyn Pace,
    mut look: impl FnMut() -> ControlFlow<Waited>,
) -> Waited {
    for spin in 0..patience.spins.saturating_add(patience.yields) {
        if has_come(word, call) {
            return Waited::Arrived;
        }
        if spin % LOOK_AFTER_SPINS == LOOK_AFTER_SPINS - 1
            && let ControlFlow::Break(end) = look()
        {
            return if has_come(word, call) { Waited::Arrived } else { end };
        }
        if spin < patience.spins { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
    loop {
        if has_come(word, call) {
            return Waited::Arrived;
        }
        if let ControlFlow::Break(end) = look() {
            // Who leaves after its last call has made it.
            return if has_come(word, call) { Waited::Arrived } else { end };
        }
        if let Some(asleep) = fall_asleep(word, call) {
            pace.sleep(word, asleep, LOOK_AGAIN);
        }
    }
}

const ASLEEP: u32 = 1;
/// Whoever spins for long looks after so many, which is a millisecond or two.
const LOOK_AFTER_SPINS: u32 = 1 << 16;
/// How long a sleeper lies at most before it asks whether the other is still there.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(20);

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::pace::Machine;
    use std::sync::Arc;

    /// Looks until the clock says so.
    fn until(pace: &Machine, time: Duration) -> impl FnMut() -> ControlFlow<Waited> {
        let end = pace.now() + time;
        move || if pace.now() < end { ControlFlow::Continue(()) } else { ControlFlow::Break(Waited::Late) }
    }

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn calls_come_in_order_and_numbers_wrap_around() {
        let word = AtomicU32::new(0);
        for call in [1, 2, 0x7fff_ffff, 0x8000_0000, 0x8000_0001] {
            // Only the lower 31 bits are told apart.
            word.store((call - 1) << 1, Ordering::Relaxed);
            assert!(!has_come(&word, call), "{call}");
            assert!(!publish(&word, call));
            assert!(has_come(&word, call) && has_come(&word, call - 1) && !has_come(&word, call + 1));
        }
    }

    #[test]
    fn a_sleeper_is_woken_and_only_a_sleeper() {
        let word = AtomicU32::new(0);
        assert_eq!(fall_asleep(&word, 1), Some(1));
        assert_eq!(fall_asleep(&word, 1), Some(1), "twice is once");
        assert!(publish(&word, 1), "somebody sleeps");
        assert_eq!(fall_asleep(&word, 1), None);
        assert!(!publish(&word, 2), "nobody sleeps");
    }

    #[test]
    fn a_wait_ends_by_its_deadline_and_by_its_stop() {
        let word = AtomicU32::new(0);
        let patience = Patience { spins: 10, yields: 1 };
        let pace = Machine::new();
        let short = Duration::from_millis(30);
        assert_eq!(wait(&word, 1, patience, &pace, until(&pace, short)), Waited::Late);
        assert!(pace.now() >= short);
        let stop = || ControlFlow::Break(Waited::Stopped);
        assert_eq!(wait(&word, 1, patience, &pace, stop), Waited::Stopped);
        publish(&word, 1);
        assert_eq!(wait(&word, 1, patience, &pace, stop), Waited::Arrived, "what has come counts first");
    }

    #[test]
    fn two_threads_play_ping_pong() {
        let words = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let theirs = words.clone();
        let hears = |word: &AtomicU32, call: u32| {
            let pace = Machine::new();
            let waited = wait(word, call, Patience::SHARED_PROCESSOR, &pace, until(&pace, LONG));
            assert_eq!(waited, Waited::Arrived);
        };
        let says = |word: &AtomicU32, call: u32| {
            if publish(word, call) {
                Machine::new().wake(word);
            }
        };
        let other = std::thread::spawn(move || {
            for call in 1..=2000 {
                hears(&theirs[0], call);
                says(&theirs[1], call);
            }
        });
        for call in 1..=2000 {
            says(&words[0], call);
            hears(&words[1], call);
        }
        other.join().unwrap();
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::{Arc, Condvar, Mutex};

    use super::{Word, fall_asleep, publish};

    impl Word for AtomicU32 {
        fn load(&self) -> u32 {
            self.load(Ordering::Acquire)
        }

        fn swap(&self, value: u32) -> u32 {
            self.swap(value, Ordering::AcqRel)
        }

        fn replace(&self, seen: u32, value: u32) -> bool {
            self.compare_exchange(seen, value, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        }
    }

    /// The word, what it announces, and a kernel that compares and falls asleep in one step.
    struct Both {
        word: AtomicU32,
        rows: AtomicU32,
        kernel: Mutex<()>,
        sleepers: Condvar,
    }

    impl Both {
        fn send(&self, call: u32) {
            self.rows.store(call, Ordering::Relaxed);
            if publish(&self.word, call) {
                let _kernel = self.kernel.lock().unwrap();
                self.sleepers.notify_all();
            }
        }

        /// Without a time-out: a wake-up that is lost is a deadlock, which the model finds.
        fn wait(&self, call: u32) {
            while let Some(asleep) = fall_asleep(&self.word, call) {
                let kernel = self.kernel.lock().unwrap();
                if self.word.load(Ordering::SeqCst) == asleep {
                    drop(self.sleepers.wait(kernel).unwrap());
                }
            }
            assert!(
                self.rows.load(Ordering::Relaxed) >= call,
                "the rows of a call are there when it has come"
            );
        }
    }

    fn both() -> Arc<Both> {
        Arc::new(Both {
            word: AtomicU32::new(0),
            rows: AtomicU32::new(0),
            kernel: Mutex::new(()),
            sleepers: Condvar::new(),
        })
    }

    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            let both = both();
            let sender = both.clone();
            let thread = loom::thread::spawn(move || sender.send(1));
            both.wait(1);
            thread.join().unwrap();
        });
    }

    #[test]
    fn a_sender_may_be_a_call_ahead() {
        loom::model(|| {
            let both = both();
            let sender = both.clone();
            let thread = loom::thread::spawn(move || {
                sender.send(1);
                sender.send(2);
            });
            both.wait(1);
            both.wait(2);
            thread.join().unwrap();
        });
    }
}
