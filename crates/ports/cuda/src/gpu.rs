//! A GPU as crossdock uses it: what can be done with it, and memory on it.
#![allow(unsafe_code)]

mod bounce;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use crossdock_memory::{AllocateOptions, DeviceFailed, DeviceMemory, Memory, MemoryError};
use parking_lot::{Mutex, MutexGuard};

use crate::driver::{
    Context, CudaError, Driver, Facts, HandleTypes, HostRegistration, IpcToken, Mapped, Physical, Shareable,
    Stream,
};
use crate::sharing::{Refusal, Sharing, Within, sharing};

/// One GPU, opened. A clone is another handle.
#[derive(Clone, Debug)]
pub struct Gpu {
    opened: Arc<Opened>,
}

#[derive(Debug)]
struct Opened {
    context: Context,
    name: String,
    facts: Facts,
    /// Handles that were tried here.
    works: HandleTypes,
    bounce: Mutex<Bounce>,
}

/// Pinned memory of the host, by which bytes come and go for [`Memory::read`] and its like.
#[derive(Debug)]
struct Bounce {
    stream: Stream,
    registration: HostRegistration,
    memory: Memory,
}

/// Why a GPU gave no memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// The driver refused.
    #[error(transparent)]
    Driver(#[from] CudaError),
    /// It cannot be shared, and so not be registered.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The device cannot allocate what can be shared.
    #[error("this GPU has neither file descriptors nor fabric handles for its memory (no VMM)")]
    NoVirtualMemory,
    /// The range is impossible.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl GpuError {
    /// Whether the same call may succeed later: memory may be free then.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Driver(error) => error.is_out_of_memory(),
            Self::Memory(error) => {
                matches!(error, MemoryError::OutOfMemory { .. } | MemoryError::TooManyFiles)
            }
            Self::Refused(_) | Self::NoVirtualMemory => false,
        }
    }

    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Driver(error) => error.advice(),
            Self::Refused(refusal) => refusal.advice(),
            Self::NoVirtualMemory => {
                "a virtual GPU may need a profile with unified memory; cudaMalloc's memory can be shared without"
            }
            Self::Memory(_) => "ask for a length that fits the GPU",
        }
    }
}

/// Memory on a GPU, as [`Memory`] holds it.
#[derive(Debug)]
pub struct GpuMemory {
    // Let go in this order: what is exported, then the mapping, then the context.
    dma_buf: OnceLock<Option<OwnedFd>>,
    backing: Backing,
    sharing: Sharing,
    base: u64,
    bytes: usize,
    gpu: Gpu,
}

/// What keeps it.
#[derive(Debug)]
enum Backing {
    /// Allocated here.
    Ours(Mapped),
    /// The engine's, with its piece where VMM mapped it.
    Adopted(Option<Arc<Physical>>),
}

/// What another process of this host is given to map it.
#[derive(Debug)]
pub enum Export {
    /// A descriptor of the whole piece.
    Descriptor(OwnedFd, Within),
    /// A fabric handle of the whole piece.
    Fabric(crate::driver::FabricHandle, Within),
    /// A token of the whole allocation.
    Ipc(IpcToken, Within),
}

impl Gpu {
    /// Opens a device and tries by which handles its memory can be shared.
    pub fn open(driver: &Driver, ordinal: u32) -> Result<Gpu, GpuError> {
        let device = driver.device(ordinal)?;
        let (facts, context) = (device.facts()?, device.context()?);
        // Memory that is short, or a context that is lost, says nothing of a handle.
        let tried = |is_claimed: bool, by| match is_claimed.then(|| context.try_sharing(by)) {
            Some(Err(error)) if error.is_out_of_memory() || error.is_sticky() => Err(error),
            Some(Ok(())) => Ok(true),
            Some(Err(_)) | None => Ok(false),
        };
        let works = HandleTypes {
            posix_fd: tried(facts.handles.posix_fd, HandleTypes::POSIX_FD)?,
            fabric: tried(facts.handles.fabric, HandleTypes::FABRIC)?,
        };
        let memory = Memory::allocate(
            BOUNCE_BYTES,
            &AllocateOptions { name: "crossdock-bounce".into(), ..AllocateOptions::default() },
        )?;
        let bounce =
            Bounce { stream: context.stream()?, registration: context.register_host(&memory)?, memory };
        let (name, bounce) = (device.to_string(), Mutex::new(bounce));
        Ok(Gpu { opened: Arc::new(Opened { context, name, facts, works, bounce }) })
    }

    /// Its context.
    pub fn context(&self) -> &Context {
        &self.opened.context
    }

    /// `"cuda:0"`.
    pub fn name(&self) -> &str {
        &self.opened.name
    }

    /// What the driver says of it.
    pub fn facts(&self) -> &Facts {
        &self.opened.facts
    }

    /// By which handles its memory can be shared, as tried.
    pub fn handles(&self) -> HandleTypes {
        self.opened.works
    }

    /// Allocates memory that other processes can map: by fabric handles, too, where those work; and that RDMA devices can reach,
    /// where those can. Its bytes are zero. It is one physical piece, which the last handle frees; a peer that has it mapped
    /// keeps the bytes, and nothing else of it.
    pub fn allocate(&self, bytes: usize) -> Result<Memory, GpuError> {
        let handles = self.handles();
        if handles == HandleTypes::NONE {
            return Err(GpuError::NoVirtualMemory);
        }
        let context = self.context();
        let granularity = context.granularity_bytes(handles)?;
        let whole = match bytes.checked_next_multiple_of(granularity) {
            Some(whole) if bytes > 0 => whole,
            Some(_) => return Err(MemoryError::ZeroBytes.into()),
            None => return Err(MemoryError::TooLarge { bytes }.into()),
        };
        let for_rdma = self.facts().has_gpu_direct_rdma_with_vmm;
        let piece = Arc::new(context.allocate_physical(whole, handles, for_rdma)?);
        let mapped = piece.map(&[])?;
        let within = Within { offset: 0, whole_bytes: whole as u64 };
        let sharing = match handles.posix_fd {
            true => Sharing::Descriptor(within),
            false => Sharing::Fabric(within),
        };
        let base = mapped.base();
        // Fresh pieces hold what their last owner left, and peers map the whole.
        self.bounce().fill(base, whole, 0).map_err(|failed| self.error(failed))?;
        self.hold(Backing::Ours(mapped), sharing, base, bytes)
    }

    /// Memory that somebody else allocated on this GPU: with `cudaMalloc`, or through VMM with a handle that can be exported.
    /// What cannot be shared is refused here, with what to do about it.
    ///
    /// # Safety
    /// From now until the last handle is dropped the memory stays allocated, and nobody relies on its bytes staying as they are.
    /// The rule for the owner is that of [`Memory::from_raw`].
    // A suppression of tests/lsan-suppressions.txt names it.
    #[inline(never)]
    pub unsafe fn adopt(&self, address: u64, bytes: usize) -> Result<Memory, GpuError> {
        let context = self.context();
        let (facts, ordinal) = (context.facts_of(address)?, context.device().ordinal());
        let sharing = sharing(&facts, ordinal, self.handles(), address, bytes as u64)?;
        let piece = match sharing {
            Sharing::Descriptor(within) | Sharing::Fabric(within) => {
                context.physical_at(address, within.whole_bytes as usize, facts.handles)?.map(Arc::new)
            }
            Sharing::Ipc(_) => None,
        };
        self.hold(Backing::Adopted(piece), sharing, address, bytes)
    }

    fn hold(&self, backing: Backing, sharing: Sharing, base: u64, bytes: usize) -> Result<Memory, GpuError> {
        let held = GpuMemory { dma_buf: OnceLock::new(), backing, sharing, base, bytes, gpu: self.clone() };
        // SAFETY: the range is a piece of this GPU's that the memory holds mapped; or an engine's, who has promised as much to
        // `adopt`.
        Ok(unsafe { Memory::from_device(base, bytes, Box::new(held)) }?)
    }

    /// The memory that a [`Memory`] holds, if it is a GPU's.
    pub fn memory_of(memory: &Memory) -> Option<&GpuMemory> {
        (memory.device()? as &dyn std::any::Any).downcast_ref()
    }

    fn error(&self, failed: DeviceFailed) -> GpuError {
        CudaError { call: failed.call, code: failed.code, name: "an answer that was met before" }.into()
    }

    fn bounce(&self) -> MutexGuard<'_, Bounce> {
        self.opened.bounce.lock()
    }
}

impl GpuMemory {
    /// Whose it is.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Where it begins, for kernels and copies of this process.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Whether somebody else allocated it, and means to use it again.
    pub fn is_adopted(&self) -> bool {
        matches!(self.backing, Backing::Adopted(_))
    }

    /// By what another process maps it.
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// Exports it for one peer.
    pub fn export(&self) -> Result<Export, CudaError> {
        let piece = match &self.backing {
            Backing::Ours(mapped) => Some(mapped.physical()),
            Backing::Adopted(piece) => piece.as_ref(),
        };
        match (self.sharing, piece) {
            (Sharing::Ipc(within), _) | (Sharing::Descriptor(within) | Sharing::Fabric(within), None) => {
                Ok(Export::Ipc(self.gpu.context().ipc_token(self.base - within.offset)?, within))
            }
            (Sharing::Descriptor(within), Some(piece)) => {
                match piece.export(HandleTypes { posix_fd: true, fabric: false })? {
                    Shareable::Fd(fd) => Ok(Export::Descriptor(fd, within)),
                    Shareable::Fabric(handle) => Ok(Export::Fabric(handle, within)),
                }
            }
            (Sharing::Fabric(within), Some(piece)) => {
                match piece.export(HandleTypes { posix_fd: false, fabric: true })? {
                    Shareable::Fd(fd) => Ok(Export::Descriptor(fd, within)),
                    Shareable::Fabric(handle) => Ok(Export::Fabric(handle, within)),
                }
            }
        }
    }
}

impl DeviceMemory for GpuMemory {
    fn device(&self) -> &str {
        self.gpu.name()
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), DeviceFailed> {
        let bounce = self.gpu.bounce();
        let mut at = self.base + offset as u64;
        for part in into.chunks_mut(BOUNCE_BYTES) {
            bounce.take(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write(&self, offset: usize, from: &[u8]) -> Result<(), DeviceFailed> {
        let bounce = self.gpu.bounce();
        let mut at = self.base + offset as u64;
        for part in from.chunks(BOUNCE_BYTES) {
            bounce.put(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn fill(&self, offset: usize, bytes: usize, value: u8) -> Result<(), DeviceFailed> {
        self.gpu.bounce().fill(self.base + offset as u64, bytes, value)
    }

    fn dma_buf(&self) -> Option<(BorrowedFd<'_>, u64)> {
        // The driver exports whole pages of the host's.
        let offset = self.base % HOST_PAGE_BYTES;
        let export = || {
            let pages = (offset as usize + self.bytes).checked_next_multiple_of(HOST_PAGE_BYTES as usize)?;
            let has = self.gpu.facts().has_dma_buf;
            has.then(|| self.gpu.context().dma_buf(self.base - offset, pages).ok().flatten()).flatten()
        };
        self.dma_buf.get_or_init(export).as_ref().map(|fd| (fd.as_fd(), offset))
    }
}

impl From<CudaError> for DeviceFailed {
    fn from(error: CudaError) -> DeviceFailed {
        DeviceFailed { call: error.call, code: error.code }
    }
}

/// A length that costs the copy engine little, and the host no more.
const BOUNCE_BYTES: usize = 4 << 20;

/// The longest that a page of the host's is on each architecture.
const HOST_PAGE_BYTES: u64 = if cfg!(target_arch = "aarch64") { 64 << 10 } else { 4 << 10 };
