//! Prefix pages that outlive the request that brought them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem;

use crossdock_memory::{PagePool, PageRef, PageSet};

use crate::Block;

/// The blocks that a worker holds, by their ids.
///
/// Each block is a [`PageRef`] of its own, so the pool counts who uses a page: the cache once, each lease once. A block
/// that no lease uses is idle; idle ones are evicted, those first that were left longest ago and, of one request, the
/// later ones before the earlier. So whatever is held, the blocks before it in its request are held, too.
///
/// That ids name what they say is not taken for granted: where a request gives a length to an id that is held with
/// another one, or names it twice, its shared part ends.
#[derive(Debug)]
pub struct PrefixCache {
    pool: PagePool,
    held: HashMap<u64, Held>,
    /// The idle ones, the oldest first.
    idle: BTreeMap<u64, u64>,
    /// Numbers the times at which blocks became idle.
    stamps: u64,
    idle_pages: u32,
    evicted_pages: u64,
}

#[derive(Debug)]
struct Held {
    pages: PageRef,
    leases: u32,
    stamp: u64,
}

/// What one request uses of a pool: blocks of the cache, and pages of its own. It is given back with
/// [`PrefixCache::release`]; whoever drops it instead keeps its blocks from ever being evicted.
#[derive(Debug)]
#[must_use = "a lease that is not released keeps its blocks from being evicted"]
pub struct Lease {
    blocks: Vec<Block>,
    /// The first ones of the blocks, whose pages are here, and after them all other pages.
    parts: Vec<PageRef>,
    /// How many of the blocks are here.
    here: usize,
    held_pages: u32,
}

impl Lease {
    /// How many pages were held when the request was admitted: its first ones.
    pub fn held_pages(&self) -> u32 {
        self.held_pages
    }

    /// The pages that are here, in the request's order.
    pub fn ids(&self) -> Vec<u32> {
        self.parts.iter().flat_map(PageRef::ids).copied().collect()
    }

    /// A reference to the pages that are here, in the request's order; `None` if there are none yet.
    pub fn pages(&self) -> Option<PageRef> {
        let mut parts = self.parts.iter().cloned();
        let first = parts.next()?;
        Some(parts.fold(first, |mut all, part| {
            all.join(part).expect("all pages are of the cache's pool");
            all
        }))
    }
}

impl PrefixCache {
    /// Holds nothing yet.
    pub fn new(pool: PagePool) -> Self {
        let (held, idle) = Default::default();
        Self { pool, held, idle, stamps: 0, idle_pages: 0, evicted_pages: 0 }
    }

    /// The pool that the pages belong to.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// How many pages are idle: they are free as soon as somebody needs them.
    pub fn idle_pages(&self) -> u32 {
        self.idle_pages
    }

    /// How many pages have been evicted.
    pub fn evicted_pages(&self) -> u64 {
        self.evicted_pages
    }

    /// Whether the block with this id is here.
    pub fn holds(&self, id: u64) -> bool {
        self.held.contains_key(&id)
    }

    /// Uses as many of the first blocks as are here.
    pub fn lease(&mut self, blocks: &[Block]) -> Lease {
        let mut ids = HashSet::with_capacity(blocks.len());
        let blocks = blocks.iter().copied().take_while(|block| ids.insert(block.id)).collect();
        let mut lease = Lease { blocks, parts: Vec::new(), here: 0, held_pages: 0 };
        while let Some(&block) = lease.blocks.get(lease.here)
            && let Some(pages) = self.use_block(block)
        {
            lease.held_pages += block.pages;
            lease.parts.push(pages);
            lease.here += 1;
        }
        lease
    }

    /// Keeps the pages that a lease has lacked so far, all of them in order. A block that another request has brought
    /// meanwhile is used from there, and these pages go home. From a block on that is held with another length, they
    /// are the request's own.
    ///
    /// # Panics
    /// If there are fewer pages than the missing blocks have.
    pub fn keep(&mut self, lease: &mut Lease, pages: PageSet) {
        let pages = pages.share();
        let mut at = 0;
        while let Some(&block) = lease.blocks.get(lease.here) {
            let range = at..at + block.pages as usize;
            let end = range.end;
            let part = match self.use_block(block) {
                Some(held) => held,
                None if self.holds(block.id) => break,
                None => {
                    let pages = pages.slice(range);
                    self.held.insert(block.id, Held { pages: pages.clone(), leases: 1, stamp: 0 });
                    pages
                }
            };
            lease.parts.push(part);
            lease.here += 1;
            at = end;
        }
        lease.blocks.truncate(lease.here);
        lease.parts.push(pages.slice(at..pages.len()));
    }

    /// Ends a request's use. Its own pages go home; its blocks stay until they are evicted.
    pub fn release(&mut self, mut lease: Lease) {
        // Nothing is idle that somebody refers to.
        let parts = mem::take(&mut lease.parts);
        drop(parts);
        for block in lease.blocks[..lease.here].iter().rev() {
            let held = self.held.get_mut(&block.id).expect("a block that is used is not evicted");
            held.leases -= 1;
            if held.leases == 0 {
                self.stamps += 1;
                held.stamp = self.stamps;
                self.idle.insert(held.stamp, block.id);
                self.idle_pages += block.pages;
            }
        }
    }

    /// Evicts until so many pages are free; false if all that is idle is not enough, or is still being sent.
    pub fn make_room(&mut self, pages: u32) -> bool {
        self.evict_until(|pool| pool.stats().free >= pages)
    }

    /// Evicts while the pool is under pressure.
    pub fn relieve(&mut self) {
        self.evict_until(|pool| !pool.stats().under_pressure);
    }

    /// Evicts everything that is idle.
    pub fn clear(&mut self) {
        self.evict_until(|_| false);
    }

    fn use_block(&mut self, block: Block) -> Option<PageRef> {
        // Of another length it is not the same block, whatever its name.
        let held = self.held.get_mut(&block.id).filter(|held| held.pages.len() == block.pages as usize)?;
        if held.leases == 0 {
            self.idle.remove(&held.stamp);
            self.idle_pages -= block.pages;
        }
        held.leases += 1;
        Some(held.pages.clone())
    }

    fn evict_until(&mut self, enough: impl Fn(&PagePool) -> bool) -> bool {
        let mut after = 0;
        while !enough(&self.pool) {
            let Some((&stamp, &id)) = self.idle.range(after..).next() else { return false };
            after = stamp + 1;
            self.evict(stamp, id);
        }
        true
    }

    /// Evicts an idle block, unless the pool says that somebody still refers to it: a room whose end was told, but
    /// whose last bytes are on their way.
    fn evict(&mut self, stamp: u64, id: u64) {
        let Some(held) = self.held.remove(&id) else { return };
        let count = held.pages.len() as u32;
        match held.pages.try_into_set() {
            Ok(pages) => {
                drop(pages);
                self.idle.remove(&stamp);
                self.idle_pages -= count;
                self.evicted_pages += u64::from(count);
            }
            Err(pages) => drop(self.held.insert(id, Held { pages, leases: 0, stamp })),
        }
    }
}
