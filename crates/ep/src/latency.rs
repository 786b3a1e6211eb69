//! The latency mode: rows packed by expert, results weighed and summed where the tokens came from.

use std::ops::Range;

use crossdock_memory::Memory;

use crate::arena::{Entries, Header, row_stride};
use crate::bytes::Bytes;
use crate::error::EpError;
use crate::slot::{COMBINE_WEIGHTED, Dispatch, NOWHERE, Report, Slot};
use crate::words::{self, ArenaRows, ResultRows};
use crate::{Bf16, Group, Payload};

/// In which order the scales of packed rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleOrder {
    /// `[local experts, rows, scale bytes]`: each row's scales together.
    ByRow,
    /// `[local experts, scale bytes / 4, rows]` words of four bytes: neighbours belong to neighbouring rows, as matrix
    /// units want them.
    ByColumn,
}

/// What a dispatch gives in the latency mode: for each of this rank's experts the rows of the tokens that chose it, in
/// the order of (source rank, source token), from the front; what lies behind an expert's count is left as it was.
///
/// An expert has room for the token limits of all ranks together: [`LatencyOutputs::rows`] is that number.
#[derive(Clone, Debug)]
pub struct LatencyOutputs {
    payload: Payload,
    order: ScaleOrder,
    row_bytes: usize,
    scale_bytes: usize,
    experts: usize,
    rows: usize,
    ranks: usize,
    values: Bytes,
    scales: Bytes,
    sources: Vec<u32>,
    counts: Vec<u32>,
    ranges: Vec<Range<u32>>,
    totals: Vec<u64>,
    packing: Packing,
}

impl LatencyOutputs {
    /// Room for what a rank of this group may get in this form. The memory is touched only where rows arrive.
    pub fn new(group: &Group, payload: Payload, order: ScaleOrder) -> LatencyOutputs {
        let config = group.config();
        let experts = config.spread().of_rank(group.rank()).len();
        let rows = crate::arena::rows_per_expert(config);
        let ranks = config.ranks() as usize;
        let row_bytes = payload.row_bytes(config.hidden) as usize;
        let scale_bytes = payload.scale_bytes(config.hidden) as usize;
        LatencyOutputs {
            payload,
            order,
            row_bytes,
            scale_bytes,
            experts,
            rows,
            ranks,
            values: Bytes::zeroed(experts * rows * row_bytes),
            scales: Bytes::zeroed(experts * rows * scale_bytes),
            sources: vec![0; experts * rows],
            counts: vec![0; experts],
            ranges: vec![0..0; experts * ranks],
            totals: vec![0; experts],
            packing: Packing::default(),
        }
    }

    /// The form of the rows.
    pub fn payload(&self) -> Payload {
        self.payload
    }

    /// Rows that each expert has room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `[local experts, rows, row bytes]`.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The scales, in the order that was asked for.
    pub fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// The bytes of one row.
    pub fn row(&self, expert: usize, row: usize) -> &[u8] {
        &self.values[(expert * self.rows + row) * self.row_bytes..][..self.row_bytes]
    }

    /// The bytes of one row's scales, in the row's order whatever the order here is.
    pub fn scales_of(&self, expert: usize, row: usize) -> Vec<u8> {
        match self.order {
            ScaleOrder::ByRow => {
                self.scales[(expert * self.rows + row) * self.scale_bytes..][..self.scale_bytes].to_vec()
            }
            ScaleOrder::ByColumn => {
                let words = self.scale_bytes / 4;
                let word = |word: usize| &self.scales[4 * ((expert * words + word) * self.rows + row)..][..4];
                (0..words).flat_map(word).copied().collect()
            }
        }
    }

    /// `[local experts, rows]`: which of its source's tokens each row is.
    pub fn sources(&self) -> &[u32] {
        &self.sources
    }

    /// By local expert: how many rows came.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// Where the rows of a source lie among those of a local expert.
    pub fn range(&self, expert: usize, source: u32) -> Range<u32> {
        self.ranges[expert * self.ranks + source as usize].clone()
    }

    /// By local expert: how many rows came in all steps since these outputs were made.
    pub fn totals(&self) -> &[u64] {
        &self.totals
    }
}

/// A dispatch in the latency mode, received. What the experts make of the rows is written to
/// [`results_mut`](LatencyStep::results_mut) and goes back with [`combine`](LatencyStep::combine).
#[must_use = "the other ranks wait for the combine"]
#[derive(Debug)]
pub struct LatencyStep<'slot> {
    slot: &'slot mut Slot,
    report: Report,
    /// By source: where its rows begin at each local expert. `None` for one that is masked.
    begins: Vec<Option<Vec<u32>>>,
    counts: Vec<u32>,
}

impl<'slot> Dispatch<'slot> {
    /// The receive half in the latency mode: waits for every rank's rows and packs them by expert.
    pub fn latency(self, outputs: &mut LatencyOutputs) -> Result<LatencyStep<'slot>, EpError> {
        let Dispatch { slot, header, mut report } = self;
        let shared = slot.shared.clone();
        let experts = shared.spread.of_rank(shared.rank).len();
        let shape = [
            ("outputs' row bytes", outputs.row_bytes, header.row_bytes as usize),
            ("outputs' scale bytes", outputs.scale_bytes, header.scale_bytes as usize),
            ("outputs' experts", outputs.experts, experts),
            ("outputs' rows", outputs.rows, shared.rows_per_expert),
            ("outputs' ranks", outputs.ranks, shared.ranks() as usize),
        ];
        EpError::check_lengths(shape)?;
        outputs.counts.fill(0);
        outputs.packing.scales.clear();
        outputs.packing.order.clear();
        let mut begins = Vec::with_capacity(shared.ranks() as usize);
        slot.begin_waiting();
        for source in 0..shared.ranks() {
            let before = outputs.counts.clone();
            let came = slot.wait_for(source, &header, &mut report)?;
            if let Some(theirs) = &came {
                pack(slot, source, theirs, outputs)?;
            }
            for (expert, &begin) in before.iter().enumerate() {
                outputs.ranges[expert * outputs.ranks + source as usize] = begin..outputs.counts[expert];
            }
            begins.push(came.map(|_| before));
        }
        scatter_columns(&mut outputs.packing, outputs.rows, outputs.scale_bytes / 4, &mut outputs.scales);
        for (total, &count) in outputs.totals.iter_mut().zip(&outputs.counts) {
            *total += u64::from(count);
        }
        report.masked = shared.masked();
        Ok(LatencyStep { counts: outputs.counts.clone(), slot, report, begins })
    }
}

/// Packs the rows of one source.
fn pack(slot: &mut Slot, source: u32, theirs: &Header, outputs: &mut LatencyOutputs) -> Result<(), EpError> {
    let shared = slot.shared.clone();
    let arena = shared.arena(slot.slot, source, shared.rank);
    let (row_bytes, scale_bytes) = (outputs.row_bytes, outputs.scale_bytes);
    let stride = row_stride(row_bytes, scale_bytes);
    let rows = theirs.rows as usize;
    let nonsense = |what, value: u64, most: u64| EpError::Nonsense { rank: source, what, value, most };
    let mut list = std::mem::take(&mut slot.entries);
    arena
        .read_entries(rows, stride, &mut list)
        .map_err(|over| nonsense("rows of", over.bytes as u64, over.memory_bytes as u64))?;
    let from = ArenaRows { memory: arena.memory(), at: arena.rows_at(rows), stride, count: rows };
    let packing = &mut outputs.packing;
    packing.rows.clear();
    packing.places.clear();
    for (row, entry) in Entries::new(shared.config.top_k).iter(&list).enumerate() {
        let token = entry.token();
        if token >= theirs.tokens {
            return Err(nonsense("a token", token.into(), theirs.tokens.into()));
        }
        if slot.is_verified() {
            let at = from.at + row * stride;
            check_row(arena.memory(), at, row_bytes + scale_bytes, entry.checksum(), source, token)?;
        }
        for choice in 0..shared.config.top_k as usize {
            let Ok(expert) = usize::try_from(entry.expert(choice)) else { continue };
            if expert >= outputs.experts {
                return Err(nonsense("an expert", expert as u64, outputs.experts as u64));
            }
            let to = outputs.counts[expert] as usize;
            if to >= outputs.rows {
                return Err(nonsense("rows for an expert", to as u64 + 1, outputs.rows as u64));
            }
            outputs.counts[expert] += 1;
            let place = expert * outputs.rows + to;
            outputs.sources[place] = token;
            packing.rows.push(row as u32);
            packing.places.push(place as u32);
        }
    }
    slot.entries = list;
    // Row by row, so that each is still in the cache when it goes to its next expert.
    let copier = shared.copier_for(packing.rows.len() * row_bytes);
    words::copy_rows(copier, from, &packing.rows, &mut outputs.values, &packing.places, row_bytes);
    match outputs.order {
        _ if scale_bytes == 0 => {}
        ScaleOrder::ByRow => {
            for (&row, &place) in packing.rows.iter().zip(&packing.places) {
                let into = &mut outputs.scales[place as usize * scale_bytes..][..scale_bytes];
                let at = from.at + row as usize * stride + row_bytes;
                arena.memory().read(at, into).expect("a row lies inside its arena");
            }
        }
        ScaleOrder::ByColumn => {
            // Written when all sources have come: an expert's rows of one of them are few.
            let before = packing.scales.len();
            packing.scales.resize(before + rows * scale_bytes, 0);
            for (row, into) in packing.scales[before..].chunks_exact_mut(scale_bytes).enumerate() {
                let at = from.at + row * stride + row_bytes;
                arena.memory().read(at, into).expect("a row lies inside its arena");
            }
            let first = (before / scale_bytes) as u32;
            packing
                .order
                .extend(packing.places.iter().zip(&packing.rows).map(|(&place, &row)| (place, first + row)));
        }
    }
    Ok(())
}

/// Writes the scales of packed rows column by column: a column's neighbours are a line of the cache, and row by row each of
/// them would be fetched once for every four bytes.
fn scatter_columns(packing: &mut Packing, rows_per_expert: usize, words: usize, into: &mut [u8]) {
    // By expert, and in an expert as they came: runs of neighbours.
    packing.order.sort_unstable();
    let same =
        |a: &(u32, u32), b: &(u32, u32)| a.0 as usize / rows_per_expert == b.0 as usize / rows_per_expert;
    for run in packing.order.chunk_by(same) {
        // A few lines of the source at a time, so that they stay in the cache over all words.
        for run in run.chunks(RUN_ROWS) {
            let (expert, first) = (run[0].0 as usize / rows_per_expert, run[0].0 as usize % rows_per_expert);
            for word in 0..words {
                let column = (expert * words + word) * rows_per_expert + first;
                let into = &mut into[4 * column..][..4 * run.len()];
                for (into, &(_, row)) in into.chunks_exact_mut(4).zip(run) {
                    into.copy_from_slice(&packing.scales[4 * (row as usize * words + word)..][..4]);
                }
            }
        }
    }
}

/// What is packed from one source, kept from one to the next for its memory.
#[derive(Clone, Debug, Default)]
struct Packing {
    /// Rows of the arena, in their order, once for each expert that they go to.
    rows: Vec<u32>,
    /// Where each goes, among the rows of all experts.
    places: Vec<u32>,
    /// The scales of the rows of all sources so far, as they came.
    scales: Vec<u8>,
    /// Places, and which of those scales belongs there.
    order: Vec<(u32, u32)>,
}

const RUN_ROWS: usize = 64;

/// Compares a row with the checksum that its source computed.
pub(crate) fn check_row(
    memory: &Memory,
    at: usize,
    bytes: usize,
    checksum: u32,
    rank: u32,
    token: u32,
) -> Result<(), EpError> {
    let mut row = vec![0; bytes];
    memory.read(at, &mut row).expect("a row lies inside its arena");
    if crc32c::crc32c(&row) == checksum { Ok(()) } else { Err(EpError::Corrupted { rank, token }) }
}

impl<'slot> LatencyStep<'slot> {
    /// Where this rank's results go: `[rows, hidden]` of one local expert, in the order of its packed rows, as many as
    /// came. The other ranks read them there.
    pub fn results_mut(&mut self, expert: usize) -> &mut [Bf16] {
        let shared = &*self.slot.shared;
        let hidden = shared.config.hidden as usize;
        let (memory, at) = shared.results(self.slot.slot, shared.rank);
        let rows = self.counts[expert] as usize;
        let at = at + expert * shared.rows_per_expert * hidden * 2;
        words::results(memory, at, rows * hidden)
    }

    /// Copies results from `[local experts, rows, hidden]`, for whom they lie elsewhere.
    pub fn copy_results(&mut self, from: &[Bf16]) -> Result<(), EpError> {
        let shared = self.slot.shared.clone();
        let hidden = shared.config.hidden as usize;
        let expected = self.counts.len() * shared.rows_per_expert * hidden;
        if from.len() != expected {
            return Err(EpError::WrongLength { what: "results", len: from.len(), expected });
        }
        for expert in 0..self.counts.len() {
            let of_expert = &from[expert * shared.rows_per_expert * hidden..];
            let into = self.results_mut(expert);
            into.copy_from_slice(&of_expert[..into.len()]);
        }
        Ok(())
    }

    /// The send half of the combine: says that the results are there. Nothing is copied; each rank reads what it needs.
    pub fn combine(self) -> LatencyCombine<'slot> {
        let LatencyStep { slot, report, begins, .. } = self;
        let shared = slot.shared.clone();
        slot.call = slot.call.wrapping_add(1);
        let header = combine_header(&shared.config, COMBINE_WEIGHTED);
        for (rank, begins) in (0..shared.ranks()).zip(&begins) {
            let Some(begins) = begins.as_ref().filter(|_| !shared.is_masked(rank)) else { continue };
            shared.arena(slot.slot, shared.rank, rank).write_begins(begins);
            slot.publish(rank, &header);
        }
        LatencyCombine { slot, header, report }
    }

    /// What the dispatch cost.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

pub(crate) fn combine_header(config: &crate::GroupConfig, kind: u32) -> Header {
    Header { kind, top_k: config.top_k, placement_version: config.placement_version, ..Header::default() }
}

/// A combine in the latency mode whose send half is done.
#[must_use = "the tokens are still at their experts"]
#[derive(Debug)]
pub struct LatencyCombine<'slot> {
    slot: &'slot mut Slot,
    header: Header,
    report: Report,
}

impl LatencyCombine<'_> {
    /// The receive half: waits for every rank's results, and sums those of each token.
    ///
    /// `weights` is `[tokens, top_k]`, `out` is `[tokens, hidden]`: of the tokens of the dispatch. Each token's row is the
    /// sum over its choices, in their order, of weight times result, in `f32` with fused multiply-adds, rounded once. A
    /// token that chose nothing becomes zeros.
    pub fn receive(self, weights: &[f32], out: &mut [Bf16]) -> Result<Report, EpError> {
        let LatencyCombine { slot, header, report: sent } = self;
        let shared = slot.shared.clone();
        let (top_k, hidden) = (shared.config.top_k as usize, shared.config.hidden as usize);
        let tokens = slot.routes.tokens;
        EpError::check_lengths([
            ("weights", weights.len(), tokens * top_k),
            ("the combined rows", out.len(), tokens * hidden),
        ])?;
        let mut report = Report::new(shared.ranks());
        let mut answered = vec![false; shared.ranks() as usize];
        let mut begins = vec![Vec::new(); shared.ranks() as usize];
        slot.begin_waiting();
        for source in 0..shared.ranks() {
            if slot.wait_for(source, &header, &mut report)?.is_none() {
                continue;
            }
            answered[source as usize] = true;
            let of_source = &mut begins[source as usize];
            of_source.resize(shared.spread.of_rank(source).len(), 0);
            shared.arena(slot.slot, source, shared.rank).read_begins(of_source);
        }
        let raise = slot.account(&answered, Some(weights), &mut report);
        slot.finish();
        let raise = raise?;
        let mut rows = ResultRows::new(hidden);
        let mut factors = Vec::with_capacity(top_k);
        for token in 0..tokens {
            rows.clear();
            factors.clear();
            for (choice, weight) in (token * top_k..).zip(&weights[token * top_k..][..top_k]) {
                let rank = slot.routes.ranks[choice];
                if rank == NOWHERE || !answered[rank as usize] {
                    continue;
                }
                let expert = slot.routes.experts[choice] as usize;
                let begin = begins[rank as usize][expert];
                let row = begin as usize + slot.routes.places[choice] as usize;
                if row >= shared.rows_per_expert {
                    let (value, most) = (row as u64, shared.rows_per_expert as u64);
                    return Err(EpError::Nonsense { rank, what: "a result's row", value, most });
                }
                let (memory, at) = shared.results(slot.slot, rank);
                let at = at + (expert * shared.rows_per_expert + row) * hidden * 2;
                rows.push(memory, at);
                factors.push(weight * raise.get(token).copied().unwrap_or(1.0));
                report.logical_bytes += 2 * hidden as u64;
                report.wire_bytes += if rank == shared.rank { 0 } else { 2 * hidden as u64 };
            }
            rows.weighted(shared.summer, &factors, &mut out[token * hidden..][..hidden]);
        }
        slot.check_membership(&answered)?;
        report.add(&sent);
        Ok(report)
    }
}
