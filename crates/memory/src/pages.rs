//! The three ways to hold pages: exclusive, granted, shared.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::{fmt, mem};

use crate::pool::{PagePool, PoolError, QuarantineReason};

/// Exclusive, writable pages of one pool, in an order of the caller's.
///
/// Dropping it gives the pages back. It cannot be cloned, so no page has two owners:
///
/// ```compile_fail,E0599
/// # use crossdock_memory::{PagePool, PoolOptions};
/// let pool = PagePool::new(8, PoolOptions::default());
/// let pages = pool.take(4).unwrap();
/// let twice = pages.clone();
/// ```
///
/// Granting it to a peer consumes it, so pages that a peer may write cannot be used, split or given back:
///
/// ```compile_fail,E0382
/// # use crossdock_memory::{PagePool, PoolOptions};
/// let pool = PagePool::new(8, PoolOptions::default());
/// let pages = pool.take(4).unwrap();
/// let granted = pages.grant();
/// drop(pages);
/// ```
///
/// [`GrantedPages::come_home`] is the way back:
///
/// ```
/// # use crossdock_memory::{PagePool, PoolOptions};
/// let pool = PagePool::new(8, PoolOptions::default());
/// let granted = pool.take(4)?.grant();
/// assert_eq!(pool.stats().free, 4);
/// let pages = granted.come_home().expect("no other peer may write them");
/// drop(pages);
/// assert_eq!(pool.stats().free, 8);
/// # Ok::<(), crossdock_memory::PoolError>(())
/// ```
#[must_use = "dropping a page set gives its pages back"]
pub struct PageSet {
    pool: PagePool,
    ids: Vec<u32>,
}

impl PageSet {
    /// Takes pages that the engine's own allocator chose; the same as [`PagePool::adopt`].
    pub fn from_ids(pool: &PagePool, ids: &[u32]) -> Result<PageSet, PoolError> {
        pool.adopt(ids)
    }

    pub(crate) fn owned(pool: PagePool, ids: Vec<u32>) -> PageSet {
        PageSet { pool, ids }
    }

    /// The pages, in order.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The pool that the pages belong to.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Keeps the first `at` pages and returns the others.
    ///
    /// # Panics
    /// When there are fewer than `at` pages.
    pub fn split_off(&mut self, at: usize) -> PageSet {
        PageSet { pool: self.pool.clone(), ids: self.ids.split_off(at) }
    }

    /// Appends the pages of `other`, which comes back unchanged when it belongs to another pool.
    pub fn join(&mut self, mut other: PageSet) -> Result<(), PageSet> {
        if !self.pool.is_same(&other.pool) {
            return Err(other);
        }
        self.ids.append(&mut other.ids);
        Ok(())
    }

    /// Ends writing: from now on the pages can be read by many.
    pub fn share(mut self) -> PageRef {
        let ids = mem::take(&mut self.ids);
        self.pool.ledger().share(&ids);
        let range = 0..ids.len();
        PageRef { pool: self.pool.clone(), ids: ids.into(), range }
    }

    /// Hands the pages to whoever lets peers write them.
    pub fn grant(mut self) -> GrantedPages {
        let ids = mem::take(&mut self.ids);
        self.pool.ledger().grant(&ids);
        let (quarantine, is_abandoned) = (AtomicU32::new(NO_ENTRY), AtomicBool::new(false));
        let granted = Granted { pool: self.pool.clone(), ids, quarantine, is_abandoned };
        GrantedPages { granted: Some(Arc::new(granted)) }
    }
}

impl Drop for PageSet {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            self.pool.ledger().put(&self.ids);
        }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageSet").field("ids", &self.ids).finish_non_exhaustive()
    }
}

/// Pages that a peer may write, or several: each has a value of its own ([`another_writer`](GrantedPages::another_writer)).
///
/// Only [`come_home`](GrantedPages::come_home) of every such value frees them, and its caller answers for it: no write
/// of that peer can land any more, because the grant was revoked at once, released, severed, or because the peer is
/// proven dead. Dropping a value instead proves nothing, so the pool never hands these pages out again and counts them
/// as abandoned.
#[must_use = "dropping granted pages loses them for ever; `come_home` brings them back"]
pub struct GrantedPages {
    /// `None` only while the value goes home.
    granted: Option<Arc<Granted>>,
}

/// What all writers of the same pages share.
struct Granted {
    pool: PagePool,
    ids: Vec<u32>,
    /// The pool's entry for these pages, once they are in quarantine; else `NO_ENTRY`.
    quarantine: AtomicU32,
    /// One of the values was dropped: a peer may write for ever.
    is_abandoned: AtomicBool,
}

const NO_ENTRY: u32 = u32::MAX;

impl GrantedPages {
    /// The same pages for one more peer. They are home when both values have come home.
    pub fn another_writer(&self) -> GrantedPages {
        GrantedPages { granted: self.granted.clone() }
    }

    /// The pages, in order.
    pub fn ids(&self) -> &[u32] {
        &self.granted().ids
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.ids().len()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.ids().is_empty()
    }

    /// The pool that the pages belong to.
    pub fn pool(&self) -> &PagePool {
        &self.granted().pool
    }

    /// Marks the pages as held up: their room has ended and a peer can still write them.
    ///
    /// A second call replaces the reason, when one peer is done and another is not, and keeps the first time.
    pub fn quarantine(&mut self, reason: QuarantineReason, now_ns: u64) {
        if !self.is_empty() {
            let granted = self.granted();
            let mut ledger = granted.pool.ledger();
            let entry = ledger.quarantine(&granted.ids, granted.entry(), reason, now_ns);
            granted.quarantine.store(entry, Relaxed);
        }
    }

    /// Whether the pages are in quarantine.
    pub fn is_quarantined(&self) -> bool {
        self.granted().entry().is_some()
    }

    /// This peer's write can land in them no more: the caller knows. The pages, if that was the last peer.
    pub fn come_home(mut self) -> Option<PageSet> {
        let granted = self.granted.take().and_then(Arc::into_inner)?;
        granted.come_home()
    }

    fn granted(&self) -> &Granted {
        self.granted.as_ref().expect("only a value that goes home has none")
    }
}

impl Granted {
    fn entry(&self) -> Option<u32> {
        // The ledger's lock orders this where two threads do.
        Some(self.quarantine.load(Relaxed)).filter(|&entry| entry != NO_ENTRY)
    }

    fn come_home(mut self) -> Option<PageSet> {
        // Seen if it was set: whoever set it let go of its value after that.
        if *self.is_abandoned.get_mut() {
            return None;
        }
        let ids = mem::take(&mut self.ids);
        self.pool.ledger().come_home(&ids, self.entry());
        Some(PageSet { pool: self.pool.clone(), ids })
    }
}

impl Drop for GrantedPages {
    fn drop(&mut self) {
        if let Some(granted) = &self.granted {
            granted.is_abandoned.store(true, Relaxed);
        }
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            self.pool.ledger().abandon(&self.ids, self.entry());
        }
    }
}

impl fmt::Debug for GrantedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantedPages")
            .field("ids", &self.ids())
            .field("is_quarantined", &self.is_quarantined())
            .finish_non_exhaustive()
    }
}

/// Shared pages that nobody writes.
///
/// Each page is counted on its own: a clone adds one to each of its pages, dropping takes one from each, and a page
/// goes back to the pool at zero. So a long prompt can go away while the prefix that another request shares stays.
pub struct PageRef {
    pool: PagePool,
    ids: Arc<[u32]>,
    range: Range<usize>,
}

impl PageRef {
    pub(crate) fn lent(pool: PagePool, ids: &[u32]) -> PageRef {
        PageRef { pool, ids: ids.into(), range: 0..ids.len() }
    }

    /// The pages, in order.
    pub fn ids(&self) -> &[u32] {
        &self.ids[self.range.clone()]
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The pool that the pages belong to.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Another reference, to the first `pages` pages.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn prefix(&self, pages: usize) -> PageRef {
        self.slice(0..pages)
    }

    /// Another reference, to the pages at `range`.
    ///
    /// # Panics
    /// When the range leaves the pages.
    pub fn slice(&self, range: Range<usize>) -> PageRef {
        self.pool.ledger().add_references(&self.ids()[range.clone()]);
        let range = self.range.start + range.start..self.range.start + range.end;
        PageRef { pool: self.pool.clone(), ids: self.ids.clone(), range }
    }

    /// Appends the pages of `other`, for a prompt whose prefix was there before; `other` comes back unchanged when it
    /// belongs to another pool.
    pub fn join(&mut self, mut other: PageRef) -> Result<(), PageRef> {
        if !self.pool.is_same(&other.pool) {
            return Err(other);
        }
        self.ids = [self.ids(), other.ids()].concat().into();
        self.range = 0..self.ids.len();
        // The counts have moved here, so `other` has none left to give back.
        other.range = 0..0;
        Ok(())
    }

    /// Makes the pages writable again, when this is the only reference to each of them.
    pub fn try_into_set(mut self) -> Result<PageSet, PageRef> {
        if !self.pool.ledger().unshare(self.ids()) {
            return Err(self);
        }
        let ids = self.ids().to_vec();
        self.range = 0..0;
        Ok(PageSet { pool: self.pool.clone(), ids })
    }
}

impl Clone for PageRef {
    fn clone(&self) -> PageRef {
        self.slice(0..self.len())
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        if !self.is_empty() {
            self.pool.ledger().drop_references(self.ids());
        }
    }
}

impl fmt::Debug for PageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageRef").field("ids", &self.ids()).finish_non_exhaustive()
    }
}
