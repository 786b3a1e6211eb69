//! What the benchmark programs share: scattered pages, their content, samples, and the bare means to move bytes that
//! everything is compared with.

mod aligned;
pub mod bare;
mod content;
mod gpu;
mod memory;
mod numbers;
mod rails;
mod random;
pub mod rows;
mod words;

pub use aligned::Aligned;
pub use content::{Content, Wrong};
pub use gpu::{GpuChoice, OpenGpu};
pub use memory::anonymous;
pub use numbers::{Sample, cpu_seconds, sleeps, sleeps_here};
pub use rails::{rail_ports, rails};
pub use random::scattered;
pub use words::{LINE_WORDS, Meeting, RoundTrips, Words};
