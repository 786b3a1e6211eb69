//! One worker's side of a replay: requests wait for pages, use them, and leave their prefixes behind.

use std::collections::{BTreeMap, VecDeque};
use std::mem;

use crossdock_memory::{PagePool, PageSet, PoolOptions};
use serde::{Deserialize, Serialize};

use crate::{Block, Lease, PrefixCache};

/// Requests that wait for pages of one pool, in the order in which they came, and those that have some.
///
/// Both workers of a hand-over admit their requests in the same order, each with a dock. So the oldest request that is
/// not over has its pages at both ends, or is the next to get them, and no two requests can wait for each other.
#[derive(Debug)]
pub struct Dock<T> {
    cache: PrefixCache,
    waiting: VecDeque<Waiting<T>>,
    limit: usize,
    /// Leases of requests that are decoded, by when they end.
    decoding: BTreeMap<(u64, u64), Lease>,
    decoded: u64,
    seen_ns: Option<u64>,
    stats: DockStats,
}

/// A request that comes to a dock.
#[derive(Debug)]
pub struct Waiting<T> {
    /// Whatever tells the caller which one it is.
    pub tag: T,
    /// How many pages hold it.
    pub pages: u32,
    /// Those that it may share: its first ones.
    pub blocks: Vec<Block>,
    /// When it arrived.
    pub at_ns: u64,
    /// When it waits no longer.
    pub until_ns: u64,
}

/// What happens next at a dock.
#[derive(Debug)]
pub enum Next<T> {
    /// A request has its pages.
    Admitted(Admitted<T>),
    /// A request has waited until its deadline.
    Expired {
        /// Which one.
        tag: T,
        /// How many pages it still needed.
        wanted: u32,
        /// How many were free.
        free: u32,
    },
}

/// A request that has its pages.
#[derive(Debug)]
pub struct Admitted<T> {
    /// Which one.
    pub tag: T,
    /// What it uses, as of now its held prefix.
    pub lease: Lease,
    /// Pages for everything after that.
    pub pages: PageSet,
    /// How long it has waited.
    pub waited_ns: u64,
}

/// Why a request does not even wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArriveError {
    /// The queue is full.
    #[error("refused: {limit} requests wait for pages already")]
    Full {
        /// How many may wait.
        limit: usize,
    },
    /// It needs more pages than there are.
    #[error("refused: {pages} pages wanted, the pool has {pool_pages}")]
    TooLong {
        /// So many it needs.
        pages: u32,
        /// So many there are.
        pool_pages: u32,
    },
}

/// What a dock has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DockStats {
    /// Pages of its pool.
    pub pages: u32,
    /// The most pages that requests used at once. Pages that are merely kept for others do not count.
    pub peak_pages: u32,
    /// The fewest pages that were free.
    pub lowest_free: u32,
    /// Pages that made room for others.
    pub evicted_pages: u64,
    /// How long the pool was under pressure, although all that was idle was evicted: the free pages fell below the low
    /// watermark, and were not yet up to the high one.
    pub pressure_ns: u64,
    /// The most requests that waited at once.
    pub peak_waiting: usize,
    /// Requests that got their pages.
    pub admitted: u64,
    /// Requests that did not, by their deadline.
    pub expired: u64,
    /// Requests that could not even wait.
    pub refused: u64,
}

/// Watermarks for a pool that keeps prefixes: pressure begins with less than a twentieth free, and ends with a tenth.
pub fn watermarks(pages: u32) -> PoolOptions {
    PoolOptions { low_watermark: pages / 20, high_watermark: pages / 10 }
}

impl<T> Dock<T> {
    /// A dock over the pages of a pool, in which so many requests may wait.
    pub fn new(pool: PagePool, limit: usize) -> Self {
        let stats = DockStats { pages: pool.pages(), ..DockStats::default() };
        Self {
            cache: PrefixCache::new(pool),
            waiting: VecDeque::new(),
            limit,
            decoding: BTreeMap::new(),
            decoded: 0,
            seen_ns: None,
            stats,
        }
    }

    /// Lets a request wait. [`next`](Dock::next) tells when it has its pages; that may be at once.
    pub fn arrive(&mut self, request: Waiting<T>) -> Result<(), ArriveError> {
        let pool_pages = self.stats.pages;
        let error = match (request.pages > pool_pages, self.waiting.len() >= self.limit) {
            (true, _) => ArriveError::TooLong { pages: request.pages, pool_pages },
            (false, true) => ArriveError::Full { limit: self.limit },
            (false, false) => {
                self.waiting.push_back(request);
                self.stats.peak_waiting = self.stats.peak_waiting.max(self.waiting.len());
                return Ok(());
            }
        };
        self.stats.refused += 1;
        Err(error)
    }

    /// What happens by now, one thing a call; `None` if that is nothing (more). Ask again when pages have come home, and
    /// at [`wake_ns`](Dock::wake_ns).
    pub fn next(&mut self, now_ns: u64) -> Option<Next<T>> {
        if let Some(expired) = self.expired(now_ns) {
            return Some(expired);
        }
        self.admit(now_ns).map(Next::Admitted)
    }

    /// As [`next`](Dock::next), but no request gets its pages: for a worker that cannot take one.
    pub fn expired(&mut self, now_ns: u64) -> Option<Next<T>> {
        self.count_pressure(now_ns);
        self.end_decoding(now_ns);
        let at = self.waiting.iter().position(|request| request.until_ns <= now_ns)?;
        let request = self.waiting.remove(at)?;
        self.stats.expired += 1;
        let free = self.cache.pool().stats().free;
        Some(Next::Expired { tag: request.tag, wanted: request.pages, free })
    }

    /// Keeps the pages of a request: see [`PrefixCache::keep`].
    pub fn keep(&mut self, lease: &mut Lease, pages: PageSet, now_ns: u64) {
        self.count_pressure(now_ns);
        self.cache.keep(lease, pages);
        self.cache.relieve();
    }

    /// A request is over.
    pub fn release(&mut self, lease: Lease, now_ns: u64) {
        self.count_pressure(now_ns);
        self.cache.release(lease);
        self.cache.relieve();
    }

    /// A request is decoded until then, and then over.
    pub fn release_at(&mut self, lease: Lease, end_ns: u64) {
        self.decoded += 1;
        self.decoding.insert((end_ns, self.decoded), lease);
    }

    /// Until when nothing happens by itself; `None` if nothing does.
    pub fn wake_ns(&self) -> Option<u64> {
        let ends = self.decoding.first_key_value().map(|((end_ns, _), _)| *end_ns);
        ends.into_iter().chain(self.waiting.iter().map(|request| request.until_ns)).min()
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// What this worker holds.
    pub fn cache(&self) -> &PrefixCache {
        &self.cache
    }

    /// What there was so far.
    pub fn stats(&self) -> DockStats {
        let lowest_free = self.cache.pool().stats().lowest_free;
        DockStats { lowest_free, evicted_pages: self.cache.evicted_pages(), ..self.stats.clone() }
    }

    /// Ends decoding, and gives all pages back that nobody uses.
    pub fn clear(&mut self) {
        for lease in mem::take(&mut self.decoding).into_values() {
            self.cache.release(lease);
        }
        self.cache.clear();
    }

    fn admit(&mut self, now_ns: u64) -> Option<Admitted<T>> {
        let request = self.waiting.front()?;
        let lease = self.cache.lease(&request.blocks);
        let missing = request.pages - lease.held_pages();
        // What would not be enough is not evicted.
        let reachable = self.cache.pool().stats().free + self.cache.idle_pages();
        let pages = match reachable >= missing && self.cache.make_room(missing) {
            true => self.cache.pool().take(missing).ok(),
            false => None,
        };
        let Some(pages) = pages else {
            self.cache.release(lease);
            return None;
        };
        self.cache.relieve();
        let request = self.waiting.pop_front()?;
        self.stats.admitted += 1;
        self.stats.peak_pages = self.stats.peak_pages.max(self.used_pages());
        let waited_ns = now_ns.saturating_sub(request.at_ns);
        Some(Admitted { tag: request.tag, lease, pages, waited_ns })
    }

    fn used_pages(&self) -> u32 {
        let free = self.cache.pool().stats().free;
        self.stats.pages - free - self.cache.idle_pages()
    }

    fn end_decoding(&mut self, now_ns: u64) {
        while let Some(entry) = self.decoding.first_entry()
            && entry.key().0 <= now_ns
        {
            let lease = entry.remove();
            self.release(lease, now_ns);
        }
    }

    /// To be called before anything changes: what is seen now has been so since the last time.
    fn count_pressure(&mut self, now_ns: u64) {
        let seen_ns = self.seen_ns.unwrap_or(now_ns);
        if self.cache.pool().stats().under_pressure {
            self.stats.pressure_ns += now_ns.saturating_sub(seen_ns);
        }
        self.seen_ns = Some(now_ns.max(seen_ns));
    }
}
