//! A process that is out of file descriptors: who is new hears a typed error and waits, who is there lives on; and once
//! there are descriptors again everything goes on without help.
//!
//! The limit is that of the whole process: this file has no other test.

use std::time::{Duration, Instant};

use crossdock::{Ended, Peer};
use crossdock_faults::{Census, Plan, Side, Worker, WorkerOptions};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const SOON: Duration = Duration::from_secs(40);

fn worker(node: u64, shm: bool) -> Result<Worker, crossdock::Error> {
    let name = format!("node-{node}");
    Worker::open(&WorkerOptions {
        name,
        node,
        pages: 128,
        shm,
        tcp: !shm,
        behind: None,
        second: None,
        verify: true,
        gpu: None,
    })
}

#[test]
fn who_is_there_lives_on_without_descriptors() {
    let before = Census::of_this_process();
    for shm in [true, false] {
        let [prefill, decode, late] = [1, 2, 3].map(|node| worker(node, shm).unwrap());
        let (peer, mut up) = decode.bench.handle.connect(prefill.node.address()).unwrap();
        up.wait_until(Instant::now() + SOON).unwrap().unwrap();
        deliver(&prefill, &decode, peer, 0);

        let limit = getrlimit(Resource::Nofile);
        // Fewer than there are; and fewer than a sleeping loop watches, which poll(2) refuses then.
        let fewest = if shm { 8 } else { 0 };
        setrlimit(Resource::Nofile, Rlimit { current: Some(fewest), ..limit }).unwrap();
        assert!(std::fs::File::open("/proc/self/status").is_err(), "there are descriptors");

        // A node of its own is refused, and may be tried again.
        let refused = worker(9, shm).map(drop).unwrap_err();
        assert!(refused.is_retryable(), "{refused}: {}", refused.advice());
        // Whoever is there goes on, as long as one likes.
        for round in 1..20 {
            deliver(&prefill, &decode, peer, round * 10);
        }
        // Both ends of a new session want descriptors: rooms with that peer end by their deadline, and are told where they waited.
        let (new, mut new_up) = decode.bench.handle.connect(late.node.address()).unwrap();
        let plan = Plan { deadlines: [Duration::from_millis(600); 2], ..Plan::fair(500, false) };
        for ended in both(&late, &decode, &plan, new) {
            assert!(!ended.is_delivered() && crossdock_faults::is_typed(&ended), "{ended}");
        }
        deliver(&prefill, &decode, peer, 600);

        setrlimit(Resource::Nofile, limit).unwrap();
        // It has been dialed again all the time.
        if let Err(end) = new_up.wait_until(Instant::now() + SOON).unwrap() {
            assert!(end.is_retryable(), "{end}");
        }
        let until = Instant::now() + SOON;
        for room in 700.. {
            let ended = both(&late, &decode, &Plan::fair(room, true), new);
            if ended.iter().all(Ended::is_delivered) {
                break;
            }
            assert!(Instant::now() < until, "{ended:?}");
        }
        deliver(&prefill, &decode, peer, 900);
        for gone in [peer, new] {
            decode.bench.handle.disconnect(gone).unwrap();
        }
        for worker in [&prefill, &decode, &late] {
            worker.bench.is_empty(0, SOON).unwrap();
        }
    }
    let after = Census::of_this_process();
    assert_eq!((after.descriptors, after.threads), (before.descriptors, before.threads));
}

/// A push and a pull.
fn deliver(prefill: &Worker, decode: &Worker, peer: Peer, room: u64) {
    for is_pull in [false, true] {
        for ended in both(prefill, decode, &Plan::fair(room + u64::from(is_pull), is_pull), peer) {
            assert!(ended.is_delivered(), "room {room}: {ended}");
        }
    }
}

fn both(prefill: &Worker, decode: &Worker, plan: &Plan, peer: Peer) -> [Ended; 2] {
    let (prefill, decode) = (&prefill.bench, &decode.bench);
    std::thread::scope(|scope| {
        let sent = scope.spawn(move || prefill.live(plan, Side::Prefill, peer));
        let received = decode.live(plan, Side::Decode, peer).unwrap().ended;
        [sent.join().unwrap().unwrap().ended, received]
    })
}
