//! From two page tables to the fewest ops.

mod geometry;
mod ops;
mod shape;
mod stretches;

use std::ops::Range;

use crate::{LayerBuffer, PageTable, PageTableError};
use geometry::Geometry;
use shape::Shape;
use stretches::Common;

pub use ops::{Cursor, Ops, OpsError, Route};

/// How the tokens of one request move from one worker's cache to another's, whatever their page sizes, and whichever
/// share of the layers, heads and tokens each of them holds: what both hold moves.
///
/// Built once a request (or a chunk of it) and pool. The pieces of memory to be moved are found once and shared by all
/// layers; [`ops`](Plan::ops) then gives the ops of any layers, for any lane, without allocating. A plan is
/// constant and belongs to no thread.
///
/// Neighbours are merged where memory continues on both sides. A layer becomes one op for each length of piece:
/// where a piece begins inside a page, that is folded into the op's index lists, whose unit is then finer than
/// the page. Where the heads of a page lie one after the other, each head has ops of its own, with the same lists;
/// whole pages of equally many tokens need only one for all heads.
#[derive(Debug)]
pub struct Plan {
    tokens: Range<u32>,
    layers: Range<u32>,
    /// What moves, in the order of the layers.
    entries: Vec<Entry>,
    sets: Vec<Set>,
    /// Those of all sets, one set after the other; behind them may lie some that are out of use.
    geometries: Vec<Geometry>,
    /// No layer names a region from this number on.
    source_regions: u32,
    destination_regions: u32,
}

/// What a [`Plan`] is made from.
#[derive(Clone, Debug)]
pub struct PlanInput<'a> {
    /// Where the tokens are.
    pub source: PageTable<'a>,
    /// Where they go.
    pub destination: PageTable<'a>,
    /// Which tokens of the request; those before are there already. Of a pool of entries: which of those listed.
    pub tokens: Range<u32>,
}

/// One part of one layer.
#[derive(Clone, Copy, Debug)]
struct Entry {
    layer: u32,
    source: LayerBuffer,
    destination: LayerBuffer,
    set: u32,
}

/// The pieces of all parts and layers of one shape.
#[derive(Clone, Debug)]
struct Set {
    shape: Shape,
    geometries: Range<u32>,
    /// What they move for each layer.
    bytes: u64,
}

impl Plan {
    /// A plan treats at most this many shapes of parts, page strides included; a cache has one to three.
    pub const MAX_SHAPES: usize = 16;

    /// Finds the pieces. Moves what both workers hold.
    pub fn build(input: &PlanInput<'_>) -> Result<Self, PlanError> {
        let mut plan = Self {
            tokens: 0..0,
            layers: 0..0,
            entries: Vec::new(),
            sets: Vec::new(),
            geometries: Vec::new(),
            source_regions: 0,
            destination_regions: 0,
        };
        plan.narrow(input)?;
        refuse_duplicates(input.destination.covering(&input.tokens).map_err(PlanError::Destination)?)?;
        Ok(plan)
    }

    /// Starts over with other tokens of the request and the pages for all of which it was built, in the memory that the
    /// plan has: a chunk costs no allocation, and is not searched again for a page that is listed twice. After an error
    /// the plan is empty.
    pub fn narrow(&mut self, input: &PlanInput<'_>) -> Result<(), PlanError> {
        (self.tokens, self.layers) = (0..0, 0..0);
        self.entries.clear();
        self.sets.clear();
        let found = self.find(input);
        if found.is_err() {
            self.entries.clear();
            self.sets.clear();
        }
        found
    }

    fn find(&mut self, input: &PlanInput<'_>) -> Result<(), PlanError> {
        let (source, destination) = (&input.source, &input.destination);
        if let Some(key) = source.layout.differs_in(destination.layout) {
            return Err(PlanError::Unbridgeable { key });
        }
        if source.pool != destination.pool {
            return Err(PlanError::Unbridgeable { key: "pool" });
        }
        if input.tokens.start > input.tokens.end {
            return Err(PlanError::BadTokens { tokens: input.tokens.clone() });
        }
        let source_pages = source.covering(&input.tokens).map_err(PlanError::Source)?;
        let destination_pages = destination.covering(&input.tokens).map_err(PlanError::Destination)?;

        let common = Common::new(input, source_pages, destination_pages);
        let layers = common_layers(input)?;
        let parts = source.of().parts().iter().zip(destination.of().parts());
        self.entries.reserve(layers.len() * parts.len());
        for layer in layers.clone() {
            for (from, to) in parts.clone() {
                if !source.parts.have(from) || !destination.parts.have(to) {
                    continue;
                }
                let (Some(from_buffer), Some(to_buffer)) = (from.buffer(layer), to.buffer(layer)) else {
                    continue;
                };
                let strides = (from_buffer.stride_bytes, to_buffer.stride_bytes);
                let Some(shape) = Shape::between(from, to, strides) else { continue };
                let set = self.set(shape, &common, layer)?;
                self.entries.push(Entry { layer, source: from_buffer, destination: to_buffer, set });
            }
        }
        // A pair of workers that shares tokens need not share what is kept beside them.
        if self.entries.is_empty() && source.pool == 0 {
            return Err(PlanError::NothingInCommon);
        }
        let regions =
            |region: fn(&Entry) -> u32| self.entries.iter().map(region).max().map_or(0, |max| max + 1);
        self.source_regions = regions(|entry| entry.source.region);
        self.destination_regions = regions(|entry| entry.destination.region);
        (self.tokens, self.layers) = (input.tokens.clone(), layers);
        Ok(())
    }

    /// Which tokens move, of those that both workers hold.
    pub fn tokens(&self) -> Range<u32> {
        self.tokens.clone()
    }

    /// Which layers move, numbered as in the model.
    pub fn layers(&self) -> Range<u32> {
        self.layers.clone()
    }

    /// How many bytes move in a layer; 0 for one that does not move.
    pub fn layer_bytes(&self, layer: u32) -> u64 {
        self.of_layer(layer).map(|(_, set)| set.bytes).sum()
    }

    /// How many bytes move.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| self.sets[entry.set as usize].bytes).sum()
    }

    /// How many ops a layer takes; 0 for one that does not move.
    pub fn ops_per_layer(&self, layer: u32) -> usize {
        self.of_layer(layer)
            .map(|(_, set)| self.geometries_of(set).iter().map(Geometry::ops).sum::<usize>())
            .sum()
    }

    /// How many pieces of memory a layer takes; 0 for one that does not move.
    pub fn pieces_per_layer(&self, layer: u32) -> usize {
        self.of_layer(layer)
            .map(|(_, set)| self.geometries_of(set).iter().map(Geometry::pieces).sum::<usize>())
            .sum()
    }

    /// The set of pieces for a shape: that of an earlier part or layer, or a new one.
    fn set(&mut self, shape: Shape, common: &Common<'_>, layer: u32) -> Result<u32, PlanError> {
        if let Some(known) = self.sets.iter().rposition(|set| set.shape == shape) {
            return Ok(known as u32);
        }
        if self.sets.len() == Self::MAX_SHAPES {
            return Err(PlanError::TooManyShapes { layer });
        }
        let first = self.sets.last().map_or(0, |set| set.geometries.end);
        let (mut end, mut fits) = (first, true);
        common.each(&shape, |pieces| {
            if end as usize == self.geometries.len() {
                self.geometries.push(Geometry::default());
            }
            let geometry = &mut self.geometries[end as usize];
            fits &= pieces.fill(geometry);
            end += u32::from(geometry.ops() > 0);
        });
        if !fits {
            return Err(PlanError::TooManyKinds { layer });
        }
        let bytes = self.geometries[first as usize..end as usize].iter().map(Geometry::bytes).sum();
        self.sets.push(Set { shape, geometries: first..end, bytes });
        Ok(self.sets.len() as u32 - 1)
    }

    fn of_layer(&self, layer: u32) -> impl Iterator<Item = (&Entry, &Set)> {
        let entries = &self.entries[self.entries_of(&(layer..layer.saturating_add(1)))];
        entries.iter().map(|entry| (entry, &self.sets[entry.set as usize]))
    }

    fn entries_of(&self, layers: &Range<u32>) -> Range<usize> {
        let before = |layer: u32| self.entries.partition_point(|entry| entry.layer < layer);
        before(layers.start)..before(layers.end)
    }

    fn geometries_of(&self, set: &Set) -> &[Geometry] {
        &self.geometries[set.geometries.start as usize..set.geometries.end as usize]
    }
}

fn common_layers(input: &PlanInput<'_>) -> Result<Range<u32>, PlanError> {
    let (source, destination) = (input.source.layout.layers(), input.destination.layout.layers());
    let common = source.start.max(destination.start)..source.end.min(destination.end);
    if common.is_empty() && input.source.pool == 0 {
        return Err(PlanError::NoCommonLayers { source_layers: source, destination_layers: destination });
    }
    Ok(common.start..common.end.max(common.start))
}

/// A page that is listed twice would be written twice, and one of its two stretches of tokens lost. What it is
/// found by is not kept: it is as long as the pool, and each open room has a plan.
fn refuse_duplicates(pages: &[u32]) -> Result<(), PlanError> {
    let words = pages.iter().max().map_or(0, |&last| last as usize / 64 + 1);
    let mut seen = vec![0u64; words];
    for &page in pages {
        let (word, bit) = (&mut seen[page as usize / 64], 1 << (page % 64));
        if *word & bit != 0 {
            return Err(PlanError::DuplicatePage { page });
        }
        *word |= bit;
    }
    Ok(())
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
    /// No head is held by both workers in a layer that both hold.
    #[error("the two workers hold no heads and layers in common")]
    NothingInCommon,
    /// The pieces are of too many different lengths and places in their pages.
    #[error("the pieces of layer {layer} are of too many different kinds")]
    TooManyKinds {
        /// The first layer whose pieces are.
        layer: u32,
    },
    /// The layers are laid out in too many different ways.
    #[error("layer {layer} needs more than {} pairs of page strides and head shares", Plan::MAX_SHAPES)]
    TooManyShapes {
        /// The first layer that is too much.
        layer: u32,
    },
}
