//! Long random histories of a pool against a plain model: one state a page, recounted after every step.

use std::collections::HashSet;
use std::sync::Arc;

use crossdock_memory::{
    GrantedPages, PagePool, PageRef, PageSet, PoolError, PoolOptions, PoolStats, QuarantineReason, Until,
};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

#[derive(Debug, Clone)]
enum Step {
    Take { pages: u32 },
    Adopt { ids: Vec<u32> },
    Lend { ids: Vec<u32> },
    DropSet { set: Index },
    Split { set: Index, at: Index },
    Join { set: Index, other: Index },
    Share { set: Index },
    Clone { shared: Index },
    Prefix { shared: Index, pages: Index },
    Slice { shared: Index, from: Index, to: Index },
    JoinShared { shared: Index, other: Index },
    Unshare { shared: Index },
    DropShared { shared: Index },
    Grant { set: Index },
    Quarantine { granted: Index, peer: u8 },
    ComeHome { granted: Index },
    Abandon { granted: Index },
}

fn step(most_pages: u32) -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    // Pages leave the pool somewhat more often than they come back, and abandoning them is rare, so that histories
    // reach an empty pool without staying there.
    prop_oneof![
        8 => (0..most_pages).prop_map(|pages| Step::Take { pages }),
        8 => prop::collection::vec(0u32..70, 0..5).prop_map(|ids| Step::Adopt { ids }),
        4 => prop::collection::vec(0u32..66, 0..5).prop_map(|ids| Step::Lend { ids }),
        4 => index().prop_map(|set| Step::DropSet { set }),
        4 => (index(), index()).prop_map(|(set, at)| Step::Split { set, at }),
        3 => (index(), index()).prop_map(|(set, other)| Step::Join { set, other }),
        4 => index().prop_map(|set| Step::Share { set }),
        2 => index().prop_map(|shared| Step::Clone { shared }),
        2 => (index(), index()).prop_map(|(shared, pages)| Step::Prefix { shared, pages }),
        2 => (index(), index(), index()).prop_map(|(shared, from, to)| Step::Slice { shared, from, to }),
        1 => (index(), index()).prop_map(|(shared, other)| Step::JoinShared { shared, other }),
        2 => index().prop_map(|shared| Step::Unshare { shared }),
        6 => index().prop_map(|shared| Step::DropShared { shared }),
        4 => index().prop_map(|set| Step::Grant { set }),
        3 => (index(), any::<u8>()).prop_map(|(granted, peer)| Step::Quarantine { granted, peer }),
        4 => index().prop_map(|granted| Step::ComeHome { granted }),
        1 => index().prop_map(|granted| Step::Abandon { granted }),
    ]
}

#[derive(Debug, Clone, PartialEq)]
enum Page {
    Free,
    Owned,
    Granted,
    Quarantined { peer: Arc<str>, since_ns: u64 },
    Abandoned,
    Shared(u32),
}

impl Page {
    /// Its place among the states, whatever else it says.
    fn state(&self) -> usize {
        match self {
            Page::Free => 0,
            Page::Owned => 1,
            Page::Granted => 2,
            Page::Quarantined { .. } => 3,
            Page::Abandoned => 4,
            Page::Shared(_) => 5,
        }
    }
}

/// The model, with what was handed out; each handle beside the pages that it must have.
struct History {
    pool: PagePool,
    allocates: bool,
    options: PoolOptions,
    pages: Vec<Page>,
    /// How many pages are in each [state](Page::state), counted along.
    in_state: [u32; 6],
    sets: Vec<(PageSet, Vec<u32>)>,
    shared: Vec<(PageRef, Vec<u32>)>,
    granted: Vec<(GrantedPages, Vec<u32>)>,
    /// Of what was abandoned in quarantine: peer, pages, since when.
    abandoned: Vec<(Arc<str>, u32, u64)>,
    lowest_free: u32,
    under_pressure: bool,
    takes: u64,
    failed_takes: u64,
    now_ns: u64,
}

impl History {
    fn new(pages: u32, allocates: bool, options: PoolOptions) -> History {
        History {
            pool: if allocates { PagePool::new(pages, options) } else { PagePool::external(pages) },
            allocates,
            options: if allocates { options } else { PoolOptions::default() },
            pages: vec![Page::Free; pages as usize],
            in_state: [pages, 0, 0, 0, 0, 0],
            sets: Vec::new(),
            shared: Vec::new(),
            granted: Vec::new(),
            abandoned: Vec::new(),
            lowest_free: pages,
            under_pressure: false,
            takes: 0,
            failed_takes: 0,
            now_ns: 0,
        }
    }

    fn take(&mut self, step: Step) {
        self.now_ns += 10;
        match step {
            Step::Take { pages } => self.take_pages(pages),
            Step::Adopt { ids } => self.adopt(ids),
            Step::Lend { ids } => self.lend(ids),
            Step::DropSet { set } => {
                if let Some((set, ids)) = pick(&mut self.sets, set) {
                    drop(set);
                    self.set(&ids, Page::Owned, Page::Free);
                }
            }
            Step::Split { set, at } => {
                if let Some((mut set, mut ids)) = pick(&mut self.sets, set) {
                    let at = at.index(ids.len() + 1);
                    self.sets.push((set.split_off(at), ids.split_off(at)));
                    self.sets.push((set, ids));
                }
            }
            Step::Join { set, other } => {
                if self.sets.len() > 1 {
                    let (mut set, mut ids) = pick(&mut self.sets, set).unwrap();
                    let (other, other_ids) = pick(&mut self.sets, other).unwrap();
                    set.join(other).unwrap();
                    ids.extend(other_ids);
                    self.sets.push((set, ids));
                }
            }
            Step::Share { set } => {
                if let Some((set, ids)) = pick(&mut self.sets, set) {
                    self.shared.push((set.share(), ids.clone()));
                    self.set(&ids, Page::Owned, Page::Shared(1));
                }
            }
            Step::Clone { shared } => self.refer(shared, |shared, ids| (shared.clone(), ids.to_vec())),
            Step::Prefix { shared, pages } => self.refer(shared, |shared, ids| {
                let pages = pages.index(ids.len() + 1);
                (shared.prefix(pages), ids[..pages].to_vec())
            }),
            Step::Slice { shared, from, to } => self.refer(shared, |shared, ids| {
                let (a, b) = (from.index(ids.len() + 1), to.index(ids.len() + 1));
                let range = a.min(b)..a.max(b);
                (shared.slice(range.clone()), ids[range].to_vec())
            }),
            Step::JoinShared { shared, other } => {
                // Joined references double in length when they are cloned and joined again, so they stay short.
                if self.shared.len() > 1 && self.shared.iter().all(|(_, ids)| ids.len() < 100) {
                    let (mut shared, mut ids) = pick(&mut self.shared, shared).unwrap();
                    let (other, other_ids) = pick(&mut self.shared, other).unwrap();
                    shared.join(other).unwrap();
                    ids.extend(other_ids);
                    self.shared.push((shared, ids));
                }
            }
            Step::Unshare { shared } => {
                if let Some((shared, ids)) = pick(&mut self.shared, shared) {
                    let only = ids.iter().all(|&page| self.pages[page as usize] == Page::Shared(1));
                    match shared.try_into_set() {
                        Ok(set) => {
                            assert!(only, "{ids:?} became writable while shared");
                            self.set(&ids, Page::Shared(1), Page::Owned);
                            self.sets.push((set, ids));
                        }
                        Err(shared) => {
                            assert!(!only, "{ids:?} had one reference each");
                            self.shared.push((shared, ids));
                        }
                    }
                }
            }
            Step::DropShared { shared } => {
                if let Some((shared, ids)) = pick(&mut self.shared, shared) {
                    drop(shared);
                    self.count_down(&ids);
                }
            }
            Step::Grant { set } => {
                if let Some((set, ids)) = pick(&mut self.sets, set) {
                    self.granted.push((set.grant(), ids.clone()));
                    self.set(&ids, Page::Owned, Page::Granted);
                }
            }
            Step::Quarantine { granted, peer } => {
                if let Some((mut granted, ids)) = pick(&mut self.granted, granted) {
                    let peer: Arc<str> = format!("peer-{peer}").into();
                    let reason = QuarantineReason { peer: peer.clone(), until: Until::ReleaseOrDeath };
                    granted.quarantine(reason, self.now_ns);
                    let since_ns = match ids.first().map(|&page| &self.pages[page as usize]) {
                        Some(Page::Quarantined { since_ns, .. }) => *since_ns,
                        _ => self.now_ns,
                    };
                    for &page in &ids {
                        self.put(page, Page::Quarantined { peer: peer.clone(), since_ns });
                    }
                    self.granted.push((granted, ids));
                }
            }
            Step::ComeHome { granted } => {
                if let Some((granted, ids)) = pick(&mut self.granted, granted) {
                    self.sets.push((granted.come_home().unwrap(), ids.clone()));
                    ids.into_iter().for_each(|page| self.put(page, Page::Owned));
                }
            }
            Step::Abandon { granted } => {
                if let Some((granted, ids)) = pick(&mut self.granted, granted) {
                    drop(granted);
                    if let Some(Page::Quarantined { peer, since_ns }) =
                        ids.first().map(|&page| &self.pages[page as usize])
                    {
                        self.abandoned.push((peer.clone(), ids.len() as u32, *since_ns));
                    }
                    ids.into_iter().for_each(|page| self.put(page, Page::Abandoned));
                }
            }
        }
    }

    fn take_pages(&mut self, pages: u32) {
        if !self.allocates {
            assert_eq!(self.pool.take(pages).unwrap_err(), PoolError::PoolIsExternal);
            return;
        }
        let free = self.free();
        let largest_run = self.pool.stats().largest_run;
        match self.pool.take(pages) {
            Ok(set) => {
                assert_eq!(set.len(), pages as usize);
                let breaks = set.ids().windows(2).filter(|pair| pair[0] + 1 != pair[1]).count();
                if largest_run >= pages {
                    assert_eq!(breaks, 0, "{set:?} from a run of {largest_run}");
                } else if self.is_small() {
                    // With the longest runs first, no choice has fewer breaks.
                    let mut runs = self.free_runs();
                    runs.sort_unstable();
                    let mut needed = 0;
                    let mut missing = pages;
                    while let Some(longest) = runs.pop().filter(|&longest| longest < missing) {
                        missing -= longest;
                        needed += 1;
                    }
                    assert!(breaks <= needed, "{breaks} breaks in {set:?}");
                }
                let ids = set.ids().to_vec();
                self.set(&ids, Page::Free, Page::Owned);
                self.sets.push((set, ids));
                self.takes += 1;
            }
            Err(error) => {
                assert_eq!(error, PoolError::Exhausted { wanted: pages, free });
                assert!(pages > free);
                self.failed_takes += 1;
            }
        }
    }

    fn adopt(&mut self, ids: Vec<u32>) {
        if self.allocates {
            assert_eq!(self.pool.adopt(&ids).unwrap_err(), PoolError::PoolAllocates);
            return;
        }
        let mut seen = HashSet::new();
        let refusal = ids.iter().find_map(|&page| match self.pages.get(page as usize) {
            None => Some(PoolError::PageOutOfRange { page, pages: self.pages.len() as u32 }),
            Some(Page::Free) => (!seen.insert(page)).then_some(PoolError::DuplicatePage { page }),
            Some(Page::Quarantined { peer, since_ns }) => {
                Some(PoolError::PageInQuarantine { page, peer: peer.clone(), since_ns: *since_ns })
            }
            Some(Page::Abandoned) => Some(PoolError::PageAbandoned { page }),
            Some(Page::Owned | Page::Granted | Page::Shared(_)) => Some(PoolError::PageInUse { page }),
        });
        match self.pool.adopt(&ids) {
            Ok(set) => {
                assert_eq!(refusal, None);
                self.set(&ids, Page::Free, Page::Owned);
                self.sets.push((set, ids));
                self.takes += 1;
            }
            Err(error) => {
                assert_eq!(Some(error), refusal);
                self.failed_takes += 1;
            }
        }
    }

    fn lend(&mut self, ids: Vec<u32>) {
        if self.allocates {
            assert_eq!(self.pool.lend(&ids).unwrap_err(), PoolError::PoolAllocates);
            return;
        }
        let refusal = ids.iter().find_map(|&page| match self.pages.get(page as usize) {
            None => Some(PoolError::PageOutOfRange { page, pages: self.pages.len() as u32 }),
            Some(Page::Free | Page::Shared(_)) => None,
            Some(Page::Quarantined { peer, since_ns }) => {
                Some(PoolError::PageInQuarantine { page, peer: peer.clone(), since_ns: *since_ns })
            }
            Some(Page::Abandoned) => Some(PoolError::PageAbandoned { page }),
            Some(Page::Owned | Page::Granted) => Some(PoolError::PageInUse { page }),
        });
        match self.pool.lend(&ids) {
            Ok(shared) => {
                assert_eq!((refusal, shared.ids()), (None, &ids[..]));
                for &page in &ids {
                    let references = match self.pages[page as usize] {
                        Page::Shared(references) => references,
                        _ => 0,
                    };
                    self.put(page, Page::Shared(references + 1));
                }
                self.shared.push((shared, ids));
                self.takes += 1;
            }
            Err(error) => {
                assert_eq!(Some(error), refusal);
                self.failed_takes += 1;
            }
        }
    }

    /// Makes another reference out of one that there is.
    fn refer(&mut self, which: Index, make: impl FnOnce(&PageRef, &[u32]) -> (PageRef, Vec<u32>)) {
        if self.shared.is_empty() {
            return;
        }
        let (shared, ids) = which.get(&self.shared);
        let (new, new_ids) = make(shared, ids);
        for &page in &new_ids {
            let Page::Shared(references) = &mut self.pages[page as usize] else {
                panic!("page {page} is referenced and not shared");
            };
            *references += 1;
        }
        self.shared.push((new, new_ids));
    }

    fn count_down(&mut self, ids: &[u32]) {
        for &page in ids {
            let Page::Shared(references) = &mut self.pages[page as usize] else {
                panic!("page {page} is referenced and not shared");
            };
            *references -= 1;
            if *references == 0 {
                self.put(page, Page::Free);
            }
        }
    }

    /// Changes the model's state of pages that must all be in `from`: this is what finds a page with two owners.
    fn set(&mut self, ids: &[u32], from: Page, to: Page) {
        for &page in ids {
            assert_eq!(self.pages[page as usize], from, "page {page}");
            self.put(page, to.clone());
        }
    }

    fn put(&mut self, page: u32, to: Page) {
        let at = &mut self.pages[page as usize];
        self.in_state[at.state()] -= 1;
        self.in_state[to.state()] += 1;
        *at = to;
    }

    fn free(&self) -> u32 {
        self.in_state[Page::Free.state()]
    }

    /// Whether everything can be recounted after every step.
    fn is_small(&self) -> bool {
        self.pages.len() <= 64
    }

    fn free_runs(&self) -> Vec<u32> {
        let states = self.pages.split(|page| *page != Page::Free);
        states.map(|run| run.len() as u32).filter(|&pages| pages > 0).collect()
    }

    /// Everything that was handed out, every page, and every figure.
    fn check(&mut self) {
        for (set, ids) in &self.sets {
            assert_eq!(set.ids(), ids);
        }
        for (shared, ids) in &self.shared {
            assert_eq!(shared.ids(), ids);
        }
        for (granted, ids) in &self.granted {
            assert_eq!(granted.ids(), ids);
        }
        let mut recounted = [0; 6];
        self.pages.iter().for_each(|page| recounted[page.state()] += 1);
        assert_eq!(self.in_state, recounted, "the model has lost count");
        self.check_figures();
        let longest = self.free_runs().into_iter().max().unwrap_or(0);
        let largest_run = self.pool.stats().largest_run;
        assert_eq!(largest_run, if self.allocates { longest } else { 0 });
        self.check_quarantine();
    }

    /// The figures that cost nothing to compare.
    fn check_figures(&mut self) {
        let free = self.free();
        self.lowest_free = self.lowest_free.min(free);
        if free < self.options.low_watermark {
            self.under_pressure = true;
        } else if free >= self.options.high_watermark {
            self.under_pressure = false;
        }
        let stats = self.pool.stats();
        let PoolStats { free, owned, granted, quarantined, abandoned, shared, .. } = stats;
        assert_eq!([free, owned, granted, quarantined, abandoned, shared], self.in_state);
        assert_eq!((stats.lowest_free, stats.under_pressure), (self.lowest_free, self.under_pressure));
        assert_eq!((stats.takes, stats.failed_takes), (self.takes, self.failed_takes));
    }

    fn check_quarantine(&self) {
        let mut expected: Vec<(Arc<str>, u32, u64, bool)> = self
            .abandoned
            .iter()
            .map(|(peer, pages, since_ns)| (peer.clone(), *pages, *since_ns, true))
            .collect();
        for (granted, ids) in &self.granted {
            let page = ids.first().map(|&page| &self.pages[page as usize]);
            assert_eq!(granted.is_quarantined(), matches!(page, Some(Page::Quarantined { .. })));
            if let Some(Page::Quarantined { peer, since_ns }) = page {
                expected.push((peer.clone(), ids.len() as u32, *since_ns, false));
            }
        }
        expected.sort_by_key(|(_, _, since_ns, _)| *since_ns);
        let listed = self.pool.quarantine(self.now_ns);
        assert!(listed.iter().all(|entry| entry.age_ns == self.now_ns - entry.since_ns));
        let listed: Vec<_> = listed
            .into_iter()
            .map(|entry| (entry.peer, entry.pages, entry.since_ns, entry.abandoned))
            .collect();
        assert_eq!(listed, expected);
    }

    /// When everything that can come back has, only the abandoned pages are missing.
    fn end(&mut self) {
        for (granted, _) in self.granted.drain(..) {
            drop(granted.come_home());
        }
        self.sets.clear();
        self.shared.clear();
        for page in 0..self.pages.len() {
            if self.pages[page] != Page::Abandoned {
                self.put(page as u32, Page::Free);
            }
        }
        self.check();
    }
}

fn pick<T>(from: &mut Vec<T>, which: Index) -> Option<T> {
    (!from.is_empty()).then(|| from.swap_remove(which.index(from.len())))
}

proptest! {
    #[test]
    fn every_history_agrees_with_the_model(
        pages in 1u32..65,
        allocates in any::<bool>(),
        watermarks in (0u32..65, 0u32..65),
        steps in prop::collection::vec(step(12), 1..400),
    ) {
        let low_watermark = watermarks.0.min(watermarks.1).min(pages);
        let high_watermark = watermarks.0.max(watermarks.1).min(pages);
        let mut history = History::new(pages, allocates, PoolOptions { low_watermark, high_watermark });
        for step in steps {
            history.take(step);
            history.check();
        }

        history.end();
    }
}

/// One history as long and as wide as a large worker's: a million pages, 100,000 steps. The figures are compared
/// after each, and everything that was handed out after every 10,000. `CROSSDOCK_POOL_SEED=S` is another one.
#[test]
fn a_long_history_of_a_million_pages_agrees_with_the_model() {
    const PAGES: u32 = 1_000_000;
    const STEPS: u32 = 100_000;
    let seed = std::env::var("CROSSDOCK_POOL_SEED").map_or(1, |text| text.parse::<u64>().expect("a number"));
    println!("CROSSDOCK_POOL_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let chance = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), chance);
    let options = PoolOptions { low_watermark: PAGES / 10, high_watermark: PAGES / 5 };
    let mut history = History::new(PAGES, true, options);
    let steps = step(1_200);
    let (mut ebbs, mut is_ebb) = (0, false);
    for at in 1..=STEPS {
        let step = steps.new_tree(&mut runner).expect("every step is allowed").current();
        // Left alone, a pool of so many steps fills with shared and abandoned pages and stays so.
        let step = match step {
            Step::Abandon { granted } if at % 64 > 0 => Step::ComeHome { granted },
            Step::Share { set } | Step::Split { set, .. } if is_ebb => Step::DropSet { set },
            Step::Clone { shared } | Step::Prefix { shared, .. } | Step::Slice { shared, .. } if is_ebb => {
                Step::DropShared { shared }
            }
            Step::Take { pages } if is_ebb => Step::Take { pages: pages / 16 },
            step => step,
        };
        let failed_takes = history.failed_takes;
        history.take(step);
        history.check_figures();
        if !is_ebb && history.failed_takes > failed_takes {
            (ebbs, is_ebb) = (ebbs + 1, true);
        }
        is_ebb &= history.free() < PAGES / 2;
        if at % (STEPS / 10) == 0 {
            history.check();
        }
    }
    println!("the pool was empty {ebbs} times: {:?}", history.pool.stats());
    assert!(ebbs >= 3, "empty and half full {ebbs} times");
    history.end();
}
