//! The page pool: which pages are free, and what every other page is waiting for.

mod ledger;
mod lengths;
mod quarantine;
mod runs;
mod state;

use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

pub use self::quarantine::{QuarantineEntry, QuarantineReason, Until};
use crate::pages::{PageRef, PageSet};
use ledger::Ledger;

/// Owner of the pages of one region; a clone is another handle.
///
/// Taking and giving back cost constant time a run of pages, plus one word a page, whatever the size of the pool.
/// Everything is behind one lock that is held for that long.
#[derive(Clone)]
pub struct PagePool {
    ledger: Arc<Mutex<Ledger>>,
}

impl PagePool {
    /// A pool that allocates `pages` pages itself: see [`take`](PagePool::take).
    ///
    /// # Panics
    /// When `pages` is more than [`MAX_PAGES`].
    pub fn new(pages: u32, options: PoolOptions) -> PagePool {
        PagePool { ledger: Arc::new(Mutex::new(Ledger::new(pages, options))) }
    }

    /// A pool over `pages` pages that the engine's own allocator hands out: see [`adopt`](PagePool::adopt) and [`lend`](PagePool::lend).
    ///
    /// # Panics
    /// When `pages` is more than [`MAX_PAGES`].
    pub fn external(pages: u32) -> PagePool {
        PagePool { ledger: Arc::new(Mutex::new(Ledger::external(pages))) }
    }

    /// Takes `pages` pages: the smallest free run that is long enough, and when there is none, the longest runs.
    pub fn take(&self, pages: u32) -> Result<PageSet, PoolError> {
        let ids = self.ledger().take(pages)?;
        Ok(PageSet::owned(self.clone(), ids))
    }

    /// Takes exactly these pages, which the engine's allocator chose: all of them or, with an error, none.
    ///
    /// This is where an engine that hands out a page too early is stopped.
    pub fn adopt(&self, ids: &[u32]) -> Result<PageSet, PoolError> {
        self.ledger().adopt(ids)?;
        Ok(PageSet::owned(self.clone(), ids.to_vec()))
    }

    /// References to exactly these pages, which the engine's allocator holds and has filled: all of them or, with an error,
    /// none. Others may have been lent before, of a prefix that several requests share; a page that is named twice is
    /// counted twice. A page that a peer may write is refused.
    ///
    /// ```
    /// # use crossdock_memory::{PagePool, PoolError};
    /// let pool = PagePool::external(8);
    /// let (first, second) = (pool.lend(&[0, 1, 2])?, pool.lend(&[0, 1, 5])?);
    /// assert_eq!(pool.adopt(&[1]).unwrap_err(), PoolError::PageInUse { page: 1 });
    /// drop((first, second));
    /// assert_eq!(pool.stats().free, 8);
    /// # Ok::<(), PoolError>(())
    /// ```
    pub fn lend(&self, ids: &[u32]) -> Result<PageRef, PoolError> {
        self.ledger().lend(ids)?;
        Ok(PageRef::lent(self.clone(), ids))
    }

    /// The counts, all of one moment.
    pub fn stats(&self) -> PoolStats {
        self.ledger().stats()
    }

    /// What is in quarantine and has a peer to wait for, the oldest first.
    pub fn quarantine(&self, now_ns: u64) -> Vec<QuarantineEntry> {
        self.ledger().quarantine_entries(now_ns)
    }

    /// How many pages the pool is over, in whatever state.
    pub fn pages(&self) -> u32 {
        self.ledger().pages()
    }

    /// Whether both are handles to one pool.
    pub fn is_same(&self, other: &PagePool) -> bool {
        Arc::ptr_eq(&self.ledger, &other.ledger)
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock()
    }
}

impl fmt::Debug for PagePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PagePool").field(&self.stats()).finish()
    }
}

/// The most pages that one pool takes.
pub const MAX_PAGES: u32 = 1 << 28;

/// When a pool says that it is under pressure. The default never does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolOptions {
    /// Pressure begins when fewer pages than this are free. More than the pool has counts as all of them.
    pub low_watermark: u32,
    /// Pressure ends when at least so many are free again. Less than `low_watermark` counts as that.
    pub high_watermark: u32,
}

/// The counts of a pool. Every page is in exactly one of `free`, `owned`, `granted`, `quarantined`, `abandoned` and
/// `shared`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// All pages.
    pub pages: u32,
    /// Pages that can be taken, or, in an external pool, adopted or lent.
    pub free: u32,
    /// Pages in a [`PageSet`].
    pub owned: u32,
    /// Pages that a peer may write.
    pub granted: u32,
    /// Pages whose room has ended and that a peer can still write.
    pub quarantined: u32,
    /// Pages that were granted and can never come home, because what held them was dropped.
    pub abandoned: u32,
    /// Pages in one or more [`PageRef`](crate::PageRef)s.
    pub shared: u32,
    /// Length of the longest run of free pages; 0 in an external pool, which does not look for runs.
    pub largest_run: u32,
    /// The fewest pages that were ever free.
    pub lowest_free: u32,
    /// Whether the free pages fell below the low watermark and have not come up to the high one since.
    pub under_pressure: bool,
    /// How often pages were taken, adopted or lent.
    pub takes: u64,
    /// How often they could not be.
    pub failed_takes: u64,
}

/// Why there is no page set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// Too few pages are free: wait for some, or evict.
    #[error("{wanted} pages wanted, {free} free")]
    Exhausted {
        /// How many were wanted.
        wanted: u32,
        /// How many are free.
        free: u32,
    },
    /// A peer can still write the page: choose another until it comes home.
    #[error("page {page} is in quarantine since {since_ns} ns: {peer} can still write it")]
    PageInQuarantine {
        /// The page.
        page: u32,
        /// The peer.
        peer: Arc<str>,
        /// Since when, on the clock of [`GrantedPages::quarantine`](crate::GrantedPages::quarantine).
        since_ns: u64,
    },
    /// What held the page was dropped while a peer could write it: it can never be used again.
    #[error("page {page} was abandoned while a peer could write it")]
    PageAbandoned {
        /// The page.
        page: u32,
    },
    /// The page is owned, granted or shared: the engine's allocator handed it out twice.
    #[error("page {page} is in use")]
    PageInUse {
        /// The page.
        page: u32,
    },
    /// The page is named twice in one call.
    #[error("page {page} is named twice")]
    DuplicatePage {
        /// The page.
        page: u32,
    },
    /// There is no such page.
    #[error("page {page} is not one of {pages} pages")]
    PageOutOfRange {
        /// The page.
        page: u32,
        /// How many there are.
        pages: u32,
    },
    /// `take` was called on an external pool: its pages come from the engine's allocator, by `adopt`.
    #[error("the pages of an external pool are adopted by id, not taken")]
    PoolIsExternal,
    /// `adopt` was called on a pool that allocates: its pages come by `take`.
    #[error("the pages of a pool that allocates are taken, not adopted by id")]
    PoolAllocates,
}
