//! Whether the rules hold.

use crossdock_engine::Abandoned;
use crossdock_memory::{PageSet, PoolError, QuarantineEntry, Until};
use crossdock_proto::{End, Failure, RoomRefusal, SessionEnd, Who};
use crossdock_sim::Landing;
use crossdock_transport::Access;

use crate::chance::mix;
use crate::faults::{Fault, Trouble};
use crate::ledger::Holder;
use crate::node::{self, Part};
use crate::report::Fair;
use crate::room::{self, BEFORE, EndKind, Patience, Room, SCRIBBLED, TOKEN_BYTES};
use crate::rules::{Held, Rule, Violation, broken};
use crate::scenario::{MS, US};
use crate::workload::for_each_token;
use crate::world::World;

impl World {
    /// No byte lands where it must not.
    pub fn check_landings(&mut self) -> Held {
        let mut ghosts = Vec::new();
        for landing in self.fabric.landings() {
            let node = landing.to.0 as usize;
            self.log(|| format!("{landing:?}"));
            let Some(process) = &self.nodes[node].process else { continue };
            if !process.ports.contains(&landing.port) {
                continue;
            }
            let watch = process.watch.lock();
            let Some(pages) = watch.ledger.touched(landing.region, landing.offset, landing.bytes) else {
                return broken(Rule::HomePages, format!("bytes beside all pages: {landing:?}"));
            };
            let rail = process.ports.iter().position(|port| *port == landing.port);
            let is_mapped = rail.is_some_and(|rail| self.scenario.rails[rail].semantics.is_mapped());
            for page in pages {
                self.check_landing(&landing, page.holder, page.grants.contains(&landing.grant))?;
                if let Holder::Destination(at) = page.holder
                    && landing.access == Access::Write
                    && is_mapped
                {
                    let decode = self.rooms[at].decode.as_ref();
                    match decode.and_then(|decode| decode.side.told.as_ref()) {
                        // It troubles the room that it was meant for, too.
                        Some((ended_ns, _)) => ghosts.push((node, landing.from.0 as usize, *ended_ns)),
                        None if page.grants.last() != Some(&landing.grant) => {
                            ghosts.push((node, landing.from.0 as usize, landing.at_ns));
                        }
                        None => {}
                    }
                }
            }
        }
        ghosts.dedup();
        for (node, from, from_ns) in ghosts {
            let (fault, nodes, until_ns) = (Fault::GhostWrite, vec![node, from], self.now_ns);
            self.troubles.push(Trouble { fault, nodes, from_ns, until_ns });
        }
        Ok(())
    }

    /// Notes of which of its limits a node may have come to in a turn in which users have begun so many rooms.
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

    fn check_landing(&self, landing: &Landing, holder: Holder, is_granted: bool) -> Held {
        let Holder::Destination(at) = holder else {
            return broken(Rule::HomePages, format!("in a page that is {holder:?}: {landing:?}"));
        };
        let plan = &self.rooms[at].plan;
        let right_way = match landing.access {
            Access::Write => !plan.is_pull && is_granted,
            Access::Read => plan.is_pull,
        };
        match right_way && plan.prefill == landing.from.0 as usize {
            true => Ok(()),
            false => broken(Rule::HomePages, format!("in a page of room {at}: {landing:?}")),
        }
    }

    /// The clocks of what was asked for since the last turn begin with the turn that takes it.
    pub fn start_deadlines(&mut self, node: usize) -> usize {
        let mut begun = 0;
        for &(room, part) in &self.nodes[node].sides {
            if let Some(side) = self.rooms[room].side_mut(part)
                && side.deadline_ns.is_none()
            {
                side.deadline_ns = Some(self.now_ns + side.duration_ns);
                begun += 1;
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
                Part::Decode => {
                    let decode = room.decode.as_mut().expect("opened");
                    decode
                        .receiving
                        .end
                        .poll()
                        .map(|told| told.map(|received| (received.ended.end, received.aux)))
                }
                Part::Prefill => {
                    let prefill = room.prefill.as_mut().expect("opened");
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
            Part::Decode => {
                self.check_arrivals(node, at)?;
                self.check_home(node, at)
            }
            Part::Prefill => self.check_source(node, at),
        }
    }

    /// A user hears how a room ended.
    fn told(&mut self, at: usize, part: Part, end: &End, aux: &[u8]) -> Held {
        self.log(|| format!("room {at}: {part:?}: {end}"));
        self.fold(mix((at as u64) << 8 | (part as u64) << 4 | EndKind::of(end) as u64));
        self.check_accusation(at, part, end)?;
        self.check_pair(at, part, end)?;
        let plan = &self.rooms[at].plan;
        if part == Part::Decode && *end == End::Delivered && aux != plan.salt.to_le_bytes() {
            return broken(Rule::Bytes, format!("room {at}: {aux:?} came with the pages"));
        }
        Ok(())
    }

    /// Nobody is accused of what nobody has done.
    fn check_accusation(&self, at: usize, part: Part, end: &End) -> Held {
        let plan = &self.rooms[at].plan;
        let is_just = match end {
            End::PeerLost { cause } => match cause {
                SessionEnd::Misbehaved { .. } | SessionEnd::Refused { .. } | SessionEnd::Port(_) => false,
                SessionEnd::ClosedHere => {
                    self.is_closing || self.scenario.faults.contains(&Fault::Disconnect)
                }
                SessionEnd::Silent { .. } => self.was_peer_silent(at, part),
                _ => !self.scenario.is_fair(),
            },
            End::Refused { why: RoomRefusal::Mismatch(_), .. } => plan.tokens != plan.prefill_tokens,
            End::Refused { why: RoomRefusal::Busy, by } => self.was_full(at, part, *by),
            End::Refused { .. } => false,
            End::Failed { cause: Failure::Checksum, .. } => !plan.scribbles.is_empty(),
            End::Failed { cause: Failure::AtPeer, .. } => {
                self.has_ended_so(at, part.other(), |end| matches!(end, End::Failed { by: Who::Here, .. }))
            }
            End::Failed { .. } => false,
            End::Cancelled { by: Who::Here } => plan.is_cancelled,
            _ => true,
        };
        match is_just {
            true => Ok(()),
            false => broken(Rule::Accused, format!("room {at}: {part:?}: {end}")),
        }
    }

    /// Whether a limit of this side, or of its peer, was reached, so that it had to refuse the room.
    fn was_full(&self, at: usize, part: Part, by: Who) -> bool {
        let room = &self.rooms[at];
        let Some(side) = room.side(part) else { return false };
        match by {
            // Who refuses says so at once.
            Who::Here => {
                let full = &self.nodes[side.node].full;
                [full.of_rooms_ns, full.of_grants_ns].contains(&Some(self.now_ns))
            }
            Who::Peer => {
                let is_busy =
                    |end: &End| matches!(end, End::Refused { by: Who::Here, why: RoomRefusal::Busy });
                // A request can be turned away before its room is open there, and nobody there is told.
                let requests_ns = self.nodes[room.plan.node(part.other())].full.of_requests_ns;
                let was_turned_away = part == Part::Decode && requests_ns >= Some(side.opened_ns);
                was_turned_away || self.has_ended_so(at, part.other(), is_busy)
            }
        }
    }

    /// Whether a side of a room, or of one that had its name before and of which a peer may still hear, has ended so.
    fn has_ended_so(&self, at: usize, part: Part, is_so: impl Fn(&End) -> bool) -> bool {
        let mut names = std::iter::successors(Some(at), |&at| self.rooms[at].plan.again);
        names.any(|at| self.rooms[at].end(part).is_some_and(&is_so))
    }

    /// Whether a side had reason to take its peer for dead: a pause of its own is none, and a loop that is held up while
    /// the heart beats on is none either.
    fn was_peer_silent(&self, at: usize, part: Part) -> bool {
        let plan = &self.rooms[at].plan;
        let peer = plan.node(part.other());
        let lately_ns = self.now_ns.saturating_sub(14 * MS);
        let explains = |trouble: &Trouble| match trouble.fault {
            Fault::Stop | Fault::Death | Fault::Leaving => trouble.nodes == [peer],
            Fault::Partition => [plan.decode, plan.prefill].iter().all(|node| trouble.nodes.contains(node)),
            _ => false,
        };
        let is_lossy = self.scenario.fabric.datagram_loss.0 > 0;
        is_lossy || self.troubles.iter().any(|trouble| trouble.until_ns >= lately_ns && explains(trouble))
    }

    /// The ends of the two sides go together.
    fn check_pair(&self, at: usize, part: Part, end: &End) -> Held {
        let room = &self.rooms[at];
        let (decode, prefill) = (room.end(Part::Decode), room.end(Part::Prefill));
        if prefill == Some(&End::Delivered) && decode != Some(&End::Delivered) {
            return broken(Rule::Pairs, format!("room {at}: prefill delivered, decode {decode:?}"));
        }
        if decode == Some(&End::Delivered) && prefill.is_some_and(blames_peer) {
            return broken(Rule::Pairs, format!("room {at}: decode delivered, prefill {prefill:?}"));
        }
        if let (Some(prefill), Some(decode), None) = (prefill, decode, room.plan.again)
            && (contradicts(prefill, decode) || contradicts(decode, prefill))
        {
            return broken(Rule::Pairs, format!("room {at}: prefill {prefill:?}, decode {decode:?}"));
        }
        let other = part.other();
        let is_busy = matches!(end, End::Refused { why: RoomRefusal::Busy, .. });
        // A peer that waited in vain for its own user says so; who was stopped may hear it before its own clock.
        let is_late = room.side(part).is_some_and(|side| side.deadline_ns <= Some(self.now_ns));
        if blames_peer(end) && !is_busy && !is_late {
            let has_ended = match room.side(other) {
                Some(side) => side.told.is_some() || !self.is_life(side.node, side.life),
                None => false,
            };
            // What is heard may be of the room that had this name before.
            if !has_ended && room.plan.again.is_none() {
                return broken(
                    Rule::Pairs,
                    format!("room {at}: {part:?}: {end}, but {other:?} has not ended"),
                );
            }
        }
        Ok(())
    }

    fn check_arrivals(&mut self, node: usize, at: usize) -> Held {
        let decode = self.rooms[at].decode.as_mut().expect("opened");
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

    /// Whether the pages of a decode side have come home, and with what in them.
    fn check_home(&mut self, node: usize, at: usize) -> Held {
        let room = &mut self.rooms[at];
        let decode = room.decode.as_mut().expect("opened");
        if decode.side.is_settled {
            return Ok(());
        }
        let process = self.nodes[node].process.as_ref().expect("runs");
        let is_delivered = matches!(&decode.side.told, Some((_, End::Delivered)));
        let still_out = || match is_delivered {
            true => broken(Rule::Pool, format!("room {at} is delivered, and its pages are not home")),
            false => Ok(()),
        };
        let set = match decode.receiving.pages.poll() {
            Ok(None) => return still_out(),
            Ok(Some(set)) => set,
            // Nobody holds the ticket, or the room was refused at once and the pages were given back.
            Err(Abandoned) => {
                let refused = matches!(
                    &decode.side.told,
                    Some((_, End::Refused { by: Who::Here, .. } | End::PeerLost { .. }))
                );
                if !decode.is_careless && !refused {
                    return broken(Rule::Pool, format!("room {at}: its pages will never be told of"));
                }
                // No pages at all can be taken back at any time.
                if decode.side.told.is_none() {
                    return Ok(());
                }
                match adopt(process.pool.adopt(&decode.side.pages))? {
                    Some(set) => set,
                    None => return still_out(),
                }
            }
        };
        if set.ids() != decode.side.pages {
            return broken(Rule::Pool, format!("room {at}: {:?} came home, not its pages", set.ids()));
        }
        if decode.side.told.is_none() {
            return broken(Rule::Pool, format!("room {at}: pages came home before its end"));
        }
        decode.side.is_settled = true;
        if is_delivered {
            self.check_bytes(node, at)?;
        }
        let pages =
            self.rooms[at].decode.as_ref().map(|decode| decode.side.pages.clone()).unwrap_or_default();
        self.log(|| format!("room {at}: the pages {pages:?} of node {node} are home"));
        let process = self.nodes[node].process.as_ref().expect("runs");
        process.poison(&pages);
        process.watch.lock().ledger.give(&pages, Holder::Home);
        drop(set);
        Ok(())
    }

    /// Whether the source of a room is free again.
    fn check_source(&mut self, node: usize, at: usize) -> Held {
        let prefill = self.rooms[at].prefill.as_mut().expect("opened");
        if prefill.side.told.is_none() {
            return Ok(());
        }
        let process = self.nodes[node].process.as_ref().expect("runs");
        let Some(set) = adopt(process.pool.adopt(&prefill.side.pages))? else { return Ok(()) };
        prefill.side.is_settled = true;
        process.poison(&prefill.side.pages);
        process.watch.lock().ledger.give(&prefill.side.pages, Holder::Home);
        drop(set);
        Ok(())
    }

    /// In a delivered room the bytes are those that were sent, and no others have changed.
    fn check_bytes(&self, node: usize, at: usize) -> Held {
        let Room { plan, decode: Some(decode), .. } = &self.rooms[at] else { return Ok(()) };
        let process = self.nodes[node].process.as_ref().expect("runs");
        let theirs = self.scenario.nodes[plan.prefill].layout.layers();
        let is_verified = self.scenario.nodes[node].verify.covers(plan.number);
        let first_page = plan.skip_tokens / process.layout.page_tokens();
        let mut wrong = None;
        for layer in process.layout.layers() {
            for_each_token(process, &decode.side.pages, first_page, |page, in_page, token| {
                let mut found = [0; TOKEN_BYTES];
                process.read(layer, page, in_page, &mut found);
                let is_sent = theirs.contains(&layer) && (plan.skip_tokens..plan.tokens).contains(&token);
                let sent = room::content(plan.salt, layer, token);
                let is_right = match (is_sent, plan.scribbles.contains(&(layer, token))) {
                    (false, _) => found == room::content(plan.salt ^ BEFORE, layer, token),
                    (true, false) => found == sent,
                    // What was changed after it was sent may have been moved before or after the change, or in part;
                    // but where there is a checksum, it says which.
                    (true, true) => {
                        let changed = room::content(plan.salt ^ SCRIBBLED, layer, token);
                        let either = |at: usize| found[at] == changed[at] || found[at] == sent[at];
                        found == changed || (!is_verified && (0..TOKEN_BYTES).all(either))
                    }
                };
                if !is_right {
                    wrong.get_or_insert((layer, token));
                }
            });
        }
        match wrong {
            None => Ok(()),
            Some((layer, token)) => {
                broken(Rule::Bytes, format!("room {at}: wrong bytes in layer {layer}, token {token}"))
            }
        }
    }

    // --- the end of a run ------------------------------------------------------------------------------------

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
            [Part::Decode, Part::Prefill]
                .into_iter()
                .all(|part| room.side(part).is_none_or(|side| side.is_settled || self.is_excused(at, part)))
        });
        settled && (0..self.nodes.len()).all(|node| self.holds(node) == self.may_hold(node))
    }

    /// Pages that may stay out: a peer that nobody can prove dead could still write them, or read them.
    fn is_excused(&self, at: usize, part: Part) -> bool {
        let room = &self.rooms[at];
        // In a push the prefill side's pages are touched by itself alone, in a pull the decode side's.
        let peer = match part {
            Part::Decode if !room.plan.is_pull => room.plan.prefill,
            Part::Prefill if room.plan.is_pull => room.plan.decode,
            _ => return false,
        };
        let has_ended = room.side(part).is_some_and(|side| side.told.is_some());
        let has_died = self.nodes[peer].life > 1 || self.nodes[peer].process.is_none();
        has_ended && has_died && self.scenario.has_unproven_ports()
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

    fn excused(&self, node: usize) -> usize {
        let sides = self.nodes[node].sides.iter();
        sides.filter(|(room, part)| self.is_excused(*room, *part)).count()
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
            for part in [Part::Decode, Part::Prefill] {
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
            left.push(format!("node {node} holds {holds:?} (rooms, grants, sessions), may {may_hold:?}"));
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
            let sides =
                self.rooms.iter().flat_map(|room| [room.side(Part::Decode), room.side(Part::Prefill)]);
            let ours = sides.flatten().filter(|side| (side.node, side.life) == (node, life));
            let told: Vec<&End> = ours.filter_map(|side| side.told.as_ref()).map(|(_, end)| end).collect();
            let delivered = told.iter().filter(|end| ***end == End::Delivered).count() as u64;
            let undelivered = told.len() as u64 - delivered;
            let Some(process) = &mut self.nodes[node].process else { continue };
            let counters = process.worker.stats().counters;
            // What is refused before it becomes a room is told, but not counted.
            if counters.delivered != delivered || counters.undelivered > undelivered {
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
            let (Some(decode), Some(prefill)) = (room.side(Part::Decode), room.side(Part::Prefill)) else {
                continue;
            };
            let (Some((decode_ns, decode_end)), Some((prefill_ns, prefill_end))) =
                (&decode.told, &prefill.told)
            else {
                continue;
            };
            let is_busy = |end: &End| matches!(end, End::Refused { why: RoomRefusal::Busy, .. });
            let plan = &room.plan;
            let needed_ns = Patience::LONG_LEAST_NS.max(10 * MS + plan.computes_ns);
            let is_patient = decode.duration_ns.min(prefill.duration_ns) >= needed_ns;
            let is_sound =
                plan.tokens == plan.prefill_tokens && plan.scribbles.is_empty() && plan.again.is_none();
            let ends = format!("room {at}: decode {decode_end:?}, prefill {prefill_end:?}");
            // That a limit was reached, each side has shown when it said so.
            let is_refused = is_busy(decode_end) || is_busy(prefill_end);
            if is_patient && is_sound && !plan.is_cancelled {
                match (decode_end, prefill_end) {
                    (End::Delivered, End::Delivered) => fair.delivered += 1,
                    _ if is_refused => fair.refused += 1,
                    _ => return broken(Rule::FairWeather, format!("not delivered: {ends}")),
                }
            }
            if is_refused {
                continue;
            }
            let first_ns = *decode_ns.min(prefill_ns);
            let opened_ns = decode.opened_ns.max(prefill.opened_ns);
            // Time enough for the one to hear of the other, through streams that are full.
            let known_ns = opened_ns + 20 * self.scenario.fabric.delay.most_ns;
            if known_ns < first_ns && decode_ns.abs_diff(*prefill_ns) > 2 * MS {
                let apart_us = decode_ns.abs_diff(*prefill_ns) / US;
                return broken(Rule::FairWeather, format!("known {apart_us} us apart: {ends}"));
            }
        }
        Ok(fair)
    }
}

/// Pages that somebody still holds are not an error, but anything else is.
fn adopt(adopted: Result<PageSet, PoolError>) -> Result<Option<PageSet>, Violation> {
    match adopted {
        Ok(set) => Ok(Some(set)),
        Err(PoolError::PageInUse { .. } | PoolError::PageInQuarantine { .. }) => Ok(None),
        Err(error) => broken(Rule::Pool, error.to_string()),
    }
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

/// How long after the last fault everything must have come home: the longest deadline, and several times what a
/// handshake, a silence and a pause between two dials take.
const REST_NS: u64 = 120 * MS;
