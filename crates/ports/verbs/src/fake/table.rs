//! The functions of the table. Each finds the fabric through the context of its object, takes the fabric's lock, and
//! keeps it to the end. Here are devices, memory, completion queues and events; the rest is in `requests`.
#![allow(unsafe_code)]

mod requests;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::fd::BorrowedFd;
use std::ptr;
use std::slice;
use std::sync::Arc;

use crossdock_memory::Memory;
use libc::ssize_t;
use parking_lot::MutexGuard;

use super::options::{Function, Pace};
use super::pair::{Data, Receive, Work};
use super::raw::{RawContext, RawDevice, id_of};
use super::registry::{self, GetDeviceList};
use super::wire::{gid, lid};
use super::world::{Errno, Held, Registration, World};
use super::{SETTLE_STEPS, Shared, stub};
use crate::ibverbs::library::Functions;
use crate::ibverbs::sys::*;
pub(super) use requests::work;
use requests::{
    create_qp, create_srq, destroy_qp, destroy_srq, modify_qp, post_recv, post_send, post_srq_recv,
};

/// The table of a fabric.
pub(super) fn functions(get_device_list: GetDeviceList, is_old: bool) -> Functions {
    Functions {
        ibv_get_device_list: get_device_list,
        ibv_free_device_list: registry::free_device_list,
        ibv_get_device_name: get_device_name,
        ibv_open_device: open_device,
        ibv_close_device: close_device,
        ibv_query_device: query_device,
        ibv_query_port: query_port,
        ibv_query_gid: query_gid,
        ibv_query_pkey: query_pkey,
        ibv_alloc_pd: alloc_pd,
        ibv_dealloc_pd: dealloc_pd,
        ibv_reg_mr: reg_mr,
        ibv_dereg_mr: dereg_mr,
        ibv_create_comp_channel: create_comp_channel,
        ibv_destroy_comp_channel: destroy_comp_channel,
        ibv_create_cq: create_cq,
        ibv_resize_cq: resize_cq,
        ibv_destroy_cq: destroy_cq,
        ibv_get_cq_event: get_cq_event,
        ibv_ack_cq_events: ack_cq_events,
        ibv_create_srq: create_srq,
        ibv_destroy_srq: destroy_srq,
        ibv_create_qp: create_qp,
        ibv_modify_qp: modify_qp,
        ibv_destroy_qp: destroy_qp,
        ibv_get_async_event: get_async_event,
        ibv_ack_async_event: ack_async_event,
        ibv_reg_mr_iova2: if is_old { None } else { Some(reg_mr_iova2) },
        _ibv_query_gid_table: if is_old { None } else { Some(query_gid_table) },
        ibv_reg_dmabuf_mr: if is_old { None } else { Some(reg_dmabuf_mr) },
    }
}

/// A call on an object of a context.
struct Call<'a> {
    fabric: &'a Arc<Shared>,
    world: MutexGuard<'a, World>,
    context: u32,
    raw: *mut ibv_context,
}

/// Begins a call: counts it, and has it fail if it is to.
///
/// # Safety
/// The context was opened with a table of this module and not closed, and stays open during the call.
unsafe fn begin<'a>(raw: *mut ibv_context, function: Function) -> Result<Call<'a>, Errno> {
    // SAFETY: the caller's promise.
    let mut call = unsafe { find(raw) };
    call.world.called(function)?;
    call.world.usable(call.context, function)?;
    Ok(call)
}

/// The same, for calls that look for failures themselves.
///
/// # Safety
/// As for [`begin`].
unsafe fn find<'a>(raw: *mut ibv_context) -> Call<'a> {
    let context = raw.cast::<RawContext>();
    // SAFETY: the caller's promise; these fields never change.
    let (fabric, context) = unsafe { (&(*context).fabric, (*context).id) };
    Call { fabric, world: fabric.world.lock(), context, raw }
}

/// Null, with the code in `errno`.
pub(super) fn null<T>(errno: Errno) -> *mut T {
    set_errno(errno);
    ptr::null_mut()
}

fn set_errno(errno: Errno) {
    // SAFETY: it is this thread's own.
    unsafe { *libc::__errno_location() = errno };
}

fn object<T>(made: Result<*mut T, Errno>) -> *mut T {
    made.unwrap_or_else(null)
}

fn code(done: Result<(), Errno>) -> c_int {
    done.err().unwrap_or(0)
}

/// -1, with the code in `errno`.
fn minus_one(done: Result<(), Errno>) -> c_int {
    match done {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

// Devices. What is said of callers here is said by the manual pages: objects exist, and what is pointed to can be read and
// written.

unsafe extern "C" fn get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: the device is of a list of this fabric, or of a context.
    unsafe { (&raw const (*device).name).cast() }
}

fn guid(device: usize) -> u64 {
    (0x02fa_ceff_0000_0001 + device as u64).to_be()
}

unsafe extern "C" fn open_device(device: *mut ibv_device) -> *mut ibv_context {
    let raw_device = device.cast::<RawDevice>();
    // SAFETY: the device is of a list that was not freed, which keeps the fabric.
    let (fabric, index) = unsafe { ((*raw_device).fabric.upgrade(), (*raw_device).index) };
    let Some(fabric) = fabric else { return null(libc::ENODEV) };
    let mut world = fabric.world.lock();
    let opened = world.called(Function::OpenDevice).and_then(|()| world.open(index));
    drop(world);
    let (id, async_fd) = match opened {
        Ok(opened) => opened,
        Err(errno) => return null(errno),
    };
    // SAFETY: pointers and options of functions may be null.
    let mut ops: ibv_context_ops = unsafe { std::mem::zeroed() };
    ops.poll_cq = Some(poll_cq);
    ops.req_notify_cq = Some(req_notify_cq);
    ops.post_srq_recv = Some(post_srq_recv);
    ops.post_send = Some(post_send);
    ops.post_recv = Some(post_recv);
    let head = ibv_context {
        device,
        ops,
        cmd_fd: -1,
        async_fd,
        num_comp_vectors: 1,
        mutex: libc::PTHREAD_MUTEX_INITIALIZER,
        abi_compat: ptr::null_mut(),
    };
    Box::into_raw(Box::new(RawContext { head, fabric, id })).cast()
}

unsafe extern "C" fn close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: the context is open.
    let closed =
        unsafe { begin(context, Function::CloseDevice) }.and_then(|mut call| call.world.close(call.context));
    if closed.is_ok() {
        // SAFETY: it came out of a box, and is closed once; the lock is not held any more.
        drop(unsafe { Box::from_raw(context.cast::<RawContext>()) });
    }
    code(closed)
}

unsafe extern "C" fn query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: the context is open.
    code(unsafe { begin(context, Function::QueryDevice) }.map(|call| {
        let device = call.world.contexts[&call.context].device;
        let limits = &call.world.options.limits;
        let mut found: ibv_device_attr = bytemuck::Zeroable::zeroed();
        found.node_guid = guid(device);
        found.sys_image_guid = guid(device);
        found.max_mr_size = u64::MAX;
        found.page_size_cap = 4096;
        found.max_qp = limits.max_qp as c_int;
        found.max_qp_wr = limits.max_qp_wr as c_int;
        found.max_sge = limits.max_sge as c_int;
        found.max_sge_rd = limits.max_sge as c_int;
        found.max_cq = 65_536;
        found.max_cqe = limits.max_cqe as c_int;
        found.max_mr = limits.max_mr as c_int;
        found.max_pd = 1024;
        found.max_qp_rd_atom = c_int::from(limits.rd_atom);
        found.max_qp_init_rd_atom = c_int::from(limits.rd_atom);
        found.max_res_rd_atom = c_int::from(limits.rd_atom) * limits.max_qp as c_int;
        found.max_srq = 1024;
        found.max_srq_wr = limits.max_srq_wr as c_int;
        found.max_srq_sge = limits.max_sge as c_int;
        found.max_pkeys = PARTITION_KEYS.len() as u16;
        found.phys_port_cnt = 1;
        // SAFETY: the caller gives a place for the struct.
        unsafe { *attr = found };
    }))
}

unsafe extern "C" fn query_port(context: *mut ibv_context, port_num: u8, attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the context is open.
    code(unsafe { begin(context, Function::QueryPort) }.and_then(|call| {
        let index = call.world.contexts[&call.context].device;
        let device = &call.world.devices[index];
        if port_num != 1 {
            return Err(libc::EINVAL);
        }
        let mtu = device.mtu_bytes.trailing_zeros() - 7;
        // SAFETY: the caller gives a place for the struct, of which the last two fields are left as they are.
        unsafe {
            let (port_cap_flags2, active_speed_ex) = ((*attr).port_cap_flags2, (*attr).active_speed_ex);
            *attr = ibv_port_attr {
                state: if device.link_up { IBV_PORT_ACTIVE } else { IBV_PORT_DOWN },
                max_mtu: IBV_MTU_4096,
                active_mtu: mtu,
                gid_tbl_len: device.gids().len() as c_int,
                port_cap_flags: 0,
                max_msg_sz: call.world.options.limits.max_msg_sz,
                bad_pkey_cntr: 0,
                qkey_viol_cntr: 0,
                pkey_tbl_len: PARTITION_KEYS.len() as u16,
                lid: if device.ethernet { 0 } else { lid(index) },
                sm_lid: 0,
                lmc: 0,
                max_vl_num: 1,
                sm_sl: 0,
                subnet_timeout: 0,
                init_type_reply: 0,
                // 4 lanes of 25 Gb/s.
                active_width: 2,
                active_speed: 32,
                phys_state: if device.link_up { 5 } else { 3 },
                link_layer: match device.ethernet {
                    true => IBV_LINK_LAYER_ETHERNET,
                    false => IBV_LINK_LAYER_INFINIBAND,
                },
                flags: 0,
                port_cap_flags2,
                active_speed_ex,
            };
        }
        Ok(())
    }))
}

unsafe extern "C" fn query_gid(
    context: *mut ibv_context,
    port_num: u8,
    index: c_int,
    into: *mut ibv_gid,
) -> c_int {
    // SAFETY: the context is open.
    minus_one(unsafe { begin(context, Function::QueryGid) }.and_then(|call| {
        let device = call.world.contexts[&call.context].device;
        let index = usize::try_from(index).map_err(|_| libc::EINVAL)?;
        if port_num != 1 || index >= call.world.devices[device].gids().len() {
            return Err(libc::EINVAL);
        }
        // SAFETY: the caller gives a place for it.
        unsafe { *into = ibv_gid { raw: gid(device, index, call.world.devices[device].moves) } };
        Ok(())
    }))
}

unsafe extern "C" fn query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
    entry_size: usize,
) -> ssize_t {
    // SAFETY: the context is open.
    let filled = unsafe { begin(context, Function::QueryGidTable) }.and_then(|call| {
        let device = call.world.contexts[&call.context].device;
        let (kinds, moves) = (call.world.devices[device].gids(), call.world.devices[device].moves);
        if flags != 0 || entry_size < size_of::<ibv_gid_entry>() || kinds.len() > max_entries {
            return Err(libc::EINVAL);
        }
        for (index, &gid_type) in kinds.iter().enumerate() {
            let entry = ibv_gid_entry {
                gid: ibv_gid { raw: gid(device, index, moves) },
                gid_index: index as u32,
                port_num: 1,
                gid_type,
                ndev_ifindex: 0,
            };
            // SAFETY: the caller gives places for so many.
            unsafe { *entries.byte_add(index * entry_size) = entry };
        }
        Ok(kinds.len() as ssize_t)
    });
    filled.unwrap_or_else(|errno| -(errno as ssize_t))
}

unsafe extern "C" fn query_pkey(
    context: *mut ibv_context,
    port_num: u8,
    index: c_int,
    pkey: *mut u16,
) -> c_int {
    // SAFETY: the context is open.
    minus_one(unsafe { begin(context, Function::QueryPkey) }.and_then(|_call| {
        let index = usize::try_from(index).map_err(|_| libc::EINVAL)?;
        let &key = PARTITION_KEYS.get(index).filter(|_| port_num == 1).ok_or(libc::EINVAL)?;
        // SAFETY: the caller gives a place for it.
        unsafe { *pkey = key.to_be() };
        Ok(())
    }))
}

/// Of each port: the partition that every port is in, and two ways to be in another.
pub(super) const PARTITION_KEYS: [u16; 3] = [0xffff, 0x8001, 0x0001];

// Memory.

unsafe extern "C" fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    // SAFETY: the context is open.
    object(
        unsafe { begin(context, Function::AllocPd) }
            .map(|mut call| call.world.alloc_domain(call.context, call.raw)),
    )
}

unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: the domain exists, or is kept by its fabric.
    code(unsafe { begin((*pd).context, Function::DeallocPd) }.and_then(|mut call| {
        // SAFETY: as above.
        call.world.dealloc_domain(unsafe { id_of(pd) })
    }))
}

unsafe extern "C" fn reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr {
    let access = access as c_uint;
    if access & IBV_ACCESS_OPTIONAL_RANGE != 0 {
        return null(libc::EINVAL);
    }
    // SAFETY: the domain exists; the memory is the caller's to register.
    unsafe { register(Function::RegMr, pd, addr, length, addr as u64, access) }
}

unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: as above.
    unsafe { register(Function::RegMrIova2, pd, addr, length, iova, access) }
}

/// # Safety
/// The domain exists, and the memory stays mapped while it is registered.
unsafe fn register(
    function: Function,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    object(unsafe { begin((*pd).context, function) }.and_then(|mut call| {
        // SAFETY: whoever registers memory keeps it mapped, and has it shared with devices. The handle goes when the
        // region is deregistered.
        let memory = unsafe { Memory::from_raw(addr.cast(), length) }.map_err(|_| libc::EINVAL)?;
        let wanted = Registration { memory, start: 0, addr, bytes: length as u64, iova, access };
        let raw = call.raw;
        // SAFETY: the domain exists, or is kept by its fabric.
        call.world.register(unsafe { id_of(pd) }, raw, wanted)
    }))
}

/// Takes a file that can be mapped in place of a DMA buffer.
unsafe extern "C" fn reg_dmabuf_mr(
    pd: *mut ibv_pd,
    offset: u64,
    length: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the domain exists.
    object(unsafe { begin((*pd).context, Function::RegDmabufMr) }.and_then(|mut call| {
        if fd < 0 {
            return Err(libc::EBADF);
        }
        // SAFETY: the descriptor is open during the call, as the caller says.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
        let fd = fd.map_err(|error| error.raw_os_error().unwrap_or(libc::EBADF))?;
        let start = usize::try_from(offset).map_err(|_| libc::EINVAL)?;
        let end = start.checked_add(length).ok_or(libc::EINVAL)?;
        let memory = Memory::from_fd(fd, end).map_err(|_| libc::EINVAL)?;
        let (addr, access) = (ptr::null_mut(), access as c_uint);
        let wanted = Registration { memory, start, addr, bytes: length as u64, iova, access };
        let raw = call.raw;
        // SAFETY: as above.
        call.world.register(unsafe { id_of(pd) }, raw, wanted)
    }))
}

unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: the region exists, or is kept by its fabric.
    code(unsafe { begin((*mr).context, Function::DeregMr) }.and_then(|mut call| {
        // SAFETY: as above.
        call.world.deregister(unsafe { id_of(mr) })
    }))
}

// Completion queues.

unsafe extern "C" fn create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    // SAFETY: the context is open.
    object(unsafe { begin(context, Function::CreateCompChannel) }.and_then(|mut call| {
        let raw = call.raw;
        let context = call.context;
        call.world.create_channel(context, raw)
    }))
}

unsafe extern "C" fn destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: the channel exists, or is kept by its fabric.
    code(unsafe { begin((*channel).context, Function::DestroyCompChannel) }.and_then(|mut call| {
        // SAFETY: as above.
        call.world.destroy_channel(unsafe { id_of(channel) })
    }))
}

unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: the context is open.
    object(unsafe { begin(context, Function::CreateCq) }.and_then(|mut call| {
        if comp_vector != 0 {
            return Err(libc::EINVAL);
        }
        // SAFETY: the channel exists, or is kept by its fabric.
        let channel = (!channel.is_null()).then(|| (unsafe { id_of(channel) }, channel));
        let (context, raw) = (call.context, call.raw);
        call.world.create_queue(context, raw, cqe, cq_context, channel)
    }))
}

unsafe extern "C" fn resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    // SAFETY: the queue exists, or is kept by its fabric.
    code(unsafe { begin((*cq).context, Function::ResizeCq) }.and_then(|mut call| {
        // SAFETY: as above.
        let capacity = call.world.resize_queue(unsafe { id_of(cq) }, cqe)?;
        // SAFETY: as above; the number changes under the lock alone.
        unsafe { (*cq).cqe = capacity as c_int };
        Ok(())
    }))
}

unsafe extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: the queue exists, or is kept by its fabric.
    code(unsafe { begin((*cq).context, Function::DestroyCq) }.and_then(|call| {
        // SAFETY: as above; the counts change under the lock alone.
        let acknowledged = || unsafe { ((*cq).comp_events_completed, (*cq).async_events_completed) };
        // SAFETY: as above.
        let id = unsafe { id_of(cq) };
        destroy(call, "ibv_destroy_cq", |world| world.destroy_queue(id, acknowledged()))
    }))
}

/// Destroys what may still have events that were not acknowledged: for those it waits, as the library does.
fn destroy(
    call: Call<'_>,
    name: &str,
    mut destroy: impl FnMut(&mut World) -> Result<(), Held>,
) -> Result<(), Errno> {
    let Call { fabric, mut world, .. } = call;
    let deadline = std::time::Instant::now() + ACKNOWLEDGE_PATIENCE;
    loop {
        match destroy(&mut world) {
            Ok(()) => break,
            Err(Held::Errno(errno)) => return Err(errno),
            Err(Held::Unacknowledged) => {
                if fabric.acknowledged.wait_until(&mut world, deadline).timed_out() {
                    let what = format!("{name} waits for ever: an event of it was not acknowledged");
                    return Err(world.violation(what));
                }
            }
        }
    }
    fabric.more_to_do();
    Ok(())
}

/// Longer than any thread needs that is about to acknowledge.
const ACKNOWLEDGE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(3);

unsafe extern "C" fn get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: the channel exists.
    let (context, id, fd) = unsafe { ((*channel).context, id_of(channel), (*channel).fd) };
    loop {
        // SAFETY: the descriptor is the channel's.
        if let Err(errno) = wait_for_event(unsafe { BorrowedFd::borrow_raw(fd) }) {
            return minus_one(Err(errno));
        }
        // SAFETY: the context is open.
        let mut call = match unsafe { begin(context, Function::GetCqEvent) } {
            Ok(call) => call,
            Err(errno) => return minus_one(Err(errno)),
        };
        let world = &mut *call.world;
        let Some(channel) = world.channels.get_mut(&id) else {
            return minus_one(Err(world.violation("ibv_get_cq_event of a destroyed channel")));
        };
        // Without one, its queue was destroyed meanwhile.
        if let Some(queue) = channel.events.pop_front() {
            let queue = world.queues.get_mut(&queue).expect("its events would be gone");
            queue.events_got += 1;
            let raw = queue.raw.head();
            // SAFETY: the caller gives places for both; the queue exists.
            unsafe {
                *cq = raw;
                *cq_context = (*raw).cq_context;
            }
            return 0;
        }
    }
}

/// Takes one of the events that made a descriptor readable, and waits for one if the descriptor does.
fn wait_for_event(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::io::read(fd, &mut [0; 8]).map(drop).map_err(|error| error.raw_os_error())
}

unsafe extern "C" fn ack_cq_events(cq: *mut ibv_cq, nevents: c_uint) {
    // SAFETY: the queue exists, or is kept by its fabric.
    if let Ok(call) = unsafe { begin((*cq).context, Function::AckCqEvents) } {
        // SAFETY: as above; the count changes under the lock alone.
        unsafe { (*cq).comp_events_completed += nevents };
        call.fabric.acknowledged.notify_all();
    }
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the queue exists, or is kept by its fabric.
    let polled = unsafe { begin((*cq).context, Function::PollCq) }.and_then(|mut call| {
        let world = &mut *call.world;
        match world.options.pace {
            Pace::AtOnce | Pace::Weightless => world.settle(SETTLE_STEPS),
            Pace::Stepped { most } => {
                let steps = world.random.below(most + 1);
                for _ in 0..steps {
                    world.step();
                }
            }
            Pace::Thread => {}
        }
        // SAFETY: as above.
        let polled = world.poll(unsafe { id_of(cq) }, usize::try_from(num_entries).unwrap_or(0))?;
        for (at, completion) in polled.iter().enumerate() {
            // SAFETY: the caller gives places for so many.
            unsafe { *wc.add(at) = *completion };
        }
        Ok(polled.len() as c_int)
    });
    // A process that is dead polls nothing.
    polled.unwrap_or(-1)
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the queue exists, or is kept by its fabric.
    code(unsafe { begin((*cq).context, Function::ReqNotifyCq) }.and_then(|mut call| {
        // SAFETY: as above.
        call.world.arm(unsafe { id_of(cq) }, solicited_only != 0)
    }))
}

// Events.

unsafe extern "C" fn get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int {
    loop {
        // SAFETY: the context is open, and its descriptor does not change.
        if let Err(errno) = unsafe { wait_for_event(BorrowedFd::borrow_raw((*context).async_fd)) } {
            return minus_one(Err(errno));
        }
        // SAFETY: the context is open.
        let mut call = match unsafe { begin(context, Function::GetAsyncEvent) } {
            Ok(call) => call,
            Err(errno) => return minus_one(Err(errno)),
        };
        let id = call.context;
        // Without one, what it was of was destroyed meanwhile.
        if let Some(found) = call.world.next_event(id) {
            // SAFETY: the caller gives a place for it.
            unsafe { *event = found };
            return 0;
        }
    }
}

unsafe extern "C" fn ack_async_event(event: *mut ibv_async_event) {
    // SAFETY: the event was got, so what it is of exists, or is kept by its fabric; the counts change under the lock
    // alone.
    unsafe {
        let element = (*event).element;
        match (*event).event_type {
            IBV_EVENT_CQ_ERR => {
                if let Ok(call) = begin((*element.cq).context, Function::AckAsyncEvent) {
                    (*element.cq).async_events_completed += 1;
                    call.fabric.acknowledged.notify_all();
                }
            }
            IBV_EVENT_QP_FATAL
            | IBV_EVENT_QP_REQ_ERR
            | IBV_EVENT_QP_ACCESS_ERR
            | IBV_EVENT_COMM_EST
            | IBV_EVENT_QP_LAST_WQE_REACHED => {
                if let Ok(call) = begin((*element.qp).context, Function::AckAsyncEvent) {
                    (*element.qp).events_completed += 1;
                    call.fabric.acknowledged.notify_all();
                }
            }
            // Of a port or the device: nothing waits for it.
            _ => {}
        }
    }
}

/// What the structs of a device say of it.
pub(super) fn device_struct(index: usize, iwarp: bool) -> ibv_device {
    let text = |text: String| {
        let mut chars = [0 as c_char; 64];
        chars.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from as c_char);
        chars
    };
    ibv_device {
        _ops: [ptr::null_mut(); 2],
        node_type: if iwarp { IBV_NODE_RNIC } else { IBV_NODE_CA },
        transport_type: if iwarp { IBV_TRANSPORT_IWARP } else { IBV_TRANSPORT_IB },
        name: text(format!("fake{index}")),
        dev_name: text(format!("uverbs{index}")),
        dev_path: [0; 256],
        ibdev_path: [0; 256],
    }
}
