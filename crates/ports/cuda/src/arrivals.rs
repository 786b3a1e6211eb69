//! A word that grows, for whoever waits on a GPU: kernels read it, streams wait for it.

use crossdock_memory::{AllocateOptions, Memory};

use crate::driver::{CudaError, HostRegistration, Stream};
use crate::gpu::{Gpu, GpuError};

/// A word of the host's pinned memory that one side makes grow, and that kernels, streams and the CPU wait on.
///
/// Whoever has heard of arrivals, from a port's immediate or the end of a room, [advances](Arrivals::advance) the word. Then a
/// kernel that sees the number with an acquire at system scope (`ld.acquire.sys`), a stream that [waits](Arrivals::wait_in) for
/// it, and what runs behind either, see every byte that had arrived (`Visible`): the writer's GPU has stored them before it told
/// its CPU, that before it told this one, and this one before the word.
#[derive(Debug)]
pub struct Arrivals {
    registration: HostRegistration,
    memory: Memory,
}

impl Arrivals {
    /// A word of 0, for kernels and streams of one GPU.
    pub fn new(gpu: &Gpu) -> Result<Arrivals, GpuError> {
        let options = AllocateOptions { name: "crossdock-arrivals".into(), ..AllocateOptions::default() };
        let memory = Memory::allocate(size_of::<u32>(), &options)?;
        Ok(Arrivals { registration: gpu.context().register_host(&memory)?, memory })
    }

    /// Where kernels of the GPU find it, a `u32`.
    pub fn address(&self) -> u64 {
        self.registration.address()
    }

    /// Makes it grow. It is compared as a number of 32 bits, so it must not wrap around while somebody waits.
    pub fn advance(&self, to: u32) {
        self.registration.store(&self.memory, to);
    }

    /// How far it is, or how far a kernel has made it grow.
    pub fn now(&self) -> u32 {
        self.registration.load(&self.memory)
    }

    /// What follows in the stream waits until the word is at least `value`. Not within a graph: what is captured there would wait
    /// for the same number in every replay.
    pub fn wait_in(&self, stream: &Stream, value: u32) -> Result<(), CudaError> {
        stream.wait_value(self.address(), value)
    }
}
