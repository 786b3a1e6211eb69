//! What is made of an opened device: each object destroys itself when dropped, and keeps what it was made of alive.

use std::fmt;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use bytemuck::Zeroable;
use crossdock_memory::{DeviceMemory, Memory};

use super::chain::SendChain;
use super::context::{Context, Failed, nonblocking, object, status};
use super::device_memory::Why;
use super::sys::*;
use crate::address::Gid;

/// Memory and queue pairs of one domain can be used with each other.
pub(crate) struct ProtectionDomain {
    context: Arc<Context>,
    raw: NonNull<ibv_pd>,
}

// SAFETY: libibverbs allows calls from any thread, several at a time, on any of its objects; each takes the locks that it
// needs.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub fn new(context: &Arc<Context>) -> Result<Arc<Self>, Failed> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.library.ibv_alloc_pd)(context.raw.as_ptr()) };
        Ok(Arc::new(Self { raw: object("ibv_alloc_pd", raw)?, context: context.clone() }))
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: everything that was made of the domain holds it, so nothing is left of it.
        unsafe { (self.context.library.ibv_dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// Registered memory. The device may read and write it as long as this lives, and no longer.
pub(crate) struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<ibv_mr>,
    /// `None` once it is deregistered, or for ever when the device may still use it after all.
    backing: Option<Backing>,
    base: u64,
    bytes: u64,
    pub local_key: u32,
    pub remote_key: u32,
}

enum Backing {
    Host(Memory),
    Device { _kept: Memory },
}

// SAFETY: as for the domain.
unsafe impl Send for MemoryRegion {}
// SAFETY: as for the domain.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers memory for the access that `flags` say, of which the optional ones are left out where the library is
    /// too old for them.
    pub fn new(domain: &Arc<ProtectionDomain>, memory: &Memory, flags: u32) -> Result<Self, Failed> {
        let (base, bytes) = (memory.base() as u64, memory.bytes() as u64);
        let raw = register(domain, base, bytes, flags)?;
        Ok(Self::of(domain, raw, Backing::Host(memory.clone()), base, bytes))
    }

    /// Registers a GPU's memory by the vendor's module, which recognises its addresses.
    pub fn of_peer(domain: &Arc<ProtectionDomain>, memory: &Memory, flags: u32) -> Result<Self, Failed> {
        let (base, bytes) = (memory.base().addr() as u64, memory.bytes() as u64);
        let raw = register(domain, base, bytes, flags)?;
        Ok(Self::of(domain, raw, Backing::Device { _kept: memory.clone() }, base, bytes))
    }

    /// Registers a GPU's memory that its driver has exported.
    pub fn of_dma_buf(domain: &Arc<ProtectionDomain>, memory: &Memory, flags: u32) -> Result<Self, Why> {
        let register = domain.context.library.ibv_reg_dmabuf_mr.ok_or(Why::LibraryTooOld)?;
        let (fd, offset) = memory.device().and_then(DeviceMemory::dma_buf).ok_or(Why::NotExported)?;
        let (base, bytes) = (memory.base().addr() as u64, memory.bytes() as u64);
        // SAFETY: the domain exists; the range stays exported and allocated as long as this object lives, since it keeps a
        // handle. That devices write there is what `Memory` allows for.
        let raw = unsafe {
            register(domain.raw.as_ptr(), offset, bytes as usize, base, fd.as_raw_fd(), flags as i32)
        };
        let raw = object("ibv_reg_dmabuf_mr", raw)?;
        Ok(Self::of(domain, raw, Backing::Device { _kept: memory.clone() }, base, bytes))
    }

    fn of(
        domain: &Arc<ProtectionDomain>,
        raw: NonNull<ibv_mr>,
        backing: Backing,
        base: u64,
        bytes: u64,
    ) -> Self {
        // SAFETY: the region is registered, and its keys do not change.
        let (local_key, remote_key) = unsafe { ((*raw.as_ptr()).lkey, (*raw.as_ptr()).rkey) };
        Self { domain: domain.clone(), raw, backing: Some(backing), base, bytes, local_key, remote_key }
    }

    /// The host's memory; `None` of a GPU's.
    pub fn host(&self) -> Option<&Memory> {
        match &self.backing {
            Some(Backing::Host(memory)) => Some(memory),
            _ => None,
        }
    }

    /// Memory of the port's own, which is the host's.
    pub fn memory(&self) -> &Memory {
        self.host().expect("what the port allocates for itself is host memory")
    }

    #[inline]
    pub fn base(&self) -> u64 {
        self.base
    }

    #[inline]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Registers a range of addresses.
fn register(
    domain: &Arc<ProtectionDomain>,
    base: u64,
    bytes: u64,
    flags: u32,
) -> Result<NonNull<ibv_mr>, Failed> {
    let library = &domain.context.library;
    let (at, length) = (base as *mut std::ffi::c_void, bytes as usize);
    // SAFETY: the domain exists. The range stays allocated as long as the object that is made of the answer lives, since that
    // keeps a handle to it. That the device writes there is what `Memory` allows for.
    let raw = unsafe {
        match library.ibv_reg_mr_iova2 {
            Some(register) => register(domain.raw.as_ptr(), at, length, base, flags),
            None => (library.ibv_reg_mr)(domain.raw.as_ptr(), at, length, (flags & !OPTIONAL_ACCESS) as i32),
        }
    };
    object("ibv_reg_mr", raw)
}

impl MemoryRegion {
    /// After this the device refuses the keys. On an error it may still use the memory, and the region stays.
    pub fn deregister(&mut self) -> Result<(), Failed> {
        if self.backing.is_some() {
            // SAFETY: the region is registered, and deregistered once: then there is no backing any more.
            let errno = unsafe { (self.domain.context.library.ibv_dereg_mr)(self.raw.as_ptr()) };
            status("ibv_dereg_mr", errno)?;
            self.backing = None;
        }
        Ok(())
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        if self.deregister().is_err() {
            // The device may still write there: the memory must never be freed.
            mem::forget(self.backing.take());
        }
    }
}

/// What wakes the owner of a completion queue.
struct CompletionChannel {
    context: Arc<Context>,
    raw: NonNull<ibv_comp_channel>,
}

impl CompletionChannel {
    fn new(context: &Arc<Context>) -> Result<Self, Failed> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.library.ibv_create_comp_channel)(context.raw.as_ptr()) };
        let channel = Self { raw: object("ibv_create_comp_channel", raw)?, context: context.clone() };
        nonblocking(channel.fd())?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel exists, and so does its descriptor.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: the one queue that uses the channel has been destroyed: it is dropped before.
        unsafe { (self.context.library.ibv_destroy_comp_channel)(self.raw.as_ptr()) };
    }
}

/// Where completions wait until they are polled.
pub(crate) struct CompletionQueue {
    raw: NonNull<ibv_cq>,
    channel: CompletionChannel,
}

// SAFETY: as for the domain.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for the domain.
unsafe impl Sync for CompletionQueue {}

/// Completions that were polled.
pub(crate) struct Completions {
    entries: [ibv_wc; POLLED_MAX],
    len: usize,
    next: usize,
}

impl Completions {
    pub fn new() -> Self {
        Self { entries: [ibv_wc::zeroed(); POLLED_MAX], len: 0, next: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.next == self.len
    }

    /// The oldest that was not taken yet.
    pub fn take(&mut self) -> Option<ibv_wc> {
        let entry = self.entries[..self.len].get(self.next).copied();
        self.next += usize::from(entry.is_some());
        entry
    }
}

impl CompletionQueue {
    pub fn new(context: &Arc<Context>, entries: u32) -> Result<Arc<Self>, Failed> {
        let channel = CompletionChannel::new(context)?;
        // SAFETY: context and channel exist; there is no callback's argument.
        let raw = unsafe {
            (context.library.ibv_create_cq)(
                context.raw.as_ptr(),
                entries as i32,
                ptr::null_mut(),
                channel.raw.as_ptr(),
                0,
            )
        };
        Ok(Arc::new(Self { raw: object("ibv_create_cq", raw)?, channel }))
    }

    pub fn capacity(&self) -> u32 {
        // SAFETY: the queue exists; the number changes only in `resize`, which the same thread calls.
        u32::try_from(unsafe { (*self.raw.as_ptr()).cqe }).unwrap_or(0)
    }

    pub fn resize(&self, entries: u32) -> Result<(), Failed> {
        let functions = &self.channel.context.library;
        // SAFETY: the queue exists.
        status("ibv_resize_cq", unsafe { (functions.ibv_resize_cq)(self.raw.as_ptr(), entries as i32) })
    }

    /// Fills `into`, which is empty, with up to `most` completions.
    pub fn poll(&self, into: &mut Completions, most: usize) -> Result<(), Failed> {
        debug_assert!(into.is_empty(), "what was polled before is lost");
        (into.len, into.next) = (0, 0);
        let most = most.min(POLLED_MAX) as i32;
        // SAFETY: the queue exists, and there is room for so many.
        let polled = unsafe {
            let poll = (*self.channel.context.raw.as_ptr()).ops.poll_cq.expect("every provider can poll");
            poll(self.raw.as_ptr(), most, into.entries.as_mut_ptr())
        };
        match usize::try_from(polled) {
            Ok(polled) => into.len = polled.min(POLLED_MAX),
            Err(_) => return Err(Failed { call: "ibv_poll_cq", errno: libc::EIO }),
        }
        Ok(())
    }

    /// Asks for the descriptor to become readable with the next completion.
    pub fn arm(&self) -> Result<(), Failed> {
        // SAFETY: the queue exists.
        let errno = unsafe {
            let arm =
                (*self.channel.context.raw.as_ptr()).ops.req_notify_cq.expect("every provider can notify");
            arm(self.raw.as_ptr(), 0)
        };
        status("ibv_req_notify_cq", errno)
    }

    /// Takes what made the descriptor readable.
    pub fn take_wakes(&self) {
        let functions = &self.channel.context.library;
        let (mut queue, mut argument) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel exists and does not block; each event is acknowledged once, to the queue that it is of.
        unsafe {
            while (functions.ibv_get_cq_event)(self.channel.raw.as_ptr(), &mut queue, &mut argument) == 0 {
                (functions.ibv_ack_cq_events)(queue, 1);
            }
        }
    }

    /// Readable when a completion has come after [`arm`](CompletionQueue::arm).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }
}

impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: the queue pairs that use it hold it, so none is left; all its events were acknowledged.
        unsafe { (self.channel.context.library.ibv_destroy_cq)(self.raw.as_ptr()) };
    }
}

/// Receives for all queue pairs of a port together.
pub(crate) struct SharedReceiveQueue {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<ibv_srq>,
    /// Where what peers send lands. Declared after `raw`, and dropped after it was destroyed.
    buffers: MemoryRegion,
    chain: Box<[(ibv_recv_wr, ibv_sge)]>,
}

// SAFETY: as for the domain; the pointers of `chain` lead into itself.
unsafe impl Send for SharedReceiveQueue {}

impl SharedReceiveQueue {
    /// A queue of up to `receives`, which land in `buffers`, [`RECEIVE_BYTES`] for each.
    pub fn new(domain: &Arc<ProtectionDomain>, receives: u32, buffers: MemoryRegion) -> Result<Self, Failed> {
        let mut attributes = ibv_srq_init_attr::zeroed();
        attributes.attr.max_wr = receives;
        attributes.attr.max_sge = 1;
        // SAFETY: the domain exists, and the struct is the one that the call reads.
        let raw = unsafe { (domain.context.library.ibv_create_srq)(domain.raw.as_ptr(), &mut attributes) };
        let chain = (0..RESTOCKED_MAX).map(|_| (ibv_recv_wr::zeroed(), ibv_sge::zeroed())).collect();
        let raw = object("ibv_create_srq", raw)?;
        Ok(Self { domain: domain.clone(), raw, buffers, chain })
    }

    /// Posts a receive into each of these buffers, which are numbered from 0 and [`RECEIVE_BYTES`] long. At most
    /// [`RESTOCKED_MAX`] at a time. Says how many were taken.
    pub fn post(&mut self, buffers: &[u32]) -> Result<(), (usize, Failed)> {
        let chain = &mut self.chain;
        let count = buffers.len().min(chain.len());
        let (base, key) = (self.buffers.base(), self.buffers.local_key);
        for at in 0..count {
            let offset = u64::from(buffers[at]) * RECEIVE_BYTES as u64;
            assert!(offset + RECEIVE_BYTES as u64 <= self.buffers.bytes(), "a buffer that there is not");
            let next = match at + 1 < count {
                true => &raw mut chain[at + 1].0,
                false => ptr::null_mut(),
            };
            let sge = &raw mut chain[at].1;
            chain[at].1 = ibv_sge { addr: base + offset, length: RECEIVE_BYTES as u32, lkey: key };
            chain[at].0 = ibv_recv_wr { wr_id: receive_id(buffers[at]), next, sg_list: sge, num_sge: 1 };
        }
        if count == 0 {
            return Ok(());
        }
        let first = &raw mut chain[0].0;
        let mut bad = ptr::null_mut();
        // SAFETY: the queue exists; the chain and what it points to live until the call has ended, and the buffers as long as
        // the queue.
        let errno = unsafe {
            let post =
                (*self.domain.context.raw.as_ptr()).ops.post_srq_recv.expect("a provider with such queues");
            post(self.raw.as_ptr(), first, &mut bad)
        };
        status("ibv_post_srq_recv", errno).map_err(|failed| {
            let taken = chain[..count].iter().position(|(wr, _)| ptr::eq(wr, bad)).unwrap_or(0);
            (taken, failed)
        })
    }

    /// The first bytes of a buffer in which something has landed.
    pub fn read(&self, buffer: u32, into: &mut [u8]) {
        let at = buffer as usize * RECEIVE_BYTES;
        assert!(into.len() <= RECEIVE_BYTES, "more than a buffer holds");
        self.buffers.memory().read(at, into).expect("a buffer that there is");
    }
}

impl Drop for SharedReceiveQueue {
    fn drop(&mut self) {
        // SAFETY: the queue pairs that use it were destroyed before: the port that has both drops them first.
        unsafe { (self.domain.context.library.ibv_destroy_srq)(self.raw.as_ptr()) };
    }
}

/// The completion of a send says in its number which lane it was of and the how manieth request; that of a receive,
/// which buffer. On an error nothing but the number can be relied on.
pub(crate) enum WorkId {
    Send { lane: u32, request: u32 },
    Receive { buffer: u32 },
}

impl WorkId {
    pub fn of(number: u64) -> Self {
        match number & 1 {
            0 => WorkId::Send { lane: (number >> 32) as u32, request: number as u32 >> 1 },
            _ => WorkId::Receive { buffer: (number >> 1) as u32 },
        }
    }
}

/// The number of a lane's request, of which 31 bits count.
#[inline]
pub(crate) fn send_id(lane: u32, request: u32) -> u64 {
    u64::from(lane) << 32 | u64::from(request << 1)
}

fn receive_id(buffer: u32) -> u64 {
    u64::from(buffer) << 1 | 1
}

/// One end of a connection.
pub(crate) struct QueuePair {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<ibv_qp>,
    _completions: Arc<CompletionQueue>,
    pub number: u32,
    pub inline_bytes: u32,
}

// SAFETY: as for the domain.
unsafe impl Send for QueuePair {}

/// How packets reach the other end.
pub(crate) struct Path {
    pub port: u8,
    pub lid: u16,
    pub gid: Gid,
    pub gid_index: u8,
    pub service_level: u8,
    pub traffic_class: u8,
    pub hop_limit: u8,
    /// As the device counts it.
    pub mtu: u8,
}

impl QueuePair {
    /// A reliable connection's end with up to `requests` sends; the device may allow more.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        receives: &SharedReceiveQueue,
        requests: u32,
        inline_bytes: u32,
    ) -> Result<Self, Failed> {
        let mut attributes = ibv_qp_init_attr::zeroed();
        attributes.send_cq = completions.raw.as_ptr();
        attributes.recv_cq = completions.raw.as_ptr();
        attributes.srq = receives.raw.as_ptr();
        attributes.cap.max_send_wr = requests;
        attributes.cap.max_send_sge = 1;
        attributes.cap.max_inline_data = inline_bytes;
        attributes.qp_type = IBV_QPT_RC;
        // SAFETY: domain and queues exist, and the struct is the one that the call reads and fills.
        let raw = unsafe { (domain.context.library.ibv_create_qp)(domain.raw.as_ptr(), &mut attributes) };
        let raw = object("ibv_create_qp", raw)?;
        // SAFETY: the queue pair exists, and its number does not change.
        let number = unsafe { (*raw.as_ptr()).qp_num };
        Ok(Self {
            domain: domain.clone(),
            raw,
            _completions: completions.clone(),
            number,
            inline_bytes: attributes.cap.max_inline_data,
        })
    }

    fn modify(&self, call: &'static str, attributes: &mut ibv_qp_attr, mask: u32) -> Result<(), Failed> {
        let modify = self.domain.context.library.ibv_modify_qp;
        // SAFETY: the queue pair exists, and the struct is the one that the call reads.
        status(call, unsafe { modify(self.raw.as_ptr(), attributes, mask as i32) })
    }

    /// Ready to be connected. The peer may write to and read from what is registered in the domain.
    pub fn to_init(&self, port: u8, partition_key_index: u16) -> Result<(), Failed> {
        let mut attributes = no_attributes();
        attributes.qp_state = IBV_QPS_INIT;
        attributes.pkey_index = partition_key_index;
        attributes.port_num = port;
        attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
        let mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
        self.modify("ibv_modify_qp(INIT)", &mut attributes, mask)
    }

    /// Ready to receive from the other end.
    pub fn to_receive(
        &self,
        path: &Path,
        remote: u32,
        first_packet: u32,
        reads_served: u8,
    ) -> Result<(), Failed> {
        let mut attributes = no_attributes();
        attributes.qp_state = IBV_QPS_RTR;
        attributes.path_mtu = u32::from(path.mtu);
        attributes.dest_qp_num = remote;
        attributes.rq_psn = first_packet;
        attributes.max_dest_rd_atomic = reads_served;
        attributes.min_rnr_timer = RNR_TIMER;
        attributes.ah_attr.dlid = path.lid;
        attributes.ah_attr.sl = path.service_level;
        attributes.ah_attr.port_num = path.port;
        // On Ethernet packets are routed by GIDs; on InfiniBand only between subnets, and it does no harm within one.
        attributes.ah_attr.is_global = 1;
        attributes.ah_attr.grh.dgid.raw = path.gid.0;
        attributes.ah_attr.grh.sgid_index = path.gid_index;
        attributes.ah_attr.grh.hop_limit = path.hop_limit;
        attributes.ah_attr.grh.traffic_class = path.traffic_class;
        let mask = IBV_QP_STATE
            | IBV_QP_AV
            | IBV_QP_PATH_MTU
            | IBV_QP_DEST_QPN
            | IBV_QP_RQ_PSN
            | IBV_QP_MAX_DEST_RD_ATOMIC
            | IBV_QP_MIN_RNR_TIMER;
        self.modify("ibv_modify_qp(RTR)", &mut attributes, mask)
    }

    /// Ready to send to the other end.
    pub fn to_send(
        &self,
        first_packet: u32,
        reads: u8,
        ack_timeout_exponent: u8,
        retries: u8,
    ) -> Result<(), Failed> {
        let mut attributes = no_attributes();
        attributes.qp_state = IBV_QPS_RTS;
        attributes.sq_psn = first_packet;
        attributes.timeout = ack_timeout_exponent;
        attributes.retry_cnt = retries;
        attributes.rnr_retry = RNR_FOR_EVER;
        attributes.max_rd_atomic = reads;
        let mask = IBV_QP_STATE
            | IBV_QP_SQ_PSN
            | IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify("ibv_modify_qp(RTS)", &mut attributes, mask)
    }

    /// From now on the device takes no packet of the peer, and what is posted comes back flushed.
    pub fn to_error(&self) -> Result<(), Failed> {
        let mut attributes = no_attributes();
        attributes.qp_state = IBV_QPS_ERR;
        self.modify("ibv_modify_qp(ERR)", &mut attributes, IBV_QP_STATE)
    }

    /// As it was when it was made.
    pub fn to_reset(&self) -> Result<(), Failed> {
        let mut attributes = no_attributes();
        attributes.qp_state = IBV_QPS_RESET;
        self.modify("ibv_modify_qp(RESET)", &mut attributes, IBV_QP_STATE)
    }

    /// Posts a chain, which is empty afterwards. On an error so many were taken.
    #[inline]
    pub fn post(&self, chain: &mut SendChain) -> Result<(), (usize, Failed)> {
        let Some(first) = chain.close() else { return Ok(()) };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair exists; the chain and what it points to live until the call has ended. The memory that its
        // requests name is checked by the device, by its keys; that of inline ones is read during the call, and lies in a
        // region that the chain was given, which lives.
        let errno = unsafe {
            let post = (*self.domain.context.raw.as_ptr()).ops.post_send.expect("every provider can send");
            post(self.raw.as_ptr(), first, &mut bad)
        };
        let taken = if errno == 0 { chain.len() } else { chain.position(bad) };
        chain.open();
        status("ibv_post_send", errno).map_err(|failed| (taken, failed))
    }

    /// After this the device knows nothing of the queue pair any more: that is the fence. A queue pair that cannot be
    /// destroyed comes back.
    pub fn destroy(self) -> Result<(), (Self, Failed)> {
        let this = mem::ManuallyDrop::new(self);
        // SAFETY: the queue pair exists, and is destroyed once: `this` is not dropped, and given back only if it still exists.
        let errno = unsafe { (this.domain.context.library.ibv_destroy_qp)(this.raw.as_ptr()) };
        match status("ibv_destroy_qp", errno) {
            Ok(()) => {
                let mut this = this;
                // SAFETY: the fields are dropped once, here: `this` is never dropped as a whole.
                unsafe {
                    ptr::drop_in_place(&mut this.domain);
                    ptr::drop_in_place(&mut this._completions);
                }
                Ok(())
            }
            Err(failed) => Err((mem::ManuallyDrop::into_inner(this), failed)),
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the queue pair exists, and is destroyed once.
        unsafe { (self.domain.context.library.ibv_destroy_qp)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QueuePair({})", self.number)
    }
}

fn no_attributes() -> ibv_qp_attr {
    ibv_qp_attr::zeroed()
}

/// The access flags that only some libraries and devices know.
const OPTIONAL_ACCESS: u32 = IBV_ACCESS_OPTIONAL_RANGE;
/// How many completions are polled at once.
pub(crate) const POLLED_MAX: usize = 32;
/// How many receives are posted at once.
pub(crate) const RESTOCKED_MAX: usize = 64;
/// The longest message that a peer sends.
pub(crate) const RECEIVE_BYTES: usize = 64;
/// The peer waits 0.64 ms when no receive is left, which happens only to those who send more than they may.
const RNR_TIMER: u8 = 12;
const RNR_FOR_EVER: u8 = 7;
