//! What the driver says of an address.

use std::ffi::c_void;

use super::abi::{self, PointerAttribute};
use super::{Context, CudaError, HandleTypes};

/// What is at an address, however it was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointerFacts {
    /// Where the bytes are.
    pub residence: Residence,
    /// The allocation that it lies in; for memory of VMM the range that was reserved.
    pub allocation: Range,
    /// Of memory of VMM, the one piece that is mapped here.
    pub mapping: Option<Range>,
    /// Whether VMM has mapped it: the caching allocator of PyTorch does so with expandable segments.
    pub is_virtual: bool,
    /// Whether it comes from a pool that orders allocations by streams (`cudaMallocAsync`).
    pub is_of_pool: bool,
    /// Whether legacy CUDA IPC can share it: `cudaMalloc`.
    pub has_legacy_ipc: bool,
    /// The handles that it was allocated for.
    pub handles: HandleTypes,
    /// Whether RDMA devices can reach it.
    pub has_gpu_direct_rdma: bool,
}

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residence {
    /// The driver knows nothing of them: ordinary memory of the host, or no memory at all.
    Unknown,
    /// In the host's memory, pinned.
    Host,
    /// They move between the host and devices (`cudaMallocManaged`).
    Managed,
    /// On a device, by its place among those of this process.
    Device {
        /// Which.
        ordinal: u32,
    },
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub start: u64,
    /// How long it is.
    pub bytes: u64,
}

impl Range {
    /// Whether so many bytes from there lie inside.
    pub fn holds(self, address: u64, bytes: u64) -> bool {
        let end = address.checked_add(bytes);
        address >= self.start && end.is_some_and(|end| end <= self.start.saturating_add(self.bytes))
    }
}

impl Context {
    /// What the driver says of an address.
    pub fn facts_of(&self, address: u64) -> Result<PointerFacts, CudaError> {
        let ask = |what| self.ask(what, address);
        let is = |what| Ok::<bool, CudaError>(ask(what)?.unwrap_or(0) as u32 != 0);
        let kind = ask(PointerAttribute::MemoryType)?.map(|kind| kind as u32);
        let residence = match kind {
            Some(_) if is(PointerAttribute::IsManaged)? => Residence::Managed,
            Some(abi::MEMORY_TYPE_DEVICE) => {
                Residence::Device { ordinal: ask(PointerAttribute::DeviceOrdinal)?.unwrap_or(0) as u32 }
            }
            Some(abi::MEMORY_TYPE_HOST) => Residence::Host,
            _ => Residence::Unknown,
        };
        let range = |start, bytes| {
            Ok::<Option<Range>, CudaError>(match (ask(start)?, ask(bytes)?) {
                (Some(start), Some(bytes)) if bytes > 0 => Some(Range { start, bytes }),
                _ => None,
            })
        };
        let has_legacy_ipc = is(PointerAttribute::IsLegacyIpcCapable)?;
        let is_virtual = match residence {
            Residence::Device { .. } if !has_legacy_ipc => {
                self.physical_at(address, 0, HandleTypes::NONE)?.is_some()
            }
            _ => false,
        };
        Ok(PointerFacts {
            residence,
            allocation: range(PointerAttribute::RangeStart, PointerAttribute::RangeBytes)?
                .unwrap_or_default(),
            mapping: match is_virtual {
                true => range(PointerAttribute::MappingStart, PointerAttribute::MappingBytes)?,
                false => None,
            },
            is_virtual,
            is_of_pool: ask(PointerAttribute::Pool)?.unwrap_or(0) != 0,
            has_legacy_ipc,
            handles: HandleTypes::from_flags(ask(PointerAttribute::AllowedHandleTypes)?.unwrap_or(0) as u32),
            has_gpu_direct_rdma: is(PointerAttribute::IsGpuDirectRdmaCapable)?,
        })
    }

    /// One attribute; `None` where the address, or the driver, has none. Attributes of fewer than eight bytes leave zeros.
    fn ask(&self, what: PointerAttribute, address: u64) -> Result<Option<u64>, CudaError> {
        let mut value = 0_u64;
        let asked = self.call("cuPointerGetAttribute", |table| {
            // SAFETY: no attribute that is asked for has more than eight bytes, and so many can be written.
            unsafe { (table.cuPointerGetAttribute)((&raw mut value).cast::<c_void>(), what as i32, address) }
        });
        match asked {
            Ok(()) => Ok(Some(value)),
            Err(error) if matches!(error.code, abi::ERROR_INVALID_VALUE | abi::ERROR_NOT_SUPPORTED) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
