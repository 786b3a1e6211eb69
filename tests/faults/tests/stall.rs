//! A lane that swallows everything while the control stream and the heartbeats go on: no kernel and no heartbeat ever
//! finds that, only the pages do that do not come home.

use std::time::{Duration, Instant};

use crossdock::{End, Ended, Peer, ReceiveRequest, SessionEnd};
use crossdock_faults::{Plan, Side, Worker};

const SOON: Duration = Duration::from_secs(40);

#[test]
fn the_pages_of_a_swallowed_room_come_home() {
    for is_pull in [false, true] {
        let [(prefill, prefill_proxies), (decode, decode_proxies)] =
            [1, 2].map(|node| Worker::behind(node, node, false));
        prefill_proxies.iter().chain(&decode_proxies).for_each(|proxy| proxy.set_storm(false));
        let handle = &decode.bench.handle;
        let (peer, mut up) = handle.connect(prefill.node.address()).unwrap();
        up.wait_until(Instant::now() + SOON).unwrap().unwrap();
        // Another room, whose prefill side never comes: it ends with the session.
        let pages = decode.bench.take(1, SOON).unwrap();
        let request = ReceiveRequest {
            peer,
            room: 77,
            use_count: 0,
            tokens: 16,
            skip_tokens: 0,
            pages,
            deadline: SOON,
        };
        let mut waiting = handle.receive(request).unwrap();

        // Only the lanes go through these two.
        prefill_proxies[1].freeze(SOON * 2);
        decode_proxies[1].freeze(SOON * 2);
        let plan = Plan { deadlines: [Duration::from_millis(700); 2], ..Plan::fair(7, is_pull) };
        let [sent, received] = both(&prefill, &decode, &plan, peer);
        assert!(matches!(sent.end, End::Expired { .. }), "{sent}");
        assert!(matches!(received.end, End::Expired { .. }), "{received}");

        // Reads wait for an answer, and so for ever; what is written waits in the kernel, and the pages are home.
        if is_pull {
            let waited = waiting.end.wait_until(Instant::now() + SOON).unwrap().ended.end;
            let is_given_up = matches!(waited, End::PeerLost { cause: SessionEnd::Stalled { .. } });
            assert!(is_given_up, "{waited}");
        }
        drop(waiting);

        prefill_proxies[1].calm();
        decode_proxies[1].calm();
        let until = Instant::now() + SOON;
        for room in 100.. {
            let [sent, received] = both(&prefill, &decode, &Plan::fair(room, is_pull), peer);
            if sent.is_delivered() && received.is_delivered() {
                break;
            }
            assert!(Instant::now() < until, "{sent}; {received}");
        }
        handle.disconnect(peer).unwrap();
        decode.bench.is_empty(0, SOON).unwrap();
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
