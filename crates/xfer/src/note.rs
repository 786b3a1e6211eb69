//! What an immediate between two sides says.

/// A message of 30 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// This side's memory may be written and read.
    Ready,
    /// The writes of a chunk are here, once those before it on its lane are.
    Landed(u32),
    /// The answer to that.
    Seen(u32),
}

impl Note {
    /// Chunks are numbered by as many bits.
    pub const CHUNK_BITS: u32 = 28;

    pub fn bits(self) -> u32 {
        match self {
            Note::Ready => 0,
            Note::Landed(chunk) => 1 << Self::CHUNK_BITS | chunk,
            Note::Seen(chunk) => 2 << Self::CHUNK_BITS | chunk,
        }
    }

    /// `None` for what this version does not know.
    pub fn from_bits(bits: u32) -> Option<Note> {
        let chunk = bits & ((1 << Self::CHUNK_BITS) - 1);
        match bits >> Self::CHUNK_BITS {
            0 if chunk == 0 => Some(Note::Ready),
            1 => Some(Note::Landed(chunk)),
            2 => Some(Note::Seen(chunk)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_come_back_out_of_their_bits() {
        for note in [Note::Ready, Note::Landed(0), Note::Landed((1 << 28) - 1), Note::Seen(77)] {
            assert_eq!(Note::from_bits(note.bits()), Some(note));
        }
        for bits in [1, 3 << 28, u32::MAX] {
            assert_eq!(Note::from_bits(bits), None);
        }
    }
}
