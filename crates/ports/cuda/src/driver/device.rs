//! Devices, and what they can do.

use std::fmt;

use super::abi::{self, Attribute, DeviceNumber};
use super::{Context, CudaError, Driver};
use crate::compiler::Architecture;

/// One GPU.
#[derive(Clone)]
pub struct Device {
    driver: Driver,
    number: DeviceNumber,
    ordinal: u32,
}

/// What the driver says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its product name.
    pub name: String,
    /// Names the device, or its MIG instance, the world over.
    pub uuid: [u8; 16],
    /// Where it is on the PCI bus, in the form of `/sys/bus/pci/devices`.
    pub pci_address: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// What kernels are compiled for.
    pub architecture: Architecture,
    /// How many streaming multiprocessors it has.
    pub multiprocessors: u32,
    /// Whether memory can be allocated and mapped apart (VMM); everything that is shared by descriptor or fabric handle needs it.
    pub has_virtual_memory: bool,
    /// The handles by which the driver says that memory can be shared. Whether fabric handles work depends on IMEX, too:
    /// [`Context::try_sharing`] tries.
    pub handles: HandleTypes,
    /// Whether RDMA devices can reach its memory at all.
    pub has_gpu_direct_rdma: bool,
    /// The same of memory that VMM allocated.
    pub has_gpu_direct_rdma_with_vmm: bool,
    /// Whether its memory can be exported as dma-buf.
    pub has_dma_buf: bool,
    /// When what an RDMA device has written is seen by the device's kernels.
    pub writes_ordering: WritesOrdering,
    /// Whether the CPU can flush such writes (`cuFlushGPUDirectRDMAWrites`).
    pub can_flush_writes: bool,
    /// Whether memory of several devices can be one multicast object.
    pub has_multicast: bool,
    /// Whether kernels reach all of the host's memory, registered or not.
    pub reaches_pageable_memory: bool,
    /// The NUMA node of the host that is nearest.
    pub numa_node: Option<u32>,
}

/// Kinds of handles by which memory is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HandleTypes {
    /// File descriptors, between processes of one host.
    pub posix_fd: bool,
    /// Fabric handles, as far as multi-node NVLink reaches.
    pub fabric: bool,
}

/// From where on writes of RDMA devices are ordered: who waits for an arrival within the scope sees the bytes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WritesOrdering {
    /// Nowhere: they have to be flushed.
    None,
    /// On the device whose memory it is.
    Owner,
    /// On every device.
    AllDevices,
}

impl HandleTypes {
    /// Neither.
    pub const NONE: HandleTypes = HandleTypes { posix_fd: false, fabric: false };
    /// File descriptors alone.
    pub const POSIX_FD: HandleTypes = HandleTypes { posix_fd: true, fabric: false };
    /// Fabric handles alone.
    pub const FABRIC: HandleTypes = HandleTypes { posix_fd: false, fabric: true };

    pub(crate) fn from_flags(flags: u32) -> HandleTypes {
        HandleTypes { posix_fd: flags & abi::HANDLE_POSIX_FD != 0, fabric: flags & abi::HANDLE_FABRIC != 0 }
    }

    pub(crate) fn flags(self) -> u32 {
        let flag = |is: bool, flag: u32| if is { flag } else { 0 };
        flag(self.posix_fd, abi::HANDLE_POSIX_FD) | flag(self.fabric, abi::HANDLE_FABRIC)
    }
}

impl WritesOrdering {
    /// From the driver's number, which grows with the scope.
    pub fn from_number(number: i32) -> WritesOrdering {
        match number {
            ..abi::ORDERING_OWNER => WritesOrdering::None,
            abi::ORDERING_OWNER => WritesOrdering::Owner,
            _ => WritesOrdering::AllDevices,
        }
    }
}

impl Device {
    pub(super) fn new(driver: Driver, number: DeviceNumber, ordinal: u32) -> Device {
        Device { driver, number, ordinal }
    }

    pub(super) fn driver(&self) -> &Driver {
        &self.driver
    }

    pub(super) fn number(&self) -> DeviceNumber {
        self.number
    }

    /// Its place among the devices of this process.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The device's primary context in this process, the one that the CUDA runtime, and with it PyTorch, uses.
    pub fn context(&self) -> Result<Context, CudaError> {
        Context::retain(self.clone())
    }

    /// Whether this device can reach the other one's memory.
    pub fn reaches(&self, other: &Device) -> Result<bool, CudaError> {
        let mut can = 0;
        // SAFETY: the number can be written; both are devices.
        let asked =
            unsafe { (self.driver.table().cuDeviceCanAccessPeer)(&raw mut can, self.number, other.number) };
        self.driver.check("cuDeviceCanAccessPeer", asked)?;
        Ok(can != 0)
    }

    /// What the driver says of it.
    pub fn facts(&self) -> Result<Facts, CudaError> {
        let is = |attribute| Ok::<bool, CudaError>(self.attribute(attribute)?.unwrap_or(0) != 0);
        let number = |attribute| Ok::<i32, CudaError>(self.attribute(attribute)?.unwrap_or(0));
        Ok(Facts {
            name: self.text("cuDeviceGetName", self.driver.table().cuDeviceGetName)?,
            uuid: self.uuid()?,
            pci_address: self
                .text("cuDeviceGetPCIBusId", self.driver.table().cuDeviceGetPCIBusId)?
                .to_lowercase(),
            memory_bytes: self.memory_bytes()?,
            architecture: self.architecture()?,
            multiprocessors: number(Attribute::Multiprocessors)?.unsigned_abs(),
            has_virtual_memory: is(Attribute::VirtualMemoryManagement)?,
            handles: HandleTypes {
                posix_fd: is(Attribute::HandlePosixFd)?,
                fabric: is(Attribute::HandleFabric)?,
            },
            has_gpu_direct_rdma: is(Attribute::GpuDirectRdma)?,
            has_gpu_direct_rdma_with_vmm: is(Attribute::GpuDirectRdmaWithVmm)?,
            has_dma_buf: is(Attribute::DmaBuf)?,
            writes_ordering: WritesOrdering::from_number(number(Attribute::GpuDirectRdmaWritesOrdering)?),
            can_flush_writes: number(Attribute::GpuDirectRdmaFlush)? & abi::FLUSH_OPTION_HOST != 0,
            has_multicast: is(Attribute::Multicast)?,
            reaches_pageable_memory: is(Attribute::PageableMemoryAccess)?,
            numa_node: self.attribute(Attribute::HostNumaNode)?.and_then(|node| u32::try_from(node).ok()),
        })
    }

    /// What kernels are compiled for.
    pub fn architecture(&self) -> Result<Architecture, CudaError> {
        let number = |attribute| Ok::<u32, CudaError>(self.attribute(attribute)?.unwrap_or(0).unsigned_abs());
        Ok(Architecture {
            major: number(Attribute::ComputeCapabilityMajor)?,
            minor: number(Attribute::ComputeCapabilityMinor)?,
        })
    }

    /// Names the device, or its MIG instance, the world over.
    pub fn uuid(&self) -> Result<[u8; 16], CudaError> {
        let mut uuid = [0; 16];
        // SAFETY: so many bytes can be written.
        let asked = unsafe { (self.driver.table().cuDeviceGetUuid_v2)(&raw mut uuid, self.number) };
        self.driver.check("cuDeviceGetUuid", asked)?;
        Ok(uuid)
    }

    fn memory_bytes(&self) -> Result<u64, CudaError> {
        let mut bytes = 0;
        // SAFETY: the number can be written.
        let asked = unsafe { (self.driver.table().cuDeviceTotalMem_v2)(&raw mut bytes, self.number) };
        self.driver.check("cuDeviceTotalMem", asked)?;
        Ok(bytes as u64)
    }

    /// `None`: the driver is older than the attribute.
    fn attribute(&self, attribute: Attribute) -> Result<Option<i32>, CudaError> {
        let mut value = 0;
        // SAFETY: the number can be written.
        let asked = unsafe {
            (self.driver.table().cuDeviceGetAttribute)(&raw mut value, attribute as i32, self.number)
        };
        match asked {
            abi::ERROR_INVALID_VALUE => Ok(None),
            answer => self.driver.check("cuDeviceGetAttribute", answer).map(|()| Some(value)),
        }
    }

    fn text(
        &self,
        call: &'static str,
        function: unsafe extern "C" fn(*mut std::ffi::c_char, std::ffi::c_int, DeviceNumber) -> abi::Answer,
    ) -> Result<String, CudaError> {
        let mut text = [0_u8; 256];
        // SAFETY: so many bytes can be written.
        let asked = unsafe { function(text.as_mut_ptr().cast(), text.len() as std::ffi::c_int, self.number) };
        self.driver.check(call, asked)?;
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        Ok(String::from_utf8_lossy(&text[..end]).into_owned())
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Device) -> bool {
        self.number == other.number
    }
}

impl Eq for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.ordinal)
    }
}

impl fmt::Display for Device {
    /// As crossdock, and PyTorch, name it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.ordinal)
    }
}
