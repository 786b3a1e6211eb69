//! The lanes of each session: how they open, what the peer's regions are called on them, what is granted over them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossdock_proto::{RegionOffer, RoomId, SessionId};
use crossdock_transport::{
    Error, Grant, GrantId, GrantedBuffer, LaneAddress, LaneId, LaneTags, LocalId, Mapping, PeerId, RemoteId,
};

use super::side::{LaneSide, SessionSide};
use super::{Engine, PeerMapping, Rail};

/// What a port can be asked for a transfer on one lane: which regions it knows by which numbers.
#[derive(Clone, Debug)]
pub struct LaneRegions {
    /// Which lane of the session.
    pub slot: u8,
    /// This node's regions on the lane's rail, by announced number.
    pub local: Arc<[LocalId]>,
    /// The peer's regions on the lane, by announced number. Unknown ones are never valid in an op.
    pub remote: Arc<[RemoteId]>,
}

pub(super) struct SessionLanes {
    pub slots: Vec<Lane>,
    pub attach: Option<Attaching>,
    pub peer_node: u64,
    pub side: SessionSide,
}

pub(super) struct Lane {
    pub rail: usize,
    pub id: Option<LaneId>,
    pub state: LaneState,
    /// By the peer's region numbers.
    pub remote: Arc<[RemoteId]>,
    /// Bytes given to this lane, divided by what it carries: the lane that is behind is next.
    pub load: f64,
    /// The port took less than offered in this turn.
    pub full: bool,
    pub side: LaneSide,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum LaneState {
    Opening,
    Up,
    Down,
}

pub(super) struct Attaching {
    pub regions: Vec<RegionOffer>,
    pub peer_rails: Vec<u8>,
    pub found: Vec<BTreeMap<u32, RemoteId>>,
}

impl Engine {
    pub(super) fn open_lane(
        &mut self,
        session: SessionId,
        slot: u8,
        rail: usize,
    ) -> Result<LaneAddress, Error> {
        let peer_node = self.proto.peer(session).map_or(0, |(identity, _)| identity.node);
        let lanes = self.sessions.entry(session).or_insert_with(|| SessionLanes {
            slots: Vec::new(),
            attach: None,
            peer_node,
            side: SessionSide::new(),
        });
        while lanes.slots.len() <= usize::from(slot) {
            lanes.slots.push(Lane {
                rail,
                id: None,
                state: LaneState::Opening,
                remote: Arc::new([]),
                load: 0.0,
                full: false,
                side: LaneSide::default(),
            });
        }
        let entry = &mut self.rails[rail];
        let (id, address) = entry.port.open_lane(PeerId(session.0))?;
        entry.lanes.insert(id, (session, slot));
        let lane = &mut lanes.slots[usize::from(slot)];
        lane.rail = rail;
        lane.id = Some(id);
        Ok(address)
    }

    pub(super) fn connect_lane(
        &mut self,
        now_ns: u64,
        session: SessionId,
        slot: u8,
        address: &LaneAddress,
        tags: &LaneTags,
    ) {
        let Some((rail, Some(id))) = self.slot(session, slot).map(|lane| (lane.rail, lane.id)) else {
            return;
        };
        if let Err(error) = self.rails[rail].port.connect(id, address, tags) {
            // The lane still says `Down`, once it is closed.
            self.rails[rail].port.close(id);
            self.proto.attached(now_ns, session, Err(error));
        }
    }

    /// Attaches what the peer announced, as far as its ports' own announcements have come.
    pub(super) fn attach_again(&mut self, now_ns: u64) {
        for id in std::mem::take(&mut self.attaching) {
            self.attach(now_ns, id);
        }
    }

    pub(super) fn attach(&mut self, now_ns: u64, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(mut attaching) = session.attach.take() else { return };
        let mut mapped = |region, mapping| {
            if self.options.keep_mappings {
                self.mappings.push_back(PeerMapping { session: id, region, mapping });
            }
        };
        match attach(&mut self.rails, session, &mut attaching, &mut mapped) {
            Ok(()) => self.proto.attached(now_ns, id, Ok(())),
            Err(Error::NotYet) => {
                session.attach = Some(attaching);
                self.attaching.insert(id);
            }
            Err(error) => self.proto.attached(now_ns, id, Err(error)),
        }
    }

    pub(super) fn rails_of(&self, session: SessionId) -> Vec<usize> {
        let mut rails: Vec<usize> = self
            .sessions
            .get(&session)
            .map(|s| s.slots.iter().map(|lane| lane.rail).collect())
            .unwrap_or_default();
        rails.sort_unstable();
        rails.dedup();
        rails
    }

    /// The node at the other end of a session.
    pub fn peer_node(&self, session: SessionId) -> Option<u64> {
        self.sessions.get(&session).map(|session| session.peer_node)
    }

    pub(super) fn grant(&mut self, now_ns: u64, session: SessionId, grant: GrantId, room: RoomId) {
        let mut refused = None;
        for at in self.rails_of(session) {
            let Some((access, pages, buffers)) = self.proto.granted(room) else { return };
            let rail = &mut self.rails[at];
            let buffers: Vec<GrantedBuffer> = buffers
                .iter()
                .map(|buffer| GrantedBuffer {
                    region: rail.regions.get(buffer.region as usize).copied().unwrap_or(LocalId(u32::MAX)),
                    layout: buffer.layout,
                })
                .collect();
            let asked = Grant { id: grant, peer: PeerId(session.0), access, buffers: &buffers, pages };
            refused = refused.or(rail.port.grant(&asked).err());
        }
        if let Some(error) = refused {
            self.proto.room_failed(now_ns, room, error);
        }
    }
}

fn attach(
    rails: &mut [Rail],
    session: &mut SessionLanes,
    attaching: &mut Attaching,
    mapped: &mut impl FnMut(u32, Mapping),
) -> Result<(), Error> {
    for (slot, lane) in session.slots.iter_mut().enumerate() {
        let (Some(id), LaneState::Up) = (lane.id, lane.state) else { continue };
        let peer_rail = attaching.peer_rails.get(slot).copied().unwrap_or(0);
        let port = &mut rails[lane.rail].port;
        for offer in &attaching.regions {
            let Some((_, key)) = offer.keys.iter().find(|(rail, _)| *rail == peer_rail) else { continue };
            if attaching.found[slot].contains_key(&offer.region) {
                continue;
            }
            match port.attach(id, key) {
                Ok(attached) => {
                    attaching.found[slot].insert(offer.region, attached.id);
                    attached.mapping.into_iter().for_each(|mapping| mapped(offer.region, mapping));
                }
                // The lane ends; its `Down` says the rest. Until then nothing is posted on it, where the regions
                // are not known.
                Err(Error::LaneDown { .. } | Error::LaneNotUp { .. }) => {
                    lane.state = LaneState::Down;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    for (lane, found) in session.slots.iter_mut().zip(&attaching.found) {
        let regions = found.keys().next_back().map_or(0, |last| last + 1);
        lane.remote = (0..regions).map(|r| found.get(&r).copied().unwrap_or(RemoteId(u32::MAX))).collect();
    }
    Ok(())
}
