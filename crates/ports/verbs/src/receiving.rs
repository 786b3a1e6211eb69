//! The receives that all lanes of a port share.

use std::sync::Arc;

use crossdock_transport::Result;

use crate::ibverbs::objects::{
    MemoryRegion, ProtectionDomain, RECEIVE_BYTES, RESTOCKED_MAX, SharedReceiveQueue,
};

/// A shared receive queue that never runs out, as long as peers keep to their credits: each lane that is open has
/// brought as many receives as its peer may use at a time.
pub(crate) struct Receives {
    queue: SharedReceiveQueue,
    each_lane: u32,
    lanes: u32,
    /// Receives that are posted, or about to be.
    stocked: u32,
    /// How many buffers there are.
    most: u32,
    /// Buffers to be posted.
    waiting: Vec<u32>,
}

impl Receives {
    /// How many receives a lane needs whose peer may have so many immediates on their way.
    pub fn of_lane(immediates: u32) -> u32 {
        immediates + WORDS
    }

    pub fn new(
        protection: &Arc<ProtectionDomain>,
        most: u32,
        each_lane: u32,
        memory: impl Fn(usize) -> Result<MemoryRegion>,
    ) -> Result<Self> {
        let buffers = memory(most as usize * RECEIVE_BYTES)?;
        let queue = SharedReceiveQueue::new(protection, most, buffers)?;
        let waiting = Vec::with_capacity(most as usize);
        Ok(Self { queue, each_lane, lanes: 0, stocked: 0, most, waiting })
    }

    pub fn queue(&self) -> &SharedReceiveQueue {
        &self.queue
    }

    /// A lane more has to be served.
    pub fn lane_opened(&mut self) {
        self.lanes += 1;
        let wanted = (self.lanes * self.each_lane).min(self.most);
        // What earlier lanes have brought is there still.
        if self.stocked < wanted {
            self.waiting.extend(self.stocked..wanted);
            self.stocked = wanted;
        }
        self.restock();
    }

    pub fn lane_ended(&mut self) {
        self.lanes -= 1;
    }

    /// What a buffer held was taken.
    pub fn give_back(&mut self, buffer: u32) {
        if buffer < self.stocked && self.waiting.len() < self.most as usize {
            self.waiting.push(buffer);
        }
    }

    /// Posts what was given back; whether all of it is there now. What the device does not take is offered again, and
    /// until then no peer may be told that there is room.
    pub fn restock(&mut self) -> bool {
        while !self.waiting.is_empty() {
            let from = self.waiting.len().saturating_sub(RESTOCKED_MAX);
            let taken = match self.queue.post(&self.waiting[from..]) {
                Ok(()) => self.waiting.len() - from,
                Err((taken, _)) => taken,
            };
            self.waiting.drain(from..from + taken);
            if self.waiting.len() > from {
                return false;
            }
        }
        true
    }

    pub fn read(&self, buffer: u32, into: &mut [u8]) {
        self.queue.read(buffer, into);
    }
}

/// What a peer may send beside immediates before anything of it is heard: a hello, a bye, and credits twice, since each
/// gives at least half of what it may hold.
const WORDS: u32 = 4;
