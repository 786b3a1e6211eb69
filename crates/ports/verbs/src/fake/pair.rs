//! Queue pairs: their states, and what is posted to them.

use std::collections::VecDeque;

use bytemuck::Zeroable;

use super::raw::Raw;
use super::table::PARTITION_KEYS;
use super::wire::{Answer, Flow, Incoming};
use super::world::{Completion, DeviceEvent, Errno, EventOf, Held, World};
use crate::ibverbs::sys::*;

pub(super) struct Pair {
    pub context: u32,
    pub device: usize,
    pub domain: u32,
    pub send_queue: u32,
    pub receive_queue: u32,
    pub shared: Option<u32>,
    pub receives: ReceiveQueue,
    pub cap: ibv_qp_cap,
    pub signals_all: bool,
    pub number: u32,
    pub state: u32,
    /// Counts resets: what is left of the time before one is told apart by it.
    pub epoch: u32,
    /// As they were set.
    pub attributes: ibv_qp_attr,
    /// The device that the path leads to, if any.
    pub remote: Option<usize>,
    pub flow: Option<u32>,

    // The requester. Packets are numbered in 64 bits here, of which the lower 24 are sent.
    pub works: VecDeque<Work>,
    /// Slots that are taken: a request keeps its own until a completion at or behind it was polled.
    pub sends_used: u32,
    /// Requests that are done, and that no completion has told of.
    pub done_silently: u32,
    /// The first packet of the next request to be posted, to be sent, and that was never sent.
    pub tail: u64,
    pub next: u64,
    pub sent: u64,
    /// The first packet that was not acknowledged.
    pub unacknowledged: u64,
    pub retries_left: u8,
    pub rnr_left: u8,
    /// The receiver was not ready: not before this.
    pub waits_until: u64,
    /// When silence of the peer is too long.
    pub deadline: Option<u64>,
    /// An answer showed that responses were lost, and nothing was acknowledged since.
    pub loss_seen: bool,

    // The responder.
    pub expected: u32,
    pub has_heard: bool,
    pub incoming: Option<Incoming>,
    pub answers: VecDeque<Answer>,
    /// The peer was told that a packet is missing.
    pub gap_told: bool,

    pub events_got: u32,
    pub raw: Raw<ibv_qp>,
}

/// A request to send, to write or to read.
pub(super) struct Work {
    pub id: u64,
    pub opcode: u32,
    pub flags: u32,
    /// In network byte order.
    pub imm: u32,
    pub remote_address: u64,
    pub remote_key: u32,
    pub data: Data,
    pub bytes: u64,
    /// Its packets.
    pub first: u64,
    pub packets: u64,
    /// It is wrong in itself: it fails with this when all before it are done.
    pub fails_with: Option<u32>,
}

pub(super) enum Data {
    Pieces(Vec<ibv_sge>),
    Inline(Vec<u8>),
}

impl Work {
    pub fn end(&self) -> u64 {
        self.first + self.packets
    }

    pub fn is_read(&self) -> bool {
        self.opcode == IBV_WR_RDMA_READ
    }

    pub fn has_imm(&self) -> bool {
        matches!(self.opcode, IBV_WR_RDMA_WRITE_WITH_IMM | IBV_WR_SEND_WITH_IMM)
    }
}

/// Where to put what a peer sends.
pub(super) struct Receive {
    pub id: u64,
    pub pieces: Vec<ibv_sge>,
}

/// Which queue a receive came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReceiveOf {
    Pair,
    Shared(u32),
}

pub(super) struct ReceiveQueue {
    max: u32,
    max_pieces: u32,
    /// Posted, until the completion was polled.
    pub used: u32,
    pub waiting: VecDeque<Receive>,
}

impl ReceiveQueue {
    pub fn new(max: u32, max_pieces: u32) -> Self {
        Self { max, max_pieces, used: 0, waiting: VecDeque::new() }
    }

    pub fn post(&mut self, receive: Receive) -> Result<(), Errno> {
        if receive.pieces.len() > self.max_pieces as usize {
            return Err(libc::EINVAL);
        }
        if self.used == self.max {
            return Err(libc::ENOMEM);
        }
        self.used += 1;
        self.waiting.push_back(receive);
        Ok(())
    }
}

impl Pair {
    pub fn mtu(&self) -> u64 {
        128 << self.attributes.path_mtu
    }

    /// A packet number of 64 bits that is near those that are out.
    pub fn extend(&self, psn: u32) -> u64 {
        let ahead = psn.wrapping_sub(self.unacknowledged as u32) & PSN_MASK;
        match ahead < 1 << 23 {
            true => self.unacknowledged + u64::from(ahead),
            false => (self.unacknowledged + u64::from(ahead)).wrapping_sub(1 << 24),
        }
    }

    pub fn receives_packets(&self) -> bool {
        matches!(self.state, IBV_QPS_RTR | IBV_QPS_RTS)
    }
}

impl World {
    pub fn create_pair(
        &mut self,
        domain: u32,
        raw: (*mut ibv_context, *mut ibv_pd),
        queues: (u32, u32, Option<u32>),
        attributes: &mut ibv_qp_init_attr,
    ) -> Result<*mut ibv_qp, Errno> {
        let (send_queue, receive_queue, shared) = queues;
        let is_known = self.queues.contains_key(&send_queue)
            && self.queues.contains_key(&receive_queue)
            && shared.is_none_or(|shared| self.shared.contains_key(&shared));
        let Some(owner) = self.domains.get(&domain).filter(|_| is_known) else {
            return Err(self.violation("ibv_create_qp with an object that is destroyed"));
        };
        let context = owner.context;
        let of_one_context = [send_queue, receive_queue].iter().all(|id| self.queues[id].context == context)
            && shared.is_none_or(|shared| self.shared[&shared].context == context);
        let limits = &self.options.limits;
        let cap = &mut attributes.cap;
        if shared.is_some() {
            (cap.max_recv_wr, cap.max_recv_sge) = (0, 0);
        }
        if attributes.qp_type != IBV_QPT_RC
            || !of_one_context
            || cap.max_send_wr == 0
            || cap.max_send_wr.max(cap.max_recv_wr) > limits.max_qp_wr
            || cap.max_send_sge.max(cap.max_recv_sge) > limits.max_sge
            || cap.max_inline_data > limits.max_inline
        {
            return Err(libc::EINVAL);
        }
        let max_qp = limits.max_qp;
        let device = self.contexts[&context].device;
        let id = self.id();
        let numbers = &mut self.devices[device].numbers;
        if numbers.len() as u32 >= max_qp {
            return Err(libc::ENOMEM);
        }
        // The lowest that is free: numbers come again as soon as they can.
        let number = (FIRST_NUMBER..).find(|number| !numbers.contains_key(number)).expect("max_qp is lower");
        numbers.insert(number, id);
        let head = ibv_qp {
            context: raw.0,
            qp_context: attributes.qp_context,
            pd: raw.1,
            send_cq: attributes.send_cq,
            recv_cq: attributes.recv_cq,
            srq: attributes.srq,
            handle: id,
            qp_num: number,
            state: IBV_QPS_RESET,
            qp_type: IBV_QPT_RC,
            mutex: libc::PTHREAD_MUTEX_INITIALIZER,
            cond: libc::PTHREAD_COND_INITIALIZER,
            events_completed: 0,
        };
        let raw = Raw::new(head, id);
        let head = raw.head();
        let pair = Pair {
            context,
            device,
            domain,
            send_queue,
            receive_queue,
            shared,
            receives: ReceiveQueue::new(cap.max_recv_wr, cap.max_recv_sge),
            cap: *cap,
            signals_all: attributes.sq_sig_all != 0,
            number,
            state: IBV_QPS_RESET,
            epoch: 0,
            attributes: Zeroable::zeroed(),
            remote: None,
            flow: None,
            works: VecDeque::new(),
            sends_used: 0,
            done_silently: 0,
            tail: 0,
            next: 0,
            sent: 0,
            unacknowledged: 0,
            retries_left: 0,
            rnr_left: 0,
            waits_until: 0,
            deadline: None,
            loss_seen: false,
            expected: 0,
            has_heard: false,
            incoming: None,
            answers: VecDeque::new(),
            gap_told: false,
            events_got: 0,
            raw,
        };
        self.pairs.insert(id, pair);
        self.counters.pairs_created += 1;
        Ok(head)
    }

    /// `acknowledged`: events that were.
    pub fn destroy_pair(&mut self, id: u32, acknowledged: u32) -> Result<(), Held> {
        let Some(pair) = self.pairs.get(&id) else {
            return Err(Held::Errno(self.violation("ibv_destroy_qp of a destroyed queue pair")));
        };
        if pair.events_got != acknowledged && !self.is_dead(pair.context) {
            return Err(Held::Unacknowledged);
        }
        self.leave_network(id);
        self.forget_events(EventOf::Pair(id));
        self.clean_queues(id);
        let pair = self.pairs.remove(&id).expect("it was found before");
        self.counters.pairs_destroyed += 1;
        self.bury_pair(pair.raw);
        Ok(())
    }

    /// Nothing reaches the pair under its number any more. Packets that it has sent travel on.
    pub fn leave_network(&mut self, id: u32) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let numbers = &mut self.devices[pair.device].numbers;
        if numbers.get(&pair.number) == Some(&id) {
            numbers.remove(&pair.number);
        }
        if let Some(id) = pair.flow.take()
            && let Some(flow) = self.flows.get_mut(&id)
        {
            flow.is_orphan = true;
            if flow.is_empty() {
                self.flows.remove(&id);
            }
        }
        self.is_idle = false;
    }

    /// Some libraries take the completions of a queue pair that ends out of its queues, others leave them.
    fn clean_queues(&mut self, id: u32) {
        let removes = self.random.coin();
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let mut receives = Vec::new();
        if let Some(Incoming::Send { of, .. }) = pair.incoming.take() {
            receives.push(of);
        }
        for queue in [pair.send_queue, pair.receive_queue] {
            let Some(queue) = self.queues.get_mut(&queue) else { continue };
            if removes {
                let gone = queue.entries.iter().filter(|entry| entry.pair == id);
                receives.extend(gone.filter_map(|entry| entry.receive));
                queue.entries.retain(|entry| entry.pair != id);
            }
        }
        for receive in receives {
            if let ReceiveOf::Shared(shared) = receive
                && let Some(shared) = self.shared.get_mut(&shared)
            {
                shared.receives.used -= 1;
            }
        }
    }

    pub fn modify(&mut self, id: u32, wanted: &ibv_qp_attr, mask: u32) -> Result<u32, Errno> {
        let Some(pair) = self.pairs.get(&id) else {
            return Err(self.violation("ibv_modify_qp of a destroyed queue pair"));
        };
        self.is_idle = false;
        let to = if mask & IBV_QP_STATE != 0 { wanted.qp_state } else { pair.state };
        if mask & IBV_QP_CUR_STATE != 0 && wanted.cur_qp_state != pair.state {
            return Err(libc::EINVAL);
        }
        let Some((required, optional)) = transition(pair.state, to) else { return Err(libc::EINVAL) };
        let given = mask & !IBV_QP_STATE;
        if given & required != required || given & !(required | optional) != 0 {
            return Err(libc::EINVAL);
        }
        self.check(pair.device, wanted, mask)?;
        match to {
            IBV_QPS_RESET => self.reset(id),
            IBV_QPS_ERR => self.fail(id, None),
            _ => self.set(id, to, wanted, mask),
        }
        Ok(to)
    }

    /// Whether values are within what the device can do.
    fn check(&self, device: usize, wanted: &ibv_qp_attr, mask: u32) -> Result<(), Errno> {
        let (limits, device) = (&self.options.limits, &self.devices[device]);
        let given = |bit| mask & bit != 0;
        let path = &wanted.ah_attr;
        let wrong = given(IBV_QP_PORT) && wanted.port_num != 1
            || given(IBV_QP_PKEY_INDEX) && usize::from(wanted.pkey_index) >= PARTITION_KEYS.len()
            || given(IBV_QP_PATH_MTU) && !(1..=5).contains(&wanted.path_mtu)
            || given(IBV_QP_PATH_MTU) && 128 << wanted.path_mtu > device.mtu_bytes
            || given(IBV_QP_DEST_QPN) && wanted.dest_qp_num > PSN_MASK
            || given(IBV_QP_RQ_PSN) && wanted.rq_psn > PSN_MASK
            || given(IBV_QP_SQ_PSN) && wanted.sq_psn > PSN_MASK
            || given(IBV_QP_MAX_QP_RD_ATOMIC) && wanted.max_rd_atomic > limits.rd_atom
            || given(IBV_QP_MAX_DEST_RD_ATOMIC) && wanted.max_dest_rd_atomic > limits.rd_atom
            || given(IBV_QP_TIMEOUT) && wanted.timeout > 31
            || given(IBV_QP_RETRY_CNT) && wanted.retry_cnt > 7
            || given(IBV_QP_RNR_RETRY) && wanted.rnr_retry > 7
            || given(IBV_QP_MIN_RNR_TIMER) && wanted.min_rnr_timer > 31
            || given(IBV_QP_AV) && (path.port_num != 1 || path.sl > 15)
            || given(IBV_QP_AV) && path.is_global == 0 && device.ethernet
            || given(IBV_QP_AV)
                && path.is_global != 0
                && usize::from(path.grh.sgid_index) >= device.gids().len();
        if wrong { Err(libc::EINVAL) } else { Ok(()) }
    }

    fn set(&mut self, id: u32, to: u32, wanted: &ibv_qp_attr, mask: u32) {
        let remote = self.device_at(&wanted.ah_attr);
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let attributes = &mut pair.attributes;
        macro_rules! take {
            ($($bit:ident: $($field:ident)+;)*) => {
                $(if mask & $bit != 0 {
                    $(attributes.$field = wanted.$field;)+
                })*
            };
        }
        take! {
            IBV_QP_PKEY_INDEX: pkey_index;
            IBV_QP_PORT: port_num;
            IBV_QP_ACCESS_FLAGS: qp_access_flags;
            IBV_QP_AV: ah_attr;
            IBV_QP_PATH_MTU: path_mtu;
            IBV_QP_DEST_QPN: dest_qp_num;
            IBV_QP_RQ_PSN: rq_psn;
            IBV_QP_SQ_PSN: sq_psn;
            IBV_QP_TIMEOUT: timeout;
            IBV_QP_RETRY_CNT: retry_cnt;
            IBV_QP_RNR_RETRY: rnr_retry;
            IBV_QP_MAX_QP_RD_ATOMIC: max_rd_atomic;
            IBV_QP_MAX_DEST_RD_ATOMIC: max_dest_rd_atomic;
            IBV_QP_MIN_RNR_TIMER: min_rnr_timer;
        }
        if mask & IBV_QP_AV != 0 {
            pair.remote = remote;
        }
        let before = std::mem::replace(&mut pair.state, to);
        if (before, to) == (IBV_QPS_INIT, IBV_QPS_RTR) {
            pair.expected = pair.attributes.rq_psn;
            let flow = Flow::new(pair.device, pair.remote, pair.attributes.dest_qp_num);
            let flow_id = self.id();
            self.flows.insert(flow_id, flow);
            self.pairs.get_mut(&id).expect("as above").flow = Some(flow_id);
        } else if (before, to) == (IBV_QPS_RTR, IBV_QPS_RTS) {
            // Numbers begin high enough that none before them is below zero.
            let first = (1 << 32) + u64::from(pair.attributes.sq_psn);
            (pair.tail, pair.next, pair.sent, pair.unacknowledged) = (first, first, first, first);
            (pair.retries_left, pair.rnr_left) = (pair.attributes.retry_cnt, pair.attributes.rnr_retry);
        }
    }

    /// As it was made: everything that was posted is forgotten.
    fn reset(&mut self, id: u32) {
        let number = self.pairs[&id].number;
        let device = self.pairs[&id].device;
        self.leave_network(id);
        self.devices[device].numbers.insert(number, id);
        self.clean_queues(id);
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        pair.state = IBV_QPS_RESET;
        pair.epoch += 1;
        pair.attributes = Zeroable::zeroed();
        pair.remote = None;
        pair.works.clear();
        pair.answers.clear();
        pair.receives.waiting.clear();
        (pair.sends_used, pair.done_silently, pair.receives.used) = (0, 0, 0);
        (pair.incoming, pair.deadline) = (None, None);
        (pair.loss_seen, pair.gap_told, pair.has_heard) = (false, false, false);
        pair.waits_until = 0;
    }

    /// Into the error state, in which everything that was posted is flushed, a request a step. `event` says why, if the
    /// device found it.
    pub fn fail(&mut self, id: u32, event: Option<u32>) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        if pair.state == IBV_QPS_ERR {
            return;
        }
        pair.state = IBV_QPS_ERR;
        pair.answers.clear();
        pair.deadline = None;
        let (context, device) = (pair.context, pair.device);
        let (has_shared, queue) = (pair.shared.is_some(), pair.receive_queue);
        let incoming = pair.incoming.take();
        self.is_idle = false;
        if let Some(Incoming::Send { receive, of, .. }) = incoming {
            let completion = self.failed(id, receive.id, IBV_WC_WR_FLUSH_ERR, 0, Some(of));
            self.complete(queue, completion, true);
        }
        if let Some(kind) = event {
            self.report(context, DeviceEvent { kind, of: EventOf::Pair(id) });
        }
        if has_shared && self.devices[device].tells_last_receive {
            let event = DeviceEvent { kind: IBV_EVENT_QP_LAST_WQE_REACHED, of: EventOf::Pair(id) };
            self.report(context, event);
        }
    }

    /// A completion of which only the number, the status, the queue pair and `vendor_err` mean anything.
    pub fn failed(
        &mut self,
        id: u32,
        work_id: u64,
        status: u32,
        sends: u32,
        receive: Option<ReceiveOf>,
    ) -> Completion {
        let mut wc = self.rubbish();
        let pair = &self.pairs[&id];
        (wc.wr_id, wc.status, wc.qp_num, wc.vendor_err) = (work_id, status, pair.number, 0x80 + status);
        Completion { wc, pair: id, epoch: pair.epoch, sends, receive }
    }

    /// A completion as no one may read it.
    pub fn rubbish(&mut self) -> ibv_wc {
        let word = self.random.word();
        ibv_wc {
            wr_id: !0,
            status: IBV_WC_GENERAL_ERR,
            opcode: word as u32 & 0xff,
            vendor_err: !0,
            byte_len: (word >> 8) as u32,
            imm_data: (word >> 16) as u32,
            qp_num: !0,
            src_qp: (word >> 24) as u32,
            wc_flags: (word >> 32) as u32,
            pkey_index: (word >> 40) as u16,
            slid: (word >> 48) as u16,
            sl: 0xee,
            dlid_path_bits: 0xee,
        }
    }

    /// Whether requests can be posted at all, before one is looked at.
    pub fn may_send(&mut self, id: u32) -> Result<ibv_qp_cap, Errno> {
        match self.pairs.get(&id) {
            None => Err(self.violation("ibv_post_send to a destroyed queue pair")),
            Some(pair) if matches!(pair.state, IBV_QPS_RTS | IBV_QPS_ERR) => Ok(pair.cap),
            Some(_) => Err(libc::EINVAL),
        }
    }

    /// Takes a request, whose packets are not numbered yet.
    pub fn post(&mut self, id: u32, mut work: Work) -> Result<(), Errno> {
        let max_message = u64::from(self.options.limits.max_msg_sz);
        let pair = self.pairs.get_mut(&id).expect("the caller has asked whether it may send");
        if pair.sends_used == pair.cap.max_send_wr {
            return Err(libc::ENOMEM);
        }
        if work.bytes > max_message {
            work.fails_with = Some(IBV_WC_LOC_LEN_ERR);
        } else if work.is_read() && pair.attributes.max_rd_atomic == 0 {
            work.fails_with = Some(IBV_WC_LOC_QP_OP_ERR);
        }
        if pair.signals_all {
            work.flags |= IBV_SEND_SIGNALED;
        }
        work.first = pair.tail;
        work.packets = match work.fails_with {
            Some(_) => 1,
            None => work.bytes.div_ceil(pair.mtu()).max(1),
        };
        pair.tail = work.end();
        pair.sends_used += 1;
        pair.works.push_back(work);
        self.counters.sends_posted += 1;
        self.is_idle = false;
        Ok(())
    }

    pub fn post_receive(&mut self, id: u32, receive: Receive) -> Result<(), Errno> {
        self.is_idle = false;
        match self.pairs.get_mut(&id) {
            None => Err(self.violation("ibv_post_recv to a destroyed queue pair")),
            Some(pair) if pair.state == IBV_QPS_RESET || pair.shared.is_some() => Err(libc::EINVAL),
            Some(pair) => pair.receives.post(receive),
        }
    }
}

/// What has to be given for a change of state, and what may be.
fn transition(from: u32, to: u32) -> Option<(u32, u32)> {
    const INIT: u32 = IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    const RTR: u32 = IBV_QP_AV
        | IBV_QP_PATH_MTU
        | IBV_QP_DEST_QPN
        | IBV_QP_RQ_PSN
        | IBV_QP_MAX_DEST_RD_ATOMIC
        | IBV_QP_MIN_RNR_TIMER;
    const RTS: u32 =
        IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
    match (from, to) {
        (_, IBV_QPS_RESET | IBV_QPS_ERR) => Some((0, 0)),
        (IBV_QPS_RESET, IBV_QPS_INIT) => Some((INIT, 0)),
        (IBV_QPS_INIT, IBV_QPS_INIT) => Some((0, INIT)),
        (IBV_QPS_INIT, IBV_QPS_RTR) => Some((RTR, IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX)),
        (IBV_QPS_RTR, IBV_QPS_RTS) => {
            Some((RTS, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER))
        }
        (IBV_QPS_RTS, IBV_QPS_RTS) => {
            Some((0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER))
        }
        _ => None,
    }
}

pub(super) const PSN_MASK: u32 = (1 << 24) - 1;
/// 0 and 1 are of the subnet's own.
const FIRST_NUMBER: u32 = 0x11;
