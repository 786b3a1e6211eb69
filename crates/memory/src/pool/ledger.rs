//! What the pool's lock protects: the state of every page, and the steps from one state to the next.
//!
//! Each step asserts the state that it starts from. The types of `pages` make a wrong one impossible; should that
//! ever break, the program stops here, before a page that a peer can write is handed out.

use super::quarantine::Entries;
use super::runs::{FreeRuns, Run};
use super::state::{PageState, StateWord};
use super::{MAX_PAGES, PoolError, PoolOptions, PoolStats, QuarantineEntry, QuarantineReason};

pub(crate) struct Ledger {
    states: Box<[StateWord]>,
    /// `None` in an external pool: the engine's allocator knows what is free.
    runs: Option<FreeRuns>,
    entries: Entries,
    free: u32,
    owned: u32,
    granted: u32,
    quarantined: u32,
    abandoned: u32,
    shared: u32,
    lowest_free: u32,
    watermarks: PoolOptions,
    under_pressure: bool,
    takes: u64,
    failed_takes: u64,
}

impl Ledger {
    pub(super) fn new(pages: u32, options: PoolOptions) -> Ledger {
        let low_watermark = options.low_watermark.min(pages);
        let high_watermark = options.high_watermark.clamp(low_watermark, pages);
        Ledger {
            runs: Some(FreeRuns::new(pages)),
            watermarks: PoolOptions { low_watermark, high_watermark },
            ..Ledger::external(pages)
        }
    }

    pub(super) fn external(pages: u32) -> Ledger {
        assert!(pages <= MAX_PAGES, "a pool of {pages} pages is larger than {MAX_PAGES}");
        Ledger {
            states: vec![StateWord::FREE; pages as usize].into(),
            runs: None,
            entries: Entries::default(),
            free: pages,
            owned: 0,
            granted: 0,
            quarantined: 0,
            abandoned: 0,
            shared: 0,
            lowest_free: pages,
            watermarks: PoolOptions::default(),
            under_pressure: false,
            takes: 0,
            failed_takes: 0,
        }
    }

    /// Free to owned, wherever there is room.
    pub(super) fn take(&mut self, wanted: u32) -> Result<Vec<u32>, PoolError> {
        let Some(runs) = &mut self.runs else {
            return Err(PoolError::PoolIsExternal);
        };
        if wanted > self.free {
            self.failed_takes += 1;
            return Err(PoolError::Exhausted { wanted, free: self.free });
        }
        let mut ids = Vec::with_capacity(wanted as usize);
        while let missing @ 1.. = wanted - ids.len() as u32 {
            let run = runs.take(missing).expect("every free page is in a run");
            ids.extend(run.first..run.first + run.pages);
        }
        self.change(&ids, StateWord::FREE, StateWord::OWNED);
        self.taken(wanted);
        Ok(ids)
    }

    /// Free to owned, exactly these pages or none.
    pub(super) fn adopt(&mut self, ids: &[u32]) -> Result<(), PoolError> {
        if self.runs.is_some() {
            return Err(PoolError::PoolAllocates);
        }
        for (at, &page) in ids.iter().enumerate() {
            match self.states.get_mut(page as usize) {
                Some(word) if *word == StateWord::FREE => *word = StateWord::OWNED,
                _ => {
                    let (adopted, _) = ids.split_at(at);
                    self.change(adopted, StateWord::OWNED, StateWord::FREE);
                    self.failed_takes += 1;
                    return Err(self.refusal(page));
                }
            }
        }
        self.taken(ids.len() as u32);
        Ok(())
    }

    /// Free to shared, or one reference more: exactly these pages or none.
    pub(super) fn lend(&mut self, ids: &[u32]) -> Result<(), PoolError> {
        if self.runs.is_some() {
            return Err(PoolError::PoolAllocates);
        }
        for (at, &page) in ids.iter().enumerate() {
            match self.states.get(page as usize).map(|word| word.state()) {
                Some(PageState::Free) => {
                    self.states[page as usize] = StateWord::shared(1);
                    self.free -= 1;
                    self.shared += 1;
                }
                Some(PageState::Shared { references }) => {
                    self.states[page as usize] = StateWord::shared(references + 1);
                }
                _ => {
                    self.drop_references(&ids[..at]);
                    self.failed_takes += 1;
                    return Err(self.refusal(page));
                }
            }
        }
        self.takes += 1;
        self.lowest_free = self.lowest_free.min(self.free);
        Ok(())
    }

    /// Owned to free.
    pub(crate) fn put(&mut self, ids: &[u32]) {
        self.owned -= ids.len() as u32;
        let mut freed = Freed::default();
        for &page in ids {
            self.expect(page, StateWord::OWNED);
            self.free_page(page, &mut freed);
        }
        self.freed(freed);
    }

    /// Owned to granted.
    pub(crate) fn grant(&mut self, ids: &[u32]) {
        self.change(ids, StateWord::OWNED, StateWord::GRANTED);
        self.owned -= ids.len() as u32;
        self.granted += ids.len() as u32;
    }

    /// Granted to quarantined; an entry that is open already gets another reason. Gives the entry's number.
    pub(crate) fn quarantine(
        &mut self,
        ids: &[u32],
        entry: Option<u32>,
        reason: QuarantineReason,
        now_ns: u64,
    ) -> u32 {
        if let Some(entry) = entry {
            self.entries.replace_reason(entry, reason);
            return entry;
        }
        let entry = self.entries.open(reason, ids.len() as u32, now_ns);
        self.change(ids, StateWord::GRANTED, StateWord::quarantined(entry));
        self.granted -= ids.len() as u32;
        self.quarantined += ids.len() as u32;
        entry
    }

    /// Granted or quarantined to owned.
    pub(crate) fn come_home(&mut self, ids: &[u32], entry: Option<u32>) {
        self.leave_grant(ids, entry, StateWord::OWNED);
        self.owned += ids.len() as u32;
        if let Some(entry) = entry {
            self.entries.close(entry);
        }
    }

    /// Granted or quarantined to abandoned, for ever.
    pub(crate) fn abandon(&mut self, ids: &[u32], entry: Option<u32>) {
        self.leave_grant(ids, entry, StateWord::ABANDONED);
        self.abandoned += ids.len() as u32;
        if let Some(entry) = entry {
            self.entries.abandon(entry);
        }
    }

    /// Owned to shared, with one reference.
    pub(crate) fn share(&mut self, ids: &[u32]) {
        self.change(ids, StateWord::OWNED, StateWord::shared(1));
        self.owned -= ids.len() as u32;
        self.shared += ids.len() as u32;
    }

    /// One more reference to each page.
    pub(crate) fn add_references(&mut self, ids: &[u32]) {
        for &page in ids {
            let references = self.references(page);
            self.states[page as usize] = StateWord::shared(references + 1);
        }
    }

    /// One reference less to each page; what has none left is free.
    pub(crate) fn drop_references(&mut self, ids: &[u32]) {
        let mut freed = Freed::default();
        for &page in ids {
            match self.references(page) {
                1 => self.free_page(page, &mut freed),
                references => self.states[page as usize] = StateWord::shared(references - 1),
            }
        }
        self.shared -= freed.pages;
        self.freed(freed);
    }

    /// Shared to owned, when each page has one reference; else nothing changes.
    pub(crate) fn unshare(&mut self, ids: &[u32]) -> bool {
        let only = ids.iter().all(|&page| self.references(page) == 1);
        if only {
            self.change(ids, StateWord::shared(1), StateWord::OWNED);
            self.shared -= ids.len() as u32;
            self.owned += ids.len() as u32;
        }
        only
    }

    pub(super) fn pages(&self) -> u32 {
        self.states.len() as u32
    }

    pub(super) fn stats(&self) -> PoolStats {
        PoolStats {
            pages: self.pages(),
            free: self.free,
            owned: self.owned,
            granted: self.granted,
            quarantined: self.quarantined,
            abandoned: self.abandoned,
            shared: self.shared,
            largest_run: self.runs.as_ref().map_or(0, FreeRuns::largest),
            lowest_free: self.lowest_free,
            under_pressure: self.under_pressure,
            takes: self.takes,
            failed_takes: self.failed_takes,
        }
    }

    pub(super) fn quarantine_entries(&self, now_ns: u64) -> Vec<QuarantineEntry> {
        self.entries.list(now_ns)
    }

    /// Why this page cannot be adopted; nothing of the failed call is adopted any more.
    fn refusal(&self, page: u32) -> PoolError {
        let Some(word) = self.states.get(page as usize) else {
            return PoolError::PageOutOfRange { page, pages: self.pages() };
        };
        match word.state() {
            // Only this call itself can have had it.
            PageState::Free => PoolError::DuplicatePage { page },
            PageState::Owned | PageState::Granted | PageState::Shared { .. } => PoolError::PageInUse { page },
            PageState::Abandoned => PoolError::PageAbandoned { page },
            PageState::Quarantined { entry } => {
                let entry = self.entries.at(entry);
                PoolError::PageInQuarantine {
                    page,
                    peer: entry.reason.peer.clone(),
                    since_ns: entry.since_ns,
                }
            }
        }
    }

    fn leave_grant(&mut self, ids: &[u32], entry: Option<u32>, to: StateWord) {
        match entry {
            Some(entry) => {
                self.change(ids, StateWord::quarantined(entry), to);
                self.quarantined -= ids.len() as u32;
            }
            None => {
                self.change(ids, StateWord::GRANTED, to);
                self.granted -= ids.len() as u32;
            }
        }
    }

    fn taken(&mut self, pages: u32) {
        self.free -= pages;
        self.owned += pages;
        self.takes += 1;
        self.lowest_free = self.lowest_free.min(self.free);
        self.under_pressure |= self.free < self.watermarks.low_watermark;
    }

    fn change(&mut self, ids: &[u32], from: StateWord, to: StateWord) {
        for &page in ids {
            self.expect(page, from);
            self.states[page as usize] = to;
        }
    }

    #[inline]
    fn expect(&self, page: u32, state: StateWord) {
        assert_eq!(self.states[page as usize], state, "state of page {page}");
    }

    #[inline]
    fn references(&self, page: u32) -> u32 {
        match self.states[page as usize].state() {
            PageState::Shared { references } => references,
            other => panic!("page {page} is referenced and {other:?}"),
        }
    }

    /// Marks one page free and gathers it with those just before it, so that a run goes back in one step.
    #[inline]
    fn free_page(&mut self, page: u32, freed: &mut Freed) {
        self.states[page as usize] = StateWord::FREE;
        freed.pages += 1;
        match &mut freed.run {
            Some(run) if run.first + run.pages == page => run.pages += 1,
            run => {
                if let (Some(runs), Some(run)) = (&mut self.runs, run.replace(Run { first: page, pages: 1 }))
                {
                    runs.put(run);
                }
            }
        }
    }

    fn freed(&mut self, freed: Freed) {
        if let (Some(runs), Some(run)) = (&mut self.runs, freed.run) {
            runs.put(run);
        }
        self.free += freed.pages;
        self.under_pressure &= self.free < self.watermarks.high_watermark;
    }
}

/// Pages on their way back.
#[derive(Default)]
struct Freed {
    pages: u32,
    /// The latest of them, not yet in the pool.
    run: Option<Run>,
}
