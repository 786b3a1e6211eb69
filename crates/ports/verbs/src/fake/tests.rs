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
        attributes.ah_attr.grh.dgid.raw = wire::gid(remote.device(), 3);
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

#[test]
fn writes_land_when_steps_are_made_and_not_before() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(7, 10_000, link.there.at(100))]).unwrap();
    assert!(link.here.poll().is_empty());
    assert_eq!(link.there.bytes(100, 10_000), vec![0xee; 10_000]);
    fabric.step(LONG);
    let done = link.here.poll();
    assert_eq!(statuses(&done), [(7, IBV_WC_SUCCESS)]);
    assert_eq!((done[0].opcode, done[0].qp_num), (IBV_WC_RDMA_WRITE, number(link.near)));
    assert_eq!(link.there.bytes(100, 10_000), link.here.bytes(0, 10_000));
    assert_eq!(link.there.bytes(10_100, 10), [0xee; 10]);
    assert_eq!(fabric.counters().bytes_moved, 10_000);
    assert!(link.there.poll().is_empty(), "the peer is told nothing of a write");
    assert_eq!(link.there.events(), [], "what has come to RTS has no need of IBV_EVENT_COMM_EST");
    link.close();
    assert_eq!(fabric.leaks(), [""; 0]);
    let counted = fabric.counters();
    assert_eq!((counted.pairs_created, counted.pairs_destroyed), (2, 2));
}

#[test]
fn at_once_everything_happens_within_the_call() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::AtOnce, ..manual() });
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(7, 5_000, link.there.at(0))]).unwrap();
    assert_eq!(link.there.bytes(0, 5_000), link.here.bytes(0, 5_000));
    assert_eq!(statuses(&link.here.poll()), [(7, IBV_WC_SUCCESS)]);
    link.close();
}

#[test]
fn polls_make_steps() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::Stepped { most: 3 }, ..manual() });
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(7, 20_000, link.there.at(0))]).unwrap();
    let polls = (0..).take_while(|_| link.here.poll().is_empty()).count();
    assert!(polls > 10, "{polls} polls for 20 packets and their acknowledgements");
    link.close();
}

#[test]
fn a_thread_moves_what_sleepers_wait_for() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::Thread, ..manual() });
    let link = Link::new(&fabric);
    rustix::io::ioctl_fionbio(link.here.channel_fd(), false).unwrap();
    for round in 0..20 {
        assert_eq!(link.here.arm(false), 0);
        link.here.post(link.near, &[write(round, 9_000, link.there.at(0))]).unwrap();
        link.here.take_wake().unwrap();
        assert_eq!(statuses(&link.here.poll()), [(round, IBV_WC_SUCCESS)]);
    }
    link.close();
}

#[test]
fn an_immediate_takes_a_receive_and_comes_after_its_bytes() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.there.receive(50, 2).unwrap();
    let with_imm = wr(0x0102_0304, IBV_WR_RDMA_WRITE_WITH_IMM, 3_000, link.there.at(0));
    link.here.post(link.near, &[with_imm]).unwrap();
    let arrived = (0..LONG).find_map(|_| {
        fabric.step(1);
        link.there.poll().pop()
    });
    let arrived = arrived.expect("it arrives");
    assert_eq!((arrived.wr_id, arrived.status), (50, IBV_WC_SUCCESS));
    assert_eq!((arrived.opcode, arrived.byte_len), (IBV_WC_RECV_RDMA_WITH_IMM, 3_000));
    assert_eq!((u32::from_be(arrived.imm_data), arrived.wc_flags), (0x0102_0304, IBV_WC_WITH_IMM));
    assert_eq!(arrived.qp_num, number(link.far));
    assert_eq!(link.there.bytes(0, 3_000), link.here.bytes(0, 3_000));
    link.close();
}

#[test]
fn messages_land_in_receives_in_order() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.there.receive(0, 3).unwrap();
    let send = |id, bytes| wr(id, IBV_WR_SEND_WITH_IMM, bytes, (0, 0));
    let plain = Wr { opcode: IBV_WR_SEND, ..send(2, 1_024) };
    link.here.post(link.near, &[send(1, 44), plain, send(3, 0)]).unwrap();
    fabric.step(LONG);
    let arrived = link.there.poll();
    let lengths: Vec<_> = arrived.iter().map(|wc| (wc.wr_id, wc.opcode, wc.byte_len, wc.wc_flags)).collect();
    assert_eq!(lengths, [(0, IBV_WC_RECV, 44, 2), (1, IBV_WC_RECV, 1_024, 0), (2, IBV_WC_RECV, 0, 2)]);
    assert_eq!(link.there.bytes(RECEIVES_AT as usize, 44), link.here.bytes(0, 44));
    assert_eq!(link.there.bytes(RECEIVES_AT as usize + 1_024, 1_024), link.here.bytes(0, 1_024));
    assert!(link.here.poll().iter().all(|wc| wc.opcode == IBV_WC_SEND));
    link.close();
}

#[test]
fn a_message_too_long_for_its_receive_fails_at_both_ends() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.there.receive(9, 1).unwrap();
    link.here.post(link.near, &[wr(1, IBV_WR_SEND, 1_025, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.there.poll()), [(9, IBV_WC_LOC_LEN_ERR)]);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_REM_INV_REQ_ERR)]);
    assert_eq!((state(&fabric, 0, link.near), state(&fabric, 1, link.far)), (IBV_QPS_ERR, IBV_QPS_ERR));
    link.close();
}

#[test]
fn without_a_receive_the_requester_waits() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[wr(1, IBV_WR_SEND_WITH_IMM, 0, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert!(link.here.poll().is_empty() && link.there.poll().is_empty());
    assert!(fabric.counters().receivers_not_ready > 7, "for ever, and not seven times");
    link.there.receive(5, 1).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_SUCCESS)]);
    assert_eq!(statuses(&link.there.poll()), [(5, IBV_WC_SUCCESS)]);
    link.close();
}

#[test]
fn without_a_receive_patience_ends_where_it_is_limited() {
    let fabric = Fabric::new(manual());
    let wiring = Wiring { rnr_retries: 2, ..Default::default() };
    let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
    link.here.post(link.near, &[wr(1, IBV_WR_SEND_WITH_IMM, 0, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_RNR_RETRY_EXC_ERR)]);
    assert_eq!(fabric.counters().receivers_not_ready, 3);
    link.close();
}

#[test]
fn reads_bring_bytes_and_wait_for_each_other() {
    let fabric = Fabric::new(manual());
    let wiring = Wiring { reads: 2, reads_served: 2, ..Default::default() };
    let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
    let expected: Vec<u8> = (0..30_000).map(|at| (at % 251) as u8).collect();
    link.there.memory.write(0, &expected).unwrap();
    let read =
        |id: u64| Wr { local: id * 3_000, ..wr(id, IBV_WR_RDMA_READ, 3_000, link.there.at(id * 3_000)) };
    // The peer would refuse a third at a time.
    link.here.post(link.near, &(0..10).map(read).collect::<Vec<_>>()).unwrap();
    fabric.step(LONG);
    let done = link.here.poll();
    assert_eq!(statuses(&done), (0..10).map(|id| (id, IBV_WC_SUCCESS)).collect::<Vec<_>>());
    assert!(done.iter().all(|wc| (wc.opcode, wc.byte_len) == (IBV_WC_RDMA_READ, 3_000)));
    assert_eq!(link.here.bytes(0, 30_000), expected);
    link.close();
}

#[test]
fn reads_beyond_what_either_end_allows_fail() {
    for (reads, reads_served, count, status) in
        [(0, 4, 1, IBV_WC_LOC_QP_OP_ERR), (4, 1, 4, IBV_WC_REM_INV_REQ_ERR)]
    {
        let fabric = Fabric::new(manual());
        let wiring = Wiring { reads, reads_served, retries: 7, ..Default::default() };
        let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
        // Long enough that the first is being answered when the others come.
        let read = |id| wr(id, IBV_WR_RDMA_READ, 30_000, link.there.at(0));
        link.here.post(link.near, &(0..count).map(read).collect::<Vec<_>>()).unwrap();
        fabric.step(LONG);
        let done = link.here.poll();
        let failed = done.iter().find(|wc| wc.status != IBV_WC_SUCCESS).expect("one fails");
        // The refusal may come before the responses that are owed, which are then missed.
        assert!([status, IBV_WC_RETRY_EXC_ERR].contains(&failed.status), "{failed:?}");
        assert_eq!(state(&fabric, 0, link.near), IBV_QPS_ERR);
        link.close();
    }
}

#[test]
fn requests_are_refused_before_the_queue_pair_is_ready() {
    let fabric = Fabric::new(manual());
    let (here, there) = (Node::new(&fabric, 0), Node::new(&fabric, 1));
    let (near, far) = (here.pair(4), there.pair(4));
    let wiring = Wiring::default();
    let refused = |when: &str| {
        assert_eq!(here.post(near, &[write(1, 8, there.at(0))]), Err((0, libc::EINVAL)), "{when}");
    };
    refused("RESET");
    assert_eq!(here.init(near), 0);
    refused("INIT");
    assert_eq!(here.to_receive(near, &there, number(far), &wiring), 0);
    refused("RTR");
    assert_eq!(here.to_send(near, &wiring), 0);
    assert_eq!(here.post(near, &[write(1, 8, there.at(0))]), Ok(()));
    // The other end is not ready: what comes is dropped, and missed.
    fabric.step(LONG);
    assert_eq!(statuses(&here.poll()), [(1, IBV_WC_RETRY_EXC_ERR)]);
    assert_eq!(fabric.counters().resends, 3);
    here.events();
    assert_eq!((here.destroy(near), there.destroy(far)), (0, 0));
    here.close();
    there.close();
}

#[test]
fn a_change_of_state_needs_its_attributes_and_no_others() {
    let fabric = Fabric::new(manual());
    let here = Node::new(&fabric, 0);
    let pair = here.pair(4);
    let mut attributes: ibv_qp_attr = Zeroable::zeroed();
    (attributes.qp_state, attributes.port_num) = (IBV_QPS_INIT, 1);
    assert_eq!(here.modify(pair, &attributes, INIT_MASK & !IBV_QP_PORT), libc::EINVAL);
    assert_eq!(here.modify(pair, &attributes, INIT_MASK | IBV_QP_PATH_MTU), libc::EINVAL);
    attributes.port_num = 2;
    assert_eq!(here.modify(pair, &attributes, INIT_MASK), libc::EINVAL);
    assert_eq!(here.to_send(pair, &Wiring::default()), libc::EINVAL, "from RESET");
    assert_eq!(here.init(pair), 0);
    let too_many = Wiring { reads_served: 17, ..Default::default() };
    assert_eq!(here.to_receive(pair, &here, number(pair), &too_many), libc::EINVAL);
    assert_eq!(here.to_receive(pair, &here, number(pair), &Wiring::default()), 0);
    assert_eq!(here.move_to(pair, IBV_QPS_ERR), 0);
    assert_eq!(here.init(pair), libc::EINVAL, "from ERR");
    assert_eq!(here.move_to(pair, IBV_QPS_RESET), 0);
    assert_eq!(here.init(pair), 0);
    assert_eq!(here.events(), [IBV_EVENT_QP_LAST_WQE_REACHED]);
    assert_eq!(here.destroy(pair), 0);
    here.close();
}

#[test]
fn a_slot_of_the_send_queue_is_free_when_a_completion_was_polled() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let to = link.there.at(0);
    let silent = |id| Wr { flags: 0, ..write(id, 8, to) };
    let mut works: Vec<_> = (0..20).map(silent).collect();
    works[9].flags = IBV_SEND_SIGNALED;
    assert_eq!(link.here.post(link.near, &works), Err((16, libc::ENOMEM)));
    fabric.step(LONG);
    assert_eq!(link.here.post(link.near, &[silent(20)]), Err((0, libc::ENOMEM)), "all done, none polled");
    assert_eq!(statuses(&link.here.poll()), [(9, IBV_WC_SUCCESS)]);
    let again: Vec<_> = (30..50).map(silent).collect();
    assert_eq!(link.here.post(link.near, &again), Err((10, libc::ENOMEM)), "those behind it are not told of");
    link.close();
}

#[test]
fn a_slot_of_the_receive_queue_is_free_when_its_completion_was_polled() {
    let fabric = Fabric::new(manual());
    let there = NodeOptions { receives: 2, ..Default::default() };
    let link = Link::with(&fabric, &Wiring::default(), NodeOptions::default(), there);
    assert_eq!(link.there.receive(0, 3), Err(libc::ENOMEM));
    link.here.post(link.near, &[wr(1, IBV_WR_SEND_WITH_IMM, 0, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(link.there.receive(2, 1), Err(libc::ENOMEM));
    assert_eq!(statuses(&link.there.poll()), [(0, IBV_WC_SUCCESS)]);
    assert_eq!(link.there.receive(2, 2), Err(libc::ENOMEM), "room for one");
    link.close();
}

#[test]
fn a_completion_queue_that_overflows_ends_its_queue_pairs() {
    let fabric = Fabric::new(manual());
    let here = NodeOptions { completions: 3, ..Default::default() };
    let link = Link::with(&fabric, &Wiring::default(), here, NodeOptions::default());
    let works: Vec<_> = (0..4).map(|id| write(id, 8, link.there.at(0))).collect();
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    assert_eq!(link.here.events(), [IBV_EVENT_CQ_ERR, IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED]);
    assert_eq!(state(&fabric, 0, link.near), IBV_QPS_ERR);
    assert_eq!(link.here.poll().len(), 3);
    assert_eq!(fabric.counters().completions_lost, 1);
    link.close();
}

#[test]
fn a_completion_queue_can_be_resized_but_not_below_what_it_holds() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let works: Vec<_> = (0..4).map(|id| write(id, 8, link.there.at(0))).collect();
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    let resize = |entries| call!(link.here.library, ibv_resize_cq(link.here.cq, entries));
    assert_eq!((resize(3), resize(4), resize(1 << 21)), (libc::EINVAL, 0, libc::EINVAL));
    // SAFETY: the queue exists.
    assert_eq!(unsafe { (*link.here.cq).cqe }, 4);
    assert_eq!(link.here.poll().len(), 4);
    link.close();
}

#[test]
fn inline_bytes_are_taken_at_once_and_others_when_they_are_sent() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let inline = Wr { flags: IBV_SEND_SIGNALED | IBV_SEND_INLINE, ..write(1, 64, link.there.at(0)) };
    let longer = Wr { bytes: 65, ..inline.clone() };
    assert_eq!(link.here.post(link.near, &[longer]), Err((0, libc::EINVAL)));
    let before = link.here.bytes(0, 64);
    let wrong_key = Wr { local_key: Some(0), ..inline };
    link.here.post(link.near, &[wrong_key, write(2, 64, link.there.at(64))]).unwrap();
    link.here.memory.fill(0, 64, 0x11).unwrap();
    fabric.step(LONG);
    assert_eq!(link.here.poll().len(), 2, "the key of inline bytes is not looked at");
    assert_eq!(link.there.bytes(0, 64), before);
    assert_eq!(link.there.bytes(64, 64), [0x11; 64]);
    link.close();
}

#[test]
fn a_key_opens_its_own_bytes_only_and_everything_behind_is_flushed() {
    let beyond = |link: &Link| write(1, 9, link.there.at(MEMORY_BYTES as u64 - 8));
    let before = |link: &Link| write(1, 8, (link.there.at(0).0 - 1, link.there.at(0).1));
    let local_key = |link: &Link| write(1, 8, (link.there.at(0).0, link.there.local_key()));
    let own_key = |link: &Link| write(1, 8, (link.there.at(0).0, link.here.at(0).1 + 1));
    let read = |link: &Link| wr(1, IBV_WR_RDMA_READ, 9, link.there.at(MEMORY_BYTES as u64 - 8));
    type Wrong<'a> = &'a dyn Fn(&Link) -> Wr;
    for wrong in [&beyond as Wrong<'_>, &before, &local_key, &own_key, &read] {
        let fabric = Fabric::new(manual());
        let link = Link::new(&fabric);
        let ok = |id| write(id, 8, link.there.at(0));
        let silent = Wr { flags: 0, ..ok(3) };
        link.here.post(link.near, &[ok(0), wrong(&link), ok(2), silent]).unwrap();
        fabric.step(LONG);
        let done = link.here.poll();
        let expected = [
            (0, IBV_WC_SUCCESS),
            (1, IBV_WC_REM_ACCESS_ERR),
            (2, IBV_WC_WR_FLUSH_ERR),
            (3, IBV_WC_WR_FLUSH_ERR),
        ];
        assert_eq!(statuses(&done), expected);
        assert!(done.iter().all(|wc| wc.qp_num == number(link.near)));
        assert_eq!(link.there.events(), [IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_LAST_WQE_REACHED]);
        assert_eq!(link.here.events(), [IBV_EVENT_QP_LAST_WQE_REACHED]);
        assert_eq!(link.there.bytes(8, MEMORY_BYTES - 8), vec![0xee; MEMORY_BYTES - 8]);
        // In error, requests are taken, and come back.
        link.here.post(link.near, &[ok(4)]).unwrap();
        fabric.step(LONG);
        assert_eq!(statuses(&link.here.poll()), [(4, IBV_WC_WR_FLUSH_ERR)]);
        link.close();
    }
}

#[test]
fn completions_of_errors_hold_rubbish() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.move_to(link.near, IBV_QPS_ERR);
    let works: Vec<_> = (0..16).map(|id| write(id, 8, link.there.at(0))).collect();
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    let opcodes: std::collections::BTreeSet<u32> = link.here.poll().iter().map(|wc| wc.opcode).collect();
    assert!(opcodes.len() > 8, "{opcodes:?}");
    link.close();
}

#[test]
fn memory_that_peers_may_not_touch_stays_untouched() {
    for (access, opcode) in [
        (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ, IBV_WR_RDMA_WRITE),
        (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, IBV_WR_RDMA_READ),
    ] {
        let fabric = Fabric::new(manual());
        let there = NodeOptions { access, ..Default::default() };
        let link = Link::with(&fabric, &Wiring::default(), NodeOptions::default(), there);
        link.here.post(link.near, &[wr(1, opcode, 8, link.there.at(0))]).unwrap();
        fabric.step(LONG);
        assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_REM_ACCESS_ERR)]);
        link.close();
    }
}

#[test]
fn a_domain_is_not_open_to_the_queue_pairs_of_another() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let library = &link.there.library;
    let other = call!(library, ibv_alloc_pd(link.there.context));
    let mut memory = vec![0u8; 64];
    let base = memory.as_mut_ptr();
    let mr = call!(library, ibv_reg_mr(other, base.cast(), 64, ALL_ACCESS as i32));
    // SAFETY: the region exists.
    let remote = unsafe { (base as u64, (*mr).rkey) };
    link.here.post(link.near, &[write(1, 8, remote)]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_REM_ACCESS_ERR)]);
    assert_eq!(call!(library, ibv_dealloc_pd(other)), libc::EBUSY);
    assert_eq!(call!(library, ibv_dereg_mr(mr)), 0);
    assert_eq!(call!(library, ibv_dealloc_pd(other)), 0);
    assert_eq!(memory, [0; 64]);
    link.close();
}

#[test]
fn a_wrong_local_key_fails_here_when_all_before_is_done() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let ok = |id| write(id, 5_000, link.there.at(0));
    let wrong = Wr { local_key: Some(77), ..ok(2) };
    link.here.post(link.near, &[ok(1), wrong, ok(3)]).unwrap();
    fabric.step(LONG);
    let expected = [(1, IBV_WC_SUCCESS), (2, IBV_WC_LOC_PROT_ERR), (3, IBV_WC_WR_FLUSH_ERR)];
    assert_eq!(statuses(&link.here.poll()), expected);
    assert_eq!(state(&fabric, 1, link.far), IBV_QPS_RTS, "the peer does not know yet");
    link.close();
}

#[test]
fn no_byte_moves_through_a_region_after_it_was_deregistered() {
    for steps in 0..60 {
        let fabric = Fabric::new(FabricOptions { seed: steps, ..manual() });
        let mut link = Link::new(&fabric);
        let read = Wr { local: 20_000, ..wr(2, IBV_WR_RDMA_READ, 10_000, link.there.at(0)) };
        link.here.post(link.near, &[write(1, 10_000, link.there.at(0)), read]).unwrap();
        fabric.step(steps);
        let was_done = fabric.queue_pairs()[0].outstanding == 0;
        assert_eq!(call!(link.there.library, ibv_dereg_mr(link.there.mr)), 0);
        let (before, moved) = (link.there.bytes(0, MEMORY_BYTES), fabric.counters().bytes_moved);
        fabric.step(LONG);
        assert_eq!(link.there.bytes(0, MEMORY_BYTES), before, "after {steps} steps");
        // What was read before may still be on its way back.
        assert!(fabric.counters().bytes_moved - moved <= 10_000);
        // Packets with the last bytes may have left before.
        let has_failed = link.here.poll().iter().any(|wc| wc.status == IBV_WC_REM_ACCESS_ERR);
        assert!(has_failed || was_done || steps > 30, "after {steps} steps");
        let base = link.there.memory.base().cast();
        link.there.mr =
            call!(link.there.library, ibv_reg_mr(link.there.pd, base, MEMORY_BYTES, ALL_ACCESS as i32));
        link.close();
    }
}

#[test]
fn no_byte_moves_through_a_queue_pair_after_it_was_destroyed() {
    for steps in 0..60 {
        let fabric = Fabric::new(FabricOptions { seed: steps, ..manual() });
        let link = Link::new(&fabric);
        let read = Wr { local: 20_000, ..wr(2, IBV_WR_RDMA_READ, 10_000, link.there.at(0)) };
        link.here.post(link.near, &[write(1, 10_000, link.there.at(0)), read]).unwrap();
        fabric.step(steps);
        let was_done = fabric.queue_pairs()[0].outstanding == 0;
        assert_eq!(link.there.destroy(link.far), 0);
        let before = link.there.bytes(0, MEMORY_BYTES);
        fabric.step(LONG);
        assert_eq!(link.there.bytes(0, MEMORY_BYTES), before, "after {steps} steps");
        let has_failed = link.here.poll().iter().any(|wc| wc.status == IBV_WC_RETRY_EXC_ERR);
        assert!(has_failed || was_done || steps > 30, "after {steps} steps");
        link.here.events();
        assert_eq!(link.here.destroy(link.near), 0);
        link.here.close();
        link.there.close();
    }
}

#[test]
fn packets_outlive_the_queue_pair_that_sent_them() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    // Sent, and not arrived: the peer takes nothing now.
    fabric.freeze(1, 1_000);
    fabric.step(3);
    assert_eq!(fabric.counters().packets, 1);
    assert_eq!(link.here.destroy(link.near), 0);
    fabric.freeze(1, 0);
    fabric.step(LONG);
    assert_eq!(link.there.bytes(0, 8), link.here.bytes(0, 8));
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.close();
    link.there.close();
}

#[test]
fn numbers_of_queue_pairs_come_again_at_once() {
    let fabric = Fabric::new(manual());
    let node = Node::new(&fabric, 0);
    let (one, two) = (node.pair(1), node.pair(1));
    let first = number(one);
    assert_ne!(first, number(two));
    assert_eq!(node.destroy(one), 0);
    let three = node.pair(1);
    assert_eq!(number(three), first);
    assert_eq!((node.destroy(two), node.destroy(three)), (0, 0));
    node.close();
}

#[test]
fn everything_arrives_once_and_in_order_though_packets_are_lost() {
    for seed in 0..20 {
        let faults = Faults { lost_one_in: 6 };
        let fabric = Fabric::new(FabricOptions { seed, faults, ..manual() });
        let wiring = Wiring { retries: 7, ..Default::default() };
        let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
        link.there.receive(0, 8).unwrap();
        let bytes: Vec<u8> = (0..5_000).map(|at| (at % 199) as u8).collect();
        link.there.memory.write(10_000, &bytes).unwrap();
        for round in 0..4 {
            let to = link.there.at(round * 2_500);
            let read = Wr { local: 20_000, ..wr(3, IBV_WR_RDMA_READ, 5_000, link.there.at(10_000)) };
            link.here
                .post(
                    link.near,
                    &[
                        Wr { local: round * 2_500, ..write(0, 2_500, to) },
                        wr(1, IBV_WR_RDMA_WRITE_WITH_IMM, 0, to),
                        wr(2, IBV_WR_SEND_WITH_IMM, 44, to),
                        read,
                    ],
                )
                .unwrap();
            fabric.step(LONG);
            let done = statuses(&link.here.poll());
            assert_eq!(done, (0..4).map(|id| (id, IBV_WC_SUCCESS)).collect::<Vec<_>>(), "seed {seed}");
            assert_eq!(link.here.bytes(20_000, 5_000), bytes);
            link.here.memory.fill(20_000, 5_000, 0).unwrap();
        }
        assert_eq!(link.there.bytes(0, 10_000), link.here.bytes(0, 10_000));
        let arrived: Vec<_> =
            link.there.poll().iter().map(|wc| (wc.wr_id, u32::from_be(wc.imm_data))).collect();
        let expected: Vec<_> = (0..8).map(|id| (id, 1 + id as u32 % 2)).collect();
        assert_eq!(arrived, expected);
        assert!(fabric.counters().resends > 0);
        link.close();
    }
}

#[test]
fn a_link_that_comes_back_in_time_is_only_a_delay() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let port_state = |node: &Node| {
        let mut port = Zeroable::zeroed();
        assert_eq!(call!(node.library, ibv_query_port(node.context, 1, &mut port)), 0);
        port.state
    };
    fabric.set_link(1, false);
    assert_eq!((link.there.events(), link.here.events()), (vec![IBV_EVENT_PORT_ERR], vec![]));
    assert_eq!((port_state(&link.there), port_state(&link.here)), (IBV_PORT_DOWN, IBV_PORT_ACTIVE));
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    // Until the first packet was sent again.
    while fabric.counters().resends == 0 {
        fabric.step(1);
    }
    fabric.set_link(1, true);
    assert_eq!(link.there.events(), [IBV_EVENT_PORT_ACTIVE]);
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_SUCCESS)]);
    fabric.set_link(0, false);
    link.here.post(link.near, &[write(2, 8, link.there.at(0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(2, IBV_WC_RETRY_EXC_ERR)]);
    link.close();
}

#[test]
fn a_frozen_device_answers_late_or_too_late() {
    for (steps, status) in [(200, IBV_WC_SUCCESS), (100_000, IBV_WC_RETRY_EXC_ERR)] {
        let fabric = Fabric::new(manual());
        let link = Link::new(&fabric);
        fabric.freeze(1, steps);
        link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
        fabric.step(LONG);
        assert_eq!(statuses(&link.here.poll()), [(1, status)]);
        link.close();
    }
}

#[test]
fn a_process_that_is_killed_is_gone_for_its_peers() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let there = fabric.contexts()[1];
    assert_eq!((there.device, there.queue_pairs, there.regions), (1, 1, 1));
    link.here.post(link.near, &[write(1, 30_000, link.there.at(0))]).unwrap();
    fabric.step(10);
    fabric.kill(there.id);
    let before = link.there.bytes(0, MEMORY_BYTES);
    fabric.step(LONG);
    assert_eq!(link.there.bytes(0, MEMORY_BYTES), before);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_RETRY_EXC_ERR)]);
    // Its number is another's at once.
    let other = Node::new(&fabric, 1);
    let pair = other.pair(1);
    assert_eq!(number(pair), number(link.far));
    assert_eq!(other.destroy(pair), 0);
    other.close();
    assert!(call!(link.there.library, ibv_alloc_pd(link.there.context)).is_null());
    // What the process would still do is of no consequence, in whichever order.
    assert_eq!(call!(link.there.library, ibv_dealloc_pd(link.there.pd)), 0);
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.events();
    assert_eq!(link.here.destroy(link.near), 0);
    link.here.close();
    assert_eq!(fabric.leaks(), [""; 0]);
    let Node { library, context, .. } = link.there;
    assert_eq!(call!(library, ibv_close_device(context)), 0);
}

#[test]
fn a_device_that_fails_flushes_and_lets_itself_be_closed() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    fabric.fail_device(0);
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_WR_FLUSH_ERR)]);
    assert_eq!(link.here.events(), [IBV_EVENT_DEVICE_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED]);
    assert!(call!(link.here.library, ibv_alloc_pd(link.here.context)).is_null());
    assert_eq!(link.there.bytes(0, 8), [0xee; 8]);
    link.close();
}

#[test]
fn a_queue_pair_that_breaks_is_reported() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    fabric.break_queue_pair(0, number(link.near), Some(IBV_EVENT_QP_FATAL));
    assert_eq!(link.here.events(), [IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED]);
    link.close();
}

#[test]
fn objects_in_use_cannot_be_destroyed() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let (library, here) = (&link.here.library, &link.here);
    assert_eq!(call!(library, ibv_dealloc_pd(here.pd)), libc::EBUSY);
    assert_eq!(call!(library, ibv_destroy_cq(here.cq)), libc::EBUSY);
    assert_eq!(call!(library, ibv_destroy_srq(here.srq)), libc::EBUSY);
    assert_eq!(call!(library, ibv_destroy_comp_channel(here.channel)), libc::EBUSY);
    assert_eq!(call!(library, ibv_close_device(here.context)), libc::EBUSY);
    assert_eq!(fabric.leaks().len(), 2 * 7);
    link.close();
}

#[test]
fn events_have_to_be_acknowledged_before_their_object_goes() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    fabric.break_queue_pair(0, number(link.near), None);
    let mut event = link.here.get_event().expect("an event");
    let (library, near) = (link.here.library.clone(), link.near as usize);
    let destroying = std::thread::spawn(move || call!(library, ibv_destroy_qp(near as *mut ibv_qp)));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!destroying.is_finished(), "it waits");
    call!(link.here.library, ibv_ack_async_event(&mut event));
    assert_eq!(destroying.join().unwrap(), 0);

    // Whoever never acknowledges waits for ever, and is told so here.
    fabric.break_queue_pair(1, number(link.far), None);
    let mut event = link.there.get_event().expect("an event");
    assert_eq!(link.there.destroy(link.far), libc::EINVAL);
    assert!(fabric.take_violations()[0].contains("not acknowledged"));
    call!(link.there.library, ibv_ack_async_event(&mut event));
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.close();
    link.there.close();
}

#[test]
fn an_event_that_nobody_got_goes_with_its_queue_pair() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    fabric.break_queue_pair(0, number(link.near), None);
    assert_eq!(link.here.destroy(link.near), 0);
    assert!(link.here.get_event().is_none());
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.close();
    link.there.close();
}

#[test]
fn a_channel_wakes_once_for_each_arming() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let done = |id| {
        link.here.post(link.near, &[write(id, 8, link.there.at(0))]).unwrap();
        fabric.step(LONG);
    };
    done(1);
    assert_eq!(link.here.take_wake(), Err(libc::EAGAIN), "it was not armed");
    assert_eq!(link.here.arm(false), 0);
    assert_eq!(link.here.take_wake(), Err(libc::EAGAIN), "what came before does not count");
    done(2);
    done(3);
    assert_eq!(link.here.take_wake(), Ok(()));
    assert_eq!(link.here.take_wake(), Err(libc::EAGAIN));

    // The peer waits for what was sent as solicited, or failed.
    link.there.receive(0, 2).unwrap();
    assert_eq!(link.there.arm(true), 0);
    let send = |flags| Wr { flags, ..wr(4, IBV_WR_SEND_WITH_IMM, 0, (0, 0)) };
    link.here.post(link.near, &[send(0)]).unwrap();
    fabric.step(LONG);
    assert_eq!(link.there.take_wake(), Err(libc::EAGAIN));
    link.here.post(link.near, &[send(IBV_SEND_SOLICITED)]).unwrap();
    fabric.step(LONG);
    assert_eq!(link.there.take_wake(), Ok(()));
    link.close();
}

#[test]
fn calls_fail_as_they_are_told() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let here = &link.here;
    let refused = || std::io::Error::last_os_error().raw_os_error();
    fabric.fail(Failure::next(Function::CreateQp, libc::ENOMEM));
    assert!(call!(here.library, ibv_create_qp(here.pd, &mut here.init_attributes(1))).is_null());
    assert_eq!(refused(), Some(libc::ENOMEM));
    fabric.fail(Failure { after: 1, times: 2, ..Failure::next(Function::ResizeCq, libc::ENOSYS) });
    let resized: Vec<_> = (0..4).map(|_| call!(here.library, ibv_resize_cq(here.cq, 300))).collect();
    assert_eq!(resized, [0, libc::ENOSYS, libc::ENOSYS, 0]);
    fabric.fail(Failure { state: Some(IBV_QPS_RTR), ..Failure::next(Function::ModifyQp, libc::ETIMEDOUT) });
    let pair = here.pair(1);
    assert_eq!(here.init(pair), 0);
    assert_eq!(here.to_receive(pair, here, 1, &Wiring::default()), libc::ETIMEDOUT);
    assert_eq!(here.to_receive(pair, here, 1, &Wiring::default()), 0);
    fabric.fail(Failure::next(Function::DestroyQp, libc::EBUSY));
    assert_eq!((here.destroy(pair), here.destroy(pair)), (libc::EBUSY, 0));
    fabric.fail(Failure { accepted: 2, ..Failure::next(Function::PostSend, libc::ENOMEM) });
    let works: Vec<_> = (0..4).map(|id| write(id, 8, link.there.at(0))).collect();
    assert_eq!(here.post(link.near, &works[..2]), Ok(()), "there is no third");
    assert_eq!(here.post(link.near, &works), Err((2, libc::ENOMEM)));
    fabric.step(LONG);
    assert_eq!(here.poll().len(), 4);
    assert_eq!(fabric.counters().calls(Function::PostSend), 2);
    link.close();
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let fabric = Fabric::new(FabricOptions { seed, pace: Pace::Stepped { most: 5 }, ..manual() });
        let (here, there) = (Node::new(&fabric, 0), Node::new(&fabric, 1));
        let pairs: Vec<_> = (0..8).map(|_| (here.pair(4), there.pair(4))).collect();
        for &(near, far) in &pairs {
            connect((&here, near), (&there, far), &Wiring::default());
            here.post(near, &[write(u64::from(number(near)), 3_000, there.at(0))]).unwrap();
        }
        let mut order = Vec::new();
        while order.len() < pairs.len() {
            order.extend(here.poll().iter().map(|wc| wc.wr_id));
        }
        for (near, far) in pairs {
            assert_eq!((here.destroy(near), there.destroy(far)), (0, 0));
        }
        here.close();
        there.close();
        (order, fabric.counters().steps)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn each_fabric_has_its_own_devices() {
    let one = Fabric::new(manual());
    let devices = vec![DeviceOptions { ethernet: false, ..Default::default() }; 3];
    let other = Fabric::new(FabricOptions { devices, ..manual() });
    assert_eq!((device_count(&one.library()), device_count(&other.library())), (2, 3));
    let library = other.library();
    drop(other);
    assert_eq!(device_count(&library), 0);
    // No other fabric takes its place while the library is there.
    let fabrics: Vec<_> = (0..8).map(|_| Fabric::new(manual())).collect();
    assert_eq!(device_count(&library), 0);
    assert!(fabrics.iter().all(|fabric| device_count(&fabric.library()) == 2));
}

#[test]
fn a_fabric_lives_as_long_as_what_is_open() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::Thread, ..manual() });
    let link = Link::new(&fabric);
    let shared = Arc::downgrade(&fabric.handle.shared);
    drop(fabric);
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    let begun = Instant::now();
    while link.here.poll().is_empty() {
        assert!(begun.elapsed() < PATIENCE, "the thread goes on");
        std::thread::yield_now();
    }
    link.close();
    while shared.strong_count() > 0 {
        assert!(begun.elapsed() < PATIENCE, "the thread lets go");
        std::thread::yield_now();
    }
}

#[test]
fn ports_and_addresses_are_described() {
    for ethernet in [true, false] {
        let device = DeviceOptions { ethernet, mtu_bytes: 4096, link_up: true };
        let fabric = Fabric::new(FabricOptions { devices: vec![device], ..manual() });
        let node = Node::new(&fabric, 0);
        let (library, context) = (&node.library, node.context);
        let mut port = Zeroable::zeroed();
        assert_eq!(call!(library, ibv_query_port(context, 1, &mut port)), 0);
        assert_eq!((port.active_mtu, port.lid != 0), (IBV_MTU_4096, !ethernet));
        assert_eq!(call!(library, ibv_query_port(context, 2, &mut port)), libc::EINVAL);
        let mut entries: Vec<ibv_gid_entry> = vec![Zeroable::zeroed(); 8];
        let query = library._ibv_query_gid_table.unwrap();
        // SAFETY: there are so many places.
        let found = unsafe { query(context, entries.as_mut_ptr(), 8, 0, size_of::<ibv_gid_entry>()) };
        assert_eq!(found, port.gid_tbl_len as isize);
        for entry in &entries[..found as usize] {
            let mut gid = Zeroable::zeroed();
            assert_eq!(call!(library, ibv_query_gid(context, 1, entry.gid_index as i32, &mut gid)), 0);
            assert_eq!(gid, entry.gid);
        }
        assert_eq!(call!(library, ibv_query_gid(context, 1, found as i32, &mut Zeroable::zeroed())), -1);
        let mut attributes: ibv_device_attr = Zeroable::zeroed();
        assert_eq!(call!(library, ibv_query_device(context, &mut attributes)), 0);
        assert_eq!(attributes.max_qp_wr, 8192);
        node.close();
    }
}

#[test]
fn memory_has_other_addresses_for_devices_if_it_is_told() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let there = &link.there;
    let (register, dma_buf) =
        (there.library.ibv_reg_mr_iova2.unwrap(), there.library.ibv_reg_dmabuf_mr.unwrap());
    let base = there.memory.base();
    let access = ALL_ACCESS | IBV_ACCESS_RELAXED_ORDERING;
    // SAFETY: the memory outlives the region.
    let by_iova = unsafe { register(there.pd, base.cast(), 4_096, 1 << 40, access) };
    assert!(call!(there.library, ibv_reg_mr(there.pd, base.cast(), 64, access as i32)).is_null());
    let file = Memory::allocate(8_192, &AllocateOptions::default()).unwrap();
    let fd = file.fd().expect("memory with a file").as_fd().as_raw_fd();
    // SAFETY: the descriptor is open.
    let by_file = unsafe { dma_buf(there.pd, 4_096, 4_096, 0, fd, ALL_ACCESS as i32) };
    // SAFETY: both exist.
    let (iova_key, file_key) = unsafe { ((*by_iova).rkey, (*by_file).rkey) };
    let works = [write(1, 100, ((1 << 40) + 50, iova_key)), write(2, 100, (7, file_key))];
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    assert_eq!(link.here.poll().len(), 2);
    assert_eq!(there.bytes(50, 100), link.here.bytes(0, 100));
    let mut landed = vec![0; 100];
    file.read(4_096 + 7, &mut landed).unwrap();
    assert_eq!(landed, link.here.bytes(0, 100));
    assert_eq!(call!(there.library, ibv_dereg_mr(by_iova)), 0);
    assert_eq!(call!(there.library, ibv_dereg_mr(by_file)), 0);
    link.close();
}

#[test]
fn an_old_library_lacks_what_came_later() {
    let fabric = Fabric::new(FabricOptions { old_library: true, ..manual() });
    let library = fabric.library();
    assert!(library.ibv_reg_mr_iova2.is_none() && library._ibv_query_gid_table.is_none());
}

#[test]
fn the_use_of_a_destroyed_object_is_found_out() {
    let fabric = Fabric::new(manual());
    let node = Node::new(&fabric, 0);
    let pair = node.pair(1);
    assert_eq!(node.destroy(pair), 0);
    assert_eq!(node.destroy(pair), libc::EINVAL);
    assert_eq!(node.post(pair, &[write(1, 8, (0, 0))]), Err((0, libc::EINVAL)));
    node.close();
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(fabric)));
    let said = dropped.expect_err("the last handle panics");
    let said = said.downcast_ref::<String>().unwrap();
    assert!(said.contains("ibv_destroy_qp") && said.contains("ibv_post_send"), "{said}");
}
