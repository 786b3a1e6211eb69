//! Rooms in which the prefill side writes: who may come first, what is counted, what is no honest peer's doing.

use crossdock_proto::{
    CancelWhy, End, Failure, Message, Misfit, RoleKind, RoomId, RoomRefusal, SessionEnd, Stage, Who,
};
use crossdock_transport::{Access, Error, Fence, GrantId};

use crate::world::{D, Landing, MS, P, S, World, on_wire};

fn both_delivered(world: &World, receiving: RoomId, sending: RoomId) {
    assert_eq!(world.nodes[P].end(sending), Some(&End::Delivered));
    assert_eq!(world.nodes[D].end(receiving), Some(&End::Delivered));
    assert!(world.nodes[D].is_home(receiving));
}

/// Both ends are open and the sender may write.
fn begun(lanes: u8) -> (World, RoomId, RoomId) {
    let mut world = World::pair(lanes);
    let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
    world.settle();
    (world, receiving, sending)
}

/// What the peer was told, and that it left in order, whatever it was that ended the session.
fn misbehaved(world: &mut World, node: usize, what: &str) {
    let ends: Vec<_> = world.nodes[node].downs.iter().map(|(_, _, cause)| cause.clone()).collect();
    assert!(
        matches!(&ends[..], [SessionEnd::Misbehaved { what: found }] if found.contains(what)),
        "{what}: {ends:?}"
    );
    assert_eq!(world.nodes[1 - node].downs.len(), 1);
}

#[test]
fn a_grant_before_the_send() {
    let mut world = World::pair(2);
    let receiving = world.receive(D, P, 7);
    world.settle();
    let sending = world.send(P, 7);
    world.settle();
    world.move_all(P, sending, 3);
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

#[test]
fn a_send_before_the_grant() {
    let mut world = World::pair(2);
    let sending = world.send(P, 7);
    world.settle();
    let receiving = world.receive(D, P, 7);
    world.settle();
    let start = world.nodes[P].start(sending);
    assert_eq!((start.attempt, &start.params[..], start.remote_pages.len()), (0, &b"ask"[..], 4));
    world.move_all(P, sending, 3);
    world.settle();
    both_delivered(&world, receiving, sending);
    let counted = world.nodes[D].proto.counters();
    assert_eq!((counted.arrivals, counted.stale_arrivals, counted.delivered), (6, 0, 1));
    world.finish();
}

#[test]
fn a_receive_before_the_session() {
    let mut world = World::unconnected(1);
    let receiving = world.receive(D, P, 7);
    assert_eq!(world.nodes[D].end(receiving), None);
    world.connect(P, D);
    let sending = world.send(P, 7);
    world.settle();
    world.move_all(P, sending, 1);
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

#[test]
fn lanes_are_counted_in_any_order() {
    let (mut world, receiving, sending) = begun(3);
    let lanes = [0, 1, 2].map(|slot| world.lane(D, P, slot));
    lanes.into_iter().for_each(|lane| world.hold_lane(lane, true));
    for (slot, ops) in [(2, 1), (0, 5), (2, 4)] {
        world.post(P, sending, slot, ops);
    }
    world.hold_lane(lanes[2], false);
    world.settle();
    assert_eq!(world.nodes[D].proto.arrivals(receiving), Some(5));
    assert_eq!(world.nodes[D].proto.next_arrivals(), Some((receiving, 5)));
    assert_eq!(world.nodes[D].proto.next_arrivals(), None, "told once");
    // The end of it comes before the rest of the bytes.
    world.finish_room(P, sending);
    world.settle();
    assert_eq!(world.nodes[D].rooms[&receiving].landed, 0);
    world.hold_lane(lanes[0], false);
    world.settle();
    both_delivered(&world, receiving, sending);
    lanes.into_iter().for_each(|lane| world.hold_lane(lane, false));
    world.finish();
}

#[test]
fn nothing_to_write_is_delivered_too() {
    let (mut world, receiving, sending) = begun(2);
    world.finish_room(P, sending);
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

/// The engine takes in all that has come before it acts: a grant and its end may come in one turn.
#[test]
fn a_start_that_nobody_has_heard_of_is_withdrawn() {
    let mut world = World::pair(2);
    let sending = world.send(P, 7);
    let receiving = world.receive(D, P, 7);
    world.cancel(D, receiving);
    world.is_lazy = true;
    world.settle();
    world.pump_all();
    world.settle();
    assert_eq!(world.nodes[P].end(sending), Some(&End::Cancelled { by: Who::Peer }));
    assert!(world.nodes[P].rooms[&sending].starts.is_empty());
    world.finish();
}

/// Likewise a grant and the next attempt's: the first is never begun.
#[test]
fn of_two_starts_in_one_turn_the_second_is_told() {
    let mut world = World::pair(2);
    let sending = world.send(P, 7);
    world.hold(D, P, true);
    let receiving = world.receive(D, P, 7);
    let lane = world.lane(P, D, 0);
    world.break_lane(lane, 0, 0);
    world.settle();
    world.hold(D, P, false);
    world.is_lazy = true;
    world.settle();
    world.pump_all();
    world.settle();
    let starts = &world.nodes[P].rooms[&sending].starts;
    assert_eq!(starts.iter().map(|start| start.attempt).collect::<Vec<_>>(), [1]);
    world.move_all(P, sending, 1);
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

#[test]
fn an_immediate_of_an_earlier_use_is_not_counted() {
    let mut world = World::pair(1);
    let first = world.receive(D, P, 7);
    let sending = world.send(P, 7);
    world.settle();
    let grant = world.nodes[P].start(sending).grant;
    world.move_all(P, sending, 1);
    world.settle();
    both_delivered(&world, first, sending);
    // The index comes back with the next generation, and late immediates of the first use are nothing to it.
    let session = world.session(D, P).unwrap();
    world.call(D, |proto, now| proto.arrived(now, session, 0, grant));
    let unknown = GrantId::new(GrantId::INDICES - 1, 3);
    world.call(D, |proto, now| proto.arrived(now, session, 0, unknown));
    assert_eq!(world.nodes[D].proto.counters().stale_arrivals, 2);
    world.finish();
}

#[test]
fn an_immediate_counts_only_for_the_peer_that_was_granted() {
    let (mut world, receiving, sending) = begun(1);
    let other = world.add(|_| ());
    world.connect(other, D);
    world.settle();
    let (grant, session) = (world.nodes[P].start(sending).grant, world.session(D, other).unwrap());
    world.call(D, |proto, now| proto.arrived(now, session, 0, grant));
    let counted = world.nodes[D].proto.counters();
    assert_eq!((counted.arrivals, counted.stale_arrivals), (0, 1));
    world.cancel(D, receiving);
    world.settle();
    world.finish();
}

#[test]
fn more_immediates_than_were_finished_are_misbehaviour() {
    // Found when the finish comes; when one more comes after it; when one more comes although all has landed.
    for (posted, finished, later) in [(3, [2, 0], 0), (2, [2, 1], 1), (2, [2, 0], 1)] {
        let (mut world, receiving, sending) = begun(2);
        world.nodes[D].on_landed = Landing::Wait;
        world.post(P, sending, 0, posted);
        world.settle();
        let arrivals = finished.to_vec();
        world.forge(P, D, &Message::Finish { room: on_wire(7, 1), attempt: 0, arrivals, aux: Vec::new() });
        world.settle();
        if later > 0 {
            assert_eq!(world.nodes[D].rooms[&receiving].landed, usize::from(finished == [2, 0]));
            world.post(P, sending, 0, later);
            world.settle();
        }
        misbehaved(&mut world, D, "more immediates");
        let end = world.nodes[D].end(receiving).unwrap();
        assert!(matches!(end, End::PeerLost { cause: SessionEnd::Misbehaved { .. } }), "{end:?}");
        world.run_for(S);
        world.finish();
    }
}

#[test]
fn what_no_honest_sender_says() {
    let finish = |attempt, lanes| Message::Finish {
        room: on_wire(7, 1),
        attempt,
        arrivals: vec![1; lanes],
        aux: Vec::new(),
    };
    for (messages, what) in [
        (vec![finish(0, 3)], "more lanes"),
        (vec![finish(1, 2)], "not begun"),
        (vec![finish(0, 2), finish(0, 2)], "twice"),
        (vec![Message::LaneLost { slot: 9 }], "lane that there is not"),
        (vec![Message::LaneLost { slot: 0 }, Message::LaneLost { slot: 0 }], "lost before"),
    ] {
        let (mut world, _, _) = begun(2);
        for message in &messages {
            world.forge(P, D, message);
        }
        world.settle();
        misbehaved(&mut world, D, what);
        world.run_for(S);
        world.finish();
    }
}

#[test]
fn what_no_honest_receiver_says() {
    let regrant = |attempt| Message::Regrant { room: on_wire(7, 1), attempt, grant: GrantId::new(9, 9) };
    let grant = Message::Grant {
        room: on_wire(7, 1),
        access: Access::Write,
        attempt: 0,
        grant: GrantId::new(9, 9),
        duration_ns: S,
        params: Vec::new(),
        pages: vec![1],
    };
    let parked = match grant.clone() {
        Message::Grant { access, attempt, grant, duration_ns, params, pages, .. } => {
            Message::Grant { room: on_wire(8, 1), access, attempt, grant, duration_ns, params, pages }
        }
        other => other,
    };
    for (messages, what) in [
        (vec![Message::Delivered { room: on_wire(7, 1) }], "not finished"),
        (vec![regrant(0)], "earlier attempt"),
        (vec![grant], "second time"),
        (vec![parked.clone(), parked], "second time"),
    ] {
        let (mut world, _, sending) = begun(2);
        world.post(P, sending, 0, 1);
        for message in &messages {
            world.forge(D, P, message);
        }
        world.settle();
        misbehaved(&mut world, P, what);
        world.run_for(S);
        world.finish();
    }
}

/// A receiver that grants again and again while the sender's op is still out: what it skips comes back at once.
#[test]
fn attempts_that_are_skipped_pile_nothing_up() {
    const ATTEMPTS: u32 = 50;
    let (mut world, receiving, sending) = begun(1);
    world.nodes[D].fence = Fence::WhenDown;
    world.post(P, sending, 0, 1);
    let lane = world.lane(D, P, 0);
    world.hold_lane(lane, true);
    let heard_before = world.nodes[D].proto.counters().messages_in;
    for attempt in 1..=ATTEMPTS {
        let grant = GrantId::new(1000 + attempt, 0);
        world.forge(D, P, &Message::Regrant { room: on_wire(7, 1), attempt, grant });
    }
    world.settle();
    assert_eq!(world.nodes[P].rooms[&sending].starts.len(), 1, "the first attempt's op is still out");
    let heard = world.nodes[D].proto.counters().messages_in - heard_before;
    assert_eq!(heard, u64::from(ATTEMPTS) - 1, "each but the last was released");
    world.hold_lane(lane, false);
    world.settle();
    assert_eq!(world.nodes[P].start(sending).attempt, ATTEMPTS);
    // The node whose words were forged knows of its first grant only, and that has come back.
    world.cancel(P, sending);
    world.settle();
    assert!(world.nodes[D].is_home(receiving));
    world.finish();
}

#[test]
fn bytes_that_are_not_right() {
    let (mut world, receiving, sending) = begun(2);
    world.nodes[D].on_landed = Landing::Reject;
    world.move_all(P, sending, 2);
    world.settle();
    let end = |by| End::Failed { by, stage: Stage::Verify, cause: Failure::Checksum };
    assert_eq!(world.nodes[D].end(receiving), Some(&end(Who::Here)));
    assert_eq!(world.nodes[P].end(sending), Some(&end(Who::Peer)));
    world.finish();
}

#[test]
fn a_verdict_counts_only_when_all_has_landed() {
    let (mut world, receiving, sending) = begun(1);
    world.nodes[D].on_landed = Landing::Wait;
    world.call(D, |proto, now| proto.accept(now, receiving));
    world.call(D, |proto, now| proto.reject(now, receiving));
    world.settle();
    assert_eq!(world.nodes[D].end(receiving), None);
    world.move_all(P, sending, 2);
    world.settle();
    world.call(D, |proto, now| proto.accept(now, receiving));
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

#[test]
fn two_requests_that_do_not_fit() {
    let (mut world, receiving, sending) = begun(2);
    world.call(P, |proto, now| proto.mismatch(now, sending, Misfit::Layouts));
    world.settle();
    let end = |by, misfit| End::Refused { by, why: RoomRefusal::Mismatch(misfit) };
    assert_eq!(world.nodes[P].end(sending), Some(&end(Who::Here, Misfit::Layouts)));
    assert_eq!(world.nodes[D].end(receiving), Some(&end(Who::Peer, Misfit::AtPeer)));
    world.finish();
}

#[test]
fn a_port_that_refuses_to_grant_fails_the_room() {
    let mut world = World::pair(2);
    world.nodes[D].refuses_grants = true;
    let sending = world.send(P, 7);
    let receiving = world.receive(D, P, 7);
    world.settle();
    let Some(End::Failed { by: Who::Here, cause: Failure::Port(Error::BadGrant { .. }), .. }) =
        world.nodes[D].end(receiving)
    else {
        panic!("{:?}", world.nodes[D].end(receiving));
    };
    let end = End::Failed { by: Who::Peer, stage: Stage::Transfer, cause: Failure::AtPeer };
    assert_eq!(world.nodes[P].end(sending), Some(&end));
    world.finish();
}

#[test]
fn a_decode_side_that_asks_for_a_room_that_has_ended_hears_so_at_once() {
    let mut world = World::pair(1);
    world.nodes[D].fence = Fence::WhenDown;
    let early = world.try_send(P, 7, 100 * MS).unwrap();
    world.run_for(S);
    assert_eq!(world.nodes[P].end(early), Some(&End::Expired { by: Who::Here, stage: Stage::Grant }));
    let receiving = world.receive(D, P, 7);
    let asked_ns = world.now_ns;
    world.settle();
    assert_eq!(world.nodes[D].end(receiving), Some(&End::Expired { by: Who::Peer, stage: Stage::Grant }));
    assert!(world.now_ns < asked_ns + 10 * MS && world.nodes[D].is_home(receiving));
    // Opened again on purpose, it is a new room.
    let again = world.receive(D, P, 8);
    world.cancel(D, again);
    let (sending, receiving) = (world.send(P, 7), world.receive(D, P, 7));
    world.settle();
    world.move_all(P, sending, 1);
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

/// A room belongs to one decode side; another of that name may still be about to be opened.
#[test]
fn a_room_that_another_decode_side_had_is_waited_for() {
    let mut world = World::pair(1);
    let other = world.add(|_| ());
    world.connect(other, P);
    world.settle();
    let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
    world.settle();
    world.move_all(P, sending, 1);
    world.settle();
    both_delivered(&world, receiving, sending);
    let elsewhere = world.receive(other, P, 7);
    world.settle();
    assert_eq!(world.nodes[other].end(elsewhere), None);
    let sending = world.send(P, 7);
    world.settle();
    world.move_all(P, sending, 1);
    world.settle();
    assert_eq!(world.nodes[other].end(elsewhere), Some(&End::Delivered));
    world.finish();
}

/// What was wrong with the first is not said of the second, whichever side opens it first.
#[test]
fn another_try_under_the_same_name_is_waited_for() {
    let mut world = World::pair(1);
    let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
    world.settle();
    world.cancel(P, sending);
    world.settle();
    assert_eq!(world.nodes[D].end(receiving), Some(&End::Cancelled { by: Who::Peer }));
    let receiving = world.receive(D, P, 7);
    world.settle();
    assert_eq!(world.nodes[D].end(receiving), None);
    let sending = world.send(P, 7);
    world.settle();
    world.move_all(P, sending, 1);
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

#[test]
fn a_parked_grant_goes_back_when_its_time_is_over() {
    for fence in [Fence::Now, Fence::WhenDown, Fence::Never] {
        let mut world = World::pair(1);
        world.nodes[D].fence = fence;
        let cancelled = world.receive(D, P, 7);
        world.settle();
        world.cancel(D, cancelled);
        world.settle();
        assert!(world.nodes[D].is_home(cancelled));
        // The sender's node is where the time ends first: the decode side's clock is behind.
        let expired = world.try_receive(D, world.name(P), 8, S).unwrap();
        world.settle();
        world.nodes[D].is_stopped = true;
        world.run_for(1_500 * MS);
        world.nodes[D].is_stopped = false;
        world.run_for(S);
        assert!(world.nodes[D].end(expired).is_some() && world.nodes[D].is_home(expired));
        world.finish();
    }
}

#[test]
fn a_push_and_a_pull_of_one_name_are_two_rooms() {
    let mut world = World::pair(1);
    let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
    let (fetching, serving) = (world.fetch(D, P, 7), world.serve(P, 7));
    world.settle();
    world.cancel(P, serving);
    world.settle();
    assert_eq!(world.nodes[D].end(fetching), Some(&End::Cancelled { by: Who::Peer }));
    assert_eq!(world.nodes[D].end(receiving), None);
    world.move_all(P, sending, 1);
    world.settle();
    both_delivered(&world, receiving, sending);
    world.finish();
}

/// The words of the earlier room of a name were on their way when the next one was opened.
#[test]
fn words_about_an_earlier_room_of_the_name_are_not_for_the_later_one() {
    for message in [
        Message::Cancel { room: on_wire(7, 1), from: RoleKind::Sending, why: CancelWhy::Expired },
        Message::Finish { room: on_wire(7, 1), attempt: 0, arrivals: vec![9], aux: b"old".to_vec() },
        Message::Finish { room: on_wire(7, 1), attempt: 1, arrivals: vec![0], aux: b"old".to_vec() },
    ] {
        let mut world = World::pair(1);
        let first = world.receive(D, P, 7);
        world.settle();
        world.cancel(D, first);
        world.settle();
        let (receiving, sending) = (world.receive(D, P, 7), world.send(P, 7));
        world.settle();
        world.forge(P, D, &message);
        world.settle();
        assert_eq!(world.nodes[D].end(receiving), None, "{message:?}");
        world.move_all(P, sending, 2);
        world.settle();
        both_delivered(&world, receiving, sending);
        world.finish();
    }
}

#[test]
fn a_cancel_for_a_room_that_is_not_there_is_nothing() {
    let mut world = World::pair(1);
    for from in [RoleKind::Receiving, RoleKind::Sending, RoleKind::Fetching, RoleKind::Serving] {
        world.forge(D, P, &Message::Cancel { room: on_wire(7, 1), from, why: CancelWhy::Failed });
    }
    world.forge(D, P, &Message::Delivered { room: on_wire(7, 1) });
    world.settle();
    assert!(world.session(D, P).is_some());
    world.finish();
}
