//! The simulated port.

use std::fmt;
use std::sync::Arc;

use crossdock_memory::Memory;
use crossdock_transport::{
    Attached, DownCause, Error, Event, Events, Fence, Grant, GrantId, LaneAddress, LaneId, LaneTags, LocalId,
    Op, PeerId, Port, PortInfo, Posted, RemoteId, RemoteKey, Result, require_host_memory,
};
use parking_lot::Mutex;

use crate::address::{self, Key};
use crate::lane::{Attachment, Lane, State};
use crate::options::Semantics;
use crate::wire::End;
use crate::world::{Life, NodeId, PortId, Region, World};

/// A port of a [`Fabric`](crate::Fabric). Dropping it closes its lanes, as the end of a process does in good order.
pub struct SimPort {
    world: Arc<Mutex<World>>,
    id: u32,
    node: NodeId,
    info: PortInfo,
}

impl SimPort {
    pub(crate) fn new(world: Arc<Mutex<World>>, id: u32) -> Self {
        let guard = world.lock();
        let port = guard.port_at(id);
        let options = &port.options;
        let order = if options.unordered { ", unordered" } else { "" };
        let info = PortInfo {
            kind: "sim",
            name: options.name.clone(),
            reach: format!("{}{order}", options.semantics.name()),
            numa_node: None,
            bytes_per_second: options.bytes_per_second,
            ordered: !options.unordered,
            immediates_in_flight: options.immediates_in_flight,
        };
        let node = port.node;
        drop(guard);
        Self { world, id, node, info }
    }

    /// Its name within the fabric.
    pub fn id(&self) -> PortId {
        PortId(self.id)
    }

    /// The node on which it is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    fn end(&self, lane: LaneId) -> End {
        End { port: self.id, lane }
    }
}

impl Port for SimPort {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        require_host_memory(memory)?;
        let mut world = self.world.lock();
        let regions = &mut world.ports[self.id as usize].regions;
        let region = LocalId(regions.len() as u32);
        regions.push(Some(Region { memory: memory.clone(), parts_in_flight: 0 }));
        Ok((region, address::key(Key { port: self.id, region, bytes: memory.bytes() as u64 })))
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        let mut world = self.world.lock();
        let port = &mut world.ports[self.id as usize];
        let slot = port.regions.get_mut(region.0 as usize);
        let unknown = Error::UnknownRegion { side: "local", region: region.0 };
        let slot = slot.filter(|slot| slot.is_some()).ok_or(unknown)?;
        if port.grants.uses(region) {
            return Err(Error::RegionInUse { by: "a grant" });
        }
        if slot.as_ref().is_some_and(|region| region.parts_in_flight > 0) {
            return Err(Error::RegionInUse { by: "an op" });
        }
        *slot = None;
        Ok(())
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        let mut world = self.world.lock();
        let fabric = world.fabric;
        let port = &mut world.ports[self.id as usize];
        let limit = port.options.lanes;
        if port.lanes.len() >= limit as usize {
            return Err(Error::Limit { what: "lanes of a port", limit: limit.into() });
        }
        let lane = LaneId(port.lanes.len() as u32);
        port.lanes.push(Lane::new(peer));
        Ok((lane, address::address(fabric, self.end(lane))))
    }

    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        let mut world = self.world.lock();
        let end = self.end(lane);
        world.known_lane(end)?;
        let remote = address::read_address(world.fabric, remote)?;
        world.connect(end, remote, tags)
    }

    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached> {
        let mut world = self.world.lock();
        let world = &mut *world;
        let end = self.end(lane);
        world.known_lane(end)?.require_up(end)?;
        let Key { port, region, bytes } = address::read_key(key)?;
        if world.lane(end).remote.is_none_or(|remote| remote.port != port) {
            return Err(Error::BadKey { reason: "of another port than the one at the other end" });
        }
        // From a process that is no more nothing comes, until the lane says so.
        if world.port_at(port).life != Life::Alive {
            return Err(Error::NotYet);
        }
        let memory = world.region(port, region).map(|region| region.memory.clone());
        let memory = memory.ok_or(Error::UnknownRegion { side: "remote", region: region.0 })?;
        if world.rng.happens(world.options.not_yet) {
            return Err(Error::NotYet);
        }
        let mapped = world.port_at(self.id).options.semantics.is_mapped().then_some(memory);
        let attachments = &mut world.lane_mut(end).attachments;
        let known = attachments.iter().position(|attachment| attachment.region == region);
        let at = known.unwrap_or_else(|| {
            attachments.push(Attachment { region, bytes, mapped });
            attachments.len() - 1
        });
        Ok(Attached { id: RemoteId(at as u32), bytes, mapping: None })
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        let mut world = self.world.lock();
        let port = &mut world.ports[self.id as usize];
        let regions = &port.regions;
        let bytes = |id: LocalId| Some(regions.get(id.0 as usize)?.as_ref()?.memory.bytes() as u64);
        port.grants.insert(grant, bytes)
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        let mut world = self.world.lock();
        let port = &mut world.ports[self.id as usize];
        if !port.grants.remove(grant) {
            return Fence::Now;
        }
        match port.options.semantics {
            Semantics::Checked => Fence::Now,
            Semantics::Verbs | Semantics::Mapped => Fence::WhenDown,
            Semantics::Fabric => Fence::Never,
        }
    }

    fn close(&mut self, lane: LaneId) {
        let mut world = self.world.lock();
        let end = self.end(lane);
        if world.known_lane(end).is_ok_and(|lane| lane.state != State::Down) {
            world.begin_close(end, DownCause::ClosedHere, false);
        }
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        self.world.lock().post(self.end(lane), ops)
    }

    fn poll(&mut self, events: &mut Events) {
        let mut world = self.world.lock();
        let world = &mut *world;
        let waiting = world.port_at(self.id).events.len().min(events.room());
        let short = waiting > 0 && world.rng.happens(world.options.short_poll);
        let count = if short { world.rng.below(waiting as u64) as usize } else { waiting };
        for _ in 0..count {
            let port = &mut world.ports[self.id as usize];
            let event = port.events.pop_front().expect("counted before");
            if let Event::Arrived { lane, .. } = event
                && let Some(sender) = port.lanes[lane.0 as usize].remote
            {
                let sender = world.lane_mut(sender);
                sender.immediates_in_flight = sender.immediates_in_flight.saturating_sub(1);
            }
            events.push(event);
        }
    }
}

impl fmt::Debug for SimPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimPort").field("id", &self.id).field("info", &self.info).finish_non_exhaustive()
    }
}

impl Drop for SimPort {
    fn drop(&mut self) {
        self.world.lock().drop_port(self.id);
    }
}
