//! The latency mode: rows packed by expert, results weighed and summed where the tokens came from.

use std::ops::Range;

use crate::arena::{Header, as_bytes};
use crate::bytes::Bytes;
use crate::error::EpError;
use crate::group::TAKEN_BYTES;
use crate::incoming::Incoming;
use crate::region::rows_per_expert;
use crate::report::Report;
use crate::results::{Results, begins_span, combine_header};
use crate::route::NOWHERE;
use crate::slot::{COMBINE_WEIGHTED, Dispatch, Slot};
use crate::words::{self, ResultRows};
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
    /// Room for what a rank of this group may get in this form. That of rows is touched only where they arrive.
    ///
    /// # Panics
    /// If the group has no rows of this form: its configuration's is the largest.
    pub fn new(group: &Group, payload: Payload, order: ScaleOrder) -> LatencyOutputs {
        let config = group.config();
        config.assert_takes(payload);
        let experts = config.spread().of_rank(group.rank()).len();
        let rows = rows_per_expert(config);
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
    ///
    /// # Panics
    /// If there is no such expert here, or no room for such a row.
    pub fn row(&self, expert: usize, row: usize) -> &[u8] {
        &self.values[(expert * self.rows + row) * self.row_bytes..][..self.row_bytes]
    }

    /// The bytes of one row's scales, in the row's order whatever the order here is.
    ///
    /// # Panics
    /// As [`row`](LatencyOutputs::row).
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
    ///
    /// # Panics
    /// If there is no such expert here, or no such source.
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
    counts: Vec<u32>,
}

impl<'slot> Dispatch<'slot> {
    /// The receive half in the latency mode: waits for every rank's rows and packs them by expert.
    pub fn latency(self, outputs: &mut LatencyOutputs) -> Result<LatencyStep<'slot>, EpError> {
        let Dispatch { slot, header, mut report } = self;
        let shared = slot.shared.clone();
        let begun = shared.pace.now();
        let experts = shared.spread.of_rank(shared.rank).len();
        let shape = [
            ("outputs' row bytes", outputs.row_bytes, header.row_bytes as usize),
            ("outputs' scale bytes", outputs.scale_bytes, header.scale_bytes as usize),
            ("outputs' experts", outputs.experts, experts),
            ("outputs' rows", outputs.rows, shared.rows_per_expert),
            ("outputs' ranks", outputs.ranks, shared.ranks() as usize),
        ];
        EpError::check_outputs(shape)?;
        slot.begin_waiting();
        while !take_all(slot, &header, outputs, &mut report)? {}
        scatter_columns(&mut outputs.packing, outputs.rows, outputs.scale_bytes / 4, &mut outputs.scales);
        for (total, &count) in outputs.totals.iter_mut().zip(&outputs.counts) {
            *total += u64::from(count);
        }
        report.end_half(begun, &shared);
        Ok(LatencyStep { counts: outputs.counts.clone(), slot, report })
    }
}

/// Packs the rows of all sources, in the order of their ranks. False if it is to be done once more.
fn take_all(
    slot: &mut Slot,
    header: &Header,
    outputs: &mut LatencyOutputs,
    report: &mut Report,
) -> Result<bool, EpError> {
    let shared = slot.shared.clone();
    outputs.counts.fill(0);
    outputs.packing.scales.clear();
    outputs.packing.order.clear();
    slot.received.begin();
    for source in 0..shared.ranks() {
        slot.received.begins.extend_from_slice(&outputs.counts);
        let came = slot.wait_for(source, header, report)?;
        let packed = match &came {
            Some(theirs) => match pack(slot, source, theirs, outputs, report) {
                Ok(packed) => packed,
                Err(error) => return slot.excuse(source, error).map(|()| false),
            },
            None => 0,
        };
        slot.received.note(source, came.as_ref(), packed, &shared)?;
        let begins = &slot.received.begins[source as usize * outputs.experts..];
        for (expert, (&begin, &end)) in begins.iter().zip(&outputs.counts).enumerate() {
            outputs.ranges[expert * outputs.ranks + source as usize] = begin..end;
        }
    }
    slot.received.begins.extend_from_slice(&outputs.counts);
    slot.end_taking()
}

/// Packs the rows of one source. Gives how many results it gets.
fn pack(
    slot: &mut Slot,
    source: u32,
    theirs: &Header,
    outputs: &mut LatencyOutputs,
    report: &mut Report,
) -> Result<u32, EpError> {
    let shared = slot.shared.clone();
    let (row_bytes, scale_bytes) = (outputs.row_bytes, outputs.scale_bytes);
    let list = slot.take_list(source, theirs)?;
    let incoming = Incoming::new(&shared, slot.slot, source, theirs);
    let packing = &mut outputs.packing;
    packing.rows.clear();
    packing.places.clear();
    // Scales are written by column when all sources have come: an expert's rows of one of them are few.
    let by_column = outputs.order == ScaleOrder::ByColumn && scale_bytes > 0;
    for (at, entry) in slot.entry_form().iter(&list).enumerate() {
        shared.pass();
        let (row, token) = incoming.find(slot, at, entry)?;
        let first_scales = packing.scales.len();
        if by_column {
            packing.scales.resize(first_scales + scale_bytes, 0);
            incoming.read(row, row_bytes, &mut packing.scales[first_scales..]);
        }
        for choice in 0..shared.config.top_k as usize {
            let Ok(expert) = usize::try_from(entry.expert(choice)) else { continue };
            if expert >= outputs.experts {
                return Err(incoming.nonsense("an expert", expert as u64, outputs.experts as u64));
            }
            let to = outputs.counts[expert] as usize;
            if to >= outputs.rows {
                return Err(incoming.nonsense("rows for an expert", to as u64 + 1, outputs.rows as u64));
            }
            outputs.counts[expert] += 1;
            let place = expert * outputs.rows + to;
            outputs.sources[place] = token;
            packing.rows.push(row);
            packing.places.push(place as u32);
            if by_column {
                packing.order.push((place as u32, (first_scales / scale_bytes) as u32));
            }
        }
    }
    // Row by row, so that each is still in the cache when it goes to its next expert.
    let all_bytes = packing.rows.len() * row_bytes * outputs.ranks;
    let copier = shared.copier_for(all_bytes, TAKEN_BYTES);
    words::copy_rows(copier, incoming.rows, &packing.rows, &mut outputs.values, &packing.places, row_bytes);
    if !by_column && scale_bytes > 0 {
        for (&row, &place) in packing.rows.iter().zip(&packing.places) {
            incoming.read(row, row_bytes, &mut outputs.scales[place as usize * scale_bytes..][..scale_bytes]);
        }
    }
    if source != shared.rank && shared.mapped(source).is_some() {
        report.wire_bytes += (theirs.rows as usize * (row_bytes + scale_bytes) + list.len()) as u64;
    }
    let packed = packing.rows.len();
    report.copied_bytes += (packed * (row_bytes + scale_bytes)) as u64;
    slot.return_list(list);
    Ok(packed as u32)
}

/// Writes the scales of packed rows column by column: a column's neighbours are a line of the cache, and row by row each of
/// them would be fetched once for every four bytes.
fn scatter_columns(packing: &mut Packing, rows_per_expert: usize, words: usize, into: &mut [u8]) {
    // By expert, and in an expert as they came: runs of neighbours.
    packing.order.sort_unstable();
    let same =
        |a: &(u32, u32), b: &(u32, u32)| a.0 as usize / rows_per_expert == b.0 as usize / rows_per_expert;
    for run in packing.order.chunk_by(same) {
        if run.len() < SHORT_RUN_ROWS {
            for &(place, row) in run {
                let (expert, at) = (place as usize / rows_per_expert, place as usize % rows_per_expert);
                let (of_row, _) = packing.scales[4 * row as usize * words..][..4 * words].as_chunks::<4>();
                for (word, four) in of_row.iter().enumerate() {
                    into[4 * ((expert * words + word) * rows_per_expert + at)..][..4].copy_from_slice(four);
                }
            }
            continue;
        }
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
/// Fewer rows share too little of a line to be worth it.
const SHORT_RUN_ROWS: usize = 4;

impl<'slot> LatencyStep<'slot> {
    /// Where this rank's results go: `[rows, hidden]` of one local expert, in the order of its packed rows, as many as
    /// came. The other ranks read them there.
    ///
    /// # Panics
    /// If there is no such expert here.
    pub fn results_mut(&mut self, expert: usize) -> &mut [Bf16] {
        let shared = &*self.slot.shared;
        let hidden = shared.config.hidden as usize;
        let rows = self.counts[expert] as usize;
        let at = shared.own_region().results(self.slot.slot) + expert * shared.rows_per_expert * hidden * 2;
        words::results(shared.own_memory(), at, rows * hidden)
    }

    /// Copies results from `[local experts, rows, hidden]`, for whom they lie elsewhere.
    pub fn copy_results(&mut self, from: &[Bf16]) -> Result<(), EpError> {
        let shared = self.slot.shared.clone();
        let hidden = shared.config.hidden as usize;
        let expected = self.counts.len() * shared.rows_per_expert * hidden;
        EpError::check_lengths([("results", from.len(), expected)])?;
        for expert in 0..self.counts.len() {
            let of_expert = &from[expert * shared.rows_per_expert * hidden..];
            let into = self.results_mut(expert);
            into.copy_from_slice(&of_expert[..into.len()]);
        }
        Ok(())
    }

    /// The send half of the combine: says that the results are there. Nothing is copied: each rank reads what it needs, or a
    /// port takes it from here.
    pub fn combine(self) -> LatencyCombine<'slot> {
        let LatencyStep { slot, counts, .. } = self;
        let shared = slot.shared.clone();
        let begun = shared.pace.now();
        let mut report = Report::new(shared.ranks());
        slot.next_call(COMBINE_WEIGHTED);
        let header = combine_header(slot, COMBINE_WEIGHTED);
        let first = shared.spread.of_rank(shared.rank).start;
        for rank in (0..shared.ranks()).filter(|&rank| !shared.is_masked(rank)) {
            if !slot.received.came[rank as usize] {
                continue;
            }
            let (begins, ends) = slot.received.of_source(rank, counts.len());
            let results = Results::new(&shared, slot.slot);
            let blocks = (first..).zip(begins.iter().zip(ends)).enumerate();
            let blocks = blocks.map(|(local, (expert, (&begin, &end)))| {
                (expert, (local * shared.rows_per_expert) as u32 + begin, end - begin)
            });
            if slot.is_verified() {
                blocks
                    .clone()
                    .for_each(|(expert, at, rows)| results.seal(slot, rank, expert, at, rows, false));
            }
            shared.arena_at(slot.slot, rank).write_begins(begins);
            slot.publish(rank, header, as_bytes(begins), |call| {
                let mut to = slot.received.results_at[rank as usize];
                for (_, at, rows) in blocks {
                    results.spans_to(rank, slot.is_verified(), at, to, rows, &mut call.spans);
                    to += rows;
                }
                call.spans.push(begins_span(&shared, slot.slot, rank, begins.len()));
                report.wire_bytes += call.spans.iter().map(|span| span.bytes as u64).sum::<u64>();
            });
        }
        report.end_half(begun, &shared);
        LatencyCombine { slot, header, report }
    }

    /// What the dispatch cost.
    pub fn report(&self) -> &Report {
        &self.report
    }
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
    /// The receive half: waits for every rank's results, and sums those of each token. The report is of both halves of the combine.
    ///
    /// `weights` is `[tokens, top_k]`, `out` is `[tokens, hidden]`: of the tokens of the dispatch. Each token's row is the
    /// sum over its choices, in their order, of weight times result, in `f32` with fused multiply-adds, rounded once. A
    /// token that chose nothing becomes zeros.
    pub fn receive(self, weights: &[f32], out: &mut [Bf16]) -> Result<Report, EpError> {
        let LatencyCombine { slot, header, mut report } = self;
        let shared = slot.shared.clone();
        let routes = slot.routes.clone();
        let begun = shared.pace.now();
        let (top_k, hidden) = (shared.config.top_k as usize, shared.config.hidden as usize);
        let tokens = routes.tokens;
        EpError::check_outputs([
            ("weights", weights.len(), tokens * top_k),
            ("the combined rows", out.len(), tokens * hidden),
        ])?;
        let sent = (report.wire_bytes, report.logical_bytes);
        let most_experts = shared.spread.most() as usize;
        let mut begins = vec![0; shared.ranks() as usize * most_experts];
        let mut answered = slot.hear_results(&header, &mut report, |slot, source, theirs| {
            let experts = shared.spread.of_rank(source).len();
            let begins = &mut begins[source as usize * most_experts..][..experts];
            shared.arena_of(slot.slot, source).read_begins(begins);
            slot.check_list(source, theirs, as_bytes(begins))
        })?;
        loop {
            let raise = routes.account(&shared, &answered, Some(weights), &mut report)?;
            (report.wire_bytes, report.logical_bytes) = sent;
            let summed = sum(slot, (&answered, &begins), (weights, &raise), out, &mut report);
            // What is found wrong may be what a rank that has masked this one has written since.
            if slot.check_membership(&mut answered)? {
                summed?;
                break;
            }
        }
        report.copied_bytes += 2 * (tokens * hidden) as u64;
        report.end_half(begun, &shared);
        Ok(report)
    }
}

/// Sums the results of each token, of the ranks that have answered.
fn sum(
    slot: &Slot,
    (answered, begins): (&[bool], &[u32]),
    (weights, raise): (&[f32], &[f32]),
    out: &mut [Bf16],
    report: &mut Report,
) -> Result<(), EpError> {
    let (shared, routes) = (&*slot.shared, &*slot.routes);
    let (top_k, hidden) = (shared.config.top_k as usize, shared.config.hidden as usize);
    let most_experts = shared.spread.most() as usize;
    let results = Results::new(shared, slot.slot);
    // Through ports results come expert by expert.
    let before = if shared.has_ports() { routes.choices_before() } else { Vec::new() };
    let mut rows = ResultRows::new(hidden);
    let mut factors = Vec::with_capacity(top_k);
    for token in 0..routes.tokens {
        shared.pass();
        rows.clear();
        factors.clear();
        for (choice, weight) in (token * top_k..).zip(&weights[token * top_k..][..top_k]) {
            let rank = routes.ranks[choice];
            if rank == NOWHERE || !answered[rank as usize] {
                continue;
            }
            let (local, place) = (routes.experts[choice] as usize, routes.places[choice]);
            let expert = shared.spread.of_rank(rank).start + local as u32;
            let (memory, row) = match shared.mapped(rank) {
                Some(memory) => {
                    let row = begins[rank as usize * most_experts + local].saturating_add(place);
                    if row as usize >= shared.rows_per_expert {
                        let (value, most) = (row.into(), shared.rows_per_expert as u64);
                        return Err(EpError::Nonsense { rank, what: "a result's row", value, most });
                    }
                    (memory, local * shared.rows_per_expert + row as usize)
                }
                None => (shared.own_memory(), (before[expert as usize] + place) as usize),
            };
            if slot.is_verified() {
                results.check(slot, rank, row, (expert, place), token as u32, false)?;
            }
            rows.push(memory, results.row_at(rank, row));
            factors.push(weight * raise.get(token).copied().unwrap_or(1.0));
            report.logical_bytes += 2 * hidden as u64;
            report.wire_bytes += if rank == shared.rank { 0 } else { 2 * hidden as u64 };
        }
        rows.weighted(shared.summer, &factors, &mut out[token * hidden..][..hidden]);
    }
    Ok(())
}
