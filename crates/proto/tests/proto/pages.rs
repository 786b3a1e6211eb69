//! Pages come home exactly once, and only when no write can land in them any more.

use crossdock_memory::Until;
use crossdock_proto::{End, Message, Released, RoomId, RoomRefusal, Who};
use crossdock_transport::{DownCause, Fence};

use crate::world::{D, P, S, World};

/// A push that is under way when its receiver gives it up: three writes are on their way. Gives the two rooms.
fn given_up(world: &mut World) -> (RoomId, RoomId) {
    let receiving = world.receive(D, P, 7);
    let sending = world.send(P, 7);
    world.settle();
    world.post(P, sending, 0, 3);
    let lane = world.lane(D, P, 0);
    world.hold_lane(lane, true);
    world.cancel(D, receiving);
    (receiving, sending)
}

fn quarantined(world: &World) -> Vec<(String, Until, u32)> {
    let shown = world.nodes[D].pool.quarantine(world.now_ns);
    shown.into_iter().map(|entry| (entry.peer.to_string(), entry.until, entry.pages)).collect()
}

#[test]
fn a_port_that_checks_frees_them_at_once() {
    let mut world = World::pair(1);
    world.nodes[D].fence = Fence::Now;
    let (receiving, sending) = given_up(&mut world);
    assert!(world.nodes[D].is_home(receiving), "in the same call");
    assert_eq!(world.nodes[D].proto.grants_live(), 1, "the index rests until no immediate can come");
    world.settle();
    assert_eq!(world.nodes[P].end(sending), Some(&End::Cancelled { by: Who::Peer }));
    let lane = world.lane(D, P, 0);
    world.hold_lane(lane, false);
    world.settle();
    assert_eq!(world.nodes[D].proto.counters().stale_arrivals, 3);
    world.finish();
}

#[test]
fn a_release_frees_them_under_any_fence() {
    for fence in [Fence::WhenDown, Fence::Never] {
        let mut world = World::pair(1);
        world.nodes[D].fence = fence;
        let (receiving, _) = given_up(&mut world);
        let until = match fence {
            Fence::WhenDown => Until::LanesDown,
            _ => Until::ReleaseOrDeath,
        };
        assert_eq!(quarantined(&world), [("node-0".to_string(), until, 4)]);
        world.settle();
        assert!(!world.nodes[D].is_home(receiving), "the sender's writes have not landed");
        let lane = world.lane(D, P, 0);
        world.hold_lane(lane, false);
        world.settle();
        assert!(world.nodes[D].is_home(receiving));
        assert_eq!(quarantined(&world), []);
        world.finish();
    }
}

#[test]
fn lanes_that_are_down_free_them_where_the_port_says_so() {
    let mut world = World::pair(2);
    world.nodes[D].fence = Fence::WhenDown;
    let (receiving, _) = given_up(&mut world);
    let lanes = [world.lane(D, P, 0), world.lane(D, P, 1)];
    world.cut(D, P);
    world.settle();
    assert!(!world.nodes[D].is_home(receiving), "one lane can still write");
    assert_eq!(world.nodes[D].proto.sessions_live(), 1);
    world.hold_lane(lanes[0], false);
    world.settle();
    assert!(world.nodes[D].is_home(receiving));
    world.run_for(S);
    world.finish();
}

#[test]
fn only_a_proven_death_frees_them_where_no_port_can_tell() {
    let mut world = World::pair(2);
    world.nodes[D].fence = Fence::Never;
    let (receiving, _) = given_up(&mut world);
    world.hold(P, D, true);
    let (one, other) = (world.lane(D, P, 0), world.lane(D, P, 1));
    world.break_lane(other, 0, 0);
    world.settle();
    assert!(!world.nodes[D].is_home(receiving));
    world.hold_lane(one, false);
    world.settle();
    assert!(!world.nodes[D].is_home(receiving), "its release has not come");
    // The process dies, and one lane proves it; the other had ended in another way.
    world.kill(P, DownCause::PeerDied);
    world.settle();
    assert!(world.nodes[D].is_home(receiving));
    world.finish();
}

#[test]
fn an_unproven_end_of_all_lanes_frees_nothing_where_no_port_can_tell() {
    let mut world = World::pair(2);
    world.nodes[D].fence = Fence::Never;
    let (receiving, sending) = given_up(&mut world);
    let lane = world.lane(D, P, 0);
    world.hold(P, D, true);
    world.cut_end(world.stream(P, D).0, world.stream(D, P).1);
    world.settle();
    world.hold_lane(lane, false);
    world.settle();
    assert!(!world.nodes[D].is_home(receiving), "all lanes are down, and the peer may still write");
    assert_eq!(world.nodes[D].proto.grants_live(), 1, "nor is the index free");
    assert!(!quarantined(&world).is_empty());
    // The next session lists the grant, and the same life of the peer gives it back.
    world.run_for(S);
    assert!(world.session(D, P).is_some());
    assert!(world.nodes[D].is_home(receiving));
    assert_eq!(world.nodes[P].rooms[&sending].ends.len(), 1);
    world.finish();
}

/// A port that is asked a second time no longer knows the grant, and says that nothing can land under it.
#[test]
fn a_grant_is_revoked_once() {
    let mut world = World::new();
    world.add(|config| config.lanes_per_rail = 2);
    world.add(|config| (config.lanes_per_rail, config.max_grants) = (2, 1));
    world.nodes[D].fence = Fence::WhenDown;
    world.connect(D, P);
    world.settle();
    let receiving = world.receive(D, P, 7);
    let sending = world.send(P, 7);
    world.settle();
    world.post(P, sending, 1, 3);
    let (lost, kept) = (world.lane(D, P, 0), world.lane(D, P, 1));
    world.hold_lane(kept, true);
    world.break_lane(lost, 0, 0);
    world.settle();
    // The next attempt takes a second grant, which is one too many: the first is taken back for two reasons.
    let busy = End::Refused { by: Who::Here, why: RoomRefusal::Busy };
    assert_eq!(world.nodes[D].end(receiving), Some(&busy));
    assert!(!world.nodes[D].is_home(receiving));
    world.hold_lane(kept, false);
    world.settle();
    assert!(world.nodes[D].is_home(receiving));
    world.finish();
}

/// A peer that still has writes at its ports answers when they have ended.
#[test]
fn a_held_grant_goes_back_when_nothing_is_at_the_writers_ports() {
    let mut world = World::pair(1);
    world.nodes[D].fence = Fence::Never;
    let (receiving, _) = given_up(&mut world);
    world.nodes[P].holds_downs = true;
    // The writes are lost with the lane; the writer's port has not said so yet.
    let lane = world.lane(D, P, 0);
    world.break_lane(lane, 0, 0);
    world.hold_lane(lane, false);
    world.cut(D, P);
    world.run_for(S);
    assert!(world.session(D, P).is_some(), "the next session has asked");
    assert!(!world.nodes[D].is_home(receiving));
    world.nodes[P].holds_downs = false;
    world.let_all_down();
    world.settle();
    assert!(world.nodes[D].is_home(receiving));
    world.finish();
}

/// Only the peer that holds a grant, and only the life of it that does, can give it back.
#[test]
fn a_release_by_somebody_else_is_nothing() {
    let mut world = World::pair(1);
    world.nodes[D].fence = Fence::Never;
    let other = world.add(|_| ());
    world.connect(other, D);
    world.settle();
    let (receiving, sending) = given_up(&mut world);
    let grant = world.nodes[P].start(sending).grant;
    let released = vec![Released { grant, down_lanes: 0 }];
    world.forge(other, D, &Message::Release { released: released.clone(), delivered: true });
    world.settle();
    assert!(!world.nodes[D].is_home(receiving));
    // The process of the holder has ended without proof, and its next life speaks.
    world.kill(P, DownCause::Broken { call: "recv", errno: 104 });
    world.release_lanes();
    world.settle();
    world.restart(P);
    world.run_for(3 * S);
    assert!(world.session(D, P).is_some());
    world.forge(P, D, &Message::Release { released, delivered: true });
    world.settle();
    assert!(!world.nodes[D].is_home(receiving));
    assert_eq!(quarantined(&world), [("node-0".to_string(), Until::ReleaseOrDeath, 4)]);
}
