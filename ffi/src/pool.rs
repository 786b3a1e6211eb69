//! Which pages are free, and what every other page is waiting for.

use bytemuck::Zeroable;
use crossdock::{PagePool, PageRef, PageSet, PoolOptions};
use parking_lot::Mutex;

use crate::arguments::{list, not_null, put};
use crate::handles::Table;
use crate::sized::{self, Sized as _};
use crate::status::{
    CROSSDOCK_BUFFER_TOO_SMALL, CROSSDOCK_FINISHED, CROSSDOCK_PAGE_OUT_OF_RANGE, CROSSDOCK_WRONG_KIND, Fault,
    call, crossdock_status,
};

/// Knows of each page of a cache who holds it. 0 is none.
pub type crossdock_pool = u64;

/// Pages that were taken from a pool, in an order. 0 is none.
pub type crossdock_pages = u64;

/// A pool is over at most this many pages.
pub const CROSSDOCK_MOST_PAGES: u32 = 268_435_456;

/// How a pool is made.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_pool_options {
    /// `sizeof(crossdock_pool_options)`.
    pub size: usize,
    /// How many pages it is over.
    pub pages: u32,
    /// 0: the engine's own allocator chooses the pages, and rooms name them. 1: pages are taken from this pool.
    pub allocates: u32,
    /// Pressure begins when fewer pages than this are free. Of a pool that allocates.
    pub low_watermark: u32,
    /// Pressure ends when at least so many are free again.
    pub high_watermark: u32,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_pool_options {
    const FIRST_BYTES: usize = 24;
}

/// The counts of a pool, all of one moment. Every page is in exactly one of `free`, `owned`, `granted`, `quarantined`,
/// `abandoned` and `shared`.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_pool_stats {
    /// `sizeof(crossdock_pool_stats)`, set by the caller.
    pub size: usize,
    /// All pages.
    pub pages: u32,
    /// Pages that no room uses and nobody has taken.
    pub free: u32,
    /// Pages that were taken.
    pub owned: u32,
    /// Pages that a peer may write.
    pub granted: u32,
    /// Pages whose room has ended and that a peer can still write.
    pub quarantined: u32,
    /// Pages that can never come home.
    pub abandoned: u32,
    /// Pages that are being sent, or are shared.
    pub shared: u32,
    /// The longest run of free pages; 0 where the engine's allocator chooses.
    pub largest_run: u32,
    /// The fewest pages that were ever free.
    pub lowest_free: u32,
    /// 1 if the free pages fell below the low watermark and have not come up to the high one since.
    pub under_pressure: u32,
    /// How often pages were taken.
    pub takes: u64,
    /// How often they could not be.
    pub failed_takes: u64,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_pool_stats {
    const FIRST_BYTES: usize = 64;
}

/// Pages for a room: of a pool that allocates, `pages`; of one that does not, `ids`.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_page_list {
    /// The pool whose pages `ids` names; not looked at where `pages` is given.
    pub pool: crossdock_pool,
    /// Pages that were taken, or 0. A room that receives consumes the handle; one that sends does not.
    pub pages: crossdock_pages,
    /// `count` page numbers, of `id_bytes` each; read during the call.
    pub ids: *const std::ffi::c_void,
    /// How many.
    pub count: usize,
    /// 4 (also as 0) for 32-bit numbers, 8 for 64-bit ones; signed or not.
    pub id_bytes: u32,
    /// 0.
    pub reserved: u32,
}

enum Pages {
    /// Nobody else has them.
    Own(PageSet),
    /// They were sent before, or are being sent.
    Shared(PageRef),
    /// A room has them, or they are closed.
    Gone,
}

static POOLS: Table<PagePool> = Table::new(2, "pool");
static PAGES: Table<Mutex<Pages>> = Table::new(3, "pages");

/// Makes a pool.
///
/// # Safety
/// `options` points to a structure that says its size; `pool` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_pool_create(
    options: *const crossdock_pool_options,
    pool: *mut crossdock_pool,
) -> crossdock_status {
    call(|| {
        not_null("pool", pool)?;
        // SAFETY: as the caller promises.
        let options = unsafe { crossdock_pool_options::read(options) }?;
        if options.pages > CROSSDOCK_MOST_PAGES {
            let words = format!("{} pages; a pool is over at most {CROSSDOCK_MOST_PAGES}", options.pages);
            return Err(Fault::argument(words));
        }
        let made = match options.allocates {
            0 => PagePool::external(options.pages),
            1 => {
                let (low_watermark, high_watermark) = (options.low_watermark, options.high_watermark);
                PagePool::new(options.pages, PoolOptions { low_watermark, high_watermark })
            }
            other => return Err(Fault::argument(format!("allocates is {other}, and neither 0 nor 1"))),
        };
        let handle = POOLS.insert(|_| made.into())?;
        // SAFETY: as the caller promises.
        unsafe { put("pool", pool, handle) }
    })
}

/// Tells what a pool's pages are doing.
///
/// # Safety
/// `stats` points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_pool_get_stats(
    pool: crossdock_pool,
    stats: *mut crossdock_pool_stats,
) -> crossdock_status {
    call(|| {
        let found = POOLS.get(pool)?.stats();
        let told = crossdock_pool_stats {
            size: 0,
            pages: found.pages,
            free: found.free,
            owned: found.owned,
            granted: found.granted,
            quarantined: found.quarantined,
            abandoned: found.abandoned,
            shared: found.shared,
            largest_run: found.largest_run,
            lowest_free: found.lowest_free,
            under_pressure: found.under_pressure.into(),
            takes: found.takes,
            failed_takes: found.failed_takes,
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_pool_stats::write(stats, told) }
    })
}

/// Lets a pool go. Pages that are out come home to it all the same, and rooms that use it go on.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_pool_close(pool: crossdock_pool) -> crossdock_status {
    call(|| POOLS.remove(pool).map(drop))
}

/// Takes pages of a pool that allocates.
///
/// # Safety
/// `pages` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_pool_take(
    pool: crossdock_pool,
    count: u32,
    pages: *mut crossdock_pages,
) -> crossdock_status {
    call(|| {
        not_null("pages", pages)?;
        let taken = POOLS.get(pool)?.take(count)?;
        let handle = insert(taken)?;
        // SAFETY: as the caller promises.
        unsafe { put("pages", pages, handle) }
    })
}

/// Takes the pages that `list` names by their numbers, out of a pool whose pages the engine's allocator chooses: all of them
/// or none. `CROSSDOCK_PAGE_IN_USE` where a room still sends or serves one of them, or a peer may write it: so it tells, too,
/// whether the source of a room that has ended otherwise than delivered is read no more.
///
/// # Safety
/// `list` points to a list, and what it names can be read; `pages` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_pool_adopt(
    list: *const crossdock_page_list,
    pages: *mut crossdock_pages,
) -> crossdock_status {
    call(|| {
        not_null("pages", pages)?;
        // SAFETY: as the caller promises, here and below.
        let given = unsafe { crate::arguments::list("list", list, 1) }?;
        if given[0].pages != 0 {
            return Err(Fault::argument("the list names pages by a handle, which has them already"));
        }
        // SAFETY: as above.
        let taken = unsafe { take(&given[0]) }?;
        let handle = insert(taken.give())?;
        // SAFETY: as above.
        unsafe { put("pages", pages, handle) }
    })
}

/// Tells the numbers of pages, in their order: `capacity` of them fit into `ids`, and `count` tells how many there are.
///
/// # Safety
/// `ids` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_pages_ids(
    pages: crossdock_pages,
    ids: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        let slot = PAGES.get(pages)?;
        let held = slot.lock();
        let found = match &*held {
            Pages::Own(pages) => pages.ids(),
            Pages::Shared(pages) => pages.ids(),
            Pages::Gone => return Err(gone()),
        };
        if !count.is_null() {
            // SAFETY: as the caller promises.
            unsafe { count.write_unaligned(found.len()) };
        }
        if capacity < found.len() {
            return Err(Fault::quiet(CROSSDOCK_BUFFER_TOO_SMALL));
        }
        if !found.is_empty() {
            not_null("ids", ids)?;
            // SAFETY: as the caller promises; byte by byte, since C may have placed them anywhere.
            unsafe { ids.cast::<u8>().copy_from_nonoverlapping(found.as_ptr().cast(), size_of_val(found)) };
        }
        Ok(())
    })
}

/// Gives pages back to their pool. Rooms that send them keep them until they are over.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_pages_close(pages: crossdock_pages) -> crossdock_status {
    call(|| PAGES.remove(pages).map(drop))
}

fn gone() -> Fault {
    Fault::new(
        CROSSDOCK_FINISHED,
        "a room has consumed these pages",
        "take them from the room when it is over",
    )
}

pub(crate) fn insert(pages: PageSet) -> Result<crossdock_pages, Fault> {
    PAGES.insert(|_| Mutex::new(Pages::Own(pages)).into())
}

/// Pages that a room is to write, before it is known whether it is taken: until then they can be put back.
pub(crate) struct Taken {
    pub pages: PageSet,
    /// The handle that they were taken from.
    from: Option<crossdock_pages>,
}

impl Taken {
    pub fn is_by_handle(&self) -> bool {
        self.from.is_some()
    }

    /// The room has not begun for another reason.
    pub fn put_back(self) {
        if let Some(slot) = self.from.and_then(|handle| PAGES.get(handle).ok()) {
            *slot.lock() = Pages::Own(self.pages);
        }
    }

    /// The room has them; the handle is closed.
    pub fn give(self) -> PageSet {
        if let Some(handle) = self.from {
            // Closed by somebody else meanwhile, it is gone already.
            let _ = PAGES.remove(handle);
        }
        self.pages
    }
}

/// Pages to be written.
///
/// # Safety
/// What `list` names can be read.
pub(crate) unsafe fn take(list: &crossdock_page_list) -> Result<Taken, Fault> {
    if list.pages == 0 {
        let pool = POOLS.get(list.pool)?;
        // SAFETY: as the caller promises.
        let pages = pool.adopt(&unsafe { ids_of(list) }?)?;
        return Ok(Taken { pages, from: None });
    }
    let slot = PAGES.get(list.pages)?;
    let mut held = slot.lock();
    match std::mem::replace(&mut *held, Pages::Gone) {
        Pages::Own(pages) => Ok(Taken { pages, from: Some(list.pages) }),
        Pages::Shared(shared) => match shared.try_into_set() {
            Ok(pages) => Ok(Taken { pages, from: Some(list.pages) }),
            Err(shared) => {
                *held = Pages::Shared(shared);
                let words = "a room still sends these pages";
                Err(Fault::new(crate::CROSSDOCK_PAGE_IN_USE, words, "wait until it is over").retryable(true))
            }
        },
        Pages::Gone => Err(gone()),
    }
}

/// Pages to be read.
///
/// # Safety
/// What `list` names can be read.
pub(crate) unsafe fn lend(list: &crossdock_page_list) -> Result<PageRef, Fault> {
    if list.pages == 0 {
        let pool = POOLS.get(list.pool)?;
        // SAFETY: as the caller promises.
        return Ok(pool.lend(&unsafe { ids_of(list) }?)?);
    }
    let slot = PAGES.get(list.pages)?;
    let mut held = slot.lock();
    let shared = match std::mem::replace(&mut *held, Pages::Gone) {
        Pages::Own(pages) => pages.share(),
        Pages::Shared(pages) => pages,
        Pages::Gone => return Err(gone()),
    };
    *held = Pages::Shared(shared.clone());
    Ok(shared)
}

/// # Safety
/// So many numbers can be read, and nobody changes them meanwhile.
unsafe fn ids_of<'a>(page_list: &crossdock_page_list) -> Result<std::borrow::Cow<'a, [u32]>, Fault> {
    let crossdock_page_list { ids, count, id_bytes, .. } = *page_list;
    match id_bytes {
        // A number that is negative is out of every pool's range.
        // SAFETY: as the caller promises.
        0 | 4 => Ok(unsafe { list("ids", ids.cast::<u32>(), count) }?.into()),
        8 => {
            // SAFETY: as the caller promises.
            let ids = unsafe { list("ids", ids.cast::<i64>(), count) }?;
            let narrow = |&id: &i64| {
                u32::try_from(id).map_err(|_| {
                    let words = format!("page {id} is none of any pool");
                    Fault::new(CROSSDOCK_PAGE_OUT_OF_RANGE, words, "name pages that the pool has")
                })
            };
            ids.iter().map(narrow).collect()
        }
        other => {
            let words = format!("page numbers of {other} bytes; they have 4 or 8");
            Err(Fault::new(CROSSDOCK_WRONG_KIND, words, "give 32-bit or 64-bit numbers"))
        }
    }
}
