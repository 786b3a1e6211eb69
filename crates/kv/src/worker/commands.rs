//! What users ask for.

use crossdock_memory::PageRef;
use crossdock_proto::{LinkCause, Misfit, RoomId, SessionEnd};

use super::Worker;
use super::notices::same_tokens;
use super::opening::{Asked, Offer};
use super::room::{Item, Kind, MAX_ITEMS, Room};
use crate::request::{Command, ScatterServeRequest};

impl Worker {
    pub(super) fn take_commands(&mut self, now: u64) -> bool {
        for taken in 0..COMMANDS {
            let Some(command) = self.shared.next() else { return taken > 0 };
            self.command(now, command);
        }
        true
    }

    fn command(&mut self, now: u64, command: Command) {
        match command {
            Command::Connect { up, .. } if self.targets.len() >= self.max_targets => {
                let cause = LinkCause::Limit { what: "dialed addresses", limit: self.max_targets as u64 };
                self.tell(up, Err(SessionEnd::Unreachable { cause }));
            }
            Command::Connect { key, address, up } => {
                let target = self.engine.proto().connect(now, address.as_str());
                self.targets.insert(key, target);
                self.addresses.insert(target, address);
                self.dialing.insert(target, up);
            }
            Command::Disconnect { key } => {
                if let Some(target) = self.targets.remove(&key) {
                    self.dialing.remove(&target);
                    self.addresses.remove(&target);
                    self.engine.proto().disconnect(now, target);
                }
            }
            Command::Receive { key, request, asked_ns, pull, told } => {
                self.open_decode(&Asked { now, key, asked_ns }, request, pull, told);
            }
            Command::Open { key, request, is_ahead, asked_ns, end } => {
                self.open_prefill(&Asked { now, key, asked_ns }, request, &Offer::Send { is_ahead }, end);
            }
            Command::AddPages { key, pool, pages } => self.add_pages(key, pool, &pages),
            Command::Send { key, layers, tokens } => self.send(now, key, &Item { layers, tokens }),
            Command::Finish { key, aux } => self.finish(now, key, &aux),
            Command::Serve { key, request, asked_ns, end } => {
                let ScatterServeRequest { request, aux } = request;
                self.open_prefill(&Asked { now, key, asked_ns }, request, &Offer::Serve { aux }, end);
            }
            Command::Cancel { key } => self.cancel(now, key),
            Command::Stats { told } => {
                let stats = self.stats();
                self.tell(told, stats);
            }
            Command::Flight { told } => self.ask_for_dump(told),
            Command::Stop => self.stopped = true,
        }
    }

    /// More of a pool's pages are known.
    fn add_pages(&mut self, key: u64, pool: usize, pages: &PageRef) {
        for nth in 0..self.shares(key) {
            let Some((id, room)) = self.share_of(key, nth) else { continue };
            if room.pool == pool
                && let Kind::Sending(sending) = &mut room.kind
            {
                sending.pages.extend_from_slice(pages.ids());
                self.engine.proto().add_pages(id, pages.clone());
            }
        }
    }

    /// Sends a piece of the tokens to every rank.
    fn send(&mut self, now: u64, key: u64, item: &Item) {
        for nth in 0..self.shares(key) {
            let Some((id, room)) = self.share_of(key, nth) else { continue };
            if room.pool > 0 {
                continue;
            }
            if let Kind::Sending(sending) = &mut room.kind {
                match sending.add(item.clone()) {
                    true => self.wake(id),
                    false => {
                        let misfit = Misfit::TooManyPieces { limit: MAX_ITEMS };
                        self.engine.proto().mismatch(now, id, misfit);
                    }
                }
            }
        }
    }

    /// Nothing more of the tokens comes: what is kept beside them is whole now, and leaves, too.
    fn finish(&mut self, now: u64, key: u64, aux: &[u8]) {
        let layers = self.layout.layers();
        for nth in 0..self.shares(key) {
            let Some((id, room)) = self.share_of(key, nth) else { continue };
            let pool = room.pool;
            if let Kind::Sending(sending) = &mut room.kind {
                // Of entries, all pages are known now.
                let tokens = *sending.tokens.get_or_insert(sending.pages.len() as u32);
                if pool > 0 {
                    sending.add(Item { layers: layers.clone(), tokens: 0..tokens });
                }
                sending.finish = Some(if pool == 0 { aux.to_vec() } else { Vec::new() });
                // Until then the peer's number stood for it.
                match sending.run.as_ref().map_or(Ok(()), |run| same_tokens(tokens, run.ask.tokens)) {
                    Ok(()) => self.wake(id),
                    Err(misfit) => self.engine.proto().mismatch(now, id, misfit),
                }
            }
        }
    }

    pub(super) fn cancel(&mut self, now: u64, key: u64) {
        let shares = self.wholes.get(&key).map(|whole| whole.shares.clone());
        for share in shares.into_iter().flatten() {
            self.engine.proto().cancel(now, share);
        }
    }

    /// Of how many shares a room consists, those that are over included.
    fn shares(&self, key: u64) -> usize {
        self.wholes.get(&key).map_or(0, |whole| whole.shares.len())
    }

    /// The share of a room that was opened as the `nth`, if it is still known.
    fn share_of(&mut self, key: u64, nth: usize) -> Option<(RoomId, &mut Room)> {
        let id = *self.wholes.get(&key)?.shares.get(nth)?;
        Some((id, self.rooms.get_mut(&id)?))
    }
}

/// Commands taken in one turn.
const COMMANDS: usize = 256;
