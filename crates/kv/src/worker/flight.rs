//! The flight recorder's place in the progress loop: how far a room's bytes are, and copies for those who read them.

use std::collections::VecDeque;
use std::time::Duration;

use crossdock_engine::{Engine, Promise, now_ns};
use crossdock_flight::{Clocks, Dump, Folder};
use crossdock_proto::RoomId;
use crossdock_proto::flight::{FlightTag, Reason, Recorder, Snapshot, What};

use super::Worker;
use super::posting::Run;
use super::room::Kind;
use crate::Plan;

/// Who waits for copies of the rings.
#[derive(Default)]
pub(super) struct FlightDesk {
    /// Writes down what goes wrong.
    folder: Option<Folder>,
    /// Those who have asked, the first one first.
    asked: VecDeque<Promise<Dump>>,
    /// What has been copied for the first of them.
    copied: Option<Snapshot>,
}

/// What is recorded of a run, and what was.
pub(super) struct Noted {
    of_bytes: u64,
    layers: u16,
    tag: Option<FlightTag>,
    at_ns: u64,
    bytes: u64,
    is_last: bool,
}

impl Worker {
    /// Lets a dump be written whenever a room fails or a session is lost.
    pub fn dump_into(&mut self, folder: Folder) {
        self.flight.folder = Some(folder);
    }

    pub(super) fn ask_for_dump(&mut self, told: Promise<Dump>) {
        // Dropped, a promise tells whoever waits that it is not kept.
        if self.flight.asked.len() < MOST_ASKED {
            self.flight.asked.push_back(told);
        }
    }

    /// Gives the writer what is due, and whoever asked for all of it a share of the copies. True if there is more.
    pub(super) fn write_down(&mut self, now: u64) -> bool {
        let dumped = self.dump_incident(now);
        if self.flight.asked.is_empty() {
            return dumped;
        }
        let rings = self.engine.proto().recorder().rings() as u32;
        let from = self.flight.copied.as_ref().map_or(0, |copied| copied.rings.len() as u32);
        let to = rings.min(from + RINGS_A_TURN);
        let more = self.engine.proto().snapshot(Reason::Asked, from..to);
        let snapshot = match self.flight.copied.take() {
            Some(mut copied) => {
                copied.rings.extend(more.rings);
                copied
            }
            None => more,
        };
        if to < rings {
            self.flight.copied = Some(snapshot);
        } else if let Some(told) = self.flight.asked.pop_front() {
            self.tell(told, Dump { snapshot, clocks: Clocks::now(now_ns()) });
        }
        true
    }

    /// One a turn: when many peers are lost at once, rooms with others go on meanwhile.
    fn dump_incident(&mut self, now: u64) -> bool {
        let Some(folder) = &self.flight.folder else { return false };
        let proto = self.engine.proto();
        let lost = proto.recorder().take_lost();
        if lost > 0 {
            folder.leave_out(lost);
        }
        if !folder.has_room() {
            return false;
        }
        let incident = proto.recorder().next_incident(now);
        if let Some(incident) = incident {
            folder.put(Dump { snapshot: proto.snapshot_incident(incident), clocks: Clocks::now(now_ns()) });
        }
        incident.is_some()
    }

    /// Records how far a room's bytes were when they stopped.
    pub(super) fn note_stopped(&mut self, now: u64, id: RoomId) {
        let run = match self.rooms.get_mut(&id).map(|room| &mut room.kind) {
            Some(Kind::Sending(sending)) => sending.run.as_mut(),
            Some(Kind::Decode(decode)) => decode.reads.as_mut(),
            Some(Kind::Serving(_)) | None => None,
        };
        if let Some(run) = run {
            run.note(&mut self.engine, now, id, true);
        }
    }

    /// A sleep is not so long that a dump is late.
    pub(super) fn until_dump(&mut self, longest_ns: u64) -> u64 {
        let Some(folder) = &self.flight.folder else { return longest_ns };
        let Some(due_ns) = self.engine.proto().recorder().next_incident_ns() else { return longest_ns };
        // The thread that writes wakes nobody.
        let least_ns = if folder.has_room() { 0 } else { BETWEEN_LOOKS_NS };
        longest_ns.min(due_ns.saturating_sub(now_ns()).max(least_ns))
    }

    /// Nothing more will come of what is still watched. The rings are plain memory: also a panic has left them whole.
    pub(super) fn dump_last(&mut self) {
        let Some(folder) = &self.flight.folder else { return };
        let proto = self.engine.proto();
        let (rings, until_ns) = (proto.recorder().rings() as u32, now_ns() + LAST_DUMPS_NS);
        for reason in last_reasons(proto.recorder(), std::thread::panicking()) {
            while !folder.has_room() && now_ns() < until_ns {
                std::thread::sleep(Duration::from_nanos(BETWEEN_LOOKS_NS));
            }
            let snapshot = match reason {
                Reason::Failed(incident) => proto.snapshot_incident(incident),
                _ => proto.snapshot(reason, 0..rings),
            };
            folder.put(Dump { snapshot, clocks: Clocks::now(now_ns()) });
        }
    }
}

/// What is to be written at the end. The dump of a panic goes first, as a disk that does not keep up loses the last
/// ones: it holds what the others do.
fn last_reasons(recorder: &mut Recorder, is_panicking: bool) -> Vec<Reason> {
    let incidents = std::iter::from_fn(|| recorder.last_incident()).map(Reason::Failed);
    is_panicking.then_some(Reason::Panicked).into_iter().chain(incidents).collect()
}

impl Noted {
    /// Nothing yet, of a run that is planned so.
    pub fn new(plan: &Plan) -> Self {
        let layers = plan.layers().len().try_into().unwrap_or(u16::MAX);
        Self { of_bytes: plan.total_bytes(), layers, tag: None, at_ns: 0, bytes: 0, is_last: false }
    }
}

impl Run {
    /// Records how far the run is: when it begins, now and then, and when it is done or stopped.
    pub fn note(&mut self, engine: &mut Engine, now: u64, id: RoomId, is_stopped: bool) {
        let is_new = self.posted_bytes > self.noted.bytes;
        if self.noted.is_last || !(is_new || is_stopped) || !engine.proto().recorder().is_on() {
            return;
        }
        let Noted { of_bytes, layers, .. } = self.noted;
        let is_last = is_stopped || self.posted_bytes >= of_bytes;
        // A room that is stopped may be over already.
        let Some(tag) = self.noted.tag.or_else(|| engine.proto().flight_tag(id)) else { return };
        if self.noted.bytes == 0 && is_new {
            engine.proto().note(now, tag, What::Posting);
        } else if !is_last && now.saturating_sub(self.noted.at_ns) < BETWEEN_NOTES_NS {
            return;
        }
        let is_begun_only = self.noted.bytes == 0 && !is_last;
        self.noted = Noted { tag: Some(tag), at_ns: now, bytes: self.posted_bytes, is_last, ..self.noted };
        if !is_begun_only {
            let what = What::Posted { bytes: self.posted_bytes, of_bytes, layers, is_last };
            engine.proto().note(now, tag, what);
        }
    }
}

/// A run that takes long is not to push everything else out of its ring.
const BETWEEN_NOTES_NS: u64 = 50_000_000;

/// How long the end of a node waits for a disk that does not keep up.
const LAST_DUMPS_NS: u64 = 1_000_000_000;

/// How soon it is looked again whether another dump can wait.
const BETWEEN_LOOKS_NS: u64 = 5_000_000;

/// What is copied in a turn stays far below a millisecond.
const RINGS_A_TURN: u32 = 8;

/// Copies that may be waited for. They are large.
const MOST_ASKED: usize = 16;

#[cfg(test)]
mod tests {
    use crossdock_proto::flight::{FlightLimits, RingId, RingPeer};
    use crossdock_proto::{Identity, SessionEnd};

    use super::*;

    #[test]
    fn the_dump_of_a_panic_is_the_last_to_be_lost() {
        let mut recorder = Recorder::new(FlightLimits { peers: 20, records: 4 });
        for node in 0..20 {
            let identity = Identity { node, incarnation: 1 };
            let peer = RingPeer { identity, name: "peer".into(), port: "tcp" };
            let ring = recorder.begin(peer);
            assert_ne!(ring, RingId::NODE);
            let cause = Box::new(SessionEnd::Silent { for_ns: 1 });
            recorder.record(ring, 0, None, None, What::SessionDown { cause, rooms: 1, silent_ms: 0 });
        }
        let reasons = last_reasons(&mut recorder, true);
        assert_eq!((reasons[0], reasons.len()), (Reason::Panicked, 21));
        assert_eq!(last_reasons(&mut recorder, true), [Reason::Panicked]);
        assert!(last_reasons(&mut recorder, false).is_empty());
    }
}
