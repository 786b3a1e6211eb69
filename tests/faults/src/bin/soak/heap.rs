//! How many bytes of the heap are in use.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

/// The system's allocator, counted.
pub struct Counting;

/// What was allocated and not yet freed.
static BYTES: AtomicU64 = AtomicU64::new(0);

/// In how many pieces.
static BLOCKS: AtomicU64 = AtomicU64::new(0);

/// Pieces in use now.
pub fn blocks() -> u64 {
    BLOCKS.load(Ordering::Relaxed)
}

/// Bytes in use now.
pub fn bytes() -> u64 {
    BYTES.load(Ordering::Relaxed)
}

/// Lets large pieces always be mappings of their own, which go when they are freed, and threads share two arenas: else the C
/// library keeps what ended peers of this process had, and what is resident says nothing of what is held.
pub fn settle() {
    #[cfg(target_env = "gnu")]
    // SAFETY: both take numbers, and no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives back to the system what the C library keeps of freed memory, so that what is resident is what is in use.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, works on freed memory alone, and may be called from any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

// SAFETY: every call goes to the system's allocator as it is, and so do its answers; the counter is beside them.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about the layout is the one that is asked for.
        let place = unsafe { System.alloc(layout) };
        if !place.is_null() {
            BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
            BLOCKS.fetch_add(1, Ordering::Relaxed);
        }
        place
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        BLOCKS.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: the place came from `alloc` above with this layout, which took it from the system's allocator.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; the caller's promise about the new length is passed on.
        let moved = unsafe { System.realloc(place, layout, bytes) };
        if !moved.is_null() {
            BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
            BYTES.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        }
        moved
    }
}
