//! Moves pieces on a GPU: gathers ops, launches them, and tells which launches have ended.
//!
//! Launches have numbers (tickets), in the order of one stream. The last kernel of each stores its number in a word of pinned
//! memory, behind all its bytes (release at system scope): so the CPU learns of it by a load. What has failed is learnt from
//! the stream.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};

use crate::driver::{Allocated, CudaError, Function, HostRegistration, Module, Stream, abi};
use crate::gpu::{Gpu, GpuError};
use crate::moves::{Batch, Pieces, Side, Signal, Word};
use crate::staging::{NoStaging, Staging};
use crate::{Kernel, PAGES};

/// Moves pieces between memories that one GPU reaches.
#[derive(Debug)]
pub struct Mover {
    /// Dropped when nothing is on its way, or never.
    hands: ManuallyDrop<Hands>,
    batch: Batch,
    /// The lists of the op before, where it was gathered since the last launch: ops of many layers have the same.
    lists: [Option<Staged>; 2],
    launched: u64,
    ended: u64,
    /// Looks for an end since the stream was asked whether it has failed.
    looks: u32,
    /// Something was copied since the last launch.
    has_copies: bool,
    /// What failed, and the first launch that may have.
    failure: Option<(u64, CudaError)>,
    /// It was waited for what is on its way, and there was no time left.
    is_given_up: bool,
    limits: Limits,
    /// The process that made it: a forked child has neither the GPU nor the word that launches set.
    owner: u32,
    gpu: Gpu,
}

/// What kernels on their way use.
#[derive(Debug)]
struct Hands {
    stream: Stream,
    functions: [Function; Word::ALL.len()],
    staging: Staging,
    /// Counted by blocks that have finished; the GPU's.
    finished: Allocated,
    done: Done,
}

/// What a mover takes of a GPU and of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Blocks of one launch; each keeps no more than one streaming multiprocessor busy.
    pub blocks: u32,
    /// Threads of a block.
    pub block_threads: u32,
    /// Pinned memory for the lists and entries of launches that have not ended.
    pub staging_bytes: usize,
    /// Launches that have not ended.
    pub launches: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { blocks: 32, block_threads: 512, staging_bytes: 16 << 20, launches: 256 }
    }
}

/// How far launches have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Launches up to this one touch no memory any more. Every byte of those that have not failed is where it belongs, for whoever
    /// sees what this thread stores from now on with release order.
    pub ended: u64,
    /// The first launch that may have failed, and why; nothing is taken any more.
    pub failed: Option<(u64, CudaError)>,
}

/// A side of pieces, with its list where the host has it.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// Where the piece of page 0 begins.
    pub base: u64,
    /// The distance of pages.
    pub stride_bytes: u64,
    /// The page of each piece.
    pub pages: &'a [u32],
}

/// Which list was staged, and where.
#[derive(Clone, Copy, Debug)]
struct Staged {
    at: usize,
    length: usize,
    address: u64,
}

/// The word that the last kernel of a launch sets.
#[derive(Debug)]
struct Done {
    registration: HostRegistration,
    memory: Memory,
}

impl Mover {
    /// One for a GPU. `image` is [`PAGES`], compiled for it.
    pub fn new(gpu: &Gpu, image: &[u8], limits: Limits) -> Result<Mover, GpuError> {
        let limits = Limits {
            blocks: limits.blocks.max(1),
            block_threads: limits.block_threads.clamp(1, MOST_BLOCK_THREADS),
            staging_bytes: limits.staging_bytes.max(LEAST_STAGING_BYTES),
            launches: limits.launches.clamp(1, 1 << 30),
        };
        let context = gpu.context();
        let module = context.load(image)?;
        let Kernel { functions, .. } = PAGES;
        let staging = Staging::new(context, limits.staging_bytes);
        let staging = staging.map_err(|error| match error {
            NoStaging::Memory(error) => GpuError::Memory(error),
            NoStaging::Driver(error) => GpuError::Driver(error),
        })?;
        let of_word = |word: Word, module: &Module| module.function(functions[word as usize]);
        let [first, second, third] = Word::ALL;
        let memory = Memory::allocate(
            4,
            &AllocateOptions { name: "crossdock-done".into(), ..AllocateOptions::default() },
        )?;
        let finished = context.malloc(4)?;
        let stream = context.stream()?;
        // SAFETY: the word was allocated just now, and nobody else knows it.
        unsafe { stream.fill(finished.base(), finished.bytes(), 0)? };
        let hands = Hands {
            stream,
            functions: [of_word(first, &module)?, of_word(second, &module)?, of_word(third, &module)?],
            staging,
            finished,
            done: Done { registration: context.register_host(&memory)?, memory },
        };
        let mut mover = Mover {
            hands: ManuallyDrop::new(hands),
            batch: Batch::new(limits.block_threads),
            lists: [None; 2],
            launched: 0,
            ended: 0,
            looks: 0,
            has_copies: false,
            failure: None,
            is_given_up: false,
            limits,
            owner: std::process::id(),
            gpu: gpu.clone(),
        };
        mover.warm_up()?;
        Ok(mover)
    }

    /// Launches every kernel once without pieces: the driver may load a kernel with its first launch, and may wait for the whole
    /// device then, where somebody's kernel may wait for what only this mover can bring.
    fn warm_up(&mut self) -> Result<(), CudaError> {
        for word in Word::ALL {
            self.launch_one(word, (0, 0, 0), (0, 0))?;
        }
        let timed_out =
            CudaError { call: "a first launch", code: abi::ERROR_NOT_READY, name: "CUDA_ERROR_NOT_READY" };
        if self.wait(Instant::now() + LONGEST_PARTING) { Ok(()) } else { Err(timed_out) }
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The ticket of what is being gathered, and of all that is added until [`launch`](Mover::launch).
    pub fn ticket(&self) -> u64 {
        self.launched + 1
    }

    /// Whether a [span](Mover::span) or a [copy](Mover::copy) can be added now.
    pub fn has_room_for_span(&self) -> bool {
        self.has_room(ENTRIES_OF_A_SPAN)
    }

    /// Adds a stretch of bytes that kernels move, for which there [is room](Mover::has_room_for_span).
    ///
    /// # Safety
    /// Both ranges are memory that this GPU reaches until the ticket has ended, and nobody relies on what is written staying as it
    /// is.
    pub unsafe fn span(&mut self, from: u64, to: u64, bytes: u64) {
        self.batch.span(from, to, bytes);
    }

    /// Adds a stretch of bytes that a copy engine moves, for which there [is room](Mover::has_room_for_span): large ones go as
    /// fast by it, and leave the multiprocessors to others. Otherwise as [`span`](Mover::span).
    ///
    /// # Safety
    /// As [`span`](Mover::span).
    pub unsafe fn copy(&mut self, from: u64, to: u64, bytes: u64) {
        self.has_copies = true;
        // SAFETY: as the caller says; whoever is told that the ticket has ended is told behind this copy, on the same stream.
        let copied = unsafe { self.hands.stream.copy(to, from, bytes as usize) };
        if let Err(error) = copied {
            self.fail(self.ticket(), error);
        }
    }

    /// How many of the first pieces of these lists, which are of one length, can be added now.
    pub fn room_for_pages(&self, from: &[u32], to: &[u32], piece_bytes: u64) -> usize {
        if !self.has_room(entries_of(piece_bytes)) {
            return 0;
        }
        if self.known(0, from).is_some() && self.known(1, to).is_some() {
            return from.len();
        }
        // Two stretches of one length, and behind them the entries.
        let entries = (self.batch.entries() + entries_of(piece_bytes)) * size_of::<Pieces>();
        let room = self.hands.staging.room().saturating_sub(entries + RESERVE_BYTES);
        from.len().min(room / (2 * size_of::<u32>())).min(LONGEST_LIST)
    }

    /// Adds pieces, for all of which there [is room](Mover::room_for_pages).
    ///
    /// # Panics
    /// If there is no room, or the lists differ in length.
    ///
    /// # Safety
    /// As [`span`](Mover::span), for each piece; and no two overlap where they are written.
    pub unsafe fn pages(&mut self, from: Ends<'_>, to: Ends<'_>, piece_bytes: u64) {
        assert_eq!(from.pages.len(), to.pages.len(), "pieces have two ends");
        let side = |ends: Ends<'_>, pages| Side {
            base: ends.base,
            stride_bytes: ends.stride_bytes,
            pages: Some(pages),
        };
        let lists = [(0, from.pages), (1, to.pages)].map(|(which, pages)| self.list(which, pages));
        self.batch.pages(side(from, lists[0]), side(to, lists[1]), piece_bytes, from.pages.len() as u64);
    }

    /// Where a list is that was staged since the last launch.
    fn known(&self, which: usize, pages: &[u32]) -> Option<u64> {
        let staged = self.lists[which]?;
        (staged.at == pages.as_ptr().addr() && staged.length == pages.len()).then_some(staged.address)
    }

    fn list(&mut self, which: usize, pages: &[u32]) -> u64 {
        if let Some(address) = self.known(which, pages) {
            return address;
        }
        let address = self.put(bytemuck::cast_slice(pages));
        self.lists[which] = Some(Staged { at: pages.as_ptr().addr(), length: pages.len(), address });
        address
    }

    /// Whether so many entries more can be launched with what is gathered.
    fn has_room(&self, entries: usize) -> bool {
        let bytes = (self.batch.entries() + entries) * size_of::<Pieces>() + RESERVE_BYTES;
        self.failure.is_none()
            && self.launched - self.ended < self.limits.launches
            && self.hands.staging.room() >= bytes
    }

    /// What failed: nothing is taken any more.
    pub fn failure(&self) -> Option<CudaError> {
        self.failure.map(|(_, error)| error)
    }

    /// Forgets which lists were staged: who owns them may change them now.
    pub fn lists_may_change(&mut self) {
        self.lists = [None; 2];
    }

    /// Launches what is gathered, if anything is. What goes wrong is told by [`progress`](Mover::progress).
    pub fn launch(&mut self) {
        self.lists_may_change();
        let has_copies = std::mem::take(&mut self.has_copies);
        let is_wanted = self.batch.entries() > 0 || has_copies;
        if is_wanted {
            // Also where it fails half way: what was enqueued by then is on its way.
            self.launched += 1;
            if self.failure.is_none()
                && let Err(error) = self.launch_all(self.launched)
            {
                self.fail(self.launched, error);
            }
            self.hands.staging.launched(self.launched);
        }
        self.batch.clear();
    }

    fn launch_all(&mut self, ticket: u64) -> Result<(), CudaError> {
        let signal = Signal { at: self.hands.done.registration.address(), value: ticket as u32, reserved: 0 };
        let signal = self.put(bytemuck::bytes_of(&signal));
        let has_tiles = |word: &Word| self.batch.launch(*word).tiles > 0;
        // Behind copies alone a kernel without pieces tells of their end.
        let last = Word::ALL.into_iter().rfind(has_tiles).unwrap_or(Word::Bytes16);
        for word in Word::ALL.into_iter().filter(|word| has_tiles(word) || *word == last).collect::<Vec<_>>()
        {
            let launch = self.batch.launch(word);
            let (count, tiles) = (launch.pieces.len() as u32, launch.tiles);
            let bytes = bytemuck::cast_slice(&launch.pieces);
            let pieces = self.hands.staging.put(bytes).expect("room was kept for entries");
            self.launch_one(word, (pieces, count, tiles), (signal, u32::from(word == last)))?;
        }
        Ok(())
    }

    /// Enqueues a kernel over an array of entries with so many tiles, which sets so many signals.
    fn launch_one(
        &self,
        word: Word,
        (mut pieces, mut count, mut tiles): (u64, u32, u64),
        (mut signals, mut signal_count): (u64, u32),
    ) -> Result<(), CudaError> {
        let mut finished = self.hands.finished.base();
        let blocks = u32::try_from(tiles).unwrap_or(u32::MAX).clamp(1, self.limits.blocks);
        let mut arguments: [*mut c_void; 6] = [
            (&raw mut pieces).cast(),
            (&raw mut count).cast(),
            (&raw mut tiles).cast(),
            (&raw mut signals).cast(),
            (&raw mut signal_count).cast(),
            (&raw mut finished).cast(),
        ];
        let function = &self.hands.functions[word as usize];
        // SAFETY: these are the kernel's parameters, as `pages.cu` declares them. What they lead to stays in the ring until the
        // launch's ticket has ended; the pieces are of memory that the GPU reaches, as who added them has said; `finished` is
        // zero, since the launch before on this stream has left it so.
        unsafe { self.hands.stream.launch(function, blocks, self.limits.block_threads, &mut arguments) }
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        self.hands.staging.put(bytes).expect("room was kept for it")
    }

    /// How far the launches have come.
    pub fn progress(&mut self) -> Progress {
        if self.ended < self.launched {
            if self.look_at_word() {
                self.looks = 0;
            } else {
                self.look_at_stream();
            }
        }
        Progress { ended: self.ended, failed: self.failure }
    }

    /// Whether more launches have ended.
    fn look_at_word(&mut self) -> bool {
        // The word has the lower half of a ticket, and fewer than half of those are on their way. A launch that has just been
        // refused has a ticket, and will not tell.
        let behind = (self.launched as u32).wrapping_sub(self.hands.done.load());
        let ended = self.launched - u64::from(behind);
        let is_more = ended > self.ended;
        if is_more {
            self.ended = ended;
            self.hands.staging.ended(ended);
        }
        is_more
    }

    /// Asks the driver, which costs more than a load, now and then: a kernel that has failed signals nothing.
    fn look_at_stream(&mut self) {
        self.looks += 1;
        if self.failure.is_none() && !self.looks.is_multiple_of(LOOKS_BETWEEN_QUESTIONS) {
            return;
        }
        match self.hands.stream.is_idle() {
            Ok(false) => {}
            // Nothing is on its way any more, whatever became of it.
            Ok(true) => {
                if self.failure.is_some() {
                    self.all_ended();
                }
            }
            // Somebody's capture of a stream: it says nothing of this one.
            Err(error) if error.is_of_capture() => {}
            Err(error) => {
                // Of what has not ended nothing is certain.
                self.fail(self.ended + 1, error);
                if error.is_sticky() {
                    self.all_ended();
                }
            }
        }
    }

    fn all_ended(&mut self) {
        self.ended = self.launched;
        self.hands.staging.ended(self.launched);
    }

    /// The first failure counts. What spoils the context may be the work of any launch that has not ended, whichever call the
    /// driver says it to.
    fn fail(&mut self, launch: u64, error: CudaError) {
        if self.failure.is_none() {
            self.look_at_word();
            let first = if error.is_sticky() { self.ended + 1 } else { launch };
            self.failure = Some((first, error));
        }
    }

    /// Whether nothing is on its way.
    pub fn is_idle(&self) -> bool {
        self.ended == self.launched
    }

    /// Waits until nothing is on its way, or until then; whether nothing is. In a context that is lost nothing can be. What is on
    /// its way after this is waited for no more: when the mover is dropped, it leaves what kernels use as it is, for good.
    pub fn wait(&mut self, until: Instant) -> bool {
        loop {
            match self.hands.stream.is_idle() {
                Ok(true) => {
                    self.progress();
                    return true;
                }
                Err(error) if error.is_sticky() => return true,
                // An error of another kind says nothing of what is on its way.
                Ok(false) | Err(_) if Instant::now() < until => std::thread::yield_now(),
                Ok(false) | Err(_) => {
                    self.is_given_up = true;
                    return false;
                }
            }
        }
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        if self.owner != std::process::id() {
            return;
        }
        // Kernels read the ring, and count in memory of this mover's.
        let until = Instant::now() + if self.is_given_up { Duration::ZERO } else { LONGEST_PARTING };
        if self.wait(until) {
            // SAFETY: nobody uses it after this.
            unsafe { ManuallyDrop::drop(&mut self.hands) };
        }
    }
}

impl Done {
    fn load(&self) -> u32 {
        self.registration.load(&self.memory)
    }
}

/// Entries that a span takes at most: two ends, rows, and what is left of them.
const ENTRIES_OF_A_SPAN: usize = 4;

/// Entries that a paged op takes at most: longer pieces are sliced.
fn entries_of(piece_bytes: u64) -> usize {
    1 + (piece_bytes >> 30) as usize
}

/// Beside entries: alignment of what is put, and the signal.
const RESERVE_BYTES: usize = 256;
/// Longer lists are moved in parts.
const LONGEST_LIST: usize = 1 << 30;
/// The most that a block can have.
const MOST_BLOCK_THREADS: u32 = 1024;
/// With less than this nothing long can be moved.
const LEAST_STAGING_BYTES: usize = 64 << 10;
const LOOKS_BETWEEN_QUESTIONS: u32 = 256;
/// A kernel takes milliseconds.
const LONGEST_PARTING: Duration = Duration::from_secs(10);
