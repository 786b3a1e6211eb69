//! A set of small numbers that finds its neighbours in constant time.

/// Which lengths of run there are: a bitmap, with a bitmap of its non-empty words above it, and so on up to one
/// word. Each level is 64 times shorter, so even [`MAX_PAGES`](super::MAX_PAGES) lengths need five of them.
pub(super) struct Lengths {
    levels: Vec<Box<[u64]>>,
}

impl Lengths {
    /// An empty set that can hold `0 ..= largest`.
    pub(super) fn new(largest: u32) -> Lengths {
        let mut levels = Vec::new();
        let mut words = largest as usize / 64 + 1;
        levels.push(vec![0; words].into_boxed_slice());
        while words > 1 {
            words = words.div_ceil(64);
            levels.push(vec![0; words].into_boxed_slice());
        }
        Lengths { levels }
    }

    pub(super) fn insert(&mut self, length: u32) {
        let mut at = length as usize;
        for level in &mut self.levels {
            let word = &mut level[at / 64];
            let was_empty = *word == 0;
            *word |= 1 << (at % 64);
            if !was_empty {
                return;
            }
            at /= 64;
        }
    }

    pub(super) fn remove(&mut self, length: u32) {
        let mut at = length as usize;
        for level in &mut self.levels {
            let word = &mut level[at / 64];
            *word &= !(1 << (at % 64));
            if *word != 0 {
                return;
            }
            at /= 64;
        }
    }

    /// The smallest member that is at least `length`.
    pub(super) fn at_least(&self, length: u32) -> Option<u32> {
        let mut at = length as usize;
        for height in 0..self.levels.len() {
            let word = self.levels[height].get(at / 64).copied().unwrap_or(0) & (u64::MAX << (at % 64));
            if word != 0 {
                return Some(self.descend(height, at / 64 * 64 + word.trailing_zeros() as usize, lowest_bit));
            }
            // Nothing in this word from here on: look for the next word that has anything.
            at = at / 64 + 1;
        }
        None
    }

    /// The largest member.
    pub(super) fn largest(&self) -> Option<u32> {
        let top = self.levels.len() - 1;
        let word = self.levels[top][0];
        (word != 0).then(|| self.descend(top, highest_bit(word), highest_bit))
    }

    /// From a bit of one level down to a member, by the bit that `choose` picks in each word.
    fn descend(&self, height: usize, mut at: usize, choose: fn(u64) -> usize) -> u32 {
        for level in self.levels[..height].iter().rev() {
            at = at * 64 + choose(level[at]);
        }
        at as u32
    }
}

fn lowest_bit(word: u64) -> usize {
    word.trailing_zeros() as usize
}

fn highest_bit(word: u64) -> usize {
    63 - word.leading_zeros() as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ends_of_every_level_are_reachable() {
        for largest in [0, 1, 63, 64, 65, 4095, 4096, 4097, 262_143, 262_144, 1 << 24] {
            let mut lengths = Lengths::new(largest);
            assert_eq!((lengths.at_least(0), lengths.largest()), (None, None));
            lengths.insert(largest);
            assert_eq!((lengths.at_least(0), lengths.largest()), (Some(largest), Some(largest)));
            lengths.insert(0);
            assert_eq!((lengths.at_least(0), lengths.largest()), (Some(0), Some(largest)));
            assert_eq!(lengths.at_least(1), (largest > 0).then_some(largest));
            assert_eq!(lengths.at_least(largest), Some(largest));
            lengths.remove(largest);
            if largest > 0 {
                assert_eq!((lengths.at_least(0), lengths.largest()), (Some(0), Some(0)));
            }
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_an_ordered_set(
            largest in 1u32..9000,
            steps in prop::collection::vec((any::<bool>(), any::<u32>(), any::<u32>()), 1..200),
        ) {
            let mut lengths = Lengths::new(largest);
            let mut model = BTreeSet::new();
            for (insert, length, question) in steps {
                let length = length % (largest + 1);
                let question = question % (largest + 1);
                if insert {
                    lengths.insert(length);
                    model.insert(length);
                } else {
                    lengths.remove(length);
                    model.remove(&length);
                }
                prop_assert_eq!(lengths.at_least(question), model.range(question..).next().copied());
                prop_assert_eq!(lengths.largest(), model.last().copied());
            }
        }
    }
}
