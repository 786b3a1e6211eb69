//! Follows a request trace as a serving engine would: for the programs that show and measure hand-overs.
//!
//! - [`Arrival`] is a request of a [trace](crossdock_kv::trace), scaled to a machine: when it comes, how long it is, and
//!   which whole pages of it others may share.
//! - [`Dock`] is one worker's side: requests wait in it for pages, prefix pages stay in it for the next request, and
//!   make room when the pool comes under pressure.
//! - [`Handover`] is what became of a request, [`Summary`] what became of all, and [`Sheet`] a picture of that.
//!
//! Nothing here reads a clock or waits: the time is told, so that tests decide it.
#![forbid(unsafe_code)]

mod arrival;
mod cache;
mod chart;
mod dock;
mod handover;

pub use arrival::{Arrival, Block, Pace, requests};
pub use cache::{Lease, PrefixCache};
pub use chart::{ChartError, Roof, Sheet, Trail};
pub use dock::{Admitted, ArriveError, Dock, DockStats, Next, Waiting, watermarks};
pub use handover::{Came, Handover, Summary, quantile};
