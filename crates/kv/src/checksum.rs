//! Whether the destination holds the source's bytes, although the two have different pages.
//!
//! The unit is a *block*: the bytes of consecutive tokens that both sides hold, layer after layer, part after part, token
//! after token, head after head. Blocks begin at multiples of their length, counted from the request's first token, so
//! they are the same on both sides.
//!
//! On the wire (little-endian), as part of the message that ends a room:
//!
//! | bytes | field |
//! |---|---|
//! | 1 | version of this table: 1 |
//! | 4, 4 | first layer, end of the layers |
//! | 4, 4 | first token, end of the tokens |
//! | 4 | tokens a block |
//! | 4 × blocks | CRC32C of each block |

mod summing;

use std::num::NonZeroU32;
use std::ops::Range;

use crossdock_memory::{AccessError, Memory};

pub(crate) use self::summing::Summing;
use crate::fields::{Fields, Truncated};
use crate::random::mix;
use crate::{CacheLayout, PageTable, PageTableError};

/// CRC32C sums of what was moved: computed at the source, compared at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksums {
    layers: Range<u32>,
    tokens: Range<u32>,
    block_tokens: u32,
    sums: Vec<u32>,
}

impl Checksums {
    /// There are at most this many blocks; the more tokens, the longer each. So the message stays below 17 kB.
    pub const MAX_BLOCKS: u32 = 4096;
    /// A block holds at least this many tokens, so that small pages do not make a sum for each token.
    pub const MIN_BLOCK_TOKENS: u32 = 64;

    /// Reads the tokens of these layers out of host memory, of what the peer holds, too. `memory` holds the regions that
    /// the table's layout names, in the order of their announcement.
    pub fn compute(
        memory: &[Memory],
        table: &PageTable<'_>,
        peer: &CacheLayout,
        layers: Range<u32>,
        tokens: Range<u32>,
    ) -> Result<Self, ChecksumError> {
        let mut summing = Summing::compute(memory, table, peer, layers, tokens)?;
        let mut all = u64::MAX;
        match summing.advance(memory, table, &mut all) {
            Err(VerifyError::NotComputed(error)) => Err(error),
            // Nothing is compared, so nothing else can be found wrong.
            Ok(_) | Err(_) => Ok(summing.into_sums()),
        }
    }

    /// Compares with what arrived. `layers` and `tokens` are what the room has moved: sums of anything else would
    /// prove nothing.
    pub fn verify(
        &self,
        memory: &[Memory],
        table: &PageTable<'_>,
        peer: &CacheLayout,
        layers: Range<u32>,
        tokens: Range<u32>,
    ) -> Result<(), VerifyError> {
        let mut summing = Summing::compare(self.clone(), memory, table, peer, layers, tokens)?;
        let mut all = u64::MAX;
        summing.advance(memory, table, &mut all).map(|_| ())
    }

    /// Which layers are summed.
    pub fn layers(&self) -> Range<u32> {
        self.layers.clone()
    }

    /// Which tokens are summed.
    pub fn tokens(&self) -> Range<u32> {
        self.tokens.clone()
    }

    /// Appends the sums, as they travel to the destination, to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        let head =
            [self.layers.start, self.layers.end, self.tokens.start, self.tokens.end, self.block_tokens];
        head.iter().chain(&self.sums).for_each(|number| out.extend(number.to_le_bytes()));
    }

    /// Reads a peer's sums.
    pub fn decode(bytes: &[u8]) -> Result<Self, ChecksumDecodeError> {
        let mut fields = Fields(bytes);
        let version = fields.u8("version")?;
        if version != VERSION {
            return Err(ChecksumDecodeError::UnknownVersion { version });
        }
        let layers = fields.u32("first layer")?..fields.u32("end of the layers")?;
        let tokens = fields.u32("first token")?..fields.u32("end of the tokens")?;
        let block_tokens = fields.u32("tokens a block")?;
        if layers.start > layers.end || tokens.start > tokens.end || block_tokens == 0 {
            return Err(ChecksumDecodeError::BadExtent { layers, tokens, block_tokens });
        }
        let expected = blocks(&tokens, block_tokens) as usize;
        let (sums, rest) = fields.0.as_chunks::<4>();
        if sums.len() != expected || !rest.is_empty() {
            return Err(ChecksumDecodeError::BadCount { bytes: fields.0.len(), blocks: expected });
        }
        let sums = sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect();
        Ok(Self { layers, tokens, block_tokens, sums })
    }

    /// What sums of these tokens look like before the first.
    fn empty(table: &PageTable<'_>, layers: Range<u32>, tokens: Range<u32>) -> Self {
        // Where possible a block is a whole number of pages, and so a page has one sum.
        let page_tokens = table.of().page_tokens();
        let mut block_tokens = page_tokens * Self::MIN_BLOCK_TOKENS.div_ceil(page_tokens);
        while blocks(&tokens, block_tokens) > Self::MAX_BLOCKS {
            block_tokens = block_tokens.saturating_mul(2);
        }
        Self { layers, tokens, block_tokens, sums: Vec::new() }
    }

    fn blocks(&self) -> u32 {
        blocks(&self.tokens, self.block_tokens)
    }

    /// The tokens of a block; the first and the last may be cut.
    fn block(&self, nth: u32) -> Range<u32> {
        let start = (self.tokens.start / self.block_tokens + nth) * self.block_tokens;
        start.max(self.tokens.start)..start.saturating_add(self.block_tokens).min(self.tokens.end)
    }
}

/// How many blocks the tokens touch.
fn blocks(tokens: &Range<u32>, block_tokens: u32) -> u32 {
    match tokens.is_empty() {
        true => 0,
        false => (tokens.end - 1) / block_tokens - tokens.start / block_tokens + 1,
    }
}

/// Which rooms are verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Verify {
    /// None.
    #[default]
    Off,
    /// Every one.
    All,
    /// One in so many, chosen by the room's number: every worker that is asked says the same of a room.
    OneIn(NonZeroU32),
}

impl Verify {
    /// Whether this room is verified.
    pub fn covers(self, room: u64) -> bool {
        match self {
            Self::Off => false,
            Self::All => true,
            // Routers may count rooms upwards, so the number is mixed before it chooses.
            Self::OneIn(n) => mix(room).is_multiple_of(u64::from(n.get())),
        }
    }
}

/// Why sums cannot be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChecksumError {
    /// The pages do not hold the tokens.
    #[error(transparent)]
    Pages(PageTableError),
    /// A layer is not held by this worker.
    #[error("layer {layer} is to be summed, layers {}..{} are here", here.start, here.end)]
    LayerNotHere {
        /// The layer to be summed.
        layer: u32,
        /// The layers of the worker.
        here: Range<u32>,
    },
    /// The layout names a region for which no memory was given.
    #[error("no memory was given for region {region}")]
    UnknownRegion {
        /// The region's number.
        region: u32,
    },
    /// The memory is shorter than the layout says, or its device failed.
    #[error(transparent)]
    Access(AccessError),
}

/// Why verification fails.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// Other bytes are here than were sent.
    #[error(
        "tokens {}..{}, from page {page} on: the source's checksum is {expected:#010x}, this side's {found:#010x}",
        tokens.start, tokens.end
    )]
    Mismatch {
        /// In which tokens.
        tokens: Range<u32>,
        /// The destination's page that holds the first of them.
        page: u32,
        /// The source's sum.
        expected: u32,
        /// The sum of what is here.
        found: u32,
    },
    /// The source has summed other layers or tokens than were moved.
    #[error(
        "layers {}..{} of tokens {}..{} were moved, but layers {}..{} of tokens {}..{} are summed",
        layers.start, layers.end, tokens.start, tokens.end,
        summed_layers.start, summed_layers.end, summed_tokens.start, summed_tokens.end
    )]
    OtherExtent {
        /// The layers that were moved.
        layers: Range<u32>,
        /// The tokens that were moved.
        tokens: Range<u32>,
        /// The layers that are summed.
        summed_layers: Range<u32>,
        /// The tokens that are summed.
        summed_tokens: Range<u32>,
    },
    /// This side cannot compute its own sums.
    #[error(transparent)]
    NotComputed(#[from] ChecksumError),
}

/// Why bytes are no sums.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChecksumDecodeError {
    /// They end too early.
    #[error("the checksums end in their {field}")]
    Truncated {
        /// In which field.
        field: &'static str,
    },
    /// The peer speaks another version of the form.
    #[error("checksum version {version} is unknown; {VERSION} is known")]
    UnknownVersion {
        /// Which.
        version: u8,
    },
    /// The ranges run backwards, or blocks hold nothing.
    #[error(
        "layers {}..{} of tokens {}..{} in blocks of {block_tokens} tokens cannot be summed",
        layers.start, layers.end, tokens.start, tokens.end
    )]
    BadExtent {
        /// The layers said to be summed.
        layers: Range<u32>,
        /// The tokens said to be summed.
        tokens: Range<u32>,
        /// The tokens said to be in a block.
        block_tokens: u32,
    },
    /// There is not one sum for each block.
    #[error("{bytes} bytes of sums for {blocks} blocks")]
    BadCount {
        /// How many bytes of sums there are.
        bytes: usize,
        /// How many blocks the ranges make.
        blocks: usize,
    },
}

impl From<Truncated> for ChecksumDecodeError {
    fn from(Truncated { field }: Truncated) -> Self {
        Self::Truncated { field }
    }
}

const VERSION: u8 = 1;
