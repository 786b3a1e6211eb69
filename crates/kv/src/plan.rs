//! From two page tables to the fewest ops.

mod geometry;
mod ops;

use std::ops::Range;

use crate::page_table::Walk;
use crate::{LayerBuffer, PageTable, PageTableError};
use geometry::Geometry;

pub use ops::{Cursor, Ops, OpsError, Route};

/// How the tokens of one request move from one worker's cache to another's, whatever their page sizes.
///
/// Built once a request (or a chunk of it). The pieces of memory to be moved are found once and shared by all
/// layers; [`ops`](Plan::ops) then gives the ops of any layers, for any lane, without allocating. A plan is
/// constant and belongs to no thread.
///
/// Neighbours are merged where memory continues on both sides. A layer becomes one op for each length of piece:
/// where a piece begins inside a page, that is folded into the op's index lists, whose unit is then finer than
/// the page.
#[derive(Debug)]
pub struct Plan {
    tokens: Range<u32>,
    token_bytes: u64,
    first_layer: u32,
    /// One for each layer that both workers hold.
    layers: Vec<Layer>,
    geometries: Vec<Geometry>,
    /// No layer names a region from this number on.
    source_regions: u32,
    destination_regions: u32,
    /// A bit for each page of the destination; all are 0 between two looks for duplicates.
    seen: Vec<u64>,
}

/// What a [`Plan`] is made from.
#[derive(Clone, Debug)]
pub struct PlanInput<'a> {
    /// Where the tokens are.
    pub source: PageTable<'a>,
    /// Where they go.
    pub destination: PageTable<'a>,
    /// Which tokens of the request; those before are there already.
    pub tokens: Range<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Layer {
    source: LayerBuffer,
    destination: LayerBuffer,
    geometry: usize,
}

impl Plan {
    /// A plan treats at most this many pairs of page strides; a cache has one or two.
    pub const MAX_GEOMETRIES: usize = 8;

    /// Finds the pieces. Moves those layers that both workers hold.
    pub fn build(input: &PlanInput<'_>) -> Result<Self, PlanError> {
        let mut plan = Self {
            tokens: 0..0,
            token_bytes: 0,
            first_layer: 0,
            layers: Vec::new(),
            geometries: Vec::new(),
            source_regions: 0,
            destination_regions: 0,
            seen: Vec::new(),
        };
        plan.renew(input)?;
        Ok(plan)
    }

    /// Starts over with other tokens or pages, in the memory that the plan has: a chunk of a request for the whole of
    /// which it was built before costs no allocation. After an error the plan is empty.
    pub fn renew(&mut self, input: &PlanInput<'_>) -> Result<(), PlanError> {
        let (source, destination) = (&input.source, &input.destination);
        self.tokens = 0..0;
        self.layers.clear();
        if let Some(key) = source.layout.differs_in(destination.layout) {
            return Err(PlanError::Unbridgeable { key });
        }
        if input.tokens.start > input.tokens.end {
            return Err(PlanError::BadTokens { tokens: input.tokens.clone() });
        }
        let source_pages = source.covering(&input.tokens).map_err(PlanError::Source)?;
        let destination_pages = destination.covering(&input.tokens).map_err(PlanError::Destination)?;
        refuse_duplicates(destination_pages, &mut self.seen)?;

        let pairs = Pairs {
            source: source.walk(source_pages, &input.tokens),
            destination: destination.walk(destination_pages, &input.tokens),
            left: input.tokens.end - input.tokens.start,
        };
        let common = common_layers(input)?;
        let mut found = 0;
        self.layers.reserve(common.len());
        for layer in common.clone() {
            let (Some(from), Some(to)) = (source.layout.buffer(layer), destination.layout.buffer(layer))
            else {
                unreachable!("both layouts hold the common layers");
            };
            let strides = (from.stride_bytes, to.stride_bytes);
            let known = self.geometries[..found].iter().position(|geometry| geometry.strides() == strides);
            if known.is_none() {
                if found == Self::MAX_GEOMETRIES {
                    self.layers.clear();
                    return Err(PlanError::TooManyGeometries { layer });
                }
                match self.geometries.get_mut(found) {
                    Some(geometry) => geometry.renew(input, &pairs, strides),
                    None => self.geometries.push(Geometry::new(input, &pairs, strides)),
                }
                found += 1;
            }
            let geometry = known.unwrap_or(found - 1);
            self.layers.push(Layer { source: from, destination: to, geometry });
        }
        let regions =
            |region: fn(&Layer) -> u32| self.layers.iter().map(region).max().map_or(0, |max| max + 1);
        self.source_regions = regions(|layer| layer.source.region);
        self.destination_regions = regions(|layer| layer.destination.region);
        self.tokens = input.tokens.clone();
        self.token_bytes = source.layout.token_bytes();
        self.first_layer = common.start;
        Ok(())
    }

    /// Which tokens move.
    pub fn tokens(&self) -> Range<u32> {
        self.tokens.clone()
    }

    /// Which layers move, numbered as in the model.
    pub fn layers(&self) -> Range<u32> {
        self.first_layer..self.first_layer + self.layers.len() as u32
    }

    /// How many bytes move in each layer.
    pub fn bytes_per_layer(&self) -> u64 {
        u64::from(self.tokens.end - self.tokens.start) * self.token_bytes
    }

    /// How many bytes move.
    pub fn total_bytes(&self) -> u64 {
        self.bytes_per_layer() * self.layers.len() as u64
    }

    /// How many ops a layer takes; 0 for one that does not move.
    pub fn ops_per_layer(&self, layer: u32) -> usize {
        self.geometry(layer).map_or(0, |geometry| geometry.groups().len())
    }

    /// How many pieces of memory a layer takes; 0 for one that does not move.
    pub fn pieces_per_layer(&self, layer: u32) -> usize {
        self.geometry(layer).map_or(0, |geometry| geometry.pieces())
    }

    fn layer(&self, layer: u32) -> Option<&Layer> {
        self.layers.get(layer.checked_sub(self.first_layer)? as usize)
    }

    fn geometry(&self, layer: u32) -> Option<&Geometry> {
        self.layer(layer).map(|layer| &self.geometries[layer.geometry])
    }
}

/// Both page tables walked at once: the longest stretches of tokens that lie in one page on either side.
#[derive(Clone, Debug)]
struct Pairs<'a> {
    source: Walk<'a>,
    destination: Walk<'a>,
    left: u32,
}

/// A stretch of tokens in one page of the source and one of the destination: page, and token in it.
#[derive(Clone, Copy, Debug)]
struct Pair {
    source: (u32, u32),
    destination: (u32, u32),
    tokens: u32,
}

impl Pairs<'_> {
    /// A stretch ends where a page of either side ends, and has at least one token.
    fn at_most(&self) -> usize {
        (self.source.pages() + self.destination.pages()).min(self.left as usize)
    }
}

impl Iterator for Pairs<'_> {
    type Item = Pair;

    #[inline]
    fn next(&mut self) -> Option<Pair> {
        if self.left == 0 {
            return None;
        }
        let tokens = self.source.left().min(self.destination.left()).min(self.left);
        let pair = Pair { source: self.source.place(), destination: self.destination.place(), tokens };
        self.source.advance(tokens);
        self.destination.advance(tokens);
        self.left -= tokens;
        Some(pair)
    }
}

fn common_layers(input: &PlanInput<'_>) -> Result<Range<u32>, PlanError> {
    let (source, destination) = (input.source.layout.layers(), input.destination.layout.layers());
    let common = source.start.max(destination.start)..source.end.min(destination.end);
    if common.is_empty() {
        return Err(PlanError::NoCommonLayers { source_layers: source, destination_layers: destination });
    }
    Ok(common)
}

/// A page that is listed twice would be written twice, and one of its two stretches of tokens lost. `seen` is all
/// zeroes before and after.
fn refuse_duplicates(pages: &[u32], seen: &mut Vec<u64>) -> Result<(), PlanError> {
    let words = pages.iter().max().map_or(0, |&last| last as usize / 64 + 1);
    if seen.len() < words {
        seen.resize(words, 0);
    }
    let mut again = None;
    for &page in pages {
        let (word, bit) = (&mut seen[page as usize / 64], 1 << (page % 64));
        if *word & bit != 0 {
            again = Some(page);
            break;
        }
        *word |= bit;
    }
    // Of a chunk, only a few words are to be wiped.
    match pages.len() < words {
        true => pages.iter().for_each(|&page| seen[page as usize / 64] = 0),
        false => seen[..words].fill(0),
    }
    match again {
        Some(page) => Err(PlanError::DuplicatePage { page }),
        None => Ok(()),
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The caches hold different things; the handshake refuses such a pair by its fingerprints.
    #[error("the two caches differ in {key}")]
    Unbridgeable {
        /// Which value of the fingerprint differs.
        key: &'static str,
    },
    /// No layer is held by both workers.
    #[error(
        "the source holds layers {}..{}, the destination {}..{}",
        source_layers.start, source_layers.end, destination_layers.start, destination_layers.end
    )]
    NoCommonLayers {
        /// The source's layers.
        source_layers: Range<u32>,
        /// The destination's layers.
        destination_layers: Range<u32>,
    },
    /// The range of tokens ends before it begins.
    #[error("tokens {}..{} are no range", tokens.start, tokens.end)]
    BadTokens {
        /// The range.
        tokens: Range<u32>,
    },
    /// The source's pages do not serve.
    #[error("source: {0}")]
    Source(PageTableError),
    /// The destination's pages do not serve.
    #[error("destination: {0}")]
    Destination(PageTableError),
    /// The destination lists a page twice.
    #[error("destination page {page} is listed twice")]
    DuplicatePage {
        /// The page.
        page: u32,
    },
    /// The layers are laid out in too many different ways.
    #[error("layer {layer} needs more than {} pairs of page strides", Plan::MAX_GEOMETRIES)]
    TooManyGeometries {
        /// The first layer that is too much.
        layer: u32,
    },
}
