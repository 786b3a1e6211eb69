//! What a router asks for: requests, and for which workers.

use crossdock_proto::End;

use crate::chance::Chance;
use crate::room::{self, Computing, Part, Patience, Plan, Room, Seat, Side};
use crate::scenario::{MS, US};
use crate::world::{Event, World};

impl World {
    /// A router gives a request to two workers, or to all ranks that share it.
    pub fn plan_room(&mut self) {
        let room = self.rooms.len();
        if self.has_planned_all() {
            return;
        }
        // One in a few is another try of a request that came to nothing, under the same name.
        let again = (0..room).rev().find(|&room| self.went_down(room)).filter(|_| self.chance.one_in(2));
        if let Some(again) = again {
            self.rooms[again].plan.is_tried_again = true;
        }
        let before = again.map(|again| self.rooms[again].plan.clone());
        let number = before.as_ref().map_or_else(|| self.chance.below(12), |plan| plan.number);
        let (mut decodes, mut prefills) = match &before {
            Some(plan) => (plan.decodes.clone(), plan.prefills.clone()),
            None => self.seats(number),
        };
        let chance = &mut self.chance;
        let patience = *chance.pick(&[
            Patience::Short,
            Patience::Medium,
            Patience::Long,
            Patience::Long,
            Patience::Long,
            Patience::Long,
        ]);
        let other = if chance.one_in(4) { Patience::Medium } else { patience };
        let of_side = |seats: &mut [Seat], patience: Patience, chance: &mut Chance| {
            for seat in seats {
                (seat.duration_ns, seat.is_cancelled) = (patience.duration_ns(chance), false);
            }
        };
        of_side(&mut decodes, patience, chance);
        of_side(&mut prefills, other, chance);
        let tokens = match chance.below(3) {
            0 => chance.within(1..6),
            1 => chance.within(1..24),
            _ => chance.within(8..56),
        } as u32;
        let skip_tokens = if chance.one_in(3) { chance.below(u64::from(tokens) + 1) as u32 } else { 0 };
        let (tokens, skip_tokens) = match &before {
            Some(plan) => (plan.tokens, plan.skip_tokens),
            None => (tokens, skip_tokens),
        };
        let is_other = again.is_none() && chance.one_in(24);
        let prefill_tokens = if is_other { tokens + 1 } else { tokens };
        let (use_count, is_pull) = match &before {
            Some(plan) => (plan.use_count, plan.is_pull),
            None => {
                let uses = self.uses.entry(number).or_default();
                *uses += 1;
                (*uses, chance.one_in(3))
            }
        };
        let computing: Vec<Computing> = prefills
            .iter()
            .map(|seat| {
                let layers = self.scenario.nodes[seat.node].layout.layers();
                let steps = room::steps(chance, layers, prefill_tokens);
                Computing { steps, scribbles: Default::default() }
            })
            .collect();
        let most_steps = computing.iter().map(|computing| computing.steps.len() as u64).max().unwrap_or(0);
        let slow_steps = self.scenario.slow_steps;
        let step_ns = if slow_steps { 4 * MS } else { *chance.pick(&[10 * US, 60 * US, 60 * US, MS]) };
        let mut plan = Plan {
            number,
            use_count,
            is_pull,
            decodes,
            prefills,
            tokens,
            prefill_tokens,
            skip_tokens,
            salt: chance.word(),
            again,
            is_tried_again: false,
            step_ns,
            computes_ns: if is_pull { 0 } else { step_ns * (1 + most_steps) },
            computing,
        };
        let apart_ns = if chance.one_in(2) { chance.below(40 * US) } else { chance.below(2 * MS) };
        let decode_first = chance.one_in(2);
        let (decode_ns, prefill_ns) = if decode_first { (0, apart_ns) } else { (apart_ns, 0) };
        let now_ns = self.now_ns;
        let mut events = Vec::new();
        let absent = match chance.below(24) {
            0 => Some(Part::Decode(chance.below(plan.decodes.len() as u64) as usize)),
            1 => Some(Part::Prefill(chance.below(plan.prefills.len() as u64) as usize)),
            _ => None,
        };
        for part in plan.parts().filter(|part| Some(*part) != absent) {
            let (Part::Decode(nth) | Part::Prefill(nth)) = part;
            let at_ns = if matches!(part, Part::Decode(_)) { decode_ns } else { prefill_ns };
            // The ranks of a side do not come at once.
            let later_ns = if nth > 0 && chance.one_in(2) { chance.below(300 * US) } else { 0 };
            events.push((now_ns + at_ns + later_ns, Event::Open(room, part)));
        }
        if chance.one_in(self.scenario.cancel_one_in) {
            let parts: Vec<Part> = plan.parts().collect();
            let part = *chance.pick(&parts);
            plan.seat_mut(part).is_cancelled = true;
            let wait_ns = *chance.pick(&[60 * US, 300 * US, 2 * MS]);
            events.push((now_ns + apart_ns + chance.below(wait_ns), Event::Cancel(room, part)));
        }
        if !is_pull && chance.one_in(5) {
            let nth = chance.below(plan.prefills.len() as u64) as usize;
            events.push((now_ns + apart_ns + chance.below(400 * US), Event::Scribble(room, nth)));
        }
        if chance.one_in(12) {
            let nth = chance.below(plan.decodes.len() as u64) as usize;
            events.push((now_ns + decode_ns + chance.below(300 * US), Event::DropTicket(room, nth)));
        }
        let gap_ns = self.scenario.room_gap_ns;
        let next_ns = now_ns + if chance.one_in(3) { 0 } else { chance.below(2 * gap_ns) };
        events.push((next_ns, Event::PlanRoom));
        self.log(|| format!("room {room}: {plan:?}"));
        self.rooms.push(Room::new(plan));
        for (at_ns, event) in events {
            self.schedule(at_ns, event);
        }
    }

    /// Which ranks are to share a request, and who of them with whom.
    fn seats(&mut self, number: u64) -> (Vec<Seat>, Vec<Seat>) {
        let (scenario, chance) = (&self.scenario, &mut self.chance);
        let nodes = &scenario.nodes;
        let all = 0..nodes.len();
        let seat = |node, peers| Seat { node, peers, duration_ns: 0, is_cancelled: false };
        let decodes: Vec<usize> = all.clone().filter(|&node| nodes[node].decodes).collect();
        let decode = *chance.pick(&decodes);
        let prefills: Vec<usize> = all
            .filter(|&node| nodes[node].prefills && node != decode && scenario.are_joined(node, decode))
            .collect();
        let prefill = *chance.pick(&prefills);
        let Some(split) = &scenario.split else {
            return (vec![seat(decode, vec![0])], vec![seat(prefill, vec![0])]);
        };
        // A side that is not shared may be there twice.
        let at = |ranks: u32, one: usize, all: &[usize]| if ranks > 1 { all.to_vec() } else { vec![one] };
        let decodes = at(split.decode.ranks(), decode, &decodes);
        let prefills = at(split.prefill.ranks(), prefill, &prefills);
        let peers_of = |node: usize| {
            let sources = split.sources(nodes[node].layout.rank(), number).into_iter();
            sources.map(|source| source.rank as usize).collect()
        };
        let decodes: Vec<Seat> = decodes.into_iter().map(|node| seat(node, peers_of(node))).collect();
        let destinations = |prefill: usize| {
            let has_share = |(nth, seat): (usize, &Seat)| seat.peers.contains(&prefill).then_some(nth);
            decodes.iter().enumerate().filter_map(has_share).collect()
        };
        let prefills = (0..).zip(prefills).map(|(nth, node)| seat(node, destinations(nth))).collect();
        (decodes, prefills)
    }

    /// Whether a room came to nothing, as all its users know, so that a router may try its request again.
    fn went_down(&self, at: usize) -> bool {
        let Room { plan, .. } = &self.rooms[at];
        let is_gone = |side: &Side| !self.is_life(side.node, side.life);
        let has_failed = |side: &Side| matches!(&side.told, Some((_, end)) if *end != End::Delivered);
        let is_sound = plan.tokens == plan.prefill_tokens && !plan.is_tried_again;
        is_sound
            && plan
                .parts()
                .all(|part| self.rooms[at].side(part).is_some_and(|side| has_failed(side) || is_gone(side)))
    }
}
