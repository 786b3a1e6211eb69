//! What is bounded: rooms, grants, requests, sessions, frames.

use crossdock_proto::{
    About, Config, End, Failure, Identity, Message, PeerName, Receive, Refusal, RoomError, RoomId,
    RoomRefusal, Serve, SessionEnd, Stage, Who,
};
use crossdock_transport::{DownCause, Fence, GrantId};

use crate::world::{D, P, S, World, about, room_name};

fn with(limit: impl Fn(&mut Config) + 'static) -> World {
    let mut world = World::new();
    world.add(|_| ());
    world.add(limit);
    world.connect(D, P);
    world.settle();
    world
}

fn push(world: &mut World, number: u64) -> (RoomId, RoomId) {
    let (receiving, sending) = (world.receive(D, P, number), world.send(P, number));
    world.settle();
    world.move_all(P, sending, 1);
    world.settle();
    assert_eq!(world.nodes[D].end(receiving), Some(&End::Delivered));
    (receiving, sending)
}

#[test]
fn rooms() {
    let mut world = with(|config| config.max_rooms = 2);
    let name = world.name(P);
    let rooms = [world.receive(D, P, 1), world.serve(D, 2)];
    let limit = RoomError::Limit { limit: 2 };
    assert_eq!(world.try_receive(D, name, 3, S), Err(limit.clone()));
    assert_eq!(world.try_fetch(D, name, 3, S), Err(limit.clone()));
    assert_eq!(world.try_send(D, 3, S), Err(limit.clone()));
    assert_eq!(world.try_serve(D, 3, S), Err(limit));
    rooms.into_iter().for_each(|room| world.cancel(D, room));
    world.settle();
    push(&mut world, 4);
    world.finish();
}

#[test]
fn one_room_of_a_name_and_role() {
    let mut world = World::pair(1);
    let name = world.name(P);
    let duplicate = RoomError::Duplicate { room: room_name(1) };
    let rooms = [world.receive(D, P, 1), world.fetch(D, P, 1), world.send(D, 1), world.serve(D, 1)];
    // Waiting for a peer that is not there, they have a name as well.
    let waiting = world.try_receive(D, PeerName::Node(77), 1, S).unwrap();
    assert_eq!(world.try_receive(D, name, 1, S), Err(duplicate.clone()));
    assert_eq!(world.try_fetch(D, name, 1, S), Err(duplicate.clone()));
    assert_eq!(world.try_send(D, 1, S), Err(duplicate.clone()));
    assert_eq!(world.try_serve(D, 1, S), Err(duplicate.clone()));
    assert_eq!(world.try_receive(D, PeerName::Node(77), 1, S), Err(duplicate.clone()));
    // A prefill end that has met its decode side keeps its name as long as it is open.
    let met = world.receive(P, D, 1);
    world.settle();
    assert_eq!(world.try_send(D, 1, S), Err(duplicate));
    world.cancel(P, met);
    for room in rooms.into_iter().filter(|room| *room != rooms[2]).chain([waiting]) {
        world.cancel(D, room);
    }
    world.settle();
    assert_eq!(world.nodes[D].end(rooms[2]), Some(&End::Cancelled { by: Who::Peer }));
    world.finish();
}

#[test]
fn grants() {
    let mut world = with(|config| config.max_grants = 1);
    let first = world.receive(D, P, 1);
    let second = world.receive(D, P, 2);
    let busy = End::Refused { by: Who::Here, why: RoomRefusal::Busy };
    assert_eq!(world.nodes[D].end(second), Some(&busy));
    assert!(world.nodes[D].is_home(second));
    // The prefill side of a pull, too.
    let fetching = world.fetch(P, D, 3);
    let serving = world.serve(D, 3);
    world.settle();
    assert_eq!(world.nodes[D].end(serving), Some(&busy));
    let busy = End::Refused { by: Who::Peer, why: RoomRefusal::Busy };
    assert_eq!(world.nodes[P].end(fetching), Some(&busy));
    world.cancel(D, first);
    world.settle();
    push(&mut world, 4);
    world.finish();
}

#[test]
fn indices_are_used_again_in_their_order_with_the_next_generation() {
    let mut world = with(|config| config.max_grants = 3);
    let mut names = Vec::new();
    for number in 0..9 {
        let (_, sending) = push(&mut world, number);
        let grant = world.nodes[P].start(sending).grant;
        names.push((grant.index(), grant.generation()));
    }
    let expected: Vec<(u32, u32)> = (0..9).map(|n| (n % 3, n / 3)).collect();
    assert_eq!(names, expected);
    world.finish();
}

#[test]
fn an_index_rests_until_its_grant_is_quiet() {
    let mut world = with(|config| config.max_grants = 2);
    world.nodes[D].fence = Fence::WhenDown;
    let (receiving, sending) = (world.receive(D, P, 1), world.send(P, 1));
    world.settle();
    world.post(P, sending, 0, 1);
    let lane = world.lane(D, P, 0);
    world.hold_lane(lane, true);
    world.cancel(D, receiving);
    world.settle();
    // The first is in quarantine: the second is given again and again.
    for number in 2..5 {
        let receiving = world.receive(D, P, number);
        let sending = world.send(P, number);
        world.settle();
        let grant = world.nodes[P].start(sending).grant;
        assert_eq!((grant.index(), grant.generation()), (1, number as u32 - 2));
        world.cancel(D, receiving);
        world.settle();
    }
    world.hold_lane(lane, false);
    world.settle();
    let (_, sending) = push(&mut world, 5);
    assert_eq!(world.nodes[P].start(sending).grant.index(), 1, "it has been free for longer");
    world.finish();
}

#[test]
fn generations_go_round() {
    let mut world = with(|config| config.max_grants = 1);
    for number in 0..u64::from(GrantId::GENERATIONS) {
        let receiving = world.receive(D, P, number);
        world.cancel(D, receiving);
        world.settle();
    }
    let (_, sending) = push(&mut world, 1 << 20);
    let grant = world.nodes[P].start(sending).grant;
    assert_eq!((grant.index(), grant.generation()), (0, 0));
    world.finish();
}

#[test]
fn requests_that_wait_for_a_room() {
    let mut world = World::new();
    world.add(|config| config.max_parked = 2);
    world.add(|_| ());
    world.connect(D, P);
    world.settle();
    let rooms = [world.receive(D, P, 1), world.fetch(D, P, 2), world.receive(D, P, 3), world.fetch(D, P, 4)];
    world.settle();
    let busy = End::Refused { by: Who::Peer, why: RoomRefusal::Busy };
    let ends = rooms.map(|room| world.nodes[D].end(room).cloned());
    assert_eq!(ends, [None, None, Some(busy.clone()), Some(busy)]);
    // As many ended rooms are remembered, the last ones.
    for number in [5, 6, 7] {
        let sending = world.send(P, number);
        world.cancel(P, sending);
    }
    world.cancel(D, rooms[0]);
    world.cancel(D, rooms[1]);
    world.settle();
    let asked = [5, 6, 7].map(|number| world.receive(D, P, number));
    world.settle();
    let cancelled = End::Cancelled { by: Who::Peer };
    let ends = asked.map(|room| world.nodes[D].end(room).cloned());
    assert_eq!(ends, [None, Some(cancelled.clone()), Some(cancelled)]);
    world.cancel(D, asked[0]);
    world.settle();
    world.finish();
}

/// Asks from D for rooms that P does not open, each with parameters of so many bytes; how each ended at once, if it did.
fn asked(world: &mut World, node: usize, numbers: std::ops::Range<u64>, bytes: usize) -> Vec<Option<End>> {
    let rooms: Vec<RoomId> = numbers
        .map(|number| {
            let receive = Receive {
                peer: world.name(P),
                rank: None,
                room: room_name(number),
                pages: world.nodes[node].pool.take(4).unwrap().grant(),
                buffers: Vec::new().into(),
                params: vec![7; bytes],
                deadline_ns: u64::MAX,
            };
            world
                .open(node, true, |proto, now| proto.receive(now, receive).map_err(|not| not.error))
                .expect("a room")
        })
        .collect();
    world.settle();
    rooms.iter().map(|&room| world.nodes[node].end(room).cloned()).collect()
}

#[test]
fn what_waiting_requests_hold() {
    const LONG: usize = 10_000;
    let busy = Some(End::Refused { by: Who::Peer, why: RoomRefusal::Busy });
    let limits: [fn(&mut Config); 4] = [
        |config| config.max_parked_bytes = 3 * LONG + LONG / 2,
        |config| config.max_parked_bytes_per_session = 3 * LONG + LONG / 2,
        |config| config.max_parked_per_session = 3,
        |config| config.max_parked = 3,
    ];
    for limit in limits {
        let mut world = World::new();
        world.add(limit);
        world.add(|_| ());
        world.connect(D, P);
        world.settle();
        assert_eq!(asked(&mut world, D, 0..5, LONG), [None, None, None, busy.clone(), busy.clone()]);
        // What is taken up, given up, or goes with its session makes room.
        let sending = world.send(P, 0);
        world.settle();
        world.cancel(P, sending);
        let rooms: Vec<RoomId> = world.nodes[D].rooms.keys().copied().collect();
        world.cancel(D, rooms[1]);
        world.settle();
        assert_eq!(asked(&mut world, D, 10..13, LONG), [None, None, busy.clone()]);
        world.kill(D, DownCause::PeerDied);
        world.restart(D);
        world.connect(D, P);
        world.settle();
        assert_eq!(asked(&mut world, D, 20..24, LONG), [None, None, None, busy.clone()]);
        world.kill(D, DownCause::PeerDied);
        world.restart(D);
        world.finish();
    }
}

#[test]
fn one_sessions_waiting_requests_leave_room_for_anothers() {
    let mut world = World::new();
    world.add(|config| {
        config.max_parked_per_session = 2;
        config.max_parked = 4;
    });
    world.add(|_| ());
    let third = world.add(|_| ());
    world.connect(D, P);
    world.connect(third, P);
    world.settle();
    let busy = Some(End::Refused { by: Who::Peer, why: RoomRefusal::Busy });
    assert_eq!(asked(&mut world, D, 0..3, 0), [None, None, busy.clone()]);
    assert_eq!(asked(&mut world, third, 0..3, 0), [None, None, busy]);
    for node in [D, third] {
        world.kill(node, DownCause::PeerDied);
        world.restart(node);
    }
    world.finish();
}

#[test]
fn requests_do_not_wait_for_ever() {
    let mut world = World::new();
    world.add(|config| config.max_parked_ns = 30 * S);
    world.add(|_| ());
    world.connect(D, P);
    world.settle();
    let forever = world.try_receive(D, world.name(P), 1, u64::MAX / 2).unwrap();
    let taken_up = world.try_receive(D, world.name(P), 2, 90 * S).unwrap();
    world.run_for(29 * S);
    assert_eq!([forever, taken_up].map(|room| world.nodes[D].end(room).cloned()), [None, None]);
    // The longest wait shortens the wait only, and not the room.
    let sending = world.try_send(P, 2, 500 * S).unwrap();
    world.run_for(20 * S);
    assert_eq!(world.nodes[D].end(forever), Some(&End::Refused { by: Who::Peer, why: RoomRefusal::Busy }));
    assert_eq!(world.nodes[D].end(taken_up), None);
    world.move_all(P, sending, 1);
    world.settle();
    assert_eq!(world.nodes[D].end(taken_up), Some(&End::Delivered));
    world.finish();
}

#[test]
fn sessions() {
    let mut world = World::new();
    world.add(|config| config.max_sessions = 1);
    world.add(|_| ());
    let third = world.add(|_| ());
    world.connect(D, P);
    world.connect(third, P);
    world.settle();
    assert_eq!(world.nodes[P].proto.sessions_live(), 1);
    let turned_away = if world.session(P, D).is_some() { third } else { D };
    let busy = SessionEnd::Refused { by: Who::Peer, refusal: Refusal::Busy };
    assert_eq!(world.nodes[turned_away].downs[0].2, busy);
    // Room is made by the end of the other, and the target is dialed again meanwhile.
    let first = world.nodes[D + third - turned_away].ups[0].1.unwrap();
    world.call(D + third - turned_away, |proto, now| proto.disconnect(now, first));
    world.run_for(3 * S);
    assert!(world.session(turned_away, P).is_some());
    // A peer that starts again takes its own place.
    world.kill(turned_away, DownCause::PeerDied);
    world.restart(turned_away);
    world.connect(turned_away, P);
    world.settle();
    assert!(world.session(turned_away, P).is_some());
    // The dialer keeps to its own limit, too.
    world.connect(P, D + third - turned_away);
    world.settle();
    let busy = SessionEnd::Refused { by: Who::Here, refusal: Refusal::Busy };
    assert_eq!(world.nodes[P].downs.last().unwrap().2, busy);
    world.finish();
}

#[test]
fn pages_and_parameters_fit_a_frame() {
    let mut world = with(|config| config.max_frame_bytes = 1_000);
    let mut open = |params: usize, pages: u32| {
        let pages = world.nodes[D].pool.take(pages).unwrap().grant();
        let receive = Receive {
            peer: PeerName::Node(1),
            rank: None,
            room: room_name(1),
            pages,
            buffers: Vec::new().into(),
            params: vec![0; params],
            deadline_ns: u64::MAX,
        };
        world.call(D, |proto, now| proto.receive(now, receive).map_err(|not| not.error))
    };
    let too_long = |bytes| Err(RoomError::TooLong { bytes, limit: 840 });
    assert_eq!(open(841, 0), too_long(841));
    assert_eq!(open(600, 61), too_long(844));
    let pages = world.nodes[D].pool.take(4).unwrap().share();
    let long = (0..60).fold(pages, |pages, _| {
        let again = pages.clone();
        let mut longer = pages;
        longer.join(again.prefix(4)).expect("pages of one pool");
        longer
    });
    let serve = Serve {
        room: room_name(1),
        rank: None,
        pages: long,
        buffers: Vec::new().into(),
        deadline_ns: u64::MAX,
    };
    assert_eq!(world.call(D, |proto, now| proto.serve(now, serve)), too_long(976));
    push(&mut world, 1);
    world.finish();
}

#[test]
fn what_goes_with_the_bytes_fits_a_frame() {
    let mut world = with(|config| config.max_frame_bytes = 1_000);
    let (receiving, sending) = (world.receive(P, D, 1), world.send(D, 1));
    let (fetching, serving) = (world.fetch(P, D, 2), world.serve(D, 2));
    world.nodes[D].offers = false;
    world.settle();
    world.call(D, |proto, now| proto.finish(now, sending, &[0], vec![0; 841]));
    world.call(D, |proto, now| proto.offer(now, serving, vec![0; 841 - 16]));
    world.settle();
    let end = |by, stage, cause| Some(End::Failed { by, stage, cause });
    let too_long = Failure::TooLong { bytes: 841, limit: 840 };
    let found = [sending, serving].map(|room| world.nodes[D].end(room).cloned());
    let expected = [Stage::Transfer, Stage::Grant].map(|stage| end(Who::Here, stage, too_long.clone()));
    assert_eq!(found, expected);
    for room in [receiving, fetching] {
        let found = world.nodes[P].end(room).cloned();
        assert_eq!(found, end(Who::Peer, Stage::Grant, Failure::AtPeer));
    }
    world.finish();
}

#[test]
fn a_stranger_does_not_send_long_frames() {
    let mut world = World::new();
    world.add(|_| ());
    for (name_bytes, is_taken) in [(60 << 10, true), (64 << 10, false)] {
        let about = About { name: "x".repeat(name_bytes), ..about() };
        let stream = world.raw_dial(P);
        let from = Identity { node: 900, incarnation: 1 };
        world.raw_send(stream, from, &Message::Hello { version_min: 1, version_max: 1, about });
        world.settle();
        assert_eq!(world.raw_heard(stream).len(), usize::from(is_taken));
        assert!(world.nodes[P].trusted.is_empty(), "a good first word proves nothing");
        assert_eq!(world.is_closed(stream), !is_taken);
    }
    world.finish();
}

#[test]
#[should_panic(expected = "an empty pre-shared key")]
fn an_empty_key_is_no_key() {
    let mut config = Config::new(Identity { node: 1, incarnation: 1 }, "node");
    config.auth = crossdock_proto::Auth::PreSharedKey(Vec::new());
    crossdock_proto::Proto::new(config);
}
