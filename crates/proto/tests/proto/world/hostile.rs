//! One node, and a peer that says whatever it likes at a chosen moment. The tests and the fuzzer share it.

use crossdock_proto::{About, Identity, Message, RailOffer};

use super::{D, Landing, MS, P, RAW, S, World, identity};

/// The moment at which the peer is no longer what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It has been dialed.
    Dialed,
    /// It has dialed.
    Dials,
    /// It has dialed, and been welcomed.
    Welcomed,
    /// It has been dialed, and the session is set up.
    DialedSettingUp,
    /// It has dialed, and the session is set up.
    DialsSettingUp,
    /// A session without rooms.
    Idle,
    /// A session with rooms of all kinds, some of them moving.
    Busy,
    /// The same, when all bytes are there and nothing has been confirmed.
    Landed,
    /// The node has lost a lane that the peer may offer anew.
    LaneLost,
    /// The node has offered a lane anew.
    LaneOffered,
    /// The node has ended the session.
    Ended,
}

pub struct Hostile {
    pub world: World,
    stream: usize,
    pub peer: Identity,
}

impl Moment {
    pub const ALL: [Moment; 11] = [
        Moment::Dialed,
        Moment::Dials,
        Moment::Welcomed,
        Moment::DialedSettingUp,
        Moment::DialsSettingUp,
        Moment::Idle,
        Moment::Busy,
        Moment::Landed,
        Moment::LaneLost,
        Moment::LaneOffered,
        Moment::Ended,
    ];
}

impl Hostile {
    /// The node under attack is the decode node.
    pub fn at(moment: Moment) -> Self {
        let mut world = World::unconnected(2);
        let stream = match moment {
            Moment::Dialed => {
                world.call(D, |proto, now| proto.connect(now, RAW));
                world.settle();
                world.streams.last()
            }
            Moment::Dials => world.raw_dial(D),
            Moment::Welcomed => {
                let stream = world.raw_dial(D);
                let hello = Message::Hello { version_min: 1, version_max: 1, about: about() };
                world.raw_send(stream, identity(P, 1), &hello);
                world.settle();
                assert_eq!(world.raw_heard(stream).len(), 1, "a welcome");
                stream
            }
            Moment::DialedSettingUp | Moment::DialsSettingUp => {
                let (from, to) = if moment == Moment::DialedSettingUp { (D, P) } else { (P, D) };
                world.connect(from, to);
                while world.nodes[D].watched.is_empty() {
                    let (at_ns, _, channel) = world.open_channels().into_iter().min().expect("frames");
                    world.deliver(at_ns, channel);
                }
                world.take_over(P, D)
            }
            Moment::LaneLost | Moment::LaneOffered => {
                let (from, to) = if moment == Moment::LaneLost { (P, D) } else { (D, P) };
                world.connect(from, to);
                world.settle();
                let lane = world.lane(D, P, 1);
                world.break_lane(lane, 0, 0);
                world.settle();
                world.hold(D, P, true);
                world.run_for(if moment == Moment::LaneLost { 100 * MS } else { 2 * S });
                world.hold(D, P, false);
                world.take_over(P, D)
            }
            Moment::Idle | Moment::Busy | Moment::Landed | Moment::Ended => {
                world.connect(D, P);
                world.settle();
                world.nodes[D].on_landed = Landing::Wait;
                if matches!(moment, Moment::Busy | Moment::Landed) {
                    open_rooms(&mut world, moment == Moment::Landed);
                }
                let stream = world.take_over(P, D);
                if moment == Moment::Ended {
                    world.call(D, |proto, now| proto.shut_down(now));
                }
                stream
            }
        };
        Self { world, stream, peer: identity(P, 1) }
    }

    pub fn say(&mut self, frame: &[u8]) {
        if !self.world.is_closed(self.stream) {
            self.world.raw_frame(self.stream, frame.to_vec());
        }
    }

    /// Lets what was said arrive; then the peer is silent, and the node must come to rest.
    pub fn finish(mut self) {
        self.world.settle();
        self.world.run_for(S);
        self.world.call(D, |proto, now| proto.shut_down(now));
        // The other node only lends its ports.
        self.world.kill(P, crossdock_transport::DownCause::PeerDied);
        self.world.release_lanes();
        self.world.finish();
    }
}

/// Rooms 1 to 4 in the four roles of the node; room 5 is asked for by both and met by neither,
/// room 6 is met by nobody. They have moved
/// so far that the next word is the peer's.
fn open_rooms(world: &mut World, is_landed: bool) {
    world.receive(D, P, 1);
    let pushing = world.send(P, 1);
    let pushed = world.send(D, 2);
    world.receive(P, D, 2);
    let fetching = world.fetch(D, P, 3);
    world.serve(P, 3);
    world.serve(D, 4);
    let reading = world.fetch(P, D, 4);
    world.receive(D, P, 5);
    world.receive(P, D, 5);
    world.send(D, 6);
    world.settle();
    for (node, room) in [(P, pushing), (D, pushed), (D, fetching), (P, reading)] {
        world.post(node, room, 0, 2);
        if is_landed {
            world.finish_room(node, room);
        }
    }
    world.settle();
}

/// What fits the nodes of the world.
pub fn about() -> About {
    About {
        name: "stranger".to_string(),
        nonce: [7; 32],
        auth: false,
        fingerprint: Default::default(),
        rails: vec![RailOffer { kind: "fake".to_string(), reach: String::new(), bytes_per_second: 1 }],
        lanes_per_rail: 1,
        pulse_address: "pulse of a stranger".to_string(),
        heartbeat_ns: 200_000_000,
    }
}
