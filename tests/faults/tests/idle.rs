//! Connections that somebody on the way cuts while nothing moves on them: the next room is delivered all the same, and
//! nobody has to do anything for it.

use std::time::{Duration, Instant};

use crossdock::Peer;
use crossdock_faults::{Plan, Proxy, Side, Worker};

const SOON: Duration = Duration::from_secs(40);

/// How long nothing moves, before a cut and after it: some heartbeats long.
const IDLE: Duration = Duration::from_millis(500);

#[test]
fn what_was_cut_while_idle_is_there_for_the_next_room() {
    let [(prefill, prefill_proxies), (decode, decode_proxies)] =
        [1, 2].map(|node| Worker::behind(node, node, false));
    let proxies: Vec<&Proxy> = prefill_proxies.iter().chain(&decode_proxies).collect();
    proxies.iter().for_each(|proxy| proxy.set_storm(false));
    let (peer, mut up) = decode.bench.handle.connect(prefill.node.address()).unwrap();
    up.wait_until(Instant::now() + SOON).unwrap().unwrap();
    let mut rooms = 0..;
    let mut deliver = |tries: u64| {
        for is_pull in [false, true] {
            let until = Instant::now() + SOON;
            for again in 1.. {
                let ended = both(&prefill, &decode, &Plan::fair(rooms.next().unwrap(), is_pull), peer);
                if ended {
                    break;
                }
                assert!(again < tries && Instant::now() < until, "a room is not delivered");
            }
        }
    };
    deliver(1);
    // The control streams, the lanes, and both: each proxy has one of them.
    for cut in [vec![0, 2], vec![1, 3], vec![0, 1, 2, 3]] {
        std::thread::sleep(IDLE);
        let connections = || proxies.iter().flat_map(|proxy| proxy.counts().into_values()).sum::<u64>();
        let before = connections();
        cut.iter().for_each(|&at| proxies[at].reset_all());
        // It is found without a room's help: before the next one comes there are connections again.
        let until = Instant::now() + SOON;
        while connections() == before {
            assert!(Instant::now() < until, "nothing is dialed again");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(IDLE);
        deliver(u64::MAX);
    }
    decode.bench.handle.disconnect(peer).unwrap();
    prefill.bench.is_empty(0, SOON).unwrap();
    decode.bench.is_empty(0, SOON).unwrap();
}

/// Whether both sides of a room end delivered.
fn both(prefill: &Worker, decode: &Worker, plan: &Plan, peer: Peer) -> bool {
    let (prefill, decode) = (&prefill.bench, &decode.bench);
    std::thread::scope(|scope| {
        let sent = scope.spawn(move || prefill.live(plan, Side::Prefill, peer));
        let received = decode.live(plan, Side::Decode, peer).unwrap().ended;
        let sent = sent.join().unwrap().unwrap().ended;
        sent.is_delivered() && received.is_delivered()
    })
}
