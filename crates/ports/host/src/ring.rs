//! A ring of immediates in memory that two processes map: one writes, the other reads, and either may sleep.
//!
//! **Order.** The writer stores the number, then the tail (release); the reader loads the tail (acquire), then the
//! number. So whatever the writer stored before, the bytes of its ops above all, is readable once the number is seen.
//!
//! **Sleep.** Whoever wants to sleep says so in its wait word, passes a sequentially consistent fence, and looks once
//! more; whoever changes the ring passes such a fence after the change, then looks at the other's wait word. In the
//! total order of the two fences one comes first, so either the sleeper sees the change or the other sees the sleeper.
//!
//! **Distrust.** The peer can write anything here at any time. Each end keeps its own position in private memory,
//! reads what the peer wrote exactly once, masks every index, and takes a position that cannot be for [`Corrupt`].

use std::ptr::NonNull;

use crossdock_memory::{Memory, OutOfRange};

use crate::sync::{AtomicU32, Ordering, fence};

/// The writing end. `K` keeps the shared memory alive and in place.
pub(crate) struct Writer<K> {
    place: Place<K>,
    /// Where the next number goes; counts freely and wraps.
    tail: u32,
    /// The reader's position as it was last seen.
    head_seen: u32,
}

/// The reading end. `K` keeps the shared memory alive and in place.
pub(crate) struct Reader<K> {
    place: Place<K>,
    /// Where the next number is taken from; counts freely and wraps.
    head: u32,
    /// The position that the writer was last told.
    head_told: u32,
    /// The writer's position as it was last seen.
    tail_seen: u32,
}

/// The peer's position cannot be: it has written what it must not, or runs another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

/// The shared words, each on a pair of cache lines of its own: processors fetch lines in pairs.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Header {
    /// Written by the writer only.
    tail: Line,
    /// Written by the reader only.
    head: Line,
    /// Set by the reader before it sleeps, cleared by the writer that wakes it.
    reader_waits: Line,
    /// Set by the writer before it sleeps because the ring is full, cleared by the reader that wakes it.
    writer_waits: Line,
}

#[repr(C, align(128))]
#[derive(Default)]
struct Line(AtomicU32);

/// Where one ring lies.
pub(crate) struct Place<K> {
    header: NonNull<Header>,
    slots: NonNull<AtomicU32>,
    mask: u32,
    _keep: K,
}

// SAFETY: the pointers lead to atomics only, which any thread may use, in memory that `K` keeps.
unsafe impl<K: Send> Send for Place<K> {}

/// Most numbers that a ring can hold.
pub(crate) const MAX_CAPACITY: u32 = 1 << 16;

impl<K> Place<K> {
    /// How many bytes a ring of this capacity takes, a multiple of the alignment that it needs.
    pub(crate) const fn bytes(capacity: u32) -> usize {
        (size_of::<Header>() + capacity as usize * size_of::<AtomicU32>())
            .next_multiple_of(align_of::<Header>())
    }

    /// # Safety
    /// `header` and, behind it, `capacity` slots must be readable and writable as long as `keep` lives, aligned, and
    /// used as nothing but this ring. There must be one writer and one reader.
    ///
    /// # Panics
    /// If `capacity` is not a power of two up to [`MAX_CAPACITY`].
    pub(crate) unsafe fn new(
        header: NonNull<Header>,
        slots: NonNull<AtomicU32>,
        capacity: u32,
        keep: K,
    ) -> Self {
        assert!(capacity.is_power_of_two() && capacity <= MAX_CAPACITY, "a ring of {capacity} slots");
        Self { header, slots, mask: capacity - 1, _keep: keep }
    }

    fn header(&self) -> &Header {
        // SAFETY: `new` was promised a header that lives as long as `self` and is all atomics.
        unsafe { self.header.as_ref() }
    }

    fn slot(&self, position: u32) -> &AtomicU32 {
        // SAFETY: `new` was promised as many slots as the mask lets through.
        unsafe { self.slots.add((position & self.mask) as usize).as_ref() }
    }

    fn capacity(&self) -> u32 {
        self.mask + 1
    }
}

impl Place<Memory> {
    /// A ring at `offset` of memory that two ports share.
    pub(crate) fn in_memory(memory: &Memory, offset: usize, capacity: u32) -> Result<Self, OutOfRange> {
        let header = memory.at(offset, Self::bytes(capacity))?.cast::<Header>();
        let header = NonNull::new(header).expect("no mapping begins at the null address");
        assert!(header.is_aligned(), "a ring at {offset}");
        // SAFETY: `at` has checked that header and slots lie in the memory, which is mapped as long as the handle
        // that is kept; slots need less alignment than the header that they follow. One port makes one end of each
        // ring; what a peer does beyond that can put wrong numbers here, which both ends expect, and nothing else:
        // all words are atomics.
        Ok(unsafe { Self::new(header, header.add(1).cast(), capacity, memory.clone()) })
    }
}

impl<K> Writer<K> {
    pub(crate) fn new(place: Place<K>) -> Self {
        Self { place, tail: 0, head_seen: 0 }
    }

    /// Whether one more number fits when as many as are promised are in, too: no more than there was room for. If so, it
    /// still fits later.
    pub(crate) fn has_room(&mut self, promised: u32) -> Result<bool, Corrupt> {
        if self.tail.wrapping_sub(self.head_seen) + promised < self.place.capacity() {
            return Ok(true);
        }
        let head = self.place.header().head.0.load(Ordering::Acquire);
        if self.tail.wrapping_sub(head) > self.place.capacity() {
            return Err(Corrupt);
        }
        self.head_seen = head;
        Ok(self.tail.wrapping_sub(head) + promised < self.place.capacity())
    }

    /// Adds a number, for which there [is room](Writer::has_room). The reader can see it at once, but is woken only
    /// by [`should_wake`](Writer::should_wake).
    pub(crate) fn push(&mut self, number: u32) {
        debug_assert!(self.tail.wrapping_sub(self.head_seen) < self.place.capacity(), "the ring has room");
        self.place.slot(self.tail).store(number, Ordering::Relaxed);
        self.tail = self.tail.wrapping_add(1);
        // Release: everything stored before, the number and the bytes it speaks of, is seen before it.
        self.place.header().tail.0.store(self.tail, Ordering::Release);
    }

    /// Asked after pushes: whether the reader sleeps and has to be woken now.
    pub(crate) fn should_wake(&self) -> bool {
        taken_wait(&self.place.header().reader_waits)
    }

    /// Says that the writer will sleep until there is room beside what is promised; true if there is room by now, and no
    /// sleep is due.
    pub(crate) fn wait_for_room(&mut self, promised: u32) -> Result<bool, Corrupt> {
        announce_wait(&self.place.header().writer_waits);
        self.has_room(promised)
    }

    /// The writer is awake.
    pub(crate) fn stop_waiting(&self) {
        self.place.header().writer_waits.0.store(0, Ordering::Relaxed);
    }
}

impl<K> Reader<K> {
    pub(crate) fn new(place: Place<K>) -> Self {
        Self { place, head: 0, head_told: 0, tail_seen: 0 }
    }

    /// Takes the next number, if there is one. The writer learns of the room by [`release`](Reader::release).
    pub(crate) fn pop(&mut self) -> Result<Option<u32>, Corrupt> {
        if !self.has_next()? {
            return Ok(None);
        }
        // Relaxed: the acquire in `has_next` has ordered it.
        let number = self.place.slot(self.head).load(Ordering::Relaxed);
        self.head = self.head.wrapping_add(1);
        Ok(Some(number))
    }

    /// Whether there is a number to take.
    pub(crate) fn has_next(&mut self) -> Result<bool, Corrupt> {
        if self.head != self.tail_seen {
            return Ok(true);
        }
        let tail = self.place.header().tail.0.load(Ordering::Acquire);
        if tail.wrapping_sub(self.head) > self.place.capacity() {
            return Err(Corrupt);
        }
        self.tail_seen = tail;
        Ok(tail != self.head)
    }

    /// Gives the slots of the taken numbers back; true if the writer sleeps and has to be woken now.
    pub(crate) fn release(&mut self) -> bool {
        if self.head == self.head_told {
            return false;
        }
        // Release: the loads from the slots come before the writer stores there again.
        self.place.header().head.0.store(self.head, Ordering::Release);
        self.head_told = self.head;
        taken_wait(&self.place.header().writer_waits)
    }

    /// Says that the reader will sleep; true if there is a number by now, and no sleep is due.
    pub(crate) fn wait_for_next(&mut self) -> Result<bool, Corrupt> {
        announce_wait(&self.place.header().reader_waits);
        self.has_next()
    }

    /// The reader is awake.
    pub(crate) fn stop_waiting(&self) {
        self.place.header().reader_waits.0.store(0, Ordering::Relaxed);
    }
}

/// The sleeper's half: say so, then (the caller does it) look again.
#[inline]
fn announce_wait(word: &Line) {
    word.0.store(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
}

/// The waker's half, after its change: whether the other end waits. Only the first who asks is told so.
#[inline]
fn taken_wait(word: &Line) -> bool {
    fence(Ordering::SeqCst);
    word.0.load(Ordering::Relaxed) != 0 && word.0.swap(0, Ordering::Relaxed) != 0
}

#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(all(test, loom))]
mod loom_tests;
