//! A worker's requests, for the threads that work on them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossdock::{PagePool, PageSet, now_ns};
use crossdock_replay::{Arrival, ArriveError, Dock, DockStats, Lease, Next, Waiting};

/// A request that the parent has told of.
pub struct Order {
    pub room: u64,
    pub arrival: Arrival,
    /// When it was told of: its deadline counts from here.
    pub begin: Instant,
}

/// A [`Dock`] that many threads share.
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    dock: Dock<Order>,
    closed: bool,
}

impl Queue {
    pub fn new(pool: PagePool, limit: usize) -> Self {
        let state = State { dock: Dock::new(pool, limit), closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub fn arrive(&self, order: Order, pages: u32, until_ns: u64) -> Result<(), ArriveError> {
        let (blocks, at_ns) = (order.arrival.blocks.clone(), order.arrival.at_ns);
        self.change(|dock| dock.arrive(Waiting { tag: order, pages, blocks, at_ns, until_ns }))
    }

    /// The next request, once it has its pages or its deadline has passed; `None` when there is none left.
    pub fn next(&self) -> Option<Next<Order>> {
        let mut state = self.state();
        loop {
            if let Some(next) = state.dock.next(now_ns()) {
                // The one behind it may have room, too.
                self.changed.notify_one();
                return Some(next);
            }
            let waiting = state.dock.waiting();
            if state.closed && waiting == 0 {
                return None;
            }
            // Pages of rooms that have failed come home without a word.
            let nap = if waiting > 0 { LOOK_AGAIN } else { IDLE };
            let waited = self.changed.wait_timeout(state, nap);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more requests come.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    pub fn keep(&self, lease: &mut Lease, pages: PageSet) {
        self.change(|dock| dock.keep(lease, pages, now_ns()));
    }

    pub fn release(&self, lease: Lease) {
        self.change(|dock| dock.release(lease, now_ns()));
    }

    pub fn release_at(&self, lease: Lease, end_ns: u64) {
        self.change(|dock| dock.release_at(lease, end_ns));
    }

    /// Gives back what nobody uses.
    pub fn clear(&self) {
        self.change(Dock::clear);
    }

    pub fn stats(&self) -> DockStats {
        self.state().dock.stats()
    }

    pub fn pool(&self) -> PagePool {
        self.state().dock.cache().pool().clone()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Dock<Order>) -> T) -> T {
        let changed = change(&mut self.state().dock);
        self.changed.notify_one();
        changed
    }

    /// A thread that panicked has ended the process's work, and its lock matters to nobody.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const LOOK_AGAIN: Duration = Duration::from_millis(2);
const IDLE: Duration = Duration::from_millis(20);
