//! A simulated port with somebody who looks over its shoulder.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crossdock_memory::Memory;
use crossdock_sim::SimPort;
use crossdock_transport::{
    Access, Attached, DownCause, Event, Events, Fence, Grant, GrantId, LaneAddress, LaneId, LaneTags,
    LocalId, Op, PeerId, Port, PortInfo, Posted, RemoteKey, Result, Token,
};
use parking_lot::Mutex;

use crate::ledger::Ledger;
use crate::rules::{Rule, Violation};

/// A port whose posts, events and grants are watched.
pub struct WatchedPort {
    port: SimPort,
    watch: Arc<Mutex<Watch>>,
}

/// What was seen at one process's ports.
pub struct Watch {
    lanes: BTreeMap<(u32, LaneId), Lane>,
    pub ledger: Ledger,
    /// What was granted since somebody looked.
    pub granted: BTreeSet<GrantId>,
    /// The first rule that was broken.
    pub broken: Option<Violation>,
}

#[derive(Default)]
struct Lane {
    /// Accepted, and not ended.
    tokens: VecDeque<Token>,
    is_down: bool,
}

impl Watch {
    pub fn new(ledger: Ledger) -> Self {
        Self { lanes: BTreeMap::new(), ledger, granted: BTreeSet::new(), broken: None }
    }

    fn breaks(&mut self, rule: Rule, what: String) {
        self.broken.get_or_insert(Violation { rule, what });
    }

    fn hear(&mut self, port: u32, event: &Event) {
        let (Event::Up { lane }
        | Event::Done { lane, .. }
        | Event::Arrived { lane, .. }
        | Event::Down { lane, .. }) = *event;
        let seen = self.lanes.entry((port, lane)).or_default();
        if seen.is_down {
            return self.breaks(Rule::Tokens, format!("{event:?} after the lane's Down"));
        }
        match *event {
            Event::Done { token, .. } => {
                let expected = seen.tokens.pop_front();
                if expected != Some(token) {
                    self.breaks(Rule::Tokens, format!("{event:?}, where {expected:?} is the oldest"));
                }
            }
            Event::Down { cause, .. } => {
                seen.is_down = true;
                seen.tokens.clear();
                if let DownCause::PeerMisbehaved { .. } | DownCause::NotAuthentic = cause {
                    self.breaks(Rule::Accused, format!("lane {}: {cause}", lane.0));
                }
            }
            Event::Up { .. } | Event::Arrived { .. } => {}
        }
    }
}

impl WatchedPort {
    pub fn new(port: SimPort, watch: Arc<Mutex<Watch>>) -> Self {
        Self { port, watch }
    }
}

impl Port for WatchedPort {
    fn info(&self) -> &PortInfo {
        self.port.info()
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        self.port.register(memory)
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        self.port.deregister(region)
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        self.port.open_lane(peer)
    }

    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        self.port.connect(lane, remote, tags)
    }

    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached> {
        self.port.attach(lane, key)
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        self.port.grant(grant)?;
        let mut watch = self.watch.lock();
        watch.granted.insert(grant.id);
        if grant.access == Access::Write {
            watch.ledger.note_grant(grant.pages, grant.peer, grant.id);
        }
        Ok(())
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        self.port.revoke(grant)
    }

    fn close(&mut self, lane: LaneId) {
        self.port.close(lane);
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        let posted = self.port.post(lane, ops)?;
        let tokens = ops[..posted.ops].iter().filter_map(|op| op.token);
        let mut watch = self.watch.lock();
        watch.lanes.entry((self.port.id().0, lane)).or_default().tokens.extend(tokens);
        Ok(posted)
    }

    fn poll(&mut self, events: &mut Events) {
        let before = events.len();
        self.port.poll(events);
        let mut watch = self.watch.lock();
        for event in events.iter().skip(before) {
            watch.hear(self.port.id().0, event);
        }
    }
}
