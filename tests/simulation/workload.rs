//! What the users of the nodes do: open rooms, fill and send pages, cancel, write where they should not.

use std::time::Duration;

use crossdock_kv::{GatherRequest, Peer, ReceiveRequest, SendError, SendRequest, ServeRequest};
use crossdock_proto::End;
use crossdock_sim::NodeId;

use crate::ledger::Holder;
use crate::node::{Part, Process, number};
use crate::room::{self, BEFORE, Decode, Patience, Plan, Prefill, PrefillTicket, Room, SCRIBBLED, Side};
use crate::rules::{Held, Rule, broken};
use crate::scenario::{MS, US};
use crate::world::{Event, World};

impl World {
    /// A router gives a request to two workers.
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
        let chance = &mut self.chance;
        let (nodes, slow_steps) = (&self.scenario.nodes, self.scenario.slow_steps);
        let all = 0..nodes.len();
        let decodes: Vec<usize> = all.clone().filter(|&node| nodes[node].decodes).collect();
        let decode = match again {
            Some(again) => self.rooms[again].plan.decode,
            None => *chance.pick(&decodes),
        };
        let prefills: Vec<usize> = all
            .filter(|&node| nodes[node].prefills && node != decode && self.scenario.are_joined(node, decode))
            .collect();
        let prefill = match again {
            Some(again) => self.rooms[again].plan.prefill,
            None => *chance.pick(&prefills),
        };
        let patience = *chance.pick(&[
            Patience::Short,
            Patience::Medium,
            Patience::Long,
            Patience::Long,
            Patience::Long,
            Patience::Long,
        ]);
        let other = if chance.one_in(4) { Patience::Medium } else { patience };
        let tokens = match chance.below(3) {
            0 => chance.within(1..6),
            1 => chance.within(1..24),
            _ => chance.within(8..56),
        } as u32;
        let skip_tokens = if chance.one_in(3) { chance.below(u64::from(tokens) + 1) as u32 } else { 0 };
        let (tokens, skip_tokens) = match again.map(|again| &self.rooms[again].plan) {
            Some(plan) => (plan.tokens, plan.skip_tokens),
            None => (tokens, skip_tokens),
        };
        let is_other = again.is_none() && chance.one_in(24);
        let prefill_tokens = if is_other { tokens + 1 } else { tokens };
        let (number, use_count, is_pull) = match again.map(|again| &self.rooms[again].plan) {
            Some(plan) => (plan.number, plan.use_count, plan.is_pull),
            None => {
                let number = chance.below(12);
                let uses = self.uses.entry(number).or_default();
                *uses += 1;
                (number, *uses, chance.one_in(3))
            }
        };
        let steps = room::steps(chance, nodes[prefill].layout.layers(), prefill_tokens);
        let step_ns = if slow_steps { 4 * MS } else { *chance.pick(&[10 * US, 60 * US, 60 * US, MS]) };
        let mut plan = Plan {
            number,
            use_count,
            is_pull,
            decode,
            prefill,
            tokens,
            prefill_tokens,
            skip_tokens,
            salt: chance.word(),
            decode_duration_ns: patience.duration_ns(chance),
            prefill_duration_ns: other.duration_ns(chance),
            is_cancelled: false,
            is_careless: false,
            again,
            is_tried_again: false,
            step_ns,
            computes_ns: if is_pull { 0 } else { step_ns * (1 + steps.len() as u64) },
            steps,
            scribbles: Default::default(),
        };
        let apart_ns = if chance.one_in(2) { chance.below(40 * US) } else { chance.below(2 * MS) };
        let decode_first = chance.one_in(2);
        let (decode_ns, prefill_ns) = if decode_first { (0, apart_ns) } else { (apart_ns, 0) };
        let now_ns = self.now_ns;
        let mut events = Vec::new();
        let alone = chance.below(24);
        if alone != 0 {
            events.push((now_ns + decode_ns, Event::OpenDecode(room)));
        }
        if alone != 1 {
            events.push((now_ns + prefill_ns, Event::OpenPrefill(room)));
        }
        if chance.one_in(self.scenario.cancel_one_in) {
            plan.is_cancelled = true;
            let part = if chance.one_in(2) { Part::Decode } else { Part::Prefill };
            let wait_ns = *chance.pick(&[60 * US, 300 * US, 2 * MS]);
            events.push((now_ns + apart_ns + chance.below(wait_ns), Event::Cancel(room, part)));
        }
        if !is_pull && chance.one_in(5) {
            events.push((now_ns + apart_ns + chance.below(400 * US), Event::Scribble(room)));
        }
        if chance.one_in(12) {
            plan.is_careless = true;
            events.push((now_ns + decode_ns + chance.below(300 * US), Event::DropTicket(room)));
        }
        let gap_ns = self.scenario.room_gap_ns;
        let next_ns = now_ns + if chance.one_in(3) { 0 } else { chance.below(2 * gap_ns) };
        events.push((next_ns, Event::PlanRoom));
        self.log(|| format!("room {room}: {plan:?}"));
        self.rooms.push(Room { plan, decode: None, prefill: None });
        for (at_ns, event) in events {
            self.schedule(at_ns, event);
        }
    }

    /// Whether a room came to nothing, as both its users know, so that a router may try its request again.
    fn went_down(&self, at: usize) -> bool {
        let room = &self.rooms[at];
        let (Some(decode), Some(prefill)) = (room.side(Part::Decode), room.side(Part::Prefill)) else {
            return false;
        };
        let is_gone = |side: &Side| !self.is_life(side.node, side.life);
        let has_failed = |side: &Side| matches!(&side.told, Some((_, end)) if *end != End::Delivered);
        let is_sound = room.plan.tokens == room.plan.prefill_tokens && !room.plan.is_tried_again;
        is_sound && [decode, prefill].into_iter().all(|side| has_failed(side) || is_gone(side))
    }

    /// Whether the users of a node can do something now. If its process is stopped, they do it later.
    fn runs(&mut self, node: usize, event: Event) -> bool {
        if self.nodes[node].process.is_none() {
            let is_open = matches!(event, Event::OpenDecode(_) | Event::OpenPrefill(_));
            if is_open && self.scenario.is_scribbled && !self.is_calm {
                let later_ns = self.now_ns + 100 * US;
                self.schedule(later_ns, event);
            }
            return false;
        }
        let runs = self.fabric.is_running(NodeId(node as u32));
        if !runs {
            let later_ns = self.now_ns + 100 * US;
            self.schedule(later_ns, event);
        }
        runs
    }

    /// Takes pages that are home, scattered; `None` if there are too few.
    fn take_pages(&mut self, node: usize, count: u32, holder: Holder) -> Option<Vec<u32>> {
        let process = self.nodes[node].process.as_ref()?;
        let mut home = process.watch.lock().ledger.home();
        if home.len() < count as usize {
            return None;
        }
        self.chance.shuffle(&mut home);
        if self.chance.one_in(3) {
            // Runs of neighbours, which are merged on their way.
            home.sort_unstable();
        }
        home.truncate(count as usize);
        process.watch.lock().ledger.give(&home, holder);
        Some(home)
    }

    pub fn open_decode(&mut self, at: usize) -> Held {
        let plan = self.rooms[at].plan.clone();
        if !self.runs(plan.decode, Event::OpenDecode(at)) {
            return Ok(());
        }
        let layout = self.scenario.nodes[plan.decode].layout.clone();
        let first_page = plan.skip_tokens / layout.page_tokens();
        let count = layout.pages_for(plan.tokens).saturating_sub(first_page);
        let Some(pages) = self.take_pages(plan.decode, count, Holder::Destination(at)) else {
            return Ok(());
        };
        let by_number = self.chance.one_in(3);
        let any = self.chance.below(layout.pages().into()) as u32;
        let Some(process) = &self.nodes[plan.decode].process else { return Ok(()) };
        // An allocator that hands out a page too early is stopped.
        let is_home = process.watch.lock().ledger.home().contains(&any);
        if !is_home && !pages.contains(&any) && process.pool.adopt(&[any]).is_ok() {
            return broken(Rule::Pool, format!("page {any} was given out twice"));
        }
        let set = match process.pool.adopt(&pages) {
            Ok(set) => set,
            Err(error) => return broken(Rule::Pool, format!("pages that are home: {error}")),
        };
        for layer in layout.layers() {
            for_each_token(process, &pages, first_page, |page, in_page, token| {
                process.write(layer, page, in_page, &room::content(plan.salt ^ BEFORE, layer, token));
            });
        }
        let peer = match process.peers.get(&plan.prefill).filter(|_| !by_number) {
            Some(peer) => *peer,
            None => Peer::node(number(plan.prefill)),
        };
        let request = ReceiveRequest {
            peer,
            room: plan.number,
            use_count: plan.use_count,
            tokens: plan.tokens,
            skip_tokens: plan.skip_tokens,
            pages: set,
            deadline: Duration::from_nanos(plan.decode_duration_ns),
        };
        // Each side may lack the first layer or the last.
        let (ours, theirs) = (layout.layers(), self.scenario.nodes[plan.prefill].layout.layers());
        let both = ours.start.max(theirs.start)..ours.end.min(theirs.end);
        let request = GatherRequest { layers: Some(both), ..request.into() };
        let asked = match plan.is_pull {
            true => process.handle.fetch(request),
            false => process.handle.receive(request),
        };
        let Ok(receiving) = asked else {
            // The pages went back with the request.
            process.watch.lock().ledger.give(&pages, Holder::Home);
            let later_ns = self.now_ns + 20 * US;
            self.schedule(later_ns, Event::OpenDecode(at));
            return Ok(());
        };
        let side = self.side(plan.decode, pages, plan.decode_duration_ns);
        self.log(|| format!("room {at}: decode opens on node {} in pages {:?}", plan.decode, side.pages));
        self.rooms[at].decode = Some(Decode { side, receiving, arrivals: 0, is_careless: false });
        self.nodes[plan.decode].sides.push((at, Part::Decode));
        self.ring(plan.decode);
        Ok(())
    }

    pub fn open_prefill(&mut self, at: usize) -> Held {
        let plan = self.rooms[at].plan.clone();
        if !self.runs(plan.prefill, Event::OpenPrefill(at)) {
            return Ok(());
        }
        let layout = self.scenario.nodes[plan.prefill].layout.clone();
        let count = layout.pages_for(plan.prefill_tokens);
        let Some(pages) = self.take_pages(plan.prefill, count, Holder::Source(at)) else { return Ok(()) };
        let Some(process) = &self.nodes[plan.prefill].process else { return Ok(()) };
        let set = match process.pool.adopt(&pages) {
            Ok(set) => set,
            Err(error) => return broken(Rule::Pool, format!("pages that are home: {error}")),
        };
        let (room, use_count) = (plan.number, plan.use_count);
        let (tokens, deadline) = (plan.prefill_tokens, Duration::from_nanos(plan.prefill_duration_ns));
        let asked = if plan.is_pull {
            for layer in layout.layers() {
                for_each_token(process, &pages, 0, |page, in_page, token| {
                    process.write(layer, page, in_page, &room::content(plan.salt, layer, token));
                });
            }
            let aux = plan.salt.to_le_bytes().to_vec();
            let request = ServeRequest { room, use_count, tokens, pages: set.share(), aux, deadline };
            process.handle.serve(request).map(PrefillTicket::Serving)
        } else {
            let request = SendRequest { room, use_count, tokens, pages: set.share(), deadline };
            process.handle.open(request).map(PrefillTicket::Sending)
        };
        let Ok(ticket) = asked else {
            process.watch.lock().ledger.give(&pages, Holder::Home);
            let later_ns = self.now_ns + 20 * US;
            self.schedule(later_ns, Event::OpenPrefill(at));
            return Ok(());
        };
        let side = self.side(plan.prefill, pages, plan.prefill_duration_ns);
        self.log(|| format!("room {at}: prefill opens on node {} with pages {:?}", plan.prefill, side.pages));
        self.rooms[at].prefill = Some(Prefill { side, ticket });
        self.nodes[plan.prefill].sides.push((at, Part::Prefill));
        if !plan.is_pull {
            let later_ns = self.now_ns + self.chance.below(60 * US);
            self.schedule(later_ns, Event::Step(at));
        }
        self.ring(plan.prefill);
        Ok(())
    }

    fn side(&self, node: usize, pages: Vec<u32>, duration_ns: u64) -> Side {
        Side {
            node,
            life: self.nodes[node].life,
            pages,
            opened_ns: self.now_ns,
            duration_ns,
            deadline_ns: None,
            told: None,
            is_settled: false,
        }
    }

    /// The prefill's user has computed some more, or all.
    pub fn step_room(&mut self, at: usize) -> Held {
        let node = self.rooms[at].plan.prefill;
        if !self.runs(node, Event::Step(at)) {
            return Ok(());
        }
        let Room { plan, prefill: Some(prefill), .. } = &mut self.rooms[at] else { return Ok(()) };
        let Some(process) = self.nodes[node].process.as_ref().filter(|_| prefill.side.told.is_none()) else {
            return Ok(());
        };
        let PrefillTicket::Sending(sending) = &mut prefill.ticket else { return Ok(()) };
        if self.nodes[node].life != prefill.side.life {
            return Ok(());
        }
        let sent = match plan.steps.front() {
            Some((layers, tokens)) => {
                for layer in layers.clone() {
                    for_each_token(process, &prefill.side.pages, 0, |page, in_page, token| {
                        if tokens.contains(&token) {
                            process.write(layer, page, in_page, &room::content(plan.salt, layer, token));
                        }
                    });
                }
                sending.send(layers.clone(), tokens.clone())
            }
            None => sending.finish(plan.salt.to_le_bytes().to_vec()),
        };
        let is_finished = plan.steps.is_empty() && sent.is_ok();
        let next_ns = match sent {
            Ok(()) => plan.steps.pop_front().map(|_| self.now_ns + self.chance.below(plan.step_ns)),
            Err(SendError::NotTaken(_)) => Some(self.now_ns + 20 * US),
            Err(error) => return broken(Rule::Accused, format!("room {at}: {error}")),
        };
        if let Some(next_ns) = next_ns {
            if self.scenario.is_scribbled {
                let soon_ns = self.now_ns + self.chance.below(next_ns - self.now_ns + 1);
                self.schedule(soon_ns, Event::Scribble(at));
            }
            self.schedule(next_ns, Event::Step(at));
        }
        if is_finished && self.chance.one_in(2 * self.scenario.cancel_one_in) {
            // So that the cancel and the delivery cross.
            let soon_ns = self.now_ns + self.chance.below(5 * self.scenario.fabric.delay.most_ns);
            self.rooms[at].plan.is_cancelled = true;
            self.schedule(soon_ns, Event::Cancel(at, Part::Prefill));
        }
        self.ring(node);
        Ok(())
    }

    pub fn cancel(&mut self, at: usize, part: Part) {
        let Some(side) = self.rooms[at].side(part) else { return };
        let (node, life) = (side.node, side.life);
        if !self.is_life(node, life) || !self.runs(node, Event::Cancel(at, part)) {
            return;
        }
        let room = &self.rooms[at];
        let asked = match part {
            Part::Decode => room.decode.as_ref().is_some_and(|decode| decode.receiving.cancel().is_ok()),
            Part::Prefill => room.prefill.as_ref().is_some_and(|prefill| prefill.ticket.cancel()),
        };
        if !asked {
            let later_ns = self.now_ns + 20 * US;
            return self.schedule(later_ns, Event::Cancel(at, part));
        }
        self.log(|| format!("room {at}: {part:?} is cancelled"));
        self.ring(node);
    }

    /// The prefill's user changes a token that was sent already, which it must not; but before the room is finished,
    /// so that checksums are of what is there now.
    pub fn scribble(&mut self, at: usize) {
        let Room { plan, prefill: Some(prefill), .. } = &mut self.rooms[at] else { return };
        let (node, life) = (prefill.side.node, prefill.side.life);
        let Some(process) = self.nodes[node].process.as_ref().filter(|_| self.nodes[node].life == life)
        else {
            return;
        };
        let is_next = |layer: u32, token: u32| {
            plan.steps.iter().any(|(layers, tokens)| layers.contains(&layer) && tokens.contains(&token))
        };
        let layers: Vec<u32> = process.layout.layers().collect();
        // The last step is left to be done, and the finish after it.
        if plan.steps.is_empty() || prefill.side.told.is_some() {
            return;
        }
        let chance = &mut self.chance;
        let mut any = || (*chance.pick(&layers), chance.below(u64::from(plan.prefill_tokens)) as u32);
        let sent = (0..8).map(|_| any()).find(|&(layer, token)| !is_next(layer, token));
        let Some((layer, token)) = sent else {
            let later_ns = self.now_ns + 20 * US;
            return self.schedule(later_ns, Event::Scribble(at));
        };
        let per_page = process.layout.page_tokens();
        let page = prefill.side.pages[(token / per_page) as usize];
        process.write(layer, page, token % per_page, &room::content(plan.salt ^ SCRIBBLED, layer, token));
        plan.scribbles.insert((layer, token));
        self.log(|| format!("room {at}: layer {layer} token {token} is changed"));
    }
}

/// Goes through the places of tokens in pages: page, token in it, token of the request.
pub fn for_each_token(
    process: &Process,
    pages: &[u32],
    first_page: u32,
    mut each: impl FnMut(u32, u32, u32),
) {
    let per_page = process.layout.page_tokens();
    for (at, &page) in (first_page..).zip(pages) {
        for in_page in 0..per_page {
            each(page, in_page, at * per_page + in_page);
        }
    }
}
