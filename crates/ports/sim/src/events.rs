//! The queue of what is going to happen, in the order of time.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crossdock_transport::DownCause;

use crate::faults::Fault;
use crate::wire::End;
use crate::world::NodeId;

/// What is going to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Messages of this end have come to the other.
    Wake(End),
    /// A message leaves its sender, and its source is free.
    Leave { from: End, slot: u32, serial: u64 },
    /// A closing end has been drained.
    Drained(End),
    /// An end finds out that it is broken.
    Fails { end: End, cause: DownCause },
    /// An end that is still connecting gives up.
    ConnectTimeout(End),
    /// An end gives up that cannot reach its peer since the given partition began.
    Silence { end: End, partition: u64 },
    /// An end has the proof that its peer's process is dead.
    PeerDied(End),
    /// Frames of a stream have come to their reader: the stream, and which of its ends sends.
    StreamWake { stream: u32, sender: u8 },
    /// A stream's first message comes to the one who is dialled.
    Dialled { stream: u32 },
    /// The dialler hears whether anybody answered.
    Answered { stream: u32 },
    /// An end of a stream finds out that it is broken.
    StreamFails { stream: u32, end: u8 },
    /// An end of a stream that reaches nobody since the given partition began.
    StreamSilence { stream: u32, partition: u64 },
    /// A datagram arrives.
    Datagram { slot: u32 },
    /// A fault that comes by itself.
    Chaos(Fault),
    /// A partition ends by itself.
    Heals(NodeId, NodeId),
    /// A stopped process continues by itself.
    Continues(NodeId),
    /// A slow node recovers by itself.
    Recovers(NodeId),
}

/// The queue. What is due at the same time happens in the order in which it was scheduled.
#[derive(Default)]
pub(crate) struct Agenda {
    heap: BinaryHeap<Entry>,
    serial: u64,
}

struct Entry {
    at_ns: u64,
    serial: u64,
    due: Due,
}

impl Agenda {
    pub fn schedule(&mut self, at_ns: u64, due: Due) {
        self.serial += 1;
        self.heap.push(Entry { at_ns, serial: self.serial, due });
    }

    pub fn next_ns(&self) -> Option<u64> {
        self.heap.peek().map(|entry| entry.at_ns)
    }

    /// What is due by `now_ns`.
    pub fn take(&mut self, now_ns: u64) -> Option<(u64, Due)> {
        if self.next_ns()? > now_ns {
            return None;
        }
        self.heap.pop().map(|entry| (entry.at_ns, entry.due))
    }
}

impl Entry {
    fn key(&self) -> (u64, u64) {
        (self.at_ns, self.serial)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        // The standard heap gives the greatest first; here that is what comes soonest.
        other.key().cmp(&self.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_first_then_the_order_of_scheduling() {
        let node = |at| Due::Continues(NodeId(at));
        let mut agenda = Agenda::default();
        for (at_ns, number) in [(5, 0), (3, 1), (5, 2), (3, 3), (4, 4)] {
            agenda.schedule(at_ns, node(number));
        }
        assert_eq!(agenda.next_ns(), Some(3));
        assert_eq!(agenda.take(2), None);
        let taken: Vec<_> = std::iter::from_fn(|| agenda.take(5)).collect();
        assert_eq!(taken, [(3, node(1)), (3, node(3)), (4, node(4)), (5, node(0)), (5, node(2))]);
    }
}
