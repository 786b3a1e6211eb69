//! What a source's part of a dispatch is: its list, checked, and where its rows lie.

use crate::arena::{Entries, EntryRef, Header};
use crate::error::{Corrupted, EpError};
use crate::group::Shared;
use crate::planted::{Planted, is_planted};
use crate::region::row_stride;
use crate::slot::{ROW, Received, Slot};
use crate::words::SourceRows;

/// The rows of one source: where it left them, or where its port wrote them.
pub(crate) struct Incoming<'a> {
    pub source: u32,
    pub rows: SourceRows<'a>,
    row_bytes: usize,
    /// The source left a row for each of its tokens; a port wrote only those that come here, one behind the other.
    by_token: bool,
    tokens: u32,
}

impl<'a> Incoming<'a> {
    /// `theirs` has been compared with this rank's call and with the source's limits.
    pub fn new(shared: &'a Shared, slot: u32, source: u32, theirs: &Header) -> Incoming<'a> {
        let row_bytes = (theirs.row_bytes + theirs.scale_bytes) as usize;
        let stride = row_stride(theirs.row_bytes as usize, theirs.scale_bytes as usize);
        let (memory, at, count) = match shared.mapped(source) {
            Some(memory) => (memory, shared.region(source).staging(slot), theirs.tokens),
            None => (shared.own_memory(), shared.own_region().source_rows(slot, source), theirs.rows),
        };
        let rows = SourceRows { memory, at, stride, count: count as usize };
        let by_token = shared.mapped(source).is_some();
        Incoming { source, rows, row_bytes, by_token, tokens: theirs.tokens }
    }

    /// Which of the rows that of an entry is, and which token.
    pub fn find(&self, slot: &Slot, at: usize, entry: EntryRef<'_>) -> Result<(u32, u32), EpError> {
        let token = entry.token();
        if token >= self.tokens {
            return Err(self.nonsense("a token", token.into(), self.tokens.into()));
        }
        let row = if self.by_token { token } else { at as u32 };
        if slot.is_verified() && !is_planted(Planted::ChecksumUnchecked) {
            let mut bytes = vec![0; self.row_bytes];
            self.read(row, 0, &mut bytes);
            if crc32c::crc32c_append(slot.tag(self.source, ROW, token), &bytes) != entry.checksum() {
                return Err(EpError::Corrupted { rank: self.source, what: Corrupted::Row { token } });
            }
        }
        Ok((row, token))
    }

    /// Reads some of a row's bytes.
    pub fn read(&self, row: u32, from: usize, into: &mut [u8]) {
        let at = self.rows.at + row as usize * self.rows.stride + from;
        self.rows.memory.read(at, into).expect("a row lies inside its region");
    }

    pub fn nonsense(&self, what: &'static str, value: u64, most: u64) -> EpError {
        EpError::Nonsense { rank: self.source, what, value, most }
    }
}

impl Slot {
    /// Reads and checks a source's list. It comes back with [`return_list`](Slot::return_list), for its memory.
    pub(crate) fn take_list(&mut self, source: u32, theirs: &Header) -> Result<Vec<u8>, EpError> {
        let mut list = std::mem::take(&mut self.entries);
        self.shared.arena_of(self.slot, source).read_entries(theirs.rows as usize, &mut list);
        self.check_list(source, theirs, &list)?;
        Ok(list)
    }

    pub(crate) fn return_list(&mut self, list: Vec<u8>) {
        self.entries = list;
    }

    /// The form of lists here.
    pub(crate) fn entry_form(&self) -> Entries {
        Entries::new(self.shared.config.top_k)
    }

    /// Ends the part of a receive half that takes rows: everybody was heard. False if it is to be done once more, because
    /// rows were read that do not count.
    pub(crate) fn end_taking(&mut self) -> Result<bool, EpError> {
        self.heard = true;
        let mut read = std::mem::take(&mut self.received.came);
        let counts = self.check_membership(&mut read);
        self.received.came = read;
        counts
    }
}

impl Received {
    /// A dispatch begins to come.
    pub fn begin(&mut self) {
        self.came.clear();
        self.results_at.clear();
        self.begins.clear();
    }

    /// Takes note of a source, whose results are as many rows as this.
    pub fn note(
        &mut self,
        source: u32,
        theirs: Option<&Header>,
        results: u32,
        shared: &Shared,
    ) -> Result<(), EpError> {
        let at = theirs.map_or(0, |theirs| theirs.results_at);
        let most = u64::from(shared.config.max_tokens[source as usize]) * u64::from(shared.config.top_k);
        let end = u64::from(at) + u64::from(results);
        if end > most {
            return Err(EpError::Nonsense { rank: source, what: "results up to", value: end, most });
        }
        self.came.push(theirs.is_some());
        self.results_at.push(at);
        Ok(())
    }

    /// Where a source's rows begin, and where they end: one number for each list, of which there are so many.
    pub fn of_source(&self, source: u32, lists: usize) -> (&[u32], &[u32]) {
        let begins = &self.begins[source as usize * lists..];
        (&begins[..lists], &begins[lists..2 * lists])
    }
}
