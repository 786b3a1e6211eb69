//! After a lane is up, posting and polling allocate nothing.

#[path = "tcp/common.rs"]
#[allow(dead_code)]
mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::*;
use crossdock_transport::{Access, Direction, Event, Events, GrantId, Op, Port};

#[test]
fn the_data_path_allocates_nothing() {
    let mut pair = Pair::new(4 << 20);
    pair.a.fill(1);
    let (writes, reads) = (GrantId::new(0, 0), GrantId::new(1, 0));
    pair.b.grant_all(writes, Access::Write, 4096);
    pair.b.grant_all(reads, Access::Read, 4096);
    let (from, to) = (shuffled(1, 1024), shuffled(2, 1024));
    let ops = [
        told(pair.pages(Direction::Write, writes, 4096, &from, &to), Some(1), None),
        told(pair.span(Direction::Write, writes, (0, 4096), 1 << 20), Some(2), Some(2)),
        told(pair.pages(Direction::Read, reads, 4096, &from, &to), None, Some(3)),
        told(pair.span(Direction::Read, reads, (0, 0), 1 << 20), None, None),
        told(pair.span(Direction::Write, GrantId::new(0, 9), (0, 0), 5000), Some(3), None),
        told(Op::notify(4), Some(4), Some(4)),
    ];
    let mut events = Events::with_capacity(8);
    let mut round = |pair: &mut Pair| {
        let (mut at, mut within, mut done, mut arrived) = (0, 0, 0, 0);
        while (done, arrived) != (3, 4) {
            if at < ops.len() {
                let next = [ops[at].advance(within)];
                let posted = pair.a.port.post(pair.a.lane, &next).unwrap();
                at += posted.ops;
                within = if posted.ops == 1 { 0 } else { within + posted.within };
            }
            pair.a.port.poll(&mut events);
            pair.b.port.poll(&mut events);
            for event in events.drain() {
                match event {
                    Event::Done { .. } => done += 1,
                    Event::Arrived { .. } => arrived += 1,
                    other => panic!("{other:?}"),
                }
            }
            pair.a.port.arm();
        }
    };
    let before = ALLOCATIONS.get();
    for _ in 0..10 {
        round(&mut pair);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    drop(Box::new(pair));
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
