//! Everything that a fabric is made of, and what is done to it but for queue pairs.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use crossdock_memory::Memory;
use rustix::event::{EventfdFlags, eventfd};

use super::options::{FabricOptions, Failure, Function};
use super::pair::{Pair, Receive, ReceiveOf, ReceiveQueue};
use super::random::Random;
use super::raw::Raw;
use super::wire::Flow;
use crate::ibverbs::sys::*;

/// The code of an error.
pub(super) type Errno = i32;

pub(super) struct World {
    pub options: FabricOptions,
    pub random: Random,
    /// The time, in steps.
    pub now: u64,
    /// Nothing will happen before something is asked for.
    pub is_idle: bool,
    pub devices: Vec<Device>,
    next_id: u32,
    pub contexts: BTreeMap<u32, Context>,
    pub domains: BTreeMap<u32, Domain>,
    pub regions: BTreeMap<u32, Region>,
    pub channels: BTreeMap<u32, Channel>,
    pub queues: BTreeMap<u32, Queue>,
    pub shared: BTreeMap<u32, SharedReceives>,
    pub pairs: BTreeMap<u32, Pair>,
    pub flows: BTreeMap<u32, Flow>,
    pub failures: Vec<Failure>,
    pub counters: Counters,
    pub violations: Vec<String>,
    /// Structs of objects that were destroyed, so that whoever uses them still is found out.
    graves: Vec<Grave>,
}

/// What a fabric has counted.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub(super) calls: BTreeMap<Function, u64>,
    /// Steps made, which is the time.
    pub steps: u64,
    /// Packets put on the wire.
    pub packets: u64,
    /// Packets that were lost, or that nobody took.
    pub packets_lost: u64,
    /// Times that a requester began again from an earlier packet.
    pub resends: u64,
    /// Times that a requester was told that there was no receive.
    pub receivers_not_ready: u64,
    /// Payload bytes stored at their destination.
    pub bytes_moved: u64,
    /// Completions that did not fit into their queue.
    pub completions_lost: u64,
    /// Requests taken by `ibv_post_send`.
    pub sends_posted: u64,
    /// Queue pairs made.
    pub pairs_created: u64,
    /// Queue pairs destroyed.
    pub pairs_destroyed: u64,
    /// Regions registered.
    pub regions_registered: u64,
    /// Regions deregistered.
    pub regions_deregistered: u64,
}

impl Counters {
    /// How often a function was called.
    pub fn calls(&self, function: Function) -> u64 {
        self.calls.get(&function).copied().unwrap_or(0)
    }
}

pub(super) struct Device {
    pub ethernet: bool,
    pub mtu_bytes: u32,
    pub link_up: bool,
    pub tells_last_receive: bool,
    /// How often its addresses have changed.
    pub moves: u8,
    pub frozen_until: u64,
    pub is_fatal: bool,
    /// Queue pairs by number.
    pub numbers: BTreeMap<u32, u32>,
    /// Regions by the upper 24 bits of their keys.
    pub keys: BTreeMap<u32, u32>,
    pub key_variant: u8,
}

pub(super) struct Context {
    pub device: usize,
    pub is_dead: bool,
    pub fd: OwnedFd,
    pub events: VecDeque<DeviceEvent>,
}

/// An event that nobody has got yet.
#[derive(Clone, Copy)]
pub(super) struct DeviceEvent {
    pub kind: u32,
    pub of: EventOf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum EventOf {
    Device,
    Pair(u32),
    Queue(u32),
}

pub(super) struct Domain {
    pub context: u32,
    pub raw: Raw<ibv_pd>,
}

pub(super) struct Region {
    pub context: u32,
    pub domain: u32,
    pub memory: Memory,
    /// Where in `memory` the region begins.
    pub start: usize,
    pub iova: u64,
    pub bytes: u64,
    pub access: u32,
    pub local_key: u32,
    pub remote_key: u32,
    pub raw: Raw<ibv_mr>,
}

pub(super) struct Channel {
    pub context: u32,
    pub fd: OwnedFd,
    /// Queues with something new.
    pub events: VecDeque<u32>,
    pub raw: Raw<ibv_comp_channel>,
}

/// A completion queue.
pub(super) struct Queue {
    pub context: u32,
    pub channel: Option<u32>,
    pub capacity: u32,
    pub entries: VecDeque<Completion>,
    pub armed: Option<Arming>,
    pub has_overflowed: bool,
    /// Events that were got of the channel, and of the context.
    pub events_got: u32,
    pub async_events_got: u32,
    pub raw: Raw<ibv_cq>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Arming {
    Any,
    Solicited,
}

pub(super) struct Completion {
    pub wc: ibv_wc,
    pub pair: u32,
    pub epoch: u32,
    /// Slots of the send queue that are free once this was polled.
    pub sends: u32,
    /// Where a slot is free once this was polled.
    pub receive: Option<ReceiveOf>,
}

pub(super) struct SharedReceives {
    pub context: u32,
    pub domain: u32,
    pub receives: ReceiveQueue,
    pub raw: Raw<ibv_srq>,
}

/// Kept for the sake of those who still have a pointer; never read by the fabric.
#[allow(dead_code)]
enum Grave {
    Domain(Raw<ibv_pd>),
    Region(Raw<ibv_mr>),
    Channel(Raw<ibv_comp_channel>),
    Queue(Raw<ibv_cq>),
    Shared(Raw<ibv_srq>),
    Pair(Raw<ibv_qp>),
}

/// Why an object cannot be destroyed now.
pub(super) enum Held {
    Errno(Errno),
    /// Events of it were got and not acknowledged: whoever destroys it waits.
    Unacknowledged,
}

impl World {
    pub fn new(options: FabricOptions) -> Self {
        let devices = options.devices.iter().map(|device| Device {
            ethernet: device.ethernet,
            mtu_bytes: device.mtu_bytes,
            link_up: device.link_up,
            tells_last_receive: device.tells_last_receive,
            moves: 0,
            frozen_until: 0,
            is_fatal: false,
            numbers: BTreeMap::new(),
            keys: BTreeMap::new(),
            key_variant: 0,
        });
        Self {
            devices: devices.collect(),
            random: Random::new(options.seed),
            options,
            now: 0,
            is_idle: true,
            next_id: 1,
            contexts: BTreeMap::new(),
            domains: BTreeMap::new(),
            regions: BTreeMap::new(),
            channels: BTreeMap::new(),
            queues: BTreeMap::new(),
            shared: BTreeMap::new(),
            pairs: BTreeMap::new(),
            flows: BTreeMap::new(),
            failures: Vec::new(),
            counters: Counters::default(),
            violations: Vec::new(),
            graves: Vec::new(),
        }
    }

    pub fn id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Notes that the users of the library broke a rule of it.
    pub fn violation(&mut self, what: impl Into<String>) -> Errno {
        self.violations.push(what.into());
        libc::EINVAL
    }

    /// Counts a call, and says whether it is to fail.
    pub fn called(&mut self, function: Function) -> Result<(), Errno> {
        match self.called_with(function, None, usize::MAX) {
            Some(failure) => Err(failure.errno),
            None => Ok(()),
        }
    }

    /// The same, for a change to a state or a chain of requests.
    pub fn called_with(&mut self, function: Function, state: Option<u32>, chain: usize) -> Option<Failure> {
        *self.counters.calls.entry(function).or_default() += 1;
        let at = self.failures.iter().position(|failure| {
            failure.function == function
                && (failure.state.is_none() || failure.state == state)
                && failure.accepted < chain
        })?;
        let failure = &mut self.failures[at];
        if failure.after > 0 {
            failure.after -= 1;
            return None;
        }
        let found = failure.clone();
        failure.times = failure.times.saturating_sub(1);
        if failure.times == 0 {
            self.failures.remove(at);
        }
        Some(found)
    }

    /// Whether a call on this context can do anything.
    pub fn usable(&mut self, context: u32, function: Function) -> Result<(), Errno> {
        let Some(found) = self.contexts.get(&context) else {
            return Err(self.violation(format!("{function:?} on a context that is closed")));
        };
        let is_gone = found.is_dead
            || self.devices[found.device].is_fatal
                && !matches!(
                    function,
                    Function::GetAsyncEvent
                        | Function::PollCq
                        | Function::ReqNotifyCq
                        | Function::GetCqEvent
                        | Function::ModifyQp
                        | Function::PostSend
                        | Function::PostRecv
                        | Function::PostSrqRecv
                );
        if is_gone && !function.ends_something() {
            return Err(libc::EIO);
        }
        Ok(())
    }

    pub fn is_dead(&self, context: u32) -> bool {
        self.contexts.get(&context).is_none_or(|context| context.is_dead)
    }

    // Contexts.

    pub fn open(&mut self, device: usize) -> Result<(u32, i32), Errno> {
        if self.devices[device].is_fatal {
            return Err(libc::EIO);
        }
        let fd = event_fd()?;
        let raw_fd = fd.as_raw_fd();
        let id = self.id();
        self.contexts.insert(id, Context { device, is_dead: false, fd, events: VecDeque::new() });
        Ok((id, raw_fd))
    }

    pub fn close(&mut self, context: u32) -> Result<(), Errno> {
        let left = self.objects_of(Some(context));
        if !left.is_empty() && !self.is_dead(context) {
            return Err(libc::EBUSY);
        }
        self.contexts.remove(&context);
        Ok(())
    }

    /// What exists of a context, or of all whose process lives, in words.
    pub fn objects_of(&self, context: Option<u32>) -> Vec<String> {
        let counts = |of: u32| match context {
            Some(context) => of == context,
            None => !self.is_dead(of),
        };
        let mut found = Vec::new();
        let mut add = |kind: &str, id: u32, of: u32| {
            if counts(of) {
                found.push(format!("{kind} {id} of context {of}"));
            }
        };
        self.domains.iter().for_each(|(&id, o)| add("protection domain", id, o.context));
        self.regions.iter().for_each(|(&id, o)| add("region", id, o.context));
        self.channels.iter().for_each(|(&id, o)| add("completion channel", id, o.context));
        self.queues.iter().for_each(|(&id, o)| add("completion queue", id, o.context));
        self.shared.iter().for_each(|(&id, o)| add("shared receive queue", id, o.context));
        self.pairs.iter().for_each(|(&id, o)| add("queue pair", id, o.context));
        found
    }

    /// Everything that was not destroyed.
    pub fn leaks(&self) -> Vec<String> {
        let mut found = self.objects_of(None);
        let open = self.contexts.iter().filter(|(_, context)| !context.is_dead);
        found.extend(open.map(|(id, context)| format!("context {id} of device fake{}", context.device)));
        found
    }

    // Domains and regions.

    pub fn alloc_domain(&mut self, context: u32, raw_context: *mut ibv_context) -> *mut ibv_pd {
        let id = self.id();
        let raw = Raw::new(ibv_pd { context: raw_context, handle: id }, id);
        let head = raw.head();
        self.domains.insert(id, Domain { context, raw });
        head
    }

    pub fn dealloc_domain(&mut self, id: u32) -> Result<(), Errno> {
        let Some(domain) = self.domains.get(&id) else {
            return Err(self.violation("ibv_dealloc_pd of a domain that is deallocated"));
        };
        let is_used = self.regions.values().any(|o| o.domain == id)
            || self.pairs.values().any(|o| o.domain == id)
            || self.shared.values().any(|o| o.domain == id);
        if is_used && !self.is_dead(domain.context) {
            return Err(libc::EBUSY);
        }
        self.graves.extend(self.domains.remove(&id).map(|o| Grave::Domain(o.raw)));
        Ok(())
    }

    pub fn register(
        &mut self,
        domain: u32,
        raw_context: *mut ibv_context,
        wanted: Registration,
    ) -> Result<*mut ibv_mr, Errno> {
        let Some(owner) = self.domains.get(&domain) else {
            return Err(self.violation("memory registered in a domain that is deallocated"));
        };
        let (context, pd) = (owner.context, owner.raw.head());
        let Registration { memory, start, addr, bytes, iova, access } = wanted;
        let needs_local_write = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC;
        let known =
            IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | needs_local_write | IBV_ACCESS_OPTIONAL_RANGE;
        if access & needs_local_write != 0 && access & IBV_ACCESS_LOCAL_WRITE == 0
            || access & !known != 0
            || bytes == 0
            || iova.checked_add(bytes).is_none()
        {
            return Err(libc::EINVAL);
        }
        let id = self.id();
        let device = &mut self.devices[self.contexts[&context].device];
        if device.keys.len() as u32 >= self.options.limits.max_mr {
            return Err(libc::ENOMEM);
        }
        let index = (1..).find(|index| !device.keys.contains_key(index)).expect("fewer regions than numbers");
        device.keys.insert(index, id);
        // A key that was used before comes again after 128 registrations. Local and remote keys differ, so that
        // whoever takes one for the other is found out.
        device.key_variant = (device.key_variant + 1) & 0x7f;
        let local_key = index << 8 | u32::from(device.key_variant);
        let remote_key = local_key | 0x80;
        let head = ibv_mr {
            context: raw_context,
            pd,
            addr,
            length: bytes as usize,
            handle: id,
            lkey: local_key,
            rkey: remote_key,
        };
        let raw = Raw::new(head, id);
        let head = raw.head();
        self.regions.insert(
            id,
            Region { context, domain, memory, start, iova, bytes, access, local_key, remote_key, raw },
        );
        self.counters.regions_registered += 1;
        Ok(head)
    }

    pub fn deregister(&mut self, id: u32) -> Result<(), Errno> {
        let Some(region) = self.regions.remove(&id) else {
            return Err(self.violation("ibv_dereg_mr of a region that is deregistered"));
        };
        if let Some(context) = self.contexts.get(&region.context) {
            let device = &mut self.devices[context.device];
            if device.keys.get(&(region.local_key >> 8)) == Some(&id) {
                device.keys.remove(&(region.local_key >> 8));
            }
        }
        self.counters.regions_deregistered += 1;
        self.graves.push(Grave::Region(region.raw));
        Ok(())
    }

    /// The region that a key is of, if it may be used so.
    pub fn region(&self, device: usize, use_of: &Use) -> Option<(&Region, usize)> {
        let id = self.devices[device].keys.get(&(use_of.key >> 8))?;
        let region = &self.regions[id];
        let key = if use_of.is_remote { region.remote_key } else { region.local_key };
        let offset = use_of.address.checked_sub(region.iova)?;
        let fits = offset.checked_add(use_of.bytes).is_some_and(|end| end <= region.bytes);
        let may = key == use_of.key && region.domain == use_of.domain;
        let allows = region.access & use_of.access == use_of.access;
        (fits && may && allows).then_some((region, region.start + offset as usize))
    }

    // Completion queues and channels.

    pub fn create_channel(
        &mut self,
        context: u32,
        raw_context: *mut ibv_context,
    ) -> Result<*mut ibv_comp_channel, Errno> {
        let fd = event_fd()?;
        let id = self.id();
        let head = ibv_comp_channel { context: raw_context, fd: fd.as_raw_fd(), refcnt: 0 };
        let raw = Raw::new(head, id);
        let head = raw.head();
        self.channels.insert(id, Channel { context, fd, events: VecDeque::new(), raw });
        Ok(head)
    }

    pub fn destroy_channel(&mut self, id: u32) -> Result<(), Errno> {
        let Some(channel) = self.channels.get(&id) else {
            return Err(self.violation("ibv_destroy_comp_channel of a channel that is destroyed"));
        };
        if self.queues.values().any(|queue| queue.channel == Some(id)) && !self.is_dead(channel.context) {
            return Err(libc::EBUSY);
        }
        self.graves.extend(self.channels.remove(&id).map(|o| Grave::Channel(o.raw)));
        Ok(())
    }

    pub fn create_queue(
        &mut self,
        context: u32,
        raw_context: *mut ibv_context,
        entries: i32,
        argument: *mut c_void,
        channel: Option<(u32, *mut ibv_comp_channel)>,
    ) -> Result<*mut ibv_cq, Errno> {
        if let Some((channel, _)) = channel
            && self.channels.get(&channel).is_none_or(|channel| channel.context != context)
        {
            return Err(self.violation("ibv_create_cq with a channel of another context, or a destroyed one"));
        }
        let capacity = self.entries(entries)?;
        let id = self.id();
        let raw = Raw::new(
            ibv_cq {
                context: raw_context,
                channel: channel.map_or(ptr::null_mut(), |(_, raw)| raw),
                cq_context: argument,
                handle: id,
                cqe: capacity as i32,
                mutex: libc::PTHREAD_MUTEX_INITIALIZER,
                cond: libc::PTHREAD_COND_INITIALIZER,
                comp_events_completed: 0,
                async_events_completed: 0,
            },
            id,
        );
        let head = raw.head();
        let queue = Queue {
            context,
            channel: channel.map(|(id, _)| id),
            capacity,
            entries: VecDeque::new(),
            armed: None,
            has_overflowed: false,
            events_got: 0,
            async_events_got: 0,
            raw,
        };
        self.queues.insert(id, queue);
        Ok(head)
    }

    fn entries(&self, entries: i32) -> Result<u32, Errno> {
        match u32::try_from(entries) {
            Ok(entries @ 1..) if entries <= self.options.limits.max_cqe => Ok(entries),
            _ => Err(libc::EINVAL),
        }
    }

    pub fn resize_queue(&mut self, id: u32, entries: i32) -> Result<u32, Errno> {
        let capacity = self.entries(entries)?;
        let Some(queue) = self.queues.get_mut(&id) else {
            return Err(self.violation("ibv_resize_cq of a destroyed queue"));
        };
        if queue.entries.len() > capacity as usize {
            return Err(libc::EINVAL);
        }
        queue.capacity = capacity;
        Ok(capacity)
    }

    /// `acknowledged`: events of the channel, and of the context, that were.
    pub fn destroy_queue(&mut self, id: u32, acknowledged: (u32, u32)) -> Result<(), Held> {
        let Some(queue) = self.queues.get(&id) else {
            return Err(Held::Errno(self.violation("ibv_destroy_cq of a destroyed queue")));
        };
        if !self.is_dead(queue.context) {
            if self.pairs.values().any(|pair| pair.send_queue == id || pair.receive_queue == id) {
                return Err(Held::Errno(libc::EBUSY));
            }
            if (queue.events_got, queue.async_events_got) != acknowledged {
                return Err(Held::Unacknowledged);
            }
        }
        if let Some(channel) = queue.channel.and_then(|channel| self.channels.get_mut(&channel)) {
            channel.events.retain(|&of| of != id);
        }
        self.forget_events(EventOf::Queue(id));
        self.graves.extend(self.queues.remove(&id).map(|o| Grave::Queue(o.raw)));
        Ok(())
    }

    /// Takes completions; what they stood for can be posted again.
    pub fn poll(&mut self, id: u32, most: usize) -> Result<Vec<ibv_wc>, Errno> {
        let Some(queue) = self.queues.get_mut(&id) else {
            return Err(self.violation("ibv_poll_cq of a destroyed queue"));
        };
        let count = most.min(queue.entries.len());
        let taken: Vec<Completion> = queue.entries.drain(..count).collect();
        taken.iter().for_each(|completion| self.give_back(completion));
        Ok(taken.into_iter().map(|completion| completion.wc).collect())
    }

    /// The slots that a completion stood for are free.
    fn give_back(&mut self, completion: &Completion) {
        if let Some(pair) = self.pairs.get_mut(&completion.pair)
            && pair.epoch == completion.epoch
        {
            pair.sends_used -= completion.sends;
            if completion.receive == Some(ReceiveOf::Pair) {
                pair.receives.used -= 1;
            }
        }
        if let Some(ReceiveOf::Shared(shared)) = completion.receive
            && let Some(shared) = self.shared.get_mut(&shared)
        {
            shared.receives.used -= 1;
        }
    }

    pub fn arm(&mut self, id: u32, solicited: bool) -> Result<(), Errno> {
        let Some(queue) = self.queues.get_mut(&id) else {
            return Err(self.violation("ibv_req_notify_cq of a destroyed queue"));
        };
        if queue.channel.is_none() {
            return Err(libc::EINVAL);
        }
        queue.armed = match (queue.armed, solicited) {
            (Some(Arming::Any), _) | (_, false) => Some(Arming::Any),
            _ => Some(Arming::Solicited),
        };
        Ok(())
    }

    /// Puts a completion into its queue.
    pub fn complete(&mut self, id: u32, completion: Completion, is_solicited: bool) {
        let Some(queue) = self.queues.get_mut(&id) else {
            // Only a process that is dead leaves queue pairs without their queue.
            return;
        };
        if queue.has_overflowed || queue.entries.len() >= queue.capacity as usize {
            self.counters.completions_lost += 1;
            self.overflow(id);
            return;
        }
        let is_solicited = is_solicited || completion.wc.status != IBV_WC_SUCCESS;
        queue.entries.push_back(completion);
        let wakes = match queue.armed {
            Some(Arming::Any) => true,
            Some(Arming::Solicited) => is_solicited,
            None => false,
        };
        if wakes {
            queue.armed = None;
            if let Some(channel) = queue.channel.and_then(|channel| self.channels.get_mut(&channel)) {
                channel.events.push_back(id);
                signal(&channel.fd);
            }
        }
    }

    /// The queue is of no use any more, and neither are its queue pairs.
    fn overflow(&mut self, id: u32) {
        let queue = self.queues.get_mut(&id).expect("it was found before");
        if std::mem::replace(&mut queue.has_overflowed, true) {
            return;
        }
        let context = queue.context;
        self.report(context, DeviceEvent { kind: IBV_EVENT_CQ_ERR, of: EventOf::Queue(id) });
        let of_queue = |pair: &Pair| pair.send_queue == id || pair.receive_queue == id;
        let pairs: Vec<u32> =
            self.pairs.iter().filter(|(_, pair)| of_queue(pair)).map(|(&id, _)| id).collect();
        for pair in pairs {
            self.fail(pair, Some(IBV_EVENT_QP_FATAL));
        }
    }

    // Shared receive queues.

    pub fn create_shared(
        &mut self,
        domain: u32,
        raw: (*mut ibv_context, *mut ibv_pd),
        attributes: &ibv_srq_init_attr,
    ) -> Result<*mut ibv_srq, Errno> {
        let Some(owner) = self.domains.get(&domain) else {
            return Err(self.violation("ibv_create_srq in a domain that is deallocated"));
        };
        let context = owner.context;
        let sizes = attributes.attr;
        let limits = &self.options.limits;
        if sizes.max_wr == 0 || sizes.max_wr > limits.max_srq_wr || sizes.max_sge > limits.max_sge {
            return Err(libc::EINVAL);
        }
        let id = self.id();
        let head = ibv_srq {
            context: raw.0,
            srq_context: attributes.srq_context,
            pd: raw.1,
            handle: id,
            mutex: libc::PTHREAD_MUTEX_INITIALIZER,
            cond: libc::PTHREAD_COND_INITIALIZER,
            events_completed: 0,
        };
        let raw = Raw::new(head, id);
        let head = raw.head();
        let receives = ReceiveQueue::new(sizes.max_wr, sizes.max_sge);
        self.shared.insert(id, SharedReceives { context, domain, receives, raw });
        Ok(head)
    }

    pub fn destroy_shared(&mut self, id: u32) -> Result<(), Errno> {
        let Some(shared) = self.shared.get(&id) else {
            return Err(self.violation("ibv_destroy_srq of a destroyed queue"));
        };
        if self.pairs.values().any(|pair| pair.shared == Some(id)) && !self.is_dead(shared.context) {
            return Err(libc::EBUSY);
        }
        self.graves.extend(self.shared.remove(&id).map(|o| Grave::Shared(o.raw)));
        Ok(())
    }

    pub fn post_shared(&mut self, id: u32, receive: Receive) -> Result<(), Errno> {
        self.is_idle = false;
        match self.shared.get_mut(&id) {
            Some(shared) => shared.receives.post(receive),
            None => Err(self.violation("ibv_post_srq_recv to a destroyed queue")),
        }
    }

    pub fn bury_pair(&mut self, raw: Raw<ibv_qp>) {
        self.graves.push(Grave::Pair(raw));
    }

    // Events.

    pub fn report(&mut self, context: u32, event: DeviceEvent) {
        if let Some(context) = self.contexts.get_mut(&context)
            && !context.is_dead
        {
            context.events.push_back(event);
            signal(&context.fd);
        }
    }

    /// Events of an object that nobody got go with it.
    pub fn forget_events(&mut self, of: EventOf) {
        for context in self.contexts.values_mut() {
            context.events.retain(|event| event.of != of);
        }
    }

    /// An event, which counts against what it is of until it is acknowledged.
    pub fn next_event(&mut self, context: u32) -> Option<ibv_async_event> {
        let event = self.contexts.get_mut(&context)?.events.pop_front()?;
        let element = match event.of {
            EventOf::Device => ibv_async_event_element { port_num: 1 },
            EventOf::Pair(id) => {
                let pair = self.pairs.get_mut(&id).expect("its events would be gone");
                pair.events_got += 1;
                ibv_async_event_element { qp: pair.raw.head() }
            }
            EventOf::Queue(id) => {
                let queue = self.queues.get_mut(&id).expect("its events would be gone");
                queue.async_events_got += 1;
                ibv_async_event_element { cq: queue.raw.head() }
            }
        };
        Some(ibv_async_event { element, event_type: event.kind })
    }

    pub fn report_to_all(&mut self, device: usize, kind: u32) {
        let of_device = |context: &Context| context.device == device;
        let ids: Vec<u32> = self.contexts.iter().filter(|(_, c)| of_device(c)).map(|(&id, _)| id).collect();
        for id in ids {
            self.report(id, DeviceEvent { kind, of: EventOf::Device });
        }
    }
}

/// Memory to be registered.
pub(super) struct Registration {
    pub memory: Memory,
    /// Where in `memory` the region begins.
    pub start: usize,
    pub addr: *mut c_void,
    pub bytes: u64,
    pub iova: u64,
    pub access: u32,
}

/// What is about to be done to memory.
pub(super) struct Use {
    pub key: u32,
    pub is_remote: bool,
    pub domain: u32,
    pub address: u64,
    pub bytes: u64,
    pub access: u32,
}

fn event_fd() -> Result<OwnedFd, Errno> {
    eventfd(0, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC).map_err(|error| error.raw_os_error())
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).expect("2^64 events do not wait");
}
