//! The responder: what a queue pair makes of the packets that come to it, and what it answers.

use super::*;

impl World {
    /// A request's packet arrives.
    pub(super) fn respond(&mut self, id: u32, packet: Packet) {
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
    pub(super) fn say_done(&mut self, id: u32, number: u32) {
        let pair = self.pairs.get_mut(&id).expect("the caller has found it");
        match pair.answers.back_mut() {
            Some(Answer::Done(last)) => *last = number,
            _ => pair.answers.push_back(Answer::Done(number)),
        }
    }

    /// A packet that came before: what it does is not done again, but for a read.
    pub(super) fn respond_again(&mut self, id: u32, packet: &Packet) {
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

    pub(super) fn take_read(&mut self, id: u32, number: u32, target: Target) -> Verdict {
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
    pub(super) fn grants(&self, pair: &Pair, target: &Target, access: u32) -> bool {
        let use_of = remote_use(pair, target, access);
        pair.attributes.qp_access_flags & access == access
            && (target.bytes == 0 || self.region(pair.device, &use_of).is_some())
    }

    pub(super) fn take_write(
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

    pub(super) fn take_send(
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

    pub(super) fn has_receive(&self, id: u32) -> bool {
        let pair = &self.pairs[&id];
        match pair.shared {
            Some(shared) => self.shared.get(&shared).is_some_and(|s| !s.receives.waiting.is_empty()),
            None => !pair.receives.waiting.is_empty(),
        }
    }

    /// A receive that the caller knows to be there.
    pub(super) fn take_receive(&mut self, id: u32) -> (Receive, ReceiveOf) {
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
    pub(super) fn received(
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
    pub(super) fn answer(&mut self, id: u32) {
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
    pub(super) fn read_for_peer(&mut self, id: u32, first: u32, target: Target) -> Option<Vec<u8>> {
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
