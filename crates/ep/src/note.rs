//! What an immediate between two ranks says.

/// A message of 30 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// The next call in a slot has been written.
    Call {
        slot: u32,
        /// The lower 22 bits of its number.
        call: u32,
    },
    /// This rank may be written to.
    Ready,
    /// This rank waits in a slot.
    Pulse { slot: u32 },
    /// This rank makes no further call.
    Left,
    /// The answer to that, and to the next.
    Parted,
    /// The other is masked: this rank goes on without it.
    Masked,
}

impl Note {
    pub fn bits(self) -> u32 {
        let form = |form: u32, slot: u32, call: u32| form << 28 | slot << CALL_BITS | call;
        match self {
            Note::Call { slot, call } => form(0, slot, call),
            Note::Ready => form(1, 0, 0),
            Note::Pulse { slot } => form(2, slot, 0),
            Note::Left => form(3, 0, 0),
            Note::Parted => form(3, 0, 1),
            Note::Masked => form(3, 0, 2),
        }
    }

    /// `None` for what this version does not know.
    pub fn from_bits(bits: u32) -> Option<Note> {
        let (form, slot, call) = (bits >> 28, bits >> CALL_BITS & 0x3f, Note::lower_bits(bits));
        let note = match form {
            0 => Note::Call { slot, call },
            1 => Note::Ready,
            2 => Note::Pulse { slot },
            3 if call == 0 => Note::Left,
            3 if call == 1 => Note::Parted,
            3 => Note::Masked,
            _ => return None,
        };
        (note.bits() == bits).then_some(note)
    }

    /// As much of a call's number as a note carries.
    pub fn lower_bits(call: u32) -> u32 {
        call & ((1 << CALL_BITS) - 1)
    }
}

const CALL_BITS: u32 = 22;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_come_back_from_their_bits_and_nothing_else_does() {
        let notes = [
            Note::Call { slot: 0, call: 0 },
            Note::Call { slot: 63, call: Note::lower_bits(u32::MAX) },
            Note::Ready,
            Note::Pulse { slot: 63 },
            Note::Left,
            Note::Parted,
            Note::Masked,
        ];
        for note in notes {
            assert!(note.bits() < 1 << 30);
            assert_eq!(Note::from_bits(note.bits()), Some(note));
        }
        for bits in [1 << 28 | 1, 2 << 28 | 1, 3 << 28 | 3, 1 << 30] {
            assert_eq!(Note::from_bits(bits), None, "{bits:x}");
        }
    }
}
