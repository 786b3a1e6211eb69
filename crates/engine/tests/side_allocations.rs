//! Posting outside rooms, and taking what came of it, allocate nothing.

#[path = "side/pair.rs"]
#[allow(dead_code)]
mod pair;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crossdock_transport::Op;
use pair::*;

#[test]
fn writes_outside_rooms_allocate_nothing() {
    for carrier in [Carrier::Tcp, Carrier::Shm] {
        let mut pair = Pair::allowed(carrier, &Setting { lanes: 2, ..Setting::default() });
        let pages: Vec<u32> = (0..64).rev().collect();
        let step = |pair: &mut Pair, number: u32| {
            let before = ALLOCATIONS.get();
            let session = pair.writer.session();
            let lane = pair.writer.engine.side_lane(session, number as usize).unwrap();
            let with = pair.writer.engine.side_regions(session, lane).unwrap();
            let mut ops = [span(&with, 64 * PAGE, 8 * PAGE), paged(&with, &pages), Op::notify(0)];
            let posted =
                pair.writer.engine.post_side(session, lane, &mut ops, Some(number), Some(number)).unwrap();
            assert_eq!(posted.ops, ops.len(), "{carrier:?}: queues are longer");
            let posting = ALLOCATIONS.get() - before;
            let mut taking = 0;
            let (mut arrived, mut done) = (false, false);
            pair.turn_until("both ends of it", |pair| {
                let before = ALLOCATIONS.get();
                pair.writer.engine.turn_ports(crossdock_engine::now_ns());
                pair.reader.engine.turn_ports(crossdock_engine::now_ns());
                done |= pair.writer.engine.next_side_done().is_some();
                arrived |= pair.reader.engine.next_side_arrival().is_some();
                taking += ALLOCATIONS.get() - before;
                arrived && done
            });
            (posting, taking)
        };
        // What grows with the first ones has grown then. A heartbeat is due now and then, and its message allocates.
        let mut took = Vec::new();
        for number in 0..40 {
            let (posting, taking) = step(&mut pair, number);
            assert_eq!(posting, 0, "{carrier:?}, post {number}");
            took.push(taking);
        }
        let none = took[4..].iter().filter(|&&taking| taking == 0).count();
        assert!(none > 18, "{carrier:?}: {took:?}");
    }
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(7)));
    assert_ne!(ALLOCATIONS.get() - before, 0, "the count counts");
}

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is handed to the system's allocator as it came; the count is a plain thread-local without a
// destructor, so using it allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}
