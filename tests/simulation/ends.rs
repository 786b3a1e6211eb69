//! Whether nobody is accused of what nobody has done, and the ends of a room's sides go together.

use crossdock_proto::{End, Failure, RoomRefusal, SessionEnd, Who};

use crate::faults::{Fault, Trouble};
use crate::room::{Part, Plan};
use crate::rules::{Held, Rule, broken};
use crate::scenario::MS;
use crate::world::World;

impl World {
    /// Nobody is accused of what nobody has done.
    pub fn check_accusation(&self, at: usize, part: Part, end: &End) -> Held {
        let plan = &self.rooms[at].plan;
        let is_just = match end {
            End::PeerLost { cause } => match cause {
                SessionEnd::Misbehaved { .. } | SessionEnd::Refused { .. } | SessionEnd::Port(_) => false,
                SessionEnd::ClosedHere => {
                    self.is_closing || self.scenario.faults.contains(&Fault::Disconnect)
                }
                SessionEnd::Silent { .. } => plan.peers(part).any(|peer| self.was_silent(at, part, peer)),
                _ => !self.scenario.is_fair(),
            },
            End::Refused { why: RoomRefusal::Mismatch(_), .. } => plan.tokens != plan.prefill_tokens,
            End::Refused { why: RoomRefusal::Busy, by } => self.was_full(at, part, *by),
            End::Refused { .. } => false,
            End::Failed { cause: Failure::Checksum, .. } => plan.is_scribbled(part),
            End::Failed { cause: Failure::AtPeer, .. } => {
                let has_failed = |end: &End| matches!(end, End::Failed { by: Who::Here, .. });
                plan.peers(part).any(|peer| self.has_ended_so(at, peer, has_failed))
            }
            End::Failed { .. } => false,
            End::Cancelled { by: Who::Here } => plan.seat(part).is_cancelled,
            _ => true,
        };
        match is_just {
            true => Ok(()),
            false => broken(Rule::Accused, format!("room {at}: {part:?}: {end}")),
        }
    }

    /// Whether a limit of this side, or of a peer's, was reached, so that it had to refuse the room.
    fn was_full(&self, at: usize, part: Part, by: Who) -> bool {
        let room = &self.rooms[at];
        let Some(side) = room.side(part) else { return false };
        let since = |node: usize, from_ns: u64| {
            let full = &self.nodes[node].full;
            [full.of_rooms_ns, full.of_grants_ns].into_iter().any(|full_ns| full_ns >= Some(from_ns))
        };
        match by {
            // Who refuses says so at once; a prefill with other shares, when these have ended.
            Who::Here if says_late(&room.plan, part) => since(side.node, side.opened_ns),
            Who::Here => since(side.node, self.now_ns),
            Who::Peer => room.plan.peers(part).any(|peer| {
                let is_busy =
                    |end: &End| matches!(end, End::Refused { by: Who::Here, why: RoomRefusal::Busy });
                let node = room.plan.node(peer);
                // A request can be turned away before its room is open there, and nobody there is told.
                let requests_ns = self.nodes[node].full.of_requests_ns;
                let was_turned_away = matches!(part, Part::Decode(_)) && requests_ns >= Some(side.opened_ns);
                let is_late = says_late(&room.plan, peer) && since(node, side.opened_ns);
                was_turned_away || is_late || self.has_ended_so(at, peer, is_busy)
            }),
        }
    }

    /// Whether a side of a room, or of one that had its name before and of which a peer may still hear, has ended so.
    fn has_ended_so(&self, at: usize, part: Part, is_so: impl Fn(&End) -> bool) -> bool {
        let mut names = std::iter::successors(Some(at), |&at| self.rooms[at].plan.again);
        names.any(|at| self.rooms[at].end(part).is_some_and(&is_so))
    }

    /// Whether a side had reason to take its peer for dead: a pause of its own is none, and a loop that is held up while
    /// the heart beats on is none either.
    fn was_silent(&self, at: usize, part: Part, peer: Part) -> bool {
        let room = &self.rooms[at];
        let (here, there) = (room.plan.node(part), room.plan.node(peer));
        // What a prefill with other shares tells may be as old as its room.
        let since_ns = match room.side(part) {
            Some(side) if says_late(&room.plan, part) => side.opened_ns,
            _ => self.now_ns,
        };
        let lately_ns = since_ns.saturating_sub(14 * MS);
        let explains = |trouble: &Trouble| match trouble.fault {
            Fault::Stop | Fault::Death | Fault::Leaving => trouble.nodes == [there],
            Fault::Partition => [here, there].iter().all(|node| trouble.nodes.contains(node)),
            _ => false,
        };
        let is_lossy = self.scenario.fabric.datagram_loss.0 > 0;
        is_lossy || self.troubles.iter().any(|trouble| trouble.until_ns >= lately_ns && explains(trouble))
    }

    /// The ends of the two sides go together; of several shares, each with its peer's.
    pub fn check_pair(&self, at: usize, part: Part, end: &End) -> Held {
        self.check_delivery(at, part)?;
        self.check_contradiction(at, part)?;
        let room = &self.rooms[at];
        room.plan.peers(part).try_for_each(|peer| {
            self.check_delivery(at, peer)?;
            self.check_contradiction(at, peer)
        })?;
        let is_busy = matches!(end, End::Refused { why: RoomRefusal::Busy, .. });
        // A peer that waited in vain for its own user says so; who was stopped may hear it before its own clock.
        let is_late = room.side(part).is_some_and(|side| side.deadline_ns <= Some(self.now_ns));
        if blames_peer(end) && !is_busy && !is_late {
            let has_ended = |peer| match room.side(peer) {
                Some(side) => side.told.is_some() || !self.is_life(side.node, side.life),
                None => false,
            };
            let is_known =
                |peer| has_ended(peer) || (room.side(peer).is_some() && says_late(&room.plan, peer));
            // What is heard may be of the room that had this name before.
            if !room.plan.peers(part).any(is_known) && room.plan.again.is_none() {
                return broken(Rule::Pairs, format!("room {at}: {part:?}: {end}, but no peer has ended"));
            }
        }
        Ok(())
    }

    /// A prefill side was delivered if all of its shares were, and so was a decode side.
    fn check_delivery(&self, at: usize, part: Part) -> Held {
        let room = &self.rooms[at];
        let is_delivered = |part: Part| room.end(part) == Some(&End::Delivered);
        let Some(end) = room.end(part) else { return Ok(()) };
        let holds = match part {
            // The other share of one that takes several may have failed, or not be over.
            Part::Prefill(_) if is_delivered(part) => {
                room.plan.peers(part).all(|peer| is_delivered(peer) || room.plan.is_shared(peer))
            }
            Part::Prefill(_) => !blames_peer(end) || !room.plan.peers(part).all(is_delivered),
            Part::Decode(_) => true,
        };
        match holds {
            true => Ok(()),
            false => {
                let peers: Vec<_> = room.plan.peers(part).map(|peer| room.end(peer)).collect();
                broken(Rule::Pairs, format!("room {at}: {part:?} {end:?}, its peers {peers:?}"))
            }
        }
    }

    /// A side says of a peer what a peer says of itself, once all have spoken.
    fn check_contradiction(&self, at: usize, part: Part) -> Held {
        let room = &self.rooms[at];
        let (Some(end), None) = (room.end(part), room.plan.again) else { return Ok(()) };
        let peers: Option<Vec<(Part, &End)>> =
            room.plan.peers(part).map(|peer| room.end(peer).map(|end| (peer, end))).collect();
        let Some(peers) = peers else { return Ok(()) };
        let is_undone = |(peer, theirs): &(Part, &End)| match peer {
            // With one share it gives up the others.
            Part::Decode(_) => room.plan.is_shared(*peer) && **theirs != End::Delivered,
            // It says one thing of all its shares, and of this one it may have said another.
            Part::Prefill(_) => {
                let is_given_up = matches!(theirs, End::Refused { by: Who::Here, .. });
                room.plan.is_shared(*peer) && (room.plan.seat(*peer).is_cancelled || is_given_up)
            }
        };
        match peers.iter().any(|peer| !contradicts(end, peer.1) || is_undone(peer)) {
            true => Ok(()),
            false => broken(Rule::Pairs, format!("room {at}: {part:?} {end:?}, its peers {peers:?}")),
        }
    }
}

/// Whether a side tells how the first of its shares has failed only when the others have ended.
fn says_late(plan: &Plan, part: Part) -> bool {
    matches!(part, Part::Prefill(_)) && plan.is_shared(part)
}

/// Whether an end says that the peer did it.
fn blames_peer(end: &End) -> bool {
    matches!(
        end,
        End::Cancelled { by: Who::Peer }
            | End::Expired { by: Who::Peer, .. }
            | End::Refused { by: Who::Peer, .. }
            | End::Failed { by: Who::Peer, .. }
    )
}

/// Whether one side says of the other what that one does not say of itself. (A decode side can hear from a prefill node
/// whose user has not come yet that it waited too long; that user may then come and end otherwise.)
fn contradicts(one: &End, other: &End) -> bool {
    match one {
        End::Cancelled { by: Who::Peer } => *other != End::Cancelled { by: Who::Here },
        End::Failed { by: Who::Peer, .. } => !matches!(other, End::Failed { by: Who::Here, .. }),
        _ => false,
    }
}
