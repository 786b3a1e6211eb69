//! The free pages, as runs.

use super::lengths::Lengths;

/// Pages that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u32,
    pub(super) pages: u32,
}

/// A segregated fit with one list for each length and an index of the lengths that exist.
///
/// Both ends of a free run carry its length (boundary tags), so a run that comes back finds its neighbours at once.
/// An exact list a length, instead of a class of similar ones, costs one word a page and makes best fit and the
/// longest run exact, with no list to search.
pub(super) struct FreeRuns {
    pages: Box<[Page]>,
    /// For each length: the first page of the first free run of that length.
    heads: Box<[u32]>,
    lengths: Lengths,
}

/// What is known of a page, in one place: a run that comes back costs few cache misses.
#[derive(Debug, Clone, Copy)]
struct Page {
    /// Length of the free run that the page begins or ends, else 0.
    tag: u32,
    /// When it begins one, the run before it in the list of that length.
    before: u32,
    /// When it begins one, the run after it.
    after: u32,
}

impl FreeRuns {
    /// All of `pages` free, in one run.
    pub(super) fn new(pages: u32) -> FreeRuns {
        let page = Page { tag: 0, before: NONE, after: NONE };
        let mut runs = FreeRuns {
            pages: vec![page; pages as usize].into(),
            heads: vec![NONE; pages as usize + 1].into(),
            lengths: Lengths::new(pages),
        };
        if pages > 0 {
            runs.insert(Run { first: 0, pages });
        }
        runs
    }

    /// Length of the longest run, 0 when nothing is free.
    pub(super) fn largest(&self) -> u32 {
        self.lengths.largest().unwrap_or(0)
    }

    /// Takes one run of at most `wanted` pages: the start of the shortest run that is long enough, else the whole
    /// of the longest. `None` when nothing is free.
    pub(super) fn take(&mut self, wanted: u32) -> Option<Run> {
        let length = self.lengths.at_least(wanted).or_else(|| self.lengths.largest())?;
        let run = Run { first: self.heads[length as usize], pages: length };
        self.remove(run);
        if length <= wanted {
            return Some(run);
        }
        self.insert(Run { first: run.first + wanted, pages: length - wanted });
        Some(Run { first: run.first, pages: wanted })
    }

    /// Gives a run back and joins it with the free runs on both sides.
    pub(super) fn put(&mut self, run: Run) {
        let mut joined = run;
        // The pages beside the run carry a tag only if they end, or begin, a free run: inside one there are none.
        let before = run.first.checked_sub(1).map_or(0, |page| self.pages[page as usize].tag);
        if before > 0 {
            joined = Run { first: run.first - before, pages: run.pages + before };
            self.remove(Run { first: joined.first, pages: before });
        }
        let next = run.first + run.pages;
        let after = self.pages.get(next as usize).map_or(0, |page| page.tag);
        if after > 0 {
            joined.pages += after;
            self.remove(Run { first: next, pages: after });
        }
        self.insert(joined);
    }

    fn insert(&mut self, run: Run) {
        let head = self.heads[run.pages as usize];
        self.pages[run.last() as usize].tag = run.pages;
        self.pages[run.first as usize] = Page { tag: run.pages, before: NONE, after: head };
        self.heads[run.pages as usize] = run.first;
        if head == NONE {
            self.lengths.insert(run.pages);
        } else {
            self.pages[head as usize].before = run.first;
        }
    }

    fn remove(&mut self, run: Run) {
        self.pages[run.last() as usize].tag = 0;
        let Page { before, after, .. } = self.pages[run.first as usize];
        self.pages[run.first as usize].tag = 0;
        if after != NONE {
            self.pages[after as usize].before = before;
        }
        if before != NONE {
            self.pages[before as usize].after = after;
        } else {
            self.heads[run.pages as usize] = after;
            if after == NONE {
                self.lengths.remove(run.pages);
            }
        }
    }
}

impl Run {
    fn last(self) -> u32 {
        self.first + self.pages - 1
    }
}

/// No page.
const NONE: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The free runs of a plain map of free pages.
    fn runs_of(free: &[bool]) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (page, _) in free.iter().enumerate().filter(|(_, free)| **free) {
            match runs.last_mut() {
                Some(run) if run.first + run.pages == page as u32 => run.pages += 1,
                _ => runs.push(Run { first: page as u32, pages: 1 }),
            }
        }
        runs
    }

    /// The free runs as the lists have them, in order, after a look at tags and links.
    fn runs_in(runs: &FreeRuns) -> Vec<Run> {
        let mut found = Vec::new();
        let mut tagged = vec![0; runs.pages.len()];
        for length in 1..runs.heads.len() as u32 {
            let (mut before, mut at) = (NONE, runs.heads[length as usize]);
            assert_eq!(at != NONE, runs.lengths.at_least(length) == Some(length), "index of length {length}");
            while at != NONE {
                assert_eq!(runs.pages[at as usize].before, before);
                tagged[at as usize] = length;
                tagged[(at + length - 1) as usize] = length;
                found.push(Run { first: at, pages: length });
                (before, at) = (at, runs.pages[at as usize].after);
            }
        }
        let tags: Vec<u32> = runs.pages.iter().map(|page| page.tag).collect();
        assert_eq!(tags, tagged, "tags lie at the ends of free runs and nowhere else");
        found.sort_by_key(|run| run.first);
        found
    }

    #[test]
    fn the_shortest_run_that_is_long_enough_is_cut_and_else_the_longest_taken() {
        let mut runs = FreeRuns::new(100);
        assert_eq!(runs.take(100), Some(Run { first: 0, pages: 100 }));
        assert_eq!(runs.take(1), None);
        for run in [Run { first: 0, pages: 10 }, Run { first: 20, pages: 30 }, Run { first: 60, pages: 12 }] {
            runs.put(run);
        }
        assert_eq!(runs.take(11), Some(Run { first: 60, pages: 11 }));
        assert_eq!(runs.take(31), Some(Run { first: 20, pages: 30 }));
        assert_eq!(runs.largest(), 10);
        runs.put(Run { first: 10, pages: 61 });
        assert_eq!(runs_in(&runs), [Run { first: 0, pages: 72 }]);
    }

    proptest! {
        #[test]
        fn runs_are_always_joined_and_the_fit_is_the_best(
            pages in 1u32..80,
            steps in prop::collection::vec((any::<bool>(), 1u32..40, any::<prop::sample::Index>()), 1..120),
        ) {
            let mut runs = FreeRuns::new(pages);
            let mut free = vec![true; pages as usize];
            let mut taken: Vec<Run> = Vec::new();
            for (take, wanted, which) in steps {
                if take || taken.is_empty() {
                    let before = runs_of(&free);
                    let fit = before.iter().map(|run| run.pages).filter(|&pages| pages >= wanted).min();
                    let longest = before.iter().map(|run| run.pages).max();
                    let run = runs.take(wanted);
                    prop_assert_eq!(run.map(|run| run.pages), longest.map(|longest| longest.min(wanted)));
                    if let Some(run) = run {
                        let home = before.iter().find(|home| home.first == run.first).copied();
                        prop_assert_eq!(home.map(|home| home.pages), fit.or(longest));
                        free[run.first as usize..][..run.pages as usize].fill(false);
                        taken.push(run);
                    }
                } else {
                    let run = taken.swap_remove(which.index(taken.len()));
                    // Part of a run can come back before the rest of it.
                    let part = Run { first: run.first, pages: wanted.min(run.pages) };
                    if part.pages < run.pages {
                        taken.push(Run { first: run.first + part.pages, pages: run.pages - part.pages });
                    }
                    free[part.first as usize..][..part.pages as usize].fill(true);
                    runs.put(part);
                }
                prop_assert_eq!(runs_in(&runs), runs_of(&free));
                prop_assert_eq!(runs.largest(), runs_of(&free).iter().map(|run| run.pages).max().unwrap_or(0));
            }
        }
    }
}
