//! Two rails over TCP, one of which fails and works again: the session stays, rooms move over the other one, and then over
//! both.

use std::time::{Duration, Instant};

use crossdock::{Peer, Stats};
use crossdock_faults::{Plan, Proxy, Side, Worker};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn a_rail_that_works_again_is_taken_back_without_a_new_session() {
    let [(prefill, one), (decode, other)] = [1, 2].map(Worker::with_two_rails);
    let proxies = [one, other];
    let (peer, mut up) = decode.bench.handle.connect(prefill.node.address()).unwrap();
    up.wait_until(Instant::now() + SOON).unwrap().unwrap();
    let mut rooms = 1..;
    let mut moved = |what: &str, is_done: &dyn Fn([u64; 2], &Stats) -> bool| {
        let until = Instant::now() + SOON;
        loop {
            let before = written(&prefill);
            deliver(&prefill, &decode, rooms.next().unwrap(), peer);
            let after = written(&prefill);
            let stats = prefill.bench.stats(SOON).unwrap();
            if is_done([0, 1].map(|rail| after[rail] - before[rail]), &stats) {
                return;
            }
            assert!(Instant::now() < until, "{what}: {before:?}, {after:?}, {:?}", stats.counters);
        }
    };
    moved("both rails carry", &|bytes, _| bytes[0] > 0 && bytes[1] > 0);

    // Nothing passes any more, and what was connected is reset: lanes that are tried run into their time-out.
    for proxy in &proxies {
        proxy.freeze(10 * SOON);
        proxy.reset_all();
    }
    moved("the other rail carries all", &|bytes, _| bytes[0] > 0 && bytes[1] == 0);
    std::thread::sleep(Duration::from_secs(3));
    moved("and keeps doing so", &|bytes, stats| {
        assert_eq!((bytes[1], stats.counters.lanes_back), (0, 0), "nothing passes");
        true
    });

    proxies.iter().for_each(Proxy::calm);
    moved("the rail carries again", &|bytes, _| bytes[0] > 0 && bytes[1] > 0);
    for worker in [&prefill, &decode] {
        let counters = worker.bench.stats(SOON).unwrap().counters;
        assert_eq!((counters.sessions, counters.lanes_back), (1, 1), "in the first session still");
    }
    decode.bench.handle.disconnect(peer).unwrap();
    decode.bench.is_empty(0, SOON).unwrap();
}

/// What the two rails of a node have carried away.
fn written(worker: &Worker) -> [u64; 2] {
    let rails = worker.bench.stats(SOON).unwrap().rails;
    [rails[0].written_bytes, rails[1].written_bytes]
}

fn deliver(prefill: &Worker, decode: &Worker, room: u64, peer: Peer) {
    let plan = &Plan::fair(room, false);
    let (prefill, decode) = (&prefill.bench, &decode.bench);
    std::thread::scope(|scope| {
        let sent = scope.spawn(move || prefill.live(plan, Side::Prefill, peer));
        let received = decode.live(plan, Side::Decode, peer).unwrap();
        assert!(received.ended.is_delivered(), "{:?}", received.ended);
        assert!(sent.join().unwrap().unwrap().ended.is_delivered());
    });
}
