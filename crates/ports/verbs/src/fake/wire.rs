//! How packets travel, and what requesters and responders make of them: the reliable connection of the InfiniBand
//! specification, a packet a step.
//!
//! What one queue pair sends to another stays in order, and stays on its way when the queue pair is destroyed. A packet is
//! let in by its number and the device that it comes from, as on the wire: a queue pair that has got the number of another
//! may be sent what was meant for that.

mod requester;
mod responder;

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

/// The address of a device at this index, when its addresses have changed so often: link-local ones, then those of IPv4.
pub(super) fn gid(device: usize, index: usize, moves: u8) -> [u8; 16] {
    let mut gid = [0; 16];
    let number = (device as u16 + 1).to_be_bytes();
    if index < 2 {
        gid[..2].copy_from_slice(&[0xfe, 0x80]);
        gid[8..12].copy_from_slice(&[0x02, 0xfa, 0xce, 0xff]);
        gid[12] = moves;
    } else {
        gid[10..14].copy_from_slice(&[0xff, 0xff, 10, 77 + moves]);
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
            let (indices, moves) = (0..self.devices[device].gids().len(), self.devices[device].moves);
            match path.is_global {
                0 => !self.devices[device].ethernet && lid(device) == path.dlid,
                _ => indices.into_iter().any(|index| gid(device, index, moves) == path.grh.dgid.raw),
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
