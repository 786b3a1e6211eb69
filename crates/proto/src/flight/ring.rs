//! A ring of records.

use super::{Record, RingCopy, RingId, RingPeer};

pub(super) struct Ring {
    pub peer: Option<RingPeer>,
    /// Sessions that record here.
    pub sessions: u32,
    pub last_serial: u64,
    /// As many as it ever holds; the oldest one at `oldest`.
    records: Vec<Record>,
    limit: usize,
    oldest: usize,
    overwritten: u64,
}

impl Ring {
    pub fn new(limit: u32) -> Self {
        let limit = limit as usize;
        let records = Vec::with_capacity(limit);
        Self { peer: None, sessions: 0, last_serial: 0, records, limit, oldest: 0, overwritten: 0 }
    }

    pub fn is_of(&self, node: u64) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.identity.node == node)
    }

    /// Another session with this peer, or the first with another peer.
    pub fn begin(&mut self, peer: RingPeer) {
        if !self.is_of(peer.identity.node) {
            self.records.clear();
            (self.oldest, self.overwritten) = (0, 0);
        }
        self.peer = Some(peer);
        self.sessions += 1;
    }

    pub fn push(&mut self, record: Record) {
        self.last_serial = record.serial;
        if self.records.len() < self.limit {
            self.records.push(record);
            return;
        }
        self.records[self.oldest] = record;
        self.oldest += 1;
        if self.oldest == self.limit {
            self.oldest = 0;
        }
        self.overwritten += 1;
    }

    pub fn copy(&self, ring: RingId) -> RingCopy {
        let (newer, older) = self.records.split_at(self.oldest);
        let records = older.iter().chain(newer).cloned().collect();
        RingCopy { ring, peer: self.peer.clone(), records, overwritten: self.overwritten }
    }
}
