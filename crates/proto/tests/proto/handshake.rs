//! From two nodes that do not know each other to a session.

use crossdock_proto::{
    About, Auth, Difference, Fingerprint, Identity, Message, Rail, Refusal, SessionEnd, Who,
};

use crate::world::{D, P, RAW, S, World, about};

fn print(values: &[(&str, &str)]) -> Fingerprint {
    Fingerprint::new(values.iter().map(|(key, value)| (key.to_string(), value.to_string())))
}

fn rail(kind: &'static str, reach: &str) -> Rail {
    Rail { kind, reach: reach.to_string(), bytes_per_second: 1 }
}

fn hello(about: About) -> Message {
    Message::Hello { version_min: 1, version_max: 1, about }
}

const STRANGER: Identity = Identity { node: 900, incarnation: 1 };

/// The dialer's node and the acceptor's, configured each in its own way, and what came of it: nothing but refusals.
fn refused(
    dialer: impl Fn(&mut crossdock_proto::Config) + 'static,
    acceptor: impl Fn(&mut crossdock_proto::Config) + 'static,
) -> (Who, Refusal) {
    let mut world = World::new();
    world.add(acceptor);
    world.add(dialer);
    world.connect(D, P);
    world.run_for(20 * S);
    assert_eq!(world.nodes[D].dials, 1, "a target that has refused is not dialed again");
    assert_eq!(world.nodes[P].downs, [], "the acceptor's user hears nothing of strangers");
    let Some((None, Some(_), SessionEnd::Refused { by, refusal })) = world.nodes[D].downs.first().cloned()
    else {
        panic!("not refused: {:?}", world.nodes[D].downs);
    };
    assert_eq!(world.nodes[D].downs.len(), 1);
    world.finish();
    (by, refusal)
}

#[test]
fn two_nodes_meet() {
    let world = World::pair(2);
    let (up, target, peer) = world.nodes[D].ups[0];
    assert_eq!(world.session(D, P), Some(up));
    assert!(target.is_some());
    assert_eq!(peer, world.nodes[P].proto.identity());
    assert_eq!(world.nodes[P].ups.len(), 1);
    assert_eq!(world.nodes[P].ups[0].1, None, "the acceptor has no target");
    assert_eq!(world.lanes.up(D, up), [0, 1]);
    world.finish();
}

#[test]
fn heartbeats_are_sent_at_a_sane_pace_whatever_the_peer_asks_for() {
    for heartbeat_ns in [0, 1, u64::MAX] {
        let mut world = World::new();
        world.add(|_| ());
        world.add(move |config| config.heartbeat_ns = heartbeat_ns);
        // Heartbeats are looked after every millisecond, and something is on its way for less than that.
        world.latency_ns = 1_000;
        // The world holds each interval against the limits.
        world.connect(D, P);
        world.settle();
        assert!(world.session(D, P).is_some());
        world.finish();
    }
}

#[test]
fn a_shared_key_is_proven_both_ways() {
    let mut world = World::new();
    for _ in [P, D] {
        world.add(|config| config.auth = Auth::PreSharedKey(b"a key that both have".to_vec()));
    }
    world.connect(D, P);
    world.settle();
    // The lanes' tags, which the world compares, come from the key too.
    assert!(world.session(D, P).is_some() && world.session(P, D).is_some());
    world.finish();
}

#[test]
fn the_dialer_finds_a_wrong_key_first() {
    let key = |key: &'static [u8]| {
        move |config: &mut crossdock_proto::Config| config.auth = Auth::PreSharedKey(key.to_vec())
    };
    assert_eq!(refused(key(b"one"), key(b"another")), (Who::Here, Refusal::NotAuthentic));
}

#[test]
fn an_acceptor_finds_a_wrong_proof() {
    let mut world = World::new();
    world.add(|config| config.auth = Auth::PreSharedKey(b"key".to_vec()));
    let stream = world.raw_dial(P);
    world.raw_send(stream, STRANGER, &hello(About { auth: true, ..about() }));
    world.settle();
    assert!(matches!(world.raw_heard(stream)[..], [(_, Message::Welcome { .. })]));
    world.raw_send(stream, STRANGER, &Message::Prove { proof: [0; 32] });
    world.settle();
    let heard = world.raw_heard(stream);
    assert!(matches!(heard[..], [(_, Message::Refuse { refusal: Refusal::NotAuthentic })]), "{heard:?}");
    assert!(world.is_closed(stream));
    assert_eq!(world.nodes[P].proto.sessions_live(), 0);
    world.finish();
}

#[test]
fn a_proof_speaks_for_one_identity_only() {
    let mut world = World::new();
    world.add(|_| ());
    let stream = world.raw_dial(P);
    world.raw_send(stream, STRANGER, &hello(about()));
    let other = Identity { incarnation: 2, ..STRANGER };
    world.raw_send(stream, other, &Message::Prove { proof: [0; 32] });
    world.settle();
    let heard = world.raw_heard(stream);
    assert!(matches!(heard[..], [_, (_, Message::Refuse { refusal: Refusal::NotAuthentic })]), "{heard:?}");
    world.finish();
}

#[test]
fn authentication_on_one_side_only() {
    let on = |config: &mut crossdock_proto::Config| config.auth = Auth::PreSharedKey(b"key".to_vec());
    assert_eq!(refused(on, |_| ()), (Who::Peer, Refusal::AuthMismatch));
    assert_eq!(refused(|_| (), on), (Who::Peer, Refusal::AuthMismatch));
}

#[test]
fn a_fingerprint_that_differs_is_readable_on_both_sides() {
    let bf16 = print(&[("dtype", "bf16"), ("layers", "61")]);
    let fp8 = print(&[("dtype", "fp8_e4m3"), ("layers", "61")]);
    let (ours, theirs) = (bf16.clone(), fp8.clone());
    let (by, refusal) = refused(
        move |config| config.fingerprint = ours.clone(),
        move |config| config.fingerprint = theirs.clone(),
    );
    let expected = Difference {
        key: "dtype".to_string(),
        ours: Some("bf16".to_string()),
        theirs: Some("fp8_e4m3".to_string()),
    };
    assert_eq!((by, &refusal), (Who::Peer, &Refusal::Fingerprint(vec![expected])));
    assert!(refusal.to_string().ends_with("dtype bf16 here, fp8_e4m3 there"), "{refusal}");
    // On the wire the acceptor says it from its own point of view.
    let mut world = World::new();
    world.add(move |config| config.fingerprint = fp8.clone());
    let stream = world.raw_dial(P);
    world.raw_send(stream, STRANGER, &hello(About { fingerprint: bf16, ..about() }));
    world.settle();
    let heard = world.raw_heard(stream);
    let [(_, Message::Refuse { refusal })] = &heard[..] else { panic!("{heard:?}") };
    assert!(refusal.to_string().ends_with("dtype fp8_e4m3 here, bf16 there"), "{refusal}");
    world.finish();
}

#[test]
fn no_rail_in_common() {
    let (by, refusal) = refused(
        |config| config.rails = vec![rail("shm", "host a"), rail("verbs", "")],
        |config| config.rails = vec![rail("shm", "host b"), rail("tcp", "")],
    );
    assert_eq!(by, Who::Peer);
    assert_eq!(refusal.to_string(), "no rail in common: shm, verbs here, shm, tcp there");
}

#[test]
fn the_dialers_first_kind_that_reaches_is_used_alone() {
    let mut world = World::new();
    // Two rails of the kind on each side, in other orders, and one of another kind on both.
    world.add(|config| {
        config.rails = vec![rail("tcp", ""), rail("fake", "b"), rail("fake", "a")];
        config.lanes_per_rail = 3;
    });
    world.add(|config| {
        config.rails = vec![rail("shm", ""), rail("fake", "a"), rail("tcp", ""), rail("fake", "b")];
        config.lanes_per_rail = 2;
    });
    world.connect(D, P);
    world.settle();
    let session = world.session(D, P).expect("a session");
    assert_eq!(world.lanes.up(D, session), [0, 1, 2, 3], "two rails, and as many lanes as both allow");
    world.finish();
}

#[test]
fn versions_overlap_or_not() {
    for ((version_min, version_max), meets) in
        [((1, 1), true), ((0, 9), true), ((1, 2), true), ((2, 9), false), ((0, 0), false)]
    {
        let mut world = World::new();
        world.add(|_| ());
        let stream = world.raw_dial(P);
        world.raw_send(stream, STRANGER, &Message::Hello { version_min, version_max, about: about() });
        world.settle();
        let heard = world.raw_heard(stream);
        match &heard[..] {
            [(_, Message::Welcome { version: 1, .. })] => assert!(meets),
            [(_, Message::Refuse { refusal })] => {
                let there = (version_min, version_max);
                assert!(!meets);
                let refusal_there = match refusal {
                    Refusal::Version { here_min: 1, here_max: 1, there_min, there_max } => {
                        (*there_min, *there_max)
                    }
                    other => panic!("{other:?}"),
                };
                assert_eq!(refusal_there, there);
            }
            _ => panic!("{heard:?}"),
        }
        world.finish();
    }
}

#[test]
fn a_welcome_in_a_version_that_was_not_offered_is_refused() {
    let mut world = World::new();
    world.add(|_| ());
    world.call(P, |proto, now| proto.connect(now, RAW));
    let stream = world.streams.last();
    world.settle();
    assert!(matches!(world.raw_heard(stream)[..], [(_, Message::Hello { .. })]));
    world.raw_send(stream, STRANGER, &Message::Welcome { version: 2, about: about(), proof: [0; 32] });
    world.settle();
    let heard = world.raw_heard(stream);
    assert!(matches!(heard[..], [(_, Message::Refuse { refusal: Refusal::Version { .. } })]), "{heard:?}");
    world.finish();
}

#[test]
fn a_node_does_not_meet_itself_or_its_namesake() {
    let mut world = World::new();
    world.add(|_| ());
    world.connect(P, P);
    world.settle();
    let (_, _, cause) = &world.nodes[P].downs[0];
    assert_eq!(*cause, SessionEnd::Refused { by: Who::Peer, refusal: Refusal::SameNode });
    world.run_for(10 * S);
    assert_eq!(world.nodes[P].dials, 1);
    world.finish();
    let namesake = refused(|config| config.identity.node = 100, |_| ());
    assert_eq!(namesake, (Who::Peer, Refusal::SameNode));
}

#[test]
fn a_stranger_has_a_deadline() {
    let mut world = World::new();
    world.add(|_| ());
    let (silent, slow) = (world.raw_dial(P), world.raw_dial(P));
    world.raw_send(slow, STRANGER, &hello(about()));
    world.run_for(4 * S);
    assert!(!world.is_closed(silent) && !world.is_closed(slow));
    world.run_for(2 * S);
    assert!(world.is_closed(silent) && world.is_closed(slow));
    world.finish();
}

#[test]
fn a_session_that_is_not_ready_in_time_ends() {
    let mut world = World::unconnected(1);
    world.connect(D, P);
    while world.nodes[P].watched.is_empty() {
        let (at_ns, _, channel) = world.open_channels().into_iter().min().unwrap();
        world.deliver(at_ns, channel);
    }
    // Both have a session, and the acceptor's setup does not come through.
    let (stream, end) = world.stream(D, P);
    world.streams.all[stream].is_held[end] = true;
    world.run_for(4 * S);
    assert_eq!((world.nodes[D].downs.len(), world.nodes[P].downs.len()), (0, 0));
    world.run_for(2 * S);
    assert_eq!(world.nodes[D].downs[0].2, SessionEnd::HandshakeTimedOut);
    assert!(world.session(D, P).is_some(), "it is dialed again");
    world.streams.all[stream].is_held[end] = false;
    world.finish();
}

#[test]
fn a_message_out_of_order_closes_the_stream() {
    for message in [Message::Ready, Message::Prove { proof: [0; 32] }, Message::Ping { stamp: 1 }] {
        let mut world = World::new();
        world.add(|_| ());
        let stream = world.raw_dial(P);
        world.raw_send(stream, STRANGER, &message);
        world.settle();
        assert!(world.is_closed(stream));
        world.finish();
    }
}

#[test]
fn a_lane_that_cannot_be_opened_ends_the_session() {
    for slot in [0, 1] {
        let mut world = World::unconnected(2);
        world.nodes[D].broken_slot = Some(slot);
        world.connect(D, P);
        world.settle();
        assert!(matches!(world.nodes[D].downs[0].2, SessionEnd::Port(_)), "{:?}", world.nodes[D].downs);
        assert_eq!(world.nodes[D].proto.sessions_live(), 0);
        // A port may be out of lanes for a while only: the target is dialed again.
        world.nodes[D].broken_slot = None;
        world.run_for(S);
        assert!(world.session(D, P).is_some());
        world.finish();
    }
}

#[test]
fn a_peer_that_speaks_as_another_life_of_itself_is_told_to_begin_again() {
    let mut world = World::pair(1);
    let earlier = Identity { incarnation: 0, ..world.nodes[D].proto.identity() };
    world.forge_as(earlier, D, P, &Message::Ping { stamp: 1 });
    world.settle();
    assert_eq!(world.nodes[P].downs[0].2, SessionEnd::Restarted);
    assert_eq!(world.nodes[D].downs[0].2, SessionEnd::Restarted, "the answer to the earlier life says so");
    world.run_for(S);
    assert!(world.session(D, P).is_some());
    world.finish();
}

#[test]
fn a_second_handshake_on_a_stream_is_misbehaviour() {
    for message in [
        hello(about()),
        Message::Prove { proof: [0; 32] },
        Message::Refuse { refusal: Refusal::Busy },
        Message::Setup { lanes: Vec::new(), regions: Vec::new(), app: Vec::new(), held: Vec::new() },
    ] {
        let mut world = World::pair(1);
        world.forge(D, P, &message);
        world.settle();
        assert!(matches!(world.nodes[P].downs[0].2, SessionEnd::Misbehaved { .. }), "{message:?}");
        world.run_for(S);
        assert!(world.session(D, P).is_some());
        world.finish();
    }
}

#[test]
fn a_frame_that_cannot_be_read_is_misbehaviour() {
    let mut world = World::pair(1);
    let (stream, _) = world.stream(D, P);
    world.raw_frame(stream, vec![0xff; 40]);
    world.settle();
    let ends = world.nodes.iter().flat_map(|n| &n.downs).map(|(_, _, cause)| cause.clone());
    assert!(ends.into_iter().any(|cause| matches!(cause, SessionEnd::Misbehaved { .. })));
    world.run_for(S);
    world.finish();
}
