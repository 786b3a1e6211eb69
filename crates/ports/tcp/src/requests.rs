//! Reads that wait: for a reply on the side that asked, for the socket on the side that was asked.

use crossdock_memory::Memory;
use crossdock_transport::{GrantId, LocalId};

use crate::frame::FRAME_PAGES_MAX;
use crate::vectored::Places;

/// How many read requests of one lane wait in each direction. Each end tells the other its number in the greeting,
/// and the other never asks for more: so requests can always be taken in, and two ends that read from each other
/// never wait for each other.
pub(crate) const REQUESTS_MAX: u32 = 32;

/// A queue of requests with their lists, first in, first out. Allocated once.
pub(crate) struct Requests {
    slots: Box<[Request]>,
    first: usize,
    count: usize,
}

/// One request: pieces of local memory, to be filled or to be sent.
pub(crate) struct Request {
    /// `None` in a slot that waits for nothing.
    memory: Option<Memory>,
    pub region: LocalId,
    /// By which grant the peer reads; [`GrantId::NONE`] on the side that asked.
    pub grant: GrantId,
    pub number: u32,
    offset: u64,
    stride_bytes: u64,
    piece_bytes: u64,
    pages: Box<[u32; FRAME_PAGES_MAX]>,
    pages_len: usize,
}

impl Requests {
    pub fn new() -> Self {
        let slot = |_| Request {
            memory: None,
            region: LocalId(0),
            grant: GrantId::NONE,
            number: 0,
            offset: 0,
            stride_bytes: 0,
            piece_bytes: 0,
            pages: Box::new([0; FRAME_PAGES_MAX]),
            pages_len: 0,
        };
        Self { slots: (0..REQUESTS_MAX).map(slot).collect(), first: 0, count: 0 }
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn is_full(&self) -> bool {
        self.count == self.slots.len()
    }

    /// Adds a request. The caller has asked whether the queue is full.
    pub fn push(
        &mut self,
        memory: &Memory,
        region: LocalId,
        grant: GrantId,
        number: u32,
        places: Places<'_>,
    ) {
        assert!(!self.is_full(), "a request was added to a full queue");
        let next = (self.first + self.count) % self.slots.len();
        self.count += 1;
        let slot = &mut self.slots[next];
        slot.memory = Some(memory.clone());
        (slot.region, slot.grant, slot.number) = (region, grant, number);
        (slot.offset, slot.stride_bytes, slot.piece_bytes) =
            (places.offset, places.stride_bytes, places.piece_bytes);
        slot.pages[..places.pages.len()].copy_from_slice(places.pages);
        slot.pages_len = places.pages.len();
    }

    pub fn front(&self) -> Option<&Request> {
        (self.count > 0).then(|| &self.slots[self.first])
    }

    pub fn pop(&mut self) {
        assert!(self.count > 0, "a request was taken from an empty queue");
        self.slots[self.first].memory = None;
        self.first = (self.first + 1) % self.slots.len();
        self.count -= 1;
    }

    pub fn clear(&mut self) {
        while self.count > 0 {
            self.pop();
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Request> {
        (0..self.count).map(|i| &self.slots[(self.first + i) % self.slots.len()])
    }
}

impl Request {
    pub fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("a waiting request keeps its memory")
    }

    pub fn places(&self) -> Places<'_> {
        Places {
            offset: self.offset,
            stride_bytes: self.stride_bytes,
            piece_bytes: self.piece_bytes,
            pages: &self.pages[..self.pages_len],
        }
    }
}
