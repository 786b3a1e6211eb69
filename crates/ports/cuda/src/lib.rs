//! Moves KV pages and tokens between GPU memories, and between those and the host's.
//!
//! What is here so far: the kernel that moves pieces of pages ([`moves`] says what it is to move), and how kernels come to be:
//! compiled by NVRTC at run time for the device at hand ([`compiler`]) and kept on disk ([`cache`]). No machine needs CUDA to
//! build this, or to pass its tests: NVRTC is looked for when it is asked for, and tests run the kernels on a CPU.
//!
//! Nothing in here has run on a GPU yet.

pub mod cache;
pub mod compiler;
pub mod driver;
#[cfg(feature = "fake")]
pub mod fake;
mod gpu;
mod mover;
pub mod moves;
pub mod nvml;
pub mod sharing;
mod staging;

pub use gpu::{Export, Gpu, GpuError, GpuMemory};
pub use mover::{Ends, Limits, Mover};

/// A kernel's source in CUDA C++, without any header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The file, for the compiler's messages.
    pub name: &'static str,
    /// What is compiled.
    pub source: &'static str,
    /// The functions that can be launched.
    pub functions: &'static [&'static str],
}

/// Every kernel there is.
pub const KERNELS: [Kernel; 1] = [PAGES];

/// Moves pieces of pages: see [`moves::Batch`].
pub const PAGES: Kernel = Kernel {
    name: "pages.cu",
    source: include_str!("kernels/pages.cu"),
    functions: &["crossdock_move_words_16", "crossdock_move_words_4", "crossdock_move_words_1"],
};
