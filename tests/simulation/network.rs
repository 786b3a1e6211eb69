//! Control streams and heartbeats over the fabric, in virtual time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crossdock_engine::{LinkCause, LinkEvent, LinkId, Network, NetworkError, Pulse, SendError};
use crossdock_proto::{Identity, Message};
use crossdock_sim::{CloseCause, SimNet, StreamEvent, StreamId};
use crossdock_transport::{Arm, GrantId};
use parking_lot::Mutex;

use crate::chance::Chance;
use crate::rules::{Rule, Violation};

/// The engine's end of a [`Wire`].
pub struct SimNetwork {
    wire: Arc<Mutex<Wire>>,
    address: String,
}

/// One process's part in the control network. The engine has it as its [`Network`]; the harness lets its heart beat,
/// which goes on while the loop is held up, and stops only with the process.
pub struct Wire {
    net: SimNet,
    next_link: u32,
    streams: BTreeMap<LinkId, StreamId>,
    links: BTreeMap<StreamId, LinkId>,
    closed_here: VecDeque<LinkId>,
    watched: BTreeMap<u32, Watched>,
    listened_ns: u64,
    /// How often the engine has asked when a peer was heard.
    pub looks: u64,
    past: Past,
    /// What peers say is not heard before.
    pub deaf_until_ns: u64,
    /// How many rooms peers have asked for since somebody looked.
    pub asked: usize,
    /// What was given back on each stream, and not granted again since.
    released: BTreeMap<LinkId, BTreeSet<GrantId>>,
    /// The first rule that was broken.
    pub broken: Option<Violation>,
}

struct Watched {
    pulse: Pulse,
    due_ns: u64,
    sent: u64,
    heard: u64,
    heard_ns: u64,
}

/// What peers said of rooms, by their lives: a late frame of an earlier life must not count in the next.
#[derive(Default)]
struct Past {
    is_kept: bool,
    said: BTreeMap<Identity, VecDeque<Vec<u8>>>,
    speaks: BTreeMap<LinkId, Identity>,
    echoes: VecDeque<(LinkId, Vec<u8>)>,
}

impl Wire {
    pub fn new(net: SimNet, keeps_past: bool) -> Self {
        let listened_ns = net.now_ns();
        Self {
            net,
            next_link: 0,
            streams: BTreeMap::new(),
            links: BTreeMap::new(),
            closed_here: VecDeque::new(),
            watched: BTreeMap::new(),
            listened_ns,
            looks: 0,
            past: Past { is_kept: keeps_past, ..Past::default() },
            deaf_until_ns: 0,
            asked: 0,
            released: BTreeMap::new(),
            broken: None,
        }
    }

    /// What the heart's thread does.
    pub fn beat(&mut self, now_ns: u64) {
        for datagram in self.net.datagrams() {
            let Some((token, sequence)) = read_beat(&datagram.bytes) else { continue };
            let expecting = |watched: &&mut Watched| watched.pulse.expect_token == token;
            if let Some(watched) = self.watched.values_mut().find(expecting)
                && sequence > watched.heard
            {
                (watched.heard, watched.heard_ns) = (sequence, now_ns);
            }
        }
        self.listened_ns = now_ns;
        for watched in self.watched.values_mut().filter(|watched| watched.due_ns <= now_ns) {
            watched.sent += 1;
            watched.due_ns = now_ns + watched.pulse.interval_ns;
            let bytes = [watched.pulse.send_token, watched.sent].map(u64::to_le_bytes).concat();
            self.net.datagram(&watched.pulse.peer_address, &bytes);
        }
    }

    /// Lets something that an earlier life of a peer said come again, on the stream of its present life. False:
    /// nobody has such a past.
    pub fn echo(&mut self, chance: &mut Chance) -> bool {
        let mut found = Vec::new();
        for (link, speaks) in &self.past.speaks {
            let earlier = |who: &&Identity| who.node == speaks.node && who.incarnation != speaks.incarnation;
            let said = self.past.said.keys().filter(earlier).flat_map(|who| &self.past.said[who]);
            found.extend(said.map(|frame| (*link, frame)));
        }
        // What begins something does the most harm.
        let begins = |(_, frame): &(LinkId, &Vec<u8>)| {
            matches!(Message::decode(frame), Ok((_, Message::Want { .. } | Message::Grant { .. })))
        };
        if chance.one_in(2) && found.iter().any(begins) {
            found.retain(begins);
        }
        if found.is_empty() {
            return false;
        }
        let (link, frame) = found[chance.below(found.len() as u64) as usize];
        let echo = (link, frame.clone());
        self.past.echoes.push_back(echo);
        true
    }

    /// Whether what peers say waits to be heard later.
    pub fn is_deaf(&self) -> bool {
        self.net.now_ns() < self.deaf_until_ns
    }

    fn note_said(&mut self, link: LinkId, frame: &[u8]) {
        let Ok((_, Message::Release { released, .. })) = Message::decode(frame) else { return };
        let before = self.released.entry(link).or_default();
        for grant in released.into_iter().map(|released| released.grant) {
            if !before.insert(grant) {
                let what = format!("{grant:?} is given back twice");
                self.broken.get_or_insert(Violation { rule: Rule::Releases, what });
            }
        }
    }

    fn note_heard(&mut self, link: LinkId, frame: &[u8]) {
        match Message::decode(frame) {
            Ok((_, Message::Want { .. })) => self.asked += 1,
            Ok((_, Message::Grant { grant, .. } | Message::Regrant { grant, .. })) => {
                self.asked += 1;
                if let Some(released) = self.released.get_mut(&link) {
                    released.remove(&grant);
                }
            }
            _ => {}
        }
    }

    /// Whether an echo waits to be taken.
    pub fn has_news(&self) -> bool {
        !self.past.echoes.is_empty() || !self.closed_here.is_empty()
    }

    fn link(&mut self, stream: StreamId) -> LinkId {
        self.next_link += 1;
        let link = LinkId(self.next_link);
        self.streams.insert(link, stream);
        self.links.insert(stream, link);
        link
    }

    fn unlink(&mut self, link: LinkId) -> Option<StreamId> {
        self.past.speaks.remove(&link);
        self.released.remove(&link);
        let stream = self.streams.remove(&link)?;
        self.links.remove(&stream);
        Some(stream)
    }
}

impl Past {
    fn hear(&mut self, link: LinkId, frame: &[u8]) {
        if !self.is_kept {
            return;
        }
        let Ok((from, message)) = Message::decode(frame) else { return };
        if is_of_rooms(&message) {
            self.speaks.insert(link, from);
            let said = self.said.entry(from).or_default();
            said.push_back(frame.to_vec());
            if said.len() > FRAMES_KEPT {
                said.pop_front();
            }
        }
    }
}

const FRAMES_KEPT: usize = 32;

fn is_of_rooms(message: &Message) -> bool {
    use Message::*;
    matches!(
        message,
        Want { .. }
            | Grant { .. }
            | Regrant { .. }
            | Finish { .. }
            | Delivered { .. }
            | Cancel { .. }
            | Release { .. }
    )
}

fn read_beat(bytes: &[u8]) -> Option<(u64, u64)> {
    let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    Some((word(0)?, word(8)?))
}

impl SimNetwork {
    pub fn new(wire: Arc<Mutex<Wire>>, address: String) -> Self {
        Self { wire, address }
    }
}

impl Network for SimNetwork {
    fn address(&self) -> &str {
        &self.address
    }

    fn dial(&mut self, address: &str) -> Result<LinkId, NetworkError> {
        let mut wire = self.wire.lock();
        let stream = wire.net.dial(address);
        Ok(wire.link(stream))
    }

    fn send(&mut self, link: LinkId, frame: &[u8]) -> Result<(), SendError> {
        let mut wire = self.wire.lock();
        let stream = *wire.streams.get(&link).ok_or(SendError::Closed)?;
        tracing::trace!(by = self.address, ?stream, said = ?Message::decode(frame).map(|(_, said)| said));
        wire.net.send(stream, frame).map_err(|error| match error {
            crossdock_sim::SendError::Full => SendError::Full,
            crossdock_sim::SendError::Closed => SendError::Closed,
        })?;
        wire.note_said(link, frame);
        Ok(())
    }

    fn flush(&mut self) {}

    fn close(&mut self, link: LinkId) {
        let mut wire = self.wire.lock();
        if let Some(stream) = wire.unlink(link) {
            wire.net.close(stream);
            wire.closed_here.push_back(link);
        }
    }

    fn poll(&mut self, take: &mut dyn FnMut(LinkEvent<'_>)) {
        let mut wire = self.wire.lock();
        let wire = &mut *wire;
        while let Some(link) = wire.closed_here.pop_front() {
            take(LinkEvent::Closed { link, cause: LinkCause::ClosedHere });
        }
        while let Some((link, frame)) = wire.past.echoes.pop_front() {
            if wire.streams.contains_key(&link) {
                take(LinkEvent::Frame { link, bytes: &frame });
            }
        }
        if wire.is_deaf() {
            return;
        }
        let events: Vec<StreamEvent> = wire.net.events().collect();
        for event in events {
            match event {
                StreamEvent::Accepted { stream } => {
                    let link = wire.link(stream);
                    take(LinkEvent::Accepted { link });
                }
                StreamEvent::Opened { stream } => {
                    if let Some(&link) = wire.links.get(&stream) {
                        take(LinkEvent::Opened { link });
                    }
                }
                StreamEvent::Frame { stream, bytes } => {
                    if let Some(&link) = wire.links.get(&stream) {
                        wire.past.hear(link, &bytes);
                        wire.note_heard(link, &bytes);
                        take(LinkEvent::Frame { link, bytes: &bytes });
                    }
                }
                StreamEvent::Closed { stream, cause } => {
                    let Some(&link) = wire.links.get(&stream) else { continue };
                    wire.unlink(link);
                    take(LinkEvent::Closed { link, cause: link_cause(cause) });
                }
            }
        }
    }

    fn arm(&mut self) -> Arm<'_> {
        Arm::Spin
    }

    fn pulse_address(&self) -> &str {
        &self.address
    }

    fn watch(&mut self, session: u32, pulse: Pulse) -> Result<(), NetworkError> {
        let mut wire = self.wire.lock();
        let now_ns = wire.net.now_ns();
        let watched = Watched { pulse, due_ns: now_ns, sent: 0, heard: 0, heard_ns: now_ns };
        wire.watched.insert(session, watched);
        Ok(())
    }

    fn unwatch(&mut self, session: u32) {
        self.wire.lock().watched.remove(&session);
    }

    fn heard_ns(&self, session: u32) -> Option<u64> {
        let mut wire = self.wire.lock();
        wire.looks += 1;
        wire.watched.get(&session).map(|watched| watched.heard_ns)
    }

    fn listened_ns(&self) -> u64 {
        self.wire.lock().listened_ns
    }
}

fn link_cause(cause: CloseCause) -> LinkCause {
    match cause {
        CloseCause::ByPeer => LinkCause::ClosedByPeer,
        CloseCause::Reset => LinkCause::Broken { call: "recv", errno: 104 },
        CloseCause::Refused => LinkCause::Broken { call: "connect", errno: 111 },
        CloseCause::TimedOut => LinkCause::ConnectTimedOut,
    }
}
