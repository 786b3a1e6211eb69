//! Memory for a cache, in one step.

use crossdock_cuda::Gpu;
use crossdock_kv::CacheLayout;
use crossdock_memory::{AllocateOptions, Memory, PagePool, PoolOptions};

use crate::Error;

/// Allocates the regions that a layout names, and a pool over its pages. Peers on the same host map such memory.
pub fn allocate(layout: &CacheLayout) -> Result<(Vec<Memory>, PagePool), Error> {
    allocate_with(layout, |bytes| Ok(Memory::allocate(bytes, &AllocateOptions::default())?))
}

/// The same on a GPU: for [`PortConfig::Cuda`](crate::PortConfig::Cuda) of that GPU, and for RDMA devices that reach it.
pub fn allocate_on(gpu: &Gpu, layout: &CacheLayout) -> Result<(Vec<Memory>, PagePool), Error> {
    allocate_with(layout, |bytes| Ok(gpu.allocate(bytes)?))
}

fn allocate_with(
    layout: &CacheLayout,
    allocate: impl Fn(usize) -> Result<Memory, Error>,
) -> Result<(Vec<Memory>, PagePool), Error> {
    let regions = layout.buffers().map(|buffer| buffer.region + 1).max().unwrap_or(0);
    let memory = (0..regions)
        .map(|region| allocate(layout.bytes_needed(region) as usize))
        .collect::<Result<_, _>>()?;
    Ok((memory, PagePool::new(layout.pages(), PoolOptions::default())))
}
