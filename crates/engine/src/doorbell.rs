//! Waking a thread that sleeps in the kernel, without paying for it while that thread is awake.
//!
//! Both sides check, register, and check again. The sleeper says that it is about to sleep and *then* looks once
//! more for work; the other side queues the work and *then* looks whether somebody sleeps. A sequentially
//! consistent fence between the two halves on each side makes it impossible that both miss the other.
//!
//! The proof is a model check of every interleaving:
//! `RUSTFLAGS="--cfg loom" cargo test --release -p crossdock-engine --lib loom`

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64 as PlainU64;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, SeqCst};

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, fence};

use rustix::event::{EventfdFlags, eventfd};

use crate::OsError;

/// Wakes the progress loop from other threads.
///
/// The loop: [`prepare_sleep`](Doorbell::prepare_sleep), look at every queue once more, sleep until the
/// descriptor is readable if they are empty, [`awake`](Doorbell::awake), look at the queues.
/// The others: queue the work, then [`ring`](Doorbell::ring). One thread sleeps, any number ring.
#[derive(Debug)]
pub struct Doorbell {
    gate: Gate,
    /// How many rings have been read out of the descriptor. Written by the sleeping side alone.
    answered: PlainU64,
    descriptor: OwnedFd,
}

impl Doorbell {
    /// A bell whose loop is awake.
    pub fn new() -> Result<Self, OsError> {
        let descriptor =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(OsError::of("eventfd"))?;
        Ok(Self { gate: Gate::new(), answered: PlainU64::new(0), descriptor })
    }

    /// Makes the loop look at what was queued before this call: one load if it is awake, one write to the
    /// descriptor if it sleeps.
    pub fn ring(&self) {
        if self.gate.pass() {
            // The write can only fail when the counter stands at 2^64 - 2; the descriptor is readable then, too.
            let _ = rustix::io::write(&self.descriptor, &1u64.to_ne_bytes());
        }
    }

    /// Says that the loop is about to sleep. Work that is queued but was not seen before this call must be
    /// looked for after it.
    pub fn prepare_sleep(&self) {
        self.gate.close();
    }

    /// Says that the loop is awake, whether it has slept or not, and makes the descriptor unreadable again.
    pub fn awake(&self) {
        let rung = self.gate.open();
        // A ringer that has won the gate may not have written yet. Its ring is then read by a later call, after
        // one sleep that was too short; counting the rings tells which calls have something to read.
        if rung != self.answered.load(Relaxed) {
            let mut count = [0; 8];
            if rustix::io::read(&self.descriptor, &mut count).is_ok() {
                self.answered.fetch_add(u64::from_ne_bytes(count), Relaxed);
            }
        }
    }
}

impl AsFd for Doorbell {
    /// Readable from a ring that met a sleeping loop until [`awake`](Doorbell::awake).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Tells a thread of the application, in its own `poll` or `epoll`, that a queue is not empty.
///
/// The application: take from the queue until it is empty, [`arm`](EventFd::arm), sleep on the descriptor,
/// [`clear`](EventFd::clear), and again. The library: queue, then [`raise`](EventFd::raise).
/// From raise to clear the descriptor stays readable, so that level- and edge-triggered sleepers both work.
#[derive(Debug)]
pub struct EventFd(Doorbell);

impl EventFd {
    /// A signal that nobody waits for.
    pub fn new() -> Result<Self, OsError> {
        Doorbell::new().map(Self)
    }

    /// Makes the descriptor readable if somebody waits for it: one load if nobody does.
    pub fn raise(&self) {
        self.0.ring();
    }

    /// Asks to be told of what is queued from now on. `has_events` looks at the queue once more; if it finds
    /// something, the descriptor is readable when this returns. Returns what `has_events` said.
    pub fn arm(&self, has_events: impl FnOnce() -> bool) -> bool {
        self.0.prepare_sleep();
        let found = has_events();
        if found {
            self.raise();
        }
        found
    }

    /// Makes the descriptor unreadable, until the next [`arm`](EventFd::arm). To be called before the queue is
    /// read.
    pub fn clear(&self) {
        self.0.awake();
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Who must wake whom: the lowest bit says that somebody sleeps, the others count the rings that met a sleeper.
#[derive(Debug)]
struct Gate(AtomicU64);

const ASLEEP: u64 = 1;
const RING: u64 = 2;

impl Gate {
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Called after work was queued; true for the one caller who has to wake the sleeper.
    fn pass(&self) -> bool {
        // Orders the queueing before the look at the gate, against the fence in `close`.
        fence(SeqCst);
        let seen = self.0.load(Relaxed);
        // If the exchange fails, another has rung, or the sleeper has woken since; before it sleeps again it
        // passes the fence in `close` and finds the work.
        seen & ASLEEP != 0 && self.0.compare_exchange(seen, seen - ASLEEP + RING, AcqRel, Relaxed).is_ok()
    }

    /// Called before the last look at the queue.
    fn close(&self) {
        self.0.fetch_or(ASLEEP, Relaxed);
        // Orders this before the last look, against the fence in `pass`.
        fence(SeqCst);
    }

    /// Called before the first look at the queue after a sleep. Returns the number of rings so far.
    fn open(&self) -> u64 {
        // Acquires what the ringer had queued.
        self.0.fetch_and(!ASLEEP, AcqRel) / RING
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{Sleeper, Woken};

    fn readable(fd: impl AsFd) -> bool {
        let mut sleeper = Sleeper::new();
        sleeper.watch(fd.as_fd()).unwrap();
        sleeper.sleep(0).unwrap() == Woken::Readable
    }

    #[test]
    fn an_awake_loop_costs_no_write() {
        let bell = Doorbell::new().unwrap();
        bell.ring();
        assert!(!readable(&bell));
        bell.prepare_sleep();
        assert!(!readable(&bell), "rings before the loop went to sleep are found by its second look");
        bell.ring();
        bell.ring();
        assert!(readable(&bell));
        bell.awake();
        assert!(!readable(&bell));
        bell.ring();
        assert!(!readable(&bell));
    }

    #[test]
    fn no_ring_is_lost_between_threads() {
        const RINGERS: u64 = 3;
        const RINGS: u64 = 20_000;
        let shared = Arc::new((Doorbell::new().unwrap(), AtomicU64::new(0)));
        let ringers: Vec<_> = (0..RINGERS)
            .map(|ringer| {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    for ring in 0..RINGS {
                        shared.1.fetch_add(1, Relaxed);
                        shared.0.ring();
                        if ring % 64 == ringer {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let (bell, queued) = &*shared;
        let mut seen = 0;
        let deadline = Instant::now() + Duration::from_secs(60);
        while seen < RINGERS * RINGS {
            seen = queued.load(Relaxed);
            bell.prepare_sleep();
            if queued.load(Relaxed) == seen && seen < RINGERS * RINGS {
                let mut sleeper = Sleeper::new();
                sleeper.watch(bell.as_fd()).unwrap();
                // Far longer than the whole test: waking by the time-out would be a lost ring.
                assert_eq!(sleeper.sleep(30_000_000_000).unwrap(), Woken::Readable);
            }
            bell.awake();
            assert!(Instant::now() < deadline);
        }
        for ringer in ringers {
            ringer.join().unwrap();
        }
    }

    #[test]
    fn the_event_fd_is_level_triggered_and_quiet_unless_armed() {
        let events = EventFd::new().unwrap();
        events.raise();
        assert!(!readable(&events));
        assert!(!events.arm(|| false));
        assert!(!readable(&events));
        events.raise();
        assert!(readable(&events));
        assert!(readable(&events), "it stays readable until it is cleared");
        events.clear();
        assert!(!readable(&events));
        assert!(events.arm(|| true), "what was queued before arming is not forgotten");
        assert!(readable(&events));
        events.clear();
        assert!(!readable(&events));
    }
}

#[cfg(all(test, loom))]
pub(crate) mod loom_tests {
    use loom::sync::atomic::AtomicUsize;
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::*;

    /// The gate with a modelled descriptor: a counter, and a wait for it to be above zero.
    pub(crate) struct Bell {
        gate: Gate,
        descriptor: Mutex<u64>,
        readable: Condvar,
        queued: AtomicUsize,
    }

    impl Bell {
        pub fn new() -> Arc<Self> {
            Arc::new(Self {
                gate: Gate::new(),
                descriptor: Mutex::new(0),
                readable: Condvar::new(),
                queued: AtomicUsize::new(0),
            })
        }

        fn queue_and_ring(&self) {
            self.queued.fetch_add(1, Relaxed);
            self.ring();
        }

        pub fn ring(&self) {
            if self.gate.pass() {
                *self.descriptor.lock().unwrap() += 1;
                self.readable.notify_one();
            }
        }

        pub fn close(&self) {
            self.gate.close();
        }

        pub fn sleep(&self) {
            let mut count = self.descriptor.lock().unwrap();
            while *count == 0 {
                count = self.readable.wait(count).unwrap();
            }
        }

        pub fn awake(&self, answered: &mut u64) {
            let rung = self.gate.open();
            assert!(*answered <= rung);
            if rung != *answered {
                *answered += std::mem::take(&mut *self.descriptor.lock().unwrap());
            }
            let unread = *self.descriptor.lock().unwrap();
            assert!(
                unread == 0 || rung < self.gate.0.load(Relaxed) / RING || *answered < rung,
                "a ring was left in the descriptor, and nobody will read it"
            );
        }
    }

    /// A lost ring is a loop that sleeps for ever, which the model checker reports as a deadlock.
    fn all_work_is_found(ringers: usize, rings: usize, preemptions: Option<usize>) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = preemptions;
        model.check(move || {
            let bell = Bell::new();
            let threads: Vec<_> = (0..ringers)
                .map(|_| {
                    let bell = bell.clone();
                    thread::spawn(move || (0..rings).for_each(|_| bell.queue_and_ring()))
                })
                .collect();
            let mut answered = 0;
            loop {
                let seen = bell.queued.load(Relaxed);
                if seen == ringers * rings {
                    break;
                }
                bell.gate.close();
                if bell.queued.load(Relaxed) == seen {
                    bell.sleep();
                }
                bell.awake(&mut answered);
            }
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    #[test]
    fn one_ringer_rings_twice() {
        all_work_is_found(1, 2, None);
    }

    /// All interleavings of three threads take hours; those with up to three preemptions take seconds.
    #[test]
    fn two_ringers() {
        all_work_is_found(2, 1, Some(3));
    }

    /// Arming against raising: what was queued before or after arming makes the descriptor readable.
    #[test]
    fn an_armed_event_is_never_missed() {
        loom::model(|| {
            let bell = Bell::new();
            let raiser = {
                let bell = bell.clone();
                thread::spawn(move || bell.queue_and_ring())
            };
            bell.gate.close();
            if bell.queued.load(Relaxed) != 0 && bell.gate.pass() {
                *bell.descriptor.lock().unwrap() += 1;
                bell.readable.notify_one();
            }
            bell.sleep();
            let mut answered = 0;
            bell.awake(&mut answered);
            assert_eq!(bell.queued.load(Relaxed), 1);
            raiser.join().unwrap();
        });
    }

    /// A loop that woke by its time-out and learns of a ring sees what it was rung for, though it has read nothing
    /// from the descriptor yet.
    #[test]
    fn what_was_rung_for_is_visible() {
        loom::model(|| {
            let bell = Bell::new();
            bell.gate.close();
            let ringer = {
                let bell = bell.clone();
                thread::spawn(move || bell.queue_and_ring())
            };
            if bell.gate.open() > 0 {
                assert_eq!(bell.queued.load(Relaxed), 1);
            }
            ringer.join().unwrap();
        });
    }
}
