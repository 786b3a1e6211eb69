//! Helper threads for large copies.

use core::cell::UnsafeCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Pid;

use super::claims::{Claim, Claims, MAX_CHUNKS};
use super::{Copier, Pieces};

/// A copier with helper threads that share the work of each large call.
///
/// The caller copies too, and takes every chunk that no helper has claimed; so a helper that the system does
/// not run costs nothing, and one that is interrupted in its chunk costs that chunk. The call returns when
/// all bytes are in place and ordered like plain stores.
///
/// Helpers stay awake for some microseconds after their last chunk and then sleep. Calls below
/// [`CopyThreads::SHARED_FROM_BYTES`] never involve them, and a lone call below
/// [`CopyThreads::WOKEN_FROM_BYTES`] does not wake them.
pub struct CopyThreads {
    copier: Copier,
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// When the last shared call ended.
    last_end: Instant,
}

struct Shared {
    claims: Claims,
    /// Written by the owner between jobs; read by whoever has claimed a chunk of the job.
    job: UnsafeCell<Option<Job>>,
    /// What the kernel calls the helpers; 0 for one that does not run yet.
    threads: Box<[AtomicI32]>,
}

// SAFETY: `claims` orders all accesses to `job`: the owner writes it only while no chunk is claimed or to be
// claimed, and others read it only between a claim and its finish. The pointers inside are the caller's, who
// promised that they are good for the duration of the call, on any thread.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl CopyThreads {
    /// From this total on, a call is shared with the helpers that are awake.
    pub const SHARED_FROM_BYTES: usize = 128 << 10;

    /// From this total on, a call wakes the helpers even if it comes alone: until a sleeping one runs, the
    /// caller has copied half of that by itself.
    pub const WOKEN_FROM_BYTES: usize = 768 << 10;

    /// Starts the helpers; with none, every call copies in the caller.
    pub fn start(copier: Copier, helpers: usize) -> io::Result<CopyThreads> {
        let shared = Arc::new(Shared {
            claims: Claims::new(),
            job: UnsafeCell::new(None),
            threads: (0..helpers).map(|_| AtomicI32::new(0)).collect(),
        });
        // Threads that are already running must end if a later one cannot start: the drop of this value sees
        // to it.
        let mut threads =
            CopyThreads { copier, shared, helpers: Vec::with_capacity(helpers), last_end: Instant::now() };
        for helper in 0..helpers {
            let shared = threads.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("crossdock-copy{helper}"))
                .stack_size(HELPER_STACK_BYTES)
                .spawn(move || {
                    let thread = rustix::thread::gettid().as_raw_nonzero().get();
                    // Relaxed: a number that publishes nothing else.
                    shared.threads[helper].store(thread, Ordering::Relaxed);
                    help(&shared);
                })?;
            threads.helpers.push(thread);
        }
        Ok(threads)
    }

    /// How many helpers there are beside the caller.
    pub fn helpers(&self) -> usize {
        self.helpers.len()
    }

    /// What each thread copies with.
    pub fn copier(&self) -> Copier {
        self.copier
    }

    /// Copies one run of bytes.
    ///
    /// # Safety
    /// As [`Copier::copy`]; the memory is accessed by the helpers too.
    pub unsafe fn copy(&mut self, dst: *mut u8, src: *const u8, bytes: usize) {
        // SAFETY: one piece at index zero is exactly the run that the caller vouches for.
        unsafe { self.copy_pieces(Pieces::run(dst, src, bytes)) }
    }

    /// Copies every piece, in no particular order.
    ///
    /// # Safety
    /// As [`Copier::copy_pieces`]; the memory is accessed by the helpers too.
    ///
    /// # Panics
    /// If the two index lists differ in length.
    pub unsafe fn copy_pieces(&mut self, pieces: Pieces<'_>) {
        pieces.assert_well_formed();
        if self.helpers.is_empty() || pieces.total_bytes() < Self::SHARED_FROM_BYTES {
            // SAFETY: the caller vouches for the pieces.
            return unsafe { self.copier.copy_pieces(pieces) };
        }
        let job = Job::new(self.copier, pieces, self.helpers.len() + 1);
        // SAFETY: `&mut self` makes this thread the only owner, and the job before has ended: the last call
        // left only when all its chunks were finished.
        unsafe { *self.shared.job.get() = Some(job) };
        let sleepers = self.shared.claims.publish(job.chunks);
        let helpers = self.helpers_to_wake(&job);
        if sleepers && helpers > 0 {
            elsewhere(&self.shared.threads, || self.shared.claims.wake(helpers));
        }
        while let Claim::Chunk(chunk) = self.shared.claims.claim() {
            // SAFETY: the chunk is part of what the caller vouches for, and the claim makes it ours alone.
            unsafe { job.copy_chunk(chunk) };
            self.shared.claims.finish();
        }
        // What is left is at most one chunk a helper.
        if !wait_awake(CALLER_AWAKE, || self.shared.claims.all_finished()) {
            self.shared.claims.sleep_until_finished();
        }
        self.last_end = Instant::now();
    }

    /// A smaller call wakes helpers only where calls follow each other so closely that a helper, once woken,
    /// stays awake for the next ones.
    fn helpers_to_wake(&self, job: &Job) -> u32 {
        let steady = || self.last_end.elapsed() < HELPER_AWAKE;
        if job.pieces.total_bytes() >= Self::WOKEN_FROM_BYTES || steady() {
            // One chunk is the caller's own.
            (self.helpers.len() as u32).min(job.chunks - 1)
        } else {
            0
        }
    }
}

impl Drop for CopyThreads {
    fn drop(&mut self) {
        self.shared.claims.stop();
        for helper in self.helpers.drain(..) {
            helper.join().expect("a helper only copies and cannot panic");
        }
    }
}

/// The caller waits awake for about as long as a helper's chunk takes; a helper that needs longer is not
/// running, and the processor that it waits for may be this one.
const CALLER_AWAKE: Duration = Duration::from_micros(20);

/// A helper stays awake between the calls of a steady stream, and no longer: the turn of a progress loop that lies
/// between two calls takes up to this long where the processors are shared.
const HELPER_AWAKE: Duration = Duration::from_micros(100);

/// The copy needs next to none; the rest is for an unoptimised build and a sanitizer.
const HELPER_STACK_BYTES: usize = 256 << 10;

/// Chunks are small enough that an interrupted helper holds up the call by little work, and large enough that
/// the start of each, where nothing is prefetched yet, does not show.
const CHUNK_BYTES: core::ops::RangeInclusive<usize> = 64 << 10..=1 << 20;

/// With so many chunks for each thread, the last ones end at about the same time. With 16, calls of 8 MiB a thread waited
/// 44 µs for the last one on average, with 32 it is 20 µs of 1.6 ms. With 4, calls of 4 MiB a
/// thread lost a tenth of their rate to waiting for the last one.
const CHUNKS_PER_THREAD: usize = 32;

fn help(shared: &Shared) {
    let mut awake_until = Instant::now() + HELPER_AWAKE;
    loop {
        match shared.claims.claim() {
            Claim::Chunk(chunk) => {
                // SAFETY: a claim orders this read after the owner's write, and the owner writes again only
                // when this chunk is finished.
                let job = unsafe { *shared.job.get() }.expect("a claimed chunk has a job");
                // SAFETY: the owner's caller vouches for the pieces until the chunk is finished, and the
                // claim makes this chunk ours alone.
                unsafe { job.copy_chunk(chunk) };
                shared.claims.finish();
                awake_until = Instant::now() + HELPER_AWAKE;
            }
            Claim::Idle if Instant::now() < awake_until => pause(),
            Claim::Idle => {
                shared.claims.sleep_until_published();
                awake_until = Instant::now() + HELPER_AWAKE;
            }
            Claim::Stop => return,
        }
    }
}

/// Wakes sleeping helpers on other processors than the caller's.
///
/// A kernel that is short of time for the search puts a thread that is woken where its waker runs, though another
/// processor idles; there the two would take turns for several milliseconds, until it looks again. So for the moment of
/// waking, that processor is none of the helpers'. Where the kernel does not allow it, they are woken anywhere.
fn elsewhere(threads: &[AtomicI32], wake: impl FnOnce()) {
    let here = rustix::thread::sched_getcpu();
    let keep_off = |thread: &AtomicI32| {
        let thread = Pid::from_raw(thread.load(Ordering::Relaxed))?;
        let allowed = rustix::thread::sched_getaffinity(Some(thread)).ok()?;
        let mut others = allowed;
        others.unset(here);
        let has_others = others.count() > 0 && others.count() < allowed.count();
        let kept_off = has_others && rustix::thread::sched_setaffinity(Some(thread), &others).is_ok();
        kept_off.then_some((thread, allowed))
    };
    // The caller must not allocate: its helpers are few, and the first ones matter most.
    let mut before = [None; KEPT_OFF_MAX];
    for (slot, thread) in before.iter_mut().zip(threads) {
        *slot = keep_off(thread);
    }
    wake();
    for (thread, allowed) in before.into_iter().flatten() {
        // It fails only where the thread has ended, which is when nobody needs it any more.
        let _ = rustix::thread::sched_setaffinity(Some(thread), &allowed);
    }
}

/// More helpers than this are left to the kernel.
const KEPT_OFF_MAX: usize = 16;

fn wait_awake(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !done() {
        if Instant::now() >= end {
            return false;
        }
        pause();
    }
    true
}

/// A moment of waiting awake. It offers the processor to others: on a machine with more threads than
/// processors, a helper may be sitting on the very processor that its caller needs, and the other way round.
fn pause() {
    for _ in 0..8 {
        core::hint::spin_loop();
    }
    std::thread::yield_now();
}

/// One call's pieces, cut into chunks that threads take in any order.
#[derive(Clone, Copy)]
struct Job {
    /// The lifetime is the call's, not `'static`: nobody reads the job once all its chunks are finished, and
    /// the call lasts until then.
    pieces: Pieces<'static>,
    /// Bound to the strategy of the whole call, which a single chunk is too small to choose.
    copier: Copier,
    cut: Cut,
    chunks: u32,
}

/// A chunk is a run of pieces, since the streamed copy goes through four of them side by side, or, where they are long,
/// a band across them: so many bytes of each, and less in the last one.
#[derive(Clone, Copy)]
struct Cut {
    run: usize,
    bands: usize,
    band_bytes: usize,
}

impl Cut {
    fn new(pieces: usize, piece_bytes: usize, chunk_bytes: usize) -> Cut {
        let run = (chunk_bytes / piece_bytes).max(1).next_multiple_of(SIDE_BY_SIDE).min(pieces);
        let most_bytes = (chunk_bytes / run).next_multiple_of(BAND_ALIGN_BYTES);
        // A piece is not cut for the sake of a few bytes.
        if piece_bytes < 2 * most_bytes {
            return Cut { run, bands: 1, band_bytes: piece_bytes };
        }
        let band_bytes =
            piece_bytes.div_ceil(piece_bytes.div_ceil(most_bytes)).next_multiple_of(BAND_ALIGN_BYTES);
        Cut { run, bands: piece_bytes.div_ceil(band_bytes), band_bytes }
    }
}

impl Job {
    fn new(copier: Copier, pieces: Pieces<'_>, threads: usize) -> Job {
        let copier = copier.force(copier.strategy(pieces.piece_bytes, pieces.total_bytes()));
        let chunk_bytes = (pieces.total_bytes() / (threads * CHUNKS_PER_THREAD))
            .clamp(*CHUNK_BYTES.start(), *CHUNK_BYTES.end());
        let cut = Cut::new(pieces.count(), pieces.piece_bytes, chunk_bytes);
        let chunks = pieces.count().div_ceil(cut.run) * cut.bands;
        assert!(chunks <= MAX_CHUNKS as usize, "{chunks} chunks exceed the counter");
        // SAFETY: only the lifetime changes; the field's comment says why the references live long enough.
        let pieces = unsafe { core::mem::transmute::<Pieces<'_>, Pieces<'static>>(pieces) };
        Job { pieces, copier, cut, chunks: chunks as u32 }
    }

    /// # Safety
    /// As [`Copier::copy_pieces`] for the chunk's pieces, which nobody else may be copying.
    unsafe fn copy_chunk(&self, chunk: u32) {
        let Cut { run, bands, band_bytes } = self.cut;
        let (first, start) = (chunk as usize / bands * run, chunk as usize % bands * band_bytes);
        let pieces = self.pieces.range(first..(first + run).min(self.pieces.count()));
        let band = Pieces {
            dst_base: pieces.dst_base.wrapping_add(start),
            src_base: pieces.src_base.wrapping_add(start),
            piece_bytes: band_bytes.min(pieces.piece_bytes - start),
            ..pieces
        };
        // SAFETY: the caller vouches for all pieces; a run of them, or a band across one, is a part of that.
        unsafe { self.copier.copy_pieces(band) }
    }
}

/// How many pieces the streamed copy goes through at once.
const SIDE_BY_SIDE: usize = 4;

/// Bands begin at such a multiple, so that an aligned piece has aligned bands and no two threads share a page.
const BAND_ALIGN_BYTES: usize = 4096;
