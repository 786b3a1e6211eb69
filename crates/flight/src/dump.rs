//! A dump: what a node's rings held, with its two clocks, and as text.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use crossdock_proto::TargetId;
use crossdock_proto::flight::{Reason, Snapshot};

use crate::event::{Event, Header, LONGEST_NAME, Line, Peer, Ring, VERSION, cut, hex};

/// The same moment on the clock of the records and on the wall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// As the node's turns are given it.
    pub monotonic_ns: u64,
    /// Since 1970.
    pub unix_ns: u64,
}

impl Clocks {
    /// This moment, which is `monotonic_ns` on the clock of the node.
    pub fn now(monotonic_ns: u64) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { monotonic_ns, unix_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX) }
    }
}

/// What a node's flight recorder held at one moment.
#[derive(Clone, Debug)]
pub struct Dump {
    /// The rings.
    pub snapshot: Snapshot,
    /// When it was taken.
    pub clocks: Clocks,
}

impl Dump {
    /// Writes it as JSON lines.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let Snapshot { rings, targets, .. } = &self.snapshot;
        let address = |target: TargetId| {
            targets.iter().find(|(id, _)| *id == target).map(|(_, address)| address.clone())
        };
        line(to, &Line::Header(self.header()))?;
        let mut events = 0;
        for ring in rings {
            let peer = ring.peer.as_ref().map(|peer| Peer {
                name: cut(&peer.name, LONGEST_NAME),
                node: hex(peer.identity.node),
                incarnation: hex(peer.identity.incarnation),
                port: peer.port.into(),
            });
            line(to, &Line::Ring(Ring { ring: ring.ring.0, peer, overwritten: ring.overwritten }))?;
            for record in &ring.records {
                line(to, &Line::Event(Box::new(Event::of(record, address))))?;
                events += 1;
            }
        }
        line(to, &Line::End { events })
    }

    /// As JSON lines.
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        self.write(&mut text).expect("memory takes everything");
        text
    }

    fn header(&self) -> Header {
        let Snapshot { identity, name, reason, .. } = &self.snapshot;
        let (reason, room) = match reason {
            Reason::Asked => ("asked", None),
            Reason::Panicked => ("panicked", None),
            Reason::Failed(incident) if incident.room.is_some() => ("room-failed", incident.room),
            Reason::Failed(_) => ("session-lost", None),
        };
        Header {
            version: VERSION,
            software: concat!("crossdock ", env!("CARGO_PKG_VERSION")).into(),
            name: cut(name, LONGEST_NAME),
            node: hex(identity.node),
            incarnation: hex(identity.incarnation),
            reason: reason.into(),
            room: room.map(|name| name.room),
            use_count: room.map(|name| name.use_count),
            share: room.map(|name| name.share).filter(|&share| share > 0),
            monotonic_ns: self.clocks.monotonic_ns,
            unix_ns: self.clocks.unix_ns,
        }
    }
}

fn line(to: &mut impl Write, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *to, line)?;
    to.write_all(b"\n")
}
