//! Moves KV pages and tokens between GPU memories, and between those and the host's: the cuda port.
//!
//! **Memory** of a GPU is a [`Memory`](crossdock_memory::Memory) like any other: [`Gpu::allocate`] makes it (VMM, zeroed, for every
//! handle that was tried and works), [`Gpu::adopt`] takes what an engine allocated, if the driver says that it can be shared, and
//! else says why not and what to do ([`sharing`]). `read`, `write` and `fill` work on it, by copies through pinned memory.
//!
//! **How bytes move.** A [`CudaPort`] is one GPU. What peers register is mapped into this process: physical pieces by descriptors
//! that pass over a Unix socket, by fabric handles, `cudaMalloc`'s by IPC tokens; the host's memory by its memfd. All ops of one
//! `post` become one launch for each length of words ([`Mover`], [`moves`]): pieces of any length by the page lists of both sides,
//! on a bounded number of blocks; long stretches can go by copy engines ([`CopyEngines`]). Launches go on behind the port's back.
//! The last kernel of each stores its number in pinned memory, behind all its bytes; the CPU finds it there, and tells.
//!
//! **When bytes can be seen.** `Done` and the immediate come when a launch has ended: its bytes are in place (`Landed`). A kernel or a
//! stream that waits for what the receiver advances then ([`Arrivals`]) sees them, too (`Visible`). A source must be complete when
//! it is posted: work that fills it on another stream has to have ended by then.
//!
//! **All else**, how ends find each other and when a lane is down, is what [`crossdock_host`] does. This end has stopped when its
//! launches for the lane have ended, too. Whether a killed process's kernels have stopped when the kernel says that it is dead is the
//! GPU driver's to keep, and to be measured: see `docs/gpu/`.
//!
//! **Kernels** are CUDA C++ without headers, compiled at run time by NVRTC for the device at hand ([`compiler`]) and kept on disk
//! ([`cache`]); where NVRTC is not found, the driver compiles PTX that comes along. CUDA is looked for when it is asked for:
//! everything builds without it, and tests run over a driver that is software (feature `fake`).
//!
//! **Nothing in here has run on a GPU yet.** `scripts/gpu-check` is what has to pass there.

mod arrivals;
pub mod cache;
pub mod compiler;
pub mod driver;
#[cfg(feature = "fake")]
pub mod fake;
mod gpu;
mod medium;
mod mover;
pub mod moves;
pub mod nvml;
mod offers;
mod port;
mod regions;
pub mod sharing;
mod staging;

pub use arrivals::Arrivals;
pub use gpu::{Export, Gpu, GpuError, GpuMemory};
pub use mover::{Ends, Limits, Mover, Progress};
pub use port::{CopyEngines, CudaCounters, CudaOptions, CudaPort, Kernels, OpenError};

/// A kernel's source in CUDA C++, without any header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The file, for the compiler's messages.
    pub name: &'static str,
    /// What is compiled.
    pub source: &'static str,
    /// The functions that can be launched.
    pub functions: &'static [&'static str],
    /// The same as PTX, where no compiler is: see [`Compiler::portable`](compiler::Compiler::portable).
    pub portable: &'static str,
}

/// Every kernel there is.
pub const KERNELS: [Kernel; 1] = [PAGES];

/// Moves pieces of pages: see [`moves::Batch`].
pub const PAGES: Kernel = Kernel {
    name: "pages.cu",
    source: include_str!("kernels/pages.cu"),
    functions: &["crossdock_move_words_16", "crossdock_move_words_4", "crossdock_move_words_1"],
    portable: include_str!("kernels/pages.ptx"),
};
