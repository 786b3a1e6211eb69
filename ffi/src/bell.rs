//! Waiting for what the progress loop tells, without ever holding it up.
//!
//! The loop counts on and, only where somebody sleeps, wakes them; it takes no lock that a caller holds while it works.
//! A waiter notes the count, looks for what it waits for, and sleeps only as long as the count is the same: what is told
//! after the look is told under another count.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

#[derive(Default)]
pub(crate) struct Bell {
    rung: AtomicU64,
    sleepers: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Bell {
    pub const fn new() -> Bell {
        Bell {
            rung: AtomicU64::new(0),
            sleepers: AtomicU32::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// To be called after what is waited for can be found.
    pub fn ring(&self) {
        self.rung.fetch_add(1, SeqCst);
        // Sequentially consistent on both sides: either this sees the sleeper, or the sleeper sees the count.
        if self.sleepers.load(SeqCst) > 0 {
            // Between its look at the count and its sleep a sleeper holds the lock.
            drop(self.lock.lock());
            self.wake.notify_all();
        }
    }

    /// Looks until there is something, or until the deadline; looks once more then.
    pub fn wait<T>(&self, deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            let seen = self.rung.load(SeqCst);
            if let Some(found) = look() {
                return Some(found);
            }
            if Instant::now() >= deadline {
                return None;
            }
            self.sleepers.fetch_add(1, SeqCst);
            let mut guard = self.lock.lock();
            while self.rung.load(SeqCst) == seen {
                if self.wake.wait_until(&mut guard, deadline).timed_out() {
                    break;
                }
            }
            drop(guard);
            self.sleepers.fetch_sub(1, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn no_ring_is_missed() {
        const RINGS: u64 = 20_000;
        let shared = Arc::new((Bell::new(), AtomicU64::new(0), AtomicU64::new(0)));
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    let (bell, told, heard) = &*shared;
                    let deadline = Instant::now() + Duration::from_secs(60);
                    for expected in 1..=RINGS {
                        let found = bell.wait(deadline, || (told.load(SeqCst) >= expected).then_some(()));
                        assert!(found.is_some(), "ring {expected} was missed");
                        heard.fetch_max(expected, SeqCst);
                    }
                })
            })
            .collect();
        let (bell, told, heard) = &*shared;
        for ring in 1..=RINGS {
            told.store(ring, SeqCst);
            bell.ring();
            // Now and then all of them sleep.
            while ring % 16 == 0 && heard.load(SeqCst) < ring {
                std::thread::yield_now();
            }
        }
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_looks_once_more() {
        let (bell, mut looks) = (Bell::new(), 0);
        let begun = Instant::now();
        let found = bell.wait(begun + Duration::from_millis(20), || {
            looks += 1;
            (looks > 1).then_some(looks)
        });
        assert_eq!(found, Some(2));
        assert!(begun.elapsed() >= Duration::from_millis(20));
        assert_eq!(bell.wait(begun, || None::<()>), None);
    }
}
