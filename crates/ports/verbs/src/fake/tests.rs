//! Each rule of the fabric, through the table of functions that a port would use.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use crossdock_memory::{AllocateOptions, Memory};

use super::*;

/// Calls a function of the table.
macro_rules! call {
    ($library:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        let function = $library.$function;
        // SAFETY: the tests hand in objects of this library, which are kept even when they were destroyed, and places for
        // what is filled.
        unsafe { function($($argument),*) }
    }};
}

// Behind the macro, which they use.
mod moving;
mod network;
mod objects;
mod requests;

const MEMORY_BYTES: usize = 64 << 10;
const ALL_ACCESS: u32 = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
const PATIENCE: Duration = Duration::from_secs(20);

/// Steps are made by the test alone.
fn manual() -> FabricOptions {
    FabricOptions { pace: Pace::Stepped { most: 0 }, ..Default::default() }
}

fn open_context(library: &Library, device: usize) -> *mut ibv_context {
    let list = call!(library, ibv_get_device_list(ptr::null_mut()));
    // SAFETY: the list has an entry for each device.
    let device = unsafe { *list.add(device) };
    let context = call!(library, ibv_open_device(device));
    call!(library, ibv_free_device_list(list));
    context
}

fn device_count(library: &Library) -> i32 {
    let mut count = -1;
    let list = call!(library, ibv_get_device_list(&mut count));
    call!(library, ibv_free_device_list(list));
    count
}

/// What one process has: a device, one queue of each kind, and memory.
struct Node {
    library: Arc<Library>,
    context: *mut ibv_context,
    pd: *mut ibv_pd,
    channel: *mut ibv_comp_channel,
    cq: *mut ibv_cq,
    srq: *mut ibv_srq,
    mr: *mut ibv_mr,
    memory: Memory,
}

struct NodeOptions {
    completions: i32,
    receives: u32,
    access: u32,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { completions: 256, receives: 32, access: ALL_ACCESS }
    }
}

impl Node {
    fn new(fabric: &Fabric, device: usize) -> Self {
        Self::with(fabric, device, NodeOptions::default())
    }

    fn with(fabric: &Fabric, device: usize, options: NodeOptions) -> Self {
        let library = fabric.library();
        let context = open_context(&library, device);
        let pd = call!(library, ibv_alloc_pd(context));
        let channel = call!(library, ibv_create_comp_channel(context));
        let cq = call!(library, ibv_create_cq(context, options.completions, ptr::null_mut(), channel, 0));
        let mut attributes: ibv_srq_init_attr = Zeroable::zeroed();
        (attributes.attr.max_wr, attributes.attr.max_sge) = (options.receives, 1);
        let srq = call!(library, ibv_create_srq(pd, &mut attributes));
        let memory = Memory::allocate(MEMORY_BYTES, &AllocateOptions::default()).unwrap();
        let base = memory.base().cast();
        let mr = call!(library, ibv_reg_mr(pd, base, MEMORY_BYTES, options.access as i32));
        let node = Self { library, context, pd, channel, cq, srq, mr, memory };
        assert!(!node.srq.is_null() && !node.mr.is_null() && !node.cq.is_null());
        for fd in [node.async_fd(), node.channel_fd()] {
            rustix::io::ioctl_fionbio(fd, true).unwrap();
        }
        node
    }

    fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open.
        unsafe { BorrowedFd::borrow_raw((*self.context).async_fd) }
    }

    fn channel_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel exists.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    fn device(&self) -> usize {
        // SAFETY: the context is open, on a device of a fabric.
        unsafe { (*(*self.context).device.cast::<RawDevice>()).index }
    }

    fn init_attributes(&self, sends: u32) -> ibv_qp_init_attr {
        let mut attributes: ibv_qp_init_attr = Zeroable::zeroed();
        (attributes.send_cq, attributes.recv_cq, attributes.srq) = (self.cq, self.cq, self.srq);
        (attributes.cap.max_send_wr, attributes.cap.max_send_sge) = (sends, 2);
        attributes.cap.max_inline_data = 64;
        attributes.qp_type = IBV_QPT_RC;
        attributes
    }

    fn pair(&self, sends: u32) -> *mut ibv_qp {
        let pair = call!(self.library, ibv_create_qp(self.pd, &mut self.init_attributes(sends)));
        assert!(!pair.is_null());
        pair
    }

    fn modify(&self, pair: *mut ibv_qp, attributes: &ibv_qp_attr, mask: u32) -> i32 {
        call!(self.library, ibv_modify_qp(pair, &mut { *attributes }, mask as i32))
    }

    fn move_to(&self, pair: *mut ibv_qp, state: u32) -> i32 {
        let mut attributes: ibv_qp_attr = Zeroable::zeroed();
        attributes.qp_state = state;
        self.modify(pair, &attributes, IBV_QP_STATE)
    }

    fn init(&self, pair: *mut ibv_qp) -> i32 {
        let mut attributes: ibv_qp_attr = Zeroable::zeroed();
        (attributes.qp_state, attributes.port_num) = (IBV_QPS_INIT, 1);
        attributes.qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
        self.modify(pair, &attributes, INIT_MASK)
    }

    fn to_receive(&self, pair: *mut ibv_qp, remote: &Node, number: u32, wiring: &Wiring) -> i32 {
        let mut attributes: ibv_qp_attr = Zeroable::zeroed();
        (attributes.qp_state, attributes.dest_qp_num, attributes.rq_psn) = (IBV_QPS_RTR, number, wiring.psn);
        (attributes.path_mtu, attributes.max_dest_rd_atomic) = (IBV_MTU_1024, wiring.reads_served);
        (attributes.ah_attr.port_num, attributes.ah_attr.is_global) = (1, 1);
        attributes.ah_attr.grh.dgid.raw = wire::gid(remote.device(), 3, 0);
        attributes.ah_attr.grh.sgid_index = 3;
        self.modify(pair, &attributes, RTR_MASK)
    }

    fn to_send(&self, pair: *mut ibv_qp, wiring: &Wiring) -> i32 {
        let mut attributes: ibv_qp_attr = Zeroable::zeroed();
        (attributes.qp_state, attributes.sq_psn, attributes.timeout) = (IBV_QPS_RTS, wiring.psn, 14);
        (attributes.retry_cnt, attributes.rnr_retry) = (wiring.retries, wiring.rnr_retries);
        attributes.max_rd_atomic = wiring.reads;
        self.modify(pair, &attributes, RTS_MASK)
    }

    fn post(&self, pair: *mut ibv_qp, works: &[Wr]) -> Result<(), (usize, i32)> {
        let mut pieces: Vec<ibv_sge> = works
            .iter()
            .map(|work| ibv_sge {
                addr: self.memory.base() as u64 + work.local,
                length: work.bytes,
                lkey: work.local_key.unwrap_or(self.local_key()),
            })
            .collect();
        let mut requests: Vec<ibv_send_wr> = vec![Zeroable::zeroed(); works.len()];
        for at in (0..works.len()).rev() {
            let next = requests.get_mut(at + 1).map_or(ptr::null_mut(), ptr::from_mut);
            let (work, request) = (&works[at], &mut requests[at]);
            (request.wr_id, request.next) = (work.id, next);
            (request.sg_list, request.num_sge) = (&raw mut pieces[at], i32::from(work.bytes > 0));
            (request.opcode, request.send_flags, request.imm_data) =
                (work.opcode, work.flags, work.imm.to_be());
            request.wr.rdma = ibv_send_wr_rdma { remote_addr: work.remote.0, rkey: work.remote.1 };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair exists, and the chain lives during the call.
        let errno = unsafe {
            let post = (*self.context).ops.post_send.unwrap();
            post(pair, requests.as_mut_ptr(), &mut bad)
        };
        let taken = requests.iter().position(|request| ptr::eq(request, bad));
        if errno == 0 { Ok(()) } else { Err((taken.unwrap(), errno)) }
    }

    /// Receives of 1 KiB each into the second half of the memory, as `id`, and so on.
    fn receive(&self, first_id: u64, count: u64) -> Result<(), i32> {
        for id in first_id..first_id + count {
            let addr = self.memory.base() as u64 + RECEIVES_AT + id % 32 * 1024;
            let mut piece = ibv_sge { addr, length: 1024, lkey: self.local_key() };
            let mut request =
                ibv_recv_wr { wr_id: id, next: ptr::null_mut(), sg_list: &mut piece, num_sge: 1 };
            let mut bad = ptr::null_mut();
            // SAFETY: the queue exists, and the request lives during the call.
            let errno = unsafe {
                let post = (*self.context).ops.post_srq_recv.unwrap();
                post(self.srq, &mut request, &mut bad)
            };
            if errno != 0 {
                assert!(ptr::eq(bad, &request));
                return Err(errno);
            }
        }
        Ok(())
    }

    fn poll(&self) -> Vec<ibv_wc> {
        let mut completions: Vec<ibv_wc> = vec![Zeroable::zeroed(); 64];
        // SAFETY: the queue exists, and there are so many places.
        let polled = unsafe { (*self.context).ops.poll_cq.unwrap()(self.cq, 64, completions.as_mut_ptr()) };
        completions.truncate(usize::try_from(polled).expect("polling works"));
        completions
    }

    fn arm(&self, solicited: bool) -> i32 {
        // SAFETY: the queue exists.
        unsafe { (*self.context).ops.req_notify_cq.unwrap()(self.cq, i32::from(solicited)) }
    }

    /// Takes a completion event, and says what there was.
    fn take_wake(&self) -> Result<(), i32> {
        let (mut cq, mut argument) = (ptr::null_mut(), ptr::null_mut());
        if call!(self.library, ibv_get_cq_event(self.channel, &mut cq, &mut argument)) != 0 {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
        }
        assert!(ptr::eq(cq, self.cq));
        call!(self.library, ibv_ack_cq_events(cq, 1));
        Ok(())
    }

    fn get_event(&self) -> Option<ibv_async_event> {
        let mut event = Zeroable::zeroed();
        match call!(self.library, ibv_get_async_event(self.context, &mut event)) {
            0 => Some(event),
            _ => {
                assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EAGAIN));
                None
            }
        }
    }

    /// The kinds of all events, each acknowledged.
    fn events(&self) -> Vec<u32> {
        let mut kinds = Vec::new();
        while let Some(mut event) = self.get_event() {
            kinds.push(event.event_type);
            call!(self.library, ibv_ack_async_event(&mut event));
        }
        kinds
    }

    fn local_key(&self) -> u32 {
        // SAFETY: the region is kept.
        unsafe { (*self.mr).lkey }
    }

    /// An address in its memory, with the key that peers need.
    fn at(&self, offset: u64) -> (u64, u32) {
        // SAFETY: the region is kept.
        (self.memory.base() as u64 + offset, unsafe { (*self.mr).rkey })
    }

    fn bytes(&self, offset: usize, bytes: usize) -> Vec<u8> {
        let mut into = vec![0; bytes];
        self.memory.read(offset, &mut into).unwrap();
        into
    }

    fn destroy(&self, pair: *mut ibv_qp) -> i32 {
        call!(self.library, ibv_destroy_qp(pair))
    }

    /// Destroys all but queue pairs, in an order that is allowed.
    fn close(self) {
        self.events();
        assert_eq!(call!(self.library, ibv_destroy_srq(self.srq)), 0);
        assert_eq!(call!(self.library, ibv_destroy_cq(self.cq)), 0);
        assert_eq!(call!(self.library, ibv_destroy_comp_channel(self.channel)), 0);
        assert_eq!(call!(self.library, ibv_dereg_mr(self.mr)), 0);
        assert_eq!(call!(self.library, ibv_dealloc_pd(self.pd)), 0);
        assert_eq!(call!(self.library, ibv_close_device(self.context)), 0);
    }
}

const RECEIVES_AT: u64 = MEMORY_BYTES as u64 / 2;
const INIT_MASK: u32 = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
const RTR_MASK: u32 = IBV_QP_STATE
    | IBV_QP_AV
    | IBV_QP_PATH_MTU
    | IBV_QP_DEST_QPN
    | IBV_QP_RQ_PSN
    | IBV_QP_MAX_DEST_RD_ATOMIC
    | IBV_QP_MIN_RNR_TIMER;
const RTS_MASK: u32 = IBV_QP_STATE
    | IBV_QP_SQ_PSN
    | IBV_QP_TIMEOUT
    | IBV_QP_RETRY_CNT
    | IBV_QP_RNR_RETRY
    | IBV_QP_MAX_QP_RD_ATOMIC;

/// A request.
#[derive(Clone)]
struct Wr {
    id: u64,
    opcode: u32,
    flags: u32,
    local: u64,
    local_key: Option<u32>,
    bytes: u32,
    remote: (u64, u32),
    imm: u32,
}

fn wr(id: u64, opcode: u32, bytes: u32, remote: (u64, u32)) -> Wr {
    let flags = IBV_SEND_SIGNALED;
    Wr { id, opcode, flags, local: 0, local_key: None, bytes, remote, imm: id as u32 }
}

fn write(id: u64, bytes: u32, remote: (u64, u32)) -> Wr {
    wr(id, IBV_WR_RDMA_WRITE, bytes, remote)
}

/// What both ends of a connection are set to.
struct Wiring {
    psn: u32,
    retries: u8,
    rnr_retries: u8,
    reads: u8,
    reads_served: u8,
}

impl Default for Wiring {
    fn default() -> Self {
        // Packet numbers that soon begin again at 0.
        Self { psn: 0xff_fff0, retries: 3, rnr_retries: 7, reads: 4, reads_served: 4 }
    }
}

struct Link {
    here: Node,
    there: Node,
    near: *mut ibv_qp,
    far: *mut ibv_qp,
}

impl Link {
    fn new(fabric: &Fabric) -> Self {
        Self::with(fabric, &Wiring::default(), NodeOptions::default(), NodeOptions::default())
    }

    fn with(fabric: &Fabric, wiring: &Wiring, here: NodeOptions, there: NodeOptions) -> Self {
        let (here, there) = (Node::with(fabric, 0, here), Node::with(fabric, 1, there));
        let (near, far) = (here.pair(16), there.pair(16));
        connect((&here, near), (&there, far), wiring);
        there.memory.fill(0, MEMORY_BYTES, 0xee).unwrap();
        let source: Vec<u8> = (0..MEMORY_BYTES).map(|at| (at / 256 + at) as u8).collect();
        here.memory.write(0, &source).unwrap();
        Self { here, there, near, far }
    }

    fn close(self) {
        self.here.events();
        self.there.events();
        assert_eq!(self.here.destroy(self.near), 0);
        assert_eq!(self.there.destroy(self.far), 0);
        self.here.close();
        self.there.close();
    }
}

fn number(pair: *mut ibv_qp) -> u32 {
    // SAFETY: the queue pair is kept.
    unsafe { (*pair).qp_num }
}

fn connect((here, near): (&Node, *mut ibv_qp), (there, far): (&Node, *mut ibv_qp), wiring: &Wiring) {
    assert_eq!((here.init(near), there.init(far)), (0, 0));
    assert_eq!(here.to_receive(near, there, number(far), wiring), 0);
    assert_eq!(there.to_receive(far, here, number(near), wiring), 0);
    assert_eq!((here.to_send(near, wiring), there.to_send(far, wiring)), (0, 0));
}

fn state(fabric: &Fabric, device: usize, pair: *mut ibv_qp) -> u32 {
    let pairs = fabric.queue_pairs();
    pairs.iter().find(|p| (p.device, p.number) == (device, number(pair))).expect("it exists").state
}

fn statuses(completions: &[ibv_wc]) -> Vec<(u64, u32)> {
    completions.iter().map(|wc| (wc.wr_id, wc.status)).collect()
}

/// Far more than anything takes that is not for ever.
const LONG: u64 = 20_000;
