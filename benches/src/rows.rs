//! What expert dispatch and combine cannot do without: rows that go to known places, and rows that are read and summed.
//!
//! The unsafe parts of epbench's floor are here. Each takes whole [`Memory`]s and checks the places against them.
#![allow(unsafe_code)]

use crossdock::Memory;
use crossdock_ep::{Bf16, Summer};
use crossdock_shm::copy::{Copier, Pieces};

/// Rows of one length, one after the other in memory.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Where they are.
    pub memory: &'a Memory,
    /// Where the first one begins.
    pub at: usize,
    /// How long each is.
    pub row_bytes: usize,
}

impl Rows<'_> {
    /// Writes one row to several places, each named once.
    ///
    /// # Panics
    /// If a place is not in the memory, or the row has another length.
    pub fn scatter(&self, copier: Copier, row: &[u8], places: &[u32]) {
        assert_eq!(row.len(), self.row_bytes, "a row as long as its place");
        let Some(&last) = places.iter().max() else { return };
        self.memory.at(self.at, (last as usize + 1) * self.row_bytes).expect("every place is in the memory");
        let pieces = Pieces {
            dst_base: self.memory.base().wrapping_add(self.at),
            dst_stride: self.row_bytes,
            src_base: row.as_ptr(),
            src_stride: 0,
            piece_bytes: self.row_bytes,
            dst_index: places,
            src_index: &ZEROS[..places.len()],
        };
        // SAFETY: every place was found in the memory, which is mapped and to which there is no reference, so the row is
        // elsewhere; places are different rows, as the caller says, and were they not, the same bytes would be written.
        unsafe { copier.copy_pieces(pieces) }
    }
}

impl Rows<'_> {
    /// Writes the words of some of these rows in columns: of each row's first word, then of its second, and so on. Where
    /// the first column begins is given, and how far the next one is from it, in bytes.
    ///
    /// # Panics
    /// If a row or a column is not in the memory, or not at a whole word.
    pub fn transpose(&self, rows: &[u32], first: usize, column_bytes: usize) {
        let words = self.row_bytes / 4;
        let (Some(&last), Some(last_column)) = (rows.iter().max(), words.checked_sub(1)) else { return };
        let inside = "rows and columns are in the memory";
        let from_bytes = (last as usize + 1) * self.row_bytes;
        let from = self.memory.at(self.at, from_bytes).expect(inside).cast::<u32>();
        let to_bytes = last_column * column_bytes + 4 * rows.len();
        let to = self.memory.at(first, to_bytes).expect(inside).cast::<u32>();
        let is_whole = self.row_bytes.is_multiple_of(4) && column_bytes.is_multiple_of(4);
        assert!(is_whole && from.is_aligned() && to.is_aligned(), "whole words");
        for word in 0..words {
            let column = to.wrapping_byte_add(word * column_bytes);
            for (place, &row) in rows.iter().enumerate() {
                // SAFETY: the row is not behind the last one, which was found in the memory, and the place is one of the
                // column's, the last of which was found there; words of the memory are aligned and nobody has a reference
                // to them.
                unsafe { column.add(place).write(from.add(row as usize * words + word).read()) }
            }
        }
    }
}

/// How the rows of a sum count.
#[derive(Clone, Copy, Debug)]
pub enum Terms<'a> {
    /// Each times its weight.
    Weighted(&'a [f32]),
    /// As they are.
    Plain,
}

/// Sums rows that are where their memory and an offset say.
///
/// # Panics
/// If a row is not in its memory, or there are more than [`MOST_PLACES`].
pub fn sum(summer: Summer, rows: &[(&Memory, usize)], terms: Terms<'_>, out: &mut [Bf16]) {
    let mut pointers = [std::ptr::null::<Bf16>(); MOST_PLACES];
    for (pointer, (memory, at)) in pointers.iter_mut().zip(rows) {
        *pointer = memory.at(*at, 2 * out.len()).expect("a row is in its memory").cast();
        assert!(pointer.is_aligned(), "a row at {pointer:?}");
    }
    let pointers = &pointers[..rows.len()];
    // SAFETY: each row was found in a memory that is mapped, has as many channels as the sum and begins at a whole one;
    // nobody writes results while the ranks sum.
    unsafe {
        match terms {
            Terms::Weighted(weights) => summer.weighted(pointers, weights, out),
            Terms::Plain => summer.plain(pointers, &[], out),
        }
    }
}

/// The most rows of a sum, and the most places of a row.
pub const MOST_PLACES: usize = 64;

const ZEROS: [u32; MOST_PLACES] = [0; MOST_PLACES];

#[cfg(test)]
mod tests {
    use crossdock::AllocateOptions;
    use crossdock_shm::copy::Strategy;

    use super::*;

    #[test]
    fn rows_go_to_their_places_and_sums_are_right() {
        let memory = Memory::allocate(1024 + 8 * 1024, &AllocateOptions::default()).unwrap();
        let rows = Rows { memory: &memory, at: 1024, row_bytes: 1024 };
        let one = [Bf16::from_f32(1.5).to_bits().to_le_bytes(); 512];
        for strategy in [Strategy::Cached, Strategy::Streamed] {
            memory.fill(0, memory.bytes(), 0).unwrap();
            rows.scatter(Copier::detect().force(strategy), one.as_flattened(), &[7, 0, 3]);
            let mut found = vec![0; 1024];
            for row in 0..8 {
                memory.read(1024 + row * 1024, &mut found).unwrap();
                assert_eq!(found == one.as_flattened(), [0, 3, 7].contains(&row), "{row}");
            }
        }
        let mut out = [Bf16::default(); 512];
        let two = [(&memory, 1024), (&memory, 8 * 1024)];
        sum(Summer::detect(), &two, Terms::Weighted(&[1.0, 3.0]), &mut out);
        assert!(out.iter().all(|value| value.to_f32() == 6.0));
        sum(Summer::detect(), &two, Terms::Plain, &mut out);
        assert!(out.iter().all(|value| value.to_f32() == 3.0));
    }

    #[test]
    fn rows_become_columns() {
        let memory = Memory::allocate(4096, &AllocateOptions::default()).unwrap();
        let words: Vec<u8> = (0..12_u32).flat_map(u32::to_le_bytes).collect();
        memory.write(64, &words).unwrap();
        Rows { memory: &memory, at: 64, row_bytes: 12 }.transpose(&[3, 1], 1024, 16);
        let mut found = [0; 48];
        memory.read(1024, &mut found).unwrap();
        let found: Vec<u32> =
            found.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(found, [9, 3, 0, 0, 10, 4, 0, 0, 11, 5, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "every place is in the memory")]
    fn a_place_beyond_the_memory_is_refused() {
        let memory = Memory::allocate(4096, &AllocateOptions::default()).unwrap();
        Rows { memory: &memory, at: 1024, row_bytes: 1024 }.scatter(Copier::detect(), &[0; 1024], &[3]);
    }
}
