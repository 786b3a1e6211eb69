//! The CUDA driver's types and numbers, as far as they are used here.
//!
//! Whatever the driver may write is a plain integer: an answer, or a set of flags, that is newer than this code is a number that
//! it does not know, where a Rust `enum` would be undefined behaviour. A test compares sizes, offsets and numbers with those of
//! `cudarc`.

use std::ffi::{c_int, c_uint, c_void};

/// `CUresult`.
pub type Answer = c_int;
/// `CUdevice`.
pub type DeviceNumber = c_int;
/// `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`.
pub type Handle = *mut c_void;
/// `CUdeviceptr`: an address in the one address space that the host and all devices share.
pub type Address = u64;
/// `CUmemGenericAllocationHandle`.
pub type Physical = u64;

pub const SUCCESS: Answer = 0;
pub const ERROR_INVALID_VALUE: Answer = 1;
pub const ERROR_OUT_OF_MEMORY: Answer = 2;
pub const ERROR_NOT_INITIALIZED: Answer = 3;
pub const ERROR_NO_DEVICE: Answer = 100;
#[cfg(feature = "fake")]
pub const ERROR_INVALID_HANDLE: Answer = 400;
#[cfg(feature = "fake")]
pub const ERROR_NOT_FOUND: Answer = 500;
pub const ERROR_NOT_READY: Answer = 600;
pub const ERROR_ILLEGAL_ADDRESS: Answer = 700;
pub const ERROR_HOST_MEMORY_ALREADY_REGISTERED: Answer = 712;
pub const ERROR_NOT_PERMITTED: Answer = 800;
pub const ERROR_NOT_SUPPORTED: Answer = 801;
pub const ERROR_SYSTEM_NOT_READY: Answer = 802;
pub const ERROR_SYSTEM_DRIVER_MISMATCH: Answer = 803;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Location {
    pub kind: c_uint,
    pub number: c_int,
}

pub const LOCATION_DEVICE: c_uint = 1;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Properties {
    pub kind: c_uint,
    /// `HANDLE_*`, several at once.
    pub handle_types: c_uint,
    pub location: Location,
    pub win32: *const c_void,
    pub compression: u8,
    pub gpu_direct_rdma_capable: u8,
    pub usage: u16,
    pub reserved: [u8; 4],
}

pub const ALLOCATION_PINNED: c_uint = 1;
pub const HANDLE_POSIX_FD: c_uint = 1;
pub const HANDLE_FABRIC: c_uint = 8;
pub const GRANULARITY_RECOMMENDED: c_uint = 1;

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub location: Location,
    pub flags: c_uint,
}

pub const ACCESS_READ_WRITE: c_uint = 3;

/// `CUmemFabricHandle`.
pub type FabricHandle = [u8; 64];
/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

pub const IPC_LAZY_ENABLE_PEER_ACCESS: c_uint = 1;
/// `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
pub const RANGE_DMA_BUF: c_int = 1;

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
pub const CAPTURE_RELAXED: c_int = 2;
pub const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_STREAM_WAIT_VALUE_GEQ`: compared around the end of 32 bits.
pub const WAIT_VALUE_GEQ: c_uint = 0;
pub const EVENT_DISABLE_TIMING: c_uint = 2;
/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`.
pub const HOST_REGISTER_FLAGS: c_uint = 1 | 2;

/// `CUdevice_attribute`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(i32)]
pub enum Attribute {
    Multiprocessors = 16,
    ComputeCapabilityMajor = 75,
    ComputeCapabilityMinor = 76,
    PageableMemoryAccess = 88,
    VirtualMemoryManagement = 102,
    HandlePosixFd = 103,
    GpuDirectRdma = 116,
    GpuDirectRdmaFlush = 117,
    GpuDirectRdmaWritesOrdering = 118,
    GpuDirectRdmaWithVmm = 110,
    DmaBuf = 124,
    HandleFabric = 128,
    Multicast = 132,
    HostNumaNode = 134,
}

/// `CUpointer_attribute`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum PointerAttribute {
    MemoryType = 2,
    IsManaged = 8,
    DeviceOrdinal = 9,
    IsLegacyIpcCapable = 10,
    RangeStart = 11,
    RangeBytes = 12,
    AllowedHandleTypes = 14,
    IsGpuDirectRdmaCapable = 15,
    Pool = 17,
    MappingBytes = 18,
    MappingStart = 19,
}

/// `CUmemorytype`: the two that a pointer of this address space can have.
pub const MEMORY_TYPE_HOST: c_uint = 1;
pub const MEMORY_TYPE_DEVICE: c_uint = 2;

/// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST`.
pub const FLUSH_OPTION_HOST: c_int = 1;
/// `CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER`: from here on, what one device has written by RDMA is seen by its owner's kernels
/// without a flush.
pub const ORDERING_OWNER: c_int = 100;

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use cudarc::driver::sys;

    use super::*;

    #[test]
    fn structures_are_laid_out_as_the_drivers() {
        assert_eq!(size_of::<Location>(), size_of::<sys::CUmemLocation>());
        assert_eq!(size_of::<Properties>(), size_of::<sys::CUmemAllocationProp>());
        let ours = [
            offset_of!(Properties, kind),
            offset_of!(Properties, handle_types),
            offset_of!(Properties, location),
            offset_of!(Properties, win32),
            offset_of!(Properties, compression),
        ];
        let theirs = [
            offset_of!(sys::CUmemAllocationProp, type_),
            offset_of!(sys::CUmemAllocationProp, requestedHandleTypes),
            offset_of!(sys::CUmemAllocationProp, location),
            offset_of!(sys::CUmemAllocationProp, win32HandleMetaData),
            offset_of!(sys::CUmemAllocationProp, allocFlags),
        ];
        assert_eq!(ours, theirs);
        assert_eq!(size_of::<Access>(), size_of::<sys::CUmemAccessDesc>());
        assert_eq!(offset_of!(Access, flags), offset_of!(sys::CUmemAccessDesc, flags));
        assert_eq!(size_of::<FabricHandle>(), size_of::<sys::CUmemFabricHandle>());
        assert_eq!(size_of::<IpcHandle>(), size_of::<sys::CUipcMemHandle>());
    }

    #[test]
    fn numbers_are_the_drivers() {
        use sys::CUdevice_attribute as A;
        use sys::CUpointer_attribute as P;
        use sys::CUresult as R;
        let devices = [
            (Attribute::Multiprocessors, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            (Attribute::ComputeCapabilityMajor, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            (Attribute::ComputeCapabilityMinor, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
            (Attribute::PageableMemoryAccess, A::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS),
            (Attribute::VirtualMemoryManagement, A::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED),
            (Attribute::HandlePosixFd, A::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
            (Attribute::GpuDirectRdma, A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED),
            (Attribute::GpuDirectRdmaFlush, A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS),
            (Attribute::GpuDirectRdmaWritesOrdering, A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING),
            (Attribute::GpuDirectRdmaWithVmm, A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED),
            (Attribute::DmaBuf, A::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED),
            (Attribute::HandleFabric, A::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED),
            (Attribute::Multicast, A::CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED),
            (Attribute::HostNumaNode, A::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID),
        ];
        for (ours, theirs) in devices {
            assert_eq!(ours as i32, theirs as i32, "{ours:?}");
        }
        let pointers = [
            (PointerAttribute::MemoryType, P::CU_POINTER_ATTRIBUTE_MEMORY_TYPE),
            (PointerAttribute::IsManaged, P::CU_POINTER_ATTRIBUTE_IS_MANAGED),
            (PointerAttribute::DeviceOrdinal, P::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL),
            (PointerAttribute::IsLegacyIpcCapable, P::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE),
            (PointerAttribute::RangeStart, P::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR),
            (PointerAttribute::RangeBytes, P::CU_POINTER_ATTRIBUTE_RANGE_SIZE),
            (PointerAttribute::AllowedHandleTypes, P::CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES),
            (PointerAttribute::IsGpuDirectRdmaCapable, P::CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE),
            (PointerAttribute::Pool, P::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE),
            (PointerAttribute::MappingBytes, P::CU_POINTER_ATTRIBUTE_MAPPING_SIZE),
            (PointerAttribute::MappingStart, P::CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR),
        ];
        for (ours, theirs) in pointers {
            assert_eq!(ours as i32, theirs as i32, "{ours:?}");
        }
        let answers = [
            (SUCCESS, R::CUDA_SUCCESS),
            (ERROR_INVALID_VALUE, R::CUDA_ERROR_INVALID_VALUE),
            (ERROR_OUT_OF_MEMORY, R::CUDA_ERROR_OUT_OF_MEMORY),
            (ERROR_NOT_INITIALIZED, R::CUDA_ERROR_NOT_INITIALIZED),
            (ERROR_NO_DEVICE, R::CUDA_ERROR_NO_DEVICE),
            #[cfg(feature = "fake")]
            (ERROR_INVALID_HANDLE, R::CUDA_ERROR_INVALID_HANDLE),
            #[cfg(feature = "fake")]
            (ERROR_NOT_FOUND, R::CUDA_ERROR_NOT_FOUND),
            (ERROR_NOT_READY, R::CUDA_ERROR_NOT_READY),
            (ERROR_ILLEGAL_ADDRESS, R::CUDA_ERROR_ILLEGAL_ADDRESS),
            (ERROR_HOST_MEMORY_ALREADY_REGISTERED, R::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED),
            (ERROR_NOT_PERMITTED, R::CUDA_ERROR_NOT_PERMITTED),
            (ERROR_NOT_SUPPORTED, R::CUDA_ERROR_NOT_SUPPORTED),
            (ERROR_SYSTEM_NOT_READY, R::CUDA_ERROR_SYSTEM_NOT_READY),
            (ERROR_SYSTEM_DRIVER_MISMATCH, R::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH),
        ];
        for (ours, theirs) in answers {
            assert_eq!(ours, theirs as i32, "{theirs:?}");
        }
        let flags = [
            (LOCATION_DEVICE, sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as u32),
            (ALLOCATION_PINNED, sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED as u32),
            (HANDLE_POSIX_FD, sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.0),
            (HANDLE_FABRIC, sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC.0),
            (
                GRANULARITY_RECOMMENDED,
                sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED as u32,
            ),
            (ACCESS_READ_WRITE, sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE as u32),
            (IPC_LAZY_ENABLE_PEER_ACCESS, sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32),
            (RANGE_DMA_BUF as u32, sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD as u32),
            (CAPTURE_RELAXED as u32, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as u32),
            (STREAM_NON_BLOCKING, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32),
            (WAIT_VALUE_GEQ, sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32),
            (EVENT_DISABLE_TIMING, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32),
            (HOST_REGISTER_FLAGS, sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP),
            (MEMORY_TYPE_HOST, sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32),
            (MEMORY_TYPE_DEVICE, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32),
        ];
        for (number, (ours, theirs)) in flags.into_iter().enumerate() {
            assert_eq!(ours, theirs, "flag {number}");
        }
        let option = sys::CUflushGPUDirectRDMAWritesOptions::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST;
        assert_eq!(FLUSH_OPTION_HOST, option as i32);
        let ordering = sys::CUGPUDirectRDMAWritesOrdering::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER;
        assert_eq!(ORDERING_OWNER, ordering as i32);
    }
}
