//! A process that may have no more memory: regions and nodes that do not fit are refused by a typed error, and what is
//! there goes on.
//!
//! Regions are mapped, and every refusal of the system is told. The tables of a node, a pool and a port are on the heap:
//! where not even that is left, Rust's allocator ends the process, as it does in every Rust program. They are allocated
//! when a node is opened, so a node that runs needs little more.
//!
//! The limit is that of the whole process: this file has no other test.

use std::time::{Duration, Instant};

use crossdock::{AllocateOptions, Memory, MemoryError, Peer};
use crossdock_faults::{Plan, Side, Worker, WorkerOptions};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const SOON: Duration = Duration::from_secs(40);

fn worker(node: u64, pages: u32) -> Result<Worker, crossdock::Error> {
    let name = format!("node-{node}");
    Worker::open(&WorkerOptions {
        name,
        node,
        pages,
        shm: true,
        tcp: true,
        behind: None,
        second: None,
        verify: true,
        gpu: None,
    })
}

#[test]
fn memory_that_is_not_there_is_told() {
    let [prefill, decode] = [1, 2].map(|node| worker(node, 128).unwrap());
    let (peer, mut up) = decode.bench.handle.connect(prefill.node.address()).unwrap();
    up.wait_until(Instant::now() + SOON).unwrap().unwrap();
    deliver(&prefill, &decode, peer, 0);

    let limit = getrlimit(Resource::As);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let used_bytes = line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10;
    // Enough for threads and the heap, and for no pool.
    let current = Some(used_bytes + (256 << 20));
    setrlimit(Resource::As, Rlimit { current, ..limit }).unwrap();

    let bytes = 1 << 30;
    let refused = Memory::allocate(bytes, &AllocateOptions::default()).map(drop).unwrap_err();
    assert_eq!(refused, MemoryError::OutOfMemory { bytes });
    // A GiB of pages.
    let refused = worker(3, 20_000).map(drop).unwrap_err();
    assert!(matches!(refused, crossdock::Error::Memory(MemoryError::OutOfMemory { .. })), "{refused}");
    assert!(refused.is_retryable(), "{}", refused.advice());
    for round in 1..10 {
        deliver(&prefill, &decode, peer, round * 10);
    }

    setrlimit(Resource::As, limit).unwrap();
    let late = worker(3, 20_000).unwrap();
    let (new, _up) = decode.bench.handle.connect(late.node.address()).unwrap();
    deliver(&late, &decode, new, 500);
    deliver(&prefill, &decode, peer, 600);
}

/// A push and a pull.
fn deliver(prefill: &Worker, decode: &Worker, peer: Peer, room: u64) {
    for is_pull in [false, true] {
        let plan = Plan { deadlines: [SOON; 2], ..Plan::fair(room + u64::from(is_pull), is_pull) };
        let (prefill, decode) = (&prefill.bench, &decode.bench);
        let ended = std::thread::scope(|scope| {
            let sent = scope.spawn(move || prefill.live(&plan, Side::Prefill, peer));
            let received = decode.live(&plan, Side::Decode, peer).unwrap().ended;
            [sent.join().unwrap().unwrap().ended, received]
        });
        assert!(ended.iter().all(|ended| ended.is_delivered()), "room {room}: {ended:?}");
    }
}
