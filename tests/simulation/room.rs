//! Rooms as their users see them: what is planned, what was opened, what was told.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use crossdock_engine::Abandoned;
use crossdock_kv::{Ended, Receiving, Sending, Serving};
use crossdock_memory::PageRef;
use crossdock_proto::{End, Who};

use crate::chance::Chance;
use crate::scenario::{MS, US};

/// Which side of a room, and which of its ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Decode(usize),
    Prefill(usize),
}

/// One request's hand-over, between one rank and another, or several.
pub struct Room {
    pub plan: Plan,
    /// Those of the plan's ranks that have been opened.
    pub decodes: Vec<Option<Decode>>,
    pub prefills: Vec<Option<Prefill>>,
}

/// What the users are going to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub number: u64,
    pub use_count: u32,
    pub is_pull: bool,
    pub decodes: Vec<Seat>,
    pub prefills: Vec<Seat>,
    pub tokens: u32,
    /// The prefill side believes in so many.
    pub prefill_tokens: u32,
    pub skip_tokens: u32,
    /// The bytes follow from it.
    pub salt: u64,
    /// A room that had the same name, and came to nothing.
    pub again: Option<usize>,
    pub is_tried_again: bool,
    /// How long the prefills compute at most before the next step.
    pub step_ns: u64,
    /// How long they compute at most in all.
    pub computes_ns: u64,
    /// What each prefill rank does meanwhile.
    pub computing: Vec<Computing>,
}

/// A rank's place in a room.
#[derive(Clone, Debug)]
pub struct Seat {
    pub node: usize,
    /// With which ranks of the other side it has a share.
    pub peers: Vec<usize>,
    pub duration_ns: u64,
    /// Its user cancels it.
    pub is_cancelled: bool,
}

#[derive(Clone, Debug)]
pub struct Computing {
    /// What a push sends, in order.
    pub steps: VecDeque<(Range<u32>, Range<u32>)>,
    /// Tokens that the user has changed after they were sent and before the room was finished.
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
    /// The user has let go of the ticket for the pages.
    pub is_careless: bool,
}

pub struct Prefill {
    pub side: Side,
    pub ticket: PrefillTicket,
    /// Pages that its user has, and has not yet given to the room.
    pub to_come: Option<PageRef>,
}

pub enum PrefillTicket {
    Sending(Sending),
    Serving(Serving),
}

impl Room {
    pub fn new(plan: Plan) -> Self {
        let decodes = plan.decodes.iter().map(|_| None).collect();
        let prefills = plan.prefills.iter().map(|_| None).collect();
        Self { plan, decodes, prefills }
    }

    pub fn side(&self, part: Part) -> Option<&Side> {
        match part {
            Part::Decode(nth) => self.decodes[nth].as_ref().map(|decode| &decode.side),
            Part::Prefill(nth) => self.prefills[nth].as_ref().map(|prefill| &prefill.side),
        }
    }

    pub fn side_mut(&mut self, part: Part) -> Option<&mut Side> {
        match part {
            Part::Decode(nth) => self.decodes[nth].as_mut().map(|decode| &mut decode.side),
            Part::Prefill(nth) => self.prefills[nth].as_mut().map(|prefill| &mut prefill.side),
        }
    }

    /// How one side ended, if it was opened and has.
    pub fn end(&self, part: Part) -> Option<&End> {
        self.side(part)?.told.as_ref().map(|(_, end)| end)
    }
}

impl Plan {
    pub fn parts(&self) -> impl Iterator<Item = Part> + use<> {
        let decodes = (0..self.decodes.len()).map(Part::Decode);
        decodes.chain((0..self.prefills.len()).map(Part::Prefill))
    }

    pub fn seat(&self, part: Part) -> &Seat {
        match part {
            Part::Decode(nth) => &self.decodes[nth],
            Part::Prefill(nth) => &self.prefills[nth],
        }
    }

    pub fn seat_mut(&mut self, part: Part) -> &mut Seat {
        match part {
            Part::Decode(nth) => &mut self.decodes[nth],
            Part::Prefill(nth) => &mut self.prefills[nth],
        }
    }

    /// Where a side is.
    pub fn node(&self, part: Part) -> usize {
        self.seat(part).node
    }

    /// Those with which a side has a share.
    pub fn peers(&self, part: Part) -> impl Iterator<Item = Part> {
        let of_peer = move |&nth: &usize| match part {
            Part::Decode(_) => Part::Prefill(nth),
            Part::Prefill(_) => Part::Decode(nth),
        };
        self.seat(part).peers.iter().map(of_peer)
    }

    /// Whether a side has several shares, each of which ends by itself.
    pub fn is_shared(&self, part: Part) -> bool {
        self.seat(part).peers.len() > 1
    }

    /// The decode rank that is at a node.
    pub fn decode_at(&self, node: usize) -> Option<Part> {
        self.decodes.iter().position(|seat| seat.node == node).map(Part::Decode)
    }

    /// Whether the bytes of a side's shares were changed while they moved.
    pub fn is_scribbled(&self, part: Part) -> bool {
        let is_scribbled = |nth: &usize| !self.computing[*nth].scribbles.is_empty();
        match part {
            Part::Decode(nth) => self.decodes[nth].peers.iter().any(is_scribbled),
            Part::Prefill(nth) => is_scribbled(&nth),
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
