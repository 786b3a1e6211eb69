//! What the users of the nodes do: open rooms, fill and send pages, cancel, write where they should not.

use std::time::Duration;

use crossdock_kv::{
    GatherRequest, Parts, Peer, ScatterRequest, ScatterServeRequest, SendError, Source, SourceRank,
};
use crossdock_sim::NodeId;

use crate::cache::{self, BEFORE, SCRIBBLED};
use crate::ledger::Holder;
use crate::node::{Process, number};
use crate::room::{Decode, Part, Plan, Prefill, PrefillTicket, Room, Side};
use crate::rules::{Held, Rule, broken};
use crate::scenario::US;
use crate::world::{Event, World};

impl World {
    /// Whether the users of a node can do something now. If its process is stopped, they do it later.
    fn runs(&mut self, node: usize, event: Event) -> bool {
        if self.nodes[node].process.is_none() {
            let is_open = matches!(event, Event::Open(..));
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

    pub fn open_decode(&mut self, at: usize, nth: usize) -> Held {
        let plan = self.rooms[at].plan.clone();
        let (part, seat) = (Part::Decode(nth), &plan.decodes[nth]);
        let node = seat.node;
        if !self.runs(node, Event::Open(at, part)) {
            return Ok(());
        }
        let layout = self.scenario.nodes[node].layout.clone();
        let first_page = layout.context().held_before(plan.skip_tokens) / layout.page_tokens();
        let count = layout.pages_for(plan.tokens).saturating_sub(first_page);
        let Some(pages) = self.take_pages(node, count, Holder::Destination(at)) else {
            return Ok(());
        };
        let by_number = self.chance.one_in(3);
        let any = self.chance.below(layout.pages().into()) as u32;
        let Some(process) = &self.nodes[node].process else { return Ok(()) };
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
            process.cache.for_each_token(&pages, first_page, |page, in_page, token| {
                process.cache.write(layer, page, in_page, &cache::content(plan.salt ^ BEFORE, layer, token));
            });
        }
        let request = GatherRequest {
            sources: self.sources(process, &plan, nth, by_number),
            room: plan.number,
            use_count: plan.use_count,
            tokens: plan.tokens,
            skip_tokens: plan.skip_tokens,
            layers: None,
            pages: vec![set],
            deadline: Duration::from_nanos(seat.duration_ns),
        };
        let asked = match plan.is_pull {
            true => process.handle.fetch(request),
            false => process.handle.receive(request),
        };
        let Ok(receiving) = asked else {
            // The pages went back with the request.
            process.watch.lock().ledger.give(&pages, Holder::Home);
            let later_ns = self.now_ns + 20 * US;
            self.schedule(later_ns, Event::Open(at, part));
            return Ok(());
        };
        let side = self.side(node, pages, seat.duration_ns);
        self.log(|| format!("room {at}: {part:?} opens on node {node} in pages {:?}", side.pages));
        self.rooms[at].decodes[nth] = Some(Decode { side, receiving, arrivals: 0, is_careless: false });
        self.nodes[node].sides.push((at, part));
        self.ring(node);
        Ok(())
    }

    /// Whom a decode rank takes a room from, as it names them.
    fn sources(&self, process: &Process, plan: &Plan, nth: usize, by_number: bool) -> Vec<Source> {
        let seat = &plan.decodes[nth];
        let ranks = match &self.scenario.split {
            Some(split) => split.sources(self.scenario.nodes[seat.node].layout.rank(), plan.number),
            None => vec![SourceRank { rank: 0, parts: Parts::All }],
        };
        let source = |(rank, peer): (SourceRank, &usize)| {
            let node = plan.prefills[*peer].node;
            let dialed = process.peers.get(&node).filter(|_| !by_number);
            rank.at(dialed.copied().unwrap_or_else(|| Peer::node(number(node))))
        };
        ranks.into_iter().zip(&seat.peers).map(source).collect()
    }

    pub fn open_prefill(&mut self, at: usize, nth: usize) -> Held {
        let plan = self.rooms[at].plan.clone();
        let (part, seat) = (Part::Prefill(nth), &plan.prefills[nth]);
        let node = seat.node;
        if !self.runs(node, Event::Open(at, part)) {
            return Ok(());
        }
        let layout = self.scenario.nodes[node].layout.clone();
        let count = layout.pages_for(plan.prefill_tokens);
        let Some(pages) = self.take_pages(node, count, Holder::Source(at)) else { return Ok(()) };
        let Some(process) = &self.nodes[node].process else { return Ok(()) };
        let set = match process.pool.adopt(&pages) {
            Ok(set) => set,
            Err(error) => return broken(Rule::Pool, format!("pages that are home: {error}")),
        };
        // One user in three learns its pages while it computes.
        let shared = set.share();
        let is_ahead = !plan.is_pull && plan.salt.is_multiple_of(3);
        let known = if is_ahead { (plan.salt / 3) as usize % (pages.len() + 1) } else { pages.len() };
        let rank_of = |peer: &usize| self.scenario.nodes[plan.decodes[*peer].node].layout.rank();
        let request = ScatterRequest {
            ranks: seat.peers.iter().map(rank_of).collect(),
            room: plan.number,
            use_count: plan.use_count,
            tokens: plan.prefill_tokens,
            pages: vec![shared.prefix(known)],
            deadline: Duration::from_nanos(seat.duration_ns),
        };
        let asked = if plan.is_pull {
            for layer in layout.layers() {
                process.cache.for_each_token(&pages, 0, |page, in_page, token| {
                    process.cache.write(layer, page, in_page, &cache::content(plan.salt, layer, token));
                });
            }
            let aux = plan.salt.to_le_bytes().to_vec();
            process.handle.serve(ScatterServeRequest { request, aux }).map(PrefillTicket::Serving)
        } else if is_ahead {
            process.handle.open_ahead(request).map(PrefillTicket::Sending)
        } else {
            process.handle.open(request).map(PrefillTicket::Sending)
        };
        let Ok(ticket) = asked else {
            process.watch.lock().ledger.give(&pages, Holder::Home);
            let later_ns = self.now_ns + 20 * US;
            self.schedule(later_ns, Event::Open(at, part));
            return Ok(());
        };
        let side = self.side(node, pages, seat.duration_ns);
        self.log(|| format!("room {at}: {part:?} opens on node {node} with pages {:?}", side.pages));
        let to_come = is_ahead.then(|| shared.slice(known..shared.len()));
        self.rooms[at].prefills[nth] = Some(Prefill { side, ticket, to_come });
        self.nodes[node].sides.push((at, part));
        if !plan.is_pull {
            let later_ns = self.now_ns + self.chance.below(60 * US);
            self.schedule(later_ns, Event::Step(at, nth));
        }
        self.ring(node);
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

    /// A prefill's user has computed some more, or all.
    pub fn step_room(&mut self, at: usize, nth: usize) -> Held {
        let node = self.rooms[at].plan.prefills[nth].node;
        if !self.runs(node, Event::Step(at, nth)) {
            return Ok(());
        }
        let Room { plan, prefills, .. } = &mut self.rooms[at];
        let Some(prefill) = &mut prefills[nth] else { return Ok(()) };
        let Some(process) = self.nodes[node].process.as_ref().filter(|_| prefill.side.told.is_none()) else {
            return Ok(());
        };
        let PrefillTicket::Sending(sending) = &mut prefill.ticket else { return Ok(()) };
        if self.nodes[node].life != prefill.side.life {
            return Ok(());
        }
        let steps = &mut plan.computing[nth].steps;
        let added = prefill.to_come.as_ref().map_or(Ok(()), |more| sending.add_pages(0, more.clone()));
        if added.is_ok() {
            prefill.to_come = None;
        }
        let sent = match steps.front() {
            _ if added.is_err() => added,
            Some((layers, tokens)) => {
                for layer in layers.clone() {
                    process.cache.for_each_token(&prefill.side.pages, 0, |page, in_page, token| {
                        if tokens.contains(&token) {
                            let bytes = cache::content(plan.salt, layer, token);
                            process.cache.write(layer, page, in_page, &bytes);
                        }
                    });
                }
                sending.send(layers.clone(), tokens.clone())
            }
            None => sending.finish(plan.salt.to_le_bytes().to_vec()),
        };
        let is_finished = steps.is_empty() && sent.is_ok();
        let next_ns = match sent {
            Ok(()) => steps.pop_front().map(|_| self.now_ns + self.chance.below(plan.step_ns)),
            Err(SendError::NotTaken(_)) => Some(self.now_ns + 20 * US),
            Err(error) => return broken(Rule::Accused, format!("room {at}: {error}")),
        };
        if let Some(next_ns) = next_ns {
            if self.scenario.is_scribbled {
                let soon_ns = self.now_ns + self.chance.below(next_ns - self.now_ns + 1);
                self.schedule(soon_ns, Event::Scribble(at, nth));
            }
            self.schedule(next_ns, Event::Step(at, nth));
        }
        if is_finished && self.chance.one_in(2 * self.scenario.cancel_one_in) {
            // So that the cancel and the delivery cross.
            let soon_ns = self.now_ns + self.chance.below(5 * self.scenario.fabric.delay.most_ns);
            self.rooms[at].plan.prefills[nth].is_cancelled = true;
            self.schedule(soon_ns, Event::Cancel(at, Part::Prefill(nth)));
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
            Part::Decode(nth) => {
                room.decodes[nth].as_ref().is_some_and(|decode| decode.receiving.cancel().is_ok())
            }
            Part::Prefill(nth) => room.prefills[nth].as_ref().is_some_and(|prefill| prefill.ticket.cancel()),
        };
        if !asked {
            let later_ns = self.now_ns + 20 * US;
            return self.schedule(later_ns, Event::Cancel(at, part));
        }
        self.log(|| format!("room {at}: {part:?} is cancelled"));
        self.ring(node);
    }

    /// A prefill's user changes a token that was sent already, which it must not; but before the room is finished,
    /// so that checksums are of what is there now.
    pub fn scribble(&mut self, at: usize, nth: usize) {
        let Room { plan, prefills, .. } = &mut self.rooms[at];
        let Some(prefill) = &prefills[nth] else { return };
        let (node, life) = (prefill.side.node, prefill.side.life);
        let Some(process) = self.nodes[node].process.as_ref().filter(|_| self.nodes[node].life == life)
        else {
            return;
        };
        let computing = &mut plan.computing[nth];
        // The last step is left to be done, and the finish after it.
        if computing.steps.is_empty() || prefill.side.told.is_some() {
            return;
        }
        let is_next = |layer: u32, token: u32| {
            computing.steps.iter().any(|(layers, tokens)| layers.contains(&layer) && tokens.contains(&token))
        };
        let layout = &process.cache.layout;
        let (layers, context): (Vec<u32>, _) = (layout.layers().collect(), layout.context());
        let chance = &mut self.chance;
        let mut any = || (*chance.pick(&layers), chance.below(u64::from(plan.prefill_tokens)) as u32);
        let is_sent = |&(layer, token): &(u32, u32)| cache::holds(&context, token) && !is_next(layer, token);
        let Some((layer, token)) = (0..8).map(|_| any()).find(is_sent) else {
            let later_ns = self.now_ns + 20 * US;
            return self.schedule(later_ns, Event::Scribble(at, nth));
        };
        let (place, per_page) = (context.held_before(token), layout.page_tokens());
        let page = prefill.side.pages[(place / per_page) as usize];
        let bytes = cache::content(plan.salt ^ SCRIBBLED, layer, token);
        process.cache.write(layer, page, place % per_page, &bytes);
        computing.scribbles.insert((layer, token));
        self.log(|| format!("room {at}: layer {layer} token {token} of prefill {nth} is changed"));
    }
}
