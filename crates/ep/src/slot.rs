//! One micro-batch's way out: whose rows go where, written into the arenas of those who get them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crossdock_memory::Memory;

use crate::arena::{Entries, Header, payload_number, row_stride};
use crate::arrivals::{self, Waited};
use crate::config::{BLOCK_CHANNELS, Difference};
use crate::error::EpError;
use crate::group::{Farewell, LostWeight, Shared};
use crate::layout::LayoutError;
use crate::words;
use crate::{Bf16, Payload, ScaleRule};

/// One micro-batch's buffers at one rank. It holds one dispatch at a time: the dispatch borrows it until it is combined
/// or dropped.
///
/// ```compile_fail,E0499
/// # fn two(slot: &mut crossdock_ep::Slot, tokens: &crossdock_ep::Tokens<'_>) -> Result<(), crossdock_ep::EpError> {
/// let first = slot.dispatch(tokens)?;
/// let second = slot.dispatch(tokens)?;
/// drop(first);
/// # drop(second);
/// # Ok(())
/// # }
/// ```
pub struct Slot {
    pub(crate) shared: Arc<Shared>,
    pub(crate) slot: u32,
    /// The last call that was made; all ranks count alike.
    pub(crate) call: u32,
    /// A dispatch was not combined: its rows may still be read by others.
    open: bool,
    /// The first step is over.
    warm: bool,
    /// When the waits of this receive half are over. One deadline for all ranks: several that are dead cost it once.
    until: Instant,
    pub(crate) routes: Routes,
    lists: Vec<Vec<u8>>,
    row: Vec<u8>,
    scales: Vec<f32>,
    pub(crate) entries: Vec<u8>,
}

/// A rank's tokens for one step.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// Their rows.
    pub rows: Rows<'a>,
    /// `[tokens, top_k]`: the experts that each token chose, or -1.
    pub choices: &'a [i64],
    /// `[tokens, top_k]`: the weights of the choices, which go with the rows. Zeros if left out.
    pub weights: Option<&'a [f32]>,
}

/// Rows, and the form in which they travel.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// `[tokens, hidden]`, as they are.
    Bf16(&'a [Bf16]),
    /// `[tokens, hidden]`, made FP8 on the way, with `f32` scales.
    Fp8(&'a [Bf16], ScaleRule),
    /// `[tokens, hidden]`, made FP8 on the way, with scales that are powers of two, a byte each.
    Fp8Ue8m0(&'a [Bf16]),
    /// Rows that already have their form, which is given.
    Made {
        /// The form.
        payload: Payload,
        /// `[tokens, row bytes]`.
        values: &'a [u8],
        /// The scales.
        scales: Scales<'a>,
    },
}

/// Scales in any order: each is found at `token * token_stride + element * element_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Scales<'a> {
    /// Where they are.
    pub bytes: &'a [u8],
    /// The bytes of one element; a token's elements follow each other in this order on arrival.
    pub element_bytes: usize,
    /// From one token to the next, in bytes.
    pub token_stride: usize,
    /// From one element of a token to its next, in bytes.
    pub element_stride: usize,
}

impl<'a> Scales<'a> {
    /// None at all.
    pub const NONE: Scales<'static> =
        Scales { bytes: &[], element_bytes: 1, token_stride: 0, element_stride: 1 };

    /// `[tokens, scale bytes]`, one token after the other.
    pub fn by_token(bytes: &'a [u8], scale_bytes: usize) -> Scales<'a> {
        Scales {
            bytes,
            element_bytes: scale_bytes.max(1),
            token_stride: scale_bytes,
            element_stride: scale_bytes,
        }
    }
}

/// What a token's choices come to. Kept from the dispatch to the combine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Routes {
    pub tokens: usize,
    /// By token and choice: the rank, or [`NOWHERE`].
    pub ranks: Vec<u32>,
    /// By token and choice: which of that rank's experts.
    pub experts: Vec<u16>,
    /// By token and choice: how many earlier choices of this rank fell on the same expert.
    pub places: Vec<u32>,
    /// By token and choice: how many of this rank's earlier tokens go to the same rank.
    pub rows: Vec<u32>,
    /// By expert: choices so far.
    expert_counts: Vec<u32>,
    /// By rank: tokens.
    pub rank_counts: Vec<u32>,
}

pub(crate) const NOWHERE: u32 = u32::MAX;

/// Kinds of calls.
pub(crate) const DISPATCH: u32 = 1;
pub(crate) const COMBINE_WEIGHTED: u32 = 2;
pub(crate) const COMBINE_PLAIN: u32 = 3;
const RELEASE: u32 = 4;

/// Rows carry checksums.
const VERIFIED: u32 = 1;
/// Rows carry weights.
pub(crate) const WEIGHTED: u32 = 2;

/// What a call cost and what it waited for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Bytes that this rank wrote into the memory of others, or read from there.
    pub wire_bytes: u64,
    /// Bytes that DeepEP's formula counts: each choice's row once, wherever its expert is.
    pub logical_bytes: u64,
    /// How long this rank waited for each other, by rank.
    pub waits: Vec<Duration>,
    /// The ranks that are masked now, ascending.
    pub masked: Vec<u32>,
    /// By token: the weight of those of its choices that masked ranks did not answer. Empty where nothing was lost.
    pub lost: Vec<f32>,
}

impl Report {
    pub(crate) fn new(ranks: u32) -> Report {
        Report { waits: vec![Duration::ZERO; ranks as usize], ..Report::default() }
    }

    /// Adds what an earlier half of the step cost.
    pub(crate) fn add(&mut self, earlier: &Report) {
        self.wire_bytes += earlier.wire_bytes;
        self.logical_bytes += earlier.logical_bytes;
        for (wait, before) in self.waits.iter_mut().zip(&earlier.waits) {
            *wait += *before;
        }
    }
}

/// A dispatch whose send half is done. Its receive half is [`latency`](Dispatch::latency) or
/// [`throughput`](Dispatch::throughput), which all ranks choose alike; between the halves there may be other work.
#[must_use = "the other ranks wait for what follows"]
#[derive(Debug)]
pub struct Dispatch<'slot> {
    pub(crate) slot: &'slot mut Slot,
    pub(crate) header: Header,
    pub(crate) report: Report,
}

impl Slot {
    pub(crate) fn new(shared: Arc<Shared>, slot: u32) -> Slot {
        let ranks = shared.ranks() as usize;
        Slot {
            slot,
            call: 0,
            open: false,
            warm: false,
            until: Instant::now(),
            routes: Routes::default(),
            lists: vec![Vec::new(); ranks],
            row: Vec::new(),
            scales: Vec::new(),
            entries: Vec::new(),
            shared,
        }
    }

    /// Sends tokens to the ranks of their experts: writes each row once into the arena of each rank that has any of
    /// them, and returns. Nothing waits here, except where the last dispatch of this slot was never combined.
    pub fn dispatch(&mut self, tokens: &Tokens<'_>) -> Result<Dispatch<'_>, EpError> {
        let header = self.check(tokens)?;
        // Who is masked by some has to stop for all: the others take its next call for another one than theirs.
        if let Some(by) = self.expelled_by() {
            return Err(EpError::Masked { by });
        }
        self.release()?;
        self.call = self.call.wrapping_add(1);
        self.open = true;
        self.write_rows(tokens, &header);
        let shared = self.shared.clone();
        let row_bytes = u64::from(header.row_bytes + header.scale_bytes);
        let mut report = Report::new(shared.ranks());
        for rank in (0..shared.ranks()).filter(|&rank| !shared.is_masked(rank)) {
            let rows = self.routes.rank_counts[rank as usize];
            if rank != shared.rank {
                report.wire_bytes += u64::from(rows) * row_bytes + self.lists[rank as usize].len() as u64;
            }
            let arena = shared.arena(self.slot, shared.rank, rank);
            arena.write_entries(&self.lists[rank as usize]);
            self.publish(rank, &Header { rows, ..header });
        }
        let chosen = self.routes.ranks.iter().filter(|&&rank| rank != NOWHERE).count();
        report.logical_bytes = chosen as u64 * row_bytes;
        Ok(Dispatch { slot: self, header, report })
    }

    /// Checks the arguments and finds each choice's rank and place. Gives what the call's headers have in common.
    fn check(&mut self, tokens: &Tokens<'_>) -> Result<Header, EpError> {
        let config = &self.shared.config;
        let top_k = config.top_k as usize;
        let hidden = config.hidden as usize;
        if !tokens.choices.len().is_multiple_of(top_k) {
            return Err(LayoutError::Ragged { len: tokens.choices.len(), top_k }.into());
        }
        let count = tokens.choices.len() / top_k;
        let limit = config.max_tokens[self.shared.rank as usize];
        if count > limit as usize {
            return Err(EpError::TooManyTokens { tokens: count, limit });
        }
        let same = |what, len, expected| EpError::check_lengths([(what, len, expected)]);
        if let Some(weights) = tokens.weights {
            same("weights", weights.len(), tokens.choices.len())?;
        }
        let payload = match tokens.rows {
            Rows::Bf16(rows) => {
                same("rows", rows.len(), count * hidden)?;
                Payload::Bf16
            }
            Rows::Fp8(rows, _) => {
                same("rows", rows.len(), count * hidden)?;
                Payload::Fp8
            }
            Rows::Fp8Ue8m0(rows) => {
                same("rows", rows.len(), count * hidden)?;
                Payload::Fp8Ue8m0
            }
            Rows::Made { payload, .. } => {
                config.check_payload(payload)?;
                payload
            }
        };
        let quantised = matches!(tokens.rows, Rows::Fp8(..) | Rows::Fp8Ue8m0(_));
        if quantised && !config.hidden.is_multiple_of(BLOCK_CHANNELS) {
            let expected = hidden.next_multiple_of(BLOCK_CHANNELS as usize);
            return Err(EpError::WrongLength { what: "a row to be quantised", len: hidden, expected });
        }
        let (row_bytes, scale_bytes) = (payload.row_bytes(config.hidden), payload.scale_bytes(config.hidden));
        let most_bytes = config.payload.row_bytes(config.hidden) + config.payload.scale_bytes(config.hidden);
        if row_bytes + scale_bytes > most_bytes {
            return Err(EpError::PayloadTooLarge { row_bytes, scale_bytes, most_bytes });
        }
        if let Rows::Made { values, scales, .. } = tokens.rows {
            same("values", values.len(), count * row_bytes as usize)?;
            let elements = (scale_bytes as usize).checked_div(scales.element_bytes).unwrap_or(0);
            same("a token's scales", elements * scales.element_bytes, scale_bytes as usize)?;
            let end = match (count, elements) {
                (0, _) | (_, 0) => 0,
                _ => (count - 1)
                    .saturating_mul(scales.token_stride)
                    .saturating_add((elements - 1).saturating_mul(scales.element_stride))
                    .saturating_add(scales.element_bytes),
            };
            if scales.bytes.len() < end {
                return Err(EpError::WrongLength { what: "scales", len: scales.bytes.len(), expected: end });
            }
        }
        self.routes.find(tokens.choices, &self.shared)?;
        let most = self.routes.expert_counts.iter().enumerate().max_by_key(|(_, choices)| **choices);
        if let Some((expert, &choices)) = most.filter(|(_, choices)| **choices > limit) {
            return Err(EpError::TooManyChoices { expert: expert as u32, choices, limit });
        }
        let verified = if self.shared.options.verify { VERIFIED } else { 0 };
        let weighted = if tokens.weights.is_some() { WEIGHTED } else { 0 };
        Ok(Header {
            kind: DISPATCH,
            rows: 0,
            tokens: count as u32,
            top_k: config.top_k,
            payload: payload_number(payload),
            row_bytes: row_bytes as u32,
            scale_bytes: scale_bytes as u32,
            flags: verified | weighted,
            placement_version: config.placement_version,
        })
    }

    /// Makes each token's row once and writes it to each rank that gets it; makes the lists.
    fn write_rows(&mut self, tokens: &Tokens<'_>, header: &Header) {
        let shared = &*self.shared;
        let (top_k, hidden) = (shared.config.top_k as usize, shared.config.hidden as usize);
        let (row_bytes, scale_bytes) = (header.row_bytes as usize, header.scale_bytes as usize);
        let stride = row_stride(row_bytes, scale_bytes);
        let entries = Entries::new(shared.config.top_k);
        // Where each rank's rows begin, and who it is.
        let places: Vec<Option<(&Memory, usize)>> = (0..shared.ranks())
            .map(|rank| {
                let arena = shared.arena(self.slot, shared.rank, rank);
                let rows = self.routes.rank_counts[rank as usize] as usize;
                (!shared.is_masked(rank)).then(|| (arena.memory(), arena.rows_at(rows)))
            })
            .collect();
        for list in &mut self.lists {
            list.clear();
        }
        self.row.resize(row_bytes + scale_bytes, 0);
        let rows_of_a_rank =
            self.routes.rank_counts.iter().sum::<u32>() as usize / self.routes.rank_counts.len();
        let copier = shared.copier_for(rows_of_a_rank * stride);
        for token in 0..self.routes.tokens {
            let (values, scales) = self.row.split_at_mut(row_bytes);
            let channels = token * hidden..(token + 1) * hidden;
            match tokens.rows {
                Rows::Bf16(rows) => {
                    for (bytes, value) in values.chunks_exact_mut(2).zip(&rows[channels]) {
                        bytes.copy_from_slice(&value.to_bits().to_le_bytes());
                    }
                }
                Rows::Fp8(rows, rule) => {
                    self.scales.resize(scale_bytes / 4, 0.0);
                    shared.quantiser.quantise(&rows[channels], rule, values, &mut self.scales);
                    for (bytes, scale) in scales.chunks_exact_mut(4).zip(&self.scales) {
                        bytes.copy_from_slice(&scale.to_le_bytes());
                    }
                }
                Rows::Fp8Ue8m0(rows) => {
                    let blocks = hidden / BLOCK_CHANNELS as usize;
                    shared.quantiser.quantise_ue8m0(&rows[channels], values, &mut scales[..blocks]);
                    scales[blocks..].fill(0);
                }
                Rows::Made { values: made, scales: given, .. } => {
                    values.copy_from_slice(&made[token * row_bytes..][..row_bytes]);
                    for (element, bytes) in scales.chunks_exact_mut(given.element_bytes.max(1)).enumerate() {
                        let at = token * given.token_stride + element * given.element_stride;
                        bytes.copy_from_slice(&given.bytes[at..][..given.element_bytes]);
                    }
                }
            }
            let checksum = if header.flags & VERIFIED != 0 { crc32c::crc32c(&self.row) } else { 0 };
            for choice in token * top_k..(token + 1) * top_k {
                let rank = self.routes.ranks[choice];
                let Some((memory, rows_at)) = places.get(rank as usize).copied().flatten() else { continue };
                let list = &mut self.lists[rank as usize];
                let row = self.routes.rows[choice] as usize;
                let at = row * entries.bytes();
                if at == list.len() {
                    entries.push(list, token as u32);
                    entries.set_checksum(list, at, checksum);
                    words::store_row(copier, memory, rows_at + row * stride, &self.row);
                }
                let weight = tokens.weights.map_or(0.0, |weights| weights[choice]);
                entries.choose(list, at, choice - token * top_k, self.routes.experts[choice] as i16, weight);
            }
        }
    }

    /// Tells a rank that this rank's part of the call is there.
    pub(crate) fn publish(&self, rank: u32, header: &Header) {
        let shared = &*self.shared;
        let arena = shared.arena(self.slot, shared.rank, rank);
        arena.write_header(self.call, header, &shared.mask_words());
        words::with(arena.word(), |word| {
            if arrivals::publish(word, self.call) {
                arrivals::wake(word);
            }
        });
    }

    /// A receive half begins.
    pub(crate) fn begin_waiting(&mut self) {
        let time = if self.warm { self.shared.options.deadline } else { self.shared.options.warm_up };
        let now = Instant::now();
        // A time beyond all bounds is a year.
        self.until = now.checked_add(time).unwrap_or(now + Duration::from_secs(31_536_000));
    }

    /// Waits for a rank's part of the call. `None` if the rank is masked, or was masked now.
    pub(crate) fn wait_for(
        &mut self,
        source: u32,
        ours: &Header,
        report: &mut Report,
    ) -> Result<Option<Header>, EpError> {
        let shared = self.shared.clone();
        if shared.is_masked(source) {
            return Ok(None);
        }
        let arena = shared.arena(self.slot, source, shared.rank);
        let begun = Instant::now();
        let waited = words::with(arena.word(), |word| {
            let stop = || {
                shared.is_gone(source)
                    || self.has_left(source)
                    || self.expelled_by().is_some()
                    || self.is_masked_elsewhere(source)
            };
            arrivals::wait(word, self.call, shared.patience, self.until, stop)
        });
        report.waits[source as usize] += begun.elapsed();
        if waited != Waited::Arrived
            && let Some(by) = self.expelled_by()
        {
            return Err(EpError::Masked { by });
        }
        if waited != Waited::Arrived {
            self.mask(source);
            return Ok(None);
        }
        let mut mask = vec![0; shared.ranks().div_ceil(32) as usize];
        let header = arena.read_header(self.call, &mut mask);
        let says = |rank: u32| mask[rank as usize / 32] >> (rank % 32) & 1 != 0;
        if says(shared.rank) {
            return Err(EpError::Masked { by: source });
        }
        for rank in (0..shared.ranks()).filter(|&rank| says(rank) && !shared.is_masked(rank)) {
            self.mask(rank);
        }
        let differences = differences(ours, &header);
        if !differences.is_empty() {
            return Err(EpError::Mismatch { rank: source, differences });
        }
        let limit = shared.config.max_tokens[source as usize];
        let sane = |what, value: u32, most: u32| {
            if value <= most {
                Ok(())
            } else {
                Err(EpError::Nonsense { rank: source, what, value: value.into(), most: most.into() })
            }
        };
        sane("tokens", header.tokens, limit)?;
        sane("rows", header.rows, header.tokens)?;
        Ok(Some(header))
    }

    /// Goes on without a rank, and leaves it word.
    fn mask(&self, rank: u32) {
        let shared = &*self.shared;
        shared.say_farewell(rank, Farewell::Masked);
        // What the rank may still be reading is overwritten, by any slot, only after it can know that it should not.
        fence(Ordering::SeqCst);
        shared.mask(rank);
    }

    /// A rank that has masked this one. What those say that are masked or dead to this one counts for nothing.
    fn expelled_by(&self) -> Option<u32> {
        let shared = &*self.shared;
        let counts = |by: &u32| !shared.is_masked(*by) && !shared.is_gone(*by);
        (0..shared.ranks()).filter(counts).find(|&by| self.is_expelled_by(by))
    }

    /// Whether another rank has said of this one that it is masked, with its part of this call or of the next: whoever
    /// masks in this call says so with the next.
    fn is_masked_elsewhere(&self, rank: u32) -> bool {
        let shared = &*self.shared;
        let mut mask = vec![0; shared.ranks().div_ceil(32) as usize];
        let mut says = |other: u32, call: u32| {
            let arena = shared.arena(self.slot, other, shared.rank);
            words::with(arena.word(), |word| arrivals::has_come(word, call)) && {
                arena.read_header(call, &mut mask);
                mask[rank as usize / 32] >> (rank % 32) & 1 != 0
            }
        };
        (0..shared.ranks())
            .filter(|&other| other != rank && !shared.is_masked(other))
            .any(|other| says(other, self.call) || says(other, self.call.wrapping_add(1)))
    }

    fn is_expelled_by(&self, by: u32) -> bool {
        self.shared.farewell_of(self.slot, by) == Farewell::Masked as u32
    }

    fn has_left(&self, rank: u32) -> bool {
        self.shared.farewell_of(self.slot, rank) == Farewell::Left as u32
    }

    /// Whether those whose memory this rank has just read had not masked it. A rank that has may have overwritten what it
    /// had published, and then what was read there counts for nothing.
    pub(crate) fn check_membership(&self, read: &[bool]) -> Result<(), EpError> {
        fence(Ordering::SeqCst);
        let mut read = (0..self.shared.ranks()).zip(read).filter(|(_, read)| **read);
        match read.find(|&(by, _)| self.is_expelled_by(by)) {
            Some((by, _)) => Err(EpError::Masked { by }),
            None => Ok(()),
        }
    }

    /// The slot's step is over: the next may begin without asking whether others still read.
    pub(crate) fn finish(&mut self) {
        self.open = false;
        self.warm = true;
    }

    /// Where the last dispatch was never combined: waits until every rank has read what this one sent.
    fn release(&mut self) -> Result<(), EpError> {
        if !self.open {
            return Ok(());
        }
        self.call = self.call.wrapping_add(1);
        let header = Header { kind: RELEASE, ..Header::default() };
        let shared = self.shared.clone();
        for rank in (0..shared.ranks()).filter(|&rank| !shared.is_masked(rank)) {
            self.publish(rank, &header);
        }
        let mut report = Report::new(shared.ranks());
        self.begin_waiting();
        for source in 0..shared.ranks() {
            self.wait_for(source, &header, &mut report)?;
        }
        self.finish();
        Ok(())
    }

    /// Whether rows carry checksums, which are compared here.
    pub(crate) fn is_verified(&self) -> bool {
        self.shared.options.verify
    }

    /// Weights that masked ranks lost, by token, and what to multiply the others with.
    pub(crate) fn account(
        &self,
        answered: &[bool],
        weights: Option<&[f32]>,
        report: &mut Report,
    ) -> Result<Vec<f32>, EpError> {
        let shared = &*self.shared;
        report.masked = shared.masked();
        let top_k = shared.config.top_k as usize;
        let missing = |choice: usize| {
            let rank = self.routes.ranks[choice];
            rank != NOWHERE && !answered[rank as usize]
        };
        if answered.iter().all(|&answered| answered) || !(0..self.routes.ranks.len()).any(missing) {
            return Ok(Vec::new());
        }
        let weight = |choice: usize| weights.map_or(1.0, |weights| weights[choice]);
        let mut raise = vec![1.0; self.routes.tokens];
        report.lost = vec![0.0; self.routes.tokens];
        for (token, raise) in raise.iter_mut().enumerate() {
            let choices = token * top_k..(token + 1) * top_k;
            let here = choices.clone().filter(|&choice| self.routes.ranks[choice] != NOWHERE);
            let (lost, kept): (Vec<usize>, Vec<usize>) = here.partition(|&choice| missing(choice));
            let sum = |list: &[usize]| list.iter().map(|&choice| weight(choice)).sum::<f32>();
            report.lost[token] = sum(&lost);
            if shared.options.lost == LostWeight::Renormalise && !lost.is_empty() && sum(&kept) != 0.0 {
                *raise = (sum(&kept) + sum(&lost)) / sum(&kept);
            }
        }
        if shared.options.lost == LostWeight::Fail {
            let tokens =
                (0..self.routes.tokens).filter(|&token| (token * top_k..(token + 1) * top_k).any(missing));
            return Err(EpError::WeightLost { tokens: tokens.count(), masked: report.masked.clone() });
        }
        Ok(raise)
    }
}

impl Routes {
    fn find(&mut self, choices: &[i64], shared: &Shared) -> Result<(), EpError> {
        let top_k = shared.config.top_k as usize;
        self.tokens = choices.len() / top_k;
        for list in [&mut self.ranks, &mut self.places, &mut self.rows] {
            list.clear();
            list.resize(choices.len(), NOWHERE);
        }
        self.experts.clear();
        self.experts.resize(choices.len(), 0);
        self.expert_counts.clear();
        self.expert_counts.resize(shared.config.experts as usize, 0);
        self.rank_counts.clear();
        self.rank_counts.resize(shared.ranks() as usize, 0);
        // By rank: the last token that goes there, and one more.
        let mut last = vec![0_u32; shared.ranks() as usize];
        for (at, &expert) in choices.iter().enumerate() {
            if expert == -1 {
                continue;
            }
            let (token, choice) = (at / top_k, at % top_k);
            let experts = shared.config.experts;
            let Some(known) = u32::try_from(expert).ok().filter(|&expert| expert < experts) else {
                return Err(LayoutError::NoSuchExpert { token, choice, expert, experts }.into());
            };
            let (rank, local) = shared.spread.place(known);
            self.ranks[at] = rank;
            self.experts[at] = local as u16;
            let hits = &mut self.expert_counts[known as usize];
            self.places[at] = *hits;
            *hits += 1;
            let rows = &mut self.rank_counts[rank as usize];
            if last[rank as usize] != token as u32 + 1 {
                last[rank as usize] = token as u32 + 1;
                *rows += 1;
            }
            self.rows[at] = *rows - 1;
        }
        Ok(())
    }
}

fn differences(ours: &Header, theirs: &Header) -> Vec<Difference> {
    let kind = |kind: u32| match kind {
        DISPATCH => "dispatch".to_owned(),
        COMBINE_WEIGHTED => "combine of the latency mode".to_owned(),
        COMBINE_PLAIN => "combine of the throughput mode".to_owned(),
        RELEASE => "dispatch after one that was not combined".to_owned(),
        other => format!("unknown ({other})"),
    };
    if ours.kind != theirs.kind {
        return vec![Difference {
            what: "call".to_owned(),
            ours: kind(ours.kind),
            theirs: kind(theirs.kind),
        }];
    }
    let pairs = [
        ("top_k", u64::from(ours.top_k), u64::from(theirs.top_k)),
        ("form", ours.payload.into(), theirs.payload.into()),
        ("row_bytes", ours.row_bytes.into(), theirs.row_bytes.into()),
        ("scale_bytes", ours.scale_bytes.into(), theirs.scale_bytes.into()),
        ("verify", (ours.flags & VERIFIED).into(), (theirs.flags & VERIFIED).into()),
        ("placement_version", ours.placement_version, theirs.placement_version),
    ];
    let differ = pairs.into_iter().filter(|(_, ours, theirs)| ours != theirs);
    differ
        .map(|(what, ours, theirs)| Difference {
            what: what.to_owned(),
            ours: ours.to_string(),
            theirs: theirs.to_string(),
        })
        .collect()
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("rank", &self.shared.rank)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}
