//! What the owner of a heart and its thread share: a list one way, times the other way.
//!
//! Every interleaving is model-checked:
//! `RUSTFLAGS="--cfg loom" cargo test --release -p crossdock-engine --lib loom`

#[cfg(loom)]
use loom::sync::Mutex as Inner;
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU64};
#[cfg(not(loom))]
use parking_lot::Mutex as Inner;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicU64};

/// What is to be watched. The thread takes a copy when it has changed, so that neither side holds the lock for longer
/// than a copy of a bounded list. After each call of the owner's side the thread's bell is to be rung.
#[derive(Debug)]
pub(super) struct WatchList<T> {
    list: Inner<Vec<T>>,
    changed: AtomicBool,
    stop: AtomicBool,
}

impl<T: Clone> WatchList<T> {
    pub fn new(list: Vec<T>) -> Self {
        Self { list: Inner::new(list), changed: AtomicBool::new(false), stop: AtomicBool::new(false) }
    }

    /// The owner's side.
    pub fn change(&self, change: impl FnOnce(&mut Vec<T>)) {
        self.locked(change);
        // An exchange, as in `take`: the two sides' writes have one order that the model checker knows, too.
        self.changed.swap(true, Release);
    }

    /// The owner's side.
    pub fn stop(&self) {
        self.stop.store(true, Release);
    }

    /// The list, if it has changed since it was last taken.
    pub fn take(&self) -> Option<Vec<T>> {
        // Before the copy: a change that comes between the two is seen again, and never missed.
        self.changed.swap(false, AcqRel).then(|| self.locked(|list| list.clone()))
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.load(Acquire)
    }

    /// Whether there is something to do, to be asked between the bell's `prepare_sleep` and the sleep.
    pub fn is_news(&self) -> bool {
        self.is_stopped() || self.changed.load(Acquire)
    }

    fn locked<R>(&self, act: impl FnOnce(&mut Vec<T>) -> R) -> R {
        #[cfg(loom)]
        let mut list = self.list.lock().unwrap();
        #[cfg(not(loom))]
        let mut list = self.list.lock();
        act(&mut list)
    }
}

/// What the thread tells of one session, on the clock of [`now_ns`](crate::now_ns).
#[derive(Debug)]
pub(super) struct Vital {
    heard_ns: AtomicU64,
    echoed_ns: AtomicU64,
}

impl Vital {
    pub fn new(now_ns: u64) -> Self {
        Self { heard_ns: AtomicU64::new(now_ns), echoed_ns: AtomicU64::new(now_ns) }
    }

    pub fn hear(&self, now_ns: u64) {
        self.heard_ns.store(now_ns, Relaxed);
    }

    pub fn echo(&self, now_ns: u64) {
        self.echoed_ns.store(now_ns, Relaxed);
    }

    pub fn heard_ns(&self) -> u64 {
        self.heard_ns.load(Relaxed)
    }

    pub fn echoed_ns(&self) -> u64 {
        self.echoed_ns.load(Relaxed)
    }
}

/// Until when the thread has taken in all that had come. Who asks for this and *then* for a session's
/// [`Vital::heard_ns`] misses nothing that was heard until then: a silence is never longer than it was.
#[derive(Debug)]
pub(super) struct Listened(AtomicU64);

impl Listened {
    pub fn new(now_ns: u64) -> Self {
        Self(AtomicU64::new(now_ns))
    }

    pub fn publish(&self, now_ns: u64) {
        self.0.store(now_ns, Release);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Acquire)
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;
    use crate::doorbell::loom_tests::Bell;

    /// A change that is missed is a thread that sleeps for ever, which the model checker reports as a deadlock.
    #[test]
    fn every_change_is_taken() {
        loom::model(|| {
            let (watched, bell) = (Arc::new(WatchList::new(Vec::new())), Bell::new());
            let owner = {
                let (watched, bell) = (watched.clone(), bell.clone());
                thread::spawn(move || {
                    watched.change(|list| list.push(7));
                    bell.ring();
                    watched.change(|list| list.push(9));
                    bell.ring();
                })
            };
            let (mut taken, mut answered) = (Vec::new(), 0);
            while taken != [7, 9] {
                bell.close();
                if !watched.is_news() {
                    bell.sleep();
                }
                bell.awake(&mut answered);
                if let Some(list) = watched.take() {
                    assert!(list.len() >= taken.len());
                    taken = list;
                }
            }
            owner.join().unwrap();
        });
    }

    /// Neither is a stop, and what the owner did before it is seen by the thread that stops.
    #[test]
    fn a_stop_is_seen() {
        loom::model(|| {
            let (watched, bell) = (Arc::new(WatchList::new(Vec::new())), Bell::new());
            let owner = {
                let (watched, bell) = (watched.clone(), bell.clone());
                thread::spawn(move || {
                    watched.change(|list| list.push(7));
                    watched.stop();
                    bell.ring();
                })
            };
            let (mut taken, mut answered) = (None, 0);
            while !watched.is_stopped() {
                taken = watched.take().or(taken);
                bell.close();
                if !watched.is_news() {
                    bell.sleep();
                }
                bell.awake(&mut answered);
            }
            assert_eq!(watched.take().or(taken), Some(vec![7]));
            owner.join().unwrap();
        });
    }

    #[test]
    fn a_silence_is_never_longer_than_it_was() {
        loom::model(|| {
            let (vital, listened) = (Arc::new(Vital::new(0)), Arc::new(Listened::new(0)));
            let beat = {
                let (vital, listened) = (vital.clone(), listened.clone());
                thread::spawn(move || {
                    for now_ns in [10, 20] {
                        vital.hear(now_ns);
                        listened.publish(now_ns + 1);
                    }
                })
            };
            let until_ns = listened.get();
            assert!(until_ns.saturating_sub(vital.heard_ns()) <= 1);
            beat.join().unwrap();
        });
    }
}
