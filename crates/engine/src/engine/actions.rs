//! What the protocol decides, carried out.

use std::collections::BTreeMap;

use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{Action, LinkId as ProtoLink};
use crossdock_transport::Fence;

use super::Engine;
use super::lanes::Attaching;
use crate::network::{LinkId, Pulse};

impl Engine {
    pub(super) fn act(&mut self, now_ns: u64, action: Action) {
        match action {
            Action::Dial { target, address } => {
                let dialed = self.network.dial(&address);
                let link = dialed.map(|link| ProtoLink(link.0)).map_err(|error| error.cause());
                self.proto.dialed(now_ns, target, link);
            }
            Action::Send { link, frame } => self.send(now_ns, link, frame),
            Action::CloseLink { link } => match self.backlog.get_mut(&link) {
                Some(backlog) => backlog.then_close = true,
                None => self.network.close(LinkId(link.0)),
            },
            Action::Trust { link } => self.network.trust(LinkId(link.0)),
            Action::Watch { session, plan } => {
                let pulse = Pulse {
                    peer_address: plan.peer_address,
                    interval_ns: plan.interval_ns,
                    send_token: plan.send_token,
                    expect_token: plan.expect_token,
                };
                if let Err(error) = self.network.watch(session.0, pulse) {
                    self.proto.watch_failed(now_ns, session, error.cause());
                }
            }
            Action::Unwatch { session } => {
                self.network.unwatch(session.0);
                // The session is over; what its rooms granted is revoked room by room.
                self.end_side(session);
            }
            Action::OpenLane { session, slot, rail } => {
                let opened = self.open_lane(session, slot, usize::from(rail));
                self.proto.lane_opened(now_ns, session, slot, opened);
            }
            Action::ConnectLane { session, slot, address, tags } => {
                self.connect_lane(now_ns, session, slot, &address, &tags);
            }
            Action::CloseLane { session, slot } => {
                if let Some((rail, Some(id))) = self.slot(session, slot).map(|lane| (lane.rail, lane.id)) {
                    self.rails[rail].port.close(id);
                }
            }
            Action::AttachLane { session, slot, regions, peer_rail } => {
                if let Some(lane) = self.slot(session, slot) {
                    lane.attach = Some(Attaching { regions, peer_rail, found: BTreeMap::new() });
                }
                self.attach(now_ns, session, slot);
            }
            Action::UseLane { session, slot } => self.use_lane(session, slot),
            Action::Grant { session, grant, room } => self.grant(now_ns, session, grant, room),
            Action::Revoke { session, grant } => {
                let mut fence = Fence::Now;
                for at in self.rails_of(session) {
                    fence = fence.max(self.rails[at].port.revoke(grant));
                }
                if is_planted(Planted::FenceTakenForNow) {
                    fence = Fence::Now;
                }
                self.proto.revoked(now_ns, grant, fence);
            }
            Action::StopTransfer { room } => match self.transfers.find(room) {
                Some(id) => {
                    if let Some(transfer) = self.transfers.get_mut(id) {
                        transfer.stopping = true;
                        transfer.finishing = None;
                    }
                    self.advance(now_ns, id);
                }
                None => self.proto.drained(now_ns, room, 0),
            },
            Action::Forget { session } => {
                self.sessions.remove(&session);
            }
        }
    }
}
