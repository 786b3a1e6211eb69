//! Arrays that begin at a cache line, as tensors do.

use std::ops::{Deref, DerefMut};

/// So many values, the first one at a multiple of 4096 bytes. An array of the standard library that is long begins 16
/// bytes behind one, and every vector of 64 bytes in it would lie on two lines.
#[derive(Clone, Debug, Default)]
pub struct Aligned<T> {
    values: Vec<T>,
    first: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// All of them the default value.
    pub fn new(len: usize) -> Self {
        let values = vec![T::default(); len + ALIGNMENT];
        let first = values.as_ptr().align_offset(ALIGNMENT);
        Self { values, first, len }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[self.first..][..self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.first..][..self.len]
    }
}

const ALIGNMENT: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_begin_at_a_page_and_have_their_length() {
        for len in [0, 1, 100, 1 << 20] {
            let array = Aligned::<u16>::new(len);
            assert_eq!((array.as_ptr().addr() % 4096, array.len()), (0, len));
        }
    }
}
