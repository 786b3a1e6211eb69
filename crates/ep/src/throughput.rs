//! The throughput mode: one row a token and rank, results summed in the order of the ranks.

use std::ops::Range;

use crate::arena::{Header, as_bytes};
use crate::bytes::Bytes;
use crate::error::EpError;
use crate::group::TAKEN_BYTES;
use crate::incoming::Incoming;
use crate::latency::{begins_span, combine_header};
use crate::planted::{Planted, is_planted};
use crate::region::rows_per_expert;
use crate::report::Report;
use crate::results::Results;
use crate::route::NOWHERE;
use crate::slot::{ALL_EXPERTS, COMBINE_PLAIN, Dispatch, Slot, WEIGHTED};
use crate::words::{self, ResultRows};
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
    /// Rows of a source, and which of these they become. Kept for its memory.
    places: Vec<(u32, u32)>,
}

impl ThroughputOutputs {
    /// Room for what a rank of this group may get in this form. The memory is touched only where rows arrive.
    pub fn new(group: &Group, payload: Payload) -> ThroughputOutputs {
        let config = group.config();
        let rows = rows_per_expert(config);
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
            places: Vec::new(),
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
    len: usize,
}

impl<'slot> Dispatch<'slot> {
    /// The receive half in the throughput mode: waits for every rank's rows, in the order of the ranks.
    pub fn throughput(self, outputs: &mut ThroughputOutputs) -> Result<ThroughputStep<'slot>, EpError> {
        let Dispatch { slot, header, mut report } = self;
        let shared = slot.shared.clone();
        let begun = shared.pace.now();
        let shape = [
            ("outputs' row bytes", outputs.row_bytes, header.row_bytes as usize),
            ("outputs' scale bytes", outputs.scale_bytes, header.scale_bytes as usize),
            ("outputs' rows", outputs.rows, shared.rows_per_expert),
            ("outputs' ranks", outputs.ends.len(), shared.ranks() as usize),
        ];
        EpError::check_lengths(shape)?;
        slot.begin_waiting();
        while !take_all(slot, &header, outputs, &mut report)? {}
        // Of earlier steps, those that failed too.
        outputs.experts[outputs.len * outputs.top_k..outputs.filled * outputs.top_k].fill(-1);
        outputs.filled = outputs.len;
        report.end_half(begun, &shared);
        Ok(ThroughputStep { len: outputs.len, slot, report })
    }
}

/// Takes the rows of all sources, in the order of their ranks. False if it is to be done once more.
fn take_all(
    slot: &mut Slot,
    header: &Header,
    outputs: &mut ThroughputOutputs,
    report: &mut Report,
) -> Result<bool, EpError> {
    let shared = slot.shared.clone();
    outputs.len = 0;
    outputs.hits.fill(0);
    slot.received.begin();
    for source in 0..shared.ranks() {
        let begin = outputs.len as u32;
        slot.received.begins.push(begin);
        let came = slot.wait_for(source, header, report)?;
        if let Some(theirs) = &came
            && let Err(error) = take(slot, source, theirs, outputs, report)
        {
            return slot.excuse(source, error).map(|()| false);
        }
        slot.received.note(source, came.as_ref(), outputs.len as u32 - begin, &shared)?;
        outputs.ends[source as usize] = outputs.len as u32;
    }
    slot.received.begins.push(outputs.len as u32);
    slot.end_taking()
}

/// Takes the rows of one source.
fn take(
    slot: &mut Slot,
    source: u32,
    theirs: &Header,
    outputs: &mut ThroughputOutputs,
    report: &mut Report,
) -> Result<(), EpError> {
    let shared = slot.shared.clone();
    let (row_bytes, scale_bytes, top_k) = (outputs.row_bytes, outputs.scale_bytes, outputs.top_k);
    let list = slot.take_list(source, theirs)?;
    let incoming = Incoming::new(&shared, slot.slot, source, theirs);
    let mut places = std::mem::take(&mut outputs.places);
    places.clear();
    for (at, entry) in slot.entry_form().iter(&list).enumerate() {
        shared.pass();
        let (row, token) = incoming.find(slot, at, entry)?;
        let to = outputs.len;
        if scale_bytes > 0 {
            incoming.read(row, row_bytes, &mut outputs.scales[to * scale_bytes..][..scale_bytes]);
        }
        outputs.tokens[to] = token;
        let experts = &mut outputs.experts[to * top_k..][..top_k];
        let weights = &mut outputs.weights[to * top_k..][..top_k];
        let mut goes_here = false;
        for (choice, (into, weight)) in experts.iter_mut().zip(weights).enumerate() {
            (*into, *weight) = (-1, 0.0);
            let Ok(expert) = usize::try_from(entry.expert(choice)) else { continue };
            let held = outputs.hits.len() as u64;
            let Some(hits) = outputs.hits.get_mut(expert) else {
                return Err(incoming.nonsense("an expert", expert as u64, held));
            };
            *hits += 1;
            goes_here = true;
            *into = expert as i64;
            if theirs.flags & WEIGHTED != 0 {
                *weight = entry.weight(choice);
            }
        }
        if !goes_here {
            // There need not be room for its result.
            return Err(incoming.nonsense(
                "a row for none of this rank's experts, of token",
                token.into(),
                0,
            ));
        }
        places.push((row, to as u32));
        outputs.len += 1;
        outputs.filled = outputs.filled.max(outputs.len);
    }
    let (from, to): (Vec<u32>, Vec<u32>) = places.iter().copied().unzip();
    let copier = shared.copier_for(places.len() * row_bytes * outputs.ends.len(), TAKEN_BYTES);
    words::copy_rows(copier, incoming.rows, &from, &mut outputs.values, &to, row_bytes);
    if source != shared.rank && shared.mapped(source).is_some() {
        report.wire_bytes += (places.len() * (row_bytes + scale_bytes) + list.len()) as u64;
    }
    report.copied_bytes += (places.len() * (row_bytes + scale_bytes)) as u64;
    outputs.places = places;
    slot.return_list(list);
    Ok(())
}

impl<'slot> ThroughputStep<'slot> {
    /// Where this rank's results go: `[rows, hidden]`, one for each row that came. The other ranks read them there.
    pub fn results_mut(&mut self) -> &mut [Bf16] {
        let shared = &*self.slot.shared;
        let at = shared.own_region().results(self.slot.slot);
        words::results(shared.own_memory(), at, self.len * shared.config.hidden as usize)
    }

    /// The send half of the combine: says that the results are there.
    ///
    /// `weights`, `[rows, top_k]`, go back as they are; each rank gets the sums of what all ranks gave for its tokens.
    pub fn combine(self, weights: Option<&[f32]>) -> Result<ThroughputCombine<'slot>, EpError> {
        let ThroughputStep { slot, len, .. } = self;
        let shared = slot.shared.clone();
        let begun = shared.pace.now();
        let mut report = Report::new(shared.ranks());
        if let Some(weights) = weights {
            EpError::check_lengths([("weights", weights.len(), len * shared.config.top_k as usize)])?;
            let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            let at = shared.own_region().result_weights(slot.slot);
            shared.own_memory().write(at, &bytes).expect("weights lie inside their region");
        }
        slot.next_call(COMBINE_PLAIN);
        let header = combine_header(slot, COMBINE_PLAIN);
        let weighted = if weights.is_some() { WEIGHTED } else { 0 };
        let header = Header { flags: header.flags | weighted, ..header };
        let results = Results::new(&shared, slot.slot);
        for rank in (0..shared.ranks()).filter(|&rank| !shared.is_masked(rank)) {
            if !slot.received.came[rank as usize] {
                continue;
            }
            let (begins, ends) = slot.received.of_source(rank, 1);
            let (at, rows) = (begins[0], ends[0] - begins[0]);
            if slot.is_verified() {
                results.seal(slot, rank, ALL_EXPERTS - shared.rank, at, rows, weights.is_some());
            }
            let arena = shared.arena_at(slot.slot, rank);
            if !is_planted(Planted::BeginsLate) {
                arena.write_begins(begins);
            }
            slot.publish(rank, header, as_bytes(begins), |call| {
                let to = slot.received.results_at[rank as usize];
                results.spans_to(rank, slot.is_verified(), at, to, rows, &mut call.spans);
                if weights.is_some() {
                    call.spans.push(results.weights_span(rank, at, to, rows));
                }
                call.spans.push(begins_span(&shared, slot.slot, rank, 1));
                report.wire_bytes += call.spans.iter().map(|span| span.bytes as u64).sum::<u64>();
            });
            if is_planted(Planted::BeginsLate) {
                arena.write_begins(begins);
            }
        }
        report.end_half(begun, &shared);
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
        let ThroughputCombine { slot, header, mut report } = self;
        let shared = slot.shared.clone();
        let routes = slot.routes.clone();
        let begun = shared.pace.now();
        let (top_k, hidden) = (shared.config.top_k as usize, shared.config.hidden as usize);
        let tokens = routes.tokens;
        let mut shapes = vec![("the combined rows", out.len(), tokens * hidden)];
        shapes.extend(biases.iter().map(|bias| ("a bias", bias.len(), tokens * hidden)));
        shapes
            .extend(weights.as_ref().map(|weights| ("the combined weights", weights.len(), tokens * top_k)));
        shapes.push(("the list of biases", biases.len().max(2), 2));
        EpError::check_lengths(shapes)?;
        let mut has_weights = vec![false; shared.ranks() as usize];
        let mut begins = vec![0; shared.ranks() as usize];
        let mut answered = slot.hear_results(&header, &mut report, |slot, source, theirs| {
            let at = source as usize;
            has_weights[at] = theirs.flags & WEIGHTED != 0;
            let begin = &mut begins[at..=at];
            shared.arena_of(slot.slot, source).read_begins(begin);
            slot.check_list(source, theirs, as_bytes(begin))?;
            if shared.mapped(source).is_none() {
                begin[0] = routes.results_at[at];
            }
            Ok(())
        })?;
        let mut weights = weights;
        let sent = (report.wire_bytes, report.logical_bytes);
        loop {
            (report.wire_bytes, report.logical_bytes) = sent;
            routes.account(&shared, &answered, slot.weights.as_deref(), &mut report)?;
            let summed = sum(slot, (&answered, &begins, &has_weights), biases, out, &mut report);
            if let (Some(weights), Ok(())) = (weights.as_deref_mut(), &summed) {
                let gave = |rank: u32| answered[rank as usize] && has_weights[rank as usize];
                sum_weights(slot, gave, &begins, weights);
            }
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

/// The ranks that a token went to, ascending, each with where its result lies there: where those of this rank begin, and
/// which of them it is.
fn results_of(
    slot: &Slot,
    token: usize,
    counts: impl Fn(u32) -> bool,
    begins: &[u32],
    into: &mut Vec<(u32, u32, u32)>,
) {
    let routes = &*slot.routes;
    let top_k = slot.shared.config.top_k as usize;
    into.clear();
    for choice in token * top_k..(token + 1) * top_k {
        let rank = routes.ranks[choice];
        if rank != NOWHERE && counts(rank) {
            into.push((rank, begins[rank as usize], routes.rows[choice]));
        }
    }
    into.sort_unstable();
    into.dedup();
}

/// Sums the results of each token, of the ranks that have answered.
fn sum(
    slot: &Slot,
    (answered, begins, has_weights): (&[bool], &[u32], &[bool]),
    biases: &[&[Bf16]],
    out: &mut [Bf16],
    report: &mut Report,
) -> Result<(), EpError> {
    let shared = &*slot.shared;
    let hidden = shared.config.hidden as usize;
    let results = Results::new(shared, slot.slot);
    let mut rows = ResultRows::new(hidden);
    let mut of_token = Vec::with_capacity(shared.config.top_k as usize);
    let mut of_biases: Vec<&[Bf16]> = Vec::with_capacity(biases.len());
    for token in 0..slot.routes.tokens {
        shared.pass();
        rows.clear();
        results_of(slot, token, |rank| answered[rank as usize], begins, &mut of_token);
        for &(rank, begin, place) in &of_token {
            let row = begin.saturating_add(place);
            let memory = match shared.mapped(rank) {
                Some(_) if row as usize >= shared.rows_per_expert => {
                    let (value, most) = (row.into(), shared.rows_per_expert as u64);
                    return Err(EpError::Nonsense { rank, what: "a result's row", value, most });
                }
                Some(memory) => memory,
                None => shared.own_memory(),
            };
            if slot.is_verified() {
                results.check(
                    slot,
                    rank,
                    row as usize,
                    (ALL_EXPERTS - rank, place),
                    token as u32,
                    has_weights[rank as usize],
                )?;
            }
            rows.push(memory, results.row_at(rank, row as usize));
            report.logical_bytes += 2 * hidden as u64;
            report.wire_bytes += if rank == shared.rank { 0 } else { 2 * hidden as u64 };
        }
        let channels = token * hidden..(token + 1) * hidden;
        of_biases.clear();
        of_biases.extend(biases.iter().map(|bias| &bias[channels.clone()]));
        rows.plain(shared.summer, &of_biases, &mut out[channels]);
    }
    Ok(())
}

/// Sums the weights that the ranks gave back for each token.
fn sum_weights(slot: &Slot, gave: impl Fn(u32) -> bool, begins: &[u32], into: &mut [f32]) {
    let top_k = slot.shared.config.top_k as usize;
    let results = Results::new(&slot.shared, slot.slot);
    let (mut of_token, mut bytes) = (Vec::with_capacity(top_k), vec![0; 4 * top_k]);
    for (token, sums) in into.chunks_exact_mut(top_k).enumerate() {
        sums.fill(0.0);
        results_of(slot, token, &gave, begins, &mut of_token);
        for &(rank, begin, place) in &of_token {
            results.weights(rank, (begin.saturating_add(place)) as usize, &mut bytes);
            for (sum, bytes) in sums.iter_mut().zip(bytes.chunks_exact(4)) {
                *sum += f32::from_le_bytes(bytes.try_into().expect("four bytes"));
            }
        }
    }
}
