//! Tokens reach their experts and come back.
//!
//! The ranks of a group hold the experts of a mixture-of-experts layer. In a step each rank *dispatches* its tokens to
//! the ranks that hold the experts it chose for them, and *combines* what those ranks computed. Two modes, with the
//! semantics that DeepEP made usual: *throughput* (rows by source rank and token, for prefill) and *latency*
//! (expert-major rows, quantised on the way, for decode).
//!
//! - What a group agrees on: [`GroupConfig`], checked whole by [`GroupConfig::validate`], compared by its
//!   [`fingerprint`](GroupConfig::fingerprint), weighed by [`GroupConfig::sizes`].
//! - Who holds which expert: [`Experts`]. Who gets how many tokens: [`Layout`]. Where they go: [`Route`].
//! - Numbers: [`Bf16`], [`E4m3`], [`Ue8m0`]; [`Quantiser`] and [`Summer`] do whole rows.
//!
//! # Order
//! Every output order is fixed by (source rank, source token), and every sum by the order of ranks or of choices. So
//! equal inputs give equal bits, whatever arrives first.

#![deny(unsafe_code)]

mod arena;
mod arrivals;
mod bytes;
mod config;
mod copy_rate;
mod error;
mod experts;
#[cfg(test)]
#[allow(unsafe_code)]
mod fenced;
mod group;
mod hearing;
#[cfg(all(test, not(loom)))]
#[allow(unsafe_code)]
mod hostile_tests;
mod incoming;
mod keeper;
mod latency;
mod layout;
mod meet;
mod note;
mod number;
mod outgoing;
mod pace;
#[doc(hidden)]
pub mod planted;
mod poster;
#[allow(unsafe_code)]
mod quantise;
mod region;
mod report;
mod results;
mod route;
mod slot;
#[allow(unsafe_code)]
mod sum;
mod throughput;
mod vectors;
mod words;

pub use arrivals::Patience;
pub use config::{BLOCK_CHANNELS, Difference, GroupConfig, Payload, Sizes, Violation, Violations};
pub use error::{Advice, Corrupted, EpError, GroupError};
pub use experts::Experts;
pub use group::{Group, GroupOptions, LostWeight, Mourner};
pub use latency::{LatencyCombine, LatencyOutputs, LatencyStep, ScaleOrder};
pub use layout::{Layout, LayoutError};
pub use meet::{MeetError, introduction};
pub use number::{Bf16, E4m3, Ue8m0};
#[cfg(feature = "planted-bugs")]
pub use pace::Pace;
pub use quantise::{Quantiser, ScaleRule};
pub use report::Report;
pub use route::{Route, RouteError};
pub use slot::{Dispatch, Rows, Scales, Slot, Tokens};
pub use sum::Summer;
pub use throughput::{Expanded, ThroughputCombine, ThroughputOutputs, ThroughputStep};
pub use vectors::Vectors;
