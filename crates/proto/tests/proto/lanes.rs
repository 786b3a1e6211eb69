//! Lanes that go down while rooms move: both sides agree on the next attempt, and nothing is counted for what was lost.

use crossdock_proto::{End, Message, RoomId, SessionEnd};
use crossdock_transport::{DownCause, Fence};

use crate::world::{D, Landing, MS, P, S, World, on_wire};

const FENCES: [Fence; 3] = [Fence::Now, Fence::WhenDown, Fence::Never];

fn begun(lanes: u8, fence: Fence) -> (World, RoomId, RoomId) {
    let mut world = World::pair(lanes);
    world.nodes[D].fence = fence;
    let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
    world.settle();
    (world, receiving, sending)
}

fn delivered(world: &mut World, receiving: RoomId, sending: RoomId) {
    world.settle();
    assert_eq!(world.nodes[P].end(sending), Some(&End::Delivered));
    assert_eq!(world.nodes[D].end(receiving), Some(&End::Delivered));
    assert!(world.nodes[D].is_home(receiving));
}

#[test]
fn what_was_lost_with_a_lane_is_sent_again_under_another_grant() {
    for fence in FENCES {
        // Nothing, some, or all of what was on its way on the lane has landed when it breaks.
        for landing in 0..=3 {
            let (mut world, receiving, sending) = begun(2, fence);
            world.post(P, sending, 0, 3);
            world.post(P, sending, 1, 2);
            let lane = world.lane(D, P, 0);
            world.break_lane(lane, landing, 0);
            world.settle();
            let starts = &world.nodes[P].rooms[&sending].starts;
            assert_eq!((starts.len(), starts[1].attempt), (2, 1), "{fence:?}");
            assert_ne!(starts[0].grant, starts[1].grant);
            assert_eq!(starts[0].remote_pages, starts[1].remote_pages);
            assert_eq!(world.nodes[D].proto.arrivals(receiving), Some(0), "the count begins again");
            assert_eq!(world.lanes.up(P, starts[1].session), [1]);
            world.move_all(P, sending, 4);
            delivered(&mut world, receiving, sending);
            world.finish();
        }
    }
}

/// The bytes of the earlier attempt may land at any time before the lane is down here: until then the room does not,
/// even if the next attempt is complete.
#[test]
fn a_landing_waits_for_the_earlier_attempts_last_write() {
    for fence in [Fence::WhenDown, Fence::Never] {
        let (mut world, receiving, sending) = begun(3, fence);
        world.post(P, sending, 0, 2);
        world.post(P, sending, 1, 2);
        let (one, two) = (world.lane(D, P, 0), world.lane(D, P, 1));
        world.hold_lane(two, true);
        // The sender finds both lanes broken; here only the first is, and the second may still bring something.
        world.break_lane(one, 0, 0);
        world.break_lane(two, 2, 0);
        world.settle();
        let start = world.nodes[P].start(sending).clone();
        assert_eq!(start.attempt, 1);
        world.move_all(P, sending, 1);
        world.settle();
        assert_eq!(
            world.nodes[D].rooms[&receiving].landed, 0,
            "the release spoke of a lane that is not down here"
        );
        world.hold_lane(two, false);
        delivered(&mut world, receiving, sending);
        assert_eq!(world.nodes[P].start(sending).attempt, 1, "bytes that are all here need not come again");
        world.finish();
    }
}

#[test]
fn a_finish_of_an_earlier_attempt_is_not_taken_for_the_next() {
    for fence in FENCES {
        let (mut world, receiving, sending) = begun(2, fence);
        let lane = world.lane(D, P, 0);
        world.hold_lane(lane, true);
        world.post(P, sending, 0, 3);
        world.post(P, sending, 1, 1);
        world.finish_room(P, sending);
        world.settle();
        // Finished, and then the lane breaks with what was on its way.
        world.hold_lane(lane, false);
        world.break_lane(lane, 1, 0);
        world.settle();
        assert_eq!(world.nodes[D].rooms[&receiving].landed, 0);
        assert_eq!(world.nodes[P].start(sending).attempt, 1);
        world.move_all(P, sending, 1);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

/// What was finished was the attempt before; the next one is not confirmed before it is.
#[test]
fn a_confirmation_of_an_attempt_that_was_not_finished_is_misbehaviour() {
    let (mut world, _, sending) = begun(2, Fence::Now);
    let lane = world.lane(D, P, 0);
    world.hold_lane(lane, true);
    world.post(P, sending, 0, 3);
    world.finish_room(P, sending);
    world.settle();
    world.hold_lane(lane, false);
    world.break_lane(lane, 1, 0);
    world.settle();
    assert_eq!(world.nodes[P].start(sending).attempt, 1);
    world.forge(D, P, &Message::Delivered { room: on_wire(7, 1) });
    world.settle();
    assert!(matches!(world.nodes[P].downs[0].2, SessionEnd::Misbehaved { .. }));
    world.run_for(S);
    world.finish();
}

/// A sender that gives up after it has lost a lane cannot speak for what was on its way there.
#[test]
fn a_release_leaves_out_the_lanes_that_were_lost() {
    let (mut world, receiving, sending) = begun(2, Fence::WhenDown);
    let lane = world.lane(D, P, 0);
    world.hold_lane(lane, true);
    world.post(P, sending, 0, 3);
    world.break_lane(lane, 3, 0);
    world.settle();
    world.cancel(P, sending);
    world.settle();
    assert!(world.nodes[D].end(receiving).is_some());
    assert!(!world.nodes[D].is_home(receiving), "released, but for a lane that is not down here");
    world.hold_lane(lane, false);
    world.settle();
    assert!(world.nodes[D].is_home(receiving));
    world.finish();
}

#[test]
fn two_lanes_are_lost_one_after_the_other() {
    for fence in FENCES {
        let (mut world, receiving, sending) = begun(3, fence);
        for (slot, attempt) in [(0, 1), (1, 2)] {
            world.post(P, sending, slot, 3);
            world.post(P, sending, 2, 1);
            let lane = world.lane(D, P, slot);
            world.break_lane(lane, 1, 0);
            world.settle();
            assert_eq!(world.nodes[P].start(sending).attempt, attempt);
        }
        world.move_all(P, sending, 2);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

/// The second is lost before the first regrant has arrived.
#[test]
fn two_lanes_are_lost_at_once() {
    for fence in FENCES {
        for late in [(P, D), (D, P)] {
            let (mut world, receiving, sending) = begun(3, fence);
            for slot in [0, 1, 2] {
                world.post(P, sending, slot, 2);
            }
            world.hold(late.0, late.1, true);
            let (one, two) = (world.lane(D, P, 0), world.lane(D, P, 1));
            world.break_lane(one, 1, 0);
            world.settle();
            world.break_lane(two, 1, 0);
            world.settle();
            world.hold(late.0, late.1, false);
            world.settle();
            world.move_all(P, sending, 2);
            delivered(&mut world, receiving, sending);
            world.finish();
        }
    }
}

/// The sender has lost the lane before it has heard of the room; the receiver grants again for it all the same.
#[test]
fn a_grant_crosses_the_loss_of_a_lane() {
    for fence in FENCES {
        let mut world = World::pair(2);
        world.nodes[D].fence = fence;
        let sending = world.send(P, 7);
        world.hold(D, P, true);
        let receiving = world.receive(D, P, 7);
        let lane = world.lane(P, D, 0);
        world.break_lane(lane, 0, 0);
        world.settle();
        world.hold(D, P, false);
        world.settle();
        let starts = &world.nodes[P].rooms[&sending].starts;
        assert_eq!(starts.last().unwrap().attempt, 1, "{starts:?}");
        world.move_all(P, sending, 2);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

#[test]
fn a_parked_grant_is_replaced_by_the_next_attempts() {
    for fence in FENCES {
        let mut world = World::pair(2);
        world.nodes[D].fence = fence;
        let receiving = world.receive(D, P, 7);
        world.settle();
        let lane = world.lane(D, P, 0);
        world.break_lane(lane, 0, 0);
        world.settle();
        let sending = world.send(P, 7);
        world.settle();
        assert_eq!(world.nodes[P].start(sending).attempt, 1);
        world.move_all(P, sending, 2);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

#[test]
fn a_room_that_has_landed_is_not_sent_again() {
    let (mut world, receiving, sending) = begun(2, Fence::WhenDown);
    world.nodes[D].on_landed = Landing::Wait;
    world.move_all(P, sending, 2);
    world.settle();
    let lane = world.lane(D, P, 0);
    world.break_lane(lane, 0, 0);
    world.settle();
    assert_eq!(world.nodes[P].rooms[&sending].starts.len(), 1);
    world.call(D, |proto, now| proto.accept(now, receiving));
    delivered(&mut world, receiving, sending);
    world.finish();
}

/// The peer says that it has lost a lane: the next attempt begins when this end is down, too.
#[test]
fn the_next_attempt_waits_for_both_ends_of_the_lane() {
    for fence in [Fence::Now, Fence::WhenDown] {
        let (mut world, receiving, sending) = begun(2, fence);
        world.post(P, sending, 0, 1);
        world.nodes[D].holds_downs = true;
        let lane = world.lane(D, P, 0);
        world.break_lane(lane, 1, 0);
        world.settle();
        assert_eq!(world.nodes[P].rooms[&sending].starts.len(), 1);
        world.nodes[D].holds_downs = false;
        world.let_all_down();
        world.settle();
        assert_eq!(world.nodes[P].rooms[&sending].starts.len(), 2);
        world.move_all(P, sending, 1);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

#[test]
fn the_last_lane_takes_the_session_with_it() {
    let (mut world, receiving, sending) = begun(1, Fence::WhenDown);
    world.post(P, sending, 0, 2);
    let lane = world.lane(D, P, 0);
    world.break_lane(lane, 1, 0);
    world.settle();
    let broken = DownCause::Broken { call: "recv", errno: 104 };
    let ends = [world.nodes[D].end(receiving), world.nodes[P].end(sending)];
    let by_lanes = End::PeerLost { cause: SessionEnd::LanesLost { cause: broken } };
    assert!(ends.contains(&Some(&by_lanes)), "{ends:?}");
    assert!(ends.iter().all(|end| matches!(end, Some(End::PeerLost { .. }))), "{ends:?}");
    assert!(world.nodes[D].is_home(receiving), "its lanes are all down");
    world.run_for(S);
    assert!(world.session(D, P).is_some(), "and the peer is dialed again");
    world.finish();
}

/// Who closes a session closes its lanes with it: a port that tells of that before the goodbye is read does not make it a
/// fault of the lanes.
#[test]
fn a_goodbye_that_comes_after_the_lanes_have_ended_is_one() {
    for lanes in [1, 2] {
        let mut world = World::pair(lanes);
        let receiving = world.receive(D, P, 7);
        world.settle();
        let (stream, end) = world.stream(D, P);
        world.streams.all[stream].is_held[end] = true;
        let session = world.session(P, D).expect("a live session");
        world.call(P, |proto, now| proto.close_session(now, session));
        world.settle();
        assert_eq!(world.nodes[D].downs[0].2, SessionEnd::ClosedByPeer);
        let lost = End::PeerLost { cause: SessionEnd::ClosedByPeer };
        assert_eq!(world.nodes[D].end(receiving), Some(&lost));
        world.streams.all[stream].is_held = [false; 2];
        world.finish();
    }
}

/// The lane of one end goes down while the session is set up; the rest of it works.
#[test]
fn a_lane_is_lost_before_the_session_is_ready() {
    for node in [P, D] {
        let mut world = World::unconnected(2);
        world.connect(D, P);
        while world.lanes.all_up().is_empty() {
            let (at_ns, _, channel) = world.open_channels().into_iter().min().unwrap();
            world.deliver(at_ns, channel);
        }
        let lane = world.lanes.all_up().into_iter().find(|lane| lane.node == node);
        let lane = lane.unwrap_or_else(|| world.lanes.all_up()[0]);
        world.break_lane(lane, 0, 0);
        world.settle();
        assert!(world.session(D, P).is_some());
        let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
        world.settle();
        world.move_all(P, sending, 2);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

#[test]
fn a_pull_reads_again_what_a_lane_has_lost() {
    let mut world = World::pair(2);
    let (fetching, serving) = (world.fetch(D, P, 7), world.serve(P, 7));
    world.settle();
    let lane = world.lane(P, D, 0);
    world.hold_lane(lane, true);
    world.post(D, fetching, 0, 2);
    world.post(D, fetching, 1, 2);
    world.settle();
    world.break_lane(lane, 0, 0);
    world.hold_lane(lane, false);
    world.settle();
    let starts = &world.nodes[D].rooms[&fetching].starts;
    assert_eq!((starts.len(), starts[1].attempt, starts[1].grant), (2, 1, starts[0].grant));
    world.move_all(D, fetching, 3);
    world.settle();
    assert_eq!(world.nodes[D].end(fetching), Some(&End::Delivered));
    assert_eq!(world.nodes[P].end(serving), Some(&End::Delivered));
    assert_eq!(world.nodes[D].proto.counters().further_attempts, 1);
    world.finish();
}

/// A read that ended with its lane at the reader may still be under way at the source, whose end of the lane is up:
/// the grant is not taken back before that is down.
#[test]
fn a_source_keeps_a_released_grant_until_the_lane_is_down_there_too() {
    let mut world = World::pair(2);
    let (fetching, serving) = (world.fetch(D, P, 7), world.serve(P, 7));
    world.settle();
    let (there, here) = (world.lane(P, D, 0), world.lane(D, P, 0));
    world.hold_lane(there, true);
    world.post(D, fetching, 0, 2);
    // The source's end of the lane still has the reads before it.
    world.break_lane(here, 0, 2);
    world.settle();
    world.move_all(D, fetching, 3);
    world.settle();
    assert_eq!(world.nodes[P].end(serving), Some(&End::Delivered));
    assert_eq!(world.nodes[P].proto.grants_live(), 1, "the late reads are honest");
    world.hold_lane(there, false);
    world.settle();
    assert_eq!(world.nodes[P].proto.grants_live(), 0);
    world.finish();
}

/// Other rooms of the session, in the other direction and of the other kind, go through the same loss.
#[test]
fn all_rooms_of_a_session_go_on() {
    let mut world = World::pair(3);
    let pushes = [(D, P, 1), (P, D, 2)].map(|(d, p, n)| (p, world.receive(d, p, n), world.send(p, n)));
    let pulls = [(D, P, 3), (P, D, 4)].map(|(d, p, n)| (d, world.fetch(d, p, n), world.serve(p, n)));
    world.settle();
    for (p, _, sending) in pushes {
        world.post(p, sending, 1, 3);
    }
    for (d, fetching, _) in pulls {
        world.post(d, fetching, 1, 3);
    }
    let lane = world.lane(D, P, 1);
    world.break_lane(lane, 1, 1);
    world.settle();
    for (p, _, sending) in pushes {
        world.move_all(p, sending, 2);
    }
    for (d, fetching, _) in pulls {
        world.move_all(d, fetching, 2);
    }
    world.run_for(100 * MS);
    for (p, receiving, sending) in pushes {
        assert_eq!(world.nodes[p].end(sending), Some(&End::Delivered));
        assert_eq!(world.nodes[1 - p].end(receiving), Some(&End::Delivered));
    }
    for (d, fetching, serving) in pulls {
        assert_eq!(world.nodes[d].end(fetching), Some(&End::Delivered));
        assert_eq!(world.nodes[1 - d].end(serving), Some(&End::Delivered));
    }
    world.finish();
}

// --- lanes that come back --------------------------------------------------------------------------------------

/// How many lanes can be used, as each side sees it.
fn usable(world: &World) -> [usize; 2] {
    [(D, P), (P, D)].map(|(node, peer)| {
        let session = world.session(node, peer).expect("a live session");
        world.nodes[node].proto.lanes(session).expect("a session").0
    })
}

fn attempts(world: &World) -> u64 {
    world.nodes[D].proto.counters().further_attempts
}

fn break_lane(world: &mut World, slot: u8) {
    let lane = world.lane(D, P, slot);
    world.break_lane(lane, 0, 0);
    world.settle();
}

/// When the dialer has opened this lane again.
fn tries(world: &World, slot: u8) -> Vec<u64> {
    world.nodes[D].opened.iter().filter(|(_, of)| *of == slot).map(|(at_ns, _)| *at_ns).skip(1).collect()
}

fn misbehaved(world: &mut World, node: usize) {
    world.settle();
    let causes: Vec<&SessionEnd> = world.nodes[node].downs.iter().map(|(_, _, cause)| cause).collect();
    assert!(matches!(causes[..], [SessionEnd::Misbehaved { .. }]), "{causes:?}");
}

#[test]
fn a_lane_that_was_lost_comes_back_and_is_used() {
    for fence in FENCES {
        let (mut world, receiving, sending) = begun(2, fence);
        break_lane(&mut world, 0);
        assert_eq!(usable(&world), [1, 1]);
        world.run_for(2 * S);
        assert_eq!(usable(&world), [2, 2]);
        assert_eq!([D, P].map(|node| world.nodes[node].proto.counters().lanes_back), [1, 1]);
        assert_eq!(attempts(&world), 1, "for the loss, not for the return");
        world.post(P, sending, 0, 3);
        world.finish_room(P, sending);
        delivered(&mut world, receiving, sending);
        // It is lost as the first one was, and what it carried is sent again.
        let (receiving, sending) = (world.receive(D, P, 8), world.send(P, 8));
        world.settle();
        world.post(P, sending, 0, 3);
        break_lane(&mut world, 0);
        assert_eq!((world.nodes[P].start(sending).attempt, attempts(&world)), (1, 2));
        world.move_all(P, sending, 2);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

#[test]
fn a_lane_that_does_not_come_up_is_tried_again_after_twice_as_long_up_to_a_limit() {
    let (mut world, receiving, sending) = begun(2, Fence::WhenDown);
    world.nodes[P].is_unplugged = true;
    break_lane(&mut world, 0);
    let lost_ns = world.now_ns;
    world.move_all(P, sending, 2);
    world.run_for(130 * S);
    assert_eq!(world.nodes[D].end(receiving), Some(&End::Delivered));
    assert_eq!(
        (world.nodes[P].rooms[&sending].starts.len(), attempts(&world)),
        (2, 1),
        "no room hears of it"
    );
    let at_s: Vec<u64> = tries(&world, 0).iter().map(|at_ns| (at_ns - lost_ns + S / 2) / S).collect();
    assert_eq!(at_s, [1, 3, 7, 15, 31, 61, 91, 121]);
    world.nodes[P].is_unplugged = false;
    world.run_for(30 * S);
    assert_eq!(usable(&world), [2, 2]);
    world.finish();
}

/// One that works for a while only must not take rooms down with it every second.
#[test]
fn a_lane_that_is_soon_lost_again_waits_for_longer() {
    let mut world = World::pair(2);
    for pause_s in [1, 2, 4] {
        break_lane(&mut world, 0);
        world.run_for(pause_s * S - 100 * MS);
        assert_eq!(usable(&world), [1, 1], "before {pause_s} s");
        world.run_for(200 * MS);
        assert_eq!(usable(&world), [2, 2], "after {pause_s} s");
    }
    world.run_for(31 * S);
    break_lane(&mut world, 0);
    world.run_for(S + 100 * MS);
    assert_eq!(usable(&world), [2, 2], "one that has held is tried soon");
    world.finish();
}

#[test]
fn a_lane_is_offered_when_both_ends_of_the_last_are_down() {
    let mut world = World::pair(2);
    world.nodes[P].holds_downs = true;
    break_lane(&mut world, 0);
    world.run_for(10 * S);
    assert_eq!(tries(&world, 0), [], "the peer's end is not down");
    world.nodes[P].holds_downs = false;
    world.let_all_down();
    world.run_for(2 * S);
    assert_eq!(usable(&world), [2, 2]);
    world.finish();
}

/// Lanes of a rail that is dead are offered one after the other, and first where nothing else is left.
#[test]
fn a_pair_of_rails_without_a_lane_goes_first() {
    let mut world = World::new();
    for _ in [P, D] {
        world.add(|config| {
            config.lanes_per_rail = 2;
            config.rails.push(config.rails[0].clone());
        });
    }
    world.connect(D, P);
    world.settle();
    // The lanes of the second rail are 1 and 3.
    for slot in [0, 1, 3] {
        break_lane(&mut world, slot);
    }
    world.run_for(980 * MS);
    assert_eq!(usable(&world), [1, 1]);
    // They all fall due while nothing is taken in.
    world.now_ns += S;
    world.tick_all();
    world.run_for(5 * S);
    assert_eq!(usable(&world), [4, 4]);
    let order: Vec<u8> = world.nodes[D].opened.iter().skip(4).map(|(_, slot)| *slot).collect();
    assert_eq!(order, [1, 0, 3]);
    world.finish();
}

/// A peer that lives and says nothing to an offer: the lane is given up after a while, and those that wait for it come back.
#[test]
fn an_offer_that_is_not_answered_keeps_no_other_lane_away() {
    let mut world = World::pair(3);
    world.nodes[P].silent_slot = Some(0);
    break_lane(&mut world, 0);
    break_lane(&mut world, 1);
    world.run_for(5 * S);
    assert_eq!(usable(&world), [1, 1], "the first one is waited for");
    world.run_for(3 * S);
    assert_eq!(usable(&world), [2, 2]);
    assert_eq!(tries(&world, 0).len(), 1, "its number is not free before the peer has said that it is lost");
    // What is said too late is heard and changes nothing; then the lane is offered anew.
    world.speak(P);
    world.run_for(10 * S);
    assert_eq!(usable(&world), [3, 3]);
    world.finish();
}

/// Between the offer and the first use everything can happen, at either end and in any order.
#[test]
fn a_lane_is_lost_at_any_moment_of_its_return() {
    let mut costs = [0; 2];
    for fence in FENCES {
        for (node, peer) in [(D, P), (P, D)] {
            for (events, late) in
                (0..12).flat_map(|events| [(events, None), (events, Some(D)), (events, Some(P))])
            {
                let (mut world, receiving, sending) = begun(2, fence);
                break_lane(&mut world, 0);
                let before = tries(&world, 0).len();
                while tries(&world, 0).len() == before {
                    world.run_for(MS);
                }
                for _ in 0..events {
                    let Some((at_ns, _, channel)) = world.open_channels().into_iter().min() else { break };
                    world.deliver(at_ns, channel);
                }
                if let Some(late) = late {
                    world.hold(late, 1 - late, true);
                }
                let lane = world.lane(node, peer, 0);
                if world.lanes.up(P, world.session(P, D).unwrap()).contains(&0) {
                    world.post(P, sending, 0, 2);
                }
                match world.lanes.all_up().contains(&lane) {
                    true => world.break_lane(lane, 1, 1),
                    false => world.close_lane(lane.node, lane.session, 0),
                }
                world.settle();
                if let Some(late) = late {
                    world.hold(late, 1 - late, false);
                }
                world.settle();
                costs[usize::from(attempts(&world) > 1)] += 1;
                world.move_all(P, sending, 2);
                delivered(&mut world, receiving, sending);
                assert_eq!(usable(&world), [1, 1]);
                world.run_for(5 * S);
                assert_eq!(usable(&world), [2, 2]);
                world.finish();
            }
        }
    }
    assert!(costs[0] > 50 && costs[1] > 50, "before it is ready at both ends it costs nothing: {costs:?}");
}

#[test]
fn a_session_ends_while_a_lane_is_on_its_way() {
    for (node, events) in [D, P].into_iter().flat_map(|node| (0..10).map(move |events| (node, events))) {
        let mut world = World::pair(2);
        break_lane(&mut world, 0);
        while tries(&world, 0).is_empty() {
            world.run_for(MS);
        }
        for _ in 0..events {
            let Some((at_ns, _, channel)) = world.open_channels().into_iter().min() else { break };
            world.deliver(at_ns, channel);
        }
        let session = world.session(node, 1 - node).expect("a live session");
        world.call(node, |proto, now| proto.close_session(now, session));
        world.settle();
        assert!(world.nodes.iter().all(|node| !node.proto.is_live(session)));
        world.finish();
    }
}

/// The reads that were lost with the lane ended long before the next lane of its number began: the release of the room
/// does not wait for the end of that one.
#[test]
fn what_a_lane_has_lost_is_not_held_against_the_next() {
    let mut world = World::pair(2);
    let (fetching, serving) = (world.fetch(D, P, 7), world.serve(P, 7));
    world.settle();
    let lane = world.lane(P, D, 0);
    world.hold_lane(lane, true);
    world.post(D, fetching, 0, 2);
    world.break_lane(lane, 0, 0);
    world.hold_lane(lane, false);
    world.run_for(2 * S);
    assert_eq!(usable(&world), [2, 2]);
    world.move_all(D, fetching, 2);
    world.settle();
    assert_eq!(world.nodes[P].end(serving), Some(&End::Delivered));
    assert_eq!((usable(&world), world.nodes[P].proto.grants_live()), ([2, 2], 0));
    world.finish();
}

/// What the granter was still to see of a lost lane when it was given back, it has seen when the next one begins.
#[test]
fn a_release_that_left_out_a_lane_is_complete_when_that_is_down() {
    let (mut world, receiving, sending) = begun(3, Fence::WhenDown);
    let [one, two] = [0, 1].map(|slot| world.lane(D, P, slot));
    for lane in [one, two] {
        world.hold_lane(lane, true);
        world.post(P, sending, lane.slot, 2);
        world.break_lane(lane, 2, 0);
    }
    world.settle();
    world.cancel(P, sending);
    world.settle();
    assert!(world.nodes[D].end(receiving).is_some() && !world.nodes[D].is_home(receiving));
    world.hold_lane(one, false);
    world.run_for(2 * S);
    assert_eq!(
        (usable(&world), world.nodes[D].is_home(receiving)),
        ([2, 2], false),
        "the other one is not down"
    );
    world.hold_lane(two, false);
    world.settle();
    assert!(world.nodes[D].is_home(receiving), "although the first has a lane again");
    world.finish();
}

#[test]
fn a_rail_that_was_dead_when_the_session_began_comes_back() {
    for node in [P, D] {
        let mut world = World::unconnected(2);
        world.connect(D, P);
        while world.lanes.all_up().is_empty() {
            let (at_ns, _, channel) = world.open_channels().into_iter().min().unwrap();
            world.deliver(at_ns, channel);
        }
        let lane = world.lanes.all_up().into_iter().find(|lane| lane.node == node);
        let lane = lane.unwrap_or_else(|| world.lanes.all_up()[0]);
        world.break_lane(lane, 0, 0);
        world.settle();
        assert_eq!(usable(&world), [1, 1]);
        world.run_for(2 * S);
        assert_eq!(usable(&world), [2, 2]);
        world.finish();
    }
}

#[test]
fn who_wants_no_lane_back_neither_offers_nor_takes_one() {
    for never in [P, D] {
        let mut world = World::new();
        for node in [P, D] {
            world.add(move |config| {
                config.lanes_per_rail = 2;
                if node == never {
                    config.lane_retry_min_ns = 0;
                }
            });
        }
        world.connect(D, P);
        world.settle();
        let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
        world.settle();
        break_lane(&mut world, 0);
        world.run_for(8 * S);
        assert_eq!((usable(&world), tries(&world, 0).is_empty()), ([1, 1], never == D));
        assert_eq!(attempts(&world), 1, "a refusal is nothing to a room");
        world.move_all(P, sending, 2);
        delivered(&mut world, receiving, sending);
        world.finish();
    }
}

#[test]
fn a_lane_that_cannot_be_opened_again_is_nothing_to_the_session() {
    for node in [P, D] {
        let mut world = World::pair(2);
        world.nodes[node].broken_slot = Some(0);
        break_lane(&mut world, 0);
        world.run_for(8 * S);
        assert_eq!((usable(&world), tries(&world, 0).len()), ([1, 1], 3));
        world.nodes[node].broken_slot = None;
        world.run_for(8 * S);
        assert_eq!(usable(&world), [2, 2]);
        world.finish();
    }
}

#[test]
fn lanes_that_cannot_be_opened_are_tried_one_after_the_other() {
    let mut world = World::pair(3);
    world.nodes[D].broken_slot = Some(0);
    break_lane(&mut world, 0);
    break_lane(&mut world, 1);
    // Both fall due at once.
    world.now_ns += 2 * S;
    world.tick_all();
    world.run_for(MS);
    assert_eq!([tries(&world, 0).len(), tries(&world, 1).len()], [1, 1]);
    world.run_for(S);
    assert_eq!(usable(&world), [2, 2]);
    world.finish();
}

#[test]
fn what_is_said_of_lanes_out_of_turn_is_misbehaviour() {
    let address = crossdock_transport::LaneAddress::new(b"address").unwrap();
    let offer = |slot| Message::LaneOffer { slot, address: address.clone() };
    let answer = |slot| Message::LaneAnswer { slot, address: address.clone() };
    let ready = |slot| Message::LaneReady { slot };
    // Lane 0 is up, lane 1 is lost, and there is no lane 2.
    let by_dialer =
        [offer(0), offer(2), answer(1), ready(0), ready(1), ready(2), Message::LaneLost { slot: 1 }];
    let by_acceptor = [offer(1), answer(0), answer(1), answer(2), ready(0), ready(1), ready(2)];
    let of = |by: usize, all: Vec<Message>| all.into_iter().map(move |message| (by, message));
    for (by, message) in of(D, by_dialer.to_vec()).chain(of(P, by_acceptor.to_vec())) {
        let mut world = World::pair(2);
        break_lane(&mut world, 1);
        world.forge(by, 1 - by, &message);
        misbehaved(&mut world, 1 - by);
        world.run_for(S);
        world.finish();
    }
    // Once is right, twice is not.
    for (by, message) in [(P, answer(1)), (P, ready(1)), (D, ready(1))] {
        let mut world = World::pair(2);
        break_lane(&mut world, 1);
        world.run_for(2 * S);
        assert_eq!(usable(&world), [2, 2]);
        world.forge(by, 1 - by, &message);
        misbehaved(&mut world, 1 - by);
        world.run_for(S);
        world.finish();
    }
}

/// Nobody may post before both ends are ready.
#[test]
fn a_write_on_a_lane_that_is_not_ready_is_misbehaviour() {
    let (mut world, _, sending) = begun(2, Fence::Now);
    break_lane(&mut world, 0);
    while tries(&world, 0).is_empty() {
        world.run_for(MS);
    }
    let (grant, session) = (world.nodes[P].start(sending).grant, world.session(D, P).unwrap());
    world.call(D, |proto, now| proto.arrived(now, session, 0, grant));
    misbehaved(&mut world, D);
    world.run_for(S);
    world.finish();
}
