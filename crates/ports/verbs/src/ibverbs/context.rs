//! Devices: what there is, an opened one, its ports, its GIDs, and what it reports by itself.

use std::ffi::CStr;
use std::fmt;
use std::mem;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Zeroable;
use rustix::io::Errno;

use super::library::Library;
use super::sys::*;
use crate::address::Gid;

/// A call of the library, or of the kernel below it, that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed: {}", std::io::Error::from_raw_os_error(*errno))]
pub(crate) struct Failed {
    pub call: &'static str,
    pub errno: i32,
}

/// Calls that answer with an error number.
pub(super) fn status(call: &'static str, errno: i32) -> Result<(), Failed> {
    match errno {
        0 => Ok(()),
        // Some providers answer -1 and set errno.
        -1 => Err(last(call)),
        errno => Err(Failed { call, errno: errno.abs() }),
    }
}

/// Calls that answer with an object, or null and errno.
pub(super) fn object<T>(call: &'static str, raw: *mut T) -> Result<NonNull<T>, Failed> {
    NonNull::new(raw).ok_or_else(|| last(call))
}

fn last(call: &'static str) -> Failed {
    Failed { call, errno: std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) }
}

/// The names of all devices, in the library's order.
pub(crate) fn devices(library: &Library) -> Result<Vec<String>, Failed> {
    with_devices(library, |devices| {
        let name = |&device: &*mut ibv_device| name_of(library, device);
        Ok(devices.iter().map(name).collect())
    })
}

fn name_of(library: &Library, device: *mut ibv_device) -> String {
    // SAFETY: `device` is of a list that has not been freed, and its name is a string that lives as long.
    let name = unsafe { CStr::from_ptr((library.ibv_get_device_name)(device)) };
    name.to_string_lossy().into_owned()
}

fn with_devices<T>(
    library: &Library,
    then: impl FnOnce(&[*mut ibv_device]) -> Result<T, Failed>,
) -> Result<T, Failed> {
    let mut count = 0;
    // SAFETY: `count` is a place for a number.
    let list = object("ibv_get_device_list", unsafe { (library.ibv_get_device_list)(&mut count) })?;
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: the library says that the list has so many devices.
    let result = then(unsafe { std::slice::from_raw_parts(list.as_ptr(), count) });
    // SAFETY: the list is freed once, and no device of it is used later but through a context, which is allowed.
    unsafe { (library.ibv_free_device_list)(list.as_ptr()) };
    result
}

/// An opened device.
pub(crate) struct Context {
    pub(super) library: Arc<Library>,
    pub(super) raw: NonNull<ibv_context>,
    name: String,
    /// `IBV_TRANSPORT_*`.
    transport: i32,
}

// SAFETY: libibverbs allows calls from any thread, several at a time, on one context.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub fn open(library: &Arc<Library>, name: &str) -> Result<Arc<Self>, Failed> {
        with_devices(library, |devices| {
            let device = devices.iter().find(|&&device| name_of(library, device) == name);
            let Some(&device) = device else {
                return Err(Failed { call: "ibv_get_device_list", errno: libc::ENODEV });
            };
            // SAFETY: the list that the device is of has not been freed.
            let raw = object("ibv_open_device", unsafe { (library.ibv_open_device)(device) })?;
            // SAFETY: as above.
            let transport = unsafe { (*device).transport_type };
            let context = Self { library: library.clone(), raw, name: name.to_owned(), transport };
            nonblocking(context.async_fd())?;
            Ok(Arc::new(context))
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether queue pairs connect by what InfiniBand and RoCE have in common.
    pub fn is_infiniband_transport(&self) -> bool {
        matches!(self.transport, IBV_TRANSPORT_IB | IBV_TRANSPORT_UNKNOWN)
    }

    pub fn attributes(&self) -> Result<ibv_device_attr, Failed> {
        let mut attributes = ibv_device_attr::zeroed();
        // SAFETY: the context is open, and the struct is the one that the call fills.
        let errno = unsafe { (self.library.ibv_query_device)(self.raw.as_ptr(), &mut attributes) };
        status("ibv_query_device", errno)?;
        Ok(attributes)
    }

    pub fn port(&self, number: u8) -> Result<ibv_port_attr, Failed> {
        let mut attributes = ibv_port_attr::zeroed();
        // SAFETY: the context is open. The call fills the struct or, in older libraries, a part of it.
        let errno =
            unsafe { (self.library.ibv_query_port)(self.raw.as_ptr(), number, (&raw mut attributes).cast()) };
        status("ibv_query_port", errno)?;
        Ok(attributes)
    }

    pub fn gid(&self, port: u8, index: u8) -> Result<Gid, Failed> {
        let mut gid = ibv_gid::zeroed();
        // SAFETY: the context is open, and `gid` is what the call fills.
        let errno =
            unsafe { (self.library.ibv_query_gid)(self.raw.as_ptr(), port, i32::from(index), &mut gid) };
        status("ibv_query_gid", errno)?;
        Ok(Gid(gid.raw))
    }

    /// The GIDs of all ports with their types; `None` where the library or the kernel cannot list them.
    pub fn gid_table(&self) -> Option<Vec<ibv_gid_entry>> {
        let query = self.library._ibv_query_gid_table?;
        let mut entries = Vec::<ibv_gid_entry>::with_capacity(GIDS_MAX);
        // SAFETY: there is room for so many entries of this size.
        let found = unsafe {
            query(self.raw.as_ptr(), entries.as_mut_ptr(), GIDS_MAX, 0, mem::size_of::<ibv_gid_entry>())
        };
        let found = usize::try_from(found).ok()?;
        // SAFETY: the call has filled so many, and no more than there was room for.
        unsafe { entries.set_len(found.min(GIDS_MAX)) };
        Some(entries)
    }

    pub fn partition_key(&self, port: u8, index: u16) -> Result<u16, Failed> {
        let mut key = 0;
        // SAFETY: the context is open, and `key` is what the call fills.
        let errno =
            unsafe { (self.library.ibv_query_pkey)(self.raw.as_ptr(), port, i32::from(index), &mut key) };
        status("ibv_query_pkey", errno)?;
        Ok(u16::from_be(key))
    }

    /// Readable when [`next_event`](Context::next_event) has one.
    pub fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, and so is its descriptor.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).async_fd) }
    }

    /// What the device has reported by itself, if anything waits.
    pub fn next_event(&self) -> Option<DeviceEvent> {
        let mut event = ibv_async_event::zeroed();
        // SAFETY: the context is open; its descriptor does not block.
        if unsafe { (self.library.ibv_get_async_event)(self.raw.as_ptr(), &mut event) } != 0 {
            return None;
        }
        let kind = event.event_type;
        let of = match kind {
            IBV_EVENT_QP_FATAL
            | IBV_EVENT_QP_REQ_ERR
            | IBV_EVENT_QP_ACCESS_ERR
            | IBV_EVENT_COMM_EST
            | IBV_EVENT_SQ_DRAINED
            | IBV_EVENT_PATH_MIG
            | IBV_EVENT_PATH_MIG_ERR
            | IBV_EVENT_QP_LAST_WQE_REACHED => {
                // SAFETY: events of these kinds are of a queue pair, which is not destroyed before the event is
                // acknowledged below.
                EventOf::QueuePair(unsafe { (*event.element.qp).qp_num })
            }
            IBV_EVENT_PORT_ACTIVE
            | IBV_EVENT_PORT_ERR
            | IBV_EVENT_LID_CHANGE
            | IBV_EVENT_PKEY_CHANGE
            | IBV_EVENT_SM_CHANGE
            | IBV_EVENT_CLIENT_REREGISTER
            | IBV_EVENT_GID_CHANGE => {
                // SAFETY: events of these kinds are of a port, and hold its number.
                EventOf::Port(unsafe { event.element.port_num } as u8)
            }
            _ => EventOf::Device,
        };
        // SAFETY: the event was got, and is acknowledged once.
        unsafe { (self.library.ibv_ack_async_event)(&mut event) };
        Some(DeviceEvent { kind, of })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is open, and everything that was made of it holds it, so nothing is left of it. A failure
        // leaves descriptors to the end of the process, which nobody here can help.
        unsafe { (self.library.ibv_close_device)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context({})", self.name)
    }
}

/// Something that a device reports by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceEvent {
    /// As [`IBV_EVENT_QP_FATAL`] and its like.
    pub kind: u32,
    pub of: EventOf,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventOf {
    /// By its number.
    QueuePair(u32),
    Port(u8),
    /// The device, or a queue of completions or receives: of those a port has one each.
    Device,
}

/// Makes reads of this descriptor answer at once.
pub(super) fn nonblocking(fd: BorrowedFd<'_>) -> Result<(), Failed> {
    let failed = |errno: Errno| Failed { call: "fcntl", errno: errno.raw_os_error() };
    let flags = rustix::fs::fcntl_getfl(fd).map_err(failed)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK).map_err(failed)
}

/// Soft-RoCE and some NICs have 1,024 entries a port.
const GIDS_MAX: usize = 4096;
