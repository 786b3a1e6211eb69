//! What the fault tests and the soak have in common: a proxy that breaks connections, workers that check every byte, and
//! a count of what a process holds.
#![forbid(unsafe_code)]

mod census;
mod chance;
mod gpu;
mod proxy;
mod room;
mod worker;

pub use census::Census;
pub use chance::Chance;
pub use gpu::GpuChoice;
pub use proxy::{Fate, Proxy, ProxyCounts};
pub use room::{Heard, Plan, Side, is_typed};
pub use worker::{Bench, Worker, WorkerOptions};
