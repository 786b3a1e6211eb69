//! The state of one page, in one word.

use super::MAX_PAGES;

/// What a page is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PageState {
    /// In the pool.
    Free,
    /// In one page set.
    Owned,
    /// A peer may write it.
    Granted,
    /// Its room has ended and a peer can still write it; the entry says which.
    Quarantined {
        /// Where the reason is found.
        entry: u32,
    },
    /// A peer could write it when whoever held it let it go.
    Abandoned,
    /// In page refs.
    Shared {
        /// How often.
        references: u32,
    },
}

/// A [`PageState`] in four bytes: the kind in the top bits, the entry or the count below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StateWord(u32);

impl StateWord {
    pub(super) const FREE: StateWord = StateWord(0);
    pub(super) const OWNED: StateWord = StateWord(1 << PAYLOAD_BITS);
    pub(super) const GRANTED: StateWord = StateWord(2 << PAYLOAD_BITS);
    pub(super) const ABANDONED: StateWord = StateWord(4 << PAYLOAD_BITS);

    pub(super) fn quarantined(entry: u32) -> StateWord {
        debug_assert!(entry <= PAYLOAD_MASK);
        StateWord((3 << PAYLOAD_BITS) | entry)
    }

    /// # Panics
    /// When there are too many references to count: each has leaked, for they do not fit the memory.
    pub(super) fn shared(references: u32) -> StateWord {
        assert!(references <= PAYLOAD_MASK, "a page has more references than can be counted");
        StateWord((5 << PAYLOAD_BITS) | references)
    }

    pub(super) fn state(self) -> PageState {
        let payload = self.0 & PAYLOAD_MASK;
        match self.0 >> PAYLOAD_BITS {
            0 => PageState::Free,
            1 => PageState::Owned,
            2 => PageState::Granted,
            3 => PageState::Quarantined { entry: payload },
            4 => PageState::Abandoned,
            5 => PageState::Shared { references: payload },
            kind => unreachable!("no constructor makes a page state of kind {kind}"),
        }
    }
}

const PAYLOAD_BITS: u32 = 29;
const PAYLOAD_MASK: u32 = (1 << PAYLOAD_BITS) - 1;
// Every quarantined page could have an entry of its own.
const _: () = assert!(MAX_PAGES <= PAYLOAD_MASK);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_comes_back_out_of_its_word() {
        for (word, state) in [
            (StateWord::FREE, PageState::Free),
            (StateWord::OWNED, PageState::Owned),
            (StateWord::GRANTED, PageState::Granted),
            (StateWord::ABANDONED, PageState::Abandoned),
            (StateWord::quarantined(0), PageState::Quarantined { entry: 0 }),
            (StateWord::quarantined(MAX_PAGES), PageState::Quarantined { entry: MAX_PAGES }),
            (StateWord::shared(1), PageState::Shared { references: 1 }),
            (StateWord::shared(PAYLOAD_MASK), PageState::Shared { references: PAYLOAD_MASK }),
        ] {
            assert_eq!(word.state(), state);
        }
    }

    #[test]
    #[should_panic(expected = "more references than can be counted")]
    fn a_count_never_spills_into_the_kind() {
        StateWord::shared(PAYLOAD_MASK + 1);
    }
}
