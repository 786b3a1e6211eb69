//! Rooms that are for a peer of one rank: no other one gets them, whatever it asks for, and is told so.

use crossdock_proto::{End, Misfit, RoomId, RoomRefusal, Who};

use crate::world::{D, P, S, World};

/// A second decode node.
const OTHER: usize = 2;

/// A prefill node of rank 0, and decode nodes of ranks 5 and 3 that have met it.
fn three() -> World {
    let mut world = World::new();
    for rank in [0, 5, 3] {
        let node = world.add(move |config| config.app = vec![rank]);
        world.nodes[node].proto.know_ranks(|app| app.first().map(|&rank| rank.into()));
    }
    world.connect(D, P);
    world.connect(OTHER, P);
    world.settle();
    world
}

/// Opens the prefill end for a decode side of rank 5.
fn open(world: &mut World, is_pull: bool) -> RoomId {
    world.rank = Some(5);
    if is_pull { world.serve(P, 7) } else { world.send(P, 7) }
}

/// Asks for it, of a prefill side of this rank.
fn ask(world: &mut World, node: usize, is_pull: bool, rank: u32) -> RoomId {
    world.rank = Some(rank);
    let room = if is_pull { world.fetch(node, P, 7) } else { world.receive(node, P, 7) };
    world.settle();
    room
}

fn refused(by: Who, misfit: Misfit) -> End {
    End::Refused { by, why: RoomRefusal::Mismatch(misfit) }
}

#[test]
fn another_rank_gets_nothing_and_the_right_one_its_share() {
    for is_pull in [false, true] {
        // The room is opened before both ask, between the two, and after both.
        for opened in 0..3 {
            let mut world = three();
            let early = (opened == 0).then(|| open(&mut world, is_pull));
            let wrong = ask(&mut world, OTHER, is_pull, 0);
            let between = (opened == 1).then(|| open(&mut world, is_pull));
            let right = ask(&mut world, D, is_pull, 0);
            let prefill = early.or(between).unwrap_or_else(|| open(&mut world, is_pull));
            world.settle();
            assert_eq!(world.nodes[OTHER].end(wrong), Some(&refused(Who::Peer, Misfit::AtPeer)));
            assert!(world.nodes[OTHER].is_home(wrong));
            assert_eq!(world.nodes[D].end(right), None);
            // It asks again, now that the room has been given away.
            let again = ask(&mut world, OTHER, is_pull, 0);
            assert_eq!(world.nodes[OTHER].end(again), Some(&refused(Who::Peer, Misfit::AtPeer)));
            let (mover, room) = if is_pull { (D, right) } else { (P, prefill) };
            world.move_all(mover, room, 2);
            world.settle();
            assert_eq!(world.nodes[D].end(right), Some(&End::Delivered));
            assert_eq!(world.nodes[P].end(prefill), Some(&End::Delivered));
            world.finish();
        }
    }
}

#[test]
fn a_peer_of_another_rank_than_the_named_one_is_not_asked() {
    for is_pull in [false, true] {
        let mut world = three();
        open(&mut world, is_pull);
        let sent = world.nodes[D].proto.counters().messages_out;
        let room = ask(&mut world, D, is_pull, 1);
        let misfit = Misfit::Rank { named: 1, peer: 0 };
        assert_eq!(world.nodes[D].end(room), Some(&refused(Who::Here, misfit)));
        assert!(world.nodes[D].is_home(room));
        assert_eq!(world.nodes[D].proto.counters().messages_out, sent, "nothing was granted or asked for");
        world.run_for(20 * S);
        world.finish();
    }
}

#[test]
fn a_peer_whose_rank_cannot_be_read_has_none() {
    let mut world = three();
    let late = world.add(|_| ());
    world.nodes[late].proto.know_ranks(|_| None);
    world.connect(late, P);
    world.settle();
    world.rank = Some(0);
    let room = world.receive(late, P, 7);
    assert_eq!(world.nodes[late].end(room), Some(&refused(Who::Here, Misfit::Unreadable)));
    world.finish();
}
