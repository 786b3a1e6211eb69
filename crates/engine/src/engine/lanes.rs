//! The lanes of each session: how they open, what the peer's regions are called on them, what is granted over them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{RegionOffer, RoomId, SessionId};
use crossdock_transport::{
    Error, Grant, GrantId, GrantedBuffer, LaneAddress, LaneId, LaneTags, LocalId, Mapping, PeerId, Port,
    RemoteId,
};

use super::side::{LaneSide, SessionSide};
use super::{Engine, PeerMapping};

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
    pub peer_node: u64,
    pub side: SessionSide,
}

pub(super) struct Lane {
    pub rail: usize,
    pub id: Option<LaneId>,
    pub state: LaneState,
    /// What of the peer's is still to be attached.
    pub attach: Option<Attaching>,
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
    /// Nothing is posted on it yet.
    Opening,
    /// Both ends are ready.
    Up,
    Down,
}

pub(super) struct Attaching {
    pub regions: Arc<[RegionOffer]>,
    pub peer_rail: u8,
    pub found: BTreeMap<u32, RemoteId>,
}

impl Lane {
    fn new(rail: usize) -> Self {
        Self {
            rail,
            id: None,
            state: LaneState::Opening,
            attach: None,
            remote: Arc::new([]),
            load: 0.0,
            full: false,
            side: LaneSide::default(),
        }
    }
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
            peer_node,
            side: SessionSide::new(),
        });
        while lanes.slots.len() <= usize::from(slot) {
            lanes.slots.push(Lane::new(rail));
        }
        let entry = &mut self.rails[rail];
        let (id, address) = entry.port.open_lane(PeerId(session.0))?;
        entry.lanes.insert(id, (session, slot));
        // A lane that comes back begins where the others are: it has not to make up for what it did not carry.
        let loads = lanes.slots.iter().filter(|lane| lane.state == LaneState::Up).map(|lane| lane.load);
        let load = loads.reduce(f64::min).unwrap_or(0.0);
        lanes.slots[usize::from(slot)] = Lane { id: Some(id), load, ..Lane::new(rail) };
        if !is_planted(Planted::LostLanesRemembered) {
            self.transfers.forget_lane(session, slot);
        }
        Ok(address)
    }

    /// Both ends of a lane are ready.
    pub(super) fn use_lane(&mut self, session: SessionId, slot: u8) {
        if let Some(lane) = self.slot(session, slot)
            && lane.state == LaneState::Opening
        {
            lane.state = LaneState::Up;
        }
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
            self.proto.lane_attached(now_ns, session, slot, Err(error));
        }
    }

    /// Attaches what the peer announced, as far as its ports' own announcements have come.
    pub(super) fn attach_again(&mut self, now_ns: u64) {
        for (session, slot) in std::mem::take(&mut self.attaching) {
            self.attach(now_ns, session, slot);
        }
    }

    pub(super) fn attach(&mut self, now_ns: u64, session: SessionId, slot: u8) {
        // What is mapped is told before the session is up, or not at all.
        let keeps = self.options.keep_mappings && !self.proto.is_live(session);
        let Some(lanes) = self.sessions.get_mut(&session) else { return };
        let Some(lane) = lanes.slots.get_mut(usize::from(slot)) else { return };
        let (Some(id), Some(mut attaching)) = (lane.id, lane.attach.take()) else { return };
        let mut mapped = |region, mapping| {
            if keeps {
                self.mappings.push_back(PeerMapping { session, region, mapping });
            }
        };
        let attached = attach(&mut *self.rails[lane.rail].port, id, &mut attaching, &mut mapped);
        let found = &attaching.found;
        let regions = found.keys().next_back().map_or(0, |last| last + 1);
        lane.remote = (0..regions).map(|r| found.get(&r).copied().unwrap_or(RemoteId(u32::MAX))).collect();
        if attached == Err(Error::NotYet) {
            lane.attach = Some(attaching);
            self.attaching.insert((session, slot));
            return;
        }
        self.proto.lane_attached(now_ns, session, slot, attached);
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

/// Attaches what is not attached yet of a peer's regions.
fn attach(
    port: &mut dyn Port,
    lane: LaneId,
    attaching: &mut Attaching,
    mapped: &mut impl FnMut(u32, Mapping),
) -> Result<(), Error> {
    for offer in attaching.regions.iter() {
        let Some((_, key)) = offer.keys.iter().find(|(rail, _)| *rail == attaching.peer_rail) else {
            continue;
        };
        if let Entry::Vacant(place) = attaching.found.entry(offer.region) {
            let attached = port.attach(lane, key)?;
            place.insert(attached.id);
            attached.mapping.into_iter().for_each(|mapping| mapped(offer.region, mapping));
        }
    }
    Ok(())
}
