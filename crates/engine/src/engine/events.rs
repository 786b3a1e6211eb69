//! What comes in, from links and ports, told to the protocol.

use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{LinkId as ProtoLink, SessionId};
use crossdock_transport::Event;

use super::Engine;
use super::lanes::{Lane, LaneState};
use crate::imm::{Imm, Kind};
use crate::network::LinkEvent;
use crate::transfer::{LaneUse, TransferId};

impl Engine {
    /// The part of a [`turn`](Engine::turn) that takes what came from the network. True if there was anything.
    pub fn turn_links(&mut self, now_ns: u64) -> bool {
        let mut active = false;
        let (proto, backlog) = (&mut self.proto, &mut self.backlog);
        self.network.poll(&mut |event| {
            active = true;
            match event {
                LinkEvent::Accepted { link } => proto.link_accepted(now_ns, ProtoLink(link.0)),
                LinkEvent::Opened { link } => proto.link_opened(now_ns, ProtoLink(link.0)),
                LinkEvent::Frame { link, bytes } => proto.frame(now_ns, ProtoLink(link.0), bytes),
                LinkEvent::Closed { link, cause } => {
                    backlog.remove(&ProtoLink(link.0));
                    proto.link_closed(now_ns, ProtoLink(link.0), cause);
                }
            }
        });
        active
    }

    pub(super) fn take_events(&mut self, now_ns: u64) -> bool {
        let mut active = false;
        for at in 0..self.rails.len() {
            let rail = &mut self.rails[at];
            let Some(events) = &mut self.events else { continue };
            rail.port.poll(events);
            if events.is_empty() {
                continue;
            }
            active = true;
            // Taken out for the time of the loop, since every event may change anything else.
            if let Some(mut events) = self.events.take() {
                for event in events.drain() {
                    self.take_event(now_ns, at, event);
                }
                self.events = Some(events);
            }
        }
        // A lane that was full may take more now; and a transfer that could not cover its ops tries again.
        while let Some((session, slot)) = self.full.pop() {
            if let Some(lane) = self.slot(session, slot) {
                lane.full = false;
            }
        }
        while let Some(id) = self.transfers.next_retry() {
            self.advance(now_ns, id);
        }
        self.transfers.end_retries();
        active
    }

    fn take_event(&mut self, now_ns: u64, rail: usize, event: Event) {
        let (Event::Up { lane }
        | Event::Done { lane, .. }
        | Event::Arrived { lane, .. }
        | Event::Down { lane, .. }) = event;
        let Some(&(session, slot)) = self.rails[rail].lanes.get(&lane) else { return };
        match event {
            Event::Arrived { imm, .. } => {
                self.rails[rail].stats.arrivals += 1;
                let imm = Imm::from_bits(imm);
                match imm.kind() {
                    Kind::Kv => self.proto.arrived(now_ns, session, slot, imm.grant()),
                    Kind::Notice => {}
                    Kind::Experts => self.side_arrived(now_ns, session, slot, imm.value()),
                }
            }
            Event::Done { token, .. } if self.side_done(session, slot, token) => {}
            Event::Done { token, .. } => {
                let id = TransferId::from_token(token);
                if let Some(transfer) = self.transfers.get_mut(id) {
                    let used = &mut transfer.lanes[usize::from(slot)];
                    used.tokens -= 1;
                    used.tokens -= used.tokens.min(is_planted(Planted::TokenCountedTwice).into());
                    self.advance(now_ns, id);
                }
            }
            Event::Up { .. } => self.proto.lane_up(now_ns, session, slot),
            Event::Down { cause, .. } => {
                self.rails[rail].lanes.remove(&lane);
                if let Some(lane) = self.slot(session, slot) {
                    lane.state = LaneState::Down;
                    lane.id = None;
                }
                // What was out on that lane has ended with it.
                for id in self.transfers.of_session(session) {
                    if let Some(transfer) = self.transfers.get_mut(id) {
                        let used = &mut transfer.lanes[usize::from(slot)];
                        if used.tokens > 0 || used.uncovered {
                            transfer.down_lanes |= 1 << slot;
                        }
                        *used = LaneUse { arrivals: used.arrivals, ..LaneUse::default() };
                    }
                }
                self.side_lane_down(now_ns, session, slot, cause);
                self.proto.lane_down(now_ns, session, slot, cause);
                for id in self.transfers.of_session(session) {
                    self.advance(now_ns, id);
                }
            }
        }
    }

    pub(super) fn slot(&mut self, session: SessionId, slot: u8) -> Option<&mut Lane> {
        self.sessions.get_mut(&session)?.slots.get_mut(usize::from(slot))
    }

    /// Tells the protocol how silent those peers have been that it is about to look after.
    pub(super) fn listen(&mut self, now_ns: u64) {
        let listened = self.network.listened_ns();
        let due: Vec<SessionId> = self.proto.sessions_due(now_ns).collect();
        for session in due {
            if let Some(heard) = self.network.heard_ns(session.0) {
                self.proto.heard(session, heard, listened);
            }
        }
    }
}
