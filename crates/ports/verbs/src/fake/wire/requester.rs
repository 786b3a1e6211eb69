//! The requester: what a queue pair sends, what it hears of it, and how its requests end.

use super::*;

impl World {
    /// Sends the next packet.
    pub(super) fn request(&mut self, id: u32) {
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

    pub(super) fn send(&mut self, id: u32, packet: Packet) {
        self.counters.packets += 1;
        let flow = self.pairs[&id].flow.expect("a queue pair that sends has a path");
        self.flows.get_mut(&flow).expect("it lives as long as its queue pair").packets.push_back(packet);
    }

    /// What the requester's memory, or the request itself, has for a packet.
    pub(super) fn payload(&self, pair: &Pair, work: &Work, offset: u64) -> Option<Vec<u8>> {
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
    pub(super) fn pieces_allow(&self, pair: &Pair, work: &Work) -> Option<()> {
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
    pub(super) fn time_out(&mut self, id: u32) {
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
    pub(super) fn is_silent(&self, pair: &Pair) -> bool {
        let Some(remote) = pair.remote.filter(|&remote| !self.is_frozen(remote)) else { return true };
        let has_packets = |flow: Option<u32>| {
            flow.and_then(|flow| self.flows.get(&flow)).is_some_and(|flow| !flow.packets.is_empty())
        };
        let peer = self.devices[remote].numbers.get(&pair.attributes.dest_qp_num);
        let peer = peer.map(|peer| &self.pairs[peer]);
        !has_packets(pair.flow) && peer.is_none_or(|peer| peer.answers.is_empty() && !has_packets(peer.flow))
    }

    /// Begins again at the first packet that was not acknowledged, so often.
    pub(super) fn resend(&mut self, id: u32) {
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
    pub(super) fn hear(&mut self, id: u32, packet: Packet) {
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
    pub(super) fn acknowledge(&mut self, id: u32, to: u64) {
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

    pub(super) fn progress(&mut self, id: u32, reached: u64) {
        let now = self.now;
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        pair.unacknowledged = reached;
        pair.loss_seen = false;
        pair.next = pair.next.max(reached);
        (pair.retries_left, pair.rnr_left) = (pair.attributes.retry_cnt, pair.attributes.rnr_retry);
        pair.deadline = if reached < pair.sent { deadline(pair, now) } else { None };
    }

    /// If a read before this has not ended, its responses were lost.
    pub(super) fn expect_acknowledged(&mut self, id: u32, to: u64) -> bool {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let is_so = pair.unacknowledged >= to;
        // Once: what else is on its way says the same.
        if !is_so && !std::mem::replace(&mut pair.loss_seen, true) {
            self.resend(id);
        }
        is_so
    }

    pub(super) fn wait_for_receiver(&mut self, id: u32) {
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
    pub(super) fn store_response(&mut self, id: u32, payload: &[u8]) {
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
    pub(super) fn scatter(
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

    pub(super) fn store(&mut self, device: usize, use_of: &Use, payload: &[u8]) -> Option<()> {
        let (region, start) = self.region(device, use_of)?;
        region.memory.write(start, payload).ok()?;
        self.counters.bytes_moved += payload.len() as u64;
        Some(())
    }

    /// The oldest request ends.
    pub(super) fn complete_front(&mut self, id: u32, status: u32) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let Work { id: work_id, opcode, flags, bytes, .. } =
            pair.works.pop_front().expect("the caller has found it");
        pair.done_silently += 1;
        if status == IBV_WC_SUCCESS {
            if flags & IBV_SEND_SIGNALED != 0 {
                self.tell_done(id, work_id, opcode, bytes);
            }
            return;
        }
        let (sends, queue) = (std::mem::take(&mut pair.done_silently), pair.send_queue);
        let completion = self.failed(id, work_id, status, sends, None);
        self.complete(queue, completion, false);
    }

    /// A request that asked for it is done, and with it all that were done silently.
    pub fn tell_done(&mut self, id: u32, work_id: u64, opcode: u32, bytes: u64) {
        let mut wc = self.rubbish();
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        let sends = std::mem::take(&mut pair.done_silently);
        (wc.wr_id, wc.status, wc.qp_num, wc.wc_flags) = (work_id, IBV_WC_SUCCESS, pair.number, 0);
        wc.opcode = match opcode {
            IBV_WR_RDMA_READ => IBV_WC_RDMA_READ,
            IBV_WR_SEND | IBV_WR_SEND_WITH_IMM => IBV_WC_SEND,
            _ => IBV_WC_RDMA_WRITE,
        };
        if opcode == IBV_WR_RDMA_READ {
            wc.byte_len = bytes as u32;
        }
        let (queue, epoch) = (pair.send_queue, pair.epoch);
        self.complete(queue, Completion { wc, pair: id, epoch, sends, receive: None }, false);
    }

    /// The oldest request fails, and with it the queue pair.
    pub fn fail_front(&mut self, id: u32, status: u32) {
        if !self.pairs[&id].works.is_empty() {
            self.complete_front(id, status);
        }
        self.fail(id, None);
    }

    /// One request of a queue pair in error comes back.
    pub(super) fn flush(&mut self, id: u32) {
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
}
