//! A GPU's memory: physical pieces and where they are mapped (VMM), and what another process has shared.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use super::abi::{self, Access, Address, FabricHandle, IpcHandle, Location, Properties};
use super::table::FABRIC_HANDLE_BYTES;
use super::{Context, CudaError, HandleTypes};

/// A piece of physical memory, allocated here or imported. It lives as long as any process holds it or has it mapped.
#[derive(Debug)]
pub struct Physical {
    context: Context,
    handle: abi::Physical,
    bytes: usize,
    handles: HandleTypes,
}

/// Physical memory at an address of this process.
#[derive(Debug)]
pub struct Mapped {
    // In this order: the mapping ends before its piece is let go.
    range: Reserved,
    physical: Arc<Physical>,
}

/// A range of addresses with one piece mapped into it.
#[derive(Debug)]
struct Reserved {
    context: Context,
    base: Address,
    bytes: usize,
    is_mapped: bool,
}

/// Memory as `cudaMalloc` gives it, of this process.
#[derive(Debug)]
pub struct Allocated {
    context: Context,
    base: Address,
    bytes: usize,
}

/// What names memory of `cudaMalloc` to another process of this host (legacy CUDA IPC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpcToken(pub [u8; 64]);

/// Another process's `cudaMalloc`, opened here.
#[derive(Debug)]
pub struct Foreign {
    context: Context,
    base: Address,
}

/// Exported physical memory.
#[derive(Debug)]
pub enum Shareable {
    /// By a descriptor that passes over a Unix socket.
    Fd(OwnedFd),
    /// By a handle that is plain bytes.
    Fabric(FabricHandle),
}

impl Context {
    /// What lengths of physical memory are multiples of.
    pub fn granularity_bytes(&self, handles: HandleTypes) -> Result<usize, CudaError> {
        let (mut bytes, properties) = (0, self.properties(handles, false));
        self.call("cuMemGetAllocationGranularity", |table| {
            // SAFETY: the number can be written, and the properties live.
            unsafe {
                (table.cuMemGetAllocationGranularity)(
                    &raw mut bytes,
                    &raw const properties,
                    abi::GRANULARITY_RECOMMENDED,
                )
            }
        })?;
        Ok(bytes.max(1))
    }

    /// Allocates physical memory that can be exported by these handles. `bytes` is a multiple of the
    /// [granularity](Context::granularity_bytes). With `for_rdma`, RDMA devices can reach it; a device of which they cannot
    /// allocates nothing then.
    pub fn allocate_physical(
        &self,
        bytes: usize,
        handles: HandleTypes,
        for_rdma: bool,
    ) -> Result<Physical, CudaError> {
        let (mut handle, properties) = (0, self.properties(handles, for_rdma));
        self.call("cuMemCreate", |table| {
            // SAFETY: the handle can be written, and the properties live.
            unsafe { (table.cuMemCreate)(&raw mut handle, bytes, &raw const properties, 0) }
        })?;
        Ok(Physical { context: self.clone(), handle, bytes, handles })
    }

    /// Allocates the smallest piece that can be exported by these handles, exports it and lets it go: fabric handles need more
    /// than the device (an IMEX channel, a fabric that is up), and only trying tells.
    pub fn try_sharing(&self, by: HandleTypes) -> Result<(), CudaError> {
        let bytes = self.granularity_bytes(by)?;
        let piece = self.allocate_physical(bytes, by, false)?;
        piece.export(by).map(|_| ())
    }

    /// Takes physical memory that a process of this host has exported. It has to be at least as long as `bytes`, which mapping
    /// it finds out.
    pub fn import_fd(&self, fd: BorrowedFd<'_>, bytes: usize) -> Result<Physical, CudaError> {
        let number = fd.as_raw_fd() as isize as *mut std::ffi::c_void;
        self.import(number, abi::HANDLE_POSIX_FD, bytes)
    }

    /// The same by a fabric handle, from any host of the NVLink domain.
    pub fn import_fabric(&self, handle: &FabricHandle, bytes: usize) -> Result<Physical, CudaError> {
        let mut handle = *handle;
        self.import(handle.as_mut_ptr().cast(), abi::HANDLE_FABRIC, bytes)
    }

    fn import(&self, what: *mut std::ffi::c_void, kind: u32, bytes: usize) -> Result<Physical, CudaError> {
        let mut handle = 0;
        self.call("cuMemImportFromShareableHandle", |table| {
            // SAFETY: the handle can be written; `what` is a descriptor in the place of a pointer, or leads to a fabric handle,
            // as `kind` says.
            unsafe { (table.cuMemImportFromShareableHandle)(&raw mut handle, what, kind) }
        })?;
        Ok(Physical { context: self.clone(), handle, bytes, handles: HandleTypes::NONE })
    }

    /// The physical memory behind an address, whoever has mapped it; `None` if VMM has not.
    pub fn physical_at(
        &self,
        address: u64,
        bytes: usize,
        handles: HandleTypes,
    ) -> Result<Option<Physical>, CudaError> {
        let mut handle = 0;
        let retained = self.call("cuMemRetainAllocationHandle", |table| {
            let pointer = ptr::without_provenance_mut(address as usize);
            // SAFETY: the handle can be written; the address is only looked up.
            unsafe { (table.cuMemRetainAllocationHandle)(&raw mut handle, pointer) }
        });
        match retained {
            Ok(()) => Ok(Some(Physical { context: self.clone(), handle, bytes, handles })),
            // The last two where the device, or its driver, has no VMM.
            Err(error)
                if matches!(
                    error.code,
                    abi::ERROR_INVALID_VALUE | abi::ERROR_NOT_SUPPORTED | abi::ERROR_NOT_PERMITTED
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Allocates as `cudaMalloc` does: other processes reach it by legacy IPC alone, and it costs no whole piece.
    pub fn malloc(&self, bytes: usize) -> Result<Allocated, CudaError> {
        let mut base = 0;
        self.call("cuMemAlloc", |table| {
            // SAFETY: the address can be written.
            unsafe { (table.cuMemAlloc_v2)(&raw mut base, bytes) }
        })?;
        Ok(Allocated { context: self.clone(), base, bytes })
    }

    /// What names memory of `cudaMalloc` to other processes.
    pub fn ipc_token(&self, address: u64) -> Result<IpcToken, CudaError> {
        let mut token = IpcHandle([0; 64]);
        self.call("cuIpcGetMemHandle", |table| {
            // SAFETY: the handle can be written; the address is only looked up.
            unsafe { (table.cuIpcGetMemHandle)(&raw mut token, address) }
        })?;
        Ok(IpcToken(token.0))
    }

    /// Opens what another process has named; a process cannot open its own.
    pub fn open_ipc(&self, token: &IpcToken) -> Result<Foreign, CudaError> {
        let mut base = 0;
        self.call("cuIpcOpenMemHandle", |table| {
            let flags = abi::IPC_LAZY_ENABLE_PEER_ACCESS;
            // SAFETY: the address can be written; the handle is bytes.
            unsafe { (table.cuIpcOpenMemHandle_v2)(&raw mut base, IpcHandle(token.0), flags) }
        })?;
        Ok(Foreign { context: self.clone(), base })
    }

    /// Exports a range of memory as dma-buf; `None`: the driver is too old to.
    pub fn dma_buf(&self, address: u64, bytes: usize) -> Result<Option<OwnedFd>, CudaError> {
        let Some(export) = self.device().driver().table().cuMemGetHandleForAddressRange else {
            return Ok(None);
        };
        let mut fd: c_int = -1;
        self.call("cuMemGetHandleForAddressRange", |_| {
            // SAFETY: the descriptor can be written; the range is only looked up.
            unsafe { export((&raw mut fd).cast(), address, bytes, abi::RANGE_DMA_BUF, 0) }
        })?;
        // SAFETY: the driver has made it for the caller, who alone knows it.
        Ok(Some(own(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    fn properties(&self, handles: HandleTypes, for_rdma: bool) -> Properties {
        Properties {
            kind: abi::ALLOCATION_PINNED,
            handle_types: handles.flags(),
            location: Location { kind: abi::LOCATION_DEVICE, number: self.device().number() },
            win32: ptr::null(),
            compression: 0,
            gpu_direct_rdma_capable: u8::from(for_rdma),
            usage: 0,
            reserved: [0; 4],
        }
    }
}

/// No program that this process executes is to keep what was exported.
fn own(fd: OwnedFd) -> OwnedFd {
    // It fails for a descriptor that is not open.
    let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    fd
}

impl Physical {
    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// By which handles it can be exported.
    pub fn handles(&self) -> HandleTypes {
        self.handles
    }

    /// Exports it: by a fabric handle if `by` has that, else by a descriptor.
    pub fn export(&self, by: HandleTypes) -> Result<Shareable, CudaError> {
        if by.fabric {
            let mut handle: FabricHandle = [0; FABRIC_HANDLE_BYTES];
            self.export_as(handle.as_mut_ptr().cast(), abi::HANDLE_FABRIC)?;
            return Ok(Shareable::Fabric(handle));
        }
        let mut fd: c_int = -1;
        self.export_as((&raw mut fd).cast(), abi::HANDLE_POSIX_FD)?;
        // SAFETY: the driver has made it for the caller, who alone knows it.
        Ok(Shareable::Fd(own(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    fn export_as(&self, into: *mut std::ffi::c_void, kind: u32) -> Result<(), CudaError> {
        self.context.call("cuMemExportToShareableHandle", |table| {
            // SAFETY: what `kind` names can be written; the handle is alive.
            unsafe { (table.cuMemExportToShareableHandle)(into, self.handle, kind, 0) }
        })
    }

    /// Maps it, readable and writable for the context's device and for these.
    pub fn map(self: &Arc<Self>, others: &[Context]) -> Result<Mapped, CudaError> {
        let context = &self.context;
        let mut range = Reserved { context: context.clone(), base: 0, bytes: self.bytes, is_mapped: false };
        context.call("cuMemAddressReserve", |table| {
            // SAFETY: the address can be written.
            unsafe { (table.cuMemAddressReserve)(&raw mut range.base, self.bytes, 0, 0, 0) }
        })?;
        context.call("cuMemMap", |table| {
            // SAFETY: the range is reserved and nothing is mapped in it; the piece is alive.
            unsafe { (table.cuMemMap)(range.base, self.bytes, 0, self.handle, 0) }
        })?;
        range.is_mapped = true;
        let devices = std::iter::once(context).chain(others).map(|context| Access {
            location: Location { kind: abi::LOCATION_DEVICE, number: context.device().number() },
            flags: abi::ACCESS_READ_WRITE,
        });
        let access: Vec<Access> = devices.collect();
        context.call("cuMemSetAccess", |table| {
            // SAFETY: the range is mapped; the list lives.
            unsafe { (table.cuMemSetAccess)(range.base, self.bytes, access.as_ptr(), access.len()) }
        })?;
        Ok(Mapped { range, physical: self.clone() })
    }
}

impl Mapped {
    /// Where it begins, for kernels and copies of this process.
    pub fn base(&self) -> u64 {
        self.range.base
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.range.bytes
    }

    /// What is mapped.
    pub fn physical(&self) -> &Arc<Physical> {
        &self.physical
    }
}

impl Allocated {
    /// Where it begins, for kernels and copies of this process.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Foreign {
    /// Where it begins, for kernels and copies of this process.
    pub fn base(&self) -> u64 {
        self.base
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // An answer would say that the context is lost, and the memory with it.
        let _ = self.context.call("cuMemRelease", |table| {
            // SAFETY: it was created, imported or retained once by this.
            unsafe { (table.cuMemRelease)(self.handle) }
        });
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.base == 0 {
            return;
        }
        // As above.
        let _ = self.context.call("cuMemAddressFree", |table| {
            // SAFETY: this reserved it, and what is mapped in it is unmapped first. Whoever works with it has said that it is
            // done: see `Mapped`'s owners.
            unsafe {
                if self.is_mapped {
                    (table.cuMemUnmap)(self.base, self.bytes);
                }
                (table.cuMemAddressFree)(self.base, self.bytes)
            }
        });
    }
}

impl Drop for Allocated {
    fn drop(&mut self) {
        // As above.
        let _ = self.context.call("cuMemFree", |table| {
            // SAFETY: it was allocated once by this. Whoever works with it has said that it is done.
            unsafe { (table.cuMemFree_v2)(self.base) }
        });
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // As above.
        let _ = self.context.call("cuIpcCloseMemHandle", |table| {
            // SAFETY: it was opened once by this.
            unsafe { (table.cuIpcCloseMemHandle)(self.base) }
        });
    }
}
