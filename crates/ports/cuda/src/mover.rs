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

use crate::driver::{CudaError, Function, HostRegistration, Module, Stream};
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
    failure: Option<CudaError>,
    limits: Limits,
    gpu: Gpu,
}

/// What kernels on their way use.
#[derive(Debug)]
struct Hands {
    stream: Stream,
    functions: [Function; Word::ALL.len()],
    staging: Staging,
    /// Counted by blocks that have finished; the GPU's.
    finished: Memory,
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
        let context = gpu.context();
        let module = context.load(image)?;
        let Kernel { functions, .. } = PAGES;
        let staging = Staging::new(context, limits.staging_bytes.max(LEAST_STAGING_BYTES));
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
        let hands = Hands {
            stream: context.stream()?,
            functions: [of_word(first, &module)?, of_word(second, &module)?, of_word(third, &module)?],
            staging,
            finished: gpu.allocate(4)?,
            done: Done { registration: context.register_host(&memory)?, memory },
        };
        Ok(Mover {
            hands: ManuallyDrop::new(hands),
            batch: Batch::new(limits.block_threads),
            lists: [None; 2],
            launched: 0,
            ended: 0,
            looks: 0,
            failure: None,
            limits: Limits {
                blocks: limits.blocks.max(1),
                block_threads: limits.block_threads.clamp(1, 1024),
                launches: limits.launches.clamp(1, 1 << 30),
                ..limits
            },
            gpu: gpu.clone(),
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The ticket of what is being gathered, and of all that is added until [`launch`](Mover::launch).
    pub fn ticket(&self) -> u64 {
        self.launched + 1
    }

    /// Adds a stretch of bytes; false: there is no room now.
    pub fn span(&mut self, from: u64, to: u64, bytes: u64) -> bool {
        if !self.has_room(ENTRIES_OF_A_SPAN) {
            return false;
        }
        self.batch.span(from, to, bytes);
        true
    }

    /// Adds pieces, as many of the first as there is room for, and says how many.
    ///
    /// Both lists are of one length. All pieces lie in memory that this GPU reaches, and no two overlap where they are written.
    pub fn pages(&mut self, from: Ends<'_>, to: Ends<'_>, piece_bytes: u64) -> usize {
        debug_assert_eq!(from.pages.len(), to.pages.len());
        if !self.has_room(entries_of(piece_bytes)) {
            return 0;
        }
        let (known_from, known_to) = (self.known(0, from.pages), self.known(1, to.pages));
        let (count, from_pages, to_pages) = match (known_from, known_to) {
            (Some(from_pages), Some(to_pages)) => (from.pages.len(), from_pages, to_pages),
            _ => {
                // Two stretches of one length, and behind them the entries.
                let reserve =
                    (self.batch.entries() + entries_of(piece_bytes)) * size_of::<Pieces>() + RESERVE_BYTES;
                let room = self.hands.staging.room().saturating_sub(reserve) / (2 * size_of::<u32>());
                let count = from.pages.len().min(room.min(LONGEST_LIST));
                if count == 0 {
                    return 0;
                }
                let Some(from_pages) = self.stage(0, &from.pages[..count]) else { return 0 };
                let Some(to_pages) = self.stage(1, &to.pages[..count]) else { return 0 };
                (count, from_pages, to_pages)
            }
        };
        let side = |ends: Ends<'_>, pages| Side {
            base: ends.base,
            stride_bytes: ends.stride_bytes,
            pages: Some(pages),
        };
        self.batch.pages(side(from, from_pages), side(to, to_pages), piece_bytes, count as u64);
        count
    }

    /// Where a list is that was staged since the last launch.
    fn known(&self, which: usize, pages: &[u32]) -> Option<u64> {
        let staged = self.lists[which]?;
        (staged.at == pages.as_ptr().addr() && staged.length == pages.len()).then_some(staged.address)
    }

    fn stage(&mut self, which: usize, pages: &[u32]) -> Option<u64> {
        let address = self.hands.staging.put(bytemuck::cast_slice(pages))?;
        self.lists[which] = Some(Staged { at: pages.as_ptr().addr(), length: pages.len(), address });
        Some(address)
    }

    /// Whether so many entries more can be launched with what is gathered.
    fn has_room(&self, entries: usize) -> bool {
        let bytes = (self.batch.entries() + entries) * size_of::<Pieces>() + RESERVE_BYTES;
        self.failure.is_none()
            && self.launched - self.ended < self.limits.launches
            && self.hands.staging.room() >= bytes
    }

    /// Forgets which lists were staged: who owns them may change them now.
    pub fn lists_may_change(&mut self) {
        self.lists = [None; 2];
    }

    /// Launches what is gathered, if anything is.
    pub fn launch(&mut self) -> Result<(), CudaError> {
        self.lists_may_change();
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if self.batch.entries() == 0 {
            return Ok(());
        }
        let launched = self.launch_all();
        self.batch.clear();
        if let Err(error) = launched {
            self.failure = Some(error);
        }
        launched
    }

    fn launch_all(&mut self) -> Result<(), CudaError> {
        let ticket = self.ticket();
        let signal = Signal { at: self.hands.done.registration.address(), value: ticket as u32, reserved: 0 };
        let signal = self.put(bytemuck::bytes_of(&signal));
        let words = Word::ALL.into_iter().filter(|&word| self.batch.launch(word).tiles > 0);
        let words: Vec<Word> = words.collect();
        let finished = Gpu::memory_of(&self.hands.finished).expect("a GPU's").base();
        for (nth, &word) in words.iter().enumerate() {
            let launch = self.batch.launch(word);
            let (mut count, mut tiles) = (launch.pieces.len() as u32, launch.tiles);
            let bytes = bytemuck::cast_slice(&launch.pieces);
            let mut pieces = self.hands.staging.put(bytes).expect("room was kept for entries");
            let (mut signals, mut finished) = (signal, finished);
            let mut signal_count = u32::from(nth + 1 == words.len());
            let blocks = u32::try_from(tiles).unwrap_or(u32::MAX).min(self.limits.blocks);
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
            unsafe { self.hands.stream.launch(function, blocks, self.limits.block_threads, &mut arguments)? };
        }
        self.hands.staging.launched(ticket);
        self.launched = ticket;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        self.hands.staging.put(bytes).expect("room was kept for it")
    }

    /// The last ticket that has ended; or what has failed, with everything that has not ended by then.
    pub fn ended(&mut self) -> Result<u64, CudaError> {
        if self.ended < self.launched {
            // The word has the lower half of a ticket, and fewer than half of those are on their way.
            let behind = (self.launched as u32).wrapping_sub(self.hands.done.load());
            let ended = self.launched - u64::from(behind);
            if ended > self.ended {
                self.ended = ended;
                self.looks = 0;
                self.hands.staging.ended(ended);
            } else if self.failure.is_none() {
                self.look_for_failure();
            }
        }
        match self.failure {
            Some(failure) => Err(failure),
            None => Ok(self.ended),
        }
    }

    /// Asks the driver, which costs more than a load, now and then.
    fn look_for_failure(&mut self) {
        self.looks += 1;
        if self.looks.is_multiple_of(LOOKS_BETWEEN_QUESTIONS)
            && let Err(error) = self.hands.stream.is_idle()
        {
            self.failure = Some(error);
        }
    }

    /// Whether nothing is on its way.
    pub fn is_idle(&self) -> bool {
        self.ended == self.launched
    }

    /// Waits until nothing is on its way, or until then; whether nothing is. In a context that is lost nothing can be.
    pub fn wait(&mut self, until: Instant) -> bool {
        loop {
            match self.hands.stream.is_idle() {
                Err(_) => return true,
                Ok(true) => {
                    let _ = self.ended();
                    return true;
                }
                Ok(false) if Instant::now() >= until => return false,
                Ok(false) => std::thread::yield_now(),
            }
        }
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // Kernels read the ring, and count in memory of this mover's. Where a GPU has come to a standstill they keep both for
        // good.
        if self.wait(Instant::now() + LONGEST_PARTING) {
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
/// With less than this nothing long can be moved.
const LEAST_STAGING_BYTES: usize = 64 << 10;
const LOOKS_BETWEEN_QUESTIONS: u32 = 256;
/// A kernel takes milliseconds.
const LONGEST_PARTING: Duration = Duration::from_secs(10);
