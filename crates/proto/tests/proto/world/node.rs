//! One node of the world: its protocol, what its ports know, and what its user has heard.

use std::collections::{BTreeMap, BTreeSet};

use crossdock_memory::PagePool;
use crossdock_proto::{
    Action, Config, End, Identity, LinkId, Notice, Proto, RoomId, SessionEnd, SessionId, Start, TargetId,
};
use crossdock_transport::{Access, Direction, Error, Fence, GrantId};

use super::lanes::Transfer;
use super::{MS, PAGES, S, World};

pub struct Node {
    pub proto: Proto,
    pub pool: PagePool,
    /// What its ports promise when a grant is revoked.
    pub fence: Fence,
    pub is_alive: bool,
    /// As after SIGSTOP: nothing is taken in, no time passes for it, no heartbeat leaves.
    pub is_stopped: bool,
    /// Hears no heartbeats.
    pub is_deaf: bool,
    /// What it does when a room has landed.
    pub on_landed: Landing,
    /// Whether it answers a reader's want at once.
    pub offers: bool,
    /// Its ports refuse to grant.
    pub refuses_grants: bool,
    /// The lane of this number cannot be opened.
    pub broken_slot: Option<u8>,
    /// It says nothing to an offer of this lane, until [`World::speak`].
    pub silent_slot: Option<u8>,
    pub unspoken: Vec<(SessionId, u8, u8)>,
    /// Its lanes cannot be connected.
    pub is_unplugged: bool,
    /// When which lanes were opened.
    pub opened: Vec<(u64, u8)>,
    /// Its lanes do not say `Down` before the test lets them.
    pub holds_downs: bool,
    /// What its user was told of each room.
    pub rooms: BTreeMap<RoomId, Seen>,
    pub ups: Vec<(SessionId, Option<TargetId>, Identity)>,
    pub downs: Vec<(Option<SessionId>, Option<TargetId>, SessionEnd)>,
    pub transfers: BTreeMap<RoomId, Transfer>,
    /// The grants that its ports have heard of.
    pub granted: BTreeMap<GrantId, Granted>,
    /// Sessions with heartbeats: when the peer was last heard.
    pub watched: BTreeMap<SessionId, u64>,
    /// The streams whose peers have proven who they are.
    pub trusted: BTreeSet<LinkId>,
    pub links: BTreeMap<LinkId, (usize, usize)>,
    pub dials: u32,
    next_link: u32,
    life: u64,
    at: usize,
    configure: Box<dyn Fn(&mut Config)>,
}

/// What a node does when all bytes of a room are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    Accept,
    Reject,
    Wait,
}

/// What was told of one room.
#[derive(Debug, Default)]
pub struct Seen {
    pub is_decode: bool,
    pub ends: Vec<End>,
    pub homes: usize,
    pub landed: usize,
    pub wanted: usize,
    pub starts: Vec<Start>,
}

/// A grant as the ports of its node know it.
#[derive(Clone, Copy, Debug)]
pub struct Granted {
    pub room: RoomId,
    pub access: Access,
    pub is_alive: bool,
    pub is_home: bool,
}

impl Node {
    pub fn new(at: usize, configure: Box<dyn Fn(&mut Config)>) -> Self {
        let proto = proto(at, 1, &configure);
        Self {
            proto,
            pool: PagePool::new(PAGES, Default::default()),
            fence: Fence::Now,
            is_alive: true,
            is_stopped: false,
            is_deaf: false,
            on_landed: Landing::Accept,
            offers: true,
            refuses_grants: false,
            broken_slot: None,
            silent_slot: None,
            unspoken: Vec::new(),
            is_unplugged: false,
            opened: Vec::new(),
            holds_downs: false,
            rooms: BTreeMap::new(),
            ups: Vec::new(),
            downs: Vec::new(),
            transfers: BTreeMap::new(),
            granted: BTreeMap::new(),
            watched: BTreeMap::new(),
            trusted: BTreeSet::new(),
            links: BTreeMap::new(),
            dials: 0,
            next_link: 0,
            life: 1,
            at,
            configure,
        }
    }

    pub fn start_again(&mut self) {
        self.life += 1;
        self.proto = proto(self.at, self.life, &self.configure);
        self.pool = PagePool::new(PAGES, Default::default());
        self.is_alive = true;
        self.rooms.clear();
        self.ups.clear();
        self.downs.clear();
        self.transfers.clear();
        self.granted.clear();
        self.watched.clear();
        self.trusted.clear();
        self.links.clear();
    }

    pub fn runs(&self) -> bool {
        self.is_alive && !self.is_stopped
    }

    pub fn is(&self, identity: Identity) -> bool {
        self.is_alive && self.proto.identity() == identity
    }

    pub fn expect(&mut self, room: RoomId, is_decode: bool) {
        self.rooms.insert(room, Seen { is_decode, ..Seen::default() });
    }

    pub fn add_link(&mut self, stream: usize, end: usize) -> LinkId {
        self.next_link += 1;
        let link = LinkId(self.next_link);
        self.links.insert(link, (stream, end));
        link
    }

    /// How a room has ended, if it has.
    pub fn end(&self, room: RoomId) -> Option<&End> {
        self.rooms[&room].ends.first()
    }

    pub fn is_home(&self, room: RoomId) -> bool {
        self.rooms[&room].homes == 1
    }

    /// The last attempt that a room was told to start.
    pub fn start(&self, room: RoomId) -> &Start {
        self.rooms[&room].starts.last().expect("a start")
    }

    fn seen(&mut self, room: RoomId) -> &mut Seen {
        self.rooms.get_mut(&room).expect("a notice of a room that was opened")
    }
}

fn proto(at: usize, life: u64, configure: &dyn Fn(&mut Config)) -> Proto {
    let mut config = super::config(at, life);
    configure(&mut config);
    let mut proto = Proto::new(config);
    proto.announce(super::region());
    proto
}

impl World {
    /// Carries out what a node's protocol has decided: all actions, then one notice, like the engine.
    pub fn pump(&mut self, node: usize) {
        loop {
            while let Some(action) = self.nodes[node].proto.next_action() {
                self.act(node, action);
            }
            let Some(notice) = self.nodes[node].proto.next_notice() else { return };
            self.hear(node, notice);
        }
    }

    fn act(&mut self, node: usize, action: Action) {
        let now = self.now_ns;
        match action {
            Action::Dial { target, address } => {
                self.nodes[node].dials += 1;
                let link = self.dial(node, &address);
                self.nodes[node].proto.dialed(now, target, link);
            }
            Action::Send { link, frame } => self.send_frame(node, link, frame),
            Action::CloseLink { link } => self.close_stream(node, link),
            Action::Trust { link } => {
                assert!(self.nodes[node].trusted.insert(link), "a stream is trusted once");
            }
            Action::Watch { session, plan } => {
                assert!((MS..=60 * S).contains(&plan.interval_ns), "{plan:?}");
                assert!(plan.send_token != plan.expect_token, "{plan:?}");
                let before = self.nodes[node].watched.insert(session, now);
                assert_eq!(before, None, "a session is watched once");
            }
            Action::Unwatch { session } => {
                let before = self.nodes[node].watched.remove(&session);
                assert!(before.is_some(), "a session that is unwatched was watched");
            }
            Action::OpenLane { session, slot, rail } => self.open_lane(node, session, slot, rail),
            Action::ConnectLane { session, slot, address, tags } => {
                self.connect_lane(node, session, slot, &address, tags);
            }
            Action::CloseLane { session, slot } => self.close_lane(node, session, slot),
            Action::AttachLane { session, slot, regions, .. } => {
                assert_eq!(regions.len(), 1);
                self.nodes[node].proto.lane_attached(now, session, slot, Ok(()));
            }
            Action::UseLane { session, slot } => self.use_lane(node, session, slot),
            Action::Grant { session: _, grant, room } => self.grant(node, grant, room),
            Action::Revoke { session: _, grant } => {
                let granted = self.nodes[node].granted.get_mut(&grant).filter(|granted| granted.is_alive);
                // As ports do: nothing can land under a grant that they do not know (any more).
                let fence = match granted {
                    Some(granted) => {
                        granted.is_alive = false;
                        self.nodes[node].fence
                    }
                    None => Fence::Now,
                };
                self.nodes[node].proto.revoked(now, grant, fence);
            }
            Action::StopTransfer { room } => self.stop_transfer(node, room),
            Action::Forget { session } => {
                assert!(!self.nodes[node].watched.contains_key(&session), "heartbeats end first");
                self.forget_lanes(node, session);
            }
        }
    }

    fn grant(&mut self, node: usize, grant: GrantId, room: RoomId) {
        let now = self.now_ns;
        let n = &mut self.nodes[node];
        let Some((access, pages, _)) = n.proto.granted(room) else { return };
        assert!(!pages.is_empty());
        if n.refuses_grants {
            return n.proto.room_failed(now, room, Error::BadGrant { reason: "as the test wishes" });
        }
        let granted = Granted { room, access, is_alive: true, is_home: false };
        let before = n.granted.insert(grant, granted);
        assert!(before.is_none_or(|before| !before.is_alive), "the index of {grant:?} is in use");
    }

    fn hear(&mut self, node: usize, notice: Notice) {
        let now = self.now_ns;
        let n = &mut self.nodes[node];
        match notice {
            Notice::SessionUp { session, target, peer, .. } => n.ups.push((session, target, peer)),
            Notice::SessionDown { session, target, cause, .. } => n.downs.push((session, target, cause)),
            Notice::Start(start) => {
                let seen = n.seen(start.room);
                assert!(seen.ends.is_empty(), "a room that has ended does not start");
                seen.starts.push(start.clone());
                let room = start.room;
                let before = n.transfers.insert(room, Transfer::new(start));
                assert!(before.is_none(), "a room has one transfer at a time");
            }
            Notice::Stop { .. } => {}
            Notice::Wanted { room, .. } => {
                n.seen(room).wanted += 1;
                if n.offers {
                    n.proto.offer(now, room, b"offer".to_vec());
                }
            }
            Notice::Landed { room, .. } => {
                n.seen(room).landed += 1;
                match n.on_landed {
                    Landing::Accept => n.proto.accept(now, room),
                    Landing::Reject => n.proto.reject(now, room),
                    Landing::Wait => {}
                }
            }
            Notice::Ended { room, end, .. } => {
                let seen = n.seen(room);
                let is_delivered_prefill = end == End::Delivered && !seen.is_decode;
                seen.ends.push(end);
                assert_eq!(seen.ends.len(), 1, "a room ends once: {:?}", seen.ends);
                if is_delivered_prefill {
                    self.other_end_is_delivered(node, room);
                }
            }
            Notice::Unread { pages } => drop(pages),
            Notice::Home { room, pages } => {
                let seen = n.seen(room);
                seen.homes += 1;
                assert_eq!(
                    (seen.homes, seen.ends.len()),
                    (1, 1),
                    "pages come home once, with or after the end"
                );
                assert_eq!(pages.into_pages().map_or(0, |pages| pages.len()), 4);
                self.pages_are_home(node, room);
            }
        }
    }

    /// Checks that a prefill side that may rely on its bytes is not alone in that.
    fn other_end_is_delivered(&self, node: usize, room: RoomId) {
        let n = &self.nodes[node];
        let pushed = n.rooms[&room].starts.last().and_then(|start| {
            let (_, _, peer) = n.ups.iter().find(|up| up.0 == start.session).expect("a session that was up");
            let decode = self.nodes.iter().find(|n| n.is(*peer))?;
            Some(&decode.rooms[&decode.granted[&start.grant].room])
        });
        let served = n.granted.iter().rfind(|(_, granted)| granted.room == room);
        let pulled = served.and_then(|(grant, _)| Some(self.mover(node, *grant, Access::Read)?.1));
        // It may have died since it said so.
        if let Some(decode) = pushed.or(pulled) {
            assert_eq!(decode.ends, [End::Delivered], "the other end of {room:?} at {node}");
        }
    }

    /// Checks that nothing can land any more in the pages of a room.
    fn pages_are_home(&mut self, node: usize, room: RoomId) {
        let n = &mut self.nodes[node];
        let mut grants = Vec::new();
        for (grant, granted) in n.granted.iter_mut().filter(|(_, granted)| granted.room == room) {
            granted.is_home = true;
            grants.push(*grant);
        }
        if let Some(transfer) = n.transfers.get(&room)
            && transfer.start.direction == Direction::Read
        {
            assert!(transfer.is_idle(), "reads of {room:?} are on their way into pages that are home");
        }
        if n.fence != Fence::Now {
            let late = self.lanes.writes_towards(node, &grants);
            assert_eq!(late, 0, "writes on their way into pages of {room:?} that are home");
        }
    }
}
