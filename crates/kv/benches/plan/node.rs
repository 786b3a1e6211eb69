//! Two whole workers, with engines, protocols and control streams, over ports that only tell each other of the ends.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossdock_engine::{Engine, EngineOptions, Network, SocketNetwork, SocketOptions, now_ns};
use crossdock_kv::{
    CacheLayout, Handle, Peer, ReceiveRequest, SendRequest, Turn, Verify, Worker, WorkerOptions,
};
use crossdock_memory::{AllocateOptions, Memory, PagePool};
use crossdock_proto::{Config, Fingerprint, Identity, Proto, Rail};
use crossdock_transport::{
    Attached, DownCause, Event, Events, Fence, Grant, GrantId, LaneAddress, LaneId, LaneTags, LocalId, Op,
    PeerId, Port, PortInfo, Posted, RemoteId, RemoteKey, Result,
};

use super::{Case, NullPort, TOKENS};

/// A prefill and a decode node that have met, in one thread.
pub struct Nodes {
    prefill: Node,
    decode: Node,
    /// What decode ends name the prefill side by.
    peer: Peer,
    rooms: u64,
}

struct Node {
    worker: Worker,
    handle: Handle,
    pool: PagePool,
}

impl Nodes {
    pub fn new(case: &Case) -> Self {
        let (one, other) = <(Inbox, Inbox)>::default();
        let node = |number, layout: &CacheLayout, inbox: &Inbox, peer_inbox: &Inbox| {
            Node::new(number, layout, EndPort::new(case, inbox.clone(), peer_inbox.clone()))
        };
        let (prefill, _) = node(1, &case.source, &one, &other);
        let (decode, address) = node(2, &case.destination, &other, &one);
        let mut nodes = Self { prefill, decode, peer: Peer::node(1), rooms: 0 };
        let (_, mut up) = nodes.prefill.handle.connect(address).expect("the queue is empty");
        let begin = Instant::now();
        loop {
            nodes.prefill.worker.turn(now_ns());
            nodes.decode.worker.turn(now_ns());
            if let Some(met) = up.poll().expect("the node lives") {
                met.expect("two nodes of one layout meet");
                return nodes;
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "two nodes did not meet");
        }
    }

    /// Hands one request over. Gives what the sender's turns took in which anything happened, from opening its room to
    /// the end.
    pub fn move_request(&mut self, case: &Case) -> Duration {
        self.rooms += 1;
        let (room, tokens, deadline) = (self.rooms, TOKENS, Duration::from_secs(60));
        let source = self.prefill.pool.adopt(&case.source_pages).expect("the last room gave them back");
        let pages = self.decode.pool.adopt(&case.destination_pages).expect("the last room gave them back");
        let mut receiving = self
            .decode
            .handle
            .receive(ReceiveRequest {
                peer: self.peer,
                room,
                use_count: 0,
                tokens,
                skip_tokens: 0,
                pages,
                deadline,
            })
            .expect("the queue is empty");
        let request = SendRequest { room, use_count: 0, tokens, pages: source.share(), deadline };
        let mut sending = self.prefill.handle.open(request).expect("the queue is empty");
        sending.send_layers(case.source.layers()).expect("nothing was sent before");
        sending.finish(Vec::new()).expect("everything was sent");
        let mut spent = Duration::ZERO;
        let (mut sent, mut received, mut home) = (false, false, false);
        while !(sent && received && home) {
            let begin = Instant::now();
            if sender_turn(&mut self.prefill.worker) == Turn::Active {
                spent += begin.elapsed();
            }
            self.decode.worker.turn(now_ns());
            // A ticket tells once.
            if !sent && let Some(ended) = sending.end.poll().expect("the node lives") {
                assert!(ended.is_delivered(), "{ended}");
                sent = true;
            }
            if !received && let Some(end) = receiving.end.poll().expect("the node lives") {
                assert!(end.ended.is_delivered(), "{}", end.ended);
                received = true;
            }
            home = home || receiving.pages.poll().expect("the node lives").is_some();
        }
        spent
    }
}

/// What callgrind counts: a call that returns here, since it would not find the end of one that does not.
#[inline(never)]
fn sender_turn(worker: &mut Worker) -> Turn {
    black_box(worker.turn(now_ns()))
}

impl Node {
    fn new(number: u64, layout: &CacheLayout, port: EndPort) -> (Self, String) {
        let bind = "127.0.0.1:0".parse().expect("an address");
        let network = SocketNetwork::open(SocketOptions::new(bind)).expect("loopback is there");
        let mut proto = Config::new(Identity { node: number, incarnation: number }, "plan");
        proto.entropy = [number as u8; 32];
        proto.fingerprint = Fingerprint::new(layout.fingerprint());
        let info = port.info();
        proto.rails = vec![Rail {
            kind: info.kind,
            reach: info.reach.clone(),
            bytes_per_second: info.bytes_per_second,
        }];
        layout.encode(&mut proto.app);
        proto.pulse_address = network.pulse_address().to_owned();
        // A count of instructions takes a hundred times as long.
        proto.heartbeats_missed = 1000;
        proto.handshake_timeout_ns = 60_000_000_000;
        let engine =
            Engine::new(Proto::new(proto), Box::new(network), vec![Box::new(port)], EngineOptions::default());
        let address = engine.address().to_owned();
        // Never touched, so never there.
        let memory = Memory::allocate(layout.bytes_needed(0) as usize, &AllocateOptions::default());
        let options = WorkerOptions {
            layout: layout.clone(),
            memory: vec![memory.expect("nothing of it is used")],
            verify: Verify::Off,
            max_commands: 64,
            max_targets: 64,
            turn_bytes: WorkerOptions::TURN_BYTES,
        };
        let (worker, handle) = Worker::new(engine, options).expect("the memory fits the layout");
        (Self { worker, handle, pool: PagePool::external(layout.pages()) }, address)
    }
}

/// Immediates on their way to a port.
type Inbox = Arc<Mutex<VecDeque<u32>>>;

/// A [`NullPort`] as an engine has it: one lane, whose tokens and immediates come as soon as they are posted.
struct EndPort {
    info: PortInfo,
    null: NullPort,
    inbox: Inbox,
    peer_inbox: Inbox,
    events: VecDeque<Event>,
    regions: u32,
    lanes: u32,
}

impl EndPort {
    fn new(case: &Case, inbox: Inbox, peer_inbox: Inbox) -> Self {
        let info = PortInfo {
            kind: "null",
            name: "null".into(),
            reach: String::new(),
            numa_node: None,
            bytes_per_second: 1 << 34,
            ordered: true,
            immediates_in_flight: 1024,
        };
        let (events, regions, lanes) = Default::default();
        Self { info, null: NullPort::new(case), inbox, peer_inbox, events, regions, lanes }
    }
}

impl Port for EndPort {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn register(&mut self, _memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        self.regions += 1;
        Ok((LocalId(self.regions - 1), RemoteKey::new(&[])?))
    }

    fn deregister(&mut self, _region: LocalId) -> Result<()> {
        Ok(())
    }

    fn open_lane(&mut self, _peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        self.lanes += 1;
        Ok((LaneId(self.lanes - 1), LaneAddress::new(&[])?))
    }

    fn connect(&mut self, lane: LaneId, _remote: &LaneAddress, _tags: &LaneTags) -> Result<()> {
        self.events.push_back(Event::Up { lane });
        Ok(())
    }

    fn attach(&mut self, _lane: LaneId, _key: &RemoteKey) -> Result<Attached> {
        Ok(Attached { id: RemoteId(0), bytes: u64::MAX, mapping: None })
    }

    fn grant(&mut self, _grant: &Grant<'_>) -> Result<()> {
        Ok(())
    }

    fn revoke(&mut self, _grant: GrantId) -> Fence {
        Fence::Now
    }

    fn close(&mut self, lane: LaneId) {
        self.events.push_back(Event::Down { lane, cause: DownCause::ClosedHere });
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        let posted = self.null.post(ops);
        for op in &ops[..posted.ops] {
            if let Some(imm) = op.imm {
                self.peer_inbox.lock().unwrap_or_else(PoisonError::into_inner).push_back(imm);
            }
            if let Some(token) = op.token {
                self.events.push_back(Event::Done { lane, token });
            }
        }
        Ok(posted)
    }

    fn poll(&mut self, events: &mut Events) {
        while events.room() > 0
            && let Some(event) = self.events.pop_front()
        {
            events.push(event);
        }
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        while events.room() > 0
            && let Some(imm) = inbox.pop_front()
        {
            events.push(Event::Arrived { lane: LaneId(0), imm });
        }
    }
}
