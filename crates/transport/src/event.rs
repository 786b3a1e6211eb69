//! What a port reports, in a buffer of fixed size.

use crate::{DownCause, LaneId, Token};

/// Something that happened at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The lane is connected: ops may be posted, keys attached.
    Up {
        /// Which lane.
        lane: LaneId,
    },
    /// The op with this token, and every earlier op of the lane, is done: the local memory of its writes may be
    /// changed, and the bytes of its reads have arrived.
    Done {
        /// On which lane.
        lane: LaneId,
        /// The token that the op carried.
        token: Token,
    },
    /// The peer sent an immediate. On an [ordered](crate::PortInfo::ordered) port the bytes of every earlier
    /// write of that lane are readable by this process's CPU.
    Arrived {
        /// On which lane.
        lane: LaneId,
        /// The immediate, as it was posted.
        imm: u32,
    },
    /// The lane has ended, and **touches this process's memory no more**: neither by writes of the peer nor by
    /// reads or writes posted here. (But for memory of which `revoke` answers [`Fence::Never`](crate::Fence::Never),
    /// when the peer took no part in the end.) Said exactly once for each lane; nothing is said of it afterwards.
    Down {
        /// Which lane.
        lane: LaneId,
        /// Why.
        cause: DownCause,
    },
}

/// A buffer of events with a fixed capacity. A port stops polling when it is full.
#[derive(Debug)]
pub struct Events {
    buffer: Vec<Event>,
    capacity: usize,
}

impl Events {
    /// Makes a buffer for up to `capacity` events; at least one.
    pub fn with_capacity(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self { buffer: Vec::with_capacity(capacity), capacity }
    }

    /// Adds an event. The caller has asked [`room`](Events::room) before.
    pub fn push(&mut self, event: Event) {
        assert!(self.buffer.len() < self.capacity, "a port pushed more events than there was room for");
        self.buffer.push(event);
    }

    /// How many more events fit.
    pub fn room(&self) -> usize {
        self.capacity - self.buffer.len()
    }

    /// Whether nothing more fits.
    pub fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// How many events are in it.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// The events, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Event> {
        self.buffer.iter()
    }

    /// Takes all events out, oldest first.
    pub fn drain(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.buffer.drain(..)
    }

    /// Forgets all events.
    pub fn clear(&mut self) {
        self.buffer.clear();
    }
}
