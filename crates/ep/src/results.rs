//! The results of experts: where they lie at their rank and at the token's, and what proves that they are those.

use crate::arena::Header;
use crate::error::{Corrupted, EpError};
use crate::group::Shared;
use crate::outgoing::Span;
use crate::planted::{Planted, is_planted};
use crate::report::Report;
use crate::route::Routes;
use crate::slot::{Slot, VERIFIED};

/// The results in one slot, as this rank sees them.
#[derive(Clone, Copy)]
pub(crate) struct Results<'a> {
    shared: &'a Shared,
    slot: u32,
    row_bytes: usize,
}

impl<'a> Results<'a> {
    pub fn new(shared: &'a Shared, slot: u32) -> Results<'a> {
        Results { shared, slot, row_bytes: 2 * shared.config.hidden as usize }
    }

    /// Where a row of a rank's results is: in its memory, or, if a port brings them, in this rank's.
    pub fn row_at(&self, rank: u32, row: usize) -> usize {
        let begin = match self.shared.mapped(rank) {
            Some(_) => self.shared.region(rank).results(self.slot),
            None => self.shared.own_region().combined(self.slot),
        };
        begin + row * self.row_bytes
    }

    /// Gives this rank's rows from `at` on, which are those of one expert for one source, their checksums, which are of the
    /// weights that go back, too.
    pub fn seal(&self, slot: &Slot, source: u32, expert: u32, at: u32, rows: u32, weighted: bool) {
        let (memory, region) = (self.shared.own_memory(), self.shared.own_region());
        let mut row = vec![0; self.row_bytes];
        for place in 0..rows {
            let which = (at + place) as usize;
            memory.read(region.results(self.slot) + which * self.row_bytes, &mut row).expect(INSIDE);
            let sum = crc32c::crc32c_append(slot.tag(source, expert, place), &row);
            let sum = self.sum_weights(sum, self.shared.rank, which, weighted);
            memory.write(region.result_checksums(self.slot) + 4 * which, &sum.to_le_bytes()).expect(INSIDE);
        }
    }

    /// Compares a row that a rank gave for a token of this one with its checksum.
    pub fn check(
        &self,
        slot: &Slot,
        rank: u32,
        row: usize,
        (expert, place): (u32, u32),
        token: u32,
        weighted: bool,
    ) -> Result<(), EpError> {
        let (memory, checksums) = match self.shared.mapped(rank) {
            Some(memory) => (memory, self.shared.region(rank).result_checksums(self.slot)),
            None => (self.shared.own_memory(), self.shared.own_region().combined_checksums(self.slot)),
        };
        let (mut bytes, mut sum) = (vec![0; self.row_bytes], [0; 4]);
        memory.read(self.row_at(rank, row), &mut bytes).expect(INSIDE);
        memory.read(checksums + 4 * row, &mut sum).expect(INSIDE);
        let expected = crc32c::crc32c_append(slot.tag(self.shared.rank, expert, place), &bytes);
        let expected = self.sum_weights(expected, rank, row, weighted);
        if u32::from_le_bytes(sum) == expected || is_planted(Planted::ChecksumUnchecked) {
            return Ok(());
        }
        Err(EpError::Corrupted { rank, what: Corrupted::Result { token } })
    }

    /// A row's checksum, with the weights that its rank gave back with it, if it did.
    fn sum_weights(&self, sum: u32, rank: u32, row: usize, weighted: bool) -> u32 {
        if !weighted {
            return sum;
        }
        let mut bytes = vec![0; 4 * self.shared.config.top_k as usize];
        self.weights(rank, row, &mut bytes);
        crc32c::crc32c_append(sum, &bytes)
    }

    /// What a port writes to the rank of some tokens: this rank's rows from `at` on, to the rows from `to` on there.
    pub fn spans_to(&self, rank: u32, sealed: bool, at: u32, to: u32, rows: u32, spans: &mut Vec<Span>) {
        if rows == 0 {
            return;
        }
        let (here, there) = (self.shared.own_region(), self.shared.region(rank));
        let mut span = |local: usize, remote: usize, bytes: usize| {
            let (at, to, rows) = (at as usize, to as usize, rows as usize);
            spans.push(Span { local: local + at * bytes, remote: remote + to * bytes, bytes: rows * bytes });
        };
        span(here.results(self.slot), there.combined(self.slot), self.row_bytes);
        if sealed {
            span(here.result_checksums(self.slot), there.combined_checksums(self.slot), 4);
        }
    }

    /// The same for the weights that go back.
    pub fn weights_span(&self, rank: u32, at: u32, to: u32, rows: u32) -> Span {
        let bytes = 4 * self.shared.config.top_k as usize;
        Span {
            local: self.shared.own_region().result_weights(self.slot) + at as usize * bytes,
            remote: self.shared.region(rank).combined_weights(self.slot) + to as usize * bytes,
            bytes: rows as usize * bytes,
        }
    }

    /// Reads the weights that a rank gave back with a row.
    pub fn weights(&self, rank: u32, row: usize, into: &mut [u8]) {
        let (memory, at) = match self.shared.mapped(rank) {
            Some(memory) => (memory, self.shared.region(rank).result_weights(self.slot)),
            None => (self.shared.own_memory(), self.shared.own_region().combined_weights(self.slot)),
        };
        memory.read(at + row * into.len(), into).expect(INSIDE);
    }
}

/// What a port writes of where results begin.
pub(crate) fn begins_span(shared: &Shared, slot: u32, rank: u32, count: usize) -> Span {
    let arena = shared.arena_at(slot, rank);
    let (remote, _) = shared.region(rank).arena(slot, shared.rank);
    let part = arena.begins_part(count);
    Span { local: arena.at() + part.at, remote: remote + part.at, bytes: part.bytes }
}

pub(crate) fn combine_header(slot: &Slot, kind: u32) -> Header {
    let config = &slot.shared.config;
    let flags = if slot.is_verified() { VERIFIED } else { 0 };
    Header {
        kind,
        call: slot.call,
        top_k: config.top_k,
        flags,
        placement_version: config.placement_version,
        ..Header::default()
    }
}

impl Slot {
    /// Waits for every rank's part of a combine, and takes from each what `take` does. Says who answered.
    pub(crate) fn hear_results(
        &mut self,
        ours: &Header,
        report: &mut Report,
        mut take: impl FnMut(&Slot, u32, &Header) -> Result<(), EpError>,
    ) -> Result<Vec<bool>, EpError> {
        let ranks = self.shared.ranks();
        let mut answered = vec![false; ranks as usize];
        self.begin_waiting();
        for source in 0..ranks {
            let theirs = match is_planted(Planted::ResultsUnheard) {
                true => Some(*ours),
                false => self.wait_for(source, ours, report)?,
            };
            let Some(theirs) = theirs else { continue };
            take(self, source, &theirs)?;
            answered[source as usize] = true;
        }
        self.finish();
        Ok(answered)
    }
}

impl Routes {
    /// By expert: choices on the experts before it, of all ranks: where its results begin that come through ports.
    pub(crate) fn choices_before(&self) -> Vec<u32> {
        let mut end = 0;
        let begins = self.expert_counts.iter().map(|count| {
            end += count;
            end - count
        });
        begins.collect()
    }
}

const INSIDE: &str = "a place of the layout lies inside the region";
