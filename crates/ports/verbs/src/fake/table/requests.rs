//! Shared receive queues and queue pairs, and what is posted to them.

use super::*;

// Receives.

pub(super) unsafe extern "C" fn create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: the domain exists, or is kept by its fabric.
    object(unsafe { begin((*pd).context, Function::CreateSrq) }.and_then(|mut call| {
        let raw = call.raw;
        // SAFETY: as above; the caller gives the struct.
        unsafe { call.world.create_shared(id_of(pd), (raw, pd), &*attr) }
    }))
}

pub(super) unsafe extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: the queue exists, or is kept by its fabric.
    code(unsafe { begin((*srq).context, Function::DestroySrq) }.and_then(|mut call| {
        // SAFETY: as above.
        call.world.destroy_shared(unsafe { id_of(srq) })
    }))
}

pub(super) unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the queue exists, or is kept by its fabric; the chain is one of requests that ends with null.
    unsafe {
        let id = id_of(srq);
        post_receives((*srq).context, Function::PostSrqRecv, wr, bad_wr, |world, receive| {
            world.post_shared(id, receive)
        })
    }
}

pub(super) unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as above.
    unsafe {
        let id = id_of(qp);
        post_receives((*qp).context, Function::PostRecv, wr, bad_wr, |world, receive| {
            world.post_receive(id, receive)
        })
    }
}

/// # Safety
/// The context is open, and the chain is one of requests that ends with null.
unsafe fn post_receives(
    context: *mut ibv_context,
    function: Function,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
    post: impl Fn(&mut World, Receive) -> Result<(), Errno>,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut call = unsafe { find(context) };
    let (context, world) = (call.context, &mut *call.world);
    let mut requests = Vec::new();
    let mut next = wr;
    while !next.is_null() {
        requests.push(next);
        // SAFETY: as above.
        next = unsafe { (*next).next };
    }
    let failure = world.called_with(function, None, requests.len());
    let usable = world.usable(context, function);
    let posted = requests.iter().enumerate().try_for_each(|(at, &request)| {
        let refused = match &failure {
            Some(failure) if at == failure.accepted => Err(failure.errno),
            _ => usable,
        };
        // SAFETY: as above; a request says how many pieces its list has.
        let posted = refused.and_then(|()| unsafe {
            let pieces = pieces((*request).sg_list, (*request).num_sge)?;
            post(world, Receive { id: (*request).wr_id, pieces })
        });
        posted.map_err(|errno| (errno, request))
    });
    call.fabric.more_to_do();
    posted.map_or_else(
        |(errno, request)| {
            // SAFETY: the caller gives a place for it.
            unsafe { *bad_wr = request };
            errno
        },
        |()| 0,
    )
}

/// # Safety
/// The list has so many entries.
unsafe fn pieces(list: *mut ibv_sge, count: c_int) -> Result<Vec<ibv_sge>, Errno> {
    match usize::try_from(count) {
        Ok(0) => Ok(Vec::new()),
        // SAFETY: the caller's promise.
        Ok(count) => Ok(unsafe { slice::from_raw_parts(list, count) }.to_vec()),
        Err(_) => Err(libc::EINVAL),
    }
}

// Queue pairs.

pub(super) unsafe extern "C" fn create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: the domain and the queues exist, or are kept by their fabric; the caller gives the struct.
    object(unsafe { begin((*pd).context, Function::CreateQp) }.and_then(|mut call| {
        let raw = call.raw;
        // SAFETY: as above.
        unsafe {
            let attributes = &mut *attr;
            if attributes.send_cq.is_null() || attributes.recv_cq.is_null() {
                return Err(libc::EINVAL);
            }
            let shared = (!attributes.srq.is_null()).then(|| id_of(attributes.srq));
            let queues = (id_of(attributes.send_cq), id_of(attributes.recv_cq), shared);
            call.world.create_pair(id_of(pd), (raw, pd), queues, attributes)
        }
    }))
}

pub(super) unsafe extern "C" fn modify_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    attr_mask: c_int,
) -> c_int {
    // SAFETY: the queue pair exists, or is kept by its fabric; the caller gives the struct.
    unsafe {
        let mut call = find((*qp).context);
        let (attributes, mask) = (&*attr, attr_mask as u32);
        let state = (mask & IBV_QP_STATE != 0).then_some(attributes.qp_state);
        if let Some(failure) = call.world.called_with(Function::ModifyQp, state, usize::MAX) {
            return failure.errno;
        }
        let context = call.context;
        if let Err(errno) = call.world.usable(context, Function::ModifyQp) {
            return errno;
        }
        let modified = call.world.modify(id_of(qp), attributes, mask);
        call.fabric.more_to_do();
        code(modified.map(|state| (*qp).state = state))
    }
}

pub(super) unsafe extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: the queue pair exists, or is kept by its fabric.
    code(unsafe { begin((*qp).context, Function::DestroyQp) }.and_then(|call| {
        // SAFETY: as above.
        let id = unsafe { id_of(qp) };
        // SAFETY: as above; the count changes under the lock alone.
        destroy(call, "ibv_destroy_qp", |world| world.destroy_pair(id, unsafe { (*qp).events_completed }))
    }))
}

pub(super) unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the queue pair exists, or is kept by its fabric.
    let (mut call, id) = unsafe { (find((*qp).context), id_of(qp)) };
    let (context, world) = (call.context, &mut *call.world);
    if world.options.pace == Pace::Weightless {
        // SAFETY: the chain is one of requests that ends with null; the caller gives a place for one.
        return unsafe { stub::post(world, id, wr, bad_wr) };
    }
    let mut requests = Vec::new();
    let mut next = wr;
    while !next.is_null() {
        requests.push(next);
        // SAFETY: the chain is one of requests that ends with null.
        next = unsafe { (*next).next };
    }
    let failure = world.called_with(Function::PostSend, None, requests.len());
    let usable = world.usable(context, Function::PostSend);
    let posted = requests.iter().enumerate().try_for_each(|(at, &request)| {
        let refused = match &failure {
            Some(failure) if at == failure.accepted => Err(failure.errno),
            _ => usable,
        };
        let posted = refused.and_then(|()| {
            let cap = world.may_send(id)?;
            // SAFETY: as above; inline data can be read.
            let work = unsafe { work(&*request, &cap)? };
            world.post(id, work)
        });
        posted.map_err(|errno| (errno, request))
    });
    if world.options.pace == Pace::AtOnce {
        world.settle(SETTLE_STEPS);
    }
    call.fabric.more_to_do();
    posted.map_or_else(
        |(errno, request)| {
            // SAFETY: the caller gives a place for it.
            unsafe { *bad_wr = request };
            errno
        },
        |()| 0,
    )
}

/// # Safety
/// The request's list is as long as it says, and what goes inline can be read.
pub(in crate::fake) unsafe fn work(request: &ibv_send_wr, cap: &ibv_qp_cap) -> Result<Work, Errno> {
    // SAFETY: the caller's promise.
    let pieces = unsafe { pieces(request.sg_list, request.num_sge)? };
    let is_inline = request.send_flags & IBV_SEND_INLINE != 0;
    let (is_read, is_send) = match request.opcode {
        IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => (false, false),
        IBV_WR_SEND | IBV_WR_SEND_WITH_IMM => (false, true),
        IBV_WR_RDMA_READ => (true, false),
        _ => return Err(libc::EINVAL),
    };
    if pieces.len() > cap.max_send_sge as usize || is_inline && is_read {
        return Err(libc::EINVAL);
    }
    let bytes = pieces.iter().map(|piece| u64::from(piece.length)).sum::<u64>();
    let data = if is_inline {
        if bytes > u64::from(cap.max_inline_data) {
            return Err(libc::EINVAL);
        }
        let mut data = Vec::with_capacity(bytes as usize);
        for piece in pieces.iter().filter(|piece| piece.length > 0) {
            let at = data.len();
            data.resize(at + piece.length as usize, 0);
            // SAFETY: the caller's promise, for the length of the call, for which the handle lives.
            let memory = unsafe { Memory::from_raw(piece.addr as *mut u8, piece.length as usize) };
            memory.map_err(|_| libc::EINVAL)?.read(0, &mut data[at..]).expect("the whole of it");
        }
        Data::Inline(data)
    } else {
        Data::Pieces(pieces)
    };
    // SAFETY: this arm is of plain numbers, and writes and reads use it.
    let rdma = unsafe { request.wr.rdma };
    Ok(Work {
        id: request.wr_id,
        opcode: request.opcode,
        flags: request.send_flags,
        imm: request.imm_data,
        remote_address: if is_send { 0 } else { rdma.remote_addr },
        remote_key: if is_send { 0 } else { rdma.rkey },
        data,
        bytes,
        first: 0,
        packets: 0,
        fails_with: None,
    })
}
