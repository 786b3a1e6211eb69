//! What one rank tells another of its calls: an arena for each slot, source and reader, in the reader's memory.
//!
//! An arena has one writer, its source: a header that says what the call is, and a list with an entry for each row of a
//! dispatch, or where the results of a combine begin. Two headers take turns, since a source may begin its next call while
//! its reader has not looked at this one yet; it cannot be two calls ahead, because it would have had to hear of the
//! reader's next call in between.
//!
//! What is read here was written by another program: every number is checked before it is used.

use crossdock_memory::Memory;

use crate::planted::{Planted, is_planted};
use crate::region::LINE_BYTES;
use crate::slot::VERIFIED;
use crate::{GroupConfig, Payload};

/// The places in one arena, in bytes from where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArenaLayout {
    header_bytes: usize,
    begins: usize,
    list: usize,
    bytes: usize,
    entry_bytes: usize,
}

/// What a call is, as its source says: compared with what this rank does, so that ranks that do different things learn of
/// it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: u32,
    pub call: u32,
    /// Rows in the list.
    pub rows: u32,
    /// Tokens of the source, of which the list has those that go here.
    pub tokens: u32,
    pub top_k: u32,
    pub payload: u32,
    pub row_bytes: u32,
    pub scale_bytes: u32,
    pub flags: u32,
    /// Where among the source's combined rows the results of the reader go, if its port writes them.
    pub results_at: u32,
    pub placement_version: u64,
    /// Of what else the call has written for the reader, where calls are verified.
    pub list_checksum: u32,
    /// Of all of this and the mask, where calls are verified.
    pub checksum: u32,
}

impl ArenaLayout {
    /// The word, and what the source says of itself and of the reader. Two lines, as processors fetch lines in pairs.
    pub const FRONT_BYTES: usize = 128;

    /// The arena of a source that dispatches at most `tokens` tokens in a call; `None` if it cannot be addressed.
    pub fn new(config: &GroupConfig, tokens: u32) -> Option<ArenaLayout> {
        let ranks = config.max_tokens.len();
        let header_bytes = (HEADER_BYTES + 4 * ranks.div_ceil(32)).next_multiple_of(LINE_BYTES);
        let entry_bytes = entry_bytes(config.top_k as usize);
        let begins = Self::FRONT_BYTES + 2 * header_bytes;
        let list = begins + (4 * config.spread().most() as usize).next_multiple_of(LINE_BYTES);
        let entries = (tokens as usize).checked_mul(entry_bytes)?;
        let bytes = list.checked_add(entries)?.checked_next_multiple_of(LINE_BYTES)?;
        Some(ArenaLayout { header_bytes, begins, list, bytes, entry_bytes })
    }

    /// A multiple of a line.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn entry_bytes(top_k: usize) -> usize {
    8 + 4 * top_k + (2 * top_k).next_multiple_of(4)
}

/// One arena in one rank's memory.
#[derive(Clone, Copy)]
pub(crate) struct Arena<'a> {
    memory: &'a Memory,
    layout: &'a ArenaLayout,
    at: usize,
}

impl<'a> Arena<'a> {
    /// The arena that begins at this place.
    pub fn new(memory: &'a Memory, (at, layout): (usize, &'a ArenaLayout)) -> Arena<'a> {
        Arena { memory, layout, at }
    }

    /// Where the arrivals word is.
    pub fn word(&self) -> (&'a Memory, usize) {
        (self.memory, self.at)
    }

    /// Where the source says its last word to the reader: 0, or anything else.
    pub fn farewell(&self) -> (&'a Memory, usize) {
        (self.memory, self.at + 4)
    }

    /// What a call writes of its header, for ports: from where in the arena, and how much.
    pub fn header_part(&self, call: u32) -> Part {
        let which = if is_planted(Planted::HeaderNotAlternating) { 0 } else { (call & 1) as usize };
        let at = ArenaLayout::FRONT_BYTES + which * self.layout.header_bytes;
        Part { at, bytes: self.layout.header_bytes }
    }

    /// Where in the arena the list lies, and how long one of so many rows is.
    pub fn list_part(&self, rows: usize) -> Part {
        Part { at: self.layout.list, bytes: rows * self.layout.entry_bytes }
    }

    /// Where in the arena it stands where results begin.
    pub fn begins_part(&self, count: usize) -> Part {
        Part { at: self.layout.begins, bytes: 4 * count }
    }

    /// Where in the memory the arena begins.
    pub fn at(&self) -> usize {
        self.at
    }

    /// The mask, and the header, which gets its checksum where calls are verified.
    pub fn write_header(&self, header: &Header, mask: impl Iterator<Item = u32>) {
        let at = self.at + self.header_part(header.call).at;
        let mut checksum = header.sum(&[]);
        for (word, mask) in mask.enumerate() {
            checksum = crc32c::crc32c_append(checksum, &mask.to_le_bytes());
            self.memory.write(at + HEADER_BYTES + 4 * word, &mask.to_le_bytes()).expect(INSIDE);
        }
        let checksum = if header.flags & VERIFIED == 0 { 0 } else { checksum };
        self.memory.write(at, &Header { checksum, ..*header }.bytes()).expect(INSIDE);
    }

    pub fn read_header(&self, call: u32, mask: &mut [u32]) -> Header {
        let mut bytes = [0; HEADER_BYTES];
        let at = self.at + self.header_part(call).at;
        self.memory.read(at, &mut bytes).expect(INSIDE);
        for (word, into) in mask.iter_mut().enumerate() {
            let mut place = [0; 4];
            self.memory.read(at + HEADER_BYTES + 4 * word, &mut place).expect(INSIDE);
            *into = u32::from_le_bytes(place);
        }
        Header::from_bytes(&bytes)
    }

    /// Where the source's results begin among those of each of its experts.
    pub fn write_begins(&self, begins: &[u32]) {
        self.memory.write(self.at + self.layout.begins, as_bytes(begins)).expect(INSIDE);
    }

    pub fn read_begins(&self, begins: &mut [u32]) {
        let into = bytemuck::cast_slice_mut(begins);
        self.memory.read(self.at + self.layout.begins, into).expect(INSIDE);
    }

    /// The list, as [`Entries`] made it.
    pub fn write_entries(&self, entries: &[u8]) {
        self.memory.write(self.at + self.layout.list, entries).expect(INSIDE);
    }

    /// Reads the list of so many rows; the caller has compared them with the source's limit.
    pub fn read_entries(&self, rows: usize, into: &mut Vec<u8>) {
        into.resize(rows * self.layout.entry_bytes, 0);
        self.memory.read(self.at + self.layout.list, into).expect(INSIDE);
    }
}

/// A stretch of an arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub at: usize,
    pub bytes: usize,
}

impl Header {
    fn bytes(&self) -> [u8; HEADER_BYTES] {
        let fields = [
            self.kind,
            self.call,
            self.rows,
            self.tokens,
            self.top_k,
            self.payload,
            self.row_bytes,
            self.scale_bytes,
            self.flags,
            self.results_at,
            self.placement_version as u32,
            (self.placement_version >> 32) as u32,
            self.list_checksum,
            self.checksum,
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Header {
        let field = |at: usize| u32::from_le_bytes(bytes[4 * at..][..4].try_into().expect("four bytes"));
        Header {
            kind: field(0),
            call: field(1),
            rows: field(2),
            tokens: field(3),
            top_k: field(4),
            payload: field(5),
            row_bytes: field(6),
            scale_bytes: field(7),
            flags: field(8),
            results_at: field(9),
            placement_version: u64::from(field(10)) | u64::from(field(11)) << 32,
            list_checksum: field(12),
            checksum: field(13),
        }
    }

    /// The checksum over this header and the mask that goes with it.
    pub fn sum(&self, mask: &[u32]) -> u32 {
        let header = Header { checksum: 0, ..*self };
        let sum = crc32c::crc32c(&header.bytes());
        mask.iter().fold(sum, |sum, word| crc32c::crc32c_append(sum, &word.to_le_bytes()))
    }

    /// Whether this and the mask are what their source wrote, as far as that can be known.
    pub fn is_whole(&self, mask: &[u32]) -> bool {
        let is_unchecked = is_planted(Planted::ChecksumUnchecked) || is_planted(Planted::HeaderUnchecked);
        self.flags & VERIFIED == 0 || self.sum(mask) == self.checksum || is_unchecked
    }
}

/// The form of an entry in a list, for a number of choices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entries {
    top_k: usize,
    bytes: usize,
}

impl Entries {
    pub fn new(top_k: u32) -> Entries {
        Entries { top_k: top_k as usize, bytes: entry_bytes(top_k as usize) }
    }

    /// Bytes of one entry.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends an entry with no choice yet, and gives its place for [`Entries::choose`].
    pub fn push(&self, list: &mut Vec<u8>, token: u32) -> usize {
        let at = list.len();
        list.extend_from_slice(&token.to_le_bytes());
        list.extend_from_slice(&[0; 4]);
        list.resize(at + 8 + 4 * self.top_k, 0);
        // No expert: -1.
        list.resize(at + 8 + 6 * self.top_k, 0xff);
        list.resize(at + self.bytes, 0);
        at
    }

    pub fn choose(&self, list: &mut [u8], at: usize, choice: usize, expert: i16, weight: f32) {
        list[at + 8 + 4 * choice..][..4].copy_from_slice(&weight.to_le_bytes());
        list[at + 8 + 4 * self.top_k + 2 * choice..][..2].copy_from_slice(&expert.to_le_bytes());
    }

    pub fn set_checksum(&self, list: &mut [u8], at: usize, checksum: u32) {
        list[at + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
    }

    /// The entries of a list that was read.
    pub fn iter<'a>(&self, list: &'a [u8]) -> impl ExactSizeIterator<Item = EntryRef<'a>> + use<'a> {
        let top_k = self.top_k;
        list.chunks_exact(self.bytes).map(move |bytes| EntryRef { bytes, top_k })
    }
}

/// One entry of a list.
#[derive(Clone, Copy)]
pub(crate) struct EntryRef<'a> {
    bytes: &'a [u8],
    top_k: usize,
}

impl EntryRef<'_> {
    pub fn token(&self) -> u32 {
        u32::from_le_bytes(self.bytes[..4].try_into().expect("four bytes"))
    }

    pub fn checksum(&self) -> u32 {
        u32::from_le_bytes(self.bytes[4..8].try_into().expect("four bytes"))
    }

    pub fn weight(&self, choice: usize) -> f32 {
        f32::from_le_bytes(self.bytes[8 + 4 * choice..][..4].try_into().expect("four bytes"))
    }

    pub fn expert(&self, choice: usize) -> i16 {
        i16::from_le_bytes(self.bytes[8 + 4 * self.top_k + 2 * choice..][..2].try_into().expect("two bytes"))
    }
}

/// Numbers as they lie in memory and travel: the least byte first, as all processors do that this is built for.
pub(crate) fn as_bytes(words: &[u32]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "numbers travel as they lie in memory") };
    bytemuck::cast_slice(words)
}

/// A payload as a header names it.
pub(crate) fn payload_number(payload: Payload) -> u32 {
    match payload {
        Payload::Bf16 => 1,
        Payload::Fp8 => 2,
        Payload::Fp8Ue8m0 => 3,
        Payload::Opaque { .. } => 4,
    }
}

const HEADER_BYTES: usize = 64;
const INSIDE: &str = "a place of the layout lies inside the region";
