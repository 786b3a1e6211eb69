//! The functions of the table.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::sync::Arc;

use super::work::{Launch, Work};
use super::world::{Event, Kind, Locked, Physical, Pinned, Stream, World, file, file_of, number_of, world};
use super::{MODELS, Model, Origin};
use crate::driver::abi::{
    self, Access, Address, Answer, Attribute, DeviceNumber, Handle, IpcHandle, PointerAttribute, Properties,
};
use crate::driver::table::Table;

thread_local! {
    /// The devices of the contexts that the thread has made current, the last on top.
    static CURRENT: RefCell<Vec<DeviceNumber>> = const { RefCell::new(Vec::new()) };
}

pub fn table() -> Table {
    Table {
        cuInit: init,
        cuDriverGetVersion: driver_version,
        cuGetErrorName: error_name,
        cuDeviceGetCount: device_count,
        cuDeviceGet: device_get,
        cuDeviceGetName: device_name,
        cuDeviceGetUuid_v2: device_uuid,
        cuDeviceGetPCIBusId: device_pci,
        cuDeviceTotalMem_v2: device_memory,
        cuDeviceGetAttribute: device_attribute,
        cuDeviceCanAccessPeer: can_access_peer,
        cuDevicePrimaryCtxRetain: retain,
        cuDevicePrimaryCtxRelease_v2: release_context,
        cuCtxPushCurrent_v2: push,
        cuCtxPopCurrent_v2: pop,
        cuThreadExchangeStreamCaptureMode: exchange_capture_mode,
        cuMemAlloc_v2: alloc,
        cuMemFree_v2: free,
        cuMemGetAllocationGranularity: granularity,
        cuMemCreate: create,
        cuMemRelease: release,
        cuMemAddressReserve: reserve,
        cuMemAddressFree: unreserve,
        cuMemMap: map,
        cuMemUnmap: unmap,
        cuMemSetAccess: set_access,
        cuMemExportToShareableHandle: export,
        cuMemImportFromShareableHandle: import,
        cuMemRetainAllocationHandle: retain_physical,
        cuPointerGetAttribute: pointer_attribute,
        cuIpcGetMemHandle: ipc_get,
        cuIpcOpenMemHandle_v2: ipc_open,
        cuIpcCloseMemHandle: ipc_close,
        cuMemHostRegister_v2: host_register,
        cuMemHostUnregister: host_unregister,
        cuMemHostGetDevicePointer_v2: host_pointer,
        cuMemcpyAsync: copy,
        cuMemsetD8Async: fill,
        cuMemsetD32Async: fill_words,
        cuStreamCreate: stream_create,
        cuStreamDestroy_v2: stream_destroy,
        cuStreamQuery: stream_query,
        cuStreamSynchronize: stream_synchronize,
        cuStreamWaitEvent: stream_wait,
        cuStreamWaitValue32_v2: stream_wait_value,
        cuEventCreate: event_create,
        cuEventDestroy_v2: event_destroy,
        cuEventRecord: event_record,
        cuEventQuery: event_query,
        cuModuleLoadData: module_load,
        cuModuleUnload: module_unload,
        cuModuleGetFunction: module_function,
        cuLaunchKernel: launch,
        cuMemGetHandleForAddressRange: Some(dma_buf),
    }
}

/// Locks the world for one call in the current context; or what a test has asked for in its place.
fn enter(call: &'static str) -> Result<Locked, Answer> {
    let mut world = world();
    let failure = current().ok().and_then(|device| world.failures.remove(&(device, call)));
    failure.map_or(Ok(world), Err)
}

/// The device of the current context.
fn current() -> Result<DeviceNumber, Answer> {
    CURRENT.with_borrow(|stack| stack.last().copied()).ok_or(ERROR_INVALID_CONTEXT)
}

/// The same, and its world, if neither has failed.
fn enter_on(call: &'static str) -> Result<(Locked, DeviceNumber), Answer> {
    let device = current()?;
    let world = enter(call)?;
    match world.spoiled.get(&device) {
        Some(&code) => Err(code),
        None => Ok((world, device)),
    }
}

fn answer(result: Result<(), Answer>) -> Answer {
    result.err().unwrap_or(abi::SUCCESS)
}

fn model(device: DeviceNumber) -> Result<&'static Model, Answer> {
    usize::try_from(device).ok().and_then(|device| MODELS.get(device)).ok_or(ERROR_INVALID_DEVICE)
}

/// Writes what a caller has asked for.
fn put<T>(into: *mut T, value: T) -> Result<(), Answer> {
    if into.is_null() {
        return Err(abi::ERROR_INVALID_VALUE);
    }
    // SAFETY: the driver's callers give places that can be written.
    unsafe { into.write_unaligned(value) };
    Ok(())
}

fn put_text(into: *mut c_char, bytes: c_int, text: &str) -> Result<(), Answer> {
    let room = usize::try_from(bytes).map_err(|_| abi::ERROR_INVALID_VALUE)?;
    let all = text.bytes().take(room.saturating_sub(1)).chain(std::iter::once(0));
    for (nth, byte) in all.enumerate() {
        // SAFETY: as above; there is room for so many.
        unsafe { into.add(nth).write(byte as c_char) };
    }
    Ok(())
}

extern "C" fn init(_flags: c_uint) -> Answer {
    abi::SUCCESS
}

extern "C" fn driver_version(into: *mut c_int) -> Answer {
    answer(put(into, 12_080))
}

extern "C" fn error_name(code: Answer, into: *mut *const c_char) -> Answer {
    let name: &CStr = match code {
        abi::ERROR_INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        abi::ERROR_OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        abi::ERROR_NOT_PERMITTED => c"CUDA_ERROR_NOT_PERMITTED",
        abi::ERROR_NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        abi::ERROR_ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        ERROR_INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        _ => c"CUDA_ERROR_UNKNOWN",
    };
    answer(put(into, name.as_ptr()))
}

extern "C" fn device_count(into: *mut c_int) -> Answer {
    answer(put(into, MODELS.len() as c_int))
}

extern "C" fn device_get(into: *mut DeviceNumber, ordinal: c_int) -> Answer {
    answer(model(ordinal).and_then(|_| put(into, ordinal)))
}

extern "C" fn device_name(into: *mut c_char, bytes: c_int, device: DeviceNumber) -> Answer {
    answer(model(device).and_then(|_| put_text(into, bytes, "Fake GPU")))
}

extern "C" fn device_uuid(into: *mut [u8; 16], device: DeviceNumber) -> Answer {
    answer(model(device).and_then(|_| put(into, [device as u8 + 1; 16])))
}

extern "C" fn device_pci(into: *mut c_char, bytes: c_int, device: DeviceNumber) -> Answer {
    answer(model(device).and_then(|_| put_text(into, bytes, &format!("0000:{:02X}:00.0", device + 1))))
}

extern "C" fn device_memory(into: *mut usize, device: DeviceNumber) -> Answer {
    answer(model(device).and_then(|_| put(into, 80 << 30)))
}

extern "C" fn device_attribute(into: *mut c_int, attribute: c_int, device: DeviceNumber) -> Answer {
    let value = |model: &Model| {
        let is = |attribute: Attribute, value: bool| (attribute as c_int, c_int::from(value));
        let all = [
            (Attribute::Multiprocessors as c_int, 8),
            (Attribute::ComputeCapabilityMajor as c_int, 9),
            (Attribute::ComputeCapabilityMinor as c_int, 0),
            is(Attribute::PageableMemoryAccess, false),
            is(Attribute::VirtualMemoryManagement, model.has_virtual_memory),
            is(Attribute::HandlePosixFd, model.posix_fd),
            is(Attribute::HandleFabric, model.fabric),
            is(Attribute::GpuDirectRdma, model.gpu_direct_rdma),
            is(Attribute::GpuDirectRdmaWithVmm, model.gpu_direct_rdma),
            is(Attribute::DmaBuf, model.dma_buf),
            (Attribute::GpuDirectRdmaFlush as c_int, 1),
            (Attribute::GpuDirectRdmaWritesOrdering as c_int, abi::ORDERING_OWNER),
            is(Attribute::Multicast, model.fabric),
            (Attribute::HostNumaNode as c_int, 0),
        ];
        all.into_iter().find(|(known, _)| *known == attribute).map(|(_, value)| value)
    };
    answer(model(device).and_then(|model| put(into, value(model).ok_or(abi::ERROR_INVALID_VALUE)?)))
}

extern "C" fn can_access_peer(into: *mut c_int, one: DeviceNumber, other: DeviceNumber) -> Answer {
    answer(
        model(one)
            .and_then(|_| model(other))
            .and_then(|_| put(into, c_int::from(one != other && World::reaches(one, other)))),
    )
}

/// Contexts are the numbers of their devices, from 1.
extern "C" fn retain(into: *mut Handle, device: DeviceNumber) -> Answer {
    let handle = std::ptr::without_provenance_mut(device as usize + 1);
    answer(model(device).and_then(|_| put(into, handle)))
}

extern "C" fn release_context(device: DeviceNumber) -> Answer {
    answer(model(device).map(|_| ()))
}

extern "C" fn push(context: Handle) -> Answer {
    let device = context.addr().wrapping_sub(1) as DeviceNumber;
    answer(model(device).map(|_| CURRENT.with_borrow_mut(|stack| stack.push(device))))
}

extern "C" fn pop(into: *mut Handle) -> Answer {
    let popped = CURRENT.with_borrow_mut(Vec::pop).ok_or(ERROR_INVALID_CONTEXT);
    answer(popped.and_then(|device| put(into, std::ptr::without_provenance_mut(device as usize + 1))))
}

/// Nobody captures here.
extern "C" fn exchange_capture_mode(mode: *mut c_int) -> Answer {
    answer(put(mode, 0))
}

/// What a caller has given to be read.
fn got<T: Copy>(from: *const T) -> Result<T, Answer> {
    if from.is_null() {
        return Err(abi::ERROR_INVALID_VALUE);
    }
    // SAFETY: the driver's callers give what can be read.
    Ok(unsafe { from.read() })
}

extern "C" fn alloc(into: *mut Address, bytes: usize) -> Answer {
    let allocated = || {
        let (mut world, device) = enter_on("cuMemAlloc")?;
        if bytes == 0 {
            return Err(abi::ERROR_INVALID_VALUE);
        }
        put(into, world.allocate(Origin::Malloc, device, bytes))
    };
    answer(allocated())
}

extern "C" fn free(address: Address) -> Answer {
    answer(enter("cuMemFree").and_then(|mut world| {
        match world.allocations.get(&address).is_some_and(|one| !one.is_opened) {
            true => {
                world.free(address);
                Ok(())
            }
            false => Err(abi::ERROR_INVALID_VALUE),
        }
    }))
}

extern "C" fn granularity(into: *mut usize, properties: *const Properties, _option: c_uint) -> Answer {
    let asked = || {
        let properties = got(properties)?;
        if !model(properties.location.number)?.has_virtual_memory {
            return Err(abi::ERROR_NOT_SUPPORTED);
        }
        put(into, GRANULARITY_BYTES)
    };
    answer(asked())
}

extern "C" fn create(into: *mut u64, bytes: usize, properties: *const Properties, _flags: u64) -> Answer {
    let created = || {
        let mut world = enter("cuMemCreate")?;
        let properties = got(properties)?;
        let device = properties.location.number;
        let model = model(device)?;
        let handles = properties.handle_types;
        if !model.has_virtual_memory
            || handles & abi::HANDLE_POSIX_FD != 0 && !model.posix_fd
            || handles & abi::HANDLE_FABRIC != 0 && !model.fabric
            || properties.gpu_direct_rdma_capable != 0 && !model.gpu_direct_rdma
        {
            return Err(abi::ERROR_NOT_SUPPORTED);
        }
        if handles & abi::HANDLE_FABRIC != 0 && !model.fabric_works {
            return Err(abi::ERROR_NOT_PERMITTED);
        }
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY_BYTES) {
            return Err(abi::ERROR_INVALID_VALUE);
        }
        let fd = Arc::new(file(bytes).ok_or(abi::ERROR_OUT_OF_MEMORY)?);
        let for_rdma = properties.gpu_direct_rdma_capable != 0;
        put(into, world.add_physical(Physical { fd, bytes, device, handles, for_rdma, references: 1 }))
    };
    answer(created())
}

extern "C" fn release(handle: u64) -> Answer {
    answer(
        enter("cuMemRelease")
            .and_then(|mut world| world.release(handle).then_some(()).ok_or(abi::ERROR_INVALID_VALUE)),
    )
}

extern "C" fn reserve(into: *mut Address, bytes: usize, _align: usize, _at: Address, _flags: u64) -> Answer {
    let reserved = || {
        let (mut world, device) = enter_on("cuMemAddressReserve")?;
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY_BYTES) {
            return Err(abi::ERROR_INVALID_VALUE);
        }
        put(into, world.reserve(bytes, device).ok_or(abi::ERROR_OUT_OF_MEMORY)?)
    };
    answer(reserved())
}

extern "C" fn unreserve(base: Address, _bytes: usize) -> Answer {
    answer(
        enter("cuMemAddressFree")
            .and_then(|mut world| world.unreserve(base).then_some(()).ok_or(abi::ERROR_INVALID_VALUE)),
    )
}

extern "C" fn map(base: Address, bytes: usize, offset: usize, handle: u64, _flags: u64) -> Answer {
    answer(enter("cuMemMap").and_then(|mut world| {
        (offset == 0 && world.map(base, bytes, handle)).then_some(()).ok_or(abi::ERROR_INVALID_VALUE)
    }))
}

extern "C" fn unmap(base: Address, _bytes: usize) -> Answer {
    answer(
        enter("cuMemUnmap")
            .and_then(|mut world| world.unmap(base).then_some(()).ok_or(abi::ERROR_INVALID_VALUE)),
    )
}

extern "C" fn set_access(base: Address, _bytes: usize, all: *const Access, count: usize) -> Answer {
    let set = || {
        let mut world = enter("cuMemSetAccess")?;
        let range = world.reserved.get(&base).ok_or(abi::ERROR_INVALID_VALUE)?;
        let (id, _) = range.mapped.ok_or(abi::ERROR_INVALID_VALUE)?;
        let owner = world.physical[&id].device;
        for nth in 0..count {
            // SAFETY: the caller gives as many.
            let access = unsafe { all.add(nth).read() };
            model(access.location.number)?;
            if !World::reaches(access.location.number, owner) {
                return Err(abi::ERROR_INVALID_VALUE);
            }
            let range = world.reserved.get_mut(&base).ok_or(abi::ERROR_INVALID_VALUE)?;
            range.access.insert(access.location.number);
        }
        Ok(())
    };
    answer(set())
}

extern "C" fn export(into: *mut c_void, handle: u64, kind: c_uint, _flags: u64) -> Answer {
    let exported = || {
        let world = enter("cuMemExportToShareableHandle")?;
        let physical = world.physical.get(&handle).ok_or(abi::ERROR_INVALID_VALUE)?;
        if physical.handles & kind == 0 {
            return Err(abi::ERROR_INVALID_VALUE);
        }
        match kind {
            abi::HANDLE_POSIX_FD => {
                let fd = physical.fd.try_clone().map_err(|_| abi::ERROR_OUT_OF_MEMORY)?;
                put(into.cast::<c_int>(), fd.into_raw_fd())
            }
            _ => put(into.cast::<[u8; 64]>(), Name::of(number_of(&physical.fd), physical.bytes).encode()),
        }
    };
    answer(exported())
}

extern "C" fn import(into: *mut u64, what: *mut c_void, kind: c_uint) -> Answer {
    let imported = || {
        let (mut world, device) = enter_on("cuMemImportFromShareableHandle")?;
        let fd = match kind {
            abi::HANDLE_POSIX_FD => {
                let number = c_int::try_from(what.addr() as isize).map_err(|_| abi::ERROR_INVALID_VALUE)?;
                if number < 0 {
                    return Err(abi::ERROR_INVALID_VALUE);
                }
                // SAFETY: the caller's descriptor is open during the call.
                let fd = unsafe { BorrowedFd::borrow_raw(number) };
                fd.try_clone_to_owned().map_err(|_| abi::ERROR_INVALID_VALUE)?
            }
            _ => {
                if !model(device)?.fabric_works {
                    return Err(abi::ERROR_NOT_PERMITTED);
                }
                let name = Name::decode(&got(what.cast::<[u8; 64]>())?).ok_or(abi::ERROR_INVALID_VALUE)?;
                file_of(name.process, name.fd).ok_or(abi::ERROR_INVALID_VALUE)?
            }
        };
        let stat = rustix::fs::fstat(&fd).map_err(|_| abi::ERROR_INVALID_VALUE)?;
        let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        let bytes = usize::try_from(stat.st_size).unwrap_or(0);
        if !is_file || bytes == 0 || !bytes.is_multiple_of(GRANULARITY_BYTES) {
            return Err(abi::ERROR_INVALID_VALUE);
        }
        let physical =
            Physical { fd: Arc::new(fd), bytes, device, handles: kind, for_rdma: false, references: 1 };
        put(into, world.add_physical(physical))
    };
    answer(imported())
}

extern "C" fn retain_physical(into: *mut u64, address: *mut c_void) -> Answer {
    let retained = || {
        let mut world = enter("cuMemRetainAllocationHandle")?;
        match world.find(address.addr() as u64).map(|found| found.kind) {
            Some(Kind::Virtual { physical, .. }) => {
                if let Some(piece) = world.physical.get_mut(&physical) {
                    piece.references += 1;
                }
                put(into, physical)
            }
            _ => Err(abi::ERROR_INVALID_VALUE),
        }
    };
    answer(retained())
}

extern "C" fn pointer_attribute(into: *mut c_void, attribute: c_int, address: Address) -> Answer {
    let told = || {
        let world = enter("cuPointerGetAttribute")?;
        let found = world.find(address).ok_or(abi::ERROR_INVALID_VALUE)?;
        let model = model(found.device)?;
        let is = |which: PointerAttribute| attribute == which as c_int;
        let is_host = matches!(found.kind, Kind::Pinned | Kind::Plain(Origin::Host));
        let boolean = |value: bool| put(into.cast::<c_uint>(), c_uint::from(value));
        if is(PointerAttribute::MemoryType) {
            return put(into.cast(), if is_host { abi::MEMORY_TYPE_HOST } else { abi::MEMORY_TYPE_DEVICE });
        }
        if is(PointerAttribute::IsManaged) {
            return boolean(found.kind == Kind::Plain(Origin::Managed));
        }
        if is(PointerAttribute::DeviceOrdinal) {
            return put(into.cast(), found.device);
        }
        if is(PointerAttribute::IsLegacyIpcCapable) {
            return boolean(found.kind == Kind::Plain(Origin::Malloc));
        }
        if is(PointerAttribute::RangeStart) {
            return put(into.cast(), found.start);
        }
        if is(PointerAttribute::RangeBytes) {
            return put(into.cast(), found.bytes);
        }
        if is(PointerAttribute::Pool) {
            let pool = found.kind == Kind::Plain(Origin::Pool);
            return put(into.cast::<u64>(), u64::from(pool));
        }
        match found.kind {
            Kind::Virtual { mapped_bytes, handles, for_rdma, .. } => {
                if is(PointerAttribute::MappingStart) {
                    return put(into.cast(), found.start);
                }
                if is(PointerAttribute::MappingBytes) {
                    return put(into.cast(), mapped_bytes);
                }
                if is(PointerAttribute::AllowedHandleTypes) {
                    return put(into.cast::<u64>(), u64::from(handles));
                }
                if is(PointerAttribute::IsGpuDirectRdmaCapable) {
                    return boolean(for_rdma);
                }
            }
            Kind::Plain(origin) => {
                if is(PointerAttribute::AllowedHandleTypes) {
                    return put(into.cast::<u64>(), 0);
                }
                if is(PointerAttribute::IsGpuDirectRdmaCapable) {
                    return boolean(model.gpu_direct_rdma && origin == Origin::Malloc);
                }
            }
            Kind::Pinned => {}
        }
        Err(abi::ERROR_INVALID_VALUE)
    };
    answer(told())
}

/// What names a file of a process to others of this host.
struct Name {
    process: u32,
    fd: i32,
    bytes: u64,
}

impl Name {
    fn of(fd: i32, bytes: usize) -> Name {
        Name { process: std::process::id(), fd, bytes: bytes as u64 }
    }

    fn encode(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(b"fake");
        bytes[4..8].copy_from_slice(&self.process.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.fd.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; 64]) -> Option<Name> {
        let (magic, rest) = bytes.split_first_chunk::<4>()?;
        let (process, rest) = rest.split_first_chunk()?;
        let (fd, rest) = rest.split_first_chunk()?;
        let (length, _) = rest.split_first_chunk()?;
        (magic == b"fake").then_some(Name {
            process: u32::from_le_bytes(*process),
            fd: i32::from_le_bytes(*fd),
            bytes: u64::from_le_bytes(*length),
        })
    }
}

extern "C" fn ipc_get(into: *mut IpcHandle, address: Address) -> Answer {
    let told = || {
        let (world, _) = enter_on("cuIpcGetMemHandle")?;
        let found = world.find(address).ok_or(abi::ERROR_INVALID_VALUE)?;
        match (found.kind, found.fd) {
            (Kind::Plain(Origin::Malloc), Some(fd)) => {
                put(into, IpcHandle(Name::of(number_of(&fd), found.bytes).encode()))
            }
            _ => Err(abi::ERROR_INVALID_VALUE),
        }
    };
    answer(told())
}

extern "C" fn ipc_open(into: *mut Address, handle: IpcHandle, _flags: c_uint) -> Answer {
    let opened = || {
        let (mut world, device) = enter_on("cuIpcOpenMemHandle")?;
        let name = Name::decode(&handle.0).ok_or(abi::ERROR_INVALID_VALUE)?;
        if name.process == std::process::id() {
            return Err(ERROR_INVALID_CONTEXT);
        }
        let fd = file_of(name.process, name.fd).ok_or(abi::ERROR_INVALID_VALUE)?;
        let bytes = usize::try_from(name.bytes).map_err(|_| abi::ERROR_INVALID_VALUE)?;
        put(into, world.open(fd, bytes, device).ok_or(abi::ERROR_INVALID_VALUE)?)
    };
    answer(opened())
}

extern "C" fn ipc_close(address: Address) -> Answer {
    answer(enter("cuIpcCloseMemHandle").and_then(|mut world| {
        match world.allocations.get(&address).is_some_and(|one| one.is_opened) {
            true => {
                world.free(address);
                Ok(())
            }
            false => Err(abi::ERROR_INVALID_VALUE),
        }
    }))
}

extern "C" fn dma_buf(
    into: *mut c_void,
    address: Address,
    bytes: usize,
    _kind: c_int,
    _flags: u64,
) -> Answer {
    let exported = || {
        let (world, _) = enter_on("cuMemGetHandleForAddressRange")?;
        let found = world.find(address).ok_or(abi::ERROR_INVALID_VALUE)?;
        if !model(found.device)?.dma_buf || !address.is_multiple_of(HOST_PAGE_BYTES) || bytes == 0 {
            return Err(abi::ERROR_NOT_SUPPORTED);
        }
        let fd = found.fd.ok_or(abi::ERROR_INVALID_VALUE)?.try_clone();
        put(into.cast::<c_int>(), fd.map_err(|_| abi::ERROR_OUT_OF_MEMORY)?.into_raw_fd())
    };
    answer(exported())
}

extern "C" fn host_register(base: *mut c_void, bytes: usize, _flags: c_uint) -> Answer {
    let registered = || {
        let (mut world, device) = enter_on("cuMemHostRegister")?;
        let base = base.addr() as u64;
        if world.find(base).is_some() {
            return Err(abi::ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }
        world.pinned.insert(base, Pinned { bytes, device });
        Ok(())
    };
    answer(registered())
}

extern "C" fn host_unregister(base: *mut c_void) -> Answer {
    answer(enter("cuMemHostUnregister").and_then(|mut world| {
        world.pinned.remove(&(base.addr() as u64)).map(|_| ()).ok_or(abi::ERROR_INVALID_VALUE)
    }))
}

extern "C" fn host_pointer(into: *mut Address, base: *mut c_void, _flags: c_uint) -> Answer {
    let told = || {
        let world = enter("cuMemHostGetDevicePointer")?;
        let address = base.expose_provenance() as u64;
        world.find(address).ok_or(abi::ERROR_INVALID_VALUE)?;
        put(into, address)
    };
    answer(told())
}

fn handle(id: u64) -> Handle {
    std::ptr::without_provenance_mut(id as usize)
}

/// Adds to a stream of the current context's device.
fn enqueue(call: &'static str, stream: Handle, work: Work) -> Result<(), Answer> {
    let (mut world, device) = enter_on(call)?;
    let stream = world.streams.get_mut(&(stream.addr() as u64)).ok_or(abi::ERROR_INVALID_HANDLE)?;
    if stream.device != device {
        return Err(abi::ERROR_INVALID_HANDLE);
    }
    stream.queue.push_back(work);
    stream.enqueued += 1;
    World::wake();
    Ok(())
}

extern "C" fn copy(to: Address, from: Address, bytes: usize, stream: Handle) -> Answer {
    answer(enqueue("cuMemcpyAsync", stream, Work::Copy { to, from, bytes }))
}

extern "C" fn fill(to: Address, value: u8, bytes: usize, stream: Handle) -> Answer {
    answer(enqueue("cuMemsetD8Async", stream, Work::Fill { to, value, bytes }))
}

/// No kernel of software reads what it would fill.
extern "C" fn fill_words(_to: Address, _value: c_uint, _words: usize, _stream: Handle) -> Answer {
    abi::ERROR_NOT_SUPPORTED
}

extern "C" fn stream_create(into: *mut Handle, _flags: c_uint) -> Answer {
    let created = || {
        let (mut world, device) = enter_on("cuStreamCreate")?;
        let id = world.id();
        world.streams.insert(id, Stream { device, queue: Default::default(), enqueued: 0, done: 0 });
        put(into, handle(id))
    };
    answer(created())
}

extern "C" fn stream_destroy(stream: Handle) -> Answer {
    answer(enter("cuStreamDestroy").and_then(|mut world| {
        world.streams.remove(&(stream.addr() as u64)).map(|_| ()).ok_or(abi::ERROR_INVALID_HANDLE)
    }))
}

/// Whether a stream has done so many.
fn is_done(world: &World, stream: u64, done: u64) -> bool {
    world.streams.get(&stream).is_none_or(|stream| stream.done >= done)
}

/// What is waited for may be a word that the CPU has stored meanwhile: the device looks again.
fn not_ready() -> Answer {
    World::wake();
    abi::ERROR_NOT_READY
}

extern "C" fn stream_query(stream: Handle) -> Answer {
    let asked = || {
        let (world, _) = enter_on("cuStreamQuery")?;
        let stream = world.streams.get(&(stream.addr() as u64)).ok_or(abi::ERROR_INVALID_HANDLE)?;
        match stream.done == stream.enqueued {
            true => Ok(()),
            false => Err(not_ready()),
        }
    };
    answer(asked())
}

extern "C" fn stream_synchronize(stream: Handle) -> Answer {
    loop {
        match stream_query(stream) {
            abi::ERROR_NOT_READY => std::thread::yield_now(),
            answer => return answer,
        }
    }
}

extern "C" fn event_create(into: *mut Handle, _flags: c_uint) -> Answer {
    let created = || {
        let (mut world, device) = enter_on("cuEventCreate")?;
        let id = world.id();
        world.events.insert(id, Event { device, at: None });
        put(into, handle(id))
    };
    answer(created())
}

extern "C" fn event_destroy(event: Handle) -> Answer {
    answer(enter("cuEventDestroy").and_then(|mut world| {
        world.events.remove(&(event.addr() as u64)).map(|_| ()).ok_or(abi::ERROR_INVALID_HANDLE)
    }))
}

extern "C" fn event_record(event: Handle, stream: Handle) -> Answer {
    let recorded = || {
        let (mut world, _) = enter_on("cuEventRecord")?;
        let id = stream.addr() as u64;
        let enqueued = world.streams.get(&id).ok_or(abi::ERROR_INVALID_HANDLE)?.enqueued;
        let event = world.events.get_mut(&(event.addr() as u64)).ok_or(abi::ERROR_INVALID_HANDLE)?;
        event.at = Some((id, enqueued));
        Ok(())
    };
    answer(recorded())
}

extern "C" fn event_query(event: Handle) -> Answer {
    let asked = || {
        let (world, _) = enter_on("cuEventQuery")?;
        let event = world.events.get(&(event.addr() as u64)).ok_or(abi::ERROR_INVALID_HANDLE)?;
        match event.at {
            Some((stream, done)) if !is_done(&world, stream, done) => Err(not_ready()),
            _ => Ok(()),
        }
    };
    answer(asked())
}

extern "C" fn stream_wait(stream: Handle, event: Handle, _flags: c_uint) -> Answer {
    let at = enter_on("cuStreamWaitEvent").and_then(|(world, _)| {
        let event = world.events.get(&(event.addr() as u64)).ok_or(abi::ERROR_INVALID_HANDLE)?;
        Ok(event.at)
    });
    answer(at.and_then(|at| match at {
        Some((of, done)) => enqueue("cuStreamWaitEvent", stream, Work::Wait { stream: of, done }),
        None => Ok(()),
    }))
}

extern "C" fn stream_wait_value(stream: Handle, address: Address, value: u32, flags: c_uint) -> Answer {
    match flags {
        abi::WAIT_VALUE_GEQ => {
            answer(enqueue("cuStreamWaitValue32", stream, Work::WaitValue { address, value }))
        }
        _ => abi::ERROR_NOT_SUPPORTED,
    }
}

extern "C" fn module_load(into: *mut Handle, image: *const c_void) -> Answer {
    let loaded = || {
        let (mut world, _) = enter_on("cuModuleLoadData")?;
        got(image.cast::<u8>())?;
        let id = world.id();
        put(into, handle(id))
    };
    answer(loaded())
}

extern "C" fn module_unload(_module: Handle) -> Answer {
    abi::SUCCESS
}

extern "C" fn module_function(into: *mut Handle, _module: Handle, name: *const c_char) -> Answer {
    let found = || {
        let (mut world, _) = enter_on("cuModuleGetFunction")?;
        // SAFETY: the caller gives a string.
        let word_bytes = match unsafe { CStr::from_ptr(name) }.to_bytes() {
            b"crossdock_move_words_16" => 16,
            b"crossdock_move_words_4" => 4,
            b"crossdock_move_words_1" => 1,
            _ => return Err(abi::ERROR_NOT_FOUND),
        };
        let id = world.id();
        world.functions.insert(id, word_bytes);
        put(into, handle(id))
    };
    answer(found())
}

#[allow(clippy::too_many_arguments)]
extern "C" fn launch(
    function: Handle,
    blocks: c_uint,
    _blocks_y: c_uint,
    _blocks_z: c_uint,
    threads: c_uint,
    _threads_y: c_uint,
    _threads_z: c_uint,
    _shared_bytes: c_uint,
    stream: Handle,
    parameters: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Answer {
    let launched = || {
        let word_bytes = {
            let (mut world, device) = enter_on("cuLaunchKernel")?;
            *world.launches.entry(device).or_insert(0) += 1;
            *world.functions.get(&(function.addr() as u64)).ok_or(abi::ERROR_INVALID_HANDLE)?
        };
        if blocks == 0 || threads == 0 {
            return Err(abi::ERROR_INVALID_VALUE);
        }
        // As `pages.cu` declares them: all, count, tiles, signals, signal_count, finished.
        // SAFETY: the caller gives a value of its type for each parameter.
        let (pieces, pieces_count, tiles, signals, signals_count, finished) = unsafe {
            (
                (*parameters).cast::<u64>().read(),
                (*parameters.add(1)).cast::<u32>().read(),
                (*parameters.add(2)).cast::<u64>().read(),
                (*parameters.add(3)).cast::<u64>().read(),
                (*parameters.add(4)).cast::<u32>().read(),
                (*parameters.add(5)).cast::<u64>().read(),
            )
        };
        let launch = Launch {
            word_bytes,
            pieces,
            pieces_count,
            signals,
            signals_count,
            finished,
            tile_words: u64::from(threads) * 8,
            tiles,
            ..Launch::default()
        };
        enqueue("cuLaunchKernel", stream, Work::Launch(launch))
    };
    answer(launched())
}

const GRANULARITY_BYTES: usize = 2 << 20;
const HOST_PAGE_BYTES: u64 = 4096;
const ERROR_INVALID_DEVICE: Answer = 101;
const ERROR_INVALID_CONTEXT: Answer = 201;
