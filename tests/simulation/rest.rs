//! The end of a run: everything ends, and everything comes home.

use crossdock_memory::{QuarantineEntry, Until};
use crossdock_proto::{End, RoomRefusal, Who};

use crate::report::Fair;
use crate::room::{Part, Patience, Room};
use crate::rules::{Held, Rule, Violation, broken};
use crate::scenario::{MS, US};
use crate::world::World;

impl World {
    /// When the faults have stopped, everything ends, and everything comes home.
    pub fn come_to_rest(&mut self) -> Result<Fair, Violation> {
        let limit_ns = self.now_ns + REST_NS;
        while !self.is_at_rest() {
            if self.now_ns >= limit_ns {
                return self.tell_leftovers();
            }
            self.run_until(self.now_ns + MS)?;
        }
        let fair = self.check_fair_weather()?;
        self.check_counts()?;
        self.is_closing = true;
        for node in 0..self.nodes.len() {
            if let Some(process) = &self.nodes[node].process {
                for peer in process.peers.values() {
                    // A queue that is full now is not later.
                    let _ = process.handle.disconnect(*peer);
                }
            }
            self.ring(node);
        }
        let limit_ns = self.now_ns + 40 * MS;
        while !self.is_empty() {
            if self.now_ns >= limit_ns {
                return self.tell_leftovers();
            }
            self.run_until(self.now_ns + MS)?;
        }
        Ok(fair)
    }

    fn is_at_rest(&mut self) -> bool {
        let settled = self.rooms.iter().enumerate().all(|(at, room)| {
            let is_settled =
                |part| room.side(part).is_none_or(|side| side.is_settled || self.is_excused(at, part));
            room.plan.parts().all(is_settled)
        });
        settled
            && (0..self.nodes.len())
                .all(|node| self.holds(node) == self.may_hold(node) && self.lanes_missing(node) == 0)
    }

    /// Pages that may stay out: a peer that nobody can prove dead could still write them, or read them.
    fn is_excused(&self, at: usize, part: Part) -> bool {
        self.excused_shares(at, part) > 0
    }

    /// How many of a side's shares may hold pages for a peer that nobody can prove dead.
    fn excused_shares(&self, at: usize, part: Part) -> usize {
        let room = &self.rooms[at];
        // In a push the prefill side's pages are touched by itself alone, in a pull the decode side's.
        if matches!(part, Part::Prefill(_)) != room.plan.is_pull || !self.scenario.has_unproven_ports() {
            return 0;
        }
        let has_died = |peer: &Part| {
            let node = &self.nodes[room.plan.node(*peer)];
            node.life > 1 || node.process.is_none()
        };
        match room.end(part) {
            Some(_) => room.plan.peers(part).filter(has_died).count(),
            None => 0,
        }
    }

    /// Rooms, grants and sessions of a node.
    fn holds(&mut self, node: usize) -> (usize, usize, usize) {
        let excused = self.excused(node);
        match &mut self.nodes[node].process {
            Some(process) => {
                let stats = process.worker.stats();
                // What is held for a peer that nobody can prove dead is not asked about.
                match excused {
                    0 => (stats.rooms, stats.grants, stats.sessions),
                    _ => (stats.rooms - excused.min(stats.rooms), 0, 0),
                }
            }
            None => (0, 0, 0),
        }
    }

    /// Lanes of a node's sessions that were lost and are not back.
    fn lanes_missing(&mut self, node: usize) -> usize {
        let process = self.nodes[node].process.as_mut();
        process.map_or(0, |process| process.worker.engine().proto().lanes_missing())
    }

    fn excused(&self, node: usize) -> usize {
        self.nodes[node].sides.iter().map(|&(room, part)| self.excused_shares(room, part)).sum()
    }

    fn may_hold(&self, node: usize) -> (usize, usize, usize) {
        let others = 0..self.nodes.len();
        let joined = others.filter(|&other| {
            let lives = |at: usize| self.nodes[at].process.is_some();
            other != node && lives(other) && lives(node) && self.scenario.are_joined(node, other)
        });
        match self.excused(node) {
            0 => (0, 0, joined.count()),
            _ => (0, 0, 0),
        }
    }

    /// Nothing is left between the nodes.
    fn is_empty(&mut self) -> bool {
        let excused = (0..self.nodes.len()).any(|node| self.excused(node) > 0);
        let held = (0..self.nodes.len()).all(|node| self.holds(node) == (0, 0, 0));
        held && (excused || self.fabric.lanes().is_empty())
    }

    fn tell_leftovers<T>(&mut self) -> Result<T, Violation> {
        let mut left = Vec::new();
        for (at, room) in self.rooms.iter().enumerate() {
            for part in room.plan.parts() {
                if let Some(side) = room.side(part)
                    && !side.is_settled
                    && !self.is_excused(at, part)
                {
                    left.push(format!("room {at} {part:?} of node {} told {:?}", side.node, side.told));
                }
            }
        }
        for node in 0..self.nodes.len() {
            let (holds, may_hold) = (self.holds(node), self.may_hold(node));
            let lanes = self.lanes_missing(node);
            left.push(format!("node {node} holds {holds:?} (rooms, grants, sessions), may {may_hold:?}"));
            left.push(format!("{lanes} of its lanes are not back"));
            if let Some(process) = &self.nodes[node].process {
                left.push(format!("{:?}", process.pool.quarantine(self.now_ns)));
            }
        }
        left.push(format!("lanes {:?}", self.fabric.lanes()));
        broken(Rule::Leftovers, left.join("; "))
    }

    /// Each room has ended once, as its user was told; what is still out waits for a peer that cannot be proven dead.
    fn check_counts(&mut self) -> Held {
        for node in 0..self.nodes.len() {
            let (life, excused) = (self.nodes[node].life, self.excused(node));
            // How many shares were delivered is known where all were, or of how many.
            let (mut delivered, mut mixed, mut undelivered) = (0, 0, 0);
            for room in &self.rooms {
                for part in room.plan.parts() {
                    let Some(side) = room.side(part).filter(|side| (side.node, side.life) == (node, life))
                    else {
                        continue;
                    };
                    let shares = room.plan.seat(part).peers.len() as u64;
                    match &side.told {
                        Some((_, End::Delivered)) => delivered += shares,
                        Some(_) => (mixed, undelivered) = (mixed + shares - 1, undelivered + shares),
                        None => {}
                    }
                }
            }
            let Some(process) = &mut self.nodes[node].process else { continue };
            let counters = process.worker.stats().counters;
            // What is refused before it becomes a room is told, but not counted.
            let may_be_delivered = delivered..=delivered + mixed;
            if !may_be_delivered.contains(&counters.delivered) || counters.undelivered > undelivered {
                let what = format!("node {node} told {delivered} and {undelivered}, and counts {counters:?}");
                return broken(Rule::Deadline, what);
            }
            let out = process.pool.quarantine(self.now_ns);
            let may_be_out = |entry: &QuarantineEntry| excused > 0 && entry.until == Until::ReleaseOrDeath;
            if let Some(entry) = out.iter().find(|entry| !may_be_out(entry)) {
                return broken(Rule::Leftovers, format!("node {node}: {entry:?}"));
            }
        }
        Ok(())
    }

    /// Without faults, what can be delivered is, and ends are told soon.
    fn check_fair_weather(&self) -> Result<Fair, Violation> {
        let mut fair = Fair::default();
        if !self.scenario.is_fair() {
            return Ok(fair);
        }
        for (at, room) in self.rooms.iter().enumerate() {
            for nth in 0..room.plan.decodes.len() {
                match self.could_be_delivered(room, nth) {
                    Some(true) => fair.delivered += 1,
                    Some(false) if room.is_refused() => fair.refused += 1,
                    Some(false) => {
                        return broken(Rule::FairWeather, format!("not delivered: {}", room.ends(at)));
                    }
                    None => {}
                }
                if !room.is_refused() {
                    self.check_known_soon(at, nth)?;
                }
            }
        }
        Ok(fair)
    }

    /// Whether a decode side was delivered, if it and its peers did what it takes: what the others of the room do is
    /// nothing to it.
    fn could_be_delivered(&self, room: &Room, nth: usize) -> Option<bool> {
        let (plan, decode) = (&room.plan, Part::Decode(nth));
        let needed_ns = Patience::LONG_LEAST_NS.max(10 * MS + plan.computes_ns);
        let is_sound = plan.tokens == plan.prefill_tokens
            && plan.computing.iter().all(|computing| computing.scribbles.is_empty())
            && plan.again.is_none();
        let is_patient = |part: Part| {
            let seat = plan.seat(part);
            room.end(part).is_some() && !seat.is_cancelled && seat.duration_ns >= needed_ns
        };
        let is_delivered = |part: Part| room.end(part) == Some(&End::Delivered);
        (is_sound && is_patient(decode) && plan.peers(decode).all(is_patient)).then(|| {
            is_delivered(decode) && plan.peers(decode).all(|part| is_delivered(part) || plan.is_shared(part))
        })
    }

    /// Without faults, what one side ends by is known on the other soon.
    fn check_known_soon(&self, at: usize, nth: usize) -> Held {
        let (room, part) = (&self.rooms[at], Part::Decode(nth));
        let Some(decode) = room.side(part) else { return Ok(()) };
        for peer in room.plan.peers(part) {
            let Some(prefill) = room.side(peer) else { continue };
            let (Some((decode_ns, _)), Some((prefill_ns, prefill_end))) = (&decode.told, &prefill.told)
            else {
                continue;
            };
            // With several shares, what is told waits for the others.
            // So it does when a user has cancelled what was just delivered.
            let is_over_alone = matches!(prefill_end, End::Delivered | End::Cancelled { by: Who::Here });
            let is_one_of_several = room.plan.is_shared(part) && is_over_alone;
            let first_ns = *decode_ns.min(prefill_ns);
            let opened_ns = decode.opened_ns.max(prefill.opened_ns);
            // Time enough for the one to hear of the other, through streams that are full.
            let known_ns = opened_ns + 20 * self.scenario.fabric.delay.most_ns;
            let apart_ns = decode_ns.abs_diff(*prefill_ns);
            if !room.plan.is_shared(peer) && !is_one_of_several && known_ns < first_ns && apart_ns > 2 * MS {
                let what = format!("known {} us apart: {}", apart_ns / US, room.ends(at));
                return broken(Rule::FairWeather, what);
            }
        }
        Ok(())
    }
}

impl Room {
    /// Whether a limit was reached: that it was, each side has shown when it said so.
    fn is_refused(&self) -> bool {
        let is_busy = |end: &End| matches!(end, End::Refused { why: RoomRefusal::Busy, .. });
        self.plan.parts().filter_map(|part| self.end(part)).any(is_busy)
    }

    fn ends(&self, at: usize) -> String {
        let ends = self.plan.parts().map(|part| format!("{part:?} {:?}", self.end(part)));
        format!("room {at}: {}", ends.collect::<Vec<_>>().join(", "))
    }
}

/// How long after the last fault everything must have come home: the longest deadline, and several times what a
/// handshake, a silence and a pause between two dials take.
const REST_NS: u64 = 120 * MS;
