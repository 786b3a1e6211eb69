//! The throughput mode: one row a token and rank, results summed in the order of the ranks.

use std::ops::Range;

use crate::arena::{Entries, Header, row_stride};
use crate::bytes::Bytes;
use crate::error::EpError;
use crate::latency::{check_row, combine_header};
use crate::slot::{COMBINE_PLAIN, Dispatch, NOWHERE, Report, Slot, WEIGHTED};
use crate::words::{self, ArenaRows, ResultRows};
use crate::{Bf16, Group, Payload};

/// What a dispatch gives in the throughput mode: the rows of the tokens that chose any of this rank's experts, in the
/// order of (source rank, source token).
///
/// The arrays are as long as the token limits of all ranks together, so that their shapes do not depend on what comes;
/// [`ThroughputOutputs::len`] rows of them are filled. Behind those, experts are -1 and the rest is left as it was.
#[derive(Clone, Debug)]
pub struct ThroughputOutputs {
    payload: Payload,
    row_bytes: usize,
    scale_bytes: usize,
    top_k: usize,
    rows: usize,
    len: usize,
    /// Rows that may hold experts.
    filled: usize,
    values: Bytes,
    scales: Bytes,
    experts: Vec<i64>,
    weights: Vec<f32>,
    tokens: Vec<u32>,
    ends: Vec<u32>,
    hits: Vec<u32>,
}

impl ThroughputOutputs {
    /// Room for what a rank of this group may get in this form. The memory is touched only where rows arrive.
    pub fn new(group: &Group, payload: Payload) -> ThroughputOutputs {
        let config = group.config();
        let rows = crate::arena::rows_per_expert(config);
        let top_k = config.top_k as usize;
        let row_bytes = payload.row_bytes(config.hidden) as usize;
        let scale_bytes = payload.scale_bytes(config.hidden) as usize;
        ThroughputOutputs {
            payload,
            row_bytes,
            scale_bytes,
            top_k,
            rows,
            len: 0,
            filled: 0,
            values: Bytes::zeroed(rows * row_bytes),
            scales: Bytes::zeroed(rows * scale_bytes),
            experts: vec![-1; rows * top_k],
            weights: vec![0.0; rows * top_k],
            tokens: vec![0; rows],
            ends: vec![0; config.ranks() as usize],
            hits: vec![0; config.spread().of_rank(group.rank()).len()],
        }
    }

    /// The form of the rows.
    pub fn payload(&self) -> Payload {
        self.payload
    }

    /// How many rows came.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none came.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `[rows, row bytes]`.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// `[rows, scale bytes]`.
    pub fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// `[rows, top_k]`: which of this rank's experts each choice is; -1 for those of other ranks and for none.
    pub fn experts(&self) -> &[i64] {
        &self.experts
    }

    /// `[rows, top_k]`: the weights of this rank's choices; 0 elsewhere.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// By row: which of its source's tokens it is.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The rows of a source.
    pub fn range(&self, source: u32) -> Range<usize> {
        let begin = source.checked_sub(1).map_or(0, |before| self.ends[before as usize]);
        begin as usize..self.ends[source as usize] as usize
    }

    /// By local expert: how many choices fell on it, rounded up to a multiple of `alignment`.
    pub fn counts(&self, alignment: u32) -> Vec<u32> {
        self.hits.iter().map(|&hits| hits.next_multiple_of(alignment.max(1))).collect()
    }

    /// The rows once more, expert by expert: one for each choice, each expert's beginning at a multiple of `alignment`,
    /// what fills up to there zeroed. In an expert the order is that of the rows.
    pub fn expand(&self, alignment: u32) -> Expanded {
        let alignment = alignment.max(1) as usize;
        let mut starts = Vec::with_capacity(self.hits.len());
        let mut end = 0;
        for &hits in &self.hits {
            starts.push(end);
            end += (hits as usize).next_multiple_of(alignment);
        }
        let mut expanded = Expanded {
            values: vec![0; end * self.row_bytes],
            scales: vec![0; end * self.scale_bytes],
            weights: vec![0.0; end],
            rows: vec![None; end],
            counts: self.hits.clone(),
            starts: starts.clone(),
        };
        for (at, &expert) in self.experts[..self.len * self.top_k].iter().enumerate() {
            let Ok(expert) = usize::try_from(expert) else { continue };
            let (row, to) = (at / self.top_k, starts[expert]);
            starts[expert] += 1;
            let copy = |from: &[u8], into: &mut [u8], bytes: usize| {
                into[to * bytes..][..bytes].copy_from_slice(&from[row * bytes..][..bytes]);
            };
            copy(&self.values, &mut expanded.values, self.row_bytes);
            copy(&self.scales, &mut expanded.scales, self.scale_bytes);
            expanded.weights[to] = self.weights[at];
            expanded.rows[to] = Some(row as u32);
        }
        expanded
    }
}

/// Rows of the throughput mode, expert by expert, each expert's block aligned and filled up with zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct Expanded {
    /// `[rows, row bytes]`.
    pub values: Vec<u8>,
    /// `[rows, scale bytes]`.
    pub scales: Vec<u8>,
    /// By row: the weight of its choice.
    pub weights: Vec<f32>,
    /// By row: which row of the outputs it is; `None` for one that fills up.
    pub rows: Vec<Option<u32>>,
    /// By local expert: how many rows it has.
    pub counts: Vec<u32>,
    /// By local expert: where its rows begin.
    pub starts: Vec<usize>,
}

/// A dispatch in the throughput mode, received. What the experts make of the rows, weighed and summed over this rank's
/// experts, is written to [`results_mut`](ThroughputStep::results_mut) and goes back with
/// [`combine`](ThroughputStep::combine).
#[must_use = "the other ranks wait for the combine"]
#[derive(Debug)]
pub struct ThroughputStep<'slot> {
    slot: &'slot mut Slot,
    report: Report,
    /// By source: where its rows begin. `None` for one that is masked.
    begins: Vec<Option<u32>>,
    len: usize,
}

impl<'slot> Dispatch<'slot> {
    /// The receive half in the throughput mode: waits for every rank's rows, in the order of the ranks.
    pub fn throughput(self, outputs: &mut ThroughputOutputs) -> Result<ThroughputStep<'slot>, EpError> {
        let Dispatch { slot, header, mut report } = self;
        let shared = slot.shared.clone();
        let shape = [
            ("outputs' row bytes", outputs.row_bytes, header.row_bytes as usize),
            ("outputs' scale bytes", outputs.scale_bytes, header.scale_bytes as usize),
            ("outputs' rows", outputs.rows, shared.rows_per_expert),
            ("outputs' ranks", outputs.ends.len(), shared.ranks() as usize),
        ];
        EpError::check_lengths(shape)?;
        outputs.len = 0;
        outputs.hits.fill(0);
        let mut begins = Vec::with_capacity(shared.ranks() as usize);
        slot.begin_waiting();
        for source in 0..shared.ranks() {
            let begin = outputs.len as u32;
            let came = slot.wait_for(source, &header, &mut report)?;
            if let Some(theirs) = &came {
                take(slot, source, theirs, outputs)?;
            }
            outputs.ends[source as usize] = outputs.len as u32;
            begins.push(came.map(|_| begin));
        }
        // Of earlier steps, those that failed too.
        outputs.experts[outputs.len * outputs.top_k..outputs.filled * outputs.top_k].fill(-1);
        outputs.filled = outputs.len;
        report.masked = shared.masked();
        Ok(ThroughputStep { len: outputs.len, slot, report, begins })
    }
}

/// Takes the rows of one source.
fn take(
    slot: &mut Slot,
    source: u32,
    theirs: &Header,
    outputs: &mut ThroughputOutputs,
) -> Result<(), EpError> {
    let shared = slot.shared.clone();
    let arena = shared.arena(slot.slot, source, shared.rank);
    let (row_bytes, scale_bytes, top_k) = (outputs.row_bytes, outputs.scale_bytes, outputs.top_k);
    let stride = row_stride(row_bytes, scale_bytes);
    let rows = theirs.rows as usize;
    let nonsense = |what, value: u64, most: u64| EpError::Nonsense { rank: source, what, value, most };
    let mut list = std::mem::take(&mut slot.entries);
    arena
        .read_entries(rows, stride, &mut list)
        .map_err(|over| nonsense("rows of", over.bytes as u64, over.memory_bytes as u64))?;
    let rows_at = arena.rows_at(rows);
    for (row, entry) in Entries::new(shared.config.top_k).iter(&list).enumerate() {
        let (token, at) = (entry.token(), rows_at + row * stride);
        if token >= theirs.tokens {
            return Err(nonsense("a token", token.into(), theirs.tokens.into()));
        }
        if slot.is_verified() {
            check_row(arena.memory(), at, row_bytes + scale_bytes, entry.checksum(), source, token)?;
        }
        let to = outputs.len;
        let scales = &mut outputs.scales[to * scale_bytes..][..scale_bytes];
        arena.memory().read(at + row_bytes, scales).expect("a row lies inside its arena");
        outputs.tokens[to] = token;
        let mut goes_here = false;
        for choice in 0..top_k {
            let place = to * top_k + choice;
            (outputs.experts[place], outputs.weights[place]) = (-1, 0.0);
            let Ok(expert) = usize::try_from(entry.expert(choice)) else { continue };
            let experts = outputs.hits.len() as u64;
            let hits =
                outputs.hits.get_mut(expert).ok_or_else(|| nonsense("an expert", expert as u64, experts))?;
            *hits += 1;
            goes_here = true;
            outputs.experts[place] = expert as i64;
            if theirs.flags & WEIGHTED != 0 {
                outputs.weights[place] = entry.weight(choice);
            }
        }
        if !goes_here {
            // There need not be room for its result.
            return Err(nonsense("a row for none of this rank's experts, of token", token.into(), 0));
        }
        outputs.len += 1;
        outputs.filled = outputs.filled.max(outputs.len);
    }
    slot.entries = list;
    let first = (outputs.len - rows) as u32;
    let from = ArenaRows { memory: arena.memory(), at: rows_at, stride, count: rows };
    let in_order: Vec<u32> = (0..rows as u32).collect();
    let places: Vec<u32> = (first..first + rows as u32).collect();
    words::copy_rows(
        shared.copier_for(rows * row_bytes),
        from,
        &in_order,
        &mut outputs.values,
        &places,
        row_bytes,
    );
    Ok(())
}

impl<'slot> ThroughputStep<'slot> {
    /// Where this rank's results go: `[rows, hidden]`, one for each row that came. The other ranks read them there.
    pub fn results_mut(&mut self) -> &mut [Bf16] {
        let shared = &*self.slot.shared;
        let (memory, at) = shared.results(self.slot.slot, shared.rank);
        words::results(memory, at, self.len * shared.config.hidden as usize)
    }

    /// The send half of the combine: says that the results are there.
    ///
    /// `weights`, `[rows, top_k]`, go back as they are; each rank gets the sums of what all ranks gave for its tokens.
    pub fn combine(self, weights: Option<&[f32]>) -> Result<ThroughputCombine<'slot>, EpError> {
        let ThroughputStep { slot, report, begins, len } = self;
        let shared = slot.shared.clone();
        let top_k = shared.config.top_k as usize;
        if let Some(weights) = weights {
            if weights.len() != len * top_k {
                return Err(EpError::WrongLength {
                    what: "weights",
                    len: weights.len(),
                    expected: len * top_k,
                });
            }
            let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            let (memory, at) = shared.returned_weights(slot.slot, shared.rank);
            memory.write(at, &bytes).expect("weights lie inside their region");
        }
        slot.call = slot.call.wrapping_add(1);
        let flags = if weights.is_some() { WEIGHTED } else { 0 };
        let header = Header { flags, ..combine_header(&shared.config, COMBINE_PLAIN) };
        for (rank, begin) in (0..shared.ranks()).zip(&begins) {
            let Some(begin) = begin.filter(|_| !shared.is_masked(rank)) else { continue };
            shared.arena(slot.slot, shared.rank, rank).write_begins(&[begin]);
            slot.publish(rank, &header);
        }
        Ok(ThroughputCombine { slot, header, report })
    }

    /// What the dispatch cost.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

/// A combine in the throughput mode whose send half is done.
#[must_use = "the tokens are still at their experts"]
#[derive(Debug)]
pub struct ThroughputCombine<'slot> {
    slot: &'slot mut Slot,
    header: Header,
    report: Report,
}

impl ThroughputCombine<'_> {
    /// The receive half: waits for every rank's results, and sums those of each token.
    ///
    /// `out` is `[tokens, hidden]`, each of up to two `biases` too. Each token's row is the sum of the biases and then of
    /// what the ranks made of the token, in the order of the ranks, in `f32`, rounded once. `weights`, `[tokens, top_k]`, get
    /// the sums of the weights that the ranks gave back.
    pub fn receive(
        self,
        biases: &[&[Bf16]],
        weights: Option<&mut [f32]>,
        out: &mut [Bf16],
    ) -> Result<Report, EpError> {
        let ThroughputCombine { slot, header, report: sent } = self;
        let shared = slot.shared.clone();
        let (top_k, hidden) = (shared.config.top_k as usize, shared.config.hidden as usize);
        let tokens = slot.routes.tokens;
        let mut shapes = vec![("the combined rows", out.len(), tokens * hidden)];
        shapes.extend(biases.iter().map(|bias| ("a bias", bias.len(), tokens * hidden)));
        shapes
            .extend(weights.as_ref().map(|weights| ("the combined weights", weights.len(), tokens * top_k)));
        shapes.push(("the list of biases", biases.len().max(2), 2));
        EpError::check_lengths(shapes)?;
        let mut report = Report::new(shared.ranks());
        let mut answered = vec![false; shared.ranks() as usize];
        let mut has_weights = answered.clone();
        let mut begins = vec![[0; 1]; shared.ranks() as usize];
        slot.begin_waiting();
        for source in 0..shared.ranks() {
            let Some(theirs) = slot.wait_for(source, &header, &mut report)? else { continue };
            answered[source as usize] = true;
            has_weights[source as usize] = theirs.flags & WEIGHTED != 0;
            shared.arena(slot.slot, source, shared.rank).read_begins(&mut begins[source as usize]);
        }
        let accounted = slot.account(&answered, None, &mut report);
        slot.finish();
        accounted?;
        let mut rows = ResultRows::new(hidden);
        let mut ranks: Vec<(u32, usize)> = Vec::with_capacity(top_k);
        let mut weights = weights;
        for token in 0..tokens {
            rows.clear();
            ranks.clear();
            for choice in token * top_k..(token + 1) * top_k {
                let rank = slot.routes.ranks[choice];
                if rank != NOWHERE && answered[rank as usize] {
                    ranks.push((rank, begins[rank as usize][0] as usize + slot.routes.rows[choice] as usize));
                }
            }
            ranks.sort_unstable();
            ranks.dedup();
            for &(rank, row) in &ranks {
                if row >= shared.rows_per_expert {
                    let (value, most) = (row as u64, shared.rows_per_expert as u64);
                    return Err(EpError::Nonsense { rank, what: "a result's row", value, most });
                }
                let (memory, at) = shared.results(slot.slot, rank);
                rows.push(memory, at + row * hidden * 2);
                report.logical_bytes += 2 * hidden as u64;
                report.wire_bytes += if rank == shared.rank { 0 } else { 2 * hidden as u64 };
            }
            let channels = token * hidden..(token + 1) * hidden;
            let of_token: Vec<&[Bf16]> = biases.iter().map(|bias| &bias[channels.clone()]).collect();
            rows.plain(shared.summer, &of_token, &mut out[channels]);
            let Some(weights) = weights.as_deref_mut() else { continue };
            let sums = &mut weights[token * top_k..][..top_k];
            sums.fill(0.0);
            for &(rank, row) in ranks.iter().filter(|(rank, _)| has_weights[*rank as usize]) {
                let (memory, at) = shared.returned_weights(slot.slot, rank);
                let mut bytes = vec![0; 4 * top_k];
                memory.read(at + row * 4 * top_k, &mut bytes).expect("weights lie inside their region");
                for (sum, bytes) in sums.iter_mut().zip(bytes.chunks_exact(4)) {
                    *sum += f32::from_le_bytes(bytes.try_into().expect("four bytes"));
                }
            }
        }
        slot.check_membership(&answered)?;
        report.add(&sent);
        Ok(report)
    }
}
