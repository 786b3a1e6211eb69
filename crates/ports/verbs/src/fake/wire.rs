//! How packets travel, and what requesters and responders make of them: the reliable connection of the InfiniBand
//! specification, a packet a step.
//!
//! What one queue pair sends to another stays in order, and stays on its way when the queue pair is destroyed. A packet is
//! let in by its number and the device that it comes from, as on the wire: a queue pair that has got the number of another
//! may be sent what was meant for that.

use std::collections::VecDeque;
use std::ops::Bound;

use super::pair::{Data, PSN_MASK, Pair, Receive, ReceiveOf, Work};
use super::world::{Completion, Device, DeviceEvent, EventOf, Use, World};
use crate::ibverbs::sys::*;

/// What is on its way from one queue pair to another.
pub(super) struct Flow {
    from: usize,
    /// Where the path leads, if anywhere, and the number there.
    to: Option<usize>,
    number: u32,
    packets: VecDeque<Packet>,
    /// Nothing more is sent.
    pub is_orphan: bool,
}

impl Flow {
    pub fn new(from: usize, to: Option<usize>, number: u32) -> Self {
        Self { from, to, number, packets: VecDeque::new(), is_orphan: false }
    }

    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

struct Packet {
    number: u32,
    body: Body,
}

enum Body {
    Write {
        start: Option<Target>,
        is_last: bool,
        imm: Option<u32>,
        is_solicited: bool,
        payload: Vec<u8>,
    },
    Send {
        is_first: bool,
        is_last: bool,
        imm: Option<u32>,
        is_solicited: bool,
        payload: Vec<u8>,
    },
    Read(Target),
    Response(Vec<u8>),
    /// Everything up to this was done.
    Done,
    /// This one is missing.
    Missing,
    /// There is no receive for this one.
    NotReady,
    /// This one is refused, with the status that its request is to have.
    Refused(u32),
}

/// Memory of the responder.
#[derive(Clone, Copy)]
struct Target {
    address: u64,
    key: u32,
    bytes: u64,
}

/// What a responder has to say, in this order.
pub(super) enum Answer {
    Done(u32),
    Missing(u32),
    NotReady(u32),
    Refused(u32, u32),
    /// Read from memory only when it is sent.
    Read {
        first: u32,
        address: u64,
        key: u32,
        bytes: u64,
    },
}

impl Answer {
    fn first(&self) -> u32 {
        match *self {
            Answer::Done(first) | Answer::Missing(first) | Answer::NotReady(first) => first,
            Answer::Refused(first, _) | Answer::Read { first, .. } => first,
        }
    }
}

/// A message of which some packets are still to come.
pub(super) enum Incoming {
    Write { address: u64, key: u32, left: u64, bytes: u64 },
    Send { receive: Receive, of: ReceiveOf, bytes: u64 },
}

/// What became of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A packet moved, or a request was flushed.
    Moved,
    /// Only time went by, until something that was waited for.
    Waited,
    /// Nothing will happen before something is asked for.
    Idle,
}

/// What a queue pair can do now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Act {
    Flush,
    Answer,
    Request,
    Timeout,
}

/// What a responder makes of a packet that comes at its turn.
enum Verdict {
    Done,
    NotReady,
    /// The status of the peer's request, and the event here.
    Refused(u32, Option<u32>),
}

const INVALID: Verdict = Verdict::Refused(IBV_WC_REM_INV_REQ_ERR, Some(IBV_EVENT_QP_REQ_ERR));
const DENIED: Verdict = Verdict::Refused(IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));

/// Why bytes could not be put where a receive wants them.
enum Misfit {
    TooLong,
    Protected,
}

impl Device {
    /// The port's addresses and their types.
    pub fn gids(&self) -> &'static [u32] {
        match self.ethernet {
            true => &[IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2, IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2],
            false => &[IBV_GID_TYPE_IB],
        }
    }
}

/// The address of a device at this index: link-local ones, then those of IPv4.
pub(super) fn gid(device: usize, index: usize) -> [u8; 16] {
    let mut gid = [0; 16];
    let number = (device as u16 + 1).to_be_bytes();
    if index < 2 {
        gid[..2].copy_from_slice(&[0xfe, 0x80]);
        gid[8..12].copy_from_slice(&[0x02, 0xfa, 0xce, 0xff]);
    } else {
        gid[10..14].copy_from_slice(&[0xff, 0xff, 10, 77]);
    }
    gid[14..].copy_from_slice(&number);
    gid
}

/// The local identifier of a device's port on InfiniBand.
pub(super) fn lid(device: usize) -> u16 {
    device as u16 + 1
}

impl World {
    pub fn is_frozen(&self, device: usize) -> bool {
        self.devices[device].frozen_until > self.now
    }

    /// The device that a path leads to.
    pub fn device_at(&self, path: &ibv_ah_attr) -> Option<usize> {
        (0..self.devices.len()).find(|&device| {
            let indices = 0..self.devices[device].gids().len();
            match path.is_global {
                0 => !self.devices[device].ethernet && lid(device) == path.dlid,
                _ => indices.into_iter().any(|index| gid(device, index) == path.grh.dgid.raw),
            }
        })
    }

    /// Lets one thing happen.
    pub fn step(&mut self) -> Step {
        if self.is_idle {
            return Step::Idle;
        }
        self.now += 1;
        self.counters.steps += 1;
        let landing_first = self.random.coin();
        if landing_first && self.land_one() || self.act_one() || !landing_first && self.land_one() {
            return Step::Moved;
        }
        match self.next_time() {
            Some(time) => {
                self.now = time;
                Step::Waited
            }
            None => {
                self.is_idle = true;
                Step::Idle
            }
        }
    }

    /// When something is due that nobody has to do anything for.
    fn next_time(&self) -> Option<u64> {
        let thaws = self.devices.iter().map(|device| device.frozen_until);
        let of_pairs = self.pairs.values().filter(|pair| pair.state == IBV_QPS_RTS);
        let times = of_pairs.flat_map(|pair| [pair.deadline.unwrap_or(0), pair.waits_until]);
        thaws.chain(times).filter(|&time| time > self.now && time != u64::MAX).min()
    }

    /// One packet arrives, of a flow that chance picks.
    fn land_one(&mut self) -> bool {
        let (Some((&low, _)), Some((&high, _))) = (self.flows.first_key_value(), self.flows.last_key_value())
        else {
            return false;
        };
        let start = low + self.random.below(high - low + 1);
        let arrives =
            |flow: &Flow| !flow.packets.is_empty() && flow.to.is_none_or(|device| !self.is_frozen(device));
        let found = self.flows.range(start..).chain(self.flows.range(..start)).find(|(_, f)| arrives(f));
        let Some((&id, _)) = found else { return false };
        let flow = self.flows.get_mut(&id).expect("just found");
        let packet = flow.packets.pop_front().expect("it has one");
        let (from, to, number) = (flow.from, flow.to, flow.number);
        if flow.is_orphan && flow.packets.is_empty() {
            self.flows.remove(&id);
        }
        self.arrive(from, to, number, packet);
        true
    }

    fn arrive(&mut self, from: usize, to: Option<usize>, number: u32, packet: Packet) {
        let is_lost = self.random.happens(self.options.faults.lost_one_in);
        let works = |device: usize| self.devices[device].link_up && !self.devices[device].is_fatal;
        let to = to.filter(|&to| !is_lost && works(from) && works(to));
        let id = to.and_then(|to| self.devices[to].numbers.get(&number).copied());
        let takes = |id: &u32| {
            let pair = &self.pairs[id];
            pair.receives_packets() && pair.remote == Some(from)
        };
        let Some(id) = id.filter(takes) else {
            self.counters.packets_lost += 1;
            return;
        };
        let pair = self.pairs.get_mut(&id).expect("just found");
        if pair.state == IBV_QPS_RTR && !std::mem::replace(&mut pair.has_heard, true) {
            let context = pair.context;
            self.report(context, DeviceEvent { kind: IBV_EVENT_COMM_EST, of: EventOf::Pair(id) });
        }
        match packet.body {
            Body::Write { .. } | Body::Send { .. } | Body::Read(_) => self.respond(id, packet),
            _ if self.pairs[&id].state == IBV_QPS_RTS => self.hear(id, packet),
            _ => self.counters.packets_lost += 1,
        }
    }

    /// One queue pair, which chance picks, does what it can.
    fn act_one(&mut self) -> bool {
        let (Some((&low, _)), Some((&high, _))) = (self.pairs.first_key_value(), self.pairs.last_key_value())
        else {
            return false;
        };
        let start = low + self.random.below(high - low + 1);
        let prefers_requests = self.random.coin();
        let able = |(&id, pair): (&u32, &Pair)| Some((id, self.act_of(pair, prefers_requests)?));
        let before = (Bound::Unbounded, Bound::Excluded(start));
        let found = self.pairs.range(start..).chain(self.pairs.range(before)).find_map(able);
        let Some((id, act)) = found else { return false };
        match act {
            Act::Flush => self.flush(id),
            Act::Answer => self.answer(id),
            Act::Request => self.request(id),
            Act::Timeout => self.time_out(id),
        }
        true
    }

    fn act_of(&self, pair: &Pair, prefers_requests: bool) -> Option<Act> {
        if self.is_frozen(pair.device) {
            return None;
        }
        match pair.state {
            IBV_QPS_ERR if !pair.answers.is_empty() => Some(Act::Answer),
            IBV_QPS_ERR if !pair.works.is_empty() || !pair.receives.waiting.is_empty() => Some(Act::Flush),
            IBV_QPS_RTR if !pair.answers.is_empty() => Some(Act::Answer),
            IBV_QPS_RTS => {
                let answers = !pair.answers.is_empty();
                let requests = self.can_request(pair);
                if answers && !(requests && prefers_requests) {
                    Some(Act::Answer)
                } else if requests {
                    Some(Act::Request)
                } else {
                    pair.deadline.is_some_and(|deadline| deadline <= self.now).then_some(Act::Timeout)
                }
            }
            _ => None,
        }
    }

    fn can_request(&self, pair: &Pair) -> bool {
        if pair.next == pair.tail || pair.waits_until > self.now || pair.next - pair.unacknowledged >= WINDOW
        {
            return false;
        }
        let work = &pair.works[work_at(pair)];
        let asked = pair.works.iter().take_while(|work| work.end() <= pair.next);
        if work.fails_with.is_some() {
            return pair.works[0].first == work.first;
        }
        let reads = || asked.clone().filter(|work| work.is_read()).count();
        let fenced = work.flags & IBV_SEND_FENCE != 0 && pair.next == work.first;
        !(work.is_read() && reads() >= usize::from(pair.attributes.max_rd_atomic) || fenced && reads() > 0)
    }

    // The requester.

    /// Sends the next packet.
    fn request(&mut self, id: u32) {
        let pair = &self.pairs[&id];
        let at = work_at(pair);
        let work = &pair.works[at];
        if let Some(status) = work.fails_with {
            return self.fail_front(id, status);
        }
        let offset = (pair.next - work.first) * pair.mtu();
        let is_last = pair.next + 1 == work.end();
        let imm = (is_last && work.has_imm()).then_some(work.imm);
        let is_solicited = is_last && work.flags & IBV_SEND_SOLICITED != 0;
        let target = Target {
            address: work.remote_address.wrapping_add(offset),
            key: work.remote_key,
            bytes: work.bytes - offset,
        };
        let body = match work.opcode {
            IBV_WR_RDMA_READ => self.pieces_allow(pair, work).map(|()| Body::Read(target)),
            opcode => self.payload(pair, work, offset).map(|payload| match opcode {
                IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => {
                    let start = (offset == 0).then_some(target);
                    Body::Write { start, is_last, imm, is_solicited, payload }
                }
                _ => Body::Send { is_first: offset == 0, is_last, imm, is_solicited, payload },
            }),
        };
        let next = if work.is_read() { work.end() } else { pair.next + 1 };
        let pair = self.pairs.get_mut(&id).expect("just found");
        let Some(body) = body else {
            pair.works[at].fails_with = Some(IBV_WC_LOC_PROT_ERR);
            return;
        };
        let number = pair.next as u32 & PSN_MASK;
        pair.next = next;
        pair.sent = pair.sent.max(next);
        if pair.deadline.is_none() {
            pair.deadline = deadline(pair, self.now);
        }
        self.send(id, Packet { number, body });
    }

    fn send(&mut self, id: u32, packet: Packet) {
        self.counters.packets += 1;
        let flow = self.pairs[&id].flow.expect("a queue pair that sends has a path");
        self.flows.get_mut(&flow).expect("it lives as long as its queue pair").packets.push_back(packet);
    }

    /// What the requester's memory, or the request itself, has for a packet.
    fn payload(&self, pair: &Pair, work: &Work, offset: u64) -> Option<Vec<u8>> {
        let bytes = pair.mtu().min(work.bytes - offset);
        match &work.data {
            Data::Inline(data) => Some(data[offset as usize..(offset + bytes) as usize].to_vec()),
            Data::Pieces(pieces) => {
                let mut payload = Vec::with_capacity(bytes as usize);
                for (address, bytes, key) in parts(pieces, offset, bytes) {
                    let use_of =
                        Use { key, is_remote: false, domain: pair.domain, address, bytes, access: 0 };
                    let (region, start) = self.region(pair.device, &use_of)?;
                    let at = payload.len();
                    payload.resize(at + bytes as usize, 0);
                    region.memory.read(start, &mut payload[at..]).ok()?;
                }
                Some(payload)
            }
        }
    }

    /// Whether what is read may be stored.
    fn pieces_allow(&self, pair: &Pair, work: &Work) -> Option<()> {
        let Data::Pieces(pieces) = &work.data else { return None };
        let mut parts = parts(pieces, 0, work.bytes);
        let access = IBV_ACCESS_LOCAL_WRITE;
        let may = parts.all(|(address, bytes, key)| {
            let use_of = Use { key, is_remote: false, domain: pair.domain, address, bytes, access };
            self.region(pair.device, &use_of).is_some()
        });
        may.then_some(())
    }

    /// The peer was silent for too long.
    fn time_out(&mut self, id: u32) {
        let pair = &self.pairs[&id];
        match self.is_silent(pair) {
            true => {
                self.pairs.get_mut(&id).expect("just found").loss_seen = false;
                self.resend(id);
            }
            false => {
                let deadline = deadline(pair, self.now);
                self.pairs.get_mut(&id).expect("just found").deadline = deadline;
            }
        }
    }

    /// Whether nothing is on its way to the peer or from it. Only then does silence count: time here is how often others
    /// have their turn.
    fn is_silent(&self, pair: &Pair) -> bool {
        let Some(remote) = pair.remote.filter(|&remote| !self.is_frozen(remote)) else { return true };
        let has_packets = |flow: Option<u32>| {
            flow.and_then(|flow| self.flows.get(&flow)).is_some_and(|flow| !flow.packets.is_empty())
        };
        let peer = self.devices[remote].numbers.get(&pair.attributes.dest_qp_num);
        let peer = peer.map(|peer| &self.pairs[peer]);
        !has_packets(pair.flow) && peer.is_none_or(|peer| peer.answers.is_empty() && !has_packets(peer.flow))
    }

    /// Begins again at the first packet that was not acknowledged, so often.
    fn resend(&mut self, id: u32) {
        let now = self.now;
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        if pair.retries_left == 0 {
            return self.fail_front(id, IBV_WC_RETRY_EXC_ERR);
        }
        pair.retries_left -= 1;
        pair.next = pair.unacknowledged;
        pair.deadline = deadline(pair, now);
        self.counters.resends += 1;
    }

    /// The requester hears an answer.
    fn hear(&mut self, id: u32, packet: Packet) {
        let pair = &self.pairs[&id];
        let number = pair.extend(packet.number);
        if number < pair.unacknowledged || number > pair.sent {
            return;
        }
        let is_out = number < pair.sent;
        match packet.body {
            Body::Done if is_out => {
                self.acknowledge(id, number + 1);
                self.expect_acknowledged(id, number + 1);
            }
            Body::Missing => {
                self.acknowledge(id, number);
                if self.expect_acknowledged(id, number) {
                    self.resend(id);
                }
            }
            Body::NotReady if is_out => {
                self.acknowledge(id, number);
                if self.expect_acknowledged(id, number) {
                    self.wait_for_receiver(id);
                }
            }
            Body::Refused(status) if is_out => {
                self.acknowledge(id, number);
                if self.expect_acknowledged(id, number) {
                    self.fail_front(id, status);
                }
            }
            Body::Response(payload) if is_out => {
                self.acknowledge(id, number);
                if self.expect_acknowledged(id, number) {
                    self.store_response(id, &payload);
                }
            }
            _ => {}
        }
    }

    /// All requests of which every packet is before `to` are done, but for reads, which their responses end.
    fn acknowledge(&mut self, id: u32, to: u64) {
        loop {
            let pair = self.pairs.get_mut(&id).expect("the caller has found it");
            let Some(work) = pair.works.front() else { return };
            if work.is_read() || to <= pair.unacknowledged {
                return;
            }
            let reached = to.min(work.end());
            let is_done = reached == work.end();
            self.progress(id, reached);
            if !is_done {
                return;
            }
            self.complete_front(id, IBV_WC_SUCCESS);
        }
    }

    fn progress(&mut self, id: u32, reached: u64) {
        let now = self.now;
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        pair.unacknowledged = reached;
        pair.loss_seen = false;
        pair.next = pair.next.max(reached);
        (pair.retries_left, pair.rnr_left) = (pair.attributes.retry_cnt, pair.attributes.rnr_retry);
        pair.deadline = if reached < pair.sent { deadline(pair, now) } else { None };
    }

    /// If a read before this has not ended, its responses were lost.
    fn expect_acknowledged(&mut self, id: u32, to: u64) -> bool {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let is_so = pair.unacknowledged >= to;
        // Once: what else is on its way says the same.
        if !is_so && !std::mem::replace(&mut pair.loss_seen, true) {
            self.resend(id);
        }
        is_so
    }

    fn wait_for_receiver(&mut self, id: u32) {
        self.counters.receivers_not_ready += 1;
        let now = self.now;
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        if pair.attributes.rnr_retry != RNR_FOR_EVER {
            if pair.rnr_left == 0 {
                return self.fail_front(id, IBV_WC_RNR_RETRY_EXC_ERR);
            }
            pair.rnr_left -= 1;
        }
        pair.next = pair.unacknowledged;
        pair.waits_until = now + RNR_STEPS;
        pair.deadline = None;
    }

    /// What was read lands in the memory of whoever asked.
    fn store_response(&mut self, id: u32, payload: &[u8]) {
        let pair = &self.pairs[&id];
        let work = &pair.works[0];
        let reached = pair.unacknowledged + 1;
        let offset = (pair.unacknowledged - work.first) * pair.mtu();
        let (end, domain, device) = (work.end(), pair.domain, pair.device);
        if !work.is_read() || payload.len() as u64 != pair.mtu().min(work.bytes - offset) {
            return self.fail_front(id, IBV_WC_BAD_RESP_ERR);
        }
        let Data::Pieces(pieces) = &work.data else { unreachable!("reads are not inline") };
        let pieces = pieces.clone();
        if self.scatter(device, domain, &pieces, offset, payload).is_err() {
            return self.fail_front(id, IBV_WC_LOC_PROT_ERR);
        }
        self.progress(id, reached);
        if reached == end {
            self.complete_front(id, IBV_WC_SUCCESS);
        }
    }

    /// Puts bytes where pieces say.
    fn scatter(
        &mut self,
        device: usize,
        domain: u32,
        pieces: &[ibv_sge],
        offset: u64,
        payload: &[u8],
    ) -> Result<(), Misfit> {
        let mut rest = payload;
        for (address, bytes, key) in parts(pieces, offset, payload.len() as u64) {
            let use_of =
                Use { key, is_remote: false, domain, address, bytes, access: IBV_ACCESS_LOCAL_WRITE };
            let (now, later) = rest.split_at(bytes as usize);
            self.store(device, &use_of, now).ok_or(Misfit::Protected)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(Misfit::TooLong) }
    }

    fn store(&mut self, device: usize, use_of: &Use, payload: &[u8]) -> Option<()> {
        let (region, start) = self.region(device, use_of)?;
        region.memory.write(start, payload).ok()?;
        self.counters.bytes_moved += payload.len() as u64;
        Some(())
    }

    /// The oldest request ends.
    fn complete_front(&mut self, id: u32, status: u32) {
        let mut wc = self.rubbish();
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let work = pair.works.pop_front().expect("the caller has found it");
        let is_ok = status == IBV_WC_SUCCESS;
        pair.done_silently += 1;
        if is_ok && work.flags & IBV_SEND_SIGNALED == 0 {
            return;
        }
        let sends = std::mem::take(&mut pair.done_silently);
        let (queue, number, epoch) = (pair.send_queue, pair.number, pair.epoch);
        let completion = match is_ok {
            true => {
                (wc.wr_id, wc.status, wc.qp_num, wc.wc_flags) = (work.id, status, number, 0);
                wc.opcode = match work.opcode {
                    IBV_WR_RDMA_READ => IBV_WC_RDMA_READ,
                    IBV_WR_SEND | IBV_WR_SEND_WITH_IMM => IBV_WC_SEND,
                    _ => IBV_WC_RDMA_WRITE,
                };
                if work.is_read() {
                    wc.byte_len = work.bytes as u32;
                }
                Completion { wc, pair: id, epoch, sends, receive: None }
            }
            false => self.failed(id, work.id, status, sends, None),
        };
        self.complete(queue, completion, false);
    }

    /// The oldest request fails, and with it the queue pair.
    pub fn fail_front(&mut self, id: u32, status: u32) {
        if !self.pairs[&id].works.is_empty() {
            self.complete_front(id, status);
        }
        self.fail(id, None);
    }

    /// One request of a queue pair in error comes back.
    fn flush(&mut self, id: u32) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        if !pair.works.is_empty() {
            return self.complete_front(id, IBV_WC_WR_FLUSH_ERR);
        }
        if let Some(receive) = pair.receives.waiting.pop_front() {
            let queue = pair.receive_queue;
            let completion = self.failed(id, receive.id, IBV_WC_WR_FLUSH_ERR, 0, Some(ReceiveOf::Pair));
            self.complete(queue, completion, true);
        }
    }

    // The responder.

    /// A request's packet arrives.
    fn respond(&mut self, id: u32, packet: Packet) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let ahead = packet.number.wrapping_sub(pair.expected) & PSN_MASK;
        if ahead >= 1 << 23 {
            return self.respond_again(id, &packet);
        }
        if ahead > 0 {
            if !std::mem::replace(&mut pair.gap_told, true) {
                pair.answers.push_back(Answer::Missing(pair.expected));
            }
            return;
        }
        pair.gap_told = false;
        let number = packet.number;
        let verdict = match packet.body {
            Body::Read(target) => self.take_read(id, number, target),
            Body::Write { start, is_last, imm, is_solicited, payload } => {
                self.take_write(id, start, is_last, imm, is_solicited, &payload)
            }
            Body::Send { is_first, is_last, imm, is_solicited, payload } => {
                self.take_send(id, is_first, is_last, imm, is_solicited, &payload)
            }
            _ => unreachable!("only requests come here"),
        };
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        match verdict {
            // A read has moved on by as many packets as its responses have.
            Verdict::Done if pair.expected == number => {
                pair.expected = (number + 1) & PSN_MASK;
                self.say_done(id, number);
            }
            Verdict::Done => {}
            Verdict::NotReady => {
                // What follows is dropped without a word until this one comes again.
                pair.gap_told = true;
                pair.answers.push_back(Answer::NotReady(number));
            }
            Verdict::Refused(status, event) => {
                self.fail(id, event);
                let pair = self.pairs.get_mut(&id).expect("the caller has found it");
                pair.answers.push_back(Answer::Refused(number, status));
            }
        }
    }

    /// Acknowledgements that wait are told as one.
    fn say_done(&mut self, id: u32, number: u32) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        match pair.answers.back_mut() {
            Some(Answer::Done(last)) => *last = number,
            _ => pair.answers.push_back(Answer::Done(number)),
        }
    }

    /// A packet that came before: what it does is not done again, but for a read.
    fn respond_again(&mut self, id: u32, packet: &Packet) {
        if let Body::Read(target) = packet.body {
            let pair = self.pairs.get_mut(&id).expect("the caller has found it");
            let behind = |answer: &Answer| answer.first().wrapping_sub(packet.number) & PSN_MASK < 1 << 23;
            pair.answers.retain(|answer| !behind(answer));
            let Target { address, key, bytes } = target;
            pair.answers.push_back(Answer::Read { first: packet.number, address, key, bytes });
            return;
        }
        self.say_done(id, packet.number);
    }

    fn take_read(&mut self, id: u32, number: u32, target: Target) -> Verdict {
        let pair = &self.pairs[&id];
        let reads = pair.answers.iter().filter(|answer| matches!(answer, Answer::Read { .. })).count();
        if pair.incoming.is_some() || reads >= usize::from(pair.attributes.max_dest_rd_atomic) {
            return INVALID;
        }
        if !self.grants(pair, &target, IBV_ACCESS_REMOTE_READ) {
            return DENIED;
        }
        let packets = target.bytes.div_ceil(pair.mtu()).max(1);
        let pair = self.pairs.get_mut(&id).expect("just found");
        pair.expected = (number + packets as u32) & PSN_MASK;
        let Target { address, key, bytes } = target;
        pair.answers.push_back(Answer::Read { first: number, address, key, bytes });
        Verdict::Done
    }

    /// Whether the peer may do this. A key of no byte is not looked at.
    fn grants(&self, pair: &Pair, target: &Target, access: u32) -> bool {
        let use_of = remote_use(pair, target, access);
        pair.attributes.qp_access_flags & access == access
            && (target.bytes == 0 || self.region(pair.device, &use_of).is_some())
    }

    fn take_write(
        &mut self,
        id: u32,
        start: Option<Target>,
        is_last: bool,
        imm: Option<u32>,
        is_solicited: bool,
        payload: &[u8],
    ) -> Verdict {
        let pair = &self.pairs[&id];
        let (target, message_bytes) = match (start, &pair.incoming) {
            (Some(target), None) => (target, target.bytes),
            (None, Some(Incoming::Write { address, key, left, bytes })) => {
                (Target { address: *address, key: *key, bytes: *left }, *bytes)
            }
            _ => return INVALID,
        };
        let bytes = payload.len() as u64;
        let fits = if is_last { bytes == target.bytes && bytes <= pair.mtu() } else { bytes == pair.mtu() };
        if !fits || bytes > target.bytes {
            return INVALID;
        }
        if !self.grants(pair, &target, IBV_ACCESS_REMOTE_WRITE) {
            return DENIED;
        }
        if imm.is_some() && !self.has_receive(id) {
            return Verdict::NotReady;
        }
        let device = pair.device;
        let use_of = remote_use(pair, &Target { bytes, ..target }, IBV_ACCESS_REMOTE_WRITE);
        if bytes > 0 && self.store(device, &use_of, payload).is_none() {
            return DENIED;
        }
        let pair = self.pairs.get_mut(&id).expect("just found");
        pair.incoming = (!is_last).then(|| Incoming::Write {
            address: target.address + bytes,
            key: target.key,
            left: target.bytes - bytes,
            bytes: message_bytes,
        });
        if imm.is_some() {
            let (receive, of) = self.take_receive(id);
            self.received(id, receive.id, of, IBV_WC_RECV_RDMA_WITH_IMM, message_bytes, imm, is_solicited);
        }
        Verdict::Done
    }

    fn take_send(
        &mut self,
        id: u32,
        is_first: bool,
        is_last: bool,
        imm: Option<u32>,
        is_solicited: bool,
        payload: &[u8],
    ) -> Verdict {
        let has_receive = self.has_receive(id);
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let (receive, of, offset) = match (is_first, pair.incoming.take()) {
            (true, None) if has_receive => {
                let (receive, of) = self.take_receive(id);
                (receive, of, 0)
            }
            (true, None) => return Verdict::NotReady,
            (false, Some(Incoming::Send { receive, of, bytes })) => (receive, of, bytes),
            (_, incoming) => {
                pair.incoming = incoming;
                return INVALID;
            }
        };
        let pair = &self.pairs[&id];
        let (device, queue) = (pair.device, pair.receive_queue);
        let domain = match of {
            ReceiveOf::Pair => pair.domain,
            ReceiveOf::Shared(shared) => self.shared[&shared].domain,
        };
        if let Err(misfit) = self.scatter(device, domain, &receive.pieces, offset, payload) {
            let (here, there) = match misfit {
                Misfit::TooLong => (IBV_WC_LOC_LEN_ERR, IBV_WC_REM_INV_REQ_ERR),
                Misfit::Protected => (IBV_WC_LOC_PROT_ERR, IBV_WC_REM_OP_ERR),
            };
            let completion = self.failed(id, receive.id, here, 0, Some(of));
            self.complete(queue, completion, true);
            return Verdict::Refused(there, None);
        }
        let bytes = offset + payload.len() as u64;
        if is_last {
            self.received(id, receive.id, of, IBV_WC_RECV, bytes, imm, is_solicited);
        } else {
            let pair = self.pairs.get_mut(&id).expect("just found");
            pair.incoming = Some(Incoming::Send { receive, of, bytes });
        }
        Verdict::Done
    }

    fn has_receive(&self, id: u32) -> bool {
        let pair = &self.pairs[&id];
        match pair.shared {
            Some(shared) => self.shared.get(&shared).is_some_and(|s| !s.receives.waiting.is_empty()),
            None => !pair.receives.waiting.is_empty(),
        }
    }

    /// A receive that the caller knows to be there.
    fn take_receive(&mut self, id: u32) -> (Receive, ReceiveOf) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let (queue, of) = match pair.shared {
            Some(shared) => {
                (&mut self.shared.get_mut(&shared).expect("it has one").receives, ReceiveOf::Shared(shared))
            }
            None => (&mut pair.receives, ReceiveOf::Pair),
        };
        (queue.waiting.pop_front().expect("the caller has looked"), of)
    }

    #[allow(clippy::too_many_arguments)]
    fn received(
        &mut self,
        id: u32,
        receive_id: u64,
        of: ReceiveOf,
        opcode: u32,
        bytes: u64,
        imm: Option<u32>,
        is_solicited: bool,
    ) {
        let mut wc = self.rubbish();
        let pair = &self.pairs[&id];
        (wc.wr_id, wc.status, wc.opcode, wc.qp_num) = (receive_id, IBV_WC_SUCCESS, opcode, pair.number);
        (wc.byte_len, wc.wc_flags) = (bytes as u32, 0);
        if let Some(imm) = imm {
            (wc.imm_data, wc.wc_flags) = (imm, IBV_WC_WITH_IMM);
        }
        let (queue, epoch) = (pair.receive_queue, pair.epoch);
        let completion = Completion { wc, pair: id, epoch, sends: 0, receive: Some(of) };
        self.complete(queue, completion, is_solicited);
    }

    /// Says the next of what the responder has to say.
    fn answer(&mut self, id: u32) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let answer = pair.answers.pop_front().expect("the caller has found one");
        let number = answer.first();
        let body = match answer {
            Answer::Done(_) => Body::Done,
            Answer::Missing(_) => Body::Missing,
            Answer::NotReady(_) => Body::NotReady,
            Answer::Refused(_, status) => Body::Refused(status),
            Answer::Read { first, address, key, bytes } => {
                match self.read_for_peer(id, first, Target { address, key, bytes }) {
                    Some(payload) => Body::Response(payload),
                    None => {
                        self.fail(id, Some(IBV_EVENT_QP_ACCESS_ERR));
                        Body::Refused(IBV_WC_REM_ACCESS_ERR)
                    }
                }
            }
        };
        self.send(id, Packet { number, body });
    }

    /// The next packet of what the peer reads. What is left comes next.
    fn read_for_peer(&mut self, id: u32, first: u32, target: Target) -> Option<Vec<u8>> {
        let pair = &self.pairs[&id];
        let bytes = pair.mtu().min(target.bytes);
        let mut payload = vec![0; bytes as usize];
        if bytes > 0 {
            let use_of = remote_use(pair, &Target { bytes, ..target }, IBV_ACCESS_REMOTE_READ);
            let (region, start) = self.region(pair.device, &use_of)?;
            region.memory.read(start, &mut payload).ok()?;
        }
        if target.bytes > bytes {
            let (first, address, bytes) =
                ((first + 1) & PSN_MASK, target.address + bytes, target.bytes - bytes);
            let pair = self.pairs.get_mut(&id).expect("just found");
            pair.answers.push_front(Answer::Read { first, address, key: target.key, bytes });
        }
        Some(payload)
    }
}

/// The request that the next packet is of.
fn work_at(pair: &Pair) -> usize {
    pair.works.partition_point(|work| work.end() <= pair.next)
}

fn deadline(pair: &Pair, now: u64) -> Option<u64> {
    // 0 is for ever.
    (pair.attributes.timeout != 0).then_some(now + TIMEOUT_STEPS)
}

fn remote_use(pair: &Pair, target: &Target, access: u32) -> Use {
    let Target { address, key, bytes } = *target;
    Use { key, is_remote: true, domain: pair.domain, address, bytes, access }
}

/// The addresses, lengths and keys of a stretch of pieces.
fn parts(pieces: &[ibv_sge], offset: u64, bytes: u64) -> impl Iterator<Item = (u64, u64, u32)> {
    let (mut skip, mut left) = (offset, bytes);
    pieces.iter().filter_map(move |piece| {
        let length = u64::from(piece.length);
        let skipped = skip.min(length);
        skip -= skipped;
        let taken = (length - skipped).min(left);
        left -= taken;
        (taken > 0).then_some((piece.addr.wrapping_add(skipped), taken, piece.lkey))
    })
}

/// How many packets are out.
const WINDOW: u64 = 32;
/// How long silence may last, whatever the queue pair's timeout says.
const TIMEOUT_STEPS: u64 = 256;
/// How long a requester waits for a receive.
const RNR_STEPS: u64 = 64;
const RNR_FOR_EVER: u8 = 7;
