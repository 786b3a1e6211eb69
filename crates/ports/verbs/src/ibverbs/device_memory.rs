//! Memory that is not the host's: a GPU's. How an RDMA device may reach it, and why not.

use std::fmt;

use crossdock_transport::Error;

use super::context::Failed;

/// By which means an RDMA device reaches a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// The kernel's own way between drivers.
    DmaBuf,
    /// The module of the GPU's vendor (`nvidia_peermem`), since dma-buf did not do.
    PeerMemory {
        /// Why.
        dma_buf: Why,
    },
}

/// Why one means did not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The memory was not exported: the GPU's driver cannot, or it was allocated in a way that does not allow it.
    NotExported,
    /// The library is older than rdma-core 34.
    LibraryTooOld,
    /// It was registered, and then the device did not move its bytes.
    ProbeFailed,
    /// The kernel or the driver refused, with an error number.
    Refused {
        /// The call.
        call: &'static str,
        /// Its error number.
        errno: i32,
    },
}

/// No RDMA device reaches this memory directly: what is to travel has to be copied to host memory first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the RDMA device cannot reach this GPU memory (dma-buf: {dma_buf}; peer memory: {peer_memory}): stage it in host memory"
)]
pub struct OutOfReach {
    /// Why not by dma-buf.
    pub dma_buf: Why,
    /// Why not by the vendor's module.
    pub peer_memory: Why,
}

/// Why a GPU's memory was not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// By no means.
    #[error(transparent)]
    OutOfReach(#[from] OutOfReach),
    /// It was registered, and then the port could not keep it.
    #[error(transparent)]
    Port(#[from] Error),
}

impl OutOfReach {
    /// What would make it reachable.
    pub fn advice(&self) -> &'static str {
        match (self.dma_buf, self.peer_memory) {
            (Why::Refused { errno: libc::EOPNOTSUPP, .. }, Why::Refused { .. }) => {
                "the RDMA device's driver knows no dma-buf: load nvidia_peermem, or update the driver"
            }
            (Why::NotExported, _) => {
                "allocate through the driver's VMM with a handle that can be exported (open kernel modules), or load \
                 nvidia_peermem"
            }
            (Why::LibraryTooOld, _) => "install rdma-core 34 or newer, or load nvidia_peermem",
            (Why::ProbeFailed, _) | (_, Why::ProbeFailed) => {
                "look at IOMMU and ACS settings (the device and the GPU have to reach each other), and at the kernel log"
            }
            _ => "load nvidia_peermem, and look at the kernel log for why dma-buf was refused",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::NotExported => f.write_str("the memory is not exported"),
            Why::LibraryTooOld => f.write_str("libibverbs is older than rdma-core 34"),
            Why::ProbeFailed => {
                f.write_str("the device was told to move its bytes, and moved none or others")
            }
            Why::Refused { call, errno } => Failed { call, errno: *errno }.fmt(f),
        }
    }
}

impl From<Failed> for Why {
    fn from(failed: Failed) -> Self {
        Why::Refused { call: failed.call, errno: failed.errno }
    }
}
