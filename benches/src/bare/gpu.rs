//! What a GPU does with a pool by itself, in one process: no lanes, and no protocol.

use std::io;

use crossdock::Memory;
use crossdock::cuda::driver::{HostRegistration, Stream};
use crossdock::cuda::{Ends, Gpu, GpuError, Mover, OpenError};

use super::{Pages, Patience, SPIN_LIMIT, Way};
use crate::gpu::OpenGpu;

/// A pool and another memory as long, between which their GPU moves bytes.
#[derive(Debug)]
pub struct GpuPair {
    // Let go in this order: a mover that is dropped waits for what is on its way, which uses the memories.
    mover: Mover,
    stream: Stream,
    pool: Reached,
    other: Reached,
}

/// A memory, as the GPU reaches it.
#[derive(Debug)]
struct Reached {
    address: u64,
    /// Keeps the host's memory pinned.
    _pinned: Option<HostRegistration>,
    memory: Memory,
}

impl GpuPair {
    /// Of a pool of this GPU's memory, or of the host's. `other` is of either.
    pub fn new(on: &OpenGpu, pool: &Memory, other: Memory) -> Result<Self, OpenError> {
        let reached = |memory| Reached::by(&on.gpu, memory);
        let (pool, other) = (reached(pool.clone())?, reached(other)?);
        let stream = on.gpu.context().stream().map_err(GpuError::from)?;
        Ok(Self { mover: on.mover()?, stream, pool, other })
    }

    /// Copies so many bytes in one stretch, from the beginning of the one to that of the other.
    ///
    /// # Panics
    /// If one of them is shorter, as everything here does.
    pub fn stretch(&mut self, way: Way, bytes: u64) -> io::Result<()> {
        let (from, to) = self.ends(way);
        let bytes = usize::try_from(bytes).expect("it fits a memory");
        assert!(bytes <= from.memory.bytes() && bytes <= to.memory.bytes(), "a stretch beyond its memory");
        // SAFETY: both are memory that this GPU reaches, at least so long, and stay so while they are kept here; the copy has
        // ended when the wait behind it has, which fails only where the context is lost, and the copy with it.
        unsafe { self.stream.copy(to.address, from.address, bytes).map_err(io::Error::other)? };
        self.stream.synchronize().map_err(io::Error::other)
    }

    /// Moves scattered pages by the kernels of the port, as many in a launch as there is room for, and waits.
    pub fn carry(&mut self, way: Way, pages: Pages<'_>) -> io::Result<()> {
        let (from, to) = self.ends(way);
        pages.check(pages.from, from.memory.bytes());
        pages.check(pages.to, to.memory.bytes());
        let (from, to) = (from.address, to.address);
        let piece_bytes = pages.page_bytes as u64;
        let mut patience = Patience::default();
        for offset in pages.layer_offsets() {
            let ends =
                |base: u64, pages| Ends { base: base + offset as u64, stride_bytes: piece_bytes, pages };
            let (mut here, mut there) = (pages.from, pages.to);
            while !here.is_empty() {
                let room = self.mover.room_for_pages(here, there, piece_bytes).min(here.len());
                if room == 0 {
                    self.mover.launch();
                    self.look(&mut patience)?;
                    continue;
                }
                let (first, rest) = here.split_at(room);
                let (first_there, rest_there) = there.split_at(room);
                // SAFETY: both pools are memory of the GPU that this holds, and what is on its way ends before they are let go.
                unsafe { self.mover.pages(ends(from, first), ends(to, first_there), piece_bytes) };
                (here, there) = (rest, rest_there);
            }
        }
        self.mover.launch();
        while !self.mover.is_idle() {
            self.look(&mut patience)?;
        }
        self.has_not_failed()
    }

    /// Looks for launches that have ended. A GPU that ends none has nobody else to blame.
    fn look(&mut self, patience: &mut Patience) -> io::Result<()> {
        self.has_not_failed()?;
        let late = |_| io::Error::other(format!("the GPU has not finished after {SPIN_LIMIT:?}"));
        patience.spin_or_yield().map_err(late)
    }

    fn has_not_failed(&mut self) -> io::Result<()> {
        match self.mover.progress().failed {
            Some((_, error)) => Err(io::Error::other(error)),
            None => Ok(()),
        }
    }

    fn ends(&self, way: Way) -> (&Reached, &Reached) {
        match way {
            Way::Write => (&self.pool, &self.other),
            Way::Read => (&self.other, &self.pool),
        }
    }
}

impl Reached {
    fn by(gpu: &Gpu, memory: Memory) -> Result<Self, GpuError> {
        let (address, pinned) = match Gpu::memory_of(&memory) {
            Some(held) => (held.base(), None),
            None => {
                let pinned = gpu.context().register_host(&memory)?;
                (pinned.address(), Some(pinned))
            }
        };
        Ok(Self { address, _pinned: pinned, memory })
    }
}

#[cfg(test)]
mod tests {
    use crossdock::AllocateOptions;

    use super::*;
    use crate::{Content, GpuChoice, scattered};

    const PAGE_BYTES: usize = 48;
    const POOL_PAGES: u32 = 64;
    const LAYERS: u32 = 3;

    /// The bytes of one are where they belong in the other, of the GPU's memory and of the host's.
    #[test]
    fn pages_and_stretches_move_both_ways() {
        let on = GpuChoice::Software.open().unwrap();
        let bytes = PAGE_BYTES * POOL_PAGES as usize * LAYERS as usize;
        let of_gpu = || on.gpu.allocate(bytes).unwrap();
        let of_host = || Memory::allocate(bytes, &AllocateOptions::default()).unwrap();
        for (pool, other) in [(of_gpu(), of_gpu()), (of_host(), of_host())] {
            let mut pair = GpuPair::new(&on, &pool, other.clone()).unwrap();
            let list = |seed| scattered(POOL_PAGES, 20, seed);
            let (from, to) = (list(1), list(2));
            let pages = Pages {
                from: &from,
                to: &to,
                page_bytes: PAGE_BYTES,
                layer_pages: POOL_PAGES,
                layers: LAYERS,
            };
            for (salt, way, source, target) in [(1, Way::Write, &pool, &other), (2, Way::Read, &other, &pool)]
            {
                let content =
                    Content { salt, page_bytes: PAGE_BYTES, layer_pages: POOL_PAGES, layers: LAYERS };
                content.write(source, &from);
                assert_eq!(content.check(target, &from, &to).pages, 20 * u64::from(LAYERS));
                pair.carry(way, pages).unwrap();
                assert_eq!(content.check(target, &from, &to).pages, 0);

                let all: Vec<u32> = (0..POOL_PAGES).collect();
                let content = Content { salt: salt + 2, ..content };
                content.write(source, &all);
                pair.stretch(way, bytes as u64).unwrap();
                assert_eq!(content.check(target, &all, &all).pages, 0);
            }
        }
    }

    /// Lists of this length are more than the ring for them holds.
    #[test]
    fn long_lists_go_in_several_launches() {
        let mut on = GpuChoice::Software.open().unwrap();
        on.options.limits.staging_bytes = 0;
        let (pool_pages, page_bytes) = (40_000, 16);
        let memory = || on.gpu.allocate(pool_pages as usize * page_bytes).unwrap();
        let (pool, other) = (memory(), memory());
        let mut pair = GpuPair::new(&on, &pool, other.clone()).unwrap();
        let (from, to) = (scattered(pool_pages, pool_pages, 3), scattered(pool_pages, pool_pages, 4));
        let content = Content { salt: 7, page_bytes, layer_pages: pool_pages, layers: 1 };
        content.write(&pool, &from);
        let pages = Pages { from: &from, to: &to, page_bytes, layer_pages: pool_pages, layers: 1 };
        pair.carry(Way::Write, pages).unwrap();
        assert_eq!(content.check(&other, &from, &to).pages, 0);
    }
}
