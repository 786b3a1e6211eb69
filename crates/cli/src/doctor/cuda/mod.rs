//! What the CUDA driver and NVML say of the GPUs, and what comes of trying. A driver that is broken hangs, or takes its
//! process with it: so [`ask`] starts a process of its own for it, and listens to what that [answers](answer).

mod child;
mod look;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use child::{Options, answer, ask};
#[cfg(test)]
pub use look::devices;

/// What was heard of both libraries.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cuda {
    pub driver: Answer<Driver>,
    pub nvml: Answer<Nvml>,
}

/// What comes of asking.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<T> {
    Told(T),
    /// It is not there, or refuses.
    Refused(Reason),
    /// The process that asked has not lived to tell: how it ended.
    Lost(String),
}

/// Why something is not, and what can be done about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    pub says: String,
    pub advice: String,
}

/// The CUDA driver.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Driver {
    /// The newest CUDA that it serves: 12080 is 12.8.
    pub version: u32,
    pub devices: Vec<Device>,
}

/// A device of this process, as the driver tells it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Device {
    /// Its place among those of this process: `cuda:0`.
    pub ordinal: u32,
    pub name: String,
    /// As `nvidia-smi -L` writes it, without the word before.
    pub uuid: String,
    pub pci_address: String,
    pub memory_bytes: u64,
    /// Its compute capability, `9.0`.
    pub compute_capability: String,
    pub multiprocessors: u32,
    pub has_virtual_memory: bool,
    /// The handles that the driver claims for its memory.
    pub claims: Claims,
    pub has_gpu_direct_rdma: bool,
    /// The same of memory that VMM allocated.
    pub has_gpu_direct_rdma_with_vmm: bool,
    pub writes_ordering: WritesOrdering,
    pub can_flush_writes: bool,
    pub has_multicast: bool,
    pub reaches_pageable_memory: bool,
    pub numa_node: Option<u32>,
    /// The other devices whose memory it reaches.
    pub reaches: Vec<u32>,
    pub tried: Tried,
}

/// By which handles the driver says that memory can be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub posix_fd: bool,
    pub fabric: bool,
    pub dma_buf: bool,
}

/// From where on what an RDMA device has written is seen without a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WritesOrdering {
    /// Nowhere.
    None,
    /// By the kernels of the device that was written to.
    Owner,
    AllDevices,
}

/// What was tried on a device: nothing that it does not claim, and nothing at all without a context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    pub context: Outcome,
    pub posix_fd: Outcome,
    pub fabric: Outcome,
    pub dma_buf: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    NotTried,
    Works,
    Refused(Reason),
}

/// What only NVML tells.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Nvml {
    /// The place of each GPU in the NVLink fabric, by PCI address.
    pub fabrics: BTreeMap<String, Answer<Fabric>>,
}

/// A GPU's place in the NVLink fabric.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fabric {
    pub state: FabricState,
    /// How registration ended, as NVML's number; 0 is well.
    pub status: i32,
    pub clique: u32,
    /// Nothing where the fabric ends with the machine.
    pub cluster: Option<String>,
    /// What the GPU says is wrong with it.
    pub complaints: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FabricState {
    NotSupported,
    NotStarted,
    InProgress,
    Completed,
    /// A number that is newer than this program.
    Unknown(u8),
}

impl<T> Answer<T> {
    pub fn told(&self) -> Option<&T> {
        match self {
            Self::Told(told) => Some(told),
            Self::Refused(_) | Self::Lost(_) => None,
        }
    }
}

impl Cuda {
    /// The devices of this process, if the driver has told of any.
    pub fn devices(&self) -> &[Device] {
        self.driver.told().map_or(&[], |driver| &driver.devices)
    }
}
