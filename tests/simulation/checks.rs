//! Whether the rules hold after a turn.

use crossdock_engine::Abandoned;
use crossdock_proto::End;

use crate::chance::mix;
use crate::node;
use crate::room::{EndKind, Part};
use crate::rules::{Held, Rule, broken};
use crate::world::World;

impl World {
    /// Notes of which of its limits a node may have come to in a turn in which users have begun so many shares.
    pub fn note_full(&mut self, node: usize, begun: usize, before: node::Held) {
        let Some(process) = &self.nodes[node].process else { return };
        let granted = std::mem::take(&mut process.watch.lock().granted).len();
        let asked = std::mem::take(&mut process.wire.lock().asked);
        let limits = &self.scenario;
        let note = |is_full: bool, last: &mut Option<u64>| {
            if is_full {
                *last = Some(self.now_ns);
            }
        };
        let full = &mut self.nodes[node].full;
        note(before.rooms + begun > limits.max_rooms as usize, &mut full.of_rooms_ns);
        note(before.grants + granted >= limits.max_grants as usize, &mut full.of_grants_ns);
        note(before.requests + asked > limits.max_parked as usize, &mut full.of_requests_ns);
    }

    /// The clocks of what was asked for since the last turn begin with the turn that takes it.
    pub fn start_deadlines(&mut self, node: usize) -> usize {
        let mut begun = 0;
        for &(room, part) in &self.nodes[node].sides {
            let shares = self.rooms[room].plan.seat(part).peers.len();
            if let Some(side) = self.rooms[room].side_mut(part)
                && side.deadline_ns.is_none()
            {
                side.deadline_ns = Some(self.now_ns + side.duration_ns);
                begun += shares;
            }
        }
        begun
    }

    /// After a turn of a node: what its users hear, and whether they hear it in time.
    pub fn check_turn(&mut self, node: usize) -> Held {
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        let broken_rule = process.watch.lock().broken.take();
        if let Some(violation) = broken_rule.or_else(|| process.wire.lock().broken.take()) {
            return Err(violation);
        }
        let mut refused = None;
        process.ups.retain_mut(|up| match up.poll() {
            Ok(None) => true,
            Ok(Some(Ok(_))) | Err(Abandoned) => false,
            Ok(Some(Err(cause))) => {
                refused = Some(cause);
                false
            }
        });
        if let Some(cause) = refused {
            return broken(Rule::Accused, format!("node {node} will never reach a peer: {cause}"));
        }
        for (room, part) in self.nodes[node].sides.clone() {
            self.check_side(node, room, part)?;
        }
        let rooms = &self.rooms;
        self.nodes[node]
            .sides
            .retain(|&(room, part)| rooms[room].side(part).is_some_and(|side| !side.is_settled));
        let Some(process) = &self.nodes[node].process else { return Ok(()) };
        match process.pool.stats().abandoned {
            0 => Ok(()),
            pages => broken(Rule::Pool, format!("{pages} pages of node {node} are lost for ever")),
        }
    }

    fn check_side(&mut self, node: usize, at: usize, part: Part) -> Held {
        let now_ns = self.now_ns;
        let room = &mut self.rooms[at];
        if room.end(part).is_none() {
            let told = match part {
                Part::Decode(nth) => {
                    let decode = room.decodes[nth].as_mut().expect("opened");
                    decode
                        .receiving
                        .end
                        .poll()
                        .map(|told| told.map(|received| (received.ended.end, received.aux)))
                }
                Part::Prefill(nth) => {
                    let prefill = room.prefills[nth].as_mut().expect("opened");
                    prefill.ticket.poll().map(|told| told.map(|ended| (ended.end, Vec::new())))
                }
            };
            match told {
                Ok(None) => {}
                Ok(Some((end, aux))) => {
                    room.side_mut(part).expect("opened").told = Some((now_ns, end.clone()));
                    self.told(at, part, &end, &aux)?;
                }
                Err(Abandoned) => {
                    return broken(
                        Rule::Deadline,
                        format!("room {at}: the end of {part:?} will never be told"),
                    );
                }
            }
        }
        let side = self.rooms[at].side(part).expect("opened");
        if side.told.is_none() && side.deadline_ns.is_some_and(|deadline_ns| deadline_ns <= now_ns) {
            let late_ns = now_ns - side.deadline_ns.unwrap_or(now_ns);
            return broken(Rule::Deadline, format!("room {at}: {part:?} is late by {late_ns} ns"));
        }
        match part {
            Part::Decode(nth) => {
                self.check_arrivals(node, at, nth)?;
                self.check_home(node, at, nth)
            }
            Part::Prefill(nth) => self.check_source(node, at, nth),
        }
    }

    /// A user hears how a room ended.
    fn told(&mut self, at: usize, part: Part, end: &End, aux: &[u8]) -> Held {
        self.log(|| format!("room {at}: {part:?}: {end}"));
        let which = match part {
            Part::Decode(nth) => 2 * nth,
            Part::Prefill(nth) => 2 * nth + 1,
        };
        self.fold(mix((at as u64) << 8 | (which as u64) << 4 | EndKind::of(end) as u64));
        self.check_accusation(at, part, end)?;
        self.check_pair(at, part, end)?;
        let plan = &self.rooms[at].plan;
        if matches!(part, Part::Decode(_)) && *end == End::Delivered && aux != plan.salt.to_le_bytes() {
            return broken(Rule::Bytes, format!("room {at}: {aux:?} came with the pages"));
        }
        Ok(())
    }

    fn check_arrivals(&mut self, node: usize, at: usize, nth: usize) -> Held {
        let decode = self.rooms[at].decodes[nth].as_mut().expect("opened");
        let (before, arrivals) = (decode.arrivals, decode.receiving.arrivals());
        decode.arrivals = arrivals;
        if arrivals < before {
            let process = self.nodes[node].process.as_mut().expect("runs");
            process.falls += 1;
            let attempts = process.worker.engine().counters().further_attempts;
            if process.falls > attempts {
                let what = format!("room {at}: arrivals fell from {before} to {arrivals}, in one attempt");
                return broken(Rule::Arrivals, what);
            }
        }
        Ok(())
    }
}
