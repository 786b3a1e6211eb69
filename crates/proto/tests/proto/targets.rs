//! Addresses that are dialed: again and again, from both sides at once, and under several names.

use crossdock_proto::{End, PeerName, Refusal, RoomError, RoomRefusal, SessionEnd, Who};
use crossdock_transport::DownCause;
use proptest::prelude::*;

use crate::world::{BAD_ADDRESS, D, MS, NO_ADDRESS, P, S, STREAM_ENDED, UNREACHED, World, address};

fn lives(world: &World) -> Vec<usize> {
    world.nodes.iter().map(|node| node.proto.sessions_live()).collect()
}

#[test]
fn an_address_where_nobody_listens_is_dialed_with_growing_pauses() {
    let mut world = World::unconnected(1);
    world.kill(P, DownCause::PeerDied);
    let target = world.connect(D, P);
    let mut dials = Vec::new();
    for _ in 0..200 {
        world.run_for(50 * MS);
        if dials.last().is_none_or(|&(count, _)| count != world.nodes[D].dials) {
            dials.push((world.nodes[D].dials, world.now_ns / MS));
        }
    }
    let pauses: Vec<u64> = dials.windows(2).map(|pair| pair[1].1 - pair[0].1).collect();
    assert_eq!(pauses, [100, 200, 400, 800, 1600, 2000, 2000, 2000]);
    assert!(
        world.nodes[D]
            .downs
            .iter()
            .all(|down| *down == (None, Some(target), SessionEnd::Unreachable { cause: UNREACHED }))
    );
    // Once there was a session, the next pause is short again.
    world.restart(P);
    world.run_for(3 * S);
    assert!(world.session(D, P).is_some());
    world.cut(D, P);
    world.run_for(100 * MS);
    assert!(world.session(D, P).is_some());
    world.finish();
}

#[test]
fn a_peer_that_starts_again_is_found_again() {
    let mut world = World::pair(1);
    let target = world.nodes[D].ups[0].1;
    world.kill(P, DownCause::PeerDied);
    world.settle();
    assert_eq!(world.nodes[D].downs[0].2, STREAM_ENDED);
    world.restart(P);
    world.run_for(S);
    let (_, again, peer) = *world.nodes[D].ups.last().unwrap();
    assert_eq!((again, peer.incarnation), (target, 2));
    world.finish();
}

/// The end of the old stream may be found later than the new life dials.
#[test]
fn an_acceptor_learns_of_a_new_life_from_its_dial() {
    let mut world = World::pair(1);
    let old = world.session(P, D);
    let (stream, end) = world.stream(P, D);
    world.streams.all[stream].is_held[end] = true;
    world.nodes[P].holds_downs = true;
    world.kill(D, DownCause::Broken { call: "recv", errno: 104 });
    world.restart(D);
    world.connect(D, P);
    world.settle();
    assert_eq!(world.nodes[P].downs, [(old, None, SessionEnd::Restarted)]);
    assert_eq!(world.nodes[P].ups[1].2.incarnation, 2);
    world.nodes[P].holds_downs = false;
    world.let_all_down();
    world.streams.all[stream].is_held[end] = false;
    world.finish();
}

/// So may the dialer, which has two ways to the peer.
#[test]
fn a_dialer_learns_of_a_new_life_from_its_welcome() {
    let mut world = World::pair(1);
    let old = world.session(D, P);
    let (stream, end) = world.stream(D, P);
    world.streams.all[stream].is_held[end] = true;
    world.nodes[D].holds_downs = true;
    world.kill(P, DownCause::Broken { call: "recv", errno: 104 });
    world.restart(P);
    world.connect(D, P);
    world.settle();
    assert_eq!(world.nodes[D].downs[0].0, old);
    assert_eq!(world.nodes[D].downs[0].2, SessionEnd::Restarted);
    assert_eq!(world.nodes[D].ups.last().unwrap().2.incarnation, 2);
    world.nodes[D].holds_downs = false;
    world.let_all_down();
    world.streams.all[stream].is_held[end] = false;
    world.run_for(S);
    assert_eq!(lives(&world), [1, 1]);
    world.finish();
}

#[test]
fn a_side_that_has_lost_the_stream_replaces_the_session() {
    for (a, b) in [(D, P), (P, D)] {
        let mut world = World::unconnected(1);
        world.connect(a, b);
        world.settle();
        // Only the dialer finds the stream broken; the acceptor learns of it from the next dial.
        let (stream, end) = world.stream(a, b);
        world.streams.all[stream].is_held[1 - end] = true;
        world.nodes[b].holds_downs = true;
        world.cut_end(stream, end);
        world.run_for(100 * MS);
        assert_eq!(world.nodes[b].downs[0].2, STREAM_ENDED);
        assert!(world.session(a, b).is_some() && world.session(b, a).is_some());
        assert_eq!(lives(&world)[b], 2, "the lanes of the old one are not down yet");
        world.nodes[b].holds_downs = false;
        world.let_all_down();
        world.settle();
        assert_eq!(lives(&world), [1, 1]);
        world.streams.all[stream].is_held = [false; 2];
        world.finish();
    }
}

#[test]
fn a_second_target_for_the_same_peer_holds_the_same_session() {
    let mut world = World::pair(1);
    let (session, first, _) = world.nodes[D].ups[0];
    let second = world.connect(D, P);
    world.settle();
    assert_eq!(world.nodes[D].ups[1].0, session);
    assert_eq!(world.nodes[D].ups[1].1, Some(second), "it is told like any other");
    assert_eq!(lives(&world), [1, 1]);
    // Both are dialed again when it is lost, and both find the next one.
    world.kill(P, DownCause::PeerDied);
    world.settle();
    world.restart(P);
    world.run_for(2 * S);
    let found = [first.unwrap(), second].map(|t| world.nodes[D].proto.session_of(PeerName::Target(t)));
    assert!(found[0].is_some() && found[0] == found[1]);
    // Giving up one leaves the session to the other.
    world.call(D, |proto, now| proto.disconnect(now, second));
    world.settle();
    assert_eq!(world.session(D, P), found[0]);
    assert_eq!(world.nodes[D].downs.last(), Some(&(None, Some(second), SessionEnd::ClosedHere)));
    world.call(D, |proto, now| proto.disconnect(now, first.unwrap()));
    world.run_for(S);
    assert_eq!(lives(&world), [0, 0]);
    assert_eq!(world.nodes[P].downs.last().unwrap().2, SessionEnd::ClosedByPeer);
    world.finish();
}

#[test]
fn two_targets_dialed_at_once_hold_one_session() {
    let mut world = World::unconnected(1);
    let targets = [world.connect(D, P), world.connect(D, P)];
    world.settle();
    assert_eq!(lives(&world), [1, 1]);
    let mut told: Vec<_> = world.nodes[D].ups.iter().map(|(_, target, _)| target.unwrap()).collect();
    told.sort();
    assert_eq!(told, targets);
    world.finish();
}

#[test]
fn a_room_meets_its_peer_by_any_of_its_names() {
    let mut world = World::pair(1);
    let second = world.connect(D, P);
    let room = world.try_receive(D, PeerName::Target(second), 7, 10 * S).unwrap();
    let twin = world.try_receive(D, world.name(P), 7, 10 * S).unwrap();
    world.settle();
    let duplicate = End::Refused { by: Who::Here, why: RoomRefusal::Duplicate };
    assert_eq!(world.nodes[D].end(room), Some(&duplicate), "two names of one peer, one name of a room");
    assert_eq!(world.nodes[D].end(twin), None);
    world.cancel(D, twin);
    world.settle();
    world.finish();
}

#[test]
fn a_target_that_is_given_up_ends_what_waits_for_it() {
    let mut world = World::unconnected(1);
    world.kill(P, DownCause::PeerDied);
    let target = world.connect(D, P);
    let room = world.try_receive(D, PeerName::Target(target), 7, 10 * S).unwrap();
    assert_eq!(world.nodes[D].end(room), None);
    world.call(D, |proto, now| proto.disconnect(now, target));
    assert_eq!(world.nodes[D].end(room), Some(&End::PeerLost { cause: SessionEnd::ClosedHere }));
    assert!(world.nodes[D].is_home(room));
    let again = world.try_receive(D, PeerName::Target(target), 7, 10 * S);
    assert_eq!(again, Err(RoomError::UnknownPeer));
    let dials = world.nodes[D].dials;
    world.run_for(10 * S);
    assert_eq!(world.nodes[D].dials, dials);
    world.finish();
}

/// By the side that dialed, which then does so no more, or by the other one, which may be dialed again.
#[test]
fn a_session_is_closed_from_either_side() {
    let mut world = World::unconnected(2);
    let targets = [world.connect(D, P), world.connect(D, P)];
    world.settle();
    let (here, there) = (world.session(D, P), world.session(P, D));
    world.call(P, |proto, now| proto.close_session(now, there.unwrap()));
    world.settle();
    assert_eq!(world.nodes[P].downs, [(there, None, SessionEnd::ClosedHere)]);
    let told = targets.map(|target| (here, Some(target), SessionEnd::ClosedByPeer));
    assert_eq!(world.nodes[D].downs, told);
    world.run_for(S);
    let (again, there) = (world.session(D, P), world.session(P, D));
    assert!(again.is_some() && again != here, "the dialer dials again");

    world.nodes[D].downs.clear();
    for _ in 0..2 {
        world.call(D, |proto, now| proto.close_session(now, again.unwrap()));
    }
    world.settle();
    let dials = world.nodes[D].dials;
    world.run_for(10 * S);
    assert_eq!((lives(&world), world.nodes[D].dials), (vec![0, 0], dials));
    let told = targets.map(|target| (again, Some(target), SessionEnd::ClosedHere));
    assert_eq!(world.nodes[D].downs, told, "told once for each target");
    assert_eq!(world.nodes[P].downs.last(), Some(&(there, None, SessionEnd::ClosedByPeer)));
    world.finish();
}

/// The session's owner has a cause of its own: the peer hears a goodbye, and is dialed again.
#[test]
fn a_session_that_its_owner_gives_up_is_begun_again() {
    let mut world = World::pair(1);
    let here = world.session(D, P);
    let cause = SessionEnd::Misbehaved { what: "is in a test" };
    let why = cause.clone();
    world.call(D, |proto, now| proto.lose_session(now, here.unwrap(), why));
    world.run_for(S);
    assert_eq!((world.nodes[D].downs[0].0, &world.nodes[D].downs[0].2), (here, &cause));
    assert_eq!(world.nodes[P].downs[0].2, SessionEnd::ClosedByPeer);
    assert!(world.session(D, P).is_some_and(|again| Some(again) != here));
    world.finish();
}

/// Given up before the dial, the connection, the welcome or the session has come.
#[test]
fn a_target_can_be_given_up_at_any_time() {
    for frames in 0..12 {
        let mut world = World::unconnected(1);
        let target = world.connect(D, P);
        for _ in 0..frames {
            if let Some((at_ns, _, channel)) = world.open_channels().into_iter().min() {
                world.deliver(at_ns, channel);
            }
        }
        world.call(D, |proto, now| proto.disconnect(now, target));
        world.run_for(10 * S);
        assert_eq!((lives(&world), world.nodes[D].dials), (vec![0, 0], 1), "after {frames} frames");
        world.finish();
    }
    // The network's answer to a dial may come after the target is gone.
    let mut world = World::unconnected(1);
    let address = address(P);
    let target = {
        let proto = &mut world.nodes[D].proto;
        let target = proto.connect(S, address);
        proto.disconnect(S, target);
        target
    };
    world.pump_all();
    world.settle();
    assert_eq!(lives(&world), [0, 0]);
    assert_eq!(world.nodes[D].downs, [(None, Some(target), SessionEnd::ClosedHere)]);
    world.finish();
}

#[test]
fn an_address_that_cannot_be_dialed_is_given_up_with_its_reason() {
    let mut world = World::unconnected(1);
    let mut target = None;
    world.call(D, |proto, now| target = Some(proto.connect(now, NO_ADDRESS)));
    let name = PeerName::Target(target.unwrap());
    let cause = SessionEnd::Unreachable { cause: BAD_ADDRESS };
    assert_eq!(world.nodes[D].downs, [(None, target, cause.clone())]);
    assert!(!cause.is_retryable() && cause.to_string().contains("not an address"), "{cause}");
    let room = world.try_receive(D, name, 1, 10 * S).unwrap();
    assert_eq!(world.nodes[D].end(room), Some(&End::PeerLost { cause }));
    world.run_for(10 * S);
    assert_eq!(world.nodes[D].dials, 1);
    world.finish();
}

#[test]
fn rooms_that_wait_for_a_peer_that_refuses_end_at_once() {
    let mut world = World::new();
    world.add(|config| config.auth = crossdock_proto::Auth::PreSharedKey(b"key".to_vec()));
    world.add(|_| ());
    let target = world.connect(D, P);
    let waiting = world.try_receive(D, PeerName::Target(target), 7, 10 * S).unwrap();
    world.settle();
    let end = End::Refused { by: Who::Peer, why: RoomRefusal::Handshake(Refusal::AuthMismatch) };
    assert_eq!(world.nodes[D].end(waiting), Some(&end));
    let late = world.try_fetch(D, PeerName::Target(target), 8, 10 * S).unwrap();
    assert_eq!(world.nodes[D].end(late), Some(&end));
    world.run_for(10 * S);
    assert_eq!(world.nodes[D].dials, 1);
    world.finish();
}

#[test]
fn a_shut_node_ends_everything_and_begins_nothing() {
    let mut world = World::pair(1);
    let bound = world.receive(D, P, 1);
    let elsewhere = world.try_receive(D, PeerName::Node(999), 2, 10 * S).unwrap();
    let (sending, serving) = (world.send(D, 3), world.serve(D, 4));
    world.call(D, |proto, now| proto.shut_down(now));
    let end = End::PeerLost { cause: SessionEnd::ClosedHere };
    for room in [bound, elsewhere, sending, serving] {
        assert_eq!(world.nodes[D].end(room), Some(&end));
    }
    let late = [world.send(D, 5), world.serve(D, 6), world.receive(D, P, 7)];
    for room in late {
        assert_eq!(world.nodes[D].end(room), Some(&end));
    }
    let target = world.connect(D, P);
    assert_eq!(world.try_receive(D, PeerName::Target(target), 8, S), Err(RoomError::UnknownPeer));
    world.connect(P, D);
    world.run_for(3 * S);
    assert_eq!(lives(&world), [0, 0]);
    assert_eq!(world.nodes[P].downs[0].2, SessionEnd::ClosedByPeer);
    world.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// However the frames of two dials cross, one session remains, and the targets of both sides hold it. Nobody
    /// needs to dial again.
    #[test]
    fn two_nodes_that_dial_each_other_at_once_share_one_session(
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        twice in any::<bool>(),
    ) {
        let mut world = World::unconnected(1);
        world.connect(D, P);
        world.connect(P, D);
        if twice {
            world.connect(D, P);
        }
        for pick in order {
            let open = world.open_channels();
            if open.is_empty() {
                break;
            }
            let (at_ns, _, channel) = *pick.get(&open);
            world.deliver(at_ns, channel);
        }
        world.settle();
        prop_assert!(world.now_ns < S + 50 * MS, "before anybody dials again");
        let (here, there) = (world.session(D, P), world.session(P, D));
        prop_assert!(here.is_some() && there.is_some());
        prop_assert_eq!(lives(&world), [1, 1]);
        for (node, targets) in [(D, 1 + usize::from(twice)), (P, 1)] {
            let live = world.session(node, 1 - node);
            let told = world.nodes[node].ups.iter().filter(|(s, target, _)| Some(*s) == live && target.is_some());
            prop_assert_eq!(told.count(), targets, "{:?}", world.nodes[node].ups);
        }
        world.run_for(S);
        prop_assert_eq!((world.session(D, P), world.session(P, D)), (here, there));
        prop_assert_eq!(world.nodes[D].dials + world.nodes[P].dials, 2 + u32::from(twice));
        world.finish();
    }
}
