//! Which share of a cache a worker holds: which heads, which tokens.

/// Which heads of a cache a worker keeps.
///
/// Under tensor parallelism rank `r` of `n` keeps an `n`-th of the heads; where there are fewer heads than ranks,
/// several ranks keep the same head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadShare {
    /// How many heads the model has. 1 for what is not split among ranks, as a latent.
    pub of: u32,
    /// The first one that is here.
    pub first: u32,
    /// How many are here.
    pub count: u32,
}

impl HeadShare {
    /// What is not split among ranks.
    pub const WHOLE: Self = Self { of: 1, first: 0, count: 1 };

    /// All heads.
    pub const fn all(of: u32) -> Self {
        Self { of, first: 0, count: of }
    }

    /// The heads of rank `rank` of `ranks`: an equal share, or one head where there are fewer heads than ranks.
    /// `None` if the heads cannot be shared so: one number must be a multiple of the other.
    pub fn of_rank(of: u32, rank: u32, ranks: u32) -> Option<Self> {
        if of == 0 || ranks == 0 || rank >= ranks {
            return None;
        }
        if of.is_multiple_of(ranks) {
            let count = of / ranks;
            return Some(Self { of, first: rank * count, count });
        }
        ranks.is_multiple_of(of).then(|| Self { of, first: rank / (ranks / of), count: 1 })
    }

    /// The heads that both have; `None` if there are none.
    pub fn common(&self, other: &Self) -> Option<Self> {
        let first = self.first.max(other.first);
        let end = (self.first + self.count).min(other.first + other.count);
        (first < end).then(|| Self { of: self.of, first, count: end - first })
    }

    pub(super) fn is_sound(&self) -> bool {
        self.count > 0 && self.first.checked_add(self.count).is_some_and(|end| end <= self.of)
    }
}

/// How the numbers of one page lie in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadOrder {
    /// All heads of the first token, then all heads of the next ("NHD").
    TokensFirst,
    /// All tokens of the first head, then all tokens of the next ("HND").
    HeadsFirst,
}

/// Which tokens of a request a worker keeps, where several share its context: in turns of `interleave` tokens.
///
/// With decode context parallelism over `n` ranks and an interleave of 1, rank `r` keeps the tokens `t` with
/// `t % n == r`. What a worker keeps is packed: its pages hold only its own tokens, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContextShare {
    /// Whose turn is this worker's.
    pub rank: u32,
    /// How many take turns.
    pub ranks: u32,
    /// Tokens a turn.
    pub interleave: u32,
}

impl ContextShare {
    /// Every token.
    pub const ALL: Self = Self { rank: 0, ranks: 1, interleave: 1 };

    /// Whether every token is here.
    pub fn is_all(&self) -> bool {
        self.ranks == 1
    }

    /// How many of the first `tokens` tokens of a request are here: the place, in its pages, of the first one after.
    pub fn held_before(&self, tokens: u32) -> u32 {
        if self.is_all() {
            return tokens;
        }
        let (token, turn) = (u64::from(tokens), u64::from(self.interleave));
        let round = turn * u64::from(self.ranks);
        let in_round = (token % round).saturating_sub(u64::from(self.rank) * turn).min(turn);
        (token / round * turn + in_round) as u32
    }

    /// The first token from `token` on that is here, and how many from there on are here without a gap. The count is
    /// at least 1.
    pub fn next_run(&self, token: u32) -> (u64, u32) {
        if self.is_all() {
            return (token.into(), u32::MAX - token);
        }
        let (token, turn) = (u64::from(token), u64::from(self.interleave));
        let round = turn * u64::from(self.ranks);
        let begin = token / round * round + u64::from(self.rank) * turn;
        match token {
            _ if token < begin => (begin, self.interleave),
            _ if token < begin + turn => (token, (begin + turn - token) as u32),
            _ => (begin + round, self.interleave),
        }
    }

    pub(crate) fn is_sound(&self) -> bool {
        self.rank < self.ranks && self.interleave > 0 && self.ranks.checked_mul(self.interleave).is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranks_share_heads() {
        let share = |of, rank, ranks| HeadShare::of_rank(of, rank, ranks).map(|s| (s.first, s.count));
        assert_eq!([0, 1].map(|rank| share(8, rank, 2)), [Some((0, 4)), Some((4, 4))]);
        assert_eq!([0, 1, 2, 3].map(|rank| share(2, rank, 4)), [0, 0, 1, 1].map(|head| Some((head, 1))));
        assert_eq!([share(8, 0, 3), share(8, 2, 2), share(0, 0, 1), share(8, 0, 0)], [None; 4]);
        let heads = |first, count| HeadShare { of: 8, first, count };
        assert_eq!(heads(0, 4).common(&heads(2, 4)), Some(heads(2, 2)));
        assert_eq!(heads(0, 4).common(&heads(4, 4)), None);
    }

    proptest! {
        /// Against the definition, token by token.
        #[test]
        fn a_context_share_counts_its_tokens(
            ranks in 1u32..6, rank in 0u32..6, interleave in 1u32..5, tokens in 0u32..100,
        ) {
            let share = ContextShare { rank: rank % ranks, ranks, interleave };
            let holds = |token: u32| token / interleave % ranks == share.rank;
            let held = (0..tokens).filter(|&token| holds(token)).count();
            prop_assert_eq!(share.held_before(tokens), held as u32);
            let (first, run) = share.next_run(tokens);
            let first = first as u32;
            prop_assert!((tokens..first).all(|token| !holds(token)));
            prop_assert!(holds(first));
            if !share.is_all() {
                prop_assert!((first..first + run).all(holds) && !holds(first + run));
            }
        }
    }
}
