//! From two nodes that do not know each other to a session.

use crate::world::{D, P, World};

#[test]
fn two_nodes_meet() {
    let world = World::pair(2);
    let (up, target, peer) = world.nodes[D].ups[0];
    assert_eq!(world.session(D, P), Some(up));
    assert!(target.is_some());
    assert_eq!(peer, world.nodes[P].proto.identity());
    assert_eq!(world.nodes[P].ups.len(), 1);
    world.finish();
}
