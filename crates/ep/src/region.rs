//! Where things lie in a rank's memory, which all ranks of its host map and ports of other hosts write.
//!
//! A slot has, one after the other:
//!
//! | part | written by | read by |
//! |---|---|---|
//! | pulse | this rank | ranks that map it |
//! | an arena for each source: a word, two headers, where results begin, a list of rows | the source | this rank |
//! | for each source, its rows | the source's port | this rank |
//! | staging: this rank's tokens as they travel | this rank | ranks that map it, ports |
//! | results, checksums and weights of this rank's experts | this rank | ranks that map them, ports |
//! | combined: results for this rank's tokens, their checksums and weights | the experts' ports | this rank |
//! | an outbox for each rank: what this rank's port writes into its arena | this rank | ports |
//!
//! What ports write, and the outboxes, serve ranks that cannot map each other; memory that nobody touches is never there.

use std::ops::Range;
use std::sync::Arc;

use crossdock_memory::PageLayout;

use crate::GroupConfig;
use crate::arena::ArenaLayout;

/// What is at the same place in the region of every rank: where each source writes.
#[derive(Debug)]
struct Sources {
    arenas: Vec<Part>,
    layouts: Vec<ArenaLayout>,
    rows: Vec<Part>,
    end: usize,
}

/// The places of one rank's region.
#[derive(Clone, Debug)]
pub(crate) struct RegionLayout {
    sources: Arc<Sources>,
    rank: u32,
    staging: Part,
    results: Part,
    result_checksums: Part,
    result_weights: Part,
    combined: Part,
    combined_checksums: Part,
    combined_weights: Part,
    /// Of rank 0; the others' follow.
    outbox: Part,
    slot_bytes: usize,
    slots: u32,
    pub bytes: usize,
}

/// A stretch of a slot, in bytes from where the slot begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Part {
    at: usize,
    bytes: usize,
}

/// Lays parts out one after the other. `None`: it cannot be addressed.
struct Plan {
    end: usize,
}

impl Plan {
    fn part(&mut self, bytes: usize) -> Option<Part> {
        self.aligned_part(bytes, LINE_BYTES)
    }

    fn aligned_part(&mut self, bytes: usize, alignment: usize) -> Option<Part> {
        let at = self.end.checked_next_multiple_of(alignment)?;
        self.end = at.checked_add(bytes)?;
        Some(Part { at, bytes })
    }

    /// Rows of BF16 results, a checksum for each, and weights for some.
    fn results(&mut self, config: &GroupConfig, rows: usize, weighted: usize) -> Option<[Part; 3]> {
        let results = self.aligned_part(rows.checked_mul(2 * config.hidden as usize)?, PAGE_BYTES)?;
        let checksums = self.part(rows.checked_mul(4)?)?;
        Some([results, checksums, self.part(weighted.checked_mul(4 * config.top_k as usize)?)?])
    }
}

impl Sources {
    fn new(config: &GroupConfig) -> Option<Sources> {
        let layouts: Vec<ArenaLayout> = config
            .max_tokens
            .iter()
            .map(|&tokens| ArenaLayout::new(config, tokens))
            .collect::<Option<_>>()?;
        let stride = largest_stride(config)?;
        let mut plan = Plan { end: PULSE_BYTES };
        let arenas = layouts.iter().map(|arena| plan.part(arena.bytes())).collect::<Option<_>>()?;
        let rows = |&tokens: &u32| plan.part((tokens as usize).checked_mul(stride)?);
        let rows = config.max_tokens.iter().map(rows).collect::<Option<_>>()?;
        Some(Sources { arenas, layouts, rows, end: plan.end })
    }
}

impl RegionLayout {
    /// The regions of some ranks; `None` if one cannot be addressed.
    pub fn of_group(config: &GroupConfig, ranks: Range<u32>) -> Option<Vec<RegionLayout>> {
        let sources = Arc::new(Sources::new(config)?);
        ranks.map(|rank| RegionLayout::new(config, &sources, rank)).collect()
    }

    /// The region of one rank; `None` if it cannot be addressed.
    ///
    /// # Panics
    /// If the group has no such rank.
    fn new(config: &GroupConfig, sources: &Arc<Sources>, rank: u32) -> Option<RegionLayout> {
        let own = config.max_tokens[rank as usize] as usize;
        let result_rows = rows_per_expert(config);
        let expert_rows = config.spread().of_rank(rank).len().checked_mul(result_rows)?;
        let combined_rows = own.checked_mul(config.top_k as usize)?;
        let mut plan = Plan { end: sources.end };
        let staging = plan.part(own.checked_mul(largest_stride(config)?)?)?;
        let [results, result_checksums, result_weights] = plan.results(config, expert_rows, result_rows)?;
        let [combined, combined_checksums, combined_weights] =
            plan.results(config, combined_rows, combined_rows)?;
        let outbox = plan.part(sources.layouts[rank as usize].bytes())?;
        let outboxes = outbox.bytes.checked_mul(config.max_tokens.len())?;
        let slot_bytes = outbox.at.checked_add(outboxes)?.checked_next_multiple_of(PAGE_BYTES)?;
        Some(RegionLayout {
            sources: sources.clone(),
            rank,
            staging,
            results,
            result_checksums,
            result_weights,
            combined,
            combined_checksums,
            combined_weights,
            outbox,
            slot_bytes,
            slots: config.slots,
            bytes: slot_bytes.checked_mul(config.slots as usize)?,
        })
    }

    fn place(&self, slot: u32, part: Part) -> usize {
        slot as usize * self.slot_bytes + part.at
    }

    /// The word that a rank counts up while it waits.
    pub fn pulse(&self, slot: u32) -> usize {
        slot as usize * self.slot_bytes
    }

    /// A source's arena.
    pub fn arena(&self, slot: u32, source: u32) -> (usize, &ArenaLayout) {
        let source = source as usize;
        (self.place(slot, self.sources.arenas[source]), &self.sources.layouts[source])
    }

    /// What this rank's port writes into its arena at `reader`.
    pub fn outbox(&self, slot: u32, reader: u32) -> (usize, &ArenaLayout) {
        let at = self.place(slot, self.outbox) + reader as usize * self.outbox.bytes;
        (at, &self.sources.layouts[self.rank as usize])
    }

    /// This rank's rows of a call, one for each token.
    pub fn staging(&self, slot: u32) -> usize {
        self.place(slot, self.staging)
    }

    /// The results of this rank's experts: a row for each of them and each token that may come.
    pub fn results(&self, slot: u32) -> usize {
        self.place(slot, self.results)
    }

    /// A checksum for each of those rows.
    pub fn result_checksums(&self, slot: u32) -> usize {
        self.place(slot, self.result_checksums)
    }

    /// The weights that go back with the results of the throughput mode.
    pub fn result_weights(&self, slot: u32) -> usize {
        self.place(slot, self.result_weights)
    }

    /// Where a source's port writes its rows.
    pub fn source_rows(&self, slot: u32, source: u32) -> usize {
        self.place(slot, self.sources.rows[source as usize])
    }

    /// Where ports write the results for this rank's tokens.
    pub fn combined(&self, slot: u32) -> usize {
        self.place(slot, self.combined)
    }

    /// Where they write the checksums of those.
    pub fn combined_checksums(&self, slot: u32) -> usize {
        self.place(slot, self.combined_checksums)
    }

    /// Where they write the weights that come back.
    pub fn combined_weights(&self, slot: u32) -> usize {
        self.place(slot, self.combined_weights)
    }

    /// What checksums cover: what the others say of their calls, this rank's rows, and its results with their checksums.
    #[cfg(feature = "planted-bugs")]
    pub fn sealed(&self, slot: u32) -> [Vec<Range<usize>>; 3] {
        let said = self.sources.arenas.iter().map(|arena| Part {
            at: arena.at + ArenaLayout::FRONT_BYTES,
            bytes: arena.bytes - ArenaLayout::FRONT_BYTES,
        });
        let places = |parts: Vec<Part>| {
            let parts = parts.into_iter().filter(|part| part.bytes > 0);
            parts.map(|part| self.place(slot, part)..self.place(slot, part) + part.bytes).collect()
        };
        [said.collect(), vec![self.staging], vec![self.results, self.result_checksums]].map(places)
    }

    /// What the port of a rank writes here: a page for each slot.
    pub fn written_by(&self, source: u32) -> Vec<PageLayout> {
        let source = source as usize;
        // The word and what the source says of itself is told by immediates.
        let arena = self.sources.arenas[source];
        let arena =
            Part { at: arena.at + ArenaLayout::FRONT_BYTES, bytes: arena.bytes - ArenaLayout::FRONT_BYTES };
        [arena, self.sources.rows[source], self.combined, self.combined_checksums, self.combined_weights]
            .into_iter()
            .filter(|part| part.bytes > 0)
            .map(|part| PageLayout {
                offset: part.at as u64,
                stride_bytes: self.slot_bytes as u64,
                page_bytes: part.bytes as u64,
                pages: self.slots,
            })
            .collect()
    }

    /// What dispatched rows take over mapped memory, in all slots.
    pub fn dispatch_bytes(&self) -> u64 {
        self.in_all_slots(&self.sources.arenas) + self.in_all_slots(&[self.staging])
    }

    /// What they take besides if every other rank is on another host.
    pub fn port_dispatch_bytes(&self) -> u64 {
        self.in_all_slots(&self.sources.rows)
            + self.in_all_slots(&[self.outbox]) * self.sources.arenas.len() as u64
    }

    /// What results take that come through ports.
    pub fn port_combine_bytes(&self) -> u64 {
        self.in_all_slots(&[self.combined, self.combined_checksums, self.combined_weights])
    }

    /// What the results of this rank's experts take.
    pub fn result_bytes(&self) -> u64 {
        self.in_all_slots(&[self.results, self.result_checksums, self.result_weights])
    }

    fn in_all_slots(&self, parts: &[Part]) -> u64 {
        u64::from(self.slots) * parts.iter().map(|part| part.bytes as u64).sum::<u64>()
    }
}

/// How many rows each expert has room for: every token of every rank may go there.
pub(crate) fn rows_per_expert(config: &GroupConfig) -> usize {
    config.max_tokens.iter().map(|&tokens| tokens as usize).sum()
}

/// From one row to the next: its values and scales, and what fills the line.
pub(crate) fn row_stride(row_bytes: usize, scale_bytes: usize) -> usize {
    (row_bytes + scale_bytes).next_multiple_of(LINE_BYTES)
}

fn largest_stride(config: &GroupConfig) -> Option<usize> {
    let row = usize::try_from(config.payload.row_bytes(config.hidden)).ok()?;
    let scale = usize::try_from(config.payload.scale_bytes(config.hidden)).ok()?;
    Some(row_stride(row, scale))
}

/// Each rank finds its places in the others' regions by itself, so ranks that lay them out otherwise, or fill them with
/// something else, refuse each other.
pub(crate) const LAYOUT_VERSION: u32 = 3;
/// Two lines, as processors fetch lines in pairs.
const PULSE_BYTES: usize = 128;
pub(crate) const LINE_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;
