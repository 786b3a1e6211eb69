//! What a worker knows of one room.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossdock_engine::Engine;
use crossdock_proto::SessionId;

use super::posting::Run;
use super::proof::Proof;
use crate::checksum::Summing;
use crate::params::Ask;

/// A share of a user's room.
pub(super) struct Room {
    pub key: u64,
    /// Of which pool its pages are.
    pub pool: usize,
    /// One a room: everything that is logged of it carries its number.
    pub span: tracing::Span,
    /// Stands in the queue of ready rooms.
    pub is_ready: bool,
    /// Its end has been told.
    pub has_ended: bool,
    pub kind: Kind,
}

impl Room {
    /// The session whose lanes take what it has to post.
    pub fn moves_in(&self) -> Option<SessionId> {
        let run = match &self.kind {
            Kind::Sending(sending) => sending.run.as_ref(),
            Kind::Decode(decode) => decode.reads.as_ref(),
            Kind::Serving(_) => None,
        };
        run.map(|run| run.session)
    }

    /// Lets what is logged of the room name the peer and the transport, now that they are known.
    pub fn records_peer(&self, engine: &mut Engine, session: SessionId) {
        if self.span.is_disabled() {
            return;
        }
        let proto = engine.proto();
        if let (Some((_, peer)), Some(port)) = (proto.peer(session), proto.port(session)) {
            self.span.record("peer", &*peer).record("port", port);
        }
    }
}

pub(super) enum Kind {
    Decode(Decode),
    Sending(SendingRoom),
    Serving(ServingRoom),
}

pub(super) struct Decode {
    pub ask: Ask,
    pub pages: Arc<[u32]>,
    pub aux: Vec<u8>,
    /// Its pages are home.
    pub is_home: bool,
    /// Of the whole room, and how many of them are of this share.
    pub arrivals: Arc<AtomicU64>,
    pub arrived: u64,
    /// A pull's reads.
    pub reads: Option<Run>,
    /// All bytes are here, and are compared with the source's sums.
    pub proof: Option<Proof>,
}

pub(super) struct SendingRoom {
    /// Of the request; entries, of a pool of these: `None` until all their pages are known.
    pub tokens: Option<u32>,
    /// Those that are known so far, of a room that was opened ahead of them.
    pub pages: Vec<u32>,
    /// Everything that was sent so far, in order: it is sent again when a lane is lost. What has been posted is joined
    /// where it can be, so that a room in many chunks stays short.
    pub items: Vec<Item>,
    pub finish: Option<Vec<u8>>,
    pub run: Option<Run>,
}

pub(super) struct ServingRoom {
    pub tokens: u32,
    pub pages: Arc<[u32]>,
    pub aux: Vec<u8>,
    /// What a reader has asked for, or could at the most.
    pub ask: Ask,
    /// A reader has asked for sums.
    pub sums: Option<Summing>,
}

#[derive(Clone)]
pub(super) struct Item {
    pub layers: Range<u32>,
    pub tokens: Range<u32>,
}

impl SendingRoom {
    pub fn new(tokens: Option<u32>, pages: Vec<u32>) -> Self {
        Self { tokens, pages, items: Vec::with_capacity(USUAL_ITEMS), finish: None, run: None }
    }

    /// Adds what is to be sent next; false if the room is in too many pieces.
    pub fn add(&mut self, item: Item) -> bool {
        while self.last_two_may_join()
            && let [.., before, last] = &mut self.items[..]
            && before.join(last)
        {
            self.items.pop();
            if let Some(run) = &mut self.run {
                run.at = run.at.min(self.items.len());
            }
        }
        let fits = self.items.len() < MAX_ITEMS;
        if fits {
            self.items.push(item);
        }
        fits
    }

    /// Both have been posted, or neither has been begun: of an item in between it is noted how far it is.
    pub fn last_two_may_join(&self) -> bool {
        let Some(run) = &self.run else { return true };
        let begun = run.at + usize::from(run.cursor.is_some());
        run.at == self.items.len() || begun + 2 <= self.items.len()
    }
}

impl Item {
    /// Takes the item that was sent right after this one in, if both together are one.
    pub fn join(&mut self, next: &Item) -> bool {
        if self.layers == next.layers && self.tokens.end == next.tokens.start {
            self.tokens.end = next.tokens.end;
        } else if self.tokens == next.tokens && self.layers.end == next.layers.start {
            self.layers.end = next.layers.end;
        } else {
            return false;
        }
        true
    }
}

/// Layers and chunks that one room may have sent.
pub(super) const MAX_ITEMS: usize = 65_536;

/// Room for the chunks that are sent while earlier ones are still being posted.
const USUAL_ITEMS: usize = 64;
