//! In what a part's pages differ on the two sides.

use crate::CachePart;

/// What the pieces of a part depend on. Parts and layers of one shape have the same pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub source: Side,
    pub destination: Side,
    pub head_bytes: u64,
    /// The heads that both sides hold: the first one, and how many.
    pub first_head: u32,
    pub heads: u32,
}

/// A part's pages on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Side {
    pub stride_bytes: u64,
    pub page_tokens: u32,
    /// How many there are: indices must reach the last.
    pub pages: u32,
    first_head: u32,
    heads: u32,
    /// Each head's tokens follow each other.
    pub is_by_head: bool,
}

impl Shape {
    /// `None` if the two sides hold no head in common.
    pub fn between(source: &CachePart, destination: &CachePart, strides: (u64, u64)) -> Option<Self> {
        let common = source.heads().common(&destination.heads())?;
        Some(Self {
            source: Side::new(source, strides.0),
            destination: Side::new(destination, strides.1),
            head_bytes: source.head_bytes().into(),
            first_head: common.first,
            heads: common.count,
        })
    }

    /// Where the bytes of each head begin in a page on the two sides.
    pub fn strands(&self) -> impl Iterator<Item = (u64, u64)> {
        (self.first_head..self.first_head + self.heads)
            .map(|head| (self.source.head_offset(head, self), self.destination.head_offset(head, self)))
    }
}

impl Side {
    fn new(part: &CachePart, stride_bytes: u64) -> Self {
        Self {
            stride_bytes,
            page_tokens: part.page_tokens(),
            pages: part.pages(),
            first_head: part.heads().first,
            heads: part.heads().count,
            is_by_head: part.is_by_head(),
        }
    }

    /// From one token of a head to the next.
    pub fn token_bytes(&self, shape: &Shape) -> u64 {
        match self.is_by_head {
            true => shape.head_bytes,
            false => shape.head_bytes * u64::from(self.heads),
        }
    }

    /// From the start of a page to the first token of a head.
    fn head_offset(&self, head: u32, shape: &Shape) -> u64 {
        let nth = u64::from(head - self.first_head) * shape.head_bytes;
        if self.is_by_head { nth * u64::from(self.page_tokens) } else { nth }
    }
}
