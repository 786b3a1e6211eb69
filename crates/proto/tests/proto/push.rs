//! Rooms in which the prefill side writes.

use crossdock_proto::{End, Who};

use crate::world::{D, P, World};

#[test]
fn a_grant_before_the_send() {
    let mut world = World::pair(2);
    let receiving = world.receive(D, P, 7);
    world.settle();
    let sending = world.send(P, 7);
    world.settle();
    world.move_all(P, sending, 3);
    world.settle();
    assert_eq!(world.nodes[P].end(sending), Some(&End::Delivered));
    assert_eq!(world.nodes[D].end(receiving), Some(&End::Delivered));
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
