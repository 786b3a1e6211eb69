//! Who holds which expert.

use std::ops::Range;

/// How a group's experts are spread over its ranks: in order, as evenly as they can be. Where they do not divide evenly,
/// the first ranks hold one more than the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    experts: u32,
    ranks: u32,
}

impl Experts {
    /// # Panics
    /// If there is no rank.
    pub fn new(experts: u32, ranks: u32) -> Experts {
        assert!(ranks > 0, "experts need a rank");
        Experts { experts, ranks }
    }

    /// How many there are.
    pub fn count(self) -> u32 {
        self.experts
    }

    /// How many ranks hold them.
    pub fn ranks(self) -> u32 {
        self.ranks
    }

    /// The most that one rank holds.
    pub fn most(self) -> u32 {
        self.experts.div_ceil(self.ranks)
    }

    /// Those of one rank.
    pub fn of_rank(self, rank: u32) -> Range<u32> {
        let (each, more) = (self.experts / self.ranks, self.experts % self.ranks);
        let first = rank * each + rank.min(more);
        first..first + each + u32::from(rank < more)
    }

    /// The rank that holds an expert, and its place among that rank's.
    ///
    /// The expert must be one of the group's.
    pub fn place(self, expert: u32) -> (u32, u32) {
        let (each, more) = (self.experts / self.ranks, self.experts % self.ranks);
        let in_longer = (each + 1) * more;
        if expert < in_longer {
            return (expert / (each + 1), expert % (each + 1));
        }
        let rest = expert - in_longer;
        (more + rest / each, rest % each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_expert_is_at_one_rank_and_the_first_ranks_hold_one_more() {
        for experts in [0, 1, 7, 8, 9, 255, 256, 257, 288] {
            for ranks in [1, 2, 3, 7, 8, 72, 300] {
                let spread = Experts::new(experts, ranks);
                let mut next = 0;
                for rank in 0..ranks {
                    let of_rank = spread.of_rank(rank);
                    assert_eq!(of_rank.start, next);
                    next = of_rank.end;
                    assert!(of_rank.len() as u32 <= spread.most());
                    assert!(of_rank.len() as u32 + 1 >= spread.most());
                    if rank > 0 {
                        assert!(of_rank.len() <= spread.of_rank(rank - 1).len());
                    }
                    for (at, expert) in of_rank.enumerate() {
                        assert_eq!(spread.place(expert), (rank, at as u32));
                    }
                }
                assert_eq!(next, experts);
            }
        }
    }
}
