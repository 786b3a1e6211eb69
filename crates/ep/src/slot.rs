//! One micro-batch's way out: its rows written once into this rank's staging, and whose they are told to each rank that gets
//! any.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::arena::{Entries, Header, payload_number};
use crate::arrivals;
use crate::config::BLOCK_CHANNELS;
use crate::error::EpError;
use crate::group::{STAGED_BYTES, Shared};
use crate::hearing::{LONGEST_STEP, Listening, WhyMasked};
use crate::outgoing::{OutgoingCall, OutgoingRows, Span};
use crate::planted::{Planted, is_planted};
use crate::region::row_stride;
use crate::report::Report;
use crate::route::{NOWHERE, Route, Routes};
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
    /// It has been heard of everybody.
    pub(crate) heard: bool,
    /// It was a dispatch: its rows may still be read by others.
    open: bool,
    /// The first step is over.
    pub(crate) warm: bool,
    pub(crate) listening: Listening,
    pub(crate) routes: Arc<Routes>,
    /// The weights of the dispatch, if it had any.
    pub(crate) weights: Option<Vec<f32>>,
    pub(crate) received: Received,
    lists: Vec<Vec<u8>>,
    row: Vec<u8>,
    scales: Vec<f32>,
    pub(crate) mask_words: Vec<u32>,
    pub(crate) entries: Vec<u8>,
}

/// What a dispatch brought, for its combine. Kept from step to step for its memory.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// By source: whether its rows came.
    pub came: Vec<bool>,
    /// By source: where its port takes the results.
    pub results_at: Vec<u32>,
    /// By source, and once more for the end, then by local expert (or once, in the throughput mode): where its rows begin.
    pub begins: Vec<u32>,
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

/// Kinds of calls.
pub(crate) const DISPATCH: u32 = 1;
pub(crate) const COMBINE_WEIGHTED: u32 = 2;
pub(crate) const COMBINE_PLAIN: u32 = 3;
pub(crate) const RELEASE: u32 = 4;

/// Rows carry checksums.
pub(crate) const VERIFIED: u32 = 1;
/// Rows carry weights.
pub(crate) const WEIGHTED: u32 = 2;

/// A dispatch whose send half is done. Its receive half is [`latency`](Dispatch::latency) or
/// [`throughput`](Dispatch::throughput), which all ranks choose alike; between the halves there may be other work.
#[must_use = "the other ranks wait for what follows"]
#[derive(Debug)]
pub struct Dispatch<'slot> {
    pub(crate) slot: &'slot mut Slot,
    pub(crate) header: Header,
    pub(crate) report: Report,
}

impl Dispatch<'_> {
    /// Where the tokens go, to be used again or recorded.
    pub fn route(&self) -> Route {
        Route(self.slot.routes.clone())
    }

    /// What the send half cost.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

impl Slot {
    pub(crate) fn new(shared: Arc<Shared>, slot: u32) -> Slot {
        let ranks = shared.ranks() as usize;
        Slot {
            slot,
            call: 0,
            heard: true,
            open: false,
            warm: false,
            listening: Listening::default(),
            routes: Arc::default(),
            weights: None,
            received: Received::default(),
            lists: vec![Vec::new(); ranks],
            row: Vec::new(),
            scales: Vec::new(),
            mask_words: Vec::new(),
            entries: Vec::new(),
            shared,
        }
    }

    /// Finds where tokens that choose like this go, to be used for several dispatches.
    pub fn route(&self, choices: &[i64]) -> Result<Route, EpError> {
        Ok(Route(Arc::new(Routes::new(choices, &self.shared.config, self.shared.rank)?)))
    }

    /// Sends tokens to the ranks of their experts: leaves each row once where those ranks find it, and returns. Nothing
    /// waits here, except where the last step of this slot was not taken to its end.
    pub fn dispatch(&mut self, tokens: &Tokens<'_>) -> Result<Dispatch<'_>, EpError> {
        let begun = self.shared.pace.now();
        // What a recorded route holds on to is not written over.
        let mut routes = std::mem::take(&mut self.routes);
        if Arc::get_mut(&mut routes).is_none() {
            routes = Arc::default();
        }
        let found = Arc::get_mut(&mut routes)
            .map(|routes| routes.find(tokens.choices, &self.shared.config, self.shared.rank));
        self.routes = routes;
        found.transpose()?;
        self.dispatch_routed(tokens.rows, tokens.weights, begun)
    }

    /// The same for tokens whose choices are known from an earlier [`dispatch`](Slot::dispatch), from
    /// [`route`](Slot::route), or from a record. The form of the rows may be another.
    pub fn dispatch_along(
        &mut self,
        route: &Route,
        rows: Rows<'_>,
        weights: Option<&[f32]>,
    ) -> Result<Dispatch<'_>, EpError> {
        let begun = self.shared.pace.now();
        if !route.0.is_of(&self.shared.config, self.shared.rank) {
            return Err(EpError::ForeignRoute);
        }
        self.routes = route.0.clone();
        self.dispatch_routed(rows, weights, begun)
    }

    fn dispatch_routed(
        &mut self,
        rows: Rows<'_>,
        weights: Option<&[f32]>,
        begun: Duration,
    ) -> Result<Dispatch<'_>, EpError> {
        let header = self.check(rows, weights)?;
        let shared = self.shared.clone();
        let mut report = Report::new(shared.ranks());
        // Who is masked by some has to stop for all: the others take its next call for another one than theirs.
        if let Some(by) = self.expelled_by() {
            return Err(self.out(by));
        }
        self.check_quorum()?;
        self.settle()?;
        // What fails here is no call yet, so that nobody waits for it, not even this rank.
        self.await_ports(&mut report)?;
        self.next_call(DISPATCH);
        let header = Header { call: self.call, ..header };
        let written = self.write_rows(rows, weights, &header);
        let row_bytes = u64::from(header.row_bytes + header.scale_bytes);
        for rank in (0..shared.ranks()).filter(|&rank| !shared.is_masked(rank)) {
            let rows = self.routes.rank_counts[rank as usize];
            let header = Header { rows, results_at: self.routes.results_at[rank as usize], ..header };
            if shared.port_of(rank).is_some() {
                report.wire_bytes += u64::from(rows) * row_bytes + self.lists[rank as usize].len() as u64;
            }
            self.publish_rows(rank, header);
        }
        report.logical_bytes = self.routes.chosen as u64 * row_bytes;
        report.copied_bytes = written as u64 * row_bytes;
        report.end_half(begun, &shared);
        Ok(Dispatch { slot: self, header, report })
    }

    /// Brings the last step to its end where that was not done: hears everybody's part of its last call, and where that was
    /// a dispatch, waits until every rank has read what this one sent.
    fn settle(&mut self) -> Result<(), EpError> {
        self.hear_last_call()?;
        if !self.open || is_planted(Planted::ReleaseSkipped) {
            return Ok(());
        }
        self.next_call(RELEASE);
        let flags = if self.is_verified() { VERIFIED } else { 0 };
        let header = Header { kind: RELEASE, call: self.call, flags, ..Header::default() };
        let shared = self.shared.clone();
        for rank in (0..shared.ranks()).filter(|&rank| !shared.is_masked(rank)) {
            self.publish(rank, header, &[], |_| {});
        }
        let mut report = Report::new(shared.ranks());
        self.begin_waiting();
        for source in 0..shared.ranks() {
            self.wait_for(source, &header, &mut report)?;
        }
        self.finish();
        Ok(())
    }

    /// Begins the next call.
    pub(crate) fn next_call(&mut self, kind: u32) {
        self.call = self.call.wrapping_add(1);
        self.heard = false;
        self.open = kind == DISPATCH;
    }

    /// The slot's step is over.
    pub(crate) fn finish(&mut self) {
        self.heard = true;
        self.warm = true;
    }

    /// Whether rows carry checksums, which are compared here.
    pub(crate) fn is_verified(&self) -> bool {
        self.shared.options.verify
    }

    /// Where a checksum begins, so that what an earlier step, another slot or another place wrote does not pass for this.
    pub(crate) fn tag(&self, source: u32, expert: u32, place: u32) -> u32 {
        let call = if is_planted(Planted::StepUntagged) { 0 } else { self.call };
        let words = [call, self.slot, source, expert, place];
        words.iter().fold(0, |sum, word| crc32c::crc32c_append(sum, &word.to_le_bytes()))
    }

    /// Checks the arguments. Gives what the call's headers have in common.
    fn check(&mut self, rows: Rows<'_>, weights: Option<&[f32]>) -> Result<Header, EpError> {
        let config = &self.shared.config;
        let hidden = config.hidden as usize;
        let count = self.routes.tokens;
        let same = |what, len, expected| EpError::check_lengths([(what, len, expected)]);
        if let Some(weights) = weights {
            same("weights", weights.len(), self.routes.ranks.len())?;
        }
        let payload = match rows {
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
        let quantised = matches!(rows, Rows::Fp8(..) | Rows::Fp8Ue8m0(_));
        if quantised && !config.hidden.is_multiple_of(BLOCK_CHANNELS) {
            let expected = hidden.next_multiple_of(BLOCK_CHANNELS as usize);
            return Err(EpError::WrongLength { what: "a row to be quantised", len: hidden, expected });
        }
        let (row_bytes, scale_bytes) = (payload.row_bytes(config.hidden), payload.scale_bytes(config.hidden));
        let most_bytes = config.payload.row_bytes(config.hidden) + config.payload.scale_bytes(config.hidden);
        if row_bytes + scale_bytes > most_bytes {
            return Err(EpError::PayloadTooLarge { row_bytes, scale_bytes, most_bytes });
        }
        if let Rows::Made { values, scales, .. } = rows {
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
        let verified = if self.shared.options.verify { VERIFIED } else { 0 };
        let weighted = if weights.is_some() { WEIGHTED } else { 0 };
        Ok(Header {
            kind: DISPATCH,
            tokens: count as u32,
            top_k: config.top_k,
            payload: payload_number(payload),
            row_bytes: row_bytes as u32,
            scale_bytes: scale_bytes as u32,
            flags: verified | weighted,
            placement_version: config.placement_version,
            ..Header::default()
        })
    }

    /// Waits until what earlier calls gave to ports has left, and nothing more can come from masked ranks through them: now
    /// and then after a call's end, and never for long.
    fn await_ports(&mut self, report: &mut Report) -> Result<(), EpError> {
        let shared = self.shared.clone();
        if !shared.has_ports() {
            return Ok(());
        }
        let begun = shared.pace.now();
        for rank in 0..shared.ranks() {
            let Some(port) = shared.port_of(rank) else { continue };
            let has_left = || port.has_left(rank, self.slot) || shared.is_gone(rank);
            if !shared.is_masked(rank) && !self.await_port(has_left) {
                self.mask(rank, WhyMasked::NotTaken(shared.options.deadline));
            }
            if shared.is_masked(rank) && !self.await_port(|| port.is_quiet(rank)) {
                return Err(EpError::StillWriting { rank });
            }
        }
        report.waits[shared.rank as usize] += shared.pace.now().saturating_sub(begun);
        self.check_quorum()
    }

    /// Looks now and then whether something is so, until the deadline is over. Who waits for this rank should know that it
    /// waits itself.
    fn await_port(&self, is_so: impl Fn() -> bool) -> bool {
        let shared = &*self.shared;
        let (mut listened, mut at) = (Duration::ZERO, shared.pace.now());
        let mut pulsed = Duration::ZERO;
        while !is_so() {
            let now = shared.pace.now();
            listened += now.saturating_sub(at).min(LONGEST_STEP);
            at = now;
            if listened > shared.options.deadline {
                return false;
            }
            if listened.saturating_sub(pulsed) >= arrivals::LOOK_AGAIN {
                pulsed = listened;
                shared.pulse(self.slot);
            }
            std::thread::sleep(PORT_PAUSE);
        }
        true
    }

    /// Makes each token's row once, in the staging, where it goes anywhere; makes the lists. Gives how many rows there are.
    fn write_rows(&mut self, tokens: Rows<'_>, weights: Option<&[f32]>, header: &Header) -> usize {
        let shared = self.shared.clone();
        let routes = self.routes.clone();
        let top_k = shared.config.top_k as usize;
        let (row_bytes, scale_bytes) = (header.row_bytes as usize, header.scale_bytes as usize);
        let stride = row_stride(row_bytes, scale_bytes);
        let entries = Entries::new(shared.config.top_k);
        let (memory, staging) = (shared.own_memory(), shared.own_region().staging(self.slot));
        self.weights = weights.map(<[f32]>::to_vec);
        self.lists.iter_mut().for_each(Vec::clear);
        // Where the staging stays in the cache, rows are made there; else beside it, to be stored past the cache.
        let staged_bytes = routes.tokens * stride;
        let past = (staged_bytes >= STAGED_BYTES).then(|| shared.copier_for(staged_bytes, STAGED_BYTES));
        let mut beside = std::mem::take(&mut self.row);
        beside.resize(row_bytes + scale_bytes, 0);
        let mut written = 0;
        for token in 0..routes.tokens {
            let choices = token * top_k..(token + 1) * top_k;
            let goes = |&rank: &u32| rank != NOWHERE && !shared.is_masked(rank);
            if !routes.ranks[choices.clone()].iter().any(goes) {
                continue;
            }
            shared.pass();
            written += 1;
            let at = staging + token * stride;
            let row = match past {
                Some(_) => &mut beside[..],
                None => words::staged_row(memory, at, row_bytes + scale_bytes),
            };
            self.make_row(tokens, token, row, row_bytes);
            if let Some(copier) = past {
                words::store_row(copier, memory, at, row);
            }
            let checksum = match header.flags & VERIFIED {
                0 => 0,
                _ => crc32c::crc32c_append(self.tag(shared.rank, ROW, token as u32), row),
            };
            for choice in choices {
                let rank = routes.ranks[choice];
                if !goes(&rank) {
                    continue;
                }
                let list = &mut self.lists[rank as usize];
                let at = routes.rows[choice] as usize * entries.bytes();
                if at == list.len() {
                    entries.push(list, token as u32);
                    entries.set_checksum(list, at, checksum);
                }
                let weight = weights.map_or(0.0, |weights| weights[choice]);
                entries.choose(list, at, choice - token * top_k, routes.experts[choice] as i16, weight);
            }
        }
        self.row = beside;
        written
    }

    /// Makes the row of a token: its values, then its scales.
    fn make_row(&mut self, tokens: Rows<'_>, token: usize, row: &mut [u8], row_bytes: usize) {
        let shared = &*self.shared;
        let hidden = shared.config.hidden as usize;
        let channels = token * hidden..(token + 1) * hidden;
        let (values, scales) = row.split_at_mut(row_bytes);
        match tokens {
            Rows::Bf16(rows) => {
                for (bytes, value) in values.chunks_exact_mut(2).zip(&rows[channels]) {
                    bytes.copy_from_slice(&value.to_bits().to_le_bytes());
                }
            }
            Rows::Fp8(rows, rule) => {
                self.scales.resize(scales.len() / 4, 0.0);
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
    }

    /// Tells a rank which rows are its own.
    fn publish_rows(&self, rank: u32, header: Header) {
        let shared = &*self.shared;
        let list = &self.lists[rank as usize];
        if is_planted(Planted::PublishedEarly) {
            self.publish(rank, header, list, |_| {});
            shared.pass();
        }
        let arena = shared.arena_at(self.slot, rank);
        arena.write_entries(list);
        shared.pass();
        self.publish(rank, header, list, |call| {
            let there = shared.region(rank);
            let (local, (remote, _)) = (arena.at(), there.arena(self.slot, shared.rank));
            let part = arena.list_part(header.rows as usize);
            call.spans.push(Span { local: local + part.at, remote: remote + part.at, bytes: part.bytes });
            call.rows = Some(OutgoingRows {
                tokens: Entries::new(shared.config.top_k).iter(list).map(|entry| entry.token()).collect(),
                local: shared.own_region().staging(self.slot),
                remote: there.source_rows(self.slot, shared.rank),
                stride: row_stride(header.row_bytes as usize, header.scale_bytes as usize),
                bytes: (header.row_bytes + header.scale_bytes) as usize,
            });
        });
    }

    /// Tells a rank that this rank's part of the call is there. `list` is what goes with the header; where a port carries the
    /// call, `more` says what it writes besides.
    pub(crate) fn publish(
        &self,
        rank: u32,
        header: Header,
        list: &[u8],
        more: impl FnOnce(&mut OutgoingCall),
    ) {
        let shared = &*self.shared;
        let arena = shared.arena_at(self.slot, rank);
        let list_checksum = if self.is_verified() { crc32c::crc32c(list) } else { 0 };
        arena.write_header(&Header { list_checksum, ..header }, shared.mask_words());
        shared.pass();
        let Some(port) = shared.port_of(rank) else {
            return words::with(arena.word(), |word| {
                if arrivals::publish(word, self.call) {
                    shared.pace.wake(word);
                }
            });
        };
        let mut call = OutgoingCall { rank, slot: self.slot, call: self.call, rows: None, spans: Vec::new() };
        more(&mut call);
        let (remote, _) = shared.region(rank).arena(self.slot, shared.rank);
        let part = arena.header_part(self.call);
        call.spans.push(Span { local: arena.at() + part.at, remote: remote + part.at, bytes: part.bytes });
        port.send(call);
    }
}

/// What a checksum is of, in the place of an expert: a row of a dispatch, or a result of all experts of a rank.
pub(crate) const ROW: u32 = u32::MAX;
pub(crate) const ALL_EXPERTS: u32 = u32::MAX - 1;

/// Between two looks whether a port is through.
const PORT_PAUSE: Duration = Duration::from_micros(50);

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("rank", &self.shared.rank)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}
