//! The list.

use std::time::Duration;

use crossdock_memory::{AllocateOptions, HugePages, Memory};
use crossdock_transport::{Direction, DownCause, Event, Events, Op, Port, Token};

use crate::network::Network;
use crate::pair::{BYTES, Pair, impatient};

type Case = fn(&mut dyn Network);

pub const CASES: &[(&str, Case)] = &[
    ("what_was_deregistered_is_out_of_reach", what_was_deregistered_is_out_of_reach),
    ("a_read_of_what_was_deregistered", a_read_of_what_was_deregistered),
    ("a_link_that_goes_down_and_comes_back", a_link_that_goes_down_and_comes_back),
    ("an_idle_lane_notices_a_link_that_is_down", an_idle_lane_notices_a_link_that_is_down),
    ("a_link_that_loses_packets", a_link_that_loses_packets),
    ("a_bye_says_who_has_closed", a_bye_says_who_has_closed),
    ("memory_is_probed", memory_is_probed),
    ("huge_pages_are_registered", huge_pages_are_registered),
    ("one_lane_ends_and_the_other_goes_on", one_lane_ends_and_the_other_goes_on),
    ("a_queue_pair_that_is_pushed_into_error", a_queue_pair_that_is_pushed_into_error),
    ("all_that_is_out_on_many_lanes_comes_back_at_once", all_that_is_out_on_many_lanes_comes_back_at_once),
    (
        "a_peer_that_does_not_poll_is_sent_what_it_has_room_for",
        a_peer_that_does_not_poll_is_sent_what_it_has_room_for,
    ),
    ("each_lane_keeps_its_order", each_lane_keeps_its_order),
];

/// The poster names memory that its owner has deregistered: its device says so, with everything that one needs to know;
/// not a byte changes; the owner's end ends too.
fn what_was_deregistered_is_out_of_reach(network: &mut dyn Network) {
    let mut pair = Pair::new(network, impatient());
    pair.memory[0].fill(0, BYTES, 0x11).expect("the whole");
    let region = pair.regions[1];
    pair.ports[1].deregister(region).expect("nothing uses it");
    let write = pair.op(0, Direction::Write, 0, 10_000);
    pair.post(0, Op { imm: Some(1), token: Some(Token(1)), ..write });
    let [poster, owner] = pair.endings();
    assert_eq!(poster, "IBV_WC_REM_ACCESS_ERR");
    // The specification has the owner's device report the refusal; soft-RoCE does not, and the next sign of life is flushed.
    let expected = ["IBV_EVENT_QP_ACCESS_ERR", "IBV_WC_WR_FLUSH_ERR"];
    assert!(expected.contains(&owner.as_str()), "{owner}");
    let Some(DownCause::Device(error)) = pair.down(0) else { unreachable!("it has a name") };
    assert_eq!(error.device.as_str(), pair.ports[0].info().name);
    assert_ne!(error.queue_pair, 0);
    assert_ne!(error.peer, [0; 16]);
    let advice = error.meaning.advice;
    assert!(advice.contains("deregistered"), "{advice}");
    assert!(!pair.done(0, 1) && pair.arrived(1) == 0, "a refused write was told as done");
    let mut found = vec![0; 10_000];
    pair.memory[1].read(0, &mut found).expect("inside");
    assert!(found.iter().all(|&byte| byte == 0), "a refused write has landed");
}

/// The same by a read.
fn a_read_of_what_was_deregistered(network: &mut dyn Network) {
    let mut pair = Pair::new(network, impatient());
    let region = pair.regions[1];
    pair.ports[1].deregister(region).expect("nothing uses it");
    let read = pair.op(0, Direction::Read, 0, 10_000);
    pair.post(0, Op { token: Some(Token(1)), ..read });
    assert_eq!(pair.endings()[0], "IBV_WC_REM_ACCESS_ERR");
    assert!(!pair.done(0, 1));
}

/// Both ends find out by their own means, and what lies between their ports is as good as new afterwards.
fn a_link_that_goes_down_and_comes_back(network: &mut dyn Network) {
    let mut pair = Pair::new(network, impatient());
    network.set_link(1, false);
    for at in 0..10 {
        let write = pair.op(0, Direction::Write, at * 1000, 1000);
        pair.post(0, Op { imm: Some(1), token: Some(Token(at)), ..write });
    }
    unanswered(&pair.endings());
    assert!((0..10).all(|at| !pair.done(0, at)), "what never arrived was told as done");
    network.set_link(1, true);
    // A link takes a moment to be known as up.
    pair.settle(Duration::from_millis(200));
    pair.connect();
    pair.memory[0].fill(0, 5000, 0x77).expect("inside");
    let write = pair.op(0, Direction::Write, 0, 5000);
    pair.post(0, Op { imm: Some(2), token: Some(Token(20)), ..write });
    pair.wait("a write over the link that is back", |pair| pair.arrived(1) == 1 && pair.done(0, 20));
    let mut found = vec![0; 5000];
    pair.memory[1].read(0, &mut found).expect("inside");
    assert!(found.iter().all(|&byte| byte == 0x77));
}

/// No acknowledgement came. Soft-RoCE also says that it could not send in the first place.
#[track_caller]
fn unanswered(endings: &[String; 2]) {
    let expected = ["IBV_WC_RETRY_EXC_ERR", "IBV_WC_LOC_QP_OP_ERR"];
    assert!(endings.iter().all(|ending| expected.contains(&ending.as_str())), "{endings:?}");
}

/// Nobody posts anything: signs of life find it out.
fn an_idle_lane_notices_a_link_that_is_down(network: &mut dyn Network) {
    let mut pair = Pair::new(network, impatient());
    pair.settle(Duration::from_millis(300));
    assert_eq!((pair.down(0), pair.down(1)), (None, None), "a lane that is idle and well stays up");
    network.set_link(1, false);
    unanswered(&pair.endings());
    assert!(pair.ports[0].counters().keepalives > 0);
    network.set_link(1, true);
}

/// Packets that are lost are sent again: everything arrives, in order, once.
fn a_link_that_loses_packets(network: &mut dyn Network) {
    let mut options = impatient();
    options.retries = 6;
    let mut pair = Pair::new(network, options);
    network.set_loss(2);
    const OPS: u64 = 60;
    for at in 0..OPS {
        pair.memory[0].fill(at as usize * 3000, 3000, at as u8 + 1).expect("inside");
        let write = pair.op(0, Direction::Write, at * 3000, 3000);
        pair.post(0, Op { imm: Some(at as u32), token: Some(Token(at)), ..write });
    }
    pair.wait("all writes", |pair| pair.arrived(1) == OPS as usize && pair.done(0, OPS - 1));
    network.set_loss(0);
    let mut found = vec![0; OPS as usize * 3000];
    pair.memory[1].read(0, &mut found).expect("inside");
    assert!((0..OPS as usize).all(|at| found[at * 3000..][..3000].iter().all(|&byte| byte == at as u8 + 1)));
}

fn a_bye_says_who_has_closed(network: &mut dyn Network) {
    let mut pair = Pair::new(network, impatient());
    let lane = pair.lanes[1];
    pair.ports[1].close(lane);
    assert_eq!(pair.endings(), ["ClosedByPeer", "ClosedHere"]);
    for side in [0, 1] {
        let counters = pair.ports[side].counters();
        assert_eq!((counters.queue_pairs_created, counters.queue_pairs_destroyed), (1, 1));
        assert_eq!(counters.device_errors, 0);
    }
}

/// What was in the memory is there afterwards.
fn memory_is_probed(network: &mut dyn Network) {
    let mut options = impatient();
    options.probe_regions = true;
    let pair = Pair::new(network, options.clone());
    let mut port = network.open(0, options);
    for bytes in [1, 63, 64, 65, 5000] {
        let memory = Memory::allocate(bytes, &AllocateOptions::default()).expect("memory for a test");
        memory.fill(0, bytes, 0x5A).expect("the whole");
        port.register(&memory).expect("memory that the device can reach");
        let mut found = vec![0; bytes];
        memory.read(0, &mut found).expect("the whole");
        assert!(found.iter().all(|&byte| byte == 0x5A), "a probe has changed memory of {bytes} bytes");
    }
    drop(pair);
}

/// Where the host has some reserved; else pages that the kernel may make huge.
fn huge_pages_are_registered(network: &mut dyn Network) {
    let mut options = impatient();
    options.probe_regions = true;
    let mut port = network.open(0, options);
    let pages = AllocateOptions { huge_pages: HugePages::Try, prefault: true, ..AllocateOptions::default() };
    let memory = Memory::allocate(3 << 20, &pages).expect("memory for a test");
    let (region, _) = port.register(&memory).expect("memory that the device can reach");
    assert_eq!(port.deregister(region), Ok(()));
}

/// Lanes share queues of receives and completions, and nothing else.
fn one_lane_ends_and_the_other_goes_on(network: &mut dyn Network) {
    let mut pair = Pair::new(network, impatient());
    let first = (pair.lanes, pair.remotes);
    pair.connect();
    let region = pair.regions[1];
    let second = pair.lanes;
    // The first lane names a key that is gone; its own end is the only one.
    let (other, key) = pair.ports[1].register(&pair.memory[1].clone()).expect("twice is allowed");
    pair.ports[1].deregister(region).expect("nothing uses it");
    (pair.lanes, pair.remotes) = first;
    let write = pair.op(0, Direction::Write, 0, 100);
    pair.post(0, Op { imm: Some(1), ..write });
    assert_eq!(pair.endings()[0], "IBV_WC_REM_ACCESS_ERR");
    pair.lanes = second;
    pair.regions[1] = other;
    pair.remotes[0] = pair.ports[0].attach(second[0], &key).expect("a good key").id;
    let write = pair.op(0, Direction::Write, 0, 100);
    pair.post(0, Op { imm: Some(2), token: Some(Token(9)), ..write });
    pair.wait("a write on the other lane", |pair| pair.arrived(1) == 1 && pair.done(0, 9));
}

/// What is out is flushed: it is not told as done, and what was done before is a beginning of it, all of which has arrived.
/// The peer's device is not answered any more.
fn a_queue_pair_that_is_pushed_into_error(network: &mut dyn Network) {
    const OPS: u64 = 40;
    let mut pair = Pair::new(network, impatient());
    pair.memory[0].fill(0, BYTES, 0x3C).expect("the whole");
    for at in 0..OPS {
        let write = pair.op(0, Direction::Write, at * 20_000, 20_000);
        pair.post(0, Op { imm: Some(at as u32), token: Some(Token(at)), ..write });
    }
    pair.ports[0].push_into_error(pair.lanes[0]);
    let [poster, peer] = pair.endings();
    assert_eq!(poster, "IBV_WC_WR_FLUSH_ERR");
    assert_eq!(peer, "IBV_WC_RETRY_EXC_ERR");
    let Some(DownCause::Device(error)) = pair.down(0) else { unreachable!("it has a name") };
    assert!(!error.meaning.advice.is_empty() && error.queue_pair != 0);
    let done = (0..OPS).take_while(|&at| pair.done(0, at)).count();
    assert!((done as u64..OPS).all(|at| !pair.done(0, at)), "told as done after one that was not");
    assert!(pair.arrived(1) >= done, "{done} were done and {} arrived", pair.arrived(1));
    let mut found = vec![0; pair.arrived(1) * 20_000];
    pair.memory[1].read(0, &mut found).expect("inside");
    assert!(found.iter().all(|&byte| byte == 0x3C), "an arrival was told before its bytes");
    pair.connect();
}

/// The queue of completions holds what every lane has out, and every receive, though none of them was asked for: nothing of
/// it is lost, every lane ends, and there is room for new ones.
fn all_that_is_out_on_many_lanes_comes_back_at_once(network: &mut dyn Network) {
    const LANES: usize = 6;
    let mut options = impatient();
    (options.requests_per_lane, options.immediates_per_lane, options.max_lanes) = (64, 16, LANES as u32);
    let mut pair = Pair::new(network, options);
    let mut lanes = vec![(pair.lanes, pair.remotes)];
    while lanes.len() < LANES {
        pair.connect();
        lanes.push((pair.lanes, pair.remotes));
    }
    for _ in 0..3 {
        for side in [0, 1] {
            for &lane in &lanes {
                (pair.lanes, pair.remotes) = lane;
                for at in 0..64 {
                    let write = pair.op(side, Direction::Write, at * 5000, 5000);
                    let imm = (at < 16).then_some(at as u32);
                    pair.post(side, Op { imm, ..write });
                }
            }
        }
        for side in [0, 1] {
            lanes.iter().for_each(|(lane, _)| pair.ports[side].push_into_error(lane[side]));
        }
        for (lane, _) in lanes.drain(..) {
            pair.lanes = lane;
            // Where all was done already, a sign of life finds out.
            let endings = pair.endings();
            assert_eq!(endings, ["IBV_WC_WR_FLUSH_ERR", "IBV_WC_WR_FLUSH_ERR"]);
        }
        while lanes.len() < LANES {
            pair.connect();
            lanes.push((pair.lanes, pair.remotes));
        }
    }
}

/// A device without a receive answers that it is not ready; that costs time and, more often than a few times, the lane. So it
/// is never asked without: the poster keeps back what the peer has no room for.
fn a_peer_that_does_not_poll_is_sent_what_it_has_room_for(network: &mut dyn Network) {
    const ROOM: usize = 8;
    const OPS: usize = 50;
    let mut options = impatient();
    options.immediates_per_lane = ROOM as u32;
    // The peer hears nothing for long.
    options.keepalive = Duration::from_secs(60);
    let mut pair = Pair::new(network, options);
    let lane = pair.lanes[0];
    let mut events = Events::with_capacity(64);
    let mut taken = 0;
    for _ in 0..200 {
        let (imm, token) = (Some(taken as u32), Some(Token(taken as u64)));
        let op = Op { imm, token, ..Op::notify(0) };
        taken += pair.ports[0].post(lane, &[op]).expect("a good op").ops;
        pair.ports[0].poll(&mut events);
        pair.said[0].extend(events.drain());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(taken, ROOM, "no more than the peer has room for");
    while taken < OPS {
        let (imm, token) = (Some(taken as u32), Some(Token(taken as u64)));
        pair.post(0, Op { imm, token, ..Op::notify(0) });
        taken += 1;
    }
    pair.wait("all to arrive", |pair| pair.arrived(1) == OPS && pair.done(0, OPS as u64 - 1));
    assert!((0..OPS as u64).all(|at| pair.done(0, at)));
    assert_eq!((pair.down(0), pair.down(1)), (None, None));
}

/// Packets of two lanes overtake each other, and those that are lost come again: of each lane everything arrives and is done
/// in the order of its posting, once.
fn each_lane_keeps_its_order(network: &mut dyn Network) {
    const OPS: u32 = 40;
    let mut options = impatient();
    options.retries = 6;
    let mut pair = Pair::new(network, options);
    let first = (pair.lanes, pair.remotes);
    pair.connect();
    let lanes = [first, (pair.lanes, pair.remotes)];
    network.set_loss(2);
    for at in 0..OPS {
        for (which, lane) in lanes.iter().enumerate() {
            (pair.lanes, pair.remotes) = *lane;
            let offset = (u64::from(at) * 2 + which as u64) * 4000;
            // Long and short ones, so that neither lane is always ahead.
            let bytes = if (at as usize + which).is_multiple_of(2) { 4000 } else { 40 };
            let write = pair.op(0, Direction::Write, offset, bytes);
            pair.post(0, Op { imm: Some(at), token: Some(Token(at.into())), ..write });
        }
    }
    pair.wait("all writes on both lanes", |pair| pair.arrived(1) == 2 * OPS as usize);
    network.set_loss(0);
    for (lane, _) in lanes {
        pair.lanes = lane;
        pair.wait("the last token", |pair| pair.done(0, u64::from(OPS) - 1));
        let arrived = pair.said[1].iter().filter_map(|event| match event {
            Event::Arrived { lane: of, imm, .. } if *of == lane[1] => Some(*imm),
            _ => None,
        });
        assert!(arrived.eq(0..OPS), "{:?}", pair.said[1]);
        let done = pair.said[0].iter().filter_map(|event| match event {
            Event::Done { lane: of, token } if *of == lane[0] => Some(token.0),
            _ => None,
        });
        assert!(done.eq((0..OPS).map(u64::from)), "{:?}", pair.said[0]);
    }
}
