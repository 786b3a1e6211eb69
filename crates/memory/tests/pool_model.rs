//! Long random histories of a pool against a plain model: one state a page, recounted after every step.

use std::collections::HashSet;
use std::sync::Arc;

use crossdock_memory::{
    GrantedPages, PagePool, PageRef, PageSet, PoolError, PoolOptions, QuarantineReason, Until,
};
use proptest::prelude::*;
use proptest::sample::Index;

#[derive(Debug, Clone)]
enum Step {
    Take { pages: u32 },
    Adopt { ids: Vec<u32> },
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

fn step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    // Pages leave the pool somewhat more often than they come back, and abandoning them is rare, so that histories
    // reach an empty pool without staying there.
    prop_oneof![
        8 => (0u32..12).prop_map(|pages| Step::Take { pages }),
        8 => prop::collection::vec(0u32..70, 0..5).prop_map(|ids| Step::Adopt { ids }),
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

/// The model, with what was handed out; each handle beside the pages that it must have.
struct History {
    pool: PagePool,
    allocates: bool,
    options: PoolOptions,
    pages: Vec<Page>,
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
                        self.pages[page as usize] = Page::Quarantined { peer: peer.clone(), since_ns };
                    }
                    self.granted.push((granted, ids));
                }
            }
            Step::ComeHome { granted } => {
                if let Some((granted, ids)) = pick(&mut self.granted, granted) {
                    self.sets.push((granted.come_home(), ids.clone()));
                    for page in ids {
                        self.pages[page as usize] = Page::Owned;
                    }
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
                    for page in ids {
                        self.pages[page as usize] = Page::Abandoned;
                    }
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
        match self.pool.take(pages) {
            Ok(set) => {
                assert_eq!(set.len(), pages as usize);
                let mut runs = self.free_runs();
                runs.sort_unstable();
                let fits = runs.last().is_some_and(|&longest| longest >= pages);
                let breaks = set.ids().windows(2).filter(|pair| pair[0] + 1 != pair[1]).count();
                // With the longest runs first, no choice has fewer breaks.
                let mut needed = 0;
                let mut missing = pages;
                while let Some(longest) = runs.pop().filter(|&longest| longest < missing) {
                    missing -= longest;
                    needed += 1;
                }
                assert!(if fits { breaks == 0 } else { breaks <= needed }, "{breaks} breaks in {set:?}");
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
                self.pages[page as usize] = Page::Free;
            }
        }
    }

    /// Changes the model's state of pages that must all be in `from`: this is what finds a page with two owners.
    fn set(&mut self, ids: &[u32], from: Page, to: Page) {
        for &page in ids {
            assert_eq!(self.pages[page as usize], from, "page {page}");
            self.pages[page as usize] = to.clone();
        }
    }

    fn free(&self) -> u32 {
        self.count(|page| *page == Page::Free)
    }

    fn count(&self, is: impl Fn(&Page) -> bool) -> u32 {
        self.pages.iter().filter(|page| is(page)).count() as u32
    }

    fn free_runs(&self) -> Vec<u32> {
        let states = self.pages.split(|page| *page != Page::Free);
        states.map(|run| run.len() as u32).filter(|&pages| pages > 0).collect()
    }

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

        let free = self.free();
        self.lowest_free = self.lowest_free.min(free);
        if free < self.options.low_watermark {
            self.under_pressure = true;
        } else if free >= self.options.high_watermark {
            self.under_pressure = false;
        }
        let stats = self.pool.stats();
        assert_eq!(stats.free, free);
        assert_eq!(stats.owned, self.count(|page| *page == Page::Owned));
        assert_eq!(stats.granted, self.count(|page| *page == Page::Granted));
        assert_eq!(stats.quarantined, self.count(|page| matches!(page, Page::Quarantined { .. })));
        assert_eq!(stats.abandoned, self.count(|page| *page == Page::Abandoned));
        assert_eq!(stats.shared, self.count(|page| matches!(page, Page::Shared(_))));
        let longest = self.free_runs().into_iter().max().unwrap_or(0);
        assert_eq!(stats.largest_run, if self.allocates { longest } else { 0 });
        assert_eq!((stats.lowest_free, stats.under_pressure), (self.lowest_free, self.under_pressure));
        assert_eq!((stats.takes, stats.failed_takes), (self.takes, self.failed_takes));

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
        steps in prop::collection::vec(step(), 1..400),
    ) {
        let low_watermark = watermarks.0.min(watermarks.1).min(pages);
        let high_watermark = watermarks.0.max(watermarks.1).min(pages);
        let mut history = History::new(pages, allocates, PoolOptions { low_watermark, high_watermark });
        for step in steps {
            history.take(step);
            history.check();
        }

        // When everything that can come back has, only the abandoned pages are missing.
        for (granted, _) in history.granted.drain(..) {
            drop(granted.come_home());
        }
        history.sets.clear();
        history.shared.clear();
        for page in history.pages.iter_mut().filter(|page| **page != Page::Abandoned) {
            *page = Page::Free;
        }
        history.check();
    }
}
