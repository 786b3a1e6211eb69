//! Where in a rank's memory the others write: one arena for each slot and source, and one area of results for each slot.
//!
//! An arena has one writer, its source. The source fills it from the front: a header that says what the call is, a
//! list with an entry for each row, and the rows. Two headers take turns, since a source may begin its next call while
//! its reader has not looked at this one yet; it cannot be two calls ahead, because it would have had to hear of the
//! reader's next call in between.
//!
//! What is read here was written by another program: every number is checked before it is used.

use crossdock_memory::{Memory, OutOfRange};

use crate::{GroupConfig, Payload};

/// The places in one arena, in bytes from where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArenaLayout {
    header_bytes: usize,
    begins: usize,
    rows: usize,
    bytes: usize,
    entry_bytes: usize,
}

/// What a call is, as its source says: compared with what this rank does, so that ranks that do different things learn of
/// it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: u32,
    /// Rows in this arena.
    pub rows: u32,
    /// Tokens of the source, of which the arena has those that go here.
    pub tokens: u32,
    pub top_k: u32,
    pub payload: u32,
    pub row_bytes: u32,
    pub scale_bytes: u32,
    pub flags: u32,
    pub placement_version: u64,
}

/// The places of all arenas and results of one rank.
#[derive(Clone, Debug)]
pub(crate) struct RegionLayout {
    arenas: Vec<ArenaLayout>,
    /// By source, from where the slot begins.
    starts: Vec<usize>,
    results: usize,
    returned_weights: usize,
    slot_bytes: usize,
    pub bytes: usize,
}

impl ArenaLayout {
    /// The arena of a source that dispatches at most `tokens` tokens in a call; `None` if it cannot be addressed.
    pub fn new(config: &GroupConfig, tokens: u32) -> Option<ArenaLayout> {
        let ranks = config.max_tokens.len();
        let header_bytes = (HEADER_BYTES + 4 * ranks.div_ceil(32)).next_multiple_of(LINE_BYTES);
        let entry_bytes = entry_bytes(config.top_k as usize);
        let begins = WORD_BYTES + 2 * header_bytes;
        let rows = begins + (4 * config.spread().most() as usize).next_multiple_of(LINE_BYTES);
        let tokens = tokens as usize;
        let stride = row_stride(
            usize::try_from(config.payload.row_bytes(config.hidden)).ok()?,
            usize::try_from(config.payload.scale_bytes(config.hidden)).ok()?,
        );
        let list = tokens.checked_mul(entry_bytes)?.checked_next_multiple_of(LINE_BYTES)?;
        let bytes = rows.checked_add(list)?.checked_add(tokens.checked_mul(stride)?)?;
        Some(ArenaLayout { header_bytes, begins, rows, bytes, entry_bytes })
    }

    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }
}

impl RegionLayout {
    /// The region of one rank of a valid configuration.
    pub fn new(config: &GroupConfig, rank: u32) -> RegionLayout {
        let arenas: Vec<ArenaLayout> = config
            .max_tokens
            .iter()
            .map(|&tokens| ArenaLayout::new(config, tokens).expect("the configuration is valid"))
            .collect();
        let mut at = 0;
        let starts = arenas
            .iter()
            .map(|arena| {
                let start = at;
                at += arena.bytes.next_multiple_of(LINE_BYTES);
                start
            })
            .collect();
        let results = at.next_multiple_of(PAGE_BYTES);
        let experts = config.spread().of_rank(rank).len();
        let rows = rows_per_expert(config);
        let returned_weights = results + experts * rows * 2 * config.hidden as usize;
        let end = returned_weights + rows * 4 * config.top_k as usize;
        let slot_bytes = end.next_multiple_of(PAGE_BYTES);
        let bytes = slot_bytes * config.slots as usize;
        RegionLayout { arenas, starts, results, returned_weights, slot_bytes, bytes }
    }

    /// Where a slot's results begin: a row for each of a rank's experts and each token that may come.
    pub fn results(&self, slot: u32) -> usize {
        slot as usize * self.slot_bytes + self.results
    }

    /// Where the weights begin that go back with the results of the throughput mode.
    pub fn returned_weights(&self, slot: u32) -> usize {
        slot as usize * self.slot_bytes + self.returned_weights
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
    /// The arena of `source` in the memory of the rank that `region` describes.
    pub fn of(memory: &'a Memory, region: &'a RegionLayout, slot: u32, source: u32) -> Arena<'a> {
        let source = source as usize;
        let at = slot as usize * region.slot_bytes + region.starts[source];
        Arena { memory, layout: &region.arenas[source], at }
    }

    /// Where the arrivals word is.
    pub fn word(&self) -> (&'a Memory, usize) {
        (self.memory, self.at)
    }

    /// Where the source says that it has masked the reader: 0, or anything else.
    pub fn farewell(&self) -> (&'a Memory, usize) {
        (self.memory, self.at + 4)
    }

    fn header_at(&self, call: u32) -> usize {
        self.at + WORD_BYTES + (call & 1) as usize * self.layout.header_bytes
    }

    pub fn write_header(&self, call: u32, header: &Header, mask: &[u32]) {
        let mut bytes = [0; HEADER_BYTES];
        let fields = [
            header.kind,
            header.rows,
            header.tokens,
            header.top_k,
            header.payload,
            header.row_bytes,
            header.scale_bytes,
            header.flags,
            header.placement_version as u32,
            (header.placement_version >> 32) as u32,
        ];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        let at = self.header_at(call);
        self.memory.write(at, &bytes).expect(INSIDE);
        let mask: Vec<u8> = mask.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write(at + HEADER_BYTES, &mask).expect(INSIDE);
    }

    pub fn read_header(&self, call: u32, mask: &mut [u32]) -> Header {
        let mut bytes = [0; HEADER_BYTES];
        let at = self.header_at(call);
        self.memory.read(at, &mut bytes).expect(INSIDE);
        for (word, into) in mask.iter_mut().enumerate() {
            let mut place = [0; 4];
            self.memory.read(at + HEADER_BYTES + 4 * word, &mut place).expect(INSIDE);
            *into = u32::from_le_bytes(place);
        }
        let field = |at: usize| u32::from_le_bytes(bytes[4 * at..][..4].try_into().expect("four bytes"));
        Header {
            kind: field(0),
            rows: field(1),
            tokens: field(2),
            top_k: field(3),
            payload: field(4),
            row_bytes: field(5),
            scale_bytes: field(6),
            flags: field(7),
            placement_version: u64::from(field(8)) | u64::from(field(9)) << 32,
        }
    }

    /// Where the source's rows begin among those of each of its experts.
    pub fn write_begins(&self, begins: &[u32]) {
        let bytes: Vec<u8> = begins.iter().flat_map(|begin| begin.to_le_bytes()).collect();
        self.memory.write(self.at + self.layout.begins, &bytes).expect(INSIDE);
    }

    pub fn read_begins(&self, begins: &mut [u32]) {
        let mut bytes = vec![0; 4 * begins.len()];
        self.memory.read(self.at + self.layout.begins, &mut bytes).expect(INSIDE);
        for (begin, bytes) in begins.iter_mut().zip(bytes.chunks_exact(4)) {
            *begin = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
    }

    /// The list of `rows` entries, as [`Entries`] made it.
    pub fn write_entries(&self, entries: &[u8]) {
        self.memory.write(self.at + self.layout.rows, entries).expect(INSIDE);
    }

    /// Reads the list; refused where the rows do not fit the arena.
    pub fn read_entries(&self, rows: usize, stride: usize, into: &mut Vec<u8>) -> Result<(), OutOfRange> {
        let list = rows.saturating_mul(self.layout.entry_bytes);
        let end = list
            .next_multiple_of(LINE_BYTES)
            .saturating_add(rows.saturating_mul(stride))
            .saturating_add(self.layout.rows);
        if end > self.layout.bytes {
            return Err(OutOfRange { offset: 0, bytes: end, memory_bytes: self.layout.bytes });
        }
        into.clear();
        into.resize(list, 0);
        self.memory.read(self.at + self.layout.rows, into)
    }

    /// Where the rows begin, in the rank's memory, behind a list of `rows` entries.
    pub fn rows_at(&self, rows: usize) -> usize {
        self.at + self.layout.rows + (rows * self.layout.entry_bytes).next_multiple_of(LINE_BYTES)
    }

    pub fn memory(&self) -> &'a Memory {
        self.memory
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

/// A payload as a header names it.
pub(crate) fn payload_number(payload: Payload) -> u32 {
    match payload {
        Payload::Bf16 => 1,
        Payload::Fp8 => 2,
        Payload::Fp8Ue8m0 => 3,
        Payload::Opaque { .. } => 4,
    }
}

/// The arrivals word has two lines for itself, as processors fetch lines in pairs.
const WORD_BYTES: usize = 128;
const HEADER_BYTES: usize = 64;
const LINE_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;
const INSIDE: &str = "a place of the layout lies inside the region";
