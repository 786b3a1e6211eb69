//! Large outputs that begin at a line of the cache.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Zeroed bytes that begin at a line, as stores past the cache want them. Memory that is never written is never touched.
pub(crate) struct Bytes {
    all: Vec<u8>,
    begin: usize,
    len: usize,
}

impl Bytes {
    pub fn zeroed(len: usize) -> Bytes {
        // Longer by what alignment may cost: an aligned allocation would be cleared byte by byte.
        let all = vec![0; len + LINE_BYTES];
        let begin = all.as_ptr().align_offset(LINE_BYTES).min(LINE_BYTES);
        Bytes { all, begin, len }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.all[self.begin..self.begin + self.len]
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.all[self.begin..self.begin + self.len]
    }
}

impl Clone for Bytes {
    fn clone(&self) -> Bytes {
        let mut copy = Bytes::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.len)
    }
}

const LINE_BYTES: usize = 64;
