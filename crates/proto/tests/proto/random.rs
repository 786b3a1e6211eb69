//! Random lives of a small cluster. What must hold at every moment is checked by the world itself; what must hold when
//! the faults stop is checked at the end: every room has ended once on each side with ends that fit each other, every
//! page is home, and nothing is left of any session.

use crossdock_proto::{End, RoomId};
use crossdock_transport::{DownCause, Fence};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::world::{Landing, MS, S, World};

const NODES: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    /// The next event of any channel, whatever is due before it elsewhere.
    Deliver(Index),
    /// So many events in their order.
    Flow(u8),
    /// Time passes, and nothing arrives.
    Pass(u16),
    /// Time passes as it should.
    Run(u16),
    Receive {
        node: u8,
        peer: u8,
        number: u8,
        for_ms: u16,
    },
    Send {
        node: u8,
        number: u8,
        for_ms: u16,
    },
    Fetch {
        node: u8,
        peer: u8,
        number: u8,
        for_ms: u16,
    },
    Serve {
        node: u8,
        number: u8,
        for_ms: u16,
    },
    Post {
        room: Index,
        lane: Index,
        ops: u8,
    },
    Finish(Index),
    Cancel(Index),
    Verdict {
        room: Index,
        is_right: bool,
    },
    Break {
        lane: Index,
        here: u8,
        there: u8,
    },
    /// Lanes of the node cannot be connected any more, or again.
    Unplug {
        node: u8,
        is_unplugged: bool,
    },
    /// One of its lanes cannot be opened any more, or all again.
    Exhaust {
        node: u8,
        slot: Option<u8>,
    },
    HoldDowns {
        node: u8,
        is_held: bool,
    },
    LetDown(Index),
    Cut {
        stream: Index,
        both: bool,
    },
    Connect {
        from: u8,
        to: u8,
    },
    Disconnect(Index),
    Stop {
        node: u8,
        is_stopped: bool,
    },
    Kill(u8),
    Restart(u8),
    /// The engine takes in more before it acts.
    Lazy(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let node = || 0..NODES as u8;
    let index = any::<Index>;
    let number = || 0u8..6;
    let for_ms = || 1u16..8_000;
    prop_oneof![
        30 => index().prop_map(Step::Deliver),
        25 => (1u8..20).prop_map(Step::Flow),
        1 => (1u16..1_000).prop_map(Step::Pass),
        1 => (1u16..500).prop_map(Step::Run),
        8 => (node(), node(), number(), for_ms())
            .prop_map(|(node, peer, number, for_ms)| Step::Receive { node, peer, number, for_ms }),
        8 => (node(), number(), for_ms()).prop_map(|(node, number, for_ms)| Step::Send { node, number, for_ms }),
        4 => (node(), node(), number(), for_ms())
            .prop_map(|(node, peer, number, for_ms)| Step::Fetch { node, peer, number, for_ms }),
        4 => (node(), number(), for_ms()).prop_map(|(node, number, for_ms)| Step::Serve { node, number, for_ms }),
        12 => (index(), index(), 1u8..4).prop_map(|(room, lane, ops)| Step::Post { room, lane, ops }),
        8 => index().prop_map(Step::Finish),
        1 => index().prop_map(Step::Cancel),
        3 => (index(), prop::bool::weighted(0.8))
            .prop_map(|(room, is_right)| Step::Verdict { room, is_right }),
        4 => (index(), 0u8..4, 0u8..4).prop_map(|(lane, here, there)| Step::Break { lane, here, there }),
        1 => (node(), prop::bool::weighted(0.3))
            .prop_map(|(node, is_unplugged)| Step::Unplug { node, is_unplugged }),
        1 => (node(), prop::option::weighted(0.3, 0u8..3)).prop_map(|(node, slot)| Step::Exhaust { node, slot }),
        1 => (node(), prop::bool::weighted(0.3)).prop_map(|(node, is_held)| Step::HoldDowns { node, is_held }),
        2 => index().prop_map(Step::LetDown),
        1 => (index(), any::<bool>()).prop_map(|(stream, both)| Step::Cut { stream, both }),
        2 => (node(), node()).prop_map(|(from, to)| Step::Connect { from, to }),
        1 => index().prop_map(Step::Disconnect),
        1 => (node(), prop::bool::weighted(0.2)).prop_map(|(node, is_stopped)| Step::Stop { node, is_stopped }),
        1 => node().prop_map(Step::Kill),
        2 => node().prop_map(Step::Restart),
        1 => prop::bool::weighted(0.3).prop_map(Step::Lazy),
    ]
}

/// How one life of the cluster is set up.
#[derive(Clone, Debug)]
struct Plan {
    lanes: u8,
    fences: [Fence; NODES],
    landings: [Landing; NODES],
    offers: [bool; NODES],
    max_grants: u32,
    lane_retry_ms: u64,
    steps: Vec<Step>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let fence = || prop::sample::select(vec![Fence::Now, Fence::WhenDown, Fence::Never]);
    let landing =
        || prop::sample::select(vec![Landing::Accept, Landing::Accept, Landing::Reject, Landing::Wait]);
    let each = (prop::array::uniform3(fence()), prop::array::uniform3(landing()), any::<[bool; NODES]>());
    let max_grants = prop::sample::select(vec![2, 3, 100]);
    let lane_retry_ms = prop::sample::select(vec![0, 1, 1, 20, 20]);
    (1u8..4, each, max_grants, lane_retry_ms, prop::collection::vec(step(), 1..250)).prop_map(
        |(lanes, (fences, landings, offers), max_grants, lane_retry_ms, steps)| Plan {
            lanes,
            fences,
            landings,
            offers,
            max_grants,
            lane_retry_ms,
            steps,
        },
    )
}

struct Life {
    world: World,
    targets: Vec<(usize, crossdock_proto::TargetId)>,
    /// Where a port can tell nothing by itself, only a life of the peer that can still be asked brings pages home
    /// after all lanes are down.
    may_kill: bool,
    /// Lanes that were lost come back.
    come_back: bool,
}

impl Life {
    fn new(plan: &Plan) -> Self {
        let mut world = World::new();
        for node in 0..NODES {
            let (lanes, max_grants, retry_ns) = (plan.lanes, plan.max_grants, plan.lane_retry_ms * MS);
            world.add(move |config| {
                (config.lanes_per_rail, config.max_grants) = (lanes, max_grants);
                (config.lane_retry_min_ns, config.lane_retry_max_ns) = (retry_ns, 4 * retry_ns);
            });
            world.nodes[node].fence = plan.fences[node];
            world.nodes[node].on_landed = plan.landings[node];
            world.nodes[node].offers = plan.offers[node];
        }
        let may_kill = !plan.fences.contains(&Fence::Never);
        let come_back = plan.lane_retry_ms > 0;
        let mut life = Self { world, targets: Vec::new(), may_kill, come_back };
        life.connect(0, 1);
        life.connect(2, 1);
        life.world.settle();
        life
    }

    fn connect(&mut self, from: usize, to: usize) {
        let target = self.world.connect(from, to);
        self.targets.push((from, target));
    }

    fn rooms(&self) -> Vec<(usize, RoomId)> {
        let of = |(at, node): (usize, &crate::world::Node)| {
            node.rooms.keys().map(move |room| (at, *room)).collect::<Vec<_>>()
        };
        self.world.nodes.iter().enumerate().flat_map(of).collect()
    }

    fn step(&mut self, step: &Step) {
        let world = &mut self.world;
        match *step {
            Step::Deliver(index) => {
                let open = world.open_channels();
                if !open.is_empty() {
                    let (at_ns, _, channel) = *index.get(&open);
                    world.deliver(at_ns, channel);
                }
            }
            Step::Flow(events) => {
                for _ in 0..events {
                    let Some((at_ns, _, channel)) = world.open_channels().into_iter().min() else { break };
                    world.deliver(at_ns, channel);
                }
            }
            Step::Pass(ms) => {
                world.now_ns += u64::from(ms) * MS;
                world.tick_all();
            }
            Step::Run(ms) => world.run_for(u64::from(ms) * MS),
            Step::Receive { node, peer, number, for_ms } => {
                let (node, name) = (usize::from(node), world.name(peer.into()));
                if world.may_open(node) {
                    let _ = world.try_receive(node, name, number.into(), u64::from(for_ms) * MS);
                }
            }
            Step::Fetch { node, peer, number, for_ms } => {
                let (node, name) = (usize::from(node), world.name(peer.into()));
                if world.may_open(node) {
                    let _ = world.try_fetch(node, name, number.into(), u64::from(for_ms) * MS);
                }
            }
            Step::Send { node, number, for_ms } => {
                if world.may_open(node.into()) {
                    let _ = world.try_send(node.into(), number.into(), u64::from(for_ms) * MS);
                }
            }
            Step::Serve { node, number, for_ms } => {
                if world.may_open(node.into()) {
                    let _ = world.try_serve(node.into(), number.into(), u64::from(for_ms) * MS);
                }
            }
            Step::Post { room, lane, ops } => {
                let postable = world.postable();
                if !postable.is_empty() {
                    let (node, room, lanes) = room.get(&postable);
                    if !lanes.is_empty() {
                        let slot = *lane.get(lanes);
                        world.post(*node, *room, slot, ops.into());
                    }
                }
            }
            Step::Finish(index) => {
                let postable = world.postable();
                if !postable.is_empty() {
                    let (node, room, _) = index.get(&postable);
                    world.finish_room(*node, *room);
                }
            }
            Step::Cancel(index) => {
                let rooms = self.rooms();
                if !rooms.is_empty() {
                    let (node, room) = *index.get(&rooms);
                    self.world.cancel(node, room);
                }
            }
            Step::Verdict { room, is_right } => {
                let rooms = self.rooms();
                if !rooms.is_empty() {
                    let (node, room) = *room.get(&rooms);
                    self.world.call(node, |proto, now| match is_right {
                        true => proto.accept(now, room),
                        false => proto.reject(now, room),
                    });
                }
            }
            Step::Break { lane, here, there } => {
                let lanes = world.lanes.all_up();
                if !lanes.is_empty() {
                    world.break_lane(*lane.get(&lanes), here.into(), there.into());
                }
            }
            Step::Unplug { node, is_unplugged } => {
                world.nodes[usize::from(node)].is_unplugged = is_unplugged;
            }
            Step::Exhaust { node, slot } => world.nodes[usize::from(node)].broken_slot = slot,
            Step::HoldDowns { node, is_held } => world.nodes[usize::from(node)].holds_downs = is_held,
            Step::LetDown(index) => {
                let held = world.lanes.held_downs();
                if !held.is_empty() {
                    world.let_down(*index.get(&held));
                }
            }
            Step::Cut { stream, both } => {
                let streams = world.streams.all.len();
                if streams > 0 {
                    let stream = stream.index(streams);
                    world.cut_end(stream, 0);
                    if both {
                        world.cut_end(stream, 1);
                    }
                }
            }
            Step::Connect { from, to } => {
                if from != to && world.nodes[usize::from(from)].is_alive {
                    self.connect(from.into(), to.into());
                }
            }
            Step::Disconnect(index) => {
                if !self.targets.is_empty() {
                    let (node, target) = *index.get(&self.targets);
                    world.call(node, |proto, now| proto.disconnect(now, target));
                }
            }
            Step::Stop { node, is_stopped } => world.nodes[usize::from(node)].is_stopped = is_stopped,
            Step::Kill(node) => {
                if self.may_kill && world.nodes[usize::from(node)].is_alive {
                    world.pump_all();
                    world.kill(node.into(), DownCause::PeerDied);
                }
            }
            Step::Restart(node) => {
                if !world.nodes[usize::from(node)].is_alive {
                    self.targets.retain(|(of, _)| *of != usize::from(node));
                    world.restart(node.into());
                }
            }
            Step::Lazy(is_lazy) => match is_lazy {
                true => world.is_lazy = true,
                false => world.pump_all(),
            },
        }
    }

    /// The faults stop.
    fn end(mut self) {
        let world = &mut self.world;
        world.pump_all();
        for node in 0..NODES {
            world.nodes[node].is_stopped = false;
            world.nodes[node].holds_downs = false;
            world.nodes[node].is_unplugged = false;
            world.nodes[node].broken_slot = None;
            if !world.nodes[node].is_alive {
                world.restart(node);
            }
        }
        world.let_all_down();
        world.run_for(5 * S);
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            world.connect(from, to);
        }
        world.run_for(30 * S);
        for (sender, receiver) in world.pairs() {
            assert!(fit(&sender, &receiver), "prefill {sender:?}, decode {receiver:?}");
        }
        let sessions = world.nodes.iter().flat_map(|node| node.ups.iter().map(move |up| (node, up.0)));
        for (node, session) in
            sessions.filter(|(node, session)| self.come_back && node.proto.is_live(*session))
        {
            let (usable, all) = node.proto.lanes(session).expect("a session");
            assert_eq!(usable, all, "every lane of {session:?} is back");
        }
        self.world.finish();
    }
}

/// Whether two ends of one room can meet: the table of `docs/wire.md`.
fn fit(prefill: &End, decode: &End) -> bool {
    use crossdock_proto::Who::{Here, Peer};
    let by = |end: &End| match end {
        End::Cancelled { by }
        | End::Expired { by, .. }
        | End::Refused { by, .. }
        | End::Failed { by, .. } => Some(*by),
        _ => None,
    };
    match (prefill, decode) {
        (End::Delivered, other) => *other == End::Delivered,
        // The prefill side had given up, or lost the peer, before it heard.
        (prefill, End::Delivered) => by(prefill) != Some(Peer),
        // Whoever ends by the other's word ends in the way that the other did.
        (prefill, decode) => match (by(prefill), by(decode)) {
            (Some(Peer), Some(Here)) | (Some(Here), Some(Peer)) => {
                std::mem::discriminant(prefill) == std::mem::discriminant(decode)
            }
            (Some(Peer), _) | (_, Some(Peer)) => false,
            _ => true,
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn whatever_happens_every_room_ends_and_every_page_comes_home(plan in plan()) {
        let mut life = Life::new(&plan);
        for step in &plan.steps {
            life.step(step);
        }
        life.end();
    }
}
