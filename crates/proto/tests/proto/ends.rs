//! Every way to end a room, on either side, at every stage, under every fence: it ends once on each side, the two ends
//! fit each other, and the pages come home.

use crossdock_proto::{End, RoomId, SessionEnd, Who};
use crossdock_transport::{DownCause, Fence};

use crate::world::{D, Landing, MS, P, S, STREAM_ENDED, World};

const FENCES: [Fence; 3] = [Fence::Now, Fence::WhenDown, Fence::Never];

/// How far a room has come when it is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum At {
    /// Only the decode end is open.
    Asked,
    /// Only the prefill end is open.
    Opened,
    /// Both are, and nothing has been posted.
    Begun,
    /// Some ops have landed and others are on their way.
    Moving,
    /// All has been posted, and some ops are on their way.
    Posted,
    /// All bytes are here, and nobody has said whether they are right.
    Landed,
}

const STAGES: [At; 6] = [At::Asked, At::Opened, At::Begun, At::Moving, At::Posted, At::Landed];

/// One room of a pair, and its ends as far as they are open.
struct Case {
    world: World,
    decode: Option<RoomId>,
    prefill: Option<RoomId>,
    pull: bool,
    at: At,
    fence: Fence,
}

impl Case {
    fn names() -> impl Iterator<Item = (Fence, bool, At)> {
        let fences = FENCES.into_iter().flat_map(|fence| [false, true].map(|pull| (fence, pull)));
        fences.flat_map(|(fence, pull)| STAGES.map(|at| (fence, pull, at)))
    }

    fn all() -> impl Iterator<Item = Case> {
        Self::names().map(|(fence, pull, at)| Self::lasting(at, fence, pull, [10 * S; 2]))
    }

    /// A room of which the two sides allow so much time.
    fn lasting(at: At, fence: Fence, pull: bool, for_ns: [u64; 2]) -> Self {
        let mut world = World::pair(2);
        world.nodes[D].fence = fence;
        world.nodes[P].fence = fence;
        world.nodes[D].on_landed = Landing::Wait;
        let peer = world.name(P);
        let decode = (at != At::Opened).then(|| match pull {
            false => world.try_receive(D, peer, 7, for_ns[D]),
            true => world.try_fetch(D, peer, 7, for_ns[D]),
        });
        let prefill = (at != At::Asked).then(|| match pull {
            false => world.try_send(P, 7, for_ns[P]),
            true => world.try_serve(P, 7, for_ns[P]),
        });
        let [decode, prefill] = [decode, prefill].map(|room| room.map(|room| room.expect("a room")));
        world.settle();
        let mut case = Self { world, decode, prefill, pull, at, fence };
        case.advance();
        case
    }

    /// Brings the room to its stage.
    fn advance(&mut self) {
        let (mover, room) = match (self.pull, self.prefill, self.decode) {
            (false, Some(prefill), _) => (P, prefill),
            (true, _, Some(decode)) => (D, decode),
            _ => return,
        };
        if self.at < At::Moving {
            return;
        }
        self.world.post(mover, room, 0, 2);
        self.world.settle();
        if self.at < At::Landed {
            // The writes come to the decode side, the reads to the prefill side.
            let end = if self.pull { P } else { D };
            let lane = self.world.lane(end, 1 - end, 1);
            self.world.hold_lane(lane, true);
        }
        self.world.post(mover, room, 1, 2);
        if self.at > At::Moving {
            self.world.finish_room(mover, room);
        }
        self.world.settle();
    }

    fn decode_end(&self) -> Option<End> {
        self.decode.and_then(|room| self.world.nodes[D].end(room).cloned())
    }

    fn prefill_end(&self) -> Option<End> {
        self.prefill.and_then(|room| self.world.nodes[P].end(room).cloned())
    }

    /// Checks that nothing is left, once everything that was held has been let go.
    fn finish(mut self) {
        self.world.release_lanes();
        // An end that never met the other one waits for its own deadline.
        self.world.run_for(12 * S);
        self.world.finish();
    }

    fn name(&self) -> String {
        format!("{:?} {} under {:?}", self.at, if self.pull { "pull" } else { "push" }, self.fence)
    }
}

fn lost(end: Option<End>, cause: SessionEnd, name: &str) {
    assert_eq!(end, Some(End::PeerLost { cause }), "{name}");
}

#[test]
fn nothing_goes_wrong() {
    for mut case in Case::all() {
        if let (Some(decode), At::Landed) = (case.decode, case.at) {
            case.world.call(D, |proto, now| proto.accept(now, decode));
            case.world.settle();
            let ends = (case.decode_end(), case.prefill_end());
            assert_eq!(ends, (Some(End::Delivered), Some(End::Delivered)), "{}", case.name());
            assert!(case.world.nodes[D].is_home(decode), "{}", case.name());
        }
        case.finish();
    }
}

#[test]
fn the_decode_side_cancels() {
    for mut case in Case::all() {
        let Some(decode) = case.decode else { continue };
        case.world.cancel(D, decode);
        assert_eq!(case.decode_end(), Some(End::Cancelled { by: Who::Here }), "{}", case.name());
        case.world.settle();
        if case.prefill.is_some() {
            assert_eq!(case.prefill_end(), Some(End::Cancelled { by: Who::Peer }), "{}", case.name());
        }
        // What is on its way keeps the pages out where the port does not look, or reads into them.
        let on_its_way =
            matches!(case.at, At::Moving | At::Posted) && (case.pull || case.fence != Fence::Now);
        assert_eq!(case.world.nodes[D].is_home(decode), !on_its_way, "{}", case.name());
        case.world.release_lanes();
        case.world.settle();
        assert!(case.world.nodes[D].is_home(decode), "{}", case.name());
        case.finish();
    }
}

#[test]
fn the_prefill_side_cancels() {
    for mut case in Case::all() {
        let Some(prefill) = case.prefill else { continue };
        case.world.cancel(P, prefill);
        assert_eq!(case.prefill_end(), Some(End::Cancelled { by: Who::Here }), "{}", case.name());
        case.world.settle();
        if case.decode.is_some() {
            assert_eq!(case.decode_end(), Some(End::Cancelled { by: Who::Peer }), "{}", case.name());
        }
        case.finish();
    }
}

#[test]
fn both_sides_cancel_at_once() {
    for mut case in Case::all() {
        for (node, room) in [(P, case.prefill), (D, case.decode)] {
            if let Some(room) = room {
                case.world.cancel(node, room);
            }
        }
        case.world.settle();
        for end in [case.decode_end(), case.prefill_end()].into_iter().flatten() {
            assert_eq!(end, End::Cancelled { by: Who::Here }, "{}", case.name());
        }
        case.finish();
    }
}

/// Of the two deadlines the earlier ends both sides; whose clock says so first depends on the round trip.
#[test]
fn a_deadline_passes_on_one_side() {
    for early in [P, D] {
        for (fence, pull, at) in Case::names() {
            let for_ns = |node| if node == early { 3 * S } else { 10 * S };
            let mut case = Case::lasting(at, fence, pull, [for_ns(P), for_ns(D)]);
            let name = format!("{} at {early}", case.name());
            case.world.run_for(2_900 * MS);
            assert_eq!((case.decode_end(), case.prefill_end()), (None, None), "{name}");
            case.world.run_for(200 * MS);
            let ends: Vec<End> = [case.decode_end(), case.prefill_end()].into_iter().flatten().collect();
            let by = |end: &End| match end {
                End::Expired { by, .. } => *by,
                other => panic!("{name}: {other:?}"),
            };
            match &ends[..] {
                [one] => assert_eq!(by(one), Who::Here, "{name}"),
                [one, other] => assert!(by(one) == Who::Here || by(other) == Who::Here, "{name}"),
                _ => assert!(matches!(case.at, At::Asked | At::Opened), "{name}: nobody has expired"),
            }
            case.finish();
        }
    }
}

#[test]
fn the_control_stream_breaks() {
    for mut case in Case::all() {
        let name = case.name();
        case.world.cut(P, D);
        case.world.settle();
        if case.at != At::Opened {
            lost(case.decode_end(), STREAM_ENDED, &name);
        }
        if !matches!(case.at, At::Asked | At::Opened) {
            lost(case.prefill_end(), STREAM_ENDED, &name);
        }
        if let Some(decode) = case.decode
            && matches!(case.at, At::Moving | At::Posted)
            && case.fence == Fence::Never
            && !case.pull
        {
            case.world.release_lanes();
            case.world.settle();
            assert!(!case.world.nodes[D].is_home(decode), "{name}: nothing has proven that the peer is done");
        }
        // The decode side dials again, asks about its grants, and hears that they are over.
        case.finish();
    }
}

#[test]
fn the_peer_dies() {
    for mut case in Case::all() {
        let Some(decode) = case.decode else { continue };
        let name = case.name();
        case.world.kill(P, DownCause::PeerDied);
        case.world.settle();
        lost(case.decode_end(), STREAM_ENDED, &name);
        // The lane on which something was on its way is down when that has landed.
        case.world.release_lanes();
        case.world.settle();
        assert!(case.world.nodes[D].is_home(decode), "{name}");
        assert_eq!(case.world.nodes[D].proto.sessions_live(), 0, "{name}");
        case.world.finish();
    }
}
