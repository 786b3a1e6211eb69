//! What a launch of the page kernel is to move: pieces by the page numbers of both sides, in words as long as all their
//! addresses allow.

use bytemuck::{Pod, Zeroable};

/// One side of pieces: piece `i` begins at `base + page(i) * stride_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// Where the piece of page 0 begins, as the GPU addresses it.
    pub base: u64,
    /// The distance of pages.
    pub stride_bytes: u64,
    /// Where the GPU reads the page numbers, a `u32` for each piece; `None`: piece `i` is that of page `i`.
    pub pages: Option<u64>,
}

/// What one launch for each length of words moves, one after another on one stream. The order of pieces is not kept, and no two
/// of them may overlap where they are written. A [`Signal`] says that every byte is in place if it goes with the last launch.
#[derive(Clone, Debug)]
pub struct Batch {
    tile_words: u64,
    launches: [Launch; Word::ALL.len()],
}

/// The arguments of one launch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's array, in the order of its tiles.
    pub pieces: Vec<Pieces>,
    /// Tiles of all of them: more blocks than these have nothing to do.
    pub tiles: u64,
}

/// What the kernel copies at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// 16 bytes.
    Bytes16,
    /// 4 bytes.
    Bytes4,
    /// Single bytes: where an address or a length is odd.
    Bytes1,
}

/// Pieces of one length, as `kernels/pages.cu` reads them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Pieces {
    /// Where piece 0 of page 0 begins that is read.
    pub from: u64,
    /// The same of what is written.
    pub to: u64,
    /// The distance of pages that are read.
    pub from_stride_bytes: u64,
    /// The distance of pages that are written.
    pub to_stride_bytes: u64,
    /// The list of pages that are read; 0 for none.
    pub from_pages: u64,
    /// The list of pages that are written; 0 for none.
    pub to_pages: u64,
    /// Words of all pieces.
    pub words: u64,
    /// Tiles of those before in the array.
    pub first_tile: u64,
    /// Words of a piece.
    pub piece_words: u32,
    /// 0.
    pub reserved: u32,
}

/// A word that the launch sets when every byte is where it belongs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Signal {
    /// Where, on a multiple of 4.
    pub at: u64,
    /// To what.
    pub value: u32,
    /// 0.
    pub reserved: u32,
}

impl Word {
    /// From the longest.
    pub const ALL: [Word; 3] = [Word::Bytes16, Word::Bytes4, Word::Bytes1];

    /// How long it is.
    pub const fn bytes(self) -> u64 {
        match self {
            Word::Bytes16 => 16,
            Word::Bytes4 => 4,
            Word::Bytes1 => 1,
        }
    }

    /// The longest that all of these are multiples of.
    fn of(numbers: impl IntoIterator<Item = u64>) -> Word {
        let all = numbers.into_iter().fold(0, |all, number| all | number);
        let fits = |word: &Word| all.is_multiple_of(word.bytes());
        Word::ALL.into_iter().find(fits).unwrap_or(Word::Bytes1)
    }
}

impl Batch {
    /// Nothing yet, for blocks of so many threads.
    pub fn new(block_threads: u32) -> Batch {
        let tile_words = u64::from(block_threads.max(1)) * IN_FLIGHT;
        Batch { tile_words, launches: Default::default() }
    }

    /// Adds `pieces` pieces of `piece_bytes` each. The caller has made sure that all of them lie in memory that the GPU
    /// reaches, and that the lists have as many numbers.
    pub fn pages(&mut self, from: Side, to: Side, piece_bytes: u64, pieces: u64) {
        let whole = [from.base, to.base, from.stride_bytes, to.stride_bytes, piece_bytes];
        if piece_bytes / Word::of(whole).bytes() < LONGEST_PIECE_WORDS {
            return self.push(Word::of(whole), from, to, piece_bytes, pieces);
        }
        // Longer than the kernel counts: slices of every piece, one after another.
        for begin in (0..piece_bytes).step_by(SLICE_BYTES as usize) {
            let at = |side: Side| Side { base: side.base + begin, ..side };
            self.pages(at(from), at(to), SLICE_BYTES.min(piece_bytes - begin), pieces);
        }
    }

    /// Adds one stretch of bytes.
    pub fn span(&mut self, from: u64, to: u64, bytes: u64) {
        // Where both sides are as far from a multiple of a word, all but the ends goes in whole words.
        let word = Word::of([from.wrapping_sub(to)]).bytes();
        let head = bytes.min(from.next_multiple_of(word) - from);
        let body = (bytes - head) / word * word;
        let rows = body / ROW_BYTES * ROW_BYTES;
        let parts = [(0, head, 1), (head, ROW_BYTES, rows / ROW_BYTES), (head + rows, body - rows, 1)];
        for (begin, bytes, pieces) in parts.into_iter().chain([(head + body, bytes - head - body, 1)]) {
            let side = |base| Side { base: base + begin, stride_bytes: ROW_BYTES, pages: None };
            self.push(Word::of([from + begin, to + begin, bytes]), side(from), side(to), bytes, pieces);
        }
    }

    /// How many entries there are in all.
    pub fn entries(&self) -> usize {
        self.launches.iter().map(|launch| launch.pieces.len()).sum()
    }

    /// What is launched for words of one length; nothing if it has no tiles.
    pub fn launch(&self, word: Word) -> &Launch {
        &self.launches[word as usize]
    }

    /// How many bytes there are in all.
    pub fn bytes(&self) -> u64 {
        let of = |word: Word| self.launch(word).pieces.iter().map(move |pieces| pieces.words * word.bytes());
        Word::ALL.into_iter().flat_map(of).sum()
    }

    /// Nothing again; what was allocated stays.
    pub fn clear(&mut self) {
        for launch in &mut self.launches {
            launch.pieces.clear();
            launch.tiles = 0;
        }
    }

    fn push(&mut self, word: Word, from: Side, to: Side, piece_bytes: u64, pieces: u64) {
        let piece_words = piece_bytes / word.bytes();
        let words = piece_words * pieces;
        if words == 0 {
            return;
        }
        let launch = &mut self.launches[word as usize];
        launch.pieces.push(Pieces {
            from: from.base,
            to: to.base,
            from_stride_bytes: from.stride_bytes,
            to_stride_bytes: to.stride_bytes,
            from_pages: from.pages.unwrap_or(0),
            to_pages: to.pages.unwrap_or(0),
            words,
            first_tile: launch.tiles,
            piece_words: piece_words as u32,
            reserved: 0,
        });
        launch.tiles += words.div_ceil(self.tile_words);
    }
}

/// Words that a thread of the kernel has on their way: `IN_FLIGHT` there.
const IN_FLIGHT: u64 = 8;

/// The kernel counts within a piece, and a tile beyond it, in 32 bits.
const LONGEST_PIECE_WORDS: u64 = 1 << 31;

/// A piece of which the kernel can count single bytes.
const SLICE_BYTES: u64 = 1 << 30;

/// What a span is cut into, so that its length is a number of pieces.
const ROW_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every stretch that the kernel would move, by its definition: from, to, bytes.
    fn stretches(batch: &Batch, lists: &[Vec<u32>]) -> Vec<(u64, u64, u64)> {
        let mut all = Vec::new();
        for word in Word::ALL {
            let launch = batch.launch(word);
            let mut tiles = 0;
            for pieces in &launch.pieces {
                assert_eq!(pieces.first_tile, tiles);
                tiles += pieces.words.div_ceil(batch.tile_words);
                assert!(u64::from(pieces.piece_words) < LONGEST_PIECE_WORDS);
                for nth in 0..pieces.words / u64::from(pieces.piece_words) {
                    let page = |list: u64| match list {
                        0 => nth,
                        // Lists are named by their place here.
                        list => lists[list as usize - 1][nth as usize].into(),
                    };
                    let from = pieces.from + page(pieces.from_pages) * pieces.from_stride_bytes;
                    let to = pieces.to + page(pieces.to_pages) * pieces.to_stride_bytes;
                    assert!(from.is_multiple_of(word.bytes()) && to.is_multiple_of(word.bytes()));
                    all.push((from, to, u64::from(pieces.piece_words) * word.bytes()));
                }
            }
            assert_eq!(launch.tiles, tiles);
        }
        all
    }

    /// As far as possible joined, by where they are written.
    fn joined(mut all: Vec<(u64, u64, u64)>) -> Vec<(u64, u64, u64)> {
        all.sort_by_key(|&(_, to, _)| to);
        let mut joined: Vec<(u64, u64, u64)> = Vec::new();
        for (from, to, bytes) in all {
            match joined.last_mut() {
                Some(last) if last.0 + last.2 == from && last.1 + last.2 == to => last.2 += bytes,
                _ => joined.push((from, to, bytes)),
            }
        }
        joined
    }

    proptest! {
        #[test]
        fn a_span_is_moved_once_and_whole(from in 1u64..1 << 40, to in 1u64..1 << 40, bytes in 0u64..5 << 20, threads in 1u32..1025) {
            let mut batch = Batch::new(threads);
            batch.span(from, to, bytes);
            prop_assert_eq!(batch.bytes(), bytes);
            let expected = if bytes == 0 { vec![] } else { vec![(from, to, bytes)] };
            prop_assert_eq!(joined(stretches(&batch, &[])), expected);
            // No more single words than at both ends.
            let word = Word::of([from.wrapping_sub(to)]);
            let longest = batch.launch(word).pieces.iter().map(|pieces| pieces.words).sum::<u64>() * word.bytes();
            prop_assert!(bytes - longest < 2 * word.bytes());
        }

        #[test]
        fn pages_are_moved_once_and_whole(
            (from_base, to_base) in (1u64..1 << 40, 1u64..1 << 40),
            (align, piece, gaps) in (0u32..6, 1u64..3000, (0u64..100, 0u64..100)),
            pages in prop::collection::btree_map(any::<u32>(), any::<u32>(), 0..20),
        ) {
            // As aligned as it happens.
            let even = |number: u64| (number >> align) << align;
            let piece = even(piece).max(1);
            let side = |base, gap, list| Side { base: even(base), stride_bytes: piece + even(gap), pages: Some(list) };
            // Keys are distinct, so no two are written to the same place.
            let lists = [pages.values().copied().collect(), pages.keys().copied().collect::<Vec<u32>>()];
            let (from, to) = (side(from_base, gaps.0, 1), side(to_base, gaps.1, 2));
            let mut batch = Batch::new(256);
            batch.pages(from, to, piece, pages.len() as u64);
            let at = |side: Side, page: u32| side.base + u64::from(page) * side.stride_bytes;
            let expected = lists[0].iter().zip(&lists[1]).map(|(&f, &t)| (at(from, f), at(to, t), piece)).collect();
            prop_assert_eq!(joined(stretches(&batch, &lists)), joined(expected));
            if align >= 4 && piece >= 16 {
                prop_assert_eq!(batch.launch(Word::Bytes16).pieces.len(), usize::from(!pages.is_empty()));
            }
        }
    }

    #[test]
    fn pieces_longer_than_the_kernel_counts_are_sliced() {
        let mut batch = Batch::new(256);
        let side = |base| Side { base, stride_bytes: 5 << 30, pages: None };
        batch.pages(side(1), side((1 << 40) + 1), (3 << 30) + 7, 2);
        assert_eq!(batch.bytes(), 2 * ((3 << 30) + 7));
        let expected = vec![
            (1, (1 << 40) + 1, (3 << 30) + 7),
            (1 + (5 << 30), (1 << 40) + (5 << 30) + 1, (3 << 30) + 7),
        ];
        assert_eq!(joined(stretches(&batch, &[])), expected);
        batch.clear();
        assert_eq!((batch.bytes(), batch.launch(Word::Bytes1)), (0, &Launch::default()));
    }
}
