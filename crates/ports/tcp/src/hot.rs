//! While its owner spins, a port tries the lane on which bytes came last instead of asking the kernel which lane has
//! any. That saves a call on the way of every message that is waited for.

/// The lane on which bytes came last, and how well trying it has done.
pub(crate) struct Hot {
    lane: u32,
    /// How often it was tried since the kernel was asked.
    guesses: u32,
    /// How often it had its turn in vain since bytes came.
    misses: u32,
}

impl Hot {
    pub fn new() -> Self {
        Self { lane: 0, guesses: 0, misses: MISSES_MAX }
    }

    /// The lane to try; `None` when it is time to ask the kernel.
    pub fn guess(&mut self) -> Option<u32> {
        if self.guesses == GUESSES_MAX || self.misses >= MISSES_MAX {
            self.guesses = 0;
            return None;
        }
        self.guesses += 1;
        Some(self.lane)
    }

    /// The next poll asks the kernel: its owner sleeps, and whatever wakes it is to be found.
    pub fn ask_next(&mut self) {
        self.guesses = GUESSES_MAX;
    }

    /// A lane had its turn.
    pub fn note(&mut self, lane: u32, received: bool) {
        if received {
            (self.lane, self.misses) = (lane, 0);
        } else if lane == self.lane {
            self.misses = self.misses.saturating_add(1);
        }
    }
}

/// New connections, deadlines and the other lanes are heard of after so many polls at the latest.
const GUESSES_MAX: u32 = 16;
/// After so many vain turns in a row the kernel is asked every time.
const MISSES_MAX: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_asked_often_enough() {
        let mut hot = Hot::new();
        assert_eq!(hot.guess(), None, "nothing has come yet");
        hot.note(7, true);
        for _ in 0..3 {
            assert!((0..GUESSES_MAX).all(|_| hot.guess() == Some(7)));
            assert_eq!(hot.guess(), None);
        }
        assert_eq!(hot.guess(), Some(7));
        hot.ask_next();
        assert_eq!(hot.guess(), None);
        for _ in 0..MISSES_MAX {
            hot.note(8, false);
        }
        assert_eq!(hot.guess(), Some(7), "the misses of another lane do not count");
        for _ in 0..MISSES_MAX {
            hot.note(7, false);
        }
        assert_eq!(hot.guess(), None);
        hot.note(8, true);
        assert_eq!(hot.guess(), Some(8));
    }
}
