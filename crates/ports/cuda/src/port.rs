//! The port.

use std::borrow::Cow;

use crossdock_host::{HostOptions, HostPort};
use crossdock_memory::Memory;
use crossdock_transport::{
    Arm, Attached, Error, Events, Fence, Grant, GrantId, LaneAddress, LaneId, LaneTags, LocalId, Op, PeerId,
    Port, PortInfo, Posted, RemoteKey, Result,
};

use crate::PAGES;
use crate::cache::Cache;
use crate::compiler::{CompileError, Compiler};
use crate::driver::LoadError;
use crate::gpu::{Gpu, GpuError};
use crate::medium::OnGpu;
use crate::mover::{Limits, Mover};

/// A port that moves bytes on a GPU: see the [crate's page](crate).
pub struct CudaPort {
    port: HostPort<OnGpu>,
}

/// How a port is opened.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// What it takes of the GPU, and of the host for it.
    pub limits: Limits,
    /// From which lengths on copy engines move stretches.
    pub copy_engines: CopyEngines,
    /// Where its kernels come from.
    pub kernels: Kernels,
    /// The lanes: their limits, and the port's name, which is the GPU's where this says nothing.
    pub lanes: HostOptions,
}

/// From which lengths on a copy engine moves a stretch of bytes, which else a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyEngines {
    /// Between a GPU and the host.
    pub host_from_bytes: u64,
    /// Between GPUs, or within one.
    pub gpu_from_bytes: u64,
}

/// Where kernels come from.
#[derive(Clone, Debug)]
pub enum Kernels {
    /// Compiled by NVRTC for the GPU at hand, and kept there. Where NVRTC is not found, or does not know the GPU, the driver
    /// compiles what this library brings along.
    Compiled(Cache),
    /// Compiled before: what [`Compiler::compile`] has made of [`PAGES`] for this GPU's architecture.
    Given(Vec<u8>),
}

/// Why there is no port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no driver.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The GPU does not do what is asked of it.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// There are no lanes.
    #[error(transparent)]
    Port(#[from] Error),
}

impl Kernels {
    /// What a GPU loads: [`PAGES`], for a [`Mover`].
    pub fn image(&self, gpu: &Gpu) -> Cow<'_, [u8]> {
        match self {
            Kernels::Given(image) => Cow::Borrowed(image),
            Kernels::Compiled(cache) => {
                let compiled = |compiler| cache.get(&compiler, &PAGES, gpu.facts().architecture);
                // The driver has a compiler of its own.
                Compiler::load().and_then(compiled).map_or_else(
                    |error| {
                        if error != CompileError::NoLibrary {
                            tracing::warn!(gpu = gpu.name(), "the driver compiles the kernels: {error}");
                        }
                        Cow::Borrowed(PAGES.portable.as_bytes())
                    },
                    Cow::Owned,
                )
            }
        }
    }
}

impl OpenError {
    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Load(error) => error.advice(),
            Self::Gpu(error) => error.advice(),
            Self::Port(_) => "look at the limits of this process: descriptors, memory",
        }
    }
}

/// Counts since the port was opened. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaCounters {
    /// Moved, or about to be, into peers' memory.
    pub bytes_written: u64,
    /// Moved, or about to be, out of peers' memory.
    pub bytes_read: u64,
    /// Of both, what copy engines move.
    pub by_engines_bytes: u64,
    /// What every port between processes of one host counts.
    pub lanes: crossdock_host::HostCounters,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            copy_engines: CopyEngines::default(),
            kernels: Kernels::Compiled(Cache::usual()),
            lanes: HostOptions {
                name: String::new(),
                // An NVLink of the fourth generation carries 450 GB/s, the memory of the same GPU more.
                bytes_per_second: 400_000_000_000,
                ..HostOptions::default()
            },
        }
    }
}

impl Default for CopyEngines {
    fn default() -> Self {
        Self { host_from_bytes: 256 << 10, gpu_from_bytes: u64::MAX }
    }
}

impl CudaPort {
    /// Opens a port of a GPU.
    pub fn open(gpu: &Gpu, options: CudaOptions) -> std::result::Result<Self, OpenError> {
        let image = options.kernels.image(gpu);
        let mover = Mover::new(gpu, &image, options.limits)?;
        let medium = OnGpu::new(mover, options.copy_engines);
        let mut lanes = options.lanes;
        if lanes.name.is_empty() {
            lanes.name = gpu.name().to_owned();
        }
        lanes.numa_node = lanes.numa_node.or(gpu.facts().numa_node);
        Ok(Self { port: HostPort::open(lanes, |_| Ok(medium))? })
    }

    /// Its GPU.
    pub fn gpu(&self) -> &Gpu {
        self.port.medium().gpu()
    }

    /// What the port has done so far.
    pub fn counters(&self) -> CudaCounters {
        let moved = self.port.medium().moved;
        CudaCounters {
            bytes_written: moved.bytes_written,
            bytes_read: moved.bytes_read,
            by_engines_bytes: moved.by_engines_bytes,
            lanes: self.port.counters(),
        }
    }
}

impl Port for CudaPort {
    fn info(&self) -> &PortInfo {
        self.port.info()
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        self.port.register(memory)
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        self.port.deregister(region)
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        self.port.open_lane(peer)
    }

    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        self.port.connect(lane, remote, tags)
    }

    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached> {
        self.port.attach(lane, key)
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        self.port.grant(grant)
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        self.port.revoke(grant)
    }

    fn close(&mut self, lane: LaneId) {
        self.port.close(lane);
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        self.port.post(lane, ops)
    }

    fn poll(&mut self, events: &mut Events) {
        self.port.poll(events);
    }

    fn arm(&mut self) -> Arm<'_> {
        self.port.arm()
    }
}

impl std::fmt::Debug for CudaPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.port.fmt(f)
    }
}
