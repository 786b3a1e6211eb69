//! Memory that ports can register, where pages lie in it, and who owns each page.
//!
//! - [`Memory`] is a range of memory: of the host's, allocated here (a sealed memfd that a peer on the same host can map)
//!   or brought by the caller; or of a device's ([`DeviceMemory`]).
//! - [`PageLayout`] says where page `i` of a buffer lies.
//! - [`PagePool`] knows the state of every page. It hands out [`PageSet`] (exclusive, writable), which becomes
//!   [`GrantedPages`] while a peer may write it, or [`PageRef`] (shared, read only).
//! - [`copy`] moves scattered pieces at the speed of the memory, for whoever has mapped both ends.
//!
//! Ownership is the proof: a page that a peer can still write is not in any `PageSet`, so using it again does not
//! compile; and where an engine allocates by page id, [`PagePool::adopt`] refuses it.
#![deny(unsafe_code)]

pub mod copy;
mod device;
mod layout;
mod memory;
mod pages;
mod pool;
mod prefetch;

pub use device::{DeviceFailed, DeviceMemory};
pub use layout::{LayoutError, PageLayout};
pub use memory::{AccessError, AllocateOptions, HugePages, Memory, MemoryError, MemoryKind, OutOfRange};
pub use pages::{GrantedPages, PageRef, PageSet};
pub use pool::{
    MAX_PAGES, PagePool, PoolError, PoolOptions, PoolStats, QuarantineEntry, QuarantineReason, Until,
};
pub use prefetch::{prefetch_head_read, prefetch_head_write, prefetch_read, prefetch_write};
