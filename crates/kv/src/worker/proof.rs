//! Checksums of what a room moves, at both of its ends: which ones they must be, and a share of them at a time.

use crossdock_memory::Memory;

use super::posting::overlap;
use crate::checksum::Summing;
use crate::params::Ask;
use crate::{CacheLayout, ChecksumError, Checksums, PageTable, VerifyError};

/// Lets a sum use its share of what is left of a turn.
pub(super) fn sum<T>(left: &mut u64, advance: impl FnOnce(&mut u64) -> T) -> T {
    let share = (*left / SUM_COST).max(1);
    let mut rest = share;
    let outcome = advance(&mut rest);
    *left = left.saturating_sub((share - rest) * SUM_COST);
    outcome
}

/// Sums on, if there is something to sum. The sums as they travel, nothing where none are wanted; `None` if there is
/// more to sum.
pub(super) fn sum_on(
    sums: &mut Option<Summing>,
    memory: &[Memory],
    table: &PageTable<'_>,
    left: &mut u64,
) -> Result<Option<Vec<u8>>, VerifyError> {
    let Some(summing) = sums else { return Ok(Some(Vec::new())) };
    if !sum(left, |left| summing.advance(memory, table, left))? {
        return Ok(None);
    }
    let mut encoded = Vec::new();
    if let Some(summing) = sums.take() {
        summing.into_sums().encode(&mut encoded);
    }
    Ok(Some(encoded))
}

/// A byte that is read and summed takes about as long as so many that a port copies.
const SUM_COST: u64 = 4;

/// Begins to sum what a room moves: of the layers that both sides hold, the tokens that the decode side lacks.
pub(super) fn moved_sums(
    memory: &[Memory],
    table: &PageTable<'_>,
    cache: &CacheLayout,
    ask: &Ask,
) -> Result<Summing, ChecksumError> {
    let layers = overlap(&table.layout.layers(), &cache.layers());
    Summing::compute(memory, table, cache, layers, table.layout.moved(ask))
}

/// Whether the bytes here are those that the peer has summed, and it has summed all that it was to move: which layers
/// that is follows from the two sides' layouts, and not from what the peer says.
pub(super) struct Proof(Result<Summing, NoProof>);

/// The sums cannot be read, or are of something else.
struct NoProof;

impl Proof {
    pub fn begin(
        memory: &[Memory],
        table: &PageTable<'_>,
        cache: &CacheLayout,
        ask: &Ask,
        sums: &[u8],
    ) -> Self {
        let layers = overlap(&table.layout.layers(), &cache.layers());
        let begun = Checksums::decode(sums).map_err(|error| {
            tracing::error!("the peer's checksums cannot be read: {error}");
            NoProof
        });
        Self(begun.and_then(|sums| {
            Summing::compare(sums, memory, table, cache, layers, table.layout.moved(ask)).map_err(|error| {
                tracing::error!("what arrived cannot be proven: {error}");
                NoProof
            })
        }))
    }

    /// Compares some more; `None` if there is more to compare.
    pub fn advance(&mut self, memory: &[Memory], table: &PageTable<'_>, left: &mut u64) -> Option<bool> {
        let Ok(summing) = &mut self.0 else { return Some(false) };
        match summing.advance(memory, table, left) {
            Ok(false) => None,
            Ok(true) => Some(true),
            Err(error) => {
                tracing::error!("what arrived is not what was sent: {error}");
                Some(false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crossdock_memory::AllocateOptions;

    use std::ops::Range;

    use crossdock_transport::Direction;

    use super::super::posting::local_table;
    use super::*;
    use crate::{CacheKind, Dtype, LayoutOptions, Parts, Placement};

    fn layout(layers: Range<u32>) -> CacheLayout {
        CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers: 4,
            layers,
            kind: CacheKind::Mla { latent_bytes: 24, rope_bytes: 0 },
            dtype: Dtype::Bf16,
            page_tokens: 16,
            pages: 8,
            placement: Placement::LayerMajor { region: 0 },
        })
        .unwrap()
    }

    #[test]
    fn sums_prove_only_what_both_sides_layouts_say_was_moved() {
        // Layers 1 and 2 are the ones that both hold.
        let (here, peer) = (layout(1..4), layout(0..3));
        let bytes = here.bytes_needed(0) as usize;
        let memory = [Memory::allocate(bytes, &AllocateOptions::default()).unwrap()];
        let pages = [5, 2];
        let ask = Ask { pool: 0, tokens: 40, skip_tokens: 20, checksums: true, parts: Parts::All };
        let table = local_table(&here, &pages, Direction::Read, &ask);
        let is_proven = |sums: &[u8]| {
            let mut proof = Proof::begin(&memory, &table, &peer, &ask, sums);
            // A byte at a time: that many shares do not matter.
            (0..10_000).find_map(|_| proof.advance(&memory, &table, &mut 1)).unwrap()
        };
        let proven = |layers: Range<u32>, tokens: Range<u32>| {
            let mut sums = Vec::new();
            Checksums::compute(&memory, &table, &peer, layers, tokens).unwrap().encode(&mut sums);
            is_proven(&sums)
        };
        assert!(proven(1..3, 20..40));
        for layers in [1..1, 2..2, 0..0, 1..2, 2..3, 1..4, 3..4] {
            assert!(!proven(layers.clone(), 20..40), "{layers:?}");
        }
        for tokens in [20..20, 20..39, 21..40] {
            assert!(!proven(1..3, tokens.clone()), "{tokens:?}");
        }
        assert!(!is_proven(&[]), "no sums at all");
    }
}
