//! What a node keeps of each token, and where: the harness's own view of a cache.

use std::ops::Range;

use crossdock_kv::{CacheKind, CacheLayout, ContextShare};
use crossdock_memory::{AllocateOptions, Memory};

use crate::chance::mix;

/// What one token has in one layer, all ranks together.
pub const TOKEN_BYTES: usize = 12;

/// The bytes of a token in a layer.
pub type Content = [u8; TOKEN_BYTES];

/// The bytes of a token.
pub fn content(salt: u64, layer: u32, token: u32) -> Content {
    let first = mix(salt ^ mix(u64::from(layer) << 32 | u64::from(token)));
    let mut bytes = [0; TOKEN_BYTES];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&mix(first).to_le_bytes()[..TOKEN_BYTES - 8]);
    bytes
}

/// The salts of what was in the destination before, and of what the prefill's user wrote late.
pub const BEFORE: u64 = 0xbef0;
pub const SCRIBBLED: u64 = 0x5c81;

/// A process's cache: its layout and the memory of it.
pub struct Cache {
    pub layout: CacheLayout,
    pub memory: Vec<Memory>,
    pieces: Vec<Piece>,
}

/// Some of a token's bytes, which a head of a part of the cache keeps.
struct Piece {
    part: usize,
    head: u32,
    at: Range<usize>,
}

impl Cache {
    pub fn new(layout: CacheLayout) -> Self {
        let regions = layout.buffers().map(|buffer| buffer.region + 1).max().unwrap_or(0);
        let allocate = |region| {
            let bytes = layout.bytes_needed(region) as usize;
            Memory::allocate(bytes, &AllocateOptions::default()).expect("a little memory")
        };
        let memory = (0..regions).map(allocate).collect();
        let pieces = pieces(&layout);
        Self { layout, memory, pieces }
    }

    /// Goes through the places of tokens in pages: page, token in it, token of the request.
    pub fn for_each_token(&self, pages: &[u32], first_page: u32, mut each: impl FnMut(u32, u32, u32)) {
        let (per_page, context) = (self.layout.page_tokens(), self.layout.context());
        for (at, &page) in (first_page..).zip(pages) {
            for in_page in 0..per_page {
                each(page, in_page, token_at(&context, at * per_page + in_page));
            }
        }
    }

    /// Writes what is kept here of a token.
    pub fn write(&self, layer: u32, page: u32, token_in_page: u32, bytes: &Content) {
        for piece in &self.pieces {
            let (memory, offset) = self.place(piece, layer, page, token_in_page);
            memory.write(offset, &bytes[piece.at.clone()]).expect("within the region");
        }
    }

    /// What is kept here of a token; zeros where others keep it.
    pub fn read(&self, layer: u32, page: u32, token_in_page: u32) -> Content {
        let mut found = [0; TOKEN_BYTES];
        for piece in &self.pieces {
            let (memory, offset) = self.place(piece, layer, page, token_in_page);
            memory.read(offset, &mut found[piece.at.clone()]).expect("within the region");
        }
        found
    }

    /// Makes sure that nobody relies any more on what is in these pages.
    pub fn poison(&self, pages: &[u32]) {
        for part in self.layout.tokens().parts() {
            let page_bytes = vec![0xee; part.page_bytes() as usize];
            for (&layer, buffer) in part.layers().iter().zip(part.buffers()) {
                for &page in pages {
                    let offset = part.page_layout(layer).and_then(|at| at.page_offset(page)).expect("a page");
                    let memory = &self.memory[buffer.region as usize];
                    memory.write(offset as usize, &page_bytes).expect("within the region");
                }
            }
        }
    }

    fn place(&self, piece: &Piece, layer: u32, page: u32, token_in_page: u32) -> (&Memory, usize) {
        let part = &self.layout.tokens().parts()[piece.part];
        let buffer = part.buffer(layer).expect("a layer of this node");
        let offset = part.offset(layer, page, token_in_page, piece.head).expect("a page");
        (&self.memory[buffer.region as usize], offset as usize)
    }
}

/// A latent is all of a token's bytes; keys and values are halves, of which each head has its share.
fn pieces(layout: &CacheLayout) -> Vec<Piece> {
    let CacheKind::Heads { heads, head_bytes, .. } = layout.kind() else {
        return vec![Piece { part: 0, head: 0, at: 0..TOKEN_BYTES }];
    };
    let bytes = head_bytes as usize;
    let of_part = |part: usize| {
        (heads.first..heads.first + heads.count).map(move |head| {
            let from = (part * heads.of as usize + head as usize) * bytes;
            Piece { part, head, at: from..from + bytes }
        })
    };
    (0..2).flat_map(of_part).collect()
}

/// Which of a token's bytes somebody keeps.
#[derive(Clone, Copy)]
pub struct Mask(Content);

impl Mask {
    pub fn of(layout: &CacheLayout) -> Self {
        let mut mask = [0; TOKEN_BYTES];
        pieces(layout).into_iter().for_each(|piece| mask[piece.at].fill(0xff));
        Self(mask)
    }

    pub fn and(self, other: Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] & other.0[at]))
    }

    pub fn without(self, other: Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] & !other.0[at]))
    }

    /// Whether two tokens are alike in these bytes.
    pub fn is_alike(self, one: &Content, other: &Content) -> bool {
        (0..TOKEN_BYTES).all(|at| (one[at] ^ other[at]) & self.0[at] == 0)
    }

    /// Whether each of these bytes is that of one of the two.
    pub fn is_mixture(self, found: &Content, one: &Content, other: &Content) -> bool {
        let is_either = |at: usize| found[at] == one[at] || found[at] == other[at];
        (0..TOKEN_BYTES).all(|at| self.0[at] == 0 || is_either(at))
    }
}

/// Whether a token of a request is kept by who shares a context so.
pub fn holds(context: &ContextShare, token: u32) -> bool {
    context.next_run(token).0 == u64::from(token)
}

/// Which token of a request is in this place of those that are kept.
fn token_at(context: &ContextShare, place: u32) -> u32 {
    let (turn, round) = (context.interleave, context.interleave * context.ranks);
    place / turn * round + context.rank * turn + place % turn
}
