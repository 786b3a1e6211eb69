//! What waits run on: the machine's clock and its futexes, or those of a simulation.

use std::fmt;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

/// A clock, sleep, and the places where a simulation lets others run.
pub trait Pace: Send + Sync + fmt::Debug {
    /// The time since some instant that stays the same.
    fn now(&self) -> Duration;

    /// Sleeps while the word has this value, or until it is woken there, but no longer than this. May end early.
    fn sleep(&self, word: &AtomicU32, value: u32, most: Duration);

    /// Wakes whoever sleeps on the word.
    fn wake(&self, word: &AtomicU32);

    /// A place at which others may run before this thread goes on. Called only where bugs can be planted.
    fn pass(&self) {}
}

/// This machine's.
#[derive(Debug)]
pub(crate) struct Machine {
    begun: Instant,
}

impl Machine {
    pub fn new() -> Machine {
        Machine { begun: Instant::now() }
    }
}

impl Pace for Machine {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn sleep(&self, word: &AtomicU32, value: u32, most: Duration) {
        let most = rustix::thread::futex::Timespec {
            tv_sec: most.as_secs().cast_signed(),
            tv_nsec: most.subsec_nanos().into(),
        };
        // A word that has changed already, a signal, a wake-up and the end of the time are the same: look again.
        let _ = rustix::thread::futex::wait(word, rustix::thread::futex::Flags::empty(), value, Some(&most));
    }

    fn wake(&self, word: &AtomicU32) {
        // Waking on a valid word cannot fail, and a word whose memory is gone has nobody to wake.
        let _ = rustix::thread::futex::wake(word, rustix::thread::futex::Flags::empty(), u32::MAX >> 1);
    }
}
