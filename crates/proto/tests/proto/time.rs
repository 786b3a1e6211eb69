//! Deadlines, round trips, heartbeats.

use crossdock_proto::{End, LinkCause, SessionEnd, Stage, Who};
use crossdock_transport::DownCause;

use crate::world::{D, MS, P, S, World};

/// How long after `from_ns` a room ended.
fn ended_after(world: &mut World, node: usize, room: crossdock_proto::RoomId, from_ns: u64) -> u64 {
    while world.nodes[node].end(room).is_none() {
        world.run_for(MS);
        assert!(world.now_ns < from_ns + 60 * S);
    }
    (world.now_ns - from_ns) / MS
}

#[test]
fn deadlines_travel_as_durations() {
    // The two clocks agree in the world; what travels is what is left.
    for (decode_s, prefill_s, ends_s) in [(2, 30, 2), (30, 3, 3)] {
        let mut world = World::pair(1);
        world.run_for(7 * S);
        let began_ns = world.now_ns;
        let receiving = world.try_receive(D, world.name(P), 7, decode_s * S).unwrap();
        let sending = world.try_send(P, 7, prefill_s * S).unwrap();
        world.settle();
        let ended = ended_after(&mut world, D, receiving, began_ns);
        assert!(ended.abs_diff(ends_s * 1000) < 10, "after {ended} ms");
        assert!(matches!(world.nodes[P].end(sending), Some(End::Expired { .. })));
        world.run_for(S);
        world.finish();
    }
}

#[test]
fn a_parked_request_grows_no_younger() {
    let mut world = World::pair(1);
    let began_ns = world.now_ns;
    let receiving = world.try_receive(D, world.name(P), 7, 4 * S).unwrap();
    world.run_for(3 * S);
    let sending = world.try_send(P, 7, 30 * S).unwrap();
    let ended = ended_after(&mut world, P, sending, began_ns);
    assert!(ended <= 4_000, "after {ended} ms");
    world.run_for(S);
    assert!(world.nodes[D].end(receiving).is_some());
    world.finish();
}

#[test]
fn the_writer_stops_earlier_by_the_longest_round_trip() {
    let mut world = World::pair(1);
    world.latency_ns = 100 * MS;
    world.run_for(2 * S);
    world.latency_ns = MS;
    world.run_for(2 * S);
    let began_ns = world.now_ns;
    let receiving = world.try_receive(D, world.name(P), 7, 4 * S).unwrap();
    let sending = world.try_send(P, 7, 30 * S).unwrap();
    world.settle();
    let ended = ended_after(&mut world, P, sending, began_ns);
    assert!(ended.abs_diff(3_800) < 5, "after {ended} ms: 200 ms is the longest round trip it has seen");
    world.settle();
    let by_peer = End::Expired { by: Who::Peer, stage: Stage::Grant };
    assert_eq!(world.nodes[D].end(receiving), Some(&by_peer));
    // Never earlier than by a quarter of the time.
    let began_ns = world.now_ns;
    let receiving = world.try_receive(D, world.name(P), 8, 400 * MS).unwrap();
    let sending = world.try_send(P, 8, 30 * S).unwrap();
    world.settle();
    let ended = ended_after(&mut world, P, sending, began_ns);
    assert!(ended.abs_diff(300) < 5, "after {ended} ms");
    world.settle();
    assert!(world.nodes[D].end(receiving).is_some());
    // The reader of a pull likewise.
    let began_ns = world.now_ns;
    let fetching = world.try_fetch(D, world.name(P), 9, 30 * S).unwrap();
    let serving = world.try_serve(P, 9, 4 * S).unwrap();
    world.settle();
    let ended = ended_after(&mut world, D, fetching, began_ns);
    assert!(ended.abs_diff(3_800) < 5, "after {ended} ms");
    world.settle();
    assert!(world.nodes[P].end(serving).is_some());
    world.finish();
}

#[test]
fn a_room_that_nobody_meets_ends_by_its_own_deadline() {
    let mut world = World::pair(1);
    let waiting = world.try_receive(D, crossdock_proto::PeerName::Node(77), 1, S).unwrap();
    let asked = world.try_fetch(D, world.name(P), 2, S).unwrap();
    let (sending, serving) = (world.try_send(D, 3, S).unwrap(), world.try_serve(D, 4, S).unwrap());
    world.run_for(2 * S);
    let end = |stage| Some(End::Expired { by: Who::Here, stage });
    assert_eq!(world.nodes[D].end(waiting).cloned(), end(Stage::Session));
    for room in [asked, sending, serving] {
        assert!(matches!(world.nodes[D].end(room), Some(End::Expired { stage: Stage::Grant, .. })));
    }
    world.finish();
}

#[test]
fn a_reader_that_nobody_answers_expires_and_its_source_too() {
    let mut world = World::pair(1);
    world.nodes[P].offers = false;
    let fetching = world.try_fetch(D, world.name(P), 7, S).unwrap();
    let serving = world.try_serve(P, 7, 5 * S).unwrap();
    world.run_for(2 * S);
    assert_eq!(world.nodes[D].end(fetching), Some(&End::Expired { by: Who::Here, stage: Stage::Grant }));
    assert_eq!(world.nodes[P].end(serving), Some(&End::Expired { by: Who::Peer, stage: Stage::Grant }));
    assert_eq!(world.nodes[P].rooms[&serving].wanted, 1);
    // An offer that comes too late is nobody's.
    world.call(P, |proto, now| proto.offer(now, serving, Vec::new()));
    world.settle();
    world.finish();
}

#[test]
fn a_peer_that_is_not_heard_is_lost_after_so_many_heartbeats() {
    let mut world = World::pair(1);
    let receiving = world.receive(D, P, 7);
    world.run_for(S);
    let stopped_ns = world.now_ns;
    world.nodes[P].is_stopped = true;
    let ended = ended_after(&mut world, D, receiving, stopped_ns);
    assert!((2_000..=2_500).contains(&ended), "ten heartbeats of 200 ms, not {ended} ms");
    let Some(End::PeerLost { cause: SessionEnd::Silent { for_ns } }) = world.nodes[D].end(receiving) else {
        panic!("{:?}", world.nodes[D].end(receiving));
    };
    assert!((2 * S..3 * S).contains(for_ns));
    world.nodes[P].is_stopped = false;
    world.run_for(5 * S);
    assert!(world.session(D, P).is_some(), "it comes back");
    world.finish();
}

#[test]
fn a_node_that_was_stopped_itself_does_not_take_that_for_its_peers_silence() {
    let mut world = World::pair(1);
    world.nodes[D].is_stopped = true;
    // Its peer gives it up, but its own view of the peer is as good as before.
    world.nodes[P].is_deaf = false;
    world.run_for(S);
    world.nodes[D].is_stopped = false;
    world.run_for(5 * S);
    assert_eq!(world.nodes[D].downs, []);
    world.finish();
}

#[test]
fn a_peer_has_time_to_warm_up() {
    let mut world = World::new();
    world.add(|_| ());
    world.add(|config| config.warm_up_grace_ns = 8 * S);
    world.connect(D, P);
    world.settle();
    world.nodes[D].is_deaf = true;
    world.run_for(7 * S);
    assert_eq!(world.nodes[D].downs, []);
    world.run_for(2 * S);
    assert!(matches!(world.nodes[D].downs[0].2, SessionEnd::Silent { .. }));
    world.nodes[D].is_deaf = false;
    world.run_for(5 * S);
    world.finish();
}

#[test]
fn the_smallest_and_the_largest_times_do_no_harm() {
    let mut world = World::new();
    for _ in [P, D] {
        world.add(|config| {
            config.heartbeat_ns = 0;
            config.heartbeats_missed = u32::MAX;
            config.redial_min_ns = 0;
        });
    }
    // Heartbeats are looked after every millisecond, and something is on its way for less than that.
    world.latency_ns = MS / 1000;
    world.connect(D, P);
    world.settle();
    assert!(world.session(D, P).is_some());
    let now = world.now_ns;
    let room = world.try_receive(D, world.name(P), 7, u64::MAX - now).unwrap();
    world.settle();
    world.cancel(D, room);
    let over = world.try_receive(D, world.name(P), 8, 0).unwrap();
    world.run_for(10 * MS);
    assert!(matches!(world.nodes[D].end(over), Some(End::Expired { .. })));
    world.kill(P, DownCause::PeerDied);
    world.run_for(10 * MS);
    world.restart(P);
    world.run_for(S);
    world.finish();
}

#[test]
fn heartbeats_that_cannot_be_exchanged_end_the_session_for_that_reason() {
    let mut world = World::pair(1);
    let room = world.receive(D, P, 7);
    let session = world.session(D, P).unwrap();
    let cause = LinkCause::BadAddress { reason: "an address of another family" };
    world.call(D, |proto, now| proto.watch_failed(now, session, cause));
    let cause = SessionEnd::NoHeartbeats { cause };
    assert_eq!(world.nodes[D].end(room), Some(&End::PeerLost { cause: cause.clone() }));
    assert!(!cause.is_retryable() && cause.to_string().contains("another family"), "{cause}");
    world.finish();
}
