//! The port itself: what its owner calls.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory, MemoryKind};
use crossdock_transport::{
    Arm, Attached, DeviceName, DownCause, Error, Event, Events, Fence, Grant, GrantId, GrantTable,
    LaneAddress, LaneId, LaneTags, LocalId, Op, PeerId, Port, PortInfo, Posted, RemoteKey, Result, Slab,
};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::address::{End, Key};
use crate::alarm::Alarm;
use crate::choice::{Chosen, choose, look_at};
use crate::counters::VerbsCounters;
use crate::domain::Domain;
use crate::ibverbs::chain::SendChain;
use crate::ibverbs::context::{Context, DeviceEvent, EventOf, Failed};
use crate::ibverbs::device_memory::{Means, OutOfReach, RegisterError, Why};
use crate::ibverbs::objects::{
    CompletionQueue, Completions, MemoryRegion, POLLED_MAX, Path, ProtectionDomain, QueuePair, RECEIVE_BYTES,
    WorkId,
};
use crate::ibverbs::sys::*;
use crate::lane::{After, HELLO, Habits, Lane, Meeting, State};
use crate::message::Hello;
use crate::options::VerbsOptions;
use crate::probe::{PROBE_BYTES, Probe};
use crate::receiving::Receives;
use crate::sending::OWN_REQUESTS;
use crate::verbs::Verbs;

/// A port of an RDMA device. See the [crate's page](crate) for what it promises.
pub struct VerbsPort {
    info: PortInfo,
    options: VerbsOptions,
    chosen: Chosen,
    /// Told in each key and in each address: a key of another port, or of an earlier one, is recognised.
    nonce: u64,
    /// Lanes go first, then what they were made of.
    lanes: Slab<Lane>,
    max_lanes: u32,
    /// Which lane a queue pair is of, for completions of receives.
    by_number: HashMap<u32, u32>,
    /// Lanes that want a turn, each once.
    ready: VecDeque<u32>,
    /// Queue pairs that became no lane's, and could not be destroyed yet.
    unused: Vec<QueuePair>,
    receives: Receives,
    domain: Domain,
    completions: Completions,
    completion_queue: Arc<CompletionQueue>,
    protection: Arc<ProtectionDomain>,
    context: Arc<Context>,
    alarm: Alarm,
    epoll: OwnedFd,
    /// When lanes are next asked for signs of life.
    next_keepalive: Option<Instant>,
    /// Whether the owner has asked if it may sleep since the last look.
    armed: bool,
    /// Polls since the last look at clock and events.
    polls: u32,
    /// The port's addresses may have changed since they were looked at.
    has_moved: bool,
    /// The device is gone for good.
    dead: Option<Failed>,
}

impl VerbsPort {
    /// Opens a port of a device.
    pub fn open(options: VerbsOptions) -> Result<Self> {
        options.check()?;
        let options = options.clamped();
        let verbs = match &options.verbs {
            Some(verbs) => verbs.clone(),
            None => Verbs::load()?,
        };
        let (context, chosen) = choose(&verbs, &options)?;
        let device = &chosen.device;
        let at_most = |wanted: u32, limit: i32| wanted.min(u32::try_from(limit).unwrap_or(0).max(1));
        // A few requests more than those of ops have to fit.
        let depth = at_most(options.requests_per_lane + OWN_REQUESTS, device.max_qp_wr)
            .saturating_sub(OWN_REQUESTS)
            .max(1);
        let each_lane = Receives::of_lane(options.immediates_per_lane);
        let entries_of_lane = depth + OWN_REQUESTS + each_lane;
        // Every request, signalled or not, may come back with an error: the completion queue holds them all.
        let max_lanes = options
            .max_lanes
            .min(at_most(u32::MAX, device.max_srq_wr) / each_lane)
            .min(at_most(u32::MAX, device.max_cqe) / entries_of_lane)
            .min(at_most(u32::MAX, device.max_qp));
        if max_lanes == 0 {
            return Err(Error::Unsupported {
                what: "a lane with so many requests or immediates",
                advice: "lower requests_per_lane and immediates_per_lane: the device's queues are shorter",
            });
        }
        // Not every device can make the queue longer later.
        let lanes_at_first = (ENTRIES_AT_FIRST / entries_of_lane).max(1);
        let protection = ProtectionDomain::new(&context)?;
        let completion_queue =
            CompletionQueue::new(&context, lanes_at_first.min(max_lanes) * entries_of_lane)?;
        let own_memory = |bytes| own_memory(&protection, bytes);
        let receives = Receives::new(&protection, max_lanes * each_lane, each_lane, own_memory)?;
        let messages = own_memory(max_lanes as usize * RECEIVE_BYTES)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("epoll_create1"))?;
        for fd in [completion_queue.as_fd(), context.async_fd()] {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN).map_err(os("epoll_ctl"))?;
        }
        let alarm = Alarm::new(&epoll)?;
        let reads = |limit: i32| u8::try_from(limit.clamp(1, 255)).expect("clamped");
        let habits = Habits {
            port: chosen.port,
            partition_key_index: options.partition_key_index,
            ack_timeout_exponent: options.ack_timeout_exponent(),
            retries: options.retries,
            reads: reads(device.max_qp_init_rd_atom),
            reads_served: reads(device.max_qp_rd_atom),
            immediates: options.immediates_per_lane,
            depth,
            close_timeout: options.close_timeout,
            #[cfg(feature = "fake")]
            floods: options.floods,
        };
        let info = PortInfo {
            kind: "verbs",
            name: format!("{}:{}", context.name(), chosen.port),
            reach: if options.reach.is_empty() { chosen.reach() } else { options.reach.clone() },
            numa_node: chosen.numa_node,
            bytes_per_second: options.bytes_per_second.unwrap_or(chosen.bytes_per_second),
            ordered: true,
            immediates_in_flight: options.immediates_per_lane,
        };
        let name = DeviceName::new(&info.name);
        Ok(Self {
            info,
            nonce: u64::from_ne_bytes(random()?),
            lanes: Slab::new(max_lanes),
            max_lanes,
            by_number: HashMap::with_capacity(max_lanes as usize),
            ready: VecDeque::with_capacity(max_lanes as usize),
            unused: Vec::new(),
            receives,
            domain: Domain {
                name,
                regions: Slab::new(options.max_regions),
                grants: GrantTable::new(),
                chain: SendChain::new(),
                messages,
                habits,
                request_bytes: options.request_bytes.min(chosen.max_message_bytes).max(1),
                post_failed: None,
                room_made: false,
                restocked: true,
                emptied: 0,
                counters: VerbsCounters::default(),
            },
            completions: Completions::new(),
            completion_queue,
            protection,
            context,
            alarm,
            epoll,
            next_keepalive: None,
            armed: false,
            polls: 0,
            has_moved: false,
            dead: None,
            chosen,
            options,
        })
    }

    /// What this port has done so far.
    pub fn counters(&self) -> VerbsCounters {
        self.domain.counters
    }

    /// How many lanes it takes: fewer than asked for where the device's queues are shorter.
    pub fn max_lanes(&self) -> u32 {
        self.max_lanes
    }

    /// The device and its port, and by what its lanes are reached, for people: as it is now.
    pub fn describe(&self) -> String {
        let (chosen, options) = (&self.chosen, &self.options);
        format!(
            "{}, gid {} {} ({}), mtu {}, pkey {:#06x}, service level {}, traffic class {}",
            self.info.name,
            chosen.gid_index,
            chosen.gid,
            chosen.reach(),
            128_u32 << chosen.mtu,
            chosen.partition_key,
            options.service_level,
            options.traffic_class
        )
    }

    /// Puts a lane's queue pair into the error state without a word to the port, as a device does that gives it up.
    #[cfg(feature = "fake")]
    pub fn push_into_error(&mut self, lane: LaneId) {
        if let Some(lane) = self.lanes.get_mut(lane.0) {
            lane.push_into_error();
        }
    }

    fn enqueue(ready: &mut VecDeque<u32>, lane: &mut Lane) {
        if !std::mem::replace(&mut lane.queued, true) {
            ready.push_back(lane.id.0);
        }
    }

    /// Makes a GPU's memory usable, as [`register`](Port::register) does the host's, by the first means that does:
    /// dma-buf, then the vendor's peer-memory module. The error says why neither does; then what is to travel has to be
    /// staged in host memory.
    pub fn register_device(
        &mut self,
        memory: &Memory,
    ) -> std::result::Result<(LocalId, RemoteKey, Means), RegisterError> {
        let (region, means) = match self.by_dma_buf(memory) {
            Ok(region) => (region, Means::DmaBuf),
            Err(dma_buf) => match self.by_peer_memory(memory) {
                Ok(region) => (region, Means::PeerMemory { dma_buf }),
                Err(peer_memory) => return Err(OutOfReach { dma_buf, peer_memory }.into()),
            },
        };
        let (id, key) = self.keep(region)?;
        Ok((id, key, means))
    }

    fn by_dma_buf(&self, memory: &Memory) -> std::result::Result<MemoryRegion, Why> {
        let of = |access| MemoryRegion::of_dma_buf(&self.protection, memory, access);
        // For host memory the library leaves out what the kernel does not know; here nobody does.
        let plain = self.access() & !IBV_ACCESS_OPTIONAL_RANGE;
        self.probed(of(self.access()).or_else(|_| of(plain))?)
    }

    fn by_peer_memory(&self, memory: &Memory) -> std::result::Result<MemoryRegion, Why> {
        self.probed(MemoryRegion::of_peer(&self.protection, memory, self.access())?)
    }

    fn probed(&self, region: MemoryRegion) -> std::result::Result<MemoryRegion, Why> {
        match self.options.probe_regions {
            true => self.probe(&region).map(|()| region).map_err(|_| Why::ProbeFailed),
            false => Ok(region),
        }
    }

    /// Looks at what does not come by completions: deadlines, signs of life, and what the device says by itself.
    fn look_around(&mut self) {
        self.polls = 0;
        if std::mem::take(&mut self.armed) {
            self.completion_queue.take_wakes();
        }
        while let Some(event) = self.context.next_event() {
            self.heed(event);
        }
        let now = Instant::now();
        if !self.alarm.is_over(now) {
            return;
        }
        let mut next: Option<Instant> = None;
        let mut sooner = |deadline: Instant| next = Some(next.map_or(deadline, |next| next.min(deadline)));
        let ask = self.next_keepalive.is_some_and(|at| at <= now);
        let mut up = false;
        for (_, lane) in self.lanes.iter_mut() {
            if lane.deadline().is_some_and(|deadline| deadline <= now) {
                lane.expire();
                Self::enqueue(&mut self.ready, lane);
            }
            if ask {
                lane.keep_alive(&mut self.domain);
                if lane.wants_turn() {
                    Self::enqueue(&mut self.ready, lane);
                }
            }
            up |= matches!(lane.state, State::Up);
            lane.deadline().into_iter().for_each(&mut sooner);
        }
        if ask || self.next_keepalive.is_none() {
            self.next_keepalive = up.then(|| now + self.options.keepalive);
        }
        self.next_keepalive.into_iter().for_each(&mut sooner);
        self.alarm.set(next);
    }

    /// Makes sure that the lane's deadline is seen, and that an up lane is asked for signs of life.
    fn watch(alarm: &mut Alarm, next_keepalive: &mut Option<Instant>, keepalive: Duration, lane: &Lane) {
        if let Some(deadline) = lane.deadline() {
            alarm.sooner(deadline);
        }
        if matches!(lane.state, State::Up) && next_keepalive.is_none() {
            let at = Instant::now() + keepalive;
            *next_keepalive = Some(at);
            alarm.sooner(at);
        }
    }

    /// Something that the device says by itself.
    fn heed(&mut self, event: DeviceEvent) {
        match (event.kind, event.of) {
            (
                IBV_EVENT_QP_FATAL | IBV_EVENT_QP_REQ_ERR | IBV_EVENT_QP_ACCESS_ERR,
                EventOf::QueuePair(number),
            ) => {
                let lane = self.by_number.get(&number).copied();
                if let Some(lane) = lane.and_then(|id| self.lanes.get_mut(id)) {
                    lane.gave_up(event.kind, &mut self.domain);
                    Self::enqueue(&mut self.ready, lane);
                }
            }
            (IBV_EVENT_QP_LAST_WQE_REACHED, EventOf::QueuePair(number)) => {
                let lane = self.by_number.get(&number).copied();
                if let Some(lane) = lane.and_then(|id| self.lanes.get_mut(id)) {
                    lane.last_receive_taken();
                    Self::enqueue(&mut self.ready, lane);
                }
            }
            // Completions are lost, or everything is: nothing can begin here any more.
            (IBV_EVENT_CQ_ERR | IBV_EVENT_SRQ_ERR | IBV_EVENT_DEVICE_FATAL, _) => {
                self.dead.get_or_insert(Failed { call: "ibv_get_async_event", errno: libc::EIO });
                for (_, lane) in self.lanes.iter_mut() {
                    lane.gave_up(event.kind, &mut self.domain);
                    Self::enqueue(&mut self.ready, lane);
                }
            }
            // How peers reach this port may be another from now on. Lanes that are up keep to what they were told.
            (
                IBV_EVENT_PORT_ACTIVE
                | IBV_EVENT_LID_CHANGE
                | IBV_EVENT_PKEY_CHANGE
                | IBV_EVENT_SM_CHANGE
                | IBV_EVENT_CLIENT_REREGISTER
                | IBV_EVENT_GID_CHANGE,
                EventOf::Port(port),
            ) if port == self.chosen.port => self.has_moved = true,
            // A link that is down shows in what its lanes do not hear, and may come back before they notice.
            _ => {}
        }
    }

    /// Takes completions as far as there is room for what they say.
    fn take_completions(&mut self, events: &mut Events) {
        for _ in 0..BATCHES_PER_POLL {
            if self.completions.is_empty() {
                let most = events.room().min(POLLED_MAX);
                if most == 0 {
                    return;
                }
                if let Err(failed) = self.completion_queue.poll(&mut self.completions, most) {
                    self.dead.get_or_insert(failed);
                    return self.give_up(DownCause::Broken { call: failed.call, errno: failed.errno });
                }
                if self.completions.is_empty() {
                    self.domain.emptied += 1;
                    return;
                }
            }
            while events.room() > 0
                && let Some(completion) = self.completions.take()
            {
                self.domain.counters.completions += 1;
                self.take_completion(&completion, events);
            }
        }
    }

    fn take_completion(&mut self, completion: &ibv_wc, events: &mut Events) {
        let good = completion.status == IBV_WC_SUCCESS;
        let lane = match WorkId::of(completion.wr_id) {
            WorkId::Send { lane, request } => {
                let Some(lane) = self.lanes.get_mut(lane) else { return };
                if good {
                    lane.completed(request, &mut self.domain);
                    if let Some(token) = lane.next_done() {
                        events.push(Event::Done { lane: lane.id, token });
                    }
                } else {
                    lane.failed(request, completion.status, completion.vendor_err, &mut self.domain);
                }
                lane
            }
            WorkId::Receive { buffer } => {
                let lane = self.by_number.get(&completion.qp_num).copied();
                let Some(lane) = lane.and_then(|id| self.lanes.get_mut(id)) else {
                    return self.receives.give_back(buffer);
                };
                match good {
                    true => Self::receive(lane, completion, buffer, &self.receives, &mut self.domain, events),
                    false => lane.receive_failed(completion.status, completion.vendor_err, &mut self.domain),
                }
                self.receives.give_back(buffer);
                lane
            }
        };
        if lane.wants_turn() {
            Self::enqueue(&mut self.ready, lane);
        }
        Self::watch(&mut self.alarm, &mut self.next_keepalive, self.options.keepalive, lane);
    }

    fn receive(
        lane: &mut Lane,
        completion: &ibv_wc,
        buffer: u32,
        receives: &Receives,
        domain: &mut Domain,
        events: &mut Events,
    ) {
        let imm = u32::from_be(completion.imm_data);
        match completion.opcode {
            IBV_WC_RECV_RDMA_WITH_IMM => {
                if lane.immediate(domain) {
                    domain.counters.immediates += 1;
                    events.push(Event::Arrived { lane: lane.id, imm });
                }
            }
            _ if completion.byte_len as usize == Hello::BYTES && imm == HELLO => {
                let mut hello = [0; Hello::BYTES];
                receives.read(buffer, &mut hello);
                if lane.hello(&hello, domain) {
                    events.push(Event::Up { lane: lane.id });
                }
            }
            _ if completion.byte_len == 0 && completion.wc_flags & IBV_WC_WITH_IMM != 0 => {
                lane.word(imm, domain)
            }
            _ => lane.misbehaved("it sent what is neither a hello nor a word", domain),
        }
    }

    /// Every lane ends.
    fn give_up(&mut self, cause: DownCause) {
        for (_, lane) in self.lanes.iter_mut() {
            lane.fail(cause);
            Self::enqueue(&mut self.ready, lane);
        }
    }

    fn take_turns(&mut self, events: &mut Events) {
        for _ in 0..self.ready.len() {
            let id = self.ready.pop_front().expect("one for each turn of the loop");
            let Some(lane) = self.lanes.get_mut(id) else { continue };
            lane.queued = false;
            match lane.turn(events, &mut self.domain) {
                After::Sleep => {
                    Self::watch(&mut self.alarm, &mut self.next_keepalive, self.options.keepalive, lane);
                }
                After::Again => Self::enqueue(&mut self.ready, lane),
                After::Remove => {
                    // The number may be another lane's already.
                    if self.by_number.get(&lane.number) == Some(&id) {
                        self.by_number.remove(&lane.number);
                    }
                    self.receives.lane_ended();
                    self.lanes.remove(id);
                }
            }
        }
    }

    /// Sees that the queue of completions holds what one lane more may bring.
    fn make_room_for_lane(&mut self) -> Result<()> {
        let lanes = self.lanes.iter().count() as u32 + 1;
        let entries_of_lane =
            self.domain.habits.depth + OWN_REQUESTS + Receives::of_lane(self.domain.habits.immediates);
        let wanted = lanes * entries_of_lane;
        if wanted > self.completion_queue.capacity() {
            let entries = (wanted * 2).min(self.max_lanes * entries_of_lane);
            self.completion_queue.resize(entries)?;
        }
        Ok(())
    }

    /// Lanes are opened at the addresses that the port has now. One without a link keeps those that it had; and peers have
    /// been told the kind of network, which stays.
    fn look_at_addresses(&mut self) {
        if !self.has_moved {
            return;
        }
        let found = look_at(&self.context, self.chosen.device, self.chosen.port, &self.options);
        if let Ok(found) = found
            && found.reach() == self.chosen.reach()
        {
            self.chosen = found;
            self.has_moved = false;
        }
    }

    /// What peers and this port may do in registered memory.
    fn access(&self) -> u32 {
        let access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
        access | if self.options.relaxed_ordering { IBV_ACCESS_RELAXED_ORDERING } else { 0 }
    }

    fn keep(&mut self, region: MemoryRegion) -> Result<(LocalId, RemoteKey)> {
        let key = region.remote_key;
        #[cfg(feature = "fake")]
        let key = if self.options.wrong_keys { !key } else { key };
        let key = Key { key, base: region.base(), bytes: region.bytes(), nonce: self.nonce };
        let id = self.domain.regions.insert(region);
        Ok((LocalId(id.ok_or(self.domain.regions.full("regions"))?), key.encode()))
    }

    fn probe(&self, region: &MemoryRegion) -> Result<()> {
        let probe = Probe {
            context: &self.context,
            protection: &self.protection,
            receives: self.receives.queue(),
            chosen: &self.chosen,
            options: &self.options,
            scratch: &own_memory(&self.protection, 2 * PROBE_BYTES)?,
        };
        probe.run(region)
    }

    fn make_queue_pair(&mut self) -> std::result::Result<QueuePair, Failed> {
        let make = |inline_bytes| {
            let requests = self.domain.habits.depth + OWN_REQUESTS;
            let receives = self.receives.queue();
            QueuePair::new(&self.protection, &self.completion_queue, receives, requests, inline_bytes)
        };
        // A device says what it takes inline only by refusing more.
        let queue_pair = make(self.options.inline_bytes).or_else(|_| make(0))?;
        let ready = queue_pair.to_init(self.domain.habits.port, self.domain.habits.partition_key_index);
        match ready {
            Ok(()) => Ok(queue_pair),
            Err(failed) => {
                self.unused.push(queue_pair);
                self.destroy_unused();
                Err(failed)
            }
        }
    }

    /// A queue pair that the device does not let go of is tried again.
    fn destroy_unused(&mut self) {
        for queue_pair in std::mem::take(&mut self.unused) {
            self.unused.extend(queue_pair.destroy().err().map(|(queue_pair, _)| queue_pair));
        }
    }
}

impl Port for VerbsPort {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        if memory.kind() == MemoryKind::Device {
            let (id, key, _) = self.register_device(memory).map_err(|error| match error {
                RegisterError::OutOfReach(why) => Error::Unsupported {
                    what: "registration of GPU memory that this RDMA device does not reach",
                    advice: why.advice(),
                },
                RegisterError::Port(error) => error,
            })?;
            return Ok((id, key));
        }
        let region = MemoryRegion::new(&self.protection, memory, self.access())?;
        if self.options.probe_regions {
            self.probe(&region)?;
        }
        self.keep(region)
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        if self.domain.grants.uses(region) {
            return Err(Error::RegionInUse { by: "a grant" });
        }
        if self.lanes.iter().any(|(_, lane)| lane.sending.uses(region)) {
            return Err(Error::RegionInUse { by: "an op" });
        }
        // Deregistering is a fence by itself: afterwards the device refuses the key.
        let found = self.domain.regions.get_mut(region.0);
        found.ok_or(Error::UnknownRegion { side: "local", region: region.0 })?.deregister()?;
        self.domain.regions.remove(region.0);
        Ok(())
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        if let Some(failed) = self.dead {
            return Err(failed.into());
        }
        self.destroy_unused();
        if self.unused.len() >= UNUSED_MAX {
            return Err(Error::Limit {
                what: "queue pairs that cannot be destroyed",
                limit: UNUSED_MAX as u64,
            });
        }
        self.look_at_addresses();
        self.make_room_for_lane()?;
        let queue_pair = self.make_queue_pair()?;
        let first_packet = u32::from_ne_bytes(random()?) & PACKETS;
        let number = queue_pair.number;
        let address = End {
            link: self.chosen.link,
            mtu: self.chosen.mtu,
            reads_served: self.domain.habits.reads_served,
            queue_pair: number,
            first_packet,
            lid: self.chosen.lid,
            partition_key: self.chosen.partition_key,
            gid: self.chosen.gid,
            nonce: self.nonce,
        };
        let habits = self.domain.habits;
        let full = self.lanes.full("lanes");
        let id = self
            .lanes
            .insert_with(|id, slot| Lane::new(LaneId(id), slot, peer, queue_pair, first_packet, &habits));
        let id = id.ok_or(full)?;
        self.domain.counters.queue_pairs_created += 1;
        self.by_number.insert(number, id);
        self.receives.lane_opened();
        Ok((LaneId(id), address.encode()))
    }

    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        let remote = End::decode(remote)?;
        let ours = (self.nonce, self.link_number(lane)?);
        let theirs = (remote.nonce, remote.queue_pair);
        let found = find(&mut self.lanes, lane)?;
        match found.state {
            State::Open => {}
            State::Meeting(_) | State::Up => {
                return Err(Error::Unsupported {
                    what: "connecting a lane twice",
                    advice: "open another lane",
                });
            }
            _ => return Err(Error::LaneDown { lane }),
        }
        if remote.link != self.chosen.link {
            return Err(Error::BadAddress { reason: "InfiniBand and Ethernet do not reach each other" });
        }
        // Two limited members of a partition do not hear each other either.
        let (here, there) = (self.chosen.partition_key, remote.partition_key);
        if (here ^ there) & PARTITION != 0 || (here | there) & FULL_MEMBER == 0 {
            return Err(Error::BadAddress {
                reason: "its partition key is not one that this port's goes with: see partition_key_index",
            });
        }
        if ours == theirs {
            return Err(Error::BadAddress { reason: "a lane cannot be connected to itself" });
        }
        let path = Path {
            port: self.chosen.port,
            lid: remote.lid,
            gid: remote.gid,
            gid_index: self.chosen.gid_index,
            service_level: self.options.service_level,
            traffic_class: self.options.traffic_class,
            hop_limit: self.options.hop_limit,
            mtu: self.chosen.mtu.min(remote.mtu),
        };
        let deadline = Instant::now() + self.options.connect_timeout;
        // Both ends know both names, so both know without a word which of them speaks first.
        let meeting = Meeting { tags: *tags, first: ours < theirs, path, deadline };
        found.connect(meeting, remote, &mut self.domain)?;
        Self::enqueue(&mut self.ready, found);
        self.alarm.sooner(deadline);
        Ok(())
    }

    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached> {
        let key = Key::decode(key)?;
        let found = find(&mut self.lanes, lane)?;
        found.check_up()?;
        if found.remote.is_none_or(|remote| remote.nonce != key.nonce) {
            return Err(Error::BadKey { reason: "it is of another port than the lane's peer" });
        }
        let id = found.sending.attach(key)?;
        Ok(Attached { id, bytes: key.bytes, mapping: None })
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        let regions = &self.domain.regions;
        self.domain.grants.insert(grant, |region| regions.get(region.0).map(MemoryRegion::bytes))
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        let peer = self.domain.grants.covered_by(grant).map(|(peer, _)| peer);
        self.domain.grants.remove(grant);
        // The device checks keys, and every lane of the peer can use them.
        let reachable = peer.is_some_and(|peer| {
            self.lanes.iter().any(|(_, lane)| lane.peer == peer && !matches!(lane.state, State::Ended(_)))
        });
        if reachable { Fence::WhenDown } else { Fence::Now }
    }

    fn close(&mut self, lane: LaneId) {
        let Some(found) = self.lanes.get_mut(lane.0) else { return };
        found.close(&mut self.domain);
        Self::enqueue(&mut self.ready, found);
        Self::watch(&mut self.alarm, &mut self.next_keepalive, self.options.keepalive, found);
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        let found = find(&mut self.lanes, lane)?;
        let posted = found.post(ops, &mut self.domain);
        if found.wants_turn() {
            Self::enqueue(&mut self.ready, found);
        }
        posted
    }

    fn poll(&mut self, events: &mut Events) {
        self.polls += 1;
        if self.armed || self.polls >= POLLS_PER_LOOK {
            self.look_around();
        }
        self.take_completions(events);
        self.domain.restocked = self.receives.restock();
        self.take_turns(events);
    }

    fn arm(&mut self) -> Arm<'_> {
        // The next poll looks at everything, whatever this says.
        self.armed = true;
        let room_made = std::mem::take(&mut self.domain.room_made);
        if !self.ready.is_empty() || room_made || !self.completions.is_empty() || self.alarm.is_late() {
            return Arm::Ready;
        }
        // What came before the queue was armed wakes nobody: it is polled once more, and kept.
        let armed = self.completion_queue.arm();
        let polled = self.completion_queue.poll(&mut self.completions, POLLED_MAX);
        if armed.and(polled).is_err() || !self.completions.is_empty() {
            return Arm::Ready;
        }
        Arm::Sleep(self.epoll.as_fd())
    }
}

impl VerbsPort {
    fn link_number(&self, lane: LaneId) -> Result<u32> {
        match self.lanes.get(lane.0) {
            Some(found) => Ok(found.number),
            None if self.lanes.is_spent(lane.0) => Err(Error::LaneDown { lane }),
            None => Err(Error::UnknownLane { lane }),
        }
    }
}

impl Drop for VerbsPort {
    /// Tells every peer, and gives the device a moment to do so. What is not told then is found by the peers' signs of
    /// life.
    fn drop(&mut self) {
        for (_, lane) in self.lanes.iter_mut() {
            lane.close(&mut self.domain);
        }
        let until = Instant::now() + self.options.close_timeout.min(FAREWELL);
        let mut events = Events::with_capacity(POLLED_MAX);
        while self.lanes.iter().any(|(_, lane)| matches!(lane.state, State::Closing { .. }))
            && Instant::now() < until
        {
            self.poll(&mut events);
            events.clear();
            std::thread::yield_now();
        }
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        Error::Os { call: failed.call, errno: failed.errno }
    }
}

fn find(lanes: &mut Slab<Lane>, lane: LaneId) -> Result<&mut Lane> {
    let spent = lanes.is_spent(lane.0);
    match lanes.get_mut(lane.0) {
        Some(found) => Ok(found),
        None if spent => Err(Error::LaneDown { lane }),
        None => Err(Error::UnknownLane { lane }),
    }
}

/// Memory of the port's own: peers do not know its key, but the device may read and write it.
fn own_memory(protection: &Arc<ProtectionDomain>, bytes: usize) -> Result<MemoryRegion> {
    let memory = Memory::allocate(bytes, &AllocateOptions::default())
        .map_err(|_| Error::Os { call: "mmap", errno: libc::ENOMEM })?;
    Ok(MemoryRegion::new(protection, &memory, IBV_ACCESS_LOCAL_WRITE)?)
}

pub(crate) fn os(call: &'static str) -> impl Fn(Errno) -> Error {
    move |code| Error::Os { call, errno: code.raw_os_error() }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    // The kernel gives up to 256 bytes in one piece.
    getrandom(&mut bytes[..], GetRandomFlags::empty()).map_err(os("getrandom"))?;
    Ok(bytes)
}

/// A partition key is a partition's number, and whether the port is more than a limited member of it.
const PARTITION: u16 = FULL_MEMBER - 1;
const FULL_MEMBER: u16 = 1 << 15;
/// Packets are numbered by 24 bits.
const PACKETS: u32 = (1 << 24) - 1;
/// So many completions, of 64 bytes or so, the queue has room for at first.
const ENTRIES_AT_FIRST: u32 = 1 << 16;
/// A device that lets go of none of so many queue pairs is asked for no more.
const UNUSED_MAX: usize = 16;
/// How many batches of completions one poll takes.
const BATCHES_PER_POLL: usize = 8;
/// An owner that never sleeps looks at clock and events this often.
const POLLS_PER_LOOK: u32 = 64;
/// How long the owner of a port that is dropped waits for its lanes' farewells.
const FAREWELL: Duration = Duration::from_millis(200);
