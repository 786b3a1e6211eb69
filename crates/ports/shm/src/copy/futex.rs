//! A word that threads of this process can sleep on.
//!
//! Under loom a mutex and a condition variable stand in for the kernel, with the same promise: the value is
//! compared and the sleep begins in one step.

#[cfg(not(loom))]
pub(super) use core::sync::atomic::{AtomicU32, Ordering};
#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicU32, Ordering};

/// The word and its sleepers. The padding keeps one word's traffic from the other's cache line.
#[cfg(not(loom))]
#[repr(align(128))]
pub(super) struct Futex {
    pub(super) word: AtomicU32,
}

#[cfg(not(loom))]
impl Futex {
    pub(super) fn new(value: u32) -> Futex {
        Futex { word: AtomicU32::new(value) }
    }

    /// Sleeps while the word has this value; may return early.
    pub(super) fn sleep_while(&self, value: u32) {
        // A word that has changed already, a signal and a wake-up are the same to the caller: look again.
        let _ = rustix::thread::futex::wait(&self.word, rustix::thread::futex::Flags::PRIVATE, value, None);
    }

    /// Wakes at most this many sleepers.
    pub(super) fn wake(&self, sleepers: u32) {
        rustix::thread::futex::wake(&self.word, rustix::thread::futex::Flags::PRIVATE, sleepers)
            .expect("waking on a valid word cannot fail");
    }
}

#[cfg(loom)]
pub(super) struct Futex {
    pub(super) word: AtomicU32,
    kernel: loom::sync::Mutex<()>,
    sleepers: loom::sync::Condvar,
}

#[cfg(loom)]
impl Futex {
    pub(super) fn new(value: u32) -> Futex {
        Futex {
            word: AtomicU32::new(value),
            kernel: loom::sync::Mutex::new(()),
            sleepers: loom::sync::Condvar::new(),
        }
    }

    pub(super) fn sleep_while(&self, value: u32) {
        let kernel = self.kernel.lock().unwrap();
        if self.word.load(Ordering::SeqCst) == value {
            drop(self.sleepers.wait(kernel).unwrap());
        }
    }

    pub(super) fn wake(&self, _sleepers: u32) {
        let _kernel = self.kernel.lock().unwrap();
        self.sleepers.notify_all();
    }
}
