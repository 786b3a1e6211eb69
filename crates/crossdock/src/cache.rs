//! Memory for a cache, in one step.

use crossdock_kv::CacheLayout;
use crossdock_memory::{AllocateOptions, Memory, PagePool, PoolOptions};

use crate::Error;

/// Allocates the regions that a layout names, and a pool over its pages. Peers on the same host map such memory.
pub fn allocate(layout: &CacheLayout) -> Result<(Vec<Memory>, PagePool), Error> {
    let regions = layout.buffers().map(|buffer| buffer.region + 1).max().unwrap_or(0);
    let memory = (0..regions)
        .map(|region| Memory::allocate(layout.bytes_needed(region) as usize, &AllocateOptions::default()))
        .collect::<Result<_, _>>()?;
    Ok((memory, PagePool::new(layout.pages(), PoolOptions::default())))
}
