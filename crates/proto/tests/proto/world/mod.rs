//! A whole network in one struct: nodes, their control streams, lanes and transfers, and a clock that only the test
//! moves. Nothing in it fails by itself; the test cuts, holds, delays and loses.
//!
//! The world plays the engine towards each [`Proto`], and what must hold in every test is checked here: a room ends
//! once and its pages come home once, no byte lands in a page that is home, and a room has one transfer at a time.

mod chance;
mod hostile;
mod lanes;
mod node;
mod streams;

use std::collections::{BTreeMap, BTreeSet};

use crossdock_memory::PageLayout;
use crossdock_proto::{
    Config, End, Fetch, Identity, LinkCause, PeerName, Proto, Rail, Receive, Region, RoomBuffer, RoomError,
    RoomId, RoomName, RoomOnWire, Send, Serve, SessionEnd, SessionId, TargetId,
};
use crossdock_transport::{Access, Direction, DownCause, GrantId, RemoteKey};

pub use chance::Chance;
pub use hostile::{Hostile, Moment, about};
pub use lanes::LaneKey;
use lanes::Lanes;
pub use node::{Landing, Node, Seen};
pub use streams::RAW;
use streams::Streams;

/// The prefill node of a pair.
pub const P: usize = 0;
/// The decode node of a pair, which dials.
pub const D: usize = 1;

pub const MS: u64 = 1_000_000;
pub const S: u64 = 1_000 * MS;
/// What a stream's end finds that the other has broken.
pub const STREAM_ENDED: SessionEnd = SessionEnd::StreamEnded { cause: LinkCause::ClosedByPeer };
/// What a dial of an address finds where nobody listens.
pub const UNREACHED: LinkCause = LinkCause::Broken { call: "connect", errno: 111 };
/// What a dial finds of [`NO_ADDRESS`].
pub const BAD_ADDRESS: LinkCause = LinkCause::BadAddress { reason: "not an address" };
/// Cannot be dialed.
pub const NO_ADDRESS: &str = "no address";

/// Pages of each node's pool.
pub const PAGES: u32 = 64;

pub struct World {
    pub now_ns: u64,
    /// How long a frame or an event of a lane takes.
    pub latency_ns: u64,
    /// What comes is taken in and nothing is carried out before [`pump_all`](World::pump_all): the engine, too, takes
    /// in all that has come before it acts.
    pub is_lazy: bool,
    /// The rank that the rooms are for that are opened from now on.
    pub rank: Option<u32>,
    pub nodes: Vec<Node>,
    pub streams: Streams,
    pub lanes: Lanes,
    /// Orders what happens at the same time by what was caused first.
    caused: u64,
}

/// Where something is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Channel {
    /// Towards one end of a control stream: 0 is the dialer's.
    Stream(usize, usize),
    /// Towards one end of a lane.
    Lane(LaneKey),
}

impl World {
    pub fn new() -> Self {
        Self {
            now_ns: S,
            latency_ns: MS,
            is_lazy: false,
            rank: None,
            nodes: Vec::new(),
            streams: Streams::default(),
            lanes: Lanes::default(),
            caused: 0,
        }
    }

    /// Two nodes with `lanes` lanes between them; the decode node dials, and the session is up.
    pub fn pair(lanes: u8) -> Self {
        let mut world = Self::unconnected(lanes);
        world.connect(D, P);
        world.settle();
        assert!(world.session(D, P).is_some() && world.session(P, D).is_some(), "the pair is connected");
        world
    }

    /// The same, before anybody has dialed.
    pub fn unconnected(lanes: u8) -> Self {
        let mut world = Self::new();
        for _ in [P, D] {
            world.add(move |config| config.lanes_per_rail = lanes);
        }
        world
    }

    /// Starts a node.
    pub fn add(&mut self, configure: impl Fn(&mut Config) + 'static) -> usize {
        let at = self.nodes.len();
        self.nodes.push(Node::new(at, Box::new(configure)));
        at
    }

    // --- what tests ask of nodes -----------------------------------------------------------------------------

    /// Calls into a node's protocol, and carries out what comes of it.
    pub fn call<T>(&mut self, node: usize, call: impl FnOnce(&mut Proto, u64) -> T) -> T {
        let result = call(&mut self.nodes[node].proto, self.now_ns);
        if !self.is_lazy {
            self.pump(node);
        }
        result
    }

    pub fn connect(&mut self, from: usize, to: usize) -> TargetId {
        let address = address(to);
        self.call(from, |proto, now| proto.connect(now, address))
    }

    /// The live session of a node with another, as the first numbers it.
    pub fn session(&self, node: usize, peer: usize) -> Option<SessionId> {
        self.nodes[node].proto.session_of(self.name(peer))
    }

    pub fn name(&self, node: usize) -> PeerName {
        PeerName::Node(self.nodes[node].proto.identity().node)
    }

    /// One end of a lane of the live session between two nodes.
    pub fn lane(&self, node: usize, peer: usize, slot: u8) -> LaneKey {
        LaneKey { node, session: self.session(node, peer).expect("a live session"), slot }
    }

    /// Opens the decode end of a push, of four pages, for ten seconds.
    pub fn receive(&mut self, node: usize, peer: usize, number: u64) -> RoomId {
        let peer = self.name(peer);
        self.try_receive(node, peer, number, 10 * S).expect("a room")
    }

    pub fn try_receive(
        &mut self,
        node: usize,
        peer: PeerName,
        number: u64,
        for_ns: u64,
    ) -> Result<RoomId, RoomError> {
        let receive = Receive {
            peer,
            rank: self.rank,
            room: room_name(number),
            pages: self.nodes[node].pool.take(4).expect("free pages").grant(),
            buffers: buffers().into(),
            params: b"ask".to_vec(),
            deadline_ns: self.now_ns + for_ns,
        };
        self.open(node, true, |proto, now| proto.receive(now, receive).map_err(|not| not.error))
    }

    /// Opens the prefill end of a push.
    pub fn send(&mut self, node: usize, number: u64) -> RoomId {
        self.try_send(node, number, 10 * S).expect("a room")
    }

    pub fn try_send(&mut self, node: usize, number: u64, for_ns: u64) -> Result<RoomId, RoomError> {
        let pages = self.nodes[node].pool.take(4).expect("free pages").share();
        let send =
            Send { room: room_name(number), rank: self.rank, pages, deadline_ns: self.now_ns + for_ns };
        self.open(node, false, |proto, now| proto.send_room(now, send))
    }

    /// Opens the decode end of a pull.
    pub fn fetch(&mut self, node: usize, peer: usize, number: u64) -> RoomId {
        let peer = self.name(peer);
        self.try_fetch(node, peer, number, 10 * S).expect("a room")
    }

    pub fn try_fetch(
        &mut self,
        node: usize,
        peer: PeerName,
        number: u64,
        for_ns: u64,
    ) -> Result<RoomId, RoomError> {
        let fetch = Fetch {
            peer,
            rank: self.rank,
            room: room_name(number),
            pages: self.nodes[node].pool.take(4).expect("free pages").grant(),
            params: b"ask".to_vec(),
            deadline_ns: self.now_ns + for_ns,
        };
        self.open(node, true, |proto, now| proto.fetch(now, fetch).map_err(|not| not.error))
    }

    /// Opens the prefill end of a pull.
    pub fn serve(&mut self, node: usize, number: u64) -> RoomId {
        self.try_serve(node, number, 10 * S).expect("a room")
    }

    pub fn try_serve(&mut self, node: usize, number: u64, for_ns: u64) -> Result<RoomId, RoomError> {
        let serve = Serve {
            room: room_name(number),
            rank: self.rank,
            pages: self.nodes[node].pool.take(4).expect("free pages").share(),
            buffers: buffers().into(),
            deadline_ns: self.now_ns + for_ns,
        };
        self.open(node, false, |proto, now| proto.serve(now, serve))
    }

    pub fn open(
        &mut self,
        node: usize,
        is_decode: bool,
        open: impl FnOnce(&mut Proto, u64) -> Result<RoomId, RoomError>,
    ) -> Result<RoomId, RoomError> {
        let opened = open(&mut self.nodes[node].proto, self.now_ns);
        if let Ok(room) = opened {
            self.nodes[node].expect(room, is_decode);
        }
        self.pump(node);
        opened
    }

    /// Whether a node can open one more room.
    pub fn may_open(&self, node: usize) -> bool {
        self.nodes[node].runs() && self.nodes[node].pool.stats().free >= 4
    }

    pub fn cancel(&mut self, node: usize, room: RoomId) {
        self.call(node, |proto, now| proto.cancel(now, room));
    }

    // --- time ------------------------------------------------------------------------------------------------

    /// Lets everything that is on its way arrive, and what comes of it. Timers fire only while that takes.
    pub fn settle(&mut self) {
        for _ in 0..100_000 {
            let Some((at_ns, _, channel)) = self.next_event() else { return };
            match self.next_timer() {
                Some((timer_ns, node)) if timer_ns < at_ns => self.tick(timer_ns, node),
                _ => self.deliver(at_ns, channel),
            }
        }
        panic!("nothing ever settles");
    }

    /// Lets this much time pass.
    pub fn run_for(&mut self, ns: u64) {
        let until_ns = self.now_ns + ns;
        for _ in 0..1_000_000 {
            let event = self.next_event().map(|(at_ns, _, channel)| (at_ns, channel));
            match (event, self.next_timer()) {
                (event, Some((timer_ns, node)))
                    if timer_ns <= until_ns && event.is_none_or(|(at_ns, _)| timer_ns < at_ns) =>
                {
                    self.tick(timer_ns, node);
                }
                (Some((at_ns, channel)), _) if at_ns <= until_ns => self.deliver(at_ns, channel),
                _ => {
                    self.now_ns = self.now_ns.max(until_ns);
                    return;
                }
            }
        }
        panic!("too much happens in {ns} ns");
    }

    /// Everything that is on its way and not held, the earliest first.
    fn next_event(&self) -> Option<(u64, u64, Channel)> {
        self.open_channels().into_iter().min()
    }

    /// The next event of each channel that is not held: when, in which order of causes, where.
    pub fn open_channels(&self) -> Vec<(u64, u64, Channel)> {
        let stopped: BTreeSet<usize> = (0..self.nodes.len()).filter(|&n| !self.nodes[n].runs()).collect();
        let mut open = self.streams.fronts(&stopped);
        open.extend(self.lanes.fronts(&stopped));
        open
    }

    fn next_timer(&self) -> Option<(u64, usize)> {
        let due = |(at, node): (usize, &Node)| {
            let due_ns = node.runs().then(|| node.proto.next_deadline_ns()).flatten()?;
            Some((due_ns.max(self.now_ns), at))
        };
        self.nodes.iter().enumerate().filter_map(due).min()
    }

    fn tick(&mut self, at_ns: u64, node: usize) {
        self.now_ns = self.now_ns.max(at_ns);
        self.listen(node);
        self.call(node, |proto, now| proto.tick(now));
        let next_ns = self.nodes[node].proto.next_deadline_ns();
        assert!(next_ns.is_none_or(|next_ns| next_ns > self.now_ns), "a tick does all that is due");
    }

    /// Lets every node do what is due.
    pub fn tick_all(&mut self) {
        for node in 0..self.nodes.len() {
            let due_ns = self.nodes[node].proto.next_deadline_ns();
            if self.nodes[node].runs() && due_ns.is_some_and(|due_ns| due_ns <= self.now_ns) {
                self.tick(self.now_ns, node);
            }
        }
    }

    /// Delivers the next event of a channel.
    pub fn deliver(&mut self, at_ns: u64, channel: Channel) {
        self.now_ns = self.now_ns.max(at_ns);
        match channel {
            Channel::Stream(stream, end) => self.deliver_stream(stream, end),
            Channel::Lane(lane) => self.deliver_lane(lane),
        }
    }

    fn cause(&mut self) -> (u64, u64) {
        self.caused += 1;
        (self.now_ns + self.latency_ns, self.caused)
    }

    /// Tells a node's protocol how silent its peers have been.
    fn listen(&mut self, node: usize) {
        let sessions: Vec<SessionId> = self.nodes[node].watched.keys().copied().collect();
        for session in sessions {
            let peer = self.nodes[node].proto.peer(session).map(|(peer, _)| peer);
            let beats = peer.is_some_and(|peer| self.nodes.iter().any(|n| n.runs() && n.is(peer)));
            let now_ns = self.now_ns;
            let node = &mut self.nodes[node];
            if let Some(heard_ns) = node.watched.get_mut(&session) {
                if beats && !node.is_deaf {
                    *heard_ns = now_ns;
                }
                node.proto.heard(session, *heard_ns, now_ns);
            }
        }
    }

    /// Lets every node carry out what it has decided, and stops being lazy.
    pub fn pump_all(&mut self) {
        self.is_lazy = false;
        for node in 0..self.nodes.len() {
            self.pump(node);
        }
    }

    // --- death -----------------------------------------------------------------------------------------------

    /// Ends a node's process. Its streams end, and its lanes end at their other ends with this cause.
    pub fn kill(&mut self, node: usize, cause: DownCause) {
        self.nodes[node].is_alive = false;
        self.end_streams_of(node);
        self.end_lanes_of(node, cause);
    }

    /// Starts a killed node again, at the same address, as a new incarnation.
    pub fn restart(&mut self, node: usize) {
        assert!(!self.nodes[node].is_alive, "a node is killed before it is started again");
        self.nodes[node].start_again();
    }

    // --- the end of a test -----------------------------------------------------------------------------------

    /// Nothing is left of any room, and no page is out.
    pub fn assert_idle(&self) {
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.is_alive) {
            assert_eq!((node.proto.rooms_live(), node.proto.grants_live()), (0, 0), "rooms, grants of {at}");
            assert!(node.transfers.is_empty(), "transfers of {at}: {:?}", node.transfers.keys());
            assert_eq!(node.pool.stats().free, PAGES, "pages of {at}: {:?}", node.pool.stats());
            for (room, seen) in &node.rooms {
                assert_eq!(seen.ends.len(), 1, "ends of {room:?} at {at}: {:?}", seen.ends);
                assert_eq!(seen.homes, usize::from(seen.is_decode), "homes of {room:?} at {at}");
            }
        }
    }

    /// How each room ended that has come so far that both sides knew it: on the prefill side, and on the decode side.
    pub fn pairs(&self) -> Vec<(End, End)> {
        let mut pairs = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            for (grant, granted) in &node.granted {
                let Some((_, other)) = self.mover(at, *grant, granted.access) else { continue };
                let (Some(here), Some(there)) = (node.rooms[&granted.room].ends.first(), other.ends.first())
                else {
                    continue;
                };
                pairs.push(match granted.access {
                    Access::Write => (there.clone(), here.clone()),
                    Access::Read => (here.clone(), there.clone()),
                });
            }
        }
        pairs
    }

    /// The room that was told to move under a grant of this node's.
    pub fn mover(&self, granter: usize, grant: GrantId, access: Access) -> Option<(usize, &Seen)> {
        let identity = self.nodes[granter].proto.identity();
        let direction = match access {
            Access::Write => Direction::Write,
            Access::Read => Direction::Read,
        };
        let peers = self.nodes.iter().enumerate().filter(|(at, _)| *at != granter);
        let rooms = peers.flat_map(|(at, node)| node.rooms.values().map(move |seen| (at, node, seen)));
        let moved = |node: &Node, seen: &Seen| {
            seen.starts.iter().any(|start| {
                let with = |(session, _, peer): &(SessionId, _, Identity)| {
                    (*session, *peer) == (start.session, identity)
                };
                (start.grant, start.direction) == (grant, direction) && node.ups.iter().any(with)
            })
        };
        rooms.filter(|(_, node, seen)| moved(node, seen)).map(|(at, _, seen)| (at, seen)).next_back()
    }

    /// Ends a test: all rooms are over, and after a shut-down nothing at all is left.
    pub fn finish(mut self) {
        self.settle();
        self.assert_idle();
        for node in 0..self.nodes.len() {
            if self.nodes[node].runs() {
                self.call(node, |proto, now| proto.shut_down(now));
            }
        }
        self.run_for(60 * S);
        self.assert_idle();
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.is_alive) {
            assert_eq!(node.proto.sessions_live(), 0, "sessions of {at}");
            assert_eq!(node.proto.next_deadline_ns(), None, "timers of {at}");
            assert_eq!(node.watched, BTreeMap::new(), "watched by {at}");
            assert_eq!(node.granted.values().filter(|g| g.is_alive).count(), 0, "granted by {at}'s ports");
        }
    }
}

pub fn address(node: usize) -> String {
    format!("node {node}")
}

/// What a node of the world is called in handshakes.
pub fn identity(node: usize, life: u64) -> Identity {
    Identity { node: 100 + node as u64, incarnation: life }
}

pub fn room_name(number: u64) -> RoomName {
    RoomName { room: number, use_count: 0, share: 0 }
}

/// A room as messages name it; `nth` of those that its decode side has opened, prefill ends included.
pub fn on_wire(number: u64, nth: u32) -> RoomOnWire {
    RoomOnWire { name: room_name(number), serial: nth }
}

fn buffers() -> Vec<RoomBuffer> {
    let layout = PageLayout { offset: 0, stride_bytes: 64, page_bytes: 64, pages: PAGES };
    vec![RoomBuffer { region: 0, layout }]
}

fn config(node: usize, life: u64) -> Config {
    let mut config = Config::new(identity(node, life), format!("node-{node}"));
    config.entropy = [node as u8 * 16 + life as u8; 32];
    config.rails = vec![Rail { kind: "fake", reach: String::new(), bytes_per_second: 1_000_000_000 }];
    config.pulse_address = format!("pulse of {node}");
    config
}

fn region() -> Region {
    let key = RemoteKey::new(b"key").expect("a short key");
    Region { region: 0, bytes: 64 * u64::from(PAGES), keys: vec![(0, key)] }
}
