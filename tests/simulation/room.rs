//! Rooms as their users see them: what is planned, what was opened, what was told.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use crossdock_engine::Abandoned;
use crossdock_kv::{Ended, Receiving, Sending, Serving};
use crossdock_proto::{End, Who};

use crate::chance::{Chance, mix};
use crate::scenario::{MS, US};

/// One request's hand-over.
pub struct Room {
    pub plan: Plan,
    pub decode: Option<Decode>,
    pub prefill: Option<Prefill>,
}

/// What the two users are going to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub number: u64,
    pub use_count: u32,
    pub is_pull: bool,
    pub decode: usize,
    pub prefill: usize,
    pub tokens: u32,
    /// The prefill side believes in so many.
    pub prefill_tokens: u32,
    pub skip_tokens: u32,
    /// The bytes follow from it.
    pub salt: u64,
    pub decode_duration_ns: u64,
    pub prefill_duration_ns: u64,
    /// A side that is cancelled by its user.
    pub is_cancelled: bool,
    /// The user of the decode side lets go of the ticket for the pages.
    pub is_careless: bool,
    /// A room that had the same name, and came to nothing.
    pub again: Option<usize>,
    pub is_tried_again: bool,
    /// How long the prefill computes at most before the next step.
    pub step_ns: u64,
    /// How long it computes at most in all.
    pub computes_ns: u64,
    /// What the push sends, in order.
    pub steps: VecDeque<(Range<u32>, Range<u32>)>,
    /// Tokens that the prefill's user has changed after they were sent and before the room was finished.
    pub scribbles: BTreeSet<(u32, u32)>,
}

/// What both sides have in common.
pub struct Side {
    pub node: usize,
    pub life: u64,
    pub pages: Vec<u32>,
    pub opened_ns: u64,
    pub duration_ns: u64,
    /// Counted from the turn that took the command.
    pub deadline_ns: Option<u64>,
    pub told: Option<(u64, End)>,
    /// Its pages are home, or its process is gone.
    pub is_settled: bool,
}

pub struct Decode {
    pub side: Side,
    pub receiving: Receiving,
    pub arrivals: u64,
    pub is_careless: bool,
}

pub struct Prefill {
    pub side: Side,
    pub ticket: PrefillTicket,
}

pub enum PrefillTicket {
    Sending(Sending),
    Serving(Serving),
}

impl Room {
    pub fn side(&self, part: crate::node::Part) -> Option<&Side> {
        match part {
            crate::node::Part::Decode => self.decode.as_ref().map(|decode| &decode.side),
            crate::node::Part::Prefill => self.prefill.as_ref().map(|prefill| &prefill.side),
        }
    }

    pub fn side_mut(&mut self, part: crate::node::Part) -> Option<&mut Side> {
        match part {
            crate::node::Part::Decode => self.decode.as_mut().map(|decode| &mut decode.side),
            crate::node::Part::Prefill => self.prefill.as_mut().map(|prefill| &mut prefill.side),
        }
    }

    /// How one side ended, if it was opened and has.
    pub fn end(&self, part: crate::node::Part) -> Option<&End> {
        self.side(part)?.told.as_ref().map(|(_, end)| end)
    }
}

impl Plan {
    /// Where a side is.
    pub fn node(&self, part: crate::node::Part) -> usize {
        match part {
            crate::node::Part::Decode => self.decode,
            crate::node::Part::Prefill => self.prefill,
        }
    }
}

impl PrefillTicket {
    pub fn poll(&mut self) -> Result<Option<Ended>, Abandoned> {
        match self {
            Self::Sending(sending) => sending.end.poll(),
            Self::Serving(serving) => serving.end.poll(),
        }
    }

    pub fn cancel(&self) -> bool {
        match self {
            Self::Sending(sending) => sending.cancel().is_ok(),
            Self::Serving(serving) => serving.cancel().is_ok(),
        }
    }
}

impl Decode {
    /// Lets go of the ticket for the pages.
    pub fn drop_pages_ticket(&mut self) {
        drop(std::mem::take(&mut self.receiving.pages));
        self.is_careless = true;
    }
}

/// How long a side may take.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    Short,
    Medium,
    Long,
}

impl Patience {
    pub const LONG_LEAST_NS: u64 = 20 * MS;

    pub fn duration_ns(self, chance: &mut Chance) -> u64 {
        match self {
            Self::Short => chance.within(20 * US..600 * US),
            Self::Medium => chance.within(MS..6 * MS),
            Self::Long => chance.within(Self::LONG_LEAST_NS..30 * MS),
        }
    }
}

/// What a push sends: layer by layer, chunk by chunk, or in groups of both.
pub fn steps(chance: &mut Chance, layers: Range<u32>, tokens: u32) -> VecDeque<(Range<u32>, Range<u32>)> {
    let layer_groups = cut(chance, layers);
    let chunks = cut(chance, 0..tokens);
    let mut steps = VecDeque::new();
    if chance.one_in(2) {
        for chunk in &chunks {
            steps.extend(layer_groups.iter().map(|layers| (layers.clone(), chunk.clone())));
        }
    } else {
        for layers in &layer_groups {
            steps.extend(chunks.iter().map(|chunk| (layers.clone(), chunk.clone())));
        }
    }
    steps
}

fn cut(chance: &mut Chance, range: Range<u32>) -> Vec<Range<u32>> {
    let mut parts = Vec::new();
    let mut from = range.start;
    while from < range.end {
        let left = u64::from(range.end - from);
        let take = if chance.one_in(2) { left } else { 1 + chance.below(left) } as u32;
        parts.push(from..from + take);
        from += take;
    }
    if parts.is_empty() {
        parts.push(range);
    }
    parts
}

/// What one token has in one layer.
pub const TOKEN_BYTES: usize = 12;

/// The bytes of a token.
pub fn content(salt: u64, layer: u32, token: u32) -> [u8; TOKEN_BYTES] {
    let first = mix(salt ^ mix(u64::from(layer) << 32 | u64::from(token)));
    let mut bytes = [0; TOKEN_BYTES];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&mix(first).to_le_bytes()[..TOKEN_BYTES - 8]);
    bytes
}

/// The salts of what was in the destination before, and of what the prefill's user wrote late.
pub const BEFORE: u64 = 0xbef0;
pub const SCRIBBLED: u64 = 0x5c81;

/// An end, for tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndKind {
    Delivered,
    CancelledHere,
    CancelledByPeer,
    ExpiredHere,
    ExpiredByPeer,
    PeerLost,
    Refused,
    Failed,
}

impl EndKind {
    pub const ALL: [EndKind; 8] = [
        Self::Delivered,
        Self::CancelledHere,
        Self::CancelledByPeer,
        Self::ExpiredHere,
        Self::ExpiredByPeer,
        Self::PeerLost,
        Self::Refused,
        Self::Failed,
    ];

    pub fn of(end: &End) -> Self {
        match end {
            End::Delivered => Self::Delivered,
            End::Cancelled { by: Who::Here } => Self::CancelledHere,
            End::Cancelled { by: Who::Peer } => Self::CancelledByPeer,
            End::Expired { by: Who::Here, .. } => Self::ExpiredHere,
            End::Expired { by: Who::Peer, .. } => Self::ExpiredByPeer,
            End::PeerLost { .. } => Self::PeerLost,
            End::Refused { .. } => Self::Refused,
            _ => Self::Failed,
        }
    }
}
