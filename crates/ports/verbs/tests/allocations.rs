//! After a lane is up, posting and polling allocate nothing. Over real devices, whose library allocates by itself what it
//! needs: the network of devices in this process would be counted as well.

#[path = "errors/network.rs"]
#[allow(dead_code)]
mod network;
#[path = "errors/pair.rs"]
#[allow(dead_code)]
mod pair;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crossdock_transport::{Direction, Event, Events, GrantId, Op, Port, Shape, Token};
use network::Devices;
use pair::{Pair, impatient};

#[test]
fn the_data_path_allocates_nothing() {
    let Some(mut devices) = Devices::new() else { return };
    let mut pair = Pair::new(&mut devices, impatient());
    let (from, to): (Vec<u32>, Vec<u32>) = (0..500).map(|at| (at * 7 % 500, at * 3 % 500)).unzip();
    let pages = |direction| Op {
        direction,
        grant: GrantId::NONE,
        shape: Shape::Pages {
            local: pair.regions[0],
            local_offset: 0,
            local_stride_bytes: 2000,
            local_pages: &from,
            remote: pair.remotes[0],
            remote_offset: 0,
            remote_stride_bytes: 2000,
            remote_pages: &to,
            piece_bytes: 1152,
        },
        imm: None,
        token: None,
    };
    let span = |direction, bytes| pair.op(0, direction, 0, bytes);
    let ops = [
        Op { imm: Some(1), ..pages(Direction::Write) },
        Op { imm: Some(2), token: Some(Token(2)), ..span(Direction::Write, 100_000) },
        Op { token: Some(Token(3)), ..pages(Direction::Read) },
        span(Direction::Read, 50_000),
        Op { imm: Some(3), ..span(Direction::Write, 40) },
        Op { token: Some(Token(4)), ..Op::notify(4) },
    ];
    let mut events = Events::with_capacity(8);
    let (lane, ports) = (pair.lanes[0], &mut pair.ports);
    let mut round = |ports: &mut [crossdock_verbs::VerbsPort; 2]| {
        let (mut at, mut within, mut done, mut arrived) = (0, 0, 0, 0);
        while (done, arrived) != (3, 4) {
            if at < ops.len() {
                let posted = ports[0].post(lane, &[ops[at].advance(within)]).expect("a good op");
                at += posted.ops;
                within = if posted.ops == 1 { 0 } else { within + posted.within };
            }
            for port in ports.iter_mut() {
                port.poll(&mut events);
            }
            for event in events.drain() {
                match event {
                    Event::Done { .. } => done += 1,
                    Event::Arrived { .. } => arrived += 1,
                    other => panic!("{other:?}"),
                }
            }
            ports[0].arm();
        }
    };
    let before = ALLOCATIONS.get();
    // More than one lane's worth of credits, so that they are given back meanwhile.
    for _ in 0..40 {
        round(ports);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    drop(Box::new(before));
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
#[allow(unsafe_code)]
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
