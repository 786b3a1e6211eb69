//! What a thread has allocated, and on whose behalf. Everything simulated runs on the thread of its test.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// On whose behalf something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Harness,
    Prefill,
    Decode,
}

/// What was allocated on a thread so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allocated {
    pub times: u64,
    pub bytes: u64,
    /// Bytes that are not freed again, by owner.
    live: [i64; 3],
}

impl Allocated {
    /// Bytes that were allocated on this owner's behalf, less what was freed on it.
    pub fn live(&self, owner: Owner) -> i64 {
        self.live[owner as usize]
    }

    /// The same of everybody.
    pub fn live_of_all(&self) -> i64 {
        self.live.iter().sum()
    }

    pub fn since(&self, before: &Self) -> Self {
        let live = std::array::from_fn(|at| self.live[at] - before.live[at]);
        Self { times: self.times - before.times, bytes: self.bytes - before.bytes, live }
    }
}

/// What this thread has allocated so far.
pub fn allocated() -> Allocated {
    ALLOCATED.get()
}

/// Does something on somebody's behalf.
pub fn on_behalf<T>(owner: Owner, work: impl FnOnce() -> T) -> T {
    let before = OWNER.replace(owner);
    let done = work();
    OWNER.set(before);
    done
}

thread_local! {
    static ALLOCATED: Cell<Allocated> = const { Cell::new(Allocated { times: 0, bytes: 0, live: [0; 3] }) };
    static OWNER: Cell<Owner> = const { Cell::new(Owner::Harness) };
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

impl Counting {
    fn note(times: u64, more: usize, less: usize) {
        // A thread that ends allocates nothing that is asked for here.
        let _ = ALLOCATED.try_with(|allocated| {
            let mut now = allocated.get();
            now.times += times;
            now.bytes += more as u64;
            now.live[OWNER.get() as usize] += more as i64 - less as i64;
            allocated.set(now);
        });
    }
}

// SAFETY: everything is handed to the system's allocator as it came; counting allocates nothing, since what it counts
// in needs neither a first use nor a last one.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(1, layout.size(), 0);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        Self::note(0, 0, layout.size());
        // SAFETY: the caller keeps the contract of `dealloc`, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        Self::note(1, bytes, layout.size());
        // SAFETY: the caller keeps the contract of `realloc`, and `at` came from the system's allocator.
        unsafe { System.realloc(at, layout, bytes) }
    }
}
