//! The pieces of all layers that have the same page strides.

use super::{Pair, Pairs, PlanInput};
use crate::PageTable;

/// The pieces that move in each layer of one pair of page strides, grouped into paged ops.
#[derive(Debug)]
pub(super) struct Geometry {
    source: Grid,
    destination: Grid,
    groups: Vec<Group>,
    /// The index lists of all groups, one group after the other.
    source_indices: Vec<u32>,
    destination_indices: Vec<u32>,
}

/// One op of each layer: pieces of one length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    /// Where its lists begin.
    pub first: u32,
    /// How long they are.
    pub pieces: u32,
    pub piece_bytes: u64,
    /// From the start of the buffer to piece 0.
    pub source_offset: u64,
    pub destination_offset: u64,
}

/// A piece in either buffer, as an op can say it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    tokens: u32,
    source: Place,
    destination: Place,
}

/// So many units from the start of a buffer, and so many tokens.
#[derive(Clone, Copy, Debug)]
struct Place {
    index: u32,
    rest_tokens: u32,
}

impl Geometry {
    pub fn new(input: &PlanInput<'_>, pairs: &Pairs<'_>, (source, destination): (u64, u64)) -> Self {
        let source = Grid::new(&input.source, &input.destination, input.tokens.start, source);
        let destination = Grid::new(&input.destination, &input.source, input.tokens.start, destination);
        let mut pieces = merge(pairs.clone(), &source, &destination);
        // A stable sort keeps the order of the tokens in each group, which is the order in which the receiver's
        // check expects the pages.
        pieces.sort_by_key(Piece::group_key);
        let mut groups: Vec<Group> = Vec::new();
        let mut first = 0;
        for alike in pieces.chunk_by(|one, next| one.group_key() == next.group_key()) {
            let bytes = |tokens| u64::from(tokens) * source.token_bytes;
            groups.push(Group {
                first,
                pieces: alike.len() as u32,
                piece_bytes: bytes(alike[0].tokens),
                source_offset: bytes(alike[0].source.rest_tokens),
                destination_offset: bytes(alike[0].destination.rest_tokens),
            });
            first += alike.len() as u32;
        }
        Self {
            source,
            destination,
            groups,
            source_indices: pieces.iter().map(|piece| piece.source.index).collect(),
            destination_indices: pieces.iter().map(|piece| piece.destination.index).collect(),
        }
    }

    /// The page strides of the layers that this serves.
    pub fn strides(&self) -> (u64, u64) {
        (self.source.stride_bytes, self.destination.stride_bytes)
    }

    /// What the indices of either side count.
    pub fn units(&self) -> (u64, u64) {
        (self.source.unit_bytes, self.destination.unit_bytes)
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    pub fn pieces(&self) -> usize {
        self.source_indices.len()
    }

    /// The index lists of a group, without its first `done` pieces.
    #[inline]
    pub fn indices(&self, group: &Group, done: u64) -> (&[u32], &[u32]) {
        let range = group.first as usize + done as usize..group.first as usize + group.pieces as usize;
        (&self.source_indices[range.clone()], &self.destination_indices[range])
    }
}

impl Piece {
    fn group_key(&self) -> (u32, u32, u32) {
        (self.tokens, self.source.rest_tokens, self.destination.rest_tokens)
    }
}

/// Joins stretches that follow each other in memory on both sides.
fn merge(pairs: Pairs<'_>, source: &Grid, destination: &Grid) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(pairs.at_most());
    let mut expected = None;
    for Pair { source: from, destination: to, tokens } in pairs {
        let bytes = u64::from(tokens) * source.token_bytes;
        let at = (source.byte(from), destination.byte(to));
        match pieces.last_mut() {
            Some(piece) if expected == Some(at) => piece.tokens += tokens,
            _ => {
                pieces.push(Piece { tokens, source: source.place(from), destination: destination.place(to) })
            }
        }
        expected = Some((at.0 + bytes, at.1 + bytes));
    }
    pieces
}

/// How one side says where a piece begins.
#[derive(Clone, Copy, Debug)]
struct Grid {
    stride_bytes: u64,
    token_bytes: u64,
    unit_bytes: u64,
    /// Units from one page to the next, and from one token to the next.
    page_units: u32,
    token_units: u32,
    /// 1 where tokens go into the offset of the op instead, because units cannot express them; otherwise 0.
    rest: u32,
}

impl Grid {
    /// Indices count pages while every piece begins a page. Otherwise they count the largest unit that divides
    /// both the stride and the token, so that pieces that begin at different tokens of their pages still share
    /// an op; unless the pool is so large that such indices do not fit.
    fn new(side: &PageTable<'_>, other: &PageTable<'_>, first_token: u32, stride_bytes: u64) -> Self {
        let token_bytes = side.layout.token_bytes();
        let page_tokens = side.layout.page_tokens();
        let whole_pages = Self {
            stride_bytes,
            token_bytes,
            unit_bytes: stride_bytes,
            page_units: 1,
            token_units: 0,
            rest: 1,
        };
        if first_token.is_multiple_of(page_tokens) && other.layout.page_tokens().is_multiple_of(page_tokens) {
            return whole_pages;
        }
        let unit_bytes = greatest_common_divisor(stride_bytes, token_bytes);
        let last_page_end = u64::from(side.layout.pages()).checked_mul(stride_bytes / unit_bytes);
        if last_page_end.is_none_or(|units| units > u64::from(u32::MAX)) {
            return whole_pages;
        }
        Self {
            stride_bytes,
            token_bytes,
            unit_bytes,
            page_units: (stride_bytes / unit_bytes) as u32,
            token_units: (token_bytes / unit_bytes) as u32,
            rest: 0,
        }
    }

    #[inline]
    fn byte(&self, (page, token): (u32, u32)) -> u64 {
        u64::from(page) * self.stride_bytes + u64::from(token) * self.token_bytes
    }

    #[inline]
    fn place(&self, (page, token): (u32, u32)) -> Place {
        Place { index: page * self.page_units + token * self.token_units, rest_tokens: token * self.rest }
    }
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
