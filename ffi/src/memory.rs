//! Memory that peers write and read.

use std::ffi::{c_char, c_void};
use std::os::fd::AsRawFd;

use bytemuck::Zeroable;
use crossdock::{AllocateOptions, HugePages, Memory, MemoryKind};
use parking_lot::Mutex;

use crate::arguments::{not_null, optional_text, put};
use crate::handles::Table;
use crate::sized::{self, Sized as _};
use crate::status::{CROSSDOCK_BUSY, CROSSDOCK_UNSUPPORTED, Fault, call, crossdock_status};

/// A range of memory. 0 is none.
pub type crossdock_memory = u64;

/// The system's ordinary pages.
pub const CROSSDOCK_HUGE_PAGES_NEVER: u32 = 0;
/// Huge pages where there are any.
pub const CROSSDOCK_HUGE_PAGES_TRY: u32 = 1;
/// Huge pages, or an error.
pub const CROSSDOCK_HUGE_PAGES_REQUIRE: u32 = 2;

/// Memory that was allocated here: peers on the same host can map it.
pub const CROSSDOCK_MEMORY_SHARED: u32 = 1;
/// The caller's own memory.
pub const CROSSDOCK_MEMORY_PRIVATE: u32 = 2;

/// How memory is allocated. Zeros are what is usual.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_memory_options {
    /// `sizeof(crossdock_memory_options)`.
    pub size: usize,
    /// Shown in `/proc/self/maps`; NULL for a usual name.
    pub name: *const c_char,
    /// One of `CROSSDOCK_HUGE_PAGES_…`.
    pub huge_pages: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_memory_options {
    const FIRST_BYTES: usize = 24;
}

/// What a memory is.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_memory_info {
    /// `sizeof(crossdock_memory_info)`, set by the caller.
    pub size: usize,
    /// Where it begins.
    pub base: *mut c_void,
    /// How long it is, in bytes.
    pub bytes: usize,
    /// `CROSSDOCK_MEMORY_SHARED` or `CROSSDOCK_MEMORY_PRIVATE`.
    pub kind: u32,
    /// The descriptor to pass to another process of this host, which the memory owns; -1 if it has none.
    pub fd: i32,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_memory_info {
    const FIRST_BYTES: usize = 32;
}

/// `None` once it is closed, for who had found it just before.
type Slot = Mutex<Option<Memory>>;

static MEMORY: Table<Slot> = Table::new(1, "memory");

pub(crate) fn memory_of(handle: crossdock_memory) -> Result<Memory, Fault> {
    let slot = MEMORY.get(handle)?;
    let memory = slot.lock().clone();
    memory.ok_or_else(|| Fault::argument("the memory is being closed"))
}

/// Allocates zeroed memory that peers on this host can map. `options` may be NULL.
///
/// # Safety
/// `options` is NULL or points to a structure that says its size; `memory` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_memory_allocate(
    bytes: usize,
    options: *const crossdock_memory_options,
    memory: *mut crossdock_memory,
) -> crossdock_status {
    call(|| {
        not_null("memory", memory)?;
        let mut usual = AllocateOptions::default();
        if !options.is_null() {
            // SAFETY: as the caller promises.
            let options = unsafe { crossdock_memory_options::read(options) }?;
            // SAFETY: as the caller promises.
            if let Some(name) = unsafe { optional_text("name", options.name) }? {
                usual.name = name.to_owned().into();
            }
            usual.huge_pages = match options.huge_pages {
                CROSSDOCK_HUGE_PAGES_NEVER => HugePages::Never,
                CROSSDOCK_HUGE_PAGES_TRY => HugePages::Try,
                CROSSDOCK_HUGE_PAGES_REQUIRE => HugePages::Require,
                other => {
                    return Err(Fault::argument(format!(
                        "huge_pages is {other}, which this library has not"
                    )));
                }
            };
        }
        let allocated = Memory::allocate(bytes, &usual)?;
        let handle = MEMORY.insert(|_| Mutex::new(Some(allocated)).into())?;
        // SAFETY: as the caller promises.
        unsafe { put("memory", memory, handle) }
    })
}

/// Uses memory that the caller allocated, of any origin: `base` to `base + bytes`, host memory that can be read and
/// written. Peers on the same host cannot map it; they copy through the kernel.
///
/// # Safety
/// The memory stays as it is until `crossdock_memory_close` has answered `CROSSDOCK_OK`. `memory` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_memory_import(
    base: *mut c_void,
    bytes: usize,
    memory: *mut crossdock_memory,
) -> crossdock_status {
    call(|| {
        not_null("memory", memory)?;
        // SAFETY: as the caller promises; the library makes no reference to its bytes.
        let imported = unsafe { Memory::from_raw(base.cast(), bytes) }?;
        let handle = MEMORY.insert(|_| Mutex::new(Some(imported)).into())?;
        // SAFETY: as the caller promises.
        unsafe { put("memory", memory, handle) }
    })
}

/// Uses GPU memory that the caller allocated: a device pointer as a number, and the device's ordinal. This library has no
/// CUDA port yet, so it answers `CROSSDOCK_UNSUPPORTED`; the call is here so that engines can ask.
///
/// # Safety
/// The memory stays as it is until `crossdock_memory_close` has answered `CROSSDOCK_OK`. `memory` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_memory_import_cuda(
    device_pointer: u64,
    bytes: usize,
    device: i32,
    memory: *mut crossdock_memory,
) -> crossdock_status {
    call(|| {
        not_null("memory", memory)?;
        let words = format!("{bytes} bytes at {device_pointer:#x} of CUDA device {device}: no CUDA port");
        Err(Fault::new(CROSSDOCK_UNSUPPORTED, words, "stage the pages in host memory"))
    })
}

/// Tells where a memory is and what kind it is of.
///
/// # Safety
/// `info` points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_memory_describe(
    memory: crossdock_memory,
    info: *mut crossdock_memory_info,
) -> crossdock_status {
    call(|| {
        let memory = memory_of(memory)?;
        let told = crossdock_memory_info {
            size: 0,
            base: memory.base().cast(),
            bytes: memory.bytes(),
            kind: match memory.kind() {
                MemoryKind::Shared => CROSSDOCK_MEMORY_SHARED,
                _ => CROSSDOCK_MEMORY_PRIVATE,
            },
            fd: memory.fd().map_or(-1, |fd| fd.as_raw_fd()),
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_memory_info::write(info, told) }
    })
}

/// Lets a memory go. Allocated memory stays mapped as long as a node uses it. Imported memory is the caller's own again
/// once this has answered `CROSSDOCK_OK`; while a node or a peer can still reach it, the answer is `CROSSDOCK_BUSY` and
/// nothing has changed: close the node, and ask again.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_memory_close(memory: crossdock_memory) -> crossdock_status {
    call(|| {
        let slot = MEMORY.get(memory)?;
        let mut held = slot.lock();
        if let Some(here) = &mut *held
            && here.kind() != MemoryKind::Shared
            && !here.is_last_handle()
        {
            let words = "a node, or a peer that is still connected, can reach the memory";
            return Err(
                Fault::new(CROSSDOCK_BUSY, words, "close the node first, then ask again").retryable(true)
            );
        }
        // Of two that close at once, one finds it gone.
        MEMORY.remove(memory)?;
        *held = None;
        Ok(())
    })
}
